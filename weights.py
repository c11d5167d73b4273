"""Files: settings (JSON, the published tokenizer's YAML) and weights (safetensors, Hugging Face shards, pickles).

Nothing here is in the paper. The stages keep their weights under the published names (no renaming stands between a file
and a module), so loading is: map the file into memory, check every name and shape, hand the tensors to the module.
Nothing is copied: a folder of 22 GB loads in seconds and its pages are read when they are first used.
"""
import json
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode


class UserError(Exception):
    """A mistake in what the user gave (a file, an option, a sample): the scripts print its text and no traceback."""


def read_json(path, kind=dict):
    """-> the parsed file; a UserError that names the file where it is missing, broken or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {'object' if kind is dict else 'object or list'}")
    return value


def reason(error):
    """What the system says, without its number and the path, which stands before it"""
    return getattr(error, "strerror", None) or error


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({reason(error)})") from None


def write_json(path, value):
    """Atomic: a reader finds the old file or the new one, never half of it."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(draft)
    os.replace(draft, path)


def sync(*paths):
    """Files and folders to the disk itself: a loss of power empties what has a name but is in memory only"""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def read_yaml(path):
    """The subset of YAML that vision_tokenizer_config.yaml uses: nested `key: value`, [lists], # comments."""
    top = {}
    levels = [(-1, top)]                                  # (indent, mapping) from the outside in
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not line or line == "---":
            continue
        match = re.fullmatch(r"( *)([\w.-]+):\s*(.*)", line)
        if not match:
            raise UserError(f"{path}, line {number}: expected 'key: value', found {line.strip()!r}")
        indent, key, text = len(match[1]), match[2], match[3]
        while levels[-1][0] >= indent:
            levels.pop()
        levels[-1][1][key] = value = _yaml_value(text) if text else {}
        if not text:
            levels.append((indent, value))
    return top


def _yaml_value(text):
    if text.startswith("[") and text.endswith("]"):
        return [_yaml_value(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    for cast in (int, float):
        try:
            return cast(text)
        except ValueError:
            pass
    word = text.strip("'\"")
    return {"true": True, "false": False, "null": None, "none": None}.get(word.lower(), word)


def weight_files(folder):
    """-> the files of a folder's weights: one file, or the shards of an index; safetensors before pickles."""
    folder, usual = Path(folder), (("model", ".safetensors"), ("pytorch_model", ".bin"))
    for stem, ending in usual:
        single, index = folder / (stem + ending), folder / (stem + ending + ".index.json")
        if single.is_file():
            return [single]
        if index.is_file():
            named = read_json(index).get("weight_map")
            names = sorted(set(named.values())) if isinstance(named, dict) else []
            lost = [name for name in names if not (folder / name).is_file()]
            if lost or not names:
                raise UserError(f"{index}: names {len(names)} shards, of which {', '.join(lost) or 'all'} "
                                f"{'is' if len(lost) == 1 else 'are'} missing in {folder}: fetch the folder again")
            return [folder / name for name in names]
    raise UserError(f"{folder}: no weights; expected one of "
                    + ", ".join(f"{s}{e} or {s}{e}.index.json" for s, e in usual))


def read_tensors(path):
    """-> {name: tensor} of one file, memory-mapped. Pickles are read with weights_only, so they can run no code."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:                     # files from before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: it is no torch file, or it holds more than tensors. Pickles are read with "
                        "weights_only=True, so that a file from elsewhere can run no code here") from None
    except Exception as error:  # noqa: BLE001            # a cut pickle can fail in any way
        raise UserError(f"{path}: cannot be read as weights ({type(error).__name__}: {str(error)[:80]}). "
                        "Is the download complete? Compare its size with the source") from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected named tensors in it")
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def read_folder(folder, dtype=None, keep=lambda name: name):
    """-> {name: tensor} of a folder; `keep` renames a tensor or drops it (None). Floats are cast to dtype, shard by
    shard, so that no more than one shard stands in memory twice."""
    tensors = {}
    for file in weight_files(folder):
        tensors.update(select(read_tensors(file), dtype, keep))
    return tensors


def select(tensors, dtype=None, keep=lambda name: name):
    """Rename, drop and cast the tensors of one file (see read_folder)."""
    chosen = {}
    for name in list(tensors):
        tensor, new = tensors.pop(name), keep(name)
        if new is not None:
            chosen[new] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return chosen


class Unfilled(TorchFunctionMode):
    """New weights are not drawn: where they have no memory, torch loads its whole compiler to draw nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **(kwargs or {}))


@contextmanager
def shapes_only():
    """What is built here has names and shapes, no memory (torch's meta device)."""
    with torch.device("meta"), Unfilled():
        yield


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assign(module, tensors, source, may_lack=()):
    """Give `tensors` to a module built on the meta device, without a copy.

    Every name must have its tensor and every tensor its name and shape; names in `may_lack` may be absent as a whole.
    Returns the set of absent names (empty, or exactly `may_lack`).
    """
    expected = module.state_dict()
    lack, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    odd = [f"{name} is {t.dtype}" for name, t in tensors.items() if name in expected and t.dtype not in FLOATS]
    wrong = [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
             for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    if lack != set(may_lack) and lack:
        raise UserError(f"{source}: {len(lack)} tensors are missing: {some(lack)}")
    if extra:
        raise UserError(f"{source}: {len(extra)} tensors are unknown: {some(extra)}")
    if odd:
        raise UserError(f"{source}: {len(odd)} weights are of a type this model does not compute with: {some(odd)}")
    if wrong:
        raise UserError(f"{source}: {len(wrong)} tensors have another shape than config.json says: {some(wrong)}")
    answer = module.load_state_dict(tensors, strict=False, assign=True)
    assert set(answer.missing_keys) == lack and not answer.unexpected_keys
    return lack


def some(names, most=4):
    """'a, b, c, d and 12 more'"""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_tensors(path, tensors):
    """Write one safetensors file atomically. Tied tensors are given as one name each by the caller."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, draft, {"format": "pt"})
    sync(draft)
    os.replace(draft, path)
