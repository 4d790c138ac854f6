"""What measures the README's numbers: cases, measures, tables, rewards, two videos compared."""

import contextlib
import json
import math
import re
import unittest
import unittest.mock
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from extras import evaluate, measures, world
from extras.cases import Case, Clips, new_clips, seed_of
from extras.evaluate import (Trained, compare, end_point_error, eval_row, find_reward, label_of,
                             measure, measure_tables, motion_reward, play)
from extras.measures import ssim
from extras.test_video import ffmpeg
from extras.testing import (HERE, Perceptual, assert_error, assert_near, folder, having_lpips,
                            linear_vae, new_model, new_vae, quiet, rand, saved, seeded)
from motionstream import MotionStream, UserError, copy_along_tracks, square_centres, start_points


def draw_clips(scene, **options):
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    return Clips(scene, tracks, visible, **options)


def flat_clips(count=2, frames=5, objects=2):
    """Clips of discs or squares of one colour, far from the borders, on grey."""
    scene = world.new_scenes(count, frames, seeded(2), objects=objects, camera=False,
                             attributes=(0, 0), flat=True, style="simple")
    scene["backdrop"][:] = 0.5
    scene["position"] = 0.3 + 0.4 * scene["position"]
    return draw_clips(scene, by_colour=True, plain=True)


# --------------------------------------------------------------------------------------------------
# Measures.

def measured(clips, change):
    """The numbers of the truth after a change."""
    truth = clips.frames()
    return measure(change(truth), truth[:, :, :1], clips, 0)


def test_the_truth_measures_perfect():
    numbers = measured(flat_clips(), lambda truth: truth)
    for name in "median", "mean", "lost", "copying":
        assert numbers[name] == 0, name
    for name in "psnr", "objects", "ground":
        assert numbers[name] > 90, name
    assert abs(numbers["ssim"] - 1) < 1e-6
    for name in "colour", "chroma", "sharp", "motion", "edges", "disc", "shape":
        assert abs(numbers[name] - 1) < 0.05, (name, numbers[name])


def test_a_shifted_video_has_the_error_of_its_shift():
    clips = flat_clips()
    numbers = measured(clips, lambda truth: truth.roll((3, 4), (3, 4)))
    assert abs(numbers["mean"] - 100 * 5 / 128) < 0.1
    assert numbers["lost"] == 0
    assert abs(numbers["motion"] - 1) < 1e-2
    assert numbers["edges"] < 0.5
    assert abs(numbers["sharp"] - 1) < 0.01
    assert numbers["disc"] > 0.9
    far = measured(clips, lambda truth: truth.roll(64, 4))
    assert 29 < far["median"] <= 30                 # half the width away: no error is over 30 %


def test_an_empty_video_has_lost_all():
    numbers = measured(flat_clips(), lambda truth: 0 * truth)
    assert numbers["mean"] == 30
    assert numbers["lost"] == 100
    assert numbers["colour"] == 0
    assert numbers["chroma"] == 0
    assert numbers["sharp"] < 0.1


def test_a_video_that_stands_still_copies_and_does_not_move():
    clips = flat_clips()
    truth = clips.frames()
    first = truth[:, :, :1]
    numbers = measured(clips, lambda truth: truth[:, :, :1].expand_as(truth))
    assert abs(numbers["copying"] - 1) < 1e-4
    assert numbers["motion"] == 0
    error = (first - truth).square().mean()
    assert abs(numbers["psnr"] - 10 * math.log10(4 / error)) < 1e-3
    assert numbers["ground"] > numbers["objects"] + 3


def test_half_the_contrast_is_half_as_sharp():
    numbers = measured(flat_clips(), lambda truth: 0.5 * truth - 0.5)
    assert abs(numbers["sharp"] - 0.5) < 1e-4


def test_a_piece_is_compared_with_its_own_frames():
    clips = flat_clips()
    truth = clips.frames()
    numbers = measure(truth[:, :, 2:5], truth[:, :, :1], clips, 2)
    assert numbers["psnr"] > 90


def blurred(video):
    """Every pixel the mean of 3x3."""
    frames = video.transpose(1, 2).flatten(0, 1)                        # (B T, 3, H, W)
    frames = F.avg_pool2d(frames, 3, 1, 1)
    return frames.unflatten(0, (len(video), -1)).transpose(1, 2)


def test_by_what_they_show_objects_are_found_where_they_are_and_lost_where_they_are_not():
    options = {"objects": 1, "camera": False, "attributes": (0, 0), "texture": (1, 1)}
    scene = world.new_scenes(2, 3, seeded(2), **options)
    clips = draw_clips(scene)
    numbers = measured(clips, lambda truth: truth)
    assert numbers["median"] == 0
    assert numbers["lost"] == 0
    assert "disc" not in numbers
    assert math.isnan(numbers["colour"])
    moved = measured(clips, lambda truth: truth.roll((3, 4), (3, 4)))
    assert abs(moved["median"] - 100 * 5 / 128) < 0.01
    assert moved["lost"] < 20
    gone = measured(clips, lambda truth: clips.ground(0, 3))
    assert gone["lost"] > 30
    assert gone["mean"] > 24
    assert gone["ground"] > gone["objects"] + 20
    soft = measured(clips, blurred)
    assert soft["median"] < 1
    assert soft["lost"] < 20
    assert soft["sharp"] < 0.8


def test_the_best_shift_is_the_one_that_was_made():
    truth = rand(3, 3, 40, 40)
    mask = torch.zeros(3, 40, 40)
    mask[:, 12:25, 15:30] = 1
    pictures = rand(3, 3, 40, 40, seed=1)
    ways = torch.tensor([[0, 0], [5, -3], [-8, 7]])                     # x, y
    for n, (x, y) in enumerate(ways.tolist()):
        part = truth[n, :, 12:25, 15:30]
        pictures[n, :, 12 + y:25 + y, 15 + x:30 + x] = part
    shift, error = measures.best_shift(pictures, truth, mask, 8)
    assert shift.equal(ways)
    assert error.max() < 1e-4
    pictures[:, :, :, :32] = 0                                      # most of it is outside, or gone
    _, error = measures.best_shift(pictures, truth, mask, 4)
    assert (error > 0.3).all()


def test_a_disc_in_place_of_a_square_overlaps_by_five_sixths_wherever_it_is():
    def overlap(found):
        return measures.best_overlap(found[None], square[None]).item()

    axis = torch.arange(80) - 40
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    square = (x.abs() <= 20) & (y.abs() <= 20)
    disc = x.square() + y.square() <= 22.4 ** 2
    for way in (0, 0), (5, -9), (16, 16):
        assert 0.81 < overlap(disc.roll(way, (0, 1))) < 0.85
        assert overlap(square.roll(way, (0, 1))) > 0.999
    both = square.clone()
    both[:10, :10] = True                                               # something else, far away
    assert overlap(both) > 0.999
    assert overlap(torch.zeros_like(square)) < 0.01


def test_pixels_of_an_object_are_those_nearer_to_its_colour_than_to_the_ground():
    ground = torch.zeros(1, 3, 1, 8, 8)
    truth = ground.clone()
    truth[..., 2:5, 2:5] = torch.tensor([0.9, -0.6, 0.0]).view(1, 3, 1, 1, 1)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 2:5] = 1
    video = truth.roll(1, 4) * 0.7                                      # paler, and elsewhere
    video[..., 7, 7] = -0.9                                             # another colour
    found = measures.object_pixels(video, truth, ground, mask)
    assert found.equal(mask.roll(1, 3).bool())
    found = measures.object_pixels(video, ground, ground, mask)
    assert not found.any(), "an object of the ground's colour cannot be told"


def test_decibels_inside_a_mask_are_those_of_its_pixels():
    truth = rand(2, 3, 4, 8, 8).clamp(-1, 1)
    mask = rand(2, 4, 8, 8, seed=1) > 0
    error = torch.where(mask, 0.1, 0.02)
    video = truth + error[:, None]
    inside = measures.psnr(video, truth, mask)
    outside = measures.psnr(video, truth, ~mask)
    assert abs(inside - 20 * math.log10(2 / 0.1)) < 1e-3
    assert abs(outside - 20 * math.log10(2 / 0.02)) < 1e-3
    assert math.isnan(measures.psnr(video, truth, torch.zeros_like(mask)))


def smooth_and_noisy():
    smooth = F.avg_pool2d(rand(2, 3, 40, 50), 5, 1, 2)
    noisy = smooth + 0.1 * rand(2, 3, 40, 50, seed=1)
    return smooth, noisy.clamp(-1, 1)


def test_similarity_is_1_for_the_same_and_by_the_formula_for_plain_pictures():
    smooth, noisy = smooth_and_noisy()
    assert ssim(smooth, smooth).eq(1).all()
    assert (ssim(smooth, noisy) < 0.9).all()
    grey = torch.zeros(1, 3, 11, 11)                                    # 0.5 and 0.6 in [0, 1]
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    assert abs(ssim(grey, grey + 0.2).item() - expected) < 1e-6


def test_similarity_is_that_of_scikit_image():
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise unittest.SkipTest("SCIKIT-IMAGE IS NOT INSTALLED") from None
    smooth, noisy = smooth_and_noisy()
    for i in range(2):
        a = (smooth[i] / 2 + 0.5).double().numpy()
        b = (noisy[i] / 2 + 0.5).double().numpy()
        theirs = structural_similarity(a, b, data_range=1, channel_axis=0, gaussian_weights=True,
                                       sigma=1.5, use_sample_covariance=False)
        assert abs(ssim(smooth, noisy)[i] - theirs) < 1e-6


# --------------------------------------------------------------------------------------------------
# Cases.

def case_clips(change=None, points="dense", speed=1, **options):
    """Two clips of two objects."""
    options = {"objects": 2} | options
    case = Case("test", 2, 21, change=change, points=points, speed=speed, options=options)
    return new_clips(case)


def test_changes_of_a_scene_move_objects_as_their_names_say():
    path = case_clips().scene["position"]                               # (B, K, T, 2)
    start = path[:, :, :1]
    back = case_clips("other way").scene["position"]
    assert_near((back - start)[:, :2, 1], (start - path)[:, :2, 1], 1e-4)
    jumping = case_clips("teleport").scene["position"]
    step = jumping.diff(dim=2).norm(dim=-1)                             # (B, K, 20)
    usual = step[:, :, :9].amax(2)
    assert (step[:, :, 9] > 3 * usual).any()
    crossing = case_clips("crossing").scene["position"]
    assert_near(crossing[:, :2, -1], path[:, [1, 0], 0], 1e-5)
    middle = path[:, :2, 0].mean(1, keepdim=True).expand(-1, 2, -1)
    assert_near(crossing[:, :2, 10], middle, 1e-5)
    away = case_clips("carried away").scene
    pan = away["pan"]                                                   # (B, T, 2)
    assert_near(away["position"] - pan[:, None], path, 1e-5)
    assert pan[0, 0, 0] == -0.5
    assert pan[0, -1, 0] == 0.5
    assert not pan[..., 1].any()


def test_twice_the_speed_is_every_second_frame():
    options = {"objects": 2, "camera": False, "attributes": (0, 0), "moving": True,
               "style": "simple"}
    slow = world.new_scenes(2, 42, seeded(seed_of("test")), **options)
    fast = case_clips(speed=2).scene
    assert fast["position"].equal(slow["position"][:, :, ::2])


def test_at_dusk_the_light_changes_in_the_second_half():
    usual = case_clips(attributes=(1, 0)).scene["gains"]                # (B, T, 3)
    dusk = case_clips("dusk", attributes=(1, 0)).scene["gains"]
    assert dusk[:, :10].eq(1).all()
    assert dusk[:, 11:].equal(usual[:, 1:11])


def test_changes_of_tracks_do_what_their_names_say():
    usual = case_clips()
    tracks = usual.tracks[:, :, :world.OBJECTS * 8]                     # (B, T, N, 2), on objects
    two_ways = case_clips("two ways").tracks[:, :, :world.OBJECTS * 8]
    assert two_ways[:, :, ::2].equal(tracks[:, :, ::2])
    assert not two_ways[:, :, 1::2].equal(tracks[:, :, 1::2])
    jitter = case_clips("jittered").tracks - usual.tracks
    assert 0.018 < jitter.std() / 128 < 0.022
    late = case_clips("late").visible
    assert late[:, 0].equal(usual.visible[:, 0])
    assert not late[:, 1:13].any()
    assert late[:, 13:].equal(usual.visible[:, 13:])
    broken = case_clips("broken").visible
    assert broken[:, :4].equal(usual.visible[:, :4])
    left = broken[:, 4:].sum() / usual.visible[:, 4:].sum()
    assert 0.4 < left < 0.6


def test_a_case_tells_all_tracks_or_those_of_centres_or_none():
    dense = case_clips(points="dense").visible                          # (B, T, N)
    drag = case_clips(points="drag").visible
    assert drag.any()
    assert drag.sum(2).max() <= 2
    centres = torch.zeros(drag.shape[2]).bool()
    centres[0:world.OBJECTS * 8:8] = True
    assert drag.equal(dense & centres)
    assert not case_clips(points="none").visible.any()


def test_what_is_drawn_longer_than_it_is_played_begins_alike():
    short = new_clips(Case("x", 2, 9, drawn=33))
    long = new_clips(Case("x", 2, 21, drawn=33))
    assert short.length == 9
    assert short.frames().shape[2] == 9
    assert long.tracks.shape[1] == 21
    assert short.frames().equal(long.frames(0, 9))
    assert short.tracks.equal(long.tracks[:, :9])


def test_outlines_are_where_objects_are_seen_and_not_where_others_hide_them():
    clips = flat_clips()
    position = clips.scene["position"]
    near = torch.tensor([0.06, 0.0])            # the second hides part of the first
    position[:, 1] = position[:, 0] + near
    outlines = clips.outlines(2, 5)
    assert outlines.shape == (2, 3, 3, 128, 128)
    assert not outlines[:, 2].any()
    assert not (outlines[:, 0] & outlines[:, 1]).any()
    present = clips.scene["present"].clone()
    present[:, 1] = False
    alone = draw_clips(clips.scene | {"present": present}).outlines(2, 5)
    area = alone[:, 0].sum((2, 3))
    assert (outlines[:, 0].sum((2, 3)) < 0.8 * area).all()
    differs = (clips.frames(2, 5) - clips.ground(2, 5)).abs().amax(1) > 0.3
    assert (differs == outlines.any(1)).float().mean() > 0.99


def test_more_than_three_objects_have_outlines():
    outlines = flat_clips(objects=5).outlines(0, 1)
    assert outlines.shape[1] == 5
    assert outlines.flatten(2).any(2).all()


def save_photographs(here):
    for i, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (90, 60), colour).save(here / f"{i}.png")


def test_photographs_are_scenes_in_which_the_middle_of_one_moves_over_the_next():
    with folder() as here:
        save_photographs(here)
        clips = new_clips(Case("x", 3, 9, photographs=here, points="dense"))
    assert clips.tracks.shape[2] == 16 + 64
    assert not clips.plain
    assert not clips.by_colour
    disc = clips.outlines(0, 9)[:, 0]                                   # (B, T, H, W)
    area = disc.float().mean((2, 3))
    assert ((area > 0.08) & (area < 0.13)).all(), area                  # of 0.4 of the width
    truth = clips.frames()
    for i in range(3):
        shown = truth[i][:, disc[i]]                                    # (3, pixels)
        assert shown[i].mean() > 0.95, i
        assert shown.mean() < -0.2, i                               # the other channels are dark
    seen = clips.visible[0, 4, :16]
    x, y = clips.tracks[0, 4, :16][seen].long().unbind(1)
    assert disc[0, 4, y, x].float().mean() > 0.9


def test_one_photograph_is_too_few():
    with folder() as here:
        Image.new("RGB", (90, 60), "red").save(here / "0.png")
        case = Case("x", 1, 9, photographs=here)
        assert_error(UserError, "holds 1 photographs", new_clips, case)


# --------------------------------------------------------------------------------------------------
# Models and tables.

def stub(model):
    """Stands for Trained. One colour is one thing."""
    vae = linear_vae()
    vae.segmenter.forward = lambda image: 3 * F.avg_pool2d(image, 2)
    return SimpleNamespace(config=model.config, device="cpu", seed=0,
                           model=lambda name, **overrides: model, vae=lambda name="vae": vae)


class Recording(MotionStream):
    """Notes the sums of texts that it writes chunks with."""

    def forward(self, x, sigma, text, **given):
        if given.get("write"):
            self.texts.append(text.sum().item())
        return super().forward(x, sigma, text, **given)


def test_a_text_of_the_second_half_begins_at_the_chunk_that_lies_there():
    model = new_model(size=(32, 32), text_dim=64)
    model.__class__ = Recording
    model.texts = []
    clips = new_clips(Case("x", 1, 45, width=32))
    early = torch.ones(1, 1, 64)
    with torch.no_grad():
        list(play(stub(model), "student", clips, early, later=0 * early))
    assert model.texts[:4] == [64, 64, 0, 0], "frames 0-8, 9-20; then 21-32, 33-44"


def test_pieces_and_tenths_are_of_the_frames_that_they_say():
    trained = stub(new_model(size=(32, 32), text_dim=64))
    case = {"seed": "x", "clips": 1, "frames": 45, "objects": 1, "width": 32}
    with torch.no_grad():
        row = eval_row(trained, piece=9, **case)
        last = eval_row(trained, after=36, **case)
        still = eval_row(trained, "still", **case)
        warp = eval_row(trained, "warp", points="dense", **case)
    assert [tenth["from"] for tenth in row["tenths"]] == [0, 9, 18, 27, 36]
    values = [tenth["psnr"] for tenth in row["tenths"]]
    assert abs(row["psnr"] - np.mean(values)) < 1e-4
    assert abs(row["drift"] - np.std(values)) < 1e-4
    assert last["from"] == 36
    assert abs(last["psnr"] - values[4]) < 1e-4
    assert still["motion"] == 0
    assert still["copying"] > 0.99
    assert warp["mean"] < 0.7 * still["mean"]
    said = "no such settings: {'colour': 3}"
    assert_error(TypeError, said, eval_row, trained, colour=3, **case)


def moving_square(count=3):
    """An object of 4x4 squares, of noise, that goes 24 pixels to the right with each frame over a
    ground of noise, and a track for each square of 2x2 pixels that is seen in frame 0:
    (video (1, 3, count, 32, 64), tracks, visible)."""
    video = rand(1, 3, 1, 32, 64).repeat(1, 1, count, 1, 1)
    looks = rand(1, 3, 8, 8, seed=1)
    tracks = square_centres(32, 64, "cpu").flatten(0, 1)                # (N, 2)
    tracks = tracks.repeat(1, count, 1, 1)
    x, y = tracks[0, 0].unbind(1)
    of_object = (x > 4) & (x < 12) & (y > 12) & (y < 20)
    visible = torch.ones(1, count, len(x)).bool()
    for t in range(count):
        left = 4 + 24 * t
        video[:, :, t, 12:20, left:left + 8] = looks
        tracks[:, t, of_object, 0] += 24 * t
        behind = (x > left) & (x < left + 8) & (y > 12) & (y < 20)
        visible[:, t] = of_object | ~behind
    return video, tracks, visible


def segmented(things):
    """What evaluate.play needs of a Trained: a VAE to whose segmenter `things` (rows, columns) are
    what a picture shows."""
    vae = linear_vae()
    vae.segmenter.forward = lambda image: 3 * things.float().expand(len(image), 1, -1, -1)
    return SimpleNamespace(vae=lambda: vae)


def test_a_warp_moves_objects_exactly_along_dense_tracks():
    video, tracks, visible = moving_square()
    things = torch.zeros(16, 32)
    things[6:10, 2:6] = 1
    clips = SimpleNamespace(frames=lambda start, stop: video[:, :, start:stop],
                            tracks=tracks, visible=visible)
    made = list(play(segmented(things), "warp", clips))
    made = torch.cat(made, 2)
    assert made.shape == video.shape
    assert made[:, :, 0].equal(video[:, :, 0])
    for t in range(1, 3):
        left = 4 + 24 * t
        inside = slice(left + 1, left + 7)                              # its rim is mixed
        found = made[:, :, t, 13:19, inside]
        assert_near(found, video[:, :, t, 13:19, inside], 0.05)
    assert_near(made[..., :10, :], video[..., :10, :], 0.01)            # the ground


def test_a_warp_is_what_a_copying_model_is_given():
    clips = case_clips()
    clips.visible[0, 0, ::3] = False                                    # as if they began later
    image = clips.frames(0, 1)[:, :, 0]
    trained = segmented(rand(64, 64))
    vae = trained.vae()
    start = start_points(clips.tracks, clips.visible)
    with unittest.mock.patch.object(vae, "encode", wraps=vae.encode) as encode:
        copy_along_tracks(vae, image, clips.tracks, clips.visible, start)
    given = encode.call_args.args[0]
    frames = list(play(trained, "warp", clips))
    assert_near(torch.cat(frames, 2), given, 1e-3)
    assert not frames[20].equal(frames[0])


def test_a_table_is_kept_row_by_row_and_measured_once():
    calls = []
    interrupted = {2}                                       # rows at which Ctrl-C is pressed, once

    def row(trained, x, y):
        calls.append((x, y))
        if y in interrupted:
            interrupted.remove(y)
            raise KeyboardInterrupt
        tenths = [{"from": 0, "mean": 1}, {"from": 9, "mean": 2}]
        return {"from": 0, "mean": y + 0.5, "tenths": tenths}

    def other(trained, x, y, model="student"):
        calls.append((x, y))
        return {"ms": x + y}

    tables = {
        "a": ({"x": 1, "measure": row}, [{"y": 1}, {"y": 2}, {"y": 5, "model": "teacher"}]),
        "b": ({"x": 3, "measure": other}, [{"y": 4}, {"y": 6, "model": "warp"}]),
        "streams": ({"x": 2, "measure": row}, [{"y": 3}]),
    }
    with folder() as here:
        trained = SimpleNamespace(folder=here, names=lambda: ["vae", "student"])
        for _ in range(3):
            with quiet() as (out, _), contextlib.suppress(KeyboardInterrupt):
                measure_tables(trained, "eval", "these weights", tables)
        assert (here / "eval.png").exists()
    assert calls == [(1, 1), (1, 2), (1, 2), (3, 4), (3, 6), (2, 3)]    # and there is no teacher
    assert "| y 2 | 2.50 |" in out.getvalue()
    assert "| b | ms |\n|---|---|\n| y 4 | 7.00 |" in out.getvalue()


def test_the_rows_of_the_sets_are_named_by_set_model_points_and_time():
    labels = [label_of(row) for row in evaluate.picture_rows("here")]
    assert len(set(labels)) == len(labels)
    assert len(labels) == 5 * (2 + 2 + 4 + 2 + 4)
    assert labels[0] == "set old world, model vae, points none, at 2 s"
    assert "set photographs, model student, points drag, at 10 s" in labels
    assert "set plain, model warp, points dense, at 10 s" in labels
    for label in labels:
        assert not ("teacher" in label and "10 s" in label), label


def test_models_are_opened_where_they_lie():
    with folder() as here, quiet() as (out, _):
        saved(here / "teacher.safetensors", new_model(causal=False))
        vae = saved(here / "elsewhere.safetensors", new_vae())
        trained = Trained(here, files={"vae": vae})
        assert trained.names() == ["vae", "teacher"]
        assert not trained.config.causal
        shipped = evaluate.open_trained(here / "new")
        assert shipped.path("student") == HERE / "assets/tiny.safetensors"
        assert "the shipped weights" in out.getvalue()
        (here / "teacher.safetensors").write_bytes(b"damaged")
        assert_error(UserError, "teacher.safetensors", trained.names)


LOG = ('{"stage": "teacher", "step": 0, "seconds": 1, "loss": 2}\n'
       '{"stage": "teacher", "step": 1, "seconds": 1, "loss": 1}\n')


def test_a_preview_shows_the_truth_and_what_each_model_makes_of_it():
    with folder() as here, unittest.mock.patch.object(evaluate, "CLIP", 9):
        model = new_model(causal=False, size=(128, 128), text_dim=64, steps=2)
        saved(here / "teacher.safetensors", model)
        saved(here / "vae.safetensors", new_vae())
        (here / "stats.jsonl").write_text(LOG)
        evaluate.preview(Trained(here), "teacher")
        assert (here / "teacher.png").exists()
        with Image.open(here / "teacher_preview.png") as page:
            assert page.size == (6 * 128, 2 * 3 * 128)                  # truth, VAE, teacher


def test_of_ones_own_videos_there_are_curves_alone():
    with folder() as here, quiet():
        (here / "stats.jsonl").write_text(LOG)
        evaluate.preview(Trained(here), "teacher", drawn=False)
        assert (here / "teacher.png").exists()
        assert not (here / "teacher_preview.png").exists()
        (here / "teacher.png").unlink()
        assert evaluate.main(["curves", str(here)]) == 0
        assert (here / "teacher.png").exists()


# --------------------------------------------------------------------------------------------------
# Rewards.

def test_the_motion_reward_is_1_for_the_truth_and_0_for_a_picture_that_stands_still():
    scene = world.new_scenes(6, 21, seeded(3), objects=2, camera=False, attributes=(0, 0),
                             moving=True, style="simple")
    path = scene["position"]
    back = scene | {"position": (2 * path[:, :, :1] - path).clamp(0.05, 0.95)}
    video = world.render(scene, 64)
    tracks, visible = world.scene_tracks(scene, 64, seeded())
    on_objects = world.track_groups(scene) < 2
    on_objects &= world.track_groups(scene) >= 0
    batch = {"tracks": tracks, "visible": visible & on_objects}
    truth = motion_reward(video, batch)
    assert truth.shape == (6,)
    assert truth.mean() > 0.5
    still = motion_reward(video[:, :, :1].expand_as(video), batch)
    assert still.equal(torch.zeros(6))
    opposite = motion_reward(world.render(back, 64), batch)
    assert (truth > opposite + 0.2).all()
    assert motion_reward(rand(*video.shape), batch).max() < 0
    nothing_asked = batch | {"visible": torch.zeros_like(visible)}
    assert motion_reward(video, nothing_asked).equal(torch.zeros(6))


def test_a_reward_is_named_or_a_function_in_a_file():
    with folder() as here:
        mine = here / "mine.py"
        mine.write_text("def bright(video, batch):\n    return video.mean((1, 2, 3, 4))\n")
        bright = find_reward(f"{mine}:bright")
        assert bright(torch.ones(2, 3, 5, 4, 4), {}).tolist() == [1, 1]
        assert find_reward("motion") is motion_reward
        for name in "emotion", f"{mine}:dark", f"{here}/none.py:bright", f"{mine}":
            said = f"--reward {name}: neither motion nor FILE.py:FUNCTION"
            assert_error(UserError, said, find_reward, name)


# --------------------------------------------------------------------------------------------------
# Two videos.

def write_video(path, frames):
    """At 16 frames a second, losslessly enough."""
    with sample.video_file(path, 16) as append:
        for frame in frames:
            append(frame)


def grey_frame(level, width=80):
    return np.full((64, width, 3), level, np.uint8)


def test_two_videos_are_compared_frame_by_frame_as_long_as_there_are_both():
    side = ((0, 0), (16, 16), (0, 0))
    frames = [grey_frame(60 * i) for i in range(4)]
    brighter = [frame + 8 for frame in frames[:3]]
    wider = [np.pad(frame, side, constant_values=255) for frame in brighter]    # is cropped
    with folder() as here, quiet():
        made = here / "made.mp4"
        real = here / "real.mp4"
        write_video(made, frames)
        write_video(real, wider)
        numbers, count = compare(made, real)
        assert count == 3
        assert list(numbers) == ["PSNR", "SSIM"]
        assert abs(numbers["PSNR"] - 20 * math.log10(255 / 8)) < 1.5
        assert numbers["SSIM"] > 0.5
        with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
            numbers, _ = compare(made, real, "vgg")
        assert 1 < numbers["LPIPS"] < 1.1
        with having_lpips(None):
            assert_error(UserError, "pip install lpips", compare, made, real, "alex")


def test_frames_are_compared_with_those_that_are_stored_not_with_an_even_rate():
    late = "settb=1/32,setpts='2*N+between(N,10,20)'"
    with folder() as here, quiet():
        even = here / "even.mp4"
        uneven = here / "late.mp4"
        picture = here / "x.png"
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=16:d=2", "-qp", 0, even)
        ffmpeg("-i", even, "-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1/32",
               "-qp", 0, uneven)
        numbers, count = compare(even, uneven)
        assert count == 32
        assert numbers["PSNR"] > 60
        ffmpeg("-i", even, "-frames:v", 1, picture)
        assert_error(UserError, "x.png: is a picture, not a video", compare, even, picture)


def save_points(path, tracks, visible, size):
    width, height = size
    np.savez(path, tracks=np.float32(tracks), visibility=visible, width=width, height=height,
             format="motionstream")


def test_tracks_that_a_tracker_found_are_compared_point_by_point():
    small = (32, 24)
    large = (64, 48)                                                    # of the video
    told = np.full((4, 3, 2), 9.0)
    seen = np.tile([[True, True, False]], (4, 1))
    off_by = 2 * np.array([[3, 4], [0, 0], [900, 0]])       # 10 pixels, 0, of one that is hidden
    found = np.full((5, 3, 2), 18.0) + off_by
    found_seen = np.ones((5, 3), bool)
    found_seen[0, 0] = False                                            # the tracker did not see it
    with folder() as here:
        save_points(here / "told.npz", told, seen, small)
        save_points(here / "found.npz", found, found_seen, large)
        save_points(here / "few.npz", found[:, :2], found_seen[:, :2], large)
        error, count = end_point_error(here / "told.npz", here / "found.npz", large, small)
        assert count == 7
        assert abs(error - 3 * 10 / 7) < 1e-5
        assert_error(UserError, "holds 2 tracks, 3 were given",
                     end_point_error, here / "told.npz", here / "few.npz", large, small)


def command(words):
    """Exit code, stdout and stderr of python -m extras.evaluate, run in this process."""
    with quiet() as (out, err):
        code = evaluate.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def test_the_command_compares_two_videos_and_their_tracks():
    with folder() as here:
        video = here / "a.mp4"
        points = here / "t.npz"
        write_video(video, [grey_frame(99)] * 3)
        save_points(points, np.full((3, 1, 2), 10.0), np.ones((3, 1), bool), (80, 64))
        code, out, err = command(["compare", video, video, "--tracks", points, "--found", points])
    assert code == 0, err
    line = r"^3 frames of .*a.mp4, PSNR [\d.]+, SSIM 1, EPE 0 of 3 points$"
    assert re.search(line, out, re.M), out


def test_curves_are_of_the_rows_that_a_damaged_log_still_has():
    rows = [{"stage": "vae", "step": step, "seconds": 1.0, "loss": 0.5} for step in (0, 1)]
    text = "\n".join(json.dumps(row) for row in rows)
    with folder() as here:
        (here / "stats.jsonl").write_text(f'5\n{{"stage": "vae"\n{text}\n{{"st')
        code, out, err = command(["curves", here])
        assert code == 0, err
        assert out.splitlines() == [str(here / "vae.png")]
        (here / "eval.json").write_text('{"seed')
        trained = SimpleNamespace(folder=here, names=list)
        assert_error(UserError, "eval.json: damaged; remove it",
                     measure_tables, trained, "eval", "", {})


def test_the_command_says_what_it_cannot():
    with folder() as here:
        video = here / "a.mp4"
        write_video(video, [grey_frame(99)])
        (here / "b.mp4").write_text("no video")
        small = here / "small.mp4"
        ffmpeg("-f", "lavfi", "-i", "testsrc=s=8x8:d=0.1", small)
        cases = [
            (["compare", video, here / "b.mp4"], "b.mp4: cannot be read as a video"),
            (["compare", video], "a.mp4: give a second video, or --tracks"),
            (["compare", small, video], "small.mp4: is 8x8; SSIM needs 11 pixels a side"),
            (["--photographs", video], "a.mp4: no such folder"),
            (["compare", video, "--lpips", "alex", "--tracks", video, "--found", video],
             "--lpips needs a second video"),
            (["compare", video, "--found", here / "t.npz"], "need each other"),
            (["curves", here], "give the folder of a training"),
            (["--device", "moon"], "--device moon: not available here"),
            (["--device", "meta"], "--device meta: not available here"),
            (["--clips", "0"], "0 is not between 1 and"),
        ]
        for words, cure in cases:
            code, _, err = command(words)
            assert code == 2, words
            assert cure in err, err
            assert err.count("\n") == 1, err
