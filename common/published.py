"""The image tokenizer as its authors published it: vision_tokenizer_config.yaml, vqgan.ckpt and a CLIP folder."""
from pathlib import Path

import torch
import yaml

from common.weights import UserError, first_few, inside, read_tensors, read_text, select

CONFIG = "vision_tokenizer_config.yaml"
CLIP_PREFIX = "encoder.vision_tower.vision_model."        # of the names of the CLIP's tensors

FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
RENAMED = {"num_codebook": "num_codebooks", "select_layer": "select_layers", "initial_resolution": "grid",
           "num_attn_head": "num_attn_heads"}             # in ImageTokenizerConfig
NEEDED = {"embed_dim", "codebook_size", "z_channels", "resolution", "ch", "ch_mult", "num_res_blocks",
          "attn_resolutions", *RENAMED}
OPTIONAL = {"freeze", "max_vision_token_length", "ckpt_path", "encoder_name", "params", "ddconfig", *FIXED}


def read_published_config(folder):
    """-> {field of ImageTokenizerConfig: value} without `clip`; path of the checkpoint; path of the CLIP folder"""
    path = Path(folder) / CONFIG
    try:
        if len(text := read_text(path)) > 20_000:         # PyYAML would read it for minutes
            raise ValueError("more than 20,000 characters")
        top = yaml.safe_load(text)
        values = top | top["params"] | top["params"]["ddconfig"]
        wrong = [*((values.keys() ^ NEEDED) - OPTIONAL),
                 *(key for key, value in FIXED.items() if values.get(key, value) != value)]
        checkpoint = inside(path.parent, values.get("ckpt_path") or "vqgan.ckpt")
        clip_folder = inside(path.parent, values.get("encoder_name") or ".")
        if wrong:
            raise ValueError(f"keys that are unknown, missing or of another value: {first_few(wrong)}")
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        error = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: expected YAML with params and, in it, ddconfig ({error})") from None
    return {RENAMED.get(key, key): values[key] for key in NEEDED}, checkpoint, clip_folder


def read_published_weights(checkpoint):
    """vqgan.ckpt -> {name: tensor} without buffers and without what only its training needed"""
    used = ("decoder.", "quantize.project_", "quant_conv.", "post_quant_conv.", CLIP_PREFIX)
    return select(read_tensors(checkpoint), torch.float32,
                  lambda name: name if name.startswith(used) and "position_ids" not in name else None)
