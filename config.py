"""What config.json says: the sizes and switches of a Libra, read from our folders, the published ones and any LLaMA's.

A value that this model does not compute (rope scaling, biases, a sliding window, ...) is refused by name.
"""
import math
from dataclasses import asdict, dataclass, fields

from weights import UserError, read_json

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps")
REQUIRED_VISION = ("vision_vocab_size", "vision_codebook_num", "image_feature_resolution", "contiguous_signal_size",
                   "newline_token_id", "vision_down_ratio", "bridge_rank")
FIXED = {"model_type": ("llama", "libra", "mistral"), "hidden_act": ("silu",), "attention_bias": (False,),
         "mlp_bias": (False,), "rope_scaling": (None, {"rope_type": "default"}), "sliding_window": (None,),
         "partial_rotary_factor": (1.0,), "quantization_config": (None,), "unified_head": (False,),
         "use_2d_rope": (False,), "addition_mode": (False,), "use_vision_position_embedding": (False,),
         "concat_signals": (True,), "norm_signals": (True,), "vision_prediction_mode": ("1d",)}
FIXED |= dict.fromkeys(("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "vision_embd_pdrop",
                        "vision_resid_pdrop"), (0.0,))
IGNORED = ("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id",
           "pad_token_id", "initializer_range", "_name_or_path", "pretraining_tp", "auto_map", "max_length",
           "temperature", "top_p", "do_sample")


@dataclass
class LibraConfig:
    """The fields of config.json, a LLaMA's and Libra's own. The numbers are the published 11.3 B model's."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0                          # 0: as many as heads
    head_dim: int = 0                                     # 0: hidden_size / heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    vision_vocab_size: int = 514                          # N codes, BOI, EOI
    vision_codebook_num: int = 2
    image_feature_resolution: int = 24                    # G
    contiguous_signal_size: int = 4096                    # C
    newline_token_id: int = 13
    vision_down_ratio: int = 4                            # rank of an expert matrix = its output / this
    bridge_rank: int = 8
    use_bridge: bool = True                               # Table 3 (e)
    use_expert: bool = True                               # Table 3 (d): without it image tokens use the LLaMA's weights
    discrete_only: bool = False                           # Table 3 (f): E_c is zero throughout
    contiguous_targets: bool = False                      # Table 3 (b): image positions regress the next one's E_c
    text_to_image: bool = False                           # has learned to draw, E_c zero, behind a caption (Sec. 4.3)

    def __post_init__(self):
        check_types(self, "config", at_least={"num_key_value_heads": 0, "head_dim": 0, "newline_token_id": 0})
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        for whole, part, why in (
                (self.num_attention_heads, self.num_key_value_heads, "heads share key-value heads evenly"),
                (self.head_dim, 2, "RoPE turns pairs"),
                (self.hidden_size, self.vision_codebook_num, "each codebook embeds into its share of hidden_size"),
                (self.hidden_size, self.vision_down_ratio, "an expert matrix has rank hidden_size / vision_down_ratio"),
                (self.num_key_value_heads * self.head_dim, self.vision_down_ratio, "the same for keys and values"),
                (self.intermediate_size, self.vision_down_ratio, "the same for the FFN")):
            if whole % part:
                raise UserError(f"config: {whole} does not divide by {part}: {why}")

    @property
    def codes(self):
        return self.vision_vocab_size - 2                 # N; BOI is code N, EOI is N + 1

    @property
    def image_tokens(self):
        return self.image_feature_resolution ** 2 + 2     # BOI, G * G codes, EOI

    def to_dict(self):
        """For config.json, with the published names"""
        return {"model_type": "libra", "architectures": ["LibraForCausalLM"], **asdict(self),
                "max_vision_token_length": self.image_tokens}

    @classmethod
    def from_file(cls, path, sizes=None, **changes):
        """path: config.json of a Libra or a LLaMA folder. sizes: visual fields for a file that has none (a LLaMA's).
        changes: fields that stand above the file's."""
        values = {name: value for name, value in read_json(path).items() if value is not None and name not in IGNORED}
        rope = values.pop("rope_parameters", {})          # where newer Hugging Face versions keep rope_theta
        if not isinstance(rope, dict):
            raise UserError(f"{path}: rope_parameters is {rope!r}, expected fields in braces")
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = rope
        values |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        tokens = values.pop("max_vision_token_length", None)
        for name, allowed in FIXED.items():
            if (value := values.pop(name, allowed[0])) not in allowed:
                raise UserError(f"{path}: {name} is {value!r}; this model computes only {allowed[0]!r}")
        known = {field.name for field in fields(cls)}
        if unknown := [f"{name} = {values[name]!r}" for name in values if name not in known]:
            raise UserError(f"{path}: unknown fields: {', '.join(unknown)}. If they do not change what the model "
                            "computes, take them out of the file")
        required = REQUIRED + (() if is_llama(path) else REQUIRED_VISION)
        if lost := [name for name in required if name not in values]:
            raise UserError(f"{path}: it lacks {', '.join(lost)}")
        try:
            config = cls(**((sizes or {}) | values | changes))
        except UserError as error:
            raise UserError(f"{error} ({path})") from None
        if tokens not in (None, config.image_tokens):
            raise UserError(f"{path}: max_vision_token_length is {tokens}, expected {config.image_tokens} "
                            "(image_feature_resolution squared, BOI and EOI)")
        return config


def is_llama(path):
    """A config.json without a visual part"""
    return "vision_vocab_size" not in read_json(path)


def check_types(config, name, at_least=None):
    """Every field has the type of its declaration, and numbers are positive (or as large as `at_least` says)."""
    for field in fields(config):
        value = getattr(config, field.name)
        kind = {"dict": dict, "tuple": (list, tuple), "bool": bool, "int": int, "float": (int, float),
                "str": str}[
            field.type.__name__]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            expected = "a number" if float in (kind if isinstance(kind, tuple) else ()) else field.type.__name__
            raise UserError(f"{name}: {field.name} is {value!r}, expected {expected}")
        low = (at_least or {}).get(field.name, 1 if kind is int else None)
        if low is not None and value < low:
            raise UserError(f"{name}: {field.name} is {value!r}, expected {low} or more")
        if field.type is float and not 0 < value < math.inf:
            raise UserError(f"{name}: {field.name} is {value!r}, expected a finite number above 0")
