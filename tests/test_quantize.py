"""Weights of 8 and 4 bits in all four systems: which matrices, how far the logits move, folders, mistakes."""
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sft
from common.quantize import parts, quantized_linear, quantizer
from common.weights import UserError
from evaluate import fingerprint
from generate import answer
from llama import Block
from model import Libra
from monolithic import open_model, shared
from monolithic.haplovl import HalfConfig, HaploVL
from monolithic.hovle import HalfConfig as EmbedderConfig
from monolithic.hovle import HoVLE
from monolithic.llava import Llava, LlavaConfig
from streams import Streams
from text import IMG, Text
from training import plan

CPU, SYSTEMS = torch.device("cpu"), ("libra", "haplovl", "hovle", "llava")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 256}
NARROW = WIDE | {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4}


def build(name, folder):
    """A model whose matrices have multiples of 16 rows and 32 columns, with a tokenizer"""
    if name == "libra":
        sizes = {key: WIDE[key] for key in WIDE.keys() - {"vocab_size", "max_position_embeddings"}}
        return tiny.whole(folder, spread=0.1, vision_down_ratio=1, **sizes)
    torch.manual_seed(0)
    image = {"image_token_index": 382, "patch_size": 4, "default_image_size": 8}
    if name == "haplovl":
        model = HaploVL(HalfConfig(**WIDE | image), HalfConfig(**NARROW | image, norm_mode="layernorm",
                                                               attention_rope=True))
    elif name == "hovle":
        image = {"image_size": 16, "force_image_size": 16, "patch_size": 4, "img_context_token_id": 382}
        model = HoVLE(EmbedderConfig(**WIDE | image), EmbedderConfig(**WIDE | image | {"num_key_value_heads": 1}))
    else:
        model = Llava(LlavaConfig(**WIDE | {"image_token_index": 384}, clip=tiny.CLIP | {"hidden_size": 64}))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1)
    model.text = Text(tiny.spm(folder))
    return model


@pytest.fixture(scope="module", params=SYSTEMS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    build(request.param, path).save_pretrained(path / "model")
    return path / "model"


def opened(folder, weights=None, dtype="float32", save=None):
    return open_model(folder, CPU, dtype, weights, save)


@torch.no_grad()
def logits(model, length=40):
    """Of random text around a picture"""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 380, (length,), generator=generator).tolist()
    if isinstance(model, Libra):
        c = model.config
        row = torch.cat([tiny.text_ids(c, 5, generator), tiny.image_ids(c, generator=generator),
                         tiny.text_ids(c, length, generator)])
        text, image = model.logits(Streams.from_ids([row], c), tiny.signals(c, [row], generator))
        return torch.cat([text.flatten(), image.flatten()]).float()
    config, noise = model.halves[-1], torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
    tiles, order = config.prepare(Image.fromarray(noise.numpy()), 1)
    ids, _, _ = shared.expand_images([*ids[:5], IMG, *ids[5:]], [0] * 41, [len(order)], config.image_token_index,
                                 edges=config.edges)
    batch = shared.Batch.build(*shared.pad([ids]), [(tiles, order)], config)
    return model.lm_head(model.hidden(batch.ids, batch)).float()


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def quantized_names(model):
    return {name for name, p in model.named_parameters() if hasattr(p, "qdata")}


@pytest.mark.parametrize("kind, least, most", [("int8", 1e-4, 0.04), ("int4", 0.02, 0.4)])
def test_only_matrices_of_layers_and_logits_near(folder, kind, least, most):
    exact, rough = opened(folder), opened(folder, kind)
    blocks = {name: module for name, module in exact.named_modules() if isinstance(module, Block)}
    wanted = {f"{block}.{name}" for block, module in blocks.items() for name, p in module.named_parameters()
              if p.dim() == 2 and "bridge" not in name}
    assert quantized_names(rough) == wanted and len(wanted) >= 2 * 7 * (2 if isinstance(exact, Libra) else 1)
    others = {name: p for name, p in rough.state_dict().items() if name not in wanted}
    assert all(torch.equal(p, exact.state_dict()[name]) for name, p in others.items())
    wanted, in_bfloat16 = logits(exact), logits(opened(folder, dtype="bfloat16"))
    for dtype in ("float32", "bfloat16"):
        for reference in (wanted, in_bfloat16):
            assert least < distance(logits(opened(folder, kind, dtype)), reference) < most


@pytest.mark.parametrize("kind, most", [("int8", 0.6), ("int4", 0.4)])
def test_saved_is_loaded_as_it_was(folder, tmp_path, kind, most):
    (folder / "recipe.json").write_text('{"llm": "llama"}')
    made = opened(folder, kind, "bfloat16", save=tmp_path / "small")
    assert (tmp_path / "small/recipe.json").read_text() == '{"llm": "llama"}'
    again, original = opened(tmp_path / "small", dtype="bfloat16"), opened(folder, dtype="bfloat16")
    found, wanted = parts(again.state_dict()), parts(made.state_dict())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(again), logits(made)) and fingerprint(again) == fingerprint(made)
    assert fingerprint(made) != fingerprint(original)
    names = quantized_names(made)
    assert sum(wanted[part].nbytes for part in wanted if part.split(":")[0] in names) < most * sum(
        p.nbytes for name, p in original.named_parameters() if name in names)
    rows = [("What is it?", [Image.new("RGB", (20, 20), "red")]), ("the red square is in the left", [])]
    assert answer(again, rows, 6) == answer(made, rows, 6)


def test_answers_of_a_batch_and_of_one_row(tmp_path):
    """Every step of one row takes the kernel for few rows, the prompt the other: both compute the same model"""
    build("libra", tmp_path).save_pretrained(tmp_path / "model")
    for kind in ("int8", "int4"):
        model = opened(tmp_path / "model", kind)
        rows = [("What is it?", [Image.new("RGB", (20, 20), colour)]) for colour in ("red", "blue", "green")]
        together = answer(model, rows, 8)
        assert sum(answer(model, [row], 8)[0] == found for row, found in zip(rows, together)) >= 2


@pytest.mark.parametrize("kind, columns, most", [("int8", 96, 0.01), ("int8", 24, 0.01), ("int4", 96, 0.12)])
@pytest.mark.parametrize("bias", [False, True])
def test_product(kind, columns, most, bias):
    """Any number of rows against the product in float32; torch's int8 kernel cannot read 24 columns"""
    torch.manual_seed(0)
    w, b = torch.randn(48, columns), torch.randn(48) if bias else None
    q = quantizer(kind, torch.float32, CPU)("model.layers.3.mlp.vision_up_proj.weight_B", w)
    for shape in ((), (1,), (2, 3), (33,), (0,)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(*shape, columns).to(dtype)
            y, wanted = quantized_linear(x, q, b), torch.nn.functional.linear(x.float(), w, b)
            assert y.shape == wanted.shape and y.dtype == torch.promote_types(dtype, (x if b is None else b).dtype)
            assert not x.numel() or distance(y.float(), wanted) < most


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="pip install torchao"):
        opened(folder, "int8")


def test_mistakes(tmp_path, monkeypatch):
    build("libra", tmp_path).save_pretrained(tmp_path / "model")
    small, name = tmp_path / "small", "model.layers.0.mlp.up_proj.weight"
    opened(tmp_path / "model", "int4", save=small)
    for arguments, said in (((tmp_path / "model", None, None, tmp_path / "x"), "give --weights too"),
                            ((tmp_path / "model", "int8", None, small), "exists, name a new folder"),
                            ((small, "int4"), "quantized already")):
        with pytest.raises(UserError, match=said):
            opened(*arguments)
    for options in ([], ["--freeze-llm"]):
        monkeypatch.setattr(sys, "argv", ["sft.py", "--model", str(small), "--out", str(tmp_path / "tuned"), *options])
        with pytest.raises(UserError, match="cannot be trained"):
            sft.main()
    for rows, columns in ((40, 64), (64, 40)):
        with pytest.raises(UserError, match="multiples of 16 rows and 32 columns, use int8"):
            quantizer("int4", torch.float32, CPU)(name, torch.randn(rows, columns))
    with pytest.raises(UserError, match="packed for a GPU are of no use on cpu"):
        quantized_linear(torch.zeros(1, 64), SimpleNamespace(qdata=torch.zeros(1, 1, 1, 1, dtype=torch.int32)))
    tensors = load_file(small / "model.safetensors")
    for change, said in (({f"{name}:qdata": tensors[f"{name}:qdata"][:16]}, "none of an int8 or int4 96 x 64 matrix"),
                         ({f"{name}:more": torch.zeros(1)}, "none of an int8 or int4 96 x 64 matrix"),
                         ({"lm_head.weight:qdata": torch.zeros(1)}, "unknown: lm_head.weight:qdata")):
        save_file(tensors | change, small / "model.safetensors")
        with pytest.raises(UserError, match=said):
            opened(small)


def test_plan_of_answering(capsys):
    """11.319 B weights in all; 10.7 B of them in the layers' matrices"""
    plan.show_answering(None)
    printed = capsys.readouterr().out.splitlines()
    gigabytes = {line.split()[0]: float(line.split()[1]) for line in printed[1:]}
    assert "10.70 B" in printed[0] and "bfloat16" in printed[1] and "none of 12" in printed[1]
    assert gigabytes["bfloat16"] - gigabytes["int8"] == pytest.approx(10.7, abs=0.15)
    assert gigabytes["int8"] - gigabytes["int4"] == pytest.approx(10.7 * 3.5 / 8, abs=0.15)
    assert "fits 16 GB, 24 GB" in printed[2] and "fits 12 GB" in printed[3]
