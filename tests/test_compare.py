"""The table of four systems, one row for seconds: search, scores, costs, table, figure; then what was made is kept."""
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from scripts import ROOT

from common.weights import read_json
from toy import ablate, compare


def test_tasks():
    """In processes of their own, in their order; an error in one arrives"""
    args = SimpleNamespace(jobs=2)
    assert ablate.run_tasks(args, [(abs, -1), (divmod, 7, 2)]) == [1, (3, 1)]
    with pytest.raises(ZeroDivisionError):
        ablate.run_tasks(args, [(divmod, 1, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM),
                                          (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_ends_all_tasks(tmp_path, number, code):
    """And their trainers; those that wait do not begin."""
    trainer = f"import os, time; os.mkdir('{tmp_path}/begun'); time.sleep(600)"
    (tmp_path / "tasks.py").write_text(f"""
import os
from pathlib import Path
from types import SimpleNamespace
from toy.ablate import run_tasks, run_trainer
if __name__ == "__main__":
    late = os.mkdir, "{tmp_path}/late"
    run_tasks(SimpleNamespace(jobs=1), [(run_trainer, Path("{tmp_path}/run"), "-c", {trainer!r}), late, late])
""")
    process = subprocess.Popen([sys.executable, tmp_path / "tasks.py"], env=os.environ | {"PYTHONPATH": str(ROOT)},
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.1)
        send = os.killpg if number == signal.SIGINT else os.kill               # a terminal sends it to all processes
        send(process.pid, number)
        process.communicate(timeout=120)                  # until the last of them has closed the output
        assert process.returncode == code and not (tmp_path / "late").exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.tables
def test_one_row(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "FACTORS", (0.5,))
    monkeypatch.setattr(compare, "run_tasks", lambda _, tasks: [task(*words) for task, *words in tasks])
    monkeypatch.chdir(ROOT)
    words = ["compare", "--toy", str(toy), "--out", str(tmp_path), "--steps", "2", "--limit", "23", "--judge", "23",
             "--seeds", "0", "--rows", "llava"]
    monkeypatch.setattr(sys, "argv", words)
    compare.main()
    assert "LLaVA-like, rate x 0.5" in (said := capfd.readouterr().out) and "LLaVA-like, seed 0" in said
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")}
    assert lines[""] == ["LLaVA-like"] and lines["CLIP to answer"] == ["yes"] and lines["learning rates x"] == ["0.5"]
    assert set(compare.COLUMNS) | set(compare.COSTS) < set(lines) and ["-"] not in lines.values()
    result, costs = read_json(tmp_path / "llava-x0.5-0/result.json"), read_json(tmp_path / "costs.json")["llava"]
    assert all(0 <= value <= 1 for name, value in result.items() if name != "text perplexity")
    assert result["text perplexity"] > 1 and all(value > 0 for value in costs.values())
    assert (tmp_path / "compare.png").stat().st_size > 5000
    result_file = tmp_path / "llava-x0.5-0/result.json"
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    result_file.unlink()                                  # as if it had been stopped before that
    monkeypatch.setattr(sys, "argv", words)               # count_flops had another
    compare.main()
    said = capfd.readouterr().out
    assert "rate x" not in said and "LLaVA-like, seed 0" in said and read_json(result_file) == result, said
    assert len(trained) == 2 and trained == {path: path.stat().st_mtime_ns for path in trained}
