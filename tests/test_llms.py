"""The modern LLaMA family: RoPE of longer contexts, biases, byte-level BPE, chat templates; against transformers."""
import json
import random
import shutil

import gguf
import pytest
import tiny
import torch
import transformers
from PIL import Image
from scripts import log, run

from common.weights import UserError, read_json, write_json
from llama import Llama
from model import Libra
from text import IMG, BytePairText, Text, open_text

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0,
         "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
LAYOUTS = {"llama 3.1": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
           "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
           "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
           "qwen 2.5": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                                  "sliding_window": 128, "use_sliding_window": False, "max_window_layers": 2}),
           "smollm2": ("Llama", {"tie_word_embeddings": True, "head_dim": 16, "pretraining_tp": 1,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_greedy_tokens(layout, tmp_path):
    kind, changes = LAYOUTS[layout]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    ids = torch.randint(300, (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=2e-4)
        greedy = ids[:1, :8]
        for _ in range(64):
            greedy = torch.cat([greedy, ours(greedy)[:, -1:].argmax(-1)], dim=1)
    wanted = theirs.generate(ids[:1, :8], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=1)
    assert torch.equal(greedy, wanted)


def test_rope_as_older_versions_write_it(tmp_path):
    """rope_scaling and rope_theta side by side, type for rope_type"""
    config = transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    values = read_json(tmp_path / "config.json")
    ids, new = torch.randint(300, (1, 100)), Llama.from_pretrained(tmp_path)
    old = {key: value for key, value in values.items() if key != "rope_parameters"} | {
        "rope_theta": 5e5, "rope_scaling": {key.replace("rope_type", "type"): value for key, value in LLAMA3.items()}}
    write_json(tmp_path / "config.json", old)
    with torch.no_grad():
        assert torch.equal(new(ids), Llama.from_pretrained(tmp_path)(ids))


# ---------------------------------------------------------------- byte-level BPE

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3_CHAT = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
               "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return tiny.bpe(tmp_path_factory.mktemp("bpe"), CHATML)


def test_500_strings(bpe):
    theirs, text, draw = transformers.AutoTokenizer.from_pretrained(bpe), open_text(bpe), random.Random(0)
    assert isinstance(text, BytePairText) and text.vocab_size == len(theirs)
    for _ in range(500):
        choices = [*tiny.WORDS, " ", "\n", chr(draw.randrange(32, 0x2fff))]
        words = "".join(draw.choices(choices, k=draw.randint(1, 8)))
        wanted = theirs.encode(words, add_special_tokens=False, split_special_tokens=True)
        assert text.plain(words) == text.start + wanted
        assert text.decode(wanted) == theirs.decode(wanted, clean_up_tokenization_spaces=False).strip()
        assert not set(wanted) & {text.id_of(token) for token in tiny.CONTROL}


def test_pieces_around_images(bpe):
    """One newline token after each image; a space behind it stays with its word; nothing but answers counts"""
    text = open_text(bpe)
    encode, (eos, *_) = text._encode, text.ends
    for words in ("the red square", " the", "\n\nthe", ""):
        assert text.caption(words) == (text.start + [IMG, text.newline] + encode(words) + [eos],
                                       [0, 1, 0] + [1] * len(encode(words) + [eos]))
        assert text.caption(words, image_first=False)[0] == text.start + encode(words) + [text.newline, IMG]
    ids, loss_mask = text.chat([("the", 2, "red"), ("a", 0, "b <|im_end|>")], "S")
    assert ids[:1] == text.start and text.model.decode([i for i in ids if i != IMG]) == (
        "S USER:\n\nthe ASSISTANT: redUSER: a ASSISTANT: b <|im_end|>")
    assert [i for i, label in zip(ids, loss_mask) if label] == encode(" red") + [eos] + encode(" b <|im_end|>") + [eos]


@pytest.mark.parametrize("template, bos, end", [(CHATML, "<|endoftext|>", "<|im_end|>"),
                                                ("{{ bos_token }}" + CHATML, "<|endoftext|>", "<|im_end|>"),
                                                (LLAMA3_CHAT, "<|begin_of_text|>", "<|eot_id|>")])
def test_the_llms_own_template(bpe, tmp_path, template, bos, end):
    """Token by token as transformers renders it, and with an image in it"""
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = read_json(tmp_path / "tokenizer_config.json") | {"chat_template": template, "bos_token": bos,
                                                                "eos_token": end}
    write_json(tmp_path / "tokenizer_config.json", settings)
    theirs, text = transformers.AutoTokenizer.from_pretrained(tmp_path), open_text(tmp_path)
    assert text.use_template("llm") == ("chatml" if CHATML in template else "llama3")
    turns = [(" What is it?", "a cat"), ("  the colour", "red\nand 12")]
    assert len(text._encode("\n ")) == 1                 # so a space may join the template's newline
    for system in ("be brief", ""):
        messages = [{"role": "system", "content": system}] * bool(system) + [
            {"role": role, "content": words} for turn in turns for role, words in zip(("user", "assistant"), turn)]
        wanted = theirs.apply_chat_template(messages, return_dict=False)
        ids, loss_mask = text.chat([(question, 0, answer) for question, answer in turns], system)
        assert ids == wanted[:len(ids)] and not theirs.decode(wanted[len(ids):]).strip()       # a last newline
        counted = [i for i, label in zip(ids, loss_mask) if label]
        assert theirs.decode(counted) == f"a cat{end}red\nand 12{end}"
        asked = text.chat([(turns[0][0], 0, None)], system)[0]
        assert asked == theirs.apply_chat_template(messages[:1 + bool(system)], add_generation_prompt=True,
                                                   return_dict=False)
        shown = text.chat([(turns[0][0], 1, None)], system)[0]
        at = shown.index(IMG)
        assert shown[at + 1] == text.newline and shown[:at] + shown[at + 2:] == asked
    said = text.chat([(f"a {end}", 0, f"b {end}")], "")[0]
    assert said.count(text.eos) == 2                      # the template's alone


def test_ends_and_starts(bpe, tmp_path):
    """Several end tokens (generation_config.json), no BOS (null), tokens of another vocabulary, damaged files"""
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    settings = read_json(tmp_path / "tokenizer_config.json") | {"bos_token": None}
    write_json(tmp_path / "tokenizer_config.json", settings)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 6]})
    text = open_text(tmp_path)
    assert text.start == [] and text.ends == [2, 6] and text.plain("a") == text._encode("a")
    assert text.decode(text._encode("red") + [6] + text._encode("blue")) == "red"
    assert text.caption("a")[0][0] == IMG and len(text.caption("a")[0]) == len(text.caption("a")[1])
    for name, value in (("tokenizer.json", {}), ("generation_config.json", {"eos_token_id": 10 ** 6}),
                        ("tokenizer_config.json", settings | {"eos_token": "<none>"})):
        kept = (tmp_path / name).read_text()
        write_json(tmp_path / name, value)
        with pytest.raises(UserError, match=str(tmp_path)):
            open_text(tmp_path)
        (tmp_path / name).write_text(kept)
    with pytest.raises(UserError, match="no chat template of a known family"):
        write_json(tmp_path / "tokenizer_config.json", settings | {"chat_template": "{{ x }}"})
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        open_text(tmp_path).use_template("llm")


def test_which_file(bpe, tmp_path):
    with pytest.raises(UserError, match="no tokenizer; expected tokenizer.model"):
        open_text(tmp_path)
    path = tiny.spm(tmp_path)
    assert type(open_text(path.parent)) is Text
    shutil.copy(bpe / "tokenizer.json", path.parent)
    with pytest.raises(UserError, match="tokenizer.model and tokenizer.json differ"):
        open_text(path.parent)
    pieces = {open_text_piece(path, i): i for i in range(Text(path).vocab_size)}
    (path.parent / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces}}))
    assert type(open_text(path.parent)) is Text


def open_text_piece(path, token):
    return Text(path).model.id_to_piece(token)


@pytest.mark.parametrize("bos", ["<|endoftext|>", None])
def test_a_libra_around_it_is_saved_and_asked(bpe, tmp_path, bos):
    """A Libra of a folder with tokenizer.json: what it saves is whole, its template recorded, its text the LLM's"""
    from generate import ask
    llm = tmp_path / "llm"
    shutil.copytree(bpe, llm)
    settings = read_json(llm / "tokenizer_config.json") | {"bos_token": bos}
    write_json(llm / "tokenizer_config.json", settings)
    config = transformers.Qwen2Config(**SIZES | {"vocab_size": 768}, rope_parameters={"rope_type": "default",
                                                                                     "rope_theta": 1e4})
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    theirs.save_pretrained(llm)
    tiny.image_tokenizer().save_pretrained(tmp_path / "images")
    libra = Libra.from_pretrained(llm, tmp_path / "images", chat_template="llm").eval()
    libra.save_pretrained(tmp_path / "libra")
    again = Libra.from_pretrained(tmp_path / "libra").eval()
    assert again.config.chat_template == again.tokenizers.text.template == "chatml" and again.config.qkv_bias
    ids = torch.tensor([again.tokenizers.text.plain("the red square")])
    with torch.no_grad():
        torch.testing.assert_close(Llama.forward(again, ids), theirs(ids).logits, rtol=0, atol=1e-4)
    assert isinstance(ask(again, Image.new("RGB", (20, 20), "red"), "the red square", 5), str)


@pytest.mark.slow
def test_the_scripts_run_on_it(bpe, toy, tokenizer, tmp_path):
    """Pretraining with the LLM's own template, tuning that keeps it, an answer, a score; and tuning with the paper's"""
    llm = tmp_path / "llm"
    shutil.copytree(bpe, llm)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 768, "tie_word_embeddings": True},
                                      rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    transformers.LlamaForCausalLM(config).save_pretrained(llm)
    steps = "--steps 3 --warmup 1 --batch 4 --lr 1e-3 --save-every 0"
    run("pretrain.py", "--llm", llm, "--image-tokenizer", tokenizer, "--data", toy / "captions/*.tar", "--out",
        tmp_path / "1", "--template llm", steps)
    words = ["--data", toy / "chats/chat.json", "--images", toy / "chats/images", steps]
    for out, template, name in (("2", "", "chatml"), ("3", "--template vicuna", "vicuna")):
        run("sft.py", "--model", tmp_path / "1", *words, "--out", tmp_path / out, template)
        assert read_json(tmp_path / out / "config.json")["chat_template"] == name
        assert len(log(tmp_path / out)) == 3
    run("generate.py", "--model", tmp_path / "2", "--image", toy / "chats/images/000000.jpg", ("What is it?",),
        "--max-new-tokens 4")
    words = [toy / "chats/chat.json", "--images", toy / "chats/images", "--grid 7 --limit 3 --llm"]
    for folder, sign in ((llm, "ASSISTANT:"), (tmp_path / "2", "<|im_start|>assistant"), (tmp_path / "3", "ASSISTANT")):
        assert sign in run("data.py", *words, folder)
    assert "<|im_start|>assistant" in run("data.py", *words, llm, "--template llm")


def test_a_gguf_file_becomes_a_folder(bpe, tmp_path):
    """A LLaMA written as llama.cpp does, RoPE's pairs side by side, reads as transformers' model; its text as the
    tokenizer it was made of"""
    from toy.smollm2 import LAYER, OUTSIDE, convert
    made = json.loads((bpe / "tokenizer.json").read_text())
    pieces = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": len(pieces), "tie_word_embeddings": True},
                                      rope_parameters={"rope_type": "default", "rope_theta": 1e5}, rms_norm_eps=1e-5)
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {hf: ggml for ggml, hf in OUTSIDE.items()} | {
        f"model.layers.{n}.{hf}.weight": f"blk.{n}.{ggml}.weight" for n in range(2) for ggml, hf in LAYER.items()}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in (("embedding_length", 64), ("feed_forward_length", 96), ("block_count", 2), ("head_count", 4),
                       ("head_count_kv", 2), ("context_length", 256), ("layer_norm_rms_eps", 1e-5),
                       ("rope_freq_base", 1e5), ("tokenizer_model", "gpt2"), ("token_list", pieces),
                       ("token_types", [3 if piece in tiny.CONTROL else 1 for piece in pieces]),
                       ("token_merges", [" ".join(pair) for pair in made["model"]["merges"]]),
                       ("bos_token_id", 1), ("eos_token_id", 2), ("chat_template", CHATML)):
        getattr(writer, f"add_{key}")(value)
    for name, p in theirs.named_parameters():
        x = p.detach()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                x = x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names[name], x.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "model.gguf", tmp_path / "out")
    ids = torch.randint(len(pieces), (1, 50))
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(tmp_path / "out")(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    text, wanted = open_text(tmp_path / "out"), open_text(bpe)
    for words in tiny.WORDS:
        assert text.plain(words) == wanted.plain(words)
    assert text.use_template("llm") == "chatml" and text.ends == [2]


def test_without_a_bos_the_first_token_is_no_target(bpe, tmp_path):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "tokenizer_config.json", read_json(tmp_path / "tokenizer_config.json") | {"bos_token": None})
    ids, loss_mask = open_text(tmp_path).caption("the red square", image_first=False)
    assert len(ids) == len(loss_mask) and loss_mask[0] == 0 and all(loss_mask[1:-2])


def test_a_window_bounds_the_positions(tmp_path):
    """Mistral v0.1: up to the length of its window all keys are seen, as ours always are"""
    config = transformers.MistralConfig(**SIZES, sliding_window=48)
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = Llama.from_pretrained(tmp_path), torch.randint(300, (1, 48))
    assert ours.config.max_position_embeddings == 48
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_where_a_template_is_written(bpe, tmp_path):
    """In chat_template.json or .jinja too; config.json names the template of a model"""
    folder = tmp_path / "model"
    shutil.copytree(bpe, folder)
    settings = {name: value for name, value in read_json(folder / "tokenizer_config.json").items()
                if name != "chat_template"}
    write_json(folder / "tokenizer_config.json", settings)
    with pytest.raises(UserError, match="no chat template of a known family"):
        open_text(folder).use_template("llm")
    assert open_text(folder).use_template() == "vicuna"
    write_json(folder / "chat_template.json", {"chat_template": LLAMA3_CHAT})
    assert open_text(folder).use_template("llm") == "llama3"
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(CHATML)
    assert open_text(folder).use_template("llm") == "chatml"
    write_json(folder / "config.json", {"chat_template": "llama3"})
    assert open_text(folder).use_template() == "llama3" and open_text(folder).use_template("vicuna") == "vicuna"
    write_json(folder / "config.json", {"template": "Hermes-2"})
    with pytest.raises(UserError, match="known: vicuna, llama2"):
        open_text(folder).use_template()


def test_a_folder_gets_one_tokenizer(bpe, tmp_path):
    """What another tokenizer has left there goes; saved where it was read, nothing changes."""
    pieces, out = tiny.spm(tmp_path), tmp_path / "out"
    out.mkdir()
    open_text(bpe).save(out)
    (out / "chat_template.jinja").write_text(CHATML)
    (out / "config.json").write_text("{}")
    Text(pieces).save(out)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "tokenizer.model"]
    open_text(bpe).save(out)
    assert (out / "tokenizer.json").read_bytes() == (bpe / "tokenizer.json").read_bytes()
    assert not (out / "tokenizer.model").exists()
    kept = sorted(out.iterdir())
    text = open_text(out)
    text.save(out)
    assert sorted(out.iterdir()) == kept
    (out / "tokenizer.json").unlink()                     # while a model was trained
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        text.save(tmp_path)


def test_a_prefix_space_is_named(bpe, tmp_path):
    made = read_json(bpe / "tokenizer.json")
    made["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    write_json(tmp_path / "tokenizer.json", made)
    with pytest.raises(UserError, match="add_prefix_space false"):
        open_text(tmp_path)


def test_mistrals_template_is_none_of_ours(tmp_path):
    path = tiny.spm(tmp_path)
    write_json(path.with_name("tokenizer_config.json"), {"chat_template": "{{ '[INST] ' + content + ' [/INST]' }}"})
    with pytest.raises(UserError, match="no chat template of a known family"):
        Text(path).use_template("llm")
