"""Prompts by UMT5 and the image by CLIP, and what other programs encoded."""

import os
import re
import shutil
import unittest
import unittest.mock
import weakref
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sample
from extras import encoders
from extras.testing import (STUB, assert_error, assert_near, folder, quiet, rand, small_encoders,
                            wan_sampled, wan_workplace, with_transformers, workplace)
from motionstream import MotionStream, UserError


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
    c = replace(STUB, clip_dim=32, causal=True)
    with folder() as here:
        sources = encoders.Sources(prompt_embeds=here / "rows")
        good = {"prompt": rand(512, 4096), "clip": rand(257, 32)}
        for wrong in ({"prompt": rand(513, 4096)}, {"prompt": rand(5, 4095)}, {"prompt": rand(1, 5, 4096)},
                      {"prompt": rand(0, 4096)}, {"prompt": rand(5, 4096) / 0}, {"prompt": rand(4096)},
                      {"prompt": torch.ones(5, 4096, dtype=torch.int64)}, {"negative": rand(5, 4095)},
                      {"clip": rand(256, 32)}, {"clip": rand(257, 31)}, {"clip": rand(257, 32) / 0}):
            save_file(good | wrong, here / "rows")
            assert_error(UserError, f"{here / 'rows'}: {[*wrong][0]} ", encoders.encode, sources, c, None, "cpu")
        for tensors in {"a": rand(5, 4096), "b": rand(5, 4096)}, {}:
            save_file(tensors, here / "rows")
            assert_error(UserError, "no prompt", encoders.encode, sources, c, None, "cpu")
        save_file(good, here / "rows")
        text, null, clip = encoders.encode(sources, replace(c, text_len=513), None, "cpu")
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
        assert_error(UserError, "pip install -U transformers", encoders.text_encoder, here, "cpu")
        for part in "text_encoder", "tokenizer":
            for file in (here / part).iterdir():
                file.unlink()
            with quiet():
                assert_error(UserError, f"{here / part}: no complete", encoders.text_encoder, here, "cpu")
    assert len(encoders.NEGATIVE_PROMPT.split("，")) == 28 and encoders.NEGATIVE_PROMPT.endswith("倒着走")


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
        words = map(encoders.text_encoder(at, "cpu"), ("a red cat", encoders.NEGATIVE_PROMPT))
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
        assert code == 2 and "has no folder image_encoder" in err and err.count("\n") == 1, err


def test_what_public_weights_lack_is_said_before_they_load():
    _, here = wan_workplace()
    tracks = "--tracks", workplace()[1] / "tracks.npy"
    embeds, encoder = ("--prompt-embeds", here / "prompt.safetensors"), ("--text-encoder", here)
    cases = {("t2v", "--prompt", "a cat"): "--text-encoder", ("clip",): "--image-encoder",
             ("t2v", "--prompt", "a", *encoder, *embeds): "drop --prompt or --prompt-embeds",
             ("t2v", "--prompt", "a", *encoder): "has no folder tokenizer and no text_encoder",
             ("clip", "--prompt-embeds", here / "prompt.safetensors", "--image-encoder", here): "no folder image_encoder",
             ("t2v", "--text-encoder", here / "none"): "none: no such file or folder",
             ("t2v", "--image-encoder", here): "no image branch",
             ("self_forcing", "--negative-prompt", "red"): "--negative-prompt belongs to --sampler teacher",
             ("headless", *encoder): "reads words", ("t2v", "--guidance", "2,0"): "there is no text",
             ("t2v", *tracks): "drop --tracks",
             ("t2v", "--prompt-embeds", here / "t2v.safetensors"): "and no prompt",
             ("t2v", "--prompt-embeds", here / "none.safetensors"): "none.safetensors",
             ("t2v", "--vae", workplace()[1] / "vae.safetensors"): "give --vae its own",
             ("t2v", "--frames", 90, "--sampler", "stream"): "--memory",
             ("headless", *embeds): "reads words"}
    refuse = unittest.mock.Mock(side_effect=AssertionError("the model was loaded"))
    with unittest.mock.patch.object(MotionStream, "from_pretrained", refuse), \
            unittest.mock.patch.object(sample, "load_vae", refuse):
        for (weights, *flags), cure in cases.items():
            code, _, err, _ = wan_sampled(f"{weights}.{'pt' if weights == 'self_forcing' else 'safetensors'}", *flags)
            assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err) and cure in err, (weights, flags, err)
    assert not list(here.glob("*out*")), "something was written"
