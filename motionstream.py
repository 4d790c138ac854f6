"""MotionStream: one image, painted tracks, and a video that follows them, chunk by chunk, for as long as you like.

A Wan video transformer (DiT) gets one new input, where tracks go, and one new habit, to look only at a few chunks:

    latent chunks   [ sink 0 ] 1 2 3 4 5 [ window 6 ][ chunk 7 ]   of the past, the first and the last are kept
    cache slots     [   0    ]           [    1     ][    2    ]   positions are counted here, so they never grow

The paper: MotionStream, arXiv 2511.01266 (sections and equations cited below are its own).
Shapes, in every file of this project:

    B batch   T video frames   F latent frames, T = 1 + 4 (F - 1)   C channels   h w latent size   H W pixels
    L tokens of one call (F * h/2 * w/2)   S tokens with those in the cache   D width   N heads (or tracks)   K = D / N
    latents (B, C, F, h, w)   sigma (B,) or (B, F) in [0, 1]   velocity = noise - x0, which is what the DiT returns
"""

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# Flow matching: all of diffusion that is needed. x_t = (1 - sigma) x0 + sigma noise; d x_t / d sigma = noise - x0.

def per_frame(sigma):
    """(B,) or (B, F) to (B, 1, 1 or F, 1, 1), which broadcasts over latents."""
    return sigma.reshape(len(sigma), 1, -1, 1, 1)


def add_noise(x0, noise, sigma):
    """Clean latents to noised ones, x_t."""
    sigma = per_frame(sigma).to(x0.dtype)
    return (1 - sigma) * x0 + sigma * noise


def to_x0(x_t, velocity, sigma):
    """What the velocity says the clean latents are."""
    return x_t - per_frame(sigma).to(x_t.dtype) * velocity


def shift_sigma(sigma, shift):
    """Noise levels moved towards 1: k sigma / (1 + (k - 1) sigma), k = shift (appendix D)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps, shift):
    """`steps` noise levels from 1 down: uniform ones, shifted; 0 is left out."""
    return tuple(shift_sigma(1 - i / steps, shift) for i in range(steps))


def with_first(x_t, sigma, first):
    """The image as latent frame 0: clean, at sigma 0 (the way of Wan 2.2). first (B, C, 1, h, w), None: unchanged."""
    sigma = sigma.reshape(len(x_t), -1).repeat(1, x_t.shape[2] if sigma.ndim == 1 else 1)
    if first is not None:
        x_t = torch.cat([first, x_t[:, :, 1:]], 2)
        sigma[:, 0] = 0
    return x_t, sigma


def linear_part(sigma, std):
    """What of the velocity needs no network, for latents whose channels have the standard deviations std (1, C, 1, 1, 1):
    the best linear guess from x_t alone, and the variance of x_t, both (B, C, 1 or F, 1, 1), for sigma (B,) or (B, F).
    With D that variance, v = guess x_t + std / sqrt(D) network(x_t / sqrt(D)) has a network whose input and target both
    have unit variance: EDM's preconditioning (Karras et al. 2022, section 5), of rectified flow, channel by channel."""
    sigma = per_frame(sigma).float()
    variance = (1 - sigma) ** 2 * std ** 2 + sigma ** 2
    guess = (sigma - (1 - sigma) * std ** 2) / variance
    return guess, variance


def joint_guidance(v_full, v_notext, v_nomotion, w_text, w_motion):
    """Text and motion guidance in one (eq. 2): three velocities to one. Both weights 0: v_full, no guidance."""
    if w_text == w_motion == 0:
        return v_full
    share = w_text / (w_text + w_motion)
    base = share * v_notext + (1 - share) * v_nomotion
    return base + w_text * (v_full - v_notext) + w_motion * (v_full - v_nomotion)


# ----------------------------------------------------------------------------------------------------------------------
# Configuration. The defaults are Wan 2.1 T2V 1.3B; everything that depends on the model's size is here.

@dataclass
class Config:
    """A model and how it is sampled; travels in the metadata of its weights file."""
    # the transformer, named as in Wan's config.json
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16            # channels into the patch embedding: noisy latents, then tracks, then image
    out_dim: int = 16           # channels of the latents
    track_dim: int = 0          # channels of the track head's output, 0 = no slot for tracks
    text_dim: int = 4096
    text_len: int = 512         # text is padded to this many rows, and all of them are attended
    clip_dim: int = 0           # channels of CLIP image features, 0 = no image branch
    freq_dim: int = 256
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6
    # sampling
    causal: bool = False        # True: a student that streams; False: a bidirectional teacher
    shift: float = 5.0
    sigmas: tuple = schedule(3, 5.0)    # the student's noise levels; the paper does not give its three
    steps: int = 50             # the teacher's Euler steps
    guidance: tuple = (3.0, 1.5)    # its w_text and w_motion (section 3.1), also as the real score of distillation
    chunk: int = 3              # latent frames generated together
    sink: int = 1               # chunks at the start that stay in the cache for ever
    window: int | None = 1      # latest chunks kept besides, None = all
    sink_decay: float = 1.0     # below 1: the sink takes up what leaves the window, see KVCache
    # what it was trained on
    stride: int = 8             # pixels per latent pixel, of the VAE
    size: tuple = (480, 832)    # height, width of the video in pixels
    fps: int = 16
    tracks: str = "random"      # how a track gets its ID, see track_ids; "copy": see copy_along_tracks too
    latent_std: tuple = ()      # of each channel of the latents; given: see linear_part
    prompt: str | None = None   # what to say when the user says nothing, None = the null text

    @property
    def image_dim(self):
        """Input channels for the image, see image_channels. 0: it is the clean latent frame 0, see with_first."""
        return self.in_dim - self.out_dim - self.track_dim

    @property
    def copy_dim(self):
        """Of the track_dim channels, those that copy_along_tracks fills; the track head fills the others."""
        return self.out_dim + 2 if self.tracks == "copy" else 0


PRESETS = {
    "wan2.1-1.3b": Config(),
    "motionstream-1.3b": Config(in_dim=48, track_dim=16, clip_dim=1280, shift=6.0, sigmas=schedule(3, 6.0)),
    "wan2.1-14b": Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.2-5b": Config(dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48, stride=16,
                        size=(704, 1280), fps=24),
    "tiny": Config(dim=192, ffn_dim=576, num_heads=3, num_layers=5, in_dim=96 + 130 + 96, out_dim=96,
                   track_dim=32 + 98, text_dim=64, text_len=8, steps=15, guidance=(1.0, 0.0), size=(128, 128),
                   tracks="copy", prompt="steady light, steady shapes"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Time and position.

def sinusoid(t, dim):
    """Numbers (…) to vectors (…, dim): cosines, then sines, of t at dim / 2 frequencies, 1 to 1 / 10000."""
    frequency = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def rope_table(frames, height, width, head_dim, device):
    """Rotations for a grid of tokens: complex (frames * height * width, head_dim / 2), frame slowest.
    Of the d = head_dim / 2 pairs, d // 3 turn with the row, as many with the column, the rest with the frame."""
    spatial = 2 * (head_dim // 6)
    angles = []
    for size, dim in (frames, head_dim - 2 * spatial), (height, spatial), (width, spatial):
        frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angles.append(torch.outer(torch.arange(size, dtype=torch.float64, device=device), frequency))
    f, r, c = angles
    grid = (frames, height, width, -1)
    angle = torch.cat([f[:, None, None].expand(grid), r[:, None].expand(grid), c.expand(grid)], -1).flatten(0, 2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def apply_rope(x, table):
    """Rotate neighbouring pairs of channels of (B, L, N, K) by the table (L, K / 2), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(x)


# ----------------------------------------------------------------------------------------------------------------------
# Attention with a memory (section 3.2).

class KVCache:
    """What one layer remembers of a stream: the first `sink` chunks for ever, then the latest `window` chunks
    (None: all). Keys are kept before RoPE: a chunk's position is its slot, which changes as others leave.
    decay < 1: EMA-Sink (Reward Forcing, eq. 4, 5), what leaves the window is averaged into the sink's last chunk."""

    def __init__(self, sink, window, decay=1.0):
        self.sink, self.window, self.decay = sink, window, decay
        self.chunks = []                        # of (k, v), each (B, L, N, K), oldest first

    def __len__(self):
        """Tokens held."""
        return sum(k.shape[1] for k, _ in self.chunks)

    def read(self, k, v):
        """[cache | new]: what the new chunk attends to, (B, S, N, K) each. Changes nothing."""
        keys, values = zip(*self.chunks, (k, v))
        return torch.cat(keys, 1), torch.cat(values, 1)

    def write(self, k, v):
        """Append a clean chunk, without its graph; the oldest chunk behind the sink falls out of a full cache."""
        self.chunks = [*self.chunks, (k.detach(), v.detach())]      # a new list: a copy of the cache keeps the old one
        if self.window is not None and len(self.chunks) > self.sink + self.window:
            gone = self.chunks.pop(self.sink)
            if self.sink and self.decay < 1:
                kept = self.chunks[self.sink - 1]
                self.chunks[self.sink - 1] = tuple(a.lerp(b, 1 - self.decay) for a, b in zip(kept, gone))


class RMSNorm(nn.Module):
    """Over the full width, all heads at once, as in Wan; statistics in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def attend(q, k, v):
    """Softmax attention of (B, L, N, K) over (B, S, N, K), heads joined: (B, L, N K)."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of the new tokens over [cache | new]. Chunks are causal by the order in which they are written, so
    there is no mask. cache=None is the bidirectional attention of teacher and critic."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, rope, cache=None, write=False):
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(2, heads)         # (B, L, N, K)
        k = self.norm_k(self.k(x)).unflatten(2, heads)
        v = self.v(x).unflatten(2, heads)
        k = k.type_as(v)                                       # autocast leaves norms in float32: one dtype in the cache
        keys, values = cache.read(k, v) if cache is not None else (k, v)
        if write:
            cache.write(k, v)
        q, keys = apply_rope(q, rope[-q.shape[1]:]), apply_rope(keys, rope)      # the new tokens are the last ones
        return self.o(attend(q, keys, values))


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the text and, in weights with an image branch, to the image: two attentions,
    added before the common output projection. No RoPE."""

    def __init__(self, dim, num_heads, eps, image):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if image:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), RMSNorm(dim, eps)

    def forward(self, x, text, image=None):
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(2, heads)
        y = attend(q, self.norm_k(self.k(text)).unflatten(2, heads), self.v(text).unflatten(2, heads))
        if image is not None:
            k = self.norm_k_img(self.k_img(image)).unflatten(2, heads)
            y = y + attend(q, k, self.v_img(image).unflatten(2, heads))
        return self.o(y)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer's block and its last layer. The residual stream, norms and gates stay in float32.

class Block(nn.Module):
    """Self-attention and feed-forward, both modulated by sigma frame by frame, with cross-attention between them."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.cross_attn = CrossAttention(c.dim, c.num_heads, c.eps, c.clip_dim > 0)
        self.norm2 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, c.dim))

    def forward(self, x, time, rope, text, image=None, cache=None, write=False):
        """x (B, F, h w, D) float32; time (B, 1 or F, 6, D); text (B, text_len, D); image (B, 257, D)."""
        dtype = self.ffn[0].weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(2).unbind(3)  # (B, F, 1, D)
        y = (self.norm1(x) * (1 + scale1) + shift1).to(dtype).flatten(1, 2)
        x = x + gate1 * self.self_attn(y, rope, cache, write).view_as(x)
        x = x + self.cross_attn(self.norm3(x).to(dtype).flatten(1, 2), text, image).view_as(x)
        y = (self.norm2(x) * (1 + scale2) + shift2).to(dtype)
        return x + gate2 * self.ffn(y)


class Head(nn.Module):
    """Tokens (B, F, h w, D) to patches (B, F, h w, out) of the velocity."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(c.patch_size) * c.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, c.dim))
        if c.copy_dim:
            self.gate = nn.Linear(c.dim, math.prod(c.patch_size) * 2)

    def forward(self, x, time):
        """Patches of the velocity and, of weights that copy, of the two shares that mix_copies takes, else None."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(2).unbind(3)     # (B, 1 or F, 1, D) each
        y = self.norm(x) * (1 + scale) + shift
        return self.head(y), self.gate(y) if hasattr(self, "gate") else None


# ----------------------------------------------------------------------------------------------------------------------
# Tracks (section 3.1).

class TrackHead(nn.Module):
    """Painted tracks to channels on the latent grid: the new input of MotionStream.

    Every track has an ID, an ID is a sinusoidal vector: half of it for the ID's upper 16 bits, half for the lower 16,
    so that random numbers and points of a picture can both be IDs, see track_ids. The vector is written at cell
    (floor(x / stride), floor(y / stride)) of every frame in which the track is visible (eq. 1); 4 frames are packed
    into the channels; a 1x1x1 convolution does the rest. Of several tracks in one cell the lowest ID is written: a
    rule that knows no order, and no blend that is nobody's vector. A track outside the picture is hidden. Hidden and
    "not specified" are both zeros."""

    def __init__(self, id_dim=64, out_channels=16, stride=8):
        super().__init__()
        self.id_dim, self.stride = id_dim, stride
        self.conv = nn.Conv3d(4 * id_dim, out_channels, 1, bias=False)      # a bias would fill the empty cells

    def forward(self, tracks, visible, ids, height, width):
        """tracks (B, T, N, 2) x, y in pixels; visible (B, T, N); ids (B, N); the picture's size in pixels: to
        (B, out_channels, F, h, w). T % 4 == 1 starts a clip, 0 continues one: chunks joined equal the whole."""
        B, T, N, _ = tracks.shape
        assert T % 4 < 2, f"{T} frames: a clip starts with 1 + 4 k, and goes on with 4 k"
        h, w = height // self.stride, width // self.stride
        assert height % self.stride == width % self.stride == 0, f"{width}x{height} does not divide by {self.stride}"
        inside = visible & (tracks >= 0).all(-1) & (tracks[..., 0] < width) & (tracks[..., 1] < height)
        x, y = (tracks / self.stride).nan_to_num(0).long().unbind(-1)
        cell = torch.where(inside, y * w + x, h * w)                        # hidden ones go to a cell of their own
        rank = ids.argsort(1).argsort(1)[:, None].expand(-1, T, -1)
        owner = rank.new_full((B, T, h * w + 1), N).scatter_reduce(2, cell, rank, "amin")[..., :-1]
        halves = torch.stack([ids >> 16, ids & 0xFFFF], -1).gather(1, ids.argsort(1)[..., None].expand(-1, -1, 2))
        vectors = F.pad(sinusoid(halves, self.id_dim // 2).flatten(2), (0, 0, 0, 1))         # rank N: zeros
        volume = vectors.gather(1, owner.reshape(B, -1, 1).expand(-1, -1, self.id_dim)).view(B, T, h, w, -1)
        volume = F.pad(volume, (0, 0) * 3 + (-T % 4, 0))                    # three empty frames before frame 0
        volume = volume.unflatten(1, (-1, 4)).permute(0, 2, 5, 1, 3, 4).flatten(1, 2)        # (B, 4 id_dim, F, h, w)
        return self.conv(volume.to(self.conv.weight.dtype))


def track_ids(tracks, visible, config, generator=None):
    """IDs (B, N) in [0, 2**32) for tracks (B, T, N, 2), as config.tracks says: "random", the paper's; or "start", the
    pixel (y << 16) + x where the track is first seen, so that tracks that start near have similar vectors; "copy", that
    point in sixteenths of a pixel, which tells copy_along_tracks where in frame 0 to look."""
    B, T, N, _ = tracks.shape
    if config.tracks == "random":
        return torch.randint(0, 2 ** 32, (B, N), generator=generator).to(tracks.device)
    first = visible.int().argmax(1)[:, None, :, None].expand(-1, 1, -1, 2)
    start = tracks.gather(1, first)[:, 0].nan_to_num(0)
    if config.tracks == "copy":
        start = (start * SIXTEENTHS).round()
    x, y = start.clamp(0, 2 ** 16 - 1).long().unbind(-1)
    return (y << 16) + x


def track_features(model, tracks, visible, ids, copied=None):
    """What the model takes as `tracks`, for one chunk or clip: (B, track_dim, F, h, w), from model.track_head and, of
    weights that copy, from copy_along_tracks. If IDs are start points, every cell of frame 0 holds the ID of its own
    pixel: a map in which later frames can look up what a track has moved there."""
    c, (B, T, _, _) = model.config, tracks.shape
    if c.tracks != "random" and T % 4 == 1:
        y, x = (grid.flatten() for grid in torch.meshgrid(*(torch.arange(0, side, c.stride) for side in c.size),
                                                          indexing="ij"))
        cells = torch.stack([x, y], -1).to(tracks).expand(B, T, -1, -1)
        at_zero = (torch.arange(T, device=tracks.device) == 0)[:, None].expand(B, T, len(x))
        unit = SIXTEENTHS if c.tracks == "copy" else 1
        tracks, visible = torch.cat([tracks, cells], 2), torch.cat([visible, at_zero], 2)
        ids = torch.cat([ids, ((unit * y << 16) + unit * x).to(ids).expand(B, -1)], 1)
    features = model.track_head(tracks, visible, ids, *c.size)
    if not c.copy_dim:
        return features
    assert copied is not None, "these weights copy along tracks: give copied=copy_along_tracks(…)"
    return torch.cat([features, copied.to(features.dtype)], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Copying along tracks: not in the paper. A track says where a piece of frame 0 is now; so that piece, as latents, can be
# handed to the model where it is now, beside the ID (after Wan-Move, which copies first-frame features along tracks).
# The tiny model, which has no room to learn what an ID means by looking, is given this; weights of Wan are not.

SIXTEENTHS = 16         # of a pixel, in which IDs count where a track starts
COPY_CELL = 4           # pixels per side of the squares that follow one track


def nearest_track(tracks, visible, height, width):
    """The visible track nearest to each square of COPY_CELL pixels: its number, int64, 0 if none is visible, and its
    distance in pixels, infinite if none is. Both (B, T, rows, columns). tracks (B, T, N, 2); height, width in pixels."""
    B, T, N, _ = tracks.shape
    rows, columns = height // COPY_CELL, width // COPY_CELL
    if N == 0:
        nobody = torch.zeros(B, T, rows, columns, dtype=torch.long, device=tracks.device)
        return nobody, nobody + math.inf
    y = (torch.arange(rows, device=tracks.device) + 0.5) * COPY_CELL
    x = (torch.arange(columns, device=tracks.device) + 0.5) * COPY_CELL
    centre = torch.cartesian_prod(y, x).flip(1)                                         # (rows columns, 2), x first
    hidden = ~visible[:, :, None]                                                       # (B, T, 1, N)
    distance = torch.cdist(centre.expand(B, T, -1, -1), tracks.nan_to_num(0))           # (B, T, rows columns, N)
    distance, number = distance.masked_fill(hidden, math.inf).min(3)
    return number.view(B, T, rows, columns), distance.view(B, T, rows, columns)


def warp_along_tracks(image, tracks, visible, ids):
    """Frame 0 as the tracks move it: each square of COPY_CELL pixels shows what the track nearest to it brings along, or,
    where none is visible, what was there in frame 0. image (B, 3, H, W); ids (B, N), of track_ids under "copy": to
    video (B, 3, T, H, W), and the distance (B, T, rows, columns) in pixels to that track, infinite if there is none."""
    B, _, H, W = image.shape
    T = tracks.shape[1]
    number, distance = nearest_track(tracks, visible, H, W)
    start = torch.stack([ids & 0xFFFF, ids >> 16], -1) / SIXTEENTHS                     # (B, N, 2) pixels
    back = (start[:, None] - tracks.nan_to_num(0)).round().long()                       # (B, T, N, 2)
    if back.shape[2] == 0:
        back = back.new_zeros(B, T, 1, 2)
    back = back.gather(2, number.flatten(2)[..., None].expand(-1, -1, -1, 2)).view(*number.shape, 2)
    back = back.masked_fill(distance.isinf()[..., None], 0)
    back = back.repeat_interleave(COPY_CELL, 2).repeat_interleave(COPY_CELL, 3)         # (B, T, H, W, 2)
    x = (torch.arange(W, device=image.device) + back[..., 0]).clamp(0, W - 1)
    y = (torch.arange(H, device=image.device)[:, None] + back[..., 1]).clamp(0, H - 1)
    pixels = (y * W + x).flatten(1)[:, None].expand(-1, 3, -1)                          # (B, 3, T H W)
    return image.flatten(2).gather(2, pixels).view(B, 3, T, H, W), distance


@torch.no_grad()
def copy_along_tracks(vae, image, tracks, visible, ids):
    """What track_features takes as `copied`: the latents of warp_along_tracks, and how near the nearest track is, as
    exp(-d / 8) and exp(-d / 32) of its distance d in pixels. (B, C + 2, F, h, w). vae: one without memory between
    latents (LinearVAE). image (B, 3, H, W) in [-1, 1]: frame 0 of the clip. The rest is as for track_features: frames
    start a clip (T % 4 == 1) or go on with it, and frame 0, where nothing has moved yet, is the image itself."""
    T = tracks.shape[1]
    video, distance = warp_along_tracks(image, tracks, visible, ids)
    if T % 4 == 1:
        video[:, :, 0] = image
        distance[:, 0] = 0
        latents = vae.encode(video)
        distance = torch.cat([distance[:, :1].expand(-1, 3, -1, -1), distance], 1)      # as the VAE packs frame 0
    else:
        latents = vae.encode(torch.cat([video[:, :, :1], video], 2))[:, :, 1:]          # a frame 0 that is not looked at
    near = torch.stack([torch.exp(-distance / 8), torch.exp(-distance / 32)], 1)        # (B, 2, 4 F, rows, columns)
    cells = vae.stride // COPY_CELL
    return torch.cat([latents, F.avg_pool3d(near, (4, cells, cells))], 1)


def mix_copies(shares, copied, still):
    """What the copies say that x0 is: shares (B, 2, F, h, w), of the model's head, of the latents moved along the tracks
    and of the image's own, as at frame 0 (B, C, F, h, w each)."""
    return shares[:, :1] * copied + shares[:, 1:] * still


# ----------------------------------------------------------------------------------------------------------------------
# The model.

class MotionStream(nn.Module):
    """Wan's DiT with a track head. Parameters are named as in the public Wan checkpoints; new ones are track_head.*."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        if c.clip_dim:
            layers = [nn.LayerNorm(c.clip_dim), nn.Linear(c.clip_dim, c.clip_dim), nn.GELU(),
                      nn.Linear(c.clip_dim, c.dim), nn.LayerNorm(c.dim)]
            self.img_emb = nn.ModuleDict({"proj": nn.Sequential(*layers)})
        if c.track_dim:
            self.track_head = TrackHead(out_channels=c.track_dim - c.copy_dim, stride=c.stride)
        if not self.head.head.weight.is_meta:
            init_weights(self)

    def new_caches(self):
        """One KVCache per layer, empty."""
        c = self.config
        return [KVCache(c.sink, c.window, c.sink_decay) for _ in self.blocks]

    def forward(self, x, sigma, text, *, tracks=None, image=None, clip=None, caches=None, write=False):
        """Velocity (B, out_dim, F, h, w) float32 of the noised latents x at sigma (B,) or (B, F).

        text (B, L, text_dim), None = null text; tracks (B, track_dim, F, h, w) from track_features, None = all hidden;
        image: the image's channels, None = zeros; clip (B, 257, clip_dim). caches=None: bidirectional; else attends
        to what the caches hold, then to itself; only write=True changes them."""
        c, x_t = self.config, x
        if c.latent_std:
            std = torch.tensor(c.latent_std, device=x.device).view(1, -1, 1, 1, 1)
            guess, variance = linear_part(sigma, std)
            x = x_t / variance.sqrt()
        x = torch.cat([x, *self.extra_channels(x, tracks, image)], 1).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(x)                                        # (B, D, F, h / 2, w / 2)
        frames, h, w = x.shape[2:]
        x = x.flatten(3).permute(0, 2, 3, 1).float()                       # (B, F, h w / 4, D)
        held = len(caches[0]) // (h * w) if caches is not None else 0      # frames in the cache
        rope = rope_table(held + frames, h, w, c.dim // c.num_heads, x.device)

        with torch.autocast(x.device.type, enabled=False):                 # time is precise to the last bit that counts
            time = self.time_embedding(sinusoid(1000 * sigma.reshape(len(x), -1), c.freq_dim))       # (B, 1 or F, D)
            modulation = self.time_projection(time).unflatten(-1, (6, -1))                           # (B, 1 or F, 6, D)
        text = self.embed_text(text, len(x))
        if clip is not None:
            clip = self.img_emb["proj"](clip.to(text.dtype))
        for block, cache in zip(self.blocks, caches or [None] * c.num_layers):
            x = block(x, modulation, rope, text, clip, cache, write)
        with torch.autocast(x.device.type, enabled=False):
            velocity, shares = self.head(x, time)                          # (B, F, h w / 4, 4 out_dim), and 4 * 2
        velocity = self.unpatchify(velocity, frames, h, w)
        if c.latent_std:
            velocity = guess * x_t + std / variance.sqrt() * velocity
        if shares is not None and tracks is not None:
            copied = tracks[:, -c.copy_dim:-2]
            still = torch.zeros_like(copied) if image is None else image
            copies = mix_copies(self.unpatchify(shares, frames, h, w), copied, still)
            velocity = velocity - per_frame(sigma).float() / variance * copies
        return velocity

    def unpatchify(self, x, frames, h, w):
        """Tokens of patches (B, F, h w, p q C) to (B, C, F, h p, w q)."""
        p, q = self.config.patch_size[1:]
        x = x.view(len(x), frames, h, w, p, q, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def extra_channels(self, x, tracks, image):
        """What the patch embedding sees beside the noisy latents: tracks, then image; zeros for what is not given."""
        c = self.config
        for value, channels in (tracks, c.track_dim), (image, c.image_dim):
            shape = (x.shape[0], channels, *x.shape[2:])
            assert value is None or value.shape == shape, f"condition {tuple(value.shape)}, expected {shape}"
            yield x.new_zeros(shape) if value is None else value.to(x.dtype)

    def embed_text(self, text, batch):
        """(B, L, text_dim) or None to (B, text_len, D): padded with zero rows before the embedding, as in Wan."""
        c, weight = self.config, self.text_embedding[0].weight
        if text is None:
            text = weight.new_zeros(batch, 0, c.text_dim)
        assert text.shape[1] <= c.text_len, f"text of {text.shape[1]} rows, at most {c.text_len}"
        return self.text_embedding(F.pad(text.to(weight.dtype), (0, 0, 0, c.text_len - text.shape[1])))

    @classmethod
    def from_pretrained(cls, path, *, dtype=None, device="cpu", **overrides):
        """Weights from a file or a folder; see load_pretrained below."""
        return load_pretrained(cls, path, dtype, device, overrides)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: the teacher's, a whole clip at once, and the student's, chunk by chunk.

def guided_velocity(model, x_t, sigma, conditions, guidance, null_text=None):
    """Velocity under guidance (w_text, w_motion): with all, without text, without tracks, in one batch of three; of two
    if w_motion is 0. Without text means null_text, of the text's shape, None: zeros."""
    if not any(guidance):
        return model(x_t, sigma, **conditions)
    B, n = len(x_t), 3 if guidance[1] else 2
    batch = {k: torch.cat([v] * n) for k, v in conditions.items() if v is not None}
    if "text" in batch:
        batch["text"][B:2 * B] = 0 if null_text is None else null_text
    if "tracks" in batch:
        batch["tracks"][2 * B:] = 0
    v = model(torch.cat([x_t] * n), torch.cat([sigma] * n), batch.pop("text", None), **batch).chunk(n)
    return joint_guidance(v[0], v[1], v[-1], *guidance)


def euler(model, noise, conditions, first=None, sigmas=None, guidance=None, null_text=None):
    """The bidirectional teacher: noise (B, C, F, h, w) to clean latents by Euler steps under joint guidance. Yields
    (x_t, sigma) at each level and (x0, 0.0) at last: the ODE trajectory that causal initialisation learns from.
    sigmas and guidance (w_text, w_motion): None = those of model.config. null_text: see guided_velocity."""
    sigmas = sigmas or schedule(model.config.steps, model.config.shift)
    guidance = guidance or model.config.guidance
    x = noise
    for sigma, following in zip(sigmas, (*sigmas[1:], 0.0)):
        x, level = with_first(x, x.new_full((len(x),), sigma, dtype=torch.float64), first)
        yield x, sigma
        x = x + (following - sigma) * guided_velocity(model, x, level, conditions, guidance, null_text)
    yield with_first(x, level, first)[0], 0.0


def by_chunk(conditions, chunk):
    """A clip's conditions, chunk by chunk: what has a frame axis is cut, the rest is repeated."""
    for start in itertools.count(0, chunk):
        yield {name: value[:, :, start:start + chunk] if value is not None and value.ndim == 5 else value
               for name, value in conditions.items()}


def rollout(model, noise, conditions, first=None, sigmas=None, exit_step=None, grad=False, generator=None):
    """The student: clean latents (B, C, chunk, h, w), chunk by chunk, each made from the cache of those before.

    noise: (B, C, F, h, w), or an iterator of chunks, which may be endless. conditions: the model's keyword arguments
    (text, tracks, image, clip) for the clip, or an iterator of such dicts, asked for the next just before that chunk is
    made, so that control can change while it streams. first: the image's latent (B, C, 1, h, w), see with_first.
    A chunk is yielded before the clean pass remembers it: do not modify it.
    Training stops each chunk at step `exit_step` and keeps the graph of that step only (grad=True); sampling runs
    all of `sigmas` (default config.sigmas). Fresh noise between the steps is drawn from `generator`."""
    sigmas = sigmas or model.config.sigmas
    last = len(sigmas) - 1 if exit_step is None else exit_step
    caches = model.new_caches()
    noise = noise.split(model.config.chunk, 2) if torch.is_tensor(noise) else noise
    conditions = by_chunk(conditions, model.config.chunk) if isinstance(conditions, dict) else conditions
    for x, condition in zip(noise, conditions):
        for i, sigma in enumerate(sigmas[:last + 1]):
            with torch.set_grad_enabled(grad and i == last):
                x, level = with_first(x, x.new_full((len(x),), sigma, dtype=torch.float64), first)
                x0 = to_x0(x, model(x, level, caches=caches, **condition), level)
            if i < last:
                fresh = torch.randn(x.shape, generator=generator, device=generator.device if generator else x.device)
                x = add_noise(x0, fresh.to(x), x.new_full((len(x),), sigmas[i + 1], dtype=torch.float64))
        yield x0                                                          # shown before it is remembered
        with torch.no_grad():                                             # the clean pass is the only one that writes
            model(x0.detach(), torch.zeros_like(level), caches=caches, write=True, **condition)
        first = None                                                      # the image is in the cache now


# ----------------------------------------------------------------------------------------------------------------------
# Weights. Nothing below is part of the method; these imports are needed only here.

import contextlib
import errno
import os
from pathlib import Path


class UserError(ValueError):
    """What the user can put right: one line that says what was found and what to do."""


@contextlib.contextmanager
def naming(what, cure):
    """Whatever is wrong with `what`, which comes from outside, in one line."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{what}: {e}") from None
    except Exception as e:  # damaged headers, zip files and JSON raise ten kinds, and numpy's texts advise unpickling
        told = getattr(e, "errno", None) not in (None, errno.EINVAL)    # that one comes of damaged zip files
        raise UserError(f"{what}: {e.strerror if told else cure}") from None


def init_weights(model):
    """As Wan's: the fresh model returns zeros."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for layer in (model.text_embedding[0], model.text_embedding[2], model.time_embedding[0], model.time_embedding[2]):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    nn.init.zeros_(model.head.head.weight)
    if model.config.copy_dim:               # a fresh model believes its copies
        nn.init.zeros_(model.head.gate.weight)
        model.head.gate.bias.data = torch.tensor([0.8, 0.2]).repeat(len(model.head.gate.bias) // 2)
    for module in (*model.blocks, model.head):
        nn.init.normal_(module.modulation, std=model.config.dim ** -0.5)


# Parameters that are float32 whatever the rest is; "head." is the track head's too, whose input is made in float32.
FLOAT32 = r"time_embedding|time_projection|modulation|norm3|head\."

# What training code wraps around names, anywhere in them; and what checkpoints and Diffusers put in front.
WRAPPERS = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
PREFIXES = rf"^(model\.|diffusion_model\.|module\.|condition_embedder\.|{WRAPPERS})+|{WRAPPERS}"

# The parts of names that Diffusers spells in its own way, and Wan's spelling. norm2 is no slip: Diffusers numbers the
# norms of a block in the order of use, Wan does not.
DIFFUSERS = {
    "text_embedder.linear_1": "text_embedding.0", "text_embedder.linear_2": "text_embedding.2",
    "time_embedder.linear_1": "time_embedding.0", "time_embedder.linear_2": "time_embedding.2",
    "time_proj": "time_projection.1", "scale_shift_table": "modulation", "proj_out": "head.head",
    "image_embedder.norm1": "img_emb.proj.0", "image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "image_embedder.ff.net.2": "img_emb.proj.3", "image_embedder.norm2": "img_emb.proj.4",
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
    "norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}
PARTS = "(" + "|".join(map(re.escape, DIFFUSERS)) + r")(?![^.])"

# The same of the words in config.json.
CONFIG_JSON = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim",
               "image_dim": "clip_dim"}
# How the students of Self-Forcing are sampled: they remember all of 21 latents, so there is no sink.
SELF_FORCING = {"causal": True, "shift": 5.0, "sigmas": schedule(4, 5.0), "chunk": 3, "sink": 0, "window": None}


def load_pretrained(cls, path, dtype, device, overrides):
    """A Wan DiT in any public form to a model in eval mode, without gradients.

    path: a .safetensors file, a .pt of Self-Forcing or CausVid, an index of shards, or a folder with one of these, in
    Wan's layout or Diffusers'. The config is in the metadata of files of this project, else tensors and config.json
    tell; `overrides` replace its fields, track_dim=… adds a slot for tracks. dtype=None keeps the file's, but what
    FLOAT32 names is float32. ValueError, one line naming the file, if anything is missing, unknown or contradictory."""
    from vae import fill
    tensors, metadata, file = read_weights(Path(path))
    config = add_track_slot(tensors, find_config(tensors, metadata, file), metadata, file, overrides)
    if config.num_heads not in range(1, config.dim) or config.dim % (2 * config.num_heads):
        raise ValueError(f"{file}: {config.num_heads} heads do not fit {config.dim} channels, give num_heads=…")
    with torch.device("meta"):
        model = cls(config)
    dtype = dtype or tensors["blocks.0.ffn.0.weight"].dtype      # of mixed files: that of the matrices
    return fill(model, tensors, path, lambda name: torch.float32 if re.search(FLOAT32, name) else dtype, device)


def read_weights(path):
    """A file, folder or index to ({Wan's name: tensor}, metadata, the first file). Tensors are mapped, see vae.py."""
    from vae import read_tensors
    tensors, metadata, files = {}, {}, weight_files(path)
    for file in files:
        found, about = read_tensors(file)
        metadata.update(about)
        for name, tensor in found.items():
            name = re.sub(PARTS, lambda part: DIFFUSERS[part[0]], re.sub(PREFIXES, "", name))
            name = "head.modulation" if name == "modulation" else name
            if name.endswith("norm_added_q.weight"):             # in Diffusers' image-to-video files: zeros, never used
                continue
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{file}: {name} is {tensor.dtype}; int8, fp8 and fp8 scaled weights are not "
                                 "supported, take this model's file in bfloat16 or float16")
            if name in tensors:
                raise ValueError(f"{file}: holds {name} twice, under two names")
            tensors[name] = tensor
    return tensors, metadata, files[0]


def weight_files(path):
    """A file, folder or index to the files that hold the weights. Raises ValueError if one of several is missing."""
    if path.is_dir():
        return weight_files(only_weights(path))
    shard = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", path.name)
    if path.suffix == ".json":
        shards = read_json(path).get("weight_map")
        files = sorted({path.parent / str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    elif shard:                                                  # any shard stands for all of them
        start, count, end = shard.groups()
        files = [path.with_name(f"{start}-{i:05}-of-{count}{end}") for i in range(1, int(count) + 1)]
    else:
        return [path]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(f"{path}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:5])}")
    return files


def only_weights(folder):
    """The weights file in a folder, or its index of shards or first shard. ValueError if there is none or several."""
    for pair in ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"):
        if all((folder / name).is_dir() for name in pair):
            raise ValueError(f"{folder}: holds the two experts of Wan 2.2 A14B, name one: "
                             f"{folder / pair[0]} (high noise) or {folder / pair[1]} (low noise)")
    if (folder / "transformer").is_dir():
        return only_weights(folder / "transformer")
    for pattern in "*.index*.json", "diffusion_pytorch_model*.safetensors", "*.safetensors", "*.pt", "*.pth":
        names = sorted({re.sub(r"-\d{5}-of-", "-00001-of-", file.name) for file in folder.glob(pattern)})
        if len(names) == 1:
            return folder / names[0]
        if names:
            raise ValueError(f"{folder}: holds several weights files, name one: {', '.join(names[:5])}")
    raise ValueError(f"{folder}: holds no weights file (.safetensors, .pt)")


def read_json(path):
    """The object in a JSON file, lists as tuples, without what is null. Raises ValueError naming the file."""
    try:
        saved = json.loads(path.read_text()).items()
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{path}: cannot be read as a JSON object ({e})") from None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved if value is not None}


def find_config(tensors, metadata, file):
    """The config in the metadata; else from tensors, at 128 channels a head, and what config.json adds. Raises
    ValueError if either contradicts the tensors."""
    from vae import read_config
    told = widths(tensors, file)
    if metadata.get("format") == "motionstream":
        config = read_config(Config, metadata, file)
        source, said = "its metadata", asdict(config)
    else:
        source = file.with_name("config.json")
        said = read_json(source) if source.is_file() else {}
        said = {CONFIG_JSON[name]: said[name] for name in CONFIG_JSON if name in said} | said   # Wan's words win
        like = PRESETS["wan2.2-5b"] if told["out_dim"] == 48 else Config()      # for the VAE's stride, size and fps
        config = replace(like, **told, track_dim=track_channels(tensors, told, file), num_heads=told["dim"] // 128)
        config = replace(config, **{name: said[name] for name in ("num_heads", "text_len", "eps") if name in said})
        if metadata.get("layout", "model") != "model":      # a generator's
            config = replace(config, **SELF_FORCING)
    for name, value in told.items():
        if said.get(name, value) != value:
            raise ValueError(f"{file}: {name} is {value} by its tensors, but {said[name]} in {source}")
    return config


def widths(tensors, file):
    """The fields of Config that shapes tell."""
    from vae import what
    ranks = {"patch_embedding.weight": 5, "head.head.weight": 2, "blocks.0.ffn.0.weight": 2,
             "text_embedding.0.weight": 2, "time_embedding.0.weight": 2}
    for name, rank in ranks.items():
        if name not in tensors or tensors[name].ndim != rank:
            raise ValueError(f"{file}: this is {what(tensors)}; a whole DiT of Wan is wanted here, "
                             f"with {rank} axes in {name}")
    patch, head, ffn, text, time = (tensors[name].shape for name in ranks)
    clip = tensors.get("img_emb.proj.1.weight")
    layers = [int(block[1]) for block in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if block]
    return {"dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:]), "ffn_dim": ffn[0],
            "out_dim": head[0] // patch[2:].numel(), "num_layers": 1 + max(layers), "text_dim": text[1],
            "freq_dim": time[1], "clip_dim": clip.shape[-1] if clip is not None else 0}


def track_channels(tensors, told, file):
    """Channels of the track slot. Beside the noisy latents there may be: nothing; mask and image (image-to-video,
    Fun-InP); control and image (Fun-Control), where the control slot becomes that of the tracks; or control, mask and
    image. The last, 148 channels for the 5B model, is inferred from how its pipeline joins them, not seen in a file."""
    if "track_head.conv.weight" in tensors:
        return len(tensors["track_head.conv.weight"])
    out, mask = told["out_dim"], 4
    slots = {0: 0, mask + out: 0, out + out: out, out + mask + out: out}
    if told["in_dim"] - out not in slots:
        raise ValueError(f"{file}: no Wan DiT known here has {told['in_dim']} input channels for {out} output channels")
    return slots[told["in_dim"] - out]


def add_track_slot(tensors, config, metadata, file, overrides):
    """The config with `overrides`, and tensors for tracks that change nothing yet: an added slot has zero columns and a
    random head; Fun-Control's has trained columns and gets a head of zeros. Zeros in both would let neither learn."""
    name, weight = "track_head.conv.weight", tensors["patch_embedding.weight"]
    track_dim, slot = overrides.get("track_dim", config.track_dim), config.track_dim
    if slot not in (0, track_dim):
        raise ValueError(f"{file}: its track slot has {slot} channels, track_dim={track_dim} does not fit")
    if slot and name not in tensors and metadata.get("format") != "motionstream":
        tensors[name] = torch.zeros_like(TrackHead(out_channels=slot).conv.weight)
    if track_dim and not slot:
        tensors[name] = TrackHead(out_channels=track_dim).conv.weight.detach()
        new = weight.new_zeros(len(weight), track_dim, *weight.shape[2:])
        tensors["patch_embedding.weight"] = torch.cat([weight[:, :config.out_dim], new, weight[:, config.out_dim:]], 1)
        config = replace(config, in_dim=config.in_dim + track_dim)
    return replace(config, **overrides)


def image_channels(first, frames, still=False):
    """The image latent as channels of a clip of `frames` latents: at frame 0, zeros after it (figure 2), or at all of
    them (still=True: what weights that copy fall back on where nothing moves)."""
    if still:
        return first.expand(-1, -1, frames, -1, -1)
    return F.pad(first, (0, 0, 0, 0, 0, frames - 1))


def image_and_mask(latents):
    """The image channels of weights that have a mask there (image_dim = 4 + C: Wan's image-to-video and Fun-InP), of
    the latents (B, C, F, h, w) of a clip that is the image in video frame 0 and grey, 0, in all others:
    (B, 4 + C, F, h, w), the mask first, 1 at latent frame 0 and 0 after it."""
    first = latents.new_ones(len(latents), 4, 1, *latents.shape[3:])
    return torch.cat([image_channels(first, latents.shape[2]), latents], 1)


def write(path, save, *args):
    """Call save(*args, temporary path), then rename: a file is whole or not there. OSError, one line that names it, if
    it cannot be written."""
    from safetensors import SafetensorError
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        save(*args, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:       # torch's and safetensors' words for a full disk
        raise OSError(f"{path}: {str(e).splitlines()[0]}; is the disk full, or the folder not writable?") from e
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(model, path, dtype=None, **extra):
    """Write one .safetensors file with Wan's names, whole or not at all: from_pretrained reads it and, without a track
    head, other tools for Wan. The metadata hold the config and the texts in `extra`. dtype=None keeps the model's."""
    from safetensors.torch import save_file
    tensors = {name: t.to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    own = {"format": "motionstream", "config": json.dumps(asdict(model.config))}
    write(path, lambda temporary: save_file(tensors, temporary, own | extra))
