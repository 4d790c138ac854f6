"""Speed on a GPU, for sample.py and extras/bench.py: torch.compile, for --compile, and a second
CUDA stream that decodes."""

import itertools

import torch

from motionstream import UserError, reason_of


def compile_blocks(model):
    """torch.compile each block of a model: the blocks share one compilation, the layers of a whole
    model would not. It recompiles for each cache length, with `write` and without, until the cache
    is full. UserError if the cache never fills, or if torch finds no compiler."""
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


def frames_beside(vae, latents, device, to_frames):
    """On a GPU: latents, chunk by chunk, decoded and handed to sample.to_frames. A second
    CUDA stream decodes and copies each chunk while the next one is denoised, so the next tracks are
    requested before anyone has seen this chunk."""
    beside = torch.cuda.Stream(device)
    video = None
    state = None
    for chunk in itertools.chain(latents, [None]):      # asks for the next one, which is queued
        if video is not None:
            with torch.cuda.stream(beside):
                frames = to_frames(video)               # waits for this stream only
            yield frames
        if chunk is None:
            return
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            video, state = vae.decode(chunk, state)
        chunk.record_stream(beside)                     # its memory is not reused before that
