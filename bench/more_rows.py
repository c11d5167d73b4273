"""Rows beside those of the model itself: transformers, the image tokenizer, a whole step on a GPU."""
from functools import partial
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines import products_alone
from bench.measure import measure
from bench.workload import LENGTH, TOKENS, decoding, new_batch, new_model, training_step
from common.quantize import quantizer
from common.weights import shapes_only
from generate import generate
from model import Libra
from streams import Streams
from tokenizer import ImageTokenizer, ImageTokenizerConfig
from training.plan import CLIP_L


def their_model(model, images):
    """transformers' LLaVA around a LLaMA of the model's sizes, which gets CLIP's features ready made; for no images
    that LLaMA alone, with the model's weights"""
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
    c, names = model.config, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                              "num_attention_heads", "rms_norm_eps", "max_position_embeddings")
    llama = LlamaConfig(**{name: getattr(c, name) for name in names})
    if images:
        clip = CLIPVisionConfig(hidden_size=c.contiguous_signal_size, num_attention_heads=1, num_hidden_layers=0)
        theirs = LlavaForConditionalGeneration(LlavaConfig(vision_config=clip, text_config=llama, image_token_index=0))
        theirs.model.vision_tower = None
    else:
        theirs = LlamaForCausalLM(llama)
        theirs.load_state_dict({name: model.state_dict()[name] for name in theirs.state_dict()})
    return theirs.to(model.lm_head.weight)


def transformers(args, size, images):
    """A step that trains all, prefill and decoding against transformers: its LLaVA, or its LLaMA for text alone. Both
    sides read the same features (n, 576, C). Behind an image half of the 60 words are targets, of text alone all."""
    model, rows = new_model(size, args.device, args.dtype), 1 if size == "layer" else 2
    theirs, c, name = their_model(model, images), model.config, f"{size}, {'an image' if images else 'text alone'}"
    prompts, _, signal = new_batch(model, 16, LENGTH, images)
    counted = torch.arange(LENGTH) >= (LENGTH - 30 if images else 1)
    streams = Streams.from_ids(prompts[:rows], c, [counted] * rows).to(args.device)
    ids = torch.stack([row[row <= c.vocab_size] for row in torch.stack(prompts)[:, :, 0]])    # without BOI and EOI
    ids = (ids % c.vocab_size).to(args.device)            # 0: an image token
    labels = ids[:rows].clone()
    labels[:, :-counted.sum()] = -100

    def inputs(rows):
        return prompts[:rows], signal[:rows] if images else None

    def their_inputs(rows):
        if not images:
            return {"input_ids": ids[:rows]}
        features = list(theirs.model.multi_modal_projector(signal[:rows]))
        return {"input_ids": ids[:rows], "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features)}}

    def their_step():
        theirs(**their_inputs(rows), labels=labels).loss.backward()
        theirs.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def their_tokens(rows):
        out = theirs(**their_inputs(rows), use_cache=True, logits_to_keep=1)
        while True:
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            yield token
            out = theirs(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    measure(args, f"training step, {name}, B {rows}, L {LENGTH}", {
        "ours": training_step(model, partial(model, streams, inputs(rows)[1])),
        "transformers": their_step}, rows * LENGTH)
    measure(args, f"prefill, {name}, L {LENGTH}", {
        "ours": lambda: next(generate(model, *inputs(1), 1)),
        "transformers": lambda: next(their_tokens(1))}, LENGTH)
    for rows in (1, 16) if images else (1,):
        tokens = their_tokens(rows)
        next(tokens)
        measure(args, f"decoding, {name}, B {rows}", {
            "ours": decoding(model, *inputs(rows), args.repeat + 1),
            "transformers": lambda tokens=tokens: [next(tokens) for _ in range(TOKENS)]}, rows * TOKENS, memory=False)


def quantized(args, size):
    """Decoding text in bfloat16 with the layers' weights in 8 bits, against 16 and 4: the LLaMA alone. One layer gets a
    small vocabulary: in a whole model the head, which keeps its 16 bits, weighs little."""
    changes = {"use_expert": False, "use_bridge": False} | ({"vocab_size": 4096} if size == "layer" else {})
    model = new_model(size, args.device, torch.bfloat16, **changes)
    prompts, _, _ = new_batch(model, 1, LENGTH, images=0)
    sides = {}
    for side, kind in (("ours", "int8"), ("bfloat16", None), ("int4", "int4")):
        copy = model
        if kind:
            with shapes_only():
                copy = Libra(model.config)
            convert = quantizer(kind, torch.bfloat16, torch.device(args.device))
            copy.load_state_dict({name: convert(name, x) for name, x in model.state_dict().items()}, assign=True)
        sides[side] = decoding(copy, prompts, None, args.repeat + 1)
    measure(args, f"decoding text, int8 weights, {size}", sides, TOKENS, memory=False)


def new_tokenizer(device):
    """The published image tokenizer with random weights, in float32 as always"""
    with torch.device(device):
        return ImageTokenizer(ImageTokenizerConfig(clip=CLIP_L)).requires_grad_(False).eval()


def image_tokenizer(args, size):
    """Pictures to ids and back, against the products and convolutions alone"""
    tokenizer, pixels = new_tokenizer(args.device), torch.randn(2, 3, 336, 336, device=args.device)
    ids, _ = tokenizer.encode(pixels)
    for name, call in (("encode", partial(tokenizer.encode, pixels)), ("decode", partial(tokenizer.decode, ids))):
        measure(args, f"image tokenizer, {name}", {"ours": call, "products alone": products_alone(tokenizer, call)},
                len(pixels), "images/s")


def pretraining(args, size):
    """A whole step: CLIP, forward, backward, AdamW. The micro-batch doubles until the GPU's memory is full, with
    activations kept and recomputed"""
    model, tokenizer = new_model(size, args.device, args.dtype, frozen=True), new_tokenizer(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer, flops = torch.optim.AdamW(trained, lr=1e-4, fused=True), 0

    def step(streams, pixels):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            codes, signal = tokenizer.encode(pixels)
            model.loss(streams.with_image_codes(codes), signal).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for model.checkpoint_activations in (False, True):
        for rows in (1,) if args.device == "cpu" else (1, 2, 4, 8, 16, 32, 64, 128):
            name = f"pretraining, {size}, {rows} samples{', recomputed' * model.checkpoint_activations}"
            call = partial(step, new_batch(model, rows, LENGTH)[1], torch.randn(rows, 3, 336, 336, device=args.device))
            try:
                if not flops:
                    with FlopCounterMode(display=False) as counter:
                        call()
                    flops = counter.get_total_flops() / LENGTH            # of a token; causal attention counted whole
                rate = measure(args, name, {"ours": call}, rows * LENGTH)
                print(f"| | {rate * flops / 1e12:.2f} TFLOP/s | | | |")
            except torch.OutOfMemoryError:
                print(f"| {name} | does not fit | | | |")
                optimizer.zero_grad()
                optimizer.state.clear()                   # half made, if it was AdamW's step that did not fit
                break
