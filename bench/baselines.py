"""What is measured against, with the weights and shapes of the model that is measured."""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llama import apply_rope, rope_tables
from streams import IMAGE, TEXT

aten = torch.ops.aten


def products_alone(model, call):
    """call: runs the model -> a function that runs only the matrix products and convolutions in it, also those of the
    backward pass, with the model's own weights, on buffers that exist already"""
    weights, buffers, products = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    # Results are not written into inputs: products of products would shrink to subnormal numbers, which are slow
    def buffer(role, like):
        key = role, like.shape, like.stride()
        if key not in buffers:
            buffers[key] = torch.randn_like(like)
        return buffers[key]

    def is_weight(x):
        return x.untyped_storage().data_ptr() in weights

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **kwargs or {})
            in_blocks = op == aten.bmm.default and any(map(is_weight, args))      # llama.linear, for one row
            if in_blocks or op in (aten.mm.default, aten.addmm.default, aten.convolution.default):
                inputs = [buffer("input", x) if isinstance(x, torch.Tensor) and not is_weight(x) else x for x in args]
                out = {} if op == aten.convolution.default else {"out": buffer("result", result)}
                products.append(partial(op.overloadpacket, *inputs, **out))
            return result
    with Recorder():
        call()
    return torch.no_grad()(lambda: [product() for product in products])


def limit(model, call, rows, length, backward=True):
    """call: runs the model. -> a function: its products alone, and stock causal attention in every layer"""
    c, like, products = model.config, model.lm_head.weight, products_alone(model, call)
    q, k, v = (torch.randn(rows, c.num_attention_heads, length, c.head_dim, device=like.device, dtype=like.dtype,
                           requires_grad=backward) for _ in "qkv")
    gradient = torch.randn_like(q)

    def run():
        products()
        for _ in range(c.num_hidden_layers):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if backward:
                torch.autograd.grad(out, (q, k, v), gradient)
    return run


def masked_reference(model, streams, signal):
    """The loss sums as the authors' release computes them: in every matrix y[image] = f(x[image]), y[text] = g(x[text])
    by boolean masks over (B, L, D), and two whole score matrices, of which each query's modality takes its row."""
    is_image, d = streams.is_image, model.config.head_dim
    x = streams.merge(*model.embed(streams, signal))      # (B, L, D)
    positions = torch.arange(x.shape[1], device=x.device)
    rope = rope_tables(model.config, positions, x.dtype)

    def masked(module, name, x):
        image = getattr(module, "vision_" + name)(x[is_image])
        y = image.new_empty(*x.shape[:2], image.shape[-1])
        y[is_image], y[~is_image] = image, getattr(module, name)(x[~is_image])
        return y

    def heads(x):
        return x.unflatten(-1, (-1, d)).transpose(1, 2)   # (B, H, L, d)

    def attention(module, x):
        q, k, v = (masked(module, f"{name}_proj", x) for name in "qkv")
        q, scores, values = apply_rope(heads(q), rope), [], []
        for other, bridge in ((is_image, "vision"), (~is_image, "language")):    # as text, as image queries see them
            k_seen, v_seen = k.clone(), v.clone()
            k_seen[other] += getattr(module, f"vision_k_bridge_on_{bridge}")(x[other])        # Eq. 3
            v_seen[other] += getattr(module, f"vision_v_bridge_on_{bridge}")(x[other])
            scores.append((q @ apply_rope(heads(k_seen), rope).mT / math.sqrt(d)).float())
            values.append(heads(v_seen))
        image_query = is_image[:, None, :, None]
        scores = torch.where(image_query, scores[IMAGE], scores[TEXT])
        maps = scores.masked_fill(positions > positions[:, None], -torch.inf).softmax(-1).to(q.dtype)
        out = torch.where(image_query, maps @ values[IMAGE], maps @ values[TEXT])
        return masked(module, "o_proj", out.transpose(1, 2).flatten(2))
    for block in model.model.layers:
        x = x + attention(block.self_attn, masked(block, "input_layernorm", x))
        y, mlp = masked(block, "post_attention_layernorm", x), block.mlp
        x = x + masked(mlp, "down_proj", F.silu(masked(mlp, "gate_proj", y)) * masked(mlp, "up_proj", y))
    return model.loss_sums(*streams.split(masked(model.model, "norm", x)), streams, signal)
