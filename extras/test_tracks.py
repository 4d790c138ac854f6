"""Tracks of other programs' files, cameras from depth, and tracks drawn."""

import contextlib
import io
import json
import math
import pickle
import re
import unittest
import unittest.mock
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image

import sample
from extras.testing import (HERE, STUB, assert_error, assert_near, command, folder, new_model,
                            quiet, rand, recipe, sampled, saved, workplace)
from extras import tracks as program
from extras.tracks import (MOVES, camera, camera_move, camera_tracks, drag_tracks, follow, load_depth,
                           load_tracks, read_path, render_control)
from motionstream import UserError


def motion_files(here):
    """(tracks (9, 3, 2), visible) of one motion, in pixels of 48x32, and the files that programs would write of it:
    name -> (path, whether it tells what is hidden)."""
    xy, seen = np.round(8 * (rand(9, 3, 2).numpy() * 5 + (24, 16))) / 8, rand(9, 3, seed=1).numpy() > -0.5
    seen[0], turned = True, xy.swapaxes(0, 1)
    ati = 8 * np.concatenate([turned, seen.T[..., None]], 2)[:, :, None]
    np.savez(packed := io.BytesIO(), array=ati.astype(np.uint16))
    torch.save(packed.getvalue(), here / "ati.pth")
    torch.save(packed.getvalue(), here / "old.pth", _use_new_zipfile_serialization=False)
    npz = {"ours": {"tracks": xy, "visibility": seen},
           "cotracker": {"pred_tracks": xy[None], "pred_visibility": seen[None]},
           "cotracker_1": {"tracks": xy[None], "visibility": seen[None, ..., None]},
           "comfy": {"track_path": xy, "track_visibility": seen},
           "large": {"tracks": xy.astype(">f8") * 2, "visibles": seen * 0.9, "width": 96, "height": 64},
           "tapir": {"tracks": turned, "occluded": ~seen.T},
           "tapvid": {"points": turned / (48, 32), "occlusion": ~seen.T},
           "wantrack": {"track_points": xy / (48, 32), "track_visibility": seen * 1.0},
           "ati": {"array": ati.astype(np.float32)}, "ati_1": {"array": np.float16(ati / 8)},
           "nan": {"tracks": np.where(seen[..., None], xy, np.nan)}}
    for name, arrays in npz.items():
        np.savez_compressed(here / f"{name}.npz", **arrays)
    for name, array in {"wan_tracks": xy[None], "wan_visibility": seen[None], "three": np.dstack([xy, seen]),
                        "plain": xy, "plain_visibility": seen * 1.0}.items():
        np.save(here / f"{name}.npy", array)
    lists = [[dict(zip("xy", point)) for point in path] for path in turned.tolist()]
    nulls = [[point if see else None for point, see in zip(*both)] for both in zip(turned.tolist(), seen.T)]
    texts = {"spline": json.dumps(lists), "quotes": str(lists), "strings": json.dumps([*map(str, lists)]),
             "pairs": json.dumps({"tracks": turned.tolist(), "visibility": seen.T.tolist(), "width": 48}),
             "nulls": json.dumps({"tracks": nulls})}
    for name, text in texts.items():
        (here / f"{name}.json").write_text(text)
    paths = [here / name for name in ("ati.pth", "old.pth", "wan_tracks.npy", "three.npy", "plain.npy")]
    paths += [here / f"{name}.npz" for name in npz] + [here / f"{name}.json" for name in texts]
    return xy, seen, {path.name: (path, path.stem not in ("spline", "quotes", "strings")) for path in paths}


def test_one_motion_in_every_format_reads_as_the_same_tracks():
    with folder() as here:
        xy, seen, written = motion_files(here)
        for name, (path, tells) in written.items():
            with quiet() as (out, _):
                tracks, visible, ids, fps = load_tracks(path, (48, 32)).values()
            assert np.array_equal(visible, seen if tells else np.ones_like(seen)), name
            assert abs(tracks - xy)[visible].max() < 1e-5 and tracks.dtype == np.float32, name
            assert ids is None and fps == (24 if "ati" in name or "old" in name else None), name
            assert ("visibility is read from" in out.getvalue()) == (name in ("wan_tracks.npy", "plain.npy")), name
        assert len(written) == 21
        paths = [[{"x": 1, "y": 2}], [{"x": 3, "y": 4}, {"x": 5, "y": 6}]]
        (here / "short.json").write_text(json.dumps(paths))
        tracks, visible, *_ = load_tracks(here / "short.json", (48, 32)).values()
        assert visible.tolist() == [[True, True], [False, True]]
        assert tracks[visible].tolist() == [[1, 2], [3, 4], [5, 6]]
        for name, one in ("one.npy", xy[:, 0]), ("one.json", xy[:, 0].tolist()):
            np.save(here / name, one) if name == "one.npy" else (here / name).write_text(json.dumps(one))
            assert np.array_equal(load_tracks(here / name, (48, 32))["tracks"], xy[:, :1]), name


def test_what_a_file_of_tracks_does_not_tell_the_flags_do():
    x, t = np.arange(12) * 3.0 + 5, np.arange(7) * 1.5
    xy, turned = np.stack([x + t[:, None], 0 * x + t[:, None] + 3], -1), "--layout nt"
    with folder() as here:
        np.save(here / "turned.npy", xy.swapaxes(0, 1))
        np.save(here / "shares.npy", xy / (48, 32))
        np.savez(here / "video.npz", tracks=xy * (9, 6))
        np.save(here / "good.npy", xy)
        np.save(here / "hidden.npy", seen := rand(7, 12).numpy() > 0)
        np.save(here / "yx.npy", xy[..., ::-1] + (0, 9))
        np.save(here / "fast.npy", xy[:, :4] / 40 + (20 * t)[:, None, None] % 90)
        for name, refused, more in (("shares.npy", "extras.tracks --units 01", {"units": "01"}),
                                    ("video.npz", "extras.tracks --size WxH", {"own_size": (432, 192)})):
            assert_error(UserError, refused, load_tracks, here / name, (48, 32))
            tracks, visible, *_ = load_tracks(here / name, (48, 32), **more).values()
            assert visible.all() and abs(tracks - xy).max() < 1e-4, name
        assert np.array_equal(load_tracks(here / "turned.npy", (48, 32), layout="nt")["tracks"], xy.astype(np.float32))
        assert_error(UserError, turned, load_tracks, here / "turned.npy", (48, 32), frames=7)
        assert_error(UserError, turned, load_tracks, here / "fast.npy", (900, 900))
        assert load_tracks(here / "fast.npy", (900, 900), layout="tn")["tracks"].shape == (7, 4, 2)
        assert_error(UserError, "is the order y, x?", load_tracks, here / "yx.npy", (48, 16))
        visible = load_tracks(here / "good.npy", (48, 32), visibility=here / "hidden.npy")["visible"]
        assert np.array_equal(visible, seen)
        whole = rand(12, 7, 2).numpy() * 6 + (24, 16)
        for seen, refused in ("visibility", False), ("visibles", True), (None, True):  # by names
            np.savez(here / "jump.npz", tracks=whole, **{seen: np.ones((12, 7), bool)} if seen else {})
            if refused:
                assert_error(UserError, turned, load_tracks, here / "jump.npz", (48, 32), frames=7)
            else:
                assert load_tracks(here / "jump.npz", (48, 32), frames=7)["tracks"].shape == (12, 7, 2)
        for certain in xy[..., ::-1], xy / 99, xy + 99:                 # what was written here is not doubted
            np.savez(here / "certain.npz", tracks=certain, format="motionstream")
            assert np.array_equal(load_tracks(here / "certain.npz", (48, 32))["tracks"], np.float32(certain))


def test_refused_tracks_are_refused_for_what_is_wrong_with_them():
    xy, seen = np.ones((9, 3, 2)) * (24, 16), np.ones((9, 3), bool)
    ati = np.full((3, 9, 1, 3), 8.0)
    with folder() as here:
        np.save(here / "v.npy", seen)
        for cure, arrays, more in (
                ("visibility, the third channel of array, reaches 10", {"array": ati + 2}, {}),
                ("array is (3, 9, 3), expected (N, T, 1, 3)", {"array": ati[:, :, 0]}, {}),
                ("has a visibility of its own", {"tracks": xy, "visibility": seen}, {"visibility": here / "v.npy"}),
                ("has a visibility of its own", {"array": ati}, {"visibility": here / "v.npy"}),
                ("extras.tracks --units px", {"track_points": xy / 10}, {}),
                ("is for a picture of 48x32; drop --size", {"tracks": xy, "width": 48}, {"own_size": (9, 32)}),
                ("holds tracks, pred_tracks: which", {"tracks": xy, "pred_tracks": xy}, {}),
                ("holds tracks, visibility, visibles: which", {"tracks": xy, "visibility": seen, "visibles": seen}, {}),
                ("has no array named tracks, only: points", {"points": xy}, {})):
            np.savez(here / "x.npz", **arrays)
            assert_error(UserError, cure, load_tracks, here / "x.npz", (48, 32), **more)
        for text in "[[[1, 2, 3], [4, 5, 6]]]", "[[[true, false]]]", "[[1, null]]":
            (here / "x.json").write_text(text)
            assert_error(UserError, "track 0 is no list of points", load_tracks, here / "x.json", (48, 32))


def test_damaged_files_of_tracks_end_in_one_line():
    rng, problems, count = np.random.default_rng(0), [], 0
    with folder() as here:
        for name, (path, _) in motion_files(here)[2].items():
            whole = path.read_bytes()
            for i in range(12):
                data = bytearray(whole[:rng.integers(len(whole))] if i % 4 == 0 else whole)
                for at in rng.integers(len(data), size=rng.integers(1, 9)) if data and i % 4 else ():
                    data[at] = rng.integers(256)
                path.write_bytes(data)
                try:
                    with quiet():
                        load_tracks(path, (48, 32))
                except UserError as e:
                    told = str(e).startswith(f"{path}: ") and "\n" not in str(e) and "Invalid argument" not in str(e)
                    problems += [] if told else [f"{name}: {e}"]
                except Exception as e:
                    problems.append(f"{name}: {e!r}")
                count += 1
            path.write_bytes(whole)
        np.save(here / "old.npy", np.ones((9, 3, 2)) * 5)
        whole = (here / "old.npy").read_bytes()
        (here / "old.npy").write_bytes(whole.replace(b"(9, 3, 2)", b"(9L,3, 2)"))                       # Python 2's
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert load_tracks(here / "old.npy", (48, 32))["tracks"].shape == (9, 3, 2) and not warned
    assert count > 200 and not problems, "\n".join(problems)


def converted(*words):
    """Exit code, stdout and stderr of python -m extras.tracks, run in this process."""
    with quiet() as (out, err):
        code = program.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def test_a_converted_file_gives_the_video_of_what_it_was_made_of():
    _, here = workplace()
    saved(here / "random.safetensors", new_model(track_id_mode="random"))
    flags = [word for word in command() if word not in ("--tracks", here / "tracks.npy")]
    np.save(here / "depth.npy", rand(40, 48).abs() + 1)
    kept = here / "kept.npz"
    before, image = sorted(here.iterdir()), ("--image", here / "image.png")

    def video(*more):
        code, out, err = sampled(*flags, *more)
        assert code == 0 and "nothing is specified" not in out, (more, out, err)
        frames = np.stack(imageio.mimread(here / "out.mp4", memtest=False))
        (here / "out.mp4").unlink()
        return frames

    drags = "--drag=30,20 -> -9,20", "--pin=1,9", "--frames", 10
    for program_flags, sample_flags in ((drags, drags), ((here / "tracks.npy",), ("--tracks", here / "tracks.npy"))):
        code, out, err = converted(*program_flags, *image, "--out", kept)
        assert code == 0 and out.startswith(f"{kept}: "), err
        with np.load(kept) as arrays:
            assert {*arrays} == {"tracks", "visibility", "width", "height", "format"}
            assert arrays["width"] == 48 and arrays["height"] == 40 and arrays["visibility"].dtype == bool
        for weights in "student", "random":
            more = "--weights", here / f"{weights}.safetensors", "--seed", 3
            assert np.array_equal(video(*sample_flags, *more), video("--tracks", kept, *more)), (program_flags, weights)
        copy = kept.read_bytes()
        code, _, err = converted(kept, *image, "--out", kept)
        assert code == 2 and "is a file that is read" in err and kept.read_bytes() == copy
        code, _, err = converted(kept, *image, "--out", here / "again.npz")
        assert code == 0, err
        with np.load(kept) as one, np.load(here / "again.npz") as other:
            assert all(np.array_equal(one[name], other[name]) for name in one)
        (here / "again.npz").unlink()
    code, _, err = converted("--depth", here / "depth.npy", "--camera", "right:0.5", "--frames", 9, *image, "--out", kept)
    assert code == 0 and sample.read_tracks(kept, (48, 40)).tracks.shape == (9, 64, 2), err
    kept.unlink()
    assert sorted(here.iterdir()) == before


def bad_tracks(here):
    """Name -> flags that must be refused, by sample.py too if the first is --tracks. Files are written here."""
    good = np.load(here / "tracks.npy")

    def npy(name, array):
        np.save(here / name, array)
        return "--tracks", here / name

    def npz(name, **arrays):
        np.savez(here / name, **arrays)
        return "--tracks", here / name

    def raw(flag, name, data):
        (here / name).write_bytes(data)
        return flag, here / name

    def change(array, value, index=(3, 1, 0)):
        array = array.copy()
        array[index] = value
        return array

    def declares(shape):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return file.getvalue() + bytes(64)

    seen = np.ones(good.shape[:2], bool)
    whole = npz("whole.npz", tracks=good, visibility=seen)[1].read_bytes()
    cases = {
        "noise as tracks": raw("--tracks", "noise.npy", bytes(99)),
        "half an npy": raw("--tracks", "half.npy", (here / "tracks.npy").read_bytes()[:-20]),
        "half an npz": raw("--tracks", "half.npz", whole[:300]),
        "terabytes": raw("--tracks", "huge.npy", declares((10 ** 6, 10 ** 6, 2))),
        "negative shape": raw("--tracks", "negative.npy", declares((-1, 3, 2))),
        "1-d tracks": npy("1d.npy", good[:, 0, 0]),
        "3-d points": npy("3d.npy", np.zeros((14, 3, 3), np.float32)),
        "no tracks in it": npy("zero.npy", good[:, :0]),
        "no frames in it": npy("short.npy", good[:0]),
        "swapped axes": npy("swapped.npy", good.transpose(1, 0, 2)),
        "letters for a width": npz("letters.npz", tracks=good, width="ten", height=10),
        "complex tracks": npy("complex.npy", good.astype(complex)),
        "bool tracks": npy("bool.npy", good > 1),
        "text in tracks": npy("letters.npy", good.astype(str)),
        "objects in npy": npy("object.npy", good.astype(object)),
        "objects in npz": npz("object.npz", tracks=good.astype(object)),
        "tracks in 0..1": npy("unit.npy", good / 100),
        "all outside": npy("outside.npy", good + 500),
        "inf in npy": npy("inf.npy", change(good, -np.inf)),
        "visible NaN": npz("nan.npz", tracks=change(good, np.nan), visibility=seen),
        "visible inf": npz("inf.npz", tracks=change(good, np.inf), visibility=seen),
        "visibility turned": npz("turned.npz", tracks=good, visibility=seen.T),
        "logits": npz("logits.npz", tracks=good, visibility=seen * 3.0),
        "seven ids": npz("ids.npz", tracks=good, ids=np.arange(7)),
        "an id of 33 bits": npz("large.npz", tracks=good, ids=np.array([0, 1, 2 ** 32])),
        "no width": npz("width.npz", tracks=good, width=0, height=10),
        "other arrays": npz("other.npz", points=good),
        "no visibility there": ("--tracks", here / "tracks.npy", "--visibility", here / "none.npy"),
        "frames and tracks swapped": (*npy("six.npy", np.tile(good[:, :1], (1, 6, 1))), "--frames", 6),
        "shares that are pixels": npz("points.npz", track_points=good),
        "two kinds of tracks": npz("two.npz", tracks=good, pred_tracks=good),
        "two visibilities": npz("seen.npz", tracks=good, visibility=seen, occluded=~seen),
        "visibility twice": (*npz("twice.npz", tracks=good, visibility=seen), *raw("--visibility", "v.npy", b"")),
        "a size of its own": (*npz("sized.npz", tracks=good, width=48, height=32), "--size", "32x48"),
        "ATI's in tenths": npz("array.npz", array=np.full((3, 14, 1, 3), 10.0)),
        "a pickle": raw("--tracks", "a.pkl", pickle.dumps({"points": [1, 2]})),
        "weights as tracks": ("--tracks", here / "student.safetensors"),
        "uneven JSON": raw("--tracks", "uneven.json", b"[[[1, 2], [3]]]"),
        "deep JSON": raw("--tracks", "deep.json", b"[" * 99999),
        "words in JSON": raw("--tracks", "words.json", b'[{"x": "a", "y": "b"}]'),
    }
    np.save(here / "depth.npy", np.ones((9, 9)))
    depth = "--depth", here / "depth.npy"
    flags = ("--camera in", "--focal 9", "--drag 1,2 --units km", "--drag 1,2 --units px", "--drag 1,2 --size 3x3", "",
             "--drag 99,2", "--grid 3x3", "--drag 1,2 --frames 0")
    return (cases | {flag: flag.split(" ", 1) if "->" in flag else flag.split() for flag in flags} | {
        "depth of another shape": (*depth, "--camera", "in"), "no camera": depth,
        "depth and drags": (*depth, "--camera", "in", "--drag", "1,2")})


def test_bad_tracks_end_in_one_line_and_exit_code_2():
    _, here = workplace()
    cases, wrong = bad_tracks(here), []
    before = sorted(here.iterdir())
    for name, flags in cases.items():
        programs = [(converted, (*flags, "--image", here / "image.png", "--out", here / "kept.npz"))]
        if flags and flags[0] == "--tracks":
            programs = [(converted, (*flags[1:], *programs[0][1][-4:]))]
            if len(flags) == 2 or flags[2] == "--frames":
                programs.append((sampled, command(*flags)))
        for call, words in programs:
            code, _, err = call(*words)
            if code != 2 or not re.fullmatch(r"error: [^\n]+\n", err) or sorted(here.iterdir()) != before:
                wrong.append(f"{name}: code {code}, {err!r}, files {sorted(set(here.iterdir()) - set(before))}")
                (here / "kept.npz").unlink(missing_ok=True)
    assert len(cases) > 45 and not wrong, "\n".join(wrong)


def test_drags_and_pins_are_tracks_along_lines():
    paths = [read_path(text) for text in ("10,20 -> 30,20 -> 30,10", " 5.5,7", "0,0->8,4")]
    tracks = follow(paths, 9)
    assert tracks.shape == (9, 3, 2) and tracks.dtype == np.float32
    assert tracks[:, 0].tolist() == [[10 + 5 * i, 20] for i in range(5)] + [[30, 20 - 2.5 * i] for i in range(1, 5)]
    assert (tracks[:, 1] == (5.5, 7)).all() and (tracks[:, 2, 0] == range(9)).all()
    assert follow(paths, 1)[0].tolist() == [[10, 20], [5.5, 7], [0, 0]]
    for text in "10", "1,2 -> 3", "1,2,3", "a,b", "1,nan", "1,2 ->", "1,9e9":
        assert_error(UserError, f"--drag, --pin: {text!r} is not x,y -> x,y", drag_tracks, [text], None, (48, 32), 9)
    _, here = workplace()
    with unittest.mock.patch.object(sample, "fit_tracks", wraps=sample.fit_tracks) as fit:
        flags = [word for word in command() if word not in ("--tracks", here / "tracks.npy")]
        code, out, _ = sampled(*flags, "--drag", "10,20 -> 30,20", "--pin", "5,7", "--frames", 9, "--out",
                               here / "out.png")
    given = fit.call_args[0][0]
    assert code == 0 and given.tracks.shape == (9, 2, 2) and given.visible.all(), out
    (here / "out.png").unlink()
    for flag, start, path in (("--pin", "48,20", "48,20"), ("--drag", "-1,20", "-1,20 -> 9,9"),
                              ("--drag", "9,40.5", "9,40.5->9,9"), ("--pin", "480,300", "480,300")):
        code, _, err = sampled(*flags, "--pin", "5,7", f"{flag}={path}")            # one that starts inside, too
        assert code == 2 and err == f"error: {flag} {start}: outside the image, which has 48x40 pixels\n", err
        assert not (here / "out.mp4").exists()
    code, out, err = sampled(*flags, "--pin", "9,9", "--drag", "9,9 -> 99,9", "--frames", 9)
    assert code == 0 and "visible track points lie outside the video" in out, (out, err)
    assert "48x40 pixels is cropped, the video shows x from 0 to 48 and y from 4 to 36" in out, out
    (here / "out.mp4").unlink()


def test_drags_and_pins_are_told_apart_and_refused_where_the_image_is_cropped():
    _, here = workplace()
    flags = [word for word in command() if word not in ("--tracks", here / "tracks.npy")]
    for more, text in (
            (["--pin", "9,9", "--pin", "9,1"], "--pin 9,1: starts in what is cropped of the image; the video shows x from 0"),
            (["--drag", "9,36.5 -> 9,9"], "--drag 9,36.5 -> 9,9: starts in what is cropped"),
            (["--drag", "30,20"], "--drag 30,20: there is no arrow"),
            (["--pin", "30,20 -> 9,9"], "--pin 30,20 -> 9,9: a pinned point stays; write --drag")):
        code, _, err = sampled(*flags, *more)
        assert code == 2 and err.startswith(f"error: {text}") and err.count("\n") == 1, (more, err)
    code, _, err = converted("--image", here / "image.png", "--drag", "30,20", "--out", here / "t.npz")
    assert code == 2 and err.startswith("error: --drag 30,20: there is no arrow"), err


def test_a_grid_of_points_goes_where_one_would():
    here = workplace()[1]
    tracks, visible = drag_tracks(["20,16 -> 28,16", "9,9"], "3x5", (48, 32), 9)
    assert tracks.shape == (9, 18, 2) and visible.all()
    assert {*map(tuple, tracks[0, :9].tolist())} == {(x, y) for x in (15, 20, 25) for y in (11, 16, 21)}
    assert np.array_equal(tracks[-1, :9], tracks[0, :9] + (8, 0)) and np.array_equal(tracks[-1, 9:], tracks[0, 9:])
    for grid in "0x5", "3", "3x0", "100x1", "axb":
        assert_error(UserError, f"{grid!r} is not like 3x20", drag_tracks, ["9,9"], grid, (48, 32), 9)
    code, _, err = sampled("--image", here / "image.png", "--tracks", here / "tracks.npy", "--grid", "3x5")
    assert code == 2 and err == "error: --grid belongs to --drag and --pin\n", err


MOVED = {   # a camera's move, of amount a: x, y, z of a point as it sees them at time t, d beyond a depth of 1
    "left": lambda x, y, d, a: (x + a, y, d + 1), "right": lambda x, y, d, a: (x - a, y, d + 1),
    "up": lambda x, y, d, a: (x, y + a, d + 1), "down": lambda x, y, d, a: (x, y - a, d + 1),
    "in": lambda x, y, d, a: (x, y, d + 1 - a), "out": lambda x, y, d, a: (x, y, d + 1 + a),
    "orbit-right": lambda x, y, d, a: (x * math.cos(math.radians(a)) + d * math.sin(math.radians(a)), y,
                                       d * math.cos(math.radians(a)) - x * math.sin(math.radians(a)) + 1),
    "orbit-left": lambda x, y, d, a: MOVED["orbit-right"](x, y, d, -a)}


def test_a_camera_sees_planes_of_known_depth_where_geometry_has_them():
    near, far, focal = 0.5, 1.0, 70.0
    depth = np.full((60, 80), far)
    depth[10:50, 20:60] = near                                          # a nearer square, which moves faster
    for name in "zoom-in", "zoom-out", *MOVED:
        amount = 1.5 if "zoom" in name else 20 if "orbit" in name else 0.3
        move = camera_move(f"{name}:{amount}")
        tracks, visible = camera(depth, 5, grid=20, focal=focal, **move)
        hidden, where = 0, tracks[0].astype(int)
        assert np.array_equal(where[:20, 0], np.arange(20) * 4 + 2) and set(where[:, 1]) == {*range(1, 60, 3)}
        z = depth[where[:, 1], where[:, 0]]
        for i, t in enumerate(np.linspace(0, 1, 5)):
            def seen(points, z, t=t):
                """Where points (n, 2) of frame 0, z deep, are at time t."""
                x, y = ((points - (40, 30)) * np.reshape(z, (-1, 1)) / focal).T
                if "zoom" in name:
                    return (points - (40, 30)) * (amount ** t if name == "zoom-in" else amount ** -t) + (40, 30)
                x, y, z = MOVED[name](x, y, z - far, amount * t)
                return np.stack([x / z, y / z], -1) * focal + (40, 30)
            expected = seen(tracks[0], z)
            assert abs(tracks[i] - expected).max() < 1e-9, (name, i)
            inside = ((expected >= 0) & (expected < (80, 60))).all(1)
            box = seen(np.array([[20, 10], [60, 50], [20, 50], [60, 10.]]), near)
            low, high = box.max(0), box.min(0)
            behind = (z == far) & (expected > high + 6).all(1) & (expected < low - 6).all(1)
            clear = inside & ((z == near) | (expected < high - 6).any(1) | (expected > low + 6).any(1))
            assert not visible[i][behind | ~inside].any() and visible[i][clear].all(), (name, i)
            hidden += behind.sum()
        assert hidden or "zoom" in name or name == "out", name
    assert {"zoom-in", "zoom-out", *MOVED} == {*MOVES}
    for text in "forward", "right:0", "right:-1", "right:nan", "right:1:2":
        assert_error(UserError, "is none of left", program.parse_flags, ["--image", "x", "--out", "y", "--camera", text])


def test_what_is_magnified_hides_without_holes_and_ground_does_not_hide_itself():
    depth = np.ones((128, 128))
    depth[40:88, 40:88] = 0.35                                          # near the camera, 7 times as large then
    tracks, visible = camera(depth, 9, (0, 0, 0.3), grid=50, focal=128)
    cells = ((np.arange(50) + 0.5) / 50 * 128).astype(int)
    behind = depth[np.ix_(cells, cells)].reshape(-1) == 1
    inside = ((tracks[-1] >= 0) & (tracks[-1] < 128)).all(1)
    assert (behind & inside).sum() > 900 and not visible[-1][behind & inside].any()
    assert visible[-1][~behind & inside].all()
    y = np.mgrid[:128, :128][0]
    ground = np.where(y > 70, 60 / (y - 63.5), 10.0)                    # up to the horizon
    tracks, visible = camera(ground / np.median(ground), 9, grid=25)
    assert visible.all()


def test_depth_is_read_from_arrays_and_grey_pictures_and_from_nothing_else():
    depth = np.linspace(2, 20, 12 * 16).reshape(12, 16)
    with folder() as here:
        for name, array in ("f8", depth), ("f2", depth.astype(np.float16)), ("batch", depth[None]):
            np.save(here / f"{name}.npy", array)
            read = load_depth(here / f"{name}.npy", (160, 120))
            assert abs(read * np.median(depth) / depth - 1).max() < 1e-3, name
        grey = np.round(65535 * 2 / depth).astype(np.uint16)
        grey[0, 1] = 0
        eight = (grey // 257).astype(np.uint8)
        for name, picture, loss in (("i16", Image.fromarray(grey), 1e-3), ("i8", Image.fromarray(eight), 0.1),
                                    ("rgb", Image.fromarray(eight).convert("RGB"), 0.1),
                                    ("rgba", Image.fromarray(eight).convert("RGBA"), 0.1)):
            picture.save(here / f"{name}.png")
            with quiet() as (out, _):
                read = load_depth(here / f"{name}.png", (160, 120))
            ratio = read / read[0, 0] / (depth / 2)
            ratio[0, 1] *= 2.1 / 40 * depth[0, 1] / 2.1                 # black is 20 times as far as white
            assert abs(ratio - 1).max() < loss and "bright is read as near" in out.getvalue(), (name, ratio)
        far = np.full_like(depth, 3)
        far[:8] = np.inf                                                # the sky, most of the picture
        np.save(here / "sky.npy", far)
        tracks, visible, *_ = camera_tracks(here / "sky.npy", (160, 120), 5, 4, {"move": (0.1, 0, 0)}, 160.0)
        moved = (tracks[-1] - tracks[0]).reshape(4, 4, 2)
        assert visible.any() and abs(moved[:2]).max() < 0.1, "what is far does not move"
        assert_near(torch.from_numpy(moved[3]), torch.tensor([-16.0, 0]).expand(4, 2), 1e-3)    # 0.1 of 160
        tracks, _ = camera(depth / np.median(depth), 5, (0.1, 0, 0), grid=4, focal=16)
        np.save(here / "plain.npy", depth)
        assert abs(camera_tracks(here / "plain.npy", (160, 120), 5, 4, {"move": (0.1, 0, 0)}, 160.0)[0]
                   - 10 * tracks).max() < 1e-3, "not scaled with the image"
        for name, array, cure in (("nan", depth * np.nan, "192 of 192 depths"), ("zero", depth * 0, "inverse depth"),
                                  ("bool", depth > 9, "depth is bool"), ("flat", depth[0], "expected numbers (H, W)"),
                                  ("infinite", depth + np.inf, "all are infinite"),
                                  ("turned", depth.T, "is 12x16, its image 160x120"),
                                  ("objects", depth.astype(object), "neither an .npy"),
                                  ("none", depth[:0], "expected numbers (H, W)")):
            np.save(here / f"{name}.npy", array)
            assert_error(UserError, cure, load_depth, here / f"{name}.npy", (160, 120))
        colours = np.zeros((12, 16, 3), np.uint8)
        for name, picture, cure in (("black", colours, "is black"), ("colour", colours + (1, 2, 3), "is in colour")):
            Image.fromarray(picture.astype(np.uint8)).save(here / f"{name}.png")
            assert_error(UserError, cure, load_depth, here / f"{name}.png", (160, 120))
        (here / "text.png").write_text("no picture")
        assert_error(UserError, "text.png: damaged", load_depth, here / "text.png", (160, 120))


class Payload:
    """Unpickled, it would make a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_of_torch_save_that_hold_tensors_are_read_as_their_npz_would_be():
    rng = np.random.default_rng(0)
    tracks = (rng.random((6, 4, 2)) * 30).astype(np.float32)
    seen = rng.random((6, 4)) > 0.3
    points, hidden = torch.from_numpy(tracks), torch.from_numpy(~seen)
    with folder() as here:
        np.savez(here / "x.npz", tracks=tracks, visibility=seen, width=96, height=64, fps=24)
        expected = load_tracks(here / "x.npz", (48, 32))
        whole = {"tracks": points.requires_grad_(), "visibility": ~hidden, "width": 96, "height": torch.tensor(64),
                 "fps": torch.tensor(24)}
        for name, content in (
                ("dict.pt", whole), ("batch.pth", whole | {"tracks": points[None], "visibility": ~hidden[None, ..., None]}),
                ("tapir.pt", {"tracks": points.transpose(0, 1), "occluded": hidden.T, "width": 96, "height": 64, "fps": 24}),
                ("more.pt", whole | {"video": points, "note": "mine", "nested": {"a": points}})):
            for zipped in True, False:
                torch.save(content, here / name, _use_new_zipfile_serialization=zipped)
                found = load_tracks(here / name, (48, 32))
                assert (found["tracks"] == expected["tracks"]).all() and (found["visible"] == seen).all(), name
                assert found["fps"] == 24
        for dtype in torch.bfloat16, torch.float16, torch.float64:
            torch.save(points.detach().to(dtype), here / "one.pt")
            found = load_tracks(here / "one.pt", (48, 32), layout="tn")["tracks"]
            assert abs(found - tracks).max() < 0.2 and found.dtype == np.float32
        for cause, content in (
                ("holds a tuple; save", (points, ~hidden)), ("holds a list", [points]), ("holds a dict", {}),
                ("tracks is a list", {"tracks": [1, 2]}), ("has no array named tracks, only: a", {"a": points}),
                ("tracks is a Tensor, and no plain", {"tracks": torch.ones(3, 2).to_sparse()}),
                ("has an array of (999999, 999, 2)", {"tracks": torch.zeros(1).expand(999_999, 999, 2)}),
                ("is a pickle", {"tracks": tracks}), ("complex64", {"tracks": torch.ones(6, 4, 2) * 1j})):
            torch.save(content, here / "bad.pt")
            assert_error(UserError, f"{here / 'bad.pt'}: ", load_tracks, here / "bad.pt", (48, 32))
            assert_error(UserError, cause, load_tracks, here / "bad.pt", (48, 32))


def test_json_of_any_editor_is_read():
    text = '[[{"x": 1, "y": 2}, {"x": 3, "y": 4}]]'
    with folder() as here:
        for data in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), b"\xfe\xff" + text.encode("utf-16-be")):
            (here / "x.json").write_bytes(data)
            assert load_tracks(here / "x.json", (48, 32))["tracks"].tolist() == [[[1, 2]], [[3, 4]]]
        for data in text.encode("utf-16-le"), text.encode("utf-32"), b"[[1, 2], [\xe9]]":
            (here / "x.json").write_bytes(data)
            assert_error(UserError, "x.json: is no text in UTF-8", load_tracks, here / "x.json", (48, 32))


def test_a_tracks_file_is_never_unpickled_and_never_unpacked_beyond_the_limit():
    with folder() as here:
        np.save(here / "code.npy", np.array([Payload(here / "made")], object))
        np.savez(here / "code.npz", tracks=np.array([Payload(here / "made")], object))
        torch.save(Payload(here / "made"), here / "code.pth")
        (here / "code.pkl").write_bytes(pickle.dumps(Payload(here / "made")))
        for name in "code.pth", "code.pkl":
            assert_error(UserError, "is a pickle", load_tracks, here / name, (48, 32))
        for name in "code.npy", "code.npz":
            assert_error(UserError, "not numbers", load_tracks, here / name, (48, 32))
        assert not (here / "made").exists()
        np.savez_compressed(here / "large.npz", tracks=np.zeros((999, 9, 2)))
        assert (here / "large.npz").stat().st_size < 9999
        with unittest.mock.patch("extras.tracks.LIMIT", 9999):
            assert_error(UserError, "unpacks to", load_tracks, here / "large.npz", (48, 32))
        for shape in (1_000_001, 1, 2), (9, 20_001, 2):
            np.save(here / "long.npy", np.zeros(shape, np.int8))
            found = f"{'has an array of' if shape[1] == 1 else 'tracks have shape'} {shape}, at most 1000000"
            assert_error(UserError, found, load_tracks, here / "long.npy", (48, 32))
        with unittest.mock.patch("extras.tracks.LIMIT_TEXT", 99):
            (here / "long.json").write_text("[" + "[1, 2], " * 99 + "[3, 4]]")
            assert_error(UserError, "of others at most", load_tracks, here / "long.json", (48, 32))
        uneven = [[[1, 2]] * 3000] + [[]] * 9000
        (here / "uneven.json").write_text(json.dumps(uneven))
        with unittest.mock.patch("extras.tracks.LIMIT", 2 ** 20):
            assert_error(UserError, "has an array of (9001, 3000, 2)", load_tracks, here / "uneven.json",
                         (48, 32))


def test_tracks_are_drawn_where_they_are_and_not_where_they_are_hidden():
    vae = SimpleNamespace(encode=lambda video: video, parameters=lambda: iter([torch.zeros(1)]))
    at = torch.tensor([[30.0, 20.0], [70.0, 60.0]]).expand(1, 14, 2, 2)
    visible = torch.ones(1, 14, 2, dtype=torch.bool)
    visible[:, 5:, 1] = False
    c = replace(STUB, size=(96, 128), chunk=3)
    video = render_control(vae, sample.Motion(at, visible, None), c.size, 21)
    assert video.shape == (1, 3, 21, 96, 128) and video.min() == -1 and video.max() == 1
    lit = (video[0] > -1).any(0)                                                     # (T, H, W)
    assert lit[:14, 20, 30].all() and lit[:5, 60, 70].all() and not lit[5, 60, 70]
    assert not lit[14:].any() and lit[:14].float().mean() < 0.02
    first, second = (video[0, :, 0, y, x] for x, y in ((30, 20), (70, 60)))
    assert not first.equal(second), "tracks differ in colour"
    model, control = new_model(causal=False), rand(1, 8, 6, 4, 6)
    motion = sample.Motion(at, visible, torch.zeros(1, 2).long(), control=control)
    parts = [part["tracks"] for part in sample.conditions(model, None, rand(1, 3, 32, 48), motion, sample.Encoded())]
    assert torch.cat(parts, 2).equal(control) and [part.shape[2] for part in parts] == [3, 3]


def test_the_lines_in_docs_make_files_of_tracks():
    block, rows = recipe("tracks.md", "circle.npz"), re.findall(r"^\| [^|]+ \| `(.*np\.savez\(\"t\.npz\".*)` \|$",
                                                   (HERE / "docs/tracks.md").read_text(), re.M)
    xy, seen = np.round(rand(6, 1, 2).numpy() * 6 + (24, 16)), np.arange(6)[:, None] > 1
    with folder() as here, contextlib.chdir(here):
        exec(block)
        tracks, visible, *_ = load_tracks(Path("circle.npz"), (384, 384)).values()
        assert tracks.shape == (81, 1, 2) and visible.all() and abs(tracks[0, 0] - (105, 250)).max() < 1e-4
        tap = {"NAME": {"points": xy.swapaxes(0, 1) / (48, 32), "occluded": ~seen.T}}
        Path("a.pkl").write_bytes(pickle.dumps(tap))
        Path("a.txt").write_text("".join(f"{x:g},{y:g}\n" for x, y in xy[:, 0] / (48, 32) * 256))
        for code, expected in zip(rows, (seen, np.ones_like(seen)), strict=True):
            exec(code, {"np": np})
            tracks, visible, *_ = load_tracks(Path("t.npz"), (48, 32)).values()
            assert np.array_equal(visible, expected) and abs(tracks - xy).max() < 1e-2, code
            Path("t.npz").unlink()
