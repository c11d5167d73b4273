"""Two systems without a vision encoder, HaploVL and HoVLE, and a LLaVA-like one to hold them against."""
import importlib
import os
import shutil
from pathlib import Path

from common.cli import DTYPES, require_path
from common.quantize import parts, quantizer
from common.weights import UserError, read_json
from model import Libra, Tokenizers

KINDS = {"haplo": ("monolithic.haplovl", "HaploVL"), "llava_llama": ("monolithic.llava", "Llava")}    # by model_type


def open_model(folder, device, dtype=None, weights=None, save=None):
    """A Libra, or what else the folder's model_type says, with the names that generate.py and evaluate.py know from
    Libra. dtype, weights: their --dtype, --weights; save: a new folder for the quantized model"""
    path = Path(require_path(folder)) / "config.json"
    dtype = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if save and (not weights or Path(save).exists()):
        raise UserError(f"--save {save}: " + ("exists, name a new folder" if weights else "give --weights too"))
    if weights:
        dtype = quantizer(weights, dtype, device)
    values = read_json(path) if path.is_file() else {}
    module, name = KINDS.get(str(values.get("model_type")), ("model", "Libra"))
    if "embedding_config" in values:
        module, name = "monolithic.hovle", "HoVLE"
    cls = getattr(importlib.import_module(module), name)
    model = cls.from_pretrained(folder, dtype=dtype, device=device).eval()
    if save and os.environ.get("RANK", "0") == "0":       # of evaluate.py's processes the first
        model.save_pretrained(save, parts(model.state_dict()))
        if (recipe := path.with_name("recipe.json")).is_file():               # which tells a pretrained Libra
            shutil.copy(recipe, save)
    if isinstance(model, Libra):
        return model
    if model.text is None:
        raise UserError(f"{folder}: no tokenizer.model or .json in it; without one this model takes ids only")
    model.tokenizers, model.config = Tokenizers(model.text, None), model.halves[-1]
    return model
