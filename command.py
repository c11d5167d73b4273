"""What all command lines share: the form of --help, numbers within bounds, one sentence for a user's mistake.

    engine.py, evaluate.py, ... : parser.add_argument("--batch", type=bounded(int, 1), ...); run(main)
"""
import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from weights import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOY = Path("runs/toy")         # where `make demo` works; the scripts' paths point there when none are given


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it is, and every default"""


def bounded(kind, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """-> a type for argparse: an int or a float, least <= it <= most, above < it < below"""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not (least <= value <= most and above < value < below):
            bounds = [f"{word} {bound:g}" for word, bound in (("at least", least), ("at most", most), ("above", above),
                                                              ("below", below)) if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text}: expected {' and '.join(bounds) or 'a finite number'}")
        return value
    return parse


NATURAL, POSITIVE, SEED = bounded(int, 0), bounded(int, 1), bounded(int, 0, 2 ** 62)


def target(text):
    """A type for argparse: a file to be written, whose folder must be there before the work begins"""
    if not text or Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder, or its own folder is missing")
    return text


def need(path):
    if not Path(path).exists():
        raise UserError(f"{path} is not there. `make demo` makes the toy world's files (python toy.py alone its first "
                        "stage); for other files see --help")
    return path


def usable(device):
    """'cpu', 'cuda', 'cuda:1', ... -> torch.device"""
    try:
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU is visible here")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"GPUs here: {torch.cuda.device_count()}, counted from 0; each process takes one")
        if device.type != "cuda":
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: cannot be used ({str(error).splitlines()[0]}); --device cpu always "
                        "can") from None
    return device


def run(main):
    """Call a script's main; a user's mistake ends it with its sentence, not with a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:                               # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:                              # a full disk, a file where a folder should be, no right to it
        sys.exit(f"error: {error.filename or 'the system says'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():                             # not after an error: it would wait for those who still work
        dist.destroy_process_group()
