"""What trainers set up before the first step, on a pretended GPU, and what they choose by its memory."""
from datetime import timedelta
from types import SimpleNamespace

import pytest
import tiny
import torch

import pretrain
import sft
import train_tokenizer
from model import Libra, LibraConfig
from training import engine, plan


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there -> what was asked of it, in order"""
    asked = []
    monkeypatch.setattr(engine, "check_device", torch.device)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: asked.append(options))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_settings_of_a_gpu(gpu):
    """The allocator's before the device is opened; the process group knows the device, and --timeout in minutes"""
    device = torch.device("cuda:0")
    assert engine.init_distributed("cuda", 3, group=True).device == device
    assert gpu[:2] == ["expandable_segments:True", device] and len(gpu) == 3
    assert gpu[2]["device_id"] == device and gpu[2]["timeout"] == timedelta(minutes=3)
    gpu.clear()
    engine.init_distributed("cpu", group=True)
    assert len(gpu) == 1 and gpu[0]["device_id"] is None


def test_the_users_settings_of_the_allocator_stay(gpu, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    engine.init_distributed("cuda")
    assert gpu == [torch.device("cuda:0")]


class SetUp(Exception):
    """What comes behind engine.setup"""


@pytest.mark.parametrize("module, words, expected", [
    (train_tokenizer, "", True), (train_tokenizer, "--deterministic", False), (pretrain, "", False), (sft, "", False)])
def test_kernels_are_tried_out_for_the_image_tokenizer_alone(tmp_path, monkeypatch, module, words, expected):
    """Its convolutions have one size; a text of another length would be tried anew."""
    def stop(*_, **__):
        raise SetUp
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    folders = {train_tokenizer: ["--clip", tmp_path], pretrain: ["--llm", tmp_path, "--image-tokenizer", tmp_path],
               sft: ["--model", tmp_path]}
    monkeypatch.setattr("sys.argv", [str(word) for word in (
        module.__name__, *folders[module], "--out", tmp_path / "out", "--device", "cpu", *words.split())])
    monkeypatch.setattr(train_tokenizer, "clip_sizes", stop)
    monkeypatch.setattr(Libra, "from_pretrained", stop)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with pytest.raises(SetUp):
        module.main()
    assert torch.backends.cudnn.benchmark == expected


def test_auto_sizes_memory_by_the_longest_rows(monkeypatch):
    """Two processes with memory enough for ddp and rows of the mean text, but not for ddp and rows of --max-length"""
    config = LibraConfig(vocab_size=300, hidden_size=128, intermediate_size=344, num_hidden_layers=3,
                         num_attention_heads=4, max_position_embeddings=256, vision_vocab_size=66,
                         image_feature_resolution=8, contiguous_signal_size=64)
    images, needs = tiny.image_tokenizer(), []
    trained = sum(number for number, _ in plan.libra_weights(config, True).values())
    args = SimpleNamespace(checkpoint_activations=False, compile=False, offload=False, micro_batch=4, dtype="float32",
                           text_tokens=5)
    lengths = [config.image_tokens + 2 + text for text in (5, 188)]
    for text in (5, 188):
        streams = plan.example_batch(config, args.micro_batch, text, True)
        parts = plan.gpu_bytes(trained, 0, "ddp", 2, torch.float32, config.num_hidden_layers)
        needs.append(sum(parts.values()) + 4 * plan.tokenizer_costs(images.config)[0] + plan.activation_bytes(
            config, streams, True, torch.float32, args))
    memory, model = sum(needs) / 2 / plan.ROOM, SimpleNamespace(
        config=config, tokenizers=SimpleNamespace(image=images), lm_head=torch.nn.Linear(1, 1))
    monkeypatch.setattr(plan.os, "sysconf", lambda name: 2 * memory if name == "SC_PHYS_PAGES" else 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    for args.max_length, fits in zip(lengths, (True, False)):
        args.engine = "auto"
        plan.choose_engine(args, engine.Dist(0, 2, torch.device("cpu"), torch.float32), model)
        assert (args.engine == "ddp") == fits
