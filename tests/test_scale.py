"""Results must not depend on engines, processes, passes or compiling; and the plan must match real runs."""
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from scripts import checkpoint_tensors, log, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pretrain as pretrain_module
import train_tokenizer
from model import Libra, LibraConfig
from streams import Streams
from text import IMG, expand_images
from training import engine, plan

KEEPING, SAVING = (SimpleNamespace(checkpoint_activations=flag, compile=False) for flag in (False, True))


def same(folder, other, tolerance=1e-5):
    """Two model folders: every tensor within `tolerance` of its norm. A bridge's B starts at zero and leaves A next to
    no gradient, where Adam magnifies rounding: 1e-4 there."""
    tensors, others = (load_file(path / "model.safetensors") for path in (folder, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        allowed = (1e-4 if "bridge" in name else tolerance) * tensor.norm().clamp(min=1e-3)
        assert (tensor - others[name]).norm() <= allowed, name


def same_losses(folder, other):
    for line, other_line in zip(log(folder), log(other), strict=True):
        assert abs(line["loss"] - other_line["loss"]) < 1e-5 * line["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_engines_learn_what_one_process_learns(pretrain, base, tmp_path, kind):
    run("pretrain.py", *pretrain, "--micro-batch 1 --engine", kind, "--out", tmp_path, processes=2)
    same_losses(base, tmp_path)
    for line, other in zip(log(base), log(tmp_path)):
        assert abs(line["norm"] - other["norm"]) < 1e-4 * line["norm"]
    same(base, tmp_path)


@pytest.mark.slow
def test_the_held_out_loss(toy, pretrain, base, tmp_path):
    """It is the training loss of the same samples, and training does not notice it, resumed or not."""
    held_out = ["--images", toy / "eval", "--val-data", toy / "eval/held_out_captions.json"]
    run("pretrain.py", *pretrain, *held_out, "--val-every 2 --workers 1 --keep 3 --out", tmp_path / "a")
    lines = log(tmp_path / "a")
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 6, 7]
    assert all(line["val_bad"] == 0 and line["val_text"] > 0 and line["val_image"] > 0 for line in lines[1::2])
    run("pretrain.py", *pretrain, "--val-data", toy / "eval/held_out_captions.json", "--images", toy, "--val-every 2",
        "--steps 2 --out", tmp_path / "none")
    line = log(tmp_path / "none")[1]
    assert line["val_bad"] > 0 and "val_loss" not in line         # not a loss of 0
    for line, other in zip(lines, log(base), strict=True):
        assert all(line[key] == other[key] for key in ("loss", "text", "image", "norm", "lr"))
    same(tmp_path / "a", base, 0)
    for name in ("checkpoint-000006", "checkpoint-000007"):
        shutil.rmtree(tmp_path / "a" / name)
    (tmp_path / "a/log.jsonl").unlink()
    run("pretrain.py", *pretrain, *held_out, "--val-every 2 --resume --out", tmp_path / "a")
    for line, other in zip(log(tmp_path / "a"), lines[3:], strict=True):
        assert line["loss"] == other["loss"] and line.get("val_loss") == other.get("val_loss")
    n = len(json.loads((toy / "eval/held_out_captions.json").read_text()))
    words = [*pretrain, "--images", toy / "eval", "--lr 0 --steps 1 --save-every 0"]
    run("pretrain.py", *words, "--data", toy / "eval/held_out_captions.json", f"--batch {n} --out", tmp_path / "b")
    run("pretrain.py", *words, *held_out, "--out", tmp_path / "c")
    for name in ("loss", "text", "image"):
        assert abs(log(tmp_path / "b")[0][name] / log(tmp_path / "c")[0]["val_" + name] - 1) < 1e-5
    output = run("pretrain.py", *words, "--val-data", toy / "captions/*.tar", "--out", tmp_path / "d", ok=False)
    assert "00000.tar is in --data too" in output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
def test_the_held_out_loss_of_two_processes(toy, pretrain, tmp_path, kind):
    words = [*pretrain, "--images", toy / "eval", "--val-data", toy / "eval/held_out_captions.json", "--val-every 3"]
    run("pretrain.py", *words, "--out", tmp_path / "one")
    run("pretrain.py", *words, "--micro-batch 1 --engine", kind, "--out", tmp_path / "two", processes=2)
    for line, other in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert ("val_loss" in line) == (line["step"] in (3, 6, 7))
        assert all(abs(line[key] - other[key]) < 1e-5 * line[key] for key in ("loss", "val_loss") if key in line)


@pytest.fixture
def process_group():
    yield engine.init_distributed("cpu", group=True)
    torch.distributed.destroy_process_group()


def test_fsdp_hands_the_streams_on_as_they_are(process_group):
    """In bfloat16 it casts what goes into each layer: the same batch object must reach all of them."""
    model, seen = tiny.libra(), []
    streams = image_rows(model.config, (20, 20), 1)
    args = SimpleNamespace(engine="fsdp", compile=False, offload=False)
    dist = engine.Dist(0, 1, torch.device("cpu"), torch.bfloat16)
    wrapped = engine.distribute(model, model.model.layers, args, dist)
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[-1]))
    with dist.autocast():
        sum(part.sum() for part in wrapped(streams, torch.randn(2, 4, 12))).backward()
    assert len(seen) == len(model.model.layers) and all(batch is streams for batch in seen)


def test_ddp_keeps_gradients_once(process_group):
    """From the second update on they are views of DDP's buckets, in all passes of an update."""
    model, args = torch.nn.Linear(4, 4), SimpleNamespace(clip_norm=1.0)
    two = engine.Dist(0, 2, torch.device("cpu"), torch.float32)
    wrapped, optimizer = engine.replicate(model, two), torch.optim.AdamW(model.parameters())
    alone = engine.Dist(0, 1, torch.device("cpu"), torch.float32)
    passes, storages = torch.randn(2, 3, 4), []

    def loss(wrapped, x):
        storages.append([p.grad is not None and p.grad.untyped_storage().data_ptr() for p in model.parameters()])
        return {"text": wrapped(x).square().sum()}
    for step in range(3):
        pretrain_module.update(args, alone, wrapped, optimizer, loss, step, passes, {"text": 6})
    assert all(len(set(pointers)) == 1 and all(pointers) for pointers in storages[2:])


@pytest.mark.slow
def test_gradients_do_not_depend_on_processes_and_passes(pretrain, tmp_path):
    """One process with one pass; two with four passes each: 1e-6 of each tensor's norm. With --betas 0 0.99 AdamW's
    exp_avg in a checkpoint is the gradient of the last step."""
    gradients = {}
    for name, words, processes in (("one", "", 1), ("ddp", "--micro-batch 1 --engine ddp", 2),
                                   ("zero", "--micro-batch 1 --engine zero", 2),
                                   ("fsdp", "--micro-batch 1 --engine fsdp", 2)):
        run("pretrain.py", *pretrain, "--batch 8 --betas 0 0.99 --clip-norm 1e9 --steps 2 --save-every 1", words,
            "--out", tmp_path / name, processes=processes)
        tensors = checkpoint_tensors(tmp_path / name / "checkpoint-000001")
        gradients[name] = {key: tensor for key, tensor in tensors.items() if key.endswith("exp_avg")}
    one = gradients.pop("one")
    assert len(one) > 100 and sum(float(gradient.norm()) for gradient in one.values()) > 0
    for other in gradients.values():
        assert one.keys() == other.keys()
        assert all((one[key] - other[key]).norm() <= 1e-6 * one[key].norm() for key in one)


@pytest.mark.slow
def test_sharded_sft_goes_on_as_replicas(toy, base, tmp_path):
    """fsdp on two processes, resumed by one process, then by ddp on two: equals one process throughout"""
    words = ["--model", base, "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
             "--steps 6 --warmup 1 --batch 6 --lr 1e-3 --save-every 2 --keep 3"]
    run("sft.py", *words, "--out", tmp_path / "one")
    run("sft.py", *words, "--engine fsdp --checkpoint-activations --out", tmp_path / "two", processes=2)
    same(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    for later in ("checkpoint-000004", "checkpoint-000006"):
        shutil.rmtree(tmp_path / "three" / later)
    assert "processes 2, now 1" in run("sft.py", *words, "--resume --out", tmp_path / "three")
    same(tmp_path / "one", tmp_path / "three")
    for later in ("checkpoint-000004", "checkpoint-000006"):
        shutil.rmtree(tmp_path / "two" / later)
    run("sft.py", *words, "--resume --engine ddp --out", tmp_path / "two", processes=2)
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("script, processes", [("pretrain.py", 2), ("sft.py", 1)])
def test_engines_agree_in_bfloat16(toy, pretrain, base, tmp_path, script, processes):
    """One type for all products and residuals: the first loss is equal to the bit, then rounding in AdamW differs."""
    words = pretrain if script == "pretrain.py" else [
        "--model", base, "--data", toy / "chats/chat.json", "--images", toy / "chats/images", "--batch 6 --lr 1e-3"]
    losses = {}
    for kind in ("ddp", "zero", "fsdp"):
        run(script, *words, "--dtype bfloat16 --steps 3 --warmup 1 --engine", kind, "--out", tmp_path / kind,
            processes=processes)
        losses[kind] = [line["loss"] for line in log(tmp_path / kind)]
    for kind in ("zero", "fsdp"):
        assert losses[kind][0] == losses["ddp"][0]
        assert losses[kind] == pytest.approx(losses["ddp"], rel=2e-3)
    run(script, *words, "--steps 1 --warmup 1 --out", tmp_path / "float32")
    assert losses["ddp"][0] == pytest.approx(log(tmp_path / "float32")[0]["loss"], rel=5e-3)


@pytest.mark.slow
def test_fsdp_on_one_process_and_export(pretrain, base, tmp_path):
    run("pretrain.py", *pretrain, "--engine fsdp --out", tmp_path)
    same(base, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "checkpoint-000007")
    run("pretrain.py", *pretrain, "--resume --export --out", tmp_path)                        # of step 6
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path))
    assert "holds no checkpoint" in run("pretrain.py", *pretrain, "--export --out", tmp_path / "none", ok=False)
    name = "model.layers.0.self_attn.vision_q_proj.weight_A"
    assert before.keys() == after.keys() and not torch.equal(before[name], after[name])


@pytest.mark.slow
@pytest.mark.parametrize("words, processes", [("--engine fsdp", 1), ("--micro-batch 1", 1),
                                              ("--engine zero --micro-batch 1", 2)])
def test_offload(pretrain, base, tmp_path, words, processes):
    run("pretrain.py", *pretrain, "--offload", words, "--out", tmp_path, processes=processes)
    same(base, tmp_path)
    output = run("pretrain.py", *pretrain, "--offload --engine ddp --out", tmp_path / "no", ok=False)
    assert "give --engine zero or fsdp" in output


@pytest.mark.slow
def test_a_process_without_pictures_does_not_hang(toy, base, tmp_path):
    entries = json.loads((toy / "chats/chat.json").read_text())
    for number, entry in enumerate(entries):
        if number % 3:                                    # most samples are text alone
            del entry["image"]
            entry["conversations"][0]["value"] = entry["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    words = ["--model", base, "--data", tmp_path / "chat.json", "--images", toy / "chats/images",
             "--steps 4 --warmup 1 --batch 2 --lr 1e-3"]
    run("sft.py", *words, "--out", tmp_path / "one")
    for kind in ("ddp", "fsdp"):
        run("sft.py", *words, "--engine", kind, "--out", tmp_path / kind, processes=2)
        same(tmp_path / "one", tmp_path / kind)


CONFIG = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
          "num_attention_heads": 4, "max_position_embeddings": 256, "vision_vocab_size": 66,
          "image_feature_resolution": 8, "contiguous_signal_size": 64}


def test_checkpointed_layers_save_less_and_learn_the_same():
    config = LibraConfig(**CONFIG | {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6})
    streams, model = plan.example_batch(config, 2, 40, False), Libra(config)
    signal, saved, gradients = torch.randn(len(streams.image_ids), 64), [], []
    for model.checkpoint_activations in (False, True):
        saved.append(plan.saved_bytes(model.parameters(), lambda: model.loss(streams, signal)))
        model.zero_grad()
        model.loss(streams, signal).backward()
        gradients.append([p.grad for p in model.parameters()])
    planned = plan.activation_bytes(config, streams, True, torch.float32, SAVING)
    assert saved[1] < 0.2 * saved[0] and saved[1] < planned < 0.6 * saved[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def image_rows(config, lengths, images):
    """Rows of <s>, images with a newline after each, and text up to the given lengths -> Streams"""
    rows = []
    for seed, length in enumerate(lengths):
        g = torch.Generator().manual_seed(seed)
        n_text = length - 1 - images * (config.image_tokens + 1)
        text = torch.randint(3, config.vocab_size, (n_text,), generator=g).tolist()
        size = images, config.image_tokens - 2, config.vision_codebook_num
        codes = torch.randint(config.n_codes, size, generator=g)
        ids = [1, *[IMG, config.newline_token_id] * images, *text]
        rows.append(expand_images(ids, [0, *[1, 0] * images, *[1] * n_text], list(codes), config))
    return Streams.from_ids([ids for ids, _ in rows], config, loss_mask=[loss_mask for _, loss_mask in rows])


def test_compiled_layers_serve_every_batch():
    """--compile: a layer is one graph without a break. Once each layout of rows has been seen in two sizes, other
    lengths, rows and images need no new graph; and the results do not change."""
    model, plain = tiny.libra(max_position_embeddings=128), tiny.libra(max_position_embeddings=128)
    counter, graphs = CompileCounterWithBackend("eager"), []
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for images, lengths in ((1, (20, 20)), (1, (25, 19)), (1, (30, 30, 30)), (2, (30, 17, 18)), (1, (40, 33, 21, 17)),
                            (1, (22, 22)), (2, (31, 60)), (1, (30, 21, 20, 23)), (3, (50, 62, 44)), (1, (33, 33, 33))):
        streams = image_rows(model.config, lengths, images)
        signal = torch.randn(images * len(lengths), 4, 12)
        losses = [m.loss(streams, signal) for m in (model, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        graphs.append(counter.frame_count)
    assert graphs[0] == 1 and graphs[4] == graphs[-1] <= 5, graphs
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training(pretrain, base, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))    # not the user's
    run("pretrain.py", *pretrain, "--compile --out", tmp_path)
    same_losses(base, tmp_path)
    same(base, tmp_path, 1e-4)                            # other kernels round differently


@pytest.mark.parametrize("train_llama", [False, True])
def test_plan_counts_what_torch_counts(train_llama):
    """FLOPs against torch's counter, saved activations against a real pass"""
    config = LibraConfig(**CONFIG)
    streams, model = plan.example_batch(config, 2, 40, train_llama), Libra(config)
    for p in model.llama_parameters():
        p.requires_grad_(train_llama)
    signal = torch.zeros(len(streams.image_ids), config.contiguous_signal_size)
    saved = plan.saved_bytes(model.parameters(), lambda: model.loss(streams, signal))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # plain products: whole squares
        model.loss(streams, signal).backward()
    clip_config = plan.ImageTokenizerConfig(clip=plan.CLIP_L)
    flops = plan.flops_of(config, clip_config, train_llama)(plan.token_counts(streams) | {"images": 0})
    assert abs((sum(flops.values()) + flops["attention"]) / counter.get_total_flops() - 1) < 0.1
    planned = plan.activation_bytes(config, streams, train_llama, torch.float32, KEEPING)
    assert abs(planned / saved - 1) < 0.1
    assert plan.activation_bytes(config, streams, train_llama, torch.float32, SAVING) < 0.6 * planned


def test_plan_counts_an_image_tokenizer():
    """Weights, and FLOPs of its CLIP, against the whole model"""
    tokenizer, counter = tiny.image_tokenizer(), FlopCounterMode(display=False)
    assert tokenizer.config.clip["num_hidden_layers"] == max(tokenizer.config.select_layers) == 3
    with sdpa_kernel(SDPBackend.MATH), counter:
        tokenizer.signal(torch.randn(1, 3, 32, 32))
    weights, flops = plan.tokenizer_costs(tokenizer.config)
    assert weights == sum(p.numel() for p in tokenizer.parameters()) and flops == counter.get_total_flops()
    assert plan.tokenizer_costs(tiny.image_tokenizer(select_layers=[1, 2]).config)[1] < flops


def tokenizer_modules():
    tokenizer = tiny.image_tokenizer()
    tokenizer.requires_grad_(True).clip.requires_grad_(False)
    return train_tokenizer.Trained(tokenizer, 0.1), train_tokenizer.Discriminator(), train_tokenizer.LPIPS()


@pytest.mark.parametrize("words", ["", "--l2-weight 1 --clip-weight 1"])
def test_plan_counts_what_the_tokenizer_saves(words, capsys):
    """Against a real step of the generator, adversarial, with LPIPS; in bfloat16 norms stay in float32"""
    args = train_tokenizer.options().parse_args(["--micro-batch", "2", *words.split()])
    real, dist = tokenizer_modules(), engine.Dist(0, 1, torch.device("cpu"), torch.float32)
    for p in real[2].to_empty(device="cpu").parameters():
        torch.nn.init.normal_(p, 0.0, 0.02)
    weights, pixels = [p for module in real for p in module.parameters()], torch.randn(2, 3, 32, 32)
    saved = plan.saved_bytes(weights, lambda: train_tokenizer.generator_pass(args, dist, True, *real, pixels, 1))

    def planned(dtype, with_lpips=True):
        args.dtype, args.micro_batch, args.batch = dtype, 2000, 16000         # 1000 times as much: it prints 0.1 GB
        trained, discriminator, lpips = tokenizer_modules()
        plan.show_tokenizer(args, trained, discriminator, lpips if with_lpips else None, train_tokenizer.generator_pass)
        return 1e6 * float(re.search(r"activations ([\d.]+) \|", capsys.readouterr().out)[1])
    whole, without = planned("float32"), planned("float32", with_lpips=False)
    assert abs(whole / saved - 1) < 0.1 and without < whole
    assert 0.7 * without < planned("bfloat16", with_lpips=False) < without


def test_lpips_saves_nothing_for_its_target():
    lpips, picture = train_tokenizer.LPIPS().to_empty(device="cpu"), torch.randn(1, 3, 32, 32)
    for p in lpips.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02)
    learned = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert plan.saved_bytes([], lambda: lpips(picture, learned)) == 0 < plan.saved_bytes(
        [], lambda: lpips(learned, picture))


def planned(words):
    """-> lines of a plan's memory {engine: (GB of a GPU, of the CPU in training, while saving)}, TFLOP of a sample"""
    output = run("training.plan", words)
    found = re.findall(r"^  (ddp|zero|fsdp) +([\d.]+) = .* \| ([\d]+), while saving ([\d]+)$", output, re.MULTILINE)
    flops = float(re.search(r"backward: ([\d.]+)", output)[1])
    return {name: tuple(map(float, sizes)) for name, *sizes in found}, flops


def test_plan_sizes_memory_by_the_longest_rows():
    """FLOPs are those of the average row, memory is that of rows of --max-length, which a batch may be made of."""
    (memory, flops), (average, same_flops) = (planned(f"sft --micro-batch 4 --max-length {n}") for n in (2048, 880))
    assert flops == same_flops and average["zero"][0] + 30 < memory["zero"][0]                # 880: 300 of text
    config = LibraConfig(**CONFIG)
    for length, text in ((100, 32), (200, 132), (1000, 188)):                 # 66 image tokens, 256 positions
        assert plan.longest_text(SimpleNamespace(max_length=length), config) == text
    args = SimpleNamespace(checkpoint_activations=False, compile=False, offload=False, micro_batch=2, dtype="float32",
                           max_length=1000, text_tokens=5, nproc=2, memory=80)
    lines, _ = plan.libra_memory(args, config, tiny.image_tokenizer().config, True)
    streams, model = plan.example_batch(config, 2, 188, True), Libra(config)
    assert streams.length == config.max_position_embeddings
    saved = plan.saved_bytes(model.parameters(), lambda: model.loss(streams))
    assert abs(float(re.search(r"activations ([\d.]+)", lines)[1]) * 1e9 - saved) < 0.06e9
    args.micro_batch = 1000
    lines, _ = plan.libra_memory(args, config, tiny.image_tokenizer().config, True)
    assert abs(float(re.search(r"activations ([\d.]+)", lines)[1]) * 1e9 / (500 * saved) - 1) < 0.1


def test_plan_counts_gradients_once_and_the_memory_of_the_cpu():
    """Weights, gradients and AdamW of ddp are 4 + 4 + 8 bytes, its buckets are no second copy; a checkpoint copies 12
    bytes a weight to the CPU, ddp on each process; --offload keeps 16 there. The first process gathers the model."""
    trained, frozen = 1000, 500
    sizes = plan.gpu_bytes(trained, frozen, "ddp", 8, torch.float32, 2)
    assert sizes == {"frozen": 2000, "weights": 4000, "gradients": 4000, "AdamW": 8000}
    for name, offload, expected in (("ddp", False, (0, 96_000)), ("zero", False, (0, 12_000)),
                                    ("zero", True, (16_000, 28_000)), ("fsdp", True, (17_000, 29_000))):
        assert plan.cpu_bytes(trained, frozen, name, 8, torch.bfloat16, offload) == expected
    assert plan.cpu_bytes(10, 1000, "fsdp", 8, torch.bfloat16, False) == (0, 10 * 6 + 1000 * 2)


def test_plan_of_very_many_layers_takes_no_longer():
    config, few = (LibraConfig(**CONFIG | {"num_hidden_layers": n}) for n in (1000, 1))
    (n, learns), (n_few, _) = (plan.libra_weights(c, True)["expert"] for c in (config, few))
    assert (n, learns) == (1000 * n_few, True)
    streams = plan.example_batch(config, 1, 10, True)
    assert plan.activation_bytes(config, streams, True, torch.float32, KEEPING) > 300 * plan.activation_bytes(
        few, streams, True, torch.float32, KEEPING)


@pytest.mark.slow
def test_plan_of_the_paper():
    output = run("pretrain.py", "--plan --nproc 8 --memory 80 --micro-batch 8")
    assert "LLaMA                       6.738 B" in output and "expert                      4.229 B" in output
    assert "the first that fits 80 GB" in output
    assert run("training.plan", "pretrain --gpus 8 --memory 80 --micro-batch 8") == output
    assert "learns" in run("training.plan", "sft --micro-batch 1")
    memory, flops = planned("train_tokenizer --memory 80 --vgg x --lpips x --micro-batch 16")
    assert memory["ddp"] == pytest.approx((38, 0, 16), rel=0.02) and flops == pytest.approx(2.6, rel=0.01)
