"""`make demo QUICK=1`: the Makefile's commands with every stage for seconds. A second call trains nothing."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from scripts import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_demo_quick(tmp_path):
    command = ["make", "-o", ".venv/run", "demo", "QUICK=1", f"TOY={tmp_path}", f"RUN={sys.executable}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        assert "only shows that every stage runs: nothing was learned" in result.stdout
    assert "step 1/" not in result.stdout
    for stage in ("pretrain", "sft"):
        assert json.loads((tmp_path / stage / "log.jsonl").read_text().splitlines()[-1])["val_loss"] > 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["llama_frozen"] is True and not all(bar["reached"] for bar in report["bars"])
    assert all((tmp_path / stage / "recipe.json").exists() for stage in ("tokenizer", "pretrain", "sft"))
