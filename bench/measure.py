"""Runs the sides of a row in turn, in random order: rates, medians of their ratios, and peak memory."""
import ctypes
import random
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark import timer


def measure(args, name, sides, work, unit="tokens/s", memory=True):
    """sides: {name: function}. Prints their rates, and how many times as fast ours is. work: what a call processes, as
    `unit` counts it, or {side: that}. -> our rate"""
    work = work if isinstance(work, dict) else dict.fromkeys(sides, work)
    rates, gigabytes = {side: [] for side in sides}, dict.fromkeys(sides, 0)
    for side, call in sides.items():
        call()                                            # warm-up
        if memory:
            gigabytes[side] = peak_memory(call, args.device) / 1e9
    for _ in range(args.repeat):
        for side in random.sample(list(sides), len(sides)):
            start = timer()                               # torch's: it waits for the GPU
            sides[side]()
            rates[side].append(work[side] / (timer() - start))
    for side, rate in rates.items():
        ratios = sorted(ours / other for ours, other in zip(rates["ours"], rate))
        args.results.append({"row": name, "side": side, unit: median(rate), "times as fast": ratios,
                             "GB": gigabytes[side]})
        print(f"| {name} | {side} | {median(rate):,.1f} {unit} | {median(ratios):.2f} "
              f"({ratios[0]:.2f}-{ratios[-1]:.2f}) | {gigabytes[side]:.2f} |", flush=True)
    return median(rates["ours"])


def peak_memory(call, device):
    """The most bytes that a call holds beyond those held before it"""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)               # give freed memory back to the system first
    Path("/proc/self/clear_refs").write_text("5")         # resets VmHWM, the peak of resident memory
    before = resident_memory("VmRSS")
    call()
    return max(0, resident_memory("VmHWM") - before)


def resident_memory(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024
