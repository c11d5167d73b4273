"""Score a model on the benchmarks of Tab. 5, from their own files, with the prompts of Tab. 6.

    python evaluate.py --task pope --data coco_pope_random.json coco_pope_popular.json --images val2014 --out pope.json
    torchrun --nproc_per_node=8 evaluate.py --task vqav2 --data questions.json annotations.json --images val2014 ...
    python evaluate.py --task exact --data runs/toy/eval/held_out_questions.json \\
        runs/toy/eval/held_out_annotations.json --images runs/toy/eval/images        # the toy world, by kind

Decoding is greedy, in rows that take the next question when an answer has ended; processes share the questions. Answers
are saved as they come: after an interruption the same command answers only what is missing. The result is one JSON with
the score, its parts and every answer. --blind asks about another question's picture or about none: it measures what the
words alone are worth.
"""
import argparse
import hashlib
import json
import os
import re
import time
import zlib
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from answering.batching import Rate
from answering.sampling import check_finite
from benchmarks import files as benchmarks
from benchmarks.scores import average
from common.cli import NATURAL, POSITIVE, TOY, Help, add_device_options, bounded, require_path, run, writable_file
from common.quantize import parts
from common.weights import UserError, name_in_errors, parse_json, write_json
from generate import answer_rows, encode_images
from model import Libra
from monolithic import open_model
from monolithic.shared import answer_loss
from streams import Streams
from text import expand_images
from training import engine

ONE_PROCESS = engine.Dist(0, 1, torch.device("cpu"), torch.float32)


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
    g.add_argument("--submission", metavar="FILE", help="answers in the server's format; for mme a folder")
    g = parser.add_argument_group("how")
    g.add_argument("--prompt", help="replaces every question; '' continues the picture as pretraining does, no chat")
    g.add_argument("--likelihood", action="store_true", help="answer with the choice whose text is the likeliest "
                   "answer to the question alone (SEED; base models)")
    g.add_argument("--blind", choices=("swapped", "zeroed"), help="another picture, or codes and signal of zero")
    g.add_argument("--batch", type=POSITIVE, default=32, help="questions answered at a time")
    g.add_argument("--limit", type=NATURAL, default=0, help="first N questions of each file only; 0: all")
    g.add_argument("--max-new-tokens", type=POSITIVE, default=128, help="most tokens of an answer")
    g.add_argument("--timeout", type=bounded(float, above=0, most=10 ** 6), default=7 * 24 * 60, metavar="MIN",
                   help="longest wait of a process for the others at the end; then a silent one counts as lost")
    add_device_options(g)
    return parser


def main():
    args = options().parse_args()
    file_groups = [[path] for path in args.data] if args.task == "pope" else [args.data]      # a score for each group
    check_options(args, file_groups)
    dist = engine.init_distributed(args.device, timeout=args.timeout)
    model, results = open_model(args.model, dist.device, args.dtype, args.weights, args.save), []
    rate, how = Rate(model), {"likelihood": args.likelihood, "max_new_tokens": args.max_new_tokens}
    about = how | {"model": str(args.model), "dtype": str(model.lm_head.weight.dtype), "weights": fingerprint(model)}
    for number, paths in enumerate(file_groups):
        submission = args.submission and Path(args.submission)
        if submission and len(file_groups) > 1:           # one for each file
            submission = submission.with_stem(f"{submission.stem}-{Path(paths[0]).stem}")
        results.append(evaluate(
            model, args.task, paths, args.images, args.prompt, args.blind, args.limit, args.batch, dist,
            args.out and f"{args.out}.{number}", submission, about, graphs=not args.no_graphs, rate=rate, **how))
    if dist.first:
        result = average(results) | {"data": args.data, "files": results} if len(results) > 1 else results[0]
        print(json.dumps({key: result[key] for key in result if key not in ("answers", "files")}, indent=2))
        print(f"| {args.task} | {result['metric']} | {result['score']} | {result['answered']} answers |\n{rate}")
        if args.out:
            write_json(args.out, result)
            for number in range(len(results)):
                for path in kept_files(f"{args.out}.{number}"):
                    path.unlink()                         # their answers are in the JSON now


def check_options(args, file_groups):
    """Finds mistakes before the model is loaded."""
    if args.likelihood and args.prompt == "":
        raise UserError("--likelihood compares answers to a question: it does not go with --prompt ''")
    inputs = [Path(require_path(path)).resolve() for path in args.data]
    outputs = [Path(path).resolve() for path in (args.out, args.submission) if path]
    for path in outputs:
        if path in inputs or outputs.count(path) > 1:
            raise UserError(f"{path} is --data too, or --out and --submission, and would be overwritten: name another")
    if args.submission:
        path, kind = Path(args.submission), "folder" if args.task == "mme" else "file"
        if path.exists() and path.is_dir() != (kind == "folder") or not path.parent.is_dir():
            raise UserError(f"--submission {path} cannot be written: expected a {kind}, in a folder that exists")
        if len({Path(paths[0]).stem for paths in file_groups}) < len(file_groups):
            raise UserError("--submission is a file for each of --data, named after it, and two of these have the same "
                            "name: rename one")
    for paths in file_groups if not outputs else ():
        items = benchmarks.read(args.task, args.images, *paths, limit=args.limit)
        if any(item["truth"] is None for item in items):
            raise UserError(f"{paths[0]}: no right answers in --data, so nothing is scored here, and without "
                            "--submission FILE or --out FILE the answers would be lost")


def evaluate(model, task, paths, images, prompt=None, blind=None, limit=0, batch=32, dist=ONE_PROCESS, kept=None,
             submission=None, about=None, **how):
    """-> {score, metric, parts, unparsed, answered, cut, ..., answers: [{id, answer}]}; cut: answers that end because
    the positions do

    dist: of engine.init_distributed, to share the questions among processes; kept: process R keeps its answers in
    `kept`.R.jsonl as they come; submission: a path; about: the model, for which kept answers are used; how: as
    answer_items takes it.
    """
    start, items = time.time(), benchmarks.read(task, images, *paths, limit=limit)
    benchmarks.import_scorer(task, items)
    shown = swapped_images(items) if blind == "swapped" else [item["image"] for item in items]
    question = "question_alone" if how.get("likelihood") else "question"
    asked = [item | {"image": image, "question": item[question] if prompt is None else prompt}
             for item, image in zip(items, shown)]
    settings = {"task": task, "data": [str(path) for path in paths], "prompt": prompt, "blind": blind,
                "decoding": "greedy", "limit": limit} | (about or {})
    answer = partial(answer_items, model, paths[0], batch=batch, zeroed=blind == "zeroed", **how)
    answers, cut = zip(*answer_all(answer, asked, dist, kept, settings))
    if submission and dist.first:
        benchmarks.write(task, submission, items, answers)
    return benchmarks.score(task, items, answers) | settings | {
        "answered": len(answers), "cut": sum(cut), "seconds": round(time.time() - start, 1),
        "answers": [{"id": item["id"], "answer": answer} for item, answer in zip(items, answers)]}


def answer_items(model, path, items, batch=32, likelihood=False, zeroed=False, **how):
    """Yields (number of an item, answer, whether the positions end before it) as answers end. path: the file of the
    questions, for errors; how: as answer_rows takes it, which has `batch` rows"""
    if likelihood:
        yield from ((n, likeliest_choice(model, item, zeroed), False) for n, item in enumerate(items))
        return
    rows = [(item["question"] or None, [item["image"]]) for item in items]
    names = [f"{path}, question {item['id']}" for item in items]
    for n, (words, _, cut) in answer_rows(model, rows, batch, names=names, zeroed=zeroed, **how):
        yield n, words, cut


@torch.inference_mode()
def likeliest_choice(model, item, zeroed=False):
    """The letter of the choice whose text, as the answer to the question, has the lowest mean loss"""
    if not item["choices"]:
        raise UserError("--likelihood needs a benchmark with choices")
    losses, picture = {}, Image.new("RGB", (64, 64)) if zeroed else item["image"]
    if isinstance(model, Libra):
        codes, signal = encode_images(model, [item["image"]], zeroed=zeroed)
    for letter, words in item["choices"].items():
        ids, loss_mask = model.tokenizers.text.chat([(item["question"], 1, words)])
        if isinstance(model, Libra):
            ids, loss_mask = expand_images(ids, loss_mask, codes, model.config)
            loss = model.loss(Streams.from_ids([ids], model.config, loss_mask=[loss_mask]).to(signal.device), signal)
        else:
            loss = answer_loss(model, ids, loss_mask, picture)
        losses[letter] = float(check_finite(loss))
    return min(losses, key=losses.get)


def swapped_images(items):
    """For each item the picture that follows its own among all pictures"""
    images = list(dict.fromkeys(item["image"] for item in items))
    if len(images) == 1:
        raise UserError("--blind swapped: all questions are about one picture")
    following = dict(zip(images, images[1:] + images[:1]))
    return [following[item["image"]] for item in items]


# ---------------------------------------------------------------- answers that outlast an interruption

def answer_all(answer_items, items, dist, path, settings):
    """Call answer_items on the items without a kept answer. -> [(answer, cut)] of all items"""
    asked = [what_is_asked(item) for item in items]
    answers = read_kept(path, settings) if path else {}
    missing = [n for n, key in enumerate(asked) if key not in answers][dist.rank::dist.size]
    if dist.size > 1:
        torch.distributed.barrier()                       # all have read the kept answers before one writes
    own_file = f"{path}.{dist.rank}.jsonl" if path else os.devnull
    with name_in_errors(own_file), open(own_file, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n" + json.dumps(settings) + "\n")    # the last line of an interrupted run may be incomplete
        new = answer_items([items[n] for n in missing])
        for number, words, cut in tqdm(new, settings["task"], len(missing), mininterval=5, disable=not dist.first):
            question, picture = key = asked[missing[number]]
            entry = {"question": question, "picture": picture, "answer": words, "cut": cut}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            answers[key] = words, cut
    answers = dict(engine.gather_lists(list(answers.items()), dist))
    return [answers[key] for key in asked]


def what_is_asked(item):
    """-> question and choices, picture with its size and time: an answer is kept with them, and used for them only"""
    image, words = item["image"], "\n".join([item["question"], *(item["choices"] or {}).values()])
    if isinstance(image, bytes):
        return words, f"{len(image)} bytes, {zlib.crc32(image)}"
    return words, f"{image}, {os.stat(image).st_size} bytes, {os.stat(image).st_mtime_ns}"


def kept_files(path):
    """`path`.0.jsonl, `path`.1.jsonl, ... of the processes of an interrupted run"""
    path = Path(path)
    return sorted(file for file in path.parent.iterdir()
                  if re.fullmatch(re.escape(path.name) + r"\.\d+\.jsonl", file.name))


def read_kept(path, settings):
    """-> {(question, picture): (answer, cut)} of interrupted runs. A UserError if a file has other settings"""
    answers = {}
    for file in kept_files(path):
        is_ours = False
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = parse_json(line)
            except ValueError:                            # empty, or the last line of an interrupted run
                continue
            if not is_ours or not isinstance(entry, dict) or "answer" not in entry:
                if entry != settings:
                    raise UserError(f"{file} holds answers to {str(entry)[:500]}, this is {settings}: remove it or "
                                    "name another --out")
                is_ours = True
            elif all(isinstance(entry.get(name), str) for name in ("question", "picture", "answer")):
                answers[entry["question"], entry["picture"]] = entry["answer"], bool(entry.get("cut"))
    return answers


def fingerprint(model):
    """A few letters that change with the weights, the configuration or a tokenizer, and with nothing else"""
    digest = hashlib.sha256(repr(getattr(model, "halves", model.config)).encode())
    digest.update(model.tokenizers.text.path.read_bytes() + model.tokenizers.text.template.encode())
    for module in filter(None, (model, model.tokenizers.image)):
        for name, tensor in parts(module.state_dict()).items():
            # The sum of all bits is the same in every order.
            bits = tensor.flatten().view(torch.int16 if tensor.itemsize > 1 else torch.int8)
            digest.update(f"{name} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    run(main)
