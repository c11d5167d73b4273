"""Stage 2, instruction tuning (Sec. 3.3, Tab. 4): conversations on pretrain's loop, everything learns but CLIP.

    python sft.py                                                           # on the toy world of `make demo`
    torchrun --nproc_per_node=8 sft.py --model runs/pretrain --data llava_v1_5_mix665k.json --images DIR --out runs/sft

Only answers with their </s> count in the loss (Eq. 7, 8).
"""
import argparse

import engine
import plan
from command import POSITIVE, TOY, Help, need, run
from data import Recipe
from model import Libra
from pretrain import train


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    g = parser.add_argument_group("what is trained, on what")
    g.add_argument("--model", metavar="DIR",
                   help=f"model folder of pretrain.py, or libra-11b-base; None: {TOY}/pretrain")
    g.add_argument("--data", nargs="+", metavar="FILE", default=[str(TOY / "chats/chat.json")],
                   help="LLaVA JSON files (captions, as pretrain.py reads them, are learned as captions); FILE@3: each "
                        "epoch reads it three times")
    g.add_argument("--images", metavar="DIR", default=str(TOY / "chats/images"),
                   help="what their image paths are relative to")
    g.add_argument("--max-length", type=POSITIVE, default=2048,
                   help="tokens of a sample; longer ones are cut at the right")
    engine.add_options(parser, steps=7000, warmup=300, batch=128, lr=2e-5, text_tokens=300)
    parser.set_defaults(out=str(TOY / "sft"))
    return parser


def main():
    args = options().parse_args()
    if args.plan:
        return plan.show(args, *plan.sizes(args.model, args.model), "sft")
    args.model = args.model or TOY / "pretrain"
    world = engine.start(args)
    model = Libra.from_pretrained(need(args.model))
    recipe = Recipe(model.tokenizers.text, model.config, model.tokenizers.image.config.resolution, args.max_length,
                    args.seed)
    train(args, world, model, recipe)


if __name__ == "__main__":
    run(main)
