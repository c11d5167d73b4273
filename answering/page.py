"""The page of `generate.py --web`: a chat about pictures and, where the model can, drawing and completing them."""
import functools
import itertools
import os
import re
from pathlib import Path

from common.cli import explain
from common.plots import overlay
from common.weights import UserError, inside, read_json

QUEUE = {"concurrency_id": "model", "concurrency_limit": 1}           # all requests wait for the one model in one queue
CSS = """button[aria-label=Share], button[aria-label=Clear] {display: none}
.image-frame img {width: 100%; height: 100%; object-fit: contain}"""                          # small ones are enlarged
CSP = ("<meta http-equiv='Content-Security-Policy' content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: "
       "blob:\">")                                        # nothing from, and nothing to, other machines


def serve(functions, args, sampling, grid=None):
    """Open the page at --host and --port until Ctrl-C. functions: of generate.py without their model, by name: stream;
    for a Libra attention and as_seen, and if it can draw, draw and complete. grid: rows of tokens of its pictures.
    sampling: see Sampler; each request takes the next seed. args.raw: pictures are described, not asked about"""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"      # read when it is imported
    try:
        import gradio as gr
    except ImportError:
        raise UserError("--web needs the package gradio, which is not installed: pip install gradio") from None
    seeds = itertools.count(args.seed)

    def how(temperature):
        return sampling | {"temperature": float(temperature), "seed": next(seeds)}

    with gr.Blocks(title=f"Libra: {args.model}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"## {args.model}")
        with gr.Tab("Describe" if args.raw else "Chat"):
            chat_tab(gr, functions, args, how)
        if "draw" in functions:
            with gr.Tab("Draw"):
                words = gr.Textbox(label="What to draw", placeholder="a large red circle in the top left", render=False)
                picture_tab(gr, words, lambda text, _, t: functions["draw"]([text], **how(t))[0], args)
            with gr.Tab("Complete"):
                given = gr.Image(label="Picture", height=240, sources=["upload"], render=False)

                def complete(image, rows, temperature):   # of uploads only: gradio lets any path through
                    path = inside(given.GRADIO_CACHE, os.path.relpath(image["path"], given.GRADIO_CACHE))
                    return functions["complete"]([path], int(rows), **how(temperature))[0]
                picture_tab(gr, given, complete, args, grid)
    _, url, _ = page.queue(max_size=64).launch(
        server_name=args.host or "127.0.0.1", server_port=args.port, share=False, ssr_mode=False, max_file_size="20mb",
        footer_links=[], run_history=False, enable_monitoring=False, css=CSS, head=CSP, quiet=True,
        prevent_thread_lock=True)
    print(f"{url} is the page; Ctrl-C closes it", flush=True)
    page.block_thread()


def chat_tab(gr, functions, args, how):
    def add(written, messages):
        if not (written["text"].strip() or args.raw and written["files"]):
            raise gr.Error("Write a question first.", print_exception=False)
        content = [{"path": file} for file in written["files"]] + [written["text"]]
        return None, [*messages, {"role": "user", "content": content}]

    def reply(messages, temperature):
        question, pictures, history = last_prompt(messages, args.raw)
        for words in functions["stream"](question, pictures, args.max_new_tokens, args.raw, history,
                                         **how(temperature)):
            yield [*messages, {"role": "assistant", "content": words}]

    def look(messages):
        question, pictures, history = last_prompt(messages, args.raw)
        if not pictures:
            raise UserError("There is no answer about a picture yet.")
        maps = functions["attention"](question, pictures, args.raw, history).mean(dim=(1, 2))  # (layers, n*G*G)
        maps = maps.unflatten(1, (len(pictures), round((maps.shape[1] / len(pictures)) ** 0.5), -1))
        shown = [(overlay(functions["as_seen"](picture), heat), f"layer {layer - 1}" if layer else "all layers")
                 for picture, heats in zip(pictures, maps.unbind(1))
                 for layer, heat in enumerate([heats.mean(0), *heats])]
        yield gr.Gallery(shown, visible=True)

    with gr.Row():
        with gr.Column(scale=4):
            chat = gr.Chatbot(height=400, show_label=False, render_markdown=False, buttons=[],
                              group_consecutive_messages=False)
            written = gr.MultimodalTextbox(
                file_types=["image"], file_count="multiple", sources=["upload"], show_label=False,
                placeholder="Add a picture and send it" if args.raw else "Add pictures and ask about them")
        with gr.Column(scale=1, min_width=180):
            temperature = gr.Slider(0, 2, args.temperature, step=0.05, label="Temperature")
            stop, reset = gr.Button("Stop"), gr.Button("Reset")
            look_button = gr.Button("Show attention", visible="attention" in functions)
    maps = gr.Gallery(show_label=False, columns=5, height="max-content", buttons=["fullscreen"], visible=False)
    if examples := demo_examples(args):
        gr.Examples(examples, written)
    running = written.submit(add, [written, chat], [written, chat], queue=False).success(
        one_sentence(gr, reply), [chat, temperature], chat, show_progress="hidden", **QUEUE)
    stop.click(None, cancels=[running])
    reset.click(lambda: ([], None, gr.Gallery(visible=False)), None, [chat, written, maps], cancels=[running],
                queue=False)
    if "attention" in functions:
        look_button.click(one_sentence(gr, look), chat, maps, **QUEUE)


def picture_tab(gr, given, function, args, grid=0):
    """function(value of the component `given`, rows, temperature) -> a picture. grid: 0 where no rows are given"""
    def run(value, *settings):
        if not value:
            raise UserError(f"{given.label}? Nothing is given.")
        yield function(value, *settings)

    with gr.Row():
        with gr.Column():
            given.render()
            rows = gr.Slider(1, max(2, grid - 1), grid // 2, step=1, label="Rows of it to keep", visible=grid > 0)
            temperature = gr.Slider(0, 2, args.temperature or 1, step=0.05, label="Temperature")
            button = gr.Button("Draw", variant="primary")
        drawn = gr.Image(label="Drawn", height=400, buttons=["download", "fullscreen"])
    button.click(one_sentence(gr, run), [given, rows, temperature], drawn, preprocess=False, **QUEUE)


def last_prompt(messages, raw):
    """The messages of gr.Chatbot -> question, pictures of all turns, history, as generate.answer takes them. Turns that
    failed, or were stopped before their first word, are left out with their pictures. raw: only the last turn"""
    turns = []
    for message in messages:
        words = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        if message["role"] == "user":
            turns = [turn for turn in turns if turn[2] is not None]
            turns.append((words, [part["file"]["path"] for part in message["content"] if part["type"] == "file"], None))
        else:
            turns[-1] = (*turns[-1][:2], words)
    *earlier, (question, pictures, _) = (turns[-1:] if raw else turns) or [("", [], None)]
    history = [(asked, len(files), answer) for asked, files, answer in earlier]
    return question, [file for _, files, _ in earlier for file in files] + pictures, history


def one_sentence(gr, function):
    """-> the generator function, whose errors become a sentence in the page that names uploads without their folder.
    What is no user's mistake goes to the terminal too"""
    @functools.wraps(function)
    def guarded(*inputs):
        try:
            yield from function(*inputs)
        except Exception as error:  # noqa: BLE001
            words = re.sub(r"[^\s']*/[0-9a-f]{64}/", "", explain(error)[0].removeprefix("error: "))
            raise gr.Error(words, duration=None, print_exception=not isinstance(error, UserError)) from error
    return guarded


def demo_examples(args):
    """-> a question of each kind with its picture, if the model lies among the demo's files"""
    folder = Path(args.model).parent / "eval"
    path = folder / "held_out_questions.json"
    return [[{"text": "" if args.raw else entry["question"],
              "files": [str(folder / f"images/{entry['image_id']:012d}.png")]}]
            for entry in (read_json(path)["questions"][2:14:3] if path.is_file() else ())]
