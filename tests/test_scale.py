"""What a long run must survive and what it must not depend on: engines, processes, kills, full disks, bad samples."""
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

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_pipeline import ROOT, TOKENIZER, base, log, pretrain, run, tokenizer, toy, tuned  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import engine
import plan
from checkpoints import Checkpoints
from config import LibraConfig
from model import Libra
from streams import Streams

ALONE = engine.World(0, 1, torch.device("cpu"), torch.float32)
ARGS = SimpleNamespace(keep=2, engine="ddp", batch=8, micro_batch=8)


def same(one, two, bar=1e-5):
    """Two model folders: every tensor within `bar` of its norm. A bridge's B starts at zero and leaves A next to no
    gradient, where Adam magnifies rounding: 1e-4 there."""
    one, two = (load_file(path / "model.safetensors") for path in (one, two))
    assert one.keys() == two.keys()
    for name in one:
        most = 1e-4 if "bridge" in name else bar
        assert (one[name] - two[name]).norm() <= most * one[name].norm().clamp(min=1e-3), name


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_engines_learn_what_one_process_learns(pretrain, base, tmp_path, kind):  # noqa: F811
    run("pretrain.py", *pretrain, "--micro-batch 1 --engine", kind, "--out", tmp_path, processes=2)
    for one, two in zip(log(base), log(tmp_path), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 * one["loss"]
        assert abs(one["norm"] - two["norm"]) < 1e-4 * one["norm"]
    same(base, tmp_path)


def test_gradients_do_not_depend_on_processes_and_passes(pretrain, tmp_path, monkeypatch):  # noqa: F811
    """One process with one pass; two with four passes each, as replicas and in shares: 1e-6 of each tensor's norm"""
    found = {}
    for name, words, processes in (("one", "", 1), ("ddp", "--micro-batch 1 --engine ddp", 2),
                                   ("zero", "--micro-batch 1 --engine zero", 2),
                                   ("fsdp", "--micro-batch 1 --engine fsdp", 2)):
        monkeypatch.setenv("GRADIENTS", str(tmp_path / name))
        run("tests/gradients.py", *pretrain, "--batch 8 --out", tmp_path / "run", words, processes=processes)
        found[name] = torch.load(tmp_path / name)
    assert sum(float(gradient.norm()) for gradient in found["one"]) > 0
    for one, *others in zip(*found.values(), strict=True):
        assert all((one - other).norm() <= 1e-6 * one.norm() for other in others)


def test_sharded_sft_goes_on_as_replicas(toy, base, tmp_path):  # noqa: F811
    """Two processes with all in shares, then one process alone, then two replicas: as one process throughout"""
    words = ["--model", base, "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
             "--steps 6 --warmup 1 --batch 6 --lr 1e-3 --save-every 2"]
    run("sft.py", *words, "--out", tmp_path / "one")
    run("sft.py", *words, "--engine fsdp --checkpoint-activations --out", tmp_path / "two", processes=2)
    same(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    shutil.rmtree(tmp_path / "three/checkpoint-000004")
    assert "processes 2, now 1" in run("sft.py", *words, "--resume --out", tmp_path / "three")
    same(tmp_path / "one", tmp_path / "three")
    shutil.rmtree(tmp_path / "two/checkpoint-000004")
    run("sft.py", *words, "--resume --engine ddp --out", tmp_path / "two", processes=2)
    same(tmp_path / "one", tmp_path / "two")


def test_one_process_in_shares_and_export(pretrain, base, tmp_path):  # noqa: F811
    run("pretrain.py", *pretrain, "--engine fsdp --out", tmp_path)
    same(base, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run("pretrain.py", *pretrain, "--resume --export --out", tmp_path)                        # what step 6 was
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path))
    assert "holds no checkpoint" in run("pretrain.py", *pretrain, "--export --out", tmp_path / "none", ok=False)
    name = "model.layers.0.self_attn.vision_q_proj.weight_A"
    assert before.keys() == after.keys() and not torch.equal(before[name], after[name])


@pytest.mark.parametrize("words, processes", [("--engine fsdp", 1), ("--micro-batch 1", 1),
                                              ("--engine zero --micro-batch 1", 2)])
def test_offload(pretrain, base, tmp_path, words, processes):  # noqa: F811
    run("pretrain.py", *pretrain, "--offload", words, "--out", tmp_path, processes=processes)
    same(base, tmp_path)
    said = run("pretrain.py", *pretrain, "--offload --engine ddp --out", tmp_path / "no", ok=False)
    assert "give --engine zero or fsdp" in said


def test_a_process_without_pictures_holds_up_no_one(toy, base, tmp_path):  # noqa: F811
    entries = json.loads((toy / "chats/chat.json").read_text())
    for number, entry in enumerate(entries):
        if number % 3:                                    # most samples are words alone
            del entry["image"]
            entry["conversations"][0]["value"] = entry["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    words = ["--model", base, "--data", tmp_path / "chat.json", "--images", toy / "chats/images",
             "--steps 4 --warmup 1 --batch 2 --lr 1e-3"]
    run("sft.py", *words, "--out", tmp_path / "one")
    for kind in ("ddp", "fsdp"):
        run("sft.py", *words, "--engine", kind, "--out", tmp_path / kind, processes=2)
        same(tmp_path / "one", tmp_path / kind)


def begin(script, *words, processes=1):
    words = [word for part in words for word in (part.split() if isinstance(part, str) else [str(part)])]
    start = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return subprocess.Popen([sys.executable, *start, script, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def test_a_dead_process_ends_the_run(pretrain, tmp_path):  # noqa: F811
    job = begin("pretrain.py", *pretrain, "--steps 100000 --timeout 1 --out", tmp_path, processes=2)
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
        assert job.poll() is None, job.stdout.read()
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = job.communicate(timeout=90)
    assert job.returncode != 0 and "SIGKILL" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_being_asked_to_end_ends_with_a_checkpoint(pretrain, tmp_path, processes, number):  # noqa: F811
    job = begin("pretrain.py", *pretrain, "--steps 100000 --save-every 1000 --out", tmp_path, processes=processes)
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
        assert job.poll() is None, job.stdout.read()
    if number == signal.SIGINT:                           # Ctrl-C reaches all processes of the terminal
        os.killpg(job.pid, number)
    else:                                                 # Slurm's tells torchrun, torchrun its processes
        job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    step = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert f"stopped after step {step}" in said and (tmp_path / f"checkpoint-{step:06d}/done.json").is_file()
    assert "Traceback" not in said or processes == 2      # torchrun's own
    assert processes == 2 or job.returncode == 0          # torchrun itself reports that it was told to end


def test_kill_9_loses_no_more_than_since_the_last_checkpoint(pretrain, tmp_path):  # noqa: F811
    """Twenty kills at random moments, a save after every step: the newest complete checkpoint always goes on, the steps
    never go back beyond it, and the end equals that of a run that nobody disturbed."""
    pretrain = [*pretrain, "--warmup 1000 --lr 0.1"]      # a rate that does not know how many steps there will be
    words = [*pretrain, "--steps 400 --save-every 1"]
    dice, reached, drafts = random.Random(0), 0, 0
    for kill in range(20):
        job = begin("pretrain.py", *words, "--resume --out", tmp_path / "killed")
        before = len(lines(tmp_path / "killed"))
        while len(lines(tmp_path / "killed")) < before + 1 and job.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.8)
        os.killpg(job.pid, signal.SIGKILL)
        said = job.communicate()[0]
        assert job.returncode == -signal.SIGKILL, said    # it was at work
        drafts += bool(list((tmp_path / "killed").glob("*.tmp")))
        complete = Checkpoints(tmp_path / "killed", ARGS, ALONE).complete()
        step = int(complete[0].name[-6:]) if complete else 0
        assert step >= reached, f"kill {kill}: {said}"
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
    part.write_bytes(bytes(len(whole)))                   # nothing in it, but of the right size
    assert checkpoints.resume(True, [model], [optimizer])[0] == 1
    assert "checkpoint-000003 cannot be read" in capsys.readouterr().err
    checkpoints.save(3, [model], [optimizer], [0, 0, 3], wait=True)      # the same step again
    assert checkpoints.resume(True, [model], [optimizer])[0] == 3 and not list(tmp_path.glob("*.old"))


def test_checkpoints_are_ordered_by_number(tmp_path):
    """By step, not by name; the one that was moved aside to be written again counts until the new one is there"""
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000500.old", "checkpoint-000500.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text('{"files": {}}')
    found = Checkpoints(tmp_path, ARGS, ALONE).complete()
    assert [path.name for path in found] == ["checkpoint-1000000", "checkpoint-999999", "checkpoint-000500.old"]


def test_random_states_come_back(tmp_path):
    """What python, numpy and torch draw behind a save, they draw again behind a load"""
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path, ARGS, ALONE)
    checkpoints.save(1, [model], [optimizer], [0, 0, 1], wait=True)
    first, second = draw(), draw()
    checkpoints.resume(True, [model], [optimizer])
    assert draw() == first != second


def test_a_loss_that_is_not_finite_stops_before_the_update(pretrain, base, tmp_path):  # noqa: F811
    """Weights blown up by the first update: the second's loss is no number. What was saved is what it met."""
    said = run("pretrain.py", *pretrain, "--lr 1e38 --warmup 1 --out", tmp_path, ok=False)
    assert "step 2: loss or gradient is not finite; saved before the update" in said
    names = said.split("In the batch: ")[1].split()
    assert len(names) == 6 and len(log(tmp_path)) == 1
    done = json.loads((tmp_path / "checkpoint-000001/done.json").read_text())
    assert done["step"] == 1


def test_the_tokenizer_stops_and_saves_too(toy, tmp_path):  # noqa: F811
    """A loss that is not finite; and a batch of which nothing is usable teaches nothing and ends nothing"""
    words = ["--clip", toy / "clip", TOKENIZER, "--disc-start 0 --steps 3"]
    said = run("train_tokenizer.py", *words, "--data", toy / "captions/*.tar", "--lr 1e38 --out", tmp_path / "a",
               ok=False)
    assert "step 2: loss or gradient is not finite" in said and len(said.split("In the batch: ")[1].split()) == 8
    assert (tmp_path / "a/checkpoint-000001/done.json").is_file()
    entries = [{"image": "gone.png", "caption": ["a cat"]}] * 8
    (tmp_path / "coco.json").write_text(json.dumps(entries))
    run("train_tokenizer.py", *words, "--data", tmp_path / "coco.json", "--max-bad 1 --out", tmp_path / "b")
    assert [(line["norm"], line["skipped"]) for line in log(tmp_path / "b")] == [(0, 8), (0, 16), (0, 24)]


def test_the_same_run_goes_on_or_says_why_not(pretrain, base, tmp_path):  # noqa: F811
    """Another seed or other data: its place in the data means nothing. Another batch or engine: not exact, and said."""
    shutil.copytree(base, tmp_path / "run")
    other = base.parent / "eval"
    for words in (["--seed 5"], ["--data", other / "held_out_captions.json", "--images", other]):
        said = run("pretrain.py", *pretrain, *words, "--resume --steps 8 --out", tmp_path / "run", ok=False)
        assert "other files in --data or another --seed" in said
    said = run("pretrain.py", *pretrain, "--batch 4 --engine zero --resume --steps 8 --out", tmp_path / "run")
    assert "engine ddp, now zero; batch 6, now 4; passes of 6, now 4: not exact to the bit" in said


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_two_processes_resume_bit_for_bit(pretrain, tmp_path, kind):  # noqa: F811
    words = [*pretrain, f"--steps 5 --save-every 3 --micro-batch 1 --engine {kind}"]
    run("pretrain.py", *words, "--out", tmp_path / "a", processes=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/log.jsonl").unlink()
    assert "checkpoint-000003" in run("pretrain.py", *words, "--resume --out", tmp_path / "b", processes=2)
    for before, after in zip(log(tmp_path / "a")[3:], log(tmp_path / "b"), strict=True):
        assert all(before[key] == after[key] for key in ("loss", "text", "image", "norm", "lr"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_samples_are_listed_and_too_many_end_the_run(toy, pretrain, tmp_path):  # noqa: F811
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
    said = run("pretrain.py", *words, "--max-bad 0.5 --out", tmp_path / "bad", ok=False)
    assert "no_image" in said and "more than --max-bad 0.5" in said


# ---------------------------------------------------------------- the plan

def test_checkpointed_layers_keep_less_and_learn_the_same():
    config = LibraConfig(vocab_size=300, hidden_size=64, intermediate_size=172, num_hidden_layers=6,
                         num_attention_heads=4, max_position_embeddings=256, vision_vocab_size=66,
                         image_feature_resolution=8, contiguous_signal_size=64)
    streams, model = plan.batch_of(config, 2, 40, "pretrain"), Libra(config)
    signal, found = torch.randn(len(streams.image_ids), 64), []
    for again in (False, True):
        model.checkpoint_activations = again
        kept = plan.Kept(model.parameters())
        with kept.hooks:
            loss = model.loss(streams, signal)
        model.zero_grad()
        loss.backward()
        found.append((kept.bytes, [p.grad for p in model.parameters()]))
    planned = plan.activations(config, streams, True, torch.float32, True)
    assert found[1][0] < 0.2 * found[0][0] and found[1][0] < planned < 0.6 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_compiled_layers_serve_every_batch():
    """--compile: a layer is one graph without a break; once each way to cut rows has been met in two sizes, other
    lengths, rows and images need no new one; and nothing changes in what is computed"""
    model, counter = tiny.libra(max_position_embeddings=128), CompileCounterWithBackend("eager")
    plain = tiny.libra(max_position_embeddings=128)
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    frames = []
    for images, lengths in ((1, (20, 20)), (1, (25, 19)), (1, (30, 30, 30)), (2, (30, 17, 18)), (1, (40, 33, 21, 17)),
                            (1, (22, 22)), (2, (31, 60)), (1, (30, 21, 20, 23)), (3, (50, 62, 44)), (1, (33, 33, 33))):
        pairs = [bench.sequence(model.config, length, images, seed) for seed, length in enumerate(lengths)]
        streams = Streams.of([ids for ids, _ in pairs], model.config, counted=[counted for _, counted in pairs])
        signal = torch.randn(images * len(lengths), 4, 12)
        losses = [one.loss(streams, signal) for one in (model, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[4] == frames[-1] <= 5, frames
    for one, two in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_compiled_training(pretrain, base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))    # a kill leaves half a file in torch's
    run("pretrain.py", *pretrain, "--compile --out", tmp_path)
    for one, two in zip(log(base), log(tmp_path), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 * one["loss"]
    same(base, tmp_path, 1e-4)                            # other kernels round otherwise


@pytest.mark.parametrize("tune", [False, True])
def test_plan_counts_what_torch_counts(tune):
    """FLOPs against torch's counter, what the backward pass keeps against a real pass"""
    config = LibraConfig(vocab_size=300, hidden_size=128, intermediate_size=344, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=256, vision_vocab_size=66,
                         image_feature_resolution=8, contiguous_signal_size=64)
    streams = plan.batch_of(config, 2, 40, "sft" if tune else "pretrain")
    model = Libra(config)
    for module in [] if tune else model.llama():
        module.requires_grad_(False)
    signal = torch.zeros(len(streams.image_ids), config.contiguous_signal_size)
    kept = plan.Kept(model.parameters())
    counter = FlopCounterMode(display=False)
    with kept.hooks:
        model.loss(streams, signal)
    with counter, sdpa_kernel(SDPBackend.MATH):           # as plain products, which torch counts: whole squares
        model.loss(streams, signal).backward()
    counts = {"text": len(streams.text_ids), "image": len(streams.image_ids), "text_targets": len(streams.text_rows),
              "image_targets": len(streams.image_rows), "squares": sum(n * n for n in streams.lengths), "images": 0}
    eye = plan.ImageTokenizerConfig(clip=plan.CLIP_L)
    ours = plan.flops_of(model, eye)(counts)
    assert abs((sum(ours.values()) + ours["attention"]) / counter.get_total_flops() - 1) < 0.1
    planned = plan.activations(config, streams, tune, torch.float32, False)
    assert abs(planned / kept.bytes - 1) < 0.1
    assert plan.activations(config, streams, tune, torch.float32, True) < 0.6 * planned


def test_plan_of_the_paper():
    said = run("pretrain.py", "--plan --nproc 8 --memory 80 --micro-batch 8")
    assert "LLaMA                       6.738 B" in said and "expert                      4.229 B" in said
    assert "9% of that GPU's peak" in said and "the first that fits 80 GB" in said
    assert "learns" in run("sft.py", "--plan --micro-batch 1")
    said = run("train_tokenizer.py", "--plan --memory 80")
    assert "decoder" in said and "the first that fits 80 GB: ddp" in said
