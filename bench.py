"""Speed and memory, each as a ratio measured in one run against something named.

    python bench.py --rows data           # reading pictures: our loader against DataLoader + PIL alone

The machine is never idle enough for absolute numbers: every row times both sides in turn and gives the median ratio.
"""
import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import engine
from config import LibraConfig
from data import Recipe, loader, open_source
from text import Text


def turns(sides, repeat):
    """{name: function -> seconds} timed in turn -> {name: median seconds}, spread of the ratios first / second"""
    times = {name: [] for name in sides}
    for f in sides.values():
        f()                                               # warm up
    for _ in range(repeat):
        for name, f in sides.items():
            times[name].append(f())
    one, two = times.values()
    ratios = sorted(a / b for a, b in zip(one, two))
    return {name: statistics.median(t) for name, t in times.items()}, ratios


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


def data_rows(llm, repeat, count=128, resolution=336):
    """Pictures of 500 x 400 pixels from a tar shard to training batches, for one worker and none"""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (50, 63, 3), dtype=np.uint8)) for _ in range(count)]
    pictures = []
    for picture in coarse:
        file = io.BytesIO()
        picture.resize((500, 400), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    text = Text(Path(llm) / "tokenizer.model")
    config = LibraConfig(vocab_size=text.vocab_size, newline_token_id=text.newline)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/00000.tar", "w") as tar:
            for i, content in enumerate(pictures):
                for ending, part in (("jpg", content), ("txt", b"a large red circle in the top left")):
                    member = tarfile.TarInfo(f"{i:09d}.{ending}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
        source, recipe = open_source(f"{folder}/00000.tar"), Recipe(text, config, resolution, 700)
        for workers in (0, 1):
            ours, _ = loader([source], recipe, 16, 16, 0, workers=workers)
            bare = torch.utils.data.DataLoader(Bare(pictures, resolution), 16, num_workers=workers,
                                               persistent_workers=workers > 0)
            endless = iter(ours)

            def read(endless=endless):
                began = time.perf_counter()
                for _ in range(count // 16):
                    next(endless)
                return time.perf_counter() - began

            def alone(bare=bare):
                began = time.perf_counter()
                for _ in bare:
                    pass
                return time.perf_counter() - began
            seconds, ratios = turns({"DataLoader + PIL": alone, "ours": read}, repeat)
            rows.append({"row": f"images/s, {workers} workers", **{k: count / s for k, s in seconds.items()},
                         "share": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=engine.Help)
    parser.add_argument("--rows", choices=("data",), default="data", help="what to measure")
    parser.add_argument("--llm", metavar="DIR", default=engine.TOY / "llama", help="folder with tokenizer.model")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs; medians are reported")
    parser.add_argument("--out", metavar="FILE", help="JSON of the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)                              # as in a worker
    rows = data_rows(engine.need(args.llm), args.repeat)
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    engine.run(main)
