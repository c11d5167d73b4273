"""HoVLE: sizes, cache, batches, tiles, folders, three stages of training. The authors' outputs: test_golden.py"""
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import checkpoint_tensors, log, run
from tiny import continued

from answering.sampling import Sampler
from common.weights import UserError, shapes_only
from llama import run_layers
from monolithic import internlm2, shared
from monolithic.hovle import Distillation, HalfConfig, HoVLE, count_rows, pixel_shuffle, read_config
from text import IMG

IMAGE = {"vocab_size": 95, "image_size": 16, "force_image_size": 16, "patch_size": 4, "img_context_token_id": 92}
BASE = HalfConfig(**IMAGE, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256)
SIZES = IMAGE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 1, "max_position_embeddings": 512, "rope_theta": 500.0}


def tiny(spread=0.2, **changes):
    """Weights far from zero, biases too, so that every path matters"""
    torch.manual_seed(0)
    pre = HalfConfig(**SIZES | changes)
    model = HoVLE(HalfConfig(**asdict(BASE) | changes), pre).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, spread)
    model.text = SimpleNamespace(vocab_size=90)           # <img> and its like, 90 and more, are not generated
    return model


def picture(width, height, seed=0):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


PICTURES = [picture(40, 16), picture(16, 16, 1), picture(20, 50, 2)]
PROMPTS = [[1, 5, 6, IMG, 7, 8, 9], [1, IMG, IMG, 4], [1, 40, 41, 42, 43, 44]]


def batch_of(model, prompts, pictures, loss_masks=None):
    """-> a batch of lists of ids with IMG; which places are no padding"""
    config, rows, labels, ready = model.halves[-1], [], [], []
    for i, ids in enumerate(prompts):
        n = ids.count(IMG)
        shown = [config.prepare(p, n) for p in pictures[len(ready):][:n]]
        spelled = shared.expand_images(ids, loss_masks[i] if loss_masks else ids, [len(order) for _, order in shown],
                                   config.image_token_index, edges=config.edges)
        rows, labels, ready = [*rows, spelled[0]], [*labels, spelled[1]], ready + shown
    padded, real = shared.pad(rows)
    return shared.Batch.build(padded, real, ready, config, shared.pad(labels)[0].bool() if loss_masks else None), real


def published_shapes():
    sizes = {"vocab_size": 92553, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
             "num_key_value_heads": 8}
    with shapes_only():
        model = HoVLE(HalfConfig(**sizes, num_hidden_layers=24), HalfConfig(**sizes, num_hidden_layers=8))
    return internlm2.pack(model.state_dict(), model.config_of)


def test_published_size_and_keys():
    """OpenGVLab/HoVLE: 2,606,327,808 weights in 236 tensors"""
    state = published_shapes()
    assert sum(t.numel() for t in state.values()) == 2_606_327_808 and len(state) == 236
    layer = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
             "attention_norm", "ffn_norm")
    keys = {f"embedding_model.vision_embeddings.{name}" for name in (
        "class_embedding", "position_embedding", "patch_embedding.weight", "patch_embedding.bias")}
    keys |= {f"embedding_model.pixel_shuffle_proj.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    keys |= {"embedding_model.llm_text_embeddings.weight", "language_model.model.tok_embeddings.weight",
             "language_model.model.norm.weight", "language_model.output.weight"}
    keys |= {f"embedding_model.encoder.{i}.{part}.weight" for i in range(8) for part in layer}
    keys |= {f"language_model.model.layers.{i}.{part}.weight" for i in range(24) for part in layer}
    assert state.keys() == keys
    assert state["embedding_model.encoder.0.attention.wqkv.weight"].shape == (4096, 2048)
    assert state["embedding_model.vision_embeddings.position_embedding"].shape == (1, 1025, 2048)


def test_packed_matrix():
    """For each key-value head its query heads, the key, the value; and back again"""
    model = tiny()
    state = model.state_dict()
    packed = internlm2.pack(state, model.config_of)
    q, k, v = (state[f"language_model.model.layers.0.self_attn.{x}_proj.weight"].split(8) for x in "qkv")
    wanted = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
    assert torch.equal(packed["language_model.model.layers.0.attention.wqkv.weight"], wanted)
    again = dict(internlm2.unpack(packed, model.config_of, ""))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_pixel_shuffle_order():
    """Tokens row by row; channels in the order row, column, channel"""
    x = torch.arange(16 * 3).view(1, 16, 3)
    assert pixel_shuffle(x)[0, 1].view(4, 3).tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in (2, 3, 6, 7)]


@torch.no_grad()
def test_table_of_another_grid_is_resized():
    model = tiny()
    v = model.embedding_model.vision_embeddings
    v.patch_embedding.weight.zero_(), v.patch_embedding.bias.zero_()
    table = v.position_embedding[:, 1:]
    assert torch.equal(model.patches(torch.zeros(1, 3, 16, 16)), table)
    wanted = F.interpolate(table.mT.view(1, 32, 4, 4), (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.patches(torch.zeros(1, 3, 24, 24)), wanted.flatten(2).mT)


def test_tiles():
    """Row by row, the whole picture last; pictures of a row share the tiles; a tie goes to the larger grid by area"""
    whole = picture(40, 16)
    tiles, order = BASE.prepare(whole, 1)
    assert tiles.shape == (4, 3, 16, 16) and order.tolist() == list(range(16))                # 3 x 1, 2 x 2 tokens each
    stretched = shared.stack_tiles([whole.resize((48, 16), Image.Resampling.BICUBIC)], torch.zeros(1), torch.ones(1))[0]
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    torch.testing.assert_close(tiles[1], (stretched[:, :, 16:32] - mean[:, None, None]) / std[:, None, None])
    assert len(BASE.prepare(whole, 3)[0]) == 3 and len(BASE.prepare(whole, 9)[0]) == 1
    assert len(BASE.prepare(picture(1, 300), 1)[0]) == 7
    assert shared.choose_grid(896, 896, 448, 12) == (2, 2) and shared.choose_grid(448, 448, 448, 12) == (1, 1)


@torch.no_grad()
def uncached(model, prompt, pictures, n=8, **sampling):
    ids, sampler = list(prompt), Sampler(**sampling)
    for _ in range(n):
        batch, _ = batch_of(model, [ids], pictures)
        ids.append(int(sampler(model.lm_head(model.hidden(batch.ids, batch)[:, -1])[:, :90], [0])))
    return ids[len(prompt):]


MODES = {"pre": {}, "post": {"pixel_shuffle_loc": "post"}, "normalized": {"normalize_encoder_output": True},
         "resized table": {"pixel_shuffle_loc": "post", "force_image_size": 24}}


@pytest.mark.parametrize("changes", MODES.values(), ids=MODES)
def test_cached_is_uncached_and_a_batch_is_its_rows(changes):
    """A picture of several tiles, two pictures in a row, text alone"""
    model, used = tiny(**changes), 0
    sampling = {"temperature": 5.0, "seed": 3}            # nearly every id is possible: a small difference would show
    greedy, sampled = (continued(model, PROMPTS, PICTURES, **options) for options in ({}, sampling))
    for row, prompt in enumerate(PROMPTS):
        pictures = PICTURES[used:used + prompt.count(IMG)]
        used += len(pictures)
        assert greedy[row] == continued(model, [prompt], pictures)[0] == uncached(model, prompt, pictures)
        seeded = sampling | {"seed": 3 + row}
        alone = continued(model, [prompt], pictures, **seeded)[0]
        assert sampled[row] == alone == uncached(model, prompt, pictures, **seeded) and len(set(alone)) > 4


@torch.no_grad()
@pytest.mark.parametrize("changes", MODES.values(), ids=MODES)
def test_hidden_states_of_a_batch_are_those_of_its_rows(changes):
    model, used = tiny(**changes), 0
    batch, real = batch_of(model, PROMPTS, PICTURES)
    hidden = model.hidden(batch.ids, batch)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = batch_of(model, [prompt], PICTURES[used:used + prompt.count(IMG)])
        used += prompt.count(IMG)
        torch.testing.assert_close(hidden[row][real[row]], model.hidden(alone.ids, alone)[0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_post_by_hand():
    """The module reads every patch at a place of its own; the LLM a quarter of them, at the places of the short row"""
    model = tiny(pixel_shuffle_loc="post")
    batch, _ = batch_of(model, [[1, 5, IMG, 7]], PICTURES[1:2])
    m, token = model.embedding_model, 92
    ids, places = model.lengthen(batch.ids)
    for found, n in ((batch.ids, 4), (ids, 16)):
        assert found.tolist() == [[1, 5, 90, *[token] * n, 91, 7]]
    assert places[0].tolist() == [0, 1, 2, 3, 7, 11, 15, 19, 20]
    x = m.llm_text_embeddings(ids)
    x[0, 3:19] = model.patches(batch.tiles)[0]
    x = run_layers(x, m.encoder, model.pre)
    image = m.pixel_shuffle_proj(pixel_shuffle(x[:, 3:19]))
    wanted = torch.cat([x[:, :3], image, x[:, 19:]], dim=1)
    torch.testing.assert_close(model.encode(batch.ids, batch), wanted, rtol=0, atol=1e-5)


def test_generation_stops_and_refuses():
    model = tiny()
    whole = continued(model, PROMPTS, PICTURES, temperature=5.0)
    stopped = continued(model, PROMPTS, PICTURES, temperature=5.0, stop=[whole[0][2]])
    assert stopped == [ids[:ids.index(whole[0][2]) + 1] if whole[0][2] in ids else ids for ids in whole]
    assert len(continued(model, [[1] * 250], [], 99)[0]) == 6          # the LLM's positions end
    long = tiny(pixel_shuffle_loc="post", max_position_embeddings=256)                        # here the module's
    assert len(continued(long, [[1] * 230 + [IMG]], PICTURES[1:2], 99)[0]) == 256 - 230 - 18
    for prompts, pictures, what in (([[1, IMG]], [], "pictures"), ([[1] * 256], [], "too little room"),
                                    ([[1, IMG]], ["missing.png"], "missing.png"), ([], [], "0 prompts")):
        with pytest.raises((UserError, AssertionError), match=what):
            model.read(prompts, pictures)
    with pytest.raises(UserError, match="image tokens"):
        shared.Batch.build(torch.tensor([[1, 92]]), torch.ones(1, 2).bool(), [], model.base)


def test_weighted_loss():
    """sum(w * ce) / sum(w): a token that is no target counts in the divisor alone"""
    model = tiny()
    ids = [1, 5, IMG, 7, 8, 9]
    batch, _ = batch_of(model, [ids], PICTURES[1:2], [[0, 0, 0, 0, 1, 1]])
    weights = torch.zeros(batch.ids.shape)
    weights[0, -3:] = torch.tensor([0.5, 1.0, 3.0])       # the first of them is no target
    logits = model.lm_head(model.hidden(batch.ids, batch))[0, :-1]
    ce = F.cross_entropy(logits, batch.ids[0, 1:], reduction="none")
    torch.testing.assert_close(model(batch, weights), ce[-2] + 3 * ce[-1])
    torch.testing.assert_close(model(batch), ce[-2] + ce[-1])


def test_bfloat16_is_near_float32():
    for changes in ({}, {"pixel_shuffle_loc": "post"}):
        model = tiny(0.1, **changes)
        batch, real = batch_of(model, PROMPTS, PICTURES)
        with torch.no_grad():
            exact, rough = model.hidden(batch.ids, batch)[real], model.bfloat16().hidden(batch.ids, batch)[real]
        assert rough.dtype == torch.bfloat16
        assert float((rough.float() - exact).norm() / exact.norm()) < 0.05
        assert len(continued(model, PROMPTS, PICTURES)[0]) == 8


def test_folders(tmp_path):
    """Saved and read back; the same in shards with an index; a model that is not computed here in one sentence"""
    model = tiny(pixel_shuffle_loc="post")
    model.text = None
    model.save_pretrained(tmp_path / "a")
    again = HoVLE.from_pretrained(tmp_path / "a")
    assert again.halves == model.halves and again.text is None
    assert continued(again, PROMPTS, PICTURES) == continued(model, PROMPTS, PICTURES)
    (tmp_path / "b").mkdir()
    tensors, index = load_file(tmp_path / "a/model.safetensors"), {}
    for part in (0, 1):
        shard = {name: t for i, (name, t) in enumerate(sorted(tensors.items())) if i % 2 == part}
        index |= dict.fromkeys(shard, f"model-{part}.safetensors")
        save_file(shard, tmp_path / f"b/model-{part}.safetensors")
    (tmp_path / "b/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    sharded = HoVLE.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(t, sharded[name]) for name, t in model.state_dict().items())
    assert HoVLE.from_pretrained(tmp_path / "b", torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    for half, name, value, said in (
            ("llm_config", "bias", True, "bias"), ("embedding_config", "use_ls", True, "use_ls"),
            ("llm_config", "rope_scaling", {"type": "linear"}, "rope_scaling"), ("llm_config", "rope_scaling", 3, "3"),
            ("embedding_config", "pixel_shuffle_loc", "mid", "mid"), ("llm_config", "hidden_size", 64, "LLM's"),
            ("embedding_config", "num_key_value_heads", 2, "heads"), ("embedding_config", "patch_size", 5, "divide"),
            ("embedding_config", "img_context_token_id", 1, "img_context"),
            ("embedding_config", "llm_vocab_size", 94, "vocab_size"), ("embedding_config", "image_size", 8, "shape")):
        (tmp_path / "b/config.json").write_text(json.dumps(config | {half: config[half] | {name: value}}))
        with pytest.raises(UserError) as error:
            HoVLE.from_pretrained(tmp_path / "b")
        assert said in str(error.value) and len(str(error.value)) < 400
    (tmp_path / "b/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="no HoVLE"):
        HoVLE.from_pretrained(tmp_path / "b")


def test_published_fields(tmp_path):
    """null and missing fields, rope_scaling "dynamic", the tile's size from the table's"""
    half = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": None}
    module = half | {"llm_vocab_size": 105, "image_size": 56, "img_context_token_id": 98, "rope_scaling": None}
    llm = half | {"vocab_size": 105, "bias": False, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
    (tmp_path / "config.json").write_text(json.dumps({"embedding_config": module, "llm_config": llm,
                                                      "force_image_size": None, "max_dynamic_patch": 12}))
    base, pre = read_config(tmp_path / "config.json")
    assert base.vocab_size == pre.vocab_size == 105 and pre.force_image_size == 56 and pre.grid == 2
    assert base.max_dynamic_patch == 12 and pre.num_key_value_heads == 4 and base.edges == ([96], [97])


# ---------------------------------------------------------------- training

def test_unpaired_rows():
    """Each text stands behind the picture of another sample, and text alone behind none"""
    builder = shared.UnpairedBuilder(SimpleNamespace(start=[1], newline=2, vocab_size=90), BASE, 9)
    samples = []
    for i in (5, 6):
        ids, labels, _ = shared.expand_images([1, IMG, i, i, i], [1] * 5, [4], 92, edges=BASE.edges)
        samples.append({"ids": ids, "loss_mask": labels, "name": str(i),
                        "pictures": [(torch.full((1, 3, 16, 16), float(i)), torch.arange(4))]})
    batch = builder.collate(samples, [])
    assert batch.ids[0].tolist() == [1, 90, 92, 92, 92, 92, 91, 6, 6] and batch.tiles[0, 0, 0, 0] == 5   # cut to 9
    assert batch.loss_mask[0].tolist() == [True] + [False] * 6 + [True] * 2
    assert count_rows(batch) == {"text": 2, "vision": 2, "tokens": 18}
    assert count_rows(builder.collate([], [("x", "y", "z")])) == {"text": 0, "vision": 0, "tokens": 1}


@pytest.mark.parametrize("place", ["pre", "post"])
def test_distillation_by_a_loop(place):
    llm = SimpleNamespace(config=SimpleNamespace(vocab_size=92), model=torch.nn.ModuleDict({
        "embed_tokens": torch.nn.Embedding(92, 32)}))
    pre = HalfConfig(**SIZES | {"pixel_shuffle_loc": place})
    torch.manual_seed(1)
    model, table = Distillation(BASE, pre, llm, 24), llm.model.embed_tokens.weight.detach()
    assert torch.equal(model.embedding_model.llm_text_embeddings.weight[:92], table)
    batch, _ = batch_of(model, PROMPTS, PICTURES, [[int(token != IMG) for token in ids] for ids in PROMPTS])
    features = torch.randn(len(batch.tiles), 4, 24)
    vision, text = model(batch, features, table)
    x, found, used, wanted = model.encode(batch.ids, batch), features.flatten(0, 1), 0, [0.0, 0.0]
    for row, ids in enumerate(batch.ids.tolist()):
        losses = [], []
        for place, token in enumerate(ids):
            if token == 92:
                losses[0].append(1 - F.cosine_similarity(model.vision_head(x[row, place]), found[used], dim=0))
                used += 1
            elif batch.loss_mask[row, place]:
                losses[1].append(1 - F.cosine_similarity(x[row, place], table[token], dim=0))
        for part in (0, 1):
            wanted[part] += sum(losses[part]) / max(1, len(losses[part]))
    torch.testing.assert_close([vision, text], wanted)


@pytest.fixture(scope="module")
def stages(toy, tmp_path_factory):
    """-> options of the stages, their run folders"""
    out = tmp_path_factory.mktemp("hovle")
    steps = "--steps 4 --save-every 2 --warmup 1 --batch 6 --lr 1e-3"
    words = {"1": ["--stage 1 --module-layers 2 --micro-batch 3 --llm", toy / "llama", "--clip", toy / "clip", "--data",
                   toy / "captions/*.tar", steps],
             "2": ["--stage 2 --model", out / "1", "--data", toy / "captions/*.tar", steps],
             "3": ["--stage 3 --model", out / "2", "--data", toy / "chats/chat.json", "--images",
                   toy / "chats/images", steps]}
    for stage, options in words.items():
        run("monolithic.hovle", *options, "--out", out / stage)
    return words, out


@pytest.mark.slow
def test_stages_train_what_they_should(toy, stages):
    _, out = stages
    one, two, three = (load_file(out / stage / "model.safetensors") for stage in "123")
    llm = load_file(toy / "llama/model.safetensors")
    assert torch.equal(one["language_model.output.weight"][:-3], llm["lm_head.weight"])
    assert not one["language_model.output.weight"][-3:].any()
    assert torch.equal(one["language_model.model.layers.1.attention.wo.weight"],
                       llm["model.layers.1.self_attn.o_proj.weight"])
    assert one.keys() == two.keys() == three.keys() and not any("vision_head" in name for name in one)
    unused = {"embedding_model.vision_embeddings.class_embedding", "language_model.model.tok_embeddings.weight"}
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert same == {name for name in one if name.startswith("language_model")} | unused
    assert {name for name in two if torch.equal(two[name], three[name])} == unused
    for stage, part in (("1", "vision"), ("2", "text"), ("3", "text")):
        lines = log(out / stage)
        assert lines[-1][part] < lines[0][part]
    model = HoVLE.from_pretrained(out / "3").eval()
    prompt, _ = model.text.chat([("What is this?", 1, None)])
    texts = continued(model, [prompt, model.text.plain("a red")], [toy / "eval/images/000000000000.png"], 6)
    assert all(max(ids) < model.text.vocab_size for ids in texts)


def check_resumed(module, options, folder, copy):
    """A run that goes on from its checkpoint at step 2 ends as the whole run, bit for bit."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-000004")
    for name in ("model.safetensors", "log.jsonl"):
        (copy / name).unlink()
    assert "going on from" in run(module, *options, "--resume --out", copy)
    for before, after in zip(log(folder)[2:], log(copy), strict=True):
        assert all(before.get(key) == after.get(key) for key in ("loss", "vision", "text", "norm", "lr"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, copy))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = (checkpoint_tensors(path / "checkpoint-000004") for path in (folder, copy))
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(x, after[key]) if isinstance(x, torch.Tensor) else x == after[key]
               for key, x in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_stages_resume_bit_for_bit(stages, tmp_path, stage):
    words, out = stages
    check_resumed("monolithic.hovle", words[stage], out / stage, tmp_path / stage)


@pytest.mark.slow
def test_two_processes(stages, tmp_path):
    """They learn what one process does; in stage 1 each pass of three has its own pairs, as there"""
    words, out = stages
    for stage, engine in (("1", "ddp"), ("2", "fsdp"), ("3", "ddp")):
        run("monolithic.hovle", *words[stage], "--micro-batch 3 --steps 2 --engine", engine, "--out",
            tmp_path / stage, processes=2)
        for alone, both in zip(log(out / stage), log(tmp_path / stage)):
            assert both["loss"] == pytest.approx(alone["loss"], rel=0.02)


@pytest.mark.slow
def test_the_other_mode(toy, stages, tmp_path):
    words, _ = stages
    run("monolithic.hovle", *words["1"], "--pixel-shuffle-loc post --tiles 2 --workers 1 --steps 2",
        "--checkpoint-activations --out", tmp_path / "1")
    run("monolithic.hovle",
        "--stage 3 --dtype bfloat16 --steps 2 --warmup 1 --batch 4 --lr 1e-3 --model", tmp_path / "1", "--data",
        toy / "chats/chat.json", "--images", toy / "chats/images", "--out", tmp_path / "3")
    model = HoVLE.from_pretrained(tmp_path / "3")
    assert model.pre.pixel_shuffle_loc == "post" and model.pre.max_dynamic_patch == 2


@pytest.mark.slow
def test_mistakes(toy, stages, tmp_path):
    words, _ = stages
    for options, said in (([*words["2"], "--module-layers 2"], "belong to stage 1"),
                          ([*words["1"], "--plan"], "into 8 GPUs"), (["--stage 2 --model", toy / "llama"], "no HoVLE")):
        assert said in run("monolithic.hovle", *options, "--out", tmp_path / "x", ok=False)
    planned = run("monolithic.hovle", *words["3"], "--plan --gpus 1")
    assert "HoVLE, stage 3" in planned and "language_model (frozen)" in planned               # its unused table
