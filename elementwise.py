"""What a layer does element by element: RMSNorm, RoPE (LLaMA's, half-split), SwiGLU (Eq. 2), each with its way back.

torch would record every step of them for the backward pass. Here only what came in is kept, and what was made of it is
made again: a quarter less memory for the activations of a pretraining pass, at no cost in time.
"""
import torch
import torch.nn.functional as F


def wide(x):
    """float32 or finer"""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- RMSNorm

def normalized(x, weight, eps):
    """-> x / rms(x) * weight in x's type, and 1 / rms(x)"""
    h = wide(x)
    r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * (h * r).to(x.dtype), r


class Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, r = normalized(x, weight, eps)
        ctx.save_for_backward(x, r, weight)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, r, weight = ctx.saved_tensors
        gradient, w, h = wide(gradient), wide(weight), wide(x) * r
        both = gradient * h
        along = (both @ w / x.shape[-1])[..., None]       # the gradient's part along h, which does not change h
        to_x = (gradient * w).addcmul_(h, along, value=-1).mul_(r).to(x.dtype)
        to_weight = both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None


def normalize(x, weight, eps):
    """x (..., D), weight (D,) -> x / rms(x) * weight, the root mean square over D in float32 or finer"""
    if torch.is_grad_enabled():
        return Normalize.apply(x, weight, eps)
    if x.dtype == weight.dtype == wide(x).dtype:          # in 16 bits torch's rounds once, the published model's twice
        return F.rms_norm(x, weight.shape, weight, eps)
    return normalized(x, weight, eps)[0]


# ---------------------------------------------------------------- RoPE

def rope_table(config, positions, dtype):
    """cos and sin of positions (...,) -> two (..., d), float32 or finer; sin with the sign that `turn` takes it with.
    Angles in float32, as the published weights were trained."""
    d = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device).float() / d)
    angle = (positions[..., None].float() * frequency).to(torch.promote_types(dtype, torch.float32))
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turn(x, cos, sin):
    """RoPE in the half-split layout of Hugging Face, x (B, H, L, d): (a, b) -> (a cos - b sin, b cos + a sin)"""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


class Rotate(torch.autograd.Function):
    """Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, -sin), None, None


def rotate(x, rope):
    cos, sin = (t.to(x.dtype) for t in rope)
    return Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else turn(x, cos, sin)


# ---------------------------------------------------------------- SwiGLU

class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def swiglu(gate, up):
    """silu(gate) * up"""
    return SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)
