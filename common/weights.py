"""Files of settings (JSON) and weights (safetensors, Hugging Face shards, torch pickles).

Modules have the published names, so loading means: map the files into memory, check every name and shape, hand the
tensors to the module. Nothing is copied: a folder of 22 GB loads in seconds, its pages are read on first use.
"""
import json
import os
import pickle
import stat
import zipfile
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class UserError(Exception):
    """A mistake in what the user gave: scripts print its sentence without a traceback."""


def error_text(error):
    """Without the system's error number and the path, which our sentences begin with"""
    return getattr(error, "strerror", None) or error


def first_few(names, most=4):
    """'a, b, c, d and 12 more'"""
    names = sorted(str(name)[:200] for name in names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_file(path):
    """-> Path. UserError unless it is a file that may be read; opening a pipe would wait for ever, but a shell's."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not str(path).startswith("/dev/fd/"):
            raise ValueError("is a folder or a device, expected a file")
        open(path, "rb").close()
    except (OSError, ValueError) as error:                # ValueError also for a NUL in the name
        raise UserError(f"{path}: {str(error_text(error)).lower()}") from None
    return Path(path)


def read_text(path):
    try:
        return check_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def parse_json(text):
    """str or bytes -> value. ValueError for anything wrong, endless nesting and numbers of 5,000 digits among it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path):
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def inside(folder, name):
    """-> folder / name. UserError if the name's text leads out of the folder; where links lead does not matter."""
    name = os.path.normpath(name)
    if os.path.isabs(name) or name.split(os.sep)[0] == "..":
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
    draft, mask = Path(f"{path}.tmp"), os.umask(0)
    os.umask(mask)                                        # the only way to read it
    try:
        yield draft
        os.chmod(draft, 0o666 & ~mask)                    # safetensors lets only the owner read
        fsync(draft)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error_text(error)}). Is the disk full?") from None


@contextmanager
def name_in_errors(path):
    """OSErrors of writing to an open file, as of a full disk, do not say which: this adds its path, for cli.explain"""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


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
            shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
            if not shards or not all(isinstance(shard, str) for shard in shards):
                raise UserError(f"{index}: expected in it weight_map, the file name of each tensor")
            return [inside(folder, shard) for shard in sorted(set(shards))]
    raise UserError(f"{folder}: no weights; expected one of {', '.join(names)}, or the index.json of its shards")


def read_tensors(path):
    """-> {name: tensor} of one file, memory-mapped. Pickles are read with weights_only, so they can run no code."""
    path = check_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)                   # files from before torch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        tensors = dict(tensors.get("state_dict", tensors))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: no torch file, or it holds more than tensors and could run code") from None
    except Exception as error:  # noqa: BLE001            # a cut pickle can fail in any way
        raise UserError(f"{path}: cannot be read as weights ({type(error).__name__}: {str(error)[:80]}). "
                        "Is the download complete? Compare its size with the source") from None
    tensors, size = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}, path.stat().st_size
    for name, x in tensors.items():                       # a pickle can also repeat one number without end
        dense = x.layout == torch.strided and x.device.type == "cpu" and not (x.is_quantized or x.is_nested)
        if not (isinstance(name, str) and dense and x.nbytes <= size):
            raise UserError(f"{path}: {name!r:.99} is sparse, quantized, without content or has no name")
    return tensors


def read_folder(folder, dtype=None, keep=lambda name: name):
    """-> {name: tensor}, renamed and cast shard by shard (see select), so that only one shard is in memory twice"""
    return {name: x for file in weight_files(folder) for name, x in select(read_tensors(file), dtype, keep).items()}


def select(tensors, dtype=None, keep=lambda name: name):
    """-> {keep(name): tensor}, cast, without those that keep names None"""
    renamed = {keep(name): x for name, x in tensors.items()}
    return {name: cast(name, x, dtype) for name, x in renamed.items() if name is not None}


def cast(name, x, dtype):
    """Floats to dtype, but not those of quantized tensors. dtype: None, or a function (name, tensor) to use instead,
    as common/quantize.py makes it"""
    if callable(dtype):
        return dtype(name, x)
    if ":" in name:                                       # quantized: its kernels need memory aligned, files are not
        return x.clone()
    return x.to(dtype) if dtype and x.is_floating_point() and not hasattr(x, "qdata") else x


@contextmanager
def shapes_only():
    """Modules built in here have names and shapes, but no memory (torch's meta device). normal_ would import torch's
    whole compiler there, for seconds, to draw nothing."""
    with torch.device("meta"), patch("torch.nn.init.normal_", lambda tensor, *_, **__: tensor):
        yield


def assign(module, tensors, source, may_lack=()):
    """Give tensors to a module built on the meta device, without a copy; mixed types become the widest of them. All
    names and shapes must agree, but those in `may_lack` may be missing, all or none. Returns the missing names."""
    expected, floats = module.state_dict(), (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if any(":" in name for name in tensors):
        from common.quantize import restore  # which imports this module
        tensors = restore(tensors, expected, source)
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    found = {name: x for name, x in tensors.items() if name in expected}
    wrong = [f"{name} is {x.dtype} {tuple(x.shape)}, expected floats {tuple(expected[name].shape)}"
             for name, x in found.items() if x.dtype not in floats or x.shape != expected[name].shape]
    for names, problem in ((missing if missing != set(may_lack) else (), "are missing"), (unknown, "are unknown"),
                           (wrong, "have another type or shape than config.json says")):
        if names:
            raise UserError(f"{source}: {len(names)} tensors {problem}: {first_few(names)}")
    widest = reduce(torch.promote_types, {x.dtype for x in found.values()})
    module.load_state_dict(select(found, widest), strict=not missing, assign=True)
    return missing
