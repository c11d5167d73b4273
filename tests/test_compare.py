"""The table of four systems: one row for seconds. A second call trains nothing."""
import sys

import pytest

from common.weights import read_json
from toy import compare


@pytest.mark.slow
def test_one_row(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "FACTORS", (1.0,))
    monkeypatch.setattr(sys, "argv", [
        "compare", "--toy", str(toy), "--out", str(tmp_path), "--steps", "2", "--limit", "23", "--judge", "23",
        "--seeds", "0", "--rows", "llava"])
    compare.main()
    table = (tmp_path / "table.md").read_text()
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in table.splitlines() if line.startswith("|")}
    assert lines[""] == ["LLaVA-like"] and lines["CLIP to answer"] == ["yes"]
    assert set(compare.COLUMNS) | set(compare.COSTS) < set(lines)
    result = read_json(tmp_path / "llava-0/result.json")
    assert all(0 <= value <= 1 for name, value in result.items() if name != "text perplexity")
    assert result["text perplexity"] > 1
    assert all(value > 0 for value in read_json(tmp_path / "costs.json")["llava"].values())
    written = [path.stat().st_mtime for path in sorted(tmp_path.rglob("model.safetensors"))]
    capsys.readouterr()
    compare.main()
    assert "seed" not in capsys.readouterr().out.split("|")[0]
    assert written == [path.stat().st_mtime for path in sorted(tmp_path.rglob("model.safetensors"))]
    assert (tmp_path / "compare.png").stat().st_size > 5000
