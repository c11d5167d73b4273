"""Folders: ours, a LLaMA's, the published ones; what is wrong with a folder is said by name; memory while loading."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from common.published import read_published_config
from common.weights import UserError, read_json, read_tensors, weight_files, write_json
from generate import encode_images, generate
from llama import Llama, LlamaConfig
from model import Libra, LibraConfig
from text import IMG, Text, expand_images
from tokenizer import ImageTokenizer

YAML = """freeze: True   # nothing here learns
max_vision_token_length: 18
params:
  embed_dim: 32
  ckpt_path: vqgan.ckpt
  codebook_size: 16
  num_codebook: 2

  # the decoder
  ddconfig:
    encoder_name: openai-clip-vit
    select_layer: [1,3]
    double_z: False
    z_channels: 32
    resolution: 32
    in_channels: 3
    out_ch: 3
    ch: 32
    ch_mult: [1,1]
    num_res_blocks: 1
    attn_resolutions: [4]
    dropout: 0.0
    initial_resolution: 4
    num_attn_head: 2
"""


def answer(model):
    from PIL import Image
    codes, signal = encode_images(model, [Image.new("RGB", (30, 20), "red")])
    prompt = expand_images([1, IMG, 13, 270], [0] * 4, codes, model.config)[0]
    return torch.stack(list(generate(model, [prompt], signal, 8)))


def publish(model, path, clip_inside=True):
    """Write a model as the authors published theirs"""
    path.mkdir()
    (path / "vision_tokenizer_config.yaml").write_text(YAML)
    extra = {"vision_hidden_placeholder": torch.zeros(32), "naive_placeholder": torch.zeros(32),
             "vision_logits_placeholder": torch.zeros(1, 18), "language_logits_placeholder": torch.zeros(1, 60),
             "eoi_to_newline_logits_placeholder": torch.zeros(1, 1, 1, 78),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    tensors = list(({k: v.contiguous() for k, v in model.state_dict().items()} | extra).items())
    index = {}
    for i in range(5):
        name = f"model-0000{i + 1}-of-00005.safetensors"
        save_file(dict(tensors[i::5]), path / name)
        index |= dict.fromkeys(dict(tensors[i::5]), name)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_json(path / "config.json", model.config.to_dict() | {
        "unified_head": False, "use_2d_rope": False, "concat_signals": True, "norm_signals": True, "hidden_act": "silu",
        "vision_prediction_mode": "1d", "torch_dtype": "bfloat16", "bos_token_id": 1, "attn_pdrop": 0.0})
    shutil.copy(model.tokenizers.text.path, path / "tokenizer.model")
    images = model.tokenizers.image
    clip = path / "openai-clip-vit"
    clip.mkdir()
    write_json(clip / "config.json", {"vision_config": tiny.CLIP | {"hidden_act": "quick_gelu"}, "text_config": {}})
    tower = "encoder.vision_tower.vision_model."
    vision = {k.replace(tower, "vision_model."): v.contiguous() for k, v in images.state_dict().items() if tower in k}
    torch.save(vision | {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(()),
                         "vision_model.embeddings.position_ids": torch.arange(17)}, clip / "pytorch_model.bin")
    state = {k: v for k, v in images.state_dict().items() if clip_inside or tower not in k}
    state |= {"quantize.mask": torch.ones(4), "loss.discriminator.main.0.bias": torch.zeros(3),
              **({tower + "embeddings.position_ids": torch.arange(17)} if clip_inside else {})}
    torch.save({"state_dict": state, "epoch": 3}, path / "vqgan.ckpt")
    return path


def test_save_and_load(folder, tmp_path):
    model = Libra.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = Libra.from_pretrained(tmp_path / "again")
    assert again.config == model.config and torch.equal(answer(again), answer(model))
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    model.save_pretrained(folder)                         # over its own files
    assert torch.equal(answer(Libra.from_pretrained(folder)), answer(model))
    half = Libra.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.tokenizers.image.quant_conv.weight.dtype == torch.float32
    assert answer(half).shape == (8, 1, 2)


@pytest.mark.parametrize("clip_inside", [True, False])
def test_published_folder_as_it_is(folder, tmp_path, clip_inside):
    model = Libra.from_pretrained(folder)
    path = publish(model, tmp_path / "libra-11b-chat", clip_inside)
    assert torch.equal(answer(Libra.from_pretrained(path)), answer(model))
    alone = tmp_path / "libra-vision-tokenizer"
    alone.mkdir()
    for name in ("vqgan.ckpt", "vision_tokenizer_config.yaml", "openai-clip-vit"):
        (path / name).rename(alone / name)
    tokenizer = ImageTokenizer.from_pretrained(alone)
    for (name, a), b in zip(tokenizer.state_dict().items(), model.tokenizers.image.state_dict().values()):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match="no image tokenizer; expected"):
        Libra.from_pretrained(path)


def llama_folder(path, folder, pickled=False, **changes):
    """A LLaMA as Hugging Face writes it, with the tokenizer of a model folder"""
    model = Libra.from_pretrained(folder)
    tensors = {k: p.detach().contiguous() for k, p in model.named_parameters() if "vision" not in k}
    path.mkdir()
    if pickled:
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=pickled != "legacy")
    else:
        save_file(tensors, path / "model.safetensors")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps")
    write_json(path / "config.json", {k: v for k, v in model.config.to_dict().items() if k in keys} | {
        "model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} | changes)
    shutil.copy(folder / "tokenizer.model", path / "tokenizer.model")
    return model


@pytest.mark.parametrize("pickled", [False, True, "legacy"])
def test_llama_folder_with_an_image_tokenizer(folder, tmp_path, capsys, pickled):
    source = llama_folder(tmp_path / "llama", folder, pickled)
    torch.manual_seed(3)
    model = Libra.from_pretrained(tmp_path / "llama", folder / "image_tokenizer", bridge_rank=3)
    assert "the visual part, " in capsys.readouterr().out
    assert model.config.bridge_rank == 3 and model.config.rope_theta == 500 and model.config.image_tokens == 18
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    attention = model.model.layers[0].self_attn
    assert (attention.vision_k_bridge_on_vision.weight_B == 0).all()
    assert (model.model.layers[0].vision_input_layernorm.weight == 1).all()
    for w in (attention.vision_k_bridge_on_vision.weight_A, attention.vision_q_proj.weight_B,
              model.vision_lm_head.heads[1].weight, model.model.vision_embed_tokens[0].weight):
        assert 0.015 < w.std() < 0.025
    assert answer(model).shape == (8, 1, 2)
    with pytest.raises(UserError, match="no image tokenizer; expected"):
        Libra.from_pretrained(tmp_path / "llama")


def test_weights_that_do_not_fit(copy):
    path, tensors = copy / "model.safetensors", load_file(copy / "model.safetensors")
    name = "model.layers.1.self_attn.vision_k_bridge_on_vision.weight_A"

    def expect(message, **changed):
        save_file({k: v for k, v in (tensors | changed).items() if v is not None}, path)
        with pytest.raises(UserError, match=message):
            Libra.from_pretrained(copy)
    expect(f"1 tensors are missing: {name}", **{name: None})
    expect("1 tensors are unknown: model.layers.0.q_lora", **{"model.layers.0.q_lora": torch.zeros(3)})
    expect(r"vision_norm.weight is torch.float32 \(31,\), expected floats \(32,\)",
           **{"model.vision_norm.weight": torch.zeros(31)})
    expect("model.norm.weight is torch.int64", **{"model.norm.weight": torch.ones(32, dtype=torch.long)})
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read as weights .*download complete"):
        Libra.from_pretrained(copy)
    path.unlink()
    with pytest.raises(UserError, match="no weights; expected one of model.safetensors"):
        Libra.from_pretrained(copy)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_mixed_types_become_the_widest_or_what_is_asked_for(copy, kind):
    path, tensors = copy / "model.safetensors", load_file(copy / "model.safetensors")
    half = {name: x.bfloat16() if "norm" in name else x.half() if "mlp" in name else x for name, x in tensors.items()}
    if kind == "bin":
        path.unlink()
        torch.save(half, copy / "pytorch_model.bin")
    else:
        save_file(half, path)
    for dtype in (None, torch.bfloat16):
        model = Libra.from_pretrained(copy, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
        assert torch.equal(model.model.norm.weight.float(), tensors["model.norm.weight"].bfloat16().float())
        assert answer(model).shape == (8, 1, 2)


@pytest.mark.parametrize("name, tensor", [
    (5, torch.ones(3)), ("a", torch.ones(3).to_sparse()), ("a", torch.ones(3, device="meta")),
    ("a", torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)), ("a", torch.zeros(1).expand(10 ** 12)),
    ("a", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))])
def test_odd_tensors(tmp_path, name, tensor):
    torch.save({"b": torch.ones(2), name: tensor}, tmp_path / "odd.bin")
    with pytest.raises(UserError, match=f"odd.bin: {name!r} is sparse, quantized|odd.bin: refused"):
        read_tensors(tmp_path / "odd.bin")


NO_EFFECT = {
    "tokenizer_class": "LlamaTokenizer", "_attn_implementation_autoset": True, "rope_scaling": {"type": "default"},
    "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "num_experts": None,
    "layer_types": ["full_attention"] * 2, "eos_token_id": [1, 2], "hidden_act": "silu", "attention_dropout": 0,
    "use_sliding_window": False, "pruned_heads": {}, "unsloth_version": "2024.9", "quantization_config": None,
    "top_k": 50, "_commit_hash": "ab", "return_dict": True, "attention_bias": False, "sliding_window": None}


def test_fields_without_effect(folder, tmp_path):
    llama_folder(tmp_path / "llama", folder, **NO_EFFECT)
    assert Llama.from_pretrained(tmp_path / "llama").config.rope_theta == 500.0
    values = read_json(tmp_path / "llama/config.json")
    for rope in ({"rope_theta": 1e4}, {"type": "default", "factor": 8.0}, {"rope_type": "default"}, {}):
        write_json(tmp_path / "llama/config.json", values | {"rope_parameters": rope, "rope_theta": 1e4})
        assert LlamaConfig.from_file(tmp_path / "llama/config.json").rope_theta == 1e4


def test_files_that_cannot_be_opened(copy, monkeypatch):
    os.mkfifo(copy / "fifo")
    for path in (copy / "fifo", copy):
        with pytest.raises(UserError, match="expected a file"):
            read_json(path)

    def forbid(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr("builtins.open", forbid)
    for name, read in (("config.json", read_json), ("tokenizer.model", Text), ("model.safetensors", read_tensors)):
        with pytest.raises(UserError, match=f"{name}: permission denied"):
            read(copy / name)


def test_missing_and_cut_shards(folder, tmp_path):
    path = publish(Libra.from_pretrained(folder), tmp_path / "p")
    shard = path / "model-00003-of-00005.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match="model-00003-of-00005.safetensors: no such file"):
        Libra.from_pretrained(path)
    index = path / "model.safetensors.index.json"
    named = index.read_text()
    for weight_map in (["a"], {}, {"a": 5}, {"a": 5, "b": "x"}, {"a": [[]]}, None):
        write_json(index, {"weight_map": weight_map})
        with pytest.raises(UserError, match="index.json: expected in it weight_map"):
            Libra.from_pretrained(path)
    for name in ("../model-00001-of-00005.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="leads out of the folder"):
            Libra.from_pretrained(path)
    index.write_text(named)
    shard.write_bytes(content[:100])
    with pytest.raises(UserError, match="model-00003-of-00005.safetensors: cannot be read"):
        Libra.from_pretrained(path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/evil-was-here"),))


def test_pickles_run_no_code(folder, tmp_path):
    path = publish(Libra.from_pretrained(folder), tmp_path / "p")
    torch.save({"state_dict": {"decoder.x": Evil()}}, path / "vqgan.ckpt")
    with pytest.raises(UserError, match=r"vqgan.ckpt: refused"):
        Libra.from_pretrained(path)
    assert not Path("/tmp/evil-was-here").exists()
    (path / "vqgan.ckpt").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="vqgan.ckpt"):
        Libra.from_pretrained(path)
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "gone.ckpt")
    whole = tmp_path / "whole.bin"
    torch.save({"a": torch.randn(64)}, whole, _use_new_zipfile_serialization=False)
    content = whole.read_bytes()
    for size in [0, 1, 7, *range(10, len(content), 23)]:
        whole.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"whole\.bin"):
            read_tensors(whole)
    for value in (torch.ones(3), [torch.ones(3)], {"state_dict": None}):
        torch.save(value, whole)
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_tensors(whole)


def test_folders_that_do_not_belong_together(copy, tmp_path):
    """More rows than pieces are padding, fewer are another tokenizer."""
    tiny.spm(tmp_path, vocab_size=360)
    (tmp_path / "tokenizer.model").rename(copy / "tokenizer.model")
    padded = Libra.from_pretrained(copy)
    pieces = padded.tokenizers.text.vocab_size
    assert pieces < padded.config.vocab_size and answer(padded).shape == (8, 1, 2)
    assert padded.tokenizers.text.decode([*padded.tokenizers.text.plain("the red"), pieces, 379]) == "the red"
    tiny.spm(tmp_path, vocab_size=400)
    (tmp_path / "tokenizer.model").rename(copy / "tokenizer.model")
    with pytest.raises(UserError, match="vocab_size is 380, but .* do not belong together"):
        Libra.from_pretrained(copy)
    with pytest.raises(UserError, match="no such folder"):
        Libra.from_pretrained(copy / "gone")
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        Libra.from_pretrained(copy)


def test_yaml(tmp_path):
    path = tmp_path / "vision_tokenizer_config.yaml"
    path.write_text(YAML)
    values, checkpoint, clip_folder = read_published_config(tmp_path)
    assert values["select_layers"] == [1, 3] and values["codebook_size"] == 16 and values["grid"] == 4
    assert checkpoint == tmp_path / "vqgan.ckpt" and clip_folder == tmp_path / "openai-clip-vit"
    for text, message in ((YAML.replace("False", "True"), "another value: double_z"), ("a: 1\n- b\n", "line 2"),
                          ("params: 5\n", "expected YAML with params"), ("", "expected YAML with params"),
                          (YAML.replace("  ddconfig:", "  config:"), "'ddconfig'"),
                          (YAML.replace("  embed_dim: 32", "embed_dim: 32").replace("params:\n", "") + "params:\n",
                           "expected"),
                          (YAML + "    embedding: 3\n", "embedding"),
                          (YAML.replace("    ch: 32\n", ""), "another value: ch"),
                          (YAML.replace("vqgan.ckpt", "[5]"), "not list"), ("[" * 15000, "expected"),
                          (YAML.replace("16", "9" * 5000), "expected"), (YAML.replace("16", "2001-13-01"), "expected"),
                          (YAML + "#" * 20000, "20,000 characters")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"vision_tokenizer_config.yaml: .*{message}"):
            read_published_config(tmp_path)
    for name in ("vqgan.ckpt", "openai-clip-vit"):
        for outside in (f"../{name}", "/etc/passwd", f"x/../../{name}"):
            path.write_text(YAML.replace(name, outside))
            with pytest.raises(UserError, match="leads out of the folder"):
                read_published_config(tmp_path)


def test_checkpoint_with_leftovers_of_training(folder, tmp_path):
    path = publish(Libra.from_pretrained(folder), tmp_path / "p")
    content = torch.load(path / "vqgan.ckpt", weights_only=True)
    content["state_dict"] |= {"model_ema.decay": torch.zeros(()), "quantize.codebook": torch.zeros(3)}
    torch.save(content, path / "vqgan.ckpt")
    ImageTokenizer.from_pretrained(path)
    bomb = ", ".join(["&a0 [1, 1]"] + [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)])
    for line, message in (("[1,-1]", "select_layers"), ("[]", "select_layers"), ("[4]", "select_layers"),
                          ("&a [*a, *a]", "select_layers"), (f"[{bomb}]", "select_layers"),
                          ("[1,'3']", "select_layers"), ("[1,.nan]", "select_layers")):
        (path / "vision_tokenizer_config.yaml").write_text(YAML.replace("[1,3]", line))
        with pytest.raises(UserError, match=message):
            ImageTokenizer.from_pretrained(path)


@pytest.mark.parametrize("line, message", [("  embedding: 3\n", "another value: embedding"),
                                           ("  embed_dim: 33\n", "tensors have"),
                                           ("  embed_dim: 1000000000\n", "embed_dim is 1000000000, expected int")])
def test_yaml_keys_that_are_not_known(folder, tmp_path, line, message):
    path = publish(Libra.from_pretrained(folder), tmp_path / "p")
    text = YAML.replace("  embed_dim: 32\n", line if "embed_dim" in line else "  embed_dim: 32\n" + line)
    (path / "vision_tokenizer_config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        ImageTokenizer.from_pretrained(path)


def test_weight_files_prefer_safetensors(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {}})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected in it weight_map"):
        weight_files(tmp_path)


PEAK = """
import re, sys, json
sys.path.insert(0, sys.argv[1])
import torch, model
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
m = model.load(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
total = sum(float(p.detach().sum()) for p in m.parameters())
print(json.dumps([peak() - before, sum(p.numel() * p.element_size() for p in m.parameters()), total,
                  [name for name in ("torch._dynamo", "sympy") if name in sys.modules]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_never_holds_the_weights_twice(tmp_path, dtype):
    """Every weight is read, so that mapped pages count too. bfloat16 is cast shard by shard. torch's compiler, which
    takes seconds to import, is left alone."""
    c = LibraConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)
    torch.manual_seed(0)
    model = Libra(c)
    tensors, index = list(model.state_dict().items()), {}
    for i in range(8):
        shard = {k: v.contiguous() for k, v in tensors[i::8]}
        index |= dict.fromkeys(shard, f"model-{i}.safetensors")
        save_file(shard, tmp_path / f"model-{i}.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": index})
    write_json(tmp_path / "config.json", c.to_dict())
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", PEAK, root, str(tmp_path), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size, total, compiler = json.loads(run.stdout.splitlines()[-1])
    print(f"{dtype}: peak {peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB of weights, {peak / size:.2f} x")
    assert peak <= (1.15 if dtype == "float32" else 1.6) * size and not compiler
    expected = sum(float(p.detach().to(getattr(torch, dtype)).sum()) for p in model.parameters())
    assert abs(total - expected) < 1e-3 * abs(expected)
