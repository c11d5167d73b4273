"""Reading: every sample exactly once an epoch whoever reads on, and every way in which a sample can be unusable."""
import io
import json
import os
import tarfile
import threading
import tracemalloc
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

import data
from common.sources import expand_patterns, list_shard, list_tar, open_source, open_sources
from common.weights import UserError
from data import BadSample, RankBatchSampler, SampleBuilder, SampleDataset, SampleOrder, read_sample
from text import Text


@pytest.mark.parametrize("then", [1, 4])
def test_another_number_of_processes_goes_on_without_loss(tmp_path, then):
    """Two processes read a part of the epoch, one or four the rest: each sample once"""
    sources = []
    for n, entries in enumerate((37, 20, 48)):
        path = tmp_path / f"{n}.json"
        path.write_text(json.dumps([{"image": f"{n}-{i}.png", "caption": ["a cat"]} for i in range(entries)]))
        sources.append(open_source(path, tmp_path))
    seen, state = Counter(), None
    for size, batches in ((2, 5), (then, 100)):
        ranks = [RankBatchSampler(SampleOrder(sources, seed=3, state=state), 8, 1, rank, size) for rank in range(size)]
        samplers = [iter(rank) for rank in ranks]
        for _ in range(batches):
            for sampler in samplers:
                for _ in range(8 // size):
                    (epoch, place), = next(sampler)
                    seen[epoch, place] += 1
        state = ranks[0].state_after(batches)
        assert all(rank.state_after(batches) == state for rank in ranks)
    first = {place: count for (epoch, place), count in seen.items() if epoch == 0}
    assert len(first) == 105 and set(first.values()) == {1}


def test_the_next_block_is_listed_ahead(monkeypatch):
    """While a block's first sample is in use, another thread lists the shards of the next block, and of no more."""
    monkeypatch.setattr(data, "AT_ONCE", 2)
    listed, two_blocks = [], threading.Event()

    def list_shard(_, shard):
        listed.append(shard)
        if len(listed) == 4:
            two_blocks.set()
        return [(shard[0], name) for name in "ab"]
    monkeypatch.setattr(data, "list_shard", list_shard)
    order = iter(SampleOrder([SimpleNamespace(kind="tar", identity=lambda: "x")] * 6, seed=0))
    _, first = next(order)
    assert two_blocks.wait(60) and first[0] in [n for n, _ in listed[:2]] and len(set(listed)) == 4
    taken = {next(order)[1][0] for _ in range(3)} | {first[0]}
    assert taken == {n for n, _ in listed[:2]} and len(listed) == 4
    order.close()


def picture(form="JPEG", side=40):
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, dtype=np.uint8)).save(file, form)
    return file.getvalue()


def bomb():
    """A small PNG that says it has 60,000 x 60,000 pixels"""
    png = bytearray(picture("PNG"))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def causes(source, folder):
    """-> {name: cause, or None where the sample is fine}"""
    text = Text(tiny.spm(folder))
    config = tiny.config(vocab_size=text.vocab_size, max_position_embeddings=800)
    dataset = SampleDataset([source], SampleBuilder(text, config, 32, 800))
    samples = [dataset[0, place] for place in list_shard([source], (0, 0))]
    bad = [sample.args for sample in samples if isinstance(sample, BadSample)]
    assert [tuple(pair) for pair in dataset.collate(samples).bad] == bad
    return dict.fromkeys(s["name"] for s in samples if isinstance(s, dict)) | {name: cause for cause, name, _ in bad}


def test_what_can_be_wrong_in_a_shard(tmp_path):
    path = tmp_path / "00000.tar"
    files = {"0.jpg": picture(), "0.txt": b"a cat", "1.jpg": picture()[:200], "1.txt": b"a cat", "2.txt": b"a cat",
             "3.jpg": picture(), "3.json": b'{"caption": ', "4.jpg": picture(), "4.txt": b" *#~ ", "5.png": bomb(),
             "5.txt": b"a cat", "6.jpg": picture(), "6.txt": b"a dog", "7.jpg": picture(), "7.txt": b"cut away"}
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    expected = {"0": None, "1": "bad_image", "2 has txt": "no_image", "3": "bad_json", "4": "no_caption",
                "5": "bad_image", "6": None}
    assert causes(open_source(path), tmp_path) == expected | {"7": None}
    with tarfile.open(path) as tar:
        at = tar.getmember("7.jpg").offset_data
    path.write_bytes(path.read_bytes()[:at + 100])        # in the middle of a picture
    found = causes(open_source(path), tmp_path)
    assert found.pop(f"{path} (cut off)") == "cut_tar"
    assert found == expected


@pytest.mark.parametrize("harm", ["header", "zeros", "in a header", "between members", "first header", "empty"])
def test_a_damaged_shard_is_read_up_to_the_damage(tmp_path, harm):
    """tarfile itself ends quietly behind the last good member in most of these"""
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            for ending, content in (("jpg", picture()), ("txt", b"a cat")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert causes(open_source(path), tmp_path) == dict.fromkeys("012345")
    with tarfile.open(path) as tar:
        at = tar.getmember("3.jpg").offset
    content = bytearray(path.read_bytes())
    begin, end = {"header": (at, at + 100), "zeros": (at, at + 2048), "first header": (0, 100)}.get(harm, (0, 0))
    content[begin:end] = (b"\0" if harm == "zeros" else b"\xff") * (end - begin)
    path.write_bytes(content[:{"in a header": at + 200, "between members": at, "empty": 0}.get(harm, len(content))])
    read = "" if harm in ("first header", "empty") else "012"
    assert causes(open_source(path), tmp_path) == dict.fromkeys(read) | {f"{path} (cut off)": "cut_tar"}


def test_an_empty_list_is_no_data(tmp_path):
    (tmp_path / "a.json").write_text(" [ ]")
    with pytest.raises(UserError, match="a.json: expected a tar shard, JSON with"):
        open_source(tmp_path / "a.json")


def test_what_follows_the_damage_is_not_in_memory(tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(b"\xff" * 512)
    os.truncate(path, 2 ** 30)
    tracemalloc.start()
    try:
        assert list_tar(path) == ([], False) and tracemalloc.get_traced_memory()[1] < 2 ** 23
    finally:
        tracemalloc.stop()


def test_names_in_braces(tmp_path):
    for folder in "01":
        (tmp_path / folder).mkdir()
        for number in range(8, 11):
            (tmp_path / folder / f"{number:02d}.tar").write_bytes(b"")
    found = expand_patterns([str(tmp_path / "{0..1}/{08..10}.tar@2")])
    assert [name[-8:] for name in found] == [f"/{f}/{n:02d}.tar" [-8:] for f in "01" for n in (8, 9, 10)] * 2
    assert len(expand_patterns([str(tmp_path / "{0..1}/*.tar")])) == 6
    with pytest.raises(UserError, match="1 of 4 files are missing, first .*2/.*tar"):
        expand_patterns([str(tmp_path / "{1..2}/*.tar")])


def test_pictures_alone_of_chats(tmp_path):
    """The image tokenizer's stage passes over chats without a picture, which are not bad"""
    (tmp_path / "a.jpg").write_bytes(picture())
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": 1, "conversations": []}, {"id": 2, "image": "a.jpg", "conversations": []}] * 3))
    assert [len(open_sources([str(path)], tmp_path, only)[0].entries) for only in (False, True)] == [6, 3]


def test_what_can_be_wrong_in_a_conversation(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(picture()[:200])
    talk = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a cat"}]
    entries = {"fine": {"image": "a.jpg", "conversations": talk}, "text": {"conversations": [
        {"from": "human", "value": "what"}, {"from": "gpt", "value": "red"}]},
        "gone": {"image": "c.jpg", "conversations": talk}, "broken": {"image": "b.jpg", "conversations": talk},
        "outside": {"image": "../a.jpg", "conversations": talk}, "silent": {"image": "a.jpg", "conversations": []},
        "unanswered": {"image": "a.jpg", "conversations": talk[:1]},
        "turned": {"image": "a.jpg", "conversations": [talk[0], talk[0]]},
        "unmarked": {"image": "a.jpg", "conversations": [{"from": "human", "value": "what"}, talk[1]]},
        "greeted": {"image": "a.jpg", "conversations": [talk[1], *talk]},     # LLaVA's code leaves a first gpt out
        "told": {"image": "a.jpg", "conversations": [{"from": "system", "value": "be kind"}, *talk]},
        "ruled": {"image": "a.jpg", "conversations": [{"from": "system", "value": "be kind"}, *talk, talk[0]]},
        "null": {"image": "a.jpg", "conversations": [talk[0], {"from": "gpt", "value": None}]},
        "odd": {"image": "a.jpg", "conversations": [{"from": "human"}, talk[1]]}, "bare": {"image": "a.jpg"}}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": name, **entry} for name, entry in entries.items()]))
    found = causes(open_source(path, tmp_path), tmp_path)
    assert found.pop(f"gone: {tmp_path / 'c.jpg'}") == "no_image"
    assert {name: cause for name, cause in found.items() if name.split()[0] in entries} == {
        "fine": None, "text": None, "greeted": None, "told": "roles", "ruled": "roles", "broken": "bad_image",
        "outside": "path_outside",
        "silent": "no_label", "unanswered has a question without an answer": "roles", "turned": "roles",
        "unmarked": "image_marks"}
    assert sorted(cause for name, cause in found.items() if name.split()[0] not in entries) == ["bad_entry"] * 3


def test_an_answer_behind_the_longest_sequence(tmp_path):
    """A sample whose targets are all cut off is bad"""
    text = Text(tiny.spm(tmp_path))
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": n, "conversations": [
        {"from": "human", "value": "red " * n}, {"from": "gpt", "value": "blue"}]} for n in (1, 500)]))
    builder = SampleBuilder(text, tiny.config(vocab_size=text.vocab_size, max_position_embeddings=300), 32, 800)
    dataset = SampleDataset([open_source(path)], builder)
    assert dataset[0, (0, 0)]["name"] == "1" and dataset[0, (0, 1)].args[:2] == ("no_label", "500")


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return open_source(path)


@pytest.mark.parametrize("files, words", [
    ({"json": b'{"caption": ["a cat", "a cat"]}'}, "a cat"), ({"json": b'{"caption": []}', "txt": b"a dog"}, "a dog"),
    ({"json": b'{"caption": ""}', "txt": b"a dog"}, "a dog"),
    ({"json": b'{"caption": null}', "txt": b"a dog"}, "a dog"),
    ({"txt": b"\xef\xbb\xbfa dog"}, "a dog"), ({"txt": "a dog".encode("utf-16")}, "a dog"),
    ({"json": b'\xef\xbb\xbf{"caption": "a dog"}'}, "a dog"), ({"caption.txt": b"a dog"}, "a dog"),
    *(({"json": b'{"caption": %s}' % value}, "no_caption")
      for value in (b"NaN", b"7", b"true", b'{"en": "a"}', b"[1]")),
    *(({"json": b'{"caption": %s}' % value, "txt": b"a dog"}, "a dog")
      for value in (b'" "', b'[""]', b"[null]", b'[" ", null]', b'"*#~"')),
    *(({"json": b'{"caption": %s}' % value, "txt": b"a dog"}, "no_caption") for value in (b"7", b"[1]", b"{}", b"0")),
    ({"json": b'{"caption": ["*", "a cat"]}'}, "a cat"),
    *(({"txt": text}, "no_caption") for text in (
        "großer Hund".encode("latin-1"), bytes(range(256)), picture(), "a dog".encode("utf-16-le"),
        "a dog".encode("utf-32"), "a dog".encode("utf-32-be"), b"\xff\xfea", b"a \xed\xa0\x80")),
    ({"json": b'[{"box": 1}]', "txt": b"a dog"}, "a dog"),                    # a file of something else
    ({"json": b"[" * 10 ** 5}, "bad_json"), ({"json": b'{"caption": %s}' % (b"1" * 5000)}, "bad_json")])
def test_captions_are_text(tmp_path, files, words):
    source = write_tar(tmp_path / "0.tar", {"0.jpg": picture(), **{f"0.{name}": file for name, file in files.items()}})
    text = Text(tiny.spm(tmp_path))
    builder = SampleBuilder(text, tiny.config(vocab_size=text.vocab_size, max_position_embeddings=800), 32, 800)
    sample = SampleDataset([source], builder)[0, list_shard([source], (0, 0))[0]]
    if isinstance(sample, BadSample):
        assert sample.args == (words, "0", str(tmp_path / "0.tar"))
    else:
        assert text.decode(sample["ids"][3:-1]) == words


def test_each_caption_of_a_list_is_learned(tmp_path):
    """One an epoch, by chance, the same in every run"""
    source = write_tar(tmp_path / "0.tar", {"0.jpg": picture(), "0.json": b'{"caption": ["a cat", "a dog", "red"]}'})
    text = Text(tiny.spm(tmp_path))
    builder = SampleBuilder(text, tiny.config(vocab_size=text.vocab_size, max_position_embeddings=800), 32, 800)
    dataset, place = SampleDataset([source], builder), list_shard([source], (0, 0))[0]
    ids = [dataset[epoch, place]["ids"] for epoch in range(30)]
    assert {text.decode(row[3:-1]) for row in ids} == {"a cat", "a dog", "red"}
    assert ids == [dataset[epoch, place]["ids"] for epoch in range(30)]


def test_pictures_behind_links(tmp_path):
    """The text of a path must stay in the folder; links may lead anywhere."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.jpg").write_bytes(picture())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/coco").symlink_to(tmp_path / "disk")
    talk = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "images/b.jpg").symlink_to(tmp_path / "disk/a.jpg")
    paths = {"coco/a.jpg": None, "../disk/a.jpg": "path_outside", str(tmp_path / "disk/a.jpg"): "path_outside",
             "coco/../coco/a.jpg": None, "b.jpg": None}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": name, "image": name, "conversations": talk} for name in paths]))
    assert causes(open_source(path, tmp_path / "images"), tmp_path) == paths


def test_other_media_are_named(tmp_path):
    def talk(question):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "a.jpg").write_bytes(picture())
    path = tmp_path / "chat.json"
    entries = [{"id": key, key: ["a.x"], "conversations": talk("what")}
               for key in ("video", "videos", "audio", "audios", "images")]
    entries += [{"id": question, "conversations": talk(question)}
                for question in ("<video>\nwhat", "what is in <video>?", "<audio>what", "say <speech> again")]
    path.write_text(json.dumps(entries))
    found = causes(open_source(path, tmp_path), tmp_path)
    assert len(found) == 9 and set(found.values()) == {"other_media"} and "images has images" in found
    entries = [{"id": "both", "image": "a.jpg", "images": ["a.jpg"], "conversations": talk("<image>what")},
               {"id": "none", "videos": [], "conversations": talk("what is a video?")},
               {"id": "html", "conversations": talk("<p>why</p><video> does not play")}]
    path.write_text(json.dumps(entries))
    assert causes(open_source(path, tmp_path), tmp_path) == dict.fromkeys(("both", "none", "html"))


def test_entries_without_a_caption_are_counted(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture())
    lists = [{"id": n, "image": "a.jpg", "caption": caption} for n, caption in enumerate((["a cat"], [], [" "], None))]
    karpathy = {"images": [{"filename": "a.jpg", "split": "train", "sentences": sentences}
                           for sentences in ([{"raw": "a cat"}], [])]}
    for value, expected in ((lists, [None, *["no_caption"] * 3]), (karpathy, [None, "no_caption"])):
        (tmp_path / "coco.json").write_text(json.dumps(value))
        source = open_source(tmp_path / "coco.json", tmp_path)
        text = Text(tiny.spm(tmp_path))
        builder = SampleBuilder(text, tiny.config(vocab_size=text.vocab_size, max_position_embeddings=800), 32, 800)
        dataset = SampleDataset([source], builder)
        samples = [dataset[0, place] for place in list_shard([source], (0, 0))]
        assert [sample.args[0] if isinstance(sample, BadSample) else None for sample in samples] == expected


def test_other_endings_and_names(tmp_path):
    """Compound endings as webdataset's, other picture formats, names that are not UTF-8"""
    files = {"0.input.jpg": picture(), "0.txt": b"a cat", "1.BMP": picture("BMP"), "1.txt": b"a cat",
             "\udce92.gif": picture("GIF"), "\udce92.txt": b"a cat", "3.mp4": b"x", "3.txt": b"a cat"}
    found = causes(write_tar(tmp_path / "0.tar", files, errors="surrogateescape"), tmp_path)
    assert found == {"0": None, "1": None, "\\xe92": None, "3 has mp4, txt": "no_image"}
    masked = write_tar(tmp_path / "1.tar", {"0.mask.jpg": picture(), "0.png": picture("PNG", 9), "0.txt": b"a cat"})
    _, _, (shown,) = read_sample(masked, list_shard([masked], (0, 0))[0])
    assert shown.size == (9, 9)                           # not the mask


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(tmp_path, form):
    """Long names, deep folders and folders themselves, against tarfile"""
    files = {"a/" * 30 + f"{n}.txt": b"x" * n for n in (0, 1, 511, 512, 513)}
    if form != tarfile.USTAR_FORMAT:
        files["n" * 300 + "é.txt"] = b"long"
    write_tar(tmp_path / "0.tar", files, format=form)
    with tarfile.open(tmp_path / "0.tar", "a", format=form) as tar:
        tar.add(tmp_path, "folder", recursive=False)
    with tarfile.open(tmp_path / "0.tar") as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    assert list_tar(tmp_path / "0.tar") == (expected, True)


def change_header(path, start, changes):
    """Write {place: bytes} into a header of a tar, with a checksum that fits"""
    content = bytearray(path.read_bytes())
    header = content[start:start + 512]
    for place, value in changes.items():
        header[place:place + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start:start + 512] = header
    path.write_bytes(content)


@pytest.mark.parametrize("place", [124, 386, 398, 483])
@pytest.mark.parametrize("field", [b"-0000000512", b"\x80" + bytes(3) + b"\x10" + bytes(7), b"\xff" * 12, b"9" * 11])
def test_sizes_that_cannot_be(tmp_path, field, place):
    """Negative, 2^60, no octal number as a member's size: read up to there. In the map of a GNU sparse member (386,
    398) or as its real size (483): passed over, as all of its kind are, or read up to there if it is no number."""
    path = tmp_path / "0.tar"
    write_tar(path, {"0.txt": b"a", "1.txt": b"a", "2.txt": b"a"})
    change_header(path, 1024, {place: field.ljust(12, b"\0"), 156: b"0" if place == 124 else b"S"})
    goes_on = place != 124 and field != b"9" * 11
    assert list_tar(path) == ([("0.txt", 512, 1)] + [("2.txt", 2560, 1)] * goes_on, goes_on)


def test_times_in_a_header_are_no_folder(tmp_path):
    """GNU's tar --incremental writes times where ustar has the folder of a long name."""
    path, long = tmp_path / "0.tar", "n" * 120 + ".txt"
    write_tar(path, {"0.jpg": b"a", long: b"b"}, format=tarfile.GNU_FORMAT)
    for start in (0, 1024, 2048):                         # a picture, a long name, its member
        change_header(path, start, {345: b"15000000000\0" * 2})
    assert [name for name, _, _ in list_tar(path)[0]] == ["0.jpg", long]


@pytest.mark.parametrize("pattern", ["x{0..99999999999}.tar", "x.tar@10000000000", "x.tar@" + "1" * 5000,
                                     "{0..999}{0..999}"])
def test_patterns_of_too_many_files(pattern):
    with pytest.raises(UserError, match="stands for more than 100,000 files"):
        expand_patterns([pattern])


def test_replaced_data_is_noticed(tmp_path):
    """Another file of the same name and length; but a moved one with the same content is the same."""
    def order(folder, state=None):
        return SampleOrder([open_source(folder / "0.tar"), open_source(folder / "a.json")], 0, state)
    for name, caption in (("one", "a cat"), ("two", "a cow"), ("three", "a cat")):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {"0.jpg": picture(), "0.txt": b"a cat"})
        (tmp_path / name / "a.json").write_text(json.dumps([{"image": "0.jpg", "caption": caption}]))
    state = order(tmp_path / "one").state
    assert order(tmp_path / "three", state).state == state
    with pytest.raises(UserError, match="other files in --data"):
        order(tmp_path / "two", state)
    write_tar(tmp_path / "three/0.tar", {"0.jpg": picture(), "0.txt": b"a dog"})
    with pytest.raises(UserError, match="other files in --data"):
        order(tmp_path / "three", state)


def test_tars_that_differ_in_their_middle_or_length(tmp_path):
    """A caption of a small one; everything but the ends of a large one; one sample less"""
    noise = np.random.default_rng(0).bytes(3 * 10 ** 6)

    def identity(folder, files):
        (tmp_path / folder).mkdir()
        return write_tar(tmp_path / folder / "0.tar", files).identity()
    small = {f"{n}.{ending}": content for n in range(30)
             for ending, content in (("jpg", noise[n * 9000:][:9000]), ("txt", b"a cat"))}
    large = {f"{n}.jpg": noise[n * 10 ** 5:][:10 ** 5] for n in range(30)}
    before = [identity("a", small), identity("b", large)]
    assert before == [identity("same a", small), identity("same b", large)]
    after = [identity("c", small | {"15.txt": b"a dog"}),
             identity("d", large | {f"{n}.jpg": noise[n * 10 ** 5:][10 ** 5:2 * 10 ** 5] for n in range(2, 28)})]
    assert [one[:2] for one in before] == [one[:2] for one in after]          # name and size
    del small["15.jpg"], small["15.txt"]
    assert len({json.dumps(one) for one in (*before, *after, identity("e", small))}) == 5


def test_entries_share_one_array(tmp_path):
    entries = [{"id": n, "image": f"{n}é.jpg", "conversations": []} for n in range(1000)]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False))
    found = open_source(path).entries
    assert [found[i] for i in range(len(found))] == entries and found.bytes.nbytes <= path.stat().st_size
    for text in ('[{"conversations": []} {}]', '[{"conversations": []}', '[{"conversations": [' * 10 ** 5):
        path.write_text(text)
        with pytest.raises(UserError, match="chat.json: not valid JSON"):
            open_source(path)
