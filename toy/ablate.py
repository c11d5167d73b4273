"""Table 3, Fig. 2, 3a and 4 at toy size: Libra and its ablations, each one switch away, over several seeds.

    make ablate                              # on the demo's files, two hours on two cores; interrupted, it goes on
    python -m toy.ablate --show              # only the table and the figure of the rows that are finished

All rows have the same data, steps and seeds. runs/toy/ablation/ gets a folder per row and seed, table.md, ablation.png.
"""
import argparse
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.cli import NATURAL, POSITIVE, TOY, Help, require_path, run, signal_at_parents_death
from common.pictures import open_image
from common.plots import attention_difference, new_figure, plot_curves, show_pictures
from common.sources import open_source
from common.weights import UserError, read_json, write_json
from data import SampleBuilder, make_loader
from evaluate import evaluate
from generate import attention, complete, draw, reconstruct
from llama import Llama
from model import Libra
from monolithic.shared import Batch, pad
from tokenizer import ImageTokenizer
from toy.make import fill, text_rows, write_captions
from toy.report import read_log, score_completions, score_drawings, score_reconstructions
from toy.world import SHARES, scenes

ROWS = {   # title, option of pretrain.py, the paper's VQAv2, GQA, VizWiz, MME, POPE, SEED
    "libra": ("Libra", (), "77.3, 63.8, 59.5, 1494.7, 88.2, 62.7"),
    "a": ("(a) language loss only", ("--language-only",), "77.0, 60.8, 52.9, 1465.5, 86.0, 58.8"),
    "b": ("(b) contiguous targets", ("--contiguous-targets",), "77.2, 60.5, 53.3, 1473.4, 85.2, 58.2"),
    "c": ("(c) 6 % of the data", (), "67.8, 54.9, 48.8, 1189.8, 82.1, 51.8"),
    "d": ("(d) no expert", ("--no-expert",), "77.0, 61.4, 50.8, 1450.2, 85.9, 58.4"),
    "e": ("(e) no bridge", ("--no-bridge",), "76.3, 61.4, 53.6, 1458.4, 86.0, 59.6"),
    "f": ("(f) discrete input", ("--discrete-only",), "65.0, 53.1, 38.6, 1127.8, 80.3, 48.5"),
    "g": ("(g) encoder from scratch", (), "67.2, 55.7, 40.6, 1148.4, 80.7, 50.8")}
COLUMNS = {"questions": 3, "captions": 3, "existence F1": 3, "image loss": 3, "text perplexity": 4, "completed": 3,
           "drawn": 3, "M weights": 2, "minutes": 1}      # digits after the point


def run_tasks(args, tasks):
    """tasks: (function, its arguments), args.jobs at a time, each in a process of its own -> what they return"""
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // args.jobs))         # of each process
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1, initializer=signal_at_parents_death,
                             initargs=[signal.SIGKILL]) as pool:
        futures = [pool.submit(*task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:                         # the pool itself would go on with the tasks that wait
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)


def run_trainer(folder, *words):
    """Run a trainer, unless the folder has its model already -> the folder"""
    command = [sys.executable, *map(str, words), "--out", str(folder), "--resume"]
    if (folder / "model.safetensors").exists():
        return folder
    stop = partial(signal_at_parents_death, signal.SIGTERM)                    # a trainer then saves what it has
    if subprocess.run(command, stdout=subprocess.DEVNULL, preexec_fn=stop).returncode:
        raise UserError(f"{folder}: its training failed, see the message above. The same command continues once that "
                        "is repaired")
    return folder


def train_tokenizer(args, name, *options):
    """An image tokenizer by another recipe -> its folder"""
    return run_trainer(args.out / f"tokenizer-{name}", "train_tokenizer.py", "--clip", args.toy / "clip", "--data",
                       f"{args.toy}/captions/*.tar", *args.tokenizer, *options)


def run_row(args, row, seed):
    """Train one row with one seed and measure it -> result.json"""
    folder, toy = args.out / f"{row}-{seed}", args.toy
    print(f"{ROWS[row][0]}, seed {seed}", flush=True)
    data = args.out / "few/00000.tar" if row == "c" else f"{toy}/captions/*.tar"
    image_tokenizer = args.out / "tokenizer-scratch" if row == "g" else toy / "tokenizer"
    base = run_trainer(folder / "pretrain", "pretrain.py", "--llm", toy / "llama", "--image-tokenizer", image_tokenizer,
                       "--data", data, "--seed", seed, *args.pretrain, *ROWS[row][1])
    tuned = run_trainer(folder / "sft", "sft.py", "--model", base, "--data", toy / "chats/chat.json", "--images",
                        toy / "chats/images", "--seed", seed, *args.sft)
    steps = read_log(base / "log.jsonl") + read_log(tuned / "log.jsonl")
    base, tuned = (Libra.from_pretrained(path).eval() for path in (base, tuned))
    questions, annotations, captions, pope = (
        toy / f"eval/held_out_{name}.json" for name in ("questions", "annotations", "captions", "pope"))
    score = partial(evaluate, tuned, batch=64, limit=args.limit)
    result = {
        "questions": score("exact", [questions, annotations], toy / "eval/images")["score"],
        "captions": score("statements", [captions], toy / "eval")["score"],
        "existence F1": score("pope", [pope], toy / "eval/images")["score"], "text perplexity": map_perplexity(tuned),
        "minutes": sum(step["seconds"] for step in steps) / 60,
        "M weights": sum(p.numel() for p in tuned.parameters()) / 1e6}
    maps = [attention(tuned, question["question"], [toy / f"eval/images/{question['image_id']:012d}.png"])
            for question in read_json(questions)["questions"][:100]]
    result["differences"] = [x.tolist() for x in attention_difference(torch.cat(maps, dim=1))]         # Fig. 4
    if row not in ("a", "b"):                             # these two do not learn to predict ids
        result["image loss"] = image_loss(base, captions)
        result["completed"] = score_completions(base, 100, seed)[0]
        result["drawn"] = score_drawings(base, 100, seed)[0]["colour_shape"]
    write_json(folder / "result.json", result)


@torch.no_grad()
def image_loss(model, captions):
    """Mean loss of the ids of 256 held-out pictures"""
    builder = SampleBuilder(model.tokenizers.text, model.config, model.tokenizers.image.config.resolution, 700)
    batches, _ = make_loader([open_source(captions, str(captions.parent))], builder, 32, 32, 0)
    total = count = 0
    for _, batch in zip(range(8), batches):
        codes, signal = model.tokenizers.image.encode(batch.pixels)
        total += model(batch.streams.with_image_codes(codes), signal)[1].mean().item()
        count += len(batch.streams.image_rows)
    return total / count


@torch.no_grad()
def map_perplexity(model):
    """Of answers and captions about held-out text maps, the kind of text that the stand-in LLaMA was trained on"""
    draws, text = np.random.default_rng(11), model.tokenizers.text
    rows, masks = text_rows(scenes(draws, "held out"), SHARES, draws, 200, text)
    (ids, real), mask = pad(rows), pad(masks)[0].bool()
    is_llama = isinstance(model, Llama)                   # or what reads text as its LLaMA does
    hidden = model.hidden_states(ids) if is_llama else model.hidden(ids, Batch.build(ids, real, [], model.config))
    logits, targets = model.lm_head(hidden[:, :-1][mask[:, 1:]]), ids[:, 1:][mask[:, 1:]]
    return float(torch.nn.functional.cross_entropy(logits.float(), targets).exp())


def score_quantizer(args, name):
    """Fig. 2: what remains of pictures with this quantizer"""
    folder = args.toy / "tokenizer" if name == "lfq" else train_tokenizer(args, name, "--quantizer", name)
    tokenizer = ImageTokenizer.from_pretrained(folder)
    write_json(args.out / f"reconstruction-{name}.json", score_reconstructions(tokenizer, max(50, args.limit), 0))


def run_all(args):
    """Everything that is not finished"""
    if "c" in args.rows:                                  # the first 720 of the demo's 12,000 pictures
        fill(args.out / "few", write_captions, 720, 0)
    if "g" in args.rows:
        train_tokenizer(args, "scratch", "--encoder", "scratch", "--clip-weight", 0)
    tasks = [(score_quantizer, args, name) for name in ("vq", "lfq")
             if set(args.rows) == set(ROWS) and not (args.out / f"reconstruction-{name}.json").exists()]
    tasks += [(run_row, args, row, seed) for seed in args.seeds for row in args.rows
              if not (args.out / f"{row}-{seed}/result.json").exists()]
    run_tasks(args, tasks)


def table(args):
    """Mean and standard deviation over the seeds beside the paper's numbers"""
    lines, below = [["row", "seeds", *COLUMNS, "paper: VQAv2, GQA, VizWiz, MME, POPE, SEED"]], ""
    for row, (title, _, paper) in ROWS.items():
        results = results_of(args, row)
        lines.append([title, str(len(results)), *(mean_cell(results, *column) for column in COLUMNS.items()), paper])
    for path in sorted(args.out.glob("reconstruction-*.json")):
        n = read_json(path)
        below += (f"\nFig. 2, {path.stem[15:]}: PSNR {n['psnr']:.2f} dB, colour survives {n['drawn_colour']:.3f}, "
                  f"shape {n['drawn_shape']:.3f}, codes in use {min(n['codes_used']):.2f}\n")
    return lines, below


def plot(args):
    """Fig. 3a: drawn and completed with and without bridge; Fig. 2: reconstructed by LFQ and by learned tables (VQ);
    Fig. 4b, c: attention differences with and without expert -> ablation.png"""
    files = [args.toy / f"eval/images/{n:012d}.png" for n in range(2, 10)]
    words = [f"a large {colour} {shape} in the {place}" for place in ("top left", "bottom right") for colour, shape in
             (("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "circle"))]
    folders = {ROWS[row][0]: args.out / f"{row}-{args.seeds[0]}/pretrain" for row in ("libra", "e")}
    models = {title: Libra.from_pretrained(folder).eval() for title, folder in folders.items()
              if (folder / "model.safetensors").exists()}
    pictures = {f"{title}\ndrawn": draw(model, words) for title, model in models.items()}
    titles = [textwrap.fill(text, 16) for text in words] if models else ()
    pictures["given"] = [open_image(file) for file in files]
    pictures |= {f"{title}\ncompleted": complete(model, files, 3) for title, model in models.items()}
    for name, folder in (("LFQ", args.toy / "tokenizer"), ("VQ", args.out / "tokenizer-vq")):
        if (folder / "model.safetensors").exists():
            pairs = [reconstruct(ImageTokenizer.from_pretrained(folder), file)[0] for file in files]
            pictures[f"{name}\nreconstructed"] = [pair.crop((pair.width // 2, 0, *pair.size)) for pair in pairs]
    figure = new_figure(11, 1.3 * len(pictures) + 3.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.3 * len(pictures), 3.6))
    show_pictures(upper, list(pictures.values()), list(pictures), titles)
    for i, (axes, name) in enumerate(zip(lower.subplots(1, 2), ("cross-layer", "inner-layer"))):
        curves = {ROWS[row][0]: np.mean([result["differences"][i] for result in results_of(args, row)], axis=0)
                  for row in ("libra", "d") if results_of(args, row)}
        plot_curves(axes, curves, "layer", f"{name} attention difference")
    figure.savefig(args.out / "ablation.png")


def options(doc, name, rows, **scripts):
    """Of a table of trained rows, which stands in the folder `name`. scripts: {option: whose options it passes on}"""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    parser.add_argument("--toy", type=Path, default=TOY, help="folder of a finished demo")
    parser.add_argument("--out", type=Path, default=TOY / name, help="folder of rows, table and figure")
    parser.add_argument("--seeds", type=NATURAL, nargs="+", default=[0, 1, 2], help="each row is run once for each")
    parser.add_argument("--rows", nargs="+", choices=list(rows), default=list(rows), metavar="ROW", help="of the table")
    parser.add_argument("--limit", type=POSITIVE, default=600, help="questions and captions that are scored")
    parser.add_argument("--jobs", type=POSITIVE, default=2, help="rows that run at a time, each with its share of the "
                        "cores: two on a core each take less time than one after the other on two cores")
    parser.add_argument("--show", action="store_true", help="only table and figure")
    for stage, script in scripts.items():
        parser.add_argument(f"--{stage}", type=shlex.split, default="", metavar="WORDS", help=f"options of {script}")
    return parser


def results_of(args, row, name="result"):
    """What is written about a row, for each seed"""
    paths = [args.out / f"{row}-{seed}/{name}.json" for seed in args.seeds]
    return [read_json(path) for path in paths if path.exists()]


def mean_cell(results, name, digits):
    """Mean and, of several results, standard deviation as text; empty where no result has this number"""
    values = [result[name] for result in results if result.get(name) is not None]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}" if values else ""


def run_table(args, run_all, table, plot):
    """table(args) -> lists of cells, the first the headings, and a text below"""
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.show:
        require_path(args.toy / "eval")
        run_all(args)
    lines, below = table(args)
    lines.insert(1, ["---"] * len(lines[0]))
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + below
    (args.out / "table.md").write_text(text)
    print(text)
    plot(args)


def main():
    parser = options(__doc__, "ablation", ROWS, tokenizer="train_tokenizer.py", pretrain="pretrain.py", sft="sft.py")
    run_table(parser.parse_args(), run_all, table, plot)


if __name__ == "__main__":
    run(main)
