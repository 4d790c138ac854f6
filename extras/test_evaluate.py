"""What measures the README's numbers, rewards, and a video beside another."""

import contextlib
import math
import re
import unittest
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import sample
import train_distill as td
from extras import evaluate, world
from extras.evaluate import (compared, find_reward, measure, measure_tables, motion_reward,
                             new_case, play, ssim)
from extras.testing import (SMALL, Perceptual, assert_error, assert_near, command, folder,
                            having_lpips, new_model, new_vae, quiet, rand, sampled, seeded,
                            workplace)
from motionstream import MotionStream


def test_a_shifted_video_has_the_error_of_its_shift_and_an_empty_one_has_lost_all():
    scene = world.new_scenes(4, 9, seeded(2), objects=2, camera=False, attributes=(0, 0), flat=True, style="simple")
    scene["backdrop"][:], scene["position"] = 0.5, 0.3 + 0.4 * scene["position"]           # far from the borders
    truth = world.render(scene, 128)
    first = truth[:, :, :1]
    same = measure(truth, truth, first, scene)
    assert (same["median"], same["mean"], same["lost"], same["copying"]) == (0, 0, 0, 0) and same["psnr"] > 90
    assert abs(same["ssim"] - 1) < 1e-6
    assert all(abs(same[name] - 1) < 1e-5 for name in ("colour", "sharp", "motion"))
    shifted = measure(truth.roll((3, 4), (3, 4)), truth, first, scene)
    assert abs(shifted["mean"] - 100 * 5 / 128) < 0.1 and shifted["lost"] == 0 and abs(shifted["motion"] - 1) < 1e-2
    far = measure(truth.roll(64, 4), truth, first, scene)
    assert 29 < far["median"] <= 30                             # half the width away: no error counts more than 30 %
    gone = measure(truth * 0, truth, first, scene)
    assert (gone["mean"], gone["lost"], gone["colour"]) == (30, 100, 0) and 0 < gone["sharp"] + 1 < 1.1
    still = measure(first.expand_as(truth), truth, first, scene)
    assert abs(still["copying"] - 1) < 1e-4 and still["motion"] == 0
    assert abs(still["psnr"] - 10 * math.log10(4 / (first - truth).square().mean())) < 1e-3
    frames = [v[:, :, t] for v in (first.expand_as(truth), truth) for t in (0, 4, 8)]
    assert abs(still["ssim"] - np.mean([ssim(a, b).mean() for a, b in zip(frames[:3], frames[3:])])) < 1e-6
    dim = measure(0.5 * truth - 0.5, truth, first, scene)
    assert abs(dim["sharp"] - 0.5) < 1e-4


def test_a_case_says_and_does_what_its_name_says():
    def case(change=None, **options):
        return new_case("test", 2, 21, "dense", change, objects=2, **options)

    (scene, told), n = case(), torch.arange(world.OBJECTS * evaluate.POINTS)
    path, tracks, visible = scene["position"], told["tracks"], told["visible"]
    other, (jump, _) = case("other way"), case("teleport")
    assert_near((other[0]["position"] - path[:, :, :1])[:, :2, 1] * 1, (path[:, :, :1] - path)[:, :2, 1], 1e-4)
    step = jump["position"].diff(dim=2).norm(dim=-1)
    assert (step[:, :, 9] > 3 * step[:, :, :9].amax(2)).any() and step.shape[2] == 20
    options = {"objects": 2, "camera": False, "attributes": (0, 0), "moving": True, "style": "simple"}
    fast, slow = case(speed=2)[0]["position"], world.new_scenes(2, 42, seeded(td.seed_of("test")), **options)["position"]
    assert fast.equal(slow[:, :, ::2])
    two = case("two ways")[1]["tracks"][:, :, n]
    assert two[:, :, n % 2 == 0].equal(tracks[:, :, n[n % 2 == 0]]) and not two.equal(tracks[:, :, n])
    jitter = (case("jittered")[1]["tracks"] - tracks).std() / td.SIZE
    assert 0.018 < jitter < 0.022
    cross = case("crossing")[0]["position"]
    assert_near(cross[:, :2, -1], path[:, [1, 0], 0], 1e-5)
    assert_near(cross[:, :2, 10], path[:, :2, 0].mean(1, keepdim=True).expand(-1, 2, -1), 1e-5)
    away, dusk = case("carried away")[0], case("dusk", attributes=(1, 0))[0]["gains"]
    assert_near(away["position"] - away["pan"][:, None], path, 1e-5)
    assert away["pan"][0, 0, 0] == -0.5 and away["pan"][0, -1, 0] == 0.5 and not away["pan"][..., 1].any()
    assert dusk[:, :10].eq(1).all() and dusk[:, 11:].equal(case(attributes=(1, 0))[0]["gains"][:, 1:11])
    late, broken = (case(change)[1]["visible"] for change in ("late", "broken"))
    assert late[:, 0].equal(visible[:, 0]) and not late[:, 1:13].any() and late[:, 13:].equal(visible[:, 13:])
    assert 0.4 < broken[:, 4:].sum() / visible[:, 4:].sum() < 0.6 and broken[:, :4].equal(visible[:, :4])
    drag = new_case("test", 2, 21, "drag", objects=2)[1]["visible"]
    assert drag[:, :, n[n % evaluate.POINTS == 0]].sum() == drag.sum() > 0 and drag.sum(2).max() <= 2
    assert not new_case("test", 2, 21, "none", objects=2)[1]["visible"].any()


def test_a_table_is_kept_row_by_row_and_measured_once():
    with folder() as here:
        run = SimpleNamespace(out=here, check=print, settings=lambda stage: "weights", eval_clips=2, eval_frames=33,
                              config=SMALL)
        other = {"x": 3, "measure": lambda run, y, x: calls.append({"y": y}) or {"ms": x + y}}     # not by eval_row
        rows = {"a": ({"x": 1}, [{"y": 1}, {"y": 2}]), "b": (other, [{"y": 4}]), "streams": ({"x": 2}, [{"y": 3}])}
        calls = []

        def row(run, **settings):
            calls.append(settings)
            if settings["y"] == fail:
                raise KeyboardInterrupt
            return {"from": 0, "mean": settings["y"] + 0.5, "tenths": [{"from": 0, "mean": 1}, {"from": 9, "mean": 2}]}

        with unittest.mock.patch.object(evaluate, "eval_row", row):
            for fail in 2, None, None:
                with quiet() as (out, _), contextlib.suppress(KeyboardInterrupt):
                    measure_tables(run, "eval", rows)
        assert [call["y"] for call in calls] == [1, 2, 2, 4, 3] and calls[0] == {"x": 1, "y": 1}
        assert "| y 2 | 2.50 |" in out.getvalue() and (here / "eval.png").exists()
        assert "| b | ms |\n|---|---|\n| y 4 | 7.00 |" in out.getvalue()


def test_a_text_of_the_second_half_begins_at_the_chunk_that_lies_there():
    texts, model, vae = [], new_model(size=(128, 128), text_dim=64), new_vae()
    run = SimpleNamespace(config=model.config, model=lambda name, **more: model, vae=lambda: vae, device="cpu", seed=0)
    scene, motion = new_case("x", 1, 45)
    forward = MotionStream.forward

    def record(model, x, sigma, text, **given):
        texts.append((text.sum().item(), given["write"] if "write" in given else False))
        return forward(model, x, sigma, text, **given)

    with torch.no_grad(), unittest.mock.patch.object(MotionStream, "forward", record):
        list(play(run, "student", scene, motion, torch.ones(1, 1, 64), later=torch.zeros(1, 1, 64)))
    assert [text for text, write in texts if write][:4] == [64, 64, 0, 0], "frames 0-8, 9-20; then 21-32, 33-44"


def test_the_motion_reward_is_1_for_the_truth_and_0_for_a_picture_that_stands_still():
    scene = world.new_scenes(6, 21, seeded(3), objects=2, camera=False, attributes=(0, 0), moving=True, style="simple")
    video, (tracks, visible) = world.render(scene, 64), world.scene_tracks(scene, 64, seeded())
    start = scene["position"][:, :, :1]
    back = scene | {"position": (2 * start - scene["position"]).clamp(0.05, 0.95)}
    batch = {"tracks": tracks, "visible": visible & (torch.arange(88) < 16)}          # on the objects
    truth, still = motion_reward(video, batch), motion_reward(video[:, :, :1].expand_as(video), batch)
    other = motion_reward(world.render(back, 64), batch)
    assert truth.shape == (6,) and truth.mean() > 0.5 and still.equal(torch.zeros(6)), (truth, still)
    assert (truth > other + 0.2).all() and motion_reward(rand(*video.shape), batch).max() < 0, (truth, other)
    assert motion_reward(video, batch | {"visible": visible & False}).equal(torch.zeros(6))      # nothing was asked


def test_a_reward_is_named_or_a_function_in_a_file():
    with folder() as here:
        (here / "mine.py").write_text("def bright(video, batch):\n    return video.mean((1, 2, 3, 4))\n")
        assert find_reward(f"{here}/mine.py:bright")(torch.ones(2, 3, 5, 4, 4), {}).tolist() == [1, 1]
        assert find_reward("motion") is motion_reward
        for name in "emotion", f"{here}/mine.py:dark", f"{here}/none.py:bright", f"{here}/mine.py":
            assert_error(td.UserError, f"--reward {name}: neither motion nor FILE.py:FUNCTION", find_reward, name)


def test_lpips_joins_the_measures_if_it_is_asked_for():
    _, here = workplace()
    video = here / "lpips.mp4"
    assert sampled(*command("--out", video))[0] == 0
    with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
        code, out, err = sampled(*command("--reference", video, "--lpips", "vgg", "--frames", 2))
    line = next(line for line in out.splitlines() if "PSNR" in line)
    assert code == 0 and 1 < float(re.search("LPIPS ([-0-9.e]+)$", line)[1]) < 1.1, (line, err)
    with having_lpips(None):
        code, _, err = sampled(*command("--reference", video, "--lpips", "alex"))
    assert code == 2 and "pip install lpips" in err and err.count("\n") == 1, err


def test_similarity_is_that_of_scikit_image():
    smooth = F.avg_pool2d(rand(2, 3, 40, 50), 5, 1, 2)
    other = (smooth + 0.1 * rand(2, 3, 40, 50, seed=1)).clamp(-1, 1)
    assert ssim(smooth, smooth).eq(1).all() and (ssim(smooth, other) < 0.9).all()
    grey = torch.zeros(1, 3, 11, 11)
    assert_near(ssim(grey, grey + 0.2), torch.tensor([(2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)]).double(), 1e-6)
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise unittest.SkipTest("SCIKIT-IMAGE IS NOT INSTALLED, similarity was only checked at known values") from None
    for a, b, ours in zip(smooth, other, ssim(smooth, other)):
        theirs = structural_similarity((a / 2 + 0.5).double().numpy(), (b / 2 + 0.5).double().numpy(), data_range=1,
                                       channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert abs(ours - theirs) < 1e-6, (ours, theirs)


def test_a_reference_is_compared_frame_by_frame_and_tracks_point_by_point():
    _, here = workplace()
    frames, c = [np.full((24, 32, 3), 60 * i, np.uint8) for i in range(4)], replace(SMALL, size=(24, 32))
    with sample.video_file(here / "reference.mp4", c.fps) as append:       # its middle is what the model's size shows
        for frame in frames[:3]:
            append(np.pad(frame + 8, ((0, 0), (6, 6), (0, 0)), constant_values=255))
    motion = sample.Motion(torch.full((1, 4, 3, 2), 9.0), torch.tensor([[[1, 1, 0]] * 4]).bool(), None)
    found = 2 * np.full((5, 3, 2), 9.0) + 2 * np.array([[3, 4], [0, 0], [900, 0]]), np.ones((5, 3), bool)
    found[0][0, 0], found[1][0, 0] = 0, False                           # the tracker did not see it
    with quiet() as (out, _):
        handed_on = list(compared(iter(frames), here / "reference.mp4", c, motion, found, 2))
    assert np.array_equal(handed_on, frames)
    numbers = dict(re.findall(r"([A-Z]+) ([\d.]+)", out.getvalue().rpartition(": ")[2]))
    assert f"3 frames of {here / 'reference.mp4'}: " in out.getvalue(), out.getvalue()
    assert out.getvalue().endswith("EPE 2.143 of 7 points\n"), out.getvalue()
    assert abs(float(numbers["PSNR"]) - 20 * math.log10(255 / 8)) < 1.5 and float(numbers["SSIM"]) > 0.5, numbers


def test_the_papers_measures_are_printed_by_the_command():
    _, here = workplace()
    video, found, tracks = here / "first.mp4", here / "found.npz", np.load(here / "tracks.npy")
    assert sampled(*command("--out", video))[0] == 0
    np.savez(found, tracks=8 * (tracks - [0, 4]) + [24, 32])        # the image is cropped to 48x32 and written larger
    code, out, err = sampled(*command("--reference", video, "--found", found))
    line = next(line for line in out.splitlines() if "PSNR" in line)
    assert code == 0 and line.endswith("EPE 5 of 42 points") and out.splitlines()[-1].endswith("out.mp4"), (out, err)
    _, other, _ = sampled(*command("--reference", video, "--seed", 1))
    psnr, other = (float(re.search("PSNR ([0-9.]+)", text)[1]) for text in (line, other))
    assert psnr > other + 2, (psnr, other)
    _, alone, _ = sampled(*command("--found", found))
    assert "EPE 5 of 42 points" in alone.splitlines() and "PSNR" not in alone
    np.savez(found, tracks=8 * (tracks[:, :2] - [0, 4]))
    (here / "out.mp4").unlink()
    for flags, cure in ((("--reference", video, "--found", found), "holds 2 tracks, 3 were given"),
                        (("--reference", here / "tracks.npy"), "tracks.npy: cannot be read as a video"),
                        (("--reference", here / "none.mp4"), "none.mp4: cannot be read as a video"),
                        (("--lpips", "alex"), "--lpips belongs to --reference")):
        code, _, err = sampled(*command(*flags))
        assert code == 2 and cure in err and err.count("\n") == 1 and not (here / "out.mp4").exists(), (flags, err)
