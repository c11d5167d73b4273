"""Random damage to training data. CASES is {name: function(rng, folder)}: each call writes one damaged input into the
empty `folder` and reads it. A file may be refused by a UserError, a sample becomes a BadSample; nothing else happens.
"""
import io
import json
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import tiny
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.pictures import FORMATS, open_image
from common.sources import expand_patterns, open_source
from data import PictureBuilder, SampleBuilder, SampleDataset, SampleOrder, list_shard
from text import Text

VALUES = [None, True, 0, -1, 1.5, float("nan"), 10 ** 400, "", "a", "<image>", "<image>\n<image>", "../x", "/dev/null",
          "\0", "\ud800", "a" * 10 ** 5, [], [[]], ["a"], {}, {"a": 1}, "0.jpg", "<video>", {"from": "human"},
          [None] * 5]
RAW = [b"[" * 10 ** 5, b'{"caption":' * 10 ** 5, b'{"caption": %s}' % (b"9" * 5000), b"\xff\xfea", b"\xff" * 50, b"{",
       b"", b"NaN", b'{"caption": "\\ud800"}', b"\x00" * 600]
FIELDS = {"name": (0, 100), "size": (124, 136), "checksum": (148, 156), "kind": (156, 157), "magic": (257, 265),
          "prefix": (345, 500)}


@cache
def builders():
    text = Text(tiny.spm(Path(tempfile.mkdtemp())))
    return (SampleBuilder(text, tiny.config(vocab_size=text.vocab_size, max_position_embeddings=800), 32, 800),
            PictureBuilder(32))


@cache
def picture(form):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("L" if form == "PPM" else "RGB").save(file, form)
    return file.getvalue()


def read_all(path, folder):
    """Every sample of a file by both builders"""
    source = open_source(path, folder)
    order = SampleOrder([source], 0)
    for builder in builders():
        dataset = SampleDataset([source], builder)
        samples = [dataset[0, place] for shard in order.shards for place in list_shard([source], shard)]
        json.dumps([sample["name"] for sample in samples if isinstance(sample, dict)]).encode()
        dataset.collate(samples)


def damage(rng, content):
    """Some bytes other, cut, or doubled"""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        if content:
            content[rng.integers(len(content))] = rng.integers(256)
    start, end = sorted(rng.integers(len(content) + 1, size=2))
    forms = [content, content[:start], content[:start] + content[end:], content + content[start:end]]
    return bytes(forms[rng.integers(4)])


def write_tar(rng, path, files):
    form = int(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard(rng, folder, change):
    files = {}
    for n in range(4):
        name = ("é" * 40 + "/") * int(rng.integers(3)) + str(n)
        files |= {f"{name}.jpg": picture("JPEG"), f"{name}.json": b'{"caption": "a cat"}', f"{name}.txt": b"a dog"}
    path = write_tar(rng, folder / "0.tar", change(files))
    return path


def tar_bytes(rng, folder):
    path = shard(rng, folder, lambda files: files)
    path.write_bytes(damage(rng, path.read_bytes()))
    read_all(path, folder)


def tar_headers(rng, folder):
    """One field of one header is anything, with a checksum that is right"""
    path = shard(rng, folder, lambda files: files)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = rng.choice([member.offset for member in tar])
    header = content[start:start + 512]
    for name in rng.choice(list(FIELDS), rng.integers(1, 3)):
        first, end = FIELDS[name]
        n = end - first
        values = [rng.bytes(n), b"-1".rjust(n, b"0")[:n], b"\xff" * n, b"\0" * n, b"7" * n,
                  (b"\x80" + rng.bytes(n))[:n], bytes([rng.choice(list(b"xgLKSD1235V"))]) * n]
        header[first:end] = values[rng.integers(len(values))]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start:start + 512] = header
    path.write_bytes(content)
    read_all(path, folder)


def sidecars(rng, folder):
    def change(files):
        for name in list(files):
            if rng.random() < 0.5:
                values = [RAW[rng.integers(len(RAW))], damage(rng, files[name]),
                          json.dumps({"caption": VALUES[rng.integers(len(VALUES))]}).encode()]
                files[name] = values[rng.integers(3)]
        return files
    read_all(shard(rng, folder, change), folder)


def change_value(rng, value):
    """A value at any depth of a JSON value is another"""
    if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return VALUES[rng.integers(len(VALUES))]
    key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(rng.integers(len(value)))
    value = value.copy()
    if rng.random() < 0.15:
        del value[key]
    else:
        value[key] = change_value(rng, value[key])
    return value


TALK = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a cat"}] * 2
FORMS = {"llava": [{"id": n, "image": "0.jpg", "conversations": TALK[:2]} for n in range(3)],
         "coco": [{"image": "0.jpg", "caption": ["a cat", "a dog"], "image_id": n} for n in range(3)],
         "karpathy": {"images": [{"filepath": ".", "filename": "0.jpg", "split": "train",
                                  "sentences": [{"raw": "a cat"}]}] * 3}}


def json_file(form):
    def case(rng, folder):
        (folder / "0.jpg").write_bytes(picture("JPEG"))
        value = FORMS[form]
        for _ in range(rng.integers(1, 4)):
            value = change_value(rng, value)
        content = json.dumps(value).encode()
        chance = rng.random()
        content = damage(rng, content) if chance < 0.2 else RAW[rng.integers(len(RAW))] if chance < 0.25 else content
        (folder / "a.json").write_bytes(content)
        read_all(folder / "a.json", folder)
    return case


def pictures(rng, folder):
    form = FORMATS[rng.integers(len(FORMATS))]
    (folder / "0.jpg").write_bytes(damage(rng, picture(form)))
    open_image(folder / "0.jpg")


def patterns(rng, folder):
    parts = ["{0..3}", "{3..0}", "{00..99999999}", "{0..1}{0..1}", "*", "[", "?", "@3", "@0", "@" + "9" * 5000, "x",
             "{", "}", "{-1..2}", "\0", "é", "/", "..", "{0..%s}" % ("9" * 5000)]
    chosen = "".join(str(part) for part in rng.choice(parts, rng.integers(1, 6)))
    expand_patterns([str(folder) + "/" + chosen])


CASES = {"tar bytes": tar_bytes, "tar headers": tar_headers, "sidecars": sidecars, "pictures": pictures,
         "patterns": patterns, **{form: json_file(form) for form in FORMS}}
