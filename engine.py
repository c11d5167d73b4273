"""What every trainer needs and no paper mentions: processes and devices, engines, optimizer and schedule, the log.

A run folder holds `checkpoint-XXXXXX/` (checkpoints.py), `log.jsonl`, `bad_samples.jsonl`, `samples/` and, at the end,
the model folder. Three engines share the work of several processes: replicas (ddp), replicas that share gradients and
AdamW's state (zero), everything in shares (fsdp). All come from torch; the training loops do not know which one runs.
"""
import json
import math
import os
import random
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from checkpoints import barrier
from command import DTYPES, NATURAL, POSITIVE, SEED, bounded, usable
from weights import UserError, write_json

warnings.filterwarnings("ignore", message="torch.distributed is disabled")               # one process needs none

ENGINES = ("ddp", "zero", "fsdp")
# TFLOP/s of dense bfloat16 products, by what the device's name contains
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "4090": 165,
         "3090": 71, "A10G": 70, "L4": 121}


# ---------------------------------------------------------------- options and processes

def add_options(parser, steps, warmup, batch, lr, betas=(0.9, 0.99), weight_decay=0.01, engines=True, text_tokens=0):
    """The options that all trainers share; the numbers are the stage's recipe."""
    g = parser.add_argument_group("the run")
    g.add_argument("--out", metavar="DIR", help="run folder: checkpoints, log, samples, at the end the model")
    g.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in --out")
    g.add_argument("--export", action="store_true", help="with --resume: write the model folder now and end")
    g.add_argument("--steps", type=POSITIVE, default=steps, help="updates")
    g.add_argument("--save-every", type=NATURAL, default=1000, metavar="N", help="steps between checkpoints; 0: none")
    g.add_argument("--sample-every", type=NATURAL, default=1000, metavar="N",
                   help="steps between pictures in samples/; 0: one at the end")
    g.add_argument("--keep", type=POSITIVE, default=2, metavar="N", help="newest checkpoints that are kept")
    g.add_argument("--seed", type=SEED, default=0, help="of new weights, the order of the data and all else")
    g = parser.add_argument_group("optimization")
    g.add_argument("--lr", type=bounded(float, 0), default=lr, help="peak learning rate")
    g.add_argument("--warmup", type=NATURAL, default=warmup, help="steps of linear warm-up from 0, then cosine to 0")
    g.add_argument("--betas", type=bounded(float, 0, below=1), nargs=2, default=betas, help="AdamW")
    g.add_argument("--weight-decay", type=bounded(float, 0), default=weight_decay,
                   help="AdamW, not on norms and biases")
    g.add_argument("--clip-norm", type=bounded(float, above=0), default=1.0, help="largest norm of the gradient")
    g.add_argument("--batch", type=POSITIVE, default=batch, help="samples of an update, over all processes")
    g.add_argument("--micro-batch", type=NATURAL, default=0, metavar="N",
                   help="samples of one pass of one process; passes add up to --batch; 0: --batch / processes")
    g = parser.add_argument_group("the machine")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--dtype", choices=list(DTYPES), help="of the products; None: bfloat16 on a GPU, else float32")
    g.add_argument("--workers", type=NATURAL, default=0, help="processes that read data, for each training process")
    g.add_argument("--max-bad", type=bounded(float, 0, 1), default=0.05, metavar="SHARE",
                   help="of samples that cannot be used, beyond which the run ends; 20 are let pass, unless all of a "
                        "run's are such; 1: never")
    g.add_argument("--timeout", type=bounded(float, above=0), default=10, metavar="MINUTES",
                   help="how long the processes wait for one that does not answer before the run ends")
    g.add_argument("--deterministic", action="store_true",
                   help="the GPU's deterministic kernels, slower: without them a resumed run differs in rounding")
    g.add_argument("--tensorboard", action="store_true", help="log there too, where that package is installed")
    if engines:
        g.add_argument("--engine", choices=("auto", *ENGINES), default="auto",
                       help="replicas; replicas that share gradients and AdamW's state; all in shares; auto: the first "
                            "that fits the device's memory; on one process the first, with --offload the second")
        g.add_argument("--checkpoint-activations", action="store_true",
                       help="keep only what goes into a layer, compute the rest again: less memory, a third more time")
        g.add_argument("--offload", action="store_true",
                       help="zero and fsdp: float32 weights, gradients and AdamW in the CPU's memory; slower, but "
                            "several times as much fits")
        g.add_argument("--compile", action="store_true", help="compile the layers with torch.compile; if a kill "
                       "while it compiled left 'file too short', remove torch's cache, /tmp/torchinductor_USER")
        g.add_argument("--peak", type=bounded(float, above=0), metavar="TFLOP/S",
                       help="of the device, to log the share reached; None: "
                       "by the GPU's name")
    g = parser.add_argument_group("the plan")
    g.add_argument("--plan", action="store_true", help="print parameters, memory, FLOPs and hours, and end; of "
                   "the paper's sizes where no folders are named")
    g.add_argument("--nproc", type=POSITIVE, default=8, help="GPUs")
    g.add_argument("--memory", type=bounded(float, above=0), default=80, metavar="GB", help="of a GPU")
    g.add_argument("--tflops", type=bounded(float, above=0), default=150,
                   help="TFLOP/s that a GPU reaches, given or measured")
    if engines:
        g.add_argument("--text-tokens", type=NATURAL, default=text_tokens, help="text of a sample, mean")
    else:
        parser.set_defaults(engine="ddp", offload=False, checkpoint_activations=False)
    return parser


def refuse(args):
    """--out is not to be a file, nor one of the folders that are read, nor a finished model that no --resume can go on
    with."""
    out = Path(args.out).resolve()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {args.out}: {there} is a file; expected a folder, there or to be made")
    for name in ("llm", "image_tokenizer", "model", "clip_folder"):
        if getattr(args, name, None) and Path(getattr(args, name)).resolve() == out:
            raise UserError(f"--out {args.out} is the folder that --{name.removesuffix('_folder').replace('_', '-')} "
                            "reads: it would be overwritten. Name another")
    known = [name for name in ("config.json", "model.safetensors") if (out / name).exists()]
    if known and not (args.resume and any(out.glob("checkpoint-*"))):
        raise UserError(f"--out {args.out} holds {' and '.join(known)}: a model that this run would overwrite. Name "
                        "another folder, remove it, or give --resume where there are checkpoints to go on from")


def begin(args, world, start):
    """Nothing can be refused any more but a run that is past its end: print the resolved options and keep them beside
    the weights. start: the step the run goes on from"""
    if start > args.steps and not args.export:
        raise UserError(f"--steps {args.steps}, but this run has made {start} already; --export writes its model")
    if world.first:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(Path(args.out) / "recipe.json", values)
        print(" ".join(f"{key}={value}" for key, value in values.items()), flush=True)
    barrier(world)


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


def join(device, timeout=10, group=False):
    """Join the other processes: torchrun sets RANK and WORLD_SIZE. timeout in minutes; group: also if there are none"""
    rank, size, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), usable(device)
    if device.type == "cuda":
        device = usable(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")
        torch.cuda.set_device(device)
    if (size > 1 or group) and not dist.is_initialized():
        store = None if size > 1 else dist.HashStore()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=size, timeout=timedelta(minutes=timeout))
    return World(rank, size, device, torch.float32)


def start(args):
    """Join the other processes, seed, and fill in what the options left open."""
    if args.engine == "auto" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        args.engine = "zero" if args.offload else "ddp"
    if args.engine == "ddp" and args.offload:
        raise UserError("--offload: replicas (ddp) live on the device whole; give --engine zero or fsdp")
    refuse(args)
    world = join(args.device, args.timeout, args.engine in ("zero", "fsdp"))
    device, size = world.device, world.size
    if args.batch % size:
        raise UserError(f"--batch {args.batch} does not divide into {size} processes")
    args.micro_batch = args.micro_batch or args.batch // size
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)          # with warn_only attention stays as it is
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return replace(world, dtype=DTYPES[args.dtype])


def distribute(model, blocks, args, world):
    """Put a model on the device and among the processes. Weights that learn are float32, frozen ones of the products'
    type. blocks: the layers, which zero and fsdp gather one at a time. -> what to call in training"""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64         # a few: ways to cut rows, with and without gradients
        for block in blocks:
            block.compile()                               # sizes that change from batch to batch are left open
    if args.engine == "ddp":
        settle(model, world)
        return replicate(model, world)
    mesh = init_device_mesh(world.device.type, (world.size,))
    mixed = MixedPrecisionPolicy(*() if world.dtype == torch.float32 else (world.dtype, torch.float32))
    frozen = {p for p in model.parameters() if not p.requires_grad} if args.engine == "zero" else set()
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if args.offload else OffloadPolicy()
    for part in [*blocks, model]:
        settle(part, world, frozen if args.offload else None)
        fully_shard(part, mesh=mesh, mp_policy=mixed, reshard_after_forward=args.engine == "fsdp",
                    ignored_params=frozen, offload_policy=offload)
    model.travel_once = args.offload and args.engine == "zero"
    return model


def settle(module, world, stay=None):
    """stay: with --offload the weights that live on the device all the same"""
    for p in module.parameters():
        if not isinstance(p.data, torch.distributed.tensor.DTensor):
            where = world.device if stay is None or p in stay else "cpu"
            p.data = p.data.to(where, torch.float32 if p.requires_grad else world.dtype)


def replicate(model, world):
    """Replicas that average their gradients, where there is more than one process"""
    # the only buffers are running statistics, which training does not read: passing them on would break the
    # discriminator, whose two passes share one backward
    if world.size == 1:
        return model
    with warnings.catch_warnings():                       # newer versions of torch have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def gradients_travel(model, now):
    """Whether the next backward pass of replicas adds up the gradients of all processes: only the last pass of an
    update must. zero and fsdp do it every time, or each process would hold all gradients whole; but with --offload zero
    brings weights to the device and gradients back once an update, for that road is long."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif getattr(model, "travel_once", False):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)


def whole_weights(model):
    """The model's tensors, gathered from all processes, on the first one's CPU; the others get nothing"""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def clip(parameters, most):
    """Scale the gradient down to norm `most`. -> its norm before"""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def all_names(batches, world):
    """Names of the samples of all processes' batches"""
    names = [name for batch in batches for name in batch.names]
    if world.size > 1:
        lists = [None] * world.size
        dist.all_gather_object(lists, names)
        names = sum(lists, [])
    return ", ".join(names)


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


def due(step, every):
    """Whether it is time for what is done every so many steps; 0: never"""
    return every > 0 and (step + 1) % every == 0


def learning_rate(step, args):
    """Step 0 is the first update: linear from 0 to --lr over --warmup steps, then cosine to 0 (Tab. 4)"""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


# ---------------------------------------------------------------- the log

class Log:
    """One line a step, on the screen and as JSON in log.jsonl"""

    def __init__(self, out, args, world):
        self.world, self.steps, self.began, self.first_step, self.board = world, args.steps, time.time(), None, None
        self.path = Path(out) / "log.jsonl"
        if args.tensorboard and world.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: that package is not here; pip install tensorboard") from None
            self.board = SummaryWriter(out)

    def __call__(self, step, numbers):
        if not self.world.first:
            return
        self.first_step = step if self.first_step is None else self.first_step
        left = clock((time.time() - self.began) / max(1, step - self.first_step) * (self.steps - step))
        append(self.path, json.dumps({"step": step, **numbers, "left": left}) + "\n")
        for name, value in numbers.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)
        words = " ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, (int, float)))
        words += "".join(f", {cause} {n}" for cause, n in numbers.get("causes", {}).items())
        print(f"step {step}/{self.steps} {words} | {left} left", flush=True)


def memory(world):
    """GB of the device, the most so far; of a CPU's process, now"""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        return None


def peak(args, world):
    """FLOP/s that the device could reach, given or by its name; None where unknown"""
    if args.peak or world.device.type != "cuda":
        return args.peak and args.peak * 1e12
    name = torch.cuda.get_device_name(world.device)
    return next((tera * 1e12 for key, tera in PEAKS.items() if key in name), None)


def append(path, lines):
    """A full disk must not end a run."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        print(f"WARNING: {path} could not be written ({error})", file=sys.stderr, flush=True)


class BadSamples:
    """Counts by cause, the names in bad_samples.jsonl; too many end the run"""

    def __init__(self, out, most, world):
        self.path, self.most, self.world, self.seen, self.bad = Path(out) / "bad_samples.jsonl", most, world, 0, 0
        self.causes, self.last = Counter(), []

    def __call__(self, step, batches, samples, bad):
        """batches: this process's; samples, bad: the counts over all processes"""
        listed = [entry for batch in batches for entry in batch.listed]
        if bad and self.world.size > 1:
            lists = [None] * self.world.size
            dist.all_gather_object(lists, listed)
            listed = sum(lists, [])
        self.causes.update(cause for cause, _ in listed)
        self.last = (self.last + [f"{name} ({cause})" for cause, name in listed])[-10:]
        if listed and self.world.first:
            append(self.path, "".join(json.dumps({"step": step, "cause": cause, "name": name}) + "\n"
                                      for cause, name in listed))
        self.seen, self.bad = self.seen + samples + bad, self.bad + bad
        if self.bad > max(20, self.most * self.seen):
            self.refuse(f", more than --max-bad {self.most:g}")

    def finish(self, start):
        """A run from the first step on that learned from nothing does not end well, however few its samples are"""
        if not start and self.most < 1 and self.bad == self.seen > 0:
            self.refuse("")

    def refuse(self, bound):
        raise UserError(f"{self.bad} of {self.seen} samples cannot be used{bound}: "
                        + ", ".join(f"{cause} {n}" for cause, n in self.causes.most_common()) + f". {self.path} lists "
                        f"them, the last: {', '.join(self.last)}. python data.py FILE... looks at the rest")


def clock(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
