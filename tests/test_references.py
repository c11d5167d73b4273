"""Parity with transformers: the LLaMA from Hugging Face folders, CLIP and its preprocessing."""
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image

from common.weights import assign
from generate import generate
from llama import Llama
from model import load
from streams import Streams
from tokenizer import CLIP_MEAN, CLIP_STD, ClipViT, clip_sizes, prepare, read_clip_weights
from toy.make import muon

VISION = {"vision_vocab_size": 10, "vision_codebook_num": 2, "image_feature_resolution": 2,
          "contiguous_signal_size": 12, "newline_token_id": 13}
BASE = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
LLAMAS = [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "tie_word_embeddings": True},
          {"rope_theta": 1e6, "rms_norm_eps": 1e-6}, {"num_attention_heads": 8, "num_hidden_layers": 5},
          {"head_dim": 32, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5e5}]


@pytest.mark.parametrize("number", range(6))
def test_llama(number, tmp_path, capsys):
    torch.manual_seed(number)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | LLAMAS[number]))).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.15)
    theirs.save_pretrained(tmp_path, max_shard_size="150KB" if number % 2 else "5GB")         # 3 and more shards
    assert len(list(tmp_path.glob("*.safetensors"))) >= (3 if number % 2 else 1)
    ours = load(tmp_path, VISION).eval()
    assert "is new and untrained" in capsys.readouterr().out
    rows = [torch.randint(3, 90, (n,)) for n in (37, 200)]
    for row in rows:
        with torch.no_grad():
            a = ours.logits(Streams.from_ids([row[:, None].expand(-1, 2)], ours.config))[0]
            b = theirs(row[None]).logits[0]
            plain = Llama.from_pretrained(tmp_path)(row[None])[0]
        assert (a - b).abs().max() / b.abs().max() <= 1e-5 and (plain - b).abs().max() / b.abs().max() <= 1e-5
    with torch.no_grad():
        expected = theirs.generate(rows[0][None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = torch.stack(list(generate(ours, [rows[0][:, None].expand(-1, 2)], max_new_tokens=64)))[:, 0, 0]
    assert torch.equal(found, expected[0, len(rows[0]):])


def test_clip(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**tiny.CLIP, projection_dim=16)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        ours = ClipViT(**clip_sizes(tmp_path))
    assign(ours, read_clip_weights(tmp_path), tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states
        for a, b in zip(ours.hidden_states(pixels), expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def pictures():
    """12 opaque pictures: portrait, landscape, square, tiny, thin, grey"""
    random = np.random.default_rng(0)
    for number, (wide, high) in enumerate([(500, 375), (375, 500), (336, 336), (640, 480), (17, 23), (1, 1), (337, 336),
                                           (900, 100), (63, 1000), (224, 224), (33, 32), (1024, 683)]):
        smooth = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((wide, high))
        noise = random.integers(-20, 20, (high, wide, 3))
        picture = Image.fromarray((np.asarray(smooth, dtype=int) + noise).clip(0, 255).astype(np.uint8))
        yield picture.convert("L") if number in (3, 9) else picture


def test_preprocessing():
    """Within one grey level of CLIPImageProcessor's PIL version; printed: the share of pixels that differ at all"""
    size = 336
    backend = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    theirs = backend(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    mean, std = (np.array(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    for number, picture in enumerate(pictures()):
        expected = np.asarray(theirs(picture, return_tensors="np")["pixel_values"][0])
        ours = prepare(picture.convert("RGB"), size, square=False).numpy()
        a, b = (np.rint((x * std + mean) * 255) for x in (ours, expected))
        share = (a != b).mean()
        print(f"picture {number}, {picture.size}: {share:.2%} differ, by at most {np.abs(a - b).max():.0f}")
        assert np.abs(a - b).max() <= 1


def test_muon():
    """The stand-ins' optimizer in float32 against torch's, which computes in bfloat16"""
    g = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in [(24, 40)] * 2 + [(40, 24)] * 2]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    momenta = [torch.zeros(2, 24, 40), torch.zeros(2, 40, 24)]
    for _ in range(5):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        optimizer.step()
        for group, momentum in zip((ours[:2], ours[2:]), momenta):
            muon(group, momentum, 0.01)
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() < 0.1 * (p - old).norm() and 0.05 < (p - old).square().mean().sqrt() / 0.01 < 0.4
