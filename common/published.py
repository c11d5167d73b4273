"""The image tokenizer as its authors published it: vision_tokenizer_config.yaml, vqgan.ckpt and a CLIP folder."""
from pathlib import Path

import yaml

from common.weights import UserError, read_tensors, read_text, select

CONFIG = "vision_tokenizer_config.yaml"
CLIP = "encoder.vision_tower.vision_model."               # prefix of the CLIP's tensors

SAME = ("embed_dim", "codebook_size", "z_channels", "resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions")
NAMES = {name: name for name in SAME} | {                 # in the YAML file -> in ImageTokenizerConfig
    "num_codebook": "num_codebooks", "select_layer": "select_layers", "initial_resolution": "grid",
    "num_attn_head": "num_attn_heads"}
FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
IGNORED = {"freeze", "max_vision_token_length"}


def read_published_config(folder):
    """-> {field of ImageTokenizerConfig: value} without `clip`; path of the checkpoint; path of the CLIP folder"""
    path = Path(folder) / CONFIG
    try:
        top = yaml.safe_load(read_text(path))
        params = top.pop("params")
        ddconfig = params.pop("ddconfig")
        values = top | params | ddconfig
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        error = " ".join(str(error).split())
        raise UserError(f"{path}: expected YAML with params and, in it, ddconfig ({error})") from None
    checkpoint = path.parent / str(values.pop("ckpt_path", None) or "vqgan.ckpt")
    clip_folder = path.parent / str(values.pop("encoder_name", None) or "")
    for key, value in FIXED.items():
        if values.pop(key, value) != value:
            raise UserError(f"{path}: {key} must be {value}")
    unknown, missing = values.keys() - NAMES.keys() - IGNORED, NAMES.keys() - values.keys()
    if unknown or missing:
        raise UserError(f"{path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    return {NAMES[key]: values[key] for key in NAMES}, checkpoint, clip_folder


def read_published_weights(checkpoint, dtype=None):
    """vqgan.ckpt -> {name: tensor} without buffers and without what only its training needed"""
    used = ("decoder.", "quantize.project_", "quant_conv.", "post_quant_conv.", CLIP)
    return select(read_tensors(checkpoint), dtype,
                  lambda name: name if name.startswith(used) and "position_ids" not in name else None)
