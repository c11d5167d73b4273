"""Stage 0, the image tokenizer (Sec. 3.2, A.1): a VQGAN over the frozen CLIP with lookup-free quantization.

    python train_tokenizer.py --out runs/try --steps 100 --warmup 10 --batch 16 --lr 7e-4   # on the demo's files
    torchrun --nproc_per_node=8 train_tokenizer.py --clip clip-vit-large-patch14-336 --data 'sa1b/{00000..00999}.tar' \\
        --vgg vgg16.pth --lpips lpips_vgg.pth --out runs/tokenizer --micro-batch 16

Losses: L1 and LPIPS between picture and reconstruction, a PatchGAN discriminator with an adaptive weight, and LFQ's
entropy and commitment losses. Only the decoder, the quantizer and the two 1x1 convolutions around it learn. The paper
gives the data (10 M images) and no recipe; the numbers here are ours.
"""
import argparse
import re
from dataclasses import fields
from functools import partial

import torch
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import nn

from common.cli import NATURAL, TOY, Help, bounded, require_path, run
from common.sources import open_sources
from common.weights import UserError, assign, read_tensors, select, shapes_only
from data import PictureBuilder
from pretrain import run_steps
from tokenizer import ImageTokenizer, ImageTokenizerConfig, clip_sizes, read_clip_weights, to_picture, to_pixels, to_rgb
from training import engine, plan
from training.checkpoints import fingerprint

# ---------------------------------------------------------------- losses


def lfq_loss(projected, codebook_size, gamma=2.5, entropy_weight=0.1, commitment_weight=1.0):
    """projected: (..., K * bits), whose signs are the code. A token should be sure of its code (low entropy), a batch
    should use all codes (high entropy of the mean, over all processes), projections should be near their signs."""
    bits = codebook_size.bit_length() - 1
    x = projected.float().unflatten(-1, (-1, bits)).flatten(0, -3)                            # (n, K, bits)
    powers = 2 ** torch.arange(bits - 1, -1, -1, device=x.device)
    codes = torch.where((torch.arange(codebook_size, device=x.device)[:, None] & powers) > 0, 1.0, -1.0)     # (N, bits)
    p = (2 * 100 * x @ codes.T).softmax(-1)               # of -100 * squared distances to the codes, (n, K, N)

    def entropy(p):
        return -(p * p.clamp(min=1e-5).log()).sum(-1)
    mean = p.mean(0)                                                                          # (K, N)
    if torch.distributed.is_initialized():
        mean = torch.distributed.nn.functional.all_reduce(mean) / torch.distributed.get_world_size()
    per_sample, batch = entropy(p).mean(), entropy(mean).mean()
    commitment = F.mse_loss(x, torch.where(x > 0, 1.0, -1.0))
    loss = entropy_weight * (per_sample - gamma * batch) + commitment_weight * commitment
    return {"loss": loss, "per_sample_entropy": per_sample, "batch_entropy": batch, "commitment": commitment}


def vq_loss(projected, vectors):
    """projected: (B, G, G, dim); vectors: those of the table that it was quantized to"""
    table, commitment = F.mse_loss(vectors, projected.detach()), F.mse_loss(projected, vectors.detach())
    return {"loss": table + 0.25 * commitment, "commitment": commitment}


class Discriminator(nn.Module):
    """PatchGAN: pictures (B, 3, R, R) -> logits of patches (B, 1, h, w), positive for real ones"""

    def __init__(self, channels=64, layers=3):
        super().__init__()
        parts, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
        for layer in range(1, layers + 1):
            wider, stride = channels * min(2 ** layer, 8), 1 + (layer < layers)
            parts += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            width = wider
        self.main = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.main:
            if not isinstance(module, nn.LeakyReLU):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)

    def forward(self, x):
        return self.main(x)


def discriminator_loss(real, fake):
    """Hinge loss. real, fake: logits of pictures and of reconstructions"""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(nll, g_loss, last_layer):
    """|grad nll| / (|grad g_loss| + 1e-4) at the decoder's last weights: makes both losses count alike there"""
    nll_grad, = torch.autograd.grad(nll, last_layer, retain_graph=True)
    g_grad, = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


class LPIPS(nn.Module):
    """Perceptual distance: squared difference of VGG-16's features, normalised at each position, weighted by channel"""

    def __init__(self):
        super().__init__()
        layers, width, pool = [], 3, 0                    # by torchvision's numbers
        self.compared = (3, 8, 15, 22, 29)                # the layers before each pooling, and the last
        with shapes_only():
            for channels in (64, 64, pool, 128, 128, pool, *[256] * 3, pool, *[512] * 3, pool, *[512] * 3):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()] if channels else [nn.MaxPool2d(2)]
                width = channels or width
            self.features = nn.Sequential(*layers)
            self.lin = nn.ModuleList(nn.Conv2d(layers[n - 1].out_channels, 1, 1, bias=False) for n in self.compared)
        self.requires_grad_(False)

    def read(self, vgg, linear):
        """vgg: file of torchvision's VGG-16; linear: file of LPIPS's weights for it"""
        def rename(name):
            name = re.sub(r"^lin(\d)\.model\.1\.", r"lin.\1.", name)
            return name if name.startswith(("features.", "lin.")) else None
        tensors = [select(read_tensors(file), torch.float32, rename) for file in (vgg, linear)]
        assign(self, tensors[0] | tensors[1], f"{vgg} and {linear}")
        return self

    def states(self, x):
        """x (B, 3, R, R) in [-1, 1] -> VGG's features at the compared layers, normalised"""
        shift, scale = (x.new_tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, found = (x - shift) / scale, []
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in self.compared:
                found.append(F.normalize(x, dim=1, eps=1e-10))
        return found

    def forward(self, rgb, target):
        """rgb, target (B, 3, R, R) in [-1, 1] -> mean distance; without a gradient for the target"""
        if rgb.shape[-1] < 16:
            raise UserError(f"LPIPS needs pictures of at least 16 pixels, these have {rgb.shape[-1]}")
        with torch.no_grad():
            targets = self.states(target)
        return sum(lin((a - b).square()).mean() for lin, a, b in zip(self.lin, self.states(rgb), targets))


def clip_distance(clip, rgb, pixels):
    """LPIPS's formula on the frozen CLIP's hidden states, for a small world that has no VGG. rgb: (B, 3, R, R) in
    [-1, 1]; pixels: the picture as CLIP takes it"""
    with torch.no_grad():
        targets = clip.hidden_states(pixels)[2:]
    states = clip.hidden_states(to_pixels(rgb.clamp(-1, 1)))[2:]
    return sum((F.normalize(a[:, 1:].float(), dim=-1) - F.normalize(b[:, 1:].float(), dim=-1)).square().sum(-1).mean()
               for a, b in zip(states, targets))


# ---------------------------------------------------------------- options and model

NUMBERS = {"embed_dim": "channels on both sides of the quantizer", "codebook_size": "codes of a codebook",
           "num_codebooks": "codes of a token", "z_channels": "channels into the decoder",
           "ch": "decoder channels at full resolution", "num_attn_heads": "decoder attention heads",
           "num_res_blocks": "residual blocks of a level, the decoder has one more"}
LISTS = {"select_layers": "CLIP states that make up the signal; 0: its embedding",
         "ch_mult": "channels of each level / --ch, full resolution first",
         "attn_resolutions": "sides of the levels with attention; None: the codes' grid"}
WEIGHTS = (("perceptual", 1.0, "of LPIPS; L1 has weight 1"), ("l2", 0.0, "of the mean squared error"),
           ("clip", 0.0, "of a loss in CLIP's features"), ("entropy", 0.1, "of LFQ's entropy losses"),
           ("disc", 0.8, "of the discriminator's, times an adaptive one"))
PUBLISHED = {field.name: field.default for field in fields(ImageTokenizerConfig)}
DEMO = {"select_layers": (1, 3), "embed_dim": 128, "codebook_size": 256, "z_channels": 128, "ch": 32,
        "num_attn_heads": 2, "num_res_blocks": 0, "ch_mult": (1, 1, 2, 2), "attn_resolutions": (7,)}    # for 56 pixels


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage="%(prog)s [options]")
    g = parser.add_argument_group("the kind of tokenizer")
    g.add_argument("--clip", metavar="DIR", dest="clip_folder", help=f"Hugging Face CLIP folder; None: {TOY}/clip")
    g.add_argument("--quantizer", choices=("lfq", "vq"), default="lfq", help="vq: learned tables, as in Fig. 2")
    g.add_argument("--encoder", choices=("clip", "scratch"), default="clip", help="scratch: a VQGAN's, Table 3 (g)")
    g = parser.add_argument_group("sizes (None: as published, or as in the demo for a CLIP of 56 pixels)")
    for name, words in (NUMBERS | LISTS).items():
        g.add_argument("--" + name.replace("_", "-"), nargs="+" if name in LISTS else None, metavar="N", type=int,
                       help=words)
    g = parser.add_argument_group("losses")
    g.add_argument("--vgg", metavar="FILE", help="torchvision's VGG-16 weights, for LPIPS; None: no LPIPS")
    g.add_argument("--lpips", metavar="FILE", help="LPIPS's linear weights for VGG")
    for name, default, words in WEIGHTS:
        g.add_argument(f"--{name}-weight", type=bounded(float, 0), default=default, metavar="W", help=words)
    g.add_argument("--disc-start", type=NATURAL, default=20_000, metavar="STEP", help="first with a discriminator")
    engine.add_options(parser, "tokenizer", "captions/*.tar", "img2dataset shards, COCO or LLaVA JSON", steps=200_000,
                       warmup=5000, batch=256, lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0, engines=False)
    return parser


def new_tokenizer(args, clip):
    """clip: sizes of the CLIP. Fills in the sizes that the options left open."""
    grid = clip["image_size"] // clip["patch_size"]
    defaults = PUBLISHED | (DEMO if clip["image_size"] == 56 else {}) | {"attn_resolutions": (grid,)}
    for name in (*NUMBERS, *LISTS):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
        elif name in LISTS:
            setattr(args, name, tuple(getattr(args, name)))
    sizes = {name: getattr(args, name) for name in (*NUMBERS, *LISTS, "quantizer", "encoder")}
    tokenizer = ImageTokenizer(ImageTokenizerConfig(clip=clip, resolution=clip["image_size"], grid=grid, **sizes))
    if args.encoder == "clip":
        tokenizer.clip.requires_grad_(False)
    return tokenizer


class Trained(nn.Module):
    """The generator's forward pass as one module, which DDP needs. The buffer `used` (K, N) counts the codes of about
    the last 50 batches."""

    def __init__(self, tokenizer, entropy_weight):
        super().__init__()
        self.tokenizer, self.entropy_weight = tokenizer, entropy_weight
        self.register_buffer("used", torch.zeros(tokenizer.config.num_codebooks, tokenizer.config.codebook_size))

    def forward(self, pixels):
        """pixels (B, 3, R, R) -> reconstruction (B, 3, R, R), ids (B, G, G, K), {the quantizer's losses}"""
        c, quantize = self.tokenizer.config, self.tokenizer.quantize
        quantized, ids, projected = self.tokenizer.quantized(self.tokenizer.signal(pixels))
        with torch.autocast(projected.device.type, enabled=False):            # bfloat16 is too coarse for 200 * x
            losses = (lfq_loss(projected, c.codebook_size, entropy_weight=self.entropy_weight)
                      if c.quantizer == "lfq" else vq_loss(projected.float(), quantize.vectors(ids)))
        return self.tokenizer.decoder(self.tokenizer.post_quant_conv(quantized)), ids, losses

    @torch.no_grad()
    def count(self, ids, dist):
        """ids (B, G, G, K) -> share of the codes in use and their perplexity, means over the codebooks"""
        counts = [torch.bincount(codes, minlength=self.used.shape[1]) for codes in ids.flatten(0, 2).T]
        self.used.mul_(0.98).add_(engine.all_reduce_sum(torch.stack(counts), dist))
        p = self.used / self.used.sum(-1, keepdim=True).clamp(min=1e-9)       # zero until a picture is usable
        perplexity = torch.exp(-(p * p.clamp(min=1e-9).log()).sum(-1))
        return {"used": float((self.used > 0.5).float().mean()), "perplexity": float(perplexity.mean())}


def main():
    args = options().parse_args()
    if bool(args.vgg) != bool(args.lpips):
        raise UserError("LPIPS needs both --vgg and --lpips; leave both out to do without it")
    if args.clip_weight and args.encoder != "clip":
        raise UserError("--clip-weight: an encoder from scratch has no CLIP to compare in")
    if args.plan:
        clip = clip_sizes(args.clip_folder) if args.clip_folder else plan.CLIP_L
        with shapes_only():
            trained, discriminator = Trained(new_tokenizer(args, clip), args.entropy_weight), Discriminator()
        return plan.show_tokenizer(args, trained, discriminator, LPIPS() if args.vgg else None, generator_pass)
    args.clip_folder = args.clip_folder or TOY / "clip"
    dist, folder = engine.setup(args), require_path(args.clip_folder)
    torch.backends.cudnn.benchmark = not args.deterministic                                   # convolutions of one size
    tokenizer = new_tokenizer(args, clip_sizes(folder))
    if args.encoder == "clip":
        assign(tokenizer.clip, read_clip_weights(folder), folder)
    lpips = LPIPS().read(args.vgg, args.lpips).to(dist.device) if args.vgg else None
    args.frozen = fingerprint(*filter(None, (tokenizer, lpips)))
    sources = [] if args.export else open_sources(args.data, args.images, only_pictures=True)
    models = [module.to(dist.device) for module in (Trained(tokenizer, args.entropy_weight), Discriminator())]
    wrapped = [engine.replicate(model, dist) for model in models]
    optimizers = [engine.adamw(model.parameters(), args) for model in models]
    step = partial(update, args, dist, *wrapped, lpips, optimizers)
    builder = PictureBuilder(tokenizer.config.resolution, args.seed)
    if run_steps(args, dist, sources, builder, models, optimizers, step, lambda batch: {"images": len(batch.pixels)},
                 save_samples=partial(save_samples, dist, tokenizer)) and dist.first:
        tokenizer.save_pretrained(args.out)
        print(f"{args.out} is an image tokenizer folder", flush=True)


# ---------------------------------------------------------------- the step

def update(args, dist, wrapped, disc, lpips, optimizers, step, batches, totals):
    """Update the generator and, from --disc-start on, the discriminator; every pass has the same weight. -> numbers for
    the log. Raises FloatingPointError, before the weights change, if a loss or a gradient is not finite."""
    adversarial, outputs, disc_norm = step >= args.disc_start, [], torch.zeros((), device=dist.device)
    trained, last = getattr(wrapped, "module", wrapped), len(batches) - 1
    optimizers[0].zero_grad()
    for n, batch in enumerate(batches):                   # generator
        engine.set_grad_sync(wrapped, n == last)
        engine.set_grad_sync(disc, False)                 # here it only passes gradients on to the generator
        outputs.append(generator_pass(args, dist, adversarial, wrapped, disc, lpips, batch.pixels, len(batches)))
    norm = nn.utils.clip_grad_norm_(trained.parameters(), args.clip_norm)
    optimizers[1].zero_grad()                             # what the generator's passes left there
    for n, batch in enumerate(batches if adversarial else ()):                                # discriminator
        engine.set_grad_sync(disc, n == last)
        fake = outputs[n][2]
        real = to_rgb(batch.pixels) if len(batch.pixels) else fake
        disc_loss = discriminator_loss(disc(real), disc(fake)) * bool(len(batch.pixels))
        (disc_loss / len(batches)).backward()
        outputs[n][0]["disc"] = disc_loss.detach()
        disc_norm = nn.utils.get_total_norm([p.grad for p in disc.parameters()])
    losses = torch.stack([norm, disc_norm, *(numbers["loss"] for numbers, _, _ in outputs)])
    if not engine.all_ranks(torch.isfinite(losses).all(), dist):
        raise FloatingPointError
    for optimizer in optimizers[:1 + adversarial]:
        optimizer.step()
    sums = sum(torch.stack([torch.ones_like(norm), *numbers.values()]) * bool(len(batch.pixels))
               for (numbers, _, _), batch in zip(outputs, batches))
    n_passes, *sums = engine.all_reduce_sum(sums, dist).tolist()              # passes with pictures, of all processes
    numbers = {name: value / max(1, n_passes) for name, value in zip(outputs[0][0], sums)} | {"norm": norm.item()}
    ids = torch.cat([ids[:len(batch.pixels)] for batch, (_, ids, _) in zip(batches, outputs)])
    return numbers | trained.count(ids, dist)


def generator_pass(args, dist, adversarial, wrapped, disc, lpips, pixels, passes):
    """Forward and backward pass of the generator. -> numbers, ids, reconstructions"""
    usable = bool(len(pixels))                            # a batch of bad samples alone: run on zeros, weight 0
    pixels = pixels if usable else pixels.new_zeros(1, *pixels.shape[1:])
    tokenizer, target = getattr(wrapped, "module", wrapped).tokenizer, to_rgb(pixels)
    with dist.autocast():
        rgb, ids, code_losses = wrapped(pixels)
    rgb = rgb.float()
    l1, mse = F.l1_loss(rgb, target), F.mse_loss(rgb, target)
    nll = l1 + args.l2_weight * mse
    if lpips:
        nll = nll + args.perceptual_weight * lpips(rgb, target)
    if args.clip_weight:
        code_losses["clip"] = clip_distance(tokenizer.clip, rgb, pixels)
        nll = nll + args.clip_weight * code_losses["clip"]
    loss = nll + code_losses.pop("loss")
    if adversarial:
        g_loss = -disc(rgb).mean()
        weight = args.disc_weight * adaptive_weight(nll, g_loss, tokenizer.decoder.conv_out.weight)
        loss, code_losses["disc_weight"] = loss + weight * g_loss, weight
    (loss * (usable / passes)).backward()
    mse = F.mse_loss(rgb.detach().clamp(-1, 1), target)   # of what a picture can show
    numbers = {"loss": loss, "l1": l1, "psnr": 10 * torch.log10(4 / mse), **code_losses}
    return {name: value.detach() for name, value in numbers.items()}, ids, rgb.detach()


def save_samples(dist, tokenizer, batches, path):
    """Eight pictures above their reconstructions from the ids"""
    pixels = torch.cat([batch.pixels for batch in batches])[:8]
    if dist.first and len(pixels):
        with dist.autocast():
            rebuilt = tokenizer.decode(tokenizer.encode(pixels)[0]).float()
        with engine.warn_if_unwritable(path):
            path.parent.mkdir(exist_ok=True)
            to_picture(torch.cat(list(torch.cat([to_rgb(pixels), rebuilt], dim=2)), dim=2)).save(path)


if __name__ == "__main__":
    run(main)
