"""The scripts as a user runs them, in processes of their own. A single process is forked from a server that has torch
imported already: importing it anew two hundred times was half of the tests' minutes."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
                              "torch.utils.data", "PIL.Image", "safetensors.torch", "sentencepiece", "tqdm"])


def split(words):
    """'--steps 3', a path, ('a question',) -> words of a command line"""
    return [word for part in words for word in (
        part.split() if isinstance(part, str) else part if isinstance(part, tuple) else [str(part)])]


def command(script, words, processes):
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] * (processes > 1)
    return [sys.executable, *start, script, *split(words)]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(script, *words, processes=1, ok=True):
    """-> what a script prints; it must end well, or with one sentence and no traceback"""
    if processes == 1:
        with Fork(script, *words) as job:
            job.process.join(300)
            code, said, error = job.process.exitcode, *job.said()
    else:
        done = subprocess.run(command(script, words, processes), cwd=ROOT, env=os.environ | ENVIRONMENT,
                              capture_output=True, text=True, timeout=300)
        code, said, error = done.returncode, done.stdout, done.stderr
    assert code is not None, f"{script} did not end: {said[-2000:]}{error[-3000:]}"
    assert (code == 0) == ok, said[-2000:] + error[-3000:]
    assert ok or "Traceback" not in error, error
    return said + error


def begin(script, *words, processes=1):
    """-> a process that leads a group of its own and can be sent signals"""
    return subprocess.Popen(command(script, words, processes), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, start_new_session=True)


class Fork:
    """A script at work, alone: `process`, and what it has said so far"""

    def __init__(self, script, *words):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        for file in self.files:
            file.touch()
        self.process = FORKS.Process(target=execute, args=([script, *split(words)], dict(os.environ), self.files))
        self.process.start()

    def said(self):
        return [file.read_text(errors="replace") for file in self.files]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def execute(words, environment, files):
    """In the new process: what `python script words` does"""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv = words
    sys.path.insert(0, str((ROOT / words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
