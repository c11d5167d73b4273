"""Random damage to the files of models. CASES is {name: function(rng, folder)}: each call writes one damaged input into
the empty `folder` and reads it; whatever is wrong with it must be a UserError.
"""
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from PIL import Image
from safetensors.torch import save_file
from test_haplovl import tiny as tiny_haplovl
from test_hovle import tiny as tiny_hovle
from test_weights import YAML, llama_folder, publish

from common.published import read_published_config
from common.weights import UserError, read_folder, read_tensors, write_json
from llama import Llama
from model import Libra, load
from monolithic.haplovl import HaploVL
from monolithic.hovle import HoVLE
from monolithic.llava import Llava, LlavaConfig
from text import Text, open_text
from tokenizer import ImageTokenizer, clip_sizes

VALUES = [None, True, False, 0, 1, -1, 2, 3.0, 0.5, -1.0, 1e300, float("nan"), float("inf"), 2 ** 31, 2 ** 63, 10 ** 9,
          10 ** 12, 10 ** 400, "", "a", "1", "../x", "/etc/passwd", "\0", "\ud800", [], [1], [1, 1], [-1, 1], ["a", 1],
          [10 ** 9], [[[]]], [1] * 5000, {}, {"type": "default"}, {"rope_type": "yarn"}, {"rope_theta": "x"},
          {"a": {"b": 1}}, 4, 7, 8, 16, 33, 64, 999, 10 ** 5, 2 ** 17, 2 ** 24]
LARGE = ["anyres_max_" + "9" * 5000, [[2 ** 16, 2 ** 16]], 2 ** 15, 20_000]        # of pictures
NAMES = ["rope_scaling", "rope_parameters", "layer_types", "sliding_window", "vision_config", "model_type",
         "hidden_act", "num_channels", "quantization_config", "max_vision_token_length", "tie_word_embeddings",
         "attention_bias", "x"]
YAML_VALUES = ["&a [*a, *a]", "*a", "!!python/object:os.system", "[1", "{", "0x" + "f" * 5000, "9" * 5000, "? a", "'",
               "2001-02-30", "!!binary x", "<<: *a", "[" * 3000, "1e999", ".nan", "- 1", "!!set {a}"]
CONTENTS = [b"", b"{}", b"[]", b"null", b"5", b"[" * 10 ** 5, b'{"a":' * 10 ** 5, b"9" * 10 ** 5, b"\xff\xfe", b"\x80",
            b'{"vision_vocab_size": 1}', b'{"clip": {}}', b'{"clip": null}']


@cache
def sources():
    """Whole folders: a Libra, a LLaMA, a published one, the systems of monolithic/"""
    path = Path(tempfile.mkdtemp())
    model = tiny.whole(path)
    model.save_pretrained(path / "libra")
    with contextlib.redirect_stdout(io.StringIO()):
        llama_folder(path / "llama", path / "libra")
    publish(Libra.from_pretrained(path / "libra"), path / "published")
    (path / "bpe").mkdir()
    tiny.bpe(path / "bpe", "<|im_start|>")
    write_json(path / "bpe/generation_config.json", {"eos_token_id": [2, 6]})
    llava = Llava(LlavaConfig(vocab_size=95, hidden_size=32, intermediate_size=40, num_hidden_layers=2, clip=tiny.CLIP,
                              num_attention_heads=4, image_token_index=95))
    for model in (tiny_haplovl(), tiny_hovle(), llava):
        model.text = None
        model.save_pretrained(path / type(model).__name__)
    return path


def copy(name, folder):
    return Path(shutil.copytree(sources() / name, folder / "input"))


def change_json(rng, path):
    """Change one to three values, at any depth, or damage the text"""
    top = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = top
        while True:
            key = rng.choice([*value, *NAMES] if isinstance(value, dict) else range(len(value)))
            inner = value.get(key) if isinstance(value, dict) else value[key]
            if not (isinstance(inner, (dict, list)) and inner and rng.random() < 0.8):
                break
            value = inner
        value[key] = deepcopy(rng.choice(VALUES))        # else it is changed for all later cases
        if isinstance(value, dict) and rng.random() < 0.1:
            del value[key]
    path.write_text(json.dumps(top))
    if rng.random() < 0.1:
        change_bytes(rng, path)


def change_bytes(rng, path, first=None):
    """Replace, cut, repeat or insert a few bytes. first: only among the first so many"""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(min(len(content), first or len(content)) or 1)
        kind, n = rng.randrange(5), rng.choice([1, 1, 1, 2, 8, 64, 1000])
        part = bytes(rng.choice([0, 1, 127, 128, 255, rng.randrange(256)]) for _ in range(n))
        content[at:at + (0 if kind == 0 else n)] = {1: b"", 2: bytes(content[at:at + n]) * 2}.get(kind, part)
        if rng.random() < 0.1:
            del content[at:]
    path.write_bytes(content)


def llama_config(rng, folder):
    path = copy("llama", folder)
    change_json(rng, path / "config.json")
    Llama.from_pretrained(path)


def libra_config(rng, folder):
    path = copy("libra", folder)
    change_json(rng, path / "config.json")
    Libra.from_pretrained(path)


def llama_with_new_vision(rng, folder):
    path = copy("llama", folder)
    change_json(rng, path / "config.json")
    Libra.from_pretrained(path, sources() / "libra/image_tokenizer")


def image_tokenizer_config(rng, folder):
    path = copy("libra/image_tokenizer", folder)
    change_json(rng, path / "config.json")
    ImageTokenizer.from_pretrained(path)


def clip_config(rng, folder):
    path = copy("published/openai-clip-vit", folder)
    change_json(rng, path / "config.json")
    clip_sizes(path)


def monolithic_config(rng, folder, cls):
    """A picture is made into tiles before the weights say that the sizes are others; half of the time its fields."""
    path = copy(cls.__name__, folder)
    if rng.random() < 0.5:
        change_json(rng, path / "config.json")
    else:
        top = json.loads((path / "config.json").read_text())
        part, name = rng.choice([(part, name) for part in (top, *top.values()) if isinstance(part, dict)
                                 for name in part if "image" in name or "patch" in name])
        part[name] = deepcopy(rng.choice([rng.choice(VALUES), *LARGE]))
        write_json(path / "config.json", top)
    config, *_ = cls.read_config(path / "config.json")
    config.prepare(Image.new("RGB", (40, 16)), rng.choice([1, 3]))
    cls.from_pretrained(path)


def index(rng, folder):
    path = copy("published", folder)
    change_json(rng, path / "model.safetensors.index.json")
    load(path)


def yaml_values(rng, folder):
    text = YAML
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        key, found, _ = lines[at].partition(":")
        value = rng.choice([*YAML_VALUES, json.dumps(rng.choice(VALUES))])
        lines[at] = rng.choice([f"{key}: {value}", "  " + lines[at], lines[at][2:], value, f"x: &a {value}", ""])
        text = "\n".join(lines)
    (folder / "vision_tokenizer_config.yaml").write_bytes(text.encode("utf-8", "replace"))
    if rng.random() < 0.3:
        change_bytes(rng, folder / "vision_tokenizer_config.yaml")
    read_published_config(folder)


def published_yaml(rng, folder):
    path = copy("published", folder)
    lines = (path / "vision_tokenizer_config.yaml").read_text().split("\n")
    at = rng.randrange(len(lines))
    lines[at] = lines[at].partition(":")[0] + ": " + json.dumps(rng.choice(VALUES))
    (path / "vision_tokenizer_config.yaml").write_text("\n".join(lines))
    ImageTokenizer.from_pretrained(path)


def safetensors_header(rng, folder):
    path = copy("libra/image_tokenizer", folder)
    change_bytes(rng, path / "model.safetensors", rng.choice([8, 300, None]))
    ImageTokenizer.from_pretrained(path)


def random_tensor(rng):
    shape = [rng.choice([0, 1, 2, 32]) for _ in range(rng.randint(0, 3))]
    kinds = [lambda: torch.ones(shape), lambda: torch.ones(shape).to_sparse(), lambda: torch.ones(shape, device="meta"),
             lambda: torch.quantize_per_tensor(torch.ones(shape), 1.0, 0, torch.qint8),
             lambda: torch.zeros(1).expand(2 ** 50), lambda: torch.ones(shape, dtype=torch.float8_e4m3fn),
             lambda: torch.ones(shape, dtype=rng.choice([torch.complex64, torch.bool, torch.int64])),
             lambda: torch.nn.Parameter(torch.ones(shape)), lambda: torch.ones(3, 3).to_sparse_csr(),
             lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda: torch.ones(shape).half()]
    return rng.choice(kinds)()


def odd_tensors(rng, folder):
    """Names and tensors of every kind in a pickle"""
    path = copy("libra", folder)
    tensors = dict(Libra.from_pretrained(path).state_dict())
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*tensors, 5, None, ("a", 1), "", "x" * 10 ** 5, b"a", True, "lm_head.weight"])
        tensors[name] = rng.choice([random_tensor(rng), rng.choice([None, 5, "a", [], {}])])
    (path / "model.safetensors").unlink()
    value = rng.choice([tensors, {"state_dict": tensors}, [tensors], {"state_dict": [tensors]}])
    torch.save(value, path / "pytorch_model.bin", _use_new_zipfile_serialization=rng.random() < 0.7)
    Libra.from_pretrained(path, dtype=rng.choice([None, torch.bfloat16]))


def safetensors_types(rng, folder):
    path = copy("libra", folder)
    tensors = {name: x.clone() for name, x in Libra.from_pretrained(path).state_dict().items()}
    for name in rng.sample(list(tensors), rng.randint(1, 20)):
        tensors[name] = tensors[name].to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8,
                                                     torch.float8_e5m2] if rng.random() < 0.1 else [torch.float16]))
    save_file(tensors, path / "model.safetensors")
    Libra.from_pretrained(path, dtype=rng.choice([None, torch.bfloat16]))


def torch_bytes(rng, folder):
    path = folder / "pytorch_model.bin"
    tensors = {"a": torch.ones(20), "b": torch.ones(3, 4).half()}
    torch.save(tensors, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    change_bytes(rng, path)
    read_folder(folder, rng.choice([None, torch.float32]))


def checkpoint_bytes(rng, folder):
    path = copy("published", folder)
    change_bytes(rng, path / "vqgan.ckpt", rng.choice([2000, None]))
    ImageTokenizer.from_pretrained(path)


def sentencepiece_bytes(rng, folder):
    path = copy("llama", folder) / "tokenizer.model"
    change_bytes(rng, path, rng.choice([None, 100]))
    text = Text(path)
    ids, _ = text.chat([("what is the shape", 1, "a red circle")])
    text.decode([i for i in ids if i >= 0] + [text.vocab_size, 10 ** 6])


def byte_pairs(rng, folder):
    """tokenizer.json and the files beside it"""
    path = copy("bpe", folder)
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    rng.choice([change_json, change_bytes])(rng, path / name)
    text = open_text(path)
    for _ in range(2):
        ids, _ = text.chat([("what is the shape", 1, "a red circle")])
        text.decode([i for i in ids if i >= 0] + [text.vocab_size, 10 ** 6])
        text.use_template("llm")


def any_json(rng, folder):
    """No file of ours at all"""
    content = rng.choice(CONTENTS)
    for name in ("config.json", "model.safetensors.index.json", "vision_tokenizer_config.yaml", "tokenizer.model"):
        if rng.random() < 0.7:
            (folder / name).write_bytes(content)
    write_json(folder / "x.json", {})
    for read in (Libra.from_pretrained, Llama.from_pretrained, ImageTokenizer.from_pretrained, clip_sizes,
                 read_folder, lambda path: read_tensors(path / "config.json")):
        with contextlib.suppress(UserError):
            read(folder)


def seeded(case):
    return lambda rng, folder: case(random.Random(int(rng.integers(2 ** 62))), folder)


CASES = {case.__name__: seeded(case) for case in (
    llama_config, libra_config, llama_with_new_vision, image_tokenizer_config, clip_config, index, yaml_values,
    published_yaml, safetensors_header, odd_tensors, safetensors_types, torch_bytes, checkpoint_bytes,
    sentencepiece_bytes, byte_pairs, any_json)}
CASES |= {f"{cls.__name__}_config": seeded(partial(monolithic_config, cls=cls)) for cls in (HaploVL, HoVLE, Llava)}
