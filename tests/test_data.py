"""Reading: every sample exactly once an epoch whoever reads on, and every way in which a sample can be unusable."""
import io
import json
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image

from common.weights import UserError
from data import (
    BadSample,
    RankBatchSampler,
    SampleBuilder,
    SampleDataset,
    SampleOrder,
    expand_patterns,
    list_shard,
    open_source,
    open_sources,
)
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


def picture(form="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 90, dtype=np.uint8)).save(file, form)
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
    assert [tuple(pair) for pair in dataset.collate(samples).listed] == bad
    return dict.fromkeys(s["name"] for s in samples if isinstance(s, dict)) | {name: cause for cause, name in bad}


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
    expected = {"0": None, "1": "bad_image", "2": "no_image", "3": "bad_json", "4": "no_caption", "5": "bad_image",
                "6": None}
    assert causes(open_source(path), tmp_path) == expected | {"7": None}
    with tarfile.open(path) as tar:
        at = tar.getmember("7.jpg").offset_data
    path.write_bytes(path.read_bytes()[:at + 100])        # in the middle of a picture
    found = causes(open_source(path), tmp_path)
    assert found.pop(f"{path} (cut off)") == "cut_tar" and found.pop("7") in ("bad_image", "no_caption")
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
        "null": {"image": "a.jpg", "conversations": [talk[0], {"from": "gpt", "value": None}]},
        "odd": {"image": "a.jpg", "conversations": [{"from": "human"}, talk[1]]}, "bare": {"image": "a.jpg"}}
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": name, **entry} for name, entry in entries.items()]))
    found = causes(open_source(path, tmp_path), tmp_path)
    assert found.pop(f"gone: {tmp_path / 'c.jpg'}") == "no_image"
    assert {name: cause for name, cause in found.items() if name in entries} == {
        "fine": None, "text": None, "broken": "bad_image", "outside": "path_outside",
        "silent": "no_label", "unanswered": "image_marks", "turned": "roles", "unmarked": "image_marks"}
    assert sorted(cause for name, cause in found.items() if name not in entries) == ["bad_entry"] * 3


def test_an_answer_behind_the_longest_sequence(tmp_path):
    """A sample whose targets are all cut off is bad"""
    text = Text(tiny.spm(tmp_path))
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"id": n, "conversations": [
        {"from": "human", "value": "red " * n}, {"from": "gpt", "value": "blue"}]} for n in (1, 500)]))
    builder = SampleBuilder(text, tiny.config(vocab_size=text.vocab_size, max_position_embeddings=300), 32, 800)
    dataset = SampleDataset([open_source(path)], builder)
    assert dataset[0, (0, 0)]["name"] == "1" and dataset[0, (0, 1)].args == ("no_label", "500")
