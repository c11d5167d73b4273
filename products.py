"""The product of a few rows with a matrix: where decoding on a CPU spends its time, reading weights.

Libraries differ: one reads a matrix for a vector at full speed, another three times as fast when it is asked for two
columns at once. So both are timed, once, where they run.
"""
import functools
import statistics
import time

import torch
import torch.nn.functional as F


def product(x, weight):
    """x (n, in), weight (out, in) -> x W^T (n, out)"""
    n = len(x)
    if n > 4 or x.device.type != "cpu" or torch.is_grad_enabled() or not by_columns_is_faster(n, x.dtype):
        return F.linear(x, weight)
    return by_columns(x, weight)


def by_columns(x, weight):
    """(W x^T)^T of at least two columns"""
    n = len(x)
    return (weight @ (x if n > 1 else torch.cat((x, x))).t()).t()[:n]


@functools.cache
def by_columns_is_faster(n, dtype):
    """On this CPU, with as many threads as torch has now; within a fifth of each other the plain way is taken."""
    x, weights = torch.ones(n, 1024, dtype=dtype), torch.ones(8, 1024, 1024, dtype=dtype)

    def seconds(way):
        began = time.perf_counter()
        for weight in weights:
            way(x, weight)
        return time.perf_counter() - began
    return statistics.median(seconds(by_columns) / seconds(F.linear) for _ in range(7)) < 0.8
