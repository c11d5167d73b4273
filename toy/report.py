"""The toy world's report: every number of a finished demo as JSON, and a figure of what the model can do.

    python -m toy.report                      # reads runs/toy, writes runs/toy/report.json and runs/toy/report.png
    python -m toy.report --mean runs/toy runs/toy/seed1 runs/toy/seed2          # finished reports: mean and range

It scores answers by kind of question and number of objects, with blind baselines, and captions. The world's own
detector judges drawings, completions and reconstructions. Beside each number stands the bar that it should reach.
"""
import argparse
import textwrap
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.scores import gqa_match
from common.cli import NATURAL, SEED, TOY, Help, require_path, run
from common.plots import new_figure, plot_curves, show_pictures
from common.weights import parse_json, read_folder, read_json, read_text, write_json
from evaluate import evaluate
from generate import answer, complete, draw, reconstruct
from model import Libra
from tokenizer import prepare, to_picture, to_rgb
from toy import world


def score_answers(model, folder, limit):
    """Exact match on held-out scenes, two blind baselines, unseen pairs; existence as POPE. -> scores, answers"""
    scores, answers = {}, []
    for split, blind in (("held_out", None), ("held_out", "swapped"), ("held_out", "zeroed"), ("unseen_pair", None)):
        files = [folder / f"{split}_{name}.json" for name in ("questions", "annotations")]
        result = evaluate(model, "exact", files, folder / "images", blind=blind, batch=64, limit=limit)
        scores[f"{split}_{blind}" if blind else split] = {"score": result["score"], "parts": result["parts"]}
        answers.append(result["answers"])
    pope = evaluate(model, "pope", [folder / "held_out_pope.json"], folder / "images", batch=64, limit=limit)
    return scores | {"existence": pope["parts"]}, answers[0]


def score_reconstructions(tokenizer, count, seed):
    """PSNR, the share of attributes that the detector still finds, and how the codes are used"""
    random = np.random.default_rng([seed, 20])
    source, hits, errors, n_objects = world.scenes(random, "held out"), Counter(), [], 0
    used = torch.zeros(tokenizer.config.num_codebooks, tokenizer.config.codebook_size)
    for _ in range(count // 50):
        scenes = [next(source) for _ in range(50)]
        pixels = torch.stack([prepare(Image.fromarray(world.render(scene, random)), world.SIDE) for scene in scenes])
        codes, _ = tokenizer.encode(pixels)
        drawn = tokenizer.decode(codes).clamp(-1, 1)
        errors += (drawn - to_rgb(pixels)).square().mean((1, 2, 3)).tolist()
        for codebook, counts in enumerate(used):
            counts += torch.bincount(codes[..., codebook].flatten(), minlength=len(counts))
        n_objects += sum(map(len, scenes))
        for scene, rgb in zip(scenes, drawn):
            cells = world.detect(np.asarray(to_picture(rgb)))
            for obj in scene:
                for i, attribute in enumerate(("size", "colour", "shape")):
                    hits[f"drawn_{attribute}"] += cells[obj[3]][i] == obj[i]
    share = used / used.sum(-1, keepdim=True)
    return {name: n / n_objects for name, n in hits.items()} | {
        "psnr": float(10 * torch.log10(4 / torch.tensor(errors)).mean()),
        "codes": tokenizer.config.codebook_size, "codes_used": (used > 0).float().mean(1).tolist(),
        "perplexity": torch.exp(-(share * share.clamp(min=1e-9).log()).sum(-1)).tolist()}


def score_drawings(model, count, seed):
    """Draw 'a large red circle in the top left': does the detector find it? -> scores, captions, pictures"""
    random, objects, hits = np.random.default_rng([seed, 21]), [], Counter()
    while len(objects) < count:
        obj = (list(world.SIZES)[random.integers(2)], list(world.COLOURS)[random.integers(5)],
               world.SHAPES[random.integers(3)], int(random.integers(4)))
        if obj[1:3] not in world.UNSEEN:
            objects.append(obj)
    captions = [world.full_caption([obj]) for obj in objects]
    pictures = [picture for start in range(0, count, 50) for picture in draw(model, captions[start:start + 50])]
    for obj, picture in zip(objects, pictures):
        found = world.detect(np.asarray(picture))[obj[3]]
        hits.update({"colour": found[1] == obj[1], "colour_shape": found[1:] == obj[1:3]})
    return {name: n / count for name, n in hits.items()}, captions, pictures


def score_completions(model, count, seed):
    """Draw the lower half of pictures: do its cells show a valid object or clean background? -> share, given, drawn"""
    random = np.random.default_rng([seed, 22])
    source, rows = world.scenes(random, "held out"), model.config.image_feature_resolution // 2
    given = [Image.fromarray(world.render(next(source), random)) for _ in range(count)]
    drawn = [picture for start in range(0, count, 50) for picture in complete(model, given[start:start + 50], rows)]
    valid = [[cell != world.UNCLEAR for cell in world.detect(np.asarray(picture))[2:]] for picture in drawn]
    return float(np.mean(valid)), given, drawn


def bars(numbers):
    """-> [(name, value, bar that the value should reach)]"""
    asked, drawing, pictures = numbers["questions"], numbers["drawing"], numbers["reconstruction"]
    score, parts, captions = asked["held_out"]["score"], asked["held_out"]["parts"], numbers["captions"]
    table = [
        *((f"questions, {n} object{'s' * (n != '1')}", parts[n], bar)
          for n, bar in (("1", 0.95), ("2", 0.95), ("3", 0.85)) if n in parts),
        *((f"questions: {kind}", parts[kind], 0.75 if kind in ("where", "what", "relation") else 0.85)
          for kind in world.KINDS if kind in parts),
        ("existence, F1", asked["existence"]["F1"], 0.9),
        ("questions on unseen pairs", asked["unseen_pair"]["score"], 0.6),
        ("loss of right answers, another picture shown", score - asked["held_out_swapped"]["score"], 0.35),
        ("captions wholly true, pretrained", captions["pretrained"], 0.8),
        ("captions wholly true, tuned", captions["tuned"], 0.9),
        ("reconstruction, PSNR (dB)", pictures["psnr"], 25),
        ("reconstruction, colour survives", pictures["drawn_colour"], 0.99),
        ("reconstruction, shape survives", pictures["drawn_shape"], 0.95),
        ("codes in use, share, lesser codebook", min(pictures["codes_used"]), 1.0),
        ("perplexity, share of codes, lesser codebook", min(pictures["perplexity"]) / pictures["codes"], 0.5),
        ("drawing, colour and shape", drawing["colour_shape"], 0.7), ("drawing, colour", drawing["colour"], 0.9),
        ("completion, lower cells valid", numbers["completion"], 0.6),
        ("another renderer's pictures, right of 20", numbers["foreign"]["right"], 16),
        ("LLaMA bit-equal after pretraining", float(numbers["llama_frozen"]), 1.0)]
    return table + [("minutes of make demo (at most 45)", numbers["minutes"], 45)] * bool(numbers["minutes"])


def plot_answers(figure, model, folder, answers, seed):
    """Ten held-out pictures beside their reconstructions with question, answer and description; wrong answers last"""
    truth = {t["question_id"]: t["multiple_choice_answer"]
             for t in read_json(folder / "held_out_annotations.json")["annotations"]}
    questions = {q["question_id"]: q["question"] for q in read_json(folder / "held_out_questions.json")["questions"]}
    right, wrong = [], []
    for i in np.random.default_rng([seed, 23]).permutation(len(answers)):
        (right if gqa_match(answers[i]["answer"], truth[answers[i]["id"]]) else wrong).append(answers[i])
    chosen = right[:8] + wrong[:10 - len(right[:8])]
    files = [folder / "images" / f"{item['id']:012d}.png" for item in chosen]
    pairs = [reconstruct(model.tokenizers.image, file)[0] for file in files]
    grid = show_pictures(figure, [pairs[:5], pairs[5:]])
    descriptions = answer(model, [(world.DESCRIBE, [file]) for file in files])
    for axes, item, (description, _, _) in zip(grid.flat, chosen, descriptions):
        label, colour = item["answer"][:30], "darkgreen"
        if item in wrong:
            label, colour = f"{label}  (it is {truth[item['id']]})", "firebrick"
        axes.set_title(f"{questions[item['id']]}\n{label}", fontsize="small", color=colour)
        axes.set_xlabel(textwrap.fill(description, 40), fontsize="x-small", color="dimgrey")


def plot_report(path, title, tuned, toy, models, answers, captions, drawn, given, completed, seed):
    figure = new_figure(13, 14, title)
    parts = figure.subfigures(4, 1, height_ratios=(4.5, 2.2, 3.2, 3.2))
    titles = ("Held-out pictures and their reconstructions, an answer, a description", "Drawn from words",
              "Completed from the upper three of seven rows of tokens", "Training")
    for part, heading in zip(parts, titles):
        part.suptitle(heading, fontsize="large", x=0.01, ha="left")
    plot_answers(parts[0], tuned, toy / "eval", answers, seed)
    show_pictures(parts[1], [drawn[:8]], titles=[textwrap.fill(caption, 20) for caption in captions[:8]])
    show_pictures(parts[2], [given[:8], completed[:8]], ["given", "completed"])
    for axes, (folder, stage, label, curves) in zip(parts[3].subplots(1, 3), (
            (toy, "tokenizer", "PSNR (dB)", {"reconstruction": "psnr"}),
            (models, "pretrain", "loss (nats per token)", {
                "pictures": "image", "captions": "text", "held-out pictures": "val_image",
                "held-out captions": "val_text"}),
            (models, "sft", "loss (nats per token)", {"answers": "loss", "held-out answers": "val_loss"}))):
        log = read_log(folder / stage / "log.jsonl")
        plot_curves(axes, {name: [line.get(key) for line in log] for name, key in curves.items()},
                    f"step of {stage}", label, window=max(1, len(log) // 200))
    figure.savefig(path)


def read_log(path):
    """The entries of a log.jsonl, the last of a step that was made again. Where a run was killed or the disk was full,
    a line may be broken: it is left out"""
    entries = {}
    for line in read_text(path).splitlines():
        with suppress(ValueError):
            if isinstance(entry := parse_json(line), dict):
                entries[entry.get("step", len(entries))] = entry
    return list(entries.values())


def print_mean(folders):
    """The bars of several finished reports, mean and range, printed and added to the first report.json"""
    tables, seeds = [read_json(require_path(folder / "report.json"))["bars"] for folder in folders], {}
    for rows in zip(*tables):
        name, bar, values = rows[0]["what"], rows[0]["bar"], [row["value"] for row in rows]
        seeds[name] = {"mean": sum(values) / len(values), "values": values, "bar": bar}
        print(f"{name:48} {seeds[name]['mean']:7.3f}   {min(values):.3f} to {max(values):.3f}   bar {bar}")
    write_json(folders[0] / "report.json", read_json(folders[0] / "report.json") | {"seeds": seeds})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--toy", type=Path, default=TOY, help="folder of a finished demo")
    parser.add_argument("--models", type=Path, help="folder of pretrain/ and sft/, where the report goes; None: --toy")
    parser.add_argument("--limit", type=NATURAL, default=0, help="first N questions, captions, drawings only; 0: all")
    parser.add_argument("--seed", type=SEED, default=0, help="of scenes and drawings")
    parser.add_argument("--began", type=float, default=0, help="when the demo began, seconds since 1970")
    parser.add_argument("--mean", type=Path, nargs="+", metavar="DIR", help="only compare the reports of these folders")
    args = parser.parse_args()
    if args.mean:
        return print_mean(args.mean)
    toy, models, limit, held_out = args.toy, args.models or args.toy, args.limit, args.toy / "eval"
    base, tuned = (Libra.from_pretrained(require_path(models / name)).eval() for name in ("pretrain", "sft"))
    weights = base.state_dict()
    numbers = {"llama_frozen": all(torch.equal(weights[name], w) for name, w in read_folder(toy / "llama").items())}
    numbers["questions"], answers = score_answers(tuned, held_out, limit)
    files = [toy / "foreign" / name for name in ("questions.json", "annotations.json")]       # of other_renderer.py
    result = evaluate(tuned, "exact", files, toy / "foreign/images")
    numbers["foreign"] = {"right": round(result["score"] * result["answered"]), "asked": result["answered"]}
    numbers["captions"] = {name: evaluate(model, "statements", [held_out / "held_out_captions.json"], held_out, prompt,
                                          batch=64, limit=limit or 600)["score"]
                           for name, model, prompt in (("pretrained", base, ""), ("tuned", tuned, world.DESCRIBE))}
    numbers["reconstruction"] = score_reconstructions(base.tokenizers.image, max(50, 10 * limit or 2000), args.seed)
    numbers["drawing"], captions, drawn = score_drawings(base, limit or 200, args.seed)
    numbers["completion"], given, completed = score_completions(base, max(50, (limit or 200) // 2), args.seed)
    numbers["minutes"] = (time.time() - args.began) / 60 if args.began else None
    numbers["bars"] = [{"what": name, "value": value, "bar": bar,
                        "reached": value <= bar if "at most" in name else value >= bar}
                       for name, value, bar in bars(numbers)]
    write_json(models / "report.json", numbers)
    right, blind = (numbers["questions"][name]["score"] for name in ("held_out", "held_out_swapped"))
    title = f"Libra on the toy world: {right:.0%} of the answers are right, {blind:.0%} when another picture is shown"
    plot_report(models / "report.png", title, tuned, toy, models, answers, captions, drawn, given, completed, args.seed)
    for row in numbers["bars"]:
        print(f"{row['what']:48} {row['value']:7.3f}   {'reaches' if row['reached'] else 'MISSES'} {row['bar']}")
    print(f"{models}/report.json, {models}/report.png")


if __name__ == "__main__":
    run(main)
