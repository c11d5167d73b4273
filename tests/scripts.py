"""The scripts as a user runs them, in processes of their own. These are forked from a server that has torch imported
already: importing it anew two hundred times was half of the tests' minutes. `begin` is the command line itself."""
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

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
                              "torch.utils.data", "PIL.Image", "safetensors.torch", "sentencepiece", "tqdm"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
TOKENIZER = ("--select-layers 2 4 --embed-dim 64 --codebook-size 256 --z-channels 64 --ch 32 --ch-mult 1 1 1 1 "
             "--num-res-blocks 1 --num-attn-heads 2 --attn-resolutions 7 --batch 8 --warmup 1 --lr 1e-3")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def split(words):
    """'--steps 3', a path, ('a question',) -> words of a command line"""
    return [word for part in words for word in (
        part.split() if isinstance(part, str) else part if isinstance(part, tuple) else [str(part)])]


def begin(script, *words, processes=1):
    """-> the command at work, torchrun's for several processes: it leads a group of its own and can be sent signals"""
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] * (processes > 1)
    return subprocess.Popen([sys.executable, *start, script, *split(words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT,
                            start_new_session=True)


def run(script, *words, processes=1, ok=True):
    """-> what a script prints; it must end well, or with one sentence and no traceback"""
    jobs = [Fork(script, *words, **ranks) for ranks in torchrun(processes)]
    try:
        for job in jobs:
            job.process.join(300)
        codes, said = [job.process.exitcode for job in jobs], "".join(job.said() for job in jobs)
    finally:
        for job in jobs:
            job.end()
    assert None not in codes, f"{script} did not end: {said[-5000:]}"
    assert (not any(codes)) == ok, said[-5000:]
    assert ok or "Traceback" not in said, said
    return said


def torchrun(processes):
    """-> for each process the environment that torchrun gives it"""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)} for rank in range(processes)]


class Fork:
    """A script at work: `process`, and what it has said so far"""

    def __init__(self, script, *words, **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        for file in self.files:
            file.touch()
        self.process = FORKS.Process(target=execute, args=(
            [script, *split(words)], os.environ | ENVIRONMENT | environment, self.files))
        self.process.start()

    def said(self):
        return "".join(file.read_text(errors="replace") for file in self.files)

    def end(self):
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def execute(words, environment, files):
    """In the new process: what `python script words` does"""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str((ROOT / words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
