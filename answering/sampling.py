"""From logits to ids, and decoding steps as CUDA graphs: what token-by-token generation needs of any model."""
import functools
import math

import torch

from common.weights import UserError


def check_finite(tensor):
    """-> the tensor. NaN or infinity would be answered with rubbish."""
    if not torch.isfinite(tensor).all():
        raise UserError("the model computes values that are no finite numbers: its weights hold NaN or infinity, or "
                        "are too large for this --dtype")
    return tensor


def encode_finite(tokenizer, pixels):
    """ImageTokenizer.encode, with an error for NaN: its ids would look like any others"""
    codes, signal = tokenizer.encode(pixels)
    check_finite(tokenizer.quantized(signal)[2])
    return codes, signal


class Sampler:
    """Greedy at temperature 0. Else row i has a generator of its own, seeded seed + i: a row of a batch gets what it
    would get alone."""

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(f"sampling: temperature {temperature} and top_k {top_k} must be 0 or more, "
                            f"top_p {top_p} in (0, 1]")
        self.temperature = temperature if temperature > 1e-4 else 0.0
        self.top_k, self.top_p = top_k, top_p
        # Each takes 5 KB: those of rows that ended long ago are forgotten.
        self.generator = functools.lru_cache(2 ** 14)(lambda row: torch.Generator().manual_seed(seed + row))

    def __call__(self, logits, rows):
        """logits (len(rows), V) -> ids (len(rows),) on the CPU"""
        ids, largest = self.choose(logits, rows)
        check_finite(largest)
        return ids.cpu()

    def choose(self, logits, rows):
        """logits (len(rows), V) -> ids (len(rows),) and numbers for check_finite, on their device. If it is greedy, a
        GPU is not waited for."""
        best = logits.argmax(-1, keepdim=True)            # NaN counts as the largest
        largest = logits.gather(-1, best)[:, 0] / (self.temperature or 1)
        if self.temperature == 0:
            return best[:, 0], largest
        p, ids = (logits.float().cpu() / self.temperature).softmax(-1).sort(-1, descending=True)
        if self.top_k:
            p[:, self.top_k:] = 0
        p[p.cumsum(-1) - p > self.top_p * p.sum(-1, keepdim=True)] = 0                        # the first always stays
        check_finite(largest)
        chosen = [torch.multinomial(p_row, 1, generator=self.generator(row)) for p_row, row in zip(p, rows)]
        return ids.gather(-1, torch.stack(chosen))[:, 0].to(logits.device), largest


def tokens_allowed(length, place, wanted, config):
    """How many tokens may follow a prompt; an error where not even one, or the rest of its image, has room."""
    room, last_code = config.max_position_embeddings - length, config.image_tokens - 2
    needed = last_code - place if place is not None and place <= last_code and wanted > room else 1
    if room < needed:
        raise UserError(f"the prompt has {length} of the {config.max_position_embeddings} tokens that the model takes: "
                        "too little room is left")
    return min(wanted, room)


def place_in_image(prompt, config):
    """prompt (L, K) -> None if it ends in text, else its last token's place: BOI 0, codes 1 ... G*G, EOI G*G + 1"""
    if prompt[-1, 0] < config.vocab_size:
        return None
    opened = (prompt[:, 0] == config.vocab_size + config.n_codes).nonzero()
    assert len(opened), "image codes without a BOI before them"
    place, eoi_place = len(prompt) - 1 - int(opened[-1]), config.image_tokens - 1
    is_eoi = prompt[-1, 0] > config.vocab_size + config.n_codes
    assert place <= eoi_place and is_eoi == (place == eoi_place), f"{place} tokens behind BOI, expected {eoi_place}"
    return place


def next_tokens(model, hidden, places, sampler):
    """hidden (B, D) of the last tokens and their places -> ids (B, K) on the CPU, image ids offset by V. After the last
    code comes EOI and after EOI the newline, whatever the heads say."""
    c, last_code = model.config, model.config.image_tokens - 2
    text = [row for row, place in enumerate(places) if place is None]
    codes = [row for row, place in enumerate(places) if place is not None and place < last_code]
    eoi = c.vocab_size + c.n_codes + 1
    tokens = torch.tensor([eoi if place == last_code else c.newline_token_id for place in places])
    tokens = tokens[:, None].repeat(1, c.vision_codebook_num)                                 # (B, K)
    if text:
        tokens[text] = sampler(model.lm_head(hidden[text]), text)[:, None]
    if codes:
        for k, head in enumerate(model.vision_lm_head.heads):
            tokens[codes, k] = sampler(head(hidden[codes])[:, :c.n_codes], codes) + c.vocab_size
    return tokens


CAPTURE_AFTER = {"cuda": 4}    # steps: short answers end before a capture pays


class Step:
    """One more token for every row. On a GPU, where starting a thousand small kernels takes longer than they run, the
    step is captured as one CUDA graph and replayed.

    run: a function of no arguments that reads `inputs`, a list of tensors, and `caches` -> hidden states (B, 1, D)
    graphs: whether it may be captured
    """

    def __init__(self, run, inputs, caches, graphs):
        self.run, self.inputs, self.caches, self.calls = run, inputs, caches, 0
        self.capture_at = CAPTURE_AFTER.get(inputs[0].device.type) if graphs else None

    def __call__(self, *contents):
        """New contents of the inputs -> hidden states (B, D)"""
        for tensor, content in zip(self.inputs, contents, strict=True):
            tensor.copy_(content)                         # in place: a CUDA graph reads them at these addresses
        self.calls += 1
        if self.calls == self.capture_at:
            for cache in self.caches:
                cache.use_full_buffers()
            self.run = capture_cuda_graph(self.run, self.inputs[0].device)
        hidden = self.run()[:, 0]
        for cache in self.caches:
            cache.advance([1] * len(hidden))
        return hidden


@functools.cache
def capture_stream(device):
    """One for all captures: libraries keep a workspace for every stream"""
    return torch.cuda.Stream(device)


def capture_cuda_graph(function, device):
    """function() as one CUDA graph, whose inputs and outputs keep their addresses. It is called once more before."""
    side, current = capture_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        function()                                        # libraries initialise themselves
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = function()

    def replay():
        graph.replay()
        return out
    return replay
