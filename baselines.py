"""What bench.py measures against: the least time that a model's products take, the authors' way of computing it, and
the least that reading pictures takes.

The first two run the very model that is measured, with its weights and shapes.
"""
import io
import math
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from elementwise import rope_table, rotate
from model import LowRank
from streams import IMAGE, TEXT

# ---------------------------------------------------------------- the limit: products and one causal attention a layer

@contextmanager
def products_of(*models):
    """Collects what goes through matrices and convolutions: (weight, shape of the input, its gradient is needed)"""
    seen = []

    def note(module, inputs, _):
        x = inputs[0]
        if isinstance(module, LowRank):
            inner = x.shape[:-1] + module.weight_A.shape[:1]
            seen.append((module.weight_A, x.shape, x.requires_grad, None))
            seen.append((module.weight_B, inner, x.requires_grad or module.weight_A.requires_grad, None))
        else:
            seen.append((module.weight, x.shape, x.requires_grad, module if isinstance(module, nn.Conv2d) else None))
    hooks = [module.register_forward_hook(note) for model in models for module in model.modules()
             if isinstance(module, (nn.Linear, LowRank, nn.Conv2d))]
    yield seen
    for hook in hooks:
        hook.remove()


def alone(like, seen, backward, multiply=None):
    """-> a function that runs these products, each forward and, where training needs them, its two gradients, on
    buffers of the device and type of `like`. multiply(x, weight): instead of torch's mm"""
    buffers, runs = {}, []

    def buffer(*shape, result=False):
        """A result is never read: products of products fade into numbers so small that some CPUs take six times as
        long over them."""
        if (shape, result) not in buffers:
            buffers[shape, result] = torch.randn(shape, device=like.device, dtype=like.dtype)
        return buffers[shape, result]
    for weight, shape, needs, conv in seen:
        w = weight.detach()
        if not math.prod(shape):
            continue
        if conv is not None:
            x = buffer(*shape)
            runs.append(lambda x=x, w=w, c=conv: F.conv2d(x, w, None, c.stride, c.padding))
            continue
        rows = math.prod(shape[:-1])
        x, dy = buffer(rows, shape[-1]), buffer(rows, len(w))
        dx, y = (buffer(*t.shape, result=True) for t in (x, dy))
        if multiply:
            runs.append(lambda x=x, w=w: multiply(x, w))
        else:
            runs.append(lambda x=x, w=w, y=y: torch.mm(x, w.t(), out=y))
        if backward and needs:
            runs.append(lambda dy=dy, w=w, dx=dx: torch.mm(dy, w, out=dx))
        if backward and weight.requires_grad:
            dw = buffer(*w.shape, result=True)
            runs.append(lambda x=x, dy=dy, dw=dw: torch.mm(dy.t(), x, out=dw))

    @torch.no_grad()
    def run():
        for f in runs:
            f()
    return run


def causal(like, config, rows, length, backward):
    """-> a function: stock causal attention of every layer"""
    q = torch.randn(rows, config.num_attention_heads, length, config.head_dim, device=like.device, dtype=like.dtype,
                    requires_grad=backward)
    k, v = (torch.randn(rows, config.num_key_value_heads, length, config.head_dim, device=like.device,
                        dtype=like.dtype, requires_grad=backward) for _ in "kv")
    gradient = torch.randn_like(q)

    def run():
        for _ in range(config.num_hidden_layers):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            if backward:
                torch.autograd.grad(out, (q, k, v), gradient)
    return run


def limit(model, once, rows, length, backward=True):
    """once: runs the model, to see its products -> a function that takes only the time that cannot be avoided"""
    with products_of(model) as seen:
        once()
    like = model.lm_head.weight
    products, attention = alone(like, seen, backward), causal(like, model.config, rows, length, backward)

    def run():
        products()
        attention()
    return run


# ---------------------------------------------------------------- the authors' way of computing the same

def by_masks(model, streams, signal):
    """The loss as the authors' release computes it: in every matrix y[image] = f(x[image]), y[text] = g(x[text]) by
    boolean masks over (B, L, D), and two whole score matrices in float32 of which the query's modality chooses."""
    image = streams.is_image
    x = streams.join(model.embed(streams, signal))
    rope = rope_table(model.config, torch.arange(streams.length, device=x.device), x.dtype)
    upper = torch.full((streams.length, streams.length), torch.finfo(torch.float32).min, device=x.device).triu(1)

    def route(module, name, x):
        of_image = getattr(module, "vision_" + name)(x[image])
        y = of_image.new_empty(*x.shape[:2], of_image.shape[-1])
        y[image] = of_image
        y[~image] = getattr(module, name)(x[~image])
        return y

    def heads(x):
        return x.unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)

    def attend(a, x):
        q, k, v = (route(a, f"{name}_proj", x) for name in "qkv")
        q, views = rotate(heads(q), rope), []
        for on, where in (("vision", image), ("language", ~image)):        # as text, as image queries see them
            k_seen, v_seen = k.clone(), v.clone()
            k_seen[where] = k[where] + getattr(a, f"vision_k_bridge_on_{on}")(x[where])
            v_seen[where] = v[where] + getattr(a, f"vision_v_bridge_on_{on}")(x[where])
            views.append((rotate(heads(k_seen), rope), heads(v_seen)))
        asking = image[:, None, :, None]
        scores = [(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).float() for k, _ in views]
        maps = (torch.where(asking, scores[IMAGE], scores[TEXT]) + upper).softmax(-1).to(q.dtype)
        out = torch.where(asking, maps @ views[IMAGE][1], maps @ views[TEXT][1])
        return route(a, "o_proj", out.transpose(1, 2).flatten(2))
    for block in model.model.layers:
        x = x + attend(block.self_attn, route(block, "input_layernorm", x))
        y = route(block, "post_attention_layernorm", x)
        x = x + route(block.mlp, "down_proj", F.silu(route(block.mlp, "gate_proj", y)) * route(block.mlp, "up_proj", y))
    text, pictures = streams.split(route(model.model, "norm", x), [x, x])
    return model.losses(text, pictures, streams, signal)


# ---------------------------------------------------------------- reading pictures

class Bare(torch.utils.data.Dataset):
    """The least that has to be done: decode, scale, to a tensor"""

    def __init__(self, pictures, resolution):
        self.pictures, self.resolution = pictures, resolution

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        picture = Image.open(io.BytesIO(self.pictures[i])).convert("RGB")
        picture = picture.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
