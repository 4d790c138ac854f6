"""The second reading: what the code promises, one sentence a test.

    python test_motionstream.py                    all of them, those in extras too
    python test_motionstream.py rollout cache      those with one of these words in their name
    python test_motionstream.py --slow             the slow ones too

Small models with random parameters everywhere: a fresh model returns zeros, which agrees with everything.
Where a formula is tested, it is written here a second time, plainly, in float64, from Wan's description.
"""

import ast
import copy
import importlib
import importlib.util
import itertools
import math
import os
import re
import sys
import time
import traceback
import unittest
import unittest.mock
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from types import SimpleNamespace

# Threads that wait awake slow each other down on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import train_distill as td
from extras.testing import (COPYING, HERE, SMALL, SMALL_VAE, TAEW21, TAEW22, WAN21, WAN22, assert_error,
                            assert_near, clip_of, folder, new_model, new_tracks, new_vae, rand,
                            randomised, same, saved, seeded, wan_video)
from motionstream import (PRESETS, CopyingMotionStream, KVCache, MotionStream, SelfAttention,
                          TrackHead, UserError, add_noise, apply_rope, copy_along_tracks, euler,
                          gone_elsewhere,
                          guided_velocity, joint_guidance, linear_part, motion_inputs,
                          nearest_points, rollout, rope_table, schedule, shift_sigma, sinusoid, square_centres,
                          split_conditions, start_points, to_x0, track_features, track_ids,
                          warp, way_back, with_first, with_linear_part)
from vae import (STATISTICS, CausalConv, ChannelNorm, Enlarge, LinearVAE, LinearVAEConfig,
                 MemBlock, Repack, TinyVAE, WanVAE, WanVAEConfig, enlarging, load_vae)

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

    model, given = new_model(**vars(COPYING)), given | {"copies": rand(2, 10, 3, 4, 6, seed=8)}
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
        assert copied.shape == (1, 4 + 6, *latents.shape[2:])
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
        assert (copied[:, 4:6, 0] == 1).all() and (copied[:, 4:6, 1:] == 0).all()   # near in frame 0, then nowhere
        assert (copied[:, 6:] == 0).all()                                           # nothing has gone

    half = visible & (torch.arange(tracks.shape[2]) % 2 == 0)
    start = start_points(tracks, visible)
    expected = copy_along_tracks(vae, image, tracks[:, :, ::2], visible[:, :, ::2], start[:, ::2])
    elsewhere = torch.where(half[..., None], tracks, 7.0)                       # positions of hidden ones do not count
    assert_near(copy_along_tracks(vae, image, elsewhere, half, start), expected, 1e-3)


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
    centres = square_centres(32, 48, "cpu")
    assert centres.shape == (8, 12, 2) and centres[7, 10].tolist() == [42, 30]
    tracks = torch.tensor([[3.0, 2.0], [42.0, 30.0]]).expand(1, 2, -1, -1)
    visible = torch.tensor([[[True, True], [False, True]]])
    index, distance = nearest_points(centres.expand(1, 2, -1, -1, -1), tracks, visible, 2)
    assert index.shape == distance.shape == (1, 2, 8, 12, 2)
    assert index[0, 0, 0, 0].tolist() == [0, 1] and distance[0, 0, 0, 0, 0] == 1            # centre (2, 2)
    assert index[0, 0, 7, 10].tolist() == [1, 0] and distance[0, 0, 7, 10, 0] == 0
    assert (index[0, 1, ..., 0] == 1).all() and distance[0, 1, ..., 1].isinf().all()        # the other one is hidden


def test_what_a_square_shows_of_frame_0_lies_where_its_track_leads_back():
    tracks = torch.tensor([[3.0, 2.0], [42.0, 30.0]]).expand(1, 2, -1, -1)
    step = torch.tensor([0.0, 0.0, 5.0, -9.0]).view(1, 1, 2, 2)
    tracks = tracks + step * torch.arange(2).view(1, 2, 1, 1)
    visible = torch.ones(1, 2, 2, dtype=torch.bool)
    image = torch.arange(32 * 48.0).expand(3, -1).view(1, 3, 32, 48)
    back, distance = way_back(tracks, visible, tracks[:, 0], 32, 48)
    video = warp(image, back)
    assert_near(video[0, 0, 1, 17, 47], image[0, 0, 26, 42], 1e-5)                          # moved by (5, -9)
    assert_near(video[0, 0, 1, :8, :8], image[0, 0, :8, :8], 1e-5)                          # what stays
    assert_near(video[0, 0, 1, 28:, 40:], image[0, 0, 28:, 40:], 1e-5)                      # would come from below
    assert distance[0, 1, 7, 10:].isinf().all() and distance[0, 1, 4, 10:].isfinite().all()
    half = warp(image, torch.full((1, 1, 8, 12, 2), 0.5))
    assert_near(half[0, 0, 0, 5, 5], image[0, 0, 5:7, 5:7].mean(), 1e-5)                    # between four pixels


def test_squares_of_what_turns_move_smoothly_and_never_with_what_moves_otherwise():
    grid = torch.cartesian_prod(torch.arange(8.0, 41, 8), torch.arange(8.0, 41, 8))[None]   # (1, 25, 2)
    turn = torch.tensor([[0.98, 0.2], [-0.2, 0.98]])                                        # 11.5 degrees
    turned = (grid - 24) @ turn + 24
    visible = torch.ones(1, 1, 25, dtype=torch.bool)
    back, _ = way_back(turned[:, None], visible, grid, 48, 48)
    place = square_centres(48, 48, "cpu")
    exact = (place - 24) @ turn.inverse() + 24 - place
    error = (back[0, 0] - exact).norm(dim=-1)[2:10, 2:10]
    assert error.max() < 1.0 and error.mean() < 0.4, (error.max(), error.mean())

    moves = torch.zeros(25, 2)
    moves[:10] = torch.tensor([20.0, 0])                                                    # two columns leave
    back, _ = way_back((grid + moves)[:, None], visible, grid, 48, 48)
    assert all(len(set(map(tuple, row.round(decimals=2).tolist()))) <= 2 for row in back[0, 0])


def test_an_object_leaves_its_first_place_and_the_ground_behind_it_is_not_taken_for_it():
    """An object, round (12, 16), moves by 24 pixels to the right over a ground that stands still."""
    on_object = torch.cartesian_prod(torch.arange(8.0, 16, 4) + 2, torch.arange(12.0, 20, 4) + 2)
    on_ground = torch.cartesian_prod(torch.arange(0.0, 48, 4) + 2, torch.arange(0.0, 32, 4) + 2)
    hidden = (on_ground > torch.tensor([8, 12])).all(1) & (on_ground < torch.tensor([16, 20])).all(1)
    start = torch.cat([on_object, on_ground.masked_fill(hidden[:, None], math.nan)])[None]
    moves = torch.tensor([24.0, 0]).expand(4, 2)
    moves = torch.cat([moves, torch.zeros_like(on_ground)])
    tracks = torch.cat([on_object, on_ground])[None, None] + moves              # (1, 1, N, 2), one frame
    over = (on_ground > torch.tensor([32, 12])).all(1) & (on_ground < torch.tensor([40, 20])).all(1)
    visible = torch.cat([torch.ones(4, dtype=torch.bool), ~over])[None, None]
    vae = linear_vae()
    copies = copy_along_tracks(vae, rand(1, 3, 32, 48), tracks.expand(-1, 4, -1, -1), visible.expand(-1, 4, -1),
                               start)
    moved, still = copies[0, 6:8, 0], copies[0, 8:10, 0]                        # (2, 4, 6) of cells of 8 pixels
    assert copies.shape == (1, 10, 1, 4, 6)
    seen = visible & start.isfinite().all(2)
    back, _ = way_back(tracks, seen, start, 32, 48)
    sure = gone_elsewhere(back, tracks, seen, start, 32, 48)[0, 0, 0]           # by squares of 4 pixels: (8, 12)
    left = torch.zeros(8, 12, dtype=torch.bool)
    left[3:5, 2:4] = True                                                       # where the object was
    assert (sure[left] > 0.9).all() and (sure[~left] < 0.5).all()
    assert (sure[3:5, 8:10] < 1e-6).all()                                        # where it is, it is at home
    sure = gone_elsewhere(0 * back, tracks, seen, start, 32, 48)[0, 0, 0]
    assert (sure[left] > 0.9).all() and (sure[:, 6:] < 0.3).all()               # the image itself shows no object there
    assert moved[0].max() == moved[0, 2, 1] or moved[0].max() == moved[0, 1, 1]
    assert still[0, 1:3, 1].min() > 0.3 > still[0, :, 3:].max()


def test_a_fresh_model_believes_its_copies_and_where_there_are_none_the_image():
    torch.manual_seed(0)
    model = CopyingMotionStream(COPYING).eval()
    x, ones, tracks = rand(2, 4, 3, 4, 6), torch.ones(2), rand(2, 8, 3, 4, 6, seed=3)
    copies, image = rand(2, 10, 3, 4, 6, seed=1), rand(2, 4, 3, 4, 6, seed=2)
    with torch.no_grad():
        x0 = to_x0(x, model(x, ones, tracks=tracks, copies=copies, image=image), ones)
        assert_near(x0, 0.8 * copies[:, :4] + 0.2 * image, 1e-5)
        x0 = to_x0(x, model(x, ones, copies=copies), ones)
        assert_near(x0, 0.8 * copies[:, :4], 1e-5)
        x0 = to_x0(x, model(x, ones, tracks=tracks, image=image), ones)
        assert x0.abs().max() < 1e-6                            # without copies: the mean, 0
    assert_error(AssertionError, "condition copies (2, 8, 3, 4, 6), expected (2, 10,", model, x, ones, copies=tracks)
    model.config = replace(COPYING, latent_std=())
    assert_error(AssertionError, "latent_std", model, x, ones)


def test_a_copying_model_is_a_motionstream_inside_the_linear_part():
    """Its image slot holds copies, then the image; its head two more channels, the shares."""
    model = new_model(**vars(COPYING))
    plain = randomised(MotionStream(COPYING))
    plain.head = model.head
    plain.load_state_dict(model.state_dict())
    noise, given, _ = clip_of(3, COPYING)
    copies, image, sigma = rand(2, 10, 3, 4, 6, seed=8), rand(2, 4, 3, 4, 6, seed=9), torch.tensor([0.9, 0.4])
    std = torch.tensor(COPYING.latent_std).view(1, -1, 1, 1, 1)
    s = sigma.view(2, 1, 1, 1, 1)
    variance = (1 - s) ** 2 * std ** 2 + s ** 2
    output = plain(noise / variance.sqrt(), sigma, **given, image=torch.cat([copies, image], 1))
    shares = output[:, 4:]
    mean = shares[:, :1] * copies[:, :4] + shares[:, 1:] * image
    spread = (0.1 * std) ** 2                                                   # of a Gaussian round that mean
    x0 = mean + (1 - s) * spread / ((1 - s) ** 2 * spread + s ** 2) * (noise - (1 - s) * mean)
    expected = (noise - x0) / s + std / variance.sqrt() * output[:, :4]
    assert_near(model(noise, sigma, **given, copies=copies, image=image), expected, 1e-5)


def test_the_linear_part_is_the_posterior_mean_of_gaussian_latents():
    std, mean = torch.tensor([0.5, 1.0, 2.0]).view(1, -1, 1, 1, 1), rand(2, 3, 4, 2, 2)
    x_t, sigma = rand(2, 3, 4, 2, 2, seed=1), torch.tensor([[0.0, 0.1, 0.5, 0.9], [1.0, 0.99, 0.3, 0.7]])
    given = with_linear_part(torch.zeros_like(x_t), x_t, sigma, std, mean)
    unit = with_linear_part(torch.ones_like(x_t), x_t, sigma, std, mean) - given
    for b, c, f in itertools.product(range(2), range(3), range(4)):
        s, d = sigma[b, f].item(), std[0, c].item()
        mix = np.array([[1 - s, s], [-1, 1]])                       # (x0, noise) to (x_t, velocity)
        covariance = mix @ np.diag([(0.1 * d) ** 2, 1]) @ mix.T     # x0 is near what is expected
        middle = mean[b, c, f].double().numpy()
        slope = covariance[1, 0] / covariance[0, 0]
        expected = -middle + slope * (x_t[b, c, f].double().numpy() - (1 - s) * middle)
        assert_near(given[b, c, f].double(), torch.from_numpy(expected), 1e-5)
        variance = ((1 - s) * d) ** 2 + s ** 2                      # of x_t, over all clips
        assert abs(linear_part(sigma, std)[1][b, c, f].item() - variance) < 1e-5
        assert_near(unit[b, c, f].double(), torch.full((2, 2), d / variance ** 0.5).double(), 1e-4)
    zero = with_linear_part(torch.zeros_like(x_t), x_t, sigma, std)
    assert zero.equal(with_linear_part(torch.zeros_like(x_t), x_t, sigma, std, 0 * mean))


def test_copying_models_stream_and_later_copies_do_not_change_past_frames():
    model = new_model(**vars(COPYING))
    noise, given, first = clip_of(8, COPYING)
    given |= {"copies": rand(2, 10, 8, 4, 6, seed=6), "image": first.expand(-1, -1, 8, -1, -1)}
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
    own = lifted("train_distill.py", "score_sigma", "real_and_fake", "dmd_loss", **needs)
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
