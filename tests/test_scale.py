"""What a run must not depend on: engines, processes, passes, compiling; and what its plan promises."""
import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file
from scripts import log, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import engine
import plan
import train_tokenizer
from config import LibraConfig
from model import Libra
from streams import Streams


def same(one, two, bar=1e-5):
    """Two model folders: every tensor within `bar` of its norm. A bridge's B starts at zero and leaves A next to no
    gradient, where Adam magnifies rounding: 1e-4 there."""
    one, two = (load_file(path / "model.safetensors") for path in (one, two))
    assert one.keys() == two.keys()
    for name in one:
        most = 1e-4 if "bridge" in name else bar
        assert (one[name] - two[name]).norm() <= most * one[name].norm().clamp(min=1e-3), name


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_engines_learn_what_one_process_learns(pretrain, base, tmp_path, kind):
    run("pretrain.py", *pretrain, "--micro-batch 1 --engine", kind, "--out", tmp_path, processes=2)
    for one, two in zip(log(base), log(tmp_path), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 * one["loss"]
        assert abs(one["norm"] - two["norm"]) < 1e-4 * one["norm"]
    same(base, tmp_path)


def test_gradients_do_not_depend_on_processes_and_passes(pretrain, tmp_path, monkeypatch):
    """One process with one pass; two with four passes each, as replicas and in shares: 1e-6 of each tensor's norm"""
    found = {}
    for name, words, processes in (("one", "", 1), ("ddp", "--micro-batch 1 --engine ddp", 2),
                                   ("zero", "--micro-batch 1 --engine zero", 2),
                                   ("fsdp", "--micro-batch 1 --engine fsdp", 2)):
        monkeypatch.setenv("GRADIENTS", str(tmp_path / name))
        run("tests/gradients.py", *pretrain, "--batch 8 --out", tmp_path / "run", words, processes=processes)
        found[name] = torch.load(tmp_path / name)
    assert sum(float(gradient.norm()) for gradient in found["one"]) > 0
    for one, *others in zip(*found.values(), strict=True):
        assert all((one - other).norm() <= 1e-6 * one.norm() for other in others)


def test_sharded_sft_goes_on_as_replicas(toy, base, tmp_path):
    """Two processes with all in shares, then one process alone, then two replicas: as one process throughout"""
    words = ["--model", base, "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
             "--steps 6 --warmup 1 --batch 6 --lr 1e-3 --save-every 2"]
    run("sft.py", *words, "--out", tmp_path / "one")
    run("sft.py", *words, "--engine fsdp --checkpoint-activations --out", tmp_path / "two", processes=2)
    same(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    shutil.rmtree(tmp_path / "three/checkpoint-000004")
    assert "processes 2, now 1" in run("sft.py", *words, "--resume --out", tmp_path / "three")
    same(tmp_path / "one", tmp_path / "three")
    shutil.rmtree(tmp_path / "two/checkpoint-000004")
    run("sft.py", *words, "--resume --engine ddp --out", tmp_path / "two", processes=2)
    same(tmp_path / "one", tmp_path / "two")


def test_one_process_in_shares_and_export(pretrain, base, tmp_path):
    run("pretrain.py", *pretrain, "--engine fsdp --out", tmp_path)
    same(base, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run("pretrain.py", *pretrain, "--resume --export --out", tmp_path)                        # what step 6 was
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path))
    assert "holds no checkpoint" in run("pretrain.py", *pretrain, "--export --out", tmp_path / "none", ok=False)
    name = "model.layers.0.self_attn.vision_q_proj.weight_A"
    assert before.keys() == after.keys() and not torch.equal(before[name], after[name])


@pytest.mark.parametrize("words, processes", [("--engine fsdp", 1), ("--micro-batch 1", 1),
                                              ("--engine zero --micro-batch 1", 2)])
def test_offload(pretrain, base, tmp_path, words, processes):
    run("pretrain.py", *pretrain, "--offload", words, "--out", tmp_path, processes=processes)
    same(base, tmp_path)
    said = run("pretrain.py", *pretrain, "--offload --engine ddp --out", tmp_path / "no", ok=False)
    assert "give --engine zero or fsdp" in said


def test_a_process_without_pictures_holds_up_no_one(toy, base, tmp_path):
    entries = json.loads((toy / "chats/chat.json").read_text())
    for number, entry in enumerate(entries):
        if number % 3:                                    # most samples are words alone
            del entry["image"]
            entry["conversations"][0]["value"] = entry["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    words = ["--model", base, "--data", tmp_path / "chat.json", "--images", toy / "chats/images",
             "--steps 4 --warmup 1 --batch 2 --lr 1e-3"]
    run("sft.py", *words, "--out", tmp_path / "one")
    for kind in ("ddp", "fsdp"):
        run("sft.py", *words, "--engine", kind, "--out", tmp_path / kind, processes=2)
        same(tmp_path / "one", tmp_path / kind)


def test_checkpointed_layers_keep_less_and_learn_the_same():
    config = LibraConfig(vocab_size=300, hidden_size=64, intermediate_size=172, num_hidden_layers=6,
                         num_attention_heads=4, max_position_embeddings=256, vision_vocab_size=66,
                         image_feature_resolution=8, contiguous_signal_size=64)
    streams, model = plan.batch_of(config, 2, 40, "pretrain"), Libra(config)
    signal, found = torch.randn(len(streams.image_ids), 64), []
    for again in (False, True):
        model.checkpoint_activations = again
        kept = plan.Kept(model.parameters())
        with kept.hooks:
            loss = model.loss(streams, signal)
        model.zero_grad()
        loss.backward()
        found.append((kept.bytes, [p.grad for p in model.parameters()]))
    planned = plan.activations(config, streams, True, torch.float32, True)
    assert found[1][0] < 0.2 * found[0][0] and found[1][0] < planned < 0.6 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_compiled_layers_serve_every_batch():
    """--compile: a layer is one graph without a break; once each way to cut rows has been met in two sizes, other
    lengths, rows and images need no new one; and nothing changes in what is computed"""
    model, counter = tiny.libra(max_position_embeddings=128), CompileCounterWithBackend("eager")
    plain = tiny.libra(max_position_embeddings=128)
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    frames = []
    for images, lengths in ((1, (20, 20)), (1, (25, 19)), (1, (30, 30, 30)), (2, (30, 17, 18)), (1, (40, 33, 21, 17)),
                            (1, (22, 22)), (2, (31, 60)), (1, (30, 21, 20, 23)), (3, (50, 62, 44)), (1, (33, 33, 33))):
        pairs = [bench.sequence(model.config, length, images, seed) for seed, length in enumerate(lengths)]
        streams = Streams.of([ids for ids, _ in pairs], model.config, counted=[counted for _, counted in pairs])
        signal = torch.randn(images * len(lengths), 4, 12)
        losses = [one.loss(streams, signal) for one in (model, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[4] == frames[-1] <= 5, frames
    for one, two in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_compiled_training(pretrain, base, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))    # a kill leaves half a file in torch's
    run("pretrain.py", *pretrain, "--compile --out", tmp_path)
    for one, two in zip(log(base), log(tmp_path), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 * one["loss"]
    same(base, tmp_path, 1e-4)                            # other kernels round otherwise


@pytest.mark.parametrize("tune", [False, True])
def test_plan_counts_what_torch_counts(tune):
    """FLOPs against torch's counter, what the backward pass keeps against a real pass"""
    config = LibraConfig(vocab_size=300, hidden_size=128, intermediate_size=344, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=256, vision_vocab_size=66,
                         image_feature_resolution=8, contiguous_signal_size=64)
    streams = plan.batch_of(config, 2, 40, "sft" if tune else "pretrain")
    model = Libra(config)
    for module in [] if tune else model.llama():
        module.requires_grad_(False)
    signal = torch.zeros(len(streams.image_ids), config.contiguous_signal_size)
    kept = plan.Kept(model.parameters())
    counter = FlopCounterMode(display=False)
    with kept.hooks:
        model.loss(streams, signal)
    with counter, sdpa_kernel(SDPBackend.MATH):           # as plain products, which torch counts: whole squares
        model.loss(streams, signal).backward()
    counts = {"text": len(streams.text_ids), "image": len(streams.image_ids), "text_targets": len(streams.text_rows),
              "image_targets": len(streams.image_rows), "squares": sum(n * n for n in streams.lengths), "images": 0}
    eye = plan.ImageTokenizerConfig(clip=plan.CLIP_L)
    ours = plan.flops_of(model, eye)(counts)
    assert abs((sum(ours.values()) + ours["attention"]) / counter.get_total_flops() - 1) < 0.1
    planned = plan.activations(config, streams, tune, torch.float32, False)
    assert abs(planned / kept.bytes - 1) < 0.1
    assert plan.activations(config, streams, tune, torch.float32, True) < 0.6 * planned


def test_plan_counts_what_the_tokenizer_keeps():
    """Against a real step of the generator, adversarial, with LPIPS; in bfloat16 norms stay in float32"""
    args = train_tokenizer.options().parse_args(["--batch", "2"])
    tokenizer, discriminator, lpips = tiny.image_tokenizer(), train_tokenizer.Discriminator(), train_tokenizer.LPIPS()
    lpips.to_empty(device="cpu")
    for p in lpips.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02)
    tokenizer.requires_grad_(True).clip.requires_grad_(False)
    trained, pixels = train_tokenizer.Trained(tokenizer, 0.1, 0.0), torch.randn(2, 3, 32, 32)
    found = plan.Kept([p for module in (trained, discriminator, lpips) for p in module.parameters()])
    with found.hooks:
        train_tokenizer.reconstruct(args, engine.World(0, 1, torch.device("cpu"), torch.float32), True, tokenizer,
                                    trained, discriminator, lpips, pixels, 1)
    planned = plan.kept_by_tokenizer(trained, discriminator, lpips, pixels, torch.float32)
    assert abs(planned / found.bytes - 1) < 0.1
    without, half = (plan.kept_by_tokenizer(trained, discriminator, None, pixels, dtype)
                     for dtype in (torch.float32, torch.bfloat16))
    assert without < planned and 0.7 * without < half < without


def test_plan_of_the_paper():
    said = run("pretrain.py", "--plan --nproc 8 --memory 80 --micro-batch 8")
    assert "LLaMA                       6.738 B" in said and "expert                      4.229 B" in said
    assert "9% of that GPU's peak" in said and "the first that fits 80 GB" in said
    assert "learns" in run("sft.py", "--plan --micro-batch 1")
    said = run("train_tokenizer.py", "--plan --memory 80 --vgg x --lpips x --micro-batch 16")
    assert "decoder" in said and "ddp       41." in said and "the first that fits 80 GB: ddp" in said
