"""The commands of this folder: their options, what a first stage starts from, the trainers' loop."""
import argparse
from pathlib import Path

from common.cli import POSITIVE, TOY, Help, require_path
from common.weights import UserError, assign, shapes_only
from llama import Llama
from monolithic import shared
from pretrain import train
from text import open_text
from tokenizer import ClipViT, read_clip_sizes, read_clip_weights
from training import engine
from training.checkpoints import fingerprint


def options(doc, name, stages):
    """stages: [(what it does, --data in the toy world, learning rate), ...] -> the parser of the stage that is asked"""
    first, numbers = argparse.ArgumentParser(add_help=False), range(1, len(stages) + 1)
    first.add_argument("--stage", type=int, choices=numbers, default=1)
    stage = first.parse_known_args()[0].stage
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, prog=f"python -m monolithic.{name}")
    g = parser.add_argument_group("the model and its samples")
    g.add_argument("--stage", type=int, choices=numbers, required=True,
                   help="; ".join(f"{n}: {what}" for n, (what, _, _) in enumerate(stages, 1)))
    g.add_argument("--llm", metavar="DIR", help=f"stage 1: Hugging Face LLaMA folder; None: {TOY}/llama")
    g.add_argument("--clip", metavar="DIR", dest="clip_folder", help=f"stage 1: Hugging Face CLIP; None: {TOY}/clip")
    g.add_argument("--model", metavar="DIR", help=f"later: folder of the stage before; None: {TOY}/{name}-1, -2")
    g.add_argument("--max-length", type=POSITIVE, default=4096, metavar="N", help="longer samples are cut at the right")
    _, data, lr = stages[stage - 1]
    engine.add_options(parser, f"{name}-{stage}", data, "img2dataset shards, COCO Karpathy JSON, LLaVA JSON",
                       steps=30_000, warmup=900, batch=128, lr=lr)            # the recipe is ours
    return parser


def start(parser, *stage_1):
    """stage_1: names of the options that, as --llm and --clip, shape a new model -> args, dist"""
    args, names = parser.parse_args(), ("llm", "clip_folder", *stage_1)
    if args.plan:
        raise UserError("--plan counts Libra's parts only")
    if args.model if args.stage == 1 else any(getattr(args, name) for name in names):
        words = ", ".join(f"--{name.removesuffix('_folder').replace('_', '-')}" for name in names)
        raise UserError(f"{words} belong to stage 1, --model to the later ones")
    dist = engine.setup(args)
    args.engine = "fsdp" if args.engine == "auto" else args.engine            # several processes: it needs least memory
    return args, dist


def new_parts(args):
    """Stage 1 -> a LLaMA and its text, a CLIP and its sizes; both frozen and on the CPU"""
    folder, clip_folder = Path(require_path(args.llm or TOY / "llama")), require_path(args.clip_folder or TOY / "clip")
    llm, text, sizes = Llama.from_pretrained(folder), open_text(folder), read_clip_sizes(clip_folder)
    with shapes_only():
        clip = ClipViT(**sizes)
    assign(clip, read_clip_weights(clip_folder), clip_folder)
    args.frozen = fingerprint(llm.requires_grad_(False), clip.requires_grad_(False))          # the teachers
    return llm, text, clip, sizes


def trained_before(args, name, cls):
    """Later stages -> the model of the stage before"""
    folder = Path(require_path(args.model or TOY / f"{name}-{args.stage - 1}"))
    model = cls.from_pretrained(folder)
    model.text = open_text(folder)
    return model


def fit(args, dist, model, blocks, loss=lambda wrapped, batch: {"text": wrapped(batch)}, counts=shared.Batch.counts,
        build=shared.ChatBuilder, every_token=False):
    """The trainers' loop over samples of `build`; see pretrain.train"""
    model.checkpoint_activations = args.checkpoint_activations
    builder = build(model.text, model.halves[-1], args.max_length, args.seed, every_token)
    train(args, dist, model, builder, loss, counts, blocks)
