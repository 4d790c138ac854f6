"""Reward Forcing (arXiv 2512.04678): variants of the student that train and stream with settings that
are off by default.

    EMASink     --set sink_decay=… (below 1): the sink takes up what leaves the window
"""

from motionstream import KVCache


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
            self.absorb(*chunks[self.sink])

    def absorb(self, k, v):
        """Average an evicted chunk into the sink's last one. AssertionError if they differ in size."""
        sink_k, sink_v = self.chunks[self.sink - 1]
        tokens = k.shape[1]
        held = sink_k.shape[1]
        assert tokens == held, f"EMA-Sink averages a chunk of {tokens} tokens into one of {held}"
        sink_k = sink_k.lerp(k, 1 - self.decay)
        sink_v = sink_v.lerp(v, 1 - self.decay)
        self.chunks[self.sink - 1] = (sink_k, sink_v)
