"""Train a tiny MotionStream from nothing, on video that assets/world.py draws: every stage of the paper, in order.

    vae      a tiny video autoencoder
    teacher  bidirectional rectified flow, given the first frame, text and tracks
    causal   the student: regression on the teacher's ODE trajectories, chunk by chunk through the KV cache
    distill  Self-Forcing DMD: the student rolls out as it will at inference, teacher and critic score the result
    decoder  if it is named: the VAE's decoder again, or a tiny one for Wan's VAE, against a discriminator
    eval     the README's numbers; experiments: the papers', in small; both are measured by test_motionstream.py

    python train_distill.py                  all of it, resumed where it stopped; --smoke: a few steps, to see it run
    python train_distill.py --stage teacher  one stage
    python train_distill.py --data FOLDER --weights DIR --vae FILE    on your own clips, from Wan's weights, see README
    torchrun --nproc-per-node 2 train_distill.py    in two processes, which share the steps and the weights

Shapes are those of motionstream.py. Everything is written under --out (runs/tiny): weights, checkpoints, stats.jsonl,
a loss curve and a preview sheet for each stage.
"""

import argparse
import collections
import contextlib
import copy
import csv
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

import imageio.v2 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from assets import UserError, naming
from assets.encoders import image_encoder, listing, text_encoder
from assets.tracks import load_tracks
from assets.world import OBJECTS, POINTS, embed_words, film, new_scenes, scene_tracks
from motionstream import (PRESETS, Block, KVCache, MotionStream, add_noise, by_chunk, euler, guided_velocity,
                          image_channels, rollout, save_pretrained, schedule, shift_sigma, to_x0, track_features,
                          track_ids, with_first, write)
from sample import (ASSETS, UMT5_DIM, Parser, fit_image, fit_tracks, has_mask, hold_signals, inspect, load_image,
                    number, open_vae, read_encoded)
from vae import TINY, TinyVAE, TinyVAEConfig, WanVAE, read_tensors

# ----------------------------------------------------------------------------------------------------------------------
# What every stage shares: optimizer, running average, the loop with its log and checkpoints, files and pictures.

NEUTRAL = PRESETS["tiny"].prompt
TRACKS = 2500                            # of a clip of --data, at most: the paper's grid of 50x50
SIZE, CLIP = 128, 45                     # pixels per side; frames of a clip: 12 latents, 4 chunks of 3
RANK, LOCAL, PROCESSES = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

# The numbers of a training: for the tiny model ours, for Wan's the paper's (1.3B; section 4.1, appendix D), if known.
# Rates are Muon's and AdamW's (None: AdamW on all), steps are of `batch` clips and, like accumulate, by stage.
RECIPES = {
    "tiny": {"clip": CLIP, "batch": 4, "accumulate": (1, 1, 1, 1, 1), "steps": (2000, 10_000, 800, 1200, 1000),
             "teacher": (0.015, 3e-3), "causal": (2e-3, 1e-3), "generator": (1e-3, 1e-4), "critic": (2e-3, 2e-4),
             "decoder": (5e-3, 2e-3), "discriminator": (0.01, 1e-3), "critic_steps": 5,
             "clips": (256, 5120, 480), "at_sigma_1": 0.5, "emphasis": 4.0, "worn": True},
    "paper": {"clip": 81, "batch": 1, "accumulate": (1, 128, 128, 64, 1), "clips": (0, 0, 4000), "worn": False,
              "steps": (0, 614_400, 256_000, 128_000, 200_000), "at_sigma_1": 0.0, "emphasis": 0.0,
              "teacher": (None, 1e-5), "causal": (None, 2e-6), "generator": (None, 2e-6), "critic": (None, 4e-7),
              "decoder": (None, 3e-4), "discriminator": (None, 3e-4), "critic_steps": 5}}
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
    write(path, torch.save, {"step": step, "settings": settings, **states})
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


def drawn_crops(run):
    """A function that draws crops of filmed scenes, of three the one where most happens: (8, 3, 17, 64, 64)."""
    rng = torch.Generator().manual_seed(seed_of(run.seed, "vae"))
    videos = torch.cat([((film(new_scenes(8, CLIP, rng), SIZE) + 1) * 127.5).round().byte()     # (n, 3, T, H, W)
                        for _ in tqdm(range(0, run.vae_clips, 8), "film for the vae")])

    def crop():
        n, t, y, x = (int(torch.randint(limit, ())) for limit in (len(videos), CLIP - 16, SIZE - 63, SIZE - 63))
        return videos[n, :, t:t + 17, y:y + 64, x:x + 64]

    def crops():
        chosen = [max((crop() for _ in range(3)), key=lambda c: c[:, ::8].float().var()) for _ in range(8)]
        return torch.stack(chosen).to(run.device).float() / 127.5 - 1
    return crops


def train_vae(run):
    """Reconstruction alone. The latent is made unit variance per channel by a BatchNorm without weights, which is
    folded into the encoder's last convolution when training ends; noise on the latent keeps it smooth."""
    vae, crops = TinyVAE(TINY).to(run.device), drawn_crops(run)
    norm = nn.BatchNorm3d(TINY.latent_channels, affine=False, momentum=0.05).to(run.device)
    optimizer = Optimizer(vae, muon=5e-3, adam=2e-3, steps=run.steps["vae"] // run.batches, batches=run.batches)

    def step(i):
        video = crops()
        with run.autocast():
            latents = norm(vae.encode(video))
            output, _ = vae.decode_frames(latents + 0.05 * torch.randn_like(latents))
        loss = reconstruction_loss(output, video)
        return {"loss": loss, "psnr": psnr(output.detach(), video), "grad": optimizer.step(loss, i)}

    train(run, "vae", run.steps["vae"], {"norm": norm, **optimizer.parts()}, step)
    for statistic in norm.running_mean, norm.running_var:
        mean_processes(statistic)
    with torch.no_grad():
        last, std = vae.encoder[-1], (norm.running_var + norm.eps).sqrt()
        last.weight /= std.view(-1, 1, 1, 1)
        last.bias.copy_((last.bias - norm.running_mean) / std)
    save_pretrained(vae, run.path("vae"), torch.float16, **vae.metadata())


# The tiny VAE's decoder, against a discriminator (appendix A). That is an encoder with one channel: a score for every
# 4x4 pixels of two frames and what is about them (PatchGAN, Isola et al. 2017).
DISCRIMINATOR = TinyVAEConfig(latent_channels=1, patch=2, stem=32, encoder=((64, 1, 2, 2),))


def adversarial_losses(discriminator, video, output, shown):
    """The decoder's, by which its output should score high, and the discriminator's: true video should score 1 or more,
    what is shown as false -1 or less. Neither has a gradient in the other network."""
    discriminator.requires_grad_(False)
    loss_g = -discriminator.encode(output).mean()
    discriminator.requires_grad_(True)
    true, false = discriminator.encode(video), discriminator.encode(shown.detach())
    return loss_g, F.relu(1 - true).mean() + F.relu(1 + false).mean()


def train_decoder(run):
    """A decoder from nothing for the latents of a finished VAE: the tiny one, on drawn videos, or with --data Wan's, in
    the layout of taew2_1, on what Wan's decoder makes of 144x144 pixels and 21 frames, while an encoder learns the
    latents. Half of what is shown as false is from a replay buffer."""
    from test_motionstream import open_lpips
    given, wan = run.vae(), bool(run.args.data)
    perceptual = open_lpips(run.args.perceptual, run.device)
    if isinstance(given, WanVAE) != wan or wan != run.full:
        raise UserError(f"{run.path('vae')}: Wan's needs --data and --weights, a tiny one takes neither")
    config = TinyVAEConfig(given.config.latent_channels, given.stride // 8) if wan else given.config
    vae, discriminator, cells = TinyVAE(config), TinyVAE(DISCRIMINATOR), 144 // given.stride
    vae.encoder, discriminator.decoder = vae.encoder if wan else given.encoder, nn.Identity()
    source = own_clips(run, pictures=False) if wan else drawn_crops(run)

    def batch():
        if not wan:
            return given.encode(video := source()), video
        latents = pick(source, 16, 6)["latents"]
        y, x = (int(torch.randint(max(side - cells, 0) + 1, ())) for side in latents.shape[3:])
        latents = latents[..., y:y + cells, x:x + cells].to(run.device).float()
        return latents, given.decode(latents)[0]

    discriminator.register_buffer("replay", torch.zeros(64, *batch()[1].shape[1:]).bfloat16())
    shared = {"steps": run.steps["decoder"] // run.batches, "batches": run.batches}
    optimizer = Optimizer(vae.to(run.device), *run.recipe.decoder, **shared)
    optimizer_d = Optimizer(discriminator.to(run.device), *run.recipe.discriminator, **shared)

    def step(i):
        with run.autocast():
            with torch.no_grad():
                latents, video = batch()
            output, _ = vae.decode_frames(latents)
            rows = torch.randperm(64)[:len(output) // 2]
            shown = torch.cat([discriminator.replay[rows], output[len(rows):]])
            loss_g, loss_d = adversarial_losses(discriminator, video, output, shown)
            loss = reconstruction_loss(output, video) + perceptual(output, video, i)
            loss = loss + F.mse_loss(vae.encode(video), latents) if wan else loss
        discriminator.replay[rows] = output[:len(rows)].detach().bfloat16()
        return {"loss": loss, "loss_g": loss_g, "loss_d": loss_d, "psnr": psnr(output.detach(), video),
                "grad": optimizer.step(loss + run.args.adversarial * loss_g, i), "grad_d": optimizer_d.step(loss_d, i)}

    train(run, "decoder", run.steps["decoder"], optimizer.parts("decoder") | optimizer_d.parts("discriminator"), step)
    save_pretrained(vae, run.path("decoder"), **vae.metadata())


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
    """The clips of --data as files, as of film_clips, encoded now or in an earlier run, a part by each process. What is
    missing or broken is named and left out, up to a tenth of all. pictures: clips of a single frame will do."""
    data, about, captions, files = run.args.data, collections.defaultdict(list), {}, {}
    for table in data.glob("*.csv"):
        with naming(table, "no csv in UTF-8 with columns video and caption"), open(table, encoding="utf-8-sig") as file:
            captions |= {str(Path(row["video"]).with_suffix("")): row["caption"] for row in csv.DictReader(file)}
    for name, *rest in listing(data):
        about[str(Path(name).with_suffix(""))].append((Path(name).suffix, *rest))
    stems = [stem for stem, found in about.items() if {kind for kind, *_ in found} & {".mp4", ".png", ".npz"}]
    settings = [run.checksum("vae"), run.recipe.clip, run.longest, listing(run.args.text_encoder),
                listing(run.args.image_encoder), run.config.size, run.config.text_dim, run.config.clip_dim]
    for stem in stems:
        if pictures or (data / f"{stem}.mp4").exists():
            key = seed_of(*settings, about[stem], captions.get(stem))
            files[stem] = run.out.parent / "clips" / f"{stem}.{key:08x}.safetensors"
        elif RANK == 0:
            print(f"left out: {data / stem}: has no video")
    todo = [stem for stem in [*files][RANK::PROCESSES] if not files[stem].exists()]
    encode = clip_encoder(run) if todo else None
    for stem in tqdm(todo, "encode clips", disable=not todo):
        try:
            clip = read_clip(run, data / stem, captions.get(stem))
        except Exception as e:                          # of a dozen kinds
            print(f"left out: {data / stem}: {(str(e).strip() or repr(e)).splitlines()[0]}")
            continue
        keep(files[stem], encode(clip))
    mean_processes(torch.zeros(1))                      # those of the others are there
    there = [file for file in files.values() if file.exists()]
    if not stems or len(there) < 0.9 * len(stems):
        raise UserError(f"{data}: {len(there)} of {len(stems)} clips can be used here; a clip is a.mp4"
                        f"{' or a.png' if pictures else ''}, a.npz and a.txt")
    return there


def clip_encoder(run):
    """A function from what read_clip returns to what is kept of it: latents (1, C, F, h, w) float16, text (1, text_len,
    text_dim) and, for an image branch, clip (1, 257, clip_dim). Each encoder is loaded when first needed, and once."""
    c, args, vae = run.config, run.args, run.vae()
    text_rows, image_rows = functools.cache(text_encoder), functools.cache(image_encoder)

    @torch.no_grad()
    def encode(clip):
        video, prompt = clip.pop("video").to(run.device) / 127.5 - 1, clip.pop("prompt", None)
        if prompt is not None:
            words = c.text_dim != UMT5_DIM
            rows = embed_words(prompt, c)[0] if words else text_rows(args.text_encoder, run.device)(prompt)
            clip["text"] = F.pad(rows, (0, 0, 0, c.text_len - len(rows)))[None]
        if c.clip_dim and "clip" not in clip:
            clip["clip"] = image_rows(args.image_encoder, run.device)(video[:, :, 0])[None]
        return clip | {"latents": vae.encode(video).half()}
    return encode


def read_clip(run, stem, caption):
    """One clip of --data: its frames as the model sees them, "video" (1, 3, T, H, W) uint8, tracks as long as the
    longest rollout, hidden ones up to TRACKS, and the prompt, or "text" and "clip" if they are encoded already. Raises
    whatever is wrong with it."""
    c, least = run.config, run.longest
    video, picture, points, prompt, own = (Path(f"{stem}.{kind}") for kind in "mp4 png npz txt safetensors".split())
    if video.exists():
        with imageio.get_reader(video) as reader:
            fps = reader.get_meta_data()["fps"]
            images = [Image.fromarray(frame) for frame in itertools.islice(reader, run.recipe.clip)]
        if fps != c.fps or len(images) < run.recipe.clip:
            raise ValueError(f"{len(images)} frames at {fps:g} a second, {run.recipe.clip} at {c.fps} are wanted")
    else:
        images = [load_image(picture)]
    with contextlib.redirect_stdout(None):              # points outside are no news
        tracks, visible, *_ = load_tracks(points, images[0].size)
        if len(tracks) < least:
            raise ValueError(f"tracks of {len(tracks)} frames, {least} are wanted")
        some = np.sort(np.random.default_rng(0).permutation(tracks.shape[1])[:TRACKS])
        motion = fit_tracks((tracks[:least, some], visible[:least, some], None), images[0].size, least, c, 0)
    frames, hidden = torch.stack([fit_image(image, c.size) for image in images], 2), TRACKS - len(some)
    clip = {"video": ((frames + 1) * 127.5).round().byte(), "tracks": F.pad(motion.tracks, (0, 0, 0, hidden)),
            "visible": F.pad(motion.visible, (0, hidden))}
    if own.exists() and c.text_dim == UMT5_DIM:
        given = SimpleNamespace(prompt=None, prompt_embeds=own, image_encoder=run.args.image_encoder, weights=stem)
        held = c.clip_dim if "clip" in read_tensors(own)[0] else 0              # else clip_encoder sees the image
        text, _, seen = read_encoded(given, replace(c, causal=True, clip_dim=held), frames[:, :, 0], run.device)
        return clip | {"text": text} | ({"clip": seen} if held else {})
    if c.text_dim == UMT5_DIM and not run.args.text_encoder:
        raise ValueError("its prompt has to be encoded, give --text-encoder DIR")
    return clip | {"prompt": caption if caption and not prompt.exists() else prompt.read_text(encoding="utf-8")}


def film_clips(run, name):
    """For `kept`: clips, filmed and encoded, {"latents" (B, C, F, h, w) float16, "tracks", "visible", "text"}. For
    "images…", which distillation starts from, F is 1 and the tracks are as long as its longest rollout."""
    vae, images, each = run.vae(), name.startswith("images"), 2 * run.recipe.batch

    @torch.no_grad()
    def piece(i):
        rng = torch.Generator().manual_seed(seed_of(run.seed, name, i))
        scenes = new_scenes(each, run.longest if images else CLIP, rng)
        with run.autocast():
            latents = vae.encode(film(scenes, SIZE, 0, 1 if images else None).to(run.device))
        tracks, visible = scene_tracks(scenes, SIZE, rng)
        text = torch.cat([embed_words(caption, run.config) for caption in scenes["caption"]])
        return {"latents": latents.half(), "tracks": tracks, "visible": visible, "text": text}
    return piece


def painted(visible):
    """What of the true tracks (B, T, N) a user might have painted: from nothing and a single drag to the dense grid,
    some starting and ending in the middle, and a fifth of the clips with a pause in all of them (section 3.1)."""
    B, T, N = visible.shape
    order = torch.rand(B, OBJECTS, POINTS)
    order[:, :, 0] -= 0.5 * torch.rand(B, OBJECTS)                                 # rather the centre than the rim
    count = torch.tensor([0, 1, 2, 4, 8, 8, 8, 8])[torch.randint(0, 8, (B, OBJECTS, 1))]
    objects = order.argsort(2).argsort(2) < count
    count = torch.tensor([0, 0, 1, 4, 9, 32, 64])[torch.randint(0, 7, (B, 1))]
    ground = torch.rand(B, N - OBJECTS * POINTS).argsort(1).argsort(1) < count
    keep = torch.cat([objects.flatten(1), ground], 1)
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
    """Random clips of the pool, of `frames` latents, with all tracks (dense) or as a user might have painted them, a
    tenth without text: their first `known` latents (B, C, F, h, w), the conditions but for tracks, and the points that
    the track head takes."""
    clips = pick(pool, batch, known or frames)
    latents = clips["latents"].float()
    length = 4 * (frames or latents.shape[2]) - 3
    tracks, visible = clips["tracks"][:, :length], clips["visible"][:, :length]
    visible = thinned(visible, not dense) if run.args.data else visible if dense else painted(visible)
    given = {key: clips[key].float() for key in ("text", "clip") if key in clips}
    given["text"] = given["text"] * (torch.rand(batch, 1, 1) > 0.1)
    if run.config.image_dim:
        given["image"] = image_channels(latents[:, :, :1], (length + 3) // 4)
    points = {"tracks": tracks, "visible": visible, "ids": track_ids(tracks, visible, run.config)}
    return latents.to(run.device), *({k: v.to(run.device) for k, v in part.items()} for part in (given, points))


def clean_first(x0, conditions):
    """What with_first takes of clips x0: their first latent, None for models that have it as channels."""
    return None if "image" in conditions else x0[:, :, :1]


# Stage 2: the teacher.

def draw_sigma(batch, shift, share_at_one):
    """Noise levels (B,): logit-normal, shifted; a share of them at exactly 1, where only the conditions help."""
    sigma = shift_sigma(torch.randn(batch).sigmoid(), shift)
    return torch.where(torch.rand(batch) < share_at_one, torch.ones(batch), sigma)


def flow_loss(model, x0, sigma, conditions, emphasis=0.0):
    """Rectified flow: mean squared error of the velocity at sigma (B,), the first frame given (appendix D). Cells that
    a track touches, and those beside them, count 1 + emphasis: most of a picture is ground that stays where it is.
    (The weight depends on the conditions alone, so the minimum is the same.)"""
    noise, first = torch.randn_like(x0), clean_first(x0, conditions)
    x_t, level = with_first(add_noise(x0, noise, sigma), sigma, first)
    error = (model(x_t, level, **conditions) - (noise - x0)).square().mean(1)             # (B, F, h, w)
    touched = (conditions["tracks"].detach() != 0).any(1).float()
    weight = 1 + emphasis * F.max_pool2d(touched, 3, 1, 1)
    start = 0 if first is None else 1
    return (error * weight)[:, start:].sum() / weight[:, start:].sum()


def train_teacher(run):
    """Bidirectional rectified flow on half and on whole clips, half of it at sigma 1. The first quarter sees all
    tracks, as in the paper's first stage: with dense tracks a model learns sooner what they are for. That is seen early
    in the error at sigma 1 with all tracks and with none, on clips never trained on, and not in the flow loss.
    From --weights without a track head, all of it is the paper's first stage; from those with one, the second."""
    from test_motionstream import x0_errors
    pool, r, batch = kept(run, "pool", "vae", run.clips, film_clips), run.recipe, run.recipe.batch
    if run.args.data:
        held = len(pool) // 20                          # of fewer clips, one is trained on too
        fresh, pool = pool[:max(held, 1)], pool[held:]
    else:
        fresh = kept(run, "fresh", "vae", 24, film_clips)
    model = run.model("start", **vars(run.config)) if run.start else MotionStream(run.config).to(run.device)
    model.requires_grad_(True).track_head.requires_grad_(not (run.start and run.start.head))
    optimizer = Optimizer(model, *r.teacher, steps=run.steps["teacher"] // run.batches, ema=0.99, **run.shared())

    def step(i):
        dense, long = i < int(run.dense * run.steps["teacher"]), run.full or i // run.batches % 4 == 0
        x0, given, points = draw_batch(run, pool, *((batch, None) if long else (2 * batch, 6)), dense)
        sigma = draw_sigma(len(x0), run.config.shift, r.at_sigma_1).to(run.device)
        keep = (torch.rand(len(x0), 1, 1, 1, 1) > 0.1).to(run.device)        # the rest is without any motion input
        with run.autocast():
            loss = flow_loss(model, x0, sigma, given | {"tracks": keep * track_features(model, **points)}, r.emphasis)
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
    teacher, wanted = run.model("teacher"), {*run.config.sigmas}

    @torch.no_grad()
    def piece(i):
        torch.manual_seed(seed_of(run.seed, name, i))
        x0, given, points = draw_batch(run, pool, 2 * run.recipe.batch)
        with run.autocast():
            conditions = given | {"tracks": track_features(teacher, **points)}
            states = [x for x, sigma in euler(teacher, torch.randn_like(x0), conditions, clean_first(x0, given))
                      if sigma in wanted or sigma == 0]
        assert len(states) == len(wanted) + 1, f"{len(states) - 1} of {wanted} lie on the teacher's schedule"
        return {"states": torch.stack(states, 1).half(), **given, **points}
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


def causal_loss(model, states, x0, memory, conditions, context):
    """Regression through the caches: each chunk predicts its clean end from its own state at a drawn noise level, and
    from what a cache of `context` (sink, window) holds of the clean chunks of `memory`, which is x0 or worn.
    states: one (B, C, F, h, w) a level."""
    caches = [KVCache(*context) for _ in model.blocks]
    chunk, sigmas, loss = model.config.chunk, model.config.sigmas, 0.0
    for start, part in zip(range(0, x0.shape[2], chunk), by_chunk(conditions, chunk)):
        now = slice(start, start + chunk)
        target, level = x0[:, :, now], int(torch.randint(0, len(sigmas), ()))
        sigma = torch.full((len(x0),), sigmas[level], device=x0.device)
        first = clean_first(target, conditions) if start == 0 else None
        x_t, sigma = with_first(states[level][:, :, now], sigma, first)
        loss = loss + (to_x0(x_t, model(x_t, sigma, caches=caches, **part), sigma) - target).square().sum()
        with torch.no_grad():
            model(memory[:, :, now], torch.zeros_like(sigma), caches=caches, write=True, **part)
    return loss / x0.numel()


def train_causal(run):
    """Student from teacher, on the teacher's ODE trajectories."""
    pool, r = kept(run, "pool", "vae", run.clips, film_clips), run.recipe       # in all processes: they wait for it
    trajectories = kept(run, "trajectories", "teacher", run.trajectories, functools.partial(sample_trajectories, pool))
    student = run.model("teacher", causal=True, **run.memory).requires_grad_(True)
    student.track_head.requires_grad_(False)                                # frozen after the teacher (appendix D)
    contexts = 3 * ((run.config.sink, run.config.window),) + CONTEXTS
    optimizer = Optimizer(student, *r.causal, steps=run.steps["causal"] // run.batches, ema=0.98, **run.shared())

    def step(i):
        batch = {key: value.to(run.device) for key, value in pick(trajectories, r.batch).items()}
        *states, x0 = batch["states"].float().unbind(1)
        context = contexts[int(torch.randint(0, len(contexts), ()))]
        with run.autocast():
            conditions = {key: batch[key] for key in ("text", "image", "clip") if key in batch}
            conditions["tracks"] = track_features(student, *(batch[key] for key in ("tracks", "visible", "ids")))
            loss = causal_loss(student, states, x0, worn(x0, run.config.chunk) if r.worn else x0, conditions, context)
        return {"loss": loss, "grad": optimizer.step(loss, i)}

    train(run, "causal", run.steps["causal"], optimizer.parts(), step, optimizer.average)


# Stage 4: Self-Forcing with distribution matching (eq. 3, 4). Generator: the student. Teacher: the real score, guided.
# Critic: the fake score, which learns what the generator makes now.

def dmd_loss(x0, teacher, critic, conditions, first, guidance, weight=1.0, shift=5.0):
    """The generator's loss on its own latents x0 (B, C, F, h, w): its gradient is (critic - teacher), both as x0
    predicted from x0 noised to one random sigma a clip, over the mean distance of x0 to the teacher (DMD eq. 7, 8).
    Where the image gives frame 0, both agree with it and the gradient is zero. weight (B,): how much a clip counts,
    exp(reward / beta) in Re-DMD (Reward Forcing eq. 11)."""
    with torch.no_grad():
        sigma = shift_sigma(torch.rand(len(x0), device=x0.device), shift).clamp(0.02, 0.98)
        x_t, level = with_first(add_noise(x0, torch.randn_like(x0), sigma), sigma, first)
        real = to_x0(x_t, guided_velocity(teacher, x_t, level, conditions, guidance), level)
        fake = to_x0(x_t, critic(x_t, level, **conditions), level)
        distance = (x0 - real).abs().mean((1, 2, 3, 4)) / weight
        direction = (fake - real) / distance.view(-1, 1, 1, 1, 1)
    return 0.5 * F.mse_loss(x0, x0.detach() - direction)


def critic_loss(x0, critic, conditions, shift=5.0):
    """The critic's loss: rectified flow on the generator's own latents, without guidance."""
    sigma = draw_sigma(len(x0), shift, 0.0).to(x0.device)
    return flow_loss(critic, x0.detach(), sigma, conditions)


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
    known, updates, betas = run.known, run.steps["distill"] // run.batches // run.recipe.critic_steps, (0.0, 0.99)
    optimizer_g = Optimizer(generator, *run.recipe.generator, betas, updates, ema=0.98, **run.shared())
    optimizer_c = Optimizer(critic, *run.recipe.critic, betas, **run.shared())

    def generate(i, grad):
        chunks, exit_step, memory = draw_rollout(run, i, grad)
        first, given, points = draw_batch(run, pool, run.recipe.batch, frames := chunks * run.config.chunk, known=1)
        given["text"] = given["text"] if chunks == known or run.args.data else neutral.expand_as(given["text"])
        generator.config = replace(generator.config, **memory)
        with run.autocast():
            conditions = given | {"tracks": track_features(generator, **points)}
            noise = torch.randn(*first.shape[:2], frames, *first.shape[3:], device=run.device)
            clean = clean_first(first, given)
            made = rollout(generator, noise, conditions, clean, exit_step=exit_step, grad=grad)
            x0, points = last_clip(made, known * run.config.chunk, first if chunks > known else clean, points)
            given = next(by_chunk(given, x0.shape[2]))
            return x0, given | {"tracks": track_features(generator, **points)}, given | points

    def step(i):
        numbers = {}
        if i // run.batches % run.recipe.critic_steps == 0:
            x0, conditions, batch = generate(i, grad=True)
            with run.autocast():
                first, weight = clean_first(x0.detach(), conditions), 1.0
                if reward:
                    numbers["reward"] = (score := reward(vae.decode(x0.detach())[0].float(), batch)).mean()
                    weight = torch.exp(score / run.args.beta)
                loss = dmd_loss(x0, teacher, critic, conditions, first, run.config.guidance, weight)
            numbers |= {"loss_g": loss, "grad_g": optimizer_g.step(loss, i, run.recipe.critic_steps), "std": x0.std()}
        x0, conditions, _ = generate(i, grad=False)
        with run.autocast():
            loss = critic_loss(x0, critic, conditions)
        return numbers | {"loss_c": loss, "grad_c": optimizer_c.step(loss, i)}

    parts = optimizer_g.parts("generator") | optimizer_c.parts("critic")
    train(run, "distill", run.steps["distill"], parts, step, optimizer_g.average)


# ----------------------------------------------------------------------------------------------------------------------
# The command.

# Flags of a single stage, what there is to train, and which of it a stage leaves behind and starts from.
OWN = {"distill": ("memory", "rollout", "reward", "beta", "sink_decay"), "causal": ("memory",),
       "decoder": ("adversarial", "perceptual")}
MODELS = ("vae", "teacher", "causal", "student")
STAGES = {"vae": train_vae, "teacher": train_teacher, "causal": train_causal, "distill": train_student,
          "decoder": train_decoder}                                     # only if it is named
WEIGHTS = dict(zip(STAGES, (*MODELS, "decoder")))
NEEDS = {stage: MODELS[:i] for i, stage in enumerate(STAGES)} | {
    "decoder": ("vae",), "eval": MODELS, "experiments": MODELS}
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
    c = replace(c, tracks=args.tracks or c.tracks, sink_decay=args.sink_decay)
    return c, "tiny" if not full else "second" if start and start.head else "paper"


class Run:
    """The settings of one training, its folder, and the weights in it."""

    def __init__(self, args):
        from test_motionstream import find_reward
        self.args, self.out, self.device, self.seed = args, Path(args.out), args.device, args.seed
        self.reward, self.start = args.reward and find_reward(args.reward), args.weights and inspect(args.weights)
        self.config, recipe = choose_config(args, self.start)
        self.memory = {name: getattr(self.config, name) for name in ("chunk", "sink", "window", "sink_decay")}
        self.recipe, self.full = SimpleNamespace(**RECIPES[recipe]), recipe != "tiny"
        self.recipe.clip = args.length or self.recipe.clip
        self.dense = (0 if self.start.head else 1) if self.start else 1 / 4      # share of the teacher's steps
        self.known = (self.recipe.clip + 3) // 4 // self.config.chunk           # chunks of a clip
        args.tracks, args.rollout = self.config.tracks, max(args.rollout or (0 if args.data else 16), self.known)
        self.longest = max(self.recipe.clip, 4 * self.config.chunk * args.rollout - 3)     # frames that tracks have
        self.data = (args.tracks, *listing(args.data))
        self.batches = PROCESSES * (args.accumulate or 1)
        self.steps = dict(zip(STAGES, (4, 4, 3, 6, 4) if args.smoke else self.recipe.steps))
        self.steps |= {args.stage: args.steps} if args.steps else {}
        self.vae_clips, self.clips, self.trajectories = (8, 16, 8) if args.smoke else self.recipe.clips
        self.eval_clips = args.clips or (1 if args.smoke else 16)
        self.eval_frames = args.frames or (33 if args.smoke else 10_000)
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
        return {name: getattr(self.args, name) for name in names} | (own if stage in STAGES else {}) | {
            "batches": self.batches, "weights": [*map(self.checksum, NEEDS[stage])]}

    def shared(self):
        """What all optimizers of a stage are told."""
        return {"batches": self.batches, "checkpointing": self.args.checkpointing}

    def autocast(self):
        """See compute_dtype. No cache of weights: torch before 2.11 hands those without a graph to all."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.dtype, cache_enabled=False)

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
    count = number(int, 1, 10 ** 9)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", *STAGES, "eval", "experiments"], default="all", help="(all)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in some minutes")
    parser.add_argument("--out", default=None, help="folder to write to (runs/tiny; runs/smoke with --smoke)")
    parser.add_argument("--steps", type=count, help="steps of the one stage that is named")
    parser.add_argument("--clips", type=count, help="of each kind that eval measures (16)")
    parser.add_argument("--frames", type=count, help="length of the streams that eval measures (10000)")
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
    parser.add_argument("--adversarial", type=number(float, 0, 100), default=0.01, help="weight of a decoder's (0.01)")
    parser.add_argument("--perceptual", help="LPIPS's weights, for a decoder (none)")
    parser.add_argument("--tracks", choices=["random", "start"], help="how tracks get their IDs (tiny: start)")
    return check_flags(parser, parser.parse_args(argv))


def check_flags(parser, args):
    """Refuse flags that do not go together; fill in those that depend on others."""
    if args.steps and args.stage not in STAGES:
        parser.error("--steps needs --stage with one training stage")
    for names, stages in ((OWN["distill"][2:], ("all", "distill")), (OWN["decoder"], ("decoder",)),
                          (OWN["causal"], ("all", "causal", "distill")),
                          (("clips", "frames"), ("all", "experiments", "eval"))):
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


def main(argv=None):
    """Run the stages that are not done yet. What the user can put right is one line and exit code 2."""
    try:
        args = parse_flags(argv)
        if PROCESSES > 1:
            dist.init_process_group(timeout=timedelta(hours=12))            # some may encode long after the others
            dist.init_device_mesh(args.device.split(":")[0], (PROCESSES,))  # gloo, or nccl on the GPU of LOCAL_RANK
        run = Run(args)
        from test_motionstream import dry_run, evaluate, preview         # what is promised is shown and measured there
        if args.dry_run:
            return dry_run(run)
        run.out.mkdir(parents=True, exist_ok=True)
        print(f"{'the shipped weights' if run.shipped else run.out}: {run.config}")
        print(f"matrix products on {run.device} are in {str(run.dtype)[6:]}")
        for (stage, train_stage), accumulate in zip(STAGES.items(), run.recipe.accumulate):
            done = stage == "decoder" or run.path(WEIGHTS[stage]).exists()
            if args.stage == stage or args.stage == "all" and not done:
                run.check(stage)
                run.batches = PROCESSES * (args.accumulate or max(accumulate // PROCESSES, 1))
                torch.manual_seed(seed_of(run.seed, stage))             # of the weights that a stage begins with
                train_stage(run)
                if RANK == 0:
                    preview(run, stage)
        if args.stage not in STAGES and RANK == 0 and not args.data:
            evaluate(run, args.stage.replace("all", "eval"))
    except (UserError, OSError) as e:                   # a full disk, say, whatever was written: files are whole
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                           # outside a training step: while filming, say
        return 130


if __name__ == "__main__":
    sys.exit(main())
