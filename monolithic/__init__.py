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


def open_model(args, device):
    """The --model of generate.py and evaluate.py in its --dtype and --weights: a Libra, or what else its model_type
    says, with the names that the two scripts know from Libra. --save keeps the quantized model."""
    path, save = Path(require_path(args.model)) / "config.json", args.save
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if save and (not args.weights or Path(save).exists()):
        raise UserError(f"--save {save}: " + ("exists, name a new folder" if args.weights else "give --weights too"))
    if args.weights:
        dtype = quantizer(args.weights, dtype, device)
    values = read_json(path) if path.is_file() else {}
    module, name = KINDS.get(str(values.get("model_type")), ("model", "Libra"))
    if "embedding_config" in values:
        module, name = "monolithic.hovle", "HoVLE"
    cls = getattr(importlib.import_module(module), name)
    model = cls.from_pretrained(args.model, dtype=dtype, device=device).eval()
    if save and os.environ.get("RANK", "0") == "0":       # of evaluate.py's processes the first
        model.save_pretrained(save, parts(model.state_dict()))
        if (recipe := path.with_name("recipe.json")).is_file():               # which tells a pretrained Libra
            shutil.copy(recipe, save)
    if isinstance(model, Libra):
        return model
    if model.text is None:
        raise UserError(f"{args.model}: no tokenizer.model or .json in it; without one this model takes ids only")
    model.tokenizers, model.config = Tokenizers(model.text, None), model.halves[-1]
    return model
