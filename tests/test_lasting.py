"""A long run survives kills, signals, dead processes, full disks and bad samples, and resumes bit for bit."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import TOKENIZER, Fork, log, run, start

from training import engine
from training.checkpoints import Checkpoints, checksum_of_record

ALONE = engine.Dist(0, 1, torch.device("cpu"), torch.float32)
ARGS = SimpleNamespace(keep=2, engine="ddp", batch=8, micro_batch=8)


@pytest.mark.slow
def test_a_dead_process_ends_the_run(pretrain, tmp_path):
    job = start("pretrain.py", *pretrain, "--steps 100000 --timeout 1 --out", tmp_path, processes=2)
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
        assert job.poll() is None, job.stdout.read()
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = job.communicate(timeout=90)
    assert job.returncode != 0 and "SIGKILL" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_the_run_with_a_checkpoint(pretrain, tmp_path, processes, number):
    job = start("pretrain.py", *pretrain, "--steps 100000 --save-every 1000 --out", tmp_path, processes=processes)
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
        assert job.poll() is None, job.stdout.read()
    if number == signal.SIGINT:                           # Ctrl-C reaches all processes of the terminal
        os.killpg(job.pid, number)
    else:                                                 # Slurm's tells torchrun, torchrun its processes
        job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    step = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert f"stopped after step {step}" in output and (tmp_path / f"checkpoint-{step:06d}/done.json").is_file()
    assert "Traceback" not in output or processes == 2      # torchrun's own
    assert processes == 2 or job.returncode == 0          # torchrun itself reports that it was told to end


@pytest.mark.slow
def test_kill_9_loses_no_more_than_since_the_last_checkpoint(pretrain, tmp_path):
    """Twenty kills at random moments of a run that saves every step: it always resumes from the newest complete
    checkpoint, and ends with the weights of an undisturbed run."""
    pretrain = [*pretrain, "--warmup 1000 --lr 0.1"]      # still warming up: the rate does not depend on --steps
    words = [*pretrain, "--steps 400 --save-every 1"]
    rng, reached, drafts = random.Random(0), 0, 0
    for kill in range(20):
        job = Fork("pretrain.py", *words, "--resume --out", tmp_path / "killed")
        before = len(lines(tmp_path / "killed"))
        while len(lines(tmp_path / "killed")) < before + 1 and job.process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.random() * 0.8)
        job.process.kill()
        job.process.join()
        output = job.output()
        assert job.process.exitcode == -signal.SIGKILL, output                                  # it was running
        drafts += bool(list((tmp_path / "killed").glob("*.tmp")))
        complete = Checkpoints(tmp_path / "killed", ARGS, ALONE).complete()
        step = int(complete[0].name[-6:]) if complete else 0
        assert step >= reached, f"kill {kill}: {output}"
        reached = step
    assert drafts                                         # some were in the middle of a save
    words = [*pretrain, f"--steps {reached + 3}"]
    run("pretrain.py", *words, "--resume --out", tmp_path / "killed")
    run("pretrain.py", *words, "--out", tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert reached > 5 and all(torch.equal(one[name], two[name]) for name in one)


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
    assert checkpoints.resume(True, [model], [optimizer])[0] == 3 and not list(tmp_path.glob("*.old"))


def test_checkpoints_are_ordered_by_number(tmp_path):
    """By step, not by name; one that was moved aside (.old) counts until its successor is complete"""
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000500.old", "checkpoint-000500.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text(json.dumps({"files": {}} | {
            "checksum": checksum_of_record({"files": {}})}))
    found = Checkpoints(tmp_path, ARGS, ALONE).complete()
    assert [path.name for path in found] == ["checkpoint-1000000", "checkpoint-999999", "checkpoint-000500.old"]


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


def test_random_states_are_restored(tmp_path):
    """What python, numpy and torch draw after a save, they draw again after a load"""
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, ARGS, ALONE)
    checkpoints.save(1, [model], [optimizer], [0, 0, 1], wait=True)
    first, second = draw(), draw()
    checkpoints.resume(True, [model], [optimizer])
    assert draw() == first != second


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
    words = ["--clip", toy / "clip", TOKENIZER, "--disc-start 0 --steps 3"]
    output = run("train_tokenizer.py", *words, "--data", toy / "captions/*.tar", "--lr 1e38 --out", tmp_path / "a",
               ok=False)
    assert "step 2: loss or gradient is not finite" in output and len(output.split("In the batch: ")[1].split()) == 8
    assert (tmp_path / "a/checkpoint-000001/done.json").is_file()
    entries = [{"image": "gone.png", "caption": ["a cat"]}] * 8
    (tmp_path / "coco.json").write_text(json.dumps(entries))
    run("train_tokenizer.py", *words, "--data", tmp_path / "coco.json", "--max-bad 1 --out", tmp_path / "b")
    assert [(line["norm"], line["skipped"]) for line in log(tmp_path / "b")] == [(0, 8), (0, 16), (0, 24)]


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
@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_two_processes_resume_bit_for_bit(pretrain, tmp_path, kind):
    words = [*pretrain, f"--steps 5 --save-every 3 --micro-batch 1 --engine {kind}"]
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
