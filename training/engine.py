"""What every trainer needs and no paper mentions: options, processes, engines, optimizer, schedule, log.

Three engines, all of them torch's, share a model among processes: ddp (each process holds all of it), zero (gradients,
AdamW's state and the float32 weights are sharded), fsdp (everything is sharded). The training loop does not know which
one runs. A run folder holds checkpoints, log.jsonl, bad_samples.jsonl, samples/ and, at the end, the model folder.
"""
import fcntl
import json
import math
import os
import resource
import signal
import socket
import sys
import time
import warnings
from argparse import SUPPRESS
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from multiprocessing.util import Finalize
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.cli import DTYPES, NATURAL, PEERS, POSITIVE, SEED, TOY, bounded, check_device, say, signal_at_parents_death
from common.weights import UserError, write_json

warnings.filterwarnings("ignore", message="torch.distributed is disabled")        # one process does not need it
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")    # its successor broadcasts at start

ENGINES = ("ddp", "zero", "fsdp")
# TFLOP/s of dense bfloat16 products, by a part of the device's name
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "4090": 165,
         "3090": 71, "A10G": 70, "L4": 121}


# ---------------------------------------------------------------- options

def add_options(parser, out, data, files, steps, warmup, batch, lr, betas=(0.9, 0.99), weight_decay=0.01, text=0,
                engines=True):
    """The options that all trainers share. The numbers are the stage's recipe; files: kinds of --data; text: mean text
    tokens of a sample"""
    not_negative, positive, samples = bounded(float, 0), bounded(float, above=0), bounded(int, 1, 10 ** 6)
    add = parser.add_argument_group("the run").add_argument
    add("--data", nargs="+", metavar="FILE", default=[str(TOY / data)], help=f"{files}; FILE@3: thrice an epoch")
    add("--images", metavar="DIR", default=str(TOY / "chats/images"), help="folder of the images that JSON names")
    add("--out", metavar="DIR", default=str(TOY / out), help="run folder, at the end also the model folder")
    add("--resume", action="store_true", help="continue from --out's newest complete checkpoint")
    add("--export", action="store_true", help="with --resume: only write the model folder")
    add("--steps", type=POSITIVE, default=steps, metavar="N", help="updates")
    add("--save-every", type=NATURAL, default=1000, metavar="N", help="steps between checkpoints; 0: none")
    add("--sample-every", type=NATURAL, default=1000, metavar="N", help="steps between pages in samples/; 0: last only")
    add("--keep", type=POSITIVE, default=2, metavar="N", help="number of checkpoints to keep")
    add("--seed", type=SEED, default=0, metavar="N", help="of new weights and of the order of the data")
    add("--plan", action="store_true", help="print memory, FLOPs and hours, and end (python -m training.plan -h)")
    add("--debug", action="store_true", default=SUPPRESS, help="show where in the code an error arose")    # see cli.run
    add = parser.add_argument_group("optimization").add_argument
    add("--lr", type=not_negative, default=lr, help="peak learning rate")
    add("--warmup", type=NATURAL, default=warmup, metavar="N", help="steps from 0 to --lr, then cosine to 0")
    add("--betas", type=bounded(float, 0, below=1), nargs=2, default=betas, metavar="B", help="of AdamW")
    add("--weight-decay", type=not_negative, default=weight_decay, metavar="W", help="of AdamW, on matrices only")
    add("--clip-norm", type=positive, default=1.0, metavar="X", help="largest norm of the gradient")
    add("--batch", type=samples, default=batch, metavar="N", help="samples of an update, over all processes")
    add("--micro-batch", type=NATURAL, default=0, metavar="N", help="samples of a pass; 0: --batch / processes")
    add = parser.add_argument_group("the machine and the log").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D", help="torch device")
    add("--dtype", choices=list(DTYPES), help="of products; None: bfloat16 on a GPU, else float32")
    add("--workers", type=bounded(int, 0, 1000), default=0, metavar="N", help="data readers of each training process")
    add("--max-bad", type=bounded(float, 0, 1), default=0.05, metavar="X",
        help="share of unusable samples that ends the run, if they are more than 20; 1: never")
    add("--timeout", type=bounded(float, above=0, most=10 ** 6), default=10, metavar="MIN",
        help="to wait for a process that does not answer")
    add("--deterministic", action="store_true", help="slower GPU kernels, with which a resumed run is bit-exact")
    add("--tensorboard", action="store_true", help="log there too, if it is installed")
    if engines:
        add("--val-data", nargs="+", metavar="FILE", default=[], help="as --data, for a loss on held-out samples")
        add("--val-every", type=POSITIVE, default=1000, metavar="N", help="steps between held-out losses")
        add("--engine", choices=("auto", *ENGINES), default="auto",
            help="auto: the first that fits the memory; on one process ddp, or zero with --offload")
        add("--checkpoint-activations", action="store_true", help="less memory, a third more time")
        add("--offload", action="store_true", help="zero, fsdp: float32 weights and AdamW in CPU memory; slow")
        add("--compile", action="store_true", help="torch.compile. 'file too short': rm -r /tmp/torchinductor_USER")
        add("--peak", type=positive, metavar="T", help="the device's TFLOP/s, for the log; None: by its name")
    else:
        parser.set_defaults(engine="ddp", offload=False, checkpoint_activations=False, compile=False, peak=None)
    parser.add_argument("--nproc", "--gpus", type=POSITIVE, default=8, help=SUPPRESS)         # these four: see plan.py
    parser.add_argument("--memory", type=positive, default=80, help=SUPPRESS)
    parser.add_argument("--tflops", type=positive, default=150, help=SUPPRESS)
    parser.add_argument("--text-tokens", type=NATURAL, default=text, help=SUPPRESS)


def check_out_folder(args):
    """--out must not be a file, a folder that the run reads, or a finished model without checkpoints to resume from."""
    out = Path(args.out).resolve()
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {args.out}: {existing} is a file; expected a folder, or a path where one can be made")
    inputs = [getattr(args, name, None) for name in ("llm", "image_tokenizer", "model", "clip_folder")]
    if out in [Path(path).resolve() for path in inputs if path]:
        raise UserError(f"--out {args.out} is a folder that this run reads: it would be overwritten. Name another")
    found = [name for name in ("config.json", "model.safetensors") if (out / name).exists()]
    if found and not (args.resume and any(out.glob("checkpoint-*"))):
        raise UserError(f"--out {args.out} holds {' and '.join(found)}: a model that this run would overwrite. Name "
                        "another folder, remove it, or give --resume where there are checkpoints to resume from")


def lock(folder, dist):
    """Make the run folder this run's until its first process ends: two runs would tear each other's checkpoints."""
    other, path = [], folder / "run.lock"
    if dist.first:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT)      # a number, so that nothing closes it before the process ends
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            Finalize(None, path.unlink, [True], exitpriority=0)
        except (BlockingIOError, PermissionError):
            other = [os.read(file, 200).decode(errors="replace")]
        except OSError as error:                          # a disk without locks
            print(f"WARNING: {path}: {error.strerror}. See that no other run uses the folder", flush=True)
    if other := gather_lists(other, dist):
        raise UserError(f"--out {folder} is in use by another run, {other[0]}: wait for its end or name another --out")


def save_options(args, dist, start):
    """Print the resolved options and save them as recipe.json. start: the step the run starts or resumes at"""
    if start > args.steps and not args.export:
        raise UserError(f"--steps {args.steps}, but this run has made {start} already; --export writes its model")
    if dist.first:
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(Path(args.out) / "recipe.json", values)
        print(" ".join(f"{key}={value}" for key, value in values.items()), flush=True)
        if args.warmup >= args.steps > 100:               # shorter runs only try out whether all works
            print(f"WARNING: --warmup {args.warmup} of --steps {args.steps}: the rate never reaches --lr", flush=True)


# ---------------------------------------------------------------- processes

@dataclass
class Dist:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def first(self):
        return self.rank == 0

    def print0(self, *words):
        if self.first:
            say(*words)

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def init_distributed(device, timeout=10, group=False):
    """Join the processes that torchrun started. timeout: minutes; group: make a process group for one process too"""
    if "TORCHELASTIC_RUN_ID" in os.environ:               # a killed torchrun leaves no processes behind
        signal_at_parents_death(signal.SIGTERM)
    rank, size, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), check_device(device)
    if device.type == "cuda":
        device = check_device(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")       # batches differ in length
        torch.cuda.set_device(device)
    if (size > 1 or group) and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = None if size > 1 else torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size,
                                             timeout=timedelta(minutes=timeout),
                                             device_id=device if device.type == "cuda" else None)
        machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        processes = gather_lists([(machine, os.getpid())], Dist(rank, size, device, torch.float32))
        PEERS.extend(pid for place, pid in processes if place == machine and pid != os.getpid())
    return Dist(rank, size, device, torch.float32)


def setup(args):
    """Check --out, join the other processes, seed, and fill in the options that were left open."""
    if args.engine == "auto" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        args.engine = "zero" if args.offload else "ddp"
    if args.engine == "ddp" and args.offload:
        raise UserError("--offload: ddp keeps everything on the device; give --engine zero or fsdp")
    check_out_folder(args)
    dist = init_distributed(args.device, args.timeout, group=args.engine in ("zero", "fsdp"))
    args.micro_batch = args.micro_batch or max(1, args.batch // dist.size)
    args.dtype = args.dtype or ("bfloat16" if dist.device.type == "cuda" else "float32")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)          # not warn_only: attention would stay as it is
    torch.manual_seed(args.seed)
    return replace(dist, dtype=DTYPES[args.dtype])


def all_ranks(condition, dist):
    """Whether a condition holds on all processes"""
    if dist.size == 1:
        return bool(condition)
    flag = torch.tensor(float(condition), device=dist.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag > 0)


def all_reduce_sum(tensor, dist):
    if dist.size > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_lists(values, dist):
    """The lists of all processes, one after the other"""
    if dist.size == 1:
        return values
    lists = [None] * dist.size
    torch.distributed.all_gather_object(lists, values)
    return sum(lists, [])


# ---------------------------------------------------------------- engines

def distribute(model, blocks, args, dist):
    """Put a model on the device and share it among the processes: trained weights in float32, frozen ones in the dtype
    of the products. blocks: the layers, which zero and fsdp gather one at a time. -> the module to call"""
    if args.compile:
        torch._dynamo.config.recompile_limit = 64         # one graph for each layout of rows
        for block in blocks:
            block.compile()                               # sizes stay dynamic
    if args.engine == "ddp":
        cast_and_place(model, dist)
        return replicate(model, dist)
    mesh = init_device_mesh(dist.device.type, (dist.size,))
    mixed = MixedPrecisionPolicy(*() if dist.dtype == torch.float32 else (dist.dtype, torch.float32))
    frozen = {p for p in model.parameters() if not p.requires_grad} if args.engine == "zero" else set()
    offload = CPUOffloadPolicy(pin_memory=dist.device.type == "cuda") if args.offload else OffloadPolicy()
    for part in [*blocks, model]:
        cast_and_place(part, dist, frozen if args.offload else None)
        fully_shard(part, mesh=mesh, mp_policy=mixed, reshard_after_forward=args.engine == "fsdp",
                    ignored_params=frozen, offload_policy=offload)
    for block, following in pairwise(blocks):             # the next layer is gathered while this one computes
        block.set_modules_to_forward_prefetch([following])
    model.sync_once_per_update = args.offload and args.engine == "zero"
    return model


def cast_and_place(module, dist, on_device=None):
    """on_device: the weights that stay on the device although the others are offloaded to the CPU; None: all"""
    for p in module.parameters():
        if not isinstance(p.data, torch.distributed.tensor.DTensor):
            device = dist.device if on_device is None or p in on_device else "cpu"
            p.data = p.data.to(device, torch.float32 if p.requires_grad else dist.dtype)


def replicate(model, dist):
    """DDP, if there is more than one process. Buffers are not broadcast: they are running statistics that training does
    not read, and writing to them between the discriminator's two forward passes would break its backward pass."""
    if dist.size == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def set_grad_sync(model, sync):
    """Whether the next backward pass sums gradients over the processes. With ddp only an update's last pass needs to;
    zero and fsdp always do, or each process would hold all gradients; zero with --offload does it once an update,
    because moving weights and gradients between CPU and device is slow."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync
    elif getattr(model, "sync_once_per_update", False):
        model.set_requires_gradient_sync(sync)
        model.set_reshard_after_backward(sync)


def full_state_dict(model):
    """All tensors of the model on the first process's CPU; the other processes get an empty dict"""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# ---------------------------------------------------------------- optimizer and schedule

def adamw(parameters, args):
    """AdamW; weight decay on matrices only, not on norms and biases"""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=1e-8, fused=True)


def set_learning_rate(optimizers, step, args):
    """Linear from 0 to --lr over --warmup steps, then cosine to 0 (Tab. 4). step: 0 for the first update"""
    lr = args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))
    if step < args.warmup:
        lr = args.lr * (step + 1) / args.warmup
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = lr
    return lr


# ---------------------------------------------------------------- the log

class Log:
    """One line a step, on the screen and as JSON in log.jsonl"""

    def __init__(self, args, dist, start):
        self.dist, self.steps, self.path = dist, args.steps, Path(args.out) / "log.jsonl"
        self.began, self.start, self.board = time.time(), start, None
        if args.tensorboard and dist.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: the package is not installed; pip install tensorboard") from None
            self.board = SummaryWriter(args.out)

    def __call__(self, step, numbers):
        if not self.dist.first:
            return
        seconds = (time.time() - self.began) / (step - self.start) * (self.steps - step)
        left = str(timedelta(seconds=int(seconds)))
        append(self.path, [{"step": step, **numbers, "left": left}])
        scalars = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
        with warn_if_unwritable(self.path.parent):
            for name, value in scalars.items() if self.board else ():
                self.board.add_scalar(name, value, step)
        words = [f"{name} {value:.4g}" for name, value in scalars.items()]
        words += [f"{cause} {n}" for cause, n in numbers.get("causes", {}).items()]
        say(f"step {step}/{self.steps} {' '.join(words)} | {left} left")


@contextmanager
def warn_if_unwritable(path):
    """For files that a run can do without: a full disk does not end it."""
    try:
        yield
    except OSError as error:
        say(f"WARNING: {path} could not be written ({error})", file=sys.stderr)


def append(path, entries):
    """Add lines of JSON to a file."""
    with warn_if_unwritable(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def speed_and_memory(args, dist, totals, seconds, flops):
    """For the log: tokens and images a second, share of the devices' peak FLOP/s (None: not known), seconds, and most
    memory so far, of the GPU or else of this process, in GB"""
    cuda = dist.device.type == "cuda"
    rates = {f"{name}/s": totals[name] / seconds for name in ("tokens", "images") if name in totals}
    if flops:
        name = torch.cuda.get_device_name(dist.device) if cuda else ""
        peak = args.peak or next((tera for key, tera in PEAKS.items() if key in name), None)
        rates["peak"] = peak and sum(flops(totals).values()) / seconds / dist.size / (peak * 1e12)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return rates | {"seconds": seconds, "memory": (torch.cuda.max_memory_allocated(dist.device) if cuda else own) / 1e9}


class BadSamples:
    """Counts unusable samples by cause and lists them in bad_samples.jsonl; too many end the run."""

    def __init__(self, args, dist):
        self.path, self.max_share, self.dist = Path(args.out) / "bad_samples.jsonl", args.max_bad, dist
        self.seen, self.n_bad, self.causes, self.examples = 0, 0, Counter(), []

    def __call__(self, step, batches, totals):
        """batches: of this process; totals: counts over all processes"""
        self.seen, self.n_bad = self.seen + totals["samples"] + totals["bad"], self.n_bad + totals["bad"]
        if not totals["bad"]:
            return
        bad = gather_lists([entry for batch in batches for entry in batch.bad], self.dist)
        self.causes.update(cause for cause, _, _ in bad)
        self.examples = [f"{name} ({cause})" for cause, name, _ in bad[-10:]]
        if self.dist.first:
            append(self.path, [{"step": step, "cause": cause, "name": name, "file": file}
                               for cause, name, file in bad])
        if self.n_bad > max(20, self.max_share * self.seen):
            self.fail(f", more than --max-bad {self.max_share:g}")

    def finish(self, start):
        """Fail if a run that started at step 0 found no usable sample."""
        if not start and self.max_share < 1 and self.n_bad == self.seen > 0:
            self.fail()

    def fail(self, limit=""):
        all_ranks(True, self.dist)                        # wait for the list: the first process to end kills the others
        causes = ", ".join(f"{cause} {n}" for cause, n in self.causes.most_common())
        raise UserError(f"{self.n_bad} of {self.seen} samples cannot be used{limit}: {causes}. {self.path} lists them"
                        f", the last: {', '.join(self.examples)}. python data.py FILE... checks a whole dataset")
