"""Training: learners, checkpoints, processes, clips, settings, every stage."""

import contextlib
import copy
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import train_distill as td
from extras import clips, guard, watch, world
from extras.bench import random_conditions
from extras.experiments import DRAWN_MEMORIES, draw_memory, loss_by_copies
from extras.testing import (COPYING, DRAWN, HERE, SMALL, SMALL_VAE, STUB, STUB_VAE, all_equal,
                            assert_error, assert_near, before_distillation, clip_of, folder,
                            new_model, new_tracks, new_vae, own_flags, quiet, rand, randomised,
                            same, saved, seeded, slow, small_scenes)
from motionstream import MotionStream, euler, guided_velocity, rollout, schedule
from sample import ASSETS, embed_words

patch = unittest.mock.patch


# --------------------------------------------------------------------------------------------------
# Running the program.

def trained(flags):
    """train_distill.py in this process. Returns what it printed."""
    with quiet() as (out, err):
        code = td.main([str(flag) for flag in flags])
    assert code is None, err.getvalue()
    return out.getvalue()


def refusal(flags):
    """The line with which train_distill.py ends."""
    with quiet() as (_, err):
        code = td.main([str(flag) for flag in flags])
    lines = err.getvalue().splitlines()
    assert code == 2 and lines[-1].startswith("error: "), err.getvalue()
    return lines[-1]


def one_update_each(flags, *stages):
    """Train one update of each stage."""
    for stage in stages:
        trained(flags + ["--stage", stage, "--steps", 1, "--accumulate", 1])


def log_of(here):
    """The rows of the log in a training's folder."""
    with open(here / "stats.jsonl") as file:
        return [json.loads(line) for line in file]


def without_pictures():
    """train_distill.main draws no previews in here."""
    return patch.object(watch, "show", lambda run, stage: None)


def new_run(*flags):
    words = [str(flag) for flag in flags]
    return td.resolve(td.parse(["--device", "cpu"] + words))


def distill_flags(here, updates, *more):
    """Flags of a distillation of small models, from before_distillation, on a few clips drawn by
    small_scenes."""
    flags = ["--smoke", "--stage", "distill", "--steps", updates, "--out", here, "--set", "clips=4"]
    return flags + list(more)


# --------------------------------------------------------------------------------------------------
# What a user draws.

def grouped(clips):
    """Of 88 tracks, 8 on each of three objects and 64 on the ground: (clips, 88)."""
    objects = torch.arange(3).repeat_interleave(8)
    ground = torch.full((64,), -1)
    return torch.cat([objects, ground]).expand(clips, -1)


def test_a_batch_of_clips_without_tracks_has_none_to_choose():
    visible = torch.zeros(2, 9, 0, dtype=torch.bool)
    group = torch.zeros(2, 0).long()
    run = SimpleNamespace(config=SMALL, settings=replace(td.PAPER, track_what_moves=True))
    for dense in False, True:
        given = td.given_tracks(run, torch.zeros(2, 9, 0, 2), visible, group, dense)
        assert given.equal(visible)


def test_user_tracks_are_among_the_visible_ones():
    torch.manual_seed(0)
    visible = rand(64, 45, 88) > -1
    kept = td.user_tracks(visible, grouped(64))
    share = kept.float().mean((1, 2)) / visible.float().mean((1, 2))
    assert not (kept & ~visible).any()
    assert share.min() < 0.05
    assert share.max() > 0.6
    assert 0.1 < share.mean() < 0.6


def test_what_moves_has_a_track():
    torch.manual_seed(0)
    visible = torch.ones(300, 45, 88).bool()
    group = grouped(300)
    tracks = 40 + torch.zeros(300, 45, 88, 2)
    way = torch.arange(45)[:, None] / 5
    for clip, thing in enumerate((0, 2, -1)):           # of each 100 clips one of these moves
        mine = group[0] == thing
        tracks[100 * clip:100 * (clip + 1), :, mine, 0] += way
    tracks[:, 3] += 1.2                                 # a tremble is no movement
    kept = td.user_tracks(visible, group, tracks).any(1)            # (B, N)
    for clip, thing in enumerate((0, 2, -1)):
        some = kept[100 * clip:100 * (clip + 1), group[0] == thing].any(1)
        assert some.float().mean() > 0.97, "but where a pause hides the only one"
        at_rest = kept[100 * clip:100 * (clip + 1), group[0] == 1].any(1)
        assert not at_rest.all(), "which need not have one"
    on_ground = kept[:, group[0] < 0].sum(1)
    assert on_ground[:200].min() == 0, "a ground at rest"
    assert on_ground[200:].min() >= td.MOVING_GROUND - 4, "a few end or pause"
    moved = td.goes_anywhere(tracks, visible, group == 2)
    assert moved.equal((torch.arange(300) // 100 == 1)[:, None])
    hidden = visible & (group != 2)[:, None]
    assert not td.goes_anywhere(tracks, hidden, group == 2).any(), "nobody sees it move"


def test_a_user_draws_on_some_objects_rather_at_their_centre():
    torch.manual_seed(0)
    visible = torch.ones(400, 9, 88).bool()
    drawn = td.user_tracks(visible, grouped(400)).any(1)            # (B, N)
    objects = drawn[:, :24].unflatten(1, (3, 8))
    count = objects.sum(2)
    none = (count == 0).float().mean()
    one = (count == 1).float().mean()
    assert 0.08 < none < 0.17                                       # 1 of 8 draws
    assert 0.2 < one < 0.32                                         # 2 of 8
    at_centre = objects[count == 1][:, 0].float().mean()
    assert 0.2 < at_centre < 0.5, "it is 1 of 8, and chosen more often"


def test_of_dense_tracks_a_subset_is_kept():
    torch.manual_seed(0)
    visible = torch.ones(40, 9, 2500, dtype=torch.bool)
    kept = td.dense_subset(visible, False, SMALL)
    count = kept[:, 0].sum(1)
    assert kept.equal(kept[:, :1].expand_as(kept))                  # in all frames
    assert 1000 <= count.min() < 1200
    assert 2300 < count.max() <= 2500
    assert td.dense_subset(visible[:, :, :7], False, SMALL).all(), "if there are few, all"
    visible[:, :, 40:] = False                                      # hidden ones make up the number
    assert td.dense_subset(visible, False, SMALL)[:, :, :40].all()


def test_pauses_are_of_whole_chunks_and_spare_the_first():
    torch.manual_seed(0)
    visible = torch.ones(200, 81, 40, dtype=torch.bool)
    silent = ~td.dense_subset(visible, True, SMALL).any(2)          # (B, T)
    assert not silent[:, :9].any()
    chunks = silent[:, 9:].unflatten(1, (6, 12)).float().mean(2)    # (B, 6)
    assert ((chunks == 0) | (chunks == 1)).all()
    assert 0.15 < chunks.mean() < 0.25
    five = replace(SMALL, chunk=5)                                  # of 20 frames, the first of 17
    silent = ~td.dense_subset(visible, True, five).any(2)
    assert not silent[:, :17].any()
    second = silent[:, 17:37]
    assert second.equal(second[:, :1].expand_as(second))
    assert second.any()
    six = replace(SMALL, first_chunk=6)                 # longer than the others, of 21 frames
    silent = ~td.dense_subset(visible, True, six).any(2)
    assert not silent[:, :21].any()
    assert silent[:, 21:].any()


# --------------------------------------------------------------------------------------------------
# Learners.

def on_tracks(model):
    """Conditions whose tracks come from the model's own head."""
    tracks, visible, ids = new_tracks(5, 9)
    features = model.track_head(tracks, visible, ids, 32, 48)
    return {"text": rand(2, 3, model.config.text_dim), "tracks": features}


def velocity_loss(model):
    noise, _, _ = clip_of(2)
    velocity = model(noise, torch.ones(2), **on_tracks(model))
    return velocity.square().mean()


def decoding_loss(vae, seed=0):
    latents = vae.encode(rand(1, 3, 9, 8, 8, seed=seed))
    video, _ = vae.decode_unclamped(latents)
    return video.square().mean()


def clones(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_moves_every_parameter(model, loss):
    model.requires_grad_(True)
    learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9))
    muon, adam = learner.optimizers
    hidden = muon.param_groups[0]["params"]
    rest = adam.param_groups[0]["params"]
    begin = clones(model)
    assert len(hidden) + len(rest) == len(begin)
    assert all(p.ndim > 1 for p in hidden)
    learner.backward(loss(model))
    learner.update(0)
    once = clones(model)
    for before, (name, p) in zip(begin, model.named_parameters(), strict=True):
        assert not p.equal(before), name
        assert p.grad is None, name
    for average, p in zip(learner.average.parameters(), once, strict=True):
        assert average.equal(p), "first, a copy"
    learner.backward(loss(model))
    learner.update(10)
    for average, a, b in zip(learner.average.parameters(), once, clones(model), strict=True):
        expected = a + (b - a) * 10 / 11                # the second update counts 1 - 1 / (1 + 10)
        assert_near(average, expected, 1e-5)


def test_a_learner_moves_every_parameter_of_the_model_itself():
    assert_moves_every_parameter(new_model(), velocity_loss)
    assert_moves_every_parameter(new_vae(), decoding_loss)


def test_parameters_that_a_loss_does_not_reach_stay_as_they_are():
    """An image branch, in training on clips without CLIP's features."""
    model = new_model(clip_dim=10).requires_grad_(True)
    learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9))
    begin = {name: p.clone() for name, p in model.state_dict().items()}
    for update in range(2):
        learner.backward(velocity_loss(model))
        learner.update(update)
    for name, p in model.state_dict().items():
        of_image = "_img" in name or name.startswith("img_emb")
        assert p.equal(begin[name]) == of_image, name
    again = td.Learner("toy", new_model(clip_dim=10).requires_grad_(True), learner.learning)
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert same(again.model.state_dict(), model.state_dict())
    for each in learner, again:
        each.backward(velocity_loss(each.model))
        each.update(2)
    assert same(again.model.state_dict(), model.state_dict())


def test_the_rate_rises_over_20_updates_stays_and_falls_to_0():
    how = td.Learning(None, 1e-3)
    learner = td.Learner("toy", nn.Linear(2, 2), how, updates=100)
    rates = [learner.rate_factor(number) for number in (0, 9, 19, 60, 80, 99)]
    assert_near(torch.tensor(rates), torch.tensor([0.05, 0.5, 1.0, 1.0, 0.5, 0.025]), 1e-6)
    endless = td.Learner("toy", nn.Linear(2, 2), how)
    assert endless.rate_factor(10 ** 6) == 1


def test_muon_takes_kernels_as_matrices():
    kernel = nn.Parameter(rand(6, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = rand(6, 4, 3, 3, seed=1)
    matrix.grad = kernel.grad.flatten(1)
    td.Muon([kernel], 0.1, 0.01).step()
    td.Muon([matrix], 0.1, 0.01).step()
    assert kernel.flatten(1).equal(matrix)


def updated_matrices(make):
    """Two matrices after five steps, and what the optimizer that `make` makes keeps of each."""
    matrices = [nn.Parameter(rand(24, 40)), nn.Parameter(rand(40, 24))]
    optimizer = make(matrices)
    for i in range(5):
        for n, p in enumerate(matrices):
            p.grad = rand(*p.shape, seed=10 * i + n + 1)
        optimizer.step()
    return matrices, optimizer.state_dict()["state"]


def test_muon_is_that_of_torch_which_is_in_bfloat16():
    settings = {"lr": 0.03, "weight_decay": 0.1}
    torchs = functools.partial(torch.optim.Muon, **settings)
    theirs, their_state = updated_matrices(torchs)
    for dtype, tolerance in (torch.bfloat16, 1e-6), (torch.float32, 1e-2):
        own = functools.partial(td.Muon, **settings)
        with patch.object(td, "compute_dtype", lambda device: dtype):
            ours, state = updated_matrices(own)
        for n in range(2):
            assert_near(ours[n], theirs[n], tolerance)
            assert_near(state[n]["momentum_buffer"], their_state[n]["momentum_buffer"], 1e-6)


def test_muons_iteration_is_in_the_dtype_that_is_given():
    """Compared with the polynomial of each singular value, in float64."""
    matrix = rand(24, 40)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    exact = u * values @ v
    error = {}
    for dtype in torch.bfloat16, torch.float32:
        made = td.orthogonal(matrix, dtype)
        assert made.dtype == dtype
        assert td.orthogonal(matrix.T, dtype).T.equal(made)
        error[dtype] = (made - exact).abs().max().item() / exact.abs().max().item()
    assert error[torch.float32] < 1e-5 < error[torch.bfloat16] < 0.1, error
    singular = torch.linalg.svdvals(td.orthogonal(matrix, torch.float32))
    assert 0.6 < singular.min()
    assert singular.max() < 1.3


def test_matrix_products_are_in_float32_on_a_cpu_and_in_bfloat16_on_a_gpu():
    assert td.compute_dtype("cpu") == td.compute_dtype(torch.device("cpu")) == torch.float32
    assert td.compute_dtype("cuda:0") == torch.bfloat16
    run = new_run()
    assert run.dtype == torch.float32
    assert "dtype" not in guard.checkpoint_settings(run, "vae")
    for dtype in torch.float32, torch.bfloat16:
        with replace(run, dtype=dtype).autocast():
            product = rand(4, 4) @ rand(4, 4)
        assert product.dtype == dtype


def losses_and_gradients(loss, checkpointing):
    """(The loss of a new model, its parameters' gradients, how often its blocks ran forward in the
    loss, and in all)."""
    model = new_model().requires_grad_(True)
    model.recompute_blocks(checkpointing)
    learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9))
    runs = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    value = loss(model)
    forwards = runs.count(True)
    learner.backward(value)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return value, gradients, forwards, runs.count(True)


def test_blocks_that_are_recomputed_give_the_same_losses_and_gradients():
    noise, given, first = clip_of(15)                   # five chunks: the cache forgets two of them

    def bidirectional(model):
        torch.manual_seed(0)
        return td.flow_loss(model, noise, torch.tensor([0.3, 0.9]), given, first)

    def streamed(model):
        chunks = rollout(model, noise, given, first, exit_step=1, rng=seeded())
        return torch.cat(list(chunks), 2).square().mean()

    for loss in bidirectional, streamed:
        kept, of_kept, forwards, in_all = losses_and_gradients(loss, checkpointing=False)
        assert in_all == forwards > 0
        again, of_again, forwards, in_all = losses_and_gradients(loss, checkpointing=True)
        assert in_all == 2 * forwards
        assert abs(kept / again - 1) <= 1e-5
        assert len(of_kept) > 40
        assert_same_gradients([of_kept], [of_again])


# --------------------------------------------------------------------------------------------------
# Checkpoints.

def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, td.DTensor) else tensor


@contextlib.contextmanager
def keeping_gradients():
    """A list to which each update appends its whole gradients, a list."""
    kept = []
    clip = nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, limit):
        kept.append([whole(p.grad).clone() for p in parameters])
        return clip(parameters, limit)

    with patch.object(nn.utils, "clip_grad_norm_", clip_and_keep):
        yield kept


def toy_loss(model):
    x0 = torch.randn(2, 4, 2, 4, 6)
    return td.flow_loss(model, x0, torch.rand(2), on_tracks(model), x0[:, :, :1])


def new_toy():
    return new_model(num_layers=1).requires_grad_(True)


def toy_run(here, always_save=False):
    settings = replace(td.TINY, checkpoint_minutes=-1 if always_save else 5)
    return SimpleNamespace(out=here, seed=1, device="cpu", dtype=torch.float32, settings=settings)


class Toy:
    """Some updates of a small model in the folder `here`. settings: of its checkpoints."""

    def __init__(self, here, updates=6, accumulate=1, **settings):
        self.here = here
        self.updates = updates
        self.model = new_toy()
        learning = td.Learning(1e-2, 1e-2, ema=0.9)
        self.learner = td.Learner("toy", self.model, learning, updates, accumulate)
        self.settings = {"data": "toy", "seed": 1} | settings
        self.gradients = None
        self.said = ""

    def train(self, stop_at=None, nan_at=None, always_save=False):
        """A signal comes in the first micro-step of update stop_at; the losses of update nan_at are
        NaN."""
        settings = patch.object(guard, "checkpoint_settings", lambda run, stage: self.settings)
        with quiet() as (out, _), settings, keeping_gradients() as self.gradients:
            try:
                loop = td.Loop(toy_run(self.here, always_save), "toy", self.updates, self.learner)
                for update in loop:
                    for _ in loop.micro_steps():
                        if update == stop_at and not self.learner.micro_steps:
                            os.kill(os.getpid(), signal.SIGTERM)
                        loss = toy_loss(self.model)
                        if update == nan_at:
                            loss = loss * math.nan
                        self.learner.backward(loss)
                        loop.log(loss=loss)
                    loop.log(grad=self.learner.update(update))
            finally:
                self.said = out.getvalue()

    def tensors(self):
        """Of the model and of its average, whole, by name."""
        tensors = {}
        for net, module in ("model", self.model), ("average", self.learner.average):
            for name, p in module.state_dict().items():
                tensors[f"{net}.{name}"] = whole(p).clone()
        return tensors

    def losses(self):
        return [row["loss"] for row in log_of(self.here)]


def trained_toy(here, updates=6, accumulate=1):
    toy = Toy(here, updates, accumulate)
    toy.train()
    return toy


def stopped_toy(here, stop_at, updates=6, accumulate=1, always_save=False):
    toy = Toy(here, updates, accumulate)
    assert_error(SystemExit, "143", toy.train, stop_at, always_save=always_save)
    return toy


def test_an_interrupted_training_continues_with_the_same_bits_and_no_other_settings():
    with folder() as one, folder() as two:
        uninterrupted = trained_toy(one)
        stopped = stopped_toy(two, 2)
        assert "saved at update 3; the same command goes on\n" in stopped.said
        with open(two / "stats.jsonl", "a") as file:    # as if killed at update 4
            file.write('{"stage": "toy", "step": 3, "loss": 1, "seconds": 1}\n')
            file.write('{"stage": "other", "step": 9, "loss": 1, "seconds": 1}\n{"sta')
        other_data = Toy(two, data="else")
        assert_error(td.UserError, "of other settings (data toy, now else);", other_data.train)
        other = Toy(two, updates=7, seed=2)
        assert_error(td.UserError, "(updates 6, now 7; seed 1, now 2);", other.train)
        twice = Toy(two, accumulate=2)
        assert_error(td.UserError, "(micro-steps an update 1, now 2);", twice.train)
        resumed = trained_toy(two)
        assert same(uninterrupted.tensors(), resumed.tensors())
        losses = resumed.losses()
        assert losses.pop(3) == 1, "another stage's line stays"
        assert losses == uninterrupted.losses(), "each update once"
        assert len(losses) == 6


def test_a_stop_waits_for_the_end_of_an_update():
    with folder() as one, folder() as two:
        uninterrupted = trained_toy(one, 2, 3)
        stopped_toy(two, 0, 2, 3)
        assert (two / "toy.0000001.checkpoint.pt").exists()
        resumed = trained_toy(two, 2, 3)
        assert same(uninterrupted.tensors(), resumed.tensors())
        assert uninterrupted.losses() == resumed.losses()
        assert len(resumed.losses()) == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it():
    with folder() as one, folder() as two:
        uninterrupted = trained_toy(one)
        stopped = stopped_toy(two, 4, always_save=True)
        assert "saved at update 5" in stopped.said
        names = sorted(path.name for path in two.glob("*.pt"))
        assert names == ["toy.0000004.checkpoint.pt", "toy.0000005.checkpoint.pt"], "the last two"
        newest = two / names[1]
        newest.write_bytes(newest.read_bytes()[:1000])
        resumed = trained_toy(two)
        assert "0000005.checkpoint.pt: damaged" in resumed.said
        assert "0000004.checkpoint.pt: resumed at update 4" in resumed.said
        assert same(uninterrupted.tensors(), resumed.tensors())
        assert len(resumed.losses()) == 6
        assert (two / "toy.0000005.checkpoint.damaged").exists()


def linear_learner():
    model = nn.Linear(3, 2)
    learner = td.Learner("toy", model, td.Learning(None, 1e-3, ema=0.9))
    learner.backward(model(torch.ones(1, 3)).sum())
    learner.update(0)
    return learner


def mutated(data, rng):
    """A copy of bytes with a bit flipped, a part zeroed, cut off, doubled or from elsewhere."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    length = rng.randrange(1, 200)
    piece = data[at:at + length]
    change = rng.randrange(6)
    if change < 2:
        data[at] ^= 1 << rng.randrange(8)
    elif change == 2:
        data[at:at + length] = bytes(len(piece))
    elif change == 3:
        del data[at:]
    elif change == 4:
        data[at:at] = piece
    else:
        data[at:at + length] = data[:length]
    return bytes(data)


def assert_whole_or_the_one_before(here, written, second, content):
    """What is loaded with `content` in the place of the second checkpoint of two, which held
    `written`."""
    second.write_bytes(content)
    learner = linear_learner()
    with quiet() as (out, _):
        updates = td.load_checkpoint(here, "toy", {}, [learner])
    if updates == 2:                                    # what has changed is not read
        assert same(learner.model.state_dict(), written), content
        return
    said, resumed = out.getvalue().splitlines()
    assert updates == 1
    assert said.startswith(f"{second}: damaged ("), said
    assert resumed == "toy.0000001.checkpoint.pt: resumed at update 1"
    assert not second.exists()


def test_whatever_happens_to_a_checkpoint_it_is_as_written_or_the_one_before_is_taken():
    with folder() as here:
        learner = linear_learner()
        for updates in 1, 2:
            td.save_checkpoint(here, "toy", updates, {}, [learner])
        second = here / "toy.0000002.checkpoint.pt"
        written = copy.deepcopy(learner.state_dict()["model"])
        content = second.read_bytes()
        flipped = bytearray(content)
        at = content.index(written["weight"].numpy().tobytes())
        flipped[at] ^= 1                                # one bit of a weight
        assert_whole_or_the_one_before(here, written, second, bytes(flipped))
        assert (here / "toy.0000002.checkpoint.damaged").exists()
        for seed in range(30):
            damaged = mutated(content, random.Random(seed))
            assert_whole_or_the_one_before(here, written, second, damaged)


def test_checkpoints_that_fit_nothing_end_in_one_line_and_nothing_is_removed():
    with folder() as here:
        td.save_checkpoint(here, "toy", 2, {}, [linear_learner()])
        wider = td.Learner("toy", nn.Linear(4, 2), td.Learning(None, 1e-3))
        assert_error(td.UserError, "toy.0000002.checkpoint.pt: of another toy (",
                     td.load_checkpoint, here, "toy", {}, [wider])
        path = here / "toy.0000002.checkpoint.pt"
        path.write_bytes(path.read_bytes()[:500])
        there = sorted(here.iterdir())
        with quiet():
            assert_error(td.UserError, "no other checkpoint of the stage toy is whole",
                         td.load_checkpoint, here, "toy", {}, [wider])
        assert sorted(here.iterdir()) == there


def saved_updates(minutes):
    """The updates after which a training of 50 s an update has written a checkpoint."""
    now = [0]
    saved = []

    def save(here, stage, updates, settings, learners):
        saved.append(updates)

    stubs = patch.multiple(td, save_checkpoint=save)
    settings = patch.object(guard, "checkpoint_settings", lambda run, stage: {})
    clock = patch.object(td.time, "time", lambda: now[0])
    with folder() as here, quiet(), stubs, settings, clock:
        run = toy_run(here)
        run.settings = replace(run.settings, checkpoint_minutes=minutes)
        for _ in td.Loop(run, "toy", 5, linear_learner()):
            now[0] += 50
    return saved


def test_checkpoints_are_as_often_as_is_said_and_how_often_may_change():
    assert saved_updates(5) == [5]
    assert saved_updates(1.6) == [2, 4, 5]
    settings = guard.checkpoint_settings(new_run(), "vae")
    assert not settings.keys() & {"checkpoint_minutes", "export_every", "tflops"}
    assert "batch" in settings


def test_weights_of_some_updates_are_kept_to_choose_from():
    with folder() as here:
        run = new_run("--out", here, "--set", "export_every=2")
        model = new_model()
        for update in range(1, 6):
            td.export_weights(run, "student", model, update)
        names = sorted(path.name for path in here.iterdir())
        assert names == ["student.00002.safetensors", "student.00004.safetensors"]
        ours = MotionStream.from_pretrained(here / "student.00004.safetensors")
        for name, p in ours.state_dict().items():
            assert p.half().equal(model.state_dict()[name].half()), name


def test_nan_stops_a_training_before_anything_moves():
    with folder() as here, folder() as other:
        broken = Toy(here)
        said = "toy, update 3: loss nan, gradient norm nan; stopped before anything moved"
        assert_error(td.UserError, said, broken.train, nan_at=3)
        stopped = stopped_toy(other, 2)                 # three updates, none of NaN
        assert same(stopped.model.state_dict(), broken.model.state_dict())


@contextlib.contextmanager
def files_of_at_most(size):
    resource = importlib.import_module("resource")      # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_it():
    with folder() as here:
        stopped_toy(here, 2)
        clip = here / "pool/x.safetensors"
        with files_of_at_most(50_000):
            toy = Toy(here)
            assert_error(OSError, "toy.0000006.checkpoint.pt: ", toy.train)
            large = {"a": torch.zeros(50_000)}
            assert_error(OSError, "x.safetensors: ", td.write_clip, clip, large)
        assert not list(clip.parent.iterdir())
        clip.parent.rmdir()
        names = sorted(path.name for path in here.iterdir())
        assert names == ["stats.jsonl", "toy.0000003.checkpoint.pt"]
        assert "resumed at update 3" in trained_toy(here).said


# --------------------------------------------------------------------------------------------------
# Two processes.

def vae_gradients():
    """Of an update by two micro-steps, of one process or of two."""
    vae = new_vae().requires_grad_(True)
    learner = td.Learner("vae", vae, td.Learning(1e-3, 1e-3), accumulate=2)
    with keeping_gradients() as gradients:
        for i in range(td.RANK, 2, td.PROCESSES):
            learner.backward(decoding_loss(vae, seed=i))
        learner.update(0)
    return gradients


def distillation_gradients(here, *more):
    """Of an update of a distillation, the generator's and the critic's."""
    flags = distill_flags(here, 1, "--rollout", "5", *more)
    with without_pictures(), small_scenes(), keeping_gradients() as gradients:
        trained(flags)
    return gradients


@contextlib.contextmanager
def counting(name, older):
    """Notes in a list each time that FSDP calls a collective; older: its name before torch 2.12."""
    if not hasattr(td.dist, name):
        name = older
    collective = getattr(td.dist, name)
    calls = []

    def note(*args, **kwargs):
        calls.append(name)
        return collective(*args, **kwargs)

    with patch.object(td.dist, name, note):
        yield calls


def counting_reductions():
    """Counts how often gradients are reduced."""
    return counting("reduce_scatter_single", "reduce_scatter_tensor")


def counting_gathers():
    """Counts how often parameters are gathered."""
    return counting("all_gather_single", "all_gather_into_tensor")


UPDATES = 2         # of a toy training in two processes
ACCUMULATE = 4      # micro-steps of an update: two of each process


def toy_results(here):
    """What a toy training gives that two processes share."""
    with counting_reductions() as reduced:
        toy = trained_toy(here, UPDATES, ACCUMULATE)
    own = sum(p.to_local().numel() for p in toy.model.parameters())
    size = sum(p.numel() for p in toy.model.parameters())
    return {"gradients": toy.gradients, "tensors": toy.tensors(), "said": toy.said,
            "own": own, "size": size, "reduced": len(reduced)}


def toy_update(shard_gradients):
    """(The gradients of an update of a toy by two processes, how often they were reduced), with
    gradients that are whole until its end or that are shared after every micro-step."""
    torch.manual_seed(0)
    model = new_toy()
    learner = td.Learner("toy", model, td.Learning(None, 1e-3), accumulate=ACCUMULATE,
                         shard_gradients=shard_gradients)
    with keeping_gradients() as gradients, counting_reductions() as reduced:
        for i in range(td.RANK, ACCUMULATE, 2):
            torch.manual_seed(i)
            learner.backward(toy_loss(model))
        learner.update(0)
    return gradients[0], len(reduced)


CHUNKS = 4
LAYERS = 2


def rollout_update(gathered):
    """(Gathers of a rollout of CHUNKS chunks, those of its backward, its loss, the gradients) of a
    student of two processes, which `gathered` surrounds."""
    torch.manual_seed(0)
    student = new_model(num_layers=LAYERS).requires_grad_(True)
    student.track_head.requires_grad_(False)
    learner = td.Learner("student", student, td.Learning(None, 1e-3), accumulate=2)
    x0, given, first = clip_of(3 * CHUNKS)
    with counting_gathers() as forward, gathered(student):
        loss = td.rollout_loss(student, x0, given, first, exit_step=1)
    with counting_gathers() as backward, keeping_gradients() as gradients:
        learner.backward(loss)
        learner.update(0)
    return len(forward), len(backward), loss.item(), gradients[0]


def consistency_update():
    """(Gathers of a consistency loss, that loss, the gradients) of CHUNKS chunks, in one process or
    in each of two."""
    torch.manual_seed(0)
    student, forced = [new_model(seed, num_layers=LAYERS, steps=2) for seed in range(2)]
    student.requires_grad_(True).track_head.requires_grad_(False)
    learner = td.Learner("student", student, td.Learning(None, 1e-3, ema=0.9), accumulate=2)
    x0, given, _ = clip_of(3 * CHUNKS)
    inputs = (student, [x0, x0], x0, given, dict(sink=1, window=1))
    with counting_gathers() as gathers, td.gathered(student):
        loss = loss_by_copies(td.shard(forced), learner.average, 1, *inputs)
    with keeping_gradients() as gradients:
        learner.backward(2 / td.PROCESSES * loss)       # of two alike, or of one alone
        learner.update(0)
    return len(gathers), loss.item(), gradients[0]


def teachers_score(here, replicate):
    """(Gathers of the teacher's passes in a generator's loss, that loss, numbers of the teacher's
    parameters in this process) by replicate_teacher. The critic is whole here."""
    clip, given, _ = clip_of(3, DRAWN)
    with small_scenes():
        run = new_run(*distill_flags(here, 1, "--set", f"replicate_teacher={replicate}"))
    teacher = td.real_score(run)
    critic = new_model(seed=1, **vars(DRAWN))
    torch.manual_seed(0)
    with counting_gathers() as gathers, torch.no_grad():
        loss = td.dmd_loss(clip, teacher, critic, given, clip[:, :, :1], 5.0)
    own = Counter()
    for p in teacher.parameters():
        p = p.to_local() if hasattr(p, "to_local") else p
        own[p.dtype] += p.numel()
    return len(gathers), loss.item(), own


def be_one_of_two(here):
    """What each of the processes does that two_processes starts."""
    results = {"distilled": distillation_gradients(here / "distilled", "--checkpointing")}
    results["whole"] = toy_update(shard_gradients=False)
    results["shared"] = toy_update(shard_gradients=True)
    results["kept"] = rollout_update(td.gathered)
    results["each"] = rollout_update(contextlib.nullcontext)
    results["consistent"] = consistency_update()
    for replicate in False, True:
        results[f"teacher {replicate}"] = teachers_score(here / "distilled", replicate)
    results["fresh"] = toy_results(here / "fresh")
    results["resumed"] = toy_results(here / "resumed")
    results["vae"] = vae_gradients()
    torch.save(results, here / f"results{td.RANK}.pt")
    td.dist.destroy_process_group()
    if td.RANK == 0:
        _, status = os.wait()
        assert status == 0, "the other one has failed"
    os._exit(0)                                         # Python's own end takes a second


# Until torch is there takes longer than the trainings: it is loaded once, then one process becomes
# two, before train_distill.py looks at RANK.
TWO = """
import os, pathlib, sys, sample, torch._dynamo, torch.distributed.fsdp
os.environ["RANK"] = "0" if os.fork() else "1"
import extras.test_train as test
test.be_one_of_two(pathlib.Path(sys.argv[1]))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@functools.cache
def two_processes():
    """(A folder with trainings by two processes, what each of them found), for several tests."""
    keeper = tempfile.TemporaryDirectory()
    here = Path(keeper.name)
    for name in "distilled", "fresh", "resumed":
        (here / name).mkdir()
    before_distillation(here / "distilled")
    stopped_toy(here / "resumed", 0, UPDATES, ACCUMULATE)     # after update 1, by one process
    as_torchrun_says = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-W", "ignore", "-c", TWO, here], cwd=HERE, check=True,
                   timeout=600, env=os.environ | as_torchrun_says)
    return keeper, here, [torch.load(here / f"results{rank}.pt") for rank in range(2)]


def assert_same_gradients(ours, theirs):
    """To 1e-5 of the largest of each parameter's, but 1e-3 after an update by Muon, which may round
    to bfloat16: sums in another order may round to the other side."""
    for update, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(left, right, strict=True):
            assert_near(b, a, 1e-3 if update else 1e-5)


def assert_moved_alike(start, ours, theirs):
    """Two state dicts went the same way from `start`, to a fifth of it: Muon fills what a gradient
    of low rank leaves open, and that is rounding."""
    assert ours.keys() == theirs.keys() == start.keys()
    way = 0.0
    apart = 0.0
    for name, p in ours.items():
        way += (p.float() - start[name]).square().sum()
        apart += (p.float() - theirs[name]).square().sum()
    assert apart < 0.04 * way, (apart, way)


@functools.cache
def toy_of_one():
    """The toy training by one process; its folder."""
    keeper = tempfile.TemporaryDirectory()
    return keeper, trained_toy(Path(keeper.name), UPDATES, ACCUMULATE)


def test_an_update_follows_the_mean_gradient_of_its_micro_steps():
    _, toy = toy_of_one()
    assert len(toy.losses()) == UPDATES, "one row an update"
    model = new_toy()
    losses = []
    for i in range(ACCUMULATE):
        torch.manual_seed(td.seed_of(1, "toy", i))
        loss = toy_loss(model)
        loss.backward()
        losses.append(loss.item())
    for p, mean in zip(model.parameters(), toy.gradients[0], strict=True):
        assert_near(mean, p.grad / ACCUMULATE, 1e-5)
    assert abs(toy.losses()[0] - sum(losses) / ACCUMULATE) < 1e-4


def drawn_numbers(passes, rank=0, processes=1):
    """{micro-step: what one of so many processes draws in it}, of two updates of four micro-steps,
    each gone through so often."""
    drawn = {}
    learner = SimpleNamespace(name="toy", accumulate=4 // processes, state_dict=dict)
    stubs = patch.multiple(td, RANK=rank, PROCESSES=processes, mean_processes=lambda tensor: tensor,
                           from_first=lambda value: value)
    settings = patch.object(guard, "checkpoint_settings", lambda run, stage: {})
    with folder() as here, quiet(), stubs, settings:
        loop = td.Loop(toy_run(here), "toy", 2, learner)
        for _ in loop:
            for i in itertools.chain(*[loop.micro_steps() for _ in range(passes)]):
                drawn.setdefault(i, []).append(torch.rand(()).item())
    return drawn


def test_random_numbers_of_a_micro_step_are_its_own_whoever_draws_them_and_however_often():
    once = drawn_numbers(1)
    assert sorted(once) == list(range(8))
    assert len({number for number, in once.values()}) == 8
    torch.manual_seed(td.seed_of(1, "toy", 5))
    assert once[5] == [torch.rand(()).item()]
    twice = drawn_numbers(2)
    torch.manual_seed(td.seed_of(1, "toy", 5))
    assert twice[5] == [torch.rand(()).item(), torch.rand(()).item()], "goes on"
    shared = drawn_numbers(2, 0, 2) | drawn_numbers(2, 1, 2)
    assert shared == twice


def test_two_processes_have_the_gradients_of_one_that_accumulates_as_many_micro_steps():
    _, one = toy_of_one()
    _, _, results = two_processes()
    begin = Toy(Path("nowhere")).tensors()
    of_vae = vae_gradients()
    for found in results:
        assert_same_gradients(one.gradients, found["fresh"]["gradients"])
        assert_same_gradients(of_vae, found["vae"])
        assert_moved_alike(begin, one.tensors(), found["fresh"]["tensors"])
        assert found["fresh"]["own"] < 0.6 * found["fresh"]["size"], "each keeps a part"
        reduced = found["fresh"]["reduced"]
        assert reduced == 2 * 3, "once an update: the block, the track head, the rest"


def test_gradients_that_are_shared_after_every_micro_step_are_the_same():
    _, _, results = two_processes()
    for found in results:
        whole, once = found["whole"]
        shared, often = found["shared"]
        assert often == 2 * once > 0, (once, often)
        for a, b in zip(whole, shared, strict=True):
            assert_near(b, a, 1e-5)


def test_a_rollout_gathers_its_student_once_and_its_losses_stay_the_same():
    _, _, results = two_processes()
    parts = LAYERS + 1                                  # each block, and the rest of the model
    passes = 2 * CHUNKS + CHUNKS - 1                    # denoising steps, and clean passes but one
    for found in results:
        gathers, backward, loss, gradients = found["kept"]
        gathers_each, backward_each, loss_each, gradients_each = found["each"]
        assert gathers_each == passes * parts, gathers_each
        assert gathers == parts, gathers
        assert backward == backward_each > 0
        assert loss == loss_each
        assert all_equal(gradients, gradients_each)


def test_consistency_gathers_each_of_its_networks_once_and_is_that_of_one_process():
    _, _, results = two_processes()
    _, loss, gradients = consistency_update()
    for found in results:
        gathers, loss_of_two, gradients_of_two = found["consistent"]
        assert gathers == 3 * (LAYERS + 1), gathers
        assert abs(loss_of_two / loss - 1) < 1e-5
        assert_same_gradients([gradients], [gradients_of_two])


def test_a_replicated_teacher_gathers_nothing_and_scores_as_the_sharded_one():
    _, _, results = two_processes()
    count = sum(p.numel() for p in new_model(**vars(DRAWN)).parameters())
    for found in results:
        gathers, loss, own = found["teacher False"]
        assert gathers == DRAWN.num_layers + 1
        assert own.keys() == {torch.float32} and own.total() < 0.6 * count
        gathers, loss_of_whole, own = found["teacher True"]
        assert gathers == 0
        assert own.total() == count
        assert own[torch.bfloat16] > own[torch.float32] > 0
        assert 0 < abs(loss_of_whole / loss - 1) < 0.02, (loss_of_whole, loss)


def test_a_teacher_in_bfloat16_takes_what_a_training_gives_it_with_autocast_and_without():
    with_clip = replace(SMALL, causal=False, clip_dim=40, in_dim=16, clean_first=False)
    for config in replace(SMALL, causal=False), replace(COPYING, causal=False), with_clip:
        torch.manual_seed(0)
        conditions = random_conditions(config, 3, "cpu")
        h, w = config.latent_size
        x = rand(1, config.out_dim, 3, h, w)
        sigma = torch.full((1,), 0.7, dtype=torch.float64)
        with folder() as here:
            path = saved(here / "teacher.safetensors", new_model(**vars(config)))
            whole, half = [MotionStream.from_pretrained(path, dtype=dtype)
                           for dtype in (torch.float32, torch.bfloat16)]
        for autocast in False, True:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocast):
                ours = guided_velocity(half, x, sigma, conditions, (3.0, 1.5))
                theirs = guided_velocity(whole, x, sigma, conditions, (3.0, 1.5))
            assert ours.dtype == torch.float32
            apart = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
            assert 0 < apart < 0.03, (config, apart)


def test_the_replicated_teacher_is_the_real_score_of_a_distillation():
    scored = []
    with folder() as here, small_scenes(), without_pictures(), \
            patch.object(td, "dmd_loss", wraps=td.dmd_loss) as dmd_loss:
        before_distillation(here)
        flags = distill_flags(here, 1, "--rollout", "5")
        for replicate in False, True:
            (here / "student.safetensors").unlink(missing_ok=True)
            for path in here.glob("*.checkpoint.pt"):
                path.unlink()
            trained([*flags, "--set", f"replicate_teacher={replicate}"])
            _, teacher, critic, *_ = dmd_loss.call_args.args
            scored.append((teacher.blocks[0].ffn[0].weight.dtype, teacher.head.head.weight.dtype,
                           critic.blocks[0].ffn[0].weight.dtype, log_of(here)[-1]["loss_g"]))
    (*before, loss), (*after, loss_of_whole) = scored
    assert before == [torch.float32] * 3
    assert after == [torch.bfloat16, torch.float32, torch.float32]
    assert abs(loss_of_whole / loss - 1) < 0.02, (loss_of_whole, loss)


def test_what_one_process_began_two_take_over_and_the_reverse():
    _, one = toy_of_one()
    _, here, results = two_processes()
    begin = Toy(Path("nowhere")).tensors()
    for rank, found in enumerate(results):
        resumed = found["resumed"]
        assert ("resumed at update 1" in resumed["said"]) == (rank == 0)
        gradients, = resumed["gradients"]
        for a, b in zip(one.gradients[1], gradients, strict=True):
            assert_near(b, a, 1e-3)
        assert resumed["reduced"] == 3
        assert_moved_alike(begin, one.tensors(), resumed["tensors"])
    with folder() as copied:
        shutil.copytree(here / "fresh", copied, dirs_exist_ok=True)
        assert "resumed at update 2" in trained_toy(copied, UPDATES, ACCUMULATE).said


def test_the_first_of_two_processes_writes_the_log_and_checkpoints_of_both():
    _, one = toy_of_one()
    _, here, _ = two_processes()
    rows = log_of(here / "fresh")
    assert [row["step"] for row in rows] == [0, 1]
    norms = [row["grad"] for row in rows]
    ours = [row["grad"] for row in log_of(one.here)]
    assert_near(torch.tensor(norms), torch.tensor(ours), 1e-3)
    states = []
    for folder_of in one.here, here / "fresh":
        checkpoint = torch.load(folder_of / "toy.0000002.checkpoint.pt")
        states.append(checkpoint["learners"]["toy"]["optimizer"]["state"])
    ours, theirs = states
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        for key, value in state.items():
            assert_near(theirs[name][key], value, 0.01)


def test_two_processes_distil_as_one_that_accumulates_two_micro_steps():
    _, here, results = two_processes()
    with folder() as one:
        before_distillation(one)
        gradients = distillation_gradients(one, "--accumulate", "2")
        assert len(gradients) == 2
        for found in results:
            assert_same_gradients(gradients, found["distilled"])
        ours = load_file(one / "student.safetensors")
        begin = load_file(one / "causal.safetensors")
    theirs = load_file(here / "distilled/student.safetensors")
    assert_moved_alike(begin, ours, theirs)


# --------------------------------------------------------------------------------------------------
# Folders of clips, and the batches drawn from them.

def new_clips(here, count=3, frames=45, config=SMALL, track_frames=None, **more):
    """A folder of `count` clips, random latents, whose tracks outlast them to track_frames. more:
    tensors of all."""
    h, w = config.latent_size
    T = track_frames or frames
    for i in range(count):
        N = 4 + i
        tensors = {
            "latents": rand(config.out_dim, (frames + 3) // 4, h, w, seed=i).half(),
            "tracks": rand(T, N, 2, seed=i) * 6 + 18,
            "visible": rand(T, N, seed=i) > 0,
            "group": torch.full((N,), -1),
            "text": rand(2 + i, config.text_dim, seed=i),
        }
        td.write_clip(here / f"{i}.safetensors", tensors | more)
    return here


def video_clips(here, count=3, frames=45, config=SMALL):
    """As new_clips, with video in place of latents."""
    for file in new_clips(here, count, frames, config).iterdir():
        clip = load_file(file)
        clip.pop("latents")
        noise = torch.rand(3, frames, *config.size, generator=seeded(int(file.stem)))
        clip["video"] = (noise * 255).byte()
        td.write_clip(file, clip)
    return here


def test_batches_are_of_random_clips_padded_with_hidden_tracks_and_empty_text():
    with folder() as here:
        files = td.open_clips(new_clips(here / "data", 3, 57, track_frames=93), 12)
        clips = [load_file(file) for file in files]
        torch.manual_seed(0)
        batch = td.draw_clips(files, 30, 6, 21)
    assert batch["latents"].shape == (30, 4, 6, 4, 6)
    assert batch["tracks"].shape == (30, 21, 6, 2)
    assert batch["visible"].shape == (30, 21, 6)
    assert batch["text"].shape == (30, 4, 12)
    found = Counter()
    for b in range(30):
        same_latents = [clip["latents"][:, :6].equal(batch["latents"][b]) for clip in clips]
        i = same_latents.index(True)
        found[i] += 1
        N = 4 + i
        L = 2 + i
        assert batch["tracks"][b, :, :N].equal(clips[i]["tracks"][:21])
        assert batch["visible"][b, :, :N].equal(clips[i]["visible"][:21])
        assert not batch["visible"][b, :, N:].any()
        assert batch["text"][b, :L].equal(clips[i]["text"])
        assert not batch["text"][b, L:].any()
        assert (batch["group"][b] == -1).all()
    assert min(found[i] for i in range(3)) > 4, found


def test_which_tracks_a_batch_gets_depends_on_the_clips_alone():
    with folder() as here:
        run = replace(new_run("--out", here), config=replace(SMALL, causal=False))
        plain = new_clips(here / "plain")
        drawn = new_clips(here / "drawn", group=torch.tensor([0, 0, -1, -1]),
                          tracks=rand(45, 4, 2) * 6 + 18, visible=torch.ones(45, 4).bool())
        files = sorted(drawn.iterdir())
        for data, times in (plain, (1, 1)), (drawn, (1, 0)):
            with patch.object(td, "user_tracks", wraps=td.user_tracks) as by_user, \
                    patch.object(td, "dense_subset", wraps=td.dense_subset) as dense:
                batch = td.draw_batch(run, sorted(data.iterdir()), 8, 12)
            assert (by_user.call_count, dense.call_count) == times
        assert batch.latents.shape == (8, 4, 12, 4, 6)
        everything = td.draw_batch(run, files, 8, 12, dense=True)
        assert everything.points["visible"].all()
        on_objects = everything.points["tracks"][:, :, :2]
        touched = td.touched_cells(on_objects, torch.ones(8, 45, 2).bool(), SMALL)
        weight = td.weight_of_cells(run, everything)
        assert weight.equal(1 + 4 * touched), "all of an object counts, the ground does not"
        first = td.draw_batch(run, files, 8, 12, first_only=True)
        assert first.latents.shape == (8, 4, 1, 4, 6)
        assert first.points["tracks"].shape[1] == 45


def test_motion_is_made_in_float32_whatever_dtype_a_training_computes_in():
    model = new_model()
    tracks, visible, ids = new_tracks(9, 7)
    points = {"tracks": tracks, "visible": visible, "ids": ids}
    expected = td.motion_inputs(model, **points)["tracks"]
    with torch.autocast("cpu", torch.bfloat16):
        found = td.motion_of(model, points, None)["tracks"]
    assert found.equal(expected)


def encoding_nothing():
    """In here it is an error to encode a video."""
    return patch.object(clips, "encode_video", None)


def test_clips_that_hold_video_are_encoded_once():
    with folder() as here, quiet():
        data = video_clips(here / "data")
        run = td.resolve(td.parse(own_flags(here, data)))
        files = td.training_clips(run, 12)
        vae = new_vae()
        for file, source in zip(files, sorted(data.iterdir()), strict=True):
            clip = load_file(file)
            given = load_file(source)
            with torch.no_grad():
                latents = vae.encode(given["video"][None] / 127.5 - 1)[0].half()
            assert clip["latents"].equal(latents)
            assert clip["first"].equal(given["video"][:, 0])
            assert clip.keys() ^ given.keys() == {"latents", "first", "video"}
        with encoding_nothing():
            assert td.training_clips(run, 12) == files
        shutil.copy(data / "1.safetensors", data / "0.safetensors")
        assert td.training_clips(run, 12)[0] != files[0], "other clips"


def test_drawn_clips_are_the_same_whether_they_are_encoded_while_drawn_or_later():
    with folder() as here, quiet(), small_scenes():
        before_distillation(here)
        run = new_run("--smoke", "--out", here, "--set", "clips=2")
        files = td.training_clips(run, 12)
        assert td.training_clips(run, 12) == files
        assert len(files) == 2
        videos = world.rendered_clips(run, "clips", 2)                 # the same, not encoded
        clip = load_file(files[0])
        drawn = load_file(videos[0])
        with torch.no_grad():
            latents = run.load_vae().encode(drawn["video"][None] / 127.5 - 1)[0].half()
    assert_near(clip["latents"], latents, 2e-3)         # by one thread; here maybe more
    assert clip["first"].equal(drawn["video"][:, 0])
    assert clip["tracks"].equal(drawn["tracks"])
    assert clip["tracks"].shape[0] == 189, "those of 16 chunks"


def made_folders(here, vae, *flags):
    """(The folders of clips in `here` once a training with that VAE has made its own, what its
    checkpoints depend on). Nothing is drawn."""
    def make(folder, count, **settings):
        folder.mkdir(exist_ok=True)

    saved(here / "vae.safetensors", vae, anything=str(time.time()))
    run = new_run("--smoke", "--out", here, *flags)
    with patch("extras.world.write_clips", make):
        td.training_clips(run, 12)
    folders = {path for path in here.iterdir() if path.is_dir()}
    return folders, guard.checkpoint_settings(run, "teacher")


def test_what_is_made_is_named_by_what_made_it():
    with folder() as here, quiet(), small_scenes():
        config = replace(SMALL_VAE, latent_channels=16)
        vae = new_vae(config)
        other = randomised(new_vae(config), seed=1)
        folders, settings = made_folders(here, vae)
        assert len(folders) == 1
        assert made_folders(here, vae) == (folders, settings)
        more_clips, _ = made_folders(here, vae, "--set", "clips=40")
        assert more_clips == folders, "what is there stays"
        changes = (other, []), (vae, ["--seed", 1]), (vae, ["--rollout", 20])
        for count, (weights, flags) in enumerate(changes, 2):
            folders, now = made_folders(here, weights, *flags)
            assert len(folders) == count, flags
            assert now != settings, flags


def settings_and_clips(here, data):
    """(What checkpoints of a training on `data` depend on, its clips)."""
    run = td.resolve(td.parse(own_flags(here, data)))
    return guard.checkpoint_settings(run, "teacher"), td.training_clips(run, 12)


def test_clips_are_told_by_what_they_hold_and_not_by_age_or_place():
    with folder() as here, quiet():
        data = video_clips(here / "data")
        second = data / "1.safetensors"
        was, files = settings_and_clips(here, data)
        clip = load_file(second)
        save_file(clip, second, {"source": "of a touched text"})
        for file in data.iterdir():
            os.utime(file, (1, 1))
        assert settings_and_clips(here, data) == (was, files)
        shutil.copytree(data, here / "moved/clips")
        with encoding_nothing():
            assert settings_and_clips(here, here / "moved/clips") == (was, files)
        with patch.object(guard, "content_digest", None):           # nor are they read again
            guard.read_digests(here / "moved/clips", here / "runs/out/clips.json")
        clip["text"][-1] += 1e-3
        td.write_clip(second, clip)
        (data / "2.safetensors").rename(data / "3.safetensors")
        now, others = settings_and_clips(here, data)
        td.save_checkpoint(here, "teacher", 1, was, [])
        for number in 1, 2, 3:
            name = f"checksum of {number}.safetensors"
            change = f"{name} {was.get(name)}, now {now.get(name)}"
            assert_error(td.UserError, change, td.load_checkpoint, here, "teacher", now, [])
        assert others[0] == files[0]
        assert others[1] != files[1], "what has changed is encoded again"


def waits_and_files(here, rank):
    """How process `rank` of two waits while it makes what causal needs, and what it writes."""
    waits = []
    made = []

    def wrote(path, clip):
        made.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    flags = own_flags(here, new_clips(here / "data"), "--set", "trajectories=8")
    run = td.resolve(td.parse(flags))
    teacher = saved(here / "teacher.safetensors", new_model(causal=False, steps=3))
    run = replace(run, files=run.files | {"teacher": teacher})
    with patch.multiple(td, PROCESSES=2, RANK=rank, wait_for_all=waits.append,
                        from_first=lambda value: value or {}, write_clip=wrote):
        files = td.make_trajectories(run, td.training_clips(run, 12))
    assert len(files) == 8
    return waits, made


def test_processes_wait_equally_often_whatever_each_has_to_make():
    for rank, count in (0, 8), (1, 0):                  # one batch, which process 0 makes
        with folder() as here, quiet():
            waits, made = waits_and_files(here, rank)
        assert waits == 2 * [td.LATE]
        assert len(made) == count


def test_who_waits_for_another_process_gives_up_within_half_an_hour():
    with (patch.object(td, "PROCESSES", 2), patch.object(td.dist, "init_device_mesh"),
          patch.object(td.dist, "init_process_group") as joined):
        td.join_processes("cpu")
    assert joined.call_args.kwargs["timeout"].total_seconds() <= 1800


def damaged_clips(file):
    """(What is said of it, tensors in the place of the clip in `file`)."""
    clip = load_file(file)

    def without(name):
        return {each: tensor for each, tensor in clip.items() if each != name}

    yield "text is missing, expected (None, 12)", without("text")
    yield "video is missing", without("latents")
    yield ("latents is (5, 12, 4, 6), expected (4, None, 4, 6)",
           clip | {"latents": rand(5, 12, 4, 6)})
    yield ("has tracks for 44 frames but needs 45; extend them, or lower --rollout",
           clip | {"tracks": rand(44, 5, 2)})
    yield "text of 6 rows, at most 5", clip | {"text": rand(6, 12)}


def test_what_is_wrong_with_a_folder_of_clips_is_one_line():
    with folder() as here:
        data = here / "data"
        file = data / "1.safetensors"
        flags = own_flags(here, new_clips(data), "--stage", "teacher", "--steps", 1)
        clip = load_file(file)
        for said, tensors in damaged_clips(file):
            save_file(tensors, file)
            assert f"1.safetensors: {said}" in refusal(flags), said
        save_file(clip, file, {"vae": "7"})
        assert "1.safetensors: its latents are of another VAE" in refusal(flags)
        file.write_bytes(b"no clip at all")
        assert "1.safetensors: damaged, or no clip" in refusal(flags)
        new_clips(data, frames=41, track_frames=45)
        assert "data: 3 clips, none of 45 frames" in refusal(flags)
        for file in data.iterdir():
            file.unlink()
        assert "data: 0 clips, none of 45 frames" in refusal(flags)


# --------------------------------------------------------------------------------------------------
# The stages.

def test_text_is_dropped_for_the_teacher_and_for_nobody_else():
    kept = []

    def loss(model, x0, sigma, conditions, first_latent, cell_weight, channel_weight):
        has_text = conditions["text"].flatten(1).any(1)             # (B,)
        kept.extend(has_text.tolist())
        return sum(p.sum() for p in model.parameters()) * 1e-9

    with folder() as here, without_pictures(), patch.object(td, "flow_loss", loss):
        flags = own_flags(here, new_clips(here / "data"))
        trained(flags + ["--stage", "teacher", "--steps", 4, "--set", "batch=10"])
        run = td.resolve(td.parse(flags))
        batch = td.draw_batch(run, td.open_clips(here / "data", 12), 200, 12)
    assert batch.conditions["text"].flatten(1).any(1).all()
    assert len(kept) == 10 + 3 * 20             # a batch of whole clips, three of short
    assert 0.02 < 1 - sum(kept) / len(kept) < 0.25


def test_causal_training_has_the_ema_sink_that_sampling_has():
    """Of chunks 0 to 3, the last one reads a sink that has absorbed chunk 1."""
    model = new_model()
    x0, given, _ = clip_of(12)
    states = [x0 + 0.1 * rand(*x0.shape, seed=i) for i in range(3)]
    losses = {}
    for decay, context in itertools.product((1.0, 0.5), ((1, 1), (0, 1), (1, None))):
        model.config = replace(SMALL, sink_decay=decay)
        torch.manual_seed(0)
        losses[decay, context] = td.causal_loss(model, states, x0, given,
                                                dict(sink=context[0], window=context[1])).item()
    assert losses[1.0, (1, 1)] != losses[0.5, (1, 1)]
    for context in (0, 1), (1, None):                   # nothing is absorbed
        assert losses[1.0, context] == losses[0.5, context]


# An update of a stage costs least with these.
FEW = ["--set", "batch=1", "--set", "trajectories=2"]

REWARD = """
def reward(video, batch):
    return video[:, 0, 0, 0, 0] * 0 + len(batch["ids"])
"""


def test_distillation_with_a_reward_and_an_ema_sink():
    lerp = torch.Tensor.lerp
    shares = []

    def record(tensor, end, weight):
        shares.append(weight)
        return lerp(tensor, end, weight)

    with folder() as here, without_pictures(), small_scenes():
        before_distillation(here)
        (here / "mine.py").write_text(REWARD)
        flags = distill_flags(
            here, 1, "--rollout", 4, "--reward", f"{here / 'mine.py'}:reward", "--set", "beta=1",
            "--set", "sink_decay=0.75", "--set", "export_every=1")
        with patch.object(torch.Tensor, "lerp", record):
            trained(flags)
        row, = log_of(here)
        assert row["reward"] == 4
        assert 1 < row["loss_g"] < 1e3, "it counts exp(4 / 1)"
        # In two rollouts of 4 chunks, 2 layers average the keys and values of chunk 1 into the
        # sink, chunk 0.
        assert shares.count(0.25) == 2 * 2 * 2
        student = MotionStream.from_pretrained(here / "student.safetensors")
        assert student.config.sink_decay == 0.75
        assert (here / "student.00001.safetensors").exists()


@contextlib.contextmanager
def distilling_by(rollout, critic_loss):
    """Distillation in here rolls out and has losses as these two functions say; nothing learns."""
    stubs = patch.multiple(td, rollout=rollout, critic_loss=critic_loss,
                           dmd_loss=lambda *arguments: torch.zeros(()))
    standing_still = patch.multiple(td.Learner, backward=lambda *arguments: None,
                                    update=lambda *arguments: 0.0)
    with stubs, standing_still, without_pictures(), small_scenes():
        yield


def test_half_of_the_rollouts_are_longer_than_the_teachers_clip_and_say_nothing_of_light():
    rollouts = []
    judged = set()

    def made(model, noise, conditions, first_latent, exit_step, caches):
        part = next(conditions)
        rollouts.append((3 * len(noise), part["text"]))
        assert part["tracks"].shape[2] == noise[0].shape[2] == 3
        assert first_latent.shape[2] == 1
        return iter(noise)

    def loss(x0, critic, conditions, first_latent, shift, weight_at):
        judged.add((x0.shape[2], conditions["tracks"].shape[2]))
        return torch.zeros(())

    with folder() as here, distilling_by(made, loss):
        before_distillation(here)
        flags = distill_flags(here, 60, "--rollout", 6, "--set", "critic_steps=1000000000")
        trained(flags + FEW)
    lengths = [length for length, _ in rollouts]
    assert set(lengths) == {12, 15, 18}
    assert 15 < lengths.count(12) < 50
    assert judged == {(12, 12)}
    neutral = embed_words(td.NEUTRAL, DRAWN)
    is_neutral = {True: [], False: []}                  # of rollouts that are longer, and of others
    for length, text in rollouts:
        is_neutral[length > 12].append(text.equal(neutral.expand_as(text)))
    assert all(is_neutral[True])
    assert not all(is_neutral[False])


def test_rollouts_under_drawn_memory_are_judged_as_whole_clips():
    contexts = []
    lengths = set()
    end = []

    def made(model, noise, conditions, first_latent, exit_step, caches):
        contexts.append((noise[0].shape[2], caches[0].sink, caches[0].window))
        whole_clip = torch.cat(noise, 2)
        lengths.add(whole_clip.shape[2])
        assert next(conditions)["tracks"].shape[2] == noise[0].shape[2]
        end[:] = [whole_clip[:, :, -11:].clone()]
        yield from noise

    def loss(x0, critic, conditions, first_latent, shift, weight_at):
        assert x0.shape[2] == 12
        assert x0[:, :, 1:].equal(end[0]), contexts[-1]
        return torch.zeros(())

    with folder() as here, distilling_by(made, loss):
        before_distillation(here)
        flags = distill_flags(here, 80, "--rollout", 8, "--set", "critic_steps=1000000000")
        with quiet():
            td.distill(new_run(*flags, *FEW), draw_plan=draw_memory)
        config = MotionStream.from_pretrained(here / "student.safetensors").config
    found = set(contexts)
    assert len(DRAWN_MEMORIES) == 36
    assert found < set(DRAWN_MEMORIES)
    assert len(found) > 25
    assert {12, 24} <= lengths
    chunks, sinks, windows = map(set, zip(*contexts))
    assert chunks == {1, 3, 5}
    assert sinks == {0, 1, 2, 3}
    assert windows == {1, 2, 4}
    own = (config.chunk, config.sink, config.window)
    assert own == (3, 1, 1), "the model's own, not the last that was drawn"


@contextlib.contextmanager
def recording_memories():
    """A set of (chunk, sink, window) of all caches that are made in here."""
    memories = set()
    new_caches = MotionStream.new_caches

    def record(model, **overrides):
        caches = new_caches(model, **overrides)
        memories.add((model.config.chunk, caches[0].sink, caches[0].window))
        return caches

    with patch.object(MotionStream, "new_caches", record):
        yield memories


def test_a_student_is_trained_with_the_memory_that_is_asked_for():
    with folder() as here, without_pictures(), patch.object(td, "CONTEXTS", []):   # its own alone
        data = new_clips(here / "data", 1, 57, track_frames=69)
        for name, wanted, latents, more in (
            ("c2s3wfull", (2, 3, None), 12, ["--rollout", "8"]),
            ("c5s1w2", (5, 1, 2), 15, ["--set", "clip_frames=57"]),
            ("c12s1w1", (12, 1, 1), 12, []),
        ):
            out = here / "runs" / name
            out.mkdir(parents=True)
            saved(out / "teacher.safetensors", new_model(causal=False, steps=3))
            flags = own_flags(here, data, "--out", out) + more + FEW
            with recording_memories() as memories, \
                    patch.object(td, "flow_loss", wraps=td.flow_loss) as critic:
                one_update_each(flags + ["--memory", name], "causal", "distill")
            assert memories == {wanted}
            judged = {call.args[1].shape[2] for call in critic.call_args_list}
            assert judged == {latents}, "whole clips"
            for weights in "causal", "student":
                config = MotionStream.from_pretrained(out / f"{weights}.safetensors").config
                assert (config.chunk, config.sink, config.window) == wanted
        said = refusal(flags + ["--stage", "distill"])
        assert "causal.safetensors: was trained with {'chunk': 12, 'sink': 1" in said


def test_every_stage_runs_on_a_folder_of_clips():
    with folder() as here, patch.object(world, "rendered_clips", None):     # nothing is drawn
        flags = own_flags(here, new_clips(here / "data"))
        one_update_each(flags, "teacher", "causal", "distill")
        rows = {row["stage"]: row for row in log_of(here / "runs/out")}
        assert math.isfinite(rows["teacher"]["grad"])
        assert math.isfinite(rows["causal"]["grad"])
        assert math.isfinite(rows["distill"]["grad_c"])
        student = MotionStream.from_pretrained(here / "runs/out/student.safetensors")
        assert student.config == replace(SMALL, causal=True)


def test_without_an_average_a_stage_ends_with_the_trained_weights_themselves():
    with folder() as here, without_pictures():
        flags = own_flags(here, new_clips(here / "data"), "--set", "export_every=1")
        flags += ["--set", "batch=1"]
        for name in "teacher", "causal", "generator":
            flags += ["--set", f"{name}.ema=0"]
        out = here / "runs/out"
        with patch.dict(watch.REPORT_EVERY, {"teacher": 1}):
            one_update_each(flags, "teacher", "causal", "distill")
        for stage, learner in ("teacher",) * 2, ("causal",) * 2, ("distill", "generator"):
            checkpoint = torch.load(out / f"{stage}.0000001.checkpoint.pt")
            learned = checkpoint["learners"][learner]
            assert "average" not in learned
            name = td.WEIGHTS[stage]
            for path in out / f"{name}.safetensors", out / f"{name}.00001.safetensors":
                for key, tensor in load_file(path).items():
                    assert tensor.equal(learned["model"][key].half()), (stage, key)


# Each stage, twice, and what else is asked without extras.
ALONE = """
import sys, train_distill
words = sys.argv[1:]
for stage in "teacher", "causal", "distill", "distill":
    assert train_distill.main(words + ["--stage", stage, "--steps", "1"]) is None
code = train_distill.main(["--out", "none"])
assert code == 2 and "extras.guard" not in sys.modules
"""


def test_a_copy_without_extras_trains_on_encoded_clips():
    with folder() as here:
        flags = own_flags(here, new_clips(here / "data"), "--set", "batch=1")
        for file in HERE.glob("*.py"):
            shutil.copy(file, here)
        ran = subprocess.run([sys.executable, "-c", ALONE, *flags], cwd=here, text=True,
                             capture_output=True)
        assert ran.returncode == 0, ran.stderr
        assert len(log_of(here / "runs/out")) == 3
        assert (here / "runs/out/student.safetensors").exists()
    assert ran.stdout.count("extras/guard.py is missing") == 4, "once a start"
    assert "distill.0000001.checkpoint.pt: resumed at update 1" in ran.stdout
    assert "error: without extras/, give --data FOLDER of encoded clips" in ran.stderr


def test_clips_may_be_longer():
    with folder() as here, without_pictures():
        flags = own_flags(here, new_clips(here / "data", frames=69))
        with patch.object(td, "flow_loss", wraps=td.flow_loss) as loss:
            one_update_each(flags + ["--set", "clip_frames=57"], "teacher")
        lengths = {call.args[1].shape[2] for call in loss.call_args_list}
        assert lengths == {15}, "57 frames are 15 latents"
        longest = flags + ["--set", "clip_frames=69"]
        said = refusal(longest + ["--stage", "teacher", "--steps", 1])
        assert "of other settings (clip_frames 57, now 69" in said


def test_long_rollouts_start_from_the_first_latents_of_clips_and_pictures_are_enough():
    lengths = set()
    judged_clip = td.judged_clip

    def record(chunks, count, first_latent, points):
        if first_latent is not None:
            lengths.add(first_latent.shape[2])
        x0, points = judged_clip(chunks, count, first_latent, points)
        assert x0.shape[2] == 12, "the teacher knows 12 latents"
        return x0, points

    with folder() as here, without_pictures():
        data = new_clips(here / "data", frames=1, track_frames=93)
        flags = own_flags(here, data, "--rollout", 8)
        out = here / "runs/out"
        out.mkdir(parents=True)
        saved(out / "teacher.safetensors", new_model(causal=False))
        saved(out / "causal.safetensors", new_model())
        with patch.object(td, "judged_clip", record):
            trained(flags + ["--stage", "distill", "--steps", 2])
        assert lengths == {1}
        said = refusal(flags + ["--stage", "teacher", "--steps", 1])
        assert "data: 3 clips, none of 45 frames" in said


# With weights of Wan. The image is in channels, and no frame is clean.
WAN = replace(STUB, in_dim=32, clip_dim=32, text_len=8, size=(32, 48), clean_first=False)


@contextlib.contextmanager
def three_steps():
    """In here the teacher takes 3 steps of Wan's 48: those at the student's noise levels."""
    assert set(schedule(3, 6.0)) < set(schedule(48, 6.0))

    def few(model, *arguments):
        model.config = replace(model.config, steps=3)
        return euler(model, *arguments)

    with patch.object(td, "euler", few):
        yield


@contextlib.contextmanager
def recording_calls():
    """A list of what MotionStreams are called with in here: (sigma, text, the rest by name)."""
    calls = []
    forward = MotionStream.forward

    def record(model, x, sigma, text=None, **given):
        calls.append((sigma.clone(), text, given))
        return forward(model, x, sigma, text, **given)

    with patch.object(MotionStream, "forward", record):
        yield calls


def wan_flags(here):
    """Flags for weights of Wan's kind and clips of its latents, written into `here`."""
    data = new_clips(here / "data", 2, 81, WAN, clip=rand(257, 32))
    weights = saved(here / "wan.safetensors", randomised(MotionStream(WAN)))
    vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
    return ["--smoke", "--data", data, "--vae", vae, "--out", here / "out", "--weights", weights]


def weights_of(here, *names):
    return [MotionStream.from_pretrained(here / f"{name}.safetensors") for name in names]


def test_wans_weights_get_a_track_slot_and_learn_in_the_papers_first_stage_of_the_teacher():
    with (folder() as here, without_pictures(), recording_calls() as calls,
          patch.object(td, "dense_subset", wraps=td.dense_subset) as subset):
        flags = wan_flags(here)
        one_update_each(flags, "teacher")
        teacher, = weights_of(here / "out", "teacher")
        state = torch.load(*(here / "out").glob("teacher.*.pt"), weights_only=True)
    sampling = {"shift": 6.0, "sigmas": schedule(3, 6.0), "steps": 48}
    assert teacher.config == replace(WAN, in_dim=48, track_dim=16, **sampling)
    moments = state["learners"]["teacher"]["optimizer"]["state"]
    assert moments
    assert all("exp_avg" in moment for moment in moments.values()), "AdamW alone"
    pauses, = [call.args[1] for call in subset.call_args_list]
    assert not pauses
    sigma, text, given = calls[0]
    assert (sigma > 0).all()
    assert text.shape[2] == 4096
    assert given["clip"].shape == (1, 257, 32)
    assert given["image"].shape == (1, 16, 21, 4, 6)
    assert not given["image"][:, :, 1:].any()


def test_stages_after_the_papers_first_leave_the_track_head_as_it_is():
    with (folder() as here, without_pictures(), three_steps(), recording_calls() as calls,
          patch.object(td, "dense_subset", wraps=td.dense_subset) as subset,
          patch.object(td, "dmd_loss", wraps=td.dmd_loss) as dmd_loss):
        flags = wan_flags(here)
        begin = randomised(MotionStream(replace(WAN, in_dim=48, track_dim=16)))
        flags[-1] = saved(here / "first.safetensors", begin)
        one_update_each(flags + ["--set", "trajectories=2"], "teacher", "causal", "distill")
        begin, *made = weights_of(here, "first", "out/teacher", "out/causal", "out/student")
        assert all(math.isfinite(row["seconds"]) for row in log_of(here / "out"))
        settings = td.resolve(td.parse([str(flag) for flag in flags[1:]])).settings
    assert all(call.args[1] for call in subset.call_args_list), "with pauses"
    for model in made:
        ours = model.track_head.conv.weight.half()      # as it is written
        assert ours.equal(begin.track_head.conv.weight.half())
        assert not model.blocks[0].ffn[0].weight.equal(begin.blocks[0].ffn[0].weight)
    lengths = {given["image"].shape[2] for _, _, given in calls}
    assert lengths == {21, 3}                           # whole clips and chunks
    call, = dmd_loss.call_args_list
    x0, _, _, given, first_latent = call.args[:5]
    assert x0.shape == given["image"].shape
    assert first_latent is None
    assert not x0[:, :, 0].equal(given["image"][:, :, 0]), "frame 0 is made too"
    assert (settings.teacher_accumulate, settings.teacher_updates) == (128, 800)
    assert (settings.causal_accumulate, settings.causal_updates) == (128, 2000)
    assert (settings.distill_accumulate, settings.distill_updates) == (64, 400 * 5)


# --------------------------------------------------------------------------------------------------
# The command.

def test_the_first_lines_of_a_training_are_a_table():
    with folder() as here, quiet() as (out, _):
        run = new_run("--out", here, "--set", "batch=2", "--set", "teacher_updates=700")
        lines = []
        for i in range(200):
            seconds = 100 if i < 40 else 3.6
            lines.append(json.dumps({"stage": "teacher", "step": i, "seconds": seconds}))
        for i in range(1000):
            lines.append(json.dumps({"stage": "segmenter", "step": i, "seconds": 1.2}))
        (here / "stats.jsonl").write_text("\n".join(lines) + '\n{"stage')
        watch.print_plan(run, ["vae", "teacher", "distill"])
    said = out.getvalue()
    assert f"| teacher | 700 | 200 | 0.5 | {here / 'teacher.safetensors'} |" in said, said
    assert f"| distill | 1,200 | - | - | {here / 'student.safetensors'} |" in said, said
    assert f"| segmenter | 4,000 | 1000 | 1.0 | {here / 'vae.safetensors'} |" in said, said
    assert "non-default settings: batch=2, teacher_updates=700\n" in said
    assert str(here / "STAGE.png") in said
    assert "Config(" not in said
    assert "Learning(" not in said
    assert len(said.splitlines()) < 14


def test_a_fresh_training_of_the_tiny_model_tells_hours_by_the_shipped_log():
    seconds = [row["seconds"] for row in log_of(ASSETS) if row["stage"] == "causal"]
    expected = 100 * sum(seconds) / len(seconds) / 3600
    with folder() as here, quiet() as (out, _):
        run = new_run("--out", here, "--set", "causal_updates=100")
        watch.print_plan(run, ["causal"])
        smaller = new_run("--out", here, "--set", "dim=96")
        watch.print_plan(smaller, ["causal"])
    said = out.getvalue()
    hours = f"{expected:.1f}, as in assets/stats.jsonl"
    assert f"| causal | 100 | - | {hours} | {here / 'causal.safetensors'} |" in said, said
    assert f"| causal | 800 | - | - | {here / 'causal.safetensors'} |" in said, said


def test_threads_of_extras_wait_briefly_unless_the_user_says_how():
    code = (HERE / "extras/__init__.py").read_text()            # runs before any module there
    cases = (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    )
    for given, count in cases:
        with patch.dict(os.environ):
            os.environ.pop("GOMP_SPINCOUNT", None)
            os.environ.pop("OMP_WAIT_POLICY", None)
            os.environ.update(given)
            exec(code, {})
            assert os.environ.get("GOMP_SPINCOUNT") == count, given


def test_a_shift_moves_the_students_noise_levels_with_it():
    run = td.resolve(td.parse(["--dry-run", "--set", "shift=8"]))
    assert run.config.sigmas == schedule(3, 8)
    own = ["--set", "sigmas=(1.0, 0.5)"]
    assert td.resolve(td.parse(["--dry-run", "--set", "shift=8"] + own)).config.sigmas == (1, 0.5)


def test_settings_are_set_by_name_and_by_type():
    values = {"batch": 2, "teacher.adam": 1e-4, "causal.adam": 1e-5, "track_weight": 1, "eps": 1e-5,
              "corrupt_context": False}
    flags = ["--guidance", "2,0.5"]
    for name, value in values.items():
        flags += ["--set", f"{name}={value}"]
    run = td.resolve(td.parse(flags))
    teacher = replace(td.TINY.teacher, adam=1e-4)
    causal = replace(td.TINY.causal, adam=1e-5)                 # which is no field of Config
    assert run.settings == replace(
        td.TINY, batch=2, teacher=teacher, causal=causal, track_weight=1, corrupt_context=False)
    assert run.config.eps == 1e-5
    assert run.config.guidance == (2.0, 0.5)


# What is said of flags that do not go together, or cannot be.
REFUSED_FLAGS = {
    "--reward motion --stage teacher": "--reward needs --stage distill",
    "--memory c3s1w1 --stage teacher": "--memory needs --stage causal or distill",
    "--steps 9": "--steps needs --stage",
    "--memory 3,1,1": "argument --memory: '3,1,1' is not like c3s1w1",
    "--memory c13s1w1": "--memory: a chunk is of 1 to 12 latent frames",
    "--set batch": "argument --set: batch is not like field=value",
    "--set batches=3": "--set batches: no such field; there are clip_frames, ",
    "--set teacher.rate=3": "--set teacher.rate: no such field; there are muon, adam",
    "--set batch.size=3": "--set batch.size: batch has no fields",
    "--set teacher=3": "--set teacher=3: it is Learning(muon=",
    "--set batch=many": "--set batch=many: it is 4 now",
    "--set batch=0": "the training (--set): batch is 0 in its config; expected int from 1 to",
    "--set batch=2.5": "(--set): batch is 2.5 in its config; expected int",
    "--set vae_clips=0": "(--set): vae_clips is 0",
    "--set p_no_text=1.5": "(--set): p_no_text is 1.5 in its config; expected float from 0 to 1",
    "--set corrupt_context=3": "corrupt_context is 3 in its config; expected True or False",
    "--set teacher.adam=-1": "the training (--set), teacher: adam is -1",
    "--set critic.warm_up=0": "the training (--set), critic: warm_up is 0",
    "--set causal.betas=(0.9,1)": "the training (--set), causal: betas is (0.9, 1)",
    "--set causal.muon=0": "the training (--set), causal: muon is 0",
    "--set chunk=0": "(--set): chunk is 0 in its config; expected int from 1 to 999",
    "--set sigmas=()": "(--set): sigmas is () in its config",
    "--set size=(0,0)": "(--set): size is (0, 0) in its config",
    "--set num_heads=7": "(--set): num_heads is 7 in its config; expected a divisor of",
    "--set dim=0": "(--set): dim is 0",
    "--set patch_size=(1,2)": "(--set): patch_size is (1, 2)",
    "--set clip_frames=80":
        "--set clip_frames=80: needs whole chunks of 12, the first of 9: 45, 57,",
    "--memory c5s1w1":
        "--set clip_frames=45: needs whole chunks of 20, the first of 17: 57, 77,",
    "--set short_latents=1": "--set short_latents=1: is not 2 to 12",
    "--set short_latents=13": "--set short_latents=13: is not 2 to 12",
    "--set steps=50 --set causal_from=trajectories":
        "50 steps of the teacher: the student's noise levels",
    "--stage eval": "--stage: invalid choice: 'eval'",
    "--clips 3": "unrecognized arguments: --clips 3",
    "--adversarial 1": "unrecognized arguments: --adversarial 1",
    "--device nowhere": "--device nowhere: not available here",
}


def test_flags_that_cannot_be_are_refused_in_one_line():
    with folder() as here:
        for flags, expected in REFUSED_FLAGS.items():
            said = refusal(["--out", here / "out"] + flags.split())
            assert expected in said and "makes it" not in said, said


def test_micro_steps_that_processes_cannot_share_evenly_are_refused():
    with folder() as here:
        flags = ["--dry-run", "wan2.1-1.3b", "--out", here]
        with patch.object(td, "PROCESSES", 24), patch.object(td, "join_processes"):
            said = refusal(flags + ["--stage", "distill"])
            assert "distill_accumulate=64: 24 processes cannot divide 64 micro-steps" in said
            said = refusal(flags + ["--stage", "teacher"])
            assert "teacher_accumulate=128: 24 processes" in said
            words = [str(flag) for flag in flags]
            for more in ["--accumulate", "3"], ["--smoke"]:             # 72 in all; one each
                td.resolve(td.parse(words + more))
        with patch.object(td, "PROCESSES", 64):
            td.resolve(td.parse(words))


def test_every_setting_has_limits_that_all_settings_here_are_in():
    learners = {"vae", "segmenter", "teacher", "causal", "generator", "critic"}
    limited = {*guard.LIMITS, *guard.SWITCHES, "causal_from"}
    assert vars(td.TINY).keys() == limited | learners
    assert vars(td.TINY.vae).keys() == {*guard.LEARNING, "muon"}
    for settings in td.TINY, td.PAPER, td.PAPER_STAGE_2, td.PAPER_5B, td.PAPER_5B_STAGE_2:
        run = SimpleNamespace(settings=settings, config=STUB, data=Path("clips"))
        guard.check_settings(run)


# The same of files: data (clips with latents), weights and VAEs.
REFUSED_FILES = {
    "--weights mask": "mask.safetensors: takes the image as a clip with a mask",
    "--weights student": "student.safetensors: holds a student",
    "--weights wan --data data": "wan.safetensors: give --vae FILE",
    "--data data": "data: give --vae FILE",
    "--data data --stage vae": "data: holds latents; the stage vae",
    "--weights wan --vae vae": "wan.safetensors: give --data FOLDER",
    "--weights none": "none.safetensors: cannot be read (No such file",
    "--vae none": "none.safetensors: no such file",
    "--vae small --stage vae": "small.safetensors: drop it, or --stage vae",
    "--data none": "none: no such folder",
    "--data vae.safetensors": "vae.safetensors: no such folder",
    "--weights teacher --vae vae --data data":
        "vae.safetensors: latents have 16 channels and stride 8, those of",
    "--vae wan":
        "wan.safetensors: expected a complete VAE (Wan or TAEHV) checkpoint; this looks like a DiT",
}


def test_files_that_cannot_be_trained_on_are_refused_in_one_line():
    with folder() as here:
        new_clips(here / "data", 1)
        for name, model in {
            "mask": randomised(MotionStream(replace(STUB, in_dim=36))),
            "wan": randomised(MotionStream(STUB)),
            "student": new_model(),
            "teacher": new_model(causal=False),
            "small": new_vae(),
            "vae": new_vae(STUB_VAE),
        }.items():
            saved(here / f"{name}.safetensors", model)
        for flags, expected in REFUSED_FILES.items():
            words = ["--out", here / "out"]
            for flag, value in re.findall(r"(--\w+) (\S+)", flags):
                if flag in ("--weights", "--vae"):
                    value = f"{value}.safetensors"
                words += [flag, value if flag == "--stage" else here / value]
            said = refusal(words)
            assert expected in said and "makes it" not in said, said


@slow
def test_the_whole_training_runs_in_a_minute():
    with folder() as here:
        command = [sys.executable, "train_distill.py", "--smoke", "--out", here]
        subprocess.run(command, cwd=HERE, check=True)
        assert any(here.glob("*student*.safetensors")) and (here / "stats.jsonl").stat().st_size > 0
