"""Generation: cached = uncached, batches = single prompts, what may stand where, sampling."""
import argparse
import json
import sys

import pytest
import tiny
import torch

from answering.sampling import Sampler, place_in_image
from common.cli import explain
from common.weights import UserError
from generate import (
    answer,
    answer_file,
    ask,
    complete,
    draw,
    encode_images,
    encode_prompts,
    forward,
    generate,
    new_caches,
    prefill,
    reconstruct,
)
from llama import KVCache
from streams import IMAGE, TEXT, Streams
from text import IMG, expand_images


def stack(tokens):
    return torch.stack(list(tokens), dim=1)               # (B, T, K)


def prompts_of(c, g):
    """Five prompts of different lengths and kinds of interleaving, all ending in text"""
    return [tiny.interleaved(c, images, g) for images in (0, 1, 2, 1, 0)]


def uncached(model, prompt, signal, steps):
    """Greedy, the whole sequence anew for every token, the place of each decided by counting -> ids, logits"""
    c, ids, logits = model.config, prompt, []
    given = len(prompt)
    for _ in range(steps):
        streams = Streams.from_ids([ids], c)
        rows = ids[:, 0] >= c.vocab_size
        full = torch.zeros(int(rows.sum()), c.contiguous_signal_size)
        if signal is not None:
            full[:int((prompt[:, 0] >= c.vocab_size).sum())] = signal
        hidden = streams.merge(*model.hidden(streams, full))[0, -1]
        boi = (ids[:, 0] == c.vocab_size + c.n_codes).nonzero()
        inside = len(ids) - 1 - int(boi[-1]) if len(boi) else None
        if inside is None or inside > c.image_tokens - 1:
            row = model.lm_head(hidden)
            token = row.argmax().expand(c.vision_codebook_num)
        elif inside == c.image_tokens - 1:
            row, token = None, torch.tensor(c.newline_token_id).expand(c.vision_codebook_num)
        elif inside == c.image_tokens - 2:
            row, token = None, torch.tensor(c.vocab_size + c.n_codes + 1).expand(c.vision_codebook_num)
        else:
            row = torch.stack([head(hidden) for head in model.vision_lm_head.heads])
            token = row[:, :c.n_codes].argmax(-1) + c.vocab_size
        logits.append(row)
        ids = torch.cat([ids, token[None]])
    return ids[given:], logits


KINDS = [{}, {"num_key_value_heads": 2}, {"use_bridge": False}, {"use_expert": False, "use_bridge": False}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["text", "draw", "complete", "closed"])
def test_cached_is_uncached(kind, ending):
    """Text; a picture from BOI; the rest of a picture; behind an EOI: equal tokens, logits within 1e-4"""
    model, g = tiny.libra(**kind).eval(), torch.Generator().manual_seed(8)
    c = model.config
    prompt = tiny.interleaved(c, 1, g)
    tail = {"text": [], "draw": tiny.image_ids(c, 0), "complete": tiny.image_ids(c, 2, g), "closed": tiny.image_ids(c)}
    prompt = torch.cat([prompt, tail[ending]]) if ending != "text" else prompt
    signal = tiny.signals(c, [prompt], g)
    steps = 12                                            # past EOI and the newline, into text again
    with torch.no_grad():
        expected, logits = uncached(model, prompt, signal, steps)
        ours = stack(generate(model, [prompt], signal, steps))[0]
        assert torch.equal(ours, expected)
        for step, row in enumerate(logits[1:], 1):        # the cached logits, from the tokens so far
            if row is not None:
                hidden = last_hidden(model, prompt, ours[:step], signal)
                heads = [model.lm_head] if row.dim() == 1 else model.vision_lm_head.heads
                assert (torch.stack([head(hidden) for head in heads]) - row).abs().max() < 1e-4


def last_hidden(model, prompt, new, signal):
    """Through the cache: prompt first, then the tokens one by one -> the last one's hidden state (D,)"""
    c = model.config
    views = [TEXT, IMAGE] if c.use_bridge else [TEXT]
    caches = {view: KVCache(c, 1, len(prompt) + len(new), model.lm_head.weight) for view in views}
    prefill(model, Streams.from_ids([prompt], c), signal, caches)
    for token in new:
        hidden = forward(model, Streams.from_ids([token[None]], c), None, caches)[:, 0]
        for cache in caches.values():
            cache.advance([1])
    return hidden[0]


def test_only_codes_inside_an_image_then_eoi_then_newline():
    model, g = tiny.libra(), torch.Generator().manual_seed(9)
    c = model.config
    for head in model.vision_lm_head.heads:               # BOI and EOI would win everywhere
        head.weight.data[c.n_codes:] = head.weight.data[:1] * 50
    prompt = torch.cat([tiny.text_ids(c, 4, g), tiny.image_ids(c, 0)])
    new = stack(generate(model, [prompt] * 3, None, 8, temperature=1.0))
    assert (new[:, :4] >= c.vocab_size).all() and (new[:, :4] < c.vocab_size + c.n_codes).all()
    assert (new[:, 4] == c.vocab_size + c.n_codes + 1).all()
    assert (new[:, 5] == 13).all() and (new[:, 6:] < c.vocab_size).all()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}])
def test_a_batch_answers_as_its_prompts_alone(sampling):
    model, g = tiny.libra(), torch.Generator().manual_seed(10)
    c, prompts = model.config, prompts_of(model.config, g)
    signals = [tiny.signals(c, [prompt], g) for prompt in prompts]
    together = stack(generate(model, prompts, torch.cat(signals), 20, **sampling))
    for row, (prompt, signal) in enumerate(zip(prompts, signals)):
        if sampling:
            sampling["seed"] = 3 + row
        assert torch.equal(together[row], stack(generate(model, [prompt], signal, 20, **sampling))[0])


def test_a_batch_of_texts_and_drawings():
    """Rows of different modality in one step"""
    model, g = tiny.libra(), torch.Generator().manual_seed(11)
    c = model.config
    prompts = [tiny.interleaved(c, 1, g), torch.cat([tiny.interleaved(c, 0, g), tiny.image_ids(c, 1, g)]),
               torch.cat([tiny.interleaved(c, 1, g), tiny.image_ids(c, 0)])]
    signals = [tiny.signals(c, [prompt], g) for prompt in prompts]
    together = stack(generate(model, prompts, torch.cat(signals), 12))
    for row, (prompt, signal) in enumerate(zip(prompts, signals)):
        assert torch.equal(together[row], stack(generate(model, [prompt], signal, 12))[0])


def test_recorded_steps_say_the_same(monkeypatch):
    """What a GPU replays as a graph: whole buffers under a mask, inputs and outputs at fixed places"""
    model, g, recordings = tiny.libra().eval(), torch.Generator().manual_seed(3), []
    c = model.config
    prompts = prompts_of(c, g) + [torch.cat([tiny.interleaved(c, 1, g), tiny.image_ids(c, 0)])]
    signal = tiny.signals(c, prompts, g)
    plain = stack(generate(model, prompts, signal, 12))

    def recorded(f, device):
        out = f().clone()
        recordings.append(out)
        return lambda: out.copy_(f())
    monkeypatch.setattr("answering.sampling.CAPTURE_AFTER", {"cpu": 2})
    monkeypatch.setattr("answering.sampling.capture_cuda_graph", recorded)
    assert torch.equal(stack(generate(model, prompts, signal, 12)), plain) and len(recordings) == 2
    alone = stack(generate(model, prompts[:1], None, 12))
    assert torch.equal(alone[0], plain[0]) and len(recordings) == 3
    assert torch.equal(stack(generate(model, prompts, signal, 12, graphs=False)), plain) and len(recordings) == 3


def test_room():
    model, g = tiny.libra(), torch.Generator().manual_seed(12)
    long = tiny.text_ids(model.config, 125, g)
    assert len(list(generate(model, [long], None, 50))) == 3      # max_position_embeddings is 128
    with pytest.raises(UserError, match="too little room"):
        list(generate(model, [tiny.text_ids(model.config, 128, g)], None, 5))


def test_the_text_cache_is_a_llamas():
    """Text behind an image needs one view of the keys; a drawing with text behind it needs two."""
    c, g = tiny.config(num_key_value_heads=2), torch.Generator().manual_seed(0)
    for tail, caches in (([], 1), (tiny.image_ids(c, 0), 2)):
        prompt = torch.cat([tiny.interleaved(c, 1, g), *([tail] if len(tail) else [])])
        made = new_caches(c, [prompt] * 3, [place_in_image(prompt, c)] * 3, 20, torch.zeros(()))
        numbers = sum(t.numel() for cache in made.values() for t in (*cache.keys, *cache.values))
        assert numbers == caches * 2 * c.num_hidden_layers * 3 * 2 * (len(prompt) + 20) * c.head_dim


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]).log_softmax(0)
    many = 20_000
    draw = lambda **options: torch.bincount(  # noqa: E731
        Sampler(**options)(logits.expand(many, -1), range(many)), minlength=5) / many
    assert (draw(temperature=1.0) - logits.exp()).abs().max() < 0.015
    assert (draw(temperature=0.5) - (2 * logits).softmax(0)).abs().max() < 0.015
    two = draw(temperature=1.0, top_k=2)
    assert two[2:].sum() == 0 and (two[:2] - logits[:2].softmax(0)).abs().max() < 0.015
    nucleus = draw(temperature=1.0, top_p=0.7)            # 0.64 + 0.24: two are needed for 0.7
    assert nucleus[2:].sum() == 0 and nucleus[1] > 0.2
    assert draw(temperature=1.0, top_p=1e-9)[0] == 1 and draw()[0] == 1
    assert torch.equal(draw(temperature=1.0, seed=5), draw(temperature=1.0, seed=5))
    with pytest.raises(UserError, match="top_p"):
        Sampler(temperature=1.0, top_p=0.0)


def test_ask(tmp_path):
    from PIL import Image
    model = tiny.whole(tmp_path)
    picture = Image.new("RGB", (40, 30), "red")
    picture.save(tmp_path / "red.png")
    answer = ask(model, str(tmp_path / "red.png"), "What is it?", max_new_tokens=8)
    assert isinstance(answer, str) and answer == ask(model, [picture], "What is it?", max_new_tokens=8)
    assert ask(model, [picture, picture], "And these?", 8) is not None
    assert ask(model, None, "No picture?", 8) is not None
    with pytest.raises(UserError, match="max_new_tokens is 0, expected 1 or more"):
        ask(model, picture, "What?", 0)
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        ask(model, "gone.png", "What?")


def test_prompts_are_those_of_pretraining(tmp_path):
    """--raw after a picture and --draw: the tokens that a caption has in training, however it is typed"""
    from PIL import Image
    model = tiny.whole(tmp_path)
    text, picture = model.tokenizers.text, Image.new("RGB", (40, 30), "red")
    (codes,), _ = encode_images(model, [picture])
    for words in ("a red", ""):
        caption = text.caption(words, end=False)[0]
        for n in (1, 2):
            (ids,), _ = encode_prompts(model, [(words, [picture] * n)], raw=True)
            expected = caption[:1] + [IMG, text.newline] * (n - 1) + caption[1:]
            assert torch.equal(ids, expand_images(expected, [0] * len(expected), [codes] * n, model.config)[0])
    (alone,), _ = encode_prompts(model, [("a red", [])], raw=True)
    assert alone[:, 0].tolist() == text.plain("a red")
    drawn = [draw(model, [words], temperature=0)[0].tobytes() for words in ("a red circle", " A  RED\ncircle* ")]
    assert drawn[0] == drawn[1]


def test_impossible_prompts_are_refused():
    model, g = tiny.libra(), torch.Generator().manual_seed(13)
    c = model.config
    image = tiny.image_ids(c, generator=g)
    start = tiny.text_ids(c, 2, g)
    for bad, message in ((torch.cat([start, image, image[1:3]]), "7 tokens behind BOI, expected 5"),
                         (torch.cat([start, image[1:3]]), "without a BOI"),
                         (torch.cat([start, image[:2], image[-1:]]), "2 tokens behind BOI, expected 5")):
        with pytest.raises(AssertionError, match=message):
            list(generate(model, [bad], None, 5))
    with pytest.raises(UserError, match="too little room"):
        list(generate(model, [torch.cat([tiny.text_ids(c, 124, g), image[:1]])], None, 5))
    for prompts, new in (([], 5), ([start], 0), ([start[:0]], 5)):
        with pytest.raises(UserError, match="at least one prompt"):
            list(generate(model, prompts, None, new))
    assert len(list(generate(model, [torch.cat([tiny.text_ids(c, 123, g), image[:1]])], None, 50))) == 4


def test_recording_attention_maps_does_not_change_the_answer():
    """The plain form, which records attention maps, serves prompts of different lengths too."""
    model, g = tiny.libra(num_key_value_heads=2), torch.Generator().manual_seed(14)
    prompts = prompts_of(model.config, g)
    signal = torch.cat([tiny.signals(model.config, [prompt], g) for prompt in prompts])
    expected = stack(generate(model, prompts, signal, 10))
    for block in model.model.layers:
        block.self_attn.recorded_maps = []
    assert torch.equal(stack(generate(model, prompts, signal, 10)), expected)
    maps, = model.model.layers[0].self_attn.recorded_maps
    assert maps.shape[:2] == (len(prompts), 4) and torch.allclose(maps.sum(-1), torch.ones(()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_values_that_are_no_numbers_are_not_answered_with(value, sampling):
    model, g = tiny.libra(), torch.Generator().manual_seed(15)
    text = tiny.interleaved(model.config, 0, g)
    drawing = torch.cat([text, tiny.image_ids(model.config, 0)])
    for weight in (model.lm_head.weight, model.vision_lm_head.heads[1].weight):
        weight.data[3] = value
    for prompt in (text, drawing):
        with pytest.raises(UserError, match="no finite numbers"):
            list(generate(model, [prompt], None, 3, **sampling))


def test_pictures_that_are_no_numbers_are_not_written(tmp_path):
    from PIL import Image
    model = tiny.whole(tmp_path)
    for weight in model.tokenizers.image.decoder.parameters():
        weight.data.fill_(float("nan"))
    for job in (lambda: reconstruct(model.tokenizers.image, Image.new("RGB", (30, 30))), lambda: draw(model, ["a"])):
        with pytest.raises(UserError, match="no finite numbers"):
            job()


@pytest.mark.parametrize("part", ["encoder", "quant_conv", "quantize.project_in"])
def test_ids_of_values_that_are_no_numbers_are_not_used(tmp_path, part):
    """One NaN in CLIP or in LFQ: every id is a number all the same"""
    from PIL import Image
    model, picture = tiny.whole(tmp_path), Image.new("RGB", (30, 30))
    jobs = (lambda: reconstruct(model.tokenizers.image, picture), lambda: complete(model, [picture], 2),
            lambda: ask(model, picture, "What?", 3))
    for job in jobs:
        job()
    images = model.tokenizers.image
    next(p for name, p in images.named_parameters() if name.startswith(part)).data.flatten()[0] = float("nan")
    assert images.encode(torch.zeros(1, 3, 32, 32))[0].max() < 16
    for job in jobs:
        with pytest.raises(UserError, match="no finite numbers"):
            job()


def test_an_answer_that_is_cut(tmp_path, capsys):
    """Where the positions end before </s>, and only there"""
    model = tiny.whole(tmp_path)
    model.lm_head.weight.data[model.tokenizers.text.eos] = 0                  # never the likeliest
    rows = [("What?", []), ("What colour is the large square in the top left of it?", [])]
    prompts, _ = encode_prompts(model, rows)
    model.config.max_position_embeddings = max(map(len, prompts)) + 3
    (_, first, cut_first), (_, second, cut_second) = answer(model, rows, 5)
    assert (first, cut_first, second, cut_second) == (5, False, 3, True)
    assert answer(model, rows[1:], 5, out=sys.stdout)[0][1:] == (3, True)
    assert f"all {model.config.max_position_embeddings} positions" in capsys.readouterr().err
    assert answer(model, rows[1:], 2)[0][1:] == (2, False)


def test_a_file_of_prompts_names_the_lines_that_are_cut(tmp_path, capsys):
    model = tiny.whole(tmp_path)
    model.lm_head.weight.data[model.tokenizers.text.eos] = 0
    rows = [("What?", []), ("What colour is the large square in the top left of it?", [])]
    model.config.max_position_embeddings = max(map(len, encode_prompts(model, rows)[0])) + 3
    entries = [(number, {"question": rows[number % 2][0], "answer": "gold", "id": "\ud800"}) for number in range(1, 6)]
    args = argparse.Namespace(out=tmp_path / "out", batch="x", batch_size=2, max_new_tokens=5, raw=False, seed=0)
    answer_file(model, args, entries, {"temperature": 0.0})
    assert "lines 1, 3, 5" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    expected = answer(model, [rows[1], rows[0]], 5)
    assert [line["answer"] for line in lines] == [expected[n % 2][0] for n in range(5)]
    assert all(line["given_answer"] == "gold" and line["id"] == "\ud800" for line in lines)


def test_a_full_disk_is_named(tmp_path):
    args = argparse.Namespace(out="/dev/full", batch="x", batch_size=2, max_new_tokens=2, raw=False, seed=0)
    with pytest.raises(OSError) as full:
        answer_file(tiny.whole(tmp_path), args, [(1, {"question": "What?"})], {"temperature": 0.0})
    assert explain(full.value) == ("error: /dev/full: No space left on device", 2)


def test_rows_are_answered_alike_by_all(tmp_path):
    """A batch, one row, one row with history, a picture without a question"""
    from PIL import Image
    model, picture = tiny.whole(tmp_path), Image.new("RGB", (40, 30), "red")
    rows = [("What is it?", [picture]), ("No picture?", []), (None, [picture])]
    together = answer(model, rows, 6)
    assert together == [answer(model, [row], 6)[0] for row in rows]
    assert together[0][0] == ask(model, picture, "What is it?", 6)
    text = model.tokenizers.text
    prompts, _ = encode_prompts(model, [("And now?", [picture] * 3)], history=[("What?", 2, "That.")])
    expected = text.chat([("What?", 2, "That."), ("And now?", 1, None)])[0]
    assert [i for i in prompts[0][:, 0].tolist() if i < text.vocab_size] == [i for i in expected if i != IMG]
    blind, _ = encode_prompts(model, rows, zeroed=True)
    codes = blind[0][blind[0][:, 0] >= text.vocab_size][1:-1]
    assert (codes == text.vocab_size).all()
