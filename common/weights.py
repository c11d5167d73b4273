"""Files of settings (JSON) and weights (safetensors, Hugging Face shards, torch pickles).

Modules have the published names, so loading means: map the files into memory, check every name and shape, hand the
tensors to the module. Nothing is copied: a folder of 22 GB loads in seconds, its pages are read on first use.
"""
import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode


class UserError(Exception):
    """A mistake in what the user gave: scripts print its sentence without a traceback."""


def error_text(error):
    """Without the system's error number and the path, which our sentences begin with"""
    return getattr(error, "strerror", None) or error


def first_few(names, most=4):
    """'a, b, c, d and 12 more'"""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error_text(error)})") from None


def parse_json(text):
    """str or bytes -> value. ValueError for anything wrong, endless nesting and numbers of 5,000 digits among it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path, kind=dict):
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {'object' if kind is dict else 'object or list'}")
    return value


def inside(folder, name):
    """-> folder / name. UserError if the name's text leads out of the folder; where links lead does not matter."""
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        raise UserError(f"{name} leads out of the folder {folder}; expected a path inside it")
    return Path(folder) / name


def write_json(path, value):
    with replaced(path) as draft:
        draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8",
                         errors="backslashreplace")       # lone surrogates, which JSON writes so


def save_tensors(path, tensors):
    """One safetensors file. Tied tensors have one name."""
    with replaced(path) as draft:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, draft, {"format": "pt"})


@contextmanager
def replaced(path):
    """-> a draft to write, which then replaces the file: readers find the old or the new content, never half of it."""
    draft = Path(f"{path}.tmp")
    yield draft
    fsync(draft)
    os.replace(draft, path)


def fsync(*paths):
    """Write files and folders from memory to the disk, so that a power failure does not leave them empty."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def weight_files(folder):
    """A folder's weights: one file, or the shards of an index; safetensors before pickles"""
    names = ("model.safetensors", "pytorch_model.bin")
    for file in (Path(folder) / name for name in names):
        index = file.with_name(f"{file.name}.index.json")
        if file.is_file():
            return [file]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            missing = [shard for shard in shards if not file.with_name(shard).is_file()]
            if missing or not shards:
                raise UserError(f"{index}: names {len(shards)} shards, missing in the folder: "
                                f"{first_few(missing) or 'all'}. Fetch it again")
            return [file.with_name(shard) for shard in shards]
    raise UserError(f"{folder}: no weights; expected one of {', '.join(names)}, or the index.json of its shards")


def read_tensors(path):
    """-> {name: tensor} of one file, memory-mapped. Pickles are read with weights_only, so they can run no code."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)                   # files from before torch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: no torch file, or it holds more than tensors and could run code") from None
    except Exception as error:  # noqa: BLE001            # a cut pickle can fail in any way
        raise UserError(f"{path}: cannot be read as weights ({type(error).__name__}: {str(error)[:80]}). "
                        "Is the download complete? Compare its size with the source") from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: expected named tensors in it")
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def read_folder(folder, dtype=None, keep=lambda name: name):
    """-> {name: tensor}, renamed and cast shard by shard (see select), so that only one shard is in memory twice"""
    tensors = {}
    for file in weight_files(folder):
        tensors.update(select(read_tensors(file), dtype, keep))
    return tensors


def select(tensors, dtype=None, keep=lambda name: name):
    """Empties `tensors` into a new dictionary: keep(name) is the new name, None drops it. Floats are cast to dtype."""
    selected = {}
    for name in list(tensors):
        tensor, new_name = tensors.pop(name), keep(name)
        if new_name is not None:
            selected[new_name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return selected


class SkipInit(TorchFunctionMode):
    """On the meta device normal_ would import torch's whole compiler, for seconds, to draw nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **(kwargs or {}))


@contextmanager
def shapes_only():
    """Modules built in here have names and shapes, but no memory (torch's meta device)."""
    with torch.device("meta"), SkipInit():
        yield


def assign(module, tensors, source, may_lack=()):
    """Give tensors to a module built on the meta device, without a copy. All names and shapes must agree, but the names
    in `may_lack` may be missing, all or none. Returns the missing names."""
    expected, floats = module.state_dict(), (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    dtypes = [f"{name} is {tensors[name].dtype}" for name in expected.keys() - missing
              if tensors[name].dtype not in floats]
    shapes = [f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
              for name in expected.keys() - missing if tensors[name].shape != expected[name].shape]
    for names, problem in ((missing if missing != set(may_lack) else (), "are missing"), (unknown, "are unknown"),
                           (dtypes, "are of a type this model does not compute with"),
                           (shapes, "have another shape than config.json says")):
        if names:
            raise UserError(f"{source}: {len(names)} tensors {problem}: {first_few(names)}")
    module.load_state_dict(tensors, strict=not missing, assign=True)
    return missing
