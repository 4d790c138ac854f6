"""A tiny decoder from nothing for the latents of a finished VAE, trained against a discriminator (MotionStream, appendix A).

    python -m extras.decoder --vae assets/tiny_vae.safetensors --out runs/decoder
    python -m extras.decoder --vae FILE --data FOLDER --weights DIR      for Wan's VAE, on your own clips

Other flags are those of train_distill.py. It writes decoder.safetensors, a whole VAE, for --vae.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_distill as td
from extras.evaluate import Trained, open_lpips, preview
from motionstream import UserError, save_pretrained
from vae import TinyVAE, TinyVAEConfig, WanVAE

# Steps, and rates of Muon (None: AdamW on all) and AdamW: of a tiny VAE's decoder, and as the paper's, of Wan's.
RECIPES = {False: {"steps": 1000, "decoder": (5e-3, 2e-3), "discriminator": (0.01, 1e-3)},
           True: {"steps": 200_000, "decoder": (None, 3e-4), "discriminator": (None, 3e-4)}}

# An encoder with one channel: a score for every 4x4 pixels of two frames and what is about them (PatchGAN, Isola et al.
# 2017).
DISCRIMINATOR = TinyVAEConfig(latent_channels=1, patch=2, stem=32, encoder=((64, 1, 2, 2),))


def adversarial_losses(discriminator, video, output, shown):
    """The decoder's, by which its output should score high, and the discriminator's: true video should score 1 or more,
    what is shown as false -1 or less. Neither has a gradient in the other network."""
    discriminator.requires_grad_(False)
    loss_g = -discriminator.encode(output).mean()
    discriminator.requires_grad_(True)
    true, false = discriminator.encode(video), discriminator.encode(shown.detach())
    return loss_g, F.relu(1 - true).mean() + F.relu(1 + false).mean()


def train_decoder(run):
    """A decoder from nothing for the latents of a finished VAE: the tiny one, on drawn videos, or with --data Wan's, in
    the layout of taew2_1, on what Wan's decoder makes of 144x144 pixels and 21 frames, while an encoder learns the
    latents. Half of what is shown as false is from a replay buffer."""
    given, wan, recipe = run.vae(), bool(run.args.data), RECIPES[run.full]
    perceptual = open_lpips(run.args.perceptual, run.device)
    if isinstance(given, WanVAE) != wan or wan != run.full:
        raise UserError(f"{run.path('vae')}: Wan's needs --data and --weights, a tiny one takes neither")
    config = TinyVAEConfig(given.config.latent_channels, given.stride // 8) if wan else given.config
    vae, discriminator, cells = TinyVAE(config), TinyVAE(DISCRIMINATOR), 144 // given.stride
    vae.encoder, discriminator.decoder = vae.encoder if wan else given.encoder, nn.Identity()
    videos = None if wan else td.drawn_videos(run)
    source = td.own_clips(run, pictures=False) if wan else lambda: td.draw_crops(videos).to(run.device)

    def batch():
        if not wan:
            return given.encode(video := source()), video
        latents = td.pick(source, 16, 6)["latents"]
        y, x = (int(torch.randint(max(side - cells, 0) + 1, ())) for side in latents.shape[3:])
        latents = latents[..., y:y + cells, x:x + cells].to(run.device).float()
        return latents, given.decode(latents)[0]

    discriminator.register_buffer("replay", torch.zeros(64, *batch()[1].shape[1:]).bfloat16())
    shared = {"steps": run.steps["decoder"] // run.batches, "batches": run.batches}
    optimizer = td.Optimizer(vae.to(run.device), *recipe["decoder"], **shared)
    optimizer_d = td.Optimizer(discriminator.to(run.device), *recipe["discriminator"], **shared)

    def step(i):
        with run.autocast():
            with torch.no_grad():
                latents, video = batch()
            output, _ = vae.decode_unclamped(latents)
            rows = torch.randperm(64)[:len(output) // 2]
            shown = torch.cat([discriminator.replay[rows], output[len(rows):]])
            loss_g, loss_d = adversarial_losses(discriminator, video, output, shown)
            loss = td.reconstruction_loss(output, video) + perceptual(output, video, i)
            loss = loss + F.mse_loss(vae.encode(video), latents) if wan else loss
        discriminator.replay[rows] = output[:len(rows)].detach().bfloat16()
        return {"loss": loss, "loss_g": loss_g, "loss_d": loss_d, "psnr": td.psnr(output.detach(), video),
                "grad": optimizer.step(loss + run.args.adversarial * loss_g, i), "grad_d": optimizer_d.step(loss_d, i)}

    td.train(run, "decoder", run.steps["decoder"], optimizer.parts("decoder") | optimizer_d.parts("discriminator"), step)
    save_pretrained(vae, run.path("decoder"), **vae.metadata())


def new_run(argv):
    """The Run of such a training."""
    parser = td.new_parser(__doc__)
    weight = td.number(float, 0, 100)
    parser.add_argument("--adversarial", type=weight, default=0.01, help="weight of the discriminator's loss (0.01)")
    parser.add_argument("--perceptual", choices=["alex", "vgg"], help="LPIPS in the loss too, by its package (none)")
    parser.set_defaults(stage="decoder")
    args = td.check_flags(parser, parser.parse_args(argv))
    td.join_processes(args.device)
    run = td.Run(args)
    run.steps.setdefault("decoder", 4 if args.smoke else RECIPES[run.full]["steps"])
    return run


def main(argv=None):
    """Train a decoder."""
    def work():
        run = new_run(argv)
        run.out.mkdir(parents=True, exist_ok=True)
        run.check("decoder")
        torch.manual_seed(td.seed_of(run.seed, "decoder"))              # of the weights that it begins with
        train_decoder(run)
        if td.RANK == 0:
            preview(Trained(run.out, run.device, files={"vae": run.path("vae")}), "decoder", not run.args.data)
    return td.reported(work)


if __name__ == "__main__":
    sys.exit(main())
