"""Four systems side by side on the toy world, and what the early stages of two of them bring.

    make compare                     # on the demo's files, under two hours on two cores; interrupted, it goes on
    python -m toy.compare --show     # only the table and the figure of what is finished

Every row sees the same number of pictures: captions in batches of 32, then chats in batches of 16. Without stage 1
its pictures go to the stage after it; without HoVLE's stage 2 they go to the one before, as both read captions. Each
system tries three learning rates with the first seed, judged by questions that are not in the table; the best of these
runs stands in the table. runs/toy/compare/ gets a folder per row, rate and seed, table.md, compare.png.
"""
import importlib
import random
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch

from answering.batching import Rate
from common.cli import POSITIVE, run
from common.plots import new_figure, plot_curves
from common.weights import read_json, write_json
from evaluate import evaluate
from generate import answer
from llama import Llama
from monolithic import open_model
from monolithic.stages import counted_flops
from text import open_text
from toy.ablate import map_perplexity, mean_cell, options, results_of, run_table, run_tasks, run_trainer
from toy.make import fill, write_evaluation
from toy.report import read_log, score_answers
from toy.world import DESCRIBE, KINDS

HAPLOVL, HOVLE, LLAVA = "-m monolithic.haplovl", "-m monolithic.hovle", "-m monolithic.llava"
NEW = "--llm {toy}/llama --clip {toy}/clip"
STAGES = {   # of a system: command, options
    "libra": [("pretrain.py", "--llm {toy}/llama --image-tokenizer {toy}/tokenizer --vision-down-ratio 1"),
              ("sft.py", "")],
    "haplovl": [(HAPLOVL, f"--stage 1 --image-aspect-ratio square {NEW}"), (HAPLOVL, "--stage 2 --freeze-llm"),
                (HAPLOVL, "--stage 2")],
    "hovle": [(HOVLE, f"--stage 1 --module-layers 4 --tiles 1 {NEW}"), (HOVLE, "--stage 2"), (HOVLE, "--stage 3")],
    "llava": [(LLAVA, f"--stage 1 {NEW}"), (LLAVA, "--stage 2")]}
ROWS = {   # title, system, needs CLIP to answer, of each stage: its place in STAGES, share of the captions, rate
    "libra": ("Libra", "libra", True, [(0, 1, 2e-3), (1, "chats", 1.5e-3)]),
    "haplovl": ("HaploVL", "haplovl", False, [(0, 0.5, 1e-3), (1, 0.5, 2e-3), (2, "chats", 1e-3)]),
    "hovle": ("HoVLE", "hovle", False, [(0, 0.5, 1e-3), (1, 0.5, 1e-3), (2, "chats", 1e-3)]),
    "llava": ("LLaVA-like", "llava", True, [(0, 1, 1e-3), (1, "chats", 1e-3)]),
    "haplovl-no-stage-1": ("HaploVL without stage 1", "haplovl", False, [(0, 0, 0), (1, 1, 2e-3), (2, "chats", 1e-3)]),
    "hovle-no-stage-1": ("HoVLE without stage 1", "hovle", False, [(0, 0, 0), (1, 1, 1e-3), (2, "chats", 1e-3)]),
    "hovle-no-stage-2": ("HoVLE without stage 2", "hovle", False, [(0, 1, 1e-3), (2, "chats", 1e-3)])}
FACTORS = 0.5, 1.0, 2.0                                   # of all learning rates of a system
COLUMNS = {"questions": 3, "no picture": 3, "another picture": 3, "unseen pairs": 3, "captions": 3, "existence F1": 3,
           **dict.fromkeys(KINDS, 2), "text perplexity": 3}                   # digits after the point
COSTS = {"M weights": 2, "TFLOP of training": 0, "seconds a step": 2, "prefill ms": 0, "tokens/s": 0}


def folder_of(args, row, factor, seed):
    """Of a run: in it a folder for each stage, rate.json if it tried a rate, result.json if it is in the table"""
    return args.out / f"{row}-x{factor:g}-{seed}"


def stage_words(args, row, number, factor, seed):
    """-> the command of a stage of a row, without --out"""
    place, share, lr = ROWS[row][3][number]
    command, words = STAGES[ROWS[row][1]][place]
    toy, chats, captions = args.toy, [f"{args.toy}/chats/chat.json"], [f"{args.toy}/captions/*.tar"]
    files, steps, batch = chats, args.steps, 16
    if share != "chats":                                  # without a stage: one step at rate 0 leaves a new model
        files, steps, batch = captions, max(1, round(args.steps * share)), 32
    if (row, number) == ("haplovl", 0):                   # its text must show all words: their embeddings start new
        files = captions + chats
    before = ["--model", folder_of(args, row, factor, seed) / str(number - 1)] if number else []
    return [*command.split(), *words.format(toy=toy).split(), *before, "--data", *files, "--images",
            toy / "chats/images", "--steps", steps, "--batch", batch, "--lr", lr * factor, "--warmup", min(60, steps),
            "--weight-decay", 0, "--seed", seed, "--save-every", 1000]


def train_row(args, row, factor, seed):
    """The stages of a row that are not finished -> its model"""
    folder = folder_of(args, row, factor, seed)
    for number in range(len(ROWS[row][3])):
        last = run_trainer(folder / str(number), *stage_words(args, row, number, factor, seed))
    return open_model(last, torch.device("cpu"), "float32")


def try_rate(args, row, factor):
    """A row with one rate and the first seed, judged by questions that are not in the table -> rate.json"""
    print(f"{ROWS[row][0]}, rate x {factor:g}", flush=True)
    model = train_row(args, row, factor, args.seeds[0])
    files = [args.out / f"judge/held_out_{name}.json" for name in ("questions", "annotations")]
    score = evaluate(model, "exact", files, args.out / "judge/images", batch=64)["score"]
    write_json(folder_of(args, row, factor, args.seeds[0]) / "rate.json", {"questions": score})


def best_factor(args, row):
    """Of the row's system, by the questions that try_rate asked"""
    files = {factor: folder_of(args, ROWS[row][1], factor, args.seeds[0]) / "rate.json" for factor in FACTORS}
    tried = {factor: read_json(path)["questions"] for factor, path in files.items() if path.exists()}
    return max(tried, key=tried.get, default=FACTORS[0])  # before any try: a run that does not exist


def score_row(args, row, factor, seed):
    """A run for the table: trained, unless it is the one that tried this rate, and scored -> result.json"""
    print(f"{ROWS[row][0]}, seed {seed}", flush=True)
    model, folder = train_row(args, row, factor, seed), args.toy / "eval"
    scores, _ = score_answers(model, folder, args.limit)
    captions = evaluate(model, "statements", [folder / "held_out_captions.json"], folder, batch=64, limit=args.limit)
    asked = scores["held_out"]
    write_json(folder_of(args, row, factor, seed) / "result.json", {
        "questions": asked["score"], "no picture": scores["held_out_zeroed"]["score"],
        "another picture": scores["held_out_swapped"]["score"], "unseen pairs": scores["unseen_pair"]["score"],
        "captions": captions["score"], "existence F1": scores["existence"]["F1"],
        **{kind: asked["parts"].get(kind) for kind in KINDS}, "text perplexity": map_perplexity(model)})


def row_results(args, row):
    """The results of a row, for each seed"""
    return results_of(args, f"{row}-x{best_factor(args, row):g}")


# ---------------------------------------------------------------- costs

def count_flops(*words):
    """FLOPs of all products in a command of a trainer"""
    sys.argv = [str(word) for word in words if word != "-m"]
    with counted_flops() as counter:
        importlib.import_module(sys.argv[0].removesuffix(".py")).main()
    return counter.get_total_flops()


def training_costs(args, row):
    """FLOPs of all stages, from the second step of each, and the median seconds of 12 steps of the last"""
    factor, seed, flops = best_factor(args, row), args.seeds[0], 0
    with TemporaryDirectory() as new:
        for number in range(len(ROWS[row][3])):
            words = [*stage_words(args, row, number, factor, seed), "--warmup", 1]
            one, two = run_tasks(args, [(count_flops, *words, "--steps", steps, "--out", f"{new}/{number}-{steps}")
                                        for steps in (1, 2)])
            flops += (two - one) * len(read_log(folder_of(args, row, factor, seed) / f"{number}/log.jsonl"))
        run_trainer(Path(new) / "12", *words, "--steps", 12)
        seconds = [line["seconds"] for line in read_log(Path(new) / "12/log.jsonl")]
    return {"TFLOP of training": flops / 1e12, "seconds a step": statistics.median(seconds)}


def answering_times(models, args, turns=9):
    """{row: model} -> {row: [milliseconds until the first token of an answer about a picture], [tokens a second then]},
    in turns"""
    picture, times = args.toy / "eval/images/000000000000.png", {row: ([], []) for row in models}
    for _ in range(turns):
        for row in random.sample(list(models), len(models)):
            rate = Rate(models[row])
            answer(models[row], [(DESCRIBE, [picture])], rate=rate)
            times[row][0].append(1000 * rate.prefill)
            times[row][1].append(rate.written / rate.decoding)
    return {row: {name: statistics.median(values) for name, values in zip(("prefill ms", "tokens/s"), pair)}
            for row, pair in times.items()}


# ---------------------------------------------------------------- everything

def run_all(args):
    """Everything that is not finished, args.jobs tasks at a time"""
    fill(args.out / "judge", write_evaluation, args.judge, 1)
    systems = list(dict.fromkeys(ROWS[row][1] for row in args.rows))
    run_tasks(args, [(try_rate, args, system, factor) for factor in FACTORS for system in systems
                     if not (folder_of(args, system, factor, args.seeds[0]) / "rate.json").exists()])
    rows = [(row, best_factor(args, row), seed) for seed in args.seeds for row in args.rows]
    run_tasks(args, [(score_row, args, *row) for row in rows if not (folder_of(args, *row) / "result.json").exists()])
    path = args.out / "costs.json"
    known = read_json(path) if path.exists() else {}
    if set(args.rows) <= known.keys():
        return
    costs = {row: training_costs(args, row) for row in args.rows}
    models = {row: train_row(args, row, best_factor(args, row), args.seeds[0]) for row in args.rows}
    times = answering_times(models, args)
    write_json(path, known | {row: costs[row] | times[row] | {
        "M weights": sum(p.numel() for p in model.parameters()) / 1e6} for row, model in models.items()})


def table(args):
    """A line for each score, mean and standard deviation over the seeds, and for each cost"""
    rows, costs = [row for row in args.rows if row_results(args, row)], args.out / "costs.json"
    costs = read_json(costs) if costs.exists() else {}
    base = Llama.from_pretrained(args.toy / "llama").eval()
    base.tokenizers = SimpleNamespace(text=open_text(args.toy / "llama"))
    lines = [["", *(ROWS[row][0] for row in rows)]]
    lines += [[name, *(mean_cell(row_results(args, row), name, digits) for row in rows)]
              for name, digits in COLUMNS.items()]
    lines.append(["learning rates x", *(f"{best_factor(args, row):g}" for row in rows)])
    lines.append(["CLIP to answer", *("yes" if ROWS[row][2] else "no" for row in rows)])
    for name, digits in COSTS.items():
        lines.append([name, *(f"{costs[row][name]:,.{digits}f}" if row in costs else "-" for row in rows)])
    return lines, f"\nText perplexity of the LLaMA itself: {map_perplexity(base):.3f}\n"


def plot(args):
    """Right answers by kind, and the loss of answers while the chats are learned, in the same colours -> compare.png"""
    figure = new_figure(13, 4.5)
    bars, curves = figure.subplots(1, 2)
    shown, losses = [row for row in args.rows if row_results(args, row)], {}
    for n, row in enumerate(shown):
        results = row_results(args, row)
        means = np.array([[result[kind] for kind in KINDS] for result in results], dtype=float).mean(0)      # None: nan
        bars.bar(np.arange(len(KINDS)) + 0.8 * (n / len(shown) - 0.5), means, 0.8 / len(shown), label=ROWS[row][0])
        last = folder_of(args, row, best_factor(args, row), args.seeds[0]) / str(len(ROWS[row][3]) - 1)
        losses[ROWS[row][0]] = [line["text"] for line in read_log(last / "log.jsonl")]
    bars.set(xticks=range(len(KINDS)), xticklabels=KINDS, ylabel="right answers, held-out scenes")
    plot_curves(curves, losses, "step of the last stage", "loss of answers (nats per token)", window=10)
    curves.set(yscale="log")
    figure.savefig(args.out / "compare.png")


def main():
    parser = options(__doc__, "compare", ROWS)
    parser.add_argument("--steps", type=POSITIVE, default=400, help="of captions, and as many of chats")
    parser.add_argument("--judge", type=POSITIVE, default=400, help="questions that choose the learning rates")
    run_table(parser.parse_args(), run_all, table, plot)


if __name__ == "__main__":
    run(main)
