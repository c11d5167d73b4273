"""Text after many prompts in a few rows: a row whose text has ended takes the next prompt and waits for no other."""
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch

from answering.sampling import Step, check_finite
from common.quantize import parts
from common.weights import UserError
from llama import KVCache

LOOK_EVERY = {"cuda": 8}       # steps at most: to read ids from a GPU is to wait for it


class Rate:
    """What write_texts took: prefill, which ends with the first token of a text, apart from decoding"""

    def __init__(self, model):
        """A step of decoding reads all weights but the embedding and those of pictures."""
        unread = "vision", "embed_tokens", "text_embeddings", "patch", "pos_embed", "mm_projector", "pixel_shuffle"
        weights = parts(dict(model.named_parameters(remove_duplicate=False)))
        self.weights = sum(x.nbytes for name, x in weights.items() if not any(part in name for part in unread))
        self.device, self.read, self.written, self.steps = model.lm_head.weight.device, 0, 0, 0       # tokens; steps
        self.prefill = self.decoding = 1e-9               # seconds

    def __str__(self):
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        speed, bandwidth = self.written / self.decoding, self.steps * self.weights / self.decoding / 1e9
        return (f"prefill: {self.read} tokens in {self.prefill:.2f} s, {self.read / self.prefill:.0f} tokens/s; "
                f"decoding: {self.written} tokens in {self.decoding:.2f} s, {speed:.1f} tokens/s, {bandwidth:.2f} GB/s "
                f"of weights; memory: {memory / 1e9:.2f} GB at most")


def use_one_thread(n_threads):
    """This thread computes with one core, all others with n_threads as before. A new thread begins with the number that
    was set last, in whichever thread: so this one sets 1, and a thread that ends at once sets n_threads again."""
    torch.get_num_threads()                               # this thread's first use of torch sets its number: now
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as other:
        other.submit(torch.set_num_threads, n_threads)


def prepare_ahead(prepare, items, ahead):
    """Yields futures of prepare(item) for the items in order. Threads work on them, so many ahead of the caller."""
    n_threads = torch.get_num_threads()                   # the caller's first use of torch, if it is one: see above
    with ThreadPoolExecutor(initializer=use_one_thread, initargs=(n_threads,)) as threads:
        futures = (threads.submit(prepare, item) for item in items)
        waiting = deque(islice(futures, ahead))
        while waiting:
            yield waiting.popleft()
            waiting.extend(islice(futures, 1))


@torch.inference_mode()
def write_texts(read, step, head, prompts, n_rows, max_new_tokens, stop, sampler, rate, graphs=True):
    """Continue the prompts of an iterator. Yields (number of a prompt, its ids so far, whether they have ended): with
    one of `stop`, after max_new_tokens, or with the positions. They end in another order than they come in.

    read(numbers, prompts) -> hidden states (n, D) of their last tokens, caches that hold them, how many tokens may
    follow each; step(ids (B, 1), caches) -> (B, 1, D); head(hidden states) -> logits; rate: a Rate, which is added to
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    prompts, texts, caches = enumerate(prompts), {}, []   # texts: {row: (number, ids, how many at most)}
    last = torch.zeros(n_rows, dtype=torch.long, device=rate.device)          # each row's last id
    look_every = 1 if sampler.temperature else LOOK_EVERY.get(rate.device.type, 1)
    while True:
        began, free = time.perf_counter(), [row for row in range(n_rows) if row not in texts]
        # Several prompts are read faster together, so free rows wait until they are a quarter of all.
        new = list(islice(prompts, len(free))) if 4 * len(free) >= n_rows else []
        if new:
            (numbers, asked), rows = zip(*new), free[:len(new)]
            hidden, read_caches, room = read(numbers, asked)
            most = [min(max_new_tokens, tokens) for tokens in room]
            if copy_into_rows(read_caches, caches, rows, n_rows, max(most) + look_every):
                fed = last.clone()
                next_hidden = Step(partial(step, fed[:, None], caches), [fed], caches, graphs)
            texts |= {row: (number, [], tokens) for row, number, tokens in zip(rows, numbers, most)}
            n_steps = 0
            rate.read += sum(read_caches[-1].lengths)
        elif texts:
            for cache in caches:
                cache.load_rows(free)                     # a free row is fed too: it must not run out of its buffer
            rows, n_steps = list(texts), min(max(1, 2 * n_steps), look_every)                 # new ones may end soon
            rate.steps += n_steps
        else:
            return
        index, numbers, chosen = torch.tensor(rows, device=last.device), [texts[row][0] for row in rows], []
        for _ in range(n_steps or 1):
            hidden = hidden if new else next_hidden(last)[index]
            chosen.append(sampler.choose(head(hidden), numbers))
            last[index] = chosen[-1][0]
        new_ids, largest = (torch.stack(values, dim=1) for values in zip(*chosen))            # (rows, steps)
        check_finite(largest)
        new_ids = new_ids.tolist()                        # here a GPU is waited for
        seconds = time.perf_counter() - began
        if new:
            rate.prefill += seconds
        else:
            rate.decoding += seconds
        for row, tokens in zip(rows, new_ids):
            number, ids, most = texts[row]
            n_added, ended = add_ids(ids, tokens, most, stop)
            rate.written += 0 if new else n_added
            if ended:
                del texts[row]
            yield number, ids, ended


def add_ids(ids, tokens, most, stop):
    """Append tokens to ids up to one of `stop` or to `most` ids; the rest is dropped. -> how many, whether it ended"""
    n = next((n for n, token in enumerate(tokens, 1) if token in stop), len(tokens))
    tokens = tokens[:min(n, most - len(ids))]
    ids += tokens
    return len(tokens), ids[-1] in stop or len(ids) == most


def copy_into_rows(new, caches, rows, n_rows, room):
    """Copy caches that have read prompts into these rows of the others. A cache that has no room for them and so many
    tokens after them is replaced by a longer one. -> whether any was"""
    before = list(caches)
    for n, cache in enumerate(new):
        length = -(-(cache.longest + room) // 64) * 64    # in steps, so that it happens seldom
        if not before or len(caches[n].slots) < length:
            longer = KVCache(cache.config, n_rows, length, cache.keys[0])
            if before:
                longer.load_rows(list(range(n_rows)), caches[n])
            caches[n:n + 1] = [longer]
        caches[n].load_rows(rows, cache)
    return caches != before
