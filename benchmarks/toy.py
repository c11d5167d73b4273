"""The scoring rules of the toy world: questions by kind, captions by what they state."""
import re

from benchmarks.scores import gqa_match, score_each, summarize
from toy.world import PLACES, relation_of


def score_exact(items, answers):
    """Exact match, overall and by each part of question_type ('colour/2')"""
    items = [item | {"kinds": [item["kinds"][-1], *item["kinds"][-1].split("/")]} for item in items]
    return score_each("exact match", lambda answer, truths: gqa_match(answer, truths[0]), items, answers)


def score_statements(items, answers):
    """The share of captions whose statements, separated by 'and', are all true"""
    truths = [item["truth"][0].split(" and ") for item in items]
    captions = [[statement.strip() for statement in answer.split(" and ")] for answer in answers]
    true = [float(all(is_true(statement, truth) for statement in caption)) for caption, truth in zip(captions, truths)]
    return summarize("captions wholly true", items, true)


def is_true(statement, truth):
    """An object with its place, as in the truth: a list of such; or 'A left of B' if their places are so"""
    match = re.fullmatch(r"(a \w+ \w+ \w+) (left of|right of|above|below) (a \w+ \w+ \w+)", statement)
    if not match:
        return statement in truth
    cells = {words: PLACES.index(place) for words, place in (described.split(" in the ") for described in truth)}
    return match[1] in cells and match[3] in cells and relation_of(cells[match[1]], cells[match[3]]) == match[2]
