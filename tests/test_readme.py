"""README.md: every command in it is one that the scripts take; those on the demo's files, and the Python, run."""
import importlib
import re
import shlex

import pytest
from scripts import ROOT, run

BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind != "python" for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [words for line in LINES if len(words := shlex.split(line, comments=True)) > 1
            and any(word.endswith(".py") for word in words)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy").mkdir(parents=True)           # where results go must be there
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    importlib.import_module(words[at][:-3]).options().parse_args(words[at + 1:])


def test_commands_on_the_demo_run(toy, base, tuned, tmp_path):
    ran = 0
    for words in COMMANDS:
        if words[0] == "python" and any("runs/toy" in word for word in words):
            words = [word.replace("runs/toy", str(toy)) for word in words]
            if "--model" not in words:
                words += ["--model", str(tuned)]
            if "--out" in words:
                words[words.index("--out") + 1] = str(tmp_path / "out.png")
            run(words[1], tuple(words[2:]))
            ran += 1
    assert ran >= 4


def test_the_python_runs(toy, base, tuned, capsys):
    snippets = [block for kind, block in BLOCKS if kind == "python"]
    for code in snippets:
        exec(code.replace("runs/toy", str(toy)), {})
    assert snippets and capsys.readouterr().out
