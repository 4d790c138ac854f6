"""The adversarial training of a tiny decoder."""

import json
import os
import signal
import unittest.mock
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
from safetensors.torch import save_file

import train_distill as td
from extras import decoder, watch
from extras.testing import (SMALL_VAE, STUB, TAEW21, Perceptual, assert_error, folder, having_lpips,
                            new_vae, quiet, rand, randomised, same, saved)
from motionstream import MotionStream
from vae import LinearVAE, TinyVAE, TinyVAEConfig, WanVAE, WanVAEConfig, load_vae

SMALL_16 = replace(SMALL_VAE, latent_channels=16)


# --------------------------------------------------------------------------------------------------
# Losses.

class Mean(nn.Module):
    """Stands for a discriminator: scores a clip by twice its mean."""
    weight = nn.Parameter(torch.tensor(2.0))

    def encode(self, video):
        return self.weight * video.mean((1, 2, 3, 4))


def plain(value):
    return torch.full((2, 3, 5, 4, 4), value)


def test_adversarial_losses_are_the_hinge():
    loss_g, loss_d = decoder.adversarial_losses(Mean(), plain(0.25), plain(0.5), plain(-0.25))
    assert loss_g == -1                                                 # minus the output's score
    assert loss_d == (1 - 0.5) + (1 - 0.5)
    _, loss_d = decoder.adversarial_losses(Mean(), plain(1.0), plain(0.5), plain(-1.0))
    assert loss_d == 0                                                  # both far enough


def has_gradient(loss, network):
    parameters = list(network.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return any(grad is not None and grad.any() for grad in grads)


def test_each_adversarial_loss_moves_one_network():
    vae = new_vae().requires_grad_(True)
    discriminator = TinyVAE(decoder.DISCRIMINATOR)
    output, _ = vae.decode_unclamped(rand(2, 4, 2, 2, 2))
    video = torch.zeros_like(output)
    loss_g, loss_d = decoder.adversarial_losses(discriminator, video, output, output)
    assert has_gradient(loss_g, vae)
    assert not has_gradient(loss_g, discriminator)
    assert has_gradient(loss_d, discriminator)
    assert not has_gradient(loss_d, vae)


# --------------------------------------------------------------------------------------------------
# Trainings.

def noise(files, count):
    """Stands for random crops of drawn videos."""
    return torch.randn(2, 3, 5, 16, 16).clamp(-1, 1)


def train(here, flags, code=None):
    """Run extras.decoder on noise instead of drawn videos. Returns the last line of its errors."""
    words = ["--smoke", "--out", here] + flags
    stubs = unittest.mock.patch.multiple(
        decoder,
        rendered_clips=lambda run, name, count: None,
        random_crops=noise)
    without_pictures = unittest.mock.patch.object(watch, "show", lambda run, stage: None)
    with quiet() as (_, err), stubs, without_pictures:
        result = decoder.main([str(word) for word in words])
    assert result == code, err.getvalue()
    return err.getvalue().splitlines()[-1]


def tiny_flags(here, updates):
    vae = saved(here / "small.safetensors", new_vae(SMALL_16))
    return ["--vae", vae, "--steps", updates]


def test_a_new_decoder_is_trained_beside_the_old_encoder():
    given = new_vae(SMALL_16)
    with folder() as here:
        train(here, tiny_flags(here, 1))
        vae = load_vae(here / "decoder.safetensors")
        state = torch.load(here / "decoder.0000001.checkpoint.pt")
    assert vae.metadata() == given.metadata()
    assert same(given.encoder.state_dict(), vae.encoder.state_dict())
    for ours, old in zip(vae.decoder.parameters(), given.decoder.parameters()):
        assert not ours.equal(old)
    replay = state["learners"]["discriminator"]["model"]["replay"]
    assert replay.flatten(1).any(1).sum() == 1                          # half of a batch of 2


def test_a_decoders_training_resumes_to_the_bit():
    update = td.Learner.update

    def stop(learner, number):
        if number == 0 and learner.name == "decoder":
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner, number)

    with folder() as one, folder() as two:
        flags = tiny_flags(one, 2)
        train(one, flags)
        with unittest.mock.patch.object(td.Learner, "update", stop):
            assert_error(SystemExit, "143", train, two, flags)
        train(two, flags)
        assert len((two / "stats.jsonl").read_text().splitlines()) == 2
        whole = torch.load(one / "decoder.0000002.checkpoint.pt")
        resumed = torch.load(two / "decoder.0000002.checkpoint.pt")
        for part in "decoder", "discriminator":
            assert same(whole["learners"][part]["model"], resumed["learners"][part]["model"]), part
        said = train(two, flags + ["--adversarial", "0.2"], code=2)
        assert "other settings (adversarial 0.01, now 0.2)" in said, said


def test_a_perceptual_network_takes_part_in_a_decoders_loss():
    with folder() as here:
        flags = tiny_flags(here, 1)
        train(here / "without", flags)
        with having_lpips(SimpleNamespace(LPIPS=Perceptual)):
            train(here / "with", flags + ["--perceptual", "alex"])
        without = json.loads((here / "without/stats.jsonl").read_text())
        with_it = json.loads((here / "with/stats.jsonl").read_text())
    assert 1 < with_it["loss"] - without["loss"] < 3
    assert with_it["psnr"] == without["psnr"]


# For Wan's VAE.

def wan_flags(here, h, w):
    """Flags for clips of Wan's latents, h x w cells, written into `here`."""
    vae = randomised(WanVAE(WanVAEConfig(16, 4, 6)))
    torch.save(vae.state_dict(), here / "wan.pth")
    model = randomised(MotionStream(replace(STUB, size=(8 * h, 8 * w))))
    start = saved(here / "start.safetensors", model)
    (here / "latents").mkdir()
    for i, latents in enumerate(rand(3, 16, 12, h, w).half()):
        save_file({
            "latents": latents.contiguous(),
            "tracks": torch.zeros(81, 1, 2),
            "visible": torch.ones(81, 1).bool(),
            "group": torch.zeros(1).long(),
            "text": torch.zeros(1, 4096),
        }, here / f"latents/{i}.safetensors")
    return ["--vae", here / "wan.pth", "--data", here / "latents", "--weights", start]


def narrowed(layers):
    """The same layers with 4 channels."""
    return tuple((4, 1) + layer[2:] for layer in layers)


NARROW = TinyVAEConfig(16, 1, "end", 4, narrowed(TAEW21.encoder), narrowed(TAEW21.decoder), 4)


def recorded(function):
    """(The function, a list of its calls: arguments and result)."""
    calls = []

    def record(*arguments):
        result = function(*arguments)
        calls.append((arguments, result))
        return result

    return record, calls


def test_a_decoder_for_wans_vae_learns_what_wans_decodes_and_an_encoder_the_latents():
    asked = []

    def narrow(latent_channels, patch):
        asked.append(TinyVAEConfig(latent_channels, patch))
        return NARROW

    def draw_few(files, count, frames):
        return draw_clips(files, 2, frames)

    draw_clips = td.draw_clips
    losses, of_losses = recorded(decoder.adversarial_losses)
    by_wan, of_wan = recorded(WanVAE.decode)
    by_ours, of_ours = recorded(TinyVAE.decode_unclamped)
    with (folder() as here,
          unittest.mock.patch.object(td, "draw_clips", draw_few),
          unittest.mock.patch.multiple(decoder, TinyVAEConfig=narrow, adversarial_losses=losses),
          unittest.mock.patch.object(WanVAE, "decode", by_wan),
          unittest.mock.patch.object(TinyVAE, "decode_unclamped", by_ours)):
        train(here / "out", wan_flags(here, 2, 2) + ["--steps", "1"])
        trained = load_vae(here / "out/decoder.safetensors")
    assert asked[0] == TAEW21
    (_, latents), (video, _) = of_wan[-1]
    assert latents.shape == (2, 16, 6, 2, 2)
    assert video.shape == (2, 3, 21, 16, 16)
    arguments, _ = of_ours[0]
    assert arguments[1].equal(latents)
    arguments, _ = of_losses[0]
    assert arguments[1].equal(video)
    torch.manual_seed(td.seed_of(0, "decoder"))
    fresh = TinyVAE(NARROW)
    assert not fresh.encoder[0].weight.equal(trained.encoder[0].weight)
    assert not fresh.decoder[1].weight.equal(trained.decoder[1].weight)


def test_of_wans_latents_144x144_pixels_of_21_frames_are_taken_wherever_they_fit():
    rows = torch.arange(20.0)[:, None].expand(20, 19)
    columns = torch.arange(19.0).expand(20, 19)
    given = SimpleNamespace(stride=8, decode=lambda latents: (-latents, None))
    torch.manual_seed(0)
    corners = set()
    with folder() as here:
        for number in range(3):
            place = torch.stack([rows, columns, 0 * rows + number])     # (3, 20, 19)
            latents = place[:, None].repeat(1, 12, 1, 1)
            save_file({"latents": latents}, here / f"{number}.safetensors")
        files = sorted(here.iterdir())
        for _ in range(30):
            latents, video = decoder.draw_wan(given, files, "cpu")
            assert video.equal(-latents), "not what the finished VAE decodes"
            assert latents.shape == (16, 3, 6, 18, 18)
            y, x, _ = latents[0, :, 0, 0, 0].int().tolist()
            assert latents[:, 0].eq(rows[y:y + 18, x:x + 18]).all()
            assert latents[:, 1].eq(columns[y:y + 18, x:x + 18]).all()
            assert latents[:, 2].unique().tolist() == [0, 1, 2], "not of all clips"
            corners.add((y, x))
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}


def test_what_a_decoder_cannot_be_trained_with_is_refused_in_one_line():
    with folder() as here:
        wan = wan_flags(here, 2, 2)
        linear = saved(here / "linear.safetensors", LinearVAE(), **LinearVAE().metadata())
        tiny = saved(here / "tiny.safetensors", new_vae(SMALL_16))
        cases = [
            (["--vae", tiny] + wan[2:], "tiny.safetensors: Wan's needs --data and --weights"),
            (wan[:2], "wan.pth: Wan's needs --data and --weights, a tiny one"),
            (wan[:4], "wan.pth: Wan's needs --data and --weights, a tiny one"),
            ([], "vae.safetensors: cannot be read (No such file or directory); --vae FILE names "
                 "another"),
            (["--vae", linear], "linear.safetensors: a linear code"),
            (["--vae", tiny, "--perceptual", "alex"], "LPIPS: "),
            (["--vae", tiny, "--perceptual", "net"], "--perceptual: invalid choice: 'net'"),
            (["--adversarial", "-1"], "--adversarial: -1 is not between 0 and 100"),
        ]
        for flags, cure in cases:
            with having_lpips(None):
                said = train(here / "bad", flags, code=2)
            assert said.startswith("error: "), said
            assert cure in said, said
            assert not list((here / "bad").glob("decoder*")), said


def test_flags_of_the_decoder_are_unknown_to_the_other_stages():
    with folder() as here, quiet() as (_, err):
        assert td.main(["--perceptual", "vgg", "--out", str(here)]) == 2
    assert "unrecognized arguments: --perceptual vgg" in err.getvalue()
