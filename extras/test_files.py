"""Files from outside: what they say of themselves, what is wrong with them, and systems that are not this one."""

import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unittest
import unittest.mock
from dataclasses import asdict, fields, replace

import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from extras.testing import (COPYING, HERE, SMALL, assert_error, command, folder, new_model, new_vae, public, randomised,
                            same_tensors, sampled, saved, workplace, write_layout)
from motionstream import (CHOICES, LIMITS, PRESETS, Config, MotionStream, UserError, check_config,
                          config_from_shapes, free_memory, write)
from vae import LinearVAE, LinearVAEConfig, load_vae

# ----------------------------------------------------------------------------------------------------------------------
# Weights.

# What a weights file must not say of itself, each alone.
BAD_CONFIG = [
    ("chunk", 0), ("chunk", "3"), ("chunk", 1.5), ("chunk", None), ("sigmas", []), ("sigmas", [math.nan]),
    ("sigmas", [0.5, 1.0]), ("sigmas", [1.0, 0]), ("sigmas", 1.0), ("size", [0, 0]), ("size", [10 ** 6, 10 ** 6]),
    ("size", [32, 47]), ("size", [32]), ("text_len", 10 ** 9), ("sink", -1), ("window", -1), ("window", "all"), ("fps", 0),
    ("fps", math.nan), ("prompt", 5), ("prompt", ["a"]), ("track_id_mode", "magic"), ("text_encoder", None), ("causal", 1),
    ("clean_first", "yes"), ("dim", 10 ** 9), ("dim", -40), ("num_heads", 0), ("num_heads", 7), ("num_layers", 10 ** 9),
    ("ffn_dim", "wide"), ("steps", 0), ("guidance", [1]), ("guidance", [math.inf, 1]), ("shift", 0), ("stride", 0),
    ("stride", 10 ** 9), ("eps", -1), ("eps", "small"), ("latent_std", [1.0]), ("latent_std", [0, 0, 0, 0]),
    ("freq_dim", 255), ("sink_decay", 2), ("copies", 1), ("copies", True), ("patch_size", [2, 2, 2]), ("track_dim", 10 ** 9), ("in_dim", {}), ("unheard", 1)]


def test_what_a_file_says_of_itself_is_checked_before_anything_is_built():
    built = unittest.mock.Mock(side_effect=AssertionError("a model was built"))
    fields = asdict(SMALL)
    new_small()
    with folder() as here, unittest.mock.patch.object(MotionStream, "__init__", built):
        for name, value in BAD_CONFIG:
            path = saved(here / "a.safetensors", new_small(), config=json.dumps(fields | {name: value}))
            assert_error(UserError, f"{path}: ", MotionStream.from_pretrained, path)
            assert_error(UserError, "in_dim" if value is True else name, MotionStream.from_pretrained, path)
        for text in "", "{", "[]", "[" * 10 ** 5, "null", '{"tracks": 1}':
            path = saved(here / "a.safetensors", new_small(), config=text)
            assert_error(UserError, f"{path}: the config in it cannot be read", MotionStream.from_pretrained, path)


@functools.cache
def new_small():
    """Of SMALL; made once, for those who forbid to build it again."""
    return new_model()


def test_what_a_vae_says_of_itself_is_checked_before_anything_is_built():
    tiny, linear = new_vae(), randomised(LinearVAE(LinearVAEConfig(4)))
    bad_tiny = [("latent_channels", 0), ("latent_channels", "16"), ("patch", 10 ** 9), ("pad", "left"), ("stem", -1),
                ("tail", 1.5), ("encoder", []), ("encoder", 5), ("encoder", [[12, 10 ** 9, 4, 2]]), ("encoder", [[12, 1, 4]]),
                ("encoder", [[10 ** 9, 1, 4, 2]]), ("encoder", [[12, 1, 0, 2]]), ("encoder", [[12, 1, 2, 2]]),
                ("decoder", [[12, 2, 4, 1], [8, 1, 1, 1]]), ("decoder", [["12", 2, 4, 2]]), ("unheard", 1)]
    bad_linear = [("latent_channels", 10 ** 12), ("stride", 0), ("stride", "8"), ("overlap", -1), ("overlap", 60)]
    with folder() as here:
        for vae, cases in (tiny, bad_tiny), (linear, bad_linear):
            about = vae.metadata()
            for name, value in cases:
                config = json.dumps(json.loads(about["config"]) | {name: value})
                save_file({n: t.contiguous() for n, t in vae.state_dict().items()}, here / "a.safetensors",
                          about | {"config": config})
                with unittest.mock.patch("vae.nn.Module.__init__", side_effect=AssertionError("a VAE was built")):
                    assert_error(UserError, "a.safetensors: ", load_vae, here / "a.safetensors")


def test_every_field_of_a_config_has_limits_that_all_presets_are_in():
    named = {field.name for field in fields(Config)}
    told = config_from_shapes(new_small().state_dict(), "a.safetensors").keys()     # by the tensors
    assert named - {"prompt"} == LIMITS.keys() | CHOICES.keys() | told      # which is looked at by check_config
    tiny = replace(PRESETS["tiny"], latent_std=(1.0,) * 96)         # of the VAE, in a file
    for config in (*PRESETS.values(), tiny, SMALL, COPYING):
        if config.copies and not config.latent_std:
            continue
        check_config(config, "a.safetensors")


def test_a_causal_class_beside_wans_names_streams():
    without_extras = unittest.mock.patch.dict(sys.modules, {"extras": None, "extras.checkpoints": None})
    with folder() as here:
        path = write_layout(here, "Wan 2.1 T2V", "Wan")
        with without_extras:
            assert not MotionStream.from_pretrained(path).config.causal
        said = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(said | {"_class_name": "CausalWanModel"}))
        with without_extras:
            assert_error(UserError, "config.json: not of Wan's own WanModel; extras/checkpoints.py",
                         MotionStream.from_pretrained, path)
        config = MotionStream.from_pretrained(path).config
        assert config.causal and (config.chunk, config.sink, config.window) == (3, 0, None) and len(config.sigmas) == 4


def test_files_are_found_and_read_as_other_systems_leave_them():
    with folder() as here:
        write_layout(here, "Wan 2.1 T2V", "Wan")
        (here / "config.json").write_text((here / "config.json").read_text(), "utf-16")     # of a Windows editor
        for name in "._diffusion_pytorch_model.safetensors", ".DS_Store", "._x.safetensors", "._x.safetensors.index.json":
            (here / name).write_bytes(b"Mac OS X")
        assert same_tensors(MotionStream.from_pretrained(here), public())
        (here / "diffusion_pytorch_model.safetensors").rename(here / "wan.safetensors")
        assert same_tensors(MotionStream.from_pretrained(here), public())
        for place in "../wan.safetensors", "/wan.safetensors", "a/b", "", 5, [1], "x" * 400:
            (here / "i.json").write_text(json.dumps({"weight_map": {"a": place}}))
            found = repr(place if place != [1] else (1,))[:80]
            assert_error(UserError, f"i.json: {found} is not the name of a file beside it", MotionStream.from_pretrained,
                         here / "i.json")


def test_names_in_messages_stay_on_one_line():
    with folder() as here:
        save_file(public() | {"a\nb\u202e": torch.zeros(2)}, here / "a\tb.safetensors")
        assert_error(UserError, "a\\tb.safetensors: not a complete MotionStream; 1 tensors are unknown: a\\nb\\u202e",
                     MotionStream.from_pretrained, here / "a\tb.safetensors")


def test_what_memory_cannot_hold_is_refused_before_it_is_read():
    model = new_model()
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with folder() as here:
        path = saved(here / "a.safetensors", model)
        for free, dtype in (needed - 1, None), (needed // 3, torch.float16):
            with unittest.mock.patch("motionstream.free_memory", lambda device: free):
                assert_error(UserError, f"a.safetensors: needs {needed / 1e9:.1f} GB" if not dtype else "GB are free on cpu",
                             MotionStream.from_pretrained, path, dtype=dtype)
        for free in needed, None:
            with unittest.mock.patch("motionstream.free_memory", lambda device: free):
                MotionStream.from_pretrained(path)
        with unittest.mock.patch("motionstream.free_memory", lambda device: 10 ** 4), \
                unittest.mock.patch("sample.load_vae", side_effect=AssertionError("a model was loaded")):
            code, _, err = sampled(*command("--weights", path))
            assert code == 2 and re.fullmatch(r"error: [^\n]+ needs 0.0 GB of memory[^\n]+\n", err), err
    assert free_memory(torch.device("cpu")) is None or free_memory(torch.device("cpu")) > needed


# ----------------------------------------------------------------------------------------------------------------------
# Pictures, words, systems.

def test_pictures_are_refused_for_what_is_wrong_with_them():
    with folder() as here:
        Image.new("RGB", (40, 30)).save(here / "large.png")
        with unittest.mock.patch.object(Image, "MAX_IMAGE_PIXELS", 500):
            assert_error(UserError, "large.png: too large a picture: Image size (1200 pixels) exceeds limit of 1000 pixels; save",
                         sample.load_image, here / "large.png")
        whole = (here / "large.png").read_bytes()
        (here / "half.png").write_bytes(whole[:-40])
        (here / "text.png").write_text("hello")
        Image.new("F", (4, 4)).save(here / "floats.tiff")
        for name, text in (("half.png", "cannot be read as a picture ("), ("text.png", "not a picture of a kind that Pillow"),
                           ("floats.tiff", "its pixels are floats"), ("none.png", "No such file"), (".", "Is a directory")):
            assert_error(UserError, text, sample.load_image, here / name)
        assert_error(UserError, "the picture: not a picture", sample.load_image, io.BytesIO(b"hello"))


def test_words_that_the_tiny_model_never_read_are_named():
    from extras import world
    captions = {world.caption(light, motion) for light in range(len(world.LIGHT)) for motion in range(len(world.MOTION))}
    assert {word for text in captions for word in re.findall(r"\w+", text)} == set(sample.WORDS)
    _, here = workplace()
    words = [*command("--frames", 1, "--out", here / "words.png")]
    code, out, _ = sampled(*words, "--prompt", "a cat, fading light; A dog shapes more")
    assert code == 0 and "never learned a, cat, dog, more, which" in out and "it knows steady, fading, warming, light" in out
    assert "only the first 5 words of 'a cat, fading light; A dog shapes more' are read" in out
    code, out, _ = sampled(*words, "--prompt", "Warming light, spinning SHAPES")
    assert code == 0 and "learned" not in out and "are read" not in out, out
    (here / "words.png").unlink()
    parser = sample.Parser()
    sample.add_flags(parser)
    assert all(word in parser.format_help() for word in sample.WORDS)


def test_a_crop_of_the_image_is_said():
    for image, size, part in (((48, 40), (32, 48), "x from 0 to 48 and y from 4 to 36"), ((96, 64), (32, 48), None),
                              ((100, 32), (32, 48), "x from 26 to 74 and y from 0 to 32")):
        notes = sample.crop_note(image, size)
        assert notes == [] if part is None else part in notes[0]


def test_programs_run_on_consoles_and_systems_that_lack_something():
    _, here = workplace()
    program = """
import os, signal, sys
if hasattr(signal, "SIGPIPE"):
    del signal.SIGPIPE                                          # as on Windows
import fcntl
sync = os.fsync
def only_written(number):
    assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY, "Windows syncs only what is open for writing"
    sync(number)
os.fsync = only_written
import pwd
def nobody(*_):
    raise KeyError("no such user")
pwd.getpwuid = nobody                                           # a container's user
import sample, extras.encoders, extras.bench
assert extras.encoders.cache_folder().name == "motionstream"
def closed(argv):
    raise BrokenPipeError
assert sample.main(sys.argv[1:]) == 0
"""
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    with folder() as mine:
        picture, out = mine / "\u732b\u2026.png", mine / "\u0444.PNG"
        shutil.copy(here / "image.png", picture)
        words = command("--image", picture, "--out", out, "--frames", 1)
        done = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=HERE, capture_output=True,
                              env=environ | {"PYTHONIOENCODING": "cp1252:strict"})
        assert done.returncode == 0 and out.is_file(), done.stderr.decode()
        assert done.stdout.decode("cp1252").splitlines()[-1].endswith("\\u0444.PNG")


def test_a_file_that_cannot_be_written_says_why():
    def fail(error):
        def save(path):
            raise error
        return save

    with folder() as here:
        for error, text in ((OSError(28, "No space left on device"), "x.pt: cannot be written: No space left on device ("),
                            (RuntimeError("PytorchStreamWriter failed\nmore"), "x.pt: cannot be written: PytorchStreamWriter"),
                            (PermissionError(13, "Permission denied"), "x.pt: cannot be written: Permission denied (")):
            assert_error(OSError, text, write, here / "x.pt", fail(error))
            assert_error(OSError, "MB are free there)", write, here / "x.pt", fail(error))
        assert_error(OSError, "gone/x.pt: cannot be written: No such file", write, here / "gone/x.pt",
                     lambda path: path.write_text("x"))
