"""Libra (Sec. 3.1, Eq. 1-6): a LLaMA in which image tokens have weights of their own, and a bridge between the two.

    model = Libra.from_pretrained("libra-11b-chat", dtype=torch.bfloat16, device="cuda")
    model.ask("cat.jpg", "What is unusual here?")

Top to bottom: the parts of a layer (norm, low-rank expert, attention with the bridge, FFN), the model with its hybrid
input, its two kinds of heads and its loss, a step of generation, and how weights come and go.

Letters: B rows, L positions, D hidden size, H heads (key-value heads may be fewer), d head_dim, V text vocabulary,
K codebooks of N codes, G grid side, C width of the contiguous signal; n_text and n_image tokens in the two streams.
"""
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import plain_attention, routed_attention
from config import LibraConfig, is_llama
from elementwise import normalize, rope_table, rotate, swiglu
from generation import generate, see, write
from products import Linear, lay, product, untouched
from streams import IMAGE, TEXT
from text import Text, spell_out
from tokenizer import ImageTokenizer
from weights import UserError, assign, read_folder, save_tensors, shapes_only, write_json

# ---------------------------------------------------------------- the parts of a layer


def route(module, name, x):
    """Eq. 1, 2: every token through the weights of its own modality, `name` for text, `vision_name` for image tokens.

    x: [(n_text, .), (n_image, .)]; a stream that is None stays None. Without an expert both use the LLaMA's weights.
    """
    text, image = x
    own = getattr(module, name)
    return [None if text is None else own(text),
            None if image is None else getattr(module, "vision_" + name, own)(image)]


def plus(x, y):
    return [a if b is None else a + b for a, b in zip(x, y)]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return normalize(x, self.weight, self.eps)


class LowRank(nn.Module):
    """W = B A, with A (rank, in) and B (out, rank). A bridge starts at zero, so that training starts without it."""

    def __init__(self, size_in, size_out, rank, start_at_zero=False):
        super().__init__()
        self.start_at_zero = start_at_zero
        self.weight_A = nn.Parameter(torch.empty(rank, size_in))
        self.weight_B = nn.Parameter(torch.empty(size_out, rank))

    def forward(self, x):
        return product(product(x, self.weight_A), self.weight_B)


class Attention(nn.Module):
    """Eq. 1, 3-5. `record`, a list, takes the attention maps of the plain form: how to look inside (Fig. 4)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, width)
        self.k_proj = Linear(c.hidden_size, kv_width)
        self.v_proj = Linear(c.hidden_size, kv_width)
        self.o_proj = Linear(width, c.hidden_size)
        if c.use_expert:
            self.vision_q_proj = LowRank(c.hidden_size, width, width // c.vision_down_ratio)
            self.vision_k_proj = LowRank(c.hidden_size, kv_width, kv_width // c.vision_down_ratio)
            self.vision_v_proj = LowRank(c.hidden_size, kv_width, kv_width // c.vision_down_ratio)
            self.vision_o_proj = LowRank(width, c.hidden_size, c.hidden_size // c.vision_down_ratio)
        if c.use_bridge:
            for name in ("vision_k_bridge_on_language", "vision_v_bridge_on_language",
                         "vision_k_bridge_on_vision", "vision_v_bridge_on_vision"):
                self.add_module(name, LowRank(c.hidden_size, kv_width, c.bridge_rank, start_at_zero=True))
        self.record = None

    def seen_by(self, modality, x, k, v):
        """F_b of Eq. 3 and 5: keys and values as queries of one modality see them. Those of the other modality pass the
        bridge: K' = X W^K + X W^K', and V' alike."""
        other = 1 - modality
        if not self.config.use_bridge or x[other] is None:
            return k, v
        on = "vision" if other == IMAGE else "language"
        k, v = list(k), list(v)
        k[other] = k[other] + getattr(self, f"vision_k_bridge_on_{on}")(x[other])             # Eq. 3
        v[other] = v[other] + getattr(self, f"vision_v_bridge_on_{on}")(x[other])             # below Eq. 5
        return k, v

    def forward(self, x, streams, rope, cache=None, layer=0):
        q, k, v = (route(self, name, x) for name in ("q_proj", "k_proj", "v_proj"))           # Eq. 1
        views = {}
        for modality in streams.asking if cache is None else sorted({*streams.asking, *cache.keys}):
            views[modality] = self.seen_by(modality, x, k, v)
            if not self.config.use_bridge:
                break                                     # one view serves both
        if self.config.use_bridge and len(views) == 1 and torch.is_grad_enabled():
            asking = streams.asking[0]
            q[asking] = q[asking] + self.unused_bridge(asking, x[asking])
        return route(self, "o_proj", self.meet(q, views, streams, rope, cache, layer))

    def unused_bridge(self, modality, x):
        """0: where all queries are of one modality none looks over the bridge on it. Added so that its gradient is zero
        rather than none, and all processes have the same ones."""
        on = "vision" if modality == IMAGE else "language"
        return 0 * sum(getattr(self, f"vision_{y}_bridge_on_{on}")(x[:0]).sum() for y in "kv")

    def meet(self, q, views, streams, rope, cache, layer):
        """Both modalities in sequence order: RoPE, the cache, attention. -> [(n_text, .), (n_image, .)]"""
        def heads(pair):                                                                      # -> (B, H, L, d)
            x = streams.join(pair)
            return x.view(x.size(0), x.size(1), -1, self.config.head_dim).transpose(1, 2)
        queries, mask = rotate(heads(q), rope), None
        views = {modality: (rotate(heads(k), rope), heads(v)) for modality, (k, v) in views.items()}
        if cache is not None:
            views, mask = cache.put(layer, views)
        if self.record is None:
            out = routed_attention(queries, views, streams, mask)
        else:
            out, maps = plain_attention(queries, views, streams.is_image, mask)
            self.record.append(maps)
        return streams.split(out.transpose(1, 2).flatten(2), q)


class FFN(nn.Module):
    """Eq. 2: SwiGLU, twice"""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)
        if c.use_expert:
            self.vision_gate_proj, self.vision_up_proj = (
                LowRank(c.hidden_size, c.intermediate_size, c.intermediate_size // c.vision_down_ratio) for _ in "gu")
            self.vision_down_proj = LowRank(c.intermediate_size, c.hidden_size, c.hidden_size // c.vision_down_ratio)

    def forward(self, x):
        gate, up = route(self, "gate_proj", x), route(self, "up_proj", x)
        return route(self, "down_proj", [None if g is None else swiglu(g, u) for g, u in zip(gate, up)])


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), FFN(c)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, RMSNorm(c.hidden_size, c.rms_norm_eps))
            if c.use_expert:
                self.add_module("vision_" + name, RMSNorm(c.hidden_size, c.rms_norm_eps))

    def forward(self, x, streams, rope, cache=None, layer=0):
        """x: [(n_text, D), (n_image, D)] -> the same"""
        x = plus(x, self.self_attn(route(self, "input_layernorm", x), streams, rope, cache, layer))
        return plus(x, self.mlp(route(self, "post_attention_layernorm", x)))


# ---------------------------------------------------------------- the model

@dataclass
class Tokenizers:
    """What a model folder holds besides the model. Not a module: its weights are not the model's."""
    text: Text
    image: ImageTokenizer


class Libra(nn.Module):
    """`tokenizers` is there when the model came from a folder."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        signal = c.hidden_size + c.contiguous_signal_size
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps),
            "vision_embed_tokens": nn.ModuleList(
                nn.Embedding(c.vision_vocab_size, c.hidden_size // c.vision_codebook_num)
                for _ in range(c.vision_codebook_num)),
            "vision_signal_norm": RMSNorm(signal, c.rms_norm_eps),
            "vision_contiguous_signal_processor": Linear(signal, c.hidden_size)})
        if c.use_expert:
            self.model["vision_norm"] = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size)
        self.vision_lm_head = nn.ModuleDict({"heads": nn.ModuleList(
            Linear(c.hidden_size, c.vision_vocab_size) for _ in range(c.vision_codebook_num))})
        if c.contiguous_targets:
            self.vision_regression = Linear(c.hidden_size, c.contiguous_signal_size)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.tokenizers, self.checkpoint_activations = None, False
        for leaf in self.leaves():
            initialise(leaf)

    def leaves(self):
        return [module for module in self.modules() if next(module.parameters(recurse=False), None) is not None]

    def llama(self):
        """The modules of the LLaMA. What is not here is the visual part, which pretraining trains."""
        modules = [self.model.embed_tokens, self.model.norm, self.lm_head]
        for block in self.model.layers:
            a, f = block.self_attn, block.mlp
            modules += [a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj,
                        block.input_layernorm, block.post_attention_layernorm]
        return modules

    def vision(self):
        return [leaf for leaf in self.leaves() if leaf not in set(self.llama())]

    def embed(self, streams, signal=None):
        """Eq. 9: text tokens by their table, image tokens by E_d (the ids) and E_c (CLIP's signal) together.

        signal: (n_images, G*G, C) for the whole images of the batch in order, or (n_image, C) token by token;
        None draws without it, E_c = 0. -> [(n_text, D), (n_image, D)]
        """
        m, ids = self.model, streams.image_ids
        text = m.embed_tokens(streams.text_ids)
        if not len(ids) and not torch.is_grad_enabled():
            return [text, None]                           # in training an empty stream keeps every weight in the graph
        e_d = torch.cat([bank(ids[:, k]) for k, bank in enumerate(m.vision_embed_tokens)], dim=-1)     # (n_image, D)
        e_c = e_d.new_zeros(len(ids), self.config.contiguous_signal_size)
        if signal is not None and not self.config.discrete_only:
            e_c = by_token(signal, len(ids)).to(e_d.dtype)
        x_image = torch.cat([e_d, e_c], dim=-1)                                               # Eq. 9
        image = m.vision_contiguous_signal_processor(m.vision_signal_norm(x_image))
        return [text if len(text) or torch.is_grad_enabled() else None, image]

    def hidden(self, streams, signal=None, cache=None):
        """-> [(n_text, D), (n_image, D)] behind the final norms"""
        x = self.embed(streams, signal)
        start = 0 if cache is None else cache.start
        positions = start + torch.arange(streams.length, device=streams.is_image.device)
        rope = rope_table(self.config, positions, self.lm_head.weight.dtype)
        for layer, block in enumerate(self.model.layers):
            if cache is not None:
                x = block(x, streams, rope, cache, layer)
            elif self.checkpoint_activations and torch.is_grad_enabled():                     # only x is kept
                x = checkpoint(block, x, streams, rope, use_reentrant=False)
            else:
                x = block(x, streams, rope)
        return route(self.model, "norm", x)

    def logits(self, streams, signal=None):
        """-> text (n_text, V), image (n_image, K, N + 2): a position's head is that of its own modality"""
        text, image = self.hidden(streams, signal)
        image = None if image is None else torch.stack([head(image) for head in self.vision_lm_head.heads], dim=1)
        return None if text is None else self.lm_head(text), image

    def forward(self, streams, signal=None, read=False):
        """Sums of the cross-entropy over the counted targets: text (), image (K,), one for each codebook (Eq. 6).
        A trainer divides by the count of its whole batch; heads run only where a label counts.
        read: instead, the likeliest next token behind each text token (n_text,)"""
        text, image = self.hidden(streams, signal)
        text, image = (image[:0] if text is None else text), (text[:0] if image is None else image)
        return self.lm_head(text).argmax(-1) if read else self.losses(text, image, streams, signal)

    def losses(self, text, image, streams, signal=None):
        """Hidden states of both streams -> forward's sums"""
        rows, next_image = streams.image_rows, streams.image_ids[streams.image_rows + 1]      # (m_image, K)
        if self.config.contiguous_targets:
            unused = sum(head(image[:0]).sum() for head in self.vision_lm_head.heads)         # gradient zero, not none
            image_loss = (self.regress(image, streams, signal) + 0 * unused).expand(self.config.vision_codebook_num)
        else:
            image_loss = torch.stack([cross_entropy(head, image[rows], next_image[:, k])
                                      for k, head in enumerate(self.vision_lm_head.heads)])
        rows = streams.text_rows
        return cross_entropy(self.lm_head, text[rows], streams.text_ids[rows + 1]), image_loss

    def regress(self, image, streams, signal):
        """Table 3 (b): the sum over counted targets of the mean squared distance to the next token's E_c, normalised
        token by token; EOI has none, nor has an image whose E_c is left out."""
        rows = streams.image_rows[streams.image_ids[streams.image_rows + 1, 0] < self.config.codes]
        if signal is None:                                # text alone, or a drawing: nothing to come near to
            signal = image.new_zeros(len(image), self.config.contiguous_signal_size)
        target = by_token(signal, len(image))[rows + 1].float()
        distance = self.vision_regression(image[rows]).float() - F.layer_norm(target, target.shape[-1:])
        return (distance.square().mean(-1) * target.any(-1)).sum()

    def loss(self, streams, signal=None):
        """Eq. 6, 8: the mean over all counted tokens; an image token counts the mean of its K codebook losses."""
        text, image = self(streams, signal)
        return (text + image.mean()) / (len(streams.text_rows) + len(streams.image_rows))

    def lay(self):
        """Weights of one input side by side, for decoding: once, it costs a copy"""
        with torch.inference_mode(False), torch.no_grad():                                    # they may learn again
            for several in self.of_one_input():
                lay(several)

    def of_one_input(self):
        """The LLaMA's weights that multiply the same input: Eq. 1's and Eq. 2's"""
        for block in self.model.layers:
            a, f = block.self_attn, block.mlp
            yield [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]
            yield [f.gate_proj.weight, f.up_proj.weight]

    def prefill(self, streams, signal, cache):
        """Read the prompts and fill the cache. -> the hidden state of each row's last token (B, D)"""
        hidden = streams.join(self.hidden(streams, signal, cache))
        cache.advance(streams.lengths)
        return hidden[torch.arange(len(hidden)), torch.tensor(streams.lengths) - 1]

    def step(self, streams, cache):
        """One more token for every row (L = 1). -> its hidden state (B, D)"""
        if not len(streams.image_ids) and list(cache.keys) == [TEXT] and self.as_written():
            return write(self, streams, cache)
        return streams.join(self.hidden(streams, None, cache))[:, 0]

    def as_written(self):
        """No layer was changed, and nobody looks into one or records its attention maps"""
        return all(untouched(block, Block) and untouched(block.self_attn, Attention) and untouched(block.mlp, FFN)
                   and block.self_attn.record is None for block in self.model.layers)

    def ask(self, images, question, max_new_tokens=128, **sampling):
        """images: a file, a PIL image, a list of them, or None. -> the answer. sampling: as generate takes it"""
        text = self.tokenizers.text
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        codes, signal = see(self, images)
        prompt = spell_out(*text.chat([(question, len(images), None)]), codes, self.config)[0]
        tokens = generate(self, [prompt], signal, max_new_tokens, text.eos, **sampling)
        return text.decode([int(token[0, 0]) for token in tokens])

    # ------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(cls, folder, image_tokenizer=None, dtype=None, device="cpu", **changes):
        """A model folder of ours or a published one (libra-11b-chat, libra-11b-base); or a LLaMA folder together with
        the folder of an image tokenizer: then the visual part is new, and that is said.

        dtype: as stored unless given. changes: fields of LibraConfig that stand above config.json.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a model folder with config.json in it")
        tokenizers = Tokenizers(Text(folder / "tokenizer.model"),
                                ImageTokenizer.from_pretrained(image_tokenizer or folder, dtype, device))
        i = tokenizers.image.config
        sizes = {"vision_vocab_size": i.codebook_size + 2, "vision_codebook_num": i.num_codebooks,
                 "image_feature_resolution": i.grid, "contiguous_signal_size": i.signal_size,
                 "newline_token_id": tokenizers.text.newline}
        model = load(folder, sizes, dtype, **changes)
        for name, value in (sizes | {"vocab_size": tokenizers.text.vocab_size}).items():
            if getattr(model.config, name) != value:
                raise UserError(f"{folder}/config.json: {name} is {getattr(model.config, name)}, but the tokenizers "
                                f"beside it have {value}: these files do not belong together")
        model.tokenizers = tokenizers
        return model.to(device)

    def save_pretrained(self, folder, tensors=None):
        """A model folder: config.json, model.safetensors, tokenizer.model, image_tokenizer/. tensors: the weights to
        write, where they are not those of this process"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(tensors or self.state_dict())
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_tensors(folder / "model.safetensors", tensors)
        if self.tokenizers is not None:
            if self.tokenizers.text.path.resolve() != (folder / "tokenizer.model").resolve():
                shutil.copyfile(self.tokenizers.text.path, folder / "tokenizer.model")
            self.tokenizers.image.save_pretrained(folder / "image_tokenizer")
        write_json(folder / "config.json", self.config.to_dict())


def cross_entropy(head, hidden, targets, most=2048):
    """The sum over (n, D) hidden states. Logits are made for `most` of them at a time and, where that is not all, made
    again in the backward pass: 32,000 floats a token are more than all that a layer keeps."""
    def some(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    if len(hidden) <= most:
        return some(hidden, targets)
    return sum(checkpoint(some, h, t, use_reentrant=False) for h, t in zip(hidden.split(most), targets.split(most)))


def by_token(signal, tokens):
    """E_c of whole images (n_images, G*G, C), or token by token already -> (n_image, C), zero at BOI and EOI"""
    if signal.dim() == 3:
        signal = F.pad(signal, (0, 0, 1, 1)).flatten(0, 1)
    if len(signal) != tokens:
        raise UserError(f"contiguous signal for {len(signal)} image tokens, the batch has {tokens}")
    return signal


def initialise(leaf):
    """New weights: normal with deviation 0.02, both factors alike; a bridge's B zero; norms one."""
    if isinstance(leaf, RMSNorm):
        nn.init.ones_(leaf.weight)
    elif isinstance(leaf, LowRank):
        nn.init.normal_(leaf.weight_A, std=0.02)
        nn.init.normal_(leaf.weight_B, std=0.0 if leaf.start_at_zero else 0.02)
    else:
        nn.init.normal_(leaf.weight, std=0.02)


def load(folder, sizes=None, dtype=None, **changes):
    """The model of a folder without its tokenizers. sizes: visual fields for a config.json that has none (a LLaMA's).

    The module is built without memory (meta), the files are mapped, and the module takes the mapped tensors.
    """
    path = Path(folder) / "config.json"
    config = LibraConfig.from_file(path, sizes, **changes)
    with shapes_only():
        model = Libra(config)

    def keep(name):                                       # buffers of the published code
        return None if name.endswith(("_placeholder", "rotary_emb.inv_freq")) else name
    tensors = read_folder(folder, dtype, keep)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
            raise UserError(f"{path}: tie_word_embeddings is true, but the file's lm_head differs from its embedding")
    if len(dtypes := {str(t.dtype) for t in tensors.values() if t.is_floating_point()}) > 1:
        raise UserError(f"{folder}: its weights are of several types ({', '.join(sorted(dtypes))}): give one as dtype")
    leaves = model.vision()
    visual = {id(p) for leaf in leaves for p in leaf.parameters(recurse=False)}
    visual = {name for name, p in model.named_parameters() if id(p) in visual}
    if assign(model, tensors, folder, may_lack=visual if is_llama(path) else ()):
        for leaf in leaves:
            leaf.to_empty(device="cpu", recurse=False).to(model.lm_head.weight.dtype)
            initialise(leaf)
        new = sum(p.numel() for leaf in leaves for p in leaf.parameters(recurse=False))
        print(f"{folder} holds a LLaMA without vision: the visual part, {new:,} weights, is new and untrained")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
