"""The stage vae of train_distill.py: a linear code for the tiny model, which is not MotionStream's,
and its segmenter (extras/segmentation.py).

Shapes are those of motionstream.py.
"""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_distill as td
from extras.measures import psnr
from extras.segmentation import train_segmenter
from extras.world import rendered_clips
from motionstream import FRAMES, save_pretrained
from vae import LinearVAE

CROP = 64               # pixels per side
CROP_FRAMES = 17


def random_crop(files):
    """A crop of a clip's video: uint8 (3, 17, 64, 64), smaller if the clip is."""
    file = files[int(torch.randint(len(files), ()))]
    with safe_open(file, "pt") as clip:
        video = clip.get_slice("video")
        _, frames, height, width = video.get_shape()
        t = random_start(frames, CROP_FRAMES)
        y = random_start(height, CROP)
        x = random_start(width, CROP)
        return video[:, t:t + CROP_FRAMES, y:y + CROP, x:x + CROP]


def random_start(length, part):
    """Where a random part of an axis begins; 0 if the axis is not longer than the part."""
    return int(torch.randint(max(length - part, 0) + 1, ()))


def random_crops(files, count):
    """(count, 3, 17, 64, 64) in [-1, 1]: the most varied of three random crops each."""
    crops = []
    for _ in range(count):
        three = [random_crop(files) for _ in range(3)]
        crops.append(max(three, key=lambda crop: crop[:, ::8].float().var()))
    return torch.stack(crops).float() / 127.5 - 1


def principal_components(vae, videos):
    """Initialise a LinearVAE with the principal components of its cells, in the middle of its
    windows. Cells with more detail count more. videos: a list of (3, T, H, W) uint8; every 4 frames
    make cells."""
    side = vae.stride
    channels = vae.config.latent_channels
    moment = 0
    total = 0
    for video in videos:
        whole = video.shape[1] // FRAMES * FRAMES
        x = video[:, :whole].float() / 127.5 - 1
        x = x.unflatten(1, (-1, FRAMES))
        x = x.unflatten(3, (-1, side))
        x = x.unflatten(5, (-1, side))                          # (3, F, 4, h, 8, w, 8)
        cells = x.permute(1, 3, 5, 0, 2, 4, 6)                  # (F, h, w, 3, 4, 8, 8)
        cells = cells.flatten(0, 2)                             # (F h w, 3, 4, 8, 8)
        spread = cells.flatten(2).var(2).mean(1)
        weight = (spread / 0.05).clamp(0.1, 5)
        flat = cells.flatten(1)                                 # (F h w, 768)
        moment = moment + (flat * weight[:, None]).T @ flat
        total = total + weight.sum()
    _, vectors = torch.linalg.eigh(moment / total)              # the largest are last
    largest = vectors.flip(1)[:, :channels].T
    basis = largest.reshape(channels, 3 * FRAMES, side, side)
    overlap = vae.config.overlap
    inner = slice(overlap, overlap + side)
    with torch.no_grad():
        for layer in vae.encoder, vae.decoder:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[:, :, inner, inner] = basis


def normalise_latents(vae, videos):
    """Rescale the latent channels, folded into a LinearVAE's encoder and decoder, so that the RMS
    of each is proportional to the square root of its effect on pixels, clamped to [0.6, 2]: coarse
    channels, the first to emerge from noise, become larger. videos: a list of (3, T, H, W) uint8,
    T = 1 + 4 k."""
    with torch.no_grad():
        latents = [vae.encode(video[None].float() / 127.5 - 1) for video in videos]
        std = torch.cat(latents).square().mean((0, 2, 3, 4)).sqrt()
        worth = (std * vae.decoder.weight.flatten(1).norm(dim=1)).sqrt()
        wanted = (worth / worth.square().mean().sqrt()).clamp(0.6, 2)
        gain = wanted / std
        vae.encoder.bias *= gain
        scale = gain.view(-1, 1, 1, 1)
        vae.encoder.weight *= scale
        vae.decoder.weight /= scale
        vae.latent_std.copy_(wanted)


def reconstruction_error(output, video):
    """Mean squared error of the pixels of videos (B, 3, T, H, W), plus 0.1 times that of the
    differences between neighbouring pixels."""
    error = output - video
    pixels = error.square().mean()
    down = error.diff(dim=3).square().mean()
    across = error.diff(dim=4).square().mean()
    return pixels + 0.1 * (down + across)


def train_vae(run, report):
    """Train a LinearVAE, initialised with principal components, by reconstruction alone, on the
    video of --data or of the drawn world, then its segmenter. report: see train_distill.no_report."""
    s = run.settings
    if run.data:
        files = td.open_clips(run.data, run.clip_latents)
    else:
        files = rendered_clips(run, "videos", s.vae_clips)
    videos = [load_file(file)["video"] for file in files[:64]]
    vae = LinearVAE().to(run.device)
    principal_components(vae, videos)
    vae.segmenter.requires_grad_(False)         # so that this learner leaves it alone
    learner = td.Learner("vae", vae, s.vae, s.vae_updates, s.vae_accumulate)
    loop = td.Loop(run, "vae", s.vae_updates, learner)
    for update in loop:
        for _ in loop.micro_steps():
            video = random_crops(files, s.vae_batch).to(run.device)
            output, _ = vae.decode_unclamped(vae.encode(video))
            loss = reconstruction_error(output, video)
            learner.backward(loss)
            loop.log(loss=loss, psnr=psnr(output, video))
        loop.log(grad=learner.update(update))
        report(loop, vae)
    whole = td.video_frames(run.clip_latents)
    normalise_latents(vae, [video[:, :whole].to(run.device) for video in videos])
    vae.segmenter.requires_grad_(True)
    train_segmenter(run, vae)
    save_pretrained(vae, run.path("vae"), torch.float16, **vae.metadata())
