"""sample.py: what a user types."""

import contextlib
import itertools
import math
import os
import re
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
from extras.refusals import on_tracks
from extras.testing import (COPYING, HERE, SMALL, STUB, WAN22, assert_error, assert_near, clip_of,
                            command, folder, linear_vae, new_model, new_tracks, new_vae, quiet,
                            rand, randomised, sampled, saved, settled, wan_sampled, wan_workplace,
                            workplace)
from extras.video import count_frames
from motionstream import (MotionStream, chunk_sizes, copy_along_tracks, euler, guided_velocity,
                          image_and_mask, image_inputs, joint_guidance, start_points,
                          track_features)
from vae import LinearVAE, LinearVAEConfig, TinyVAE, WanVAE, WanVAEConfig, load_vae

patch = unittest.mock.patch


# --------------------------------------------------------------------------------------------------
# The command.

def run_with(flags):
    """Exit code, stdout and stderr of sample.py with the flags of a good call, then these."""
    return sampled(*command(*flags))


def test_sample_writes_a_video_of_the_tracks_length():
    _, here = workplace()
    points = np.load(here / "tracks.npy")
    np.savez(here / "ids.npz", tracks=points, ids=np.arange(3))
    out = here / "out.mp4"
    for flags, frames in (
        ("--frames 1", 1),
        ("--frames 20 --overlay --memory c2s0w99 --steps 1 --prompt fading --set shift=3", 20),
        (f"--sampler teacher --weights {here}/teacher.safetensors --guidance 2,1", 14),
        (f"--tracks {here}/ids.npz", 14),
    ):
        code, said, err = run_with(flags.split())
        assert code == 0, (flags, err)
        assert said.splitlines()[-1] == str(out)
        video = imageio.mimread(out, memtest=False)
        assert len(video) == frames
        assert min(video[0].shape[:2]) >= 256
        assert ("ids are not used" in said) == ("ids" in flags)     # SMALL's are all the same
        out.unlink()
    assert not list(here.glob(".*")), "temporary files are left"


# Samples in a copy without extras, and refuses what needs them, and what is missing. torch is
# loaded once.
IN_A_COPY = """
import numpy, sample
image = "--image assets/drag.png --frames 9".split()
assert sample.main(image + ["--tracks", "assets/drag.npz"]) == 0
numpy.save("t.npy", numpy.zeros((9, 1, 2)))
for tracks in ["--tracks", "t.npy"], ["--pin", "9,9"], ["--tracks", "assets/drag.npz", "--overlay"]:
    assert sample.main(image + ["--out", "no.mp4"] + tracks) == 2
for flags in ["--image", "none.png"], ["--weights", "none.safetensors"], ["--device", "abacus"]:
    assert sample.main(image + flags) == 2
"""

# Two times nobody reads what it prints, which is noticed by the first line or, if that is kept
# back, at the end.
UNREAD = """
import os, sys, sample
flags = sys.argv[1:]
reader, writer = os.pipe()
os.close(reader)
for unbuffered in True, False:
    if os.fork() == 0:
        os.dup2(writer, 1)
        sys.stdout.reconfigure(write_through=unbuffered)
        code = sample.main(flags)
        sys.stdout.flush()                      # as Python does at its end, which takes a second
        os._exit(code)
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_copy_without_extras_samples():
    with folder() as here:
        for name in "motionstream.py", "vae.py", "sample.py":
            shutil.copy(HERE / name, here)
        shutil.copytree(HERE / "assets", here / "assets")
        done = subprocess.run([sys.executable, "-c", IN_A_COPY], cwd=here, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\nout.mp4\n"), done.stdout
        refused = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(refused) == 6, done.stderr
        for line in refused[:3]:
            assert line.endswith("extras/tracks.py, which is missing from this copy"), line
        for line, name in zip(refused[3:], ("none.png", "none.safetensors", "abacus")):
            assert name in line, line
        assert count_frames(here / "out.mp4") == 9
        assert not list(here.glob(".*")), "temporary files are left"


def test_a_reader_that_has_gone_is_no_error():
    words = command("--frames", 1, "--steps", 1, "--out", workplace()[1] / "out.png")
    alone = os.environ | {"OMP_NUM_THREADS": "1"}       # a fork of OpenMP's threads would hang
    done = subprocess.run([sys.executable, "-c", UNREAD] + [str(word) for word in words], cwd=HERE,
                          env=alone, capture_output=True, text=True, timeout=300)
    (workplace()[1] / "out.png").unlink()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "141\n141\n", done.stdout
    assert "Error" not in done.stderr, done.stderr


def last_picture(flags):
    """The last frame that sample.py makes of five."""
    _, here = workplace()
    path = here / "last.png"
    code, _, err = run_with(flags + ["--frames", 5, "--out", path])
    assert code == 0, err
    picture = np.asarray(Image.open(path))
    path.unlink()
    return picture


def test_guidance_flags_reach_the_teacher():
    _, here = workplace()
    teacher = ["--sampler", "teacher", "--weights", here / "teacher.safetensors"]
    usual = last_picture(teacher)
    for weights, same in ("1,1.5", True), ("9,1.5", False), ("1,9", False):     # the first: SMALL's
        picture = last_picture(teacher + ["--guidance", weights])
        assert np.array_equal(picture, usual) == same, weights


def write_image_files(here):
    """Yields (a file in one of the modes that pictures come in, its pixels as RGB)."""
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[:, :15] = (200, 40, 80)
    rgb[:, 15:] = (0, 250, 10)
    turned = Image.Exif()
    turned[0x0112] = 6                                      # turn it clockwise
    grey = np.full((20, 30), 51, np.uint8)
    clear = np.dstack([rgb, np.zeros((20, 30), np.uint8)])
    whole = Image.fromarray(rgb)
    for name, image, exif, expected in (
        ("rgb", whole, None, rgb),
        ("palette", whole.quantize(4), None, rgb),
        ("grey", Image.fromarray(grey), None, np.full_like(rgb, 51)),
        ("alpha", Image.fromarray(clear), None, np.full_like(rgb, 255)),
        ("16 bits", Image.fromarray(grey.astype(np.uint16) * 257), None, np.full_like(rgb, 51)),
        ("EXIF", whole, turned, np.rot90(rgb, -1)),
    ):
        image.save(here / f"{name}.png", exif=exif)
        yield here / f"{name}.png", expected


def test_images_of_every_mode_come_out_right():
    with folder() as here:
        for path, expected in write_image_files(here):
            read = sample.load_image(path)
            assert read.mode == "RGB"
            assert np.array_equal(np.asarray(read), expected), path.name


def test_a_picture_of_more_than_16_bits_is_refused():
    with folder() as here:
        Image.fromarray(np.full((20, 30), 2 ** 20, np.int32)).save(here / "deep.tif")
        message = "more than 16 bits"
        assert_error(sample.UserError, message, sample.load_image, here / "deep.tif")


def failing_video(here, read_back):
    """Write three frames, of which `read_back` frames can be read again."""
    frame = np.zeros((256, 256, 3), np.uint8)
    with patch("extras.video.count_frames", lambda path: read_back), \
            sample.video_file(here / "out.mp4", 16) as append:
        for _ in range(3):
            append(frame)
        if read_back == 3:
            raise ValueError("something else goes wrong")


def test_a_video_is_there_whole_or_not_at_all():
    with folder() as here:
        damaged = "out.mp4: cannot be written after 3 frames (not all frames can be read back; "
        assert_error(sample.UserError, damaged, failing_video, here, 2)
        assert_error(ValueError, "something else", failing_video, here, 3)
        assert not list(here.iterdir())


def test_ffmpeg_has_ended_before_the_file_of_a_failed_video_is_removed():
    """Else it complains of that on the console, and Windows removes no file that is open."""
    writers = []

    def open_writer(*args, **kwargs):
        writers.append(imageio.get_writer(*args, **kwargs))
        return writers[0]

    with folder() as here, patch("extras.video.imageio", SimpleNamespace(get_writer=open_writer)):
        assert_error(ValueError, "something else", failing_video, here, 3)
        assert writers[0].closed


def test_frames_that_a_damaged_video_lacks_are_not_counted():
    with folder() as here:
        path = here / "out.mp4"
        with sample.video_file(path, 16) as append:
            for _ in range(3):
                append(np.zeros((256, 256, 3), np.uint8))
        assert list(here.iterdir()) == [path]
        assert count_frames(path) == 3
        whole = path.read_bytes()
        for damaged in b"", b"no video", whole[:-40], whole[:400]:
            path.write_bytes(damaged)
            assert count_frames(path) < 3, len(damaged)


def test_a_picture_keeps_the_last_frame():
    with folder() as here:
        with sample.picture_file(here / "x.png") as append:
            for value in 1, 2, 3:
                append(np.full((4, 6, 3), value, np.uint8))
        assert (np.asarray(Image.open(here / "x.png")) == 3).all()
        assert len(list(here.iterdir())) == 1


# --------------------------------------------------------------------------------------------------
# Bad input.

BAD_FLAGS = [
    "--frames 0", "--frames 1.5", "--seed -1", "--steps 0", "--memory c0s1w1", "--memory c3s1w",
    "--memory c3", "--fps inf", "--guidance 1,1", "--guidance 1", "--guidance x,y",
    "--guidance nan,1", "--set shift=0", "--set shift", "--set dim=9", "--dtype float8",
    "--device abacus", "--sampler magic", "--out out.avi", "--colour red", "--drag 1,2",
    "--drag 1,2->3,4", "--grid 3x3", "--negative-prompt red"]


def bad_tracks(good):
    """{name: arrays of an .npz of tracks that must be refused}. good: tracks (14, 3, 2)."""
    seen = np.ones((14, 3), bool)
    nan = good.copy()
    nan[3, 1, 0] = np.nan
    inf = good.copy()
    inf[3, 1, 0] = np.inf
    return {
        "1-d tracks": {"tracks": good[:, 0, 0]},
        "3-d points": {"tracks": np.zeros((14, 3, 3), np.float32)},
        "no frames in it": {"tracks": good[:0]},
        "letters for a width": {"width": "ten", "height": 10},
        "text in tracks": {"tracks": good.astype(str)},
        "objects": {"tracks": good.astype(object)},
        "visible NaN": {"tracks": nan, "visibility": seen},
        "visible inf": {"tracks": inf},
        "visibility turned": {"visibility": seen.T},
        "seven ids": {"ids": np.arange(7)},
        "an id of 33 bits": {"ids": np.array([0, 1, 2 ** 32])},
        "an id below 0": {"ids": np.array([0, 1, -1])},
        "no width": {"width": 0, "height": 10},
        "a recording of nothing": {"prompts": ["a"]},
    }


def write_bad_files(here):
    """Writes files that must be refused in `here`. Yields (flag, file)."""
    good = np.load(here / "tracks.npy")
    for name, arrays in bad_tracks(good).items():
        path = here / f"{name}.npz"
        np.savez(path, **{"tracks": good, "format": "motionstream"} | arrays)
        yield "--tracks", path
    np.savez(here / "whole.npz", tracks=good, format="motionstream")
    npz = (here / "whole.npz").read_bytes()
    png = (here / "image.png").read_bytes()
    student = (here / "student.safetensors").read_bytes()
    vae = (here / "vae.safetensors").read_bytes()
    for flag, name, content in (
        ("--image", "text.png", b"hello"),
        ("--image", "half.png", png[:len(png) // 2]),
        ("--tracks", "half.npz", npz[:300]),
        ("--tracks", "damaged.npz", npz.replace(b"tracks.npy", b"tracks.xyz", 1)),
        ("--weights", "half.safetensors", student[:-64]),
        ("--vae", "cut.safetensors", vae[:-64]),
    ):
        (here / name).write_bytes(content)
        yield flag, here / name
    hole = saved(here / "hole.safetensors", new_model(), lambda tensors: tensors.popitem())
    yield "--weights", hole


def bad_paths(here):
    """Flags with files that are not there, or something else."""
    return [
        ("--image", here / "none.png"),
        ("--image", here),
        ("--tracks", here / "none.npy"),
        ("--weights", here / "none.safetensors"),
        ("--weights", here / "vae.safetensors"),
        ("--weights", here / "teacher.safetensors", "--sampler", "stream"),
        ("--vae", here / "student.safetensors"),
        ("--out", here / "no" / "out.mp4"),
        ("--out", here),
        ("--out", here / "image.png"),                      # over the input
    ]


def test_bad_input_ends_in_one_line_and_exit_code_2():
    _, here = workplace()
    cases = bad_paths(here)
    cases += write_bad_files(here)
    cases += [flags.split() for flags in BAD_FLAGS]
    before = sorted(here.iterdir())
    wrong = []
    for flags in cases:
        code, _, err = run_with(flags)
        if code != 2 or not re.fullmatch(r"error: [^\n]+\n", err):
            wrong.append(f"{flags}: code {code}, {err!r}")
        if sorted(here.iterdir()) != before:
            wrong.append(f"{flags}: leaves files")
    assert len(cases) > 50
    assert not wrong, "\n".join(wrong)


# --------------------------------------------------------------------------------------------------
# From pixels and tracks to frames.

def new_motion(frames, count, batch=2):
    return sample.Motion(*new_tracks(frames, count, batch))


def test_sampled_frames_depend_on_seed_tracks_and_memory_and_on_nothing_else():
    _, here = workplace()
    vae = TinyVAE.from_pretrained(here / "vae.safetensors")
    image = rand(1, 3, 32, 48).clamp(-1, 1)
    motion = new_motion(41, 3, batch=1)
    late = torch.arange(41)[:, None, None] > 8
    moved = replace(motion, tracks=motion.tracks + 8.0 * late)

    def frames(motion=motion, seed=0, **memory):
        weights = here / "student.safetensors"
        model = MotionStream.from_pretrained(weights, dtype=torch.float32, **memory)
        videos = list(sample.stream(model, vae, image, motion, seed=seed))
        return sample.to_frames(torch.cat(videos, 2))[:41]

    base = frames()
    assert base.shape == (41, 32, 48, 3)
    assert (frames() == base).all()
    other = frames(moved)
    assert (other[:9] == base[:9]).all()
    assert (other[9:21] != base[9:21]).any()
    assert (frames(seed=1) != base).any()
    assert (frames(sink=0) != base).any()
    assert (frames(window=None) != base).any()


def test_the_stream_hands_the_track_head_the_whole_motion():
    model = new_model()
    motion = new_motion(28, 5)
    chunks = sample.motion_by_chunk(motion, model.config)
    sizes = chunk_sizes(model.config)
    frame_0 = rand(2, 3, 32, 48)
    given = sample.chunk_conditions(model, None, frame_0, chunks, sample.Encoded(), sizes)
    parts = [part["tracks"] for part in given]
    assert len(parts) == 3
    rest = 33 - 28                                          # 3 chunks of 3 latents are 33 frames
    tracks = F.pad(motion.tracks, (0, 0, 0, 0, 0, rest))
    visible = F.pad(motion.visible, (0, 0, 0, rest))
    whole = track_features(model, tracks, visible, motion.ids)
    assert_near(torch.cat(parts, 2), whole, 1e-6)


def test_a_stream_refuses_tracks_of_another_length_than_its_chunk():
    """A chunk of 4 k frames continues a clip, one of 4 k - 3 starts it."""
    model = new_model()
    image = rand(1, 3, 32, 48)
    cases = ((12, 12), 0, 12, 9), ((5, 12), 0, 5, 9), ((9, 9), 1, 9, 12), ((9, 12, 16), 2, 16, 12)
    for lengths, number, frames, wanted in cases:
        motion = [new_motion(length, 3, batch=1) for length in lengths]
        sizes = chunk_sizes(model.config)
        chunks = sample.chunk_conditions(model, None, image, motion, sample.Encoded(), sizes)
        assert len(list(itertools.islice(chunks, number))) == number
        said = f"chunk {number} has tracks of {frames} frames, expected {wanted}"
        assert_error(AssertionError, said, next, chunks)


def test_live_points_and_starts_of_different_tracks_are_refused():
    points = torch.zeros(9, 3, 2)
    said = "points, after the batch of 1, (1, 9, 3, 2), expected (1, 9, 2, 2)"
    assert_error(AssertionError, said, sample.live_motion, points, torch.zeros(2, 2), SMALL)
    said = "starts, after the batch of 1, (1, 2), expected (1, 2, 2)"
    assert_error(AssertionError, said, sample.live_motion, points, torch.zeros(2), SMALL)


def test_an_image_of_another_size_is_refused_at_the_door():
    model = new_model()
    vae = new_vae()
    image = rand(1, 3, 64, 96)
    said = "frame_0 (1, 3, 64, 96), expected (1, 3, 32, 48)"
    motion = new_motion(9, 3, batch=1)
    assert_error(AssertionError, said, sample.stream_latents, model, vae, image, motion)
    assert_error(AssertionError, said, next, sample.sample_teacher(model, vae, image, motion))


def seen_of_two_chunks(make, model, vae):
    """What the model is called with while two chunks are made: (x, sigma, image)."""
    seen = []

    def note(module, args, given, out):
        x, sigma = args[:2]
        seen.append((x, sigma, given.get("image")))

    model.register_forward_hook(note, with_kwargs=True)
    motion = new_motion(21, 3, batch=1)
    chunks = make(model, vae, rand(1, 3, 32, 48), motion)
    assert [part.shape[2] for part in itertools.islice(chunks, 2)] == [3, 3]
    return seen


def latent_vae(first):
    """A VAE that encodes everything to `first`, and decodes to the latents themselves."""
    return SimpleNamespace(
        encode=lambda video: first,
        decode=lambda latents, state: (latents, state))


def test_the_image_enters_as_clean_latent_frame_0():
    _, _, first = clip_of(3)
    first = first[:1]
    for make in sample.stream, sample.sample_teacher:
        model = new_model(guidance=(0, 0))
        x, sigma, image = seen_of_two_chunks(make, model, latent_vae(first))[0]
        assert x[:, :, :1].equal(first)
        assert sigma[0, 0] == 0
        assert image is None


def test_the_image_enters_as_channels_of_models_that_have_them():
    _, _, first = clip_of(3)
    first = first[:1]
    for make in sample.stream, sample.sample_teacher:
        model = new_model(in_dim=4 + 8 + 4, clean_first=False, guidance=(0, 0))
        seen = seen_of_two_chunks(make, model, latent_vae(first))
        x, sigma, image = seen[0]
        assert not x[:, :, :1].equal(first)
        assert sigma[0, 0] == 1
        assert image[:, :, :1].equal(first)
        assert image[:, :, 1:].count_nonzero() == 0
        _, _, image = seen[-1]
        assert (image is None) == (make == sample.stream), "later chunks have it in their sink"


def centre_of_light(weight):
    """(x, y) in pixels of the centre of a picture (1, 1, H, W)."""
    height, width = weight.shape[2:]
    x = (weight * (torch.arange(width) + 0.5)).sum()
    y = (weight * (torch.arange(height) + 0.5)[:, None]).sum()
    return torch.stack([x, y]) / weight.sum()


def test_the_image_and_its_tracks_are_cropped_alike():
    config = replace(SMALL, size=(64, 96))
    for width, height in (200, 100), (100, 200), (30, 31), (96, 64):
        spot = (width * 0.58, height * 0.42)
        corner = (1, 1)
        other = (width - 1, height - 1)
        y, x = np.mgrid[:height, :width] + 0.5
        distance = ((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (width / 20) ** 2
        pixels = (255 * np.exp(-distance)).astype(np.uint8)
        image = Image.fromarray(pixels).convert("RGB")
        light = sample.fit_image(image, config.size)[:, :1] + 1
        points = np.tile(np.float32([spot, corner, other]), (5, 1, 1))
        given = sample.Tracks(points, np.ones((5, 3), bool))
        with quiet():
            motion = sample.fit_tracks(given, (width, height), 5, config, 0)
        apart = centre_of_light(light) - motion.tracks[0, 0, 0]
        assert apart.norm() < 0.7, (width, height)
        whole = (width, height) == (96, 64)                 # else the corners are cut off
        assert motion.visible[0, 0].tolist() == [True, whole, whole]


def test_ids_of_a_file_are_used_if_they_are_of_the_kind_that_the_weights_know():
    points = np.tile(np.float32([[9, 8], [24, 16]]), (5, 1, 1))
    seen = np.ones((5, 2), bool)
    for mode, own, expected in (
        ("random", "random", [7, 3]),
        ("same", "random", [0, 0]),
        ("same", "same", [7, 3]),
    ):
        given = sample.Tracks(points, seen, np.array([7, 3]), own)
        config = replace(SMALL, track_id_mode=mode)
        motion = sample.fit_tracks(given, (48, 32), 5, config, 0)
        assert motion.ids.tolist() == [expected], (mode, own)
        notes = on_tracks(SimpleNamespace(config=config, frames=5), given, motion)
        assert any("not used" in note for note in notes) == (mode != own)


def test_tracks_are_cut_to_whole_chunks_and_say_nothing_after_their_end():
    points = np.full((12, 2, 2), 9, np.float32)
    given = sample.Tracks(points, np.ones((12, 2), bool))
    for frames, whole, seen in (3, 9, 9), (9, 9, 9), (10, 21, 12), (15, 21, 12):
        motion = sample.fit_tracks(given, (48, 32), frames, SMALL, 0)
        assert motion.tracks.shape == (1, whole, 2, 2)
        assert motion.visible.sum() == 2 * seen
        notes = on_tracks(SimpleNamespace(config=SMALL, frames=frames), given, motion)
        told = any("the last 3 are not specified" in note for note in notes)
        assert told == (frames == 15)


def test_tracks_of_another_size_are_scaled_to_the_image_and_nan_is_hidden():
    points = rand(5, 2, 2).numpy() * 9 + 20
    points[3, 1] = np.nan
    with folder() as here:
        np.savez(here / "t.npz", tracks=points, width=96, height=40, fps=8, format="motionstream")
        given = sample.read_tracks(here / "t.npz", (48, 40))
    expected = points[:3] * (0.5, 1)
    assert abs(given.tracks[:3] - expected).max() < 1e-5
    assert given.tracks.dtype == np.float32
    assert given.fps == 8
    assert given.ids is None
    assert np.argwhere(~given.visible).tolist() == [[3, 1]]
    assert np.isfinite(given.tracks).all()


def test_live_motion_is_what_a_whole_clip_has_in_each_chunk():
    points = rand(33, 3, 2).abs() * 9 + 3
    points[12:20, 1] = math.nan
    for mode, kinds in ("random", 3), ("same", 1):
        config = replace(SMALL, track_id_mode=mode)
        parts = [sample.live_motion(part, points[0], config) for part in points.split([9, 12, 12])]
        tracks = torch.cat([part.tracks for part in parts], 1)
        visible = torch.cat([part.visible for part in parts], 1)
        assert tracks.nan_to_num(0).equal(points[None].nan_to_num(0))
        assert visible.equal(~points[None, ..., 0].isnan())
        ids = parts[0].ids
        assert len(ids[0].unique()) == kinds
        for part in parts:
            assert part.ids.equal(ids)
            assert part.start.equal(points[None, 0])


def test_live_tracks_have_ids_of_their_own():
    """Two from one place, and two that come later, whose places in frame 0 nobody knows."""
    config = replace(SMALL, track_id_mode="random")
    starts = torch.tensor([[9.0, 8.0], [9.0, 8.0], [math.nan, math.nan], [math.nan, math.nan]])
    first = sample.live_motion(rand(9, 4, 2), starts, config)
    later = sample.live_motion(rand(12, 4, 2), starts, config)
    assert len(first.ids.unique()) == 4
    assert later.ids.equal(first.ids)
    given = sample.live_motion(rand(12, 2, 2), starts[1:3], config, ids=[7, 2 ** 32 - 1])
    assert given.ids.tolist() == [[7, 2 ** 32 - 1]]


def test_copying_models_copy_in_every_path():
    vae = randomised(LinearVAE(LinearVAEConfig(latent_channels=4)))
    image = rand(1, 3, 32, 48).clamp(-1, 1)
    motion = new_motion(45, 3, batch=1)
    motion = replace(motion, start=start_points(motion.tracks, motion.visible))
    copies = copy_along_tracks(vae, image, motion.tracks, motion.visible, motion.start)
    passes = len(COPYING.sigmas) + 1                        # of a chunk, the last writes the cache
    for make, causal, first_chunk, every, frames in (
        (sample.stream, True, None, passes, 45),
        (sample.stream, True, 1, passes, 49),               # 1 + 4 x 3 latents
        (sample.sample_teacher, False, None, 1, 45),
    ):
        config = replace(COPYING, causal=causal, first_chunk=first_chunk, steps=1, guidance=(0, 0))
        model = new_model(**vars(config))
        seen = []

        def note(module, args, given, out, seen=seen):
            seen.append(given)

        model.register_forward_hook(note, with_kwargs=True)
        videos = torch.cat(list(make(model, vae, image, motion)), 2)
        assert videos.shape == (1, 3, frames, 32, 48)
        found = torch.cat([given["copies"] for given in seen[::every]], 2)
        assert_near(found[:, :, :12], copies, 1e-5)
        still = [given["image"] is not None for given in seen]
        assert all(still), "the still image is in every chunk"


def test_a_vae_decodes_in_16_bits_and_encodes_as_before():
    video = rand(1, 3, 5, 32, 48).clamp(-1, 1)
    wan = [randomised(WanVAE(config)) for config in (WanVAEConfig(16, 8, 8), WAN22)]
    for vae in [new_vae(), linear_vae()] + wan:
        latents = vae.encode(video)
        expected, _ = vae.decode(latents)
        sample.decode_in(torch.float32, vae)
        found, _ = vae.decode(latents)
        assert found.equal(expected)
        sample.decode_in(torch.bfloat16, vae)
        found, state = vae.decode(latents)
        assert found.dtype == torch.bfloat16
        assert_near(found.float(), expected, 0.1)
        assert not found.equal(expected.bfloat16()), "rounded at the end only"
        again, _ = vae.decode(latents, state)           # a next chunk
        assert again.dtype == torch.bfloat16
        assert vae.encode(video).equal(latents)


def test_models_are_loaded_in_the_jobs_dtype():
    _, here = workplace()
    loaded = []
    load = sample.load_models

    def keep(job, image):
        loaded.append(load(job, image))
        return loaded[-1]

    with patch.object(sample, "load_models", keep):
        for dtype in "float32", "bfloat16":
            code, _, err = run_with(["--frames", 1, "--steps", 1, "--dtype", dtype])
            assert code == 0, err
            vae = loaded[-1].vae
            assert next(vae.encoder.parameters()).dtype == torch.float32
            assert next(vae.decoder.parameters()).dtype == getattr(torch, dtype)
    (here / "out.mp4").unlink()


# --------------------------------------------------------------------------------------------------
# Recordings.

def record_by_hand(here, mode):
    """(The frames of a stream at chunk 1 of a model with such track IDs, the arrays of its
    recording, which is written)."""
    weights = saved(here / f"{mode}.safetensors", new_model(track_id_mode=mode))
    model = MotionStream.from_pretrained(weights, dtype=torch.float32, chunk=1, sink=2, window=2)
    vae = load_vae(workplace()[1] / "vae.safetensors")
    noise = rand(50, 60, 3, seed=5).numpy() * 60 + 128
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    image.save(here / "recorded.png")
    points = np.float32(rand(13, 2, 2).numpy() * 5 + 25)
    points[:5, 1] = np.nan                                  # comes late
    visible = ~np.isnan(points[..., 0])
    ids = np.array([3 << 16, (7 << 16) + 5])
    prompts = ["", "fading light", "fading light", "red"]
    tracks = sample.Tracks(np.nan_to_num(points), visible, ids, mode)
    motion = sample.fit_tracks(tracks, image.size, 13, model.config, 0)
    given = []
    for part, prompt in zip(sample.motion_by_chunk(motion, replace(SMALL, chunk=1)), prompts):
        given.append(replace(part, text=sample.embed_words(prompt, SMALL)))
    pixels = sample.fit_image(image, SMALL.size)
    videos = list(sample.stream(model, vae, pixels, iter(given), seed=7))
    frames = sample.to_frames(torch.cat(videos, 2))
    checksum = recording_checksum(sample.Models(model, vae, sample.Encoded()))
    arrays = {
        "tracks": points, "visibility": visible, "ids": ids, "track_id_mode": mode,
        "prompts": prompts, "seed": 7, "chunk": 1, "sink": 2, "window": 2,
        "steps": len(SMALL.sigmas), "fps": 12, "dtype": "float32", "frames": 11,
        "weights": checksum, "width": 60, "height": 50, "format": "motionstream"}
    np.savez(here / "recorded.npz", **arrays)
    return frames[:11], arrays


@contextlib.contextmanager
def keeping_videos():
    """A list of (fps, frames at 1/8 size) of the videos that sample.py writes in here."""
    videos = []

    @contextlib.contextmanager
    def keep(path, fps):
        frames = []
        videos.append((fps, frames))
        yield lambda frame: frames.append(frame[::8, ::8])

    with patch.object(sample, "video_file", keep):
        yield videos


def play(here, weights, flags=()):
    """Exit code, stdout and stderr of sample.py that plays the recording in `here` again."""
    vae = workplace()[1] / "vae.safetensors"
    return sampled("--image", here / "recorded.png", "--tracks", here / "recorded.npz",
                   "--out", here / "x.mp4", "--vae", vae, "--weights", weights, *flags)


def test_a_recording_plays_to_the_same_frames():
    for mode in "random", "same":
        with folder() as here, keeping_videos() as videos:
            frames, _ = record_by_hand(here, mode)
            code, out, err = play(here, here / f"{mode}.safetensors")
            assert code == 0, err
            assert "other weights" not in out
            (fps, played), = videos
            assert fps == 12
            assert np.array_equal(np.stack(played), frames), mode


def test_flags_change_how_a_recording_is_played():
    with folder() as here, keeping_videos() as videos:
        frames, _ = record_by_hand(here, "random")
        for flags in ("--prompt", "red"), ("--seed", 1), ("--memory", "c1s1w1"):
            code, out, err = play(here, here / "random.safetensors", flags)
            assert code == 0, err
            assert "other weights" not in out
            fps, played = videos.pop()
            assert fps == 12
            assert len(played) == 11
            assert not np.array_equal(np.stack(played), frames), flags
        student = workplace()[1] / "student.safetensors"
        code, out, _ = play(here, student, ("--frames", 1))
        assert code == 0
        assert "recorded with other weights" in out


def test_damaged_recordings_are_refused():
    with folder() as here:
        _, arrays = record_by_hand(here, "random")
        wrong = {"chunk": 0, "seed": "x", "dtype": "int8", "prompts": []}
        damaged = [arrays | {name: value} for name, value in wrong.items()]
        for name in "frames", "weights":
            damaged.append({each: value for each, value in arrays.items() if each != name})
        for each in damaged:
            np.savez(here / "recorded.npz", **each)
            code, _, err = play(here, here / "random.safetensors")
            assert code == 2
            assert "recorded.npz: damaged" in err, err


# --------------------------------------------------------------------------------------------------
# Public weights: how they are sampled, and what they are told.

def test_each_family_takes_the_image_in_its_own_way():
    first = rand(1, 16, 1, 2, 3)
    clip = rand(1, 16, 4, 2, 3)
    wide = rand(1, 48, 1, 2, 3)
    wide_clip = rand(1, 48, 4, 2, 3)
    then_zeros = F.pad(first, (0, 0, 0, 0, 0, 3))
    with_control = {"track_dim": 16, "in_dim": 48}
    wide_control = {"track_dim": 48, "in_dim": 148, "out_dim": 48}
    for fields, given, channels, clean in (
        ({"in_dim": 16}, first, None, first),
        ({"track_dim": 16, "in_dim": 32}, first, None, first),
        (with_control, first, then_zeros, None),
        ({"in_dim": 36}, clip, image_and_mask(clip), None),
        ({"in_dim": 48, "out_dim": 48}, wide, None, wide),
        (wide_control, wide_clip, image_and_mask(wide_clip), wide_clip[:, :, :1]),
    ):
        config = replace(STUB, clean_first=clean is not None, **fields)
        found = image_inputs(config, given, 4)
        for value, expected in zip(found, (channels, clean), strict=True):
            if expected is None:
                assert value is None, fields
            else:
                assert value.equal(expected), fields


def test_of_text_to_video_weights_it_is_said_that_they_never_learned_an_image():
    assert any("never learned" in note for note in settled("t2v.safetensors").notes)
    assert not any("never learned" in note for note in settled("i2v.safetensors").notes)


def test_weights_with_a_mask_see_the_image_and_then_grey():
    with patch.object(TinyVAE, "encode", autospec=True, side_effect=TinyVAE.encode) as encode:
        code, _, err, calls = wan_sampled("i2v.safetensors", "--frames", 10, "--steps", 1)
    assert code == 0, err
    call, = encode.call_args_list
    _, video = call.args
    assert video.shape[2] == 21
    assert video[:, :, 0].std() > 0
    assert video[:, :, 1:].count_nonzero() == 0
    image = calls[0].image
    assert image.shape[1:3] == (20, 6)
    assert image[:, :4, 0].eq(1).all()
    assert image[:, :4, 1:].eq(0).all()


def test_weights_with_a_mask_do_not_stream_from_python_either():
    model = new_model(in_dim=SMALL.out_dim + SMALL.track_dim + 4 + SMALL.out_dim)
    assert model.config.has_mask
    assert_error(
        AssertionError, "use sample_teacher", sample.stream_latents, model, None, None, None)


def test_the_vae_beside_the_weights_is_theirs():
    _, here = wan_workplace()
    text_to_video = sample.inspect(here / "t2v.safetensors")
    config = text_to_video.config
    assert isinstance(sample.open_vae(config, here, here / "vae.safetensors"), TinyVAE)
    control = here / "fun.safetensors"
    config = sample.inspect(control).config
    assert_error(sample.UserError, "give --vae PATH", sample.open_vae, config, control)
    with folder() as repository:
        tensors = load_file(here / "t2v.safetensors")
        save_file(tensors, repository / "diffusion_pytorch_model.safetensors")
        vae = randomised(WanVAE(WanVAEConfig(16, 8, 8)))
        torch.save(vae.state_dict(), repository / "Wan2.1_VAE.pth")
        assert isinstance(sample.open_vae(sample.inspect(repository).config, repository), WanVAE)


def test_tracks_go_to_a_trained_head_or_are_drawn():
    tracks = ("--tracks", "t.npy")
    for weights, drawn in ("fun", True), ("headed", False):
        job = settled(f"{weights}.safetensors", "--tracks", "t.npy")
        assert job.drawn == drawn
        assert any("drawn as a control video" in note for note in job.notes) == drawn
    for weights, flags, cure in (
        ("t2v", tracks, "drop --tracks"),
        ("t2v", ("--guidance", "0,1"), "drop --tracks"),
        ("headless", tracks, "no trained track head, and its input for tracks has 8"),
    ):
        assert_error(sample.UserError, cure, settled, f"{weights}.safetensors", *flags)


def test_guidance_leads_away_from_the_null_text():
    model = new_model(causal=False)
    noise, given, _ = clip_of(3)
    text = given["text"]
    tracks = given["tracks"]
    sigma = torch.full((2,), 0.7)
    null = rand(1, 3, 12, seed=9)
    full = model(noise, sigma, text, tracks=tracks)
    no_text = model(noise, sigma, null.expand(2, -1, -1), tracks=tracks)
    no_motion = model(noise, sigma, text, tracks=None)
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    for text_weight, motion_weight, batch in (3.0, 1.5, 6), (5.0, 0.0, 4):
        sizes.clear()
        weights = (text_weight, motion_weight)
        expected = joint_guidance(full, no_text, no_motion, text_weight, motion_weight)
        velocity = guided_velocity(model, noise, sigma, given, weights, null)
        assert_near(velocity, expected, 1e-5)
        assert sizes == [batch], "without a weight, the motion's evaluation is left out"


def test_the_sampler_passes_the_null_text_on():
    model = new_model(causal=False, steps=1, guidance=(5.0, 0.0))
    noise, given, _ = clip_of(3)
    null = rand(1, 3, 12, seed=9)
    (x, sigma), (x0, _) = euler(model, noise, given, None, null)
    assert x.equal(noise)
    assert sigma == 1
    velocity = guided_velocity(model, noise, torch.ones(2), given, (5.0, 0.0), null)
    assert_near(x0, noise - velocity, 1e-5)
