"""How bench.py measures: things that run in turn, several times, and the medians of their ratios; their peak memory."""
import gc
import statistics
import time
from pathlib import Path

import torch

from weights import UserError


class Bench:
    """Where and how often to measure; collects the rows."""

    def __init__(self, device="cpu", dtype=torch.float32, repeat=5):
        self.device, self.dtype, self.repeat, self.rows = torch.device(device), dtype, repeat, []

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, f):
        self.wait()
        began = time.perf_counter()
        result = f()
        self.wait()
        return result if isinstance(result, float) else time.perf_counter() - began

    def row(self, name, size, sides, work=None, unit="s", memory=True, repeat=0, **more):
        """sides: {name: function}, ours first; each is timed in turn, `repeat` times, after one warm-up. A function may
        return the seconds itself. work: what one call does, in `unit`. Prints and keeps one row for each other side."""
        peaks = {side: self.peak(f) for side, f in sides.items()} if memory else {}
        if not memory:
            for f in sides.values():
                f()
        times = {side: [] for side in sides}
        for _ in range(repeat or self.repeat):
            for side, f in sides.items():
                times[side].append(self.seconds(f))
        ours, *others = sides
        for other in others or [None]:
            row = {"row": name, "size": size, "seconds": statistics.median(times[ours]), **more}
            if work:
                row |= {unit: work / row["seconds"]}
            if other:
                ratios = sorted(b / a for a, b in zip(times[ours], times[other]))
                row |= {"against": other, "its seconds": statistics.median(times[other]),
                        "times as fast": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}
            if memory:
                row |= {"GB": peaks[ours] / 1e9} | ({"its GB": peaks[other] / 1e9} if other else {})
            self.rows.append(row)
            print(line(row), flush=True)
        return statistics.median(times[ours])

    def peak(self, f):
        """Bytes that a call takes above what is there before it, at the most; also its warm-up"""
        gc.collect()
        if self.device.type == "cuda":
            f()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            self.wait()
            return torch.cuda.max_memory_allocated() - before
        for _ in range(2):                                # the first call sets libraries up: little beside long work
            before = resident("VmRSS", forget=True)
            seconds = self.seconds(f)
            if seconds > 2:
                break
        return max(0, resident("VmHWM") - before)


def resident(field, forget=False):
    """Bytes of this process in memory now (VmRSS) or at the most (VmHWM) since the last `forget`"""
    if forget:
        try:
            import ctypes
            ctypes.CDLL("libc.so.6").malloc_trim(0)       # what was freed goes back to the system first
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            raise UserError("peak memory on a CPU is read from Linux's /proc, which this machine lacks: leave it out "
                            "with --no-memory") from None
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024


def line(row):
    """| a row | of the table |"""
    def number(key, form):
        return format(row[key], form) if key in row else ""
    rate = next((f"{row[unit]:,.1f} {unit}" for unit in row if unit.endswith("/s")), "")
    spread = f" ({row['spread'][0]:.2f}-{row['spread'][1]:.2f})" if "spread" in row else ""
    memory = " / ".join(f"{row[key]:.2f}" for key in ("GB", "its GB") if key in row)
    cells = (row["row"], row["size"], number("seconds", ".4g"), rate, row.get("against", ""),
             number("its seconds", ".4g"), number("times as fast", ".2f") + spread, memory)
    return "| " + " | ".join(cells) + " |"


HEAD = ("| what | size | seconds | rate | against | its seconds | times as fast (spread) | GB more at the peak |\n"
        "|---|---|---|---|---|---|---|---|")
