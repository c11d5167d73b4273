"""Stage 1, multimodal pretraining (Sec. 3.3, Tab. 4): captions, the LLaMA frozen, the visual part learns.

    python pretrain.py                                                      # on the toy world of `make demo`
    torchrun --nproc_per_node=8 pretrain.py --llm Llama-2-7b-chat-hf --image-tokenizer libra-vision-tokenizer \\
        --data 'coyo/{00000..07776}.tar' coco_karpathy_train.json --images coco --out runs/pretrain

The objective is next-token prediction over image ids and text alike (Eq. 6).
"""
import argparse
import itertools
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import engine
import plan
from checkpoints import Checkpoints, Stop
from command import POSITIVE, TOY, Help, bounded, need, run
from config import is_llama
from data import Recipe, loader, open_sources
from model import Libra
from tokenizer import to_picture, to_rgb
from weights import UserError, read_json


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    g = parser.add_argument_group("what is trained, on what")
    g.add_argument("--llm", metavar="DIR", help=f"Hugging Face LLaMA folder; None: {TOY}/llama")
    g.add_argument("--image-tokenizer", metavar="DIR",
                   help=f"folder of train_tokenizer.py, or libra-vision-tokenizer; None: {TOY}/tokenizer")
    g.add_argument("--data", nargs="+", metavar="FILE", default=[str(TOY / "captions/*.tar")],
                   help="img2dataset shards ('{00000..07776}.tar', globs) and COCO Karpathy JSON, drawn in proportion "
                        "to their size; FILE@3: each epoch reads it three times")
    g.add_argument("--images", metavar="DIR", default=str(TOY / "chats/images"),
                   help="what image paths in JSON files are relative to")
    g.add_argument("--max-length", type=POSITIVE, default=700, help="tokens of a sample")
    g.add_argument("--text-to-image", type=bounded(float, 0, 1), default=0.0, metavar="SHARE",
                   help="share of samples with the caption before the image and E_c zeroed (Sec. 4.3)")
    g.add_argument("--no-caption-end", action="store_true", help="no </s> behind captions, as in the authors' release")
    engine.add_options(parser, steps=40_000, warmup=2000, batch=1280, lr=1e-4, text_tokens=50)
    parser.set_defaults(out=str(TOY / "pretrain"))
    g = parser.add_argument_group("the visual part")
    g.add_argument("--vision-down-ratio", type=POSITIVE, default=4, help="rank of expert matrices: output / this")
    g.add_argument("--bridge-rank", type=POSITIVE, default=8, help="rank of the cross-modal bridge (Eq. 5)")
    g = parser.add_argument_group("Table 3, each one switch away from Libra")
    g.add_argument("--language-only", action="store_true", help="(a) image tokens are no targets")
    g.add_argument("--contiguous-targets", action="store_true", help="(b) image positions regress the next one's E_c")
    g.add_argument("--no-expert", action="store_true", help="(d) image tokens use the LLaMA's weights, no bridge")
    g.add_argument("--no-bridge", action="store_true", help="(e) both modalities see the same keys and values")
    g.add_argument("--discrete-only", action="store_true", help="(f) E_c is zero")
    return parser


def main():
    args = options().parse_args()
    sizes = {"vision_down_ratio": args.vision_down_ratio, "bridge_rank": args.bridge_rank,
             "use_expert": not args.no_expert, "use_bridge": not (args.no_expert or args.no_bridge),
             "discrete_only": args.discrete_only, "contiguous_targets": args.contiguous_targets}
    sizes |= {"text_to_image": True} if args.text_to_image else {}                            # once learned it stays
    if args.plan:
        return plan.show(args, *plan.sizes(args.llm, args.image_tokenizer or args.llm, **sizes), "pretrain")
    refuse_other_sizes(args.llm, sizes)
    args.llm = args.llm or TOY / "llama"
    world = engine.start(args)
    if is_llama(Path(need(args.llm)) / "config.json"):    # a Libra has an image tokenizer of its own
        args.image_tokenizer = args.image_tokenizer or TOY / "tokenizer"
    model = Libra.from_pretrained(args.llm, args.image_tokenizer and need(args.image_tokenizer), **sizes)
    for module in model.llama():
        module.requires_grad_(False)                      # bit for bit what it was (Sec. 3.3)
    recipe = Recipe(model.tokenizers.text, model.config, model.tokenizers.image.config.resolution, args.max_length,
                    args.seed, args.text_to_image, not args.no_caption_end, image_loss=not args.language_only)
    train(args, world, model, recipe)


def refuse_other_sizes(folder, sizes):
    """A Libra can be pretrained further as what it is."""
    path = Path(folder or "") / "config.json"
    made = read_json(path) if folder and path.is_file() and not is_llama(path) else {}
    shapes = ("vision_down_ratio", "bridge_rank", "use_expert", "use_bridge", "contiguous_targets")
    other = [f"{name} {made[name]}, now {sizes[name]}" for name in shapes if made.get(name, sizes[name]) != sizes[name]]
    if other:
        raise UserError(f"--llm {folder} is a Libra already, made with {'; '.join(other)}: give the same options to go "
                        "on with it, or the folder of its LLaMA to begin anew")


def train(args, world, model, recipe):
    """The whole loop: batches, one mean over all counted tokens of the global batch, update, log, checkpoint."""
    out, sources = Path(args.out), open_sources(args.data, args.images)
    plan.choose_engine(args, world, model)
    model.checkpoint_activations = args.checkpoint_activations
    wrapped = engine.distribute(model, model.model.layers, args, world)
    model.tokenizers.image.to(world.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = engine.adamw(trained, args)
    checkpoints = Checkpoints(out, args, world)
    start, state = checkpoints.resume(args.resume, [model], [optimizer], args.export)
    batches, order = loader(sources, recipe, args.batch, args.micro_batch, args.seed, world.rank, world.size,
                            args.workers, state, world.device.type == "cuda")
    engine.begin(args, world, start)
    log, stop, bad = engine.Log(out, args, world), Stop(world), engine.BadSamples(out, args.max_bad, world)
    peak, flops = engine.peak(args, world), plan.flops_of(model, model.tokenizers.image.config)
    batches, passes = iter(batches), args.batch // args.micro_batch // world.size
    world.say(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} weights learn, "
              f"{passes} passes of {args.micro_batch} samples on {world.size} processes, engine {args.engine}")
    for step in range(start, start if args.export else args.steps):
        clock = time.perf_counter()
        micro = [batch.to(world.device) for batch in itertools.islice(batches, passes)]
        waited = time.perf_counter() - clock
        try:
            numbers, counts = update(args, world, step, model, wrapped, optimizer, trained, micro)
        except FloatingPointError:
            checkpoints.save(step, [model], [optimizer], order.state_after(step - start), wait=True)
            raise UserError(f"step {step + 1}: loss or gradient is not finite; saved before the update, in {out}. "
                            f"In the batch: {engine.all_names(micro, world)}") from None
        with checkpoints.finished():
            bad(step + 1, micro, counts["samples"], counts["bad"])
        ended, saved = stop(), 0.0
        if ended or engine.due(step, args.save_every) and step + 1 < args.steps:
            saved = checkpoints.save(step + 1, [model], [optimizer], order.state_after(step + 1 - start), wait=ended)
        checkpoints.poll()
        seconds = time.perf_counter() - clock
        log(step + 1, numbers | {
            "tokens/s": counts["tokens"] / seconds, "images/s": counts["images"] / seconds,
            "peak": peak and sum(flops(counts).values()) / seconds / peak / world.size, "memory": engine.memory(world),
            "wait": waited, "save": saved, "skipped": bad.bad, "causes": dict(bad.causes)})
        if engine.due(step, args.sample_every) or step + 1 == args.steps:
            look(world, model, wrapped, micro[0], out / "samples" / f"{step + 1:06d}.png")
        if ended:
            return world.say(f"stopped after step {step + 1}; --resume goes on")
    checkpoints.finish()
    bad.finish(start)
    tensors = engine.whole_weights(model)
    if world.first:
        model.save_pretrained(out, {name: tensor.to(world.dtype) for name, tensor in tensors.items()})
    world.say(f"{out} is a model folder")
    engine.barrier(world)


COUNTS = ("text_targets", "image_targets", "samples", "bad", "images", "text", "image", "tokens", "squares")


def update(args, world, step, model, wrapped, optimizer, trained, micro):
    """One step: every pass's share of the global batch's loss, one update. -> numbers for the log, global counts"""
    counts = torch.tensor([[len(b.streams.text_rows), len(b.streams.image_rows), len(b.names), len(b.listed),
                            len(b.pixels), len(b.streams.text_ids), len(b.streams.image_ids), sum(b.streams.lengths),
                            sum(n * n for n in b.streams.lengths)] for b in micro], dtype=torch.float64)
    counts = engine.total(counts.sum(0).to(world.device), world)
    sums = torch.zeros(2, device=world.device)
    for number, batch in enumerate(micro):
        engine.gradients_travel(wrapped, number == len(micro) - 1)
        with world.autocast():
            text, image = losses(wrapped, model.tokenizers.image, batch)
            loss = (text + image.mean()) / counts[:2].sum()                                   # Eq. 6
        (loss * world.size).backward()                    # the engines average over processes; the loss is a sum
        sums += torch.stack([text.detach(), image.detach().mean()])
    for group in optimizer.param_groups:
        group["lr"] = engine.learning_rate(step, args)
    norm = engine.clip(trained, args.clip_norm)
    sums = engine.total(sums, world)
    if not torch.isfinite(norm) or not torch.isfinite(sums).all():
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    text, image = (sums / counts[:2].clamp(min=1)).tolist()
    counts = dict(zip(COUNTS, counts.long().tolist()))
    loss = float(sums.sum()) / max(1, counts["text_targets"] + counts["image_targets"])
    return {"loss": loss, "text": text, "image": image, "lr": optimizer.param_groups[0]["lr"],
            "norm": float(norm)}, counts


def losses(model, tokenizer, batch, read=False):
    """One pass: pictures to ids and signal, then what Libra.forward gives"""
    streams, signal = batch.streams, None
    if len(batch.pixels):
        codes, signal = tokenizer.encode(batch.pixels)
        streams, signal = streams.with_images(codes), signal * ~batch.drawn[:, None, None]
    return model(streams, signal, read=read)


@torch.no_grad()
def look(world, model, wrapped, batch, path, most=6, side=112):
    """A picture of a batch: what was shown, what the ids keep of it, the text, and below it what the model would have
    said next behind each of its tokens."""
    text, tokenizer = model.tokenizers.text, model.tokenizers.image
    with world.autocast():
        said = losses(wrapped, tokenizer, batch, read=True).cpu()                             # all processes take part
    if not world.first or not len(batch.pixels):
        return
    with world.autocast():
        rebuilt = tokenizer.decode(tokenizer.encode(batch.pixels[:most])[0]).float()
    page = Image.new("RGB", (2 * side + 700, len(rebuilt) * side), "white")
    pen, font, s = ImageDraw.Draw(page), ImageFont.load_default(13), batch.streams
    row, image_row = s.text_at.cpu() // s.length, s.image_at.cpu() // s.length
    shown = image_row[::model.config.image_tokens].tolist()                                   # the row of each picture
    for n, (pixels, rgb) in enumerate(zip(batch.pixels, rebuilt)):
        for x, picture in ((0, to_rgb(pixels.float())), (side, rgb)):
            page.paste(to_picture(picture).resize((side, side)), (x, n * side))
        ids, guess = s.text_ids.cpu()[row == shown[n]].tolist(), said[row == shown[n]].tolist()
        for y, pieces, ink in ((4, ids, "black"), (60, guess, "blue")):
            words = text.model.decode([i for i in pieces if i not in (text.bos, text.eos)])
            for i, line in enumerate(textwrap.wrap(words, 100)[-3:]):
                pen.text((2 * side + 8, n * side + y + 17 * i), line, ink, font)
    path.parent.mkdir(exist_ok=True)
    page.save(path)


if __name__ == "__main__":
    run(main)
