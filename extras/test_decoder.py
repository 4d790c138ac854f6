"""The adversarial training of a tiny decoder."""

import contextlib
import itertools
import json
import os
import signal
import unittest
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import train_distill as td
from extras import decoder
from extras.testing import (SMALL_VAE, STUB, TAEW21, Perceptual, assert_error, folder, having_lpips,
                            new_vae, quiet, rand, randomised, same, saved)
from motionstream import MotionStream
from vae import LinearVAE, TinyVAE, TinyVAEConfig, WanVAE, WanVAEConfig, load_vae


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
    output, _ = ours.decode_unclamped(rand(2, 4, 2, 2, 2))
    losses = decoder.adversarial_losses(discriminator, rand(*output.shape), output, output)
    of_g, of_d = ([name for name, model in (("decoder", ours), ("discriminator", discriminator)) if any(
        grad is not None and grad.any() for grad in torch.autograd.grad(
            loss, [*model.parameters()], retain_graph=True, allow_unused=True))] for loss in losses)
    assert of_g == ["decoder"] and of_d == ["discriminator"], (of_g, of_d)


def decoder_run(here, *more, code=0):
    """extras.decoder in float32, on noise instead of drawn videos, or on encoded clips; the last line that was printed
    as an error."""
    def noise(files, count):
        return torch.randn(4, 3, 9, 16, 16).clamp(-1, 1)

    with quiet() as (_, err), unittest.mock.patch.multiple(
            td, show=lambda *_: None, rendered_clips=lambda *_: None, random_crops=noise, cpu_dtype=lambda: torch.float32):
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
        step = td.Learner.step

        def stop(learner, loss, i):
            if i == 1 and learner.name == "decoder":
                os.kill(os.getpid(), signal.SIGTERM)
            return step(learner, loss, i)

        with unittest.mock.patch.object(td.Learner, "step", stop):
            assert_error(SystemExit, "143", decoder_run, two, *flags)
        decoder_run(two, *flags)
        whole, resumed = (torch.load(path / "decoder.0000003.checkpoint.pt") for path in (one, two))
        for part in "decoder", "discriminator":
            assert same(whole["learners"][part]["model"], resumed["learners"][part]["model"]), part
        assert whole["learners"]["discriminator"]["model"]["replay"].flatten(1).any(1).sum() == 6              # half of three batches
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
        save_file({"latents": clip.contiguous(), "tracks": torch.zeros(81, 1, 2), "visible": torch.ones(81, 1).bool(),
                   "group": torch.zeros(1).long(), "text": torch.zeros(1, 4096)},
                  here / "latents" / f"{i}.safetensors")
    return ["--vae", here / "wan.pth", "--data", here / "latents", "--weights", start]


def test_a_decoder_for_wans_vae_learns_what_wans_decodes_and_an_encoder_the_latents():
    narrow = TinyVAEConfig(16, 1, "end", 4, *(tuple((4, 1, *s[2:]) for s in part) for part in (TAEW21.encoder,
                                                                                               TAEW21.decoder)), 4)
    seen, asked, losses, decode_frames = [], [], decoder.adversarial_losses, TinyVAE.decode_unclamped
    with folder() as here, unittest.mock.patch.multiple(
            decoder, TinyVAEConfig=lambda *sizes: asked.append(sizes) or narrow,
            adversarial_losses=lambda model, video, *more: seen.append(video) or losses(model, video, *more)), \
            unittest.mock.patch.object(TinyVAE, "decode_unclamped",
                                       lambda vae, latents: seen.append(latents) or decode_frames(vae, latents)):
        decoder_run(here / "out", *wans_clips(here, 2, 4), "--steps", "1")
        assert TinyVAEConfig(*asked[0]) == TAEW21
        ours, (latents, video) = load_vae(here / "out" / "decoder.safetensors"), seen
        assert latents.shape == (16, 16, 6, 2, 4) and video.shape == (16, 3, 21, 16, 32)
        clips = [load_file(file)["latents"][:, :6].float() for file in (here / "latents").iterdir()]
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
            unittest.mock.patch.object(TinyVAE, "decode_unclamped", side_effect=Enough):
        flags = wans_clips(here, 20, 20)
        for seed in range(5):                                       # each draws two
            with contextlib.suppress(Enough):
                decoder_run(here / "out", *flags, "--seed", seed)
        for z in crops:
            assert z.shape == (16, 16, 6, 18, 18)
            y, x = (int(z[0, i, 0, 0, 0]) for i in range(2))
            places.add((y, x))
            assert z[:, 0].equal((y + torch.arange(18.0))[:, None].expand(16, 6, 18, 18))
            assert z[:, 1].equal((x + torch.arange(18.0)).expand(16, 6, 18, 18))
        assert len(places) > 3 and places <= {*itertools.product(range(3), range(3))}, places


def test_what_a_decoder_cannot_be_trained_with_is_refused_in_one_line():
    with folder() as here:
        flags = wans_clips(here, 2, 2)
        linear = saved(here / "linear.safetensors", LinearVAE(), **LinearVAE().metadata())
        tiny = saved(here / "tiny.safetensors", new_vae(replace(SMALL_VAE, latent_channels=16)))
        for said, *more in [("tiny.safetensors: Wan's needs --data and --weights", "--vae", tiny, *flags[2:]),
                            ("wan.pth: Wan's needs --data and --weights, a tiny one", *flags[:2]),
                            ("wan.pth: Wan's needs --data and --weights, a tiny one", *flags[:4]),
                            ("vae.safetensors: cannot be read (No such file or directory); --vae FILE names another",),
                            ("linear.safetensors: a linear code", "--vae", linear),
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


def test_a_perceptual_network_takes_part_in_a_decoders_loss():
    with folder() as here:
        flags = ["--vae", saved(here / "small.safetensors", new_vae(replace(SMALL_VAE, latent_channels=16))),
                 "--steps", "1"]
        decoder_run(here / "without", *flags)
        with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
            decoder_run(here / "with", *flags, "--perceptual", "alex")
        without, with_it = (json.loads((here / name / "stats.jsonl").read_text()) for name in ("without", "with"))
        assert 1 < with_it["loss"] - without["loss"] < 3 and with_it["psnr"] == without["psnr"]
