"""HaploVL (Yang et al., ICML 2025): raw patches and text together go through a pre-decoder, then through an LLM.

    python -m monolithic.haplovl --stage 1 --llm vicuna-7b-v1.5 --clip clip-vit-large-patch14-336 --out runs/haplovl-1
    python -m monolithic.haplovl --stage 2 --model runs/haplovl-1 --data llava_v1_5_mix665k.json --images DIR

Stage 1 distils the pre-decoder from CLIP (patches) and from the LLM's embeddings (text); stage 2 trains all on answers.
"Ours" marks what the paper leaves open. Letters: B rows, L positions, V vocabulary, S pixels and g patches of a tile's
side, n image tokens of a batch, D_pre and D hidden sizes of the pre-decoder and of the LLM.
"""
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from common.config import check_divisible
from common.pictures import open_image
from common.sampling import Sampler, Step
from common.weights import UserError, assign, read_json, save_tensors, shapes_only, write_json
from llama import (
    ACTIVATIONS,
    Attention,
    Block,
    KVCache,
    Linear,
    LlamaConfig,
    RMSNorm,
    causal_attention,
    linear,
    read_llama_tensors,
    rope_tables,
)
from model import cross_entropy
from monolithic.inputs import Batch, pad, prepare_picture, spell_out
from text import IMG, Text

# ---------------------------------------------------------------- configuration


@dataclass
class HalfConfig(LlamaConfig):
    """base_config (the LLM) or pre_config of config.json; both halves use the image fields of base_config."""
    vocab_size: int = 152064
    intermediate_size: int = 22016
    num_key_value_heads: int = 32
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    norm_mode: str = "rmsnorm"
    attention_rope: bool = False                          # of pre_config: RoPE of its own, else base_config's
    patch_size: int = 14
    default_image_size: int = 336                         # S
    image_grid_pinpoints: tuple = tuple((336 * r, 336 * c) for r, most in enumerate((6, 3, 2, 1, 1, 1), 1)
                                        for c in range(1, most + 1))                          # canvases: height, width
    image_aspect_ratio: str = "anyres_max_6"              # with "any": tiles; else one square
    image_token_index: int = 151646
    bias = True

    def __post_init__(self):
        super().__post_init__()
        check_divisible(self.hidden_size, self.num_attention_heads, "heads share the hidden size")
        if self.hidden_act not in ACTIVATIONS or self.norm_mode not in NORMS:
            raise UserError(f"config: hidden_act {self.hidden_act!r}, norm_mode {self.norm_mode!r}; expected one of "
                            f"{', '.join(ACTIVATIONS)}, and one of {', '.join(NORMS)}")
        self.grid, self.tiled = self.default_image_size // self.patch_size, "any" in self.image_aspect_ratio       # g

    @classmethod
    def from_dict(cls, values):
        """Other fields belong to transformers. Those of them that would change what is computed are refused."""
        for name, computed in (("rope_scaling", None), ("use_sliding_window", False), ("attention_dropout", 0)):
            if values.get(name, computed) != computed:
                raise UserError(f"config: {name} is {values[name]!r}, HaploVL computes {computed!r}")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**known | {"head_dim": 0, "num_key_value_heads": values.get("num_key_value_heads", 32) or 0})


def read_config(path):
    """-> base, pre"""
    values = read_json(path)
    halves = [values.get(name) for name in ("base_config", "pre_config")]
    if values.get("model_type") != "haplo" or not all(isinstance(half, dict) for half in halves):
        raise UserError(f"{path}: expected model_type haplo, a base_config and a pre_config")
    base, pre = (HalfConfig.from_dict(half) for half in halves)
    side, most = base.default_image_size, int(re.sub(r"\D", "", base.image_aspect_ratio) or 0)
    if base.tiled and any(h % side or w % side or h * w > 1.21 * most * side ** 2 for h, w in base.image_grid_pinpoints):
        raise UserError(f"{path}: image_grid_pinpoints are not made of at most {most} tiles of {side} pixels")
    if not pre.attention_rope and pre.head_dim != base.head_dim:
        raise UserError(f"{path}: heads of {pre.head_dim} need attention_rope, base_config's are of {base.head_dim}")
    return base, pre


# ---------------------------------------------------------------- the model

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
            parts.append(causal_attention(*part, causal_lower_right(end - start, end) if start else None))
    return torch.cat(parts, dim=2)


class HaploAttention(Attention):
    attention = staticmethod(block_attention)


class InputRMSNorm(RMSNorm):
    """In the dtype of its input, as the authors'; llama.RMSNorm has the mean in float32."""
    def forward(self, x):
        return self.weight.to(x.dtype) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": InputRMSNorm}


def blocks(config):
    return [Block(config, HaploAttention, norm=NORMS[config.norm_mode]) for _ in range(config.num_hidden_layers)]


class PreDecoder(nn.Module):
    def __init__(self, base, pre):
        super().__init__()
        self.base, self.pre, self.text, self.checkpoint_activations = base, pre, None, False
        width, p, m = pre.hidden_size, base.patch_size, nn.Module()
        self.model = m
        m.embed_tokens = nn.Embedding(base.vocab_size, width)
        m.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, p, stride=p, bias=False)})
        m.pre_pos_embed = nn.Parameter(nn.init.normal_(torch.empty(1, base.grid ** 2, width), std=0.02))
        m.image_newline = nn.Parameter(torch.zeros(width))
        m.pre_norm = nn.LayerNorm(width, 1e-5)
        m.layers = nn.ModuleList(blocks(pre))

    def image_tokens(self, batch):
        """-> (n, D_pre): patches with their position in the tile, newlines"""
        m = self.model
        patches = m.patch_embed.proj(batch.tiles.to(m.image_newline.dtype)).flatten(2).transpose(1, 2)
        vectors = torch.cat([(patches + m.pre_pos_embed).flatten(0, 1), m.image_newline[None]])
        return vectors[batch.order]

    def run_layers(self, x, half, rope_config, mask, cache):
        """half: pre or base. x (B, L, size of the half) -> the same through its layers"""
        n = self.pre.num_hidden_layers
        layers = list(self.model.layers)[:n] if half is self.pre else list(self.model.layers)[n:]
        positions = (0 if cache is None else cache.next) + torch.arange(x.shape[1], device=x.device)
        rope = rope_tables(rope_config, positions, x.dtype)
        for layer, block in enumerate(layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, None, layer, mask, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer, mask)
        return x

    def encode(self, ids, batch=None, cache=None):
        """ids (B, L), with the batch that they are of or, behind a cache, one new token a row -> (B, L, D_pre)"""
        x, mask = self.model.embed_tokens(ids), None
        if batch is not None:
            tokens, mask = self.image_tokens(batch).to(x.dtype), batch.mask()
            x = x.flatten(0, 1).index_copy(0, batch.image_index, tokens).view_as(x)
        x = self.model.pre_norm(x)
        return self.run_layers(x, self.pre, self.pre if self.pre.attention_rope else self.base, mask, cache), mask


def initialise(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class HaploVL(PreDecoder):
    """`text` is set when the model came from a folder with tokenizer.model."""

    def __init__(self, base, pre):
        super().__init__(base, pre)
        self.model.layers.extend(blocks(base))
        self.model.pre_connector = Linear(pre.hidden_size, base.hidden_size)
        self.model.norm = NORMS[base.norm_mode](base.hidden_size, base.rms_norm_eps)
        self.lm_head = Linear(base.hidden_size, base.vocab_size)
        self.apply(initialise)

    def hidden(self, ids, batch=None, caches=(None, None)):
        """As encode, with a cache for each half -> (B, L, D) after the final norm"""
        x, mask = self.encode(ids, batch, caches[0])
        return self.model.norm(self.run_layers(self.model.pre_connector(x), self.base, self.base, mask, caches[1]))

    def forward(self, batch):
        """-> the sum of the cross-entropy over the targets, each predicted from the token before it"""
        targets = batch.loss_mask[:, 1:]
        return cross_entropy(self.lm_head, self.hidden(batch.ids, batch)[:, :-1][targets], batch.ids[:, 1:][targets])

    @torch.inference_mode()
    def generate(self, prompts, pictures=(), max_new_tokens=128, stop=None, **sampling):
        """Continue prompts, lists of ids with an IMG for each of the pictures: files, PIL images, or what
        prepare_picture returns. Yields (B, 1) ids on the CPU. A row that has produced `stop` repeats it; when all have,
        generation ends. sampling: see Sampler. Ours: with a text tokenizer only its tokens can follow, so no <image>.
        """
        if (n := sum(ids.count(IMG) for ids in prompts)) != len(pictures):
            raise UserError(f"{len(pictures)} pictures are given, the prompts show {n}")
        like, vocab = self.lm_head.weight, self.text and self.text.vocab_size
        pictures = [p if isinstance(p, tuple) else prepare_picture(open_image(p), self.base) for p in pictures]
        sizes, rows = [len(order) for _, order in pictures], []
        for ids in prompts:
            rows.append(spell_out(ids, ids, sizes, self.base.image_token_index)[0])
            sizes = sizes[ids.count(IMG):]
        lengths = [len(row) for row in rows]
        max_new_tokens = min(max_new_tokens, self.base.max_position_embeddings - max(lengths))
        if max_new_tokens < 1:
            raise UserError(f"the prompt has {max(lengths)} of the {self.base.max_position_embeddings} tokens that the "
                            "model takes: too little room is left")
        batch = Batch.build(*pad(rows), pictures, self.base).to(like.device)
        caches = [KVCache(half, len(rows), max(lengths) + max_new_tokens, like) for half in (self.pre, self.base)]
        hidden = self.hidden(batch.ids, batch, caches)[torch.arange(len(rows)), torch.tensor(lengths) - 1]
        for cache in caches:
            cache.advance(lengths)
        new = SimpleNamespace(text_ids=batch.ids[:, 0].clone(), image_ids=batch.ids[:0, 0].clone())
        step = Step(lambda: self.hidden(new.text_ids[:, None], None, caches), new, dict(enumerate(caches)))
        sampler, done = Sampler(len(rows), **sampling), torch.zeros(len(rows), dtype=torch.bool)
        for number in range(max_new_tokens):
            tokens = sampler(linear(hidden, self.lm_head.weight[:vocab]), range(len(rows)))
            if stop is not None:
                tokens[done] = stop
                done |= tokens == stop
            yield tokens[:, None]
            if done.all() or number == max_new_tokens - 1:
                return
            hidden = step(tokens, tokens[:0])

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """A released folder, or one of ours, which has tokenizer.model too. dtype: as stored unless given"""
        with shapes_only():
            model = cls(*read_config(Path(folder) / "config.json"))
        assign(model, read_llama_tensors(folder, model.base, dtype), folder)
        if (path := Path(folder) / "tokenizer.model").exists():
            model.text = Text(path)
        return model.to(device)

    def save_pretrained(self, folder, tensors=None):
        """config.json (base_config's fields stand at its top too, as in the released one), model.safetensors,
        tokenizer.model. tensors: the weights to write, if they are not those of this process"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", tensors or self.state_dict())
        if self.text and self.text.path.resolve() != (folder / "tokenizer.model").resolve():
            shutil.copyfile(self.text.path, folder / "tokenizer.model")
        base, pre = asdict(self.base), asdict(self.pre)
        write_json(folder / "config.json", {**base, "model_type": "haplo", "base_config": base, "pre_config": pre})
