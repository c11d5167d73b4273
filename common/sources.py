"""The files of --data: tar shards, COCO captions and LLaVA conversations as lists of samples by their places."""
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.weights import UserError, parse_json, read_text

SHARD = 10_000                 # entries of a JSON file that make a shard
MOST_FILES = 100_000           # that braces and @ may stand for

# ---------------------------------------------------------------- names

def expand_patterns(patterns):
    """'coyo/{00000..07776}.tar', globs, files -> existing files in order; 'coco.json@3' is read three times an epoch"""
    files = []
    for pattern in patterns:
        pattern, times = re.fullmatch(r"(.*?)(?:@(\d+))?", pattern, re.DOTALL).groups(default="1")
        if os.path.isdir(pattern):
            raise UserError(f"{pattern} is a folder: name its files, as in '{pattern}/*.tar'")
        names = list(itertools.islice(expand_braces(pattern[:4096]), MOST_FILES + 1))         # paths are no longer
        if len(names) * int(times[:9]) > MOST_FILES:
            raise UserError(f"{pattern}, {times} times: stands for more than {MOST_FILES:,} files")
        names = [file for name in names
                 for file in ([name] if os.path.isfile(name) else sorted(glob.glob(name)) or [name])]
        if not names or not int(times):
            raise UserError(f"{pattern}, {times} times: stands for no file")
        if missing := [name for name in names if not os.path.isfile(name)]:
            raise UserError(f"{pattern}: {len(missing)} of {len(names)} files are missing, first {missing[0]}")
        files += names * int(times)
    return files


def expand_braces(pattern):
    """'{0..1}/{00..99}.tar' -> '0/00.tar', '0/01.tar', ..., '1/99.tar'"""
    match = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    if not match:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    for i in range(first, last + 1) if first <= last else range(first, last - 1, -1):
        yield from expand_braces(pattern[:match.start()] + str(i).zfill(len(match[1])) + pattern[match.end():])


# ---------------------------------------------------------------- JSON files

class Entries:
    """The entries of a JSON file as bytes in one array, so that reader processes share its memory. [i] parses one."""

    def __init__(self, entries=()):
        """entries: an iterable of JSON texts or values"""
        lines, lengths = bytearray(), []
        for entry in entries:
            line = (entry if isinstance(entry, str) else json.dumps(entry)).encode()
            lines += line
            lengths.append(len(line))
        self.bytes, self.ends = np.frombuffer(lines, np.uint8), np.cumsum(lengths, dtype=np.int64)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return parse_json(self.bytes[self.ends[i - 1] if i else 0:self.ends[i]].tobytes())


@dataclass
class Source:
    """One file. kind: tar (img2dataset), coco (Karpathy captions) or llava (conversations)."""
    path: str
    kind: str
    images: str = ""           # folder that the image paths of a JSON file are relative to
    entries: Entries = field(default_factory=Entries, repr=False)

    def identity(self):
        """Name and content: of a tar its size, its end and blocks spread over it, which are all of a small one"""
        if self.kind != "tar":
            return [Path(self.path).name, hashlib.sha256(self.entries.bytes).hexdigest()]
        with open(self.path, "rb") as file:
            size = file.seek(0, 2)
            starts = [*range(0, size, max(65536, size // 16)), max(0, size - 65536)]
            content = [file.read(65536) for start in starts if file.seek(start) >= 0]
        return [Path(self.path).name, size, hashlib.sha256(b"".join(content)).hexdigest()]


scan = json.JSONDecoder().raw_decode                      # (text, start) -> value, end


def open_source(path, images="", only_pictures=False):
    """Shards are known by their name: to open thousands would delay the first step. Other files by their content."""
    if str(path).endswith(".tar") or is_tar(path):
        return Source(path, "tar")
    text = read_text(path)
    bracket = re.match(r"\s*\[(?!\s*\])\s*", text)       # of a list that is not empty
    try:
        value = scan(text, bracket.end())[0] if bracket else parse_json(text)
        if not bracket:                                                                       # dataset_coco.json
            kind, entries = "coco", Entries(
                {"image": f"{image.get('filepath', '')}/{image['filename']}".lstrip("/"), "caption": sentence["raw"]}
                for image in value["images"] if image.get("split") in ("train", "restval")
                for sentence in image["sentences"] or [{"raw": None}])                        # is counted as bad
        else:
            kind = "llava" if "conversations" in value else "coco" if "caption" in value else None
            entries = Entries(json_entries(text, bracket.end(), kind, only_pictures))
        if kind and len(entries):
            return Source(path, kind, images, entries)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: expected a tar shard, JSON with 'conversations' (LLaVA) or 'caption', or Karpathy's "
                    "dataset_coco.json, which has images of the split train or restval")


def json_entries(text, start, kind, only_pictures):
    """The entries of a JSON list one after the other, so that never all of them are objects in memory. A list of
    captions is an entry for each, an empty one an entry without; only_pictures: without entries that have none."""
    while True:
        entry, end = scan(text, start)
        captions = entry.get("caption") if kind == "coco" and isinstance(entry, dict) else None
        if not only_pictures or isinstance(entry, dict) and entry.get("image"):
            if isinstance(captions, list):
                yield from ({**entry, "caption": caption} for caption in captions or [None])
            else:
                yield text[start:end]
        separator = re.compile(r"\s*([,\]])\s*").match(text, end)
        if not separator:
            raise ValueError(f"expected a comma or ] at character {end}")
        if separator[1] == "]":
            return
        start = separator.end()


def open_sources(patterns, images="", only_pictures=False):
    """Files read several times are in memory once."""
    files = expand_patterns(patterns)
    sources = {path: open_source(path, images, only_pictures) for path in dict.fromkeys(files)}
    return [sources[path] for path in files]


# ---------------------------------------------------------------- tar files: members by their places
# Not by tarfile.open, which follows damaged headers anywhere, backwards too.

def is_tar(path):
    with open(path, "rb") as file:
        return file.read(512)[257:262] == b"ustar"


def list_tar(path):
    """-> [(name, offset, size)] of the regular files in a tar, and whether it is complete. Only headers are read,
    and only up to the first thing that cannot be right."""
    members, extended = [], {}
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        offset = file.seek(0)
        while len(header := file.read(512)) == 512 and any(header):
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
                size = int(extended.get(b"size", member.size))
            except (ValueError, tarfile.HeaderError):
                break
            if not 0 <= size <= length - offset - 512:
                break
            if member.type == b"x":                       # attributes of the next member (pax): lines '30 path=...'
                extended |= re.findall(rb"^\d+ (path|size)=(.*)$", file.read(size), re.MULTILINE)
            elif member.type == b"L":                     # its long name (GNU)
                extended[b"path"] = file.read(size).rstrip(b"\0")
            else:
                if member.type in b"\0" b"07":
                    if header[257:263] != b"ustar\0":     # GNU's: has times where ustar has a folder, the prefix
                        extended.setdefault(b"path", header[:100].split(b"\0")[0])
                    name = extended[b"path"].decode("utf-8", "backslashreplace") if b"path" in extended else member.name
                    members.append((name, offset + 512, size))
                extended = {}
            offset = file.seek(offset + 512 + -(-size // 512) * 512)
        rest = header + file.read(2 ** 20)                # a complete tar ends in zeros, 512 bytes or more
    return members, len(rest) >= 512 and not any(rest)


def list_shard(sources, shard):
    """shard (source, part) -> places of samples: (source, entry), or in a tar (source, key, {ending: (offset, size)}).
    A damaged tar is used up to the damage, which is listed as a sample without files."""
    number, part = shard
    source = sources[number]
    if source.kind != "tar":
        return [(number, i) for i in range(len(source.entries))[part * SHARD:(part + 1) * SHARD]]
    with open(source.path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{source.path} is compressed (gzip), so no sample can be read by its place: gunzip it")
    samples, times, (members, complete) = {}, Counter(), list_tar(source.path)
    for name, offset, size in members:
        if not re.fullmatch(r"__.*__", name):
            folder, _, base = name.rpartition("/")
            key, _, ending = base.partition(".")
            key, ending = f"{folder}/{key}" if folder else key, ending.lower()
            times[key, ending] += 1
            if times[key, ending] > 1:                    # a key that comes again is another sample
                key += f" #{times[key, ending]}"
            samples.setdefault(key, {})[ending] = offset, size
    if not complete:
        samples[f"{source.path} (cut off)"] = {}
    return [(number, key, files) for key, files in samples.items()]
