"""The scoring rules: cases worked by hand, quirks included, and CIDEr-D against the public scorer."""
import math
import random
from itertools import combinations

import pytest
from pycocoevalcap.cider.cider import Cider

import scores
from scores import bracket_letter, cider, exact_letter, normalise, option_letter, scienceqa_letter, tidy, vqa_accuracy


@pytest.mark.parametrize("text, form", [
    ("The Cat.", "cat"), ("  two\ndogs\t", "2 dogs"), ("none", "0"), ("an apple, a pear", "apple pear"),
    ("t-shirt", "t shirt"), ("t- shirt", "t shirt"), ("t -shirt/blouse", "t shirt blouse"), ("(red)", "red"),
    ("it's", "it 's"), ("isnt", "isn't"), ("dont know", "don't know"), ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("somebody'd", "somebodyd"), ("im", "im"), ("oclock", "o'clock"),
    ("3.5", "3.5"), ("2.", "2"), ("u.s.", "us"), ("v.2", "v.2"), ("ten of 10", "10 of 10"), ("what?", "what"),
    ("1,000", "1000"), ("." * 40 + "x", "." * 8 + "x"), ("", ""), ("the", "")])
def test_normalise(text, form):
    assert normalise(text) == form


def test_tidy_alone():
    """Without normalise's first step, commas and 's stay for the rules about signs."""
    assert tidy("1,000 t-shirts") == "1000 tshirts"       # digit comma digit: every sign vanishes
    assert tidy("red,blue") == "red blue" and tidy("red, blue-green") == "red blue green"
    assert tidy("It's") == "it's" and tidy("A?b") == "b"


@pytest.mark.parametrize("same, worth", [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (10, 1)])
def test_vqa_accuracy(same, worth):
    truths = ["Red."] * same + [f"colour {i}" for i in range(10 - same)]
    assert vqa_accuracy("the red", truths) == pytest.approx(worth, abs=1e-12)
    for humans in (truths, truths[:3] + truths[7:]):      # with fewer of them too
        left = [sum(truth == "Red." for truth in others) for others in combinations(humans, len(humans) - 1)]
        expected = sum(min(1, n / 3) for n in left) / len(left)
        assert vqa_accuracy("red", humans) == pytest.approx(expected, abs=1e-12)


def test_vqa_accuracy_official():
    """The server leaves ten equal answers as they are, so that nothing normalised can match them."""
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
def test_words(caption, tokens):
    assert scores.words(caption) == tokens.split()


def test_cider_by_hand():
    """'a' is in both documents and weighs nothing, 'cat', 'dog' and the pairs weigh ln 2; n = 3 and 4 have nothing."""
    assert cider(["a cat", "A dog."], [["a cat"], ["a dog"]]) == pytest.approx([5, 5], abs=1e-12)
    assert cider(["a cat", ""], [["a cat", "a dog"], ["a fish"]])[1] == 0
    damped = (1 / 2 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)                 # clipped cat cat, one bigram more
    assert cider(["a cat cat", "a dog"], [["a cat"], ["a dog"]])[0] == pytest.approx(10 * damped, abs=1e-12)
    assert cider(["a cat"], [["a cat"]]) == [0]


def test_cider_public():
    """200 images of one to five references, texts of 0 to 14 words: each image's score within 1e-9"""
    rng = random.Random(0)
    vocabulary = ["a", "the", "man's", "dog", "can't", "cat,", "on", "red", "t-shirt", "and", ".", "2", "of", "(big)"]
    write = lambda: " ".join(rng.choice(vocabulary) for _ in range(rng.randint(0, 14)))
    references = [[write() for _ in range(rng.randint(1, 5))] for _ in range(200)]
    captions = [rng.choice([write(), rng.choice(texts), f"{texts[0]} {write()}"]) for texts in references]
    join = lambda caption: " ".join(scores.words(caption))
    mean, expected = Cider().compute_score({i: list(map(join, texts)) for i, texts in enumerate(references)},
                                           {i: [join(caption)] for i, caption in enumerate(captions)})
    found = cider(captions, references)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-9
    assert sum(found) / 200 == pytest.approx(mean, abs=1e-9) and mean > 1


@pytest.mark.parametrize("answer, said", [
    ("Yes", "yes"), ("no", "no"), ("No, there is not", "no"), ("There is not.", "no"), ("Sure. No.", "yes"),
    ("NO", "yes"), ("none", "yes"), ("no\nyes", "yes"), ("", "yes"), ("It isn't", "yes"), ("no,ne", "yes")])
def test_pope_says(answer, said):
    assert scores.pope_says(answer) == said


def test_pope():
    answers, truths = ["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"]
    assert scores.pope(answers, truths) == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes": 3 / 5})
    assert scores.pope(["no"] * 2, ["yes", "no"])["F1"] == 0
    assert scores.pope(["no"] * 2, ["no"] * 2) == {"accuracy": 1, "precision": 0, "recall": 0, "F1": 0, "yes": 0}


@pytest.mark.parametrize("answer, said", [
    ("Yes", "yes"), ("NO.", "no"), ("Yes, no", "yes"), ("not", "no"), ("know", "no"), ("eyes", "yes"), (" yes", "yes"),
    ("I say yes", None), ("", None), ("ye s", None)])
def test_mme_says(answer, said):
    assert scores.mme_says(answer) == said


def test_mme():
    """count: 3 of 4 right, one of two pictures wholly; OCR: all; code_reasoning: none, by one that says neither"""
    tasks = ["count"] * 4 + ["OCR"] * 2 + ["code_reasoning"] * 2
    truths = ["yes", "no"] * 4
    parts = scores.mme(["yes", "no", "yes", "yes", "Yes", "No", "no", "perhaps"], truths, tasks)
    assert parts == {"perception": 75 + 50 + 200, "cognition": 0, "count": 125, "count acc": .75, "count acc+": .5,
                     "OCR": 200, "OCR acc": 1, "OCR acc+": 1, "code_reasoning": 0, "code_reasoning acc": 0,
                     "code_reasoning acc+": 0}


CHOICES = {"A": "a dog", "B": "two dogs", "C": "Cat"}


@pytest.mark.parametrize("rule, answer, letter", [
    (option_letter, "B", "B"), (option_letter, "(B) two", "B"), (option_letter, "The answer is C.", "C"),
    (option_letter, "A or B", None), (option_letter, "A or B: two dogs", "B"), (option_letter, "b", None),
    (option_letter, "it is a CAT!", "C"), (option_letter, "a dog and a cat", None), (option_letter, "D", None),
    (option_letter, "A cat", "A"),                        # the article is taken for the letter
    (exact_letter, "B", "B"), (exact_letter, " B\n", "B"), (exact_letter, "B.", None), (exact_letter, "b", None),
    (scienceqa_letter, "B", "B"), (scienceqa_letter, "B. two dogs", "B"), (scienceqa_letter, "B.", None),
    (scienceqa_letter, "So. The answer is C.", "C"), (scienceqa_letter, "The answer is C", None),
    (scienceqa_letter, "The answer is Cats", "C"), (scienceqa_letter, "The answer is C. The answer is C.", None),
    (scienceqa_letter, "D", None), (scienceqa_letter, "E. The answer is A.", None), (scienceqa_letter, "", None)])
def test_letters(rule, answer, letter):
    assert rule(answer, CHOICES) == letter


@pytest.mark.parametrize("answer, letter", [
    ("(a)", "a"), ("(B) Closed", "b"), ("b", "b"), ("A.", "a"), ("a) open", "a"), ("It is open.", "a"),
    ("(a) or (b)", None), ("open or closed", None), ("A closed one", "b"), ("(c)", None), ("", None)])
def test_bracket_letter(answer, letter):
    assert bracket_letter(answer, {"a": "Open", "b": "Closed"}) == letter


def test_together():
    assert scores.together([True, True, False, True], [7, 3, 7, 3]) == {7: False, 3: True}
