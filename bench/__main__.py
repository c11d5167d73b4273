"""Speed and memory: every row is a ratio, measured in one run against something named.

    python -m bench                                  # the CPU's rows (`make bench`), ten minutes on two cores
    python -m bench --rows growth compile long tokenizer    # what takes longer there
    python -m bench --against ../old                 # training step and decoding against another checkout's
    python -m bench --gpu                            # one GPU, bfloat16, up to the full 11.3 B model

The speed of a machine drifts by a fifth within minutes: trust the ratios of a row, not its rates. "Limit" is the
model's matrix products alone and one stock causal attention in every layer.
"""
import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from answering.sampling import capture_cuda_graph
from bench import workload
from bench.baselines import limit, masked_reference, products_alone
from bench.measure import measure
from bench.more_rows import image_tokenizer, pretraining, quantized, transformers
from bench.workload import LENGTH, SIZES, TOKENS, decoding, new_batch, new_model, training_step
from common.cli import Help, bounded, check_device, run, writable_file
from common.weights import UserError
from generate import generate


def train(args, size, layouts=((2, LENGTH, 1),), other="the authors' way"):
    """A pretraining step, LLaMA frozen, against the limit and another way. layouts: (rows, tokens, images)"""
    model = new_model(size, args.device, args.dtype, frozen=True)
    for rows, length, images in layouts:
        _, *batch = new_batch(model, rows, length, images)
        step = training_step(model, partial(model, *batch))
        name = f"training step, {size}, B {rows}, L {length}, images {images}"
        try:
            sides = {"ours": step, "limit": limit(model, step, rows, length)}
            if other == "the authors' way":
                sides[other] = training_step(model, partial(masked_reference, model, *batch))
            if other == "not compiled":
                for block in model.model.layers:
                    block.compile()
                sides[other] = torch.compiler.set_stance("force_eager")(step)
            measure(args, name, sides, rows * length)
        except torch.OutOfMemoryError:
            return print(f"| {name} | does not fit | | | |")


def prefill(args, size):
    model = new_model(size, args.device, args.dtype)
    prompts, streams, signal = new_batch(model, 1, LENGTH)
    hidden = torch.no_grad()(partial(model.hidden, streams, signal))
    measure(args, f"prefill, {size}, L {LENGTH}, images 1", {
        "ours": lambda: next(generate(model, prompts, signal, 1)),
        "limit": limit(model, hidden, 1, LENGTH, backward=False)}, LENGTH)


def decode(args, size):
    """After an image, against decoding after text, larger batches, and the products of one token alone"""
    model, calls = new_model(size, args.device, args.dtype), args.repeat + 1
    text, _, _ = new_batch(model, 1, LENGTH, images=0)
    prompts, _, signal = new_batch(model, 16, LENGTH)
    products = products_alone(model, torch.no_grad()(partial(model.logits, *new_batch(model, 1, 1, images=0)[1:])))
    if args.device == "cuda":                             # as our step: without the time that starting kernels takes
        products = capture_cuda_graph(products, torch.device("cuda"))
    sides = {"ours": decoding(model, prompts[:1], signal[:1], calls),
             "after text": decoding(model, text, None, calls),
             "products alone": lambda: [products() for _ in range(TOKENS)],
             "batch 4": decoding(model, prompts[:4], signal[:4], calls),
             "batch 16": decoding(model, prompts, signal, calls)}
    work = dict.fromkeys(sides, TOKENS) | {"batch 4": 4 * TOKENS, "batch 16": 16 * TOKENS}
    measure(args, f"decoding after an image, {size}", sides, work, memory=False)


def against(args, size):
    """Training step and decoding against another checkout's, in two processes that run in turn"""
    folders = {"ours": Path(workload.__file__).parents[1], args.against: Path(args.against).resolve()}
    command = [sys.executable, "-P", workload.__file__, size, args.device, str(args.dtype)[6:], str(args.repeat + 1)]
    processes = {side: subprocess.Popen(
        command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(torch.get_num_threads())})
        for side, folder in folders.items()}

    def repeat(side, job):
        with suppress(BrokenPipeError):
            print(job, file=processes[side].stdin, flush=True)
        if processes[side].stdout.readline() != "done\n":
            raise UserError(f"--against: the process in {folders[side]} failed, see its error above")
    for job, work in (("training step", LENGTH), ("decoding", TOKENS)):
        measure(args, f"{job}, {size}", {side: partial(repeat, side, job) for side in folders}, work, memory=False)
    for process in processes.values():
        process.kill()


GROWTH = (1, 640, 1), (1, 1280, 1), (1, 2048, 1), (1, 2048, 2), (4, 640, 1), (16, 640, 1)
LONG = "growth", "compile", "long", "tokenizer"          # on a CPU only if they are named
ROWS = {"train": (train, ["small"], []), "layer": (partial(train, layouts=[(1, LENGTH, 1)]), ["layer"], ["layer"]),
        "compile": (partial(train, other="not compiled"), ["small"], ["layer"]),
        "growth": (partial(train, layouts=GROWTH, other=None), ["small"], ["layer"]),
        "long": (partial(train, layouts=[(1, 2048, 3)]), ["small"], ["layer"]),
        "pretraining": (pretraining, [], ["full"]), "text": (partial(transformers, images=0), ["small"], ["layer"]),
        "llava": (partial(transformers, images=1), ["small"], ["layer"]),
        "prefill": (prefill, ["small"], ["full"]), "tokenizer": (image_tokenizer, ["full"], ["full"]),
        "decode": (decode, ["small", "layer"], ["full"]),                 # sizes on a CPU, on a GPU
        "quantized": (quantized, ["layer", "1.1b"], ["layer", "1.1b"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="what to measure; None: what suits the device")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="of the model; None: what suits the row")
    parser.add_argument("--gpu", action="store_true", help="one GPU, bfloat16")
    parser.add_argument("--against", metavar="FOLDER", help="another checkout of this repository")
    parser.add_argument("--repeat", type=bounded(int, 1, 42), default=5, help="turns; medians are reported")
    parser.add_argument("--out", type=writable_file, metavar="FILE", help="JSON of the rows")
    args = parser.parse_args()
    args.device, args.dtype = ("cuda", torch.bfloat16) if args.gpu else ("cpu", torch.float32)
    args.results = []
    check_device(args.device)
    print("| what | side | rate | speed, ours / theirs (spread) | GB |\n|---|---|---|---|---|")
    names = args.rows or [row for row in ROWS if args.gpu or row not in LONG]
    rows = [(against, ["small"], ["layer"])] if args.against else [ROWS[row] for row in names]
    for function, *sizes in rows:
        for size in args.sizes or sizes[args.gpu]:
            function(args, size)
    if args.out:
        Path(args.out).write_text(json.dumps(args.results, indent=2))


if __name__ == "__main__":
    run(main)
