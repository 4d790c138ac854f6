"""Damage to files that users bring: whatever of one is changed, it is read or refused in one line.

A training's checkpoint has checksums, and is read as written or not at all. The public formats
of weights have none: there a flipped bit of a number may go unseen, but else the same holds.
"""

import copy
import functools
import io
import json
import math
import operator
import random
import time
import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import save_file

import train_distill as td
from extras.checkpoints import check_config, check_vae_config
from extras.testing import (TAEW21, WAN, WAN21, folder, linear_vae, new_model, new_vae, quiet,
                            randomised, sampled, saved, slow, without_head, workplace)
from motionstream import MotionStream, UserError
from vae import WanVAE, load_vae

FEW = 40            # changes of a kind of file, with each run of the tests
MANY = 2000         # with --slow
SECONDS = 20        # of computing, to read or refuse a small file


# --------------------------------------------------------------------------------------------------
# Changes of bytes. Each gets a bytearray, which it may change, and returns what the file is then.

def place_in(data, rng):
    """A place in the data, often near its begin or end, where the formats have their tables."""
    low, high = rng.choice([(0, 4000), (len(data) - 4000, len(data)), (0, len(data))])
    return rng.randrange(max(low, 0), min(high, len(data)))


def piece_of(data, rng):
    """A slice of the data, of up to 200 bytes."""
    at = place_in(data, rng)
    return slice(at, at + rng.randrange(1, 200))


def flip_bits(data, rng):
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[place_in(data, rng)] ^= 1 << rng.randrange(8)
    return data


def overwrite(data, rng):
    for _ in range(rng.choice([1, 2, 9])):
        data[place_in(data, rng)] = rng.choice([0, 34, 128, 255, rng.randrange(256)])
    return data


def cut_end(data, rng):
    return data[:rng.randrange(len(data))]


def cut_out(data, rng):
    del data[piece_of(data, rng)]
    return data


def double(data, rng):
    piece = piece_of(data, rng)
    data[piece.start:piece.start] = data[piece]
    return data


def blank(data, rng):
    piece = piece_of(data, rng)
    data[piece] = bytes(len(data[piece]))
    return data


def swap(data, rng):
    one = piece_of(data, rng)
    other = piece_of(data, rng)
    data[one], data[other] = data[other], data[one]
    return data


WAYS = flip_bits, overwrite, cut_end, cut_out, double, blank, swap


def change_bytes(whole, rng):
    return bytes(rng.choice(WAYS)(bytearray(whole), rng))


# --------------------------------------------------------------------------------------------------
# Changes of what is said in a file.

STRANGE = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 10 ** 4, 2 ** 31, 2 ** 63, 10 ** 30,
    0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf,
    "", "3", "nan", "umt5", "\n", "\ud800", "x" * 9999,
    [], [1], [None], [1, 2, 3], ["a", "b"], [[1, 2], [3]], [32, 48], [1.0, 0.5],
    {}, {"a": 1}, [{}], [[[[]]]])


def change_value(value, rng):
    """A JSON value with one of its parts, at some depth, replaced, dropped, doubled or renamed."""
    if type(value) in (int, float) and rng.random() < 0.5:
        return rng.choice([value + 1, value * 2, value / 2, str(value)])
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(STRANGE)
    value = copy.copy(value)
    way = rng.random()
    if isinstance(value, list):
        at = rng.randrange(len(value))
        if way < 0.2:
            value.pop(at)
        elif way < 0.4:
            value.insert(at, value[at])
        else:
            value[at] = change_value(value[at], rng)
        return value
    name = rng.choice(sorted(value))
    if way < 0.1:
        value.pop(name)
    elif way < 0.2:
        value[name.swapcase()] = value.pop(name)
    else:
        value[name] = change_value(value[name], rng)
    return value


def change_config(whole, rng):
    """A .safetensors file, the config in its metadata changed as JSON or letter by letter."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + length])
    about = header["__metadata__"]
    text = about["config"]
    if rng.random() < 0.2:
        text = change_bytes(text.encode(), rng).decode("utf-8", "replace")
    else:
        text = json.dumps(change_value(json.loads(text), rng))
    about["config"] = text
    if rng.random() < 0.1:
        header["__metadata__"] = change_value(about, rng)
    start = json.dumps(header).encode()
    return len(start).to_bytes(8, "little") + start + whole[8 + length:]


ODD_ARRAYS = (
    np.zeros(0), np.zeros((0, 0, 2)), np.full((13, 2, 2), np.nan), np.full((13, 2, 2), 1e300),
    np.full((13, 2), True), np.full((13, 2, 2), 1 + 1j), np.array("x"), np.array(["x", "y"]),
    np.array([1, 2]), np.array([[1.5, 2]]), np.array(b"\xff"), np.array(["1", "1"], "S"),
    np.datetime64("2020"), np.zeros(2, [("a", int), ("b", float)]), np.array(["a"], object),
    np.array(-1), np.array(0), np.array(1.5), np.array(1e30), np.array(np.inf), np.array(np.nan),
    np.array(2 ** 63, np.uint64), np.array(10 ** 9), np.array("nan"), np.array("3"), np.array("\n"))


def change_arrays(whole, rng):
    """An .npz file of which one or two arrays are others."""
    arrays = dict(np.load(io.BytesIO(whole)))
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(arrays))
        way = rng.random()
        if way < 0.15:
            arrays.pop(name)
        elif way < 0.35:
            arrays[name] = arrays[rng.choice(sorted(arrays))]
        elif way < 0.45:
            arrays[name] = arrays[name][None]
        else:
            arrays[name] = rng.choice(ODD_ARRAYS)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------
# What is to come of them.

def read_or_refused(read, path):
    """What read(path) returns; None if it raises a UserError, of one line that names the file. It
    may do nothing else, nor print or warn."""
    found = None
    begun = time.process_time()
    with quiet() as (out, err), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)        # which Python does not show
        try:
            found = read(path)
        except UserError as e:
            assert str(e).startswith(f"{path}: "), e
            assert "\n" not in str(e), e
    assert not out.getvalue(), out.getvalue()
    assert not err.getvalue(), err.getvalue()
    assert not warned, warned[0].message
    assert time.process_time() - begun < SECONDS
    return found


def refusals(path, change, read, right, count):
    """Change the file at `path` so often, each time from what it is now. Returns how often it was
    refused; else right(what was read) has to be true."""
    assert right(read_or_refused(read, path)), "as it is"
    whole = path.read_bytes()
    refused = 0
    for number in range(count):
        path.write_bytes(change(whole, random.Random(number)))
        try:
            found = read_or_refused(read, path)
            assert found is None or right(found), "something else was read"
        except Exception as e:
            raise AssertionError(f"change {number} of {path.name}: {type(e).__name__}: {e}") from e
        refused += found is None
    path.write_bytes(whole)
    return refused


def shapes_of(model):
    return {name: t.shape for name, t in model.state_dict().items()}


def all_finite(model):
    return all(t.isfinite().all() for t in model.state_dict().values())


# A DiT with Wan's names, as small as its rules allow: heads have 128 channels.
LITTLE = replace(WAN, dim=128, ffn_dim=32, num_heads=1, num_layers=1, freq_dim=16, text_dim=8)


@functools.cache
def wan_tensors():
    return {name: t.half() for name, t in without_head(randomised(MotionStream(LITTLE))).items()}


def refused_weights(count):
    """Of changed .pt files of weights."""
    refused = 0
    with folder() as here:
        torch.save({"generator_ema": wan_tensors(), "step": 600}, here / "student.pt")
        torch.save(wan_tensors(), here / "old.pt", _use_new_zipfile_serialization=False)
        paths = sorted(here.iterdir())
        for path in paths:
            expected = shapes_of(MotionStream.from_pretrained(path))

            def right(model):
                return shapes_of(model) == expected and all_finite(model)

            load = MotionStream.from_pretrained
            refused += refusals(path, change_bytes, load, right, count // len(paths))
    return refused


def refused_vaes(count):
    """Of changed files of VAEs."""
    refused = 0
    with folder() as here:
        saved(here / "tiny.safetensors", new_vae())
        linear = linear_vae()
        tensors = {name: t.contiguous() for name, t in linear.state_dict().items()}
        save_file(tensors, here / "linear.safetensors", linear.metadata())
        torch.save(randomised(WanVAE(WAN21)).state_dict(), here / "wan.pth")
        taehv = replace(TAEW21, stem=4, encoder=((4, 3, 2, 2), (4, 3, 2, 2), (4, 3, 1, 2)),
                        decoder=((4, 3, 1, 2), (4, 3, 2, 2), (4, 3, 2, 2)), tail=4)
        torch.save(new_vae(taehv).state_dict(), here / "taehv.pth")
        paths = sorted(here.iterdir())
        for path in paths:
            expected = shapes_of(load_vae(path))

            def right(vae):
                return shapes_of(vae) == expected and all_finite(vae)

            refused += refusals(path, change_bytes, load_vae, right, count // len(paths))
    return refused


def runs(model):
    """Whether a DiT is within a config's limits, and has a velocity for a latent of 4x6 cells."""
    c = model.config
    check_config(c, "x")
    x = torch.zeros(1, c.out_dim, 1, 4, 6)
    velocity = model(x, torch.ones(1), torch.zeros(1, 2, c.text_dim))
    return velocity.shape == x.shape and velocity.isfinite().all()


def encodes(vae):
    """Whether a VAE has latents and a video again, of one frame of 8x8 cells."""
    check_vae_config(vae.config, "x")
    size = 8 * vae.stride
    latents = vae.encode(torch.zeros(1, 3, 1, size, size))
    video, _ = vae.decode(latents)
    return video.shape[2:] == (1, size, size) and video.isfinite().all()


def refused_configs(count):
    """Of changed configs in the metadata of weights: of a DiT, and of two VAEs."""
    refused = 0
    with folder() as here:
        dit = saved(here / "dit.safetensors", new_model())
        tiny = saved(here / "tiny.safetensors", new_vae())
        linear = linear_vae()
        tensors = {name: t.contiguous() for name, t in linear.state_dict().items()}
        save_file(tensors, here / "linear.safetensors", linear.metadata())
        load = MotionStream.from_pretrained
        refused += refusals(dit, change_config, load, runs, count // 2)
        for path in tiny, here / "linear.safetensors":
            refused += refusals(path, change_config, load_vae, encodes, count // 4)
    return refused


def new_recording(path):
    """Write a recording of 13 frames, as the page does."""
    rng = np.random.default_rng(0)
    tracks = rng.uniform(5, 30, (13, 2, 2)).astype(np.float32)
    tracks[:5, 1] = np.nan
    np.savez(path, tracks=tracks, visibility=~np.isnan(tracks[..., 0]), ids=np.array([0, 5]),
             start=np.zeros((2, 2), np.float32), prompts=["", "fading light"], track_id_mode="same",
             seed=7, chunk=1, sink=2, window=-1, steps=3, fps=12.0, dtype="float32", frames=13,
             weights=5, width=48, height=40, format="motionstream")


def play(recording):
    """The bytes of sample.py's first frame of a recording, NAME.npz. UserError if it refuses."""
    here = workplace()[1]
    out = recording.with_name("first.png")
    code, _, err = sampled(
        "--image", here / "image.png", "--tracks", recording,
        "--weights", here / "student.safetensors", "--vae", here / "vae.safetensors",
        "--frames", 1, "--out", out)
    if code == 2:
        line, = err.splitlines()
        raise UserError(line.removeprefix("error: "))
    assert code == 0
    assert err == ""
    return out.read_bytes()


def refused_recordings(count):
    """Of recordings with changed bytes, and with changed arrays."""
    with folder() as here:
        path = here / "recorded.npz"
        new_recording(path)
        first = play(path)
        refused = refusals(path, change_bytes, play, first.__eq__, count // 2)
        return refused + refusals(path, change_arrays, play, bool, count // 2)


def toy():
    """A learner of a training."""
    return td.Learner("toy", nn.Linear(3, 2), td.Learning(None, 1e-3, ema=0.9))


def save_two(here):
    """Write two checkpoints of a training, one after the other; what the second is of."""
    learner = toy()
    for updates in 1, 2:
        learner.backward(learner.model(torch.ones(1, 3)).sum())
        learner.update(0)
        td.save_checkpoint(here, "toy", updates, {"lr": 1e-3}, [learner])
    return learner


def as_bytes(value):
    """What a checkpoint holds, to compare."""
    if torch.is_tensor(value):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: as_bytes(each) for name, each in value.items()}
    if isinstance(value, list | tuple):                         # torch makes lists of tuples
        return [as_bytes(each) for each in value]
    return value


def resumed(path):
    """What a training resumes from in a folder whose newest checkpoint is `path`; None: from the
    one before it, which is said in one line."""
    learner = toy()
    with quiet() as (out, _):
        updates = td.load_checkpoint(path.parent, "toy", {"lr": 1e-3}, [learner])
    *said, last = out.getvalue().splitlines()
    assert last == f"toy.000000{updates}.checkpoint.pt: resumed at update {updates}"
    if updates == 1:
        line, = said
        assert line.startswith(f"{path}: damaged ("), line
        return None
    assert not said
    return as_bytes(learner.state_dict())


def refused_checkpoints(count):
    """Of changed checkpoints, with a whole one before it and without."""
    with folder() as here:
        learner = save_two(here)
        is_as_written = functools.partial(operator.eq, as_bytes(learner.state_dict()))
        path = td.checkpoint_path(here, "toy", 2)
        refused = refusals(path, change_bytes, resumed, is_as_written, count // 2)
        td.checkpoint_path(here, "toy", 1).unlink()
        return refused + refusals(path, change_bytes, resumed, is_as_written, count // 2)


# --------------------------------------------------------------------------------------------------
# The tests. Most changes are seen, so most files are refused.

def test_changed_checkpoints_are_read_as_written_or_not_at_all():
    assert FEW / 2 < refused_checkpoints(FEW) <= FEW


def test_changed_weights_load_or_are_refused_in_one_line():
    assert FEW / 2 < refused_weights(FEW) <= FEW


def test_changed_vaes_load_or_are_refused_in_one_line():
    assert FEW / 2 < refused_vaes(FEW) <= FEW


def test_changed_configs_are_of_a_model_that_runs_or_refused_in_one_line():
    assert FEW / 2 < refused_configs(FEW) <= FEW


def test_changed_recordings_are_played_or_refused_in_one_line():
    assert FEW / 4 < refused_recordings(FEW // 2) <= FEW // 2


@slow
def test_two_thousand_changes_of_each_kind_of_file():
    for refused in (
        refused_checkpoints, refused_weights, refused_vaes, refused_configs, refused_recordings,
    ):
        count = refused(MANY)
        print(f"{refused.__name__}: {count} of {MANY}")
        assert MANY / 2 < count < MANY
