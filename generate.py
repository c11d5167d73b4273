"""Look, talk, draw (Sec. 4.3, Fig. 3, 5, 6): everything a trained Libra does with a picture.

    python generate.py --image cat.jpg "What is unusual here?"          # without a question: a chat
    python generate.py --batch prompts.jsonl --out answers.jsonl        # lines {"image": FILE, "question": TEXT}
    python generate.py --draw "a red bus" --out bus.png                 # text to image, E_c = 0
    python generate.py --complete cat.jpg --rows 8 --out completed.png  # the upper rows are given, the rest is drawn
    python generate.py --reconstruct cat.jpg --out both.png             # the picture beside what its ids hold of it
    python generate.py --image cat.jpg "What colour is it?" --attention maps.png        # where each layer looks

--model is a folder of sft.py or pretrain.py, or a published one; the toy world's by default.
"""
import argparse
import json
import os
import re
import sys
import time

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from command import DTYPES, NATURAL, POSITIVE, SEED, TOY, Help, bounded, need, run, target, usable
from generation import generate, see
from model import Libra
from streams import Streams
from text import IMG, spell_out
from tokenizer import ImageTokenizer, open_image, prepare, to_picture, to_rgb
from weights import UserError, read_text


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("question", nargs="?", help="what to ask; without it a chat (/image FILE, /reset, Ctrl-D)")
    g = parser.add_argument_group("what to do")
    g.add_argument("--model", metavar="DIR", default=TOY / "sft", help="model folder")
    g.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture to ask about; repeatable")
    g.add_argument("--batch", metavar="FILE", help="JSON lines with question and perhaps image, answered in batches; "
                   "to --out, one line each with an answer")
    g.add_argument("--caption", metavar="FILE", help="describe a picture as pretraining learned to, without a template")
    g.add_argument("--draw", metavar="TEXT", help="draw what a text says")
    g.add_argument("--complete", metavar="FILE", help="draw a picture's lower part anew")
    g.add_argument("--rows", type=NATURAL, default=0,
                   help="rows of the picture's tokens that are given; 0: half of them")
    g.add_argument("--reconstruct", metavar="FILE", help="a picture beside its reconstruction from ids, and the PSNR")
    g.add_argument("--attention", type=target, metavar="FILE",
                   help="with one --image and a question: heat maps of each layer's "
                   "attention on the picture as the answer begins, and how layers and heads differ (Fig. 4, 7)")
    g.add_argument("--out", type=target, metavar="FILE",
                   help="where a drawn picture or the answers of --batch go; None: out.png, answers.jsonl")
    g.add_argument("--json", action="store_true", help="print the answer as one line of JSON")
    g.add_argument("--raw", action="store_true", help="no template: the question itself is continued (base models)")
    g.add_argument("--verbose", action="store_true", help="print tokens/s, and what reading the weights allows")
    g.add_argument("--batch-size", type=POSITIVE, help="prompts of --batch answered at a time; None: 16")
    g = parser.add_argument_group("how")
    g.add_argument("--max-new-tokens", type=POSITIVE, default=256, help="most tokens of an answer")
    g.add_argument("--temperature", type=bounded(float, 0), default=None,
                   help="0 is greedy; None: 0 for text, 1 for pictures")
    g.add_argument("--top-k", type=NATURAL, default=0, help="sample from the k most likely; 0: from all")
    g.add_argument("--top-p", type=bounded(float, above=0, most=1), default=1.0,
                   help="sample from the most likely that make up this share")
    g.add_argument("--seed", type=SEED, default=0, help="of sampling")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--dtype", choices=list(DTYPES), help="None: bfloat16 on a GPU, else float32")
    return parser


def main():
    args = options().parse_args()
    jobs = [name for name in ("draw", "complete", "reconstruct", "batch", "caption")
            if getattr(args, name) is not None]
    refuse(args, jobs)
    args.batch_size = args.batch_size or 16
    args.out = args.out or ("answers.jsonl" if args.batch is not None else "out.png")
    for path in (args.batch, args.complete, args.reconstruct):
        if path is not None and os.path.realpath(path) == os.path.realpath(args.out):
            raise UserError(f"{path} is read, and would be written over: give another --out")
    if args.temperature is None:
        args.temperature = 1.0 if args.draw is not None or args.complete is not None else 0.0
    if not args.temperature and (args.top_k or args.top_p < 1 or args.seed):
        raise UserError("--top-k, --top-p and --seed are for sampling: give a --temperature above 0 with them")
    device = usable(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if args.reconstruct is not None:
        picture, psnr = reconstruct(ImageTokenizer.from_pretrained(need(args.model), dtype, device), args.reconstruct)
        save(picture, args.out)
        return print(f"PSNR {psnr:.2f} dB")
    lines = read_prompts(args.batch) if args.batch is not None else []
    model = Libra.from_pretrained(need(args.model), dtype=dtype, device=device).eval()
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if args.draw is not None:
        save(draw(model, [args.draw], **sampling)[0], args.out)
    elif args.complete is not None:
        save(complete(model, [args.complete], args.rows or model.config.image_feature_resolution // 2, **sampling)[0],
             args.out)
    elif args.batch is not None:
        batch(model, args, lines, sampling)
    elif args.caption is not None:
        print(caption(model, [args.caption], args.max_new_tokens, **sampling)[0])
    elif args.question is None:
        chat(model, args.image, args.max_new_tokens, **sampling)
    else:
        answer(model, args, sampling)
        if args.attention:
            show_attention(model, args.question, args.image[0], args.attention)


def refuse(args, jobs):
    """Options that do not go together, or that the job at hand would not heed"""
    if len(jobs) + (args.question is not None) > 1:
        raise UserError("one thing at a time: " + ", ".join("--" + name for name in jobs)
                        + " and a question" * (args.question is not None))
    if args.attention and (args.question is None or len(args.image) != 1):
        raise UserError(f"--attention looks at one --image while a question is answered; there are {len(args.image)} "
                        f"images and {'no' if args.question is None else 'a'} question")
    if args.raw and (args.attention or args.question is None and args.batch is None):
        raise UserError("--raw continues a question, or those of --batch, without a template; a chat and --attention "
                        "need one")
    job = f"--{jobs[0]}" if jobs else "a question" if args.question is not None else "a chat"
    heeded = {"out": ("--draw", "--complete", "--reconstruct", "--batch"), "image": ("a question", "a chat"),
              "json": ("a question",), "rows": ("--complete",), "verbose": ("a question",), "batch_size": ("--batch",),
              "temperature": ("a question", "a chat", "--draw", "--complete", "--batch", "--caption")}
    for name, by in heeded.items():
        if getattr(args, name) and job not in by:
            raise UserError(f"--{name.replace('_', '-')} belongs to {' or '.join(by)}, not to {job}")
    if args.json and args.attention:
        raise UserError("--json prints the answer alone; --attention prints a table: give one of them")
    if args.question is not None and os.path.isfile(args.question):
        raise UserError(f"the question is the name of a file, {args.question}: several pictures take an --image each")


def save(picture, path):
    try:
        picture.save(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    print(f"{path}: {picture.width} x {picture.height} pixels")


def answer(model, args, sampling):
    began = time.perf_counter()
    text, tokens = stream(model, prompt_of(model, [(args.question, len(args.image), None)], args.raw), args.image,
                          args.max_new_tokens, None if args.json else sys.stdout, **sampling)
    seconds = time.perf_counter() - began
    if args.json:
        print(json.dumps({"question": args.question, "images": args.image, "answer": text,
                          "seconds": round(seconds, 3)}, ensure_ascii=False))
    if args.verbose:
        table = set() if model.config.tie_word_embeddings else {model.model.embed_tokens}     # of it a row is read
        size = sum(p.nbytes for module in set(model.llama()) - table for p in module.parameters())
        print(f"{tokens} tokens in {seconds:.2f} s with the prompt: {tokens / seconds:.1f} a second. A token of text "
              f"reads the LLaMA's {size / 1e9:.3f} GB once: memory of B GB/s allows B / {size / 1e9:.3f} a second")


def prompt_of(model, turns, raw=False):
    """-> ids, counted of a chat's turns, or of the last question's words alone behind its pictures"""
    text = model.tokenizers.text
    if not raw:
        return text.chat(turns)
    words, images, _ = turns[-1]
    ids = [text.bos] + [IMG, text.newline] * images + text.plain(words)[1:]
    return ids, [0] * len(ids)


def read_prompts(path):
    """-> [(number of the line, what stands in it)]"""
    lines = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry["question"] + "", entry.get("image", "") + ""
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}, line {number}: expected {{"question": TEXT}}, perhaps with "image": FILE '
                            f"({error!r})") from None
        if "image" in entry and not os.path.isfile(entry["image"]):
            raise UserError(f"{path}, line {number}: {entry['image']}: no such file")
        lines.append((number, entry))
    return lines


def batch(model, args, lines, sampling):
    """Prompts of a file -> a file of answers, in their order, with all that stood in the line"""
    text = model.tokenizers.text
    with open(args.out, "w", encoding="utf-8", errors="replace") as out:
        for start in tqdm(range(0, len(lines), args.batch_size), desc="batches"):
            numbers, some = zip(*lines[start:start + args.batch_size])
            try:
                codes, signal = see(model, [entry["image"] for entry in some if "image" in entry])
                codes, prompts = iter(codes), []
                for entry in some:
                    turn = [(entry["question"], int("image" in entry), None)]
                    prompts.append(spell_out(*prompt_of(model, turn, args.raw),
                                             [next(codes) for _ in range(turn[0][1])], model.config)[0])
                rows = list(generate(model, prompts, signal, args.max_new_tokens, text.eos,
                                     **sampling | {"seed": args.seed + start}))
            except UserError as error:
                raise UserError(f"{args.batch}, lines {numbers[0]} to {numbers[-1]}: {error}") from None
            for entry, row in zip(some, torch.stack(rows, dim=1)[..., 0].tolist()):
                out.write(json.dumps(entry | {"answer": text.decode(row)}, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(lines)} answers")


@torch.no_grad()
def attention(model, question, image):
    """Attention of the row that predicts the answer's first piece, on the picture's codes (layers, 1, heads, G*G)"""
    codes, signal = see(model, [image])
    ids, counted = spell_out(*model.tokenizers.text.chat([(question, 1, None)]), codes, model.config)
    streams = Streams.of([ids], model.config).to(model.lm_head.weight.device)
    blocks, maps = [block.self_attn for block in model.model.layers], []
    for block in blocks:
        block.record = maps
    model.hidden(streams, signal)
    for block in blocks:
        block.record = None
    at = (ids[:, 0] >= model.config.vocab_size).nonzero()[1:-1, 0]                            # neither BOI nor EOI
    return torch.stack([m[:, :, -1, at] for m in maps]).float().cpu()


def show_attention(model, question, image, path, side=168, wide=4):
    """Print the differences of Fig. 7 layer by layer; save heat maps and their plot"""
    maps = attention(model, question, image)
    cross, inner = (x.tolist() for x in attention_difference(maps))
    print("layer  cross-layer  inner-layer")
    for layer, (a, b) in enumerate(zip(cross, inner)):
        print(f"{layer:5}  {a:11.4f}  {b:11.4f}")
    tokenizer, layers, grid = model.tokenizers.image, len(maps), model.config.image_feature_resolution
    seen = to_picture(to_rgb(prepare(open_image(image), tokenizer.config.resolution))).resize((side, side))
    rows = -(-layers // wide)
    page = Image.new("RGB", (wide * side, rows * (side + 18) + 160), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for layer, heat in enumerate(maps.mean(dim=(1, 2))):
        x, y = layer % wide * side, layer // wide * (side + 18)
        cover = Image.fromarray((heat / heat.max() * 220).byte().view(grid, grid).numpy())
        page.paste(Image.composite(Image.new("RGB", seen.size, "red"), seen, cover.resize(seen.size)), (x, y))
        pen.text((x + 4, y + side + 2), f"layer {layer}, most {heat.max():.3f}", "black", font)
    top = rows * (side + 18) + 12
    for values, ink, name, dx in ((cross, "blue", "cross-layer difference", 0), (inner, "green", "inner-layer", 180)):
        points = [(20 + i * (wide * side - 40) / max(1, layers - 1), top + 130 - 110 * v / max(*cross, *inner))
                  for i, v in enumerate(values)]
        pen.line(points, ink, 2)
        pen.text((20 + dx, top), name, ink, font)
    save(page, path)


def stream(model, prompt, images, max_new_tokens, out=None, **sampling):
    """Continue a prompt (ids, counted); `out` gets the words as they come. -> the answer, its number of tokens"""
    text = model.tokenizers.text
    codes, signal = see(model, images)
    prompt = spell_out(*prompt, codes, model.config)[0]
    ids, shown = [], ""
    for token in generate(model, [prompt], signal, max_new_tokens, text.eos, **sampling):
        ids.append(int(token[0, 0]))
        words = text.decode(ids)
        if out and words.startswith(shown) and not words.endswith("\ufffd"):                  # half a character waits
            out.write(words[len(shown):])
            out.flush()
            shown = words
    words = text.decode(ids)
    if out:
        out.write(words[len(shown):] + "\n")
    return words, len(ids)


def chat(model, images, max_new_tokens, **sampling):
    """Turns with history, as in Fig. 6"""
    turns, shown, waiting = [], [], list(images)
    for path in images:
        open_image(path)                                  # what cannot be shown is said now
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print("Ask. /image FILE shows a picture, /reset forgets all, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/reset":
            turns, shown, waiting = [], [], []
        elif line.startswith("/image "):
            try:
                open_image(path := line.removeprefix("/image ").strip())
                waiting.append(path)
            except UserError as error:
                print(error)
        elif re.fullmatch(r"/\w*", line):
            print("There is /image FILE and /reset.")
        elif line:
            try:
                asked = turns + [(line, len(waiting), None)]
                words, _ = stream(model, prompt_of(model, asked), shown + waiting, max_new_tokens, sys.stdout,
                                  **sampling)
                turns, shown, waiting = asked[:-1] + [(*asked[-1][:2], words)], shown + waiting, []
            except UserError as error:
                print(f"{error} (/reset begins anew)")
            except KeyboardInterrupt:                     # enough of this answer
                print()


def caption(model, images, max_new_tokens=64, **sampling):
    """Continue `<s> [IMG] newline` for each picture: what pretraining learned. -> list of texts"""
    text, rows = model.tokenizers.text, []
    codes, signal = see(model, images)
    prompts = [spell_out([text.bos, IMG, text.newline], [0] * 3, [c], model.config)[0] for c in codes]
    for token in generate(model, prompts, signal, max_new_tokens, text.eos, **sampling):
        rows.append(token[:, 0])
    return [text.decode(row) for row in torch.stack(rows, dim=1).tolist()]


def draw(model, texts, **sampling):
    """`<s> text newline BOI`, then both codebooks place by place, E_c = 0 (Sec. 4.3). -> list of PIL images"""
    blank = torch.zeros(model.config.image_feature_resolution ** 2, model.config.vision_codebook_num, dtype=torch.long)
    prompts = []
    for words in texts:
        ids, counted = model.tokenizers.text.caption(words, image_first=False)
        prompts.append(spell_out(ids, counted, [blank], model.config)[0][:1 - model.config.image_tokens])
    return [to_picture(rgb) for rgb in finish(model, prompts, **sampling)]


def complete(model, images, rows, **sampling):
    """`<s> BOI` and the codes of the upper rows of real pictures; the rest is drawn (Fig. 3a), E_c = 0. A model that
    learned to draw has met that only behind a caption: there an empty one stands. -> list of PIL images"""
    grid = model.config.image_feature_resolution
    if not 0 < rows < grid:
        raise UserError(f"--rows {rows}: a picture has {grid} rows of tokens, give 1 to {grid - 1}")
    codes, _ = see(model, images, square=False)
    text = model.tokenizers.text
    start = [text.bos] + [text.newline] * model.config.text_to_image + [IMG]
    given = len(start) + rows * grid
    prompts = [spell_out(start, [0] * len(start), [c], model.config)[0][:given] for c in codes]
    return [to_picture(rgb) for rgb in finish(model, prompts, **sampling)]


def finish(model, prompts, **sampling):
    """Prompts that end inside an image, at the same place -> pixels (B, 3, R, R)"""
    c, whole = model.config, model.config.image_feature_resolution ** 2
    given = [prompt[prompt[:, 0] >= c.vocab_size][1:] for prompt in prompts]                  # codes behind BOI
    drawn = torch.stack(list(generate(model, prompts, None, whole - len(given[0]), **sampling)), dim=1)
    codes = torch.cat([torch.stack(given), drawn], dim=1) - c.vocab_size                      # (B, G*G, K)
    return model.tokenizers.image.decode(codes.to(model.lm_head.weight.device))


def reconstruct(tokenizer, image):
    """-> the picture as the tokenizer sees it beside what its ids hold of it (Fig. 2, 5), PSNR in dB"""
    pixels = prepare(open_image(image), tokenizer.config.resolution, square=False)[None]
    pixels = pixels.to(tokenizer.quant_conv.weight)
    rgb, drawn = to_rgb(pixels).float(), tokenizer.decode(tokenizer.encode(pixels)[0]).float().clamp(-1, 1)
    psnr = float(10 * torch.log10(4 / (rgb - drawn).square().mean()))
    both = [to_picture(x[0]) for x in (rgb, drawn)]
    picture = Image.new("RGB", (2 * both[0].width, both[0].height))
    for i, half in enumerate(both):
        picture.paste(half, (i * half.width, 0))
    return picture, psnr


def attention_difference(maps):
    """Fig. 7: maps (layers, B, heads, n) of the attention that predicts a word, on the image's codes.

    Divided by their one maximum; cross-layer: the distance of each layer from the mean over layers; inner-layer: of
    each head from the mean over heads; averaged over all else. -> two tensors (layers,)
    """
    maps = maps / maps.max()
    cross = (maps - maps.mean(dim=0, keepdim=True)).abs().mean(dim=(1, 2, 3))
    inner = (maps - maps.mean(dim=2, keepdim=True)).abs().mean(dim=(1, 2, 3))
    return cross, inner


if __name__ == "__main__":
    run(main)
