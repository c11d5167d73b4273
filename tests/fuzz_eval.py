"""Random damage to the files that evaluate.py and generate.py read. CASES: {name: function(rng, folder)}; each call
writes one damaged file and reads it. Only a UserError may come of it; anything else is a fault."""
import copy
import json
import random
from contextlib import suppress

from test_benchmarks import ANNOTATIONS, FILES, PICTURES, save

from benchmarks.files import read, score, write
from common.entries import read_prompts, with_answer
from common.weights import UserError
from evaluate import kept_files, read_kept, what_is_asked

VALUES = [None, True, 0, -1, 5, 10 ** 20, 1.5, float("inf"), float("nan"), "", "x", "yes", "../x", "/etc/hosts",
          "a\x00b", "\ud800", "\u2028", "5" * 300, [], [[]], {}, {"a": 1}, [None], ["x"], "1", "🙂"]
RAW = ["", " ", "\n", "[", "{", "}", "]", ",", ":", "null", "\t", "\r", "\x00", "\ufeff", "9" * 5000, "[" * 5000, '"',
       "NaN", "{}", "[]", "5", "\\ud800", "\u2028", "é"]


def damage_value(rng, value):
    """One place of a nest of lists and dicts replaced, deleted, doubled or given another name"""
    inner, place = value, None
    while isinstance(inner, (dict, list)) and inner and (place is None or rng.random() < 0.8):
        holder, place = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = holder[place]
    if place is None:
        return
    kind = rng.randrange(5)
    if kind == 0:
        del holder[place]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(place, copy.deepcopy(holder[place]))
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\ud800", "../y"])] = holder.pop(place)
    else:
        holder[place] = copy.deepcopy(rng.choice(VALUES))


def damage_text(rng, text):
    """Cut, something put in, a piece doubled or taken out"""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return rng.choice([text[:start], text[:start] + rng.choice(RAW) + text[start:], text[:end] + text[start:],
                       text[:start] + text[end:]])


def damaged(rng, value):
    """-> the bytes of a file: a value (or a text) with some damage"""
    value = copy.deepcopy(value)
    if not isinstance(value, str):
        for _ in range(rng.randrange(3)):
            damage_value(rng, value)
        lists = [inner for inner in value.values() if isinstance(inner, list)] if isinstance(value, dict) else [value]
        if rng.random() < 0.2 and lists and lists[0]:     # as JSON lines
            value = "\n".join(json.dumps(entry) for entry in lists[0])
        else:
            value = json.dumps(value)
    for _ in range(rng.randrange(3)):
        value = damage_text(rng, value)
    data = value.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and data:                       # no UTF-8
        place = rng.randrange(len(data))
        data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1:]
    return data


def benchmark(task):
    def case(rng, folder):
        for picture in PICTURES[task]:
            save(folder / "images" / picture, "")
        (folder / "file").write_bytes(damaged(rng, FILES[task]))
        files = [folder / "file"]
        if task in ("vqav2", "okvqa"):
            (folder / "annotations").write_bytes(damaged(rng, ANNOTATIONS))
            files += [folder / "annotations"] * rng.randrange(2)
        with suppress(UserError):
            items = read(task, folder / "images", *files)
            answers = [rng.choice(["yes", "A", "", "\ud800", "a cat.", str(item["truth"])]) for item in items]
            write(task, folder / "submission", items, answers)
            score(task, items, answers)
            json.dumps([what_is_asked(item) for item in items])
    return case


def mme(rng, folder):
    save(folder / "mme/count/a.jpg", "")
    (folder / "mme/count/a.txt").write_bytes(damaged(rng, "Is it? Please answer yes or no.\tYes\nIs it so?\tNo\n"))
    with suppress(UserError):
        items = read("mme", folder / "mme", folder / "mme")
        score("mme", items, ["yes"] * len(items))
        write("mme", folder / "submissions", items, ["\ud800 no"] * len(items))


def prompts(rng, folder):
    lines = [{"question": "a?", "answer": "x"}, {"question": "b?", "image": str(folder / "prompts")}]
    text = lines if rng.random() < 0.5 else "\n".join(map(json.dumps, lines))
    (folder / "prompts").write_bytes(damaged(rng, text))
    with suppress(UserError):
        for _, entry in read_prompts(folder / "prompts"):
            text = json.dumps(with_answer(entry, "y"), ensure_ascii=False)
            assert json.loads(text.encode("utf-8", "backslashreplace"))["answer"] == "y"


def kept_answers(rng, folder):
    settings = {"task": "gqa", "data": ["x"], "prompt": None, "limit": 0}
    entry = {"question": "a?", "picture": "p", "answer": "b", "cut": False}
    lines = [copy.deepcopy(value) for value in (settings, entry, entry, settings, entry)]
    for _ in range(rng.randrange(3)):
        damage_value(rng, lines)
    (folder / "k.json.0.0.jsonl").write_bytes(damaged(rng, "\n".join(map(json.dumps, lines))))
    assert len(kept_files(folder / "k.json.0")) == 1
    with suppress(UserError):
        for (question, picture), (answer, cut) in read_kept(folder / "k.json.0", settings).items():
            assert isinstance(question + picture + answer, str) and isinstance(cut, bool)


def by_numpy(case):
    """The driver's generator is numpy's."""
    return lambda rng, folder: case(random.Random(int(rng.integers(2 ** 62))), folder)


CASES = {name: by_numpy(case) for name, case in {
    **{f"benchmark {task}": benchmark(task) for task in FILES}, "benchmark mme": mme, "prompts": prompts,
    "kept answers": kept_answers}.items()}
