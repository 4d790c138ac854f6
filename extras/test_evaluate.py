"""What measures the README's numbers: cases, measures, tables, rewards, two videos compared."""

import contextlib
import math
import re
import unittest
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from extras import evaluate, measures, world
from extras.cases import Case, Clips, new_clips, seed_of
from extras.evaluate import (Trained, compare, end_point_error, eval_row, find_reward, label_of, measure,
                             measure_tables, motion_reward, play)
from extras.measures import ssim
from extras.test_video import ffmpeg
from extras.testing import (HERE, Perceptual, assert_error, assert_near, folder, having_lpips, new_model, new_vae, quiet,
                            rand, saved, seeded)
from motionstream import MotionStream, UserError

TINY_FILES = {"vae": HERE / "assets/tiny_vae.safetensors", "student": HERE / "assets/tiny.safetensors"}


def flat_clips(count=4, frames=9, style="simple", far=True, **options):
    """Clips of two discs or squares each, far from the borders, on grey."""
    usual = {"objects": 2, "camera": False, "attributes": (0, 0), "flat": True, "style": style}
    scene = world.new_scenes(count, frames, seeded(2), **usual | options)
    if far:
        scene["backdrop"][:] = 0.5
        scene["position"] = 0.3 + 0.4 * scene["position"]
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    return Clips(scene, tracks, visible, by_colour=style == "simple", plain=usual["flat"] and options.get("flat", True))


# ----------------------------------------------------------------------------------------------------------------------
# Measures.

def test_a_shifted_video_has_the_error_of_its_shift_and_an_empty_one_has_lost_all():
    clips = flat_clips()
    truth = clips.frames()
    first = truth[:, :, :1]
    same = measure(truth, first, clips, 0)
    assert (same["median"], same["mean"], same["lost"], same["copying"]) == (0, 0, 0, 0)
    assert min(same["psnr"], same["objects"], same["ground"]) > 90 and abs(same["ssim"] - 1) < 1e-6
    for name in ("colour", "chroma", "sharp", "motion", "edges", "disc", "shape"):
        assert abs(same[name] - 1) < 0.05, (name, same[name])
    shifted = measure(truth.roll((3, 4), (3, 4)), first, clips, 0)
    assert abs(shifted["mean"] - 100 * 5 / 128) < 0.1 and shifted["lost"] == 0 and abs(shifted["motion"] - 1) < 1e-2
    assert shifted["edges"] < 0.5 and abs(shifted["sharp"] - 1) < 0.01 and shifted["disc"] > 0.9
    far = measure(truth.roll(64, 4), first, clips, 0)
    assert 29 < far["median"] <= 30                             # half the width away: no error counts more than 30 %
    gone = measure(truth * 0, first, clips, 0)
    assert (gone["mean"], gone["lost"], gone["colour"], gone["chroma"]) == (30, 100, 0, 0)
    assert 0 < gone["sharp"] + 1 < 1.1
    still = measure(first.expand_as(truth), first, clips, 0)
    assert abs(still["copying"] - 1) < 1e-4 and still["motion"] == 0
    assert abs(still["psnr"] - 10 * math.log10(4 / (first - truth).square().mean())) < 1e-3
    assert still["ground"] > still["objects"] + 3
    dim = measure(0.5 * truth - 0.5, first, clips, 0)
    assert abs(dim["sharp"] - 0.5) < 1e-4
    assert measure(truth[:, :, 3:6], first, clips, 3)["psnr"] > 90      # a piece is compared with its own frames


def test_by_what_they_show_objects_are_found_where_they_are_and_lost_where_they_are_not():
    clips = flat_clips(2, 5, style="textured", far=False, objects=1, flat=False, texture=(1, 1))
    truth = clips.frames()
    ground = clips.ground(0, clips.length)
    first = truth[:, :, :1]
    same = measure(truth, first, clips, 0)
    assert (same["median"], same["lost"]) == (0, 0) and "disc" not in same and math.isnan(same["colour"])
    moved = measure(truth.roll((3, 4), (3, 4)), first, clips, 0)
    assert abs(moved["median"] - 100 * 5 / 128) < 0.01 and moved["lost"] < 20, moved
    gone = measure(ground, first, clips, 0)
    assert gone["lost"] > 30 and gone["mean"] > 24 and gone["ground"] > gone["objects"] + 20, gone
    blurred = F.avg_pool2d(truth.transpose(1, 2).flatten(0, 2), 3, 1, 1).view(truth.transpose(1, 2).shape)
    blurred = measure(blurred.transpose(1, 2), first, clips, 0)
    assert blurred["median"] < 1 and blurred["lost"] < 20 and blurred["sharp"] < 0.8, blurred


def test_the_best_shift_is_the_one_that_was_made():
    truth = rand(3, 3, 40, 40)
    mask = torch.zeros(3, 40, 40)
    mask[:, 12:25, 15:30] = 1
    pictures = rand(3, 3, 40, 40, seed=1)
    ways = torch.tensor([[0, 0], [5, -3], [-8, 7]])             # x, y
    for n, (x, y) in enumerate(ways.tolist()):
        pictures[n, :, 12 + y:25 + y, 15 + x:30 + x] = truth[n, :, 12:25, 15:30]
    shift, error = measures.best_shift(pictures, truth, mask, 8)
    assert shift.equal(ways) and error.max() < 1e-4, (shift, error)
    pictures[:, :, :, :32] = 0                                  # most of it is outside, or gone
    assert (measures.best_shift(pictures, truth, mask, 4)[1] > 0.3).all()


def test_a_disc_in_place_of_a_square_overlaps_by_five_sixths_wherever_it_is():
    y, x = torch.meshgrid(torch.arange(80) - 40, torch.arange(80) - 40, indexing="ij")
    square = (x.abs() <= 20) & (y.abs() <= 20)
    disc = x.square() + y.square() <= 22.4 ** 2
    for way in (0, 0), (5, -9), (16, 16):
        found = disc.roll(way, (0, 1))
        assert 0.81 < measures.best_overlap(found[None], square[None]).item() < 0.85
        assert measures.best_overlap(square.roll(way, (0, 1))[None], square[None]).item() > 0.999
    apart = square.clone()
    apart[:10, :10] = True                                      # something else, far away
    assert measures.best_overlap(apart[None], square[None]).item() > 0.999
    assert measures.best_overlap(square[None] & False, square[None]).item() < 0.01


def test_pixels_of_an_object_are_those_nearer_to_its_colour_than_to_the_ground():
    truth = torch.zeros(1, 3, 1, 8, 8)
    ground = truth.clone()
    mask = torch.zeros(1, 1, 8, 8)
    truth[..., 2:5, 2:5] = torch.tensor([0.9, -0.6, 0.0]).view(1, 3, 1, 1, 1)
    mask[..., 2:5, 2:5] = 1
    video = truth.roll(1, 4) * 0.7                              # paler, and elsewhere
    video[..., 7, 7] = -0.9                                     # another colour
    found = measures.object_pixels(video, truth, ground, mask)
    assert found.equal(mask.roll(1, 3).bool())
    assert not measures.object_pixels(video, ground, ground, mask).any()        # of the ground's colour: not to be told


def test_decibels_inside_a_mask_are_those_of_its_pixels():
    truth = rand(2, 3, 4, 8, 8).clamp(-1, 1)
    mask = rand(2, 4, 8, 8, seed=1) > 0
    video = truth + 0.1 * mask[:, None] + 0.02 * ~mask[:, None]
    assert abs(measures.psnr(video, truth, mask) - 20 * math.log10(2 / 0.1)) < 1e-3
    assert abs(measures.psnr(video, truth, ~mask) - 20 * math.log10(2 / 0.02)) < 1e-3
    assert math.isnan(measures.psnr(video, truth, mask & False))


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


# ----------------------------------------------------------------------------------------------------------------------
# Cases.

def test_a_case_says_and_does_what_its_name_says():
    def case(change=None, **options):
        more = {name: options.pop(name) for name in ("speed", "points") if name in options}
        return new_clips(Case("test", 2, 21, change=change, options={"objects": 2} | options, **{"points": "dense"} | more))

    clips = case()
    n = torch.arange(world.OBJECTS * 8)
    path, tracks, visible = clips.scene["position"], clips.tracks, clips.visible
    other = case("other way").scene["position"]
    assert_near((other - path[:, :, :1])[:, :2, 1] * 1, (path[:, :, :1] - path)[:, :2, 1], 1e-4)
    step = case("teleport").scene["position"].diff(dim=2).norm(dim=-1)
    assert (step[:, :, 9] > 3 * step[:, :, :9].amax(2)).any() and step.shape[2] == 20
    options = {"objects": 2, "camera": False, "attributes": (0, 0), "moving": True, "style": "simple"}
    slow = world.new_scenes(2, 42, seeded(seed_of("test")), **options)["position"]
    assert case(speed=2).scene["position"].equal(slow[:, :, ::2])
    two = case("two ways").tracks[:, :, n]
    assert two[:, :, n % 2 == 0].equal(tracks[:, :, n[n % 2 == 0]]) and not two.equal(tracks[:, :, n])
    assert 0.018 < (case("jittered").tracks - tracks).std() / 128 < 0.022
    cross = case("crossing").scene["position"]
    assert_near(cross[:, :2, -1], path[:, [1, 0], 0], 1e-5)
    assert_near(cross[:, :2, 10], path[:, :2, 0].mean(1, keepdim=True).expand(-1, 2, -1), 1e-5)
    away = case("carried away").scene
    assert_near(away["position"] - away["pan"][:, None], path, 1e-5)
    assert away["pan"][0, 0, 0] == -0.5 and away["pan"][0, -1, 0] == 0.5 and not away["pan"][..., 1].any()
    dusk = case("dusk", attributes=(1, 0)).scene["gains"]
    assert dusk[:, :10].eq(1).all() and dusk[:, 11:].equal(case(attributes=(1, 0)).scene["gains"][:, 1:11])
    late, broken = case("late").visible, case("broken").visible
    assert late[:, 0].equal(visible[:, 0]) and not late[:, 1:13].any() and late[:, 13:].equal(visible[:, 13:])
    assert 0.4 < broken[:, 4:].sum() / visible[:, 4:].sum() < 0.6 and broken[:, :4].equal(visible[:, :4])
    drag = case(points="drag").visible
    assert drag[:, :, n[n % 8 == 0]].sum() == drag.sum() > 0 and drag.sum(2).max() <= 2
    assert not case(points="none").visible.any()


def test_what_is_drawn_longer_than_it_is_played_begins_alike():
    short, long = (new_clips(Case("x", 2, frames, drawn=33)) for frames in (9, 21))
    assert short.length == 9 and short.frames().shape[2] == 9 and long.tracks.shape[1] == 21
    assert short.frames().equal(long.frames(0, 9)) and short.tracks.equal(long.tracks[:, :9])


def test_outlines_are_where_objects_are_seen_and_not_where_others_hide_them():
    clips = flat_clips()
    position = clips.scene["position"]
    position[:, 1] = position[:, 0] + torch.tensor([0.06, 0.0])         # the second hides part of the first
    outlines = clips.outlines(2, 5)
    assert outlines.shape == (4, 3, 3, 128, 128) and not outlines[:, 2].any()
    assert not (outlines[:, 0] & outlines[:, 1]).any()
    assert (outlines[:, 0].sum((2, 3)) < 0.8 * clips_alone(clips).sum((2, 3))).all()
    truth, ground = clips.frames(2, 5), clips.ground(2, 5)
    differs = (truth - ground).abs().amax(1) > 0.3
    assert (differs == outlines.any(1)).float().mean() > 0.99
    many = flat_clips(objects=5)
    assert many.outlines(0, 1).shape[1] == 5 and many.outlines(0, 1).flatten(2).any(2).all()


def clips_alone(clips):
    """The first object's outlines without the second."""
    present = clips.scene["present"].clone()
    present[:, 1] = False
    alone = Clips(clips.scene | {"present": present}, clips.tracks, clips.visible)
    return alone.outlines(2, 5)[:, 0]


def test_photographs_are_scenes_in_which_the_middle_of_one_moves_over_the_next():
    with folder() as here:
        for i, colour in enumerate(("red", "lime", "blue")):
            Image.new("RGB", (90, 60), colour).save(here / f"{i}.png")
        clips = new_clips(Case("x", 3, 9, photographs=here))
        truth, outlines = clips.frames(), clips.outlines(0, 9)
        area = outlines[:, 0].float().mean((2, 3))
        assert ((area > 0.08) & (area < 0.13)).all(), area      # a disc of 0.4 of the width
        for i in range(3):
            inside = truth[i].transpose(0, 1)[outlines[i, 0].unsqueeze(1).expand(-1, 3, -1, -1)].view(-1)
            assert inside.mean() < -0.2 and truth[i, i][outlines[i, 0]].mean() > 0.95, i
        assert clips.tracks.shape[2] == 16 + 64 and not clips.plain and not clips.by_colour
        tracks = new_clips(Case("x", 3, 9, photographs=here, points="dense"))
        x, y = tracks.tracks[0, 4, :16][tracks.visible[0, 4, :16]].long().unbind(1)
        assert outlines[0, 0, 4, y, x].float().mean() > 0.9
        (here / "1.png").unlink(), (here / "2.png").unlink()
        assert_error(UserError, "holds 1 photographs", new_clips, Case("x", 1, 9, photographs=here))


# ----------------------------------------------------------------------------------------------------------------------
# Models and tables.

def stub(model, vae, **more):
    """Stands for Trained."""
    opened = {"model": lambda name, **overrides: model, "vae": lambda name="vae": vae}
    return SimpleNamespace(config=model.config, device="cpu", seed=0, **opened | more)


class Recording(MotionStream):
    """Notes the sums of texts that it writes chunks with."""

    def forward(self, x, sigma, text, **given):
        if given.get("write"):
            self.texts.append(text.sum().item())
        return super().forward(x, sigma, text, **given)


def test_a_text_of_the_second_half_begins_at_the_chunk_that_lies_there():
    model = new_model(size=(32, 32), text_dim=64)
    model.__class__, model.texts = Recording, []
    clips = new_clips(Case("x", 1, 45, width=32))
    with torch.no_grad():
        list(play(stub(model, new_vae()), "student", clips, torch.ones(1, 1, 64), later=torch.zeros(1, 1, 64)))
    assert model.texts[:4] == [64, 64, 0, 0], "frames 0-8, 9-20; then 21-32, 33-44"


def test_pieces_and_tenths_are_of_the_frames_that_they_say():
    trained = stub(new_model(size=(32, 32), text_dim=64), new_vae())
    case = {"seed": "x", "clips": 1, "frames": 45, "objects": 1, "width": 32}
    with torch.no_grad():
        row = eval_row(trained, piece=9, **case)
        assert [part["from"] for part in row["tenths"]] == [0, 9, 18, 27, 36]
        values = [part["psnr"] for part in row["tenths"]]
        assert abs(row["psnr"] - np.mean(values)) < 1e-4 and abs(row["drift"] - np.std(values)) < 1e-4
        last = eval_row(trained, after=36, **case)
        assert last["from"] == 36 and abs(last["psnr"] - values[4]) < 1e-4
        still = eval_row(trained, "still", **case)
        assert still["motion"] == 0 and still["copying"] > 0.99
        assert_error(TypeError, "no such settings: {'colour': 3}", eval_row, trained, colour=3, **case)


def test_a_table_is_kept_row_by_row_and_measured_once():
    with folder() as here:
        trained = SimpleNamespace(folder=here, names=lambda: ["vae", "student"])
        calls = []

        def row(trained, **settings):
            calls.append(settings)
            if settings["y"] == fail:
                raise KeyboardInterrupt
            return {"from": 0, "mean": settings["y"] + 0.5, "tenths": [{"from": 0, "mean": 1}, {"from": 9, "mean": 2}]}

        def other(trained, y, x):
            calls.append({"y": y})
            return {"ms": x + y}

        rows = {"a": ({"x": 1, "measure": row}, [{"y": 1}, {"y": 2}, {"y": 5, "model": "teacher"}]),
                "b": ({"x": 3, "measure": other}, [{"y": 4}]), "streams": ({"x": 2, "measure": row}, [{"y": 3}])}
        for fail in 2, None, None:
            with quiet() as (out, _), contextlib.suppress(KeyboardInterrupt):
                measure_tables(trained, "eval", "these weights", rows)
        assert [call["y"] for call in calls] == [1, 2, 2, 4, 3] and calls[0] == {"x": 1, "y": 1}     # no teacher
        assert "| y 2 | 2.50 |" in out.getvalue() and (here / "eval.png").exists()
        assert "| b | ms |\n|---|---|\n| y 4 | 7.00 |" in out.getvalue()


def test_the_rows_of_the_sets_are_named_by_set_model_points_and_time():
    labels = [label_of(row) for row in evaluate.picture_rows("here")]
    assert len(labels) == len(set(labels)) == 5 * (2 + 2 + 2 + 4)
    assert labels[0] == "set old world, model vae, points none, at 2 s"
    assert "set photographs, model student, points drag, at 10 s" in labels
    assert not any("teacher" in label and "10 s" in label for label in labels)


def test_models_are_opened_where_they_lie_and_a_training_is_shown():
    with folder() as here, quiet() as (out, _):
        saved(here / "teacher.safetensors", new_model(causal=False, size=(128, 128), text_dim=64, steps=2))
        vae = saved(here / "elsewhere.safetensors", new_vae())
        trained = Trained(here, files={"vae": vae})
        assert trained.names() == ["vae", "teacher"] and not trained.config.causal
        (here / "stats.jsonl").write_text('{"stage": "teacher", "step": 0, "loss": 2}\n'
                                          '{"stage": "teacher", "step": 1, "loss": 1}\n')
        evaluate.preview(trained, "teacher")
        with Image.open(here / "teacher_preview.png") as page:
            assert page.size == (6 * 128, 2 * 3 * 128)          # truth, VAE, teacher
        (here / "teacher_preview.png").unlink()
        evaluate.preview(trained, "teacher", drawn=False)
        assert (here / "teacher.png").exists() and not (here / "teacher_preview.png").exists()
        (here / "teacher.png").unlink()
        assert evaluate.main(["curves", str(here)]) == 0 and (here / "teacher.png").exists()
        shipped = evaluate.open_trained(here / "new")
        assert shipped.path("student") == HERE / "assets/tiny.safetensors" and "the shipped weights" in out.getvalue()
        (here / "teacher.safetensors").write_bytes(b"damaged")
        assert_error(UserError, "teacher.safetensors", trained.names)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards.

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
            assert_error(UserError, f"--reward {name}: neither motion nor FILE.py:FUNCTION", find_reward, name)


# ----------------------------------------------------------------------------------------------------------------------
# Two videos.

def write_video(path, frames):
    """At 16 frames a second, losslessly enough."""
    with sample.video_file(path, 16) as append:
        for frame in frames:
            append(frame)


def test_two_videos_are_compared_frame_by_frame_as_long_as_there_are_both():
    frames = [np.full((256, 320, 3), 60 * i, np.uint8) for i in range(4)]
    with folder() as here, quiet():
        write_video(here / "made.mp4", frames)
        write_video(here / "real.mp4", [np.pad(frame + 8, ((0, 0), (64, 64), (0, 0)), constant_values=255)
                                        for frame in frames[:3]])               # its middle is what was made
        numbers, count = compare(here / "made.mp4", here / "real.mp4")
        assert count == 3 and [*numbers] == ["PSNR", "SSIM"]
        assert abs(numbers["PSNR"] - 20 * math.log10(255 / 8)) < 1.5 and numbers["SSIM"] > 0.5, numbers
        with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
            assert 1 < compare(here / "made.mp4", here / "real.mp4", "vgg")[0]["LPIPS"] < 1.1
        with having_lpips(None):
            assert_error(UserError, "pip install lpips", compare, here / "made.mp4", here / "real.mp4", "alex")


def test_frames_are_compared_with_those_that_are_stored_not_with_an_even_rate():
    late = "settb=1/32,setpts='2*N+between(N,10,20)'"
    with folder() as here, quiet():
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=16:d=3", "-qp", 0, here / "even.mp4")
        ffmpeg("-i", here / "even.mp4", "-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1/32", "-qp", 0,
               here / "late.mp4")
        numbers, count = compare(here / "even.mp4", here / "late.mp4")
        assert count == 48 and numbers["PSNR"] > 60, numbers
        ffmpeg("-i", here / "even.mp4", "-frames:v", 1, here / "x.png")
        assert_error(UserError, "x.png: is a picture, not a video", compare, here / "even.mp4", here / "x.png")


def save_points(path, tracks, visible, width, height):
    np.savez(path, tracks=tracks.astype(np.float32), visibility=visible, width=width, height=height,
             format="motionstream")


def test_tracks_that_a_tracker_found_are_compared_point_by_point():
    told = np.full((4, 3, 2), 9.0)
    seen = np.tile([[True, True, False]], (4, 1))
    found = np.full((5, 3, 2), 9.0) * 2 + 2 * np.array([[3, 4], [0, 0], [900, 0]])      # the video is twice as large
    found_seen = np.ones((5, 3), bool)
    found_seen[0, 0] = False                                    # the tracker did not see it
    with folder() as here:
        save_points(here / "told.npz", told, seen, 32, 24)
        save_points(here / "found.npz", found, found_seen, 64, 48)
        error, count = end_point_error(here / "told.npz", here / "found.npz", (64, 48), (32, 24))
        assert count == 7 and abs(error - 3 * 10 / 7) < 1e-5, (error, count)
        save_points(here / "few.npz", found[:, :2], found_seen[:, :2], 64, 48)
        assert_error(UserError, "holds 2 tracks, 3 were given", end_point_error, here / "told.npz", here / "few.npz",
                     (64, 48), (32, 24))


def test_the_command_compares_and_says_what_it_cannot():
    with folder() as here:
        write_video(here / "a.mp4", [np.full((256, 256, 3), 99, np.uint8)] * 3)
        save_points(here / "t.npz", np.full((3, 1, 2), 10.0), np.ones((3, 1), bool), 256, 256)
        words = ["compare", here / "a.mp4", here / "a.mp4", "--tracks", here / "t.npz", "--found", here / "t.npz"]
        with quiet() as (out, _):
            assert evaluate.main([str(word) for word in words]) == 0
        assert re.search(r"^3 frames of .*a.mp4, PSNR [\d.]+, SSIM 1, EPE 0 of 3 points$", out.getvalue(), re.M)
        (here / "b.mp4").write_text("no video")
        for words, cure in ((("compare", here / "a.mp4", here / "b.mp4"), "b.mp4: cannot be read as a video"),
                            (("compare", here / "a.mp4", "--lpips", "alex"), "--lpips needs a second video"),
                            (("compare", here / "a.mp4", "--found", here / "t.npz"), "need each other"),
                            (("curves", here), "give the folder of a training"),
                            (("--device", "moon"), "--device moon: not available here"),
                            (("--clips", "0"), "0 is not between 1 and")):
            with quiet() as (_, err):
                assert evaluate.main([str(word) for word in words]) == 2
            assert cure in err.getvalue() and err.getvalue().count("\n") == 1, err.getvalue()
