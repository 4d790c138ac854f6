"""Train a tiny MotionStream from scratch on rendered video: every stage of the paper, in order.

    vae      the tiny model's linear code of video
    teacher  bidirectional rectified flow, given the first frame, text and tracks
    causal   the student, chunk by chunk through the KV cache, trained by regression: its own
             rollouts against the true clips (tiny), or the teacher's ODE trajectories (paper)
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
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from motionstream import (FRAMES, PRESETS, Config, MotionStream, UserError, add_noise, cell_of,
                          channel_std, chunk_sizes, euler, extra, guided_velocity, image_inputs,
                          latent_frames, linear_part, motion_inputs, naming, new_model, remember,
                          rollout, same_sigma, save_pretrained, schedule, shift_sigma,
                          split_conditions, start_points, to_x0, track_ids, video_frames,
                          with_first, write_file)
from sample import (Parser, embed_words, find_device, guidance_flag, hold_signals, inspect,
                    memory_flag, number, open_vae, reported)

# --------------------------------------------------------------------------------------------------
# The losses: functions of tensors and networks, independent of the rest of this file.

def first_latent_of(config, x0):
    """The argument of with_first for clips x0 (B, C, F, h, w): their first latent frame,
    (B, C, 1, h, w); None for models that take it as channels instead."""
    return x0[:, :, :1] if config.clean_first else None


# Stage 2, the teacher.

def draw_sigma(batch, shift, p_pure_noise, p_uniform):
    """Draw noise levels (B,). With probability p_uniform, sigma is uniform before the shift
    (appendix D), as in the sampler and score_sigma, else logit-normal [O]. With probability
    p_pure_noise it is 1."""
    normal = torch.randn(batch)
    chance = torch.rand(batch)
    # A normal draw's sigmoid is logit-normal; its CDF is uniform. `chance` picks one of the two.
    uniform = torch.special.ndtr(normal)
    sigma = torch.where(chance >= 1 - p_uniform, uniform, normal.sigmoid())
    sigma = shift_sigma(sigma, shift)
    return torch.where(chance < p_pure_noise, torch.ones(batch), sigma)


def flow_loss(model, x0, sigma, conditions, first_latent, cell_weight=1.0, channel_weight=1.0):
    """Rectified flow (eq. A1, A2): noise x0 (B, C, F, h, w) to sigma (B,); return the mean squared
    error of the model's velocity. first_latent (B, C, 1, h, w): the clean image, excluded from the
    loss; None: the image is among the conditions. cell_weight (B, F, h, w), channel_weight
    (B, C, 1, 1, 1): weights of the error. channel_weight depends on sigma alone and leaves the
    optimum where it is. If cell_weight depends on tracks that the model is not given, the optimum
    is biased towards moving content."""
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

def causal_loss(model, states, x0, conditions, context, channel_weight=1.0, past=None):
    """Regression through the KV cache (section 3.2): each chunk predicts its clean end, x0
    (B, C, F, h, w), from its own state at a random noise level and a cache that holds the chunks
    before it. context: the cache's sink and window, see new_caches.

    states: one (B, C, F, h, w) per noise level of the model. channel_weight (1, C, 1, 1, 1):
    weights of the error. past: written to the cache in place of x0."""
    if past is None:
        past = x0
    caches = model.new_caches(**context)
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
        sigma = same_sigma(sigmas[step], x0)
        first_latent = None
        if start == 0:
            first_latent = first_latent_of(model.config, target)
        x_t, sigma_frames = with_first(states[step][:, :, now], sigma, first_latent)
        velocity = model(x_t, sigma_frames, caches=caches, **part)
        predicted = to_x0(x_t, velocity, sigma_frames)
        loss = loss + ((predicted - target).square() * channel_weight).sum()
        if stop == x0.shape[2]:         # no chunk would read it
            break
        remember(model, past[:, :, now], caches, part)
    return loss / x0.numel()


SMALL_ERROR = 0.01      # of pixels in [-1, 1] or latents; smaller ones hardly count: rollout_loss


def rollout_loss(student, x0, conditions, first_latent, exit_step, weight=1.0, decode=None):
    """Regression on own rollouts (ours): roll the student out from pure noise, chunk by chunk as at
    inference; return the mean error against the true clips x0 (B, C, F, h, w). So the student
    learns to continue its own past, faults included. This is Self-Forcing's rollout with regression
    in place of DMD.

    The error is absolute, not squared, so that the student predicts the median of all plausible
    videos: mostly one of them, where the mean is a blur of all. first_latent, exit_step: see
    motionstream.rollout. decode: a differentiable function of latents; the error is that of what
    it returns; None: of the latents. weight: of errors, broadcast over them."""
    noise = torch.randn_like(x0)
    sizes = list(chunk_sizes(student.config, x0.shape[2]))
    chunks = rollout(student, noise, conditions, first_latent, exit_step)
    chunks = itertools.islice(chunks, len(sizes))       # stops there: the last is not cached
    made = torch.cat(list(chunks), 2)
    if decode is not None:
        made = decode(made)
        x0 = decode(x0)
    error = (made - x0).square()
    error = (error + SMALL_ERROR ** 2).sqrt()           # smooth at 0 (Charbonnier et al. 1994)
    return (error * weight).mean()


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
    first_latent (B, C, 1, h, w): the image, on which teacher and critic agree, so that its gradient
    is zero; None: the image is among the conditions. shift: shifts the noise levels, see
    score_sigma. weight: weights of clips or channels, broadcast over x0."""
    sigma = score_sigma(len(x0), shift, x0.device)
    real, fake = real_and_fake(x0, sigma, teacher, critic, conditions, first_latent)
    with torch.no_grad():
        distance = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        direction = (fake - real) / distance.clamp(min=1e-6)    # a perfect clip has distance 0
        target = x0 - direction
    # The gradient of this is `direction`, divided by the number of elements, times `weight`. The
    # image, frame 0, need not be cut off: its zeros shrink `distance` and this mean alike.
    return 0.5 * ((x0 - target).square() * weight).mean()


def critic_loss(x0, critic, conditions, first_latent, shift, weight_at=None):
    """The critic's loss (eq. 4): rectified flow on the generator's own latents x0 (B, C, F, h, w),
    without guidance, at the noise levels of score_sigma. first_latent: see flow_loss.
    weight_at: a function that maps sigma (B,) to flow_loss's channel_weight; None: 1."""
    sigma = score_sigma(len(x0), shift, x0.device)
    weight = weight_at(sigma) if weight_at else 1.0
    return flow_loss(critic, x0.detach(), sigma, conditions, first_latent, channel_weight=weight)


# --------------------------------------------------------------------------------------------------
# The training settings. Sources: [P] the paper, [O] ours, found by trial on the tiny model.

@dataclass(frozen=True)
class Learning:
    """Optimizer settings of one network."""
    muon: float | None              # Muon's learning rate, for hidden matrices; None: AdamW for all
    adam: float                     # AdamW's learning rate, for the rest
    betas: tuple = (0.9, 0.99)      # AdamW's [O]
    ema: float = 0.0                # decay of the weights' moving average; 0: no average [O]
    weight_decay: float = 0.01      # [O]
    clip_norm: float = 1.0          # largest gradient norm [O]
    warm_up: int = 20               # updates over which the learning rate rises [O]
    decay: float = 0.4              # share of the updates, the last, over which it falls to 0 [O]


@dataclass(frozen=True)
class Settings:
    """The training settings. The defaults are the tiny model's.

    A micro-step is a forward and backward pass over `batch` clips in one process. An update uses
    the mean gradient of STAGE_accumulate micro-steps, divided evenly among the processes; each
    runs at least one, so with more processes than micro-steps the effective batch grows."""
    # data
    clip_frames: int = 45           # 12 latent frames, 4 chunks of 3 [O]
    batch: int = 4                  # clips per micro-step [O]
    clips: int = 4096               # rendered for teacher and distillation [O]
    trajectories: int = 480         # made by the teacher for the stage causal, see causal_from [O]
    vae_clips: int = 256            # rendered for the vae [O]
    vae_batch: int = 8              # crops per micro-step [O]
    segmenter_scenes: int = 4096    # drawn for the VAE's segmenter [O]
    segmenter_batch: int = 32       # of them per micro-step [O]
    # length: updates, and micro-steps per update over all processes
    vae_updates: int = 400          # [O]
    segmenter_updates: int = 4000   # part of the stage vae, after the code itself [O]
    teacher_updates: int = 6000     # [O]
    causal_updates: int = 800       # [O]
    distill_updates: int = 1200     # critic updates [O]
    vae_accumulate: int = 1         # [O]
    teacher_accumulate: int = 1     # [O]
    causal_accumulate: int = 1      # [O]
    distill_accumulate: int = 1     # [O]
    # optimizers
    vae: Learning = Learning(None, 3e-4)                                            # [O]
    segmenter: Learning = Learning(None, 1.5e-3, decay=1.0)                         # [O]
    teacher: Learning = Learning(0.015, 3e-3, ema=0.99)                             # [O]
    causal: Learning = Learning(2e-3, 1e-3, ema=0.98, clip_norm=0.03)               # [O],
                                    # nearly every gradient is clipped, so that all count alike
    generator: Learning = Learning(1e-3, 1e-4, betas=(0.0, 0.99), ema=0.98)         # [O]
    critic: Learning = Learning(2e-3, 2e-4, betas=(0.0, 0.99))                      # [O]
    # teacher
    dense_share: float = 0.25       # first share of the updates, which sees all tracks [O]
    freeze_track_head: bool = True  # one that comes with --weights: stage 2 (appendix D)
    whole_every: int = 4            # every n-th update trains on whole clips, [O]
    short_latents: int = 6          # the others on clips of so many latents, twice the batch [O]
    p_pure_noise: float = 0.5       # share of clips at sigma 1: only the conditions help there [O]
    p_uniform_sigma: float = 0.0    # share with sigma uniform before the shift, see draw_sigma [O]
    track_weight: float = 4.0       # loss weight of cells that a track touches, minus 1 [O]
    p_no_text: float = 0.1          # share of clips with null text, for guidance (3.1) [O]
    p_no_tracks: float = 0.1        # share of clips without tracks, likewise [O]
    # choice of tracks
    track_what_moves: bool = True   # everything that moves keeps a track, see user_tracks [O]
    p_sparse: float = 0.5           # share of clips with few or no tracks, in batches without
                                    # object labels, see given_tracks [O]
    # causal
    causal_from: str = "rollouts"   # own rollouts [O]; "trajectories" of the teacher [P]; "clips"
                                    # with noise, or "consistency" after them, see
                                    # extras/experiments.py [O]
    consistency_share: float = 0.5  # last share of the updates, for consistency [O]
    consistency_hop: int = 5        # Euler steps between its noise levels [O]; Causal Forcing++: 1
    corrupt_context: bool = True    # damage the past, see extras/experiments.py; unused with
                                    # rollouts [O]
    # distill
    critic_steps: int = 5           # critic updates per generator update (appendix D) [P]
    rollout: int = 16               # chunks of the longest rollout, but at least a clip's [O]
    neutral_long_rollouts: bool = True      # a neutral text in rollouts longer than a clip, by
                                            # whose end a prompted fade of the light is over [O]
    beta: float = 0.5               # clip weight exp(reward / beta) (Reward Forcing, eq. 11) [O]
    export_every: int = 0           # updates between exported weights, except the vae's; 0: none
    # distributed
    shard_gradients: bool = False   # reduce gradients every micro-step: less memory, more traffic
    replicate_teacher: bool = False     # the real score whole and in bfloat16, see real_score
    # checkpoints
    checkpoint_minutes: float = 5   # time between checkpoints; a signal also causes one
    # dry run
    tflops: float = 396             # TFLOP/s of a GPU: 40 % of an H100's 989 in bfloat16 [O]


TINY = Settings()

# For Wan's 1.3B weights: appendix D [P], unless noted otherwise.
PAPER = Settings(
    clip_frames=81,                 # section 4.1: 5 s at 16 frames a second
    batch=1,
    clips=0,                        # clips come from --data
    trajectories=4000,
    vae_clips=0,
    vae_updates=0,
    segmenter_updates=0,
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
                                    # 48 Euler steps, the student's first step and 11 % of DMD's
                                    # draws lie
    track_weight=0.0,
    track_what_moves=False,         # anything may move without a track
    p_sparse=0.5,                   # [O], except stage 1; the paper: 0, which never shows a drag
    causal_from="trajectories",
    consistency_hop=1,
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

SMOKE = {"vae_updates": 4, "segmenter_updates": 2, "teacher_updates": 4, "causal_updates": 3,
         "distill_updates": 6, "vae_accumulate": 1, "teacher_accumulate": 1, "causal_accumulate": 1,
         "distill_accumulate": 1, "vae_clips": 8, "segmenter_scenes": 16, "clips": 16,
         "trajectories": 8}

NEUTRAL = PRESETS["tiny"].prompt
# The weights that each stage makes.
WEIGHTS = {"vae": "vae", "teacher": "teacher", "causal": "causal", "distill": "student"}


@dataclass(frozen=True)
class Run:
    """A training run, fully resolved from the flags and the weights they name; see `resolve`."""
    out: Path                       # output folder
    seed: int
    device: str
    dtype: torch.dtype              # for matrix products, see compute_dtype; may differ on resuming
    config: Config                  # the model and its sampling
    settings: Settings
    files: dict                     # {name: path} of vae, teacher, causal, student, start
    data: Path | None = None        # folder of clips; None: clips are rendered
    start: object = None            # contents of --weights, see sample.inspect
    reward: object = None           # function for Re-DMD, see extras/reward_forcing.py; None: none
    checkpointing: bool = False     # see recompute_blocks

    @property
    def clip_latents(self):
        return latent_frames(self.settings.clip_frames)

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
    def streaming(self):
        """The student's chunk and cache settings, {field of Config: value}."""
        names = ("chunk", "sink", "window", "sink_decay")
        return {name: getattr(self.config, name) for name in names}

    def path(self, name):
        return Path(self.files[name])

    def load(self, name, dtype=torch.float32, **overrides):
        """Load a trained MotionStream, frozen. Sampling settings come from `config`, not from its
        file. overrides: further fields of Config."""
        names = ("shift", "sigmas", "steps", "guidance")
        fields = {each: getattr(self.config, each) for each in names} | overrides
        return MotionStream.from_pretrained(
            self.path(name), dtype=dtype, device=self.device, **fields)

    def load_vae(self):
        """Load the VAE of the latents."""
        return open_vae(self.config, self.out, self.path("vae")).to(self.device)

    def autocast(self):
        """Autocast to bfloat16, disabled if dtype is float32. No weight cache: before torch 2.11 it
        returns casts made without a graph to code that needs one."""
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
    """Join torchrun's process group, if there is one. device: None or auto: default_device()."""
    if PROCESSES > 1:
        if device in (None, "auto"):
            device = default_device()
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
    values = [value]
    if PROCESSES > 1:
        dist.broadcast_object_list(values)
    return values[0]


def shard(model):
    """Shard a MotionStream's parameters over the processes, in place; a VAE stays whole. FSDP
    gathers a block's parameters while the block runs and all others while the model runs. It
    gathers them in float32, so that autocast rounds them as in one process."""
    if PROCESSES == 1 or not isinstance(model, MotionStream):
        return model
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (PROCESSES,))
    parts = list(model.blocks) + [model.track_head, model]
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)    # an EMA has no backward
    # Make the model the FSDP root: otherwise the first module to run, the track head, becomes it.
    fully_shard.state(model)._lazy_init()           # torch has no public way
    return model


@contextlib.contextmanager
def gathered(model):
    """Keep a sharded MotionStream's parameters gathered in here from their first use on, so that a
    rollout gathers them once, not once a chunk. Meanwhile each process holds all parameters."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    yield
    model.set_reshard_after_forward(True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)     # in process 0; others get {}
SHARED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=PROCESSES > 1)
PARTLY = replace(SHARED, strict=False)      # optimizers have no state for what has no gradient


# --------------------------------------------------------------------------------------------------
# Learning: from a loss to an update.

def seed_of(*values):
    """A seed for torch from anything printable, the same in every process."""
    return zlib.crc32(" ".join(map(str, values)).encode())


def generators(device):
    """Torch's default random generators: the CPU's and, on a GPU, the device's."""
    device = torch.device(device)
    if device.type != "cuda":
        return [torch.default_generator]
    return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]


def compute_dtype(device):
    """Dtype of matrix products on a device ("cpu", "cuda:0"): bfloat16, but float32 on a CPU, most
    of which are slow in bfloat16."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


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
    (output, the rest), and in compute_dtype instead of always bfloat16. Parameters may be DTensors
    of matrices."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure=None):
        """Update by the orthogonalised Nesterov momentum of the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:              # the loss did not reach it
                    continue
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
        matrix = orthogonal(matrix, compute_dtype(matrix.device))
        update = matrix.reshape(update.shape)
        if isinstance(p, DTensor):
            update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(1 - rate * weight_decay)
        p.add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)


class Learner:
    """A network, its optimizers and the moving average (EMA) of its weights, all sharded, see
    `shard`. Call `backward` for each micro-step of an update, then `update`. Without an average,
    `average` is the network itself.

    learning: its settings. updates: after so many the learning rate is 0; 0: no decay.
    accumulate: micro-steps per update, over all processes. shard_gradients: see backward."""

    def __init__(self, name, model, learning, updates=0, accumulate=1, shard_gradients=False):
        self.name = name
        self.learning = learning
        self.updates = updates
        self.accumulate = max(accumulate // PROCESSES, 1)       # per process
        self.shard_gradients = shard_gradients
        self.micro_steps = 0            # since the last update
        self.loss = 0.0                 # mean loss of these micro-steps
        self.averaged = None
        self.average = model
        if learning.ema:
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
                group = hidden if matrix and self.learning.muon else rest
                group.append(p)
        learning = self.learning
        optimizers = []
        if hidden:
            optimizers.append(Muon(hidden, learning.muon, learning.weight_decay))
        adam = torch.optim.AdamW(rest, learning.adam, learning.betas,
                                 weight_decay=learning.weight_decay)
        return optimizers + [adam]

    def backward(self, loss):
        """Accumulate the gradient of a micro-step's loss. Each process keeps its own whole gradient
        until the last micro-step of an update averages them over the processes. With
        shard_gradients every micro-step averages them, and each process keeps a shard."""
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
        """Average the gradient over the processes and clip its norm to learning.clip_norm. Returns
        the norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if not self.sharded:
            for p in parameters:
                mean_processes(p.grad)
        norm = nn.utils.clip_grad_norm_(parameters, self.learning.clip_norm)
        return norm.full_tensor() if self.sharded else norm

    def rate_factor(self, number):
        """Factor on the learning rate at an update: warm-up, constant 1, decay."""
        factor = min(1.0, (number + 1) / self.learning.warm_up)
        if self.updates:
            factor = min(factor, (self.updates - number) / (self.learning.decay * self.updates))
        return factor

    def move_average(self, averages, weights, count):
        """multi_avg_fn after `count` updates. Early on it averages roughly the latest tenth of
        them, so that the initial weights are soon forgotten."""
        share = 1 - min(self.learning.ema, int(count) / (int(count) + 10))
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
        set_optimizer_state_dict(self.model, self.optimizers, of_optimizers, options=PARTLY)
        if self.averaged is not None:
            set_model_state_dict(self.averaged, state.get("average", {}), options=SHARED)


# --------------------------------------------------------------------------------------------------
# What extras/ adds to a training run: guard.py checks inputs and files, watch.py reports progress.

class Unguarded:
    """What a copy without extras/ has in place of the functions of extras/guard.py, which refuse
    bad inputs, lock the folder and skip damaged checkpoints."""

    def check_flags(self, flags, config, settings):
        if not (flags.data and flags.vae):
            raise UserError("without extras/, give --data FOLDER of encoded clips, and --vae FILE")

    def check_run(self, run, flags):
        pass

    def check_stage(self, run, stage):
        pass

    def own_folder(self, folder):
        if RANK == 0:
            print("extras/guard.py is missing: flags, files and clips are not checked")
        folder.mkdir(parents=True, exist_ok=True)
        return contextlib.nullcontext()

    def checkpoint_settings(self, run, stage):
        return {}

    def newest_checkpoint(self, folder, stage, settings):
        paths = sorted(folder.glob(f"{stage}.*.checkpoint.pt"))
        return torch.load(paths[-1], map_location="cpu", weights_only=True) if paths else None

    def clip_digests(self, run):
        return {}


def guard():
    """The module extras/guard.py or, in a copy without it, Unguarded."""
    return extra("guard") or Unguarded()


def no_report(loop, *inputs):
    """Default callback after each update: does nothing. Given the stage's Loop, networks, clips.
    extras/watch.py has one that measures now and then."""


# --------------------------------------------------------------------------------------------------
# The loop of a stage, its log and its checkpoints.


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


def load_checkpoint(folder, stage, settings, learners):
    """Load a stage's newest checkpoint, read by process 0, into the learners. Returns its number
    of updates, or 0 if there is no checkpoint. UserError if it has other learners or, with
    extras/, other settings."""
    checkpoint = {"updates": 0, "learners": {}}
    if RANK == 0:
        checkpoint = guard().newest_checkpoint(folder, stage, settings) or checkpoint
    updates = from_first(checkpoint["updates"])
    if updates == 0:
        return 0
    path = checkpoint_path(folder, stage, updates)
    for learner in learners:
        with naming(path, f"of another {learner.name}"):
            learner.load_state_dict(checkpoint["learners"].get(learner.name, {}))
    if RANK == 0:
        print(f"{path.name}: resumed at update {updates}")
    return updates


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
        self.settings |= guard().checkpoint_settings(run, stage)

    def __iter__(self):
        begin = load_checkpoint(self.run.out, self.stage, self.settings, self.learners)
        self.saved_at = time.time()
        log_path = os.devnull
        if RANK == 0:
            log_path = self.run.out / "stats.jsonl"
        with hold_signals() as stop, open(log_path, "a", buffering=1) as log:
            bar = tqdm(range(begin, self.updates), self.stage, disable=RANK > 0)
            for update in bar:
                self.update = update
                self.numbers = {}               # {name: [values logged]}
                self.random = {}                # {micro-step: where its random streams stopped}
                started = time.time()
                yield update
                means = {}
                for name, values in self.numbers.items():
                    means[name] = round(sum(values) / len(values), 5)
                bar.set_postfix(means)
                seconds = round(time.time() - started, 3)
                row = {"stage": self.stage, "step": update, **means, "seconds": seconds,
                       "dtype": str(self.run.dtype)[6:]}                        # after "torch."
                log.write(json.dumps(row) + "\n")
                self.save_if_due(stop)

    def micro_steps(self):
        """Yield this process's micro-steps of the update, numbered over all processes and updates.
        Each is seeded by (seed, stage, number), so resuming or another number of processes changes
        no draw. `distill` calls this twice in an update of both networks, first for the generator.
        The critic needs other clips and noise, so the second time each micro-step continues the
        random stream where it left it."""
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
    points: dict                # for motion_of: tracks (B, T, N, 2), visible, ids; for copies also
                                # start and frame_0, the image's pixels (B, 3, H, W)
    counted: torch.Tensor       # (B, T, N) bool: tracks whose cells get track_weight, namely those
                                # of objects or, in a batch without objects, the given ones

    def to(self, device):
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        points = {name: value.to(device) for name, value in self.points.items()}
        return Batch(self.latents.to(device), conditions, points, self.counted.to(device))


def read_header(file):
    """({name: shape}, metadata) of a clip."""
    with naming(file, "damaged, or no clip; python -m extras.clips writes clips"):
        with safe_open(file, "pt") as clip:
            shapes = {name: tuple(clip.get_slice(name).get_shape()) for name in clip.keys()}
            return shapes, clip.metadata() or {}


def latents_in(shapes):
    """Number of latent frames of a clip, encoded or not; shapes: see read_header."""
    if "latents" in shapes:
        return shapes["latents"][1]
    return latent_frames(shapes["video"][1])


def clip_files(folder):
    """Find the clips in a folder and in all folders below, sorted. Links are followed; each folder
    counts once, however many links lead to it. UserError if a folder cannot be read."""
    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}; make it readable, or move it away")

    files = []
    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(".safetensors") and not name.startswith("."):
                files.append(Path(place, name))     # macOS puts ._a.safetensors beside a file
    return sorted(files)


def open_clips(folder, latents):
    """The clips in a folder that have at least so many latents, see clip_files. UserError, one
    line, if a clip is damaged or none is long enough."""
    files = clip_files(folder)
    long_enough = []
    for file in files:
        shapes, _ = read_header(file)
        if latents_in(shapes) >= latents:
            long_enough.append(file)
    if not long_enough:
        raise UserError(f"{folder}: {len(files)} clips, none of {video_frames(latents)} frames")
    return long_enough


def write_clip(path, tensors):
    """Write a dict of tensors to a file, atomically. Creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    write_file(path, functools.partial(save_file, tensors))


def training_clips(run, latents):
    """Files of encoded clips for all stages but the first: the clips of --data that have at least
    so many latents, encoded here if they hold video; without --data, rendered clips."""
    if not run.data:
        from extras.clips import encode_video
        from extras.world import rendered_clips
        encode = functools.partial(encode_video, run.load_vae().cpu())
        return rendered_clips(run, "clips", run.settings.clips, encode)
    files = open_clips(run.data, latents)
    videos = [file for file in files if "latents" not in read_header(file)[0]]
    if not videos:
        return files
    from extras.clips import encode_videos
    encoded = encode_videos(run, videos)
    return [encoded.get(file, file) for file in files]


def read_clip(file, latents=None, track_frames=None):
    """Read the first `latents` latents of a clip and `track_frames` video frames of its tracks:
    {name: tensor}; None: all. The rest is not read from disk."""
    whole = slice(None)
    parts = {"latents": (whole, slice(latents)), "tracks": slice(track_frames),
             "visible": slice(track_frames)}
    clip = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            if name != "video":
                clip[name] = opened.get_slice(name)[parts.get(name, whole)]
    return clip


def stack(tensors, fill=0):
    """Stack tensors of clips to one (B, …), padded with `fill` to the longest along each axis."""
    lengths = zip(*[tensor.shape for tensor in tensors])
    shape = [len(tensors)] + list(map(max, lengths))
    batch = tensors[0].new_full(shape, fill)
    for row, tensor in zip(batch, tensors):
        row[tuple(slice(length) for length in tensor.shape)] = tensor
    return batch


def draw_clips(files, count, latents=None, track_frames=None):
    """Random clips, {name: (count, …)}; see read_clip. Texts are padded with zeros, tracks with
    hidden ones."""
    chosen = torch.randint(0, len(files), (count,)).tolist()
    clips = [read_clip(files[i], latents, track_frames) for i in chosen]
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

# What a user might draw [O]; P_PAUSE is the paper's (section 3.1).
ON_OBJECT = (0, 1, 1, 2, 4, 8, 16, 16)      # tracks on an object: one of these, equally likely
ON_GROUND = (0, 0, 1, 4, 9, 32, 64)         # tracks on the ground, likewise
MOVING_GROUND = 16                          # at least so many, if the ground moves: see user_tracks
P_PARTIAL = 0.15                            # share of tracks that start or end midway
P_PAUSE = 0.2                               # share of clips (of chunks, if dense) that hide all
PAUSE = (4, 16)                             # shortest and longest pause of a clip, in video frames
DENSE = (1000, 2500)                        # fewest and most dense tracks (appendix D) [P]


def goes_anywhere(tracks, visible, mine):
    """True where an object (or the ground) moves, judged by its tracks: (B, 1). tracks
    (B, T, N, 2), visible (B, T, N); mine (B, N): which tracks are on the object."""
    away = tracks - start_points(tracks, visible)[:, None]
    away = away.norm(dim=-1).nan_to_num(0)                                  # (B, T, N)
    away = away.masked_fill(~(visible & mine[:, None]), 0)
    return away.amax((1, 2))[:, None] > STILL


def user_tracks(visible, group, tracks=None):
    """Visibility (B, T, N) of random ground-truth tracks such as a user might draw: from nothing or
    a single drag to the dense grid. Some tracks start or end midway; in some clips all tracks pause
    for a while (section 3.1). group (B, N): each track's object, whose first track is its centre;
    -1: the ground.

    tracks (B, T, N, 2), if given: every object of frame 0 that moves keeps at least one track, and
    a moving ground MOVING_GROUND, which a pause or an early end may hide for a while. So a model
    learns that whatever has no track near it stays put: a single drag moves an object and not the
    camera. Otherwise the model would have to predict the mean of everything that could happen
    [O]."""
    B, T, N = visible.shape
    if N == 0:
        return visible
    keep = torch.zeros(B, N, dtype=torch.bool)
    for label in range(int(group.max()) + 1):
        mine = group == label
        centre = mine & (mine.cumsum(1) == 1)
        count = torch.tensor(ON_OBJECT)[torch.randint(0, len(ON_OBJECT), (B, 1))]
        if tracks is not None:
            count = count.maximum(goes_anywhere(tracks, visible, mine).long())
        preference = -0.5 * torch.rand(B, 1) * centre           # the centre comes early
        keep |= random_subset(mine, count, preference)
    count = torch.tensor(ON_GROUND)[torch.randint(0, len(ON_GROUND), (B, 1))]
    if tracks is not None:
        count = count.maximum(MOVING_GROUND * goes_anywhere(tracks, visible, group < 0))
    keep |= random_subset(group < 0, count)
    t = torch.arange(T)[:, None]
    ends = torch.randint(0, T, (2, B, 1, N)).sort(0).values
    whole = torch.rand(B, 1, N) >= P_PARTIAL
    shown = whole | (t >= ends[0]) & (t <= ends[1])             # (B, T, N)
    begin = torch.randint(1, T, (B, 1, 1))
    length = torch.randint(PAUSE[0], PAUSE[1] + 1, (B, 1, 1))
    pause = (t >= begin) & (t < begin + length)                 # (B, T, 1)
    pause = pause & (torch.rand(B, 1, 1) < P_PAUSE)
    return visible & keep[:, None] & shown & ~pause


def dense_subset(visible, pauses, config):
    """Visibility (B, T, N) of as many ground-truth tracks as DENSE says, or all if fewer. pauses:
    a share P_PAUSE of the chunks after the first show none (section 3.1, appendix D)."""
    B, T, _ = visible.shape
    count = torch.randint(DENSE[0], DENSE[1] + 1, (B, 1))
    keep = random_subset(visible.any(1), count)                 # (B, N)
    latent = (torch.arange(T) + FRAMES - 1) // FRAMES           # each video frame's latent frame
    after = latent - config.first_chunk_size
    chunk = (after // config.chunk + 1).clamp(min=0)            # and its chunk, from 0
    by_chunk = torch.rand(B, T, 1) >= P_PAUSE * pauses          # T draws: more than chunks
    shown = by_chunk[:, chunk]                                  # (B, T, 1), by video frame
    shown = shown | (chunk == 0)[:, None]
    return visible & keep[:, None] & shown


def given_tracks(run, tracks, visible, group, dense):
    """Visibility (B, T, N) of the ground-truth tracks given to a model: all if `dense`, else chosen
    by user_tracks. In a batch without objects (group (B, N) all -1) dense_subset chooses; if not
    `dense`, user_tracks chooses instead in a share p_sparse of the clips, 0 to 64 tracks."""
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
    touched = torch.zeros(*cell.shape[:2], h * w + 1, device=cell.device)
    touched = touched.scatter_(2, cell, 1.0)
    touched = touched[..., :-1]                                 # (B, T, h w)
    touched = F.pad(touched, (0, 0, FRAMES - 1, 0))             # as the VAE packs frame 0
    touched = touched.unflatten(1, (-1, FRAMES)).amax(2)        # (B, F, h w)
    return F.max_pool2d(touched.unflatten(2, (h, w)), 3, 1, 1)


def weight_of_cells(run, batch):
    """Weight (B, F, h, w) of each cell's error: 1 + track_weight at and beside the cells of the
    Batch's counted tracks, else 1."""
    touched = touched_cells(batch.points["tracks"], batch.counted, run.config)
    return 1 + run.settings.track_weight * touched


def draw_batch(run, files, count, length, *, dense=False, first_only=False):
    """A Batch of `count` random clips, with conditions for `length` latents and the tracks of
    given_tracks. first_only: no latents but the image's."""
    config = run.config
    latents_read = 1 if first_only else length
    clips = draw_clips(files, count, latents_read, video_frames(length))
    latents = clips["latents"].float()
    tracks = clips["tracks"]
    true = clips["visible"]
    on_object = clips["group"] >= 0                             # (B, N)
    visible = given_tracks(run, tracks, true, clips["group"], dense)
    conditions = {name: clips[name].float() for name in ("text", "clip") if name in clips}
    channels, _ = image_inputs(config, latents[:, :, :1], length)
    if channels is not None:
        conditions["image"] = channels
    points = {"tracks": tracks, "visible": visible, "ids": track_ids(tracks, config)}
    if config.copies:
        points["start"] = start_points(tracks, true)
        points["frame_0"] = clips["first"].float() / 127.5 - 1
    counted = visible
    if on_object.any():
        counted = true & on_object[:, None]
    return Batch(latents, conditions, points, counted).to(run.device)


def motion_of(model, points, vae):
    """motion_inputs of the points of a Batch."""
    device = points["tracks"].device
    with torch.autocast(device.type, enabled=False):        # in float32, as when sampling
        return motion_inputs(model, **points, vae=vae)


def latent_weight(vae, config, sigma):
    """Weight (B, C, 1, 1, 1) of squared velocity errors at sigma (B,): 1 for latents of unit
    variance; for others (ours) V * pixel_weight^2, where V is the variance of x_t.

    The factor V makes all noise levels count alike. The model's velocity is a linear part plus
    std / sqrt(V) times the network's output (with_linear_part), so V times the velocity's squared
    error is std^2 times the output's, whatever sigma is. The factor pixel_weight^2 turns errors of
    latents into errors of pixels."""
    if not config.latent_std:
        return 1.0
    _, variance = linear_part(sigma, channel_std(config, sigma.device))
    return variance * vae.pixel_weight().view(1, -1, 1, 1, 1) ** 2


def x0_weight(vae, config, device):
    """Weight (1, C, 1, 1, 1) of squared errors of x0: latent_weight at sigma 1, where x0 is
    x_t - velocity and both have the same error."""
    return latent_weight(vae, config, torch.ones(1, device=device))


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


def starting_teacher(run, vae, network=new_model):
    """The model to be trained: new, for the latents of `vae`, or from --weights, see also
    Settings.freeze_track_head."""
    config = run.config
    if config.copies:
        config = replace(config, latent_std=tuple(vae.latent_std.tolist()))
    if not run.start:
        return network(config).to(run.device)
    model = run.load("start", **vars(config)).requires_grad_(True)
    frozen = run.start.has_head and run.settings.freeze_track_head
    model.track_head.requires_grad_(not frozen)
    return model


def loss_of_teacher(run, model, vae, batch):
    """flow_loss on a Batch, with text and tracks dropped in some clips."""
    s = run.settings
    x0 = batch.latents
    sigma = draw_sigma(len(x0), run.config.shift, s.p_pure_noise, s.p_uniform_sigma)
    sigma = sigma.to(run.device)
    first_latent = first_latent_of(run.config, x0)
    with run.autocast():
        motion = drop(motion_of(model, batch.points, vae), s.p_no_tracks)
        text = drop({"text": batch.conditions["text"]}, s.p_no_text)
        conditions = batch.conditions | motion | text
        channel_weight = latent_weight(vae, model.config, sigma)
        cell_weight = weight_of_cells(run, batch)
        return flow_loss(model, x0, sigma, conditions, first_latent, cell_weight, channel_weight)


def train_teacher(run, report=no_report, network=new_model):
    """Stage 2: rectified flow on whole and short clips, given the image, text and tracks. All
    tracks are given at first, as in the paper's first stage: the model learns sooner what tracks
    mean. Whether it follows them is shown early by extras/watch.py, not by the flow loss.

    report: see no_report. network: builds a new teacher from its config; extras/experiments.py has
    one with another track head."""
    s = run.settings
    files = training_clips(run, run.clip_latents)
    held_back = files[:max(len(files) // 20, 1)]
    files = files[len(files) // 20:]                # if fewer than 20, also train on that one
    vae = run.load_vae()
    model = starting_teacher(run, vae, network)
    model.recompute_blocks(run.checkpointing)
    learner = Learner("teacher", model, s.teacher, s.teacher_updates, s.teacher_accumulate,
                      s.shard_gradients)
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
        report(loop, learner.average, vae, held_back)
    save_weights(run.path("teacher"), learner.average)


# --------------------------------------------------------------------------------------------------
# Stage 3: causal initialisation, see causal_loss.

CONTEXTS = [dict(sink=0, window=1), dict(sink=1, window=0), dict(sink=2, window=1),
            dict(sink=1, window=2), dict(sink=1, window=None)]      # besides the model's own


@torch.no_grad()
def teacher_trajectories(run, teacher, vae, batch):
    """ODE trajectories of the guided teacher: the states at the student's S sigmas, then the clean
    end, (B, S + 1, C, F, h, w)."""
    wanted = run.config.sigmas + (0.0,)
    noise = torch.randn_like(batch.latents)
    with run.autocast():
        conditions = batch.conditions | motion_of(teacher, batch.points, vae)
        trajectory = euler(teacher, noise, conditions, first_latent_of(run.config, batch.latents))
        states = [x_t for x_t, sigma in trajectory if sigma in wanted]
    assert len(states) == len(wanted), (
        f"{len(states) - 1} of {run.config.sigmas} lie on the teacher's schedule")
    return torch.stack(states, 1)


def make_trajectories(run, files):
    """Make the teacher's trajectories that no earlier run made, divided among the processes; return
    their files. Each holds a trajectory and its conditions. The folder's name holds a digest of
    what the trajectories depend on."""
    s = run.settings
    each = 2 * s.batch
    source = [guard().clip_digests(run), run.seed, each, s.p_sparse, s.track_what_moves]
    for name in "vae", "teacher":
        with open(run.path(name), "rb") as file:
            source.append(hashlib.file_digest(file, "sha256").hexdigest())
    folder = run.out / f"trajectories.{seed_of(source, run.config, s.clip_frames):08x}"
    count = math.ceil(s.trajectories / each) * each
    paths = [folder / f"{i:07}.safetensors" for i in range(count)]
    starts = range(0, count, each)
    missing = [i for i in starts if not paths[i + each - 1].exists()]
    missing = from_first(missing)       # another process may have begun to make them
    teacher = run.load("teacher")
    vae = run.load_vae()
    for start in tqdm(missing[RANK::PROCESSES], f"trajectories, by {each}", disable=not missing):
        torch.manual_seed(seed_of(run.seed, "trajectories", start))
        batch = draw_batch(run, files, each, run.clip_latents)
        clips = {"states": teacher_trajectories(run, teacher, vae, batch).half()}
        clips |= batch.conditions
        clips |= {f"points.{name}": value for name, value in batch.points.items()}
        for row, path in enumerate(paths[start:start + each]):
            write_clip(path, {name: value[row] for name, value in clips.items()})
    wait_for_all(LATE)
    return paths


def draw_trajectories(run, files, count):
    """(states, one per noise level; x0; points; conditions) of random trajectories, see
    make_trajectories."""
    clips = draw_clips(files, count)
    clips = {name: value.to(run.device) for name, value in clips.items()}
    states = clips.pop("states").float()                        # (B, S + 1, C, F, h, w)
    points = {}
    for name in [name for name in clips if name.startswith("points.")]:
        points[name.removeprefix("points.")] = clips.pop(name)
    *states, x0 = states.unbind(1)                              # each (B, C, F, h, w)
    return states, x0, points, clips


def loss_in_context(run, student, vae, trajectories, channel_weight, loss_of=None):
    """causal_loss, or loss_of in its place, under a random sink and window; three draws in eight
    use the model's own. trajectories: what draw_trajectories returns."""
    loss_of = loss_of or causal_loss
    states, x0, points, conditions = trajectories
    own = dict(sink=run.config.sink, window=run.config.window)
    contexts = [own, own, own] + CONTEXTS
    context = contexts[int(torch.randint(0, len(contexts), ()))]
    motion = motion_of(student, points, vae)
    past = None
    if run.settings.corrupt_context:
        experiments = extra("experiments", "corrupt_context damages the past")
        past = experiments.corrupt_context(x0, next(chunk_sizes(run.config)))
    return loss_of(student, states, x0, conditions | motion, context, channel_weight, past)


def loss_on_rollouts(run, student, vae, files, update):
    """rollout_loss on random clips; of a copying model, whose VAE is cheap, in pixels. All
    processes use the same exit step within an update; otherwise their collectives would
    deadlock."""
    s = run.settings
    batch = draw_batch(run, files, s.batch, run.clip_latents)
    rng = torch.Generator().manual_seed(seed_of(run.seed, "exit", update))
    exit_step = int(torch.randint(0, len(run.config.sigmas), (), generator=rng))
    conditions = batch.conditions | motion_of(student, batch.points, vae)
    x0 = batch.latents
    first_latent = first_latent_of(run.config, x0)
    weight = weight_of_cells(run, batch)[:, None]                           # (B, 1, F, h, w)
    if not run.config.copies:
        return rollout_loss(student, x0, conditions, first_latent, exit_step, weight)
    weight = F.interpolate(weight, scale_factor=(FRAMES, vae.stride, vae.stride))
    weight = weight[:, :, FRAMES - 1:]                  # of the first latent, one frame is shown

    def decode(latents):
        with torch.autocast(latents.device.type, enabled=False):    # it would round small errors
            return vae.decode_unclamped(latents.float())[0]

    return rollout_loss(student, x0, conditions, first_latent, exit_step, weight, decode)


def loss_of_causal(run, student, vae, files, channel_weight, update):
    """The loss of a micro-step on random `files`, of the kind that Settings.causal_from names."""
    s = run.settings
    if s.causal_from == "rollouts":
        return loss_on_rollouts(run, student, vae, files, update)
    if s.causal_from == "trajectories":
        trajectories = draw_trajectories(run, files, s.batch)
    else:
        experiments = extra("experiments", f"causal_from={s.causal_from}")
        trajectories = experiments.draw_noised_clips(run, files, s.batch)
    return loss_in_context(run, student, vae, trajectories, channel_weight)


def to_be_trained(run, model):
    """Unfreeze a MotionStream except its track head, frozen after the teacher (appendix D), and
    set checkpointing. Returns it."""
    model.requires_grad_(True)
    model.track_head.requires_grad_(False)
    return model.recompute_blocks(run.checkpointing)


def train_causal(run, report=no_report):
    """Stage 3: the student, initialised from the teacher, learns from ODE trajectories or its own
    rollouts, see loss_of_causal. report: see no_report."""
    s = run.settings
    if s.causal_from == "consistency":
        return extra("experiments", "causal_from=consistency").train_consistency(run, report)
    files = training_clips(run, run.clip_latents)       # collective: call it in all processes
    if s.causal_from == "trajectories":
        files = make_trajectories(run, files)
    vae = run.load_vae()
    student = to_be_trained(run, run.load("teacher", causal=True, **run.streaming))
    weight = x0_weight(vae, student.config, run.device)
    learner = Learner("causal", student, s.causal, s.causal_updates, s.causal_accumulate,
                      s.shard_gradients)
    loop = Loop(run, "causal", s.causal_updates, learner)
    for update in loop:
        for _ in loop.micro_steps():
            with run.autocast(), gathered(student):
                loss = loss_of_causal(run, student, vae, files, weight, update)
            learner.backward(loss)
            loop.log(loss=loss)
        loop.log(grad=learner.update(update))
        export_weights(run, "causal", learner.average, update + 1)
        report(loop, learner.average, vae, files)
    save_weights(run.path("causal"), learner.average)


# --------------------------------------------------------------------------------------------------
# Stage 4: distillation, see dmd_loss and critic_loss.

@dataclass(frozen=True)
class Plan:
    """The rollouts of an update. All processes use the same plan; otherwise their collectives would
    deadlock."""
    chunks: int             # length
    exit_step: int          # the denoising step whose x0 is used, see motionstream.rollout
    streaming: dict         # the student's chunk and cache settings, see Run.streaming


def draw_plan(run, update, learner):
    """The Plan for an update of `learner`, "generator" or "critic". Half of the plans are longer
    than a clip."""
    rng = torch.Generator().manual_seed(seed_of(run.seed, update, learner))

    def draw(count):
        """An integer from 0 to count - 1."""
        return int(torch.randint(count, (), generator=rng))

    chunks = run.clip_chunks
    longer = run.longest_rollout - run.clip_chunks
    if longer and draw(2):
        chunks += 1 + draw(longer)
    exit_step = draw(len(run.config.sigmas))
    return Plan(chunks, exit_step, run.streaming)


def conditions_of_first(conditions, count):
    """The conditions of the first `count` latents of a clip."""
    return next(split_conditions(conditions, [count]))


def judged_clip(chunks, count, image_latent, points):
    """Cut a clip of `count` latents, which the teacher can judge, from a rollout, an iterator of
    chunks: (x0 (B, C, count, h, w), points). A rollout of that length is the clip. From a longer
    one, take the last `count` latents and replace the first of them by image_latent
    (B, C, 1, h, w), after which time jumps. So the teacher is given the true image, even if the
    student has drifted from it."""
    held = []                                           # the latest chunks
    length = 0                                          # latents of the whole rollout
    for chunk in chunks:
        held.append(chunk)
        length += chunk.shape[2]
        while sum(later.shape[2] for later in held[1:]) >= count:
            held.pop(0)                                 # not needed; frees its graph, too
    x0 = torch.cat(held, 2)[:, :, -count:]
    if length > count:
        x0 = torch.cat([image_latent, x0[:, :, 1:]], 2)
    end = points["tracks"].shape[1]                     # of the video frames, keep 0 and the last
    times = [0] + list(range(end - video_frames(count) + 1, end))
    cut = {name: points[name][:, times] for name in ("tracks", "visible")}
    return x0, points | cut


def generated_clip(run, generator, vae, files, plan, grad):
    """Roll out the generator from the first frames of clips by a Plan, as at inference. Returns the
    judged_clip x0 (B, C, F, h, w), its conditions and its points. grad: keep the graph of each
    chunk's last denoising step."""
    config = run.config
    length = run.latents_of(plan.chunks)
    sizes = list(chunk_sizes(replace(config, **plan.streaming), length))
    batch = draw_batch(run, files, run.settings.batch, length, first_only=True)
    image_latent = batch.latents                        # (B, C, 1, h, w)
    B, C, _, h, w = image_latent.shape
    text = batch.conditions["text"]
    if plan.chunks > run.clip_chunks and run.settings.neutral_long_rollouts:
        text = embed_words(NEUTRAL, config).to(run.device).expand(B, -1, -1)
    of_rollout = batch.conditions | {"text": text}
    noise = torch.randn(B, C, length, h, w, device=run.device)
    first_latent = first_latent_of(config, image_latent)
    caches = generator.new_caches(**plan.streaming)
    with run.autocast(), torch.set_grad_enabled(grad), gathered(generator):
        motion = motion_of(generator, batch.points, vae)
        by_chunk = split_conditions(of_rollout | motion, sizes)
        chunks = rollout(generator, noise.split(sizes, 2), by_chunk, first_latent,
                         plan.exit_step, caches=caches)
        chunks = itertools.islice(chunks, len(sizes))   # stops there: the last is not cached
        x0, points = judged_clip(chunks, run.clip_latents, image_latent, batch.points)
        # Teacher and critic share these features: all three have the same frozen track head.
        motion = motion_of(generator, points, vae)
    conditions = conditions_of_first(of_rollout, run.clip_latents) | motion
    return x0, conditions, points


def loss_of_generator(run, generator, teacher, critic, vae, files, plan):
    """(dmd_loss of a new rollout, numbers to be logged)."""
    x0, conditions, points = generated_clip(run, generator, vae, files, plan, grad=True)
    weight = x0_weight(vae, teacher.config, run.device)
    numbers = {"std": x0.std()}
    if run.reward:
        from extras.reward_forcing import clip_weight
        of_clips, numbers["reward"] = clip_weight(run, vae, x0, conditions, points)
        weight = weight * of_clips
    with run.autocast():
        first_latent = first_latent_of(run.config, x0.detach())
        loss = dmd_loss(x0, teacher, critic, conditions, first_latent, run.config.shift, weight)
    numbers["loss_g"] = loss
    return loss, numbers


def loss_of_critic(run, generator, critic, vae, files, plan):
    """critic_loss of a new rollout."""
    x0, conditions, _ = generated_clip(run, generator, vae, files, plan, grad=False)
    weight_at = functools.partial(latent_weight, vae, critic.config)
    with run.autocast():
        first_latent = first_latent_of(run.config, x0)
        return critic_loss(x0, critic, conditions, first_latent, run.config.shift, weight_at)


def real_score(run):
    """The frozen teacher: sharded in float32 or, by replicate_teacher, whole in every process, in
    bfloat16 except for motionstream.FLOAT32. Then its passes gather nothing."""
    if run.settings.replicate_teacher:
        return run.load("teacher", torch.bfloat16)
    return shard(run.load("teacher"))


def distill(run, report=no_report, draw_plan=draw_plan):
    """Stage 4, Self-Forcing: critic_steps critic updates per generator update, each on new
    rollouts. report: see no_report. draw_plan: extras/experiments.py has one that draws more."""
    s = run.settings
    files = training_clips(run, latents=1)
    vae = run.load_vae()
    teacher = real_score(run)
    generator = to_be_trained(run, run.load("causal", **run.streaming))
    critic = to_be_trained(run, run.load("teacher"))
    learner_g = Learner("generator", generator, s.generator,
                        math.ceil(s.distill_updates / s.critic_steps),
                        s.distill_accumulate, s.shard_gradients)
    learner_c = Learner("critic", critic, s.critic, 0, s.distill_accumulate, s.shard_gradients)
    loop = Loop(run, "distill", s.distill_updates, learner_g, learner_c)
    for update in loop:
        if update % s.critic_steps == 0:
            plan = draw_plan(run, update, "generator")
            for _ in loop.micro_steps():
                loss, numbers = loss_of_generator(
                    run, generator, teacher, critic, vae, files, plan)
                learner_g.backward(loss)
                loop.log(**numbers)
            count = update // s.critic_steps
            loop.log(grad_g=learner_g.update(count))
            export_weights(run, "student", learner_g.average, count + 1)
        plan = draw_plan(run, update, "critic")
        for _ in loop.micro_steps():
            loss = loss_of_critic(run, generator, critic, vae, files, plan)
            learner_c.backward(loss)
            loop.log(loss_c=loss)
        loop.log(grad_c=learner_c.update(update))
        report(loop, generator, teacher, critic, vae, files)
    save_weights(run.path("student"), learner_g.average)


def train_vae(run, report=no_report):
    """Stage 1: the tiny model's VAE, see extras/linear_vae.py."""
    from extras.linear_vae import train_vae
    train_vae(run, report)


STAGES = {"vae": train_vae, "teacher": train_teacher, "causal": train_causal,
          "distill": distill}


# --------------------------------------------------------------------------------------------------
# The command.

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
    """The flags of a training run except --stage, shared with programs in extras."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = number(int, 1, 10 ** 9)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a few updates of everything, in some minutes")
    add("--out", type=Path, help="folder to write to (runs/tiny; runs/smoke with --smoke)")
    add("--data", type=Path, help="a folder of clips, see above (none: clips are rendered)")
    add("--weights", type=Path, help="the teacher's start: a Wan DiT, or a teacher made here")
    add("--vae", type=Path, help="a finished VAE's file; the stage vae is left out")
    add("--steps", type=count, help="updates of the one stage that is named")
    add("--seed", type=int, default=0, help="seed of everything random (0)")
    add("--device", help="cpu, cuda:0, … (cuda if there is one)")
    add("--accumulate", type=count,
        help="micro-steps of each process an update (1; Wan's: the paper's)")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute blocks in the backward: less memory (default for Wan's weights)")
    add("--memory", type=memory_flag, help="the student's chunk, sink, window (c3s1w1)")
    add("--guidance", type=guidance_flag,
        help="weights T,M of text and motion, for trajectories and real score")
    add("--rollout", type=number(int, 1, 100), help="chunks of the longest rollout (16)")
    add("--reward", help="weights clips in distillation: motion, or FILE.py:FUNCTION (none)")
    add("--dry-run", nargs="?", choices=PRESETS, const="tiny", help="print the cost, then stop")
    add("--set", type=assignment, action="append", default=[], metavar="FIELD=VALUE",
        help="override a field of Settings or Config; repeatable")
    return parser


def parse(argv, parser=None):
    """Parse the command line of this program, or of one whose parser comes from new_parser. Flags
    that change single fields of Config or Settings become part of flags.set, a list of (field,
    value) to be applied in order."""
    if parser is None:
        parser = new_parser(__doc__)
        parser.add_argument("--stage", choices=["all", *STAGES], default="all", help="(all)")
    flags = parser.parse_args(argv)
    stage = flags.stage
    changes = dict(flags.memory or {})
    if flags.guidance:
        changes["guidance"] = flags.guidance
    if flags.data:                      # a clip's tracks may end with it
        changes |= {"rollout": 0, "neutral_long_rollouts": False}
    if flags.smoke:
        changes |= SMOKE
    if flags.rollout:
        changes["rollout"] = flags.rollout
    if flags.steps and stage in STAGES:
        changes[f"{stage}_updates"] = flags.steps
    if flags.accumulate:
        for each in STAGES:
            changes[f"{each}_accumulate"] = flags.accumulate * PROCESSES
    flags.set = list(changes.items()) + flags.set
    return flags


def assign(settings, path, value):
    """Copy of a frozen dataclass with the field "a", or "a.b", set to a value."""
    name, _, inner = path.partition(".")
    if inner:
        value = assign(getattr(settings, name), inner, value)
    return replace(settings, **{name: value})


def starting_config(start, preset):
    """The config to train before flags change it: the config of the weights `start`
    (sample.Weights) or, if that is None, of a preset. Weights without a track input get one. Wan's
    weights get the paper's sampling settings, but keep their first_chunk."""
    config = start.config if start else PRESETS[preset]
    if start and not config.track_dim:
        slot = config.out_dim
        config = replace(config, track_dim=slot, in_dim=config.in_dim + slot)
    if config.is_wan:
        paper = PRESETS["motionstream-1.3b"]
        names = ("shift", "sigmas", "guidance", "chunk", "sink", "window")
        config = replace(config, **{name: getattr(paper, name) for name in names})
        # 48 of the preset's 50 steps: a teacher whose steps are a multiple of 3 passes through the
        # student's 3 noise levels.
        steps = paper.steps - paper.steps % len(paper.sigmas)
        config = replace(config, steps=steps)
    return config


def paper_settings(config, has_head):
    """The paper's settings: with a track head those of the teacher's second stage, else those of
    its first stage. Both hold the settings of the stages after the teacher."""
    if config.out_dim == PRESETS["wan2.2-5b"].out_dim:
        return PAPER_5B_STAGE_2 if has_head else PAPER_5B
    return PAPER_STAGE_2 if has_head else PAPER


def starting_settings(start, config):
    """The settings before flags change them: the tiny model's, or the paper's."""
    has_head = bool(start) and start.has_head
    settings = paper_settings(config, has_head) if config.is_wan else TINY
    if start:
        settings = replace(settings, dense_share=0.0 if has_head else 1.0)
    return settings


def resolve(flags):
    """Resolve what parse returns, and the weights named there, into a Run. Raises a one-line
    UserError if they are inconsistent."""
    start = inspect(flags.weights) if flags.weights else None
    config = starting_config(start, flags.dry_run or "tiny")
    settings = starting_settings(start, config)
    guard().check_flags(flags, config, settings)
    for path, value in flags.set:
        if path in vars(config):
            config = assign(config, path, value)
        else:
            settings = assign(settings, path, value)
    named = [path for path, _ in flags.set]
    if "shift" in named and "sigmas" not in named:
        config = replace(config, sigmas=schedule(len(config.sigmas), config.shift))
    out = flags.out or Path("runs/smoke" if flags.smoke else "runs/tiny")
    files = {name: out / f"{name}.safetensors" for name in WEIGHTS.values()}
    files["vae"] = flags.vae or files["vae"]
    files["start"] = flags.weights
    device = str(find_device(flags.device or default_device()))
    checkpointing = flags.checkpointing
    if checkpointing is None:
        checkpointing = config.is_wan      # without it, 81 frames need 135 GiB of activations
    reward = None
    if flags.reward:
        from extras.evaluate import find_reward
        reward = find_reward(flags.reward)
    run = Run(out, flags.seed, device, compute_dtype(device), config, settings, files, flags.data,
              start, reward, checkpointing)
    guard().check_run(run, flags)
    return run


def run_stages(argv):
    """Run the named stage, or all that are not done yet."""
    flags = parse(argv)
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
    watch = extra("watch")              # None: nothing is measured or shown
    report = watch.report if watch else no_report
    with guard().own_folder(run.out):
        if watch:
            watch.print_plan(run, stages)
        for stage in stages:
            guard().check_stage(run, stage)
            torch.manual_seed(seed_of(run.seed, stage))     # for the initial weights
            STAGES[stage](run, report)
            if watch:
                watch.show(run, stage)
    if flags.stage == "all" and RANK == 0 and not run.data:
        print(f"to measure it: python -m extras.evaluate --out {run.out}")


def main(argv=None):
    """Run the program; returns the exit code."""
    return reported(run_stages, argv)


if __name__ == "__main__":
    import train_distill        # by name, as extras import it: only one copy runs
    sys.exit(train_distill.main())
