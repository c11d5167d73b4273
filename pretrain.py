"""Stage 1, multimodal pretraining (Sec. 3.3, Tab. 4): captions; the LLaMA is frozen, the visual part learns (Eq. 6).

    python pretrain.py --out runs/try --steps 100 --warmup 10 --batch 32 --lr 2e-3          # on the demo's files
    torchrun --nproc_per_node=8 pretrain.py --llm Llama-2-7b-chat-hf --image-tokenizer libra-vision-tokenizer \\
        --data 'coyo/{00000..07776}.tar' coco_karpathy_train.json --images coco --out runs/pretrain

The training loop of all stages is here: `run_steps`, and `train` for any model that has one optimizer.
"""
import argparse
import itertools
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel

from common.cli import POSITIVE, TOY, Help, bounded, require_path, run
from common.config import is_llama
from common.sources import open_sources
from common.weights import UserError, read_json
from data import SampleBuilder, make_loader, make_val_loader
from model import Libra
from tokenizer import to_picture, to_rgb
from training import engine, plan
from training.checkpoints import Checkpoints, Stop, fingerprint

TEMPLATE_HELP = "of chats: the paper's, or the LLM's own (Llama 2, Llama 3, ChatML); None: the model's, or vicuna"


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage="%(prog)s [options]")
    g = parser.add_argument_group("the model and its samples")
    g.add_argument("--llm", metavar="DIR", help=f"folder of a LLaMA, or of a Libra to train further; None: {TOY}/llama")
    g.add_argument("--image-tokenizer", metavar="DIR",
                   help=f"folder of train_tokenizer.py, or libra-vision-tokenizer; None: {TOY}/tokenizer")
    g.add_argument("--max-length", type=POSITIVE, default=700, metavar="N", help="tokens of a sample")
    g.add_argument("--template", choices=("vicuna", "llm"), help=TEMPLATE_HELP)
    g.add_argument("--text-to-image", type=bounded(float, 0, 1), default=0.0, metavar="SHARE",
                   help="of samples with caption before image and E_c = 0 (Sec. 4.3)")
    g.add_argument("--no-caption-end", action="store_true", help="no </s> after captions, as the authors' release")
    g.add_argument("--vision-down-ratio", type=POSITIVE, default=4, metavar="N", help="expert rank: output width / N")
    g.add_argument("--bridge-rank", type=POSITIVE, default=8, metavar="N", help="of the cross-modal bridge (Eq. 3)")
    engine.add_options(parser, "pretrain", "captions/*.tar", "img2dataset shards, COCO Karpathy JSON", steps=40_000,
                       warmup=2000, batch=1280, lr=1e-4, text=50)
    g = parser.add_argument_group("Table 3, each one switch away from Libra")
    g.add_argument("--language-only", action="store_true", help="(a) image tokens are no targets")
    g.add_argument("--contiguous-targets", action="store_true", help="(b) predict the next token's E_c instead")
    g.add_argument("--no-expert", action="store_true", help="(d) image tokens use the LLaMA's weights, no bridge")
    g.add_argument("--no-bridge", action="store_true", help="(e) both modalities see the same keys and values")
    g.add_argument("--discrete-only", action="store_true", help="(f) E_c is zero")
    return parser


def main():
    args = options().parse_args()
    sizes = {"vision_down_ratio": args.vision_down_ratio, "bridge_rank": args.bridge_rank,
             "use_expert": not args.no_expert, "use_bridge": not (args.no_expert or args.no_bridge),
             "discrete_only": args.discrete_only, "contiguous_targets": args.contiguous_targets}
    refuse_other_sizes(args.llm, sizes)
    if args.text_to_image:                                # never set to False: a Libra that can draw stays able to
        sizes["text_to_image"] = True
    if args.template:                                     # else a Libra keeps its own
        sizes["chat_template"] = args.template
    if args.plan:
        return plan.show_libra(args, "pretrain", args.llm, args.image_tokenizer, **sizes)
    args.llm = args.llm or TOY / "llama"
    dist = engine.setup(args)
    if is_llama(Path(require_path(args.llm)) / "config.json"):    # a Libra has its own image tokenizer
        args.image_tokenizer = args.image_tokenizer or TOY / "tokenizer"
    model = Libra.from_pretrained(args.llm, args.image_tokenizer and require_path(args.image_tokenizer), **sizes)
    for p in model.llama_parameters():
        p.requires_grad_(False)                           # stays bit for bit as it was (Sec. 3.3)
    train_libra(args, dist, model, text_to_image=args.text_to_image, caption_end=not args.no_caption_end,
                image_loss=not args.language_only)


def refuse_other_sizes(folder, sizes):
    """--llm may be a Libra, to pretrain it further, but not with other sizes."""
    path = Path(folder or "") / "config.json"
    found = read_json(path) if folder and path.is_file() else {}              # a LLaMA's has none of these
    other = [f"{name} {found[name]}, now {value}" for name, value in sizes.items() if found.get(name, value) != value]
    if other:
        raise UserError(f"--llm {folder} is a Libra already, made with {'; '.join(other)}: give the same options to "
                        "train it further, or the folder of its LLaMA to start anew")


# ---------------------------------------------------------------- the training loop

def train(args, dist, model, builder, loss, counts, blocks, flops=None, save_samples=None):
    """Train a model of any kind and write its folder. blocks: its layers, see engine.distribute

    loss(wrapped, batch) -> {name: sum over targets}; counts(batch) -> {name of a loss: number of its targets}, and
    further numbers for flops and the log. A step's loss is the sum of all losses over the number of all targets, of all
    passes and processes.
    """
    files = ([], []) if args.export else (args.data, args.val_data)           # --export needs no data
    sources, held_out = (open_sources(names, args.images) for names in files)
    if both := set.intersection(*({Path(file.path).resolve() for file in group} for group in (sources, held_out))):
        raise UserError(f"--val-data {both.pop()} is in --data too: a held-out loss needs other samples")
    frozen = {name: p.data for name, p in model.named_parameters() if not p.requires_grad} if dist.first else {}
    wrapped = engine.distribute(model, blocks, args, dist)
    optimizer = engine.adamw(model.parameters(), args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dist.print0(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} weights learn, engine {args.engine}")
    step = partial(update, args, dist, wrapped, optimizer, loss)
    val_loader = held_out and make_val_loader(held_out, builder, args.micro_batch, dist.rank, dist.size, args.workers,
                                              dist.device.type == "cuda")
    validate = partial(held_out_loss, dist, wrapped, val_loader, loss, counts) if held_out else None
    if run_steps(args, dist, sources, builder, [model], [optimizer], step, counts, flops, save_samples, validate):
        tensors = engine.full_state_dict(model)
        if dist.first:                                    # the others do not wait; frozen weights keep their bits
            dtype = next((p.dtype for p in frozen.values()), dist.dtype)              # one type for a whole folder
            model.save_pretrained(args.out, {name: frozen.get(name, tensor.to(dtype))
                                             for name, tensor in tensors.items()})
        dist.print0(f"{args.out} is a model folder")


def update(args, dist, wrapped, optimizer, loss, step, batches, totals):
    """Forward and backward of all passes, clip, AdamW. -> numbers for the log. Raises FloatingPointError, before the
    weights change, if the loss or the gradient is not finite."""
    sums = 0.0
    for n, batch in enumerate(batches):
        engine.set_grad_sync(wrapped, n == len(batches) - 1)
        with dist.autocast():
            losses = loss(wrapped, batch)
            mean = sum(losses.values()) / max(1, sum(totals[name] for name in losses))        # Eq. 6
        (mean * dist.size).backward()                     # the engines average gradients over the processes
        sums = sums + torch.stack([value.detach() for value in losses.values()])
    norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), args.clip_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm       # zero and fsdp shard it
    sums = engine.all_reduce_sum(sums, dist)
    finite = torch.isfinite(norm) and torch.isfinite(sums).all()
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=not isinstance(wrapped, DistributedDataParallel))        # views of DDP's buckets
    if not finite:
        raise FloatingPointError
    return means(dict(zip(losses, sums.tolist())), totals) | {"norm": float(norm)}


def means(sums, totals):
    """sums of losses, numbers of targets -> the loss (Eq. 6) and its parts"""
    parts = {name: value / max(1, totals[name]) for name, value in sums.items()}
    return {"loss": sum(sums.values()) / max(1, sum(totals[name] for name in sums)), **parts}


@torch.no_grad()
def held_out_loss(dist, wrapped, loader, loss, counts):
    """The loss of all samples of --val-data, on all processes -> numbers for the log"""
    losses, rows = [], []
    for batch in loader:
        batch = batch.to(dist.device)
        with dist.autocast():
            parts = loss(wrapped, batch)
        losses.append(torch.stack(list(parts.values())))
        rows.append(counts_of(batch, counts))
    totals = sum_counts(rows, dist)
    if not totals["samples"]:
        return {"val_bad": totals["bad"]}
    sums = engine.all_reduce_sum(torch.stack(losses).double().sum(0), dist).tolist()
    numbers = means(dict(zip(parts, sums)), totals) | {"bad": totals["bad"]}
    return {f"val_{name}": value for name, value in numbers.items()}


def run_steps(args, dist, sources, builder, models, optimizers, update, counts, flops=None, save_samples=None,
              validate=None):
    """The loop of every stage. -> whether it came to its end; False: it was told to stop.

    update(step, batches, totals) -> numbers for the log; totals: counts(batch), samples and bad samples, over all
    passes and processes. flops(totals) -> {part: FLOPs of the step}. save_samples(batches, path): a picture to look at.
    validate() -> numbers for the log, every --val-every steps.
    """
    out, passes = Path(args.out), args.batch // args.micro_batch // dist.size
    engine.lock(out, dist)
    checkpoints = Checkpoints(out, args, dist)
    start, state = checkpoints.resume(args.resume, models, optimizers, args.export)
    if args.export:
        return True
    loader, sampler = make_loader(sources, builder, args.batch, args.micro_batch, args.seed, dist.rank, dist.size,
                                  args.workers, state, dist.device.type == "cuda")
    engine.save_options(args, dist, start)
    log, stop, bad, loader = engine.Log(args, dist, start), Stop(dist), engine.BadSamples(args, dist), iter(loader)
    for step in range(start, args.steps):
        began, last, save_seconds = time.perf_counter(), step + 1 == args.steps, 0.0
        torch.manual_seed(hash((args.seed, step, dist.rank)))                  # a resumed run draws the same numbers
        lr = engine.set_learning_rate(optimizers, step, args)
        # Not copied while the step before computes: 217 MB for 160 pictures of 336 pixels, 10 ms of a step of 18 s
        batches = [batch.to(dist.device) for batch in itertools.islice(loader, passes)]
        wait = time.perf_counter() - began
        totals = sum_counts([counts_of(batch, counts) for batch in batches], dist)
        try:
            numbers = update(step, batches, totals)
            bad(step + 1, batches, totals)
        except FloatingPointError:
            checkpoints.save(step, models, optimizers, sampler.state_after(step - start), wait=True)
            names = ", ".join(engine.gather_lists([name for batch in batches for name in batch.names], dist))
            raise UserError(f"step {step + 1}: loss or gradient is not finite; saved before the update, in {out}. "
                            f"In the batch: {names}") from None
        except UserError:                                 # too many bad samples
            checkpoints.finish()
            raise
        stopping = stop()
        if stopping or args.save_every and (last or (step + 1) % args.save_every == 0):
            place = sampler.state_after(step + 1 - start)
            save_seconds = checkpoints.save(step + 1, models, optimizers, place, wait=stopping or last)
        checkpoints.poll()
        measured = engine.speed_and_memory(args, dist, totals, time.perf_counter() - began, flops)
        numbers |= {"lr": lr, **measured, "wait": wait, "save": save_seconds, "skipped": bad.n_bad,
                    "causes": bad.causes}
        if validate and not stopping and (last or (step + 1) % args.val_every == 0):
            numbers |= validate()
        log(step + 1, numbers)
        if save_samples and (last or args.sample_every and (step + 1) % args.sample_every == 0):
            save_samples(batches, out / "samples" / f"{step + 1:06d}.png")
        if stopping:
            dist.print0(f"stopped after step {step + 1}; --resume goes on")
            return False
    checkpoints.finish()
    bad.finish(start)
    return True


def counts_of(batch, counts):
    return {"samples": len(batch.names), "bad": len(batch.bad), **counts(batch)}


def sum_counts(rows, dist):
    """rows: counts_of this process's batches -> their sums over all processes"""
    sums = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).sum(0).to(dist.device)
    return dict(zip(rows[0], engine.all_reduce_sum(sums, dist).long().tolist()))


# ---------------------------------------------------------------- Libra in the loop

def train_libra(args, dist, model, **samples):
    """samples: further fields of SampleBuilder"""
    plan.choose_engine(args, dist, model)
    model.checkpoint_activations = args.checkpoint_activations
    tokenizer = model.tokenizers.image.to(dist.device)
    builder = SampleBuilder(model.tokenizers.text, model.config, tokenizer.config.resolution, args.max_length,
                            args.seed, **samples)
    args.frozen = fingerprint(model, tokenizer)

    def loss(wrapped, batch):
        text, image = forward(wrapped, tokenizer, batch)
        return {"text": text, "image": image.mean()}      # an image token counts the mean of its codebooks' losses

    def counts(batch):
        return plan.token_counts(batch.streams) | {"images": len(batch.pixels)}
    flops = plan.flops_of(model.config, tokenizer.config, model.lm_head.weight.requires_grad)
    train(args, dist, model, builder, loss, counts, model.model.layers, flops, partial(save_page, dist, model))


def forward(model, tokenizer, batch, predict=False):
    """Images to ids and signal, then Libra.forward"""
    streams, signal = batch.streams, None
    if len(batch.pixels):
        codes, signal = tokenizer.encode(batch.pixels)
        streams, signal = streams.with_image_codes(codes), signal * ~batch.drawn[:, None, None]
    return model(streams, signal, predict=predict)


@torch.no_grad()
def save_page(dist, model, batches, path, n_rows=6, side=112):
    """A page of the first pass: image, its reconstruction from the ids, its text, and in blue the model's next token
    after each token of the text"""
    text, tokenizer, batch, s = model.tokenizers.text, model.tokenizers.image, batches[0], batches[0].streams
    with dist.autocast():
        guesses = forward(model, tokenizer, batch, predict=True).cpu()        # on all processes: fsdp gathers weights
        if not dist.first or not len(batch.pixels):
            return
        rebuilt = tokenizer.decode(tokenizer.encode(batch.pixels[:n_rows])[0]).float()
    text_row, image_row = s.text_index.cpu() // s.length, s.image_index.cpu()[::model.config.image_tokens] // s.length
    page = Image.new("RGB", (2 * side + 700, len(rebuilt) * side), "white")
    for n, rgb in enumerate(rebuilt):
        for x, picture in ((0, to_rgb(batch.pixels[n].float())), (side, rgb)):
            page.paste(to_picture(picture).resize((side, side)), (x, n * side))
        for y, ids, color in ((4, s.text_ids.cpu(), "black"), (60, guesses, "blue")):
            ids = [i for i in ids[text_row == image_row[n]].tolist() if i not in text.start + text.ends]
            lines = "\n".join(textwrap.wrap(text.decode(ids), 100)[-3:])
            ImageDraw.Draw(page).text((2 * side + 8, n * side + y), lines, color, font_size=13)
    with engine.warn_if_unwritable(path):
        path.parent.mkdir(exist_ok=True)
        page.save(path)


if __name__ == "__main__":
    run(main)
