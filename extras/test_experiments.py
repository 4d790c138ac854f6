"""The papers' tables in small: each row does what it says."""

import inspect
import itertools
import time
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import train_distill as td
from extras import evaluate, experiments, world
from extras.cases import Case, new_clips
from extras.evaluate import Trained, case_of, eval_row, label_of, settings_of
from extras.experiments import (Distillation, DrawnTracks, Lesson, Refreshed, attention_row, attention_shares,
                                damaged_folder, distil_briefly, drawing, encoding_row, refreshing, teach_briefly,
                                words_row)
from extras.testing import assert_error, assert_near, folder, new_model, new_vae, quiet, rand, randomised, saved
from motionstream import (PRESETS, Config, KVCache, MotionStream, SelfAttention, UserError, apply_rope,
                          new_model as build, rope_table)

FITS = {"size": (32, 32), "text_dim": 64}
CASE = {"seed": "x", "clips": 1, "frames": 45, "objects": 1, "width": 32}


def small(here, **fits):
    """Models of a training in a folder, for pictures of 32x32 pixels."""
    saved(here / "vae.safetensors", new_vae())
    for name in "teacher", "causal", "student":
        saved(here / f"{name}.safetensors", new_model(causal=name != "teacher", **FITS | fits))
    return Trained(here)


def test_every_row_of_the_tables_can_be_played():
    config = replace(PRESETS["tiny"], num_layers=1)
    for tables in evaluate.tables(1, 45), experiments.tables(config, 1, 45):
        for title, (common, rows) in tables.items():
            assert len({label_of(row) for row in rows}) == len(rows), title
            for row in rows:
                settings = common | row
                known = {*inspect.signature(settings.pop("measure", eval_row)).parameters,
                         *inspect.signature(eval_row).parameters, "set", "at"}
                case = replace(case_of(settings), frames=9)
                replace(config, **settings_of(Config, settings))
                assert settings.keys() <= known, (title, settings)
                if case.options.get("style") != "textured":
                    clips = new_clips(replace(case, clips=1, width=16))
                    assert clips.tracks.shape[:2] == (1, 9), (title, row)


def test_attention_shares_are_those_of_queries_and_keys_by_hand():
    attention, cache, chunk = randomised(SelfAttention(20, 2, 1e-6)), KVCache(1, 1), 6
    for i in range(2):
        cache.write(rand(2, chunk, 2, 10, seed=i), rand(2, chunk, 2, 10, seed=9 + i))
    x, rope = rand(2, chunk, 20, seed=20), rope_table(3, 2, 3, 10, "cpu")
    q, k = (norm(linear(x)).unflatten(2, (2, -1)) for norm, linear in (
        (attention.norm_q, attention.q), (attention.norm_k, attention.k)))
    k = apply_rope(torch.cat([*(old for old, _ in cache.chunks), k], 1), rope).double()
    q = apply_rope(q, rope[-chunk:]).double()
    seen = []
    for clip, head in itertools.product(range(2), range(2)):
        weights = torch.exp(q[clip, :, head] @ k[clip, :, head].T / 10 ** 0.5)
        weights = weights / weights.sum(1, keepdim=True)
        seen.append(weights.view(chunk, 3, chunk).sum(2).mean(0))               # sink, window, itself: equally many
    assert_near(attention_shares(attention, x, rope, cache).double(), torch.stack(seen).mean(0), 1e-5)


def test_attention_is_watched_in_one_layer_once_the_cache_is_full():
    model = new_model(**FITS)
    first = model.blocks[1].self_attn
    trained = SimpleNamespace(device="cpu", seed=0, model=lambda name: model, vae=new_vae, config=model.config)
    row = attention_row(trained, layer=1, **CASE | {"frames": 57})
    assert [*row] == ["sink", "window", "itself"] and abs(sum(row.values()) - 100) < 1e-3, row
    assert attention_row(trained, layer=0, **CASE | {"frames": 57}) != row
    first.q.weight.zero_(), first.q.bias.zero_(), first.norm_q.weight.zero_()      # no query: all is attended alike
    row = attention_row(trained, layer=1, **CASE | {"frames": 57})
    assert_near(torch.tensor([*row.values()]), torch.full((3,), 100 / 3), 1e-4)


def test_a_motion_appears_in_the_video_as_captioned_and_not_in_the_rigid_one():
    case = {"seed": "words", "clips": 8, "frames": 13, "objects": 1, "width": 64}
    for kind in 1, 2:
        clips = new_clips(case_of(dict(case) | {"attributes": (0, kind)}))
        scene, truth = clips.scene, clips.frames()
        assert torch.ones(8).equal(scene["pulse"][:, 5]) == (kind == 1) and scene["spin"].any() == (kind == 1)
        rigid = {"spin": 0 * scene["spin"], "pulse": torch.ones_like(scene["pulse"])}
        rigid = world.render(scene | rigid, 64)
        for share in 1, 0.25:
            video = share * truth + (1 - share) * rigid
            row = words_of(video + 0.1 * rand(*video.shape), **case, attributes=(0, kind))
            assert row["appears"] == 100 * (share == 1) and abs(row["share"] - share) < 0.1, row
            assert 4 <= row["clips"] < 8 if kind == 1 else row["clips"] == 8, row          # discs may spin unseen


def words_of(video, **case):
    """words_row of a model that makes this video, by a VAE that returns it."""
    vae = SimpleNamespace(encode=lambda truth: truth, decode=lambda latents: (video, None))
    trained = SimpleNamespace(config=PRESETS["tiny"], device="cpu", vae=lambda name: vae)
    return words_row(trained, "vae", **case)


def test_both_ways_to_encode_tracks_are_timed():
    calls = []

    class Slow(torch.nn.Module):
        def encode(self, video):
            calls.append("vae")
            time.sleep(0.05)
            return torch.zeros(1)

        def forward(self, *points):
            calls.append("head")
            time.sleep(0.01)
            return torch.zeros(1)

    model = new_model(**FITS)
    model.track_head = Slow()
    vae = Slow()
    vae.weight = torch.nn.Parameter(torch.zeros(1))
    trained = SimpleNamespace(device="cpu", model=lambda name: model, vae=lambda: vae)
    for by, least in ("vae", 50), ("head", 10):
        row = encoding_row(trained, by, **CASE | {"frames": 9})
        assert calls == [by] * 9 and row["ms"] >= least, (row, calls)
        calls.clear()


def test_a_brief_distillation_trains_what_its_row_says_once_and_can_be_measured():
    with folder() as here, quiet() as (out, _):
        trained = small(here)
        how = Distillation(updates=1, batch=1, clips=2, rollout=4, critic_steps=1)
        student = distil_briefly(trained, how)
        assert student.path("student").parent == student.folder and student.path("vae") == here / "vae.safetensors"
        was, now = load_file(here / "causal.safetensors"), load_file(student.path("student"))
        assert any(not was[name].half().equal(now[name]) for name in was), "it was trained"
        assert eval_row(student, **CASE)["psnr"] > 0
        written = student.path("student").stat().st_mtime_ns
        assert distil_briefly(trained, how).path("student").stat().st_mtime_ns == written
        assert out.getvalue().count("trained in") == 1
        with_seed = distil_briefly(trained, replace(how, seed=1))
        assert with_seed.folder != student.folder and with_seed.seed == 1
        assert len([*here.glob("clips2.*")]) == 2               # the clips are of the seed


def test_what_is_said_of_a_distillation_reaches_its_training():
    runs = []
    with folder() as here, quiet():
        trained = small(here)
        for how, config, settings in (
            ({}, {}, {}),
            ({"guidance": (0, 0)}, {"guidance": (0, 0)}, {}),
            ({"critic_steps": 2}, {}, {"critic_steps": 2, "distill_steps": 100}),
            ({"sink_decay": 0.9}, {"sink_decay": 0.9}, {}),
            ({"drawn_memory": True}, {}, {"drawn_memory": True}),
            ({"reward": "motion", "beta": 2.0}, {}, {"beta": 2.0}),
        ):
            run = experiments.distillation_run(trained, Distillation(**how))
            plain = runs[0] if runs else run
            assert run.config == replace(plain.config, **config), how
            assert run.settings == replace(plain.settings, **settings), how
            assert (run.reward is None) == ("reward" not in how)
            assert run.path("teacher") == here / "teacher.safetensors" and run.out not in [one.out for one in runs]
            runs.append(run)
        assert (plain.settings.rollout, plain.settings.batch, plain.settings.distill_steps) == (8, 2, 250)
        assert plain.config.guidance == trained.model("teacher").config.guidance
        assert_error(UserError, "leave out torchrun", in_two_processes, trained)


def in_two_processes(trained):
    before, td.PROCESSES = td.PROCESSES, 2
    try:
        experiments.distillation_run(trained, Distillation())
    finally:
        td.PROCESSES = before


def test_a_brief_teacher_differs_in_what_its_row_says():
    with folder() as here, quiet():
        trained = small(here)
        plain, drawn, start, harm = (experiments.lesson_run(trained, how) for how in (
            Lesson(7), Lesson(7, drawn=True), Lesson(7, start=True), Lesson(7, start=True, harm=True)))
        assert plain.network is build and issubclass(drawn.network, MotionStream)
        assert plain.config == drawn.config and plain.config.track_dim == plain.config.out_dim == 4
        assert plain.settings.dense_share == 1 and not plain.start and plain.settings.teacher == td.TINY.teacher
        assert start.settings.dense_share == 0 and start.settings.teacher == td.TINY.causal
        assert start.files["start"] == here / "teacher.safetensors" and start.start.has_head
        assert start.config == trained.model("teacher").config
        assert {run.settings.teacher_steps for run in (plain, drawn, start, harm)} == {7}
        assert {run.settings.track_weight for run in (plain, drawn, start, harm)} == {0}
        assert len({run.out for run in (plain, drawn, start, harm)}) == 4
        taught = experiments.taught_row(trained, Lesson(1, drawn=True, clips=2), **CASE)
        assert taught["psnr"] > 0
        assert teach_briefly(trained, Lesson(1, start=True, harm=True, clips=2)).path("teacher").exists()


def test_damaged_tracks_are_jittered_late_or_broken_in_three_of_four_clips():
    with folder() as here:
        for i in range(60):
            clip = {"tracks": torch.zeros(45, 20, 2), "visible": torch.ones(45, 20, dtype=torch.bool)}
            td.write_clip(here / "clips" / f"{i:03}.safetensors", clip)
        copy = damaged_folder(here / "clips", 128)
        clips = [load_file(file) for file in sorted(copy.glob("*"))]
        tracks, shown = (torch.stack([clip[name] for clip in clips]) for name in ("tracks", "visible"))
        moved = tracks.flatten(1).any(1)
        late = ~shown[:, 1:13].flatten(1).any(1) & shown[:, 13:].flatten(1).all(1)
        broken = ~shown.flatten(1).all(1) & ~late
        for kind in moved, late, broken, ~(moved | late | broken):
            assert 6 < kind.sum() < 26, kind.sum()
        assert not (moved & (late | broken)).any() and shown[:, 0].all() and 0.4 < shown[broken].float().mean() < 0.7
        assert 0.019 < tracks[moved].std() / 128 < 0.021
        again = damaged_folder(here / "clips", 128)
        assert again == copy and torch.stack([load_file(file)["tracks"] for file in sorted(copy.glob("*"))]).equal(tracks)


def test_drawn_tracks_are_dots_in_the_colour_of_their_start():
    head = DrawnTracks(new_vae(), 4, 8)
    points = rand(1, 21, 4, 2) * 10 + 16, torch.ones(1, 21, 4).bool()
    ids = torch.arange(4)[None]
    whole = head(*points, ids, 32, 64)
    parts = [head(*(point[:, a:b] for point in points), ids, 32, 64) for a, b in ((0, 9), (9, 21))]
    assert whole.shape == (1, 4, 6, 4, 8)
    assert_near(torch.cat(parts, 2), whole, 1e-5)
    tracks, visible = torch.tensor([[[9.5, 20], [1, 1], [60, 3]]]).repeat(1, 5, 1, 1), torch.ones(1, 5, 3).bool()
    visible[:, 2, 0] = False
    tracks[:, 4, 0] = torch.tensor([70.0, 0])                           # outside
    ids = (torch.tensor([[20, 1, 3]]) << 16) + torch.tensor([[9, 1, 60]])
    video = head.draw(tracks, visible, ids, 32, 64)
    assert video.shape == (1, 3, 5, 32, 64)
    for y, x, colour in (slice(18, 23), slice(7, 12), (9 / 64, 20 / 32, 1)), (slice(4), slice(4), (1 / 64, 1 / 32, 1)):
        dot = video[0, :, 0, y, x]
        assert_near(dot, 2 * torch.tensor(colour).view(3, 1, 1).expand_as(dot) - 1, 1e-6)
    lit = (video[0] > -1).any(0).sum((1, 2)).tolist()
    assert lit == [25 + 16 + 25, 66, 41, 66, 41]
    names = drawing(new_vae())(new_model().config).state_dict().keys()
    assert names == new_model().state_dict().keys()             # the VAE is not written with it


def test_a_refreshed_sink_is_the_chunk_just_written_every_25th_time():
    cache = Refreshed(1, 1)
    for i in range(60):
        cache.write(torch.full((1, 1), i), torch.full((1, 1), i))
        assert [k.item() for k, _ in cache.chunks][:1] == [0 if i < 24 else 24 if i < 49 else 49]
    assert cache.chunks[-1][0].item() == 59 and len(cache.chunks) == 2
    student = refreshing(MotionStream)(new_model().config)
    assert {type(cache) for cache in student.new_caches()} == {Refreshed} and len(student.new_caches()) == 2


def test_a_stream_is_as_fast_as_itself():
    trained = SimpleNamespace(config=PRESETS["tiny"])
    waits = {"chunk": 0.01, "sink": 0.02}

    def played(trained, name, clips, text, **more):
        while True:
            time.sleep(sum(waits[key] for key in more))
            yield torch.zeros(1, 3, 4 * more["chunk"] if "chunk" in more else 24, 1, 1)

    with unittest.mock.patch.object(experiments, "play", played):
        same, slow = (experiments.speed_row(trained, **CASE, **more) for more in ({"chunk": 3}, {"sink": 2}))
    assert abs(same["chunk"] - 1) < 0.3 and abs(same["frame"] - 1) < 0.3, same
    assert 1.4 < slow["chunk"] < 2.6 and abs(slow["frame"] - slow["chunk"] / 2) < 0.1, slow


def test_settings_of_a_brief_training_say_only_what_is_not_as_usual():
    assert str(Distillation()) == "as usual" and str(Distillation(seed=1, reward="motion")) == "reward motion seed 1"
    assert label_of({"teach": Lesson(200, start=True), "change": None}) == "teach steps 200 start True, change None"
    assert Case("x", 1, 9) == case_of({"seed": "x", "clips": 1, "frames": 9})
