"""A tiny decoder for the latents of a finished VAE, from nothing and against a discriminator.

    python -m extras.decoder --vae FILE --out runs/decoder          for a TinyVAE, on drawn videos
    python -m extras.decoder --vae FILE --data FOLDER --weights DIR         for Wan's VAE, on clips

The paper's appendix A.

Other flags are those of train_distill.py. It writes decoder.safetensors, a whole VAE, for --vae.
"""

import sys
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_distill as td
from extras import watch
from extras.guard import check_clips, own_folder
from extras.linear_vae import random_crops
from extras.measures import open_lpips, psnr
from extras.world import rendered_clips
from motionstream import UserError, save_pretrained
from sample import number, reported
from vae import LinearVAE, TinyVAE, TinyVAEConfig, WanVAE, load_vae

PIXELS = 144                        # per side of what Wan's latents are decoded to [P]
LATENTS = 6                         # 21 frames [P]
REPLAY = 64                         # clips that the replay buffer holds

# Updates, and how decoder and discriminator learn: of a tiny VAE [O], and of Wan's [P].
TINY_UPDATES = 1000
TINY = (td.Learning(5e-3, 2e-3), td.Learning(0.01, 1e-3))
WAN_UPDATES = 200_000
WAN = (td.Learning(None, 3e-4), td.Learning(None, 3e-4))

# An encoder with one channel: a score for every 4x4 pixels of two frames and what is about them
# (PatchGAN, Isola et al. 2017).
DISCRIMINATOR = TinyVAEConfig(latent_channels=1, patch=2, stem=32, encoder=((64, 1, 2, 2),))


def adversarial_losses(discriminator, video, output, shown):
    """(The decoder's, by which its output should score high, the discriminator's: true video should
    score 1 or more, what is shown as false -1 or less.) Neither has a gradient in the other
    network. All videos are (B, 3, T, H, W)."""
    discriminator.requires_grad_(False)
    loss_g = -discriminator.encode(output).mean()
    discriminator.requires_grad_(True)
    true = discriminator.encode(video)
    false = discriminator.encode(shown.detach())
    loss_d = F.relu(1 - true).mean() + F.relu(1 + false).mean()
    return loss_g, loss_d


def reconstruction_loss(output, video):
    """Of pixels, and of the differences between neighbours, in videos (B, 3, T, H, W)."""
    error = output.float() - video
    differences = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + differences


def draw_tiny(given, files, device):
    """(Latents by the finished VAE, video) of random crops of the clips' videos."""
    video = random_crops(files, 8).to(device)
    return given.encode(video), video


def draw_wan(given, files, device):
    """(Latents, what the finished VAE decodes them to) of random pieces of clips."""
    latents = td.draw_clips(files, 16, LATENTS)["latents"]
    cells = PIXELS // given.stride
    y = int(torch.randint(max(latents.shape[3] - cells, 0) + 1, ()))
    x = int(torch.randint(max(latents.shape[4] - cells, 0) + 1, ()))
    latents = latents[..., y:y + cells, x:x + cells].to(device).float()
    return latents, given.decode(latents)[0]


def open_vae(run):
    """The finished VAE. UserError if there is none whose decoder could be replaced."""
    path = run.path("vae")
    try:
        vae = load_vae(path)
    except ValueError as e:
        raise UserError(f"{e}; --vae FILE names another") from None
    if isinstance(vae, LinearVAE):
        raise UserError(f"{path}: a linear code, whose decoder is one product; give a TinyVAE or "
                        "Wan's")
    return vae.to(run.device)


def new_networks(given, wan):
    """(A VAE whose decoder is new, with the encoder of the finished one, or, for Wan's latents, a
    new one too; the discriminator)."""
    if wan:
        vae = TinyVAE(TinyVAEConfig(given.config.latent_channels, given.stride // 8))
    else:
        vae = TinyVAE(given.config)
        vae.encoder = given.encoder
    discriminator = TinyVAE(DISCRIMINATOR)
    discriminator.decoder = nn.Identity()
    return vae, discriminator


def train_decoder(run, updates, adversarial, distance):
    """A decoder from nothing for the latents of a finished VAE: the tiny one, on drawn videos, or
    with --data Wan's, in the layout of taew2_1, on what Wan's decoder makes of 144x144 pixels and
    21 frames, while an encoder learns the latents. Half of what is shown as false is from a replay
    buffer. adversarial: weight of the discriminator's loss. distance: see open_lpips."""
    given = open_vae(run)
    wan = isinstance(given, WanVAE)
    if wan != run.config.is_wan or wan != bool(run.data):
        raise UserError(f"{run.path('vae')}: Wan's needs --data and --weights, a tiny one takes "
                        "neither")
    if wan:
        check_clips(run, "decoder")
        files = td.training_clips(run, LATENTS)
    else:
        files = rendered_clips(run, "videos", run.settings.vae_clips)
    draw = draw_wan if wan else draw_tiny
    how, how_d = WAN if wan else TINY
    vae, discriminator = new_networks(given, wan)
    _, video = draw(given, files, run.device)
    discriminator.register_buffer("replay", torch.zeros(REPLAY, *video.shape[1:]).bfloat16())
    vae = vae.to(run.device)
    discriminator = discriminator.to(run.device)
    accumulate = run.settings.vae_accumulate
    learner = td.Learner("decoder", vae, how, updates, accumulate)
    learner_d = td.Learner("discriminator", discriminator, how_d, updates, accumulate)
    loop = td.Loop(run, "decoder", updates, learner, learner_d)
    loop.settings["adversarial"] = adversarial
    for update in loop:
        for i in loop.micro_steps():
            with run.autocast():
                with torch.no_grad():
                    latents, video = draw(given, files, run.device)
                output, _ = vae.decode_unclamped(latents)
                rows = torch.randperm(REPLAY)[:len(output) // 2]
                shown = torch.cat([discriminator.replay[rows], output[len(rows):]])
                loss_g, loss_d = adversarial_losses(discriminator, video, output, shown)
                loss = reconstruction_loss(output, video) + distance(output, video, i)
                if wan:
                    loss = loss + F.mse_loss(vae.encode(video), latents)
            discriminator.replay[rows] = output[:len(rows)].detach().bfloat16()
            learner.backward(loss + adversarial * loss_g)
            learner_d.backward(loss_d)
            loop.log(loss=loss, loss_g=loss_g, loss_d=loss_d, psnr=psnr(output, video))
        loop.log(grad=learner.update(update), grad_d=learner_d.update(update))
    save_pretrained(vae, run.path("decoder"), **vae.metadata())


def train(argv):
    """What the command line says."""
    parser = td.new_parser(__doc__)
    parser.set_defaults(stage="decoder")
    add = parser.add_argument
    add("--adversarial", type=number(float, 0, 100), default=0.01,
        help="weight of the discriminator's loss (0.01)")
    add("--perceptual", choices=["alex", "vgg"],
        help="LPIPS in the loss too, by its package (none)")
    flags = td.parse(argv, parser)
    td.join_processes(flags.device)
    run = td.resolve(flags)
    run = replace(run, files=run.files | {"decoder": run.out / "decoder.safetensors"})
    updates = WAN_UPDATES if run.config.is_wan else TINY_UPDATES
    if flags.smoke:
        updates = 4
    updates = flags.steps or updates
    with own_folder(run.out):
        distance = open_lpips(flags.perceptual, run.device)
        torch.manual_seed(td.seed_of(run.seed, "decoder"))      # of the weights that it begins with
        train_decoder(run, updates, flags.adversarial, distance)
        watch.show(run, "decoder")


def main(argv=None):
    """Train a decoder. Returns the exit code."""
    return reported(train, argv)


if __name__ == "__main__":
    sys.exit(main())
