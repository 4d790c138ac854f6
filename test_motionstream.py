"""The second reading: what the code promises, one sentence a test.

    python test_motionstream.py                    all of them, those in extras too
    python test_motionstream.py rollout cache      those with one of these words in their name
    python test_motionstream.py --slow             the slow ones too

Small models with random parameters everywhere: a fresh model returns zeros, which agrees with everything.
Where a formula is tested, it is written here a second time, plainly, in float64, from Wan's description.
"""

import ast
import contextlib
import copy
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import unittest
import unittest.mock
from collections import Counter, OrderedDict
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

import sample
import train_distill as td
from extras.testing import (DRAWN, FAMILIES, HERE, SMALL, SMALL_VAE, STUB, STUB_VAE, TAEW21, TAEW22, WAN,
                            WAN21, WAN22, assert_error, assert_near, before_distillation, clip_of,
                            command, folder, in_diffusers_layout, new_model, new_tracks, new_vae,
                            own_clips, own_flags, public, quiet, rand, randomised, same,
                            same_tensors, sampled, saved, seeded, settled, slow, small_scenes,
                            wan_sampled, wan_video, wan_workplace, workplace, write_layout)
from motionstream import (PRESETS, Config, CopyingMotionStream, KVCache, MotionStream, SelfAttention, TrackHead,
                          UserError, add_noise, apply_rope, copy_along_tracks, euler, find_config,
                          guided_velocity, image_and_mask, image_inputs, joint_guidance, linear_part, motion_inputs,
                          nearest_track, rollout, rope_table, save_pretrained, schedule, shift_sigma, sinusoid,
                          split_conditions, start_points, to_x0, track_features, track_ids, warp_along_tracks, with_first,
                          with_linear_part)
from sample import count_frames, embed_words
from vae import (STATISTICS, CausalConv, ChannelNorm, Enlarge, LinearVAE, LinearVAEConfig, MemBlock,
                 Repack, TinyVAE, WanVAE, WanVAEConfig, enlarging, load_vae)

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

    model, given = new_model(**vars(COPYING)), given | {"copies": rand(2, 6, 3, 4, 6, seed=8)}
    zeros = {name: torch.zeros_like(given[name]) for name in ("tracks", "copies")}
    v = [model(x, sigma, **given | without) for without in ({}, {"text": None}, zeros)]
    assert_near(guided_velocity(model, x, sigma, given, (3.0, 1.5)), joint_guidance(*v, 3.0, 1.5), 1e-5)


def test_euler_is_guided_as_the_config_says():
    model, (noise, given, first) = new_model(steps=2), clip_of(3)

    def end(guidance):
        model.config = replace(model.config, guidance=guidance)
        *_, (x0, sigma) = euler(model, noise, given, first)
        assert sigma == 0
        return x0

    by_hand = noise
    for sigma, following in (1.0, schedule(2, 5.0)[1]), (schedule(2, 5.0)[1], 0.0):
        x, levels = with_first(by_hand, torch.full((2,), sigma).double(), first)
        by_hand = x + (following - sigma) * guided_velocity(model, x, levels, given, (2.0, 1.0))
    assert_near(end((2.0, 1.0))[:, :, 1:], by_hand[:, :, 1:], 1e-5)
    assert not end((0, 0)).equal(end((2.0, 1.0)))


def test_euler_lands_on_the_point_that_an_exact_velocity_points_to():
    noise, _, first = clip_of(3)
    goal = torch.cat([first, rand(2, 4, 2, 4, 6, seed=9)], 2)

    def exact(x_t, sigma, text=None):                           # of data that are all `goal`
        return (x_t - goal) / sigma[:, None, :, None, None].clamp(min=1e-9)

    exact.config = replace(SMALL, steps=7, guidance=(0, 0))
    for given in first, None:
        path = list(euler(exact, noise, {}, given))
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


def test_a_copy_of_a_cache_stays_as_it_was():
    cache = KVCache(1, 1)
    for i in range(3):
        kept = copy.copy(cache)                                 # as a block does that is computed twice
        before = list(kept.chunks)
        cache.write(rand(1, 2, 1, 4, seed=i), rand(1, 2, 1, 4, seed=i))
        assert len(kept.chunks) == len(before) and all(a is b for a, b in zip(kept.chunks, before))


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
    other = model.new_caches(sink=0, window=None, sink_decay=0.9)
    assert [(cache.sink, cache.window, cache.decay) for cache in other] == [(0, None, 0.9)] * 2


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


def test_a_track_starts_where_it_is_first_seen():
    tracks = torch.tensor([[math.nan, 0.0], [24.7, 16.0], [40.0, 30.0]])[None, :, None].expand(2, -1, 2, -1)
    visible = torch.tensor([[[0, 0], [1, 0], [1, 0]], [[0, 1], [0, 0], [1, 1]]]).bool()
    expected = torch.tensor([[[24.7, 16.0], [0, 0]], [[40.0, 30.0], [0, 0]]])       # never, or at NaN: (0, 0)
    assert start_points(tracks, visible).equal(expected)


def test_track_ids_are_distinct_or_the_pixel_where_a_track_starts():
    tracks, visible, _ = new_tracks(9, 200)
    ids = track_ids(tracks, visible, replace(SMALL, track_id_mode="random"), seeded())
    assert all(len(set(row.tolist())) == 200 for row in ids) and not ids[0].equal(ids[1])
    tracks = torch.tensor([[math.nan, 0.0], [24.7, 16.0], [40.0, 30.0]])[None, :, None]
    visible = torch.tensor([False, True, True])[None, :, None]
    assert track_ids(tracks, visible, replace(SMALL, track_id_mode="start")).tolist() == [[16 * 2 ** 16 + 24]]


def test_frame_0_is_a_map_of_start_pixels_if_those_are_the_ids():
    tracks, visible, ids = new_tracks(13, 5)
    model = SimpleNamespace(config=replace(SMALL, track_id_mode="start"), track_head=identity_head())
    out = track_features(model, tracks, visible & False, ids)[0].unflatten(0, (4, 8))          # (slot, d, F, h, w)
    for row, column in itertools.product(range(4), range(6)):
        assert_near(out[3, :, 0, row, column], vector((8 * row << 16) + 8 * column), 1e-6)
    assert out.count_nonzero() == out[3, :, 0].count_nonzero()
    parts = [track_features(model, tracks[:, a:b], visible[:, a:b], ids) for a, b in ((0, 5), (5, 13))]
    assert_near(torch.cat(parts, 2), track_features(model, tracks, visible, ids), 1e-6)
    model.config = replace(SMALL, track_id_mode="random")
    assert track_features(model, tracks, visible, ids).equal(model.track_head(tracks, visible, ids, 32, 48))


def test_tracks_handed_to_the_model_as_points_are_refused_by_the_name_of_what_makes_features():
    model, (noise, given, _) = new_model(), clip_of(3)
    points = new_tracks(9, 8)[0]
    assert_error(AssertionError, "see track_features", model, noise, torch.ones(2), given["text"], tracks=points)
    assert_error(AssertionError, "condition image (2, 3, 3, 4, 6), expected (2, 0, 3, 4, 6)", model, noise,
                 torch.ones(2), given["text"], image=noise[:, :3])


# ----------------------------------------------------------------------------------------------------------------------
# Copying along tracks: not in the paper.

COPYING = replace(SMALL, track_id_mode="random", copies=True, in_dim=4 + 8 + 6 + 4, latent_std=(0.5, 1.0, 1.5, 0.7))


def linear_vae(channels=4):
    return randomised(LinearVAE(LinearVAEConfig(channels)))


def pan(frames, side=64, speed=1):
    """A picture that moves to the right by `speed` pixels a frame, (1, 3, T, side, side), and true tracks of it: points
    4 pixels apart, tracks (1, T, N, 2) and where they are visible."""
    picture = F.interpolate(rand(1, 3, 16, 16), size=(2 * side, 2 * side), mode="bicubic").clamp(-1, 1)
    left = [side // 2 - speed * t for t in range(frames)]
    video = torch.stack([picture[..., :side, x:x + side] for x in left], 2)
    point = torch.cartesian_prod(torch.arange(2.0, side, 4), torch.arange(2.0, side, 4)).flip(1)
    tracks = point + speed * torch.arange(frames)[:, None, None] * torch.tensor([1.0, 0.0])
    visible = (tracks < side).all(-1)
    return video, tracks[None], visible[None]


def test_copying_along_true_tracks_gives_the_latents_of_the_moved_picture():
    vae = linear_vae()
    for speed, frames in (1, 9), (4, 5), (-2, 9):
        video, tracks, visible = pan(frames, speed=speed)
        visible &= (tracks >= 0).all(-1)
        order = torch.randperm(tracks.shape[2], generator=seeded())             # which must not matter
        tracks, visible = tracks[:, :, order], visible[:, :, order]
        start = start_points(tracks, visible)
        copied = copy_along_tracks(vae, video[:, :, 0], tracks, visible, start)
        latents = vae.encode(video)
        assert copied.shape == (1, 4 + 2, *latents.shape[2:])
        # columns whose window, 4 pixels wider than the cell, shows nothing that has come into the picture
        columns = slice(2, None)
        if speed > 2:
            columns = slice(3, None)
        if speed < 0:
            columns = slice(None, -3)
        assert_near(copied[:, :4, ..., columns], latents[..., columns], 1e-5)
        still = vae.encode(video[:, :, :1]).expand_as(latents)
        assert (latents - still)[:, :, 1:, :, columns].abs().mean() > 0.05, "nothing has moved"
        for first in copied, copy_along_tracks(vae, video[:, :, 0], tracks + 9, visible, start):
            assert_near(first[:, :4, :1], latents[:, :, :1], 1e-6)              # frame 0 is the image itself


def test_all_tracks_may_have_the_same_id():
    tracks, visible, _ = new_tracks(9, 3)
    ids = track_ids(tracks, visible, replace(COPYING, track_id_mode="same"), seeded())
    assert ids.shape == (len(tracks), 3) and ids.dtype == torch.int64 and (ids == 0).all()


def test_copies_made_chunk_by_chunk_are_those_of_the_whole():
    vae, (video, tracks, visible) = linear_vae(), pan(21)
    visible &= rand(*visible.shape) > -0.5
    start = start_points(tracks, visible)
    whole = copy_along_tracks(vae, video[:, :, 0], tracks, visible, start)
    parts = [copy_along_tracks(vae, video[:, :, 0], tracks[:, a:b], visible[:, a:b], start)
             for a, b in ((0, 9), (9, 13), (13, 21))]
    assert whole.shape[2] == 6
    assert_near(torch.cat(parts, 2), whole, 1e-6)


def test_hidden_tracks_copy_nothing_and_no_track_at_all_is_the_image_standing_still():
    vae, (video, tracks, visible) = linear_vae(), pan(9)
    image = video[:, :, 0]
    still = vae.encode(image[:, :, None]).expand(-1, -1, 3, -1, -1)
    nothing = visible & False
    nowhere = torch.full_like(tracks, math.nan)
    for given in ((tracks, nothing), (nowhere, nothing), (tracks[:, :, :0], visible[:, :, :0])):
        copied = copy_along_tracks(vae, image, *given, start_points(*given))
        assert_near(copied[:, :4], still, 1e-6)
        assert (copied[:, 4:, 0] == 1).all() and (copied[:, 4:, 1:] == 0).all()     # near in frame 0, then nowhere

    half = visible & (torch.arange(tracks.shape[2]) % 2 == 0)
    start = start_points(tracks, visible)
    expected = copy_along_tracks(vae, image, tracks[:, :, ::2], visible[:, :, ::2], start[:, ::2])
    elsewhere = torch.where(half[..., None], tracks, 7.0)                       # positions of hidden ones do not count
    assert copy_along_tracks(vae, image, elsewhere, half, start).equal(expected)


def test_motion_inputs_are_features_and_of_a_copying_model_copies():
    vae, image, (tracks, visible, ids) = linear_vae(), rand(2, 3, 32, 48).clamp(-1, 1), new_tracks(9, 5)
    start = start_points(tracks, visible)
    for config in SMALL, COPYING:
        model = new_model(**vars(config))
        inputs = motion_inputs(model, tracks, visible, ids, start=start, image=image, vae=vae)
        assert inputs.pop("tracks").equal(track_features(model, tracks, visible, ids))
        if config.copies:
            assert inputs.pop("copies").equal(copy_along_tracks(vae, image, tracks, visible, start))
        assert not inputs
    assert_error(AssertionError, "see start_points", motion_inputs, model, tracks, visible, ids, image=image, vae=vae)


def test_a_square_follows_the_visible_track_nearest_to_its_centre():
    tracks = torch.tensor([[3.0, 2.0], [42.0, 30.0]]).expand(1, 2, -1, -1)
    visible = torch.tensor([[[True, True], [False, True]]])
    number, distance = nearest_track(tracks, visible, 32, 48)
    assert number.shape == distance.shape == (1, 2, 8, 12)
    assert number[0, 0, 0, 0] == 0 and distance[0, 0, 0, 0] == 1                # centre (2, 2)
    assert number[0, 0, 7, 10] == 1 and distance[0, 0, 7, 10] == 0
    assert (number[0, 1] == 1).all()                                            # the other one is hidden there
    later = tracks + torch.tensor([0.0, 0.0, 5.0, -9.0]).view(1, 1, 2, 2) * torch.arange(2).view(1, 2, 1, 1)
    image = torch.arange(32 * 48.0).expand(3, -1).view(1, 3, 32, 48)
    video, distance = warp_along_tracks(image, later, visible | True, later[:, 0])
    assert video[0, 0, 1, 17, 47] == image[0, 0, 26, 42]                        # moved by (5, -9)
    assert video[0, 0, 1, :8, :8].equal(image[0, 0, :8, :8])                    # what stays
    assert video[0, 0, 1, 28:, 40:].equal(image[0, 0, 28:, 40:])                # would come from below the picture
    assert distance[0, 1, 7, 10:].isinf().all() and distance[0, 1, 4, 10:].isfinite().all()


def test_a_fresh_model_believes_its_copies_and_where_there_are_none_the_image():
    torch.manual_seed(0)
    model = CopyingMotionStream(COPYING).eval()
    x, ones, tracks = rand(2, 4, 3, 4, 6), torch.ones(2), rand(2, 8, 3, 4, 6, seed=3)
    copies, image = rand(2, 6, 3, 4, 6, seed=1), rand(2, 4, 3, 4, 6, seed=2)
    with torch.no_grad():
        x0 = to_x0(x, model(x, ones, tracks=tracks, copies=copies, image=image), ones)
        assert_near(x0, 0.8 * copies[:, :4] + 0.2 * image, 1e-5)
        x0 = to_x0(x, model(x, ones, copies=copies), ones)
        assert_near(x0, 0.8 * copies[:, :4], 1e-5)
        x0 = to_x0(x, model(x, ones, tracks=tracks, image=image), ones)
        assert x0.abs().max() < 1e-6                            # without copies: the mean, 0
    assert_error(AssertionError, "condition copies (2, 8, 3, 4, 6), expected (2, 6,", model, x, ones, copies=tracks)
    model.config = replace(COPYING, latent_std=())
    assert_error(AssertionError, "latent_std", model, x, ones)


def test_a_copying_model_is_a_motionstream_inside_the_linear_part():
    """Its image slot holds copies, then the image; its head the spread and the shares too."""
    model = new_model(**vars(COPYING))
    plain = randomised(MotionStream(COPYING))
    plain.head = model.head
    plain.load_state_dict(model.state_dict())
    noise, given, _ = clip_of(3, COPYING)
    copies, image, sigma = rand(2, 6, 3, 4, 6, seed=8), rand(2, 4, 3, 4, 6, seed=9), torch.tensor([0.9, 0.4])
    std = torch.tensor(COPYING.latent_std).view(1, -1, 1, 1, 1)
    s = sigma.view(2, 1, 1, 1, 1)
    variance = (1 - s) ** 2 * std ** 2 + s ** 2
    output = plain(noise / variance.sqrt(), sigma, **given, image=torch.cat([copies, image], 1))
    correction, log_spread, shares = output.split([4, 4, 2], 1)
    mean = shares[:, :1] * copies[:, :4] + shares[:, 1:] * image
    spread = (std * log_spread.clamp(-6, 2).exp()) ** 2                                      # of a Gaussian round that mean
    x0 = mean + (1 - s) * spread / ((1 - s) ** 2 * spread + s ** 2) * (noise - (1 - s) * mean)
    expected = (noise - x0) / s + std / variance.sqrt() * correction
    assert_near(model(noise, sigma, **given, copies=copies, image=image), expected, 1e-5)


def test_the_spread_says_how_much_of_the_noise_is_believed():
    """Near the copies there is little of x_t in x0; by default the spread is the latents' own."""
    std, mean = torch.tensor([0.5, 1.0, 2.0]).view(1, -1, 1, 1, 1), rand(2, 3, 4, 2, 2)
    x_t, zero = rand(2, 3, 4, 2, 2, seed=1), torch.zeros(2, 3, 4, 2, 2)
    sigma = torch.tensor([0.8, 0.2])
    certain = with_linear_part(zero, x_t, sigma, std, mean, 1e-6 * std + zero)
    assert_near(to_x0(x_t, certain, sigma), mean, 1e-5)
    blank = with_linear_part(zero, x_t, sigma, std, mean, 1e6 * std + zero)
    assert_near(add_noise(to_x0(x_t, blank, sigma), zero, sigma), x_t, 1e-4)    # x_t / (1 - sigma), whatever the mean
    own = with_linear_part(zero, x_t, sigma, std, mean, std + zero)
    assert own.equal(with_linear_part(zero, x_t, sigma, std, mean))


def test_the_linear_part_is_the_posterior_mean_of_gaussian_latents():
    std, mean = torch.tensor([0.5, 1.0, 2.0]).view(1, -1, 1, 1, 1), rand(2, 3, 4, 2, 2)
    x_t, sigma = rand(2, 3, 4, 2, 2, seed=1), torch.tensor([[0.0, 0.1, 0.5, 0.9], [1.0, 0.99, 0.3, 0.7]])
    for b, c, f in itertools.product(range(2), range(3), range(4)):
        s, d = sigma[b, f].item(), std[0, c].item()
        mix = np.array([[1 - s, s], [-1, 1]])                       # (x0, noise) to (x_t, velocity)
        covariance = mix @ np.diag([d ** 2, 1]) @ mix.T
        middle = mean[b, c, f].double().numpy()
        slope = covariance[1, 0] / covariance[0, 0]
        expected = -middle + slope * (x_t[b, c, f].double().numpy() - (1 - s) * middle)
        left = covariance[1, 1] - slope * covariance[1, 0]          # variance of the velocity, given x_t
        given = with_linear_part(torch.zeros_like(x_t), x_t, sigma, std, mean)
        assert_near(given[b, c, f].double(), torch.from_numpy(expected), 1e-5)
        unit = with_linear_part(torch.ones_like(x_t), x_t, sigma, std, mean) - given
        assert abs(unit[b, c, f].square().mean().item() - left) < 1e-5, "the network's target has variance 1"
        assert abs(linear_part(sigma, std)[1][b, c, f].item() - covariance[0, 0]) < 1e-5
    zero = with_linear_part(torch.zeros_like(x_t), x_t, sigma, std)
    assert zero.equal(with_linear_part(torch.zeros_like(x_t), x_t, sigma, std, 0 * mean))


def test_copying_models_stream_and_later_copies_do_not_change_past_frames():
    model = new_model(**vars(COPYING))
    noise, given, first = clip_of(8, COPYING)
    given |= {"copies": rand(2, 6, 8, 4, 6, seed=6), "image": first.expand(-1, -1, 8, -1, -1)}
    made = list(rollout(model, noise, given, first, rng=seeded()))
    assert [x.shape[2] for x in made] == [3, 3, 2] and all(x.isfinite().all() for x in made)
    other = given | {"copies": given["copies"] * (torch.arange(8) < 6).view(-1, 1, 1)}
    again = list(rollout(model, noise, other, first, rng=seeded()))
    assert all(a.equal(b) for a, b in zip(made[:2], again)) and not made[2].equal(again[2])


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
    rolled = list(rollout(model, noise, given, first, rng=seeded(5)))
    assert [x.shape[2] for x in rolled] == [3, 3, 2] and rolled[0][:, :, :1].equal(first)
    assert_near(torch.cat(rolled, 2), torch.cat(chunks, 2), 1e-5)
    assert not rolled[1][:, :, :1].equal(first) and all(len(cache) == 5 * 6 for cache in caches)


def test_rollout_takes_chunks_and_caches_that_are_not_the_configs():
    model, (noise, given, first) = new_model(), clip_of(8)
    expected = list(rollout(new_model(chunk=2, sink=0, window=2), noise, given, first, rng=seeded()))
    caches = model.new_caches(sink=0, window=2)
    made = rollout(model, noise.split(2, 2), split_conditions(given, 2), first, rng=seeded(), caches=caches)
    assert all(a.equal(b) for a, b in zip(made, expected, strict=True)) and len(expected) == 4
    assert all(len(cache) == 2 * 2 * 6 for cache in caches)


def test_a_stream_fed_chunk_by_chunk_equals_the_whole_clip_and_asks_late():
    model, (noise, given, first), events = new_model(), clip_of(9), []

    def conditions():
        for i in range(3):
            events.append(f"ask {i}")
            yield {"text": given["text"], "tracks": given["tracks"][:, :, 3 * i:3 * i + 3]}

    endless = itertools.chain(noise.split(3, 2), itertools.repeat(noise[:, :, :3]))
    parts = []
    for i, x in enumerate(rollout(model, endless, conditions(), first, rng=seeded(5))):
        events.append(f"got {i}")
        parts.append(x)
    assert events == ["ask 0", "got 0", "ask 1", "got 1", "ask 2", "got 2"]
    whole = list(rollout(model, noise, given, first, rng=seeded(5)))
    assert len(parts) == len(whole) == 3 and all(a.equal(b) for a, b in zip(parts, whole))


def test_future_tracks_do_not_change_past_frames():
    model, (noise, given, first) = new_model(), clip_of(12)
    changed = dict(given, tracks=given["tracks"].clone())
    changed["tracks"][:, :, 6:] += 1                            # from chunk 2 on
    one, two = (list(rollout(model, noise, c, first, rng=seeded(0))) for c in (given, changed))
    assert [a.equal(b) for a, b in zip(one, two)] == [True, True, False, False]


def test_training_stops_at_the_exit_step_and_only_that_has_a_graph():
    model, (noise, given, first), calls = new_model().requires_grad_(True), clip_of(6), []
    model.register_forward_hook(lambda _, args, options, out: calls.append(
        (args[1].max().item(), out.requires_grad, options.get("write", False))), with_kwargs=True)
    for exit_step, enabled in itertools.product((0, 1, 2, None), (True, False)):
        calls.clear()
        with torch.set_grad_enabled(enabled):
            chunks = list(rollout(model, noise, given, first, exit_step))
        last = 2 if exit_step is None else exit_step
        grad = enabled and exit_step is not None                # sampling never has one
        denoising = [(sigma, grad and i == last, False) for i, sigma in enumerate(SMALL.sigmas[:last + 1])]
        assert calls == [*denoising, (0.0, False, True)] * 2
        assert all(x.requires_grad == grad for x in chunks)


def test_no_gradient_flows_from_a_chunk_into_the_chunks_before_it():
    model, (noise, given, first) = new_model().requires_grad_(True), clip_of(6)
    a, b = (part.clone().requires_grad_(True) for part in noise.split(3, 2))
    one, two = rollout(model, iter([a, b]), given, first, exit_step=0)
    two.square().sum().backward()
    assert a.grad is None and b.grad.abs().sum() > 0 and model.blocks[0].self_attn.k.weight.grad.abs().sum() > 0
    one.square().sum().backward()
    assert a.grad.abs().sum() > 0


def test_rollout_leaves_the_callers_grad_mode_alone():
    model, (noise, given, first) = new_model().requires_grad_(True), clip_of(9)
    for mode, exit_step in itertools.product((True, False), (0, None)):
        with torch.set_grad_enabled(mode):
            for _ in rollout(model, noise, given, first, exit_step):
                assert torch.is_grad_enabled() == mode
            assert torch.is_grad_enabled() == mode


def test_training_and_sampling_roll_out_the_same_bits():
    model, (noise, given, first) = new_model().requires_grad_(True), clip_of(9)
    train = rollout(model, noise, given, first, exit_step=2, rng=seeded(3))
    with torch.inference_mode():
        play = list(rollout(model, noise, given, first, rng=seeded(3)))
    assert all(a.detach().equal(b) for a, b in zip(train, play, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Weights files.

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


def test_configs_of_older_files_are_read_in_todays_words():
    def older(config, tracks):
        fields = asdict(config) | {"tracks": tracks}
        for name in "track_id_mode", "text_encoder", "clean_first":
            fields.pop(name)
        return json.dumps(fields)

    wan22 = replace(SMALL, in_dim=48 + 8 + 52, out_dim=48)
    channels = replace(SMALL, in_dim=16, clean_first=False)
    for config, tracks in ((SMALL, "start"), (replace(SMALL, track_id_mode="random"), "random"),
                           (channels, "start"), (wan22, "start")):
        with folder() as here:
            saved(here / "a.safetensors", MotionStream(config), config=older(config, tracks))
            assert MotionStream.from_pretrained(here / "a.safetensors").config == config
    umt5 = replace(SMALL, text_dim=4096, text_encoder="umt5")
    with folder() as here:
        saved(here / "a.safetensors", MotionStream(umt5), config=older(umt5, "start"))
        assert MotionStream.from_pretrained(here / "a.safetensors").config == umt5


def test_a_tiny_model_of_48_channels_is_no_wan_22():
    config = replace(SMALL, in_dim=48 + 8 + 48, out_dim=48, clean_first=False)
    with folder() as here:
        saved(here / "a.safetensors", randomised(MotionStream(config)))
        assert MotionStream.from_pretrained(here / "a.safetensors").config == config
    assert (config.latent_size, config.head_dim, config.image_dim, config.has_mask) == ((4, 6), 20, 48, False)
    assert (COPYING.copy_dim, SMALL.copy_dim, replace(SMALL, in_dim=20).has_mask) == (6, 0, True)


def test_wans_own_layout_and_ours_are_read_without_extras():
    with folder() as here, unittest.mock.patch.dict(sys.modules, {"extras": None, "extras.checkpoints": None}):
        (here / "sharded").mkdir()
        index, one = shards(here / "sharded", public()), write_layout(here, "Wan 2.1 T2V", "Wan")
        for path in one, one / "diffusion_pytorch_model.safetensors", index, here / "sharded":
            assert same_tensors(MotionStream.from_pretrained(path), public()), path
        save_file(randomised(WanVAE(WAN21)).state_dict(), here / "vae.safetensors")
        assert isinstance(load_vae(here / "vae.safetensors"), WanVAE)
        for name in "tiny", "tiny_teacher", "tiny_causal":
            assert MotionStream.from_pretrained(HERE / f"assets/{name}.safetensors").config.text_encoder == "words"
        load_vae(HERE / "assets/tiny_vae.safetensors")
        save_file(in_diffusers_layout(public()), here / "other.safetensors")
        try:
            MotionStream.from_pretrained(here / "other.safetensors")
        except UserError as e:
            assert "other.safetensors: it has no tensor blocks.0" in str(e) and "is missing" in str(e), e
        else:
            raise AssertionError("another layout was read without extras")


# ----------------------------------------------------------------------------------------------------------------------
# Public weights.

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
    big = replace(PRESETS["wan2.1-14b"], in_dim=36, clip_dim=1280, clean_first=False)
    for c in (PRESETS["wan2.1-1.3b"], PRESETS["wan2.1-14b"], PRESETS["wan2.2-5b"], big,
              replace(big, in_dim=48, track_dim=16)):
        with torch.device("meta"):
            tensors = MotionStream(c).state_dict()
        tensors.pop("track_head.conv.weight", None)
        assert find_config(tensors, {}, Path("nowhere/a.safetensors")) == c


def test_a_track_head_tells_how_wide_its_slot_is():
    c = replace(WAN, in_dim=40, track_dim=8, clean_first=False)     # of this project, but without its metadata
    model = randomised(MotionStream(c))
    with folder() as here:
        save_file(model.state_dict(), here / "a.safetensors")
        back = MotionStream.from_pretrained(here / "a.safetensors")
    assert back.config == c and all(t.equal(model.state_dict()[name]) for name, t in back.state_dict().items())


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

    refused("not a complete MotionStream; 1 tensors are missing: blocks.1.ffn.2.bias",
            {"blocks.1.ffn.2.bias": None})
    refused("10 tensors are missing: blocks.0.cross_attn.k.bias, ", {"blocks.0.cross_attn": None})
    refused("2 tensors are unknown: ref_conv.bias, ref_conv.weight",
            {"ref_conv.weight": torch.zeros(4), "ref_conv.bias": torch.zeros(4)})
    refused("1 tensors are of another shape: head.head.bias", {"head.head.bias": torch.zeros(3)})
    for text in "7 tensors are unknown", "vace_blocks.3, vace_blocks.4\n":              # the count, and five names
        refused(text, {f"vace_blocks.{i}": torch.zeros(4) for i in range(7)})
    refused("1 tensors are unknown: model.blocks.0.norm3.bias\n", {"model.blocks.0.norm3.bias": torch.zeros(256)})
    for name in "patch_embedding", "head.head", "blocks", "text_embedding", "time_embedding":
        refused("expected a complete Wan DiT checkpoint", {name: None})
    refused("patch_embedding.weight is (256, 64)", {"patch_embedding.weight": torch.zeros(256, 64)})
    refused("32 input channels for 16", {"patch_embedding.weight": torch.zeros(256, 32, 1, 2, 2)})
    refused("48 by its tensors, but 36", {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2)}, {"in_dim": 36})
    for settings in {"num_layers": 30}, {"dim": 1536}, {"in_channels": 36}, {"ffn_dim": 8960}, {"image_dim": 1280}:
        refused("by its tensors, but", settings=settings)
    for settings in "{", "[1]", '"text"':
        refused("config.json: cannot be read", settings=settings)
    for heads, text in (3, "give num_heads"), (0, "expected int from 1"), ("2", "expected int from 1"):
        refused(text, settings={"num_heads": heads})
    refused("expected int from 1", num_heads=0)
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
    model = new_model(chunk=2, window=None, track_id_mode="random")
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
    assert vae.decode_unclamped(1e4 * z)[0].equal(vae.decode_unclamped(1e6 * z)[0])               # 3 tanh(z / 3)
    assert not vae.decode_unclamped(z)[0].equal(vae.decode_unclamped(3 * torch.tanh(z / 3))[0])
    vae.decoder[-1].weight.zero_()
    for inside, outside in (0, -1), (0.5, 0), (1, 1):
        nn.init.constant_(vae.decoder[-1].bias, inside)
        assert (vae.decode(z)[0] == outside).all()


def test_chunked_decode_equals_whole_decode_and_never_touches_the_state():
    vae, z = new_vae(), 2 * rand(2, 4, 9, 3, 4)
    whole, state, parts, states = vae.decode(z)[0], None, [], []
    assert whole.abs().max() == 1 and vae.decode_unclamped(z)[0].abs().max() > 1              # clamped, and had to be
    for part in z.split([3, 1, 3, 2], 2):
        video, state = vae.decode(part, state)
        parts.append(video)
        states.append((state, [t.clone() for t in state]))
    assert [x.shape for x in parts] == [(2, 3, frames, 24, 32) for frames in (9, 4, 12, 8)]
    assert torch.cat(parts, 2).equal(whole)
    assert all(a.equal(b) for state, copy in states for a, b in zip(state, copy, strict=True))
    assert vae.decode(z[:, :, 3:4], states[0][0])[0].equal(parts[1])                       # the old state still works
    assert not vae.decode(z[:, :, 3:4])[0].equal(parts[1][:, :, 3:])                       # and matters


def decoded_layer_by_layer(layers, z):
    """What each layer of TAEHV's decoder does, frame by frame in a plain loop, of latents (C, F, h, w): (T, 3, H, W)."""
    frames = [3 * torch.tanh(frame / 3) for frame in z.unbind(1)]
    for layer in layers:
        if isinstance(layer, MemBlock):
            before = [frames[0]] + frames[:-1]
            frames = [F.relu(layer.conv(torch.cat(pair)[None])[0] + pair[0]) for pair in zip(frames, before)]
        elif isinstance(layer, Repack):
            frames = [part for frame in frames for part in layer.conv(frame[None])[0].chunk(layer.grow)]
        else:
            frames = [layer(frame[None])[0] for frame in frames]
    return 2 * F.pixel_shuffle(torch.stack(frames), 2)[3:] - 1


def test_a_stage_of_the_tiny_decoder_in_one_convolution_is_its_layers_and_learns_as_they_do():
    for stages in ((6, 1, 4, 2), (5, 1, 1, 1)), ((6, 2, 2, 3), (4, 1, 2, 2)):
        vae = new_vae(replace(SMALL_VAE, patch=2, decoder=stages, tail=5)).requires_grad_(True)
        z = rand(2, 4, 3, 3, 4)
        video, _ = vae.decode_unclamped(z)
        names, parameters = zip(*vae.decoder.named_parameters())
        plain = torch.stack([decoded_layer_by_layer(vae.decoder, one) for one in z]).transpose(1, 2)
        assert_near(video, plain, 1e-5)
        weight = rand(*video.shape)
        got = torch.autograd.grad((video * weight).sum(), parameters)
        for name, a, b in zip(names, got, torch.autograd.grad((plain * weight).sum(), parameters)):
            assert b.abs().max() > 0, name
            assert_near(a, b, 1e-4)


def test_enlarging_and_convolving_in_one_is_both_in_turn():
    for space in 1, 2, 3:
        weight, bias, x = rand(5, 4, 3, 3), rand(5, seed=1), rand(2, 4, 3, 6, seed=2)
        plain = F.conv2d(nn.Upsample(scale_factor=space)(x), weight, bias, padding=1)
        folded = enlarging(weight, space).transpose(0, 1)
        assert_near(F.conv_transpose2d(x, folded, bias, space, 1), plain, 1e-5)
    layers, x = randomised(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 5, 3, padding=1))), rand(2, 4, 3, 5, 6)
    plain = torch.stack([layers(frame) for frame in x.unbind(2)], 2)
    assert_near(Enlarge(*layers)(x), plain, 1e-5)


def test_a_vae_computes_in_the_dtype_of_its_weights():
    for vae, channels in (new_vae(), 4), (linear_vae(), 4), (randomised(WanVAE(WAN21)), 16):
        video, z = rand(1, 3, 5, 16, 24).clamp(-1, 1), rand(1, channels, 2, 2, 3)
        latents, (decoded, _) = vae.encode(video), vae.decode(z)
        vae.to(torch.bfloat16)
        assert vae.encode(video).dtype == vae.decode(z)[0].dtype == torch.bfloat16
        _, state = vae.decode(z[:, :, :1])
        assert all(t.dtype == torch.bfloat16 for t in state)
        assert_near(vae.encode(video).float(), latents, 0.05)
        assert_near(vae.decode(z)[0].float(), decoded, 0.05)


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
# The linear VAE.

def test_the_linear_code_moves_with_the_picture():
    vae, wide = linear_vae(), rand(1, 3, 9, 32, 96).clamp(-1, 1)
    latents = vae.encode(wide)
    assert latents.shape == (1, 4, 3, 4, 12) and vae.stride == 8
    shifted = vae.encode(wide[..., 8:])                                         # by one cell
    assert_near(shifted[..., 1:], latents[..., 2:], 1e-6)                       # but at the rim, which is repeated
    assert not shifted[..., 0].equal(latents[..., 1])
    later = wide.clone()
    later[:, :, 5:9] += 0.5                                                     # latent 2 alone
    changed = (vae.encode(later) - latents).abs().amax((0, 1, 3, 4))
    assert changed[0] == changed[1] == 0 and changed[2] > 0.1
    assert_error(AssertionError, "this one has 8", vae.encode, wide[:, :, :8])
    assert_error(AssertionError, "95x32", vae.encode, wide[..., 1:])


def test_a_linear_code_is_linear_and_decodes_in_pieces_as_the_whole():
    vae, z = linear_vae(), rand(2, 4, 7, 3, 5)
    whole, state = vae.decode_unclamped(z)
    assert whole.shape == (2, 3, 25, 24, 40) and state == []
    parts, state = [], None
    for part in z.split([1, 3, 1, 2], 2):
        video, state = vae.decode_unclamped(part, state)
        parts.append(video)
    assert_near(torch.cat(parts, 2), whole, 1e-6)
    assert vae.decode(9 * z)[0].equal(vae.decode_unclamped(9 * z)[0].clamp(-1, 1)) and vae.decode(9 * z)[0].max() == 1
    nothing = vae.decode_unclamped(0 * z)[0]
    both = vae.decode_unclamped(z + 2 * z.flip(2))[0] - nothing
    assert_near(both, whole + 2 * vae.decode_unclamped(z.flip(2))[0] - 3 * nothing, 1e-4)


def test_a_linear_code_of_principal_components_gives_back_what_it_can_hold():
    vae = LinearVAE(LinearVAEConfig(latent_channels=3 * 4 * 64)).requires_grad_(False)
    for layer in vae.encoder, vae.decoder:                                      # every pixel of a cell: nothing is lost
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:, :, 4:12, 4:12] = torch.eye(768).view(768, 12, 8, 8)
    video = rand(1, 3, 9, 16, 24).clamp(-1, 1)
    assert_near(vae.decode(vae.encode(video))[0], video, 1e-6)
    assert_near(vae.pixel_weight(), torch.ones(768), 1e-6)


def test_a_linear_vae_comes_back_from_its_file():
    vae = linear_vae(5)
    vae.latent_std.copy_(torch.arange(5) + 0.5)
    with folder() as here:
        path = here / "vae.safetensors"
        save_file({name: t.contiguous() for name, t in vae.state_dict().items()}, path, vae.metadata())
        for load in LinearVAE.from_pretrained, TinyVAE.from_pretrained, load_vae:
            back = load(path)
            assert back.config == vae.config and same(back.state_dict(), vae.state_dict())
            assert back.latent_std.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5] and not back.training
        assert_error(UserError, "vae.safetensors: a LinearVAE, not a WanVAE", WanVAE.from_pretrained, path)
        saved(path, new_vae())
        assert_error(UserError, "vae.safetensors: a TinyVAE, not a LinearVAE", LinearVAE.from_pretrained, path)


# ----------------------------------------------------------------------------------------------------------------------
# The VAE of Wan, small.

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
    own = lifted("vae.py", "FRAMES", "check_video", "WanVAEConfig", "STATISTICS", "CausalConv", "TimeConv", "Causal",
                 "each_frame", "channels_to_frames", "enlarging", "PerFrame", "Enlarge", "ChannelNorm", "ResBlock",
                 "Attention", "DownStage", "UpStage", "downsample", "upsample", "res_blocks", "middle", "head", "build_wan_encoder", "build_wan_decoder", "columns_first", "WanVAE",
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
# Training: the tools, the losses, the stages.

def grouped(clips):
    """Of 88 tracks, 8 on each of three objects and 64 on the ground: (clips, 88)."""
    group = torch.cat([torch.arange(3).repeat_interleave(8), torch.full((64,), -1)])
    return group.expand(clips, -1)


def test_user_tracks_are_among_the_visible_ones():
    torch.manual_seed(0)
    visible = rand(64, 45, 88) > -1
    kept = td.user_tracks(visible, grouped(64))
    share = kept.float().mean((1, 2)) / visible.float().mean((1, 2))
    assert not (kept & ~visible).any() and share.min() < 0.05 and share.max() > 0.6 and 0.1 < share.mean() < 0.6


def test_a_user_draws_on_some_objects_rather_at_their_centre():
    torch.manual_seed(0)
    visible = torch.ones(400, 9, 88).bool()
    drawn = td.user_tracks(visible, grouped(400)).any(1)                    # (B, N)
    objects = drawn[:, :24].unflatten(1, (3, 8))
    none, one = ((objects.sum(2) == count).float().mean() for count in (0, 1))
    assert 0.08 < none < 0.17 and 0.2 < one < 0.32, (none, one)             # 1 and 2 of 8 draws
    singles = objects[objects.sum(2) == 1]
    assert 0.2 < singles[:, 0].float().mean() < 0.5, "the centre is 1 of 8, and chosen more often"


def test_a_learner_moves_every_parameter_of_the_model_itself():
    for model, loss in ((new_model(), lambda m: m(clip_of(2)[0], torch.ones(2), **on_tracks(m)).square().mean()),
                        (new_vae(), lambda m: m.decode_unclamped(m.encode(rand(1, 3, 9, 8, 8)))[0].square().mean())):
        before = {name: p.clone() for name, p in model.requires_grad_(True).named_parameters()}
        learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9))
        (muon, _), (adam, _) = learner.optimizers
        hidden, rest = (optimizer.param_groups[0]["params"] for optimizer in (muon, adam))
        assert len(hidden) + len(rest) == len(before) and all(p.ndim > 1 for p in hidden)
        learner.step(loss(model), 0)
        still = [name for name, p in model.named_parameters() if p.equal(before[name]) or p.grad is not None]
        assert not still, still
        assert all(a.equal(p) for a, p in zip(learner.average.parameters(), model.parameters()))  # first, a copy
        once = [p.clone() for p in model.parameters()]
        learner.step(loss(model), 10)
        for average, a, b in zip(learner.average.parameters(), once, model.parameters()):
            assert_near(average, a + (b - a) * 10 / 11, 1e-5)       # the second update counts 1 - 1 / (1 + 10)


def test_the_rate_rises_over_20_updates_stays_and_falls_to_0():
    learner = td.Learner("toy", nn.Linear(2, 2), td.Learning(None, 1e-3), updates=100)
    rates = [learner.rate_factor(count) for count in (0, 9, 19, 60, 80, 99)]
    assert_near(torch.tensor(rates), torch.tensor([0.05, 0.5, 1.0, 1.0, 0.5, 0.025]), 1e-6)
    assert td.Learner("toy", nn.Linear(2, 2), td.Learning(None, 1e-3)).rate_factor(10 ** 6) == 1


def test_muon_takes_kernels_as_matrices():
    kernel, matrix = nn.Parameter(rand(6, 4, 3, 3)), nn.Parameter(rand(6, 36))
    matrix.data = kernel.detach().flatten(1).clone()
    for p, grad in (kernel, rand(6, 4, 3, 3, seed=1)), (matrix, rand(6, 4, 3, 3, seed=1).flatten(1)):
        p.grad = grad
        td.Muon([p], 0.1, 0.01, torch.float32).step()
    assert kernel.flatten(1).equal(matrix)


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
            run = td.resolve(td.Flags(device="cpu"))
            with run.autocast():
                assert (rand(4, 4) @ rand(4, 4)).dtype == dtype
            assert "dtype" not in td.checkpoint_settings(run, "vae")
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


UNGUIDED = SimpleNamespace(guidance=(0, 0))


def gaussian(mean, std):
    """The exact velocity of flow matching for data ~ N(mean, std²), a network without guidance."""
    def velocity(x_t, sigma, text=None):
        sigma = sigma.reshape(len(x_t), 1, -1, 1, 1).to(x_t)
        x0 = mean + (1 - sigma) * std ** 2 / ((1 - sigma) ** 2 * std ** 2 + sigma ** 2) * (x_t - (1 - sigma) * mean)
        return torch.where(sigma > 0, (x_t - x0) / sigma.clamp(min=1e-9), 0)
    velocity.config = UNGUIDED
    return velocity


def test_dmd_gradient_is_critic_minus_teacher_normalised():
    torch.manual_seed(0)
    x0, first = (2 + rand(4, 3, 5, 2, 2)).requires_grad_(True), rand(4, 3, 1, 2, 2, seed=1)
    data, made = rand(4, 3, 5, 2, 2, seed=2), rand(4, 3, 5, 2, 2, seed=3)
    td.dmd_loss(x0, gaussian(data, 0), gaussian(made, 0), {}, None, 5.0).backward()   # point masses: real is data
    distance = (x0 - data).abs().mean((1, 2, 3, 4), keepdim=True)
    assert_near(x0.grad, ((made - data) / distance).detach() / x0.numel(), 1e-4)
    x0.grad = None
    td.dmd_loss(x0, gaussian(data, 0), gaussian(made, 0), {}, first, 5.0).backward()
    assert x0.grad[:, :, 0].abs().max() < 1e-7 and x0.grad[:, :, 1:].abs().min() > 0       # the image gives frame 0

    x0 = torch.zeros_like(data).requires_grad_(True)            # a perfect clip: real is x0 to the bit
    with unittest.mock.patch.object(torch, "randn_like", torch.zeros_like):
        td.dmd_loss(x0, gaussian(0, 0), gaussian(made, 0), {}, None, 5.0).backward()
    assert x0.grad.isfinite().all()

    mean = torch.tensor(2.0, requires_grad=True)                # a generator N(mean, 1), data N(-1, 1), an exact critic
    for _ in range(150):
        x0 = mean + torch.randn(8, 1, 1, 4, 4)
        td.dmd_loss(x0, gaussian(-1, 1), gaussian(mean.detach(), 1), {}, None, 5.0).backward()
        mean.data -= 0.1 * mean.grad
        mean.grad = None
    assert abs(mean + 1) < 0.1, mean


def test_generator_and_critic_are_scored_at_the_noise_levels_of_the_config():
    """A recipe's shift reaches both losses, and both draw from one distribution (uniform, shifted, clamped)."""
    seen, x0, given = [], rand(4000, 1, 2, 1, 1), {"tracks": torch.zeros(4000, 1, 2, 1, 1)}

    def net(x, sigma, tracks=None):
        seen.append(sigma[:, -1])
        return x * 0

    net.config = UNGUIDED
    for shift in 1.0, 8.0:
        seen.clear()
        td.dmd_loss(x0, net, net, given, x0[:, :, :1], shift)
        td.critic_loss(x0, net, given, x0[:, :, :1], shift)
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
    kept = []

    def loss(model, x0, sigma, conditions, first, cell_weight, channel_weight):
        kept.extend(conditions["text"].flatten(1).any(1).tolist())
        return sum(p.sum() for p in model.parameters()) * 1e-9

    with folder() as here, quiet(), without_pictures(), unittest.mock.patch.object(td, "flow_loss", loss):
        flags = own_flags(here, new_clips(here / "data"))
        run = td.resolve(td.parse_flags(flags))
        batch = td.draw_batch(run, td.open_clips(here / "data", SMALL, 12, 45), 200, 12)
        assert batch.conditions["text"].flatten(1).any(1).all()
        assert td.main([*flags, "--stage", "teacher", "--steps", "4", "--set", "batch=10"]) is None
    assert len(kept) == 4 * 10 + 3 * 10 and 0.02 < 1 - sum(kept) / len(kept) < 0.25, kept


def test_the_loss_counts_what_a_track_touches_more():
    config, tracks = SMALL, torch.full((1, 5, 2, 2), 20.0)
    tracks[0, :, 1] = torch.tensor([41.0, 25.0])
    visible = torch.zeros(1, 5, 2).bool()
    visible[0, 0, 0] = visible[0, 3, 1] = True                  # in frame 0, and in a frame of the second latent
    touched = td.touched_cells(tracks, visible, config)
    expected = torch.zeros(1, 2, 4, 6)
    expected[0, 0, 1:4, 1:4] = 1                                # cell (2, 2) and those beside it
    expected[0, 1, 2:4, 4:6] = 1                                # cell (3, 5), in the corner
    assert touched.equal(expected)
    x0, given = rand(2, 4, 3, 2, 2, seed=3), {"tracks": torch.zeros(2, 1, 3, 2, 2)}
    weight = 1 + rand(2, 3, 2, 2, seed=1).abs()
    torch.manual_seed(0)
    loss = td.flow_loss(lambda x, sigma, tracks: x * 0, x0, torch.ones(2), given, None, weight, 2.0)
    torch.manual_seed(0)
    error = 2 * (torch.randn_like(x0) - x0).square().mean(1)
    assert_near(loss, (error * weight).sum() / weight.sum(), 1e-6)


def test_a_reward_scales_each_clips_own_gradient():
    grads = []
    for weight in 1.0, torch.ones(3), torch.tensor([1.0, 0.0, math.exp(0.5 / 0.25)]):
        weight = torch.as_tensor(weight).reshape(-1, 1, 1, 1, 1)
        torch.manual_seed(0)
        x0 = rand(3, 2, 4, 2, 2).requires_grad_(True)
        td.dmd_loss(x0, gaussian(1, 0.5), gaussian(0, 1), {}, None, 5.0, weight).backward()
        grads.append(x0.grad)
    assert grads[0].equal(grads[1]) and not grads[2][1].any()
    assert_near(grads[2][0], grads[0][0], 1e-6)
    assert_near(grads[2][2], grads[0][2] * math.exp(2), 1e-6)


def test_distillation_with_a_reward_and_an_ema_sink():
    with folder() as here, quiet() as (_, err), without_pictures(), small_scenes():
        before_distillation(here)
        (here / "mine.py").write_text(
            "def reward(video, batch):\n    return video[:, 0, 0, 0, 0] * 0 + len(batch['ids'])")
        evicted, lerp = [], torch.Tensor.lerp
        with unittest.mock.patch.object(torch.Tensor, "lerp", lambda *args: evicted.append(args[2]) or lerp(*args)):
            code = td.main(["--smoke", "--stage", "distill", "--steps", "1", "--out", str(here), "--set", "sink_decay=0.75",
                            "--set", "beta=1", "--set", "export_every=1", "--rollout", "4", "--reward", f"{here}/mine.py:reward"])
        log = [json.loads(line) for line in open(here / "stats.jsonl")]
        assert code is None and [row["reward"] for row in log] == [4.0], (code, err.getvalue(), log)
        assert 1 < log[0]["loss_g"] < 1e3, log                      # it counts exp(4 / 1)
        # in two rollouts of 4 chunks, 2 layers average the keys and values of chunks 1 and 2 into the sink, chunk 0
        assert evicted.count(0.25) == 2 * 2 * 2 * 2, Counter(evicted)
        assert MotionStream.from_pretrained(here / "student.safetensors").config.sink_decay == 0.75
        assert (here / "student.00001.safetensors").exists()


def test_the_end_of_a_long_rollout_is_judged_beside_the_image_it_began_with():
    chunks, first = list(rand(2, 4, 15, 2, 3).split(3, 2)), rand(2, 4, 1, 2, 3, seed=1)
    points = {"tracks": rand(2, 57, 5, 2, seed=2), "visible": rand(2, 57, 5, seed=3) > 0, "ids": torch.arange(5)}
    x0, told = td.judged_clip(chunks[-3:], 6, first, points)
    assert x0.equal(torch.cat([first, *chunks[-2:]], 2)[:, :, [0, 2, 3, 4, 5, 6]])
    for key in "tracks", "visible":                             # 6 latents are 21 frames: the first, and the last 20
        assert told[key].equal(points[key][:, [0, *range(37, 57)]])
    assert told["ids"] is points["ids"]
    whole, same = td.judged_clip(chunks, 15, first, points)
    assert whole[:, :, 1:].equal(torch.cat(chunks, 2)[:, :, 1:]) and same["tracks"].equal(points["tracks"])


def test_half_of_the_rollouts_are_longer_than_the_teachers_clip_and_say_nothing_of_light():
    with folder() as here, quiet(), without_pictures(), small_scenes():
        before_distillation(here)
        lengths, texts, judged = [], [], []

        def made(model, noise, conditions, first, exit_step, caches):
            lengths.append(3 * len(noise))
            part = next(conditions)
            texts.append(part["text"])
            assert part["tracks"].shape[2] == noise[0].shape[2] == 3 and first.shape[2] == 1
            return iter(noise)

        def loss(x0, critic, conditions, first, shift, channel_weight):
            judged.append((x0.shape[2], conditions["tracks"].shape[2]))
            return sum(p.sum() for p in critic.parameters()) * 1.0

        with unittest.mock.patch.multiple(td, rollout=made, critic_loss=loss, dmd_loss=lambda *_: torch.zeros(())):
            with unittest.mock.patch.object(td.Learner, "step", lambda *_, **__: 0.0):
                td.main(["--smoke", "--stage", "distill", "--steps", "60", "--out", str(here), "--rollout", "6",
                         "--set", "critic_steps=1000000000"])
        assert set(lengths) == {12, 15, 18} and 15 < lengths.count(12) < 50, Counter(lengths)
        assert set(judged) == {(12, 12)}
        neutral = embed_words(td.NEUTRAL, DRAWN)
        assert all(text.equal(neutral.expand_as(text)) for text, length in zip(texts, lengths) if length > 12)
        assert not all(text.equal(neutral.expand_as(text)) for text, length in zip(texts, lengths) if length == 12)


def test_rollouts_under_drawn_memory_are_judged_as_whole_clips():
    contexts, tail, lengths = [], [], []

    def made(model, noise, conditions, first, exit_step, caches):
        contexts.append((noise[0].shape[2], caches[0].sink, caches[0].window))
        whole = torch.cat(noise, 2)
        lengths.append(whole.shape[2])
        assert next(conditions)["tracks"].shape[2] == noise[0].shape[2]
        yield from noise
        tail.append(whole[:, :, -11:].clone())

    def loss(x0, critic, conditions, first, shift, channel_weight):
        assert x0.shape[2] == 12 and x0[:, :, 1:].equal(tail[-1]), contexts[-1]
        return sum(p.sum() for p in critic.parameters()) * 1.0

    with folder() as here, quiet(), without_pictures(), small_scenes():
        before_distillation(here)
        with unittest.mock.patch.multiple(td, rollout=made, critic_loss=loss, dmd_loss=lambda *_: torch.zeros(())), \
                unittest.mock.patch.object(td.Learner, "step", lambda *_, **__: 0.0):
            td.main(["--smoke", "--stage", "distill", "--steps", "80", "--out", str(here), "--rollout", "8",
                     "--memory", "drawn", "--set", "critic_steps=1000000000"])
        drawn = {*td.DRAWN_CONTEXTS}
        assert {*contexts} < drawn and len({*contexts}) > 25 and len(drawn) == 36, Counter(contexts)
        assert {12, 24} <= {*lengths} and [{*some} for some in zip(*contexts)] == [{1, 3, 5}, {0, 1, 2, 3}, {1, 2, 4}]
        config = MotionStream.from_pretrained(here / "student.safetensors").config
        assert (config.chunk, config.sink, config.window) == (3, 1, 1), "the model's own, not the last that was drawn"


def test_a_student_is_trained_with_the_memory_that_is_asked_for():
    memories, new_caches = [], MotionStream.new_caches

    def record(model, **overrides):
        caches = new_caches(model, **overrides)
        memories.append((model.config.chunk, caches[0].sink, caches[0].window))
        return caches

    with folder() as here, unittest.mock.patch.object(MotionStream, "new_caches", record), \
            unittest.mock.patch.object(td, "CONTEXTS", ()):     # of its own memory alone
        new_clips(here / "data", 1, 69)
        for name, wanted, more in (("c2s3wfull", (2, 3, None), ("--rollout", "8")), ("c1s1w2", (1, 1, 2), ()),
                                   ("c5s1w1", (5, 1, 1), ("--set", "clip_frames=57")), ("c12s1w1", (12, 1, 1), ())):
            flags = own_flags(here, here / "data", "--memory", name, *more, "--out", str(here / "runs" / name))
            (here / "runs" / name).mkdir(parents=True)
            saved(here / "runs" / name / "teacher.safetensors", new_model(causal=False, steps=3))
            with quiet() as (_, err):
                for stage in "causal", "distill":
                    assert td.main([*flags, "--stage", stage, "--steps", "1"]) is None, (name, err.getvalue())
            assert len(memories) > 2 and {*memories} == {wanted}, memories
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
        chunks = rollout(generator, noise, given, first, exit_step=1)
        loss(torch.cat(list(chunks), 2)).backward()
        return [net for net in nets if any(p.grad is not None and p.grad.any() for p in net.parameters())]

    teacher.config = replace(teacher.config, guidance=(3.0, 1.5))
    assert moved(lambda x0: td.dmd_loss(x0, teacher, critic, given, first, 5.0)) == [generator]
    assert calls == [(teacher, 6), (critic, 2)]                 # three evaluations guide the teacher, none the critic
    assert moved(lambda x0: td.critic_loss(x0, critic, given, first, 5.0)) == [critic] and calls == [(critic, 2)]


def test_flow_loss_is_zero_for_the_exact_velocity_and_leaves_the_image_out():
    x0 = rand(3, 4, 5, 2, 2)

    def exact(x_t, sigma, tracks):
        assert x_t[:, :, 0].equal(x0[:, :, 0]) and (sigma[:, 0] == 0).all()
        v = (x_t - x0) / sigma[:, None, :, None, None].clamp(min=1e-9)
        return torch.cat([v[:, :, :1] + 99, v[:, :, 1:]], 2)

    given = {"tracks": rand(3, 1, 5, 2, 2) > 0}
    assert td.flow_loss(exact, x0, torch.tensor([0.3, 0.8, 1.0]), given, x0[:, :, :1]) < 1e-9
    assert td.flow_loss(lambda x, sigma, tracks: x * 0, x0, torch.ones(3), given, x0[:, :, :1]) > 1


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


def test_causal_training_has_the_ema_sink_that_sampling_has():
    """Of chunks 0 to 3, the last one reads a sink that has absorbed chunk 1."""
    model, (x0, given, _) = new_model(), clip_of(12)
    states = [x0 + 0.1 * rand(*x0.shape, seed=i) for i in range(3)]
    losses = {}
    for decay, context in itertools.product((1.0, 0.5), ((1, 1), (0, 1), (1, None))):
        model.config = replace(SMALL, sink_decay=decay)
        torch.manual_seed(0)
        losses[decay, context] = td.causal_loss(model, states, x0, x0, given, context).item()
    assert losses[1.0, (1, 1)] != losses[0.5, (1, 1)]
    for context in (0, 1), (1, None):                           # nothing is absorbed
        assert losses[1.0, context] == losses[0.5, context]


def test_a_corrupted_context_shows_frame_0_in_a_rectangle_of_half_of_the_clips():
    x0 = rand(400, 2, 6, 8, 8)
    torch.manual_seed(0)
    past = td.corrupt_context(x0, 3)
    changed = (past != x0).any(1)                                                     # (B, F, h, w)
    assert not changed[:, :3].any() and changed[:, 3:].any((2, 3)).float().mean() > 0.3
    assert past.movedim(1, -1)[changed].equal(x0[:, :, :1].expand_as(x0).movedim(1, -1)[changed])
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


@contextlib.contextmanager
def counting_reductions():
    """Notes in a list each time that FSDP reduces gradients."""
    name = "reduce_scatter_single"
    if not hasattr(td.dist, name):                              # torch before 2.12
        name = "reduce_scatter_tensor"
    reduced, reduce = [], getattr(td.dist, name)

    def note(*args, **kwargs):
        reduced.append(name)
        return reduce(*args, **kwargs)

    with unittest.mock.patch.object(td.dist, name, note):
        yield reduced


def toy_training(here, stop_at=None, nan_at=None, steps=6, save_every=300, batches=1, **settings):
    """Some steps of a small model; its parameters and what was logged. Leaves the model and all gradients behind."""
    model = new_model().requires_grad_(True)
    learner = td.Learner("toy", model, td.Learning(1e-2, 1e-2, ema=0.9), updates=steps // batches, accumulate=batches)
    toy_training.model, toy_training.gradients = model, []
    clock = itertools.count(0, 301 if save_every == 1 else 0)
    run = SimpleNamespace(out=here, seed=1, dtype=torch.float32, settings=td.TINY)
    told = {"data": "toy", "seed": 1} | settings
    with quiet() as (toy_training.said, _), unittest.mock.patch.object(td.time, "time", lambda: next(clock)), \
            unittest.mock.patch.object(td, "checkpoint_settings", lambda run, stage: told), \
            keeping_gradients(toy_training.gradients):
        loop = td.Loop(run, "toy", steps, learner)
        for i in loop:
            if i == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = toy_loss(model)
            loss = loss * math.nan if i == nan_at else loss
            loop.log(loss=loss, grad=learner.step(loss, i))
    log = [json.loads(line)["loss"] for line in open(here / "stats.jsonl")]
    states = {f"{net}.{name}": whole(p).clone() for net, module in (("model", model), ("average", learner.average))
              for name, p in module.state_dict().items()}
    return states, log, toy_training.said.getvalue()


def toy_loss(model):
    x0 = torch.randn(2, 4, 2, 4, 6)
    return td.flow_loss(model, x0, torch.rand(2), on_tracks(model), x0[:, :, :1])


def test_an_interrupted_training_continues_with_the_same_bits_and_no_other_settings():
    with folder() as one, folder() as two:
        whole, log, _ = toy_training(one)
        assert_error(SystemExit, "143", toy_training, two, stop_at=2)
        assert "saved at step 3; the same command goes on\n" in toy_training.said.getvalue()
        with open(two / "stats.jsonl", "a") as file:                # as if killed at step 4, after the checkpoint
            file.write('{"stage": "toy", "step": 3, "loss": 1}\n{"stage": "other", "step": 9, "loss": 1}\n{"sta')
        assert_error(td.UserError, "of other settings (data toy, now else);", toy_training, two, data="else")
        assert_error(td.UserError, "(steps 6, now 7; seed 1, now 2);", toy_training, two, steps=7, seed=2)
        resumed, resumed_log, _ = toy_training(two)
        assert same(whole, resumed)
        assert resumed_log[:3] + resumed_log[4:] == log and len(log) == 6, "each step once; another stage's stays"


def vae_gradients():
    """Of an update by two steps, of one process or of two."""
    vae = new_vae().requires_grad_(True)
    learner = td.Learner("vae", vae, td.Learning(1e-3, 1e-3), accumulate=2)
    with keeping_gradients(gradients := []):
        for i in range(td.RANK, 2, td.PROCESSES):
            learner.step(vae.decode_unclamped(vae.encode(rand(1, 3, 9, 8, 8, seed=i)))[0].square().mean(), i)
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
            with test.counting_reductions() as reduced:
                whole, _, said = test.toy_training(test.Path(folder), steps=14, batches=4)
            sharded = [(p.to_local().numel(), p.numel()) for p in test.toy_training.model.parameters()]
            results = test.toy_training.gradients, whole, said, sharded, len(reduced), test.vae_gradients()
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
            toy_loss(model).backward()
        for p, mean in zip(model.parameters(), gradients[0], strict=True):
            assert_near(mean, p.grad / 4, 1e-5)
        for path, rank in itertools.product((two, both), range(2)):     # three updates; what one began, two take over
            theirs, went, said, sharded, reduced, theirs_of_vae = torch.load(path / f"results{rank}.pt")
            assert ("resumed at step 8" in said) == (path == both and rank == 0)
            assert reduced == len(theirs) * 4, "once an update: two blocks, the track head, the rest"
            assert_same_gradients(gradients[2 if path == both else 0:], theirs)
            assert_same_gradients(of_vae, theirs_of_vae)
            assert_moved_alike(start, whole, went)
            assert sum(part for part, _ in sharded) < 0.6 * sum(size for _, size in sharded), sharded
        rows, theirs = ([json.loads(line) for line in open(path / "stats.jsonl")] for path in (one, two))
        assert len(log) == 12 and [row["step"] for row in theirs] == [*range(0, 12, 2)]         # process 0 writes
        ours, theirs = (torch.tensor([row["grad"] for row in log if "grad" in row]) for log in (rows, theirs))
        assert_near(ours, theirs, 1e-3)
        ours, theirs = (torch.load(path / "toy.0000012.checkpoint.pt") for path in (one, two))
        ours, theirs = (saved["learners"]["toy"]["optimizer"]["state"] for saved in (ours, theirs))
        for name, state in ours.items():
            for key, value in state.items():
                assert_near(theirs[name][key], value, 0.01)
        _, _, said = toy_training(two, steps=14, batches=4)             # what two began, one takes over
        assert "resumed at step 12" in said


def without_pictures():
    """train_distill.main draws no previews in here."""
    return unittest.mock.patch.object(td, "show", lambda *_: None)


def distilled(flags):
    """The gradients of a distillation on small_scenes in float32."""
    with quiet(), keeping_gradients(gradients := []), without_pictures(), small_scenes(), \
            unittest.mock.patch.object(td, "cpu_dtype", lambda: torch.float32):
        assert td.main(flags) is None
    return gradients


def test_blocks_that_are_recomputed_give_the_same_losses_and_gradients():
    noise, given, first = clip_of(15)                           # five chunks: the cache forgets the second and third

    def bidirectional(model):
        torch.manual_seed(0)
        return td.flow_loss(model, noise, torch.tensor([0.3, 0.9]), given, first)

    def streamed(model):
        chunks = rollout(model, noise, given, first, exit_step=1, rng=seeded())
        return torch.cat(list(chunks), 2).square().mean()

    for loss in bidirectional, streamed:
        results = []
        for checkpointing in False, True:
            model, runs = new_model().requires_grad_(True), []
            learner = td.Learner("toy", model, td.Learning(1e-3, 1e-3, ema=0.9), accumulate=2)
            if checkpointing:
                td.recompute_blocks(model)
            for block in model.blocks:
                block.ffn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
            value = loss(model)
            forwards = runs.count(True)
            learner.step(2 * value, 0)                        # half of an update: the gradients stay
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
        assert "saved at step 5" in toy_training.said.getvalue()
        names = sorted(path.name for path in two.glob("*.pt"))
        assert names == ["toy.0000004.checkpoint.pt", "toy.0000005.checkpoint.pt"], names      # the last two
        newest = two / names[1]
        newest.write_bytes(newest.read_bytes()[:1000])
        resumed, log, said = toy_training(two)
        assert "0000005.checkpoint.pt: damaged" in said and "0000004.checkpoint.pt: resumed at step 4" in said, said
        assert same(whole, resumed) and len(log) == 6 and (two / "toy.0000005.checkpoint.damaged").exists()


def linear_learner():
    model = nn.Linear(3, 2)
    learner = td.Learner("toy", model, td.Learning(None, 1e-3, ema=0.9))
    learner.step(model(torch.ones(1, 3)).sum(), 0)
    return learner


def mutated(data, rng):
    """A copy of bytes with a bit flipped, a part zeroed, cut off, doubled or from elsewhere."""
    data = bytearray(data)
    at, length = rng.randrange(len(data)), rng.randrange(1, 200)
    piece = data[at:at + length]
    change = rng.randrange(6)
    if change < 2:
        data[at] ^= 1 << rng.randrange(8)
    elif change == 2:
        data[at:at + length] = bytes(len(piece))
    elif change == 3:
        del data[at:]
    elif change == 4:
        data[at:at] = piece
    else:
        data[at:at + length] = data[:length]
    return bytes(data)


def assert_whole_or_the_one_before(here, written, second, saved):
    """What td.newest_checkpoint makes of `saved` in the place of the second checkpoint of two, which held `written`."""
    second.write_bytes(saved)
    with quiet() as (out, _):
        path, (step, _, states) = td.newest_checkpoint(here, "toy")
    if step == 2:                                                   # what has changed is not read
        assert path == second and same(states["toy"]["model"], written), saved
        return
    assert step == 1 and out.getvalue().count("\n") == 1 and f"{second}: damaged (" in out.getvalue(), out.getvalue()
    assert not second.exists()


def test_whatever_happens_to_a_checkpoint_it_is_as_written_or_the_one_before_is_taken():
    with folder() as here:
        learner = linear_learner()
        for step in 1, 2:
            td.save_checkpoint(here, "toy", step, {}, [learner])
        other = td.Learner("toy", nn.Linear(4, 2), td.Learning(None, 1e-3))
        assert_error(td.UserError, "step 2: of another toy; ", td.load_checkpoint, here, "toy", {}, [other])
        second, written = here / "toy.0000002.checkpoint.pt", copy.deepcopy(learner.state_dict()["model"])
        whole = second.read_bytes()
        flipped = bytearray(whole)
        at = whole.index(written["weight"].numpy().tobytes())       # one bit of a weight
        flipped[at] ^= 1
        assert_whole_or_the_one_before(here, written, second, bytes(flipped))
        assert (here / "toy.0000002.checkpoint.damaged").exists()
        for seed in range(30):
            assert_whole_or_the_one_before(here, written, second, mutated(whole, random.Random(seed)))
        for path in here.glob("*.checkpoint.pt"):
            path.write_bytes(path.read_bytes()[:500])
        there = sorted(here.iterdir())
        with quiet():
            assert_error(td.UserError, "no other checkpoint of the stage toy is whole", td.newest_checkpoint, here, "toy")
        assert sorted(here.iterdir()) == there, "nothing is removed"


def test_a_folder_is_that_of_one_training_until_it_ends_even_by_a_crash():
    with folder() as here:
        left, kept = [".toy.0000003.checkpoint.pt.12.part", "latents.1/a/.b.safetensors.12.part"], [".x.mp4.12.part"]
        for name in left + kept:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).touch()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            with td.own_folder(here):
                os.write(told, b"!")
                time.sleep(60)
        try:
            os.read(ready, 1)
            assert not any((here / name).exists() for name in left) and all((here / name).exists() for name in kept)
            (here / left[0]).touch()
            owned = td.own_folder(here)
            assert_error(td.UserError, f"{here}: process {child} on ", owned.__enter__)
            assert (here / left[0]).exists(), "the other may be writing it"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with td.own_folder(here):
            assert not (here / left[0]).exists() and (here / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_checkpoints_are_as_often_as_is_said_and_how_often_may_change():
    for minutes, saved in (5, [5]), (1.6, [2, 4, 5]):
        now, steps = [0], []
        with folder() as here, quiet(), unittest.mock.patch.multiple(
                td, checkpoint_settings=lambda *_: {}, save_checkpoint=lambda *args: steps.append(args[2])), \
                unittest.mock.patch.object(td.time, "time", lambda: now[0]):
            settings = replace(td.TINY, checkpoint_minutes=minutes)
            run = SimpleNamespace(out=here, seed=1, dtype=torch.float32, settings=settings)
            for _ in td.Loop(run, "toy", 5, linear_learner()):
                now[0] += 50                                            # seconds
        assert steps == saved, (minutes, steps)
    told = td.checkpoint_settings(td.resolve(td.Flags(device="cpu")), "vae")
    assert not told.keys() & {"checkpoint_minutes", "export_every", "tflops"} and "batch" in told


def test_weights_of_some_updates_are_kept_to_choose_from():
    with folder() as here:
        run = td.resolve(td.Flags(device="cpu", out=here, set=(("export_every", 2),)))
        model = new_model()
        for update in range(1, 6):
            td.export_weights(run, model, update)
        assert sorted(path.name for path in here.iterdir()) == ["student.00002.safetensors", "student.00004.safetensors"]
        ours = MotionStream.from_pretrained(here / "student.00004.safetensors")
        assert same({name: p.half() for name, p in model.state_dict().items()},
                    {name: p.half() for name, p in ours.state_dict().items()})


def test_the_first_lines_of_a_training_are_a_table():
    with folder() as here, quiet() as (out, _):
        run = td.resolve(td.Flags(device="cpu", out=here, set=(("batch", 2), ("teacher_steps", 700))))
        rows = [{"stage": "teacher", "step": i, "seconds": 100 if i < 40 else 3.6} for i in range(200)]
        (here / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage')
        td.print_plan(run, ["teacher", "distill"])
        said = out.getvalue()
        assert f"| teacher | 700 | 200 | 0.5 | {here / 'teacher.safetensors'} |" in said, said
        assert f"| distill | 1,200 | - | - | {here / 'student.safetensors'} |" in said, said
        assert "not as usual: batch=2, teacher_steps=700\n" in said and f"{here / 'STAGE.png'}" in said, said
        assert "Config(" not in said and "Learning(" not in said and len(said.splitlines()) < 12, said


def test_threads_wait_briefly_unless_the_user_says_how():
    source = "".join(itertools.takewhile(lambda line: "numpy" not in line, open(HERE / "sample.py").readlines()))
    for given, count in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None):
        with unittest.mock.patch.dict(os.environ, given):
            for name in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - given.keys():
                os.environ.pop(name, None)
            exec(source, {})
            assert os.environ.get("GOMP_SPINCOUNT") == count, given
    order = [line.split()[1] for line in open(HERE / "train_distill.py") if line.startswith(("import ", "from "))]
    assert order.index("sample") < order.index("torch"), "torch reads it when it is loaded"


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
            assert_error(OSError, "x.safetensors: ", td.write_clip, here / "pool/x.safetensors",
                         {"a": torch.zeros(50_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((here / "pool").iterdir())
        (here / "pool").rmdir()
        assert [path.name for path in here.iterdir() if path.suffix != ".jsonl"] == ["toy.0000003.checkpoint.pt"]
        assert "resumed at step 3" in toy_training(here)[2]


def new_clips(here, count=3, frames=45, config=SMALL, track_frames=None, **more):
    """A folder of `count` clips, random latents, whose tracks outlast them to track_frames. more: tensors of all."""
    h, w = config.latent_size
    for i in range(count):
        N, T = 4 + i, track_frames or frames
        tracks = rand(T, N, 2, seed=i) * 6 + 18
        td.write_clip(here / f"{i}.safetensors", {
            "latents": rand(config.out_dim, (frames + 3) // 4, h, w, seed=i).half(), "tracks": tracks,
            "visible": rand(T, N, seed=i) > 0, "group": torch.full((N,), -1),
            "text": rand(2 + i, config.text_dim, seed=i)} | more)
    return here


def video_clips(here, count=3, frames=45, config=SMALL):
    """As new_clips, with video in place of latents."""
    for file in new_clips(here, count, frames, config).iterdir():
        clip = load_file(file)
        clip.pop("latents")
        noise = torch.rand(3, frames, *config.size, generator=seeded(int(file.stem)))
        td.write_clip(file, clip | {"video": (noise * 255).byte()})
    return here


def test_batches_are_of_random_clips_padded_with_hidden_tracks_and_empty_text():
    with folder() as here:
        files = td.open_clips(new_clips(here / "data", 3, 57, track_frames=93), SMALL, 12, 45)
        clips = [load_file(file) for file in files]
        torch.manual_seed(0)
        batch = td.pick(files, 30, 6, 21)
        assert batch["latents"].shape == (30, 4, 6, 4, 6) and batch["tracks"].shape == (30, 21, 6, 2)
        assert batch["text"].shape == (30, 4, 12) and batch["visible"].shape == (30, 21, 6)
        found = Counter()
        for b in range(30):
            i, = (i for i in range(3) if clips[i]["latents"][:, :6].equal(batch["latents"][b]))
            found[i] += 1
            N, L = 4 + i, 2 + i
            assert batch["tracks"][b, :, :N].equal(clips[i]["tracks"][:21])
            assert batch["visible"][b, :, :N].equal(clips[i]["visible"][:21]) and not batch["visible"][b, :, N:].any()
            assert batch["text"][b, :L].equal(clips[i]["text"]) and not batch["text"][b, L:].any()
            assert (batch["group"][b] == -1).all()
        assert min(found[i] for i in range(3)) > 4, found


def test_which_tracks_a_batch_gets_depends_on_the_clips_alone():
    with folder() as here:
        plain = new_clips(here / "plain")
        drawn = new_clips(here / "drawn", group=torch.tensor([0, 0, -1, -1]), tracks=rand(45, 4, 2) * 6 + 18,
                          visible=torch.ones(45, 4).bool())
        run = td.resolve(td.Flags(device="cpu", out=here))
        run = replace(run, config=replace(SMALL, causal=False))
        for data, user in (plain, 0), (drawn, 1):
            with unittest.mock.patch.object(td, "user_tracks", wraps=td.user_tracks) as by_user, \
                    unittest.mock.patch.object(td, "dense_subset", wraps=td.dense_subset) as dense:
                batch = td.draw_batch(run, sorted(data.iterdir()), 8, 12)
                assert (by_user.call_count, dense.call_count) == (user, 1 - user)
        everything = td.draw_batch(run, sorted(drawn.iterdir()), 8, 12, dense=True)
        assert everything.points["visible"].all() and batch.latents.shape == (8, 4, 12, 4, 6)
        on_object = td.touched_cells(everything.points["tracks"][:, :, :2], torch.ones(8, 45, 2).bool(), SMALL)
        assert everything.touched.equal(on_object), "all of an object counts, the ground does not"
        first = td.draw_batch(run, sorted(drawn.iterdir()), 8, 12, first_only=True)
        assert first.latents.shape == (8, 4, 1, 4, 6) and first.points["tracks"].shape[1] == 45


def test_clips_that_hold_video_are_encoded_once():
    with folder() as here, quiet():
        flags = own_flags(here, video_clips(here / "data"))
        run = td.resolve(td.parse_flags(flags))
        files = td.training_clips(run, 12)
        vae = new_vae()
        for file, source in zip(files, sorted((here / "data").iterdir()), strict=True):
            clip, given = load_file(file), load_file(source)
            with torch.no_grad():
                latents = vae.encode(given["video"][None] / 127.5 - 1)[0].half()
            assert clip["latents"].equal(latents) and clip["first"].equal(given["video"][:, 0])
            assert {*clip} ^ {*given} == {"latents", "first", "video"}
        with unittest.mock.patch.object(td, "encode_video", None):                      # none is encoded again
            assert td.training_clips(run, 12) == files
        (here / "data/0.safetensors").write_bytes((here / "data/1.safetensors").read_bytes())
        assert td.training_clips(run, 12)[0] != files[0], "other clips"


def test_drawn_clips_are_the_same_whether_they_are_encoded_while_drawn_or_later():
    with folder() as here, quiet(), small_scenes():
        before_distillation(here)
        drawn = td.resolve(td.Flags(smoke=True, out=here, device="cpu", set=(("clips", 2),)))
        files = td.training_clips(drawn, 12)
        assert td.training_clips(drawn, 12) == files and len(files) == 2
        videos = td.rendered_clips(drawn, "clips", 2)                                   # the same, not encoded
        clip, video = load_file(files[0]), load_file(videos[0])
        with torch.no_grad():
            latents = drawn.load_vae().encode(video["video"][None] / 127.5 - 1)[0].half()
        assert_near(clip["latents"], latents, 2e-3)                     # drawn by one thread, here there may be more
        assert clip["first"].equal(video["video"][:, 0])
        assert clip["tracks"].equal(video["tracks"]) and clip["tracks"].shape[0] == 189, "those of 16 chunks"


def test_what_is_made_is_named_by_what_made_it():
    with folder() as here, quiet(), small_scenes():
        before_distillation(here)
        vaes = [randomised(new_vae(replace(SMALL_VAE, latent_channels=16)), seed) for seed in (0, 1)]

        def made(weights=0, **flags):
            saved(here / "vae.safetensors", vaes[weights], anything=str(time.time()))
            run = td.resolve(td.Flags(smoke=True, out=here, device="cpu", **flags))
            with unittest.mock.patch("extras.world.write_clips", lambda folder, *_, **__: folder.mkdir(exist_ok=True)):
                td.training_clips(run, 12)
            folders = {path for path in here.iterdir() if path.is_dir()}
            return folders, td.checkpoint_settings(run, "teacher")

        first = made()
        assert made() == first and len(first[0]) == 1
        assert len(made(set=(("clips", 40),))[0]) == 1, "what is there stays"
        for count, other in enumerate([{"weights": 1}, {"seed": 1}, {"rollout": 20}], 2):
            folders, settings = made(**other)
            assert len(folders) == count and settings != first[1], other


def test_data_is_told_by_what_it_holds_and_not_by_age_or_place():
    def told(data):
        run = td.resolve(td.parse_flags(own_flags(here, data)))
        return td.checkpoint_settings(run, "teacher"), td.training_clips(run, 12)

    with folder() as here, quiet():
        data = video_clips(here / "data", 3)
        was, files = told(data)
        for file in data.iterdir():
            os.utime(file, (1, 1))                                  # touched
        clip = load_file(data / "1.safetensors")
        td.write(data / "1.safetensors", functools.partial(td.save_file, clip, metadata={"source": "of a touched text"}))
        assert told(data) == (was, files)
        shutil.copytree(data, here / "moved/clips")
        with unittest.mock.patch.object(td, "encode_video", None):                      # none is encoded again
            assert told(here / "moved/clips") == (was, files)
        with unittest.mock.patch.object(td, "content_digest", None):                    # nor read again
            td.read_digests(here / "moved/clips", here / "runs/out/clips.json")
        clip["text"][-1] += 1e-3
        td.write_clip(data / "1.safetensors", clip)
        (data / "2.safetensors").rename(data / "3.safetensors")
        now, others = told(data)
        assert td.differences(was, now) == ["data/1.safetensors has changed", "data/2.safetensors is gone",
                                            "data/3.safetensors is new"]
        assert others[0] == files[0] and others[1] != files[1], "what has changed is encoded again"
        start, copied = here / "start.safetensors", here / "copied.safetensors"
        shutil.copy(start, copied)
        assert td.weight_digests(start) == td.weight_digests(copied)
        assert td.weight_digests(start) != td.weight_digests(saved(copied, randomised(new_model(causal=False), 1)))
        index = shards(here, public())
        assert len(td.weight_digests(index)) == 3
        assert td.weight_digests(index) == td.weight_digests(next(here.glob("*-00001-of-*")))


def test_a_large_tensor_is_told_by_pieces_from_its_first_byte_to_its_last():
    with folder() as here:
        tensor, path = torch.zeros(2 ** 20), here / "a.safetensors"
        digests = set()
        for at in None, 0, 1023, 2 ** 20 - 1:
            changed = tensor.clone()
            if at is not None:
                changed[at] = 1
            save_file({"a": changed}, path)
            digests.add(td.content_digest(path))
        save_file({"a": tensor.reshape(2 ** 10, 2 ** 10)}, path)
        digests.add(td.content_digest(path))
        torch.save(tensor, here / "a.pt")
        digests.add(td.content_digest(here / "a.pt"))
        assert len(digests) == 6
        path.write_bytes(path.read_bytes()[:40])
        assert_error(td.UserError, f"{path}: damaged", td.content_digest, path)


def test_processes_wait_equally_often_whatever_each_has_to_make():
    waits, made = [], []

    def wrote(path, clip):
        made.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    for rank in 0, 1:                                               # one batch of trajectories, which process 0 makes
        waits.clear()
        made.clear()
        with folder() as here, quiet():
            flags = own_flags(here, new_clips(here / "data"), "--set", "trajectories=8")
            run = td.resolve(td.parse_flags(flags))
            saved(here / "teacher.safetensors", new_model(causal=False, steps=3))
            run = replace(run, files=run.files | {"teacher": here / "teacher.safetensors"})
            with unittest.mock.patch.multiple(td, PROCESSES=2, RANK=rank, wait_for_all=waits.append,
                                               from_first=lambda value: value or {}, write_clip=wrote):
                files = td.training_clips(run, 12)
                files = td.make_trajectories(run, files)
        assert len(files) == 8 and waits == 4 * [td.LATE] and len(made) == (0 if rank else 8), (rank, waits, made)


def trained(here, flags, stages):
    """One step of each stage of a training; what was logged, by stage."""
    with quiet() as (out, err):
        for stage in stages:
            assert td.main([*flags, "--stage", stage, "--steps", "1", "--accumulate", "1"]) is None, err.getvalue()
    rows = [json.loads(line) for line in open(Path(flags[flags.index("--out") + 1]) / "stats.jsonl")]
    return {row["stage"]: row for row in rows}, out.getvalue()


def test_every_stage_runs_on_a_folder_of_clips():
    with folder() as here, unittest.mock.patch.object(td, "rendered_clips", None):          # nothing is drawn
        flags = own_flags(here, new_clips(here / "data"))
        log, _ = trained(here, flags, ("teacher", "causal", "distill"))
        assert all(math.isfinite(row["grad_c" if stage == "distill" else "grad"]) for stage, row in log.items()), log
        config = MotionStream.from_pretrained(here / "runs/out/student.safetensors").config
        assert config == replace(SMALL, causal=True)


def test_the_vae_is_trained_on_clips_that_hold_video():
    small = replace(DRAWN, out_dim=96, in_dim=96 + 16)
    with folder() as here, unittest.mock.patch.dict(PRESETS, tiny=small), without_pictures():
        flags = ["--data", str(video_clips(here / "data", config=small)), "--out", str(here / "out"), "--smoke"]
        log, _ = trained(here, flags, ("vae", "teacher"))
        assert log["vae"]["psnr"] > 8 and math.isfinite(log["teacher"]["loss"]), log
        vae = load_vae(here / "out/vae.safetensors")
        assert isinstance(vae, LinearVAE) and 0.6 <= vae.latent_std.min() < vae.latent_std.max() <= 2


def test_clips_may_be_longer():
    with folder() as here:
        flags = own_flags(here, new_clips(here / "data", frames=69), "--set", "clip_frames=57")
        with unittest.mock.patch.object(td, "flow_loss", wraps=td.flow_loss) as loss:
            trained(here, flags, ("teacher", "causal", "distill"))
        assert {call.args[1].shape[2] for call in loss.call_args_list} == {15}, "57 frames are 15 latents"
        changed = [word if word != "clip_frames=57" else "clip_frames=69" for word in flags]
        with quiet() as (_, err):
            assert td.main([*changed, "--stage", "distill", "--steps", "1"]) == 2
        assert "of other settings (clip_frames 57, now 69" in err.getvalue(), err.getvalue()


def test_long_rollouts_start_from_the_first_latents_of_clips_and_pictures_are_enough():
    with folder() as here:
        flags = own_flags(here, new_clips(here / "data", frames=1, track_frames=93), "--rollout", "8")
        (here / "runs/out").mkdir(parents=True)
        for name in "teacher", "causal":
            saved(here / "runs/out" / f"{name}.safetensors", new_model(causal=name == "causal"))
        lengths, judged_clip = [], td.judged_clip

        def record(chunks, frames, first, points):
            lengths.append(first.shape[2] if first is not None else 0)
            x0, points = judged_clip(chunks, frames, first, points)
            assert x0.shape[2] == 12, "the teacher knows 12 latents"
            return x0, points

        with quiet() as (_, err), unittest.mock.patch.object(td, "judged_clip", record):
            assert td.main([*flags, "--stage", "distill", "--steps", "6"]) is None, err.getvalue()
            assert td.main([*flags, "--stage", "teacher", "--steps", "1"]) == 2
        assert {*lengths} == {1} and "data: 3 clips, none of 45 frames" in err.getvalue(), err.getvalue()


def test_every_stage_runs_from_weights_of_wan_in_the_papers_two_stages_of_the_teacher():
    calls, judged, masks, forward, subset, dmd_loss = [], [], [], MotionStream.forward, td.dense_subset, td.dmd_loss

    def record(model, x, sigma, text=None, **given):
        calls.append((sigma.clone(), text, given))
        return forward(model, x, sigma, text, **given)

    assert {*schedule(3, 6.0)} < {*schedule(48, 6.0)}               # here the teacher takes these three steps alone

    def few(model, *args):
        model.config = replace(model.config, steps=3)
        return euler(model, *args)

    with folder() as here, unittest.mock.patch.multiple(
            td, dense_subset=lambda visible, pauses, chunk: masks.append(pauses) or subset(visible, pauses, chunk), euler=few), \
            unittest.mock.patch.object(MotionStream, "forward", record):
        c = replace(STUB, in_dim=32, clip_dim=32, size=(32, 48), clean_first=False)
        data = new_clips(here / "data", 2, 81, replace(c, text_dim=4096), clip=rand(257, 32))
        saved(here / "wan.safetensors", randomised(MotionStream(c))), saved(here / "vae.safetensors", new_vae(STUB_VAE))
        flags = ["--smoke", "--data", str(data), "--weights", str(here / "wan.safetensors"), "--vae",
                 str(here / "vae.safetensors"), "--out", str(here / "out")]
        log, _ = trained(here, flags, ("teacher",))
        first = MotionStream.from_pretrained(here / "out" / "teacher.safetensors")
        state = torch.load(*(here / "out").glob("teacher.*.pt"), weights_only=True)
        moments = state["learners"]["teacher"]["optimizer"]["state"]
        assert moments and all("exp_avg" in moment for moment in moments.values()), "AdamW alone"
        assert first.config == replace(c, in_dim=48, track_dim=16, shift=6.0, sigmas=schedule(3, 6.0), steps=48)
        assert masks == [False] and (calls[0][0] > 0).all()         # no frame is clean: the image is in channels
        assert calls[0][2]["image"].shape == (1, 16, 21, 4, 6) and not calls[0][2]["image"][:, :, 1:].any()
        assert calls[0][1].shape[2] == 4096 and calls[0][2]["clip"].shape == (1, 257, 32)
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
        s = td.resolve(td.parse_flags(flags[1:])).settings
        steps = [(s.teacher_accumulate, s.teacher_steps), (s.causal_accumulate, s.causal_steps),
                 (s.distill_accumulate, s.distill_steps)]
        assert steps == [(128, 800 * 128), (128, 2000 * 128), (64, 400 * 5 * 64)], steps


def test_settings_are_set_by_name_and_by_type():
    run = td.resolve(td.parse_flags(["--set", "batch=2", "--set", "teacher.adam=1e-4", "--set", "track_weight=1",
                                     "--set", "eps=1e-5", "--set", "corrupt_context=False", "--guidance", "2,0.5"]))
    assert (run.settings.batch, run.settings.teacher.adam, run.settings.track_weight) == (2, 1e-4, 1)
    assert (run.config.eps, run.config.guidance, run.settings.corrupt_context) == (1e-5, (2.0, 0.5), False)
    assert run.settings.teacher.muon == td.TINY.teacher.muon
    assert {**vars(run.settings), "batch": 4, "teacher": 0, "track_weight": 4.0, "corrupt_context": True} == \
        {**vars(td.TINY), "teacher": 0}


def test_what_cannot_be_trained_is_refused_in_one_line():
    with folder() as here, quiet() as (_, err):
        data = new_clips(here / "data", 1)
        vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
        mask = saved(here / "mask.safetensors", randomised(MotionStream(replace(STUB, in_dim=36))))
        wan = saved(here / "wan.safetensors", randomised(MotionStream(STUB)))
        student, small = saved(here / "s.safetensors", new_model()), saved(here / "small.safetensors", new_vae())
        teacher = saved(here / "t.safetensors", new_model(causal=False))
        for said, *flags in [("--reward needs --stage distill", "--reward", "motion", "--stage", "teacher"),
                             ("--memory needs --stage causal or distill", "--memory", "drawn", "--stage", "teacher"),
                             ("--steps needs --stage", "--steps", "9"),
                             ("argument --memory: '3,1,1' is not like c3s1w1", "--memory", "3,1,1"),
                             ("argument --memory: c13s1w1 is not chunk 1 to 12", "--memory", "c13s1w1"),
                             ("argument --set: batch is not like field=value", "--set", "batch"),
                             ("--set batches: no such field; there are clip_frames, ", "--set", "batches=3"),
                             ("--set rate: no such field; there are muon, adam", "--set", "teacher.rate=3"),
                             ("--set batch=many: it is 4 now", "--set", "batch=many"),
                             ("--set clip_frames=80: needs whole chunks of 12, the first of 9: 45, 57,", "--set",
                              "clip_frames=80"),
                             ("--set clip_frames=45: needs whole chunks of 20, the first of 17: 57, 77,", "--memory",
                              "c5s1w1"),
                             ("50 steps of the teacher: the student's noise levels", "--set", "steps=50"),
                             ("--stage: invalid choice: 'eval'", "--stage", "eval"),
                             ("unrecognized arguments: --clips 3", "--clips", "3"),
                             ("unrecognized arguments: --adversarial 1", "--adversarial", "1"),
                             ("--device nowhere: not available here", "--device", "nowhere"),
                             ("mask.safetensors: takes the image as a clip with a mask", "--weights", mask),
                             ("s.safetensors: holds a student", "--weights", student),
                             ("wan.safetensors: give --vae FILE", "--weights", wan, "--data", data),
                             ("data: give --vae FILE", "--data", data),
                             ("data: holds latents; the stage vae", "--data", data, "--stage", "vae"),
                             ("wan.safetensors: give --data FOLDER", "--weights", wan, "--vae", vae),
                             ("no.safetensors: cannot be read (No such file", "--weights", here / "no.safetensors"),
                             ("no.safetensors: no such file", "--vae", here / "no.safetensors"),
                             ("small.safetensors: drop it, or --stage vae", "--vae", small, "--stage", "vae"),
                             ("none: no such folder", "--data", here / "none"),
                             ("vae.safetensors: no such folder", "--data", vae),
                             ("vae.safetensors: latents have 16 channels and stride 8, those of", "--weights", teacher,
                              "--vae", vae, "--data", data),
                             ("wan.safetensors: expected a complete VAE (Wan or TAEHV) checkpoint; this looks like a DiT", "--vae", wan)]:
            assert td.main([str(word) for word in ("--out", here / "out", *flags)]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last and "makes it" not in last, (said, last)


def test_what_is_wrong_with_a_folder_of_clips_is_one_line():
    def change(**more):
        return lambda file, clip: td.write_clip(file, {name: tensor for name, tensor in (clip | more).items()
                                                       if tensor is not None})

    with folder() as here, quiet() as (_, err):
        flags = own_flags(here, here / "data")
        for said, damage in [
                ("1.safetensors: damaged, or no clip", lambda file, _: file.write_bytes(b"no clip at all")),
                ("1.safetensors: text is missing, expected (None, 12)", change(text=None)),
                ("1.safetensors: latents is (5, 12, 4, 6), expected (4, None, 4, 6)", change(latents=rand(5, 12, 4, 6))),
                ("1.safetensors: video is missing", change(latents=None)),
                ("1.safetensors: tracks of 44 frames, 45 are wanted; see --rollout", change(tracks=rand(44, 5, 2))),
                ("1.safetensors: text of 6 rows, at most 5", change(text=rand(6, 12))),
                ("1.safetensors: its latents are of another VAE", lambda file, clip: save_file(clip, file, {"vae": "7"})),
                ("data: 3 clips, none of 45 frames", None), ("data: 0 clips, none of 45 frames", None)]:
            shutil.rmtree(here / "data", ignore_errors=True)
            (here / "data").mkdir()
            if damage:
                file = new_clips(here / "data") / "1.safetensors"
                damage(file, load_file(file))
            elif "3 clips" in said:
                new_clips(here / "data", frames=41, track_frames=45)
            assert td.main([*flags, "--stage", "teacher", "--steps", "1"]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last, (said, last)


def test_of_dense_tracks_a_subset_is_kept_and_pauses_spare_the_first_chunk():
    torch.manual_seed(0)
    visible = torch.ones(40, 81, 2500, dtype=torch.bool)
    kept, paused = td.dense_subset(visible, False, 3), td.dense_subset(visible, True, 3)
    count = kept[:, 0].sum(1)
    assert kept.equal(kept[:, :1].expand_as(kept)) and 1000 <= count.min() < 1200 and 2300 < count.max() <= 2500
    silent = ~paused.any(2)                                         # (B, T)
    starts = [0, *range(9, 81, 12), 81]
    chunks = torch.stack([silent[:, a:b].float().mean(1) for a, b in zip(starts, starts[1:])], 1)
    assert ((chunks == 0) | (chunks == 1)).all() and not chunks[:, 0].any() and 0.12 < chunks[:, 1:].mean() < 0.28
    assert td.dense_subset(visible[:, :, :7], False, 3).all()               # if there are few, all
    visible[:, :, 40:] = False                                      # few, and hidden ones to make up the number
    assert td.dense_subset(visible, False, 3)[:, :, :40].all()
    silent = ~td.dense_subset(visible, True, 5).any(2)              # chunks of 20 frames, the first of 17
    assert not silent[:, :17].any() and silent[:, 17:37].equal(silent[:, 17:18].expand(-1, 20)) and silent.any()


def test_a_dry_run_tells_parameters_and_costs_and_makes_nothing():
    from torch.utils.flop_counter import FlopCounterMode
    resource = importlib.import_module("resource")                  # not on Windows
    with folder() as here:
        for preset, count in ("wan2.1-1.3b", "1,418,996,800"), ("wan2.2-5b", "4,999,787,712"), ("tiny", "3,293,512"):
            with quiet() as (out, _):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                assert td.main(["--dry-run", preset, "--out", str(here / "out")]) is None
                assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000       # KiB
            assert f"\n{count}" in out.getvalue(), out.getvalue()
            said = out.getvalue()
            if preset == "wan2.1-1.3b":
                # 6 latents of 1560 tokens, 1536 wide, key and value, 30 layers, 2 bytes
                assert f"{6 * 1560 * 1536 * 2 * 30 * 2 / 2 ** 20:,.0f} MiB" in said, said
                days_of_teacher = r"\| teacher \| 614,400 \| [\d,.]+ \| ([\d.]+) \|"
                assert "| teacher | 26.4 | 10.6 | 7.9 |" in said and "| distill | 52.9 | 21.1 | 15.9 |" in said, said
                assert "| causal | 256,000 |" in said and "| clip_frames | 81 |" in said, said
                days = [re.search(days_of_teacher, said)[1]]
                for flags in ["--set", "tflops=198"], ["--memory", "c3s2w6"]:
                    with quiet() as (out, _):
                        td.main(["--dry-run", preset, "--out", str(here / "out"), *flags])
                    days.append(re.search(days_of_teacher, out.getvalue())[1])
                assert f"{24 * 1560 * 1536 * 2 * 30 * 2 / 2 ** 20:,.0f} MiB" in out.getvalue(), "of the chosen memory"
                assert 1.9 < float(days[1]) / float(days[0]) < 2.1 and days[2] == days[0], days
        assert not (here / "out").exists()
    c = Config(in_dim=32, track_dim=16, clip_dim=40, dim=384, ffn_dim=1500, num_heads=3, num_layers=5, text_dim=64,
               text_len=8, size=(128, 128))
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

    head = lifted("motionstream.py", "sinusoid", "FRAMES", "inside_picture", "cell_of", "TrackHead").TrackHead(8, 5, 8)
    assert randomised(head)(*new_tracks(9, 7), 32, 48).equal(randomised(TrackHead(8, 5, 8))(*new_tracks(9, 7), 32, 48))

    model, (noise, given, first) = new_model(), clip_of(8)
    own = lifted("motionstream.py", *FLOW, "split_conditions", "rollout")
    both = [list(f(model, noise, given, first, rng=seeded())) for f in (rollout, own.rollout)]
    assert all(a.equal(b) for a, b in zip(*both, strict=True))


def test_dmd_loss_and_the_vae_run_from_their_own_source():
    model, (x0, given, first) = new_model(), clip_of(3)
    needs = vars(lifted("motionstream.py", *FLOW, "joint_guidance", "without", "guided_velocity"))
    own = lifted("train_distill.py", "score_sigma", "dmd_loss", **needs)
    values = []
    for loss in td.dmd_loss, own.dmd_loss:
        torch.manual_seed(0)
        values.append(loss(x0, model, new_model(1), given, first, 5.0))
    assert values[0].equal(values[1]) and values[0] > 0

    own = lifted("vae.py", "FRAMES", "check_video", "TinyVAEConfig", "TINY", "conv", "MemBlock", "Repack",
                 "each_frame", "frames_to_channels", "channels_to_frames", "enlarging", "grow_frames",
                 "build_encoder", "build_decoder", "run_layers", "TinyVAE")
    vae = randomised(own.TinyVAE(own.TinyVAEConfig(**vars(SMALL_VAE))))
    z = vae.encode(rand(1, 3, 9, 16, 16))
    assert z.equal(new_vae().encode(rand(1, 3, 9, 16, 16))) and vae.decode(z)[0].equal(new_vae().decode(z)[0])
    assert own.TinyVAE(own.TINY).stride == 8

    own = lifted("vae.py", "FRAMES", "check_video", "LinearVAEConfig", "LinearVAE")
    vae, video = randomised(own.LinearVAE(own.LinearVAEConfig(4))), rand(1, 3, 9, 16, 16)
    z = vae.encode(video)
    assert z.equal(linear_vae().encode(video)) and vae.decode(z)[0].equal(linear_vae().decode(z)[0])


# ----------------------------------------------------------------------------------------------------------------------
# sample.py: what a user types.

def test_sample_writes_a_video_of_the_tracks_length():
    _, here = workplace()
    rich = "--frames 20 --overlay --memory c2s0w99 --steps 1 --prompt fading --set shift=3"
    teacher = f"--sampler teacher --weights {here / 'teacher.safetensors'} --guidance 2,1"
    np.savez(here / "ids.npz", tracks=np.load(here / "tracks.npy"), ids=np.arange(3))
    for flags, frames in ("", 14), ("--frames 1", 1), (rich, 20), (teacher, 14), (f"--tracks {here / 'ids.npz'}", 14):
        code, out, err = sampled(*command(*flags.split()))
        assert code == 0 and out.splitlines()[-1] == str(here / "out.mp4"), (flags, out, err)
        video = imageio.mimread(here / "out.mp4", memtest=False)
        assert len(video) == frames and min(video[0].shape[:2]) >= 256, (len(video), video[0].shape)
        assert ("ids are not used" in out) == ("ids" in flags)  # SMALL's are the start points
        (here / "out.mp4").unlink()
    assert not list(here.glob(".*")), "temporary files are left"


def test_sampled_frames_depend_on_seed_tracks_and_memory_and_on_nothing_else():
    _, here = workplace()
    vae, motion = TinyVAE.from_pretrained(here / "vae.safetensors"), sample.Motion(*new_tracks(41, 3, batch=1))
    moved = replace(motion, tracks=motion.tracks + (torch.arange(41) > 8)[:, None, None] * 8.0)

    def frames(motion=motion, seed=0, **memory):
        model = MotionStream.from_pretrained(here / "student.safetensors", dtype=torch.float32, **memory)
        videos = sample.stream(model, vae, rand(1, 3, 32, 48).clamp(-1, 1), motion, seed=seed)
        return np.concatenate(list(map(sample.to_frames, videos)))[:41]

    base = frames()
    assert base.shape == (41, 32, 48, 3) and (frames() == base).all()
    assert (frames(moved)[:9] == base[:9]).all() and (frames(moved)[9:21] != base[9:21]).any()
    assert (frames(seed=1) != base).any() and (frames(sink=0) != base).any() and (frames(window=None) != base).any()


def test_the_stream_hands_the_track_head_the_whole_motion():
    model, motion = new_model(), sample.Motion(*new_tracks(28, 5))
    parts = [part["tracks"] for part in sample.conditions(model, None, rand(2, 3, 32, 48), motion, sample.Encoded())]
    assert len(parts) == 3
    rest = 33 - 28                                              # 3 chunks of 3 latents are 33 frames
    tracks, visible = F.pad(motion.tracks, (0, 0, 0, 0, 0, rest)), F.pad(motion.visible, (0, 0, 0, rest))
    assert_near(torch.cat(parts, 2), track_features(model, tracks, visible, motion.ids), 1e-6)


def test_the_image_enters_as_clean_latent_frame_0_or_as_channels():
    first, motion = clip_of(3)[2][:1], sample.Motion(*new_tracks(21, 3, batch=1))
    vae = SimpleNamespace(encode=lambda video: first, decode=lambda latents, state: (latents, state))
    for in_dim, as_channels in (12, False), (16, True):         # 4 noisy, 8 tracks, 4 image
        for sampler in "stream", "teacher":
            model, seen = new_model(in_dim=in_dim, clean_first=not as_channels, guidance=(0, 0)), []
            model.register_forward_hook(lambda _, args, given, out: seen.append((*args, given.get("image"))),
                                        with_kwargs=True)
            make = sample.stream if sampler == "stream" else sample.sample_teacher
            chunks = make(model, vae, rand(1, 3, 32, 48), motion)
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
            given = sample.Tracks(tracks, np.ones((5, 2), bool))
            motion, _ = sample.fit_tracks(given, (width, height), 5, c, 0)
        found = torch.stack([(weight * axis).sum() / weight.sum() for axis in axes])
        assert (found - motion.tracks[0, 0, 0]).norm() < 0.7, (width, height, found, motion.tracks[0, 0, 0])
        assert motion.visible[0, 0].tolist() == [True, (width, height) == (96, 64)]       # else the corner is cut off


def test_ids_of_a_file_are_used_if_they_are_of_the_kind_that_the_weights_know():
    points, seen = np.tile(np.float32([[9, 8], [24, 16]]), (5, 1, 1)), np.ones((5, 2), bool)
    starts = [(8 << 16) + 9, (16 << 16) + 24]
    for mode, own, expected in (("random", "random", [7, 3]), ("start", "random", starts), ("start", "start", [7, 3])):
        given = sample.Tracks(points, seen, np.array([7, 3]), own)
        motion, notes = sample.fit_tracks(given, (48, 32), 5, replace(SMALL, track_id_mode=mode), 0)
        assert motion.ids.tolist() == [expected], (mode, own)
        assert any("not used" in note for note in notes) == (mode != own)


def test_tracks_are_cut_to_whole_chunks_and_say_nothing_after_their_end():
    given = sample.Tracks(np.full((12, 2, 2), 9, np.float32), np.ones((12, 2), bool))
    for frames, whole, seen, note in (3, 9, 9, False), (9, 9, 9, False), (10, 21, 12, False), (15, 21, 12, True):
        motion, notes = sample.fit_tracks(given, (48, 32), frames, SMALL, 0)
        assert motion.tracks.shape == (1, whole, 2, 2) and motion.visible.sum() == 2 * seen
        assert any("the last 3 are not specified" in text for text in notes) == note


def test_tracks_of_another_size_are_scaled_to_the_image_and_nan_is_hidden():
    points = rand(5, 2, 2).numpy() * 9 + 20
    points[3, 1] = np.nan
    with folder() as here:
        np.savez(here / "t.npz", tracks=points, width=96, height=40, fps=8, format="motionstream")
        given = sample.read_tracks(here / "t.npz", (48, 40))
    expected = np.float32(points[:3] * (0.5, 1))
    assert abs(given.tracks[:3] - expected).max() < 1e-5 and given.tracks.dtype == np.float32 and given.fps == 8
    assert np.argwhere(~given.visible).tolist() == [[3, 1]] and np.isfinite(given.tracks).all() and given.ids is None


def test_live_motion_is_what_a_whole_clip_has_in_each_chunk():
    points = rand(33, 3, 2).abs() * 9 + 3
    points[12:20, 1] = math.nan
    for mode in "random", "start":
        config = replace(SMALL, track_id_mode=mode)
        parts = [sample.live_motion(part, points[0], config) for part in points.split([9, 12, 12])]
        assert torch.cat([part.tracks for part in parts], 1).nan_to_num(0).equal(points[None].nan_to_num(0))
        assert torch.cat([part.visible for part in parts], 1).equal(~points[None, ..., 0].isnan())
        assert all(part.ids.equal(parts[0].ids) for part in parts) and len({*parts[0].ids[0].tolist()}) == 3
        assert all(part.start.equal(points[None, 0]) for part in parts)
        if mode != "random":
            assert parts[0].ids.equal(track_ids(points[None], parts[0].visible, config))


def test_copying_models_copy_in_every_path():
    vae = randomised(LinearVAE(LinearVAEConfig(latent_channels=4)))
    image, motion = rand(1, 3, 32, 48).clamp(-1, 1), sample.Motion(*new_tracks(45, 3, batch=1))
    motion = replace(motion, start=start_points(motion.tracks, motion.visible))
    copies = copy_along_tracks(vae, image, motion.tracks, motion.visible, motion.start)
    for causal in True, False:
        model, seen = new_model(**vars(replace(COPYING, causal=causal, steps=1, guidance=(0, 0)))), []
        model.register_forward_hook(lambda _, args, given, out: seen.append(given), with_kwargs=True)
        make = sample.stream if causal else sample.sample_teacher
        videos = torch.cat([*make(model, vae, image, motion)], 2)
        assert videos.shape == (1, 3, 45, 32, 48)
        steps = len(COPYING.sigmas) + 1 if causal else 1
        assert_near(torch.cat([given["copies"] for given in seen[::steps]], 2), copies, 1e-5)
        assert all(given["image"] is not None for given in seen), "the still image is in every chunk"


def recording(here, mode):
    """A recording by hand, at chunk 1: (name of its files, the motion and prompt of each chunk)."""
    weights = saved(here / f"{mode}.safetensors", new_model(track_id_mode=mode))
    model = MotionStream.from_pretrained(weights, dtype=torch.float32, chunk=1, sink=2, window=2)
    image = Image.fromarray((rand(50, 60, 3, seed=5).numpy() * 60 + 128).clip(0, 255).astype(np.uint8))
    image.save(here / "recorded.png")
    paths = np.float32(rand(13, 2, 2).numpy() * 5 + 25)
    paths[:5, 1] = np.nan                                       # comes late
    visible = ~np.isnan(paths[..., 0])
    ids = np.array([3 << 16, (7 << 16) + 5])
    prompts = ["", "fading light", "fading light", "red"]
    pixels = sample.fit_image(image, SMALL.size)
    vae = load_vae(workplace()[1] / "vae.safetensors")
    motion, _ = sample.fit_tracks(sample.Tracks(np.nan_to_num(paths), visible, ids, mode), image.size, 13, model.config, 0)
    parts = sample.motion_by_chunk(motion, 1)
    given = [replace(part, text=sample.embed_words(prompt, SMALL)) for part, prompt in zip(parts, prompts)]
    frames = np.concatenate([*map(sample.to_frames, sample.stream(model, vae, pixels, iter(given), seed=7))])
    weights = sample.checksum(sample.Models(model, vae, sample.Encoded()))
    arrays = {"tracks": paths, "visibility": visible, "ids": ids, "track_id_mode": mode, "prompts": prompts, "seed": 7,
              "chunk": 1, "sink": 2, "window": 2, "steps": len(SMALL.sigmas), "fps": 12, "dtype": "float32",
              "frames": 11, "weights": weights, "width": 60, "height": 50, "format": "motionstream"}
    np.savez(here / "recorded.npz", **arrays)
    return frames[:11], arrays


def test_a_recording_plays_to_the_same_frames_unless_flags_say_otherwise():
    made, fps = [], []
    video_file = sample.video_file

    @contextlib.contextmanager
    def spied(path, rate):
        fps.append(rate)
        with video_file(path, rate) as append:
            yield lambda frame: (made.append(frame[::8, ::8]), append(frame))

    with folder() as here, unittest.mock.patch.object(sample, "video_file", spied):
        for mode in "random", "start":
            frames, arrays = recording(here, mode)
            words = ["--image", here / "recorded.png", "--tracks", here / "recorded.npz", "--vae",
                     workplace()[1] / "vae.safetensors", "--out", here / "x.mp4", "--weights"]
            for more in (), ("--prompt", "red"), ("--seed", 1), ("--memory", "c1s1w1"):
                made.clear()
                code, out, err = sampled(*words, here / f"{mode}.safetensors", *more)
                assert code == 0 and "other weights" not in out and len(made) == 11 and fps[-1] == 12, (out, err)
                assert np.array_equal(np.stack(made), frames) == (not more), (mode, more)
                if mode == "start":
                    break                                       # what flags do has been seen
        code, out, _ = sampled(*words, workplace()[1] / "student.safetensors", "--frames", 1)
        assert code == 0 and "recorded with other weights" in out
        for name, value in ("chunk", 0), ("frames", None), ("seed", "x"), ("dtype", "int8"), ("prompts", []), ("weights", None):
            damaged = arrays | {name: value}
            if value is None:
                damaged.pop(name)
            np.savez(here / "recorded.npz", **damaged)
            code, _, err = sampled(*words, here / "start.safetensors")
            assert code == 2 and "recorded.npz: damaged" in err, (name, err)


def test_a_copy_without_extras_samples():
    with folder() as here:
        for name in "motionstream.py", "vae.py", "sample.py":
            shutil.copy(HERE / name, here)
        shutil.copytree(HERE / "assets", here / "assets")
        command = [sys.executable, "sample.py", "--image", "assets/drag.png", "--tracks", "assets/drag.npz", "--frames", "9"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("\nout.mp4\n"), done.stderr
        assert count_frames(here / "out.mp4") == 9


def test_guidance_flags_reach_the_teacher():
    _, here = workplace()
    videos = []
    for flags in "", "--guidance 1,1.5", "--guidance 9,1.5", "--guidance 1,9":             # the first two are the same
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
    seen = np.ones(good.shape[:2], bool)

    def own(name, **arrays):
        np.savez(here / f"{name}.npz", **{"tracks": good, "format": "motionstream"} | arrays)
        return "--tracks", here / f"{name}.npz"

    def raw(flag, name, data):
        (here / name).write_bytes(data)
        return flag, here / name

    def change(value):
        array = good.copy()
        array[3, 1, 0] = value
        return array

    student, vae, png = ((here / name).read_bytes() for name in ("student.safetensors", "vae.safetensors", "image.png"))
    whole = own("whole", visibility=seen)[1].read_bytes()
    cases = {
        "no image": ("--image", here / "none.png"),
        "a folder as image": ("--image", here),
        "text as image": raw("--image", "text.png", b"hello"),
        "half an image": raw("--image", "half.png", png[:len(png) // 2]),
        "no tracks file": ("--tracks", here / "none.npy"),
        "half an npz": raw("--tracks", "half.npz", whole[:300]),
        "a damaged npz": raw("--tracks", "damaged.npz", whole.replace(b"tracks.npy", b"tracks.xyz", 1)),
        "1-d tracks": own("1d", tracks=good[:, 0, 0]),
        "3-d points": own("3d", tracks=np.zeros((14, 3, 3), np.float32)),
        "no frames in it": own("short", tracks=good[:0]),
        "letters for a width": own("letters", width="ten", height=10),
        "text in tracks": own("text", tracks=good.astype(str)),
        "objects": own("object", tracks=good.astype(object)),
        "visible NaN": own("nan", tracks=change(np.nan), visibility=seen),
        "visible inf": own("inf", tracks=change(np.inf)),
        "visibility turned": own("turned", visibility=seen.T),
        "seven ids": own("ids", ids=np.arange(7)),
        "an id of 33 bits": own("large", ids=np.array([0, 1, 2 ** 32])),
        "an id below 0": own("below", ids=np.array([0, 1, -1])),
        "no width": own("width", width=0, height=10),
        "a recording of nothing": own("recording", prompts=["a"]),
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
    flags = ("--frames 0", "--frames 1.5", "--seed -1", "--steps 0", "--memory c0s1w1", "--memory c3s1w", "--memory c3",
             "--fps inf", "--guidance 1,1", "--guidance 1", "--guidance x,y", "--guidance nan,1", "--set shift=0",
             "--set shift", "--set dim=9", "--dtype float8", "--device abacus", "--sampler magic", "--out out.avi",
             "--colour red", "--drag 1,2", "--drag 1,2->3,4", "--grid 3x3", "--negative-prompt red")
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
# sample.py with public weights: how they are sampled, and what they are told.

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
        found = image_inputs(replace(STUB, clean_first=clean is not None, **fields), given, 4)
        for value, expected in zip(found, (channels, clean)):
            assert (value is None) == (expected is None) and (value is None or value.equal(expected)), fields
    assert any("never learned" in note for note in settled("t2v.safetensors").notes)
    assert not any("never learned" in note for note in settled("i2v.safetensors").notes)


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
    with folder() as repository:
        save_file(load_file(here / "t2v.safetensors"), repository / "diffusion_pytorch_model.safetensors")
        torch.save(randomised(WanVAE(WanVAEConfig(16, 8, 8))).state_dict(), repository / "Wan2.1_VAE.pth")
        assert isinstance(sample.open_vae(sample.inspect(repository)), WanVAE)
    assert_error(sample.UserError, "give --vae PATH", sample.open_vae, sample.inspect(here / "fun.safetensors"))
    assert isinstance(sample.open_vae(sample.inspect(here / "t2v.safetensors"), here / "vae.safetensors"), TinyVAE)


def test_tracks_go_to_a_trained_head_or_are_drawn():
    tracks = "--tracks", "t.npy"
    for weights, drawn in ("fun", True), ("headed", False):
        job = settled(f"{weights}.safetensors", *tracks)
        assert job.drawn == drawn == any("drawn as a control video" in note for note in job.notes)
    for weights, cure, flags in (("t2v", "drop --tracks", tracks), ("t2v", "drop --tracks", ("--guidance", "0,1")),
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
    model.config = replace(model.config, steps=1, guidance=(5.0, 0.0))
    (x, level), *_ = euler(model, noise, given, None, null)
    assert x.equal(noise) and level == 1
    *_, (x0, _) = euler(model, noise, given, None, null)
    assert_near(x0, noise - guided_velocity(model, noise, torch.ones(2), given, (5.0, 0.0), null), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The README.

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


def headings(text):
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short_and_links_lead_somewhere():
    data = (HERE / "README.md").read_bytes()
    assert len(data) <= 14336 and len(data.splitlines()) <= 300, f"{len(data)} bytes"
    count = 0
    for page in HERE / "README.md", *sorted((HERE / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match("https?:", link):
                continue
            name, _, anchor = link.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name}: no {link}"
            if anchor:
                assert there.suffix == ".md", f"{page.name}: {link}, a line number goes stale"
                assert anchor in headings(there.read_text()), f"{page.name}: no heading for {link}"
            count += 1
    assert count > 50, count


def test_the_readme_and_docs_name_what_the_code_has():
    text = (HERE / "README.md").read_text()
    rows = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)\)", text)
    assert len(rows) > 15, rows
    for name, file in rows:
        assert re.search(rf"^\s*(def|class) {name}\b", (HERE / file).read_text(), re.M), f"no {name} in {file}"
    pages = text + "".join(page.read_text() for page in (HERE / "docs").glob("*.md"))
    commands = re.findall(r"python (?:-m (extras\.\w+)|(\w+\.py))([^`\n]*)", pages)
    assert len(commands) > 40, commands
    for module, file, more in commands:
        path = HERE / (file or module.replace(".", "/") + ".py")
        assert "__main__" in path.read_text(), f"{path} is no program"
        known = path.read_text() + ((HERE / "train_distill.py").read_text() if module else "")
        for flag in re.findall(r"--[\w-]+", more):
            assert re.search(rf"{flag}(?![\w-])", known), f"{path.name} knows no {flag}"


def test_what_the_readme_breaks_is_there():
    commands = re.findall(r"`(sed -i '[^']+' (\w+\.py))`", (HERE / "README.md").read_text())
    assert len(commands) == 2, commands
    for line, file in commands:
        with folder() as here:
            shutil.copy(HERE / file, here)
            subprocess.run(shlex.split(line), cwd=here, check=True)
            changed = (here / file).read_text()
            assert changed != (HERE / file).read_text(), f"{line} changes nothing"
            compile(changed, file, "exec")


def test_the_readmes_lines_stream_from_python():
    code, = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert code.count("120, 12") == 1
    with folder() as here, contextlib.chdir(here):
        (here / "assets").symlink_to(HERE / "assets")
        exec(code.replace("120, 12", "20, 12"), {})                 # two chunks
        assert count_frames("stream.mp4") == 9 + 12


# ----------------------------------------------------------------------------------------------------------------------

def cpu_seconds():
    """What this process has computed, and the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def all_tests():
    """(name, function) of the tests in this file and in extras."""
    modules = [sys.modules[__name__]]
    for path in sorted((HERE / "extras").glob("test_*.py")):
        modules.append(importlib.import_module(f"extras.{path.stem}"))
    return [item for module in modules for item in vars(module).items() if item[0].startswith("test_")]


def main(words):
    """Run the tests with one of the words in their name; all if there are none. Each line says how long a test took,
    and in brackets what it computed, which other programs on the machine change less."""
    count, started = Counter(), time.time()
    for name, test in all_tests():
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
