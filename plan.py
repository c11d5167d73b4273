"""--plan: what a run will need before anything is paid for. Parameters, memory of a GPU, FLOPs, hours.

    python pretrain.py --plan --nproc 8 --memory 80          # the paper's run on eight GPUs of 80 GB
    python sft.py --plan --model runs/toy/pretrain           # any model folder: only config.json files are read
    python train_tokenizer.py --plan --clip clip-vit-large-patch14-336

Nothing is allocated. Products are counted from the weights' shapes; what the backward pass keeps is counted while the
very model runs on tensors without content (torch's fake tensors).
"""
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from command import DTYPES
from config import LibraConfig
from engine import ENGINES
from model import Libra
from streams import Streams
from text import IMG, spell_out
from tokenizer import ImageTokenizer, ImageTokenizerConfig
from weights import UserError, read_json, shapes_only

PAPER_HOURS, PAPER_SAMPLES, A100 = 8400, 40_000 * 1280, 312e12                                # Tab. 4, Sec. A.2; peak
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14, "layer_norm_eps": 1e-5}


def sizes(llm, image_tokenizer, **changes):
    """-> LibraConfig, ImageTokenizerConfig of the folders; of the paper's model for what is not named"""
    eye = ImageTokenizerConfig(clip=CLIP_L)
    if image_tokenizer:
        folder = Path(image_tokenizer)
        folder = folder / "image_tokenizer" if (folder / "image_tokenizer").is_dir() else folder
        published = (folder / "vision_tokenizer_config.yaml").is_file()
        if not published and "clip" in (values := read_json(folder / "config.json")):
            eye = ImageTokenizerConfig(**values)
        elif not published and image_tokenizer != llm:    # of a LLaMA alone the published tokenizer is supposed
            raise UserError(f"{folder}: no image tokenizer")
    visual = {"vision_vocab_size": eye.codebook_size + 2, "vision_codebook_num": eye.num_codebooks,
              "image_feature_resolution": eye.grid, "contiguous_signal_size": eye.signal_size}
    config = LibraConfig.from_file(Path(llm) / "config.json", visual, **changes) if llm else (
        LibraConfig(**visual, **changes))
    if config.image_tokens + 2 > config.max_position_embeddings:
        raise UserError(f"a picture has {config.image_tokens} tokens, {llm or 'this model'} takes "
                        f"{config.max_position_embeddings} in all: name an image tokenizer with a smaller grid "
                        "(pretrain.py --image-tokenizer)")
    return config, eye


# ---------------------------------------------------------------- FLOPs

def products(modules):
    """FLOPs of forward and backward of these matrices for one token: two each for the product and for the gradient of
    what goes in, two more for the gradient of a weight that learns"""
    return sum((6 if p.requires_grad else 4) * p.numel() for module in modules for p in module.parameters()
               if p.dim() == 2)


def flops_of(model, eye):
    """-> f(counts) -> {part: FLOPs} of a step in which this model met so many tokens. Recomputation is not counted, of
    causal attention one half. counts: text and image tokens, text_targets, image_targets, squares of the rows' lengths,
    images."""
    c, parts = model.config, {"LLaMA": [], "expert": [], "bridge on text": [], "bridge on images": []}
    for block in model.model.layers:
        for name, module in [*block.self_attn.named_children(), *block.mlp.named_children()]:
            part = ("LLaMA" if not name.startswith("vision") else "expert" if "bridge" not in name else
                    "bridge on text" if name.endswith("language") else "bridge on images")
            parts[part].append(module)
    each = {part: products(modules) for part, modules in parts.items()}
    each["expert"] = each["expert"] or each["LLaMA"]
    into, heads = products([model.model.vision_contiguous_signal_processor]), products([model.vision_lm_head])
    words, attention = products([model.lm_head]), 6 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    look = clip_flops(eye.clip, max(eye.select_layers))

    def count(n):
        return {"expert" if c.use_expert else "LLaMA on images": n["image"] * each["expert"],
                "LLaMA": n["text"] * each["LLaMA"],
                "bridge": n["text"] * each["bridge on text"] + n["image"] * each["bridge on images"],
                "attention": n["squares"] * attention, "CLIP": n["images"] * look,
                "input and heads": n["image"] * into + n["image_targets"] * heads + n["text_targets"] * words}
    return count


def clip_flops(sizes, layers):
    """One forward pass of the frozen CLIP up to the last layer that is read"""
    n, d = (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1, sizes["hidden_size"]
    each = 2 * n * (4 * d * d + 2 * d * sizes["intermediate_size"]) + 4 * n * n * d
    return layers * each + 2 * n * 3 * sizes["patch_size"] ** 2 * d


# ---------------------------------------------------------------- memory

class Kept:
    """Bytes that the backward pass keeps: every storage once, weights not"""

    def __init__(self, weights):
        self.known, self.bytes = {p.untyped_storage()._cdata for p in weights}, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def row(config, text_tokens, stage):
    """<s>, an image, newline, text -> ids, counted: all of it in pretraining, half of the text in SFT"""
    ids = [1, IMG, config.newline_token_id] + [config.vocab_size - 1] * text_tokens
    counted = [0, 1, 0] + [1] * text_tokens
    if stage == "sft":
        counted = [0] * (3 + text_tokens // 2) + [1] * (text_tokens - text_tokens // 2)
    blank = torch.zeros(config.image_feature_resolution ** 2, config.vision_codebook_num, dtype=torch.long)
    return spell_out(ids, counted, [blank], config)


def batch_of(config, samples, text_tokens, stage):
    rows = [row(config, text_tokens, stage)] * samples
    return Streams.of([ids for ids, _ in rows], config, counted=[counted for _, counted in rows])


def kept_by(config, streams, train_llama, dtype):
    """Bytes that one pass keeps for its backward pass"""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Libra(config)
        llama = set(model.llama())
        for module in model.leaves():                     # the copies of autocast are counted as weights, not here
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.to(dtype), train_llama or module not in llama))
        kept = Kept(model.parameters())
        signal = torch.empty(len(streams.image_ids), config.contiguous_signal_size, dtype=dtype)
        with kept.hooks:
            model.loss(streams, signal)
    return kept.bytes


def activations(config, streams, train_llama, dtype, again):
    """As kept_by, from models of one and of two layers; the targets do not matter. again: layers keep what goes into
    them and compute the rest again, one at a time."""
    one, two = (kept_by(LibraConfig(**(asdict(config) | {"num_hidden_layers": n, "contiguous_targets": False})),
                        streams, train_llama, dtype) for n in (1, 2))
    layer, tokens = two - one, len(streams.text_ids) + len(streams.image_ids)
    return one + (config.num_hidden_layers - 1) * (tokens * config.hidden_size * dtype.itemsize if again else layer)


def bytes_per_gpu(trained, frozen, engine, nproc, dtype, layers, offload=False):
    """Weights, gradients and AdamW. Trained weights are float32 with a copy in `dtype` for the products; frozen ones
    are `dtype`. zero: gradients, AdamW and the float32 weights in shares, the copies whole; fsdp: all in shares, two
    layers at a time whole. offload: the shares are in the CPU's memory."""
    b = dtype.itemsize
    copy = b if b < 4 else 0
    if engine == "ddp":
        return {"frozen": frozen * b, "weights": trained * (4 + copy), "gradients": trained * (4 + 4 * (nproc > 1)),
                "AdamW": trained * 8}                     # replicas keep a second copy of the gradients, in buckets
    share, whole = 1 / nproc, (1 if engine == "zero" else min(1, 2 / layers))
    stay = share                                          # of the gradients
    if offload:                                           # zero brings them to the CPU once an update, fsdp each pass
        share, stay = 0, 1 if engine == "zero" else 0
    return {"frozen": frozen * b * (1 if engine == "zero" else min(1, share + whole)),
            "weights": trained * (4 * share + b * whole), "gradients": trained * 4 * (stay + 1 / layers),
            "AdamW": trained * 8 * share}


def needs(args, model, eye, streams, nproc, dtype):
    """-> {engine: {part: bytes}} of one GPU: weights, gradients, AdamW, the frozen image tokenizer, activations"""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen, layers = sum(p.numel() for p in model.parameters()) - trained, model.config.num_hidden_layers
    with shapes_only():
        see = {"image tokenizer": 4 * sum(p.numel() for p in ImageTokenizer(eye).parameters())}
    kept = {"activations": activations(model.config, streams, model.lm_head.weight.requires_grad, dtype,
                                       args.checkpoint_activations)}
    return {engine: bytes_per_gpu(trained, frozen, engine, nproc, dtype, layers, args.offload) | see | kept
            for engine in ENGINES}


ROOM = 0.92                    # of a GPU's memory: the rest is the allocator's and CUDA's own


def choose_engine(args, world, model):
    """--engine auto: the first that fits the device's memory, activations of a pass included. engine.start has decided
    for one process alone."""
    if args.engine != "auto":
        return
    if world.device.type == "cuda":
        memory = torch.cuda.mem_get_info(world.device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.size
    memory = torch.tensor(float(memory), dtype=torch.float64, device=world.device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)            # one answer for unlike machines
    memory = float(memory)
    tune = model.lm_head.weight.requires_grad
    streams = batch_of(model.config, args.micro_batch, args.text_tokens, "sft" if tune else "pretrain")
    found = needs(args, model, model.tokenizers.image.config, streams, world.size, world.dtype)
    found = {engine: sum(parts.values()) for engine, parts in found.items()}
    fits = [engine for engine in ENGINES[args.offload:] if found[engine] < ROOM * memory]     # ddp cannot offload
    args.engine = fits[0] if fits else "fsdp"
    world.say(f"--engine auto: {args.engine} (GB needed: "
              + ", ".join(f"{engine} {size / 1e9:.1f}" for engine, size in found.items())
              + f"; a device has {memory / 1e9:.0f})"
              + ("" if fits else "\nWARNING: none of them fits; a smaller --micro-batch, --checkpoint-activations or "
                 "--offload need less"))


# ---------------------------------------------------------------- the table

def show(args, config, eye, stage):
    """Print the plan of pretraining or of instruction tuning."""
    dtype, tune, n = DTYPES[args.dtype or "bfloat16"], stage == "sft", args.nproc
    micro = args.micro_batch or max(1, args.batch // n)
    if args.batch % (n * micro):
        raise UserError(f"--batch {args.batch} does not divide into {n} GPUs with --micro-batch {micro}")
    streams = batch_of(config, micro, args.text_tokens, stage)
    with shapes_only():
        model, see = Libra(config), ImageTokenizer(eye)
    for module in [] if tune else model.llama():
        module.requires_grad_(False)
    print(f"{stage}: {config.num_hidden_layers} layers of {config.hidden_size}; {micro} samples a pass, an image of "
          f"{config.image_tokens} tokens and {args.text_tokens} of text; {n} GPUs\n\nweights")
    parts = {}
    for name, p in model.named_parameters():
        part = ("bridge" if "bridge" in name else "LLaMA" if "vision" not in name else
                "expert" if ".layers." in name else "image input and heads")
        parts.setdefault(part, []).append(p)
    for part, some in (parts | {"image tokenizer, frozen": list(see.parameters())}).items():
        learns = part != "image tokenizer, frozen" and some[0].requires_grad
        print(f"  {part:24}{sum(p.numel() for p in some) / 1e9:9.3f} B  {'learns' if learns else ''}")
    table(args, needs(args, model, eye, streams, n, dtype), dtype,
          sum(p.numel() for p in model.parameters() if p.requires_grad))
    counts = {"text": len(streams.text_ids), "image": len(streams.image_ids), "text_targets": len(streams.text_rows),
              "image_targets": len(streams.image_rows), "squares": sum(m * m for m in streams.lengths), "images": micro}
    flops = {part: count / micro for part, count in flops_of(model, eye)(counts).items()}
    whole = sum(flops.values())
    print(f"\nTFLOP of a sample, forward and backward: {whole / 1e12:.4g}")
    for part, count in flops.items():
        print(f"  {part:24}{count / 1e12:9.4f}   {count / whole:.0%}")
    hours = whole * args.batch * args.steps / (args.tflops * 1e12) / 3600
    print(f"\n{args.steps} steps of {args.batch} at {args.tflops:g} TFLOP/s a GPU: {hours:,.0f} GPU hours, "
          f"{hours / n:,.0f} hours on {n}, to which --checkpoint-activations and --offload add theirs")
    paper = LibraConfig()
    if stage == "pretrain" and (config.hidden_size, config.num_hidden_layers) == (
            paper.hidden_size, paper.num_hidden_layers):
        print(f"the paper's {PAPER_HOURS} A100 hours for {PAPER_SAMPLES / 1e6:.1f} M samples at this cost: "
              f"{whole * PAPER_SAMPLES / (PAPER_HOURS * 3600 * A100):.0%} of that GPU's peak")


def table(args, found, dtype, trained):
    print(f"\nGB of a GPU ({str(dtype).removeprefix('torch.')}, activations "
          f"{'computed again' if args.checkpoint_activations else 'kept'})")
    fits = None
    for engine, parts in found.items():
        total = sum(parts.values()) / 1e9
        allowed = engine != "ddp" or not args.offload
        fits = fits or (engine if allowed and total < ROOM * args.memory else None)
        print(f"  {engine:6}{total:8.1f} = " + " + ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items()))
    if args.offload:
        print(f"  --offload: {16 * trained / args.nproc / 1e9:.0f} GB of the CPU's memory a process, "
              f"{28 * trained / args.nproc / 1e9:.0f} while a checkpoint is written")
    print(f"  the first that fits {args.memory:g} GB: {fits or 'none'}"
          + ("" if fits else "; try a smaller --micro-batch" + " or --checkpoint-activations" * (len(found) > 1)))


def kept_by_tokenizer(trained, discriminator, lpips, pixels, dtype):
    """Bytes that one pass of stage 0 over `pixels` keeps for its backward pass: the reconstruction in `dtype`, but what
    goes into and comes out of norms in float32, as on CUDA; and in float32 what LPIPS (None: left out) and the
    discriminator keep."""
    norms = [module.register_forward_pre_hook(lambda _, x: (x[0].float(),))
             for module in trained.modules() if isinstance(module, torch.nn.GroupNorm)]
    kept = Kept([p for module in filter(None, (trained, discriminator, lpips)) for p in module.parameters()])
    with kept.hooks:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            picture, _, losses = trained(pixels)
        losses["judged"] = discriminator(picture.float()), lpips and lpips(picture.float(), pixels)  # alive to the end
    for norm in norms:
        norm.remove()
    return kept.bytes


def show_tokenizer(args, trained, discriminator, lpips, resolution):
    """Print the plan of stage 0. trained: what a step runs, a function of pictures; the modules have no memory"""
    dtype, micro = DTYPES[args.dtype or "bfloat16"], args.micro_batch or max(1, args.batch // args.nproc)
    print(f"image tokenizer: {micro} pictures of {resolution} pixels a pass; {args.nproc} GPUs\n\nweights")
    eye, decoder = trained.tokenizer.encoder, trained.tokenizer.decoder
    learning = [p for m in (trained, discriminator) for p in m.parameters() if p.requires_grad]
    frozen = [p for p in trained.parameters() if not p.requires_grad]
    for part, module in (("encoder", eye), ("decoder", decoder), ("discriminator", discriminator)):
        some = list(module.parameters())
        print(f"  {part:24}{sum(p.numel() for p in some) / 1e9:9.3f} B  {'learns' if some[0].requires_grad else ''}")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in filter(None, (trained, discriminator, lpips)):
            module.to_empty(device="cpu")
        kept = kept_by_tokenizer(trained, discriminator, lpips, torch.empty(micro, 3, resolution, resolution), dtype)
        with FlopCounterMode(display=False) as counter:
            picture, _, losses = trained(torch.empty(1, 3, resolution, resolution))
            (picture.mean() + losses["loss"] - discriminator(picture).mean()).backward()
    n = sum(p.numel() for p in learning)
    whole = counter.get_total_flops()
    table(args, {"ddp": {"frozen": 4 * sum(p.numel() for p in frozen), "weights": 4 * n,
                         "gradients": n * (4 + 4 * (args.nproc > 1)), "AdamW": 8 * n,
                         "activations": kept}}, dtype, n)
    hours = whole * args.batch * args.steps / (args.tflops * 1e12) / 3600
    if not lpips:
        print("  without LPIPS's: name --vgg and --lpips to count it")
    if args.clip_weight:
        print("  without what --clip-weight's loss keeps")
    print(f"\nTFLOP of a picture, forward and backward, LPIPS not counted: {whole / 1e12:.4g}\n"
          f"{args.steps} steps of {args.batch} at {args.tflops:g} TFLOP/s a GPU: {hours:,.0f} GPU hours")
