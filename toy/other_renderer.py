"""Ten pictures like the toy world's by another renderer, Pillow's drawing functions, with questions; written by hand.

    python -m toy.other_renderer --out runs/toy/foreign        # pictures, questions and annotations as VQAv2's

The model has learned from pictures that world.py renders. Right answers here show that it has not learned only one
renderer. The last two pictures show pairs of colour and shape that training never does.
"""
import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from common.cli import TOY, Help, run
from toy.make import write_vqa

SIDE, SCALE = 56, 4                                       # pixels; objects are drawn 4 times as large, then scaled down
RADIUS = {"small": 6 * SCALE, "large": 11 * SCALE}
COLOURS = {"red": "#d8362c", "green": "#35b04a", "blue": "#3f5de0", "yellow": "#e8d038", "purple": "#a04acb"}
SCENES = (   # objects with their centre (x, y), two questions with answers
    ("large red circle 14 14", "What colour is the circle? red", "Is there a red square? no"),
    ("small blue triangle 42 41",
     "What shape is the blue object? triangle", "Where is the blue triangle? bottom right"),
    ("large yellow square 41 14, small red triangle 14 42",
     "How large is the red triangle? small", "How many objects are there? two"),
    ("small green circle 15 14, large purple circle 42 14",
     "What is left of the purple circle? a green circle", "Is there a green circle? yes"),
    ("large green square 14 41, large blue circle 14 13",
     "What is above the green square? a blue circle", "What colour is the square? green"),
    ("small yellow circle 42 42, small purple triangle 42 14",
     "What is in the top right? a purple triangle", "What shape is the yellow object? circle"),
    ("large red square 14 14, small green circle 41 15, large yellow triangle 14 42",
     "How many objects are there? three", "Where is the yellow triangle? bottom left"),
    ("small blue square 43 14, large red triangle 14 42, small yellow circle 42 42",
     "What colour is the triangle? red", "How large is the blue square? small"),
    ("large purple square 14 14", "What colour is the square? purple", "What shape is the purple object? square"),
    ("small green triangle 14 42, large blue circle 42 42",
     "How large is the blue circle? large", "Is there a blue square? no"))


def render(objects, seed):
    """-> a 56 x 56 picture: dark noise, and the objects with smooth edges"""
    generator = random.Random(seed)
    level = generator.randint(10, 30)
    greys = [max(0, round(generator.gauss(level, 5))) for _ in range(SIDE * SIDE)]
    picture = Image.new("RGB", (SIDE, SIDE))
    picture.putdata([(grey, grey, grey) for grey in greys])
    for size, colour, shape, *centre in map(str.split, objects):
        mask = Image.new("L", (SIDE * SCALE, SIDE * SCALE))
        pen, r, (x, y) = ImageDraw.Draw(mask), RADIUS[size], (int(value) * SCALE for value in centre)
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        elif shape == "square":
            pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=255)
        else:
            pen.polygon([(x, y - r), (x - 0.94 * r, y + 0.87 * r), (x + 0.94 * r, y + 0.87 * r)], fill=255)
        picture.paste(COLOURS[colour], mask=mask.resize((SIDE, SIDE), Image.Resampling.BOX))
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", type=Path, default=TOY / "foreign", help="folder")
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for image, (line, *pairs) in enumerate(SCENES):
        objects = line.split(", ")
        render(objects, image).save(args.out / "images" / f"{image:012d}.png")
        for question, answer in (pair.split("? ") for pair in pairs):
            entries.append((len(entries), image, f"foreign/{len(objects)}", question + "?", answer))
    write_vqa(f"{args.out}/", entries)
    print(f"{len(SCENES)} pictures, {len(entries)} questions in {args.out}")


if __name__ == "__main__":
    run(main)
