"""What every trainer needs and no paper mentions: processes and devices, optimizer and schedule, checkpoints, the log.

A run folder holds `checkpoint-XXXXXX/` (trained weights, optimizer, step, place in the data, random states: complete or
absent, never half), `log.jsonl`, `samples/` and, at the end, the model folder.
"""
import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from weights import UserError, read_json, some, write_json

warnings.filterwarnings("ignore", message="torch.distributed is disabled")               # one process needs none

TOY = Path("runs/toy")         # where `make demo` works; the scripts' paths point there when none are given
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------- options and processes

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it is, and every default"""


def add_options(parser, steps, warmup, batch, lr, betas=(0.9, 0.99), weight_decay=0.01):
    """The options that all trainers share; the numbers are the stage's recipe."""
    g = parser.add_argument_group("the run")
    g.add_argument("--out", metavar="DIR", help="run folder: checkpoints, log, samples, at the end the model")
    g.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in --out")
    g.add_argument("--steps", type=int, default=steps, help="updates")
    g.add_argument("--save-every", type=int, default=1000, metavar="N", help="steps between checkpoints")
    g.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that are kept")
    g.add_argument("--seed", type=int, default=0, help="of new weights, the order of the data and all else")
    g = parser.add_argument_group("optimization")
    g.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    g.add_argument("--warmup", type=int, default=warmup, help="steps of linear warm-up from 0, then cosine to 0")
    g.add_argument("--betas", type=float, nargs=2, default=betas, help="AdamW")
    g.add_argument("--weight-decay", type=float, default=weight_decay, help="AdamW, not on norms and biases")
    g.add_argument("--clip-norm", type=float, default=1.0, help="largest norm of the gradient")
    g.add_argument("--batch", type=int, default=batch, help="samples of an update, over all processes")
    g.add_argument("--micro-batch", type=int, default=0, metavar="N",
                   help="samples of one pass of one process; passes add up to --batch; 0: --batch / processes")
    g = parser.add_argument_group("the machine")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--dtype", choices=list(DTYPES), help="of the products; None: bfloat16 on a GPU, else float32")
    g.add_argument("--workers", type=int, default=0, help="processes that read data, for each training process")
    return parser


def need(path):
    if not Path(path).exists():
        raise UserError(f"{path} is not there. `make demo` makes the toy world's files (python toy.py alone its first "
                        "stage); for other files see --help")
    return path


def save_recipe(args, world):
    """Print the resolved options and keep them beside the weights. -> the run folder"""
    out = Path(args.out)
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(out / "recipe.json", values)
        print(" ".join(f"{key}={value}" for key, value in values.items()), flush=True)
    barrier(world)
    return out


@dataclass
class World:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def first(self):
        return self.rank == 0

    def say(self, *words):
        if self.first:
            print(*words, flush=True)

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def start(args):
    """Join the other processes (torchrun sets RANK and WORLD_SIZE), seed, and fill in what the options left open."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is visible here; --device cpu runs without one")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.batch % size:
        raise UserError(f"--batch {args.batch} does not divide into {size} processes")
    args.micro_batch = args.micro_batch or args.batch // size
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return World(rank, size, device, DTYPES[args.dtype])


def wrap(model, world):
    """Replicas that average their gradients, where there is more than one process"""
    return DistributedDataParallel(model) if world.size > 1 else model


def total(value, world):
    """The sum of a tensor over all processes"""
    if world.size > 1:
        dist.all_reduce(value)
    return value


# ---------------------------------------------------------------- optimizer and schedule

def adamw(parameters, args):
    """AdamW with weight decay on matrices only (norms and biases are vectors)."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=1e-8, fused=True)


def learning_rate(step, args):
    """Step 0 is the first update: linear from 0 to --lr over --warmup steps, then cosine to 0 (Tab. 4)"""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


# ---------------------------------------------------------------- checkpoints

class Checkpoints:
    """`checkpoint-XXXXXX` after that many steps. Written under another name and renamed when it is whole, so that what
    has the name is complete; the newest that opens is resumed from."""

    OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)

    def __init__(self, out, keep, world):
        self.out, self.keep, self.world = Path(out), keep, world

    def newest(self):
        """-> path of the newest complete checkpoint, or None"""
        found = [path for path in sorted(self.out.glob("checkpoint-*"), reverse=True) if (path / "done.json").is_file()]
        return found[0] if found else None

    def save(self, step, models, optimizers, data):
        final, draft = self.out / f"checkpoint-{step:06d}", self.out / f"checkpoint-{step:06d}.tmp"
        if self.world.first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier(self.world)
        dcp.save(self._state(models, optimizers), checkpoint_id=draft)
        torch.save(random_state(), draft / f"random-{self.world.rank}.pt")
        barrier(self.world)
        if self.world.first:
            write_json(draft / "done.json", {"step": step, "data": data, "processes": self.world.size})
            for path in draft.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(draft, final)
            for old in sorted(self.out.glob("checkpoint-*[0-9]"))[:-self.keep]:
                shutil.rmtree(old)
        barrier(self.world)

    def resume(self, wanted, models, optimizers):
        """-> step, place in the data: of the newest complete checkpoint if `wanted` and there is one, else 0, None"""
        newest = self.newest() if wanted else None
        if newest is None:
            return 0, None
        self.world.say(f"going on from {newest}")
        return self.load(newest, models, optimizers)

    def load(self, path, models, optimizers):
        """-> step, place in the data"""
        done = read_json(path / "done.json")
        state = self._state(models, optimizers)
        dcp.load(state, checkpoint_id=path)
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            answer = set_state_dict(model, optimizer, model_state_dict=state[f"model{i}"],
                                    optim_state_dict=state[f"optimizer{i}"], options=self.OPTIONS)
            lost = {name for name, p in model.named_parameters() if p.requires_grad} & set(answer.missing_keys)
            if lost or answer.unexpected_keys:            # frozen weights are not in it, all others must be
                raise UserError(f"{path} is of another model: missing {some(lost)}, unknown "
                                f"{some(answer.unexpected_keys)}")
        mine = path / f"random-{self.world.rank}.pt"
        if done["processes"] == self.world.size and mine.is_file():
            set_random_state(torch.load(mine, weights_only=False))
        else:
            self.world.say(f"{path} was written by {done['processes']} processes, these are {self.world.size}: random "
                           "states are new, weights, optimizer and place in the data go on")
        return done["step"], done["data"]

    def _state(self, models, optimizers):
        state = {}
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            state[f"model{i}"], state[f"optimizer{i}"] = get_state_dict(model, optimizer, options=self.OPTIONS)
        return state


def barrier(world):
    if world.size > 1:
        dist.barrier()


def random_state():
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------- the end, wanted or not; the log

class Stop:
    """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; all processes agree on it."""

    def __init__(self, world):
        self.world, self.asked = world, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked:
            sys.exit(130)                                 # asked twice: at once
        self.asked = True

    def __call__(self):
        asked = torch.tensor(float(self.asked), device=self.world.device)
        return bool(total(asked, self.world) > 0)


class Log:
    """One line a step on the screen, the same as JSON in log.jsonl"""

    def __init__(self, out, steps, world):
        self.world, self.steps, self.began, self.first_step = world, steps, time.time(), None
        self.path = Path(out) / "log.jsonl"

    def __call__(self, step, numbers, every=10):
        if not self.world.first:
            return
        self.first_step = step if self.first_step is None else self.first_step
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if step % every == 0 or step == self.steps:
            done = max(1, step - self.first_step)
            left = (time.time() - self.began) / done * (self.steps - step)
            words = " ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
            print(f"step {step}/{self.steps} {words} | {clock(left)} left", flush=True)


def clock(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def run(main):
    """Call a script's main; a user's mistake ends it with its sentence, not with a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
