"""The page of generate.py --web: its functions, its server, and the page itself in headless Chromium."""
import itertools
import json
import re
import shutil
import signal
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from scripts import start

import generate
from answering import page
from common.weights import UserError, write_json

SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
QUESTION, LATER = "what colour is the square", "what shape is the red circle"
META = {"_type": "gradio.FileData"}
PATIENCE = 60_000                                         # ms: for a machine that does much else


def options(folder, **changes):
    return SimpleNamespace(**{"model": folder / "model", "raw": False, "temperature": 0.0, "seed": 0,
                              "max_new_tokens": 6, "host": None, "port": None} | changes)


def user(words, *files):
    parts = [{"type": "file", "file": {"path": str(file), "meta": META}} for file in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}


def model_says(words):
    return {"role": "assistant", "content": [{"type": "text", "text": words}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = tiny.whole(tmp_path_factory.mktemp("spm"))
    with torch.no_grad():
        model.lm_head.weight[:259] = 0                    # words only: no lone bytes, no end
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    (folder / "broken.png").write_text("no picture")
    return folder


def functions_of(model, *names):
    return {name: partial(getattr(generate, name), model) for name in names}


# ---------------------------------------------------------------- without gradio

def test_a_chat_becomes_turns():
    messages = [user("a", "1.png", "2.png"), model_says("x"), user("failed", "3.png"), user("stopped", "4.png"),
                user("c", "5.png")]
    turns = ("c", ["1.png", "2.png", "5.png"], [("a", 2, "x")])
    assert page.last_prompt(messages, False) == turns
    assert page.last_prompt(messages + [model_says("y")], False) == turns                     # for its attention
    assert page.last_prompt(messages, True) == ("c", ["5.png"], [])
    assert page.last_prompt([], False) == ("", [], [])


def test_streamed_words_are_the_answer(model, pictures):
    files = [str(pictures / "red.png"), str(pictures / "blue.png")]
    for raw, history in ((False, ()), (False, [(QUESTION, 1, "red")]), (True, ())):
        (words, _, _), = generate.answer(model, [(LATER, files)], 9, raw, history=history)
        steps = list(generate.stream(model, LATER, files, 9, raw, history))
        assert steps[-1] == words and len(steps) == 9
        assert all(later.startswith(words) for words, later in itertools.pairwise(steps))
    with pytest.raises(UserError, match="cut: all 512 positions"):
        list(generate.stream(model, "red " * 200, [], 500))


def test_attention_of_several_pictures(model, pictures):
    red, blue = str(pictures / "red.png"), str(pictures / "blue.png")
    history = [(QUESTION, 1, "red")]
    both = generate.attention(model, LATER, [red, blue], history=history).unflatten(-1, (2, 16))
    assert both.shape == (2, 1, 4, 2, 16) and (both > 0).all() and (both.sum((-1, -2)) < 1).all()
    other = generate.attention(model, LATER, [red, red], history=history).unflatten(-1, (2, 16))
    assert not both[0].equal(other[0]) and generate.attention(model, LATER, [red]).shape == (2, 1, 4, 16)
    with pytest.raises(UserError, match="longer than max_position_embeddings"):
        generate.attention(model, QUESTION * 99, [red])
    assert all(layer.self_attn.recorded_maps is None for layer in model.model.layers)         # the page goes on
    seen = generate.as_seen(model, red)
    assert seen.size == (32, 32) and page.overlay(seen, both[0, 0, 0, 0].unflatten(0, (4, 4))).size == (32, 32)


@pytest.mark.parametrize("recipe, jobs, raw", [
    ({"llm": "llama"}, "stream attention as_seen draw complete", True),
    ({"model": "pretrain"}, "stream attention as_seen", False),
    (None, "stream attention as_seen draw complete", False)])
def test_what_a_model_can_do(model, tmp_path, monkeypatch, recipe, jobs, raw):
    opened = []
    monkeypatch.setattr(generate, "serve", lambda functions, args, sampling, grid: opened.append((functions, grid)))
    if recipe is not None:
        write_json(tmp_path / "recipe.json", recipe)
    args = options(tmp_path, model=tmp_path)
    generate.open_page(model, args, SAMPLING)
    assert [*opened[0][0]] == jobs.split() and opened[0][1] == 4 and args.raw == raw
    generate.open_page(SimpleNamespace(), options(tmp_path, model=tmp_path), SAMPLING)       # it only answers
    assert [*opened[1][0]] == ["stream"] and opened[1][1] is None


def test_without_gradio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio"):
        page.serve({}, options(tmp_path), SAMPLING)


# ---------------------------------------------------------------- the server

@pytest.fixture
def opened(tmp_path, monkeypatch, capsys):
    """-> a function that opens a page in this process and returns its address"""
    gradio = pytest.importorskip("gradio", reason="the package gradio is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)

    def open_page(functions, **changes):
        page.serve(functions, options(tmp_path, **changes), SAMPLING, 4)
        return capsys.readouterr().out.split()[0]
    yield open_page
    gradio.close_all(verbose=False)


def post(url, body, kind):
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def reply(url, message):
    """-> the events of an answer, as the server sends them"""
    _, answer = post(f"{url}gradio_api/call/reply", json.dumps({"data": [[message], 0]}).encode(), "application/json")
    with urllib.request.urlopen(f"{url}gradio_api/call/reply/{json.loads(answer)['event_id']}", timeout=60) as events:
        return events.read().decode()


def test_uploads_are_limited_and_other_files_out_of_reach(model, tmp_path, opened):
    url = opened(functions_of(model, "stream", "draw", "complete"))
    assert url.startswith("http://127.0.0.1:")

    def upload(size):
        body = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(size)
                + b"\r\n--x--\r\n")
        return post(f"{url}gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert upload(21 * 2 ** 20)[0] == 413
    code, answer = upload(19 * 2 ** 20)
    assert code == 200
    uploaded, = json.loads(answer)                        # zeros
    assert reply(url, user(QUESTION, uploaded)).startswith("event: error")
    picture = tmp_path / "not_uploaded.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert reply(url, user(QUESTION, picture)).startswith("event: error")
    without_meta = {"data": [{"path": str(picture)}, 2, 1]}                     # gradio does not look at its path
    _, answer = post(f"{url}gradio_api/call/run_1", json.dumps(without_meta).encode(), "application/json")
    with urllib.request.urlopen(f"{url}gradio_api/call/run_1/{json.loads(answer)['event_id']}", timeout=60) as events:
        assert "leads out of the folder" in events.read().decode()
    assert reply(url, user(QUESTION)).startswith("event: generating")
    with urllib.request.urlopen(f"{url}config", timeout=60) as response:
        config = json.load(response)
    queued = [d for d in config["dependencies"] if d["queue"] and d["backend_fn"]]
    assert config["analytics_enabled"] is False and len(queued) == 3


def test_one_request_at_a_time(opened):
    """Three at once: each begins when the one before has ended."""
    running, most = [], []

    def slow(question, pictures, *_, **how):
        running.append(question)
        for word in "abc":
            most.append(len(running))
            time.sleep(0.1)
            yield word
        running.remove(question)
    url = opened({"stream": slow})
    with ThreadPoolExecutor() as pool:
        events = list(pool.map(partial(reply, url), map(user, ("one", "two", "three"))))
    assert all("event: complete" in text for text in events) and set(most) == {1} and len(most) == 9


@pytest.mark.slow
def test_the_command(model, tmp_path):
    pytest.importorskip("gradio", reason="the package gradio is not installed")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    command = start("generate.py", "--web --model", folder)
    try:
        url = next(line.split()[0] for line in command.stdout if "is the page" in line)
        with urllib.request.urlopen(url, timeout=60) as response:
            assert str(folder) in response.read().decode()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 0 and "Traceback" not in command.stdout.read()
    finally:
        command.kill()


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, opened):
    """-> a function that opens a page and goes there. The page may ask for nothing elsewhere."""
    asked, tabs = [], []

    def go(functions, **changes):
        tabs.append(browser.new_page())
        tabs[-1].set_default_timeout(PATIENCE)
        tabs[-1].on("request", lambda request: asked.append(request.url))
        url = opened(functions, **changes)
        tabs[-1].goto(url)
        tabs[-1].locator("textarea").first.wait_for()
        asked.append(url)
        return tabs[-1]
    yield go
    hosts = {url.split("/")[2] for url in asked if url.startswith("http")}
    for tab in tabs:
        tab.close()
    assert len(hosts) == len(tabs) and all(host.startswith("127.0.0.1:") for host in hosts)


def shown(elements, texts):
    """Waits until the elements say these texts, spaces aside"""
    from playwright.sync_api import expect
    expect(elements).to_have_text([" ".join(text.split()) for text in texts], timeout=PATIENCE)


def ask(tab, words, *files):
    if files:
        with tab.expect_response(lambda response: "/upload" in response.url):
            tab.locator("input[type=file]").first.set_input_files([str(file) for file in files])
        tab.locator(".thumbnail-item").nth(len(files) - 1).wait_for()
    tab.locator("textarea").first.fill(words)
    tab.get_by_label("Submit").click()


def expected(model, question, files, history=()):
    (words, _, _), = generate.answer(model, [(question, list(map(str, files)))], 6, history=history)
    assert words.isprintable() and words
    return words


BROKEN = re.compile("^broken.png: cannot be read as a picture")                               # without its folder
BOT = "[data-testid=bot]"


def test_chat(model, pictures, visit):
    tab = visit(functions_of(model, "stream", "attention", "as_seen"))
    assert tab.get_by_role("tab").all_inner_texts() == ["Chat"]
    ask(tab, QUESTION, pictures / "red.png", pictures / "blue.png")
    both = [pictures / "red.png", pictures / "blue.png"]
    first = expected(model, QUESTION, both)
    shown(tab.locator(BOT), [first])
    ask(tab, LATER)
    second = expected(model, LATER, both, [(QUESTION, 2, first)])
    shown(tab.locator(BOT), [first, second])
    tab.get_by_role("button", name="Show attention").click()
    shown(tab.locator(".caption-label"), ["all layers", "layer 0", "layer 1"] * 2)
    ask(tab, "what is this", pictures / "broken.png")
    tab.get_by_text(BROKEN).wait_for()
    ask(tab, QUESTION)                                    # goes on without the broken picture
    turns = [(QUESTION, 2, first), (LATER, 0, second)]
    shown(tab.locator(BOT).nth(2), [expected(model, QUESTION, both, turns)])
    assert not tab.locator("button[aria-label=Share]").filter(visible=True).count()
    refused = tab.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.blockedURI))
        fetch("http://127.0.0.2:9/x").then(done, () => setTimeout(done, 1000, "asked"))})""")
    assert refused == "http://127.0.0.2:9/x"              # the browser asks no other machine
    tab.get_by_role("button", name="Reset", exact=True).click()
    shown(tab.locator(BOT), [])
    ask(tab, QUESTION)
    shown(tab.locator(BOT), [expected(model, QUESTION, [])])


def test_draw_and_complete(model, pictures, visit):
    tab = visit(functions_of(model, "stream", "attention", "as_seen", "draw", "complete"), raw=True)
    assert tab.get_by_role("tab").all_inner_texts() == ["Describe", "Draw", "Complete"]
    ask(tab, "", pictures / "red.png")                    # without words
    (words, _, _), = generate.answer(model, [(None, [str(pictures / "red.png")])], 6)
    shown(tab.locator(BOT), [words])
    button, drawn = tab.get_by_role("button", name="Draw").locator("visible=true"), tab.locator("img[src*='image.']")
    for name, picture in (("Draw", None), ("Complete", pictures / "red.png")):
        tab.get_by_role("tab", name=name).click()
        button.click()
        tab.get_by_text("Nothing is given").wait_for()
        tab.get_by_label("Close").last.click()
        if picture:
            tab.locator("input[type=file]").last.set_input_files(str(picture))
            tab.get_by_label("Remove Image").wait_for()
        else:
            tab.get_by_label("What to draw").fill("a red square")
        button.click()
        drawn.locator("visible=true").wait_for()
        assert drawn.locator("visible=true").evaluate("image => image.naturalWidth") == 32
    tab.get_by_label("Remove Image").click()
    tab.locator("input[type=file]").last.set_input_files(str(pictures / "broken.png"))
    tab.get_by_label("Remove Image").wait_for()
    button.click()
    tab.get_by_text(BROKEN).wait_for()


def test_stop(visit):
    """What only answers has one tab and no attention; a stopped answer leaves the queue to the next."""
    closed = []

    def endless(question, pictures, *_, history, **how):
        try:
            for number in itertools.count() if question == "long" else range(1):
                yield f"{question} {number} {history}"
                time.sleep(0.05)
        finally:
            closed.append(question)
    tab = visit({"stream": lambda question, pictures, most, raw, history, **how: endless(
        question, pictures, history=len(history), **how)})
    assert tab.get_by_role("tab").all_inner_texts() == ["Chat"]
    assert not tab.get_by_role("button", name="Show attention").count()
    ask(tab, "long")
    tab.get_by_text(re.compile(r"long \d+ 0")).wait_for()
    tab.get_by_role("button", name="Stop").click()
    ask(tab, "short")
    tab.get_by_text("short 0 1").wait_for()
    assert closed[0] == "long"


def test_examples_of_the_demo(model, pictures, visit, tmp_path):
    questions = [{"image_id": n, "question": f"question {n}"} for n in range(12)]
    (tmp_path / "eval/images").mkdir(parents=True)
    for n in range(12):
        shutil.copy(pictures / "red.png", tmp_path / f"eval/images/{n:012d}.png")
    write_json(tmp_path / "eval/held_out_questions.json", {"questions": questions})
    tab = visit(functions_of(model, "stream"))
    tab.get_by_text("question 5").click()
    tab.locator(".thumbnail-item").wait_for()
    assert tab.locator("textarea").first.input_value() == "question 5"
