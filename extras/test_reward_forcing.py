"""Reward Forcing's EMA-Sink."""

import sys
import unittest.mock
from dataclasses import replace

import torch

import sample
from extras.reward_forcing import EMASink
from extras.testing import HERE, assert_error, assert_near, new_model, quiet, rand
from motionstream import KVCache, UserError


def numbered(number, tokens=4):
    """Keys of chunk `number`; its values are their negatives."""
    return rand(1, tokens, 2, 4, seed=number)


def check_ema_sink(sink, window, decay):
    """Eq. 4 and 5: the sink is a running average of what is evicted."""
    chunks = [numbered(i) for i in range(6)]
    cache = EMASink(sink, window, decay)
    for k in chunks:
        cache.write(k, -k)
    latest = chunks[6 - window:]
    kept = chunks[:sink]
    if sink:
        for evicted in chunks[sink:6 - window]:
            kept[-1] = decay * kept[-1] + (1 - decay) * evicted
    nothing = numbered(0, 0)
    keys, values = cache.read(nothing, nothing)
    assert_near(keys, torch.cat(kept + latest, 1), 1e-6)
    assert_near(values, -keys, 1e-6)


def test_an_ema_sink_takes_up_what_leaves_the_window():
    check_ema_sink(sink=1, window=1, decay=0.9)
    check_ema_sink(sink=2, window=1, decay=0.5)         # the sink's last chunk takes it up
    check_ema_sink(sink=1, window=2, decay=0.0)
    check_ema_sink(sink=1, window=0, decay=0.7)         # the new chunk is evicted at once
    check_ema_sink(sink=0, window=1, decay=0.5)         # there is none
    check_ema_sink(sink=1, window=1, decay=1.0)         # which is the paper's


def test_an_ema_sink_that_keeps_all_absorbs_nothing():
    cache = EMASink(1, None, 0.5)
    for i in range(6):
        cache.write(numbered(i), numbered(i))
    assert len(cache.chunks) == 6
    assert cache.chunks[0][0].equal(numbered(0))


def test_an_ema_sink_has_no_graph():
    for window in 0, 1:
        cache = EMASink(1, window, 0.5)
        for i in range(3):
            k = numbered(i).requires_grad_()
            cache.write(k, 2 * k)
        assert not any(tensor.requires_grad for pair in cache.chunks for tensor in pair)


def test_an_ema_sink_refuses_chunks_of_another_size():
    """They would have no average; the paper's cache does not mind them."""
    cache = EMASink(1, 1, 0.9)
    for tokens in 6, 18:
        k = numbered(0, tokens)
        cache.write(k, -k)
    text = "EMA-Sink averages a chunk of 18 tokens into one of 6"
    assert_error(AssertionError, text, cache.write, k, -k)


def test_a_model_has_ema_sinks_if_its_config_or_the_caller_says_so():
    model = new_model(sink=2, window=3, sink_decay=0.5)
    others = model.new_caches(sink=0, window=None, sink_decay=0.9)
    assert len(others) == model.config.num_layers
    for caches, expected in (model.new_caches(), (2, 3, 0.5)), (others, (0, None, 0.9)):
        for cache in caches:
            assert (cache.sink, cache.window, cache.decay) == expected
    assert all(type(cache) is KVCache for cache in model.new_caches(sink_decay=1.0))


def test_without_extras_an_ema_sink_is_one_line_and_all_else_goes_on():
    model = new_model()
    without = {"extras": None, "extras.reward_forcing": None}
    with unittest.mock.patch.dict(sys.modules, without):
        assert len(model.new_caches()) == 2
        model.config = replace(model.config, sink_decay=0.5)
        needs = "needs extras/reward_forcing.py, which is missing from this copy"
        assert_error(UserError, f"sink_decay < 1 (EMA-Sink): {needs}", model.new_caches)


def test_the_teacher_which_has_no_cache_refuses_an_ema_sink():
    flags = ["--image", str(HERE / "assets/drag.png"), "--sampler", "teacher"]
    with quiet() as (_, err):
        assert sample.main(flags + ["--set", "sink_decay=0.5"]) == 2
    said = err.getvalue()
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert "tiny_teacher.safetensors: sink_decay belongs to --sampler stream" in said
