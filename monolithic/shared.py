"""Around the models of this folder: pictures as tiles, rows of ids with image tokens, samples, token by token.

Tiles are LLaVA-OneVision's "anyres" as HaploVL uses it, and InternVL's as HoVLE does. Letters: B rows, L positions, n
image tokens of a batch, S pixels and g patches of a tile's side, R x C tiles of a picture.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence

from common.pictures import open_image
from common.weights import UserError, assign, cast, read_tensors, save_tensors, shapes_only, weight_files, write_json
from data import BadSample, clean_caption, llava_turns, read_sample
from llama import Attention, KVCache, causal_attention, read_llama_tensors
from model import cross_entropy
from text import IMG, Text, open_text
from tokenizer import MEAN, STD, prepare

# ---------------------------------------------------------------- tiles

def published_canvases(side):
    """1 x 1 to 1 x 6, 2 x 1 to 2 x 3, ..., 6 x 1 tiles -> 14 (height, width)"""
    return [[side * r, side * c] for r, most in enumerate((6, 3, 2, 1, 1, 1), 1) for c in range(1, most + 1)]


def choose_canvas(width, height, config):
    """-> (height, width) of the canvas that keeps most pixels of a picture, then wastes least"""
    def fit(canvas):
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]
    return max(config.image_grid_pinpoints, key=fit)


def check_canvases(config, source):
    """The authors' code shrinks a picture if it exceeds the tiles by more than 1.1 ** 2; a canvas that would need this
    is refused here. 40: see common/config.py"""
    side, most = config.default_image_size, min(40, int(re.sub(r"\D", "", config.image_aspect_ratio)[:9] or 0))

    def fits(canvas):
        return (isinstance(canvas, (list, tuple)) and [type(x) for x in canvas] == [int, int] and min(canvas) > 0
                and not any(x % side for x in canvas) and math.prod(canvas) <= 1.1 ** 2 * most * side ** 2)
    if config.tiled and not all(map(fits, config.image_grid_pinpoints)):
        raise UserError(f"{source}: image_grid_pinpoints are not (height, width) of at most {most} tiles of {side}")


def patch_order(width, height, config):
    """The image tokens of a picture: indices into the patches of its tiles, -1 for a newline. Padding is cut off in
    whole patches, but of a thin strip one row or column stays (ours: the authors' code leaves nothing of it)."""
    g = config.grid
    if not config.tiled:                                  # one newline after all patches
        return F.pad(torch.arange(g * g), (0, 1), value=-1)
    rows, columns = (side // config.default_image_size * g for side in choose_canvas(width, height, config))
    order = torch.arange(rows * columns).view(rows // g, columns // g, g, g).transpose(1, 2).reshape(rows, columns)
    if width / height > columns / rows:
        cut = (rows - max(1, int(round(height * (columns / width), 7)))) // 2
        order = order[cut:rows - cut]
    else:
        cut = (columns - max(1, int(round(width * (rows / height), 7)))) // 2
        order = order[:, cut:columns - cut]
    return F.pad(order, (0, 1), value=-1).flatten()       # a newline at the end of every row


def prepare_picture(image, config):
    """RGB PIL image -> tiles (R * C, 3, S, S) row by row, with CLIP's mean and deviation; order of its patches"""
    side, order = config.default_image_size, patch_order(*image.size, config)
    if not config.tiled:
        return prepare(image, side)[None], order          # ours: padded to a square, as LLaVA does
    height, width = choose_canvas(*image.size, config)
    scale = min(width / image.width, height / image.height)
    size = min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    canvas = Image.new("RGB", (size[0] + 2 * left, size[1] + 2 * top))        # odd padding leaves it a pixel short
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
    tiles = [canvas.crop((x, y, min(x + side, canvas.width), min(y + side, canvas.height)))
             for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return stack_tiles([tile.resize((side, side), Image.Resampling.BICUBIC) for tile in tiles]), order


def choose_grid(width, height, side, most):
    """InternVL's -> columns and rows of tiles: the nearest aspect ratio, of equally near ones the first, or a later one
    if the picture has more than half of its pixels"""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    best, nearest = (1, 1), math.inf
    for i, j in sorted(grids, key=math.prod):
        distance = abs(width / height - i / j)
        if distance < nearest or distance == nearest and width * height > 0.5 * side ** 2 * i * j:
            best, nearest = (i, j), distance
    return best


def dynamic_tiles(image, side, most, thumbnail):
    """RGB PIL image -> tiles row by row of the picture that is stretched to their grid. thumbnail: of several, the
    whole picture as the last one"""
    columns, rows = choose_grid(*image.size, side, most)
    canvas = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    tiles = [canvas.crop((x, y, x + side, y + side)) for y in range(0, canvas.height, side)
             for x in range(0, canvas.width, side)]
    return tiles + [image.resize((side, side), Image.Resampling.BICUBIC)] * (thumbnail and len(tiles) > 1)


def stack_tiles(tiles, mean=MEAN, std=STD):
    """RGB PIL images of one size -> (n, 3, S, S); mean, std: (3, 1, 1)"""
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float().div_(255)
    return pixels.sub_(mean.to(pixels)).div_(std.to(pixels))              # in place: tiles can be many


# ---------------------------------------------------------------- rows of ids

def expand_images(ids, loss_mask, sizes, image_token, most=math.inf, edges=([], [])):
    """Replace each IMG by its picture's number of image tokens between edges, none of which is a target. What would
    pass `most` tokens is cut off, never through an image. -> ids, loss_mask, number of pictures that are left"""
    expanded, expanded_mask, n_pictures = [], [], 0
    for token, label in zip(ids, loss_mask):
        piece = edges[0] + [image_token] * sizes[n_pictures] + edges[1] if token == IMG else [token]
        if len(expanded) + len(piece) > most:
            break
        expanded += piece
        expanded_mask += [0 if token == IMG else label] * len(piece)
        n_pictures += token == IMG
    return expanded, expanded_mask, n_pictures


def pad(rows):
    """Lists of numbers -> (B, L), zero at the right; mask (B, L), False there"""
    return (pad_sequence([torch.tensor(row) for row in rows], batch_first=True),
            pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True))


class Batch(NamedTuple):
    ids: torch.Tensor          # (B, L), padded on any side; image_token_index at the places of image tokens
    starts: torch.Tensor       # (B, L): the first query that sees it: itself, or its image's first; padding: L
    image_index: torch.Tensor  # (n,) places of the image tokens in the grid of B * L
    order: torch.Tensor        # (n,) which patch stands there, -1 for a newline
    tiles: torch.Tensor        # (tiles of all pictures, 3, S, S)
    segments: list             # [(start, end, is image)] if all rows have images at the same places, else None
    loss_mask: torch.Tensor    # (B, L) bool: targets
    names: list
    bad: list                  # (cause, name, file) of samples that cannot be used

    @classmethod
    def build(cls, ids, mask, pictures, config, loss_mask=None, names=(), bad=()):
        """ids (B, L) and mask (B, L) bool, False at padding; pictures: [(tiles, order)] as they follow row by row"""
        length, side, end, segments, orders, n_patches = ids.shape[1], config.default_image_size, 0, [], [], 0
        starts, sizes = torch.arange(length).repeat(len(ids), 1), [len(order) for _, order in pictures]
        index = ((ids == config.image_token_index) & mask).flatten().nonzero()[:, 0]
        if len(index) != sum(sizes):
            raise UserError(f"{len(index)} image tokens in the text, {sum(sizes)} in its {len(sizes)} pictures")
        for (tiles, order), image in zip(pictures, index.split(sizes)):
            orders.append(torch.where(order < 0, -1, order + n_patches))
            n_patches += len(tiles) * config.grid ** 2
            first, last = int(image[0]) % length, int(image[-1]) % length
            starts.view(-1)[image] = first
            if image[0] < length:                         # in the first row
                segments += [(end, first, False)] * (first > end) + [(first, last + 1, True)]
                end = last + 1
        segments += [(end, length, False)] * (length > end)
        left_padded = (mask[:, 1:] > mask[:, :-1]).any()  # what is padded on the right is never seen
        alike = not left_padded and (starts == starts[0]).all()
        tiles = torch.cat([torch.zeros(0, 3, side, side), *(tiles for tiles, _ in pictures)])
        loss_mask = torch.zeros_like(mask) if loss_mask is None else loss_mask
        return cls(ids, starts.masked_fill(~mask, length), index, torch.cat([index[:0], *orders]), tiles,
                   segments if alike else None, loss_mask, names, bad)

    def mask(self):
        """For block_attention: segments, or bool (B, 1, L, L): query i sees key j if start[j] <= i"""
        if self.segments is not None:
            return self.segments
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        itself = place == place[:, None]                  # padding would see nothing, which no softmax can compute
        return ((self.starts[:, None] <= place[:, None]) | itself)[:, None]

    def counts(self):
        """For the loop and its log: targets, patches, tokens"""
        return {"text": int(self.loss_mask.sum()), "vision": int((self.order >= 0).sum()),
                "tokens": int((self.starts < self.ids.shape[1]).sum())}

    def to(self, device):
        return self._replace(**{name: value.to(device, non_blocking=True) for name, value in self._asdict().items()
                                if isinstance(value, torch.Tensor)})


def block_attention(q, k, v, mask=None):
    """Causal, but inside an image every token sees every other. Shapes as in causal_attention. mask: bool, or the
    batch's segments, each of which is one fused call without a matrix of L x L."""
    if not isinstance(mask, list):
        return causal_attention(q, k, v, mask)
    parts = []
    for start, end, is_image in mask:
        part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        if is_image:
            parts.append(F.scaled_dot_product_attention(*part, enable_gqa=q.shape[1] != k.shape[1]))
        else:
            several = start and end - start > 1           # one query sees all keys, without a mask
            parts.append(causal_attention(*part, causal_lower_right(end - start, end) if several else None))
    return torch.cat(parts, dim=2)


class BlockAttention(Attention):
    attention = staticmethod(block_attention)


@dataclass
class ChatBuilder:
    """Samples for data.make_loader, of chats and of captions. config: image_token_index, edges (ids around the image
    tokens of a picture), prepare(picture, number of pictures) -> tiles, order, and what Batch.build needs"""
    text: Text
    config: object
    max_length: int
    seed: int = 0
    every_token: bool = False                             # all text is a target, not the answers or captions alone

    def __post_init__(self):
        n_text = min([self.config.image_token_index, *sum(self.config.edges, [])])
        if self.text.vocab_size > n_text:
            raise UserError(f"{self.text.path}: {self.text.vocab_size} tokens, the model beside it has {n_text}: these "
                            "files do not belong together")

    def __call__(self, source, place, epoch):
        name, words, pictures = read_sample(source, place)
        if source.kind == "llava":
            ids, loss_mask = self.text.chat(llava_turns(words, len(pictures), name))
        else:
            ids, loss_mask = self.text.caption(clean_caption(words, name, self.seed, epoch))
        loss_mask = [1] * len(ids) if self.every_token else loss_mask
        c, pictures = self.config, [self.config.prepare(picture, len(pictures)) for picture in pictures]
        sizes, most = [len(order) for _, order in pictures], min(self.max_length, c.max_position_embeddings)
        ids, loss_mask, n_pictures = expand_images(ids, loss_mask, sizes, c.image_token_index, most, c.edges)
        if not any(loss_mask):
            raise BadSample("no_label", name)
        return {"ids": ids, "loss_mask": loss_mask, "pictures": pictures[:n_pictures], "name": name}

    def collate(self, samples, bad):
        rows = [sample["ids"] for sample in samples] or [[self.text.newline]]     # no sample is usable: no target
        loss_mask = [sample["loss_mask"] for sample in samples] or [[0]]
        pictures = [picture for sample in samples for picture in sample["pictures"]]
        names = [sample["name"] for sample in samples]
        return Batch.build(*pad(rows), pictures, self.config, pad(loss_mask)[0].bool(), names, bad)


class UnpairedBuilder(ChatBuilder):
    """HoVLE's stage 1: the pictures of one sample after the <s> of the text of the one before it in the pass. Ours; a
    pass of one sample keeps its pair."""

    def collate(self, samples, bad):
        rows = []
        for sample, other in zip(samples, samples[-1:] + samples[:-1]):
            image = [token for token, label in zip(sample["ids"], sample["loss_mask"]) if not label]
            words = [token for token, label in zip(other["ids"], other["loss_mask"]) if label]
            n, after = len(self.text.start), len(words) - len(self.text.start)
            ids, loss_mask = words[:n] + image + words[n:], [1] * n + [0] * len(image) + [1] * after
            rows.append(sample | {"ids": ids[:self.max_length], "loss_mask": loss_mask[:self.max_length]})
        return super().collate(rows, bad)


# ---------------------------------------------------------------- layers, weights

def initialise(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def insert(x, places, vectors):
    """x (B, L, D), with vectors (n, D) at these places in the grid of B * L"""
    return x.flatten(0, 1).index_copy(0, places, vectors.to(x.dtype)).view_as(x)


def next_token_loss(model, batch, weights=None):
    """-> the sum of the cross-entropy over the targets, each predicted from the token before it. weights (B, L): of the
    targets; the authors divide by weights[:, 1:].sum(), over all tokens"""
    where = batch.loss_mask[:, 1:].nonzero(as_tuple=True)     # not bool: stages.show_plan knows shapes only
    hidden, targets = model.hidden(batch.ids, batch)[:, :-1][where], batch.ids[:, 1:][where]
    if weights is None:
        return cross_entropy(model.lm_head, hidden, targets)
    return weights[:, 1:][where] @ F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")


def answer_loss(model, ids, loss_mask, picture):
    """-> the mean loss of the targets of a row with one picture. ids, loss_mask: as text.chat makes them"""
    config = model.halves[-1]
    tiles, order = config.prepare(open_image(picture), 1)
    ids, loss_mask, _ = expand_images(ids, loss_mask, [len(order)], config.image_token_index, edges=config.edges)
    for half, (length,) in zip(model.halves, model.row_lengths([ids])):
        if length > half.max_position_embeddings:
            raise UserError(f"a question and a choice of {length} tokens, the model takes "
                            f"{half.max_position_embeddings}: shorten the question")
    batch = Batch.build(*pad([ids]), [(tiles, order)], config, torch.tensor([loss_mask]).bool())
    return next_token_loss(model, batch.to(model.lm_head.weight.device)) / batch.loss_mask.sum()


def from_pretrained(cls, folder, dtype=None, device="cpu", unpack=None):
    """A released folder, or one of ours, which has the tokenizer too. dtype: as stored unless given. unpack(tensors,
    model.config_of, folder): from the files' names to ours; cls.read_config(path): what cls takes"""
    with shapes_only():
        model = cls(*cls.read_config(Path(folder) / "config.json"))
    if unpack:
        tensors = {name: cast(name, x, dtype) for file in weight_files(folder)
                   for name, x in unpack(read_tensors(file), model.config_of, folder)}
    else:
        tensors = read_llama_tensors(folder, model.halves[-1], dtype)
    assign(model, tensors, folder)
    if any((Path(folder) / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        model.text = open_text(folder)
        model.text.use_template()
    return model.to(device)


SHARD_BYTES = 5e9                                         # the most of one file, as transformers


def save_folder(folder, tensors, text, config):
    """A model folder: config.json with the chats' template, the tokenizer, and model.safetensors or its shards with
    their index. tensors: of all processes"""
    folder, shards, size = Path(folder), [{}], 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if len(shards) == 1:
        save_tensors(whole, tensors)
    else:
        files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}
        for file, shard in files.items():
            save_tensors(folder / file, shard)
        write_json(index, {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                           "weight_map": {name: file for file, shard in files.items() for name in shard}})
    (whole if len(shards) > 1 else index).unlink(missing_ok=True)     # of an earlier, smaller or larger model
    if text:
        text.save(folder)
        config = config | {"chat_template": text.template}
    write_json(folder / "config.json", config)


# ---------------------------------------------------------------- token by token

def row_lengths(model, rows):
    return [[len(row) for row in rows]] * len(model.halves)


def read(model, prompts, pictures=()):
    """prompts: lists of ids, an IMG for each picture; pictures: files, PIL images, or what config.prepare returns ->
    hidden states (B, D) of the last tokens, a cache for each half, how many tokens may follow each prompt

    model.halves: the configurations, the last one with the fields of pictures; model.row_lengths(rows): for each half,
    the lengths of the rows in it; model.hidden(ids, batch or None, caches) -> (B, L, D). UserError: a prompt too long
    """
    config, weight = model.halves[-1], model.lm_head.weight
    rows, ready, shown = [], [], sum(ids.count(IMG) for ids in prompts)
    assert prompts and all(prompts), f"{len(prompts)} prompts, expected one or more of a token or more"
    assert shown == len(pictures), f"{len(prompts)} prompts that show {shown} pictures, {len(pictures)} pictures"
    for ids in prompts:
        n = ids.count(IMG)
        ready += [p if isinstance(p, tuple) else config.prepare(open_image(p), n) for p in pictures[len(ready):][:n]]
        sizes = [len(order) for _, order in ready[len(ready) - n:]]
        rows.append(expand_images(ids, ids, sizes, config.image_token_index, edges=config.edges)[0])
    lengths = model.row_lengths(rows)
    room = [min(half.max_position_embeddings - n for half, n in zip(model.halves, row)) for row in zip(*lengths)]
    if min(room) < 1:
        raise UserError(f"the prompt is too long by {1 - min(room)} tokens: too little room is left for an answer")
    batch = Batch.build(*pad(rows), ready, config).to(weight.device)
    caches = [KVCache(half, len(rows), max(half_lengths), weight) for half_lengths, half in zip(lengths, model.halves)]
    last = model.hidden(batch.ids, batch, caches)[torch.arange(len(rows)), torch.tensor(lengths[-1]) - 1]
    for half_lengths, cache in zip(lengths, caches):
        cache.advance(half_lengths)
    return last, caches, room
