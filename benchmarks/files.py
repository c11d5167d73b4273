"""The benchmarks of Tab. 5: their published files, the prompts of Tab. 6, the formats of their submissions.

    items = read("gqa", "gqa/images", "testdev_balanced_questions.json")
    score("gqa", items, answers)                         # answers: a text for each item
    write("gqa", "submission.json", items, answers)

TASKS, at the end, lists them; the scoring rules are in scores.py. An item is a dict: id; question, the whole prompt;
question_alone, without choices and prompt; image, a path or a file's bytes; truth, None if it is secret; choices
{letter: text} or None; kinds, the parts of the score that it counts for; group, of items that are right together; and
what else its score or submission needs.
"""
import base64
import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import scores, toy
from benchmarks.scores import gqa_normalise, normalise, score_captions, score_choices, score_each
from common.entries import entries, expect, read_value
from common.weights import UserError, inside, name_in_errors, read_text, write_json


class Benchmark(NamedTuple):
    read: Callable               # its file, for read_vqa also a file of annotations -> yields items
    prompt: str | None           # Tab. 6: a line below each question
    score: Callable | None       # items, answers -> {score, metric, parts, unparsed}
    write: Callable              # path, [(item, answer)]: writes the submission
    images: tuple = ()           # patterns for a picture's file name; the first that exists is taken


def read(task, images, *paths, limit=0):
    """-> items of a file, or of one with questions and one with annotations; `images` is the folder of the pictures;
    limit: only so many, 0: all. A UserError names the file, the entry and what was expected there, or the first picture
    that is missing. Questions about videos (SEED) are left out, which is printed, if the folder has none of their
    frames."""
    benchmark = TASKS[task]
    max_files = 2 if benchmark.read is read_vqa else 1
    if len(paths) > max_files:
        raise UserError(f"{task}: expected at most {max_files} file(s) in --data, found {len(paths)}")
    items = list(benchmark.read(*paths))
    if not items:
        raise UserError(f"{paths[0]}: no questions in it")
    for item in items:
        item["question"] = "\n".join(text for text in (item["question"], benchmark.prompt) if text)
        if not isinstance(item["image"], bytes):
            names = item["image"] if isinstance(item["image"], tuple) else (item["image"],)
            item["files"] = [inside(images, pattern.format(name)) for pattern in benchmark.images for name in names]
            item["image"] = next(filter(os.path.isfile, item["files"]), None)
    videos = [item for item in items if "video" in item["kinds"]]
    if 0 < len(videos) < len(items) and not any(item["image"] for item in videos):
        print(f"{paths[0]}: {len(videos)} questions about videos are left out: {images} has none of their frames",
              file=sys.stderr)
        items = [item for item in items if "video" not in item["kinds"]]
    items = items[:limit or None]
    if missing := [item for item in items if item["image"] is None]:
        raise UserError(f"{missing[0]['files'][0]}: no such picture; --images names the folder of the pictures")
    return items


def score(task, items, answers):
    """-> {score, metric, parts: {name: number}, unparsed: number of answers in which the rule found nothing}"""
    if any(item["truth"] is None for item in items):
        return {"score": None, "metric": "not scored here: no right answers in --data; submit these",
                "parts": {}, "unparsed": 0}
    return TASKS[task].score(items, answers)


def import_scorer(task, items):
    """Fail before the answers, not after them, where the package that scores them is not installed."""
    if TASKS[task].score is score_captions and all(item["truth"] is not None for item in items):
        scores.import_cider()


def write(task, path, items, answers):
    """Write the answers as the benchmark's server or its own script reads them."""
    with name_in_errors(path):
        TASKS[task].write(Path(path), list(zip(items, answers, strict=True)))


def table_rows(path, delimiter):
    """-> [(where, {heading: cell})] of a table whose first line holds the headings"""
    csv.field_size_limit(2 ** 31 - 1)                     # a cell may hold a picture
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter)
    with expect("a table", path):
        return [(f"{path}, line {reader.line_num}", row) for row in reader]


def new_item(item_id, question, image, truth=None, kinds=(), choices=None, alone=None, **more):
    """truth: None, a text, or a list of texts; with choices {letter: text} one of the letters. alone: the question
    without the choices"""
    truths = truth if isinstance(truth, list) else [] if truth is None else [truth]
    if truth == [] or not all(isinstance(text, str) for text in (question, *(choices or {}).values(), *truths)):
        raise ValueError("a text is missing")
    if choices and truth not in (None, *choices):
        raise ValueError(f"answer {truth!r} is none of {', '.join(choices)}")
    if not isinstance(item_id, (str, int)):
        raise ValueError(f"{item_id!r} is neither a text nor a number")
    return {"id": item_id, "question": question, "question_alone": question if alone is None else alone, "image": image,
            "truth": truth, "choices": choices, "kinds": [str(kind) for kind in kinds if kind]} | more


def with_choices(question, choices):
    return question + "".join(f"\n{letter}. {choice}" for letter, choice in choices.items())


def read_questions(path, annotations=None, *, key=None, item_id=None, question="question", image="image", truth=None,
                   labels=(), image_type=str):
    """An entry for each question; the options are the names of its fields. The right answers are in the same file or in
    one of annotations. key: of the list of questions; labels: the possible right answers."""
    def truth_and_kinds(entry, right):
        if right is not None and not isinstance(right, list if truth == "answers" else str):
            raise TypeError(f"{truth}: {right!r}")
        if isinstance(right, list):                       # of ten humans
            right = [human["answer"] if isinstance(human, dict) else human for human in right]
        if labels and right not in (None, *labels):
            raise ValueError(f"{truth} {right!r} is none of {', '.join(labels)}")
        types = entry.get("types") or entry
        return right, [types.get(kind) for kind in ("answer_type", "question_type", "structural", "semantic")]

    annotated = {}
    for where, _, entry in entries(annotations, read_value(annotations), "annotations") if annotations else ():
        with expect(f"question_id, {truth}", where):
            annotated[str(entry["question_id"])] = truth_and_kinds(entry, entry[truth])
    for where, name, entry in entries(path, read_value(path), key):
        with expect(f"{question}, {image}{f', {item_id}' if item_id else ''}, perhaps {truth}", where):
            own_id = entry[item_id] if item_id else entry.get("question_id", name)
            if annotations and str(own_id) not in annotated:
                raise UserError(f"{annotations}: no answer to question {own_id} of {path}")
            right_and_kinds = annotated[str(own_id)] if annotations else truth_and_kinds(entry, entry.get(truth))
            yield new_item(own_id, entry[question], image_type(entry[image]), *right_and_kinds)


def read_captions(path):
    """COCO's {images, annotations} (NoCaps, with domains); Karpathy's {images: [{split, sentences}]}, only the split
    test (Flickr30k, COCO); BLIP's list of {image, caption}, all captions of a picture in one row or each in its own
    (COCO). Test files have none."""
    content, annotated, items = read_value(path), {}, {}
    has_annotations = isinstance(content, dict) and "annotations" in content
    for where, _, entry in entries(path, content, "annotations") if has_annotations else ():
        with expect("image_id, caption", where):
            annotated.setdefault(entry["image_id"], []).append(entry["caption"])
    for where, _, entry in entries(path, content, "images"):
        with expect("image, caption; or filename, split, sentences; or id, file_name, annotations of this id", where):
            if "sentences" in entry:
                if entry["split"] != "test":
                    continue
                image, image_id = f"{entry.get('filepath', '.')}/{entry['filename']}", entry.get("imgid")
                image_id, captions = entry.get("cocoid", image_id), [text["raw"] for text in entry["sentences"]]
            elif "file_name" in entry:
                image, image_id = entry["file_name"], entry["id"]
                captions = annotated[image_id] if has_annotations else []
            else:
                image, image_id, captions = entry["image"], entry.get("image_id"), entry.get("caption", [])
            if image_id is None:
                digits = re.search(r"\d+$", Path(image).stem)                 # COCO_val2014_000000391895.jpg
                image_id = int(digits[0]) if digits else image
            captions = [captions] if isinstance(captions, str) else list(captions)
            earlier = items.get(image, {"truth": None})["truth"] or []
            items[image] = new_item(image_id, "", (image, Path(image).name), earlier + captions or None,
                                    [entry.get("domain")])
    return items.values()


def read_mme(folder):
    """A folder for each task: a text of two questions for each picture, beside it or in questions_answers_YN/"""
    files = [(task, path) for task in scores.PERCEPTION + scores.COGNITION
             for path in sorted(Path(folder, task).rglob("*.txt"))]
    for task, path in files:
        with expect("two lines, each a question, a tab, Yes or No; in a test file a question alone", path):
            text = read_text(path).strip()
            first, second = (line.split("\t") for line in text.split("\n"))
            images = f"{task}/{path.stem}", f"{task}/images/{path.stem}"
            for original, *truth in (first, second):
                right = {"Yes": "yes", "No": "no"}[truth[0].strip()] if "\t" in text else None
                yield new_item(images[0], original.replace("Please answer yes or no.", "").strip(), images, right,
                               [task], original=original, group=images[0])


def read_mmbench(path):
    """Circular evaluation: a question is asked once for each rotation of its choices; each rotation adds 1,000,000 to
    the index. A file with such indices has the rotations already and is read as it is."""
    rows = table_rows(path, "\t")
    images = {row.get("index"): row.get("image") for _, row in rows}
    has_rotations = any(len(index or "") > 6 for index in images)
    for where, row in rows:
        with expect("index, question, A, B, image in base64, perhaps C, D, hint, answer", where):
            row = {name: cell for name, cell in row.items() if cell not in (None, "", "nan")}
            index = int(row["index"])
            image = base64.b64decode(images.get(row["image"], row["image"]), validate=True)  # or the index of its row
            choices = {letter: row[letter] for letter in "ABCD" if letter in row or letter in "AB"}
            letters, texts = list(choices), list(choices.values())
            question = "\n".join(row[name] for name in ("hint", "question") if name in row)
            for shift in range(1 if has_rotations else len(letters)):
                rotated = dict(zip(letters, texts[shift:] + texts[:shift]))
                truth = letters[letters.index(row["answer"]) - shift] if "answer" in row else None
                yield new_item(index + shift * 10 ** 6, with_choices(question, rotated), image, truth,
                               (row.get("category"), row.get("l2-category")), rotated, question, group=index % 10 ** 6,
                               original=row["question"])


def read_seed(path):
    """For a video the picture is the frame that LLaVA's script extracts: type_question.png"""
    content = read_value(path)
    types = content.get("question_type") if isinstance(content, dict) else None
    for where, _, entry in entries(path, content, "questions"):
        with expect("question_id, question, choice_a to choice_d, data_type, data_id, question_type_id", where):
            kind, choices = entry["question_type_id"], {letter.upper(): entry[f"choice_{letter}"] for letter in "abcd"}
            image = f"{kind}_{entry['question_id']}" if entry["data_type"] == "video" else entry["data_id"]
            kinds = entry["data_type"], *(name for name, number in (types or {}).items() if number == kind)
            yield new_item(entry["question_id"], with_choices(entry["question"], choices), image,
                           entry.get("answer"), kinds, choices, entry["question"])


def read_scienceqa(path):
    """problems.json: the test questions that have a picture, worded as in LLaVA's conversion"""
    for where, name, entry in entries(path, read_value(path)):
        with expect("question, choices, answer (a number from 0; none in a test file), image, split", where):
            if entry["split"] == "test" and entry["image"]:
                choices = dict(zip("ABCDE", entry["choices"]))
                options = " ".join(f"({letter}) {choice}" for letter, choice in choices.items())
                question = f"Context: {entry.get('hint') or 'N/A'}\nQuestion: {entry['question']}"
                truth = dict(enumerate(choices))[entry["answer"]] if entry.get("answer") is not None else None
                yield new_item(name, f"{question}\nOptions: {options}", f"{name}/{entry['image']}", truth, (), choices,
                               question)


def read_mmvp(path):
    """The picture of index n is n.jpg; n odd and n + 1 are a pair. The published heading is misspelt: lndex."""
    for where, row in table_rows(path, ","):
        with expect("Question, Options as (a) .. (b) .., Index, perhaps Correct Answer", where):
            index = int(row["Index"] if "Index" in row else row["lndex"])
            choices = dict(re.findall(r"\((\w)\)\s*(.*?)\s*(?=\(\w\)|$)", row["Options"]))
            truth = (row.get("Correct Answer") or "").strip(" ()").lower() or None
            yield new_item(index, f"{row['Question']} {row['Options']}", index, truth, (), choices, row["Question"],
                           group=(index - 1) // 2)


def write_list(row, path, pairs):
    write_json(path, [row(item, answer) for item, answer in pairs])


def write_lines(row, path, pairs):
    lines = [json.dumps(row(item, answer), ensure_ascii=False) + "\n" for item, answer in pairs]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def write_mmvet(path, pairs):
    write_json(path, {item["id"]: answer for item, answer in pairs})


def write_mme(path, pairs):
    """A file for each task; its lines are file, question, truth, answer"""
    path.mkdir(parents=True, exist_ok=True)
    texts = {}
    for item, answer in pairs:
        task, stem = item["id"].split("/")
        cells = f"{stem}.txt", item["original"], (item["truth"] or "").capitalize(), " ".join(answer.split())
        texts[task] = texts.get(task, "") + "\t".join(cells) + "\n"
    for task, text in texts.items():
        (path / f"{task}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def write_mmbench(path, pairs):
    """The columns of the server's .xlsx, separated by tabs: a spreadsheet program can save them as .xlsx"""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", *"ABCD", "prediction", "answer"])
        for item, answer in pairs:
            writer.writerow([item["id"], item["original"], *map(item["choices"].get, "ABCD"), answer, item["truth"]])


write_vqa = partial(write_list, lambda item, answer: {"question_id": item["id"], "answer": normalise(answer)})
write_vizwiz = partial(write_list, lambda item, answer: {"image": item["id"], "answer": normalise(answer)})
write_gqa = partial(write_list, lambda item, answer: {"questionId": item["id"], "prediction": gqa_normalise(answer)})
write_captions = partial(write_list, lambda item, answer: {"image_id": item["id"], "caption": answer})
write_seed = partial(write_lines, lambda item, answer: {"question_id": item["id"], "prediction": answer})
write_mmvp = partial(write_lines, lambda item, answer: {
    "question_id": item["id"], "prompt": item["question"], "answer": item["truth"] and f"({item['truth']})",
    "response": answer})
write_llava = partial(write_lines, lambda item, answer: {
    "question_id": item["id"], "prompt": item["question"], "text": answer, "answer_id": "", "model_id": "libra",
    "metadata": {}})

WORD = "Answer the question using a single word or phrase."
UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{WORD}"
LETTER = "Answer with the option's letter from the given choices directly."
SENTENCE = "Provide a one-sentence caption for the provided image."

COCO = ("COCO_val2014_{:012d}.jpg", "COCO_test2015_{:012d}.jpg", "{:012d}.jpg", "{:012d}.png")
SEED = ("SEED-Bench-image/{}", "SEED-Bench-video-image/{}.png", "{}", "{}.jpg", "{}.png")
STEM, NAME = ("{}.jpg", "{}.png"), ("{}",)                # pictures are named without, or with their ending

read_vqa = partial(read_questions, key="questions", item_id="question_id", image="image_id", image_type=int,
                   truth="answers")
read_vizwiz = partial(read_questions, item_id="image", truth="answers")
read_textvqa = partial(read_questions, key="data", item_id="image_id", image="image_id", truth="answers")
read_gqa = partial(read_questions, image="imageId", truth="answer")
read_pope = partial(read_questions, item_id="question_id", question="text", truth="label", labels=("yes", "no"))
read_mmvet = partial(read_questions, image="imagename")
score_vqav2 = partial(score_each, "VQA accuracy", partial(scores.vqa_accuracy, official=True))
score_vqa = partial(score_each, "VQA accuracy", scores.vqa_accuracy)
score_gqa = partial(score_each, "exact match", scores.gqa_match)
score_scienceqa = partial(score_choices, "accuracy", scores.scienceqa_letter)
score_mmbench = partial(score_choices, "circular accuracy", scores.mmbench_letter)
score_seed = partial(score_choices, "accuracy", scores.seed_letter)
score_mmvp = partial(score_choices, "pairs", scores.mmvp_letter)

TASKS = {       # read, prompt, score, write, images
    "vqav2": Benchmark(read_vqa, WORD, score_vqav2, write_vqa, COCO),
    "okvqa": Benchmark(read_vqa, WORD, score_vqa, write_vqa, COCO),
    "gqa": Benchmark(read_gqa, WORD, score_gqa, write_gqa, STEM),
    "vizwiz": Benchmark(read_vizwiz, UNANSWERABLE, score_vqa, write_vizwiz, NAME),
    "textvqa": Benchmark(read_textvqa, WORD, score_vqa, write_llava, STEM),
    "scienceqa": Benchmark(read_scienceqa, LETTER, score_scienceqa, write_llava, ("{}", "test/{}")),
    "nocaps": Benchmark(read_captions, SENTENCE, score_captions, write_captions, NAME),
    "flickr30k": Benchmark(read_captions, SENTENCE, score_captions, write_captions, NAME),
    "coco": Benchmark(read_captions, SENTENCE, score_captions, write_captions, NAME),
    "pope": Benchmark(read_pope, WORD, scores.score_pope, write_llava, NAME),
    "mme": Benchmark(read_mme, WORD, scores.score_mme, write_mme, STEM),
    "mmbench": Benchmark(read_mmbench, LETTER, score_mmbench, write_mmbench),
    "mmbench-cn": Benchmark(read_mmbench, "请直接回答选项字母。", score_mmbench, write_mmbench),
    "seed": Benchmark(read_seed, LETTER, score_seed, write_seed, SEED),
    "mm-vet": Benchmark(read_mmvet, None, None, write_mmvet, NAME),
    "mmvp": Benchmark(read_mmvp, "Answer this question concisely.", score_mmvp, write_mmvp, STEM),
    "exact": Benchmark(read_vqa, WORD, toy.score_exact, write_vqa, COCO),       # these two: the toy world
    "statements": Benchmark(read_captions, "Describe the image.", toy.score_statements, write_captions, NAME),
}
