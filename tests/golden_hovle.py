"""HoVLE against outputs of the authors' code: called by test_golden.py for folders whose config.json is HoVLE's."""
import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from tiny import continued

from monolithic import internlm2
from monolithic.hovle import HoVLE, pixel_shuffle, read_config
from monolithic.shared import Batch, choose_grid, pad
from text import IMG


def case_hovle(folder, report, tensors, compare_gradients):
    if (folder / "tiling.json").exists():
        table = json.loads((folder / "tiling.json").read_text())
        ours = [choose_grid(width, height, 448, most) for width, height, most, *_ in table]
        ours = [[columns, rows, columns * rows + (columns * rows > 1)] for columns, rows in ours]
        report.same("tiling", torch.tensor(ours), torch.tensor([line[3:] for line in table]))
    if not (folder / "model.safetensors").exists():
        return
    weights, io = tensors(folder / "model.safetensors"), tensors(folder / "io.safetensors")
    base, pre = read_config(folder / "config.json")
    if "pixel_values" in io:                              # tiles of another size than in config.json: a resized table
        for half in (base, pre):
            half.force_image_size = io["pixel_values"].shape[-1]
            half.__post_init__()
    model = HoVLE(base, pre).eval()
    expected = internlm2.pack(model.state_dict(), model.config_of)
    assert weights.keys() == expected.keys(), sorted(weights.keys() ^ expected.keys())
    model.load_state_dict(dict(internlm2.unpack(weights, model.config_of, folder)))
    for pixels, raw in (("pixel_values", "image_uint8"), ("gen.pixel_values", "gen.image_uint8_row1")):
        if raw in io and pixels in io:
            ours, _ = base.prepare(Image.fromarray(io[raw].byte().numpy()), 1)
            report.same(f"tiles of {raw}", ours, io[pixels][:len(ours)])
    if "input_ids" in io:
        compare_case(model, io, report)
        if "grad_norms" in io or any(name.startswith("grad::") for name in io):
            compare_gradients(released_gradients(model), io, folder, report)
    if "gen.new_ids" in io:
        compare_generation(model, io, report)


def right_padded(ids, mask, pixels, config, labels=None):
    """-> our batch of these rows, of which padding is at the right; its mask"""
    rows = [row[keep].tolist() for row, keep in zip(ids, mask)]
    marks = None if labels is None else pad([(row[keep] != -100).tolist() for row, keep in zip(labels, mask)])[0].bool()
    pictures = [(pixels, torch.arange(len(pixels) * config.grid ** 2))] if len(pixels) else []
    padded, real = pad(rows)
    return Batch.build(padded, real, pictures, config, marks), real


def short_ids(io, name, n_tiles, config):
    """The row of the LLM: of "post" there is a longer one too"""
    generated = name.startswith("gen.")
    names = [name] + [other for other in io if other.endswith("input_ids") and other.startswith("gen.") == generated]
    return next(io[name] for name in names if io[name].dim() == 2 and
                (io[name] == config.image_token_index).sum() == n_tiles * config.grid ** 2)


def mask_of(io, name, ids):
    mask = io.get(name)
    return torch.ones_like(ids).bool() if mask is None or mask.shape != ids.shape else mask.bool()


def compare_case(model, io, report):
    c, pixels, labels = model.base, io.get("pixel_values", torch.zeros(0)), io.get("labels")
    ids = short_ids(io, "input_ids", len(pixels), c)
    mask = mask_of(io, "attention_mask", ids)
    batch, real = right_padded(ids, mask, pixels, c, labels)
    compare_forward(model, batch, real, mask, io, report)
    if "loss" in io:
        loss = model(batch) / batch.loss_mask[:, 1:].sum()
        report.same("loss", loss.detach(), io["loss"].view(()))
        loss.backward()
    if "loss_weighted" in io:
        weights = pad([row[keep].tolist() for row, keep in zip(io["loss_weight"], mask)])[0]
        with torch.no_grad():
            report.same("loss_weighted", model(batch, weights) / weights[:, 1:].sum(), io["loss_weighted"].view(()))


@torch.no_grad()
def compare_forward(model, batch, real, mask, io, report):
    m, post, states = model.embedding_model, model.pre.pixel_shuffle_loc == "post" and len(batch.tiles) > 0, []
    layers = [*m.encoder, *model.language_model.model.layers]
    hooks = [block.register_forward_hook(lambda _, args, y: states.append((args[0], y))) for block in layers]
    found = {"inputs_embeds": model.encode(batch.ids, batch)}
    states.clear()
    found["last_hidden_state"] = model.hidden(batch.ids, batch)
    found["logits"] = model.lm_head(found["last_hidden_state"])
    for hook in hooks:
        hook.remove()
    n = len(m.encoder)
    found |= {f"llm_hidden.{i}": x for i, (x, _) in enumerate(states[n:])}
    of_module = {"embed_input": states[0][0]} | {f"embed_hidden.{i}": x for i, (_, x) in enumerate(states[:n])}
    theirs = {name: x for name, x in io.items() if name not in ("embed_hidden", "llm_hidden")}
    for name in ("embed_hidden", "llm_hidden"):
        theirs |= {f"{name}.{i}": x for i, x in enumerate(io.get(name, []))}
    for name, x in found.items():
        if name in theirs:
            report.same(name, x[real], theirs[name][mask])
    long_ids, _ = model.lengthen(batch.ids) if post else (batch.ids, None)
    lengths = model.row_lengths([row[keep].tolist() for row, keep in zip(batch.ids, real)])[0 if post else 1]
    long_real = torch.arange(long_ids.shape[1]) < torch.tensor(lengths)[:, None]
    long_mask = next((io[name].bool() for name in io if "mask" in name and "hd" in name), None) if post else mask
    for name, x in of_module.items():
        if name in theirs:
            where = torch.ones(theirs[name].shape[:2]).bool() if long_mask is None else long_mask
            report.same(name, x[long_real], theirs[name][where])
    for name in io:
        if post and "hd" in name and name.endswith("ids") and not name.startswith("gen"):
            where = torch.ones(io[name].shape).bool() if long_mask is None else long_mask
            report.same(name, long_ids[long_real], io[name][where])
    if len(batch.tiles):
        patches = model.patches(batch.tiles)
        ours = {"patch_embeds": patches}
        if not post:
            ours |= {"shuffled": pixel_shuffle(patches), "image_embeds": m.pixel_shuffle_proj(pixel_shuffle(patches))}
        elif "shuffled" in io or "image_embeds" in io:
            of_tiles = states[n - 1][1][(long_ids == model.pre.image_token_index)].view_as(patches)
            ours |= {"shuffled": pixel_shuffle(of_tiles), "image_embeds": m.pixel_shuffle_proj(pixel_shuffle(of_tiles))}
        for name, x in ours.items():
            if name in io:
                report.same(name, x, io[name])


def released_gradients(model):
    """-> something with the released parameters and their gradients"""
    used = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    packed = internlm2.pack(used, model.config_of)
    names = internlm2.pack(model.state_dict(), model.config_of)
    parameters = [(name, SimpleNamespace(grad=packed.get(name))) for name in names]
    return SimpleNamespace(named_parameters=lambda: parameters)


@torch.no_grad()
def compare_generation(model, io, report):
    c, new, prompts, pictures, used = model.base, io["gen.new_ids"], [], [], 0
    source = "gen.input_ids" if "gen.input_ids" in io else "input_ids"
    found = [io[name] for name in ("pixel_values", "gen.pixel_values") if name in io]
    n = int((io[source] == c.image_token_index).sum()) // c.grid ** 2
    choices = [torch.zeros(0), *found[::-1], *([torch.cat(found)] if found else [])]          # the case's own, or both
    tiles = next((x for x in choices if len(x) == n), found[-1] if found else None)
    ids = short_ids(io, source, len(tiles), c)
    mask = mask_of(io, source.replace("input_ids", "attention_mask"), ids)
    rows = [row[keep].tolist() for row, keep in zip(ids, mask)]
    for row in rows:
        prompt, at = [], 0
        while at < len(row):
            n = 0                                         # <img>, image tokens, </img> back to IMG
            while row[at] == c.edges[0][0] and at + n + 1 < len(row) and row[at + 1 + n] == c.image_token_index:
                n += 1
            prompt.append(IMG if n else row[at])
            if n:
                n_tiles = n // c.grid ** 2
                pictures.append((tiles[used:used + n_tiles], torch.arange(n)))
                used += n_tiles
            at += n + 2 if n else 1
        prompts.append(prompt)
    plain, steps = model.hidden, []

    def recorded(ids, batch=None, caches=(None, None)):
        hidden = plain(ids, batch, caches)
        last = torch.tensor([len(row) for row in rows]) - 1
        steps.append(hidden[torch.arange(len(rows)), last] if batch else hidden[:, 0])
        return hidden
    model.hidden = recorded
    ours = torch.tensor(continued(model, prompts, pictures, new.shape[1]))
    model.hidden = plain
    report.append((f"gen.new_ids ({(ours != new).sum()} differ)", float((ours != new).sum()), 0))
    if "gen.step_logits" not in io:
        return
    if torch.equal(ours, new):                            # else the caches hold other tokens
        report.same("gen.step_logits", model.lm_head(torch.stack(steps)), io["gen.step_logits"])
    if not (new == c.image_token_index).any():            # again from one uncached pass over prompts and answers
        whole = [row + answer for row, answer in zip(rows, new.tolist())]
        padded, real = pad(whole)
        order = torch.arange(used * c.grid ** 2)
        batch = Batch.build(padded, real, [(tiles[:used], order)] if used else [], c)
        answer = real & ~pad([[1] * len(row) + [0] * new.shape[1] for row in rows])[0].bool()
        before = F.pad(answer[:, 1:], (0, 1))             # the positions that predict the answer
        logits = model.lm_head(model.hidden(batch.ids, batch)[before]).unflatten(0, new.shape)
        report.same("gen.step_logits, uncached", logits, io["gen.step_logits"].transpose(0, 1))
