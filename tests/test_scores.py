"""The scoring rules: cases worked by hand, quirks included."""
import math
from itertools import combinations

import pytest

from benchmarks import scores
from benchmarks.scores import (
    caption_tokens,
    cider,
    mmbench_letter,
    mme_label,
    mmvp_letter,
    normalise,
    pope_label,
    scienceqa_letter,
    score_choices,
    score_mme,
    score_pope,
    seed_letter,
    server_normalise,
    vqa_accuracy,
)
from benchmarks.toy import is_true, score_exact, score_statements


@pytest.mark.parametrize("text, form", [
    ("The Cat.", "cat"), ("  two\ndogs\t", "2 dogs"), ("none", "0"), ("an apple, a pear", "apple pear"),
    ("t-shirt", "t shirt"), ("t- shirt", "t shirt"), ("t -shirt/blouse", "t shirt blouse"), ("(red)", "red"),
    ("it's", "it 's"), ("isnt", "isn't"), ("dont know", "don't know"), ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("somebody'd", "somebodyd"), ("im", "im"), ("oclock", "o'clock"),
    ("3.5", "3.5"), ("2.", "2"), ("u.s.", "us"), ("v.2", "v.2"), ("ten of 10", "10 of 10"), ("what?", "what"),
    ("1,000", "1000"), ("." * 40 + "x", "." * 8 + "x"), ("", ""), ("the", "")])
def test_normalise(text, form):
    assert normalise(text) == form


def test_server_normalise():
    """Without normalise's first step, the rules about signs also see commas and 's."""
    assert server_normalise("1,000 t-shirts") == "1000 tshirts"               # digit comma digit: all signs are deleted
    assert server_normalise("red,blue") == "red blue" and server_normalise("red, blue-green") == "red blue green"
    assert server_normalise("It's") == "it's" and server_normalise("A?b") == "b"


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (10, 1)])
def test_vqa_accuracy(matches, accuracy):
    truths = ["Red."] * matches + [f"colour {i}" for i in range(10 - matches)]
    assert vqa_accuracy("the red", truths) == pytest.approx(accuracy, abs=1e-12)
    for humans in (truths, truths[:3] + truths[7:]):      # ten humans, and fewer
        counts = [sum(truth == "Red." for truth in others) for others in combinations(humans, len(humans) - 1)]
        expected = sum(min(1, n / 3) for n in counts) / len(counts)
        assert vqa_accuracy("red", humans) == pytest.approx(expected, abs=1e-12)


def test_vqa_accuracy_official():
    """The server does not normalise ten equal answers, so a normalised prediction may not match them."""
    assert vqa_accuracy("Dr. Pepper", ["Dr. Pepper"] * 10, official=True) == 0
    assert vqa_accuracy("Dr. Pepper", ["Dr. Pepper"] * 10) == 1
    assert vqa_accuracy("Dr. Pepper", ["Dr. Pepper"] * 9 + ["coke"], official=True) == 1
    assert vqa_accuracy("Yes", ["yes "] * 10, official=True) == 1


def test_gqa():
    assert scores.gqa_match(" Yes.", "yes") and scores.gqa_match("left", "Left")
    assert not scores.gqa_match("the left", "left") and not scores.gqa_match("yes, it is", "yes")


@pytest.mark.parametrize("caption, tokens", [
    ("A man's dog, it isn't \"small\".", "a man 's dog it is n't small"),
    ("Black-and-white t-shirt -- $3.50!", "black-and-white t-shirt $ 3.50"),
    ("They can't; we cannot...", "they ca n't we can not"), ("it’s the dogs’ bowl", "it 's the dogs bowl"),
    ("at 10:30 a.m. in the U.S.", "at 10:30 a.m. in the u.s."), ("1,000 o'clock & 5%", "1,000 o'clock & 5 %"),
    ("“gonna” (go) — now…", "gon na ( go ) now"), ("", ""), ("- . -", "")])
def test_caption_tokens(caption, tokens):
    assert caption_tokens(caption) == tokens.split()


def test_cider_by_hand():
    """'a' is in both documents and has weight 0; 'cat', 'dog' and the bigrams have ln 2; there is no longer n-gram."""
    assert cider(["a cat", "A dog."], [["a cat"], ["a dog"]]) == pytest.approx([5, 5], abs=1e-12)
    assert cider(["a cat", ""], [["a cat", "a dog"], ["a fish"]])[1] == 0
    damped = (1 / 2 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)                 # clipped cat cat, one bigram more
    assert cider(["a cat cat", "a dog"], [["a cat"], ["a dog"]])[0] == pytest.approx(10 * damped, abs=1e-12)
    assert cider(["a cat"], [["a cat"]]) == [0]


@pytest.mark.parametrize("answer, label", [
    ("Yes", "yes"), ("no", "no"), ("No, there is not", "no"), ("There is not.", "no"), ("Sure. No.", "yes"),
    ("NO", "yes"), ("none", "yes"), ("no\nyes", "yes"), ("", "yes"), ("It isn't", "yes"), ("no,ne", "yes")])
def test_pope_label(answer, label):
    assert pope_label(answer) == label


def with_truths(truths, kinds=None):
    return [{"truth": truth, "kinds": [kind]} for truth, kind in zip(truths, kinds or truths)]


def test_pope():
    result = score_pope(with_truths(["yes", "yes", "no", "yes", "no"]), ["yes", "yes", "yes", "no", "no"])
    assert result["parts"] == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes": 3 / 5})
    assert result["score"] == result["parts"]["F1"]
    assert score_pope(with_truths(["yes", "no"]), ["no"] * 2)["score"] == 0
    assert score_pope(with_truths(["no", "no"]), ["no"] * 2)["parts"] == {
        "accuracy": 1, "precision": 0, "recall": 0, "F1": 0, "yes": 0}


@pytest.mark.parametrize("answer, label", [
    ("Yes", "yes"), ("NO.", "no"), ("Yes, no", "yes"), ("not", "no"), ("know", "no"), ("eyes", "yes"), (" yes", "yes"),
    ("I say yes", None), ("", None), ("ye s", None)])
def test_mme_label(answer, label):
    assert mme_label(answer) == label


def test_mme():
    """count: 3 of 4 right, and both for one of two pictures; OCR: all right; code_reasoning: none, one unparsed"""
    items = with_truths(["yes", "no"] * 4, ["count"] * 4 + ["OCR"] * 2 + ["code_reasoning"] * 2)
    result = score_mme(items, ["yes", "no", "yes", "yes", "Yes", "No", "no", "perhaps"])
    assert result["parts"] == {
        "perception": 75 + 50 + 200, "cognition": 0, "count": 125, "count acc": .75, "count acc+": .5, "OCR": 200,
        "OCR acc": 1, "OCR acc+": 1, "code_reasoning": 0, "code_reasoning acc": 0, "code_reasoning acc+": 0}
    assert result["score"] == 75 + 50 + 200 and result["unparsed"] == 1


CHOICES = {"A": "a dog", "B": "two dogs", "C": "Cat"}


@pytest.mark.parametrize("rule, answer, letter", [
    (mmbench_letter, "B", "B"), (mmbench_letter, "(B) two", "B"), (mmbench_letter, "The answer is C.", "C"),
    (mmbench_letter, "A or B", None), (mmbench_letter, "A or B: two dogs", "B"), (mmbench_letter, "b", None),
    (mmbench_letter, "it is a CAT!", "C"), (mmbench_letter, "a dog and a cat", None), (mmbench_letter, "D", None),
    (mmbench_letter, "A cat", "A"),                        # the article is taken for the letter
    (seed_letter, "B", "B"), (seed_letter, " B\n", "B"), (seed_letter, "B.", None), (seed_letter, "b", None),
    (scienceqa_letter, "B", "B"), (scienceqa_letter, "B. two dogs", "B"), (scienceqa_letter, "B.", None),
    (scienceqa_letter, "So. The answer is C.", "C"), (scienceqa_letter, "The answer is C", None),
    (scienceqa_letter, "The answer is Cats", "C"), (scienceqa_letter, "The answer is C. The answer is C.", None),
    (scienceqa_letter, "D", None), (scienceqa_letter, "E. The answer is A.", None), (scienceqa_letter, "", None)])
def test_letters(rule, answer, letter):
    assert rule(answer, CHOICES) == letter


@pytest.mark.parametrize("answer, letter", [
    ("(a)", "a"), ("(B) Closed", "b"), ("b", "b"), ("A.", "a"), ("a) open", "a"), ("It is open.", "a"),
    ("(a) or (b)", None), ("open or closed", None), ("A closed one", "b"), ("(c)", None), ("", None)])
def test_mmvp_letter(answer, letter):
    assert mmvp_letter(answer, {"a": "Open", "b": "Closed"}) == letter


def test_groups_of_choices():
    """A group is right if all its members are"""
    items = [{"choices": CHOICES, "truth": "A", "kinds": [kind], "group": group}
             for group, kind in ((7, "x"), (3, "y"), (7, "x"), (3, "y"))]
    assert score_choices("pairs", seed_letter, items, ["A", "A", "?", "A"]) == {
        "score": .5, "metric": "pairs", "unparsed": 1, "parts": {"x": 0, "y": 1, "each": .75}}


# ---------------------------------------------------------------- the toy world's rules

def test_odd_truths():
    """Annotations without types, captions that are not the toy world's"""
    assert score_exact([{"truth": ["red"] * 10, "kinds": []}], ["red"])["score"] == 1
    items = [{"truth": ["two dogs on a lawn"], "kinds": []}]
    assert score_statements(items, ["a small red circle left of a large blue square"])["score"] == 0


def test_exact():
    items = [{"truth": [truth] * 10, "kinds": ["other", kind]} for truth, kind in
             (("red", "colour/1"), ("two", "count/2"), ("blue", "colour/2"))]
    result = score_exact(items, ["Red.", "two", "green"])
    assert result["score"] == 2 / 3 and result["parts"] == {
        "colour/1": 1, "count/2": 1, "colour/2": 0, "colour": .5, "count": 1, "1": 1, "2": .5}


TRUTH = ["a large red circle in the top left", "a small blue square in the top right",
         "a small green triangle in the bottom left"]


@pytest.mark.parametrize("statement, truth", [
    (TRUTH[0], True), ("a small red circle in the top left", False), ("a large red circle", False), ("", False),
    ("a large red circle left of a small blue square", True), ("a small blue square right of a large red circle", True),
    ("a small blue square left of a large red circle", False), ("a large red circle above a small blue square", False),
    ("a large red circle above a small green triangle", True),
    ("a small green triangle below a large red circle", True),
    ("a small blue square above a small green triangle", False),              # neither in one row nor in one column
    ("a large red circle left of a large red square", False)])
def test_statements_about_places(statement, truth):
    assert is_true(statement, TRUTH) == truth


def test_statements():
    items = [{"truth": [" and ".join(TRUTH)], "kinds": []}] * 3
    result = score_statements(items, [" and ".join(TRUTH[::-1]), TRUTH[1], f"{TRUTH[0]} and a small red circle"])
    assert result["score"] == 2 / 3
