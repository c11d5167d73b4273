"""Text behind many prompts in a few rows: a row whose text has ended takes the next prompt and waits for no other."""
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from types import SimpleNamespace

import torch

from common.quantize import parts
from common.sampling import Step, check_finite

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
    """For what torch computes in this thread. torch makes that the number of later threads too: one puts theirs back"""
    torch.get_num_threads()                               # a thread's first use of torch sets its number: before, then
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as later:
        later.submit(torch.set_num_threads, n_threads)


def prepare_ahead(prepare, items, ahead):
    """Yields futures of prepare(item) for the items in order. Threads work on them, so many ahead of the caller."""
    # To ask for the number also sets the caller's, if this is its first use of torch.
    with ThreadPoolExecutor(initializer=use_one_thread, initargs=(torch.get_num_threads(),)) as threads:
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
    prompts, texts, caches = enumerate(prompts), {}, []   # texts: {row: (number, ids, how many at most)}
    last = torch.zeros(n_rows, dtype=torch.long, device=rate.device)          # each row's last id
    look_every = 1 if sampler.temperature else LOOK_EVERY.get(rate.device.type, 1)
    while True:
        began, rows = time.perf_counter(), [row for row in range(n_rows) if row not in texts]
        # Several prompts are read faster together, so free rows wait until they are a quarter of all.
        new = list(islice(prompts, len(rows))) if 4 * len(rows) >= n_rows else []
        if new:
            (numbers, asked), rows = zip(*new), rows[:len(new)]
            hidden, read_caches, room = read(numbers, asked)
            most = [min(max_new_tokens, tokens) for tokens in room]
            if place(read_caches, caches, rows, n_rows, max(most) + look_every):
                fed = SimpleNamespace(text_ids=last.clone(), image_ids=last[:0])
                next_hidden = Step(partial(step, fed.text_ids[:, None], caches), fed, dict(enumerate(caches)), graphs)
            texts |= {row: (number, [], tokens) for row, number, tokens in zip(rows, numbers, most)}
            n_steps = 0
            rate.read += sum(read_caches[-1].lengths)
        elif texts:
            for cache in caches:
                cache.replace(rows)                       # a free row must not run out of its buffer
            rows, n_steps = list(texts), min(max(1, 2 * n_steps), look_every)                 # new ones may end soon
            rate.steps += n_steps
        else:
            return
        index, numbers, chosen = torch.tensor(rows, device=last.device), [texts[row][0] for row in rows], []
        for _ in range(n_steps or 1):
            hidden = hidden if new else next_hidden(last, last[:0])[index]
            chosen.append(sampler.choose(head(hidden), numbers))
            last[index] = chosen[-1][0]
        new_ids, largest = (torch.stack(values, dim=1) for values in zip(*chosen))            # (rows, steps)
        check_finite(largest)
        new_ids = new_ids.tolist()
        seconds = time.perf_counter() - began
        rate.prefill, rate.decoding = rate.prefill + seconds * bool(new), rate.decoding + seconds * (not new)
        for row, tokens in zip(rows, new_ids):
            number, ids, most = texts[row]
            n = next((n for n, token in enumerate(tokens, 1) if token in stop), len(tokens))
            tokens = tokens[:min(n, most - len(ids))]     # what stands behind the end is dropped
            ids += tokens
            rate.written += 0 if new else len(tokens)
            if ended := ids[-1] in stop or len(ids) == most:
                del texts[row]
            yield number, ids, ended


def place(new, caches, rows, n_rows, room):
    """Copy new caches into these rows of the others, which are replaced by longer ones if they lack room for the new
    rows and so many tokens behind them. -> whether they were"""
    before = list(caches)
    for n, cache in enumerate(new):
        length = -(-(cache.filled + room) // 64) * 64     # in steps, so that it happens seldom
        if not before or len(caches[n].places) < length:
            longer = cache.empty(n_rows, length)
            if before:
                longer.replace(list(range(n_rows)), caches[n])
            caches[n:n + 1] = [longer]
        caches[n].replace(rows, cache)
    return caches != before

