"""Reward Forcing (arXiv 2512.04678) in a training: Re-DMD. Shapes are those of motionstream.py."""

import torch


# --------------------------------------------------------------------------------------------------
# Re-DMD: rewarded distribution matching.

def clip_weight(run, vae, x0, conditions, points):
    """Weights exp(reward / beta) (B, 1, 1, 1, 1) of clips in dmd_loss (eq. 11), and the mean
    reward. x0 (B, C, F, h, w), conditions and points: see train_distill.generated_clip. run.reward
    gets the decoded video (B, 3, T, H, W) in [-1, 1] and a dict of text, tracks, visible, ids…, and
    returns (B,)."""
    with torch.no_grad(), run.autocast():
        video, _ = vae.decode(x0)
    told = {name: value for name, value in conditions.items() if name not in ("tracks", "copies")}
    reward = run.reward(video.float(), told | points)           # (B,)
    weight = torch.exp(reward / run.settings.beta)
    return weight.view(-1, 1, 1, 1, 1), reward.mean()
