"""What a run will need: parameters, memory of a GPU, FLOPs, hours. Nothing is allocated.

    python -m training.plan pretrain --gpus 8 --memory 80 --micro-batch 8        # the paper's run
    python -m training.plan sft --gpus 1 --memory 24 --model runs/toy/pretrain   # a folder's config.json is enough
    python -m training.plan train_tokenizer --clip clip-vit-large-patch14-336

--gpus N (8), --memory GB of a GPU (80), --tflops TFLOP/s that a GPU reaches (150), --text-tokens of a sample on average
(50 in pretraining, 300 in tuning); all other options are the trainer's. FLOPs are counted from the weights' shapes. The
memory of activations is measured by running the model on torch's fake tensors, which have shapes and no content.
"""
import importlib
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common.cli import DTYPES, run
from common.config import make_config
from common.weights import UserError, read_json, shapes_only
from model import Libra, LibraConfig, vision_sizes
from streams import Streams
from text import IMG, expand_images
from tokenizer import ImageTokenizer, ImageTokenizerConfig
from training.engine import ENGINES

PAPER_HOURS, PAPER_SAMPLES, A100 = 8400, 40_000 * 1280, 312e12                                # Tab. 4, Sec. A.2; peak
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14, "layer_norm_eps": 1e-5}
COMPILED = 0.64                # share of a layer's activations that is saved with --compile, see docs/speed.md
ROOM = 0.92                    # share of a GPU's memory that a run can use; the rest is the allocator's and CUDA's


def main():
    stage = sys.argv[1] if len(sys.argv) > 1 else ""
    if stage not in ("pretrain", "sft", "train_tokenizer"):
        sys.exit(__doc__)
    sys.argv = [f"{stage}.py", "--plan", *sys.argv[2:]]
    importlib.import_module(stage).main()


def sizes(llm, image_tokenizer, **changes):
    """-> LibraConfig, ImageTokenizerConfig of these folders; the paper's where a folder is not given"""
    clip_config = ImageTokenizerConfig(clip=CLIP_L)
    if image_tokenizer:
        folder = Path(image_tokenizer)
        folder = folder / "image_tokenizer" if (folder / "image_tokenizer").is_dir() else folder
        published = (folder / "vision_tokenizer_config.yaml").is_file()
        if not published and "clip" in (values := read_json(folder / "config.json")):
            clip_config = make_config(ImageTokenizerConfig, values, folder / "config.json")
        elif not published and image_tokenizer != llm:    # beside a LLaMA alone: the published tokenizer
            raise UserError(f"{folder}: no image tokenizer")
    visual = vision_sizes(clip_config)
    config = LibraConfig.from_file(Path(llm) / "config.json", visual, **changes) if llm else (
        LibraConfig(**visual, **changes))
    if config.image_tokens + 2 > config.max_position_embeddings:
        raise UserError(f"a picture has {config.image_tokens} tokens, {llm or 'this model'} takes "
                        f"{config.max_position_embeddings} in all: name an image tokenizer with a smaller grid "
                        "(pretrain.py --image-tokenizer)")
    return config, clip_config


# ---------------------------------------------------------------- FLOPs

def token_counts(streams):
    """Targets (text, image), tokens, and the squares of the rows' lengths, of a batch"""
    return {"text": len(streams.text_rows), "image": len(streams.image_rows), "text_tokens": len(streams.text_ids),
            "image_tokens": len(streams.image_ids), "tokens": sum(streams.lengths),
            "squares": sum(n * n for n in streams.lengths)}


def part_of(name):
    """The part of the model that a weight belongs to"""
    if "bridge" in name:
        return "bridge"
    if "vision" not in name:
        return "LLaMA"
    return "expert" if "layers." in name else "image input and heads"


def linear_flops(parameters):
    """FLOPs of matrices for one token: two an element for the product, two for the gradient of its input, two for the
    gradient of the matrix if it is trained"""
    return sum((6 if p.requires_grad else 4) * p.numel() for p in parameters if p.dim() == 2)


def flops_of(model, clip_config):
    """-> f(token_counts and number of images) -> {part: FLOPs}, forward and backward. Recomputed activations are not
    counted, nor is the upper half of causal attention."""
    c, layers = model.config, {"LLaMA": [], "expert": [], "bridge": []}
    for name, p in model.named_parameters():
        if ".layers." in name:
            layers[part_of(name)].append(p)
    text, expert, bridge = (linear_flops(parameters) for parameters in layers.values())
    image_input = linear_flops(model.model.vision_contiguous_signal_processor.parameters())
    image_heads, text_head = linear_flops(model.vision_lm_head.parameters()), linear_flops(model.lm_head.parameters())
    attention = 6 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    clip = clip_flops(clip_config.clip, max(clip_config.select_layers))

    def flops(n):
        return {"expert" if c.use_expert else "LLaMA on images": n["image_tokens"] * (expert or text),
                "LLaMA": n["text_tokens"] * text,
                "bridge": (n["text_tokens"] + n["image_tokens"]) * bridge / 2,     # a token passes one of the two
                "attention": n["squares"] * attention, "CLIP": n["images"] * clip,
                "input and heads": n["image_tokens"] * image_input + n["image"] * image_heads + n["text"] * text_head}
    return flops


def clip_flops(sizes, layers):
    """FLOPs of a forward pass of the frozen CLIP for one image"""
    n, d = (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1, sizes["hidden_size"]
    per_layer = 2 * n * (4 * d * d + 2 * d * sizes["intermediate_size"]) + 4 * n * n * d
    return layers * per_layer + 2 * n * 3 * sizes["patch_size"] ** 2 * d


# ---------------------------------------------------------------- memory

class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, each storage once, without the weights."""

    def __init__(self, weights):
        self.known, self.bytes = {p.untyped_storage()._cdata for p in weights}, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def example_batch(config, samples, text_tokens, stage):
    """Rows of <s>, an image, a newline and text. Targets: image and text in pretraining, half of the text in SFT"""
    ids = [1, IMG, config.newline_token_id] + [config.vocab_size - 1] * text_tokens
    prompt = text_tokens // 2
    loss_mask = [0] * (3 + prompt) + [1] * (text_tokens - prompt) if stage == "sft" else [0, 1, 0] + [1] * text_tokens
    codes = torch.zeros(config.image_feature_resolution ** 2, config.vision_codebook_num, dtype=torch.long)
    ids, loss_mask = expand_images(ids, loss_mask, [codes], config)
    return Streams.from_ids([ids] * samples, config, loss_mask=[loss_mask] * samples)


def activation_bytes(config, streams, train_llama, dtype, args):
    """Bytes that a pass saves, from models of one and of two layers. args: --checkpoint-activations, --compile"""
    saved = []
    for n in (1, 2):
        small = LibraConfig(**(asdict(config) | {"num_hidden_layers": n, "contiguous_targets": False}))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = Libra(small)
            llama = set(model.llama_modules())
            for module in model.leaf_modules():           # in `dtype`: autocast's copies are counted as weights
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(p.to(dtype), train_llama or module not in llama))
            counter = SavedBytes(model.parameters())
            with counter.hooks:
                model.loss(streams, torch.empty(len(streams.image_ids), config.contiguous_signal_size, dtype=dtype))
        saved.append(counter.bytes)
    inputs = sum(streams.lengths) * config.hidden_size * dtype.itemsize
    layer, outside = saved[1] - saved[0], 2 * saved[0] - saved[1]
    layer = layer * COMPILED if args.compile else layer
    return outside + layer + (config.num_hidden_layers - 1) * (inputs if args.checkpoint_activations else layer)


def bytes_per_gpu(trained, frozen, engine, nproc, dtype, layers, offload=False):
    """Bytes of weights, gradients and AdamW, from the numbers of weights. Trained weights are float32 with a copy in
    `dtype` to compute with, frozen ones are `dtype`. zero shards gradients, AdamW and float32 weights; fsdp shards all
    and gathers two layers at a time. offload: the shards are in the CPU's memory."""
    b = dtype.itemsize
    if engine == "ddp":                                   # DDP's buckets are a second copy of the gradients
        return {"frozen": frozen * b, "weights": trained * (4 + (b if b < 4 else 0)),
                "gradients": trained * (4 + 4 * (nproc > 1)), "AdamW": trained * 8}
    shard, gathered = 0 if offload else 1 / nproc, 1 if engine == "zero" else min(1, 2 / layers)
    gradients = 1 if offload and engine == "zero" else shard                  # they move to the CPU once an update
    return {"frozen": frozen * b * min(1, gathered + shard), "weights": trained * (4 * shard + b * gathered),
            "gradients": trained * 4 * (gradients + 1 / layers), "AdamW": trained * 8 * shard}


def memory_plan(args, model, clip_config, stage, micro_batch, n_gpus, dtype, memory):
    """-> table of the engines' memory, the first engine that fits `memory` bytes"""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen, layers = sum(p.numel() for p in model.parameters()) - trained, model.config.num_hidden_layers
    with shapes_only():
        tokenizer = 4 * sum(p.numel() for p in ImageTokenizer(clip_config).parameters())
    streams = example_batch(model.config, micro_batch, args.text_tokens, stage)
    activations = activation_bytes(model.config, streams, stage == "sft", dtype, args)
    found = {engine: bytes_per_gpu(trained, frozen, engine, n_gpus, dtype, layers, args.offload)
             | {"image tokenizer": tokenizer, "activations": activations} for engine in ENGINES}
    table, engine = memory_table(args, found, dtype, memory)
    if args.offload:
        table += (f"\n  --offload: {16 * trained / n_gpus / 1e9:.0f} GB of the CPU's memory a process, "
                  f"{28 * trained / n_gpus / 1e9:.0f} while a checkpoint is written")
    return table, engine


def memory_table(args, found, dtype, memory):
    """found: {engine: {part: bytes}} -> text, the first engine that fits `memory` bytes, or None"""
    activations, fits = "recomputed" if args.checkpoint_activations else "kept", None
    lines = [f"GB of a GPU ({str(dtype).removeprefix('torch.')}, activations {activations})"]
    for engine, parts in found.items():
        total = sum(parts.values())
        if not fits and total < ROOM * memory and not (args.offload and engine == "ddp"):
            fits = engine
        lines.append(f"  {engine:6}{total / 1e9:8.1f} = "
                     + " + ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items()))
    advice = "none; a smaller --micro-batch, --checkpoint-activations or --offload need less"
    return "\n".join([*lines, f"  the first that fits {memory / 1e9:.4g} GB: {fits or advice}"]), fits


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
    stage = "sft" if model.lm_head.weight.requires_grad else "pretrain"
    table, fits = memory_plan(args, model, model.tokenizers.image.config, stage, args.micro_batch, dist.size,
                              dist.dtype, float(memory))
    args.engine = fits or "fsdp"
    dist.print0(f"{table}\n--engine auto: {args.engine}")


# ---------------------------------------------------------------- the printed plan

def show(args, config, clip_config, stage):
    """Print the plan of pretraining or of instruction tuning."""
    dtype, micro_batch = DTYPES[args.dtype or "bfloat16"], args.micro_batch or max(1, args.batch // args.nproc)
    if args.batch % (args.nproc * micro_batch):
        raise UserError(f"--batch {args.batch} does not divide into {args.nproc} GPUs with --micro-batch {micro_batch}")
    with shapes_only():
        model, image_tokenizer = Libra(config), ImageTokenizer(clip_config).requires_grad_(False)
    for module in model.llama_modules() if stage == "pretrain" else ():
        module.requires_grad_(False)
    print(f"{stage}: {config.num_hidden_layers} layers of {config.hidden_size}; {micro_batch} samples a pass, an image "
          f"of {config.image_tokens} tokens and {args.text_tokens} of text; {args.nproc} GPUs")
    parts = {}
    for name, p in model.named_parameters():
        parts.setdefault(part_of(name), []).append(p)
    show_weights(parts | {"image tokenizer": list(image_tokenizer.parameters())})
    print(memory_plan(args, model, clip_config, stage, micro_batch, args.nproc, dtype, args.memory * 1e9)[0])
    sample = example_batch(config, 1, args.text_tokens, stage)
    flops = flops_of(model, clip_config)(token_counts(sample) | {"images": 1})
    total = sum(flops.values())
    print(f"\nTFLOP of a sample, forward and backward: {total / 1e12:.4g}")
    for part, count in flops.items():
        print(f"  {part:24}{count / 1e12:9.4f}   {count / total:.0%}")
    show_hours(args, total)
    if stage == "pretrain" and config.hidden_size == 4096 and config.num_hidden_layers == 32:
        print(f"the paper's {PAPER_HOURS} A100 hours for {PAPER_SAMPLES / 1e6:.1f} M samples at this cost: "
              f"{total * PAPER_SAMPLES / (PAPER_HOURS * 3600 * A100):.0%} of that GPU's peak")


def show_tokenizer(args, trained, discriminator, lpips, resolution):
    """Print the plan of stage 0. trained(pixels): the generator's forward pass. All modules are without memory."""
    dtype, micro_batch = DTYPES[args.dtype or "bfloat16"], args.micro_batch or max(1, args.batch // args.nproc)
    print(f"image tokenizer: {micro_batch} pictures of {resolution} pixels a pass; {args.nproc} GPUs")
    parts = {"encoder": trained.tokenizer.encoder, "decoder": trained.tokenizer.decoder, "discriminator": discriminator}
    show_weights({name: list(module.parameters()) for name, module in parts.items()})
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in filter(None, (trained, discriminator, lpips)):
            module.to_empty(device="cpu")
        pixels = torch.empty(micro_batch, 3, resolution, resolution)
        activations = tokenizer_bytes(trained, discriminator, lpips, pixels, dtype)
        with FlopCounterMode(display=False) as counter:
            picture, _, losses = trained(pixels[:1])
            (picture.mean() + losses["loss"] - discriminator(picture).mean()).backward()
    frozen = sum(p.numel() for p in trained.parameters() if not p.requires_grad)
    learning = sum(p.numel() for module in (trained, discriminator) for p in module.parameters()) - frozen
    weights = bytes_per_gpu(learning, frozen, "ddp", args.nproc, torch.float32, 1)
    print(memory_table(args, {"ddp": weights | {"activations": activations}}, dtype, args.memory * 1e9)[0])
    print(f"  counted: LPIPS {'yes' if lpips else 'no, name --vgg and --lpips'}, --clip-weight no")
    print(f"\nTFLOP of a picture, forward and backward, without LPIPS: {counter.get_total_flops() / 1e12:.4g}")
    show_hours(args, counter.get_total_flops())


def tokenizer_bytes(trained, discriminator, lpips, pixels, dtype):
    """Bytes that a pass of stage 0 saves: the reconstruction in `dtype`, but its norms in float32, as autocast on CUDA
    does it; the discriminator and LPIPS (or None) in float32"""
    norms = [module.register_forward_pre_hook(lambda _, x: (x[0].float(),))
             for module in trained.modules() if isinstance(module, torch.nn.GroupNorm)]
    saved = SavedBytes([p for module in filter(None, (trained, discriminator, lpips)) for p in module.parameters()])
    with saved.hooks:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = trained(pixels)
        picture = outputs[0].float()
        outputs += (discriminator(picture), lpips and lpips(picture, pixels))              # alive until all are counted
    for norm in norms:
        norm.remove()
    return saved.bytes


def show_weights(parts):
    """parts: {name: parameters}"""
    print("\nweights")
    for part, parameters in parts.items():
        trained = "learns" if parameters[0].requires_grad else ""
        print(f"  {part:24}{sum(p.numel() for p in parameters) / 1e9:9.3f} B  {trained}")
    print()


def show_hours(args, flops):
    hours = flops * args.batch * args.steps / (args.tflops * 1e12) / 3600
    print(f"\n{args.steps} steps of {args.batch} at {args.tflops:g} TFLOP/s a GPU: {hours:,.0f} GPU hours, "
          f"{hours / args.nproc:,.0f} hours on {args.nproc}; recomputed activations and --offload add to it")


if __name__ == "__main__":
    run(main)
