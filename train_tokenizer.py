"""Stage 0: the losses that train the image tokenizer (Sec. 3.2, A.1).

A VQGAN over the frozen CLIP: L1 and LPIPS between picture and reconstruction, a PatchGAN discriminator whose weight
adapts, and the entropy and commitment losses of lookup-free quantization. Only the decoder, the quantizer and the two
1x1 convolutions learn.
"""
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import nn

from weights import UserError, assign, read_tensors, select


def lfq_loss(projected, codebook_size, gamma=2.5, entropy_weight=0.1, commitment_weight=1.0):
    """projected (..., K * bits), what LFQ takes the signs of -> {loss, per_sample_entropy, batch_entropy, commitment}.

    Each token should be sure of its code (low entropy per sample), the batch should use all codes (high entropy of the
    mean, over all ranks), and the projection should lie near its signs.
    """
    bits = codebook_size.bit_length() - 1
    x = projected.float().unflatten(-1, (-1, bits)).flatten(0, -3)                            # (n, K, bits)
    powers = 2 ** torch.arange(bits - 1, -1, -1, device=x.device)
    codes = torch.where((torch.arange(codebook_size, device=x.device)[:, None] & powers) > 0, 1.0, -1.0)     # (N, bits)
    p = (2 * 100 * x @ codes.T).softmax(-1)                                                   # (n, K, N)

    def entropy(p):
        return -(p * p.clamp(min=1e-5).log()).sum(-1)
    mean = p.mean(0)                                                                          # (K, N)
    if dist.is_initialized():
        mean = dist_nn.all_reduce(mean) / dist.get_world_size()
    per_sample, batch = entropy(p).mean(), entropy(mean).mean()
    commitment = F.mse_loss(x, torch.where(x > 0, 1.0, -1.0))
    loss = entropy_weight * (per_sample - gamma * batch) + commitment_weight * commitment
    return {"loss": loss, "per_sample_entropy": per_sample, "batch_entropy": batch, "commitment": commitment}


class Discriminator(nn.Module):
    """PatchGAN: pictures (B, 3, R, R) -> a logit for each patch (B, 1, h, w), real above zero"""

    def __init__(self, channels=64, layers=3):
        super().__init__()
        parts, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
        for layer in range(1, layers + 1):
            wider = channels * min(2 ** layer, 8)
            stride = 2 if layer < layers else 1
            parts += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            width = wider
        self.main = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)


def discriminator_loss(real, fake):
    """Hinge, on logits of pictures and of reconstructions"""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(nll, g_loss, last_layer):
    """|grad nll| / (|grad g| + 1e-4) at the decoder's last weights, 0 to 1e4: neither loss drowns the other."""
    of_nll, = torch.autograd.grad(nll, last_layer, retain_graph=True)
    of_g, = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    return (of_nll.norm() / (of_g.norm() + 1e-4)).clamp(0, 1e4).detach()


class LPIPS(nn.Module):
    """Perceptual distance: VGG-16 features after five ReLUs, unit length per position, squared difference, weighted.

    vgg: torchvision's VGG-16 file; linear: LPIPS's `lin` weights for it. Both are public, safetensors or pickles.
    """
    CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))    # torchvision's numbers
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self, vgg, linear):
        super().__init__()
        self.features, self.lin, width = nn.ModuleDict(), nn.ModuleList(), 3
        with torch.device("meta"):
            for group, out in zip(self.CONVS, self.WIDTHS):
                for conv in group:
                    self.features[str(conv)], width = nn.Conv2d(width, out, 3, padding=1), out
                self.lin.append(nn.Conv2d(out, 1, 1, bias=False))

        def rename(name):                                 # lin0.model.1.weight -> 0.weight
            return f"{name[3]}.weight" if name.startswith("lin") and name.endswith(".model.1.weight") else None
        assign(self.features, select(read_tensors(vgg), torch.float32, lambda name: (
            name.removeprefix("features.") if name.startswith("features.") else None)), vgg)
        assign(self.lin, select(read_tensors(linear), torch.float32, rename), linear)
        self.requires_grad_(False)

    def forward(self, x, y):
        """x, y (B, 3, R, R) in [-1, 1] -> mean distance"""
        if x.shape[-1] < 16:
            raise UserError(f"LPIPS needs pictures of at least 16 pixels, these have {x.shape[-1]}")
        shift, scale = (torch.tensor(v, device=x.device)[:, None, None]
                        for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        both, total = (torch.cat([x, y]) - shift) / scale, 0.0
        for group, lin in zip(self.CONVS, self.lin):
            if group[0]:
                both = F.max_pool2d(both, 2)
            for conv in group:
                both = F.relu(self.features[str(conv)](both))
            a, b = F.normalize(both, dim=1, eps=1e-10).chunk(2)
            total = total + lin((a - b).square()).mean()
        return total
