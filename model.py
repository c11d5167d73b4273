"""Libra (Sec. 3.1, Eq. 1-6): a LLaMA in which image tokens have weights of their own, and a bridge between the two.

    libra = Libra.from_pretrained("libra-11b-chat", dtype=torch.bfloat16, device="cuda")
    generate.ask(libra, "cat.jpg", "What is unusual?")

Letters: B rows, L positions, D hidden size, H heads, d head_dim, V text vocabulary, K codebooks of N codes, G side of
the grid of codes, C width of the contiguous signal E_c; n_text and n_image tokens in the two streams.
"""
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import llama
from common.config import check_divisible, is_llama
from common.weights import UserError, assign, save_tensors, shapes_only, write_json
from streams import IMAGE, TEXT
from text import Text, open_text
from tokenizer import ImageTokenizer


@dataclass
class LibraConfig(llama.LlamaConfig):
    """A LLaMA's fields and Libra's own; the defaults are the published 11.3 B model's."""
    vision_vocab_size: int = 514                          # N codes, BOI, EOI
    vision_codebook_num: int = 2                          # K
    image_feature_resolution: int = 24                    # G
    contiguous_signal_size: int = 4096                    # C
    newline_token_id: int = 13
    vision_down_ratio: int = 4                            # rank of an expert matrix = its output size / this
    bridge_rank: int = 8
    use_bridge: bool = True                               # False: Table 3 (e)
    use_expert: bool = True                               # False: Table 3 (d), image tokens use the LLaMA's weights
    discrete_only: bool = False                           # Table 3 (f): E_c is zero throughout
    contiguous_targets: bool = False                      # Table 3 (b): image positions regress the next token's E_c
    text_to_image: bool = False                           # trained to draw, E_c = 0 after a caption (Sec. 4.3)
    chat_template: str = "vicuna"                         # a name of text.TEMPLATES

    def __post_init__(self):
        super().__post_init__()
        check_divisible(self.hidden_size, self.vision_codebook_num, "each codebook fills its share of an embedding")
        for size in (self.hidden_size, self.num_key_value_heads * self.head_dim, self.intermediate_size):
            check_divisible(size, self.vision_down_ratio, "an expert matrix has rank output size / vision_down_ratio")

    @property
    def n_codes(self):
        return self.vision_vocab_size - 2                 # N; BOI is code N, EOI is N + 1

    @property
    def image_tokens(self):
        return self.image_feature_resolution ** 2 + 2     # BOI, G * G codes, EOI

    def to_dict(self):
        """For config.json, with the published names"""
        return {"model_type": "libra", "architectures": ["LibraForCausalLM"], **asdict(self),
                "max_vision_token_length": self.image_tokens}


# ---------------------------------------------------------------- attention with two views of keys and values

def plain_attention(q, views, is_image, mask=None):
    """Eq. 4, 1 and 5 literally, with the L x L matrices: for reading, for tests, for looking at the maps.

    q (B, H, L, d); views {modality: (keys, values) as queries of that modality see them}, (B, H_kv, L_k, d) each;
    is_image (B, L); mask (B, 1, 1, L_k) for rows of different lengths -> outputs (B, H, L, d), maps (B, H, L, L_k)
    """
    image_query = is_image[:, None, :, None]
    only_view = next(iter(views.values()))
    (k_text, v_text), (k_image, v_image) = (
        [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in views.get(modality, only_view)]
        for modality in (TEXT, IMAGE))
    scores = torch.where(image_query, q @ k_image.mT, q @ k_text.mT) / math.sqrt(q.shape[-1])                 # Eq. 4
    queries, keys = scores.shape[-2:]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    maps = scores.masked_fill(~(causal if mask is None else causal & mask), -torch.inf).softmax(dim=-1)       # Eq. 1
    return torch.where(image_query, maps @ v_image, maps @ v_text), maps                                      # Eq. 5


def fast_attention(q, views, streams, mask=None):
    """Its outputs alone, without a matrix of scores, on torch's fused kernels. Shapes as in plain_attention.

    If all rows have their images at the same places, as in pretraining: one causal call that ends with the last image,
    for the image queries, and one call for the text queries alone. Any other batch: two causal calls.
    """
    queries = streams.query_modalities
    if len(queries) == 1 or len(views) == 1:              # one kind of query; or no bridge, so one view, that of text
        return llama.causal_attention(q, *views.get(queries[0], views.get(TEXT)), mask)
    if streams.text_positions is None:
        text, image = (llama.causal_attention(q, *views[modality], mask) for modality in (TEXT, IMAGE))
        return torch.where(streams.is_image[:, None, :, None], image, text)
    image = llama.causal_attention(*(x[:, :, :streams.image_end] for x in (q, *views[IMAGE])))
    text = llama.causal_attention(q[:, :, streams.text_positions], *views[TEXT], streams.text_mask)
    out = F.pad(image, (0, 0, 0, q.shape[2] - streams.image_end))
    out[:, :, streams.text_positions] = text              # index_copy cannot be compiled before torch 2.13
    return out


# ---------------------------------------------------------------- the visual expert and the bridge

class LowRank(nn.Module):
    """W = B A, with A (rank, in) and B (out, rank)"""

    def __init__(self, size_in, size_out, rank):
        super().__init__()
        self.weight_A = nn.Parameter(torch.empty(rank, size_in))
        self.weight_B = nn.Parameter(torch.empty(size_out, rank))

    def forward(self, x):
        return llama.linear(llama.linear(x, self.weight_A), self.weight_B)


def add_expert(module, config, names):
    """For each matrix or norm `name` of a LLaMA module a `vision_name` for image tokens; the matrices are low-rank.
    Without an expert (Table 3 d) it is the LLaMA's under a second name, which is no second parameter."""
    for name in names:
        of_text = getattr(module, name)
        if not config.use_expert:
            module.__dict__["vision_" + name] = of_text
        elif isinstance(of_text, llama.RMSNorm):
            module.add_module("vision_" + name, llama.RMSNorm(config.hidden_size, config.rms_norm_eps))
        else:
            rank = of_text.out_features // config.vision_down_ratio
            module.add_module("vision_" + name, LowRank(of_text.in_features, of_text.out_features, rank))


class LibraAttention(llama.Attention):
    """`attend` is Eq. 1 and 3-5 over two streams; `forward`, for text alone, is the LLaMA's."""
    def __init__(self, config):
        super().__init__(config)
        add_expert(self, config, ("q_proj", "k_proj", "v_proj", "o_proj"))
        if config.use_bridge:
            # on_language: added to text keys and values, for image queries; on_vision: to those of images, for text
            for name in ("vision_k_bridge_on_language", "vision_v_bridge_on_language",
                         "vision_k_bridge_on_vision", "vision_v_bridge_on_vision"):
                self.add_module(name, LowRank(config.hidden_size, self.k_proj.out_features, config.bridge_rank))
        self.recorded_maps = None                         # a list here collects the maps of plain_attention (Fig. 4)

    def attend(self, text, image, streams, rope, caches=None, layer=0):
        """(n_text, D), (n_image, D) after the norms -> the same shapes. caches: {modality: KVCache}"""
        def merge(text, image):
            return self.split_heads(streams.merge(text, image))                               # (B, heads, L, d)
        q_text, q_image = self.q_proj(text), self.vision_q_proj(image)                        # Eq. 1
        k_text, k_image = self.k_proj(text), self.vision_k_proj(image)
        v_text, v_image = self.v_proj(text), self.vision_v_proj(image)
        views, mask = {}, None
        parts = {}     # {modality: ((text, image) keys, (text, image) values)}, as queries of this modality see them
        wanted = {*streams.query_modalities, *(caches or ())} if self.config.use_bridge else ()
        if not wanted:                                    # without a bridge both modalities have the same view
            parts[TEXT] = (k_text, k_image), (v_text, v_image)
        if TEXT in wanted:                                # text queries see image keys and values through the bridge
            parts[TEXT] = ((k_text, k_image + self.vision_k_bridge_on_vision(image)),         # Eq. 3
                           (v_text, v_image + self.vision_v_bridge_on_vision(image)))
        if IMAGE in wanted:                               # image queries see those of text through the bridge
            parts[IMAGE] = ((k_text + self.vision_k_bridge_on_language(text), k_image),       # Eq. 3
                            (v_text + self.vision_v_bridge_on_language(text), v_image))
        elif wanted and torch.is_grad_enabled():
            # No image queries, so no use for this bridge. DDP needs a zero gradient for it, not None.
            bridges = self.vision_k_bridge_on_language, self.vision_v_bridge_on_language
            q_text = q_text + 0 * sum(bridge(text[:0]).sum() for bridge in bridges)
        q = llama.apply_rope(merge(q_text, q_image), rope)
        for modality, (k, v) in parts.items():
            k, v = llama.apply_rope(merge(*k), rope), merge(*v)
            if caches is not None and modality in caches:
                k, v, mask = caches[modality].update(layer, k, v)
            views[modality] = k, v
        if self.recorded_maps is None:
            out = fast_attention(q, views, streams, mask)
        else:
            out, maps = plain_attention(q, views, streams.is_image, mask)
            self.recorded_maps.append(maps)
        text, image = streams.split(out.transpose(1, 2).flatten(2))
        return self.o_proj(text), self.vision_o_proj(image)                                   # Eq. 1


class LibraFeedForward(llama.FeedForward):
    """`forward`, for text, is the LLaMA's; `expert` is the same function with the expert's matrices (Eq. 2)."""
    def __init__(self, config):
        super().__init__(config)
        add_expert(self, config, ("gate_proj", "up_proj", "down_proj"))

    def expert(self, image):
        return self.vision_down_proj(self.activation(self.vision_gate_proj(image)) * self.vision_up_proj(image))


class LibraBlock(llama.Block):
    def __init__(self, config):
        super().__init__(config, LibraAttention, LibraFeedForward)
        add_expert(self, config, ("input_layernorm", "post_attention_layernorm"))

    def forward(self, x, rope, cache=None, layer=0, streams=None):
        """x: text (n_text, D) and image (n_image, D) with their streams, cache: {modality: KVCache}; or, without
        streams, (B, L, D) and one KVCache: text alone, for which the layer is the LLaMA's."""
        if streams is None:
            return super().forward(x, rope, cache, layer)
        text, image = x
        text_change, image_change = self.self_attn.attend(
            self.input_layernorm(text), self.vision_input_layernorm(image), streams, rope, cache, layer)
        text, image = text + text_change, image + image_change
        text = text + self.mlp(self.post_attention_layernorm(text))                           # Eq. 2
        image = image + self.mlp.expert(self.vision_post_attention_layernorm(image))          # Eq. 2
        return text, image


# ---------------------------------------------------------------- the model

@dataclass
class Tokenizers:
    """What a model folder holds besides the model. Not a module: its weights are not the model's."""
    text: Text
    image: ImageTokenizer


class Libra(llama.Llama):
    """`tokenizers` is set when the model came from a folder."""

    def __init__(self, config):
        super().__init__(config, LibraBlock)
        c, input_size = config, config.hidden_size + config.contiguous_signal_size
        self.model["vision_embed_tokens"] = nn.ModuleList(
            nn.Embedding(c.vision_vocab_size, c.hidden_size // c.vision_codebook_num)
            for _ in range(c.vision_codebook_num))
        self.model["vision_signal_norm"] = llama.RMSNorm(input_size, c.rms_norm_eps)
        self.model["vision_contiguous_signal_processor"] = llama.Linear(input_size, c.hidden_size)
        add_expert(self.model, c, ["norm"])
        self.vision_lm_head = nn.ModuleDict({"heads": nn.ModuleList(
            llama.Linear(c.hidden_size, c.vision_vocab_size) for _ in range(c.vision_codebook_num))})
        if c.contiguous_targets:
            self.vision_regression = llama.Linear(c.hidden_size, c.contiguous_signal_size)
        self.tokenizers, self.checkpoint_activations = None, False
        for name, weight in self.named_parameters():
            initialise(name, weight)

    def llama_parameters(self):
        """Those that pretraining freezes. It trains the visual part, whose names have "vision" in them."""
        return [p for name, p in self.named_parameters() if "vision" not in name]

    def embed(self, streams, signal=None):
        """Eq. 9: an image token is embedded from its ids (E_d) and CLIP's contiguous signal (E_c) together.

        signal: (n_images, G*G, C) for the whole images of the batch in order, or (n_image, C) token by token; None:
        E_c = 0, as when an image is drawn. -> (n_text, D), (n_image, D)
        """
        m, ids = self.model, streams.image_ids
        e_d = torch.cat([bank(ids[:, k]) for k, bank in enumerate(m.vision_embed_tokens)], dim=-1)     # (n_image, D)
        e_c = e_d.new_zeros(len(ids), self.config.contiguous_signal_size)
        if signal is not None and not self.config.discrete_only:
            e_c = streams.signal_by_token(signal).to(e_d.dtype)
        x_image = llama.to_matmul_dtype(torch.cat([e_d, e_c], dim=-1))                        # Eq. 9
        image = m.vision_contiguous_signal_processor(m.vision_signal_norm(x_image))
        return llama.to_matmul_dtype(m.embed_tokens(streams.text_ids)), image

    def hidden(self, streams, signal=None, caches=None):
        """-> (n_text, D), (n_image, D) after the final norms. caches: {modality: KVCache} while generating"""
        x = self.embed(streams, signal)
        positions = torch.arange(streams.length, device=streams.is_image.device)
        if caches is not None:
            positions = positions + next(iter(caches.values())).next_position
        rope = llama.rope_tables(self.config, positions, self.lm_head.weight.dtype)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for layer, block in enumerate(self.model.layers):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            x = run(x, rope, caches, layer, streams)
        text, image = x
        return self.model.norm(text), self.model.vision_norm(image)

    def logits(self, streams, signal=None):
        """-> text (n_text, V), image (n_image, K, N + 2). The modality of a token decides which head it has."""
        text, image = self.hidden(streams, signal)
        return self.lm_head(text), torch.stack([head(image) for head in self.vision_lm_head.heads], dim=1)

    def forward(self, streams, signal=None, predict=False):
        """-> the cross-entropy summed over the counted targets (Eq. 6): text, a scalar, and image (K,), a sum for each
        codebook. A trainer divides by the count of its whole batch.
        predict: instead, the most likely token after each text token (n_text,)"""
        text, image = self.hidden(streams, signal)
        return self.lm_head(text).argmax(-1) if predict else self.loss_sums(text, image, streams, signal)

    def loss_sums(self, text, image, streams, signal=None):
        """Final hidden states of both streams -> what forward returns"""
        rows = streams.text_rows
        text_loss = cross_entropy(self.lm_head, text[rows], streams.text_ids[rows + 1])
        if self.config.contiguous_targets:
            return text_loss, self.regression_loss(image, streams, signal).expand(self.config.vision_codebook_num)
        rows = streams.image_rows
        targets = streams.image_ids[rows + 1]                                                 # (targets, K)
        return text_loss, torch.stack([cross_entropy(head, image[rows], targets[:, k])
                                       for k, head in enumerate(self.vision_lm_head.heads)])

    def regression_loss(self, image, streams, signal):
        """Table 3 (b): the sum over counted targets of the mean squared error against the next token's E_c, normalised
        per token. EOI and images without E_c are no targets."""
        rows = streams.image_rows[streams.image_ids[streams.image_rows + 1, 0] < self.config.n_codes]
        if signal is None:
            signal = image.new_zeros(len(image), self.config.contiguous_signal_size)
        target = streams.signal_by_token(signal)[rows + 1].float()
        error = self.vision_regression(image[rows]).float() - F.layer_norm(target, target.shape[-1:])
        unused = sum(head(image[:0]).sum() for head in self.vision_lm_head.heads)             # zero gradients for DDP
        return (error.square().mean(-1) * target.any(-1)).sum() + 0 * unused

    def loss(self, streams, signal=None):
        """Eq. 6 and Eq. 8: the mean over counted tokens; an image token counts the mean of its K codebook losses."""
        text, image = self(streams, signal)
        return (text + image.mean()) / (len(streams.text_rows) + len(streams.image_rows))

    # ------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(cls, folder, image_tokenizer=None, dtype=None, device="cpu", **changes):
        """A model folder of ours or a published one (libra-11b-chat, libra-11b-base); or a LLaMA folder together with
        the folder of an image tokenizer: then the visual part is new, which is printed.

        dtype: as stored unless given (of mixed ones the widest); the image tokenizer is float32. changes: fields of
        LibraConfig that override config.json.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a model folder with config.json in it")
        tokenizers = Tokenizers(open_text(folder), ImageTokenizer.from_pretrained(image_tokenizer or folder, device))
        sizes = vision_sizes(tokenizers.image.config) | {"newline_token_id": tokenizers.text.newline}
        model = load(folder, sizes, dtype, **changes)
        pieces = tokenizers.text.vocab_size               # an embedding may be padded: more rows than pieces
        for name, value in (sizes | {"vocab_size": max(model.config.vocab_size, pieces)}).items():
            if getattr(model.config, name) != value:
                raise UserError(f"{folder}/config.json: {name} is {getattr(model.config, name)}, but the tokenizers "
                                f"beside it have {value}: these files do not belong together")
        model.tokenizers = tokenizers
        model.config.chat_template = tokenizers.text.use_template(model.config.chat_template)
        return model.to(device)

    def save_pretrained(self, folder, tensors=None):
        """A model folder: config.json, model.safetensors, the tokenizer, image_tokenizer/. tensors: the weights to
        write, if they are not those of this process"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(tensors or self.state_dict())
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_tensors(folder / "model.safetensors", tensors)
        if self.tokenizers is not None:
            self.tokenizers.text.save(folder)
            self.tokenizers.image.save_pretrained(folder / "image_tokenizer")
        write_json(folder / "config.json", self.config.to_dict())


def cross_entropy(head, hidden, targets, rows_at_once=2048):
    """The sum over (n, D) hidden states. More than `rows_at_once` are computed in parts, and again in the backward
    pass: the logits of a token are 32,000 floats, its hidden state only 4,096."""
    def part(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    if len(hidden) <= rows_at_once:
        return part(hidden, targets)
    parts = zip(hidden.split(rows_at_once), targets.split(rows_at_once))
    return sum(checkpoint(part, h, t, use_reentrant=False) for h, t in parts)


def vision_sizes(c):
    """c: ImageTokenizerConfig -> the fields of LibraConfig that follow from it"""
    return {"vision_vocab_size": c.codebook_size + 2, "vision_codebook_num": c.num_codebooks,
            "image_feature_resolution": c.grid, "contiguous_signal_size": c.signal_size}


def initialise(name, weight):
    """New weights: norms are one, all others normal with standard deviation 0.02, but for a bridge's B, which is zero:
    training starts without a bridge"""
    if "norm" in name:
        return nn.init.ones_(weight)
    return nn.init.normal_(weight, std=0.0 if "bridge" in name and name.endswith("weight_B") else 0.02)


def load(folder, sizes=None, dtype=None, **changes):
    """The model of a folder without its tokenizers. sizes: visual fields for a config.json that has none (a LLaMA's).

    The module is built without memory (meta) and then takes the tensors of the files, which are memory-mapped.
    """
    path = Path(folder) / "config.json"
    with shapes_only():
        model = Libra(LibraConfig.from_file(path, sizes, **changes))
    tensors = llama.read_llama_tensors(folder, model.config, dtype)
    vision = {name: p.shape for name, p in model.named_parameters() if "vision" in name}
    if assign(model, tensors, folder, may_lack=vision.keys() if is_llama(path) else ()):
        dtype = model.lm_head.weight.dtype
        new = {name: initialise(name, torch.empty(shape, dtype=dtype)) for name, shape in vision.items()}
        model.load_state_dict(model.state_dict() | new, assign=True)
        print(f"{folder} holds a LLaMA without vision: the visual part, {sum(x.numel() for x in new.values()):,} "
              "weights, is new and untrained")
    return model.tie_weights()
