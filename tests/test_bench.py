"""bench.py: what it measures against is the same computation, and every row runs at the smallest size."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

import bench
from baselines import alone, by_masks, products_of
from streams import Streams


@pytest.mark.parametrize("images", [1, 2])
def test_the_authors_way_computes_the_same(images):
    """Loss and gradients of the two-matrix form with boolean masks equal ours: the ratio compares like with like"""
    model = tiny.libra(max_position_embeddings=64)
    length = 20
    pairs = [bench.sequence(model.config, length, images, seed) for seed in range(3)]
    streams = Streams.of([ids for ids, _ in pairs], model.config, counted=[counted for _, counted in pairs])
    signal = torch.randn(3 * images, model.config.image_tokens - 2, model.config.contiguous_signal_size)
    gradients = []
    for forward in (lambda: model(streams, signal), lambda: by_masks(model, streams, signal)):
        text, image = forward()
        (text + image.mean()).backward()
        gradients.append((text.detach(), image.detach(), {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (text, image, ours), (their_text, their_image, theirs) = gradients
    torch.testing.assert_close(text, their_text, rtol=1e-5, atol=0)
    torch.testing.assert_close(image, their_image, rtol=1e-5, atol=0)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_limit_has_all_products():
    """FLOPs of the products alone: forward, the gradient of what goes in, and that of weights that learn"""
    model = tiny.libra()
    for module in model.llama():
        module.requires_grad_(False)
    ids, counted = bench.sequence(model.config, 12)
    streams = Streams.of([ids], model.config, counted=[counted])
    with products_of(model) as seen:
        model(streams, torch.randn(1, 4, 12))
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        alone(model.lm_head.weight, seen, backward=True)()
    with FlopCounterMode(display=False) as whole:
        text, image = model(streams, torch.randn(1, 4, 12))
        (text + image.mean()).backward()
    products = sum(flops for op, flops in whole.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert counter.get_total_flops() == products


def test_compiled_row(monkeypatch):
    """Two graphs: no gradient is needed of the first layer's text. The compiler itself is left to test_scale.py"""
    compiled, seen = torch.nn.Module.compile, []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend=backend))
    some = bench.Bench(repeat=1)
    some.memory = False
    bench.compile_rows(some, "tiny")
    assert len(seen) == 2 and [row["against"][:5] for row in some.rows] == ["the s", "limit"]


def test_rows(tmp_path):
    rows = [name for name in bench.ROWS if name not in ("data", "compile")]
    run = subprocess.run([sys.executable, "bench.py", "--rows", *rows, "--sizes", "tiny", "--repeat", "1", "--out",
                          tmp_path / "rows.json"], capture_output=True, text=True, cwd=bench.__file__[:-8], timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) > 20 and all(row["seconds"] > 0 for row in found["rows"])
    assert all(row["spread"][0] <= row["times as fast"] <= row["spread"][1] for row in found["rows"] if "spread" in row)


def test_no_gpu():
    run = subprocess.run([sys.executable, "bench.py", "--gpu"], capture_output=True, text=True, cwd=bench.__file__[:-8])
    assert torch.cuda.is_available() or run.returncode and "no GPU is visible" in run.stderr + run.stdout


@pytest.mark.parametrize("gigabytes, layers", [(85, 16), (151, 32)])
def test_a_small_gpu_trains_fewer_layers(gigabytes, layers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=gigabytes * 10 ** 9))
    assert bench.layers_that_fit(bench.Bench("cuda", torch.bfloat16), "full") == layers
