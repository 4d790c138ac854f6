"""Train a tiny MotionStream from nothing, on video that extras/world.py draws: every stage of the paper, in order.

    vae      a tiny video autoencoder
    teacher  bidirectional rectified flow, given the first frame, text and tracks
    causal   the student: regression on the teacher's ODE trajectories, chunk by chunk through the KV cache
    distill  Self-Forcing DMD: the student rolls out as it will at inference, teacher and critic score the result

    python train_distill.py                  all of it, resumed where it stopped; --smoke: a few steps, to see it run
    python train_distill.py --stage teacher  one stage
    python train_distill.py --data FOLDER --weights DIR --vae FILE    on your own clips, from Wan's weights, see README
    torchrun --nproc-per-node 2 train_distill.py    in two processes, which share the steps and the weights

Shapes are those of motionstream.py. Everything is written under --out (runs/tiny): weights, checkpoints, stats.jsonl,
a loss curve and a preview sheet for each stage.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
import zlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads wait awake, but briefly

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from extras.encoders import listing
from extras.world import new_scenes, render, scene_tracks, track_groups
from motionstream import (PRESETS, Block, KVCache, MotionStream, UserError, add_noise, split_conditions, copy_along_tracks,
                          euler, guided_velocity, image_channels, linear_part, rollout, save_pretrained, schedule,
                          shift_sigma, to_x0, track_features, track_ids, with_first, write)
from sample import ASSETS, UMT5_DIM, Parser, embed_words, has_mask, hold_signals, inspect, number, open_vae
from vae import FRAMES, LinearVAE

# ----------------------------------------------------------------------------------------------------------------------
# What every stage shares: optimizer, running average, the loop with its log and checkpoints, files and pictures.

NEUTRAL = PRESETS["tiny"].prompt
TRACKS = 2500                            # of a clip of --data, at most: the paper's grid of 50x50
SIZE, CLIP = 128, 45                     # pixels per side; frames of a clip: 12 latents, 4 chunks of 3
RANK, LOCAL, PROCESSES = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

# The numbers of a training: for the tiny model ours, for Wan's the paper's (1.3B; section 4.1, appendix D), if known.
# Rates are Muon's and AdamW's (None: AdamW on all), steps are of `batch` clips and, like accumulate, by stage.
RECIPES = {
    "tiny": {"clip": CLIP, "batch": 4, "accumulate": (1, 1, 1, 1), "steps": (400, 6000, 800, 1200),
             "teacher": (0.015, 3e-3), "causal": (2e-3, 1e-3), "generator": (1e-3, 1e-4), "critic": (2e-3, 2e-4),
             "critic_steps": 5,
             "clips": (256, 4096, 480), "at_sigma_1": 0.5, "emphasis": 4.0, "worn": True},
    "paper": {"clip": 81, "batch": 1, "accumulate": (1, 128, 128, 64), "clips": (0, 0, 4000), "worn": False,
              "steps": (0, 614_400, 256_000, 128_000), "at_sigma_1": 0.0, "emphasis": 0.0,
              "teacher": (None, 1e-5), "causal": (None, 2e-6), "generator": (None, 2e-6), "critic": (None, 4e-7),
              "critic_steps": 5}}
# The teacher's second stage starts from the weights of the first: 800 updates, with pauses, the track head as it is.
RECIPES["second"] = RECIPES["paper"] | {"teacher": (None, 1e-6), "steps": (0, 102_400, *RECIPES["paper"]["steps"][2:])}


def seed_of(*what):
    """A seed for torch from anything printable, the same in every process."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def mean_processes(tensor):
    """The mean of the processes' tensors, in place, in all of them. They wait for each other."""
    if PROCESSES > 1:
        dist.all_reduce(tensor)
    return tensor.div_(PROCESSES)


def matmul_seconds(dtype):
    """What a product of the tiny model's size, a clip's tokens by a layer of its FFN, takes on the CPU under autocast to
    `dtype`: the best of three, of which the first warms up the threads."""
    tokens, weight, seconds = torch.zeros(768, 192), torch.zeros(576, 192), []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            F.linear(tokens, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@functools.cache
def cpu_dtype():
    """bfloat16 if the CPU is clearly faster in it, else float32: without AVX-512 or AMX it is 10 times slower. The same
    in all processes, which have to ask together at first."""
    ratio = torch.tensor(matmul_seconds(torch.bfloat16) / matmul_seconds(torch.float32))
    return torch.bfloat16 if mean_processes(ratio) < 0.8 else torch.float32


def compute_dtype(device):
    """What matrix products are computed in on a device ("cpu", "cuda:0")."""
    return cpu_dtype() if torch.device(device).type == "cpu" else torch.bfloat16


def ends_update(i, batches):
    """Whether the processes are at the end of an update when each has done its step, here i, of the next PROCESSES."""
    return (i - RANK + PROCESSES) % batches == 0


def shard(model):
    """Divide a MotionStream's parameters among the processes, in place (FSDP2); a VAE stays whole in all. While a block
    runs, its own are gathered, in float32, which autocast rounds as in one process; while the model runs, the rest."""
    if PROCESSES > 1 and isinstance(model, MotionStream):
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (PROCESSES,))
        for part in *model.blocks, model.track_head, model:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)    # the root too: an average has no backward
        fully_shard.state(model)._lazy_init()       # else the track head, which runs first, would be taken for the root
    return model


def whole(state):
    """A state dict, or a value in one, with sharded tensors gathered: on process 0's CPU; in others, without data."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state.full_tensor().to("cpu" if RANK == 0 else "meta") if isinstance(state, DTensor) else state


def split(state, like):
    """The reverse: each process keeps its shards, as in `like`, a parameter or a dict of what has the same names."""
    if isinstance(state, dict):
        return {name: split(value, like[name] if isinstance(like, dict) else like) for name, value in state.items()}
    place = isinstance(like, DTensor) and state.ndim and (like.device_mesh, like.placements)    # not a count
    return distribute_tensor(state, *place, src_data_rank=None) if place else state


def recomputed(block, *inputs):
    """Block.forward that keeps its inputs only, and computes the rest again in the backward: from a copy of the cache,
    which has been written to by then. Only passes without a graph write."""
    *inputs, cache, write = inputs
    cache = cache if write else copy.copy(cache)
    return torch.utils.checkpoint.checkpoint(Block.forward, block, *inputs, cache, write, use_reentrant=False)


def orthogonal(matrix, dtype):
    """Nearly U V^T of a matrix U S V^T (rows, columns): a Newton-Schulz iteration in `dtype` that brings all singular
    values which are not tiny between 0.7 and 1.2 in five steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)                    # no singular value above 1
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with its constants, but in a dtype that is given: there it is bfloat16, in which many CPUs are
    slow. Parameters are matrices (rows, columns), or DTensors of them."""

    def __init__(self, parameters, lr, weight_decay, dtype):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """An update by Nesterov's momentum of the gradients, made orthogonal."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)
                if isinstance(update, DTensor):
                    update = update.full_tensor()       # gathered once; each process makes all of it orthogonal
                update = split(orthogonal(update, self.dtype), p)
                rows, columns = p.shape
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)


class Optimizer:
    """Muon on hidden matrices (kernels viewed as matrices; None: on none), AdamW on the rest; ema > 0: running average.
    An update follows the mean gradient of `batches` steps, which the processes share, as they do a MotionStream, its
    average and the optimizers' states: see shard. Muon multiplies whole matrices, which it gathers one by one."""

    def __init__(self, model, muon, adam, betas=(0.9, 0.99), steps=0, ema=0.0, batches=1, checkpointing=False):
        self.model, self.ema, self.batches, inner = model, ema, batches, ("blocks", "encoder", "decoder")
        self.average = shard(copy.deepcopy(model).requires_grad_(False)) if ema else nn.Module()
        self.sharded = isinstance(shard(model), FSDPModule)
        for block in model.blocks if checkpointing else ():
            block.forward = recomputed.__get__(block)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        hidden = [p for name, p in model.named_parameters() if muon and name.split(".")[0] in inner
                  and p.requires_grad and name.endswith("weight") and p.ndim > 1]
        self.views = [(nn.Parameter(p.data.flatten(1)), p) for p in hidden]     # they share memory with the model
        rest = [p for p in self.parameters if id(p) not in set(map(id, hidden))]
        self.optimizers = [torch.optim.AdamW(rest, lr=adam, betas=betas, weight_decay=0.01)]
        if muon:
            dtype = compute_dtype(self.parameters[0].device)
            self.optimizers.insert(0, Muon([view for view, _ in self.views], muon, weight_decay=0.01, dtype=dtype))
        self.rates, self.steps = [rate for rate in (muon, adam) if rate], steps

    def step(self, loss, i, every=1, clip=1.0):
        """Backward of step i; after the last of an update, clip and update, one in `every` updates of the stage. The
        learning rate warms up over 20 updates and falls to 0 over the last 40 % of `steps` (0: it stays). Returns the
        gradient norm, None without an update; FloatingPointError, before anything moves, if it is not finite."""
        (loss * PROCESSES / self.batches).backward()                    # the mean of the processes is taken below
        if not ends_update(i, self.batches):
            return None
        for p in () if self.sharded else self.parameters:
            mean_processes(p.grad)
        count, norm = i // self.batches // every, nn.utils.clip_grad_norm_(self.parameters, clip)
        norm = norm.full_tensor() if self.sharded else norm
        if not norm.isfinite():
            raise FloatingPointError(f"loss {loss.item()}, gradient norm {norm.item()}")
        scale = min(1.0, (count + 1) / 20, (self.steps - count) / (0.4 * self.steps) if self.steps else 1.0)
        for view, p in self.views:
            view.grad = p.grad.flatten(1)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
        self.model.zero_grad()
        if self.ema:
            pairs = list(self.average.parameters()), [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(*pairs, 1 - min(self.ema, count / (count + 10)))
        return norm

    def parts(self, name=""):
        """What a checkpoint needs of it."""
        optimizers = {f"{name} optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return {f"{name} model": self.model, f"{name} average": self.average, **optimizers}


def load_checkpoint(folder, stage, settings, parts):
    """Put the newest checkpoint of the stage that is whole into `parts`; the step to go on with."""
    for path in sorted(folder.glob(f"{stage}.*.checkpoint.pt"), reverse=True):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            was, step = saved.pop("settings"), saved.pop("step")
        except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as e:
            print(f"{path}: damaged ({type(e).__name__}), going back to the one before it")
            continue
        changed = [f"{key} {was.get(key)}, now {value}" for key, value in settings.items() if was.get(key) != value]
        if changed:
            raise UserError(f"{path}: is of other settings ({'; '.join(changed)}); choose another --out or remove it")
        for name, part in parts.items():
            parameters = {} if isinstance(part, nn.Module) else dict(enumerate(part.param_groups[0]["params"]))
            part.load_state_dict(split(saved[name], part.state_dict() | {"state": parameters}))
        print(f"{path.name}: resumed at step {step}")
        return step
    return 0


def save_checkpoint(folder, stage, step, settings, parts):
    """To a file of its own, whole, so that any number of processes can go on; the newest two of a stage stay."""
    path, states = folder / f"{stage}.{step:07}.checkpoint.pt", {k: whole(v.state_dict()) for k, v in parts.items()}
    if RANK > 0:
        return
    write(path, functools.partial(torch.save, {"step": step, "settings": settings, **states}))
    for old in sorted(folder.glob(f"{stage}.*.checkpoint.pt"))[:-2]:
        old.unlink()


def train(run, stage, steps, parts, step, average=None):
    """Call step(i) for i < steps: a dict of numbers to log. `parts` {name: object with state_dict} is what a resumed
    run needs besides; random numbers are drawn anew from (seed, stage, i) each step, so that resuming changes nothing.
    Ctrl-C and SIGTERM finish the step, save, and exit with 130 or 143. In the end, `average` is saved as weights."""
    steps = max(steps - steps % run.batches, run.batches)       # whole updates: processes would wait in vain
    settings = {"steps": steps, **run.settings(stage)}
    begin, saved_at = load_checkpoint(run.out, stage, settings, parts), time.time()
    with hold_signals() as stop, open(run.out / "stats.jsonl" if RANK == 0 else os.devnull, "a", buffering=1) as log:
        bar = tqdm(range(begin + RANK, steps, PROCESSES), stage, disable=RANK > 0)
        for i in bar:
            torch.manual_seed(seed_of(run.seed, stage, i))
            started = time.time()
            try:
                numbers = {k: round(torch.as_tensor(v).item(), 5) for k, v in step(i).items() if v is not None}
            except FloatingPointError as e:
                raise UserError(f"{stage}, step {i}: {e}; stopped before anything moved") from None
            bar.set_postfix(numbers)
            numbers = {"stage": stage, "step": i, **numbers, "seconds": round(time.time() - started, 3)}
            numbers["dtype"] = str(run.dtype)[6:]                      # after "torch."
            log.write(json.dumps(numbers) + "\n")
            if ends_update(i, run.batches):
                stopped, due = mean_processes(torch.tensor([len(stop) > 0, time.time() - saved_at > 300]).float())
                if stopped or due:
                    save_checkpoint(run.out, stage, i - RANK + PROCESSES, settings, parts)
                    saved_at = time.time()
                if stopped:
                    raise SystemExit(128 + (stop or [15])[0])          # SIGTERM, which another process got
        save_checkpoint(run.out, stage, steps, settings, parts)
    if average:
        tensors = whole(average.state_dict())
        if RANK == 0:
            with torch.device("meta"):
                plain = MotionStream(average.config)                   # one that is not sharded
            plain.load_state_dict(tensors, assign=True)
            save_pretrained(plain, run.path(WEIGHTS[stage]), torch.float16)
        mean_processes(torch.zeros(1))                                 # the others go on when the file is there


# Stage 1: the tiny VAE.

def psnr(a, b):
    """Decibels between videos in [-1, 1]."""
    return -10 * math.log10((a - b).square().mean().item() / 4 + 1e-10)


def reconstruction_loss(output, video):
    """Of pixels, and of their differences, in videos (B, 3, T, H, W)."""
    error = output.float() - video
    return error.abs().mean() + 4 * error.square().mean() + sum(error.diff(dim=d).abs().mean() for d in (3, 4))


def drawn_videos(run):
    """The videos that a VAE is trained on: (n, 3, CLIP, SIZE, SIZE) uint8."""
    rng = torch.Generator().manual_seed(seed_of(run.seed, "vae"))
    videos = []
    for _ in tqdm(range(0, run.vae_clips, 8), "render for the vae"):
        video = render(new_scenes(8, CLIP, rng), SIZE)
        videos.append(((video + 1) * 127.5).round().byte())
    return torch.cat(videos)


def draw_crops(videos, count=8):
    """Crops of drawn videos, of three the one where most happens: (count, 3, 17, 64, 64) in [-1, 1]."""
    def crop():
        n, t, y, x = (int(torch.randint(limit, ())) for limit in (len(videos), CLIP - 16, SIZE - 63, SIZE - 63))
        return videos[n, :, t:t + 17, y:y + 64, x:x + 64]

    chosen = [max((crop() for _ in range(3)), key=lambda c: c[:, ::8].float().var()) for _ in range(count)]
    return torch.stack(chosen).float() / 127.5 - 1


def principal_components(vae, videos):
    """Give a LinearVAE the principal components of its cells, in the middle of its windows, to start from. Cells in
    which something is to be seen count more. videos (n, 3, T, H, W) uint8; T: every 4 frames are a cell's."""
    side, channels, overlap = vae.stride, vae.config.latent_channels, vae.config.overlap
    moment, total = 0, 0
    for video in videos:
        x = video[:, :video.shape[1] // FRAMES * FRAMES].float() / 127.5 - 1
        x = x.unflatten(1, (-1, FRAMES)).unflatten(3, (-1, side)).unflatten(5, (-1, side))   # (3, F, 4, h, 8, w, 8)
        cells = x.permute(1, 3, 5, 0, 2, 4, 6).flatten(0, 2)                           # (F h w, 3, 4, 8, 8)
        spread = cells.flatten(2).var(2).mean(1)
        weight = (spread / 0.05).clamp(0.1, 5)
        flat = cells.flatten(1)                                                        # (F h w, 768)
        moment = moment + (flat * weight[:, None]).T @ flat
        total = total + weight.sum()
    _, vectors = torch.linalg.eigh(moment / total)
    basis = vectors.flip(1)[:, :channels].T.reshape(channels, 3 * FRAMES, side, side)
    inner = slice(overlap, overlap + side)
    with torch.no_grad():
        for layer in vae.encoder, vae.decoder:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[:, :, inner, inner] = basis


def normalise_latents(vae, videos):
    """Fold into a LinearVAE's weights that its latents have, by channel, a standard deviation (about 0) that is the
    square root of what the channel is worth in pixels, scaled to 1 in the mean and kept within 0.6 to 2: the coarse
    channels, which come first out of the noise, are the larger ones. videos (n, 3, T, H, W) uint8."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(video[None, :, :CLIP].float() / 127.5 - 1) for video in videos])
        std = latents.square().mean((0, 2, 3, 4)).sqrt()
        worth = (std * vae.decoder.weight.flatten(1).norm(dim=1)).sqrt()
        wanted = (worth / worth.square().mean().sqrt()).clamp(0.6, 2)
        gain = wanted / std
        vae.encoder.bias *= gain
        vae.encoder.weight *= gain.view(-1, 1, 1, 1)
        vae.decoder.weight /= gain.view(-1, 1, 1, 1)
        vae.latent_std.copy_(wanted)


def train_vae(run):
    """The linear code, from principal components on, by reconstruction alone."""
    vae, videos = LinearVAE().to(run.device), drawn_videos(run)
    principal_components(vae, videos[:64])
    optimizer = Optimizer(vae, muon=None, adam=3e-4, steps=run.steps["vae"] // run.batches, batches=run.batches)

    def step(i):
        video = draw_crops(videos).to(run.device)
        output, _ = vae.decode_unclamped(vae.encode(video))
        error = output - video
        loss = error.square().mean() + 0.1 * sum(error.diff(dim=d).square().mean() for d in (3, 4))
        return {"loss": loss, "psnr": psnr(output.detach(), video), "grad": optimizer.step(loss, i)}

    train(run, "vae", run.steps["vae"], optimizer.parts(), step)
    normalise_latents(vae, videos[:64].to(run.device))
    save_pretrained(vae, run.path("vae"), torch.float16, **vae.metadata())


# Clips, filmed and encoded once, and the batches drawn from them.

def keep(path, tensors):
    """A dict of tensors as a file, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, save_file, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def kept(run, name, source, count, make):
    """Files of `count` clips, several in each: make(run, name) is a function from i to some clips from the i-th on, a
    dict of tensors. In a folder named by the weights `source`, which make them, the seed, the length and the
    data; the processes share the work, and a file that is there is not made again. Clips of --data: see own_clips."""
    if run.args.data and make is film_clips:
        return own_clips(run, pictures=name.startswith("images"))
    each, frames = 2 * run.recipe.batch, run.longest if name.startswith("images") else run.recipe.clip
    folder = run.out / f"{name}.{seed_of(run.checksum(source), run.seed, each, frames, *run.data):08x}"
    files = {folder / f"{i:07}.safetensors": i for i in range(0, count, each)}
    todo = [file for file in [*files][RANK::PROCESSES] if not file.exists()]
    piece = make(run, name) if todo else None
    for file in tqdm(todo, f"{name}, by {each}", disable=not todo):
        keep(file, piece(files[file]))
    mean_processes(torch.zeros(1))                      # those of the others are there
    return [*files]


def own_clips(run, pictures):
    """The clips of --data as files, as of film_clips, see encode_clips in extras/clips.py."""
    from extras.clips import encode_clips
    return encode_clips(run, pictures, RANK, PROCESSES, lambda: mean_processes(torch.zeros(1)))


def film_clips(run, name):
    """For `kept`: clips, filmed and encoded, {"latents" (B, C, F, h, w) float16, "tracks", "visible", "text"}. For
    "images…", which distillation starts from, F is 1 and the tracks are as long as its longest rollout."""
    vae, images, each = run.vae(), name.startswith("images"), 2 * run.recipe.batch

    @torch.no_grad()
    def piece(i):
        rng = torch.Generator().manual_seed(seed_of(run.seed, name, i))
        scenes = new_scenes(each, run.longest if images else CLIP, rng)
        video = render(scenes, SIZE, 0, 1 if images else None)
        latents = vae.encode(video.to(run.device))
        tracks, visible = scene_tracks(scenes, SIZE, rng)
        text = torch.cat([embed_words(caption, run.config) for caption in scenes["caption"]])
        return {"latents": latents.half(), "first": ((video[:, :, 0] + 1) * 127.5).round().byte(), "tracks": tracks,
                "visible": visible, "group": track_groups(scenes).expand(each, -1).contiguous(), "text": text}
    return piece


def random_subset(mask, count, preference=0):
    """Of each row of a mask (B, N), `count` (B, 1) true places at random, all if there are fewer. preference (B, N):
    added to the random order, lower ones are chosen rather."""
    order = torch.rand(mask.shape) + preference + 9 * ~mask                             # those that are not true come last
    rank = order.argsort(1).argsort(1)
    return mask & (rank < count)


def painted(visible, group):
    """What of the true tracks (B, T, N) a user might have painted: from nothing and a single drag to the dense grid,
    some starting and ending in the middle, and a fifth of the clips with a pause in all of them (section 3.1).
    group (B, N): each track's object, whose first track is its centre, and -1 the ground."""
    B, T, N = visible.shape
    keep = torch.zeros(B, N, dtype=torch.bool)
    for thing in range(int(group.max()) + 1):
        mine = group == thing
        centre = mine & (mine.cumsum(1) == 1)
        count = torch.tensor([0, 1, 1, 2, 4, 8, 16, 16])[torch.randint(0, 8, (B, 1))]
        keep |= random_subset(mine, count, -0.5 * torch.rand(B, 1) * centre)           # rather the centre than the rim
    count = torch.tensor([0, 0, 1, 4, 9, 32, 64])[torch.randint(0, 7, (B, 1))]
    keep |= random_subset(group < 0, count)
    t = torch.arange(T)[:, None]
    ends = torch.randint(0, T, (2, B, 1, N)).sort(0).values
    part = torch.rand(B, 1, N) < 0.15
    begin, length = torch.randint(1, T, (B, 1, 1)), torch.randint(4, 17, (B, 1, 1))
    pause = (t >= begin) & (t < begin + length) & (torch.rand(B, 1, 1) < 0.2)
    return visible & keep[:, None] & ((t >= ends[0]) & (t <= ends[1]) | ~part) & ~pause


def thinned(visible, pauses):
    """Of true tracks (B, T, N) 1,000 to 2,500, or all if there are fewer; with pauses, none in a fifth of the chunks of
    12 frames but the first (section 3.1, appendix D)."""
    B, T, N = visible.shape
    order = torch.rand(B, 1, N) + ~visible.any(1, keepdim=True)                    # those that are never seen come last
    keep = order.argsort(2).argsort(2) < torch.randint(1000, TRACKS + 1, (B, 1, 1))
    chunk = (torch.arange(T) + 3) // 12
    shown = (torch.rand(B, T, 1) >= 0.2 * pauses)[:, chunk] | (chunk == 0)[:, None]
    return visible & keep & shown


def pick(pool, batch, frames=None):
    """Random clips of a pool of files, {name: (batch, …)}, latents of `frames` frames (None: all)."""
    clips = []
    for file in torch.randint(0, len(pool), (batch,)):
        clip = load_file(pool[file])
        row = torch.randint(0, len(next(iter(clip.values()))), (1,))
        clip |= {"latents": clip["latents"][:, :, :frames]} if "latents" in clip else {}
        clips.append({name: tensor[row] for name, tensor in clip.items()})
    return {name: torch.cat([clip[name] for clip in clips]) for name in clips[0]}


def draw_batch(run, pool, batch, frames=None, dense=False, known=None):
    """Random clips of the pool, of `frames` latents, with all tracks (dense) or as a user might have painted them:
    their first `known` latents (B, C, F, h, w), the conditions but for tracks, and the points that
    the track head takes."""
    clips = pick(pool, batch, known or frames)
    latents = clips["latents"].float()
    length = 4 * (frames or latents.shape[2]) - 3
    tracks, visible = clips["tracks"][:, :length], clips["visible"][:, :length]
    true = visible
    if run.args.data:
        visible = thinned(visible, not dense)
    elif not dense:
        visible = painted(visible, clips["group"])
    given = {key: clips[key].float() for key in ("text", "clip") if key in clips}
    if run.config.image_dim:
        given["image"] = image_channels(latents[:, :, :1], (length + 3) // 4, still=run.config.copy_dim > 0)
    points = {"tracks": tracks, "visible": visible, "ids": track_ids(tracks, visible, run.config)}
    if run.config.copy_dim:
        points["ids"] = track_ids(tracks, true, run.config)             # where it was in frame 0, whenever it is drawn
        points["image"] = clips["first"].float() / 127.5 - 1
        points["touched"] = touched_cells(tracks, true & (clips["group"] >= 0)[:, None], run.config)
    return latents.to(run.device), *({k: v.to(run.device) for k, v in part.items()} for part in (given, points))


def clean_first(config, x0):
    """What with_first takes of clips x0: their first latent, None for models that have it as channels instead."""
    return x0[:, :, :1] if config.clean_first else None


def touched_cells(tracks, visible, config):
    """Where on the latent grid tracks are, or beside: (B, F, h, w) of 0 and 1, for a clip's tracks (B, T, N, 2)."""
    h, w = (side // config.stride for side in config.size)
    x, y = (tracks / config.stride).long().unbind(-1)
    x, y = x.clamp(0, w - 1), y.clamp(0, h - 1)
    cell = torch.where(visible, y * w + x, h * w)                                       # (B, T, N)
    touched = torch.zeros(*cell.shape[:2], h * w + 1).scatter_(2, cell, 1.0)[..., :-1]
    touched = F.pad(touched, (0, 0, 3, 0)).unflatten(1, (-1, 4)).amax(2)                # (B, F, h w)
    return F.max_pool2d(touched.unflatten(2, (h, w)), 3, 1, 1)


def motion_features(model, vae, points):
    """track_features of the points of draw_batch, for a clip or a rollout."""
    own = [points[key] for key in ("tracks", "visible", "ids")]
    copied = copy_along_tracks(vae, points["image"], *own) if model.config.copy_dim else None
    return track_features(model, *own, copied)


def latent_weight(vae, config, sigma):
    """By which the squared errors of the velocity are multiplied so that they are those of pixels, and those of the
    network behind linear_part: (B, C, 1, 1, 1), or 1 for latents of unit variance. sigma (B,)."""
    if not config.latent_std:
        return 1.0
    _, variance = linear_part(sigma, torch.tensor(config.latent_std, device=sigma.device).view(1, -1, 1, 1, 1))
    return variance * vae.pixel_weight().view(1, -1, 1, 1, 1) ** 2


# Stage 2: the teacher.

def draw_sigma(batch, shift, share_at_one):
    """Noise levels (B,): logit-normal, shifted; a share of them at exactly 1, where only the conditions help."""
    sigma = shift_sigma(torch.randn(batch).sigmoid(), shift)
    return torch.where(torch.rand(batch) < share_at_one, torch.ones(batch), sigma)


def flow_loss(model, x0, sigma, conditions, first, cell_weight=1.0, channel_weight=1.0):
    """Rectified flow: mean squared error of the velocity at sigma (B,) (appendix D); the image's latent is given as
    first (B, C, 1, h, w), which then does not count, or None. cell_weight (B, F, h, w), channel_weight (B, C, 1, 1, 1),
    see latent_weight: how much each error counts. (They depend on the conditions alone: the minimum is the same.)"""
    noise = torch.randn_like(x0)
    x_t, level = with_first(add_noise(x0, noise, sigma), sigma, first)
    error = (model(x_t, level, **conditions) - (noise - x0)).square()
    error = (error * channel_weight).mean(1)                                            # (B, F, h, w)
    weight = torch.ones_like(error) * cell_weight
    start = 0 if first is None else 1
    return (error * weight)[:, start:].sum() / weight[:, start:].sum()


def cells_that_count(points, conditions, emphasis):
    """Most of a picture is ground that stays where it is: cells that a track touches, and those beside them, count
    1 + emphasis, (B, F, h, w). Where objects are known, all of theirs, whatever is given to the model."""
    touched = points.get("touched")
    if touched is None:
        touched = F.max_pool2d((conditions["tracks"].detach() != 0).any(1).float(), 3, 1, 1)
    return 1 + emphasis * touched


def x0_errors(run, model, pool, batch):
    """How far a teacher's x0 is from the truth when it sees pure noise, with all tracks and with none, as numbers."""
    torch.manual_seed(0)
    x0, given, points = draw_batch(run, pool, batch, dense=True)
    ones, vae, first = torch.ones(len(x0), device=run.device), run.vae(), clean_first(model.config, x0)
    weight = latent_weight(vae, model.config, ones)
    with torch.no_grad(), run.autocast():
        features = motion_features(model, vae, points)
        return {name: flow_loss(model, x0, ones, given | {"tracks": tracks}, first, 1.0, weight)
                for name, tracks in (("x0_tracks", features), ("x0_none", 0 * features))}


def train_teacher(run):
    """Bidirectional rectified flow on half and on whole clips, half of it at sigma 1. The first quarter sees all
    tracks, as in the paper's first stage: with dense tracks a model learns sooner what they are for. That is seen early
    in the error at sigma 1 with all tracks and with none, on clips never trained on, and not in the flow loss.
    From --weights without a track head, all of it is the paper's first stage; from those with one, the second."""
    pool, r, batch = kept(run, "pool", "vae", run.clips, film_clips), run.recipe, run.recipe.batch
    if run.args.data:
        held = len(pool) // 20                          # of fewer clips, one is trained on too
        fresh, pool = pool[:max(held, 1)], pool[held:]
    else:
        fresh = kept(run, "fresh", "vae", 24, film_clips)
    vae = run.vae()
    run.config = replace(run.config, latent_std=tuple(vae.latent_std.tolist())) if run.config.copy_dim else run.config
    model = run.model("start", **vars(run.config)) if run.start else MotionStream(run.config).to(run.device)
    model.requires_grad_(True).track_head.requires_grad_(not (run.start and run.start.head))
    optimizer = Optimizer(model, *r.teacher, steps=run.steps["teacher"] // run.batches, ema=0.99, **run.shared())

    def step(i):
        dense, long = i < int(run.dense * run.steps["teacher"]), run.full or i // run.batches % 4 == 0
        x0, given, points = draw_batch(run, pool, *((batch, None) if long else (2 * batch, 6)), dense)
        sigma = draw_sigma(len(x0), run.config.shift, r.at_sigma_1).to(run.device)
        keep = (torch.rand(len(x0), 1, 1, 1, 1) > 0.1).to(run.device)        # the rest is without any motion input
        given["text"] = given["text"] * (torch.rand(len(x0), 1, 1) > 0.1).to(run.device)     # the teacher alone: ODE
        # pairs and distillation have their prompt, as in the paper
        with run.autocast():
            conditions = given | {"tracks": keep * motion_features(model, vae, points)}
            loss = flow_loss(model, x0, sigma, conditions, clean_first(run.config, x0),
                             cells_that_count(points, conditions, r.emphasis), latent_weight(vae, run.config, sigma))
        numbers = {"loss": loss, "grad": optimizer.step(loss, i)}
        if (i - RANK + PROCESSES) % (200 * run.batches) == 0:
            numbers |= x0_errors(run, optimizer.average, fresh, 6 * batch)
        return numbers

    train(run, "teacher", run.steps["teacher"], optimizer.parts(), step, optimizer.average)


# Stage 3: causal initialisation. The teacher becomes a student that sees only what the cache holds (section 3.2).

CONTEXTS = ((0, 1), (1, 0), (2, 1), (1, 2), (1, None))      # (sink, window) in chunks, drawn beside the model's own


def sample_trajectories(pool, run, name):
    """For `kept`: ODE trajectories of the guided teacher on clips of the pool, the states at the student's noise levels
    and the end, (B, 1 + levels, C, F, h, w) float16, and what the teacher was given."""
    teacher, wanted, vae = run.model("teacher"), {*run.config.sigmas}, run.vae()

    @torch.no_grad()
    def piece(i):
        torch.manual_seed(seed_of(run.seed, name, i))
        x0, given, points = draw_batch(run, pool, 2 * run.recipe.batch)
        with run.autocast():
            conditions = given | {"tracks": motion_features(teacher, vae, points)}
            states = [x for x, sigma in euler(teacher, torch.randn_like(x0), conditions, clean_first(run.config, x0))
                      if sigma in wanted or sigma == 0]
        assert len(states) == len(wanted) + 1, f"{len(states) - 1} of {wanted} lie on the teacher's schedule"
        points["image"] = points.get("image", torch.zeros(len(x0), 0))
        points["image"] = ((points["image"] + 1) * 127.5).round().byte()
        points.pop("touched", None)
        return {"states": torch.stack(states, 1).half(), **given, **{f"points.{k}": v for k, v in points.items()}}
    return piece


def worn(x0, chunk):
    """Clean latents as a memory gone wrong: in half of the clips, a rectangle of all chunks but the first shows frame 0
    again, so that what left it is back and what came is gone. It is meant to teach the student not to pass that on."""
    B, _, frames, h, w = x0.shape
    low, high = torch.rand(2, 2, B, 1, 1).sort(0).values
    y, x = torch.arange(h)[:, None] / h, torch.arange(w) / w
    inside = (low[0] <= y) & (y < high[0]) & (low[1] <= x) & (x < high[1]) & (torch.rand(B, 1, 1) < 0.5)
    late = torch.arange(frames)[:, None, None] >= chunk
    return torch.where((inside[:, None, None] & late).to(x0.device), x0[:, :, :1], x0)


def causal_loss(model, states, x0, memory, conditions, context, channel_weight=1.0):
    """Regression through the caches: each chunk predicts its clean end from its own state at a drawn noise level, and
    from what a cache of `context` (sink, window) holds of the clean chunks of `memory`, which is x0 or worn.
    states: one (B, C, F, h, w) a level. channel_weight (1, C, 1, 1, 1): how much each channel's error counts."""
    caches = [KVCache(*context) for _ in model.blocks]
    chunk, sigmas, loss = model.config.chunk, model.config.sigmas, 0.0
    for start, part in zip(range(0, x0.shape[2], chunk), split_conditions(conditions, chunk)):
        now = slice(start, start + chunk)
        target, level = x0[:, :, now], int(torch.randint(0, len(sigmas), ()))
        sigma = torch.full((len(x0),), sigmas[level], device=x0.device)
        first = clean_first(model.config, target) if start == 0 else None
        x_t, sigma = with_first(states[level][:, :, now], sigma, first)
        error = to_x0(x_t, model(x_t, sigma, caches=caches, **part), sigma) - target
        loss = loss + (error.square() * channel_weight).sum()
        with torch.no_grad():
            model(memory[:, :, now], torch.zeros_like(sigma), caches=caches, write=True, **part)
    return loss / x0.numel()


def train_causal(run):
    """Student from teacher, on the teacher's ODE trajectories."""
    pool, r = kept(run, "pool", "vae", run.clips, film_clips), run.recipe       # in all processes: they wait for it
    trajectories = kept(run, "trajectories", "teacher", run.trajectories, functools.partial(sample_trajectories, pool))
    student, vae = run.model("teacher", causal=True, **run.memory).requires_grad_(True), run.vae()
    weight = latent_weight(vae, student.config, torch.ones(1, device=run.device))       # of x0, the velocity's at 1
    student.track_head.requires_grad_(False)                                # frozen after the teacher (appendix D)
    contexts = 3 * ((run.config.sink, run.config.window),) + CONTEXTS
    optimizer = Optimizer(student, *r.causal, steps=run.steps["causal"] // run.batches, ema=0.98, **run.shared())

    def step(i):
        batch = {key: value.to(run.device) for key, value in pick(trajectories, r.batch).items()}
        *states, x0 = batch["states"].float().unbind(1)
        context = contexts[int(torch.randint(0, len(contexts), ()))]
        with run.autocast():
            conditions = {key: batch[key] for key in ("text", "image", "clip") if key in batch}
            points = {key.removeprefix("points."): batch[key] for key in batch if key.startswith("points.")}
            points["image"] = points["image"].float() / 127.5 - 1
            conditions["tracks"] = motion_features(student, vae, points)
            memory = worn(x0, run.config.chunk) if r.worn else x0
            loss = causal_loss(student, states, x0, memory, conditions, context, weight)
        return {"loss": loss, "grad": optimizer.step(loss, i)}

    train(run, "causal", run.steps["causal"], optimizer.parts(), step, optimizer.average)


# Stage 4: Self-Forcing with distribution matching (eq. 3, 4). Generator: the student. Teacher: the real score, guided.
# Critic: the fake score, which learns what the generator makes now.

def score_sigma(batch, shift, device):
    """Noise levels (B,) at which generator and critic are scored: uniform, shifted, clamped to [0.02, 0.98], one
    distribution for both, as in CausVid and Self-Forcing (model/dmd.py): the critic learns where it is asked."""
    return shift_sigma(torch.rand(batch, device=device), shift).clamp(0.02, 0.98)


def dmd_loss(x0, teacher, critic, conditions, first, guidance, shift, weight=1.0, channel_weight=1.0):
    """The generator's loss on its own latents x0 (B, C, F, h, w): its gradient is (critic - teacher), both as x0
    predicted from x0 noised to one random sigma a clip, over the mean distance of x0 to the teacher (DMD eq. 7, 8).
    Where the image gives frame 0, both agree with it and the gradient is zero. shift: of the noise levels, see
    score_sigma. weight (B,): how much a clip counts, exp(reward / beta) in Re-DMD (Reward Forcing eq. 11).
    channel_weight (1, C, 1, 1, 1): how much each channel counts."""
    with torch.no_grad():
        sigma = score_sigma(len(x0), shift, x0.device)
        x_t, level = with_first(add_noise(x0, torch.randn_like(x0), sigma), sigma, first)
        real = to_x0(x_t, guided_velocity(teacher, x_t, level, conditions, guidance), level)
        fake = to_x0(x_t, critic(x_t, level, **conditions), level)
        distance = (x0 - real).abs().mean((1, 2, 3, 4)) / weight
        direction = (fake - real) / distance.view(-1, 1, 1, 1, 1)
    return 0.5 * ((x0 - (x0.detach() - direction)).square() * channel_weight).mean()


def critic_loss(x0, critic, conditions, first, shift, channel_weight=lambda sigma: 1.0):
    """The critic's loss: rectified flow on the generator's own latents, without guidance, at the noise levels of
    score_sigma. first: see flow_loss. channel_weight: its, as a function of sigma."""
    sigma = score_sigma(len(x0), shift, x0.device)
    return flow_loss(critic, x0.detach(), sigma, conditions, first, 1.0, channel_weight(sigma))


DRAWN = tuple(itertools.product((1, 3, 5), (0, 1, 2, 3), (1, 2, 4)))    # chunk, sink, window, with --memory drawn


def last_clip(chunks, frames, first, points):
    """The end of a rollout, an iterator of chunks, as a clip that the teacher can judge: the image (B, C, 1, h, w),
    then its last `frames` latents without their first (first=None: with it), with the tracks of these. After more than
    that, time jumps behind the image: the teacher says what should be there, whatever the student passed on."""
    held = []
    for chunk in chunks:
        held.append(chunk)
        while sum(x.shape[2] for x in held[1:]) >= frames:
            held.pop(0)                                 # and its graph
    x0 = torch.cat(held, 2)[:, :, -frames:]
    x0 = x0 if first is None else torch.cat([first, x0[:, :, 1:]], 2)
    times = torch.arange(4 * x0.shape[2] - 3)
    times[1:] += points["tracks"].shape[1] - len(times)
    return x0, points | {key: points[key][:, times] for key in ("tracks", "visible")}


def draw_rollout(run, i, grad):
    """Of the rollout of step i, the same in all processes, which would wait in vain else: its chunks, half of the time
    more than the teacher's clip has, the step at which it ends, and its memory, fields of Config."""
    rng, c = torch.Generator().manual_seed(seed_of(run.seed, i // run.batches, grad)), run.config
    chunks = int(torch.randint(2 * run.known - run.args.rollout, run.args.rollout + 1, (), generator=rng))
    exit_step = int(torch.randint(0, len(c.sigmas), (), generator=rng))
    drawn = dict(zip(("chunk", "sink", "window"), DRAWN[int(torch.randint(0, len(DRAWN), (), generator=rng))]))
    return max(run.known, chunks), exit_step, run.memory | (drawn if run.args.memory == "drawn" else {})


def train_student(run):
    """A generator update every critic_steps critic updates, each on a new rollout, see draw_rollout. Those longer than
    the teacher's clip, see last_clip, have neutral text if scenes are drawn: a light would have faded."""
    pool, reward = kept(run, f"images{run.args.rollout}", "vae", run.clips, film_clips), run.reward
    teacher, vae, neutral = shard(run.model("teacher")), run.vae(), embed_words(NEUTRAL, run.config).to(run.device)
    generator, critic = run.model("causal", **run.memory), run.model("teacher")
    for model in generator, critic:
        model.requires_grad_(True).track_head.requires_grad_(False)
    worth = functools.partial(latent_weight, vae, teacher.config)
    known, updates, betas = run.known, run.steps["distill"] // run.batches // run.recipe.critic_steps, (0.0, 0.99)
    optimizer_g = Optimizer(generator, *run.recipe.generator, betas, updates, ema=0.98, **run.shared())
    optimizer_c = Optimizer(critic, *run.recipe.critic, betas, **run.shared())

    def generate(i, grad):
        chunks, exit_step, memory = draw_rollout(run, i, grad)
        first, given, points = draw_batch(run, pool, run.recipe.batch, frames := chunks * run.config.chunk, known=1)
        given["text"] = given["text"] if chunks == known or run.args.data else neutral.expand_as(given["text"])
        generator.config = replace(generator.config, **memory)
        with run.autocast():
            conditions = given | {"tracks": motion_features(generator, vae, points)}
            noise = torch.randn(*first.shape[:2], frames, *first.shape[3:], device=run.device)
            clean = clean_first(run.config, first)
            made = rollout(generator, noise, conditions, clean, exit_step=exit_step, grad=grad)
            x0, points = last_clip(made, known * run.config.chunk, first if chunks > known else clean, points)
            given = next(split_conditions(given, x0.shape[2]))
            return x0, given | {"tracks": motion_features(generator, vae, points)}, given | points

    def step(i):
        numbers = {}
        if i // run.batches % run.recipe.critic_steps == 0:
            x0, conditions, batch = generate(i, grad=True)
            with run.autocast():
                first, weight = clean_first(run.config, x0.detach()), 1.0
                if reward:
                    numbers["reward"] = (score := reward(vae.decode(x0.detach())[0].float(), batch)).mean()
                    weight = torch.exp(score / run.args.beta)
                c = run.config
                loss = dmd_loss(x0, teacher, critic, conditions, first, c.guidance, c.shift, weight,
                                worth(torch.ones(1, device=x0.device)))
            numbers |= {"loss_g": loss, "grad_g": optimizer_g.step(loss, i, run.recipe.critic_steps), "std": x0.std()}
        x0, conditions, _ = generate(i, grad=False)
        with run.autocast():
            first = clean_first(run.config, x0.detach())
            loss = critic_loss(x0, critic, conditions, first, run.config.shift, worth)
        return numbers | {"loss_c": loss, "grad_c": optimizer_c.step(loss, i)}

    parts = optimizer_g.parts("generator") | optimizer_c.parts("critic")
    train(run, "distill", run.steps["distill"], parts, step, optimizer_g.average)


# ----------------------------------------------------------------------------------------------------------------------
# The command.

# Flags of a single stage, what there is to train, and which of it a stage leaves behind and starts from.
OWN = {"distill": ("memory", "rollout", "reward", "beta", "sink_decay"), "causal": ("memory",),
       "decoder": ("adversarial", "perceptual")}
MODELS = ("vae", "teacher", "causal", "student")
STAGES = {"vae": train_vae, "teacher": train_teacher, "causal": train_causal, "distill": train_student}
WEIGHTS = dict(zip(STAGES, MODELS))
NEEDS = {stage: MODELS[:i] for i, stage in enumerate(STAGES)} | {
    "decoder": ("vae",), "eval": MODELS, "experiments": MODELS}         # the programs in extras
SHIPPED = {"vae": "tiny_vae", "teacher": "tiny_teacher", "causal": "tiny_causal", "student": "tiny"}


def choose_config(args, start):
    """What is trained, by which of RECIPES: the tiny model, a preset (of a dry run), or the weights `start`, inspected:
    without a slot for tracks they get one, and Wan's are sampled as the paper says."""
    c = start.config if start else PRESETS[args.dry_run or "tiny"]
    full = c.text_dim == UMT5_DIM
    for wrong, cure in [
        (start and c.causal, "holds a student; a training starts from a teacher"),
        (start and has_mask(c), "takes the image as a clip with a mask, which cannot stream; take Fun-Control or T2V"),
        ((start or args.data) and not args.vae and not args.dry_run, "give --vae FILE, which made its latents"),
        (args.data and not full and args.text_encoder, "the tiny model reads words; drop --text-encoder"),
        (args.data and (Path(args.out).resolve().parent / "clips").is_relative_to(args.data.resolve()),
         f"encoded clips go to the folder clips beside --out, {args.out}, here in --data {args.data}; choose another"),
        (start and full and not args.data and not args.dry_run, "give --data FOLDER; the clips drawn here are small"),
    ]:
        if wrong:
            raise UserError(f"{start.path if start else args.data}: {cure}")
    if start and not c.track_dim:
        c = replace(c, track_dim=c.out_dim, in_dim=c.in_dim + c.out_dim)
    if full:
        c = replace(c, shift=6.0, sigmas=schedule(3, 6.0), steps=48, guidance=(3.0, 1.5), chunk=3, sink=1, window=1)
    c = replace(c, **args.memory) if isinstance(args.memory, dict) else c
    c = replace(c, track_id_mode=args.tracks or c.track_id_mode, sink_decay=args.sink_decay)
    return c, "tiny" if not full else "second" if start and start.head else "paper"


class Run:
    """The settings of one training, its folder, and the weights in it."""

    def __init__(self, args):
        self.args, self.out, self.device, self.seed = args, Path(args.out), args.device, args.seed
        self.reward, self.start = None, args.weights and inspect(args.weights)
        if args.reward:
            from extras.evaluate import find_reward
            self.reward = find_reward(args.reward)
        self.config, recipe = choose_config(args, self.start)
        self.memory = {name: getattr(self.config, name) for name in ("chunk", "sink", "window", "sink_decay")}
        self.recipe, self.full = SimpleNamespace(**RECIPES[recipe]), recipe != "tiny"
        self.recipe.clip = args.length or self.recipe.clip
        self.dense = (0 if self.start.head else 1) if self.start else 1 / 4      # share of the teacher's steps
        self.known = (self.recipe.clip + 3) // 4 // self.config.chunk           # chunks of a clip
        args.tracks, args.rollout = self.config.track_id_mode, max(args.rollout or (0 if args.data else 16), self.known)
        self.longest = max(self.recipe.clip, 4 * self.config.chunk * args.rollout - 3)     # frames that tracks have
        self.data = (args.tracks, *listing(args.data))
        self.batches = PROCESSES * (args.accumulate or 1)
        self.steps = dict(zip(STAGES, (4, 4, 3, 6) if args.smoke else self.recipe.steps))
        self.steps |= {args.stage: args.steps} if args.steps else {}
        self.vae_clips, self.clips, self.trajectories = (8, 16, 8) if args.smoke else self.recipe.clips
        self.shipped = args.stage in ("eval", "experiments") and not (self.out / "student.safetensors").exists()
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError):
            raise UserError(f"--device {self.device}: not available here") from None
        self.dtype = compute_dtype(self.device)             # not a setting: a training may go on elsewhere

    def path(self, name):
        """The weights called `name`: those given, this run's or, where eval finds no run, the shipped ones."""
        given = {"vae": self.args.vae, "start": self.args.weights}.get(name)
        return given or (ASSETS / f"{SHIPPED[name]}.safetensors" if self.shipped else self.out / f"{name}.safetensors")

    def checksum(self, name):
        """Of the weights called `name`."""
        return zlib.crc32(self.path(name).read_bytes())

    def settings(self, stage):
        """What a checkpoint of the stage depends on: another of these would make it a mixture."""
        names = ("seed", "tracks", "length", *OWN.get(stage, ()))
        own = {"start": self.args.weights and str(self.args.weights), "data": self.args.data and seed_of(*self.data)}
        return {name: getattr(self.args, name) for name in names} | (own if stage in (*STAGES, "decoder") else {}) | {
            "batches": self.batches, "weights": [*map(self.checksum, NEEDS[stage])]}

    def shared(self):
        """What all optimizers of a stage are told."""
        return {"batches": self.batches, "checkpointing": self.args.checkpointing}

    def autocast(self):
        """bfloat16, unless compute_dtype says float32. No cache of weights: torch before 2.11 hands those without a
        graph to all."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, self.dtype == torch.bfloat16, cache_enabled=False)

    def check(self, stage):
        """Refuse a stage whose forerunners are missing or damaged, or of another memory, before it starts."""
        for name in NEEDS[stage]:
            try:
                self.vae() if name == "vae" else self.model(name)
            except ValueError as e:
                cure = f"; --stage {next(s for s, w in WEIGHTS.items() if w == name)} makes it"
                raise UserError(f"{e}{'' if self.path(name) == self.args.vae else cure}") from None
        was = vars(inspect(self.path("causal")).config) if stage == "distill" and not self.args.memory else self.memory
        was = {name: was[name] for name in ("chunk", "sink", "window")}
        if not was.items() <= self.memory.items():
            raise UserError(f"{self.path('causal')}: was trained with {was}; say by --memory what the student gets")

    def vae(self):
        """The trained VAE, or --vae."""
        like = SimpleNamespace(path=self.args.weights or self.out, config=self.config)
        return open_vae(SimpleNamespace(vae=self.path("vae")), like).to(self.device)

    def model(self, name, **overrides):
        """A trained model in float32, frozen."""
        return MotionStream.from_pretrained(self.path(name), dtype=torch.float32, device=self.device, **overrides)


def memory(text):
    """A flag's type: "c3s1w1" to chunk 3, sink 1, window 1 (wfull: all), as a dict; "drawn": see draw_rollout."""
    found = re.fullmatch(r"c([1-9]|1[0-2])s(\d+)w(\d+|full)|drawn", text)      # 12 latents are the shortest clip
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not like c3s1w1, chunk 1 to 12, and not drawn")
    c, s, w = found.groups()
    return {"chunk": int(c), "sink": int(s), "window": None if w == "full" else int(w)} if c else text


def parse_flags(argv):
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--stage", choices=["all", *STAGES], default="all", help="(all)")
    return check_flags(parser, parser.parse_args(argv))


def new_parser(description):
    """The flags of a training but for its stage, which the programs in extras know."""
    count = number(int, 1, 10 ** 9)
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in some minutes")
    parser.add_argument("--out", default=None, help="folder to write to (runs/tiny; runs/smoke with --smoke)")
    parser.add_argument("--steps", type=count, help="steps of the one stage that is named")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--device", default=f"cuda:{LOCAL}" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--accumulate", type=count, help="steps of each process for one update (1; Wan's: the paper's)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward: less memory")
    parser.add_argument("--data", type=Path, help="a folder of your own clips, see the README (none: they are drawn)")
    parser.add_argument("--length", type=count, help="frames of a clip of --data (45; Wan's: 81)")
    parser.add_argument("--text-encoder", type=Path, help="a -Diffusers repository with Wan's, for the clips' prompts")
    parser.add_argument("--image-encoder", type=Path, help="the same of CLIP; default: that of --text-encoder")
    parser.add_argument("--weights", type=Path, help="what the teacher starts from: a Wan DiT, or a teacher made here")
    parser.add_argument("--vae", type=Path, help="a finished VAE's file; the stage vae is left out")
    parser.add_argument("--dry-run", nargs="?", choices=PRESETS, const="tiny", help="print what it would take, no more")
    parser.add_argument("--tflops", type=number(float, 1, 1e6), default=396, help="of a GPU, for --dry-run (396)")
    parser.add_argument("--reward", help="to weight distillation by: motion, or FILE.py:FUNCTION (none)")
    parser.add_argument("--beta", type=number(float, 0.01, 100), default=0.5, help="weight is exp(reward / beta) (0.5)")
    parser.add_argument("--sink-decay", type=number(float, 0, 1), default=1.0, help="below 1: EMA-Sink (1)")
    parser.add_argument("--rollout", type=number(int, 1, 100), help="longest, in chunks, of distillation (16)")
    parser.add_argument("--memory", type=memory, help="the student's chunk, sink, window (c3s1w1); drawn: many")
    parser.add_argument("--tracks", choices=["random", "start"], help="how tracks get their IDs (tiny: start)")
    return parser


def check_flags(parser, args):
    """Refuse flags that do not go together; fill in those that depend on others."""
    if args.steps and args.stage not in (*STAGES, "decoder"):
        parser.error("--steps needs --stage with one training stage")
    for names, stages in ((OWN["distill"][2:], ("all", "distill")), (OWN["causal"], ("all", "causal", "distill"))):
        for name in names if args.stage not in stages else ():
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} needs --stage {stages[-1]}")
    if args.length and (args.length < CLIP or (args.length + 3) % 12 or not (args.data or args.dry_run)):
        parser.error(f"--length {args.length}: needs --data, and whole chunks of 12, the first of 9: 45, 57, 69, …")
    if args.tflops != parser.get_default("tflops") and not args.dry_run:
        parser.error("--tflops needs --dry-run")
    if args.data and (args.stage in ("vae", "eval", "experiments") or not args.data.is_dir()):
        parser.error(f"--data {args.data}: {'not for this --stage' if args.data.is_dir() else 'no such folder'}")
    args.image_encoder = args.image_encoder or args.text_encoder
    if args.vae and (args.stage == "vae" or not args.vae.is_file()):
        parser.error(f"--vae {args.vae}: {'drop it, or --stage vae' if args.vae.is_file() else 'no such file'}")
    args.out = args.out or ("runs/smoke" if args.smoke else "runs/tiny")
    return args


def forward_flops(c, tokens, seen):
    """Floating point operations of the blocks for `tokens` tokens that attend to `seen`, the rest of the model is below
    a hundredth: two for each weight, and attention's two products."""
    D, text = c.dim, c.text_len + 257 * (c.clip_dim > 0)
    a_token = 2 * (6 * D * D + 2 * D * c.ffn_dim) + 4 * D * (seen + text)
    return c.num_layers * (tokens * a_token + 4 * D * D * text)


def dry_run(run):
    """--dry-run: print what the training of `run` would be and take, on GPUs that keep up --tflops (40 % of an H100's
    989 in bfloat16). The model is on the meta device, and nothing is written."""
    c, r, frames, tflops = run.config, run.recipe, (run.recipe.clip + 3) // 4, run.args.tflops
    with torch.device("meta"):
        count = sum(p.numel() for p in MotionStream(c).parameters())
    frame = math.prod(c.size) // (2 * c.stride) ** 2                                # tokens
    most = run.known if c.window is None else c.sink + c.window                     # chunks in the cache
    held = [min(i, most) * c.chunk for i in range(run.known)]
    whole = forward_flops(c, frames * frame, frames * frame)
    stream = sum(forward_flops(c, c.chunk * frame, (past + c.chunk) * frame) for past in held)
    steps, guided = (len(c.sigmas) + 1) / 2, 3 if c.guidance[1] else 2 if c.guidance[0] else 1
    costs = {                                                   # of a clip; a backward costs two forwards
        "teacher": 3 * whole, "trajectories": guided * c.steps * whole, "causal": (3 + 1) * stream,
        "distill": (steps + 1) * stream + 3 * whole + ((steps + 3) * stream + (guided + 1) * whole) / r.critic_steps}
    clips = {stage: r.batch * n for stage, n in run.steps.items()} | {"trajectories": run.trajectories}
    print(f"{c}\n{r}\n{count:,} parameters, {frame:,} tokens a latent frame, {frames} of them a clip")
    print(f"the KV cache of a stream, chunk {c.chunk}, sink {c.sink}, window {c.window}: "
          f"{c.num_layers * 2 * 2 * c.dim * most * c.chunk * frame / 2 ** 20:,.0f} MiB in bfloat16")
    for stage, flops in costs.items():
        print(f"{stage}: {clips[stage]:,} clips, {flops / 1e12:,.1f} TFLOP each")
    for gpus in 1, 4, 8:
        # float32: weights 4 bytes, gradients 4, AdamW 8, average 4; distillation's teacher has weights alone
        teacher, distill = (size * count / gpus / 2 ** 30 for size in (20, 4 + 20 + 16))
        days = ", ".join(f"{stage} {clips[stage] * flops / (1e12 * tflops * gpus * 86400):,.2g}"
                         for stage, flops in costs.items())
        print(f"{gpus} GPU{'s' * (gpus > 1)}: {teacher:.1f} GiB each to train the teacher, {distill:.1f} to distil, if "
              f"all is sharded, without activations; days at {tflops:g} TFLOP/s each: {days}")


def join_processes(device):
    """Those that torchrun has started."""
    if PROCESSES > 1:
        dist.init_process_group(timeout=timedelta(hours=12))            # some may encode long after the others
        dist.init_device_mesh(device.split(":")[0], (PROCESSES,))       # gloo, or nccl on the GPU of LOCAL_RANK


def run_stages(argv):
    """Run the stages that are not done yet."""
    args = parse_flags(argv)
    join_processes(args.device)
    run = Run(args)
    if args.dry_run:
        return dry_run(run)
    from extras.evaluate import Trained, preview
    run.out.mkdir(parents=True, exist_ok=True)
    print(f"{run.out}: {run.config}")
    print(f"matrix products on {run.device} are in {str(run.dtype)[6:]}")
    for (stage, train_stage), accumulate in zip(STAGES.items(), run.recipe.accumulate):
        if args.stage == stage or args.stage == "all" and not run.path(WEIGHTS[stage]).exists():
            run.check(stage)
            run.batches = PROCESSES * (args.accumulate or max(accumulate // PROCESSES, 1))
            torch.manual_seed(seed_of(run.seed, stage))             # of the weights that a stage begins with
            train_stage(run)
            if RANK == 0:
                preview(Trained(run.out, run.device, vae_file=args.vae), stage, not args.data)
    if args.stage == "all" and RANK == 0 and not args.data:
        print(f"measured by: python -m extras.evaluate --out {run.out}")


def reported(work, *args):
    """The exit code of work(*args). What the user can put right is one line and exit code 2."""
    try:
        return work(*args)
    except (UserError, OSError) as e:                   # a full disk, say, whatever was written: files are whole
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                           # outside a training step: while filming, say
        return 130


def main(argv=None):
    """The program. Returns the exit code."""
    return reported(run_stages, argv)


if __name__ == "__main__":
    sys.exit(main())
