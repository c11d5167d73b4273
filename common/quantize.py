"""Weights of 8 or 4 bits, through torchao's weight-only configurations (an optional package).

Only the matrices of the layers are quantized, the LLaMA's and the expert's: they are nearly all weights, and a token
reads each of them once. int8: one scale for each row; int4: a scale and a zero for each group of 64 columns (of 32,
where 64 does not divide). Their products are in bfloat16, whatever the type of the rest.
"""
import ctypes
import logging
import re

import torch
import torch.nn.functional as F
from torch import nn

from common.weights import UserError

MATRICES = re.compile(r"((language_model\.)?model\.layers|embedding_model\.encoder)\.\d+\."
                      r"(self_attn|mlp)\.\w+_proj\.weight(_A|_B)?")
FEW_ROWS = 32                                             # on a CPU, faster by torch's kernel than by torchao's


def import_torchao():
    """-> torchao.quantization, and its int4 for CPUs"""
    logging.disable(logging.WARNING)                      # about parts of torchao for other machines
    try:
        from torchao import quantization
        from torchao.prototype.quantization import int4
    except ImportError as error:
        raise UserError(f"quantized weights need the package torchao, 0.18 or newer: pip install torchao ({error})"
                        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return quantization, int4


def group_size(columns):
    return 64 if columns % 64 == 0 else 32


def quantizer(kind, dtype, device):
    """kind: int8 or int4 -> a function (name, tensor) to give to from_pretrained as its dtype: it quantizes matrices
    one by one as they are read, and casts all else to `dtype`. int4 is packed for the kind of device."""
    quantization, int4 = import_torchao()
    trim_memory = getattr(ctypes.CDLL(None), "malloc_trim", int)

    def convert(name, x):
        if ":" in name:
            raise UserError(f"{name.partition(':')[0]} is quantized already: leave out --weights")
        if not MATRICES.fullmatch(name) or x.dim() != 2:  # a copy, so that the file need not stay in memory
            return x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True)
        group, config = group_size(x.shape[1]), quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        if kind == "int4" and (x.shape[0] % 16 or x.shape[1] % 32):
            raise UserError(f"{name} is {tuple(x.shape)}: int4 needs multiples of 16 rows and 32 columns, use int8")
        if kind == "int4" and device.type == "cpu":
            config = int4.PrototypeInt4WeightOnlyConfig(group, set_inductor_config=False)
        elif kind == "int4":
            config = quantization.Int4WeightOnlyConfig(group, False, int4_packing_format="tile_packed_to_4d")
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(x.to(device, torch.bfloat16), requires_grad=False)
        quantization.quantize_(linear, config)
        trim_memory(0)                                    # glibc keeps what was freed, a third of the model
        return linear.weight
    return convert


def quantized_linear(x, weight, bias=None):
    """x W^T + b for a quantized W"""
    is_int8, for_gpu = weight.qdata.dtype == torch.int8, weight.qdata.dim() == 4
    if not is_int8 and for_gpu != x.is_cuda:
        raise UserError(f"int4 weights packed for a {'GPU' if for_gpu else 'CPU'} are of no use on {x.device.type}: "
                        "quantize the original folder there")
    rows = x.reshape(-1, x.shape[-1]).bfloat16()
    if is_int8 and x.is_cpu and 0 < len(rows) <= FEW_ROWS and weight.shape[1] % 16 == 0:      # it reads 16 at a time
        out = torch._weight_int8pack_mm(rows.contiguous(), weight.qdata, weight.scale.flatten().bfloat16())
    else:
        out = F.linear(rows, weight)
    out = out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    return out if bias is None else out + bias


def parts(tensors):
    """{name: tensor}, as for a file -> the same with each quantized one as plain tensors NAME:qdata, NAME:scale, ..."""
    plain = {}
    for name, x in tensors.items():
        names = x.__tensor_flatten__()[0] if hasattr(x, "qdata") else ()
        plain |= {f"{name}:{part}": getattr(x, part) for part in names} or {name: x}
    return plain


def restore(tensors, expected, source):
    """The inverse of `parts`. expected: {name: tensor} with the shapes of the whole ones"""
    quantization, int4 = import_torchao()
    tensors = dict(tensors)
    for name in [name for name in expected if MATRICES.fullmatch(name) and f"{name}:qdata" in tensors]:
        (n, k), names = expected[name].shape, [key for key in tensors if key.startswith(f"{name}:")]
        found = {key.partition(":")[2]: tensors.pop(key) for key in names}
        shapes = {part: tuple(x.shape) for part, x in found.items()}
        group, padded = group_size(k), -(-k // 1024) * 1024                   # the tiles for GPUs are of 1024 columns
        if shapes == {"qdata": (n, k), "scale": (n, 1), "zero_point": (n, 1)}:
            tensors[name] = quantization.Int8Tensor(**found, block_size=[1, k], dtype=torch.bfloat16)
        elif shapes == {"qdata": (n, k // 2), "scale_and_zero": (k // group, n, 2)}:
            tensors[name] = int4.Int4OpaqueTensor(**found, block_size=[1, group], shape=(n, k))
        elif shapes == {"qdata": (n // 8, padded // 128, 32, 4), "scale_and_zero": (padded // group, n, 2)}:
            tensors[name] = quantization.Int4TilePackedTo4dTensor(**found, block_size=[1, group], shape=(n, k))
        else:
            raise UserError(f"{source}: {name} has parts {shapes}, which are none of an int8 or int4 {n} x {k} matrix")
    return tensors
