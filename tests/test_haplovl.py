"""HaploVL: block mask, cache, batches, tiles, folders, both stages of training. The authors' outputs: test_golden.py"""
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import checkpoint_tensors, log, run
from tiny import continued

from answering.sampling import Sampler
from common.weights import UserError, shapes_only
from llama import Llama
from monolithic import shared
from monolithic.haplovl import Distillation, HalfConfig, HaploVL, InputRMSNorm, read_config
from text import IMG

SIZES = {"num_hidden_layers": 2, "vocab_size": 90, "image_token_index": 88, "patch_size": 4, "default_image_size": 8,
         "max_position_embeddings": 256}


def halves(ratio="anyres_max_6", **changes):
    image = SIZES | {"image_aspect_ratio": ratio}
    base = HalfConfig(hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, **image)
    pre = HalfConfig(**image | {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
                                "num_key_value_heads": 4, "norm_mode": "layernorm", "attention_rope": True} | changes)
    return base, pre


def tiny(ratio="anyres_max_6", spread=0.2, **changes):
    """Weights far from zero, biases too, so that every path matters"""
    torch.manual_seed(0)
    model = HaploVL(*halves(ratio, **changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, spread)
    return model


def picture(width, height, seed=0):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def words(n, seed=0):
    return torch.randint(1, 88, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(model, prompts, pictures, left=False):
    """-> a batch of lists of ids with IMG, padded on one side"""
    ready, rows = [shared.prepare_picture(p, model.base) for p in pictures], []
    sizes = [len(order) for _, order in ready]
    for ids in prompts:
        rows.append(shared.expand_images(ids, ids, sizes, model.base.image_token_index)[0])
        sizes = sizes[ids.count(IMG):]
    ids, mask = shared.pad(rows)
    if left:
        ids, mask = (torch.stack([row.roll(ids.shape[1] - len(r)) for row, r in zip(x, rows)]) for x in (ids, mask))
    return shared.Batch.build(ids, mask, ready, model.base), mask


PICTURES = [picture(20, 9), picture(5, 40, 1), picture(8, 8, 2)]
PROMPTS = [[*words(3), IMG, *words(4, 1)], [IMG, IMG, *words(2, 2)], words(9, 3)]


def test_published_size_and_keys():
    """Haplo-7B-Pro: 7,635,530,240 weights in 889 tensors"""
    base = HalfConfig(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                      num_key_value_heads=4, rope_theta=1e6)
    pre = HalfConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     num_key_value_heads=16, norm_mode="layernorm", attention_rope=True)
    with shapes_only():
        state = HaploVL(base, pre).state_dict()
    assert sum(t.numel() for t in state.values()) == 7_635_530_240 and len(state) == 889
    keys = {"model.embed_tokens.weight", "model.patch_embed.proj.weight", "model.pre_pos_embed", "model.image_newline",
            "model.pre_norm.weight", "model.pre_norm.bias", "model.pre_connector.weight", "model.norm.weight",
            "lm_head.weight"}
    for i in range(52):
        parts = [f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        parts += [f"{norm}.bias" for norm in ("input_layernorm", "post_attention_layernorm") if i < 24]
        parts += [f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")]
        parts += [f"mlp.{x}_proj.{kind}" for x in ("gate", "up", "down") for kind in ("weight", "bias")]
        keys |= {f"model.layers.{i}.{part}" for part in parts}
    assert state.keys() == keys
    assert state["model.pre_pos_embed"].shape == (1, 576, 1024)
    assert state["model.layers.23.mlp.gate_proj.weight"].shape == (4096, 1024)
    assert state["model.layers.24.self_attn.k_proj.weight"].shape == (512, 3584)


def test_mask_by_a_loop():
    """Query i sees key j if start[j] <= i and j is no padding; images that touch are two blocks."""
    model = tiny()
    for left in (False, True):
        batch, real = batch_of(model, PROMPTS, PICTURES, left)
        sizes = iter([len(shared.patch_order(*p.size, model.base)) for p in PICTURES])
        mask = batch._replace(segments=None).mask()[:, 0]
        for row, ids in enumerate(batch.ids.tolist()):
            start, j = list(range(len(ids))), 0
            while j < len(ids):
                n = next(sizes) if ids[j] == model.base.image_token_index else 1
                start[j:j + n] = [j] * n
                j += n
            for i in real[row].nonzero()[:, 0].tolist():
                wanted = [start[j] <= i and bool(real[row, j]) for j in range(len(ids))]
                assert mask[row, i].tolist() == wanted


LAYOUTS = {"text-image-text": (PROMPTS[0], PICTURES[:1]), "images first": (PROMPTS[1], PICTURES[1:]),
           "text": (PROMPTS[2], []), "image": ([IMG], PICTURES[:1]),
           "three": ([*words(3), IMG, *words(2, 1), IMG, IMG], PICTURES)}


@torch.no_grad()
@pytest.mark.parametrize("prompt, pictures", LAYOUTS.values(), ids=LAYOUTS)
def test_fast_attention_is_the_masked_one(prompt, pictures):
    """One row, and rows that differ in what follows the images: no mask of L x L is made."""
    model = tiny()
    for prompts in ([prompt], [prompt, prompt + words(5, 4)]):
        batch, real = batch_of(model, prompts, pictures * len(prompts))
        assert batch.segments is not None and isinstance(batch.mask(), list)
        fast, masked = (model.hidden(b.ids, b)[real] for b in (batch, batch._replace(segments=None)))
        torch.testing.assert_close(fast, masked, rtol=0, atol=2e-5)


def test_fast_attention_has_the_same_gradients():
    model, found = tiny(), []
    batch, real = batch_of(model, PROMPTS[:1], PICTURES[:1])
    for b in (batch, batch._replace(segments=None)):
        model.zero_grad()
        (model.hidden(b.ids, b) * torch.arange(48)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_who_sees_whom():
    """A patch sees the question before its image and every patch of it, also in the pre-decoder; not the text after."""
    model = tiny()
    batch, _ = batch_of(model, PROMPTS[:1], PICTURES[:1])
    x = model.model.embed_tokens(batch.ids).detach()
    first, last = int(batch.image_index[0]), int(batch.image_index[-1])
    model.model.embed_tokens.register_forward_hook(lambda *_: x)

    def changed(place):
        """Which positions of the pre-decoder's output does an embedding change?"""
        before = model.encode(batch.ids, batch)[0]
        x[0, place] += 1
        moved = (model.encode(batch.ids, batch)[0] != before).any(-1)[0]
        x[0, place] -= 1
        return moved.nonzero()[:, 0].tolist()
    length = batch.ids.shape[1]
    with torch.no_grad():
        assert changed(first - 1) == list(range(first - 1, length))
        assert changed(last + 2) == list(range(last + 2, length))
        model.model.pre_pos_embed[0, -1] += 1
        changed_patch = model.encode(batch.ids, batch)[0]
        model.model.pre_pos_embed[0, -1] -= 1
        moved = (changed_patch != model.encode(batch.ids, batch)[0]).any(-1)[0].nonzero()[:, 0].tolist()
    assert moved == list(range(first, length))


@torch.no_grad()
def uncached(model, prompt, pictures, n=6, **sampling):
    ids, sampler = list(prompt), Sampler(**sampling)
    for _ in range(n):
        batch, _ = batch_of(model, [ids], pictures)
        ids.append(int(sampler(model.lm_head(model.hidden(batch.ids, batch)[:, -1])[:, :88], [0])))
    return ids[len(prompt):]


@pytest.mark.parametrize("ratio, changes", [("anyres_max_6", {}), ("square", {}), ("square", {
    "attention_rope": False, "num_attention_heads": 8, "hidden_size": 96, "norm_mode": "rmsnorm"})])
def test_cached_is_uncached_and_a_batch_is_its_rows(ratio, changes):
    model, used = tiny(ratio, **changes), 0
    model.text = SimpleNamespace(vocab_size=88)           # <image>, 88, is not generated
    sampling = {"temperature": 5.0, "seed": 3}            # nearly every id is possible: a small difference would show
    greedy, sampled = (continued(model, PROMPTS, PICTURES, 8, **options) for options in ({}, sampling))
    for row, prompt in enumerate(PROMPTS):
        pictures = PICTURES[used:used + prompt.count(IMG)]
        used += len(pictures)
        assert greedy[row] == continued(model, [prompt], pictures, 8)[0] == uncached(model, prompt, pictures, 8)
        seeded = sampling | {"seed": 3 + row}
        alone = continued(model, [prompt], pictures, 8, **seeded)[0]
        assert sampled[row] == alone == uncached(model, prompt, pictures, 8, **seeded) and len(set(alone)) > 4


def test_generation_stops_and_refuses():
    model = tiny()
    sampling = {"temperature": 5.0, "seed": 3}
    whole = continued(model, PROMPTS, PICTURES, 6, **sampling)
    stopped = continued(model, PROMPTS, PICTURES, 6, stop=[whole[0][2]], **sampling)
    assert stopped == [ids[:ids.index(whole[0][2]) + 1] if whole[0][2] in ids else ids for ids in whole]
    for prompts, pictures, what in (([[1, IMG]], [], "pictures"), ([[1] * 256], [], "too little room"),
                                    ([[1, IMG]], ["missing.png"], "missing.png"), ([], [], "0 prompts")):
        with pytest.raises((UserError, AssertionError), match=what):
            model.read(prompts, pictures)
    with pytest.raises(UserError, match="image tokens"):
        shared.Batch.build(torch.tensor([[1, 88]]), torch.ones(1, 2).bool(), [], model.base)


def test_bfloat16_is_near_float32():
    model = tiny(spread=0.1)
    batch, real = batch_of(model, PROMPTS, PICTURES)
    with torch.no_grad():
        exact = model.hidden(batch.ids, batch)[real]
        rough = model.bfloat16().hidden(batch.ids, batch)[real]
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.05
    assert len(continued(model, PROMPTS, PICTURES, 6)[0]) == 6


def test_rms_norm_is_in_the_dtype_of_its_input():
    norm, x = InputRMSNorm(8, 1e-6), torch.randn(5, 8).bfloat16()
    assert torch.equal(norm(x), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_without_its_additions_it_is_a_llama():
    """Post-decoder on text: a LLaMA with the same weights, where biases are zero"""
    base, pre = halves()
    base.norm_mode = "rmsnorm"
    model, llama = tiny(), Llama(base)
    state = {name.replace(f"layers.{i}", f"layers.{i - 2}"): t for name, t in model.state_dict().items()
             for i in (2, 3) if f"layers.{i}." in name}
    llama.load_state_dict(state | {"model.norm.weight": model.model.norm.weight, "lm_head.weight": model.lm_head.weight,
                                   "model.embed_tokens.weight": llama.model.embed_tokens.weight})
    ids = torch.tensor([words(7)])
    x = llama.model.embed_tokens(ids)
    model.model.pre_connector.register_forward_hook(lambda *_: x)
    torch.testing.assert_close(model.hidden(ids, batch_of(model, [words(7)], [])[0]), llama.hidden_states(ids), rtol=0,
                               atol=1e-4)


def test_tiles():
    """Numbers of tokens at the published size: one tile 24 x 25, a large square 48 x 49, one square of 577"""
    published = HalfConfig()
    assert len(published.image_grid_pinpoints) == 14
    for size, n in ((336, 336), 600), ((672, 672), 2352), ((2000, 2000), 2352), ((20000, 10), 2 * 145):
        assert len(shared.patch_order(*size, published)) == n
    assert len(shared.patch_order(640, 480, HalfConfig(image_aspect_ratio="square"))) == 577
    c = halves()[0]
    tiles, order = shared.prepare_picture(picture(80, 16), c)                                 # 1 x 5 tiles of 2 x 2
    assert tiles.shape == (5, 3, 8, 8) and order.tolist()[:11] == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, -1]
    assert all(len(shared.prepare_picture(picture(w, h), c)[1]) for w, h in ((1, 90), (90, 1), (1, 1), (3, 1000)))


def test_a_cut_never_goes_through_an_image():
    ids, labels, n = shared.expand_images([1, IMG, 2, IMG, 3], [0, 1, 1, 1, 1], [4, 4], 88, 9)
    assert ids == [1, 88, 88, 88, 88, 2] and labels == [0, 0, 0, 0, 0, 1] and n == 1


def test_folders(tmp_path):
    """Saved and read back; the same in shards with an index; a damaged or foreign config.json in one sentence"""
    model = tiny("square")
    model.save_pretrained(tmp_path / "a")
    again = HaploVL.from_pretrained(tmp_path / "a")
    assert (again.base, again.pre) == (model.base, model.pre) and again.text is None
    assert continued(again, PROMPTS, PICTURES) == continued(model, PROMPTS, PICTURES)
    (tmp_path / "b").mkdir()
    tensors, index = load_file(tmp_path / "a/model.safetensors"), {}
    for part in (0, 1):
        shard = {name: t for i, (name, t) in enumerate(sorted(tensors.items())) if i % 2 == part}
        index |= dict.fromkeys(shard, f"model-{part}.safetensors")
        save_file(shard, tmp_path / f"b/model-{part}.safetensors")
    (tmp_path / "b/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copyfile(tmp_path / "a/config.json", tmp_path / "b/config.json")
    assert continued(HaploVL.from_pretrained(tmp_path / "b", torch.bfloat16).float(), PROMPTS[2:], [], 1)
    sharded = HaploVL.from_pretrained(tmp_path / "b")
    assert all(torch.equal(t, tensors[name]) for name, t in sharded.state_dict().items())
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["model_type"] == "haplo" and config["hidden_size"] == config["base_config"]["hidden_size"] == 48
    for name, value, said in (("hidden_act", "swoosh", "swoosh"), ("norm_mode", "none", "none"), (
            "rope_scaling", {"type": "linear"}, "linear"), ("tie_word_embeddings", True, "True"), (
            "num_attention_heads", 5, "divide"), ("attention_rope", "yes", "yes"), ("hidden_size", 64, "shape")):
        pre = config["pre_config"] | {name: value}
        (tmp_path / "b/config.json").write_text(json.dumps(config | {"pre_config": pre}))
        with pytest.raises(UserError) as error:
            HaploVL.from_pretrained(tmp_path / "b")
        assert said in str(error.value) and "config.json" in str(error.value)


def test_defaults_of_the_published_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "haplo", "base_config": {"max_window_layers": 28},
                                                      "pre_config": {"num_key_value_heads": None}}))
    base, pre = read_config(tmp_path / "config.json")
    wanted = {"vocab_size": 152064, "patch_size": 14, "default_image_size": 336, "norm_mode": "rmsnorm",
              "attention_rope": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000,
              "image_token_index": 151646, "image_aspect_ratio": "anyres_max_6", "hidden_size": 4096,
              "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    assert wanted.items() <= asdict(base).items() and wanted.items() <= asdict(pre).items()
    assert base.image_grid_pinpoints[:3] == [[336, 336], [336, 672], [336, 1008]]
    haplo = {"model_type": "haplo", "base_config": {}, "pre_config": {}}
    for values in ({}, {"model_type": "haplo", "base_config": {}}, haplo | {"model_type": "llama"},
                   haplo | {"base_config": {"image_grid_pinpoints": [[336]]}},
                   haplo | {"base_config": {"vocab_size": 32000}},            # without an image_token_index in it
                   haplo | {"base_config": {"image_grid_pinpoints": [[336, 336 * 8]]}}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match="config.json"):
            read_config(tmp_path / "config.json")


# ---------------------------------------------------------------- training

@pytest.mark.parametrize("far", [0.0, 1.0])
def test_the_connector_maps_text_to_the_embeddings(far):
    """Its loss is a share of their mean square: 0 at the embeddings themselves, 1 at zero. Equal logits: log V"""
    torch.manual_seed(0)
    model, table, n = Distillation(*halves(), 24), 3 * torch.randn(90, 48), len(PROMPTS[2])
    torch.nn.init.zeros_(model.text_head.weight)
    batch, _ = batch_of(model, PROMPTS[2:], [])
    wanted = (1 - far) * table[batch.ids]
    model.model.pre_connector.register_forward_hook(lambda *_: wanted.flatten(0, 1))
    _, text = model(batch._replace(loss_mask=torch.ones(1, n, dtype=torch.bool)), torch.zeros(0, 24), table)
    share = far * table[batch.ids].square().mean(-1).sum() / table.square().mean()
    torch.testing.assert_close(text, n * torch.tensor(90.0).log() + share)


@pytest.fixture(scope="module")
def stages(toy, tmp_path_factory):
    """-> options of both stages, their run folders"""
    out = tmp_path_factory.mktemp("haplovl")
    one = ["--stage 1 --llm", toy / "llama", "--clip", toy / "clip", "--data", toy / "captions/*.tar",
           "--steps 5 --save-every 3 --warmup 1 --batch 6 --lr 1e-3 --micro-batch 3"]
    two = ["--stage 2 --model", out / "1", "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
           "--steps 5 --save-every 3 --warmup 1 --batch 6 --lr 1e-3"]
    run("monolithic.haplovl", *one, "--out", out / "1")
    run("monolithic.haplovl", *two, "--out", out / "2")
    return one, two, out


@pytest.mark.slow
def test_stage_1_learns_the_pre_decoder_and_leaves_the_llm(toy, stages):
    _, _, out = stages
    lines = log(out / "1")
    assert lines[-1]["vision"] < lines[0]["vision"] and lines[-1]["text"] < lines[0]["text"]
    llm, made = load_file(toy / "llama/model.safetensors"), load_file(out / "1/model.safetensors")
    assert torch.equal(made["model.layers.4.mlp.up_proj.weight"], llm["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(made["model.layers.7.self_attn.o_proj.weight"], llm["model.layers.3.self_attn.o_proj.weight"])
    assert torch.equal(made["lm_head.weight"][:-1], llm["lm_head.weight"]) and not made["lm_head.weight"][-1].any()
    assert torch.equal(made["model.norm.weight"], llm["model.norm.weight"])
    assert not made["model.layers.5.self_attn.q_proj.bias"].any() and made["model.layers.1.self_attn.q_proj.bias"].any()
    assert not any("head" in name and name != "lm_head.weight" for name in made)              # the heads are dropped
    assert made["model.pre_connector.weight"].std() > 0.01


@pytest.mark.slow
def test_stage_2_trains_everything_and_answers(toy, stages):
    _, _, out = stages
    before, after = (load_file(out / stage / "model.safetensors") for stage in "12")
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert log(out / "2")[-1]["loss"] < log(out / "2")[0]["loss"]
    model = HaploVL.from_pretrained(out / "2").eval()
    image = toy / "eval/images/000000000000.png"
    prompt, _ = model.text.chat([("What is this?", 1, None)])
    texts = continued(model, [prompt, model.text.plain("a red")], [image], 8, [model.text.eos])
    assert all(max(ids) < model.text.vocab_size for ids in texts) and isinstance(model.text.decode(texts[0]), str)


@pytest.mark.slow
def test_both_stages_resume_bit_for_bit(stages, tmp_path):
    one, two, out = stages
    for stage, options in (("1", one), ("2", two)):
        copy = tmp_path / stage
        shutil.copytree(out / stage, copy)
        shutil.rmtree(copy / "checkpoint-000005")
        for name in ("model.safetensors", "log.jsonl"):
            (copy / name).unlink()
        assert "going on from" in run("monolithic.haplovl", *options, "--resume --out", copy)
        for before, after in zip(log(out / stage)[3:], log(copy), strict=True):
            assert all(before.get(key) == after.get(key) for key in ("loss", "vision", "text", "norm", "lr"))
        before, after = (load_file(path / "model.safetensors") for path in (out / stage, copy))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        before, after = (checkpoint_tensors(path / "checkpoint-000005") for path in (out / stage, copy))
        assert before.keys() == after.keys() and len(before) > 10
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in
                   ((before[key], after[key]) for key in before))


@pytest.mark.slow
def test_two_processes_and_other_options(toy, stages, tmp_path):
    """ddp and fsdp learn what one process does; bfloat16, one square, workers, recomputed activations run"""
    one, two, out = stages
    for stage, options in (("1", one), ("2", two)):
        for engine in ("ddp", "fsdp"):
            run("monolithic.haplovl", *options, "--micro-batch 3 --engine", engine, "--out", tmp_path / stage / engine,
                "--steps 2", processes=2)
            for alone, both in zip(log(out / stage), log(tmp_path / stage / engine)):
                assert both["loss"] == pytest.approx(alone["loss"], rel=0.02)
    run("monolithic.haplovl", *one, "--image-aspect-ratio square --dtype bfloat16 --workers 1 --checkpoint-activations",
        "--steps 2 --out", tmp_path / "square")
    assert HaploVL.from_pretrained(tmp_path / "square").base.tiled is False


@pytest.mark.slow
def test_mistakes(toy, stages, tmp_path):
    one, two, _ = stages
    for words, said in (([*two, "--llm", toy / "llama"], "belong to stage 1"), ([*one, "--plan"], "into 8 GPUs"),
                        (["--stage 2 --model", toy / "llama"], "model_type haplo")):
        assert said in run("monolithic.haplovl", *words, "--out", tmp_path / "x", ok=False)
    planned = run("monolithic.haplovl", *two, "--plan --gpus 1 --freeze-llm")
    assert "HaploVL, stage 2" in planned and "layers (frozen)" in planned and "lm_head (frozen)" in planned
