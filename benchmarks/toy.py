"""The scoring rules of the toy world: questions by kind, captions by what they state."""
import re

from benchmarks.scores import gqa_match, score_each, summarize


def score_exact(items, answers):
    """Exact match, overall and by each part of question_type ('colour/2')"""
    items = [item | {"kinds": [part for kind in item["kinds"][-1:] for part in (kind, *kind.split("/"))]}
             for item in items]
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
    places = dict(described.split(" in the ")[:2] for described in truth if " in the " in described)
    if match[1] not in places or match[3] not in places:
        return False
    (row_a, column_a), (row_b, column_b) = places[match[1]].split(), places[match[3]].split()
    columns = (column_a, column_b) if row_a == row_b else None
    rows = (row_a, row_b) if column_a == column_b else None
    return {"left of": columns == ("left", "right"), "right of": columns == ("right", "left"),
            "above": rows == ("top", "bottom"), "below": rows == ("bottom", "top")}[match[2]]
