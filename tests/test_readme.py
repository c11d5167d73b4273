"""README.md and docs/*.md: every command is one that the scripts take, every link leads to a file and a heading, and
README's commands on the demo's files and its Python run."""
import importlib
import re
import shlex

import pytest
from scripts import ROOT, run

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}


def code_blocks(text, kind):
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
            if name == kind]


def commands(text):
    """-> [(script or module, its options)] of the blocks without a language"""
    found = []
    for line in "".join(code_blocks(text, "")).replace("\\\n", " ").splitlines():
        words = [] if line.startswith("#SBATCH") else shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            found.append((words[2], words[3:]))
        elif script := next((word for word in words if word.endswith(".py")), None):
            found.append((script, words[words.index(script) + 1:]))
    return found


COMMANDS = {" ".join([script, *words]): (script, words) for text in TEXTS.values() for script, words in commands(text)}


@pytest.mark.parametrize("script, words", COMMANDS.values(), ids=COMMANDS)
def test_commands_are_understood(script, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy").mkdir(parents=True)           # results need an existing folder
    if script == "training.plan":                         # the name of a trainer, then options of that trainer
        script, words = words[0], words[1:]
    module = importlib.import_module(script.removesuffix(".py"))
    if hasattr(module, "options"):
        module.options().parse_args(words)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", TEXTS[name]):
        file = (ROOT / name).parent / target
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], heading


@pytest.mark.slow
def test_commands_on_the_demo_run(toy, base, tuned, tmp_path):
    on_the_demo = [(script, words) for script, words in commands(TEXTS["README.md"])
                   if script in ("generate.py", "evaluate.py") and any("runs/toy" in word for word in words)]
    for script, words in on_the_demo:
        words = [word.replace("runs/toy", str(toy)) for word in words]
        if "--model" not in words:
            words += ["--model", str(tuned)]
        if "--out" in words:
            words[words.index("--out") + 1] = str(tmp_path / "out.png")
        run(script, tuple(words))
    assert len(on_the_demo) >= 5


def test_the_python_runs(toy, base, tuned, capsys):
    snippets = code_blocks(TEXTS["README.md"], "python")
    for code in snippets:
        exec(code.replace("runs/toy", str(toy)), {})
    assert snippets and capsys.readouterr().out
