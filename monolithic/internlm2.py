"""InternLM2 is a LLaMA with other names and one matrix for queries, keys and values; HoVLE's files hold it so."""
import torch

from common.weights import UserError

NAMES = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
         "mlp.down_proj": "feed_forward.w2", "self_attn.q_proj": "attention.wqkv",
         "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
         "model.embed_tokens": "model.tok_embeddings", "language_model.lm_head": "language_model.output"}


def pack(tensors, config_of):
    """LLaMA's names -> InternLM2's. The rows of wqkv: for each key-value head its query heads, the key and the value.
    config_of(name): the sizes of its heads"""
    packed = {}
    for name, tensor in tensors.items():
        if ":" in name:                                   # a part of a quantized matrix
            packed[name] = tensor
            continue
        if "self_attn.q_proj" in name:
            c = config_of(name)
            parts = [tensors[name.replace("q_proj", f"{x}_proj")].unflatten(0, (c.num_key_value_heads, -1, c.head_dim))
                     for x in "qkv"]                      # (K, H/K or 1, d, C)
            tensor = torch.cat(parts, dim=1).flatten(0, 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if "k_proj" not in name and "v_proj" not in name:
            packed[name] = tensor
    return packed


def unpack(packed, config_of, source):
    """As pack, back, one by one -> pairs of name and tensor"""
    for name, tensor in packed.items():
        c, is_whole = config_of(name), "wqkv" not in name
        for ours, theirs in NAMES.items():
            name = name.replace(theirs, ours)
        if is_whole:
            yield name, tensor
            continue
        if tensor.dim() != 2 or len(tensor) != (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim:
            raise UserError(f"{source}: {name} is {tuple(tensor.shape)}, which does not fit the heads of config.json")
        heads = tensor.unflatten(0, (c.num_key_value_heads, -1, c.head_dim))                  # (K, H/K + 2, d, C)
        for x, part in zip("qkv", (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])):
            yield name.replace("q_proj", f"{x}_proj"), part.flatten(0, 2)
