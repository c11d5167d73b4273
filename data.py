"""Data (Sec. 3.3): captions from tar shards and COCO, chats from LLaVA JSON, as batches of token streams.

    python pretrain.py --data 'coyo/{00000..07776}.tar' coco_karpathy_train.json --images coco ...
    python data.py 'coyo/{00000..00002}.tar' coco_karpathy_train.json --images coco    # inspect files before a run

An epoch is a shuffled list of shards. AT_ONCE shards at a time are listed (of a tar, its headers only), their samples
shuffled together and dealt out to steps, ranks and micro-batches in one global order. So every sample is used once an
epoch whatever the number of processes, and three numbers give the position in the data. A bad sample is left out of its
batch and counted; no other sample takes its place.
"""
import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch._utils import ExceptionWrapper

from common.cli import POSITIVE, TOY, Help, run, signal_at_parents_death
from common.pictures import open_image
from common.sources import SHARD, expand_patterns, list_shard, open_sources
from common.weights import UserError, inside, parse_json, read_json
from streams import Streams
from text import IMG, TEMPLATES, Text, expand_images, open_text, truncate
from tokenizer import prepare

AT_ONCE = 8                    # shards whose samples are mixed
MARK = "<image>"               # where LLaVA's format puts an image
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")         # endings in a shard


# ---------------------------------------------------------------- the order of samples

class SampleOrder:
    """The endless global order of samples. `state` is the position in it: epoch, block of AT_ONCE shards, samples taken
    of the block; and a hash of the files and the seed that it belongs to."""

    def __init__(self, sources, seed, state=None):
        self.sources, self.seed = sources, seed
        self.shards = [(n, part) for n, source in enumerate(sources)
                       for part in range(1 if source.kind == "tar" else -(-len(source.entries) // SHARD))]
        with ThreadPoolExecutor(16) as pool:              # thousands of shards on a slow disk
            identities = list(pool.map(lambda source: source.identity(), sources))
        self.hash = hashlib.sha256(json.dumps([seed, AT_ONCE, identities]).encode()).hexdigest()[:16]
        self.state = list(state or [0, 0, 0, self.hash])
        if self.state[3:] != [self.hash]:
            raise UserError("this run began with other files in --data or another --seed, so its position in the data "
                            "is lost: give the same, or begin anew in another --out")

    def __iter__(self):
        (epoch, block, taken), n_empty = self.state[:3], 0
        with ThreadPoolExecutor(1) as ahead:              # the next block is listed while this one is used
            listed = ahead.submit(self.list_block, epoch, block)
            while True:
                places = listed.result()
                following = (epoch, block + 1) if (block + 1) * AT_ONCE < len(self.shards) else (epoch + 1, 0)
                listed = ahead.submit(self.list_block, *following)
                order = np.random.default_rng([self.seed, epoch, block]).permutation(len(places))
                for i in range(taken, len(places)):
                    self.state = [epoch, block, i + 1, self.hash]
                    yield epoch, places[order[i]]
                n_empty = 0 if places else n_empty + 1
                if n_empty > len(self.shards):
                    raise UserError(f"{self.sources[0].path}: no samples in {len(self.sources)} files")
                (epoch, block), taken = following, 0
                self.state = [epoch, block, 0, self.hash]

    def list_block(self, epoch, block):
        """-> the places of its samples, shard by shard"""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        return [place for i in shards[block * AT_ONCE:(block + 1) * AT_ONCE]
                for place in list_shard(self.sources, self.shards[i])]


class RankBatchSampler:
    """One rank's share of every global batch, in micro-batches"""

    def __init__(self, order, batch, micro_batch, rank=0, world_size=1):
        if batch % (micro_batch * world_size):
            raise UserError(f"--batch {batch} does not divide by {world_size} processes x --micro-batch {micro_batch}")
        self.order, self.batch, self.micro_batch = order, batch, micro_batch
        self.rank, self.world_size, self.states = rank, world_size, []

    def state_after(self, n):
        """State of the order after n global batches, however far workers have read ahead"""
        return self.states[n] if n < len(self.states) else list(self.order.state)

    def __iter__(self):
        samples = iter(self.order)
        while True:
            self.states.append(list(self.order.state))
            share = [next(samples) for _ in range(self.batch)][self.rank::self.world_size]
            for start in range(0, len(share), self.micro_batch):
                yield share[start:start + self.micro_batch]


# ---------------------------------------------------------------- from a sample to tokens and pixels

class BadSample(Exception):
    """(cause, name) of a sample that cannot be used; SampleDataset adds the file"""


def read_sample(source, place):
    """place: one that list_shard gives. -> name, caption or conversation, list of PIL images. Raises BadSample"""
    name, words, files = (read_tar if source.kind == "tar" else read_entry)(source, *place[1:])
    try:
        return name, words, [open_image(file) for file in files]
    except UserError:
        raise BadSample("bad_image", name) from None


def read_tar(source, name, files):
    """files: {ending: (offset, size)} -> name, caption (text, list or None), [picture]"""
    # the caption's file may have a compound ending (0.caption.txt), the picture's too (0.input.jpg)
    last = {ending.rpartition(".")[2]: ending for ending in reversed(files)} | {ending: ending for ending in files}
    found = [last[ending] for ending in PICTURES if ending in last]
    picture = min(found, key=lambda ending: "." in ending, default=None)      # 0.png before 0.mask.jpg
    if picture is None:
        raise BadSample("no_image" if files else "cut_tar", name + " has " * bool(files) + ", ".join(files))
    content, caption = {}, None
    with open(source.path, "rb") as tar:
        for ending in {picture, last.get("json"), last.get("txt")} & files.keys():
            offset, size = files[ending]
            tar.seek(offset)
            content[ending] = tar.read(size)
    if last.get("json") in content:
        try:
            record = parse_json(content[last["json"]])
        except ValueError:
            raise BadSample("bad_json", name) from None
        caption = record.get("caption") if isinstance(record, dict) else None               # a list of boxes
    captions = caption if isinstance(caption, list) else [caption]
    is_empty = all(text is None or isinstance(text, str) and not words_of(text) for text in captions)
    if is_empty and last.get("txt") in content:
        text, caption = content[last["txt"]], None
        utf16 = text.startswith((b"\xff\xfe", b"\xfe\xff"))                                  # a byte-order mark
        with suppress(UnicodeDecodeError):
            caption = text.decode("utf-16" if utf16 else "utf-8-sig")
    return name, caption, [io.BytesIO(content[picture])]


def read_entry(source, index):
    entry = source.entries[index]
    name = str(entry.get("id", entry.get("image_id", entry.get("image", index))))
    other_media = ("video", "videos", "audio", "audios", *["images"] * (not entry.get("image")))
    if media := [key for key in other_media if entry.get(key)]:
        raise BadSample("other_media", f"{name} has {', '.join(media)}")
    paths = entry.get("image") or []
    try:
        files = [inside(source.images, path) for path in ([paths] if isinstance(paths, str) else paths)]
    except UserError:
        raise BadSample("path_outside", name) from None
    missing = [str(file) for file in files if not file.is_file()]
    if missing or source.kind == "coco" and not files:
        raise BadSample("no_image", ": ".join([name, *missing[:1]]))
    return name, entry["caption" if source.kind == "coco" else "conversations"], files


def words_of(text):
    """-> at most 64 words in lower case, without '*', '#' and '~'; [] for what is not text"""
    is_text = isinstance(text, str) and "\0" not in text  # UTF-16 and UTF-32 without a mark have zeros
    return re.sub(r"[*#~]", " ", text.lower()).split()[:64] if is_text else []


def clean_caption(caption, name, seed, epoch):
    """The words of a caption, joined by blanks. Of a list, one is chosen anew in every epoch. BadSample: no words"""
    texts = [words for text in (caption if isinstance(caption, list) else [caption]) if (words := words_of(text))]
    if not texts:
        raise BadSample("no_caption", name)
    choice = np.random.default_rng([seed, epoch, 1, *name.encode()])
    return " ".join(texts[choice.integers(len(texts))])


def llava_turns(conversation, n_images, name):
    """[{"from": "human" | "gpt", "value"}] -> [(question without <image>, number of images, answer)]"""
    if not isinstance(conversation, list) or not conversation:
        raise BadSample("no_label", name)
    messages = conversation[1:] if conversation[0].get("from") == "gpt" else conversation     # as LLaVA's own code
    turns = []
    for question, answer in zip(messages[::2], messages[1::2]):
        if question.get("from") != "human" or answer.get("from") != "gpt":
            raise BadSample("roles", name)
        words, lines = question["value"], [line.strip() for line in question["value"].splitlines()]
        if re.search("<(video|audio|speech)>", words) and "</" not in words:                  # else it is HTML
            raise BadSample("other_media", name)
        # In a chat without images <image> is text, unless it is a whole line: then an image is missing.
        marks = words.count(MARK) if n_images else lines.count(MARK)
        words = words.replace(MARK, "").strip() if marks else words
        turns.append((words, marks, answer["value"] + ""))                    # + "": what is no text raises
    if len(messages) % 2:
        raise BadSample("roles", f"{name} has a question without an answer")
    if sum(marks for _, marks, _ in turns) != n_images:
        raise BadSample("image_marks", name)
    return turns


@dataclass
class SampleBuilder:
    """Tokens and pixels of a sample, for pretraining and SFT"""
    text: Text
    config: object
    resolution: int
    max_length: int
    seed: int = 0
    text_to_image: float = 0.0     # share of captions that stand before their image, drawn without E_c (Sec. 4.3)
    caption_end: bool = True       # </s> after captions
    image_loss: bool = True        # False: image tokens are no targets, Table 3 (a)

    def __post_init__(self):
        self.max_length = min(self.max_length, self.config.max_position_embeddings)

    def __call__(self, source, place, epoch):
        """-> {ids, loss_mask, pixels [(3, R, R)], drawn, name}; raises BadSample"""
        name, words, pictures = read_sample(source, place)
        draw = False
        if source.kind == "llava":
            ids, loss_mask = self.text.chat(llava_turns(words, len(pictures), name))
        else:
            draw = np.random.default_rng([self.seed, epoch, *name.encode()]).random() < self.text_to_image
            max_tokens = max(0, self.max_length - self.config.image_tokens - 3)
            words = clean_caption(words, name, self.seed, epoch)
            ids, loss_mask = self.text.caption(words, self.caption_end, not draw, max_tokens)
            loss_mask = [label and (self.image_loss or i != IMG) for i, label in zip(ids, loss_mask)]
        ids, loss_mask = truncate(ids, loss_mask, self.max_length, self.config.image_tokens)
        if not any(loss_mask):
            raise BadSample("no_label", name)
        pixels = [prepare(picture, self.resolution, square=not draw) for picture in pictures[:ids.count(IMG)]]
        return {"ids": ids, "loss_mask": loss_mask, "pixels": pixels, "drawn": draw, "name": name}


@dataclass
class PictureBuilder:
    """Pixels of a sample's first picture, cropped to a square and mirrored by chance, for the image tokenizer"""
    resolution: int
    seed: int = 0
    config: object = None

    def __call__(self, source, place, epoch):
        name, _, pictures = read_sample(source, place)
        if not pictures:
            raise BadSample("no_image", name)
        pixels = prepare(pictures[0], self.resolution, square=False)
        mirror = np.random.default_rng([self.seed, epoch, *name.encode()]).random() < 0.5
        return {"pixels": [pixels.flip(-1) if mirror else pixels], "drawn": False, "name": name}


class Batch(NamedTuple):
    streams: Streams               # None from a PictureBuilder
    pixels: torch.Tensor           # (n_images, 3, R, R)
    drawn: torch.Tensor            # (n_images,) bool: images without E_c
    names: list
    bad: list                      # (cause, name, file) of samples that cannot be used

    def to(self, device):
        pixels, drawn = (t.to(device, non_blocking=True) for t in (self.pixels, self.drawn))
        return self._replace(streams=self.streams and self.streams.to(device), pixels=pixels, drawn=drawn)


class SampleDataset(torch.utils.data.Dataset):
    """(epoch, place) -> what the builder makes of the sample, or a BadSample"""

    def __init__(self, sources, builder):
        self.sources, self.builder = sources, builder

    def __getitem__(self, item):
        epoch, place = item
        source = self.sources[place[0]]
        try:
            return self.builder(source, place, epoch)
        except MemoryError:
            raise
        except BadSample as bad:
            cause, name = bad.args
        except Exception as error:  # noqa: BLE001        # an entry of another form can fail in any way
            cause, name = "bad_entry", f"{type(error).__name__}: {place[1]}"
        return BadSample(cause, name.encode("utf-8", "backslashreplace").decode(), str(source.path))

    def collate(self, items):
        bad = [item.args for item in items if isinstance(item, BadSample)]
        samples = [item for item in items if not isinstance(item, BadSample)]
        if hasattr(self.builder, "collate"):              # the builders of monolithic/ make their own batches
            return self.builder.collate(samples, bad)
        c, r, streams = self.builder.config, self.builder.resolution, None
        if c:
            blank = torch.zeros(c.image_feature_resolution ** 2, c.vision_codebook_num, dtype=torch.long)
            rows = [expand_images(s["ids"], s["loss_mask"], [blank] * len(s["pixels"]), c) for s in samples]
            rows = rows or [expand_images([self.builder.text.newline], [0], [], c)]           # no sample is usable
            streams = Streams.from_ids([ids for ids, _ in rows], c, loss_mask=[loss_mask for _, loss_mask in rows])
        pixels = [picture for sample in samples for picture in sample["pixels"]]
        drawn = torch.tensor([sample["drawn"] for sample in samples for _ in sample["pixels"]], dtype=torch.bool)
        return Batch(streams, torch.stack(pixels) if pixels else torch.zeros(0, 3, r, r), drawn,
                     [sample["name"] for sample in samples], bad)


def start_worker(_):
    """Workers receive the trainer's signals too, but have to live until it has finished its step, and no longer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal_at_parents_death(signal.SIGKILL)
    forked = multiprocessing.get_start_method() == "fork"
    if forked and os.getppid() != multiprocessing.parent_process().pid:       # the trainer died before that call
        os._exit(1)
    Queue._on_queue_feeder_error = hand_over_error


def hand_over_error(queue, error, item):
    """A batch that cannot be sent, as where /dev/shm is full, ends the trainer, which would wait for it forever."""
    queue.put((item[0], ExceptionWrapper((type(error), error, error.__traceback__))))


def make_loader(sources, builder, batch, micro_batch, seed, rank=0, world_size=1, workers=0, state=None, pin=False):
    """-> endless DataLoader of this rank's micro-batches (Batch) from `state` on, its RankBatchSampler"""
    sampler = RankBatchSampler(SampleOrder(sources, seed, state), batch, micro_batch, rank, world_size)
    return load(SampleDataset(sources, builder), sampler, workers, pin, persistent_workers=workers > 0), sampler


def make_val_loader(sources, builder, micro_batch, rank=0, world_size=1, workers=0, pin=False):
    """-> DataLoader of this rank's share of all samples, once and in order; all ranks get the same number of batches"""
    items = [(0, place) for shard in SampleOrder(sources, 0).shards for place in list_shard(sources, shard)]
    if not items:
        raise UserError(f"--val-data {sources[0].path}: no samples in {len(sources)} files")
    whole = micro_batch * world_size
    batches = [items[start:start + whole][rank::world_size] for start in range(0, len(items), whole)]
    return load(SampleDataset(sources, builder), batches, workers, pin)


def load(dataset, batches, workers, pin, **options):
    if workers:                                           # each tensor that a worker sends is an open file
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # a generator of its own leaves the run's random numbers alone
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate, pin_memory=pin,
        worker_init_fn=start_worker, generator=torch.Generator(), **options)


# ---------------------------------------------------------------- python data.py FILE...

def inspect_files(files, images, builder, limit):
    """Print what the trainers will make of the first samples of each file: sizes, lengths, bad samples and their cause,
    and three examples of each file, twelve at most, with the targets of the loss in [brackets]."""
    bad, sizes, lengths, examples = Counter(), [], [], []
    for source in open_sources(files, images):
        dataset, samples = SampleDataset([source], builder), []
        places = [place for shard in SampleOrder([source], 0).shards for place in list_shard([source], shard)]
        for place in places[:limit]:
            sample = dataset[0, place]
            if isinstance(sample, BadSample):
                bad[sample.args[0]] += 1
                print("  {}: {} in {}".format(*sample.args))
            else:
                samples.append(sample)
                sizes += [picture.size for picture in read_sample(source, place)[2]]
        lengths += [sum(builder.config.image_tokens if i == IMG else 1 for i in sample["ids"]) for sample in samples]
        examples += samples[:3]
        print(f"{source.path}: {source.kind}, {len(places)} samples, {min(limit, len(places))} read")
    for side, values in zip(("wide", "high"), zip(*sizes)):
        print(f"{len(sizes)} pictures: {min(values)} to {max(values)} pixels {side}")
    if lengths:
        print(f"tokens with images of {builder.config.image_tokens}: {min(lengths)} to {max(lengths)}, median "
              f"{sorted(lengths)[len(lengths) // 2]}; cut at {builder.max_length}")
    for sample in examples[:12]:
        print(f"\n{sample['name']}: {bracketed(builder.text, sample['ids'], sample['loss_mask'])}")
    causes = "".join(f", {cause} {n}" for cause, n in bad.most_common())
    print(f"\n{bad.total()} of the {len(lengths) + bad.total()} samples that were read cannot be used{causes}")


def bracketed(text, ids, loss_mask):
    """Tokens back to text, <image> for a picture, [targets of the loss]"""
    pieces = [MARK if i == IMG else text.piece(i) for i in ids]
    groups = itertools.groupby(zip(loss_mask, pieces), key=lambda pair: pair[0])
    parts = [(label, "".join(piece for _, piece in group)) for label, group in groups]
    return "".join(f"[{part}]" if label else part for label, part in parts)


def main():
    parser = argparse.ArgumentParser(description=inspect_files.__doc__, formatter_class=Help)
    parser.add_argument("files", nargs="+", help="as --data of the trainers takes them")
    parser.add_argument("--images", metavar="DIR", default=TOY / "chats/images",
                        help="folder of the pictures that JSON names")
    parser.add_argument("--llm", metavar="DIR", default=TOY / "llama",
                        help="folder of the LLM: its tokenizer and config.json")
    parser.add_argument("--template", choices=(*TEMPLATES, "llm"), help="of chats; None: that of --llm, or vicuna")
    parser.add_argument("--limit", type=POSITIVE, default=1000, metavar="N", help="samples read of each file")
    parser.add_argument("--max-length", type=POSITIVE, default=2048, help="tokens at which samples are cut")
    parser.add_argument("--grid", type=POSITIVE, default=24, metavar="G",
                        help="a picture has G x G tokens, BOI and EOI; `grid` in the image tokenizer's config.json: 24 "
                        "as published, 7 in the toy world")
    args = parser.parse_args()
    expand_patterns(args.files)                           # a mistake in the names is reported first
    path, image_tokens = Path(args.llm) / "config.json", args.grid ** 2 + 2
    positions = read_json(path).get("max_position_embeddings", 2048) if path.exists() else 2048
    if image_tokens + 2 > positions:
        raise UserError(f"{path}: {positions} positions, too few for a picture of {args.grid} x {args.grid} tokens: "
                        "give the image tokenizer's --grid")
    config = SimpleNamespace(image_tokens=image_tokens, max_position_embeddings=positions)
    text = open_text(path.parent)
    text.use_template(args.template)
    inspect_files(args.files, args.images, SampleBuilder(text, config, 14, args.max_length), args.limit)


if __name__ == "__main__":
    run(main)
