"""What sample.py refuses before it loads anything, in one line with the cure; what it notes about a
job that it accepts; and how the programs end. A copy of the project without this fails by itself,
with torch's, imageio's or Python's message.
"""

import os
import sys

import torch

from extras import checkpoints, encoders, video
from motionstream import UserError, reason_of


def check_flags(flags):
    """UserError for flags that contradict each other or name files that are missing, and if nothing
    can be written. flags: see sample.parse_flags."""
    moved = flags.drag or flags.pin
    if flags.grid and not moved:
        raise UserError("--grid belongs to --drag and --pin")
    if flags.tracks and moved:
        raise UserError("--drag and --pin replace --tracks, drop one of them")
    inputs = [flags.image, flags.tracks, flags.weights, flags.vae, flags.text_encoder,
              flags.image_encoder, flags.prompt_embeds]
    for path in filter(None, inputs):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    check_output(flags.out, (".mp4", ".png"), inputs)
    if flags.out.suffix.lower() == ".mp4":
        video.find_ffmpeg()


def check_output(path, endings, inputs):
    """UserError if an output path cannot be written or is one of the inputs."""
    there = [file for file in inputs if file and file.exists()]
    faults = [
        (path.suffix.lower() not in endings, f"choose a name that ends in {' or '.join(endings)}"),
        (not os.access(path.parent, os.W_OK),
         f"the folder {path.parent} is missing or not writable"),
        (path.is_dir(), "is a folder"),
        (path.exists() and any(map(path.samefile, there)),
         "is a file that is read; choose another name"),
    ]
    for wrong, cure in faults:
        if wrong:
            raise UserError(f"{path}: {cure}")


def check(flags, job, image, tracks, most):
    """Everything that is checked of a sample.Job of flags, weights and tracks before any model is
    loaded. flags: see sample.parse_flags; image: (1, 3, H, W); tracks: sample.Tracks; most: see
    check_job."""
    check_job(flags, job, tracks, most)
    check_files(job, image)


def check_job(flags, job, tracks, most):
    """UserError with the cure for the first invalid combination of flags, weights and tracks. most:
    frames up to which a student with a full window was trained."""
    weights = job.weights
    config = job.config
    streams = config.causal
    kind = "teacher"
    sampler = "teacher"
    if streams:
        kind = "student"
        sampler = "stream"
    full = streams and config.window is None
    moved = tracks.tracks.shape[1] > 0
    motion_weight = flags.guidance[1] if flags.guidance else 0
    encoded = flags.prompt_embeds or flags.text_encoder or flags.image_encoder
    for wrong, cure in [
        (weights.own and flags.sampler not in (None, sampler),
         f"holds a {kind}, use --sampler {sampler}"),
        (streams and flags.guidance, "--guidance belongs to --sampler teacher"),
        (streams and flags.negative_prompt is not None,
         "--negative-prompt belongs to --sampler teacher"),
        (not streams and flags.memory, "--memory belongs to --sampler stream"),
        (not streams and "sink_decay" in dict(flags.settings or ()),
         "sink_decay belongs to --sampler stream"),
        (full and job.frames > most and not flags.memory,
         f"trained to remember {most} frames, all of them; add --memory c{config.chunk}s1w5"),
        (full and flags.compile, "--compile needs a cache that stops growing; add --memory c3s1w5"),
        (streams and config.has_mask,
         "takes the image as a clip with a mask, which cannot stream; use --sampler teacher"),
        (not config.track_dim and (moved or motion_weight),
         "has no input for tracks; take Fun-Control, or drop --tracks, and give --guidance T,0"),
        (moved and not job.drawn and not weights.has_head, "has no trained track head, and its "
         f"input for tracks has {config.track_dim} channels, none for a drawn video"),
        (config.text_encoder == "words" and encoded,
         "reads words, give it --prompt and nothing encoded"),
    ]:
        if wrong:
            raise UserError(f"{weights.path}: {cure}")


def check_files(job, image):
    """UserError if the encoders of a sample.Job will fail, or its DiT does not fit into memory:
    said before any of them is loaded, not after the encoders have run. image: (1, 3, H, W)."""
    weights = job.weights
    if job.sources:
        encoders.check(job.sources, job.config, image)
    needed = weights.count * job.dtype.itemsize
    checkpoints.check_memory(needed, weights.path, job.device)


# --------------------------------------------------------------------------------------------------
# Notes on a job that can be done: what is cropped, hidden, unknown or not specified.

# The vocabulary of the shipped tiny model: "fading light, spinning shapes" (extras/world.py).
WORDS = ("steady", "fading", "warming", "light", "spinning", "pulsing", "shapes")


def print_notes(job, words, tracks, motion, image_size, shown):
    """Print all notes on a sample.Job. words: of its prompt; tracks: on the image (width, height);
    motion: the same in the video; shown: the part of the image in it, see part_in_words."""
    notes = list(job.notes) + on_words(job, words)
    left, top, _, _ = shown
    if max(left, top) >= 0.5:
        width, height = image_size
        notes.append(f"the image of {width}x{height} pixels is cropped, the video shows "
                     f"{part_in_words(shown)}")
    notes += on_tracks(job, tracks, motion)
    if tracks.fps not in (None, job.fps):
        notes.append(f"the tracks are at {tracks.fps:g} frames/s, the video at {job.fps:g}; "
                     "they are not resampled")
    for note in notes:
        print(f"note: {note}")


def part_in_words(shown):
    """Words for a part of an image, (left, top, right, bottom)."""
    left, top, right, bottom = shown
    return f"x from {left:.0f} to {right:.0f} and y from {top:.0f} to {bottom:.0f}"


def unknown_words(words):
    """The words that the tiny model was not trained on: to it they are noise."""
    return [word for word in words if word not in WORDS]


def on_words(job, words):
    """Notes on prompt words that the tiny model does not read, or was not trained on."""
    config = job.config
    if config.text_encoder != "words":
        return []
    notes = []
    if len(words) > config.text_len:
        notes.append(f"only the first {config.text_len} words of {job.prompt!r} are read")
    unknown = dict.fromkeys(unknown_words(words))           # an ordered set
    if unknown:
        notes.append(f"the tiny model never learned {', '.join(unknown)}, which is noise to it; it "
                     f"knows {', '.join(WORDS)}")
    return notes


def on_tracks(job, tracks, motion):
    """Notes on what is lost of the tracks on the way to the motion."""
    notes = []
    given = len(tracks.tracks)
    if job.frames > given:
        notes.append(f"the tracks end after {given} frames, the last {job.frames - given} are not "
                     "specified")
    visible = tracks.visible[:motion.visible.shape[1]].sum()
    lost = visible - motion.visible.sum().item()
    if lost:
        notes.append(f"{lost} of {visible} visible track points lie outside the video and are "
                     "hidden")
    kind = job.config.track_id_mode
    if tracks.ids is not None and tracks.id_mode != kind:
        notes.append(f"the IDs of these weights are of the kind {kind!r}, not {tracks.id_mode!r}; "
                     "the file's ids are not used")
    if not motion.visible.any():
        notes.append("no track is seen in the video, nothing is specified")
    return notes


# --------------------------------------------------------------------------------------------------
# How a program ends.

def ended(work, *args):
    """work(*args), the exit code of a program: 141 if the reader of its output closed the pipe, as
    | head -1 does. UserError if memory runs out. Consoles that lack a character of a path, as on
    Windows, print its code."""
    for console in sys.stdout, sys.stderr:
        if hasattr(console, "reconfigure"):
            console.reconfigure(errors="backslashreplace")
    try:
        code = work(*args)
        print(end="", flush=True)           # sys.stdout is None if it was closed before
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141                          # 128 + SIGPIPE, which Windows does not have
    except (MemoryError, RuntimeError) as e:
        of_memory = MemoryError, torch.OutOfMemoryError
        if not isinstance(e, of_memory) and "DefaultCPUAllocator" not in str(e):
            raise
        raise UserError(f"out of memory: {reason_of(e)}") from None
