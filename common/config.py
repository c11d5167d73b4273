"""Reading and checking config.json. Fields are declared by the dataclasses LlamaConfig, LibraConfig and those of
tokenizer.py. A field whose value changes what is computed (rope scaling, biases, a sliding window) is refused by name.
"""
import reprlib
from dataclasses import fields

from common.weights import UserError, first_few, read_json

REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps"}
REQUIRED_VISION = {"vision_vocab_size", "vision_codebook_num", "image_feature_resolution", "contiguous_signal_size",
                   "newline_token_id", "vision_down_ratio", "bridge_rank"}
ALLOWED = {   # the values under which a model is the one computed here
    "model_type": ("llama", "libra", "mistral", "qwen2"), "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,), "concat_signals": (True,), "norm_signals": (True,),
    "vision_prediction_mode": ("1d",)}
SCALED_ROPE = {"linear": ("factor",),
               "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
# Fields of no effect here: of files, training, generate() and other programs; also all of the form _* and *_token_id.
IGNORED = """architectures torch_dtype dtype transformers_version auto_map tokenizer_class transformers.js_config
    is_llama_config unsloth_version unsloth_fixed model_name id2label label2id initializer_range pretraining_tp
    use_cache is_decoder return_dict use_return_dict output_attentions output_hidden_states attn_implementation
    max_window_layers gradient_checkpointing use_flash_attention max_sequence_length max_length min_length do_sample
    num_beams top_k top_p num_beam_groups temperature typical_p repetition_penalty length_penalty
    num_return_sequences chat_template"""
# Bounds of whole numbers, where they are not 1 and 2^17. A module is built for each layer, block and codebook; a
# picture of 40 tiles of 1024 pixels takes a gigabyte.
LEAST = {"num_key_value_heads": 0, "head_dim": 0, "newline_token_id": 0, "num_res_blocks": 0, "select_layers": 0,
         "codebook_size": 2, "vision_vocab_size": 3}
MOST = {"num_hidden_layers": 1000, "num_codebooks": 1000, "vision_codebook_num": 1000, "num_res_blocks": 100,
        "ch_mult": 1000, "vocab_size": 2 ** 24, "max_position_embeddings": 2 ** 24, "codebook_size": 2 ** 20,
        "vision_vocab_size": 2 ** 21, "image_token_index": 2 ** 24, "image_size": 1024, "default_image_size": 1024,
        "force_image_size": 1024, "max_dynamic_patch": 40}


def read_config(cls, path, sizes=None, **changes):
    """config.json -> cls(**fields). sizes: fields that the file may lack; changes: fields that override the file's."""
    values = {name: value for name, value in read_json(path).items() if value is not None}
    known, image_tokens = {field.name for field in fields(cls)}, values.pop("max_vision_token_length", None)
    for name in ("rope_scaling", "rope_parameters"):      # the latter: newer versions of Hugging Face
        if name in values:
            rope = values.pop(name)
            values["rope_scaling"] = read_rope(rope, name, path)
            values |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if values.get("model_type") == "qwen2":
        values["qkv_bias"] = True
    window = values.get("sliding_window")
    if values.get("use_sliding_window") is False or type(window) is int and window > 0:
        values.pop("sliding_window", None)
        if values.get("use_sliding_window", True) and type(values.get("max_position_embeddings")) is int:
            values["max_position_embeddings"] = min(values["max_position_embeddings"], window)        # Mistral v0.1
    for name in [name for name in values if name not in known]:
        if not has_no_effect(name, value := values.pop(name)):
            raise UserError(f"{path}: {name} is {reprlib.repr(value)}, which this model does not compute")
    if missing := (REQUIRED if is_llama(path) else REQUIRED | REQUIRED_VISION) - values.keys():
        raise UserError(f"{path}: it lacks {', '.join(sorted(missing))}")
    config = make_config(cls, (sizes or {}) | values | changes, path)
    if image_tokens not in (None, expected := getattr(config, "image_tokens", None)):
        raise UserError(f"{path}: max_vision_token_length is {image_tokens!r:.99}, expected {expected} "
                        "(image_feature_resolution squared, BOI and EOI)")
    return config


def read_rope(rope, name, source):
    """rope_scaling or rope_parameters -> what llama.scale_rope takes. "dynamic" changes nothing up to
    max_position_embeddings, which is all that we compute."""
    refused = UserError(f"{source}: {name} is {reprlib.repr(rope)}, which this model does not compute")
    if not isinstance(rope, dict) or rope.get("partial_rotary_factor", 1) != 1:
        raise refused
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    if not kinds and rope.keys() <= {"rope_theta", "partial_rotary_factor"}:
        return {}
    if not kinds or kinds[0] not in ("default", "dynamic", *SCALED_ROPE) or kinds[-1] != kinds[0]:
        raise refused
    numbers = {key: rope.get(key) for key in SCALED_ROPE.get(kinds[0], ())}
    if not all(type(x) in (int, float) and 0 < x < 1e30 for x in numbers.values()) or (
            kinds[0] == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]):
        raise refused
    return {"rope_type": kinds[0]} | numbers if numbers else {}


def has_no_effect(name, value):
    """Is a model with this field, which is none of ours, the one computed here?"""
    if name in ALLOWED:
        return value in ALLOWED[name]
    if name == "layer_types" and isinstance(value, list):
        return all(kind == "full_attention" for kind in value)
    return not value or name in IGNORED.split() or name.startswith("_") or name.endswith("_token_id")


def is_llama(path):
    """Is this the config.json of a model without a visual part?"""
    return "vision_vocab_size" not in read_json(path)


def make_config(cls, values, source):
    """cls(**values), where all fields must be known; errors begin with `source`"""
    if unknown := values.keys() - {field.name for field in fields(cls)}:
        raise UserError(f"{source}: unknown fields: {first_few(unknown)}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_divisible(value, divisor, reason):
    if value % divisor:
        raise UserError(f"{value} does not divide by {divisor}: {reason}")


def check_fields(config):
    """Fields of a dataclass have their declared types (a tuple holds whole numbers) and lie within their bounds."""
    for field in fields(config):
        value, kind, name = getattr(config, field.name), field.type, field.name
        least, most, is_list = LEAST.get(name, 1), MOST.get(name, 2 ** 17), isinstance(value, (list, tuple))
        fits, expected = isinstance(value, kind), kind.__name__
        if kind is float:
            fits, expected = type(value) in (int, float) and 0 < value < 1e30, "a finite number above 0"
        elif kind in (int, tuple):
            numbers, expected = value if is_list else [value], f"{kind.__name__} from {least} to {most}"
            fits = is_list == (kind is tuple) and len(numbers) <= 64 and all(
                type(n) is int and least <= n <= most for n in numbers)
        if not fits:
            raise UserError(f"{name} is {reprlib.repr(value)}, expected {expected}")
