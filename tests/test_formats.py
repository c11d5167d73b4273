"""200 questions of the toy world in the format of each benchmark that test_benchmarks.py does not count: read,
answered (about half of them right), scored, and compared with a plain count from the world itself."""
import itertools
import random

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from test_benchmarks import humans, save

from benchmarks.files import read, score
from benchmarks.scores import caption_tokens
from toy import world

COUNT = 200
RNG = random.Random(5)


def toy_questions(kinds=world.KINDS):
    """-> COUNT (question, answer, kind)"""
    rng, chosen = np.random.default_rng(5), []
    for scene in world.scenes(rng, "held out"):
        of_scene = world.questions(scene, rng)
        kind = kinds[len(chosen) % len(kinds)]
        if of_scene[kind]:
            chosen.append((*of_scene[kind][0], kind))
        if len(chosen) == COUNT:
            return chosen


def draw_answers(truths, words):
    """-> COUNT answers, each right or another one of the words, and which are right"""
    right = [RNG.random() < 0.5 for _ in truths]
    return [truth if hit else RNG.choice([word for word in words if word != truth])
            for truth, hit in zip(truths, right)], right


WORDS = sorted({answer for _, answer, _ in toy_questions()})


def shares(right, kinds):
    return {kind: sum(hit for hit, k in zip(right, kinds) if k == kind) / kinds.count(kind) for kind in set(kinds)}


def test_gqa(tmp_path):
    questions = toy_questions()
    file = {str(n): {"question": question, "imageId": "a", "answer": answer,
                     "types": {"structural": kind, "semantic": None}}
            for n, (question, answer, kind) in enumerate(questions)}
    save(tmp_path / "a.jpg", "")
    answers, right = draw_answers([answer for _, answer, _ in questions], WORDS)
    answers = [f"{answer.title()}." for answer in answers]                    # the rule ignores case and a last period
    result = score("gqa", read("gqa", tmp_path, save(tmp_path / "gqa.json", file)), answers)
    assert result["score"] == sum(right) / COUNT
    assert {kind: pytest.approx(value) for kind, value in result["parts"].items()} == shares(
        right, [kind for _, _, kind in questions])


@pytest.mark.parametrize("task", ["okvqa", "vizwiz", "textvqa"])
def test_ten_humans(tmp_path, task):
    """0 to 10 of ten humans give the right answer"""
    questions, counts = toy_questions(), [RNG.randrange(11) for _ in range(COUNT)]
    truths = [[answer] * n + ["something else"] * (10 - n) for (_, answer, _), n in zip(questions, counts)]
    save(tmp_path / "COCO_val2014_000000000001.jpg", "")
    save(tmp_path / "a.jpg", "")
    if task == "okvqa":
        files = [save(tmp_path / "q.json", {"questions": [{"question_id": n, "image_id": 1, "question": question}
                                                          for n, (question, _, _) in enumerate(questions)]}),
                 save(tmp_path / "a.json", {"annotations": [{"question_id": n, "answers": humans(*texts)}
                                                            for n, texts in enumerate(truths)]})]
    elif task == "vizwiz":
        files = [save(tmp_path / "v.json", [{"image": "a.jpg", "question": question, "answers": humans(*texts)}
                                            for (question, _, _), texts in zip(questions, truths)])]
    else:
        files = [save(tmp_path / "t.json", {"data": [{"image_id": "a", "question": question, "answers": texts}
                                                     for (question, _, _), texts in zip(questions, truths)]})]
    answers, right = draw_answers([answer for _, answer, _ in questions], WORDS)

    def accuracy(n):                                      # of an answer that n of ten humans gave
        return (n * min(1, max(0, n - 1) / 3) + (10 - n) * min(1, n / 3)) / 10
    result = score(task, read(task, tmp_path, *files), answers)
    expected = sum(accuracy(n) for n, hit in zip(counts, right) if hit) / COUNT
    assert result["score"] == pytest.approx(expected, abs=1e-12) and 0 < expected < 1


def test_scienceqa(tmp_path):
    entries, truths = {}, []
    for n, (question, answer, _) in enumerate(toy_questions(("shape",))):
        choices = RNG.sample(world.SHAPES, 3)
        entries[str(n)] = {"question": question, "choices": choices, "answer": choices.index(answer), "hint": "",
                           "image": "image.png", "split": "test"}
        truths.append("ABC"[choices.index(answer)])
        save(tmp_path / f"test/{n}/image.png", "")
    answers, right = draw_answers(truths, "ABC")
    forms = ["{}", "{}. as seen", "The answer is {}."]
    answers = [RNG.choice(forms).format(letter) for letter in answers]
    result = score("scienceqa", read("scienceqa", tmp_path, save(tmp_path / "p.json", entries)), answers)
    assert result["score"] == sum(right) / COUNT and result["unparsed"] == 0


def test_seed(tmp_path):
    questions, entries, truths = toy_questions(("colour", "size")), [], []
    for n, (question, answer, kind) in enumerate(questions):
        others = [word for word in (*world.COLOURS, *world.SIZES) if word != answer]
        choices = RNG.sample([answer, *RNG.sample(others, 3)], 4)
        truths.append("ABCD"[choices.index(answer)])
        entries.append({"question_id": str(n), "question_type_id": {"colour": 1, "size": 2}[kind], "data_type": "image",
                        "data_id": "a", "question": question, "answer": truths[-1],
                        **{f"choice_{letter}": choice for letter, choice in zip("abcd", choices)}})
    save(tmp_path / "SEED-Bench-image/a", "")
    answers, right = draw_answers(truths, "ABCD")
    unparsed = [RNG.random() < 0.1 for _ in answers]      # SEED takes the letter and nothing else
    answers = [f"{letter}." if bad else letter for letter, bad in zip(answers, unparsed)]
    right = [hit and not bad for hit, bad in zip(right, unparsed)]
    file = save(tmp_path / "seed.json", {"question_type": {"Colours": 1, "Sizes": 2}, "questions": entries})
    result = score("seed", read("seed", tmp_path, file), answers)
    assert result["score"] == sum(right) / COUNT and result["unparsed"] == sum(unparsed)
    kinds = shares(right, [{"colour": "Colours", "size": "Sizes"}[kind] for _, _, kind in questions])
    assert all(result["parts"][kind] == pytest.approx(value) for kind, value in kinds.items())


def test_mme(tmp_path):
    """100 pictures of two tasks, each with a question whose answer is yes and one whose answer is no"""
    questions, half = toy_questions(("exist",)), COUNT // 2
    for n, task in zip(range(half), itertools.cycle(["color", "code_reasoning"])):
        lines = [f"{question} Please answer yes or no.\t{label}"
                 for (question, _, _), label in zip(questions[2 * n:2 * n + 2], ["Yes", "No"])]
        save(tmp_path / task / f"{n:03d}.txt", "\n".join(lines) + "\n")
        save(tmp_path / task / f"{n:03d}.jpg", "")
    items = read("mme", tmp_path, tmp_path)               # all of color, then all of code_reasoning
    answers, right = draw_answers(["yes", "no"] * half, ["yes", "no", "I see none"])
    result = score("mme", items, [word.title() for word in answers])
    for task, hits in (("color", right[:half]), ("code_reasoning", right[half:])):
        both = sum(a and b for a, b in zip(hits[::2], hits[1::2])) / (half / 2)
        assert result["parts"][task] == pytest.approx(100 * sum(hits) / half + 100 * both)
    assert result["parts"]["perception"] == result["parts"]["color"] == result["score"]
    assert result["parts"]["cognition"] == result["parts"]["code_reasoning"]
    assert result["unparsed"] == answers.count("I see none")


def test_mmvp(tmp_path):
    """A pair is right if both of its questions are"""
    lines, truths = ["Index,Question,Options,Correct Answer"], []
    for n, (question, answer, _) in enumerate(toy_questions(("size",)), 1):
        truths.append("ab"[list(world.SIZES).index(answer)])
        lines.append(f'{n},"{question}",(a) small (b) large,({truths[-1]})')
        save(tmp_path / f"{n}.jpg", "")
    answers, right = draw_answers(truths, "ab")
    result = score("mmvp", read("mmvp", tmp_path, save(tmp_path / "q.csv", "\n".join(lines) + "\n")),
                   [f"({letter})" for letter in answers])
    assert result["score"] == sum(a and b for a, b in zip(right[::2], right[1::2])) / (COUNT / 2)
    assert result["parts"]["each"] == sum(right) / COUNT


@pytest.mark.parametrize("task", ["nocaps", "coco", "flickr30k"])
def test_captions(tmp_path, task):
    """Two captions for each picture; the score is the public scorer's on the captions of the toy world itself"""
    scenes = list(itertools.islice(world.scenes(np.random.default_rng(6), "held out"), COUNT))
    references = [[world.full_caption(scene), "a picture with " + world.full_caption(scene)] for scene in scenes]
    names = [f"{n:03d}.jpg" for n in range(COUNT)]
    for name in names:
        save(tmp_path / name, "")
    file = {"coco": [{"image": name, "caption": texts} for name, texts in zip(names, references)],
            "flickr30k": {"images": [{"filename": name, "imgid": n, "split": "test",
                                      "sentences": [{"raw": text} for text in texts]}
                                     for n, (name, texts) in enumerate(zip(names, references))]},
            "nocaps": {"images": [{"id": n, "file_name": name, "domain": "in-domain"} for n, name in enumerate(names)],
                       "annotations": [{"image_id": n, "caption": text} for n, texts in enumerate(references)
                                       for text in texts]}}[task]
    answers = [world.full_caption(scenes[(n + RNG.randrange(2)) % COUNT]) for n in range(COUNT)]
    result = score(task, read(task, tmp_path, save(tmp_path / "file.json", file)), answers)
    tokenized = [{n: [" ".join(caption_tokens(text)) for text in texts] for n, texts in enumerate(group)}
                 for group in (references, [[text] for text in answers])]
    expected, _ = Cider().compute_score(*tokenized)
    assert result["score"] == pytest.approx(expected, rel=1e-9) and expected > 1
