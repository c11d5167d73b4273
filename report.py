"""The toy world's report: every number of a finished demo as JSON, and a picture of what the model can do.

    python report.py                      # reads runs/toy, writes runs/toy/report.json and runs/toy/report.png
    python report.py --mean runs/toy runs/toy/seed1 runs/toy/seed2          # finished reports: mean and spread

Numbers: questions by kind and by number of objects with blind baselines, captions, drawings, completions and
reconstructions judged by the world's own detector; and what each of them should reach.
"""
import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from command import NATURAL, SEED, Help, need, run
from evaluate import evaluate, reply
from generate import complete, draw
from generation import see
from model import Libra
from scores import gqa_match
from tokenizer import open_image, prepare, to_picture, to_rgb
from weights import read_folder, read_json, write_json
from world import COLOURS, DESCRIBE, KINDS, SHAPES, SIDE, SIZES, UNSEEN, detect, full_caption, render, scenes


def questions(model, folder, limit):
    """Exact match on held-out scenes and on unseen pairs, with three blind baselines"""
    paths = {"held_out": ("held_out_questions.json", "held_out_annotations.json"),
             "unseen_pair": ("unseen_pair_questions.json", "unseen_pair_annotations.json")}
    results = {}
    for split, (asked, answers) in paths.items():
        for blind in (None, "swapped", "zeroed") if split == "held_out" else (None,):
            files = [folder / asked, folder / answers]
            result = evaluate(model, "exact", files, folder / "images", None, blind, 64, limit)
            results[f"{split}_{blind}" if blind else split] = {"score": result["score"], "parts": result["parts"]}
            if split == "held_out" and not blind:
                given = result["answers"]
    truth = read_json(folder / "held_out_annotations.json")["annotations"][:limit or None]
    by_kind = Counter((t["question_type"].split("/")[0], t["multiple_choice_answer"]) for t in truth)
    best = Counter()
    for (kind, _), n in by_kind.items():
        best[kind] = max(best[kind], n)
    results["held_out_majority"] = {"score": sum(best.values()) / len(truth)}
    pope = evaluate(model, "pope", [folder / "held_out_pope.json"], folder / "images", batch=64, limit=limit)
    results["existence"] = {"f1": pope["score"], **pope["parts"]}
    return results, given


def foreign(model, folder):
    """Pictures of the same kind by another renderer -> right answers, questions, what it said"""
    result = evaluate(model, "exact", [folder / "questions.json", folder / "annotations.json"], folder / "images")
    return {"right": round(result["score"] * result["answered"]), "asked": result["answered"],
            "answers": [item["answer"] for item in result["answers"]]}


def frozen(llama, model):
    """Is every tensor of the LLaMA folder in the pretrained model, bit for bit?"""
    weights = model.state_dict()
    return all(torch.equal(weights[name], tensor) for name, tensor in read_folder(llama).items())


def captions(base, tuned, folder, limit):
    data = [folder / "held_out_captions.json"]
    before = evaluate(base, "statements", data, folder, prompt="", batch=64, limit=limit)
    after = evaluate(tuned, "statements", data, folder, prompt=DESCRIBE, batch=64, limit=limit)
    return {name: {"true": r["score"], **r["parts"]} for name, r in (("pretrained", before), ("tuned", after))}


def reconstructions(model, count, seed):
    """PSNR, what the detector still finds, and how the codes are used"""
    tokenizer, random = model.tokenizers.image, np.random.default_rng([seed, 20])
    source, hits, errors = scenes(random, "held out"), Counter(), []
    used = torch.zeros(tokenizer.config.num_codebooks, tokenizer.config.codebook_size)
    for _ in range(count // 50):
        some = [next(source) for _ in range(50)]
        pictures = [render(scene, random) for scene in some]
        pixels = torch.stack([prepare(Image.fromarray(p), SIDE) for p in pictures])
        ids, _ = tokenizer.encode(pixels)
        drawn = tokenizer.decode(ids).clamp(-1, 1)
        errors += (drawn - to_rgb(pixels)).square().mean((1, 2, 3)).tolist()
        used += torch.stack([torch.bincount(ids[..., k].flatten(), minlength=used.shape[1]) for k in range(len(used))])
        for scene, truth, rgb in zip(some, pictures, drawn):
            for name, picture in (("true", truth), ("drawn", np.asarray(to_picture(rgb)))):
                found = detect(picture)
                for size, colour, shape, cell in scene:
                    thing = found[cell] if isinstance(found[cell], tuple) else (None, None, None)
                    hits.update({f"{name} {what}": a == b for what, a, b in
                                 zip(("size", "colour", "shape"), thing, (size, colour, shape))})
                    hits[f"{name} all"] += 1
    p = used / used.sum(-1, keepdim=True)
    report = {f"{name}_{what}": hits[f"{name} {what}"] / hits[f"{name} all"]
              for name in ("true", "drawn") for what in ("size", "colour", "shape")}
    return report | {"psnr": float(10 * torch.log10(4 / torch.tensor(errors)).mean()),
                     "codes": tokenizer.config.codebook_size, "codes_used": (used > 0).float().mean(1).tolist(),
                     "perplexity": torch.exp(-(p * p.clamp(min=1e-9).log()).sum(-1)).tolist()}


def drawings(model, count, seed):
    """'a large red circle in the top left': is it there, by the world's own detector? -> numbers, examples"""
    random, hits, shown = np.random.default_rng([seed, 21]), Counter(), []
    wanted = []
    while len(wanted) < count:
        thing = (list(SIZES)[random.integers(2)], list(COLOURS)[random.integers(5)], SHAPES[random.integers(3)],
                 int(random.integers(4)))
        if thing[1:3] not in UNSEEN:
            wanted.append(thing)
    for start in range(0, count, 50):
        some = wanted[start:start + 50]
        pictures = draw(model, [full_caption((thing,)) for thing in some])
        for thing, picture in zip(some, pictures):
            found = detect(np.asarray(picture))[thing[3]]
            found = found if isinstance(found, tuple) else (None, None, None)
            hits.update({"colour": found[1] == thing[1], "colour_shape": found[1:] == thing[1:3],
                         "all": found == thing[:3]})
            shown.append((full_caption((thing,)), picture))
    return {name: hits[name] / count for name in ("colour", "colour_shape", "all")}, shown


def completions(model, count, seed):
    """The upper half is given. Lower cells hold a valid object or clean ground?"""
    random, good, shown = np.random.default_rng([seed, 22]), Counter(), []
    source = scenes(random, "held out")
    for start in range(0, count, 50):
        pictures = [Image.fromarray(render(next(source), random)) for _ in range(min(50, count - start))]
        rows = model.config.image_feature_resolution // 2
        for truth, drawn in zip(pictures, complete(model, pictures, rows)):
            cells = detect(np.asarray(drawn))[2:]
            good["cells"] += sum(cell != "unclear" for cell in cells)
            good["pictures"] += all(cell != "unclear" for cell in cells)
            shown.append((truth, drawn))
    return {"cells": good["cells"] / (2 * count), "pictures": good["pictures"] / count}, shown


def bars(n):
    """numbers of the report -> [(what, value, what it should reach)]"""
    held, parts = n["questions"]["held_out"], n["questions"]["held_out"]["parts"]
    kinds = [(f"questions: {kind}", parts[kind], 0.75 if kind in ("where", "what", "relation") else 0.85)
             for kind in KINDS if kind in parts]
    drawn, seen = n["drawing"], n["reconstruction"]
    table = [("questions, 1 object", parts["1"], 0.95), ("questions, 2 objects", parts["2"], 0.95),
             ("questions, 3 objects", parts["3"], 0.85), *kinds,
             ("existence, F1", n["questions"]["existence"]["f1"], 0.9),
             ("questions on unseen pairs", n["questions"]["unseen_pair"]["score"], 0.6),
             ("loss of right answers, another picture shown",
              held["score"] - n["questions"]["held_out_swapped"]["score"], 0.35),
             ("captions wholly true, pretrained", n["captions"]["pretrained"]["true"], 0.8),
             ("captions wholly true, tuned", n["captions"]["tuned"]["true"], 0.9),
             ("reconstruction, PSNR (dB)", seen["psnr"], 25),
             ("reconstruction, colour survives", seen["drawn_colour"], 0.99),
             ("reconstruction, shape survives", seen["drawn_shape"], 0.95),
             ("codes in use, share, lesser codebook", min(seen["codes_used"]), 1.0),
             ("perplexity, share of codes, lesser codebook", min(seen["perplexity"]) / seen["codes"], 0.5),
             ("drawing, colour and shape", drawn["colour_shape"], 0.7), ("drawing, colour", drawn["colour"], 0.9),
             ("completion, lower cells valid", n["completion"]["cells"], 0.6),
             ("another renderer's pictures, right of 20", n["foreign"]["right"], 16),
             ("LLaMA bit-equal after pretraining", float(n["llama_frozen"]), 1.0)]
    if n["minutes"]:
        table.append(("minutes of make demo (at most 45)", n["minutes"], 45))
    return table


def reached(what, value, bar):
    return value <= bar if "at most" in what else value >= bar


# ---------------------------------------------------------------- the picture

INK, GREY, RIGHT, WRONG = (30, 30, 30), (120, 120, 120), (20, 120, 50), (190, 40, 30)
SCALE = 2


class Page:
    """A white page that is written from the top down"""

    def __init__(self, width=1180, height=2400):
        self.image = Image.new("RGB", (width, height), "white")
        self.pen, self.y = ImageDraw.Draw(self.image), 20

    def write(self, x, y, words, size=15, colour=INK):
        self.pen.text((x, y), words, fill=colour, font=ImageFont.load_default(size))

    def title(self, words, small=""):
        self.write(24, self.y, words, 22)
        self.write(24, self.y + 30, small, 14, GREY)
        self.y += 58 if small else 38

    def picture(self, x, y, picture):
        self.image.paste(picture.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.NEAREST), (x, y))

    def curve(self, x, y, values, name, wide=350, high=120):
        """Values from left to right, the axis from their smallest to their largest, the worst percent cut off"""
        values = np.array([v for v in values if v is not None])
        low, top = values.min(), np.percentile(values, 99)
        n = max(1, len(values) // wide)
        values = values[:len(values) // n * n].reshape(-1, n).mean(1)
        points = [(x + i * wide / max(1, len(values) - 1), y + high - high * min(1, (v - low) / max(1e-9, top - low)))
                  for i, v in enumerate(values)]
        self.pen.rectangle((x, y, x + wide, y + high), outline=(210, 210, 210))
        self.pen.line(points, fill=(40, 90, 190), width=2)
        self.write(x + 6, y + high + 4, f"{name}: {values[0]:.3g} to {values[-1]:.3g}", 13, GREY)


def paint(page, root, models, tuned, given, drawn, completed, seed):
    eval_folder = root / "eval"
    truth = {t["question_id"]: t for t in read_json(eval_folder / "held_out_annotations.json")["annotations"]}
    asked = {q["question_id"]: q for q in read_json(eval_folder / "held_out_questions.json")["questions"]}
    for item in given:
        item["truth"] = truth[item["id"]]["multiple_choice_answer"]
        item["right"] = gqa_match(item["answer"], item["truth"])
    given = [given[i] for i in np.random.default_rng([seed, 23]).permutation(len(given))]
    wrong = [item for item in given if not item["right"]][:2]
    chosen = [item for item in given if item not in wrong][:10 - len(wrong)] + wrong
    page.title("What it sees", "held-out pictures, what their ids keep of them, its description, its answer"
               + "; at the end what it gets wrong" * bool(wrong))
    files = [eval_folder / "images" / f"{item['id']:012d}.png" for item in chosen]
    described = reply(tuned, [DESCRIBE] * len(files), files)
    codes, _ = see(tuned, files)
    rebuilt = tuned.tokenizers.image.decode(codes)
    for n, (item, file, words, rgb) in enumerate(zip(chosen, files, described, rebuilt)):
        x, y = 24 + n % 2 * 580, page.y + n // 2 * (SIDE * SCALE + 14)
        page.picture(x, y, open_image(file))
        page.picture(x + SIDE * SCALE + 6, y, to_picture(rgb))
        for i, line in enumerate(wrap(words, 52)[:3]):
            page.write(x + 240, y + 17 * i, line, 13, GREY)
        page.write(x + 240, y + 60, asked[item["id"]]["question"], 15)
        correction, colour = ("", RIGHT) if item["right"] else (f"  (it is {item['truth']})", WRONG)
        page.write(x + 240, y + 80, item["answer"][:30] + correction, 15, colour)
    page.y += (len(chosen) + 1) // 2 * (SIDE * SCALE + 14) + 16
    page.title("What it draws", "from the words below, greedily, the contiguous signal zeroed (Sec. 4.3)")
    for n, (words, picture) in enumerate(drawn[:8]):
        page.picture(24 + n * 142, page.y, picture)
        for i, line in enumerate(wrap(words, 17)):
            page.write(24 + n * 142, page.y + SIDE * SCALE + 4 + 15 * i, line, 12, GREY)
    page.y += SIDE * SCALE + 66
    page.title("What it completes", "three of seven rows of tokens come from the picture above")
    for n, (before, after) in enumerate(completed[:8]):
        page.picture(24 + n * 142, page.y, before)
        page.picture(24 + n * 142, page.y + SIDE * SCALE + 6, after)
    page.y += 2 * SIDE * SCALE + 26
    page.title("How it learned")
    curves = [("tokenizer", "psnr", "image tokenizer, PSNR (dB)"), ("pretrain", "image", "pretraining, image loss"),
              ("pretrain", "text", "pretraining, text loss (words before a picture cannot be foreseen)"),
              ("sft", "loss", "instruction tuning, answer loss")]
    for n, (folder, key, name) in enumerate(curves):
        path = (root if folder == "tokenizer" else models) / folder / "log.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        page.curve(24 + n % 2 * 580, page.y + n // 2 * 150, [line[key] for line in lines], name, 540)
    page.y += 320


def wrap(words, width):
    lines = [""]
    for word in (part[:width - 1] for part in words.split()):
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def mean(folders):
    """Print the bars of several finished reports, mean and spread; keep them in the first one's report.json too"""
    rows, kept = [bars(read_json(need(folder / "report.json"))) for folder in folders], {}
    for same in zip(*rows):
        what, values, bar = same[0][0], [value for _, value, _ in same], same[0][2]
        kept[what] = {"mean": sum(values) / len(values), "values": values, "bar": bar}
        print(f"{what:48} {kept[what]['mean']:7.3f}   {min(values):.3f} to {max(values):.3f}   bar {bar}")
    path = folders[0] / "report.json"
    write_json(path, read_json(path) | {"seeds": kept})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--toy", type=Path, default=Path("runs/toy"), help="folder of a finished demo")
    parser.add_argument("--models", type=Path, help="where pretrain/ and sft/ are and the report goes; None: --toy")
    parser.add_argument("--limit", type=NATURAL, default=0,
                        help="first N questions, captions and drawings only; 0: all")
    parser.add_argument("--seed", type=SEED, default=0, help="of scenes and drawings")
    parser.add_argument("--began", type=float, default=0, help="when the demo began, seconds since 1970")
    parser.add_argument("--mean", type=Path, nargs="+", metavar="DIR",
                        help="put these folders' reports together, no more")
    args = parser.parse_args()
    if args.mean:
        return mean(args.mean)
    root, models, many = args.toy, args.models or args.toy, args.limit or 200
    base, tuned = (Libra.from_pretrained(need(models / name)).eval() for name in ("pretrain", "sft"))
    numbers = {"llama_frozen": frozen(root / "llama", base)}
    numbers["questions"], given = questions(tuned, root / "eval", args.limit)
    numbers["foreign"] = foreign(tuned, root / "foreign")
    numbers["captions"] = captions(base, tuned, root / "eval", args.limit or 600)
    numbers["reconstruction"] = reconstructions(base, max(50, 10 * args.limit or 2000), args.seed)
    numbers["drawing"], drawn = drawings(base, many, args.seed)
    numbers["completion"], completed = completions(base, max(50, many // 2), args.seed)
    numbers["minutes"] = (time.time() - args.began) / 60 if args.began else None
    page = Page()
    right, blind = (numbers["questions"][name]["score"] for name in ("held_out", "held_out_swapped"))
    page.title("Libra on the toy world", f"{right:.0%} of the answers right on held-out scenes, {blind:.0%} when shown "
               "another picture")
    paint(page, root, models, tuned, given, drawn, completed, args.seed)
    table = bars(numbers)
    numbers["bars"] = [{"what": what, "value": value, "bar": bar, "reached": reached(what, value, bar)}
                       for what, value, bar in table]
    write_json(models / "report.json", numbers)
    page.image.crop((0, 0, page.image.width, page.y)).save(models / "report.png")
    for row in table:
        print(f"{row[0]:48} {row[1]:7.3f}   {'reaches' if reached(*row) else 'MISSES'} {row[2]}")
    print(f"{models}/report.json, {models}/report.png")


if __name__ == "__main__":
    run(main)
