"""The toy world: its answers against a second count on the 2 x 2 grid, its detector against the scenes it rendered."""
from itertools import islice

import numpy as np
import pytest

from toy import world
from toy.report import read_log

PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.mark.parametrize("short_names", [0, 1])
def test_answers_about_objects(short_names):
    """A question names exactly one object of the scene; existence is true if at least one has the name"""
    random = np.random.default_rng(0)
    for scene in islice(world.scenes(random, "train"), 300):
        def named(words, scene=scene):
            return [obj for obj in scene if set(words.split()) - {"object"} <= set(obj[1:3])]
        for kind, pairs in world.questions(scene, random, short_names).items():
            for question, answer in pairs:
                if kind == "exist":
                    assert answer == ("yes" if named(question[11:-1]) else "no"), question
                elif kind in ("colour", "shape", "size"):
                    obj, = named(question.split(" the ")[1].removesuffix("?"))
                    assert answer == obj[("size", "colour", "shape").index(kind)], question
                elif kind == "count":
                    assert answer == world.NUMBERS[len(scene)]


@pytest.mark.parametrize("kind", ["relation", "where", "what"])
def test_answers_about_places(kind):
    random, covered = np.random.default_rng(0), set()
    for scene in islice(world.scenes(random, "held out"), 400):
        grid = {divmod(cell, 2): f"a {colour} {shape}" for _, colour, shape, cell in scene}
        for question, answer in world.questions(scene, random)[kind]:
            if kind == "what":
                place = PLACES[question.removeprefix("What is in the ").removesuffix("?")]
            else:
                name = "a " + question.split(" the ")[1].removesuffix("?")
                place, = (place for place, content in grid.items() if content == name)
            if kind == "where":
                assert PLACES[answer] == place
                continue
            side = next((side for side in STEPS if f" {side} " in question), None)
            if side:
                place = place[0] + STEPS[side][0], place[1] + STEPS[side][1]
            assert answer == grid.get(place, "nothing"), question
            covered.add((side, answer == "nothing"))
    assert kind == "where" or len(covered) == {"relation": 8, "what": 2}[kind]


def test_detector():
    """It finds all objects of nearly all rendered scenes, calls noise unclear, and an empty picture clean"""
    random = np.random.default_rng(0)
    scenes = list(islice(world.scenes(random, "train"), 100))
    right = 0
    for scene in scenes:
        expected = [world.CLEAN] * 4
        for *attributes, cell in scene:
            expected[cell] = tuple(attributes)
        right += world.detect(world.render(scene, random)) == expected
    assert right >= 99
    assert world.detect(np.zeros((56, 56, 3), np.uint8)) == [world.CLEAN] * 4
    assert world.detect(random.integers(0, 256, (56, 56, 3), np.uint8)) == [world.UNCLEAR] * 4


def test_splits_share_no_composition():
    train, held_out = ({frozenset(obj[:3] for obj in scene)
                        for scene in islice(world.scenes(np.random.default_rng(0), split), 500)}
                       for split in ("train", "held out"))
    assert not train & held_out and not any(obj[1:] in world.UNSEEN for scene in train | held_out for obj in scene)


def test_broken_lines_of_a_log_are_left_out(tmp_path):
    """A kill or a full disk cuts a line, and the resumed run writes behind it; a power failure leaves zeros."""
    path = tmp_path / "log.jsonl"
    broken = '{"step": 2, "lo{"step": 3}', "\0\0", "5", "[1]", "[" * 10 ** 5, ""
    again = '{"step": 1, "loss": 9}', '{"step": 1, "loss": 2.5}'            # killed, and made again
    path.write_text("\n".join([*again, *broken, '{"step": 4}', '{"step"']))
    assert read_log(path) == [{"step": 1, "loss": 2.5}, {"step": 4}]
