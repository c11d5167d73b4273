"""Data (Sec. 3.3): captions from tar shards and COCO, chats from LLaVA JSON, as batches of token streams.

    python pretrain.py --data 'coyo/{00000..07776}.tar' coco_karpathy_train.json --images coco ...
    python data.py 'coyo/{00000..00002}.tar' coco_karpathy_train.json --images coco    # look at it before a run

How it stays exact: all sources are cut into shards; an epoch is a shuffled list of shards; a few shards at a time are
listed (tar headers only), their samples shuffled together and dealt out to steps, ranks and micro-batches in one global
order. So every sample is used once per epoch whatever the number of processes, and the position in the data is three
numbers. A bad sample leaves its place empty and is counted: nothing shifts.
"""
import argparse
import glob
import hashlib
import io
import itertools
import json
import re
import signal
import tarfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from command import POSITIVE, TOY, Help, run
from config import LibraConfig
from streams import Streams
from text import IMG, Text, cut, spell_out
from tokenizer import open_image, prepare
from weights import UserError, read_json

SHARD = 10_000                 # entries of a JSON file that make a shard
MARK = "<image>"               # where LLaVA's format puts an image


# ---------------------------------------------------------------- from names to shards to samples

def expand(patterns):
    """'coyo/{00000..07776}.tar', globs, files, several -> existing files in order; UserError names what is missing.
    'coco.json@3' stands for a file that each epoch reads three times."""
    files = []
    for pattern in patterns:
        pattern, _, times = pattern.rpartition("@") if re.search(r"@\d+$", pattern) else (pattern, "", 1)
        names = [name for some in braces(pattern)
                 for name in ([some] if Path(some).is_file() else sorted(glob.glob(some)) or [some])]
        if Path(pattern).is_dir():
            raise UserError(f"--data {pattern} is a folder: name its files, as in '{pattern}/*.tar'")
        if not names or not int(times):
            raise UserError(f"--data {pattern}, {times} times: stands for no file")
        lost = [name for name in names if not Path(name).is_file()]
        if lost:
            raise UserError(f"--data {pattern}: {len(lost)} of {len(names)} files are missing, first {lost[0]}")
        files += names * int(times)
    return files


def braces(pattern):
    """'{0..1}/{00..99}.tar' -> all the names it stands for"""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    return [name for i in range(int(first), int(last) + 1)
            for name in braces(pattern[:match.start()] + str(i).zfill(len(first)) + pattern[match.end():])]


@dataclass
class Source:
    """One file. kind: tar (img2dataset), coco (Karpathy captions) or llava (conversations)."""
    path: str
    kind: str
    images: str = ""           # folder that the image paths of a JSON file are relative to
    entries: list = field(default_factory=list, repr=False)


def open_source(path, images=""):
    """A shard, by its name alone: thousands of them are not opened before the first step. The kind of any other file is
    told by its content: a tar archive, or JSON with captions or conversations."""
    if str(path).endswith(".tar") or tarfile.is_tarfile(path):
        return Source(path, "tar")
    value = read_json(path, (dict, list))
    if isinstance(value, dict) and isinstance(value.get("images"), list):                     # dataset_coco.json
        try:
            entries = [{"image": f"{one.get('filepath', '')}/{one['filename']}".lstrip("/"), "caption": sentence["raw"]}
                       for one in value["images"] if one.get("split") in ("train", "restval")
                       for sentence in one["sentences"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not COCO's captions as Karpathy split them: an image without {error}") from None
        if not entries:
            raise UserError(f"{path}: none of its {len(value['images'])} images has the split train or restval; COCO's "
                            "own captions_*.json has none: fetch Karpathy's dataset_coco.json")
        return Source(path, "coco", images, entries)
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        if "conversations" in value[0]:
            return Source(path, "llava", images, value)
        if "caption" in value[0]:
            flat = [{**entry, "caption": caption} for entry in value for caption in
                    (entry["caption"] if isinstance(entry.get("caption"), list) else [entry.get("caption")])]
            return Source(path, "coco", images, flat)
    raise UserError(f"{path}: neither a tar shard nor JSON with 'conversations' (LLaVA) or 'caption' (COCO Karpathy)")


def open_sources(patterns, images="", only_pictures=False):
    """What --data names -> Sources in order; a file that is read several times is held once. only_pictures: chats
    without one are left out."""
    files = expand(patterns)
    once = {path: open_source(path, images) for path in dict.fromkeys(files)}
    for source in once.values() if only_pictures else ():
        source.entries = [entry for entry in source.entries if entry.get("image")]
    return [once[path] for path in files]


def list_shard(sources, shard):
    """shard (source, part) -> the places of its samples, cheap to send to a worker"""
    number, part = shard
    source = sources[number]
    if source.kind != "tar":
        return [(number, i) for i in range(part * SHARD, min((part + 1) * SHARD, len(source.entries)))]
    samples, again = {}, Counter()
    with open(source.path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{source.path} is compressed (gzip), which does not allow to read a sample by its place: "
                            "gunzip it")
    try:
        with tarfile.open(source.path, "r:") as tar:
            for member in tar:
                if member.isfile() and not re.fullmatch(r"__.*__", member.name):
                    folder, _, base = member.name.rpartition("/")
                    key, _, ending = base.partition(".")
                    key, ending = f"{folder}/{key}" if folder else key, ending.lower()
                    again[key, ending] += 1               # the same key again is another sample
                    key += f" #{again[key, ending]}" * (again[key, ending] > 1)
                    samples.setdefault(key, {})[ending] = member.offset_data, member.size
            whole = ends_well(tar)
    except (tarfile.TarError, EOFError, OSError):
        whole = False
    if not whole:                                         # what stands before the damage is used
        samples[f"{source.path} (cut off)"] = {}
    return [(number, key, files) for key, files in samples.items()]


def ends_well(tar):
    """Behind its last member a tar file holds zeros and nothing else; tarfile ends quietly at a damaged header."""
    tar.fileobj.seek(tar.offset)
    rest = iter(partial(tar.fileobj.read, 1 << 20), b"")
    first = next(rest, b"")
    return len(first) >= 512 and not any(part.strip(b"\0") for part in itertools.chain([first], rest))


class Order:
    """The global order of samples, epoch after epoch, without end. `state` is all it needs to go on: three numbers, and
    what files and seed they belong to; with others the place would be another, and samples lost or repeated."""

    AT_ONCE = 8                    # shards whose samples are mixed

    def __init__(self, sources, seed, state=None):
        self.sources, self.seed = sources, seed
        self.shards = [(n, part) for n, source in enumerate(sources)
                       for part in range(-(-len(source.entries) // SHARD) if source.kind != "tar" else 1)]
        names = [(Path(source.path).name, len(source.entries)) for source in sources]
        self.belongs = hashlib.sha256(json.dumps([seed, self.AT_ONCE, names]).encode()).hexdigest()[:16]
        self.state = list(state or [0, 0, 0, self.belongs])
        if self.state[3:] != [self.belongs]:
            raise UserError("this run was begun with other files in --data or another --seed: its place in the data "
                            "means nothing among these. Give the same, or begin anew in another --out")

    def __iter__(self):
        empty = 0
        while True:
            epoch, block, taken = self.state[:3]
            shards = [self.shards[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))]
            here = shards[block * self.AT_ONCE:(block + 1) * self.AT_ONCE]
            places = [place for shard in here for place in list_shard(self.sources, shard)]
            order = np.random.default_rng([self.seed, epoch, block]).permutation(len(places))
            for i in range(taken, len(places)):
                self.state = [epoch, block, i + 1, self.belongs]
                yield epoch, places[order[i]]
            empty = 0 if places else empty + 1
            if empty > len(self.shards):
                raise UserError(f"{self.sources[0].path}: no samples in {len(self.sources)} files")
            last = (block + 1) * self.AT_ONCE >= len(shards)
            self.state = [*((epoch + 1, 0) if last else (epoch, block + 1)), 0, self.belongs]


class Batches:
    """Batch sampler of one rank: its share of every global batch.
    `state_after(n)`: the state of the order behind its n-th batch, however far workers have read ahead."""

    def __init__(self, order, batch, micro_batch, rank=0, world=1):
        if batch % (micro_batch * world):
            raise UserError(f"--batch {batch} does not divide into {world} processes with --micro-batch {micro_batch}")
        self.order, self.batch, self.micro, self.rank, self.world = order, batch, micro_batch, rank, world
        self.states = []

    def state_after(self, n):
        return self.states[n] if n < len(self.states) else list(self.order.state)

    def __iter__(self):
        samples = iter(self.order)
        while True:
            self.states.append(list(self.order.state))
            share = [next(samples) for _ in range(self.batch)][self.rank::self.world]
            for start in range(0, len(share), self.micro):
                yield share[start:start + self.micro]


# ---------------------------------------------------------------- from a sample to tokens

class Bad(Exception):
    """A sample that cannot be used: its cause is counted, its name listed."""

    def __init__(self, cause, name):
        super().__init__(cause, name)
        self.cause, self.name = cause, name


def read_sample(source, place):
    """-> name, caption or conversation, list of PIL images"""
    if source.kind == "tar":
        _, key, files = place
        picture = next((files[ending] for ending in ("jpg", "jpeg", "png", "webp") if ending in files), None)
        if not files:
            raise Bad("cut_tar", key)
        if picture is None:
            raise Bad("no_image", key)
        with open(source.path, "rb") as tar:
            def content(span):
                tar.seek(span[0])
                return tar.read(span[1])
            caption = None
            if "json" in files:
                try:
                    caption = json.loads(content(files["json"])).get("caption")
                except (ValueError, AttributeError):
                    raise Bad("bad_json", key) from None
            if caption is None and "txt" in files:
                caption = content(files["txt"]).decode("utf-8", "replace")
            return key, caption, [load_image(io.BytesIO(content(picture)), key)]
    entry = source.entries[place[1]]
    name = str(entry.get("id", entry.get("image_id", entry.get("image", place[1]))))
    paths = entry.get("image") or []
    pictures = []
    for path in [paths] if isinstance(paths, str) else paths:
        whole = (Path(source.images) / path).resolve()
        if not whole.is_relative_to(Path(source.images).resolve()):
            raise Bad("path_outside", name)
        if not whole.is_file():
            raise Bad("no_image", f"{name}: {whole}")
        pictures.append(load_image(whole, name))
    if source.kind == "coco" and not pictures:
        raise Bad("no_image", name)
    return name, entry["caption" if source.kind == "coco" else "conversations"], pictures


def load_image(file, name):
    try:
        return open_image(file)
    except UserError:
        raise Bad("bad_image", name) from None


def clean_caption(caption, name):
    """Lower case, '*', '#', '~' and repeated blanks to one blank, at most 64 words"""
    words = re.sub(r"[*#~]", " ", str(caption or "").lower()).split()
    if not words:
        raise Bad("no_caption", name)
    return " ".join(words[:64])


def llava_turns(conversation, images, name):
    """[{"from": "human" | "gpt", "value"}] -> [(question, number of images, answer)]: a mark, wherever it stands in a
    turn, moves to that turn's front"""
    if not isinstance(conversation, list) or not conversation:
        raise Bad("no_label", name)
    talk = conversation[1:] if conversation[0].get("from") != "human" else conversation
    turns, seen = [], 0
    for question, answer in zip(talk[::2], talk[1::2]):
        if question.get("from") != "human" or answer.get("from") != "gpt":
            raise Bad("roles", name)
        lines = [line.strip() for line in question["value"].splitlines()]
        marks = question["value"].count(MARK) if images else lines.count(MARK)    # in other words it is text
        words = question["value"].replace(MARK, "").strip() if marks else question["value"]
        turns.append((words, marks, answer["value"] + ""))                                    # an answer is text
        seen += marks
    if seen != images:
        raise Bad("image_marks", name)
    return turns


@dataclass
class Recipe:
    """What a stage makes of a sample"""
    text: Text
    config: object
    resolution: int
    max_length: int
    seed: int = 0
    text_to_image: float = 0.0     # share of captions that stand before their image, drawn without E_c (Sec. 4.3)
    caption_end: bool = True       # </s> behind captions
    image_loss: bool = True        # False: image tokens are no targets, Table 3 (a)

    def __post_init__(self):
        self.max_length = min(self.max_length, self.config.max_position_embeddings)

    def __call__(self, source, place, epoch):
        """-> {ids, counted, pixels (n, 3, R, R), drawn, name}; raises Bad"""
        name, words, pictures = read_sample(source, place)
        draw = False
        if source.kind == "llava":
            turns = llava_turns(words, len(pictures), name)
            ids, counted = self.text.chat(turns)
        else:
            key = [self.seed, epoch] + list(name.encode())
            draw = np.random.default_rng(key).random() < self.text_to_image
            most = max(0, self.max_length - self.config.image_tokens - 3)
            ids, counted = self.text.caption(clean_caption(words, name), self.caption_end, not draw, most)
            counted = [label and (self.image_loss or i != IMG) for i, label in zip(ids, counted)]
        try:
            ids, counted = cut(ids, counted, self.max_length, self.config.image_tokens, name)
        except UserError:
            raise Bad("no_label", name) from None
        kept = ids.count(-1)
        pixels = [prepare(picture, self.resolution, square=not draw) for picture in pictures[:kept]]
        return {"ids": ids, "counted": counted, "pixels": pixels, "drawn": [draw] * kept, "name": name}


@dataclass
class Pictures:
    """Stage 0: pictures alone, cropped to a square and mirrored by chance"""
    resolution: int
    seed: int = 0
    config: object = None

    def __call__(self, source, place, epoch):
        name, _, pictures = read_sample(source, place)
        mirror = np.random.default_rng([self.seed, epoch] + list(name.encode())).random() < 0.5
        pixels = [prepare(picture, self.resolution, square=False) for picture in pictures[:1]]
        if not pixels:
            raise Bad("no_image", name)
        return {"pixels": [p.flip(-1) if mirror else p for p in pixels], "drawn": [False], "name": name}


@dataclass
class Batch:
    streams: Streams               # None where the stage reads pictures alone
    pixels: torch.Tensor           # (n_images, 3, R, R)
    drawn: torch.Tensor            # (n_images,) bool: images without contiguous signal
    names: list
    bad: Counter                   # cause -> number
    listed: list                   # (cause, name)

    def pin_memory(self):
        return replace(self, pixels=self.pixels.pin_memory(), drawn=self.drawn.pin_memory())

    def to(self, device):
        pixels, drawn = (t.to(device, non_blocking=True) for t in (self.pixels, self.drawn))
        streams = self.streams and self.streams.to(device)
        return replace(self, streams=streams, pixels=pixels, drawn=drawn)


class Samples(torch.utils.data.Dataset):
    """What a worker does: a sample's place in, tokens and pixels out"""

    def __init__(self, sources, recipe):
        self.sources, self.recipe = sources, recipe

    def __getitem__(self, at):
        epoch, place = at
        try:
            return self.recipe(self.sources[place[0]], place, epoch)
        except Bad as bad:
            return bad
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:          # an entry of another shape
            return Bad("bad_entry", f"{type(error).__name__} in {self.sources[place[0]].path}: {place[1]}")

    def collate(self, samples):
        r = self.recipe.resolution
        bad = [sample for sample in samples if isinstance(sample, Bad)]
        good = [sample for sample in samples if not isinstance(sample, Bad)]
        streams = None if self.recipe.config is None else self.streams(good)
        pixels = [picture for s in good for picture in s["pixels"]]
        return Batch(streams, torch.stack(pixels) if pixels else torch.zeros(0, 3, r, r),
                     torch.tensor([d for s in good for d in s["drawn"]], dtype=torch.bool), [s["name"] for s in good],
                     Counter(b.cause for b in bad), [(b.cause, b.name) for b in bad])

    def streams(self, good):
        c = self.recipe.config
        blank = torch.zeros(c.image_feature_resolution ** 2, c.vision_codebook_num, dtype=torch.long)
        rows = [spell_out(s["ids"], s["counted"], [blank] * len(s["pixels"]), c) for s in good]
        if not rows:                                      # no sample is usable: <s> alone, without a target
            rows = [spell_out([self.recipe.text.bos], [0], [], c)]
        return Streams.of([ids for ids, _ in rows], c, counted=[counted for _, counted in rows])


def quiet(_):
    """A worker leaves Ctrl-C and SIGTERM to its trainer, who ends the step and saves; they reach the whole group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(sources, recipe, batch, micro_batch, seed, rank=0, world=1, workers=0, state=None, pin=False):
    """-> (DataLoader of Batch, its Batches): an endless stream of this rank's micro-batches from a state on"""
    samples = Samples(sources, recipe)
    batches = Batches(Order(sources, seed, state=state), batch, micro_batch, rank, world)
    return torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=samples.collate,
                                       pin_memory=pin, persistent_workers=workers > 0, worker_init_fn=quiet,
                                       generator=torch.Generator()), batches                 # the run's is left alone


# ---------------------------------------------------------------- looking at a dataset before a run

def check(files, images, llm, most, max_length, grid):
    """Print what the readers make of up to --limit samples of each file: kinds, sizes, lengths, what cannot be used and
    why, three examples of a file with the text that counts in [brackets]."""
    files, text, path = expand(files), Text(Path(llm) / "tokenizer.model"), Path(llm) / "config.json"
    config = LibraConfig(vocab_size=text.vocab_size, newline_token_id=text.newline, image_feature_resolution=grid)
    if path.exists():
        config.max_position_embeddings = read_json(path).get("max_position_embeddings", config.max_position_embeddings)
    if config.image_tokens + 2 > config.max_position_embeddings:
        raise UserError(f"{path}: {config.max_position_embeddings} positions, too few for a picture of {grid} x {grid} "
                        "tokens: give the --grid of the image tokenizer (the toy world's is 7)")
    recipe, bad, sizes, lengths, examples = Recipe(text, config, 14, max_length), Counter(), [], [], []
    for path in files:
        source, shown = open_source(path, images), 0
        samples = Samples([source], recipe)
        places = [place for part in range(max(1, -(-len(source.entries) // SHARD)))
                  for place in list_shard([source], (0, part))]
        for place in places[:most]:
            sample = samples[0, place]
            if isinstance(sample, Bad):
                bad[sample.cause] += 1
                print(f"  {sample.cause}: {sample.name}")
                continue
            sizes += [picture.size for picture in read_sample(source, place)[2]]
            lengths.append(sum(config.image_tokens if i == IMG else 1 for i in sample["ids"]))
            if shown < 3 and len(examples) < 12:
                examples.append(f"{sample['name']}: {label(text, sample['ids'], sample['counted'])}")
                shown += 1
        print(f"{path}: {source.kind}, {len(places)} samples, {min(most, len(places))} read")
    if sizes:
        wide, high = zip(*sizes)
        print(f"{len(sizes)} pictures: {min(wide)} to {max(wide)} pixels wide, {min(high)} to {max(high)} high")
    if lengths:
        lengths.sort()
        print(f"tokens with images of {config.image_tokens}: {lengths[0]} to {lengths[-1]}, half of the samples up to "
              f"{lengths[len(lengths) // 2]}; cut at {recipe.max_length}")
    for words in examples:
        print(f"\n{words}")
    total = len(lengths) + sum(bad.values())
    print(f"\n{sum(bad.values())} of the {total} samples that were read cannot be used"
          + "".join(f", {cause} {n}" for cause, n in bad.most_common()))


def label(text, ids, counted):
    """Pieces back to text, <image> for a picture, [what counts in the loss]"""
    pieces = []
    for counts, group in itertools.groupby(zip(ids, counted), key=lambda pair: (pair[1], pair[0] == IMG)):
        ids = [i for i, _ in group]
        words = MARK if counts[1] else "".join(text.model.id_to_piece(i) for i in ids).replace("\u2581", " ")
        pieces.append(f"[{words}]" if counts[0] else words)
    return "".join(pieces)


def main():
    parser = argparse.ArgumentParser(description=check.__doc__, formatter_class=Help)
    parser.add_argument("files", nargs="+", help="as --data of the trainers takes them")
    parser.add_argument("--images", metavar="DIR", default=TOY / "chats/images",
                        help="what image paths in JSON files are relative to")
    parser.add_argument("--llm", metavar="DIR", default=TOY / "llama",
                        help="folder with tokenizer.model, and config.json, which says how long a sample can be")
    parser.add_argument("--limit", type=POSITIVE, default=1000, metavar="N", help="samples read of each file")
    parser.add_argument("--max-length", type=POSITIVE, default=2048, help="tokens at which samples are cut")
    parser.add_argument("--grid", type=POSITIVE, default=24, metavar="G",
                        help="a picture has G x G tokens, BOI and EOI; 24 as published, the toy world's 7")
    args = parser.parse_args()
    check(args.files, args.images, args.llm, args.limit, args.max_length, args.grid)


if __name__ == "__main__":
    run(main)
