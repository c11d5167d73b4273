"""Text behind many prompts in a few rows: a row whose text has ended takes the next prompt and waits for no other."""
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace

import torch

from common.sampling import Step, check_finite

LOOK_EVERY = {"cuda": 8}       # steps: to read ids from a GPU is to wait for it
ROUND = 64                     # positions: buffers that have to grow seldom do


class Rate:
    """What write_texts took: prefill, which ends with the first token of a text, apart from decoding"""

    def __init__(self, model):
        """A step of decoding reads all weights but the embedding and those of pictures."""
        unread = "vision", "embed_tokens", "text_embeddings", "patch", "pos_embed", "mm_projector", "pixel_shuffle"
        self.weights = sum(p.nbytes for name, p in model.named_parameters(remove_duplicate=False)
                           if not any(part in name for part in unread))
        self.device = model.lm_head.weight.device
        self.read = self.written = self.steps = 0         # tokens, tokens, readings of the weights
        self.prefill = self.decoding = 1e-9               # seconds

    def __str__(self):
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        speed, bandwidth = self.written / self.decoding, self.steps * self.weights / self.decoding / 1e9
        return (f"prefill: {self.read} tokens in {self.prefill:.2f} s, {self.read / self.prefill:.0f} tokens/s; "
                f"decoding: {self.written} tokens in {self.decoding:.2f} s, {speed:.1f} tokens/s, {bandwidth:.2f} GB/s "
                f"of weights; memory: {memory / 1e9:.2f} GB at most")


def prepare_ahead(prepare, items, ahead):
    """Yields futures of prepare(item) for the items in order. Threads work on them, so many ahead of the caller."""
    with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as threads:
        waiting = deque()
        for item in items:
            waiting.append(threads.submit(prepare, item))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting


@torch.inference_mode()
def write_texts(read, step, head, prompts, n_rows, max_new_tokens, stop, sampler, rate, graphs=True):
    """Continue the prompts of an iterator. Yields (number of a prompt, its ids so far, whether they have ended): with
    one of `stop`, after max_new_tokens, or with the positions. They end in another order than they come in.

    read(numbers, prompts) -> hidden states (n, D) of their last tokens, caches that hold them, how many tokens may
    follow each; step(ids (B, 1), caches) -> (B, 1, D); head(hidden states) -> logits; rate: a Rate, which is added to
    """
    prompts = enumerate(prompts)
    rows = Rows(read, step, head, n_rows, max_new_tokens, stop, sampler, rate, graphs)
    while True:
        began, free = time.perf_counter(), rows.numbers.count(None)
        new = list(islice(prompts, free)) if 4 * free >= n_rows else []       # several are read faster than one by one
        if new:
            yield from rows.take(new, began)
        elif free < n_rows:
            yield from rows.write()
        else:
            return


class Rows:
    """Of write_texts. numbers: of the prompt in each row, None in a free one; texts: ids so far, how many at most"""

    def __init__(self, read, step, head, n_rows, max_new_tokens, stop, sampler, rate, graphs):
        self.read, self.run, self.head, self.sampler, self.rate, self.graphs = read, step, head, sampler, rate, graphs
        self.max_new_tokens, self.stop, self.numbers, self.texts = max_new_tokens, stop, [None] * n_rows, {}
        self.caches, self.step = None, None
        self.ids = torch.zeros(n_rows, dtype=torch.long, device=rate.device)  # the last of each row
        self.look_every = 1 if sampler.temperature else LOOK_EVERY.get(rate.device.type, 1)

    def take(self, new, began):
        """New prompts with their numbers, into free rows"""
        numbers, prompts = zip(*new)
        hidden, caches, room = self.read(numbers, prompts)
        free = [row for row, number in enumerate(self.numbers) if number is None][:len(new)]
        self.fill(free, caches, min(self.max_new_tokens, max(room)) + self.look_every)
        ids, largest = self.sampler.choose(self.head(hidden), numbers)
        check_finite(largest)
        self.ids[free] = ids
        for row, number, token, most in zip(free, numbers, ids.tolist(), room):
            self.numbers[row], self.texts[row] = number, ([token], min(self.max_new_tokens, most))
        self.rate.read += sum(caches[-1].lengths)
        self.rate.prefill += time.perf_counter() - began
        return self.hand_out(free, [[]] * len(free))

    def fill(self, rows, caches, room):
        """Copy what was read; buffers without room for it and what may follow are replaced by longer ones."""
        n_rows = len(self.numbers)
        self.caches = self.caches or [cache.resized(n_rows, 0) for cache in caches]
        for n, cache in enumerate(caches):
            if len(self.caches[n].places) < cache.filled + room:
                old, length = self.caches[n], -(-(cache.filled + room) // ROUND) * ROUND
                self.caches[n], self.step = old.resized(n_rows, length), None
                self.caches[n].replace(list(range(n_rows)), old)
            self.caches[n].replace(rows, cache)
        if self.step is None:
            new, all_caches = SimpleNamespace(text_ids=self.ids.clone(), image_ids=self.ids[:0]), self.caches
            self.step = Step(lambda: self.run(new.text_ids[:, None], all_caches), new,
                             dict(enumerate(all_caches)), self.graphs)

    def write(self):
        """A token more for each text, on a GPU several: those behind an end are never handed out"""
        began, steps = time.perf_counter(), []
        for cache in self.caches:                         # a free row must not run out of its buffer
            cache.replace([row for row, number in enumerate(self.numbers) if number is None])
        rows = [row for row, number in enumerate(self.numbers) if number is not None]
        index, numbers = torch.tensor(rows, device=self.ids.device), [self.numbers[row] for row in rows]
        for _ in range(self.look_every):
            hidden = self.step(self.ids, self.ids[:0])[index]
            steps.append(self.sampler.choose(self.head(hidden), numbers))
            self.ids[index] = steps[-1][0]
        ids, largest = (torch.stack(values, dim=1) for values in zip(*steps))                 # (rows, steps)
        check_finite(largest)
        ids = ids.tolist()
        self.rate.steps += self.look_every
        self.rate.decoding += time.perf_counter() - began
        return self.hand_out(rows, ids)

    def hand_out(self, rows, new):
        """new: a list of ids for each row. Yields what write_texts does, and frees the rows of ended texts"""
        for row, more in zip(rows, new):
            number, (ids, most) = self.numbers[row], self.texts[row]
            for token in more:
                if ids[-1] not in self.stop and len(ids) < most:
                    ids.append(token)
                    self.rate.written += 1
            ended = ids[-1] in self.stop or len(ids) == most
            self.numbers[row] = None if ended else number
            yield number, ids, ended
