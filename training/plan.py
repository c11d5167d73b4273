"""What a run will need: parameters, memory of a GPU and of the CPU, FLOPs, hours. Nothing is allocated.

    python -m training.plan pretrain --gpus 8 --memory 80 --micro-batch 8        # the paper's run
    python -m training.plan sft --gpus 1 --memory 24 --model runs/toy/pretrain   # a folder's config.json is enough
    python -m training.plan train_tokenizer --clip clip-vit-large-patch14-336
    python -m training.plan generate                                             # which GPUs answer; or --model FOLDER

--gpus N (8), --memory GB of a GPU (80), --tflops TFLOP/s that a GPU reaches (150), --text-tokens of a sample on average
(50 in pretraining, 300 in tuning); all other options are the trainer's. FLOPs are those of an average sample, memory
that of the longest rows (--max-length). Activations are measured by running the model on torch's fake tensors, which
have shapes and no content. All layers are alike: Libras of one and two layers are built.
"""
import argparse
import importlib
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cli import DTYPES, run
from common.quantize import MATRICES
from common.weights import UserError, shapes_only
from model import Libra, LibraConfig, vision_sizes
from streams import Streams
from text import IMG, expand_images
from tokenizer import ImageTokenizer, ImageTokenizerConfig, find_image_tokenizer, read_image_config
from training.engine import ENGINES, Dist

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14, "layer_norm_eps": 1e-5}
COMPILED = 0.64                # share of a layer's activations that is saved with --compile, see docs/speed.md
ROOM = 0.92                    # share of a GPU's memory that a run can use; the rest is the allocator's and CUDA's


def main():
    stage = sys.argv[1] if len(sys.argv) > 1 else ""
    if stage in ("-h", "--help"):
        return print(__doc__)
    if stage == "generate":
        parser = argparse.ArgumentParser(usage="python -m training.plan generate [--model FOLDER]")
        parser.add_argument("--model")
        return show_answering(parser.parse_args(sys.argv[2:]).model)
    if stage not in ("pretrain", "sft", "train_tokenizer"):
        raise UserError(f"the first word is {stage!r}, expected pretrain, sft, train_tokenizer or generate; -h: more")
    sys.argv = [f"{stage}.py", "--plan", *sys.argv[2:]]
    importlib.import_module(stage).main()


# ---------------------------------------------------------------- the printed plan

def show(args, title, weights, memory, flops):
    """weights: {part: (number, whether it learns)}; memory: lines about it; flops: {part: FLOPs of a sample}"""
    print(f"{title}; {args.nproc} GPUs\n\nweights")
    for part, (number, learns) in weights.items():
        print(f"  {part:24}{number / 1e9:9.3f} B  {'learns' * learns}")
    total = sum(flops.values())
    hours = total * args.batch * args.steps / (args.tflops * 1e12) / 3600
    print(f"\n{memory}\n\nTFLOP of a sample, forward and backward: {total / 1e12:.4g}")
    for part, number in flops.items():
        print(f"  {part:24}{number / 1e12:9.4f}   {number / total:.0%}")
    print(f"\n{args.steps} steps of {args.batch} at {args.tflops:g} TFLOP/s a GPU: {hours:,.0f} GPU hours, "
          f"{hours / args.nproc:,.0f} hours on {args.nproc}; recomputed activations and --offload add to it")


def show_libra(args, stage, llm, image_tokenizer=None, **changes):
    """The plan of pretraining or of tuning. llm, image_tokenizer: folders or None; changes: fields of LibraConfig"""
    config, clip_config = read_sizes(llm, image_tokenizer, **changes)
    fill_in(args)
    train_llama, longest = stage == "sft" and not args.freeze_llm, longest_text(args, config)
    sample = example_batch(config, 1, min(args.text_tokens, longest), train_llama)
    flops = flops_of(config, clip_config, train_llama)(token_counts(sample) | {"images": 1})
    weights = libra_weights(config, train_llama) | {"image tokenizer": (tokenizer_costs(clip_config)[0], False)}
    memory, _ = libra_memory(args, config, clip_config, train_llama)
    title = (f"{stage}: {config.num_hidden_layers} layers of {config.hidden_size}; {args.micro_batch} samples a pass, "
             f"an image of {config.image_tokens} tokens and {args.text_tokens} of text, {longest} at most")
    show(args, title, weights, memory, flops)


def show_tokenizer(args, trained, discriminator, lpips, forward_backward):
    """The plan of stage 0. forward_backward: train_tokenizer.generator_pass. All modules are without memory."""
    fill_in(args)
    t, dist = trained.tokenizer, Dist(0, 1, torch.device("cpu"), DTYPES[args.dtype])
    parts = {"encoder": t.encoder, "quantizer": torch.nn.ModuleList([t.quant_conv, t.quantize, t.post_quant_conv]),
             "decoder": t.decoder, "discriminator": discriminator}
    weights = {name: (sum(p.numel() for p in module.parameters()), next(module.parameters()).requires_grad)
               for name, module in parts.items()}
    modules = [module for module in (trained, discriminator, lpips) if module]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        for module in trained.modules():
            if isinstance(module, torch.nn.GroupNorm):    # stays in float32, as autocast on CUDA does it
                module.register_forward_pre_hook(lambda _, x: (x[0].float(),))

        def run_pass(n, lpips):
            pixels = torch.empty(n, 3, t.config.resolution, t.config.resolution)
            forward_backward(args, dist, True, trained, discriminator, lpips, pixels, 1)
        activations = saved_bytes([p for module in modules for p in module.parameters()],
                                  lambda: run_pass(args.micro_batch, lpips))
        with FlopCounterMode(display=False) as counter:
            run_pass(1, None)
    memory, _ = memory_of(args, weights, {"activations": activations}, torch.float32, 1)
    show(args, f"image tokenizer: {args.micro_batch} pictures of {t.config.resolution} pixels a pass", weights,
         f"{memory}\n  counted: LPIPS {'yes' if lpips else 'no, name --vgg and --lpips'}",
         {"all but LPIPS": counter.get_total_flops()})


def show_answering(folder):
    """What answers take of a GPU's memory, by kind of weights. folder: of a Libra; None: the paper's sizes"""
    c, clip_config = read_sizes(folder)
    numbers = {name: p.numel() * (c.num_hidden_layers if ".layers." in name else 1)
               for name, p in one_layer(c, False).named_parameters()}
    n_matrices = sum(number for name, number in numbers.items() if MATRICES.fullmatch(name))
    n_others = sum(numbers.values()) - n_matrices
    cache = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * c.max_position_embeddings
    fixed = 2 * n_others + 4 * tokenizer_costs(clip_config)[0] + cache
    print(f"GB of a GPU to answer with {c.max_position_embeddings} positions, {fixed / 1e9:.1f} of them for all but "
          f"the layers' {n_matrices / 1e9:.2f} B weights")
    for kind, bits in (("bfloat16", 16), ("int8", 8), ("int4", 4.5)):         # 4.5: with the groups' scales and zeros
        total = fixed + n_matrices * bits / 8
        fits = [f"{size} GB" for size in (12, 16, 24) if total < ROOM * size * 1e9]
        print(f"  {kind:10}{total / 1e9:5.1f}  fits {', '.join(fits) or 'none of 12, 16 and 24 GB'}")


def fill_in(args):
    """The options that were left open, as on GPUs"""
    args.dtype, args.micro_batch = args.dtype or "bfloat16", args.micro_batch or max(1, args.batch // args.nproc)
    if args.batch % (args.nproc * args.micro_batch):
        raise UserError(f"--batch {args.batch} does not divide into {args.nproc} GPUs with --micro-batch "
                        f"{args.micro_batch}")


def read_sizes(llm, image_tokenizer=None, **changes):
    """-> LibraConfig, ImageTokenizerConfig of these folders; the paper's where a folder is not given"""
    clip_config = ImageTokenizerConfig(clip=CLIP_L)
    if image_tokenizer or llm and find_image_tokenizer(llm):
        clip_config, _ = read_image_config(image_tokenizer or llm)
    visual = vision_sizes(clip_config)
    config = LibraConfig.from_file(Path(llm) / "config.json", visual, **changes) if llm else (
        LibraConfig(**visual, **changes))
    if config.image_tokens + 3 > config.max_position_embeddings:
        raise UserError(f"a picture has {config.image_tokens} tokens, {llm or 'this model'} takes "
                        f"{config.max_position_embeddings} in all: name an image tokenizer with a smaller grid "
                        "(pretrain.py --image-tokenizer)")
    return config, clip_config


@contextmanager
def default_dtype(dtype):
    """New weights have this type: fake ones cannot be cast"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------- weights

def part_of(name):
    """The part of Libra that a weight belongs to"""
    if "bridge" in name:
        return "bridge"
    if "vision" not in name:
        return "LLaMA"
    return "expert" if "layers." in name else "image input and heads"


def one_layer(config, train_llama):
    """-> a Libra of one layer, without memory"""
    with shapes_only():
        model = Libra(replace(config, num_hidden_layers=1)).tie_weights()
    for p in model.llama_parameters():
        p.requires_grad_(train_llama)
    return model


def libra_weights(config, train_llama):
    """-> {part: (number of weights, whether they learn)}"""
    parts = {}
    for name, p in one_layer(config, train_llama).named_parameters():
        number = p.numel() * (config.num_hidden_layers if ".layers." in name else 1)
        parts[part_of(name)] = parts.get(part_of(name), (0,))[0] + number, p.requires_grad
    return parts


def tokenizer_costs(clip_config):
    """-> number of an image tokenizer's weights, FLOPs of the forward pass of its CLIP for one image"""
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokenizer = ImageTokenizer(clip_config)
        tokenizer.signal(torch.empty(1, 3, clip_config.resolution, clip_config.resolution))
    return sum(p.numel() for p in tokenizer.parameters()), counter.get_total_flops()


# ---------------------------------------------------------------- FLOPs

def token_counts(streams):
    """Targets (text, image), tokens, and the squares of the rows' lengths, of a batch"""
    return {"text": len(streams.text_rows), "image": len(streams.image_rows), "text_tokens": len(streams.text_ids),
            "image_tokens": len(streams.image_ids), "tokens": sum(streams.lengths),
            "squares": sum(n * n for n in streams.lengths)}


def flops_of(config, clip_config, train_llama):
    """-> f(token_counts and number of images) -> {part: FLOPs}, forward and backward. Recomputed activations are not
    counted, nor is the upper half of causal attention."""
    c, model = config, one_layer(config, train_llama)

    def matrices(module, part=None):
        """FLOPs of a module's matrices for one token: two an element for the product, two for the gradient of its
        input, two for the gradient of the matrix if it is trained"""
        return sum((6 if p.requires_grad else 4) * p.numel() for name, p in module.named_parameters()
                   if p.dim() == 2 and part in (None, part_of(f"layers.{name}")))
    text, expert, bridge = (c.num_hidden_layers * matrices(model.model.layers, part)
                            for part in ("LLaMA", "expert", "bridge"))
    image_input = matrices(model.model.vision_contiguous_signal_processor)
    image_heads, text_head = matrices(model.vision_lm_head), matrices(model.lm_head)
    attention = 6 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    clip = cache(lambda: tokenizer_costs(clip_config)[1])    # not counted before it is needed: it takes a second

    def flops(n):
        return {"expert" if c.use_expert else "LLaMA on images": n["image_tokens"] * (expert or text),
                "LLaMA": n["text_tokens"] * text,
                "bridge": (n["text_tokens"] + n["image_tokens"]) * bridge / 2,     # a token passes one of the two
                "attention": n["squares"] * attention, "CLIP": n["images"] * clip(),
                "input and heads": n["image_tokens"] * image_input + n["image"] * image_heads + n["text"] * text_head}
    return flops


# ---------------------------------------------------------------- memory

def saved_bytes(weights, forward):
    """Bytes that autograd saves for the backward pass of forward(), each storage once, without the weights"""
    known, saved = {p.untyped_storage()._cdata for p in weights}, {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()                               # alive until all are counted
    del outputs
    return sum(size for key, size in saved.items() if key not in known)


def longest_text(args, config):
    """Tokens of text beside an image in the longest rows of --max-length"""
    return max(1, min(args.max_length, config.max_position_embeddings) - config.image_tokens - 2)


def example_batch(config, samples, text_tokens, train_llama):
    """Rows of <s>, an image, a newline and text. Targets: image and text in pretraining, half of the text in SFT"""
    ids = [1, IMG, config.newline_token_id] + [config.vocab_size - 1] * text_tokens
    prompt = text_tokens // 2
    loss_mask = [0] * (3 + prompt) + [1] * (text_tokens - prompt) if train_llama else [0, 1, 0] + [1] * text_tokens
    codes = torch.zeros(config.image_feature_resolution ** 2, config.vision_codebook_num, dtype=torch.long)
    ids, loss_mask = expand_images(ids, loss_mask, [codes], config)
    return Streams.from_ids([ids] * samples, config, loss_mask=[loss_mask] * samples)


def activation_bytes(config, streams, train_llama, dtype, args):
    """Bytes that a pass saves, from models of one and of two layers. args: --checkpoint-activations, --compile"""
    def measure(layers):
        with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(dtype):     # autocast's copies count as weights
            model = Libra(replace(config, num_hidden_layers=layers, contiguous_targets=False))
            for p in model.llama_parameters():
                p.requires_grad_(train_llama)
            signal = torch.empty(len(streams.image_ids), config.contiguous_signal_size, dtype=dtype)
            return saved_bytes(model.parameters(), lambda: model.loss(streams, signal))
    one, two = measure(1), measure(2)
    inputs = sum(streams.lengths) * config.hidden_size * dtype.itemsize
    layer = (two - one) * (COMPILED if args.compile else 1)
    return 2 * one - two + layer + (config.num_hidden_layers - 1) * (inputs if args.checkpoint_activations else layer)


def gpu_bytes(trained, frozen, engine, nproc, dtype, layers, offload=False):
    """Bytes of weights, gradients and AdamW, from the numbers of weights. Trained weights are float32 with a copy in
    `dtype` to compute with, frozen ones are `dtype`. zero shards gradients, AdamW and float32 weights; fsdp shards all
    and gathers two layers at a time. offload: the shards are in the CPU's memory."""
    b = dtype.itemsize
    if engine == "ddp":                                   # its buckets are the gradients themselves
        return {"frozen": frozen * b, "weights": trained * (4 + (b if b < 4 else 0)), "gradients": trained * 4,
                "AdamW": trained * 8}
    shard, gathered = 0 if offload else 1 / nproc, 1 if engine == "zero" else min(1, 2 / layers)
    gradients = 1 if offload and engine == "zero" else shard                  # they move to the CPU once an update
    return {"frozen": frozen * b * min(1, gathered + shard), "weights": trained * (4 * shard + b * gathered),
            "gradients": trained * 4 * (gradients + 1 / layers), "AdamW": trained * 8 * shard}


def cpu_bytes(trained, frozen, engine, nproc, dtype, offload):
    """Bytes of the CPU's memory for all processes, during training and while saving, without Python and the data.
    Checkpoints are copied to it, with ddp by every process; the first process gathers the finished model."""
    training = offload * (16 * trained + frozen * dtype.itemsize * (engine == "fsdp"))
    checkpoint = 12 * trained * (nproc if engine == "ddp" else 1)
    return training, training + max(checkpoint, (4 + dtype.itemsize) * trained + dtype.itemsize * frozen)


def memory_of(args, weights, more, dtype, layers, engines=("ddp",)):
    """weights: {part: (number, learns)}; more: {part: bytes of a GPU} -> lines, the first engine that fits --memory of
    --gpus, or None"""
    trained, frozen = (sum(n for n, learns in weights.values() if learns == wanted) for wanted in (True, False))
    kept, fits = "recomputed" if args.checkpoint_activations else "kept", None
    lines = [f"GB of a GPU ({args.dtype}, activations {kept}) | of the CPU's memory, all processes"]
    for engine in engines:
        parts = gpu_bytes(trained, frozen, engine, args.nproc, dtype, layers, args.offload) | more
        total, cpu = sum(parts.values()), cpu_bytes(trained, frozen, engine, args.nproc, dtype, args.offload)
        if not fits and total < ROOM * args.memory * 1e9 and not (args.offload and engine == "ddp"):
            fits = engine
        lines += [f"  {engine:6}{total / 1e9:8.1f} = " + " + ".join(f"{p} {n / 1e9:.1f}" for p, n in parts.items())
                  + f" | {cpu[0] / 1e9:.0f}, while saving {cpu[1] / 1e9:.0f}"]
    advice = "none; a smaller --micro-batch, --checkpoint-activations or --offload need less"
    return "\n".join([*lines, f"  the first that fits {args.memory:.4g} GB: {fits or advice}"]), fits


def libra_memory(args, config, clip_config, train_llama):
    """-> what memory_of returns, for passes of --micro-batch rows of the greatest length"""
    rows, dtype = min(args.micro_batch, 64), DTYPES[args.dtype]                # more are many times the same
    streams = example_batch(config, rows, longest_text(args, config), train_llama)
    activations = activation_bytes(config, streams, train_llama, dtype, args) * args.micro_batch / rows
    more = {"image tokenizer": 4 * tokenizer_costs(clip_config)[0], "activations": activations}
    return memory_of(args, libra_weights(config, train_llama), more, dtype, config.num_hidden_layers, ENGINES)


def choose_engine(args, dist, model):
    """--engine auto on several processes: the first engine that fits the device's memory"""
    if args.engine != "auto":
        return
    if dist.device.type == "cuda":
        memory = torch.cuda.mem_get_info(dist.device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / dist.size
    memory = torch.tensor(float(memory), dtype=torch.float64, device=dist.device)
    torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MIN)      # all must choose the same
    here = argparse.Namespace(**vars(args) | {"nproc": dist.size, "memory": float(memory) / 1e9})
    lines, fits = libra_memory(here, model.config, model.tokenizers.image.config, model.lm_head.weight.requires_grad)
    args.engine = fits or "fsdp"
    dist.print0(f"{lines}\n--engine auto: {args.engine}")


if __name__ == "__main__":
    run(main)
