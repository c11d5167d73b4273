"""Run the scripts as a user does, in processes of their own. `run` forks them from a server that has imported torch,
which saves half of the tests' minutes; `start` uses the real command line."""
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
                              "torch.utils.data", "PIL.Image", "safetensors.torch", "sentencepiece", "tqdm"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
TOKENIZER = ("--select-layers 2 4 --embed-dim 64 --codebook-size 256 --z-channels 64 --ch 32 --ch-mult 1 1 1 1 "
             "--num-res-blocks 1 --num-attn-heads 2 --attn-resolutions 7 --batch 8 --warmup 1 --lr 1e-3")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint_tensors(checkpoint):
    """{path: tensor or number} of everything in a checkpoint folder, done.json's included"""
    whole, found = checkpoint.parent / "whole.pt", {}
    dcp_to_torch_save(checkpoint, whole)

    def walk(value, path):
        if not isinstance(value, dict):
            found[path] = value
        for key, part in value.items() if isinstance(value, dict) else ():
            walk(part, f"{path}/{key}")
    walk(torch.load(whole, weights_only=False), "")
    whole.unlink()
    done = json.loads((checkpoint / "done.json").read_text())
    walk({"data": done["data"], "step": done["step"]}, "done")
    return found


def split(words):
    """Strings of several words, paths, and tuples of whole words -> words of a command line"""
    return [word for part in words for word in (
        part.split() if isinstance(part, str) else part if isinstance(part, tuple) else [str(part)])]


def start(script, *words, processes=1):
    """-> a running command (torchrun for several processes) with a process group of its own, for signals"""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] * (processes > 1)
    return subprocess.Popen([sys.executable, *torchrun, script, *split(words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT,
                            start_new_session=True)


def run(script, *words, processes=1, ok=True):
    """-> what a script prints. ok=False: it must fail, with one sentence and no traceback"""
    jobs = [Fork(script, *words, **environment) for environment in rank_environments(processes)]
    try:
        for job in jobs:
            job.process.join(300)
        codes, output = [job.process.exitcode for job in jobs], "".join(job.output() for job in jobs)
    finally:
        for job in jobs:
            job.end()
    assert None not in codes, f"{script} did not end: {output[-5000:]}"
    assert (not any(codes)) == ok, output[-5000:]
    assert ok or "Traceback" not in output, output
    return output


def rank_environments(processes):
    """The environment that torchrun gives to each process"""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)} for rank in range(processes)]


class Fork:
    """A running script"""

    def __init__(self, script, *words, **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        for file in self.files:
            file.touch()
        self.process = FORKS.Process(target=execute, args=(
            [script, *split(words)], os.environ | ENVIRONMENT | environment, self.files))
        self.process.start()

    def output(self):
        return "".join(file.read_text(errors="replace") for file in self.files)

    def end(self):
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def execute(words, environment, files):
    """In the new process: do what `python script.py words` or `python -m module words` does."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
