"""Checkpoints: complete or ignored, written in the background, readable by any number of processes.

A checkpoint is a folder `checkpoint-XXXXXX` with torch.distributed.checkpoint's files (trained weights, buffers and
AdamW's state, sharded) and `done.json`: the step, the place in the data, the size and checksum of every file. It is
written under the name `checkpoint-XXXXXX.tmp`, synced to disk, then renamed. Frozen weights are not saved: they are
read again from the folders that the options name, and must be the same. Nor are random states: each step is seeded.
"""
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from common.cli import say
from common.weights import UserError, first_few, fsync, read_json, write_json
from training.engine import all_ranks, gather_lists

# Options that a resumed run may change. Its data and seed are checked elsewhere: they belong to the place in the data.
FREE = {"out", "resume", "export", "steps", "save_every", "sample_every", "keep", "seed", "lr", "warmup", "betas",
        "weight_decay", "clip_norm", "batch", "micro_batch", "device", "dtype", "workers", "max_bad", "timeout", "data",
        "images", "deterministic", "tensorboard", "engine", "checkpoint_activations", "offload", "compile", "peak",
        "plan", "nproc", "memory", "tflops", "text_tokens", "val_data", "val_every", "debug", "llm", "image_tokenizer",
        "model", "clip_folder", "vgg", "lpips"}
# Options that it may change with a warning. All others shape the model and must stay.
WARN = {"text_to_image", "no_caption_end", "max_length", "disc_start", "disc_weight",
        "perceptual_weight", "l2_weight", "clip_weight", "entropy_weight"}
# All that a checkpoint's index (.metadata, a pickle) is made of. Anything else in it could run code.
INDEX = {"torch.distributed.checkpoint.metadata": {
             "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
             "StorageMeta", "_MEM_FORMAT_ENCODING"},
         "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch.serialization": {"_get_layout"},
         "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool"},
         "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"}}


class Checkpoints:
    def __init__(self, out, args, dist):
        self.out, self.keep, self.dist, self.pending, self.group = Path(out), args.keep, dist, None, None
        self.thread, self.latest = ThreadPoolExecutor(1), None    # what was last written or read
        self.made_by = {"processes": dist.size, "engine": args.engine, "batch": args.batch,
                        "passes of": args.micro_batch}
        # the options that a resumed run must share, see check
        self.task = {name: str(value) for name, value in vars(args).items() if name not in FREE}
        if dist.size > 1:                                 # its own group, so that messages do not mix with training's
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=args.timeout))

    # ------------------------------------------------------------ writing

    def save(self, step, models, optimizers, data_state, wait=False):
        """Blocks only for the copy to host memory; threads write the files. wait: also for the files. -> seconds"""
        began = time.perf_counter()
        self.finish()
        final, draft = self.out / f"checkpoint-{step:06d}", self.out / f"checkpoint-{step:06d}.tmp"
        if final == self.latest:                          # nothing was learned since
            return 0.0
        if error := self.attempt(make_empty, draft, first_only=True):
            self.warn_lost(draft, error)
        else:
            # with thread_count=1 every process would open a context on GPU 0
            writing = dcp.async_save(state_of(models, optimizers), process_group=self.group,
                                     storage_writer=dcp.FileSystemWriter(draft, thread_count=2))
            checksums = self.thread.submit(complete_files, writing, draft, self.dist.rank)
            record = {"step": step, "data": data_state, "task": self.task, **self.made_by}
            self.pending = checksums, draft, final, record
        if wait:
            self.finish()
        return time.perf_counter() - began

    def poll(self):
        """To be called every step: finish the pending checkpoint if all processes have written their files."""
        if self.pending and all_ranks(self.pending[0].done(), self.dist):
            self.finish()

    def finish(self):
        """Wait for the pending checkpoint and rename it. A full disk costs this checkpoint, not the run."""
        if not self.pending:
            return
        (checksums, draft, final, record), self.pending = self.pending, None
        if not (error := self.attempt(checksums.result)):
            files = dict(gather_lists(list(checksums.result().items()), self.dist))
            error = self.attempt(publish, draft, final, record | {"files": files}, first_only=True)
        if error:
            return self.warn_lost(draft, error)
        self.latest = final
        if self.dist.first:
            self.remove_old(final)

    def attempt(self, function, *args, first_only=False):
        """Call a function on all processes, or on the first. -> None, or an error on all if one of them failed"""
        error = None
        try:
            if self.dist.first or not first_only:
                function(*args)
        except CheckpointException as caught:             # torch's, with the errors of the processes in it
            error = next(iter(caught.failures.values()))[0]
        except Exception as caught:  # noqa: BLE001       # a damaged file can fail in any way
            error = caught
        return None if all_ranks(error is None, self.dist) else error or OSError("on another process")

    def remove_old(self, newest):
        """Keep --keep complete checkpoints from the one just written on: later ones were passed over on resume."""
        folders = self.folders()
        kept = [path for path in self.complete() if path in folders[folders.index(newest):]][:self.keep]
        for path in folders[folders.index(kept[-1]) + 1:] if kept else ():
            try:
                shutil.rmtree(path)
            except OSError as error:
                warn(f"{path} is no longer needed and cannot be removed ({error.strerror or error})")

    def warn_lost(self, draft, error):
        if self.dist.first:
            shutil.rmtree(draft, ignore_errors=True)
        warn(f"{draft.stem} could not be written ({str(error)[-200:]}); the one before stays, the next is tried at its "
             "time. Is the disk full?")

    # ------------------------------------------------------------ reading

    def folders(self):
        """Folders of checkpoints, complete or not, newest first"""
        found = [path for path in self.out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))

    def complete(self):
        return [path for path in self.folders() if read_record(path)]

    def resume(self, wanted, models, optimizers, required=False):
        """Load the newest readable checkpoint if `wanted` and there is one. -> step, place in the data; else 0, None"""
        for draft in self.out.glob("checkpoint-*.tmp") if self.dist.first else ():            # of a run that was killed
            shutil.rmtree(draft, ignore_errors=True)
        found = [[(path, read_record(path)) for path in self.folders()]]
        if self.dist.size > 1:                            # the first process decides: shared disks show new files late
            torch.distributed.broadcast_object_list(found, group=self.group)
        for path, record in found[0] if wanted else ():
            if record is None:
                self.dist.print0(f"{path} is passed over: cut off, damaged, or of an older version of this program")
                continue
            self.dist.print0(f"going on from {path}")
            error = self.attempt(self.verify, path, record["files"])
            if not error:
                self.check(path, record["task"])
                error = self.attempt(self.load, path, record, models, optimizers)
            if not error:
                self.latest = path
                return record["step"], record["data"]
            warn(f"{path} cannot be read ({str(error)[-200:]})")
        if found[0]:
            none = ", none of them complete and of this model" * wanted
            raise UserError(f"{self.out} holds checkpoints of a run{none}: give --resume to continue it, name another "
                            "--out to start a new one, or remove them")
        if required:
            raise UserError(f"--export: {self.out} holds no checkpoint; give --resume and the run's --out")
        return 0, None

    def verify(self, path, files):
        """Compare the checksums of this process's share of the files."""
        for name in sorted(files)[self.dist.rank::self.dist.size]:
            if checksum(path / name) != files[name][1]:
                raise OSError(f"{name} is damaged: its checksum is not the one written in done.json")

    def load(self, path, record, models, optimizers):
        """Weights and AdamW's state. torch reads tensors with weights_only, so no file can run code."""
        reader = IndexReader(path)
        saved = reader.read_metadata().state_dict_metadata.keys()
        state = state_of(models, optimizers, saved)
        if different := state.keys() ^ saved:
            raise UserError(f"it is of another model; only one of both has {first_few(different)}")
        dcp.load(state, storage_reader=reader, process_group=self.group)
        changes = "; ".join(f"{name} {record.get(name)}, now {value}" for name, value in self.made_by.items()
                            if record.get(name) != value)
        if changes:
            self.dist.print0(f"{path} was written with {changes}: not exact to the bit (sums are in another order); "
                             "weights, AdamW and the place in the data are restored")

    def check(self, path, task):
        """Refuse, or warn of, options that differ from those of the run that wrote a checkpoint."""
        for name, before in task.items():
            now = self.task.get(name)
            if name == "frozen" and now != before:
                raise UserError(f"{path} was trained around other frozen weights (a LLaMA, CLIP, image tokenizer, VGG) "
                                "than those read now: name their folders as they were, or start anew in another --out")
            if name not in FREE and (now is None or now != before and name not in WARN):
                advice = "Give the same options, or start" if name in self.task else "There is no such option, so start"
                raise UserError(f"{path} is of another run: {name} {before}, now {now}. {advice} a new run in another "
                                "--out")
            if name in WARN and now != before:
                self.dist.print0(f"WARNING: {path} was trained with {name} {before}, now {now}")


# ---------------------------------------------------------------- what a checkpoint holds

def state_of(models, optimizers, saved=()):
    """-> {model0.NAME: tensor, optimizer0.NAME.step: tensor, ...} without frozen weights. saved: names in a checkpoint
    that is to be loaded; AdamW gets the states that are in it, and no others."""
    state = {}
    for i, (model, optimizer) in enumerate(zip(models, optimizers)):
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        state |= {f"model{i}.{name}": tensor for name, tensor in model.state_dict().items() if name not in frozen}
        if saved:
            optimizer.state.clear()
        for name, p in model.named_parameters():
            if f"optimizer{i}.{name}.step" in saved:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            if p in optimizer.state:                      # not before its first update
                state |= {f"optimizer{i}.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return state


def fingerprint(*modules, samples=1024):
    """Identity of the frozen weights: a hash over names, shapes and `samples` values a tensor. UserError: quantized"""
    sha = hashlib.sha256()
    for module in modules:
        for name, p in module.named_parameters():
            if hasattr(p, "qdata"):
                raise UserError("quantized weights cannot be trained: give the folder that they were made from")
            if not p.requires_grad:
                values = p.detach().flatten()[::max(1, p.numel() // samples)][:samples].float().cpu()
                sha.update(f"{name} {tuple(p.shape)}".encode() + values.numpy().tobytes())
    return sha.hexdigest()[:16]


def complete_files(writing, draft, rank):
    """Wait for torch's files. -> {name: [size, checksum]} of this process's files"""
    writing.result()
    own = (f"__{rank}_",) + (".metadata",) * (rank == 0)
    return {path.name: [path.stat().st_size, checksum(path)] for path in draft.iterdir() if path.name.startswith(own)}


def checksum(path):
    with open(path, "rb") as file:                        # 1.5 GB/s and core
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(draft, final, record):
    """Complete and rename a written checkpoint."""
    write_json(draft / "done.json", record | {"checksum": checksum_of_record(record)})
    fsync(*draft.iterdir(), draft)
    shutil.rmtree(final, ignore_errors=True)              # a damaged one, which was passed over on resume
    os.replace(draft, final)
    fsync(final.parent)


def read_record(path):
    """done.json of a checkpoint -> its record; None if that is damaged, or a file missing or of another size"""
    try:
        record = read_json(path / "done.json")
        whole = record.pop("checksum") == checksum_of_record(record)
        return record if whole and all((path / name).stat().st_size == size
                                       for name, (size, _) in record["files"].items()) else None
    except Exception:  # noqa: BLE001                     # a damaged record can fail in any way
        return None


def checksum_of_record(record):
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class IndexReader(dcp.FileSystemReader):
    """torch's reader of checkpoints, whose index may hold only what torch puts there: other pickles are refused."""

    def read_metadata(self, *args, **kwargs):
        with open(self.path / ".metadata", "rb") as file:
            return IndexUnpickler(file).load()


class IndexUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint; it could run code")
        return super().find_class(module, name)


def warn(message):
    say(f"WARNING: {message}", file=sys.stderr)


def make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class Stop:
    """Ctrl-C, SIGTERM and SIGHUP end the run after the current step, with a checkpoint. What comes within 5 seconds of
    the first is the same request: systemd and Slurm signal torchrun, which passes it on, and its processes. A later one
    ends the run at once."""

    def __init__(self, dist):
        self.dist, self.asked = dist, None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:         # nohup ignores SIGHUP
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = self.asked or time.monotonic()
        if time.monotonic() - self.asked > 5:
            raise KeyboardInterrupt

    def __call__(self):
        """Whether any process was asked to stop"""
        return not all_ranks(not self.asked, self.dist)
