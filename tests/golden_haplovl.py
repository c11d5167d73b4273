"""HaploVL against outputs of the authors' code: called by test_golden.py for folders whose config.json is HaploVL's."""
import math

import torch
import torch.nn.functional as F
from PIL import Image
from tiny import continued

from llama import apply_rope
from monolithic.haplovl import HalfConfig, HaploVL, read_config
from monolithic.shared import Batch, choose_canvas, pad, patch_order, prepare_picture
from text import IMG


def case_haplovl(folder, report, tensors, compare_gradients):
    model = HaploVL(*read_config(folder / "config.json")).eval()
    weights, io, c = tensors(folder / "model.safetensors"), tensors(folder / "io.safetensors"), model.base
    assert weights.keys() == model.state_dict().keys(), sorted(weights.keys() ^ model.state_dict().keys())
    model.load_state_dict(weights)
    if "table.sizes" in io:
        compare_table(io, report)
    if "input_ids" not in io:
        return
    pictures = read_pictures(io, c, report)
    mask, labels = (io.get(name) for name in ("attention_mask", "labels"))
    mask = torch.ones_like(io["input_ids"]).bool() if mask is None else mask.bool()
    if labels is not None:
        assert (labels == io["input_ids"])[labels != -100].all(), "labels are not the ids"
    batch = Batch.build(io["input_ids"], mask, pictures, c, None if labels is None else labels != -100)
    compare_forward(model, batch, mask, io, report)
    if "loss" in io:
        loss = model(batch) / batch.loss_mask[:, 1:].sum()
        report.same("loss", loss.detach(), io["loss"])
        loss.backward()
        compare_gradients(model, io, folder, report)
    if "gen.new_ids" in io:
        compare_generation(model, pictures, mask, io, report)


def read_pictures(io, config, report):
    """The case's own pixels, with the layout that we find for their sizes. Where the original pictures are there too,
    our tiles are compared."""
    pictures = []
    for i, pixels in enumerate(io.get("pixel_values", [])):
        height, width = io["image_sizes"][i].tolist() if "image_sizes" in io else (1, 1)
        order = patch_order(width, height, config)
        area = math.prod(choose_canvas(width, height, config)) if config.tiled else config.default_image_size ** 2
        tiles = pixels.view(-1, *pixels.shape[-3:])[:area // config.default_image_size ** 2]
        if "tile_counts" in io:
            assert len(tiles) == io["tile_counts"][i]
        if f"raw.{i}" in io:
            ours, ours_order = prepare_picture(Image.fromarray(io[f"raw.{i}"].byte().numpy()), config)
            report.same("tiles", ours, tiles)
            report.same("order", ours_order, order)
        pictures.append((tiles, order))
    if "image_lens" in io:
        report.same("image_lens", torch.tensor([len(order) for _, order in pictures]), io["image_lens"])
    return pictures


@torch.no_grad()
def compare_forward(model, batch, mask, io, report):
    m, n, states, maps = model.model, model.pre.num_hidden_layers, [], []
    both = mask[:, :, None] & mask[:, None]                                                   # (B, L, L)
    visible = batch._replace(segments=None).mask()[:, 0]
    if "mask_visible" in io:
        report.same("mask_visible", visible, io["mask_visible"][:, 0].bool(), both)
    if "attention_start_ids" in io:
        report.same("attention_start_ids", batch.starts, io["attention_start_ids"], mask)
    if "image_embeds" in io:
        report.same("image_embeds", model.image_tokens(batch), io["image_embeds"])
    hooks = [m.pre_norm.register_forward_hook(lambda _, x, y: states.extend([*x, y])),
             m.pre_connector.register_forward_hook(lambda _, x, y: states.append(y)),
             *(block.register_forward_hook(lambda _, x, y: states.append(y)) for block in m.layers)]
    for block in m.layers if "attentions" in io else ():
        hooks.append(block.self_attn.register_forward_pre_hook(
            lambda module, args: maps.append(attention_map(module, args[0], args[1], visible))))
    hidden = model.hidden(batch.ids, batch)
    for hook in hooks:
        hook.remove()
    if batch.segments is not None:
        masked = model.hidden(batch.ids, batch._replace(segments=None))
        report.same("fast attention", hidden, masked, mask)
    theirs = {"inputs_embeds": io.get("inputs_embeds"), "last_hidden_state": io.get("last_hidden_state"),
              "logits": io.get("logits")}
    ours = {"inputs_embeds": states[0], "last_hidden_state": hidden, "logits": model.lm_head(hidden)}
    for half, found in (("hidden_pre", states[1:n + 2]), ("hidden_post", states[n + 2:])):
        if half in io:
            assert len(found) == len(io[half])
            theirs |= {f"{half}.{i}": state for i, state in enumerate(io[half])}
            ours |= {f"{half}.{i}": state for i, state in enumerate(found)}
    for name, value in theirs.items():
        if value is not None:
            report.same(name, ours[name], value, mask)
    if "attentions" in io:
        for layer, (mine, yours) in enumerate(zip(maps, io["attentions"], strict=True)):
            report.same(f"attentions.{layer}", mine.permute(0, 2, 3, 1), yours.permute(0, 2, 3, 1), both)


def attention_map(module, x, rope, visible):
    q, k = (apply_rope(module.split_heads(project(x)), rope) for project in (module.q_proj, module.k_proj))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible[:, None], -torch.inf)
    return scores.softmax(-1)                                                                 # (B, H, L, L)


@torch.no_grad()
def compare_generation(model, pictures, mask, io, report):
    c, new = model.base, io["gen.new_ids"]
    ids = io.get("gen.input_ids", io["input_ids"])
    mask = io["gen.attention_mask"].bool() if "gen.attention_mask" in io else (
        mask if "gen.input_ids" not in io else torch.ones_like(ids).bool())
    rows = [row[keep].tolist() for row, keep in zip(ids, mask)]
    sizes, prompts = iter([len(order) for _, order in pictures]), []
    for row in rows:                                      # image tokens back to IMG
        prompt, at = [], 0
        while at < len(row):
            is_image = row[at] == c.image_token_index
            prompt.append(IMG if is_image else row[at])
            at += next(sizes) if is_image else 1
        prompts.append(prompt)
    pictures = pictures[:sum(prompt.count(IMG) for prompt in prompts)]
    ours, cached = torch.tensor(continued(model, prompts, pictures, new.shape[1])), []
    report.append((f"gen.new_ids ({(ours != new).sum()} differ)", float((ours != new).sum()), 0))
    if "gen.step_logits" not in io:
        return
    lengths, plain = torch.tensor([len(row) for row in rows]), model.hidden

    def recorded(ids, batch, caches):
        hidden = plain(ids, batch, caches)
        cached.append(hidden[torch.arange(len(rows)), lengths - 1] if batch else hidden[:, 0])
        return hidden
    model.hidden = recorded
    continued(model, prompts, pictures, new.shape[1])
    model.hidden = plain
    if torch.equal(ours, new):                            # else the caches hold other tokens
        report.same("gen.step_logits", model.lm_head(torch.stack(cached)), io["gen.step_logits"])
    if not (new == c.image_token_index).any():            # again from one uncached pass over prompts and answers
        whole, real = pad([row + answer for row, answer in zip(rows, new.tolist())])
        answer = real & ~pad([[1] * len(row) + [0] * new.shape[1] for row in rows])[0].bool()
        hidden = model.hidden(whole, Batch.build(whole, real, pictures, c))
        before = F.pad(answer[:, 1:], (0, 1))             # the positions that predict the answer
        report.same("gen.step_logits, uncached", model.lm_head(hidden[before]).unflatten(0, new.shape),
                    io["gen.step_logits"].transpose(0, 1))


def compare_table(io, report):
    """Canvases and patches that are left, at the published sizes"""
    published, canvases, grids = HalfConfig(), [], []
    for height, width in io["table.sizes"].tolist():
        order = patch_order(width, height, published)
        rows = int((order == -1).sum())
        canvases.append(choose_canvas(width, height, published))
        grids.append((rows, len(order) // rows - 1))
    report.same("table.canvas", torch.tensor(canvases), io["table.canvas"])
    report.same("table.grid", torch.tensor(grids), io["table.grid"])
