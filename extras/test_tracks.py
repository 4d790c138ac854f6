"""Tracks of other programs' files, cameras from depth, and tracks drawn."""

import contextlib
import io
import json
import math
import pickle
import re
import unittest.mock
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import sample
from extras import tracks as program
from extras.testing import (HERE, assert_error, command, folder, new_model, quiet, rand, recipe,
                            sampled, saved, seeded, workplace)
from extras.tracks import (MOVES, camera, camera_move, camera_tracks, drag_tracks, follow,
                           load_depth, load_tracks, read_path, render_control)
from motionstream import UserError, chunk_sizes

SIZE = (48, 32)             # width, height of the picture that most tracks here are on
WHOLE = (0, 0, 48, 32)


# --------------------------------------------------------------------------------------------------
# Files of tracks.

def one_motion():
    """(tracks (9, 3, 2) in eighths of a pixel, visible (9, 3))."""
    xy = rand(9, 3, 2).numpy() * 5 + (24, 16)
    xy = np.round(8 * xy) / 8
    seen = rand(9, 3, seed=1).numpy() > -0.5
    seen[0] = True
    return xy, seen


def npz_files(xy, seen):
    """{name: the arrays that a program would write of the motion}."""
    turned = xy.swapaxes(0, 1)                                          # (N, T, 2)
    ati = ati_array(xy, seen)
    return {
        "ours": {"tracks": xy, "visibility": seen},
        "cotracker": {"pred_tracks": xy[None], "pred_visibility": seen[None]},
        "cotracker_1": {"tracks": xy[None], "visibility": seen[None, ..., None]},
        "comfy": {"track_path": xy, "track_visibility": seen},
        "large": {"tracks": 2 * xy.astype(">f8"), "visibles": 0.9 * seen, "width": 96,
                  "height": 64},
        "tapir": {"tracks": turned, "occluded": ~seen.T},
        "tapvid": {"points": turned / SIZE, "occlusion": ~seen.T},
        "wantrack": {"track_points": xy / SIZE, "track_visibility": 1.0 * seen},
        "ati": {"array": ati.astype(np.float32)},
        "ati_1": {"array": np.float16(ati / 8)},
        "nan": {"tracks": np.where(seen[..., None], xy, np.nan)},
    }


def ati_array(xy, seen):
    """(N, T, 1, 3): x, y and visibility in eighths of a pixel."""
    third = np.concatenate([xy, seen[..., None]], 2)                    # (T, N, 3)
    return 8 * third.swapaxes(0, 1)[:, :, None]


def npy_files(xy, seen):
    """The same as single arrays; a name with "visibility" belongs to the one without."""
    return {
        "wan_tracks": xy[None],
        "wan_visibility": seen[None],
        "three": np.dstack([xy, seen]),
        "plain": xy,
        "plain_visibility": 1.0 * seen,
    }


def json_files(xy, seen):
    """The same as text."""
    turned = xy.swapaxes(0, 1).tolist()
    lists = []
    for path in turned:
        lists.append([{"x": x, "y": y} for x, y in path])
    nulls = xy.swapaxes(0, 1).tolist()
    for t, n in np.argwhere(~seen):
        nulls[n][t] = None
    visible = seen.T.tolist()
    return {
        "spline": json.dumps(lists),
        "quotes": str(lists),
        "strings": json.dumps([str(path) for path in lists]),
        "pairs": json.dumps({"tracks": turned, "visibility": visible, "width": 48}),
        "nulls": json.dumps({"tracks": nulls}),
    }


def motion_files(here, xy, seen):
    """Write the motion as every program would; the files that are tracks."""
    for name, arrays in npz_files(xy, seen).items():
        np.savez_compressed(here / f"{name}.npz", **arrays)
    for name, array in npy_files(xy, seen).items():
        np.save(here / f"{name}.npy", array)
    for name, text in json_files(xy, seen).items():
        (here / f"{name}.json").write_text(text)
    packed = io.BytesIO()
    np.savez(packed, array=ati_array(xy, seen).astype(np.uint16))
    torch.save(packed.getvalue(), here / "ati.pth")
    torch.save(packed.getvalue(), here / "old.pth", _use_new_zipfile_serialization=False)
    return [path for path in here.iterdir() if "_visibility" not in path.name]


def test_one_motion_in_every_format_reads_as_the_same_tracks():
    xy, seen = one_motion()
    with folder() as here:
        for path in motion_files(here, xy, seen):
            name = path.name
            with quiet() as (out, _):
                found = load_tracks(path, SIZE)
            if name in ("spline.json", "quotes.json", "strings.json"):  # do not tell what is hidden
                assert found["visible"].all(), name
            else:
                assert np.array_equal(found["visible"], seen), name
            error = abs(found["tracks"] - xy)[found["visible"]]
            assert error.max() < 1e-5, name
            assert found["tracks"].dtype == np.float32, name
            assert found["ids"] is None, name
            is_ati = name.startswith(("ati", "old"))
            assert found["fps"] == (24 if is_ati else None), name
            has_beside = name in ("wan_tracks.npy", "plain.npy")
            assert ("visibility is read from" in out.getvalue()) == has_beside, name


def test_lists_of_points_may_be_of_unequal_lengths():
    paths = [[{"x": 1, "y": 2}], [{"x": 3, "y": 4}, {"x": 5, "y": 6}]]
    with folder() as here:
        (here / "short.json").write_text(json.dumps(paths))
        found = load_tracks(here / "short.json", SIZE)
    visible = found["visible"]
    assert visible.tolist() == [[True, True], [False, True]]
    assert found["tracks"][visible].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_one_track_alone_needs_no_axis_of_tracks():
    xy, _ = one_motion()
    with folder() as here:
        np.save(here / "one.npy", xy[:, 0])
        (here / "one.json").write_text(json.dumps(xy[:, 0].tolist()))
        for name in "one.npy", "one.json":
            assert np.array_equal(load_tracks(here / name, SIZE)["tracks"], xy[:, :1]), name


# What names do not tell.

def slope():
    """Tracks (7, 12, 2) of a line of points that goes down to the right."""
    x = np.arange(12) * 3.0 + 5
    t = np.arange(7)[:, None] * 1.5
    return np.stack([x + t, 0 * x + t + 3], -1)


def test_units_and_the_size_of_another_picture_are_asked_for():
    xy = slope()
    with folder() as here:
        shares = here / "shares.npy"
        np.save(shares, xy / SIZE)
        assert_error(UserError, "extras.tracks --units 01", load_tracks, shares, SIZE)
        found = load_tracks(shares, SIZE, units="01")
        assert found["visible"].all()
        assert abs(found["tracks"] - xy).max() < 1e-4
        larger = here / "video.npz"
        np.savez(larger, tracks=xy * (9, 6))
        assert_error(UserError, "extras.tracks --size WxH", load_tracks, larger, SIZE)
        found = load_tracks(larger, SIZE, own_size=(432, 192))
        assert found["visible"].all()
        assert abs(found["tracks"] - xy).max() < 1e-4


def test_swapped_axes_are_asked_for():
    xy = slope()
    with folder() as here:
        turned = here / "turned.npy"
        np.save(turned, xy.swapaxes(0, 1))
        assert_error(UserError, "--layout nt", load_tracks, turned, SIZE, frames=7)
        found = load_tracks(turned, SIZE, layout="nt")
        assert np.array_equal(found["tracks"], np.float32(xy))
        t = np.arange(7)[:, None, None]
        fast = here / "fast.npy"                                        # jumps from frame to frame
        np.save(fast, xy[:, :4] / 40 + 30 * t % 90)
        assert_error(UserError, "--layout nt", load_tracks, fast, (900, 900))
        found = load_tracks(fast, (900, 900), layout="tn")
        assert found["tracks"].shape == (7, 4, 2)
        np.save(here / "yx.npy", xy[..., ::-1] + (0, 9))
        assert_error(UserError, "is the order y, x?", load_tracks, here / "yx.npy", (48, 16))


def test_a_visibility_by_its_name_tells_the_order_of_the_axes():
    xy = rand(12, 7, 2).numpy() * 6 + (24, 16)
    seen = np.ones((12, 7), bool)
    with folder() as here:
        np.savez(here / "frames.npz", tracks=xy, visibility=seen)
        found = load_tracks(here / "frames.npz", SIZE, frames=7)
        assert found["tracks"].shape == (12, 7, 2)
        np.savez(here / "tapir.npz", tracks=xy, visibles=seen)          # TAPIR's are (N, T) too
        assert_error(UserError, "--layout nt", load_tracks, here / "tapir.npz", SIZE, frames=7)
        np.savez(here / "alone.npz", tracks=xy)
        assert_error(UserError, "--layout nt", load_tracks, here / "alone.npz", SIZE, frames=7)


def test_visibility_may_be_a_file_of_its_own():
    seen = rand(7, 12).numpy() > 0
    with folder() as here:
        np.save(here / "good.npy", slope())
        np.save(here / "hidden.npy", seen)
        found = load_tracks(here / "good.npy", SIZE, visibility=here / "hidden.npy")
    assert np.array_equal(found["visible"], seen)


def test_what_was_written_here_is_not_doubted():
    xy = slope()
    with folder() as here:
        path = here / "certain.npz"
        for certain in xy[..., ::-1], xy / 99, xy + 99:
            np.savez(path, tracks=certain, format="motionstream")
            found = load_tracks(path, SIZE)
            assert np.array_equal(found["tracks"], np.float32(certain))


# What is refused.

def test_refused_tracks_are_refused_for_what_is_wrong_with_them():
    xy = np.ones((9, 3, 2)) * (24, 16)
    seen = np.ones((9, 3), bool)
    ati = np.full((3, 9, 1, 3), 8.0)
    cases = [
        ("visibility, the third channel of array, reaches 10", {"array": ati + 2}),
        ("array is (3, 9, 3), expected (N, T, 1, 3)", {"array": ati[:, :, 0]}),
        ("extras.tracks --units px", {"track_points": xy / 10}),
        ("holds tracks, pred_tracks: which", {"tracks": xy, "pred_tracks": xy}),
        ("holds tracks, visibility, visibles: which",
         {"tracks": xy, "visibility": seen, "visibles": seen}),
        ("has no array named tracks, only: points", {"points": xy}),
    ]
    with folder() as here:
        path = here / "x.npz"
        for cure, arrays in cases:
            np.savez(path, **arrays)
            assert_error(UserError, cure, load_tracks, path, SIZE)
        np.save(here / "v.npy", seen)
        for arrays in {"tracks": xy, "visibility": seen}, {"array": ati}:
            np.savez(path, **arrays)
            assert_error(UserError, "has a visibility of its own", load_tracks, path, SIZE,
                         visibility=here / "v.npy")
        np.savez(path, tracks=xy, width=48)
        assert_error(UserError, "is for a picture of 48x32; drop --size", load_tracks, path, SIZE,
                     own_size=(9, 32))
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as file:
            file.writestr("tracks.npy", file.read("tracks.npy"))
        assert_error(UserError, "holds tracks twice", load_tracks, path, (48, 32))
        for text in "[[[1, 2, 3], [4, 5, 6]]]", "[[[true, false]]]", "[[1, null]]":
            (here / "x.json").write_text(text)
            assert_error(UserError, "track 0 is no list of points",
                         load_tracks, here / "x.json", SIZE)


def damaged(data, rng, cut):
    """The bytes cut off somewhere, or up to 8 of them changed."""
    if cut:
        return data[:rng.integers(len(data))]
    data = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 9)):
        data[at] = rng.integers(256)
    return bytes(data)


def test_damaged_files_of_tracks_end_in_one_line():
    rng = np.random.default_rng(0)
    with folder() as here:
        xy, seen = one_motion()
        for path in sorted(motion_files(here, xy, seen)):
            whole = path.read_bytes()
            for i in range(8):
                path.write_bytes(damaged(whole, rng, cut=i % 4 == 0))
                try:
                    with quiet():
                        load_tracks(path, SIZE)
                except UserError as e:
                    assert str(e).startswith(f"{path}: "), e
                    assert "\n" not in str(e), e
                    assert "Invalid argument" not in str(e), e


def test_headers_of_python_2_are_read_without_a_warning():
    with folder() as here:
        path = here / "old.npy"
        np.save(path, np.full((9, 3, 2), 5.0))
        data = path.read_bytes()
        path.write_bytes(data.replace(b"(9, 3, 2)", b"(9L,3, 2)"))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = load_tracks(path, SIZE)
    assert found["tracks"].shape == (9, 3, 2)
    assert not warned


# Files of torch.save.

def check_torch_file(path, content, expected):
    """Saved in the new and in the old way, it holds what `expected` does."""
    for zipped in True, False:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found = load_tracks(path, SIZE)
        assert np.array_equal(found["tracks"], expected["tracks"])
        assert np.array_equal(found["visible"], expected["visible"])
        assert found["fps"] == 24


def test_files_of_torch_save_that_hold_tensors_are_read_as_their_npz_would_be():
    tracks = 30 * torch.rand(6, 4, 2, generator=seeded())
    seen = torch.rand(6, 4, generator=seeded(1)) > 0.3
    ours = {"tracks": tracks, "visibility": seen, "width": 96, "height": 64, "fps": 24}
    learnt = tracks.clone().requires_grad_()
    tensors = {"tracks": learnt, "height": torch.tensor(64), "fps": torch.tensor(24)}
    batch = {"tracks": tracks[None], "visibility": seen[None, ..., None]}
    turned = tracks.transpose(0, 1)
    tapir = {"tracks": turned, "occluded": ~seen.T, "width": 96, "height": 64, "fps": 24}
    unknown = {"video": tracks, "note": "mine", "nested": {"a": tracks}}
    with folder() as here:
        np.savez(here / "x.npz", **ours)
        expected = load_tracks(here / "x.npz", SIZE)
        assert np.array_equal(expected["visible"], seen)
        for content in ours | tensors, ours | batch, tapir, ours | unknown:
            check_torch_file(here / "x.pt", content, expected)


def test_one_tensor_of_any_float_is_tracks():
    tracks = 30 * torch.rand(6, 4, 2, generator=seeded())
    with folder() as here:
        path = here / "one.pt"
        for dtype in torch.bfloat16, torch.float16, torch.float64:
            torch.save(tracks.to(dtype), path)
            found = load_tracks(path, SIZE, layout="tn")["tracks"]
            assert found.dtype == np.float32
            assert abs(found - tracks.numpy()).max() < 0.2


def test_files_of_torch_save_that_hold_anything_else_are_refused():
    tracks = torch.rand(6, 4, 2)
    cases = [
        ("holds a tuple; save", (tracks, tracks)),
        ("holds a list", [tracks]),
        ("holds a dict", {}),
        ("tracks is a list", {"tracks": [1, 2]}),
        ("has no array named tracks, only: a", {"a": tracks}),
        ("tracks is a Tensor, and no plain", {"tracks": torch.ones(3, 2).to_sparse()}),
        ("has an array of (999999, 999, 2)", {"tracks": torch.zeros(1).expand(999_999, 999, 2)}),
        ("is a pickle", {"tracks": tracks.numpy()}),
        ("complex64", {"tracks": tracks * 1j}),
    ]
    with folder() as here:
        path = here / "bad.pt"
        for cause, content in cases:
            torch.save(content, path)
            assert_error(UserError, f"{path}: ", load_tracks, path, SIZE)
            assert_error(UserError, cause, load_tracks, path, SIZE)


def test_json_of_any_editor_is_read():
    text = '[[{"x": 1, "y": 2}, {"x": 3, "y": 4}]]'
    big_endian = b"\xfe\xff" + text.encode("utf-16-be")
    with folder() as here:
        path = here / "x.json"
        for data in text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), big_endian:
            path.write_bytes(data)
            assert load_tracks(path, SIZE)["tracks"].tolist() == [[[1, 2]], [[3, 4]]]
        for data in text.encode("utf-16-le"), text.encode("utf-32"), b"[[1, 2], [\xe9]]":
            path.write_bytes(data)
            assert_error(UserError, "x.json: is no text in UTF-8", load_tracks, path, SIZE)


class Payload:
    """Unpickled, it would make a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_tracks_file_is_never_unpickled():
    with folder() as here:
        payload = Payload(here / "made")
        objects = np.array([payload], object)
        np.save(here / "code.npy", objects)
        np.savez(here / "code.npz", tracks=objects)
        torch.save(payload, here / "code.pth")
        (here / "code.pkl").write_bytes(pickle.dumps(payload))
        for name in "code.pth", "code.pkl":
            assert_error(UserError, "is a pickle", load_tracks, here / name, SIZE)
        for name in "code.npy", "code.npz":
            assert_error(UserError, "not numbers", load_tracks, here / name, SIZE)
        assert not (here / "made").exists()


def test_a_tracks_file_is_never_unpacked_beyond_the_limit():
    with folder() as here:
        large = here / "large.npz"
        np.savez_compressed(large, tracks=np.zeros((999, 9, 2)))
        assert large.stat().st_size < 9999
        with unittest.mock.patch.object(program, "LIMIT", 9999):
            assert_error(UserError, "unpacks to", load_tracks, large, SIZE)
        long = here / "long.npy"
        np.save(long, np.zeros((1_000_001, 1, 2), np.int8))
        found = "has an array of (1000001, 1, 2), at most 1000000"
        assert_error(UserError, found, load_tracks, long, SIZE)
        np.save(long, np.zeros((9, 20_001, 2), np.int8))
        found = "tracks have shape (9, 20001, 2), at most 1000000"
        assert_error(UserError, found, load_tracks, long, SIZE)
        text = here / "long.json"
        text.write_text("[" + "[1, 2], " * 99 + "[3, 4]]")
        with unittest.mock.patch.object(program, "LIMIT_TEXT", 99):
            assert_error(UserError, "of others at most", load_tracks, text, SIZE)
        uneven = [[[1, 2]] * 3000] + [[]] * 9000                        # small, unless filled up
        text.write_text(json.dumps(uneven))
        with unittest.mock.patch.object(program, "LIMIT", 2 ** 20):
            assert_error(UserError, "has an array of (9001, 3000, 2)", load_tracks, text, SIZE)


# --------------------------------------------------------------------------------------------------
# The programs.

def converted(flags, path):
    """Exit code, stdout and stderr of python -m extras.tracks for the workplace's image, run in
    this process, which writes `path`."""
    words = flags + ["--image", workplace()[1] / "image.png", "--out", path]
    with quiet() as (out, err):
        code = program.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def sampled_with(flags):
    """The same of sample.py, which is not told any tracks but by the flags."""
    words = command()
    at = words.index("--tracks")
    words = words[:at] + words[at + 2:] + flags
    return sampled(*words)


def last_frame(flags):
    """What sample.py makes of the workplace's image: the last frame, which every track reaches."""
    path = workplace()[1] / "last.png"
    code, out, err = sampled_with(flags + ["--seed", 3, "--out", path])
    assert code == 0, err
    assert "nothing is specified" not in out, out
    picture = np.array(Image.open(path))
    path.unlink()
    return picture


def check_conversion(converted_from, sampled_from, weights):
    """A file that is made of what the first flags say gives the video that the others give."""
    here = workplace()[1]
    kept = here / "kept.npz"
    code, out, err = converted(converted_from, kept)
    assert code == 0, err
    assert out.startswith(f"{kept}: ")
    arrays = dict(np.load(kept))
    assert arrays.keys() == {"tracks", "visibility", "width", "height", "format"}
    assert (arrays["width"], arrays["height"]) == (48, 40)
    assert arrays["visibility"].dtype == bool
    model = ["--weights", here / weights]
    direct = last_frame(sampled_from + model)
    assert np.array_equal(direct, last_frame(["--tracks", kept] + model))
    code, _, err = converted([kept], here / "again.npz")
    assert code == 0, err
    for name, array in np.load(here / "again.npz").items():
        assert np.array_equal(array, arrays[name]), name
    kept.unlink()
    (here / "again.npz").unlink()


def test_a_converted_file_gives_the_video_of_what_it_was_made_of():
    here = workplace()[1]
    saved(here / "random.safetensors", new_model(track_id_mode="random"))
    before = sorted(here.iterdir())
    file = here / "tracks.npy"
    check_conversion([file], ["--tracks", file], "student.safetensors")
    drags = ["--drag=30,20 -> -9,20", "--pin=1,9", "--frames", 10]
    check_conversion(drags, drags, "random.safetensors")
    assert sorted(here.iterdir()) == before


def test_a_converted_file_says_what_is_hidden():
    xy, seen = one_motion()
    assert not seen.all()
    with folder() as here:
        np.savez(here / "x.npz", pred_tracks=xy, pred_visibility=seen)
        code, _, err = converted([here / "x.npz"], here / "kept.npz")
        assert code == 0, err
        kept = sample.read_tracks(here / "kept.npz", (48, 40))
    assert np.array_equal(kept.tracks, np.float32(xy))
    assert np.array_equal(kept.visible, seen)


def test_tracks_by_a_camera_are_written_for_sample():
    with folder() as here:
        np.save(here / "depth.npy", rand(40, 48).abs() + 1)
        kept = here / "kept.npz"
        move = ["--depth", here / "depth.npy", "--camera", "right:0.5", "--frames", 9]
        code, _, err = converted(move, kept)
        assert code == 0, err
        assert sample.read_tracks(kept, (48, 40)).tracks.shape == (9, 64, 2)


def test_a_file_that_is_read_is_not_written_over():
    with folder() as here:
        path = here / "t.npz"
        np.savez(path, tracks=slope())
        data = path.read_bytes()
        code, _, err = converted([path], path)
        assert code == 2
        assert "is a file that is read" in err
        assert path.read_bytes() == data


def bad_arrays(good):
    """Tracks that must be refused, by what is wrong with them."""
    infinite = good.copy()
    infinite[3, 1, 0] = -np.inf
    return {
        "one axis": good[:, 0, 0],
        "points of three": np.zeros((14, 3, 3), np.float32),
        "no points": good[:, :0],
        "no frames": good[:0],
        "swapped axes": good.transpose(1, 0, 2),
        "complex": good.astype(complex),
        "bool": good > 1,
        "text": good.astype(str),
        "objects": good.astype(object),
        "shares": good / 100,
        "all outside": good + 500,
        "infinite": infinite,
    }


def bad_archives(good):
    """The same of several arrays."""
    seen = np.ones(good.shape[:2], bool)
    nan = good.copy()
    nan[3, 1, 0] = np.nan
    infinite = good.copy()
    infinite[3, 1, 0] = np.inf
    return {
        "letters for a width": {"tracks": good, "width": "ten", "height": 10},
        "no width": {"tracks": good, "width": 0, "height": 10},
        "objects": {"tracks": good.astype(object)},
        "visible NaN": {"tracks": nan, "visibility": seen},
        "visible inf": {"tracks": infinite, "visibility": seen},
        "visibility turned": {"tracks": good, "visibility": seen.T},
        "logits": {"tracks": good, "visibility": seen * 3.0},
        "seven ids": {"tracks": good, "ids": np.arange(7)},
        "an id of 33 bits": {"tracks": good, "ids": np.array([0, 1, 2 ** 32])},
        "other arrays": {"points": good},
        "shares that are pixels": {"track_points": good},
        "two kinds": {"tracks": good, "pred_tracks": good},
        "two visibilities": {"tracks": good, "visibility": seen, "occluded": ~seen},
        "tenths": {"array": np.full((3, 14, 1, 3), 10.0)},
    }


def npy_header(shape):
    """The beginning of an .npy file that claims an array of this shape."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(64)


def bad_bytes(good):
    """Files that hold no tracks."""
    npy = io.BytesIO()
    np.save(npy, good)
    npz = io.BytesIO()
    np.savez(npz, tracks=good)
    return {
        "noise.npy": bytes(99),
        "half.npy": npy.getvalue()[:-20],
        "half.npz": npz.getvalue()[:300],
        "terabytes.npy": npy_header((10 ** 6, 10 ** 6, 2)),
        "negative.npy": npy_header((-1, 3, 2)),
        "a.pkl": pickle.dumps({"points": [1, 2]}),
        "uneven.json": b"[[[1, 2], [3]]]",
        "deep.json": b"[" * 99999,
        "words.json": b'[{"x": "a", "y": "b"}]',
    }


def check_refused(name, result):
    code, _, err = result
    assert code == 2, (name, code, err)
    assert re.fullmatch(r"error: [^\n]+\n", err), (name, err)


def test_a_bad_file_of_tracks_ends_in_one_line_and_exit_code_2():
    workplace_folder = workplace()[1]
    good = np.load(workplace_folder / "tracks.npy")
    with folder() as here:
        for name, array in bad_arrays(good).items():
            np.save(here / f"{name}.npy", array)
        for name, arrays in bad_archives(good).items():
            np.savez(here / f"{name}.npz", **arrays)
        for name, data in bad_bytes(good).items():
            (here / name).write_bytes(data)
        before = sorted(workplace_folder.iterdir())
        paths = list(here.iterdir())
        paths.append(workplace_folder / "student.safetensors")
        for path in paths:
            check_refused(path, converted([path], here / "kept.npz"))
            check_refused(path, sampled_with(["--tracks", path]))
            assert not (here / "kept.npz").exists(), path
            assert sorted(workplace_folder.iterdir()) == before, path


def bad_flags(here, good):
    """Flags that contradict one another or the files that are written here."""
    seen = np.ones(good.shape[:2], bool)
    np.save(here / "good.npy", good)
    np.savez(here / "seen.npz", tracks=good, visibility=seen)
    np.savez(here / "sized.npz", tracks=good, width=48, height=32)
    np.save(here / "v.npy", seen)
    np.save(here / "depth.npy", np.ones((9, 9)))
    depth = ["--depth", here / "depth.npy"]
    return [
        [here / "good.npy", "--visibility", here / "none.npy"],
        [here / "seen.npz", "--visibility", here / "v.npy"],
        [here / "sized.npz", "--size", "32x48"],
        [],
        ["--camera", "in"],
        ["--focal", "9"],
        ["--grid", "3x3"],
        ["--drag", "1,2", "--units", "km"],
        ["--drag", "1,2", "--units", "px"],
        ["--drag", "1,2", "--size", "3x3"],
        ["--drag", "1,2", "--frames", "0"],
        ["--drag", "99,2"],
        depth,
        depth + ["--camera", "in"],                                     # of another shape
        depth + ["--camera", "in", "--drag", "1,2"],
    ]


def test_flags_that_do_not_go_together_end_in_one_line_and_exit_code_2():
    good = np.load(workplace()[1] / "tracks.npy")
    with folder() as here:
        kept = here / "kept.npz"
        for flags in bad_flags(here, good):
            check_refused(flags, converted(flags, kept))
            assert not kept.exists(), flags
        six = here / "six.npy"
        np.save(six, np.tile(good[:, :1], (1, 6, 1)))                   # (14, 6, 2)
        check_refused("frames or tracks", converted([six, "--frames", 6], kept))
        check_refused("frames or tracks", sampled_with(["--tracks", six, "--frames", 6]))


# --------------------------------------------------------------------------------------------------
# Points that are dragged.

def test_drags_and_pins_are_tracks_along_lines():
    texts = ("10,20 -> 30,20 -> 30,10", " 5.5,7", "0,0->8,4")
    paths = [read_path(text) for text in texts]
    tracks = follow(paths, 9)
    assert tracks.shape == (9, 3, 2)
    assert tracks.dtype == np.float32
    t = np.arange(9)
    corner = np.stack([10 + 5 * np.minimum(t, 4), 20 - 2.5 * np.maximum(t - 4, 0)], 1)
    assert np.array_equal(tracks[:, 0], corner)
    assert (tracks[:, 1] == (5.5, 7)).all()
    assert np.array_equal(tracks[:, 2, 0], t)
    assert follow(paths, 1)[0].tolist() == [[10, 20], [5.5, 7], [0, 0]]


def test_what_is_no_drag_is_refused():
    for text in "10", "1,2 -> 3", "1,2,3", "a,b", "1,nan", "1,2 ->", "1,9e9":
        said = f"--drag, --pin: {text!r} is not x,y -> x,y"
        pins = [text]
        drags = []
        if "->" in text:
            pins, drags = drags, pins
        assert_error(UserError, said, drag_tracks, drags, pins, None, 9, SIZE, WHOLE)


def test_sample_drags_and_pins_points_of_the_image():
    out = workplace()[1] / "dragged.png"
    flags = ["--out", out, "--frames", 9]
    with unittest.mock.patch.object(sample, "fit_tracks", wraps=sample.fit_tracks) as fit:
        code, said, _ = sampled_with(flags + ["--drag", "10,20 -> 30,20", "--pin", "5,7"])
    assert code == 0, said
    given = fit.call_args.args[0]
    assert given.tracks.shape == (9, 2, 2)
    assert given.visible.all()
    code, said, err = sampled_with(flags + ["--pin", "9,9", "--drag", "9,9 -> 99,9"])
    assert code == 0, err
    assert "visible track points lie outside the video" in said
    assert "48x40 pixels is cropped, the video shows x from 0 to 48 and y from 4 to 36" in said
    out.unlink()


def test_drags_and_pins_are_told_apart_and_refused_where_the_image_is_cropped():
    cases = [
        ("--pin", "9,1", "9,1 lies in what is cropped of the image; the video shows x from 0"),
        ("--drag", "9,36.5 -> 9,9", "9,36.5 lies in what is cropped"),
        ("--drag", "9,9 -> 9,2", "9,2 lies in what is cropped"),
        ("--drag", "9,9 -> 9,3.5 -> 9,20", "9,3.5 lies in what is cropped"),
        ("--drag", "30,20", "there is no arrow"),
        ("--pin", "30,20 -> 9,9", "a pinned point stays; write --drag"),
    ]
    for flag, path, cure in cases:
        code, _, err = sampled_with(["--pin", "9,9", flag, path])
        assert code == 2
        assert err.startswith(f"error: {flag} {path}: {cure}")
        assert err.count("\n") == 1


def test_a_drag_has_to_start_inside_the_image():
    cases = [
        ("--pin", "48,20", "48,20"),
        ("--drag", "-1,20", "-1,20 -> 9,9"),
        ("--drag", "9,40.5", "9,40.5->9,9"),
        ("--pin", "480,300", "480,300"),
    ]
    for flag, start, path in cases:
        code, _, err = sampled_with(["--pin", "5,7", f"{flag}={path}"])
        assert code == 2
        assert err == f"error: {flag} {start}: outside the image, which has 48x40 pixels\n"
        assert not (workplace()[1] / "out.mp4").exists()


def test_a_grid_of_points_goes_where_one_would():
    tracks, visible = drag_tracks(["20,16 -> 28,16"], ["9,9"], "3x5", 9, SIZE, WHOLE)
    assert tracks.shape == (9, 18, 2)
    assert visible.all()
    y, x = np.mgrid[11:22:5, 15:26:5]
    start = sorted(tracks[0, :9].tolist())
    assert start == sorted(np.stack([x, y], -1).reshape(9, 2).tolist())
    moved = tracks[-1] - tracks[0]
    assert (moved[:9] == (8, 0)).all()
    assert (moved[9:] == 0).all()
    for grid in "0x5", "3", "3x0", "100x1", "axb":
        said = f"{grid!r} is not like 3x20"
        assert_error(UserError, said, drag_tracks, [], ["9,9"], grid, 9, SIZE, WHOLE)
    file = workplace()[1] / "tracks.npy"
    code, _, err = sampled_with(["--tracks", file, "--grid", "3x5"])
    assert code == 2
    assert err == "error: --grid belongs to --drag and --pin\n"


# --------------------------------------------------------------------------------------------------
# A camera that moves.

FAR = 1.0
NEAR = 0.5
FOCAL = 70.0
MIDDLE = np.array([40, 30])
SHIFTS = {                  # a camera's move, and where x, y, z of all that it sees go
    "left": (1, 0, 0), "right": (-1, 0, 0), "up": (0, 1, 0), "down": (0, -1, 0),
    "in": (0, 0, -1), "out": (0, 0, 1)}
TURNS = {"orbit-right": 1, "orbit-left": -1}        # about the point ahead at a depth of FAR
ZOOMS = {"zoom-in": 1, "zoom-out": -1}


def moved(name, amount, xy, z):
    """Where a camera that has moved by `amount` sees pixels (n, 2) of frame 0, z (n,) deep."""
    away = xy - MIDDLE
    if name in ZOOMS:
        return away * amount ** ZOOMS[name] + MIDDLE
    x, y = (away * z[:, None] / FOCAL).T
    if name in SHIFTS:
        right, down, ahead = amount * np.array(SHIFTS[name])
        x = x + right
        y = y + down
        z = z + ahead
    else:
        angle = math.radians(amount) * TURNS[name]
        beyond = z - FAR
        z = beyond * math.cos(angle) - x * math.sin(angle) + FAR
        x = x * math.cos(angle) + beyond * math.sin(angle)
    return np.stack([x / z, y / z], 1) * FOCAL + MIDDLE


def check_camera(name, amount):
    """A square nearer than the plane behind it, by geometry. Returns how many points it hides."""
    depth = np.full((60, 80), FAR)
    depth[10:50, 20:60] = NEAR
    corners = np.array([[20, 10], [60, 50], [20, 50], [60, 10]])
    tracks, visible = camera(depth, 5, grid=20, focal=FOCAL, **camera_move(f"{name}:{amount}"))
    column, row = tracks[0].astype(int).T
    assert np.array_equal(column[:20], np.arange(20) * 4 + 2)
    assert np.array_equal(row[::20], np.arange(20) * 3 + 1)
    z = depth[row, column]                                              # (N,)
    hidden = 0
    for i, t in enumerate(np.linspace(0, 1, 5)):
        reached = amount ** t if name in ZOOMS else amount * t
        expected = moved(name, reached, tracks[0], z)
        assert abs(tracks[i] - expected).max() < 1e-9, (name, i)
        square = moved(name, reached, corners, np.full(4, NEAR))
        low = square.min(0)
        high = square.max(0)
        inside = ((expected >= 0) & (expected < (80, 60))).all(1)
        far_inside = (expected > low + 6).all(1) & (expected < high - 6).all(1)
        far_outside = (expected < low - 6).any(1) | (expected > high + 6).any(1)
        behind = (z == FAR) & far_inside
        clear = (z == NEAR) | far_outside
        assert not visible[i][behind | ~inside].any(), (name, i)
        assert visible[i][clear & inside].all(), (name, i)
        hidden += behind.sum()
    return hidden


def test_a_camera_sees_planes_of_known_depth_where_geometry_has_them():
    assert MOVES.keys() == SHIFTS.keys() | TURNS.keys() | ZOOMS.keys()
    for name in SHIFTS:
        hidden = check_camera(name, 0.3)
        assert hidden or name == "out", name                        # which shows what was hidden
    for name in TURNS:
        assert check_camera(name, 20), name
    for name in ZOOMS:
        check_camera(name, 1.5)
    for text in "forward", "right:0", "right:-1", "right:nan", "right:1:2":
        flags = ["--image", "x", "--out", "y", "--camera", text]
        assert_error(UserError, "is none of left", program.parse_flags, flags)


def test_what_is_magnified_hides_without_holes_and_ground_does_not_hide_itself():
    depth = np.ones((128, 128))
    depth[40:88, 40:88] = 0.35                                      # 7 times as large in the end
    tracks, visible = camera(depth, 9, (0, 0, 0.3), grid=50, focal=128)
    cells = ((np.arange(50) + 0.5) / 50 * 128).astype(int)
    behind = depth[np.ix_(cells, cells)].reshape(-1) == 1
    inside = ((tracks[-1] >= 0) & (tracks[-1] < 128)).all(1)
    assert (behind & inside).sum() > 900
    assert not visible[-1][behind & inside].any()
    assert visible[-1][~behind & inside].all()
    y, _ = np.mgrid[:128, :128]
    ground = np.where(y > 70, 60 / (y - 63.5), 10.0)                    # up to the horizon
    _, visible = camera(ground / np.median(ground), 9, grid=25)
    assert visible.all()


# Depth, of an image of 160x120 pixels.

IMAGE = (160, 120)


def ramp():
    """Depth (12, 16) from 2 to 20."""
    return np.linspace(2, 20, 12 * 16).reshape(12, 16)


def test_depth_is_read_from_arrays():
    depth = ramp()
    with folder() as here:
        path = here / "depth.npy"
        for array in depth, depth.astype(np.float16), depth[None]:
            np.save(path, array)
            read = load_depth(path, IMAGE)
            assert abs(read * np.median(depth) / depth - 1).max() < 1e-3


def test_depth_is_read_from_grey_pictures_as_one_over_brightness():
    depth = ramp()
    grey = np.round(65535 * 2 / depth).astype(np.uint16)
    grey[0, 1] = 0
    expected = depth / 2
    expected[0, 1] = 20                                 # black is 20 times as far as the brightest
    eight = Image.fromarray((grey // 257).astype(np.uint8))
    cases = [
        (Image.fromarray(grey), 1e-3),
        (eight, 0.1),
        (eight.convert("RGB"), 0.1),
        (eight.convert("RGBA"), 0.1),
    ]
    with folder() as here:
        for picture, loss in cases:
            picture.save(here / "depth.png")
            with quiet() as (out, _):
                read = load_depth(here / "depth.png", IMAGE)
            ratio = read / read[0, 0] / expected
            assert abs(ratio - 1).max() < loss, (picture.mode, ratio)
            assert "bright is read as near" in out.getvalue()


def test_what_is_infinitely_far_does_not_move():
    depth = np.full((12, 16), 3.0)
    depth[:8] = np.inf                                  # the sky, most of the picture
    move = {"move": (0.1, 0, 0)}
    with folder() as here:
        np.save(here / "sky.npy", depth)
        tracks, visible = camera_tracks(here / "sky.npy", IMAGE, 5, 4, move, 160.0)
    assert visible.any()
    shift = (tracks[-1] - tracks[0]).reshape(4, 4, 2)
    assert abs(shift[:2]).max() < 0.1
    assert abs(shift[3] - (-16, 0)).max() < 0.016       # 0.1 of 160


def test_tracks_by_depth_are_scaled_to_the_image():
    depth = ramp()
    expected, _ = camera(depth / np.median(depth), 5, (0.1, 0, 0), grid=4, focal=16)
    with folder() as here:
        np.save(here / "plain.npy", depth)
        tracks, _ = camera_tracks(here / "plain.npy", IMAGE, 5, 4, {"move": (0.1, 0, 0)}, 160.0)
    assert abs(tracks - 10 * expected).max() < 1e-3


def test_depth_is_read_from_nothing_else():
    depth = ramp()
    black = np.zeros((12, 16, 3), np.uint8)
    arrays = [
        (depth * np.nan, "192 of 192 depths"),
        (depth * 0, "inverse depth"),
        (depth > 9, "depth is bool"),
        (depth[0], "expected numbers (H, W)"),
        (depth[:0], "expected numbers (H, W)"),
        (depth + np.inf, "all are infinite"),
        (depth.T, "is 12x16, its image 160x120"),
        (depth.astype(object), "neither an .npy"),
    ]
    pictures = [
        (black, "is black"),
        (black + np.array([1, 2, 3], np.uint8), "is in colour"),
    ]
    with folder() as here:
        for array, cure in arrays:
            np.save(here / "depth.npy", array)
            assert_error(UserError, cure, load_depth, here / "depth.npy", IMAGE)
        for picture, cure in pictures:
            Image.fromarray(picture).save(here / "depth.png")
            assert_error(UserError, cure, load_depth, here / "depth.png", IMAGE)
        (here / "text.png").write_text("no picture")
        assert_error(UserError, "text.png: damaged", load_depth, here / "text.png", IMAGE)


# --------------------------------------------------------------------------------------------------
# Tracks drawn, and what docs say.

def two_points():
    """Tracks (1, 14, 2, 2) that rest, and visible (1, 14, 2), the second for 5 frames."""
    at = torch.tensor([[30.0, 20.0], [70.0, 60.0]]).expand(1, 14, 2, 2)
    visible = torch.ones(1, 14, 2, dtype=torch.bool)
    visible[:, 5:, 1] = False
    return at, visible


def test_tracks_are_drawn_where_they_are_and_not_where_they_are_hidden():
    vae = SimpleNamespace(encode=lambda video: video, parameters=lambda: iter([torch.zeros(1)]))
    at, visible = two_points()
    video = render_control(vae, sample.Motion(at, visible, None), (96, 128), 21)
    assert video.shape == (1, 3, 21, 96, 128)
    assert video.min() == -1
    assert video.max() == 1
    lit = (video[0] > -1).any(0)                                        # (T, H, W)
    assert lit[:14, 20, 30].all()
    assert lit[:5, 60, 70].all()
    assert not lit[5, 60, 70]
    assert not lit[14:].any()
    assert lit[:14].float().mean() < 0.02
    assert not video[0, :, 0, 20, 30].equal(video[0, :, 0, 60, 70]), "tracks differ in colour"


def test_a_control_video_is_handed_over_chunk_by_chunk():
    control = rand(1, 8, 6, 4, 6)
    at, visible = two_points()
    ids = torch.zeros(1, 2).long()
    motion = sample.Motion(at, visible, ids, control=control)
    image = rand(1, 3, 32, 48)
    model = new_model(causal=False)
    chunks = sample.motion_by_chunk(motion, model.config)
    parts = []
    sizes = chunk_sizes(model.config)
    for part in sample.chunk_conditions(model, None, image, chunks, sample.Encoded(), sizes):
        parts.append(part["tracks"])
    assert [part.shape[2] for part in parts] == [3, 3]
    assert torch.cat(parts, 2).equal(control)


def test_the_recipe_in_docs_makes_a_file_of_tracks():
    with folder() as here, contextlib.chdir(here):
        exec(recipe("tracks.md", "circle.npz"))
        found = load_tracks(Path("circle.npz"), (384, 384))
    assert found["tracks"].shape == (81, 1, 2)
    assert found["visible"].all()
    assert abs(found["tracks"][0, 0] - (105, 250)).max() < 1e-4


def test_the_lines_in_docs_convert_files_of_tracks():
    page = (HERE / "docs/tracks.md").read_text()
    of_pickle, of_text = re.findall(r"^\| [^|]+ \| `(.*np\.savez\(\"t\.npz\".*)` \|$", page, re.M)
    xy = np.round(rand(6, 1, 2).numpy() * 6 + (24, 16))
    seen = np.arange(6)[:, None] > 1
    tap = {"points": xy.swapaxes(0, 1) / SIZE, "occluded": ~seen.T}
    with folder() as here, contextlib.chdir(here):
        Path("a.pkl").write_bytes(pickle.dumps({"NAME": tap}))
        exec(of_pickle, {"np": np})
        found = load_tracks(Path("t.npz"), SIZE)
        assert np.array_equal(found["visible"], seen)
        assert abs(found["tracks"] - xy).max() < 1e-2
        Path("t.npz").unlink()
        np.savetxt("a.txt", xy[:, 0] / SIZE * 256, "%g", delimiter=",")
        exec(of_text, {"np": np})
        found = load_tracks(Path("t.npz"), SIZE)
        assert found["visible"].all()
        assert abs(found["tracks"] - xy).max() < 1e-2
