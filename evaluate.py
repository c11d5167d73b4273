"""Score a model on the benchmarks of Tab. 5, from their own files, with the prompts of Tab. 6.

    python evaluate.py --task pope --data coco_pope_random.json coco_pope_popular.json --images val2014 --out pope.json
    torchrun --nproc_per_node=8 evaluate.py --task vqav2 --data questions.json annotations.json --images val2014 ...
    python evaluate.py --task exact --data runs/toy/eval/held_out_questions.json \\
        runs/toy/eval/held_out_annotations.json --images runs/toy/eval/images        # the toy world, by kind

Decoding is greedy, in batches, shared among the processes. Answers are saved as they come: after an interruption the
same command answers only what is missing. The result is one JSON with the score, its parts and every answer. --blind
asks about another question's picture or about none: it measures what the words alone are worth.
"""
import argparse
import glob
import io
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import files as benchmarks
from benchmarks.scores import average
from common.cli import DTYPES, NATURAL, POSITIVE, TOY, Help, require_path, run, writable_file
from common.weights import UserError, write_json
from generate import encode_images, generate
from model import Libra
from streams import Streams
from text import IMG, expand_images
from training import engine


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    g = parser.add_argument_group("what")
    g.add_argument("--model", metavar="DIR", default=TOY / "sft", help="model folder")
    g.add_argument("--task", choices=list(benchmarks.TASKS), required=True,
                   help="a benchmark; exact, statements: the toy world's questions and captions")
    g.add_argument("--data", metavar="FILE", nargs="+", required=True,
                   help="its file, or questions and annotations; for pope each of several is scored, and their mean")
    g.add_argument("--images", metavar="DIR", default=".", help="folder of the pictures")
    g.add_argument("--out", type=writable_file, metavar="FILE", help="JSON with score, parts and answers")
    g.add_argument("--submission", type=writable_file, metavar="FILE", help="the answers in the server's format")
    g = parser.add_argument_group("how")
    g.add_argument("--prompt", help="replaces every question; '' continues the picture as pretraining does, no chat")
    g.add_argument("--likelihood", action="store_true", help="answer with the likeliest choice (SEED; base models)")
    g.add_argument("--blind", choices=("swapped", "zeroed"), help="another picture, or codes and signal of zero")
    g.add_argument("--batch", type=POSITIVE, default=32, help="questions answered at a time")
    g.add_argument("--limit", type=NATURAL, default=0, help="first N questions of each file only; 0: all")
    g.add_argument("--max-new-tokens", type=POSITIVE, default=128, help="most tokens of an answer")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--dtype", choices=list(DTYPES), help="None: bfloat16 on a GPU, else float32")
    return parser


def main():
    args = options().parse_args()
    file_groups = [[path] for path in args.data] if args.task == "pope" else [args.data]      # a score for each group
    check_options(args, file_groups)
    dist = engine.init_distributed(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if dist.device.type == "cuda" else "float32")]
    model = Libra.from_pretrained(require_path(args.model), dtype=dtype, device=dist.device).eval()
    settings = {"model": str(args.model), "dtype": str(dtype), "max_new_tokens": args.max_new_tokens}
    results = []
    for number, paths in enumerate(file_groups):
        submission = args.submission and Path(args.submission)
        if submission and len(file_groups) > 1:           # one for each file
            submission = submission.with_stem(f"{submission.stem}-{Path(paths[0]).stem}")
        results.append(evaluate(model, args.task, paths, args.images, args.prompt, args.blind, args.batch, args.limit,
                                args.likelihood, args.max_new_tokens, dist, args.out and f"{args.out}.{number}",
                                submission, settings))
    if dist.first:
        result = average(results) | {"files": results} if len(results) > 1 else results[0]
        print(json.dumps({key: result[key] for key in result if key not in ("answers", "files")}, indent=2))
        print(f"| {args.task} | {result['metric']} | {result['score']} | {result['answered']} answers |")
        if args.out:
            write_json(args.out, result)
            for path in saved_files(args.out):
                path.unlink()                             # their answers are in the JSON now


def check_options(args, file_groups):
    """Finds mistakes before the model is loaded."""
    if args.likelihood and args.prompt == "":
        raise UserError("--likelihood compares answers to a question: it does not go with --prompt ''")
    inputs = [Path(require_path(path)).resolve() for path in args.data]
    outputs = [Path(path).resolve() for path in (args.out, args.submission) if path]
    for path in outputs:
        if path in inputs or outputs.count(path) > 1:
            raise UserError(f"{path} is --data too, or --out and --submission, and would be overwritten: name another")
    for paths in [] if args.out or args.submission else file_groups:
        items = benchmarks.read(args.task, args.images, *paths)[:args.limit or None]
        if any(item["truth"] is None for item in items):
            raise UserError(f"{paths[0]}: no right answers in --data, so nothing is scored here, and without "
                            "--submission FILE or --out FILE the answers would be lost")


def evaluate(model, task, paths, images, prompt=None, blind=None, batch=32, limit=0, likelihood=False,
             max_new_tokens=128, dist=None, saved=None, submission=None, settings=None):
    """-> {score, metric, parts, unparsed, answered, ..., answers: [{id, answer}]}

    dist: of engine.init_distributed, to share the questions among processes; saved: process R saves its answers in
    `saved`.R.jsonl as they come; submission: a path; settings: what else must be equal for saved answers to be used.
    """
    start, items = time.time(), benchmarks.read(task, images, *paths)[:limit or None]
    shown = swapped_images(items) if blind == "swapped" else [item["image"] for item in items]

    def answer_batch(numbers):
        questions = [items[n]["question"] if prompt is None else prompt for n in numbers]
        pictures, zeroed = [shown[n] for n in numbers], blind == "zeroed"
        try:
            if likelihood:
                return likeliest_choices(model, questions, pictures, [items[n]["choices"] for n in numbers], zeroed)
            return reply(model, questions, pictures, zeroed, max_new_tokens)
        except UserError as error:
            ids = ", ".join(str(items[n]["id"]) for n in numbers)
            raise UserError(f"{paths[0]}: {error}; among the questions {ids}") from None

    settings = {"task": task, "data": [str(path) for path in paths], "prompt": prompt, "blind": blind,
                "likelihood": likelihood, "decoding": "greedy", "limit": limit} | (settings or {})
    answers = answer_all(answer_batch, len(items), batch, dist, saved, settings)
    if submission and (dist is None or dist.first):
        benchmarks.write(task, submission, items, answers)
    return benchmarks.score(task, items, answers) | settings | {
        "answered": len(answers), "seconds": round(time.time() - start, 1),
        "answers": [{"id": item["id"], "answer": answer} for item, answer in zip(items, answers)]}


def answer_all(answer_batch, count, batch, dist, saved, settings):
    """Call answer_batch(numbers) on the questions 0 to count - 1 that have no saved answer. -> all answers, in order"""
    rank, size = (dist.rank, dist.size) if dist else (0, 1)
    answers = read_saved(saved, settings)
    missing = [n for n in range(count) if n not in answers][rank::size]
    if size > 1:
        torch.distributed.barrier()                       # all have read the saved answers before one writes
    with open(f"{saved}.{rank}.jsonl" if saved else os.devnull, "a", encoding="utf-8") as file:
        file.write(json.dumps(settings) + "\n")
        for i in tqdm(range(0, len(missing), batch), desc=settings["task"], mininterval=5, disable=rank > 0):
            numbers = missing[i:i + batch]
            for n, answer in zip(numbers, answer_batch(numbers)):
                answers[n] = answer
                file.write(json.dumps({"n": n, "answer": answer}, ensure_ascii=False) + "\n")
            file.flush()
    if size > 1:
        gathered = [None] * size
        torch.distributed.all_gather_object(gathered, answers)
        answers = {n: answer for part in gathered for n, answer in part.items()}
    return [answers[n] for n in range(count)]


def saved_files(path):
    return sorted(Path(path).parent.glob(glob.escape(Path(path).name) + ".*.jsonl"))


def read_saved(path, settings):
    """The answers of interrupted runs: {number: answer}. A UserError if they belong to other settings."""
    answers = {}
    for file in saved_files(path) if path else []:
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:                            # the last line of an interrupted run may be incomplete
                continue
            if "n" in entry:
                answers[entry["n"]] = entry["answer"]
            elif entry != settings:
                raise UserError(f"{file} holds answers to {entry}, this is {settings}: remove it or name another --out")
    return answers


def swapped_images(items):
    """For each item the image of the next item that has a different one"""
    images, swapped = [item["image"] for item in items], []
    if len(set(images)) == 1:
        raise UserError("--blind swapped: all questions are about one picture")
    for n, image in enumerate(images):
        following = (images[(n + shift) % len(images)] for shift in range(1, len(images)))
        swapped.append(next(other for other in following if other != image))
    return swapped


def encode(model, images, zeroed):
    """-> codes, signal of image paths or files' bytes; zeroed: zeros instead, so that the model answers blind"""
    images = [io.BytesIO(image) if isinstance(image, bytes) else image for image in images]
    return tuple(torch.zeros_like(x) if zeroed else x for x in encode_images(model, images))


def reply(model, questions, images, zeroed=False, max_new_tokens=128):
    """Answer a batch of questions, each about one image. '' continues the image without a chat, as in pretraining."""
    text, (codes, signal), prompts = model.tokenizers.text, encode(model, images, zeroed), []
    for question, image_codes in zip(questions, codes):
        ids = text.chat([(question, 1, None)])[0] if question else [text.bos, IMG, text.newline]
        prompts.append(expand_images(ids, [0] * len(ids), [image_codes], model.config)[0])
    steps = [tokens[:, 0] for tokens in generate(model, prompts, signal, max_new_tokens, text.eos)]
    return [text.decode(ids) for ids in torch.stack(steps, dim=1).tolist()]


@torch.inference_mode()
def likeliest_choices(model, questions, images, choices, zeroed=False):
    """For each question the letter of the choice {letter: text} whose text as the answer has the lowest mean loss"""
    letters, (codes, signal) = [], encode(model, images, zeroed)
    for n, question in enumerate(questions):
        if not choices[n]:
            raise UserError("--likelihood needs a benchmark with choices")
        losses = {}
        for letter, answer in choices[n].items():
            chat = model.tokenizers.text.chat([(question, 1, answer)])
            ids, loss_mask = expand_images(*chat, [codes[n]], model.config)
            streams = Streams.from_ids([ids], model.config, loss_mask=[loss_mask]).to(signal.device)
            losses[letter] = float(model.loss(streams, signal[n:n + 1]))
        letters.append(min(losses, key=losses.get))
    return letters


if __name__ == "__main__":
    run(main)
