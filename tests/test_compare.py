"""The table of four systems, one row for seconds: search, scores, costs, table, figure. A second call trains nothing."""
import sys

import pytest

from common.weights import read_json
from toy import compare


@pytest.mark.slow
def test_one_row(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "FACTORS", (0.5,))
    monkeypatch.setattr(sys, "argv", [
        "compare", "--toy", str(toy), "--out", str(tmp_path), "--steps", "2", "--limit", "12", "--judge", "12",
        "--seeds", "0", "--rows", "llava"])
    compare.main()
    assert "LLaVA-like, rate x 0.5" in (said := capfd.readouterr().out) and "LLaVA-like, seed 0" in said
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")}
    assert lines[""] == ["LLaVA-like"] and lines["CLIP to answer"] == ["yes"] and lines["learning rates x"] == ["0.5"]
    assert set(compare.COLUMNS) | set(compare.COSTS) < set(lines) and ["-"] not in lines.values()
    result, costs = read_json(tmp_path / "llava-0/result.json"), read_json(tmp_path / "costs.json")["llava"]
    assert all(0 <= value <= 1 for name, value in result.items() if name != "text perplexity")
    assert result["text perplexity"] > 1 and all(value > 0 for value in costs.values())
    assert (tmp_path / "compare.png").stat().st_size > 5000
    result_file = tmp_path / "llava-0/result.json"
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    result_file.unlink()                                  # as if it had been stopped before that
    compare.main()
    said = capfd.readouterr().out
    assert "rate x" not in said and "LLaVA-like, seed 0" in said and read_json(result_file) == result
    assert len(trained) == 4 and trained == {path: path.stat().st_mtime_ns for path in trained}
