"""Reward Forcing (arXiv 2512.04678): EMA-Sink, in sampling and training, and Re-DMD, in training.
Both are off by default. Shapes are those of motionstream.py."""

import torch

from motionstream import KVCache


# --------------------------------------------------------------------------------------------------
# EMA-Sink: the sink takes up what leaves the window.

class EMASink(KVCache):
    """A KVCache that averages each evicted chunk into the sink's last one (eq. 4, 5): decay times
    what is there plus 1 - decay times the chunk. Without a sink it is a KVCache."""

    def __init__(self, sink, window, decay):
        super().__init__(sink, window)
        self.decay = decay

    def write(self, k, v):
        chunks = self.chunks + [(k.detach(), v.detach())]
        super().write(k, v)
        if self.sink and len(self.chunks) < len(chunks):        # one was evicted
            evicted_k, evicted_v = chunks[self.sink]
            self.absorb(evicted_k, evicted_v)

    def absorb(self, k, v):
        """Average an evicted chunk into the sink's last one, of the same size."""
        sink_k, sink_v = self.chunks[self.sink - 1]
        tokens = k.shape[1]
        held = sink_k.shape[1]
        assert tokens == held, f"EMA-Sink averages a chunk of {tokens} tokens into one of {held}"
        sink_k = sink_k.lerp(k, 1 - self.decay)
        sink_v = sink_v.lerp(v, 1 - self.decay)
        self.chunks[self.sink - 1] = (sink_k, sink_v)


# --------------------------------------------------------------------------------------------------
# Re-DMD: rewarded distribution matching.

def clip_weight(run, vae, x0, conditions, points):
    """Weights exp(reward / beta) (B, 1, 1, 1, 1) of clips in dmd_loss (eq. 11), and the mean
    reward. x0 (B, C, F, h, w), conditions and points: see train_distill.generated_clip. run.reward
    is a function of the decoded video (B, 3, T, H, W) in [-1, 1] and a dict of text, tracks
    (B, T, N, 2), visible, ids…; it returns (B,)."""
    with torch.no_grad(), run.autocast():
        video, _ = vae.decode(x0)
    known = conditions | points                 # tracks are points now, not features
    known.pop("copies", None)
    reward = run.reward(video.float(), known)                   # (B,)
    weight = torch.exp(reward / run.settings.beta)
    return weight.view(-1, 1, 1, 1, 1), reward.mean()
