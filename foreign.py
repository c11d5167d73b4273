"""Ten pictures of the toy world's kind by another hand: Pillow's brushes, scenes and questions written down one by one.

    python foreign.py --out runs/toy/foreign        # images/, questions.json, annotations.json, in VQAv2's formats

The model learned from pictures that world.py computes. Whether it answers here too shows that it reads the things, not
one renderer. Two of the pictures show a pair of colour and shape that training never did.
"""
import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

from command import Help, run
from weights import write_json

FINE = 4                                                  # drawn four times as large, then scaled down
PAINT = {"red": "#d8362c", "green": "#35b04a", "blue": "#3f5de0", "yellow": "#e8d038", "purple": "#a04acb"}

# Things: size, colour, shape, middle (x, y) in pixels of 56. Questions with their answers.
SHEETS = (
    ([("large", "red", "circle", 14, 14)],
     ["What colour is the circle?", "red", "Is there a red square?", "no"]),
    ([("small", "blue", "triangle", 42, 41)],
     ["What shape is the blue object?", "triangle", "Where is the blue triangle?", "bottom right"]),
    ([("large", "yellow", "square", 41, 14), ("small", "red", "triangle", 14, 42)],
     ["How large is the red triangle?", "small", "How many objects are there?", "two"]),
    ([("small", "green", "circle", 15, 14), ("large", "purple", "circle", 42, 14)],
     ["What is left of the purple circle?", "a green circle", "Is there a green circle?", "yes"]),
    ([("large", "green", "square", 14, 41), ("large", "blue", "circle", 14, 13)],
     ["What is above the green square?", "a blue circle", "What colour is the square?", "green"]),
    ([("small", "yellow", "circle", 42, 42), ("small", "purple", "triangle", 42, 14)],
     ["What is in the top right?", "a purple triangle", "What shape is the yellow object?", "circle"]),
    ([("large", "red", "square", 14, 14), ("small", "green", "circle", 41, 15),
      ("large", "yellow", "triangle", 14, 42)],
     ["How many objects are there?", "three", "Where is the yellow triangle?", "bottom left"]),
    ([("small", "blue", "square", 43, 14), ("large", "red", "triangle", 14, 42),
      ("small", "yellow", "circle", 42, 42)],
     ["What colour is the triangle?", "red", "How large is the blue square?", "small"]),
    ([("large", "purple", "square", 14, 14)],                                                  # never seen in training
     ["What colour is the square?", "purple", "What shape is the purple object?", "square"]),
    ([("small", "green", "triangle", 14, 42), ("large", "blue", "circle", 42, 42)],            # never seen in training
     ["How large is the blue circle?", "large", "Is there a blue square?", "no"]))


def paint(things, seed):
    """-> a 56 x 56 picture: dark noise, and the things with smooth edges"""
    dice, side = random.Random(seed), 56
    ground = Image.new("RGB", (side, side))
    level = dice.randint(10, 30)
    ground.putdata([(grey, grey, grey) for grey in (max(0, round(dice.gauss(level, 5))) for _ in range(side * side))])
    for size, colour, shape, x, y in things:
        cover = Image.new("L", (side * FINE, side * FINE))
        pen, r, x, y = ImageDraw.Draw(cover), FINE * {"small": 6, "large": 11}[size], x * FINE, y * FINE
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        elif shape == "square":
            pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=255)
        else:
            pen.polygon([(x, y - r), (x - 0.94 * r, y + 0.87 * r), (x + 0.94 * r, y + 0.87 * r)], fill=255)
        ground.paste(PAINT[colour], mask=cover.resize((side, side), Image.Resampling.BOX))
    return ground


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", type=Path, default=Path("runs/toy/foreign"), help="folder")
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    asked, answers = [], []
    for image, (things, said) in enumerate(SHEETS):
        paint(things, image).save(args.out / "images" / f"{image:012d}.png")
        for question, answer in zip(said[::2], said[1::2]):
            asked.append({"image_id": image, "question": question, "question_id": len(asked)})
            answers.append({"image_id": image, "question_id": len(answers), "question_type": f"foreign/{len(things)}",
                            "multiple_choice_answer": answer, "answers": [{"answer": answer, "answer_id": n + 1}
                                                                          for n in range(10)]})
    write_json(args.out / "questions.json", {"questions": asked})
    write_json(args.out / "annotations.json", {"annotations": answers})
    print(f"{len(SHEETS)} pictures, {len(asked)} questions in {args.out}")


if __name__ == "__main__":
    run(main)
