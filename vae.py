"""Video autoencoders: pixels to latents and back, streamed, with the state held by the caller.

`LinearVAE` is the tiny model's VAE: one linear map each way, exact for moved pixels and almost free
to compute. `TinyVAE` is TAEHV (github.com/madebyollin/taehv, MIT), with the same parameter names,
so that the public files for Wan (`taew2_1`, `taew2_2`) load. Its convolutions are 2-D: `MemBlock`
sees the previous frame, `Repack` packs frames into channels and unpacks them. `WanVAE` is the VAE
of Wan 2.1 and of Wan 2.2 5B, with causal 3-D convolutions. Latents are normalised as the DiT sees
them: zero mean, about unit variance. Each VAE computes in the dtype of its weights.

    B batch   T video frames   F latent frames, T = 1 + 4 (F - 1)   C channels
    h w latent size   H W size in pixels
"""

import json
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

FRAMES = 4  # video frames per latent frame, in every VAE of the Wan family


def check_video(video, stride):
    """AssertionError unless a VAE of this stride can encode the video (B, 3, T, H, W)."""
    found = tuple(video.shape)
    assert video.ndim == 5 and found[1] == 3, f"video {found}, expected (B, 3, T, H, W)"
    T, H, W = video.shape[2:]
    assert T % FRAMES == 1, f"a clip has 1 + {FRAMES} k frames, this one has {T}"
    assert H % stride == 0 and W % stride == 0, f"{W}x{H} pixels do not divide by {stride}"


def check_latents(latents, channels):
    """AssertionError unless a VAE of so many channels can decode the latents (B, C, F, h, w)."""
    found = tuple(latents.shape)
    assert latents.ndim == 5 and found[1] == channels, (
        f"latents {found}, those of this VAE are (B, {channels}, F, h, w)")


# --------------------------------------------------------------------------------------------------
# The tiny model's VAE: linear maps of pixel windows.

class Segmenter(nn.Module):
    """Which squares of a picture show one thing: a small U-Net that gives each square of 2x2 pixels
    a vector, near to those of the same thing and far from all others (De Brabandere et al. 2017,
    "Semantic instance segmentation with a discriminative loss function"). Trained on drawn scenes
    (extras/segmentation.py)."""

    WIDTHS = (24, 32, 48, 64, 96)       # at a half, a quarter … a 32nd of the picture's size
    VECTOR = 16

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList()
        width = 5                       # RGB and place
        for wider in self.WIDTHS:
            layers = [nn.Conv2d(width, wider, 3, 2, 1), nn.SiLU()]
            if self.down:               # the finest level is the dearest
                layers += [nn.Conv2d(wider, wider, 3, 1, 1), nn.SiLU()]
            self.down.append(nn.Sequential(*layers))
            width = wider
        self.up = nn.ModuleList()
        for narrower in reversed(self.WIDTHS[1:-1]):
            self.up.append(nn.Sequential(
                nn.Conv2d(width + narrower, narrower, 3, 1, 1), nn.SiLU(),
                nn.Conv2d(narrower, narrower, 3, 1, 1), nn.SiLU()))
            width = narrower
        self.out = nn.Conv2d(width, self.VECTOR, 1)
        nn.init.normal_(self.out.weight, std=0.5)       # vectors begin apart

    def forward(self, image):
        """(B, 3, H, W) in [-1, 1] to (B, VECTOR, H / 2, W / 2)."""
        B, _, H, W = image.shape
        image = image.to(self.out.weight.dtype)
        y = torch.linspace(-1, 1, H).to(image)
        x = torch.linspace(-1, 1, W).to(image)
        place = torch.stack(torch.meshgrid(x, y, indexing="xy"))        # (2, H, W)
        hidden = torch.cat([image, place.expand(B, -1, -1, -1)], 1)
        seen = []
        for layer in self.down:
            hidden = layer(hidden)
            seen.append(hidden)
        finer = reversed(seen[1:-1])
        for layer, beside in zip(self.up, finer):
            hidden = F.interpolate(hidden, size=beside.shape[2:], mode="nearest")
            hidden = layer(torch.cat([hidden, beside], 1))
        # The net ends in squares of 4 pixels, and rims lie between them. Vectors are interpolated,
        # not their distances: that finds rims more exactly.
        vectors = self.out(hidden)
        return F.interpolate(vectors, scale_factor=2, mode="bilinear", align_corners=False)


@dataclass
class LinearVAEConfig:
    """The defaults are the tiny model's."""
    latent_channels: int = 96
    stride: int = 8             # side in pixels of a latent's cell
    overlap: int = 4            # pixels of window beyond the cell on each side: no seams


class LinearVAE(nn.Module):
    """A linear map from overlapping windows (16x16 pixels by 4 frames, one every 8 pixels) to
    `latent_channels` numbers, and one back.

    It compresses little, but decoding is one matrix product, and there is no state: a latent frame
    depends only on its own four frames, so pictures that were moved along tracks can be encoded
    chunk by chunk (see `copy_along_tracks`). Frame 0 is preceded by three copies of itself.
    Training starts from the principal components of cells (extras/linear_vae.py).

    Beside the code it holds a Segmenter, which says what tracks take along."""

    def __init__(self, config=LinearVAEConfig()):
        super().__init__()
        self.config = config
        self.stride = config.stride
        pixels = 3 * FRAMES
        window = config.stride + 2 * config.overlap
        self.encoder = nn.Conv2d(pixels, config.latent_channels, window, config.stride)
        self.decoder = nn.ConvTranspose2d(config.latent_channels, pixels, window, config.stride)
        self.register_buffer("latent_std", torch.ones(config.latent_channels))  # over typical video
        self.segmenter = Segmenter()

    def encode(self, video):
        """Video (B, 3, T, H, W) in [-1, 1], T = 1 + 4 (F - 1), to latents (B, C, F, h, w). An image
        is T = 1. AssertionError for any other T, or if H or W do not divide by the stride."""
        check_video(video, self.stride)
        video = video.to(self.encoder.weight.dtype)
        before = video[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1)
        x = torch.cat([before, video], 2).unflatten(2, (-1, FRAMES))        # (B, 3, F, 4, H, W)
        x = x.transpose(1, 2).flatten(0, 1).flatten(1, 2)                   # (B F, 12, H, W)
        x = F.pad(x, [self.config.overlap] * 4, mode="replicate")
        z = self.encoder(x)                                                 # (B F, C, h, w)
        return z.unflatten(0, (len(video), -1)).transpose(1, 2)             # (B, C, F, h, w)

    def decode_unclamped(self, latents, state=None):
        """As `decode`, but not clamped to [-1, 1]: for reconstruction losses."""
        check_latents(latents, self.config.latent_channels)
        z = latents.to(self.decoder.weight.dtype)
        z = z.transpose(1, 2).flatten(0, 1)                                 # (B F, C, h, w)
        z = F.pad(z, [1] * 4, mode="replicate")     # so that windows overlap at the borders too
        rim = self.stride + self.config.overlap
        x = self.decoder(z)[..., rim:-rim, rim:-rim]                        # (B F, 12, H, W)
        x = x.unflatten(1, (3, FRAMES)).unflatten(0, (len(latents), -1))    # (B, F, 3, 4, H, W)
        video = x.transpose(1, 2).flatten(2, 3)                             # (B, 3, 4 F, H, W)
        if state is None:                           # a clip starts with one frame
            video = video[:, :, FRAMES - 1:]
        return video, []

    def decode(self, latents, state=None):
        """Latents (B, C, F, h, w) to (video (B, 3, T, H, W) in [-1, 1], state for the next piece:
        an empty list). state=None starts a clip: T = 4F - 3. Otherwise T = 4F."""
        video, state = self.decode_unclamped(latents, state)
        return video.clamp(-1, 1), state

    def pixel_weight(self):
        """(C,): effect on pixels of an error in each latent channel, normalised to an RMS of 1."""
        size = self.decoder.weight.detach().flatten(1).norm(dim=1)
        return size / size.square().mean().sqrt()

    def metadata(self):
        """Metadata for a safetensors file: {"format": …, "config": JSON}."""
        return {"format": "linear-vae", "config": json.dumps(asdict(self.config))}


# --------------------------------------------------------------------------------------------------
# Helpers on frames (B, C, T, H, W). Memory format is torch.channels_last_3d, the fastest for
# convolutions; single frames, slices and torch.cat of such tensors keep it.

def each_frame(layer, x):
    """Apply a 2-D layer to each frame of x (B, C, T, H, W)."""
    frames = x.permute(0, 2, 3, 4, 1).contiguous().flatten(0, 1)            # (B T, H, W, C)
    y = layer(frames.permute(0, 3, 1, 2))                                   # (B T, C, H, W)
    return y.unflatten(0, (len(x), -1)).transpose(1, 2)


def frames_to_channels(x, count):
    """Fold each `count` frames into channels: (B, C, T, H, W) to (B, count C, T / count, H, W)."""
    x = x.unflatten(2, (-1, count))                         # (B, C, T / count, count, H, W)
    x = x.permute(0, 2, 4, 5, 3, 1)                         # (B, T / count, H, W, count, C)
    return x.flatten(4).permute(0, 4, 1, 2, 3)


def channels_to_frames(x, count):
    """The inverse of frames_to_channels: (B, count C, T, H, W) to (B, C, count T, H, W)."""
    x = x.unflatten(1, (count, -1))                         # (B, count, C, T, H, W)
    x = x.permute(0, 3, 1, 4, 5, 2)                         # (B, T, count, H, W, C)
    return x.flatten(1, 2).permute(0, 4, 1, 2, 3)


# --------------------------------------------------------------------------------------------------
# TAEHV: a tiny VAE of 2-D convolutions.

@dataclass
class TinyVAEConfig:
    """A stage is (width, blocks, time, space): channels, number of MemBlocks, strides. The defaults
    are taew2_1. pad: how T = 4F - 3 frames fill F latents. "end" repeats the last frame, as in the
    public files, so that a latent sees up to three future frames. "front" repeats frame 0, so that
    no latent sees the future."""
    latent_channels: int = 16
    patch: int = 1        # side of the pixel squares folded into channels before the encoder
    pad: str = "end"
    stem: int = 64        # width of the encoder's first convolution
    encoder: tuple = ((64, 3, 2, 2), (64, 3, 2, 2), (64, 3, 1, 2))
    decoder: tuple = ((256, 3, 1, 2), (128, 3, 2, 2), (64, 3, 2, 2))
    tail: int = 64        # width of the decoder's last hidden layer


def conv(inputs, outputs, stride=1, bias=True):
    """3x3 convolution that keeps the size (stride 1) or halves it (stride 2)."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class MemBlock(nn.Module):
    """Residual block over each frame and the one before it. `past` (B, C, 1, h, w): the frame
    before the first."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * width, width), nn.ReLU(inplace=True),
                                  conv(width, width), nn.ReLU(inplace=True),
                                  conv(width, width))
        nn.init.zeros_(self.conv[4].weight)     # a new block is the identity
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x, past):
        before = torch.cat([past, x[:, :, :-1]], 2)     # x (B, C, T, h, w), shifted by one frame
        y = each_frame(self.conv, torch.cat([x, before], 1))
        return F.relu(y + x)


class Repack(nn.Module):
    """Pack `pack` consecutive frames into one, or unpack each into `grow`: TAEHV's TPool and TGrow.
    `grow_frames` does the unpacking, fused with the adjacent layers."""

    def __init__(self, width, pack=1, grow=1):
        super().__init__()
        self.pack = pack
        self.grow = grow
        self.conv = nn.Conv2d(width * pack, width * grow, 1, bias=False)

    def forward(self, x):
        return each_frame(self.conv, frames_to_channels(x, self.pack))


def grow_frames(x, space, repack, conv):
    """Apply nn.Upsample(scale_factor=space), then `repack`, then a 3x3 convolution `conv` to x
    (B, C, T, h, w). Without bias or nonlinearity in between they fuse into one transposed
    convolution, 3 times as fast: the copies of a pixel have one value, so their weights can be
    summed."""
    weight = F.pad(conv.weight.flip(2, 3), [space - 1] * 4)
    # to (out, mid, space + 2, space + 2)
    weight = F.avg_pool2d(weight, space, stride=1, divisor_override=1)
    unpack = repack.conv.weight.unflatten(0, (repack.grow, -1)).flatten(2)      # (grow, mid, C)
    weight = torch.einsum("omyx,gmc->cgoyx", weight, unpack).flatten(1, 2)
    y = each_frame(lambda frames: F.conv_transpose2d(frames, weight, None, space, 1), x)
    return channels_to_frames(y, repack.grow)                       # (B, out, grow T, H, W)


def build_encoder(c):
    """Config to nn.Sequential, indices as in TAEHV's files."""
    layers = nn.Sequential(conv(3 * c.patch ** 2, c.stem), nn.ReLU())
    width = c.stem
    for out, blocks, time, space in c.encoder:
        layers.append(Repack(width, pack=time))
        layers.append(conv(width, out, space, bias=False))
        layers.extend(MemBlock(out) for _ in range(blocks))
        width = out
    layers.append(conv(width, c.latent_channels))
    return layers


def build_decoder(c):
    """Config to nn.Sequential, indices as in TAEHV's files. Layer 0 stands for the limit in
    `decode_unclamped`."""
    layers = nn.Sequential(nn.Identity(), conv(c.latent_channels, c.decoder[0][0]), nn.ReLU())
    widths = [stage[0] for stage in c.decoder] + [c.tail]
    for (width, blocks, time, space), out in zip(c.decoder, widths[1:]):
        layers.extend(MemBlock(width) for _ in range(blocks))
        layers.append(nn.Upsample(scale_factor=space))
        layers.append(Repack(width, grow=time))
        layers.append(conv(width, out, bias=False))
    layers.append(nn.ReLU())
    layers.append(conv(c.tail, 3 * c.patch ** 2))
    return layers


def run_layers(layers, x, state, still):
    """Run frames (B, C, T, H, W) through the layers. `state` holds the last input frame of every
    MemBlock; None starts a clip, preceded by copies of its first frame (still=True) or zeros
    (False). Returns the output and the new state; `state` is not modified."""
    new_state = []
    layers = iter(layers)
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            repack = next(layers)
            x = grow_frames(x, int(layer.scale_factor), repack, next(layers))
        elif isinstance(layer, Repack):
            x = layer(x)
        elif isinstance(layer, MemBlock):
            past = x[:, :, :1]
            if state is not None:
                past = state[len(new_state)]
            elif not still:
                past = torch.zeros_like(past)
            new_state.append(x[:, :, -1:].clone())         # a view would keep all of x
            x = layer(x, past)
        else:
            x = each_frame(layer, x)
    return x, new_state


class TinyVAE(nn.Module):
    """Encoder and decoder. A latent covers 4 frames by 8x8 pixels, 16x16 with taew2_2."""

    def __init__(self, config=TinyVAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        nn.init.constant_(self.decoder[-1].bias, 0.5)   # training starts from grey, not black
        self.stride = config.patch * math.prod(stage[3] for stage in config.encoder)

    def encode(self, video, piece=4):
        """As in LinearVAE, (B, 3, T, H, W) to (B, C, F, h, w). `piece` latent frames are computed
        at a time, to bound memory; the result is the same."""
        check_video(video, self.stride)
        x = video.to(self.encoder[0].weight.dtype) / 2 + 0.5        # in [0, 1]
        front = self.config.pad == "front"
        if front:
            x = torch.cat([x[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1), x], 2)
        else:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, FRAMES - 1, -1, -1)], 2)
        latents = []
        state = None
        for frames in x.split(FRAMES * piece, 2):
            frames = each_frame(nn.PixelUnshuffle(self.config.patch), frames)
            z, state = run_layers(self.encoder, frames, state, front)
            latents.append(z)
        return torch.cat(latents, 2)

    def decode_unclamped(self, latents, state=None):
        """As `decode`, but not clamped to [-1, 1]: for reconstruction losses."""
        check_latents(latents, self.config.latent_channels)
        x = latents.to(self.decoder[1].weight.dtype)
        x = 3 * torch.tanh(x / 3)           # soft limit at 3 standard deviations
        x, new_state = run_layers(self.decoder, x, state, self.config.pad == "front")
        video = each_frame(nn.PixelShuffle(self.config.patch), x) * 2 - 1
        if state is None:                   # a clip starts with one frame
            video = video[:, :, FRAMES - 1:]
        return video, new_state

    def decode(self, latents, state=None):
        """As in LinearVAE, but the returned state is what the next piece needs; the `state` passed
        in is not modified."""
        video, state = self.decode_unclamped(latents, state)
        return video.clamp(-1, 1), state

    @classmethod
    def from_pretrained(cls, path):
        """As `load_vae`; UserError if it is another VAE, the tiny model's too."""
        return load_vae(path, cls)

    def metadata(self):
        """Metadata for a safetensors file: {"format": …, "config": JSON}."""
        return {"format": "tiny-vae", "config": json.dumps(asdict(self.config))}


# --------------------------------------------------------------------------------------------------
# The VAE of Wan. Tensors are (B, C, T, H, W); parameter names are those of Wan's files. A clip is
# computed in pieces: first frame 0, which has a latent of its own, then four frames or one latent
# at a time. `state` holds, for each temporal convolution, the past input frames that its next piece
# needs; None starts a clip. A layer pops its entry from `state` and appends one to `new_state`.

@dataclass
class WanVAEConfig:
    """Width of the encoder's first and of the decoder's last stage; the defaults are Wan 2.1."""
    latent_channels: int = 16
    encoder: int = 96
    decoder: int = 96
    residual: bool = False      # Wan 2.2: 2x2 pixels folded into channels, stages with shortcuts

    @property
    def patch(self):
        """Side of the pixel squares folded into channels."""
        return 2 if self.residual else 1


# Mean and standard deviation of each latent channel, by the number of channels: from Wan 2.2's
# wan/modules/vae2_1.py and vae2_2.py.
STATISTICS = {
    16: ((-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
          0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
         (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
          3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)),
    48: ((-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
          -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
          -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
          -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
          -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
          0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
         (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
          0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
          0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
          0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
          0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
          0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)),
}


class CausalConv(nn.Conv3d):
    """3-D convolution over past and present frames. A clip is preceded by zeros."""

    def __init__(self, inputs, outputs, kernel=(3, 3, 3), stride=1):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(inputs, outputs, kernel, (stride, 1, 1), padding)
        self.past = kernel[0] - stride

    def forward(self, x, state, new_state):
        if state is None:
            x = F.pad(x, (0, 0, 0, 0, self.past, 0))
        else:
            x = torch.cat([state.pop(0), x], 2)
        new_state.append(x[:, :, -self.past:].clone())     # a view would keep all of x
        return super().forward(x)


class TimeConv(CausalConv):
    """Halve T (stride 2) or double it (stride 1), except for frame 0 of a clip."""

    def __init__(self, width, stride):
        super().__init__(width, 2 * width // stride, (3, 1, 1), stride)

    def forward(self, x, state, new_state):
        if state is None:
            seen = x            # past for the next piece: frame 0 if T is halved, else zeros
            if self.past == 2:
                seen = torch.zeros_like(x).expand(-1, -1, 2, -1, -1)
            new_state.append(seen)
            return x
        y = super().forward(x, state, new_state)
        return channels_to_frames(y, y.shape[1] // x.shape[1])


class Causal(nn.Sequential):
    """Sequential that passes `state` and `new_state` to the layers that need the past."""

    def forward(self, x, state, new_state):
        for layer in self:
            if isinstance(layer, (CausalConv, Causal, ResBlock)):
                x = layer(x, state, new_state)
            else:
                x = layer(x)
        return x


class PerFrame(nn.Sequential):
    """2-D layers applied to each frame."""

    def forward(self, x):
        return each_frame(super().forward, x)


class ChannelNorm(nn.Module):
    """RMS norm over the channels, which `dims` dimensions follow."""

    def __init__(self, width, dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones((width,) + (1,) * dims))

    def forward(self, x):
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class ResBlock(nn.Module):
    """Two causal convolutions and a shortcut."""

    def __init__(self, inputs, width):
        super().__init__()
        self.residual = Causal(
            ChannelNorm(inputs), nn.SiLU(), CausalConv(inputs, width),
            ChannelNorm(width), nn.SiLU(), nn.Identity(), CausalConv(width, width))
        self.shortcut = nn.Identity()
        if inputs != width:
            self.shortcut = nn.Conv3d(inputs, width, 1)

    def forward(self, x, state, new_state):
        return self.residual(x, state, new_state) + self.shortcut(x)


class Attention(nn.Module):
    """Residual single-head self-attention within each frame."""

    def __init__(self, width):
        super().__init__()
        self.norm = ChannelNorm(width, 2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x):
        B, C, T, H, W = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)                        # (B T, C, H, W)
        qkv = self.to_qkv(self.norm(frames)).flatten(2)                 # (B T, 3 C, H W)
        qkv = qkv.transpose(1, 2)[:, None].contiguous()                 # (B T, 1, H W, 3 C)
        q, k, v = qkv.chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]               # (B T, H W, C)
        y = self.proj(y.transpose(1, 2).unflatten(2, (H, W)))
        return x + y.unflatten(0, (B, T)).transpose(1, 2)


class DownStage(Causal):
    """A stage of Wan 2.2's encoder: its layers, plus a shortcut that averages space x space pixels
    and folds `time` frames into channels."""

    def __init__(self, layers, time, space):
        super().__init__(OrderedDict(downsamples=Causal(*layers)))
        self.time = time
        self.space = space

    def forward(self, x, state, new_state):
        y = super().forward(x, state, new_state)
        if state is None:                   # frame 0 of a clip is a single frame
            x = F.pad(x, (0, 0, 0, 0, self.time - 1, 0))
        x = F.avg_pool3d(x, (1, self.space, self.space))
        x = x.unflatten(2, (-1, self.time)).transpose(2, 3)             # (B, C, t, T, H, W)
        return y + x.flatten(1, 2)


class UpStage(Causal):
    """A stage of Wan 2.2's decoder: its layers, plus a shortcut that repeats channels and unfolds
    them to `time` frames and space x space pixels. The last stage, which keeps the size, has no
    shortcut."""

    def __init__(self, layers, width, time, space):
        super().__init__(OrderedDict(upsamples=Causal(*layers)))
        self.width = width
        self.time = time
        self.space = space

    def forward(self, x, state, new_state):
        y = super().forward(x, state, new_state)
        if self.space == 1:
            return y
        fold = (self.width, self.time, self.space, self.space)
        x = x.repeat_interleave(math.prod(fold) // x.shape[1], 1)
        x = x.unflatten(1, fold)                                        # (B, C, t, p, q, T, H, W)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)                           # (B, C, T, t, H, p, W, q)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        if state is None:                   # frame 0 of a clip stays a single frame
            x = x[:, :, self.time - 1:]
        return y + x


def downsample(width, time):
    """Halve H and W and, if time is 2, then T."""
    halve = PerFrame(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, 2))
    layers = OrderedDict(resample=halve)
    if time == 2:
        layers["time_conv"] = TimeConv(width, 2)
    return Causal(layers)


def upsample(width, outputs, time):
    """Double T, if time is 2, and then H and W."""
    layers = OrderedDict()
    if time == 2:
        layers["time_conv"] = TimeConv(width, 1)
    conv = nn.Conv2d(width, outputs, 3, padding=1)
    layers["resample"] = PerFrame(nn.Upsample(scale_factor=2), conv)
    return Causal(layers)


def res_blocks(inputs, width, count):
    """`count` blocks; the first takes `inputs` channels."""
    return [ResBlock(inputs, width)] + [ResBlock(width, width) for _ in range(count - 1)]


def middle(width):
    """Layers between the stages and the latents, on either side."""
    return Causal(ResBlock(width, width), Attention(width), ResBlock(width, width))


def head(width, outputs):
    """The last layer of either side."""
    return Causal(ChannelNorm(width), nn.SiLU(), CausalConv(width, outputs))


def build_wan_encoder(c):
    """From pixels to mean and log variance of the latents."""
    width = c.encoder
    layers = Causal()
    # a stage: multiple of the width, strides
    for multiple, time, space in (1, 1, 2), (2, 2, 2), (4, 2, 2), (4, 1, 1):
        stage = res_blocks(width, c.encoder * multiple, 2)
        width = c.encoder * multiple
        if space == 2:
            stage.append(downsample(width, time))
        if c.residual:
            stage = [DownStage(stage, time, space)]
        layers.extend(stage)
    return Causal(OrderedDict(conv1=CausalConv(3 * c.patch ** 2, c.encoder), downsamples=layers,
                              middle=middle(width), head=head(width, 2 * c.latent_channels)))


def build_wan_decoder(c):
    """From latents to pixels."""
    wide = 4 * c.decoder
    width = wide
    layers = Causal()
    # a stage: multiple of the width, strides
    for multiple, time, space in (4, 2, 2), (4, 2, 2), (2, 1, 2), (1, 1, 1):
        out = c.decoder * multiple
        stage = res_blocks(width, out, 3)
        width = out
        if space == 2 and not c.residual:
            width = out // 2                # Wan 2.1 halves the channels with the upsampling
        if space == 2:
            stage.append(upsample(out, width, time))
        if c.residual:
            stage = [UpStage(stage, out, time, space)]
        layers.extend(stage)
    return Causal(OrderedDict(conv1=CausalConv(c.latent_channels, wide), middle=middle(wide),
                              upsamples=layers, head=head(width, 3 * c.patch ** 2)))


def columns_first(video, fold):
    """Apply `fold`, nn.PixelUnshuffle or nn.PixelShuffle, to (B, C, T, H, W) in Wan's order:
    columns before rows."""
    return fold(video.transpose(1, 2).mT).mT.transpose(1, 2)


class WanVAE(nn.Module):
    """Encoder and decoder. A latent covers 4 frames by 8x8 pixels, 16x16 in Wan 2.2 5B."""

    def __init__(self, config=WanVAEConfig()):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = build_wan_encoder(config)
        self.decoder = build_wan_decoder(config)
        self.conv1 = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.conv2 = nn.Conv3d(channels, channels, 1)
        self.stride = 8 * config.patch      # three stages halve height and width

    def statistics(self, like):
        """Mean and standard deviation of the latents, (1, C, 1, 1, 1) each, with the dtype and on
        the device of the tensor `like`."""
        values = like.new_tensor(STATISTICS[self.config.latent_channels])       # (2, C)
        return values.view(2, 1, -1, 1, 1, 1)

    def encode(self, video):
        """As in LinearVAE, (B, 3, T, H, W) to (B, C, F, h, w): the mean, without sampling. Four
        frames are computed at a time."""
        check_video(video, self.stride)
        video = video.to(self.conv1.weight.dtype)
        mean, std = self.statistics(video)
        latents = []
        state = None
        pieces = [1] + video.shape[2] // FRAMES * [FRAMES]
        for frames in video.split(pieces, 2):
            x = columns_first(frames, nn.PixelUnshuffle(self.config.patch))
            new_state = []
            z = self.conv1(self.encoder(x, state, new_state))
            z = z[:, :self.config.latent_channels]              # without the log variance
            latents.append((z - mean) / std)
            state = new_state
        return torch.cat(latents, 2)

    def decode(self, latents, state=None):
        """As in TinyVAE: latents (B, C, F, h, w) to (video (B, 3, T, H, W) in [-1, 1], state for
        the next piece). One latent frame is computed at a time, so pieces equal the whole to the
        bit."""
        check_latents(latents, self.config.latent_channels)
        latents = latents.to(self.conv2.weight.dtype)
        mean, std = self.statistics(latents)
        if state is not None:
            state = list(state)             # a copy: the caller's stays as it is
        video = []
        for z in latents.split(1, 2):
            new_state = []
            z = self.conv2(z * std + mean)
            z = z.contiguous(memory_format=torch.channels_last_3d)
            x = self.decoder(z, state, new_state)
            video.append(columns_first(x, nn.PixelShuffle(self.config.patch)))
            state = new_state
        return torch.cat(video, 2).clamp(-1, 1), state

    @classmethod
    def from_pretrained(cls, path):
        """As `load_vae`; UserError if it is another VAE."""
        return load_vae(path, cls)


# --------------------------------------------------------------------------------------------------
# Files. motionstream.py is imported only inside functions, so that everything above can be copied
# and used with torch alone.

# File names in a folder. In one with a .pth, the last name is that of Wan's DiT.
VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "vae/diffusion_pytorch_model.safetensors",
             "diffusion_pytorch_model.safetensors")

# One tensor that identifies each class: the first layer of WanVAE, TinyVAE and LinearVAE.
VAE_MARKS = ("encoder.conv1.weight", "encoder.0.weight", "encoder.weight")

# By the format named in a file's metadata; public files name none.
CONFIGS = {"linear-vae": LinearVAEConfig, "tiny-vae": TinyVAEConfig}
CLASSES = {LinearVAEConfig: LinearVAE, TinyVAEConfig: TinyVAE, WanVAEConfig: WanVAE}


def load_vae(path, cls=None):
    """Load a VAE, `TinyVAE`, `LinearVAE` or `WanVAE`, in float32 and eval mode, from a .safetensors
    or .pth file or from a folder as Wan and diffusers publish it. Class and widths come from the
    metadata, else from the tensors. UserError, one line naming the file, if it does not fit or is
    not of the class `cls`."""
    from motionstream import UserError, copy_weights
    vae, file = open_weights(path)
    if cls and not isinstance(vae, cls):
        found = type(vae).__name__
        raise UserError(f"{file}: a {found}, not a {cls.__name__}; load_vae opens any")
    return copy_weights(vae, file, torch.float32)


def open_weights(path):
    """Build the VAE in a file or folder, its weights still mapped: (VAE, file). UserError as in
    load_vae."""
    from motionstream import build, extra, read_weights, saved_config
    tensors, metadata, file = read_weights(path, "VAE (Wan or TAEHV)", VAE_MARKS, VAE_FILES)
    cls = CONFIGS.get(metadata.get("format"))
    if cls:
        config = saved_config(cls, metadata, file)
    else:
        config = public_vae_config(tensors, file)
    checkpoints = extra("checkpoints")
    if checkpoints is not None:         # a copy without extras/ trusts the file's config
        checkpoints.check_vae_config(config, file)
    return build(CLASSES[type(config)], config, tensors, file), file


def public_vae_config(tensors, file):
    """Infer the config of a public file, which stores none: Wan's from tensor shapes, TAEHV's with
    extras/checkpoints.py. UserError if the file is neither."""
    from motionstream import UserError, extra, naming
    if "encoder.17.weight" in tensors:
        return extra("checkpoints", f"{file}: is a public TAEHV").taehv_config(tensors, file)
    if "encoder.conv1.weight" not in tensors:
        first = next(iter(tensors))[:80]
        raise UserError(f"{file}: holds no config, and its first tensor, {first}, is in no VAE of "
                        "Wan or TAEHV")
    with naming(file, "expected a complete VAE of Wan"):
        channels = len(tensors["conv2.weight"])
        assert channels in STATISTICS, f"its latents have {channels} channels, not 16 or 48"
        shortcuts = "encoder.downsamples.0.downsamples.0.residual.2.weight"     # of Wan 2.2 alone
        return WanVAEConfig(
            channels,
            encoder=len(tensors["encoder.conv1.weight"]),
            decoder=tensors["decoder.head.2.weight"].shape[1],
            residual=shortcuts in tensors)
