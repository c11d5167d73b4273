"""HoVLE (Tao et al., CVPR 2025): a holistic embedding module turns patches and text into what an LLM reads as words.

    python -m monolithic.hovle --stage 1 --llm vicuna-7b-v1.5 --clip clip-vit-large-patch14-336 --out runs/hovle-1
    python -m monolithic.hovle --stage 2 --model runs/hovle-1 --data 'coyo/{00000..07776}.tar' --out runs/hovle-2
    python -m monolithic.hovle --stage 3 --model runs/hovle-2 --data llava_v1_5_mix665k.json --images DIR

Stage 1 distils the module, stage 2 trains it alone on the next token, stage 3 trains all. "Ours" marks what the paper
leaves open. Letters: B rows, L positions, C width of both halves, g patches of a tile's side, n tiles of a batch.
"""
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import tokenizer
from common.cli import POSITIVE, run
from common.config import check_divisible, make_config, read_rope
from common.weights import UserError, read_json
from llama import Block, Linear, Llama, LlamaConfig, run_layers
from monolithic import internlm2, shared, stages

# MEAN, STD: ImageNet's. FIXED: fields of config.json, each with the only value that this code computes
MEAN, STD = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[:, :, None, None]
FIXED = {"hidden_act": "silu", "attention_bias": False, "bias": False, "mlp_bias": False, "tie_word_embeddings": False,
         "num_channels": 3, "use_ls": False, "drop_path_rate": 0, "use_pixel_shuffle_proj": True, "ps_version": "v2",
         "downsample_ratio": 0.5, "special_token_maps": {}, "dynamic_image_size": True, "min_dynamic_patch": 1}


@dataclass
class HalfConfig(LlamaConfig):
    """embedding_config (the module) or llm_config of config.json; both halves know the fields of pictures."""
    image_size: int = 448                                 # of the table of positions
    patch_size: int = 14
    img_context_token_id: int = 92546                     # <img> and </img> are the two ids before it
    pixel_shuffle_loc: str = "pre"                        # "post" (HD): the module reads all patches
    force_image_size: int = 448                           # S of a tile
    max_dynamic_patch: int = 6                            # most tiles of a row
    use_thumbnail: bool = True
    normalize_encoder_output: bool = False                # the module's output to length 1

    def __post_init__(self):
        super().__post_init__()
        check_divisible(self.force_image_size, 2 * self.patch_size, "2 x 2 patches become one token")
        self.default_image_size, token = self.force_image_size, self.img_context_token_id     # names of shared.py
        self.image_token_index, self.edges = token, ([token - 2], [token - 1])
        self.grid = self.force_image_size // self.patch_size // 2             # tokens of a tile's side
        if self.pixel_shuffle_loc not in ("pre", "post") or not 2 <= token < self.vocab_size:
            raise UserError(f"pixel_shuffle_loc is {self.pixel_shuffle_loc!r}, img_context_token_id {token}; expected "
                            f"pre or post, and an id from 2 to {self.vocab_size - 1}")

    def prepare(self, image, n_pictures):
        """RGB PIL image, one of n in a row, which share the tiles -> tiles (n, 3, S, S); order of its tokens"""
        most = max(1, self.max_dynamic_patch // n_pictures)
        tiles = shared.dynamic_tiles(image, self.force_image_size, most, self.use_thumbnail)
        return shared.stack_tiles(tiles, MEAN, STD), torch.arange(len(tiles) * self.grid ** 2)


PICTURES = [name for name in HalfConfig.__dataclass_fields__ if name not in LlamaConfig.__dataclass_fields__]
OF_MODULE, OF_TOP = PICTURES[:4], PICTURES[4:]            # in embedding_config, and at the top of config.json


def read_config(path):
    """-> base (the LLM), pre (the module)"""
    top = read_json(path)
    module, llm = (top.get(name) for name in ("embedding_config", "llm_config"))
    if not isinstance(module, dict) or not isinstance(llm, dict):
        raise UserError(f"{path}: no HoVLE: expected in it embedding_config and llm_config")
    for part in (top, module, {"bias": True} | llm):      # the default of the released code
        wrong = [name for name, known in FIXED.items() if part.get(name, known) not in (None, known)]
        if wrong:
            raise UserError(f"{path}: {wrong[0]} is {part[wrong[0]]!r:.99}, which HoVLE does not compute")
    pictures = {name: module.get(name) for name in OF_MODULE} | {name: top.get(name) for name in OF_TOP}
    pictures["force_image_size"], configs = pictures["force_image_size"] or module.get("image_size"), []
    for part in (llm, module | {"vocab_size": module.get("llm_vocab_size")}):
        half = {name: (part | pictures).get(name) for name in HalfConfig.__dataclass_fields__}
        half["rope_scaling"] = read_rope(half["rope_scaling"] or {}, "rope_scaling", path)
        configs.append(make_config(HalfConfig, {key: x for key, x in half.items() if x is not None}, path))
    if configs[0].hidden_size != configs[1].hidden_size or configs[0].vocab_size > configs[1].vocab_size:
        raise UserError(f"{path}: the module needs the LLM's hidden_size and vocab_size, and has others")
    return configs


# ---------------------------------------------------------------- the model

def pixel_shuffle(x):
    """(n, g*g, C) -> (n, g*g / 4, 4C): 2 x 2 patches become one, with the channels in the order row, column, C"""
    n, length, width = x.shape
    half = int(length ** 0.5) // 2
    return x.view(n, half, 2, half, 2, width).transpose(2, 3).reshape(n, half * half, 4 * width)


class Embedder(nn.Module):
    """The holistic embedding module. `text` is set when the model came from a folder with a tokenizer."""

    def __init__(self, base, pre):
        super().__init__()
        self.base, self.pre, self.halves, self.text, self.checkpoint_activations = base, pre, (pre, base), None, False
        width, m, v = pre.hidden_size, nn.Module(), nn.Module()
        self.embedding_model, m.vision_embeddings = m, v
        v.class_embedding = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)       # never used
        positions = 1 + (pre.image_size // pre.patch_size) ** 2                               # the first is never used
        v.position_embedding = nn.Parameter(nn.init.normal_(torch.empty(1, positions, width), std=0.02))
        v.patch_embedding = nn.Conv2d(3, width, pre.patch_size, stride=pre.patch_size)
        m.llm_text_embeddings = nn.Embedding(pre.vocab_size, width)
        m.pixel_shuffle_proj = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, width))
        m.encoder = nn.ModuleList(Block(pre) for _ in range(pre.num_hidden_layers))

    def patches(self, tiles):
        """(n, 3, S, S) -> (n, g*g, C) with positions; the table is resized to the grid of other tiles"""
        v, side = self.embedding_model.vision_embeddings, self.pre.image_size // self.pre.patch_size
        x = v.patch_embedding(tiles.to(v.patch_embedding.weight.dtype))
        table = v.position_embedding[:, 1:].mT.unflatten(2, (side, side))
        if side != x.shape[-1]:
            table = F.interpolate(table.float(), x.shape[-2:], mode="bicubic", align_corners=False).to(table.dtype)
        return (x + table).flatten(2).mT

    def lengthen(self, ids):
        """For "post": repeats each image token 4 times, once a patch. -> the longer ids (B, L'), and where in them each
        token's first place is (B, L)"""
        repeats = 1 + 3 * (ids == self.pre.image_token_index).long()
        ends = repeats.cumsum(1)
        places = torch.arange(int(ends[:, -1].max()), device=ids.device).repeat(len(ids), 1)
        return F.pad(ids, (0, 1)).gather(1, torch.searchsorted(ends, places, right=True)), ends - repeats

    def encode(self, ids, batch=None, cache=None):
        """ids (B, L): those of the batch or, with prompts in the cache, one new token a row -> what the LLM reads"""
        m, post = self.embedding_model, batch is not None and self.pre.pixel_shuffle_loc == "post"
        rows, places = self.lengthen(ids) if post else (ids, None)
        x = m.llm_text_embeddings(rows)
        if batch is not None:
            vectors, image_index = self.patches(batch.tiles), batch.image_index
            if post:
                image_index = (rows == self.pre.image_token_index).flatten().nonzero()[:, 0]
            else:
                vectors = m.pixel_shuffle_proj(pixel_shuffle(vectors))
            x = shared.insert(x, image_index, vectors.flatten(0, 1))
        x = run_layers(x, m.encoder, self.pre, cache, None, self.checkpoint_activations)
        if post:
            vectors = m.pixel_shuffle_proj(pixel_shuffle(x.flatten(0, 1)[image_index].view_as(vectors)))
            x = shared.insert(x.take_along_dim(places[..., None], 1), batch.image_index, vectors.flatten(0, 1))
        return F.normalize(x, dim=-1) if self.pre.normalize_encoder_output else x

    def config_of(self, name):
        return self.base if name.startswith("language_model.") else self.pre

    def save_pretrained(self, folder, tensors=None):
        """As shared.save_folder, with the released names"""
        llm, module = asdict(self.base), asdict(self.pre)
        module["llm_vocab_size"] = module.pop("vocab_size")
        top = {name: module.pop(name) for name in OF_TOP}
        llm = {name: x for name, x in llm.items() if name not in PICTURES} | {"bias": False}
        config = {"model_type": "internvl_chat", **FIXED, **top, "llm_config": llm, "embedding_config": FIXED | module}
        shared.save_folder(folder, internlm2.pack(tensors or self.state_dict(), self.config_of), self.text, config)


class HoVLE(Embedder):
    read, forward, read_config = shared.read, shared.next_token_loss, staticmethod(read_config)
    from_pretrained = classmethod(partial(shared.from_pretrained, unpack=internlm2.unpack))

    def __init__(self, base, pre):
        super().__init__(base, pre)
        self.language_model = Llama(base)
        self.apply(shared.initialise)
        self.language_model.model.embed_tokens.requires_grad_(False)                          # never used

    @property
    def lm_head(self):
        return self.language_model.lm_head

    def hidden(self, ids, batch=None, caches=(None, None)):
        """As encode, with a cache for each half -> (B, L, C) after the final norm"""
        x, llm = self.encode(ids, batch, caches[0]), self.language_model.model
        return llm.norm(run_layers(x, llm.layers, self.base, caches[1], None, self.checkpoint_activations))

    def row_lengths(self, rows):
        longer = 3 * (self.pre.pixel_shuffle_loc == "post")
        return [[len(row) + longer * row.count(self.pre.image_token_index) for row in rows], [len(row) for row in rows]]


# ---------------------------------------------------------------- stage 1: distillation; 2: the module; 3: all

class Distillation(Embedder):
    """The module with a head to CLIP's width, which is dropped afterwards (ours: who the teacher is, the head). The
    text's target is the LLM's table, which the module's starts from."""

    def __init__(self, base, pre, llm, clip_width):
        super().__init__(base, pre)
        self.vision_head = Linear(pre.hidden_size, clip_width)
        self.apply(shared.initialise)
        table = self.embedding_model.llm_text_embeddings.weight
        table.data[:llm.config.vocab_size] = llm.model.embed_tokens.weight    # the three new ids start at random

    def forward(self, batch, features, table):
        """features (n, tokens of a tile, width): CLIP's; table (V, C): the LLM's. -> sums over rows of the means over
        their image tokens and over their text tokens of 1 - cosine, so that both count the same"""
        x, image, text = self.encode(batch.ids, batch).flatten(0, 1), batch.image_index, batch.loss_mask.view(-1)
        text = text.nonzero()[:, 0]
        words = table[batch.ids.view(-1)[text]]

        def sum_of_means(places, ours, theirs):
            rows = places // batch.ids.shape[1]
            losses = 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1)
            return (losses / torch.bincount(rows)[rows]).sum()
        return (sum_of_means(image, self.vision_head(x[image]), features.flatten(0, 1)),
                sum_of_means(text, x[text], words))

    def save_pretrained(self, folder, tensors=None):
        """The HoVLE that stage 2 starts from, with the LLM's layers. Ours: zeros for the three ids in its tables"""
        tensors, llm = tensors or self.state_dict(), Llama.from_pretrained(self.text.path.parent).state_dict()
        dtype = llm["lm_head.weight"].dtype               # the LLM keeps its bits; one type for a whole folder
        tensors = {name: x.to(dtype) for name, x in tensors.items() if name != "vision_head.weight"}
        for name, x in llm.items():
            new_ids = 3 * (name in ("model.embed_tokens.weight", "lm_head.weight"))
            tensors[f"language_model.{name}"] = F.pad(x, (0, 0, 0, 3)) if new_ids else x
        super().save_pretrained(folder, tensors)


def distill(args, dist):
    """-> stages.Stage. Ours: tiles of the CLIP's size, patches of half its side: an image token is its patch"""
    llm, text, clip, sizes = stages.new_parts(args)
    n, side = llm.config.vocab_size, sizes["image_size"]
    check_divisible(sizes["patch_size"], 2, "a patch of the module has half the side of the CLIP's")
    if llm.config.qkv_bias:
        raise UserError(f"{args.llm}: HoVLE's layout has no place for the biases of Qwen 2")
    both = asdict(llm.config) | {"vocab_size": n + 3, "img_context_token_id": n + 2, "tie_word_embeddings": False,
                                 "image_size": side, "force_image_size": side, "patch_size": sizes["patch_size"] // 2,
                                 "pixel_shuffle_loc": args.pixel_shuffle_loc or "pre",
                                 "max_dynamic_patch": args.tiles or 6}
    base, pre = HalfConfig(**both), HalfConfig(**both | {"num_hidden_layers": args.module_layers or 8})
    model = Distillation(base, pre, llm, sizes["hidden_size"])
    model.text = text
    table, clip = llm.model.embed_tokens.weight.to(dist.device, dist.dtype), clip.to(dist.device, dist.dtype)

    def loss(wrapped, batch):
        with torch.no_grad():                             # ours: the last layer but one
            rgb = batch.tiles * STD.to(batch.tiles) + MEAN.to(batch.tiles)
            pixels = (rgb - tokenizer.MEAN.to(rgb)) / tokenizer.STD.to(rgb)
            features = clip.hidden_states(pixels.to(dist.dtype), -1)[-1][:, 1:]
        return dict(zip(("vision", "text"), wrapped(batch, features, table)))
    return stages.Stage(model, model.embedding_model.encoder, loss, count_rows, shared.UnpairedBuilder, True,
                        [*clip.parameters(), table])


def count_rows(batch):
    """Of a batch of stage 1: rows with text and with pictures, which are what its losses are sums over"""
    rows = (batch.image_index // batch.ids.shape[1]).unique()
    return batch.counts() | {"text": int(batch.loss_mask.any(1).sum()), "vision": len(rows)}


def build(args, dist):
    """-> the Stage of --stage"""
    if args.stage == 1:
        stage = distill(args, dist)
    else:
        model = stages.trained_before(args, "hovle", HoVLE)
        llm = model.language_model.requires_grad_(args.stage == 3)
        llm.model.embed_tokens.requires_grad_(False)
        stage = stages.Stage(model, [*model.embedding_model.encoder, *llm.model.layers])
    pre = stage.model.pre                                 # its row is longer in "post"
    args.max_length = min(args.max_length, pre.max_position_embeddings // (4 if pre.pixel_shuffle_loc == "post" else 1))
    return stage


def main():
    parser = stages.options(__doc__, "hovle", [
        ("distillation", "captions/*.tar", 1e-4), ("the module, next token", "captions/*.tar", 1e-4),
        ("all, next token", "chats/chat.json", 2e-5)])
    for name, meaning in (("--module-layers", "of the module; None: 8"), ("--tiles", "most of a row; None: 6")):
        parser.add_argument(name, type=POSITIVE, metavar="N", help=f"stage 1: {meaning}")
    parser.add_argument("--pixel-shuffle-loc", choices=("pre", "post"), help="stage 1: post is HoVLE-HD; None: pre")
    stages.run_stage(parser, build, "module_layers", "tiles", "pixel_shuffle_loc")


if __name__ == "__main__":
    run(main)
