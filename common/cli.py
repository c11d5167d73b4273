"""What all command lines share: the form of --help, types of options, one sentence for a user's mistake."""
import argparse
import ctypes
import errno
import math
import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from common.weights import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOY = Path("runs/toy")                                    # where `make demo` works; default paths point there
DEMO_FOLDERS = "captions", "chats", "eval", "clip", "llama", "tokenizer", "pretrain", "sft", "foreign"
PEERS = []                                                # the run's other processes on this machine


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
            bounds = [f"{name} {bound:.10g}" for name, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text}: expected {' and '.join(bounds) or 'a finite number'}")
        return value
    return parse


# The upper bounds keep mistyped numbers from overflows; numpy takes no larger seed.
NATURAL, POSITIVE, SEED = bounded(int, 0, 10 ** 9), bounded(int, 1, 10 ** 9), bounded(int, 0, 2 ** 32 - 1)


def writable_file(text):
    """A type for argparse: a file to be written later, whose folder exists"""
    if not text or Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder, or its own folder is missing")
    return text


def require_path(path):
    if not Path(path).exists():
        is_made = any(Path(path).is_relative_to(TOY / name) for name in DEMO_FOLDERS if not (TOY / name).exists())
        raise UserError(f"{path} is not there: " + (
            "`make demo` makes it" if is_made else "check the name; --help says what is expected"))
    return path


def say(*words, file=None):
    """print; where the output goes to a file, a full disk costs the line and not the run."""
    try:
        print(*words, file=file, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


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


def signal_at_parents_death(number):
    """Linux sends this process a signal when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(1, number)                    # 1: PR_SET_PDEATHSIG


def add_device_options(group):
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    group.add_argument("--dtype", choices=list(DTYPES), help="None: bfloat16 on a GPU, else float32")
    group.add_argument("--weights", choices=("int8", "int4"), help="quantize the layers' matrices (needs torchao)")
    group.add_argument("--save", metavar="FOLDER", help="keep the quantized model, a folder for --model")
    group.add_argument("--no-graphs", action="store_true", help="never decode by CUDA graphs: slower, less memory")


def run(main):
    """Call a script's main. An error ends it with one sentence; --debug, an option of all scripts, adds the traceback.
    Exit codes: 2 the user's mistake or the system's (a full disk), 1 any other, 130 Ctrl-C, 141 nobody reads on."""
    debug, sys.argv = "--debug" in sys.argv, [word for word in sys.argv if word != "--debug"]
    if not debug:
        sys.unraisablehook = lambda _: None               # what Python ignores anyway, but shows with a traceback
    if hasattr(sys.stdout, "reconfigure"):                # names may be no UTF-8; stderr prints them anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        for reader in multiprocessing.active_children():  # one that hangs ignores the SIGTERM of Python's exit
            reader.kill()
        if dist.is_initialized():                         # not after an error: it would wait for the other processes
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError):            # the reader of `... | head` has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sentence, code = explain(error)
        if sentence:
            say(sentence, file=sys.stderr)
        if not (multiprocessing.active_children() or dist.is_initialized()):
            sys.exit(code)
        sys.stdout.flush()                                # Python's own exit would wait for those that may hang
        for process in PEERS:
            with suppress(OSError):                       # it is gone already
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getppid()):
                    os.kill(process, signal.SIGKILL)
        os._exit(code)


def explain(error):
    """-> one sentence, the exit code"""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "", 141
    if isinstance(error, (ConnectionError, EOFError)):
        return f"error: a data reader, or another process of the run, has died ({type(error).__name__})", 1
    if isinstance(error, OSError):                        # a full disk, a file where a folder should be, no permission
        return f"error: {error.filename or 'the system says'}: {error.strerror or error}", 2
    lines, whose = str(error).strip().splitlines() or ["no reason given"], "our own fault"
    if lines[0].endswith(":"):                            # torch.compile's reasons stand in the second line
        lines[0] = " ".join(lines[:2])[:300]
    reason = lines[-1] if "Traceback" in str(error) else f"{type(error).__name__}: {lines[0]}"
    if isinstance(error, (RuntimeError, MemoryError)) or "os error" in reason:
        whose = "the machine's, another process's or our own fault"
    return f"error: {reason} ({whose}; --debug shows where)", 1
