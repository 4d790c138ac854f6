"""Recordings of the page whose settings are no settings, and a page that could not record."""

from unittest.mock import patch

import numpy as np

import sample
from extras import page
from extras.recording import SETTINGS, settings_in
from extras.testing import HERE, assert_error, quiet

GOOD = {
    "seed": 7, "chunk": 3, "sink": 1, "window": -1, "steps": 3, "fps": 16.0, "dtype": "float32",
    "frames": 21, "weights": 5, "prompts": np.array(["", "fading light"]),
}

# Each alone; one billion noise levels took minutes before anything was said.
BAD = [
    ("chunk", 0), ("chunk", 1e308), ("chunk", 1000), ("sink", -1), ("steps", 0), ("steps", 10 ** 9),
    ("fps", np.nan), ("fps", 0.0), ("frames", 0), ("frames", 10 ** 7), ("dtype", "int8"),
    ("prompts", np.array([])),
]


def test_settings_of_a_recording_are_within_those_of_the_flags():
    said = settings_in(GOOD)
    assert said.keys() == set(SETTINGS) | {"prompts"}
    assert said["window"] is None
    for name, value in BAD:
        assert_error(ValueError, "", settings_in, GOOD | {name: value})


def test_the_page_looks_for_ffmpeg_before_anything_is_loaded():
    without_ffmpeg = patch.dict("os.environ", IMAGEIO_FFMPEG_EXE="/nowhere/ffmpeg")
    nothing_loads = patch.object(sample, "inspect", None)
    with without_ffmpeg, nothing_loads:
        with quiet() as (_, err):
            code = page.main(["--image", str(HERE / "assets/drag.png")])
    assert code == 2
    assert "/nowhere/ffmpeg: cannot be used" in err.getvalue()
