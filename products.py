"""The product of a few rows with a matrix: where decoding spends its time, reading weights.

On a CPU libraries differ: one reads a matrix for a vector at the memory's full speed, another at half of it, and twice
as fast when it is asked for many blocks of the matrix at once. So the ways are timed, once, where they run. And one
large product is faster than several small ones: weights of one input can be laid side by side.
"""
import functools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


def product(x, weight):
    """x (n, in), weight (out, in) -> x W^T (n, out)"""
    if torch.is_grad_enabled() or not x.is_cpu:           # first: a compiled layer must not ask for n
        return F.linear(x, weight)
    n = x.size(0)
    if n > MOST_ROWS or weight.numel() < 2 ** 18:         # a small matrix stays in the CPU's caches
        return F.linear(x, weight)
    return fastest(n, x.dtype)(x, weight)


MOST_ROWS = 16


def in_blocks(weight):
    """(out, in) -> (16, out / 16, in), or fewer blocks where 16 does not divide out"""
    return weight.view(math.gcd(weight.size(0), 16), -1, weight.size(1))


def rows_by_blocks(x, weight):
    """x times every block of W^T, side by side"""
    blocks = in_blocks(weight)
    y = torch.bmm(x.expand(blocks.size(0), -1, -1), blocks.mT)                                # (16, n, out / 16)
    return y.view(1, -1) if x.size(0) == 1 else y.transpose(0, 1).flatten(1)


def columns_by_blocks(x, weight):
    """(W x^T)^T, every block of W times the columns x^T"""
    blocks = in_blocks(weight)
    return torch.bmm(blocks, x.t().expand(blocks.size(0), -1, -1)).view(-1, x.size(0)).t()


class Linear(nn.Linear):
    def __init__(self, size_in, size_out):
        super().__init__(size_in, size_out, bias=False)

    def forward(self, x):
        return product(x, self.weight)


def untouched(module, kind):
    """Nothing was put in its place, and nobody looks into it: what it computes may be computed elsewhere"""
    looked_at = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not looked_at


def one_product(x, *layers):
    """What several Linears make of one input (n, in), side by side (n, sum of out); one product where their weights lie
    so in memory"""
    joint = together([f.weight for f in layers]) if all(untouched(f, Linear) for f in layers) else None
    return torch.cat([f(x) for f in layers], dim=-1) if joint is None else product(x, joint)


def lay(weights):
    """Move weights of one input side by side in memory, where `together` finds them. What does not gain by it stays
    where it is: on a CPU matrices of many megabytes, in a file that is mapped perhaps."""
    if together(weights) is None and (weights[0].is_cuda or sum(w.numel() for w in weights) < 2 ** 23):
        joint = torch.cat([w.data for w in weights])
        for weight, part in zip(weights, joint.split([len(w) for w in weights])):
            weight.data = part
        if joint.is_cuda:
            torch.cuda.empty_cache()                      # the places they left fit no other joint


def together(weights):
    """-> weights (out, in) that lie side by side as one (sum of out, in), without a copy; else None"""
    first, rows, end = weights[0], 0, weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != first.dtype or not weight.is_contiguous():
            return None
        rows, end = rows + weight.size(0), end + weight.nbytes
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():           # neighbours by chance
        return None
    return first.as_strided((rows, first.size(1)), (first.size(1), 1))


@functools.cache
def fastest(n, dtype):
    """Of the three ways on this CPU, with as many threads as torch has now; within a fifth of it the plain one."""
    x, weights = torch.ones(n, 1024, dtype=dtype), torch.ones(8, 1024, 1024, dtype=dtype)

    def seconds(way):
        began = time.perf_counter()
        for weight in weights:
            way(x, weight)
        return time.perf_counter() - began
    ways = F.linear, rows_by_blocks, columns_by_blocks
    times = dict(zip(ways, map(statistics.median, zip(*([seconds(way) for way in ways] for _ in range(7))))))
    best = min(times, key=times.get)
    return best if times[best] < 0.8 * times[F.linear] else F.linear
