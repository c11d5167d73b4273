"""Training on a GPU, against the CPU: `make test-gpu`. Skipped where none is visible."""
import pytest
import torch
from scripts import log, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="make test-gpu needs a GPU")]


@pytest.mark.parametrize("words", ["", "--engine zero --micro-batch 2", "--engine fsdp", "--workers 2 --deterministic",
                                   "--compile", "--offload"])
def test_a_gpu_learns_what_a_cpu_learns(pretrain, tmp_path, words):
    run("pretrain.py", *pretrain, "--device cpu --dtype float32 --out", tmp_path / "cpu")
    run("pretrain.py", *pretrain, "--device cuda", words, "--out", tmp_path / "gpu")
    for line, other in zip(log(tmp_path / "cpu"), log(tmp_path / "gpu"), strict=True):
        assert abs(line["loss"] - other["loss"]) < 0.02 * line["loss"]        # bfloat16
