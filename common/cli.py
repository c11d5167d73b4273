"""What all command lines share: the form of --help, types of options, one sentence for a user's mistake."""
import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common.weights import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOY = Path("runs/toy")                                    # where `make demo` works; default paths point there


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it is, and every default"""


def bounded(kind, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """-> a type for argparse: an int or a float with least <= value <= most and above < value < below"""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not (least <= value <= most and above < value < below):
            bounds = {"at least": least, "at most": most, "above": above, "below": below}
            bounds = [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text}: expected {' and '.join(bounds) or 'a finite number'}")
        return value
    return parse


NATURAL, POSITIVE, SEED = bounded(int, 0), bounded(int, 1), bounded(int, 0, 2 ** 62)


def writable_file(text):
    """A type for argparse: a file to be written later, whose folder exists"""
    if not text or Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder, or its own folder is missing")
    return text


def require_path(path):
    if not Path(path).exists():
        raise UserError(f"{path} is not there. `make demo` makes the toy world's files; for other files see --help")
    return path


def check_device(device):
    """'cpu', 'cuda', 'cuda:1', ... -> torch.device"""
    try:
        device, n_gpus = torch.device(device), torch.cuda.device_count()
        if device.type != "cuda":
            torch.zeros(1, device=device)
        elif not torch.cuda.is_available():
            raise RuntimeError("no GPU is visible here")
        elif (device.index or 0) >= n_gpus:
            raise RuntimeError(f"GPUs here: {n_gpus}, counted from 0; each process takes one")
    except (RuntimeError, AssertionError) as error:       # AssertionError: torch was built without this device
        raise UserError(f"--device {device}: cannot be used ({str(error).splitlines()[0]}); use cpu") from None
    return device


def add_device_options(group):
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    group.add_argument("--dtype", choices=list(DTYPES), help="None: bfloat16 on a GPU, else float32")
    group.add_argument("--no-graphs", action="store_true", help="never decode by CUDA graphs: slower, less memory")


def run(main):
    """Call a script's main; a user's mistake ends it with one sentence instead of a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:                               # the reader of `... | head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:                              # a full disk, a file where a folder should be, no permission
        sys.exit(f"error: {error.filename or 'the system says'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():                             # not after an error: it would wait for the other processes
        dist.destroy_process_group()
