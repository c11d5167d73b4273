"""The commands of this folder: their options, what a first stage starts from, the trainers' loop."""
import argparse
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cli import DTYPES, POSITIVE, TOY, Help, require_path
from common.weights import UserError, assign, shapes_only
from llama import Llama, LlamaConfig
from monolithic import shared
from pretrain import train
from text import IMG, TEMPLATES, open_text
from tokenizer import ClipViT, clip_sizes, read_clip_weights
from training import engine, plan
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
    g.add_argument("--template", choices=(*TEMPLATES, "llm"), help="of chats; None: the model's, or vicuna")
    _, data, lr = stages[stage - 1]
    engine.add_options(parser, f"{name}-{stage}", data, "img2dataset shards, COCO Karpathy JSON, LLaVA JSON",
                       steps=30_000, warmup=900, batch=128, lr=lr, text=300 if "chat" in data else 50)       # ours
    return parser


class Stage(NamedTuple):
    """What the trainers' loop takes, see pretrain.train"""
    model: torch.nn.Module
    blocks: list                                          # its layers
    loss: Callable = lambda wrapped, batch: {"text": wrapped(batch)}
    counts: Callable = shared.Batch.counts
    builder: type = shared.ChatBuilder                    # of samples
    every_token: bool = False                             # see ChatBuilder
    teachers: list = ()                                   # frozen tensors beside the model


def run_stage(parser, build, *stage_1):
    """stage_1: names of the options that, as --llm and --clip, shape a new model. build(args, dist) -> Stage; under
    --plan all its tensors have shapes and no content."""
    args, names = parser.parse_args(), ("llm", "clip_folder", *stage_1)
    misplaced = args.model if args.stage == 1 else any(getattr(args, name) for name in names)
    if misplaced:
        words = ", ".join(f"--{name.removesuffix('_folder').replace('_', '-')}" for name in names)
        raise UserError(f"{words} belong to stage 1, --model to the later ones")
    if args.plan:
        plan.fill_in(args)
        dist, no_cast = engine.Dist(0, 1, torch.device("cpu"), DTYPES[args.dtype]), lambda module, *_: module
        with FakeTensorMode(allow_non_fake_inputs=True), plan.default_dtype(dist.dtype), \
                patch("torch.nn.Module.to", no_cast):
            stage = build(args, dist)
        return show_plan(args, stage)
    dist = engine.setup(args)
    args.engine = "fsdp" if args.engine == "auto" else args.engine            # several processes: it needs least memory
    model, blocks, loss, counts, builder, every_token, teachers = build(args, dist)
    args.frozen = args.frozen if teachers else fingerprint(model)
    model.checkpoint_activations = args.checkpoint_activations
    samples = builder(model.text, model.halves[-1], args.max_length, args.seed, every_token)
    train(args, dist, model, samples, loss, counts, blocks)


def new_parts(args):
    """Stage 1 -> a LLaMA and its text, a CLIP and its sizes; both frozen and on the CPU"""
    folder, clip_folder = Path(require_path(args.llm or TOY / "llama")), require_path(args.clip_folder or TOY / "clip")
    sizes = clip_sizes(clip_folder)
    if args.plan:
        llm = Llama(LlamaConfig.from_file(folder / "config.json")).requires_grad_(False)
        return llm, None, ClipViT(**sizes).requires_grad_(False), sizes
    llm, text = Llama.from_pretrained(folder), open_text(folder)
    text.use_template(args.template)
    with shapes_only():
        clip = ClipViT(**sizes)
    assign(clip, read_clip_weights(clip_folder), clip_folder)
    args.frozen = fingerprint(llm.requires_grad_(False), clip.requires_grad_(False))          # the teachers
    return llm, text, clip, sizes


def trained_before(args, name, cls):
    """Later stages -> the model of the stage before"""
    folder = Path(require_path(args.model or TOY / f"{name}-{args.stage - 1}"))
    if args.plan:
        return cls(*cls.read_config(folder / "config.json"))
    model = cls.from_pretrained(folder)
    model.text = open_text(folder)
    model.text.use_template(args.template)
    return model


# ---------------------------------------------------------------- --plan

@contextmanager
def counted_flops():
    """torch's counter. It knows no fused attention of a CPU, and under it torch cannot make a CausalBias."""
    mask = patch.object(shared, "causal_lower_right", lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(m - n))
    with mask, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def show_plan(args, stage):
    """See training/plan.py. The model's tensors have no content, and the whole of it runs. Not counted: what --compile
    saves, the layer that is recomputed."""
    model, config, weights = stage.model, stage.model.halves[-1], {}
    picture = config.prepare(Image.new("RGB", (640, 480)), 1)
    n_image, most = len(picture[1]), min(args.max_length, config.max_position_embeddings)
    if n_image + 4 > most:                                # <s>, two edges, a word
        raise UserError(f"a picture of 640 x 480 has {n_image} tokens, a row {most}: give a larger --max-length")

    def run_pass(n_rows, n_text):                         # all of the text counts
        ids, loss_mask, _ = shared.expand_images([1, IMG] + [2] * n_text, [0, 0] + [1] * n_text, [n_image],
                                          config.image_token_index, edges=config.edges)
        batch = shared.Batch.build(*shared.pad([ids] * n_rows), [picture] * n_rows, config,
                                   torch.tensor([loss_mask] * n_rows).bool())
        return sum(stage.loss(model, batch).values())
    with counted_flops() as counter:
        run_pass(1, min(args.text_tokens, most - n_image - 3)).backward()
    model.checkpoint_activations = args.checkpoint_activations
    saved = plan.saved_bytes(model.parameters(), lambda: run_pass(args.micro_batch, most - n_image - 3))
    for name, p in [*model.named_parameters(), *(("teachers", x) for x in stage.teachers)]:
        part = name.removeprefix("model.").split(".")[0] + " (frozen)" * (not p.requires_grad)
        weights[part] = weights.get(part, (0,))[0] + p.numel(), p.requires_grad
    memory, _ = plan.memory_of(args, weights, {"activations": saved}, DTYPES[args.dtype], len(stage.blocks),
                               engine.ENGINES)
    title = (f"{type(model).__name__}, stage {args.stage}: {args.micro_batch} rows a pass, a picture of 640 x 480 of "
             f"{n_image} tokens, {args.text_tokens} of text, {most} at most")
    plan.show(args, title, weights, memory, {"all products": counter.get_total_flops()})
