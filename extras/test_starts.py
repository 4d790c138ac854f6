"""Where training starts: from which public weights, and how long its clips are."""

import itertools
import sys
import unittest
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

import sample
import train_distill as td
from extras import clips, dry_run, watch
from extras.testing import (FAMILIES, SMALL, WAN21, assert_error, assert_near, clip_of, folder,
                            new_model, new_vae, own_clips, public, quiet, rand, randomised, recipe,
                            saved, seeded, wan_video, write_layout)
from extras.video import open_video
from motionstream import (PRESETS, MotionStream, UserError, chunk_sizes, rollout, save_pretrained,
                          split_conditions, track_features)
from vae import WanVAE

STARTS = ("Wan 2.1 T2V", "Wan 2.1 Fun-Control", "Wan 2.2 TI2V 5B")     # what training takes
MASKED = ("Wan 2.1 I2V, Fun-InP", "Wan 2.2 Fun-Control 5B")            # and what has a mask


def resolved(*flags):
    with quiet():
        return td.resolve(td.parse([str(flag) for flag in flags]))


def first_teacher(here, family):
    """(The model that a training from such weights begins with, the weights as they are), small
    pictures for both."""
    path = write_layout(here, family, "Wan")
    run = resolved("--dry-run", "--weights", path)
    run = replace(run, config=replace(run.config, size=(32, 64)))
    with quiet():
        teacher = td.starting_teacher(run, None)
    return teacher, MotionStream.from_pretrained(path, dtype=torch.float32, size=(32, 64))


def inputs(c, frames=3):
    """Noised latents, noise levels and what a model of that config reads, without tracks."""
    h, w = c.latent_size
    given = {"text": rand(2, 5, c.text_dim)}
    if c.image_dim:
        given["image"] = rand(2, c.image_dim, frames, h, w, seed=1)
    if c.clip_dim:
        given["clip"] = rand(2, 257, c.clip_dim, seed=2)
    return rand(2, c.out_dim, frames, h, w, seed=3), torch.tensor([0.3, 1.0]), given


def check_slots(teacher, family):
    """The patch embedding's columns are the public ones, and those for tracks, with their head, can
    learn."""
    c, _ = FAMILIES[family]
    columns = teacher.patch_embedding.weight
    head = teacher.track_head.conv.weight
    theirs = public(family)["patch_embedding.weight"]
    stop = c.out_dim + teacher.config.track_dim
    assert columns[:, :c.out_dim].equal(theirs[:, :c.out_dim]), family
    assert columns[:, stop:].equal(theirs[:, c.out_dim + c.track_dim:]), family
    slot = columns[:, c.out_dim:stop]
    assert teacher.config.track_dim == c.out_dim, family
    if c.track_dim:                                 # trained on a control video
        assert slot.equal(theirs[:, c.out_dim:stop]), family
        assert slot.any(), family
        assert not head.any(), family
    else:
        assert not slot.any(), family
        assert head.any(), family


def test_a_training_starts_where_public_weights_are_and_learns_tracks_from_there():
    for family in STARTS:
        with folder() as here:
            teacher, source = first_teacher(here, family)
        check_slots(teacher, family)
        c = teacher.config
        x, sigma, given = inputs(c)
        nothing = torch.zeros(2, 9, 1, dtype=torch.bool)
        empty = track_features(teacher, torch.zeros(2, 9, 1, 2), nothing, torch.zeros(2, 1).long())
        with torch.no_grad():
            ours = teacher(x, sigma, tracks=empty, **given)
            assert_near(ours, source(x, sigma, **given), 1e-6)
        tracks = 5 + 20 * rand(2, 9, 4, 2).abs()
        ids = torch.arange(8).view(2, 4)
        features = track_features(teacher, tracks, ~nothing.expand(2, 9, 4), ids)
        velocity = teacher(x, sigma, tracks=features, **given)
        velocity.square().sum().backward()
        slot = teacher.patch_embedding.weight.grad[:, c.out_dim:c.out_dim + c.track_dim]
        learns = [grad for grad in (slot, teacher.track_head.conv.weight.grad) if grad.any()]
        assert len(learns) == 1, f"{family}: one of slot and head is zero, so the other one waits"


def test_a_track_head_that_comes_with_the_weights_is_frozen_unless_a_setting_says_no():
    c, _ = FAMILIES["Wan 2.1 T2V"]
    with folder() as here:
        path = write_layout(here, "Wan 2.1 T2V", "Wan")
        teacher = MotionStream.from_pretrained(path, track_dim=c.out_dim)
        save_pretrained(teacher, here / "first.safetensors")
        starts = (path,), (here / "first.safetensors",), (
            here / "first.safetensors", "--set", "freeze_track_head=False")
        learns = []
        stages = []
        for start in starts:
            run = resolved("--dry-run", "--weights", *start)
            with quiet():
                model = td.starting_teacher(run, None)
            assert all(p.requires_grad for p in model.blocks.parameters())
            learns.append([p.requires_grad for p in model.track_head.parameters()])
            stages.append(len(dry_run.teacher_updates(run)))
    assert stages == [2, 1, 2], "of the teacher, in the dry run"
    assert all(learns[0]) and not any(learns[1]) and all(learns[2])


def test_weights_with_a_mask_take_a_track_slot_but_no_training():
    for family in MASKED:
        c, _ = FAMILIES[family]
        with folder() as here:
            path = write_layout(here, family, "Wan")
            model = MotionStream.from_pretrained(path, dtype=torch.float32, track_dim=c.out_dim)
            source = MotionStream.from_pretrained(path, dtype=torch.float32)
            said = "takes the image as a clip with a mask, which cannot stream"
            assert_error(UserError, said, resolved, "--dry-run", "--weights", path)
        check_slots(model, family)
        small = replace(model.config, size=(32, 64))
        x, sigma, given = inputs(small)
        with torch.no_grad():
            assert_near(model(x, sigma, **given), source(x, sigma, **given), 1e-6)


# --------------------------------------------------------------------------------------------------
# A first chunk of its own size: the 31 latents of 121 frames are 1 + 10 x 3.

def test_chunks_may_begin_with_one_of_another_size():
    three = replace(SMALL, chunk=3)
    one_first = replace(three, first_chunk=1)
    assert list(chunk_sizes(one_first, 31)) == [1] + 10 * [3]
    assert list(chunk_sizes(three, 21)) == 7 * [3]
    assert list(chunk_sizes(three, 8)) == [3, 3, 2]
    assert list(chunk_sizes(three, 2)) == [2]
    assert list(chunk_sizes(one_first, 6)) == [1, 3, 2]
    assert list(itertools.islice(chunk_sizes(one_first), 4)) == [1, 3, 3, 3]
    noise, given, first = clip_of(7)
    model = new_model(first_chunk=1)
    made = list(rollout(model, noise, given, first, rng=seeded()))
    assert [x.shape[2] for x in made] == [1, 3, 3]
    parts = split_conditions(given, [1, 3, 3])
    by_hand = rollout(new_model(), noise.split([1, 3, 3], 2), parts, first, rng=seeded())
    assert all(a.equal(b) for a, b in zip(made, by_hand))
    other = list(rollout(new_model(), noise, given, first, rng=seeded()))
    assert [x.shape[2] for x in other] == [3, 3, 1]


def test_121_frames_are_whole_chunks_of_the_5b_model():
    run = resolved("--dry-run", "wan2.2-5b")
    assert run.settings.clip_frames == 121
    assert (run.clip_latents, run.clip_chunks) == (31, 11)
    assert run.track_frames == 121
    assert run.latents_of(13) == 37
    run = resolved("--dry-run", "wan2.1-1.3b")
    assert run.settings.clip_frames == 81
    assert (run.clip_latents, run.clip_chunks) == (21, 7)
    assert_error(UserError, "needs whole chunks of 12, the first of 9: 45, 57, 69", resolved,
                 "--dry-run", "wan2.1-1.3b", "--set", "clip_frames=121")
    assert_error(UserError, "needs whole chunks of 12, the first of 1: 49, 61, 73", resolved,
                 "--dry-run", "wan2.2-5b", "--set", "clip_frames=81")
    five_b = PRESETS["wan2.2-5b"]
    assert sample.latents_to_cover(121, five_b) == 31
    assert sample.latents_to_cover(122, five_b) == 34
    assert sample.latents_to_cover(121, PRESETS["wan2.1-1.3b"]) == 33
    assert sample.latents_to_cover(1, five_b) == 1


def test_pauses_fall_on_chunks_and_spare_the_first_whatever_its_size():
    torch.manual_seed(0)
    visible = torch.ones(60, 25, 4, dtype=torch.bool)
    shown = td.dense_subset(visible, True, PRESETS["wan2.2-5b"]).all(2)                 # (B, T)
    starts = [0, 1, 13, 25]
    for begin, end in zip(starts, starts[1:]):
        chunk = shown[:, begin:end]
        assert chunk.equal(chunk[:, :1].expand_as(chunk))
    assert shown[:, 0].all()
    assert not shown[:, 1].all()
    assert not shown[:, 13].all()


def test_a_stream_with_a_first_chunk_of_its_own_goes_on_from_it():
    model, vae = new_model(first_chunk=1), new_vae()
    tracks = 10 + 5 * rand(1, 20, 2, 2)
    visible = torch.ones(1, 20, 2, dtype=torch.bool)
    motion = sample.Motion(tracks, visible, torch.tensor([[1, 2]]))
    pieces = list(sample.stream(model, vae, torch.zeros(1, 3, 32, 48), motion))
    assert [piece.shape[2] for piece in pieces] == [1, 12, 12]
    teacher = new_model(first_chunk=1, causal=False, steps=2)
    pieces = list(sample.sample_teacher(teacher, vae, torch.zeros(1, 3, 32, 48), motion))
    assert [piece.shape[2] for piece in pieces] == [1, 12, 12]


def test_every_stage_trains_with_a_first_chunk_of_its_own():
    with folder() as here:
        data = own_clips(here / "data", frames=49)
        start = saved(here / "start.safetensors", new_model(causal=False, steps=3))
        vae = saved(here / "encoder.safetensors", new_vae())
        words = [data, "--out", here / "clips", "--weights", start, "--vae", vae, "--frames", 49]
        with quiet():
            clips.make_clips(clips.parse_job([str(word) for word in words]))
        flags = ["--smoke", "--data", here / "clips", "--out", here / "out"]
        flags += ["--weights", start, "--vae", vae]
        flags += ["--set", "first_chunk=1", "--set", "clip_frames=49", "--set", "export_every=1"]
        flags = [str(flag) for flag in flags]
        sizes = []

        def watched(model, noise, *rest, **more):
            if torch.is_tensor(noise):
                noise = noise.split(list(chunk_sizes(model.config, noise.shape[2])), 2)
            noise = list(noise)
            sizes.append([x.shape[2] for x in noise])
            return rollout(model, noise, *rest, **more)

        without_pictures = unittest.mock.patch.object(watch, "show", lambda run, stage: None)
        watching = unittest.mock.patch.object(td, "rollout", watched)
        with quiet() as (_, err), without_pictures, watching:
            for stage in "teacher", "causal", "distill":
                code = td.main(flags + ["--stage", stage, "--steps", "1"])
                assert code is None, err.getvalue()
        assert sizes, sizes
        assert all(size == [1, 3, 3, 3, 3] for size in sizes), sizes
        for name in "teacher", "causal", "student":
            assert (here / f"out/{name}.00001.safetensors").stat().st_size, "kept to choose from"
        student = MotionStream.from_pretrained(here / "out/student.safetensors")
        assert student.config.first_chunk == 1
        assert student.config.causal


# --------------------------------------------------------------------------------------------------
# A folder of clips by many processes.

def clip_words(here, data, *more):
    start = saved(here / "start.safetensors", new_model(causal=False))
    vae = saved(here / "encoder.safetensors", new_vae())
    words = [data, "--out", here / "clips", "--weights", start, "--vae", vae, *more]
    return [str(word) for word in words]


def test_shards_and_processes_make_every_clip_once():
    names = [f"{i:02}" for i in range(23)]
    for count, processes in (1, 1), (4, 1), (1, 8), (3, 2):
        made = []
        for number in range(1, count + 1):
            for rank in range(processes):
                with unittest.mock.patch.multiple(clips, PROCESSES=processes, RANK=rank):
                    made += clips.part_of(names, (number, count))
        assert sorted(made) == names, (count, processes)
    with folder() as here:
        words = clip_words(here, own_clips(here / "data", names=("a", "b", "c"), frames=45))
        for shard, made in ("2/2", ["b"]), ("1/2", ["a", "c"]):
            with quiet():
                files = clips.make_clips(clips.parse_job(words + ["--shard", shard]))
            assert [file.stem for file in files] == made
        for wrong in "0/2", "3/2", "2", "a/b":
            with quiet() as (_, err):
                assert clips.main(words + ["--shard", wrong]) == 2
            assert f"argument --shard: '{wrong}' is not like 2/8" in err.getvalue(), err.getvalue()


def test_texts_are_stored_without_their_padding():
    text = torch.zeros(512, 12)
    text[:7] = rand(7, 12)
    text[3] = 0                                         # not the end
    assert clips.without_padding(text).equal(text[:7])
    assert clips.without_padding(torch.zeros(512, 12)).shape == (0, 12)
    assert clips.without_padding(text[:7]).equal(text[:7])
    job = clips.Job(None, None, SMALL, 9, "cpu")
    video = torch.zeros(3, 9, 32, 48, dtype=torch.uint8)
    made = clips.encode_clip(job, None, {"video": video, "text": text})
    assert made["text"].equal(text[:7])


def test_latents_in_bfloat16_are_nearly_those_in_float32_and_another_file():
    vae = randomised(WanVAE(WAN21))
    video = wan_video(vae, 5)
    with torch.no_grad():
        exact = vae.encode(video)
        with torch.autocast("cpu", torch.bfloat16):
            rough = vae.encode(video)
    error = (rough.float() - exact).norm() / exact.norm()
    print(f"latents of a small random VAE under bfloat16 are {100 * error:.2f} % (relative L2) "
          "from float32's")
    assert 0 < error < 0.03, error
    with folder() as here:
        words = clip_words(here, own_clips(here / "data", names=("a",)))
        before = []
        for dtype in "float32", "bfloat16":
            with quiet():
                file, = clips.make_clips(clips.parse_job(words + ["--dtype", dtype]))
            before.append(load_file(file)["latents"].float().numpy())
        assert not np.array_equal(*before)
        assert abs(before[0] - before[1]).mean() < 0.05


# --------------------------------------------------------------------------------------------------
# The recipes of docs/training.md, with what they download replaced.

def run_recipe(word, *words):
    with quiet() as (out, _), unittest.mock.patch.object(sys, "argv", ["x", *map(str, words)]):
        exec(recipe("training.md", word), {})
    return out.getvalue()


class Tracker:
    """Stands for CoTracker."""
    calls = 0

    def to(self, device):
        return self

    def __call__(self, video, grid_size):
        Tracker.calls += 1
        assert video.shape[:3] == (1, 45, 3)
        assert video.dtype == torch.float32
        assert video.max() > 1
        frames, points = video.shape[1], grid_size ** 2
        place = torch.arange(points) % 40 + 4.0
        tracks = torch.stack([place, place], -1).expand(1, frames, points, 2)
        return tracks, torch.ones(1, frames, points, 1, dtype=torch.bool)


def test_the_recipe_for_tracks_is_shared_and_goes_on_where_it_stopped():
    with folder() as here, unittest.mock.patch.object(torch.hub, "load", lambda *_: Tracker()):
        data = own_clips(here / "data", names=("a", "b", "sub/c"))
        for file in data.rglob("*.npz"):
            file.unlink()
        (data / "d.mp4").write_text("no video")
        Tracker.calls = 0
        run_recipe("cotracker3_offline\").to", data, "2/2", 45)
        assert {file.name for file in data.rglob("*.npz")} == {"b.npz", "c.npz"}
        assert Tracker.calls == 2
        for _ in range(2):
            said = run_recipe("cotracker3_offline\").to", data, "1/1", 45)
        assert Tracker.calls == 3
        assert "left out: " in said
        assert "d.mp4" in said
        short = own_clips(here / "short", names=("e",))
        (short / "e.npz").unlink()
        said = run_recipe("cotracker3_offline\").to", short, "1/1", 46)
        assert "e.mp4: 45 frames" in said
        run_recipe("cotracker3_offline\").to", short, "1/1")
        assert np.load(short / "e.npz")["tracks"].shape == (45, 2500, 2), "all frames"
        words = clip_words(here, data)
        (data / "d.mp4").unlink()
        with quiet():
            files = clips.make_clips(clips.parse_job(words))
        assert len(files) == 3
        assert load_file(files[0])["tracks"].shape == (45, 2500, 2)


def test_the_recipe_for_a_public_set_makes_videos_of_its_latents():
    vae = randomised(WanVAE(WAN21))
    latents = vae.encode(wan_video(vae, 9)).detach()
    mean, std = vae.statistics(latents)
    raw = (latents * std + mean)[0].numpy()
    row = {
        "vae_latent_bytes": raw.tobytes(),
        "vae_latent_shape": list(raw.shape),
        "vae_latent_dtype": "float32",
        "caption": "a cat",
    }
    batch = SimpleNamespace(to_pylist=lambda: [row])

    def parquet_file(path):
        return SimpleNamespace(iter_batches=lambda size, columns: [batch, batch])

    parquet = SimpleNamespace(ParquetFile=parquet_file)
    stubs = {"pyarrow": SimpleNamespace(parquet=parquet), "pyarrow.parquet": parquet}
    with folder() as here:
        for name in "p0/data", "p1/data":
            (here / "syn" / name).parent.mkdir(parents=True)
            (here / "syn" / f"{name}.parquet").write_text("")
        torch.save(vae.state_dict(), here / "vae.pth")
        before = {name: sys.modules.get(name) for name in stubs}
        sys.modules.update(stubs)
        try:
            run_recipe("vae_latent_bytes", here / "syn", here / "out", here / "vae.pth", "2/2")
        finally:
            for name in stubs:
                del sys.modules[name]
                if before[name]:
                    sys.modules[name] = before[name]
        names = sorted(file.name for file in (here / "out").iterdir())
        assert names == ["p1-data-0000.mp4", "p1-data-0000.txt",
                         "p1-data-0001.mp4", "p1-data-0001.txt"]
        frames = np.stack(list(open_video(here / "out/p1-data-0000.mp4").frames))
        with torch.no_grad():
            expected = sample.to_frames(vae.decode(latents)[0])
        assert frames.shape == expected.shape == (9, 16, 24, 3)
        assert abs(frames.astype(float) - expected).mean() < 20, "H.264 loses some"
