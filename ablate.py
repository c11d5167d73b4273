"""Table 3, Fig. 2, 3a and 4 at toy size: Libra and its ablations, each one switch away, over several seeds.

    make ablate                          # on the demo's files; two hours on two cores. Broken off, it goes on
    python ablate.py --show              # only the table and the picture of what is there

Same data, steps, seeds for all rows. runs/toy/ablation/ gets a folder for each row and seed, table.md and ablation.png.
"""
import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from command import NATURAL, POSITIVE, TOY, Help, need, run
from data import Recipe, loader, open_source
from evaluate import evaluate
from generate import attention, attention_difference, complete, draw
from model import Libra
from report import completions, drawings, reconstructions
from streams import Streams
from tokenizer import ImageTokenizer, open_image, prepare, to_picture
from toy import training_text
from weights import UserError, read_json, write_json
from world import DESCRIBE, scenes

ROWS = {   # name: options of pretrain.py; the paper's VQAv2, GQA, VizWiz, MME, POPE, SEED
    "Libra": ("", (77.3, 63.8, 59.5, 1494.7, 88.2, 62.7)),
    "(a) language loss only": ("--language-only", (77.0, 60.8, 52.9, 1465.5, 86.0, 58.8)),
    "(b) contiguous targets": ("--contiguous-targets", (77.2, 60.5, 53.3, 1473.4, 85.2, 58.2)),
    "(c) 6 % of the data": ("", (67.8, 54.9, 48.8, 1189.8, 82.1, 51.8)),
    "(d) no expert": ("--no-expert", (77.0, 61.4, 50.8, 1450.2, 85.9, 58.4)),
    "(e) no bridge": ("--no-bridge", (76.3, 61.4, 53.6, 1458.4, 86.0, 59.6)),
    "(f) discrete input": ("--discrete-only", (65.0, 53.1, 38.6, 1127.8, 80.3, 48.5)),
    "(g) encoder from scratch": ("", (67.2, 55.7, 40.6, 1148.4, 80.7, 50.8))}
COLUMNS = {"questions": "{:.3f}", "captions": "{:.3f}", "existence F1": "{:.3f}", "image loss": "{:.3f}",
           "text perplexity": "{:.4f}", "completed": "{:.3f}", "drawn": "{:.3f}", "M weights": "{:.2f}",
           "minutes": "{:.1f}"}


def start(script, *words):
    command = [sys.executable, script, *(word for some in words for word in
                                         (shlex.split(some) if isinstance(some, str) else [str(some)]))]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} ended early; what it says stands above. Once mended, the same command goes on")


def train(args, name, seed, folder):
    """Pretraining and tuning of one row"""
    toy, words = args.toy, ROWS[name][0]
    data, eye = f"'{toy}/captions/*.tar'", toy / "tokenizer"
    if name.startswith("(c)"):
        data = args.out / "few.tar"
    if name.startswith("(g)"):
        eye = args.out / "tokenizer-scratch"
    if not (folder / "pretrain/model.safetensors").exists():
        start("pretrain.py", "--llm", toy / "llama", "--image-tokenizer", eye, "--data", data, "--out",
            folder / "pretrain", "--seed", seed, "--resume", args.pretrain, words)
    start("sft.py", "--model", folder / "pretrain", "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
        "--out", folder / "sft", "--seed", seed, "--resume", args.sft)


def few(toy, out, share):
    """Row (c): one shard with the first samples of the demo's"""
    path = out / "few.tar"
    if not path.exists():
        sources = sorted((toy / "captions").glob("*.tar"))
        with tarfile.open(sources[0]) as first, tarfile.open(path.with_suffix(".tmp"), "w") as kept:
            members = first.getmembers()
            for member in members[:int(share * len(sources) * len(members) / 3) * 3]:
                kept.addfile(member, first.extractfile(member))
        path.with_suffix(".tmp").rename(path)


def tokenizer(args, name, words):
    """An image tokenizer by another recipe, trained once"""
    folder = args.out / f"tokenizer-{name}"
    if not (folder / "model.safetensors").exists():
        start("train_tokenizer.py", "--clip", args.toy / "clip", "--data", f"'{args.toy}/captions/*.tar'", "--out",
            folder, "--resume", args.tokenizer, words)


# ---------------------------------------------------------------- what a row is worth

@torch.no_grad()
def image_loss(model, folder):
    """Mean loss of the held-out pictures' ids"""
    recipe = Recipe(model.tokenizers.text, model.config, model.tokenizers.image.config.resolution, 700)
    batches, _ = loader([open_source(folder / "held_out_captions.json", str(folder))], recipe, 32, 32, 0)
    total = count = 0
    for _, batch in zip(range(8), batches):
        codes, signal = model.tokenizers.image.encode(batch.pixels)
        total += model(batch.streams.with_images(codes), signal)[1].mean().item()
        count += len(batch.streams.image_rows)
    return total / count


@torch.no_grad()
def perplexity(model):
    """Of the answers in text without pictures: the stand-in LLaMA's maps and the talk about them, held out"""
    random, text, rows = np.random.default_rng(11), model.tokenizers.text, []
    source = scenes(random, "held out")
    for _ in range(200):
        rows.append(training_text(next(source), random, text))
    ids = [torch.tensor(ids)[:, None].expand(-1, model.config.vision_codebook_num) for ids, _ in rows]
    counted = [torch.tensor(counted, dtype=torch.bool) for _, counted in rows]
    return float(model.loss(Streams.of(ids, model.config, counted=counted)).exp())


def differences(model, folder, count=100):
    """Fig. 4, 7: cross-layer and inner-layer difference over `count` questions"""
    asked = read_json(folder / "held_out_questions.json")["questions"][:count]
    maps = [attention(model, q["question"], folder / "images" / f"{q['image_id']:012d}.png") for q in asked]
    return [x.tolist() for x in attention_difference(torch.cat(maps, dim=1))]


def measure(args, name, seed, folder, minutes):
    base, tuned = (Libra.from_pretrained(folder / stage).eval() for stage in ("pretrain", "sft"))
    files = [args.toy / "eval" / f"held_out_{kind}.json" for kind in ("questions", "annotations")]
    images, some = args.toy / "eval/images", {"batch": 64, "limit": args.limit}
    result = {
        "questions": evaluate(tuned, "exact", files, images, **some)["score"],
        "captions": evaluate(tuned, "statements", [args.toy / "eval/held_out_captions.json"], args.toy / "eval",
                             prompt=DESCRIBE, **some)["score"],
        "existence F1": evaluate(tuned, "pope", [args.toy / "eval/held_out_pope.json"], images, **some)["score"],
        "text perplexity": perplexity(tuned), "minutes": minutes, "M weights": sum(
            p.numel() for p in tuned.parameters()) / 1e6, "differences": differences(tuned, args.toy / "eval")}
    if name[:3] not in ("(a)", "(b)"):                    # these do not learn to predict ids
        result |= {"image loss": image_loss(base, args.toy / "eval"),
                   "completed": completions(base, 100, seed)[0]["cells"],
                   "drawn": drawings(base, 100, seed)[0]["colour_shape"]}
    write_json(folder / "result.json", result)


# ---------------------------------------------------------------- what there is to see

def table(args):
    """Mean and spread over seeds, the paper's row beside it -> table.md"""
    lines = ["| row | seeds | " + " | ".join(COLUMNS) + " | paper: VQAv2, GQA, VizWiz, MME, POPE, SEED |",
             "|" + "---|" * (len(COLUMNS) + 3)]
    for name, (_, paper) in ROWS.items():
        results = results_of(args, name)
        cells = []
        for column, form in COLUMNS.items():
            values = [result[column] for result in results if column in result]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and column != "M weights" else ""
            cells.append(form.format(statistics.mean(values)) + spread if values else "-")
        lines.append(f"| {name} | {len(results)} | " + " | ".join(cells) + f" | {', '.join(map(str, paper))} |")
    for name in ("lfq", "vq"):
        if (path := args.out / f"reconstruction-{name}.json").exists():
            seen = read_json(path)
            lines.append(f"\nFig. 2, {name}: PSNR {seen['psnr']:.2f} dB, colour survives {seen['drawn_colour']:.3f}, "
                         f"shape {seen['drawn_shape']:.3f}, codes in use {min(seen['codes_used']):.2f}")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def results_of(args, name):
    paths = [args.out / f"{slug(name)}-{seed}" / "result.json" for seed in args.seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def slug(name):
    return name[1] if name.startswith("(") else name.lower()


def picture(args):
    """Fig. 3a: completed and drawn with and without bridge; Fig. 2: what comes back through LFQ and through learned
    tables; Fig. 4b, c: attention differences with and without expert"""
    page, font = Image.new("RGB", (1000, 1160), "white"), ImageFont.load_default(14)
    pen, y = ImageDraw.Draw(page), 10
    files = [args.toy / "eval/images" / f"{n:012d}.png" for n in range(2, 10)]
    given = [open_image(file) for file in files]
    words = [f"a large {colour} {shape} in the {place}" for place in ("top left", "bottom right")
             for colour, shape in (("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "circle"))]

    def strip(title, *rows):
        nonlocal y
        pen.text((10, y), title, "black", font)
        for m, row in enumerate(rows):
            for n, one in enumerate(row):
                page.paste(one.resize((80, 80)), (10 + n * 122, y + 20 + m * 82))
        y += 30 + 82 * len(rows)
    for name in ("Libra", "(e) no bridge"):
        folder = args.out / f"{slug(name)}-{args.seeds[0]}" / "pretrain"
        if (folder / "model.safetensors").exists():
            model = Libra.from_pretrained(folder).eval()
            strip(f"{name}: completed from the upper three of seven rows", given, complete(model, files, 3))
            strip(f"{name}: {words[0]}, blue square, green triangle, yellow circle; the same in the bottom right",
                  draw(model, words))
    eyes = [path for path in (args.toy / "tokenizer", args.out / "tokenizer-vq") if path.exists()]
    strip("reconstructed: given, through LFQ, through learned tables", given, *(
        there_and_back(eye, given) for eye in map(ImageTokenizer.from_pretrained, eyes)))
    for which, title in enumerate(("cross-layer attention difference", "inner-layer attention difference")):
        left, curves = 20 + which * 490, {}
        for name in ("Libra", "(d) no expert"):
            if found := [result["differences"][which] for result in results_of(args, name)]:
                curves[name] = np.mean(found, axis=0)
        pen.text((left, y), title, "black", font)
        for (name, mean), ink, at in zip(curves.items(), ("blue", "red"), (0, 120)):
            points = [(left + i * 420 / max(1, len(mean) - 1), y + 170 - 140 * v / max(map(max, curves.values())))
                      for i, v in enumerate(mean)]
            pen.line(points, ink, 3)
            pen.text((left + at, y + 180), name, ink, font)
    page.crop((0, 0, 1000, y + 205)).save(args.out / "ablation.png")


@torch.no_grad()
def there_and_back(tokenizer, pictures):
    """Pictures -> ids -> pictures"""
    pixels = torch.stack([prepare(picture, tokenizer.config.resolution, square=False) for picture in pictures])
    return [to_picture(rgb) for rgb in tokenizer.decode(tokenizer.encode(pixels)[0])]


def row(args, seed, name):
    """All of one row and seed, or what is missing of it"""
    folder, began = args.out / f"{slug(name)}-{seed}", time.time()
    print(f"{name}, seed {seed}", flush=True)
    train(args, name, seed, folder)
    measure(args, name, seed, folder, (time.time() - began) / 60)


def reconstruction(args, name):
    """Fig. 2: what comes back of pictures through one quantizer"""
    tokens = ImageTokenizer.from_pretrained(args.toy / "tokenizer" if name == "lfq" else args.out / f"tokenizer-{name}")
    write_json(args.out / f"reconstruction-{name}.json", reconstructions(
        SimpleNamespace(tokenizers=SimpleNamespace(image=tokens)), max(50, args.limit), 0))


def work(args):
    """Everything that is not there yet, several things beside each other"""
    wanted = [name for name in ROWS if not args.rows or slug(name) in args.rows]
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // args.jobs))        # of all it starts
    tokenizers = [partial(tokenizer, args, name, words) for name, words, row in (
        ("scratch", "--encoder scratch --clip-weight 0", "(g) encoder from scratch"), ("vq", "--quantizer vq", None))
        if row in wanted or row is None and not args.rows]
    rows = [partial(row, args, seed, name) for seed in args.seeds for name in wanted
            if not (args.out / f"{slug(name)}-{seed}" / "result.json").exists()]
    pictures = [] if args.rows else [partial(reconstruction, args, name) for name in ("lfq", "vq")]
    if "(c) 6 % of the data" in wanted:
        few(args.toy, args.out, 0.06)
    for tasks in (tokenizers, rows + pictures):
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for task in [pool.submit(task) for task in tasks]:
                task.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--toy", type=Path, default=TOY, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, default=TOY / "ablation", help="folder of rows, table and picture")
    parser.add_argument("--seeds", type=NATURAL, nargs="+", default=[0, 1, 2], help="one run of each row for each")
    parser.add_argument("--rows", nargs="+", choices=[slug(name) for name in ROWS], metavar="ROW",
                        help="libra, a to g; None: all")
    parser.add_argument("--tokenizer", default="", metavar="WORDS", help="options of train_tokenizer.py")
    parser.add_argument("--pretrain", default="", metavar="WORDS", help="options of pretrain.py")
    parser.add_argument("--sft", default="", metavar="WORDS", help="options of sft.py")
    parser.add_argument("--limit", type=POSITIVE, default=600, help="questions and captions that are scored")
    parser.add_argument("--jobs", type=POSITIVE, default=2,
                        help="how many rows run beside each other, each with its share "
                        "of the cores: two on a core each take less time than one after the other on two")
    parser.add_argument("--show", action="store_true", help="only table and picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.show:
        need(args.toy / "eval")
        work(args)
    table(args)
    picture(args)


if __name__ == "__main__":
    run(main)
