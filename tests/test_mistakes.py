"""A user's mistakes end in one sentence, before any work is lost."""
import argparse
import io
import json
import os
import sys
import tarfile

import pytest
import torch
from scripts import TOKENIZER, run, split

import data
import evaluate
import generate
import pretrain as stage1
import sft
import train_tokenizer
from common import cli as command
from common.pictures import open_image
from common.sources import list_shard, open_source
from common.weights import UserError
from monolithic import haplovl
from training import engine, plan
from training.checkpoints import Checkpoints


def message_of(main, words, monkeypatch, capsys):
    """What a script prints when it fails"""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        command.run(main)
    assert end.value.code == 2
    return capsys.readouterr().err + str(end.value.code)


@pytest.mark.parametrize("main, words, sentence", [
    (stage1.main, "--batch 0", "--batch: 0: expected at least 1"),
    (stage1.main, "--batch -4", "--batch: -4: expected at least 1"),
    (stage1.main, "--keep 0", "--keep: 0: expected at least 1"),
    (stage1.main, "--text-to-image 2", "expected at least 0 and at most 1"),
    (stage1.main, "--betas 0.9 1", "--betas: 1: expected at least 0 and below 1"),
    (stage1.main, "--steps many", "'many' is no whole number"),
    (stage1.main, "--batch 1000000000000", "--batch: 1000000000000: expected at least 1 and at most 1000000"),
    (stage1.main, "--steps 1000000000000", "expected at least 1 and at most 1000000000"),
    (stage1.main, "--seed 4294967296", "expected at least 0 and at most 4294967295"),
    (stage1.main, "--timeout 1e300", "--timeout: 1e300: expected at most 1000000 and above 0"),
    (stage1.main, "", "runs/toy/llama is not there: `make demo` makes it"),
    (stage1.main, "--llm runs/toy/lama", "runs/toy/lama is not there: check the name"),
    (stage1.main, "--llm nowhere", "nowhere is not there: check the name"),
    (stage1.main, "--lr nan", "--lr: nan: expected at least 0"),
    (stage1.main, "--plan --nproc 7", "does not divide into 7 GPUs"),
    (stage1.main, "--device gpu", "--device gpu: cannot be used"),
    (train_tokenizer.main, "--plan --codebook-size 1", "codebook_size is 1, expected"),
    (train_tokenizer.main, "--plan --ch-mult 1 --attn-resolutions 24", "the levels of ch_mult are 1, expected 2 to 16"),
    (train_tokenizer.main, "--plan --ch 33", "33 does not divide by 32"),
    (train_tokenizer.main, "--plan --encoder scratch --clip-weight 1", "has no CLIP to compare in"),
    (train_tokenizer.main, "--plan --vgg vgg16.pth", "LPIPS needs both --vgg and --lpips"),
    (train_tokenizer.main, "--out README.md", "README.md is a file; expected a folder"),
    (train_tokenizer.main, "--clip tests", "tests/config.json: no such file"),
    (evaluate.main, "--task gqa --data x --out nowhere/x.json", "'nowhere/x.json' cannot be written"),
    (evaluate.main, "--task gqa --data README.md --out README.md", "README.md is --data too"),
    (evaluate.main, "--task gqa --data README.md --out x.json --submission x.json", "x.json is --data too, or"),
    (evaluate.main, "--task mme --data nowhere", "nowhere is not there"),
    (evaluate.main, "--task mme --data tests --submission README.md", "README.md cannot be written: expected a folder"),
    (evaluate.main, "--task gqa --data README.md --submission tests", "tests cannot be written: expected a file"),
    (evaluate.main, "--task pope --data README.md ./README.md --submission x", "have the same name: rename one"),
    (evaluate.main, "--task seed --data x --likelihood --prompt=", "does not go with --prompt ''"),
    (generate.main, "--draw a --image b", "--image belongs to a question or a chat, not to --draw"),
    (generate.main, "question --out x.png", "--out belongs to"),
    (generate.main, "README.md", "the question is the name of a file"),
    (generate.main, "--batch nowhere.jsonl", "nowhere"),
    (generate.main, "--batch README.md --out ./README.md", "README.md is read, and would be overwritten"),
    (generate.main, "--complete out.png", "out.png is read, and would be overwritten"),
    (plan.main, "foo --gpus 8", "the first word is 'foo', expected pretrain, sft, train_tokenizer or generate"),
    (plan.main, "", "the first word is '', expected pretrain, sft, train_tokenizer or generate"),
    (data.main, "tests", "tests is a folder"),
    (data.main, "x.tar@0", "stands for no file")])
def test_one_sentence(main, words, sentence, monkeypatch, capsys, toy, tmp_path):
    monkeypatch.chdir(tmp_path)                           # where no runs/ is
    (tmp_path / "README.md").touch()
    (tmp_path / "tests").mkdir()
    words = words.split() + (["--llm", toy / "llama"] if main is data.main else [])
    assert sentence in message_of(main, words, monkeypatch, capsys)


@pytest.mark.parametrize("error, code, sentence", [
    (UserError("a.json: cut off"), 2, "error: a.json: cut off"),
    (FileNotFoundError(2, "No such file", "a.json"), 2, "error: a.json: No such file"),
    (OSError(28, "No space left on device"), 2, "error: the system says: No space left on device"),
    (TypeError("5 is no list"), 1, "error: TypeError: 5 is no list (our own fault; --debug shows where)"),
    (AssertionError(), 1, "error: AssertionError: no reason given (our own fault"),
    (MemoryError(), 1, "error: MemoryError: no reason given (the machine's"),
    (RuntimeError("the compiler raised:\nAssertionError: no\nmore"), 1,
     "error: RuntimeError: the compiler raised: AssertionError: no ("),
    (RuntimeError("Original Traceback (most recent call last):\n  File\nKeyError: 'a'"), 1, "error: KeyError: 'a' ("),
    (ConnectionResetError(104, "Connection reset by peer"), 1, "a data reader, or another process of the run, has"),
    (BrokenPipeError(32, "Broken pipe"), 141, ""), (KeyboardInterrupt(), 130, "interrupted")])
def test_errors_end_with_one_sentence_and_a_code(error, code, sentence, monkeypatch, capfd):
    def fail():
        assert sys.argv == ["script", "--out", "x"]       # main's parser does not see --debug
        raise error
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    for debug in ([], ["--debug"]):
        monkeypatch.setattr(sys, "argv", ["script", *debug, "--out", "x"])
        with pytest.raises(SystemExit) as end:
            command.run(fail)
        printed = capfd.readouterr().err
        assert end.value.code == code and sentence in printed
        assert ("in fail" in printed) == bool(debug) and (debug or printed.count("\n") == (code != 141))


def test_folders_of_another_kind(toy, pretrain, base, tmp_path, monkeypatch, capsys):
    words = " ".join(map(str, pretrain)).split()
    for more, sentence in (
            (["--llm", base, "--bridge-rank", "4"], "is a Libra already, made with bridge_rank 8, now 4"),
            (["--llm", base, "--discrete-only"], "is a Libra already, made with discrete_only False, now True"),
            (["--plan", "--llm", toy / "llama"], "a picture has 578 tokens")):
        words_here = words if more[0] == "--llm" else []
        assert sentence in message_of(stage1.main, [*words_here, "--out", tmp_path / "x", *more], monkeypatch, capsys)
    assert "model_type is 'llama'; expected a CLIP folder" in message_of(
        train_tokenizer.main, ["--clip", toy / "llama", "--out", tmp_path / "x"], monkeypatch, capsys)
    (tmp_path / "narrow").mkdir()
    config = json.loads((toy / "llama/config.json").read_text())
    (tmp_path / "narrow/config.json").write_text(json.dumps(config | {"head_dim": 16}))
    words = ["--stage", 1, "--plan", "--llm", tmp_path / "narrow", "--clip", toy / "clip"]
    assert "heads of 16, where HaploVL's share hidden_size evenly" in message_of(
        haplovl.main, words, monkeypatch, capsys)
    words = ["--task", "exact", "--data", toy / "eval/held_out_questions.json", "--images", toy / "eval/images"]
    assert "the answers would be lost" in message_of(evaluate.main, words, monkeypatch, capsys)
    with pytest.raises(UserError, match="is a folder or a device, expected a file"):
        open_image(tmp_path)


def test_another_length_is_reported(tmp_path, capsys):
    args = argparse.Namespace(keep=1, timeout=1, engine="ddp", batch=2, micro_batch=2, max_length=60)
    checkpoints = Checkpoints(tmp_path, args, engine.Dist(0, 1, torch.device("cpu"), torch.float32))
    checkpoints.check("checkpoint-000002", {"max_length": "700"})
    assert "was trained with max_length 700, now 60" in capsys.readouterr().out
    with pytest.raises(UserError, match="ema 0.9, now None. There is no such option, so start a new run in another"):
        checkpoints.check("checkpoint-000002", {"ema": "0.9"})


def test_help_of_the_plan(monkeypatch, capsys):
    for word in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["plan", word])
        command.run(plan.main)
        assert capsys.readouterr().out.startswith("What a run will need")


def test_a_log_on_a_full_disk_costs_its_lines():
    full = open("/dev/full", "w")                         # noqa: SIM115
    command.say("a line", file=full)
    with pytest.raises(OSError, match="No space"):
        full.close()
    with pytest.raises(ValueError, match="closed"):       # any other error is one
        command.say("a line", file=full)


def test_names_that_are_not_utf_8_are_printed(monkeypatch):
    """A name in Latin-1, a lone surrogate of a JSON file, on an output that takes UTF-8 only"""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "utf-8", "strict"))
    monkeypatch.setattr(sys, "argv", ["script"])
    command.run(lambda: print("caf\udce9.tar", json.dumps({"id": "\ud800é"}, ensure_ascii=False), flush=True))
    assert output.getvalue().decode() == 'caf\\udce9.tar {"id": "\\ud800é"}\n'


def test_held_out_files_by_other_words(tmp_path, monkeypatch):
    """The file of --data is found in --val-data however its path is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption": "a"}]')
    (tmp_path / "link.json").symlink_to("a.json")
    for name in ("./a.json", str(tmp_path / "a.json"), "link.json"):
        args = argparse.Namespace(data=["a.json"], val_data=[name], images="", export=False)
        with pytest.raises(UserError, match="a.json is in --data too: a held-out loss needs other samples"):
            stage1.train(args, None, None, None, None, None, None)


def test_other_vgg_weights_are_other_frozen_weights(toy, tmp_path, monkeypatch):
    class Stub(torch.nn.Linear):
        def read(self, vgg, _):
            self.weight.data.fill_(float(vgg))
            return self.requires_grad_(False)
    frozen = []
    monkeypatch.setattr(train_tokenizer, "LPIPS", lambda: Stub(2, 2))
    monkeypatch.setattr(train_tokenizer, "run_steps", lambda args, *_, **__: frozen.append(args.frozen))
    words = split(["--clip", toy / "clip", "--data", toy / "captions/*.tar", TOKENIZER, "--out", tmp_path / "x"])
    for vgg in "121":
        monkeypatch.setattr(sys, "argv", ["script", *words, "--vgg", vgg, "--lpips", "x"])
        train_tokenizer.main()
    assert frozen[0] == frozen[2] != frozen[1]


def test_inputs_and_models_are_not_overwritten(toy, pretrain, base, tmp_path, monkeypatch, capsys):
    words = " ".join(map(str, pretrain)).split()
    assert "it would be overwritten" in message_of(
        train_tokenizer.main, ["--clip", toy / "clip", "--out", toy / "clip"], monkeypatch, capsys)
    assert "it would be overwritten" in message_of(sft.main, ["--model", base, "--out", base], monkeypatch, capsys)
    (tmp_path / "config.json").write_text("{}")
    for more in ([], ["--resume"]):
        assert "a model that this run would overwrite" in message_of(
            stage1.main, [*words, "--out", tmp_path, *more], monkeypatch, capsys)


def test_a_run_goes_on_as_what_it_was(toy, pretrain, base):
    before = (base / "recipe.json").read_text()
    for words, sentence in (("--no-bridge", "no_bridge False, now True"), ("--bridge-rank 4", "bridge_rank 8, now 4"),
                            ("--steps 2", "this run has made 7 already")):
        assert sentence in run("pretrain.py", *pretrain, "--resume --out", base, words, ok=False)
    assert (base / "recipe.json").read_text() == before   # a refused run writes nothing


def test_a_duplicate_key_is_another_sample_and_gzip_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            for ending in ("jpg", "txt"):
                member = tarfile.TarInfo(f"k.{ending}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % n))
    sources = [open_source(tmp_path / "a.tar")]
    assert [key for _, key, _ in list_shard(sources, (0, 0))] == ["k", "k #2", "k #3"]
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match="compressed"):
        list_shard([open_source(tmp_path / "b.tar")], (0, 0))


@pytest.mark.parametrize("value", [
    {"images": [{"filename": "a.jpg", "sentences": [{"raw": "a"}], "split": "val"}]},
    {"images": [{"filename": "a.jpg", "split": "train"}]}, [5]])
def test_captions_that_are_none(value, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="a.json"):
        open_source(tmp_path / "a.json")


def test_swapped_is_another_picture():
    items = [{"image": name} for name in "aaabbc"]
    assert evaluate.swapped_images(items) == list("bbbcca")
    assert evaluate.swapped_images([{"image": name} for name in "abac"]) == list("bcba")
    with pytest.raises(UserError, match="one picture"):
        evaluate.swapped_images(items[:2])


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.check_device("cuda:1").index == 1
    with pytest.raises(UserError, match="--device cuda:2: cannot be used .GPUs here: 2"):
        command.check_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(UserError, match="cuda:5: cannot be used"):
        engine.init_distributed("cuda")
