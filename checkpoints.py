"""A run's state on disk: written whole or not at all, while training goes on, readable by any number of processes.

A checkpoint is a folder `checkpoint-XXXXXX` with torch.distributed.checkpoint's files (the weights that learn and
AdamW's state, in shares), each process's random state, and `done.json`: step, place in the data, and the size of every
file. It is written under another name, synced to the disk, and renamed; what was cut off has no `done.json`, or other
sizes. Frozen weights are not in it: they lie in the folders that the recipe names.
"""
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from weights import UserError, read_json, some, sync, write_json

FAILURES = (OSError, RuntimeError, CheckpointException)   # torch wraps what the file system says


# options that may change from one start of a run to the next; the data has a check of its own
FREE = {"out", "resume", "export", "steps", "save_every", "sample_every", "keep", "seed", "lr", "warmup", "betas",
        "weight_decay", "clip_norm", "batch", "micro_batch", "device", "dtype", "workers", "max_bad", "timeout", "data",
        "images", "deterministic", "tensorboard", "engine", "checkpoint_activations", "offload", "compile", "peak",
        "plan", "nproc", "memory", "tflops", "text_tokens"}
# those that may too, but with a word: folders may have moved, what is learned may be shifted; all others make the model
SAID = {"llm", "image_tokenizer", "model", "clip_folder", "vgg", "lpips", "text_to_image", "no_caption_end",
        "max_length", "disc_start", "disc_weight", "perceptual_weight", "l2_weight", "clip_weight", "entropy_weight"}


class Checkpoints:
    """Saving holds up training for a copy in memory; the disk is written behind its back. `poll` each step."""

    OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)

    def __init__(self, out, args, world):
        self.out, self.keep, self.world, self.pending = Path(out), args.keep, world, None
        self.made_by = {"processes": world.size, "engine": args.engine, "batch": args.batch,
                        "passes of": args.micro_batch}
        self.task = {name: str(value) for name, value in vars(args).items() if name not in FREE}
        self.group = None
        if world.size > 1:                                # of its own, not to mix its talk with training's
            self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=args.timeout))

    # ------------------------------------------------------------ writing

    def save(self, step, models, optimizers, data, wait=False):
        """Start writing; the one before is finished first. wait: come back when it is on the disk. -> seconds taken"""
        began = time.perf_counter()
        self.finish()
        final, draft = self.out / f"checkpoint-{step:06d}", self.out / f"checkpoint-{step:06d}.tmp"
        error = self._try(self._begin, draft) if self.world.first else None
        begun = agreed(error is None, self.world)
        if begun:
            error = self._try(torch.save, random_state(), draft / f"random-{self.world.rank}.pt")
        if agreed(begun and error is None, self.world):
            writing = dcp.async_save(self._state(models, optimizers), checkpoint_id=draft, process_group=self.group)
            self.pending = writing, draft, final, {"step": step, "data": data, "task": self.task, **self.made_by}
        else:
            self._lost(draft, error)
        if wait:
            self.finish()
        return time.perf_counter() - began

    def _begin(self, draft):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def _try(self, f, *args):
        """-> None, or what the disk had against it"""
        try:
            f(*args)
        except FAILURES as failure:
            return failure

    @contextmanager
    def finished(self):
        """Around what may end the run with an error: what is being written gets its name first."""
        try:
            yield
        except UserError:
            self.finish()
            raise

    def poll(self):
        """Finish what has been written by all processes; come back at once if it has not."""
        if self.pending is not None and agreed(self.pending[0].done(), self.world):
            self.finish()

    def finish(self):
        """Wait for what is being written, and give it its name. A full disk costs this checkpoint, not the run."""
        if self.pending is None:
            return
        (writing, draft, final, done), self.pending = self.pending, None
        error = self._try(writing.result)
        if agreed(error is None, self.world):
            error = self._try(self._name, draft, final, done) if self.world.first else None
            if agreed(error is None, self.world):
                return
        self._lost(draft, error)

    def _name(self, draft, final, done):
        write_json(draft / "done.json", done | {"files": {p.name: p.stat().st_size for p in draft.iterdir()}})
        sync(*draft.iterdir(), draft)
        if final.exists():                                # of the same step, written before: at no moment is there none
            shutil.rmtree(final.with_suffix(".old"), ignore_errors=True)
            os.replace(final, final.with_suffix(".old"))
        os.replace(draft, final)
        sync(self.out)
        for old in self.out.glob("checkpoint-*.old"):
            shutil.rmtree(old)
        everything, kept = self._all(), self.complete()[:self.keep]            # damaged ones do not count
        for old in everything[everything.index(kept[-1]) + 1:] if kept else []:
            shutil.rmtree(old)

    def _lost(self, draft, error):
        print(f"WARNING: {draft.stem} could not be written ({str(error or 'by another process')[-200:]}); the one "
              "before stays, the next is tried at its time. Is the disk full?", file=sys.stderr, flush=True)
        if self.world.first:
            shutil.rmtree(draft, ignore_errors=True)

    # ------------------------------------------------------------ reading

    def _all(self):
        """Folders of checkpoints, complete or not, newest first"""
        found = [(int(match[1]), path) for path in self.out.glob("checkpoint-*")
                 if (match := re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name))]
        return [path for _, path in sorted(found, key=lambda pair: (-pair[0], pair[1].suffix))]

    def complete(self):
        """-> paths of the complete checkpoints, newest first"""
        return [path for path in self._all() if whole(path)]

    def resume(self, wanted, models, optimizers, must=False):
        """-> step, place in the data: of the newest complete checkpoint if `wanted` and there is one, else 0, None"""
        found = [self.complete() if wanted else [], bool(self._all())]
        if self.world.size > 1:                           # one decides: a shared disk may lag behind for the others
            dist.broadcast_object_list(found, group=self.group)
        complete, some_there = found
        for path in self._all() if wanted else []:
            if path not in complete:
                self.world.say(f"{path} is passed over: it was cut off, or files of it are missing or of another size")
        for path in complete:
            self.world.say(f"going on from {path}")
            try:
                result, error = self.load(path, models, optimizers), None
            except UserError:
                raise
            except (Exception, CheckpointException) as failure:     # right sizes, wrong content: said in many ways
                error = failure
            if agreed(error is None, self.world):
                return result
            print(f"WARNING: {path} cannot be read ({str(error or 'by another process')[-200:]})", file=sys.stderr,
                  flush=True)
        if some_there:
            none = ", none of them complete and of this model" * wanted
            raise UserError(f"{self.out} holds checkpoints of a run{none}: --resume goes on with it, another --out "
                            "begins anew, or remove them")
        if must:
            raise UserError(f"--export: {self.out} holds no checkpoint; give --resume and the run's --out")
        return 0, None

    def load(self, path, models, optimizers):
        """-> step, place in the data"""
        done = read_json(path / "done.json")
        self.check(path, done.get("task", {}))
        state = self._state(models, optimizers)
        recipe = [[{k: group[k] for k in ("betas", "weight_decay")} for group in o.param_groups] for o in optimizers]
        dcp.load(state, checkpoint_id=path)
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            answer = set_state_dict(model, optimizer, model_state_dict=state[f"model{i}"],
                                    optim_state_dict=state[f"optimizer{i}"], options=self.OPTIONS)
            lost = {name for name, p in model.named_parameters() if p.requires_grad} & set(answer.missing_keys)
            if lost or answer.unexpected_keys:            # frozen weights are not in it, all others must be
                raise UserError(f"{path} is of another model: missing {some(lost)}, unknown "
                                f"{some(answer.unexpected_keys)}")
        for optimizer, groups in zip(optimizers, recipe):  # what this run was told stands above the checkpoint
            for group, told in zip(optimizer.param_groups, groups):
                group.update(told)
        mine = path / f"random-{self.world.rank}.pt"
        if done["processes"] == self.world.size and mine.is_file():
            set_random_state(torch.load(mine, weights_only=False))
        other = "; ".join(f"{name} {done.get(name)}, now {value}" for name, value in self.made_by.items()
                          if done.get(name) != value)
        if other:
            self.world.say(f"{path} was written with {other}: not exact to the bit (sums are in another order, random "
                           "states of other processes new); weights, AdamW and the place in the data go on")
        return done["step"], done["data"]

    def check(self, path, task):
        """What is learned must be what it was."""
        for name, was in task.items():
            now = self.task.get(name)
            if now is None or now != was and name not in SAID:
                raise UserError(f"{path} is of another run: {name} {was}, now {now}. Give the same options, or begin "
                                "anew in another --out")
            if Path(now).name != Path(was).name:
                self.world.say(f"WARNING: {path} was trained with {name} {was}, now {now}")

    def _state(self, models, optimizers):
        state = {}
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            state[f"model{i}"], state[f"optimizer{i}"] = get_state_dict(model, optimizer, options=self.OPTIONS)
        return state


def whole(path):
    """Is a checkpoint's folder complete: done.json, and every file of the size it names?"""
    try:
        files = json.loads((path / "done.json").read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def barrier(world):
    if world.size > 1:
        dist.barrier()


def agreed(mine, world):
    """Do all processes say so?"""
    if world.size == 1:
        return bool(mine)
    said = torch.tensor(float(mine), device=world.device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said > 0)


def random_state():
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:       # None: written without a GPU
        torch.cuda.set_rng_state(state["cuda"])


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
        return not agreed(not self.asked, self.world)
