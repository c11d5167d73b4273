"""The VQGAN's convolutions: the decoder from codes to pixels (Sec. 3.2, A.1), and the encoder that Libra leaves out.

taming-transformers' shapes under its names, so that the published weights fit. Letters: B pictures, R resolution in
pixels, G grid side of the codes.
"""
import torch.nn.functional as F
from torch import nn


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)             # (B, heads, h*w, d)
                   for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return x + self.proj_out(h)


class Decoder(nn.Module):
    """taming-transformers' decoder. The last upsampling goes to `resolution`, by a fraction if need be (192 -> 336)."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, z_channels, grid, resolution, heads):
        super().__init__()
        self.resolution = resolution
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = nn.ModuleDict({"block_1": ResBlock(width, width), "attn_1": AttnBlock(width, heads),
                                  "block_2": ResBlock(width, width)})
        levels, size = [], grid
        for level in reversed(range(len(ch_mult))):
            up = nn.Module()
            up.block, up.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                up.block.append(ResBlock(width, ch * ch_mult[level]))
                width = ch * ch_mult[level]
                if size in attn_resolutions:
                    up.attn.append(AttnBlock(width, heads))
            if level:
                up.upsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
                size *= 2
            levels.insert(0, up)                                                              # up.0 is the finest
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):                                                                     # (B, z_channels, G, G)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for level in reversed(range(len(self.up))):
            up = self.up[level]
            for i, block in enumerate(up.block):
                h = block(h)
                if len(up.attn):
                    h = up.attn[i](h)
            if level:
                size = self.resolution if level == 1 else 2 * h.shape[-1]
                h = up.upsample.conv(F.interpolate(h, size=(size, size), mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))                                        # (B, 3, R, R)


class Encoder(nn.Module):
    """Pictures (B, 3, R, R) in [-1, 1] -> (B, z_channels, G, G): what Table 3 (g) has in place of the frozen CLIP. A
    resolution other than G * 2^(levels - 1) is scaled to that first."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, z_channels, grid, heads):
        super().__init__()
        self.resolution = size = grid * 2 ** (len(ch_mult) - 1)
        self.conv_in, width = nn.Conv2d(3, ch, 3, padding=1), ch
        self.down = nn.ModuleList()
        for level, mult in enumerate(ch_mult):
            down = nn.Module()
            down.block, down.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(max(1, num_res_blocks)):
                down.block.append(ResBlock(width, ch * mult))
                width = ch * mult
                if size in attn_resolutions:
                    down.attn.append(AttnBlock(width, heads))
            if level < len(ch_mult) - 1:
                down.downsample, size = nn.Conv2d(width, width, 3, stride=2, padding=1), size // 2
            self.down.append(down)
        self.mid = nn.ModuleDict({"block_1": ResBlock(width, width), "attn_1": AttnBlock(width, heads),
                                  "block_2": ResBlock(width, width)})
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x):
        if x.shape[-1] != self.resolution:
            x = F.interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", antialias=True)
        h = self.conv_in(x)
        for down in self.down:
            for i, block in enumerate(down.block):
                h = block(h)
                if len(down.attn):
                    h = down.attn[i](h)
            if hasattr(down, "downsample"):
                h = down.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))
