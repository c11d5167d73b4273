"""Float32 that is float32 everywhere."""
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32(device):
    """Without autocast and without TF32, in which GPUs convolve by default and which has no more bits than float16. For
    image ids: a bit of one is a sign, and bfloat16 turns about 2 % of the ids over."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
