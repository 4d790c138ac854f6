"""Train a tiny MotionStream from scratch on rendered video: every stage of the paper, in order.

    vae      a tiny video autoencoder
    teacher  bidirectional rectified flow, given the first frame, text and tracks
    causal   the student, chunk by chunk through the KV cache: regression on the truth on its own
             rollouts (tiny) or on the teacher's ODE trajectories (paper), see causal_from
    distill  Self-Forcing DMD: the student rolls out as it will at inference, teacher and critic
             score the result

    python train_distill.py                  all of it, resumed where it stopped
    python train_distill.py --smoke          a few updates of everything, to see it run
    python train_distill.py --stage teacher  one stage
    python train_distill.py --data FOLDER --vae FILE --weights DIR    your clips, Wan's weights
    torchrun --nproc-per-node 2 train_distill.py    in two processes

Everything is written under --out (runs/tiny): weights, checkpoints, stats.jsonl. Shapes are those
of motionstream.py. The paper is MotionStream, arXiv 2511.01266.

A data set is a folder of clips, one safetensors file each:

    video    uint8 (3, T, H, W)      pixels at the model's size, T = 1 + 4 (F - 1); or, encoded,
    latents  float16 (C, F, h, w)    as the model sees them; F = 1 is enough for the stage distill
    first    uint8 (3, H, W)         beside latents: frame 0, for copying models
    tracks   float32 (T', N, 2)      pixels, x first; T' >= T: tracks may outlast the frames
    visible  bool (T', N)
    group    int64 (N)               the track's object, whose first track is its centre;
                                     -1: the ground, or unknown
    text     float (L, text_dim)     not padded
    clip     float (257, clip_dim)   CLIP's features of frame 0, for weights with an image branch

extras/world.py renders such clips, python -m extras.clips makes them from your own videos.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import socket
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from sample import (Parser, Weights, embed_words, guidance, hold_signals, inspect, memory, number,
                    open_vae, reported)     # before torch: it sets how torch's threads wait

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from motionstream import (CLIP_ROWS, FRAMES, PRESETS, Config, MotionStream, UserError, add_noise,
                          cell_of, channel_std, chunk_sizes, euler, guided_velocity, image_inputs,
                          linear_part, motion_inputs, naming, new_model, reason_of, rollout,
                          save_pretrained, schedule, shift_sigma, split_conditions, start_points,
                          to_x0, track_ids, with_first, write_file)
from vae import LinearVAE

# --------------------------------------------------------------------------------------------------
# The losses: functions of tensors and networks, independent of the rest of this file.

def first_latent_of(config, x0):
    """The argument of with_first for clips x0 (B, C, F, h, w): their first latent frame,
    (B, C, 1, h, w); None for models that take it as channels instead."""
    return x0[:, :, :1] if config.clean_first else None


# Stage 2, the teacher.

def draw_sigma(batch, shift, p_pure_noise, p_uniform):
    """Noise levels (B,), shifted (appendix D). Before the shift a share p_uniform is uniform, like
    the sampler's and score_sigma's, the rest logit-normal [O]. A share p_pure_noise is 1."""
    normal = torch.randn(batch)
    chance = torch.rand(batch)
    uniform = torch.special.ndtr(normal)        # the normal's CDF: no extra random numbers
    sigma = torch.where(chance >= 1 - p_uniform, uniform, normal.sigmoid())
    sigma = shift_sigma(sigma, shift)
    return torch.where(chance < p_pure_noise, torch.ones(batch), sigma)


def flow_loss(model, x0, sigma, conditions, first_latent, cell_weight=1.0, channel_weight=1.0):
    """Rectified flow (appendix D): mean squared error of the velocity of x0 (B, C, F, h, w), noised
    to sigma (B,). first_latent (B, C, 1, h, w): the clean image, excluded from the loss; None: it
    is among the conditions. cell_weight (B, F, h, w), channel_weight (B, C, 1, 1, 1): weights of
    the error. (channel_weight depends on sigma alone, so the minimum is the same; cell_weight may
    know tracks that the conditions leave out, which draws the minimum towards what moves.)"""
    noise = torch.randn_like(x0)
    x_t, sigma_frames = with_first(add_noise(x0, noise, sigma), sigma, first_latent)
    velocity = model(x_t, sigma_frames, **conditions)
    error = (velocity - (noise - x0)).square() * channel_weight
    error = error.mean(1)                                       # (B, F, h, w)
    weight = torch.ones_like(error) * cell_weight
    if first_latent is not None:
        error = error[:, 1:]
        weight = weight[:, 1:]
    return (error * weight).sum() / weight.sum()


# Stage 3, causal initialisation (section 3.2): the student sees the past only through the cache.

def causal_loss(model, states, x0, past, conditions, context, channel_weight=1.0):
    """Regression through the KV cache (section 3.2): each chunk predicts its clean end, x0
    (B, C, F, h, w), from its own state at a random noise level and a cache of `context`
    (sink, window) over the chunks of `past`: x0, or x0 corrupted.

    states: one (B, C, F, h, w) per noise level of the model. channel_weight (1, C, 1, 1, 1):
    weights of the error."""
    sink, window = context
    caches = model.new_caches(sink=sink, window=window)
    sigmas = model.config.sigmas
    loss = 0.0
    stop = 0
    sizes = list(chunk_sizes(model.config, x0.shape[2]))
    for size, part in zip(sizes, split_conditions(conditions, sizes)):
        start = stop
        stop = start + size
        now = slice(start, stop)
        target = x0[:, :, now]
        step = int(torch.randint(0, len(sigmas), ()))
        sigma = torch.full((len(x0),), sigmas[step], device=x0.device)
        first_latent = None
        if start == 0:
            first_latent = first_latent_of(model.config, target)
        x_t, sigma_frames = with_first(states[step][:, :, now], sigma, first_latent)
        velocity = model(x_t, sigma_frames, caches=caches, **part)
        predicted = to_x0(x_t, velocity, sigma_frames)
        loss = loss + ((predicted - target).square() * channel_weight).sum()
        if stop == x0.shape[2]:         # no chunk would read it
            break
        with torch.no_grad():           # the clean pass is the only one that writes
            clean = torch.zeros_like(sigma_frames)
            model(past[:, :, now], clean, caches=caches, write=True, **part)
    return loss / x0.numel()


# Stage 4, Self-Forcing with distribution matching (eq. 3, 4). Generator: the student. Teacher: the
# real score, under guidance. Critic: the fake score, trained on the generator's current output.

def score_sigma(batch, shift, device):
    """Noise levels (B,) at which generator and critic are scored: uniform, shifted, clamped to
    [0.02, 0.98]. One distribution for both, as in CausVid and Self-Forcing (model/dmd.py): the
    critic is trained where it is queried."""
    return shift_sigma(torch.rand(batch, device=device), shift).clamp(0.02, 0.98)


@torch.no_grad()
def real_and_fake(x0, sigma, teacher, critic, conditions, first_latent):
    """Predictions of x0 by the teacher, under its config's guidance, and by the critic, both
    (B, C, F, h, w), from x0 noised to sigma (B,). first_latent: see dmd_loss."""
    noised = add_noise(x0, torch.randn_like(x0), sigma)
    x_t, sigma_frames = with_first(noised, sigma, first_latent)
    velocity = guided_velocity(teacher, x_t, sigma_frames, conditions, teacher.config.guidance)
    real = to_x0(x_t, velocity, sigma_frames)
    fake = to_x0(x_t, critic(x_t, sigma_frames, **conditions), sigma_frames)
    return real, fake


def dmd_loss(x0, teacher, critic, conditions, first_latent, shift, weight=1.0):
    """The generator's loss on its own latents x0 (B, C, F, h, w), eq. 3: its gradient is
    (fake - real) / mean |x0 - real|, from real_and_fake at one sigma per clip (DMD eq. 7, 8).
    first_latent (B, C, 1, h, w): the image, on which both agree, so that its gradient is zero;
    None: it is among the conditions. shift: of the noise levels, see score_sigma. weight: of clips
    or channels, broadcast over x0."""
    sigma = score_sigma(len(x0), shift, x0.device)
    real, fake = real_and_fake(x0, sigma, teacher, critic, conditions, first_latent)
    with torch.no_grad():
        distance = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        direction = (fake - real) / distance.clamp(min=1e-6)    # a perfect clip has distance 0
        target = x0 - direction
    return 0.5 * ((x0 - target).square() * weight).mean()


def critic_loss(x0, critic, conditions, first_latent, shift, channel_weight=lambda sigma: 1.0):
    """The critic's loss (eq. 4): rectified flow on the generator's own latents x0 (B, C, F, h, w),
    without guidance, at the noise levels of score_sigma. first_latent: see flow_loss.
    channel_weight: a function of sigma (B,) that returns flow_loss's."""
    sigma = score_sigma(len(x0), shift, x0.device)
    weight = channel_weight(sigma)
    return flow_loss(critic, x0.detach(), sigma, conditions, first_latent, channel_weight=weight)


# --------------------------------------------------------------------------------------------------
# The training settings. Sources: [P] the paper, [O] ours, found by trial on the tiny model.

@dataclass(frozen=True)
class Learning:
    """Optimizer settings of one network."""
    muon: float | None              # Muon's learning rate, for hidden matrices; None: AdamW for all
    adam: float                     # AdamW's learning rate, for the rest
    betas: tuple = (0.9, 0.99)      # of AdamW [O]
    ema: float = 0.0                # decay of the weights' moving average; 0: no average
    weight_decay: float = 0.01      # [O]
    clip_norm: float = 1.0          # largest gradient norm [O]
    warm_up: int = 20               # updates over which the learning rate rises [O]
    decay: float = 0.4              # last share of the updates, over which it falls to 0 [O]


@dataclass(frozen=True)
class Settings:
    """The training settings. The defaults are the tiny model's [O].

    A micro-step is a forward and backward pass over `batch` clips in one process. An update uses
    the mean gradient of STAGE_accumulate micro-steps, divided among the processes."""
    # data
    clip_frames: int = 45           # 12 latent frames, 4 chunks of 3
    batch: int = 4                  # clips per micro-step
    clips: int = 4096               # rendered for teacher and distillation
    trajectories: int = 480         # of the teacher, for the stage causal; see causal_from
    vae_clips: int = 256            # rendered for the vae
    vae_batch: int = 8              # crops per micro-step
    # length: updates, and micro-steps per update over all processes
    vae_updates: int = 400
    teacher_updates: int = 6000
    causal_updates: int = 800
    distill_updates: int = 1200     # critic updates
    vae_accumulate: int = 1
    teacher_accumulate: int = 1
    causal_accumulate: int = 1
    distill_accumulate: int = 1
    # optimizers
    vae: Learning = Learning(None, 3e-4)
    teacher: Learning = Learning(0.015, 3e-3, ema=0.99)
    causal: Learning = Learning(2e-3, 1e-3, ema=0.98)
    generator: Learning = Learning(1e-3, 1e-4, betas=(0.0, 0.99), ema=0.98)
    critic: Learning = Learning(2e-3, 2e-4, betas=(0.0, 0.99))
    # teacher
    dense_share: float = 0.25       # first share of the updates, which sees all tracks
    whole_every: int = 4            # every n-th update trains on whole clips,
    short_latents: int = 6          # the others on clips of so many latent frames, twice the batch
    p_pure_noise: float = 0.5       # share of clips at sigma 1, where only the conditions help
    p_uniform_sigma: float = 0.0    # share with sigma uniform before the shift, see draw_sigma
    track_weight: float = 4.0       # loss weight of cells that a track touches, minus 1
    p_no_text: float = 0.1          # share of clips with null text, for guidance (section 3.1)
    p_no_tracks: float = 0.1        # share of clips without tracks, likewise
    # choice of tracks
    track_what_moves: bool = True   # all that moves has at least one track, see user_tracks
    p_sparse: float = 0.5           # share of clips with few or no tracks, in batches without
                                    # object labels, see given_tracks
    # causal
    causal_from: str = "rollouts"   # or "trajectories" (the paper's), "clips": see CAUSAL_FROM
    corrupt_context: bool = True    # see corrupt_context; unused with rollouts
    # distill
    critic_steps: int = 5           # critic updates per generator update (appendix D) [P]
    rollout: int = 16               # chunks of the longest rollout, but at least a clip's
    neutral_long_rollouts: bool = True      # neutral text beyond a clip: its light has faded
    drawn_memory: bool = False      # draw each rollout's chunk, sink, window, see draw_rollout
    beta: float = 0.5               # clip weight is exp(reward / beta) (Reward Forcing, eq. 11)
    export_every: int = 0           # updates between exported weights, except the vae's; 0: none
    # distributed
    shard_gradients: bool = False   # reduce them every micro-step: less memory, more traffic
    # checkpoints
    checkpoint_minutes: float = 5   # between checkpoints; a signal also causes one
    # dry run
    tflops: float = 396             # TFLOP/s of a GPU: 40 % of an H100's 989 in bfloat16


TINY = Settings()

# For Wan's 1.3B weights: appendix D [P], unless noted otherwise.
PAPER = Settings(
    clip_frames=81,                 # section 4.1: 5 s at 16 frames a second
    batch=1,
    clips=0,                        # clips come from --data
    trajectories=4000,
    vae_clips=0,
    vae_updates=0,
    teacher_updates=4800,           # stage 1 of the teacher
    causal_updates=2000,
    distill_updates=400 * 5,        # 400 generator updates, as we read it
    teacher_accumulate=128,         # clips per update, as batch is 1
    causal_accumulate=128,
    distill_accumulate=64,
    teacher=Learning(None, 1e-5, ema=0.99),
    causal=Learning(None, 2e-6, ema=0.98),
    generator=Learning(None, 2e-6, betas=(0.0, 0.99), ema=0.98),
    critic=Learning(None, 4e-7, betas=(0.0, 0.99)),
    dense_share=1.0,                # stage 1: tracks do not pause
    whole_every=1,
    p_pure_noise=0.0,
    p_uniform_sigma=1.0,            # [O]: logit-normal draws put 1.8 % at sigma >= 0.98, where 6 of
                                    # 48 Euler steps, the student's first and 11 % of DMD's lie
    track_weight=0.0,
    track_what_moves=False,         # anything may move without a track
    p_sparse=0.5,                   # [O], except stage 1; the paper: 0, which never shows a drag
    causal_from="trajectories",
    corrupt_context=False,
    rollout=0,
    neutral_long_rollouts=False,
)

# Stage 2 of the teacher starts from stage 1's weights: tracks pause, the track head is frozen.
PAPER_STAGE_2 = replace(
    PAPER,
    teacher=replace(PAPER.teacher, adam=1e-6),
    teacher_updates=800,
    dense_share=0.0,
)

# The 5B model's second stage has clips of 121 frames (5 s at 24 fps) and 400 updates (appendix D).
# The same clip length in its first stage is ours.
PAPER_5B = replace(PAPER, clip_frames=121, shard_gradients=True)
PAPER_5B_STAGE_2 = replace(
    PAPER_STAGE_2,
    clip_frames=121,
    teacher_updates=400,
    shard_gradients=True,           # unsharded, two networks' gradients take 40 GB on every GPU
)

SMOKE = {"vae_updates": 4, "teacher_updates": 4, "causal_updates": 3, "distill_updates": 6,
         "vae_accumulate": 1, "teacher_accumulate": 1, "causal_accumulate": 1,
         "distill_accumulate": 1, "vae_clips": 8, "clips": 16, "trajectories": 8}

# Updates between measurements by extras/watch.py.
REPORT_EVERY = {"teacher": 200, "distill": 50}

# Settings that may differ on resuming: they do not change what a stage learns. (Loop adds the
# stage's own micro-steps per update.)
FREE = ("tflops", "checkpoint_minutes", "export_every", "shard_gradients",
        "vae_accumulate", "teacher_accumulate", "causal_accumulate", "distill_accumulate")

NEUTRAL = PRESETS["tiny"].prompt
WEIGHTS = {"vae": "vae", "teacher": "teacher", "causal": "causal", "distill": "student"}
PREREQUISITES = {"vae": (), "teacher": ("vae",), "causal": ("vae", "teacher"),
                 "distill": ("vae", "teacher", "causal"), "decoder": ("vae",)}


def video_frames(latents):
    """Number of video frames in a clip of `latents` latent frames."""
    return 1 + FRAMES * (latents - 1)


@dataclass(frozen=True)
class Run:
    """A training run, fully resolved from the flags and the weights they name; see `resolve`."""
    out: Path                       # output folder
    seed: int
    device: str
    dtype: torch.dtype              # of matrix products, see compute_dtype; may differ on resuming
    config: Config                  # of the model and its sampling
    settings: Settings
    files: dict                     # {name: path} of vae, teacher, causal, student, start
    data: Path | None = None        # folder of clips; None: clips are rendered
    start: object = None            # contents of --weights, see sample.inspect
    reward: object = None           # function of a video and its conditions; returns (B,)
    checkpointing: bool = False     # see MotionStream.recompute
    network: object = new_model     # builds a new teacher from its config

    @property
    def clip_latents(self):
        return (self.settings.clip_frames + FRAMES - 1) // FRAMES

    @property
    def clip_chunks(self):
        return len(list(chunk_sizes(self.config, self.clip_latents)))

    @property
    def longest_rollout(self):
        """Length of the longest rollout, in chunks."""
        return max(self.settings.rollout, self.clip_chunks)

    def latents_of(self, chunks):
        """Latent frames of a rollout of `chunks` chunks, at least a clip's."""
        return self.clip_latents + (chunks - self.clip_chunks) * self.config.chunk

    @property
    def track_frames(self):
        """Video frames that every clip's tracks must cover: a clip's or the longest rollout's."""
        longest = video_frames(self.latents_of(self.longest_rollout))
        return max(self.settings.clip_frames, longest)

    @property
    def context(self):
        """The student's chunk and cache settings, {field of Config: value}."""
        names = ("chunk", "sink", "window", "sink_decay")
        return {name: getattr(self.config, name) for name in names}

    def path(self, name):
        return Path(self.files[name])

    def checksum(self, name):
        """Checksum of the tensors in a weights file, see content_digest."""
        return content_digest(self.path(name))

    def load(self, name, **overrides):
        """Load a trained MotionStream, in float32 and frozen. Sampling settings come from
        `config`, not from its file. overrides: further fields of Config."""
        names = ("shift", "sigmas", "steps", "guidance")
        fields = {each: getattr(self.config, each) for each in names} | overrides
        return MotionStream.from_pretrained(
            self.path(name), dtype=torch.float32, device=self.device, **fields)

    def load_vae(self):
        """Load the VAE of the latents."""
        model = Weights(self.out, self.config, own=True, has_head=True)
        return open_vae(model, self.path("vae")).to(self.device)

    def autocast(self):
        """Autocast to bfloat16, disabled if compute_dtype gives float32. No weight cache: before
        torch 2.11 it returns casts made without a graph to code that needs one."""
        kind = torch.device(self.device).type
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(kind, torch.bfloat16, enabled, cache_enabled=False)


# --------------------------------------------------------------------------------------------------
# Processes. torchrun starts this program PROCESSES times. The processes divide the micro-steps of
# an update, the preparation of clips and the parameters of every MotionStream (FSDP2).

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def default_device():
    """The GPU of this process, "cuda:0", or "cpu"."""
    return f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu"


SOON = timedelta(minutes=30)    # process 0 may write a checkpoint while the others wait
LATE = timedelta(hours=24)      # some may finish encoding long after others


def join_processes(device):
    """Join torchrun's process group, if there is one. device: None for default_device()."""
    if PROCESSES > 1:
        device = device or default_device()
        dist.init_process_group(timeout=SOON)
        dist.init_device_mesh(device.split(":")[0], (PROCESSES,))   # gloo, or nccl on a GPU


def mean_processes(tensor):
    """Average a tensor over the processes, in place, and return it. Collective."""
    if PROCESSES > 1:
        dist.all_reduce(tensor)
    return tensor.div_(PROCESSES)


def wait_for_all(timeout=SOON):
    """Wait until all processes get here. RuntimeError after `timeout`, naming a missing one."""
    if PROCESSES > 1:
        group = dist.new_group(backend="gloo", timeout=timeout)
        dist.monitored_barrier(group, timeout)
        dist.destroy_process_group(group)


def from_first(value):
    """Return process 0's `value` in all processes. Collective."""
    told = [value]
    if PROCESSES > 1:
        dist.broadcast_object_list(told)
    return told[0]


def shard(model):
    """Shard a MotionStream's parameters over the processes, in place; a VAE stays whole. A block's
    are gathered while it runs, all others while the model runs. They are gathered in float32,
    which autocast rounds as in one process."""
    if PROCESSES == 1 or not isinstance(model, MotionStream):
        return model
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (PROCESSES,))
    parts = list(model.blocks) + [model.track_head, model]
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)    # an EMA never runs a backward
    # Make the model the FSDP root: otherwise the first module to run, the track head, becomes it.
    fully_shard.state(model)._lazy_init()
    return model


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)     # in process 0; others get {}
SHARED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=PROCESSES > 1)


# --------------------------------------------------------------------------------------------------
# Learning: from a loss to an update.

def seed_of(*what):
    """A seed for torch from anything printable, the same in every process."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def generators(device):
    """Torch's default random generators: the CPU's and, on a GPU, the device's."""
    device = torch.device(device)
    if device.type != "cuda":
        return [torch.default_generator]
    return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]


def matmul_seconds(dtype):
    """Seconds of a matrix product of the tiny model's size (a clip's tokens times an FFN layer) on
    the CPU under autocast to `dtype`: the best of three; the first warms up the threads."""
    tokens = torch.zeros(768, 192)
    weight = torch.zeros(576, 192)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            F.linear(tokens, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@functools.cache
def cpu_dtype():
    """bfloat16 if the CPU is clearly faster in it, else float32: without AVX-512 or AMX, bfloat16
    is 10 times slower. The same in all processes; the first call is collective."""
    ratio = matmul_seconds(torch.bfloat16) / matmul_seconds(torch.float32)
    ratio = mean_processes(torch.tensor(ratio))
    return torch.bfloat16 if ratio < 0.8 else torch.float32


def compute_dtype(device):
    """Dtype of matrix products on a device ("cpu", "cuda:0")."""
    return cpu_dtype() if torch.device(device).type == "cpu" else torch.bfloat16


def orthogonal(matrix, dtype):
    """Approximate U V^T of a matrix U S V^T (rows, columns) by Newton-Schulz iteration in `dtype`:
    five steps bring all but tiny singular values between 0.7 and 1.2 (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)            # no singular value above 1
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with its constants, but also for convolution kernels, flattened to matrices
    (output, the rest), and in a given dtype: torch's is bfloat16, which is slow on many CPUs.
    Parameters may be DTensors of matrices."""

    def __init__(self, parameters, lr, weight_decay, dtype):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update by the orthogonalised Nesterov momentum of the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                self.step_of(p, group["lr"], group["momentum"], group["weight_decay"])

    def step_of(self, p, rate, momentum, weight_decay):
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"]
        average.lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(average, momentum)
        if isinstance(update, DTensor):
            update = update.full_tensor()       # gathered once; each process orthogonalises it all
        matrix = update.flatten(1)              # (rows, columns)
        rows, columns = matrix.shape
        update = orthogonal(matrix, self.dtype).reshape(update.shape)
        if isinstance(p, DTensor):
            update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(1 - rate * weight_decay)
        p.add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)


class Learner:
    """A network, its optimizers and the moving average (EMA) of its weights, all sharded, see
    `shard`. Call `backward` for each micro-step of an update, then `update`.

    how: Learning. updates: their total, for the learning rate's decay; 0: no decay. accumulate:
    micro-steps per update, over all processes. shard_gradients: see backward."""

    def __init__(self, name, model, how, updates=0, accumulate=1, shard_gradients=False):
        self.name = name
        self.how = how
        self.updates = updates
        self.accumulate = max(accumulate // PROCESSES, 1)       # per process
        self.shard_gradients = shard_gradients
        self.micro_steps = 0            # since the last update
        self.loss = 0.0                 # mean over these
        self.averaged = None
        self.average = None
        if how.ema:
            self.averaged = AveragedModel(model, multi_avg_fn=self.move_average)
            self.average = shard(self.averaged.module.requires_grad_(False))
        self.model = shard(model)
        self.sharded = isinstance(model, FSDPModule)
        self.optimizers = self.build_optimizers()

    def build_optimizers(self):
        """Muon for hidden matrices, AdamW for the rest."""
        hidden = []
        rest = []
        for name, p in self.model.named_parameters():
            inner = name.startswith(("blocks.", "encoder.", "decoder."))
            matrix = inner and name.endswith("weight") and p.ndim > 1
            if p.requires_grad:
                group = hidden if matrix and self.how.muon else rest
                group.append(p)
        how = self.how
        optimizers = []
        if hidden:
            dtype = compute_dtype(hidden[0].device)
            optimizers.append(Muon(hidden, how.muon, how.weight_decay, dtype))
        adam = torch.optim.AdamW(rest, how.adam, how.betas, weight_decay=how.weight_decay)
        return optimizers + [adam]

    def backward(self, loss):
        """Accumulate the gradient of a micro-step's loss. The last micro-step of an update
        averages it over the processes; until then each keeps its own, unsharded. With
        shard_gradients every micro-step does, and each process keeps a shard."""
        self.micro_steps += 1
        if self.sharded:
            last = self.micro_steps == self.accumulate
            self.model.set_requires_gradient_sync(last or self.shard_gradients)
        loss = loss / self.accumulate
        loss.backward()
        self.loss += loss.detach()

    def update(self, number):
        """Clip the gradient, step the optimizers, update the average. number: index of this
        network's update, from 0. Returns the gradient norm before clipping. UserError, before any
        weight changes, if it is not finite."""
        norm = self.clip_gradient()
        if not norm.isfinite():
            raise UserError(f"{self.name}, update {number}: loss {self.loss.item()}, gradient norm "
                            f"{norm.item()}; stopped before anything moved")
        for optimizer in self.optimizers:
            full_rate = optimizer.defaults["lr"]
            optimizer.param_groups[0]["lr"] = full_rate * self.rate_factor(number)
            optimizer.step()
        self.model.zero_grad()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.micro_steps = 0
        self.loss = 0.0
        return norm

    def clip_gradient(self):
        """Average the gradient over the processes and clip its norm to how.clip_norm. Returns the
        norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.sharded:
            for p in parameters:
                mean_processes(p.grad)
        norm = nn.utils.clip_grad_norm_(parameters, self.how.clip_norm)
        return norm.full_tensor() if self.sharded else norm

    def rate_factor(self, number):
        """Factor on the learning rate at an update: warm-up, constant 1, decay."""
        factor = min(1.0, (number + 1) / self.how.warm_up)
        if self.updates:
            factor = min(factor, (self.updates - number) / (self.how.decay * self.updates))
        return factor

    def move_average(self, averages, weights, count):
        """multi_avg_fn after `count` updates. Early on it averages roughly the latest tenth of
        them, so that the initial weights are soon forgotten."""
        share = 1 - min(self.how.ema, int(count) / (int(count) + 10))
        torch._foreach_lerp_(averages, weights, share)

    def state_dict(self):
        """Full tensors on the CPU of process 0. Collective: all processes must call it."""
        state = {
            "model": get_model_state_dict(self.model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers, options=WHOLE),
        }
        if self.averaged is not None:
            state["average"] = get_model_state_dict(self.averaged, options=WHOLE)
        return state

    def load_state_dict(self, state):
        """Load what state_dict returned: `state` in process 0, {} in the others. Collective."""
        of_optimizers = state.get("optimizer", {})
        set_model_state_dict(self.model, state.get("model", {}), options=SHARED)
        set_optimizer_state_dict(self.model, self.optimizers, of_optimizers, options=SHARED)
        if self.averaged is not None:
            set_model_state_dict(self.averaged, state.get("average", {}), options=SHARED)


# --------------------------------------------------------------------------------------------------
# The loop of a stage, its log and its checkpoints.

def lock_folder(folder, file):
    """Lock a training's folder for this process until it ends, even by a crash. file: open file in
    the folder; holds the lock and names its owner. UserError if another process has it."""
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(2 ** 30)          # far past the text: others may read that
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder}: {file.read() or 'another'} is training into it; wait for its "
                        "end, or choose another --out") from None
    except OSError as e:                # some network disks cannot lock
        print(f"{folder}: cannot be locked ({e.strerror}); start no other training into it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


@contextlib.contextmanager
def own_folder(folder):
    """Create a training's folder, delete unfinished files and hold its lock. The processes of
    torchrun count as one training."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        if RANK == 0:
            lock_folder(folder, file)
            for path in folder.rglob(".*.part"):        # left by a killed motionstream.write_file
                if ".mp4." not in path.name:            # videos are another program's
                    path.unlink()
        wait_for_all()
        yield


def checkpoint_path(folder, stage, updates):
    """File of a stage's checkpoint after so many updates; names sort by updates."""
    return folder / f"{stage}.{updates:07}.checkpoint.pt"


def save_checkpoint(folder, stage, updates, settings, learners):
    """Write a checkpoint to a new file; keep the stage's newest two. Tensors are whole, so any
    number of processes can resume. Collective."""
    states = {learner.name: learner.state_dict() for learner in learners}
    if RANK > 0:
        return
    saved = {"updates": updates, "settings": settings, "learners": states}
    write_file(checkpoint_path(folder, stage, updates), functools.partial(torch.save, saved))
    for old in sorted(folder.glob(f"{stage}.*.checkpoint.pt"))[:-2]:
        old.unlink()


def read_checkpoint(path):
    """Read a file of save_checkpoint. Raises one of a dozen exception types if it is damaged: its
    checksums are tested here, as torch.load ignores them."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} is not as it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_checkpoint(folder, stage):
    """The newest undamaged checkpoint of a stage, see read_checkpoint; None without any. Damaged
    ones are reported and renamed; UserError if all are."""
    checkpoint = None
    damaged = []
    for path in sorted(folder.glob(f"{stage}.*.checkpoint.pt"), reverse=True):
        try:
            checkpoint = read_checkpoint(path)
            break
        except Exception as e:
            print(f"{path}: damaged ({reason_of(e)})")
            damaged.append(path)
    if damaged and checkpoint is None:
        raise UserError(f"{damaged[0]}: damaged, and no other checkpoint of the stage {stage} is "
                        "whole; put one back, or remove them to begin the stage again")
    for path in damaged:
        path.replace(path.with_suffix(".damaged"))
    return checkpoint


def differences(was, now):
    """Differences between a checkpoint's settings and the current ones, as texts."""
    changed = [name for name in was | now if was.get(name) != now.get(name)]
    return [f"{name} {was.get(name)}, now {now.get(name)}" for name in changed]


def load_checkpoint(folder, stage, settings, learners):
    """Load a stage's newest checkpoint, read by process 0, into the learners. Returns its number
    of updates; 0 without one. UserError if it is of other settings."""
    checkpoint = {"updates": 0, "settings": settings, "learners": {}}
    if RANK == 0:
        checkpoint = newest_checkpoint(folder, stage) or checkpoint
    updates = from_first(checkpoint["updates"])
    if updates == 0:
        return 0
    path = checkpoint_path(folder, stage, updates)
    changed = differences(checkpoint["settings"], settings)
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(f"{path}: is of other settings ({'; '.join(changed[:5])}{more}); choose "
                        "another --out or remove it")
    for learner in learners:
        with naming(path, f"of another {learner.name}"):
            learner.load_state_dict(checkpoint["learners"].get(learner.name, {}))
    if RANK == 0:
        print(f"{path.name}: resumed at update {updates}")
    return updates


def checkpoint_settings(run, stage):
    """Everything a stage's checkpoint depends on: resuming with other values would mix two
    trainings. Files are identified by their content, not by path or time."""
    digests = clip_digests(run) | weight_digests(run.files["start"])
    for name in PREREQUISITES[stage]:
        digests[name] = run.checksum(name)
    settings = {"seed": run.seed} | asdict(run.config) | asdict(run.settings)
    for name in FREE:
        settings.pop(name)
    for name, digest in digests.items():
        settings[f"checksum of {name}"] = digest
    return settings


def read_log(path):
    """Rows of a stats.jsonl, without a line that a crash cut off."""
    rows = []
    for line in open(path) if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def drop_rows(path, stage, begin):
    """Delete a stage's rows from update `begin` on: the checkpoint lacks these updates, so they
    are run and logged again."""
    text = ""
    for row in read_log(path):
        if row["stage"] != stage or row["step"] < begin:
            text += json.dumps(row) + "\n"
    write_file(path, lambda part: part.write_text(text))


class Loop:
    """The updates 0, 1, 2… of a stage: `for update in Loop(…)` resumes at the newest checkpoint.

    After each update it writes a log row and, if checkpoint_minutes have passed or a signal came,
    a checkpoint. Ctrl-C and SIGTERM exit after that, with 130 or 143."""

    def __init__(self, run, stage, updates, *learners):
        self.run = run
        self.stage = stage
        self.updates = updates
        self.learners = learners
        self.accumulate = learners[0].accumulate
        self.settings = {"updates": updates, "micro-steps an update": self.accumulate * PROCESSES}
        self.settings |= checkpoint_settings(run, stage)

    def __iter__(self):
        begin = load_checkpoint(self.run.out, self.stage, self.settings, self.learners)
        self.saved_at = time.time()
        file = os.devnull
        if RANK == 0:
            file = self.run.out / "stats.jsonl"
            drop_rows(file, self.stage, begin)
        with hold_signals() as stop, open(file, "a", buffering=1) as file:
            bar = tqdm(range(begin, self.updates), self.stage, disable=RANK > 0)
            for update in bar:
                self.update = update
                self.numbers = {}               # {name: [values logged]}
                self.random = {}                # {micro-step: generator states at its end}
                started = time.time()
                yield update
                means = {}
                for name, values in self.numbers.items():
                    means[name] = round(sum(values) / len(values), 5)
                bar.set_postfix(means)
                seconds = round(time.time() - started, 3)
                row = {"stage": self.stage, "step": update, **means, "seconds": seconds,
                       "dtype": str(self.run.dtype)[6:]}                        # after "torch."
                file.write(json.dumps(row) + "\n")
                self.save_if_due(stop)

    def micro_steps(self):
        """Yield this process's micro-steps of the update, numbered over all processes and updates.
        Each is seeded by (seed, stage, number), so resuming or another number of processes changes
        no draw. A second pass over them continues the random streams of the first."""
        end = (self.update + 1) * self.accumulate * PROCESSES
        begin = end - self.accumulate * PROCESSES
        sources = generators(self.run.device)
        for i in range(begin + RANK, end, PROCESSES):
            torch.manual_seed(seed_of(self.run.seed, self.stage, i))
            for source, state in zip(sources, self.random.get(i, [])):
                source.set_state(state)
            yield i
            self.random[i] = [source.get_state() for source in sources]

    def log(self, **numbers):
        """Record numbers; the log gets the mean of an update's micro-steps. None is skipped."""
        for name, value in numbers.items():
            if value is not None:
                value = torch.as_tensor(value).item()
                self.numbers.setdefault(name, []).append(value)

    def tell(self, **numbers):
        """Log numbers and print them above the progress bar."""
        self.log(**numbers)
        if RANK == 0:
            told = {name: round(float(value), 5) for name, value in numbers.items()}
            tqdm.write(f"{self.stage}: {json.dumps(told)}")

    def save_if_due(self, stop):
        """Write a checkpoint if due; exit if any process has a signal in `stop`. Collective."""
        done = self.update + 1
        minutes = (time.time() - self.saved_at) / 60
        due = minutes > self.run.settings.checkpoint_minutes or done == self.updates
        stopped, due = mean_processes(torch.tensor([len(stop) > 0, due]).float())
        if stopped or due:
            save_checkpoint(self.run.out, self.stage, done, self.settings, self.learners)
            self.saved_at = time.time()
        if stopped:
            wait_for_all()              # until process 0 has written
            if RANK == 0:
                tqdm.write(f"saved at update {done}; the same command goes on")
            signum = stop[0] if stop else 15            # SIGTERM, which another process got
            raise SystemExit(128 + signum)


def save_weights(path, model):
    """Write a stage's MotionStream in float16. Collective: returns when the file is there."""
    tensors = get_model_state_dict(model, options=WHOLE)
    if RANK == 0:
        with torch.device("meta"):
            plain = new_model(model.config)             # an unsharded one
        plain.load_state_dict(tensors, assign=True)
        save_pretrained(plain, path, torch.float16)
    wait_for_all()


def export_weights(run, name, model, update):
    """Write intermediate weights, NAME.UPDATE.safetensors, every export_every updates."""
    every = run.settings.export_every
    if every and update % every == 0:
        path = run.path(name)
        save_weights(path.with_name(f"{path.stem}.{update:05}.safetensors"), model)


# --------------------------------------------------------------------------------------------------
# Clips: a folder of files, and the batches drawn from it.

@dataclass(frozen=True)
class Batch:
    """Clips as inputs of the networks."""
    latents: torch.Tensor       # (B, C, F, h, w), float32
    conditions: dict            # inputs passed on as they are: text; image, clip if needed
    points: dict                # for motion_inputs: tracks (B, T, N, 2), visible, ids; start, image
    touched: torch.Tensor       # (B, F, h, w): 1 at and beside cells of objects or tracks

    def to(self, device):
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        points = {name: value.to(device) for name, value in self.points.items()}
        return Batch(self.latents.to(device), conditions, points, self.touched.to(device))


def walk(folder):
    """(The files in a folder and below it, sorted; messages on what was left out, and why.) Links
    are followed; a folder with several links to it, or in a cycle of links, counts once."""
    files = []
    left = []
    hidden = 0
    seen = {}                               # {real path: path by which it was reached}
    places = [folder]
    links = []
    while places or links:
        place = places.pop() if places else links.pop(0)    # real folders before links to them
        real = os.path.realpath(place)
        if real in seen:
            left.append(f"{place}: is a link to {seen[real]}, which counts already")
            continue
        seen[real] = place
        try:
            entries = sorted(place.iterdir())
        except OSError as e:
            left.append(f"{place}: {e.strerror}")
            continue
        for entry in entries:
            if entry.name.startswith("."):  # macOS puts ._a.mp4 beside a.mp4
                hidden += 1
            elif entry.is_dir() and entry.is_symlink():
                links.append(entry)
            elif entry.is_dir():
                places.append(entry)
            elif entry.is_file():
                files.append(entry)
            else:
                left.append(f"{entry}: is no file, or a link to none")
    if hidden:
        left.append(f"{folder}: {hidden} hidden files or folders, whose names begin with a dot")
    return sorted(files), left


def clip_files(folder):
    """The clips in a folder and those below it, see walk."""
    files, _ = walk(folder)
    return [file for file in files if file.suffix.lower() == ".safetensors"]


PIECES = 16             # read from a large tensor by content_digest
PIECE = 4096            # bytes


def tensor_places(file, size):
    """{"name dtype shape": (begin, end), its bytes in the file} of a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(min(length, size)))
    header.pop("__metadata__", None)
    places = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        places[f"{name} {about['dtype']} {about['shape']}"] = (8 + length + begin, 8 + length + end)
    return places


def content_digest(path):
    """Digest of a weights file's content, whatever its age, place or metadata: names, types,
    shapes, and all bytes of each tensor, or 16 evenly spaced pieces of a large one. That reads 14B
    parameters in seconds and misses only changes between the pieces. Files other than safetensors
    are treated as one tensor."""
    size = path.stat().st_size
    places = {f"{size} bytes": (0, size)}
    digest = 0
    with naming(path, "damaged"), open(path, "rb") as file:
        if path.suffix == ".safetensors":
            places = tensor_places(file, size)
        for about, (begin, end) in sorted(places.items()):
            digest = zlib.crc32(about.encode(), digest)
            begins = [begin]
            length = end - begin
            if length > PIECES * PIECE:
                length = PIECE
                last = end - PIECE
                begins = [begin + (last - begin) * i // (PIECES - 1) for i in range(PIECES)]
            for each in begins:
                file.seek(each)
                digest = zlib.crc32(file.read(length), digest)
    return digest


def weight_digests(path):
    """{name: digest} of the weights given by the user: a file, all of its shards, or a folder. {}
    for None."""
    if not path:
        return {}
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in (".safetensors", ".pt", ".pth")]
    elif "-of-" in path.name or path.suffix == ".json":
        from extras.checkpoints import shards_of
        files = shards_of(path)
    else:
        files = [path]
    if len(files) == 1:                 # independent of its name
        return {"--weights": content_digest(files[0])}
    return {f"--weights {file.name}": content_digest(file) for file in files}


def read_digests(folder, kept):
    """{name: digest} of the clips in a folder. The file `kept` caches them with sizes and times, so
    that only new clips are read."""
    before = {}
    if kept.exists():
        with contextlib.suppress(ValueError):       # damaged: read all again
            before = json.loads(kept.read_text())
    now = {}
    for file in tqdm(clip_files(folder), "look at clips", delay=5):
        about = file.stat()
        age = [about.st_size, about.st_mtime_ns]
        name = file.relative_to(folder).as_posix()
        known = before.get(name, [])
        if known[:2] != age:
            known = age + [content_digest(file)]
        now[name] = known
    if now != before:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, lambda part: part.write_text(json.dumps(now)))
    return {name: known[2] for name, known in now.items()}


def clip_digests(run):
    """{name: digest} of the clips of --data, read by process 0; {} without --data."""
    if not run.data:
        return {}
    digests = read_digests(run.data, run.out / "clips.json") if RANK == 0 else None
    wait_for_all(LATE)
    return from_first(digests)


def read_header(file):
    """({name: shape}, metadata) of a clip."""
    with naming(file, "damaged, or no clip; python -m extras.clips writes clips"):
        with safe_open(file, "pt") as clip:
            shapes = {name: tuple(clip.get_slice(name).get_shape()) for name in clip.keys()}
            return shapes, clip.metadata() or {}


def clip_latents(shapes):
    """Latent frames of a clip, encoded or not."""
    if "latents" in shapes:
        return shapes["latents"][1]
    return (shapes["video"][1] + FRAMES - 1) // FRAMES


def check_clip(file, shapes, config, track_frames):
    """UserError, one line, if a clip cannot train a model of `config`."""
    height, width = config.size
    h, w = config.latent_size
    expected = {"tracks": (None, None, 2), "visible": (None, None), "group": (None,),
                "text": (None, config.text_dim)}        # None: any
    if "latents" in shapes:
        expected["latents"] = (config.out_dim, None, h, w)
    else:
        expected["video"] = (3, None, height, width)
    if "latents" in shapes and config.copies:
        expected["first"] = (3, height, width)
    if config.clip_dim:
        expected["clip"] = (CLIP_ROWS, config.clip_dim)
    for name, shape in expected.items():
        found = shapes.get(name, ())
        fits = [side in (None, own) for own, side in zip(found, shape)]
        if len(found) != len(shape) or not all(fits):
            raise UserError(f"{file}: {name} is {found or 'missing'}, expected {shape}; see the "
                            "top of train_distill.py")
    if shapes["tracks"][0] < track_frames:
        raise UserError(f"{file}: has tracks for {shapes['tracks'][0]} frames but needs "
                        f"{track_frames}; extend them, or lower --rollout")
    if shapes["text"][0] > config.text_len:
        raise UserError(f"{file}: text of {shapes['text'][0]} rows, at most {config.text_len}")


def open_clips(folder, config, frames, track_frames):
    """Files of the clips in a folder with at least `frames` latents and tracks of `track_frames`
    video frames. UserError, one line, if a clip is invalid, or none is left."""
    files = clip_files(folder)
    long_enough = []
    for file in files:
        shapes, _ = read_header(file)
        check_clip(file, shapes, config, track_frames)
        if clip_latents(shapes) >= frames:
            long_enough.append(file)
    if not long_enough:
        raise UserError(f"{folder}: {len(files)} clips, none of {video_frames(frames)} frames")
    return long_enough


def write_clip(path, tensors):
    """Write a dict of tensors to a file, atomically. Creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    write_file(path, functools.partial(save_file, tensors))


def rendered_clips(run, name, count, encode=None):
    """Files of clips of the drawn world, rendered now or in an earlier run; only this function
    knows that world. encode: see encode_video; if given, clips hold latents instead of video."""
    from extras.world import write_clips
    made_by = run.checksum("vae") if encode else None
    settings = {
        "frames": run.settings.clip_frames,
        "track_frames": run.track_frames,
        "size": run.config.size[0],
        "seed": seed_of(run.seed, name),
        "text_dim": run.config.text_dim,
    }
    folder = run.out / f"{name}.{seed_of(made_by, settings):08x}"
    if RANK == 0:                       # one worker process per thread of torch
        write_clips(folder, count, encode=encode, workers=torch.get_num_threads(), **settings)
    wait_for_all(LATE)
    return sorted(folder.glob("*.safetensors"))[:count]


@torch.no_grad()
def encode_video(vae, video):
    """uint8 (3, T, H, W) to float16 (C, F, h, w)."""
    device = next(vae.parameters()).device
    video = video[None].to(device) / 127.5 - 1
    return vae.encode(video)[0].half().cpu()


def encode_clips(run, files):
    """Replace video by latents in clips, encoded now or in an earlier run, divided among the
    processes; the new names hold digests of the sources. Clips that already have latents are kept.
    UserError if those are of another VAE."""
    checksum = run.checksum("vae")                      # extras/clips.py stores it too
    folder = run.out / f"latents.{checksum:08x}"
    digests = clip_digests(run)
    made = []
    sources = {}
    for file in files:
        shapes, metadata = read_header(file)
        if "latents" not in shapes:
            name = file.relative_to(run.data)
            ending = f".{digests[name.as_posix()]:08x}.safetensors"
            path = folder / name.with_suffix(ending)
            sources[path] = file
            made.append(path)
        elif metadata.get("vae", str(checksum)) == str(checksum):
            made.append(file)
        else:
            raise UserError(f"{file}: its latents are of another VAE than {run.path('vae')}")
    missing = [path for path in sources if not path.exists()]
    vae = run.load_vae()
    for path in tqdm(missing[RANK::PROCESSES], "encode clips", disable=not missing):
        clip = load_file(sources[path])
        video = clip.pop("video")
        length = video_frames((video.shape[1] + FRAMES - 1) // FRAMES)
        clip["first"] = video[:, 0]
        clip["latents"] = encode_video(vae, video[:, :length])
        write_clip(path, clip)
    wait_for_all(LATE)
    return made


def training_clips(run, frames):
    """Files of encoded clips, of at least `frames` latents, for all stages but the first."""
    if run.data:
        files = open_clips(run.data, run.config, frames, run.track_frames)
        return encode_clips(run, files)
    encode = functools.partial(encode_video, run.load_vae().cpu())
    return rendered_clips(run, "clips", run.settings.clips, encode)


def read_clip(file, frames=None, track_frames=None):
    """Read the first `frames` latents of a clip and `track_frames` video frames of its tracks:
    {name: tensor}; None: all. The rest is not read from disk."""
    clip = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            tensor = opened.get_slice(name)
            if name == "latents":
                clip[name] = tensor[:, :frames]
            elif name in ("tracks", "visible"):
                clip[name] = tensor[:track_frames]
            elif name != "video":
                clip[name] = tensor[:]
    return clip


def stack(tensors, fill=0):
    """Stack tensors of clips to one (B, …), padded with `fill` to the longest along each axis."""
    lengths = zip(*[tensor.shape for tensor in tensors])
    shape = [len(tensors)] + list(map(max, lengths))
    batch = tensors[0].new_full(shape, fill)
    for row, tensor in zip(batch, tensors):
        row[tuple(slice(length) for length in tensor.shape)] = tensor
    return batch


def pick(files, count, frames=None, track_frames=None):
    """Random clips, {name: (count, …)}; see read_clip. Texts are padded with zeros, tracks with
    hidden ones."""
    chosen = torch.randint(0, len(files), (count,)).tolist()
    clips = [read_clip(files[i], frames, track_frames) for i in chosen]
    batch = {}
    for name in clips[0]:
        fill = -1 if name == "group" else 0
        batch[name] = stack([clip[name] for clip in clips], fill)
    return batch


def random_subset(mask, count, preference=0):
    """Keep `count` (B, 1) random true places of each row of a mask (B, N), or all if there are
    fewer. preference (B, N): added to the random order; lower values are kept first."""
    order = torch.rand(mask.shape) + preference + 9 * ~mask     # false places come last
    place = order.argsort(1).argsort(1)                         # rank in that order
    return mask & (place < count)


STILL = 2.0             # pixels; what moves no farther is at rest


def goes_anywhere(tracks, visible, mine):
    """True where an object (or the ground) moves, judged by its tracks: (B, 1). tracks
    (B, T, N, 2), visible (B, T, N); mine (B, N): which of them are its own."""
    away = tracks - start_points(tracks, visible)[:, None]
    away = away.norm(dim=-1).nan_to_num(0)                                  # (B, T, N)
    away = away.masked_fill(~(visible & mine[:, None]), 0)
    return away.amax((1, 2))[:, None] > STILL


def user_tracks(visible, group, tracks=None):
    """Visibility (B, T, N) of random ground-truth tracks such as a user might draw: from nothing or
    a single drag to the dense grid, some starting or ending midway, and in a fifth of the clips a
    pause of all of them (section 3.1). group (B, N): each track's object, its first track the
    centre; -1: the ground.

    tracks (B, T, N, 2), if given: every object that moves, and a moving ground, keep at least one
    track, which a pause or an early end may hide for a while. So a model learns that whatever has
    no track stays put; otherwise it would have to predict the mean of everything that could happen
    [O]."""
    B, T, N = visible.shape
    keep = torch.zeros(B, N, dtype=torch.bool)
    for thing in range(int(group.max()) + 1):
        mine = group == thing
        centre = mine & (mine.cumsum(1) == 1)
        count = torch.tensor([0, 1, 1, 2, 4, 8, 16, 16])[torch.randint(0, 8, (B, 1))]
        if tracks is not None:
            count = count.maximum(goes_anywhere(tracks, visible, mine).long())
        rather = -0.5 * torch.rand(B, 1) * centre               # prefer the centre
        keep |= random_subset(mine, count, rather)
    count = torch.tensor([0, 0, 1, 4, 9, 32, 64])[torch.randint(0, 7, (B, 1))]
    if tracks is not None:
        count = count.maximum(goes_anywhere(tracks, visible, group < 0).long())
    keep |= random_subset(group < 0, count)
    t = torch.arange(T)[:, None]
    ends = torch.randint(0, T, (2, B, 1, N)).sort(0).values
    whole = torch.rand(B, 1, N) >= 0.15
    shown = whole | (t >= ends[0]) & (t <= ends[1])             # (B, T, N)
    begin = torch.randint(1, T, (B, 1, 1))
    length = torch.randint(4, 17, (B, 1, 1))
    pause = (t >= begin) & (t < begin + length)                 # (B, T, 1)
    pause = pause & (torch.rand(B, 1, 1) < 0.2)
    return visible & keep[:, None] & shown & ~pause


def dense_subset(visible, pauses, config):
    """Visibility (B, T, N) of 1,000 to 2,500 ground-truth tracks, or all if fewer (section 4.1: a
    grid of 50x50). pauses: a fifth of the chunks after the first show none (section 3.1, appendix
    D)."""
    B, T, _ = visible.shape
    count = torch.randint(1000, 2501, (B, 1))
    keep = random_subset(visible.any(1), count)                 # (B, N)
    latent = (torch.arange(T) + FRAMES - 1) // FRAMES           # of each video frame
    first = config.first_chunk or config.chunk
    number = (latent - first) // config.chunk + 1               # of its chunk
    shown = (torch.rand(B, T, 1) >= 0.2 * pauses)[:, number]
    shown = shown | (number == 0)[:, None]                      # (B, T, 1)
    return visible & keep[:, None] & shown


def given_tracks(run, tracks, visible, group, dense):
    """Visibility (B, T, N) of the ground-truth tracks given to a model: all if `dense`, else chosen
    by user_tracks. In a batch without objects (group (B, N) all -1) dense_subset chooses or, unless
    `dense`, in a share p_sparse of the clips user_tracks: 0 to 64 tracks."""
    if not run.settings.track_what_moves:
        tracks = None
    if (group >= 0).any():
        return visible if dense else user_tracks(visible, group, tracks)
    many = dense_subset(visible, not dense, run.config)
    if dense:
        return many
    sparse = torch.rand(len(visible), 1, 1) < run.settings.p_sparse
    return torch.where(sparse, user_tracks(visible, group, tracks), many)


def touched_cells(tracks, visible, config):
    """Mask of the latent cells with a visible track of tracks (B, T, N, 2), and their neighbours:
    (B, F, h, w) of 0 and 1."""
    h, w = config.latent_size
    height, width = config.size
    cell = cell_of(tracks, config.stride, height, width)
    cell = cell.masked_fill(~visible, h * w)                    # hidden: past the last cell
    touched = torch.zeros(*cell.shape[:2], h * w + 1).scatter_(2, cell, 1.0)
    touched = touched[..., :-1]                                 # (B, T, h w)
    touched = F.pad(touched, (0, 0, FRAMES - 1, 0))             # as the VAE packs frame 0
    touched = touched.unflatten(1, (-1, FRAMES)).amax(2)        # (B, F, h w)
    return F.max_pool2d(touched.unflatten(2, (h, w)), 3, 1, 1)


def draw_batch(run, files, count, frames, *, dense=False, first_only=False):
    """A Batch of `count` random clips, with conditions for `frames` latents and the tracks of
    given_tracks. first_only: no latents but the image's."""
    config = run.config
    latents_read = 1 if first_only else frames
    clips = pick(files, count, latents_read, video_frames(frames))
    latents = clips["latents"].float()
    tracks = clips["tracks"]
    true = clips["visible"]
    on_object = clips["group"] >= 0                             # (B, N)
    visible = given_tracks(run, tracks, true, clips["group"], dense)
    conditions = {name: clips[name].float() for name in ("text", "clip") if name in clips}
    image, _ = image_inputs(config, latents[:, :, :1], frames)
    if image is not None:
        conditions["image"] = image
    points = {"tracks": tracks, "visible": visible, "ids": track_ids(tracks, config)}
    if config.copies:
        points["start"] = start_points(tracks, true)
        points["image"] = clips["first"].float() / 127.5 - 1
    counted = true & on_object[:, None] if on_object.any() else visible
    touched = touched_cells(tracks, counted, config)
    return Batch(latents, conditions, points, touched).to(run.device)


def latent_weight(vae, config, sigma):
    """Weight of squared velocity errors at sigma (B,) that turns them into errors of pixels and of
    the network behind linear_part: (B, C, 1, 1, 1); 1 for latents of unit variance."""
    if not config.latent_std:
        return 1.0
    _, variance = linear_part(sigma, channel_std(config, sigma.device))
    return variance * vae.pixel_weight().view(1, -1, 1, 1, 1) ** 2


# --------------------------------------------------------------------------------------------------
# Stage 1: the tiny VAE.

CROP = 64               # pixels per side
CROP_FRAMES = 17


def random_crop(files):
    """A crop of a clip's video: uint8 (3, 17, 64, 64), smaller if the clip is."""
    file = files[int(torch.randint(len(files), ()))]
    with safe_open(file, "pt") as clip:
        video = clip.get_slice("video")
        _, frames, height, width = video.get_shape()
        t = int(torch.randint(max(frames - CROP_FRAMES, 0) + 1, ()))
        y = int(torch.randint(max(height - CROP, 0) + 1, ()))
        x = int(torch.randint(max(width - CROP, 0) + 1, ()))
        return video[:, t:t + CROP_FRAMES, y:y + CROP, x:x + CROP]


def random_crops(files, count):
    """(count, 3, 17, 64, 64) in [-1, 1]: the most varied of three random crops each."""
    crops = []
    for _ in range(count):
        three = [random_crop(files) for _ in range(3)]
        crops.append(max(three, key=lambda crop: crop[:, ::8].float().var()))
    return torch.stack(crops).float() / 127.5 - 1


def principal_components(vae, videos):
    """Initialise a LinearVAE with the principal components of its cells, in the middle of its
    windows. Cells with more detail count more. videos: a list of (3, T, H, W) uint8; every 4 frames
    make cells."""
    side = vae.stride
    channels = vae.config.latent_channels
    moment = 0
    total = 0
    for video in videos:
        whole = video.shape[1] // FRAMES * FRAMES
        x = video[:, :whole].float() / 127.5 - 1
        x = x.unflatten(1, (-1, FRAMES)).unflatten(3, (-1, side)).unflatten(5, (-1, side))
        cells = x.permute(1, 3, 5, 0, 2, 4, 6)                  # (F, h, w, 3, 4, 8, 8)
        cells = cells.flatten(0, 2)                             # (F h w, 3, 4, 8, 8)
        spread = cells.flatten(2).var(2).mean(1)
        weight = (spread / 0.05).clamp(0.1, 5)
        flat = cells.flatten(1)                                 # (F h w, 768)
        moment = moment + (flat * weight[:, None]).T @ flat
        total = total + weight.sum()
    _, vectors = torch.linalg.eigh(moment / total)              # the largest are last
    basis = vectors.flip(1)[:, :channels].T.reshape(channels, 3 * FRAMES, side, side)
    overlap = vae.config.overlap
    inner = slice(overlap, overlap + side)
    with torch.no_grad():
        for layer in vae.encoder, vae.decoder:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[:, :, inner, inner] = basis


def normalise_latents(vae, videos):
    """Rescale the latent channels, folded into a LinearVAE's encoder and decoder, so that the RMS
    of each is proportional to the square root of its effect on pixels, clamped to [0.6, 2]: coarse
    channels, the first to emerge from noise, become larger. videos: a list of (3, T, H, W) uint8, T
    = 1 + 4 k."""
    with torch.no_grad():
        latents = [vae.encode(video[None].float() / 127.5 - 1) for video in videos]
        std = torch.cat(latents).square().mean((0, 2, 3, 4)).sqrt()
        worth = (std * vae.decoder.weight.flatten(1).norm(dim=1)).sqrt()
        wanted = (worth / worth.square().mean().sqrt()).clamp(0.6, 2)
        gain = wanted / std
        vae.encoder.bias *= gain
        vae.encoder.weight *= gain.view(-1, 1, 1, 1)
        vae.decoder.weight /= gain.view(-1, 1, 1, 1)
        vae.latent_std.copy_(wanted)


def psnr(a, b):
    """PSNR in dB between videos in [-1, 1]."""
    return -10 * torch.log10((a - b).square().mean() / 4 + 1e-10)


def reconstruction_error(output, video):
    """Mean squared error of the pixels of videos (B, 3, T, H, W), plus 0.1 times that of the
    differences between neighbouring pixels."""
    error = output - video
    pixels = error.square().mean()
    down = error.diff(dim=3).square().mean()
    across = error.diff(dim=4).square().mean()
    return pixels + 0.1 * (down + across)


def train_vae(run):
    """Stage 1: the linear VAE, initialised with principal components, by reconstruction alone."""
    s = run.settings
    if run.data:
        files = open_clips(run.data, run.config, run.clip_latents, run.track_frames)
    else:
        files = rendered_clips(run, "videos", s.vae_clips)
    videos = [load_file(file)["video"] for file in files[:64]]
    vae = LinearVAE().to(run.device)
    principal_components(vae, videos)
    learner = Learner("vae", vae, s.vae, s.vae_updates, s.vae_accumulate)
    loop = Loop(run, "vae", s.vae_updates, learner)
    for update in loop:
        for _ in loop.micro_steps():
            video = random_crops(files, s.vae_batch).to(run.device)
            output, _ = vae.decode_unclamped(vae.encode(video))
            loss = reconstruction_error(output, video)
            learner.backward(loss)
            loop.log(loss=loss, psnr=psnr(output, video))
        loop.log(grad=learner.update(update))
    whole = video_frames(run.clip_latents)
    normalise_latents(vae, [video[:, :whole].to(run.device) for video in videos])
    save_pretrained(vae, run.path("vae"), torch.float16, **vae.metadata())


# --------------------------------------------------------------------------------------------------
# Stage 2: the teacher.


def drop(conditions, share):
    """Zero all conditions, {name: (B, …)}, in a random share of the clips."""
    keep = torch.rand(len(next(iter(conditions.values())))) > share         # (B,)
    kept = {}
    for name, value in conditions.items():
        shape = [-1] + [1] * (value.ndim - 1)
        kept[name] = value * keep.view(shape).to(value.device)
    return kept


def find_watch():
    """Import extras/watch.py, whose numbers show early that a training goes wrong. In a copy
    without extras, print a line and return None."""
    try:
        from extras import watch
    except ImportError:
        if RANK == 0:
            print("extras/watch.py, which tells early that a training goes wrong, is not there")
        return None
    return watch


def starting_teacher(run, vae):
    """The model to be trained: new, for the latents of `vae`, or from --weights. A track head that
    comes with the weights is frozen."""
    config = run.config
    if config.copies:
        config = replace(config, latent_std=tuple(vae.latent_std.tolist()))
    if not run.start:
        return run.network(config).to(run.device)
    model = run.load("start", **vars(config)).requires_grad_(True)
    model.track_head.requires_grad_(not run.start.has_head)
    return model


def loss_of_teacher(run, model, vae, batch):
    """flow_loss on a Batch, with text and tracks dropped in some clips."""
    s = run.settings
    x0 = batch.latents
    sigma = draw_sigma(len(x0), run.config.shift, s.p_pure_noise, s.p_uniform_sigma)
    sigma = sigma.to(run.device)
    first_latent = first_latent_of(run.config, x0)
    cell_weight = 1 + s.track_weight * batch.touched
    with run.autocast():
        motion = drop(motion_inputs(model, **batch.points, vae=vae), s.p_no_tracks)
        text = drop({"text": batch.conditions["text"]}, s.p_no_text)
        conditions = batch.conditions | motion | text
        channel_weight = latent_weight(vae, model.config, sigma)
        return flow_loss(model, x0, sigma, conditions, first_latent, cell_weight, channel_weight)


def train_teacher(run):
    """Stage 2: rectified flow on whole and short clips, given the image, text and tracks.

    All tracks are given at first, as in the paper's first stage: the model then learns sooner what
    they mean. That shows early in extras/watch.py, but not in the flow loss."""
    s = run.settings
    files = training_clips(run, run.clip_latents)
    held_back = files[:max(len(files) // 20, 1)]
    files = files[len(files) // 20:]                # if fewer than 20, also train on that one
    vae = run.load_vae()
    model = starting_teacher(run, vae)
    model.recompute_blocks(run.checkpointing)
    learner = Learner("teacher", model, s.teacher, s.teacher_updates, s.teacher_accumulate,
                      s.shard_gradients)
    watch = find_watch()
    loop = Loop(run, "teacher", s.teacher_updates, learner)
    for update in loop:
        dense = update < int(s.dense_share * s.teacher_updates)
        if update % s.whole_every == 0:
            size = (s.batch, run.clip_latents)
        else:
            size = (2 * s.batch, s.short_latents)
        for _ in loop.micro_steps():
            batch = draw_batch(run, files, *size, dense=dense)
            loss = loss_of_teacher(run, model, vae, batch)
            learner.backward(loss)
            loop.log(loss=loss)
        loop.log(grad=learner.update(update))
        export_weights(run, "teacher", learner.average, update + 1)
        if watch and (update + 1) % REPORT_EVERY["teacher"] == 0:
            loop.tell(**watch.teacher_errors(run, learner.average, vae, held_back))
    save_weights(run.path("teacher"), learner.average)


# --------------------------------------------------------------------------------------------------
# Stage 3: causal initialisation, see causal_loss.

CONTEXTS = ((0, 1), (1, 0), (2, 1), (1, 2), (1, None))  # (sink, window), besides the model's own


@torch.no_grad()
def teacher_trajectories(run, teacher, vae, batch):
    """ODE trajectories of the guided teacher: the states at the student's noise levels, then the
    clean end, (B, levels + 1, C, F, h, w)."""
    wanted = run.config.sigmas + (0.0,)
    noise = torch.randn_like(batch.latents)
    with run.autocast():
        conditions = batch.conditions | motion_inputs(teacher, **batch.points, vae=vae)
        trajectory = euler(teacher, noise, conditions, first_latent_of(run.config, batch.latents))
        states = [x_t for x_t, sigma in trajectory if sigma in wanted]
    assert len(states) == len(wanted), (
        f"{len(states) - 1} of {run.config.sigmas} lie on the teacher's schedule")
    return torch.stack(states, 1)


def make_trajectories(run, files):
    """Files of one trajectory and its conditions each, made now or in an earlier run, divided
    among the processes. The folder's name holds a digest of their sources."""
    s = run.settings
    each = 2 * s.batch
    weights = [run.checksum("vae"), run.checksum("teacher")]
    source = weights + [clip_digests(run), run.seed, each, s.p_sparse, s.track_what_moves]
    folder = run.out / f"trajectories.{seed_of(source, run.config, s.clip_frames):08x}"
    count = math.ceil(s.trajectories / each) * each
    made = [folder / f"{i:07}.safetensors" for i in range(count)]
    starts = range(0, len(made), each)
    missing = [i for i in starts if not made[i + each - 1].exists()]
    teacher = run.load("teacher")
    vae = run.load_vae()
    for start in tqdm(missing[RANK::PROCESSES], f"trajectories, by {each}", disable=not missing):
        torch.manual_seed(seed_of(run.seed, "trajectories", start))
        batch = draw_batch(run, files, each, run.clip_latents)
        clips = {"states": teacher_trajectories(run, teacher, vae, batch).half()}
        clips |= batch.conditions
        clips |= {f"points.{name}": value for name, value in batch.points.items()}
        for row, path in enumerate(made[start:start + each]):
            write_clip(path, {name: value[row] for name, value in clips.items()})
    wait_for_all(LATE)
    return made


def draw_trajectories(run, files, count):
    """(states, one per noise level; x0; points; conditions) of random trajectories, see
    make_trajectories."""
    clips = {name: value.to(run.device) for name, value in pick(files, count).items()}
    states = clips.pop("states").float()                        # (B, levels + 1, C, F, h, w)
    points = {}
    for name in [name for name in clips if name.startswith("points.")]:
        points[name.removeprefix("points.")] = clips.pop(name)
    *states, x0 = states.unbind(1)                              # each (B, C, F, h, w)
    return states, x0, points, clips


def draw_noised_clips(run, files, count):
    """As draw_trajectories, but from clips: x0 is the ground truth, the states are noised x0. This
    trains the causal flow of the data, unguided: teacher forcing on clean latents, which needs no
    trajectories. (Few-step consistency, a usual next step, is not done here.)"""
    batch = draw_batch(run, files, count, run.clip_latents)
    x0 = batch.latents
    noise = torch.randn_like(x0)
    states = []
    for sigma in run.config.sigmas:
        levels = torch.full((count,), sigma, device=x0.device)
        states.append(add_noise(x0, noise, levels))
    return states, x0, batch.points, batch.conditions


def corrupt_context(x0, first):
    """Corrupted-context augmentation: imitates a faulty memory of clean latents x0
    (B, C, F, h, w). In half of the clips, a rectangle of all chunks but the first shows frame 0
    again, so what left it is back and what entered is gone. Meant to teach the student not to pass
    such faults on. first: latent frames of the first chunk."""
    B, _, frames, h, w = x0.shape
    low, high = torch.rand(2, 2, B, 1, 1).sort(0).values        # each of rows and columns
    y = torch.arange(h)[:, None] / h
    x = torch.arange(w) / w
    inside = (low[0] <= y) & (y < high[0]) & (low[1] <= x) & (x < high[1])      # (B, h, w)
    inside = inside & (torch.rand(B, 1, 1) < 0.5)
    late = torch.arange(frames)[:, None, None] >= first
    corrupt = (inside[:, None, None] & late).to(x0.device)      # (B, 1, F, h, w)
    return torch.where(corrupt, x0[:, :, :1], x0)


def causal_step(run, student, vae, drawn, channel_weight):
    """causal_loss on a draw of draw_trajectories or draw_noised_clips, in a random context."""
    states, x0, points, conditions = drawn
    own = (run.config.sink, run.config.window)
    contexts = (own, own, own) + CONTEXTS
    context = contexts[int(torch.randint(0, len(contexts), ()))]
    conditions = conditions | motion_inputs(student, **points, vae=vae)
    past = x0
    if run.settings.corrupt_context:
        past = corrupt_context(x0, next(chunk_sizes(run.config)))
    return causal_loss(student, states, x0, past, conditions, context, channel_weight)


def loss_on_trajectories(run, student, vae, files, channel_weight, update):
    """causal_loss on random trajectories of the teacher, as in the paper."""
    drawn = draw_trajectories(run, files, run.settings.batch)
    return causal_step(run, student, vae, drawn, channel_weight)


def loss_on_clips(run, student, vae, files, channel_weight, update):
    """causal_loss on random clips: teacher forcing."""
    drawn = draw_noised_clips(run, files, run.settings.batch)
    return causal_step(run, student, vae, drawn, channel_weight)


def loss_on_rollouts(run, student, vae, files, channel_weight, update):
    """Squared error of the student's rollouts against the true clips. It rolls out from pure
    noise, chunk by chunk as at inference, and so learns to continue its own past, faults included.
    This is Self-Forcing's rollout with regression in place of DMD: it predicts the mean of all
    plausible videos, which is blurred where they differ."""
    s = run.settings
    batch = draw_batch(run, files, s.batch, run.clip_latents)
    rng = torch.Generator().manual_seed(seed_of(run.seed, "exit", update))
    exit_step = int(torch.randint(0, len(run.config.sigmas), (), generator=rng))  # same in all
    conditions = batch.conditions | motion_inputs(student, **batch.points, vae=vae)
    noise = torch.randn_like(batch.latents)
    first_latent = first_latent_of(run.config, batch.latents)
    made = rollout(student, noise, conditions, first_latent, exit_step)
    x0 = torch.cat(list(itertools.islice(made, run.clip_chunks)), 2)    # the last is not cached
    cell_weight = 1 + s.track_weight * batch.touched[:, None]           # (B, 1, F, h, w)
    return ((x0 - batch.latents).square() * channel_weight * cell_weight).mean()


CAUSAL_FROM = {"trajectories": loss_on_trajectories, "clips": loss_on_clips,
               "rollouts": loss_on_rollouts}


def to_be_trained(run, model):
    """Unfreeze a MotionStream except its track head, frozen after the teacher (appendix D), and
    set checkpointing. Returns it."""
    model.requires_grad_(True)
    model.track_head.requires_grad_(False)
    return model.recompute_blocks(run.checkpointing)


def train_causal(run):
    """Stage 3: the student, initialised from the teacher, learns from ODE trajectories, clips or
    its own rollouts, see CAUSAL_FROM."""
    s = run.settings
    loss_of = CAUSAL_FROM[s.causal_from]
    files = training_clips(run, run.clip_latents)       # collective: call it in all processes
    if s.causal_from == "trajectories":
        files = make_trajectories(run, files)
    vae = run.load_vae()
    student = to_be_trained(run, run.load("teacher", causal=True, **run.context))
    weight = latent_weight(vae, student.config, torch.ones(1, device=run.device))
    learner = Learner("causal", student, s.causal, s.causal_updates, s.causal_accumulate,
                      s.shard_gradients)
    loop = Loop(run, "causal", s.causal_updates, learner)
    for update in loop:
        for _ in loop.micro_steps():
            with run.autocast():
                loss = loss_of(run, student, vae, files, weight, update)
            learner.backward(loss)
            loop.log(loss=loss)
        loop.log(grad=learner.update(update))
        export_weights(run, "causal", learner.average, update + 1)
    save_weights(run.path("causal"), learner.average)


# --------------------------------------------------------------------------------------------------
# Stage 4: distillation, see dmd_loss and critic_loss.

DRAWN_CONTEXTS = tuple(itertools.product((1, 3, 5), (0, 1, 2, 3), (1, 2, 4)))  # chunk, sink, window


def draw_rollout(run, update, grad):
    """Draw (number of chunks, exit step, context as fields of Config) of an update's rollouts,
    half of which are longer than a clip. All processes draw the same, or their collectives would
    deadlock."""
    config = run.config
    rng = torch.Generator().manual_seed(seed_of(run.seed, update, grad))
    least = 2 * run.clip_chunks - run.longest_rollout
    chunks = int(torch.randint(least, run.longest_rollout + 1, (), generator=rng))
    exit_step = int(torch.randint(0, len(config.sigmas), (), generator=rng))
    drawn = DRAWN_CONTEXTS[int(torch.randint(0, len(DRAWN_CONTEXTS), (), generator=rng))]
    context = run.context
    if run.settings.drawn_memory:
        context = context | dict(zip(("chunk", "sink", "window"), drawn))
    return max(run.clip_chunks, chunks), exit_step, context


def judged_clip(chunks, frames, first_latent, points):
    """Turn the end of a rollout, an iterator of chunks, into a clip that the teacher can judge:
    (x0, points). x0 is the image (B, C, 1, h, w), then the last `frames` latents except their
    first (first_latent=None: all of them). In longer rollouts time jumps after the image: the
    teacher judges what should be there, whatever the student passed on."""
    held = []
    for chunk in chunks:
        held.append(chunk)
        while sum(x.shape[2] for x in held[1:]) >= frames:
            held.pop(0)                                 # frees its graph too
    x0 = torch.cat(held, 2)[:, :, -frames:]
    if first_latent is not None:
        x0 = torch.cat([first_latent, x0[:, :, 1:]], 2)
    times = torch.arange(video_frames(x0.shape[2]))
    times[1:] += points["tracks"].shape[1] - len(times)
    cut = {name: points[name][:, times] for name in ("tracks", "visible")}
    return x0, points | cut


def roll_out(run, generator, vae, files, shape, grad):
    """Roll out the generator from first frames of clips, as at inference, see rollout. Returns (x0
    (B, C, F, h, w), a clip of judged_clip; its conditions; its points). shape: from draw_rollout.
    grad: x0 has a graph, that of each chunk's last denoising step."""
    s = run.settings
    config = run.config
    chunks, exit_step, context = shape
    frames = run.latents_of(chunks)
    sizes = list(chunk_sizes(replace(config, **context), frames))
    batch = draw_batch(run, files, s.batch, frames, first_only=True)
    image = batch.latents                               # (B, C, 1, h, w)
    conditions = batch.conditions
    if chunks > run.clip_chunks and s.neutral_long_rollouts:
        text = embed_words(NEUTRAL, config).to(run.device)
        conditions["text"] = text.expand(len(image), -1, -1)
    noise = torch.randn(*image.shape[:2], frames, *image.shape[3:], device=run.device)
    first_latent = first_latent_of(config, image)
    caches = generator.new_caches(**context)
    with run.autocast(), torch.set_grad_enabled(grad):
        motion = motion_inputs(generator, **batch.points, vae=vae)
        given = split_conditions(conditions | motion, sizes)
        noises = noise.split(sizes, 2)
        made = rollout(generator, noises, given, first_latent, exit_step, caches=caches)
        made = itertools.islice(made, len(noises))      # stops there: the last is not cached
        shown = first_latent if chunks == run.clip_chunks else image
        x0, points = judged_clip(made, run.clip_latents, shown, batch.points)
        conditions = next(split_conditions(conditions, [x0.shape[2]]))
        motion = motion_inputs(generator, **points, vae=vae)
    return x0, conditions | motion, points


def reward_weight(run, vae, x0, conditions, points):
    """(clip weights exp(reward / beta) (B, 1, 1, 1, 1), mean reward): Re-DMD (Reward Forcing,
    eq. 11). 1 and None without a reward."""
    if not run.reward:
        return 1.0, None
    video, _ = vae.decode(x0.detach())
    told = {name: value for name, value in conditions.items() if name not in ("tracks", "copies")}
    reward = run.reward(video.float(), told | points)           # (B,)
    weight = torch.exp(reward / run.settings.beta)
    return weight.view(-1, 1, 1, 1, 1), reward.mean()


def train_student(run):
    """Stage 4: critic_steps critic updates per generator update, each on a new rollout."""
    s = run.settings
    shift = run.config.shift
    files = training_clips(run, frames=1)
    vae = run.load_vae()
    teacher = shard(run.load("teacher"))
    generator = to_be_trained(run, run.load("causal", **run.context))
    critic = to_be_trained(run, run.load("teacher"))
    learner_g = Learner("generator", generator, s.generator,
                        math.ceil(s.distill_updates / s.critic_steps),
                        s.distill_accumulate, s.shard_gradients)
    learner_c = Learner("critic", critic, s.critic, 0, s.distill_accumulate, s.shard_gradients)
    channel_weight = functools.partial(latent_weight, vae, teacher.config)
    of_x0 = channel_weight(torch.ones(1, device=run.device))    # v's error at sigma 1 is x0's
    watch = find_watch()
    loop = Loop(run, "distill", s.distill_updates, learner_g, learner_c)
    for update in loop:
        if update % s.critic_steps == 0:
            shape = draw_rollout(run, update, grad=True)
            for _ in loop.micro_steps():
                x0, conditions, points = roll_out(run, generator, vae, files, shape, grad=True)
                with run.autocast():
                    weight, reward = reward_weight(run, vae, x0, conditions, points)
                    weight = weight * of_x0
                    first_latent = first_latent_of(run.config, x0.detach())
                    loss = dmd_loss(x0, teacher, critic, conditions, first_latent, shift, weight)
                learner_g.backward(loss)
                loop.log(reward=reward, loss_g=loss, std=x0.std())
            count = update // s.critic_steps
            loop.log(grad_g=learner_g.update(count))
            export_weights(run, "student", learner_g.average, count + 1)
        shape = draw_rollout(run, update, grad=False)
        for _ in loop.micro_steps():
            x0, conditions, _ = roll_out(run, generator, vae, files, shape, grad=False)
            with run.autocast():
                first_latent = first_latent_of(run.config, x0)
                loss = critic_loss(x0, critic, conditions, first_latent, shift, channel_weight)
            learner_c.backward(loss)
            loop.log(loss_c=loss)
        loop.log(grad_c=learner_c.update(update))
        if watch and (update + 1) % REPORT_EVERY["distill"] == 0:
            loop.tell(**watch.student_numbers(run, generator, teacher, critic, vae, files))
    save_weights(run.path("student"), learner_g.average)


STAGES = {"vae": train_vae, "teacher": train_teacher, "causal": train_causal,
          "distill": train_student}


# --------------------------------------------------------------------------------------------------
# The command.

@dataclass(frozen=True)
class Flags:
    """The command line as typed; None: not given."""
    stage: str = "all"
    smoke: bool = False
    out: Path | None = None
    data: Path | None = None
    weights: Path | None = None
    vae: Path | None = None
    steps: int | None = None
    seed: int = 0
    device: str | None = None
    accumulate: int | None = None
    checkpointing: bool | None = None
    memory: object = None               # fields of Config, or "drawn"
    guidance: tuple | None = None
    rollout: int | None = None
    reward: str | None = None
    dry_run: str | None = None
    set: tuple = ()                     # (name, value) pairs


LEAST_LATENTS = 12      # of the shortest clip


def student_memory(text):
    """A flag's type: see sample.memory; or "drawn"."""
    if text == "drawn":
        return text
    fields = memory(text)
    if fields["chunk"] > LEAST_LATENTS:
        raise argparse.ArgumentTypeError(f"{text} is not chunk 1 to {LEAST_LATENTS}, and not drawn")
    return fields


def assignment(text):
    """A flag's type: "batch=2" or "teacher.adam=1e-4" to (name, value)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not like field=value")
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass                            # a plain string
    return name, value


def new_parser(description):
    """The flags of a training except --stage, shared with programs in extras."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = number(int, 1, 10 ** 9)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a few updates of everything, in some minutes")
    add("--out", type=Path, help="folder to write to (runs/tiny; runs/smoke with --smoke)")
    add("--data", type=Path, help="a folder of clips, see above (none: clips are rendered)")
    add("--weights", type=Path, help="the teacher's start: a Wan DiT, or a teacher made here")
    add("--vae", type=Path, help="a finished VAE's file; the stage vae is left out")
    add("--steps", type=count, help="updates of the one stage that is named")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--device", help="cpu, cuda:0, … (cuda if there is one)")
    add("--accumulate", type=count,
        help="micro-steps of each process an update (1; Wan's: the paper's)")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute blocks in the backward: less memory (default for Wan's weights)")
    add("--memory", type=student_memory,
        help="the student's chunk, sink, window (c3s1w1); drawn: many")
    add("--guidance", type=guidance,
        help="weights T,M of text and motion, for trajectories and real score")
    add("--rollout", type=number(int, 1, 100), help="chunks of the longest rollout (16)")
    add("--reward", help="weights clips in distillation: motion, or FILE.py:FUNCTION (none)")
    add("--dry-run", nargs="?", choices=PRESETS, const="tiny", help="print the cost, then stop")
    add("--set", type=assignment, action="append", default=[], metavar="FIELD=VALUE",
        help="override a field of Settings or Config; repeatable")
    return parser


def parse_flags(argv):
    """Parse the command line into Flags. UserError, one line, if invalid."""
    parser = new_parser(__doc__)
    parser.add_argument("--stage", choices=["all", *STAGES], default="all", help="(all)")
    return check_flags(Flags(**vars(parser.parse_args(argv))))


def check_flags(flags):
    """Return the flags. UserError, one line, if they are inconsistent."""
    stage = flags.stage
    distills = stage in ("all", "distill")
    streams = stage in ("all", "causal", "distill")
    for wrong, cure in [
        (flags.steps and stage not in STAGES, "--steps needs --stage with one training stage"),
        (flags.reward and not distills, "--reward needs --stage distill"),
        (flags.memory and not streams, "--memory needs --stage causal or distill"),
        (flags.data and not flags.data.is_dir(), f"--data {flags.data}: no such folder"),
        (flags.vae and stage == "vae", f"--vae {flags.vae}: drop it, or --stage vae"),
        (flags.vae and not flags.vae.is_file(), f"--vae {flags.vae}: no such file"),
    ]:
        if wrong:
            raise UserError(cure)
    return flags


def assign(thing, path, value):
    """Copy of a frozen dataclass with the field "a", or "a.b", set to a value. UserError if there
    is no such field, or the type differs."""
    name, _, inner = path.partition(".")
    if name not in vars(thing):
        raise UserError(f"--set {path}: no such field; there are {', '.join(vars(thing))}")
    now = getattr(thing, name)
    if dataclasses.is_dataclass(now):
        return replace(thing, **{name: assign(now, inner, value)})
    numbers = isinstance(now, (int, float)) and isinstance(value, (int, float))
    if not (numbers or now is None or value is None or isinstance(value, type(now))):
        raise UserError(f"--set {path}={value}: it is {now} now")
    return replace(thing, **{name: value})


def assign_all(config, settings, assignments):
    """(config, settings) with the assignments of --set. UserError, one line, if invalid."""
    for path, value in assignments:
        if path in vars(config):
            config = assign(config, path, value)
        else:
            settings = assign(settings, path, value)
    frames = settings.clip_frames
    chunk = config.chunk
    first = config.first_chunk or chunk
    least = first + math.ceil((LEAST_LATENTS - first) / chunk) * chunk
    if frames < video_frames(least) or (frames - video_frames(first)) % (FRAMES * chunk):
        some = [video_frames(least + i * chunk) for i in range(3)]
        raise UserError(f"--set clip_frames={frames}: needs whole chunks of {FRAMES * chunk}, the "
                        f"first of {video_frames(first)}: {', '.join(map(str, some))}, …")
    if settings.causal_from not in CAUSAL_FROM:
        known = ", ".join(CAUSAL_FROM)
        raise UserError(f"--set causal_from={settings.causal_from}: is one of {known}")
    return config, settings


def is_wan(config):
    """True for Wan's models, with their text encoder, False for the tiny one."""
    return config.text_encoder == "umt5"


def resolve_config(flags, start):
    """The config to train: the tiny model's, a preset's, or that of the weights `start`. Weights
    without a track input get one; Wan's are sampled as in the paper."""
    config = start.config if start else PRESETS[flags.dry_run or "tiny"]
    if start and not config.track_dim:
        slot = config.out_dim
        config = replace(config, track_dim=slot, in_dim=config.in_dim + slot)
    if is_wan(config):
        config = replace(config, shift=6.0, sigmas=schedule(3, 6.0), steps=48, guidance=(3.0, 1.5),
                         chunk=3, sink=1, window=1)         # the student's 3 sigmas are among 48;
                                                            # first_chunk stays the weights' own
    if isinstance(flags.memory, dict):
        config = replace(config, **flags.memory)
    if flags.guidance:
        config = replace(config, guidance=flags.guidance)
    return config


def paper_settings(config, has_head):
    """The paper's settings for the teacher's first stage and what follows or, for weights with a
    track head, the second."""
    if config.out_dim == PRESETS["wan2.2-5b"].out_dim:
        return PAPER_5B_STAGE_2 if has_head else PAPER_5B
    return PAPER_STAGE_2 if has_head else PAPER


def resolve_settings(flags, start, config):
    """The settings: of the tiny model or of the paper, then as the flags say."""
    settings = TINY
    if is_wan(config):
        settings = paper_settings(config, bool(start) and start.has_head)
    if start:
        settings = replace(settings, dense_share=0.0 if start.has_head else 1.0)
    if flags.data:
        settings = replace(settings, rollout=0, neutral_long_rollouts=False)
    if flags.smoke:
        settings = replace(settings, **SMOKE)
    if flags.rollout:
        settings = replace(settings, rollout=flags.rollout)
    if flags.memory == "drawn":
        settings = replace(settings, drawn_memory=True)
    if flags.steps:
        settings = replace(settings, **{f"{flags.stage}_updates": flags.steps})
    if flags.accumulate:
        for stage in STAGES:
            of_all = {f"{stage}_accumulate": flags.accumulate * PROCESSES}
            settings = replace(settings, **of_all)
    return settings


def refuse(flags, start, has_video):
    """UserError, one line, for weights or clips that cannot be used for training. has_video: the
    clips of --data can be encoded."""
    config = start.config if start else None
    encoded = flags.data and not has_video
    for wrong, cure in [
        (start and config.causal, "holds a student; a training starts from a teacher"),
        (start and config.has_mask,
         "takes the image as a clip with a mask, which cannot stream; take Fun-Control or T2V"),
        (encoded and flags.stage == "vae", "holds latents; the stage vae needs clips with video"),
        ((start or encoded) and not flags.vae and not flags.dry_run,
         "give --vae FILE, which made its latents"),
        (start and is_wan(config) and not flags.data and not flags.dry_run,
         "give --data FOLDER; the clips drawn here are small"),
    ]:
        if wrong:
            raise UserError(f"{start.path if start else flags.data}: {cure}")


def resolve(flags):
    """Resolve flags, and the weights they name, into a Run."""
    start = inspect(flags.weights) if flags.weights else None
    if flags.data and RANK == 0:
        for line in walk(flags.data)[1]:
            print(f"left out: {line}")
    clips = clip_files(flags.data) if flags.data else []
    has_video = bool(clips) and "video" in read_header(clips[0])[0]
    refuse(flags, start, has_video)
    config = resolve_config(flags, start)
    settings = resolve_settings(flags, start, config)
    config, settings = assign_all(config, settings, flags.set)
    on_schedule = set(config.sigmas) <= set(schedule(config.steps, config.shift))
    from_teacher = settings.causal_from == "trajectories"
    if flags.stage in ("all", "causal") and from_teacher and not on_schedule:
        raise UserError(f"{config.steps} steps of the teacher: the student's noise levels "
                        f"{config.sigmas} are not among its own; choose another number")
    out = flags.out or Path("runs/smoke" if flags.smoke else "runs/tiny")
    files = {name: out / f"{name}.safetensors" for name in WEIGHTS.values()}
    files["vae"] = flags.vae or files["vae"]
    files["start"] = flags.weights
    device = flags.device or default_device()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: not available here") from None
    checkpointing = flags.checkpointing
    if checkpointing is None:
        checkpointing = is_wan(config)      # without it, 81 frames need 135 GiB of activations
    reward = None
    if flags.reward:
        from extras.evaluate import find_reward
        reward = find_reward(flags.reward)
    return Run(out, flags.seed, device, compute_dtype(device), config, settings, files, flags.data,
               start, reward, checkpointing)


def check_prerequisites(run, stage):
    """UserError, before a stage starts, if its prerequisite weights are missing or damaged, or
    trained with another chunk, sink or window."""
    for name in PREREQUISITES[stage]:
        try:
            if name == "vae":
                run.load_vae()
            else:
                run.load(name)
        except ValueError as e:
            made_by = next(stage for stage, made in WEIGHTS.items() if made == name)
            given = run.path(name) != run.out / f"{name}.safetensors"
            raise UserError(str(e) if given else f"{e}; --stage {made_by} makes it") from None
    if stage == "distill":
        config = inspect(run.path("causal")).config
        was = {name: getattr(config, name) for name in ("chunk", "sink", "window")}
        if not was.items() <= run.context.items():
            raise UserError(f"{run.path('causal')}: was trained with {was}; say by --memory what "
                            "the student gets")


def show(run, stage):
    """Plot the stage's curves and a preview, if extras is there."""
    if RANK > 0:
        return
    try:
        from extras.evaluate import Trained, preview
    except ImportError:
        print(f"{run.out / 'stats.jsonl'} has the numbers; extras/evaluate.py draws curves of them")
        return
    trained = Trained(run.out, run.device, files={"vae": run.path("vae")})
    preview(trained, stage, drawn=run.data is None)


def unusual(run):
    """Non-default settings, as texts."""
    has_head = bool(run.start) and run.start.has_head
    usual_settings = paper_settings(run.config, has_head) if is_wan(run.config) else TINY
    usual_config = resolve_config(Flags(), run.start)
    texts = []
    for used, usual in (run.settings, usual_settings), (run.config, usual_config):
        for name, value in vars(used).items():
            if value != getattr(usual, name):
                texts.append(f"{name}={value}")
    return texts


def logged_updates(path):
    """{stage: (updates logged, mean seconds of the latest 100)} of a stats.jsonl."""
    rows = {}
    for row in read_log(path):
        rows.setdefault(row["stage"], []).append(row)
    logged = {}
    for stage, own in rows.items():
        seconds = [row["seconds"] for row in own[-100:]]
        logged[stage] = own[-1]["step"] + 1, sum(seconds) / len(seconds)
    return logged


def print_plan(run, stages):
    """Print a table of the stages to be run. Hours left are estimated from a stage's own logged
    updates."""
    print(f"{run.out}: on {run.device}, matrix products in {str(run.dtype)[6:]}, seed {run.seed}")
    if unusual(run):
        print(f"non-default settings: {', '.join(unusual(run))}")
    logged = logged_updates(run.out / "stats.jsonl")
    print("\n| stage | updates | begun | hours left | weights |\n|---|---|---|---|---|")
    for stage in stages:
        updates = getattr(run.settings, f"{stage}_updates")
        begun = hours = "-"
        if stage in logged:
            begun, seconds = logged[stage]
            hours = f"{max(updates - begun, 0) * seconds / 3600:.1f}"
        print(f"| {stage} | {updates:,} | {begun} | {hours} | {run.path(WEIGHTS[stage])} |")
    pictures = " and STAGE_preview.png" if run.data is None else ""
    print(f"\nnumbers of every update: {run.out / 'stats.jsonl'}; pictures after each stage: "
          f"{run.out / 'STAGE.png'}{pictures}\n")


def run_stages(argv):
    """Run the named stage, or all that are not done yet."""
    flags = parse_flags(argv)
    join_processes(flags.device)
    run = resolve(flags)
    if flags.dry_run:
        from extras.dry_run import print_dry_run
        return print_dry_run(run)
    stages = []
    for stage in STAGES:
        missing = not run.path(WEIGHTS[stage]).exists()
        if flags.stage == stage or (flags.stage == "all" and missing):
            stages.append(stage)
    with own_folder(run.out):
        if RANK == 0:
            print_plan(run, stages)
        for stage in stages:
            check_prerequisites(run, stage)
            torch.manual_seed(seed_of(run.seed, stage))     # for the initial weights
            STAGES[stage](run)
            show(run, stage)
    if flags.stage == "all" and RANK == 0 and not run.data:
        print(f"to measure it: python -m extras.evaluate --out {run.out}")


def main(argv=None):
    """Run the program; returns the exit code."""
    return reported(run_stages, argv)


if __name__ == "__main__":
    import train_distill        # by name, as extras import it: only one copy runs
    sys.exit(train_distill.main())
