"""The papers' protocols, on small folders."""

import json
import unittest
import unittest.mock
from types import SimpleNamespace

import numpy as np
import torch

from extras import evaluate, protocols
from extras.testing import (Perceptual, assert_error, folder, having_lpips, own_clips, quiet,
                            workplace)
from motionstream import UserError


def test_clips_are_cut_as_the_papers_cut_them():
    davis = protocols.PROTOCOLS["davis"]
    sora = protocols.PROTOCOLS["sora"]
    places = protocols.chosen_frames(davis, 104, 24)
    assert len(places) == 81
    assert (places[0], places[-1]) == (0, 103)
    assert set(np.diff(places)) == {1, 2}
    assert protocols.chosen_frames(davis, 50, 24).tolist() == list(range(50))
    places = protocols.chosen_frames(sora, 300, 30)
    assert places[:5].tolist() == [0, 2, 4, 6, 8]       # every 1.875th
    assert len(places) == 81
    assert protocols.chosen_frames(sora, 90, 16).tolist() == list(range(81))
    assert protocols.chosen_frames(sora, 60, 30)[-1] < 60


def test_end_point_errors_are_of_what_the_tracks_say_is_visible():
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    tracks = torch.tensor([[[1.0, 1], [5, 5], [0, 0]]]).repeat(3, 1, 1)
    visible = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])

    def tracker(given, points):
        assert given is frames
        assert points.tolist() == [[1, 1], [5, 5]]
        found = np.stack([points] * 3)
        found[1] += (3, 4)                              # 5 pixels off in frame 1, where one is seen
        return found

    assert protocols.end_point_error(frames, tracks, visible, tracker) == 1     # of 5 points

    def broken(given, points):
        return points

    assert_error(UserError, "--tracker: returned (2, 2), expected (3, 2, 2)",
                 protocols.end_point_error, frames, tracks, visible, broken)


def test_a_video_that_is_the_truth_has_no_error_at_any_size():
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    tracks = torch.rand(5, 4, 2) * 30
    made = protocols.Made(video, video, tracks, torch.ones(5, 4, dtype=torch.bool))

    def tracker(frames, points):
        assert frames.shape == (5, 64, 96, 3)
        assert frames.dtype == np.uint8
        return 2 * tracks

    numbers = protocols.measure(made, (64, 96), None, tracker)
    assert numbers["PSNR"] > 90, numbers
    assert numbers["SSIM"] > 0.999, numbers
    assert numbers["EPE"] == 0, numbers
    other = protocols.Made(video, -video, tracks, made.visible)
    assert protocols.measure(other, (64, 96), None, tracker)["PSNR"] < 15


def test_a_folder_of_clips_is_played_and_measured():
    _, weights = workplace()
    with folder() as here:
        data = own_clips(here / "data", names=("a", "b"), frames=10)
        tracks = np.float32([[20, 20], [40, 24]]) + np.arange(10, dtype=np.float32)[:, None, None]
        np.savez(here / "data/a.npz", tracks=tracks)
        np.savez(here / "data/b.npz", tracks=tracks, visibility=np.arange(10)[:, None] > [3, 4])
        (here / "tracker.py").write_text("import numpy as np\n"
                                         "def still(frames, points):\n"
                                         "    return np.stack([points] * len(frames))\n")
        words = ["papers", data, "--protocol", "llff", "--out", here / "out"]
        words += ["--weights", weights / "student.safetensors"]
        words += ["--vae", weights / "vae.safetensors"]
        words += ["--tracker", f"{here / 'tracker.py'}:still", "--lpips", "alex"]
        words = [str(word) for word in words]
        lpips = SimpleNamespace(LPIPS=Perceptual)
        small = protocols.Protocol(True, None, (32, 48), "Still. ")
        with unittest.mock.patch.dict(protocols.PROTOCOLS, llff=small), having_lpips(lpips), \
                quiet() as (out, err):
            assert evaluate.main(words) == 0, err.getvalue()
        said = out.getvalue()
        assert "| mean of 2 | " in said, said
        assert "| the paper's student, 1.3B" in said, said
        told = json.loads((here / "out/papers.json").read_text())
        assert told["clips"].keys() == {"a", "b"}
        assert told["mean"].keys() == {"PSNR", "SSIM", "LPIPS", "EPE"}
        for name in protocols.NAMES:
            values = [row[name] for row in told["clips"].values() if name in row]
            assert abs(np.mean(values) - told["mean"][name]) < 1e-9
            assert np.isfinite(values).all()
        assert "EPE" not in told["clips"]["b"], "no track is in frame 0"
        assert told["mean"]["LPIPS"] > 1
        assert told["mean"]["EPE"] > 0
        assert (here / "out/a.mp4").stat().st_size
        assert (here / "out/b.png").stat().st_size


def test_what_is_wrong_with_a_protocols_folder_is_one_line():
    with folder() as here:
        data = own_clips(here / "data", names=("a",), frames=10)
        np.savez(here / "data/a.npz", tracks=np.full((9, 2, 2), 20, np.float32))
        out = here / "out"
        tracker = ["--tracker", "x.py:f"]
        cases = [
            ("none: no such folder", here / "none", []),
            ("out: no clips; a clip is a.mp4, a.npz and a.txt", out, []),
            ("a.npz: tracks of 9 frames, its video has 10", data, []),
            ("--tracker x.py:f: not FILE.py:FUNCTION (FileNotFoundError", data, tracker),
        ]
        for said, clips, more in cases:
            out.mkdir(exist_ok=True)
            words = ["papers", str(clips), "--out", str(out), "--lpips", "none"]
            with quiet() as (_, err):
                assert evaluate.main(words + more) == 2
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: "), (said, last)
            assert said in last, (said, last)


def test_a_protocol_refuses_the_flags_that_sample_refuses():
    with folder() as here:
        data = own_clips(here / "data", names=("a",), frames=10)
        np.savez(here / "data/a.npz", tracks=np.full((10, 2, 2), 20, np.float32))
        words = ["papers", data, "--out", here / "out", "--lpips", "none", "--sampler", "teacher"]
        with unittest.mock.patch("sample.load_models", side_effect=AssertionError), \
                quiet() as (_, err):
            assert evaluate.main([str(word) for word in words]) == 2
    assert "holds a student, use --sampler stream" in err.getvalue(), err.getvalue()
