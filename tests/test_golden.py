"""Compare with outputs of the authors' own code, kept in folders outside this repository.

    python tests/test_golden.py FOLDER...        # a folder of cases, or of folders of cases

prints the largest absolute difference per case and output, and exits non-zero above 1e-4 (gradients: largest difference
over largest magnitude, 1e-3). Under pytest the folders come from the environment variables LIBRA_GOLDEN,
LIBRA_GOLDEN_HAPLOVL and LIBRA_GOLDEN_HOVLE.
"""
import json
import math
import os
import re
import sys
import traceback
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.plots import attention_difference
from generate import generate
from model import Libra, LibraConfig
from streams import Streams
from text import IMG, Text
from tokenizer import LFQ, ClipConfig, ClipViT, Decoder, ImageTokenizer, ImageTokenizerConfig, to_rgb
from train_tokenizer import Discriminator, adaptive_weight, discriminator_loss, lfq_loss

ABSOLUTE, GRADIENT = 1e-4, 1e-3


class Report(list):
    """(output, difference, bar) of one case"""

    def same(self, name, ours, theirs, where=None):
        if where is not None:
            ours, theirs = ours[where], theirs[where]
        assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        ours, theirs = ours.double(), theirs.double()
        difference = (ours - theirs).abs().detach()[ours != theirs]          # equal infinities are equal
        self.append((name, float(difference.max()) if len(difference) else 0.0, ABSOLUTE))       # NaN stays NaN

    def gradient(self, name, ours, theirs):
        self.append((name, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)), GRADIENT))


def tensors(path):
    return {name: t.float() if t.dtype == torch.float16 else t for name, t in load_file(path).items()}


def case_llm(folder, report):
    config = LibraConfig.from_file(folder / "config.json")
    model = Libra(config)
    weights = {k: v for k, v in tensors(folder / "model.safetensors").items()
               if not k.endswith(("_placeholder", "inv_freq")) and (config.use_bridge or "_bridge_on_" not in k)}
    assert weights.keys() == model.state_dict().keys(), sorted(weights.keys() ^ model.state_dict().keys())
    model.load_state_dict(weights)
    io = tensors(folder / "io.safetensors")
    if "input_ids" in io:
        compare_forward(model, config, io, folder, report)
    for prefix in ("gen", "gen_eoi"):
        if f"{prefix}.new_ids" in io and not (prefix == "gen" and "gen_eoi.new_ids" in io):
            compare_generation(model, io, prefix, report)


def compare_forward(model, config, io, folder, report):
    ids = io["input_ids"].permute(1, 2, 0)                                                    # (B, L, K)
    mask = io.get("attention_mask", torch.ones(ids.shape[:2])).bool()
    loss_mask = (io["labels"][0] != -100) if "labels" in io else None
    if loss_mask is not None:
        for k in range(len(io["labels"])):
            assert (io["labels"][k][loss_mask] == io["input_ids"][k][loss_mask]).all(), "labels are not the ids"
    real = [None if rows is None else [row[m] for row, m in zip(rows, mask)] for rows in (ids, loss_mask)]
    streams = Streams.from_ids(real[0], config, real[1])
    signal = signal_of(io, "", ids, mask, config)

    def padded(joined):                                   # (B, l, W), packed rows -> (n, W), real tokens in order
        return torch.cat([row[:n] for row, n in zip(joined, streams.lengths)])
    states, maps = look_inside(model, streams, signal)
    for i, state in enumerate(states):
        name = f"hidden_states.{i}" if i < len(states) - 1 else "last_hidden_state"
        theirs = io.get("hidden_states", [None] * 99)[i] if i < len(states) - 1 else io.get("last_hidden_state")
        if theirs is not None:
            report.same(name, padded(state), theirs[mask])
    for name in ("attentions", "attentions_layer0"):
        if name in io:
            theirs = io[name] if name == "attentions" else io[name][None]
            for layer, attention in enumerate(theirs):
                report.same(f"{name}.{layer}" if name == "attentions" else name,
                            torch.cat([a[:, :n, :n].flatten() for a, n in zip(maps[layer], streams.lengths)]),
                            torch.cat([a[:, m][:, :, m].flatten() for a, m in zip(attention, mask)]))
    text, image = model.logits(streams, signal)
    is_image = ids[mask][:, 0] >= config.vocab_size
    for k in range(config.vision_codebook_num if "logits" in io else 0):
        theirs = io["logits"].permute(1, 2, 0, 3)[mask]                                       # (n, K, V + N + 2)
        report.same(f"logits.text.{k}", text, theirs[~is_image][:, k, :config.vocab_size])
        if len(image):
            report.same(f"logits.image.{k}", image[:, k], theirs[is_image][:, k, config.vocab_size:])
    if "loss" in io:
        loss = model.loss(streams, signal)
        report.same("loss", loss.detach(), io["loss"])
        text_sum, image_sums = model(streams, signal)
        count = len(streams.text_rows) + len(streams.image_rows)
        if "loss_per_codebook" in io:
            report.same("loss_per_codebook", ((text_sum + image_sums) / count).detach(), io["loss_per_codebook"])
        loss.backward()
        compare_gradients(model, io, folder, report)


def signal_of(io, prefix, ids, mask, config):
    """The signal of the image tokens that are there, row after row"""
    if prefix + "contiguous_signal" not in io:
        return None
    image = mask & (ids[..., 0] >= config.vocab_size)
    return io[prefix + "contiguous_signal"][image]


@torch.no_grad()
def look_inside(model, streams, signal):
    """-> hidden states (the embeddings, then behind each layer; the last behind the final norm), attention maps"""
    states, maps = [], []
    hooks = [block.register_forward_pre_hook(lambda _, args: states.append(streams.merge(*args[0])))
             for block in model.model.layers]
    for block in model.model.layers:
        block.self_attn.recorded_maps = maps
    plain = streams.merge(*model.hidden(streams, signal))
    for block in model.model.layers:
        block.self_attn.recorded_maps = None
    for hook in hooks:
        hook.remove()
    fast = streams.merge(*model.hidden(streams, signal))
    for b, n in enumerate(streams.lengths):               # what stands at padding is no output
        assert (plain - fast)[b, :n].abs().max() < ABSOLUTE
    return states + [fast], maps


def compare_gradients(model, io, folder, report):
    ours = {name: p.grad for name, p in model.named_parameters()}
    for name, theirs in io.items():
        if name.startswith("grad::"):
            report.gradient(name, ours[name.removeprefix("grad::")], theirs)
    if "grad_norms" in io:
        norms = dict(zip(json.loads((folder / "grad_norm_names.json").read_text()), io["grad_norms"].tolist()))
        norms = {name: norm for name, norm in norms.items() if name in ours}
        worst = max(abs(float(torch.zeros(()) if ours[n] is None else ours[n].norm()) - max(norm, 0)) /
                    max(norm, 1e-3) for n, norm in norms.items())
        report.append((f"grad_norms ({len(norms)})", worst, GRADIENT))


def compare_generation(model, io, prefix, report):
    config = model.config
    source = prefix if f"{prefix}.input_ids" in io else "gen"
    ids = io[f"{source}.input_ids"].permute(1, 2, 0)
    mask = io.get(f"{source}.attention_mask", torch.ones(ids.shape[:2])).bool()
    prompts = [row[m] for row, m in zip(ids, mask)]
    theirs = io[f"{prefix}.new_ids"].permute(1, 2, 0)                                         # (B, T, K)
    steps = theirs.shape[1]
    signal = signal_of(io, f"{source}.", ids, mask, config)
    ours = torch.stack(list(generate(model, prompts, signal, steps)), dim=1)
    report.append((f"{prefix}.new_ids ({(ours != theirs).sum()} differ)", float((ours != theirs).sum()), 0))
    if f"{prefix}.step_logits" not in io:
        return
    # Logits of each step: from one uncached pass over prompt and answer, so that the cache is checked against it too.
    whole = [torch.cat([prompt, new]) for prompt, new in zip(prompts, theirs)]
    streams = Streams.from_ids(whole, config)
    if signal is not None:                                # what was generated has none
        image = [ids[:, 0] >= config.vocab_size for ids in whole]
        full = [torch.zeros(len(row), config.contiguous_signal_size) for row in whole]
        given = signal.split([int((p[:, 0] >= config.vocab_size).sum()) for p in prompts])
        for row, prompt, part in zip(full, prompts, given):
            row[:len(prompt)][prompt[:, 0] >= config.vocab_size] = part
        signal = torch.cat([row[i] for row, i in zip(full, image)])
    with torch.no_grad():
        hidden = streams.merge(*model.hidden(streams, signal))
        for step, logits in enumerate(io[f"{prefix}.step_logits"]):                           # (K, B, V + N + 2)
            for b, prompt in enumerate(prompts):
                h, last = hidden[b, len(prompt) + step - 1], whole[b][len(prompt) + step - 1, 0]
                for k in range(config.vision_codebook_num):
                    row = logits[k, b] if logits.shape[0] == config.vision_codebook_num else logits[b, k]
                    if last < config.vocab_size:
                        report.same(f"{prefix}.step_logits.text", model.lm_head(h), row[:config.vocab_size])
                    elif not torch.isposinf(row).any():   # forced steps (EOI, newline) have no logits to compare
                        ours = model.vision_lm_head.heads[k](h)
                        keep = torch.isfinite(row[config.vocab_size:])
                        report.same(f"{prefix}.step_logits.image", ours[keep], row[config.vocab_size:][keep])


def case_lfq(folder, report):
    c, io = json.loads((folder / "config.json").read_text()), tensors(folder / "io.safetensors")
    lfq = LFQ(c["dim"], c["codebook_size"], c["num_codebooks"])
    weights = tensors(folder / "model.safetensors")
    lfq.load_state_dict({k: v for k, v in weights.items() if k != "mask"})
    for name in sorted({key.split(".")[0] for key in io if key.endswith("train.w")}):
        x = io[name].requires_grad_()
        lfq.zero_grad()
        quantized, ids, projected = lfq(x)
        losses = lfq_loss(projected, c["codebook_size"], c["diversity_gamma"], c["entropy_loss_weight"],
                          c["commitment_loss_weight"])
        report.same(f"{name}.quantized", quantized.detach(), io[f"{name}.train.quantized"])
        report.same(f"{name}.indices", ids, io[f"{name}.train.indices"].view(ids.shape))
        report.same(f"{name}.eval.indices", ids, io[f"{name}.eval.indices"].view(ids.shape))
        for theirs in ("per_sample_entropy", "batch_entropy", "commitment", "aux_loss"):
            ours = losses["loss" if theirs == "aux_loss" else theirs]
            report.same(f"{name}.{theirs}", ours.detach(), io[f"{name}.train.{theirs}"])
        ((quantized * io[f"{name}.train.w"]).sum() + losses["loss"]).backward()
        report.gradient(f"{name}.grad_input", x.grad, io[f"{name}.train.grad_input"])
        for part in ("project_in", "project_out"):
            theirs = io[f"{name}.train.grad_{part}_weight"]
            report.gradient(f"{name}.grad_{part}", getattr(lfq, part).weight.grad, theirs)
        codes = lfq.signs(io[f"{name}.train.indices"].view(ids.shape))
        report.same(f"{name}.indices_to_codes_noproj", codes.permute(0, 3, 1, 2), io[f"{name}.indices_to_codes_noproj"])
        report.same(f"{name}.indices_to_codes", lfq.project_out(codes).permute(0, 3, 1, 2).detach(),
                    io[f"{name}.indices_to_codes"])
    report.same("all_codes_noproj", lfq.signs(io["all_indices"]), io["all_codes_noproj"])


def decoder_arguments(c):
    return {"ch": c["ch"], "ch_mult": c["ch_mult"], "num_res_blocks": c["num_res_blocks"],
            "attn_resolutions": c["attn_resolutions"], "z_channels": c["z_channels"], "grid": c["initial_resolution"],
            "resolution": c["resolution"]}


@torch.no_grad()
def case_decoder(folder, report):
    c, io = json.loads((folder / "config.json").read_text()), tensors(folder / "io.safetensors")
    decoder = Decoder(SimpleNamespace(**decoder_arguments(c), num_attn_heads=c["num_attn_head"]))
    decoder.load_state_dict(tensors(folder / "model.safetensors"))
    seen = {}
    for name, module in (("conv_in", decoder.conv_in), ("mid_block_1", decoder.mid.block_1),
                         ("mid_attn_1", decoder.mid.attn_1)):
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({f"after_{name}": out}))
    report.same("out", decoder(io["z"]), io["out"])
    for name in seen.keys() & io.keys():
        report.same(name, seen[name], io[name])


def case_discriminator(folder, report):
    c, io = json.loads((folder / "config.json").read_text()), tensors(folder / "io.safetensors")
    disc = Discriminator(c["ndf"], c["n_layers"]).eval()
    disc.load_state_dict(tensors(folder / "model.safetensors"))
    report.same("eval.out", disc(io["x"]).detach(), io["eval.out"])
    report.same("train.out", disc.train()(io["x"]).detach(), io["train.out"])
    for name, theirs in io.items():
        if name.startswith("after_train."):
            report.same(name, disc.state_dict()[name.removeprefix("after_train.")], theirs)
    report.same("hinge", discriminator_loss(io["logits_real"], io["logits_fake"]), io["hinge"])


def case_vqmodel(folder, report):
    c, io = json.loads((folder / "config.json").read_text()), tensors(folder / "io.safetensors")
    clip = {field.name: c["clip"][field.name] for field in fields(ClipConfig)}
    config = ImageTokenizerConfig(clip=clip, select_layers=c["ddconfig"]["select_layer"], embed_dim=c["embed_dim"],
                                  codebook_size=c["codebook_size"], num_codebooks=c["num_codebook"],
                                  num_attn_heads=c["ddconfig"]["num_attn_head"], **decoder_arguments(c["ddconfig"]))
    tokenizer = ImageTokenizer(config)
    weights = {k: v for k, v in tensors(folder / "model.safetensors").items()
               if k != "quantize.mask" and "position_ids" not in k}
    tokenizer.load_state_dict(weights)
    pixels = io["pixel_values"]
    ids, signal = tokenizer.encode(pixels)
    grid = config.grid
    report.same("encode.indices", ids.unflatten(1, (grid, grid)), io["encode.indices"])
    report.same("encode.encoder_feat", signal.transpose(1, 2).unflatten(2, (grid, grid)), io["encode.encoder_feat"])
    report.same("encode.quant", tokenizer.quantized(signal)[0].detach(), io["encode.quant"])
    report.same("tokenizer.encoder_feat", signal, io["tokenizer.encoder_feat"])
    report.same("projected", tokenizer.quantized(signal)[2].detach(), io["projected"])
    report.same("decode_code", tokenizer.decode(ids), io["decode_code"])
    report.same("decode_code_rand0", tokenizer.decode(io["rand_indices"].flatten(1, 2))[:1], io["decode_code_rand0"])
    report.same("clip_to_rgb", to_rgb(pixels), io["clip_to_rgb"])
    gan = c["gan"]
    tokenizer.clip.requires_grad_(False)
    for step in sorted({int(m[1]) for key in io if (m := re.match(r"gan\.step(\d+)\.", key))}):
        disc = Discriminator(gan["disc"]["ndf"], gan["disc"]["n_layers"]).train()
        disc.load_state_dict(tensors(folder / "disc.safetensors"))
        tokenizer.zero_grad()
        quantized, _, projected = tokenizer.quantized(signal)
        xrec = tokenizer.decoder(tokenizer.post_quant_conv(quantized))
        qloss = lfq_loss(projected, config.codebook_size)["loss"]
        nll = F.l1_loss(xrec, to_rgb(pixels)) * gan["pixel_weight"]
        g_loss = -disc(xrec).mean()
        weight = adaptive_weight(nll, g_loss, tokenizer.decoder.conv_out.weight) * gan["disc_weight"]
        factor = gan["disc_factor"] if step >= gan["disc_start"] else 0.0
        total = nll + weight * factor * g_loss + gan["codebook_weight"] * qloss
        start = f"gan.step{step}."
        theirs = {key.removeprefix(start): t for key, t in io.items() if key.startswith(start)}
        for name, ours in (("g_total", total), ("g.nll_loss", nll), ("g.d_weight", weight), ("g.g_loss", g_loss),
                           ("g.quant_loss", qloss)):
            report.same(f"step{step}.{name}", ours.detach(), theirs[name])
        total.backward()
        for name, gradient in theirs.items():
            if name.startswith("grad."):
                ours = tokenizer.get_parameter(name.removeprefix("grad.")).grad
                report.gradient(f"step{step}.{name}", ours, gradient)
        real, fake = disc(to_rgb(pixels)), disc(xrec.detach())
        report.same(f"step{step}.d.logits_real", real.mean().detach(), theirs["d.logits_real"])
        report.same(f"step{step}.d.logits_fake", fake.mean().detach(), theirs["d.logits_fake"])
        report.same(f"step{step}.d_total", (factor * discriminator_loss(real, fake)).detach(), theirs["d_total"])


@torch.no_grad()
def case_clip(folder, report):
    c, io = json.loads((folder / "config.json").read_text()), tensors(folder / "io.safetensors")
    clip = ClipViT(**{field.name: c[field.name] for field in fields(ClipConfig)})
    weights = tensors(folder / "model.safetensors")
    clip.load_state_dict({k.removeprefix("vision_model."): v for k, v in weights.items() if "position_ids" not in k})
    for i, (ours, theirs) in enumerate(zip(clip.hidden_states(io["pixel_values"]), io["hidden_states"], strict=True)):
        report.same(f"hidden_states.{i}", ours, theirs)


def case_attention_difference(folder, report):
    io = tensors(folder / "io.safetensors")
    for prefix in sorted({key.removesuffix("attn_maps") for key in io if key.endswith("attn_maps")}):
        cross, inner = attention_difference(io[f"{prefix}attn_maps"])
        report.same(f"{prefix}cross_layer", cross, io[f"{prefix}cross_layer"])
        report.same(f"{prefix}inner_layer", inner, io[f"{prefix}inner_layer"])


def case_tokenizer(folder, report):
    text = Text(folder / "tokenizer.model")
    spec = json.loads((folder / "cases.json").read_text())
    for number, case in enumerate(spec["cases"]):
        ids, loss_mask = encode_case(text, case, spec["system"])
        theirs = [IMG if token == "image" else token for token in case["ids"]]
        wrong = int(ids != theirs)
        if "counted" in case:
            spelled = [label for token, mark in zip(ids, loss_mask)
                       for label in ([0] + [mark] * (spec["image_tokens"] - 1) if token == IMG else [mark])]
            wrong += int(spelled != case["counted"])
        report.append((f"{number}.{case['kind']}", float(wrong), 0))


def encode_case(text, case, system):
    kind, words = case["kind"], case["text"]
    if kind.startswith("caption"):
        if kind.endswith("i2t"):
            return text.caption(words.removeprefix("<image>").removeprefix("\n"), end=False)
        return text.caption(words.replace("<image>", "").rstrip(" ").removesuffix("\n"), image_first=False)
    if kind.startswith("chat"):
        rest, turns = words, []
        rest = rest.removeprefix(system).lstrip(" ") if rest.startswith(system) else rest
        for part in re.split(r"(?:^|</s>)USER: ", rest)[1:]:
            question, _, answer = part.partition(" ASSISTANT:")
            images = question.count("<image>")
            question = question.replace("<image>", "").strip("\n ")
            answer = answer.removesuffix("</s>")
            turns.append((question, images, answer.removeprefix(" ").removesuffix(" ") if answer else None))
        return text.chat(turns, system if words.startswith(system) else "")
    pieces = words.split("<image>")
    ids = text.plain(pieces[0])
    for piece in pieces[1:]:
        ids += [IMG] + (text._after_image(piece.removeprefix("\n")) if piece else [])
    return ids, [0] * len(ids)


def kind_of(folder):
    """By what the folder holds, never by its name"""
    files = {path.name for path in folder.iterdir()}
    if "cases.json" in files:
        return case_tokenizer
    if "io.safetensors" not in files:
        return None
    config = json.loads((folder / "config.json").read_text()) if "config.json" in files else {}
    if "embedding_config" in config:
        from golden_hovle import case_hovle
        return partial(case_hovle, tensors=tensors, compare_gradients=compare_gradients)
    if "pre_config" in config:
        from golden_haplovl import case_haplovl
        return partial(case_haplovl, tensors=tensors, compare_gradients=compare_gradients)
    for key, case in (("vision_codebook_num", case_llm), ("ddconfig", case_vqmodel), ("patch_size", case_clip),
                      ("ch_mult", case_decoder), ("ndf", case_discriminator), ("codebook_size", case_lfq)):
        if key in config:
            return case
    return case_attention_difference


def folders(paths):
    for path in map(Path, paths):
        inner = [path] if kind_of(path) else sorted(p for p in path.iterdir() if p.is_dir())
        yield from (folder for folder in inner if kind_of(folder))


VARIABLES = ("LIBRA_GOLDEN", "LIBRA_GOLDEN_HAPLOVL", "LIBRA_GOLDEN_HOVLE")
GOLDEN = list(folders([os.environ[name] for name in VARIABLES if os.environ.get(name)]))


@pytest.mark.skipif(not GOLDEN, reason="no golden folder: name one with LIBRA_GOLDEN=FOLDER")
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden(folder):
    report = Report()
    kind_of(folder)(folder, report)
    assert len(report) > 2
    assert not [line for line in report if not line[1] <= line[2]]


def main(paths):
    lost = [path for path in paths if not Path(path).is_dir()]
    cases = [] if lost else list(folders(paths))
    if not cases:
        sys.exit(f"no such folder: {', '.join(lost)}" if lost else __doc__ + "\nno case was found")
    failed = 0
    for folder in cases:
        report, worst = Report(), {}
        try:
            kind_of(folder)(folder, report)
        except Exception:  # noqa: BLE001                 # one case that breaks must not hide the others
            traceback.print_exc()
            report.append((f"stopped by {sys.exc_info()[0].__name__}", math.inf, 0))
        for name, difference, bar in report:              # steps of one name on one line; NaN is the worst
            before = worst.get(name, (-1.0, bar))[0]
            if math.isnan(difference) or difference > before:
                worst[name] = difference, bar
        for name, (difference, bar) in worst.items():
            failed += not difference <= bar
            print(f"{folder.name:24} {name:52} {difference:9.2e}  {'ok' if difference <= bar else f'ABOVE {bar:g}'}")
    print(f"{failed} above the bar" if failed else "all within the bar")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
