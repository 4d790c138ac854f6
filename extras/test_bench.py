"""What the speed table counts."""

import contextlib
import re
import time
import unittest.mock
from dataclasses import replace

import torch
import torch.nn.functional as F

from extras import bench
from extras.testing import COPYING, SMALL, WAN, quiet, slow
from vae import TinyVAEConfig

CPU = torch.device("cpu")
SMALL_PRESETS = {
    "copies": replace(COPYING, num_layers=1),
    "starts": replace(SMALL, num_layers=1),
    "wan": replace(WAN, num_layers=1, size=(32, 32), in_dim=48, track_dim=16, clip_dim=40,
                   clean_first=False),
}


def narrow(channels, patch):
    """A VAE with the steps in time and space of TAEHV, but few layers of few channels."""
    usual = TinyVAEConfig(channels, patch)
    encoder = tuple((4, 1) + layer[2:] for layer in usual.encoder)
    decoder = tuple((4, 1) + layer[2:] for layer in usual.decoder)
    return replace(usual, stem=4, tail=4, encoder=encoder, decoder=decoder)


counted_chunk = bench.counted_chunk


def counted_while_computed(job):
    """As bench.counted_chunk, on real tensors, which is faster for a small model."""
    with unittest.mock.patch.object(bench, "FakeTensorMode", contextlib.nullcontext):
        return counted_chunk(job)


def table(*words):
    """(What bench prints, {name of a row: its cells}), of small models."""
    presets = unittest.mock.patch.dict(bench.PRESETS, SMALL_PRESETS)
    small = unittest.mock.patch.multiple(
        bench, TinyVAEConfig=narrow, CLIP_LATENTS=2, counted_chunk=counted_while_computed)
    with quiet() as (out, err), presets, small:
        code = bench.main(list(words) + ["--repeats", "1"])
    assert code == 0, err.getvalue()
    rows = {}
    for line in out.getvalue().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0]] = cells[1:]
    return out.getvalue(), rows


def value(cell):
    return float(cell.replace(",", "").rstrip("%"))


def test_every_part_of_a_chunk_is_counted_on_top_of_the_one_before():
    for preset in SMALL_PRESETS:
        out, rows = table("--preset", preset, "--decoder", "tiny")
        assert f"{preset}, " in out
        assert "chunk 3, sink 1, window 1" in out
        assert "3 passes" in out
        parts = [rows[name] for name in ("DiT", "with cache update", "with decoding")]
        work = [value(part[2]) for part in parts]           # TFLOP; times vary on a busy machine
        assert work == sorted(work), (preset, work)
        assert work[0] > 0
        assert all(value(part[0]) > 0 for part in parts), (preset, parts)
        milliseconds, rate, total, share, _ = rows["end to end"]
        assert abs(value(rate) - 12 * 1000 / value(milliseconds)) < 0.02 * value(rate) + 0.1
        assert value(total) == work[-1]
        assert 0 <= value(share) < 100
        assert rows["first frame"][1] == ""
        assert value(rows["first pixel"][0]) > 0
        assert value(rows["most at once"][0]) > value(rows["weights"][0])
        assert rows["MotionStream 1.3B, tiny VAE"][:2] == ["29.5", "0.39"]


@slow
def test_flags_change_what_is_measured_and_ask_for_a_long_stream_and_a_training_step():
    assert bench.CLIP_LATENTS == 21
    # A product in bfloat16 takes seconds on some CPUs.
    with unittest.mock.patch.object(bench, "matmul_rate", lambda device, dtype: 1e12):
        out, rows = table("--preset", "copies", "--memory", "c2s2w3", "--steps", "2",
                          "--dtype", "bfloat16", "--long", "100", "--training")
    assert "chunk 2, sink 2, window 3, bfloat16" in out
    assert "2 passes" in out
    long = r"^104 frames: [\d.]+ ms a chunk, .* MiB after \d+ chunks, [\d.]+ at the end$"
    assert re.search(long, out, re.M), out
    generator = rows["generator's step"]
    critic = rows["critic's step"]
    assert value(generator[2]) > value(critic[2]) > 0           # a teacher more
    assert value(generator[0]) > 0
    assert "2 latents" in generator[-1]


def test_flags_that_cannot_be_are_refused_in_one_line():
    for flag, value_of, cure in (
        ("--device", "moon", "--device moon: not available here"),
        ("--repeats", "0", "0 is not between"),
    ):
        with quiet() as (_, err):
            assert bench.main([flag, value_of]) == 2
        assert cure in err.getvalue()
        assert err.getvalue().count("\n") == 1, err.getvalue()


def test_a_training_step_has_gradients_of_the_generator_and_of_the_critic():
    models = []

    def keep(model):
        models.append(model)

    with (unittest.mock.patch.dict(bench.PRESETS, SMALL_PRESETS),
          unittest.mock.patch.object(bench, "CLIP_LATENTS", 6),
          unittest.mock.patch.object(torch.nn.Module, "zero_grad", keep)):
        job = bench.Job(bench.student("copies", None, None), CPU, torch.float32, "own")
        for part in bench.training_parts(job):
            part.work()
    generator, critic = models
    assert generator.config.causal
    assert not critic.config.causal
    for model in models:
        assert model.blocks[0].ffn[0].weight.grad.abs().sum() > 0


def test_counts_are_of_launches_bytes_and_flops_by_kind():
    x = torch.randn(2, 3, 8, 16)
    with bench.Counts() as counts:
        y = x.transpose(1, 2).flatten(0, 1)                     # a copy, the rest are views
        z = y @ torch.randn(16, 4)                              # 48 rows
        F.conv_transpose2d(x, torch.randn(3, 5, 4, 4), None, 2, 1)
        F.scaled_dot_product_attention(x, x, x)
        z.view(-1)[:4].detach()
    assert counts.flops == {
        "matmul": 2 * 48 * 16 * 4,
        "convolution": 2 * 2 * 3 * 8 * 16 * 5 * 16,
        "attention": 2 * 2 * 2 * 3 * 8 * 8 * 16}
    assert counts.launches == {"other": 3, "matmul": 1, "convolution": 1, "attention": 1}
    copied = 2 * x.numel()
    drawn = 16 * 4 + 3 * 5 * 16                                 # two random tensors
    assert counts.bytes["other"] == 4 * (copied + drawn)
    assert counts.bytes["matmul"] == 4 * (48 * 16 + 16 * 4 + 48 * 4)
    assert counts.bytes["convolution"] == 4 * (x.numel() + 3 * 5 * 16 + 2 * 5 * 16 * 32)


# Of today's code, in bfloat16: launches, MB, GFLOP of each part of a chunk, for one layer of the
# preset with what is around it, and the tiny decoder. They may fall.
COUNTS = {
    "tiny": ((504, 89.1, 1.157), (168, 29.7, 0.386), (5, 8.0, 0.5734)),
    "motionstream-1.3b": ((348, 8440.0, 2512.9), (115, 2814.0, 837.64), (125, 11458.0, 1294.3)),
}


def test_a_chunk_costs_no_more_launches_bytes_and_flops_than_it_did():
    for name in COUNTS:
        config = replace(bench.student(name, None, None), num_layers=1)
        counted = bench.counted_chunk(bench.Job(config, CPU, torch.bfloat16, "tiny"))
        for (part, counts), expected in zip(counted, COUNTS[name], strict=True):
            launches, megabytes, gigaflops = expected
            where = (name, part.name)
            assert counts.launches.total() <= launches, (where, counts.launches.total())
            moved = counts.bytes.total() / 1e6
            assert 0.5 * megabytes < moved <= megabytes, (where, moved)
            work = counts.flops.total() / 1e9
            assert 0.9 * gigaflops < work <= gigaflops, (where, work)


def test_random_weights_have_the_dtypes_of_loaded_ones_and_a_full_cache_its_size():
    model = bench.random_model(SMALL, CPU, torch.bfloat16)
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert model.blocks[0].modulation.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with unittest.mock.patch.object(bench, "TinyVAEConfig", narrow):
        vae = bench.new_vae(SMALL, "own", CPU, torch.float32)
    parts, caches = bench.chunk_parts(model, vae)
    assert [part.frames for part in parts] == [12] * 3
    _, cache, most = bench.memory_rows(model, vae, caches, CPU)
    tokens = 2 * 3 * (32 // 16) * (48 // 16)                    # two chunks
    assert cache[1] == 2 * 2 * 2 * SMALL.dim * tokens           # layers, keys and values, bytes
    assert most[1] > cache[1]


def test_a_prediction_is_marked_as_one_and_rests_on_counts():
    with unittest.mock.patch.object(bench, "BANDWIDTH", 1e9):   # else a small model takes 0.0 ms
        out, rows = table("--preset", "starts", "--predict")
    assert "PREDICTED" in out
    assert "bfloat16" in out
    assert "peak:" not in out
    assert value(rows["with decoding"][0]) >= value(rows["first pixel"][0]) > 0
    counts = bench.Counts()
    counts.bytes["other"] = bench.BANDWIDTH
    counts.flops["matmul"] = 2 * bench.RATES["matmul"]
    counts.bytes["matmul"] = bench.BANDWIDTH
    assert bench.predicted_seconds(counts) == 3


def test_a_median_does_not_see_the_first_calls():
    waits = iter((0.2, 0.2, 0.01, 0.01, 0.01))
    assert bench.median_seconds(lambda: time.sleep(next(waits)), CPU, 3) < 0.1
