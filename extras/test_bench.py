"""What the speed table counts."""

import re
import time
import unittest.mock
from dataclasses import replace

import torch
import torch.nn.functional as F

from extras import bench
from extras.testing import SMALL, WAN, quiet

CPU = torch.device("cpu")
SMALL_PRESETS = {
    "copies": replace(SMALL, track_id_mode="random", copies=True, in_dim=4 + 8 + 10 + 4),
    "starts": SMALL,
    "wan": replace(WAN, size=(64, 64), in_dim=48, track_dim=16, clip_dim=40, clean_first=False),
}


def table(*words):
    """What bench prints, its rows' cells by name."""
    with quiet() as (out, err), unittest.mock.patch.dict(bench.PRESETS, SMALL_PRESETS):
        assert bench.main([*words, "--repeats", "2"]) == 0, err.getvalue()
    rows = {}
    for line in out.getvalue().splitlines():
        if line.startswith("| "):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name] = cells
    return out.getvalue(), rows


def value(cell):
    return float(cell.replace(",", "").rstrip("%"))


def test_every_part_of_a_chunk_is_counted_on_top_of_the_one_before():
    for preset in SMALL_PRESETS:
        out, rows = table("--preset", preset, "--decoder", "tiny")
        names = "DiT", "with cache update", "with decoding"
        work = [value(rows[name][2]) for name in names]             # TFLOP; times vary on a busy machine
        assert work == sorted(work) and work[0] > 0, (preset, rows)
        assert all(value(rows[name][0]) > 0 for name in names), (preset, rows)
        milliseconds, rate, work, share, _ = rows["end to end"]
        assert abs(value(rate) - 12 * 1000 / value(milliseconds)) < 0.02 * value(rate) + 0.1
        assert work == rows["with decoding"][2] and 0 <= value(share) < 100
        assert rows["first frame"][1] == "" and value(rows["most at once"][0]) > value(rows["weights"][0])
        assert value(rows["first pixel"][0]) > 0
        assert f"{preset}, " in out and "chunk 3, sink 1, window 1" in out and "3 passes" in out
        assert rows["MotionStream 1.3B, tiny VAE"][:2] == ["29.5", "0.39"]


def test_flags_change_what_is_measured():
    out, _ = table("--preset", "copies", "--memory", "c1s2w3", "--steps", "2", "--dtype", "bfloat16")
    assert "chunk 1, sink 2, window 3, bfloat16" in out and "2 passes" in out
    for words, cure in (("--device", "moon"), "--device moon: not available here"), (("--repeats", "0"), "0 is not between"):
        with quiet() as (_, err):
            assert bench.main([*words]) == 2
        assert cure in err.getvalue() and err.getvalue().count("\n") == 1, err.getvalue()


def test_a_long_stream_and_a_training_step_are_measured_when_asked():
    out, rows = table("--preset", "copies", "--long", "100", "--training")
    assert re.search(r"^108 frames: [\d.]+ ms a chunk, .* MiB after \d+ chunks, [\d.]+ at the end$", out, re.M), out
    generator, critic = rows["generator's step"], rows["critic's step"]
    assert value(generator[2]) > value(critic[2]) > 0               # a teacher more
    assert value(generator[0]) > 0 and "21 latents" in generator[-1]


def test_a_training_step_has_gradients_of_the_generator_and_of_the_critic():
    with unittest.mock.patch.dict(bench.PRESETS, SMALL_PRESETS):
        job = bench.Job(bench.student("copies", None, None), CPU, torch.float32, "own")
    models = []

    def keep(model):
        models.append(model)

    with unittest.mock.patch.object(torch.nn.Module, "zero_grad", keep):
        for part in bench.training_parts(job):
            part.work()
    generator, critic = models
    assert generator.config.causal and not critic.config.causal
    for model in models:
        assert model.blocks[0].ffn[0].weight.grad.abs().sum() > 0


def test_counts_are_of_launches_bytes_and_flops_by_kind():
    x = torch.randn(2, 3, 8, 16)
    with bench.Counts() as counts:
        y = x.transpose(1, 2).flatten(0, 1)                         # a copy, the rest are views
        z = y @ torch.randn(16, 4)                                  # 48 rows
        F.conv_transpose2d(x, torch.randn(3, 5, 4, 4), None, 2, 1)
        F.scaled_dot_product_attention(x, x, x)
        z.view(-1)[:4].detach()
    assert counts.flops == {"matmul": 2 * 48 * 16 * 4, "convolution": 2 * 2 * 3 * 8 * 16 * 5 * 16,
                            "attention": 2 * 2 * 2 * 3 * 8 * 8 * 16}
    assert counts.launches == {"other": 3, "matmul": 1, "convolution": 1, "attention": 1}
    sizes = x.numel() + x.numel(), 48 * 16 + 16 * 4 + 48 * 4, x.numel() + 3 * 5 * 16 + 2 * 5 * 16 * 32
    assert counts.bytes["other"] == 4 * (sizes[0] + 16 * 4 + 3 * 5 * 16)            # the copy, two random tensors
    assert (counts.bytes["matmul"], counts.bytes["convolution"]) == (4 * sizes[1], 4 * sizes[2])


# Of today's code, in bfloat16: launches, MB, GFLOP of each part of a chunk. They may fall. "layer" is one of the 30
# layers of motionstream-1.3b, with what is around them, and the tiny decoder.
COUNTS = {
    "tiny": ((1329, 273.8, 4.237), (442, 91.3, 1.413), (5, 8.0, 0.5734)),
    "layer": ((438, 10352.0, 2512.9), (145, 3451.0, 837.64), (125, 11457.0, 1294.3)),
}


def test_a_chunk_costs_no_more_launches_bytes_and_flops_than_it_did():
    configs = {"tiny": bench.student("tiny", None, None),
               "layer": replace(bench.student("motionstream-1.3b", None, None), num_layers=1)}
    for name, config in configs.items():
        counted = bench.counted_chunk(bench.Job(config, CPU, torch.bfloat16, "tiny"))
        for (part, counts), (launches, megabytes, gigaflops) in zip(counted, COUNTS[name], strict=True):
            found = counts.launches.total(), counts.bytes.total() / 1e6, counts.flops.total() / 1e9
            assert found[0] <= launches, (name, part.name, found)
            assert 0.5 * megabytes < found[1] <= megabytes, (name, part.name, found)
            assert 0.9 * gigaflops < found[2] <= gigaflops, (name, part.name, found)


def test_random_weights_have_the_dtypes_of_loaded_ones_and_a_full_cache_its_size():
    model = bench.random_model(SMALL, CPU, torch.bfloat16)
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16 and model.blocks[0].modulation.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    vae = bench.new_vae(SMALL, "own", CPU, torch.float32)
    parts, caches = bench.chunk_parts(model, vae)
    (_, held, _), (_, most, _) = bench.memory_rows(model, vae, caches, CPU)[1:]
    tokens = 2 * 3 * (32 // 16) * (48 // 16)                    # two chunks
    assert held == 2 * 2 * 2 * SMALL.dim * tokens < most        # layers, keys and values, bytes
    assert [part.frames for part in parts] == [12] * 3


def test_a_prediction_is_marked_as_one_and_rests_on_counts():
    out, rows = table("--preset", "tiny", "--predict")
    assert "PREDICTED" in out and "bfloat16" in out and "peak:" not in out
    assert value(rows["with decoding"][0]) >= value(rows["first pixel"][0]) > 0     # a tenth of a millisecond
    counts = bench.Counts()
    counts.bytes["other"] = bench.BANDWIDTH
    counts.flops["matmul"] = 2 * bench.RATES["matmul"]
    counts.bytes["matmul"] = bench.BANDWIDTH
    assert bench.predicted_seconds(counts) == 3


def test_a_median_does_not_see_the_first_calls():
    waits = iter((0.2, 0.2, 0.01, 0.01, 0.01))
    assert bench.median_seconds(lambda: time.sleep(next(waits)), CPU, 3) < 0.1
