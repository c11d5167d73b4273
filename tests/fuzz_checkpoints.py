"""Random damage to checkpoints. Each case of CASES writes a run of two into the empty `folder`, damages the newer one
and resumes: that must end at one of the two, with its values to the bit, or with a UserError."""
import json
import pickle
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from test_checkpoints import forge, trained, values_of
from test_lasting import ALONE, ARGS

from training.checkpoints import Checkpoints, checksum_of_record

VALUES = [None, True, 0, 5, -1, 1e300, float("nan"), 10 ** 30, 2 ** 62, "", "x", "../x", "a\0b", [], [1], [[[]]], {},
          {"a": 1}, {"": []}, {"../..": [1, "x"]}, {"done.json": ["x", None]}]


@cache
def original():
    folder = tempfile.TemporaryDirectory()
    _, model, optimizer, values = trained(Path(folder.name))
    return folder, model, optimizer, values


def copy(folder):
    """-> the newer checkpoint"""
    shutil.copytree(original()[0].name, folder, dirs_exist_ok=True)
    return folder / "checkpoint-000002"


def pick(rng, values):
    return values[rng.integers(len(values))]


def resume(folder, forged=False):
    """forged: with checksums that fit, so other values may be loaded, but only from the newer checkpoint"""
    _, model, optimizer, values = original()
    checkpoints = Checkpoints(folder, SimpleNamespace(**vars(ARGS), frozen="a"), ALONE)
    step, place = checkpoints.resume(True, [model], [optimizer])
    if not forged or step == 1:
        assert step in (1, 2) and place == [0, 0, step, "x"]
        assert all(map(torch.equal, values_of(model, optimizer), values[step])), "other values, in silence"


def change_bytes(rng, path):
    content, kind = bytearray(path.read_bytes()), rng.integers(6)
    first, second = sorted(rng.integers(len(content), size=2))
    if kind == 0:
        content[first] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[first:]
    elif kind == 2:
        del content[first:first + int(rng.integers(1, 30))]
    elif kind == 3:
        content[first:first] = rng.bytes(int(rng.integers(1, 30)))
    elif kind == 4:
        content[first:first + 20] = content[second:second + 20]
    else:
        content = bytearray(pick(rng, [b"", b"{}", b"[" * 10 ** 5, b"\x80\x04N.", b"9" * 5000, rng.bytes(100)]))
    path.write_bytes(content)


def flipped_bits(rng, folder):
    file = pick(rng, sorted(copy(folder).iterdir()))
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    resume(folder)


def damaged_files(rng, folder):
    change_bytes(rng, pick(rng, sorted(copy(folder).iterdir())))
    resume(folder)


def forged_files(rng, folder):
    """Damage under checksums that fit reaches torch's readers and ours."""
    newest = copy(folder)
    change_bytes(rng, newest / pick(rng, [".metadata", "__0_0.distcp", "__0_1.distcp"]))
    forge(newest)
    resume(folder, forged=True)


def forged_index(rng, folder):
    newest = copy(folder)
    index = pickle.loads((newest / ".metadata").read_bytes())
    parts = [index, *index.storage_data.values(), *index.state_dict_metadata.values()]
    for _ in range(rng.integers(1, 4)):
        part = pick(rng, parts)
        value = pick(rng, [*VALUES, torch.Size([8]), torch.Size([2 ** 40]), "/dev/null", "__0_1.distcp", torch.int64])
        object.__setattr__(part, pick(rng, sorted(vars(part))), value)
    (newest / ".metadata").write_bytes(pickle.dumps(index))
    forge(newest)
    resume(folder, forged=True)


def other_record(rng, folder):
    """A field of done.json is another; that of the files even with a checksum that fits."""
    done = copy(folder) / "done.json"
    record = json.loads(done.read_text())
    name = pick(rng, [*record, "x"])
    record[name] = pick(rng, VALUES)
    if name == "files":
        del record["checksum"]
        record["checksum"] = checksum_of_record(record)
    done.write_text(json.dumps(pick(rng, [record, record[name], [record]])))
    resume(folder)


CASES = {case.__name__: case for case in (flipped_bits, damaged_files, forged_files, forged_index, other_record)}
