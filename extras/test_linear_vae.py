"""The linear code of the tiny model: where it starts, what its latents are, its training."""

import json
import unittest.mock
from dataclasses import replace

import torch
from safetensors.torch import save_file

import train_distill as td
from extras import linear_vae, watch
from extras.testing import DRAWN, assert_near, folder, quiet, rand, seeded
from motionstream import PRESETS
from vae import LinearVAE, LinearVAEConfig, load_vae

PATTERNS = 4


def made_of_patterns(seed):
    """A still video (3, 9, 32, 48) uint8 whose cells of 8x8 pixels are sums of PATTERNS."""
    patterns = rand(PATTERNS, 3, 8, 8)
    shares = 0.08 * rand(4, 6, PATTERNS, seed=seed)              # of each cell
    cells = torch.einsum("yxp,pchw->cyhxw", shares, patterns)
    picture = cells.reshape(3, 32, 48).clamp(-1, 1)
    pixels = ((picture + 1) * 127.5).round().byte()
    return pixels[:, None].expand(-1, 9, -1, -1)


def error_of(channels, videos):
    """Mean squared error of videos through the principal components of as many channels."""
    vae = LinearVAE(LinearVAEConfig(channels))
    linear_vae.principal_components(vae, videos)
    video = videos[0][None] / 127.5 - 1
    with torch.no_grad():
        output, _ = vae.decode_unclamped(vae.encode(video))
    return (output - video).square().mean().item()


def test_principal_components_are_what_the_cells_are_made_of():
    videos = [made_of_patterns(seed) for seed in range(1, 9)]
    rounding = error_of(PATTERNS, videos)
    assert rounding < 1e-4, rounding
    assert error_of(PATTERNS - 1, videos) > 20 * rounding


def test_latents_are_rescaled_and_decode_to_the_same():
    vae = LinearVAE(LinearVAEConfig(6))
    linear_vae.principal_components(vae, [made_of_patterns(1)])
    video = rand(3, 9, 32, 48).clamp(-1, 1)
    video = ((video + 1) * 127.5).byte()
    with torch.no_grad():
        vae.encoder.bias += 0.1
        x = video[None] / 127.5 - 1
        before, _ = vae.decode_unclamped(vae.encode(x))
        linear_vae.normalise_latents(vae, [video])
        latents = vae.encode(x)
        after, _ = vae.decode_unclamped(latents)
    assert_near(after, before, 1e-5)
    rms = latents.square().mean((0, 2, 3, 4)).sqrt()
    assert_near(vae.latent_std, rms, 1e-4)
    assert 0.6 <= rms.min() * 1.0001 and rms.max() <= 2.0001


def test_the_error_counts_pixels_and_what_differs_between_neighbours():
    video = torch.zeros(1, 3, 2, 4, 4)
    assert_near(linear_vae.reconstruction_error(video + 0.5, video), torch.tensor(0.25), 1e-6)
    ramp = 0.5 * torch.arange(4.0).expand_as(video)             # across: differences of 0.5
    expected = ramp.square().mean() + 0.1 * 0.25
    assert_near(linear_vae.reconstruction_error(ramp, video), expected, 1e-6)


def test_crops_are_pieces_of_the_clips_and_rather_the_varied_ones():
    video = torch.zeros(3, 40, 100, 120, dtype=torch.uint8)
    video[..., 60:] = (255 * torch.rand(3, 40, 100, 60, generator=seeded())).byte()
    with folder() as here:
        save_file({"video": video}, here / "a.safetensors")
        torch.manual_seed(0)
        crops = linear_vae.random_crops([here / "a.safetensors"], 12)
        single = [linear_vae.random_crop([here / "a.safetensors"]) for _ in range(12)]
    assert crops.shape == (12, 3, 17, 64, 64)
    assert crops.min() == -1
    noisy = (crops != -1).float().mean()
    assert noisy > 1.1 * (torch.stack(single) != 0).float().mean()


def test_the_vae_is_trained_on_clips_that_hold_video():
    small = replace(DRAWN, out_dim=96, in_dim=96 + 16)
    without_pictures = unittest.mock.patch.object(watch, "show", lambda run, stage: None)
    with folder() as here, quiet() as (_, err), without_pictures, \
            unittest.mock.patch.dict(PRESETS, tiny=small):
        for i in range(3):
            td.write_clip(here / f"data/{i}.safetensors", {
                "video": (255 * torch.rand(3, 45, 32, 32, generator=seeded(i))).byte(),
                "tracks": 18 + 6 * rand(45, 4, 2, seed=i),
                "visible": torch.ones(45, 4, dtype=torch.bool),
                "group": torch.full((4,), -1),
                "text": rand(2, small.text_dim, seed=i),
            })
        for stage in "vae", "teacher":
            words = ["--smoke", "--data", here / "data", "--out", here / "out", "--stage", stage,
                     "--steps", 1]
            assert td.main([str(word) for word in words]) is None, err.getvalue()
        rows = (here / "out/stats.jsonl").read_text().splitlines()
        of_vae, *of_segmenter, of_teacher = map(json.loads, rows)
        vae = load_vae(here / "out/vae.safetensors")
    assert of_vae["psnr"] > 8
    assert [row["stage"] for row in of_segmenter] == ["segmenter", "segmenter"]
    assert 0 < of_teacher["loss"] < 100
    assert isinstance(vae, LinearVAE)
    assert 0.6 <= vae.latent_std.min() < vae.latent_std.max() <= 2
