"""Files as users have them: shuffled, in part, in other forms of JSON, without answers, damaged. A perfect answerer
scores full marks in each."""
import json
import os
import random
import sys

import pytest
import tiny
from PIL import Image
from test_benchmarks import FILES, MMBENCH, MMVP, PICTURE, POPE, SEED, humans, paths, save, tsv

import evaluate
from benchmarks.files import TASKS, read, score, write
from benchmarks.scores import average, caption_tokens, cider
from common.cli import explain
from common.entries import read_prompts, with_answer
from common.pictures import open_image
from common.weights import UserError
from generate import encode_prompts

ORDERS = {"as it is": lambda entries, rng: entries, "shuffled": lambda entries, rng: rng.sample(entries, len(entries)),
          "in part": lambda entries, rng: rng.sample(entries, len(entries))[:5]}
N = 8
ANSWER = ["red", "2", "dog", "left", "blue", "green", "circle", "9"]
CHOICES = {"choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four"}


def entries_of(task):
    """-> N entries of the task's file, numbered from 1, whose right answers differ; a function from entries to files"""
    numbers = range(1, N + 1)
    ten = {n: humans(*[ANSWER[n - 1]] * 10) for n in numbers}
    if task in ("vqav2", "okvqa"):
        truths = [{"question_id": n, "answer_type": "x", "answers": ten[n]} for n in reversed(numbers)]
        return ([{"question_id": n, "image_id": n, "question": f"{n}?"} for n in numbers],
                lambda entries: [{"questions": entries}, {"annotations": truths}])
    if task == "vizwiz":
        return [{"image": f"{n}.jpg", "question": f"{n}?", "answers": ten[n]} for n in numbers], lambda e: [e]
    if task == "textvqa":
        return ([{"image_id": str(n), "question": f"{n}?", "answers": [ANSWER[n - 1]] * 10} for n in numbers],
                lambda entries: [{"data": entries}])
    if task == "gqa":
        return ([(str(n), {"question": f"{n}?", "imageId": str(n), "answer": ANSWER[n - 1]}) for n in numbers],
                lambda entries: [dict(entries)])
    if task == "pope":
        return ([{"question_id": n, "image": f"{n}.jpg", "text": f"{n}?", "label": "yes" if n % 2 else "no"}
                 for n in numbers], lambda entries: ["\n".join(map(json.dumps, entries))])
    if task == "scienceqa":
        return ([(str(n), {"question": f"{n}?", "choices": ["p", "q", "r"], "answer": n % 3, "hint": "",
                           "image": "image.png", "split": "test"}) for n in numbers], lambda entries: [dict(entries)])
    if task == "nocaps":
        captions = [{"image_id": n, "id": n, "caption": f"a {ANSWER[n - 1]} {n} is here"} for n in numbers]
        return ([{"id": n, "file_name": f"{n}.jpg", "domain": "x"} for n in numbers],
                lambda entries: [{"images": entries, "annotations": captions}])
    if task == "flickr30k":
        return ([{"filename": f"{n}.jpg", "imgid": n, "split": "test",
                  "sentences": [{"raw": f"a {ANSWER[n - 1]} {n} is here"}]} for n in numbers],
                lambda entries: [{"images": entries}])
    if task == "coco":
        return [{"image": f"{n}.jpg", "caption": [f"a {ANSWER[n - 1]} {n} is here"]} for n in numbers], lambda e: [e]
    if task == "seed":
        return ([{"question_id": str(n), "question_type_id": 1, "data_type": "image", "data_id": str(n),
                  "question": f"{n}?", "answer": "ABCD"[n % 4], **CHOICES} for n in numbers],
                lambda entries: [SEED | {"questions": entries}])
    if task in ("mmbench", "mmbench-cn"):
        return ([MMBENCH[0] | {"index": n, "answer": "ABC"[n % 3], "image": PICTURE} for n in numbers],
                lambda entries: [tsv(entries)])
    if task == "mmvp":
        rows = [f'{n},"{n}?",(a) Open (b) Closed,({"ab"[n % 2]})' for n in numbers]
        return rows, lambda entries: ["\n".join([MMVP.split("\n")[0], *entries])]
    raise KeyError(task)


def perfect(item):
    return item["truth"][0] if isinstance(item["truth"], list) else item["truth"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("task", [task for task in FILES if task != "mm-vet"])
def test_a_perfect_answerer(tmp_path, task, order):
    entries, contents = entries_of(task)
    files = [save(tmp_path / f"{i}.file", value)
             for i, value in enumerate(contents(ORDERS[order](entries, random.Random(3))))]
    for n in range(1, N + 1):
        for name in (f"{n}.jpg", f"{n}/image.png", f"{n:012d}.jpg"):
            save(tmp_path / "images" / name, "")
    items = read(task, tmp_path / "images", *files)
    result = score(task, items, [perfect(item) for item in items])
    assert result["score"] == pytest.approx(10 if "caption" in TASKS[task].prompt else 1)
    assert all(value == pytest.approx(result["score"]) for name, value in result["parts"].items() if name != "yes")
    if task == "mmvp":                                    # the picture and the pair follow from the index
        numbers = [int(item["question"].split("?")[0]) for item in items]
        assert [int(item["image"].stem) for item in items] == [item["id"] for item in items] == numbers
        assert [item["group"] for item in items] == [(n - 1) // 2 for n in numbers]


@pytest.mark.parametrize("limit", [None, 3])
def test_a_perfect_answerer_of_mme(tmp_path, limit):
    for task, stem in (("count", "a"), ("count", "b"), ("code_reasoning", "c")):
        save(tmp_path / task / f"{stem}.jpg", "")
        save(tmp_path / task / f"{stem}.txt", "Is it?\tYes\nIs it so?\tNo\n")
    items = read("mme", tmp_path, tmp_path)[:limit]
    assert score("mme", items, [item["truth"] for item in items])["score"] == 200
    assert score("mme", items[::-1], [item["truth"] for item in items[::-1]])["score"] == 200


def test_mmvp_needs_its_index(tmp_path):
    images, _ = paths(tmp_path, "mmvp")
    rows = read("mmvp", images, save(tmp_path / "q.csv", MMVP.replace("Index", "lndex")))     # as published
    assert [item["id"] for item in rows] == [1, 2]
    with pytest.raises(UserError, match="line 2: expected Question, Options .* Index"):
        read("mmvp", images, save(tmp_path / "q.csv", "Question,Options,Correct Answer\n?,(a) x (b) y,(a)\n"))


LISTS = {"vqav2": lambda value: value["questions"], "textvqa": lambda value: value["data"], "vizwiz": lambda v: v,
         "coco": lambda value: value, "pope": lambda value: POPE, "seed": lambda value: value["questions"]}


@pytest.mark.parametrize("task", LISTS)
def test_lists_and_lines(tmp_path, task):
    """The same items from a list, from JSON lines and from the published form; a file may have one line"""
    images, file, *rest = paths(tmp_path, task)
    entries = LISTS[task](FILES[task])
    lines = "".join(json.dumps(entry) + "\n\n" for entry in entries)
    for value in (entries, lines):
        items = read(task, images, save(tmp_path / "other", value), *rest)
        assert [item["question"] for item in items] == [item["question"] for item in read(task, images, file, *rest)]
    assert len(read(task, images, save(tmp_path / "one", json.dumps(entries[0])), *rest)) == 1
    with pytest.raises(UserError, match="line 3: expected"):
        read(task, images, save(tmp_path / "other", json.dumps(entries[0]) + "\n\n[5]\n"), *rest)


WITHOUT = {"vqav2": None, "gqa": "answer", "vizwiz": "answers", "textvqa": "answers", "scienceqa": "answer",
           "nocaps": "annotations", "flickr30k": "sentences", "coco": "caption", "pope": "label", "mmbench": "answer",
           "seed": "answer"}


def without(value, name):
    if isinstance(value, dict):
        return {key: without(inner, name) for key, inner in value.items() if key != name}
    return [without(inner, name) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("task", [*WITHOUT, "mmvp", "mme", "mm-vet"])
def test_without_answers(tmp_path, task):
    """Test files have none: nothing is scored, the submission is written"""
    if task == "mme":
        save(tmp_path / "count" / "a.txt", "Is it?\nIs it so?\n")
        save(tmp_path / "count" / "a.jpg", "")
        given = [tmp_path, tmp_path]
    else:
        images, file, *_ = paths(tmp_path, task)
        value = (POPE if task == "pope" else FILES[task])
        if task == "mmbench":
            value = tsv(without(MMBENCH, "answer"))
        elif task == "mmvp":
            value = "\n".join(line.rsplit(",", 1)[0] for line in MMVP.split("\n"))
        elif task == "flickr30k":
            value = {"images": [{"file_name": "9.jpg", "id": 3}]}
        else:
            value = without(value, WITHOUT.get(task))
        given = [images, save(file, value)]
    items = read(task, *given)
    assert score(task, items, ["x"] * len(items))["score"] is None
    write(task, tmp_path / "submission", items, ["x"] * len(items))
    assert (tmp_path / "submission").exists()


def test_captions_in_rows(tmp_path):
    """Several captions of a picture, each in a row of its own: one item"""
    images, _ = paths(tmp_path, "coco")
    image = FILES["coco"][0]["image"]
    rows = [{"image": image, "image_id": 42, "caption": caption} for caption in ("a b", "c d")]
    item, = read("coco", images, save(tmp_path / "rows.json", rows))
    assert item["id"] == 42 and item["truth"] == ["a b", "c d"]


def test_seed_without_its_videos(tmp_path, capsys):
    images, file = paths(tmp_path, "seed")
    (images / "SEED-Bench-video-image/10_v8.png").unlink()
    item, = read("seed", images, file)
    assert item["id"] == "7" and score("seed", [item], ["B"])["parts"] == {"Scene Understanding": 1, "image": 1}
    assert "1 questions about videos are left out" in capsys.readouterr().err
    more = SEED["questions"] + [SEED["questions"][1] | {"question_id": "v9"}]
    save(images / "SEED-Bench-video-image/10_v9.png", "")
    with pytest.raises(UserError, match="10_v8: no such picture"):
        read("seed", images, save(file, SEED | {"questions": more}))


@pytest.mark.parametrize("task", [task for task in FILES if not task.startswith("mmbench") and task != "mmvp"])
def test_pictures_outside_the_folder(tmp_path, task):
    """Names that leave the folder are refused, links are followed"""
    if task in ("vqav2", "okvqa"):                        # numbers
        return
    images, file = paths(tmp_path, task)
    text = file.read_text()
    names = {"gqa": "n77", "textvqa": "0f", "seed": "12_34", "vizwiz": "VizWiz_val_00000000.jpg", "nocaps": "0a.jpg",
             "scienceqa": "image.png", "mm-vet": "v1_0.png", "flickr30k": "9.jpg", "coco": FILES["coco"][0]["image"],
             "pope": POPE[0]["image"]}
    for outside in ("../../../outside.jpg", str(tmp_path / "outside.jpg")):
        if task in ("scienceqa", "flickr30k") and outside.startswith("/"):
            continue                                      # a folder stands before the name: it cannot lead out
        save(tmp_path / "outside.jpg", "")
        assert names[task] in text
        save(file, text.replace(names[task], outside))
        with pytest.raises(UserError, match="leads out of the folder"):
            read(task, images, file)
    save(file, text)
    (tmp_path / "linked").symlink_to(images)
    assert read(task, tmp_path / "linked", file)


def test_several_files_are_counted_together():
    results = [{"score": 1.0, "metric": "F1", "parts": {"a": 1}, "unparsed": 1, "answered": 3, "cut": 1, "seconds": 2,
                "answers": [{"id": 1, "answer": "yes"}]},                     # of one file: they stand under `files`
               {"score": 0.5, "metric": "F1", "parts": {"a": 0}, "unparsed": 2, "answered": 5, "cut": 0, "seconds": 1}]
    assert average(results) == {"score": .75, "metric": "F1", "parts": {"a": .5}, "unparsed": 3, "answered": 8,
                                "cut": 1, "seconds": 3}
    assert average([results[0], results[1] | {"score": None, "parts": {}}])["score"] is None


def test_captions_without_words():
    with pytest.raises(UserError, match="none of the captions in --data has a word"):
        cider(["a cat", "a dog"], [["."], [""]])
    assert cider(["a cat", "a dog"], [["a cat"], ["."]])[1] == 0


@pytest.mark.parametrize("caption, tokens", [           # of the public scorer's tokenizer
    ("a black/white cat and/or dog", "a black/white cat and/or dog"), ("an AT&T sign", "an at&t sign"),
    ("salt&pepper & oil", "salt & pepper & oil"), ("a cat 😀 here", "a cat here"), ("a cat😀dog ❤️", "a cat dog ❤"),
    ("get 'em, y'all!", "get 'em y' all"), ("Y'all're here", "y' all 're here"), ("rock'n'roll", "rock 'n' roll"),
    ("'tis the '90s", "'t is the '90s"), ("Mr. Smith on Main St.", "mr. smith on main st."),
    ("red-and-white/blue", "red-and-white/blue"), ("1/2 of w/ it", "1/2 of w / it"), ("don't/do", "do n't / do")])
def test_tokens_as_the_public_scorer(caption, tokens):
    assert caption_tokens(caption) == tokens.split()


@pytest.mark.parametrize("words, minutes", [([], 7 * 24 * 60), (["--timeout", "30"], 30)])
def test_processes_may_end_hours_apart(tmp_path, monkeypatch, words, minutes):
    given = {}
    images, file = paths(tmp_path, "gqa")
    words = ["evaluate.py", "--task", "gqa", "--data", str(file), "--images", str(images), *words]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(evaluate.engine, "init_distributed", lambda device, **more: given.update(more) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main()
    assert given["timeout"] == minutes


def test_a_pipe_without_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for reader in (lambda: read_prompts(tmp_path / "pipe"), lambda: read("mmvp", tmp_path, tmp_path / "pipe"),
                   lambda: read("gqa", tmp_path, tmp_path / "pipe"), lambda: open_image(tmp_path / "pipe"),
                   lambda: open_image(str(tmp_path / "pipe"))):
        with pytest.raises(UserError, match="pipe: is a folder or a device, expected a file"):
            reader()


@pytest.mark.parametrize("content", ["5", "null", '{"n": [1], "answer": "x"}', '{"task": "x"}', "[" * 99999 + "\n5"])
def test_kept_answers_of_something_else(tmp_path, content):
    save(tmp_path / "k.json.0.0.jsonl", content)
    for name in ("k.json.notes.jsonl", "k.json.0.notes.jsonl", "k.json.00.jsonl.bak", "k_json.0.0.jsonl"):
        save(tmp_path / name, "mine")
    assert evaluate.kept_files(tmp_path / "k.json.0") == [tmp_path / "k.json.0.0.jsonl"]
    with pytest.raises(UserError, match="k.json.0.0.jsonl holds answers to .* remove it"):
        evaluate.read_kept(tmp_path / "k.json.0", {"task": "gqa"})


def test_answers_are_kept_for_the_same_question_and_picture(tmp_path):
    settings, path = {"task": "gqa", "prompt": None}, tmp_path / "k.json.0"
    images, file = paths(tmp_path, "gqa", {str(n): {"question": f"{n} \ud800?", "imageId": "n77"} for n in range(4)})
    items, asked = read("gqa", images, file), []

    def answers(missing):
        for n in reversed(range(len(missing))):           # they may end in any order
            asked.append(missing[n])
            yield n, f"answer {len(asked)}", True
    first = evaluate.answer_all(answers, items, evaluate.ONE_PROCESS, path, settings)
    assert first == [(f"answer {n}", True) for n in (4, 3, 2, 1)]
    assert evaluate.answer_all(answers, items, evaluate.ONE_PROCESS, path, settings) == first and len(asked) == 4
    items[1]["question"] = "edited"
    assert evaluate.answer_all(answers, items, evaluate.ONE_PROCESS, path, settings)[1] == ("answer 5", True)
    save(images / "n77.jpg", "another picture")
    evaluate.answer_all(answers, items, evaluate.ONE_PROCESS, path, settings)
    assert len(asked) == 4 + 1 + 4


def test_full_disks_are_named(tmp_path, monkeypatch):
    """Of a submission in lines or in cells, and of the kept answers"""
    images, file = paths(tmp_path, "gqa")
    items = read("gqa", images, file)
    items = [item | {"original": "", "choices": {}} for item in items]
    kept = tmp_path / "k.0.jsonl"
    kept.symlink_to("/dev/full")
    monkeypatch.setattr(evaluate, "read_kept", lambda *_: {})                 # it would read zeros for ever
    for path, job in (
            ("/dev/full", lambda: write("seed", "/dev/full", items, ["yes"] * len(items))),
            ("/dev/full", lambda: write("mmbench", "/dev/full", items, ["yes"] * len(items))),
            (kept, lambda: evaluate.answer_all(iter, [], evaluate.ONE_PROCESS, tmp_path / "k", {"task": ""}))):
        with pytest.raises(OSError) as full:
            job()
        assert explain(full.value) == (f"error: {path}: No space left on device", 2)


def test_answers_that_are_cut_are_counted(tmp_path):
    """The positions end within one of two answers."""
    model = tiny.whole(tmp_path)
    model.lm_head.weight.data[model.tokenizers.text.eos] = 0                  # never the likeliest
    Image.new("RGB", (40, 30), "red").save(tmp_path / "7.jpg")
    words = "What?", "What colour is the large square in the top left of it?"
    file = save(tmp_path / "q.json", {str(n): {"question": question, "imageId": "7", "answer": "red"}
                                      for n, question in enumerate(words)})
    prompts, _ = encode_prompts(model, [(item["question"], [item["image"]]) for item in read("gqa", tmp_path, file)])
    model.config.max_position_embeddings = max(map(len, prompts)) + 3
    result = evaluate.evaluate(model, "gqa", [file], tmp_path, max_new_tokens=5)
    assert (result["answered"], result["cut"]) == (2, 1)
    assert evaluate.evaluate(model, "gqa", [file], tmp_path, max_new_tokens=2)["cut"] == 0


def test_a_fingerprint_follows_the_weights(tmp_path):
    model = tiny.whole(tmp_path)
    before = evaluate.fingerprint(model)
    assert before == evaluate.fingerprint(model)
    for weight in (model.lm_head.weight, model.tokenizers.image.quant_conv.weight):
        weight.data.flatten()[0] += 1e-3
        assert evaluate.fingerprint(model) != before
        before = evaluate.fingerprint(model)


def test_prompts(tmp_path):
    """A list or lines; what a line has stays; lone surrogates can be written"""
    lines = [{"question": "a?", "answer": "gold", "id": "\ud800"}, {"question": "b?", "image": None}]
    for value in (lines, "\n".join(map(json.dumps, lines))):
        assert [entry for _, entry in read_prompts(save(tmp_path / "prompts", value))] == lines
    assert with_answer(lines[0], "x") == {"question": "a?", "answer": "x", "id": "\ud800", "given_answer": "gold"}
    assert with_answer(with_answer(lines[0], "x"), "y")["given_given_answer"] == "x"
    items = [{"id": "\ud800", "question": "", "truth": None}]
    for task in ("gqa", "seed", "mm-vet"):
        write(task, tmp_path / "out", items, ["yes"])
        assert "\ud800" in json.dumps(json.loads((tmp_path / "out").read_text()), ensure_ascii=False)
