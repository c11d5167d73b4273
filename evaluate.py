"""Score a model on questions, yes/no probes and captions, from the files of the public benchmarks.

    python evaluate.py --task vqa --data runs/toy/eval/held_out_questions.json \\
        --annotations runs/toy/eval/held_out_annotations.json --images runs/toy/eval/images --out vqa.json
    python evaluate.py --task pope --data runs/toy/eval/held_out_pope.json --images runs/toy/eval/images
    python evaluate.py --task caption --data runs/toy/eval/held_out_captions.json --images runs/toy/eval

Greedy decoding, one JSON with the score, its parts and every answer. --blind swapped or zeroed asks the same with
another question's picture or with none at all: what the words alone are worth.
"""
import argparse
import json
import re
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import engine
from engine import TOY, need
from generation import generate, see
from model import Libra
from text import IMG, spell_out
from weights import UserError, read_json, write_json

PROMPTS = {"vqa": "Answer the question using a single word or phrase.",                       # Tab. 6
           "pope": "Answer the question using a single word or phrase.", "caption": None}


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=engine.Help)
    parser.add_argument("--model", metavar="DIR", default=TOY / "sft", help="model folder")
    parser.add_argument("--task", choices=list(PROMPTS), required=True,
                        help="vqa: exact match with VQAv2-style annotations; pope: yes/no; caption: COCO style")
    parser.add_argument("--data", metavar="FILE", required=True, help="the questions, or captions with their images")
    parser.add_argument("--annotations", metavar="FILE", help="the answers, for --task vqa")
    parser.add_argument("--images", metavar="DIR", required=True, help="folder of the pictures")
    parser.add_argument("--prompt", help="ask captions with these words in the chat template; None: as pretrained")
    parser.add_argument("--blind", choices=("swapped", "zeroed"), help="another picture, or codes and signal of zero")
    parser.add_argument("--batch", type=int, default=32, help="questions answered at a time")
    parser.add_argument("--limit", type=int, default=0, help="first N questions only; 0: all")
    parser.add_argument("--out", metavar="FILE", help="JSON with score, parts and answers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    return parser


def main():
    args = options().parse_args()
    if args.task == "vqa" and not args.annotations:
        raise UserError("--task vqa needs --annotations FILE")
    model = Libra.from_pretrained(need(args.model), dtype=torch.float32, device=args.device).eval()
    result = evaluate(model, args.task, args.data, args.images, args.annotations, args.prompt, args.blind, args.batch,
                      args.limit)
    print(json.dumps({key: value for key, value in result.items() if key != "answers"}, indent=2))
    if args.out:
        write_json(args.out, result)


def evaluate(model, task, data, images, annotations=None, prompt=None, blind=None, batch=32, limit=0):
    """-> {score, parts, answered, seconds, answers, ...}"""
    read = {"vqa": read_vqa, "pope": read_pope, "caption": read_captions}[task]
    items = read(data, images, annotations)[:limit or None]
    if not items:
        raise UserError(f"{data}: no questions in it")
    began, answers = time.time(), []
    for start in tqdm(range(0, len(items), batch), desc=f"{task} {blind or ''}", mininterval=5):
        some = items[start:start + batch]
        shown = items[start + 1:start + 1 + len(some)] if blind == "swapped" else some
        shown = (shown + items)[:len(some)]               # the last one borrows the first one's picture
        words = [prompt if task == "caption" else f"{item['question']}\n{PROMPTS[task]}" for item in some]
        answers += reply(model, words, [item["image"] for item in shown], blind == "zeroed")
    result = {"vqa": score_exact, "pope": score_pope, "caption": score_attributes}[task](items, answers)
    return result | {"task": task, "data": str(data), "blind": blind, "prompt": prompt or PROMPTS.get(task),
                     "decoding": "greedy", "answered": len(answers), "seconds": round(time.time() - began, 1),
                     "answers": [{"id": item["id"], "answer": answer} for item, answer in zip(items, answers)]}


def reply(model, questions, images, zeroed=False, max_new_tokens=96):
    """A batch of questions, each about one picture; None continues the picture as pretraining does. -> answers"""
    text = model.tokenizers.text
    codes, signal = see(model, images)
    if zeroed:
        codes, signal = torch.zeros_like(codes), torch.zeros_like(signal)
    prompts = []
    for question, code in zip(questions, codes):
        ids = [text.bos, IMG, text.newline] if question is None else text.chat([(question, 1, None)])[0]
        prompts.append(spell_out(ids, [0] * len(ids), [code], model.config)[0])
    rows = torch.stack([t[:, 0] for t in generate(model, prompts, signal, max_new_tokens, text.eos)], dim=1)
    return [text.decode(row) for row in rows.tolist()]


# ---------------------------------------------------------------- files and scores

def find_image(folder, *names):
    found = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    if not found:
        raise UserError(f"{Path(folder) / names[0]}: no such picture; --images names the folder of the pictures")
    return found[0]


def read_vqa(path, images, annotations):
    answers = {entry["question_id"]: entry for entry in read_json(annotations)["annotations"]}
    items = []
    for entry in read_json(path)["questions"]:
        if entry["question_id"] not in answers:
            raise UserError(f"{annotations}: no answer to question {entry['question_id']} of {path}")
        number, truth = entry["image_id"], answers[entry["question_id"]]
        items.append({"id": entry["question_id"], "question": entry["question"], "kind": truth["question_type"],
                      "truth": truth["multiple_choice_answer"],
                      "image": find_image(images, f"{number:012d}.png", f"{number:012d}.jpg")})
    return items


def read_pope(path, images, _):
    items = []
    for number, line in enumerate(Path(need(path)).read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            items.append({"id": entry["question_id"], "question": entry["text"], "truth": entry["label"],
                          "image": find_image(images, entry["image"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: expected question_id, image, text, label ({error!r})") from None
    return items


def read_captions(path, images, _):
    return [{"id": entry["image_id"], "image": find_image(images, entry["image"]), "truth": entry["caption"]}
            for entry in read_json(path, list)]


def score_exact(items, answers):
    """Exact match, overall and by the parts of question_type ('colour/2')"""
    hits = defaultdict(list)
    for item, answer in zip(items, answers):
        right = answer.strip().rstrip(".").lower() == item["truth"].lower()
        for part in {"all", item["kind"], *item["kind"].split("/")}:
            hits[part].append(right)
    parts = {part: sum(rights) / len(rights) for part, rights in sorted(hits.items())}
    return {"score": parts.pop("all"), "metric": "exact match", "parts": parts}


def score_pope(items, answers):
    """POPE's rule: the first sentence without commas; No, not or no make it a no. Positive is yes."""
    words = [set(re.split(r"\W+", answer.split(".")[0].replace(",", ""))) for answer in answers]
    said = [not {"No", "not", "no"} & some for some in words]
    truth = [item["truth"] == "yes" for item in items]
    hits = sum(a and b for a, b in zip(said, truth))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(truth))
    return {"score": 2 * precision * recall / max(1e-9, precision + recall), "metric": "F1",
            "parts": {"accuracy": sum(a == b for a, b in zip(said, truth)) / len(truth), "precision": precision,
                      "recall": recall, "yes": sum(said) / len(said)}}


def score_attributes(items, answers):
    """Share of captions of which every stated thing is true, and of those that name all things. Statements are what
    stands between 'and': the toy world's captions, where a thing's words and place make up a statement."""
    true, full = [], []
    for item, answer in zip(items, answers):
        truth = item["truth"][0].split(" and ")
        stated = [part.strip() for part in answer.split(" and ")]
        true.append(all(holds(part, truth) for part in stated))
        full.append(sorted(stated) == sorted(truth))
    return {"score": sum(true) / len(true), "metric": "captions wholly true",
            "parts": {"all named": sum(full) / len(full)}}


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


if __name__ == "__main__":
    engine.run(main)
