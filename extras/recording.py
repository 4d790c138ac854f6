"""What NAME.npz of a recording of the page says besides its tracks, so that sample.py makes the
same frames again.

    settings_in(arrays)                  -> {name: value}, see SETTINGS
    replayed(flags, said, config)        -> the flags of sample.py with what they leave open, and
                                            what is left to obey of the recording
    steered(parts, said, …)              -> the motion, each chunk with its own text

What is recorded is written by extras/page.py, see save_recording there.
"""

import argparse
import itertools
import zlib
from dataclasses import replace

import torch

# How the frames were made; window -1: all; weights: see checksum.
SETTINGS = {
    "seed": int,
    "chunk": int,
    "sink": int,
    "window": int,
    "steps": int,
    "fps": float,
    "dtype": str,
    "frames": int,
    "weights": int,
}

# Their least and greatest, as of the flags of sample.py; a window below 0 is all of the past.
LIMITS = {"chunk": (1, 999), "sink": (0, 10 ** 6), "window": (-10 ** 6, 10 ** 6),
          "steps": (1, 1000), "fps": (0.1, 1000), "frames": (1, 10 ** 6),
          "seed": (-2 ** 63, 2 ** 63 - 1)}


def settings_in(arrays):
    """SETTINGS and the prompts in the arrays of a recording. Whatever is wrong with them raises."""
    said = {name: kind(arrays[name]) for name, kind in SETTINGS.items()}
    prompts = arrays["prompts"]
    if prompts.dtype.kind != "U" or prompts.ndim != 1:
        raise ValueError("its prompts are no list of texts")
    said["prompts"] = prompts.tolist()
    for name, (least, most) in LIMITS.items():
        if not least <= said[name] <= most:
            raise ValueError(f"{name} is {said[name]}")
    if not said["prompts"] or said["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError("no recording")
    if said["window"] < 0:
        said["window"] = None
    return said


def replayed(flags, said, config):
    """(The flags of sample.py, a namespace, with what a recording has `said` where nothing was
    typed; what it has said, but for the prompts if one was typed). config: of the weights."""
    fields = {"frames": flags.frames or said["frames"], "fps": flags.fps or said["fps"]}
    if flags.seed is None:
        fields["seed"] = said["seed"]
    if flags.dtype == "auto":
        fields["dtype"] = said["dtype"]
    first = said["prompts"][0]
    if flags.prompt is not None:
        said = said | {"prompts": [flags.prompt]}
    elif first or config.text_encoder == "words":
        fields["prompt"] = first
    streams = flags.sampler == "stream" or flags.sampler is None and config.causal
    if streams and flags.memory is None:
        fields["memory"] = {name: said[name] for name in ("chunk", "sink", "window")}
    if streams and flags.steps is None and said["steps"] != len(config.sigmas):
        fields["steps"] = said["steps"]
    return argparse.Namespace(**vars(flags) | fields), said


def steered(parts, said, job, models, embed):
    """The parts of a motion, one for each chunk, each with its own prompt's text; None for models
    whose text cannot change. Prints why the frames may differ. embed(prompt, config): the text."""
    if said["weights"] != checksum(models):
        print("note: it was recorded with other weights")
    if job.config.causal and job.config.text_encoder == "words":
        return with_prompts(parts, said, job.config, embed)


def with_prompts(parts, said, config, embed):
    """Yield the parts, each with its text."""
    for part, prompt in zip(parts, prompts_by_chunk(said, config.chunk)):
        yield replace(part, text=embed(prompt, config))


def prompts_by_chunk(said, chunk):
    """The prompts, without end, of chunks of so many latents, which may be others than the recorded
    ones."""
    last = len(said["prompts"]) - 1
    for latent in itertools.count(0, chunk):
        yield said["prompts"][min(latent // said["chunk"], last)]


def checksum(models):
    """A number that tells sample.Models apart, and encoded images: of the first numbers of each
    tensor."""
    tensors = list(models.dit.state_dict().values()) + list(models.vae.state_dict().values())
    if models.encoded.clip is not None:
        tensors.append(models.encoded.clip)
    starts = [tensor.flatten()[:64].bfloat16().float().cpu() for tensor in tensors]
    return zlib.crc32(torch.cat(starts).numpy().tobytes())
