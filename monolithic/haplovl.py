"""HaploVL (Yang et al., ICML 2025): raw patches and text together go through a pre-decoder, then through an LLM.

    python -m monolithic.haplovl --stage 1 --llm vicuna-7b-v1.5 --clip clip-vit-large-patch14-336 --out runs/haplovl-1
    python -m monolithic.haplovl --stage 2 --model runs/haplovl-1 --data llava_v1_5_mix665k.json --images DIR

Stage 1 distils the pre-decoder from CLIP (patches) and from the LLM's embeddings (text); stage 2 trains all on answers,
best after a run on captions with --freeze-llm (ours): what the pre-decoder hands over is new to the LLM at first.
"Ours" marks what the paper leaves open. Letters: B rows, L positions, n image tokens, D_pre and D sizes of the halves.
"""
import re
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common.cli import run
from common.config import check_divisible, make_config, read_rope
from common.weights import UserError, read_json, shapes_only
from llama import Block, Linear, Llama, LlamaConfig, RMSNorm, run_layers
from model import cross_entropy
from monolithic import shared, stages


@dataclass
class HalfConfig(LlamaConfig):
    """base_config (the LLM) or pre_config of config.json; both halves use the image fields of base_config."""
    vocab_size: int = 152064
    intermediate_size: int = 22016
    num_key_value_heads: int = 32
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    norm_mode: str = "rmsnorm"
    attention_rope: bool = False                          # of pre_config: RoPE of its own, else base_config's
    patch_size: int = 14
    default_image_size: int = 336                         # S
    image_grid_pinpoints: list = field(default_factory=list)      # canvases: height, width; []: the 14 published ones
    image_aspect_ratio: str = "anyres_max_6"              # with "any": tiles; else one square
    image_token_index: int = 151646
    bias, edges = True, ([], [])                          # of all matrices; nothing stands around image tokens

    def __post_init__(self):
        super().__post_init__()
        check_divisible(self.hidden_size, self.num_attention_heads, "heads share the hidden size")
        self.grid, self.tiled = self.default_image_size // self.patch_size, "any" in self.image_aspect_ratio
        self.image_grid_pinpoints = self.image_grid_pinpoints or shared.published_canvases(self.default_image_size)
        if self.hidden_act not in ACTIVATIONS or self.norm_mode not in NORMS:
            raise UserError(f"no such function: hidden_act {self.hidden_act!r} or norm_mode {self.norm_mode!r}")
        if not self.grid:
            raise UserError(f"default_image_size is {self.default_image_size}, less than a patch of {self.patch_size}")

    def prepare(self, picture, _):
        return shared.prepare_picture(picture, self)


def read_config(path):
    """-> base, pre. Fields that are not ours belong to transformers; three that change what is computed are checked."""
    values, configs = read_json(path), []
    for name in ("base_config", "pre_config"):
        half = values.get(name)
        if values.get("model_type") != "haplo" or not isinstance(half, dict):
            raise UserError(f"{path}: expected model_type haplo, a base_config and a pre_config")
        for key in ("use_sliding_window", "tie_word_embeddings"):
            if half.get(key):
                raise UserError(f"{path}: {key} is {half[key]!r}, HaploVL computes only False")
        half = half | {"rope_scaling": read_rope(half.get("rope_scaling") or {}, "rope_scaling", path)}
        half = half | {"head_dim": 0, "num_key_value_heads": half.get("num_key_value_heads", 32) or 0}
        half = {key: half[key] for key in HalfConfig.__dataclass_fields__ if key in half}
        configs.append(make_config(HalfConfig, half, path))
    base, pre = configs
    if not 0 <= base.image_token_index < base.vocab_size:
        raise UserError(f"{path}: image_token_index is {base.image_token_index}, expected 0 to {base.vocab_size - 1}")
    shared.check_canvases(base, path)
    if not pre.attention_rope and pre.head_dim != base.head_dim:
        raise UserError(f"{path}: heads of {pre.head_dim} need attention_rope, the LLM's are of {base.head_dim}")
    return base, pre


# ---------------------------------------------------------------- the model

class InputRMSNorm(RMSNorm):
    """In the dtype of its input, as the authors'; llama.RMSNorm has the mean in float32."""
    def forward(self, x):
        return self.weight.to(x.dtype) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": InputRMSNorm}
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh,
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), partial(F.gelu, approximate="tanh"))


def blocks(config):
    made = [Block(config, shared.BlockAttention, norm=NORMS[config.norm_mode]) for _ in range(config.num_hidden_layers)]
    for block in made:
        block.mlp.activation = ACTIVATIONS[config.hidden_act]
    return made


class PreDecoder(nn.Module):
    def __init__(self, base, pre):
        super().__init__()
        self.base, self.pre, self.halves, self.text, self.checkpoint_activations = base, pre, (pre, base), None, False
        width, p, m = pre.hidden_size, base.patch_size, nn.Module()
        self.model = m
        m.embed_tokens = nn.Embedding(base.vocab_size, width)
        m.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, p, stride=p, bias=False)})
        m.pre_pos_embed = nn.Parameter(nn.init.normal_(torch.empty(1, base.grid ** 2, width), std=0.02))
        m.image_newline = nn.Parameter(torch.zeros(width))
        m.pre_norm = nn.LayerNorm(width, 1e-5)
        m.layers = nn.ModuleList(blocks(pre))
        m.pre_connector = Linear(width, base.hidden_size)

    def image_tokens(self, batch):
        """-> (n, D_pre): patches with their position in the tile, newlines"""
        m = self.model
        patches = m.patch_embed.proj(batch.tiles.to(m.image_newline.dtype)).flatten(2).transpose(1, 2)
        vectors = torch.cat([(patches + m.pre_pos_embed).flatten(0, 1), m.image_newline[None]])
        return vectors[batch.order]

    def encode(self, ids, batch=None, cache=None):
        """ids (B, L): those of the batch or, with prompts in the cache, one new token a row -> (B, L, D_pre)"""
        x, mask = self.model.embed_tokens(ids), None
        if batch is not None:
            tokens, mask = self.image_tokens(batch), batch.mask()
            x = shared.insert(x, batch.image_index, tokens)
        layers = self.model.layers[:self.pre.num_hidden_layers]
        rope_config = self.pre if self.pre.attention_rope else self.base
        x = run_layers(self.model.pre_norm(x), layers, rope_config, cache, mask, self.checkpoint_activations)
        return x, mask


class HaploVL(PreDecoder):
    """`text` is set when the model came from a folder with a tokenizer."""
    read, forward, row_lengths = shared.read, shared.next_token_loss, shared.row_lengths
    read_config, from_pretrained = staticmethod(read_config), classmethod(shared.from_pretrained)

    def __init__(self, base, pre):
        super().__init__(base, pre)
        self.model.layers.extend(blocks(base))
        self.model.norm = NORMS[base.norm_mode](base.hidden_size, base.rms_norm_eps)
        self.lm_head = Linear(base.hidden_size, base.vocab_size)
        self.apply(shared.initialise)

    def hidden(self, ids, batch=None, caches=(None, None)):
        """As encode, with a cache for each half -> (B, L, D) after the final norm"""
        (x, mask), layers = self.encode(ids, batch, caches[0]), self.model.layers[self.pre.num_hidden_layers:]
        x = self.model.pre_connector(x)
        return self.model.norm(run_layers(x, layers, self.base, caches[1], mask, self.checkpoint_activations))

    def save_pretrained(self, folder, tensors=None):
        """As shared.save_folder; in config.json base_config's fields stand at the top too, as in the released one"""
        base, pre = asdict(self.base), asdict(self.pre)
        shared.save_folder(folder, tensors or self.state_dict(), self.text,
                           {**base, "model_type": "haplo", "base_config": base, "pre_config": pre})


# ---------------------------------------------------------------- stage 1: distillation, stage 2: answers

class Distillation(PreDecoder):
    """The pre-decoder with two heads, which are dropped afterwards. Ours: both are one matrix; the scale of the text
    logits learns, from CLIP's 1 / 0.07 on; all parts of the pre-decoder start new and learn; so does the connector of
    stage 2, here by mapping text to the LLM's embeddings themselves, which the text head only has to tell apart."""

    def __init__(self, base, pre, clip_width):
        super().__init__(base, pre)
        self.vision_head = Linear(pre.hidden_size, clip_width)
        self.text_head = Linear(pre.hidden_size, base.hidden_size)
        self.logit_scale = nn.Parameter(torch.full((1,), 1 / 0.07))
        self.apply(shared.initialise)

    def forward(self, batch, features, table):
        """features (patches of all tiles, width): CLIP's; table (V, D): the LLM's embeddings. -> sums over patches of
        1 - cosine (ours), over text tokens of the cross-entropy with the token itself (current token prediction) plus
        the connector's squared error as a share of the table's mean square (ours)"""
        x, is_patch = self.encode(batch.ids, batch)[0], batch.order >= 0      # ours: newlines are not counted
        seen = self.vision_head(x.flatten(0, 1)[batch.image_index[is_patch]])
        vision = 1 - F.cosine_similarity(seen.float(), features[batch.order[is_patch]].float(), dim=-1)
        head = lambda text: self.logit_scale * F.linear(self.text_head(text), table)
        where = batch.loss_mask.nonzero(as_tuple=True)    # as in shared.next_token_loss
        text, ids = x[where], batch.ids[where]
        scale = torch.linalg.vector_norm(table, dtype=torch.float32).square() / table.numel()         # no float32 copy
        error = (self.model.pre_connector(text) - table[ids]).float().square().mean(-1) / scale
        return vision.sum(), cross_entropy(head, text, ids) + error.sum()

    def save_pretrained(self, folder, tensors=None):
        """The HaploVL that stage 2 starts from, with the LLM's layers. Ours: <image> has a row of zeros in lm_head."""
        with shapes_only():
            model = HaploVL(self.base, self.pre)
        model.text, tensors, n = self.text, dict(tensors or self.state_dict()), self.pre.num_hidden_layers
        llm = Llama.from_pretrained(self.text.path.parent).state_dict()
        llm["lm_head.weight"] = F.pad(llm["lm_head.weight"], (0, 0, 0, 1))
        dtype = llm["lm_head.weight"].dtype               # the LLM keeps its bits; one type for a whole folder
        llm = {re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + n), name): llm[name] for name in llm}
        tensors = {k: torch.zeros(t.shape) for k, t in model.state_dict().items() if "bias" in k} | llm | tensors
        model.save_pretrained(folder, {name: tensors[name].to(dtype) for name in model.state_dict()})


def build(args, dist):
    """-> stages.Stage. Ours: a new pre-decoder has the sizes of the CLIP that it is distilled from"""
    if args.stage == 2:
        model = stages.trained_before(args, "haplovl", HaploVL)
        for part in (model.model.layers[model.pre.num_hidden_layers:], model.model.norm, model.lm_head):
            part.requires_grad_(not args.freeze_llm)
        return stages.Stage(model, model.model.layers)
    llm, text, clip, sizes = stages.new_parts(args)
    if llm.config.head_dim * llm.config.num_attention_heads != llm.config.hidden_size:
        raise UserError(f"{args.llm}: heads of {llm.config.head_dim}, where HaploVL's share hidden_size evenly")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    both = {"vocab_size": llm.config.vocab_size + 1, "image_token_index": llm.config.vocab_size,
            "patch_size": sizes["patch_size"], "default_image_size": sizes["image_size"],
            "image_aspect_ratio": args.image_aspect_ratio or "anyres_max_6"}
    base = HalfConfig(**asdict(llm.config) | both | {"head_dim": 0, "tie_word_embeddings": False})
    pre = HalfConfig(**both | {name: sizes[name] for name in names}, num_key_value_heads=0, norm_mode="layernorm",
                     rms_norm_eps=sizes["layer_norm_eps"], attention_rope=True)
    model = Distillation(base, pre, sizes["hidden_size"])
    model.text = text
    table, clip = llm.model.embed_tokens.weight.to(dist.device, dist.dtype), clip.to(dist.device, dist.dtype)

    def loss(wrapped, batch):
        with torch.no_grad():                             # ours: the last layer but one, as LLaVA
            features = clip.hidden_states(batch.tiles.to(dist.dtype), -1)[-1][:, 1:].flatten(0, 1)
        return dict(zip(("vision", "text"), wrapped(batch, features, table)))     # ours: all tokens count alike
    return stages.Stage(model, model.model.layers, loss, every_token=True, teachers=[*clip.parameters(), table])


def main():
    parser = stages.options(__doc__, "haplovl", [("distillation", "captions/*.tar", 1e-4),
                                                 ("answers", "chats/chat.json", 2e-5)])
    parser.add_argument("--image-aspect-ratio", choices=("anyres_max_6", "square"),
                        help="stage 1: a picture is up to 6 tiles (None: this), or one square")
    parser.add_argument("--freeze-llm", action="store_true",
                        help="stage 2 on captions, before it trains all: pre-decoder and connector learn (ours)")
    stages.run_stage(parser, build, "image_aspect_ratio")


if __name__ == "__main__":
    run(main)
