"""pretrain.py as it is, up to the gradient of its first update, which goes to the file $GRADIENTS."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import engine
import pretrain
from command import run


def keep(parameters, most):
    whole = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters]
    if os.environ.get("RANK", "0") == "0":
        torch.save(whole, os.environ["GRADIENTS"])
    sys.exit(0)


engine.clip = keep
run(pretrain.main)
