"""Stage 1, multimodal pretraining (Sec. 3.3, Tab. 4): captions, the LLaMA frozen, the visual part learns.

    python pretrain.py                                                      # on the toy world of `make demo`
    torchrun --nproc_per_node=8 pretrain.py --llm Llama-2-7b-chat-hf --image-tokenizer libra-vision-tokenizer \\
        --data 'coyo/{00000..07776}.tar' coco_karpathy_train.json --images coco --out runs/pretrain

The objective is next-token prediction over image ids and text alike (Eq. 6).
"""
import argparse
import itertools
import time
from collections import Counter

import torch

import engine
from data import Recipe, expand, loader, open_source
from engine import TOY, need
from model import Libra
from weights import UserError


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=engine.Help)
    g = parser.add_argument_group("what is trained, on what")
    g.add_argument("--llm", metavar="DIR", default=TOY / "llama", help="Hugging Face LLaMA folder")
    g.add_argument("--image-tokenizer", metavar="DIR", default=TOY / "tokenizer",
                   help="folder of train_tokenizer.py, or libra-vision-tokenizer")
    g.add_argument("--data", nargs="+", metavar="FILE", default=[str(TOY / "captions/*.tar")],
                   help="img2dataset shards ('{00000..07776}.tar', globs) and COCO Karpathy JSON")
    g.add_argument("--images", metavar="DIR", default=str(TOY / "chats/images"),
                   help="what image paths in JSON files are relative to")
    g.add_argument("--max-length", type=int, default=700, help="tokens of a sample")
    g.add_argument("--text-to-image", type=float, default=0.0, metavar="SHARE",
                   help="share of samples with the caption before the image and E_c zeroed (Sec. 4.3)")
    g.add_argument("--no-caption-end", action="store_true", help="no </s> behind captions, as in the authors' release")
    engine.add_options(parser, steps=40_000, warmup=2000, batch=1280, lr=1e-4)
    parser.set_defaults(out=str(TOY / "pretrain"))
    g = parser.add_argument_group("the visual part")
    g.add_argument("--vision-down-ratio", type=int, default=4, help="rank of expert matrices: output / this")
    g.add_argument("--bridge-rank", type=int, default=8, help="torch device")
    return parser


def main():
    args = options().parse_args()
    world = engine.start(args)
    sizes = {"vision_down_ratio": args.vision_down_ratio, "bridge_rank": args.bridge_rank}
    model = Libra.from_pretrained(need(args.llm), need(args.image_tokenizer), torch.float32, world.device, **sizes)
    for module in model.llama():
        module.requires_grad_(False)                      # bit for bit what it was (Sec. 3.3)
    recipe = Recipe(model.tokenizers.text, model.config, model.tokenizers.image.config.resolution, args.max_length,
                    args.seed, args.text_to_image, not args.no_caption_end)
    train(args, world, model, recipe)


def train(args, world, model, recipe):
    """The whole loop: batches, one mean over all counted tokens of the global batch, update, log, checkpoint."""
    out = engine.save_recipe(args, world)
    wrapped, optimizer = engine.wrap(model, world), engine.adamw(model.parameters(), args)
    checkpoints, log = engine.Checkpoints(out, args.keep, world), engine.Log(out, args.steps, world)
    stop = engine.Stop(world)
    start, state = checkpoints.resume(args.resume, [model], [optimizer])
    sources = [open_source(path, args.images) for path in expand(args.data)]
    batches, order = loader(sources, recipe, args.batch, args.micro_batch, args.seed, world.rank, world.size,
                            args.workers, state, world.device.type == "cuda")
    batches, passes, skipped = iter(batches), args.batch // args.micro_batch // world.size, Counter()
    trained = [p for p in model.parameters() if p.requires_grad]
    world.say(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} weights learn, "
              f"{passes} passes of {args.micro_batch} samples on {world.size} processes")
    for step in range(start, args.steps):
        clock = time.perf_counter()
        micro = [batch.to(world.device) for batch in itertools.islice(batches, passes)]
        waited = time.perf_counter() - clock
        counts = torch.tensor([[len(b.streams.text_rows), len(b.streams.image_rows), len(b.names),
                                len(b.streams.text_ids) + len(b.streams.image_ids)] for b in micro])
        counts = engine.total(counts.sum(0).to(world.device), world)
        sums = torch.zeros(2, device=world.device)
        for number, batch in enumerate(micro):
            last = number == passes - 1
            with world.autocast(), (wrapped.no_sync() if world.size > 1 and not last else engine.nullcontext()):
                text, image = losses(wrapped, model.tokenizers.image, batch)
                loss = (text + image.mean()) / counts[:2].sum()                               # Eq. 6
                (loss * world.size).backward()            # replicas average their gradients; the loss is a sum
            sums += torch.stack([text.detach(), image.detach().mean()])
            skipped += batch.bad
        for group in optimizer.param_groups:
            group["lr"] = engine.learning_rate(step, args)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_norm)
        sums = engine.total(sums, world)
        if not torch.isfinite(norm) or not torch.isfinite(sums).all():
            checkpoints.save(step, [model], [optimizer], order.state_after(step - start))
            names = ", ".join(name for batch in micro for name in batch.names)
            raise UserError(f"step {step + 1}: loss or gradient is not finite; saved before the update. In it: {names}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        text, image, samples, tokens = (sums / counts[:2].clamp(min=1)).tolist() + counts[2:].tolist()
        seconds = time.perf_counter() - clock
        log(step + 1, {"loss": float(sums.sum() / counts[:2].sum()), "text": text, "image": image,
                       "lr": optimizer.param_groups[0]["lr"], "norm": float(norm), "tokens/s": tokens / seconds,
                       "samples/s": samples / seconds, "wait": waited, "skipped": sum(skipped.values())})
        ended = stop()
        if ended or (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            checkpoints.save(step + 1, [model], [optimizer], order.state_after(step + 1 - start))
        if ended:
            world.say(f"stopped after step {step + 1}; --resume goes on")
            return
    if world.first:
        model.save_pretrained(out)
    world.say(f"{out} is a model folder")
    engine.barrier(world)


def losses(model, tokenizer, batch):
    """One pass: pictures to ids and signal, then the sums of the text loss () and of the image losses (K,)"""
    streams, signal = batch.streams, None
    if len(batch.pixels):
        codes, signal = tokenizer.encode(batch.pixels)
        streams, signal = streams.with_images(codes), signal * ~batch.drawn[:, None, None]
    return model(streams, signal)


if __name__ == "__main__":
    engine.run(main)
