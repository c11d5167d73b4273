"""A plain LLaMA: one stream of tokens and causal attention (Sec. 3.1). Libra (model.py) is built from these parts.

    llama = Llama.from_pretrained("Llama-2-7b-chat-hf", dtype=torch.bfloat16)
    logits = llama(ids)                                   # (B, L) -> (B, L, V)

Letters: B rows, L positions, D hidden size, H heads (key-value heads may be fewer), d head_dim, V vocabulary.
"""
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.config import check_divisible, check_fields, read_config
from common.quantize import quantized_linear
from common.weights import UserError, assign, read_folder, shapes_only

# From version 2.11 torch prefers cuDNN's attention to flash on Hopper GPUs. cuDNN plans anew for every length, so for
# every batch of chats; under a mask its gradients can be NaN.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass
class LlamaConfig:
    """The fields of config.json; the defaults are LLaMA-2-7B's."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0                          # 0: as many as attention heads
    head_dim: int = 0                                     # 0: hidden_size / attention heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    rope_scaling: dict = field(default_factory=dict)      # {}: none; of Llama 3.1, or linear
    qkv_bias: bool = False                                # Qwen 2
    bias = False           # of all seven matrices of a layer; not read from config.json, other models' classes set it

    def __post_init__(self):
        check_fields(self)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        check_divisible(self.num_attention_heads, self.num_key_value_heads, "heads share key-value heads evenly")
        check_divisible(self.head_dim, 2, "RoPE rotates pairs of dimensions")

    from_file = classmethod(read_config)                  # LlamaConfig.from_file("config.json", sizes, **changes)


# ---------------------------------------------------------------- norm, positions, products

class RMSNorm(nn.RMSNorm):
    """x (..., D) -> x / sqrt(mean(x^2) + eps) * weight, the mean in float32 or finer, the result in the type of x"""
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rope_tables(config, positions, dtype):
    """Positions (...) -> cos, sin (..., d), float32 or finer; sin is negative in the first half, for apply_rope. Angles
    are float32, as in the published model."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() * scale_rope(config.rope_theta ** -exponents, config.rope_scaling)
    cos, sin = (f(angles.to(torch.promote_types(dtype, torch.float32))) for f in (torch.cos, torch.sin))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def scale_rope(frequencies, scaling):
    """frequencies (d/2,), lowered for longer contexts: all by `factor` (linear), or (llama3) those with fewer than
    `low_freq_factor` waves in the first training's context; none with more than high_freq_factor; between, a slope"""
    if not scaling:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)         # in the first context
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def apply_rope(x, rope):
    """x (B, H, L, d) in halves (a, b) -> (a cos - b sin, b cos + a sin), the layout of Hugging Face"""
    cos, sin = (table.to(x.dtype) for table in rope)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def linear(x, weight, bias=None):
    """x W^T + b. Decoding one row on a CPU is bound by reading weights; torch reads a float32 matrix 1.5 times as fast
    when it is given as a batch of 16 blocks (docs/speed.md)."""
    if hasattr(weight, "qdata"):                          # of torchao, see common/quantize.py
        return quantized_linear(x, weight, bias)
    one_row = x.is_cpu and x.dtype == torch.float32 and x.numel() == x.shape[-1] and not torch.is_grad_enabled()
    if not one_row or len(weight) % 16:
        return F.linear(x, weight, bias)
    blocks = weight.view(16, -1, weight.shape[1])                                             # (16, out / 16, in)
    out = torch.bmm(x.view(1, 1, -1).expand(16, -1, -1), blocks.mT).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def to_matmul_dtype(x):
    """Under autocast norms and embeddings come out in float32: this casts to the type of matrix products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Linear(nn.Linear):
    def __init__(self, size_in, size_out, bias=False):
        super().__init__(size_in, size_out, bias)

    def forward(self, x):
        return linear(x, self.weight, self.bias)


# ---------------------------------------------------------------- attention and its cache

def causal_attention(q, k, v, mask=None):
    """q (B, H, L, d), k and v (B, H_kv, L_k, d) -> (B, H, L, d), on torch's fused kernels.

    Without a mask a single query sees all keys, and L = L_k queries see the keys up to their own position.
    mask: bool, True where a query sees a key, broadcast to (B, H, L, L_k).
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1:                       # the heads of a group as queries of one head
        return F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, k.shape[3]), k, v, mask).reshape(q.shape)
    if grouped and q.is_cuda and mask is not None:        # no fast kernel for grouped heads and a mask
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    if mask is not None or q.shape[2] == 1:               # apart: the compiler takes no symbol as is_causal
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class KVCache:
    """Static buffers for the keys and values of every layer; each row is stored from position 0 on.

    Use: a pass over the prompts, `advance`, then for each token a pass and `advance`. Where rows end at different
    times, further prompts are read in a cache of their own, and `load_rows` copies them over rows that have ended.
    """

    def __init__(self, config, rows, length, like):
        """length: most positions of a row; like: a tensor of the wanted device and dtype"""
        self.config, self.mask, self.full_buffers = config, None, False
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys, self.values = like.new_zeros(shape).unbind(), like.new_zeros(shape).unbind()
        self.lengths, self.longest = [0] * rows, 0        # tokens in each row; in the longest
        self.rows, self.slots = (torch.arange(n, device=like.device) for n in (rows, length))
        self.next_position = torch.zeros((), dtype=torch.long, device=like.device)

    def update(self, layer, k, v):
        """Store new keys and values (B, H_kv, L, d). -> all keys, all values, mask for causal_attention"""
        keys, values = self.keys[layer], self.values[layer]
        for buffer, new in ((keys, k), (values, v)):
            if self.mask is None:                         # the prompts, or one token for rows of equal length
                buffer[:, :, self.longest:self.longest + new.shape[2]] = new
            else:
                buffer[self.rows, :, self.next_position[:, 0, 0]] = new[:, :, 0].to(buffer.dtype)
        if not self.longest:
            return k, v, None
        end = len(self.slots) if self.full_buffers else self.longest + 1
        return keys[:, :, :end], values[:, :, :end], self.mask

    def advance(self, counts):
        """counts: tokens that each row has gained. Prepares positions (B, 1, 1) and, for rows of different lengths, the
        mask (B, 1, 1, keys) of the next token."""
        if not self.longest:
            self.next_position = torch.tensor(counts, device=self.slots.device)[:, None, None]
        else:
            self.next_position += 1                       # in place: a CUDA graph reads it at this address
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]
        self.update_mask()

    def load_rows(self, rows, other=None):
        """The rows of another cache take the place of these; None: these rows are empty again."""
        if self.next_position.dim() == 0:
            self.next_position = torch.zeros_like(self.rows)[:, None, None]
        index = self.rows[rows]
        self.next_position[index] = 0 if other is None else other.next_position
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values) if other else ()):
            mine[index, :, :other.longest] = theirs[:, :, :other.longest]
        for row, length in zip(rows, other.lengths if other else [0] * len(rows)):
            self.lengths[row] = length
        self.update_mask()

    def update_mask(self):
        """To be called when the lengths have changed"""
        self.longest = max(self.lengths)
        if self.full_buffers:
            self.mask.copy_((self.slots <= self.next_position)[:, None])
        else:
            alike = min(self.lengths) == self.longest
            self.mask = None if alike else (self.slots[:self.longest + 1] <= self.next_position)[:, None]

    def use_full_buffers(self):
        """From now on queries see the whole buffers under a mask, so that no shape and no address changes."""
        if not self.full_buffers:
            self.full_buffers, self.mask = True, (self.slots <= self.next_position)[:, None]


class Attention(nn.Module):
    attention = staticmethod(causal_attention)            # HaploVL's mask may be a list of segments

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, width, c.bias or c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_width, c.bias or c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_width, c.bias or c.qkv_bias)
        self.o_proj = Linear(width, c.hidden_size, c.bias)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)                    # (B, heads, L, d)

    def forward(self, x, rope, cache=None, layer=0, mask=None):
        """x (B, L, D) -> (B, L, D). mask: for the prompts; None: causal, or the cache's"""
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v, cache_mask = cache.update(layer, k, v)
            mask = cache_mask if mask is None else mask
        return self.o_proj(self.attention(q, k, v, mask).transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- a layer, the model

class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.bias)
        self.activation = F.silu                          # other models may have another

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, attention=Attention, feed_forward=FeedForward, norm=RMSNorm):
        super().__init__()
        self.self_attn, self.mlp = attention(config), feed_forward(config)
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, cache=None, layer=0, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


def run_layers(x, layers, config, cache=None, mask=None, recompute=False):
    """x (B, L, D): the prompts or, with prompts in the cache, one token a row -> (B, L, D) after all layers. config:
    for RoPE; mask: for the prompts, as the blocks take it; recompute: the activations in the backward pass"""
    positions = (0 if cache is None else cache.next_position) + torch.arange(x.shape[1], device=x.device)
    rope, x = rope_tables(config, positions, x.dtype), to_matmul_dtype(x)
    for layer, block in enumerate(layers):
        run = partial(checkpoint, block, use_reentrant=False) if recompute and torch.is_grad_enabled() else block
        x = run(x, rope, cache, layer, mask)
    return x


class Llama(nn.Module):
    def __init__(self, config, block=Block):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def hidden_states(self, ids, cache=None):
        """ids (B, L): the prompts or, with prompts in the cache, one token a row -> (B, L, D) after the final norm"""
        return self.model.norm(run_layers(self.model.embed_tokens(ids), self.model.layers, self.config, cache))

    def forward(self, ids, cache=None):
        """-> logits (B, L, V)"""
        return self.lm_head(self.hidden_states(ids, cache))

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """A Hugging Face LLaMA folder. dtype: as stored unless given, and of mixed ones the widest."""
        with shapes_only():
            llama = cls(LlamaConfig.from_file(Path(folder) / "config.json"))
        assign(llama, read_llama_tensors(folder, llama.config, dtype), folder)
        return llama.tie_weights().to(device)

    def tie_weights(self):
        """After loading: the output matrix is the embedding again, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self


def read_llama_tensors(folder, config, dtype):
    """-> {name: tensor}, with lm_head where it is tied to the embedding. Buffers of older code are dropped."""
    def keep(name):
        return None if name.endswith(("_placeholder", "rotary_emb.inv_freq")) else name
    tensors = read_folder(folder, dtype, keep)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embedding).to(embedding.dtype), embedding):
            raise UserError(f"{folder}/config.json: tie_word_embeddings is true, but the file's lm_head differs from "
                            "its embedding")
    return tensors
