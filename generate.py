"""Ask, chat, draw, complete, look inside (Sec. 4.3, Fig. 3-7): everything a trained Libra does with a picture.

    python generate.py --image cat.jpg "What is unusual here?"          # without a question: a chat
    python generate.py --web                                            # a chat in the browser
    python generate.py --batch prompts.jsonl --out answers.jsonl        # lines {"image": FILE, "question": TEXT}
    python generate.py --model runs/toy/pretrain --draw "a red circle" --out circle.png     # text to image, E_c = 0
    python generate.py --model runs/toy/pretrain --complete cat.jpg --rows 4 --out rest.png          # upper rows stay
    python generate.py --reconstruct cat.jpg --out both.png             # the picture beside its reconstruction from ids
    python generate.py --image cat.jpg "What colour is it?" --attention maps.png        # attention of each layer
"""
import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from answering.batching import Rate, prepare_ahead, write_texts
from answering.page import serve
from answering.sampling import Sampler, Step, check_finite, encode_finite, next_tokens, place_in_image, tokens_allowed
from answering.terminal import chat
from common import cli
from common.entries import read_prompts, with_answer
from common.pictures import open_image
from common.plots import attention_difference, plot_attention
from common.weights import UserError, name_in_errors, read_json
from data import words_of
from llama import KVCache, linear
from model import Libra
from monolithic import open_model
from streams import IMAGE, TEXT, Streams
from text import IMG, expand_images
from tokenizer import ImageTokenizer, prepare, to_picture, to_rgb

# ---------------------------------------------------------------- token by token

@torch.inference_mode()
def generate(model, prompts, signal=None, max_new_tokens=128, graphs=True, **sampling):
    """Continue prompts, each (L, K) ids as text.expand_images makes them. Yields (B, K) tokens on the CPU.

    The place of a token, never its id, decides what may follow: after BOI and inside an image a code from each
    codebook's head; after G*G codes EOI; after EOI the newline; else text. It stops when the longest row has used all
    positions. For answers, which end, see answer_rows. sampling: see Sampler.
    """
    c, like = model.config, model.lm_head.weight
    if not len(prompts) or max_new_tokens < 1 or not min(len(prompt) for prompt in prompts):
        raise UserError("generate: at least one prompt with a token in it, and max_new_tokens of 1 or more")
    places = [place_in_image(prompt, c) for prompt in prompts]
    max_new_tokens = min(tokens_allowed(len(ids), place, max_new_tokens, c) for ids, place in zip(prompts, places))
    caches = new_caches(c, prompts, places, max_new_tokens, like)
    sampler, steps = Sampler(**sampling), {}
    hidden = prefill(model, Streams.from_ids(prompts, c).to(like.device), signal, caches)
    for number in range(max_new_tokens):
        tokens = next_tokens(model, hidden, places, sampler)
        yield tokens
        if number == max_new_tokens - 1:
            return
        places = [None if place in (None, c.image_tokens - 1) else place + 1 for place in places]
        in_image = tuple(place is not None for place in places)
        is_image = torch.tensor(in_image)
        if in_image not in steps:                         # one for each pattern of modalities among the rows
            streams = Streams.from_ids(list(tokens[:, None]), c).to(like.device)
            steps[in_image] = Step(partial(forward, model, streams, None, caches),
                                   [streams.text_ids, streams.image_ids], list(caches.values()), graphs)
        hidden = steps[in_image](tokens[~is_image, 0], tokens[is_image] - c.vocab_size)


def new_caches(config, prompts, places, max_new_tokens, like):
    """One cache for each modality that will query it: text after an image needs the keys only as text queries see
    them, so its cache is as large as a plain LLaMA's. Without a bridge both modalities see the same keys."""
    last_code = config.image_tokens - 2
    draws = [place is not None and place <= last_code for place in places]
    writes = [place is None or max_new_tokens > last_code + 1 - place for place in places]
    views = [TEXT] * any(writes) + [IMAGE] * any(draws) if config.use_bridge else [TEXT]
    length = max(map(len, prompts)) + max_new_tokens
    return {view: KVCache(config, len(prompts), length, like) for view in views}


def prefill(model, streams, signal, caches):
    """Read the prompts and fill the caches. -> the hidden state (B, D) of each row's last token"""
    hidden = forward(model, streams, signal, caches)
    for cache in caches.values():
        cache.advance(streams.lengths)
    return hidden[torch.arange(len(hidden)), torch.tensor(streams.lengths) - 1]


def forward(model, streams, signal, caches):
    """-> hidden states (B, L, D). Text alone goes through the plain LLaMA: no image follows that would query it."""
    if len(streams.image_ids):
        return streams.merge(*model.hidden(streams, signal, caches))
    return model.hidden_states(streams.padded_text(), caches[TEXT])


# ---------------------------------------------------------------- from pictures and words to answers and pictures

def prepare_picture(model, picture, n_pictures=1, square=True):
    """One picture of n in a prompt -> pixels (3, R, R); for other models than Libra (tiles, order), see monolithic/"""
    if isinstance(model, Libra):
        return prepare(open_image(picture), model.tokenizers.image.config.resolution, square)
    return model.config.prepare(open_image(picture), n_pictures)


def encode_images(model, images, square=True, zeroed=False):
    """Files, bytes, PIL images or their pixels -> codes (n, G*G, K) on the CPU, signal (n, G*G, C); for none, an empty
    list and None. zeroed: zeros instead, so that a model answers blind"""
    if not images:
        return [], None
    tokenizer, like = model.tokenizers.image, model.tokenizers.image.quant_conv.weight
    pixels = torch.stack([image if isinstance(image, torch.Tensor) else prepare_picture(model, image, square=square)
                          for image in images])
    codes, signal = encode_finite(tokenizer, pixels.to(like.device, like.dtype))
    return (codes.cpu().zero_(), signal.zero_()) if zeroed else (codes.cpu(), signal)


def encode_prompts(model, rows, raw=False, history=(), zeroed=False):
    """Rows as `answer` takes them -> prompts (L, K) each, signal; for other models than Libra ids, pictures"""
    text, prompts, is_libra = model.tokenizers.text, [], isinstance(model, Libra)
    shown = [picture for _, pictures in rows for picture in pictures]
    inputs = [Image.new("RGB", (64, 64))] * len(shown) if zeroed else shown
    if is_libra:
        codes, inputs = encode_images(model, shown, zeroed=zeroed)
        codes = iter(codes)
    for question, pictures in rows:
        new_pictures = len(pictures) - sum(n_images for _, n_images, _ in history)
        if raw or question is None:
            words = text.caption(question or "", end=False)[0] if pictures else text.plain(question or "")
            ids = text.start + [IMG, text.newline] * (len(pictures) - 1) + words[len(text.start):]
        else:
            ids, _ = text.chat([*history, (question, new_pictures, None)])
        if not ids:
            raise UserError("an empty prompt, and this model has no token to begin with: write something")
        if is_libra:
            ids = expand_images(ids, [0] * len(ids), [next(codes) for _ in pictures], model.config)[0]
        prompts.append(ids)
    return prompts, inputs


def read_rows(model, rows, max_new_tokens=1, raw=False, history=(), zeroed=False):
    """Rows as `answer` takes them -> hidden states (n, D) of last tokens, caches, how many tokens may follow each"""
    prompts, signal = encode_prompts(model, rows, raw, history, zeroed)
    if not isinstance(model, Libra):
        return model.read(prompts, signal)
    c, like = model.config, model.lm_head.weight
    room = [tokens_allowed(len(prompt), None, max_new_tokens, c) for prompt in prompts]
    cache = KVCache(c, len(prompts), max(map(len, prompts)), like)
    return prefill(model, Streams.from_ids(prompts, c).to(like.device), signal, {TEXT: cache}), [cache], room


def continue_rows(model, rows, n_rows=32, max_new_tokens=128, raw=False, history=(), zeroed=False, names=None,
                  rate=None, graphs=True, **sampling):
    """Rows as `answer` takes them, n_rows at a time. Yields (number of a row, its ids so far, whether they have
    ended). names: of the rows, for errors; rate: a Rate to add to; the rest: as `answer` and Sampler take it"""
    text, head = model.tokenizers.text, model.lm_head.weight
    step = lambda ids, caches: model.hidden_states(ids, *caches)
    if not isinstance(model, Libra):                      # only tokens of the text, so no <image>
        head, step = head[:text.vocab_size], lambda ids, caches: model.hidden(ids, None, caches)

    def prepared(row):
        return row[0], [prepare_picture(model, picture, len(row[1])) for picture in row[1]]

    def read(numbers, prepared_rows):
        try:
            return read_rows(model, [row.result() for row in prepared_rows], max_new_tokens, raw, history, zeroed)
        except UserError as error:
            if len(numbers) > 1:                          # read alone, the one that fails is named
                for number, row in zip(numbers, prepared_rows):
                    read([number], [row])
            raise UserError(f"{names[numbers[0]]}: {error}" if names else str(error)) from None

    prompts, n_rows = prepare_ahead(prepared, rows, n_rows), min(n_rows, len(rows))
    return write_texts(read, step, partial(linear, weight=head), prompts, n_rows, max_new_tokens, text.ends,
                       Sampler(**sampling), rate or Rate(model), graphs)


def answer_rows(model, rows, n_rows=32, max_new_tokens=128, out=None, **how):
    """Rows and how as continue_rows takes them. Yields (number of a row, what `answer` returns of it) as answers end"""
    text, written = model.tokenizers.text, ""
    for number, ids, ended in continue_rows(model, rows, n_rows, max_new_tokens, **how):
        if out:
            words = text.decode(ids)
            if ended or words.startswith(written) and not words.endswith("\ufffd"):          # not half a character
                print(words[len(written):], end="\n" * ended, file=out, flush=True)
                written = words
        if ended:
            yield number, (text.decode(ids), len(ids), ids[-1] not in text.ends and len(ids) < max_new_tokens)


def answer(model, rows, max_new_tokens=128, raw=False, out=None, **how):
    """rows: (question, pictures); a question None continues the pictures as in pretraining -> for each row its answer,
    the number of tokens, and whether it was cut because the positions end

    raw: no chat, the question itself is continued; out: a file for the words of one row as they come; how: history,
    earlier turns (question, number of pictures, answer), whose pictures come first in a row; zeroed: hide all pictures
    """
    answers = dict(answer_rows(model, rows, len(rows), max_new_tokens, out, raw=raw, **how))
    if out and answers[0][2]:
        print(f"(cut: all {model.config.max_position_embeddings} positions of the model are used)", file=sys.stderr)
    return [answers[number] for number in range(len(rows))]


def stream(model, question, pictures, max_new_tokens=128, raw=False, history=(), **how):
    """One row as `answer` takes it. Yields its words so far, after each token. UserError if the positions end first"""
    text = model.tokenizers.text
    for _, ids, _ in continue_rows(model, [(question, pictures)], 1, max_new_tokens, raw, history, **how):
        yield text.decode(ids).rstrip("\ufffd")                                               # half a character
    if ids[-1] not in text.ends and len(ids) < max_new_tokens:
        raise UserError(f"cut: all {model.config.max_position_embeddings} positions of the model are used")


def ask(model, images, question, max_new_tokens=128, **sampling):
    """images: a file, a PIL image, a list of them, or None -> the answer. sampling: as generate takes it"""
    if not isinstance(images, (list, tuple)):
        images = [] if images is None else [images]
    return answer(model, [(question, images)], max_new_tokens, **sampling)[0][0]


def draw(model, texts, **sampling):
    """`<s> text newline BOI`, the text cleaned as in training; then both codebooks place by place, E_c = 0 -> images"""
    blank = torch.zeros(model.config.image_feature_resolution ** 2, model.config.vision_codebook_num, dtype=torch.long)
    starts = [model.tokenizers.text.caption(" ".join(words_of(words)), image_first=False)[0] for words in texts]
    return finish_images(model, starts, blank.expand(len(texts), -1, -1), 0, **sampling)


def complete(model, images, rows, **sampling):
    """`<s> BOI` and the codes of the upper rows of real pictures; the rest is drawn (Fig. 3a), E_c = 0. Training draws
    after captions only, so a model trained to draw gets an empty caption. -> list of PIL images"""
    text, grid = model.tokenizers.text, model.config.image_feature_resolution
    if not 0 < rows < grid:
        raise UserError(f"--rows {rows}: a picture has {grid} rows of tokens, give 1 to {grid - 1}")
    start = text.start + [text.newline] * model.config.text_to_image + [IMG]
    codes, _ = encode_images(model, images, square=False)
    return finish_images(model, [start] * len(images), codes, rows * grid, **sampling)


def finish_images(model, starts, codes, n_given, **sampling):
    """starts: ids with IMG at the end; the first n_given of its codes are kept, the others drawn -> PIL images"""
    prompts = [expand_images(ids, [0] * len(ids), [image], model.config)[0][:len(ids) + n_given]
               for ids, image in zip(starts, codes)]
    tokens = generate(model, prompts, None, codes.shape[1] - n_given, **sampling)
    codes = torch.cat([codes[:, :n_given], torch.stack(list(tokens), dim=1) - model.config.vocab_size], dim=1)
    pictures = model.tokenizers.image.decode(codes.to(model.lm_head.weight.device))
    return [to_picture(rgb) for rgb in check_finite(pictures)]


def reconstruct(tokenizer, image):
    """-> the picture as the tokenizer sees it beside its reconstruction from ids (Fig. 2, 5), PSNR in dB"""
    pixels = prepare(open_image(image), tokenizer.config.resolution, square=False)[None].to(tokenizer.quant_conv.weight)
    drawn = check_finite(tokenizer.decode(encode_finite(tokenizer, pixels)[0])).float().clamp(-1, 1)
    rgb = to_rgb(pixels).float()
    psnr = float(10 * torch.log10(4 / (rgb - drawn).square().mean()))
    return to_picture(torch.cat([rgb[0], drawn[0]], dim=2)), psnr


@torch.no_grad()
def attention(model, question, images, raw=False, history=()):
    """Attention of the token before the answer, on the codes of n pictures -> (layers, 1, heads, n*G*G)"""
    (ids,), signal = encode_prompts(model, [(question, images)], raw, history)
    maps, layers = [], [block.self_attn for block in model.model.layers]
    try:                                                  # it may be too long for the positions, or for the memory
        for layer in layers:
            layer.recorded_maps = maps
        model.hidden(Streams.from_ids([ids], model.config).to(model.lm_head.weight.device), signal)
    finally:
        for layer in layers:
            layer.recorded_maps = None
    codes = ids[:, 0] - model.config.vocab_size
    is_code = (codes >= 0) & (codes < model.config.n_codes)                                   # neither BOI nor EOI
    return torch.stack([m[:, :, -1, is_code] for m in maps]).float().cpu()


def as_seen(model, image):
    """-> the picture as CLIP sees it, a square with borders, as a PIL image"""
    return to_picture(to_rgb(prepare(open_image(image), model.tokenizers.image.config.resolution)))


# ---------------------------------------------------------------- the command line

def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("question", nargs="?", help="what to ask; without it a chat (/image FILE, /reset, Ctrl-D)")
    g = parser.add_argument_group("what to do")
    g.add_argument("--model", metavar="DIR", default=cli.TOY / "sft", help="model folder, ours or published")
    g.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture to ask about; repeatable")
    g.add_argument("--batch", metavar="FILE", help="JSON lines with a question and, if any, an image; --out gets "
                   "them with answers (an `answer` that is there becomes `given_answer`)")
    g.add_argument("--caption", metavar="FILE", help="describe a picture as pretraining does, without a template")
    g.add_argument("--draw", metavar="TEXT", help="draw what a text says")
    g.add_argument("--complete", metavar="FILE", help="draw a picture's lower part anew")
    g.add_argument("--rows", type=cli.NATURAL, default=0, help="upper rows of tokens that --complete keeps; 0: half")
    g.add_argument("--reconstruct", metavar="FILE", help="a picture beside its reconstruction from ids, and the PSNR")
    g.add_argument("--attention", type=cli.writable_file, metavar="FILE", help="with one --image and a question: "
                   "heat maps of each layer's attention on the picture before the answer, and Fig. 7's differences")
    g.add_argument("--web", action="store_true", default=None, help="open a page to chat in, and to draw in with a "
                   "pretrained model; needs the package gradio")
    g.add_argument("--host", help="address of --web, which has no password; None: 127.0.0.1, only for this machine")
    g.add_argument("--port", type=cli.bounded(int, 1, 65535), help="of --web; None: 7860, or the next one that is free")
    g.add_argument("--out", type=cli.writable_file, metavar="FILE", help="None: out.png, or answers.jsonl for --batch")
    g.add_argument("--json", action="store_true", help="print the answer as one line of JSON")
    g.add_argument("--raw", action="store_true", help="no template: the question itself is continued (base models)")
    g.add_argument("--batch-size", type=cli.POSITIVE, help="prompts of --batch answered at a time; None: 16")
    g = parser.add_argument_group("how")
    g.add_argument("--max-new-tokens", type=cli.POSITIVE, default=256, help="most tokens of an answer")
    g.add_argument("--temperature", type=cli.bounded(float, 0), help="0: greedy; None: 0 for text, 1 for pictures")
    g.add_argument("--top-k", type=cli.NATURAL, default=0, help="sample from the k most likely; 0: from all")
    g.add_argument("--top-p", type=cli.bounded(float, above=0, most=1), default=1.0, help="sample from the likeliest, "
                   "which together have this probability")
    g.add_argument("--seed", type=cli.SEED, default=0, help="of sampling")
    cli.add_device_options(g)
    return parser


def save(write, path, about=""):
    """write: Image.save or Figure.savefig, which choose the format by the file's ending"""
    try:
        write(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    print(path + about)


def main():
    args = options().parse_args()
    check_options(args)
    args.out = args.out or ("answers.jsonl" if args.batch is not None else "out.png")
    if os.path.realpath(args.out) in map(os.path.realpath, filter(None, (args.batch, args.complete, args.reconstruct))):
        raise UserError(f"{args.out} is read, and would be overwritten: give another --out")
    prompts = read_prompts(args.batch) if args.batch is not None else []
    device = cli.check_device(args.device)
    model = (ImageTokenizer.from_pretrained(cli.require_path(args.model), device) if args.reconstruct is not None else
             open_model(args.model, device, args.dtype, args.weights, args.save))
    if not isinstance(model, Libra) and any(x is not None for x in (args.draw, args.complete, args.attention)):
        raise UserError(f"--model {args.model}: a {type(model).__name__} only answers; pictures and maps need a Libra")
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
                "graphs": not args.no_graphs}
    picture = None
    if args.reconstruct is not None:
        picture, psnr = reconstruct(model, args.reconstruct)
        print(f"PSNR {psnr:.2f} dB")
    elif args.draw is not None:
        picture, = draw(model, [args.draw], **sampling)
    elif args.complete is not None:
        rows = args.rows or model.config.image_feature_resolution // 2
        picture, = complete(model, [args.complete], rows, **sampling)
    elif args.batch is not None:
        answer_file(model, args, prompts, sampling)
    elif args.caption is not None:
        answer(model, [(None, [args.caption])], args.max_new_tokens, out=sys.stdout, **sampling)
    elif args.web:
        open_page(model, args, sampling)
    elif args.question is None:
        chat(partial(answer, model, max_new_tokens=args.max_new_tokens, out=sys.stdout, **sampling), args.image)
    else:
        answer_question(model, args, sampling)
    if picture:
        save(picture.save, args.out, f": {picture.width} x {picture.height} pixels")


def check_options(args):
    """Refuse options that do not go together or that the job does not use; fill in the default temperature."""
    names = ("draw", "complete", "reconstruct", "batch", "caption", "web")
    jobs = [f"--{name}" for name in names if getattr(args, name) is not None]
    jobs += ["a question"] if args.question is not None else [] if jobs else ["a chat"]
    if len(jobs) > 1:
        raise UserError(f"one thing at a time: {' and '.join(jobs)}")
    all_but_reconstruct = ("a question", "a chat", "--draw", "--complete", "--batch", "--caption", "--web")
    used_by = {"out": ("--draw", "--complete", "--reconstruct", "--batch"), "image": ("a question", "a chat"),
               "json": ("a question",), "attention": ("a question",), "raw": ("a question", "--batch", "--web"),
               "rows": ("--complete",), "batch_size": ("--batch",), "host": ("--web",), "port": ("--web",),
               **dict.fromkeys(("temperature", "weights", "save"), all_but_reconstruct)}
    for name, users in used_by.items():
        if getattr(args, name) and jobs[0] not in users:
            raise UserError(f"--{name.replace('_', '-')} belongs to {' or '.join(users)}, not to {jobs[0]}")
    if args.attention and (len(args.image) != 1 or args.json or args.raw):
        raise UserError(f"--attention takes one --image, {len(args.image)} are given, and neither --json nor --raw")
    if args.question is not None and os.path.isfile(args.question):
        raise UserError(f"the question is the name of a file, {args.question}: several pictures take an --image each")
    if args.temperature is None:
        args.temperature = 1.0 if args.draw is not None or args.complete is not None else 0.0
    if not args.temperature and (args.top_k or args.top_p < 1 or args.seed):
        raise UserError("--top-k, --top-p and --seed are for sampling: give a --temperature above 0 with them")


def answer_question(model, args, sampling):
    began, rate = time.perf_counter(), Rate(model)
    (words, _, cut), = answer(model, [(args.question, args.image)], args.max_new_tokens, args.raw,
                              out=None if args.json else sys.stdout, rate=rate, **sampling)
    if args.json:
        print(json.dumps({"question": args.question, "images": args.image, "answer": words, "cut": cut,
                          "seconds": round(time.perf_counter() - began, 3)}, ensure_ascii=False))
    print(rate, file=sys.stderr)
    if args.attention:
        show_attention(model, args.question, args.image[0], args.attention)


def show_attention(model, question, image, path):
    """Print the differences of Fig. 7 layer by layer; save heat maps and a plot of them."""
    maps = attention(model, question, [image])
    cross, inner = (x.tolist() for x in attention_difference(maps))
    print("layer  cross-layer  inner-layer")
    for layer, (a, b) in enumerate(zip(cross, inner)):
        print(f"{layer:5}  {a:11.4f}  {b:11.4f}")
    save(plot_attention(as_seen(model, image), maps, cross, inner).savefig, path)


def answer_file(model, args, prompts, sampling):
    """Entries of a file -> a file of the same entries with answers, in their order"""
    batch_size, cut_lines, rate = args.batch_size or 16, [], Rate(model)
    with name_in_errors(args.out), open(args.out, "w", encoding="utf-8", errors="backslashreplace") as out:
        for start in tqdm(range(0, len(prompts), batch_size), desc="batches"):
            numbers, asked = zip(*prompts[start:start + batch_size])
            rows = [(entry["question"], [entry["image"]] if entry.get("image") else []) for entry in asked]
            names = [f"{args.batch}, line {number}" for number in numbers]
            answers = answer(model, rows, args.max_new_tokens, args.raw, rate=rate, names=names,
                             **sampling | {"seed": args.seed + start})
            for number, entry, (words, _, cut) in zip(numbers, asked, answers):
                out.write(json.dumps(with_answer(entry, words), ensure_ascii=False) + "\n")
                cut_lines += [number] * cut
    print(f"{args.out}: {len(prompts)} answers")
    print(rate, file=sys.stderr)
    if cut_lines:
        print(f"(cut: all positions are used: lines {', '.join(map(str, cut_lines[:9]))})", file=sys.stderr)


def open_page(model, args, sampling):
    """The page with what this model can do. A pretrained Libra, whose recipe.json names a LLaMA, draws and describes,
    and a tuned one chats. The authors' folders have no recipe.json: they chat and draw. Other systems only chat."""
    path, is_libra = Path(args.model) / "recipe.json", isinstance(model, Libra)
    recipe = read_json(path) if path.is_file() else {}
    args.raw = args.raw or is_libra and "llm" in recipe
    draws = is_libra and (not recipe or "llm" in recipe)
    jobs = [stream] + [attention, as_seen] * is_libra + [draw, complete] * draws
    serve({job.__name__: partial(job, model) for job in jobs}, args, sampling,
          grid=model.config.image_feature_resolution if is_libra else None)


if __name__ == "__main__":
    cli.run(main)
