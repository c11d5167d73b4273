"""Checkpoints: complete or ignored, written in the background, readable by any number of processes.

A checkpoint is a folder `checkpoint-XXXXXX` with torch.distributed.checkpoint's files (trained weights and AdamW's
state, sharded), each process's random state, and `done.json`: the step, the place in the data, the size of every file.
It is written under the name `checkpoint-XXXXXX.tmp`, synced to disk, then renamed. Frozen weights are not saved: they
are read again from the folders that the options name.
"""
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from common.weights import UserError, first_few, fsync, read_json, write_json
from training.engine import all_ranks

# Options that a resumed run may change. Its data and seed are checked elsewhere: they belong to the place in the data.
FREE = {"out", "resume", "export", "steps", "save_every", "sample_every", "keep", "seed", "lr", "warmup", "betas",
        "weight_decay", "clip_norm", "batch", "micro_batch", "device", "dtype", "workers", "max_bad", "timeout", "data",
        "images", "deterministic", "tensorboard", "engine", "checkpoint_activations", "offload", "compile", "peak",
        "plan", "nproc", "memory", "tflops", "text_tokens", "val_data", "val_every"}
# Options that it may change with a warning. All others shape the model and must stay.
WARN = {"llm", "image_tokenizer", "model", "clip_folder", "vgg", "lpips", "text_to_image", "no_caption_end",
        "max_length", "disc_start", "disc_weight", "perceptual_weight", "l2_weight", "clip_weight", "entropy_weight"}
ERRORS = (OSError, RuntimeError, CheckpointException)     # torch wraps errors of the file system


class Checkpoints:
    OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)

    def __init__(self, out, args, dist):
        self.out, self.keep, self.dist, self.pending, self.group = Path(out), args.keep, dist, None, None
        self.made_by = {"processes": dist.size, "engine": args.engine, "batch": args.batch,
                        "passes of": args.micro_batch}
        self.task = {name: str(value) for name, value in vars(args).items() if name not in FREE}
        if dist.size > 1:                                 # its own group, so that messages do not mix with training's
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=args.timeout))

    # ------------------------------------------------------------ writing

    def save(self, step, models, optimizers, data_state, wait=False):
        """Blocks only for the copy to host memory; a thread writes the files. wait: also for the files. -> seconds"""
        began = time.perf_counter()
        self.finish()
        final, draft = self.out / f"checkpoint-{step:06d}", self.out / f"checkpoint-{step:06d}.tmp"
        random_file = draft / f"random-{self.dist.rank}.pt"
        error = (self.attempt(make_empty, draft, first_only=True)
                 or self.attempt(torch.save, random_state(), random_file))
        if error:
            self.warn_lost(draft, error)
        else:
            writing = dcp.async_save(self.state(models, optimizers), checkpoint_id=draft, process_group=self.group)
            done = {"step": step, "data": data_state, "task": self.task, **self.made_by}
            self.pending = writing, draft, final, done
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
        (writing, draft, final, done), self.pending = self.pending, None
        error = self.attempt(writing.result) or self.attempt(self.publish, draft, final, done, first_only=True)
        if error:
            self.warn_lost(draft, error)

    def attempt(self, function, *args, first_only=False):
        """Call a function on all processes, or on the first. -> None, or an error on all if one of them failed"""
        error = None
        try:
            if self.dist.first or not first_only:
                function(*args)
        except ERRORS as caught:
            error = caught
        return None if all_ranks(error is None, self.dist) else error or OSError("on another process")

    def publish(self, draft, final, done):
        """Complete and rename a written checkpoint, then remove the oldest ones."""
        write_json(draft / "done.json", done | {"files": {path.name: path.stat().st_size for path in draft.iterdir()}})
        fsync(*draft.iterdir(), draft)
        if final.exists():                                # the same step again: the old one stays until the new exists
            shutil.rmtree(final.with_suffix(".old"), ignore_errors=True)
            os.replace(final, final.with_suffix(".old"))
        os.replace(draft, final)
        fsync(self.out)
        for path in self.out.glob("checkpoint-*.old"):
            shutil.rmtree(path)
        folders, complete = self.folders(), self.complete()[:self.keep]       # damaged ones do not count
        for path in folders[folders.index(complete[-1]) + 1:] if complete else ():
            shutil.rmtree(path)

    def warn_lost(self, draft, error):
        warn(f"{draft.stem} could not be written ({str(error)[-200:]}); the one before stays, the next is tried at its "
             "time. Is the disk full?")
        if self.dist.first:
            shutil.rmtree(draft, ignore_errors=True)

    # ------------------------------------------------------------ reading

    def folders(self):
        """Folders of checkpoints, complete or not, newest first"""
        found = [(int(match[1]), path) for path in self.out.glob("checkpoint-*")
                 if (match := re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name))]
        return [path for _, path in sorted(found, key=lambda pair: (-pair[0], pair[1].suffix))]

    def complete(self):
        return [path for path in self.folders() if is_complete(path)]

    def resume(self, wanted, models, optimizers, required=False):
        """Load the newest readable checkpoint if `wanted` and there is one. -> step, place in the data; else 0, None"""
        found = [self.complete() if wanted else [], self.folders()]
        if self.dist.size > 1:                            # the first process decides: shared disks show new files late
            torch.distributed.broadcast_object_list(found, group=self.group)
        complete, folders = found
        for path in folders if wanted else []:
            if path not in complete:
                self.dist.print0(f"{path} is passed over: cut off, or with missing files or files of another size")
        for path in complete:
            self.dist.print0(f"going on from {path}")
            try:
                result, error = self.load(path, models, optimizers), None
            except UserError:
                raise
            except (Exception, CheckpointException) as caught:     # broken content shows in many kinds of errors
                error = caught
            if all_ranks(error is None, self.dist):
                return result
            warn(f"{path} cannot be read ({str(error or 'by another process')[-200:]})")
        if folders:
            none = ", none of them complete and of this model" * wanted
            raise UserError(f"{self.out} holds checkpoints of a run{none}: give --resume to continue it, name another "
                            "--out to start a new one, or remove them")
        if required:
            raise UserError(f"--export: {self.out} holds no checkpoint; give --resume and the run's --out")
        return 0, None

    def load(self, path, models, optimizers):
        """-> step, place in the data"""
        done = read_json(path / "done.json")
        self.check(path, done.get("task", {}))
        own = [{key: group[key] for key in ("betas", "weight_decay")} for o in optimizers for group in o.param_groups]
        state = self.state(models, optimizers)
        dcp.load(state, checkpoint_id=path)
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            keys = set_state_dict(model, optimizer, model_state_dict=state[f"model{i}"],
                                  optim_state_dict=state[f"optimizer{i}"], options=self.OPTIONS)
            missing = {name for name, p in model.named_parameters() if p.requires_grad} & set(keys.missing_keys)
            if missing or keys.unexpected_keys:
                raise UserError(f"{path} is of another model: missing {first_few(missing)}, unknown "
                                f"{first_few(keys.unexpected_keys)}")
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, values in zip(groups, own):            # this run's options win over the checkpoint's
            group.update(values)
        random_file = path / f"random-{self.dist.rank}.pt"
        if done["processes"] == self.dist.size and random_file.is_file():
            set_random_state(torch.load(random_file, weights_only=False))
        changes = "; ".join(f"{name} {done.get(name)}, now {value}" for name, value in self.made_by.items()
                            if done.get(name) != value)
        if changes:
            self.dist.print0(f"{path} was written with {changes}: not exact to the bit (sums are in another order, "
                             "random states may be new); weights, AdamW and the place in the data are restored")
        return done["step"], done["data"]

    def check(self, path, task):
        """Refuse, or warn of, options that differ from those of the run that wrote a checkpoint."""
        for name, before in task.items():
            now = self.task.get(name)
            if now is None or now != before and name not in WARN:
                raise UserError(f"{path} is of another run: {name} {before}, now {now}. Give the same options, or "
                                "start a new run in another --out")
            if Path(now).name != Path(before).name:
                self.dist.print0(f"WARNING: {path} was trained with {name} {before}, now {now}")

    def state(self, models, optimizers):
        state = {}
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            state[f"model{i}"], state[f"optimizer{i}"] = get_state_dict(model, optimizer, options=self.OPTIONS)
        return state


def warn(message):
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def is_complete(path):
    """Whether a checkpoint has done.json, and every file with the size that it names"""
    try:
        files = json.loads((path / "done.json").read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def random_state():
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:               # None: written without a GPU
        torch.cuda.set_rng_state(state["cuda"])


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
