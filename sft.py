"""Stage 2, instruction tuning (Sec. 3.3, Tab. 4): conversations; everything learns but the image tokenizer.

    python sft.py --out runs/try --steps 100 --warmup 10 --batch 16 --lr 1.5e-3             # on the demo's files
    torchrun --nproc_per_node=8 sft.py --model runs/pretrain --data llava_v1_5_mix665k.json --images DIR --out runs/sft

Only answers with their end token count in the loss (Eq. 7, 8). Captions are learned as pretrain.py learns them.
With --freeze-llm the LLaMA stays as it was, bit for bit.
"""
import argparse

from common.cli import POSITIVE, TOY, Help, require_path, run
from model import Libra
from pretrain import TEMPLATE_HELP, train_libra
from training import engine, plan


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage="%(prog)s [options]")
    g = parser.add_argument_group("the model and its samples")
    g.add_argument("--model", metavar="DIR", help=f"folder of pretrain.py, or libra-11b-base; None: {TOY}/pretrain")
    g.add_argument("--freeze-llm", action="store_true", help="only the visual part learns")
    g.add_argument("--template", choices=("vicuna", "llm"), help=TEMPLATE_HELP)
    g.add_argument("--max-length", type=POSITIVE, default=2048, metavar="N", help="longer samples are cut at the right")
    engine.add_options(parser, "sft", "chats/chat.json", "LLaVA JSON, or captions", steps=7000, warmup=300, batch=128,
                       lr=2e-5, text=300)
    return parser


def main():
    args = options().parse_args()
    if args.plan:
        return plan.show_libra(args, "sft", args.model)
    args.model = args.model or TOY / "pretrain"
    dist = engine.setup(args)
    changes = {"chat_template": args.template} if args.template else {}
    model = Libra.from_pretrained(require_path(args.model), **changes)
    for p in model.llama_parameters():
        p.requires_grad_(not args.freeze_llm)
    train_libra(args, dist, model)


if __name__ == "__main__":
    run(main)
