"""Prompts by UMT5 and the image by CLIP, and what other programs encoded."""

import os
import re
import shutil
import unittest.mock
import weakref
from dataclasses import replace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sample
from extras import encoders
from extras.testing import (STUB, assert_error, assert_near, folder, quiet, rand, small_encoders,
                            wan_sampled, wan_workplace, with_transformers, workplace)
from motionstream import MotionStream, UserError


def padded(rows):
    """Rows (L, 4096) as weights of Wan get them: (512, 4096) float32, zeros after their end."""
    return F.pad(rows.float(), (0, 0, 0, 512 - len(rows)))


# What wan_workplace() keeps as encoded.

def prompt_rows():
    return padded(rand(7, 4096))


def negative_rows():
    return padded(rand(9, 4096, seed=1).bfloat16())


def clip_rows():
    return rand(257, 32)


def here():
    return wan_workplace()[1]


def tracks():
    return ["--tracks", workplace()[1] / "tracks.npy"]


def sampled(weights, flags):
    """What sample.py says on stdout with public weights, and the DiT's calls."""
    picture = here() / "out.png"                    # the last frame, sooner written than a video
    words = flags + ["--out", picture]
    code, out, err, calls = wan_sampled(weights, *words)
    assert code == 0, err
    picture.unlink()
    return out, calls


def refused(weights, flags):
    """The line with which sample.py refuses flags with public weights."""
    code, _, err, _ = wan_sampled(weights, *flags)
    assert code == 2, (weights, flags)
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


# --------------------------------------------------------------------------------------------------
# What other programs encoded.

def test_encoded_texts_reach_the_teacher_padded_with_zeros():
    texts = ["--prompt-embeds", here() / "encoded.safetensors"]
    out, calls = sampled("t2v.safetensors", texts + ["--frames", 1, "--steps", 2])
    assert "guidance leads away" not in out
    assert len(calls) == 2
    assert len(calls[0].x) == 2, "two evaluations in one batch: this model has no tracks"
    assert calls[0].text.equal(torch.stack([prompt_rows(), negative_rows()]))


def test_without_a_negative_text_guidance_leads_away_from_zeros():
    texts = ["--prompt-embeds", here() / "prompt.safetensors"]
    out, calls = sampled("t2v.safetensors", texts + ["--frames", 1, "--steps", 1])
    assert "no tensor named negative" in out
    assert calls[0].text[1].count_nonzero() == 0


def test_without_any_text_there_is_no_guidance():
    out, calls = sampled("t2v.safetensors", ["--frames", 1, "--steps", 1])
    assert "no text at all" in out
    assert calls[0].text is None
    assert len(calls[0].x) == 1


def test_an_encoded_text_reaches_the_student_in_every_step():
    texts = ["--prompt-embeds", here() / "prompt.safetensors"]
    _, calls = sampled("self_forcing.pt", texts + ["--frames", 13])
    sigmas = [round(call.sigma[0, -1].item(), 3) for call in calls]
    assert sigmas[:5] == [1, 0.938, 0.833, 0.625, 0]
    for call in calls:
        assert call.text.equal(prompt_rows()[None])
    assert calls[0].x[:, :, :1].equal(calls[4].x[:, :, :1]), "the image's latent stays"


def test_the_encoded_image_reaches_the_image_branch():
    texts = ["--prompt-embeds", here() / "encoded.safetensors"]
    out, calls = sampled("clip.safetensors", texts + tracks() + ["--frames", 3, "--steps", 1])
    assert "drawn as a control video" in out
    assert len(calls) == 1
    call = calls[0]
    assert call.clip.equal(clip_rows().expand(2, -1, -1))
    assert call.tracks.count_nonzero()
    assert call.tracks.shape == (2, 16, 3, 4, 6)
    assert call.image.shape == call.tracks.shape
    _, calls = sampled("clip.safetensors", texts + ["--sampler", "stream", "--frames", 3])
    assert calls[0].clip.equal(clip_rows()[None])


def wrong_rows():
    """(Which of the rows, what they may not be)."""
    return [
        ("prompt", rand(513, 4096)),
        ("prompt", rand(5, 4095)),
        ("prompt", rand(1, 5, 4096)),
        ("prompt", rand(0, 4096)),
        ("prompt", rand(5, 4096) / 0),
        ("prompt", rand(4096)),
        ("prompt", torch.ones(5, 4096, dtype=torch.int64)),
        ("negative", rand(5, 4095)),
        ("clip", rand(256, 32)),
        ("clip", rand(257, 31)),
        ("clip", rand(257, 32) / 0),
    ]


def test_encoded_texts_and_images_of_the_wrong_shape_are_refused():
    config = replace(STUB, clip_dim=32, causal=True)
    good = {"prompt": rand(512, 4096), "clip": clip_rows()}
    with folder() as at:
        path = at / "rows"
        sources = encoders.Sources(prompt_embeds=path)
        for name, wrong in wrong_rows():
            save_file(good | {name: wrong}, path)
            assert_error(UserError, f"{path}: {name} ",
                         encoders.encode, sources, config, None, "cpu")
        for tensors in {"a": rand(5, 4096), "b": rand(5, 4096)}, {}:
            save_file(tensors, path)
            assert_error(UserError, "no prompt", encoders.encode, sources, config, None, "cpu")
        save_file(good, path)
        longer = replace(config, text_len=513)
        text, null_text, clip = encoders.encode(sources, longer, None, "cpu")
    assert text.equal(F.pad(good["prompt"], (0, 0, 0, 1))[None])
    assert null_text is None
    assert clip.equal(clip_rows()[None])


# --------------------------------------------------------------------------------------------------
# The encoders.

# Texts, and the tokens that they are, the end of the sentence included.
TEXTS = {
    " a  small red\ncat &amp;amp; dog ": [3, 4, 5, 6, 7, 8, 1],
    "": [1],
    "red " * 600: [5] * 511 + [1],                      # the end of the sentence is kept
    "a\xa0red\u2028cat": [3, 5, 6, 1],
    "<unk> &amp;amp; dog": [2, 7, 8, 1],                # ftfy leaves what looks like HTML
}


@with_transformers
@torch.no_grad()
def test_prompts_are_encoded_as_wan_does_it():
    with folder() as at:
        umt5, _ = small_encoders(at)
        encode = encoders.text_encoder(at, "cpu")
        for text, tokens in TEXTS.items():
            length = len(tokens)
            ids = torch.zeros(1, 512).long()                            # Wan pads, and masks
            ids[0, :length] = torch.tensor(tokens)
            mask = (torch.arange(512) < length).long()[None]
            expected = umt5(ids, mask).last_hidden_state[0, :length]
            rows = encode(text)
            assert rows.shape == (length, 64)
            assert rows.dtype == torch.bfloat16
            assert_near(rows.float(), expected.float(), 2e-2)


def test_the_negative_prompt_is_wans():
    assert len(encoders.NEGATIVE_PROMPT.split("，")) == 28
    assert encoders.NEGATIVE_PROMPT.endswith("倒着走")


@with_transformers
def test_damaged_and_missing_encoders_are_refused():
    with folder() as at, quiet():
        small_encoders(at)
        weights = at / "text_encoder/model.safetensors"
        tensors = load_file(weights)
        tensors["shared.weight"].zero_()
        save_file(tensors, weights, {"format": "pt"})
        assert_error(UserError, "pip install -U transformers", encoders.text_encoder, at, "cpu")
        for part in "text_encoder", "tokenizer":
            shutil.rmtree(at / part)
            (at / part).mkdir()
            assert_error(UserError, f"{at / part}: no complete", encoders.text_encoder, at, "cpu")


@with_transformers
@torch.no_grad()
def test_the_image_is_encoded_as_wan_does_it():
    image = rand(1, 3, 32, 48).clamp(-1, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    resized = F.interpolate(image, (224, 224), mode="bicubic", align_corners=False)
    pixels = (resized / 2 + 0.5 - mean) / std
    with folder() as at:
        _, clip = small_encoders(at)
        layers = clip(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert_near(encoders.image_encoder(at, "cpu")(image), layers[-2][0], 1e-5)


def test_what_an_encoder_returned_is_kept_by_its_words_and_its_files():
    calls = []

    def encoder(folder, device):
        calls.append(folder)
        number = float(len(calls))                      # every time other rows
        return lambda what: torch.full((2, 3), number)

    def number_of(what, name="x"):
        rows = encoders.kept_rows(encoder, at / "encoder", "cpu", {name: what})[name]
        return rows.unique().item()

    one = rand(1, 3, 400, 600)
    other = one.clone()
    other[0, 1, 200, 300] += 1                          # far inside: repr leaves that out
    with folder() as at, unittest.mock.patch.object(encoders, "CACHE", at / "sub/kept"):
        model = at / "encoder/text_encoder/model.safetensors"
        model.parent.mkdir(parents=True)
        model.write_bytes(b"1")
        assert number_of("a") == 1
        assert number_of("bb") == 2
        assert number_of("a") == 1
        assert number_of(one) == 3
        assert number_of(other) == 4
        assert number_of(one) == 3
        assert number_of("a", name="y") == 5
        os.utime(model, (1, 1))
        assert number_of("a") == 6, "the encoder is of another age"
        model.write_bytes(b"22")
        os.utime(model, (1, 1))
        assert number_of("a") == 7, "the encoder is of another size"
        kept = [path.name for path in (at / "sub/kept").iterdir()]
    assert len(kept) == 7
    assert not any(name.startswith(".") for name in kept), "half a file"


def test_of_a_large_folder_only_the_files_of_its_encoders_are_looked_at():
    looked = []
    scandir = os.scandir

    def look(path):
        looked.append(str(path))
        return scandir(path)

    with folder() as at:
        for name in [
            "text_encoder/model.safetensors",
            "tokenizer/spiece.model",
            "tokenizer/._spiece.model",
            "films/1/a.mp4",
            "transformer/model.safetensors",
            "x.json",
        ]:
            path = at / "repository" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"1")
        elsewhere = at / "clip"
        elsewhere.mkdir()
        (elsewhere / "pytorch_model.bin").write_bytes(b"22")
        (at / "repository/image_encoder").symlink_to(elsewhere, target_is_directory=True)
        with unittest.mock.patch.object(os, "scandir", look):
            files = encoders.listing(at / "repository")
        assert [(name, size) for name, size, _ in files] == [
            ("image_encoder/pytorch_model.bin", 2), ("text_encoder/model.safetensors", 1),
            ("tokenizer/spiece.model", 1)]
        assert not [path for path in looked if path.endswith(("films", "1", "transformer"))], looked
        assert encoders.listing(None) == []


# --------------------------------------------------------------------------------------------------
# The encoders in sample.py.

@with_transformers
def test_a_prompt_and_an_image_are_encoded_for_the_weights():
    with folder() as at, folder() as cache, unittest.mock.patch.object(encoders, "CACHE", cache):
        small_encoders(at, width=4096)
        flags = ["--prompt", "a red cat", "--frames", 3, "--steps", 1]
        from_folder = flags + ["--text-encoder", at]
        out, calls = sampled("clip.safetensors", from_folder + tracks())
        assert "drawn as a control video" in out
        call = calls[0]
        encode = encoders.text_encoder(at, "cpu")
        assert call.text[0].equal(padded(encode("a red cat")))
        assert call.text[1].equal(padded(encode(encoders.NEGATIVE_PROMPT)))
        assert call.clip.shape == (2, 257, 32)
        assert call.clip.count_nonzero()
        assert call.tracks.count_nonzero()
        _, calls = sampled("clip.safetensors", from_folder + ["--negative-prompt", "dog"])
        assert not calls[0].text[1].equal(call.text[1])
        (at / "transformer").mkdir()                                # a repository with all of it
        shutil.copy(here() / "clip.safetensors", at / "transformer")
        _, calls = sampled(at, flags)
        assert calls[0].text.equal(call.text)
        assert calls[0].clip.equal(call.clip)
        shutil.move(at / "image_encoder", at / "elsewhere")
        said = refused("clip.safetensors", from_folder)
        assert "has no folder image_encoder" in said


@with_transformers
def test_encoders_are_loaded_once_and_are_gone_when_the_model_loads():
    loaded = []                                         # weak references to encoders and tokenizers
    alive = []                                  # which of them there were when the model was loaded
    load_encoder = encoders.pretrained
    load_model = MotionStream.from_pretrained

    def pretrained(name, path, **options):
        encoder = load_encoder(name, path, **options)
        loaded.append(weakref.ref(encoder))
        return encoder

    def from_pretrained(path, **options):
        alive.extend(reference() for reference in loaded)
        return load_model(path, **options)

    with (folder() as at, folder() as cache,
          unittest.mock.patch.multiple(encoders, CACHE=cache, pretrained=pretrained),
          unittest.mock.patch.object(MotionStream, "from_pretrained", from_pretrained)):
        small_encoders(at, width=4096)
        flags = ["--prompt", "a red cat", "--text-encoder", at, "--frames", 3, "--steps", 1]
        _, teachers = sampled("clip.safetensors", flags)
        assert len(loaded) == 3                                     # a tokenizer and two encoders
        assert alive == [None] * 3, "an encoder is in memory beside the DiT"
        loaded.clear()
        _, students = sampled("clip.safetensors", flags + ["--sampler", "stream"])
        assert not loaded, "encoded twice"
        assert len(students[0].text) == 1
        assert students[0].text[0].equal(teachers[0].text[0])
        assert students[0].clip[0].equal(teachers[0].clip[0])
        sampled("clip.safetensors", flags + ["--negative-prompt", "dog"])
        assert len(loaded) == 2, "the image was encoded twice"


def lacking():
    """(Weights, flags, what is said of them)."""
    encoder = ["--text-encoder", here()]
    embeds = ["--prompt-embeds", here() / "prompt.safetensors"]
    prompt = ["--prompt", "a cat"]
    t2v = "t2v.safetensors"
    return [
        (t2v, prompt, "--text-encoder"),
        (t2v, prompt + encoder + embeds, "drop --prompt or --prompt-embeds"),
        (t2v, prompt + encoder, "has no folder tokenizer and no text_encoder"),
        (t2v, ["--text-encoder", here() / "none"], "none: no such file or folder"),
        ("clip.safetensors", embeds + ["--image-encoder", here()], "no folder image_encoder"),
        (t2v, ["--image-encoder", here()], "no image branch"),
        (t2v, ["--guidance", "2,0"], "there is no text"),
        (t2v, tracks(), "drop --tracks"),
        (t2v, ["--prompt-embeds", here() / t2v], "and no prompt"),
        (t2v, ["--prompt-embeds", here() / "none.safetensors"], "none.safetensors"),
        (t2v, ["--vae", workplace()[1] / "vae.safetensors"], "give --vae its own"),
        (t2v, ["--frames", 90, "--sampler", "stream"], "--memory"),
        ("clip.safetensors", [], "--image-encoder"),
        ("clip.safetensors", embeds, "give --image-encoder"),
        ("self_forcing.pt", ["--negative-prompt", "red"],
         "--negative-prompt belongs to --sampler teacher"),
        ("headless.safetensors", encoder, "reads words"),
        ("headless.safetensors", embeds, "reads words"),
    ]


def test_what_public_weights_lack_is_said_before_they_load():
    refuse = unittest.mock.Mock(side_effect=AssertionError("the model was loaded"))
    with (unittest.mock.patch.object(MotionStream, "from_pretrained", refuse),
          unittest.mock.patch.object(sample, "copy_weights", refuse)):
        for weights, flags, cure in lacking():
            said = refused(weights, flags)
            assert cure in said, said
    assert not list(here().glob("*out*")), "something was written"
