"""The papers' tables in small: each row does what it says."""

import inspect
import time
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
from safetensors.torch import load_file

import train_distill as td
from extras import evaluate, experiments, world
from extras.cases import Case, new_clips
from extras.evaluate import Trained, case_of, eval_row, label_of, settings_of
from extras.experiments import (Distillation, DrawnTracks, Lesson, Refreshed, attention_row,
                                attention_shares, clips_folder, damaged_folder, distil_briefly,
                                distillation_run, drawing, encoding_row, lesson_run, refreshing,
                                speed_row, taught_row, teach_briefly, words_row)
from extras.testing import (assert_error, assert_near, folder, new_model, new_vae, quiet, rand,
                            randomised, saved)
from motionstream import (PRESETS, Config, KVCache, MotionStream, SelfAttention, UserError,
                          apply_rope, rope_table)

FITS = {"size": (32, 32), "text_dim": 64}
CASE = {"seed": "x", "clips": 1, "frames": 9, "objects": 1, "width": 32}


def small(here):
    """Models of a training in a folder, for pictures of 32x32 pixels."""
    saved(here / "vae.safetensors", new_vae())
    saved(here / "teacher.safetensors", new_model(causal=False, **FITS))
    for name in "causal", "student":
        saved(here / f"{name}.safetensors", new_model(**FITS))
    return Trained(here)


# --------------------------------------------------------------------------------------------------
# The tables.

def coarse_scenes():
    """Scenes of the simple style have few pixels in here, which saves time."""
    coarse = replace(world.STYLES["simple"], object_pixels=8, ground_pixels=16)
    return unittest.mock.patch.dict(world.STYLES, simple=coarse)


def check_row(config, settings):
    """A row has no settings but those of what measures it. Returns its Case."""
    settings = dict(settings)
    measure = settings.pop("measure", eval_row)
    known = {"set", "at"} | inspect.signature(eval_row).parameters.keys()
    known |= inspect.signature(measure).parameters.keys()
    case = case_of(settings)
    replace(config, **settings_of(Config, settings))
    assert settings.keys() <= known, settings
    return replace(case, clips=1, frames=9, width=16)


def test_every_row_of_the_tables_can_be_played():
    config = replace(PRESETS["tiny"], num_layers=1)
    cases = {}
    for tables in evaluate.tables(1, 45), experiments.tables(config, 1, 45):
        for title, (common, rows) in tables.items():
            labels = {label_of(row) for row in rows}
            assert len(labels) == len(rows), title
            for row in rows:
                case = check_row(config, common | row)
                cases[repr(case)] = case                                # most rows share one
    with coarse_scenes():
        for case in cases.values():
            if case.options.get("style") != "textured":
                assert new_clips(case).tracks.shape[:2] == (1, 9), case


def test_settings_of_a_brief_training_say_only_what_is_not_as_usual():
    assert str(Distillation()) == "as usual"
    assert str(Distillation(seed=1, reward="motion")) == "reward motion seed 1"
    row = {"teach": Lesson(200, start=True), "change": None}
    assert label_of(row) == "teach steps 200 start True, change None"
    assert Case("x", 1, 9) == case_of({"seed": "x", "clips": 1, "frames": 9})


# --------------------------------------------------------------------------------------------------
# What a row measures.

def test_attention_shares_are_those_of_queries_and_keys_by_hand():
    attention = randomised(SelfAttention(20, 2, 1e-6))
    chunk = 6                                                           # tokens: 2 x 3 cells
    cache = KVCache(1, 1)
    for i in range(2):
        cache.write(rand(2, chunk, 2, 10, seed=i), rand(2, chunk, 2, 10, seed=9 + i))
    x = rand(2, chunk, 20, seed=20)
    rope = rope_table(3, 2, 3, 10, "cpu")
    q = attention.norm_q(attention.q(x)).unflatten(2, (2, -1))          # (B, L, N, K)
    k = attention.norm_k(attention.k(x)).unflatten(2, (2, -1))
    (sink, _), (window, _) = cache.chunks
    k = torch.cat([sink, window, k], 1)                                 # (B, 3 L, N, K)
    q = apply_rope(q, rope[-chunk:]).double()
    k = apply_rope(k, rope).double()
    shares = []
    for b in range(2):
        for head in range(2):
            weights = torch.exp(q[b, :, head] @ k[b, :, head].T / 10 ** 0.5)
            weights = weights / weights.sum(1, keepdim=True)            # (L, 3 L)
            parts = weights.view(chunk, 3, chunk).sum(2)
            shares.append(parts.mean(0))
    expected = torch.stack(shares).mean(0)                          # sink, window, the chunk itself
    assert_near(attention_shares(attention, x, rope, cache).double(), expected, 1e-5)


def test_attention_is_watched_in_one_layer_once_the_cache_is_full():
    model = new_model(**FITS)
    trained = SimpleNamespace(
        device="cpu",
        seed=0,
        config=model.config,
        model=lambda name: model,
        vae=new_vae)
    case = CASE | {"frames": 33}                                # three chunks: the third sees all
    row = attention_row(trained, layer=1, **case)
    assert list(row) == ["sink", "window", "itself"]
    assert abs(sum(row.values()) - 100) < 1e-3
    assert attention_row(trained, layer=0, **case) != row
    watched = model.blocks[1].self_attn
    watched.q.weight.zero_()
    watched.q.bias.zero_()
    watched.norm_q.weight.zero_()                               # no query: all is attended alike
    row = attention_row(trained, layer=1, **case)
    assert_near(torch.tensor(list(row.values())), torch.full((3,), 100 / 3), 1e-4)


def words_of(video, case):
    """words_row of a model that makes this video, by a VAE that returns it."""
    vae = SimpleNamespace(encode=lambda truth: truth, decode=lambda latents: (video, None))
    trained = SimpleNamespace(config=PRESETS["tiny"], device="cpu", vae=lambda name: vae)
    return words_row(trained, "vae", **case)


def test_a_motion_appears_in_the_video_as_captioned_and_not_in_the_rigid_one():
    for kind in 1, 2:                                                   # spinning, pulsing
        case = {"seed": "words", "clips": 8, "frames": 13, "objects": 1, "width": 64,
                "attributes": (0, kind)}
        clips = new_clips(case_of(dict(case)))
        scene = clips.scene
        assert scene["spin"].any() == (kind == 1)
        assert (scene["pulse"][:, 5] != 1).any() == (kind == 2)
        truth = clips.frames()
        no_spin = torch.zeros_like(scene["spin"])
        no_pulse = torch.ones_like(scene["pulse"])
        rigid = world.render(scene | {"spin": no_spin, "pulse": no_pulse}, 64)
        noise = 0.1 * rand(*truth.shape)
        captioned = words_of(truth + noise, case)
        assert captioned["appears"] == 100
        assert abs(captioned["share"] - 1) < 0.1
        nearly_rigid = words_of(torch.lerp(rigid, truth, 0.25) + noise, case)
        assert nearly_rigid["appears"] == 0
        assert abs(nearly_rigid["share"] - 0.25) < 0.1
        if kind == 1:
            assert 4 <= captioned["clips"] < 8                          # discs may spin unseen
        else:
            assert captioned["clips"] == 8


class Slow(nn.Module):
    """Stands for a VAE and for a track head; notes by which it was called, and takes its time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def encode(self, video):
        self.calls.append("vae")
        time.sleep(0.02)
        return torch.zeros(1)

    def forward(self, *points):
        self.calls.append("head")
        time.sleep(0.01)
        return torch.zeros(1)


def test_both_ways_to_encode_tracks_are_timed():
    model = new_model(**FITS)
    for by, least in ("vae", 20), ("head", 10):
        slow = Slow()
        model.track_head = slow
        trained = SimpleNamespace(device="cpu", model=lambda name: model, vae=lambda: slow)
        row = encoding_row(trained, by, **CASE)
        assert row["ms"] >= least
        assert slow.calls == [by] * 9


def test_a_stream_is_as_fast_as_itself():
    def played(trained, name, clips, text, chunk=None, sink=None):
        """With another sink, twice as slow."""
        frames = 4 * chunk if chunk else 24
        while True:
            time.sleep(0.01 if chunk else 0.02)
            yield torch.zeros(1, 3, frames, 1, 1)

    trained = SimpleNamespace(config=PRESETS["tiny"])
    with unittest.mock.patch.object(experiments, "play", played):
        same = speed_row(trained, **CASE, chunk=3)
        slow = speed_row(trained, **CASE, sink=2)
    assert abs(same["chunk"] - 1) < 0.3
    assert abs(same["frame"] - 1) < 0.3
    assert 1.4 < slow["chunk"] < 2.6
    assert abs(slow["frame"] - slow["chunk"] / 2) < 0.1


# --------------------------------------------------------------------------------------------------
# Short trainings.

def test_a_brief_distillation_is_trained_once_and_can_be_measured():
    how = Distillation(updates=1, batch=1, clips=2, rollout=4, critic_steps=1, seed=1)
    with folder() as here, quiet() as (out, _):
        trained = small(here)
        student = distil_briefly(trained, how)
        path = student.path("student")
        assert path.parent == student.folder
        assert student.path("vae") == here / "vae.safetensors"
        before = load_file(here / "causal.safetensors")
        after = load_file(path)
        moved = [name for name in before if not before[name].half().equal(after[name])]
        assert moved, "it was not trained"
        assert eval_row(student, **CASE)["psnr"] > 0
        written = path.stat().st_mtime_ns
        again = distil_briefly(trained, how)
        assert again.path("student") == path
        assert path.stat().st_mtime_ns == written
        assert out.getvalue().count("trained in") == 1
        assert student.seed == 1
        clips = clips_folder(replace(trained, seed=1), 2)
        assert list(here.glob("clips2.*")) == [clips], "its clips are of another seed"


def test_another_seed_is_another_training_on_other_clips():
    with folder() as here, quiet():
        trained = small(here)
        one = distillation_run(trained, Distillation())
        other = distillation_run(trained, Distillation(seed=1))
        assert one.seed == 0
        assert other.seed == 1
        assert one.out != other.out
        first = next(clips_folder(trained, 1).glob("*.safetensors"))
        second = next(clips_folder(replace(trained, seed=1), 1).glob("*.safetensors"))
        assert first.parent != second.parent
        assert not load_file(first)["latents"].equal(load_file(second)["latents"])


# What is asked of a Distillation, the fields of its config and the settings that it changes.
ASKED = [
    ({"guidance": (0, 0)}, {"guidance": (0, 0)}, {}),
    ({"critic_steps": 2}, {}, {"critic_steps": 2, "distill_updates": 100}),
    ({"sink_decay": 0.9}, {"sink_decay": 0.9}, {}),
    ({"drawn_memory": True}, {}, {}),
    ({"reward": "motion", "beta": 2.0}, {}, {"beta": 2.0}),
]


def test_what_is_said_of_a_distillation_reaches_its_training():
    with folder() as here, quiet():
        trained = small(here)
        usual = distillation_run(trained, Distillation())
        assert usual.settings.rollout == 8
        assert usual.settings.batch == 2
        assert usual.settings.distill_updates == 250
        assert usual.config.guidance == trained.model("teacher").config.guidance
        assert usual.path("teacher") == here / "teacher.safetensors"
        assert usual.reward is None
        folders = {usual.out}
        for how, config, settings in ASKED:
            run = distillation_run(trained, Distillation(**how))
            assert run.config == replace(usual.config, **config), how
            assert run.settings == replace(usual.settings, **settings), how
            assert (run.reward is not None) == ("reward" in how)
            folders.add(run.out)
        assert len(folders) == 1 + len(ASKED)


def test_experiments_train_in_one_process():
    with folder() as here, unittest.mock.patch.object(td, "PROCESSES", 2):
        said = "leave out torchrun"
        assert_error(UserError, said, distillation_run, small(here), Distillation())


def test_a_brief_teacher_differs_in_what_its_row_says():
    with folder() as here:
        trained = small(here)
        plain = lesson_run(trained, Lesson(7))
        drawn = lesson_run(trained, Lesson(7, drawn=True))
        start = lesson_run(trained, Lesson(7, start=True))
        harm = lesson_run(trained, Lesson(7, start=True, harm=True))
        assert plain.settings.dense_share == 1
        assert plain.settings.teacher == td.TINY.teacher
        assert plain.start is None
        assert plain.config.track_dim == plain.config.out_dim == 4
        assert drawn.config == plain.config
        assert start.settings.dense_share == 0
        assert start.settings.teacher == td.TINY.causal
        assert start.files["start"] == here / "teacher.safetensors"
        assert start.start.has_head
        assert start.config == trained.model("teacher").config
        runs = [plain, drawn, start, harm]
        assert len({run.out for run in runs}) == 4
        for run in runs:
            assert run.settings.teacher_updates == 7
            assert run.settings.track_weight == 0


def test_brief_teachers_are_trained_and_measured():
    with folder() as here, quiet():
        trained = small(here)
        row = taught_row(trained, Lesson(1, drawn=True, clips=2), **CASE)
        assert row["psnr"] > 0
        taught = teach_briefly(trained, Lesson(1, start=True, harm=True, clips=2))
        assert taught.path("teacher").exists()


def read_clips(path):
    """(tracks (clips, T, N, 2), visible (clips, T, N)) of a folder."""
    clips = [load_file(file) for file in sorted(path.glob("*"))]
    tracks = torch.stack([clip["tracks"] for clip in clips])
    visible = torch.stack([clip["visible"] for clip in clips])
    return tracks, visible


def test_damaged_tracks_are_jittered_late_or_broken_in_three_of_four_clips():
    clip = {"tracks": torch.zeros(45, 20, 2), "visible": torch.ones(45, 20, dtype=torch.bool)}
    with folder() as here:
        for i in range(60):
            td.write_clip(here / "clips" / f"{i:03}.safetensors", clip)
        copy = damaged_folder(here / "clips", 128)
        tracks, visible = read_clips(copy)
        assert damaged_folder(here / "clips", 128) == copy
        again, _ = read_clips(copy)
        assert again.equal(tracks)
    moved = tracks.flatten(1).any(1)                                    # (clips,)
    all_seen = visible.flatten(1).all(1)
    silent = ~visible[:, 1:13].flatten(1).any(1)
    late = silent & visible[:, 13:].flatten(1).all(1)
    broken = ~all_seen & ~late
    assert 6 < moved.sum() < 26
    assert 6 < late.sum() < 26
    assert 6 < broken.sum() < 26
    assert 6 < (all_seen & ~moved).sum() < 26
    assert not (moved & ~all_seen).any()
    assert visible[:, 0].all()
    assert 0.4 < visible[broken].float().mean() < 0.7
    assert 0.019 < tracks[moved].std() / 128 < 0.021


def test_a_corrupted_context_shows_frame_0_in_a_rectangle_of_half_of_the_clips():
    x0 = rand(400, 2, 6, 8, 8)
    torch.manual_seed(0)
    past = experiments.corrupt_context(x0, 3)
    changed = (past != x0).any(1)                               # (B, F, h, w)
    frame_0 = x0[:, :, :1].expand_as(x0)
    everywhere = changed[:, None].expand_as(x0)
    assert past[everywhere].equal(frame_0[everywhere])
    assert not changed[:, :3].any()                             # the first chunk
    late = changed[:, 3:].any((2, 3))
    assert late.float().mean() > 0.3
    hit = changed.any((1, 2, 3))                                # of each clip
    share = hit.float().mean()
    assert 0.3 < share < 0.55, share                            # some rectangles are empty
    for mask in changed[:, 3]:                                  # (h, w)
        if mask.any():
            y, x = mask.nonzero(as_tuple=True)
            rectangle = mask[y.min():y.max() + 1, x.min():x.max() + 1]
            assert rectangle.all()


# --------------------------------------------------------------------------------------------------
# Networks that differ.

def test_drawn_tracks_are_encoded_in_pieces_as_at_once():
    head = DrawnTracks(new_vae(), 4, 8)
    tracks = rand(1, 21, 4, 2) * 10 + 16
    visible = torch.ones(1, 21, 4).bool()
    ids = torch.arange(4)[None]
    whole = head(tracks, visible, ids, 32, 64)
    assert whole.shape == (1, 4, 6, 4, 8)
    first = head(tracks[:, :9], visible[:, :9], ids, 32, 64)
    rest = head(tracks[:, 9:], visible[:, 9:], ids, 32, 64)
    assert_near(torch.cat([first, rest], 2), whole, 1e-5)


def test_drawn_tracks_are_dots_in_the_colour_of_their_id():
    tracks = torch.tensor([[[9.5, 20], [1, 1], [60, 3]]]).repeat(1, 5, 1, 1)
    visible = torch.ones(1, 5, 3).bool()
    visible[:, 2, 0] = False
    tracks[:, 4, 0] = torch.tensor([70.0, 0])                           # outside
    ids = torch.tensor([[0x8000_4000, 0x4000_C000, 0]])
    video = DrawnTracks(new_vae(), 4, 8).draw(tracks, visible, ids, 32, 64)
    assert video.shape == (1, 3, 5, 32, 64)
    middle = video[0, :, 0, 18:23, 7:12]
    corner = video[0, :, 0, :4, :4]
    for dot, red, green in (middle, 0.25, 0.5), (corner, 0.75, 0.25):
        colour = torch.tensor([red, green, 1])
        assert_near(dot, (2 * colour - 1).view(3, 1, 1).expand_as(dot), 1e-6)
    lit = (video[0] > -1).any(0).sum((1, 2))                            # (T,)
    others = 16 + 25                                                    # one is cut off by a corner
    assert lit.tolist() == [others + 25, others + 25, others, others + 25, others]


def test_the_vae_that_encodes_drawn_tracks_is_not_written_with_the_teacher():
    teacher = drawing(new_vae())(new_model().config)
    assert teacher.state_dict().keys() == new_model().state_dict().keys()


def test_a_refreshed_sink_is_the_chunk_just_written_every_25th_time():
    cache = Refreshed(1, 1)
    for i in range(60):
        chunk = torch.full((1, 1), i)
        cache.write(chunk, chunk)
        sink, _ = cache.chunks[0]
        if i < 24:
            assert sink == 0
        elif i < 49:
            assert sink == 24
        else:
            assert sink == 49
    assert len(cache.chunks) == 2
    assert cache.chunks[-1][0] == 59


def test_a_refreshed_student_has_a_refreshed_cache_in_every_block():
    student = refreshing(MotionStream)(new_model().config)
    caches = student.new_caches()
    assert len(caches) == 2
    assert all(isinstance(cache, Refreshed) for cache in caches)
