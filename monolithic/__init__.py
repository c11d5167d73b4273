"""Two systems without a vision encoder, HaploVL and HoVLE, and a LLaVA-like one to hold them against."""
import importlib
from pathlib import Path

from common.cli import DTYPES, require_path
from common.weights import UserError, read_json
from model import Libra, Tokenizers

KINDS = {"haplo": ("haplovl", "HaploVL"), "llava_llama": ("llava", "Llava")}             # by model_type


def open_model(args, device):
    """The --model of generate.py and evaluate.py in its --dtype: a Libra, or what else its model_type says, with the
    names that the two scripts know from Libra"""
    path = Path(require_path(args.model)) / "config.json"
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    values = read_json(path) if path.is_file() else {}
    kind = ("hovle", "HoVLE") if "embedding_config" in values else KINDS.get(str(values.get("model_type")))
    if kind is None:
        return Libra.from_pretrained(args.model, dtype=dtype, device=device).eval()
    cls = getattr(importlib.import_module(f"monolithic.{kind[0]}"), kind[1])
    model = cls.from_pretrained(args.model, dtype, device).eval()
    if model.text is None:
        raise UserError(f"{args.model}: no tokenizer.model or .json in it; without one this model takes ids only")
    model.tokenizers, model.config = Tokenizers(model.text, None), model.halves[-1]
    return model
