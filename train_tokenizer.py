"""Stage 0, the image tokenizer (Sec. 3.2, A.1): a VQGAN over the frozen CLIP with lookup-free quantization.

    python train_tokenizer.py                                               # on the toy world of `make demo`
    torchrun --nproc_per_node=8 train_tokenizer.py --clip clip-vit-large-patch14-336 --data 'sa1b/{00000..00999}.tar' \\
        --vgg vgg16.pth --lpips lpips_vgg.pth --out runs/tokenizer --micro-batch 16

L1 and LPIPS between picture and reconstruction, a PatchGAN discriminator whose weight adapts, and the entropy and
commitment losses of LFQ. Only the decoder, the quantizer and the two 1x1 convolutions learn. The paper gives the data
(10 M images) and no recipe; the numbers here are ours.
"""
import argparse
import itertools
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import nn

import engine
import plan
from checkpoints import Checkpoints, Stop, agreed
from command import NATURAL, TOY, Help, bounded, need, run
from data import Pictures, loader, open_sources
from tokenizer import (
    ImageTokenizer,
    ImageTokenizerConfig,
    read_clip_sizes,
    read_clip_weights,
    to_picture,
    to_pixels,
    to_rgb,
)
from weights import UserError, assign, read_tensors, select, shapes_only


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


def vq_loss(projected, vectors, commitment_weight=0.25):
    """projected (B, G, G, dim) and the table's vectors for it: each is drawn to the other"""
    table, commitment = F.mse_loss(vectors, projected.detach()), F.mse_loss(projected, vectors.detach())
    return {"loss": table + commitment_weight * commitment, "commitment": commitment}


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
    """Perceptual distance: VGG-16 features after five ReLUs, unit length per position, squared difference, weighted."""
    CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))    # torchvision's numbers
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        self.features, self.lin, width = nn.ModuleDict(), nn.ModuleList(), 3
        with shapes_only():
            for group, out in zip(self.CONVS, self.WIDTHS):
                for conv in group:
                    self.features[str(conv)], width = nn.Conv2d(width, out, 3, padding=1), out
                self.lin.append(nn.Conv2d(out, 1, 1, bias=False))
        self.requires_grad_(False)

    def read(self, vgg, linear):
        """vgg: torchvision's VGG-16 file; linear: LPIPS's `lin` weights for it. Both public, safetensors or pickles."""
        def rename(name):                                 # lin0.model.1.weight -> 0.weight
            return f"{name[3]}.weight" if name.startswith("lin") and name.endswith(".model.1.weight") else None
        assign(self.features, select(read_tensors(vgg), torch.float32, lambda name: (
            name.removeprefix("features.") if name.startswith("features.") else None)), vgg)
        assign(self.lin, select(read_tensors(linear), torch.float32, rename), linear)
        return self.requires_grad_(False)

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


def clip_distance(clip, rgb, pixels):
    """LPIPS's formula on the frozen CLIP's own states: a perceptual loss for a small world that has no VGG. rgb
    (B, 3, R, R) in [-1, 1], pixels as CLIP takes them -> mean over the patches, sum over the layers behind the first"""
    with torch.no_grad():
        wanted = clip.hidden_states(pixels)[2:]
    states = clip.hidden_states(to_pixels(rgb.clamp(-1, 1)))[2:]
    return sum((F.normalize(a[:, 1:].float(), dim=-1) - F.normalize(b[:, 1:].float(), dim=-1)).square().sum(-1).mean()
               for a, b in zip(states, wanted))


# ---------------------------------------------------------------- the stage

NUMBERS = {"embed_dim": "channels in front of the quantizer and behind it", "codebook_size": "codes of a codebook",
           "num_codebooks": "codes that make up a token", "z_channels": "channels into the decoder",
           "ch": "channels of the decoder at full resolution", "num_attn_heads": "heads of the decoder's attention",
           "num_res_blocks": "residual blocks of a level, one less than the decoder has"}
LISTS = {"select_layers": "states of the CLIP that make up the signal; 0: its embedding",
         "ch_mult": "channels of each level, full resolution first, times --ch",
         "attn_resolutions": "sides of the levels that have attention, by default the codes' grid"}
LIMITS = {"num_res_blocks": (0,), "select_layers": (0,), "codebook_size": (2, 2 ** 18)}    # its loss looks at all codes
PUBLISHED = {field.name: field.default for field in fields(ImageTokenizerConfig)}
DEMO = {"select_layers": (1, 3), "embed_dim": 128, "codebook_size": 256, "z_channels": 128, "ch": 32,
        "num_attn_heads": 2, "num_res_blocks": 0, "ch_mult": (1, 1, 2, 2), "attn_resolutions": (7,)}    # for 56 pixels


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    g = parser.add_argument_group("what is trained, on what")
    g.add_argument("--clip", metavar="DIR", dest="clip_folder", help=f"Hugging Face CLIP folder; None: {TOY}/clip")
    g.add_argument("--data", nargs="+", metavar="FILE", default=[str(TOY / "captions/*.tar")],
                   help="img2dataset shards, COCO and LLaVA JSON, of which the pictures are read; FILE@3: each epoch "
                        "reads it three times")
    g.add_argument("--images", metavar="DIR", default=str(TOY / "chats/images"),
                   help="what paths in JSON files are relative to")
    g.add_argument("--vgg", metavar="FILE", help="torchvision's VGG-16 weights, for LPIPS; None: no LPIPS")
    g.add_argument("--lpips", metavar="FILE", help="LPIPS's linear weights for VGG")
    g = parser.add_argument_group("the tokenizer (None: as published, or as in `make demo` over a CLIP of 56 pixels)")
    for name, words in (NUMBERS | LISTS).items():
        g.add_argument("--" + name.replace("_", "-"), nargs="+" if name in LISTS else None,
                       type=bounded(int, *LIMITS.get(name, (1,))),
                       help=words + "; None: " + " or ".join(shown(s[name]) for s in (PUBLISHED, DEMO) if name in s))
    g.add_argument("--quantizer", choices=("lfq", "vq"), default=PUBLISHED["quantizer"],
                   help="vq: learned tables, the baseline that fails in Fig. 2")
    g.add_argument("--encoder", choices=("clip", "scratch"), default=PUBLISHED["encoder"],
                   help="scratch: the VQGAN's own, trained along, at the CLIP's resolution (Table 3 g)")
    g = parser.add_argument_group("losses")
    g.add_argument("--disc-start", type=NATURAL, default=20_000, help="step at which the discriminator joins")
    g.add_argument("--disc-weight", type=bounded(float, 0), default=0.8,
                   help="of the adversarial loss, times its adaptive weight")
    g.add_argument("--perceptual-weight", type=bounded(float, 0), default=1.0, help="of LPIPS")
    g.add_argument("--l2-weight", type=bounded(float, 0), default=0.0,
                   help="of the mean squared error, beside L1's one")
    g.add_argument("--clip-weight", type=bounded(float, 0), default=0.0,
                   help="of a perceptual loss in the frozen CLIP's own features, for where there is no VGG")
    g.add_argument("--entropy-weight", type=bounded(float, 0), default=0.1, help="of the entropy losses")
    g.add_argument("--ema", type=bounded(float, 0, below=1), default=0.0, metavar="DECAY",
                   help="keep this running mean of the weights and save it instead of the last ones; 0: do not")
    engine.add_options(parser, steps=200_000, warmup=5000, batch=256, lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0,
                       engines=False)
    parser.set_defaults(out=str(TOY / "tokenizer"))
    return parser


def shown(size):
    return " ".join(map(str, size)) if isinstance(size, tuple) else str(size)


def fill_in(args, clip):
    """The sizes that were left open"""
    usual = PUBLISHED | DEMO if clip["image_size"] == 56 else PUBLISHED
    usual = usual | {"attn_resolutions": (clip["image_size"] // clip["patch_size"],)}         # as both have it
    for name in (*NUMBERS, *LISTS):
        if getattr(args, name) is None:
            setattr(args, name, usual[name])


def new_tokenizer(args, clip):
    """A tokenizer of these options over a CLIP of these sizes, all of it new"""
    fill_in(args, clip)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(
        clip=clip, resolution=clip["image_size"], grid=clip["image_size"] // clip["patch_size"],
        **{name: getattr(args, name) for name in (*NUMBERS, *LISTS, "quantizer", "encoder")}))
    if args.encoder == "clip":
        tokenizer.clip.requires_grad_(False)
    return tokenizer


class Trained(nn.Module):
    """What a step runs, in one module: replicas synchronise what passes through forward. `used` (K, N) counts the codes
    of about the last 50 batches; `mean0`, `mean1`... are the running means of --ema."""

    def __init__(self, tokenizer, entropy_weight, ema):
        super().__init__()
        c, self.tokenizer, self.entropy_weight, self.ema = tokenizer.config, tokenizer, entropy_weight, ema
        self.register_buffer("used", torch.zeros(c.num_codebooks, c.codebook_size))
        for i, p in enumerate(self.learning if ema else []):
            self.register_buffer(f"mean{i}", p.detach().clone())

    @property
    def learning(self):
        return [p for p in self.tokenizer.parameters() if p.requires_grad]

    @torch.no_grad()
    def average(self, step):
        """After an update; early means are short"""
        decay = min(self.ema, (1 + step) / (10 + step))
        for i, p in enumerate(self.learning if self.ema else []):
            getattr(self, f"mean{i}").lerp_(p, 1 - decay)

    @torch.no_grad()
    def take_average(self):
        for i, p in enumerate(self.learning if self.ema else []):
            p.copy_(getattr(self, f"mean{i}"))

    @torch.no_grad()
    def count(self, ids):
        """ids (B, G, G, K) -> share of the codes in use, their perplexity, both means over the codebooks"""
        books, codes = self.used.shape
        self.used.mul_(0.98).add_(torch.stack([torch.bincount(ids[..., k].flatten(), minlength=codes)
                                               for k in range(books)]))
        p = self.used / self.used.sum(-1, keepdim=True)
        perplexity = torch.exp(-(p * p.clamp(min=1e-9).log()).sum(-1))
        return {"used": float((self.used > 0.5).float().mean()), "perplexity": float(perplexity.mean())}

    def forward(self, pixels):
        """pixels (B, 3, R, R) -> reconstruction (B, 3, R, R), ids, the quantizer's losses"""
        c, quantize = self.tokenizer.config, self.tokenizer.quantize
        quantized, ids, projected = self.tokenizer.quantized(self.tokenizer.signal(pixels))
        with torch.autocast(projected.device.type, enabled=False):        # 100 times a square: no place for bfloat16
            losses = (lfq_loss(projected, c.codebook_size, entropy_weight=self.entropy_weight)
                      if c.quantizer == "lfq" else vq_loss(projected.float(), quantize.vectors(ids)))
        return self.tokenizer.decoder(self.tokenizer.post_quant_conv(quantized)), ids, losses


def main():
    args = options().parse_args()
    if args.plan:
        clip = read_clip_sizes(args.clip_folder) if args.clip_folder else plan.CLIP_L
        with shapes_only():
            trained, discriminator = Trained(new_tokenizer(args, clip), args.entropy_weight, 0), Discriminator()
        return plan.show_tokenizer(args, trained, discriminator, LPIPS() if args.vgg else None, clip["image_size"])
    args.clip_folder = args.clip_folder or TOY / "clip"
    world, folder = engine.start(args), need(args.clip_folder)
    tokenizer = new_tokenizer(args, read_clip_sizes(folder))
    if args.encoder == "clip":
        assign(tokenizer.clip, read_clip_weights(folder, torch.float32), folder)
        tokenizer.clip.requires_grad_(False)
    tokenizer.to(world.device)
    discriminator = Discriminator().to(world.device)
    if bool(args.vgg) != bool(args.lpips):
        raise UserError("LPIPS needs both --vgg and --lpips; leave both out to do without it")
    if args.clip_weight and args.encoder != "clip":
        raise UserError("--clip-weight: an encoder from scratch has no CLIP to compare in")
    lpips = LPIPS().read(args.vgg, args.lpips).to(world.device) if args.vgg and args.lpips else None
    recipe = Pictures(tokenizer.config.resolution, args.seed)
    train(args, world, tokenizer, discriminator, lpips, recipe)


def train(args, world, tokenizer, discriminator, lpips, recipe):
    """The whole loop: reconstruct, judge, update generator and discriminator, log, checkpoint."""
    out, sources = Path(args.out), open_sources(args.data, args.images, only_pictures=True)
    models = [Trained(tokenizer, args.entropy_weight, args.ema).to(world.device), discriminator]
    wrapped, wrapped_disc = (engine.replicate(model, world) for model in models)
    optimizers = [engine.adamw(model.parameters(), args) for model in models]
    checkpoints = Checkpoints(out, args, world)
    start, state = checkpoints.resume(args.resume, models, optimizers, args.export)
    batches, order = loader(sources, recipe, args.batch, args.micro_batch, args.seed, world.rank, world.size,
                            args.workers, state, world.device.type == "cuda")
    engine.begin(args, world, start)
    log, stop, bad = engine.Log(out, args, world), Stop(world), engine.BadSamples(out, args.max_bad, world)
    batches, passes = iter(batches), args.batch // args.micro_batch // world.size
    for step in range(start, start if args.export else args.steps):
        clock = time.perf_counter()
        micro = [batch.to(world.device) for batch in itertools.islice(batches, passes)]
        waited = time.perf_counter() - clock
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = engine.learning_rate(step, args)
        try:
            numbers, ids, xrec = update(args, world, step, tokenizer, wrapped, wrapped_disc, lpips, optimizers,
                                        [batch.pixels for batch in micro])
        except FloatingPointError:
            checkpoints.save(step, models, optimizers, order.state_after(step - start), wait=True)
            raise UserError(f"step {step + 1}: loss or gradient is not finite; saved before the update, in {out}. "
                            f"In the batch: {engine.all_names(micro, world)}") from None
        numbers |= models[0].count(ids)
        models[0].average(step)
        samples = engine.total(torch.tensor([[len(batch.names), len(batch.listed)] for batch in micro],
                                            device=world.device).sum(0), world).tolist()
        with checkpoints.finished():
            bad(step + 1, micro, *samples)
        ended, saved = stop(), 0.0
        if ended or engine.due(step, args.save_every) and step + 1 < args.steps:
            saved = checkpoints.save(step + 1, models, optimizers, order.state_after(step + 1 - start), wait=ended)
        checkpoints.poll()
        log(step + 1, numbers | {
            "lr": optimizers[0].param_groups[0]["lr"], "images/s": samples[0] / (time.perf_counter() - clock),
            "memory": engine.memory(world), "wait": waited, "save": saved, "skipped": bad.bad,
            "causes": dict(bad.causes)})
        if world.first and (engine.due(step, args.sample_every) or step + 1 == args.steps):
            shown = to_rgb(torch.cat([batch.pixels for batch in micro])[:8])
            if len(shown):                                # what was given above what came back
                pairs = torch.cat([torch.cat(pair, dim=1) for pair in zip(shown, xrec)], dim=2)
                (out / "samples").mkdir(exist_ok=True)
                to_picture(pairs).save(out / "samples" / f"{step + 1:06d}.png")
        if ended:
            return world.say(f"stopped after step {step + 1}; --resume goes on")
    checkpoints.finish()
    bad.finish(start)
    models[0].take_average()
    if world.first:
        tokenizer.save_pretrained(out)
    world.say(f"{out} is an image tokenizer folder")
    engine.barrier(world)


def update(args, world, step, tokenizer, wrapped, disc, lpips, optimizers, micro):
    """One update of the generator, and of the discriminator once it has joined. Passes (pixels of each in micro) count
    alike; the codes' batch entropy is that of a pass. -> mean numbers, ids, reconstructions"""
    generator, critic = optimizers
    adversarial, done, judged, critics_norm = step >= args.disc_start, [], [], torch.zeros(())
    generator.zero_grad(set_to_none=True)
    for n, pixels in enumerate(micro):
        engine.gradients_travel(wrapped, n == len(micro) - 1)
        engine.gradients_travel(disc, False)              # it only passes on what the generator learns from
        done.append(reconstruct(args, world, adversarial, tokenizer, wrapped, disc, lpips, pixels, len(micro)))
    norm = engine.clip([p for p in tokenizer.parameters() if p.requires_grad], args.clip_norm)
    critic.zero_grad(set_to_none=True)
    for n, (pixels, (_, _, xrec)) in enumerate(zip(micro, done) if adversarial else ()):
        engine.gradients_travel(disc, n == len(micro) - 1)
        real, made = (disc(x) for x in (to_rgb(pixels) if len(pixels) else xrec, xrec))
        judged.append(discriminator_loss(real, made) * bool(len(pixels)))
        (judged[-1] / len(micro)).backward()
        critics_norm = nn.utils.get_total_norm([p.grad for p in disc.parameters()])
    losses = torch.stack([norm, critics_norm.to(norm.device), *(numbers["loss"] for numbers, _, _ in done)])
    if not agreed(torch.isfinite(losses).all(), world):
        raise FloatingPointError
    generator.step()
    if adversarial:
        critic.step()
    numbers = {key: torch.stack([numbers[key] for numbers, _, _ in done]).mean().item() for key in done[0][0]}
    numbers |= {"norm": norm.item(), "disc": torch.stack(judged).mean().item() if judged else None}
    ids, xrec = (torch.cat([out[which][:len(pixels)] for pixels, out in zip(micro, done)]) for which in (1, 2))
    return numbers, ids, xrec


def reconstruct(args, world, adversarial, tokenizer, wrapped, disc, lpips, pixels, passes):
    """One pass of the generator, forward and backward. -> numbers, ids, reconstructions"""
    worth = bool(len(pixels))                             # a pass without a usable picture teaches nothing
    pixels = pixels if worth else pixels.new_zeros(1, *pixels.shape[1:])
    target = to_rgb(pixels)
    with world.autocast():
        xrec, ids, code = wrapped(pixels)
    xrec = xrec.float()
    l1, mse = F.l1_loss(xrec, target), F.mse_loss(xrec, target)
    nll = l1 + args.l2_weight * mse
    if lpips:
        nll = nll + args.perceptual_weight * lpips(xrec, target)
    if args.clip_weight:
        code["clip"] = clip_distance(tokenizer.clip, xrec, pixels)
        nll = nll + args.clip_weight * code["clip"]
    loss = nll + code.pop("loss")
    if adversarial:
        g_loss = -disc(xrec).mean()
        code["disc_weight"] = args.disc_weight * adaptive_weight(nll, g_loss, tokenizer.decoder.conv_out.weight)
        loss = loss + code["disc_weight"] * g_loss
    (loss * (worth / passes)).backward()
    mse = F.mse_loss(xrec.detach().clamp(-1, 1), target)  # of what a picture can show
    numbers = {"loss": loss, "l1": l1, "psnr": 10 * torch.log10(4 / mse), **code}
    return {name: value.detach() for name, value in numbers.items()}, ids, xrec.detach()


if __name__ == "__main__":
    run(main)
