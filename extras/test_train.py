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
import shutil
import signal
import socket
import subprocess
import sys
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
from extras.testing import (shards, DRAWN, HERE, SMALL, SMALL_VAE, STUB, STUB_VAE, assert_error,
                            assert_near, before_distillation, clip_of, folder, new_model,
                            new_tracks, new_vae, own_flags, public, quiet, rand, randomised, same,
                            saved, seeded, slow, small_scenes)
from motionstream import PRESETS, MotionStream, euler, rollout, schedule
from sample import embed_words
from vae import LinearVAE, load_vae

# ----------------------------------------------------------------------------------------------------------------------
# Training: the tools, the losses, the stages.

def grouped(clips):
    """Of 88 tracks, 8 on each of three objects and 64 on the ground: (clips, 88)."""
    group = torch.cat([torch.arange(3).repeat_interleave(8), torch.full((64,), -1)])
    return group.expand(clips, -1)


def test_user_tracks_are_among_the_visible_ones():
    torch.manual_seed(0)
    visible = rand(64, 45, 88) > -1
    kept = td.user_tracks(visible, grouped(64))
    share = kept.float().mean((1, 2)) / visible.float().mean((1, 2))
    assert not (kept & ~visible).any() and share.min() < 0.05 and share.max() > 0.6 and 0.1 < share.mean() < 0.6


def test_a_user_draws_on_some_objects_rather_at_their_centre():
    torch.manual_seed(0)
    visible = torch.ones(400, 9, 88).bool()
    drawn = td.user_tracks(visible, grouped(400)).any(1)                    # (B, N)
    objects = drawn[:, :24].unflatten(1, (3, 8))
    none, one = ((objects.sum(2) == count).float().mean() for count in (0, 1))
    assert 0.08 < none < 0.17 and 0.2 < one < 0.32, (none, one)             # 1 and 2 of 8 draws
    singles = objects[objects.sum(2) == 1]
    assert 0.2 < singles[:, 0].float().mean() < 0.5, "the centre is 1 of 8, and chosen more often"


def test_a_learner_moves_every_parameter_of_the_model_itself():
    for model, loss in ((new_model(), lambda m: m(clip_of(2)[0], torch.ones(2), **on_tracks(m)).square().mean()),
                        (new_vae(), lambda m: m.decode_unclamped(m.encode(rand(1, 3, 9, 8, 8)))[0].square().mean())):
        before = {name: p.clone() for name, p in model.requires_grad_(True).named_parameters()}
        learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9))
        (muon, _), (adam, _) = learner.optimizers
        hidden, rest = (optimizer.param_groups[0]["params"] for optimizer in (muon, adam))
        assert len(hidden) + len(rest) == len(before) and all(p.ndim > 1 for p in hidden)
        learner.step(loss(model), 0)
        still = [name for name, p in model.named_parameters() if p.equal(before[name]) or p.grad is not None]
        assert not still, still
        assert all(a.equal(p) for a, p in zip(learner.average.parameters(), model.parameters()))  # first, a copy
        once = [p.clone() for p in model.parameters()]
        learner.step(loss(model), 10)
        for average, a, b in zip(learner.average.parameters(), once, model.parameters()):
            assert_near(average, a + (b - a) * 10 / 11, 1e-5)       # the second update counts 1 - 1 / (1 + 10)


def test_the_rate_rises_over_20_updates_stays_and_falls_to_0():
    learner = td.Learner("toy", nn.Linear(2, 2), td.Learning(None, 1e-3), updates=100)
    rates = [learner.rate_factor(count) for count in (0, 9, 19, 60, 80, 99)]
    assert_near(torch.tensor(rates), torch.tensor([0.05, 0.5, 1.0, 1.0, 0.5, 0.025]), 1e-6)
    assert td.Learner("toy", nn.Linear(2, 2), td.Learning(None, 1e-3)).rate_factor(10 ** 6) == 1


def test_muon_takes_kernels_as_matrices():
    kernel, matrix = nn.Parameter(rand(6, 4, 3, 3)), nn.Parameter(rand(6, 36))
    matrix.data = kernel.detach().flatten(1).clone()
    for p, grad in (kernel, rand(6, 4, 3, 3, seed=1)), (matrix, rand(6, 4, 3, 3, seed=1).flatten(1)):
        p.grad = grad
        td.Muon([p], 0.1, 0.01, torch.float32).step()
    assert kernel.flatten(1).equal(matrix)


def test_muon_is_that_of_torch_which_is_in_bfloat16():
    def updated(make):
        """Two matrices after five steps, and what the optimizer keeps."""
        matrices = [nn.Parameter(rand(*shape)) for shape in ((24, 40), (40, 24))]
        optimizer = make(matrices)
        for i in range(5):
            for n, p in enumerate(matrices):
                p.grad = rand(*p.shape, seed=10 * i + n + 1)
            optimizer.step()
        return matrices, optimizer.state_dict()["state"]

    settings = {"lr": 0.03, "weight_decay": 0.1}
    theirs, their_state = updated(lambda p: torch.optim.Muon(p, **settings))
    for dtype, tolerance in (torch.bfloat16, 1e-6), (torch.float32, 1e-2):
        ours, state = updated(lambda p: td.Muon(p, dtype=dtype, **settings))
        for n in range(2):
            assert_near(ours[n], theirs[n], tolerance)
            assert_near(state[n]["momentum_buffer"], their_state[n]["momentum_buffer"], 1e-6)


def test_muons_iteration_is_in_the_dtype_that_is_given():
    """The polynomial of each singular value, in float64."""
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
    assert 0.6 < singular.min() and singular.max() < 1.3, singular


def test_matrix_products_are_in_the_dtype_that_the_processor_is_faster_in():
    for slower, dtype in (13.0, torch.float32), (0.9, torch.float32), (0.5, torch.bfloat16):
        seconds = {torch.float32: 0.002, torch.bfloat16: 0.002 * slower}
        with unittest.mock.patch.object(td, "matmul_seconds", seconds.get):
            assert td.cpu_dtype.__wrapped__() == dtype
        with unittest.mock.patch.object(td, "cpu_dtype", lambda: dtype):
            assert td.compute_dtype("cpu") == td.compute_dtype(torch.device("cpu")) == dtype
            assert td.compute_dtype("cuda:0") == torch.bfloat16
            run = td.resolve(td.Flags(device="cpu"))
            with run.autocast():
                assert (rand(4, 4) @ rand(4, 4)).dtype == dtype
            assert "dtype" not in td.checkpoint_settings(run, "vae")
    assert td.matmul_seconds(torch.float32) > 0


def on_tracks(model):
    """Conditions whose tracks come from the model's own head."""
    tracks, visible, ids = new_tracks(5, 9)
    return {"text": rand(2, 3, model.config.text_dim), "tracks": model.track_head(tracks, visible, ids, 32, 48)}


def test_text_is_dropped_for_the_teacher_and_for_nobody_else():
    kept = []

    def loss(model, x0, sigma, conditions, first, cell_weight, channel_weight):
        kept.extend(conditions["text"].flatten(1).any(1).tolist())
        return sum(p.sum() for p in model.parameters()) * 1e-9

    with folder() as here, quiet(), without_pictures(), unittest.mock.patch.object(td, "flow_loss", loss):
        flags = own_flags(here, new_clips(here / "data"))
        run = td.resolve(td.parse_flags(flags))
        batch = td.draw_batch(run, td.open_clips(here / "data", SMALL, 12, 45), 200, 12)
        assert batch.conditions["text"].flatten(1).any(1).all()
        assert td.main([*flags, "--stage", "teacher", "--steps", "4", "--set", "batch=10"]) is None
    assert len(kept) == 4 * 10 + 3 * 10 and 0.02 < 1 - sum(kept) / len(kept) < 0.25, kept


def test_distillation_with_a_reward_and_an_ema_sink():
    with folder() as here, quiet() as (_, err), without_pictures(), small_scenes():
        before_distillation(here)
        (here / "mine.py").write_text(
            "def reward(video, batch):\n    return video[:, 0, 0, 0, 0] * 0 + len(batch['ids'])")
        evicted, lerp = [], torch.Tensor.lerp
        with unittest.mock.patch.object(torch.Tensor, "lerp", lambda *args: evicted.append(args[2]) or lerp(*args)):
            code = td.main(["--smoke", "--stage", "distill", "--steps", "1", "--out", str(here), "--set", "sink_decay=0.75",
                            "--set", "beta=1", "--set", "export_every=1", "--rollout", "4", "--reward", f"{here}/mine.py:reward"])
        log = [json.loads(line) for line in open(here / "stats.jsonl")]
        assert code is None and [row["reward"] for row in log] == [4.0], (code, err.getvalue(), log)
        assert 1 < log[0]["loss_g"] < 1e3, log                      # it counts exp(4 / 1)
        # in two rollouts of 4 chunks, 2 layers average the keys and values of chunk 1 into the sink, chunk 0
        assert evicted.count(0.25) == 2 * 2 * 2, Counter(evicted)
        assert MotionStream.from_pretrained(here / "student.safetensors").config.sink_decay == 0.75
        assert (here / "student.00001.safetensors").exists()


def test_half_of_the_rollouts_are_longer_than_the_teachers_clip_and_say_nothing_of_light():
    with folder() as here, quiet(), without_pictures(), small_scenes():
        before_distillation(here)
        lengths, texts, judged = [], [], []

        def made(model, noise, conditions, first, exit_step, caches):
            lengths.append(3 * len(noise))
            part = next(conditions)
            texts.append(part["text"])
            assert part["tracks"].shape[2] == noise[0].shape[2] == 3 and first.shape[2] == 1
            return iter(noise)

        def loss(x0, critic, conditions, first, shift, channel_weight):
            judged.append((x0.shape[2], conditions["tracks"].shape[2]))
            return sum(p.sum() for p in critic.parameters()) * 1.0

        with unittest.mock.patch.multiple(td, rollout=made, critic_loss=loss, dmd_loss=lambda *_: torch.zeros(())):
            with unittest.mock.patch.object(td.Learner, "step", lambda *_, **__: 0.0):
                td.main(["--smoke", "--stage", "distill", "--steps", "60", "--out", str(here), "--rollout", "6",
                         "--set", "critic_steps=1000000000"])
        assert set(lengths) == {12, 15, 18} and 15 < lengths.count(12) < 50, Counter(lengths)
        assert set(judged) == {(12, 12)}
        neutral = embed_words(td.NEUTRAL, DRAWN)
        assert all(text.equal(neutral.expand_as(text)) for text, length in zip(texts, lengths) if length > 12)
        assert not all(text.equal(neutral.expand_as(text)) for text, length in zip(texts, lengths) if length == 12)


def test_rollouts_under_drawn_memory_are_judged_as_whole_clips():
    contexts, tail, lengths = [], [], []

    def made(model, noise, conditions, first, exit_step, caches):
        contexts.append((noise[0].shape[2], caches[0].sink, caches[0].window))
        whole = torch.cat(noise, 2)
        lengths.append(whole.shape[2])
        assert next(conditions)["tracks"].shape[2] == noise[0].shape[2]
        tail.append(whole[:, :, -11:].clone())
        yield from noise

    def loss(x0, critic, conditions, first, shift, channel_weight):
        assert x0.shape[2] == 12 and x0[:, :, 1:].equal(tail[-1]), contexts[-1]
        return sum(p.sum() for p in critic.parameters()) * 1.0

    with folder() as here, quiet(), without_pictures(), small_scenes():
        before_distillation(here)
        with unittest.mock.patch.multiple(td, rollout=made, critic_loss=loss, dmd_loss=lambda *_: torch.zeros(())), \
                unittest.mock.patch.object(td.Learner, "step", lambda *_, **__: 0.0):
            td.main(["--smoke", "--stage", "distill", "--steps", "80", "--out", str(here), "--rollout", "8",
                     "--memory", "drawn", "--set", "critic_steps=1000000000"])
        drawn = {*td.DRAWN_CONTEXTS}
        assert {*contexts} < drawn and len({*contexts}) > 25 and len(drawn) == 36, Counter(contexts)
        assert {12, 24} <= {*lengths} and [{*some} for some in zip(*contexts)] == [{1, 3, 5}, {0, 1, 2, 3}, {1, 2, 4}]
        config = MotionStream.from_pretrained(here / "student.safetensors").config
        assert (config.chunk, config.sink, config.window) == (3, 1, 1), "the model's own, not the last that was drawn"


def test_a_student_is_trained_with_the_memory_that_is_asked_for():
    memories, new_caches = [], MotionStream.new_caches

    def record(model, **overrides):
        caches = new_caches(model, **overrides)
        memories.append((model.config.chunk, caches[0].sink, caches[0].window))
        return caches

    with folder() as here, unittest.mock.patch.object(MotionStream, "new_caches", record), \
            unittest.mock.patch.object(td, "CONTEXTS", ()):     # of its own memory alone
        new_clips(here / "data", 1, 69)
        for name, wanted, more in (("c2s3wfull", (2, 3, None), ("--rollout", "8")), ("c1s1w2", (1, 1, 2), ()),
                                   ("c5s1w1", (5, 1, 1), ("--set", "clip_frames=57")), ("c12s1w1", (12, 1, 1), ())):
            flags = own_flags(here, here / "data", "--memory", name, *more, "--out", str(here / "runs" / name))
            (here / "runs" / name).mkdir(parents=True)
            saved(here / "runs" / name / "teacher.safetensors", new_model(causal=False, steps=3))
            with quiet() as (_, err):
                for stage in "causal", "distill":
                    assert td.main([*flags, "--stage", stage, "--steps", "1"]) is None, (name, err.getvalue())
            assert len(memories) > 2 and {*memories} == {wanted}, memories
            for weights in "causal", "student":
                config = MotionStream.from_pretrained(here / "runs" / name / f"{weights}.safetensors").config
                assert (config.chunk, config.sink, config.window) == wanted
            memories.clear()
            with quiet() as (_, err):
                at = flags.index("--memory")
                assert td.main([*flags[:at], *flags[at + 2:], "--stage", "distill"]) == 2
            assert f"was trained with {{'chunk': {wanted[0]}, 'sink'" in err.getvalue(), err.getvalue()


def test_causal_training_has_the_ema_sink_that_sampling_has():
    """Of chunks 0 to 3, the last one reads a sink that has absorbed chunk 1."""
    model, (x0, given, _) = new_model(), clip_of(12)
    states = [x0 + 0.1 * rand(*x0.shape, seed=i) for i in range(3)]
    losses = {}
    for decay, context in itertools.product((1.0, 0.5), ((1, 1), (0, 1), (1, None))):
        model.config = replace(SMALL, sink_decay=decay)
        torch.manual_seed(0)
        losses[decay, context] = td.causal_loss(model, states, x0, x0, given, context).item()
    assert losses[1.0, (1, 1)] != losses[0.5, (1, 1)]
    for context in (0, 1), (1, None):                           # nothing is absorbed
        assert losses[1.0, context] == losses[0.5, context]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, td.DTensor) else tensor


def keeping_gradients(kept):
    """Appends the whole gradients of each update, a list, to `kept`."""
    clip = nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, limit):
        kept.append([whole(p.grad).clone() for p in parameters])
        return clip(parameters, limit)
    return unittest.mock.patch.object(nn.utils, "clip_grad_norm_", clip_and_keep)


def in_two_processes(code, *args):
    """Start `code` in two processes that share their steps; it knows torch, test, td, and args, strings. Returns a
    function that waits for their end."""
    child = f"import sys, torch, extras.test_train as test, train_distill as td\nargs = sys.argv[1:]\n{code}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                  "OMP_NUM_THREADS": "1"}                   # as torchrun sets it
    children = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", child, *map(str, args)], cwd=HERE,
                                 env=os.environ | shared | {"RANK": str(rank)}) for rank in range(2)]

    def wait():
        try:
            codes = [process.wait(timeout=120) for process in children]
        finally:
            for process in children:
                process.kill()
        assert codes == [0, 0], codes
    return wait


@contextlib.contextmanager
def counting_reductions():
    """Notes in a list each time that FSDP reduces gradients."""
    name = "reduce_scatter_single"
    if not hasattr(td.dist, name):                              # torch before 2.12
        name = "reduce_scatter_tensor"
    reduced, reduce = [], getattr(td.dist, name)

    def note(*args, **kwargs):
        reduced.append(name)
        return reduce(*args, **kwargs)

    with unittest.mock.patch.object(td.dist, name, note):
        yield reduced


def toy_training(here, stop_at=None, nan_at=None, steps=6, save_every=300, batches=1, **settings):
    """Some steps of a small model; its parameters and what was logged. Leaves the model and all gradients behind."""
    model = new_model().requires_grad_(True)
    learner = td.Learner("toy", model, td.Learning(1e-2, 1e-2, ema=0.9), updates=steps // batches, accumulate=batches)
    toy_training.model, toy_training.gradients = model, []
    clock = itertools.count(0, 301 if save_every == 1 else 0)
    run = SimpleNamespace(out=here, seed=1, dtype=torch.float32, settings=td.TINY)
    told = {"data": "toy", "seed": 1} | settings
    with quiet() as (toy_training.said, _), unittest.mock.patch.object(td.time, "time", lambda: next(clock)), \
            unittest.mock.patch.object(td, "checkpoint_settings", lambda run, stage: told), \
            keeping_gradients(toy_training.gradients):
        loop = td.Loop(run, "toy", steps, learner)
        for i in loop:
            if i == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = toy_loss(model)
            loss = loss * math.nan if i == nan_at else loss
            loop.log(loss=loss, grad=learner.step(loss, i))
    log = [json.loads(line)["loss"] for line in open(here / "stats.jsonl")]
    states = {f"{net}.{name}": whole(p).clone() for net, module in (("model", model), ("average", learner.average))
              for name, p in module.state_dict().items()}
    return states, log, toy_training.said.getvalue()


def toy_loss(model):
    x0 = torch.randn(2, 4, 2, 4, 6)
    return td.flow_loss(model, x0, torch.rand(2), on_tracks(model), x0[:, :, :1])


def test_an_interrupted_training_continues_with_the_same_bits_and_no_other_settings():
    with folder() as one, folder() as two:
        whole, log, _ = toy_training(one)
        assert_error(SystemExit, "143", toy_training, two, stop_at=2)
        assert "saved at step 3; the same command goes on\n" in toy_training.said.getvalue()
        with open(two / "stats.jsonl", "a") as file:                # as if killed at step 4, after the checkpoint
            file.write('{"stage": "toy", "step": 3, "loss": 1}\n{"stage": "other", "step": 9, "loss": 1}\n{"sta')
        assert_error(td.UserError, "of other settings (data toy, now else);", toy_training, two, data="else")
        assert_error(td.UserError, "(steps 6, now 7; seed 1, now 2);", toy_training, two, steps=7, seed=2)
        resumed, resumed_log, _ = toy_training(two)
        assert same(whole, resumed)
        assert resumed_log[:3] + resumed_log[4:] == log and len(log) == 6, "each step once; another stage's stays"


def vae_gradients():
    """Of an update by two steps, of one process or of two."""
    vae = new_vae().requires_grad_(True)
    learner = td.Learner("vae", vae, td.Learning(1e-3, 1e-3), accumulate=2)
    with keeping_gradients(gradients := []):
        for i in range(td.RANK, 2, td.PROCESSES):
            learner.step(vae.decode_unclamped(vae.encode(rand(1, 3, 9, 8, 8, seed=i)))[0].square().mean(), i)
    return gradients


def assert_same_gradients(ours, theirs):
    """To 1e-5 of the largest of each parameter's, but 1e-3 after an update by Muon, which may round to bfloat16: sums
    in another order may round to the other side."""
    for update, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(left, right, strict=True):
            error = ((a - b).abs().max() / a.abs().max()).item()
            assert a.shape == b.shape and error <= (1e-3 if update else 1e-5), (update, error)


def assert_moved_alike(start, ours, theirs):
    """Two state dicts went the same way from `start`, to a fifth of it: Muon fills what a gradient of low rank leaves
    open, and that is rounding."""
    assert ours.keys() == theirs.keys() == start.keys()
    way, apart = (sum((p.float() - other[name]).square().sum() for name, p in ours.items())
                  for other in (start, theirs))
    assert apart < 0.04 * way, (apart, way)


def test_two_processes_have_the_gradients_of_one_that_accumulates_two_steps():
    child = """if True:
        td.dist.init_process_group("gloo")
        for folder in args:
            with test.counting_reductions() as reduced:
                whole, _, said = test.toy_training(test.Path(folder), steps=14, batches=4)
            sharded = [(p.to_local().numel(), p.numel()) for p in test.toy_training.model.parameters()]
            results = test.toy_training.gradients, whole, said, sharded, len(reduced), test.vae_gradients()
            torch.save(results, f"{folder}/results{td.RANK}.pt")
        td.dist.destroy_process_group()
    """
    with folder() as one, folder() as two, folder() as both:    # four steps an update: two of each process
        assert_error(SystemExit, "143", toy_training, both, stop_at=7, steps=14, batches=4)
        wait = in_two_processes(child, two, both)
        whole, log, _ = toy_training(one, steps=14, batches=4)          # the odd steps make no update
        gradients, of_vae = toy_training.gradients, vae_gradients()
        wait()
        model = new_model().requires_grad_(True)
        start = {f"{net}.{name}": p.clone() for net in ("model", "average") for name, p in model.state_dict().items()}
        for i in range(4):
            torch.manual_seed(td.seed_of(1, "toy", i))
            toy_loss(model).backward()
        for p, mean in zip(model.parameters(), gradients[0], strict=True):
            assert_near(mean, p.grad / 4, 1e-5)
        for path, rank in itertools.product((two, both), range(2)):     # three updates; what one began, two take over
            theirs, went, said, sharded, reduced, theirs_of_vae = torch.load(path / f"results{rank}.pt")
            assert ("resumed at step 8" in said) == (path == both and rank == 0)
            assert reduced == len(theirs) * 4, "once an update: two blocks, the track head, the rest"
            assert_same_gradients(gradients[2 if path == both else 0:], theirs)
            assert_same_gradients(of_vae, theirs_of_vae)
            assert_moved_alike(start, whole, went)
            assert sum(part for part, _ in sharded) < 0.6 * sum(size for _, size in sharded), sharded
        rows, theirs = ([json.loads(line) for line in open(path / "stats.jsonl")] for path in (one, two))
        assert len(log) == 12 and [row["step"] for row in theirs] == [*range(0, 12, 2)]         # process 0 writes
        ours, theirs = (torch.tensor([row["grad"] for row in log if "grad" in row]) for log in (rows, theirs))
        assert_near(ours, theirs, 1e-3)
        ours, theirs = (torch.load(path / "toy.0000012.checkpoint.pt") for path in (one, two))
        ours, theirs = (saved["learners"]["toy"]["optimizer"]["state"] for saved in (ours, theirs))
        for name, state in ours.items():
            for key, value in state.items():
                assert_near(theirs[name][key], value, 0.01)
        _, _, said = toy_training(two, steps=14, batches=4)             # what two began, one takes over
        assert "resumed at step 12" in said


def without_pictures():
    """train_distill.main draws no previews in here."""
    return unittest.mock.patch.object(td, "show", lambda *_: None)


def distilled(flags):
    """The gradients of a distillation on small_scenes in float32."""
    with quiet(), keeping_gradients(gradients := []), without_pictures(), small_scenes(), \
            unittest.mock.patch.object(td, "cpu_dtype", lambda: torch.float32):
        assert td.main(flags) is None
    return gradients


def test_blocks_that_are_recomputed_give_the_same_losses_and_gradients():
    noise, given, first = clip_of(15)                           # five chunks: the cache forgets the second and third

    def bidirectional(model):
        torch.manual_seed(0)
        return td.flow_loss(model, noise, torch.tensor([0.3, 0.9]), given, first)

    def streamed(model):
        chunks = rollout(model, noise, given, first, exit_step=1, rng=seeded())
        return torch.cat(list(chunks), 2).square().mean()

    for loss in bidirectional, streamed:
        results = []
        for checkpointing in False, True:
            model, runs = new_model().requires_grad_(True), []
            learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9), accumulate=2)
            if checkpointing:
                td.recompute_blocks(model)
            for block in model.blocks:
                block.ffn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
            value = loss(model)
            forwards = runs.count(True)
            learner.step(2 * value, 0)                        # half of an update: the gradients stay
            assert runs.count(True) == forwards * (1 + checkpointing) > 0
            results.append((value, [p.grad for p in model.parameters() if p.grad is not None]))
        (a, ours), (b, theirs) = results
        assert len(ours) > 40 and abs(a / b - 1) <= 1e-5
        assert_same_gradients([ours], [theirs])


def test_two_processes_distil_as_one_that_accumulates_two_steps():
    def files(here):
        before_distillation(here)
        return ["--smoke", "--stage", "distill", "--steps", "2", "--rollout", "5", "--out", str(here)]

    child = """if True:
        torch.save(test.distilled(args), f"{args[-1]}/gradients{td.RANK}.pt")
        td.dist.destroy_process_group()
    """
    with folder() as one, folder() as two:
        wait = in_two_processes(child, "--checkpointing", *files(two))
        gradients = distilled(["--accumulate", "2", *files(one)])
        wait()
        # then the critic's; one process made half of what it saw before the generator's update
        for rank in range(2):
            theirs = torch.load(two / f"gradients{rank}.pt")
            assert len(gradients) == len(theirs) == 2
            assert_same_gradients(gradients[:1], theirs[:1])                # of the generator
        ours, theirs, start = (load_file(path) for path in (one / "student.safetensors", two / "student.safetensors",
                                                            one / "causal.safetensors"))
        assert_moved_alike(start, ours, theirs)


def test_a_stop_waits_for_the_end_of_an_update():
    with folder() as one, folder() as two:
        whole, _, _ = toy_training(one, batches=3)
        assert_error(SystemExit, "143", toy_training, two, stop_at=0, batches=3)
        assert (two / "toy.0000003.checkpoint.pt").exists()
        assert same(whole, toy_training(two, batches=3)[0])


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it():
    with folder() as one, folder() as two:
        whole, _, _ = toy_training(one)
        assert_error(SystemExit, "143", toy_training, two, stop_at=4, save_every=1)
        assert "saved at step 5" in toy_training.said.getvalue()
        names = sorted(path.name for path in two.glob("*.pt"))
        assert names == ["toy.0000004.checkpoint.pt", "toy.0000005.checkpoint.pt"], names      # the last two
        newest = two / names[1]
        newest.write_bytes(newest.read_bytes()[:1000])
        resumed, log, said = toy_training(two)
        assert "0000005.checkpoint.pt: damaged" in said and "0000004.checkpoint.pt: resumed at step 4" in said, said
        assert same(whole, resumed) and len(log) == 6 and (two / "toy.0000005.checkpoint.damaged").exists()


def linear_learner():
    model = nn.Linear(3, 2)
    learner = td.Learner("toy", model, td.Learning(None, 1e-3, ema=0.9))
    learner.step(model(torch.ones(1, 3)).sum(), 0)
    return learner


def mutated(data, rng):
    """A copy of bytes with a bit flipped, a part zeroed, cut off, doubled or from elsewhere."""
    data = bytearray(data)
    at, length = rng.randrange(len(data)), rng.randrange(1, 200)
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


def assert_whole_or_the_one_before(here, written, second, saved):
    """What td.newest_checkpoint makes of `saved` in the place of the second checkpoint of two, which held `written`."""
    second.write_bytes(saved)
    with quiet() as (out, _):
        path, (step, _, states) = td.newest_checkpoint(here, "toy")
    if step == 2:                                                   # what has changed is not read
        assert path == second and same(states["toy"]["model"], written), saved
        return
    assert step == 1 and out.getvalue().count("\n") == 1 and f"{second}: damaged (" in out.getvalue(), out.getvalue()
    assert not second.exists()


def test_whatever_happens_to_a_checkpoint_it_is_as_written_or_the_one_before_is_taken():
    with folder() as here:
        learner = linear_learner()
        for step in 1, 2:
            td.save_checkpoint(here, "toy", step, {}, [learner])
        other = td.Learner("toy", nn.Linear(4, 2), td.Learning(None, 1e-3))
        assert_error(td.UserError, "step 2: of another toy; ", td.load_checkpoint, here, "toy", {}, [other])
        second, written = here / "toy.0000002.checkpoint.pt", copy.deepcopy(learner.state_dict()["model"])
        whole = second.read_bytes()
        flipped = bytearray(whole)
        at = whole.index(written["weight"].numpy().tobytes())       # one bit of a weight
        flipped[at] ^= 1
        assert_whole_or_the_one_before(here, written, second, bytes(flipped))
        assert (here / "toy.0000002.checkpoint.damaged").exists()
        for seed in range(30):
            assert_whole_or_the_one_before(here, written, second, mutated(whole, random.Random(seed)))
        for path in here.glob("*.checkpoint.pt"):
            path.write_bytes(path.read_bytes()[:500])
        there = sorted(here.iterdir())
        with quiet():
            assert_error(td.UserError, "no other checkpoint of the stage toy is whole", td.newest_checkpoint, here, "toy")
        assert sorted(here.iterdir()) == there, "nothing is removed"


def test_a_folder_is_that_of_one_training_until_it_ends_even_by_a_crash():
    with folder() as here:
        left, kept = [".toy.0000003.checkpoint.pt.12.part", "latents.1/a/.b.safetensors.12.part"], [".x.mp4.12.part"]
        for name in left + kept:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).touch()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            with td.own_folder(here):
                os.write(told, b"!")
                time.sleep(60)
        try:
            os.read(ready, 1)
            assert not any((here / name).exists() for name in left) and all((here / name).exists() for name in kept)
            (here / left[0]).touch()
            owned = td.own_folder(here)
            assert_error(td.UserError, f"{here}: process {child} on ", owned.__enter__)
            assert (here / left[0]).exists(), "the other may be writing it"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with td.own_folder(here):
            assert not (here / left[0]).exists() and (here / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_checkpoints_are_as_often_as_is_said_and_how_often_may_change():
    for minutes, saved in (5, [5]), (1.6, [2, 4, 5]):
        now, steps = [0], []
        with folder() as here, quiet(), unittest.mock.patch.multiple(
                td, checkpoint_settings=lambda *_: {}, save_checkpoint=lambda *args: steps.append(args[2])), \
                unittest.mock.patch.object(td.time, "time", lambda: now[0]):
            settings = replace(td.TINY, checkpoint_minutes=minutes)
            run = SimpleNamespace(out=here, seed=1, dtype=torch.float32, settings=settings)
            for _ in td.Loop(run, "toy", 5, linear_learner()):
                now[0] += 50                                            # seconds
        assert steps == saved, (minutes, steps)
    told = td.checkpoint_settings(td.resolve(td.Flags(device="cpu")), "vae")
    assert not told.keys() & {"checkpoint_minutes", "export_every", "tflops"} and "batch" in told


def test_weights_of_some_updates_are_kept_to_choose_from():
    with folder() as here:
        run = td.resolve(td.Flags(device="cpu", out=here, set=(("export_every", 2),)))
        model = new_model()
        for update in range(1, 6):
            td.export_weights(run, "student", model, update)
        assert sorted(path.name for path in here.iterdir()) == ["student.00002.safetensors", "student.00004.safetensors"]
        ours = MotionStream.from_pretrained(here / "student.00004.safetensors")
        assert same({name: p.half() for name, p in model.state_dict().items()},
                    {name: p.half() for name, p in ours.state_dict().items()})


def test_the_first_lines_of_a_training_are_a_table():
    with folder() as here, quiet() as (out, _):
        run = td.resolve(td.Flags(device="cpu", out=here, set=(("batch", 2), ("teacher_steps", 700))))
        rows = [{"stage": "teacher", "step": i, "seconds": 100 if i < 40 else 3.6} for i in range(200)]
        (here / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage')
        td.print_plan(run, ["teacher", "distill"])
        said = out.getvalue()
        assert f"| teacher | 700 | 200 | 0.5 | {here / 'teacher.safetensors'} |" in said, said
        assert f"| distill | 1,200 | - | - | {here / 'student.safetensors'} |" in said, said
        assert "not as usual: batch=2, teacher_steps=700\n" in said and f"{here / 'STAGE.png'}" in said, said
        assert "Config(" not in said and "Learning(" not in said and len(said.splitlines()) < 12, said


def test_threads_wait_briefly_unless_the_user_says_how():
    source = "".join(itertools.takewhile(lambda line: "numpy" not in line, open(HERE / "sample.py").readlines()))
    for given, count in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None):
        with unittest.mock.patch.dict(os.environ, given):
            for name in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - given.keys():
                os.environ.pop(name, None)
            exec(source, {})
            assert os.environ.get("GOMP_SPINCOUNT") == count, given
    order = [line.split()[1] for line in open(HERE / "train_distill.py") if line.startswith(("import ", "from "))]
    assert order.index("sample") < order.index("torch"), "torch reads it when it is loaded"


def test_nan_stops_a_training_before_anything_moves():
    with folder() as here:
        assert_error(td.UserError, "toy, step 3: loss nan, gradient norm nan; stopped before anything moved",
                     toy_training, here, nan_at=3)
        stopped = {name: p.clone() for name, p in toy_training.model.state_dict().items()}
        with folder() as other:
            assert_error(SystemExit, "143", toy_training, other, stop_at=2)                  # 3 updates, none of NaN
        assert same(stopped, toy_training.model.state_dict())


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_it():
    resource = importlib.import_module("resource")                            # not on Windows
    with folder() as here:
        assert_error(SystemExit, "143", toy_training, here, stop_at=2)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))          # a file cannot be larger
        try:
            assert_error(OSError, "toy.0000006.checkpoint.pt: ", toy_training, here)
            assert_error(OSError, "x.safetensors: ", td.write_clip, here / "pool/x.safetensors",
                         {"a": torch.zeros(50_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((here / "pool").iterdir())
        (here / "pool").rmdir()
        assert [path.name for path in here.iterdir() if path.suffix != ".jsonl"] == ["toy.0000003.checkpoint.pt"]
        assert "resumed at step 3" in toy_training(here)[2]


def new_clips(here, count=3, frames=45, config=SMALL, track_frames=None, **more):
    """A folder of `count` clips, random latents, whose tracks outlast them to track_frames. more: tensors of all."""
    h, w = config.latent_size
    for i in range(count):
        N, T = 4 + i, track_frames or frames
        tracks = rand(T, N, 2, seed=i) * 6 + 18
        td.write_clip(here / f"{i}.safetensors", {
            "latents": rand(config.out_dim, (frames + 3) // 4, h, w, seed=i).half(), "tracks": tracks,
            "visible": rand(T, N, seed=i) > 0, "group": torch.full((N,), -1),
            "text": rand(2 + i, config.text_dim, seed=i)} | more)
    return here


def video_clips(here, count=3, frames=45, config=SMALL):
    """As new_clips, with video in place of latents."""
    for file in new_clips(here, count, frames, config).iterdir():
        clip = load_file(file)
        clip.pop("latents")
        noise = torch.rand(3, frames, *config.size, generator=seeded(int(file.stem)))
        td.write_clip(file, clip | {"video": (noise * 255).byte()})
    return here


def test_batches_are_of_random_clips_padded_with_hidden_tracks_and_empty_text():
    with folder() as here:
        files = td.open_clips(new_clips(here / "data", 3, 57, track_frames=93), SMALL, 12, 45)
        clips = [load_file(file) for file in files]
        torch.manual_seed(0)
        batch = td.pick(files, 30, 6, 21)
        assert batch["latents"].shape == (30, 4, 6, 4, 6) and batch["tracks"].shape == (30, 21, 6, 2)
        assert batch["text"].shape == (30, 4, 12) and batch["visible"].shape == (30, 21, 6)
        found = Counter()
        for b in range(30):
            i, = (i for i in range(3) if clips[i]["latents"][:, :6].equal(batch["latents"][b]))
            found[i] += 1
            N, L = 4 + i, 2 + i
            assert batch["tracks"][b, :, :N].equal(clips[i]["tracks"][:21])
            assert batch["visible"][b, :, :N].equal(clips[i]["visible"][:21]) and not batch["visible"][b, :, N:].any()
            assert batch["text"][b, :L].equal(clips[i]["text"]) and not batch["text"][b, L:].any()
            assert (batch["group"][b] == -1).all()
        assert min(found[i] for i in range(3)) > 4, found


def test_which_tracks_a_batch_gets_depends_on_the_clips_alone():
    with folder() as here:
        plain = new_clips(here / "plain")
        drawn = new_clips(here / "drawn", group=torch.tensor([0, 0, -1, -1]), tracks=rand(45, 4, 2) * 6 + 18,
                          visible=torch.ones(45, 4).bool())
        run = td.resolve(td.Flags(device="cpu", out=here))
        run = replace(run, config=replace(SMALL, causal=False))
        for data, user, many in (plain, 1, 1), (drawn, 1, 0):
            with unittest.mock.patch.object(td, "user_tracks", wraps=td.user_tracks) as by_user, \
                    unittest.mock.patch.object(td, "dense_subset", wraps=td.dense_subset) as dense:
                batch = td.draw_batch(run, sorted(data.iterdir()), 8, 12)
                assert (by_user.call_count, dense.call_count) == (user, many)
        everything = td.draw_batch(run, sorted(drawn.iterdir()), 8, 12, dense=True)
        assert everything.points["visible"].all() and batch.latents.shape == (8, 4, 12, 4, 6)
        on_object = td.touched_cells(everything.points["tracks"][:, :, :2], torch.ones(8, 45, 2).bool(), SMALL)
        assert everything.touched.equal(on_object), "all of an object counts, the ground does not"
        first = td.draw_batch(run, sorted(drawn.iterdir()), 8, 12, first_only=True)
        assert first.latents.shape == (8, 4, 1, 4, 6) and first.points["tracks"].shape[1] == 45


def test_clips_that_hold_video_are_encoded_once():
    with folder() as here, quiet():
        flags = own_flags(here, video_clips(here / "data"))
        run = td.resolve(td.parse_flags(flags))
        files = td.training_clips(run, 12)
        vae = new_vae()
        for file, source in zip(files, sorted((here / "data").iterdir()), strict=True):
            clip, given = load_file(file), load_file(source)
            with torch.no_grad():
                latents = vae.encode(given["video"][None] / 127.5 - 1)[0].half()
            assert clip["latents"].equal(latents) and clip["first"].equal(given["video"][:, 0])
            assert {*clip} ^ {*given} == {"latents", "first", "video"}
        with unittest.mock.patch.object(td, "encode_video", None):                      # none is encoded again
            assert td.training_clips(run, 12) == files
        (here / "data/0.safetensors").write_bytes((here / "data/1.safetensors").read_bytes())
        assert td.training_clips(run, 12)[0] != files[0], "other clips"


def test_drawn_clips_are_the_same_whether_they_are_encoded_while_drawn_or_later():
    with folder() as here, quiet(), small_scenes():
        before_distillation(here)
        drawn = td.resolve(td.Flags(smoke=True, out=here, device="cpu", set=(("clips", 2),)))
        files = td.training_clips(drawn, 12)
        assert td.training_clips(drawn, 12) == files and len(files) == 2
        videos = td.rendered_clips(drawn, "clips", 2)                                   # the same, not encoded
        clip, video = load_file(files[0]), load_file(videos[0])
        with torch.no_grad():
            latents = drawn.load_vae().encode(video["video"][None] / 127.5 - 1)[0].half()
        assert_near(clip["latents"], latents, 2e-3)                     # drawn by one thread, here there may be more
        assert clip["first"].equal(video["video"][:, 0])
        assert clip["tracks"].equal(video["tracks"]) and clip["tracks"].shape[0] == 189, "those of 16 chunks"


def test_what_is_made_is_named_by_what_made_it():
    with folder() as here, quiet(), small_scenes():
        before_distillation(here)
        vaes = [randomised(new_vae(replace(SMALL_VAE, latent_channels=16)), seed) for seed in (0, 1)]

        def made(weights=0, **flags):
            saved(here / "vae.safetensors", vaes[weights], anything=str(time.time()))
            run = td.resolve(td.Flags(smoke=True, out=here, device="cpu", **flags))
            with unittest.mock.patch("extras.world.write_clips", lambda folder, *_, **__: folder.mkdir(exist_ok=True)):
                td.training_clips(run, 12)
            folders = {path for path in here.iterdir() if path.is_dir()}
            return folders, td.checkpoint_settings(run, "teacher")

        first = made()
        assert made() == first and len(first[0]) == 1
        assert len(made(set=(("clips", 40),))[0]) == 1, "what is there stays"
        for count, other in enumerate([{"weights": 1}, {"seed": 1}, {"rollout": 20}], 2):
            folders, settings = made(**other)
            assert len(folders) == count and settings != first[1], other


def test_data_is_told_by_what_it_holds_and_not_by_age_or_place():
    def told(data):
        run = td.resolve(td.parse_flags(own_flags(here, data)))
        return td.checkpoint_settings(run, "teacher"), td.training_clips(run, 12)

    with folder() as here, quiet():
        data = video_clips(here / "data", 3)
        was, files = told(data)
        for file in data.iterdir():
            os.utime(file, (1, 1))                                  # touched
        clip = load_file(data / "1.safetensors")
        td.write(data / "1.safetensors", functools.partial(td.save_file, clip, metadata={"source": "of a touched text"}))
        assert told(data) == (was, files)
        shutil.copytree(data, here / "moved/clips")
        with unittest.mock.patch.object(td, "encode_video", None):                      # none is encoded again
            assert told(here / "moved/clips") == (was, files)
        with unittest.mock.patch.object(td, "content_digest", None):                    # nor read again
            td.read_digests(here / "moved/clips", here / "runs/out/clips.json")
        clip["text"][-1] += 1e-3
        td.write_clip(data / "1.safetensors", clip)
        (data / "2.safetensors").rename(data / "3.safetensors")
        now, others = told(data)
        assert td.differences(was, now) == ["data/1.safetensors has changed", "data/2.safetensors is gone",
                                            "data/3.safetensors is new"]
        assert others[0] == files[0] and others[1] != files[1], "what has changed is encoded again"
        start, copied = here / "start.safetensors", here / "copied.safetensors"
        shutil.copy(start, copied)
        assert td.weight_digests(start) == td.weight_digests(copied)
        assert td.weight_digests(start) != td.weight_digests(saved(copied, randomised(new_model(causal=False), 1)))
        index = shards(here, public())
        assert len(td.weight_digests(index)) == 3
        assert td.weight_digests(index) == td.weight_digests(next(here.glob("*-00001-of-*")))


def test_a_large_tensor_is_told_by_pieces_from_its_first_byte_to_its_last():
    with folder() as here:
        tensor, path = torch.zeros(2 ** 20), here / "a.safetensors"
        digests = set()
        for at in None, 0, 1023, 2 ** 20 - 1:
            changed = tensor.clone()
            if at is not None:
                changed[at] = 1
            save_file({"a": changed}, path)
            digests.add(td.content_digest(path))
        save_file({"a": tensor.reshape(2 ** 10, 2 ** 10)}, path)
        digests.add(td.content_digest(path))
        torch.save(tensor, here / "a.pt")
        digests.add(td.content_digest(here / "a.pt"))
        assert len(digests) == 6
        path.write_bytes(path.read_bytes()[:40])
        assert_error(td.UserError, f"{path}: damaged", td.content_digest, path)


def test_processes_wait_equally_often_whatever_each_has_to_make():
    waits, made = [], []

    def wrote(path, clip):
        made.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    for rank in 0, 1:                                               # one batch of trajectories, which process 0 makes
        waits.clear()
        made.clear()
        with folder() as here, quiet():
            flags = own_flags(here, new_clips(here / "data"), "--set", "trajectories=8")
            run = td.resolve(td.parse_flags(flags))
            saved(here / "teacher.safetensors", new_model(causal=False, steps=3))
            run = replace(run, files=run.files | {"teacher": here / "teacher.safetensors"})
            with unittest.mock.patch.multiple(td, PROCESSES=2, RANK=rank, wait_for_all=waits.append,
                                               from_first=lambda value: value or {}, write_clip=wrote):
                files = td.training_clips(run, 12)
                files = td.make_trajectories(run, files)
        assert len(files) == 8 and waits == 4 * [td.LATE] and len(made) == (0 if rank else 8), (rank, waits, made)


def trained(here, flags, stages):
    """One step of each stage of a training; what was logged, by stage."""
    with quiet() as (out, err):
        for stage in stages:
            assert td.main([*flags, "--stage", stage, "--steps", "1", "--accumulate", "1"]) is None, err.getvalue()
    rows = [json.loads(line) for line in open(Path(flags[flags.index("--out") + 1]) / "stats.jsonl")]
    return {row["stage"]: row for row in rows}, out.getvalue()


def test_every_stage_runs_on_a_folder_of_clips():
    with folder() as here, unittest.mock.patch.object(td, "rendered_clips", None):          # nothing is drawn
        flags = own_flags(here, new_clips(here / "data"))
        log, _ = trained(here, flags, ("teacher", "causal", "distill"))
        assert all(math.isfinite(row["grad_c" if stage == "distill" else "grad"]) for stage, row in log.items()), log
        config = MotionStream.from_pretrained(here / "runs/out/student.safetensors").config
        assert config == replace(SMALL, causal=True)


def test_the_vae_is_trained_on_clips_that_hold_video():
    small = replace(DRAWN, out_dim=96, in_dim=96 + 16)
    with folder() as here, unittest.mock.patch.dict(PRESETS, tiny=small), without_pictures():
        flags = ["--data", str(video_clips(here / "data", config=small)), "--out", str(here / "out"), "--smoke"]
        log, _ = trained(here, flags, ("vae", "teacher"))
        assert log["vae"]["psnr"] > 8 and math.isfinite(log["teacher"]["loss"]), log
        vae = load_vae(here / "out/vae.safetensors")
        assert isinstance(vae, LinearVAE) and 0.6 <= vae.latent_std.min() < vae.latent_std.max() <= 2


def test_clips_may_be_longer():
    with folder() as here:
        flags = own_flags(here, new_clips(here / "data", frames=69), "--set", "clip_frames=57")
        with unittest.mock.patch.object(td, "flow_loss", wraps=td.flow_loss) as loss:
            trained(here, flags, ("teacher", "causal", "distill"))
        assert {call.args[1].shape[2] for call in loss.call_args_list} == {15}, "57 frames are 15 latents"
        changed = [word if word != "clip_frames=57" else "clip_frames=69" for word in flags]
        with quiet() as (_, err):
            assert td.main([*changed, "--stage", "distill", "--steps", "1"]) == 2
        assert "of other settings (clip_frames 57, now 69" in err.getvalue(), err.getvalue()


def test_long_rollouts_start_from_the_first_latents_of_clips_and_pictures_are_enough():
    with folder() as here:
        flags = own_flags(here, new_clips(here / "data", frames=1, track_frames=93), "--rollout", "8")
        (here / "runs/out").mkdir(parents=True)
        for name in "teacher", "causal":
            saved(here / "runs/out" / f"{name}.safetensors", new_model(causal=name == "causal"))
        lengths, judged_clip = [], td.judged_clip

        def record(chunks, frames, first, points):
            lengths.append(first.shape[2] if first is not None else 0)
            x0, points = judged_clip(chunks, frames, first, points)
            assert x0.shape[2] == 12, "the teacher knows 12 latents"
            return x0, points

        with quiet() as (_, err), unittest.mock.patch.object(td, "judged_clip", record):
            assert td.main([*flags, "--stage", "distill", "--steps", "6"]) is None, err.getvalue()
            assert td.main([*flags, "--stage", "teacher", "--steps", "1"]) == 2
        assert {*lengths} == {1} and "data: 3 clips, none of 45 frames" in err.getvalue(), err.getvalue()


def test_every_stage_runs_from_weights_of_wan_in_the_papers_two_stages_of_the_teacher():
    calls, judged, masks, forward, subset, dmd_loss = [], [], [], MotionStream.forward, td.dense_subset, td.dmd_loss

    def record(model, x, sigma, text=None, **given):
        calls.append((sigma.clone(), text, given))
        return forward(model, x, sigma, text, **given)

    assert {*schedule(3, 6.0)} < {*schedule(48, 6.0)}               # here the teacher takes these three steps alone

    def few(model, *args):
        model.config = replace(model.config, steps=3)
        return euler(model, *args)

    with folder() as here, unittest.mock.patch.multiple(
            td, dense_subset=lambda visible, pauses, *of: masks.append(pauses) or subset(visible, pauses, *of), euler=few), \
            unittest.mock.patch.object(MotionStream, "forward", record):
        c = replace(STUB, in_dim=32, clip_dim=32, size=(32, 48), clean_first=False)
        data = new_clips(here / "data", 2, 81, replace(c, text_dim=4096), clip=rand(257, 32))
        saved(here / "wan.safetensors", randomised(MotionStream(c))), saved(here / "vae.safetensors", new_vae(STUB_VAE))
        flags = ["--smoke", "--data", str(data), "--weights", str(here / "wan.safetensors"), "--vae",
                 str(here / "vae.safetensors"), "--out", str(here / "out")]
        log, _ = trained(here, flags, ("teacher",))
        first = MotionStream.from_pretrained(here / "out" / "teacher.safetensors")
        state = torch.load(*(here / "out").glob("teacher.*.pt"), weights_only=True)
        moments = state["learners"]["teacher"]["optimizer"]["state"]
        assert moments and all("exp_avg" in moment for moment in moments.values()), "AdamW alone"
        assert first.config == replace(c, in_dim=48, track_dim=16, shift=6.0, sigmas=schedule(3, 6.0), steps=48)
        assert masks == [False] and (calls[0][0] > 0).all()         # no frame is clean: the image is in channels
        assert calls[0][2]["image"].shape == (1, 16, 21, 4, 6) and not calls[0][2]["image"][:, :, 1:].any()
        assert calls[0][1].shape[2] == 4096 and calls[0][2]["clip"].shape == (1, 257, 32)
        (here / "out" / "teacher.safetensors").rename(here / "first.safetensors")
        shutil.rmtree(here / "out")
        flags[flags.index("--weights") + 1] = str(here / "first.safetensors")
        with unittest.mock.patch.object(td, "dmd_loss", lambda *args: judged.append(args) or dmd_loss(*args)):
            log, _ = trained(here, flags, ("teacher", "causal", "distill"))
        (x0, _, _, given, image, *_), = judged                      # of the clip, whose frame 0 is made too
        assert x0.shape == given["image"].shape and image is None and not x0[:, :, 0].equal(given["image"][:, :, 0])
        assert set(masks[1:]) == {True} and all(math.isfinite(row["seconds"]) for row in log.values())
        for name in "teacher", "causal", "student":
            model = MotionStream.from_pretrained(here / "out" / f"{name}.safetensors")
            assert model.track_head.conv.weight.equal(first.track_head.conv.weight)
            assert not model.blocks[0].ffn[0].weight.equal(first.blocks[0].ffn[0].weight)
        assert {tuple(given["image"].shape[1:3]) for _, _, given in calls} == {(16, 21), (16, 3)}
        s = td.resolve(td.parse_flags(flags[1:])).settings
        steps = [(s.teacher_accumulate, s.teacher_steps), (s.causal_accumulate, s.causal_steps),
                 (s.distill_accumulate, s.distill_steps)]
        assert steps == [(128, 800 * 128), (128, 2000 * 128), (64, 400 * 5 * 64)], steps


def test_settings_are_set_by_name_and_by_type():
    run = td.resolve(td.parse_flags(["--set", "batch=2", "--set", "teacher.adam=1e-4", "--set", "track_weight=1",
                                     "--set", "eps=1e-5", "--set", "corrupt_context=False", "--guidance", "2,0.5"]))
    assert (run.settings.batch, run.settings.teacher.adam, run.settings.track_weight) == (2, 1e-4, 1)
    assert (run.config.eps, run.config.guidance, run.settings.corrupt_context) == (1e-5, (2.0, 0.5), False)
    assert run.settings.teacher.muon == td.TINY.teacher.muon
    assert {**vars(run.settings), "batch": 4, "teacher": 0, "track_weight": 4.0, "corrupt_context": True} == \
        {**vars(td.TINY), "teacher": 0}


def test_what_cannot_be_trained_is_refused_in_one_line():
    with folder() as here, quiet() as (_, err):
        data = new_clips(here / "data", 1)
        vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
        mask = saved(here / "mask.safetensors", randomised(MotionStream(replace(STUB, in_dim=36))))
        wan = saved(here / "wan.safetensors", randomised(MotionStream(STUB)))
        student, small = saved(here / "s.safetensors", new_model()), saved(here / "small.safetensors", new_vae())
        teacher = saved(here / "t.safetensors", new_model(causal=False))
        for said, *flags in [("--reward needs --stage distill", "--reward", "motion", "--stage", "teacher"),
                             ("--memory needs --stage causal or distill", "--memory", "drawn", "--stage", "teacher"),
                             ("--steps needs --stage", "--steps", "9"),
                             ("argument --memory: '3,1,1' is not like c3s1w1", "--memory", "3,1,1"),
                             ("argument --memory: c13s1w1 is not chunk 1 to 12", "--memory", "c13s1w1"),
                             ("argument --set: batch is not like field=value", "--set", "batch"),
                             ("--set batches: no such field; there are clip_frames, ", "--set", "batches=3"),
                             ("--set rate: no such field; there are muon, adam", "--set", "teacher.rate=3"),
                             ("--set batch=many: it is 4 now", "--set", "batch=many"),
                             ("--set clip_frames=80: needs whole chunks of 12, the first of 9: 45, 57,", "--set",
                              "clip_frames=80"),
                             ("--set clip_frames=45: needs whole chunks of 20, the first of 17: 57, 77,", "--memory",
                              "c5s1w1"),
                             ("50 steps of the teacher: the student's noise levels", "--set", "steps=50"),
                             ("--stage: invalid choice: 'eval'", "--stage", "eval"),
                             ("unrecognized arguments: --clips 3", "--clips", "3"),
                             ("unrecognized arguments: --adversarial 1", "--adversarial", "1"),
                             ("--device nowhere: not available here", "--device", "nowhere"),
                             ("mask.safetensors: takes the image as a clip with a mask", "--weights", mask),
                             ("s.safetensors: holds a student", "--weights", student),
                             ("wan.safetensors: give --vae FILE", "--weights", wan, "--data", data),
                             ("data: give --vae FILE", "--data", data),
                             ("data: holds latents; the stage vae", "--data", data, "--stage", "vae"),
                             ("wan.safetensors: give --data FOLDER", "--weights", wan, "--vae", vae),
                             ("no.safetensors: cannot be read (No such file", "--weights", here / "no.safetensors"),
                             ("no.safetensors: no such file", "--vae", here / "no.safetensors"),
                             ("small.safetensors: drop it, or --stage vae", "--vae", small, "--stage", "vae"),
                             ("none: no such folder", "--data", here / "none"),
                             ("vae.safetensors: no such folder", "--data", vae),
                             ("vae.safetensors: latents have 16 channels and stride 8, those of", "--weights", teacher,
                              "--vae", vae, "--data", data),
                             ("wan.safetensors: expected a complete VAE (Wan or TAEHV) checkpoint; this looks like a DiT", "--vae", wan)]:
            assert td.main([str(word) for word in ("--out", here / "out", *flags)]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last and "makes it" not in last, (said, last)


def test_what_is_wrong_with_a_folder_of_clips_is_one_line():
    def change(**more):
        return lambda file, clip: td.write_clip(file, {name: tensor for name, tensor in (clip | more).items()
                                                       if tensor is not None})

    with folder() as here, quiet() as (_, err):
        flags = own_flags(here, here / "data")
        for said, damage in [
                ("1.safetensors: damaged, or no clip", lambda file, _: file.write_bytes(b"no clip at all")),
                ("1.safetensors: text is missing, expected (None, 12)", change(text=None)),
                ("1.safetensors: latents is (5, 12, 4, 6), expected (4, None, 4, 6)", change(latents=rand(5, 12, 4, 6))),
                ("1.safetensors: video is missing", change(latents=None)),
                ("1.safetensors: tracks of 44 frames, 45 are wanted; see --rollout", change(tracks=rand(44, 5, 2))),
                ("1.safetensors: text of 6 rows, at most 5", change(text=rand(6, 12))),
                ("1.safetensors: its latents are of another VAE", lambda file, clip: save_file(clip, file, {"vae": "7"})),
                ("data: 3 clips, none of 45 frames", None), ("data: 0 clips, none of 45 frames", None)]:
            shutil.rmtree(here / "data", ignore_errors=True)
            (here / "data").mkdir()
            if damage:
                file = new_clips(here / "data") / "1.safetensors"
                damage(file, load_file(file))
            elif "3 clips" in said:
                new_clips(here / "data", frames=41, track_frames=45)
            assert td.main([*flags, "--stage", "teacher", "--steps", "1"]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last, (said, last)


def test_of_dense_tracks_a_subset_is_kept_and_pauses_spare_the_first_chunk():
    torch.manual_seed(0)
    visible = torch.ones(40, 81, 2500, dtype=torch.bool)
    kept, paused = td.dense_subset(visible, False, 3), td.dense_subset(visible, True, 3)
    count = kept[:, 0].sum(1)
    assert kept.equal(kept[:, :1].expand_as(kept)) and 1000 <= count.min() < 1200 and 2300 < count.max() <= 2500
    silent = ~paused.any(2)                                         # (B, T)
    starts = [0, *range(9, 81, 12), 81]
    chunks = torch.stack([silent[:, a:b].float().mean(1) for a, b in zip(starts, starts[1:])], 1)
    assert ((chunks == 0) | (chunks == 1)).all() and not chunks[:, 0].any() and 0.12 < chunks[:, 1:].mean() < 0.28
    assert td.dense_subset(visible[:, :, :7], False, 3).all()               # if there are few, all
    visible[:, :, 40:] = False                                      # few, and hidden ones to make up the number
    assert td.dense_subset(visible, False, 3)[:, :, :40].all()
    silent = ~td.dense_subset(visible, True, 5).any(2)              # chunks of 20 frames, the first of 17
    assert not silent[:, :17].any() and silent[:, 17:37].equal(silent[:, 17:18].expand(-1, 20)) and silent.any()


@slow
def test_the_whole_training_runs_in_a_minute():
    with folder() as here:
        subprocess.run([sys.executable, "train_distill.py", "--smoke", "--out", here], cwd=HERE, check=True)
        assert any(here.glob("*student*.safetensors")) and (here / "stats.jsonl").stat().st_size > 0
