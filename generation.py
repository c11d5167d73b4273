"""Generation (Sec. 4.3): prompts in, tokens out, one cache for text and pictures alike.

    for tokens in generate(model, [prompt], signal, max_new_tokens=128, stop=model.tokenizers.text.eos): ...

A prompt that ends in text is continued with text; one that ends in BOI or inside an image is drawn to its end.
"""
import functools
import math
from functools import partial

import torch

from attention import causal_attention
from elementwise import rope_table, swiglu, turn
from products import one_product
from streams import IMAGE, TEXT, Streams
from tokenizer import open_image, prepare
from weights import UserError


class Cache:
    """Static buffers for keys and values, one view of them for each modality that will ask: text after an image needs
    only the keys as text queries see them, so its cache is as large as a plain LLaMA's. Rows are packed from position 0
    whatever the length of the others.
    """

    def __init__(self, config, rows, length, views, like):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        views = views if config.use_bridge else (TEXT,)   # without a bridge both modalities see the same
        self.keys = {view: like.new_zeros(shape).unbind() for view in views}                  # a buffer for each layer
        self.values = {view: like.new_zeros(shape).unbind() for view in views}
        self.lengths, self.filled = [0] * rows, 0
        self.rows, self.places = (torch.arange(n, device=like.device) for n in (rows, length))
        self.start, self.mask, self.fixed = 0, None, False

    def put(self, layer, views):
        """Store new keys and values {modality: (B, heads, L, d) pairs}. -> the views to attend to, and a mask"""
        for view in self.keys:
            for buffer, new in zip((self.keys[view][layer], self.values[view][layer]), views[view]):
                if self.mask is None:                     # a prompt, or a token for rows of one length
                    buffer.narrow(2, self.filled, new.shape[2]).copy_(new)
                else:                                     # each row at its own place
                    buffer[self.rows, :, self.start[:, 0, 0]] = new[:, :, 0].to(buffer.dtype)
        if not self.filled:
            return views, None
        end = len(self.places) if self.fixed else self.filled + 1
        return {view: (self.keys[view][layer].narrow(2, 0, end), self.values[view][layer].narrow(2, 0, end))
                for view in self.keys}, self.mask

    def advance(self, counts):
        """Rows have grown; prepare positions (B, 1, 1) and, where lengths differ, the mask (B, 1, 1, keys)."""
        self.lengths = [length + n for length, n in zip(self.lengths, counts)]
        if not self.filled:
            self.start = torch.tensor(self.lengths, device=self.places.device)[:, None, None]
        else:
            self.start += 1                               # in place: a recorded step reads it where it lies
        self.filled = max(self.lengths)
        if self.fixed:
            self.mask.copy_((self.places <= self.start)[:, None])
        else:
            alike = len(set(self.lengths)) == 1
            self.mask = None if alike else (self.places[:self.filled + 1] <= self.start)[:, None]

    def fix(self):
        """From now on attend to the whole buffers under a mask: nothing changes its place or its shape any more."""
        if not self.fixed:
            self.fixed, self.mask = True, (self.places <= self.start)[:, None]


class Step:
    """One more token for every row, for one pattern of modalities among the rows. On a GPU, where starting a thousand
    small kernels takes longer than they run, a step is recorded as one CUDA graph and replayed."""

    def __init__(self, model, streams, cache):
        self.model, self.streams, self.cache, self.calls = model, streams, cache, 0
        self.run = partial(model.step, streams, cache)

    def __call__(self, text_ids, image_ids):
        self.streams.text_ids.copy_(text_ids)
        self.streams.image_ids.copy_(image_ids)
        self.calls += 1
        if self.calls == RECORD_AFTER.get(self.cache.places.device.type):
            self.cache.fix()
            self.run = recorded(self.run, self.cache.places.device)
        hidden = self.run()
        self.cache.advance([1] * len(hidden))
        return hidden


def write(model, streams, cache):
    """Libra.step where all rows write text and none will draw: what is left of Block, Attention and FFN is the LLaMA's,
    here in one straight line, which on a CPU is faster by a few percent. -> hidden states (B, D)"""
    c, x = model.config, model.model.embed_tokens(streams.text_ids)                           # (B, D)
    cos, sin = (t.to(x.dtype) for t in rope_table(c, cache.start, x.dtype))                   # (B, 1, 1, d)
    n, n_kv = c.num_attention_heads, c.num_key_value_heads
    for layer, block in enumerate(model.model.layers):
        a, f = block.self_attn, block.mlp
        h = one_product(block.input_layernorm(x), a.q_proj, a.k_proj, a.v_proj)
        h = h.view(-1, n + n_kv + n_kv, 1, c.head_dim)
        q, k = turn(h[:, :n + n_kv], cos, sin).split((n, n_kv), dim=1)
        views, mask = cache.put(layer, {TEXT: (k, h[:, n + n_kv:])})
        x = x + a.o_proj(causal_attention(q, *views[TEXT], mask).flatten(1))
        gate, up = one_product(block.post_attention_layernorm(x), f.gate_proj, f.up_proj).chunk(2, dim=-1)
        x = x + f.down_proj(swiglu(gate, up))
    return model.model.norm(x)


RECORD_AFTER = {"cuda": 4}     # steps: short answers are over before recording pays


@functools.cache
def side_stream(device):
    """One for all recordings: libraries keep workspaces for each stream they meet"""
    return torch.cuda.Stream(device)


def recorded(f, device):
    """f() as one CUDA graph. Its inputs and outputs stay where they are; to call it twice does no harm."""
    side, here = side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        f()                                               # libraries set themselves up
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = f()

    def replay():
        graph.replay()
        return out
    return replay


class Sampler:
    """Greedy at temperature 0. Else row i draws from a generator of its own, seeded seed + i: a batch draws what its
    rows would draw alone."""

    def __init__(self, rows, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(f"sampling: temperature {temperature} and top_k {top_k} must be 0 or more, "
                            f"top_p {top_p} in (0, 1]")
        self.temperature = temperature if temperature > 1e-4 else 0.0                         # below that it is greedy
        self.top_k, self.top_p = top_k, top_p
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]

    def __call__(self, logits, rows):
        """logits (len(rows), V) -> ids (len(rows),) on the CPU"""
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        p, ids = (logits.float().cpu() / self.temperature).softmax(-1).sort(-1, descending=True)
        if self.top_k:
            p[:, self.top_k:] = 0
        p[p.cumsum(-1) - p > self.top_p * p.sum(-1, keepdim=True)] = 0                        # the first always stays
        below = p.cumsum(-1)
        draws = torch.cat([torch.rand(1, generator=self.generators[row]) for row in rows])
        chosen = torch.searchsorted(below, draws[:, None] * below[:, -1:], right=True)
        return ids.gather(-1, chosen.clamp(max=(p > 0).sum(-1, keepdim=True) - 1))[:, 0]


def place_in_image(prompt, config):
    """prompt (L, K) -> None where it ends in text, else the place of its last token: BOI 0, codes 1 ... G*G, EOI"""
    if prompt[-1, 0] < config.vocab_size:
        return None
    opened = (prompt[:, 0] == config.vocab_size + config.codes).nonzero()
    if not len(opened):
        raise UserError("the prompt ends in image codes without a BOI before them")
    place = len(prompt) - 1 - int(opened[-1])
    if place > config.image_tokens - 1 or (prompt[-1, 0] - config.vocab_size > config.codes) != (
            place == config.image_tokens - 1):
        raise UserError(f"the prompt's last image has {place} tokens behind BOI; whole it is {config.image_tokens - 2} "
                        "codes and EOI")
    return place


@torch.inference_mode()
def generate(model, prompts, signal=None, max_new_tokens=128, stop=None, **sampling):
    """Continue prompts, each (L, K) ids as text.spell_out makes them. Yields (B, K) tokens on the CPU, step by step.

    What comes next is set by the place, never by the sampled id: after BOI and inside an image a code, 0 to N - 1, from
    each codebook's head; after G*G codes EOI; after EOI the newline; else text. A row that has produced `stop`, or has
    come to the end of the positions, repeats it; when all have, generation ends. sampling: temperature, top_k, top_p,
    seed.
    """
    c, like = model.config, model.lm_head.weight
    if not len(prompts) or max_new_tokens < 1 or not min(len(prompt) for prompt in prompts):
        raise UserError("generate: at least one prompt with a token in it, and max_new_tokens of 1 or more")
    longest = max(len(prompt) for prompt in prompts)
    places = [place_in_image(prompt, c) for prompt in prompts]
    last = c.image_tokens - 2                             # the place of the last code; EOI follows
    draws = [place is not None and place <= last for place in places]
    limits = []                                           # of each row, as if it were alone
    for prompt, place, draw in zip(prompts, places, draws):
        room = c.max_position_embeddings - len(prompt)
        needed = last - place if draw and max_new_tokens > room else 1                        # a picture to its end
        if room < needed:
            raise UserError(f"the prompt has {len(prompt)} tokens of the {c.max_position_embeddings} that the model "
                            "takes: too little room is left")
        limits.append(min(max_new_tokens, room))
    max_new_tokens = min(limits) if stop is None else max(limits)
    writes = [place is None or max_new_tokens > last + 1 - place for place in places]         # text, sooner or later
    views = [TEXT] * any(writes) + [IMAGE] * any(draws)
    cache = Cache(c, len(prompts), longest + max_new_tokens, views, like)
    sampler = Sampler(len(prompts), **sampling)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    if views == [TEXT]:
        model.lay()
    hidden = model.prefill(Streams.of(prompts, c).to(like.device), signal, cache)
    steps = {}                                            # for each pattern of modalities
    for step in range(max_new_tokens):
        tokens = next_tokens(model, hidden, places, sampler)
        if stop is not None:
            done |= torch.tensor(limits) <= step
            tokens[done] = stop
            done |= tokens[:, 0] == stop
        yield tokens
        if done.all() or step == max_new_tokens - 1:
            return
        places = [after(place, c) for place in places]
        pattern = tuple(place is not None for place in places)
        image = torch.tensor(pattern)                     # a row that is done inside a picture reads codes, whichever
        tokens = torch.where((done & image)[:, None], c.vocab_size, tokens)
        if pattern not in steps:
            steps[pattern] = Step(model, Streams.of(list(tokens[:, None]), c).to(like.device), cache)
        hidden = steps[pattern](tokens[~image, 0], tokens[image] - c.vocab_size)


def after(place, config):
    """The place of the token that follows one at `place`"""
    return None if place is None or place == config.image_tokens - 1 else place + 1


def next_tokens(model, hidden, places, sampler):
    """hidden (B, D) of the last tokens and their places -> ids (B, K) on the CPU, image ids offset by V"""
    c, last = model.config, model.config.image_tokens - 2
    text = [b for b, place in enumerate(places) if place is None]
    codes = [b for b, place in enumerate(places) if place is not None and place < last]
    tokens = torch.tensor([c.vocab_size + c.codes + 1 if place == last else c.newline_token_id for place in places])
    tokens = tokens[:, None].repeat(1, c.vision_codebook_num)                                 # EOI, or a newline
    if text:
        tokens[text] = sampler(model.lm_head(hidden[text]), text)[:, None]
    if codes:
        for k, head in enumerate(model.vision_lm_head.heads):
            tokens[codes, k] = sampler(head(hidden[codes])[:, :c.codes], codes) + c.vocab_size
    return tokens


def see(model, images, square=True):
    """Files or PIL images -> codes (n, G*G, K) on the CPU, signal (n, G*G, C); for none, an empty list and None"""
    if not images:
        return [], None
    tokenizer = model.tokenizers.image
    pixels = torch.stack([prepare(open_image(image), tokenizer.config.resolution, square) for image in images])
    like = tokenizer.quant_conv.weight
    codes, signal = tokenizer.encode(pixels.to(like.device, like.dtype))
    return codes.cpu(), signal
