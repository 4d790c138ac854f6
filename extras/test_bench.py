"""What the speed table counts."""

import re
import time
import unittest.mock
from dataclasses import replace

import torch

from extras import bench
from extras.testing import SMALL, WAN, quiet

SMALL_PRESETS = {
    "copies": replace(SMALL, track_id_mode="random", copies=True, in_dim=4 + 8 + 6 + 4),
    "starts": SMALL,
    "wan": replace(WAN, size=(64, 64), in_dim=48, track_dim=16, clip_dim=40, clean_first=False),
}


def table(*words):
    """What bench prints, its rows' numbers by name."""
    with quiet() as (out, err), unittest.mock.patch.dict(bench.PRESETS, SMALL_PRESETS):
        assert bench.main([*words, "--repeats", "2"]) == 0, err.getvalue()
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.,]+) \| ([^|]*?) \|", out.getvalue(), re.M)
    return out.getvalue(), {name: (float(value.replace(",", "")), rate) for name, value, rate in rows}


def test_every_part_of_a_chunk_is_counted_on_top_of_the_one_before():
    for preset in SMALL_PRESETS:
        out, rows = table("--preset", preset, "--decoder", "tiny")
        parts = [rows[name][0] for name in ("DiT", "with cache update", "with decoding")]
        assert parts == sorted(parts) and parts[0] > 0, (preset, rows)
        milliseconds, rate = rows["end to end"]
        assert abs(float(rate) - 12 * 1000 / milliseconds) < 0.02 * float(rate) + 0.1
        assert rows["first frame"][1] == "" and rows["most at once"][0] > rows["weights"][0]
        assert f"{preset}, " in out and "chunk 3, sink 1, window 1" in out and "3 passes" in out


def test_flags_change_what_is_measured():
    out, _ = table("--preset", "starts", "--memory", "c1s2w3", "--steps", "2", "--dtype", "bfloat16")
    assert "chunk 1, sink 2, window 3, bfloat16" in out and "2 passes" in out
    for words, cure in (("--device", "moon"), "--device moon: not available here"), (("--repeats", "0"), "0 is not between"):
        with quiet() as (_, err):
            assert bench.main([*words]) == 2
        assert cure in err.getvalue() and err.getvalue().count("\n") == 1, err.getvalue()


def test_random_weights_have_the_dtypes_of_loaded_ones_and_a_full_cache_its_size():
    model = bench.random_model(SMALL, torch.device("cpu"), torch.bfloat16)
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16 and model.blocks[0].modulation.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    vae = bench.new_vae(SMALL, "own", torch.device("cpu"))
    rows, caches = bench.chunk_rows(model, vae, bench.new_text(SMALL, torch.device("cpu")), 1)
    (_, held, _), (_, most, _) = bench.memory_rows(model, vae, caches, torch.device("cpu"))[1:]
    tokens = 2 * 3 * (32 // 16) * (48 // 16)                    # two chunks
    assert held == 2 * 2 * 2 * SMALL.dim * tokens < most        # layers, keys and values, bytes
    assert [row.frames for row in rows] == [12] * 3


def test_a_median_does_not_see_the_first_calls():
    waits = iter((0.2, 0.2, 0.01, 0.01, 0.01))
    assert bench.median_seconds(lambda: time.sleep(next(waits)), torch.device("cpu"), 3) < 0.1
