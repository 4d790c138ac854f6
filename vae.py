"""Video autoencoders: pixels to latents and back, streamed, with the state in the caller's hands.

`LinearVAE` is the tiny model's own: one linear map each way, which moves exactly and costs next to nothing.
`TinyVAE` has the layout and the parameter names of TAEHV (github.com/madebyollin/taehv, MIT), so its public files for
Wan (`taew2_1`, `taew2_2`) load into the same class as the tiny model's own weights. Its convolutions are 2-D:
`MemBlock` sees the previous frame, `Repack` packs frames into channels and unpacks them. `WanVAE` is that of Wan 2.1
and 2.2 5B, with causal 3-D ones. Latents are normalised as the DiT sees them: no mean, no scale, about unit variance.

    B batch   T video frames   F latent frames, T = 1 + 4 (F - 1)   C channels   h w latent size   H W pixels
"""

import json
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

FRAMES = 4  # video frames per latent frame, in every VAE of the Wan family


@dataclass
class TinyVAEConfig:
    """A stage is (width, blocks, time, space): its channels, its MemBlocks, and its strides. The defaults are taew2_1.
    pad: where frames are repeated so that T = 4F - 3 frames fill F latents. "end": the last one, as in public files, so
    that a latent sees up to three frames of its future. "front": frame 0, for ever, and no latent sees the future."""
    latent_channels: int = 16
    patch: int = 1        # pixels per side that are folded into channels before the first convolution
    pad: str = "end"
    stem: int = 64        # width of the encoder's first convolution
    encoder: tuple = ((64, 3, 2, 2), (64, 3, 2, 2), (64, 3, 1, 2))
    decoder: tuple = ((256, 3, 1, 2), (128, 3, 2, 2), (64, 3, 2, 2))
    tail: int = 64        # width of the decoder's last hidden layer


TINY = TinyVAEConfig(patch=4, pad="front", stem=64, encoder=((128, 2, 4, 2),),
                     decoder=((128, 3, 4, 2), (56, 1, 1, 1)), tail=56)


def conv(inputs, outputs, stride=1, bias=True):
    """A 3x3 convolution that keeps the size (stride 1) or halves it (stride 2)."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class MemBlock(nn.Module):
    """Residual block over each frame and the one before it. `past` (B, C, h, w) is the frame before the first."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        nn.init.zeros_(self.conv[4].weight)     # a new block is the identity
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x, past):
        before = torch.cat([past[:, None], x[:, :-1]], 1)           # x (B, T, C, h, w), shifted by one frame
        y = self.conv(torch.cat([x, before], 2).flatten(0, 1))      # (B T, C, h, w)
        return F.relu(y.view_as(x) + x)


class Repack(nn.Module):
    """Pack `pack` consecutive frames into one, or unpack each into `grow`: (B T, C, h, w). TAEHV's TPool and TGrow."""

    def __init__(self, width, pack=1, grow=1):
        super().__init__()
        self.pack = pack
        self.conv = nn.Conv2d(width * pack, width * grow, 1, bias=False)

    def forward(self, x):
        frames, C, h, w = x.shape
        return self.conv(x.reshape(frames // self.pack, self.pack * C, h, w)).reshape(-1, C, h, w)


def build_encoder(c):
    """Config to nn.Sequential, indices as in TAEHV's files."""
    layers = [conv(3 * c.patch ** 2, c.stem), nn.ReLU()]
    width = c.stem
    for out, blocks, time, space in c.encoder:
        layers += [Repack(width, time), conv(width, out, space, bias=False), *(MemBlock(out) for _ in range(blocks))]
        width = out
    return nn.Sequential(*layers, conv(width, c.latent_channels))


def build_decoder(c):
    """Config to nn.Sequential, indices as in TAEHV's files. Layer 0, which has no weights, is in `decode_frames`."""
    layers = [nn.Identity(), conv(c.latent_channels, c.decoder[0][0]), nn.ReLU()]
    widths = [stage[0] for stage in c.decoder] + [c.tail]
    for (width, blocks, time, space), out in zip(c.decoder, widths[1:]):
        layers += [*(MemBlock(width) for _ in range(blocks)), nn.Upsample(scale_factor=space),
                   Repack(width, grow=time), conv(width, out, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), conv(c.tail, 3 * c.patch ** 2))


def run(layers, x, state, still):
    """Frames (B, T, C, H, W) through the layers. `state` holds the last input frame of every MemBlock; None starts a
    clip, before which the first frame stood still (still=True), or all was zero (False). Returns the output and the new
    state, and leaves the old one as it was."""
    memory = []
    for layer in layers:
        if isinstance(layer, MemBlock):
            past = state[len(memory)] if state is not None else x[:, 0] if still else torch.zeros_like(x[:, 0])
            memory.append(x[:, -1])
            x = layer(x, past)
        else:
            x = layer(x.flatten(0, 1)).unflatten(0, (len(x), -1))
    return x, memory


class TinyVAE(nn.Module):
    """Encoder and decoder; 8x8 pixels by 4 frames to one latent with `TINY` and taew2_1, 16x16 by 4 with taew2_2."""

    def __init__(self, config=TINY):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        nn.init.constant_(self.decoder[-1].bias, 0.5)     # training starts from grey, not from black
        self.stride = config.patch * math.prod(stage[3] for stage in config.encoder)

    def encode(self, video, piece=4):
        """Video (B, 3, T, H, W) in [-1, 1], T = 1 + 4 (F - 1), to latents (B, C, F, h, w). An image is T = 1.
        `piece` latent frames are computed at a time, which bounds memory and changes nothing."""
        T, H, W = video.shape[2:]
        assert T % FRAMES == 1, f"a clip has 1 + {FRAMES} k frames, this one has {T}"
        assert H % self.stride == W % self.stride == 0, f"{W}x{H} pixels do not divide by {self.stride}"
        x = video.transpose(1, 2) / 2 + 0.5                                     # (B, T, 3, H, W) in [0, 1]
        front = self.config.pad == "front"
        repeat = (x[:, :1] if front else x[:, -1:]).expand(-1, FRAMES - 1, -1, -1, -1)
        x = torch.cat([repeat, x] if front else [x, repeat], 1)
        latents, state = [], None
        for frames in x.split(FRAMES * piece, 1):
            z, state = run(self.encoder, F.pixel_unshuffle(frames, self.config.patch), state, front)
            latents.append(z)
        return torch.cat(latents, 1).transpose(1, 2)

    def decode_frames(self, latents, state=None):
        """As `decode`, without the limit to [-1, 1]: what a reconstruction loss is computed on."""
        x = 3 * torch.tanh(latents.transpose(1, 2) / 3)                         # soft limit at 3 standard deviations
        x, memory = run(self.decoder, x, state, self.config.pad == "front")
        video = F.pixel_shuffle(x, self.config.patch).transpose(1, 2) * 2 - 1
        return video[:, :, FRAMES - 1 if state is None else 0:], memory         # a clip starts with a single frame

    def decode(self, latents, state=None):
        """Latents (B, C, F, h, w) to video (B, 3, T, H, W) in [-1, 1], and the state that continues it.
        state=None starts a clip: T = 4F - 3. Otherwise T = 4F. The state passed in is not modified."""
        video, state = self.decode_frames(latents, state)
        return video.clamp(-1, 1), state

    @classmethod
    def from_pretrained(cls, path):
        """As `load_vae`, which must find a tiny VAE: this class, or `LinearVAE`, as the tiny model ships it."""
        return load_vae(path, (cls, LinearVAE))

    def metadata(self):
        """What a safetensors file says of itself: {"format": …, "config": JSON}."""
        return {"format": "tiny-vae", "config": json.dumps(asdict(self.config))}


# ----------------------------------------------------------------------------------------------------------------------
# A linear code of windows of pixels.

@dataclass
class LinearVAEConfig:
    """The code of the tiny model."""
    latent_channels: int = 96
    stride: int = 8             # pixels per side of a latent pixel's cell
    overlap: int = 4            # pixels by which its window reaches beyond the cell, so that cells leave no seams


class LinearVAE(nn.Module):
    """Windows of 16x16 pixels by 4 frames, one every 8 pixels, to `latent_channels` numbers, linearly, and back.

    No photograph of compression, but two things a small convolutional code lacks: what moves in the picture moves in
    the code in the same way, everywhere, so that codes of moved pixels are exact (see `copy_along_tracks`), and decoding
    is one matrix product. There is no state: a latent frame is its own four frames. Frame 0 stands behind three copies
    of itself. Training starts from the principal components of cells (train_distill.py, stage vae)."""

    def __init__(self, config=LinearVAEConfig()):
        super().__init__()
        self.config = config
        self.stride = config.stride
        pixels = 3 * FRAMES
        window = config.stride + 2 * config.overlap
        self.encoder = nn.Conv2d(pixels, config.latent_channels, window, config.stride)
        self.decoder = nn.ConvTranspose2d(config.latent_channels, pixels, window, config.stride)
        self.register_buffer("latent_std", torch.ones(config.latent_channels))      # of the codes of typical video

    def encode(self, video):
        """Video (B, 3, T, H, W) in [-1, 1], T = 1 + 4 (F - 1), to latents (B, C, F, h, w). An image is T = 1."""
        B, _, T, H, W = video.shape
        assert T % FRAMES == 1, f"a clip has 1 + {FRAMES} k frames, this one has {T}"
        assert H % self.stride == W % self.stride == 0, f"{W}x{H} pixels do not divide by {self.stride}"
        before = video[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1)
        x = torch.cat([before, video], 2).unflatten(2, (-1, FRAMES))               # (B, 3, F, 4, H, W)
        x = x.transpose(1, 2).flatten(0, 1).flatten(1, 2)                          # (B F, 12, H, W)
        x = F.pad(x, [self.config.overlap] * 4, mode="replicate")
        return self.encoder(x).unflatten(0, (B, -1)).transpose(1, 2)               # (B, C, F, h, w)

    def decode_frames(self, latents, state=None):
        """As `decode`, without the limit to [-1, 1]."""
        B = len(latents)
        z = latents.transpose(1, 2).flatten(0, 1)                                  # (B F, C, h, w)
        z = F.pad(z, [1] * 4, mode="replicate")                                    # so that the rim has all its windows
        rim = self.stride + self.config.overlap
        x = self.decoder(z)[..., rim:-rim, rim:-rim]                               # (B F, 12, H, W)
        x = x.unflatten(1, (3, FRAMES)).unflatten(0, (B, -1))                      # (B, F, 3, 4, H, W)
        video = x.transpose(1, 2).flatten(2, 3)                                    # (B, 3, 4 F, H, W)
        return video[:, :, FRAMES - 1 if state is None else 0:], []

    def decode(self, latents, state=None):
        """Latents (B, C, F, h, w) to video (B, 3, T, H, W) in [-1, 1], and the state that continues it: an empty list.
        state=None starts a clip: T = 4F - 3. Otherwise T = 4F."""
        video, state = self.decode_frames(latents, state)
        return video.clamp(-1, 1), state

    def pixel_weight(self):
        """(C,): how much an error in each channel is worth in pixels, 1 in the root mean square."""
        size = self.decoder.weight.detach().flatten(1).norm(dim=1)
        return size / size.square().mean().sqrt()

    @classmethod
    def from_pretrained(cls, path):
        """As `load_vae`, which must find a linear VAE."""
        return load_vae(path, cls)

    def metadata(self):
        """What a safetensors file says of itself: {"format": …, "config": JSON}."""
        return {"format": "linear-vae", "config": json.dumps(asdict(self.config))}


# ----------------------------------------------------------------------------------------------------------------------
# The VAE of Wan. Tensors are (B, C, T, H, W), names are those of Wan's files. A clip is computed in pieces: frame 0, a
# latent of its own, then four frames or one latent at a time. `state` holds, for each convolution over time, the input
# frames that its next piece still sees; None starts a clip. A layer takes its entry off it and adds one to `memory`.

@dataclass
class WanVAEConfig:
    """Width of the encoder's first and of the decoder's last stage; the defaults are Wan 2.1."""
    latent_channels: int = 16
    encoder: int = 96
    decoder: int = 96
    residual: bool = False      # Wan 2.2: 2x2 pixels are folded into channels, and each stage has a shortcut


# Mean and standard deviation of each latent channel, by the number of channels.
STATISTICS = {
    16: ((-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
          0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
         (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
          3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)),
    48: ((-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
          0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
          -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
          -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
         (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
          0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
          0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
          0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)),
}


class CausalConv(nn.Conv3d):
    """A convolution that sees past frames and no future ones. Before a clip all is zero."""

    def __init__(self, inputs, outputs, kernel=(3, 3, 3), stride=1):
        super().__init__(inputs, outputs, kernel, (stride, 1, 1), (0, kernel[1] // 2, kernel[2] // 2))
        self.past = kernel[0] - stride

    def forward(self, x, state, memory):
        x = F.pad(x, (0, 0, 0, 0, self.past, 0)) if state is None else torch.cat([state.pop(0), x], 2)
        memory.append(x[:, :, -self.past:].clone())     # a view would keep all of x
        return super().forward(x)


class TimeConv(CausalConv):
    """Halve T (stride 2) or double it (stride 1), but frame 0 of a clip stays as it is."""

    def __init__(self, width, stride):
        super().__init__(width, 2 * width // stride, (3, 1, 1), stride)

    def forward(self, x, state, memory):
        if state is None:       # the next piece sees frame 0 where T is halved, zeros where it is doubled
            memory.append(x if self.past == 1 else torch.zeros_like(x).expand(-1, -1, 2, -1, -1))
            return x
        y = super().forward(x, state, memory).unflatten(1, (-1, x.shape[1]))    # (B, 1 or 2, C, T, H, W)
        return y.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


class Causal(nn.Sequential):
    """Layers one after the other; those that see the past are handed `state` and `memory`."""

    def forward(self, x, state, memory):
        for layer in self:
            causal = isinstance(layer, (CausalConv, Causal, ResBlock))
            x = layer(x, state, memory) if causal else layer(x)
        return x


class PerFrame(nn.Sequential):
    """2-D layers over each frame."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class RMSNorm(nn.Module):
    """Over the channels. `dims` is how many dimensions follow them."""

    def __init__(self, width, dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * dims))

    def forward(self, x):
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class ResBlock(nn.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, inputs, width):
        super().__init__()
        self.residual = Causal(RMSNorm(inputs), nn.SiLU(), CausalConv(inputs, width),
                               RMSNorm(width), nn.SiLU(), nn.Identity(), CausalConv(width, width))
        self.shortcut = nn.Conv3d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x, state, memory):
        return self.residual(x, state, memory) + self.shortcut(x)


class Attention(nn.Module):
    """Residual self-attention of one head within each frame."""

    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width, 2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x):
        B, C, T, H, W = x.shape
        qkv = self.to_qkv(self.norm(x.transpose(1, 2).flatten(0, 1)))                   # (B T, 3 C, H, W)
        q, k, v = qkv.flatten(2).transpose(1, 2)[:, None].contiguous().chunk(3, -1)     # (B T, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj(y.unflatten(2, (H, W))).unflatten(0, (B, T)).transpose(1, 2)


class Stage(Causal):
    """A stage of Wan 2.2: its layers, plus its input, averaged and folded or (up) repeated and unfolded."""

    def __init__(self, name, layers, *size):
        super().__init__(OrderedDict({name: Causal(*layers)}))
        self.up, self.size = name == "upsamples", size

    def forward(self, x, state, memory):
        y, (width, time, space) = super().forward(x, state, memory), self.size
        missing = time - 1 if state is None else 0                              # frame 0 of a clip is a single frame
        if not self.up:
            x = F.avg_pool3d(F.pad(x, (0, 0, 0, 0, missing, 0)), (1, space, space))
            return y + x.unflatten(2, (-1, time)).transpose(2, 3).flatten(1, 2)                 # B C (T t) -> B (C t) T
        if space == 1:                                                          # the last one has no shortcut
            return y
        x = x.repeat_interleave(width * time * space ** 2 // x.shape[1], 1)     # B (C t p q) T H W
        x = x.unflatten(1, (width, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y + x.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, missing:]  # B C (T t) (H p) (W q)


def resample(width, outputs, time, up):
    """Double T if time is 2, and then H and W; or halve H and W, and then T."""
    time_conv = {"time_conv": TimeConv(width, 1 if up else 2)} if time == 2 else {}
    if up:
        conv = PerFrame(nn.Upsample(scale_factor=2), nn.Conv2d(width, outputs, 3, padding=1))
        return Causal(OrderedDict(**time_conv, resample=conv))
    conv = PerFrame(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, outputs, 3, 2))
    return Causal(OrderedDict(resample=conv, **time_conv))


def build_wan(c, up):
    """The encoder, from pixels to mean and log variance of the latents, or (up) the decoder."""
    base, blocks, name = (c.decoder, 3, "upsamples") if up else (c.encoder, 2, "downsamples")
    stages = ((4, 2, 2), (4, 2, 2), (2, 1, 2), (1, 1, 1)) if up else ((1, 1, 2), (2, 2, 2), (4, 2, 2), (4, 1, 1))
    width, wide, pixels, layers = base * stages[0][0], 4 * base, 12 if c.residual else 3, []
    conv1 = CausalConv(c.latent_channels if up else pixels, width)
    for multiple, time, space in stages:
        inputs, out = width, base * multiple
        stage = [ResBlock(inputs if i == 0 else out, out) for i in range(blocks)]
        width = out // 2 if up and space == 2 and not c.residual else out
        if space == 2:
            stage.append(resample(out, width, time, up))
        layers += [Stage(name, stage, out, time, space)] if c.residual else stage
    middle = Causal(ResBlock(wide, wide), Attention(wide), ResBlock(wide, wide))
    head = Causal(RMSNorm(width), nn.SiLU(), CausalConv(width, pixels if up else 2 * c.latent_channels))
    order = {"middle": middle, name: Causal(*layers)} if up else {name: Causal(*layers), "middle": middle}
    return Causal(OrderedDict(conv1=conv1, **order, head=head))


class WanVAE(nn.Module):
    """Encoder and decoder; 8x8 pixels by 4 frames to one latent in Wan 2.1, 16x16 by 4 in Wan 2.2 5B."""

    def __init__(self, config=WanVAEConfig()):
        super().__init__()
        self.config, C = config, config.latent_channels
        self.encoder, self.decoder = build_wan(config, up=False), build_wan(config, up=True)
        self.conv1, self.conv2 = nn.Conv3d(2 * C, 2 * C, 1), nn.Conv3d(C, C, 1)
        self.stride = 16 if config.residual else 8

    def encode(self, video):
        """As TinyVAE's, (B, 3, T, H, W) to (B, C, F, h, w): the means, nothing is drawn. Four frames at a time."""
        (T, H, W), latents, state = video.shape[2:], [], None
        assert T % FRAMES == 1, f"a clip has 1 + {FRAMES} k frames, this one has {T}"
        assert H % self.stride == W % self.stride == 0, f"{W}x{H} pixels do not divide by {self.stride}"
        mean, std = video.new_tensor(STATISTICS[self.config.latent_channels]).view(2, -1, 1, 1, 1)
        for frames in video.split([1] + T // FRAMES * [FRAMES], 2):
            x = F.pixel_unshuffle(frames.transpose(1, 2).mT, self.stride // 8).mT.transpose(1, 2)  # columns before rows
            past, state = state, []
            z = self.conv1(self.encoder(x, past, state)).chunk(2, 1)[0]
            latents.append((z - mean) / std)
        return torch.cat(latents, 2)

    def decode(self, latents, state=None):
        """As TinyVAE's: latents (B, C, F, h, w) to video (B, 3, T, H, W) in [-1, 1], and the state that continues it.
        One latent frame is computed at a time, so pieces give the bits of the whole."""
        C, video, state = self.config.latent_channels, [], state and list(state)
        assert latents.shape[1] == C, f"latents of this VAE have {C} channels, these have {latents.shape[1]}"
        mean, std = latents.new_tensor(STATISTICS[C]).view(2, -1, 1, 1, 1)
        for z in latents.split(1, 2):
            past, state = state, []
            x = self.decoder(self.conv2(z * std + mean), past, state)
            video.append(F.pixel_shuffle(x.transpose(1, 2).mT, self.stride // 8).mT.transpose(1, 2))
        return torch.cat(video, 2).clamp(-1, 1), state

    @classmethod
    def from_pretrained(cls, path):
        """As `load_vae`, which must find a VAE of Wan."""
        return load_vae(path, cls)


VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "vae/diffusion_pytorch_model.safetensors",
             "diffusion_pytorch_model.safetensors")     # in a folder; beside a .pth, the last is Wan's DiT


def load_vae(path, kind=None):
    """The VAE in a .safetensors or .pth file, or a folder as Wan and diffusers publish it: `TinyVAE`, `LinearVAE` or
    `WanVAE`, in float32 and eval mode. Its own metadata, else the tensors, tell which and how wide. Raises ValueError, one line
    naming the file, if it does not fit or is not of the class `kind`."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in VAE_FILES if (path / name).is_file()), path / VAE_FILES[0])
    tensors, metadata = read_tensors(path)
    tensors = wan_names(tensors)
    own = {"tiny-vae": TinyVAEConfig, "linear-vae": LinearVAEConfig}.get(metadata.get("format"))
    config = read_config(own, metadata, path) if own else config_from_tensors(tensors, path)
    build = {TinyVAEConfig: TinyVAE, LinearVAEConfig: LinearVAE, WanVAEConfig: WanVAE}[type(config)]
    with torch.device("meta"):
        vae = build(config)
    if kind and not isinstance(vae, kind):
        wanted = kind if isinstance(kind, type) else kind[0]
        raise ValueError(f"{path}: a {type(vae).__name__}, not a {wanted.__name__}; load_vae opens both")
    return fill(vae, tensors, path, lambda name: torch.float32)


# From diffusers' names to Wan's, in this order.
DIFFUSERS = {".norm1.": ".residual.0.", ".conv1.": ".residual.2.", ".norm2.": ".residual.3.",
             ".conv2.": ".residual.6.", ".conv_shortcut.": ".shortcut.", "post_quant_conv.": "conv2.",
             "quant_conv.": "conv1.", ".conv_in.": ".conv1.", ".norm_out.": ".head.0.", ".conv_out.": ".head.2.",
             "mid_block.resnets.0.": "middle.0.", "mid_block.attentions.0.": "middle.1.",
             "mid_block.resnets.1.": "middle.2.", "_blocks.": "samples.", ".upsamplers.0.": ".resnets.3.",
             ".upsampler.": ".resnets.3.", ".downsampler.": ".resnets.2."}


def wan_names(tensors):
    """The tensors by their names in Wan's files, where diffusers has others."""
    if "quant_conv.weight" not in tensors:
        return tensors
    renamed, pattern, ours = {}, r"(\d)\.resnets\.(\d)", lambda m: str(4 * int(m[1]) + int(m[2]))
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:       # Wan 2.2: lists within a list
        pattern, ours = r"(up|down)(samples\.\d)\.resnets", r"\1\2.\1samples"
    for name, t in tensors.items():
        for theirs, wans in DIFFUSERS.items():
            name = name.replace(theirs, wans)
        renamed[re.sub(pattern, ours, name)] = t
    return renamed


def config_from_tensors(tensors, path):
    """Config of a public file, by the shapes of its tensors. Raises ValueError if it is no VAE of Wan or TAEHV."""
    shapes = {name.removesuffix(".weight"): t.shape for name, t in tensors.items()}
    try:
        if "encoder.17" in shapes:
            down = tuple((shapes[f"encoder.{i + 1}"][0], 3, time, 2) for i, time in ((2, 2), (7, 2), (12, 1)))
            up = tuple((shapes[f"decoder.{i}.conv"][1], 3, time, 2) for i, time in ((7, 1), (13, 2), (19, 2)))
            return TinyVAEConfig(shapes["encoder.17"][0], math.isqrt(shapes["encoder.0"][1] // 3), "end",
                                 shapes["encoder.0"][0], down, up, shapes["decoder.22"][1])
        channels = next(n for n in STATISTICS if n == shapes["conv2"][0])
        return WanVAEConfig(channels, shapes["encoder.conv1"][0], shapes["decoder.head.2"][1],
                            residual="encoder.downsamples.0.downsamples.0.residual.2" in shapes)
    except (KeyError, IndexError, StopIteration):
        raise ValueError(f"{path}: this is {what(tensors)}; a whole VAE of Wan or TAEHV is wanted here") from None


# What is taken for the right file: by how it begins, or by the names in it; the first that fits.
KINDS = {"^version https://git-lfs": "a git-lfs pointer, run git lfs pull", "^<": "a web page", "^$": "an empty file",
         "^PK": "a truncated .pt", "^GGUF": "a GGUF file", "^\x80": "a pickle of something else than tensors, refused",
         "lora": "a LoRA", "visual|vision": "a CLIP encoder", "patch_embedding": "a DiT",
         "token_embedding|shared|encoder.block": "a text encoder", "coder.": "a VAE"}


def what(text):
    """What begins like this, or has tensors of these names."""
    return next((kind for part, kind in KINDS.items() if re.search(part, " ".join(text))), "something unknown")


def read_tensors(path):
    """A weights file to ({name: tensor}, {key: text}); never runs a pickle's code. ValueError names the file.
    Tensors are mapped, not read. Of a Self-Forcing checkpoint: the generator, best its average, and {"layout": key}."""
    from safetensors import safe_open
    try:
        with open(path, "rb") as file:
            start = file.read(2 ** 20)
        if start[8:9] == b"{":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        with warnings.catch_warnings(action="ignore"):      # of files that are refused anyway
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        layouts = [key for key in ("generator_ema", "generator", "model") if key in tensors]
        tensors = tensors[layouts[0]] if layouts else tensors
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise ValueError("no tensors by name")
        return tensors, {"layout": key for key in layouts[:1]}
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception:                   # torch, zipfile, pickle and safetensors raise a dozen kinds
        raise ValueError(f"{path}: {damage(Path(path), start)}") from None


def damage(path, start):
    """Why a file that begins like this cannot be read, in one line."""
    size, ends = path.stat().st_size, re.findall(rb'"data_offsets"\W+\d+\W+(\d+)', start)
    header = 8 + int.from_bytes(start[:8], "little")
    whole, least = header + max(map(int, ends), default=0), "at least " * (len(start) < header)
    if start[8:9] == b"{" and size < whole:
        return f"truncated: {size} bytes of {least}{whole}; download it again"
    start = b"\x80" if zipfile.is_zipfile(path) else start         # a whole .pt
    return f"this is {what([start[:99].decode('latin-1').lstrip()])} ({size} bytes); .safetensors or .pt is wanted here"


def fill(model, tensors, path, dtype, device="cpu"):
    """Give a model on the meta device its tensors, in dtype(name), eval mode and without gradients. Each is copied, one
    after the other: the file may change or go, and there are never two copies of all. Raises ValueError, naming the
    file and the tensors, unless names and shapes are exactly the model's and all numbers finite."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    faults = {"missing": expected.keys() - found, "unknown": found.keys() - expected,
              "of another shape": {name for name in expected.keys() & found if expected[name] != found[name]}}
    told = [f"{len(n)} tensors are {fault}: {', '.join(sorted(n)[:5])}" for fault, n in faults.items() if n]
    if told:
        raise ValueError(f"{path}: not a whole {type(model).__name__}; {'; '.join(told)}")
    for name, t in tensors.items():
        if not torch.stack(t.aminmax()).isfinite().all():           # 20 times as fast as t.isfinite()
            raise ValueError(f"{path}: {name} holds NaN or infinity; download it again")
        tensors[name] = t.to(device, dtype(name), copy=True)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def read_config(cls, metadata, path):
    """The dataclass that a file's metadata holds as JSON. Raises ValueError naming the file."""
    try:
        saved = json.loads(metadata["config"])
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: the config in it cannot be read ({e}); written by another version?") from None
