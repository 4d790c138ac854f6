"""The second reading: what the code promises, one sentence a test.

    python test_motionstream.py                    all of them
    python test_motionstream.py rollout cache      those with one of these words in their name
    python test_motionstream.py --slow             the slow ones too

Small models with random parameters everywhere: a fresh model returns zeros, which agrees with everything.
Where a formula is tested, it is written here a second time, plainly, in float64, from Wan's description.
"""

import ast
import contextlib
import functools
import http.client
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import unittest.mock
import warnings
import weakref
from collections import Counter, OrderedDict, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait awake slow each other down on shared cores

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import extras.page
import motionstream
import sample
import train_distill as td
from extras import clips, decoder, encoders, evaluate, experiments, world
from extras.evaluate import (compared, eval_row, find_reward, measure, measure_tables, motion_reward, new_case, play,
                             ssim)
from extras.experiments import (SHORT, Refreshed, attention_row, damaged, distil_briefly, drawn_tracks, encoding_row,
                                speed_row, taught_row, words_row)
from extras.page import named, recorder
from extras.tracks import MOVES, camera, camera_move, camera_tracks, load_depth
from motionstream import (PRESETS, KVCache, MotionStream, SelfAttention, TrackHead, UserError, add_noise, apply_rope, by_chunk,
                          euler, find_config, guided_velocity, image_and_mask, joint_guidance, rollout, rope_table,
                          save_pretrained, schedule, sinusoid, to_x0, track_features, track_ids, with_first, shift_sigma)
from sample import count_frames, drag_path, embed_words, read_tracks
from vae import RMSNorm as ChannelNorm
from vae import STATISTICS, CausalConv, TinyVAE, TinyVAEConfig, WanVAE, WanVAEConfig, load_vae

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# Small models and helpers. Head dimension 20: RoPE splits it 8 / 6 / 6, unequal as in Wan's 44 / 42 / 42.

SMALL = replace(PRESETS["tiny"], dim=40, ffn_dim=80, num_heads=2, num_layers=2, in_dim=12, out_dim=4, track_dim=8,
                text_dim=12, text_len=5, size=(32, 48), causal=True, tracks="start", guidance=(1.0, 1.5))
SMALL_VAE = TinyVAEConfig(latent_channels=4, patch=4, pad="front", stem=8, encoder=((12, 1, 4, 2),),
                          decoder=((12, 2, 4, 2), (8, 1, 1, 1)), tail=8)
TAEW21, TAEW22 = TinyVAEConfig(), TinyVAEConfig(latent_channels=48, patch=2)


def slow(test):
    """Only run with --slow. SkipTest is what pytest understands too."""
    @functools.wraps(test)
    def maybe():
        if "--slow" not in sys.argv:
            raise unittest.SkipTest("slow, run with --slow")
        test()
    return maybe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def randomised(module, seed=0):
    """Every parameter at random, in eval mode."""
    rng = seeded(seed)
    for name, p in module.named_parameters():
        matrix = p.ndim > 1 and "modulation" not in name
        p.data = torch.randn(p.shape, generator=rng) * (p[0].numel() ** -0.5 if matrix else 0.3)
        p.data += "norm" in name and name.endswith("weight")
    return module.eval().requires_grad_(False)


def new_model(seed=0, **overrides):
    return randomised(MotionStream(replace(SMALL, **overrides)), seed)


def new_vae(config=SMALL_VAE):
    return randomised(TinyVAE(config))


@contextlib.contextmanager
def small_scenes():
    """What is drawn has 32 pixels per side in here."""
    with unittest.mock.patch.object(td, "SIZE", 32), unittest.mock.patch.object(evaluate, "SIZE", 32):
        yield


def clip_of(frames, c=SMALL, seed=1):
    """Noise, conditions and first latent of two clips."""
    h, w = (side // c.stride for side in c.size)
    text, tracks = rand(2, 3, c.text_dim, seed=seed), rand(2, c.track_dim, frames, h, w, seed=seed + 1)
    noise, first = rand(2, c.out_dim, frames, h, w, seed=seed + 2), rand(2, c.out_dim, 1, h, w, seed=seed + 3)
    return noise, {"text": text, "tracks": tracks}, first


def assert_near(a, b, tolerance):
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.1e}, at most {tolerance:.0e}"


def assert_error(kind, text, call, *args, **kwargs):
    """call(…) raises `kind` and one line that holds `text`."""
    try:
        call(*args, **kwargs)
    except kind as e:
        assert text in f"{e}\n" and "\n" not in str(e).strip(), f"no line with {text!r}: {e}"
    else:
        raise AssertionError(f"nothing was raised; expected {kind.__name__} with {text!r}")


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@contextlib.contextmanager
def quiet():
    """Catch what is printed, and put the signal handlers back."""
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            yield out, err
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching, guidance, sampling of the teacher.

def test_noising_and_its_inverse_agree_and_sigma_1_is_noise():
    x0, noise = rand(2, 4, 3, 2, 2), rand(2, 4, 3, 2, 2, seed=1)
    for sigma in torch.tensor([0.25, 0.75]), torch.rand(2, 3, dtype=torch.float64):
        assert_near(to_x0(add_noise(x0, noise, sigma), noise - x0, sigma), x0, 1e-6)
    assert_near(add_noise(x0, noise, torch.tensor([0.25, 0.25])), 0.75 * x0 + 0.25 * noise, 1e-6)
    ends = add_noise(x0, noise, torch.tensor([[0.0, 1.0, 0.0]] * 2))
    assert ends[:, :, 1].equal(noise[:, :, 1]) and ends[:, :, ::2].equal(x0[:, :, ::2])


def test_the_few_step_schedule_is_shifted():
    assert np.allclose(schedule(3, 5), (1, 10 / 11, 5 / 7), atol=1e-12) and SMALL.sigmas == schedule(3, 5)
    assert np.allclose(schedule(4, 1), (1, 0.75, 0.5, 0.25), atol=1e-12)


def test_the_image_is_latent_frame_0_at_sigma_0():
    x_t, first, sigma = rand(2, 4, 3, 2, 2), rand(2, 4, 1, 2, 2, seed=1), torch.tensor([0.5, 1.0])
    x, level = with_first(x_t, sigma, first)
    assert x[:, :, :1].equal(first) and x[:, :, 1:].equal(x_t[:, :, 1:])
    assert level.tolist() == [[0, 0.5, 0.5], [0, 1, 1]] and sigma.tolist() == [0.5, 1.0]
    x, level = with_first(x_t, sigma, None)
    assert x.equal(x_t) and level.tolist() == [[0.5] * 3, [1] * 3]


def test_joint_guidance_equals_the_expanded_algebra():
    full, notext, nomotion = (rand(2, 4, 3, 2, 2, seed=i).double() for i in range(3))
    for t, m in (3.0, 1.5), (0.5, 4.0), (1.0, 0.0), (0.0, 1.5):
        expected = (t + m) * full - (t + m - 1) / (t + m) * (t * notext + m * nomotion)
        assert_near(joint_guidance(full, notext, nomotion, t, m), expected, 1e-12)
    assert_near(joint_guidance(full, notext, nomotion, 2.0, 0.0), notext + 2 * (full - notext), 1e-12)     # text alone
    assert_near(joint_guidance(full, notext, nomotion, 0.0, 2.0), nomotion + 2 * (full - nomotion), 1e-12)
    assert joint_guidance(full, notext, nomotion, 0, 0) is full


def test_guided_velocity_is_three_evaluations_without_text_and_without_tracks():
    model, (x, given, _) = new_model(), clip_of(3)
    sigma = torch.tensor([0.9, 0.4])
    v = [model(x, sigma, **given), model(x, sigma, None, tracks=given["tracks"]), model(x, sigma, given["text"])]
    assert (v[0] - v[1]).abs().max() > 0.01 and (v[0] - v[2]).abs().max() > 0.01
    assert_near(guided_velocity(model, x, sigma, given, (3.0, 1.5)), joint_guidance(*v, 3.0, 1.5), 1e-5)
    assert guided_velocity(model, x, sigma, given, (0, 0)).equal(v[0])

    model, given = new_model(in_dim=16), given | {"image": rand(*x.shape, seed=7)}
    left_out = {}, {"text": None}, {"tracks": None}             # the image never is
    v = [model(x, sigma, **given | without) for without in left_out]
    assert_near(guided_velocity(model, x, sigma, given, (3.0, 1.5)), joint_guidance(*v, 3.0, 1.5), 1e-5)


def test_euler_is_guided_as_the_config_says():
    model, (noise, given, first) = new_model(guidance=(2.0, 1.0), steps=2), clip_of(3)

    def end(**guidance):
        return list(euler(model, noise, given, first, **guidance))[-1][0]

    assert end().equal(end(guidance=(2.0, 1.0))) and not end().equal(end(guidance=(0, 0)))


def test_euler_lands_on_the_point_that_an_exact_velocity_points_to():
    noise, _, first = clip_of(3)
    goal = torch.cat([first, rand(2, 4, 2, 4, 6, seed=9)], 2)

    def exact(x_t, sigma, text=None):                           # of data that are all `goal`
        return (x_t - goal) / sigma[:, None, :, None, None].clamp(min=1e-9)

    exact.config = replace(SMALL, steps=7)
    for given in first, None:
        path = list(euler(exact, noise, {}, given, guidance=(0, 0)))
        assert [sigma for _, sigma in path] == [*schedule(7, 5.0), 0]
        assert_near(path[-1][0], goal, 1e-5)
        for x, sigma in path:
            assert_near(x[:, :, 1:], ((1 - sigma) * goal + sigma * noise)[:, :, 1:], 1e-5)
            assert given is None or x[:, :, :1].equal(first)


# ----------------------------------------------------------------------------------------------------------------------
# Wan's numerics.

def wan(w, c, x, t, text, clip=None, mask=None):
    """Wan's forward pass, written from its description, in float64. w: state dict; x (B, in_dim, F, H, W); t (B, F)
    from 0 to 1000; text (B, L, text_dim); mask (L, L): True where a query may look."""
    w = {name: p.double() for name, p in w.items()}

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def layer_norm(x, eps=1e-6, name=None):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x if name is None else x * w[name + ".weight"] + w[name + ".bias"]

    def rms_norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))

    def rotate(x):                                              # (B, N, L, K)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
        return torch.stack(turned, -1).flatten(3)

    def attention(q, k, v, rope=False, mask=None):              # (B, L, D) each
        q, k, v = (y.unflatten(2, (c.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = (rotate(q), rotate(k)) if rope else (q, k)
        score = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        score = score if mask is None else score.masked_fill(~mask, -math.inf)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)

    B, C, frames, H, W = x.shape
    h, v = H // 2, W // 2
    x = x.double().reshape(B, C, frames, h, 2, v, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, frames * h * v, C * 4)
    x = x @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
    d = c.dim // c.num_heads
    dims = d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)
    place = torch.cartesian_prod(*(torch.arange(n).double() for n in (frames, h, v)))
    angle = [place[:, i:i + 1] / 10000 ** (torch.arange(0, n, 2).double() / n) for i, n in enumerate(dims)]
    angle = torch.cat(angle, 1)

    half = c.freq_dim // 2
    phase = t.double()[..., None] / 10000 ** (torch.arange(half).double() / half)
    e = linear("time_embedding.2", F.silu(linear("time_embedding.0", torch.cat([phase.cos(), phase.sin()], -1))))
    e = e.repeat_interleave(h * v, 1)                           # one row a token
    e0 = linear("time_projection.1", F.silu(e)).unflatten(2, (6, -1))
    text = torch.cat([text.double(), torch.zeros(B, c.text_len - text.shape[1], c.text_dim).double()], 1)
    text = linear("text_embedding.2", gelu(linear("text_embedding.0", text)))
    if clip is not None:
        y = linear("img_emb.proj.1", layer_norm(clip.double(), 1e-5, "img_emb.proj.0"))
        y = linear("img_emb.proj.3", y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)))
        clip = layer_norm(y, 1e-5, "img_emb.proj.4")

    for i in range(c.num_layers):
        b = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = (w[b + "modulation"][:, None] + e0).unbind(2)
        s, a = b + "self_attn.", b + "cross_attn."
        y = layer_norm(x) * (1 + scale1) + shift1
        y = attention(rms_norm(s + "norm_q", linear(s + "q", y)), rms_norm(s + "norm_k", linear(s + "k", y)),
                      linear(s + "v", y), True, mask)
        x = x + gate1 * linear(s + "o", y)
        q = rms_norm(a + "norm_q", linear(a + "q", layer_norm(x, name=b + "norm3")))
        y = attention(q, rms_norm(a + "norm_k", linear(a + "k", text)), linear(a + "v", text))
        if clip is not None:
            y = y + attention(q, rms_norm(a + "norm_k_img", linear(a + "k_img", clip)), linear(a + "v_img", clip))
        x = x + linear(a + "o", y)
        y = layer_norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(b + "ffn.2", gelu(linear(b + "ffn.0", y)))

    shift, scale = (w["head.modulation"][:, None] + e[:, :, None]).unbind(2)
    x = linear("head.head", layer_norm(x) * (1 + scale) + shift)
    return torch.einsum("bfhvpqc->bcfhpvq", x.view(B, frames, h, v, 2, 2, -1)).reshape(B, -1, frames, H, W)


def test_the_transformer_equals_wans_formulas():
    text_to_video, whisper = (new_model(in_dim=4, track_dim=0) for _ in range(2))
    for name, p in whisper.named_parameters():              # activations so small that every eps under a root matters
        if re.search(r"patch_emb|attn\.[qko]\.|ffn\.2", name):
            p.data *= 1e-3
    with_image = new_model(clip_dim=24, in_dim=16)          # 4 noisy, 8 tracks, 4 image
    for model in text_to_video, whisper, with_image:
        c, (x, given, _) = model.config, clip_of(3, model.config)
        image, clip = (rand(*x.shape, seed=7), rand(2, 257, 24, seed=8)) if c.clip_dim else (None, None)
        tracks = given["tracks"] if c.track_dim else None
        inputs = torch.cat([y for y in (x, tracks, image) if y is not None], 1)
        for sigma in torch.tensor([0.83333, 0.01]), torch.tensor([[0.0, 0.7, 0.3], [1.0, 0.5, 0.002]]).double():
            t = (1000 * sigma).reshape(2, -1).expand(-1, 3)
            v = model(x, sigma, given["text"], tracks=tracks, image=image, clip=clip)
            assert v.dtype == torch.float32
            assert_near(v.double(), wan(model.state_dict(), c, inputs, t, given["text"], clip), 3e-6)
        zeros = torch.cat([x, x.new_zeros(2, c.in_dim - 4, *x.shape[2:])], 1)              # what is not given
        expected = wan(model.state_dict(), c, zeros, t, rand(2, 0, 12), clip)
        assert_near(model(x, sigma, None, clip=clip).double(), expected, 3e-6)


def test_norms_have_wans_eps():
    with torch.device("meta"):
        norms = MotionStream(PRESETS["motionstream-1.3b"]).named_modules()
    eps = {name: module.eps for name, module in norms if hasattr(module, "eps")}
    assert len(eps) == 30 * 8 + 1 + 2                                   # blocks, the head's, the image branch's
    assert {name for name, value in eps.items() if value != 1e-6} == {"img_emb.proj.0", "img_emb.proj.4"}
    assert eps["img_emb.proj.0"] == eps["img_emb.proj.4"] == 1e-5


def test_time_is_cosines_then_sines_of_a_float64_angle():
    t = 987.654321
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    assert_near(sinusoid(torch.tensor([t], dtype=torch.float64), 256)[0], expected, 2e-7)


def test_rope_turns_interleaved_pairs_split_22_21_21():
    table = rope_table(3, 4, 5, 128, "cpu")
    assert table.shape == (60, 64)
    f, r, c = 2, 3, 1
    angle = [f * 10000 ** (-2 * j / 44) for j in range(22)]
    angle += [p * 10000 ** (-2 * j / 42) for p in (r, c) for j in range(21)]
    turned = apply_rope(torch.tensor([1.0, 0.0]).repeat(64).view(1, 1, 1, 128), table[(f * 4 + r) * 5 + c][None])
    expected = torch.tensor([part(a) for a in angle for part in (math.cos, math.sin)])     # pair i: channels 2i, 2i + 1
    assert_near(turned.flatten(), expected, 1e-6)


def test_state_dicts_have_the_names_and_sizes_of_wans_checkpoints():
    def shapes(c):
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in MotionStream(c).state_dict().items()}

    def both(names, kinds="weight bias"):
        return {f"{name}.{kind}" for name in names.split() for kind in kinds.split()}

    attention = both("q k v o") | both("norm_q norm_k", "weight")
    block = {f"{a}_attn.{name}" for a in ("self", "cross") for name in attention}
    block |= both("norm3 ffn.0 ffn.2") | {"modulation"}
    outside = both("patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2 "
                   "time_projection.1 head.head") | {"head.modulation"}
    base = shapes(PRESETS["wan2.1-1.3b"])
    assert base.keys() == {f"blocks.{i}.{name}" for i in range(30) for name in block} | outside
    assert base["patch_embedding.weight"] == (1536, 16, 1, 2, 2) and base["head.modulation"] == (1, 2, 1536)
    assert base["time_projection.1.weight"] == (9216, 1536) and base["blocks.7.modulation"] == (1, 6, 1536)

    image_to_video = replace(PRESETS["wan2.1-14b"], in_dim=36, clip_dim=1280)
    for c, *expected in ((PRESETS["wan2.1-1.3b"], 825, 1_418_996_800), (PRESETS["wan2.1-14b"], 1095, 14_288_491_584),
                         (PRESETS["wan2.2-5b"], 825, 4_999_787_712), (image_to_video, 1303, 16_394_878_784)):
        sizes = [math.prod(shape) for shape in shapes(c).values()]
        assert [len(sizes), sum(sizes)] == expected

    ours = shapes(PRESETS["motionstream-1.3b"])
    assert ours.pop("track_head.conv.weight") == (16, 256, 1, 1, 1)
    assert ours["patch_embedding.weight"] == (1536, 48, 1, 2, 2) and len(ours) == 983
    image = {f"blocks.{i}.cross_attn.{name}" for i in range(30) for name in both("k_img v_img") | {"norm_k_img.weight"}}
    assert ours.keys() == base.keys() | image | both(" ".join(f"img_emb.proj.{i}" for i in (0, 1, 3, 4)))


def test_a_streaming_model_equals_one_block_causal_pass():
    model, (x, given, _) = new_model(window=None), clip_of(8)
    sigma = torch.tensor([[0.0] * 6 + [0.6, 0.9]] * 2)         # two clean chunks, and a noisy, shorter one
    caches, parts = model.new_caches(), []
    for now in slice(0, 3), slice(3, 6), slice(6, 8):
        part = {"text": given["text"], "tracks": given["tracks"][:, :, now], "caches": caches}
        parts.append(model(x[:, :, now], sigma[:, now], **part, write=now.stop < 8))
    number = (torch.arange(8) // 3).repeat_interleave(6)
    inputs, mask = torch.cat([x, given["tracks"]], 1), number[:, None] >= number
    expected = wan(model.state_dict(), model.config, inputs, 1000 * sigma, given["text"], mask=mask)
    assert_near(torch.cat(parts, 2).double(), expected, 3e-6)
    assert [len(cache) for cache in caches] == [6 * 6] * 2


def test_after_eviction_the_cache_holds_exactly_sink_and_last_window():
    def part(number, length):
        return rand(1, length, 2, 4, seed=number)

    for name in "c1s0w1 c1s1w0 c3s0w1 c3s1w1 c1s2w3 c7s3w3 c3s0w3 c3s1wall c1s0w0".split():
        chunk, sink, window = re.fullmatch(r"c(\d)s(\d)w(\d|all)", name).groups()
        tokens, sink, window = 2 * int(chunk), int(sink), None if window == "all" else int(window)
        cache = KVCache(sink, window)
        for i in range(12):
            cache.write(part(i, tokens), -part(i, tokens))
            kept = [j for j in range(i + 1) if window is None or j < sink or j > i - window]
            keys, values = cache.read(part(99, 3), -part(99, 3))
            assert keys.equal(torch.cat([*(part(j, tokens) for j in kept), part(99, 3)], 1)), (name, i)
            assert values.equal(-keys), (name, i)
            assert len(cache) == len(kept) * tokens             # constant from chunk sink + window on


def test_an_ema_sink_takes_up_what_leaves_the_window():
    chunks = [(rand(1, 4, 2, 4, seed=i), rand(1, 4, 2, 4, seed=50 + i)) for i in range(6)]
    for sink, window, decay in (1, 1, 0.9), (2, 1, 0.5), (1, 2, 0.0), (0, 1, 0.5), (1, 1, 1.0):
        cache = KVCache(sink, window, decay)
        for chunk in chunks:
            cache.write(*chunk)
        for kind in 0, 1:                                           # keys, values
            kept = [chunk[kind] for chunk in chunks[:sink]]
            for chunk in chunks[sink:-window] if sink else []:
                kept[-1] = decay * kept[-1] + (1 - decay) * chunk[kind]
            expected = torch.cat([*kept, *(chunk[kind] for chunk in chunks[-window:])], 1)
            assert_near(cache.read(chunks[0][0][:, :0], chunks[0][1][:, :0])[kind], expected, 1e-6)
    model = new_model(sink_decay=0.5)
    assert all(cache.decay == 0.5 for cache in model.new_caches()) and model.config.sink_decay == 0.5


def test_keys_are_rotated_by_cache_slot_so_a_long_stream_equals_a_short_one():
    model, (x, given, _) = new_model(num_layers=1), clip_of(63)

    def last_of(*chunks):
        caches = model.new_caches()
        for i in chunks:
            now = slice(3 * i, 3 * i + 3)
            part = {"text": given["text"], "tracks": given["tracks"][:, :, now], "caches": caches}
            velocity = model(x[:, :, now], torch.zeros(2), **part, write=True)
        return velocity

    assert last_of(*range(21)).equal(last_of(0, 19, 20))        # the slots of sink, window and chunk
    assert not last_of(0, 19, 20).equal(last_of(0, 18, 20)) and not last_of(0, 19, 20).equal(last_of(1, 19, 20))


def test_denoising_steps_only_read_and_a_written_chunk_has_no_graph():
    model, (x, given, _) = new_model().requires_grad_(True), clip_of(3)
    caches = model.new_caches()
    model(x, torch.zeros(2), caches=caches, write=True, **given)
    held = [(tensor, tensor.clone()) for cache in caches for chunk in cache.chunks for tensor in chunk]
    model(x, torch.ones(2), caches=caches, **given).sum().backward()
    now = [tensor for cache in caches for chunk in cache.chunks for tensor in chunk]
    assert len(now) == len(held) == 4 and not any(tensor.requires_grad for tensor in now)
    assert all(a is b and a.equal(copy) for a, (b, copy) in zip(now, held))


# ----------------------------------------------------------------------------------------------------------------------
# Tracks.

def new_tracks(frames, count, batch=2):
    """Tracks on 48 x 32 pixels, some of which leave the picture, with pauses, and IDs."""
    tracks = torch.tensor([48, 32]) * (0.5 + 0.4 * rand(batch, frames, count, 2))
    ids = torch.randint(0, 2 ** 32, (batch, count), generator=seeded())
    return tracks, rand(batch, frames, count, seed=1) > -0.8, ids


def identity_head():
    """A track head whose output is the packed volume itself."""
    head = TrackHead(8, 32, 8).requires_grad_(False)
    head.conv.weight.copy_(torch.eye(32)[..., None, None, None])
    return head


def vector(number):
    """What an ID looks like in 8 channels: its upper 16 bits in 4, its lower ones in 4; cosines first."""
    angles = [half * frequency for half in divmod(int(number), 2 ** 16) for frequency in (1, 0.01)]
    return torch.tensor([f(a) for pair in (angles[:2], angles[2:]) for f in (math.cos, math.sin) for a in pair])


def test_track_head_writes_the_sinusoid_of_the_id_where_eq_1_says():
    tracks, visible, ids = new_tracks(13, 9)
    tracks[0, 2, 0], tracks[0, 3, 0], visible[:, 2:4, 0] = torch.tensor([15.9, 7.99]), torch.tensor([16.0, 8.0]), True
    volume = torch.zeros(2, 16, 8, 4, 6)                        # (B, T + 3, d, h, w): three empty frames, then frame 0
    for b, t in itertools.product(range(2), range(13)):
        for n in ids[b].argsort(descending=True).tolist():      # of several in one cell the lowest ID stays
            x, y = tracks[b, t, n].tolist()
            if visible[b, t, n] and 0 <= x < 48 and 0 <= y < 32:
                volume[b, t + 3, :, math.floor(y / 8), math.floor(x / 8)] = vector(ids[b, n])
    expected = volume.unflatten(1, (4, 4)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)            # 4 frames to the channels
    assert (volume.norm(dim=2) > 0).sum() > 50, "too few cells for a test"
    assert_near(identity_head()(tracks, visible, ids, 32, 48), expected, 1e-6)


def test_frame_0_sits_in_the_last_of_the_four_packed_slots():
    for frame, latent, slot in (0, 0, 3), (1, 1, 0), (4, 1, 3), (5, 2, 0), (8, 2, 3):
        visible = (torch.arange(9) == frame)[None, :, None]
        out = identity_head()(torch.full((1, 9, 1, 2), 20.0), visible, torch.tensor([[5]]), 32, 48)
        expected = torch.zeros(4, 8, 3, 4, 6)                   # (slot, d, F, h, w)
        expected[slot, :, latent, 2, 2] = vector(5)
        assert_near(out[0], expected.flatten(0, 1), 1e-6)


def test_hidden_and_outside_tracks_leave_zeros():
    head = randomised(TrackHead(8, 5, 8))
    outside = [(-0.01, 4), (4, -3), (48, 4), (4, 32), (4, -1e9), (math.nan, 4), (math.inf, 4), (4, -math.inf)]
    tracks = torch.tensor(outside).expand(1, 5, -1, 2)
    assert head(tracks, torch.ones(1, 5, 8).bool(), torch.arange(8)[None], 32, 48).count_nonzero() == 0
    tracks, visible, ids = new_tracks(5, 9)
    assert head(tracks, visible & False, ids, 32, 48).count_nonzero() == 0
    unknown = tracks.where(visible[..., None], math.nan)
    assert head(unknown, visible, ids, 32, 48).equal(head(tracks, visible, ids, 32, 48))
    assert head(tracks[:, :, :0], visible[:, :, :0], ids[:, :0], 32, 48).count_nonzero() == 0
    inside = torch.tensor([47.99, 31.99]).expand(1, 5, 1, 2)
    assert head(inside, torch.ones(1, 5, 1).bool(), torch.tensor([[0]]), 32, 48)[..., 3, 5].count_nonzero() > 0


def test_the_order_of_tracks_does_not_matter():
    head, (tracks, visible, ids) = randomised(TrackHead(8, 5, 8)), new_tracks(9, 60)           # 60 tracks in 24 cells
    order = torch.randperm(60, generator=seeded(0))
    shuffled = tracks[:, :, order], visible[:, :, order], ids[:, order]
    assert head(*shuffled, 32, 48).equal(head(tracks, visible, ids, 32, 48))


def test_track_head_chunk_by_chunk_equals_the_whole():
    head, (tracks, visible, ids) = randomised(TrackHead(8, 5, 8)), new_tracks(33, 7)
    whole = head(tracks, visible, ids, 32, 48)
    parts = [head(tracks[:, a:b], visible[:, a:b], ids, 32, 48) for a, b in ((0, 9), (9, 21), (21, 25), (25, 33))]
    assert whole.shape == (2, 5, 9, 4, 6)
    assert_near(torch.cat(parts, 2), whole, 1e-6)               # to the bit only on one thread
    assert_error(AssertionError, "3 frames", head, tracks[:, :3], visible[:, :3], ids, 32, 48)


def test_track_ids_are_distinct_or_the_pixel_where_a_track_starts():
    tracks, visible, _ = new_tracks(9, 200)
    ids = track_ids(tracks, visible, replace(SMALL, tracks="random"), seeded())
    assert all(len(set(row.tolist())) == 200 for row in ids) and not ids[0].equal(ids[1])
    tracks = torch.tensor([[math.nan, 0.0], [24.7, 16.0], [40.0, 30.0]])[None, :, None]
    visible = torch.tensor([False, True, True])[None, :, None]
    assert track_ids(tracks, visible, replace(SMALL, tracks="start")).tolist() == [[16 * 2 ** 16 + 24]]


def test_frame_0_is_a_map_of_start_pixels_if_those_are_the_ids():
    tracks, visible, ids = new_tracks(13, 5)
    model = SimpleNamespace(config=replace(SMALL, tracks="start"), track_head=identity_head())
    out = track_features(model, tracks, visible & False, ids)[0].unflatten(0, (4, 8))          # (slot, d, F, h, w)
    for row, column in itertools.product(range(4), range(6)):
        assert_near(out[3, :, 0, row, column], vector((8 * row << 16) + 8 * column), 1e-6)
    assert out.count_nonzero() == out[3, :, 0].count_nonzero()
    parts = [track_features(model, tracks[:, a:b], visible[:, a:b], ids) for a, b in ((0, 5), (5, 13))]
    assert_near(torch.cat(parts, 2), track_features(model, tracks, visible, ids), 1e-6)
    model.config = replace(SMALL, tracks="random")
    assert track_features(model, tracks, visible, ids).equal(model.track_head(tracks, visible, ids, 32, 48))


# ----------------------------------------------------------------------------------------------------------------------
# The rollout.

def test_rollout_equals_the_algorithm_by_hand():
    model, (noise, given, first) = new_model(), clip_of(8)
    rng, caches, chunks = seeded(5), model.new_caches(), []
    for start in 0, 3, 6:                                       # the last chunk is shorter
        x, sigmas = noise[:, :, start:start + 3], [*model.config.sigmas, 0.0]
        now = {"text": given["text"], "tracks": given["tracks"][:, :, start:start + 3]}
        for sigma, following in zip(sigmas, sigmas[1:]):
            level = torch.full((2, x.shape[2]), sigma, dtype=torch.float64)
            if start == 0:
                x, level[:, 0] = torch.cat([first, x[:, :, 1:]], 2), 0
            x0 = x - level.float()[:, None, :, None, None] * model(x, level, caches=caches, **now)
            if following:
                x = (1 - following) * x0 + following * torch.randn(x.shape, generator=rng)
        model(x0, torch.zeros(2), caches=caches, write=True, **now)
        chunks.append(x0)
    rolled = list(rollout(model, noise, given, first, generator=seeded(5)))
    assert [x.shape[2] for x in rolled] == [3, 3, 2] and rolled[0][:, :, :1].equal(first)
    assert_near(torch.cat(rolled, 2), torch.cat(chunks, 2), 1e-5)
    assert not rolled[1][:, :, :1].equal(first) and all(len(cache) == 5 * 6 for cache in caches)


def test_a_stream_fed_chunk_by_chunk_equals_the_whole_clip_and_asks_late():
    model, (noise, given, first), events = new_model(), clip_of(9), []

    def conditions():
        for i in range(3):
            events.append(f"ask {i}")
            yield {"text": given["text"], "tracks": given["tracks"][:, :, 3 * i:3 * i + 3]}

    endless = itertools.chain(noise.split(3, 2), itertools.repeat(noise[:, :, :3]))
    parts = []
    for i, x in enumerate(rollout(model, endless, conditions(), first, generator=seeded(5))):
        events.append(f"got {i}")
        parts.append(x)
    assert events == ["ask 0", "got 0", "ask 1", "got 1", "ask 2", "got 2"]
    whole = list(rollout(model, noise, given, first, generator=seeded(5)))
    assert len(parts) == len(whole) == 3 and all(a.equal(b) for a, b in zip(parts, whole))


def test_future_tracks_do_not_change_past_frames():
    model, (noise, given, first) = new_model(), clip_of(12)
    changed = dict(given, tracks=given["tracks"].clone())
    changed["tracks"][:, :, 6:] += 1                            # from chunk 2 on
    one, two = (list(rollout(model, noise, c, first, generator=seeded(0))) for c in (given, changed))
    assert [a.equal(b) for a, b in zip(one, two)] == [True, True, False, False]


def test_training_stops_at_the_exit_step_and_only_that_has_a_graph():
    model, (noise, given, first), calls = new_model().requires_grad_(True), clip_of(6), []
    model.register_forward_hook(lambda _, args, options, out: calls.append(
        (args[1].max().item(), out.requires_grad, options.get("write", False))), with_kwargs=True)
    for exit_step, grad in itertools.product((0, 1, 2, None), (True, False)):
        calls.clear()
        chunks = list(rollout(model, noise, given, first, exit_step=exit_step, grad=grad))
        last = 2 if exit_step is None else exit_step
        denoising = [(sigma, grad and i == last, False) for i, sigma in enumerate(SMALL.sigmas[:last + 1])]
        assert calls == [*denoising, (0.0, False, True)] * 2
        assert all(x.requires_grad == grad for x in chunks)


def test_no_gradient_flows_from_a_chunk_into_the_chunks_before_it():
    model, (noise, given, first) = new_model().requires_grad_(True), clip_of(6)
    a, b = (part.clone().requires_grad_(True) for part in noise.split(3, 2))
    one, two = rollout(model, iter([a, b]), given, first, exit_step=0, grad=True)
    two.square().sum().backward()
    assert a.grad is None and b.grad.abs().sum() > 0 and model.blocks[0].self_attn.k.weight.grad.abs().sum() > 0
    one.square().sum().backward()
    assert a.grad.abs().sum() > 0


def test_rollout_leaves_the_callers_grad_mode_alone():
    model, (noise, given, first) = new_model().requires_grad_(True), clip_of(9)
    for mode, grad in itertools.product((True, False), (True, False)):
        with torch.set_grad_enabled(mode):
            for _ in rollout(model, noise, given, first, grad=grad):
                assert torch.is_grad_enabled() == mode
            assert torch.is_grad_enabled() == mode


def test_training_and_sampling_roll_out_the_same_bits():
    model, (noise, given, first) = new_model().requires_grad_(True), clip_of(9)
    train = rollout(model, noise, given, first, exit_step=2, grad=True, generator=seeded(3))
    with torch.inference_mode():
        play = list(rollout(model, noise, given, first, generator=seeded(3)))
    assert all(a.detach().equal(b) for a, b in zip(train, play, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Weights files.

def saved(path, model, change=None, dtype=None, **meta):
    """Write the model's weights; `change` edits the dict of tensors, `meta` the metadata."""
    tensors = {name: t.to(dtype or t.dtype).contiguous() for name, t in model.state_dict().items()}
    if change:
        change(tensors)
    own = (model.metadata() if isinstance(model, TinyVAE) else
           {"format": "motionstream", "config": json.dumps(asdict(model.config))})
    save_file(tensors, path, {**own, **meta})
    return path


def test_from_pretrained_returns_what_was_saved():
    model, (x, given, _), half = new_model(), clip_of(3), torch.float16
    with folder() as here:
        for on_disk, dtype, kept in ((torch.float32, None, torch.float32), (half, None, half),
                                     (half, torch.float32, torch.float32), (half, torch.bfloat16, torch.bfloat16)):
            saved(here / "a.safetensors", model, dtype=on_disk)
            loaded = MotionStream.from_pretrained(here / "a.safetensors", dtype=dtype)
            assert loaded.config == model.config and not loaded.training
            for name, p in loaded.named_parameters():
                island = re.search(r"time_|head\.|modulation|norm3", name)
                assert p.dtype == (torch.float32 if island else kept), (name, p.dtype)
            v = loaded(x, torch.ones(2), **given)
            assert v.dtype == torch.float32
            assert_near(v, model(x, torch.ones(2), **given), 0 if on_disk == torch.float32 else 0.05)
        cache = MotionStream.from_pretrained(here / "a.safetensors", sink=0, window=None).new_caches()[0]
        assert cache.sink == 0 and cache.window is None


def test_weights_that_do_not_fit_are_refused_in_one_line_that_names_the_file():
    model, vae, both = new_model(), new_vae(), (MotionStream, TinyVAE)
    with folder() as here:
        def refused(path, *classes):
            for cls in classes:
                assert_error(ValueError, path.name, cls.from_pretrained, path)

        whole, own = saved(here / "whole.safetensors", model), saved(here / "vae.safetensors", vae)
        for data in whole.read_bytes()[:-100], whole.read_bytes()[:50], b"", b"\xff" * 999:
            (here / "damaged.safetensors").write_bytes(data)
            refused(here / "damaged.safetensors", *both)
        for cls, net, name in (MotionStream, model, "blocks.1.ffn.0.weight"), (TinyVAE, vae, "decoder.1.weight"):
            refused(saved(here / "missing.safetensors", net, lambda t: t.pop(name)), cls)
            refused(saved(here / "extra.safetensors", net, lambda t: t.update(extra=torch.zeros(3))), cls)
            refused(saved(here / "shape.safetensors", net, lambda t: t.update({name: torch.zeros(3)})), cls)
            refused(saved(here / "json.safetensors", net, config="{"), cls)
            refused(saved(here / "list.safetensors", net, config="[1]"), cls)
            refused(saved(here / "newer.safetensors", net, config=json.dumps({"unheard": 1})), cls)
        refused(here / "nowhere.safetensors", *both), refused(own, MotionStream), refused(whole, TinyVAE)
        for content in [1], {"encoder.0.weight": 1}, {"encoder.conv1.weight": torch.ones(3)}, {"code": Path("x")}:
            torch.save(content, here / "odd.pth")
            refused(here / "odd.pth", TinyVAE)


def test_words_are_the_same_in_every_process():
    ours = embed_words("Fading light, spinning shapes", SMALL)
    assert ours.shape == (1, 4, 12) and ours.equal(embed_words("fading LIGHT spinning shapes", SMALL))
    assert_near(ours[0, :, 0], torch.tensor([0.42179, 0.36915, 0.47959, -1.30741]), 1e-4)         # the shipped weights know these
    assert embed_words(None, SMALL) is None and embed_words("", SMALL).shape == (1, 0, 12)
    assert embed_words("a b c d e f g h i j", SMALL).shape == (1, 5, 12)


# ----------------------------------------------------------------------------------------------------------------------
# Public weights. Small models, but with Wan's heads of 128 channels, whose RoPE splits 44 / 42 / 42.

WAN = replace(PRESETS["wan2.1-1.3b"], dim=256, ffn_dim=320, num_heads=2, num_layers=2, text_dim=24)
FAMILIES = {                                    # and what they want of the image: nothing, its latent, a mask before it
    "Wan 2.1 T2V": (WAN, "nothing"),
    "Wan 2.1 I2V, Fun-InP": (replace(WAN, in_dim=36, clip_dim=40), "mask"),
    "Wan 2.1 Fun-Control": (replace(WAN, in_dim=48, track_dim=16, clip_dim=40), "latent"),
    "Wan 2.2 I2V A14B, one expert": (replace(WAN, in_dim=36), "mask"),
    "Wan 2.2 Fun-Control A14B, one expert": (replace(WAN, in_dim=52, track_dim=16), "mask"),
    "Wan 2.2 TI2V 5B": (replace(WAN, in_dim=48, out_dim=48, stride=16, size=(704, 1280), fps=24), "nothing"),
    "Wan 2.2 Fun-Control 5B": (replace(WAN, in_dim=148, out_dim=48, track_dim=48, stride=16, size=(704, 1280), fps=24),
                               "mask"),
}


@functools.cache
def public(family="Wan 2.1 T2V"):
    """{name: tensor} of a random model in Wan's layout, of sizes at which float32 agrees to the last digits."""
    tensors, rng = {}, seeded()
    for name, t in MotionStream(FAMILIES[family][0]).state_dict().items():
        if name.startswith("track_head"):
            continue
        fan_in = t.shape[-1] if "modulation" in name else t[0].numel()
        tensors[name] = torch.randn(t.shape, generator=rng) * (fan_in ** -0.5 if t.ndim > 1 else 0.02)
        if t.ndim == 1 and name.endswith("weight"):             # of a norm
            tensors[name] = 1 + 5 * tensors[name]
    return tensors


def in_diffusers_layout(tensors):
    """The same tensors under the names of Diffusers' WanTransformer3DModel."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
                 "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
    names = {"patch_embedding": "patch_embedding", "head.head": "proj_out", "head.modulation": "scale_shift_table",
             "time_projection.1": "condition_embedder.time_proj"}
    for part in "text", "time":
        for i, n in (0, 1), (2, 2):
            names[f"{part}_embedding.{i}"] = f"condition_embedder.{part}_embedder.linear_{n}"
    for i, name in (0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2"):
        names[f"img_emb.proj.{i}"] = f"condition_embedder.image_embedder.{name}"
    for i in range(WAN.num_layers):
        block = {"modulation": "scale_shift_table", "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
        for ours, theirs in ("self_attn", "attn1"), ("cross_attn", "attn2"):
            block |= {f"{ours}.{name}": f"{theirs}.{other}" for name, other in attention.items()}
        names |= {f"blocks.{i}.{name}": f"blocks.{i}.{other}" for name, other in block.items()}
    ends = "", ".weight", ".bias"
    names = {name + end: other + end for name, other in names.items() for end in ends}
    return {names[name]: t for name, t in tensors.items()}


def diffusers_config(c):
    return {"patch_size": [1, 2, 2], "num_attention_heads": c.num_heads, "attention_head_dim": c.dim // c.num_heads,
            "in_channels": c.in_dim, "out_channels": c.out_dim, "text_dim": c.text_dim, "freq_dim": c.freq_dim,
            "ffn_dim": c.ffn_dim, "num_layers": c.num_layers, "cross_attn_norm": True, "eps": c.eps,
            "qk_norm": "rms_norm_across_heads", "image_dim": c.clip_dim or None,
            "added_kv_proj_dim": c.dim if c.clip_dim else None}


def write_layout(here, family, layout):
    """Weights as the public repositories have them; returns the folder to load."""
    c, tensors = FAMILIES[family][0], public(family)
    if layout == "Wan":
        save_file(tensors, here / "diffusion_pytorch_model.safetensors")
        stored = "dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len"
        (here / "config.json").write_text(json.dumps({name: getattr(c, name) for name in stored}))
        return here
    (here / "transformer").mkdir()
    unused = {f"blocks.{i}.attn2.norm_added_q.weight": torch.zeros(c.dim) for i in range(2)} if c.clip_dim else {}
    save_file(in_diffusers_layout(tensors) | unused, here / "transformer/diffusion_pytorch_model.safetensors")
    (here / "transformer/config.json").write_text(json.dumps(diffusers_config(c)))
    return here


def same_tensors(model, tensors):
    """Are the model's parameters, but for the track head's, these?"""
    ours = {name: t for name, t in model.state_dict().items() if not name.startswith("track_head")}
    return ours.keys() == tensors.keys() and all(t.equal(tensors[name].to(t.dtype)) for name, t in ours.items())


def with_diffusers(test):
    """A test that says loudly that it skips where there is nothing to compare with."""
    @functools.wraps(test)
    def maybe():
        try:
            import diffusers  # noqa: F401
        except ImportError:
            raise unittest.SkipTest("DIFFUSERS IS NOT INSTALLED, nothing was compared: pip install diffusers") from None
        test()
    return maybe


@with_diffusers
def test_public_weights_give_what_diffusers_gives():
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert
    small, large = torch.tensor([3.0, 17.5]), torch.tensor([833.33, 999.0])     # its angles are float32
    per_frame = torch.tensor([[0.0, 12.5, 3.0], [0.0, 0.0, 19.0]])              # as TI2V has them
    for family, (c, _) in FAMILIES.items():
        names, theirs = in_diffusers_layout(public(family)), convert(dict(public(family)))
        assert theirs.keys() == names.keys() and all(t is theirs[name] for name, t in names.items())
        reference = WanTransformer3DModel(**diffusers_config(c)).eval().requires_grad_(False)
        reference.load_state_dict(theirs)
        models = []
        for layout in "Wan", "Diffusers":
            with folder() as here:
                models.append(MotionStream.from_pretrained(write_layout(here, family, layout)))
        x, text = rand(2, c.out_dim, 3, 4, 6), rand(2, 5, c.text_dim, seed=1)
        tracks = rand(2, c.track_dim, 3, 4, 6, seed=2) if c.track_dim else None
        image = rand(2, c.image_dim, 3, 4, 6, seed=3) if c.image_dim else None
        clip = rand(2, 257, c.clip_dim, seed=4) if c.clip_dim else None
        inputs = torch.cat([y for y in (x, tracks, image) if y is not None], 1)
        for t, tolerance in (small, 1e-6), (large, 2e-5), (per_frame, 1e-6):
            each = t if t.ndim == 1 else t.repeat_interleave(6, 1)              # or one a token
            expected = reference(inputs, each, F.pad(text, (0, 0, 0, 512 - 5)), clip, return_dict=False)[0]
            for model in models:
                v = model(x, t.double() / 1000, text, tracks=tracks, image=image, clip=clip)
                assert_near(v, expected, tolerance)


@with_diffusers
def test_a_written_file_is_one_that_diffusers_reads():
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert
    with folder() as here:
        family = "Wan 2.1 I2V, Fun-InP"
        save_pretrained(MotionStream.from_pretrained(write_layout(here, family, "Wan")), here / "a.safetensors")
        reference = WanTransformer3DModel(**diffusers_config(FAMILIES[family][0]))
        reference.load_state_dict(convert(load_file(here / "a.safetensors")))
        assert all(t.equal(reference.state_dict()[name]) for name, t in in_diffusers_layout(public(family)).items())


def test_families_are_told_from_their_tensors():
    for family, (c, image) in FAMILIES.items():
        with folder() as here:
            save_file(public(family), here / "a.safetensors")
            model = MotionStream.from_pretrained(here / "a.safetensors", chunk=2)
            assert model.config == replace(c, chunk=2) and same_tensors(model, public(family)), family
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            assert model.config.image_dim == {"nothing": 0, "latent": c.out_dim, "mask": 4 + c.out_dim}[image], family
            for layout in "Wan", "Diffusers":
                (here / layout).mkdir()
                model = MotionStream.from_pretrained(write_layout(here / layout, family, layout))
                assert model.config == c and same_tensors(model, public(family)), (family, layout)
    big = replace(PRESETS["wan2.1-14b"], in_dim=36, clip_dim=1280)
    for c in (PRESETS["wan2.1-1.3b"], PRESETS["wan2.1-14b"], PRESETS["wan2.2-5b"], big,
              replace(big, in_dim=48, track_dim=16)):
        with torch.device("meta"):
            tensors = MotionStream(c).state_dict()
        tensors.pop("track_head.conv.weight", None)
        assert find_config(tensors, {}, Path("nowhere/a.safetensors")) == c


def test_a_track_head_tells_how_wide_its_slot_is():
    c = replace(WAN, in_dim=40, track_dim=8)                    # of this project, but without its metadata
    model = randomised(MotionStream(c))
    with folder() as here:
        save_file(model.state_dict(), here / "a.safetensors")
        back = MotionStream.from_pretrained(here / "a.safetensors")
    assert back.config == c and all(t.equal(model.state_dict()[name]) for name, t in back.state_dict().items())


def test_what_training_and_packing_put_around_names_is_taken_off():
    with folder() as here:
        for prefix in ("model.", "model.diffusion_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.",
                       "_checkpoint_wrapped_module.", "module.model._orig_mod."):
            save_file({prefix + name: t for name, t in public().items()}, here / "a.safetensors")
            assert same_tensors(MotionStream.from_pretrained(here / "a.safetensors"), public()), prefix
        inside = {re.sub(r"(blocks\.\d\.)", r"_fsdp_wrapped_module.\1_checkpoint_wrapped_module._orig_mod.", name): t
                  for name, t in public().items()}
        save_file(inside, here / "a.safetensors")
        assert same_tensors(MotionStream.from_pretrained(here / "a.safetensors"), public())


def shards(here, tensors, count=3):
    """Write tensors in shards with an index, as Hugging Face does."""
    names, place = sorted(tensors), {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::count]}, here / file)
        place |= {name: file for name in names[i::count]}
    index = here / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return index


def test_files_folders_and_shards_are_found_and_what_is_missing_is_named():
    with folder() as here:
        (here / "repository/transformer").mkdir(parents=True)
        for tensors, at in (public(), here), (in_diffusers_layout(public()), here / "repository/transformer"):
            index = shards(at, tensors)
            for name in "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors":
                (at / name).write_bytes(b"of another model")
            paths = [at, str(at), index, at / "diffusion_pytorch_model-00002-of-00003.safetensors"]
            for path in paths + [here / "repository"] * (at != here):
                assert same_tensors(MotionStream.from_pretrained(path), public()), path
            index.rename(at / "kept")
            assert same_tensors(MotionStream.from_pretrained(at), public())             # shards without an index
            (at / "kept").rename(index)
            lost = "diffusion_pytorch_model-00003-of-00003.safetensors"
            (at / lost).unlink()
            for path in paths:
                assert_error(ValueError, f"1 of 3 shards are missing: {lost}", MotionStream.from_pretrained, path)
    with folder() as here:                                      # shards that only the index knows
        names = sorted(public())
        for i in range(2):
            save_file({name: public()[name] for name in names[i::2]}, here / f"part{i}.safetensors")
        index = here / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}}))
        assert same_tensors(MotionStream.from_pretrained(here), public())
        for content in "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}':
            index.write_text(content)
            assert_error(ValueError, index.name, MotionStream.from_pretrained, index)

    with folder() as here:
        assert_error(ValueError, "no weights file", MotionStream.from_pretrained, here)
        for name in "a.safetensors", "b.safetensors":
            save_file(public(), here / name)
        assert_error(ValueError, "a.safetensors, b.safetensors", MotionStream.from_pretrained, here)
        for pair in ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"):
            both = here / f"with {pair[0]}"
            for name in pair:
                (both / name).mkdir(parents=True)
                save_file(public(), both / name / "diffusion_pytorch_model.safetensors")
            assert_error(ValueError, f"{both / pair[1]} (low noise)", MotionStream.from_pretrained, both)
            assert same_tensors(MotionStream.from_pretrained(both / pair[1]), public())


def test_checkpoints_of_self_forcing_and_causvid_are_students():
    other = {name: t + 1 for name, t in public().items()}
    named = {"model." + name: t for name, t in public().items()}
    wrapped = {"model._fsdp_wrapped_module." + name: t for name, t in public().items()}
    with folder() as here:
        for content in ({"generator": other, "critic": other, "generator_ema": wrapped}, {"generator_ema": named},
                        {"generator": named}, {"generator": named, "step": 600}):
            for zipped in True, False:                          # False: the older kind of file, which cannot be mapped
                torch.save(content, here / "a.pt", _use_new_zipfile_serialization=zipped)
                model = MotionStream.from_pretrained(here / "a.pt")
                assert same_tensors(model, public())
                c = model.config
                assert c.causal and (c.chunk, c.window, c.sink, c.size) == (3, None, 0, (480, 832))
                assert np.allclose(c.sigmas, (1, 0.9375, 0.833333, 0.625), atol=1e-6)
        assert MotionStream.from_pretrained(here / "a.pt", sink=1, window=2).config.window == 2
        for content in public(), {"model": named, "step": 600}:     # which say nothing of a generator
            torch.save(content, here / "flat.pth")
            model = MotionStream.from_pretrained(here / "flat.pth")
            assert same_tensors(model, public()) and not model.config.causal

        class Code:
            def __reduce__(self):
                return Path.touch, (here / "it ran",)

        for content in [1], {"generator": [1]}, {"model": {"a": 1}}, {"lora": named}, {"generator": Code()}:
            torch.save(content, here / "odd.pt")
            assert_error(ValueError, "odd.pt", MotionStream.from_pretrained, here / "odd.pt")
        assert not (here / "it ran").exists()


def test_dtypes_of_public_files_are_kept_and_islands_never_rounded():
    def dtypes(model):
        islands = r"time_|head\.|modulation|norm3"
        return {p.dtype for name, p in model.named_parameters() if not re.search(islands, name)}

    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    mixed = {name: t.to(bf16) if t.ndim == 2 else t for name, t in public().items()}      # as repackaged files are
    with folder() as here:
        for tensors, kept in ((public(), single), ({n: t.half() for n, t in public().items()}, half),
                              ({n: t.to(bf16) for n, t in public().items()}, bf16), (mixed, bf16)):
            save_file(tensors, here / "a.safetensors")
            model = MotionStream.from_pretrained(here / "a.safetensors")
            assert dtypes(model) == {kept} and model.head.head.weight.dtype == single
            assert model(rand(1, 16, 3, 2, 4), torch.ones(1), rand(1, 2, 24)).isfinite().all()
            for dtype in bf16, half, single:
                model = MotionStream.from_pretrained(here / "a.safetensors", dtype=dtype)
                assert dtypes(model) == {dtype}
                for name in "time_embedding.0.weight", "head.head.weight", "blocks.1.modulation", "blocks.0.norm3.bias":
                    assert model.state_dict()[name].equal(tensors[name].float()), name
        for dtype in torch.float8_e4m3fn, torch.float8_e5m2, torch.int8:
            save_file(public() | {"blocks.0.ffn.0.weight": torch.zeros(320, 256).to(dtype)}, here / "small.safetensors")
            assert_error(ValueError, f"small.safetensors: blocks.0.ffn.0.weight is {dtype}",
                         MotionStream.from_pretrained, here / "small.safetensors")


def test_public_weights_that_do_not_fit_are_refused_in_one_line():
    def refused(text, change=None, settings=None, **overrides):
        tensors = dict(public())
        for name, t in (change or {}).items():
            tensors |= {name: t} if t is not None else {}
            tensors = tensors if t is not None else {n: t for n, t in tensors.items() if not n.startswith(name)}
        with folder() as here:
            if settings is not None:
                (here / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
            save_file(tensors, here / "a.safetensors")
            assert_error(ValueError, text, MotionStream.from_pretrained, here / "a.safetensors", **overrides)
            assert_error(ValueError, str(here), MotionStream.from_pretrained, here / "a.safetensors", **overrides)

    refused("not a whole MotionStream; 1 tensors are missing: blocks.1.ffn.2.bias",
            {"blocks.1.ffn.2.bias": None})
    refused("26 tensors", {"blocks.0": None} | {"blocks.0.ffn.0.weight": torch.zeros(320, 256)})
    refused("2 tensors are unknown: ref_conv.bias, ref_conv.weight",
            {"ref_conv.weight": torch.zeros(4), "ref_conv.bias": torch.zeros(4)})
    refused("1 tensors are of another shape: head.head.bias", {"head.head.bias": torch.zeros(3)})
    for text in "7 tensors are unknown", "vace_blocks.3, vace_blocks.4\n":              # the count, and five names
        refused(text, {f"vace_blocks.{i}": torch.zeros(4) for i in range(7)})
    refused("a.safetensors: holds blocks.0.norm3.bias twice", {"model.blocks.0.norm3.bias": torch.zeros(256)})
    for name in "patch_embedding", "head.head", "blocks", "text_embedding", "time_embedding":
        refused("a whole DiT of Wan is wanted here", {name: None})
    refused("a whole DiT of Wan is wanted here", {"patch_embedding.weight": torch.zeros(256, 64)})
    refused("32 input channels for 16", {"patch_embedding.weight": torch.zeros(256, 32, 1, 2, 2)})
    refused("48 by its tensors, but 36", {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2)}, {"in_dim": 36})
    for settings in {"num_layers": 30}, {"dim": 1536}, {"in_channels": 36}, {"ffn_dim": 8960}, {"image_dim": 1280}:
        refused("by its tensors, but", settings=settings)
    for settings in "{", "[1]", '"text"':
        refused("config.json: cannot be read", settings=settings)
    for heads in 3, 0, "2":
        refused("give num_heads", settings={"num_heads": heads})
    refused("give num_heads", num_heads=0)
    refused("a.safetensors", num_layers=3)
    with folder() as here:
        own = asdict(SMALL)
        saved(here / "a.safetensors", new_model(), config=json.dumps(own | {"num_layers": 3}))
        assert_error(ValueError, "num_layers is 2 by its tensors, but 3 in its metadata", MotionStream.from_pretrained,
                     here / "a.safetensors")
        for c in SMALL, FAMILIES["Wan 2.1 Fun-Control"][0]:
            save_pretrained(randomised(MotionStream(c)), here / "a.safetensors")
            assert_error(ValueError, f"its track slot has {c.track_dim} channels", MotionStream.from_pretrained,
                         here / "a.safetensors", track_dim=c.track_dim + 1)
        saved(here / "a.safetensors", new_model(), lambda tensors: tensors.pop("track_head.conv.weight"))
        assert_error(ValueError, "track_head.conv.weight", MotionStream.from_pretrained, here / "a.safetensors")


def test_files_that_are_something_else_are_told_by_what_they_are():
    dit, vae = public(), randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict()

    class Code:
        def __reduce__(self):
            return Path.touch, (here / "it ran",)

    with folder() as here:
        save_file(dit, here / "dit.safetensors")
        torch.save({"generator_ema": dit}, here / "dit.pt")
        whole, zipped = (here / "dit.safetensors").read_bytes(), (here / "dit.pt").read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070392\n"
        for name, data, text in (("lfs", pointer, "this is a git-lfs pointer, run git lfs pull"),
                                 ("page", b"<!DOCTYPE html><html>", "this is a web page (21 bytes)"),
                                 ("gguf", b"GGUF" + bytes(99), "this is a GGUF file"),
                                 ("empty", b"", "this is an empty file (0 bytes)"),
                                 ("noise", b"\xff" * 999, "this is something unknown (999 bytes)"),
                                 ("cut", whole[:-99], f"truncated: {len(whole) - 99} bytes of {len(whole)};"),
                                 ("header", whole[:99], "truncated: 99 bytes of at least"),
                                 ("half", zipped[:-99], f"this is a truncated .pt ({len(zipped) - 99} bytes)")):
            for path in here / f"{name}.safetensors", here / f"{name}.pt":
                path.write_bytes(data)
                for load in MotionStream.from_pretrained, load_vae:
                    assert_error(ValueError, f"{path}: {text}", load, path)
        lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256)}
        text_encoder = {"encoder.block.0.layer_norm.weight": torch.ones(8)}
        clip = {"visual.conv1.weight": torch.ones(8)}
        for tensors, kind in (lora, "a LoRA"), (text_encoder, "a text encoder"), (clip, "a CLIP encoder"), (
                {"x": torch.ones(3)}, "something unknown"):
            save_file(tensors, here / "a.safetensors")
            for load in MotionStream.from_pretrained, load_vae:
                assert_error(ValueError, f"a.safetensors: this is {kind}; a whole ", load, here / "a.safetensors")
        assert_error(ValueError, "this is a DiT; a whole VAE of Wan", load_vae, here / "dit.pt")
        for tensors, load in (dit, MotionStream.from_pretrained), (vae, load_vae):
            last = sorted(tensors)[-1]
            save_file(tensors | {last: torch.full_like(tensors[last], math.nan)}, here / "a.safetensors")
            assert_error(ValueError, f"a.safetensors: {last} holds NaN or infinity", load, here / "a.safetensors")
        save_file(vae, here / "vae.safetensors")
        assert_error(ValueError, "this is a VAE; a whole DiT of Wan", MotionStream.from_pretrained,
                     here / "vae.safetensors")
        for zipped in True, False:
            torch.save({"generator": Code()}, here / "code.pt", _use_new_zipfile_serialization=zipped)
            for load in MotionStream.from_pretrained, load_vae:
                assert_error(ValueError, "a pickle of something else than tensors, refused", load, here / "code.pt")
        assert not (here / "it ran").exists()


def test_a_file_changed_after_loading_does_not_change_the_model():
    vae = randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict()
    with folder() as here:
        for tensors, load in (public(), MotionStream.from_pretrained), (vae, load_vae):
            for path in here / "a.safetensors", here / "a.pt":
                (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
                model = load(path)
                with open(path, "r+b") as file:                  # in place, as rsync --inplace and truncate do
                    file.write(bytes(path.stat().st_size))
                assert same_tensors(model, tensors), path
                os.truncate(path, 0)
                assert same_tensors(model, tensors), path


LOADING = """
import sys, threading, time
import torch
from safetensors.torch import load_file
from motionstream import MotionStream

def anonymous():                            # kB of memory that is no file's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

before = anonymous()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
if sys.argv[2] == "copy":                   # a plain load_file only maps; read once, it has done what a load must
    loaded = {name: t.clone() for name, t in load_file(sys.argv[1]).items()}
else:
    loaded = MotionStream.from_pretrained(sys.argv[1])
print(time.perf_counter() - started, (peak[0] - before) * 1024)
"""


@slow
def test_loading_wan_1_3b_takes_about_the_memory_of_its_file():
    if not Path("/proc/self/status").exists():
        raise unittest.SkipTest("NO /proc HERE, memory was not measured")
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in MotionStream(PRESETS["motionstream-1.3b"]).state_dict().items()}
    with folder() as here:
        path = here / "a.safetensors"
        save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
        size = path.stat().st_size
        for way in "copy", "from_pretrained":
            runs = [subprocess.run([sys.executable, "-c", LOADING, path, way], cwd=HERE, check=True,
                                   capture_output=True, text=True).stdout.split() for _ in range(5)]
            seconds, peak = (sorted(map(float, column)) for column in zip(*runs))
            print(f"{size / 1e9:.2f} GB by {way}: {seconds[2]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), "
                  f"anonymous memory {peak[2] / size:.2f} of the file")
        assert peak[-1] < 1.3 * size, (peak, size)


@slow
@torch.no_grad()
def test_bfloat16_beside_float32_at_the_size_of_wan_1_3b():
    c = PRESETS["motionstream-1.3b"]
    x, sigma, text = rand(1, 16, 3, 8, 8), torch.tensor([0.833]), 0.1 * rand(1, 20, 4096, seed=1)
    given = {"tracks": rand(1, 16, 3, 8, 8, seed=2), "clip": rand(1, 257, 1280, seed=3)}
    with folder() as here:
        saved(here / "a.safetensors", randomised(MotionStream(c)), dtype=torch.bfloat16)
        exact = MotionStream.from_pretrained(here / "a.safetensors", dtype=torch.float32)(x, sigma, text, **given)
        rounded = MotionStream.from_pretrained(here / "a.safetensors")(x, sigma, text, **given)
    error = ((rounded - exact).norm() / exact.norm()).item()
    print(f"the velocity in bfloat16 is {100 * error:.2f} % (relative L2) from that in float32, of the same weights")
    assert error < 0.02, error


def test_config_json_tells_what_tensors_do_not():
    with folder() as here:
        save_file(public(), here / "a.safetensors")
        odd = {"num_heads": 4, "eps": 1e-5, "text_len": 7, "in_channels": 99, "in_dim": 16, "out_channels": None}
        (here / "config.json").write_text(json.dumps(odd))
        assert MotionStream.from_pretrained(here).config == replace(WAN, num_heads=4, eps=1e-5, text_len=7)
        assert MotionStream.from_pretrained(here, num_heads=1).config.num_heads == 1
        save_pretrained(new_model(), here / "a.safetensors")            # the metadata of a file of this project win
        assert MotionStream.from_pretrained(here).config == SMALL


def test_a_new_track_slot_changes_nothing_and_can_learn():
    for family, (c, _) in FAMILIES.items():
        with folder() as here:
            save_file(public(family), here / "a.safetensors")
            model = MotionStream.from_pretrained(here / "a.safetensors", track_dim=c.track_dim or 16)
            base = MotionStream(c).eval()
            base.load_state_dict(public(family), strict=False)
        new = model.config
        assert (new.track_dim, new.image_dim) == (c.track_dim or 16, c.image_dim)
        assert new.in_dim == c.in_dim + (0 if c.track_dim else 16)
        picture = rand(1, c.image_dim, 3, 2, 4) if c.image_dim else None
        clip = rand(1, 257, c.clip_dim) if c.clip_dim else None
        x, sigma, text = rand(1, c.out_dim, 3, 2, 4, seed=1), torch.tensor([0.5]), rand(1, 2, 24)
        tracks, visible, ids = new_tracks(9, 4, batch=1)
        scale = torch.tensor([4 * c.stride / SMALL.size[1], 2 * c.stride / SMALL.size[0]])
        features = model.requires_grad_(True).track_head(tracks * scale, visible, ids, 2 * c.stride, 4 * c.stride)
        v = model(x, sigma, text, tracks=features, image=picture, clip=clip)
        expected = base(x, sigma, text, image=picture, clip=clip)
        assert_near(v, expected, 1e-6)
        v.square().sum().backward()
        head, columns = model.track_head.conv.weight, model.patch_embedding.weight
        slot = slice(c.out_dim, c.out_dim + new.track_dim)
        assert head.count_nonzero().item() == (0 if c.track_dim else head.numel()), family
        assert columns[:, slot].count_nonzero().item() == (columns[:, slot].numel() if c.track_dim else 0), family
        learns = head.grad if c.track_dim else columns.grad[:, slot]
        assert learns.abs().max() > 1e-6, family


def test_written_weights_come_back_with_their_config():
    model = new_model(chunk=2, window=None, tracks="random")
    with folder() as here:
        path = here / "a.safetensors"
        for dtype in None, torch.float16:
            save_pretrained(model, path, dtype=dtype, step="600")
            back = MotionStream.from_pretrained(path)
            assert back.config == model.config
            for name, t in model.state_dict().items():
                assert back.state_dict()[name].equal(t if dtype is None else t.half().to(back.state_dict()[name].dtype))
            with safe_open(path, "pt") as file:
                assert file.metadata()["step"] == "600" and set(file.keys()) == set(model.state_dict())
        save_pretrained(MotionStream.from_pretrained(path), path)       # over the file that its tensors are mapped from
        assert MotionStream.from_pretrained(path).config == model.config and os.listdir(here) == ["a.safetensors"]
        before = path.read_bytes()

        def fail(tensors, path, about):
            Path(path).write_text("half")
            raise OSError("disk full")

        with unittest.mock.patch("safetensors.torch.save_file", fail):
            assert_error(OSError, "disk full", save_pretrained, model, path)
        assert path.read_bytes() == before and os.listdir(here) == ["a.safetensors"]


def test_shipped_weights_are_read_as_they_are():
    for name in "tiny", "tiny_teacher":
        path = HERE / f"assets/{name}.safetensors"
        model, tensors = MotionStream.from_pretrained(path), load_file(path)
        assert model.state_dict().keys() == tensors.keys()
        assert all(t.equal(tensors[name].to(t.dtype)) for name, t in model.state_dict().items())
        assert model.config.causal == (name == "tiny") and model.config.track_dim == 32


def test_weights_with_a_mask_get_it_before_the_image():
    latents = rand(2, 16, 4, 2, 3)
    image = image_and_mask(latents)
    assert image.shape == (2, 20, 4, 2, 3) and image[:, 4:].equal(latents)
    assert (image[:, :4, 0] == 1).all() and (image[:, :4, 1:] == 0).all()
    assert FAMILIES["Wan 2.1 I2V, Fun-InP"][0].image_dim == image.shape[1]


# ----------------------------------------------------------------------------------------------------------------------
# The tiny VAE.

def taehv_shapes(channels, pixels):
    """Names and shapes of TAEHV's files for Wan: taew2_1 is (16, 3), taew2_2 is (48, 12)."""
    convs = {"encoder.0": (64, pixels), "encoder.17": (channels, 64), "decoder.1": (256, channels),
             "decoder.22": (pixels, 64)}
    for part, i, n in [("encoder", i, 64) for i in (4, 5, 6, 9, 10, 11, 14, 15, 16)] + [
            ("decoder", i + k, n) for i, n in ((3, 256), (9, 128), (15, 64)) for k in range(3)]:
        convs |= {f"{part}.{i}.conv.0": (n, 2 * n), f"{part}.{i}.conv.2": (n, n), f"{part}.{i}.conv.4": (n, n)}
    expected = {f"{name}.weight": (*s, 3, 3) for name, s in convs.items()}
    expected |= {f"{name}.bias": s[:1] for name, s in convs.items()}
    expected |= {f"encoder.{i}.weight": (64, 64, 3, 3) for i in (3, 8, 13)}
    expected |= {f"decoder.{i}.weight": (*s, 3, 3) for i, s in ((8, (128, 256)), (14, (64, 128)), (20, (64, 64)))}
    expected |= {f"encoder.{i}.conv.weight": (64, n, 1, 1) for i, n in ((2, 128), (7, 128), (12, 64))}
    grow = (7, (256, 256)), (13, (256, 128)), (19, (128, 64))
    return expected | {f"decoder.{i}.conv.weight": (*s, 1, 1) for i, s in grow}


def test_the_tiny_vae_has_the_layouts_of_taew2_1_and_taew2_2():
    with torch.device("meta"):
        vae = TinyVAE(TAEW21)
    expected = taehv_shapes(16, 3)
    assert {name: tuple(p.shape) for name, p in vae.state_dict().items()} == expected
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert counts == [1_470_928, 9_844_611] and vae.stride == 8
    with folder() as here:
        for config, stride, shapes in (TAEW21, 8, expected), (TAEW22, 16, taehv_shapes(48, 12)):
            tensors = {name: rand(*shape).half() for name, shape in shapes.items()}
            save_file(tensors, here / "taew.safetensors")
            torch.save(tensors, here / "taew.pth")
            for path in here / "taew.safetensors", here / "taew.pth":
                loaded = TinyVAE.from_pretrained(path)
                assert loaded.config == config and loaded.stride == stride
                assert all(p.equal(tensors[name].float()) for name, p in loaded.state_dict().items())


def test_the_vae_reads_its_config_off_public_files_and_its_own():
    with folder() as here, torch.no_grad():
        for config in TAEW21, TAEW22:
            vae = new_vae(config)
            save_file(vae.state_dict(), here / "public.safetensors")
            torch.save(vae.state_dict(), here / "public.pth")
            z = rand(1, config.latent_channels, 2, 2, 2)
            for name in "public.safetensors", "public.pth":
                loaded = TinyVAE.from_pretrained(here / name)
                assert loaded.config == config and loaded.decode(z)[0].equal(vae.decode(z)[0])
            nothing = [torch.zeros_like(t) for t in vae.decode(z)[1]]                      # before a public clip
            assert vae.decode(z, nothing)[0][:, :, 3:].equal(vae.decode(z)[0])
        loaded = TinyVAE.from_pretrained(saved(here / "own.safetensors", new_vae(), dtype=torch.float16))
        assert loaded.metadata() == new_vae().metadata() and next(loaded.parameters()).dtype == torch.float32


def test_tiny_latents_are_softly_limited_and_pixels_run_from_0_to_1_inside():
    vae, z = new_vae(TAEW21), rand(1, 16, 1, 2, 2)
    assert vae.decode_frames(1e4 * z)[0].equal(vae.decode_frames(1e6 * z)[0])               # 3 tanh(z / 3)
    assert not vae.decode_frames(z)[0].equal(vae.decode_frames(3 * torch.tanh(z / 3))[0])
    vae.decoder[-1].weight.zero_()
    for inside, outside in (0, -1), (0.5, 0), (1, 1):
        nn.init.constant_(vae.decoder[-1].bias, inside)
        assert (vae.decode(z)[0] == outside).all()


def test_chunked_decode_equals_whole_decode_and_never_touches_the_state():
    vae, z = new_vae(), 2 * rand(2, 4, 9, 3, 4)
    whole, state, parts, states = vae.decode(z)[0], None, [], []
    assert whole.abs().max() == 1 and vae.decode_frames(z)[0].abs().max() > 1              # clamped, and had to be
    for part in z.split([3, 1, 3, 2], 2):
        video, state = vae.decode(part, state)
        parts.append(video)
        states.append((state, [t.clone() for t in state]))
    assert [x.shape for x in parts] == [(2, 3, frames, 24, 32) for frames in (9, 4, 12, 8)]
    assert torch.cat(parts, 2).equal(whole)
    assert all(a.equal(b) for state, copy in states for a, b in zip(state, copy, strict=True))
    assert vae.decode(z[:, :, 3:4], states[0][0])[0].equal(parts[1])                       # the old state still works
    assert not vae.decode(z[:, :, 3:4])[0].equal(parts[1][:, :, 3:])                       # and matters


def test_encoding_in_pieces_equals_the_whole_and_an_image_is_the_first_latent():
    for config in SMALL_VAE, replace(SMALL_VAE, pad="end"):
        vae, video = new_vae(config), rand(2, 3, 29, 16, 24).clamp(-1, 1)
        whole = vae.encode(video, piece=100)
        assert whole.shape == (2, 4, 8, 2, 3)
        for piece in 1, 3, 4:
            assert_near(vae.encode(video, piece), whole, 1e-6)
    vae = new_vae()
    assert_near(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1], 1e-6)
    assert_error(AssertionError, "28", vae.encode, video[:, :, :28])
    assert_error(AssertionError, "20", vae.encode, video[..., :20])


def test_no_latent_sees_the_future_with_front_padding():
    for pad, sees in ("front", 0), ("end", 3):
        vae, video = new_vae(replace(SMALL_VAE, pad=pad)), rand(1, 3, 21, 16, 16).clamp(-1, 1)
        before = vae.encode(video)
        for frame in range(1, 21):
            later = video.clone()
            later[:, :, frame] += 0.5
            changed = (vae.encode(later) - before).abs().amax((0, 1, 3, 4)) > 1e-6         # by latent
            first = next(i for i in range(6) if 4 * i + sees >= frame)
            assert not changed[:first].any() and changed[first], (pad, frame)


# ----------------------------------------------------------------------------------------------------------------------
# The VAE of Wan, small, with the arguments that give diffusers' class the same sizes.

WAN21, WAN22 = WanVAEConfig(16, 8, 8), WanVAEConfig(48, 8, 12, residual=True)
IN_DIFFUSERS = {"2.1": {"base_dim": 8, "z_dim": 16},
                "2.2": {"base_dim": 8, "z_dim": 48, "decoder_base_dim": 12, "is_residual": True, "in_channels": 12,
                        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}}


def renamed_for_diffusers(tensors):
    """Wan's names to diffusers', by its own converter, which does not know the stages of 2.2."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    inner = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
             "shortcut": "conv_shortcut"}
    if "encoder.downsamples.2.downsamples.0.residual.0.gamma" not in tensors:
        return convert_wan_vae_to_diffusers(dict(tensors))
    pattern = r"(\w+)\.(\w+)samples\.(\d)\.\2samples\.(\d)\.(.+)"
    staged = {name: t for name, t in tensors.items() if "samples." in name}
    result = convert_wan_vae_to_diffusers({name: t for name, t in tensors.items() if name not in staged})
    for name, t in staged.items():
        half, way, stage, block, layer = re.fullmatch(pattern, name).groups()
        last = int(block) == {"down": 2, "up": 3}[way]
        for ours, theirs in inner.items():
            layer = layer.replace(ours, theirs)
        result[f"{half}.{way}_blocks.{stage}." + (f"{way}sampler." if last else f"resnets.{block}.") + layer] = t
    return result


def wan_video(vae, frames, seed=0):
    return rand(1, 3, frames, 2 * vae.stride, 3 * vae.stride, seed=seed).clamp(-1, 1)


@with_diffusers
def test_the_wan_vae_gives_what_diffusers_gives_from_either_layout():
    from diffusers import AutoencoderKLWan
    with folder() as here, torch.no_grad():
        for seed, (version, config) in enumerate((("2.1", WAN21), ("2.2", WAN22))):
            saved = randomised(WanVAE(config), seed).state_dict()
            theirs = AutoencoderKLWan(**IN_DIFFUSERS[version]).eval()
            theirs.load_state_dict(renamed_for_diffusers(saved))
            (here / version / "vae").mkdir(parents=True)
            (here / f"{version}-Wan").mkdir()
            torch.save(saved, here / f"{version}-Wan" / f"Wan{version}_VAE.pth")
            dit = here / f"{version}-Wan" / "diffusion_pytorch_model.safetensors"          # beside a .pth: not the VAE
            save_file({"patch_embedding.weight": rand(3)}, dit)
            save_file(saved, here / "original.safetensors")
            save_file(theirs.state_dict(), here / version / "vae" / "diffusion_pytorch_model.safetensors")
            for path in f"{version}-Wan", "original.safetensors", version, f"{version}/vae":
                vae = WanVAE.from_pretrained(here / path)
                assert vae.config == config and type(load_vae(here / path)) is WanVAE, path
                assert vae.state_dict().keys() == saved.keys()
                assert all(p.equal(saved[name]) for name, p in vae.state_dict().items()), path
            mean, std = torch.tensor(STATISTICS[config.latent_channels]).view(2, 1, -1, 1, 1, 1)
            video = wan_video(vae, 9)
            z, z_theirs = vae.encode(video), (theirs.encode(video).latent_dist.mode() - mean) / std
            x, x_theirs = vae.decode(z)[0], theirs.decode(z * std + mean).sample
            assert z.shape == (1, config.latent_channels, 3, 2, 3) and x.shape == video.shape
            assert 0.1 < x.std() and (x.abs() == 1).float().mean() < 0.5
            assert_near(z, z_theirs, 1e-5)              # the bits, on some processors
            assert_near(x, x_theirs, 1e-5)


@with_diffusers
def test_latents_are_normalised_as_diffusers_pipelines_do():
    from diffusers import AutoencoderKLWan
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert STATISTICS[16] == tuple(tuple(defaults[name].default) for name in ("latents_mean", "latents_std"))


def test_the_wan_vae_has_the_sizes_of_wans_files():
    for config, stride, tensors, parameters in ((WanVAEConfig(), 8, 194, 126_892_531),
                                                (WanVAEConfig(48, 160, 256, True), 16, 196, 704_688_668)):
        with torch.device("meta"):
            vae = WanVAE(config)
        assert len(vae.state_dict()) == tensors and sum(p.numel() for p in vae.parameters()) == parameters
        assert vae.stride == stride
        for values in STATISTICS[config.latent_channels]:
            assert len(values) == vae.config.latent_channels
        assert min(STATISTICS[config.latent_channels][1]) > 0


GOLDEN = ((WAN21, [0.0554, 0.3683, 0.2857, -0.8449, 0.4626], [-0.5273, 0.5658, -0.7934, -0.8744, -0.2419]),
          (WAN22, [0.0503, 1.1569, 1.6741, -0.1905, 2.1264], [-0.1029, 0.3001, -0.0532, -0.0883, -0.3568]))


def golden(vae):
    """Mean, mean magnitude and three values of latents and video: what these give was agreed with diffusers."""
    z = vae.encode(wan_video(vae, 9))
    return [[round(v, 4) for v in (t.mean().item(), t.abs().mean().item(), *t.flatten()[[1, 99, -2]].tolist())]
            for t in (z, vae.decode(z)[0])]


def test_the_wan_vae_gives_what_it_gave_when_it_agreed_with_diffusers():
    for config, latents, video in GOLDEN:
        got = golden(randomised(WanVAE(config)))
        assert np.allclose(got, (latents, video), atol=2e-3), got


def test_the_wan_vaes_norm_has_no_eps_but_leaves_zeros():
    norm, x = ChannelNorm(6), rand(1, 6, 1, 2, 2)
    assert_near(norm(1e-8 * x), norm(x), 1e-6)
    assert_near(norm(x), x / x.square().mean(1, keepdim=True).sqrt(), 1e-6)
    assert (norm(0 * x) == 0).all()


def test_wan_videos_decoded_in_pieces_are_the_whole_and_the_state_stays():
    for config in WAN21, WAN22:
        vae, z = randomised(WanVAE(config)), 2 * rand(2, config.latent_channels, 6, 1, 2)
        whole, state, parts, states = vae.decode(z)[0], None, [], []
        assert whole.abs().max() == 1
        for part in z.split([1, 3, 2], 2):
            video, state = vae.decode(part, state)
            parts.append(video)
            states.append((state, [t.clone() for t in state]))
        assert [x.shape[2] for x in parts] == [1, 12, 8] and torch.cat(parts, 2).equal(whole)
        assert all(a.equal(b) for state, copy in states for a, b in zip(state, copy, strict=True))
        assert vae.decode(z[:, :, 1:4], states[0][0])[0].equal(parts[1])                   # the old state still works
        assert not vae.decode(z[:, :, 4:], states[0][0])[0].equal(parts[2])                # and matters
        assert vae.decode(z[:, :, :3])[0].equal(whole[:, :, :9])
        assert_error(AssertionError, "7", vae.decode, z[:, :7])


def test_wan_encoding_is_causal_and_holds_few_frames_however_long_the_clip():
    for config in WAN21, WAN22:
        vae, peaks = randomised(WanVAE(config)), []
        for module in vae.modules():
            if isinstance(module, CausalConv):
                module.register_forward_hook(lambda _, given, result: peaks.append((given[0].numel(), given[2])))
        video, most = wan_video(vae, 29), []
        for frames in 9, 29:
            peaks.clear()
            latents = vae.encode(video[:, :, :frames])
            most.append(max(size for size, _ in peaks))
            for t in peaks[-1][1]:                                      # the last piece's state: no view of more
                assert t.untyped_storage().nbytes() == 4 * t.numel(), t.shape
        assert most[0] == most[1] and latents.shape == (1, config.latent_channels, 8, 2, 3)
        assert vae.encode(video[:, :, :1]).equal(latents[:, :, :1])
        assert vae.encode(video[:, :, :13]).equal(latents[:, :, :4])
        assert_error(AssertionError, "28", vae.encode, video[:, :, :28])
        assert_error(AssertionError, str(3 * vae.stride - 1), vae.encode, video[..., 1:])


def test_the_wan_vae_runs_from_its_own_source():
    own = lifted("vae.py", "FRAMES", "WanVAEConfig", "STATISTICS", "CausalConv", "TimeConv", "Causal", "PerFrame",
                 "RMSNorm", "ResBlock", "Attention", "Stage", "resample", "build_wan", "WanVAE",
                 OrderedDict=OrderedDict)
    vae = randomised(own.WanVAE(own.WanVAEConfig(48, 8, 12, True)))
    z = vae.encode(wan_video(vae, 5))
    assert z.equal(randomised(WanVAE(WAN22)).encode(wan_video(vae, 5))) and vae.decode(z)[0].shape[2] == 5


def test_every_file_opens_as_the_vae_it_holds_or_is_refused_in_one_line():
    with folder() as here, torch.no_grad():
        narrow, tiny = randomised(WanVAE(WanVAEConfig(16, 4, 6))), new_vae()
        for dtype in torch.float16, torch.bfloat16, torch.float32:
            tensors = {name: t.to(dtype) for name, t in narrow.state_dict().items()}
            save_file(tensors, here / "narrow.safetensors")
            torch.save(tensors, here / "narrow.pth")
            for path in here / "narrow.safetensors", here / "narrow.pth":
                vae = load_vae(path)
                assert type(vae) is WanVAE and vae.config == narrow.config and not vae.training
                assert all(p.equal(tensors[name].float()) for name, p in vae.state_dict().items())
                assert not any(p.requires_grad for p in vae.parameters())
        own = saved(here / "tiny.safetensors", tiny)
        save_file(new_vae(TAEW22).state_dict(), here / "taew2_2.safetensors")
        assert load_vae(own).metadata() == tiny.metadata()
        assert load_vae(here / "taew2_2.safetensors").config == TAEW22
        assert_error(ValueError, "narrow.pth: a WanVAE, not a TinyVAE; load_vae", TinyVAE.from_pretrained, path)
        assert_error(ValueError, "tiny.safetensors: a TinyVAE, not a WanVAE; load_vae", WanVAE.from_pretrained, own)

        def refused(name, change):
            tensors = narrow.state_dict()
            change(tensors)
            torch.save(dict(tensors), here / name)
            assert_error(ValueError, name, load_vae, here / name)

        refused("missing.pth", lambda t: t.pop("decoder.middle.1.proj.bias"))
        refused("extra.pth", lambda t: t.update(extra=torch.zeros(3)))
        refused("shape.pth", lambda t: t.update({"encoder.conv1.bias": torch.zeros(3)}))
        refused("first.pth", lambda t: t.pop("encoder.conv1.weight"))
        refused("scalar.pth", lambda t: t.update({"conv2.weight": torch.zeros(())}))
        refused("empty.pth", lambda t: t.clear())
        refused("channels.pth", lambda t: t.update({"conv2.weight": torch.zeros(7, 7, 1, 1, 1)}))
        assert_error(ValueError, here.name, load_vae, here)
        assert_error(ValueError, "nowhere.pth", load_vae, here / "nowhere.pth")
        assert_error(ValueError, "dit.safetensors", load_vae, saved(here / "dit.safetensors", new_model()))


# ----------------------------------------------------------------------------------------------------------------------
# Training: the world, the tools, the losses.

def test_a_shifted_video_has_the_error_of_its_shift_and_an_empty_one_has_lost_all():
    scene = world.new_scenes(4, 9, seeded(2), objects=2, camera=False, attributes=(0, 0), flat=True, style="simple")
    scene["backdrop"][:], scene["position"] = 0.5, 0.3 + 0.4 * scene["position"]           # far from the borders
    truth = world.render(scene, 128)
    first = truth[:, :, :1]
    same = measure(truth, truth, first, scene)
    assert (same["median"], same["mean"], same["lost"], same["copying"]) == (0, 0, 0, 0) and same["psnr"] > 90
    assert abs(same["ssim"] - 1) < 1e-6
    assert all(abs(same[name] - 1) < 1e-5 for name in ("colour", "sharp", "motion"))
    shifted = measure(truth.roll((3, 4), (3, 4)), truth, first, scene)
    assert abs(shifted["mean"] - 100 * 5 / 128) < 0.1 and shifted["lost"] == 0 and abs(shifted["motion"] - 1) < 1e-2
    far = measure(truth.roll(64, 4), truth, first, scene)
    assert 29 < far["median"] <= 30                             # half the width away: no error counts more than 30 %
    gone = measure(truth * 0, truth, first, scene)
    assert (gone["mean"], gone["lost"], gone["colour"]) == (30, 100, 0) and 0 < gone["sharp"] + 1 < 1.1
    still = measure(first.expand_as(truth), truth, first, scene)
    assert abs(still["copying"] - 1) < 1e-4 and still["motion"] == 0
    assert abs(still["psnr"] - 10 * math.log10(4 / (first - truth).square().mean())) < 1e-3
    frames = [v[:, :, t] for v in (first.expand_as(truth), truth) for t in (0, 4, 8)]
    assert abs(still["ssim"] - np.mean([ssim(a, b).mean() for a, b in zip(frames[:3], frames[3:])])) < 1e-6
    dim = measure(0.5 * truth - 0.5, truth, first, scene)
    assert abs(dim["sharp"] - 0.5) < 1e-4


def test_a_case_says_and_does_what_its_name_says():
    def case(change=None, **options):
        return new_case("test", 2, 21, "dense", change, objects=2, **options)

    (scene, told), n = case(), torch.arange(world.OBJECTS * td.POINTS)
    path, tracks, visible = scene["position"], told["tracks"], told["visible"]
    other, (jump, _) = case("other way"), case("teleport")
    assert_near((other[0]["position"] - path[:, :, :1])[:, :2, 1] * 1, (path[:, :, :1] - path)[:, :2, 1], 1e-4)
    step = jump["position"].diff(dim=2).norm(dim=-1)
    assert (step[:, :, 9] > 3 * step[:, :, :9].amax(2)).any() and step.shape[2] == 20
    options = {"objects": 2, "camera": False, "attributes": (0, 0), "moving": True, "style": "simple"}
    fast, slow = case(speed=2)[0]["position"], world.new_scenes(2, 42, seeded(td.seed_of("test")), **options)["position"]
    assert fast.equal(slow[:, :, ::2])
    two = case("two ways")[1]["tracks"][:, :, n]
    assert two[:, :, n % 2 == 0].equal(tracks[:, :, n[n % 2 == 0]]) and not two.equal(tracks[:, :, n])
    jitter = (case("jittered")[1]["tracks"] - tracks).std() / td.SIZE
    assert 0.018 < jitter < 0.022
    cross = case("crossing")[0]["position"]
    assert_near(cross[:, :2, -1], path[:, [1, 0], 0], 1e-5)
    assert_near(cross[:, :2, 10], path[:, :2, 0].mean(1, keepdim=True).expand(-1, 2, -1), 1e-5)
    away, dusk = case("carried away")[0], case("dusk", attributes=(1, 0))[0]["gains"]
    assert_near(away["position"] - away["pan"][:, None], path, 1e-5)
    assert away["pan"][0, 0, 0] == -0.5 and away["pan"][0, -1, 0] == 0.5 and not away["pan"][..., 1].any()
    assert dusk[:, :10].eq(1).all() and dusk[:, 11:].equal(case(attributes=(1, 0))[0]["gains"][:, 1:11])
    late, broken = (case(change)[1]["visible"] for change in ("late", "broken"))
    assert late[:, 0].equal(visible[:, 0]) and not late[:, 1:13].any() and late[:, 13:].equal(visible[:, 13:])
    assert 0.4 < broken[:, 4:].sum() / visible[:, 4:].sum() < 0.6 and broken[:, :4].equal(visible[:, :4])
    drag = new_case("test", 2, 21, "drag", objects=2)[1]["visible"]
    assert drag[:, :, n[n % td.POINTS == 0]].sum() == drag.sum() > 0 and drag.sum(2).max() <= 2
    assert not new_case("test", 2, 21, "none", objects=2)[1]["visible"].any()


def test_a_table_is_kept_row_by_row_and_measured_once():
    with folder() as here:
        run = SimpleNamespace(out=here, check=print, settings=lambda stage: "weights", eval_clips=2, eval_frames=33,
                              config=SMALL)
        other = {"x": 3, "measure": lambda run, y, x: calls.append({"y": y}) or {"ms": x + y}}     # not by eval_row
        rows = {"a": ({"x": 1}, [{"y": 1}, {"y": 2}]), "b": (other, [{"y": 4}]), "streams": ({"x": 2}, [{"y": 3}])}
        calls = []

        def row(run, **settings):
            calls.append(settings)
            if settings["y"] == fail:
                raise KeyboardInterrupt
            return {"from": 0, "mean": settings["y"] + 0.5, "tenths": [{"from": 0, "mean": 1}, {"from": 9, "mean": 2}]}

        with unittest.mock.patch.object(evaluate, "eval_row", row):
            for fail in 2, None, None:
                with quiet() as (out, _), contextlib.suppress(KeyboardInterrupt):
                    measure_tables(run, "eval", rows)
        assert [call["y"] for call in calls] == [1, 2, 2, 4, 3] and calls[0] == {"x": 1, "y": 1}
        assert "| y 2 | 2.50 |" in out.getvalue() and (here / "eval.png").exists()
        assert "| b | ms |\n|---|---|\n| y 4 | 7.00 |" in out.getvalue()


def test_every_row_of_the_tables_can_be_played():
    class Toy:
        config, eval_clips, eval_frames = replace(PRESETS["tiny"], num_layers=1), 1, 45

    for tables in evaluate.tables(Toy), experiments.tables(Toy):
        for title, (common, rows) in tables.items():
            for row in rows:
                settings = {key: value for key, value in (common | row).items() if not hasattr(Toy.config, key)}
                assert {"seed", "clips", "frames"} <= settings.keys()
                overrides = {key: value for key, value in (common | row).items() if hasattr(Toy.config, key)}
                replace(Toy.config, **overrides)
                measured = inspect.signature(settings.pop("measure", eval_row)).parameters
                case = {key: value for key, value in settings.items()
                        if key not in {*measured, *inspect.signature(eval_row).parameters, "frames"}}
                scene, motion = new_case(frames=9, **case)
                assert motion["tracks"].shape[:2] == (case["clips"], 9), (title, row)
    model, vae = new_model(size=(128, 128), text_dim=64), new_vae()
    Toy.model, Toy.vae, Toy.device, Toy.seed = lambda self, name, **more: model, lambda self: vae, "cpu", 0
    result = eval_row(Toy(), seed="x", clips=1, frames=45, piece=9, objects=1)
    assert len(result["tenths"]) == 5 and [part["from"] for part in result["tenths"]] == [0, 9, 18, 27, 36]
    values = [part["psnr"] for part in result["tenths"]]
    assert abs(result["psnr"] - np.mean(values)) < 1e-4 and abs(result["drift"] - np.std(values)) < 1e-4


def test_attention_shares_are_those_of_queries_and_keys_by_hand():
    model, vae, seen = new_model(size=(128, 128), text_dim=64), new_vae(), []
    run = SimpleNamespace(config=model.config, device="cpu", seed=0, model=lambda name: model, vae=lambda: vae)

    def by_hand(attention, inputs):
        x, rope, cache, _ = inputs
        if len(cache.chunks) == 2:                              # a sink and a window
            q, k = (norm(linear(x)).unflatten(2, (2, -1)) for norm, linear in (
                (attention.norm_q, attention.q), (attention.norm_k, attention.k)))
            k = apply_rope(torch.cat([*(old for old, _ in cache.chunks), k], 1), rope).double()
            q = apply_rope(q, rope[-x.shape[1]:]).double()
            for clip, head in itertools.product(range(2), range(2)):
                weights = torch.exp(q[clip, :, head] @ k[clip, :, head].T / 20 ** 0.5)
                weights = weights / weights.sum(1, keepdim=True)
                seen.append(weights.view(x.shape[1], 3, -1).sum(2).mean(0))     # sink, window, itself: equally many

    hook = model.blocks[1].self_attn.register_forward_pre_hook(by_hand)
    case = {"seed": "x", "clips": 2, "frames": 57, "objects": 1}
    row = attention_row(run, layer=1, **case)
    hook.remove()
    assert len(seen) == 4 * 4 * 3                               # clips and heads, passes, chunks 2 to 4 of five
    assert_near(torch.tensor([*row.values()]).double(), 100 * torch.stack(seen).mean(0), 1e-4)
    assert [*row] == ["sink", "window", "itself"] and abs(sum(row.values()) - 100) < 1e-3, row
    assert attention_row(run, layer=0, **case) != row


def test_a_motion_appears_in_the_film_as_captioned_and_not_in_the_rigid_one():
    case = {"seed": "words", "clips": 8, "frames": 13, "objects": 1}
    run = SimpleNamespace(config=PRESETS["tiny"])
    for kind in 1, 2:
        def played(run, model, scene, motion, text):
            assert text.equal(embed_words(said, run.config)) and motion["visible"].sum(2).max() <= 1
            rigid = {"spin": 0 * scene["spin"], "pulse": torch.ones_like(scene["pulse"])}
            assert torch.ones(8).equal(scene["pulse"][:, 5]) == (kind == 1) and scene["spin"].any() == (kind == 1)
            truth, rigid = world.render(scene, td.SIZE), world.render(scene | rigid, td.SIZE)
            video = share * truth + (1 - share) * rigid
            yield from (video + 0.1 * rand(*video.shape)).split(10, 2)

        for share, said in (1, world.caption(0, kind)), (0.25, td.NEUTRAL):
            with unittest.mock.patch.object(experiments, "play", played), \
                    unittest.mock.patch.object(td, "SIZE", 64), unittest.mock.patch.object(evaluate, "SIZE", 64):
                row = words_row(run, attributes=(0, kind), text=td.NEUTRAL if said == td.NEUTRAL else None, **case)
            assert row["appears"] == 100 * (share == 1) and abs(row["share"] - share) < 0.1, row
            assert 4 <= row["clips"] < 8 if kind == 1 else row["clips"] == 8, row          # discs may spin unseen


def test_both_ways_to_encode_tracks_are_timed():
    model, vae, calls = new_model(size=(32, 32)), new_vae(), []
    run = SimpleNamespace(device="cpu", model=lambda name: model, vae=lambda: vae)
    for by, where in ("vae", sample), ("head", experiments):
        name = {"vae": "draw_control", "head": "track_features"}[by]
        real = getattr(where, name)

        def slowly(*args):
            calls.append(by)
            assert real(*args).shape[2] == 3                    # latents of 9 frames
            time.sleep(0.01 if by == "head" else 0.05)
            return torch.zeros(1)

        with unittest.mock.patch.object(where, name, slowly), small_scenes():
            row = encoding_row(run, by, seed="x", clips=1, frames=9, points="dense")
        assert calls.count(by) == len(calls) == 9 and row["ms"] >= (10 if by == "head" else 50), (row, calls)
        calls.clear()


def test_a_brief_distillation_differs_in_what_its_row_says_and_is_not_trained_again():
    with folder() as here, quiet() as (out, _):
        flags = ["--smoke", "--out", str(here), "--seed", "3", "--tracks", "random"]
        run, trained = evaluate.new_run(flags, "experiments"), []

        def train(short):
            assert torch.is_grad_enabled() and load_file(short.path("causal")).keys()
            trained.append(short)
            shutil.copyfile(run.path("student"), short.path("student"))

        def settings(short):
            groups = {"args": vars(short.args), "recipe": vars(short.recipe), "config": vars(short.config),
                      "run": {"steps": short.steps["distill"], "clips": short.clips, "seed": short.seed}}
            return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()
                    if name != "out"}

        with torch.no_grad(), unittest.mock.patch.object(td, "train_student", train):
            plain = distil_briefly(run)
            for how, differs in (
                ({"seed": 1}, {"args.seed": 4, "run.seed": 4}),
                ({"guidance": (0, 0)}, {"config.guidance": (0, 0)}),
                ({"critic_steps": 2}, {"recipe.critic_steps": 2, "args.steps": 2, "run.steps": 2}),
                ({"sink_decay": 0.9}, {"args.sink_decay": 0.9, "config.sink_decay": 0.9}),
                ({"reward": "motion", "beta": 2.0}, {"args.reward": "motion", "args.beta": 2.0}),
            ):
                short = distil_briefly(run, **how)
                was, now = settings(plain), settings(short)
                assert {key: value for key, value in now.items() if value != was[key]} == differs, how
                assert (short.reward and short.reward.__name__) == ("motion_reward" if "reward" in how else None)
                assert len(trained) == len({one.out for one in trained}) and short is trained[-1]
                count = len(trained)
                assert distil_briefly(run, **how).out == short.out and len(trained) == count    # the weights are there
            rows = [row["distil"] for row in experiments.tables(run)["distillation, drag"][1] if "distil" in row]
            folders = {distil_briefly(run, **how).out for how in rows}
        assert len(folders) == len(rows) - 1 == 9, folders      # two rows are of the plain one
        assert settings(plain)["run.seed"] == 3 and plain.config == replace(run.config, sink_decay=1.0)
        assert (plain.args.rollout, plain.recipe.batch, plain.clips, plain.steps["distill"]) == (8, 2, 16, 5)
        assert out.getvalue().count("trained in 0.0 minutes") == len(trained) == 9
        with unittest.mock.patch.object(td, "PROCESSES", 2):
            assert_error(td.UserError, "leave out torchrun", distil_briefly, run, critic_steps=4)


def test_a_brief_teacher_differs_in_what_its_row_says():
    with folder() as here, quiet(), unittest.mock.patch.dict(td.RECIPES["tiny"], clips=(8, 8, 8)):
        run, trained = evaluate.new_run(["--out", str(here)], "experiments"), []

        def train(short):
            assert short.steps["teacher"] == 7 and short.path("vae") == run.path("vae") and short.recipe.emphasis == 0
            trained.append((short.dense, short.config.in_dim, short.start and short.start.path, td.pick is pick,
                            motionstream.TrackHead.__name__, short.recipe.teacher))
            saved(short.path("teacher"), new_model(causal=False))

        pick = td.pick
        with torch.no_grad(), unittest.mock.patch.object(td, "train_teacher", train), \
                unittest.mock.patch.object(experiments, "eval_row", lambda run, **row: (run.out, row)):
            rows = [taught_row(run, {"steps": 7, **teach}, x=1, **drawn) for teach, drawn in (
                ({}, {}), ({}, {"drawn": True}), ({"start": True}, {}), ({"start": True, "harm": True}, {}), ({}, {}))]
        recipes, teacher = td.RECIPES["tiny"], run.path("teacher")
        assert trained == [(1, 32, None, True, "TrackHead", recipes["teacher"]),
                           (1, 32, None, True, "DrawnTracks", recipes["teacher"]),
                           (0, 48, teacher, True, "TrackHead", recipes["causal"]),
                           (0, 48, teacher, False, "TrackHead", recipes["causal"])], trained
        assert rows[0] == rows[4] and len({out for out, _ in rows}) == 4 and motionstream.TrackHead is TrackHead
        assert rows[0][1] == {"model": "teacher", "x": 1}


def test_damaged_tracks_are_jittered_late_or_broken_in_three_of_four_clips():
    torch.manual_seed(0)
    clips = {"tracks": torch.zeros(400, 45, 20, 2), "visible": torch.ones(400, 45, 20, dtype=torch.bool)}
    harmed = damaged(lambda: {name: tensor.clone() for name, tensor in clips.items()})()
    moved, shown = harmed["tracks"].flatten(1).any(1), harmed["visible"]
    late = ~shown[:, 1:13].flatten(1).any(1) & shown[:, 13:].flatten(1).all(1)
    broken = ~shown.flatten(1).all(1) & ~late
    for kind in moved, late, broken, ~(moved | late | broken):
        assert 70 < kind.sum() < 130
    assert not (moved & (late | broken)).any() and shown[:, 0].all() and 0.5 < shown[broken].float().mean() < 0.6
    assert 0.019 < harmed["tracks"][moved].std() / td.SIZE < 0.021


def test_drawn_tracks_are_dots_in_the_colour_of_their_start():
    head = drawn_tracks(new_vae())(out_channels=16)
    points = rand(1, 21, 4, 2) * 10 + 16, torch.ones(1, 21, 4).bool()
    whole = head(*points, torch.arange(4)[None], 32, 64)
    parts = [head(*(point[:, a:b] for point in points), torch.arange(4)[None], 32, 64) for a, b in ((0, 9), (9, 21))]
    assert whole.shape == (1, 4, 6, 4, 8)
    assert_near(torch.cat(parts, 2), whole, 1e-5)
    shown = []
    head = drawn_tracks(SimpleNamespace(encode=lambda video: shown.append(video) or video))(out_channels=16)
    tracks, visible = torch.tensor([[[9.5, 20], [1, 1], [60, 3]]]).repeat(1, 5, 1, 1), torch.ones(1, 5, 3).bool()
    visible[:, 2, 0] = False
    tracks[:, 4, 0] = torch.tensor([70.0, 0])                           # outside
    head(tracks, visible, (torch.tensor([[20, 1, 3]]) << 16) + torch.tensor([[9, 1, 60]]), 32, 64)
    (video,) = shown
    assert video.shape == (1, 3, 5, 32, 64)
    for y, x, colour in (slice(18, 23), slice(7, 12), (9 / 64, 20 / 32, 1)), (slice(4), slice(4), (1 / 64, 1 / 32, 1)):
        dot = video[0, :, 0, y, x]
        assert_near(dot, 2 * torch.tensor(colour).view(3, 1, 1).expand_as(dot) - 1, 1e-6)
    lit = (video[0] > -1).any(0).sum((1, 2)).tolist()
    assert lit == [25 + 16 + 25, 66, 41, 66, 41]


def test_a_refreshed_sink_is_the_chunk_just_written_every_25th_time():
    cache = Refreshed(1, 1)
    for i in range(60):
        cache.write(torch.full((1, 1), i), torch.full((1, 1), i))
        assert [k.item() for k, _ in cache.chunks][:1] == [0 if i < 24 else 24 if i < 49 else 49]
    assert cache.chunks[-1][0].item() == 59 and len(cache.chunks) == 2


def test_a_text_of_the_second_half_begins_at_the_chunk_that_lies_there():
    texts, model, vae = [], new_model(size=(128, 128), text_dim=64), new_vae()
    run = SimpleNamespace(config=model.config, model=lambda name, **more: model, vae=lambda: vae, device="cpu", seed=0)
    scene, motion = new_case("x", 1, 45)
    forward = MotionStream.forward

    def record(model, x, sigma, text, **given):
        texts.append((text.sum().item(), given["write"] if "write" in given else False))
        return forward(model, x, sigma, text, **given)

    with torch.no_grad(), unittest.mock.patch.object(MotionStream, "forward", record):
        list(play(run, "student", scene, motion, torch.ones(1, 1, 64), later=torch.zeros(1, 1, 64)))
    assert [text for text, write in texts if write][:4] == [64, 64, 0, 0], "frames 0-8, 9-20; then 21-32, 33-44"


def test_a_stream_is_as_fast_as_itself():
    run = SimpleNamespace(config=PRESETS["tiny"])
    waits = {"chunk": 0.01, "sink": 0.02}

    def played(run, name, scene, points, text, **more):
        while True:
            time.sleep(sum(waits[key] for key in more))
            yield torch.zeros(1, 3, 4 * more["chunk"] if "chunk" in more else 24, 1, 1)

    with unittest.mock.patch.object(experiments, "play", played):
        same, slow = (speed_row(run, 9, seed="x", clips=1, **more) for more in ({"chunk": 3}, {"sink": 2}))
    assert abs(same["chunk"] - 1) < 0.3 and abs(same["frame"] - 1) < 0.3, same
    assert 1.4 < slow["chunk"] < 2.6 and abs(slow["frame"] - slow["chunk"] / 2) < 0.1, slow


def test_critic_steps_and_guidance_of_a_brief_distillation_reach_its_losses():
    with folder() as here, quiet(), unittest.mock.patch.dict(SHORT, updates=2, images=8), small_scenes():
        before_distillation(here)
        shutil.copyfile(here / "causal.safetensors", here / "student.safetensors")
        run = evaluate.new_run(["--out", str(here)], "experiments")

        def made(model, noise, conditions, first, exit_step, grad):
            return iter(noise.split(3, 2))

        def dmd(x0, teacher, critic, conditions, first, guidance, shift, weight):
            x, sigma = x0[:, :, :3], torch.full((len(x0),), 0.7)
            part = next(by_chunk(conditions, 3))
            real, plain = guided_velocity(teacher, x, sigma, part, guidance), teacher(x, sigma, **part)
            calls.append("plain" if real.equal(plain) else "guided")
            return torch.zeros(())

        def critic(x0, critic, conditions, shift):
            calls.append("critic")
            return torch.zeros(())

        for how, expected in (({}, ["guided", *["critic"] * 5]), ({"guidance": (0, 0)}, ["plain", *["critic"] * 5]),
                              ({"critic_steps": 2}, ["guided", "critic", "critic"]),
                              ({"critic_steps": 1}, ["guided", "critic"])):
            calls = []
            with unittest.mock.patch.multiple(td, rollout=made, dmd_loss=dmd, critic_loss=critic):
                with unittest.mock.patch.object(td.Optimizer, "step", lambda *_: 0.0):
                    distil_briefly(run, **how)
            assert calls == 2 * expected, (how, calls)


def test_painted_tracks_are_among_the_visible_ones():
    torch.manual_seed(0)
    visible = rand(64, 45, 88) > -1
    kept = td.painted(visible)
    share = kept.float().mean((1, 2)) / visible.float().mean((1, 2))
    assert not (kept & ~visible).any() and share.min() < 0.05 and share.max() > 0.6 and 0.1 < share.mean() < 0.6


def test_the_optimizer_moves_every_parameter_of_the_model_itself():
    for model, loss in ((new_model(), lambda m: m(clip_of(2)[0], torch.ones(2), **on_tracks(m)).square().mean()),
                        (new_vae(), lambda m: m.decode_frames(m.encode(rand(1, 3, 9, 8, 8)))[0].square().mean())):
        before = {name: p.clone() for name, p in model.requires_grad_(True).named_parameters()}
        optimizer = td.Optimizer(model, muon=1e-3, adam=1e-3, ema=0.9)
        assert all(view.data_ptr() == p.data_ptr() and view.ndim == 2 for view, p in optimizer.views)
        optimizer.step(loss(model), 0)
        still = [name for name, p in model.named_parameters() if p.equal(before[name]) or p.grad is not None]
        assert not still, still
        assert all(a.equal(p) for a, p in zip(optimizer.average.parameters(), model.parameters()))  # first, a copy
        once = [p.clone() for p in model.parameters()]
        optimizer.step(loss(model), 10)
        for average, a, b in zip(optimizer.average.parameters(), once, model.parameters()):
            assert_near(average, (a + b) / 2, 1e-5)                 # update 10 counts 1 - 10 / (10 + 10)


def test_muon_is_that_of_torch_which_is_in_bfloat16():
    def updated(make):
        """Two matrices after five steps, and what the optimizer keeps."""
        matrices = [nn.Parameter(rand(*shape)) for shape in ((24, 40), (40, 24))]
        optimizer = make(matrices)
        for i in range(5):
            for n, p in enumerate(matrices):
                p.grad = rand(*p.shape, seed=10 * i + n + 1)
            optimizer.step()
        return matrices, optimizer.state_dict()["state"]

    settings = {"lr": 0.03, "weight_decay": 0.1}
    theirs, their_state = updated(lambda p: torch.optim.Muon(p, **settings))
    for dtype, tolerance in (torch.bfloat16, 1e-6), (torch.float32, 1e-2):
        ours, state = updated(lambda p: td.Muon(p, dtype=dtype, **settings))
        for n in range(2):
            assert_near(ours[n], theirs[n], tolerance)
            assert_near(state[n]["momentum_buffer"], their_state[n]["momentum_buffer"], 1e-6)


def test_muons_iteration_is_in_the_dtype_that_is_given():
    """The polynomial of each singular value, in float64."""
    matrix = rand(24, 40)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    exact = u * values @ v
    error = {}
    for dtype in torch.bfloat16, torch.float32:
        made = td.orthogonal(matrix, dtype)
        assert made.dtype == dtype
        assert td.orthogonal(matrix.T, dtype).T.equal(made)
        error[dtype] = (made - exact).abs().max().item() / exact.abs().max().item()
    assert error[torch.float32] < 1e-5 < error[torch.bfloat16] < 0.1, error
    singular = torch.linalg.svdvals(td.orthogonal(matrix, torch.float32))
    assert 0.6 < singular.min() and singular.max() < 1.3, singular


def test_matrix_products_are_in_the_dtype_that_the_processor_is_faster_in():
    for slower, dtype in (13.0, torch.float32), (0.9, torch.float32), (0.5, torch.bfloat16):
        seconds = {torch.float32: 0.002, torch.bfloat16: 0.002 * slower}
        with unittest.mock.patch.object(td, "matmul_seconds", seconds.get):
            assert td.cpu_dtype.__wrapped__() == dtype
        with unittest.mock.patch.object(td, "cpu_dtype", lambda: dtype):
            assert td.compute_dtype("cpu") == td.compute_dtype(torch.device("cpu")) == dtype
            assert td.compute_dtype("cuda:0") == torch.bfloat16
            run = td.Run(td.parse_flags(["--device", "cpu"]))
            with run.autocast():
                assert (rand(4, 4) @ rand(4, 4)).dtype == dtype
            assert "dtype" not in run.settings("vae")
    assert td.matmul_seconds(torch.float32) > 0


def on_tracks(model):
    """Conditions whose tracks come from the model's own head."""
    tracks, visible, ids = new_tracks(5, 9)
    return {"text": rand(2, 3, model.config.text_dim), "tracks": model.track_head(tracks, visible, ids, 32, 48)}


def test_writing_leaves_the_old_file_when_it_fails():
    def fail(path):
        Path(path).write_text("half")
        raise OSError("disk full")

    with folder() as here:
        td.write(here / "a.txt", lambda path: Path(path).write_text("old"))
        assert_error(OSError, "disk full", td.write, here / "a.txt", fail)
        assert (here / "a.txt").read_text() == "old"


def gaussian(mean, std):
    """The exact velocity of flow matching for data ~ N(mean, std²)."""
    def velocity(x_t, sigma, text=None):
        sigma = sigma.reshape(len(x_t), 1, -1, 1, 1).to(x_t)
        x0 = mean + (1 - sigma) * std ** 2 / ((1 - sigma) ** 2 * std ** 2 + sigma ** 2) * (x_t - (1 - sigma) * mean)
        return torch.where(sigma > 0, (x_t - x0) / sigma.clamp(min=1e-9), 0)
    return velocity


def test_dmd_gradient_is_critic_minus_teacher_normalised():
    torch.manual_seed(0)
    x0, first = (2 + rand(4, 3, 5, 2, 2)).requires_grad_(True), rand(4, 3, 1, 2, 2, seed=1)
    data, made = rand(4, 3, 5, 2, 2, seed=2), rand(4, 3, 5, 2, 2, seed=3)
    td.dmd_loss(x0, gaussian(data, 0), gaussian(made, 0), {}, None, (0, 0), 5.0).backward()   # point masses: real is data
    distance = (x0 - data).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_near(x0.grad, ((made - data) / distance).detach() / x0.numel(), 1e-4)
    x0.grad = None
    td.dmd_loss(x0, gaussian(data, 0), gaussian(made, 0), {}, first, (0, 0), 5.0).backward()
    assert x0.grad[:, :, 0].abs().max() < 1e-7 and x0.grad[:, :, 1:].abs().min() > 0       # the image gives frame 0

    mean = torch.tensor(2.0, requires_grad=True)                # a generator N(mean, 1), data N(-1, 1), an exact critic
    for _ in range(150):
        x0 = mean + torch.randn(8, 1, 1, 4, 4)
        td.dmd_loss(x0, gaussian(-1, 1), gaussian(mean.detach(), 1), {}, None, (0, 0), 5.0).backward()
        mean.data -= 0.1 * mean.grad
        mean.grad = None
    assert abs(mean + 1) < 0.1, mean


def test_generator_and_critic_are_scored_at_the_noise_levels_of_the_config():
    """A recipe's shift reaches both losses, and both draw from one distribution (uniform, shifted, clamped)."""
    seen, x0, given = [], rand(4000, 1, 2, 1, 1), {"tracks": torch.zeros(4000, 1, 2, 1, 1)}

    def net(x, sigma, tracks=None):
        seen.append(sigma[:, -1])
        return x * 0

    for shift in 1.0, 8.0:
        seen.clear()
        td.dmd_loss(x0, net, net, given, x0[:, :, :1], (0, 0), shift)
        td.critic_loss(x0, net, given, shift)
        expected = shift_sigma((torch.arange(4000) + 0.5) / 4000, shift).clamp(0.02, 0.98)
        for sigma in seen:
            assert (sigma.sort().values - expected).abs().max() < 0.05, shift


def test_the_cache_holds_keys_and_values_in_one_dtype():
    model, (noise, given, first) = new_model(), clip_of(6)
    caches = model.new_caches()
    with torch.autocast("cpu", torch.bfloat16):
        model(noise[:, :, :3], torch.zeros(2), given["text"], tracks=given["tracks"][:, :, :3], caches=caches, write=True)
    assert {tensor.dtype for cache in caches for chunk in cache.chunks for tensor in chunk} == {torch.bfloat16}


def test_text_is_dropped_for_the_teacher_and_for_nobody_else():
    with folder() as here, quiet():
        run = td.Run(td.parse_flags(["--smoke", "--out", str(here)]))
        pool = [here / "clip.safetensors"]
        td.keep(pool[0], {"latents": rand(8, 16, 12, 16, 16), "tracks": rand(8, 45, 88, 2),
                          "visible": torch.ones(8, 45, 88).bool(), "text": torch.ones(8, 4, 64)})
        _, given, _ = td.draw_batch(run, pool, 200)
        assert given["text"].all()
        kept = []

        def loss(model, x0, sigma, conditions, emphasis):
            kept.extend(conditions["text"].flatten(1).all(1).tolist())
            return sum(p.sum() for p in model.parameters()) * 1e-9

        def train_only(run, stage, steps, parts, step, average):
            for i in range(steps):
                step(i)

        with unittest.mock.patch.multiple(td, kept=lambda *_: pool, flow_loss=loss, train=train_only):
            run.args.stage = "teacher"
            run.steps["teacher"], run.recipe.batch = 4, 10
            td.train_teacher(run)
        assert 0.01 < 1 - sum(kept) / len(kept) < 0.3, len(kept)


def test_a_reward_scales_each_clips_own_gradient():
    grads = []
    for weight in 1.0, torch.ones(3), torch.tensor([1.0, 0.0, math.exp(0.5 / 0.25)]):
        torch.manual_seed(0)
        x0 = rand(3, 2, 4, 2, 2).requires_grad_(True)
        td.dmd_loss(x0, gaussian(1, 0.5), gaussian(0, 1), {}, None, (0, 0), 5.0, weight).backward()
        grads.append(x0.grad)
    assert grads[0].equal(grads[1]) and not grads[2][1].any()
    assert_near(grads[2][0], grads[0][0], 1e-6)
    assert_near(grads[2][2], grads[0][2] * math.exp(2), 1e-6)


def test_the_motion_reward_is_1_for_the_truth_and_0_for_a_picture_that_stands_still():
    scene = world.new_scenes(6, 21, seeded(3), objects=2, camera=False, attributes=(0, 0), moving=True, style="simple")
    video, (tracks, visible) = world.render(scene, 64), world.scene_tracks(scene, 64, seeded())
    start = scene["position"][:, :, :1]
    back = scene | {"position": (2 * start - scene["position"]).clamp(0.05, 0.95)}
    batch = {"tracks": tracks, "visible": visible & (torch.arange(88) < 16)}          # on the objects
    truth, still = motion_reward(video, batch), motion_reward(video[:, :, :1].expand_as(video), batch)
    other = motion_reward(world.render(back, 64), batch)
    assert truth.shape == (6,) and truth.mean() > 0.5 and still.equal(torch.zeros(6)), (truth, still)
    assert (truth > other + 0.2).all() and motion_reward(rand(*video.shape), batch).max() < 0, (truth, other)
    assert motion_reward(video, batch | {"visible": visible & False}).equal(torch.zeros(6))      # nothing was asked


def test_a_reward_is_named_or_a_function_in_a_file():
    with folder() as here:
        (here / "mine.py").write_text("def bright(video, batch):\n    return video.mean((1, 2, 3, 4))\n")
        assert find_reward(f"{here}/mine.py:bright")(torch.ones(2, 3, 5, 4, 4), {}).tolist() == [1, 1]
        assert find_reward("motion") is motion_reward
        for name in "emotion", f"{here}/mine.py:dark", f"{here}/none.py:bright", f"{here}/mine.py":
            assert_error(td.UserError, f"--reward {name}: neither motion nor FILE.py:FUNCTION", find_reward, name)


def before_distillation(here):
    """Weights of the stages before it, of a small model for small_scenes."""
    fits = {"size": (32, 32), "text_dim": 64, "in_dim": 32, "out_dim": 16, "track_dim": 16}
    saved(here / "vae.safetensors", new_vae(replace(SMALL_VAE, latent_channels=16)))
    for name in "teacher", "causal":
        saved(here / f"{name}.safetensors", new_model(causal=name == "causal", **fits))


def test_distillation_with_a_reward_and_an_ema_sink():
    with folder() as here, quiet() as (_, err), without_pictures(), small_scenes():
        before_distillation(here)
        (here / "mine.py").write_text(
            "def reward(video, batch):\n    return video[:, 0, 0, 0, 0] * 0 + len(batch['ids'])")
        evicted, lerp = [], torch.Tensor.lerp
        with unittest.mock.patch.object(torch.Tensor, "lerp", lambda *args: evicted.append(args[2]) or lerp(*args)):
            code = td.main(["--smoke", "--stage", "distill", "--steps", "1", "--out", str(here), "--sink-decay", "0.75",
                            "--rollout", "4", "--reward", f"{here}/mine.py:reward"])
        log = [json.loads(line) for line in open(here / "stats.jsonl")]
        assert code is None and [row["reward"] for row in log] == [4.0], (code, err.getvalue(), log)
        assert 1e5 < log[0]["loss_g"] < 1e8, log                    # it counts exp(4 / 0.5), squared in the loss
        # in two rollouts of 4 chunks, 2 layers average the keys and values of chunks 1 and 2 into the sink, chunk 0
        assert evicted.count(0.25) == 2 * 2 * 2 * 2, Counter(evicted)
        assert MotionStream.from_pretrained(here / "student.safetensors").config.sink_decay == 0.75


def test_the_end_of_a_long_rollout_is_judged_beside_the_image_it_began_with():
    chunks, first = list(rand(2, 4, 15, 2, 3).split(3, 2)), rand(2, 4, 1, 2, 3, seed=1)
    points = {"tracks": rand(2, 57, 5, 2, seed=2), "visible": rand(2, 57, 5, seed=3) > 0, "ids": torch.arange(5)}
    x0, told = td.last_clip(chunks[-3:], 6, first, points)
    assert x0.equal(torch.cat([first, *chunks[-2:]], 2)[:, :, [0, 2, 3, 4, 5, 6]])
    for key in "tracks", "visible":                             # 6 latents are 21 frames: the first, and the last 20
        assert told[key].equal(points[key][:, [0, *range(37, 57)]])
    assert told["ids"] is points["ids"]
    whole, same = td.last_clip(chunks, 15, first, points)
    assert whole[:, :, 1:].equal(torch.cat(chunks, 2)[:, :, 1:]) and same["tracks"].equal(points["tracks"])


def test_half_of_the_rollouts_are_longer_than_the_teachers_clip_and_say_nothing_of_light():
    with folder() as here, quiet(), without_pictures(), small_scenes():
        before_distillation(here)
        lengths, texts, judged = [], [], []

        def made(model, noise, conditions, first, exit_step, grad):
            lengths.append(noise.shape[2])
            texts.append(conditions["text"])
            assert conditions["tracks"].shape[2] == noise.shape[2] and first.shape[2] == 1
            return iter(noise.split(3, 2))

        def loss(x0, critic, conditions, shift):
            judged.append((x0.shape[2], conditions["tracks"].shape[2]))
            return sum(p.sum() for p in critic.parameters()) * 1.0

        with unittest.mock.patch.multiple(td, rollout=made, critic_loss=loss, dmd_loss=lambda *_: torch.zeros(())):
            with unittest.mock.patch.object(td.Optimizer, "step", lambda *_: 0.0), \
                    unittest.mock.patch.dict(td.RECIPES["tiny"], critic_steps=10 ** 9):
                td.main(["--smoke", "--stage", "distill", "--steps", "60", "--out", str(here), "--rollout", "6"])
        assert set(lengths) == {12, 15, 18} and 15 < lengths.count(12) < 50, Counter(lengths)
        assert set(judged) == {(12, 12)}
        neutral = embed_words(td.NEUTRAL, PRESETS["tiny"])
        assert all(text.equal(neutral.expand_as(text)) for text, length in zip(texts, lengths) if length > 12)
        assert not all(text.equal(neutral.expand_as(text)) for text, length in zip(texts, lengths) if length == 12)


def test_rollouts_under_drawn_memory_are_judged_as_whole_clips():
    memories, tail, lengths = [], [], []

    def made(model, noise, conditions, first, exit_step, grad):
        c = model.config
        memories.append((c.chunk, c.sink, c.window))
        lengths.append(noise.shape[2])
        assert model.new_caches()[0].window == c.window
        yield from noise.split(c.chunk, 2)
        tail.append(noise[:, :, -11:].clone())

    def loss(x0, critic, conditions, shift):
        assert x0.shape[2] == 12 and x0[:, :, 1:].equal(tail[-1]), memories[-1]
        return sum(p.sum() for p in critic.parameters()) * 1.0

    with folder() as here, quiet(), without_pictures(), small_scenes():
        before_distillation(here)
        with unittest.mock.patch.multiple(td, rollout=made, critic_loss=loss, dmd_loss=lambda *_: torch.zeros(())), \
                unittest.mock.patch.object(td.Optimizer, "step", lambda *_: 0.0), \
                unittest.mock.patch.dict(td.RECIPES["tiny"], critic_steps=10 ** 9):
            td.main(["--smoke", "--stage", "distill", "--steps", "80", "--out", str(here), "--rollout", "8",
                     "--memory", "drawn"])
        assert {*memories} < {*td.DRAWN} and len({*memories}) > 25 and len(td.DRAWN) == 36, Counter(memories)
        assert {12, 24} <= {*lengths} and [{*some} for some in zip(*memories)] == [{1, 3, 5}, {0, 1, 2, 3}, {1, 2, 4}]
        config = MotionStream.from_pretrained(here / "student.safetensors").config
        assert (config.chunk, config.sink, config.window) == (3, 1, 1), "the model's own, not the last that was drawn"


def test_a_student_is_trained_with_the_memory_that_is_asked_for():
    memories, new_caches = [], MotionStream.new_caches

    def record(model):
        memories.append((model.config.chunk, model.config.sink, model.config.window))
        return new_caches(model)

    with folder() as here, unittest.mock.patch.object(MotionStream, "new_caches", record), \
            unittest.mock.patch.object(td, "CONTEXTS", ()), \
            unittest.mock.patch.object(td, "KVCache", side_effect=KVCache) as cache:    # of its own memory alone
        own_clips(here / "data", ("a",), 69)
        for name, wanted, more in (("c2s3wfull", (2, 3, None), ("--rollout", "8")), ("c1s1w2", (1, 1, 2), ()),
                                   ("c5s1w1", (5, 1, 1), ()), ("c12s1w1", (12, 1, 1), ())):
            flags = own_flags(here, here / "data", "--memory", name, *more, "--out", str(here / "runs" / name))
            (here / "runs" / name).mkdir(parents=True)
            saved(here / "runs" / name / "teacher.safetensors", new_model(causal=False, steps=3))
            with quiet() as (_, err):
                for stage in "causal", "distill":
                    assert td.main([*flags, "--stage", stage, "--steps", "1"]) is None, (name, err.getvalue())
            assert {*memories} == {wanted} and unittest.mock.call(*wanted[1:]) in cache.call_args_list, memories
            for weights in "causal", "student":
                config = MotionStream.from_pretrained(here / "runs" / name / f"{weights}.safetensors").config
                assert (config.chunk, config.sink, config.window) == wanted
            memories.clear()
            with quiet() as (_, err):
                at = flags.index("--memory")
                assert td.main([*flags[:at], *flags[at + 2:], "--stage", "distill"]) == 2
            assert f"was trained with {{'chunk': {wanted[0]}, 'sink'" in err.getvalue(), err.getvalue()


def test_dmd_loss_moves_the_generator_only_and_critic_loss_the_critic_only():
    generator, teacher, critic = nets = [new_model(seed).requires_grad_(True) for seed in range(3)]
    (noise, given, first), calls = clip_of(6), []
    for net in teacher, critic:
        net.register_forward_hook(lambda net, args, out: calls.append((net, len(out))))

    def moved(loss):
        calls.clear()
        for net in nets:
            net.zero_grad()
        chunks = rollout(generator, noise, given, first, exit_step=1, grad=True)
        loss(torch.cat(list(chunks), 2)).backward()
        return [net for net in nets if any(p.grad is not None and p.grad.any() for p in net.parameters())]

    assert moved(lambda x0: td.dmd_loss(x0, teacher, critic, given, first, (3.0, 1.5), 5.0)) == [generator]
    assert calls == [(teacher, 6), (critic, 2)]                 # three evaluations guide the teacher, none the critic
    assert moved(lambda x0: td.critic_loss(x0, critic, given, 5.0)) == [critic] and calls == [(critic, 2)]


def test_flow_loss_is_zero_for_the_exact_velocity_and_leaves_the_image_out():
    x0 = rand(3, 4, 5, 2, 2)

    def exact(x_t, sigma, tracks):
        assert x_t[:, :, 0].equal(x0[:, :, 0]) and (sigma[:, 0] == 0).all()
        v = (x_t - x0) / sigma[:, None, :, None, None].clamp(min=1e-9)
        return torch.cat([v[:, :, :1] + 99, v[:, :, 1:]], 2)

    given = {"tracks": rand(3, 1, 5, 2, 2) > 0}
    assert td.flow_loss(exact, x0, torch.tensor([0.3, 0.8, 1.0]), given) < 1e-9
    assert td.flow_loss(lambda x, sigma, tracks: x * 0, x0, torch.ones(3), given) > 1


def test_causal_loss_sees_the_past_that_the_cache_holds():
    model, (x0, given, _), losses = new_model(), clip_of(12), []
    noise = rand(*x0.shape, seed=4)
    states = [add_noise(x0, noise, torch.full((2,), sigma)) for sigma in SMALL.sigmas]
    for context in (1, None), (1, 1), (1, 0), (0, 1), (0, 0):
        torch.manual_seed(0)
        losses.append(td.causal_loss(model, states, x0, x0, given, context).item())
    assert len(set(losses)) == 5, losses
    torch.manual_seed(0)
    other = torch.cat([x0[:, :, :9], rand(2, *x0.shape[1:2], 3, *x0.shape[3:], seed=5)], 2)     # no one reads the last
    assert td.causal_loss(model, states, x0, other, given, (1, None)).item() == losses[0]
    torch.manual_seed(0)
    assert td.causal_loss(model, states, x0, other.flip(2), given, (1, None)).item() != losses[0]
    torch.manual_seed(0)
    total = 0                                                   # with no memory, each chunk is a clip of its own
    for now in slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12):
        sigma, target = torch.full((2,), SMALL.sigmas[int(torch.randint(0, 3, ()))]), x0[:, :, now]
        x, level = with_first(add_noise(target, noise[:, :, now], sigma), sigma, None if now.start else x0[:, :, :1])
        v = model(x, level, given["text"], tracks=given["tracks"][:, :, now])
        total += (to_x0(x, v, level) - target).square().sum().item()
    assert abs(losses[-1] * x0.numel() / total - 1) < 1e-5


def test_a_worn_memory_shows_frame_0_in_a_rectangle_of_half_of_the_clips():
    x0 = rand(400, 2, 6, 8, 8)
    torch.manual_seed(0)
    memory = td.worn(x0, 3)
    changed = (memory != x0).any(1)                                                     # (B, F, h, w)
    assert not changed[:, :3].any() and changed[:, 3:].any((2, 3)).float().mean() > 0.3
    assert memory.movedim(1, -1)[changed].equal(x0[:, :, :1].expand_as(x0).movedim(1, -1)[changed])
    for mask in changed[:, 3][changed[:, 3].any((1, 2))]:
        rows, columns = (torch.nonzero(mask.any(d)).flatten() for d in (1, 0))
        assert mask.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    share = changed.any((1, 2, 3)).float().mean()
    assert 0.3 < share < 0.55, share                                                    # some rectangles are empty


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, td.DTensor) else tensor


def keeping_gradients(kept):
    """Appends the whole gradients of each update, a list, to `kept`."""
    clip = nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, limit):
        kept.append([whole(p.grad).clone() for p in parameters])
        return clip(parameters, limit)
    return unittest.mock.patch.object(nn.utils, "clip_grad_norm_", clip_and_keep)


def in_two_processes(code, *args):
    """Start `code` in two processes that share their steps; it knows torch, test, td, and args, strings. Returns a
    function that waits for their end."""
    child = f"import sys, torch, test_motionstream as test, train_distill as td\nargs = sys.argv[1:]\n{code}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                  "OMP_NUM_THREADS": "1"}                   # as torchrun sets it
    children = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", child, *map(str, args)], cwd=HERE,
                                 env=os.environ | shared | {"RANK": str(rank)}) for rank in range(2)]

    def wait():
        try:
            codes = [process.wait(timeout=120) for process in children]
        finally:
            for process in children:
                process.kill()
        assert codes == [0, 0], codes
    return wait


def toy_training(here, stop_at=None, nan_at=None, steps=6, save_every=300, batches=1, **settings):
    """Some steps of a small model; its parameters and what was logged. Leaves the model and all gradients behind."""
    model = new_model().requires_grad_(True)
    optimizer = td.Optimizer(model, muon=1e-2, adam=1e-2, steps=steps // batches, ema=0.9, batches=batches)
    toy_training.model, toy_training.gradients = model, []

    def step(i):
        if i == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = td.flow_loss(model, torch.randn(2, 4, 2, 4, 6), torch.rand(2), on_tracks(model))
        loss = loss * math.nan if i == nan_at else loss
        return {"loss": loss, "grad": optimizer.step(loss, i)}

    clock = itertools.count(0, 301 if save_every == 1 else 0)
    run = SimpleNamespace(out=here, seed=1, dtype=torch.float32, batches=batches,
                          settings=lambda _: {"data": "toy", "seed": 1} | settings)
    with quiet() as (out, _), unittest.mock.patch.object(td.time, "time", lambda: next(clock)), \
            keeping_gradients(toy_training.gradients):
        td.train(run, "toy", steps, optimizer.parts(), step)
    log = [json.loads(line)["loss"] for line in open(here / "stats.jsonl")]
    states = {f"{net}.{name}": whole(p).clone() for net, module in (("model", model), ("average", optimizer.average))
              for name, p in module.state_dict().items()}
    return states, log, out.getvalue()


def same(a, b):
    return all(p.equal(b[name]) for name, p in a.items())


def test_an_interrupted_training_continues_with_the_same_bits_and_no_other_settings():
    with folder() as one, folder() as two:
        whole, log, _ = toy_training(one)
        assert_error(SystemExit, "143", toy_training, two, stop_at=2)
        assert len((two / "stats.jsonl").read_text().splitlines()) == 3                    # it finished the step
        assert_error(td.UserError, "of other settings (data toy, now else);", toy_training, two, data="else")
        assert_error(td.UserError, "(steps 6, now 7; seed 1, now 2);", toy_training, two, steps=7, seed=2)
        resumed, resumed_log, _ = toy_training(two)
        assert same(whole, resumed) and log == resumed_log and len(log) == 6


def vae_gradients():
    """Of an update by two steps, of one process or of two."""
    vae = new_vae().requires_grad_(True)
    optimizer = td.Optimizer(vae, muon=1e-3, adam=1e-3, batches=2)
    with keeping_gradients(gradients := []):
        for i in range(td.RANK, 2, td.PROCESSES):
            optimizer.step(vae.decode_frames(vae.encode(rand(1, 3, 9, 8, 8, seed=i)))[0].square().mean(), i)
    return gradients


def assert_same_gradients(ours, theirs):
    """To 1e-5 of the largest of each parameter's, but 1e-3 after an update by Muon, which may round to bfloat16: sums
    in another order may round to the other side."""
    for update, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(left, right, strict=True):
            error = ((a - b).abs().max() / a.abs().max()).item()
            assert a.shape == b.shape and error <= (1e-3 if update else 1e-5), (update, error)


def assert_moved_alike(start, ours, theirs):
    """Two state dicts went the same way from `start`, to a fifth of it: Muon fills what a gradient of low rank leaves
    open, and that is rounding."""
    assert ours.keys() == theirs.keys() == start.keys()
    way, apart = (sum((p.float() - other[name]).square().sum() for name, p in ours.items())
                  for other in (start, theirs))
    assert apart < 0.04 * way, (apart, way)


def test_two_processes_have_the_gradients_of_one_that_accumulates_two_steps():
    child = """if True:
        td.dist.init_process_group("gloo")
        for folder in args:
            whole, _, said = test.toy_training(test.Path(folder), steps=14, batches=4)
            sharded = [(p.to_local().numel(), p.numel()) for p in test.toy_training.model.parameters()]
            results = test.toy_training.gradients, whole, said, sharded, test.vae_gradients()
            torch.save(results, f"{folder}/results{td.RANK}.pt")
        td.dist.destroy_process_group()
    """
    with folder() as one, folder() as two, folder() as both:    # four steps an update: two of each process
        assert_error(SystemExit, "143", toy_training, both, stop_at=7, steps=14, batches=4)
        wait = in_two_processes(child, two, both)
        whole, log, _ = toy_training(one, steps=14, batches=4)          # the odd steps make no update
        gradients, of_vae = toy_training.gradients, vae_gradients()
        wait()
        model = new_model().requires_grad_(True)
        start = {f"{net}.{name}": p.clone() for net in ("model", "average") for name, p in model.state_dict().items()}
        for i in range(4):
            torch.manual_seed(td.seed_of(1, "toy", i))
            td.flow_loss(model, torch.randn(2, 4, 2, 4, 6), torch.rand(2), on_tracks(model)).backward()
        for p, mean in zip(model.parameters(), gradients[0], strict=True):
            assert_near(mean, p.grad / 4, 1e-5)
        for path, rank in itertools.product((two, both), range(2)):     # three updates; what one began, two take over
            theirs, went, said, sharded, theirs_of_vae = torch.load(path / f"results{rank}.pt")
            assert ("resumed at step 8" in said) == (path == both)
            assert_same_gradients(gradients[2 if path == both else 0:], theirs)
            assert_same_gradients(of_vae, theirs_of_vae)
            assert_moved_alike(start, whole, went)
            assert sum(part for part, _ in sharded) < 0.6 * sum(size for _, size in sharded), sharded
        rows, theirs = ([json.loads(line) for line in open(path / "stats.jsonl")] for path in (one, two))
        assert len(log) == 12 and [row["step"] for row in theirs] == [*range(0, 12, 2)]         # process 0 writes
        ours, theirs = (torch.tensor([row["grad"] for row in log if "grad" in row]) for log in (rows, theirs))
        assert_near(ours, theirs, 1e-3)
        ours, theirs = (torch.load(path / "toy.0000012.checkpoint.pt") for path in (one, two))
        for name in " optimizer 0", " optimizer 1":
            for i, state in ours[name]["state"].items():
                for key, value in state.items():
                    assert_near(theirs[name]["state"][i][key], value, 0.01)
        _, _, said = toy_training(two, steps=14, batches=4)             # what two began, one takes over
        assert "resumed at step 12" in said


def without_pictures():
    """train_distill.main draws no previews in here."""
    return unittest.mock.patch.object(evaluate, "preview", lambda *_: None)


def distilled(flags):
    """The gradients of a distillation on small_scenes in float32."""
    with quiet(), keeping_gradients(gradients := []), without_pictures(), small_scenes(), \
            unittest.mock.patch.object(td.Run, "autocast", lambda run: contextlib.nullcontext()):
        assert td.main(flags) is None
    return gradients


def test_blocks_that_are_recomputed_give_the_same_losses_and_gradients():
    noise, given, first = clip_of(15)                           # five chunks: the cache forgets the second and third

    def bidirectional(model):
        torch.manual_seed(0)
        return td.flow_loss(model, noise, torch.tensor([0.3, 0.9]), given)

    def streamed(model):
        chunks = rollout(model, noise, given, first, exit_step=1, grad=True, generator=seeded())
        return torch.cat(list(chunks), 2).square().mean()

    for loss in bidirectional, streamed:
        results = []
        for checkpointing in False, True:
            model, runs = new_model().requires_grad_(True), []
            optimizer = td.Optimizer(model, muon=1e-3, adam=1e-3, ema=0.9, batches=2, checkpointing=checkpointing)
            for block in model.blocks:
                block.ffn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
            value = loss(model)
            forwards = runs.count(True)
            optimizer.step(2 * value, 0)                        # half of an update: the gradients stay
            assert runs.count(True) == forwards * (1 + checkpointing) > 0
            results.append((value, [p.grad for p in model.parameters() if p.grad is not None]))
        (a, ours), (b, theirs) = results
        assert len(ours) > 40 and abs(a / b - 1) <= 1e-5
        assert_same_gradients([ours], [theirs])


def test_two_processes_distil_as_one_that_accumulates_two_steps():
    def files(here):
        before_distillation(here)
        return ["--smoke", "--stage", "distill", "--steps", "2", "--rollout", "5", "--out", str(here)]

    child = """if True:
        torch.save(test.distilled(args), f"{args[-1]}/gradients{td.RANK}.pt")
        td.dist.destroy_process_group()
    """
    with folder() as one, folder() as two:
        wait = in_two_processes(child, "--checkpointing", *files(two))
        gradients = distilled(["--accumulate", "2", *files(one)])
        wait()
        # then the critic's; one process made half of what it saw before the generator's update
        for rank in range(2):
            theirs = torch.load(two / f"gradients{rank}.pt")
            assert len(gradients) == len(theirs) == 2
            assert_same_gradients(gradients[:1], theirs[:1])                # of the generator
        ours, theirs, start = (load_file(path) for path in (one / "student.safetensors", two / "student.safetensors",
                                                            one / "causal.safetensors"))
        assert_moved_alike(start, ours, theirs)


def test_adversarial_losses_are_the_hinge_and_move_one_network_each():
    class Mean(nn.Module):
        weight = nn.Parameter(torch.tensor(2.0))

        def encode(self, video):
            return self.weight * video.mean((1, 2, 3, 4))

    videos = [torch.full((2, 3, 5, 4, 4), value, requires_grad=True) for value in (0.25, 0.5, -0.25)]
    loss_g, loss_d = decoder.adversarial_losses(Mean(), *videos)
    assert loss_g == -2 * 0.5 and loss_d == (1 - 2 * 0.25) + (1 - 2 * 0.25)
    assert decoder.adversarial_losses(Mean(), 4 * videos[0], videos[1], 4 * videos[2])[1] == 0       # both far enough

    ours, discriminator = new_vae().requires_grad_(True), TinyVAE(decoder.DISCRIMINATOR)
    output, _ = ours.decode_frames(rand(2, 4, 2, 2, 2))
    losses = decoder.adversarial_losses(discriminator, rand(*output.shape), output, output)
    of_g, of_d = ([name for name, model in (("decoder", ours), ("discriminator", discriminator)) if any(
        grad is not None and grad.any() for grad in torch.autograd.grad(
            loss, [*model.parameters()], retain_graph=True, allow_unused=True))] for loss in losses)
    assert of_g == ["decoder"] and of_d == ["discriminator"], (of_g, of_d)


def decoder_run(here, *more, code=0):
    """extras.decoder in float32, on noise instead of drawn videos, or on encoded clips; the last line that was printed
    as an error."""
    def noise(run):
        return lambda: torch.randn(4, 3, 9, 16, 16).clamp(-1, 1)

    def clips(run, pictures):
        return sorted(run.args.data.glob("*.safetensors"))

    with quiet() as (_, err), unittest.mock.patch.object(decoder, "preview", lambda *_: None), \
            unittest.mock.patch.multiple(td, drawn_crops=noise, own_clips=clips), \
            unittest.mock.patch.object(td.Run, "autocast", lambda run: contextlib.nullcontext()):
        result = decoder.main(["--smoke", "--out", str(here), *map(str, more)])
    assert result == (code or None), (result, err.getvalue())
    return err.getvalue().splitlines()[-1]


def test_a_decoder_is_trained_for_the_latents_of_a_tiny_vae_and_resumes_to_the_bit():
    with folder() as one, folder() as two:
        small = replace(SMALL_VAE, latent_channels=16)
        flags = ["--vae", saved(one / "small.safetensors", new_vae(small)), "--steps", "3"]
        decoder_run(one, *flags)
        ours, given = load_vae(one / "decoder.safetensors"), new_vae(small)
        assert ours.metadata() == given.metadata() and same(given.encoder.state_dict(), ours.encoder.state_dict())
        assert not any(p.equal(q) for p, q in zip(ours.decoder.parameters(), given.decoder.parameters()))
        step = td.Optimizer.step

        def stop(optimizer, loss, i):
            if i == 1 and optimizer.model.config.latent_channels == 16:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(optimizer, loss, i)

        with unittest.mock.patch.object(td.Optimizer, "step", stop):
            assert_error(SystemExit, "143", decoder_run, two, *flags)
        decoder_run(two, *flags)
        whole, resumed = (torch.load(path / "decoder.0000003.checkpoint.pt") for path in (one, two))
        for part in "decoder model", "discriminator model", "discriminator average":
            assert same(whole[part], resumed[part]), part
        assert whole["discriminator model"]["replay"].flatten(1).any(1).sum() == 6              # half of three batches
        assert len((two / "stats.jsonl").read_text().splitlines()) == 3
        said = decoder_run(two, *flags, "--adversarial", "0.2", code=2)
        assert "other settings (adversarial 0.01, now 0.2)" in said, said


def wans_clips(here, h, w):
    """Flags for clips of Wan's latents, h x w cells; the first two channels say where a cell is."""
    torch.save(randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict(), here / "wan.pth")
    start = saved(here / "start.safetensors", randomised(MotionStream(replace(STUB, size=(8 * h, 8 * w)))))
    latents = rand(3, 16, 12, h, w)
    latents[:, 0], latents[:, 1] = torch.arange(h)[:, None], torch.arange(w)
    (here / "latents").mkdir()
    for i, clip in enumerate(latents.half()):
        save_file({"latents": clip[None].contiguous()}, here / "latents" / f"{i}.safetensors")
    return ["--vae", here / "wan.pth", "--data", here / "latents", "--weights", start]


def test_a_decoder_for_wans_vae_learns_what_wans_decodes_and_an_encoder_the_latents():
    narrow = TinyVAEConfig(16, 1, "end", 4, *(tuple((4, 1, *s[2:]) for s in part) for part in (TAEW21.encoder,
                                                                                               TAEW21.decoder)), 4)
    seen, asked, losses, decode_frames = [], [], decoder.adversarial_losses, TinyVAE.decode_frames
    with folder() as here, unittest.mock.patch.multiple(
            decoder, TinyVAEConfig=lambda *sizes: asked.append(sizes) or narrow,
            adversarial_losses=lambda model, video, *more: seen.append(video) or losses(model, video, *more)), \
            unittest.mock.patch.object(TinyVAE, "decode_frames",
                                       lambda vae, latents: seen.append(latents) or decode_frames(vae, latents)):
        decoder_run(here / "out", *wans_clips(here, 2, 4), "--steps", "1")
        assert TinyVAEConfig(*asked[0]) == TAEW21
        ours, (latents, video) = load_vae(here / "out" / "decoder.safetensors"), seen
        assert latents.shape == (16, 16, 6, 2, 4) and video.shape == (16, 3, 21, 16, 32)
        clips = [load_file(file)["latents"][0, :, :6].float() for file in (here / "latents").iterdir()]
        assert all(any(z.equal(clip) for clip in clips) for z in latents)
        with torch.no_grad():
            assert video.equal(load_vae(here / "wan.pth").decode(latents)[0])
        torch.manual_seed(td.seed_of(0, "decoder"))
        fresh = TinyVAE(narrow)
        assert not fresh.encoder[0].weight.equal(ours.encoder[0].weight)
        assert not fresh.decoder[1].weight.equal(ours.decoder[1].weight)


def test_of_wans_latents_144x144_pixels_of_21_frames_are_taken_wherever_they_fit():
    class Enough(Exception):
        pass

    def decode(vae, z):
        crops.append(z)
        return torch.zeros(len(z), 3, 21, 8, 8), None

    crops, places = [], set()
    with folder() as here, unittest.mock.patch.object(WanVAE, "decode", decode), \
            unittest.mock.patch.object(TinyVAE, "decode_frames", side_effect=Enough):
        flags = wans_clips(here, 20, 19)
        for seed in range(5):                                       # each draws two
            with contextlib.suppress(Enough):
                decoder_run(here / "out", *flags, "--seed", seed)
        for z in crops:
            assert z.shape == (16, 16, 6, 18, 18)
            y, x = (int(z[0, i, 0, 0, 0]) for i in range(2))
            places.add((y, x))
            assert z[:, 0].equal((y + torch.arange(18.0))[:, None].expand(16, 6, 18, 18))
            assert z[:, 1].equal((x + torch.arange(18.0)).expand(16, 6, 18, 18))
        assert len(places) > 3 and places <= {*itertools.product(range(3), range(2))}, places


def test_what_a_decoder_cannot_be_trained_with_is_refused_in_one_line():
    with folder() as here:
        flags = wans_clips(here, 2, 1)
        tiny = saved(here / "tiny.safetensors", new_vae(replace(SMALL_VAE, latent_channels=16)))
        for said, *more in [("tiny.safetensors: Wan's needs --data and --weights", "--vae", tiny, *flags[2:]),
                            ("wan.pth: Wan's needs --data and --weights, a tiny one", *flags[:2]),
                            ("wan.pth: Wan's needs --data and --weights, a tiny one", *flags[:4]),
                            ("vae.safetensors: cannot be read (No such file or directory); --stage vae makes it",),
                            ("LPIPS: ", "--vae", tiny, "--perceptual", "alex"),
                            ("--perceptual: invalid choice: 'net'", "--vae", tiny, "--perceptual", "net"),
                            ("--adversarial: -1 is not between 0 and 100", "--adversarial", "-1")]:
            with having_lpips(None):
                last = decoder_run(here / "bad", *more, code=2)
            assert last.startswith("error: ") and said in last, (said, last)
            assert not [*(here / "bad").glob("decoder*")]
        with quiet() as (_, err):
            assert td.main(["--perceptual", "vgg", "--out", str(here)]) == 2
        assert "unrecognized arguments: --perceptual vgg" in err.getvalue()


class Perceptual(nn.Module):
    """Stands for lpips.LPIPS: the mean square of the difference, plus one, as (B, 1, 1, 1)."""

    def __init__(self, net, verbose):
        assert net in ("alex", "vgg") and not verbose
        super().__init__()

    def forward(self, a, b):
        return 1 + (a - b).square().mean((1, 2, 3), keepdim=True)


@contextlib.contextmanager
def having_lpips(module):
    """`import lpips` gives this in here; None: there is no such package. (patch.dict would forget all modules that are
    imported inside.)"""
    before = sys.modules.get("lpips")
    sys.modules["lpips"] = module
    try:
        yield
    finally:
        sys.modules["lpips"] = before
        if before is None:
            del sys.modules["lpips"]


def test_lpips_joins_the_measures_if_it_is_asked_for():
    _, here = workplace()
    video = here / "lpips.mp4"
    assert sampled(*command("--out", video))[0] == 0
    with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
        code, out, err = sampled(*command("--reference", video, "--lpips", "vgg", "--frames", 2))
    line = next(line for line in out.splitlines() if "PSNR" in line)
    assert code == 0 and 1 < float(re.search("LPIPS ([-0-9.e]+)$", line)[1]) < 1.1, (line, err)
    with having_lpips(None):
        code, _, err = sampled(*command("--reference", video, "--lpips", "alex"))
    assert code == 2 and "pip install lpips" in err and err.count("\n") == 1, err


def test_a_perceptual_network_takes_part_in_a_decoders_loss():
    with folder() as here:
        flags = ["--vae", saved(here / "small.safetensors", new_vae(replace(SMALL_VAE, latent_channels=16))),
                 "--steps", "1"]
        decoder_run(here / "without", *flags)
        with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
            decoder_run(here / "with", *flags, "--perceptual", "alex")
        without, with_it = (json.loads((here / name / "stats.jsonl").read_text()) for name in ("without", "with"))
        assert 1 < with_it["loss"] - without["loss"] < 3 and with_it["psnr"] == without["psnr"]


def test_a_stop_waits_for_the_end_of_an_update():
    with folder() as one, folder() as two:
        whole, _, _ = toy_training(one, batches=3)
        assert_error(SystemExit, "143", toy_training, two, stop_at=0, batches=3)
        assert (two / "toy.0000003.checkpoint.pt").exists()
        assert same(whole, toy_training(two, batches=3)[0])


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it():
    with folder() as one, folder() as two:
        whole, _, _ = toy_training(one)
        assert_error(SystemExit, "143", toy_training, two, stop_at=4, save_every=1)
        names = sorted(path.name for path in two.glob("*.pt"))
        assert names == ["toy.0000004.checkpoint.pt", "toy.0000005.checkpoint.pt"], names      # the last two
        newest = two / names[1]
        newest.write_bytes(newest.read_bytes()[:1000])
        resumed, log, said = toy_training(two)
        assert "0000005.checkpoint.pt: damaged" in said and "0000004.checkpoint.pt: resumed at step 4" in said, said
        assert same(whole, resumed) and len(log) == 5 + 2


def test_nan_stops_a_training_before_anything_moves():
    with folder() as here:
        assert_error(td.UserError, "toy, step 3: loss nan, gradient norm nan; stopped before anything moved",
                     toy_training, here, nan_at=3)
        stopped = {name: p.clone() for name, p in toy_training.model.state_dict().items()}
        with folder() as other:
            assert_error(SystemExit, "143", toy_training, other, stop_at=2)                  # 3 updates, none of NaN
        assert same(stopped, toy_training.model.state_dict())


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_it():
    resource = importlib.import_module("resource")                            # not on Windows
    with folder() as here:
        assert_error(SystemExit, "143", toy_training, here, stop_at=2)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))          # a file cannot be larger
        try:
            assert_error(OSError, "toy.0000006.checkpoint.pt: ", toy_training, here)
            assert_error(OSError, "x.safetensors: ", td.keep, here / "pool/x.safetensors", {"a": torch.zeros(50_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((here / "pool").iterdir())
        (here / "pool").rmdir()
        assert [path.name for path in here.iterdir() if path.suffix != ".jsonl"] == ["toy.0000003.checkpoint.pt"]
        assert "resumed at step 3" in toy_training(here)[2]


def test_what_is_kept_is_named_by_what_made_it():
    with folder() as here:
        def kept(weights=b"one", count=8, **flags):
            flags = [word for flag, value in {"out": here, **flags}.items() for word in (f"--{flag}", str(value))]
            run = td.Run(td.parse_flags(flags))
            run.path("vae").write_bytes(weights)
            made = []
            with quiet():
                make = lambda *_: lambda i: made.append(i) or {"a": torch.full((8,), i)}
                files = td.kept(run, "pool", "vae", count, make)
            assert files == td.kept(run, "pool", "vae", count, None) and not list(here.rglob(".*"))     # read, not made
            assert [load_file(file)["a"].unique().tolist() for file in files] == [[i] for i in range(0, count, 8)]
            return made, run.settings("teacher")

        first = kept()
        assert first[0] == [0] and kept() == ([], first[1]) and kept(count=20)[0] == [8, 16], "what is there stays"
        for made, settings in kept(weights=b"two"), kept(seed=1):
            assert made == [0] and settings != first[1]
        assert kept(tracks="random")[1] != first[1]
        runs = [td.Run(td.parse_flags(["--out", str(here), "--stage", "distill", *more]))
                for more in ([], ["--memory", "c5s1w1"], ["--memory", "c5s2w1"])]
        names, folders = ("images16", "trajectories"), []
        for run in runs:                                            # of other chunks, rollouts are longer
            with quiet():
                make = lambda *_: lambda i: {"a": torch.zeros(1)}
                folders.append([td.kept(run, name, "vae", 1, make)[0].parent for name in names])
        assert folders[0][0] != folders[1][0] == folders[2][0] and folders[0][1] == folders[1][1]


def test_processes_wait_equally_often_whatever_each_has_to_make():
    waits, stop = [], UserError("the training begins")

    def model(run, name, **more):
        if more:
            raise stop

    for rank in 0, 1:                                               # one file of trajectories, which process 0 makes
        states = [(torch.zeros(1), sigma) for sigma in (*PRESETS["tiny"].sigmas, 0)]
        with folder() as here, quiet(), unittest.mock.patch.multiple(
                td, PROCESSES=2, RANK=rank, mean_processes=waits.append, keep=lambda file, tensors: waits.append(file),
                compute_dtype=lambda _: torch.float32,
                film_clips=lambda *_: lambda i: {}, draw_batch=lambda *_: (torch.zeros(1, 1, 1), {}, {}),
                track_features=lambda _: None, euler=lambda *_: states), \
                unittest.mock.patch.object(td.Run, "model", model):
            for name in "vae", "teacher":
                (here / f"{name}.safetensors").write_bytes(b"")
            run = td.Run(td.parse_flags(["--smoke", "--out", str(here)]))
            assert_error(UserError, "the training begins", td.train_causal, run)
        waits.append(None)
    waits = [[type(wait) for wait in part] for part in (waits[:waits.index(None)], waits[waits.index(None) + 1:-1])]
    assert [part.count(torch.Tensor) for part in waits] == [2, 2] and len(waits[0]) == len(waits[1]) + 1, waits


def test_processes_share_what_is_made():
    with folder() as here, quiet(), unittest.mock.patch.multiple(td, PROCESSES=3, RANK=1, mean_processes=lambda _: 0):
        run, made = td.Run(td.parse_flags(["--out", str(here)])), []
        run.path("vae").write_bytes(b"")
        files = td.kept(run, "pool", "vae", 60, lambda *_: lambda i: made.append(i) or {"a": torch.zeros(8)})
        assert made == [8, 32, 56] and len(files) == 8 and sum(file.exists() for file in files) == 3
        flags, own = own_flags(here, own_clips(here / "data", "abcd")), []
        with unittest.mock.patch.object(clips, "read_clip", lambda _, stem, caption: own.append(stem.name) or 1 / 0):
            assert_error(td.UserError, "0 of 4 clips", encoded, flags)
        assert own == ["b"]


def with_transformers(test):
    """The test, which skips where that package or ftfy is missing."""
    @functools.wraps(test)
    def run():
        for name in "ftfy", "tokenizers", "transformers":
            if not importlib.util.find_spec(name):
                raise unittest.SkipTest(f"{name.upper()} IS NOT INSTALLED, nothing was encoded")
        import transformers
        transformers.utils.logging.disable_progress_bar()
        test()
    return run


def small_encoders(here, width=64):
    """The encoders of a -Diffusers repository in small, with random parameters, as files; returns (UMT5, CLIP)."""
    import tokenizers
    import transformers
    words = {word: i for i, word in enumerate("<pad> </s> <unk> a small red cat & dog runs".split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(here / "tokenizer")
    umt5 = randomised(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=100, d_model=width, d_kv=16, d_ff=160, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0))).bfloat16()
    clip = randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=224,
        patch_size=14)))
    umt5.save_pretrained(here / "text_encoder")
    clip.save_pretrained(here / "image_encoder")
    return umt5, clip


@functools.cache
def ramp_video(blue, frames):
    """The bytes of a video of 64x48 pixels."""
    ramp = np.mgrid[:frames, :48, :64].sum(0)[..., None] * [2, 3, 1 + blue] % 256
    with folder() as here:
        imageio.mimwrite(here / "x.mp4", ramp.astype(np.uint8), fps=16, macro_block_size=2)
        return (here / "x.mp4").read_bytes()


def own_clips(here, names=("a", "sub/b", "c"), frames=45):
    """A folder of clips as users have it: videos of 64x48 pixels, tracks, some of them hidden, and texts."""
    for i, name in enumerate(names):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.mp4").write_bytes(ramp_video(i % 3, frames))
        tracks = rand(frames, 4 + i, 2, seed=i).numpy() * 6 + (32, 20)
        tracks[:, 0] = (10, 1)                                      # is cropped away
        np.savez(f"{path}.npz", tracks=tracks.astype(np.float32), visibility=rand(frames, 4 + i, seed=i).numpy() > 0)
        Path(f"{path}.txt").write_text("fading light")
    return here


def encoded(flags, pictures=False):
    """Files of the clips that a training with these flags sees, and what was said."""
    with quiet() as (said, _):
        files = td.own_clips(td.Run(td.parse_flags([str(word) for word in flags])), pictures)
    return files, said.getvalue()


def own_flags(here, data, *more):
    """Flags of a training of small models on the clips in `data`."""
    start = saved(here / "start.safetensors", new_model(causal=False))
    vae = saved(here / "encoder.safetensors", new_vae())
    return ["--smoke", "--data", str(data), "--weights", str(start), "--vae", str(vae), "--out",
            str(here / "runs" / "out"), *more]


def test_own_clips_are_cropped_and_encoded_with_their_tracks():
    with folder() as here:
        flags = own_flags(here, own_clips(here / "data"))
        run, (files, _) = td.Run(td.parse_flags(flags)), encoded(flags)
        names = "a", "c", "sub/b"
        assert [file.relative_to(here / "runs/clips").as_posix().split(".")[0] for file in files] == [*names]
        for name, clip in zip(names, map(load_file, files)):
            pictures = imageio.mimread(here / "data" / f"{name}.mp4", memtest=False)
            # 64x48 covers 48x32 at scale 3/4, which leaves 36 rows: 2 go above, 2 below
            video = torch.stack([sample.fit_image(Image.fromarray(frame), (32, 48)) for frame in pictures], 2)
            with torch.no_grad():
                assert clip["latents"].equal(run.vae().encode(video).half())
            given = np.load(here / "data" / f"{name}.npz")
            N, moved = given["tracks"].shape[1], given["tracks"] * 0.75 - (0, 2)
            seen = given["visibility"] & ((moved >= 0) & (moved < (48, 32))).all(-1)
            assert clip["visible"][0, :, :N].numpy().tolist() == seen.tolist() and not clip["visible"][0, :, N:].any()
            there = seen[..., None] * np.ones(2, bool)
            assert abs(clip["tracks"][0, :, :N].numpy() - moved)[there].max() < 1e-4 and not seen[:, 0].any()
            assert clip["tracks"].shape == (1, 45, 2500, 2) and clip["visible"].shape == (1, 45, 2500)
            assert clip["text"].equal(F.pad(embed_words("fading light", SMALL), (0, 0, 0, 3)))
        batch = td.pick(files, 50)
        assert batch["latents"].shape == (50, 4, 12, 4, 6) and {*batch} == {"latents", "tracks", "visible", "text"}
        assert len({clip.sum().item() for clip in batch["latents"].float()}) == 3
        many = rand(45, 3000, 2).numpy() + 20
        np.savez(here / "data/a.npz", tracks=many)
        kept = load_file(encoded(flags)[0][0])["tracks"][0, 0, :, 0].numpy() / 0.75
        assert len(kept) == 2500 and all(abs(many[0, :, 0] - x).min() < 1e-4 for x in kept)
        assert 350 < sum(abs(many[0, 2500:, 0] - x).min() < 1e-4 for x in kept) < 500, "of all, at random"


def test_own_clips_are_encoded_once_and_pictures_are_enough_to_distil():
    with folder() as here:
        flags, data = own_flags(here, own_clips(here / "data")), here / "data"
        with unittest.mock.patch.object(clips, "read_clip", wraps=clips.read_clip) as read:
            files, _ = encoded(flags)
            again, _ = encoded(flags)
            assert read.call_count == 3 and files == again
            settings = td.Run(td.parse_flags(flags)).settings("teacher")
            (data / "a.txt").write_text("steady light")
            other, _ = encoded(flags)
            assert read.call_count == 4 and other[0] != files[0] and other[1:] == files[1:]
            assert td.Run(td.parse_flags(flags)).settings("teacher") != settings    # other clips, another training
            encoded([*flags, "--rollout", "4"])                         # as long as the clips
            assert read.call_count == 4
            assert_error(td.UserError, "0 of 3 clips", encoded, [*flags, "--rollout", "5"])
            read.reset_mock()
            _, said = encoded(own_flags(here, own_clips(here / "long", frames=93), "--rollout", "8"))
            assert read.call_count == 3 and not said
        (data / "a.txt").unlink()
        with open(data / "clips.csv", "w") as file:
            file.write("video,caption,score\na.mp4,\"warming light\",1\nc.mp4,none of this,2\n")
        settings = td.Run(td.parse_flags(flags)).settings("teacher")
        (data / "notes.md").write_text("no part of a clip")
        assert td.Run(td.parse_flags(flags)).settings("teacher") == settings
        text = [load_file(file)["text"] for file in encoded(flags)[0]]
        assert text[0].equal(F.pad(embed_words("warming light", SMALL), (0, 0, 0, 3))) and not text[0].equal(text[1])
        for table in "name,caption\na.mp4,x\n", "video,caption\nb\u00e9,x":
            (data / "clips.csv").write_bytes(table.encode("latin-1"))
            assert_error(td.UserError, "clips.csv: no csv in UTF-8 with columns", encoded, flags)
        (data / "clips.csv").unlink()
        (data / "a.txt").write_text("steady light")
        (data / "a.mp4").unlink()
        Image.new("RGB", (64, 48)).save(data / "a.png")
        mixed, _ = encoded(flags, pictures=True)
        assert td.pick(mixed, 20, 1)["latents"].shape == (20, 4, 1, 4, 6), "one of them is a picture"
        for file in data.rglob("*.mp4"):
            Image.new("RGB", (64, 48)).save(file.with_suffix(".png"))
            file.unlink()
        save_file({"prompt": rand(3, 4096)}, data / "a.safetensors")            # not for models that read words
        files, _ = encoded(flags, pictures=True)
        assert [load_file(file)["latents"].shape for file in files] == [(1, 4, 1, 4, 6)] * 3
        assert load_file(files[0])["text"].equal(F.pad(embed_words("steady light", SMALL), (0, 0, 0, 3)))
        assert_error(td.UserError, "0 of 3 clips can be used here; a clip is a.mp4, a.npz", encoded, flags)
        run = td.Run(td.parse_flags([str(word) for word in flags]))
        with quiet() as (said, _), contextlib.suppress(td.UserError):
            td.own_clips(run, pictures=False)
        assert said.getvalue().count(": has no video") == 3
        (data / "empty").mkdir()
        flags[2] = str(data / "empty")
        assert_error(td.UserError, "0 of 0 clips can be used here", encoded, flags)
        (here / "runs/out").mkdir()
        saved(here / "runs/out" / "student.safetensors", new_model())   # of this run, whose VAE is elsewhere
        with quiet():
            measured = evaluate.new_run(["--out", str(here / "runs/out")], "eval")
        assert measured.path("student") == here / "runs/out" / "student.safetensors"


@with_transformers
def test_clips_prompts_are_encoded_for_wans_weights():
    with folder() as here:
        small_encoders(here / "encoders", width=4096)
        data, c = own_clips(here / "data", ("a", "b"), frames=81), replace(STUB, in_dim=48, track_dim=16, clip_dim=32)
        weights = saved(here / "start.safetensors", MotionStream(replace(c, size=(32, 48), fps=16)))
        flags = ["--data", data, "--weights", weights, "--vae", saved(here / "vae.safetensors", new_vae(STUB_VAE)),
                 "--out", here / "runs/out"]
        (data / "a.txt").write_text("a red cat")
        with unittest.mock.patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
            files, said = encoded([*flags, "--text-encoder", here / "encoders"])
            assert load.call_count == 3 and not said, "each encoder once, and the tokenizer"
        a, b = map(load_file, files)
        assert a["text"].shape == (1, 512, 4096) and a["clip"].shape == (1, 257, 32)
        text = encoders.text_encoder(here / "encoders", "cpu")("a red cat")
        assert a["text"][0, :4].equal(text) and not a["text"][0, 4:].any() and not a["text"].equal(b["text"])
        image = sample.fit_image(Image.fromarray(imageio.mimread(data / "a.mp4", memtest=False)[0]), (32, 48))
        assert_near(a["clip"][0], encoders.image_encoder(here / "encoders", "cpu")(image), 1e-5)
        assert_error(td.UserError, "0 of 2 clips", encoded, flags)
        for name in "a", "b":
            save_file({"prompt": rand(3, 4096)}, data / f"{name}.safetensors")
        assert_error(td.UserError, "give --image-encoder", encoded, flags)
        with unittest.mock.patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
            files, _ = encoded([*flags, "--image-encoder", here / "encoders"])
            assert load.call_count == 1, "CLIP, for both"
        assert load_file(files[0])["clip"].equal(a["clip"]) and not load_file(files[0])["text"].equal(a["text"])
        save_file({"prompt": rand(3, 4096), "clip": (rows := rand(257, 32))}, data / "a.safetensors")
        files, _ = encoded([*flags, "--image-encoder", here / "encoders"])
        assert load_file(files[0])["clip"][0].equal(rows), "those of the file"


def test_broken_clips_are_named_and_too_many_end_it():
    with folder() as here:
        data = own_clips(here / "data", [f"good{i}" for i in range(9)] + ["bad"])
        flags = own_flags(here, data)
        frames = imageio.mimread(data / "bad.mp4", memtest=False)
        good = {file: file.read_bytes() for file in data.iterdir()}
        for cause, name, damage in [
            ("bad.txt", "bad.txt", Path.unlink), ("bad: has no video", "bad.mp4", Path.unlink),
            ("bad.npz: damaged", "bad.npz", lambda path: path.write_text("no numbers")),
            ("bad.npz: No such file", "bad.npz", Path.unlink),
            ("44 frames at 16 a second, 45 at 16 are wanted", "bad.mp4",
             lambda path: imageio.mimwrite(path, frames[:44], fps=16, macro_block_size=2)),
            ("at 24 a second", "bad.mp4",
             lambda path: imageio.mimwrite(path, frames, fps=24, macro_block_size=2)),
            ("tracks of 44", "bad.npz", lambda path: np.savez(path, tracks=np.full((44, 2, 2), 20.0)))]:
            damage(data / name)
            clips, said = encoded(flags)
            assert f"left out: {data}/bad: " in said and cause in said, (cause, said)
            assert said.count("left out") == 1 and len(clips) == 9
            (data / name).write_bytes(good[data / name])
        for name in "bad", "good0":
            (data / f"{name}.txt").unlink()
        assert_error(td.UserError, "8 of 10 clips can be used here", encoded, flags)


def trained(here, flags, stages):
    """One step of each stage of a training; what was logged, by stage."""
    with quiet() as (out, err):
        for stage in stages:
            assert td.main([*flags, "--stage", stage, "--steps", "1", "--accumulate", "1"]) is None, err.getvalue()
    rows = [json.loads(line) for line in open(Path(flags[flags.index("--out") + 1]) / "stats.jsonl")]
    return {row["stage"]: row for row in rows}, out.getvalue()


def test_every_stage_runs_on_clips_of_ones_own():
    with folder() as here, unittest.mock.patch.object(td, "render", None):                # nothing is drawn
        flags = own_flags(here, own_clips(here / "data"))
        log, _ = trained(here, flags, ("teacher", "causal", "distill"))
        assert all(math.isfinite(row["grad_c" if stage == "distill" else "grad"]) for stage, row in log.items()), log
        config = MotionStream.from_pretrained(here / "runs/out/student.safetensors").config
        assert config == replace(SMALL, causal=True)


def test_clips_may_be_longer():
    with folder() as here:
        flags = own_flags(here, own_clips(here / "data", frames=69), "--length", "57")
        with unittest.mock.patch.object(td, "flow_loss", wraps=td.flow_loss) as loss:
            trained(here, flags, ("teacher", "causal", "distill"))
        assert {call.args[1].shape[2] for call in loss.call_args_list} == {15}, "57 frames are 15 latents"
        changed = [word if word != "57" else "69" for word in flags]
        with quiet() as (_, err):
            assert td.main([*changed, "--stage", "distill", "--steps", "1"]) == 2
        assert "of other settings (length 57, now 69" in err.getvalue()


def test_long_rollouts_start_from_the_first_latent_of_ones_own_clips():
    with folder() as here:
        flags = own_flags(here, own_clips(here / "data", frames=93), "--rollout", "8")
        (here / "runs/out").mkdir(parents=True)
        for name in "teacher", "causal":
            saved(here / "runs/out" / f"{name}.safetensors", new_model(causal=name == "causal"))
        lengths, last_clip = [], td.last_clip

        def record(chunks, frames, first, points):
            lengths.append(first.shape[2] if first is not None else 0)
            x0, points = last_clip(chunks, frames, first, points)
            assert x0.shape[2] == 12, "the teacher knows 12 latents"
            return x0, points

        with quiet() as (_, err), unittest.mock.patch.object(td, "last_clip", record):
            assert td.main([*flags, "--stage", "distill", "--steps", "6"]) is None, err.getvalue()
        assert {*lengths} == {1}


def full_clips(here, clip_dim=0):
    """Clips for weights that read Wan's text, and those of an image branch."""
    data = own_clips(here / "data", ("a", "b"), frames=81)
    for name in "a", "b":
        rows = {"prompt": rand(7, 4096)} | ({"clip": rand(257, clip_dim)} if clip_dim else {})
        save_file(rows, data / f"{name}.safetensors")
    return data


def test_every_stage_runs_from_weights_of_wan_in_the_papers_two_stages_of_the_teacher():
    calls, judged, masks, forward, thinned, dmd_loss = [], [], [], MotionStream.forward, td.thinned, td.dmd_loss

    def record(model, x, sigma, text, **given):
        calls.append((sigma.clone(), text, given))
        return forward(model, x, sigma, text, **given)

    assert {*schedule(3, 6.0)} < {*schedule(48, 6.0)}               # here the teacher takes these three steps alone
    few = functools.partial(euler, sigmas=schedule(3, 6.0))
    with folder() as here, unittest.mock.patch.multiple(
            td, thinned=lambda visible, pauses: masks.append(pauses) or thinned(visible, pauses), euler=few), \
            unittest.mock.patch.object(MotionStream, "forward", record):
        data, c = full_clips(here, 32), replace(STUB, in_dim=32, clip_dim=32, size=(32, 48))
        saved(here / "wan.safetensors", randomised(MotionStream(c))), saved(here / "vae.safetensors", new_vae(STUB_VAE))
        flags = ["--smoke", "--data", str(data), "--weights", str(here / "wan.safetensors"), "--vae",
                 str(here / "vae.safetensors"), "--out", str(here / "out")]
        log, _ = trained(here, flags, ("teacher",))
        first = MotionStream.from_pretrained(here / "out" / "teacher.safetensors")
        state = torch.load(*(here / "out").glob("teacher.*.pt"), weights_only=True)
        assert " optimizer 0" in state and " optimizer 1" not in state              # AdamW alone
        assert first.config == replace(c, in_dim=48, track_dim=16, shift=6.0, sigmas=schedule(3, 6.0), steps=48)
        assert masks == [False] and (calls[0][0] > 0).all()         # no frame is clean: the image is in channels
        assert calls[0][2]["image"].shape == (1, 16, 21, 4, 6) and not calls[0][2]["image"][:, :, 1:].any()
        assert calls[0][1].shape == (1, 512, 4096) and calls[0][2]["clip"].shape == (1, 257, 32)
        (here / "out" / "teacher.safetensors").rename(here / "first.safetensors")
        shutil.rmtree(here / "out")
        flags[flags.index("--weights") + 1] = str(here / "first.safetensors")
        with unittest.mock.patch.object(td, "dmd_loss", lambda *args: judged.append(args) or dmd_loss(*args)):
            log, _ = trained(here, flags, ("teacher", "causal", "distill"))
        (x0, _, _, given, image, *_), = judged                      # of the clip, whose frame 0 is made too
        assert x0.shape == given["image"].shape and image is None and not x0[:, :, 0].equal(given["image"][:, :, 0])
        assert set(masks[1:]) == {True} and all(math.isfinite(row["seconds"]) for row in log.values())
        for name in "teacher", "causal", "student":
            model = MotionStream.from_pretrained(here / "out" / f"{name}.safetensors")
            assert model.track_head.conv.weight.equal(first.track_head.conv.weight)
            assert not model.blocks[0].ffn[0].weight.equal(first.blocks[0].ffn[0].weight)
        assert {tuple(given["image"].shape[1:3]) for _, _, given in calls} == {(16, 21), (16, 3)}
        told = []
        with quiet(), without_pictures(), unittest.mock.patch.multiple(
                td, train=lambda run, *args: told.append((run.batches, *args[:2])), kept=lambda *_: []):
            for stage in "teacher", "causal", "distill":
                td.main([*flags[1:], "--stage", stage])
        assert told == [(128, "teacher", 800 * 128), (128, "causal", 2000 * 128), (64, "distill", 400 * 5 * 64)], told


def test_what_cannot_be_trained_is_refused_in_one_line():
    with folder() as here, quiet() as (_, err):
        data, mine = own_clips(here / "data", ("a",)), own_clips(here / "clips", ("a",))
        vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
        mask = saved(here / "mask.safetensors", randomised(MotionStream(replace(STUB, in_dim=36))))
        wan = saved(here / "wan.safetensors", randomised(MotionStream(STUB)))
        student, small = saved(here / "s.safetensors", new_model()), saved(here / "small.safetensors", new_vae())
        teacher = saved(here / "t.safetensors", new_model(causal=False))
        for said, *flags in [("--reward needs --stage distill", "--reward", "motion", "--stage", "teacher"),
                             ("--memory needs --stage distill", "--memory", "drawn", "--stage", "teacher"),
                             ("argument --memory: 3,1,1 is not like c3s1w1, chunk 1 to 12", "--memory", "3,1,1"),
                             ("argument --memory: c13s1w1 is not like", "--memory", "c13s1w1"),
                             ("--length 9: needs --data, and whole chunks", "--length", "9", "--data", data),
                             ("--stage: invalid choice: 'eval'", "--stage", "eval"),
                             ("unrecognized arguments: --clips 3", "--clips", "3"),
                             ("unrecognized arguments: --adversarial 1", "--adversarial", "1"),
                             ("--tflops needs --dry-run", "--tflops", "4"),
                             ("--length 81: needs --data, and whole chunks", "--length", "81"),
                             ("--length 80: needs --data, and whole chunks", "--length", "80", "--data", data),
                             ("mask.safetensors: takes the image as a clip with a mask", "--weights", mask),
                             ("s.safetensors: holds a student", "--weights", student),
                             ("wan.safetensors: give --vae FILE", "--weights", wan, "--data", data),
                             ("data: give --vae FILE", "--data", data),
                             ("wan.safetensors: give --data FOLDER", "--weights", wan, "--vae", vae),
                             ("no.safetensors: cannot be read (No such file", "--weights", here / "no.safetensors"),
                             ("no.safetensors: no such file", "--vae", here / "no.safetensors"),
                             ("small.safetensors: drop it, or --stage vae", "--vae", small, "--stage", "vae"),
                             ("data: not for this --stage", "--data", data, "--stage", "vae"),
                             ("none: no such folder", "--data", here / "none"),
                             ("encoded clips go to the folder clips beside", "--data", data, "--vae", small, "--out",
                              data / "x"),
                             ("here in --data", "--data", here, "--vae", small),
                             ("here in --data", "--data", mine, "--vae", small),
                             ("reads words; drop --text-encoder", "--data", data, "--vae", small, "--text-encoder",
                              here),
                             ("vae.safetensors: no such folder", "--data", vae),
                             ("vae.safetensors: latents have 16 channels and stride 8, those of", "--weights", teacher,
                              "--vae", vae, "--data", data),
                             ("wan.safetensors: this is a DiT; a whole VAE", "--vae", wan)]:
            assert td.main([str(word) for word in ("--out", here / "out", *flags)]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last and "makes it" not in last, (said, last)


def test_of_dense_tracks_a_subset_is_kept_and_pauses_spare_the_first_chunk():
    torch.manual_seed(0)
    visible = torch.ones(40, 81, 2500, dtype=torch.bool)
    kept, paused = td.thinned(visible, False), td.thinned(visible, True)
    count = kept[:, 0].sum(1)
    assert kept.equal(kept[:, :1].expand_as(kept)) and 1000 <= count.min() < 1200 and 2300 < count.max() <= 2500
    silent = ~paused.any(2)                                         # (B, T)
    starts = [0, *range(9, 81, 12), 81]
    chunks = torch.stack([silent[:, a:b].float().mean(1) for a, b in zip(starts, starts[1:])], 1)
    assert ((chunks == 0) | (chunks == 1)).all() and not chunks[:, 0].any() and 0.12 < chunks[:, 1:].mean() < 0.28
    assert td.thinned(visible[:, :, :7], False).all()               # if there are few, all
    visible[:, :, 40:] = False                                      # few, and hidden ones to make up the number
    assert td.thinned(visible, False)[:, :, :40].all()


def test_a_dry_run_tells_parameters_and_costs_and_makes_nothing():
    from torch.utils.flop_counter import FlopCounterMode
    resource = importlib.import_module("resource")                  # not on Windows
    with folder() as here:
        for preset, count in ("wan2.1-1.3b", "1,418,996,800"), ("wan2.2-5b", "4,999,787,712"), ("tiny", "3,019,776"):
            with quiet() as (out, _):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                assert td.main(["--dry-run", preset, "--out", str(here / "out")]) is None
                assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000       # KiB
            assert f"\n{count}" in out.getvalue(), out.getvalue()
            said = out.getvalue()
            if preset == "wan2.1-1.3b":
                # 6 latents of 1560 tokens, 1536 wide, key and value, 30 layers, 2 bytes
                assert f"{6 * 1560 * 1536 * 2 * 30 * 2 / 2 ** 20:,.0f} MiB" in said, said
                assert "8 GPUs: 3.3 GiB each to train the teacher, 6.6 to distil" in said       # 20 and 40 bytes
                assert "teacher: 614,400 clips" in said and "causal: 256,000 clips" in said, said
            if preset == "wan2.1-1.3b":
                days = [re.search(r"1 GPU: .* teacher ([\d.]+),", said)[1]]
                for flags in ["--tflops", "198"], ["--memory", "c3s2w6"]:
                    with quiet() as (out, _):
                        td.main(["--dry-run", preset, "--out", str(here / "out"), *flags])
                    days.append(re.search(r"1 GPU: .* teacher ([\d.]+),", out.getvalue())[1])
                assert f"{24 * 1560 * 1536 * 2 * 30 * 2 / 2 ** 20:,.0f} MiB" in out.getvalue(), "of the chosen memory"
                assert 1.9 < float(days[1]) / float(days[0]) < 2.1 and days[2] == days[0], days
        assert not (here / "out").exists()
    c = replace(PRESETS["tiny"], clip_dim=40, dim=384, ffn_dim=1500)
    model, x = randomised(MotionStream(c)), rand(1, 16, 6, 16, 16)
    with FlopCounterMode(display=False) as counter, unittest.mock.patch.object(
            F, "scaled_dot_product_attention", lambda q, k, v: (q @ k.mT).softmax(-1) @ v):     # its own is not counted
        model(x, torch.ones(1), rand(1, 8, 64), clip=rand(1, 257, 40))
    assert abs(counter.get_total_flops() / td.forward_flops(c, 6 * 64, 6 * 64) - 1) < 0.03


@slow
def test_the_whole_training_runs_in_a_minute():
    with folder() as here:
        subprocess.run([sys.executable, "train_distill.py", "--smoke", "--out", here], cwd=HERE, check=True)
        assert any(here.glob("*student*.safetensors")) and (here / "stats.jsonl").stat().st_size > 0


# ----------------------------------------------------------------------------------------------------------------------
# Pieces that people copy run on their own, with torch alone.

def lifted(file, *names, **given):
    """The named definitions of a file, executed where nothing but torch and three standard modules is known."""
    space = {"torch": torch, "nn": nn, "F": F, "math": math, "itertools": itertools, "dataclass": dataclass,
             "__name__": "lifted", **given}
    for node in ast.parse((HERE / file).read_text()).body:
        if (ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", None)) in names:
            exec(compile(ast.Module([node], []), file, "exec"), space)
    return SimpleNamespace(**space)


FLOW = "per_frame", "add_noise", "to_x0", "shift_sigma", "with_first"


def test_pieces_of_the_model_run_from_their_own_source():
    own = lifted("motionstream.py", "KVCache", "RMSNorm", "apply_rope", "attend", "SelfAttention")
    theirs, ours = SelfAttention(40, 2, 1e-6), own.SelfAttention(40, 2, 1e-6)
    ours.load_state_dict(randomised(theirs).state_dict())
    caches, rope = (KVCache(1, 1), own.KVCache(1, 1)), rope_table(3, 2, 3, 20, "cpu")
    for i in range(5):
        x = rand(2, 6, 40, seed=i)
        a, b = (m(x, rope[:6 * min(i + 1, 3)], cache, write=True) for m, cache in zip((theirs, ours), caches))
        assert a.equal(b)

    head = lifted("motionstream.py", "sinusoid", "TrackHead").TrackHead(8, 5, 8)
    assert randomised(head)(*new_tracks(9, 7), 32, 48).equal(randomised(TrackHead(8, 5, 8))(*new_tracks(9, 7), 32, 48))

    model, (noise, given, first) = new_model(), clip_of(8)
    own = lifted("motionstream.py", *FLOW, "by_chunk", "rollout")
    both = [list(f(model, noise, given, first, generator=seeded())) for f in (rollout, own.rollout)]
    assert all(a.equal(b) for a, b in zip(*both, strict=True))


def test_dmd_loss_and_the_vae_run_from_their_own_source():
    model, (x0, given, first) = new_model(), clip_of(3)
    needs = vars(lifted("motionstream.py", *FLOW, "joint_guidance", "guided_velocity"))
    own = lifted("train_distill.py", "score_sigma", "dmd_loss", **needs)
    values = []
    for loss in td.dmd_loss, own.dmd_loss:
        torch.manual_seed(0)
        values.append(loss(x0, model, new_model(1), given, first, (3.0, 1.5), 5.0))
    assert values[0].equal(values[1]) and values[0] > 0

    own = lifted("vae.py", "FRAMES", "TinyVAEConfig", "TINY", "conv", "MemBlock", "Repack",
                 "build_encoder", "build_decoder", "run", "TinyVAE")
    vae = randomised(own.TinyVAE(own.TinyVAEConfig(**vars(SMALL_VAE))))
    z = vae.encode(rand(1, 3, 9, 16, 16))
    assert z.equal(new_vae().encode(rand(1, 3, 9, 16, 16))) and vae.decode(z)[0].equal(new_vae().decode(z)[0])
    assert own.TinyVAE(own.TINY).stride == 8


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: what a user types.

def sampled(*argv):
    """Exit code, stdout and stderr of sample.py, run in this process."""
    with quiet() as (out, err):
        code = sample.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


@functools.cache
def workplace():
    """A folder with small random models, an image and tracks, kept until the process ends."""
    here = tempfile.TemporaryDirectory()
    path = Path(here.name)
    saved(path / "student.safetensors", new_model(), dtype=torch.float16)
    saved(path / "teacher.safetensors", new_model(causal=False, steps=2), dtype=torch.float16)
    saved(path / "vae.safetensors", new_vae(), dtype=torch.float16)
    Image.fromarray((rand(40, 48, 3).numpy() * 60 + 128).clip(0, 255).astype(np.uint8)).save(path / "image.png")
    t = np.linspace(0, 1, 14)[:, None]
    np.save(path / "tracks.npy", np.stack([8 + 30 * t + [0, 3, 6], 20 + 10 * t + [0, 2, 4]], -1).astype(np.float32))
    return here, path


def command(*more):
    """The flags of a good call, then more."""
    good = {"image": "image.png", "tracks": "tracks.npy", "weights": "student.safetensors", "vae": "vae.safetensors",
            "out": "out.mp4"}
    return [word for flag, name in good.items() for word in (f"--{flag}", workplace()[1] / name)] + list(more)


def test_sample_writes_a_video_of_the_tracks_length():
    _, here = workplace()
    rich = "--frames 20 --overlay --sink 0 --window 99 --chunk 2 --steps 1 --prompt fading"
    teacher = f"--sampler teacher --weights {here / 'teacher.safetensors'} --w-text 2"
    np.savez(here / "ids.npz", tracks=np.load(here / "tracks.npy"), ids=np.arange(3))
    for flags, frames in ("", 14), ("--frames 1", 1), (rich, 20), (teacher, 14), (f"--tracks {here / 'ids.npz'}", 14):
        code, out, err = sampled(*command(*flags.split()))
        assert code == 0 and out.splitlines()[-1] == str(here / "out.mp4"), (flags, out, err)
        video = imageio.mimread(here / "out.mp4", memtest=False)
        assert len(video) == frames and min(video[0].shape[:2]) >= 256, (len(video), video[0].shape)
        assert ("ids are not used" in out) == ("ids" in flags)  # as SMALL takes them from the start points
        (here / "out.mp4").unlink()
    assert not list(here.glob(".*")), "temporary files are left"


def test_sampled_frames_depend_on_seed_tracks_and_memory_and_on_nothing_else():
    _, here = workplace()
    vae, motion = TinyVAE.from_pretrained(here / "vae.safetensors"), sample.Motion(*new_tracks(41, 3, batch=1))
    moved = motion._replace(tracks=motion.tracks + (torch.arange(41) > 8)[:, None, None] * 8.0)

    def frames(motion=motion, seed=0, **memory):
        model = MotionStream.from_pretrained(here / "student.safetensors", dtype=torch.float32, **memory)
        latents = sample.stream(model, rand(1, 4, 1, 4, 6), motion, seed=seed)
        return np.stack(list(itertools.islice(sample.decode_frames(vae, latents), 41)))

    base = frames()
    assert base.shape == (41, 32, 48, 3) and (frames() == base).all()
    assert (frames(moved)[:9] == base[:9]).all() and (frames(moved)[9:21] != base[9:21]).any()
    assert (frames(seed=1) != base).any() and (frames(sink=0) != base).any() and (frames(window=None) != base).any()


def test_the_stream_hands_the_track_head_the_whole_motion():
    model, motion, first = new_model(), sample.Motion(*new_tracks(28, 5)), clip_of(3)[2]
    parts = [part["tracks"] for part in itertools.islice(sample.conditions(model, first, motion, None), 3)]
    rest = 33 - 28                                              # 3 chunks of 3 latents are 33 frames
    tracks, visible = F.pad(motion.tracks, (0, 0, 0, 0, 0, rest)), F.pad(motion.visible, (0, 0, 0, rest))
    assert_near(torch.cat(parts, 2), track_features(model, tracks, visible, motion.ids), 1e-6)


def test_the_image_enters_as_clean_latent_frame_0_or_as_channels():
    first, motion = clip_of(3)[2][:1], sample.Motion(*new_tracks(21, 3, batch=1))
    for in_dim, as_channels in (12, False), (16, True):         # 4 noisy, 8 tracks, 4 image
        for sampler in "stream", "teacher":
            model, seen = new_model(in_dim=in_dim, guidance=(0, 0)), []
            model.register_forward_hook(lambda _, args, given, out: seen.append((*args, given.get("image"))),
                                        with_kwargs=True)
            chunks = (sample.stream(model, first, motion) if sampler == "stream" else
                      sample.sample_teacher(model, first, motion, 21))
            assert [part.shape[2] for part in itertools.islice(chunks, 2)] == [3, 3]
            x, sigma, image = seen[0]
            assert x[:, :, :1].equal(first) != as_channels and sigma[0, 0] == (1 if as_channels else 0)
            assert (image is not None) == as_channels
            assert image is None or image[:, :, :1].equal(first) and image[:, :, 1:].count_nonzero() == 0
            assert seen[-1][-1] is None or sampler == "teacher"  # later chunks have it in their sink


def test_the_image_and_its_tracks_are_cropped_alike():
    c, axes = replace(SMALL, size=(64, 96)), (torch.arange(96) + 0.5, (torch.arange(64) + 0.5)[:, None])
    for width, height in (200, 100), (100, 200), (30, 31), (96, 64):
        spot, corner = (width * 0.58, height * 0.42), (1, 1)
        y, x = np.mgrid[:height, :width] + 0.5
        pixels = 255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (width / 20) ** 2)
        weight = sample.fit_image(Image.fromarray(pixels.astype(np.uint8)).convert("RGB"), c.size)[0, :1] + 1
        with quiet():
            tracks = np.tile(np.float32([spot, corner]), (5, 1, 1))
            motion = sample.fit_tracks((tracks, np.ones((5, 2), bool), None), (width, height), 5, c, 0)
        found = torch.stack([(weight * axis).sum() / weight.sum() for axis in axes])
        assert (found - motion.tracks[0, 0, 0]).norm() < 0.7, (width, height, found, motion.tracks[0, 0, 0])
        assert motion.visible[0, 0].tolist() == [True, (width, height) == (96, 64)]       # else the corner is cut off


def test_ids_of_a_file_are_used_unless_start_points_are_the_ids():
    arrays = np.tile(np.float32([[9, 8], [24, 16]]), (5, 1, 1)), np.ones((5, 2), bool)
    for tracks, expected in ("random", [7, 3]), ("start", [(8 << 16) + 9, (16 << 16) + 24]):
        with quiet() as (out, _):
            motion = sample.fit_tracks((*arrays, np.array([7, 3])), (48, 32), 5, replace(SMALL, tracks=tracks), 0)
        assert motion.ids.tolist() == [expected] and ("not used" in out.getvalue()) == (tracks == "start")


def test_guidance_flags_reach_the_teacher():
    _, here = workplace()
    videos = []
    for flags in "", "--w-text 1 --w-motion 1.5", "--w-text 9", "--w-motion 9":            # the first two are the same
        teacher = "--sampler", "teacher", "--weights", here / "teacher.safetensors"
        assert sampled(*command(*teacher, *flags.split()))[0] == 0
        videos.append(np.stack(imageio.mimread(here / "out.mp4", memtest=False)))
        (here / "out.mp4").unlink()
    assert [np.array_equal(videos[0], video) for video in videos] == [True, True, False, False]


def test_images_of_every_mode_come_out_right():
    rgb, turned = np.zeros((20, 30, 3), np.uint8), Image.Exif()
    rgb[:, :15], rgb[:, 15:], turned[0x0112] = (200, 40, 80), (0, 250, 10), 6              # 6: turn it clockwise
    grey, clear = np.full((20, 30), 51, np.uint8), np.dstack([rgb, rgb[..., 0] * 0])
    with folder() as here:
        for name, image, exif, expected in (
                ("rgb", Image.fromarray(rgb), None, rgb), ("palette", Image.fromarray(rgb).quantize(4), None, rgb),
                ("grey", Image.fromarray(grey), None, rgb * 0 + 51),
                ("alpha", Image.fromarray(clear), None, rgb * 0 + 255),
                ("16 bits", Image.fromarray(grey.astype(np.uint16) * 257), None, rgb * 0 + 51),
                ("EXIF", Image.fromarray(rgb), turned, np.rot90(rgb, -1))):
            image.save(here / f"{name}.png", exif=exif)
            read = sample.load_image(here / f"{name}.png")
            assert read.mode == "RGB" and np.array_equal(np.asarray(read), expected), name


def bad_inputs(here):
    """Name -> flags that must be refused. Files are written here."""
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
    student, vae, png = ((here / name).read_bytes() for name in ("student.safetensors", "vae.safetensors", "image.png"))
    whole = npz("whole.npz", tracks=good, visibility=seen)[1].read_bytes()
    cases = {
        "no image": ("--image", here / "none.png"),
        "a folder as image": ("--image", here),
        "text as image": raw("--image", "text.png", b"hello"),
        "half an image": raw("--image", "half.png", png[:len(png) // 2]),
        "no tracks file": ("--tracks", here / "none.npy"),
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
        "more frames than tracks": ("--frames", 3, "--visibility", here / "none.npy"),
        "frames and tracks swapped": (*npy("six.npy", np.tile(good[:, :1], (1, 6, 1))), "--frames", 6),
        "shares that are pixels": npz("points.npz", track_points=good),
        "two kinds of tracks": npz("two.npz", tracks=good, pred_tracks=good),
        "two visibilities": npz("seen.npz", tracks=good, visibility=seen, occluded=~seen),
        "visibility twice": (*npz("twice.npz", tracks=good, visibility=seen), *raw("--visibility", "v.npy", b"")),
        "a size of its own": (*npz("sized.npz", tracks=good, width=48, height=32), "--tracks-size", "32x48"),
        "ATI's in tenths": npz("array.npz", array=np.full((3, 14, 1, 3), 10.0)),
        "a pickle": raw("--tracks", "a.pkl", pickle.dumps({"points": [1, 2]})),
        "weights as tracks": ("--tracks", here / "student.safetensors"),
        "uneven JSON": raw("--tracks", "uneven.json", b"[[[1, 2], [3]]]"),
        "deep JSON": raw("--tracks", "deep.json", b"[" * 99999),
        "words in JSON": raw("--tracks", "words.json", b'[{"x": "a", "y": "b"}]'),
        "depth of another shape": ("--depth", npy("depth.npy", np.ones((9, 9)))[1], "--camera", "in"),
        "no weights": ("--weights", here / "none.safetensors"),
        "half the weights": raw("--weights", "half.safetensors", student[:-64]),
        "weights with a hole": ("--weights", saved(here / "less.safetensors", new_model(), lambda t: t.popitem())),
        "the vae as weights": ("--weights", here / "vae.safetensors"),
        "the teacher as student": ("--weights", here / "teacher.safetensors", "--sampler", "stream"),
        "the weights as vae": ("--vae", here / "student.safetensors"),
        "half the vae": raw("--vae", "cut.safetensors", vae[:-64]),
        "no folder": ("--out", here / "no" / "out.mp4"),
        "a folder as output": ("--out", here),
        "over the input": ("--out", here / "image.png"),
    }
    flags = ("--frames 0", "--frames 1.5", "--seed -1", "--steps 0", "--chunk 0", "--window -1", "--fps inf",
             "--w-text 1", "--dtype float8", "--device abacus", "--sampler magic", "--out out.avi", "--colour red",
             "--drag 1,2", "--interactive --out x.png", "--camera in", "--focal 9", "--tracks-units km",
             "--tracks-size 3", "--save-tracks out.txt", "--port 9")
    return cases | {flag: flag.split() for flag in flags}


def test_bad_input_ends_in_one_line_and_exit_code_2():
    _, here = workplace()
    cases, wrong = bad_inputs(here), []
    before = sorted(here.iterdir())
    for name, flags in cases.items():
        code, _, err = sampled(*command(*flags))
        if code != 2 or not re.fullmatch(r"error: [^\n]+\n", err) or sorted(here.iterdir()) != before:
            wrong.append(f"{name}: code {code}, {err!r}, files {sorted(set(here.iterdir()) - set(before))}")
    assert len(cases) > 50 and not wrong, "\n".join(wrong)


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
                tracks, visible, ids, fps = sample.load_tracks(path, (48, 32))
            assert np.array_equal(visible, seen if tells else np.ones_like(seen)), name
            assert abs(tracks - xy)[visible].max() < 1e-5 and tracks.dtype == np.float32, name
            assert ids is None and fps == (24 if "ati" in name or "old" in name else None), name
            assert ("visibility is read from" in out.getvalue()) == (name in ("wan_tracks.npy", "plain.npy")), name
        assert len(written) == 21
        paths = [[{"x": 1, "y": 2}], [{"x": 3, "y": 4}, {"x": 5, "y": 6}]]
        (here / "short.json").write_text(json.dumps(paths))
        tracks, visible, *_ = sample.load_tracks(here / "short.json", (48, 32))
        assert visible.tolist() == [[True, True], [False, True]]
        assert tracks[visible].tolist() == [[1, 2], [3, 4], [5, 6]]
        for name, one in ("one.npy", xy[:, 0]), ("one.json", xy[:, 0].tolist()):
            np.save(here / name, one) if name == "one.npy" else (here / name).write_text(json.dumps(one))
            assert np.array_equal(sample.load_tracks(here / name, (48, 32))[0], xy[:, :1]), name


def test_what_a_file_of_tracks_does_not_tell_the_flags_do():
    x, t = np.arange(12) * 3.0 + 5, np.arange(7) * 1.5
    xy, turned = np.stack([x + t[:, None], 0 * x + t[:, None] + 3], -1), "--tracks-layout nt"
    with folder() as here:
        np.save(here / "turned.npy", xy.swapaxes(0, 1))
        np.save(here / "shares.npy", xy / (48, 32))
        np.savez(here / "video.npz", tracks=xy * (9, 6))
        np.save(here / "good.npy", xy)
        np.save(here / "hidden.npy", seen := rand(7, 12).numpy() > 0)
        np.save(here / "yx.npy", xy[..., ::-1] + (0, 9))
        np.save(here / "fast.npy", xy[:, :4] / 40 + (20 * t)[:, None, None] % 90)
        for name, refused, more in (("shares.npy", "pass --tracks-units 01", {"units": "01"}),
                                    ("video.npz", "pass --tracks-size WxH", {"own_size": (432, 192)})):
            assert_error(UserError, refused, sample.load_tracks, here / name, (48, 32))
            tracks, visible, *_ = sample.load_tracks(here / name, (48, 32), **more)
            assert visible.all() and abs(tracks - xy).max() < 1e-4, name
        assert np.array_equal(sample.load_tracks(here / "turned.npy", (48, 32), layout="nt")[0], xy.astype(np.float32))
        assert_error(UserError, turned, sample.load_tracks, here / "turned.npy", (48, 32), frames=7)
        assert_error(UserError, turned, sample.load_tracks, here / "fast.npy", (900, 900))
        assert sample.load_tracks(here / "fast.npy", (900, 900), layout="tn")[0].shape == (7, 4, 2)
        assert_error(UserError, "is the order y, x?", sample.load_tracks, here / "yx.npy", (48, 16))
        visible = sample.load_tracks(here / "good.npy", (48, 32), visibility=here / "hidden.npy")[1]
        assert np.array_equal(visible, seen)
        whole = rand(12, 7, 2).numpy() * 6 + (24, 16)
        for seen, refused in ("visibility", False), ("visibles", True), (None, True):  # by names
            np.savez(here / "jump.npz", tracks=whole, **{seen: np.ones((12, 7), bool)} if seen else {})
            if refused:
                assert_error(UserError, turned, sample.load_tracks, here / "jump.npz", (48, 32), frames=7)
            else:
                assert sample.load_tracks(here / "jump.npz", (48, 32), frames=7)[0].shape == (12, 7, 2)
        for certain in xy[..., ::-1], xy / 99, xy + 99:                 # what was written here is not doubted
            np.savez(here / "certain.npz", tracks=certain, format="motionstream")
            assert np.array_equal(sample.load_tracks(here / "certain.npz", (48, 32))[0], np.float32(certain))


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
                ("pass --tracks-units px", {"track_points": xy / 10}, {}),
                ("is for a picture of 48x32; drop --tracks-size", {"tracks": xy, "width": 48}, {"own_size": (9, 32)}),
                ("holds tracks, pred_tracks: which", {"tracks": xy, "pred_tracks": xy}, {}),
                ("holds tracks, visibility, visibles: which", {"tracks": xy, "visibility": seen, "visibles": seen}, {}),
                ("has no array named tracks, only: points", {"points": xy}, {})):
            np.savez(here / "x.npz", **arrays)
            assert_error(UserError, cure, sample.load_tracks, here / "x.npz", (48, 32), **more)
        for text in "[[[1, 2, 3], [4, 5, 6]]]", "[[[true, false]]]", "[[1, null]]":
            (here / "x.json").write_text(text)
            assert_error(UserError, "track 0 is no list of points", sample.load_tracks, here / "x.json", (48, 32))


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
                        sample.load_tracks(path, (48, 32))
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
            assert sample.load_tracks(here / "old.npy", (48, 32))[0].shape == (9, 3, 2) and not warned
    assert count > 200 and not problems, "\n".join(problems)


def test_tracks_as_used_are_written_and_give_the_same_video():
    _, here = workplace()
    saved(here / "random.safetensors", new_model(tracks="random"))
    flags = [word for word in command() if word not in ("--tracks", here / "tracks.npy")]
    np.save(here / "depth.npy", rand(40, 48).abs() + 1)
    kept = here / "kept.npz"
    before, videos = sorted(here.iterdir()), []

    def video(*more):
        code, out, err = sampled(*flags, *more)
        assert code == 0 and "nothing is specified" not in out, (more, out, err)
        frames = np.stack(imageio.mimread(here / "out.mp4", memtest=False))
        (here / "out.mp4").unlink()
        return frames
    for given, kinds in ((("--drag=30,20 -> -9,20", "--pin=1,1", "--frames", 10), ("student", "random")),
                         (("--tracks", here / "tracks.npy"), ("random",)),
                         (("--depth", here / "depth.npy", "--camera", "right:0.5", "--frames", 9), ("student",))):
        for weights in kinds:
            more = "--weights", here / f"{weights}.safetensors", "--seed", 3
            videos.append(first := video(*given, *more, "--save-tracks", kept))
            with np.load(kept) as arrays:
                assert {*arrays} == {"tracks", "visibility", "width", "height", "fps", "format"} | (
                    {"ids"} if weights == "random" else set())
                assert arrays["width"] == 48 and arrays["height"] == 40 and arrays["visibility"].dtype == bool
            assert np.array_equal(first, video("--tracks", kept, *more)), (given, weights)
            copy = kept.read_bytes()
            code, _, err = sampled(*flags, "--tracks", kept, "--save-tracks", kept)
            assert code == 2 and "is a file that is read" in err and kept.read_bytes() == copy
            kept.unlink()
    assert len(videos) == 4 and (videos[0][:9] != videos[3]).any() and sorted(here.iterdir()) == before
    for more, cure in ((("--save-tracks", kept), "--save-tracks needs"),
                       (("--tracks-size", "4x3"), "belong to --tracks"),
                       (("--interactive", "--depth", "d.npy", "--camera", "in"), "drop --overlay, --reference and the like, --tr"),
                       (("--depth", "d.npy", "--camera", "in", "--pin", "1,2"), "not allowed with argument --depth")):
        code, _, err = sampled(*flags, *more)
        assert code == 2 and cure in err, (more, err)


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
    stop = unittest.mock.Mock(side_effect=UserError("stop"))
    for weights, grid in (workplace()[1] / "student.safetensors", 8), (wan_workplace()[1] / "t2v.safetensors", 50):
        with unittest.mock.patch.object(sample, "read_tracks", stop):
            code, _, err = sampled("--image", workplace()[1] / "image.png", "--weights", weights, "--depth", "d.npy",
                                   "--camera", "in", "--out", workplace()[1] / "out.mp4")
        assert code == 2 and stop.call_args[0][2] == grid, err
    for text in "forward", "right:0", "right:-1", "right:nan", "right:1:2":
        assert_error(UserError, "is none of left", sample.parse_flags, ["--image", "x", "--camera", text])


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


def test_a_tracks_file_is_never_unpickled_and_never_unpacked_beyond_the_limit():
    with folder() as here:
        np.save(here / "code.npy", np.array([Payload(here / "made")], object))
        np.savez(here / "code.npz", tracks=np.array([Payload(here / "made")], object))
        torch.save(Payload(here / "made"), here / "code.pth")
        (here / "code.pkl").write_bytes(pickle.dumps(Payload(here / "made")))
        for name in "code.pth", "code.pkl":
            assert_error(sample.UserError, "is a pickle", sample.load_tracks, here / name, (48, 32))
        for name in "code.npy", "code.npz":
            assert_error(sample.UserError, "not numbers", sample.load_tracks, here / name, (48, 32))
        assert not (here / "made").exists()
        np.savez_compressed(here / "large.npz", tracks=np.zeros((999, 9, 2)))
        assert (here / "large.npz").stat().st_size < 9999
        with unittest.mock.patch("extras.arrays.LIMIT", 9999):
            assert_error(sample.UserError, "unpacks to", sample.load_tracks, here / "large.npz", (48, 32))
        for shape in (1_000_001, 1, 2), (9, 20_001, 2):
            np.save(here / "long.npy", np.zeros(shape, np.int8))
            found = f"{'has an array of' if shape[1] == 1 else 'tracks have shape'} {shape}, at most 1000000"
            assert_error(sample.UserError, found, sample.load_tracks, here / "long.npy", (48, 32))
        with unittest.mock.patch("extras.arrays.LIMIT_TEXT", 99):
            (here / "long.json").write_text("[" + "[1, 2], " * 99 + "[3, 4]]")
            assert_error(sample.UserError, "of others at most", sample.load_tracks, here / "long.json", (48, 32))
        uneven = [[[1, 2]] * 3000] + [[]] * 9000
        (here / "uneven.json").write_text(json.dumps(uneven))
        with unittest.mock.patch("extras.arrays.LIMIT", 2 ** 20):
            assert_error(sample.UserError, "has an array of (9001, 3000, 2)", sample.load_tracks, here / "uneven.json",
                         (48, 32))


def test_a_video_is_there_whole_or_not_at_all():
    frame = np.zeros((256, 256, 3), np.uint8)

    def fail(count, broken):
        with unittest.mock.patch("sample.count_frames", count), sample.video_file(here / "out.mp4", 16) as append:
            for _ in range(3):
                append(frame)
            assert not broken

    with folder() as here:
        damaged = "out.mp4: cannot be written after 3 frames (not all frames can be read back)"
        assert_error(sample.UserError, damaged, fail, lambda path: 2, False)
        assert_error(AssertionError, "", fail, lambda path: 3, True)
        assert not list(here.iterdir())
        fail(count_frames, False)
        assert [file.name for file in here.iterdir()] == ["out.mp4"] and count_frames(here / "out.mp4") == 3
        whole = (here / "out.mp4").read_bytes()
        for damaged in b"", b"no video", whole[:-40], whole[:400]:
            (here / "out.mp4").write_bytes(damaged)
            assert count_frames(here / "out.mp4") < 3, len(damaged)


def test_similarity_is_that_of_scikit_image():
    smooth = F.avg_pool2d(rand(2, 3, 40, 50), 5, 1, 2)
    other = (smooth + 0.1 * rand(2, 3, 40, 50, seed=1)).clamp(-1, 1)
    assert ssim(smooth, smooth).eq(1).all() and (ssim(smooth, other) < 0.9).all()
    grey = torch.zeros(1, 3, 11, 11)
    assert_near(ssim(grey, grey + 0.2), torch.tensor([(2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)]).double(), 1e-6)
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise unittest.SkipTest("SCIKIT-IMAGE IS NOT INSTALLED, similarity was only checked at known values") from None
    for a, b, ours in zip(smooth, other, ssim(smooth, other)):
        theirs = structural_similarity((a / 2 + 0.5).double().numpy(), (b / 2 + 0.5).double().numpy(), data_range=1,
                                       channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert abs(ours - theirs) < 1e-6, (ours, theirs)


def test_a_reference_is_compared_frame_by_frame_and_tracks_point_by_point():
    _, here = workplace()
    frames, c = [np.full((24, 32, 3), 60 * i, np.uint8) for i in range(4)], replace(SMALL, size=(24, 32))
    with sample.video_file(here / "reference.mp4", c.fps) as append:       # its middle is what the model's size shows
        for frame in frames[:3]:
            append(np.pad(frame + 8, ((0, 0), (6, 6), (0, 0)), constant_values=255))
    motion = sample.Motion(torch.full((1, 4, 3, 2), 9.0), torch.tensor([[[1, 1, 0]] * 4]).bool(), None)
    found = 2 * np.full((5, 3, 2), 9.0) + 2 * np.array([[3, 4], [0, 0], [900, 0]]), np.ones((5, 3), bool)
    found[0][0, 0], found[1][0, 0] = 0, False                           # the tracker did not see it
    with quiet() as (out, _):
        handed_on = list(compared(iter(frames), here / "reference.mp4", c, motion, found, 2))
    assert np.array_equal(handed_on, frames)
    numbers = dict(re.findall(r"([A-Z]+) ([\d.]+)", out.getvalue().rpartition(": ")[2]))
    assert f"3 frames of {here / 'reference.mp4'}: " in out.getvalue(), out.getvalue()
    assert out.getvalue().endswith("EPE 2.143 of 7 points\n"), out.getvalue()
    assert abs(float(numbers["PSNR"]) - 20 * math.log10(255 / 8)) < 1.5 and float(numbers["SSIM"]) > 0.5, numbers


def test_the_papers_measures_are_printed_by_the_command():
    _, here = workplace()
    video, found, tracks = here / "first.mp4", here / "found.npz", np.load(here / "tracks.npy")
    assert sampled(*command("--out", video))[0] == 0
    np.savez(found, tracks=8 * (tracks - [0, 4]) + [24, 32])        # the image is cropped to 48x32 and written larger
    code, out, err = sampled(*command("--reference", video, "--found", found))
    line = next(line for line in out.splitlines() if "PSNR" in line)
    assert code == 0 and line.endswith("EPE 5 of 42 points") and out.splitlines()[-1].endswith("out.mp4"), (out, err)
    _, other, _ = sampled(*command("--reference", video, "--seed", 1))
    psnr, other = (float(re.search("PSNR ([0-9.]+)", text)[1]) for text in (line, other))
    assert psnr > other + 2, (psnr, other)
    _, alone, _ = sampled(*command("--found", found))
    assert "EPE 5 of 42 points" in alone.splitlines() and "PSNR" not in alone
    np.savez(found, tracks=8 * (tracks[:, :2] - [0, 4]))
    (here / "out.mp4").unlink()
    for flags, cure in ((("--reference", video, "--found", found), "holds 2 tracks, 3 were given"),
                        (("--reference", here / "tracks.npy"), "tracks.npy: cannot be read as a video"),
                        (("--reference", here / "none.mp4"), "none.mp4: cannot be read as a video"),
                        (("--lpips", "alex"), "--lpips belongs to --reference")):
        code, _, err = sampled(*command(*flags))
        assert code == 2 and cure in err and err.count("\n") == 1 and not (here / "out.mp4").exists(), (flags, err)


def test_drags_and_pins_are_tracks_along_lines():
    paths = [drag_path(text) for text in ("10,20 -> 30,20 -> 30,10", " 5.5,7", "0,0->8,4")]
    tracks, visible, ids, fps = sample.follow(paths, 9)
    assert tracks.shape == (9, 3, 2) and visible.all() and visible.shape == (9, 3) and ids is fps is None
    assert tracks[:, 0].tolist() == [[10 + 5 * i, 20] for i in range(5)] + [[30, 20 - 2.5 * i] for i in range(1, 5)]
    assert (tracks[:, 1] == (5.5, 7)).all() and (tracks[:, 2, 0] == range(9)).all()
    assert sample.follow(paths, 1)[0][0].tolist() == [[10, 20], [5.5, 7], [0, 0]]
    for text in "10", "1,2 -> 3", "1,2,3", "a,b", "1,nan", "1,2 ->", "1,9e9":
        assert_error(sample.UserError, f"argument --drag/--pin: {text!r} is not x,y -> x,y", sample.parse_flags,
                     ["--image", "x", "--drag", text])
    _, here = workplace()
    with unittest.mock.patch.object(sample, "fit_tracks", wraps=sample.fit_tracks) as fit:
        flags = [word for word in command() if word not in ("--tracks", here / "tracks.npy")]
        code, out, _ = sampled(*flags, "--drag", "10,20 -> 30,20", "--pin", "5,7", "--frames", 9, "--out",
                               here / "out.png")
    assert code == 0 and [shape.shape for shape in fit.call_args[0][0][:2]] == [(9, 2, 2), (9, 2)], out
    (here / "out.png").unlink()
    for flag, start, path in (("--pin", "48,20", "48,20"), ("--drag", "-1,20", "-1,20 -> 9,9"),
                              ("--drag", "9,40.5", "9,40.5->9,9"), ("--pin", "480,300", "480,300")):
        code, _, err = sampled(*flags, "--pin", "5,7", f"{flag}={path}")            # one that starts inside, too
        assert code == 2 and err == f"error: {flag} {start}: outside the image, which has 48x40 pixels\n", err
        assert not (here / "out.mp4").exists()
    code, out, err = sampled(*flags, "--pin", "9,1", "--drag", "9,9 -> 99,9", "--frames", 9)     # 9,1 is cropped away
    assert code == 0 and "visible track points lie outside the video" in out, (out, err)
    (here / "out.mp4").unlink()


def test_a_grid_of_points_goes_where_one_would():
    here = workplace()[1]
    words = "--image", "x", "--drag", "20,16 -> 28,16", "--pin", "9,9", "--grid", "3x5", "--frames", "9"
    flags = sample.parse_flags(words)
    tracks, visible, *_ = read_tracks(flags, (48, 32), 8)
    assert tracks.shape == (9, 18, 2) and visible.all()
    assert {*map(tuple, tracks[0, :9].tolist())} == {(x, y) for x in (15, 20, 25) for y in (11, 16, 21)}
    assert np.array_equal(tracks[-1, :9], tracks[0, :9] + (8, 0)) and np.array_equal(tracks[-1, 9:], tracks[0, 9:])
    for grid in "0x5", "3", "3x0", "100x1", "axb":
        assert_error(sample.UserError, f"{grid!r} is not like 3x20", sample.parse_flags, ["--image", "x", "--grid", grid])
    code, _, err = sampled("--image", here / "image.png", "--tracks", here / "tracks.npy", "--grid", "3x5")
    assert code == 2 and err == "error: --grid belongs to --drag and --pin\n", err


def test_a_picture_keeps_the_last_frame():
    with folder() as here:
        with sample.picture_file(here / "x.png") as append:
            for value in 1, 2, 3:
                append(np.full((4, 6, 3), value, np.uint8))
        assert (np.asarray(Image.open(here / "x.png")) == 3).all() and len(list(here.iterdir())) == 1


def test_a_reader_that_has_gone_is_no_error():
    _, here = workplace()
    with folder() as mine:
        words = [sys.executable, HERE / "sample.py", *command("--out", mine / "x.mp4", "--frames", 9)]
        line = " ".join(shlex.quote(str(word)) for word in words)
        programs = []
        for unbuffered, lines in ("", 0), ("1", 1):
            programs.append(subprocess.Popen(
                ["bash", "-c", f"{line} | head -{lines}; echo ${{PIPESTATUS[0]}}"], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}))
        for program in programs:
            out, err = program.communicate()
            assert re.fullmatch(r"(student[^\n]+\n)?141\n", out) and not err, (out, err)


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: the page that paints tracks.

class Client:
    """Speaks to the page's program as the page does; what differs is given."""

    def __init__(self, address):
        self.host, self.token = re.fullmatch(r"http://([^/]+)/([^/]+)/\n", address).groups()
        self.open, self.seq, self.seen = http.client.HTTPConnection(self.host, timeout=10), 0, ""

    def ask(self, name, body=None, path=None, **headers):
        """Status, headers and body of an answer, on the open connection."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.open.request("GET" if body is None else "POST", path or f"/{self.token}/{name}", body, headers)
        answer = self.open.getresponse()
        return answer.status, answer.headers, answer.read()

    def control(self, points=(), **changes):
        """Post a control; points are (x, y) now, and at the start and when grabbed if that is elsewhere."""
        self.seq += 1
        state = {"seq": self.seq, "take": 0, "chunk": 3, "pause": False, "prompt": "",
                 "record": self.status()["record"], "points": [point * (6 // len(point)) for point in points]} | changes
        code, _, _ = self.ask("control", json.dumps(state), Content_Type="application/json")
        return code

    def status(self):
        return json.loads(self.ask("status")[2])

    def watch(self, frames=1):
        """See so many new frames: their numbers and what they obey."""
        numbers, until = [], time.monotonic() + 10
        while len(numbers) < frames:
            assert time.monotonic() < until, "no frames come"
            code, headers, _ = self.ask(f"frame/{self.seen}")
            assert code == 200, code
            if headers["Frame"] != self.seen:
                self.seen = headers["Frame"]
                numbers.append((int(self.seen), int(headers["Seq"])))
        return numbers


@contextlib.contextmanager
def served(*flags):
    """The program with the page, in a thread, and a client of it."""
    _, here = workplace()
    stop, good = [], ("--image", here / "image.png", "--weights", here / "student.safetensors", "--vae",
                      here / "vae.safetensors", "--interactive", "--port", "0", "--fps", "100")
    stoppable = unittest.mock.patch.object(extras.page, "hold_signals", lambda: contextlib.nullcontext(stop))
    with quiet() as (out, err), stoppable:
        thread = threading.Thread(target=sample.main, args=([str(word) for word in (*good, *flags)],))
        thread.start()
        try:
            while "http" not in out.getvalue():
                assert thread.is_alive(), err.getvalue()
                time.sleep(0.01)
            yield Client(out.getvalue().splitlines(True)[-1])
        finally:
            stop.append(signal.SIGINT)
            thread.join(10)
    assert not thread.is_alive() and not err.getvalue(), err.getvalue()


def test_the_page_answers_only_those_who_know_its_address_and_nothing_else():
    deep = b'{"points":' + b"[" * 30000 + b"]" * 30000 + b"}"
    row, png = [1.0] * 6, (workplace()[1] / "image.png").read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "png")

    def control(**changes):
        state = {"seq": 1, "take": 0, "chunk": 3, "pause": True, "record": False, "prompt": "", "points": [row]}
        return json.dumps(state | changes)

    typed = {"Content_Type": "application/json"}
    bad = [deep, b"", b"[]", b"{}", b"\xff", b"null", control(extra=1), control(seq="1"), control(seq=True),
           control(seq=-1), control(chunk=2), control(pause=1), control(record=0), control(record="x.mp4"),
           control(prompt="x" * 1001), control(points=[row[:5]]),
           control(points=[row, [1]]), control(points=[["x"] * 6]), control(points=[row] * 257),
           control(points=[[1e6] * 6]), control(points=[row[:5] + [math.nan]]), control(points=[row[:5] + [-math.inf]]),
           control(points=[row]).replace("1.0", "1e999"), control(points=[row]).replace("1.0", "1" * 5000),
           control(points=[[None] * 6]), control(points={"x": 1})]
    with served() as page:
        ours, token = page.host, page.token
        cases = [
            (200, {"name": ""}), (200, {"name": "status"}), (200, {"name": "frame/"}), (404, {"name": "favicon.ico"}),
            (403, {"name": "", "path": "/"}), (403, {"name": "", "path": f"/{token[:-1]}/"}),
            (403, {"name": "", "path": f"/{token}x/status"}),
            (404, {"name": "../../../etc/passwd"}), (404, {"name": "%2e%2e/sample.py"}), (404, {"name": "control"}),
            (421, {"name": "status", "Host": "evil.example"}), (421, {"name": "status", "Host": ours + ".evil"}),
            (403, {"name": "status", "Origin": "http://evil.example"}), (403, {"name": "status", "Origin": "null"}),
            (200, {"name": "status", "Origin": f"http://{ours}"}), (404, {"name": "status", "body": "{}"} | typed),
            (415, {"name": "control", "body": control(), "Content_Type": "text/plain"}),
            (415, {"name": "control", "body": control()}),
            (413, {"name": "control", "body": b"{}", "Content_Length": "65537"} | typed),
            (413, {"name": "control", "body": b"x", "Content_Length": "9" * 5000, "Content_Type": "image/png"}),
            (400, {"name": "control", "body": b"", "Content_Length": "0" * 9 + "9" * 9} | typed),
            (400, {"name": "control", "body": b"", "Content_Length": "0" * 5000} | typed),
            (411, {"name": "control", "body": iter([b"{}"]), "Transfer_Encoding": "chunked"} | typed),
            (411, {"name": "control", "body": b"", "Content_Length": "-1"} | typed),
            (400, {"name": "control", "body": b"GIF89a", "Content_Type": "image/png"}),
            (400, {"name": "control", "body": png[:50], "Content_Type": "image/png"}),
            (413, {"name": "control", "body": bomb.getvalue(), "Content_Type": "image/png"}),
            (200, {"name": "control", "body": png, "Content_Type": "image/png"}),
            *((400, {"name": "control", "body": body} | typed) for body in bad),
            (403, {"name": "control", "body": control(), "Origin": "http://evil.example"} | typed),
            (200, {"name": "control", "body": control(), "Origin": f"http://{ours}"} | typed)]
        for code, request in cases:
            found, headers, body = page.ask(**request)
            assert found == code, f"{found} instead of {code}: {str(request)[:200]}"
            if code == 200:
                assert "default-src 'none'" in headers["Content-Security-Policy"]
                assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
        html = page.ask("")[2].decode()
        assert "http" not in html.replace("http-equiv", "") and not re.search(r"\son\w+=|style=", html)
        assert page.status()["seq"] == 1 and page.status()["points"] == [row]          # as the last one said, unharmed


def test_a_page_for_all_addresses_answers_to_this_machines_own_and_to_no_other():
    name = socket.gethostname().lower()
    with served("--host", "0.0.0.0") as page:
        port = page.host.rpartition(":")[2]
        page.open = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=10)
        for host, code in (("127.0.0.1", 200), ("localhost", 200), (name, 200), ("0.0.0.0", 200), ("evil.example", 421),
                           (f"{name}.evil.example", 421), ("127.0.0.2", 421), ("", 421)):
            assert page.ask("status", Host=f"{host}:{port}")[0] == code, host
            assert page.ask("status", Host=host)[0] == 421, host            # a port that browsers do not leave out
        assert page.ask("status", Host=f"127.0.0.1:{port}", Origin=f"http://{name}:{port}")[0] == 403
        page.open = http.client.HTTPConnection(f"127.0.0.2:{port}", timeout=10)         # another of its addresses
        assert page.ask("status", Host=f"127.0.0.2:{port}")[0] == 200
    with served() as page:
        port = page.host.rpartition(":")[2]
        for host, code in ("127.0.0.1", 200), ("localhost", 200), (name, 421), ("0.0.0.0", 421), ("127.0.0.2", 421):
            assert page.ask("status", Host=f"{host}:{port}")[0] == code, host
    assert named(["a", "b"], 80) == ["a:80", "b:80", "a", "b"] and named(["a"], 8765) == ["a:8765"]


def test_the_newest_control_wins_and_its_number_comes_with_the_frames():
    with served() as page:
        assert page.control([(9, 8)]) == 200 and page.watch(2)[-1][1] in (0, 1)
        page.seq = 70
        assert page.control([(20, 8)]) == 200                   # 71
        page.seq = 6
        assert page.control([(1, 1)]) == 200 and page.status()["seq"] == 71 and page.status()["points"][0][0] == 20
        seen = page.watch(60)
        assert [number for number, _ in seen] == sorted({number for number, _ in seen})
        assert seen[-1][1] == 71 and [seq for _, seq in seen] == sorted(seq for _, seq in seen)
        page.seq = 80
        assert page.control([("20", "8")]) == 200 and page.status()["points"] == [[20.0, 8.0] * 3]     # as numbers
        page.watch(30)


def test_a_slow_page_skips_frames_and_delays_nobody():
    with served() as page:
        page.control()
        page.watch(5)
        slow = http.client.HTTPConnection(page.host)
        slow.request("GET", f"/{page.token}/frame/")            # and never reads the answer
        begun = time.monotonic()
        seen = page.watch(60)
        assert time.monotonic() - begun < 5 and seen[-1][0] - seen[0][0] < 80
        answer = slow.getresponse()
        assert answer.read() and int(answer.headers["Frame"]) < seen[0][0]
        slow.request("GET", f"/{page.token}/frame/{answer.headers['Frame']}")
        assert int(slow.getresponse().headers["Frame"]) >= seen[-1][0]


def test_a_crowd_of_viewers_or_connections_is_turned_away():
    with served() as page:
        last, watch = page.ask("frame/")[1]["Frame"], "GET /{}/frame/{} HTTP/1.1\r\nHost: {}\r\n\r\n"
        time.sleep(0.1)
        before, crowd = threading.active_count(), []
        for number in range(80):                    # half of them wait for a frame, which does not come: it is paused
            crowd.append(socket.create_connection(page.host.split(":")))
            if number % 2:
                crowd[-1].sendall(watch.format(page.token, last, page.host).encode())
            time.sleep(0.01)                        # else it queues for seconds, and the first time out
        time.sleep(0.2)
        gone = [one for one in select.select(crowd, [], [], 0)[0] if not one.recv(1)]       # they have been closed
        assert threading.active_count() <= 65 and 80 - 64 <= len(gone) < 60, (threading.active_count(), len(gone))
        assert page.status()["take"] == 0                           # who is there stays
        for connection in crowd:
            connection.close()
        until = time.monotonic() + 4                                # a viewer waits for a second
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.05)
        assert threading.active_count() <= before and page.status()["take"] == 0


def test_nothing_is_made_while_paused_or_while_nobody_watches():
    with served() as page:
        assert page.status()["pause"] and page.status()["frame"] < 2 and page.ask("frame/")[1]["Frame"] in "01"
        page.control()
        page.watch(30)
        page.control(pause=True)
        time.sleep(0.2)
        first = page.status()["frame"]
        time.sleep(0.3)
        assert page.status()["frame"] == first
        page.control()
        assert page.watch(20)[-1][0] >= first + 20              # not one was left out
        time.sleep(2.4)                                         # nobody watches any more
        first = page.status()["frame"]
        time.sleep(0.3)
        assert page.status()["frame"] == first


def test_points_reach_the_track_head_on_lines_that_end_where_they_are_now():
    calls = []

    def seen(model, tracks, visible, ids):
        calls.append((tracks[0].numpy(), visible.all().item(), ids[0].tolist()))
        return track_features(model, tracks, visible, ids)

    start, far = (9.0, 12.0), (30.0, 20.0)                      # in the image, 48x40; the video is its middle, 48x32
    with unittest.mock.patch.object(sample, "track_features", seen), served("--fps", "40") as page:
        page.control([start])
        page.watch(12)
        page.control([(*far, *start, *start), (24.0, 30.0, 2.5, 20.0, 20.0, 30.0)])
        page.watch(24)
    assert all(visible for _, visible, _ in calls) and [len(tracks) for tracks, _, _ in calls[:3]] == [9, 12, 12]
    assert np.allclose(calls[0][0], np.subtract(start, (0, 4)))
    moved = next(i for i, call in enumerate(calls) if call[0].shape[1] == 2)
    tracks, _, ids = calls[moved]
    weight = (np.arange(12) + 1)[:, None] / 12
    assert np.allclose(tracks[:, 0], start + weight * np.subtract(far, start) - (0, 4), atol=1e-4)
    assert np.allclose(tracks[:, 1], (20, 26) + weight * (4, 0), atol=1e-4)             # from where it was grabbed
    assert ids == [(8 << 16) + 9, (16 << 16) + 2]               # the pixels of frame 0
    assert np.allclose(calls[moved + 1][0], [np.subtract(far, (0, 4)), (24, 26)])       # and there they stay


def test_a_restart_with_another_chunk_is_not_lost_while_a_take_begins():
    real, lengths = extras.page.to_frames, []

    def slow(video):                                            # the first take begins; the page is quicker
        time.sleep(0.3)
        return real(video)

    def seen(model, tracks, visible, ids):
        lengths.append(tracks.shape[1])
        return track_features(model, tracks, visible, ids)

    head = unittest.mock.patch.object(sample, "track_features", seen)
    with unittest.mock.patch.object(extras.page, "to_frames", slow), head, served() as page:
        page.control(take=1, chunk=1)
        page.watch(8)
    assert lengths[:3] == [1, 4, 4], lengths


def frames_of(path):
    """All frames of a video, (T, H, W, 3)."""
    return np.stack(imageio.mimread(path, memtest=False))


@slow
def test_how_soon_a_drag_is_answered_and_that_memory_stays():
    """Shipped weights at 24 frames per second, two viewers that stall, 50 drags at random times for either chunk."""
    for chunk, most in (3, 2.0), (1, 1.0):
        flags = "--image", HERE / "assets/drag.png", "--interactive", "--port", "0", "--fps", "24"
        program = subprocess.Popen([sys.executable, HERE / "sample.py", *flags], stdout=subprocess.PIPE, text=True)
        try:
            page, rng = Client(next(line for line in program.stdout if line.startswith("http"))), seeded()
            answers, starts, sizes = [], [], []
            stalled = [http.client.HTTPConnection(page.host) for _ in range(2)]
            for viewer in stalled:
                viewer.request("GET", f"/{page.token}/frame/")
            page.control([(115, 256)], take=1, chunk=chunk)
            page.watch(48)
            for _ in range(50):
                point = (*(60 + 260 * torch.rand(2, generator=rng)).tolist(), 115, 256, 115, 256)
                page.control([point], take=1, chunk=chunk)
                begun = time.monotonic()
                while page.watch()[0][1] < page.seq:
                    pass
                answers.append(time.monotonic() - begun)
                starts.append(page.status()["latency"])
                page.watch(int(torch.randint(2, 36, (), generator=rng)))
                resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{program.pid}/status").read_text())
                sizes.append(int(resident[1]) / 1e3)
        finally:
            program.kill()
            program.stdout.close()
        for what, times in ("drag to its first frame", answers), ("chunk's start to its first picture", starts):
            print(f"chunk {chunk}, {what}: median {np.median(times):.3f} s, worst {max(times):.3f} s")
        print(f"memory {sizes[0]:.0f} to {sizes[-1]:.0f} MB")
        assert max(answers) < most and sizes[-1] < sizes[5] + 40


def test_ctrl_c_ends_within_two_seconds_and_the_recording_is_whole():
    seconds = []
    while not seconds or seconds[-1] >= 2 and len(seconds) < 3:         # beside other jobs it may take longer
        seconds.append(interrupted())
    assert seconds[-1] < 2, seconds


def interrupted():
    """Seconds from Ctrl-C to the end of the program."""
    with folder() as here:
        flags = "--image", HERE / "assets/drag.png", "--interactive", "--port", "0", "--out", here / "out.mp4"
        program = subprocess.Popen([sys.executable, HERE / "sample.py", *flags], stdout=subprocess.PIPE, text=True)
        try:
            page = Client(next(line for line in program.stdout if line.startswith("http")))
            page.control([(115, 256)])
            page.watch(20)
            begun = time.monotonic()
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 0
            took = time.monotonic() - begun
        finally:
            program.kill()
            program.stdout.close()
        assert int(page.seen) - 1 <= len(frames_of(here / "out.mp4"))      # 1 is the image
        return took


def appearing(path, seconds=10):
    """The frames of a video that is soon whole."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name} after {seconds} s"
        time.sleep(0.02)
    return frames_of(path)


def recorded(page, on, frames, **changes):
    """Record or not from now on, while so many frames are seen: the status in the end."""
    page.control([(9, 8)], record=on, **changes)
    page.watch(frames)
    return page.status()


def until_recorded(page, name, **changes):
    """Record until the page says that half a second is in the file called `name`."""
    for _ in range(50):
        said = recorded(page, True, 4, **changes)["recorded"]
        if said.startswith(f"{name}.mp4, ") and float(said.split()[1]) >= 0.5:
            return
    raise AssertionError(said)


def test_the_page_records_what_is_seen_when_it_asks_into_files_that_are_not_there():
    with folder() as mine, unittest.mock.patch.object(extras.page, "RECORDING", mine / "recording.mp4"):
        (mine / "recording.mp4").write_text("mine")
        (mine / "recording-3.mp4").write_text("mine, too")
        with served("--seed", "3") as page:
            before = recorded(page, False, 30)
            assert not before["record"] and before["recorded"] == "" and len(list(mine.iterdir())) == 2
            begun = int(page.seen)
            status = recorded(page, True, 40)
            assert status["record"] and re.fullmatch(r"recording-2\.mp4, 0\.[2-9] s", status["recorded"]), status
            assert not (mine / "recording-2.mp4").exists()
            page.control([(9, 8)], record=False, pause=True)    # it ends in a pause as well
            assert 40 <= len(appearing(mine / "recording-2.mp4")) <= int(page.status()["frame"]) - begun + 14
            until_recorded(page, "recording-4", take=1)         # another take, recorded from its image on
            until_recorded(page, "recording-5", take=2)         # and another one
            status = recorded(page, False, 30, take=2)
            assert status["recorded"].startswith("recording-5.mp4, ") and not status["record"], status
            until_recorded(page, "recording-6", take=2)         # recorded when the program ends
        names = {file.name for file in mine.iterdir()}
        assert names == {f"recording{i}.mp4" for i in ("", "-2", "-3", "-4", "-5", "-6")}, names
        assert [(mine / f"recording{i}.mp4").read_text() for i in ("", "-3")] == ["mine", "mine, too"]
        assert len(frames_of(mine / "recording-4.mp4")) >= 9 and len(frames_of(mine / "recording-5.mp4")) >= 9
        assert len(frames_of(mine / "recording-6.mp4")) >= 9


def test_a_recording_begun_later_is_a_whole_video_beside_the_first():
    with folder() as mine:
        with served("--out", mine / "x.mp4") as page:
            assert recorded(page, True, 30)["record"] and not recorded(page, False, 20)["record"]
            recorded(page, True, 20)
        assert {file.name for file in mine.iterdir()} == {"x.mp4", "x-2.mp4"}
        one, two = (frames_of(mine / f"{name}.mp4") for name in ("x", "x-2"))
        assert 28 <= len(one) < 90 and 19 <= len(two) < 90, (len(one), len(two))


def test_a_recording_has_each_frame_seen_while_it_is_on_and_keeps_nothing_else():
    seen = deque()
    with folder() as mine, quiet():
        (mine / "x.mp4").write_text("of an earlier take, which a recording begun in mid-take is not to replace")
        live = SimpleNamespace(queues=((), seen), status={"fps": 10, "recorded": ""}, out=mine / "x.mp4")
        with recorder(live, mine / "x.mp4") as record:
            for i in range(50):
                seen.append(np.full((64, 64, 3), 5 * i, np.uint8))
                record(i in range(20, 30) or i > 44)
                assert not seen
            with unittest.mock.patch.object(os, "access", lambda *_: False):
                record(False), seen.append(np.zeros((64, 64, 3), np.uint8)), record(True)
                assert not seen and "not writable" in live.status["recorded"]
        assert (mine / "x.mp4").read_text().startswith("of an earlier")
        for name, numbers in ("x-2", range(20, 31)), ("x-3", range(45, 50)):       # 30: before it was turned off
            frames = frames_of(mine / f"{name}.mp4")
            assert frames.shape[1:] == (256, 256, 3)
            assert_near(torch.from_numpy(frames).float().mean((1, 2, 3)), 5.0 * torch.tensor([*numbers]), 0.02)


class Browser:
    """A headless Chromium, spoken to through a pipe (its DevTools protocol)."""

    def __init__(self, here, program, width):
        (ours, theirs), (answers, write) = os.pipe(), os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={here}")
        line = f'exec "$0" "$@" 3<&{ours} 4>&{write}'           # it reads from 3 and writes to 4
        self.process = subprocess.Popen(["bash", "-c", line, program, *flags, "about:blank"], pass_fds=(ours, write),
                                        stderr=subprocess.DEVNULL)
        os.close(ours), os.close(write)
        self.out, self.into, self.count, self.rest, self.session = theirs, answers, 0, b"", {}
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self("Emulation.setDeviceMetricsOverride", width=width, height=860, deviceScaleFactor=1, mobile=width < 600)

    def __call__(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.into, 2 ** 20)
            message, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(message)
            if message.get("id") == self.count:
                return message["result"]

    def run(self, script):
        answer = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, seconds=10):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def drag(self, begin, end, steps=12):
        """With the mouse, between two places that are fractions of the picture."""
        left, top, width, height = self.run("(b => [b.x, b.y, b.width, b.height])(marks.getBoundingClientRect())")
        way = np.linspace(begin, end, steps) * (width, height) + (left, top)
        for kind, (x, y) in [("Pressed", way[0]), *(("Moved", at) for at in way), ("Released", way[-1])]:
            self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)
            time.sleep(0.05)


LIME = """(() => { const [c, p] = [document.getElementById('video'), document.getElementById('video').getContext('2d')];
  const d = p.getImageData(0, 0, c.width, c.height).data; let [n, x, y] = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) if (d[i + 1] > 140 && d[i + 2] < 90) {
    n++; x += i / 4 % c.width / c.width; y += Math.floor(i / 4 / c.width) / c.height; }
  return [n, x / n, y / n]; })()"""     # how much lime there is in the picture, and where


HUE = """(target => { const c = document.getElementById('video'), p = c.getContext('2d');
  const d = p.getImageData(0, 0, c.width, c.height).data, chroma = v => v.map(a => a - (v[0] + v[1] + v[2]) / 3);
  const hue = chroma(target), norm = v => Math.hypot(...v); let [n, x, y] = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) {
    const v = chroma([d[i], d[i + 1], d[i + 2]].map(a => a / 255)), near = hue.reduce((sum, a, k) => sum + a * v[k], 0);
    const w = near > 0.8 * norm(v) * norm(hue) ? Math.max(norm(v) - 0.15, 0) : 0;
    n += w; x += w * (i / 4 % c.width) / c.width; y += w * Math.floor(i / 4 / c.width) / c.height; }
  return [n, x / n, y / n]; })"""       # how much of a colour's hue there is in the picture, and where


@contextlib.contextmanager
def browsing(page, width=1280):
    program = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if program is None:
        raise unittest.SkipTest("NO BROWSER: the page was not tried; apt-get install chromium-headless-shell")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as here:
        browser = Browser(here, program, width)
        try:
            browser("Page.navigate", url=f"http://{page.host}/{page.token}/")
            browser.until("typeof view === 'object' && view !== null && seen !== ''")
            yield browser
        finally:
            browser.process.kill()
            browser.process.wait()


def test_in_a_browser_one_object_goes_its_way_while_another_is_pinned():
    scene = world.new_scenes(1, 1, seeded(3), objects=2, camera=False, attributes=(0, 0), flat=True, style="simple")
    scene["position"][0, :2, 0], scene["radius"][:] = torch.tensor([[0.3, 0.35], [0.7, 0.7]]), 0.13
    red, blue = colours = [colour.tolist() for colour in scene["colour"][0, :2]]
    with folder() as here:
        Image.fromarray(sample.to_frames(world.render(scene, 384))[0]).save(here / "two.png")
        flags = ("--image", here / "two.png", "--weights", HERE / "assets/tiny.safetensors",
                 "--vae", HERE / "assets/tiny_vae.safetensors", "--fps", "24")
        with served(*flags) as page, browsing(page) as browser:
            def where(colour):
                return browser.run(f"{HUE}({colour})")

            begin = [where(colour) for colour in colours]
            assert math.dist(begin[0][1:], (0.3, 0.35)) < 0.04 and math.dist(begin[1][1:], (0.7, 0.7)) < 0.04, begin
            browser.run("actions.pin()")
            browser.drag((0.7, 0.7), (0.7, 0.7), 2)
            browser.run("actions.drag()")
            browser.drag((0.3, 0.35), (0.6, 0.35))                  # 30 % to the right
            time.sleep(2)
            moved, stayed = where(red), where(blue)
            assert math.dist(moved[1:], (0.6, 0.35)) < 0.1 and moved[0] > begin[0][0] / 3, (begin, moved)
            assert math.dist(stayed[1:], (0.7, 0.7)) < 0.06 and stayed[0] > begin[1][0] / 3, (begin, stayed)
            assert sorted(group["kind"] for group in browser.run("groups")) == ["drag", "pin"]
            browser.run("actions.clear(), actions.pin()")
            browser.drag((0.7, 0.7), (0.7, 0.7), 2)
            browser.run("actions.path()")
            browser.drag((0.6, 0.35), (0.25, 0.35))                 # drawn now, gone along when it is played
            time.sleep(1)
            assert math.dist(where(red)[1:], moved[1:]) < 0.1
            browser.run("actions.play()")
            time.sleep(3)
            moved, stayed = where(red), where(blue)
            assert math.dist(moved[1:], (0.25, 0.35)) < 0.1 and moved[0] > begin[0][0] / 3, moved
            assert math.dist(stayed[1:], (0.7, 0.7)) < 0.06, stayed


def test_in_a_browser_a_dragged_object_moves_again_and_again():
    flags = ("--image", HERE / "assets/drag.png", "--weights", HERE / "assets/tiny.safetensors",
             "--vae", HERE / "assets/tiny_vae.safetensors", "--fps", "24")
    with served(*flags) as page, browsing(page) as browser:
        mass, x, y = browser.run(LIME)
        assert abs(x - 0.3) < 0.05 and abs(y - 0.667) < 0.05, (x, y)
        for goal in (0.6, 0.55), (0.35, 0.35):                  # the second one takes hold of what has moved
            begin = browser.run("groups.length ? groups[0].points[0].p : [0.3, 0.667]")
            browser.drag(begin, goal)
            time.sleep(2)
            now, x, y = browser.run(LIME)
            assert math.dist((x, y), goal) < 0.12 and now > mass / 3, (goal, x, y, now, mass)
        browser.run("actions.pause()")
        browser.until("!dirty && !sending")
        time.sleep(0.3)
        first = page.status()
        assert first["pause"] and len(first["points"]) == 1
        browser.run("$('prompt').value = 'fading light', $('prompt').onchange({target: $('prompt')}), actions.pause()")
        browser.until(f"+seen > {first['frame'] + 12}")
        assert page.status()["prompt"] == "fading light"
        browser.run("actions.camera(), moveCamera(0.1, 0)")
        browser.until("!dirty && !sending")
        assert 40 < len(page.status()["points"]) <= 65
        browser("Page.reload")
        browser.until("typeof view === 'object' && view !== null && groups.length === 1")
        with browsing(page, 390) as other:                      # a second one, on a phone
            assert other.run("document.documentElement.scrollWidth") == 390
            other.run("actions.restart()")
            other.until("!dirty && !sending")
            assert page.status()["take"] == 1


def test_in_a_browser_a_button_and_a_key_record_and_the_page_says_into_what():
    with folder() as mine, unittest.mock.patch.object(extras.page, "RECORDING", mine / "recording.mp4"), served() as page, \
            browsing(page, 390) as browser:
        pressed = "$('record').getAttribute('aria-pressed')"
        assert browser.run(pressed) == "false" and browser.run("$('recorded').textContent") == ""
        browser.run("actions.pause()")
        browser.run("$('record').click()")
        browser.until("/^● recording[.]mp4, [0-9.]+ s$/.test($('recorded').textContent)")
        assert browser.run(pressed) == "true" and page.status()["record"]
        for kind in "keyDown", "keyUp":
            browser("Input.dispatchKeyEvent", type=kind, key="v")
        browser.until("/^recording[.]mp4, [0-9.]+ s$/.test($('recorded').textContent)")
        assert browser.run(pressed) == "false" and len(appearing(mine / "recording.mp4")) > 5
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.run("$('prompt').focus()")
        for kind in "keyDown", "keyUp":
            browser("Input.dispatchKeyEvent", type=kind, key="v", text="v")
        time.sleep(0.3)
        assert "v" in browser.run("$('prompt').value") and browser.run(pressed) == "false"      # a letter of the prompt
        page.seq = page.status()["seq"]
        page.control([(9, 8)], record=True)
        browser.until(f"{pressed} === 'true'")                  # another page did it


# ----------------------------------------------------------------------------------------------------------------------
# sample.py with public weights: how they are sampled, and what they are told.

STUB = replace(PRESETS["wan2.1-1.3b"], dim=128, ffn_dim=64, num_heads=1, num_layers=1)     # reads text of 4096 channels
STUB_VAE = TinyVAEConfig(latent_channels=16, patch=2, pad="front", stem=4, encoder=((4, 1, 2, 2), (4, 1, 2, 2)),
                         decoder=((4, 1, 2, 2), (4, 1, 2, 2)), tail=4)


@functools.cache
def wan_workplace():
    """A folder as users of Wan have it: weights that do not say how they are sampled, their VAE, what encoders made."""
    here = tempfile.TemporaryDirectory()
    path = Path(here.name)

    def weights(name, **fields):
        model = randomised(MotionStream(replace(STUB, **fields)))
        tensors = {name: t for name, t in model.state_dict().items() if not name.startswith("track_head")}
        save_file(tensors, path / f"{name}.safetensors")
        return {f"model.{name}": t for name, t in tensors.items()}

    torch.save({"generator_ema": weights("t2v")}, path / "self_forcing.pt")
    weights("i2v", in_dim=36)
    weights("fun", in_dim=48, track_dim=16)
    weights("clip", in_dim=48, track_dim=16, clip_dim=32)
    saved(path / "headed.safetensors", randomised(MotionStream(replace(STUB, in_dim=48, track_dim=16, size=(32, 48)))))
    saved(path / "headless.safetensors", new_model(causal=False), lambda t: t["track_head.conv.weight"].zero_())
    saved(path / "vae.safetensors", new_vae(STUB_VAE))
    rows = {"prompt": rand(7, 4096), "negative": rand(9, 4096, seed=1).bfloat16(), "clip": rand(257, 32)}
    save_file({"any": rows["prompt"]}, path / "prompt.safetensors")
    save_file(rows, path / "encoded.safetensors")
    return here, path


def settled(weights, *more, frames=81):
    """What sample.py makes of the flags and the weights: (args, config, what it printed)."""
    args = sample.parse_flags(["--image", "x.png", *map(str, more)])
    with quiet() as (out, _):
        config = sample.settle(args, sample.inspect(wan_workplace()[1] / weights), frames)
    return args, config, out.getvalue()


@contextlib.contextmanager
def small_pictures():
    """Public weights make pictures of 48x32 pixels in here; encoders keep what they return in a folder of its own."""
    inspect = sample.inspect

    def smaller(path):
        weights = inspect(path)
        weights.config = weights.config if weights.own else replace(weights.config, size=(32, 48))
        return weights

    with unittest.mock.patch.object(sample, "inspect", smaller):
        yield


def wan_sampled(weights, *more):
    """Exit code, stdout and stderr of sample.py with public weights, and what the DiT was called with each time."""
    _, here = wan_workplace()
    calls, forward = [], MotionStream.forward

    def record(model, x, sigma, text, **given):
        calls.append(SimpleNamespace(x=x, sigma=sigma, text=text, **given))
        return forward(model, x, sigma, text, **given)

    flags = {"image": workplace()[1] / "image.png", "weights": here / weights, "vae": here / "vae.safetensors",
             "out": here / "out.mp4"}
    (here / "out.mp4").unlink(missing_ok=True)
    with small_pictures(), unittest.mock.patch.object(MotionStream, "forward", record):
        result = sampled(*(word for flag, value in flags.items() for word in (f"--{flag}", value)), *more)
    return *result, calls


def test_the_sampler_is_the_flag_else_what_the_file_says():
    args, c, out = settled("self_forcing.pt")
    assert args.sampler == "stream" and "Self-Forcing" in out and c.causal
    assert (c.chunk, c.sink, c.window) == (3, 0, None) and len(c.sigmas) == 4
    assert_near(torch.tensor(c.sigmas), torch.tensor([1, 0.9375, 2.5 / 3, 0.625]), 1e-6)
    for weights, shift, w_text in ("t2v", 8, 6), ("fun", 3, 6):                     # 1536 wide, the real ones
        args, c, out = settled(f"{weights}.safetensors")
        assert args.sampler == "teacher" and not c.causal and c.steps == 50
        assert (c.shift, c.guidance) == (5, (0, 0)), "no text: there is nothing to guide with"
        assert "teacher, shift 5, text guidance 0" in out
        real = sample.inspect(wan_workplace()[1] / f"{weights}.safetensors")
        real.config = replace(real.config, dim=1536)
        with quiet():
            args = sample.parse_flags(["--image", "x", "--prompt-embeds", "x"])
            c = sample.settle(args, real, 81)
        assert (c.shift, c.guidance) == (shift, (w_text, 0))
    args, c, _ = settled("t2v.safetensors", "--sampler", "stream", "--steps", 2, "--sink", 1, "--window", 1)
    assert (c.causal, c.sink, c.window, c.sigmas) == (True, 1, 1, schedule(2, 5.0))
    assert not settled("self_forcing.pt", "--sampler", "teacher")[1].causal
    args, c, out = settled("headed.safetensors", "--steps", 3, "--prompt-embeds", "x", "--w-motion", 4)
    assert args.sampler == "teacher" and out == "" and (c.steps, c.guidance) == (3, (3, 4))
    assert_error(sample.UserError, "use --sampler teacher", settled, "headed.safetensors", "--sampler", "stream")


def test_a_stream_that_remembers_all_ends_where_its_training_did():
    settled("self_forcing.pt", frames=81)
    for flags in ("--window", "99"), ("--window", "1"):
        settled("self_forcing.pt", *flags, frames=500)
    assert_error(sample.UserError, "81 frames, all of them; add --sink 1", settled, "self_forcing.pt", frames=82)
    assert_error(sample.UserError, "--sampler teacher", settled, "i2v.safetensors", "--sampler", "stream")


def test_each_family_takes_the_image_in_its_own_way():
    first, clip = rand(1, 16, 1, 2, 3), rand(1, 16, 4, 2, 3)
    wide, wide_clip = rand(1, 48, 1, 2, 3), rand(1, 48, 4, 2, 3)
    with_image, with_mask = F.pad(first, (0, 0, 0, 0, 0, 3)), image_and_mask(clip)
    for fields, given, channels, clean in (
            ({"in_dim": 16}, first, None, first), ({"in_dim": 32, "track_dim": 16}, first, None, first),
            ({"in_dim": 48, "track_dim": 16}, first, with_image, None), ({"in_dim": 36}, clip, with_mask, None),
            ({"in_dim": 48, "out_dim": 48}, wide, None, wide),
            ({"in_dim": 148, "out_dim": 48, "track_dim": 48}, wide_clip, image_and_mask(wide_clip),
             wide_clip[:, :, :1])):
        found = sample.image_inputs(replace(STUB, **fields), given, 4)
        for value, expected in zip(found, (channels, clean)):
            assert (value is None) == (expected is None) and (value is None or value.equal(expected)), fields
    assert "never learned" in settled("t2v.safetensors")[2] and "never learned" not in settled("i2v.safetensors")[2]


def test_weights_with_a_mask_see_the_image_and_then_grey():
    seen = []
    encode = TinyVAE.encode
    with unittest.mock.patch.object(TinyVAE, "encode", lambda vae, video: seen.append(video) or encode(vae, video)):
        code, _, err, calls = wan_sampled("i2v.safetensors", "--frames", 10, "--steps", 1)
    assert code == 0, err
    video, = seen
    assert video.shape[2] == 21 and video[:, :, 0].std() > 0 and video[:, :, 1:].count_nonzero() == 0
    image = calls[0].image
    assert image.shape[1:3] == (20, 6) and image[:, :4, 0].eq(1).all() and image[:, :4, 1:].eq(0).all()


def test_the_vae_beside_the_weights_is_theirs():
    _, here = wan_workplace()
    beside, alone = SimpleNamespace(vae=None), sample.inspect(here / "t2v.safetensors")
    with folder() as repository:
        save_file(load_file(here / "t2v.safetensors"), repository / "diffusion_pytorch_model.safetensors")
        torch.save(randomised(WanVAE(WanVAEConfig(16, 8, 8))).state_dict(), repository / "Wan2.1_VAE.pth")
        assert isinstance(sample.open_vae(beside, sample.inspect(repository)), WanVAE)
    assert_error(sample.UserError, "give --vae PATH", sample.open_vae, beside, sample.inspect(here / "fun.safetensors"))
    named = SimpleNamespace(vae=here / "vae.safetensors")
    assert isinstance(sample.open_vae(named, alone), TinyVAE)


def test_tracks_are_drawn_where_they_are_and_not_where_they_are_hidden():
    vae = SimpleNamespace(encode=lambda video: video, parameters=lambda: iter([torch.zeros(1)]))
    at = torch.tensor([[30.0, 20.0], [70.0, 60.0]]).expand(1, 14, 2, 2)
    visible = torch.ones(1, 14, 2, dtype=torch.bool)
    visible[:, 5:, 1] = False
    c = replace(STUB, size=(96, 128), chunk=3)
    video = sample.draw_control(vae, sample.Motion(at, visible, None), c, 14)
    assert video.shape == (1, 3, 21, 96, 128) and video.min() == -1 and video.max() == 1
    lit = (video[0] > -1).any(0)                                                     # (T, H, W)
    assert lit[:14, 20, 30].all() and lit[:5, 60, 70].all() and not lit[5, 60, 70]
    assert not lit[14:].any() and lit[:14].float().mean() < 0.02
    first, second = (video[0, :, 0, y, x] for x, y in ((30, 20), (70, 60)))
    assert not first.equal(second), "tracks differ in colour"
    model, control = new_model(causal=False), rand(1, 8, 6, 4, 6)
    parts = [part["tracks"] for part in sample.conditions(
        model, rand(1, 4, 1, 4, 6), sample.Motion(at, visible, torch.zeros(1, 2).long(), control), None)]
    assert torch.cat(parts, 2).equal(control) and [part.shape[2] for part in parts] == [3, 3]


def test_tracks_go_to_a_trained_head_or_are_drawn():
    tracks = "--tracks", "t.npy"
    for weights, control in ("fun", "rgb"), ("headed", "sinusoid"):
        args, _, out = settled(f"{weights}.safetensors", *tracks)
        assert args.control == control and ("drawn as a control video" in out) == (control == "rgb")
    for weights, cure, flags in (("t2v", "drop --tracks", tracks), ("t2v", "drop --tracks", ("--w-motion", 1)),
                                 ("headless", "no trained track head, and its input for tracks has 8", tracks)):
        assert_error(sample.UserError, cure, settled, f"{weights}.safetensors", *flags)


def test_guidance_leads_away_from_the_null_text():
    model = new_model(causal=False)
    noise, given, _ = clip_of(3)
    sigma, null, count = torch.full((2,), 0.7), rand(1, 3, 12, seed=9), []
    model.register_forward_hook(lambda _, args, out: count.append(len(args[0])))
    full, notext, nomotion = (model(noise, sigma, text, tracks=tracks) for text, tracks in (
        (given["text"], given["tracks"]), (null.expand(2, -1, -1), given["tracks"]), (given["text"], None)))
    for w_text, w_motion, batch in (3.0, 1.5, 6), (5.0, 0.0, 4):
        count.clear()
        v = guided_velocity(model, noise, sigma, given, (w_text, w_motion), null)
        assert_near(v, joint_guidance(full, notext, nomotion, w_text, w_motion), 1e-5)
        assert count == [batch], "without a weight, the motion's evaluation is left out"
    (x, level), *_ = euler(model, noise, given, None, (1.0,), (5.0, 0.0), null)
    assert x.equal(noise) and level == 1
    *_, (x0, _) = euler(model, noise, given, None, (1.0,), (5.0, 0.0), null)
    assert_near(x0, noise - guided_velocity(model, noise, torch.ones(2), given, (5.0, 0.0), null), 1e-5)


def test_encoded_texts_reach_the_teacher_padded_with_zeros():
    _, here = wan_workplace()
    texts, alone = (("--prompt-embeds", here / f"{name}.safetensors") for name in ("encoded", "prompt"))
    code, out, err, calls = wan_sampled("t2v.safetensors", *texts, "--frames", 1, "--steps", 2)
    assert code == 0 and "guidance leads away" not in out, (out, err)
    assert len(calls) == 2 and len(calls[0].x) == 2, "two evaluations in one batch: this model has no tracks"
    expected = F.pad(rand(7, 4096), (0, 0, 0, 505)), F.pad(rand(9, 4096, seed=1).bfloat16().float(), (0, 0, 0, 503))
    assert calls[0].text.equal(torch.stack(expected))
    code, out, _, calls = wan_sampled("t2v.safetensors", *alone, "--frames", 1, "--steps", 1)
    assert code == 0 and "no tensor named negative" in out and calls[0].text[1].count_nonzero() == 0
    code, out, _, calls = wan_sampled("t2v.safetensors", "--frames", 1, "--steps", 1)
    assert code == 0 and "no text at all" in out and calls[0].text is None and len(calls[0].x) == 1
    code, _, _, calls = wan_sampled("self_forcing.pt", *alone, "--frames", 13)
    assert code == 0 and [round(call.sigma[0, -1].item(), 3) for call in calls][:5] == [1, 0.938, 0.833, 0.625, 0]
    assert calls[0].text.equal(expected[0][None]) and calls[0].x[:, :, :1].equal(calls[4].x[:, :, :1])


def test_encoded_texts_and_images_of_the_wrong_shape_are_refused():
    c, args = replace(STUB, clip_dim=32, causal=True), SimpleNamespace(prompt=None)
    with folder() as here:
        args.prompt_embeds = here / "rows"
        good = {"prompt": rand(512, 4096), "clip": rand(257, 32)}
        for wrong in ({"prompt": rand(513, 4096)}, {"prompt": rand(5, 4095)}, {"prompt": rand(1, 5, 4096)},
                      {"prompt": rand(0, 4096)}, {"prompt": rand(5, 4096) / 0}, {"prompt": rand(4096)},
                      {"prompt": torch.ones(5, 4096, dtype=torch.int64)}, {"negative": rand(5, 4095)},
                      {"clip": rand(256, 32)}, {"clip": rand(257, 31)}, {"clip": rand(257, 32) / 0}):
            save_file(good | wrong, args.prompt_embeds)
            assert_error(ValueError, f"{here / 'rows'}: {[*wrong][0]} ", sample.read_encoded, args, c, None, "cpu")
        for tensors in {"a": rand(5, 4096), "b": rand(5, 4096)}, {}:
            save_file(tensors, args.prompt_embeds)
            assert_error(ValueError, "no prompt", sample.read_encoded, args, c, None, "cpu")
        save_file(good, args.prompt_embeds)
        text, null, clip = sample.read_encoded(args, replace(c, text_len=513), None, "cpu")
        assert text.equal(F.pad(good["prompt"], (0, 0, 0, 1))[None]) and null is None and clip.equal(good["clip"][None])


def test_the_encoded_image_reaches_the_image_branch():
    _, here = wan_workplace()
    flags = "--prompt-embeds", here / "encoded.safetensors"
    tracks = "--tracks", workplace()[1] / "tracks.npy"
    code, out, err, (call,) = wan_sampled("clip.safetensors", *flags, *tracks, "--frames", 3, "--steps", 1)
    assert code == 0 and "drawn as a control video" in out, (out, err)
    assert call.clip.equal(rand(257, 32).expand(2, -1, -1)) and call.tracks.count_nonzero()
    assert call.image.shape == call.tracks.shape == (2, 16, 3, 4, 6)
    code, _, err, calls = wan_sampled("clip.safetensors", *flags, "--sampler", "stream", "--frames", 3)
    assert code == 0 and calls[0].clip.equal(rand(257, 32)[None]), err
    code, _, err, _ = wan_sampled("clip.safetensors", "--prompt-embeds", here / "prompt.safetensors")
    assert code == 2 and "give --image-encoder" in err, err


@with_transformers
@torch.no_grad()
def test_prompts_are_encoded_as_wan_does_it():
    texts = (" a  small red\ncat &amp;amp; dog ", "", "red " * 600, "a\xa0red\u2028cat",
             "<unk> &amp;amp; dog")                                                  # ftfy leaves what looks like HTML
    ids = [[3, 4, 5, 6, 7, 8, 1], [1], [5] * 511 + [1], [3, 5, 6, 1], [2, 7, 8, 1]]  # the end of the sentence is kept
    with folder() as here:
        umt5, _ = small_encoders(here)
        for text, row in zip(map(encoders.text_encoder(here, "cpu"), texts), ids):
            padded = torch.tensor([row + [0] * (512 - len(row))])                    # Wan pads, and masks
            hidden = umt5(padded, (torch.arange(512) < len(row)).long()[None]).last_hidden_state
            assert text.shape == (len(row), 64) and text.dtype == torch.bfloat16
            assert_near(text.float(), hidden[0, :len(row)].float(), 2e-2)
        tensors = load_file(here / "text_encoder/model.safetensors")
        save_file(tensors | {"shared.weight": 0 * tensors["shared.weight"]}, here / "text_encoder/model.safetensors",
                  {"format": "pt"})
        assert_error(sample.UserError, "pip install -U transformers", encoders.text_encoder, here, "cpu")
        for part in "text_encoder", "tokenizer":
            for file in (here / part).iterdir():
                file.unlink()
            with quiet():
                assert_error(sample.UserError, f"{here / part}: no whole", encoders.text_encoder, here, "cpu")
    assert len(sample.NEGATIVE_PROMPT.split("，")) == 28 and sample.NEGATIVE_PROMPT.endswith("倒着走")


@with_transformers
@torch.no_grad()
def test_the_image_is_encoded_as_wan_does_it():
    with folder() as here:
        _, clip = small_encoders(here)
        image = rand(1, 3, 32, 48).clamp(-1, 1)
        resized = F.interpolate(image, (224, 224), mode="bicubic", align_corners=False) / 2 + 0.5
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        layers = clip(pixel_values=(resized - mean) / std, output_hidden_states=True).hidden_states
        assert_near(encoders.image_encoder(here, "cpu")(image), layers[-2][0], 1e-5)


def test_what_an_encoder_returned_is_kept_by_its_words_and_its_files():
    calls = []

    def encoder(folder, device):
        calls.append(folder)
        return lambda what: torch.full((2, 3), float(len(calls)))

    with folder() as here, unittest.mock.patch.object(encoders, "CACHE", here / "sub/kept"):
        (here / "encoder").mkdir()
        (here / "encoder/model.safetensors").write_bytes(b"1")
        one, other = rand(1, 3, 400, 600), rand(1, 3, 400, 600)
        other[0, 1, 200, 300] += 1                                      # far inside: repr leaves that out
        for what, expected in (("a", 1), ("bb", 2), ("a", 1), (one, 3), (other, 4), (one, 3)):
            assert encoders.kept_rows(encoder, here / "encoder", "cpu", {"x": what})["x"].eq(expected).all(), what
        assert encoders.kept_rows(encoder, here / "encoder", "cpu", {"y": "a"})["y"].eq(5).all()
        model = here / "encoder/model.safetensors"
        for change, expected in (lambda: os.utime(model, (1, 1)), 6), (lambda: model.write_bytes(b"22"), 7):
            change()
            os.utime(model, (1, 1))
            assert encoders.kept_rows(encoder, here / "encoder", "cpu", {"x": "a"})["x"].eq(expected).all()
        assert not list((here / "sub/kept").glob(".*")) and len(list((here / "sub/kept").iterdir())) == 7


@with_transformers
def test_a_prompt_and_an_image_reach_weights_with_both_encoders_which_are_gone_by_then():
    _, here = wan_workplace()
    there, loaded, load = [], [], encoders.pretrained

    def loading(*args, **options):
        loaded.append(weakref.ref(encoder := load(*args, **options)))
        return encoder

    def from_pretrained(*args, **options):
        there.extend(ref() for ref in loaded)
        return MotionStream.from_pretrained(*args, **options)

    with folder() as at, folder() as cache, unittest.mock.patch.object(encoders, "CACHE", cache), \
            unittest.mock.patch.object(encoders, "pretrained", loading), \
            unittest.mock.patch.object(sample, "MotionStream", SimpleNamespace(from_pretrained=from_pretrained)):
        small_encoders(at, width=4096)
        flags = "--prompt", "a red cat", "--text-encoder", at, "--frames", 3, "--steps", 1
        code, out, err, (call,) = wan_sampled("clip.safetensors", *flags, "--tracks", workplace()[1] / "tracks.npy")
        assert code == 0 and "drawn as a control video" in out, (out, err)
        assert len(loaded) == 3 and there == [None] * 3, "an encoder is in memory beside the DiT"
        words = map(encoders.text_encoder(at, "cpu"), ("a red cat", sample.NEGATIVE_PROMPT))
        for row, word in zip(call.text, words):
            assert row.shape == (512, 4096) and row[len(word):].count_nonzero() == 0
            assert row[:len(word)].equal(word.float())
        assert call.clip.shape == (2, 257, 32) and call.clip.count_nonzero() and call.tracks.count_nonzero()
        loaded.clear()
        code, _, err, calls = wan_sampled("clip.safetensors", *flags, "--sampler", "stream")
        assert code == 0 and not loaded and len(calls[0].text) == 1, "encoded twice"
        assert calls[0].text[0].equal(call.text[0]) and calls[0].clip[0].equal(call.clip[0])
        code, _, err, (again,) = wan_sampled("clip.safetensors", *flags, "--negative-prompt", "dog")
        assert code == 0 and len(loaded) == 2 and not again.text[1].equal(call.text[1])
        (at / "transformer").mkdir()                                    # a repository with all of it
        shutil.copy(here / "clip.safetensors", at / "transformer")
        code, _, err, (again,) = wan_sampled(at, "--prompt", "a red cat", "--frames", 3, "--steps", 1)
        assert code == 0 and again.text.equal(call.text) and again.clip.equal(call.clip), err
        shutil.move(at / "image_encoder", at / "elsewhere")
        code, _, err, _ = wan_sampled("clip.safetensors", *flags)
        assert code == 2 and "image_encoder: no whole CLIPVisionModel" in err and err.count("\n") == 1, err


def test_what_public_weights_lack_is_said_before_they_load():
    _, here = wan_workplace()
    tracks = "--tracks", workplace()[1] / "tracks.npy"
    embeds, encoder = ("--prompt-embeds", here / "prompt.safetensors"), ("--text-encoder", here / "none")
    cases = {("t2v", "--prompt", "a cat"): "--text-encoder", ("clip",): "--image-encoder",
             ("t2v", "--prompt", "a", *encoder, *embeds): "drop --prompt or --prompt-embeds",
             ("t2v", "--prompt", "a", *encoder): ("none/tokenizer: no whole AutoTokenizer" if importlib.util.find_spec(
                 "ftfy") else "No module named 'ftfy'; pip install transformers ftfy"),
             ("t2v", "--image-encoder", here): "no image branch",
             ("self_forcing", "--negative-prompt", "red"): "--negative-prompt belongs to --sampler teacher",
             ("headless", *encoder): "reads words", ("t2v", "--w-text", 2): "there is no text",
             ("t2v", "--interactive"): "a trained student", ("headed", "--interactive"): "a trained student",
             ("t2v", *tracks): "drop --tracks",
             ("t2v", "--prompt-embeds", here / "t2v.safetensors"): "and no prompt",
             ("t2v", "--prompt-embeds", here / "none.safetensors"): "none.safetensors",
             ("t2v", "--vae", workplace()[1] / "vae.safetensors"): "is this its VAE",
             ("t2v", "--frames", 90, "--sampler", "stream"): "--window",
             ("headless", *embeds): "reads words"}
    refuse = unittest.mock.Mock(side_effect=AssertionError("the model was loaded"))
    with unittest.mock.patch.object(MotionStream, "from_pretrained", refuse):
        for (weights, *flags), cure in cases.items():
            code, _, err, _ = wan_sampled(f"{weights}.{'pt' if weights == 'self_forcing' else 'safetensors'}", *flags)
            assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err) and cure in err, (weights, flags, err)
    assert not list(here.glob("*out*")), "something was written"


# ----------------------------------------------------------------------------------------------------------------------
# The README.

def recipe(word):
    """The README's block of Python that has the word in it."""
    block, = (code for code in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
              if word in code)
    return block


def test_the_readmes_lines_make_files_of_tracks():
    block, rows = recipe("circle.npz"), re.findall(r"^\| [^|]+ \| `(.*np\.savez\(\"t\.npz\".*)` \|$",
                                                   (HERE / "README.md").read_text(), re.M)
    xy, seen = np.round(rand(6, 1, 2).numpy() * 6 + (24, 16)), np.arange(6)[:, None] > 1
    with folder() as here, contextlib.chdir(here):
        exec(block)
        tracks, visible, *_ = sample.load_tracks(Path("circle.npz"), (384, 384))
        assert tracks.shape == (81, 1, 2) and visible.all() and abs(tracks[0, 0] - (105, 250)).max() < 1e-4
        tap = {"NAME": {"points": xy.swapaxes(0, 1) / (48, 32), "occluded": ~seen.T}}
        Path("a.pkl").write_bytes(pickle.dumps(tap))
        Path("a.txt").write_text("".join(f"{x:g},{y:g}\n" for x, y in xy[:, 0] / (48, 32) * 256))
        for code, expected in zip(rows, (seen, np.ones_like(seen)), strict=True):
            exec(code, {"np": np})
            tracks, visible, *_ = sample.load_tracks(Path("t.npz"), (48, 32))
            assert np.array_equal(visible, expected) and abs(tracks - xy).max() < 1e-2, code
            Path("t.npz").unlink()


def test_the_readmes_filter_takes_wide_clips_of_81_frames_at_16_a_second():
    with folder() as here, unittest.mock.patch.object(sys, "argv", ["x", str(here), str(here / "out")]):
        (here / "out").mkdir()
        rows = ["video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds"]
        for name, size, frames in ("a", (64, 36), 160), ("short", (64, 36), 140), ("square", (48, 48), 160):
            imageio.mimwrite(here / f"{name}.mp4", np.zeros((frames, size[1], size[0], 3), np.uint8), fps=30,
                             macro_block_size=2)
            rows.append(f"{name}.mp4,\"a {name}, one\",5,1,1,static,{frames},30,{frames / 30:.2f}")
        (here / "OpenVid-1M.csv").write_text("\n".join([*rows, "gone.mp4,b,5,1,1,static,200,30,7"]))
        for _ in range(2):                                          # again: what is there stays
            exec(recipe("OpenVid-1M.csv"), {})
        assert {file.name for file in (here / "out").iterdir()} == {"a.mp4", "a.txt"}
        frames = imageio.mimread(here / "out/a.mp4", memtest=False)
        assert len(frames) == 81 and imageio.get_reader(here / "out/a.mp4").get_meta_data()["fps"] == 16
        assert (here / "out/a.txt").read_text() == "a a, one"


def imports(path, inside):
    """The modules of this project that a file imports at its top or, with inside=True, anywhere."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name for name in found if (HERE / f"{name.replace('.', '/')}.py").is_file()}


def test_nothing_imports_a_test_and_imports_make_no_circle():
    files = {path.relative_to(HERE).as_posix()[:-3].replace("/", "."): path
             for path in (*HERE.glob("*.py"), *HERE.glob("extras/*.py"))}
    tops = {}
    for name, path in files.items():
        if not name.rpartition(".")[2].startswith("test"):
            tests = {other for other in imports(path, inside=True) if other.rpartition(".")[2].startswith("test")}
            assert not tests, f"{name} imports {tests}"
            tops[name] = imports(path, inside=False)
    assert len(tops) > 10 and "motionstream" in tops["sample"], tops
    while tops:                                                 # take away those that import nothing that is left
        free = {name for name, others in tops.items() if not others & tops.keys()}
        assert free, f"a circle of imports among {tops.keys()}"
        for name in free:
            del tops[name]
    assert not [*(HERE / "assets").glob("*.py")], "assets holds data"


def test_readme_table_points_at_the_code():
    rows = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert rows, "no link of the form [`name`](file.py#L123) in README.md"
    for name, file, line in rows:
        lines = (HERE / file).read_text().splitlines()
        last = name.split(".")[-1]
        there = lines[int(line) - 1] if 0 < int(line) <= len(lines) else ""
        at = [i + 1 for i, text in enumerate(lines) if re.match(rf"\s*(def|class) {last}\b|{last}\b.* = ", text)]
        assert int(line) in at, f"{file} line {line} is {there.strip()!r}; {name} is defined in line {at}"


def test_readme_line_counts_are_true():
    row = r"^\|\s*\[?`?([\w/]+\.py)`?(?:\]\([^)]*\))?\s*\|\s*([\d,]+)\s*\|"
    rows = re.findall(row, (HERE / "README.md").read_text(), re.M)
    assert rows, "no row of the form | file.py | 123 | … in README.md"
    for file, count in rows:
        lines = len((HERE / file).read_text().splitlines())
        assert int(count.replace(",", "")) == lines, f"{file} has {lines} lines, the README says {count}"


# ----------------------------------------------------------------------------------------------------------------------

def cpu_seconds():
    """What this process has computed, and the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(words):
    """Run the tests with one of the words in their name; all if there are none. Each line says how long a test took,
    and in brackets what it computed, which other programs on the machine change less."""
    count, started = Counter(), time.time()
    for name, test in [item for item in globals().items() if item[0].startswith("test_")]:
        if words and not any(word in name for word in words):
            continue
        begin, begin_cpu, reason = time.time(), cpu_seconds(), ""
        try:
            test()
            result = "passed"
        except unittest.SkipTest as e:
            result, reason = "SKIPPED", f": {e}"
        except (Exception, SystemExit):
            result = "FAILED"
            traceback.print_exc()
        count[result.lower()] += 1
        seconds = f"{time.time() - begin:6.2f} s ({cpu_seconds() - begin_cpu:.1f})"
        print(f"{seconds:16} {result:7}  {name}{reason}", flush=True)
    if not count:
        print(f"no test has one of these words in its name: {' '.join(words)}")
    print(f"{time.time() - started:.0f} s in all, {cpu_seconds():.0f} s of a core")
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    print(f"{count['passed']} passed, {count['failed']} failed{skipped}")
    return 1 if count["failed"] or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("-")]))
