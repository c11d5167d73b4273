"""Files of every benchmark in their published form: read, answered, scored (checked by a second count), submitted."""
import base64
import copy
import csv
import json
import random
import sys

import pytest

from benchmarks.files import TASKS, import_scorer, read, score, write
from benchmarks.scores import average
from common.weights import UserError

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PICTURE = base64.b64encode(b"the bytes of a picture, more of them than an index has digits").decode()


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def tsv(rows):
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return "\n".join("\t".join(str(cell) for cell in line) for line in
                     [heads, *([row.get(head, "") for head in heads] for row in rows)]) + "\n"


def humans(*answers):
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers, 1)]


COCO = "COCO_val2014_000000000042.jpg"
QUESTIONS = {"questions": [{"image_id": 42, "question": "What colour?", "question_id": 420},
                           {"image_id": 42, "question": "How many?", "question_id": 421}]}
ANNOTATIONS = {"annotations": [
    {"question_id": 421, "answer_type": "number", "question_type": "how many", "answers": humans(*"2222233333")},
    {"question_id": 420, "answer_type": "other", "question_type": "what color", "answers": humans(*["red"] * 10)}]}
GQA = {"201": {"question": "Is it red?", "imageId": "n77", "answer": "yes",
               "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}}}
VIZWIZ = [{"image": "VizWiz_val_00000000.jpg", "question": "What?", "answers": humans(*["unanswerable"] * 10),
           "answer_type": "unanswerable", "answerable": 0}]
TEXTVQA = {"data": [{"image_id": "0f", "question": "what brand?", "question_id": 3,
                     "answers": ["nous"] * 9 + ["no us"]}]}
SCIENCE = {"4": {"question": "Which?", "choices": ["chalk", "cheese"], "answer": 1, "hint": "", "image": None,
                 "split": "test"},
           "5": {"question": "Where?", "choices": ["here", "there"], "answer": 0, "hint": "Look.", "image": "image.png",
                 "split": "test"},
           "6": {"question": "When?", "choices": ["now", "then"], "answer": 0, "hint": "", "image": "image.png",
                 "split": "train"}}
NOCAPS = {"images": [{"id": 0, "file_name": "0a.jpg", "domain": "in-domain"},
                     {"id": 1, "file_name": "1b.jpg", "domain": "out-domain"}],
          "annotations": [{"image_id": i % 2, "id": i, "caption": f"a {['dog', 'cat'][i % 2]} {i}"} for i in range(4)]}
KARPATHY = {"images": [{"filename": "9.jpg", "imgid": 3, "split": "test",
                        "sentences": [{"raw": "A cat."}, {"raw": "Cats."}]},
                       {"filename": "8.jpg", "imgid": 4, "split": "train", "sentences": [{"raw": "A dog."}]}]}
BLIP = [{"image": f"val2014/{COCO}", "caption": ["A b.", "C."]}]
POPE = [{"question_id": n, "image": COCO, "text": f"Is there a {thing}?", "label": label}
        for n, (thing, label) in enumerate([("cat", "yes"), ("dog", "no"), ("cow", "yes")], 1)]
MMBENCH = [{"index": 5, "question": "What is it?", "hint": "Look.", "A": "cat", "B": "dog", "C": "cow", "D": "",
            "answer": "C", "category": "fine", "image": PICTURE, "source": "x", "l2-category": "coarse",
            "comment": "nan", "split": "dev"},
           {"index": 6, "question": "Is it so?", "hint": "nan", "A": "yes", "B": "no", "answer": "A",
            "category": "logic", "image": 5, "l2-category": "coarse"}]
CHOICES = {"choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four"}
SEED = {"question_type": {"Scene Understanding": 1, "Action Recognition": 10}, "questions": [
    {"question_id": "7", "question_type_id": 1, "data_type": "image", "data_id": "12_34", "question": "How many?",
     "answer": "B", **CHOICES},
    {"question_id": "v8", "question_type_id": 10, "data_type": "video", "data_id": "a/b.webm", "question": "How often?",
     "answer": "D", **CHOICES}]}
MMVET = {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1", "capability": ["ocr"]}}
MMVP = ('Index,Question,Options,Correct Answer\n1,"Open, or not?",(a) Open (b) Closed,(a)\n'
        '2,"Open, or not?",(a) Open (b) Closed,(b)\n')
FILES = {"vqav2": QUESTIONS, "okvqa": QUESTIONS, "gqa": GQA, "vizwiz": VIZWIZ, "textvqa": TEXTVQA,
         "scienceqa": SCIENCE, "nocaps": NOCAPS, "flickr30k": KARPATHY, "coco": BLIP,
         "pope": "\n".join(map(json.dumps, POPE)) + "\n", "mmbench": tsv(MMBENCH), "mmbench-cn": tsv(MMBENCH),
         "seed": SEED, "mm-vet": MMVET, "mmvp": MMVP}
PICTURES = {"vqav2": [COCO], "okvqa": ["000000000042.png"], "gqa": ["n77.jpg"], "vizwiz": ["VizWiz_val_00000000.jpg"],
            "textvqa": ["0f.jpg"], "scienceqa": ["test/5/image.png"], "nocaps": ["0a.jpg", "1b.jpg"],
            "flickr30k": ["9.jpg"], "coco": [COCO], "pope": [COCO], "mmbench": [], "mmbench-cn": [],
            "seed": ["SEED-Bench-image/12_34", "SEED-Bench-video-image/10_v8.png"], "mm-vet": ["v1_0.png"],
            "mmvp": ["1.jpg", "2.jpg"]}


def paths(folder, task, value=None, name=None):
    """Write a task's file, its annotations if it has any, and its pictures -> the arguments of `read`"""
    for picture in PICTURES[task]:
        save(folder / "images" / picture, "")
    files = [save(folder / (name or f"{task}.file"), FILES[task] if value is None else value)]
    if task in ("vqav2", "okvqa"):
        files.append(save(folder / "annotations.json", ANNOTATIONS))
    return [folder / "images", *files]


@pytest.mark.parametrize("task, number, question, truth, kinds", [
    ("vqav2", 0, f"What colour?\n{WORD}", ["red"] * 10, ["other", "what color"]),
    ("okvqa", 1, f"How many?\n{WORD}", list("2222233333"), ["number", "how many"]),
    ("gqa", 0, f"Is it red?\n{WORD}", "yes", ["verify", "attr"]),
    ("vizwiz", 0, f"What?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{WORD}",
     ["unanswerable"] * 10, ["unanswerable"]),
    ("textvqa", 0, f"what brand?\n{WORD}", ["nous"] * 9 + ["no us"], []),
    ("scienceqa", 0, f"Context: Look.\nQuestion: Where?\nOptions: (A) here (B) there\n{LETTER}", "A", []),
    ("nocaps", 1, "Provide a one-sentence caption for the provided image.", ["a cat 1", "a cat 3"], ["out-domain"]),
    ("flickr30k", 0, "Provide a one-sentence caption for the provided image.", ["A cat.", "Cats."], []),
    ("coco", 0, "Provide a one-sentence caption for the provided image.", ["A b.", "C."], []),
    ("pope", 1, f"Is there a dog?\n{WORD}", "no", []),
    ("mmbench", 1, f"Look.\nWhat is it?\nA. dog\nB. cow\nC. cat\n{LETTER}", "B", ["fine", "coarse"]),
    ("mmbench-cn", 4, "Is it so?\nA. no\nB. yes\n请直接回答选项字母。", "B", ["logic", "coarse"]),
    ("seed", 1, f"How often?\nA. one\nB. two\nC. three\nD. four\n{LETTER}", "D", ["video", "Action Recognition"]),
    ("mm-vet", 0, "What is x?", None, []),
    ("mmvp", 1, "Open, or not? (a) Open (b) Closed\nAnswer this question concisely.", "b", [])])
def test_items(tmp_path, task, number, question, truth, kinds):
    items = read(task, *paths(tmp_path, task))
    item = items[number]
    assert (item["question"], item["truth"], item["kinds"]) == (question, truth, kinds)
    images = [item["image"] for item in items]
    if task.startswith("mmbench"):
        assert images == [base64.b64decode(PICTURE)] * 5
    else:
        assert {str(path.relative_to(tmp_path / "images")) for path in images} == set(PICTURES[task])
        assert len(items) == {"pope": 3, "nocaps": 2, "vqav2": 2, "okvqa": 2, "seed": 2, "mmvp": 2}.get(task, 1)


@pytest.mark.parametrize("task, answers, submitted", [
    ("vqav2", ["The Red.", "two"], [{"question_id": 420, "answer": "red"}, {"question_id": 421, "answer": "2"}]),
    ("gqa", ["Yes."], [{"questionId": "201", "prediction": "yes"}]),
    ("vizwiz", ["Unanswerable."], [{"image": "VizWiz_val_00000000.jpg", "answer": "unanswerable"}]),
    ("nocaps", ["a dog", "a cat"], [{"image_id": 0, "caption": "a dog"}, {"image_id": 1, "caption": "a cat"}]),
    ("flickr30k", ["a cat"], [{"image_id": 3, "caption": "a cat"}]),
    ("coco", ["c"], [{"image_id": 42, "caption": "c"}]),
    ("mm-vet", ["x is -1"], {"v1_0": "x is -1"})])
def test_submissions(tmp_path, task, answers, submitted):
    write(task, tmp_path / "out.json", read(task, *paths(tmp_path, task)), answers)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == submitted


@pytest.mark.parametrize("task, answers, lines", [
    ("seed", ["B", "no"], [{"question_id": "7", "prediction": "B"}, {"question_id": "v8", "prediction": "no"}]),
    ("pope", ["yes", "no", "no"], [
        {"question_id": n, "prompt": f"Is there a {thing}?\n{WORD}", "text": text, "answer_id": "", "model_id": "libra",
         "metadata": {}} for n, thing, text in ((1, "cat", "yes"), (2, "dog", "no"), (3, "cow", "no"))]),
    ("mmvp", ["(a)", "open"], [
        {"question_id": n, "prompt": "Open, or not? (a) Open (b) Closed\nAnswer this question concisely.",
         "answer": truth, "response": text} for n, truth, text in ((1, "(a)", "(a)"), (2, "(b)", "open"))])])
def test_submitted_lines(tmp_path, task, answers, lines):
    write(task, tmp_path / "out.jsonl", read(task, *paths(tmp_path, task)), answers)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == lines


def test_mmbench_table(tmp_path):
    write("mmbench", tmp_path / "out.tsv", read("mmbench", *paths(tmp_path, "mmbench")), list("CBADE"))
    with open(tmp_path / "out.tsv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert rows[2] == ["1000005", "What is it?", "dog", "cow", "cat", "", "B", "B"]
    assert [row[0] for row in rows[1:]] == ["5", "1000005", "2000005", "6", "1000006"]


def test_mmbench_file_with_rotations(tmp_path):
    """A file that has the rotations is not rotated again; they belong to the question of the index without millions."""
    rows = [MMBENCH[0], MMBENCH[0] | {"index": 1000005, "A": "dog", "B": "cow", "C": "cat", "answer": "B", "image": 5},
            MMBENCH[0] | {"index": 2000005, "A": "cow", "B": "cat", "C": "dog", "answer": "A", "image": 5}]
    items = read("mmbench", *paths(tmp_path, "mmbench", tsv(rows)))
    rotated = read("mmbench", *paths(tmp_path, "mmbench", tsv(rows[:1])))
    assert items == rotated and [item["id"] for item in items] == [5, 1000005, 2000005]
    assert score("mmbench", items, ["C", "B", "A"])["score"] == 1
    assert score("mmbench", items, ["C", "B", "B"]) == {"score": 0, "metric": "circular accuracy", "unparsed": 0,
                                                        "parts": {"fine": 0, "coarse": 0, "each": 2 / 3}}


@pytest.mark.parametrize("image_folder, text_folder", [("", ""), ("images", "questions_answers_YN")])
def test_mme(tmp_path, image_folder, text_folder):
    for task, stem in (("count", "a"), ("count", "b"), ("code_reasoning", "c")):
        save(tmp_path / "mme" / task / image_folder / f"{stem}.{'png' if stem == 'c' else 'jpg'}", "")
        save(tmp_path / "mme" / task / text_folder / f"{stem}.txt",
             f"Is {stem} one?  Please answer yes or no.\tYes\nIs {stem} two? Please answer yes or no.\tNo\n")
    save(tmp_path / "mme" / "eval_tool" / "readme.txt", "not a task")
    items = read("mme", tmp_path / "mme", tmp_path / "mme")
    assert [item["question"] for item in items[:2]] == [f"Is a one?\n{WORD}", f"Is a two?\n{WORD}"]
    assert [item["truth"] for item in items] == ["yes", "no"] * 3 and items[4]["image"].name == "c.png"
    answers = ["Yes", "no", "yes", "well\tthen", "no", "no"]
    result = score("mme", items, answers)
    assert result["score"] == 75 + 50 and result["parts"]["cognition"] == 50 and result["unparsed"] == 1
    write("mme", tmp_path / "out", items, answers)
    last_line = (tmp_path / "out" / "count.txt").read_text().splitlines()[3]
    assert last_line == "b.txt\tIs b two? Please answer yes or no.\tNo\twell then"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["code_reasoning.txt", "count.txt"]


def test_scores_of_small_files(tmp_path):
    def score_of(task, answers):
        return score(task, read(task, *paths(tmp_path, task)), answers)

    assert score_of("vqav2", ["Red", "two"]) == {"score": 1, "metric": "VQA accuracy", "unparsed": 0, "parts": {
        "how many": 1, "number": 1, "other": 1, "what color": 1}}
    assert score_of("textvqa", ["Nous."])["score"] == 1 and score_of("textvqa", ["no us"])["score"] == pytest.approx(.3)
    assert score_of("seed", ["B", "four"]) == {"score": .5, "metric": "accuracy", "unparsed": 1, "parts": {
        "Action Recognition": 0, "Scene Understanding": 1, "image": 1, "video": 0}}
    assert score_of("scienceqa", ["A. here"])["score"] == 1
    assert score_of("mmvp", ["(a)", "open"]) == {"score": 0, "metric": "pairs", "unparsed": 0, "parts": {"each": .5}}
    assert score_of("mmvp", ["a", "closed"])["score"] == 1
    assert score_of("mm-vet", ["anything"])["score"] is None
    nocaps = score_of("nocaps", ["a dog 0", "a dog"])
    assert nocaps["score"] > 1 and nocaps["parts"] == {"in-domain": 0, "out-domain": 0}   # one image a domain
    pope = [score_of("pope", answers) for answers in (["yes", "no", "yes"], ["yes", "yes", "no"])]
    assert pope[0]["score"] == 1 and pope[1]["score"] == pytest.approx(.5)
    assert average(pope)["score"] == pytest.approx(.75) and average(pope)["parts"]["accuracy"] == pytest.approx(2 / 3)


def test_a_missing_scorer_is_missed_before_the_answers(tmp_path, monkeypatch):
    items = read("nocaps", *paths(tmp_path, "nocaps"))
    import_scorer("nocaps", items)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        import_scorer("nocaps", items)
    import_scorer("nocaps", [item | {"truth": None} for item in items])       # nothing will be scored
    import_scorer("exact", items)


def test_a_limit_needs_only_its_own_pictures(tmp_path):
    images, questions, _ = paths(tmp_path, "vqav2")
    items, content = read("vqav2", images, questions), json.loads(questions.read_text())
    content["questions"][-1]["image_id"] = 999999
    save(questions, content)
    assert read("vqav2", images, questions, limit=len(items) - 1) == items[:-1]
    with pytest.raises(UserError, match="no such picture"):
        read("vqav2", images, questions)


def test_secret_answers(tmp_path):
    images, questions, _ = paths(tmp_path, "vqav2")
    items = read("vqav2", images, questions)
    assert score("vqav2", items, ["red", "2"])["score"] is None
    write("vqav2", tmp_path / "out.json", items, ["red", "2"])
    assert "answer" not in tsv([{key: cell for key, cell in MMBENCH[0].items() if key != "answer"}]).split("\n")[0]
    secret = tsv([{key: cell for key, cell in MMBENCH[0].items() if key != "answer"}])
    items = read("mmbench", *paths(tmp_path, "mmbench", secret))
    assert len(items) == 3 and score("mmbench", items, list("ABC"))["score"] is None


# ---------------------------------------------------------------- 200 questions, counted a second time from the file

def test_200_of_vqav2(tmp_path):
    rng, words = random.Random(1), ["red", "blue", "2", "a dog"]
    entries = [{"question_id": n, "question": "?", "image_id": 42} for n in range(200)]
    truths = [{"question_id": n, "answer_type": rng.choice("xyz"), "answers": humans(*rng.choices(words, k=10))}
              for n in range(200)]
    images, questions, annotations = paths(tmp_path, "vqav2")
    save(questions, {"questions": entries})
    save(annotations, {"annotations": rng.sample(truths, 200)})
    answers = rng.choices(["red", "Blue.", "two", "the dog", "cat"], k=200)
    matching = {"red": "red", "Blue.": "blue", "two": "2", "the dog": "a dog", "cat": "cat"}
    accuracies = []
    for truth, answer in zip(truths, answers):
        others = [[human["answer"] for human in truth["answers"] if human["answer_id"] != n] for n in range(1, 11)]
        accuracies.append(sum(min(1, nine.count(matching[answer]) / 3) for nine in others) / 10)
    result = score("vqav2", read("vqav2", images, questions, annotations), answers)
    assert result["score"] == pytest.approx(sum(accuracies) / 200, abs=1e-12) and 0 < result["score"] < 1
    for kind in "xyz":
        of_kind = [accuracy for accuracy, truth in zip(accuracies, truths) if truth["answer_type"] == kind]
        assert result["parts"][kind] == pytest.approx(sum(of_kind) / len(of_kind), abs=1e-12)


def test_200_of_pope(tmp_path):
    rng = random.Random(2)
    lines = [POPE[0] | {"question_id": n, "label": rng.choice(["yes", "no"])} for n in range(200)]
    answers = [rng.choice(["Yes.", "No", "no, none", "It is not", "Sure"]) for _ in lines]
    items = read("pope", *paths(tmp_path, "pope", "\n".join(map(json.dumps, lines))))
    yes = [answer in ("Yes.", "Sure") for answer in answers]
    true_positives = sum(a and line["label"] == "yes" for a, line in zip(yes, lines))
    errors = sum(a != (line["label"] == "yes") for a, line in zip(yes, lines))
    result = score("pope", items, answers)
    assert result["score"] == pytest.approx(2 * true_positives / (2 * true_positives + errors), abs=1e-12)
    assert result["parts"]["accuracy"] == 1 - errors / 200 and result["parts"]["yes"] == sum(yes) / 200


def test_200_of_mmbench(tmp_path):
    """The answers follow the choices' texts, wherever a rotation puts them"""
    rng = random.Random(3)
    rows = [MMBENCH[0] | dict(zip("ABCD", ["cat", "dog", "cow", "hen"])) | {"index": n, "D": rng.choice(["", "hen"]),
                                                      "category": rng.choice("pq"), "answer": rng.choice("ABC")}
            for n in range(200)]
    items = read("mmbench", *paths(tmp_path, "mmbench", tsv(rows)))
    assert len(items) == sum(4 if row["D"] else 3 for row in rows)
    right, unparsed, answers = [True] * 200, 0, []
    for item in items:
        text = rows[item["group"]][rows[item["group"]]["answer"]]
        letter = next(letter for letter, choice in item["choices"].items() if choice == text)
        good, bad = [letter, f"({letter}) {text}", f"It is a {text}."], ["none of them", "F"]
        answers.append(rng.choice(good * 8 + bad))
        unparsed += answers[-1] in bad
        right[item["group"]] &= answers[-1] in good
    result = score("mmbench", items, answers)
    assert result["score"] == sum(right) / 200 and 0 < result["score"] < 1 and result["unparsed"] == unparsed
    for kind in "pq":
        of_kind = [hit for hit, row in zip(right, rows) if row["category"] == kind]
        assert result["parts"][kind] == sum(of_kind) / len(of_kind)


# ---------------------------------------------------------------- malformed files

MALFORMED = [
    ("vqav2", "{", "not valid JSON"), ("vqav2", {"question": []}, "list under 'questions'"),
    ("vqav2", {"questions": []}, "no questions in it"),
    ("vqav2", {"questions": [QUESTIONS["questions"][0], {"question_id": 421}]}, "entry 2: expected question, image_id"),
    ("vqav2", {"questions": [{"question_id": 9, "image_id": 42, "question": "?"}]}, "no answer to question 9"),
    ("vqav2", {"questions": [{"question_id": 420, "image_id": "x", "question": "?"}]}, "entry 1: expected question"),
    ("gqa", {"201": {"question": "?"}}, "entry 201: expected question, imageId"),
    ("vizwiz", [{"image": "VizWiz_val_00000000.jpg", "question": "?", "answers": []}], "entry 1: expected"),
    ("textvqa", {"data": [{"image_id": "0f", "question": "?", "answers": [3]}]}, "entry 1: expected"),
    ("scienceqa", {"5": SCIENCE["5"] | {"answer": 2}}, "entry 5: expected question, choices, answer"),
    ("nocaps", NOCAPS | {"annotations": NOCAPS["annotations"][:1]}, "entry 2: expected image, caption"),
    ("flickr30k", {"images": [KARPATHY["images"][0] | {"sentences": [{}]}]}, "entry 1: expected image, caption"),
    ("coco", [{"image": "a.jpg", "caption": None}], "entry 1: expected image, caption"),
    ("pope", json.dumps(POPE[0]) + "\n{", "line 2: not valid JSON"),
    ("pope", json.dumps(POPE[0] | {"label": "maybe"}), "line 1: expected text, image, question_id"),
    ("mmbench", "index\tquestion\n1\t?\n", "line 2: expected index, question, A, B"),
    ("mmbench", tsv([MMBENCH[0] | {"image": "***"}]), "line 2: expected index"),
    ("mmbench", tsv([MMBENCH[0] | {"A": "", "B": ""}]), "line 2: expected index"),
    ("mmbench", tsv([MMBENCH[0], MMBENCH[0] | {"answer": "D", "index": 6}]), "line 3: expected index"),
    ("seed", SEED | {"questions": [SEED["questions"][0] | {"answer": "E"}]}, "answer 'E' is none of A, B, C, D"),
    ("mm-vet", {"v1_0": {"question": "?"}}, "entry v1_0: expected question, imagename"),
    ("mmvp", "Index,Question\n1,?\n", "line 2: expected Question, Options"),
    ("mmvp", MMVP.replace("(b)\n", "(c)\n"), "line 3: expected Question, Options")]


@pytest.mark.parametrize("task, value, message", MALFORMED)
def test_malformed(tmp_path, task, value, message):
    with pytest.raises(UserError) as error:
        read(task, *paths(tmp_path, task, value))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_malformed_mme(tmp_path):
    file = save(tmp_path / "count" / "a.txt", "Is it?\tYes\n")
    for content in ("Is it?\tYes\n", "Is it?\tYes\nIs it?\tPerhaps\n", "Is it?\tYes\nIs it? No\n"):
        save(file, content)
        with pytest.raises(UserError, match="a.txt: expected two lines"):
            read("mme", tmp_path, tmp_path)
    with pytest.raises(UserError, match="no questions"):
        read("mme", tmp_path, tmp_path / "count")


@pytest.mark.parametrize("task", [task for task in FILES if PICTURES[task]])
def test_missing_pictures(tmp_path, task):
    _, *files = paths(tmp_path, task)
    with pytest.raises(UserError, match="no such picture; --images names the folder"):
        read(task, tmp_path / "nowhere", *files)


def test_missing_and_binary_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for task in FILES:
        for name in ("nowhere", "binary"):
            with pytest.raises(UserError, match=f"{name}: "):
                read(task, tmp_path, tmp_path / name)


def test_too_many_files(tmp_path):
    for task, count in (("gqa", 2), ("vqav2", 3)):
        with pytest.raises(UserError, match=f"expected at most {count - 1} .* found {count}"):
            read(task, tmp_path, *[tmp_path] * count)


def leaves(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(inner, (*path, key))


@pytest.mark.parametrize("task", [task for task, value in FILES.items() if not isinstance(value, str)])
def test_no_traceback(tmp_path, task):
    """Every value of a file replaced by something else, or deleted: the reader gives items or a UserError"""
    images, file, *rest = paths(tmp_path, task)
    for path in list(leaves(FILES[task]))[1:]:
        for wrong in (None, 5, "x", [], {}, [[]], "deleted"):
            value = copy.deepcopy(FILES[task])
            inner = value
            for key in path[:-1]:
                inner = inner[key]
            if wrong == "deleted":
                del inner[path[-1]]
            else:
                inner[path[-1]] = wrong
            try:
                items = read(task, images, save(file, value), *rest)
            except UserError as error:
                assert str(tmp_path) in str(error)
            else:
                score(task, items, ["x"] * len(items))


def test_all_of_table_5():
    assert set(TASKS) - {"exact", "statements"} == {*FILES, "mme"}      # the toy world's two
