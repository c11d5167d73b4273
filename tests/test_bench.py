"""bench/: what it measures against is the same computation, and its rows run at the smallest size."""
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from scripts import ROOT
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines import masked_reference, products_alone
from bench.workload import new_batch


def bench(*words):
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}               # test_scale.py compiles
    return subprocess.run([sys.executable, "-m", "bench", *words], capture_output=True, text=True, cwd=ROOT,
                          env=environment, timeout=300)


@pytest.mark.parametrize("images", [1, 2])
def test_the_authors_way_computes_the_same(images):
    """Loss and gradients of the two-matrix form with boolean masks equal ours: the ratio compares like with like"""
    model = tiny.libra()
    _, *batch = new_batch(model, 3, 20, images)
    results = []
    for forward in (model, lambda *batch: masked_reference(model, *batch)):
        text, image = forward(*batch)
        (text + image.mean()).backward()
        results.append((text.detach(), image.detach(), {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (text, image, ours), (their_text, their_image, theirs) = results
    torch.testing.assert_close(text, their_text, rtol=1e-5, atol=0)
    torch.testing.assert_close(image, their_image, rtol=1e-5, atol=0)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_limit_has_all_products():
    """FLOPs of the products alone: forward, the gradients of inputs, and those of weights that are trained"""
    model = tiny.libra()
    for p in model.llama_parameters():
        p.requires_grad_(False)
    _, *batch = new_batch(model, 1, 12)

    def step():
        text, image = model(*batch)
        (text + image.mean()).backward()
    products = products_alone(model, step)
    with FlopCounterMode(display=False) as counter:
        products()
    with FlopCounterMode(display=False) as step_counter:
        step()
    flops = step_counter.get_flop_counts()["Global"]
    assert counter.get_total_flops() == sum(n for op, n in flops.items() if "mm" in str(op)) > 0


def test_the_products_of_decoding_read_the_llama_once():
    """Also those that read a matrix in blocks, as one row does on a CPU"""
    model = tiny.libra()
    products = products_alone(model, torch.no_grad()(lambda: model.logits(*new_batch(model, 1, 1, images=0)[1:])))
    with FlopCounterMode(display=False) as counter:
        products()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "vision" not in name}
    del matrices["model.embed_tokens.weight"]
    assert counter.get_total_flops() == 2 * sum(p.numel() for p in matrices.values())


@pytest.mark.slow
@pytest.mark.parametrize("words, count", [("--rows train long compile decode quantized", 17), ("--against .", 4)])
def test_rows(words, count, tmp_path):
    run = bench(*words.split(), "--sizes", "tiny", "--repeat", "1", "--out", tmp_path / "rows.json")
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == count and all(row["tokens/s"] > 0 and len(row["times as fast"]) == 1 for row in rows)


@pytest.mark.slow
def test_against_another_repository(tmp_path):
    run = bench("--against", tmp_path, "--sizes", "tiny")
    assert run.returncode and "--against" in run.stderr and "failed" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    run = bench("--gpu")
    assert run.returncode and "no GPU is visible" in run.stderr
