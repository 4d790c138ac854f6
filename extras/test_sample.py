"""sample.py: what a user types."""

import contextlib
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from extras.recording import checksum as recording_checksum
from extras.testing import (COPYING, HERE, SMALL, STUB, assert_error, assert_near, clip_of, command, folder,
                            new_model, new_tracks, quiet, rand, randomised, sampled, saved,
                            settled, wan_sampled, wan_workplace, workplace)
from motionstream import (MotionStream, copy_along_tracks, euler, guided_velocity, image_and_mask,
                          image_inputs, joint_guidance, start_points, track_features, track_ids)
from sample import count_frames
from vae import LinearVAE, LinearVAEConfig, TinyVAE, WanVAE, WanVAEConfig, load_vae

# ----------------------------------------------------------------------------------------------------------------------
# sample.py: what a user types.

def test_sample_writes_a_video_of_the_tracks_length():
    _, here = workplace()
    rich = "--frames 20 --overlay --memory c2s0w99 --steps 1 --prompt fading --set shift=3"
    teacher = f"--sampler teacher --weights {here / 'teacher.safetensors'} --guidance 2,1"
    np.savez(here / "ids.npz", tracks=np.load(here / "tracks.npy"), ids=np.arange(3))
    for flags, frames in ("", 14), ("--frames 1", 1), (rich, 20), (teacher, 14), (f"--tracks {here / 'ids.npz'}", 14):
        code, out, err = sampled(*command(*flags.split()))
        assert code == 0 and out.splitlines()[-1] == str(here / "out.mp4"), (flags, out, err)
        video = imageio.mimread(here / "out.mp4", memtest=False)
        assert len(video) == frames and min(video[0].shape[:2]) >= 256, (len(video), video[0].shape)
        assert ("ids are not used" in out) == ("ids" in flags)  # SMALL's are the start points
        (here / "out.mp4").unlink()
    assert not list(here.glob(".*")), "temporary files are left"


def test_sampled_frames_depend_on_seed_tracks_and_memory_and_on_nothing_else():
    _, here = workplace()
    vae, motion = TinyVAE.from_pretrained(here / "vae.safetensors"), sample.Motion(*new_tracks(41, 3, batch=1))
    moved = replace(motion, tracks=motion.tracks + (torch.arange(41) > 8)[:, None, None] * 8.0)

    def frames(motion=motion, seed=0, **memory):
        model = MotionStream.from_pretrained(here / "student.safetensors", dtype=torch.float32, **memory)
        videos = sample.stream(model, vae, rand(1, 3, 32, 48).clamp(-1, 1), motion, seed=seed)
        return np.concatenate(list(map(sample.to_frames, videos)))[:41]

    base = frames()
    assert base.shape == (41, 32, 48, 3) and (frames() == base).all()
    assert (frames(moved)[:9] == base[:9]).all() and (frames(moved)[9:21] != base[9:21]).any()
    assert (frames(seed=1) != base).any() and (frames(sink=0) != base).any() and (frames(window=None) != base).any()


def test_the_stream_hands_the_track_head_the_whole_motion():
    model, motion = new_model(), sample.Motion(*new_tracks(28, 5))
    parts = [part["tracks"] for part in sample.conditions(model, None, rand(2, 3, 32, 48), motion, sample.Encoded())]
    assert len(parts) == 3
    rest = 33 - 28                                              # 3 chunks of 3 latents are 33 frames
    tracks, visible = F.pad(motion.tracks, (0, 0, 0, 0, 0, rest)), F.pad(motion.visible, (0, 0, 0, rest))
    assert_near(torch.cat(parts, 2), track_features(model, tracks, visible, motion.ids), 1e-6)


def test_the_image_enters_as_clean_latent_frame_0_or_as_channels():
    first, motion = clip_of(3)[2][:1], sample.Motion(*new_tracks(21, 3, batch=1))
    vae = SimpleNamespace(encode=lambda video: first, decode=lambda latents, state: (latents, state))
    for in_dim, as_channels in (12, False), (16, True):         # 4 noisy, 8 tracks, 4 image
        for sampler in "stream", "teacher":
            model, seen = new_model(in_dim=in_dim, clean_first=not as_channels, guidance=(0, 0)), []
            model.register_forward_hook(lambda _, args, given, out: seen.append((*args, given.get("image"))),
                                        with_kwargs=True)
            make = sample.stream if sampler == "stream" else sample.sample_teacher
            chunks = make(model, vae, rand(1, 3, 32, 48), motion)
            assert [part.shape[2] for part in itertools.islice(chunks, 2)] == [3, 3]
            x, sigma, image = seen[0]
            assert x[:, :, :1].equal(first) != as_channels and sigma[0, 0] == (1 if as_channels else 0)
            assert (image is not None) == as_channels
            assert image is None or image[:, :, :1].equal(first) and image[:, :, 1:].count_nonzero() == 0
            assert seen[-1][-1] is None or sampler == "teacher"  # later chunks have it in their sink


def test_the_image_and_its_tracks_are_cropped_alike():
    c, axes = replace(SMALL, size=(64, 96)), (torch.arange(96) + 0.5, (torch.arange(64) + 0.5)[:, None])
    for width, height in (200, 100), (100, 200), (30, 31), (96, 64):
        spot, corner = (width * 0.58, height * 0.42), (1, 1)
        y, x = np.mgrid[:height, :width] + 0.5
        pixels = 255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (width / 20) ** 2)
        weight = sample.fit_image(Image.fromarray(pixels.astype(np.uint8)).convert("RGB"), c.size)[0, :1] + 1
        with quiet():
            tracks = np.tile(np.float32([spot, corner]), (5, 1, 1))
            given = sample.Tracks(tracks, np.ones((5, 2), bool))
            motion, _ = sample.fit_tracks(given, (width, height), 5, c, 0)
        found = torch.stack([(weight * axis).sum() / weight.sum() for axis in axes])
        assert (found - motion.tracks[0, 0, 0]).norm() < 0.7, (width, height, found, motion.tracks[0, 0, 0])
        assert motion.visible[0, 0].tolist() == [True, (width, height) == (96, 64)]       # else the corner is cut off


def test_ids_of_a_file_are_used_if_they_are_of_the_kind_that_the_weights_know():
    points, seen = np.tile(np.float32([[9, 8], [24, 16]]), (5, 1, 1)), np.ones((5, 2), bool)
    starts = [(8 << 16) + 9, (16 << 16) + 24]
    for mode, own, expected in (("random", "random", [7, 3]), ("start", "random", starts), ("start", "start", [7, 3])):
        given = sample.Tracks(points, seen, np.array([7, 3]), own)
        motion, notes = sample.fit_tracks(given, (48, 32), 5, replace(SMALL, track_id_mode=mode), 0)
        assert motion.ids.tolist() == [expected], (mode, own)
        assert any("not used" in note for note in notes) == (mode != own)


def test_tracks_are_cut_to_whole_chunks_and_say_nothing_after_their_end():
    given = sample.Tracks(np.full((12, 2, 2), 9, np.float32), np.ones((12, 2), bool))
    for frames, whole, seen, note in (3, 9, 9, False), (9, 9, 9, False), (10, 21, 12, False), (15, 21, 12, True):
        motion, notes = sample.fit_tracks(given, (48, 32), frames, SMALL, 0)
        assert motion.tracks.shape == (1, whole, 2, 2) and motion.visible.sum() == 2 * seen
        assert any("the last 3 are not specified" in text for text in notes) == note


def test_tracks_of_another_size_are_scaled_to_the_image_and_nan_is_hidden():
    points = rand(5, 2, 2).numpy() * 9 + 20
    points[3, 1] = np.nan
    with folder() as here:
        np.savez(here / "t.npz", tracks=points, width=96, height=40, fps=8, format="motionstream")
        given = sample.read_tracks(here / "t.npz", (48, 40))
    expected = np.float32(points[:3] * (0.5, 1))
    assert abs(given.tracks[:3] - expected).max() < 1e-5 and given.tracks.dtype == np.float32 and given.fps == 8
    assert np.argwhere(~given.visible).tolist() == [[3, 1]] and np.isfinite(given.tracks).all() and given.ids is None


def test_live_motion_is_what_a_whole_clip_has_in_each_chunk():
    points = rand(33, 3, 2).abs() * 9 + 3
    points[12:20, 1] = math.nan
    for mode in "random", "start":
        config = replace(SMALL, track_id_mode=mode)
        parts = [sample.live_motion(part, points[0], config) for part in points.split([9, 12, 12])]
        assert torch.cat([part.tracks for part in parts], 1).nan_to_num(0).equal(points[None].nan_to_num(0))
        assert torch.cat([part.visible for part in parts], 1).equal(~points[None, ..., 0].isnan())
        assert all(part.ids.equal(parts[0].ids) for part in parts) and len({*parts[0].ids[0].tolist()}) == 3
        assert all(part.start.equal(points[None, 0]) for part in parts)
        if mode != "random":
            assert parts[0].ids.equal(track_ids(points[None], parts[0].visible, config))


def test_copying_models_copy_in_every_path():
    vae = randomised(LinearVAE(LinearVAEConfig(latent_channels=4)))
    image, motion = rand(1, 3, 32, 48).clamp(-1, 1), sample.Motion(*new_tracks(45, 3, batch=1))
    motion = replace(motion, start=start_points(motion.tracks, motion.visible))
    copies = copy_along_tracks(vae, image, motion.tracks, motion.visible, motion.start)
    for causal in True, False:
        model, seen = new_model(**vars(replace(COPYING, causal=causal, steps=1, guidance=(0, 0)))), []
        model.register_forward_hook(lambda _, args, given, out: seen.append(given), with_kwargs=True)
        make = sample.stream if causal else sample.sample_teacher
        videos = torch.cat([*make(model, vae, image, motion)], 2)
        assert videos.shape == (1, 3, 45, 32, 48)
        steps = len(COPYING.sigmas) + 1 if causal else 1
        assert_near(torch.cat([given["copies"] for given in seen[::steps]], 2), copies, 1e-5)
        assert all(given["image"] is not None for given in seen), "the still image is in every chunk"


def recording(here, mode):
    """A recording by hand, at chunk 1: (name of its files, the motion and prompt of each chunk)."""
    weights = saved(here / f"{mode}.safetensors", new_model(track_id_mode=mode))
    model = MotionStream.from_pretrained(weights, dtype=torch.float32, chunk=1, sink=2, window=2)
    image = Image.fromarray((rand(50, 60, 3, seed=5).numpy() * 60 + 128).clip(0, 255).astype(np.uint8))
    image.save(here / "recorded.png")
    paths = np.float32(rand(13, 2, 2).numpy() * 5 + 25)
    paths[:5, 1] = np.nan                                       # comes late
    visible = ~np.isnan(paths[..., 0])
    ids = np.array([3 << 16, (7 << 16) + 5])
    prompts = ["", "fading light", "fading light", "red"]
    pixels = sample.fit_image(image, SMALL.size)
    vae = load_vae(workplace()[1] / "vae.safetensors")
    motion, _ = sample.fit_tracks(sample.Tracks(np.nan_to_num(paths), visible, ids, mode), image.size, 13, model.config, 0)
    parts = sample.motion_by_chunk(motion, 1)
    given = [replace(part, text=sample.embed_words(prompt, SMALL)) for part, prompt in zip(parts, prompts)]
    frames = np.concatenate([*map(sample.to_frames, sample.stream(model, vae, pixels, iter(given), seed=7))])
    weights = recording_checksum(sample.Models(model, vae, sample.Encoded()))
    arrays = {"tracks": paths, "visibility": visible, "ids": ids, "track_id_mode": mode, "prompts": prompts, "seed": 7,
              "chunk": 1, "sink": 2, "window": 2, "steps": len(SMALL.sigmas), "fps": 12, "dtype": "float32",
              "frames": 11, "weights": weights, "width": 60, "height": 50, "format": "motionstream"}
    np.savez(here / "recorded.npz", **arrays)
    return frames[:11], arrays


def test_a_recording_plays_to_the_same_frames_unless_flags_say_otherwise():
    made, fps = [], []
    video_file = sample.video_file

    @contextlib.contextmanager
    def spied(path, rate):
        fps.append(rate)
        with video_file(path, rate) as append:
            yield lambda frame: (made.append(frame[::8, ::8]), append(frame))

    with folder() as here, unittest.mock.patch.object(sample, "video_file", spied):
        for mode in "random", "start":
            frames, arrays = recording(here, mode)
            words = ["--image", here / "recorded.png", "--tracks", here / "recorded.npz", "--vae",
                     workplace()[1] / "vae.safetensors", "--out", here / "x.mp4", "--weights"]
            for more in (), ("--prompt", "red"), ("--seed", 1), ("--memory", "c1s1w1"):
                made.clear()
                code, out, err = sampled(*words, here / f"{mode}.safetensors", *more)
                assert code == 0 and "other weights" not in out and len(made) == 11 and fps[-1] == 12, (out, err)
                assert np.array_equal(np.stack(made), frames) == (not more), (mode, more)
                if mode == "start":
                    break                                       # what flags do has been seen
        code, out, _ = sampled(*words, workplace()[1] / "student.safetensors", "--frames", 1)
        assert code == 0 and "recorded with other weights" in out
        for name, value in ("chunk", 0), ("frames", None), ("seed", "x"), ("dtype", "int8"), ("prompts", []), ("weights", None):
            damaged = arrays | {name: value}
            if value is None:
                damaged.pop(name)
            np.savez(here / "recorded.npz", **damaged)
            code, _, err = sampled(*words, here / "start.safetensors")
            assert code == 2 and "recorded.npz: damaged" in err, (name, err)


def test_a_copy_without_extras_samples():
    with folder() as here:
        for name in "motionstream.py", "vae.py", "sample.py":
            shutil.copy(HERE / name, here)
        shutil.copytree(HERE / "assets", here / "assets")
        command = [sys.executable, "sample.py", "--image", "assets/drag.png", "--tracks", "assets/drag.npz", "--frames", "9"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("\nout.mp4\n"), done.stderr
        assert count_frames(here / "out.mp4") == 9


def test_guidance_flags_reach_the_teacher():
    _, here = workplace()
    videos = []
    for flags in "", "--guidance 1,1.5", "--guidance 9,1.5", "--guidance 1,9":             # the first two are the same
        teacher = "--sampler", "teacher", "--weights", here / "teacher.safetensors"
        assert sampled(*command(*teacher, *flags.split()))[0] == 0
        videos.append(np.stack(imageio.mimread(here / "out.mp4", memtest=False)))
        (here / "out.mp4").unlink()
    assert [np.array_equal(videos[0], video) for video in videos] == [True, True, False, False]


def test_images_of_every_mode_come_out_right():
    rgb, turned = np.zeros((20, 30, 3), np.uint8), Image.Exif()
    rgb[:, :15], rgb[:, 15:], turned[0x0112] = (200, 40, 80), (0, 250, 10), 6              # 6: turn it clockwise
    grey, clear = np.full((20, 30), 51, np.uint8), np.dstack([rgb, rgb[..., 0] * 0])
    with folder() as here:
        for name, image, exif, expected in (
                ("rgb", Image.fromarray(rgb), None, rgb), ("palette", Image.fromarray(rgb).quantize(4), None, rgb),
                ("grey", Image.fromarray(grey), None, rgb * 0 + 51),
                ("alpha", Image.fromarray(clear), None, rgb * 0 + 255),
                ("16 bits", Image.fromarray(grey.astype(np.uint16) * 257), None, rgb * 0 + 51),
                ("EXIF", Image.fromarray(rgb), turned, np.rot90(rgb, -1))):
            image.save(here / f"{name}.png", exif=exif)
            read = sample.load_image(here / f"{name}.png")
            assert read.mode == "RGB" and np.array_equal(np.asarray(read), expected), name


def bad_inputs(here):
    """Name -> flags that must be refused. Files are written here."""
    good = np.load(here / "tracks.npy")
    seen = np.ones(good.shape[:2], bool)

    def own(name, **arrays):
        np.savez(here / f"{name}.npz", **{"tracks": good, "format": "motionstream"} | arrays)
        return "--tracks", here / f"{name}.npz"

    def raw(flag, name, data):
        (here / name).write_bytes(data)
        return flag, here / name

    def change(value):
        array = good.copy()
        array[3, 1, 0] = value
        return array

    student, vae, png = ((here / name).read_bytes() for name in ("student.safetensors", "vae.safetensors", "image.png"))
    whole = own("whole", visibility=seen)[1].read_bytes()
    cases = {
        "no image": ("--image", here / "none.png"),
        "a folder as image": ("--image", here),
        "text as image": raw("--image", "text.png", b"hello"),
        "half an image": raw("--image", "half.png", png[:len(png) // 2]),
        "no tracks file": ("--tracks", here / "none.npy"),
        "half an npz": raw("--tracks", "half.npz", whole[:300]),
        "a damaged npz": raw("--tracks", "damaged.npz", whole.replace(b"tracks.npy", b"tracks.xyz", 1)),
        "1-d tracks": own("1d", tracks=good[:, 0, 0]),
        "3-d points": own("3d", tracks=np.zeros((14, 3, 3), np.float32)),
        "no frames in it": own("short", tracks=good[:0]),
        "letters for a width": own("letters", width="ten", height=10),
        "text in tracks": own("text", tracks=good.astype(str)),
        "objects": own("object", tracks=good.astype(object)),
        "visible NaN": own("nan", tracks=change(np.nan), visibility=seen),
        "visible inf": own("inf", tracks=change(np.inf)),
        "visibility turned": own("turned", visibility=seen.T),
        "seven ids": own("ids", ids=np.arange(7)),
        "an id of 33 bits": own("large", ids=np.array([0, 1, 2 ** 32])),
        "an id below 0": own("below", ids=np.array([0, 1, -1])),
        "no width": own("width", width=0, height=10),
        "a recording of nothing": own("recording", prompts=["a"]),
        "no weights": ("--weights", here / "none.safetensors"),
        "half the weights": raw("--weights", "half.safetensors", student[:-64]),
        "weights with a hole": ("--weights", saved(here / "less.safetensors", new_model(), lambda t: t.popitem())),
        "the vae as weights": ("--weights", here / "vae.safetensors"),
        "the teacher as student": ("--weights", here / "teacher.safetensors", "--sampler", "stream"),
        "the weights as vae": ("--vae", here / "student.safetensors"),
        "half the vae": raw("--vae", "cut.safetensors", vae[:-64]),
        "no folder": ("--out", here / "no" / "out.mp4"),
        "a folder as output": ("--out", here),
        "over the input": ("--out", here / "image.png"),
    }
    flags = ("--frames 0", "--frames 1.5", "--seed -1", "--steps 0", "--memory c0s1w1", "--memory c3s1w", "--memory c3",
             "--fps inf", "--guidance 1,1", "--guidance 1", "--guidance x,y", "--guidance nan,1", "--set shift=0",
             "--set shift", "--set dim=9", "--dtype float8", "--device abacus", "--sampler magic", "--out out.avi",
             "--colour red", "--drag 1,2", "--drag 1,2->3,4", "--grid 3x3", "--negative-prompt red")
    return cases | {flag: flag.split() for flag in flags}


def test_bad_input_ends_in_one_line_and_exit_code_2():
    _, here = workplace()
    cases, wrong = bad_inputs(here), []
    before = sorted(here.iterdir())
    for name, flags in cases.items():
        code, _, err = sampled(*command(*flags))
        if code != 2 or not re.fullmatch(r"error: [^\n]+\n", err) or sorted(here.iterdir()) != before:
            wrong.append(f"{name}: code {code}, {err!r}, files {sorted(set(here.iterdir()) - set(before))}")
    assert len(cases) > 50 and not wrong, "\n".join(wrong)


def test_a_video_is_there_whole_or_not_at_all():
    frame = np.zeros((256, 256, 3), np.uint8)

    def fail(count, broken):
        with unittest.mock.patch("sample.count_frames", count), sample.video_file(here / "out.mp4", 16) as append:
            for _ in range(3):
                append(frame)
            assert not broken

    with folder() as here:
        damaged = "out.mp4: cannot be written after 3 frames (not all frames can be read back)"
        assert_error(sample.UserError, damaged, fail, lambda path: 2, False)
        assert_error(AssertionError, "", fail, lambda path: 3, True)
        assert not list(here.iterdir())
        fail(count_frames, False)
        assert [file.name for file in here.iterdir()] == ["out.mp4"] and count_frames(here / "out.mp4") == 3
        whole = (here / "out.mp4").read_bytes()
        for damaged in b"", b"no video", whole[:-40], whole[:400]:
            (here / "out.mp4").write_bytes(damaged)
            assert count_frames(here / "out.mp4") < 3, len(damaged)


def test_a_picture_keeps_the_last_frame():
    with folder() as here:
        with sample.picture_file(here / "x.png") as append:
            for value in 1, 2, 3:
                append(np.full((4, 6, 3), value, np.uint8))
        assert (np.asarray(Image.open(here / "x.png")) == 3).all() and len(list(here.iterdir())) == 1


def test_a_reader_that_has_gone_is_no_error():
    _, here = workplace()
    with folder() as mine:
        words = [sys.executable, HERE / "sample.py", *command("--out", mine / "x.mp4", "--frames", 9)]
        line = " ".join(shlex.quote(str(word)) for word in words)
        programs = []
        for unbuffered, lines in ("", 0), ("1", 1):
            programs.append(subprocess.Popen(
                ["bash", "-c", f"{line} | head -{lines}; echo ${{PIPESTATUS[0]}}"], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}))
        for program in programs:
            out, err = program.communicate()
            assert re.fullmatch(r"(student[^\n]+\n)?141\n", out) and not err, (out, err)


# ----------------------------------------------------------------------------------------------------------------------
# sample.py with public weights: how they are sampled, and what they are told.

def test_each_family_takes_the_image_in_its_own_way():
    first, clip = rand(1, 16, 1, 2, 3), rand(1, 16, 4, 2, 3)
    wide, wide_clip = rand(1, 48, 1, 2, 3), rand(1, 48, 4, 2, 3)
    with_image, with_mask = F.pad(first, (0, 0, 0, 0, 0, 3)), image_and_mask(clip)
    for fields, given, channels, clean in (
            ({"in_dim": 16}, first, None, first), ({"in_dim": 32, "track_dim": 16}, first, None, first),
            ({"in_dim": 48, "track_dim": 16}, first, with_image, None), ({"in_dim": 36}, clip, with_mask, None),
            ({"in_dim": 48, "out_dim": 48}, wide, None, wide),
            ({"in_dim": 148, "out_dim": 48, "track_dim": 48}, wide_clip, image_and_mask(wide_clip),
             wide_clip[:, :, :1])):
        found = image_inputs(replace(STUB, clean_first=clean is not None, **fields), given, 4)
        for value, expected in zip(found, (channels, clean)):
            assert (value is None) == (expected is None) and (value is None or value.equal(expected)), fields
    assert any("never learned" in note for note in settled("t2v.safetensors").notes)
    assert not any("never learned" in note for note in settled("i2v.safetensors").notes)


def test_weights_with_a_mask_see_the_image_and_then_grey():
    seen = []
    encode = TinyVAE.encode
    with unittest.mock.patch.object(TinyVAE, "encode", lambda vae, video: seen.append(video) or encode(vae, video)):
        code, _, err, calls = wan_sampled("i2v.safetensors", "--frames", 10, "--steps", 1)
    assert code == 0, err
    video, = seen
    assert video.shape[2] == 21 and video[:, :, 0].std() > 0 and video[:, :, 1:].count_nonzero() == 0
    image = calls[0].image
    assert image.shape[1:3] == (20, 6) and image[:, :4, 0].eq(1).all() and image[:, :4, 1:].eq(0).all()


def test_the_vae_beside_the_weights_is_theirs():
    _, here = wan_workplace()
    with folder() as repository:
        save_file(load_file(here / "t2v.safetensors"), repository / "diffusion_pytorch_model.safetensors")
        torch.save(randomised(WanVAE(WanVAEConfig(16, 8, 8))).state_dict(), repository / "Wan2.1_VAE.pth")
        assert isinstance(sample.open_vae(sample.inspect(repository)), WanVAE)
    assert_error(sample.UserError, "give --vae PATH", sample.open_vae, sample.inspect(here / "fun.safetensors"))
    assert isinstance(sample.open_vae(sample.inspect(here / "t2v.safetensors"), here / "vae.safetensors"), TinyVAE)


def test_tracks_go_to_a_trained_head_or_are_drawn():
    tracks = "--tracks", "t.npy"
    for weights, drawn in ("fun", True), ("headed", False):
        job = settled(f"{weights}.safetensors", *tracks)
        assert job.drawn == drawn == any("drawn as a control video" in note for note in job.notes)
    for weights, cure, flags in (("t2v", "drop --tracks", tracks), ("t2v", "drop --tracks", ("--guidance", "0,1")),
                                 ("headless", "no trained track head, and its input for tracks has 8", tracks)):
        assert_error(sample.UserError, cure, settled, f"{weights}.safetensors", *flags)


def test_guidance_leads_away_from_the_null_text():
    model = new_model(causal=False)
    noise, given, _ = clip_of(3)
    sigma, null, count = torch.full((2,), 0.7), rand(1, 3, 12, seed=9), []
    model.register_forward_hook(lambda _, args, out: count.append(len(args[0])))
    full, notext, nomotion = (model(noise, sigma, text, tracks=tracks) for text, tracks in (
        (given["text"], given["tracks"]), (null.expand(2, -1, -1), given["tracks"]), (given["text"], None)))
    for w_text, w_motion, batch in (3.0, 1.5, 6), (5.0, 0.0, 4):
        count.clear()
        v = guided_velocity(model, noise, sigma, given, (w_text, w_motion), null)
        assert_near(v, joint_guidance(full, notext, nomotion, w_text, w_motion), 1e-5)
        assert count == [batch], "without a weight, the motion's evaluation is left out"
    model.config = replace(model.config, steps=1, guidance=(5.0, 0.0))
    (x, level), *_ = euler(model, noise, given, None, null)
    assert x.equal(noise) and level == 1
    *_, (x0, _) = euler(model, noise, given, None, null)
    assert_near(x0, noise - guided_velocity(model, noise, torch.ones(2), given, (5.0, 0.0), null), 1e-5)
