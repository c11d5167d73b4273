"""The LLaVA-like model: parity with transformers, cache, batches, folders, both stages of training."""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from scripts import log, run
from test_hovle import PICTURES, PROMPTS, batch_of, check_resumed
from tiny import continued

from common.weights import UserError
from monolithic.llava import Llava, LlavaConfig
from text import IMG

CLIP = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 4, "layer_norm_eps": 1e-5}
SIZES = {"vocab_size": 95, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}


def tiny(token=95, spread=0.2):
    torch.manual_seed(0)
    model = Llava(LlavaConfig(**SIZES, image_token_index=token, clip=CLIP)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, spread)
    return model


@torch.no_grad()
def test_parity_with_transformers():
    """LlavaForConditionalGeneration with the same weights: patches of the last layer but one, no class token"""
    model = tiny(94)
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES), image_token_index=94,
        vision_config=transformers.CLIPVisionConfig(**CLIP, projection_dim=16))).eval()
    state, names = model.state_dict(), {}
    for name in theirs.state_dict():
        ours = name.replace("vision_tower.vision_model", "vision_tower").replace("language_model.", "")
        ours = ours.replace("multi_modal_projector.linear_1", "mm_projector.0")
        names[name] = ours.replace("multi_modal_projector.linear_2", "mm_projector.2")
    assert sorted(names.values()) == sorted(state)
    theirs.load_state_dict({name: state[ours] for name, ours in names.items()})
    batch, _ = batch_of(model, PROMPTS[:1], PICTURES[:1])
    assert batch.ids.shape == (1, 6 + 16)
    wanted = theirs(input_ids=batch.ids, pixel_values=batch.tiles).logits
    torch.testing.assert_close(model.lm_head(model.hidden(batch.ids, batch)), wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_cached_is_uncached_and_a_batch_is_its_rows():
    model, used = tiny(), 0
    together = continued(model, PROMPTS, PICTURES)
    for row, prompt in enumerate(PROMPTS):
        pictures, ids = PICTURES[used:used + prompt.count(IMG)], list(prompt)
        used += len(pictures)
        assert together[row] == continued(model, [prompt], pictures)[0]
        for _ in range(8):
            batch, _ = batch_of(model, [ids], pictures)
            ids.append(int(model.lm_head(model.hidden(batch.ids, batch)[:, -1]).argmax()))
        assert together[row] == ids[len(prompt):]


@torch.no_grad()
def test_bfloat16_is_near_float32():
    model = tiny(spread=0.1)
    batch, real = batch_of(model, PROMPTS, PICTURES)
    exact, rough = model.hidden(batch.ids, batch)[real], model.bfloat16().hidden(batch.ids, batch)[real]
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.05


def test_folders(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = Llava.from_pretrained(tmp_path)
    assert again.config == model.config and continued(again, PROMPTS, PICTURES) == continued(model, PROMPTS, PICTURES)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, said in (("heads", 4, "heads"), ("clip", {"image_size": 0}, "image_size"),
                              ("clip", CLIP | {"depth": 3}, "depth"), ("hidden_size", 64, "shape")):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=said):
            Llava.from_pretrained(tmp_path)


@pytest.mark.slow
def test_stages_train_what_they_should_and_resume(toy, tmp_path):
    steps = "--steps 4 --save-every 2 --warmup 1 --batch 6 --lr 1e-3"
    one = ["--stage 1 --llm", toy / "llama", "--clip", toy / "clip", "--data", toy / "captions/*.tar", steps]
    two = ["--stage 2 --model", tmp_path / "1", "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
           steps]
    for stage, options in (("1", one), ("2", two)):
        run("monolithic.llava", *options, "--out", tmp_path / stage)
        check_resumed("monolithic.llava", options, tmp_path / stage, tmp_path / f"{stage}-again")
    first, second = (load_file(tmp_path / stage / "model.safetensors") for stage in "12")
    llm, clip = (load_file(toy / name / "model.safetensors") for name in ("llama", "clip"))
    assert all(torch.equal(first[name], x) for name, x in llm.items())
    assert all(torch.equal(first[name.replace("vision_model.", "model.vision_tower.")], x) for name, x in clip.items())
    same = {name for name in first if torch.equal(first[name], second[name])}
    n = max(int(name.split("layers.")[1].split(".")[0]) for name in clip if "layers." in name)
    assert same == {name for name in first if "post_layernorm" in name or f"encoder.layers.{n}." in name}
    assert log(tmp_path / "2")[-1]["loss"] < log(tmp_path / "2")[0]["loss"]
    model = Llava.from_pretrained(tmp_path / "2").eval()
    prompt, _ = model.text.chat([("What is this?", 1, None)])
    texts = continued(model, [prompt, model.text.plain("a red")], [toy / "eval/images/000000000000.png"], 6)
    assert all(max(ids) < model.text.vocab_size for ids in texts)


@pytest.mark.slow
def test_two_processes(toy, tmp_path):
    """They learn what one process does; bfloat16 runs"""
    one = ["--stage 1 --llm", toy / "llama", "--clip", toy / "clip", "--data", toy / "captions/*.tar",
           "--steps 2 --warmup 1 --batch 6 --lr 1e-3 --out"]
    two = ["--stage 2 --model", tmp_path / "1", "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
           "--steps 2 --warmup 1 --batch 6 --lr 1e-3 --out"]
    for stage, options in (("1", one), ("2", two)):
        run("monolithic.llava", *options, tmp_path / stage)
        engine = {"1": "fsdp", "2": "ddp"}[stage]
        run("monolithic.llava", *options, tmp_path / engine, "--engine", engine, processes=2)
        for alone, both in zip(log(tmp_path / stage), log(tmp_path / engine), strict=True):
            assert both["loss"] == pytest.approx(alone["loss"], rel=0.02)
    run("monolithic.llava", *two, tmp_path / "b", "--dtype bfloat16 --checkpoint-activations")
