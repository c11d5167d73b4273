"""The scripts themselves, one after another, at sizes that take seconds: toy world, three stages, answers, scores."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import ROOT, TOKENIZER, checkpoint_tensors, log, run, split

from generate import encode_images


def resumed(script, options, folder, copy):
    """Resume a copy of a run from its checkpoint at step 3: the log, the weights and the checkpoint at step 6 must be
    the same bit for bit."""
    shutil.copytree(folder, copy)
    for later in ("checkpoint-000006", "checkpoint-000007"):
        shutil.rmtree(copy / later)
    (copy / "model.safetensors").unlink()
    (copy / "log.jsonl").unlink()
    assert "going on from" in run(script, *options, "--resume --out", copy)
    exact = ("loss", "text", "image", "l1", "psnr", "norm", "lr", "disc", "used", "batch_entropy")
    for before, after in zip(log(folder)[3:], log(copy), strict=True):
        assert all(before.get(key) == after.get(key) for key in exact)
    before, after = (load_file(path / "model.safetensors") for path in (folder, copy))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    before, after = (checkpoint_tensors(path / "checkpoint-000006") for path in (folder, copy))
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in
               ((before[key], after[key]) for key in before))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--quantizer vq", "--encoder scratch",
                                   "--clip-weight 0.3 --l2-weight 5 --deterministic"])
def test_other_tokenizers(toy, tmp_path, words):
    """Fig. 2's and Table 3 (g)'s, and the demo's: trained by two processes with the discriminator, and read back"""
    run("train_tokenizer.py", "--clip", toy / "clip", "--data", toy / "captions/*.tar", "--out", tmp_path / "t",
        TOKENIZER, "--steps 3 --disc-start 1", words, processes=2)
    run("train_tokenizer.py", "--clip", toy / "clip", "--data", toy / "captions/*.tar", "--out", tmp_path / "one",
        TOKENIZER, "--steps 1", words)
    one, two = (log(tmp_path / name)[0] for name in ("one", "t"))             # the log is of all processes
    for key in ("loss", "l1", "used", "perplexity"):
        assert abs(two[key] - one[key]) <= 1e-4 * abs(one[key]), (key, one, two)
    assert log(tmp_path / "t")[2]["disc"] > 0 and ("clip" in log(tmp_path / "t")[2]) == ("clip" in words)
    run("pretrain.py", "--llm", toy / "llama", "--image-tokenizer", tmp_path / "t", "--data", toy / "captions/*.tar",
        "--out", tmp_path / "p", "--steps 1 --warmup 1 --batch 4")
    tensors = load_file(tmp_path / "p/image_tokenizer/model.safetensors")
    assert ("quantize.tables" in tensors) == ("vq" in words)
    assert ("encoder.conv_in.weight" in tensors) == ("scratch" in words)


@pytest.mark.parametrize("script", ["train_tokenizer.py", "pretrain.py", "sft.py"])
def test_without_paths_and_sizes_a_trainer_works_on_the_toy_world(toy, tuned, tmp_path, script):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(toy)
    subprocess.run([sys.executable, ROOT / script, *split(["--steps 1 --warmup 0 --batch 2 --out out"])], cwd=tmp_path,
                   check=True)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_tokenizer_stage(toy, tokenizer):
    lines = log(tokenizer)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7] and all(line["psnr"] > 0 for line in lines)
    assert "disc" not in lines[1] and lines[2]["disc"] is not None and lines[2]["disc_weight"] > 0
    assert Image.open(tokenizer / "samples/000004.png").size == (8 * 56, 2 * 56)
    clip = {k: v for k, v in load_file(tokenizer / "model.safetensors").items() if "vision_model" in k}
    frozen = load_file(toy / "clip/model.safetensors")
    assert all(torch.equal(tensor, clip["encoder.vision_tower." + name]) for name, tensor in frozen.items())


def test_pretraining_freezes_the_llama(toy, base):
    llama, libra = load_file(toy / "llama/model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(libra[name], tensor) for name, tensor in llama.items())
    recipe = json.loads((base / "recipe.json").read_text())
    assert recipe["lr"] == 1e-3 and recipe["text_to_image"] == 0.4
    assert sorted(path.name for path in base.iterdir()) == [
        "checkpoint-000003", "checkpoint-000006", "checkpoint-000007", "config.json", "image_tokenizer", "log.jsonl",
        "model.safetensors", "recipe.json", "samples", "tokenizer.model"]
    assert Image.open(base / "samples/000007.png").size == (924, 6 * 112)


def test_a_libra_pretrained_further_stays_what_it_is(toy, base, tmp_path):
    """Its own image tokenizer, and that it learned to draw"""
    run("pretrain.py", "--llm", base, "--data", toy / "captions/*.tar", "--out", tmp_path,
        "--steps 1 --warmup 0 --batch 2")
    before, after = (load_file(path / "image_tokenizer/model.safetensors") for path in (base, tmp_path))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json.loads((tmp_path / "config.json").read_text())["text_to_image"] is True


@pytest.mark.slow
def test_resume_is_bit_exact(toy, tokenizer, pretrain, base, tmp_path):
    resumed("pretrain.py", pretrain, base, tmp_path / "a")
    half = [*pretrain, "--micro-batch 2 --workers 2 --dtype bfloat16"]
    run("pretrain.py", *half, "--out", tmp_path / "b")
    resumed("pretrain.py", half, tmp_path / "b", tmp_path / "c")
    options = ["--clip", toy / "clip", "--data", toy / "captions/*.tar", TOKENIZER,
               "--steps 7 --disc-start 2 --save-every 3 --keep 3 --sample-every 2 --workers 2"]
    resumed("train_tokenizer.py", options, tokenizer, tmp_path / "d")
    options += ["--batch 9 --micro-batch 3"]
    run("train_tokenizer.py", *options, "--out", tmp_path / "g")
    resumed("train_tokenizer.py", options, tmp_path / "g", tmp_path / "h")
    options = ["--model", base, "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
               "--steps 7 --warmup 1 --batch 6 --micro-batch 2 --workers 2 --lr 1e-3 --save-every 3 --keep 3",
               "--dtype bfloat16"]
    run("sft.py", *options, "--out", tmp_path / "e")
    resumed("sft.py", options, tmp_path / "e", tmp_path / "f")


def test_the_log(pretrain, base, tmp_path):
    """One line a step with all that it holds on the screen, as JSON and for tensorboard"""
    said = run("pretrain.py", *pretrain, "--out", tmp_path, "--steps 2 --tensorboard --peak 1")
    lines = [line for line in said.splitlines() if re.match(r"step \d+/2 ", line)]
    assert len(lines) == len(log(tmp_path)) == 2
    for name in ("loss", "text", "image", "lr", "norm", "tokens/s", "images/s", "peak", "memory", "wait", "skipped"):
        assert f" {name} " in lines[1] and name in log(tmp_path)[1]
    assert lines[1].endswith("0:00 left") and list(tmp_path.glob("events.out.tfevents*"))


def test_instruction_tuning_trains_all(base, tuned):
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    same = [name for name in before if torch.equal(before[name], after[name])]
    # What only image targets could teach has no gradient: answers alone count (Eq. 8). Weight decay spares norms.
    assert set(same) <= {"model.layers.3.vision_post_attention_layernorm.weight", "model.vision_norm.weight"}
    images = [load_file(path / "image_tokenizer/model.safetensors") for path in (base, tuned)]
    assert all(torch.equal(images[0][name], images[1][name]) for name in images[0])


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["language-only", "contiguous-targets", "no-expert", "no-bridge", "discrete-only"])
def test_ablations_are_one_switch(toy, pretrain, tmp_path, switch):
    """Table 3: the switch reaches the folder, the LLaMA stays frozen, tuning goes on from it, also on two processes"""
    run("pretrain.py", *pretrain, f"--steps 2 --{switch} --text-to-image 0 --out", tmp_path / "base",
        processes=1 + (switch == "contiguous-targets"))
    libra, llama = load_file(tmp_path / "base/model.safetensors"), load_file(toy / "llama/model.safetensors")
    assert all(torch.equal(libra[name], tensor) for name, tensor in llama.items())
    config, last = json.loads((tmp_path / "base/config.json").read_text()), log(tmp_path / "base")[-1]
    assert any("bridge" in name for name in libra) == (switch not in ("no-expert", "no-bridge"))
    assert any("self_attn.vision_q" in name for name in libra) == (switch != "no-expert")
    assert (last["image"] == 0) == (switch == "language-only")
    assert config["discrete_only"] == (switch == "discrete-only")
    run("sft.py", "--model", tmp_path / "base", "--data", toy / "chats/chat.json", "--images", toy / "chats/images",
        "--out", tmp_path / "sft", "--steps 1 --batch 2 --warmup 1")


@pytest.mark.slow
def test_generate(toy, base, tuned, tmp_path):
    picture = toy / "chats/images/000000.jpg"
    few = "--max-new-tokens 5"
    run("generate.py", "--model", tuned, "--image", picture, few, "What?")
    line = json.loads(run("generate.py", "--model", tuned, "--image", picture, few, "--json", "What?").splitlines()[-2])
    assert line["question"] == "What?" and isinstance(line["answer"], str)
    run("generate.py", "--model", base, "--caption", picture, few)
    assert "tokens in" in run("generate.py", "--model", base, "--image", picture, few, "--raw", "red")
    asked = [{"id": n, "question": "What?"} | ({"image": str(picture)} if n % 2 else {}) for n in range(5)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for size, more in ((1, ""), (4, ""), (2, "--temperature 2"), (3, "--temperature 2")):
        run("generate.py", "--model", tuned, "--batch", tmp_path / "asked.jsonl", few, "--batch-size", size, "--out",
            tmp_path / f"{size}.jsonl", more)
    one, two, three, four = ([json.loads(row) for row in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
                             for n in (1, 2, 3, 4))
    assert two == three != one and two[0]["answer"] != two[2]["answer"]                       # sampled, each its own
    assert one == four and [row["id"] for row in one] == list(range(5)) and one[1]["answer"] == line["answer"]
    (tmp_path / "asked.jsonl").write_text('{"question": 3}')
    assert "asked.jsonl, line 1" in run("generate.py", "--model", tuned, "--batch", tmp_path / "asked.jsonl", ok=False)
    said = run("generate.py", "--model", tuned, "--image", picture, few, "What?", "--attention", tmp_path / "maps.png")
    assert len(re.findall(r"^ +[0-3] +0\.\d+ +0\.\d+$", said, re.M)) == 4
    assert Image.open(tmp_path / "maps.png").width == 800                                     # 4 layers of 2 inches
    for option, value, size in (("--draw", "red", (56, 56)), ("--complete", picture, (56, 56)),
                                ("--reconstruct", picture, (112, 56))):
        out = tmp_path / f"{option}.png"
        assert f"{size[0]} x 56 pixels" in run("generate.py", "--model", base, option, value, "--out", out)
        assert Image.open(out).size == size
    for bad, message in ((["--model", tmp_path / "gone", "x"], "is not there"),
                         (["--image", "gone.jpg", "x"], "gone.jpg: no such file"),
                         (["--complete", picture, "--rows 7"], "give 1 to 6"), (["--draw x --top-p 2"], "at most 1"),
                         (["--seed 3 x"], "give a --temperature above 0"),
                         (["--batch-size 3 x"], "--batch-size belongs"),
                         (["--temperature 1 --reconstruct", picture], "--temperature belongs"),
                         (["--draw x --out", tmp_path / "x.nothing"], "cannot be written")):
        words = bad if "--model" in bad else ["--model", tuned, *bad]
        assert message in run("generate.py", *words, ok=False)


def test_completion_keeps_what_is_given(toy, base):
    from generate import complete
    from model import Libra
    model = Libra.from_pretrained(base)
    pictures = [toy / "chats/images/000000.jpg", toy / "chats/images/000001.jpg"]
    seen = []
    model.tokenizers.image.decode = lambda codes: seen.append(codes) or torch.zeros(len(codes), 3, 56, 56)
    complete(model, pictures, 4, temperature=1.0)
    given = encode_images(model, pictures, square=False)[0]
    assert torch.equal(seen[0][:, :28], given[:, :28]) and seen[0].shape == (2, 49, 2)
    assert seen[0].max() < 256
    assert model.config.text_to_image                     # E_c = 0 only stood behind captions: an empty one is there


@pytest.mark.slow
def test_evaluate(toy, base, tuned, tmp_path):
    """Blind baselines; broken off and gone on with, and shared by two processes: the same answers"""
    from benchmarks.files import read
    from evaluate import what_is_asked
    held, images = toy / "eval/held_out", toy / "eval/images"
    words = ["--task exact --data", f"{held}_questions.json", f"{held}_annotations.json", "--images", images, "--model",
             tuned, "--limit 16 --batch 4 --max-new-tokens 6"]
    results = {}
    (tmp_path / "a.0.0.jsonl").write_text('{"task": "of another run"}')       # [a] as a pattern names it
    run("evaluate.py", *words, "--out", tmp_path / "[a]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[a]", "a.0.0.jsonl"]
    for path in list(tmp_path.iterdir()):
        path.unlink()
    for name, more in (("all", ""), ("swapped", "--blind swapped"), ("zeroed", "--blind zeroed")):
        run("evaluate.py", *words, "--out", tmp_path / name, more)
        results[name] = json.loads((tmp_path / name).read_text())
        assert results[name]["answered"] == 16 and "colour/1" in results[name]["parts"]
    assert {path.name for path in tmp_path.iterdir()} == {"all", "swapped", "zeroed"}
    about = {key: results["all"][key] for key in ("task", "data", "prompt", "blind", "likelihood", "decoding", "limit",
                                                  "model", "dtype", "max_new_tokens", "weights")}
    asked = [what_is_asked(item) for item in read("exact", images, f"{held}_questions.json")[:16]]
    kept = [json.dumps({"question": question, "picture": picture, "answer": f"kept {n}"})
            for n, (question, picture) in enumerate(asked)]
    other_question = kept[6].replace("?", "!")
    (tmp_path / "part.0.0.jsonl").write_text("\n".join([json.dumps(about), kept[3], kept[5], other_question, '{"que']))
    run("evaluate.py", *words, "--out", tmp_path / "part", "--submission", tmp_path / "submission.json", processes=2)
    part = json.loads((tmp_path / "part").read_text())["answers"]
    expected = [answer["answer"] for answer in results["all"]["answers"]]
    expected[3], expected[5] = "kept 3", "kept 5"
    assert [answer["answer"] for answer in part] == expected
    assert len(json.loads((tmp_path / "submission.json").read_text())) == 16
    (tmp_path / "part.0.0.jsonl").write_text(json.dumps(about))
    (tmp_path / "part.notes.jsonl").write_text("of the user")
    trained_on = shutil.copytree(tuned, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint*"))
    (tmp_path / "on.0.0.jsonl").write_text(json.dumps(about | {"model": str(trained_on)}))
    weights = load_file(trained_on / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, trained_on / "model.safetensors", {"format": "pt"})
    assert "holds answers to" in run("evaluate.py", *words, "--model", trained_on, "--out", tmp_path / "on", ok=False)
    for other in ("--blind zeroed", ("--model", str(base))):
        said = run("evaluate.py", *words, other, "--out", tmp_path / "part", ok=False)
        assert "holds answers to" in said and "remove it" in said
    run("evaluate.py", *words, "--out", tmp_path / "part")
    assert (tmp_path / "part.notes.jsonl").is_file() and not (tmp_path / "part.0.0.jsonl").exists()
    pope = ["--images", images, "--model", tuned, "--limit 2 --task pope --data", f"{held}_pope.json"]
    shutil.copyfile(f"{held}_pope.json", tmp_path / "again.json")
    assert "F1" in run("evaluate.py", *pope, tmp_path / "again.json", "--submission", tmp_path / "said.json")
    assert (tmp_path / "said-again.json").is_file() and (tmp_path / "said-held_out_pope.json").is_file()
    run("evaluate.py", "--task statements --data", f"{held}_captions.json", "--images", toy / "eval", "--model", base,
        "--limit 2 --max-new-tokens 4")
    assert "no such picture" in run("evaluate.py", *pope, "--images", toy, ok=False)


def test_choices_by_likelihood(toy, tuned, tmp_path):
    """SEED by likelihood: the letter whose text has the least loss, against one pass of the loss for each choice"""
    from benchmarks.files import read
    from model import Libra
    from streams import Streams
    from text import expand_images
    choices = {"a": "red", "b": "a blue square", "c": "large", "d": "two"}
    questions = [{"question_id": n, "question_type_id": 1, "data_type": "image", "data_id": f"{n:06d}.jpg",
                  "question": "What is it?", "answer": "B", **{f"choice_{k}": v for k, v in choices.items()}}
                 for n in range(3)]
    (tmp_path / "seed.json").write_text(json.dumps({"questions": questions, "question_type": {"kind": 1}}))
    items = read("seed", toy / "chats/images", tmp_path / "seed.json")
    model = Libra.from_pretrained(tuned).eval()
    run("evaluate.py", "--task seed --likelihood --data", tmp_path / "seed.json", "--images", toy / "chats/images",
        "--model", tuned, "--out", tmp_path / "out.json")
    letters = [line["answer"] for line in json.loads((tmp_path / "out.json").read_text())["answers"]]
    for item, letter in zip(items, letters, strict=True):
        codes, signal = encode_images(model, [item["image"]])
        losses = []
        for words in item["choices"].values():
            chat = model.tokenizers.text.chat([("What is it?", 1, words)])                    # no list of the choices
            ids, loss_mask = expand_images(*chat, codes, model.config)
            losses.append(model.loss(Streams.from_ids([ids], model.config, loss_mask=[loss_mask]), signal).item())
        assert "ABCD".index(letter) == losses.index(min(losses))


def test_looking_at_a_dataset(toy, tmp_path):
    """Counts, sizes, lengths, bad samples, and what counts in brackets"""
    said = run("data.py", toy / "captions/*.tar", toy / "chats/chat.json", "--images", toy / "chats/images",
               "--llm", toy / "llama", "--grid 7 --max-length 4096")
    assert "cut at 512" in said                           # what the trainers would cut at
    few = run("data.py", toy / "captions/*.tar", "--llm", toy / "llama", ok=False)
    assert "too few for a picture of 24 x 24" in few
    assert "tar, 60 samples, 60 read" in said and "llava, 40 samples, 40 read" in said
    assert "100 pictures: 56 to 56 pixels wide" in said and "0 of the 100 samples that were read cannot be used" in said
    assert "<image>" in said and "ASSISTANT:[" in said.replace("ASSISTANT: [", "ASSISTANT:[") and "</s>]" in said
    entries = json.loads((toy / "chats/chat.json").read_text())[:4]
    entries[1]["image"], entries[2]["conversations"] = "gone.jpg", []
    del entries[3]["conversations"]
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    said = run("data.py", tmp_path / "chat.json", "--images", toy / "chats/images", "--llm", toy / "llama", "--grid 7")
    assert "tokens with images of 51" in said
    assert "3 of the 4 samples that were read cannot be used" in said and "no_image: toy-1" in said


def test_a_file_read_three_times_an_epoch(toy):
    from common.sources import open_sources
    from data import SampleOrder
    path = str(toy / "chats/chat.json")
    sources = open_sources([path + "@3"], str(toy / "chats/images"))
    order = iter(SampleOrder(sources, seed=0))
    epoch = [next(order) for _ in range(120)]
    assert {n for n, _ in epoch} == {0} and next(order)[0] == 1
    assert sorted(place[1] for _, place in epoch) == sorted(list(range(40)) * 3)


@pytest.mark.slow
def test_the_report_judges_itself(toy, base, tuned):
    """Every number beside its bar; the LLaMA is found frozen; other seeds go beside it"""
    run("toy.other_renderer", "--out", toy / "foreign")
    run("toy.report", "--toy", toy, "--limit 23")
    report = json.loads((toy / "report.json").read_text())
    assert report["llama_frozen"] is True and report["foreign"]["asked"] == 20
    bars = {bar["what"]: bar for bar in report["bars"]}
    assert bars["LLaMA bit-equal after pretraining"]["reached"] and not bars["questions, 2 objects"]["reached"]
    assert bars["reconstruction, PSNR (dB)"]["value"] == report["reconstruction"]["psnr"] < 25
    assert Image.open(toy / "report.png").size[0] == 1300
    said = run("toy.report", "--mean", toy, toy)
    seeds = json.loads((toy / "report.json").read_text())["seeds"]
    assert "questions, 3 objects" in said and seeds["drawing, colour"]["values"] == [report["drawing"]["colour"]] * 2


@pytest.mark.slow
@pytest.mark.tables
def test_table_3_from_end_to_end(toy, tokenizer, tmp_path):
    """Three rows of Table 3, trained, measured, in a table and a picture; a second call finds all of it there"""
    shutil.copytree(toy, tmp_path / "toy", ignore=shutil.ignore_patterns("pretrain", "sft", "checkpoint*"))
    words = ["--toy", tmp_path / "toy", "--out", tmp_path / "ablation", "--seeds 0 --rows libra b d --limit 23"]
    for _ in range(2):
        said = run("toy.ablate", *words, ("--pretrain=--steps 2 --batch 4 --warmup 1",),
                   ("--sft=--steps 2 --batch 4",))
        rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
        assert rows["Libra"].split("|")[2].strip() == "1" and rows["(e) no bridge"].split("|")[2].strip() == "0"
    result = json.loads((tmp_path / "ablation/d-0/result.json").read_text())
    assert len(result["differences"][0]) == 4 and result["text perplexity"] > 1 and result["image loss"] > 1
    assert Image.open(tmp_path / "ablation/ablation.png").width == 1100


def test_mistakes_are_one_sentence(toy, pretrain, tmp_path):
    for words, message in ((["--data", tmp_path / "{0..3}.tar"], "4 of 4 files are missing"),
                           (["--llm", toy / "clip"], "no tokenizer; expected tokenizer.model"),
                           (["--micro-batch 4"], "does not divide"),
                           (["--data", toy / "llama/config.json"], "expected a tar shard, JSON")):
        assert message in run("pretrain.py", *pretrain, "--out", tmp_path / "x", *words, ok=False)
    for words, message in (("--raw", "--raw belongs to a question"), ("--attention a.png what", "0 are given"),
                           ("--raw --attention a.png --image b.png what", "neither --json nor --raw")):
        assert message in run("generate.py", "--model", toy / "sft", *words.split(), ok=False)
