"""The image tokenizer (Sec. 3.2, A.1): a picture becomes discrete ids and contiguous CLIP signal, and ids a picture.

    images = ImageTokenizer.from_pretrained(folder)
    ids, signal = images.encode(prepare(open_image("cat.jpg"), images.config.resolution)[None])
    images.decode(ids)                                    # (1, 3, R, R) in [-1, 1]

Letters: B images, K codebooks of N codes, G = grid side, C = width of the contiguous signal E_c, R = resolution.
"""
import io
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from config import check_types
from vqgan import Decoder, Encoder
from weights import (
    UserError,
    assign,
    read_folder,
    read_json,
    read_tensors,
    read_yaml,
    reason,
    save_tensors,
    select,
    shapes_only,
    write_json,
)

# ---------------------------------------------------------------- pixels

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)


def open_image(source):
    """A file, or a PIL image -> an upright RGB picture: EXIF rotation is applied, transparency lies on white, 16 bits
    become 8. UserError where it is no picture, is cut off, or is a decompression bomb."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        image = upright(image)
        if image.mode.startswith(("I", "F")):             # 16 bits, which PIL would clip at 255, or floats from 0 to 1
            grey = np.asarray(image, dtype=np.float32)
            most = 65535 if grey.max() > 255 else 1 if image.mode == "F" and grey.max() < 2 else 255
            grey = grey * (255 / most)
            image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (Image.DecompressionBombError, *BROKEN) as error:
        source = "a picture in memory" if isinstance(source, io.BytesIO) else source
        raise UserError(f"{source}: cannot be read as a picture ({reason(error)})") from None


BROKEN = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, struct.error)


def upright(image):
    """EXIF rotation applied; a picture whose EXIF is broken stays as it is"""
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN:
        return image


def prepare(image, resolution, square=True):
    """CLIP's preprocessing: the shorter side to `resolution` (bicubic), centre crop, mean and deviation of CLIP.

    square: first pad to a square with CLIP's mean colour, so that nothing is cropped away (pictures to be understood);
    without it the middle is kept (pictures to be drawn). RGB PIL image -> (3, R, R) float32
    """
    if square and image.width != image.height:
        if max(image.size) > 8192:                        # a 20000 x 10 strip would need a square of 1.2 GB
            image = image.copy()
            image.thumbnail((8192, 8192))
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), MEAN_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    shorter = min(image.size)
    if max(image.size) > 16 * shorter:                    # a strip: cut it before enlarging it
        image = ImageOps.fit(image, [min(side, 16 * shorter) for side in image.size])
    wide, high = (int(resolution * side / shorter) for side in image.size)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - resolution) // 2, (high - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255                 # (3, R, R)
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def to_rgb(pixels):
    """CLIP-normalised pixels -> [-1, 1], the range the VQGAN draws in. (B, 3, R, R)"""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return 2 * (pixels * std + mean) - 1


def to_pixels(rgb):
    """The way back: [-1, 1] -> CLIP-normalised pixels"""
    mean, std = (rgb.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((rgb + 1) / 2 - mean) / std


def to_picture(rgb):
    """(3, R, R) in [-1, 1] -> PIL image"""
    return Image.fromarray(((rgb.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


# ---------------------------------------------------------------- CLIP-ViT, the frozen encoder

class ClipBlock(nn.Module):
    def __init__(self, width, inner, heads, eps):
        super().__init__()
        self.heads = heads
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width)
                                        for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):                                                                     # (B, 1 + G*G, width)
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))                                # (B, heads, 1 + G*G, d)
        x = x + self.self_attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))                                 # quick-GELU


class ClipViT(nn.Module):
    """`hidden_states(pixels, n)`: list of n + 1 tensors (B, 1 + G*G, width); 0 = the embedding after pre_layrnorm,
    i = the output of block i. Keys as in Hugging Face's `vision_model.*`; post_layernorm is there for them only."""

    SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")

    def __init__(self, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size,
                 layer_norm_eps=1e-5):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(
            nn.init.normal_(torch.empty(hidden_size), std=hidden_size ** -0.5))
        self.embeddings.patch_embedding = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size, bias=False)
        self.embeddings.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, hidden_size)
        self.pre_layrnorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            ClipBlock(hidden_size, intermediate_size, num_attention_heads, layer_norm_eps)
            for _ in range(num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(hidden_size, layer_norm_eps)

    def hidden_states(self, pixels, layers=None):
        e = self.embeddings
        patches = e.patch_embedding(pixels).flatten(2).transpose(1, 2)                        # (B, G*G, width)
        x = torch.cat([e.class_embedding.expand(len(patches), 1, -1), patches], dim=1) + e.position_embedding.weight
        states = [self.pre_layrnorm(x)]
        for block in self.encoder.layers[:layers]:
            states.append(block(states[-1]))
        return states


def read_clip_sizes(folder):
    """config.json of an HF CLIP folder, of the vision model alone or of both -> the arguments of ClipViT"""
    path, expected = Path(folder) / "config.json", "expected a CLIP folder as clip-vit-large-patch14-336 is one"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json in it; {expected}, with its weights")
    config = read_json(path)
    config = config.get("vision_config", config)
    lost = [name for name in ClipViT.SIZES if name not in config]
    if lost:
        raise UserError(f"{path}: no {', '.join(lost)}; {expected}")
    if (act := config.get("hidden_act", "quick_gelu")) != "quick_gelu":
        raise UserError(f"{folder}/config.json: hidden_act is {act!r}, only quick_gelu (OpenAI's CLIP) is supported")
    return {name: config[name] for name in ClipViT.SIZES} | {"layer_norm_eps": config.get("layer_norm_eps", 1e-5)}


# ---------------------------------------------------------------- lookup-free quantization

class LFQ(nn.Module):
    """K codebooks of N = 2^bits codes without a table: the code is the sign of each projected dimension (A.1)."""

    def __init__(self, dim, codebook_size, num_codebooks):
        super().__init__()
        self.books, self.bits = num_codebooks, codebook_size.bit_length() - 1
        if 2 ** self.bits != codebook_size:
            raise UserError(f"codebook_size is {codebook_size}, expected a power of two: a code is a row of bits")
        self.project_in = nn.Linear(dim, self.books * self.bits)
        self.project_out = nn.Linear(self.books * self.bits, dim)

    def forward(self, x):
        """(B, dim, G, G) -> quantized (B, dim, G, G), ids (B, G, G, K), projected (B, G, G, K * bits)"""
        projected = self.project_in(x.permute(0, 2, 3, 1))
        code = torch.where(projected > 0, 1.0, -1.0).to(x.dtype)
        ids = ((code > 0).unflatten(-1, (self.books, self.bits)) * self._powers(x.device)).sum(-1)
        code = projected + (code - projected).detach()                                        # straight-through
        return self.project_out(code).permute(0, 3, 1, 2), ids, projected

    def codes(self, ids):
        """ids (..., K) -> signs (..., K * bits)"""
        bits = (ids[..., None] & self._powers(ids.device)) > 0
        return torch.where(bits, 1.0, -1.0).flatten(-2).to(self.project_out.weight.dtype)

    def vectors(self, ids):
        """ids (..., K) -> what the decoder reads (..., dim)"""
        return self.project_out(self.codes(ids))

    def _powers(self, device):
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=device)                        # most significant first


class VQ(nn.Module):
    """What LFQ replaced: K learned tables of N vectors, each for its share of the dimensions; the nearest is the code.
    The paper's failing baseline (Fig. 2), here to compare with."""

    def __init__(self, dim, codebook_size, num_codebooks):
        super().__init__()
        shape = (num_codebooks, codebook_size, dim // num_codebooks)
        self.tables = nn.Parameter(torch.empty(shape).uniform_(-1 / codebook_size, 1 / codebook_size))

    def forward(self, x):
        """As LFQ; projected is (B, G, G, dim), x itself"""
        projected = x.permute(0, 2, 3, 1)
        parts = projected.unflatten(-1, (len(self.tables), -1))                               # (B, G, G, K, dim / K)
        product = torch.einsum("...kd,knd->...kn", parts, self.tables)
        ids = (self.tables.square().sum(-1) - 2 * product).argmin(-1)
        code = projected + (self.vectors(ids) - projected).detach()                           # straight-through
        return code.permute(0, 3, 1, 2), ids, projected

    def vectors(self, ids):
        """ids (..., K) -> what the decoder reads (..., dim)"""
        return torch.cat([table[ids[..., k]] for k, table in enumerate(self.tables)], dim=-1)


QUANTIZERS = {"lfq": LFQ, "vq": VQ}


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
        check_types(self, "image tokenizer", at_least={"num_res_blocks": 0, "codebook_size": 2})
        if known := set(self.clip) ^ {*ClipViT.SIZES, "layer_norm_eps"}:
            raise UserError(f"image tokenizer: the sizes of its CLIP lack or have too much: {sorted(known)}")
        size, patch = self.clip["image_size"], self.clip["patch_size"]
        if (size, size // patch) != (self.resolution, self.grid):
            raise UserError(f"image tokenizer: resolution {self.resolution} and grid {self.grid} do not fit a CLIP of "
                            f"{size} pixels with patches of {patch}")
        if not self.select_layers or not all(0 <= i <= self.clip["num_hidden_layers"] for i in self.select_layers):
            raise UserError(f"image tokenizer: select_layers {list(self.select_layers)}, but the CLIP has the states 0 "
                            f"(its embedding) to {self.clip['num_hidden_layers']} (its last layer)")
        for name, known in (("quantizer", list(QUANTIZERS)), ("encoder", ["clip", "scratch"])):
            if getattr(self, name) not in known:
                raise UserError(f"image tokenizer: {name} is {getattr(self, name)!r}, expected one of {known}")
        if len(self.ch_mult) < 2:
            raise UserError(f"image tokenizer: ch_mult {list(self.ch_mult)} has one level, expected two or more: the "
                            "picture grows from one to the next")
        tables = self.num_codebooks if self.quantizer == "vq" else 1
        for name, whole, part, why in (
                ("embed_dim", self.embed_dim, tables, "codebooks of VQ"),
                ("hidden_size", self.clip["hidden_size"], self.clip["num_attention_heads"], "heads of the CLIP"),
                ("ch", self.ch, 32, "group norms of 32 channels"),
                ("ch times the last of ch_mult", self.ch * self.ch_mult[-1], self.num_attn_heads,
                 "heads of the decoder, num_attn_heads")):
            if whole % part:
                raise UserError(f"image tokenizer: {name}, {whole}, does not divide by {part}: {why}")

    @property
    def signal_size(self):
        if self.encoder == "scratch":
            return self.z_channels
        return self.clip["hidden_size"] * len(self.select_layers)                             # C


class ImageTokenizer(nn.Module):
    """Eq. 9, first half: E_c = CLIP(I), ids = LFQ(E_c), and the way back from ids to pixels."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.encoder == "scratch":
            self.encoder = Encoder(c.ch, c.ch_mult, c.num_res_blocks, c.attn_resolutions, c.z_channels, c.grid,
                                   c.num_attn_heads)
        else:
            self.encoder = nn.ModuleDict({"vision_tower": nn.ModuleDict({"vision_model": ClipViT(**c.clip)})})
        self.quant_conv = nn.Conv2d(c.signal_size, c.embed_dim, 1)
        self.quantize = QUANTIZERS[c.quantizer](c.embed_dim, c.codebook_size, c.num_codebooks)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.decoder = Decoder(c.ch, c.ch_mult, c.num_res_blocks, c.attn_resolutions, c.z_channels, c.grid,
                               c.resolution, c.num_attn_heads)

    @property
    def clip(self):
        return self.encoder.vision_tower.vision_model

    def signal(self, pixels):
        """pixels (B, 3, R, R), normalised as CLIP's -> E_c (B, G*G, C), row by row, the class token dropped"""
        if self.config.encoder == "scratch":
            return self.encoder(to_rgb(pixels)).flatten(2).transpose(1, 2)
        states = self.clip.hidden_states(pixels, max(self.config.select_layers))
        return torch.cat([states[i][:, 1:] for i in self.config.select_layers], dim=-1)

    def quantized(self, signal):
        """E_c (B, G*G, C) -> what LFQ.forward returns, of quant_conv(E_c)"""
        grid = self.config.grid
        return self.quantize(self.quant_conv(signal.transpose(1, 2).unflatten(2, (grid, grid))))

    @torch.no_grad()
    def encode(self, pixels):
        """pixels (B, 3, R, R) -> ids (B, G*G, K) long, signal (B, G*G, C)"""
        signal = self.signal(pixels)
        return self.quantized(signal)[1].flatten(1, 2), signal

    @torch.no_grad()
    def decode(self, ids):
        """ids (B, G*G, K) -> pixels (B, 3, R, R), about [-1, 1]"""
        if ids.min() < 0 or ids.max() >= self.config.codebook_size:
            raise UserError(f"image ids run from {ids.min()} to {ids.max()}, expected 0 to "
                            f"{self.config.codebook_size - 1}: BOI and EOI are no codes")
        z = self.quantize.vectors(ids).transpose(1, 2)
        return self.decoder(self.post_quant_conv(z.unflatten(2, (self.config.grid, self.config.grid))))

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """Our folder (config.json, model.safetensors), a model folder that has one inside, or a published folder
        (libra-vision-tokenizer, libra-11b-chat, libra-11b-base) as it is."""
        folder = Path(folder)
        if (folder / "image_tokenizer").is_dir():
            folder = folder / "image_tokenizer"
        path, known = folder / "config.json", {field.name for field in fields(ImageTokenizerConfig)}
        if (folder / "vision_tokenizer_config.yaml").is_file():
            config, tensors, source = read_published(folder, dtype)
        elif path.is_file() and "clip" in (values := read_json(path)):
            if known != values.keys():
                raise UserError(f"{path}: it lacks {sorted(known - values.keys())}, unknown are "
                                f"{sorted(values.keys() - known)}")
            config, tensors, source = ImageTokenizerConfig(**values), read_folder(folder, dtype), folder
        else:
            raise UserError(f"{folder}: no image tokenizer; expected in it the folder image_tokenizer, or "
                            "vision_tokenizer_config.yaml. A LLaMA has none: pretrain.py makes a Libra of --llm LLAMA "
                            "and --image-tokenizer, which train_tokenizer.py makes")
        with shapes_only():
            tokenizer = cls(config)
        assign(tokenizer, tensors, source)
        return tokenizer.requires_grad_(False).eval().to(device)

    def save_pretrained(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(self.config))
        save_tensors(folder / "model.safetensors", self.state_dict())


YAML_NAMES = {  # in vision_tokenizer_config.yaml -> here
    "params": {"embed_dim": "embed_dim", "codebook_size": "codebook_size", "num_codebook": "num_codebooks"},
    "ddconfig": {"select_layer": "select_layers", "z_channels": "z_channels", "resolution": "resolution", "ch": "ch",
                 "ch_mult": "ch_mult", "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions",
                 "initial_resolution": "grid", "num_attn_head": "num_attn_heads"}}
YAML_FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}


def read_published(folder, dtype=None):
    """vision_tokenizer_config.yaml, vqgan.ckpt and the CLIP folder beside them -> config, tensors, file name"""
    path = folder / "vision_tokenizer_config.yaml"
    top = read_yaml(path)
    params = top.pop("params", None)
    dd = params.pop("ddconfig", None) if isinstance(params, dict) else None
    if not isinstance(dd, dict):
        raise UserError(f"{path}: expected the mappings params and, in it, ddconfig")
    checkpoint, encoder = params.pop("ckpt_path", None) or "vqgan.ckpt", dd.pop("encoder_name", None) or ""
    checkpoint, encoder = folder / str(checkpoint), folder / str(encoder)
    top = {key: top[key] for key in top if key not in ("freeze", "max_vision_token_length")}
    for key, value in YAML_FIXED.items():
        if dd.pop(key, value) != value:
            raise UserError(f"{path}: {key} must be {value}")
    unknown = [*top, *(params.keys() - YAML_NAMES["params"].keys()), *(dd.keys() - YAML_NAMES["ddconfig"].keys())]
    lost = [*(YAML_NAMES["params"].keys() - params.keys()), *(YAML_NAMES["ddconfig"].keys() - dd.keys())]
    if unknown or lost:
        raise UserError(f"{path}: unknown keys {sorted(unknown)}, missing keys {sorted(lost)}")
    values = {YAML_NAMES["params"][key]: params[key] for key in params}
    values |= {YAML_NAMES["ddconfig"][key]: dd[key] for key in dd}
    config = ImageTokenizerConfig(clip=read_clip_sizes(encoder), **values)

    tower = "encoder.vision_tower.vision_model."

    def keep(name):                                       # not what only training needed, and not the buffers
        ours = name.startswith(("decoder.", "quantize.project_", "quant_conv.", "post_quant_conv.", tower))
        return name if ours and "position_ids" not in name else None
    tensors = select(read_tensors(checkpoint), dtype, keep)
    if not any(name.startswith(tower) for name in tensors):
        tensors |= read_clip_weights(encoder, dtype, tower)
    return config, tensors, checkpoint


def read_clip_weights(folder, dtype=None, prefix=""):
    """The vision tower of an HF CLIP folder -> {prefix + name: tensor}; the text tower stays behind. Newer versions of
    Hugging Face save a vision model without the `vision_model.` before its names."""
    def keep(name):
        name = name.removeprefix("vision_model.")
        ours = name.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."))
        return prefix + name if ours and "position_ids" not in name else None
    return read_folder(folder, dtype, keep)
