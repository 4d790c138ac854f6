"""What makes it fast: the same numbers, by another road."""

import contextlib
import functools
import unittest.mock
from dataclasses import replace

import numpy as np
import torch
import torch._dynamo
import torch.nn.attention
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import motionstream
import sample
from extras import bench, compiling
from extras.compiling import compile_blocks
from extras.page import with_chunk
from extras.testing import SMALL, assert_near, folder, new_model, new_vae, quiet, rand
from motionstream import CopyingMotionStream, apply_rope, attend, rollout, rope_table
from sample import ASSETS


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""
    is_cuda = True


def test_attention_asks_cudnn_first_and_forbids_nothing():
    """That a GPU's kernel is cuDNN's, only a GPU can say."""
    orders = []

    def note(*args):
        orders.append(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return args[0]

    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    with unittest.mock.patch.object(F, "scaled_dot_product_attention", note):
        q, k, v = torch.randn(3, 1, 6, 2, 8).as_subclass(OnGPU)
        attend(q, k, v)
    assert orders == [list(motionstream.ATTENTION)]
    assert orders[0][0] == torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    assert set(before) <= set(orders[0])
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_attention_on_a_cpu_is_what_it_was_to_the_bit_and_asks_for_no_kernel():
    """Asking takes 0.2 ms between a model's layers, ten times as long as in a loop of its own."""
    q = torch.randn(2, 6, 3, 8)                                         # (B, L, heads, K)
    k, v = torch.randn(2, 2, 11, 3, 8)
    q_heads = q.transpose(1, 2)                                         # (B, heads, L, K)
    k_heads = k.transpose(1, 2)
    v_heads = v.transpose(1, 2)
    expected = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
    with unittest.mock.patch.object(motionstream, "sdpa_kernel") as asked:
        assert torch.equal(attend(q, k, v), expected.transpose(1, 2).flatten(2))
    assert not asked.called


def test_rope_in_real_numbers_is_that_in_complex_ones():
    table = rope_table(2, 3, 4, 20, "cpu")
    x = rand(2, 24, 2, 20)
    expected = apply_rope(x, table)
    with unittest.mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        found = apply_rope(x, table)
        half = apply_rope(x.bfloat16(), table)
    assert_near(found, expected, 1e-6)
    assert half.dtype == torch.bfloat16
    assert_near(half.float(), expected, 0.05)


# --------------------------------------------------------------------------------------------------
# torch.compile. Here it traces, which is what may fail; a compiler then takes a minute.

@contextlib.contextmanager
def traced():
    """torch.compile with a compiler that runs what was traced as it is. Yields what was traced."""
    programs = []

    def keep(program, inputs):
        programs.append(program)
        return program.forward

    torch._dynamo.reset()
    with_backend = functools.partial(torch.compile, backend=keep)
    with (unittest.mock.patch.object(torch, "compile", with_backend),
          torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True)):
        yield programs
    torch._dynamo.reset()


def roll_out(model, chunks):
    """Latents of a stream of so many chunks."""
    config = model.config
    frames = chunks * config.chunk
    noise = rand(1, config.out_dim, frames, 4, 6)
    text = rand(1, 3, config.text_dim, seed=1)
    given = {"text": text, "tracks": rand(1, 8, frames, 4, 6, seed=2)}
    with torch.inference_mode():
        latents = rollout(model, noise, given, rng=torch.Generator().manual_seed(0))
        return torch.cat(list(latents), 2)


def test_compiled_blocks_share_one_program_for_each_length_of_the_cache():
    model = new_model(chunk=1, sink=0, window=1)
    expected = roll_out(model, 3)
    with traced() as programs:
        compile_blocks(model)
        programs.clear()                    # that of the test whether there is a compiler
        found = roll_out(model, 3)
        assert len(programs) == 2 * 2       # an empty and a full cache, with `write` and without
        again = roll_out(model, 3)
        assert len(programs) == 2 * 2
    assert_near(found, expected, 1e-5)
    assert torch.equal(again, found)


def test_all_lengths_may_be_compiled_those_of_chunks_of_one_latent_too():
    def not_compiled(function):
        return function

    def lengths(config):
        return config.sink + config.window + 1

    for chunk, sink, window in (3, 1, 1), (1, 3, 9), (4, 0, 1):
        model = new_model(chunk=chunk, sink=sink, window=window)
        offered = with_chunk(model.config, 1)               # by the page
        needed = lengths(model.config) + lengths(offered)
        with traced(), unittest.mock.patch.object(torch, "compile", not_compiled):
            compile_blocks(model)
            assert torch._dynamo.config.recompile_limit >= 2 * needed


def test_a_teacher_is_compiled_whatever_its_window_says():
    model = new_model(causal=False, window=None, num_layers=1)
    with traced() as programs:
        compile_blocks(model)
        programs.clear()
        x = rand(1, 4, 2, 4, 6)
        for sigma in 1.0, 0.5:
            model(x, torch.tensor([sigma]))
    assert len(programs) == 1


def refused(program, argv):
    """What the error says, in one line."""
    with quiet() as (_, err):
        assert program.main(argv) == 2
    line = err.getvalue()
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


def test_compile_is_refused_for_a_cache_that_keeps_all():
    flags = ["--compile", "--memory", "c3s1wfull"]
    assert "add --memory c3s1w5" in refused(bench, flags)
    line = refused(sample, ["--image", str(ASSETS / "drag.png")] + flags)
    assert "tiny.safetensors: --compile needs a cache that stops growing" in line


def test_compile_without_a_compiler_is_one_line():
    def broken(function):
        def fail(*args):
            raise RuntimeError("No working C++ compiler found\nand how to find one")
        return fail

    with unittest.mock.patch.object(torch, "compile", broken):
        with unittest.mock.patch.dict(bench.PRESETS, {"tiny": SMALL}):
            line = refused(bench, ["--compile"])
    assert "torch.compile does not work here (No working C++ compiler found)" in line


def test_the_flag_compiles_what_is_loaded():
    words = ["--image", str(ASSETS / "drag.png"), "--frames", "1"]
    compiled = []
    with unittest.mock.patch.object(compiling, "compile_blocks", compiled.append):
        with folder() as here, quiet():
            words += ["--out", str(here / "x.png")]
            for more in [], ["--compile"]:
                assert sample.main(words + more) == 0
    assert [type(model) for model in compiled] == [CopyingMotionStream]


# --------------------------------------------------------------------------------------------------
# Decoding on a second CUDA stream, on a GPU that does nothing but note what it is asked for.

class FakeStream:
    """A CUDA stream."""

    def __init__(self, log):
        self.log = log

    def wait_stream(self, other):
        self.log.append("wait")


@contextlib.contextmanager
def fake_gpu():
    """Yields what is noted."""
    log = []

    @contextlib.contextmanager
    def current(stream):
        log.append("enter")
        yield
        log.append("leave")

    def new_stream(device):
        return FakeStream(log)

    fakes = {"Stream": new_stream, "current_stream": new_stream, "stream": current}

    def record_stream(tensor, stream):
        log.append("keep")

    with (unittest.mock.patch.multiple(torch.cuda, **fakes),
          unittest.mock.patch.object(torch.Tensor, "record_stream", record_stream)):
        yield log


def chunks_of(latents, log):
    """Latents, chunk by chunk, noted when they are asked for."""
    for i, chunk in enumerate(latents.split(2, 2)):
        log.append(f"make {i}")
        yield chunk


def test_frames_made_beside_are_the_same_and_the_next_chunk_is_begun_before_one_is_awaited():
    vae = new_vae()
    latents = rand(1, 4, 6, 4, 6)
    expected = [sample.to_frames(video) for video in sample.decode(vae, latents.split(2, 2))]
    with torch.inference_mode(), fake_gpu() as log:
        found = []
        chunks = chunks_of(latents, log)
        for frames in compiling.frames_beside(vae, chunks, "cuda", sample.to_frames):
            log.append(f"show {len(found)}")
            found.append(frames)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected):
        assert ours.dtype == np.uint8 and np.array_equal(ours, theirs)
    decoded = ["wait", "enter", "leave", "keep"]        # and never left open
    copied = ["enter", "leave"]
    expected_log = ["make 0"] + decoded
    expected_log += ["make 1"] + copied + ["show 0"] + decoded
    expected_log += ["make 2"] + copied + ["show 1"] + decoded
    expected_log += copied + ["show 2"]
    assert log == expected_log


def job_on(device, frames):
    """A Job of new_model's student."""
    config = new_model(track_id_mode="random").config
    return sample.Job(None, config, frames, 16, 0, torch.device(device), torch.float32, None)


def test_a_live_stream_begins_no_chunk_before_the_last_is_shown():
    model = new_model(track_id_mode="random")
    models = sample.Models(model, new_vae(), sample.Encoded())
    motion = bench.new_motion(model.config, 21)
    log = []

    def live():
        for i, part in enumerate(sample.motion_by_chunk(motion, model.config)):
            log.append(f"make {i}")
            yield part

    for _ in sample.generate(job_on("cpu", None), models, rand(1, 3, 32, 48), live()):
        log.append("show")
    assert log == ["make 0"] + ["show"] * 9 + ["make 1"] + ["show"] * 12


def test_only_a_motion_that_is_known_beforehand_is_made_ahead_on_a_gpu():
    model = new_model(track_id_mode="random")
    models = sample.Models(model, new_vae(), sample.Encoded())
    motion = bench.new_motion(model.config, 9)
    asked = []

    def beside(vae, latents, device, to_frames):
        asked.append(device.type)
        return iter([np.zeros((9, 32, 48, 3), np.uint8)])

    with unittest.mock.patch.object(compiling, "frames_beside", beside):
        for device, frames in ("cpu", 9), ("cuda", None), ("cuda", 9):
            job = replace(job_on(device, frames), compile=True)
            list(sample.generate(job, models, rand(1, 3, 32, 48), motion))
            assert len(asked) == ((device, frames) == ("cuda", 9))


def test_frames_of_a_video_in_16_bits_lie_next_to_those_in_32():
    video = torch.linspace(-1, 1, 3 * 5 * 4 * 4).view(1, 3, 5, 4, 4)
    half = video.bfloat16()
    assert np.array_equal(sample.to_frames(half), sample.to_frames(half.float()))
    assert sample.to_frames(video).flags.c_contiguous


def test_an_rmsnorm_counts_as_the_one_kernel_that_it_is_on_a_gpu():
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)

    def work():
        checkpoint(F.rms_norm, x, (8,), eps=1e-6, use_reentrant=False).sum().backward()

    real = F.rms_norm
    counts = bench.count_part(bench.Part("norm", work, ""))
    # Itself, again, its gradient; the sum and the sum's gradient.
    assert counts.launches.total() == 3 + 2
    assert F.rms_norm is real
