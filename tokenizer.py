"""The image tokenizer (Sec. 3.2, A.1): pixels -> CLIP states -> contiguous signal E_c -> LFQ ids -> decoder -> pixels.

    images = ImageTokenizer.from_pretrained(folder)
    ids, signal = images.encode(prepare(open_image("cat.jpg"), images.config.resolution)[None])
    images.decode(ids)                                    # (1, 3, R, R) in [-1, 1]

Modules have the names of the published weights.
Letters: B images, K codebooks of N codes, G = grid side, C = width of E_c, R = resolution.
"""
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from common import precision, published
from common.config import check_divisible, check_fields, make_config
from common.weights import UserError, assign, first_few, read_folder, read_json, save_tensors, shapes_only, write_json

# ---------------------------------------------------------------- pixels

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN, STD = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
MEAN_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)


def prepare(image, resolution, square=True):
    """CLIP's preprocessing of an RGB image: the shorter side to `resolution` (bicubic), centre crop, CLIP's mean and
    deviation -> (3, R, R) float32. square: pad to a square first, so that nothing is cropped away (pictures to be
    understood); without it the middle is kept (pictures to be drawn)."""
    if square and image.width != image.height:
        if max(image.size) > 8192:                        # a 20000 x 10 strip would need a square of 1.2 GB
            image = image.copy()
            image.thumbnail((8192, 8192))
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), MEAN_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    shorter = min(image.size)
    if max(image.size) > 16 * shorter:                    # cut a long strip before it is enlarged
        image = ImageOps.fit(image, [min(side, 16 * shorter) for side in image.size])
    width, height = (int(resolution * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255                 # (3, R, R)
    return (pixels - MEAN.to(pixels)) / STD.to(pixels)


def to_rgb(pixels):
    """CLIP-normalised pixels (B, 3, R, R) -> [-1, 1], the range of the VQGAN"""
    return 2 * (pixels * STD.to(pixels) + MEAN.to(pixels)) - 1


def to_pixels(rgb):
    """The inverse of to_rgb"""
    return ((rgb + 1) / 2 - MEAN.to(rgb)) / STD.to(rgb)


def to_picture(rgb):
    """(3, R, R) in [-1, 1] -> PIL image"""
    return Image.fromarray(((rgb.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


# ---------------------------------------------------------------- CLIP-ViT, the frozen encoder

@dataclass
class ClipConfig:
    """Fields of Hugging Face's CLIPVisionConfig, with its defaults, which folders may leave out"""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_fields(self)
        check_divisible(self.hidden_size, self.num_attention_heads, "heads share CLIP's width evenly")


class ClipBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width, inner = config.num_attention_heads, config.hidden_size, config.intermediate_size
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, config.layer_norm_eps) for _ in range(2))
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):                                                                     # (B, 1 + G*G, width)
        h, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)                    # (B, heads, 1 + G*G, d)
                   for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))                                 # quick-GELU


class ClipViT(nn.Module):
    """Hugging Face's `vision_model.*`. post_layernorm is not used here; the published weights have it."""

    def __init__(self, *sizes, **named_sizes):
        """The fields of ClipConfig"""
        super().__init__()
        c, e = ClipConfig(*sizes, **named_sizes), nn.Module()
        self.embeddings, width = e, c.hidden_size
        e.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width ** -0.5))
        e.patch_embedding = nn.Conv2d(3, width, c.patch_size, stride=c.patch_size, bias=False)
        e.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width, c.layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ClipBlock(c) for _ in range(c.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(width, c.layer_norm_eps)

    def hidden_states(self, pixels, layers=None):
        """-> tensors (B, 1 + G*G, width): 0 = the embedding after pre_layrnorm, i = the output of block i. layers: how
        many blocks run, as the end of a slice (None: all, -1: all but the last)"""
        e = self.embeddings
        patches = e.patch_embedding(pixels).flatten(2).transpose(1, 2)                        # (B, G*G, width)
        x = torch.cat([e.class_embedding.expand(len(patches), 1, -1), patches], dim=1) + e.position_embedding.weight
        states = [self.pre_layrnorm(x)]
        for block in self.encoder.layers[:layers]:
            states.append(block(states[-1]))
        return states


# ---------------------------------------------------------------- quantization

class LFQ(nn.Module):
    """K codebooks of N = 2^bits codes without a table: a bit of an id is the sign of a projected dimension (A.1)."""

    def __init__(self, dim, codebook_size, num_codebooks):
        super().__init__()
        self.num_codebooks, self.bits = num_codebooks, codebook_size.bit_length() - 1
        self.project_in = nn.Linear(dim, self.num_codebooks * self.bits)
        self.project_out = nn.Linear(self.num_codebooks * self.bits, dim)

    def forward(self, x):
        """(B, dim, G, G) -> quantized (B, dim, G, G), ids (B, G, G, K), projected (B, G, G, K * bits)"""
        projected = self.project_in(x.permute(0, 2, 3, 1))
        ids = ((projected > 0).unflatten(-1, (self.num_codebooks, self.bits)) * self.bit_values(x.device)).sum(-1)
        code = projected + (self.signs(ids) - projected).detach()                             # straight-through
        return self.project_out(code).permute(0, 3, 1, 2), ids, projected

    def signs(self, ids):
        """ids (..., K) -> signs (..., K * bits)"""
        bits = (ids[..., None] & self.bit_values(ids.device)) > 0
        return torch.where(bits, 1.0, -1.0).flatten(-2).to(self.project_out.weight.dtype)

    def vectors(self, ids):
        """ids (..., K) -> what the decoder reads (..., dim)"""
        return self.project_out(self.signs(ids))

    def bit_values(self, device):
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=device)                        # most significant first


class VQ(nn.Module):
    """The paper's failing baseline (Fig. 2): K learned tables, each for its share of dimensions; the nearest wins."""

    def __init__(self, dim, codebook_size, num_codebooks):
        super().__init__()
        shape = (num_codebooks, codebook_size, dim // num_codebooks)
        self.tables = nn.Parameter(torch.empty(shape).uniform_(-1 / codebook_size, 1 / codebook_size))

    def forward(self, x):
        """As LFQ; projected (B, G, G, dim) is x itself"""
        projected = x.permute(0, 2, 3, 1)
        parts = projected.unflatten(-1, (len(self.tables), -1))                               # (B, G, G, K, dim / K)
        product = torch.einsum("...kd,knd->...kn", parts, self.tables)
        ids = (self.tables.square().sum(-1) - 2 * product).argmin(-1)
        code = projected + (self.vectors(ids) - projected).detach()                           # straight-through
        return code.permute(0, 3, 1, 2), ids, projected

    def vectors(self, ids):
        return torch.cat([table[ids[..., k]] for k, table in enumerate(self.tables)], dim=-1)


# ---------------------------------------------------------------- VQGAN: taming-transformers' layers and names

group_norm = partial(nn.GroupNorm, 32, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)          # (B, heads, h*w, d)
                   for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return x + self.proj_out(h)


def middle(width, heads):
    return nn.Sequential(OrderedDict(block_1=ResBlock(width, width), attn_1=AttnBlock(width, heads),
                                     block_2=ResBlock(width, width)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where attn_resolutions has that resolution"""

    def __init__(self, c_in, c_out, n_blocks, size, config):
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for i in range(n_blocks):
            self.block.append(ResBlock(c_out if i else c_in, c_out))
            attends = size in config.attn_resolutions
            self.attn.append(AttnBlock(c_out, config.num_attn_heads) if attends else nn.Identity())

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return x


class Decoder(nn.Module):
    """(B, z_channels, G, G) -> (B, 3, R, R). The last upsampling goes to R, by a fraction if need be (192 -> 336)."""

    def __init__(self, config):
        super().__init__()
        c, width, size = config, config.ch * config.ch_mult[-1], config.grid
        self.conv_in, self.mid = nn.Conv2d(c.z_channels, width, 3, padding=1), middle(width, c.num_attn_heads)
        levels = []
        for i in reversed(range(len(c.ch_mult))):
            level = Level(width, c.ch * c.ch_mult[i], c.num_res_blocks + 1, size, c)
            width, size = c.ch * c.ch_mult[i], 2 * size
            side = c.resolution if i == 1 else size
            level.upsample = nn.Identity() if i == 0 else nn.Sequential(OrderedDict(
                nearest=nn.Upsample((side, side)), conv=nn.Conv2d(width, width, 3, padding=1)))
            levels.insert(0, level)                                                           # up.0 is the finest
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level.upsample(level(h))
        return self.conv_out(F.silu(self.norm_out(h)))


class Encoder(nn.Module):
    """(B, 3, R, R) in [-1, 1] -> (B, z_channels, G, G); takes the place of the frozen CLIP in Table 3 (g)"""

    def __init__(self, config):
        super().__init__()
        c, width, last = config, config.ch, len(config.ch_mult) - 1
        self.resolution = size = c.grid * 2 ** last       # pictures of another one are scaled to it
        self.conv_in, self.down = nn.Conv2d(3, width, 3, padding=1), nn.ModuleList()
        for i, multiple in enumerate(c.ch_mult):
            level = Level(width, c.ch * multiple, max(1, c.num_res_blocks), size, c)
            width, size = c.ch * multiple, size // 2
            level.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1) if i < last else nn.Identity()
            self.down.append(level)
        self.mid = middle(width, c.num_attn_heads)
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, c.z_channels, 3, padding=1)

    def forward(self, x):
        if x.shape[-1] != self.resolution:
            x = F.interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", antialias=True)
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


# ---------------------------------------------------------------- the image tokenizer

@dataclass
class ImageTokenizerConfig:
    """The published sizes; `clip` holds the arguments of ClipViT."""
    clip: dict
    resolution: int = 336
    grid: int = 24
    select_layers: tuple = (2, 10, 18, 22)
    embed_dim: int = 1024
    codebook_size: int = 512
    num_codebooks: int = 2
    z_channels: int = 1024
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 4, 8)
    num_res_blocks: int = 2
    attn_resolutions: tuple = (24,)
    num_attn_heads: int = 8
    quantizer: str = "lfq"
    encoder: str = "clip"                                 # scratch: the VQGAN's own, trained along, Table 3 (g)

    def __post_init__(self):
        check_fields(self)
        c, clip = self, make_config(ClipConfig, self.clip, "clip")
        c.clip, layers = asdict(clip), clip.num_hidden_layers
        for fits, problem in (
                (c.encoder in ("clip", "scratch"), f"encoder is {c.encoder!r}, expected clip or scratch"),
                (c.quantizer in ("lfq", "vq"), f"quantizer is {c.quantizer!r}, expected lfq or vq"),
                ((c.resolution, c.grid) == (clip.image_size, clip.image_size // clip.patch_size),
                 f"resolution {c.resolution} and grid {c.grid} do not fit a CLIP of {clip.image_size} pixels"),
                (c.select_layers and max(c.select_layers) <= layers, f"select_layers are {list(c.select_layers)}, but "
                 f"the states of its CLIP are 0 (the embedding) to {layers}"),
                (1 < len(c.ch_mult) <= 16, f"the levels of ch_mult are {len(c.ch_mult)}, expected 2 to 16"),
                (c.quantizer == "vq" or c.codebook_size.bit_count() == 1, f"codebook_size is {c.codebook_size}, "
                 "expected a power of two: an id is made of bits")):
            if not fits:
                raise UserError(problem)
        if c.quantizer == "vq":
            check_divisible(c.embed_dim, c.num_codebooks, "each table has its share of it")
        check_divisible(c.ch, 32, "the norms of the VQGAN have 32 groups")
        check_divisible(c.ch * math.gcd(*c.ch_mult), c.num_attn_heads, "heads share a level's channels evenly")

    @property
    def signal_size(self):                                                                    # C
        return self.z_channels if self.encoder == "scratch" else self.clip["hidden_size"] * len(self.select_layers)


class ImageTokenizer(nn.Module):
    """Eq. 9, first half: E_c = CLIP(I), ids = LFQ(E_c), and the way back from ids to pixels; float32 in all models."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c) if c.encoder == "scratch" else nn.ModuleDict(
            {"vision_tower": nn.ModuleDict({"vision_model": ClipViT(**c.clip)})})
        self.quant_conv = nn.Conv2d(c.signal_size, c.embed_dim, 1)
        self.quantize = {"lfq": LFQ, "vq": VQ}[c.quantizer](c.embed_dim, c.codebook_size, c.num_codebooks)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.decoder = Decoder(c)

    @property
    def clip(self):
        return self.encoder.vision_tower.vision_model

    def signal(self, pixels):
        """CLIP-normalised pixels (B, 3, R, R) -> E_c (B, G*G, C): rows of the grid in order, without the class token"""
        with precision.exact_float32(pixels.device):
            if self.config.encoder == "scratch":
                return self.encoder(to_rgb(pixels)).flatten(2).transpose(1, 2)
            states = self.clip.hidden_states(pixels, max(self.config.select_layers))
            return torch.cat([states[i][:, 1:] for i in self.config.select_layers], dim=-1)

    def quantized(self, signal):
        """E_c (B, G*G, C) -> what LFQ.forward returns of quant_conv(E_c)"""
        with precision.exact_float32(signal.device):
            return self.quantize(self.quant_conv(signal.transpose(1, 2).unflatten(2, (self.config.grid, -1))))

    @torch.no_grad()
    def encode(self, pixels):
        """pixels (B, 3, R, R) -> ids (B, G*G, K) long, signal (B, G*G, C)"""
        signal = self.signal(pixels)
        return self.quantized(signal)[1].flatten(1, 2), signal

    @torch.no_grad()
    def decode(self, ids):
        """ids (B, G*G, K) -> pixels (B, 3, R, R), about [-1, 1]"""
        assert ids.min() >= 0 and ids.max() < self.config.codebook_size, "BOI and EOI are no codes"
        z = self.quantize.vectors(ids).transpose(1, 2)
        return self.decoder(self.post_quant_conv(z.unflatten(2, (self.config.grid, -1))))

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Our folder, a model folder that has one inside, or a published folder as it is"""
        config, source = read_image_config(folder)
        if (source / published.CONFIG).is_file():
            _, source, clip_folder = published.read_published_config(source)
            tensors = published.read_published_weights(source)
            if not any(name.startswith(published.CLIP_PREFIX) for name in tensors):
                tensors |= read_clip_weights(clip_folder, published.CLIP_PREFIX)
        else:
            tensors = read_folder(source, torch.float32)
        with shapes_only():
            tokenizer = cls(config)
        assign(tokenizer, tensors, source)
        return tokenizer.requires_grad_(False).eval().to(device)

    def save_pretrained(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", self.state_dict())
        write_json(folder / "config.json", asdict(self.config))               # last: without it the folder is no model


def find_image_tokenizer(folder):
    """-> the folder, `folder` or one inside it, that holds an image tokenizer, ours or a published one; else None"""
    for place in (Path(folder) / "image_tokenizer", Path(folder)):
        path = place / "config.json"
        if (place / published.CONFIG).is_file() or path.is_file() and "clip" in read_json(path):
            return place


def read_image_config(folder):
    """-> ImageTokenizerConfig, the folder that it was found in"""
    place = find_image_tokenizer(folder)
    if place is None:
        raise UserError(f"{folder}: no image tokenizer; expected image_tokenizer, {published.CONFIG}, or config.json "
                        "with a clip in it. A LLaMA gets one from pretrain.py --image-tokenizer")
    if (path := place / published.CONFIG).is_file():
        sizes, _, clip_folder = published.read_published_config(place)
        return make_config(ImageTokenizerConfig, sizes | {"clip": clip_sizes(clip_folder)}, path), place
    path = place / "config.json"
    values = read_json(path)
    if missing := {field.name for field in fields(ImageTokenizerConfig)} - values.keys():
        raise UserError(f"{path}: it lacks {first_few(missing)}")
    return make_config(ImageTokenizerConfig, values, path), place


def clip_sizes(folder):
    """config.json of an HF CLIP folder, of the vision model alone or of both -> the arguments of ClipViT"""
    path = Path(folder) / "config.json"
    top = read_json(path)
    kind, values = top.get("model_type") or "clip", top.get("vision_config") or top
    if not isinstance(values, dict) or kind not in ("clip", "clip_vision_model") or (
            values.get("hidden_act", "quick_gelu") != "quick_gelu" or values.get("num_channels", 3) != 3):
        raise UserError(f"{path}: model_type is {kind!r}; expected a CLIP folder such as clip-vit-large-patch14-336, "
                        "with hidden_act quick_gelu and three channels")
    sizes = {field.name: values[field.name] for field in fields(ClipConfig) if values.get(field.name) is not None}
    return asdict(make_config(ClipConfig, sizes, path))


def read_clip_weights(folder, prefix=""):
    """The vision tower of an HF CLIP folder -> {prefix + name: tensor}"""
    def keep(name):
        name = name.removeprefix("vision_model.")         # newer versions of Hugging Face save it without this
        in_tower = name.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."))
        return prefix + name if in_tower and "position_ids" not in name else None
    return read_folder(folder, torch.float32, keep)
