"""Speed and memory: every row is a ratio, measured in one run against something named.

    python bench.py                                  # the CPU's rows (`make bench`), minutes
    python bench.py --rows decode --sizes medium     # some of them
    python bench.py --rows compile                   # a training step with its layers compiled
    python bench.py --gpu                            # one GPU: the full 11.3 B model in bfloat16

No machine is idle enough for absolute numbers: the sides of a row run in turn, several times, and the row gives the
median of their ratios. "Limit" is what cannot be avoided: the model's matrix products alone, at their shapes, on
buffers that are already there, and one stock causal attention a layer.
"""
import argparse
import gc
import io
import json
import platform
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import engine
import pretrain
from baselines import Bare, alone, by_masks, limit, products_of
from command import NATURAL, POSITIVE, Help, run, target
from config import LibraConfig
from data import Recipe, loader, open_source
from generation import RECORD_AFTER, generate
from measure import HEAD, Bench
from model import Libra, Tokenizers
from plan import CLIP_L, ROOM, bytes_per_gpu, flops_of
from products import product, together
from streams import Streams
from text import IMG, Text, spell_out
from tokenizer import ImageTokenizer, ImageTokenizerConfig
from train_tokenizer import DEMO
from weights import UserError, shapes_only

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
             "vocab_size": 512, "image_feature_resolution": 7, "contiguous_signal_size": 192, "vision_vocab_size": 258},
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
              "vocab_size": 4096, "contiguous_signal_size": 1024},
    "medium": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16,
               "vocab_size": 4096, "contiguous_signal_size": 1024},
    "layer": {"num_hidden_layers": 1},
    "full": {}}
LIMIT = "limit (products, one causal attention)"


# ---------------------------------------------------------------- what is measured

def model_of(bench, size, frozen=False, **changes):
    torch.manual_seed(0)
    with shapes_only():
        model = Libra(LibraConfig(**SIZES[size] | changes))
    model.to(bench.dtype).to_empty(device=bench.device)
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    for module in model.llama() if frozen else []:
        module.requires_grad_(False)
    return model


def sequence(config, length, images=1, seed=0):
    """<s>, images with a newline behind each, text to the end -> ids (L, K), counted (L,)"""
    g = torch.Generator().manual_seed(seed)
    rest = length - 1 - images * (config.image_tokens + 1)
    if rest < 1:
        raise UserError(f"{images} images do not fit into {length} tokens at this size")
    text = torch.randint(3, config.vocab_size, (rest,), generator=g).tolist()
    codes = torch.randint(config.codes, (images, config.image_tokens - 2, config.vision_codebook_num), generator=g)
    return spell_out([1, *[IMG, config.newline_token_id] * images, *text], [0, *[1, 0] * images, *[1] * rest],
                     list(codes), config)


def batch(bench, config, rows, length, images=1):
    """-> Streams and signal of rows alike in shape, different in content"""
    pairs = [sequence(config, length, images, seed) for seed in range(rows)]
    streams = Streams.of([ids for ids, _ in pairs], config, counted=[counted for _, counted in pairs])
    signal = torch.randn(rows * images, config.image_tokens - 2, config.contiguous_signal_size)
    return streams.to(bench.device), signal.to(bench.device, bench.dtype) if images else None


# ---------------------------------------------------------------- the rows

def step(model, forward):
    """-> a function: forward and backward of a mean loss"""
    def run():
        text, image = forward()
        ((text + image.mean()) / 1000).backward()
        model.zero_grad(set_to_none=True)
    return run


def train_rows(bench, size):
    """(a) against the limit, (b) against the authors' way: a pretraining step, LLaMA frozen"""
    model = model_of(bench, size, frozen=True)
    for rows, length, images in LAYOUTS.get(size, [(2, 640, 1)]):
        what = batch(bench, model.config, rows, length, images)
        ours = step(model, partial(model, *what))
        sides = {"ours": ours, LIMIT: limit(model, ours, rows, length)}
        if size in ("tiny", "small"):
            sides["the authors' way (masks, two score matrices)"] = step(model, partial(by_masks, model, *what))
        bench.row(f"training step, B {rows}, L {length}, {several(images)}", size, sides, rows * length, "tokens/s",
                  memory=bench.memory)
        if bench.device.type == "cuda":
            bench.rows[-1]["kernels"] = kernels(bench, ours)
            print("| attention runs on | " + ", ".join(name[:80] for name in bench.rows[-1]["kernels"]) + " |")


def compile_rows(bench, size):
    """(a) once more, with the layers compiled as --compile does"""
    model = model_of(bench, size, frozen=True)
    rows, length, images = LAYOUTS.get(size, [(2, 640, 1)])[0]
    ours = step(model, partial(model, *batch(bench, model.config, rows, length, images)))
    least = limit(model, ours, rows, length)
    for block in model.model.layers:
        block.compile()

    def plain():
        with torch.compiler.set_stance("force_eager"):
            ours()
    bench.row(f"training step compiled, B {rows}, L {length}, {several(images)}", size,
              {"ours": ours, "the same, not compiled": plain, LIMIT: least}, rows * length, "tokens/s",
              memory=bench.memory)


def kernels(bench, f):
    """The attention kernels that a call starts on the GPU"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(2):                                # of a single call little may be seen
            f()
            bench.wait()
    return sorted({event.key for event in profile.key_averages()
                   if any(name in event.key.lower() for name in ("flash", "fmha", "attention", "sdpa"))})


def several(images):
    return f"{images} image{'s' * (images > 1)}"


LAYOUTS = {"tiny": [(16, 80, 1)], "small": [(2, 640, 1), (1, 2048, 3)], "layer": [(1, 640, 1)]}   # rows, tokens, images


def prefill_rows(bench, size, length=640):
    """(e) a prompt with an image"""
    model = model_of(bench, size)
    length = length if model.config.image_tokens > 500 else length // 8
    ids, _ = sequence(model.config, length)
    signal = torch.randn(1, model.config.image_tokens - 2, model.config.contiguous_signal_size).to(
        bench.device, bench.dtype)

    def ours():
        next(iter(generate(model, [ids], signal, 8)))
    bench.row(f"prefill, L {length}, 1 image", size, {"ours": ours, LIMIT: limit(
        model, ours, 1, length, backward=False)}, length, "tokens/s", memory=bench.memory)


def decoding(bench, model, ids, signal, tokens):
    """-> a function that gives the seconds of `tokens` steps behind the first, which is the prefill, and behind those
    that on a GPU come before the step is recorded, and its recording"""
    ahead = 1 + RECORD_AFTER.get(bench.device.type, 0)

    def run():
        steps = generate(model, ids, signal, tokens + ahead)
        for _ in range(ahead):
            next(steps)
        return bench.seconds(lambda: [None for _ in steps] and None)
    return run


def decode_rows(bench, size, tokens=32):
    """(d) one token after another behind an image, against a plain LLaMA with a cache of that length, against the same
    products (matrix times vector) alone, and what share of the memory's bandwidth that is"""
    model = model_of(bench, size)
    length = 640 if model.config.image_tokens > 500 else 80
    ids, _ = sequence(model.config, length)
    plain, _ = sequence(model.config, length, images=0)
    signal = torch.randn(1, model.config.image_tokens - 2, model.config.contiguous_signal_size).to(
        bench.device, bench.dtype)
    ours = decoding(bench, model, [ids], signal, tokens)
    model.lay()                                           # our way: one product for weights of one input
    rest = [w for block in model.model.layers for w in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight)]
    rest, groups = rest + [model.lm_head.weight], list(model.of_one_input())
    weights, joints = [*sum(groups, []), *rest], [together(group) for group in groups]
    ours_of = rest + [w for joint, group in zip(joints, groups) for w in (group if joint is None else [joint])]
    stock, best = (alone(weights[0], [(w, (1, w.shape[1]), False, None) for w in some], False, multiply)
                   for multiply, some in ((None, weights), (product, ours_of)))
    size_of = sum(w.numel() * w.element_size() for w in weights)
    vector = torch.randn(min(size_of, 2 ** 31) // 4, device=bench.device)

    def many(f):
        return lambda: bench.seconds(lambda: [f() for _ in range(tokens)] and None)
    seconds = bench.row("decode, behind an image", size, {
        "ours": ours, "ours behind text only": decoding(bench, model, [plain], None, tokens),
        "products alone, stock": many(stock), "products alone, our way": many(best),
        "reading as many bytes": lambda: many(vector.sum)() * size_of / vector.nbytes},
        tokens, "tokens/s", memory=False)
    print(f"|  | {size} | {tokens * size_of / seconds / 1e9:.1f} GB/s of weights |")
    for rows in () if size == "medium" else (4, 16):       # minutes of prompts
        batched = decoding(bench, model, [ids] * rows, signal.expand(rows, -1, -1), tokens)
        bench.row(f"decode, batch {rows}", size, {"ours": batched}, rows * tokens, "tokens/s", memory=False, repeat=2)


def text_rows(bench, size, rows=2, length=640, tokens=32):
    """(c) text alone against transformers' LLaMA with its sdpa attention: the same weights, the same ids"""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return print("| text only | | | transformers is not installed: left out |")
    model = model_of(bench, size)
    c = model.config
    with torch.device(bench.device):
        theirs = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
            attn_implementation="sdpa")).to(bench.dtype)
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if k in theirs.state_dict()})
    streams, _ = batch(bench, c, rows, length, images=0)
    ids = streams.text_ids.view(rows, length)

    def their_step():
        theirs(input_ids=ids, labels=ids).loss.backward()
        theirs.zero_grad(set_to_none=True)
    bench.row(f"text only: training step, all trained, B {rows}, L {length}", size, {
        "ours": step(model, lambda: model(streams)), "transformers": their_step}, rows * length, "tokens/s",
        memory=bench.memory)

    @torch.inference_mode()
    def their_prefill():
        theirs(input_ids=ids[:1], use_cache=True, logits_to_keep=1)
    prompt = ids[0, :, None].expand(-1, c.vision_codebook_num).cpu()
    bench.row(f"text only: prefill, L {length}", size, {
        "ours": lambda: next(iter(generate(model, [prompt], None, 8))) is None, "transformers": their_prefill}, length,
        "tokens/s", memory=bench.memory)

    @torch.inference_mode()
    def their_decode():
        out = theirs(input_ids=ids[:1], use_cache=True, logits_to_keep=1)

        def go(out=out):
            for _ in range(tokens):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = theirs(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return bench.seconds(go)
    bench.row(f"text only: decode behind {length}", size, {"ours": decoding(bench, model, [prompt], None, tokens),
              "transformers": their_decode}, tokens, "tokens/s", memory=False)


def growth_rows(bench, size):
    """How the cost of a token grows with the length, the images and the batch: training step, LLaMA frozen"""
    model = model_of(bench, size, frozen=True, max_position_embeddings=4096)
    for rows, length, images in ((1, 640, 1), (1, 1280, 1), (1, 2560, 1), (1, 2560, 2), (1, 2560, 4), (2, 640, 1),
                                 (4, 640, 1), (16, 640, 1)):
        length = length if size != "tiny" else length // 8
        ours = step(model, partial(model, *batch(bench, model.config, rows, length, images)))
        bench.row(f"training step, B {rows}, L {length}, {several(images)}", size, {"ours": ours}, rows * length,
                  "tokens/s", memory=bench.memory, repeat=1 if rows * length > 2000 else 3)


def eye_sizes(size):
    """The published image tokenizer; at size tiny that of `make demo`"""
    return {"clip": CLIP_L} if size != "tiny" else {
        "clip": CLIP_L | {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                          "image_size": 56, "patch_size": 8},
        "resolution": 56, "grid": 7} | DEMO


def tokenizer_rows(bench, size):
    """(g) pictures to ids and back, against the products and convolutions alone"""
    with torch.device(bench.device):
        tokenizer = ImageTokenizer(ImageTokenizerConfig(**eye_sizes(size))).to(bench.dtype).eval()
    rows, resolution = (8 if size == "full" else 32), tokenizer.config.resolution
    pixels = torch.randn(rows, 3, resolution, resolution, device=bench.device, dtype=bench.dtype)
    with torch.inference_mode():
        ids = tokenizer.encode(pixels)[0]
        for name, f in (("encode", lambda: tokenizer.encode(pixels)), ("decode", lambda: tokenizer.decode(ids))):
            with products_of(tokenizer) as seen:
                f()
            bench.row(f"image tokenizer: {name}", f"{resolution} pixels", {
                "ours": torch.inference_mode()(lambda f=f: f() is None),
                "products alone": alone(pixels, seen, backward=False)}, rows, "images/s", memory=bench.memory)


# ---------------------------------------------------------------- reading pictures

def write_shard(folder, count):
    """A tar shard of pictures of 500 x 400 pixels with captions, and a SentencePiece model. -> the JPEG files, Text"""
    import sentencepiece
    random, pictures, caption = np.random.default_rng(0), [], "a large red circle in the top left"
    with tarfile.open(f"{folder}/00000.tar", "w") as tar:
        for i in range(count):
            file, coarse = io.BytesIO(), random.integers(0, 256, (50, 63, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            pictures.append(file.getvalue())
            for ending, part in (("jpg", pictures[-1]), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:09d}.{ending}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption] * 4), model_prefix=f"{folder}/tokenizer", vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2)
    return pictures, Text(Path(folder) / "tokenizer.model")


def data_rows(bench, size, count=128, resolution=336):
    """(h) from a tar shard to training batches, without a worker and with one"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                              # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        pictures, text = write_shard(folder, count)
        config = LibraConfig(vocab_size=text.vocab_size, newline_token_id=text.newline)
        source, recipe = open_source(f"{folder}/00000.tar"), Recipe(text, config, resolution, 700)
        for workers in (0, 1):
            ours = iter(loader([source], recipe, 16, 16, 0, workers=workers)[0])
            bare = torch.utils.data.DataLoader(Bare(pictures, resolution), 16, num_workers=workers,
                                               persistent_workers=workers > 0)
            bench.row(f"reading pictures, {workers} workers", f"{resolution} pixels", {
                "ours": lambda ours=ours: [next(ours) for _ in range(count // 16)] and None,
                "DataLoader and PIL alone": lambda bare=bare: [None for _ in bare] and None}, count, "images/s",
                memory=False)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- the whole run on a GPU

def whole_rows(bench, size):
    """Pretraining as pretrain.py does it: a shard through the real loader, CLIP, forward, backward, AdamW. The
    micro-batch doubles until memory is full, with activations kept and computed again."""
    layers = layers_that_fit(bench, size)
    model = model_of(bench, size, frozen=True, num_hidden_layers=layers)
    with tempfile.TemporaryDirectory() as folder:
        _, text = write_shard(folder, 128)
        model.config.newline_token_id = text.newline
        with torch.device(bench.device):
            eye = ImageTokenizer(ImageTokenizerConfig(**eye_sizes(size)))
        model.tokenizers = Tokenizers(text, eye.to(bench.dtype).requires_grad_(False).eval())
        world = engine.World(0, 1, bench.device, bench.dtype)
        engine.settle(model, world)
        source = open_source(f"{folder}/00000.tar")
        for model.checkpoint_activations in (False, True):
            for micro in (1, 2, 4, 8, 16, 32, 64, 128):
                try:
                    whole_row(bench, size, model, world, source, micro)
                except torch.OutOfMemoryError:
                    bench.rows.append({"row": f"pretraining, {layers} layers, micro-batch {micro}", "size": size,
                                       "out of memory": True, "computed again": model.checkpoint_activations})
                    print(f"| | {size} | micro-batch {micro} is too much for this GPU |", flush=True)
                    break
                finally:
                    model.zero_grad(set_to_none=True)
                    gc.collect()
                    torch.cuda.empty_cache()
                if bench.device.type == "cpu" and micro == 2:
                    break


def layers_that_fit(bench, size):
    """All, or half of them and so on where weights, gradients and AdamW's state leave no room for anything else on one
    GPU"""
    layers = LibraConfig(**SIZES[size]).num_hidden_layers
    while bench.device.type == "cuda" and layers > 1:
        with shapes_only():
            model = Libra(LibraConfig(**SIZES[size] | {"num_hidden_layers": layers}))
        frozen = sum(p.numel() for module in model.llama() for p in module.parameters())
        learning = sum(p.numel() for p in model.parameters()) - frozen
        needed = sum(bytes_per_gpu(learning, frozen, "ddp", 1, bench.dtype, layers).values())
        if needed < ROOM * torch.cuda.get_device_properties(bench.device).total_memory:
            break
        layers //= 2
    return layers


def whole_row(bench, size, model, world, source, micro):
    args = pretrain.options().parse_args(["--batch", str(micro), "--micro-batch", str(micro)])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, eye, counts = engine.adamw(trained, args), model.tokenizers.image.config, {}
    recipe = Recipe(model.tokenizers.text, model.config, eye.resolution, args.max_length)
    batches = iter(loader([source], recipe, micro, micro, 0, workers=2, pin=world.device.type == "cuda")[0])

    def one():
        counts.update(pretrain.update(args, world, 0, model, model, optimizer, trained,
                                      [next(batches).to(world.device)])[1])
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    again = "computed again" if model.checkpoint_activations else "kept"
    name = f"pretraining, {model.config.num_hidden_layers} layers, micro-batch {micro}, activations {again}"
    seconds = bench.row(name, size, {"ours": one}, memory=False)
    numbers = {"tokens/s": counts["tokens"] / seconds, "GB in all": engine.memory(world)}
    if peak := engine.peak(argparse.Namespace(peak=None), world):
        numbers["share of the peak"] = sum(flops_of(model, eye)(counts).values()) / seconds / peak
    bench.rows[-1] |= numbers
    print(f"| | {size} | " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) + " |", flush=True)


ROWS = {"train": train_rows, "text": text_rows, "prefill": prefill_rows, "decode": decode_rows, "growth": growth_rows,
        "tokenizer": tokenizer_rows, "data": data_rows, "compile": compile_rows, "whole": whole_rows}


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="what to measure; None: all that the device's "
                        "sizes are for")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="of the model; None: those that suit the row")
    parser.add_argument("--gpu", action="store_true", help="one GPU, bfloat16, size full, and pretraining as a whole")
    parser.add_argument("--repeat", type=POSITIVE, default=5, help="turns; medians are reported")
    parser.add_argument("--threads", type=NATURAL, default=0, help="of the CPU; 0: torch's choice")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=target, metavar="FILE", help="JSON of the rows")
    return parser


def main():
    args = options().parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: no GPU is visible here; without it the CPU's rows are measured")
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench("cuda", torch.bfloat16, args.repeat) if args.gpu else Bench(repeat=args.repeat)
    bench.memory = not args.no_memory
    usual = GPU_SIZES if args.gpu else [row for row in ROWS if row not in ("compile", "whole")]
    plan = {row: (GPU_SIZES if args.gpu else CPU_SIZES).get(row, ("small",)) for row in args.rows or usual}
    print(f"{machine(bench)}\n\n{HEAD}")
    for row, sizes in plan.items():
        for size in args.sizes or sizes:
            ROWS[row](bench, size)
            gc.collect()
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": machine(bench), "rows": bench.rows}, indent=2))


def machine(bench):
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else (
        f"{platform.machine()}, {torch.get_num_threads()} threads")
    return f"{name}, torch {torch.__version__}, {str(bench.dtype).removeprefix('torch.')}, {time.strftime('%Y-%m-%d')}"


CPU_SIZES = {"train": ("tiny", "small", "layer"), "text": ("small",), "prefill": ("small",),
             "decode": ("small", "medium"), "growth": ("small",), "tokenizer": ("tiny",), "data": ("any",),
             "compile": ("small",), "whole": ("tiny",)}
GPU_SIZES = {"train": ("medium", "layer"), "text": ("layer",), "prefill": ("full",), "decode": ("full",),
             "tokenizer": ("full",), "compile": ("medium", "layer"), "whole": ("full",)}

if __name__ == "__main__":
    run(main)
