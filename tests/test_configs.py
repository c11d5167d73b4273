"""config.json of models, image tokenizers and CLIP: what is not computed is refused by name, absurd sizes too."""

import pytest

from common.weights import UserError, read_json, write_json
from llama import LlamaConfig
from model import Libra
from tokenizer import clip_sizes


@pytest.mark.parametrize("field, value, message", [
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_scaling is .*llama3"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_parameters is .*yarn"),
    ("rope_parameters", 5, "rope_parameters is 5"),
    ("sliding_window", -1, "sliding_window is -1"), ("attention_bias", True, "attention_bias is True"),
    ("mlp_bias", True, "mlp_bias is True"), ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("model_type", "qwen3", "model_type is 'qwen3'"), ("num_experts", 8, "num_experts is 8"),
    ("unified_head", True, "unified_head is True"), ("intermediate_size", None, "it lacks intermediate_size"),
    ("bridge_rank", None, "it lacks bridge_rank"), ("max_vision_token_length", 578, "max_vision_token_length is 578"),
    ("vision_down_ratio", 5, "does not divide by 5"), ("vocab_size", 379, "tensors have another type or shape"),
    ("hidden_size", "32", "hidden_size is '32', expected int"), ("use_bridge", "false", "use_bridge is 'false'"),
    ("vision_down_ratio", 0, "vision_down_ratio is 0, expected int from 1 to"),
    ("rope_theta", -1.0, "config.json: rope_theta is -1.0, expected a finite number above 0"),
    ("rms_norm_eps", 0, "rms_norm_eps is 0, expected a finite number above 0"),
    ("tie_word_embeddings", True, "lm_head differs from its embedding"),
    ("hidden_size", 64, "tensors have another type or shape"),
    ("newline_token_id", 14, "newline_token_id is 14"), ("quantization_config", {"bits": 4}, "quantization_config is"),
    ("image_feature_resolution", 5, "max_vision_token_length is 18")])
def test_configs_that_do_not_fit(copy, field, value, message):
    values = read_json(copy / "config.json")
    write_json(copy / "config.json", values | {field: value})
    with pytest.raises(UserError, match=message):
        Libra.from_pretrained(copy)


@pytest.mark.parametrize("field, value", [
    ("rope_parameters", {"type": "linear", "factor": -2.0}), ("rope_parameters", {"factor": 2.0, "rope_theta": 1e4}),
    ("rope_scaling", {"rope_type": "default", "type": "yarn"}), ("rope_scaling", {"type": ["default"]}),
    ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}), ("rope_scaling", 2.0), ("rope_interleaved", True),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}), ("partial_rotary_factor", 0.5),
    ("layer_types", ["full_attention", "sliding_attention"]), ("attention_dropout", 0.1), ("hidden_act", "relu"),
    ("use_qk_norm", True), ("logit_scale", 0.5), ("rms_norm_eps", float("nan")), ("rms_norm_eps", 10 ** 400),
    ("num_hidden_layers", 10 ** 9), ("num_hidden_layers", 100000), ("num_hidden_layers", 2.0), ("hidden_size", 2 ** 40),
    ("vocab_size", 10 ** 30), ("num_attention_heads", True), ("hidden_size", [32]), ("rope_theta", {"a": 1}),
    ("vision_codebook_num", 10 ** 6), ("vision_vocab_size", 1), ("image_feature_resolution", 10 ** 9)])
def test_fields_that_change_what_is_computed_and_absurd_sizes(copy, field, value):
    write_json(copy / "config.json", read_json(copy / "config.json") | {field: value})
    with pytest.raises(UserError, match=f"config.json: {field} is "):
        Libra.from_pretrained(copy)


def test_large_sizes_are_no_mistake():
    """LLaMA-3.1-405B's"""
    LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                num_attention_heads=128, num_key_value_heads=8, max_position_embeddings=131072)


@pytest.mark.parametrize("field, value, message", [
    ("ch_mult", ["a", 1], "ch_mult is"), ("ch_mult", [-1, 1], "ch_mult is"), ("ch_mult", [], "ch_mult"),
    ("num_res_blocks", 10 ** 9, "num_res_blocks is"), ("ch_mult", 5, "ch_mult is 5"),
    ("ch_mult", [1] * 10 ** 5, "ch_mult is"), ("ch_mult", [1] * 17, "ch_mult are 17, expected 2 to 16"),
    ("clip.num_attention_heads", 0, "clip: num_attention_heads is 0"), ("clip.image_size", "32", "clip: image_size is"),
    ("clip.num_hidden_layers", 3.0, "clip: num_hidden_layers is 3.0"),
    ("clip.hidden_size", 33, "33 does not divide by 4"),
    ("clip.layer_norm_eps", float("nan"), "clip: layer_norm_eps is nan"), ("clip", 5, "clip is 5"),
    ("clip.x", 1, "fields: x"),
    ("codebook_size", 15, "power of two"), ("num_attn_heads", 3, "32 does not divide by 3"),
    ("x", 1, "unknown fields: x"),
    ("quantizer", [], "quantizer is"), ("encoder", "none", "encoder is 'none'"), ("grid", 5, "grid 5 do not fit"),
    ("select_layers", [1, 3, 4], "select_layers are"), ("ch", 10 ** 12, "ch is")])
def test_image_tokenizer_configs(copy, field, value, message):
    path = copy / "image_tokenizer/config.json"
    values = read_json(path)
    inner = values["clip"] if "." in field else values
    inner[field.removeprefix("clip.")] = value
    write_json(path, values)
    with pytest.raises(UserError, match=f"image_tokenizer/config.json: .*{message}"):
        Libra.from_pretrained(copy)


def test_clip_folders_that_leave_out_default_sizes(tmp_path):
    """As Hugging Face writes them: sizes equal to CLIPVisionConfig's defaults are left out"""
    path, tower = tmp_path / "config.json", {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24,
                                             "intermediate_size": 4096, "patch_size": 14}
    write_json(path, {"model_type": "clip", "vision_config": tower | {"model_type": "clip_vision_model"}, "x": 1})
    assert clip_sizes(tmp_path) == tower | {"image_size": 224, "layer_norm_eps": 1e-5}
    base = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072,
            "patch_size": 32, "image_size": 224, "layer_norm_eps": 1e-5}
    for values in ({"model_type": "clip_vision_model"}, {"model_type": "clip"}, {"vision_config": {}},
                   {"model_type": "clip_vision_model", "patch_size": None}):
        write_json(path, values)
        assert clip_sizes(tmp_path) == base
    for values, message in (({"model_type": "siglip"}, "model_type is 'siglip'"),
                            ({"hidden_act": "gelu"}, ".*quick_gelu"),
                            ({"num_channels": 1}, ".*three channels"),
                            ({"vision_config": {"patch_size": "a"}}, "patch_size"),
                            ({"vision_config": {"hidden_act": "gelu"}}, ".*quick_gelu"),
                            ({"vision_config": 5}, ".*CLIP")):
        write_json(path, {"model_type": "clip"} | values)
        with pytest.raises(UserError, match=f"config.json: {message}"):
            clip_sizes(tmp_path)
