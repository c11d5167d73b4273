"""What a resume must survive: damage after the save, checkpoints of another form, exports that were cut off."""
import json
import resource
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_checkpoints import forge, trained, values_of
from test_lasting import ALONE, ARGS

from common.weights import UserError
from model import Libra
from training.checkpoints import Checkpoints, checksum_of_record


def keeping(folder, keep):
    return Checkpoints(folder, SimpleNamespace(**vars(ARGS) | {"keep": keep}, frozen="a"), ALONE)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path):
    """--keep 1: step 6 has a flipped bit, so the run goes on from 2 and saves 4, which is then the only whole one."""
    _, model, optimizer, values = trained(tmp_path, (2, 6))
    flip(tmp_path / "checkpoint-000006/__0_0.distcp")
    checkpoints = keeping(tmp_path, 1)
    assert checkpoints.resume(True, [model], [optimizer])[0] == 2
    checkpoints.save(4, [model], [optimizer], [0, 0, 4, "x"], wait=True)
    assert keeping(tmp_path, 1).resume(True, [model], [optimizer]) == (4, [0, 0, 4, "x"])
    assert all(map(torch.equal, values_of(model, optimizer), values[2]))
    assert not (tmp_path / "checkpoint-000002").exists()


def test_no_states_are_left_of_a_checkpoint_that_failed(tmp_path):
    """The newer checkpoint has states for the critic, but cannot be read; in the older the critic had none."""
    checkpoints, model, optimizer, _ = trained(tmp_path, ())
    critic = torch.nn.Linear(4, 4)
    critic_optimizer = torch.optim.AdamW(critic.parameters())
    both = [model, critic], [optimizer, critic_optimizer]
    checkpoints.save(1, *both, [0, 0, 1, "x"], wait=True)
    critic(torch.ones(4)).sum().backward()
    critic_optimizer.step()
    checkpoints.save(2, *both, [0, 0, 2, "x"], wait=True)
    for file in (tmp_path / "checkpoint-000002").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    forge(tmp_path / "checkpoint-000002")
    assert checkpoints.resume(True, *both)[0] == 1 and not critic_optimizer.state


@pytest.mark.parametrize("files", [None, 5, [1], {"": []}, {"a": 1}, {"a\0b": [1, "x"]}, {"done.json": ["x", None]}])
def test_records_of_another_form_are_passed_over(tmp_path, files, capsys):
    """even with a checksum that fits"""
    checkpoints, model, optimizer, _ = trained(tmp_path)
    done = tmp_path / "checkpoint-000002/done.json"
    record = json.loads(done.read_text()) | {"files": files}
    del record["checksum"]
    done.write_text(json.dumps(record | {"checksum": checksum_of_record(record)}))
    assert checkpoints.resume(True, [model], [optimizer])[0] == 1
    assert "checkpoint-000002 is passed over" in capsys.readouterr().out


def test_an_index_may_name_nothing_but_its_own_classes(tmp_path):
    """A function of torch, a name with dots, a class of another module: refused before anything is called"""
    checkpoints, model, optimizer, _ = trained(tmp_path)
    index = tmp_path / "checkpoint-000002/.metadata"
    planted = tmp_path / "planted"
    for module, name in (("torch", "save"), ("torch.distributed.checkpoint.metadata", "os.mkdir"), ("os", "mkdir"),
                         ("torch.distributed.checkpoint.filesystem", "os.mkdir"), ("builtins", "open"),
                         ("pathlib", "Path.touch")):
        def text(value):
            return b"\x8c" + bytes([len(value)]) + value.encode()
        index.write_bytes(b"\x80\x04" + text(module) + text(name) + b"\x93" + text(str(planted)) + b"\x85R.")
        forge(index.parent)
        assert checkpoints.resume(True, [model], [optimizer])[0] == 1 and not planted.exists(), name


@pytest.mark.parametrize("limit", [1_000, 300_000])
def test_an_export_on_a_full_disk_looks_like_no_model(tmp_path, limit):
    """Whatever is written before the disk is full, the folder does not load; written again, it does."""
    (tmp_path / "source").mkdir()
    model = tiny.whole(tmp_path / "source")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(UserError, match="cannot be written .*disk full"):
            model.save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "out/config.json").exists() and not list(tmp_path.glob("out/**/*.tmp"))
    with pytest.raises(UserError):
        Libra.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    again = Libra.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
