"""Pieces around images, the chat template and its labels, token by token."""
import re

import pytest
import tiny
import torch

from common.weights import UserError, write_json
from text import IMG, SYSTEM, Text, expand_images, open_text, truncate


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Text(tiny.spm(tmp_path_factory.mktemp("spm")))


def pieces(text, ids):
    return ["[IMG]" if i == IMG else text.model.id_to_piece(i) for i in ids]


def split(ids):
    at = ids.index(IMG)
    return ids[1:at], ids[at + 1:]


def test_text_after_an_image_has_no_blank_of_its_own(text):
    ids, loss_mask = text.caption("the red square")
    tokens = pieces(text, ids)
    assert tokens[:3] == ["<s>", "[IMG]", "<0x0A>"] and "".join(tokens[3:]) == "the▁red▁square</s>"
    assert loss_mask == [0, 1, 0] + [1] * (len(ids) - 3)
    ids, loss_mask = text.caption("the red square", image_first=False)
    assert pieces(text, ids) == ["<s>", "▁the", "▁red", "▁square", "<0x0A>", "[IMG]"]
    assert loss_mask == [0, 1, 1, 1, 0, 1]
    assert text.caption("the red square", end=False)[0][-1] != text.eos
    assert text.caption("the red square", most=2)[0] == text.caption("the red square")[0][:5]
    assert text.caption("") == ([text.start[0], IMG, text.newline, text.eos], [0, 1, 0, 1])


def test_chat_labels_only_answers(text):
    ids, loss_mask = text.chat([("what is the shape", 2, "a red circle"), ("the colour", 0, "red")], system="a")
    tokens = pieces(text, ids)
    assert tokens[:1] == ["<s>"] and tokens.count("[IMG]") == 2
    first = tokens.index("[IMG]")
    assert "".join(tokens[1:first]) == "▁a▁USER:"
    assert tokens[first:first + 3] == ["[IMG]", "<0x0A>", "[IMG]"] and tokens[first + 3] == "<0x0A>"
    assert [p for p, c in zip(tokens, loss_mask) if c] == ["▁a", "▁red", "▁circle", "▁", "</s>", "▁red", "▁", "</s>"]
    second = tokens.index("</s>") + 1
    assert "".join(tokens[second:]) == "▁USER:▁the▁colour▁ASSISTANT:▁red▁</s>"
    assert loss_mask[first] == 0 and text.decode([i for i, c in zip(ids, loss_mask) if c]) == "a red circle"
    before, after = (text.model.decode(part) for part in split(text.chat([("what", 1, None)])[0]))
    assert before == f"{SYSTEM} USER:" and after == "\nwhat ASSISTANT:"


def test_control_tokens_in_user_text_stay_text(text):
    for word in ("<s>", "</s>", "<image>", "<unk>"):
        ids, _ = text.chat([(f"is {word} red", 1, f"{word} is")])
        assert ids.count(text.start[0]) == 1 and ids.count(text.eos) == 1 and ids.count(IMG) == 1 and 0 not in ids
        assert word in text.model.decode([i for i in ids if i != IMG])
    ids = text.plain("lone \ud800 surrogate, é ☃ \n\n end")
    assert text.model.decode(ids).endswith("é ☃ \n\n end")


def test_decode(text):
    assert text.decode(text._encode("red ") + [text.eos] + text._encode("blue")) == "red"
    assert text.decode([]) == ""


def test_truncation_never_goes_through_an_image(text):
    ids, loss_mask = text.chat([("what", 1, "red"), ("what", 1, "a blue circle")], system="")
    second = len(ids) - 1 - ids[::-1].index(IMG)
    length = [18 if i == IMG else 1 for i in ids]
    for limit in range(sum(length[:second]), sum(length[:second]) + 18):
        assert truncate(ids, loss_mask, limit, 18)[0] == ids[:second]
    assert truncate(ids, loss_mask, sum(length), 18) == (ids, loss_mask)
    assert not any(truncate(ids, loss_mask, 25, 18)[1])   # the answers begin later


def test_expand_images(text):
    c = tiny.config(vocab_size=text.vocab_size)
    codes = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 0]])
    ids, loss_mask = expand_images([1, IMG, 13, 5], [0, 1, 0, 1], [codes], c)
    v = c.vocab_size
    assert ids[:, 0].tolist() == [1, v + 8, v + 1, v + 3, v + 5, v + 7, v + 9, 13, 5]
    assert ids[:, 1].tolist() == [1, v + 8, v + 2, v + 4, v + 6, v, v + 9, 13, 5]
    assert loss_mask.tolist() == [False, False, True, True, True, True, True, False, True]    # EOI counts, BOI does not
    with pytest.raises(AssertionError):
        expand_images([1, IMG], [0, 0], [codes, codes], c)


def test_models_that_cannot_serve_are_refused(tmp_path):
    import sentencepiece
    with pytest.raises(UserError, match="no such file"):
        Text(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Text(tmp_path / "tokenizer.model")
    lines = ["the red square is left of a blue circle", "what colour is the small one"] * 20
    for name, options, message in (("a", {}, "expected a LLaMA-style"),
                                   ("b", {"byte_fallback": True}, "newlines as they are")):
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path / name),
                                                 vocab_size=300 if options else 40, model_type="bpe", minloglevel=2,
                                                 hard_vocab_limit=False, **options)
        with pytest.raises(UserError, match=message):
            Text(tmp_path / f"{name}.model")


def test_internlm2s_template(tmp_path):
    """Its SentencePiece has spare pieces, which tokenizer_config.json names; no newline after <|im_end|>, no blank of
    its own in front of a piece of text."""
    tiny.spm(tmp_path, control_symbols="[UNUSED_TOKEN_145],[UNUSED_TOKEN_146]", user_defined_symbols=["\n"],
             add_dummy_prefix=False)
    spare = {Text(tmp_path / "tokenizer.model").model.piece_to_id(f"[UNUSED_TOKEN_{n}]"): {"content": token}
             for n, token in ((145, "<|im_end|>"), (146, "<|im_start|>"))}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": spare | {9999: {"content": "<img>"}}})
    write_json(tmp_path / "config.json", {"template": "internlm2-chat"})
    text = open_text(tmp_path)
    assert text.use_template() == "internlm2-chat" and text.id_of("<img>") is None
    end, start = spare
    encode, newline = text.model.encode, [text.newline]
    assert text.newline == text.model.piece_to_id("\n") and encode("the") == [text.model.piece_to_id("the")]
    ids, loss_mask = text.chat([("the shape", 2, "a <|im_end|>"), (" red", 0, "blue")], "be brief")
    answers = [encode("a <|im_end|>") + [end], encode("blue") + [end]]
    user, assistant = [start] + encode("user\n"), [end, start] + encode("assistant\n")
    assert ids == (text.start + [start] + encode("system\nbe brief") + [end] + user + [IMG, *newline, IMG, *newline]
                   + encode("the shape") + assistant + answers[0] + user + encode(" red") + assistant + answers[1])
    assert [i for i, label in zip(ids, loss_mask) if label] == answers[0] + answers[1]
    assert text.ends == [end, text.model.eos_id()] and text.decode(answers[0] + encode("red")) == "a <|im_end|>"


def test_llama2s_template(tmp_path):
    """As Llama 2 writes it: the system message inside the first turn, <s> before every turn"""
    text = Text(tiny.spm(tmp_path))
    text.use_template("llama2")
    ids, loss_mask = text.chat([("the shape", 0, "a circle"), ("the colour", 0, "red")], "be brief")

    def spelled(ids):
        return re.sub("<0x(..)>", lambda match: chr(int(match[1], 16)), "".join(pieces(text, ids)))
    assert spelled(ids) == ("<s>▁[INST]▁<<SYS>>\nbe▁brief\n<</SYS>>\n\nthe▁shape▁[/INST]▁a▁circle▁</s>"
                            "<s>▁[INST]▁the▁colour▁[/INST]▁red▁</s>")
    assert [p for p, label in zip(pieces(text, ids), loss_mask) if label][-3:] == ["▁red", "▁", "</s>"]
    shown, _ = text.chat([("the shape", 1, None)], "")
    assert spelled(shown) == "<s>▁[INST][IMG]\nthe▁shape▁[/INST]"
    with pytest.raises(UserError, match="no chat template of a known family"):
        text.use_template("chatml")                       # its control tokens are not in this vocabulary
