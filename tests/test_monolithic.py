"""The systems of monolithic/ as generate.py and evaluate.py open them: one call each, after a step of training."""
import json

import pytest
from scripts import run

STEP = "--steps 1 --warmup 0 --batch 4 --lr 1e-3 --save-every 0"


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("haplovl", "HaploVL"), ("hovle", "HoVLE"), ("llava", "Llava")])
def test_it_answers_and_is_scored(toy, tmp_path, name, kind):
    run(f"monolithic.{name}", "--stage 1 --llm", toy / "llama", "--clip", toy / "clip", "--data",
        toy / "captions/*.tar", "--out", tmp_path / "1", STEP)
    run(f"monolithic.{name}", "--stage 2 --model", tmp_path / "1", "--data", toy / "captions/*.tar", "--out",
        tmp_path / "2", STEP)
    model, image = ["--model", tmp_path / "2"], toy / "chats/images/000000.jpg"
    words = ["--image", image, ("What is it?",), "--max-new-tokens 4 --json --verbose"]
    alone = json.loads(run("generate.py", *model, *words).strip().splitlines()[-2])
    lines = [{"image": str(image), "question": "What is it?"}, {"question": "What is red?"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("generate.py", *model, "--batch", tmp_path / "in.jsonl", "--max-new-tokens 4 --out", tmp_path / "out.jsonl")
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers[0] == alone["answer"] and len(answers) == 2
    said = run("generate.py", *model, "--draw cat --out", tmp_path / "x.png", ok=False)
    assert f"a {kind} only answers" in said
    files = [toy / f"eval/held_out_{part}.json" for part in ("questions", "annotations")]
    words = ["--task exact --data", *files, "--images", toy / "eval/images", "--limit 6 --max-new-tokens 4"]
    for more in ("", "--blind zeroed"):
        assert "6 answers" in run("evaluate.py", *model, *words, more)
    assert "and a Libra" in run("evaluate.py", *model, *words, "--likelihood", ok=False)
