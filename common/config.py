"""Reading and checking config.json. Its fields are declared by LlamaConfig (llama.py) and LibraConfig (model.py).

A field whose value this code does not compute (rope scaling, biases, a sliding window, ...) is refused by name.
"""
import math
from dataclasses import fields

from common.weights import UserError, read_json

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps")
REQUIRED_VISION = ("vision_vocab_size", "vision_codebook_num", "image_feature_resolution", "contiguous_signal_size",
                   "newline_token_id", "vision_down_ratio", "bridge_rank")
ALLOWED = {   # fields that are no sizes: the values under which the model is the one computed here
    "model_type": ("llama", "libra", "mistral"), "hidden_act": ("silu",), "attention_bias": (False,),
    "mlp_bias": (False,), "rope_scaling": (None, {"rope_type": "default"}), "sliding_window": (None,),
    "partial_rotary_factor": (1.0,), "quantization_config": (None,), "unified_head": (False,), "use_2d_rope": (False,),
    "addition_mode": (False,), "use_vision_position_embedding": (False,), "concat_signals": (True,),
    "norm_signals": (True,), "vision_prediction_mode": ("1d",)}
ALLOWED |= dict.fromkeys(("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "vision_embd_pdrop",
                          "vision_resid_pdrop"), (0.0,))
IGNORED = ("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id",
           "pad_token_id", "initializer_range", "_name_or_path", "pretraining_tp", "auto_map", "max_length",
           "temperature", "top_p", "do_sample")


def read_config(cls, path, sizes, changes):
    """config.json -> cls(**fields). sizes: fields that the file may lack; changes: fields that override the file's."""
    values = {name: value for name, value in read_json(path).items() if value is not None and name not in IGNORED}
    rope = values.pop("rope_parameters", {})              # where newer versions of Hugging Face keep rope_theta
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}, expected fields in braces")
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    image_tokens = values.pop("max_vision_token_length", None)
    for name, allowed in ALLOWED.items():
        if (value := values.pop(name, allowed[0])) not in allowed:
            raise UserError(f"{path}: {name} is {value!r}; this model computes only {allowed[0]!r}")
    known = {field.name for field in fields(cls)}
    if unknown := [f"{name} = {values[name]!r}" for name in values if name not in known]:
        raise UserError(f"{path}: unknown fields: {', '.join(unknown)}. If they do not change what the model computes, "
                        "take them out of the file")
    required = REQUIRED if is_llama(path) else REQUIRED + REQUIRED_VISION
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{path}: it lacks {', '.join(missing)}")
    try:
        config = cls(**(sizes | values | changes))
    except UserError as error:
        raise UserError(f"{error} ({path})") from None
    if image_tokens is not None and image_tokens != config.image_tokens:
        raise UserError(f"{path}: max_vision_token_length is {image_tokens}, expected {config.image_tokens} "
                        "(image_feature_resolution squared, BOI and EOI)")
    return config


def is_llama(path):
    """Is this the config.json of a model without a visual part?"""
    return "vision_vocab_size" not in read_json(path)


def check_divisible(value, divisor, reason):
    if value % divisor:
        raise UserError(f"config: {value} does not divide by {divisor}: {reason}")


def check_types(config, name, at_least=None):
    """Fields of a dataclass have their declared types; ints are at least 1 (or `at_least`), floats above 0."""
    types = {"dict": dict, "tuple": (list, tuple), "bool": bool, "int": int, "float": (int, float), "str": str}
    for field in fields(config):
        value, declared = getattr(config, field.name), field.type.__name__
        if not isinstance(value, types[declared]) or isinstance(value, bool) and declared != "bool":
            expected = "a number" if declared == "float" else declared
            raise UserError(f"{name}: {field.name} is {value!r}, expected {expected}")
        low = (at_least or {}).get(field.name, 1 if declared == "int" else None)
        if low is not None and value < low:
            raise UserError(f"{name}: {field.name} is {value!r}, expected {low} or more")
        if declared == "float" and not 0 < value < math.inf:
            raise UserError(f"{name}: {field.name} is {value!r}, expected a finite number above 0")
