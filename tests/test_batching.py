"""Rows that are kept busy: every text is the one that its prompt has alone, whatever stands in the other rows."""
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import test_haplovl
import test_hovle
import test_llava
import tiny
import torch
from PIL import Image

from answering import batching, sampling
from answering.batching import Rate, prepare_ahead
from common.weights import UserError
from generate import answer, answer_rows, ask, encode_prompts, generate
from text import IMG

GENERATOR = torch.Generator().manual_seed(2)
PICTURES = [Image.fromarray(torch.randint(256, (20 + 9 * n, 30, 3), generator=GENERATOR, dtype=torch.uint8).numpy())
            for n in range(4)]
WORDS = "What is it?", "the red square in the top left", "a", "What colour is the large circle in the left?"
ROWS = [(WORDS[n % 4] if n % 6 else None, PICTURES[n % 4:][:1 if n % 6 == 0 else n % 3]) for n in range(23)]


def busy(model, n_rows, **options):
    answers = list(answer_rows(model, ROWS, n_rows, **options))
    assert sorted(number for number, _ in answers) == list(range(len(ROWS)))
    return dict(answers), [number for number, _ in answers]


@pytest.fixture
def libra(tmp_path):
    """Its answers end early or late: the end is likely"""
    model = tiny.whole(tmp_path)
    model.lm_head.weight.data[model.tokenizers.text.eos] *= 1.3
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 50}], ids=["greedy", "sampled"])
def test_libra_answers_as_each_row_alone(libra, options):
    """Against generate, cut at the first end"""
    text, expected = libra.tokenizers.text, []
    for n, row in enumerate(ROWS):
        seed = {"seed": n} if options else {}
        ids = torch.stack(list(generate(libra, *encode_prompts(libra, [row]), 30, **options, **seed)))[:, 0, 0].tolist()
        ids = ids[:next((i for i, token in enumerate(ids, 1) if token in text.ends), len(ids))]
        expected.append((text.decode(ids), len(ids), False))
    lengths = {n_tokens for _, n_tokens, _ in expected}
    assert min(lengths) < 4 and len(lengths) > 4 and (30 in lengths or options)
    for n_rows in (1, 2, 5, 64):
        answers, order = busy(libra, n_rows, max_new_tokens=30, **options)
        assert [answers[n] for n in range(len(ROWS))] == expected
        assert (order == list(range(len(ROWS)))) == (n_rows == 1)             # else short answers overtake long ones


MODELS = {"HaploVL": test_haplovl.tiny, "HoVLE": test_hovle.tiny, "LLaVA": test_llava.tiny,
          "post": lambda: test_hovle.tiny(pixel_shuffle_loc="post")}


@pytest.mark.parametrize("name", MODELS)
def test_the_others_write_as_each_row_alone(name):
    model, pictures = MODELS[name](), [test_hovle.picture(20 + 9 * n, 30, n) for n in range(11)]
    model.text = SimpleNamespace(vocab_size=88)
    prompts = [[1, *range(3, 4 + n), *[IMG] * (n % 3), 5, 6 + n] for n in range(11)]
    shown = iter(pictures)
    pictures = [next(shown) for prompt in prompts for token in prompt if token == IMG]
    free = tiny.continued(model, prompts, pictures, 25, temperature=3.0)
    stop, used = {ids[n] for n, ids in enumerate(free)}, 0
    together = tiny.continued(model, prompts, pictures, 25, stop, rows=4, temperature=3.0)
    assert len(set(map(len, together))) > 4
    for n, prompt in enumerate(prompts):
        mine = pictures[used:used + prompt.count(IMG)]
        used += len(mine)
        assert together[n] == tiny.continued(model, [prompt], mine, 25, stop, temperature=3.0, seed=n)[0]


def test_reading_ids_seldom_changes_nothing(libra, monkeypatch):
    """As on a GPU: ids are read after 1, 2, 4, 8 steps, steps are replayed, whole buffers stand under a mask"""
    expected, recordings = busy(libra, 5, max_new_tokens=30)[0], []

    def recorded(f, device):
        out = f().clone()
        recordings.append(out)
        return lambda: out.copy_(f())
    monkeypatch.setattr(sampling, "CAPTURE_AFTER", {"cpu": 2})
    monkeypatch.setattr(sampling, "capture_cuda_graph", recorded)
    monkeypatch.setattr(batching, "LOOK_EVERY", {"cpu": 8})
    assert busy(libra, 5, max_new_tokens=30)[0] == expected and recordings
    assert busy(libra, 5, max_new_tokens=30, graphs=False)[0] == expected


def test_positions_end_for_each_row(libra):
    """A long prompt is cut where its own positions end, a short one beside it is not; no room at all is an error."""
    libra.lm_head.weight.data[libra.tokenizers.text.ends] = 0                 # never the likeliest
    lengths = [len(encode_prompts(libra, [row])[0][0]) for row in ROWS]
    longest = max(lengths)
    libra.config.max_position_embeddings = longest + 3
    answers, _ = busy(libra, 4, max_new_tokens=9)
    for n, row in enumerate(ROWS):
        room = longest + 3 - len(encode_prompts(libra, [row])[0][0])
        assert answers[n][1:] == (min(9, room), room < 9) and answers[n] == answer(libra, [row], 9)[0]
    assert {cut for _, _, cut in answers.values()} == {True, False}
    libra.config.max_position_embeddings = longest
    with pytest.raises(UserError, match=f"^row {lengths.index(longest)}: the prompt has .* too little room"):
        busy(libra, 4, names=[f"row {n}" for n in range(len(ROWS))])


def test_a_broken_picture_is_named(libra, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [*ROWS[:6], ("What?", [tmp_path / "broken.png"])]
    with pytest.raises(UserError, match="^question 6: .*broken.png: cannot be read"):
        list(answer_rows(libra, rows, 1, 3, names=[f"question {n}" for n in range(7)]))
    with pytest.raises(UserError, match="broken.png: cannot be read"):
        ask(libra, tmp_path / "broken.png", "What?")


def test_values_that_are_no_numbers(libra, monkeypatch):
    libra.lm_head.weight.data[3] = float("nan")
    monkeypatch.setattr(batching, "LOOK_EVERY", {"cpu": 8})
    with pytest.raises(UserError, match="no finite numbers"):
        busy(libra, 4)


def test_threads_are_some_items_ahead():
    """In order, and never more than asked for"""
    begun, gate = [], threading.Event()

    def prepare(item):
        begun.append(item)
        gate.wait(10)
        return item * item
    futures = prepare_ahead(prepare, range(50), 7)
    first = next(futures)
    gate.set()
    assert first.result() == 0 and max(begun) <= 7
    for n, future in enumerate(futures, 1):
        assert future.result() == n * n and max(begun) <= n + 8


def test_threads_of_torch():
    """One for a thread that prepares, all for the one that computes, and for those that come later"""
    def alone(function):
        with ThreadPoolExecutor(1) as new:
            return new.submit(function).result()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ready = alone(lambda: [future.result() for future in prepare_ahead(lambda _: torch.get_num_threads(), [0], 1)]
                      + [torch.get_num_threads()])
        assert ready == [1, 3] and alone(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_the_rate(libra):
    """Prefill apart from decoding; a step reads the LLaMA's matrices once, not its embedding, nothing of pictures"""
    rate, c = Rate(libra), libra.config
    llama = sum(p.numel() for p in libra.llama_parameters())
    assert rate.weights == 4 * (llama - c.vocab_size * c.hidden_size)
    answers, _ = busy(libra, 4, max_new_tokens=30, rate=rate)
    assert rate.written == sum(n_tokens - 1 for _, n_tokens, _ in answers.values())
    assert rate.read == sum(len(encode_prompts(libra, [row])[0][0]) for row in ROWS)
    assert rate.written / 4 <= rate.steps < rate.written and min(rate.prefill, rate.decoding) > 1e-4
    assert all(words in str(rate) for words in ("prefill: ", "decoding: ", "GB/s of weights", "GB at most"))
