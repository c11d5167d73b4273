"""The systems of monolithic/ as generate.py and evaluate.py open them: one call each, after a step of training."""
import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts import run

from common.pictures import open_image
from common.weights import UserError, read_folder, save_tensors, weight_files, write_json
from generate import stream
from llama import Llama, LlamaConfig
from monolithic import haplovl, hovle, llava, open_model, shared
from tokenizer import ClipViT

STEP = "--steps 1 --warmup 0 --batch 4 --lr 1e-3 --save-every 0"


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("haplovl", "HaploVL"), ("hovle", "HoVLE"), ("llava", "Llava")])
def test_it_answers_and_is_scored(toy, tmp_path, name, kind):
    run(f"monolithic.{name}", "--stage 1 --llm", toy / "llama", "--clip", toy / "clip", "--data",
        toy / "captions/*.tar", "--out", tmp_path / "1", STEP)
    run(f"monolithic.{name}", "--stage 2 --model", tmp_path / "1", "--data", toy / "captions/*.tar", "--out",
        tmp_path / "2", STEP)
    model, image = ["--model", tmp_path / "2"], toy / "chats/images/000000.jpg"
    words = ["--image", image, ("What is it?",), "--max-new-tokens 4 --json"]
    alone = json.loads(run("generate.py", *model, *words).strip().splitlines()[-2])
    lines = [{"image": str(image), "question": "What is it?"}, {"question": "What is red?"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("generate.py", *model, "--batch", tmp_path / "in.jsonl", "--max-new-tokens 4 --out", tmp_path / "out.jsonl")
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers[0] == alone["answer"] and len(answers) == 2
    opened = open_model(tmp_path / "2", torch.device("cpu"))
    *_, words = stream(opened, "What is it?", [image], 4)
    assert words == alone["answer"]
    said = run("generate.py", *model, "--draw cat --out", tmp_path / "x.png", ok=False)
    assert f"a {kind} only answers" in said
    files = [toy / f"eval/held_out_{part}.json" for part in ("questions", "annotations")]
    words = ["--task exact --data", *files, "--images", toy / "eval/images", "--limit 6 --max-new-tokens 4"]
    for more in ("", "--blind zeroed"):
        assert "6 answers" in run("evaluate.py", *model, *words, more)
    assert "a benchmark with choices" in run("evaluate.py", *model, *words, "--likelihood", ok=False)
    check_likelihood(tmp_path, model, image)


def check_likelihood(tmp_path, model, image):
    """The choice whose words, continued token by token behind the question, are likeliest"""
    words = {"choice_a": "red", "choice_b": "a large blue circle", "choice_c": "two", "choice_d": "yes"}
    seed = {"questions": [{"question_id": "1", "question": "What is it?", "question_type_id": 1, "data_type": "image",
                           "data_id": image.name, "answer": "A", **words}], "question_type": {"Scene": 1}}
    (tmp_path / "seed.json").write_text(json.dumps(seed))
    opened, losses = open_model(tmp_path / "2", torch.device("cpu")), []
    text, config = opened.tokenizers.text, opened.config
    prompt, _ = text.chat([("What is it?", 1, None)])
    for choice in words.values():
        ids, loss_mask = text.chat([("What is it?", 1, choice)])
        answer, picture = [token for token, label in zip(ids, loss_mask) if label], config.prepare(open_image(image), 1)
        ids, _, _ = shared.expand_images(prompt + answer, ids, [len(picture[1])], config.image_token_index,
                                         edges=config.edges)
        batch = shared.Batch.build(*shared.pad([ids]), [picture], config)
        with torch.no_grad():
            p = opened.lm_head(opened.hidden(batch.ids, batch))[0, -1 - len(answer):-1].log_softmax(-1)
        losses.append(-p[range(len(answer)), answer].mean())
    run("evaluate.py", *model, "--task seed --likelihood --data", tmp_path / "seed.json", "--images", image.parent,
        "--out", tmp_path / "seed_out.json")
    answers = json.loads((tmp_path / "seed_out.json").read_text())["answers"]
    assert [line["answer"] for line in answers] == ["ABCD"[losses.index(min(losses))]]


def test_large_models_are_saved_in_shards(tmp_path, monkeypatch):
    """An index and files of at most SHARD_BYTES (or one tensor), which read_folder joins; what was there goes."""
    tensors = {f"w{n}": torch.randn(10) for n in range(5)}                                    # 40 bytes each
    shared.save_folder(tmp_path, tensors, None, {})
    for most, files in ((80, 3), (10 ** 9, 1), (1, 5)):
        monkeypatch.setattr(shared, "SHARD_BYTES", most)
        shared.save_folder(tmp_path, tensors, None, {})
        assert len(weight_files(tmp_path)) == files
        found = read_folder(tmp_path)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


LLM = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376,
       "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 224, "patch_size": 16}


HALF = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIGS = {   # a config.json of each, and its pictures' part
    haplovl.read_config: ({"model_type": "haplo", "pre_config": {}}, "base_config", {}),
    hovle.read_config: ({"force_image_size": 448, "max_dynamic_patch": 6, "llm_config": HALF | {
        "vocab_size": 105, "bias": False}}, "embedding_config", HALF | {
            "llm_vocab_size": 105, "image_size": 448, "img_context_token_id": 98}),
    llava.Llava.read_config: (LLM, "clip", {name: CLIP[name] for name in CLIP if name != "model_type"})}
ANYRES = "anyres_max_" + "9" * 5000


@pytest.mark.parametrize("read_config, top, part, said", [
    (haplovl.read_config, {}, {"default_image_size": 2 ** 15}, "default_image_size is 32768, expected .*1024"),
    (haplovl.read_config, {}, {"default_image_size": 13}, "default_image_size is 13, less than a patch of 14"),
    (haplovl.read_config, {}, {"image_aspect_ratio": ANYRES, "image_grid_pinpoints": [[336 * 90] * 2]}, "40 tiles"),
    (hovle.read_config, {"max_dynamic_patch": 20_000}, {}, "max_dynamic_patch is 20000, expected .*40"),
    (hovle.read_config, {"force_image_size": 2 ** 15}, {}, "force_image_size is 32768, expected .*1024"),
    (hovle.read_config, {}, {"image_size": 2 ** 15}, "image_size is 32768, expected .*1024"),
    (llava.Llava.read_config, {}, {"image_size": 2 ** 15}, "clip: image_size is 32768, expected .*1024"),
    (haplovl.read_config, {}, {"image_aspect_ratio": ANYRES}, None), (hovle.read_config, {}, {}, None),
    (llava.Llava.read_config, {}, {}, None)])
def test_pictures_of_absurd_sizes_are_refused(tmp_path, read_config, top, part, said):
    """Before one is made, which would take gigabytes or minutes"""
    more, name, pictures = CONFIGS[read_config]
    write_json(tmp_path / "config.json", more | top | {name: pictures | part})
    if said is None:
        tiles, _ = read_config(tmp_path / "config.json")[0].prepare(Image.new("RGB", (900, 300)), 1)
        assert len(tiles) == {haplovl.read_config: 3, hovle.read_config: 4}.get(read_config, 1)
        return
    with pytest.raises(UserError, match=said) as error:
        read_config(tmp_path / "config.json")
    assert str(error.value).startswith(f"{tmp_path}/config.json: ")


@pytest.mark.parametrize("module", [haplovl, hovle])
def test_stage_1_keeps_the_bits_of_the_llm(tmp_path, module):
    """A float16 LLaMA, trained around in bfloat16, stands in the folder with its own values, all in its type."""
    config = LlamaConfig(90, 32, 40, 2, 4, 2, max_position_embeddings=64)
    llm = Llama(config).half()
    (tmp_path / "llm").mkdir()
    save_tensors(tmp_path / "llm/model.safetensors", llm.state_dict())
    write_json(tmp_path / "llm/config.json", {"model_type": "llama"} | asdict(config))
    if module is haplovl:
        both = {"vocab_size": 91, "image_token_index": 90, "patch_size": 4, "default_image_size": 8}
        half = haplovl.HalfConfig(**asdict(config) | both)
        model, prefix = haplovl.Distillation(half, half, 24), ""
    else:
        both = {"vocab_size": 93, "img_context_token_id": 92, "patch_size": 4, "image_size": 16, "force_image_size": 16}
        half = hovle.HalfConfig(**asdict(config) | both)
        model, prefix = hovle.Distillation(half, half, llm, 24), "language_model."
    model.text = SimpleNamespace(path=tmp_path / "llm/tokenizer.model", save=lambda folder: None, template="vicuna")
    model.save_pretrained(tmp_path / "out", {name: x.bfloat16() for name, x in model.state_dict().items()})
    assert {x.dtype for x in read_folder(tmp_path / "out").values()} == {torch.float16}
    made = (haplovl.HaploVL if module is haplovl else hovle.HoVLE).from_pretrained(tmp_path / "out").state_dict()
    for name, x in llm.state_dict().items():
        if module is haplovl:                             # its layers stand behind the two of the pre-decoder
            name = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")
        if prefix or "embed_tokens" not in name:          # HaploVL reads with a table of its own
            assert torch.equal(made[prefix + name][:len(x)], x), name        # behind them the new ids of pictures


def planned(folder, *words):
    """-> weights that learn and that do not (millions), TFLOP of a sample, GB of activations of a pass"""
    said = run(*words, "--plan --llm", folder / "llm", "--clip", folder / "clip", "--micro-batch 4")
    weights = [sum(float(number) for number in re.findall(pattern, said, re.MULTILINE))
               for pattern in (r"([\d.]+) B  learns$", r"([\d.]+) B  $")]
    flops, saved = (float(re.search(pattern, said)[1]) for pattern in (r"all products +([\d.]+)",
                                                                       r"activations ([\d.]+) \|"))
    return [1000 * n for n in weights], flops, saved


@pytest.mark.slow
def test_plan(tmp_path):
    """Of folders with a config.json alone: weights as the model has them, FLOPs of its products, memory that falls"""
    for name, config in (("llm", LLM), ("clip", CLIP)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    layers = 4 * (4 * 512 ** 2 + 3 * 512 * 1376) / 1e6    # of the LLM; a table of its vocabulary has 16.384 M
    clip = sum(p.numel() for p in ClipViT(**{name: CLIP[name] for name in CLIP if name != "model_type"}).parameters())
    (mlp, frozen), flops, kept = planned(tmp_path, "monolithic.llava", "--stage 1")
    assert mlp == pytest.approx((257 + 513) * 512 / 1e6, abs=1)
    assert frozen == pytest.approx(layers + 2 * 16.384 + clip / 1e6, abs=3)
    products = 4 * (246 * layers + 50 * 16.384) + 2 * 196 * clip / 1e6        # no gradients of frozen matrices
    assert flops == pytest.approx(products / 1e6, rel=0.15)
    again = planned(tmp_path, "monolithic.llava", "--stage 1 --checkpoint-activations")
    assert again[:2] == ([mlp, frozen], flops) and again[2] < 0.8 * kept
    clip_layers = 3 * 3 * 256 * (4 * 256 + 3 * 1024) / 1e6 / 3
    for name, module in (("haplovl", clip_layers + 8.2), ("hovle", 2 * layers + 16.4)):
        (learns, frozen), flops, _ = planned(tmp_path, f"monolithic.{name}", "--stage 1")
        assert learns == pytest.approx(module, rel=0.15) and flops > 0
        assert frozen == pytest.approx(clip / 1e6 + 16.384, abs=2)            # the teachers
    said = run("monolithic.llava", "--plan --stage 1 --max-length 100 --llm", tmp_path / "llm", "--clip",
               tmp_path / "clip", ok=False)
    assert "has 196 tokens, a row 100" in said
