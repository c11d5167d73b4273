"""The benchmarks of Tab. 5: their files as they are published, the prompts of Tab. 6, the forms of their submissions.

    python evaluate.py --task gqa --data testdev_balanced_questions.json --images gqa/images --out gqa.json

or in Python: `items = read("gqa", "gqa/images", "testdev_balanced_questions.json")`, then an answer to each, then
`score("gqa", items, answers)` and `write("gqa", "submission.json", items, answers)`. TASKS, at the end, has a line for
each benchmark; the rules are in scores.py. An item is {id, question: the whole prompt, image: a path or a file's
bytes, truth: None where it is secret, kinds: the parts of the score it counts for, and more for score and submission}.
"""
import base64
import csv
import inspect
import io
import json
import os
import re
from functools import partial
from pathlib import Path

import scores
from scores import normalise, score_captions, score_choices, score_each, score_mme, score_pope
from weights import UserError, read_json, read_text, write_json


def read(task, images, *paths):
    """The items of a file, or of one with questions and one with annotations; `images`: the folder of the pictures.
    A UserError names the file, the entry and what was expected of it, or the first picture that is not there."""
    reader, prompt, _, _, patterns = TASKS[task]
    try:
        inspect.signature(reader).bind(*paths)
    except TypeError:
        raise UserError(f"{task} is read from another number of files than the {len(paths)} given") from None
    items = reader(*paths)
    if not items:
        raise UserError(f"{paths[0]}: no questions in it")
    for item in items:
        item["question"] = "\n".join(part for part in (item["question"], prompt) if part)
        if not isinstance(item["image"], bytes):
            names = item["image"] if isinstance(item["image"], tuple) else (item["image"],)
            tried = [Path(images) / pattern.format(name) for pattern in patterns for name in names]
            item["image"] = next(filter(os.path.isfile, tried), None)
            if item["image"] is None:
                raise UserError(f"{tried[0]}: no such picture; --images names the folder of the pictures")
    return items


def score(task, items, answers):
    """-> {score, metric, parts: {name: number}, unparsed: in how many answers the rule found nothing}"""
    if any(item["truth"] is None for item in items):
        return {"score": None, "metric": "not scored here: no right answers in --data; submit these",
                "parts": {}, "unparsed": 0}
    return TASKS[task][2](items, answers)


def write(task, path, items, answers):
    """The answers in the form that the benchmark's server or its own script reads"""
    TASKS[task][3](Path(path), list(zip(items, answers, strict=True)))


# ---------------------------------------------------------------- what all readers share

def objects(path, key=None):
    """What a JSON file holds, or holds under `key`: a list, or an object -> [(where, its number or its name, entry)]"""
    found = read_json(path, (dict, list))
    if key:
        found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, list):
            raise UserError(f"{path}: expected an object with a list under {key!r}")
    named = found.items() if isinstance(found, dict) else enumerate(found, 1)
    return [(f"{path}, entry {name}", name, entry) for name, entry in named]


def table(path, delimiter):
    """Lines of cells under a line of headings -> [(where, number, {heading: cell})]"""
    csv.field_size_limit(2 ** 31 - 1)                     # a cell may hold a picture
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter)
    try:
        return [(f"{path}, line {reader.line_num}", number, row) for number, row in enumerate(reader, 1)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def collect(found, expected, make):
    """The items that `make` makes of each (where, name, entry); what is wrong with an entry becomes a UserError."""
    items = []
    for where, name, entry in found:
        try:
            items += make(name, entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: expected {expected} ({error!r})") from None
    return items


def new(name, question, image, truth=None, kinds=(), choices=None, **more):
    """An item. truth: None, a text or several; one of the choices {letter: text}, if there are any."""
    told = truth if isinstance(truth, list) else [] if truth is None else [truth]
    if truth == [] or not all(isinstance(one, str) for one in (question, *(choices or {}).values(), *told)):
        raise ValueError("a text is missing")
    if choices and truth not in (None, *choices):
        raise ValueError(f"answer {truth!r} is none of {', '.join(choices)}")
    return {"id": name, "question": question, "image": image, "truth": truth, "choices": choices,
            "kinds": [str(kind) for kind in kinds if kind]} | more


def with_choices(question, choices):
    return question + "".join(f"\n{letter}. {choice}" for letter, choice in choices.items())


# ---------------------------------------------------------------- readers, one for each form

def read_vqa(path, annotations=None, *, key="questions", name="question_id", image="image_id", kind=int):
    """Questions with people's answers in them or in a second file: VQAv2, OKVQA; by other names VizWiz, TextVQA"""
    def people(entry, answers):
        truth = answers and [one["answer"] if isinstance(one, dict) else one for one in answers]
        return truth, (entry.get("answer_type"), entry.get("question_type"))

    def make(_, entry):
        if annotations and entry[name] not in known:
            raise UserError(f"{annotations}: no answer to question {entry[name]} of {path}")
        told = known[entry[name]] if annotations else people(entry, entry.get("answers"))
        return [new(entry[name], entry["question"], kind(entry[image]), *told)]

    known = {}
    if annotations:
        collect(objects(annotations, "annotations"), "question_id, answers",
                lambda _, entry: [known.setdefault(entry["question_id"], people(entry, entry["answers"]))])
    return collect(objects(path, key), f"question, {image}, {name}, perhaps answers", make)


def read_gqa(path):
    def make(name, entry):
        types = entry.get("types") or {}
        return [new(name, entry["question"], entry["imageId"], entry.get("answer"),
                    (types.get("structural"), types.get("semantic")))]
    return collect(objects(path), "question, imageId, perhaps answer, types", make)


def read_captions(path):
    """COCO's {images, annotations} (NoCaps, with domains); Karpathy's {images: [{split, sentences}]}, of which the
    split test (Flickr30k, COCO); a list of {image, caption} (COCO as BLIP has it)"""
    def caption(name, image, truth, domain=None):
        digits = re.search(r"\d+$", Path(image).stem)     # COCO_val2014_000000391895.jpg
        name = name if name is not None else int(digits[0]) if digits else image
        return [new(name, "", (image, Path(image).name), [truth] if isinstance(truth, str) else list(truth), [domain])]

    def blip(_, entry):
        return caption(entry.get("image_id"), entry["image"], entry["caption"])

    def karpathy(_, entry):
        truth = [sentence["raw"] for sentence in entry["sentences"]]
        image, name = f"{entry.get('filepath', '.')}/{entry['filename']}", entry.get("cocoid", entry.get("imgid"))
        return caption(name, image, truth) if entry["split"] == "test" else []

    def coco(_, entry):
        return caption(entry["id"], entry["file_name"], told[entry["id"]], entry.get("domain"))

    whole, told = read_json(path, (list, dict)), {}
    if isinstance(whole, list):
        return collect(objects(path), "image, caption", blip)
    if "annotations" not in whole:
        return collect(objects(path, "images"), "filename, split, sentences with raw", karpathy)
    collect(objects(path, "annotations"), "image_id, caption",
            lambda _, entry: told.setdefault(entry["image_id"], []).append(entry["caption"]) or [])
    return collect(objects(path, "images"), "id, file_name, and an annotation of this image_id", coco)


def read_pope(path):
    def make(_, line):
        entry = json.loads(line)
        return [new(entry["question_id"], entry["text"], entry["image"], {"yes": "yes", "no": "no"}[entry["label"]])]
    lines = [(f"{path}, line {n}", n, line) for n, line in enumerate(read_text(path).strip().split("\n"), 1)]
    return collect(lines, "question_id, image, text, label yes or no", make)


def read_mme(folder):
    """A folder for each task, with a picture and a text of two questions each, or images/ and questions_answers_YN/"""
    def make(task, file):
        (first, its), (second, other) = (line.split("\t") for line in read_text(file).strip().split("\n"))
        names = f"{task}/{file.stem}", f"{task}/images/{file.stem}"
        return [new(names[0], asked.replace("Please answer yes or no.", "").strip(), names,
                    {"Yes": "yes", "No": "no"}[truth.strip()], [task], asked=asked)
                for asked, truth in ((first, its), (second, other))]
    files = [(file, task, file) for task in scores.PERCEPTION + scores.COGNITION
             for within in ("", "questions_answers_YN") for file in sorted(Path(folder, task, within).glob("*.txt"))]
    return collect(files, "two lines, each a question, a tab, Yes or No", make)


def read_mmbench(path):
    """Each question as often as it has choices: these are turned round by one more place each time, and the index is
    1,000,000 higher. A file whose indices say that it holds the turned questions is taken as it is."""
    def make(_, row):
        row = {name: cell for name, cell in row.items() if cell not in (None, "", "nan")}
        index, image = int(row["index"]), pictures.get(row["image"], row["image"])     # or that of another line
        image = base64.b64decode(image, validate=True)
        choices = {letter: row[letter] for letter in "ABCD" if letter in row or letter in "AB"}
        letters, words = list(choices), list(choices.values())
        question = "\n".join(row[name] for name in ("hint", "question") if name in row)
        for k in range(1 if turned else len(letters)):
            shown = dict(zip(letters, words[k:] + words[:k]))
            truth = letters[letters.index(row["answer"]) - k] if "answer" in row else None
            kinds = row.get("category"), row.get("l2-category")
            yield new(index + k * 10 ** 6, with_choices(question, shown), image, truth, kinds, shown,
                      group=index % 10 ** 6, asked=row["question"])

    rows = table(path, "\t")
    pictures = {row.get("index"): row.get("image") for _, _, row in rows}
    turned = any(len(index or "") > 6 for index in pictures)
    return collect(rows, "index, question, A, B, image in base64, perhaps C, D, hint, answer", make)


def read_seed(path):
    """The picture of a video is the frame that LLaVA's script cuts out: type_question.png"""
    def make(_, entry):
        kind, choices = entry["question_type_id"], {letter.upper(): entry[f"choice_{letter}"] for letter in "abcd"}
        image = f"{kind}_{entry['question_id']}" if entry["data_type"] == "video" else entry["data_id"]
        return [new(entry["question_id"], with_choices(entry["question"], choices), image, entry.get("answer"),
                    (entry["data_type"], *(name for name, number in types.items() if number == kind)), choices)]
    types = read_json(path).get("question_type", {})
    return collect(objects(path, "questions"), "question_id, question, choice_a to choice_d, data_type, data_id, "
                   "question_type_id, perhaps answer", make)


def read_scienceqa(path):
    """problems.json: the test questions that have a picture, in the words of LLaVA's conversion"""
    def make(name, entry):
        if entry["split"] != "test" or not entry["image"]:
            return []
        choices = dict(zip("ABCDE", entry["choices"]))
        shown = " ".join(f"({letter}) {choice}" for letter, choice in choices.items())
        return [new(name, f"Context: {entry.get('hint') or 'N/A'}\nQuestion: {entry['question']}\nOptions: {shown}",
                    f"{name}/{entry['image']}", dict(enumerate(choices))[entry["answer"]], choices=choices)]
    return collect(objects(path), "question, choices, answer (a number from 0), image, split", make)


def read_mmvet(path):
    return collect(objects(path), "question, imagename",
                   lambda name, entry: [new(name, entry["question"], entry["imagename"])])


def read_mmvp(path):
    """Two lines that follow each other are a pair; the picture of the n-th line is n.jpg"""
    def make(n, row):
        choices = dict(re.findall(r"\((\w)\)\s*(.*?)\s*(?=\(\w\)|$)", row["Options"]))
        truth = row["Correct Answer"].strip(" ()").lower()
        return [new(n, f"{row['Question']} {row['Options']}", n, truth, (), choices, group=(n - 1) // 2)]
    return collect(table(path, ","), "Question, Options as (a) .. (b) .., Correct Answer", make)


# ---------------------------------------------------------------- submissions; pairs of item and answer

def as_list(row, path, pairs):
    write_json(path, [row(*pair) for pair in pairs])


def as_lines(row, path, pairs):
    path.write_text("".join(json.dumps(row(*pair), ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")


def as_object(path, pairs):
    write_json(path, {item["id"]: answer for item, answer in pairs})


def as_folder(path, pairs):
    """MME: a text for each task; its lines are file, question, truth, answer"""
    path.mkdir(parents=True, exist_ok=True)
    lines = {}
    for item, answer in pairs:
        task, stem = item["id"].split("/")
        cells = f"{stem}.txt", item["asked"], item["truth"].capitalize(), " ".join(answer.split())
        lines[task] = lines.get(task, "") + "\t".join(cells) + "\n"
    for task, some in lines.items():
        (path / f"{task}.txt").write_text(some, encoding="utf-8")


def as_table(path, pairs):
    """MMBench: the columns of its .xlsx, apart by tabs, for a spreadsheet program to save as such"""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", *"ABCD", "prediction", "answer"])
        writer.writerows([item["id"], item["asked"], *map(item["choices"].get, "ABCD"), answer, item["truth"]]
                         for item, answer in pairs)


ANSWERS = partial(as_list, lambda item, answer: {"question_id": item["id"], "answer": normalise(answer)})
IMAGES = partial(as_list, lambda item, answer: {"image": item["id"], "answer": normalise(answer)})
GQA = partial(as_list, lambda item, answer: {"questionId": item["id"], "prediction": scores.gqa_form(answer)})
CAPTIONS = partial(as_list, lambda item, answer: {"image_id": item["id"], "caption": answer})
SEED = partial(as_lines, lambda item, answer: {"question_id": item["id"], "prediction": answer})
MMVP = partial(as_lines, lambda item, answer: {"question_id": item["id"], "prompt": item["question"],
                                               "answer": f"({item['truth']})", "response": answer})
LLAVA = partial(as_lines, lambda item, answer: {"question_id": item["id"], "prompt": item["question"], "text": answer,
                                                "answer_id": "", "model_id": "libra", "metadata": {}})

# ---------------------------------------------------------------- the benchmarks

WORD = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'.\n" + WORD
LETTER = "Answer with the option's letter from the given choices directly."
SENTENCE = "Provide a one-sentence caption for the provided image."

COCO = ("COCO_val2014_{:012d}.jpg", "COCO_test2015_{:012d}.jpg", "{:012d}.jpg", "{:012d}.png")
SEEN = ("SEED-Bench-image/{}", "SEED-Bench-video-image/{}.png", "{}", "{}.jpg", "{}.png")
FILE, JPG = ("{}",), ("{}.jpg", "{}.png")

vqa = partial(score_each, "VQA accuracy", scores.vqa_accuracy)
vqa_official = partial(score_each, "VQA accuracy", partial(scores.vqa_accuracy, official=True))
circular = partial(score_choices, "circular accuracy", scores.option_letter)
read_vizwiz = partial(read_vqa, key=None, name="image", image="image", kind=str)
read_textvqa = partial(read_vqa, key="data", name="image_id", kind=str)       # its scorer wants the picture as the id

TASKS = {   # reader, prompt (Tab. 6), score, submission, names of a picture
    "vqav2": (read_vqa, WORD, vqa_official, ANSWERS, COCO),
    "okvqa": (read_vqa, WORD, vqa, ANSWERS, COCO),
    "gqa": (read_gqa, WORD, partial(score_each, "exact match", scores.gqa_match), GQA, JPG),
    "vizwiz": (read_vizwiz, UNANSWERABLE, vqa, IMAGES, FILE),
    "textvqa": (read_textvqa, WORD, vqa, LLAVA, JPG),
    "scienceqa": (read_scienceqa, LETTER, partial(score_choices, "accuracy", scores.scienceqa_letter), LLAVA,
                  ("{}", "test/{}")),
    "nocaps": (read_captions, SENTENCE, score_captions, CAPTIONS, FILE),
    "flickr30k": (read_captions, SENTENCE, score_captions, CAPTIONS, FILE),
    "coco": (read_captions, SENTENCE, score_captions, CAPTIONS, FILE),
    "pope": (read_pope, WORD, score_pope, LLAVA, FILE),
    "mme": (read_mme, WORD, score_mme, as_folder, JPG),
    "mmbench": (read_mmbench, LETTER, circular, as_table, ()),
    "mmbench-cn": (read_mmbench, "请直接回答选项字母。", circular, as_table, ()),
    "seed": (read_seed, LETTER, partial(score_choices, "accuracy", scores.exact_letter), SEED, SEEN),
    "mm-vet": (read_mmvet, None, None, as_object, FILE),
    "mmvp": (read_mmvp, "Answer this question concisely.", partial(score_choices, "pairs", scores.bracket_letter), MMVP,
             JPG),
}
