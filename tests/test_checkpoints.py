"""Checkpoints: flipped bits are noticed, planted code does not run, other frozen weights are refused, exports whole."""
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from scripts import log, run
from test_lasting import ALONE, ARGS

import pretrain as pretrain_module
import train_tokenizer
from common.weights import UserError, save_tensors
from data import Batch
from generate import encode_images
from streams import Streams
from text import IMG, expand_images
from training.checkpoints import Checkpoints, checksum_of_record, fingerprint


def trained(folder, steps=(1, 2), frozen="a"):
    """A small model with two checkpoints in a folder -> checkpoints, model, optimizer, values after each step"""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoints, values = Checkpoints(folder, SimpleNamespace(**vars(ARGS), frozen=frozen), ALONE), {}
    for step in steps:
        model(torch.ones(8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.save(step, [model], [optimizer], [0, 0, step, "x"], wait=True)
        values[step] = values_of(model, optimizer)
    return checkpoints, model, optimizer, values


def values_of(model, optimizer):
    return [p.clone() for p in model.parameters()] + [
        tensor.clone() for p in model.parameters() for tensor in optimizer.state[p].values()]


def forge(path):
    """Write done.json anew for files that were changed on purpose."""
    record = json.loads((path / "done.json").read_text())
    del record["checksum"]
    from training.checkpoints import checksum
    record["files"] = {file.name: [file.stat().st_size, checksum(file)] for file in path.iterdir()
                       if file.name != "done.json"}
    (path / "done.json").write_text(json.dumps(record | {"checksum": checksum_of_record(record)}))


def test_flipped_bits_are_noticed(tmp_path):
    """Single bits of any file: the checkpoint before is taken, never another value"""
    _, model, optimizer, values = trained(tmp_path / "run")
    rng, files = np.random.default_rng(0), sorted((tmp_path / "run/checkpoint-000002").iterdir())
    assert len(files) == 4                                # two of tensors, their index, done.json
    checkpoints = Checkpoints(tmp_path / "run", SimpleNamespace(**vars(ARGS), frozen="a"), ALONE)
    for number in range(250):
        file = files[number % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        step, place = checkpoints.resume(True, [model], [optimizer])
        assert step in (1, 2) and place == [0, 0, step, "x"]
        assert all(map(torch.equal, values_of(model, optimizer), values[step]))
        assert step == 1 or file.name == "done.json", (file, number)              # a blank that becomes another blank
        file.write_bytes(whole)
    assert checkpoints.resume(True, [model], [optimizer])[0] == 2


class Planted:
    def __reduce__(self):
        return os.mkdir, (str(Planted.path),)


@pytest.mark.parametrize("place", ["index", "index entry", "tensors", "bytes"])
def test_planted_code_does_not_run(tmp_path, place, capsys):
    """With checksums that fit: in the index, as a value in it, in place of tensors, as a byte entry"""
    checkpoints, model, optimizer, values = trained(tmp_path / "run")
    newest, Planted.path = tmp_path / "run/checkpoint-000002", tmp_path / "planted"
    index = pickle.loads((newest / ".metadata").read_bytes())
    if place == "index":
        (newest / ".metadata").write_bytes(pickle.dumps(Planted()))
    elif place == "index entry":
        index.planner_data = Planted()
        (newest / ".metadata").write_bytes(pickle.dumps(index))
    else:
        torch.save({"weight": Planted()}, newest / "__0_0.distcp")
        shutil.copyfile(newest / "__0_0.distcp", newest / "__0_1.distcp")
        for info in index.storage_data.values():
            info.offset, info.length = 0, (newest / "__0_0.distcp").stat().st_size
        if place == "bytes":
            from torch.distributed.checkpoint.metadata import BytesStorageMetadata
            index.state_dict_metadata = dict.fromkeys(index.state_dict_metadata, BytesStorageMetadata())
        (newest / ".metadata").write_bytes(pickle.dumps(index))
    forge(newest)
    assert checkpoints.resume(True, [model], [optimizer])[0] == 1
    said = capsys.readouterr().err
    assert "checkpoint-000002 cannot be read" in said and said.count("\n") < 4 and "File " not in said  # no trace
    assert not Planted.path.exists()
    assert all(map(torch.equal, values_of(model, optimizer), values[1]))


@pytest.mark.parametrize("record", ["5", "[]", "null", "{", '{"files": null}', '{"files": 5, "step": [1]}', "[" * 10**5,
                                    '{"step": null, "files": {"done.json": "x"}}', '{"data": ["x"], "checksum": 1}'])
def test_broken_records_are_passed_over(tmp_path, record, capsys):
    checkpoints, model, optimizer, _ = trained(tmp_path)
    (tmp_path / "checkpoint-000002/done.json").write_text(record)
    assert checkpoints.resume(True, [model], [optimizer])[0] == 1
    assert "checkpoint-000002 is passed over" in capsys.readouterr().out


def test_what_was_never_updated_has_no_state(tmp_path):
    """An optimizer that has not begun (a discriminator's) is as new after a save and a resume."""
    checkpoints, model, optimizer, _ = trained(tmp_path)
    critic = torch.nn.Linear(4, 4)
    critic_optimizer = torch.optim.AdamW(critic.parameters())
    before = [p.clone() for p in critic.parameters()]
    both = [model, critic], [optimizer, critic_optimizer]
    checkpoints.save(3, *both, [0, 0, 3, "x"], wait=True)
    assert not critic_optimizer.state and all(map(torch.equal, critic.parameters(), before))
    assert checkpoints.resume(True, *both)[0] == 3 and not critic_optimizer.state


def test_the_writer_has_more_than_one_thread(tmp_path, monkeypatch):
    """With one, torch's opens a context on GPU 0 in every process."""
    writer, made = dcp.FileSystemWriter, []
    monkeypatch.setattr(dcp, "FileSystemWriter", lambda path, **words: made.append(words) or writer(path, **words))
    trained(tmp_path)
    assert made == [{"thread_count": 2}] * 2


def test_another_model_is_refused(tmp_path):
    trained(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    checkpoints = Checkpoints(tmp_path, SimpleNamespace(**vars(ARGS), frozen="a"), ALONE)
    with pytest.raises(UserError, match="none of them complete and of this model"):
        checkpoints.resume(True, [model], [torch.optim.AdamW(model.parameters())])


def test_other_frozen_weights_are_refused(tmp_path):
    _, model, optimizer, _ = trained(tmp_path)
    with pytest.raises(UserError, match="trained around other frozen weights"):
        Checkpoints(tmp_path, SimpleNamespace(**vars(ARGS), frozen="b"), ALONE).resume(True, [model], [optimizer])
    before = fingerprint(model.requires_grad_(False))
    with torch.no_grad():
        model.weight[3, 5] += 1
    assert fingerprint(model) != before


def test_an_old_checkpoint_that_cannot_be_removed(tmp_path, capsys, monkeypatch):
    """costs a warning; the new one counts"""
    checkpoints, model, optimizer, _ = trained(tmp_path)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted", str(path))
    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.save(3, [model], [optimizer], [0, 0, 3, "x"], wait=True)
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert "checkpoint-000001 is no longer needed and cannot be removed" in said
    assert checkpoints.resume(True, [model], [optimizer])[0] == 3


def test_modes_and_full_disks(tmp_path):
    """Weights can be read by whom the umask admits; a full disk names the file and leaves nothing at its name."""
    save_tensors(tmp_path / "model.safetensors", {"x": torch.zeros(1000)})
    assert oct((tmp_path / "model.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~umask())
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        with pytest.raises(UserError, match="other.safetensors.*cannot be written"):
            save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_page_on_a_full_disk_costs_no_run(tmp_path, capsys):
    """The samples page of both trainers"""
    model, page = tiny.whole(tmp_path), tmp_path / "samples/000001.png"
    codes, _ = encode_images(model, pixels := [torch.randn(3, 32, 32)])
    ids, loss_mask = expand_images([1, IMG, 13, 270], [0, 0, 0, 1], codes, model.config)
    streams = Streams.from_ids([ids], model.config, loss_mask=[loss_mask])
    batches = [Batch(streams, torch.stack(pixels), torch.tensor([False]), ["a"], [])]
    page.parent.mkdir()
    for _ in range(2):
        pretrain_module.save_page(ALONE, model, batches, page)
        train_tokenizer.save_samples(ALONE, model.tokenizers.image, batches, page)
        if page.is_symlink():
            break
        assert page.stat().st_size and not capsys.readouterr().err
        page.unlink()
        page.symlink_to("/dev/full")
    assert capsys.readouterr().err.count(f"WARNING: {page} could not be written (") == 2


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_another_llama_of_the_same_shape(toy, pretrain, base, tmp_path):
    shutil.copytree(toy / "llama", tmp_path / "llama")
    tensors = load_file(toy / "llama/model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, tmp_path / "llama/model.safetensors")
    shutil.copytree(base, tmp_path / "run")
    words = [*pretrain, "--steps 8 --resume --out", tmp_path / "run", "--llm"]
    assert "other frozen weights" in run("pretrain.py", *words, tmp_path / "llama", ok=False)
    (tmp_path / "moved").symlink_to(toy / "llama")
    run("pretrain.py", *words, tmp_path / "moved")


def test_the_last_step_is_saved_and_a_broken_export_repeated(pretrain, base, tmp_path):
    """The export comes from the last step's checkpoint: --resume writes it again, equal to the bit, without a step."""
    shutil.copytree(base, tmp_path / "run")
    whole = load_file(tmp_path / "run/model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "run" / name).unlink()
    steps = len(log(tmp_path / "run"))
    for more in ([], ["--export --data gone.tar"]):       # an export needs no data
        run("pretrain.py", *pretrain, "--resume --out", tmp_path / "run", *more)
        again = load_file(tmp_path / "run/model.safetensors")
        assert all(torch.equal(again[name], whole[name]) for name in whole) and len(log(tmp_path / "run")) == steps


def test_frozen_float16_weights_keep_their_bits(toy, pretrain, tmp_path):
    """Pretraining computes in bfloat16 around a float16 LLaMA; the model folder holds the LLaMA's own values."""
    shutil.copytree(toy / "llama", tmp_path / "llama")
    tensors = {name: t.half() for name, t in load_file(toy / "llama/model.safetensors").items()}
    save_file(tensors, tmp_path / "llama/model.safetensors")
    run("pretrain.py", *pretrain, "--steps 2 --dtype bfloat16 --llm", tmp_path / "llama", "--out", tmp_path / "run")
    exported = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in exported.values()} == {torch.float16}     # of two types, it could not be tuned


@pytest.mark.slow
def test_the_tokenizer_stopped_before_the_discriminator(toy, tmp_path):
    """Stopped at step 2 of 5, the discriminator begins at 3: equal to the run that was not stopped, bit for bit"""
    from scripts import TOKENIZER
    words = ["--clip", toy / "clip", "--data", toy / "captions/*.tar", TOKENIZER,
             "--disc-start 3 --save-every 2 --keep 5"]
    run("train_tokenizer.py", *words, "--steps 5 --out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("model.safetensors", "config.json", "checkpoint-000004", "checkpoint-000005", "log.jsonl"):
        path = Path(tmp_path / "part" / name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "going on from" in run("train_tokenizer.py", *words, "--steps 5 --resume --out", tmp_path / "part")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for before, after in zip(log(tmp_path / "whole")[2:], log(tmp_path / "part"), strict=True):
        assert before["loss"] == after["loss"] and before.get("disc") == after.get("disc")
