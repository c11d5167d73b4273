"""A long run survives kills, signals, dead processes, full disks and bad samples, and resumes bit for bit."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, TOKENIZER, Fork, log, run, start

import pretrain
from common.sources import open_sources
from data import PictureBuilder
from training import engine
from training.checkpoints import Checkpoints, Stop, checksum_of_record

ALONE = engine.Dist(0, 1, torch.device("cpu"), torch.float32)
ARGS = SimpleNamespace(keep=2, engine="ddp", batch=8, micro_batch=8)


def until_running(job, folder):
    """Wait for the run's first step."""
    while not (folder / "log.jsonl").exists():
        time.sleep(0.1)
        assert job.poll() is None, job.stdout.read()


def children(pid):
    return [int(word) for word in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()]


def ended(job, *sentences):
    """What a failed run printed. Returns when the last of its processes has closed the output."""
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and all(sentence in output for sentence in sentences), output
    assert output.count("Traceback") == ("ChildFailedError" in output), output                 # torchrun's own
    return output


FAULTS = {   # what happens to the run, and what it says then
    "bug": ("pretrain.update = fail", "error: TypeError: planted (our own fault; --debug shows where)"),
    "no memory": ("pretrain.update = memory", "error: MemoryError: no reason given (the machine's, another"),
    "bug of a reader": ("data.SampleDataset.__getitem__ = fail", "error: TypeError: planted (our own"),
    "full /dev/shm": ("torch.UntypedStorage._share_fd_cpu_ = full", "error: RuntimeError: /dev/shm is full ("),
    "full disk": ("pretrain.Libra.save_pretrained = disk", "error: the system says: No space left on device")}


@pytest.mark.slow
@pytest.mark.parametrize("processes, fault", [(n, fault) for n in (1, 2) for fault in FAULTS
                                              if (n, fault) not in ((1, "no memory"), (2, "bug"))])      # of one kind
def test_an_error_ends_all_processes(pretrain, tmp_path, monkeypatch, fault, processes):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line, sentence = FAULTS[fault]
    (tmp_path / "broken.py").write_text(f"""
import data, pretrain, torch
from common import cli
def fail(*_, **__): raise TypeError("planted")
def memory(*_): raise MemoryError
def full(*_): raise RuntimeError("/dev/shm is full")
def disk(*_): raise OSError(28, "No space left on device")
{line}
cli.run(pretrain.main)
""")
    job = start(tmp_path / "broken.py", *pretrain, "--workers 1 --out", tmp_path / "run", processes=processes)
    ended(job, sentence)


def test_a_reader_whose_trainer_died_before_it_began_ends():
    script = """
import multiprocessing, os, time, data
def reader(trainer):
    while os.getppid() == trainer:
        time.sleep(0.01)
    data.start_worker(0)
    os.write(1, b"goes on")
multiprocessing.get_context("fork").Process(target=reader, args=[os.getpid()]).start()
os._exit(0)"""
    job = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=120)
    assert job.stdout == b"" and job.returncode == 0, job.stderr        # all have closed the output


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_dead_reader_ends_the_run(pretrain, tmp_path, processes):
    job = start("pretrain.py", *pretrain, "--steps 100000 --workers 2 --out", tmp_path, processes=processes)
    until_running(job, tmp_path)
    trainer = job.pid if processes == 1 else children(job.pid)[-1]
    os.kill(children(trainer)[-1], signal.SIGKILL)
    ended(job, "error: ")


SHORT_TIMEOUT = """
import time
from datetime import timedelta
import pretrain, torch
from common import cli
def lower(seconds): torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
"""


@pytest.mark.slow
def test_an_export_may_take_longer_than_the_timeout(pretrain, tmp_path):
    """The first process writes alone; the others have gathered the weights with it and wait for nothing any more."""
    (tmp_path / "slow.py").write_text(f"""
{SHORT_TIMEOUT}
gather, save = pretrain.engine.full_state_dict, pretrain.Libra.save_pretrained
def gather_then_lower(model):
    tensors = gather(model)
    lower(0.5)
    return tensors
def save_slowly(*words):
    time.sleep(2)
    save(*words)
pretrain.engine.full_state_dict, pretrain.Libra.save_pretrained = gather_then_lower, save_slowly
cli.run(pretrain.main)
""")
    run(str(tmp_path / "slow.py"), *pretrain, "--steps 1 --save-every 0 --out", tmp_path / "run", processes=2)
    assert (tmp_path / "run/config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_process_ends_the_run(pretrain, tmp_path, monkeypatch, number):
    """Killed, or without an answer for so long as --timeout says: here 10 s, but not before a step is made, for which a
    busy machine may take longer."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "short.py").write_text(f"""
{SHORT_TIMEOUT}
update = pretrain.update
def update_then_lower(*words):
    numbers = update(*words)
    lower(10)
    return numbers
pretrain.update = update_then_lower
cli.run(pretrain.main)
""")
    job = start(tmp_path / "short.py", *pretrain, "--steps 100000 --workers 1 --out", tmp_path, processes=2)
    until_running(job, tmp_path)
    os.kill(children(job.pid)[-1], number)
    assert "SIGKILL" in ended(job, "error: RuntimeError: ", "another process's")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_outlives_a_killed_trainer_or_torchrun(pretrain, tmp_path, processes):
    job = start("pretrain.py", *pretrain, "--steps 100000 --workers 2 --out", tmp_path, processes=processes)
    until_running(job, tmp_path)
    job.kill()
    ended(job)


@pytest.mark.slow
def test_a_run_folder_belongs_to_one_run(pretrain, tmp_path):
    words = [*pretrain, "--save-every 0 --out", tmp_path]
    job = start("pretrain.py", *words, "--steps 100000")
    until_running(job, tmp_path)
    sentence = f"--out {tmp_path} is in use by another run, process {job.pid} on "
    assert sentence in run("pretrain.py", *words, ok=False)
    assert sentence in run("pretrain.py", *words, "--resume --engine ddp --batch 2", processes=2, ok=False)
    job.kill()
    job.wait()
    run("pretrain.py", *words, "--steps 1 --warmup 0")    # a dead run does not keep it
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_the_run_with_a_checkpoint(pretrain, tmp_path, processes, number):
    """To torchrun, which passes it on, and to its processes at once, as a terminal, systemd and Slurm send it"""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:          # under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    job = start("pretrain.py", *pretrain, "--steps 100000 --save-every 1000 --workers 1 --out", tmp_path,
                processes=processes)
    until_running(job, tmp_path)
    for pid in [job.pid, *children(job.pid)] if processes > 1 else [job.pid, job.pid]:
        os.kill(pid, number)
    output, _ = job.communicate(timeout=120)
    step = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert f"stopped after step {step}" in output and (tmp_path / f"checkpoint-{step:06d}/done.json").is_file()
    assert "Traceback" not in output or processes == 2    # torchrun's own
    assert processes == 2 or job.returncode == 0          # torchrun itself reports that it was told to end


def test_a_later_signal_ends_the_run_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = Stop(ALONE)
    assert not stop()
    stop.ask(signal.SIGTERM, None)
    now += 4
    stop.ask(signal.SIGTERM, None)                        # the same request
    assert stop()
    now += 2
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGTERM, None)


@pytest.mark.slow
def test_kill_9_loses_no_more_than_since_the_last_checkpoint(pretrain, tmp_path):
    """Twelve kills of a run that saves every step, some at once after its first new step, some after a new checkpoint:
    it always resumes from the newest complete checkpoint, and ends with the weights of an undisturbed run."""
    pretrain = [*pretrain, "--warmup 1000 --lr 0.1"]      # still warming up: the rate does not depend on --steps
    words = [*pretrain, "--steps 100000 --save-every 1"]
    rng, reached = random.Random(0), 0
    for kill in range(12):
        job = Fork("pretrain.py", *words, "--resume --out", tmp_path / "killed")
        before = len(lines(tmp_path / "killed"))
        while job.process.is_alive() and not (newest(tmp_path / "killed") > reached if kill % 2
                                              else len(lines(tmp_path / "killed")) > before):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        job.process.kill()
        job.process.join()
        assert job.process.exitcode == -signal.SIGKILL, job.output()                            # it was running
        assert newest(tmp_path / "killed") >= reached, f"kill {kill}: {job.output()}"
        reached = newest(tmp_path / "killed")
    assert reached >= 6
    words = [*pretrain, f"--steps {reached + 3}"]
    run("pretrain.py", *words, "--resume --out", tmp_path / "killed")
    run("pretrain.py", *words, "--out", tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def newest(folder):
    """Step of the newest complete checkpoint"""
    complete = Checkpoints(folder, ARGS, ALONE).complete()
    return int(complete[0].name[-6:]) if complete else 0


def lines(folder):
    return (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []


def test_a_full_disk_costs_one_checkpoint(tmp_path, capsys):
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, ARGS, ALONE)
    checkpoints.save(1, [model], [optimizer], [0, 0, 1], wait=True)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        checkpoints.save(2, [model], [optimizer], [0, 0, 2], wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "checkpoint-000002 could not be written" in capsys.readouterr().err
    assert [path.name for path in checkpoints.complete()] == ["checkpoint-000001"]
    checkpoints.save(3, [model], [optimizer], [0, 0, 3], wait=True)
    assert checkpoints.complete()[0].name == "checkpoint-000003"
    part = next((tmp_path / "checkpoint-000003").glob("*.distcp"))
    whole = part.read_bytes()
    part.write_bytes(whole[:100])                         # half a file, whatever its name says
    assert [path.name for path in checkpoints.complete()] == ["checkpoint-000001"]
    assert checkpoints.resume(True, [model], [optimizer])[0] == 1
    assert "checkpoint-000003 is passed over" in capsys.readouterr().out
    part.write_bytes(bytes(len(whole)))                   # nothing in it, but of the right size
    assert checkpoints.resume(True, [model], [optimizer])[0] == 1
    assert "checkpoint-000003 cannot be read" in capsys.readouterr().err
    checkpoints.save(3, [model], [optimizer], [0, 0, 3], wait=True)      # the same step again
    assert checkpoints.resume(True, [model], [optimizer])[0] == 3
    written = part.stat().st_mtime_ns
    checkpoints.save(3, [model], [optimizer], [0, 0, 3], wait=True)      # the state that is in it
    assert part.stat().st_mtime_ns == written


def test_checkpoints_are_ordered_by_number(tmp_path):
    """By step, not by name"""
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000500", "checkpoint-000600.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text(json.dumps({"files": {}} | {
            "checksum": checksum_of_record({"files": {}})}))
    found = Checkpoints(tmp_path, ARGS, ALONE).complete()
    assert [path.name for path in found] == ["checkpoint-1000000", "checkpoint-999999", "checkpoint-000500"]


def test_drafts_of_killed_runs_are_removed(tmp_path):
    (tmp_path / "checkpoint-000600.tmp").mkdir()
    (tmp_path / "checkpoint-000600.tmp/0.distcp").write_bytes(b"half")
    assert Checkpoints(tmp_path, ARGS, ALONE).resume(True, [], []) == (0, None)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    """--keep 1 after resuming from an older one: the only complete checkpoint stays although a damaged one is newer"""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, SimpleNamespace(**vars(ARGS) | {"keep": 1}), ALONE)
    for step in (2, 6, 4):
        checkpoints.save(step, [model], [optimizer], [0, 0, step], wait=True)
        if step == 6:
            (tmp_path / "checkpoint-000006/done.json").write_text("{")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000004", "checkpoint-000006"]
    assert checkpoints.resume(True, [model], [optimizer])[0] == 4


def test_a_resumed_run_draws_the_same_random_numbers(toy, tmp_path):
    """as a loss with dropout would"""
    def draw(steps):
        words = "--data", f"{toy}/captions/*.tar", "--out", str(tmp_path), "--steps", str(steps), "--batch", "2"
        args = pretrain.options().parse_args([*words, "--resume"])
        dist, model, drawn = engine.setup(args), torch.nn.Linear(3, 3), []

        def update(step, batches, totals):
            drawn.append(torch.rand(()).item())
            return {}
        sources, optimizer = open_sources(args.data), torch.optim.AdamW(model.parameters())
        pretrain.run_steps(args, dist, sources, PictureBuilder(56), [model], [optimizer], update, lambda batch: {})
        return drawn
    first = draw(2) + draw(4)
    shutil.rmtree(tmp_path)
    assert draw(4) == first and len(set(first)) == 4


def test_a_loss_that_is_not_finite_stops_before_the_update(pretrain, base, tmp_path):
    """The first update blows up the weights, so the second's loss is not finite."""
    output = run("pretrain.py", *pretrain, "--lr 1e38 --warmup 1 --out", tmp_path, ok=False)
    assert "step 2: loss or gradient is not finite; saved before the update" in output
    names = output.split("In the batch: ")[1].split()
    assert len(names) == 6 and len(log(tmp_path)) == 1
    done = json.loads((tmp_path / "checkpoint-000001/done.json").read_text())
    assert done["step"] == 1


def test_the_tokenizer_stops_and_saves_too(toy, tmp_path):
    """A loss that is not finite; and batches without a usable sample, which change nothing"""
    words = ["--clip", toy / "clip", TOKENIZER.replace("--attn-resolutions 7", ""), "--disc-start 0 --steps 3"]
    output = run("train_tokenizer.py", *words, "--data", toy / "captions/*.tar", "--lr 1e38 --out", tmp_path / "a",
               ok=False)
    assert "step 2: loss or gradient is not finite" in output and len(output.split("In the batch: ")[1].split()) == 8
    assert (tmp_path / "a/checkpoint-000001/done.json").is_file()
    entries = [{"image": "gone.png", "caption": ["a cat"]}] * 8
    (tmp_path / "coco.json").write_text(json.dumps(entries))
    run("train_tokenizer.py", *words, "--data", tmp_path / "coco.json", "--max-bad 1 --out", tmp_path / "b")
    assert [(line["norm"], line["skipped"]) for line in log(tmp_path / "b")] == [(0, 8), (0, 16), (0, 24)]
    assert [line["perplexity"] for line in log(tmp_path / "b")] == [1, 1, 1]  # no code has been used: not NaN
    # sizes that were left open, named on --resume
    run("train_tokenizer.py", *words, "--data", tmp_path / "coco.json", "--max-bad 1 --out", tmp_path / "b",
        "--resume --steps 4 --attn-resolutions 7")


def test_resume_with_other_options(pretrain, base, tmp_path):
    """Another seed or other data are refused; another batch or engine is reported as not exact."""
    shutil.copytree(base, tmp_path / "run")
    other = base.parent / "eval"
    for words in (["--seed 5"], ["--data", other / "held_out_captions.json", "--images", other]):
        output = run("pretrain.py", *pretrain, *words, "--resume --steps 8 --out", tmp_path / "run", ok=False)
        assert "other files in --data or another --seed" in output
    output = run("pretrain.py", *pretrain, "--batch 4 --engine zero --resume --steps 8 --out", tmp_path / "run")
    assert "engine ddp, now zero; batch 6, now 4; passes of 6, now 4: not exact to the bit" in output


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [("ddp", "float32"), ("ddp", "bfloat16"), ("zero", "float32"),
                                         ("fsdp", "bfloat16")])
def test_two_processes_resume_bit_for_bit(pretrain, tmp_path, kind, dtype):
    words = [*pretrain, f"--steps 5 --save-every 3 --micro-batch 1 --engine {kind} --dtype {dtype}"]
    run("pretrain.py", *words, "--out", tmp_path / "a", processes=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/log.jsonl").unlink()
    shutil.rmtree(tmp_path / "b/checkpoint-000005")
    assert "checkpoint-000003" in run("pretrain.py", *words, "--resume --out", tmp_path / "b", processes=2)
    for before, after in zip(log(tmp_path / "a")[3:], log(tmp_path / "b"), strict=True):
        assert all(before[key] == after[key] for key in ("loss", "text", "image", "norm", "lr"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_samples_are_listed_and_too_many_end_the_run(toy, pretrain, tmp_path):
    entries = json.loads((toy / "eval/held_out_captions.json").read_text())
    for number, name in ((0, "gone.png"), (1, "../../up.png")):
        entries[number]["image"] = name
    entries[2]["caption"] = [" "]
    (tmp_path / "coco.json").write_text(json.dumps(entries))
    words = [*pretrain, "--data", tmp_path / "coco.json", "--images", toy / "eval", "--steps 8"]
    run("pretrain.py", *words, "--max-bad 0.9 --out", tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert {entry["cause"] for entry in listed} == {"no_image", "path_outside", "no_caption"}
    assert {entry["file"] for entry in listed} == {str(tmp_path / "coco.json")}
    assert log(tmp_path / "run")[-1]["skipped"] == len(listed)
    assert sum(log(tmp_path / "run")[-1]["causes"].values()) == len(listed)
    for entry in entries:
        entry["image"] = "gone.png"
    (tmp_path / "coco.json").write_text(json.dumps(entries))
    output = run("pretrain.py", *words, "--max-bad 0.5 --out", tmp_path / "bad", ok=False)
    assert "no_image" in output and "more than --max-bad 0.5" in output
    output = run("pretrain.py", *words, "--steps 1 --out", tmp_path / "short", ok=False)
    assert f"6 of 6 samples cannot be used: no_image 6. {tmp_path}/short/bad_samples.jsonl" in output
    assert f"{toy}/eval/gone.png (no_image)" in output and not (tmp_path / "short/model.safetensors").exists()
