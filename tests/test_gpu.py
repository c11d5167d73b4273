"""Training and decoding on a GPU, against the CPU: `make test-gpu`. Skipped where none is visible."""
import pytest
import torch
from scripts import log, run

from generate import generate
from model import Libra, LibraConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="make test-gpu needs a GPU")]


@pytest.mark.parametrize("words", ["", "--engine zero --micro-batch 2", "--engine fsdp", "--workers 2 --deterministic",
                                   "--compile", "--offload"])
def test_a_gpu_learns_what_a_cpu_learns(pretrain, tmp_path, words):
    run("pretrain.py", *pretrain, "--device cpu --dtype float32 --out", tmp_path / "cpu")
    run("pretrain.py", *pretrain, "--device cuda", words, "--out", tmp_path / "gpu")
    for line, other in zip(log(tmp_path / "cpu"), log(tmp_path / "gpu"), strict=True):
        assert abs(line["loss"] - other["loss"]) < 0.02 * line["loss"]        # bfloat16


@pytest.mark.parametrize("graphs", [True, False])
@torch.no_grad()
def test_grouped_heads_decode_on_a_gpu(graphs):
    """Heads that share keys and values, alone and in a batch: the tokens of the CPU"""
    torch.manual_seed(0)
    model = Libra(LibraConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                              contiguous_signal_size=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for prompts in ([torch.arange(9)], [torch.arange(9), torch.arange(20, 25)]):
        prompts = [ids[:, None].expand(-1, model.config.vision_codebook_num) for ids in prompts]
        wanted = torch.stack(list(generate(model, prompts, None, 40)))
        found = torch.stack(list(generate(model.cuda(), [ids.cuda() for ids in prompts], None, 40, graphs=graphs)))
        assert torch.equal(found.cpu(), wanted)
        model.cpu()
