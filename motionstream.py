"""MotionStream: from an image and user-drawn tracks to a video that follows them, chunk by chunk.

A Wan video transformer (DiT) gets one new input, the tracks, and one new attention
pattern: each chunk attends to the first chunk, to the latest one and to itself.

    latent chunks   [ sink 0 ] 1 2 3 4 5 [ window 6 ][ chunk 7 ]   1 to 5 are evicted
    cache slots     [   0    ]           [    1     ][    2    ]   RoPE positions are slots: bounded

The paper is MotionStream, arXiv 2511.01266; sections and equations cited below are the paper's.
The method ends with `rollout`; you can skip the rest: the tiny model's additions, and loading and
saving weights. Above, only from_pretrained and, for EMA-Sink, new_caches depend on it.
Shapes, in every file of this project:

    B batch   T video frames   F latent frames, T = 1 + 4 (F - 1)   C channels   N tracks
    H W size in pixels   h w size in latent pixels
    P tokens of one latent frame   L = F P tokens of one call   S tokens including the cache
    D width of the transformer   K channels of one head, heads * K = D
    latents (B, C, F, h, w)   sigma (B,) or (B, F) in [0, 1]   velocity = noise - x0, from the DiT
"""

import contextlib
import copy
import errno
import importlib
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# Flow matching: all the diffusion theory needed here.
# x_t = (1 - sigma) x0 + sigma noise, so d x_t / d sigma = noise - x0, the velocity.

def per_frame(sigma):
    """(B,) or (B, F) to (B, 1, 1 or F, 1, 1), which broadcasts over latents."""
    return sigma.reshape(len(sigma), 1, -1, 1, 1)


def check_shape(name, value, expected):
    """AssertionError, with both shapes, unless a tensor has the expected one."""
    found = tuple(value.shape)
    assert found == tuple(expected), f"{name} {found}, expected {tuple(expected)}"


def add_noise(x0, noise, sigma):
    """Clean latents to noised ones, x_t (eq. A1). noise: as x0; sigma: (B,) or (B, F)."""
    check_shape("noise", noise, x0.shape)
    assert len(sigma) == len(x0), f"sigma of {len(sigma)} clips, x0 of {len(x0)}"
    sigma = per_frame(sigma).to(x0.dtype)
    return (1 - sigma) * x0 + sigma * noise


def to_x0(x_t, velocity, sigma):
    """The clean latents that a velocity implies."""
    return x_t - per_frame(sigma).to(x_t.dtype) * velocity


def shift_sigma(sigma, shift):
    """Noise levels moved towards 1: k sigma / (1 + (k - 1) sigma), k = shift (appendix D)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps, shift):
    """`steps` noise levels falling from 1: evenly spaced, then shifted. The final 0 is left out."""
    return tuple(shift_sigma(1 - i / steps, shift) for i in range(steps))


def same_sigma(sigma, x):
    """One noise level, a number, for all clips of latents x (B, …): (B,) float64."""
    return x.new_full((len(x),), sigma, dtype=torch.float64)


def with_first(x_t, sigma, first_latent):
    """Replace latent frame 0 with the image's: clean, at sigma 0 (as in Wan 2.2).

    x_t (B, C, F, h, w); sigma (B,) or (B, F); first_latent (B, C, 1, h, w), None: no image. Returns
    x_t and the sigma of each frame, (B, F)."""
    frames = x_t.shape[2]
    sigma_frames = sigma.reshape(len(sigma), -1).expand(-1, frames).clone()     # (B, F)
    if first_latent is None:
        return x_t, sigma_frames
    check_shape("first_latent", first_latent, x_t[:, :, :1].shape)
    sigma_frames[:, 0] = 0
    return torch.cat([first_latent, x_t[:, :, 1:]], 2), sigma_frames


def joint_guidance(v_full, v_notext, v_nomotion, w_text, w_motion):
    """Joint text and motion guidance (eq. 2) of three velocities,

        base + w_text (v_full - v_notext) + w_motion (v_full - v_nomotion),

    where base is the mean of v_notext and v_nomotion, weighted by w_text and w_motion.

    Weights that sum to 1 give v_full back: no guidance. Weights 0, 0 also mean no guidance, and
    guided_velocity then skips the other two evaluations."""
    if w_text == w_motion == 0:
        return v_full
    assert w_text + w_motion != 0, f"guidance {w_text}, {w_motion}: the weights must not cancel"
    share = w_text / (w_text + w_motion)
    base = share * v_notext + (1 - share) * v_nomotion
    return base + w_text * (v_full - v_notext) + w_motion * (v_full - v_nomotion)


# --------------------------------------------------------------------------------------------------
# Configuration. The defaults are Wan 2.1 T2V 1.3B; everything that depends on model size is here.

FRAMES = 4          # video frames per latent frame, in every VAE of the Wan family
CLIP_ROWS = 257     # rows of CLIP's image features: 16 x 16 patches and the class token
SIGNALS = 6         # channels beside copied latents that say where they are from, see moved_picture
SHARES = 2          # extra outputs of the head of a copying model, see CopyingMotionStream


def video_frames(latents):
    """Number of video frames in a clip of `latents` latent frames."""
    return 1 + FRAMES * (latents - 1)


def latent_frames(frames):
    """Number of latent frames in the longest clip within `frames` video frames."""
    return (frames + FRAMES - 1) // FRAMES


@dataclass(frozen=True)
class Config:
    """Model and sampling settings, stored in the metadata of a weights file."""
    # the transformer, named as in Wan's config.json
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16            # channels into the patch embedding: noisy latents, tracks, image
    out_dim: int = 16           # channels of the latents
    track_dim: int = 0          # channels of the track features, 0 = no track input
    text_dim: int = 4096
    text_len: int = 512         # text is zero-padded to this many rows, all attended to
    clip_dim: int = 0           # channels of CLIP's image features, 0 = no image branch
    freq_dim: int = 256
    patch_size: tuple = (1, 2, 2)
    eps: float = 1e-6
    # inputs
    text_encoder: str = "umt5"          # or "words": the tiny model's own vectors
    track_id_mode: str = "random"       # or "same": see track_ids
    clean_first: bool = True            # latent frame 0 is the image, at sigma 0: see with_first
    # sampling
    causal: bool = False        # True: streaming student; False: bidirectional teacher
    shift: float = 5.0
    sigmas: tuple = schedule(3, 5.0)    # the student's noise levels; the paper gives none
    steps: int = 50             # the teacher's Euler steps
    guidance: tuple = (3.0, 1.5)        # w_text, w_motion (section 3.1); (0, 0) or a sum of 1: none
    chunk: int = 3              # latent frames per chunk
    first_chunk: int | None = None      # size of the first chunk, None: `chunk`
    sink: int = 1               # chunks at the start that are never evicted
    window: int | None = 1      # latest chunks kept besides the sink, None = all
    sink_decay: float = 1.0     # below 1: extras/reward_forcing.py averages evicted ones into it
    # what it was trained on
    stride: int = 8             # pixels per latent pixel, as in its VAE
    size: tuple = (480, 832)    # height, width of the video in pixels
    fps: int = 16
    prompt: str | None = None   # used when the user gives none; None = the null text
    # the tiny model's departure from the paper, see CopyingMotionStream: skip it at first
    copies: bool = False        # frame 0 copied along the tracks is an extra input
    latent_std: tuple = ()      # standard deviation of each channel of the latents

    @property
    def head_dim(self):
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def is_wan(self):
        """True for Wan's weights and for those trained from them; False for the tiny model's."""
        return self.text_encoder == "umt5"

    @property
    def first_chunk_size(self):
        """Latent frames in the first chunk."""
        return self.first_chunk or self.chunk

    @property
    def latent_size(self):
        """Height and width of the latents of a video of `size`."""
        height, width = self.size
        return height // self.stride, width // self.stride

    @property
    def image_dim(self):
        """Input channels for the image, see image_inputs."""
        return self.in_dim - self.out_dim - self.track_dim - self.copy_dim

    @property
    def has_mask(self):
        """True if the image enters as a mask and a clip: Wan's image-to-video weights, Fun-InP."""
        return self.image_dim > self.out_dim

    # The tiny model's again, 0 without copies.

    @property
    def copy_dim(self):
        """Input channels for copies: latents and signals of confidence."""
        if not self.copies:
            return 0
        return self.out_dim + SIGNALS

    @property
    def shares(self):
        """Output channels beside the latents'."""
        if not self.copies:
            return 0
        return SHARES


PRESETS = {
    "wan2.1-1.3b": Config(),
    "motionstream-1.3b": Config(
        in_dim=48, track_dim=16, clip_dim=1280, clean_first=False,
        shift=6.0, sigmas=schedule(3, 6.0)),
    "wan2.1-14b": Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.2-5b": Config(
        dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48,
        first_chunk=1, stride=16, size=(704, 1280), fps=24),     # 121 frames: 1 + 10 x 3 latents
    "tiny": Config(
        dim=192, ffn_dim=576, num_heads=3, num_layers=5,
        in_dim=96 + 32 + (96 + SIGNALS) + 96, out_dim=96, track_dim=32, copies=True,
        track_id_mode="same",
        text_dim=64, text_len=8, text_encoder="words",
        steps=15, guidance=(0.0, 0.0),      # text at 1.5 costs objects 0.2 dB of PSNR
        size=(128, 128), prompt="steady light, steady shapes"),
}


# --------------------------------------------------------------------------------------------------
# Time and position.

def sinusoid(t, dim):
    """t (…) to (…, dim): cosines, then sines, of t at dim / 2 frequencies from 1 to 1 / 10000."""
    half = dim // 2
    frequency = 10000 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def axis_rotations(length, dim, device):
    """RoPE along one axis, a rotation per position and channel pair: complex (length, dim / 2)."""
    position = torch.arange(length, dtype=torch.float64, device=device)
    frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.outer(position, frequency)                        # float64: exact for long videos
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rope_table(frames, rows, columns, head_dim, device):
    """Rotations for a grid of tokens: complex (frames * rows * columns, d), d = head_dim / 2.

    Frame is the slowest axis. Of the d channel pairs, d // 3 rotate with the row, d // 3 with the
    column, the rest with the frame."""
    spatial = 2 * (head_dim // 6)
    frame = axis_rotations(frames, head_dim - 2 * spatial, device)
    row = axis_rotations(rows, spatial, device)
    column = axis_rotations(columns, spatial, device)
    grid = (frames, rows, columns, -1)
    table = torch.cat([frame[:, None, None].expand(grid),
                       row[None, :, None].expand(grid),
                       column[None, None].expand(grid)], -1)        # (frames, rows, columns, d)
    return table.flatten(0, 2)


def apply_rope(x, table):
    """Rotate adjacent channel pairs of (B, L, heads, K) by the table (L, K / 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))                            # (B, L, heads, K / 2, 2)
    table = table[:, None]                                              # (L, 1, K / 2)
    if torch.compiler.is_compiling():       # it cannot fuse complex numbers
        a, b = pairs.unbind(-1)
        real = a * table.real - b * table.imag
        imaginary = a * table.imag + b * table.real
        rotated = torch.stack([real, imaginary], -1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return rotated.flatten(-2).type_as(x)


# --------------------------------------------------------------------------------------------------
# Attention with a KV cache (section 3.2).

class KVCache:
    """Rolling KV cache of one layer: the first `sink` chunks, never evicted, and a sliding window
    of the latest `window` chunks (None: all). Keys are stored before RoPE: a chunk's position is
    its slot, which changes as others are evicted."""

    def __init__(self, sink, window):
        possible = sink >= 0 and (window is None or window >= 0)
        assert possible, f"sink {sink}, window {window}: expected 0 or more chunks"
        self.sink = sink
        self.window = window
        self.chunks = []        # of (k, v), each (B, L, heads, K), oldest first

    def __len__(self):
        """Tokens held."""
        return sum(k.shape[1] for k, _ in self.chunks)

    def read(self, k, v):
        """Keys and values of [cache | new], (B, S, heads, K) each. The cache is not changed."""
        keys = [held[0] for held in self.chunks] + [k]
        values = [held[1] for held in self.chunks] + [v]
        return torch.cat(keys, 1), torch.cat(values, 1)

    def write(self, k, v):
        """Append a clean chunk, detached; evict the oldest one after the sink, if full."""
        self.chunks = self.chunks + [(k.detach(), v.detach())]      # a new list: snapshots stay
        if self.window is not None and len(self.chunks) > self.sink + self.window:
            self.chunks.pop(self.sink)


class RMSNorm(nn.Module):
    """Over the full width, all heads at once, as in Wan; statistics in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight


# Attention backends of a GPU, most preferred first. On Hopper cuDNN is nearly twice as fast as
# FlashAttention 2, which torch may prefer.
ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
             SDPBackend.MATH, SDPBackend.OVERRIDEABLE)


def attend(q, k, v):
    """Softmax attention of (B, L, heads, K) to (B, S, heads, K), heads joined: (B, L, D)."""
    q = q.transpose(1, 2)                                   # (B, heads, L, K)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if q.is_cuda:
        with sdpa_kernel(list(ATTENTION), set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v)
    else:       # a CPU has one kernel, and the `with` would cost 4 % of the tiny model's time
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of the new tokens to [cache | new]. No mask: chunks are causal by the order of
    their writes. cache=None: bidirectional, for teacher and critic."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(self, x, rope, cache=None, write=False):
        """x (B, L, D) to (B, L, D); rope (S, K / 2): rotations of the cached tokens, then of x."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(2, heads)      # (B, L, heads, K)
        k = self.norm_k(self.k(x)).unflatten(2, heads)
        v = self.v(x).unflatten(2, heads)
        k = k.type_as(v)            # norms return float32 under autocast; the cache has one dtype

        keys = k
        values = v
        if cache is not None:
            keys, values = cache.read(k, v)                 # (B, S, heads, K)
        if write:
            cache.write(k, v)

        q = apply_rope(q, rope[-q.shape[1]:])               # the new tokens come last
        keys = apply_rope(keys, rope)
        return self.o(attend(q, keys, values))


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the text and, in weights with an image branch, to CLIP's
    features of the image: two attentions, added before the shared output projection. No RoPE."""

    def __init__(self, dim, num_heads, eps, has_clip):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if has_clip:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x, text, clip=None):
        """x (B, L, D) to (B, L, D); text (B, text_len, D); clip (B, CLIP_ROWS, D)."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(2, heads)                  # (B, L, heads, K)
        k = self.norm_k(self.k(text)).unflatten(2, heads)
        y = attend(q, k, self.v(text).unflatten(2, heads))
        if clip is not None:
            k = self.norm_k_img(self.k_img(clip)).unflatten(2, heads)
            y = y + attend(q, k, self.v_img(clip).unflatten(2, heads))
        return self.o(y)


# --------------------------------------------------------------------------------------------------
# Transformer block and output head. The residual stream, norms and gates stay in float32.

def modulate(x, shift, scale):
    """x (1 + scale) + shift: the affine part of adaptive layer norm."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and last are modulated by the
    sigma of each frame."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.cross_attn = CrossAttention(c.dim, c.num_heads, c.eps, c.clip_dim > 0)
        self.norm2 = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, c.dim))

    def forward(self, x, time, rope, text, clip=None, cache=None, write=False):
        """x (B, F, P, D) float32; time (B, 1 or F, 6, D); text, clip (B, rows, D)."""
        dtype = self.ffn[0].weight.dtype
        modulation = (self.modulation + time).unsqueeze(2)              # (B, 1 or F, 1, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(3)

        y = modulate(self.norm1(x), shift1, scale1).to(dtype)
        y = self.self_attn(y.flatten(1, 2), rope, cache, write)         # (B, L, D)
        x = torch.addcmul(x, gate1, y.view_as(x))

        y = self.norm3(x).to(dtype)
        y = self.cross_attn(y.flatten(1, 2), text, clip)
        x = x + y.view_as(x)

        y = modulate(self.norm2(x), shift2, scale2).to(dtype)
        return torch.addcmul(x, gate2, self.ffn(y))


class Head(nn.Module):
    """Tokens (B, F, P, D) to patches of the output, (B, F, P, patch area * channels)."""

    def __init__(self, c, channels):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, c.eps, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(c.patch_size) * channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, c.dim))

    def forward(self, x, time):
        """time (B, 1 or F, D)."""
        modulation = (self.modulation + time.unsqueeze(2)).unsqueeze(2)     # (B, 1 or F, 1, 2, D)
        shift, scale = modulation.unbind(3)
        return self.head(modulate(self.norm(x), shift, scale))


# --------------------------------------------------------------------------------------------------
# Tracks (section 3.1).

def inside_picture(tracks, height, width):
    """True for points of tracks (B, T, N, 2) inside the picture: (B, T, N) bool. NaN is outside."""
    x, y = tracks.unbind(-1)
    return (x >= 0) & (y >= 0) & (x < width) & (y < height)


def cell_of(tracks, stride, height, width):
    """Latent cell, y * w + x, of each point of tracks (B, T, N, 2): (B, T, N) int64. Points outside
    the picture get h * w, one past the last cell. Height and width in pixels."""
    h = height // stride
    w = width // stride
    x, y = (tracks / stride).nan_to_num(0).long().unbind(-1)
    return (y * w + x).masked_fill(~inside_picture(tracks, height, width), h * w)


def lowest_rank(cell, visible, cells):
    """The lowest rank of the visible tracks in each cell, N where there is none: (B, T, cells).
    cell (B, T, N): each track's cell, from cell_of; a track's rank is its place in 0 … N - 1."""
    B, T, N = cell.shape
    cell = cell.masked_fill(~visible, cells)                # one more cell, which is dropped
    rank = torch.arange(N, device=cell.device).expand(B, T, N)
    lowest = rank.new_full((B, T, cells + 1), N)
    return lowest.scatter_reduce(2, cell, rank, "amin")[..., :-1]


class TrackHead(nn.Module):
    """User-drawn tracks to channels on the latent grid: the new input of MotionStream.

    A track's ID is embedded as a sinusoidal vector: one half encodes its upper 16 bits, one half
    the lower 16. The vector is written at cell (floor(x / stride), floor(y / stride)) of every
    frame in which the track is visible (eq. 1); 4 frames are packed into the channels and go
    through a 1x1x1 convolution. If several tracks share a cell, the lowest ID wins, whatever their
    order; an average of their vectors would belong to no track. A track outside the picture is
    hidden. Hidden and "not specified" are both zeros."""

    def __init__(self, id_dim=64, out_channels=16, stride=8):
        super().__init__()
        self.id_dim = id_dim
        self.stride = stride
        # no bias: it would fill empty cells
        self.conv = nn.Conv3d(FRAMES * id_dim, out_channels, 1, bias=False)

    def forward(self, tracks, visible, ids, height, width):
        """Tracks of a clip, or of a chunk that continues one, to (B, out_channels, F, h, w).

        tracks (B, T, N, 2) x, y in pixels; visible (B, T, N) bool; ids (B, N) int64; height and
        width of the picture in pixels. T % 4 == 1 starts a clip, T % 4 == 0 continues one:
        concatenated chunks equal the whole clip."""
        B, T, N = tracks.shape[:3]
        check_shape("tracks", tracks, (B, T, N, 2))
        check_shape("visible", visible, (B, T, N))
        check_shape("ids", ids, (B, N))
        assert visible.dtype == torch.bool, f"visible is {visible.dtype}, expected bool"
        assert ids.dtype == torch.int64, f"ids are {ids.dtype}, expected int64"
        assert T % FRAMES < 2, f"{T} frames: a clip starts with 1 + 4 k, and goes on with 4 k"
        fits = height % self.stride == 0 and width % self.stride == 0
        assert fits, f"{width}x{height} is not divisible by {self.stride}"
        h = height // self.stride
        w = width // self.stride

        # Sort by ID: from here on a track is identified by its rank.
        order = ids.argsort(1)
        ids = ids.gather(1, order)
        visible = visible.gather(2, order[:, None].expand(B, T, N))
        tracks = tracks.gather(2, order[:, None, :, None].expand(B, T, N, 2))

        # The vector of the track of lowest rank in each cell.
        cell = cell_of(tracks, self.stride, height, width)
        lowest = lowest_rank(cell, visible, h * w)                      # (B, T, h w)
        lowest = lowest.reshape(B, T * h * w, 1)
        halves = torch.stack([ids >> 16, ids & 0xFFFF], -1)             # (B, N, 2)
        vectors = sinusoid(halves, self.id_dim // 2).flatten(2)         # (B, N, id_dim)
        vectors = F.pad(vectors, (0, 0, 0, 1))                          # zeros for rank N: no track
        volume = vectors.gather(1, lowest.expand(-1, -1, self.id_dim))  # (B, T h w, id_dim)
        volume = volume.view(B, T, h, w, self.id_dim)

        # Pack four frames into the channels; three empty frames precede frame 0.
        volume = F.pad(volume, (0, 0, 0, 0, 0, 0, -T % FRAMES, 0))
        volume = volume.unflatten(1, (-1, FRAMES))                      # (B, F, 4, h, w, id_dim)
        volume = volume.permute(0, 2, 5, 1, 3, 4).flatten(1, 2)         # (B, 4 id_dim, F, h, w)
        return self.conv(volume.to(self.conv.weight.dtype))


def start_points(tracks, visible):
    """Positions in frame 0 of tracks (B, T, N, 2), visible (B, T, N): (B, N, 2); NaN: not visible
    there."""
    return tracks[:, 0].masked_fill(~visible[:, 0, :, None], math.nan)


def track_ids(tracks, config, rng=None):
    """One ID per track of tracks (B, T, N, 2): (B, N) int64 in [0, 2**32), by config.track_id_mode:

    random   drawn from `rng`, as in the paper
    same     0 for all: track features only mark positions, the copies carry the content"""
    B, _, N, _ = tracks.shape
    if config.track_id_mode == "random":
        return torch.randint(0, 2 ** 32, (B, N), generator=rng).to(tracks.device)
    return torch.zeros(B, N, dtype=torch.long, device=tracks.device)


def track_features(model, tracks, visible, ids):
    """The model's `tracks` input for a clip or a chunk: (B, track_dim, F, h, w).

    tracks (B, T, N, 2) x, y in pixels; visible (B, T, N); ids (B, N), see track_ids."""
    height, width = model.config.size
    return model.track_head(tracks, visible, ids, height, width)


# --------------------------------------------------------------------------------------------------
# The model.

def init_weights(model):
    """Wan's initialisation: a fresh model returns zeros."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for embedding in model.text_embedding, model.time_embedding:
        nn.init.normal_(embedding[0].weight, std=0.02)
        nn.init.normal_(embedding[2].weight, std=0.02)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    nn.init.zeros_(model.head.head.weight)
    for module in (*model.blocks, model.head):
        nn.init.normal_(module.modulation, std=model.config.dim ** -0.5)


def condition_or_zeros(name, value, channels, x):
    """A condition as input channels beside latents x (B, C, F, h, w): (B, channels, F, h, w), in
    the dtype of x; None: zeros. AssertionError on any other shape."""
    shape = (len(x), channels, *x.shape[2:])
    if value is None:
        return x.new_zeros(shape)
    check_shape(f"condition {name}", value, shape)
    return value.to(x.dtype)


def check_latents(config, x, sigma):
    """AssertionError unless latents x (B, C, F, h, w) and sigma fit the model and each other."""
    assert x.ndim == 5, f"latents {tuple(x.shape)}, expected (B, {config.out_dim}, F, h, w)"
    assert torch.is_tensor(sigma), f"sigma {sigma}, expected a tensor (B,) or (B, F)"
    B, C, frames, h, w = x.shape
    _, p, q = config.patch_size
    assert C == config.out_dim, f"latents of {C} channels, expected {config.out_dim}"
    assert h % p == 0 and w % q == 0, f"latents of {h}x{w} do not divide into patches of {p}x{q}"
    found = tuple(sigma.shape)
    assert found in ((B,), (B, frames)), f"sigma {found}, expected {(B,)} or {(B, frames)}"


def check_caches(caches, layers, batch, patches):
    """AssertionError unless there is a cache per layer, and what they hold is of `batch` clips and
    of whole latent frames of `patches` tokens."""
    assert len(caches) == layers, f"{len(caches)} caches, expected one per layer: {layers}"
    for k, _ in caches[0].chunks:
        assert len(k) == batch, f"the cache holds a batch of {len(k)}, the latents are {batch}"
        whole = k.shape[1] % patches == 0
        assert whole, f"the cache holds {k.shape[1]} tokens, a latent frame now has {patches}"


class MotionStream(nn.Module):
    """Wan's DiT with a track head. Parameters have the names of Wan's public checkpoints; only
    track_head.* is new."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.recompute = False
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(
            nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c, c.out_dim + c.shares)
        if c.clip_dim:
            proj = nn.Sequential(
                nn.LayerNorm(c.clip_dim), nn.Linear(c.clip_dim, c.clip_dim), nn.GELU(),
                nn.Linear(c.clip_dim, c.dim), nn.LayerNorm(c.dim))
            self.img_emb = nn.ModuleDict({"proj": proj})
        if c.track_dim:
            self.track_head = TrackHead(out_channels=c.track_dim, stride=c.stride)
        if not self.head.head.weight.is_meta:
            init_weights(self)

    def new_caches(self, **overrides):
        """One empty KVCache per layer. overrides: fields of Config (sink, window, sink_decay)."""
        c = replace(self.config, **overrides)
        if c.sink_decay < 1:
            EMASink = extra("reward_forcing", "sink_decay < 1 (EMA-Sink)").EMASink
            return [EMASink(c.sink, c.window, c.sink_decay) for _ in self.blocks]
        return [KVCache(c.sink, c.window) for _ in self.blocks]

    def forward(self, x, sigma, text=None, *, tracks=None, image=None, clip=None,
                caches=None, write=False):
        """The velocity (B, out_dim, F, h, w), float32, of noised latents x at sigma (B,) or (B, F).

        text (B, L, text_dim), None: the null text; tracks (B, track_dim, F, h, w) from
        track_features, None: all hidden; image: channels made of it, not pixels, see image_inputs,
        None: zeros; clip (B, CLIP_ROWS, clip_dim): CLIP's features of it. caches=None:
        bidirectional. Otherwise each layer attends to [cache | new]; only write=True changes the
        caches."""
        c = self.config
        check_latents(c, x, sigma)
        tracks = condition_or_zeros("tracks, see track_features:", tracks, c.track_dim, x)
        image = condition_or_zeros("image", image, c.image_dim, x)
        channels = torch.cat([x, tracks, image], 1)
        return self.transformer(channels, sigma, text, clip, caches, write)

    def transformer(self, x, sigma, text, clip=None, caches=None, write=False):
        """Wan's transformer: all input channels x (B, in_dim, F, h, w) to the output of the head,
        (B, out_dim + shares, F, h, w), float32. The rest is as in forward."""
        c = self.config
        B = len(x)
        assert x.shape[1] == c.in_dim, f"{x.shape[1]} input channels, in_dim is {c.in_dim}"
        assert caches is not None or not write, "write=True needs caches, see new_caches"
        tokens = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        frames, rows, columns = tokens.shape[2:]
        tokens = tokens.flatten(3).permute(0, 2, 3, 1)                  # (B, F, P, D)
        # float32, laid out anew in the same copy: else every layer would stride over the channels
        tokens = tokens.to(torch.float32, memory_format=torch.contiguous_format).contiguous()

        held = 0                                                        # latent frames in the cache
        if caches is None:
            caches = [None] * c.num_layers
        else:
            check_caches(caches, c.num_layers, B, rows * columns)
            held = len(caches[0]) // (rows * columns)
        rope = rope_table(held + frames, rows, columns, c.head_dim, x.device)

        with torch.autocast(x.device.type, enabled=False):      # keep the time embedding in float32
            time = sinusoid(1000 * sigma.reshape(B, -1), c.freq_dim)
            time = self.time_embedding(time)                    # (B, 1 or F, D)
            modulation = self.time_projection(time).unflatten(-1, (6, -1))
        text = self.embed_text(text, B)
        if clip is not None:
            assert c.clip_dim, "clip is given, but the model has no image branch"
            check_shape("clip", clip, (B, CLIP_ROWS, c.clip_dim))
            clip = self.img_emb["proj"](clip.to(text.dtype))
        for block, cache in zip(self.blocks, caches):
            inputs = (tokens, modulation, rope, text, clip)
            tokens = self.run_block(block, inputs, cache, write)
        with torch.autocast(x.device.type, enabled=False):
            patches = self.head(tokens, time)                   # (B, F, P, patch area * channels)
        return self.unpatchify(patches, rows, columns)

    def recompute_blocks(self, on=True):
        """Turn gradient checkpointing of the blocks on or off: less memory, a third more time.
        Returns the model."""
        self.recompute = on
        return self

    def run_block(self, block, inputs, cache, write):
        """Run one block, with gradient checkpointing if recompute_blocks asked for it."""
        if write or not self.recompute:         # passes that write have no backward
            return block(*inputs, cache, write)
        # The backward runs after later writes to the cache, so the block gets a snapshot.
        return checkpoint(block, *inputs, copy.copy(cache), use_reentrant=False)

    def embed_text(self, text, batch):
        """(B, L, text_dim) or None to (B, text_len, D), padded with zero rows first, as in Wan."""
        c = self.config
        weight = self.text_embedding[0].weight
        if text is None:
            text = weight.new_zeros(batch, 0, c.text_dim)
        rows = text.shape[1]
        fits = text.shape[::2] == (batch, c.text_dim)
        assert fits, f"text {tuple(text.shape)}, expected ({batch}, L, {c.text_dim})"
        assert rows <= c.text_len, f"text of {rows} rows, at most {c.text_len}"
        return self.text_embedding(F.pad(text.to(weight.dtype), (0, 0, 0, c.text_len - rows)))

    def unpatchify(self, x, rows, columns):
        """Patches (B, F, rows columns, p q C) to latents (B, C, F, rows p, columns q)."""
        _, p, q = self.config.patch_size
        x = x.unflatten(3, (p, q, -1))
        x = x.unflatten(2, (rows, columns))             # (B, F, rows, columns, p, q, C)
        x = x.permute(0, 6, 1, 2, 4, 3, 5)              # (B, C, F, rows, p, columns, q)
        return x.flatten(5, 6).flatten(3, 4)

    @classmethod
    def from_pretrained(cls, path, *, dtype=None, device="cpu", **overrides):
        """Load a Wan DiT in any public format, in eval mode, without gradients.

        path: see read_weights. The config comes from the file's metadata, else from tensor shapes
        and config.json; `overrides` replace its fields, and track_dim=… adds an input for tracks.
        dtype=None keeps the file's; parameters that match FLOAT32 are float32.
        UserError, one line naming the file, if anything is missing, unknown or contradictory, or
        memory cannot hold it."""
        model, _ = open_pretrained(cls, path, overrides)
        if dtype is None:
            dtype = model.blocks[0].ffn[0].weight.dtype     # in mixed files: the matrices'
        return copy_weights(model, path, dtype, device)


# --------------------------------------------------------------------------------------------------
# The image, as inputs of the model.

MASK = FRAMES       # mask channels: one per video frame of a latent frame


def image_channels(first_latent, count):
    """Image channels of a clip of `count` latent frames: the image's latent (B, C, 1, h, w),
    followed by zeros (figure 2)."""
    return F.pad(first_latent, (0, 0, 0, 0, 0, count - 1))


def image_and_mask(latents):
    """Image channels for weights with a mask (Config.has_mask). latents (B, C, F, h, w): encoded
    clip of the image followed by grey (0) frames. Returns a mask, 1 at latent frame 0 and 0 after
    it, then the latents: (B, 4 + C, F, h, w)."""
    B, _, frames, h, w = latents.shape
    mask = latents.new_ones(B, MASK, 1, h, w)
    return torch.cat([image_channels(mask, frames), latents], 1)


def image_inputs(config, latents, count):
    """The image as inputs for a clip of `count` latents: (image channels, clean latent frame 0).
    Either is None if the model has no such input. latents: the encoded image, (B, C, 1, h, w); with
    a mask an encoded clip, (B, C, count, h, w), see image_and_mask."""
    channels = None
    first_latent = None
    if config.has_mask:
        channels = image_and_mask(latents)
    elif config.copies:
        channels = latents
    elif config.image_dim:
        channels = image_channels(latents, count)
    if config.clean_first:
        first_latent = latents[:, :, :1]
    return channels, first_latent


# --------------------------------------------------------------------------------------------------
# Sampling: the teacher denoises a whole clip at once, the student chunk by chunk.

def without(conditions, *names):
    """Copy the conditions and set the named ones to zero, which means not given."""
    changed = dict(conditions)
    for name in names:
        if name in changed:
            changed[name] = torch.zeros_like(changed[name])
    return changed


def guided_velocity(model, x_t, sigma, conditions, guidance, null_text=None):
    """Velocity under guidance (w_text, w_motion); if no text is given, w_text counts as 0. One
    batch holds the clips with all conditions, without text and without motion. A variant whose
    weight is 0 is not evaluated. null_text: the text embedding of no_text, as many rows as the text
    has; None: zeros."""
    given = {name: value for name, value in conditions.items() if value is not None}
    w_text, w_motion = guidance
    if "text" not in given:
        w_text = 0.0
    if w_text == 0 and w_motion == 0:
        return model(x_t, sigma, **conditions)
    variants = {"full": given}
    if w_text:
        no_text = without(given, "text")
        if null_text is not None:
            check_shape("null_text", null_text[:1], given["text"][:1].shape)
            no_text["text"][:] = null_text
        variants["no_text"] = no_text
    if w_motion:
        variants["no_motion"] = without(given, "tracks", "copies")

    n = len(variants)
    batch = {}
    for name in given:
        batch[name] = torch.cat([variant[name] for variant in variants.values()])
    velocities = model(torch.cat([x_t] * n), torch.cat([sigma] * n), **batch).chunk(n)
    v = dict(zip(variants, velocities))
    full = v["full"]    # replaces a skipped variant, whose weight is 0
    return joint_guidance(full, v.get("no_text", full), v.get("no_motion", full), w_text, w_motion)


def euler(model, noise, conditions, first_latent=None, null_text=None):
    """Sample the bidirectional teacher: noise (B, C, F, h, w) to clean latents by Euler steps with
    joint guidance. Steps and guidance are model.config's.

    conditions: the model's keyword arguments (text, tracks, image, …); first_latent
    (B, C, 1, h, w): see with_first; null_text: see guided_velocity. Yields (x_t, sigma) at each
    noise level and finally (x0, 0.0): the ODE trajectory that causal initialisation learns from."""
    c = model.config
    sigmas = schedule(c.steps, c.shift)
    x = noise
    for sigma, following in zip(sigmas, sigmas[1:] + (0.0,)):
        x, sigma_frames = with_first(x, same_sigma(sigma, x), first_latent)     # (B, F)
        yield x, sigma
        velocity = guided_velocity(model, x, sigma_frames, conditions, c.guidance, null_text)
        x = x + (following - sigma) * velocity
    x, _ = with_first(x, sigma_frames, first_latent)
    yield x, 0.0


def chunk_sizes(config, count=math.inf):
    """Sizes of the chunks in latent frames: config.first_chunk_size, then config.chunk, endlessly
    or up to `count` in total, where the last chunk may be shorter."""
    assert config.chunk >= 1, f"chunk {config.chunk}, expected 1 or more"
    size = config.first_chunk_size
    while count > 0:
        yield min(size, count)
        count = count - size
        size = config.chunk


def split_conditions(conditions, sizes):
    """A clip's conditions by chunk: those with a frame axis are sliced. An image of a single frame
    goes to every chunk, as copying models need. sizes: see chunk_sizes."""
    start = 0
    for size in sizes:
        part = dict(conditions)
        for name, value in conditions.items():
            if value is None or value.ndim != 5:        # no frame axis
                continue
            if name != "image" or value.shape[2] > 1:
                part[name] = value[:, :, start:start + size]
        start += size
        yield part


def remember(model, x0, caches, condition):
    """The clean pass: write a finished chunk x0 (B, C, chunk, h, w) to the caches, without a graph.
    No other pass writes."""
    B, _, frames, _, _ = x0.shape
    clean = torch.zeros(B, frames, dtype=torch.float64, device=x0.device)       # sigma 0
    with torch.no_grad():
        model(x0, clean, caches=caches, write=True, **condition)


def rollout(model, noise, conditions, first_latent=None, exit_step=None, rng=None, caches=None):
    """Sample the student: clean latents (B, C, chunk, h, w), chunk by chunk, each conditioned on
    the KV cache of the earlier ones.

        noise       (B, C, F, h, w), split into the config's chunks; or an iterator, possibly
                    endless, of chunks (of any size, if conditions are an iterator, too)
        conditions  the model's keyword arguments (text, tracks, image, …) for the clip, which may
                    outlast the noise (shorter ones are refused); or an iterator of such dicts, one
                    per chunk, advanced just before that chunk is denoised, so that the user can
                    steer while the video streams
        first_latent  the image, (B, C, 1, h, w), see with_first
        exit_step   None: run all of config.sigmas. In training each chunk stops at this step, and
                    only that step's graph is kept (none under no_grad)
        rng         draws the fresh noise between denoising steps
        caches      None: model.new_caches()

    The shorter of two iterators ends it. A chunk is yielded before the clean pass writes it to the
    cache: do not modify it."""
    c = model.config
    last = len(c.sigmas) - 1
    if exit_step is not None:
        assert 0 <= exit_step <= last, f"exit_step {exit_step}, expected 0 to {last}"
        last = exit_step
    grad = exit_step is not None and torch.is_grad_enabled()
    if caches is None:
        caches = model.new_caches()
    sizes = chunk_sizes(c)
    if torch.is_tensor(noise):
        sizes = list(chunk_sizes(c, noise.shape[2]))
        noise = noise.split(sizes, 2)
    if isinstance(conditions, dict):
        conditions = split_conditions(conditions, sizes)
    for x, condition in zip(noise, conditions):
        for step, sigma in enumerate(c.sigmas[:last + 1]):
            with torch.set_grad_enabled(grad and step == last):
                x, sigma_frames = with_first(x, same_sigma(sigma, x), first_latent)     # (B, F)
                velocity = model(x, sigma_frames, caches=caches, **condition)
                x0 = to_x0(x, velocity, sigma_frames)
            if step < last:
                device = getattr(rng, "device", x.device)   # same noise on any device
                fresh = torch.randn(x.shape, generator=rng, device=device).to(x)
                x = add_noise(x0, fresh, same_sigma(c.sigmas[step + 1], x))
        yield x0                                    # so it can be shown before it is cached
        remember(model, x0.detach(), caches, condition)
        first_latent = None                         # the image is in the cache now


# --------------------------------------------------------------------------------------------------
# The method ends here; stop reading unless you want the tiny model or files.
#
# The tiny model: copies along tracks, and the linear part of the velocity. Not in the paper.
#
# A track says where a piece of frame 0 is now, so the model is given the latents of frame 0 with
# that piece at its new place (Wan-Move copies first-frame features along tracks in the same way).
# How far the piece reaches is segmented; where it was, the ground closes. All tracks share one ID:
# the tiny model is too small to learn to look up IDs. The part of its velocity that is linear in
# x_t is computed, not learned (Karras et al. 2022). Models of Wan's size do neither.

COPY_CELL = 2       # side in pixels of the squares that are moved as one
REACH = 40          # pixels: a square farther than this from all tracks rests
SAME = 2            # squared distance of two squares' vectors: less is one thing, more another
NEIGHBOURS = 8      # the nearest tracks, one of which a square follows, see way_back
BESIDE = 4          # pixels beyond the followed track's distance at which a weight falls to 1 / e
ALIKE = 6           # pixels between the motions of two tracks, for the same fall
TURNS = 0.1         # more of these for each pixel between their starts: things turn and grow
AHEAD = 16          # pixels by which what moves unlike the rest counts as nearer, at most
STAYS = 2           # pixels: what moves no farther leaves no hole, or no farther from the mean of
                    # the picture is ground
SURE = 8            # log odds are within -SURE and SURE
THING_WIDER = 1     # added to log odds, so that things are rather too large
HOLE_WIDER = 3      # the same of the holes that they leave
FAR = 1000          # pixels, far more than REACH and AHEAD
NEAR = (8, 32)      # distances in pixels at which nearness is 1 / e
IN_FRAME_0 = (1, 1, 1, 0, 1, 0)     # signals where nothing has moved yet, see moved_picture
SPREAD = 0.1        # assumed std of x0 around the copies, relative to the latents' own


def square_centres(height, width, device):
    """Centres of the squares of COPY_CELL pixels in a picture: (rows, columns, 2), x first."""
    y = (torch.arange(height // COPY_CELL, device=device) + 0.5) * COPY_CELL
    x = (torch.arange(width // COPY_CELL, device=device) + 0.5) * COPY_CELL
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], 2)


def nearest_points(places, points, visible, count):
    """The visible points nearest to each place, frame by frame, nearest first.

    places (B, T, rows, columns, 2); points (B, T, N, 2), visible (B, T, N). Returns indices, int64,
    and distances in pixels, (B, T, rows, columns, min(count, N)) each; the distance is infinite for
    points that are not visible."""
    far = 1e6                                                           # beyond visible points
    points = points.masked_fill(~visible[..., None], far)
    distance = torch.cdist(places.flatten(2, 3), points)                # (B, T, rows columns, N)
    distance, index = distance.topk(min(count, points.shape[2]), largest=False)
    distance = distance.masked_fill(distance > far / 2, math.inf)
    shape = places.shape[2:4]
    return index.unflatten(2, shape), distance.unflatten(2, shape)


def moves_since(tracks, start):
    """Displacement of tracks (B, T, N, 2) since frame 0, where they were at start (B, N, 2)."""
    return tracks.nan_to_num(0) - start.nan_to_num(0)[:, None]


def values_of(index, values):
    """Values (B, T, N, D) of the tracks with these numbers: index (B, T, rows, columns, near) to
    (B, T, rows, columns, near, D)."""
    wanted = index.flatten(2)[..., None].expand(-1, -1, -1, values.shape[3])
    return values.gather(2, wanted).unflatten(2, index.shape[2:])


def from_outside(back, height, width):
    """True for squares whose place in frame 0 is partly or wholly outside the picture:
    (B, T, rows, columns) bool. back (B, T, rows, columns, 2): displacement to that place."""
    rows, columns = back.shape[2:4]
    x = COPY_CELL * torch.arange(columns, device=back.device) + back[..., 0]
    y = COPY_CELL * torch.arange(rows, device=back.device)[:, None] + back[..., 1]
    return (x < 0) | (y < 0) | (x > width - COPY_CELL) | (y > height - COPY_CELL)


@dataclass
class Votes:
    """Of N tracks for the S squares of frame 0, both (B, N, S): a track votes for what shows the
    same thing as the square in which it starts."""
    yes: torch.Tensor           # exp(-2 d): d the squared distance of vectors, 0 beyond REACH
    counts: torch.Tensor        # 1.0 where d is below 2 SAME, else 0


def votes_of(embedding, start, height, width):
    """The Votes of tracks. embedding (B, E, rows, columns) of frame 0, from a vae.Segmenter; start
    (B, N, 2) in pixels, NaN: votes for nothing."""
    rows, columns = embedding.shape[2:]
    known = start.isfinite().all(2)[..., None]                          # (B, N, 1)
    start = start.nan_to_num(0)
    x, y = (start / COPY_CELL).long().unbind(2)
    square = y.clamp(0, rows - 1) * columns + x.clamp(0, columns - 1)   # (B, N)
    squares = embedding.float().flatten(2).transpose(1, 2)              # (B, S, E)
    begins = squares.gather(1, square[..., None].expand(-1, -1, squares.shape[2]))
    difference = torch.cdist(begins, squares).square()                  # (B, N, S)
    place = square_centres(height, width, start.device).flatten(0, 1)
    within = torch.cdist(start, place.expand(len(start), -1, -1)) <= REACH
    yes = torch.exp(-2 * difference) * (within & known)
    return Votes(yes, (yes > math.exp(-4 * SAME)).float())


def votes_for_none(count):
    """The vote that a square belongs to no track: exp(-2 SAME) for each of `count` tracks that may
    own it, and at least one."""
    return count.clamp(min=1) * math.exp(-2 * SAME)


def log_odds(agree, disagree, count):
    """Log odds, within -SURE and SURE, of what `agree` votes for and `disagree` against; count: of
    those that agree, see votes_for_none. So a lone track's are 2 (SAME - d), and those of many in
    one place are the same."""
    return ((agree + 1e-10) / (disagree + votes_for_none(count))).log().clamp(-SURE, SURE)


def belonging(moves, visible, start, votes):
    """Log odds that a square of frame 0 moves as a track does: by the Votes of the visible tracks
    that move alike, or nearly so if they start far apart, against those of the others. So one that
    starts on the rim of another thing is outvoted.

    moves (B, T, N, 2) since frame 0, visible (B, T, N), start (B, N, 2). Returns (B, T, N, S)."""
    disagreement = torch.cdist(moves, moves)                            # (B, T, N, N)
    start = start.nan_to_num(0)
    tolerance = ALIKE + TURNS * torch.cdist(start, start)               # (B, N, N)
    seen = visible[:, :, None].float()
    alike = torch.exp(-(disagreement / tolerance[:, None]) ** 2) * seen
    yes = votes.yes[:, None]
    agree = alike @ yes
    disagree = (seen @ yes - agree).clamp(min=0)
    return log_odds(agree, disagree, alike @ votes.counts[:, None])


def left_behind(moves, visible, votes):
    """Log odds that what a square shows in frame 0 has moved by more than STAYS pixels:
    (B, T, S). moves (B, T, N, 2), visible (B, T, N)."""
    far = moves.norm(dim=-1) > STAYS
    has_moved = (visible & far).float()
    rests = (visible & ~far).float()
    return log_odds(has_moved @ votes.yes, rests @ votes.yes, has_moved @ votes.counts)


def mean_move(moves, visible, votes):
    """Mean displacement of the picture since frame 0, (B, T, 2): each square moves as its tracks
    vote, one without tracks rests. moves (B, T, N, 2), visible (B, T, N)."""
    seen = visible.float()
    weight = seen @ votes.yes + votes_for_none(seen @ votes.counts)     # (B, T, S)
    total = (seen[..., None] * moves).transpose(2, 3) @ votes.yes[:, None]      # (B, T, 2, S)
    return (total / weight[:, :, None]).mean(3)


def belonging_at(places, index, odds):
    """Log odds, interpolated, that places of frame 0 belong to the tracks with these numbers:
    places (B, T, rows, columns, near, 2) in pixels, index without the last; odds
    (B, T, N, S). Returns a tensor like index, -SURE outside the picture."""
    rows, columns = index.shape[2:4]
    volume = odds.unflatten(3, (rows, columns)).flatten(0, 1)           # (B T, N, rows, columns)
    size = torch.tensor([columns, rows], device=odds.device) * COPY_CELL
    across = 2 * places / size - 1                                      # the edges are -1 and 1
    depth = (2 * index + 1) / volume.shape[1] - 1                       # of slice `index`
    grid = torch.cat([across, depth[..., None]], -1).flatten(0, 1)
    found = F.grid_sample(volume[:, None], grid, padding_mode="border", align_corners=False)
    outside = (across.abs() > 1).any(-1)
    return found.view(index.shape).masked_fill(outside, -SURE)


@dataclass
class Ways:
    """Where the squares of frames come from; (B, T, rows, columns) each, but for `back`."""
    back: torch.Tensor          # displacement back to frame 0, (B, T, rows, columns, 2); 0: rests
    distance: torch.Tensor      # in pixels, of the track that a square follows; infinite: of none
    belongs: torch.Tensor       # log odds that what it brings belongs to it; -SURE: follows none
    unlike: torch.Tensor        # pixels by which it moves unlike the rest of the picture
    gone: torch.Tensor          # log odds that what the square shows in frame 0 has left it


def way_back(tracks, visible, start, votes, height, width):
    """The Ways of squares of COPY_CELL pixels: each follows one of the NEIGHBOURS nearest visible
    tracks, and those whose motion agrees with it, so that rotation and zoom are smooth. The track
    that is followed is within REACH; it brings what belongs to it, if one of them does; and it is
    the nearest, where what moves unlike the rest of the picture counts as nearer: where two things
    meet, it is taken to be in front. A square whose source would lie outside the picture follows
    none.

    tracks (B, T, N, 2), N > 0, visible (B, T, N); start (B, N, 2): positions in frame 0; votes:
    their Votes."""
    moves = moves_since(tracks, start).masked_fill(~visible[..., None], 0)      # wherever they are
    odds = belonging(moves, visible, start, votes)
    mean = mean_move(moves, visible, votes)
    place = square_centres(height, width, tracks.device)
    place = place.expand(*tracks.shape[:2], -1, -1, -1)
    index, distances = nearest_points(place, tracks, visible, NEIGHBOURS)
    near_moves = values_of(index, moves)                        # (B, T, rows, columns, near, 2)
    brought = belonging_at(place[..., None, :] - near_moves, index, odds)
    unlikes = (near_moves - mean[:, :, None, None, None]).norm(dim=-1)
    rank = distances - unlikes.clamp(max=AHEAD) + FAR * (brought < 0)
    rank = rank.masked_fill(distances > REACH, math.inf)
    followed = rank.argmin(4, keepdim=True)     # the lowest rank, (B, T, rows, columns, 1)

    distance = distances.gather(4, followed)
    farther = (distances - distance).clamp(min=0)
    its_move = near_moves.gather(4, followed[..., None].expand(*followed.shape, 2))
    disagreement = (near_moves - its_move).norm(dim=-1)
    weight = torch.exp(-farther / BESIDE - (disagreement / ALIKE) ** 2)
    weight = weight.nan_to_num(0)                                       # infinity minus infinity
    move = (weight[..., None] * near_moves).sum(4) / weight.sum(4, keepdim=True).clamp(min=1e-6)

    none = (distance[..., 0] > REACH) | from_outside(-move, height, width)
    return Ways(
        back=-move.masked_fill(none[..., None], 0),
        distance=distance[..., 0].masked_fill(none, math.inf),
        belongs=brought.gather(4, followed)[..., 0].masked_fill(none, -SURE),
        unlike=unlikes.gather(4, followed)[..., 0].masked_fill(none, 0),
        gone=left_behind(moves, visible, votes).unflatten(2, none.shape[2:]))


def warp(frame_0, back):
    """Backward warp: each square of frame t samples frame_0, bilinearly, at its own place plus
    `back`. (B, 3, H, W) and (B, T, rows, columns, 2) from way_back to (B, 3, T, H, W)."""
    B, _, H, W = frame_0.shape
    T = back.shape[1]
    back = back.repeat_interleave(COPY_CELL, 2)
    back = back.repeat_interleave(COPY_CELL, 3)                         # per pixel: (B, T, H, W, 2)
    x = torch.arange(W, device=frame_0.device) + 0.5 + back[..., 0]
    y = torch.arange(H, device=frame_0.device)[:, None] + 0.5 + back[..., 1]
    source = torch.stack([2 * x / W - 1, 2 * y / H - 1], -1)            # the edges are -1 and 1
    # one tall grid for all frames: the image is not repeated
    video = F.grid_sample(frame_0, source.flatten(1, 2), padding_mode="border", align_corners=False)
    return video.unflatten(2, (T, H))                                   # (B, 3, T, H, W)


def fill_in(video, known):
    """Video (B, 3, T, H, W) with its unknown pixels filled in smoothly from the known ones around
    them, each frame for itself: pull-push interpolation (Gortler et al. 1996, section 4.3). known
    (B, 1, T, H, W) in [0, 1], a weight, more than 0 somewhere in every frame."""
    B, _, T, H, W = video.shape
    frames = (video * known).transpose(1, 2).flatten(0, 1)              # (B T, 3, H, W)
    weight = known.transpose(1, 2).flatten(0, 1)
    levels = []
    while min(frames.shape[2:]) > 1:
        levels.append((frames, weight))
        total = 4 * F.avg_pool2d(weight, 2, ceil_mode=True)             # of 2x2 pixels
        scale = total.clamp(max=1) / total.clamp(min=1e-9)              # weights stay at most 1
        frames = 4 * F.avg_pool2d(frames, 2, ceil_mode=True) * scale
        weight = total.clamp(max=1)
    filled = frames.sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp(min=1e-9)
    for frames, weight in reversed(levels):
        coarse = F.interpolate(filled, size=frames.shape[2:], mode="bilinear", align_corners=False)
        filled = frames + (1 - weight) * coarse
    return filled.unflatten(0, (B, T)).transpose(1, 2)


def how_known(missing, in_front):
    """Weights for fill_in, from shares of pixels (B, 1, T, H, W): 1 where the ground is seen, next
    to nothing in and around holes, and 0.001 on what moves unlike the mean: that is in front of the
    ground, or the camera turns or zooms, and then it counts, as no ground is near."""
    side = COPY_CELL + 1                        # the rims of holes and things are not ground yet
    around = (1, side, side)
    by = (0, side // 2, side // 2)
    hole = F.max_pool3d((missing > 0.5).float(), around, 1, by)
    thing = F.max_pool3d((in_front > 0.5).float(), around, 1, by)
    return (1 - 0.999 * thing) * (1 - hole) + 1e-6


def per_pixel(squares):
    """Values of squares (B, T, rows, columns), interpolated: (B, 1, T, H, W)."""
    pixels = F.interpolate(squares, scale_factor=COPY_CELL, mode="bilinear", align_corners=False)
    return pixels[:, None]


def moved_picture(embedding, frame_0, tracks, visible, start):
    """Frame 0 as the tracks move it: on top what belongs to tracks, at its new place; below, frame
    0 itself, where what has moved away is filled in from the ground around it, since the image does
    not show what was behind.

    embedding (B, E, rows, columns) of frame_0 (B, 3, H, W) in [-1, 1]; tracks (B, T, N, 2) and
    visible (B, T, N); start (B, N, 2): positions in frame 0, NaN: copies nothing. Returns the video
    (B, 3, T, H, W) and signals (B, SIGNALS, T, rows, columns), each in [0, 1]:

        2   nearness of the track that a square follows: exp(-d / 8), exp(-d / 32), see NEAR
        1   probability that what it brings belongs to it
        1   probability that what frame 0 shows there has gone elsewhere
        2   how much of the square is moved, and how much is filled in"""
    H, W = frame_0.shape[2:]
    visible = visible & start.isfinite().all(2)[:, None]
    tracks = F.pad(tracks, (0, 0, 0, 1))        # one more track, never visible, so that N = 0
    visible = F.pad(visible, (0, 1))            # is no special case
    start = F.pad(start, (0, 0, 0, 1), value=math.nan)
    votes = votes_of(embedding, start, H, W)
    ways = way_back(tracks, visible, start, votes, H, W)
    warped = warp(frame_0, ways.back)
    moved = torch.sigmoid(per_pixel(ways.belongs) + THING_WIDER)        # (B, 1, T, H, W)
    hole = torch.sigmoid(per_pixel(ways.gone) + HOLE_WIDER)
    still = frame_0[:, :, None]
    in_front = moved * (per_pixel(ways.unlike) > STAYS)
    missing = (1 - moved) * hole
    ground = fill_in(still + moved * (warped - still), how_known(missing, in_front))
    below = still + hole * (ground - still)
    video = below + moved * (warped - below)

    signals = [torch.exp(-ways.distance / scale) for scale in NEAR]
    signals += [torch.sigmoid(ways.belongs), torch.sigmoid(ways.gone)]
    signals += [F.avg_pool2d(part[:, 0], COPY_CELL) for part in (moved, missing)]
    return video, torch.stack(signals, 1)


@torch.no_grad()
def copy_along_tracks(vae, frame_0, tracks, visible, start):
    """The `copies` input of a copying model, (B, C + SIGNALS, F, h, w): latents of frame 0 as the
    tracks move it, and signals of how far to trust them, see moved_picture, means over a latent's
    pixels.

    vae: one without memory between latents, and with a segmenter (LinearVAE). frame_0 (B, 3, H, W)
    in [-1, 1]: the image, itself unchanged. tracks (B, T, N, 2), visible (B, T, N); start
    (B, N, 2): positions in frame 0, see start_points; a track whose start is NaN, because it is not
    visible there, copies nothing. T % 4 == 1 starts a clip, T % 4 == 0 continues one: concatenated
    chunks equal the whole clip."""
    H, W = frame_0.shape[2:]
    B, T, N, _ = tracks.shape
    check_shape("frame_0", frame_0, (B, 3, H, W))
    check_shape("visible", visible, (B, T, N))
    check_shape("start", start, (B, N, 2))
    assert T % FRAMES < 2, f"tracks of {T} frames, expected 4 n + 1 to start a clip, 4 n later"
    assert hasattr(vae, "segmenter"), f"a {type(vae).__name__} has no segmenter, see LinearVAE"
    video, signals = moved_picture(vae.segmenter(frame_0), frame_0, tracks, visible, start)
    if T % FRAMES == 1:
        video[:, :, 0] = frame_0
        signals[:, :, 0] = torch.tensor(IN_FRAME_0, device=signals.device).view(-1, 1, 1)
        latents = vae.encode(video)
        # A latent's signals are means of four frames. Three copies of frame 0 precede it, as in the
        # VAE, so that the mean is frame 0's own; TrackHead averages nothing and leaves them empty.
        before = signals[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1)
        signals = torch.cat([before, signals], 2)
    else:
        # The VAE takes the first frame for frame 0 of a clip: prepend one, drop its latent.
        video = torch.cat([video[:, :, :1], video], 2)
        latents = vae.encode(video)[:, :, 1:]
    squares = vae.stride // COPY_CELL
    signals = F.avg_pool3d(signals, (FRAMES, squares, squares))     # (B, SIGNALS, F, h, w)
    return torch.cat([latents, signals], 1)


def channel_std(config, device):
    """config.latent_std as (1, C, 1, 1, 1) float32, which broadcasts over latents."""
    assert config.latent_std, "a copying model needs latent_std in its config, from its VAE"
    return torch.tensor(config.latent_std, device=device).view(1, -1, 1, 1, 1)


def linear_part(sigma, std):
    """The best linear estimate of the velocity from x_t, which needs no network: exact if latents
    are Gaussian, of mean 0 and standard deviation std (1, C, 1, 1, 1).

    sigma (B,) or (B, F). Returns the factor that turns x_t into the estimate, and the variance of
    x_t, (B, C, 1 or F, 1, 1) each."""
    sigma = per_frame(sigma).float()
    variance = (1 - sigma) ** 2 * std ** 2 + sigma ** 2
    factor = (sigma - (1 - sigma) * std ** 2) / variance
    return factor, variance


def with_linear_part(output, x_t, sigma, std, expected):
    """The velocity, from the output of a network whose input is x_t / sqrt(V):

        linear part about `expected` + std / sqrt(V) output

    V is the variance of x_t over all clips, where x0 has standard deviation std. So the network's
    input and target are about 1: the preconditioning of EDM (Karras et al. 2022, section 5), for
    rectified flow, per channel. The linear part assumes more, that x0 is close to `expected`, with
    standard deviation SPREAD std, so it keeps little of x_t. A wider Gaussian would let more of
    x_t's noise through than a network of width 192 can remove from tokens of 384 numbers.

    output, x_t (B, C, F, h, w); expected (B, C, F, h, w): an estimate of x0."""
    _, variance_overall = linear_part(sigma, std)                   # V
    factor, variance_nearby = linear_part(sigma, SPREAD * std)      # given `expected`
    # The estimate about `expected` is factor (x_t - (1 - sigma) expected) - expected. By the
    # definition of the factor, the terms in `expected` add up to -sigma / variance_nearby.
    linear = factor * x_t - per_frame(sigma).float() / variance_nearby * expected
    return linear + std / variance_overall.sqrt() * output


def sharpened(weights):
    """Weights of copies (B, n, F, h, w), counted as 0 to 1, squared, so that the largest counts for
    more: 0.7 and 0.3 become 0.84 and 0.16. What is drawn has what they leave of 1, squared too;
    all squares together are made to add up to 1.

    Returns the copies' new weights and a factor (B, 1, F, h, w) for what is drawn: its new weight
    over its old one, at most 1, as nothing is drawn more than it was."""
    shares = weights.clamp(0, 1)
    of_drawn = (1 - shares.sum(1, keepdim=True)).clamp(min=0)
    squares = shares.square()
    total = squares.sum(1, keepdim=True) + of_drawn.square()    # at least 1 / (n + 1)
    return squares / total, (of_drawn / total).clamp(max=1)


class CopyingMotionStream(MotionStream):
    """A MotionStream for a config with `copies`. Copies are input channels just before the image's;
    the head has two more outputs, cell by cell: the weights of the latents of frame 0 as the tracks
    move it, and of the image's own. The more weight the latter has, the less the network itself
    draws: what rests is not drawn again.

    A teacher is asked for the mean of all that could be there, so it may mix the two. A student's
    output is shown, where a mixture is a ghost: its weights are `sharpened`. So it draws nothing in
    cells whose two weights add up to 1 or more, and little where they nearly do."""

    def __init__(self, config):
        super().__init__(config)
        # A fresh teacher predicts 0.8 of the moved latents and 0.2 of the image's own. A student
        # begins with a teacher's weights: with these it would draw nothing.
        with torch.no_grad():
            bias = self.head.head.bias.view(math.prod(config.patch_size), -1)
            bias[:, -2] = 0.8
            bias[:, -1] = 0.2

    def forward(self, x, sigma, text=None, *, tracks=None, copies=None, image=None, **rest):
        """As in MotionStream, plus copies (B, copy_dim, F, h, w) from copy_along_tracks, None:
        zeros, nothing is copied. image (B, C, 1, h, w): the image's latent, see image_inputs."""
        c = self.config
        check_latents(c, x, sigma)
        std = channel_std(c, x.device)
        _, variance = linear_part(sigma, std)
        scaled = x / variance.sqrt()
        tracks = condition_or_zeros("tracks, see track_features:", tracks, c.track_dim, scaled)
        copied = condition_or_zeros("copies", copies, c.copy_dim, x)
        still = condition_or_zeros("image", image, c.out_dim, x[:, :, :1])
        still = still.expand_as(x)                      # the unmoved image, in every frame
        channels = torch.cat([scaled, tracks, copied, still], 1)
        output = self.transformer(channels, sigma, text, **rest)
        drawn, weights = output.split([c.out_dim, SHARES], 1)
        of_moved, of_still = weights.split(1, 1)
        gate = 1 - of_still.clamp(0, 1)
        if c.causal:
            weights_shown, kept = sharpened(weights)
            of_moved, of_still = weights_shown.split(1, 1)
            gate = kept * gate
        moved = copied[:, :c.out_dim]
        filled = copied[:, -1:]                         # the last signal of moved_picture
        still = still + filled * (moved - still)        # what has left is not shown there
        expected = of_moved * moved + of_still * still
        return with_linear_part(gate * drawn, x, sigma, std, expected)


# --------------------------------------------------------------------------------------------------
# A model of either kind, and its inputs for tracks.

def new_model(config):
    """A freshly initialised model."""
    if config.copies:
        return CopyingMotionStream(config)
    return MotionStream(config)


def motion_inputs(model, tracks, visible, ids, *, start=None, frame_0=None, vae=None):
    """The tracks of a clip or a chunk as keyword arguments of the model: {"tracks": …} from
    track_features; for a copying model also {"copies": …} from copy_along_tracks. Only copies need
    start (B, N, 2), frame_0, the image's pixels (B, 3, H, W), and vae."""
    inputs = {"tracks": track_features(model, tracks, visible, ids)}
    if model.config.copies:
        assert start is not None, "a copying model needs start, see start_points"
        assert frame_0 is not None and vae is not None, "a copying model needs frame_0 and vae"
        inputs["copies"] = copy_along_tracks(vae, frame_0, tracks, visible, start)
    return inputs


# --------------------------------------------------------------------------------------------------
# Files.

class UserError(ValueError):
    """An error that the user can fix: one line with the finding and the cure. Unprintable
    characters, as in the names of a damaged file, are escaped."""

    def __init__(self, text):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def reason_of(error):
    """The message of an exception on one line; its class name if there is none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def extra(name, why=None):
    """The module extras/NAME.py. In a copy of the project that lacks it: UserError, if `why` says
    what needs it, else None."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as e:
        if e.name not in ("extras", f"extras.{name}"):          # a package that it needs
            raise
        if why is None:
            return None
        raise UserError(f"{why}: needs extras/{name}.py, which is missing from this copy") from None


@contextlib.contextmanager
def naming(source, cure):
    """Report any error about `source`, an outside input, as a one-line UserError: the cure and the
    exception's message, or the system's message (no such file, …)."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    except Exception as e:                          # damaged files raise many kinds
        number = getattr(e, "errno", None)
        if number == errno.EINVAL:                  # damaged zip files: "Invalid argument"
            raise UserError(f"{source}: {cure}") from None
        if number is not None:
            raise UserError(f"{source}: {reason_of(e)}") from None
        raise UserError(f"{source}: {cure} ({reason_of(e)})") from None


def write_file(path, save):
    """Call save(temporary path), then rename: the file is complete or absent. One-line
    OSError with its name if it cannot be written."""
    from safetensors import SafetensorError
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    room = ""
    try:
        free = shutil.disk_usage(path.parent).free
        room = f" ({free / 1e6:.0f} MB were free there)"    # torch does not name a full disk
        save(temporary)
        with open(temporary, "r+b") as file:    # Windows syncs only files open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise OSError(f"{path}: cannot be written: {reason_of(e)}{room}") from e
    finally:
        with contextlib.suppress(OSError):      # the folder may be gone
            temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Weights: safetensors with Wan's names, one file or an index of shards. extras/checkpoints.py reads
# all other public layouts, says what a wrong file is, and checks the config in a file before
# anything is built. A copy without it trusts that config.

WAN_DIT = ("blocks.0.self_attn.q.weight",)      # the first tensor of a DiT, by Wan's name
WAN_FILES = ("diffusion_pytorch_model.safetensors.index.json",
             "diffusion_pytorch_model.safetensors")

# Parameters that are always float32; "head." matches the track head too, whose input is float32.
FLOAT32 = r"time_embedding|time_projection|modulation|norm3|head\."


def read_weights(path, wanted="Wan DiT", marks=WAN_DIT, names=WAN_FILES):
    """Read a file, an index of shards, or the first of `names` in a folder: ({Wan's name: tensor},
    metadata, path of the file or index). Tensors are memory-mapped.

    wanted: the expected kind, for messages; marks: tensor names, one of which such a file has.
    UserError, one line, if it is something else or damaged."""
    file = Path(path)
    for name in names:
        if (file / name).is_file():
            file = file / name
    problem = f"it has no tensor {marks[-1]}"
    try:
        shards = [file.name]
        if file.suffix == ".json":
            shards = set(json.loads(file.read_bytes())["weight_map"].values())
        elif "-of-" in file.name:
            raise ValueError("one of several shards")
        elif file.is_dir():
            raise ValueError(f"holds no {names[-1]}")
        tensors, metadata = read_safetensors([file.with_name(shard) for shard in shards])
        if not tensors.keys().isdisjoint(marks):
            return tensors, metadata, file
    except Exception as e:                      # another layout, or damaged
        problem = reason_of(e)
    why = f"{file}: {problem}, which may mean another layout"
    return extra("checkpoints", why).read(file, wanted, marks)


def read_safetensors(paths):
    """Read .safetensors files: ({name: tensor}, {key: text} of their metadata)."""
    from safetensors import safe_open
    tensors = {}
    metadata = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
            metadata |= file.metadata() or {}
    return tensors, metadata


def as_tuples(value):
    """Lists from JSON to tuples, at any depth."""
    if isinstance(value, list):
        return tuple(map(as_tuples, value))
    if isinstance(value, dict):
        return {name: as_tuples(each) for name, each in value.items()}
    return value


def saved_config(cls, metadata, file):
    """The dataclass stored as JSON in a file's metadata. UserError if unreadable."""
    with naming(file, "the config in it cannot be read"):
        fields = as_tuples(json.loads(metadata["config"]))
        unknown = fields.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise UserError(f"the config in it has an unknown field, {min(unknown)[:80]}")
        return cls(**fields)


def public_config(tensors, file):
    """Infer the config of public weights, which store none, from tensor shapes. The number of
    latent channels tells Wan 2.2 5B from the Wan 2.1 family; head_dim is 128 in both. clean_first
    is set for 5B, and where no other input takes the image. UserError if the tensors are not those
    of a complete DiT."""
    with naming(file, "expected a complete Wan DiT checkpoint"):
        weight = tensors["patch_embedding.weight"]
        assert weight.ndim == 5, f"patch_embedding.weight is {tuple(weight.shape)}"
        dim, in_dim, *patch_size = weight.shape
        out_dim = len(tensors["head.head.weight"]) // math.prod(patch_size)
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
        family = PRESETS["wan2.1-1.3b"]                 # for the VAE's stride, size and fps
        if out_dim == PRESETS["wan2.2-5b"].out_dim:
            family = PRESETS["wan2.2-5b"]
        config = replace(
            family,
            dim=dim,
            ffn_dim=len(tensors["blocks.0.ffn.0.weight"]),
            num_heads=dim // family.head_dim,
            num_layers=len(blocks),
            in_dim=in_dim,
            out_dim=out_dim,
            track_dim=len(tensors.get("track_head.conv.weight", ())),
            text_dim=tensors["text_embedding.0.weight"].numel() // dim,     # (D, text_dim)
            clip_dim=len(tensors.get("img_emb.proj.0.weight", ())),
            freq_dim=tensors["time_embedding.0.weight"].numel() // dim,     # (D, freq_dim)
            patch_size=tuple(patch_size))
    return replace(config, clean_first=family is PRESETS["wan2.2-5b"] or config.image_dim == 0)


def open_pretrained(cls, path, overrides):
    """The part of from_pretrained that allocates no memory: (the model, its weights still mapped;
    the file's metadata)."""
    tensors, metadata, file = read_weights(path)
    why = None
    if metadata.get("format") == "motionstream":
        config = saved_config(Config, metadata, file)
    else:
        config = public_config(tensors, file)
        config_file = file.with_name("config.json")
        if config_file.is_file() and b'"WanModel"' not in config_file.read_bytes():
            why = f"{file}: its config.json is not of Wan's own WanModel"
    checkpoints = extra("checkpoints", why)
    if checkpoints is None:
        config = replace(config, **overrides)
    else:
        config = checkpoints.checked_config(config, overrides, tensors, metadata, file)
    make = new_model if cls is MotionStream else cls
    return build(make, config, tensors, file), metadata


def build(make, config, tensors, file):
    """make(config), a model, with a file's tensors as its weights, which stay mapped. UserError,
    naming the file, unless the tensors are floats with the names and shapes of the model's."""
    with naming(file, "no model can be built from its config"), torch.device("meta"):
        model = make(config)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{file}: {name} is {tensor.dtype}; int8, fp8 and fp8 scaled weights "
                            "are not supported, take this model's file in bfloat16 or float16")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:                   # torch's message, one line per kind of difference
        faults = [line.strip()[:200] for line in str(e).splitlines()[1:]]
        raise UserError(f"{file}: not a complete {type(model).__name__}; "
                        f"{' '.join(faults)[:400]}") from None
    return model


def copy_weights(model, path, dtype, device="cpu"):
    """Copy the mapped weights of a model into memory, in dtype, or in float32 if their names match
    FLOAT32. Puts the model into eval mode, without gradients. Weights are copied one by one, so
    that memory never holds two full copies; the file may change or go later. UserError, naming the
    file, for NaN or lack of memory."""
    model.eval().requires_grad_(False)
    weights = model.state_dict(keep_vars=True)
    dtypes = {}
    needed = 0
    for name, weight in weights.items():
        dtypes[name] = torch.float32 if re.search(FLOAT32, name) else dtype
        needed += weight.numel() * dtypes[name].itemsize
    checkpoints = extra("checkpoints")
    if checkpoints is not None:         # a copy without extras/ finds out by failing
        checkpoints.check_memory(needed, path, device)
    for name, weight in weights.items():
        with naming(path, f"{name} cannot be copied to {device}"):
            extremes = torch.stack(weight.aminmax())    # 20 times as fast as weight.isfinite()
            if not extremes.isfinite().all():
                raise UserError(f"{name} holds NaN or infinity")
            weight.data = weight.to(device, dtypes[name], copy=True)
    return model


def save_pretrained(model, path, dtype=None, **texts):
    """Write one .safetensors file with Wan's names, atomically. from_pretrained reads it, and so do
    other tools for Wan if the model has no track head. The metadata hold the config and `texts`.
    dtype=None keeps the model's."""
    from safetensors.torch import save_file
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.to("cpu", dtype).contiguous()
    metadata = {"format": "motionstream", "config": json.dumps(asdict(model.config))} | texts
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata))
