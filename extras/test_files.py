"""Files from outside: what they say of themselves, what is wrong with them, and other systems."""

import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unittest.mock
from dataclasses import asdict, fields, replace

import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from extras import checkpoints, refusals, world
from extras.checkpoints import CHOICES, LIMITS, SHAPED, check_config, free_memory
from extras.testing import (COPYING, HERE, SMALL, assert_error, command, folder, linear_vae,
                            new_model, new_vae, public, same_tensors, sampled, saved, slow,
                            workplace, write_layout)
from motionstream import PRESETS, Config, MotionStream, UserError, write_file
from vae import load_vae

# --------------------------------------------------------------------------------------------------
# Configs.

# What a weights file must not say of itself, each alone.
BAD_FIELDS = {
    "dim": (10 ** 9, -40),
    "ffn_dim": ("wide",),
    "num_heads": (0, 7),
    "num_layers": (10 ** 9,),
    "in_dim": ({},),
    "track_dim": (10 ** 9,),
    "text_len": (10 ** 9,),
    "freq_dim": (255,),
    "patch_size": ([2, 2, 2],),
    "eps": (-1, "small"),
    "text_encoder": (None,),
    "track_id_mode": ("magic",),
    "clean_first": ("yes",),
    "causal": (1,),
    "shift": (0,),
    "sigmas": ([], [math.nan], [0.5, 1.0], [1.0, 0], 1.0),
    "steps": (0,),
    "guidance": ([1], [math.inf, 1]),
    "chunk": (0, "3", 1.5, None),
    "sink": (-1,),
    "window": (-1, "all"),
    "sink_decay": (2,),
    "stride": (0, 10 ** 9),
    "size": ([0, 0], [10 ** 6, 10 ** 6], [32, 47], [32]),
    "fps": (0, math.nan),
    "prompt": (5, ["a"]),
    "copies": (1,),
    "latent_std": ([1.0], [0, 0, 0, 0]),
    "unheard": (1,),
}


@functools.cache
def small_model():
    """Made once, for those who forbid to build one."""
    return new_model()


def no_model_is_built():
    built = unittest.mock.Mock(side_effect=AssertionError("a model was built"))
    return unittest.mock.patch.object(MotionStream, "__init__", built)


def assert_config_refused(text, said):
    """`said`: the config in the metadata of a weights file."""
    with folder() as here:
        path = saved(here / "a.safetensors", small_model(), config=said)
        with no_model_is_built():
            assert_error(UserError, f"{path}: ", MotionStream.from_pretrained, path)
            assert_error(UserError, text, MotionStream.from_pretrained, path)


def test_what_a_file_says_of_itself_is_checked_before_anything_is_built():
    good = asdict(SMALL)
    for name, values in BAD_FIELDS.items():
        for value in values:
            assert_config_refused(name, json.dumps(good | {name: value}))
    uneven = json.dumps(good | {"sink_decay": 0.9, "first_chunk": 1})
    assert_config_refused("sink_decay", uneven)                 # unequal chunks have no average
    copying = json.dumps(good | {"copies": True})
    assert_config_refused("in_dim", copying)                    # leaves no channels for copies


def test_a_config_that_is_no_json_of_fields_is_refused():
    for text in "", "{", "[]", "[" * 10 ** 5, "null":
        assert_config_refused("a.safetensors: the config in it cannot be read", text)


def test_a_field_that_no_config_has_is_named():
    said = "a.safetensors: the config in it has an unknown field, tracks\n"
    assert_config_refused(said, '{"tracks": 1, "dim": "wide"}')
    assert_config_refused("an unknown field, " + "x" * 80 + "\n", json.dumps({"x" * 999: 1}))
    about = new_vae().metadata() | {"config": '{"widths": 1}'}
    with folder() as here:
        save_file(whole(new_vae()), here / "a.safetensors", about)
        text = "the config in it has an unknown field, widths\n"
        assert_error(UserError, text, load_vae, here / "a.safetensors")


BAD_TINY = {
    "latent_channels": (0, "16"),
    "patch": (10 ** 9,),
    "pad": ("left",),
    "stem": (-1,),
    "tail": (1.5,),
    "encoder": ([], 5, [[12, 10 ** 9, 4, 2]], [[12, 1, 4]], [[10 ** 9, 1, 4, 2]], [[12, 1, 0, 2]],
                [[12, 1, 2, 2]]),
    "decoder": ([[12, 2, 4, 1], [8, 1, 1, 1]], [["12", 2, 4, 2]]),
    "unheard": (1,),
}
BAD_LINEAR = {
    "latent_channels": (10 ** 12,),
    "stride": (0, "8"),
    "overlap": (-1, 60),
}


def test_what_a_vae_says_of_itself_is_checked_before_anything_is_built():
    for vae, bad in (new_vae(), BAD_TINY), (linear_vae(), BAD_LINEAR):
        about = vae.metadata()
        good = json.loads(about["config"])
        for name, values in bad.items():
            for value in values:
                about["config"] = json.dumps(good | {name: value})
                assert_vae_refused(whole(vae), about)


def whole(vae):
    return {name: t.contiguous() for name, t in vae.state_dict().items()}


def assert_vae_refused(tensors, about):
    built = AssertionError("a VAE was built")
    with folder() as here, unittest.mock.patch("vae.nn.Module.__init__", side_effect=built):
        path = here / "a.safetensors"
        save_file(tensors, path, about)
        assert_error(UserError, "a.safetensors: ", load_vae, path)


def test_every_field_of_a_config_has_limits_that_all_presets_are_in():
    named = {field.name for field in fields(Config)}
    limited = LIMITS.keys() | CHOICES.keys()
    assert named - {"prompt"} == limited | set(SHAPED)          # check_config looks at the prompt
    tiny = replace(PRESETS["tiny"], latent_std=(1.0,) * 96)     # of the VAE, in a file
    presets = PRESETS | {"tiny": tiny}
    for config in list(presets.values()) + [SMALL, COPYING]:
        check_config(config, "a.safetensors")


def test_a_causal_class_beside_wans_names_streams():
    load = MotionStream.from_pretrained
    without_extras = unittest.mock.patch.dict(
        sys.modules, {"extras": None, "extras.checkpoints": None})
    with folder() as here:
        path = write_layout(here, "Wan 2.1 T2V", "Wan")
        with without_extras:
            assert not load(path).config.causal
        beside = path / "config.json"
        said = json.loads(beside.read_text())
        said["_class_name"] = "CausalWanModel"
        beside.write_text(json.dumps(said))
        with without_extras:
            text = "its config.json is not of Wan's own WanModel: needs extras/checkpoints.py"
            assert_error(UserError, text, load, path)
        config = load(path).config
    assert config.causal
    assert config.chunk == 3
    assert config.sink == 0
    assert config.window is None
    assert len(config.sigmas) == 4


# --------------------------------------------------------------------------------------------------
# Files and folders.

def test_files_are_found_and_read_as_other_systems_leave_them():
    with folder() as here:
        write_layout(here, "Wan 2.1 T2V", "Wan")
        said = (here / "config.json").read_text()
        (here / "config.json").write_text(said, "utf-16")       # of a Windows editor
        for name in (
                "._diffusion_pytorch_model.safetensors", ".DS_Store", "._x.safetensors",
                "._x.safetensors.index.json"):
            (here / name).write_bytes(b"Mac OS X")
        assert same_tensors(MotionStream.from_pretrained(here), public())
        weights = here / "diffusion_pytorch_model.safetensors"
        weights.rename(here / "wan.safetensors")
        assert same_tensors(MotionStream.from_pretrained(here), public())


def test_an_index_names_nothing_but_files_beside_it():
    with folder() as here:
        index = here / "i.json"
        for place in "../wan.safetensors", "/wan.safetensors", "a/b", "", 5, [1], "x" * 400:
            index.write_text(json.dumps({"weight_map": {"a": place}}))
            found = repr(place).replace("[1]", "(1,)")          # lists are read as tuples
            text = f"i.json: {found[:80]} is not the name of a file beside it"
            assert_error(UserError, text, MotionStream.from_pretrained, index)


def test_names_in_messages_stay_on_one_line():
    with folder() as here:
        path = here / "a\tb.safetensors"
        save_file(public() | {"a\nb\u202e": torch.zeros(2)}, path)
        text = ('a\\tb.safetensors: not a complete MotionStream; '
                'Unexpected key(s) in state_dict: "a b\\u202e"')
        assert_error(UserError, text, MotionStream.from_pretrained, path)


def having_memory(free):
    """So many bytes are free in here; None: it cannot be told."""
    return unittest.mock.patch.object(checkpoints, "free_memory", lambda device: free)


def test_what_memory_cannot_hold_is_refused_before_it_is_read():
    model = small_model()
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    load = MotionStream.from_pretrained
    with folder() as here:
        path = saved(here / "a.safetensors", model)
        with having_memory(needed - 1):
            assert_error(UserError, f"a.safetensors: needs {needed / 1e9:.1f} GB", load, path)
        with having_memory(needed // 3):
            assert_error(UserError, "GB are free on cpu", load, path, dtype=torch.float16)
        with having_memory(needed):
            load(path)
        with having_memory(None):
            load(path)
        loaded = unittest.mock.patch(
            "sample.copy_weights", side_effect=AssertionError("a model was loaded"))
        with having_memory(10 ** 4), loaded:
            code, _, err = sampled(*command("--weights", path))
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+ needs 0.0 GB of memory[^\n]+\n", err), err
    free = free_memory(torch.device("cpu"))
    assert free is None or free > needed


def test_a_file_that_cannot_be_written_says_why():
    full = OSError(28, "No space left on device")
    torchs = RuntimeError("PytorchStreamWriter failed\nmore")
    denied = PermissionError(13, "Permission denied")

    def save(error, path):
        raise error

    with folder() as here:
        path = here / "x.pt"
        for error, text in (
                (full, "x.pt: cannot be written: No space left on device ("),
                (torchs, "x.pt: cannot be written: PytorchStreamWriter"),
                (denied, "x.pt: cannot be written: Permission denied (")):
            failing = functools.partial(save, error)
            assert_error(OSError, text, write_file, path, failing)
            assert_error(OSError, "MB were free there)", write_file, path, failing)
        gone = here / "gone/x.pt"
        text = "gone/x.pt: cannot be written: No such file"
        assert_error(OSError, text, write_file, gone, lambda path: path.write_text("x"))


# --------------------------------------------------------------------------------------------------
# Pictures and words.

def test_pictures_are_refused_for_what_is_wrong_with_them():
    with folder() as here:
        large = here / "large.png"
        Image.new("RGB", (40, 30)).save(large)
        whole = large.read_bytes()
        (here / "half.png").write_bytes(whole[:-40])
        (here / "text.png").write_text("hello")
        Image.new("F", (4, 4)).save(here / "floats.tiff")
        for name, text in (
                ("half.png", "cannot be read as a picture; save it again as .png, or smaller ("),
                ("text.png", "cannot identify image file"),
                ("floats.tiff", "its pixels are floats"),
                ("none.png", "No such file"),
                (".", "Is a directory")):
            assert_error(UserError, text, sample.load_image, here / name)
        with unittest.mock.patch.object(Image, "MAX_IMAGE_PIXELS", 500):
            text = ("large.png: cannot be read as a picture; save it again as .png, or smaller "
                    "(Image size (1200 pixels) exceeds limit of 1000 pixels")
            assert_error(UserError, text, sample.load_image, large)
    unnamed = io.BytesIO(b"hello")
    assert_error(UserError, "the picture: cannot be read as a picture", sample.load_image, unnamed)


def test_a_crop_of_the_image_is_said():
    size = (32, 48)
    assert sample.shown_part((96, 64), size) == (0, 0, 96, 64)
    shown = sample.shown_part((48, 40), size)
    assert refusals.part_in_words(shown) == "x from 0 to 48 and y from 4 to 36"
    shown = sample.shown_part((100, 32), size)
    assert refusals.part_in_words(shown) == "x from 26 to 74 and y from 0 to 32"


def test_the_words_of_the_tiny_model_are_those_of_the_drawn_world():
    captions = []
    for light in range(len(world.LIGHT)):
        for motion in range(len(world.MOTION)):
            captions.append(world.caption(light, motion))
    words = re.findall(r"\w+", " ".join(captions))
    assert set(words) == set(refusals.WORDS)
    parser = sample.Parser()
    sample.add_flags(parser)
    said = parser.format_help()
    for word in refusals.WORDS:
        assert word in said, f"--help does not name {word}"


def test_words_that_the_tiny_model_never_read_are_named():
    strange = "a cat, fading light; A dog shapes more"
    known = "Warming light, spinning SHAPES"
    said = {}
    with folder() as here:
        words = command("--frames", 1, "--out", here / "words.png")
        for prompt in strange, known:
            code, said[prompt], _ = sampled(*words, "--prompt", prompt)
            assert code == 0
    out = said[strange]
    assert "never learned a, cat, dog, more, which" in out
    assert "it knows steady, fading, warming, light" in out
    assert f"only the first 5 words of '{strange}' are read" in out
    out = said[known]
    assert "learned" not in out
    assert "are read" not in out


# --------------------------------------------------------------------------------------------------
# Systems.

# What is missing elsewhere goes before sample.py is imported.
LACKING = """
import fcntl, os, pwd, signal, sys

if hasattr(signal, "SIGPIPE"):
    del signal.SIGPIPE                                          # as on Windows

sync = os.fsync
def only_written(number):
    mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    assert mode != os.O_RDONLY, "Windows syncs only what is open for writing"
    sync(number)
os.fsync = only_written

def nobody(*_):
    raise KeyError("no such user")
pwd.getpwuid = nobody                                           # a container's user

import sample, extras.encoders, extras.bench
assert extras.encoders.cache_folder().name == "motionstream"
assert sample.main(sys.argv[1:]) == 0
"""


@slow
def test_programs_run_on_consoles_and_systems_that_lack_something():
    _, here = workplace()
    environ = dict(os.environ)
    environ.pop("HOME", None)
    environ.pop("XDG_CACHE_HOME", None)
    environ["PYTHONIOENCODING"] = "cp1252:strict"               # a console without these letters
    with folder() as mine:
        picture = mine / "\u732b\u2026.png"
        out = mine / "\u0444.PNG"
        shutil.copy(here / "image.png", picture)
        flags = command("--image", picture, "--out", out, "--frames", 1)
        words = [sys.executable, "-c", LACKING] + [str(flag) for flag in flags]
        done = subprocess.run(words, cwd=HERE, capture_output=True, env=environ)
        assert done.returncode == 0, done.stderr.decode()
        assert out.is_file()
    last = done.stdout.decode("cp1252").splitlines()[-1]
    assert last.endswith("\\u0444.PNG")


def test_a_program_whose_output_was_closed_before_it_began_ends_well():
    with unittest.mock.patch("sys.stdout", None):               # as by >&-, or Windows' pythonw
        assert sample.reported(lambda: 0) == 0
