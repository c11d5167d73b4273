"""The product of a few rows with a matrix: where decoding on a CPU spends its time, reading weights.

Libraries differ: one reads a matrix for a vector at the memory's full speed, another at half of it, and twice as fast
when it is asked for many blocks of the matrix at once. So the ways are timed, once, where they run.
"""
import functools
import math
import statistics
import time

import torch
import torch.nn.functional as F


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
