"""What is timed: models of several sizes, a training step, decoding. As a script it is one side of `--against FOLDER`:
it runs the model of the checkout in PYTHONPATH, one repetition for each line that it reads. So it uses only what older
checkouts have too."""
import sys
from functools import partial

import torch

from generate import generate
from model import Libra, LibraConfig
from streams import Streams

SIZES = {"tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "vocab_size": 512, "contiguous_signal_size": 192},
         "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
                   "vocab_size": 4096, "contiguous_signal_size": 1024},
         "medium": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4, "num_attention_heads": 16,
                    "vocab_size": 4096, "contiguous_signal_size": 2048},
         "layer": {"num_hidden_layers": 1, "vocab_size": 1024}, "full": {},       # a layer with its share of the heads
         "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}}
LENGTH, TOKENS = 640, 32                                  # of a prompt; of a repetition of decoding


def new_model(size, device, dtype, frozen=False, **changes):
    """frozen: only the visual part is trained, as in pretraining"""
    torch.manual_seed(0)
    with torch.device(device):
        model = Libra(LibraConfig(**SIZES[size] | changes)).to(dtype)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or "vision" in name)
    return model


def sequence(config, length, images):
    """<s>, images with a newline after each, random text up to the length -> ids (L, K), loss_mask (L,)"""
    boi, newline = config.vocab_size + config.n_codes, config.newline_token_id
    image = [boi, *[config.vocab_size] * (config.image_tokens - 2), boi + 1, newline]
    start = torch.tensor([1, *image * images])
    ids = torch.cat([start, torch.randint(newline + 1, config.vocab_size, (length - len(start),))])
    return ids[:, None].expand(-1, config.vision_codebook_num), ~torch.isin(ids, torch.tensor([1, boi, newline]))


def new_batch(model, rows, length, images=1):
    """-> prompts [(L, K)], the same as Streams, signal"""
    c, weight = model.config, model.lm_head.weight
    prompts, loss_masks = zip(*(sequence(c, length, images) for _ in range(rows)))        # different text in each row
    signal = torch.randn(rows * images, c.image_tokens - 2, c.contiguous_signal_size).to(weight) if images else None
    return list(prompts), Streams.from_ids(prompts, c, loss_mask=loss_masks).to(weight.device), signal


def training_step(model, forward):
    """forward() -> loss sums of text and image. -> a function: forward and backward"""
    def step():
        text, image = forward()
        ((text + image.mean()) / 1000).backward()
        model.zero_grad(set_to_none=True)
    return step


def decoding(model, prompts, signal, calls):
    """Reads the prompts now -> a function for that many calls: TOKENS tokens more for each prompt"""
    tokens = generate(model, prompts, signal, TOKENS * calls + 1)
    next(tokens)
    return lambda: [next(tokens) for _ in range(TOKENS)]


def main(size, device, dtype, calls):
    model = new_model(size, device, getattr(torch, dtype), frozen=True)
    prompts, *batch = new_batch(model, 1, LENGTH)
    jobs = {"training step": training_step(model, partial(model, *batch)),
            "decoding": decoding(model, prompts, batch[1], int(calls))}
    for line in sys.stdin:
        jobs[line.strip()]()
        if device == "cuda":
            torch.cuda.synchronize()
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
