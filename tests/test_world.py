"""The toy world's right answers, against a plain look at the two by two grid."""
from itertools import islice

import numpy as np
import pytest

import world

PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.mark.parametrize("brief", [0, 1])
def test_answers_about_things(brief):
    """How many of the scene's things are called so: one that is asked about, none that is not there"""
    draw = np.random.default_rng(0)
    for scene in islice(world.scenes(draw, "train"), 300):
        def called(words, scene=scene):
            return [thing for thing in scene if set(words.split()) - {"object"} <= set(thing[1:3])]
        for kind, asked in world.questions(scene, draw, brief).items():
            for question, answer in asked:
                if kind == "exist":
                    assert answer == ("yes" if called(question[11:-1]) else "no"), question
                elif kind in ("colour", "shape", "size"):
                    thing, = called(question.split(" the ")[1].removesuffix("?"))
                    assert answer == thing[("size", "colour", "shape").index(kind)], question
                elif kind == "count":
                    assert answer == world.NUMBERS[len(scene)]


@pytest.mark.parametrize("kind", ["relation", "where", "what"])
def test_answers_about_places(kind):
    draw, seen = np.random.default_rng(0), set()
    for scene in islice(world.scenes(draw, "held out"), 400):
        grid = {divmod(cell, 2): f"a {colour} {shape}" for _, colour, shape, cell in scene}
        for question, answer in world.questions(scene, draw)[kind]:
            if kind == "what":
                at = PLACES[question.removeprefix("What is in the ").removesuffix("?")]
            else:
                thing = "a " + question.split(" the ")[1].removesuffix("?")
                at, = (place for place, name in grid.items() if name == thing)
            if kind == "where":
                assert PLACES[answer] == at
                continue
            side = next((side for side in STEPS if f" {side} " in question), None)
            if side:
                at = at[0] + STEPS[side][0], at[1] + STEPS[side][1]
            assert answer == grid.get(at, "nothing"), question
            seen.add((side, answer == "nothing"))
    assert kind == "where" or len(seen) == {"relation": 8, "what": 2}[kind]
