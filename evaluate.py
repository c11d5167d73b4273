"""Score a model on the benchmarks of Tab. 5, from their own files, with the prompts of Tab. 6.

    python evaluate.py --task pope --data coco_pope_random.json coco_pope_popular.json --images val2014 --out pope.json
    torchrun --nproc_per_node=8 evaluate.py --task vqav2 --data questions.json annotations.json --images val2014 ...
    python evaluate.py --task exact --data runs/toy/eval/held_out_questions.json \\
        runs/toy/eval/held_out_annotations.json --images runs/toy/eval/images        # the toy world, by kind

Greedy decoding in batches, shared out among the processes. Answers are kept as they come: broken off, the same command
answers only what is missing. The result is one JSON with score, parts and every answer. --blind asks the same with
another question's picture or with none: what the words alone are worth.
"""
import argparse
import glob
import io
import json
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import benchmarks
import engine
import scores
from benchmarks import TASKS
from command import DTYPES, NATURAL, POSITIVE, TOY, Help, need, run, target
from generation import generate, see
from model import Libra
from streams import Streams
from text import IMG, spell_out
from weights import UserError, write_json


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    g = parser.add_argument_group("what")
    g.add_argument("--model", metavar="DIR", default=TOY / "sft", help="model folder")
    g.add_argument("--task", choices=list(TASKS), required=True,
                   help="a benchmark; exact, statements: the toy world's questions and captions")
    g.add_argument("--data", metavar="FILE", nargs="+", required=True,
                   help="its file, or questions and annotations; for pope each of several is scored, and their mean")
    g.add_argument("--images", metavar="DIR", default=".", help="folder of the pictures")
    g.add_argument("--out", type=target, metavar="FILE", help="JSON with score, parts and answers")
    g.add_argument("--submission", type=target, metavar="FILE",
                   help="the answers in the form that the benchmark's server reads")
    g = parser.add_argument_group("how")
    g.add_argument("--prompt", help="instead of the question's or caption's own words; '' continues the picture "
                   "without the chat template, as pretraining does")
    g.add_argument("--likelihood", action="store_true",
                   help="choose the likeliest of the choices' texts instead of reading a letter (SEED; base models)")
    g.add_argument("--blind", choices=("swapped", "zeroed"), help="another picture, or codes and signal of zero")
    g.add_argument("--batch", type=POSITIVE, default=32, help="questions answered at a time")
    g.add_argument("--limit", type=NATURAL, default=0, help="first N questions of each file only; 0: all")
    g.add_argument("--max-new-tokens", type=POSITIVE, default=128, help="most tokens of an answer")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--dtype", choices=list(DTYPES), help="None: bfloat16 on a GPU, else float32")
    return parser


def main():
    args = options().parse_args()
    if args.likelihood and args.prompt == "":
        raise UserError("--likelihood compares answers to a question: it does not go with --prompt ''")
    taken = [Path(need(path)).resolve() for path in args.data]
    for path in filter(None, (args.out, args.submission)):
        if Path(path).resolve() in taken:
            raise UserError(f"{path} is --data too, or --out and --submission, and would be overwritten: name another")
        taken.append(Path(path).resolve())
    each = [[path] for path in args.data] if args.task == "pope" else [args.data]
    # said before the model is loaded, hence read here too where nothing will be kept
    read = (item for paths in each for item in benchmarks.read(args.task, args.images, *paths)[:args.limit or None])
    if not (args.out or args.submission) and any(item["truth"] is None for item in read):
        raise UserError(f"{args.data[0]}: no right answers in --data, so nothing is scored here, and without "
                        "--submission FILE or --out FILE the answers would be lost")
    world = engine.join(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if world.device.type == "cuda" else "float32")]
    model = Libra.from_pretrained(need(args.model), dtype=dtype, device=world.device).eval()
    about = {"model": str(args.model), "dtype": str(dtype), "max_new_tokens": args.max_new_tokens}
    results = []
    for n, paths in enumerate(each):
        submission = args.submission and Path(args.submission)
        if submission and len(each) > 1:                  # one for each file
            submission = submission.with_stem(f"{submission.stem}-{Path(paths[0]).stem}")
        results.append(evaluate(model, args.task, paths, args.images, args.prompt, args.blind, args.batch, args.limit,
                                args.likelihood, args.max_new_tokens, args.out and f"{args.out}.{n}", world,
                                submission, about))
    if not world.first:
        return
    result = scores.average(results) | {"files": results} if len(results) > 1 else results[0]
    result |= about
    print(json.dumps({key: value for key, value in result.items() if key not in ("answers", "files")}, indent=2))
    print(f"| {args.task} | {result['metric']} | {result['score']} | {result['answered']} answers |")
    if args.out:
        write_json(args.out, result)
        for path in kept_files(args.out):
            path.unlink()                                 # what they kept is in the JSON now


def evaluate(model, task, paths, images, prompt=None, blind=None, batch=32, limit=0, likelihood=False,
             max_new_tokens=128, keep=None, world=None, submission=None, about=None):
    """-> {score, metric, parts, unparsed, answered, ..., answers}. keep: where answers are kept until all are there,
    `keep`.RANK.jsonl for each process; world: of engine.join, to share the work; about: what else must be the same for
    kept answers to count."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    items = benchmarks.read(task, images, *paths)[:limit or None]
    about = {"task": task, "data": [str(path) for path in paths], "prompt": prompt, "blind": blind,
             "likelihood": likelihood, "decoding": "greedy", "limit": limit} | (about or {})
    began, answers = time.time(), kept(keep, about)
    todo = [n for n in range(len(items)) if n not in answers][rank::size]
    if size > 1:
        dist.barrier()                                    # all have read before one writes
    with open(f"{keep}.{rank}.jsonl" if keep else "/dev/null", "a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")
        for start in tqdm(range(0, len(todo), batch), desc=f"{task} {blind or ''}", mininterval=5, disable=rank > 0):
            numbers = todo[start:start + batch]
            some = [items[n] for n in numbers]
            shown = [another(items, n) for n in numbers] if blind == "swapped" else some
            words = [item["question"] if prompt is None else prompt for item in some]
            pictures = [io.BytesIO(item["image"]) if isinstance(item["image"], bytes) else item["image"]
                        for item in shown]
            try:
                said = (likeliest(model, words, pictures, [item["choices"] for item in some], blind == "zeroed")
                        if likelihood else reply(model, words, pictures, blind == "zeroed", max_new_tokens))
            except UserError as error:
                raise UserError(f"{paths[0]}: {error}; among the questions "
                                + ", ".join(str(item["id"]) for item in some)) from None
            for n, answer in zip(numbers, said):
                answers[n] = answer
                file.write(json.dumps({"n": n, "answer": answer}, ensure_ascii=False) + "\n")
            file.flush()
    if size > 1:
        everyone = [None] * size
        dist.all_gather_object(everyone, answers)
        answers = {n: answer for some in everyone for n, answer in some.items()}
    said = [answers[n] for n in range(len(items))]
    if submission and rank == 0:
        benchmarks.write(task, submission, items, said)
    return benchmarks.score(task, items, said) | about | {
        "answered": len(said), "seconds": round(time.time() - began, 1),
        "answers": [{"id": item["id"], "answer": answer} for item, answer in zip(items, said)]}


def another(items, n):
    """The next question whose picture is another one"""
    for m in range(n + 1, n + len(items)):
        if items[m % len(items)]["image"] != items[n]["image"]:
            return items[m % len(items)]
    raise UserError("--blind swapped: all questions are about one picture")


def kept_files(stem):
    return sorted(Path(stem).parent.glob(glob.escape(Path(stem).name) + ".*.jsonl"))


def kept(keep, about):
    """Answers of runs that were broken off: {number: answer}. Those of other questions or settings are refused."""
    answers = {}
    for path in kept_files(keep) if keep else []:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:                            # the line that was being written when the run ended
                continue
            if "n" in entry:
                answers[entry["n"]] = entry["answer"]
            elif entry != about:
                raise UserError(f"{path} holds answers to {entry}, this is {about}: remove it, or name another --out")
    return answers


def look(model, images, zeroed):
    """-> codes, signal of the pictures; zeroed: all of it zero, for a model that must answer blind"""
    return tuple(torch.zeros_like(x) if zeroed else x for x in see(model, images))


def prompts_of(model, questions, images, zeroed=False):
    """-> prompts as generate takes them, signal. '' continues the picture as pretraining does."""
    text, (codes, signal) = model.tokenizers.text, look(model, images, zeroed)
    rows = [text.chat([(question, 1, None)])[0] if question else [text.bos, IMG, text.newline]
            for question in questions]
    return [spell_out(ids, [0] * len(ids), [code], model.config)[0] for ids, code in zip(rows, codes)], signal


def reply(model, questions, images, zeroed=False, max_new_tokens=128):
    """A batch of questions, each about one picture -> answers"""
    text = model.tokenizers.text
    prompts, signal = prompts_of(model, questions, images, zeroed)
    rows = torch.stack([t[:, 0] for t in generate(model, prompts, signal, max_new_tokens, text.eos)], dim=1)
    return [text.decode(row) for row in rows.tolist()]


@torch.inference_mode()
def likeliest(model, questions, images, choices, zeroed=False):
    """For each question the letter of the choice whose text has the least mean loss as the answer"""
    letters, (codes, signal) = [], look(model, images, zeroed)
    for question, code, seen, some in zip(questions, codes, signal, choices):
        if not some:
            raise UserError("--likelihood needs a benchmark with choices")
        rows = [spell_out(*model.tokenizers.text.chat([(question, 1, words)]), [code], model.config)
                for words in some.values()]
        streams = Streams.of([ids for ids, _ in rows], model.config, counted=[counted for _, counted in rows])
        streams = streams.to(seen.device)
        hidden = model.hidden(streams, seen.expand(len(rows), -1, -1))[0]
        at = streams.text_rows
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[at]).float(), streams.text_ids[at + 1],
                                                 reduction="none")
        row = streams.text_at[at] // streams.length
        means = [loss[row == n].mean() for n in range(len(rows))]
        letters.append(list(some)[int(torch.stack(means).argmin())])
    return letters


# ---------------------------------------------------------------- the toy world's rules

def score_exact(items, answers):
    """Exact match, overall and by the parts of question_type ('colour/2')"""
    kinds = [item["kinds"][-1] for item in items]
    split = [item | {"kinds": [kind, *kind.split("/")]} for item, kind in zip(items, kinds)]
    return scores.score_each("exact match", lambda answer, truth: scores.gqa_match(answer, truth[0]),
                             split, answers)


def score_statements(items, answers):
    """Share of captions of which every stated thing is true; part: of those that name all things. Statements are what
    stands between 'and': in the toy world's captions a thing's words and its place make up a statement."""
    truths = [item["truth"][0].split(" and ") for item in items]
    stated = [[part.strip() for part in answer.split(" and ")] for answer in answers]
    named = [sorted(some) == sorted(truth) for some, truth in zip(stated, truths)]
    result = scores.result("captions wholly true", items, [
        float(all(holds(part, truth) for part in some)) for some, truth in zip(stated, truths)])
    return result | {"parts": {"all named": sum(named) / len(named)}}


def holds(statement, truth):
    """A thing with its place as the truth has it; or 'A left of B', right where both stand so"""
    match = re.fullmatch(r"(a \w+ \w+ \w+) (left of|right of|above|below) (a \w+ \w+ \w+)", statement)
    if not match:
        return statement in truth
    places = {part.split(" in the ")[0]: part.split(" in the ")[1] for part in truth}
    if match[1] not in places or match[3] not in places:
        return False
    (ya, xa), (yb, xb) = (places[match[i]].split() for i in (1, 3))
    row, column = (xa, xb) if ya == yb else None, (ya, yb) if xa == xb else None
    return {"left of": row == ("left", "right"), "right of": row == ("right", "left"),
            "above": column == ("top", "bottom"), "below": column == ("bottom", "top")}[match[2]]


_, WORD, _, ANSWERS, PLAIN = TASKS["vqav2"]
TASKS["exact"] = (benchmarks.read_vqa, WORD, score_exact, ANSWERS, PLAIN)
TASKS["statements"] = (benchmarks.read_captions, "Describe the image.", score_statements, benchmarks.CAPTIONS, ("{}",))


if __name__ == "__main__":
    run(main)
