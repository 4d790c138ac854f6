"""The papers' tables in small: each row does what it says."""

import inspect
import itertools
import shutil
import time
import unittest
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

import motionstream
import sample
import train_distill as td
from extras import evaluate, experiments, world
from extras.evaluate import eval_row, new_case
from extras.experiments import (SHORT, Refreshed, attention_row, damaged, distil_briefly,
                                drawn_tracks, encoding_row, speed_row, taught_row, words_row)
from extras.testing import (assert_error, assert_near, before_distillation, folder, new_model,
                            new_vae, quiet, rand, saved, small_scenes)
from motionstream import PRESETS, TrackHead, apply_rope, split_conditions, guided_velocity
from sample import embed_words


def test_every_row_of_the_tables_can_be_played():
    class Toy:
        config, eval_clips, eval_frames = replace(PRESETS["tiny"], num_layers=1), 1, 45

    for tables in evaluate.tables(Toy), experiments.tables(Toy):
        for title, (common, rows) in tables.items():
            for row in rows:
                settings = {key: value for key, value in (common | row).items() if not hasattr(Toy.config, key)}
                assert {"seed", "clips", "frames"} <= settings.keys()
                overrides = {key: value for key, value in (common | row).items() if hasattr(Toy.config, key)}
                replace(Toy.config, **overrides)
                measured = inspect.signature(settings.pop("measure", eval_row)).parameters
                case = {key: value for key, value in settings.items()
                        if key not in {*measured, *inspect.signature(eval_row).parameters, "frames"}}
                scene, motion = new_case(frames=9, **case)
                assert motion["tracks"].shape[:2] == (case["clips"], 9), (title, row)
    model, vae = new_model(size=(128, 128), text_dim=64), new_vae()
    Toy.model, Toy.vae, Toy.device, Toy.seed = lambda self, name, **more: model, lambda self: vae, "cpu", 0
    result = eval_row(Toy(), seed="x", clips=1, frames=45, piece=9, objects=1)
    assert len(result["tenths"]) == 5 and [part["from"] for part in result["tenths"]] == [0, 9, 18, 27, 36]
    values = [part["psnr"] for part in result["tenths"]]
    assert abs(result["psnr"] - np.mean(values)) < 1e-4 and abs(result["drift"] - np.std(values)) < 1e-4


def test_attention_shares_are_those_of_queries_and_keys_by_hand():
    model, vae, seen = new_model(size=(128, 128), text_dim=64), new_vae(), []
    run = SimpleNamespace(config=model.config, device="cpu", seed=0, model=lambda name: model, vae=lambda: vae)

    def by_hand(attention, inputs):
        x, rope, cache, _ = inputs
        if len(cache.chunks) == 2:                              # a sink and a window
            q, k = (norm(linear(x)).unflatten(2, (2, -1)) for norm, linear in (
                (attention.norm_q, attention.q), (attention.norm_k, attention.k)))
            k = apply_rope(torch.cat([*(old for old, _ in cache.chunks), k], 1), rope).double()
            q = apply_rope(q, rope[-x.shape[1]:]).double()
            for clip, head in itertools.product(range(2), range(2)):
                weights = torch.exp(q[clip, :, head] @ k[clip, :, head].T / 20 ** 0.5)
                weights = weights / weights.sum(1, keepdim=True)
                seen.append(weights.view(x.shape[1], 3, -1).sum(2).mean(0))     # sink, window, itself: equally many

    hook = model.blocks[1].self_attn.register_forward_pre_hook(by_hand)
    case = {"seed": "x", "clips": 2, "frames": 57, "objects": 1}
    row = attention_row(run, layer=1, **case)
    hook.remove()
    assert len(seen) == 4 * 4 * 3                               # clips and heads, passes, chunks 2 to 4 of five
    assert_near(torch.tensor([*row.values()]).double(), 100 * torch.stack(seen).mean(0), 1e-4)
    assert [*row] == ["sink", "window", "itself"] and abs(sum(row.values()) - 100) < 1e-3, row
    assert attention_row(run, layer=0, **case) != row


def test_a_motion_appears_in_the_film_as_captioned_and_not_in_the_rigid_one():
    case = {"seed": "words", "clips": 8, "frames": 13, "objects": 1}
    run = SimpleNamespace(config=PRESETS["tiny"])
    for kind in 1, 2:
        def played(run, model, scene, motion, text):
            assert text.equal(embed_words(said, run.config)) and motion["visible"].sum(2).max() <= 1
            rigid = {"spin": 0 * scene["spin"], "pulse": torch.ones_like(scene["pulse"])}
            assert torch.ones(8).equal(scene["pulse"][:, 5]) == (kind == 1) and scene["spin"].any() == (kind == 1)
            truth, rigid = world.render(scene, td.SIZE), world.render(scene | rigid, td.SIZE)
            video = share * truth + (1 - share) * rigid
            yield from (video + 0.1 * rand(*video.shape)).split(10, 2)

        for share, said in (1, world.caption(0, kind)), (0.25, td.NEUTRAL):
            with unittest.mock.patch.object(experiments, "play", played), \
                    unittest.mock.patch.object(td, "SIZE", 64), unittest.mock.patch.object(evaluate, "SIZE", 64):
                row = words_row(run, attributes=(0, kind), text=td.NEUTRAL if said == td.NEUTRAL else None, **case)
            assert row["appears"] == 100 * (share == 1) and abs(row["share"] - share) < 0.1, row
            assert 4 <= row["clips"] < 8 if kind == 1 else row["clips"] == 8, row          # discs may spin unseen


def test_both_ways_to_encode_tracks_are_timed():
    model, vae, calls = new_model(size=(32, 32)), new_vae(), []
    run = SimpleNamespace(device="cpu", model=lambda name: model, vae=lambda: vae)
    for by, where in ("vae", sample), ("head", experiments):
        name = {"vae": "draw_control", "head": "track_features"}[by]
        real = getattr(where, name)

        def slowly(*args):
            calls.append(by)
            assert real(*args).shape[2] == 3                    # latents of 9 frames
            time.sleep(0.01 if by == "head" else 0.05)
            return torch.zeros(1)

        with unittest.mock.patch.object(where, name, slowly), small_scenes():
            row = encoding_row(run, by, seed="x", clips=1, frames=9, points="dense")
        assert calls.count(by) == len(calls) == 9 and row["ms"] >= (10 if by == "head" else 50), (row, calls)
        calls.clear()


def test_a_brief_distillation_differs_in_what_its_row_says_and_is_not_trained_again():
    with folder() as here, quiet() as (out, _):
        flags = ["--smoke", "--out", str(here), "--seed", "3", "--tracks", "random"]
        run, trained = evaluate.new_run(flags, "experiments"), []

        def train(short):
            assert torch.is_grad_enabled() and load_file(short.path("causal")).keys()
            trained.append(short)
            shutil.copyfile(run.path("student"), short.path("student"))

        def settings(short):
            groups = {"args": vars(short.args), "recipe": vars(short.recipe), "config": vars(short.config),
                      "run": {"steps": short.steps["distill"], "clips": short.clips, "seed": short.seed}}
            return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()
                    if name != "out"}

        with torch.no_grad(), unittest.mock.patch.object(td, "train_student", train):
            plain = distil_briefly(run)
            for how, differs in (
                ({"seed": 1}, {"args.seed": 4, "run.seed": 4}),
                ({"guidance": (0, 0)}, {"config.guidance": (0, 0)}),
                ({"critic_steps": 2}, {"recipe.critic_steps": 2, "args.steps": 2, "run.steps": 2}),
                ({"sink_decay": 0.9}, {"args.sink_decay": 0.9, "config.sink_decay": 0.9}),
                ({"reward": "motion", "beta": 2.0}, {"args.reward": "motion", "args.beta": 2.0}),
            ):
                short = distil_briefly(run, **how)
                was, now = settings(plain), settings(short)
                assert {key: value for key, value in now.items() if value != was[key]} == differs, how
                assert (short.reward and short.reward.__name__) == ("motion_reward" if "reward" in how else None)
                assert len(trained) == len({one.out for one in trained}) and short is trained[-1]
                count = len(trained)
                assert distil_briefly(run, **how).out == short.out and len(trained) == count    # the weights are there
            rows = [row["distil"] for row in experiments.tables(run)["distillation, drag"][1] if "distil" in row]
            folders = {distil_briefly(run, **how).out for how in rows}
        assert len(folders) == len(rows) - 1 == 9, folders      # two rows are of the plain one
        assert settings(plain)["run.seed"] == 3 and plain.config == replace(run.config, sink_decay=1.0)
        assert (plain.args.rollout, plain.recipe.batch, plain.clips, plain.steps["distill"]) == (8, 2, 16, 5)
        assert out.getvalue().count("trained in 0.0 minutes") == len(trained) == 9
        with unittest.mock.patch.object(td, "PROCESSES", 2):
            assert_error(td.UserError, "leave out torchrun", distil_briefly, run, critic_steps=4)


def test_a_brief_teacher_differs_in_what_its_row_says():
    with folder() as here, quiet(), unittest.mock.patch.dict(td.RECIPES["tiny"], clips=(8, 8, 8)):
        run, trained = evaluate.new_run(["--out", str(here)], "experiments"), []

        def train(short):
            assert short.steps["teacher"] == 7 and short.path("vae") == run.path("vae") and short.recipe.emphasis == 0
            trained.append((short.dense, short.config.in_dim, short.start and short.start.path, td.pick is pick,
                            motionstream.TrackHead.__name__, short.recipe.teacher))
            saved(short.path("teacher"), new_model(causal=False))

        pick = td.pick
        with torch.no_grad(), unittest.mock.patch.object(td, "train_teacher", train), \
                unittest.mock.patch.object(experiments, "eval_row", lambda run, **row: (run.out, row)):
            rows = [taught_row(run, {"steps": 7, **teach}, x=1, **drawn) for teach, drawn in (
                ({}, {}), ({}, {"drawn": True}), ({"start": True}, {}), ({"start": True, "harm": True}, {}), ({}, {}))]
        recipes, teacher = td.RECIPES["tiny"], run.path("teacher")
        assert trained == [(1, 32, None, True, "TrackHead", recipes["teacher"]),
                           (1, 32, None, True, "DrawnTracks", recipes["teacher"]),
                           (0, 48, teacher, True, "TrackHead", recipes["causal"]),
                           (0, 48, teacher, False, "TrackHead", recipes["causal"])], trained
        assert rows[0] == rows[4] and len({out for out, _ in rows}) == 4 and motionstream.TrackHead is TrackHead
        assert rows[0][1] == {"model": "teacher", "x": 1}


def test_damaged_tracks_are_jittered_late_or_broken_in_three_of_four_clips():
    torch.manual_seed(0)
    clips = {"tracks": torch.zeros(400, 45, 20, 2), "visible": torch.ones(400, 45, 20, dtype=torch.bool)}
    harmed = damaged(lambda: {name: tensor.clone() for name, tensor in clips.items()})()
    moved, shown = harmed["tracks"].flatten(1).any(1), harmed["visible"]
    late = ~shown[:, 1:13].flatten(1).any(1) & shown[:, 13:].flatten(1).all(1)
    broken = ~shown.flatten(1).all(1) & ~late
    for kind in moved, late, broken, ~(moved | late | broken):
        assert 70 < kind.sum() < 130
    assert not (moved & (late | broken)).any() and shown[:, 0].all() and 0.5 < shown[broken].float().mean() < 0.6
    assert 0.019 < harmed["tracks"][moved].std() / td.SIZE < 0.021


def test_drawn_tracks_are_dots_in_the_colour_of_their_start():
    head = drawn_tracks(new_vae())(out_channels=16)
    points = rand(1, 21, 4, 2) * 10 + 16, torch.ones(1, 21, 4).bool()
    whole = head(*points, torch.arange(4)[None], 32, 64)
    parts = [head(*(point[:, a:b] for point in points), torch.arange(4)[None], 32, 64) for a, b in ((0, 9), (9, 21))]
    assert whole.shape == (1, 4, 6, 4, 8)
    assert_near(torch.cat(parts, 2), whole, 1e-5)
    shown = []
    head = drawn_tracks(SimpleNamespace(encode=lambda video: shown.append(video) or video))(out_channels=16)
    tracks, visible = torch.tensor([[[9.5, 20], [1, 1], [60, 3]]]).repeat(1, 5, 1, 1), torch.ones(1, 5, 3).bool()
    visible[:, 2, 0] = False
    tracks[:, 4, 0] = torch.tensor([70.0, 0])                           # outside
    head(tracks, visible, (torch.tensor([[20, 1, 3]]) << 16) + torch.tensor([[9, 1, 60]]), 32, 64)
    (video,) = shown
    assert video.shape == (1, 3, 5, 32, 64)
    for y, x, colour in (slice(18, 23), slice(7, 12), (9 / 64, 20 / 32, 1)), (slice(4), slice(4), (1 / 64, 1 / 32, 1)):
        dot = video[0, :, 0, y, x]
        assert_near(dot, 2 * torch.tensor(colour).view(3, 1, 1).expand_as(dot) - 1, 1e-6)
    lit = (video[0] > -1).any(0).sum((1, 2)).tolist()
    assert lit == [25 + 16 + 25, 66, 41, 66, 41]


def test_a_refreshed_sink_is_the_chunk_just_written_every_25th_time():
    cache = Refreshed(1, 1)
    for i in range(60):
        cache.write(torch.full((1, 1), i), torch.full((1, 1), i))
        assert [k.item() for k, _ in cache.chunks][:1] == [0 if i < 24 else 24 if i < 49 else 49]
    assert cache.chunks[-1][0].item() == 59 and len(cache.chunks) == 2


def test_a_stream_is_as_fast_as_itself():
    run = SimpleNamespace(config=PRESETS["tiny"])
    waits = {"chunk": 0.01, "sink": 0.02}

    def played(run, name, scene, points, text, **more):
        while True:
            time.sleep(sum(waits[key] for key in more))
            yield torch.zeros(1, 3, 4 * more["chunk"] if "chunk" in more else 24, 1, 1)

    with unittest.mock.patch.object(experiments, "play", played):
        same, slow = (speed_row(run, 9, seed="x", clips=1, **more) for more in ({"chunk": 3}, {"sink": 2}))
    assert abs(same["chunk"] - 1) < 0.3 and abs(same["frame"] - 1) < 0.3, same
    assert 1.4 < slow["chunk"] < 2.6 and abs(slow["frame"] - slow["chunk"] / 2) < 0.1, slow


def test_critic_steps_and_guidance_of_a_brief_distillation_reach_its_losses():
    with folder() as here, quiet(), unittest.mock.patch.dict(SHORT, updates=2, images=8), small_scenes():
        before_distillation(here)
        shutil.copyfile(here / "causal.safetensors", here / "student.safetensors")
        run = evaluate.new_run(["--out", str(here)], "experiments")

        def made(model, noise, conditions, first, exit_step, grad):
            return iter(noise.split(3, 2))

        def dmd(x0, teacher, critic, conditions, first, guidance, shift, weight):
            x, sigma = x0[:, :, :3], torch.full((len(x0),), 0.7)
            part = next(split_conditions(conditions, 3))
            real, plain = guided_velocity(teacher, x, sigma, part, guidance), teacher(x, sigma, **part)
            calls.append("plain" if real.equal(plain) else "guided")
            return torch.zeros(())

        def critic(x0, critic, conditions, shift):
            calls.append("critic")
            return torch.zeros(())

        for how, expected in (({}, ["guided", *["critic"] * 5]), ({"guidance": (0, 0)}, ["plain", *["critic"] * 5]),
                              ({"critic_steps": 2}, ["guided", "critic", "critic"]),
                              ({"critic_steps": 1}, ["guided", "critic"])):
            calls = []
            with unittest.mock.patch.multiple(td, rollout=made, dmd_loss=dmd, critic_loss=critic):
                with unittest.mock.patch.object(td.Optimizer, "step", lambda *_: 0.0):
                    distil_briefly(run, **how)
            assert calls == 2 * expected, (how, calls)
