"""A second way to read the project: what the method promises, one test per sentence, in the order
of motionstream.py.

    python test_motionstream.py                    all tests, those in extras too, side by side
    python test_motionstream.py rollout cache      those with one of these words in their name
    python test_motionstream.py --slow             the slow ones too

All models here are small and have random parameters: a fresh one returns zeros, which agrees with
everything. A formula that is tested is written a second time, plainly, in float64.

Beside this file: extras/test_copying.py has what the tiny model does and the paper does not,
extras/test_vae.py the VAEs, extras/test_weights.py weights files.
"""

import contextlib
import copy
import faulthandler
import functools
import importlib
import io
import itertools
import math
import multiprocessing
import os
import re
import sys
import time
import traceback
import unittest
import unittest.mock
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

# Threads that wait awake slow each other down on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

import train_distill as td
from extras.testing import (COPYING, HERE, SMALL, all_equal, assert_error, assert_near, clip_of,
                            new_model, new_tracks, part_of, rand, rand_like, randomised, seeded)
from motionstream import (PRESETS, KVCache, MotionStream, TrackHead, add_noise, apply_rope,
                          chunk_sizes, euler, guided_velocity, joint_guidance, latent_frames,
                          rollout, rope_table, schedule, shift_sigma, sinusoid, split_conditions,
                          start_points, to_x0, track_ids, video_frames, with_first)


# --------------------------------------------------------------------------------------------------
# Flow matching.

def test_noising_and_its_inverse_agree_and_sigma_1_is_noise():
    x0 = rand(2, 4, 3, 2, 2)
    noise = rand_like(x0, seed=1)
    quarter = torch.tensor([0.25, 0.25])
    expected = 0.75 * x0 + 0.25 * noise
    assert_near(add_noise(x0, noise, quarter), expected, 1e-6)

    velocity = noise - x0
    of_clips = torch.tensor([0.25, 0.75])
    of_frames = torch.rand(2, 3, dtype=torch.float64, generator=seeded())
    for sigma in of_clips, of_frames:
        x_t = add_noise(x0, noise, sigma)
        assert_near(to_x0(x_t, velocity, sigma), x0, 1e-6)

    ends = torch.tensor([[0.0, 1.0, 0.0]]).expand(2, -1)
    x_t = add_noise(x0, noise, ends)
    assert x_t[:, :, 1].equal(noise[:, :, 1])
    assert x_t[:, :, ::2].equal(x0[:, :, ::2])
    one = torch.ones(1)
    assert_error(AssertionError, "sigma of 1 clips, x0 of 2", add_noise, x0, noise, one)
    assert_error(AssertionError, "noise (1, 4, 3, 2, 2), ", add_noise, x0, noise[:1], quarter)


def assert_numbers(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert abs(a - b) < tolerance, f"{found}, expected {expected}"


def test_the_few_step_schedule_is_shifted():
    assert_numbers(schedule(4, 1), (1, 0.75, 0.5, 0.25))        # a shift of 1 moves nothing
    assert_numbers(schedule(3, 5), (1, 10 / 11, 5 / 7))
    assert SMALL.sigmas == schedule(3, 5)


def test_the_image_is_latent_frame_0_at_sigma_0():
    x_t = rand(2, 4, 3, 2, 2)
    first = rand(2, 4, 1, 2, 2, seed=1)
    sigma = torch.tensor([0.5, 1.0])
    x, sigma_frames = with_first(x_t, sigma, first)
    assert x[:, :, :1].equal(first)
    assert x[:, :, 1:].equal(x_t[:, :, 1:])
    assert sigma_frames.tolist() == [[0, 0.5, 0.5], [0, 1, 1]]
    assert sigma.tolist() == [0.5, 1.0]                         # the caller's stays as it was
    x, sigma_frames = with_first(x_t, sigma, None)
    assert x.equal(x_t)
    assert sigma_frames.tolist() == [[0.5, 0.5, 0.5], [1, 1, 1]]


# --------------------------------------------------------------------------------------------------
# Wan's forward pass, a second time: each step is a formula of its description, in float64.
# w: {name: tensor} of the parameters of one module; tokens x (B, L, D).

def under(w, prefix):
    """The parameters of a module inside, by their names in it."""
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def plain_norm(x, eps=1e-6):
    """Layer norm without parameters."""
    x = x - x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True)
    return x / (variance + eps).sqrt()


def layer_norm(w, name, x, eps=1e-6):
    x = plain_norm(x, eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w, name, x):
    mean_square = x.square().mean(-1, keepdim=True)
    x = x / (mean_square + 1e-6).sqrt()
    return x * w[f"{name}.weight"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2 ** 0.5))


def gelu_by_tanh(x):
    inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)
    return 0.5 * x * (1 + torch.tanh(inner))


def embed_patches(w, x):
    """(B, C, F, h, w) to tokens, one for 2x2 latent pixels."""
    x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))           # (B, C, F, rows, 2, columns, 2)
    x = x.permute(0, 2, 3, 5, 1, 4, 6)                          # (B, F, rows, columns, C, 2, 2)
    x = x.flatten(4).flatten(1, 3)                              # (B, L, 4 C)
    weight = w["patch_embedding.weight"].flatten(1)
    return x @ weight.T + w["patch_embedding.bias"]


def embed_time(w, t, freq_dim):
    """t (B, F) from 0 to 1000 to (B, F, D)."""
    half = freq_dim // 2
    frequency = 10000 ** (-torch.arange(half).double() / half)
    angle = t[..., None] * frequency
    waves = torch.cat([angle.cos(), angle.sin()], -1)
    y = linear(w, "time_embedding.0", waves)
    return linear(w, "time_embedding.2", F.silu(y))


def embed_text(w, text, rows):
    """(B, any, text_dim) to (B, rows, D): zeros are appended before the embedding."""
    text = F.pad(text, (0, 0, 0, rows - text.shape[1]))
    y = linear(w, "text_embedding.0", text)
    return linear(w, "text_embedding.2", gelu_by_tanh(y))


def embed_clip(w, clip):
    """CLIP's features of the image to tokens; the eps of these two norms is another."""
    y = layer_norm(w, "img_emb.proj.0", clip, 1e-5)
    y = linear(w, "img_emb.proj.1", y)
    y = linear(w, "img_emb.proj.3", gelu(y))
    return layer_norm(w, "img_emb.proj.4", y, 1e-5)


def rope_angles(head_dim, frames, rows, columns):
    """(L, K / 2): by how much each token turns each pair of channels."""
    spatial = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial, spatial, spatial)
    sizes = (torch.arange(frames), torch.arange(rows), torch.arange(columns))
    place = torch.cartesian_prod(*sizes).double()               # (L, 3)
    angles = []
    for axis, dim in enumerate(dims):
        frequency = 10000 ** (-torch.arange(0, dim, 2).double() / dim)
        angles.append(place[:, axis, None] * frequency)
    return torch.cat(angles, 1)


def rotate(x, angle):
    """x (B, heads, L, K) by angle (L, K / 2): channels 2 i and 2 i + 1 are a pair."""
    even = x[..., 0::2]
    odd = x[..., 1::2]
    cos = angle.cos()
    sin = angle.sin()
    turned_even = even * cos - odd * sin
    turned_odd = even * sin + odd * cos
    return torch.stack([turned_even, turned_odd], -1).flatten(3)


def heads_of(w, name, x, head_dim):
    """(B, L, D) to values of each head, (B, heads, L, K)."""
    return linear(w, name, x).unflatten(2, (-1, head_dim)).transpose(1, 2)


def normed_heads_of(w, name, x, head_dim):
    """The same for queries and keys, which are normed over all heads at once."""
    y = rms_norm(w, f"norm_{name}", linear(w, name, x))
    return y.unflatten(2, (-1, head_dim)).transpose(1, 2)


def softmax_attention(q, k, v, mask=None):
    """Of (B, heads, L, K), heads joined: (B, L, D). mask (L, L): True where a query may look."""
    scale = q.shape[-1] ** -0.5
    score = scale * q @ k.transpose(2, 3)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    y = score.softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


def self_attention(w, x, angle, mask):
    head_dim = 2 * angle.shape[1]
    q = normed_heads_of(w, "q", x, head_dim)
    k = normed_heads_of(w, "k", x, head_dim)
    v = heads_of(w, "v", x, head_dim)
    y = softmax_attention(rotate(q, angle), rotate(k, angle), v, mask)
    return linear(w, "o", y)


def cross_attention(w, x, text, clip, head_dim):
    q = normed_heads_of(w, "q", x, head_dim)
    k = normed_heads_of(w, "k", text, head_dim)
    v = heads_of(w, "v", text, head_dim)
    y = softmax_attention(q, k, v)
    if clip is not None:
        k = normed_heads_of(w, "k_img", clip, head_dim)
        v = heads_of(w, "v_img", clip, head_dim)
        y = y + softmax_attention(q, k, v)
    return linear(w, "o", y)


def wan_block(w, x, time, angle, mask, text, clip):
    """time (B, L, 6, D): shift, scale and gate of self-attention, then of the feed-forward."""
    head_dim = 2 * angle.shape[1]
    modulation = w["modulation"][:, None] + time
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)
    y = plain_norm(x) * (1 + scale1) + shift1
    y = self_attention(under(w, "self_attn."), y, angle, mask)
    x = x + gate1 * y
    y = layer_norm(w, "norm3", x)
    y = cross_attention(under(w, "cross_attn."), y, text, clip, head_dim)
    x = x + y
    y = plain_norm(x) * (1 + scale2) + shift2
    y = gelu_by_tanh(linear(w, "ffn.0", y))
    return x + gate2 * linear(w, "ffn.2", y)


def wan_head(w, x, time):
    """time (B, L, D). Tokens to patches (B, L, 4 C)."""
    modulation = w["head.modulation"][:, None] + time[:, :, None]
    shift, scale = modulation.unbind(2)
    y = plain_norm(x) * (1 + scale) + shift
    return linear(w, "head.head", y)


def wan(w, c, x, t, text, clip=None, mask=None):
    """The velocity (B, C, F, h, w). w: a state dict; x (B, in_dim, F, h, w); t (B, F) from 0 to
    1000; text (B, any, text_dim); mask (L, L): True where a query may look."""
    w = {name: p.double() for name, p in w.items()}
    B, _, frames, height, width = x.shape
    rows = height // 2
    columns = width // 2
    angle = rope_angles(c.dim // c.num_heads, frames, rows, columns)
    time = embed_time(w, t.double(), c.freq_dim)                # (B, F, D)
    time = time.repeat_interleave(rows * columns, 1)            # (B, L, D)
    modulation = linear(w, "time_projection.1", F.silu(time))
    modulation = modulation.unflatten(2, (6, -1))               # (B, L, 6, D)
    text = embed_text(w, text.double(), c.text_len)
    if clip is not None:
        clip = embed_clip(w, clip.double())
    x = embed_patches(w, x.double())
    for i in range(c.num_layers):
        x = wan_block(under(w, f"blocks.{i}."), x, modulation, angle, mask, text, clip)
    x = wan_head(w, x, time)                                    # (B, L, 4 C)
    x = x.view(B, frames, rows, columns, 2, 2, -1)
    x = torch.einsum("bfhvpqc->bcfhpvq", x)                     # (B, C, F, rows, 2, columns, 2)
    return x.flatten(5).flatten(3, 4)


def wan_velocity(model, x, sigma, given, mask=None):
    """What Wan's formulas give. Latents, tracks and image are channels, zeros if not given."""
    c = model.config
    w = model.state_dict()
    inputs = x
    for name in "tracks", "image":
        if name in given:
            inputs = torch.cat([inputs, given[name]], 1)
    missing = c.in_dim - inputs.shape[1]
    inputs = F.pad(inputs, (0, 0, 0, 0, 0, 0, 0, missing))
    t = 1000 * sigma.reshape(len(x), -1)
    t = t.expand(-1, x.shape[2])                                # (B, F)
    text = given.get("text", torch.zeros(len(x), 0, c.text_dim))
    return wan(w, c, inputs, t, text, given.get("clip"), mask)


def assert_equals_wan(model, given):
    """At a sigma for each clip and at one for each frame, with the conditions and without text,
    tracks and image."""
    x, _, _ = clip_of(3)
    of_clips = torch.tensor([0.83333, 0.01])
    of_frames = torch.tensor([[0.0, 0.7, 0.3], [1.0, 0.5, 0.002]]).double()
    only_clip = {name: given[name] for name in given if name == "clip"}
    for conditions in given, only_clip:
        for sigma in of_clips, of_frames:
            velocity = model(x, sigma, **conditions)
            assert velocity.dtype == torch.float32
            expected = wan_velocity(model, x, sigma, conditions)
            assert_near(velocity.double(), expected, 3e-6)


def test_the_transformer_equals_wans_formulas():
    _, given, _ = clip_of(3)
    assert_equals_wan(new_model(), given)
    assert_equals_wan(new_model(in_dim=4, track_dim=0), {"text": given["text"]})


def test_the_image_branch_equals_wans_formulas():
    x, given, _ = clip_of(3)
    image = rand_like(x, seed=7)
    clip = rand(2, 257, 24, seed=8)
    model = new_model(clip_dim=24, in_dim=16)                   # 4 noisy, 8 tracks, 4 image
    assert_equals_wan(model, given | {"image": image, "clip": clip})


def test_norms_have_wans_eps():
    """First with activations so small that every eps under a root matters, then by their names in
    a large model."""
    whisper = new_model(in_dim=4, track_dim=0)
    for name, p in whisper.named_parameters():
        if re.search(r"patch_emb|attn\.[qko]\.|ffn\.2", name):
            p.data *= 1e-3
    _, given, _ = clip_of(3)
    assert_equals_wan(whisper, {"text": given["text"]})

    with torch.device("meta"):
        model = MotionStream(PRESETS["motionstream-1.3b"])
    eps = {name: m.eps for name, m in model.named_modules() if hasattr(m, "eps")}
    assert len(eps) == 30 * 8 + 1 + 2                           # of blocks, head, image branch
    assert eps.pop("img_emb.proj.0") == 1e-5
    assert eps.pop("img_emb.proj.4") == 1e-5
    assert set(eps.values()) == {1e-6}


def test_time_is_cosines_then_sines_of_a_float64_angle():
    t = 987.654321
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    waves = [math.cos(angle) for angle in angles]
    waves += [math.sin(angle) for angle in angles]
    found = sinusoid(torch.tensor([t], dtype=torch.float64), 256)
    assert_near(found[0], torch.tensor(waves), 2e-7)


def test_rope_turns_interleaved_pairs_split_22_21_21():
    """In Wan's heads of 128 channels 22 pairs turn with the frame, 21 with the row, 21 with the
    column."""
    frame = 2
    row = 3
    column = 1
    angles = [frame * 10000 ** (-2 * j / 44) for j in range(22)]
    angles += [row * 10000 ** (-2 * j / 42) for j in range(21)]
    angles += [column * 10000 ** (-2 * j / 42) for j in range(21)]
    turned = [(math.cos(angle), math.sin(angle)) for angle in angles]           # from (1, 0)
    table = rope_table(3, 4, 5, 128, "cpu")
    assert table.shape == (60, 64)
    token = (frame * 4 + row) * 5 + column
    ones = torch.tensor([1.0, 0.0]).repeat(64).view(1, 1, 1, 128)
    found = apply_rope(ones, table[token][None])
    assert_near(found.view(64, 2), torch.tensor(turned), 1e-6)  # pair i: channels 2 i and 2 i + 1


@functools.cache
def shapes(config):
    """{name: shape} of a model's tensors."""
    with torch.device("meta"):
        model = MotionStream(config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def named(modules, kinds="weight bias"):
    """The names of the tensors of modules."""
    return {f"{module}.{kind}" for module in modules.split() for kind in kinds.split()}


def in_blocks(names):
    """These in each of 30 blocks."""
    return {f"blocks.{i}.{name}" for i in range(30) for name in names}


def test_state_dicts_have_the_names_and_sizes_of_wans_checkpoints():
    attention = named("q k v o") | named("norm_q norm_k", "weight")
    block = {"modulation"} | named("norm3 ffn.0 ffn.2")
    block |= {f"self_attn.{name}" for name in attention}
    block |= {f"cross_attn.{name}" for name in attention}
    outside = {"head.modulation"} | named("head.head patch_embedding time_projection.1")
    outside |= named("text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2")
    found = shapes(PRESETS["wan2.1-1.3b"])
    assert found.keys() == in_blocks(block) | outside
    assert found["patch_embedding.weight"] == (1536, 16, 1, 2, 2)
    assert found["time_projection.1.weight"] == (9216, 1536)
    assert found["blocks.7.modulation"] == (1, 6, 1536)
    assert found["head.modulation"] == (1, 2, 1536)


def test_all_families_have_as_many_tensors_and_parameters_as_wans_files():
    image_to_video = replace(PRESETS["wan2.1-14b"], in_dim=36, clip_dim=1280)
    for config, tensors, parameters in (
            (PRESETS["wan2.1-1.3b"], 825, 1_418_996_800),
            (PRESETS["wan2.1-14b"], 1095, 14_288_491_584),
            (PRESETS["wan2.2-5b"], 825, 4_999_787_712),
            (image_to_video, 1303, 16_394_878_784)):
        found = shapes(config).values()
        assert len(found) == tensors
        assert sum(math.prod(shape) for shape in found) == parameters


def test_motionstream_adds_a_track_head_and_the_image_branch():
    found = dict(shapes(PRESETS["motionstream-1.3b"]))
    assert found.pop("track_head.conv.weight") == (16, 256, 1, 1, 1)
    assert found["patch_embedding.weight"] == (1536, 48, 1, 2, 2)
    attention = named("cross_attn.k_img cross_attn.v_img") | {"cross_attn.norm_k_img.weight"}
    embedding = named("img_emb.proj.0 img_emb.proj.1 img_emb.proj.3 img_emb.proj.4")
    wans = shapes(PRESETS["wan2.1-1.3b"]).keys()
    assert found.keys() == wans | in_blocks(attention) | embedding
    assert len(found) == 983


# --------------------------------------------------------------------------------------------------
# Clips and chunks.

def test_a_clip_has_one_frame_and_then_four_for_each_latent():
    assert [video_frames(latents) for latents in (1, 2, 21)] == [1, 5, 81]
    for latents in range(1, 9):
        frames = video_frames(latents)
        for more in range(4):
            assert latent_frames(frames + more) == latents


# --------------------------------------------------------------------------------------------------
# The KV cache.

def test_a_streaming_model_equals_one_block_causal_pass():
    """Two clean chunks, then a noisy, shorter one: with all of the past in the cache, a stream is a
    single pass in which a token sees its own chunk and those before."""
    model = new_model(window=None)
    x, given, _ = clip_of(8)
    sigma = torch.tensor([[0, 0, 0, 0, 0, 0, 0.6, 0.9]]).expand(2, -1)
    caches = model.new_caches()
    parts = []
    for now in slice(0, 3), slice(3, 6), slice(6, 8):
        part = part_of(given, now)
        clean = now.stop < 8
        velocity = model(x[:, :, now], sigma[:, now], **part, caches=caches, write=clean)
        parts.append(velocity)
    for cache in caches:
        assert len(cache) == 6 * 6                              # tokens of 6 latent frames

    chunk = (torch.arange(8) // 3).repeat_interleave(6)         # of each token
    mask = chunk[:, None] >= chunk
    expected = wan_velocity(model, x, sigma, given, mask)
    assert_near(torch.cat(parts, 2).double(), expected, 3e-6)


def numbered(number, tokens):
    """Keys of chunk `number`; its values are their negatives."""
    return rand(1, tokens, 2, 4, seed=number)


def check_eviction(sink, window, tokens):
    """Write 12 chunks; after each, the cache holds the chunks that it should, in order."""
    cache = KVCache(sink, window)
    new = numbered(99, 3)
    for i in range(12):
        k = numbered(i, tokens)
        cache.write(k, -k)
        kept = list(range(i + 1))
        if window is not None:
            kept = [j for j in kept if j < sink or j > i - window]
        assert len(cache) == len(kept) * tokens                 # constant from some chunk on
        expected = [numbered(j, tokens) for j in kept]
        expected.append(new)
        keys, values = cache.read(new, -new)
        assert keys.equal(torch.cat(expected, 1)), (sink, window, i)
        assert values.equal(-keys)


def test_after_eviction_the_cache_holds_exactly_sink_and_last_window():
    check_eviction(sink=1, window=1, tokens=6)
    check_eviction(sink=1, window=0, tokens=2)
    check_eviction(sink=0, window=1, tokens=2)
    check_eviction(sink=0, window=3, tokens=6)
    check_eviction(sink=2, window=3, tokens=2)
    check_eviction(sink=3, window=3, tokens=14)
    check_eviction(sink=1, window=None, tokens=6)               # nothing is evicted
    check_eviction(sink=0, window=0, tokens=2)                  # nothing is kept


def test_sizes_of_memory_that_cannot_be_are_refused():
    for sink, window in (-1, 1), (1, -1), (-1, None):
        said = f"sink {sink}, window {window}: expected 0 or more chunks"
        assert_error(AssertionError, said, KVCache, sink, window)
    sizes = chunk_sizes(replace(SMALL, chunk=0, first_chunk=1))
    assert_error(AssertionError, "chunk 0, expected 1 or more", next, sizes)


def test_a_copy_of_a_cache_stays_as_it_was():
    """Blocks that are computed twice, in training, hold such a copy."""
    cache = KVCache(1, 1)
    for i in range(3):
        kept = copy.copy(cache)
        before = list(kept.chunks)
        k = numbered(i, 2)
        cache.write(k, -k)
        assert len(kept.chunks) == len(before)
        assert all(a is b for a, b in zip(kept.chunks, before))


def test_chunks_in_the_cache_may_differ_in_size():
    cache = KVCache(1, 1)
    for tokens in 6, 18, 12:
        k = numbered(0, tokens)
        cache.write(k, -k)
    assert len(cache) == 6 + 12


def test_a_models_caches_are_as_its_config_says_or_as_asked_for():
    model = new_model(sink=2, window=3)
    for cache in model.new_caches():
        assert (cache.sink, cache.window) == (2, 3)
    others = model.new_caches(sink=0, window=None)
    assert len(others) == model.config.num_layers
    for cache in others:
        assert (cache.sink, cache.window) == (0, None)


def test_keys_are_rotated_by_cache_slot_so_a_long_stream_equals_a_short_one():
    """What is in the slots of sink, window and chunk decides, not how long the stream has been."""
    model = new_model(num_layers=1)
    x, given, _ = clip_of(63)

    def last_of(chunks):
        caches = model.new_caches()
        for i in chunks:
            now = slice(3 * i, 3 * i + 3)
            part = part_of(given, now)
            velocity = model(x[:, :, now], torch.zeros(2), **part, caches=caches, write=True)
        return velocity

    short = last_of([0, 19, 20])
    assert last_of(range(21)).equal(short)
    assert not last_of([0, 18, 20]).equal(short)                # another window
    assert not last_of([1, 19, 20]).equal(short)                # another sink


def held_by(caches):
    """All keys and values, in a list."""
    pairs = [pair for cache in caches for pair in cache.chunks]
    return [tensor for pair in pairs for tensor in pair]


def test_denoising_steps_only_read_and_a_written_chunk_has_no_graph():
    model = new_model().requires_grad_(True)
    x, given, _ = clip_of(3)
    caches = model.new_caches()
    model(x, torch.zeros(2), caches=caches, write=True, **given)
    before = held_by(caches)
    numbers = [tensor.clone() for tensor in before]
    model(x, torch.ones(2), caches=caches, **given).sum().backward()
    now = held_by(caches)
    assert len(now) == len(before) == 2 * 2                     # keys and values of two layers
    for tensor, old, number in zip(now, before, numbers):
        assert tensor is old
        assert tensor.equal(number)
        assert not tensor.requires_grad


def test_the_cache_holds_keys_and_values_in_one_dtype():
    """Under autocast norms return float32."""
    model = new_model()
    x, given, _ = clip_of(3)
    caches = model.new_caches()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, torch.zeros(2), caches=caches, write=True, **given)
    assert {tensor.dtype for tensor in held_by(caches)} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------------
# Tracks, on pictures of 48 x 32 pixels: 6 x 4 cells of 8 pixels.

def random_head():
    """A function of tracks, visible, ids to (B, 5, F, 4, 6)."""
    head = randomised(TrackHead(8, 5, 8))
    return functools.partial(head, height=32, width=48)


def identity_head():
    """One whose output is the packed volume itself, 4 frames of 8 channels: (B, 32, F, 4, 6)."""
    head = TrackHead(8, 32, 8).requires_grad_(False)
    head.conv.weight.copy_(torch.eye(32)[..., None, None, None])
    return head


def vector(number):
    """What an ID looks like in 8 channels: its upper 16 bits in 4, its lower ones in 4."""
    upper, lower = divmod(int(number), 2 ** 16)
    channels = []
    for half in upper, lower:
        channels += [math.cos(half), math.cos(half / 100), math.sin(half), math.sin(half / 100)]
    return torch.tensor(channels)


def volume_of(tracks, visible, ids):
    """Eq. 1 as loops: (B, 3 + T, 8, h, w), three empty frames before frame 0. Of several tracks in
    one cell, the one with the lowest ID stays."""
    B, T, N, _ = tracks.shape
    volume = torch.zeros(B, 3 + T, 8, 4, 6)
    frames = itertools.product(range(B), range(T))
    for b, t in frames:
        for n in ids[b].argsort(descending=True).tolist():
            x, y = tracks[b, t, n].tolist()
            inside = 0 <= x < 48 and 0 <= y < 32
            if inside and visible[b, t, n]:
                row = int(y) // 8
                column = int(x) // 8
                volume[b, 3 + t, :, row, column] = vector(ids[b, n])
    return volume


def packed(volume):
    """Four frames to the channels: (B, 4 F, d, h, w) to (B, 4 d, F, h, w)."""
    volume = volume.unflatten(1, (-1, 4))                       # (B, F, 4, d, h, w)
    return volume.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def test_track_head_writes_the_sinusoid_of_the_id_where_eq_1_says():
    tracks, visible, ids = new_tracks(13, 9)
    tracks[0, 2, 0] = torch.tensor([15.9, 7.99])                # at the end of a cell
    tracks[0, 3, 0] = torch.tensor([16.0, 8.0])                 # and at the start of another
    visible[:, 2:4, 0] = True
    volume = volume_of(tracks, visible, ids)
    cells = volume.norm(dim=2) > 0
    assert cells.sum() > 50, "too few cells for a test"
    found = identity_head()(tracks, visible, ids, 32, 48)
    assert_near(found, packed(volume), 1e-6)


def test_frame_0_sits_in_the_last_of_the_four_packed_slots():
    tracks = torch.full((1, 9, 1, 2), 20.0)
    ids = torch.tensor([[5]])
    for frame, latent, slot in (
            (0, 0, 3),
            (1, 1, 0), (4, 1, 3),
            (5, 2, 0), (8, 2, 3)):
        visible = torch.zeros(1, 9, 1).bool()
        visible[0, frame] = True
        expected = torch.zeros(4, 8, 3, 4, 6)                   # (slot, d, F, h, w)
        expected[slot, :, latent, 2, 2] = vector(5)
        found = identity_head()(tracks, visible, ids, 32, 48)
        assert_near(found[0], expected.flatten(0, 1), 1e-6)


def test_hidden_and_outside_tracks_leave_zeros():
    head = random_head()
    tracks, visible, ids = new_tracks(5, 8)
    shown = visible | True
    hidden = visible & False
    nan = math.nan
    inf = math.inf
    outside = [(-0.01, 4), (4, -3), (48, 4), (4, 32), (4, -1e9), (nan, 4), (inf, 4), (4, -inf)]
    outside = torch.tensor(outside).expand_as(tracks)           # eight tracks that stand still
    assert not head(outside, shown, ids).any()
    corner = torch.tensor([47.99, 31.99]).expand_as(tracks)
    assert head(corner, shown, ids)[..., 3, 5].any()

    whole = head(tracks, visible, ids)
    assert whole.any()
    assert not head(tracks, hidden, ids).any()
    assert not head(tracks[:, :, :0], visible[:, :, :0], ids[:, :0]).any()              # no track
    unknown = tracks.where(visible[..., None], nan)
    assert head(unknown, visible, ids).equal(whole)


def test_the_order_of_tracks_does_not_matter():
    head = random_head()
    tracks, visible, ids = new_tracks(9, 60)                    # in 24 cells: many share one
    order = torch.randperm(60, generator=seeded())
    shuffled = head(tracks[:, :, order], visible[:, :, order], ids[:, order])
    assert shuffled.equal(head(tracks, visible, ids))


def test_track_head_chunk_by_chunk_equals_the_whole():
    head = random_head()
    tracks, visible, ids = new_tracks(33, 7)
    whole = head(tracks, visible, ids)
    assert whole.shape == (2, 5, 9, 4, 6)
    parts = []
    for now in slice(0, 9), slice(9, 21), slice(21, 25), slice(25, 33):
        part = head(tracks[:, now], visible[:, now], ids)
        parts.append(part)
    assert_near(torch.cat(parts, 2), whole, 1e-6)               # to the bit only on one thread
    three = tracks[:, :3]
    assert_error(AssertionError, "3 frames", head, three, visible[:, :3], ids)


def test_tracks_of_another_shape_or_type_are_refused():
    head = random_head()
    tracks, visible, ids = new_tracks(9, 7)
    with_score = torch.cat([tracks, tracks[..., :1]], 3)

    def refused(text, *inputs):
        assert_error(AssertionError, text, head, *inputs)

    refused("tracks (2, 9, 7, 3), expected (2, 9, 7, 2)", with_score, visible, ids)
    refused("visible (2, 9, 6), expected (2, 9, 7)", tracks, visible[..., :6], ids)
    refused("ids (1, 7), expected (2, 7)", tracks, visible, ids[:1])
    refused("visible is torch.float32, expected bool", tracks, visible.float(), ids)
    refused("ids are torch.float32, expected int64", tracks, visible, ids.float())


def test_a_track_starts_where_it_is_in_frame_0_if_it_is_visible_there():
    tracks = rand(2, 3, 2, 2)                                   # two tracks in each of two clips
    visible = torch.tensor([
        [[1, 0], [1, 1], [0, 1]],
        [[0, 1], [1, 0], [1, 0]]]).bool()
    start = start_points(tracks, visible)
    assert start[0, 0].equal(tracks[0, 0, 0])
    assert start[1, 1].equal(tracks[1, 0, 1])
    assert start[0, 1].isnan().all()
    assert start[1, 0].isnan().all()


def test_track_ids_are_distinct_or_all_the_same():
    tracks, _, _ = new_tracks(9, 200)
    ids = track_ids(tracks, replace(SMALL, track_id_mode="random"), seeded())
    assert len(set(ids.flatten().tolist())) == 400

    ids = track_ids(tracks, replace(SMALL, track_id_mode="same"), seeded())
    assert ids.shape == (2, 200)
    assert ids.dtype == torch.int64
    assert not ids.any()


def test_conditions_may_outlast_a_shorter_last_chunk():
    noise, given, _ = clip_of(7)
    chunks = rollout(new_model(), noise[:, :, :5], given)
    assert [x0.shape[2] for x0 in chunks] == [3, 2]


def test_tracks_handed_to_the_model_as_points_are_refused_by_the_name_of_what_makes_features():
    model = new_model()
    noise, given, _ = clip_of(3)
    points, _, _ = new_tracks(9, 8)
    sigma = torch.ones(2)
    assert_error(AssertionError, "see track_features", model, noise, sigma, tracks=points)
    shapes = "condition image (2, 3, 3, 4, 6), expected (2, 0, 3, 4, 6)"
    assert_error(AssertionError, shapes, model, noise, sigma, image=noise[:, :3])


def test_latents_and_sigma_that_do_not_fit_are_refused_in_numbers():
    one = torch.ones(1)
    for model in new_model(), new_model(**vars(COPYING)):
        def refused(text, x, sigma, model=model):
            assert_error(AssertionError, text, model, x, sigma)

        refused("latents of 5x6 do not divide into patches of 2x2", rand(1, 4, 3, 5, 6), one)
        refused("latents of 4x5 do not divide into patches of 2x2", rand(1, 4, 3, 4, 5), one)
        refused("latents of 3 channels, expected 4", rand(1, 3, 3, 4, 6), one)
        x = rand(2, 4, 3, 4, 6)
        expected = "expected (2,) or (2, 3)"
        refused(f"sigma (3,), {expected}", x, torch.ones(3))
        refused(f"sigma (1,), {expected}", x, one)
        refused(f"sigma (2, 2), {expected}", x, torch.ones(2, 2))
        refused(f"sigma (), {expected}", x, torch.tensor(1.0))
        refused("sigma 0.5, expected a tensor", x, 0.5)
        refused("latents (2, 4, 4, 6), expected (B, 4, F, h, w)", x[:, :, 0], torch.ones(2))


def test_text_and_clip_that_do_not_fit_are_refused():
    model = new_model()
    with_image = new_model(clip_dim=10)
    x, _, _ = clip_of(3)
    sigma = torch.ones(2)
    for shape in (2, 3, 11), (1, 3, 12), (3, 12):
        text = rand(*shape)
        assert_error(AssertionError, f"text {shape}, expected (2, L, 12)", model, x, sigma, text)
    too_long = "text of 6 rows, at most 5"
    assert_error(AssertionError, too_long, model, x, sigma, rand(2, 6, 12))
    clip = rand(2, 257, 10)
    assert with_image(x, sigma, clip=clip).isfinite().all()
    missing = "clip is given, but the model has no image branch"
    assert_error(AssertionError, missing, model, x, sigma, clip=clip)
    shapes = "clip (2, 256, 10), expected (2, 257, 10)"
    assert_error(AssertionError, shapes, with_image, x, sigma, clip=clip[:, :256])


def test_caches_of_another_batch_size_or_model_are_refused():
    model = new_model()
    x, _, _ = clip_of(3)
    sigma = torch.ones(2)
    assert_error(AssertionError, "write=True needs caches", model, x, sigma, write=True)
    caches = model.new_caches()
    model(x, sigma, caches=caches, write=True)                  # 3 latent frames of 2 x 3 tokens

    def refused(text, x, caches):
        sigma = torch.ones(len(x))
        assert_error(AssertionError, text, model, x, sigma, caches=caches)

    refused("the cache holds a batch of 2, the latents are 1", x[:1], caches)
    tall = rand(2, 4, 3, 8, 8)
    refused("holds 18 tokens, a latent frame now has 16", tall, caches)
    refused("1 caches, expected one per layer: 2", x, caches[:1])


# --------------------------------------------------------------------------------------------------
# The teacher: joint guidance, Euler steps.

def test_joint_guidance_equals_the_expanded_algebra():
    full = rand(2, 4, 3, 2, 2).double()
    no_text = rand_like(full, seed=1)
    no_motion = rand_like(full, seed=2)

    def guided(w_text, w_motion):
        return joint_guidance(full, no_text, no_motion, w_text, w_motion)

    for t, m in (3.0, 1.5), (0.5, 4.0), (1.0, 0.0), (0.0, 1.5):
        mean = (t * no_text + m * no_motion) / (t + m)
        expected = (t + m) * full - (t + m - 1) * mean
        assert_near(guided(t, m), expected, 1e-12)
    text_alone = no_text + 2 * (full - no_text)
    assert_near(guided(2.0, 0.0), text_alone, 1e-12)
    motion_alone = no_motion + 2 * (full - no_motion)
    assert_near(guided(0.0, 2.0), motion_alone, 1e-12)
    assert guided(0, 0) is full
    assert_near(guided(0.25, 0.75), full, 1e-12)                # of sum 1: no guidance
    assert_error(AssertionError, "must not cancel", guided, -1.0, 1.0)


def assert_guided(model, x, given, no_text, no_motion):
    """guided_velocity joins the velocities under these three sets of conditions."""
    sigma = torch.tensor([0.9, 0.4])
    full = model(x, sigma, **given)
    no_text = model(x, sigma, **no_text)
    no_motion = model(x, sigma, **no_motion)
    assert (full - no_text).abs().max() > 0.01
    assert (full - no_motion).abs().max() > 0.01
    expected = joint_guidance(full, no_text, no_motion, 3.0, 1.5)
    guided = guided_velocity(model, x, sigma, given, (3.0, 1.5))
    assert_near(guided, expected, 1e-5)
    unguided = guided_velocity(model, x, sigma, given, (0, 0))
    assert unguided.equal(full)
    text_alone = guided_velocity(model, x, sigma, given, (3.0, 0.0))
    assert_near(text_alone, no_text + 3 * (full - no_text), 1e-5)
    motion_alone = guided_velocity(model, x, sigma, given, (0.0, 1.5))
    assert_near(motion_alone, no_motion + 1.5 * (full - no_motion), 1e-5)


def test_guided_velocity_is_three_evaluations_without_text_and_without_tracks():
    x, given, _ = clip_of(3)
    tracks_alone = {"tracks": given["tracks"]}
    text_alone = {"text": given["text"]}
    assert_guided(new_model(), x, given, tracks_alone, text_alone)


def test_a_null_text_of_another_length_is_refused():
    x, given, _ = clip_of(3)
    weights = (3.0, 0.0)
    for rows in 2, 4:
        null = rand(1, rows, SMALL.text_dim)
        text = f"null_text (1, {rows}, 12), expected (1, 3, 12)"
        call = (guided_velocity, new_model(), x, torch.ones(2), given, weights, null)
        assert_error(AssertionError, text, *call)
    null = rand(1, 3, SMALL.text_dim)
    one = guided_velocity(new_model(), x, torch.ones(2), given, weights, null)
    two = guided_velocity(new_model(), x, torch.ones(2), given, weights)
    assert not one.equal(two)


def test_guidance_by_one_weight_is_two_evaluations():
    x, given, _ = clip_of(3)
    model = unittest.mock.Mock(wraps=new_model())
    for guidance, count in ((3.0, 1.5), 3), ((3.0, 0.0), 2), ((0.0, 1.5), 2), ((0.0, 0.0), 1):
        guided_velocity(model, x, torch.ones(2), given, guidance)
        batch = model.call_args.args[0]
        assert len(batch) == 2 * count, guidance


def test_without_a_text_its_weight_counts_as_zero():
    x, given, _ = clip_of(3)
    given["text"] = None
    model = unittest.mock.Mock(wraps=new_model())
    sigma = torch.ones(2)
    found = guided_velocity(model, x, sigma, given, (3.0, 1.5))
    batch = model.call_args.args[0]
    assert len(batch) == 2 * 2
    full = model(x, sigma, **given)
    no_motion = model(x, sigma)
    assert_near(found, joint_guidance(full, full, no_motion, 0.0, 1.5), 1e-5)
    alone = guided_velocity(model, x, sigma, given, (3.0, 0.0))
    assert alone.equal(model(x, sigma, **given))


def test_guidance_never_leaves_out_the_image():
    x, given, _ = clip_of(3)
    given["image"] = rand_like(x, seed=7)
    no_text = given | {"text": None}
    no_motion = given | {"tracks": None}
    assert_guided(new_model(in_dim=16), x, given, no_text, no_motion)


def test_guidance_leaves_out_the_copies_with_the_tracks():
    model = new_model(**vars(COPYING))
    x, given, _ = clip_of(3, COPYING)
    given["copies"] = rand(2, 10, 3, 4, 6, seed=8)
    no_text = given | {"text": None}
    no_motion = dict(given)
    for name in "tracks", "copies":
        no_motion[name] = torch.zeros_like(given[name])
    assert_guided(model, x, given, no_text, no_motion)


def end_of_euler(model, guidance):
    """(x0, its sigma) of a clip."""
    model.config = replace(model.config, guidance=guidance)
    noise, given, first = clip_of(3)
    path = list(euler(model, noise, given, first))
    return path[-1]


def test_euler_is_guided_as_the_config_says():
    model = new_model(steps=2)
    noise, given, first = clip_of(3)
    half = schedule(2, 5.0)[1]
    x = noise
    for sigma, following in (1.0, half), (half, 0.0):
        of_clips = torch.tensor([sigma, sigma]).double()
        x, sigma_frames = with_first(x, of_clips, first)
        velocity = guided_velocity(model, x, sigma_frames, given, (2.0, 1.0))
        x = x + (following - sigma) * velocity
    guided, sigma = end_of_euler(model, (2.0, 1.0))
    assert sigma == 0
    assert_near(guided[:, :, 1:], x[:, :, 1:], 1e-5)
    unguided, _ = end_of_euler(model, (0, 0))
    assert not unguided.equal(guided)


def test_euler_lands_on_the_point_that_an_exact_velocity_points_to():
    noise, _, first = clip_of(3)
    goal = torch.cat([first, rand(2, 4, 2, 4, 6, seed=9)], 2)

    def exact(x_t, sigma, text=None):
        """Of data that are all `goal`; any velocity at the image, where it does not count."""
        sigma = sigma[:, None, :, None, None]
        velocity = (x_t - goal) / sigma.clamp(min=1e-9)
        return velocity.masked_fill(sigma == 0, 99)

    exact.config = replace(SMALL, steps=7, guidance=(0, 0))
    for image in first, None:
        path = list(euler(exact, noise, {}, image))
        x0, _ = path[-1]
        assert_near(x0, goal, 1e-5)
        sigmas = schedule(7, 5.0) + (0,)
        assert len(path) == len(sigmas)
        for (x, sigma), expected in zip(path, sigmas):
            assert sigma == expected
            between = (1 - sigma) * goal + sigma * noise
            assert_near(x[:, :, 1:], between[:, :, 1:], 1e-5)
            if image is not None:
                assert x[:, :, :1].equal(image)


# --------------------------------------------------------------------------------------------------
# The student: the rollout.

def chunk_by_hand(model, x, image, conditions, caches, rng):
    """x0 at each noise level, noised again to the next one; then the clean pass."""
    sigmas = model.config.sigmas
    for step, sigma in enumerate(sigmas):
        sigma_frames = torch.full((2, x.shape[2]), sigma).double()
        if image is not None:
            x = torch.cat([image, x[:, :, 1:]], 2)
            sigma_frames[:, 0] = 0
        velocity = model(x, sigma_frames, caches=caches, **conditions)
        x0 = x - sigma_frames.float()[:, None, :, None, None] * velocity
        if step + 1 < len(sigmas):
            following = sigmas[step + 1]
            fresh = torch.randn(x.shape, generator=rng)
            x = (1 - following) * x0 + following * fresh
    model(x0, torch.zeros(2), caches=caches, write=True, **conditions)
    return x0


def test_rollout_equals_the_algorithm_by_hand():
    model = new_model()
    noise, given, first = clip_of(8)
    rng = seeded(5)
    caches = model.new_caches()
    by_hand = []
    image = first
    for now in slice(0, 3), slice(3, 6), slice(6, 8):           # the last chunk is shorter
        x = noise[:, :, now]
        x0 = chunk_by_hand(model, x, image, part_of(given, now), caches, rng)
        by_hand.append(x0)
        image = None                                            # it is in the cache now
    rolled = list(rollout(model, noise, given, first, rng=seeded(5)))
    assert [x.shape[2] for x in rolled] == [3, 3, 2]
    assert_near(torch.cat(rolled, 2), torch.cat(by_hand, 2), 1e-5)
    assert rolled[0][:, :, :1].equal(first)
    assert not rolled[1][:, :, :1].equal(first)
    assert all(len(cache) == (3 + 2) * 6 for cache in caches)   # sink and window


def test_rollout_takes_chunks_and_caches_that_are_not_the_configs():
    noise, given, first = clip_of(8)
    other = new_model(chunk=2, sink=0, window=2)
    expected = list(rollout(other, noise, given, first, rng=seeded()))
    model = new_model()
    caches = model.new_caches(sink=0, window=2)
    chunks = noise.split(2, 2)
    conditions = split_conditions(given, [2] * 4)
    made = rollout(model, chunks, conditions, first, rng=seeded(), caches=caches)
    made = list(made)
    assert len(expected) == 4
    assert all_equal(made, expected)
    assert all(len(cache) == 2 * 2 * 6 for cache in caches)


def test_a_rollout_that_cannot_be_is_refused_at_once():
    model = new_model()                                         # of three noise levels
    noise, given, first = clip_of(6)

    def refused(text, *arguments):
        assert_error(AssertionError, text, next, rollout(model, *arguments))

    for step in -1, 3:
        refused(f"exit_step {step}, expected 0 to 2", noise, given, first, step)
    whole = first.expand(-1, -1, 6, -1, -1)
    refused("first_latent (2, 4, 6, 4, 6), expected (2, 4, 1, 4, 6)", noise, given, whole)


def test_tracks_of_one_frame_are_those_of_the_first_chunk_alone():
    noise, given, first = clip_of(2)
    given = part_of(given, slice(0, 1))
    parts = list(split_conditions(given, [1, 1]))
    assert [part["tracks"].shape[2] for part in parts] == [1, 0]
    made = rollout(new_model(chunk=1), noise, given, first)
    next(made)
    assert_error(AssertionError, "(2, 8, 0, 4, 6), expected (2, 8, 1, 4, 6)", next, made)


def test_a_stream_fed_chunk_by_chunk_equals_the_whole_clip_and_asks_late():
    """The user steers while the video streams: a chunk's conditions are asked for just before it is
    made."""
    model = new_model()
    noise, given, first = clip_of(9)
    events = []

    def conditions():
        for i in range(3):
            events.append(f"ask {i}")
            yield part_of(given, slice(3 * i, 3 * i + 3))

    chunks = noise.split(3, 2)
    endless = itertools.chain(chunks, itertools.repeat(chunks[0]))
    parts = []
    for x0 in rollout(model, endless, conditions(), first, rng=seeded(5)):
        events.append(f"got {len(parts)}")
        parts.append(x0)
    assert events == ["ask 0", "got 0", "ask 1", "got 1", "ask 2", "got 2"]
    whole = list(rollout(model, noise, given, first, rng=seeded(5)))
    assert len(whole) == 3
    assert all_equal(parts, whole)


def test_future_tracks_do_not_change_past_frames():
    model = new_model()
    noise, given, first = clip_of(12)
    tracks = given["tracks"].clone()
    tracks[:, :, 6:] += 1                                       # from chunk 2 on
    one = rollout(model, noise, given, first, rng=seeded())
    two = rollout(model, noise, given | {"tracks": tracks}, first, rng=seeded())
    same = [a.equal(b) for a, b in zip(one, two)]
    assert same == [True, True, False, False]


def test_training_stops_at_the_exit_step_and_only_that_has_a_graph():
    model = new_model().requires_grad_(True)
    noise, given, first = clip_of(6)                            # two chunks
    calls = []

    def record(model, args, options, velocity):
        sigma = args[1].max().item()
        write = options.get("write", False)
        calls.append((sigma, velocity.requires_grad, write))

    model.register_forward_hook(record, with_kwargs=True)
    for exit_step, enabled in itertools.product((0, 1, 2, None), (True, False)):
        calls.clear()
        with torch.set_grad_enabled(enabled):
            chunks = list(rollout(model, noise, given, first, exit_step))
        last = 2
        if exit_step is not None:
            last = exit_step
        grad = enabled and exit_step is not None                # sampling never has one
        expected = []
        for step, sigma in enumerate(SMALL.sigmas[:last + 1]):
            expected.append((sigma, grad and step == last, False))
        expected.append((0.0, False, True))                     # the clean pass
        assert calls == expected + expected
        assert all(x0.requires_grad == grad for x0 in chunks)


def test_no_gradient_flows_from_a_chunk_into_the_chunks_before_it():
    model = new_model().requires_grad_(True)
    noise, given, first = clip_of(6)
    parts = [part.clone().requires_grad_(True) for part in noise.split(3, 2)]
    one, two = rollout(model, iter(parts), given, first, exit_step=0)
    two.square().sum().backward()
    assert parts[0].grad is None
    assert parts[1].grad.any()
    keys = model.blocks[0].self_attn.k.weight
    assert keys.grad.any()
    one.square().sum().backward()
    assert parts[0].grad.any()


def test_rollout_leaves_the_callers_grad_mode_alone():
    model = new_model().requires_grad_(True)
    noise, given, first = clip_of(9)
    for mode, exit_step in itertools.product((True, False), (0, None)):
        with torch.set_grad_enabled(mode):
            for _ in rollout(model, noise, given, first, exit_step):
                assert torch.is_grad_enabled() == mode          # between the chunks
            assert torch.is_grad_enabled() == mode


def test_training_and_sampling_roll_out_the_same_bits():
    model = new_model().requires_grad_(True)
    noise, given, first = clip_of(9)
    trained = rollout(model, noise, given, first, exit_step=2, rng=seeded(3))
    trained = [x0.detach() for x0 in trained]
    with torch.inference_mode():
        sampled = list(rollout(model, noise, given, first, rng=seeded(3)))
    assert all_equal(trained, sampled)


# --------------------------------------------------------------------------------------------------
# What the student learns from: distribution matching (train_distill.py).

UNGUIDED = SimpleNamespace(guidance=(0, 0))


def gaussian(mean, std):
    """A network that has learned all there is to learn of data ~ N(mean, std²): their exact
    velocity. std 0: the data are a point, and x0 is always the mean."""
    def velocity(x_t, sigma, text=None):
        sigma = sigma.reshape(len(x_t), 1, -1, 1, 1).to(x_t)
        variance = (1 - sigma) ** 2 * std ** 2 + sigma ** 2     # of x_t
        gain = (1 - sigma) * std ** 2 / variance
        x0 = mean + gain * (x_t - (1 - sigma) * mean)
        v = (x_t - x0) / sigma.clamp(min=1e-9)
        return torch.where(sigma > 0, v, 0)
    velocity.config = UNGUIDED
    return velocity


def dmd_gradient(x0, teacher, critic, first=None, weight=1.0):
    """Of td.dmd_loss with a shift of 5; the noise is always the same."""
    torch.manual_seed(0)
    x0 = x0.detach().clone().requires_grad_(True)
    td.dmd_loss(x0, teacher, critic, {}, first, 5.0, weight).backward()
    return x0.grad


def test_dmd_gradient_is_critic_minus_teacher_normalised():
    """With points as data, real and fake are known: DMD's eq. 7, 8."""
    x0 = 2 + rand(4, 3, 5, 2, 2)
    real = rand_like(x0, seed=2)
    fake = rand_like(x0, seed=3)
    distance = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = (fake - real) / distance / x0.numel()
    teacher = gaussian(real, 0)
    critic = gaussian(fake, 0)
    assert_near(dmd_gradient(x0, teacher, critic), expected, 1e-4)
    first = rand(4, 3, 1, 2, 2, seed=1)
    grad = dmd_gradient(x0, teacher, critic, first)
    assert grad[:, :, 0].abs().max() < 1e-7                     # the image gives frame 0
    assert grad[:, :, 1:].abs().min() > 0


def test_dmd_gradient_of_a_perfect_clip_is_finite():
    x0 = torch.zeros(4, 3, 5, 2, 2)
    fake = rand_like(x0, seed=3)
    no_noise = unittest.mock.patch.object(torch, "randn_like", torch.zeros_like)
    with no_noise:                                              # real is x0 to the bit
        grad = dmd_gradient(x0, gaussian(0, 0), gaussian(fake, 0))
    assert grad.isfinite().all()


def test_a_generator_that_follows_the_dmd_gradient_ends_at_the_data():
    """A generator N(mean, 1) with an exact critic, data N(-1, 1)."""
    torch.manual_seed(0)
    mean = torch.tensor(2.0, requires_grad=True)
    teacher = gaussian(-1, 1)
    for _ in range(150):
        x0 = mean + torch.randn(8, 1, 1, 4, 4)
        critic = gaussian(mean.detach(), 1)
        td.dmd_loss(x0, teacher, critic, {}, None, 5.0).backward()
        mean.data -= 0.1 * mean.grad
        mean.grad = None
    assert abs(mean + 1) < 0.1, mean


def test_generator_and_critic_are_scored_at_the_noise_levels_of_the_config():
    """A recipe's shift reaches both losses, and both draw from one distribution: uniform, shifted,
    clamped."""
    count = 4000
    x0 = rand(count, 1, 2, 1, 1)
    first = x0[:, :, :1]
    given = {"tracks": torch.zeros(count, 1, 2, 1, 1)}
    seen = []

    def network(x, sigma, tracks=None):
        seen.append(sigma[:, -1])                               # frame 0 is the image, at sigma 0
        return x * 0

    network.config = UNGUIDED
    torch.manual_seed(0)
    for shift in 1.0, 8.0:
        seen.clear()
        td.dmd_loss(x0, network, network, given, first, shift)
        td.critic_loss(x0, network, given, first, shift)
        even = (torch.arange(count) + 0.5) / count
        expected = shift_sigma(even, shift).clamp(0.02, 0.98)
        assert len(seen) == 3                                   # teacher, critic; critic
        for sigma in seen:
            sigma = sigma.sort().values
            assert (sigma - expected).abs().max() < 0.05, shift
            assert_near(sigma[[0, -1]], torch.tensor([0.02, 0.98]), 1e-6)


def test_teacher_and_critic_are_given_x_t_at_the_sigma_that_they_are_told():
    """Of zeros, with ones as noise, x_t is sigma."""
    x0 = torch.zeros(8, 1, 3, 2, 2)
    calls = []

    def network(x, sigma):
        told = sigma.to(x)[:, None, :, None, None]
        assert x.equal(told.expand_as(x))
        assert sigma[:, 1:].min() > 0
        calls.append(sigma[:, 0].any().item())
        return x * 0

    network.config = UNGUIDED
    with unittest.mock.patch.object(torch, "randn_like", torch.ones_like):
        for first_latent in None, x0[:, :, :1]:
            td.dmd_loss(x0, network, network, {}, first_latent, 5.0)
            td.critic_loss(x0, network, {}, first_latent, 5.0)
    assert calls == [True] * 3 + [False] * 3                    # an image is not noised


def has_gradient(model):
    for p in model.parameters():
        if p.grad is not None and p.grad.any():
            return True
    return False


def test_dmd_loss_moves_the_generator_only_and_critic_loss_the_critic_only():
    generator = new_model(0).requires_grad_(True)
    teacher = new_model(1, guidance=(3.0, 1.5)).requires_grad_(True)
    critic = new_model(2).requires_grad_(True)
    networks = (generator, teacher, critic)
    noise, given, first = clip_of(6)
    calls = []

    def record(model, args, velocity):
        calls.append((model, len(velocity)))

    def moved_by(loss):
        calls.clear()
        for network in networks:
            network.zero_grad()
        chunks = rollout(generator, noise, given, first, exit_step=1)
        loss(torch.cat(list(chunks), 2)).backward()
        return [network for network in networks if has_gradient(network)]

    teacher.register_forward_hook(record)
    critic.register_forward_hook(record)
    moved = moved_by(lambda x0: td.dmd_loss(x0, teacher, critic, given, first, 5.0))
    assert moved == [generator]
    assert calls == [(teacher, 3 * 2), (critic, 2)]             # only the teacher is guided
    moved = moved_by(lambda x0: td.critic_loss(x0, critic, given, first, 5.0))
    assert moved == [critic]
    assert calls == [(critic, 2)]


def test_a_reward_scales_each_clips_own_gradient():
    x0 = rand(3, 2, 4, 2, 2)
    teacher = gaussian(1, 0.5)
    critic = gaussian(0, 1)
    plain = dmd_gradient(x0, teacher, critic)
    ones = torch.ones(3, 1, 1, 1, 1)
    grad = dmd_gradient(x0, teacher, critic, weight=ones)
    assert grad.equal(plain)
    rewards = torch.tensor([1.0, 0.0, 7.5]).view(3, 1, 1, 1, 1)
    grad = dmd_gradient(x0, teacher, critic, weight=rewards)
    assert_near(grad, rewards * plain, 1e-6)


def test_the_end_of_a_long_rollout_is_judged_beside_the_image_it_began_with():
    latents = rand(2, 4, 15, 2, 3)
    chunks = latents.split(3, 2)
    first = rand(2, 4, 1, 2, 3, seed=1)
    points = {
        "tracks": rand(2, 57, 5, 2, seed=2),
        "visible": rand(2, 57, 5, seed=3) > 0,
        "ids": torch.arange(5)}
    x0, told = td.judged_clip(chunks[-3:], 6, first, points)
    last = latents[:, :, -5:]
    assert x0.equal(torch.cat([first, last], 2))
    times = [0] + list(range(37, 57))                           # 6 latents are 21 frames
    assert told["tracks"].equal(points["tracks"][:, times])
    assert told["visible"].equal(points["visible"][:, times])
    assert told["ids"] is points["ids"]
    whole, told = td.judged_clip(chunks, 15, first, points)
    assert whole.equal(latents)
    assert told["tracks"].equal(points["tracks"])
    chunks = latents[:, :, :10].split([1, 3, 3, 3], 2)
    x0, _ = td.judged_clip(chunks, 4, first, points)            # the last chunk and one latent more
    assert x0.equal(torch.cat([first, latents[:, :, 7:10]], 2))


# What teacher and causal student learn from before.

def test_flow_loss_is_zero_for_the_exact_velocity_and_leaves_the_image_out():
    x0 = rand(3, 4, 5, 2, 2)
    first = x0[:, :, :1]
    given = {"tracks": rand(3, 1, 5, 2, 2) > 0}

    def exact(x_t, sigma, tracks):
        assert x_t[:, :, 0].equal(x0[:, :, 0])
        assert not sigma[:, 0].any()
        v = (x_t - x0) / sigma[:, None, :, None, None].clamp(min=1e-9)
        v[:, :, 0] += 99                                        # the image's does not count
        return v

    def blank(x_t, sigma, tracks):
        return x_t * 0

    sigma = torch.tensor([0.3, 0.8, 1.0])
    assert td.flow_loss(exact, x0, sigma, given, first) < 1e-9
    assert td.flow_loss(blank, x0, torch.ones(3), given, first) > 1


def test_the_loss_counts_what_a_track_touches_more():
    tracks = torch.full((1, 5, 2, 2), 20.0)                     # cell (2, 2)
    tracks[0, :, 1] = torch.tensor([41.0, 25.0])                # cell (3, 5), in the corner
    visible = torch.zeros(1, 5, 2).bool()
    visible[0, 0, 0] = True                                     # in the first latent
    visible[0, 3, 1] = True                                     # in the second
    expected = torch.zeros(1, 2, 4, 6)
    expected[0, 0, 1:4, 1:4] = 1                                # and the cells beside it
    expected[0, 1, 2:4, 4:6] = 1
    touched = td.touched_cells(tracks, visible, SMALL)
    assert touched.equal(expected)


def test_the_flow_loss_is_a_weighted_mean():
    def blank(x_t, sigma):
        return x_t * 0

    x0 = rand(2, 4, 3, 2, 2, seed=3)
    weight = 1 + rand(2, 3, 2, 2, seed=1).abs()
    torch.manual_seed(0)
    velocity = torch.randn_like(x0) - x0
    error = 2 * velocity.square().mean(1)                       # (B, F, h, w)
    for first, begin in (None, 0), (x0[:, :, :1], 1):           # the image does not count
        torch.manual_seed(0)
        loss = td.flow_loss(blank, x0, torch.ones(2), {}, first, weight, 2.0)
        counted = weight[:, begin:]
        expected = (error[:, begin:] * counted).sum() / counted.sum()
        assert_near(loss, expected, 1e-6)


def causal_loss(x0, past, context, hook=None):
    """td.causal_loss of a model that has x0 at each noise level, with the same draws each time.
    context: (sink, window). hook: called after each pass of the model."""
    model = new_model()
    if hook:
        model.register_forward_hook(hook, with_kwargs=True)
    _, given, _ = clip_of(12)
    sink, window = context
    context = dict(sink=sink, window=window)
    noise = rand_like(x0, seed=4)
    states = []
    for sigma in SMALL.sigmas:
        states.append(add_noise(x0, noise, torch.tensor([sigma, sigma])))
    torch.manual_seed(0)
    return td.causal_loss(model, states, x0, given, context, past=past).item()


def test_causal_loss_sees_the_past_that_the_cache_holds():
    x0, _, _ = clip_of(12)
    contexts = ((1, None), (1, 1), (1, 0), (0, 1), (0, 0))      # sink, window
    losses = [causal_loss(x0, x0, context) for context in contexts]
    assert len(set(losses)) == 5, losses
    past = x0.clone()
    past[:, :, 9:] = rand(2, 4, 3, 4, 6, seed=5)                # the last chunk: no one reads it
    assert causal_loss(x0, past, (1, None)) == losses[0]
    past = past.flip(2)
    assert causal_loss(x0, past, (1, None)) != losses[0]


def test_causal_loss_caches_the_clean_past():
    x0, _, _ = clip_of(12)
    past = rand_like(x0, seed=5)
    written = []

    def record(model, args, options, velocity):
        x, sigma = args
        if options.get("write", False):
            assert not sigma.any(), "the cache holds clean latents, at sigma 0"
            written.append(x)

    causal_loss(x0, past, (1, None), record)
    assert len(written) == 3                                    # no one reads the last chunk
    assert torch.cat(written, 2).equal(past[:, :, :9])


def test_causal_loss_without_memory_takes_each_chunk_as_a_clip_of_its_own():
    model = new_model()
    x0, given, _ = clip_of(12)
    noise = rand_like(x0, seed=4)
    torch.manual_seed(0)
    total = 0
    image = x0[:, :, :1]
    for now in slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12):
        sigma = SMALL.sigmas[int(torch.randint(0, 3, ()))]
        of_clips = torch.tensor([sigma, sigma])
        target = x0[:, :, now]
        x_t = add_noise(target, noise[:, :, now], of_clips)
        x_t, sigma_frames = with_first(x_t, of_clips, image)
        velocity = model(x_t, sigma_frames, **part_of(given, now))
        error = to_x0(x_t, velocity, sigma_frames) - target
        total += error.square().sum()
        image = None
    loss = torch.tensor(causal_loss(x0, x0, (0, 0)))
    assert_near(loss, total / x0.numel(), 1e-5)


# --------------------------------------------------------------------------------------------------

def cpu_seconds():
    """What this process has computed, and the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cores():
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):                        # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def files_with_tests():
    """The names of the modules that hold tests: this one, then the others, the largest first, so
    that side by side no long one is left for the end."""
    names = ["__main__"]
    paths = sorted((HERE / "extras").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    for path in paths:
        names.append(f"extras.{path.stem}")
    return names


def named_tests(file, words):
    """(name, function) of a module's tests with one of the words in their name; of all if there are
    no words."""
    tests = []
    for name, function in vars(importlib.import_module(file)).items():
        wanted = not words or any(word in name for word in words)
        if name.startswith("test_") and wanted:
            tests.append((name, function))
    return tests


def run_test(test):
    """("passed", ""), ("SKIPPED", why) or ("FAILED", ""), whose traceback is printed."""
    try:
        test()
    except unittest.SkipTest as e:
        return "SKIPPED", f": {e}"
    except (Exception, SystemExit):
        traceback.print_exc()
        return "FAILED", ""
    return "passed", ""


def run_file(file, words=()):
    """Run named_tests. Returns a Counter of how they ended. Each line says how long a test took
    and, in brackets, what it computed, which other programs change less."""
    count = Counter()
    for name, test in named_tests(file, words):
        begin = time.time()
        begin_cpu = cpu_seconds()
        result, reason = run_test(test)
        count[result.lower()] += 1
        seconds = f"{time.time() - begin:6.2f} s ({cpu_seconds() - begin_cpu:.1f})"
        print(f"{seconds:16} {result:7}  {name}{reason}", flush=True)
    return count


def begin_process():
    """What each of two processes side by side does first: it leaves a core to the other, and should
    it crash it says in which test."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"                         # of the programs that tests start
    faulthandler.enable()


def run_file_quietly(file):
    """(The Counter of run_file, what was printed)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        count = run_file(file)
    return count, said.getvalue()


def run_side_by_side(files):
    """Run all tests in two processes, each of which takes the next file when it is done with one;
    what they print comes file by file, in order. A file that cannot be imported has failed, and
    where a process dies, so have all that were not through."""
    count = Counter()
    spawn = multiprocessing.get_context("spawn")                # a fork of threads may hang
    pool = ProcessPoolExecutor(2, spawn, begin_process)
    try:
        runs = [pool.submit(run_file_quietly, file) for file in files]
        for file, run in zip(files, runs):
            try:
                of_file, said = run.result()
            except Exception as e:
                of_file = Counter(failed=1)
                said = f"FAILED  all of {file}: {e!r}\n"
            print(said, end="", flush=True)
            count += of_file
    finally:
        pool.shutdown(cancel_futures=True)
    return count


def main(words, slow):
    """Run the tests with one of the words in their name. With no words, run all tests, in two
    processes if there are two cores. With `slow` run the slow ones too, in one process, because
    some of them measure time. Returns the exit code."""
    started = time.time()
    if words or slow or cores() < 2:
        count = Counter()
        for file in files_with_tests():
            count += run_file(file, words)
    else:
        count = run_side_by_side(files_with_tests())
    if not count:
        print(f"no test has one of these words in its name: {' '.join(words)}")
    print(f"{time.time() - started:.0f} s in all, {cpu_seconds():.0f} s of a core")
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    print(f"{count['passed']} passed, {count['failed']} failed{skipped}")
    return 1 if count["failed"] or not count["passed"] else 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.exit(main(words, "--slow" in sys.argv))
