"""One image and some tracks in, a video out, written while it is generated.

    python sample.py --image x.png --tracks t.npz

t.npz holds `tracks` (T, N, 2): positions of N points in T frames, x to the right and y down, in
pixels of the image as displayed (after its EXIF rotation); and optionally

    visibility (T, N)   hidden and "not specified" are the same; without it, NaN is hidden
    width, height       of the picture that the tracks refer to, if it is not the image itself
    ids (N,)            ID of each track, see track_ids; track_id_mode: the kind of IDs
    start (N, 2)        position of each point in frame 0, if it is not visible there
    fps                 only compared with the model's
    format              "motionstream": its layout is trusted. A file without it is read by
                        extras/tracks.py, which looks at the values and knows other programs' files

A recording of the page also stores its settings (extras/recording.py) and gives the same frames
again. --drag and --pin replace --tracks.
"""

import argparse
import collections
import contextlib
import itertools
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from motionstream import (FRAMES, Config, MotionStream, UserError, check_shape, chunk_sizes,
                          copy_weights, euler, extra, image_inputs, inside_picture, motion_inputs,
                          naming, open_pretrained, reason_of, rollout, schedule, start_points,
                          track_ids, video_frames, write_file)
from vae import VAE_FILES, WanVAE, open_weights

ASSETS = Path(__file__).resolve().parent / "assets"
MOST_FRAMES = 1_000_000
LARGEST = 2 ** 30           # bytes of a tracks file, unpacked
SHORTEST_SIDE = 256         # pixels of a written video; smaller ones are enlarged
WAN_FRAMES = 81             # length of Wan's training clips: the default length of a video, and the
                            # longest that weights without a window have seen


# --------------------------------------------------------------------------------------------------
# Sampling. Copy this part to stream video in your own program.

@dataclass(frozen=True)
class Motion:
    """The tracks of a clip or of one chunk, in pixels of the generated video."""
    tracks: torch.Tensor                    # (B, T, N, 2) float32, x and y
    visible: torch.Tensor                   # (B, T, N) bool
    ids: torch.Tensor                       # (B, N) int64, see track_ids
    start: torch.Tensor | None = None       # (B, N, 2): positions in frame 0, for copies
    control: torch.Tensor | None = None     # (B, track_dim, F, h, w): replaces the head's output
    text: torch.Tensor | None = None        # (B, L, text_dim) of this chunk; None: see Encoded


@dataclass(frozen=True)
class Encoded:
    """The model's other inputs, the same for the whole video."""
    text: torch.Tensor | None = None        # (B, L, text_dim), None: the null text
    null_text: torch.Tensor | None = None   # replaces text in guidance, None: zeros
    clip: torch.Tensor | None = None        # (B, 257, clip_dim): CLIP's features of the image


def motion_by_chunk(motion, config):
    """Split a whole Motion by chunk: for n latents 4 n - 3 frames in the first chunk, 4 n in the
    others. Frames of the last chunk beyond the motion's end are "not specified"."""
    frames = motion.tracks.shape[1]
    stop = 1 - FRAMES
    for size in chunk_sizes(config, latents_to_cover(frames, config)):
        start = stop
        stop = start + FRAMES * size
        span = slice(max(start, 0), stop)
        beyond = max(stop - frames, 0)
        tracks = F.pad(motion.tracks[:, span], (0, 0, 0, 0, 0, beyond))
        visible = F.pad(motion.visible[:, span], (0, 0, 0, beyond))
        part = replace(motion, tracks=tracks, visible=visible)
        if motion.control is not None:
            latents = slice(start // FRAMES + 1, stop // FRAMES + 1)
            part = replace(part, control=motion.control[:, :, latents])
        yield part


def live_motion(points, starts, config, ids=None):
    """One chunk of a live stream: points (T, N, 2) in pixels of the video, NaN where hidden; starts
    (N, 2): their positions in frame 0. T is 4 chunk - 3 for the first chunk, then 4 chunk. ids (N,)
    in [0, 2**32), the same in every chunk: pass them if tracks come and go, because by default an
    ID depends on a track's index and start."""
    points = torch.as_tensor(points, dtype=torch.float32)[None]             # (1, T, N, 2)
    starts = torch.as_tensor(starts, dtype=torch.float32)[None]             # (1, N, 2)
    N = starts.shape[1]
    check_shape("starts, after the batch of 1,", starts, (1, N, 2))
    check_shape("points, after the batch of 1,", points, (1, points.shape[1], N, 2))
    if ids is not None:
        ids = torch.as_tensor(ids, dtype=torch.int64)[None]                 # (1, N)
    elif config.track_id_mode == "random":
        names = [f"{number} {start.tolist()}" for number, start in enumerate(starts[0])]
        ids = torch.tensor([[zlib.crc32(name.encode()) for name in names]], dtype=torch.int64)
    else:
        ids = track_ids(starts[:, None], config)
    return Motion(points, ~points.isnan().any(-1), ids, starts)


def motion_conditions(model, vae, frame_0, motion):
    """The model's keyword arguments for the Motion of a clip or a chunk, see motion_inputs."""
    if motion.control is not None:
        return {"tracks": motion.control}
    if not model.config.track_dim:
        return {}
    device = frame_0.device
    start = motion.start
    if start is not None:
        start = start.to(device)
    return motion_inputs(model, motion.tracks.to(device), motion.visible.to(device),
                         motion.ids.to(device), start=start, frame_0=frame_0, vae=vae)


def chunk_conditions(model, vae, frame_0, motion, encoded, sizes, channels=None):
    """The model's keyword arguments by chunk, made lazily. motion: an iterator of a Motion per
    chunk. sizes: of the chunks in latents, see chunk_sizes. channels: the image channels of the
    first chunk, see image_inputs."""
    for number, (size, part) in enumerate(zip(sizes, motion)):
        wanted = FRAMES * size
        if number == 0:
            wanted = video_frames(size)     # frame 0 has a latent of its own
        found = part.tracks.shape[1]
        assert found == wanted, f"chunk {number} has tracks of {found} frames, expected {wanted}"
        text = encoded.text if part.text is None else part.text.to(frame_0.device)
        inputs = motion_conditions(model, vae, frame_0, part)
        yield {"text": text, "image": channels, "clip": encoded.clip} | inputs
        if not model.config.copies:
            channels = None                 # they are in the cache now


def draw_noise(first_latent, count, rng):
    """Noise (B, C, count, h, w), sized as the image's latent; the same on every device."""
    B, C, _, h, w = first_latent.shape
    return torch.randn((B, C, count, h, w), generator=rng).to(first_latent)


def decode(vae, latents):
    """Decode an iterable of latent chunks (B, C, f, h, w); yield a video (B, 3, T, H, W) in [-1, 1]
    for each."""
    state = None
    for chunk in latents:
        video, state = vae.decode(chunk, state)
        yield video


def check_image(frame_0, config):
    """AssertionError, with both shapes, unless frame_0 (B, 3, H, W) has the model's size."""
    height, width = config.size
    check_shape("frame_0", frame_0, (len(frame_0), 3, height, width))


@torch.inference_mode()
def stream(model, vae, frame_0, motion, encoded=Encoded(), seed=0, **cache):
    """Sample the student: a video as long as `motion`, at constant memory. Yields each chunk as
    soon as it is decoded, (B, 3, T, H, W) in [-1, 1]: 4 chunk - 3 frames, then 4 chunk (with
    config.first_chunk, 4 first_chunk - 3 at first).

    frame_0 (B, 3, H, W) in [-1, 1]: the image, of the model's size, see fit_image. motion: a
    Motion, or an iterator of one per chunk (see live_motion), advanced just before that chunk is
    denoised, so that tracks and text can change while it streams. cache: chunk, sink and window, to
    override the config's."""
    yield from decode(vae, stream_latents(model, vae, frame_0, motion, encoded, seed, **cache))


def stream_latents(model, vae, frame_0, motion, encoded=Encoded(), seed=0, **cache):
    """As `stream`, but not decoded: an iterator of latents (B, C, chunk, h, w)."""
    config = replace(model.config, **cache)
    assert not config.has_mask, "weights with a mask take a whole clip: use sample_teacher"
    check_image(frame_0, config)
    frame_0 = frame_0.to(next(model.parameters()).device)
    encoded_image = vae.encode(frame_0[:, :, None])                         # (B, C, 1, h, w)
    channels, first_latent = image_inputs(config, encoded_image, next(chunk_sizes(config)))
    rng = torch.Generator().manual_seed(seed)
    noise = (draw_noise(encoded_image, size, rng) for size in chunk_sizes(config))
    if isinstance(motion, Motion):
        motion = motion_by_chunk(motion, config)
    sizes = chunk_sizes(config)
    conditions = chunk_conditions(model, vae, frame_0, motion, encoded, sizes, channels)
    caches = model.new_caches(**cache)
    return rollout(model, noise, conditions, first_latent, rng=rng, caches=caches)


@torch.inference_mode()
def sample_teacher(model, vae, frame_0, motion, encoded=Encoded(), seed=0):
    """Sample the teacher: all chunks that cover a Motion at once, then yielded as `stream` does.
    Steps and guidance are the config's."""
    config = model.config
    check_image(frame_0, config)
    count = latents_to_cover(motion.tracks.shape[1], config)
    frame_0 = frame_0.to(next(model.parameters()).device)
    grey = 0                                # frames after the image
    if config.has_mask:
        grey = FRAMES * (count - 1)
    encoded_image = vae.encode(F.pad(frame_0[:, :, None], (0, 0, 0, 0, 0, grey)))
    channels, first_latent = image_inputs(config, encoded_image, count)
    conditions = {"text": encoded.text, "image": channels, "clip": encoded.clip}
    motions = motion_by_chunk(motion, config)
    parts = [motion_conditions(model, vae, frame_0, part) for part in motions]
    for name in parts[0]:
        conditions[name] = torch.cat([part[name] for part in parts], 2)
    noise = draw_noise(encoded_image, count, torch.Generator().manual_seed(seed))
    for x0, _ in euler(model, noise, conditions, first_latent, null_text=encoded.null_text):
        pass                                # the trajectory ends in the clean latents
    yield from decode(vae, x0.split(list(chunk_sizes(config, count)), 2))


def latents_to_cover(frames, config):
    """Latent frames in the fewest whole chunks that cover `frames` video frames."""
    latents = 1 + math.ceil((frames - 1) / FRAMES)
    first = config.first_chunk_size
    after = math.ceil((latents - first) / config.chunk)     # chunks after the first
    return first + max(after, 0) * config.chunk


def to_frames(video):
    """Video (1, 3, T, H, W) in [-1, 1] to a uint8 array (T, H, W, 3)."""
    pixels = (video[0].float() + 1) * 127.5                                 # (3, T, H, W)
    return pixels.round().byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()


def words_in(text):
    """The words of a prompt, none for None."""
    return re.findall(r"\w+", (text or "").lower())


def embed_words(text, config):
    """Embed a prompt for the tiny model, (1, L, text_dim): each word is a random vector seeded by
    its letters, the same in every process. At most text_len words; the model does not see their
    order. None: the null text."""
    if text is None:
        return None
    rows = []
    for word in words_in(text)[:config.text_len]:
        seed = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        rows.append(torch.randn(config.text_dim, generator=seed))
    if not rows:
        return torch.zeros(1, 0, config.text_dim)
    return torch.stack(rows)[None]


# --------------------------------------------------------------------------------------------------
# The image.

def load_image(path):
    """Load a picture, a path or an open file, as 8-bit RGB: rotated by its EXIF tag, transparency
    over white."""
    name = path if isinstance(path, str | Path) else "the picture"
    with naming(name, "cannot be read as a picture; save it again as .png, or smaller"):
        image = Image.open(path)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floats, of which no value is known to be white")
        if image.mode.startswith("I"):      # 16 bits: convert() would clip, not scale
            levels = np.asarray(image)
            if levels.min() < 0 or levels.max() > 65535:
                raise ValueError("its pixels are integers of more than 16 bits")
            image = Image.fromarray((levels / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def crop(width, height, size):
    """The centred part of a width x height picture to be scaled to `size` (height, width):
    (scale, left, top), left and top in pixels of the picture."""
    scale = max(size[0] / height, size[1] / width)
    left = max((width - size[1] / scale) / 2, 0)
    top = max((height - size[0] / scale) / 2, 0)
    return scale, left, top


def shown_part(image_size, size):
    """(left, top, right, bottom) of what a video of `size` shows of an image (width, height)."""
    width, height = image_size
    _, left, top = crop(width, height, size)
    return left, top, width - left, height - top


def fit_image(image, size):
    """An RGB image to (1, 3, H, W) in [-1, 1], (H, W) = size."""
    box = shown_part(image.size, size)
    pixels = np.array(image.resize(size[::-1], Image.Resampling.LANCZOS, box))      # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# Tracks on the image.

@dataclass(frozen=True)
class Tracks:
    """Positions of points in every frame, in pixels of the image."""
    tracks: np.ndarray                  # (T, N, 2) float32, finite
    visible: np.ndarray                 # (T, N) bool
    ids: np.ndarray | None = None       # (N,) integers below 2**32
    id_mode: str = "random"             # the kind of IDs, as in Config
    fps: float | None = None
    recorded: dict | None = None        # settings of a recording, see extras/recording.py
    start: np.ndarray | None = None     # (N, 2) float32: positions in frame 0


def read_tracks(path, size, frames=None):
    """Read the Tracks in a file, for an image of `size` (width, height). frames: the number wanted,
    which can reveal swapped axes in another program's file. Raises UserError, naming the file."""
    with naming(path, "damaged, or not written by this project; extras/tracks.py reads others"):
        arrays = own_arrays(path)
        if arrays is not None:
            with np.errstate(all="ignore"):         # what overflows is not finite
                return own_tracks(arrays, size)
    tracks = extra("tracks", f"{path} is not a file that this project wrote")
    return Tracks(**tracks.load_tracks(path, size, frames=frames))


def no_tracks(frames):
    """Tracks of no points."""
    points = np.zeros((frames, 0, 2), np.float32)
    return Tracks(points, points[..., 0] > 0)


def own_arrays(path):
    """The arrays of a file written by this project, None for other files. Never unpickles."""
    if not zipfile.is_zipfile(path):
        return None
    with np.load(path) as file:
        if "format" not in file.files or str(file["format"]) != "motionstream":
            return None
        if sum(entry.file_size for entry in file.zip.infolist()) > LARGEST:
            raise UserError(f"unpacks to more than {LARGEST / 2 ** 30:g} GiB")
        return dict(file)


def own_tracks(arrays, size):
    """Arrays of a file written by this project to Tracks. Malformed ones raise an exception of any
    type; the caller makes a UserError of it."""
    for name in "tracks", "start", "width", "height":
        if name in arrays and arrays[name].dtype.kind not in "iuf":
            raise ValueError(f"{name} is no array of numbers")
    tracks = arrays["tracks"].astype(np.float32)
    visible = arrays.get("visibility", ~np.isnan(tracks).any(-1)) > 0
    ids = arrays.get("ids", np.zeros(tracks.shape[1], int))
    tracked = np.array([arrays.get("width", size[0]), arrays.get("height", size[1])], float)
    T, N, _ = tracks.shape
    shapes = tracks.shape == (T, N, 2) and visible.shape == (T, N) and ids.shape == (N,)
    values = np.isfinite(tracks[visible]).all() and (ids >> 32 == 0).all() and (tracked > 0).all()
    if not (T and shapes and values):
        raise ValueError("no tracks")
    scale = (np.array(size) / tracked).astype(np.float32)
    tracks = np.nan_to_num(tracks).clip(-1e6, 1e6) * scale
    start = arrays.get("start")
    if start is not None:
        start = start.astype(np.float32).reshape(N, 2).clip(-1e6, 1e6) * scale
    recorded = None
    if "prompts" in arrays:
        recorded = extra("recording", "is a recording").settings_in(arrays)
    fps = float(arrays["fps"]) if "fps" in arrays else None
    if "ids" not in arrays:
        ids = None
    mode = str(arrays.get("track_id_mode", "random"))
    return Tracks(tracks, visible, ids=ids, id_mode=mode, fps=fps, recorded=recorded, start=start)


def to_video(points, image_size, size):
    """Points (…, 2) float32 on the image (width, height) to positions in the video of `size`
    (height, width): a tensor, not clipped at the borders."""
    scale, left, top = crop(*image_size, size)
    return torch.from_numpy((points - np.float32((left, top))) * np.float32(scale))


def fit_tracks(tracks, image_size, frames, config, seed):
    """Tracks on the image (width, height) to a Motion for the whole chunks that cover `frames`, in
    pixels of the model's video. Tracks are scaled and cropped with the image, hidden where cropped
    away, and "not specified" after their end."""
    points = to_video(tracks.tracks, image_size, config.size)[None]         # (1, T, N, 2)
    inside = inside_picture(points, *config.size)
    visible = torch.from_numpy(tracks.visible)[None] & inside               # (1, T, N)
    if tracks.start is None:
        start = start_points(points, visible)                               # (1, N, 2)
    else:
        start = to_video(tracks.start, image_size, config.size)[None]
    if tracks.ids is not None and tracks.id_mode == config.track_id_mode:
        ids = torch.from_numpy(tracks.ids.astype(np.int64))[None]           # (1, N)
    else:
        ids = track_ids(points, config, torch.Generator().manual_seed(seed))
    whole = video_frames(latents_to_cover(frames, config))
    missing = max(whole - points.shape[1], 0)
    points = F.pad(points[:, :whole], (0, 0, 0, 0, 0, missing))             # (1, whole, N, 2)
    visible = F.pad(visible[:, :whole], (0, 0, 0, missing))
    return Motion(points, visible, ids, start)


# --------------------------------------------------------------------------------------------------
# Writing the video.

def enlarge(frame):
    """Enlarge a frame (H, W, 3), nearest neighbour, until no side is below SHORTEST_SIDE."""
    factor = math.ceil(SHORTEST_SIDE / min(frame.shape[:2]))
    return frame.repeat(factor, 0).repeat(factor, 1)


@contextlib.contextmanager
def video_file(path, fps):
    """`with video_file(path, fps) as append`: append(frame), uint8 (H, W, 3), writes to a temporary
    file beside `path`, which replaces `path` when the block ends. If the block raises, nothing is
    left behind. extras/video.py, if it is there, also tags colours and reads the video back."""
    path = Path(path)
    part = path.absolute().with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    video = extra("video")
    try:
        if video:
            with video.checked_writer(part, path, fps) as append:
                yield append
        else:
            with contextlib.closing(imageio.get_writer(part, "FFMPEG", fps=fps)) as writer:
                yield writer.append_data
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def picture_file(path):
    """As video_file, but writes only the last frame: an edited picture."""
    last = collections.deque(maxlen=1)
    yield last.append
    write_file(path, lambda part: Image.fromarray(last[0]).save(part, "png"))


@contextlib.contextmanager
def hold_signals():
    """Record the first Ctrl-C or SIGTERM in the list that this yields; the second one ends the
    program."""
    noted = []

    def handle(signum, _):
        if noted:
            raise KeyboardInterrupt
        noted.append(signum)

    before = {}
    for signum in signal.SIGINT, signal.SIGTERM:
        before[signum] = signal.signal(signum, handle)
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def write_frames(append, frames, total):
    """Append frames, `total` of them, to a video as they arrive. Returns the exit code: 0, or 128 +
    the signal that ended it early. From the first frame on, Ctrl-C keeps what is done."""
    started = time.perf_counter()
    frames = itertools.chain([next(frames)], frames)
    first_after = time.perf_counter() - started
    with hold_signals() as noted:
        for count, frame in enumerate(tqdm(frames, total=total, unit=" frames", disable=None), 1):
            append(frame)
            if noted:
                break
    seconds = time.perf_counter() - started
    print(f"{count} of {total} frames in {seconds:.2f} s, {count / seconds:.1f} frames/s, the "
          f"first after {first_after:.2f} s")
    if noted:
        return 128 + noted[0]
    return 0


# --------------------------------------------------------------------------------------------------
# The command line.

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all others."""

    def error(self, message):
        raise UserError(message)


def number(kind, least, most):
    """A flag's type: an int or float from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]      # argparse prints it
    return parse


def memory_flag(text):
    """A flag's type: "c3s1w1" to the fields of Config for the student's KV cache: 3 latent frames
    per chunk, a sink of 1 chunk, a window of 1; wfull: all chunks."""
    found = re.fullmatch(r"c([1-9]\d{0,2})s(\d{1,6})w(\d{1,6}|full)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like c3s1w1 or c3s1wfull, chunk 1 to "
                                         "999")
    chunk, sink, window = found.groups()
    fields = {"chunk": int(chunk), "sink": int(sink), "window": None}
    if window != "full":
        fields["window"] = int(window)
    return fields


def guidance_flag(text):
    """A flag's type: "3,1.5" to (w_text, w_motion), see joint_guidance."""
    weights = tuple(map(float, text.split(",")))
    if len(weights) != 2 or not all(0 <= weight <= 100 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3,1.5: weights of text and of "
                                         "tracks, 0 to 100")
    return weights


SETTINGS = {"shift": number(float, 0.01, 100), "sink_decay": number(float, 0, 1)}


def setting(text):
    """A flag's type: "shift=3" to ("shift", 3.0), a field of Config."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SETTINGS)}")
    return name, SETTINGS[name](value)


def add_flags(parser):
    """Add the flags, shared with extras/page.py."""
    file = {"type": Path, "metavar": "FILE"}
    add = parser.add_argument
    add("--image", required=True, help="first frame, any picture file", **file)
    add("--tracks", help=".npz and others, see docs/tracks.md; default: none", **file)
    add("--drag", action="append", metavar="X,Y->X,Y",
        help="instead of --tracks: move a point of the image to another, or on; repeatable")
    add("--pin", action="append", metavar="X,Y", help="the same, for a point that stays")
    add("--grid", metavar="NxP", help="make each of those points N by N, P pixels apart")
    add("--prompt", metavar="TEXT", help="for what image and tracks do not show; default: the "
        "model's. The tiny model knows steady, fading or warming light, and steady, spinning or "
        "pulsing shapes")
    add("--out", default="out.mp4", help=".mp4, or .png for the last frame (out.mp4)", **file)
    frames = number(int, 1, MOST_FRAMES)
    add("--frames", type=frames, metavar="N", help=f"default: those of the tracks, or {WAN_FRAMES}")
    add("--fps", type=number(float, 0.1, 1000), metavar="F",
        help="of the output; default: the model's")
    add("--overlay", action="store_true", help="draw the tracks on the video")
    add = parser.add_argument_group("model").add_argument
    add("--weights", help="a Wan DiT, file or folder; default: the tiny model in assets/", **file)
    add("--vae", help="default: the tiny model's, or the one in the folder of --weights", **file)
    add("--device", default="auto", help="cpu, cuda, …; default: cuda if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on the CPU, else bfloat16")
    add("--compile", action="store_true",
        help="compile the DiT's blocks, a minute; on a GPU, decode on a stream of its own")
    add("--text-encoder", help="a -Diffusers folder with UMT5; default: --weights, if one", **file)
    add("--image-encoder", help="a -Diffusers folder with CLIP; default: --text-encoder's", **file)
    add("--negative-prompt", metavar="TEXT", help="guidance avoids it; default: Wan's")
    add("--prompt-embeds", help="encoder outputs from a file; see docs/weights.md", **file)
    add = parser.add_argument_group("sampling; defaults are the model's").add_argument
    add("--sampler", choices=("stream", "teacher"), help="default: that of the weights")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), metavar="N", help="of all noise; default: 0")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="denoising steps")
    add("--memory", type=memory_flag, metavar="cNsNwN", help="the student's KV cache: latent "
        "frames per chunk, chunks in the sink and in the window; wfull: all")
    add("--guidance", type=guidance_flag, metavar="T,M",
        help="the teacher's weights of text and tracks (eq. 2); 0,0: none")
    add("--set", dest="settings", type=setting, action="append", metavar="FIELD=VALUE",
        help=f"other fields of Config: {', '.join(SETTINGS)}")


def parse_flags(argv):
    """Parse the command line into the namespace that `run` and `resolve` read. Flags that are not
    given are None, unless they have a default."""
    parser = Parser(description="One image and some tracks in, a video out. To draw tracks while "
                    "it streams: python -m extras.page", allow_abbrev=False)
    add_flags(parser)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# Resolving flags and weights into a job.

@dataclass(frozen=True)
class Weights:
    """Facts about a file or folder of weights."""
    path: Path
    config: Config
    own: bool           # its metadata say how it is sampled
    has_head: bool      # a track head that is not all zeros
    count: int = 0      # parameters


def inspect(path):
    """The Weights at a path, checked but for the values of the tensors. Raises UserError."""
    model, metadata = open_pretrained(MotionStream, path, {})
    head = model.state_dict().get("track_head.conv.weight")
    own = metadata.get("format") == "motionstream"
    count = sum(parameter.numel() for parameter in model.parameters())
    return Weights(path, model.config, own, head is not None and bool(head.any()), count)


@dataclass(frozen=True)
class Job:
    """A fully resolved sampling job."""
    weights: Weights
    config: Config          # for sampling; causal: the student, else the teacher
    frames: int | None      # None: without end, as on the page
    fps: float              # of the output file
    seed: int
    device: torch.device
    dtype: torch.dtype      # of the DiT and of the VAE's decoder
    prompt: str | None
    drawn: bool = False     # tracks enter as a control video, not through the track head
    vae: Path | None = None                 # None: see find_vae
    sources: object = None                  # for Wan's encoders, see extras/encoders.py
    compile: bool = False
    notes: tuple = ()       # for the user


def resolve(flags, weights, tracks):
    """Resolve flags, see parse_flags, into a Job. Weights and tracks decide what the flags leave
    open. Whether they contradict each other is checked by extras/refusals.py, see `run`."""
    config, notes = resolve_config(flags, weights)
    prompt = config.prompt if flags.prompt is None else flags.prompt
    device = find_device(flags.device)
    dtype = flags.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, dtype)
    moved = tracks.tracks.shape[1] > 0
    drawn = moved and not weights.has_head and config.track_dim == config.out_dim
    if drawn:
        notes.append(f"{weights.path}: takes tracks drawn as a control video, in a style that is "
                     "untested with these weights")
    sources = None
    if config.is_wan:
        encoders = extra("encoders", f"{weights.path}: reads what Wan's encoders return")
        sources = encoders.Sources(prompt, flags.negative_prompt, flags.prompt_embeds,
                                   flags.text_encoder, flags.image_encoder, weights.path)
    return Job(
        weights=weights,
        config=config,
        frames=flags.frames or len(tracks.tracks),
        fps=flags.fps or config.fps,
        seed=flags.seed or 0,
        device=device,
        dtype=dtype,
        prompt=prompt,
        drawn=drawn,
        vae=flags.vae,
        sources=sources,
        compile=flags.compile,
        notes=tuple(notes))


def find_device(name):
    """The torch device called `name`; auto: cuda if available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tensor = torch.zeros(1, dtype=torch.float64, device=name)   # which MPS lacks
        tensor.item()                       # "meta" has none
    except Exception as e:                  # each backend has its own kinds
        raise UserError(f"--device {name}: not available here ({reason_of(e)})") from None
    return tensor.device


def resolve_config(flags, weights):
    """(Config for sampling, notes for the user). The weights' own config, or what is advised for
    their family, with the fields that flags change."""
    config = weights.config
    notes = []
    if not weights.own:
        usual = "stream" if config.causal else "teacher"
        checkpoints = extra("checkpoints", f"{weights.path}: does not say how it is sampled")
        config, words = checkpoints.advice(config, flags.sampler or usual)
        notes = [f"{weights.path}: {note}" for note in words]
    changes = dict(flags.settings or ()) | (flags.memory or {})
    if flags.guidance:
        changes["guidance"] = flags.guidance
    elif config.is_wan and flags.prompt is None and not flags.prompt_embeds:
        changes["guidance"] = (0.0, config.guidance[1])     # no text to guide by
    config = replace(config, **changes)
    if flags.steps or "shift" in changes:
        sigmas = schedule(flags.steps or len(config.sigmas), config.shift)
        config = replace(config, steps=flags.steps or config.steps, sigmas=sigmas)
    return config, notes


@dataclass(frozen=True)
class Models:
    """The networks, on one device, and the encoded inputs."""
    dit: MotionStream
    vae: torch.nn.Module
    encoded: Encoded


def find_vae(config, beside, path=None):
    """(The VAE for a model's Config, with its weights still mapped; its file). It is read from
    `path`, else it is the tiny model's or, for Wan's weights, the one in the folder `beside` or of
    the file `beside`. Everything is checked except the values of its tensors. Raises
    UserError."""
    places = [ASSETS / "tiny_vae.safetensors"]          # its shapes would fit Wan's too
    if config.is_wan:
        folder = beside if beside.is_dir() else beside.parent
        places = [folder / name for name in VAE_FILES[:3]]
    path = path or next(filter(Path.is_file, places), None)
    if path is None:
        names = " or ".join(VAE_FILES[:3])
        raise UserError(f"{beside}: give --vae PATH; there is no {names} in its folder")
    vae, file = open_weights(path)
    channels = vae.config.latent_channels
    if (channels, vae.stride) != (config.out_dim, config.stride):
        raise UserError(f"{path}: latents have {channels} channels and stride {vae.stride}, those "
                        f"of {beside} {config.out_dim} and {config.stride}; give --vae its own")
    return vae, file


def open_vae(config, beside, path=None):
    """Load the VAE that find_vae finds."""
    vae, file = find_vae(config, beside, path)
    return copy_weights(vae, file, torch.float32)


def encode_inputs(job, frame_0):
    """Encode a Job's text and image inputs. frame_0 (1, 3, H, W) in [-1, 1]."""
    if job.sources:
        return Encoded(*job.sources.encode(job.config, frame_0, job.device))
    text = embed_words(job.prompt, job.config)
    return Encoded(text if text is None else text.to(job.device))


def decode_in(dtype, vae):
    """Let a VAE decode in this dtype. It still encodes in float32: an image costs little, and the
    latents' precision is that of the sampler."""
    vae.decoder.to(dtype)
    if isinstance(vae, WanVAE):
        vae.conv2.to(dtype)                 # the decoder's first layer


def load_models(job, frame_0):
    """Load the Models of a Job; the encoders are freed before the DiT. frame_0 (1, 3, H, W)."""
    path = job.weights.path
    vae = open_vae(job.config, path, job.vae).to(job.device)
    decode_in(job.dtype, vae)
    encoded = encode_inputs(job, frame_0)
    dit = MotionStream.from_pretrained(path, dtype=job.dtype, device=job.device,
                                       **vars(job.config))
    if job.compile:
        extra("compiling", "--compile").compile_blocks(dit)
    c = dit.config
    sampler = f"teacher, whole clip, {c.steps} steps"
    if c.causal:
        window = "full" if c.window is None else c.window
        sampler = f"stream, c{c.chunk}s{c.sink}w{window}, {len(c.sigmas)} steps"
    print(f"{path.name}: {c.size[1]}x{c.size[0]} pixels, {sampler}, seed {job.seed}, {job.device}, "
          f"{str(job.dtype).removeprefix('torch.')}")
    return Models(dit, vae, encoded)


@torch.inference_mode()
def generate(job, models, frame_0, motion):
    """Yield the video's frames, uint8 (H, W, 3): job.frames of them; None: until `motion`
    ends. frame_0 and motion: see `stream`."""
    config = job.config
    inputs = (models.dit, models.vae, frame_0, motion, models.encoded, job.seed)
    if not config.causal:
        chunks = map(to_frames, sample_teacher(*inputs))
    else:
        latents = stream_latents(*inputs, chunk=config.chunk, sink=config.sink,
                                 window=config.window)      # which the page changes
        if job.compile and job.device.type == "cuda" and job.frames:  # nobody steers the next chunk
            frames_beside = extra("compiling", "--compile").frames_beside
            chunks = frames_beside(models.vae, latents, job.device, to_frames)
        else:
            chunks = map(to_frames, decode(models.vae, latents))
    frames = itertools.chain.from_iterable(chunks)
    yield from itertools.islice(frames, job.frames)


def tracks_of(flags, image_size, shown):
    """The Tracks that the flags name, on an image (width, height). shown: see shown_part."""
    frames = flags.frames or WAN_FRAMES
    if flags.tracks:
        return read_tracks(flags.tracks, image_size, flags.frames)
    if flags.drag or flags.pin:
        drag_tracks = extra("tracks", "--drag and --pin").drag_tracks
        return Tracks(*drag_tracks(flags.drag, flags.pin, flags.grid, frames, image_size, shown))
    return no_tracks(frames)


def run(argv):
    """Run the program; returns the exit code. argv: None for the command line's."""
    flags = parse_flags(argv)
    refusals = extra("refusals")        # None: what is wrong is found out by failing
    if refusals:
        refusals.check_flags(flags)
    image = load_image(flags.image)
    shipped = "tiny.safetensors"
    if flags.sampler == "teacher":
        shipped = "tiny_teacher.safetensors"
    weights = inspect(flags.weights or ASSETS / shipped)
    shown = shown_part(image.size, weights.config.size)
    tracks = tracks_of(flags, image.size, shown)
    if tracks.recorded:
        recording = extra("recording", "a recording")
        flags, recorded = recording.replayed(flags, tracks.recorded, weights.config)
    job = resolve(flags, weights, tracks)
    pixels = fit_image(image, job.config.size)
    motion = fit_tracks(tracks, image.size, job.frames, job.config, job.seed)
    if refusals:
        refusals.check(flags, job, pixels, tracks, WAN_FRAMES)
        refusals.print_notes(job, words_in(job.prompt), tracks, motion, image.size, shown)
    if flags.overlay or job.drawn:
        drawing = extra("tracks", "drawing tracks")     # found missing here, before any model loads
    models = load_models(job, pixels)
    if job.drawn:
        whole = motion.tracks.shape[1]
        control = drawing.render_control(models.vae, motion, job.config.size, whole)
        motion = replace(motion, control=control)
    steered = motion
    if tracks.recorded:
        parts = motion_by_chunk(motion, job.config)
        steered = recording.steered(parts, recorded, job, models, embed_words) or motion
    frames = map(enlarge, generate(job, models, pixels, steered))
    if flags.overlay:
        frames = drawing.overlaid(frames, motion, job.config.size)
    is_picture = flags.out.suffix.lower() == ".png"
    with picture_file(flags.out) if is_picture else video_file(flags.out, job.fps) as append:
        code = write_frames(append, frames, job.frames)
    print(flags.out)
    return code


def reported(work, *args):
    """Exit code of work(*args), a program: 2 and a one-line message for an error that the user can
    fix, 130 if interrupted."""
    refusals = extra("refusals")            # also for closed pipes and lack of memory
    try:
        if refusals:
            return refusals.ended(work, *args)
        return work(*args)
    except (UserError, OSError) as e:       # OSError: a full disk, for one
        print(f"error: {UserError(str(e))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv=None):
    """`run`, with errors as one line and an exit code."""
    warnings.filterwarnings("ignore", module="PIL")     # damaged pictures; errors are reported
    return reported(run, argv)


if __name__ == "__main__":
    sys.exit(main())
