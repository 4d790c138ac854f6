"""torch.compile for MotionStream, for --compile of sample.py and extras/bench.py."""

import torch

from motionstream import UserError, reason_of


def compile_blocks(model):
    """torch.compile each block of a model: the blocks share one compilation, the layers of a whole
    model would not. It recompiles for each cache length, with `write` and without, until the cache is
    full. UserError if the cache never fills, or if torch finds no compiler."""
    config = model.config
    if config.causal and config.window is None:
        raise UserError("--compile needs a cache that stops growing; add --memory c3s1w5")
    try:
        torch.compile(torch.neg)(next(model.parameters())[:1])
    except RuntimeError as e:
        raise UserError(f"--compile: torch.compile does not work here ({reason_of(e)})") from None
    if config.causal:       # beyond the limit torch compiles nothing; the page also has chunks of 1
        lengths = (config.chunk + 1) * (config.sink + config.window + 1)
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * lengths)
    for block in model.blocks:
        block.compile()
