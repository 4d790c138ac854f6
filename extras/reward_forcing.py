"""Reward Forcing (arXiv 2512.04678) in a training: Re-DMD. Shapes are those of motionstream.py."""

import torch

# --------------------------------------------------------------------------------------------------
# Re-DMD: rewarded distribution matching.

def clip_weight(run, vae, x0, conditions, points):
    """Weights exp(reward / beta) (B, 1, 1, 1, 1) of clips in dmd_loss (eq. 11), and the mean
    reward. x0 (B, C, F, h, w), conditions and points: see train_distill.generated_clip. run.reward
    is a function of the decoded video (B, 3, T, H, W) in [-1, 1] and a dict of text, tracks
    (B, T, N, 2), visible, ids…; it returns (B,)."""
    with torch.no_grad(), run.autocast():
        video, _ = vae.decode(x0)
    told = conditions | points                  # tracks are points now, not features
    told.pop("copies", None)
    reward = run.reward(video.float(), told)                    # (B,)
    weight = torch.exp(reward / run.settings.beta)
    return weight.view(-1, 1, 1, 1, 1), reward.mean()
