"""Two hundred questions of the toy world in the format of each benchmark that test_benchmarks.py does not count:
read, answered (rightly about half of the time), and scored as a second, plain count from the world itself says."""
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from test_benchmarks import humans, save

import world
from benchmarks import read, score
from scores import words

COUNT = 200
RNG = random.Random(5)


def asked(kinds=world.KINDS):
    """-> COUNT (question, answer, kind, scene)"""
    draw, found = np.random.default_rng(5), []
    for scene in world.scenes(draw, "held out"):
        some = world.questions(scene, draw)
        kind = kinds[len(found) % len(kinds)]
        if some[kind]:
            found.append((*some[kind][0], kind, scene))
        if len(found) == COUNT:
            return found


def answers(truths, others):
    """-> COUNT answers, right or else one of the others, and which are right"""
    right = [RNG.random() < 0.5 for _ in truths]
    return [truth if hit else RNG.choice([word for word in others if word != truth])
            for truth, hit in zip(truths, right)], right


WORDS = sorted({answer for _, answer, _, _ in asked()})


def shares(right, kinds):
    return {kind: sum(hit for hit, k in zip(right, kinds) if k == kind) / kinds.count(kind) for kind in set(kinds)}


def test_gqa(tmp_path):
    found = asked()
    file = {str(n): {"question": question, "imageId": "a", "answer": answer,
                     "types": {"structural": kind, "semantic": None}}
            for n, (question, answer, kind, _) in enumerate(found)}
    save(tmp_path / "a.jpg", "")
    said, right = answers([answer for _, answer, _, _ in found], WORDS)
    said = [f"{word.title()}." for word in said]          # the rule takes no notice of either
    result = score("gqa", read("gqa", tmp_path, save(tmp_path / "gqa.json", file)), said)
    assert result["score"] == sum(right) / COUNT
    assert {kind: pytest.approx(value) for kind, value in result["parts"].items()} == shares(
        right, [kind for _, _, kind, _ in found])


@pytest.mark.parametrize("task", ["okvqa", "vizwiz", "textvqa"])
def test_ten_humans(tmp_path, task):
    """Each truth is said by 0 to 10 of ten humans; leaving one out, three that agree are enough"""
    found, many = asked(), [RNG.randrange(11) for _ in range(COUNT)]
    told = [[answer] * n + ["something else"] * (10 - n) for (_, answer, _, _), n in zip(found, many)]
    save(tmp_path / "COCO_val2014_000000000001.jpg", "")
    save(tmp_path / "a.jpg", "")
    if task == "okvqa":
        files = [save(tmp_path / "q.json", {"questions": [{"question_id": n, "image_id": 1, "question": question}
                                                          for n, (question, _, _, _) in enumerate(found)]}),
                 save(tmp_path / "a.json", {"annotations": [{"question_id": n, "answers": humans(*texts)}
                                                            for n, texts in enumerate(told)]})]
    elif task == "vizwiz":
        files = [save(tmp_path / "v.json", [{"image": "a.jpg", "question": question, "answers": humans(*texts)}
                                            for (question, _, _, _), texts in zip(found, told)])]
    else:
        files = [save(tmp_path / "t.json", {"data": [{"image_id": "a", "question": question, "answers": texts}
                                                     for (question, _, _, _), texts in zip(found, told)]})]
    said, right = answers([answer for _, answer, _, _ in found], WORDS)

    def worth(n):                                         # by hand: n of ten humans agree with what was said
        return (n * min(1, max(0, n - 1) / 3) + (10 - n) * min(1, n / 3)) / 10
    result = score(task, read(task, tmp_path, *files), said)
    expected = sum(worth(n) for n, hit in zip(many, right) if hit) / COUNT
    assert result["score"] == pytest.approx(expected, abs=1e-12) and 0 < expected < 1


def test_scienceqa(tmp_path):
    found, entries, truths = asked(("shape",)), {}, []
    for n, (question, answer, _, _) in enumerate(found):
        choices = RNG.sample(world.SHAPES, 3)
        entries[str(n)] = {"question": question, "choices": choices, "answer": choices.index(answer), "hint": "",
                           "image": "image.png", "split": "test"}
        truths.append("ABC"[choices.index(answer)])
        save(tmp_path / f"test/{n}/image.png", "")
    said, right = answers(truths, "ABC")
    forms = ["{}", "{}. as seen", "The answer is {}."]
    said = [RNG.choice(forms).format(letter) for letter in said]
    result = score("scienceqa", read("scienceqa", tmp_path, save(tmp_path / "p.json", entries)), said)
    assert result["score"] == sum(right) / COUNT and result["unparsed"] == 0


def test_seed(tmp_path):
    found, entries, truths = asked(("colour", "size")), [], []
    for n, (question, answer, kind, _) in enumerate(found):
        others = [word for word in (*world.COLOURS, *world.SIZES) if word != answer]
        choices = RNG.sample([answer, *RNG.sample(others, 3)], 4)
        truths.append("ABCD"[choices.index(answer)])
        entries.append({"question_id": str(n), "question_type_id": {"colour": 1, "size": 2}[kind], "data_type": "image",
                        "data_id": "a", "question": question, "answer": truths[-1],
                        **{f"choice_{letter}": choice for letter, choice in zip("abcd", choices)}})
    save(tmp_path / "SEED-Bench-image/a", "")
    said, right = answers(truths, "ABCD")
    spoilt = [RNG.random() < 0.1 for _ in said]           # SEED takes the letter and nothing else
    said = [f"{letter}." if bad else letter for letter, bad in zip(said, spoilt)]
    right = [hit and not bad for hit, bad in zip(right, spoilt)]
    file = save(tmp_path / "seed.json", {"question_type": {"Colours": 1, "Sizes": 2}, "questions": entries})
    result = score("seed", read("seed", tmp_path, file), said)
    assert result["score"] == sum(right) / COUNT and result["unparsed"] == sum(spoilt)
    kinds = shares(right, [{"colour": "Colours", "size": "Sizes"}[kind] for _, _, kind, _ in found])
    assert all(result["parts"][kind] == pytest.approx(value) for kind, value in kinds.items())


def test_mme(tmp_path):
    """100 pictures of two tasks, a question with yes and one with no about each"""
    found, truths = asked(("exist",)), []
    for n, task in zip(range(COUNT // 2), itertools.cycle(["color", "code_reasoning"])):
        lines = [f"{found[2 * n + i][0]} Please answer yes or no.\t{label}" for i, label in enumerate(["Yes", "No"])]
        save(tmp_path / task / f"{n:03d}.txt", "\n".join(lines) + "\n")
        save(tmp_path / task / f"{n:03d}.jpg", "")
    items = read("mme", tmp_path, tmp_path)
    truths = ["yes", "no"] * (COUNT // 2)                 # of color first, then of code_reasoning
    said, right = answers(truths, ["yes", "no", "I see none"])
    result = score("mme", items, [word.title() for word in said])
    half = COUNT // 2
    for task, some in (("color", right[:half]), ("code_reasoning", right[half:])):
        both = sum(a and b for a, b in zip(some[::2], some[1::2])) / (half / 2)
        assert result["parts"][task] == pytest.approx(100 * sum(some) / half + 100 * both)
    assert result["parts"]["perception"] == result["parts"]["color"] == result["score"]
    assert result["parts"]["cognition"] == result["parts"]["code_reasoning"]
    assert result["unparsed"] == said.count("I see none")


def test_mmvp(tmp_path):
    """A pair counts when both of its questions are right"""
    lines, truths = ["Index,Question,Options,Correct Answer"], []
    for n, (question, answer, _, _) in enumerate(asked(("size",)), 1):
        truths.append("ab"[list(world.SIZES).index(answer)])
        lines.append(f'{n},"{question}",(a) small (b) large,({truths[-1]})')
        save(tmp_path / f"{n}.jpg", "")
    said, right = answers(truths, "ab")
    result = score("mmvp", read("mmvp", tmp_path, save(tmp_path / "q.csv", "\n".join(lines) + "\n")),
                   [f"({letter})" for letter in said])
    assert result["score"] == sum(a and b for a, b in zip(right[::2], right[1::2])) / (COUNT / 2)
    assert result["parts"]["each"] == sum(right) / COUNT


@pytest.mark.parametrize("task", ["nocaps", "coco", "flickr30k"])
def test_captions(tmp_path, task):
    """Two captions a picture, CIDEr-D as the public scorer gives it on the same tokens"""
    draw = np.random.default_rng(6)
    scenes = [scene for scene, _ in zip(world.scenes(draw, "held out"), range(COUNT))]
    told = [[world.full_caption(scene), "a picture with " + world.full_caption(scene)] for scene in scenes]
    names = [f"{n:03d}.jpg" for n in range(COUNT)]
    for name in names:
        save(tmp_path / name, "")
    file = {"coco": [{"image": name, "caption": texts} for name, texts in zip(names, told)],
            "flickr30k": {"images": [{"filename": name, "imgid": n, "split": "test",
                                      "sentences": [{"raw": text} for text in texts]}
                                     for n, (name, texts) in enumerate(zip(names, told))]},
            "nocaps": {"images": [{"id": n, "file_name": name, "domain": "in-domain"} for n, name in enumerate(names)],
                       "annotations": [{"image_id": n, "caption": text} for n, texts in enumerate(told)
                                       for text in texts]}}[task]
    said = [world.full_caption(scenes[(n + RNG.randrange(2)) % COUNT]) for n in range(COUNT)]
    result = score(task, read(task, tmp_path, save(tmp_path / "file.json", json.loads(json.dumps(file)))), said)
    spoken = [{n: [" ".join(words(text)) for text in texts] for n, texts in enumerate(group)}
              for group in (told, [[text] for text in said])]
    theirs, _ = Cider().compute_score(*spoken)
    assert result["score"] == pytest.approx(theirs, rel=1e-9) and Counter(said)
