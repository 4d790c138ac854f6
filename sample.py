"""One image and some tracks in, a video out, written while it is generated.

    python sample.py --image x.png --tracks t.npz

Tracks are an .npz file with `tracks` (T, N, 2), x to the right and y down, in pixels of the image as it is seen (after
its EXIF rotation), and if wanted
    visibility (T, N)   0 or 1, or probabilities; hidden and "not specified" are the same
    width, height       of the picture that the pixels belong to, if it is not the image itself
    ids (N,)            which vector each track has (see track_ids); fps: only compared with the model's
Without visibility, NaN is hidden. Files of trackers and of other programs are read too, see the README. In place of
--tracks: --drag and --pin, or --depth and --camera. Shapes are those of motionstream.py.
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads wait awake, but briefly: the video encoder needs the cores

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from extras.encoders import image_encoder, kept_rows, text_encoder
from extras.checkpoints import SELF_FORCING, read_tensors
from extras.tracks import MOVES, camera_move, camera_tracks, load_tracks, picture_size
from motionstream import (MotionStream, UserError, copy_along_tracks, euler, find_config,
                          image_and_mask, image_channels, read_weights, rollout, schedule, track_features, track_ids, write)
from vae import VAE_FILES, load_vae

ASSETS = Path(__file__).resolve().parent / "assets"
UMT5_DIM, CLIP_ROWS = 4096, 257     # of an encoded text, and of an encoded image
NEGATIVE_PROMPT = (         # of Wan, what guidance leads away from
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
MOST_FRAMES = 1_000_000
SHORTEST_SIDE = 256         # pixels of a written video; smaller ones are enlarged
TRAIL = 12                  # frames that a track's trail lasts in --overlay
HISTORY = 81                # frames that weights without a window, which forget nothing, saw in training


# ----------------------------------------------------------------------------------------------------------------------
# The sampling itself. Copy this part to stream video in your own program.

class Motion(NamedTuple):
    """What shall move where, frame by frame, in pixels of the generated video."""
    tracks: torch.Tensor    # (B, T, N, 2) float32
    visible: torch.Tensor   # (B, T, N) bool
    ids: torch.Tensor       # (B, N) int64
    control: torch.Tensor | None = None     # (B, track_dim, F, h, w): goes where the track head's output would


def has_mask(config):
    """Whether the image channels are a mask and a clip: Wan's image-to-video weights and Fun-InP."""
    return config.image_dim not in (0, config.out_dim)


def image_inputs(config, first, frames):
    """How weights take the image: (channels of a clip of `frames` latents, clean latent frame 0), None what they do
    not take. first (B, C, 1, h, w): its latent; with a mask (B, C, frames, h, w), those of a clip grey after it."""
    if config.copy_dim:                                 # at every frame: what the model falls back on
        return image_channels(first, frames, still=True), first
    channels = image_channels(first, frames) if config.image_dim else None
    channels = image_and_mask(first[:, :, :frames]) if has_mask(config) else channels
    clean = first[:, :, :1] if config.clean_first else None                  # Wan 2.2 5B may take both
    return channels, clean


def pieces(motion, text, chunk):
    """What each chunk is given of a whole Motion: (its part, text). The first chunk has 4 chunk - 3 frames, the others
    4 chunk. Nothing is specified where the last one reaches beyond the motion's end."""
    frames = motion.tracks.shape[1]
    for start in range(-3, frames, 4 * chunk):
        stop, latent, control = start + 4 * chunk, (start + 3) // 4, motion.control
        span, beyond = slice(max(start, 0), stop), max(stop - frames, 0)
        yield Motion(F.pad(motion.tracks[:, span], (0, 0, 0, 0, 0, beyond)),
                     F.pad(motion.visible[:, span], (0, 0, 0, beyond)), motion.ids,
                     None if control is None else control[:, :, latent:latent + chunk]), text


def conditions(model, first, motion, text=None, clip=None, copy=None):
    """The model's keyword arguments chunk by chunk, each made when asked for. motion: Motion, or an iterator of what
    `pieces` would yield, for control and text that change while it streams. copy: for weights that copy, a function of
    tracks, visible and ids, `copy_along_tracks` with the first two arguments given."""
    c = model.config
    image = image_inputs(c, first, c.chunk)[0]
    for part, text in pieces(motion, text, c.chunk) if isinstance(motion, Motion) else motion:
        features = part.control
        if c.track_dim and features is None:
            points = [tensor.to(first.device) for tensor in part[:3]]
            features = track_features(model, *points, copied=copy(*points) if copy else None)
        yield {"text": text, "tracks": features, "image": image, "clip": clip}
        image = image if c.copy_dim else None           # else it is in the cache now


@torch.inference_mode()
def stream(model, first, motion, text=None, seed=0, clip=None, copy=None):
    """The student: clean latents (B, C, chunk, h, w), one chunk after the other, at constant memory.
    first (B, C, 1, h, w): the image's latent. The noise levels are the model's own. motion, text, copy: see
    `conditions`."""
    generator = torch.Generator().manual_seed(seed)     # on the CPU: the same noise whatever the device
    shape = (*first.shape[:2], model.config.chunk, *first.shape[3:])
    noise = (torch.randn(shape, generator=generator).to(first) for _ in itertools.count())
    _, clean = image_inputs(model.config, first, 1)
    given = conditions(model, first, motion, text, clip, copy)
    yield from rollout(model, noise, given, clean, generator=generator)


@torch.inference_mode()
def sample_teacher(model, first, motion, frames, text=None, seed=0, null_text=None, clip=None, copy=None):
    """The teacher: whole chunks that cover `frames`, made all at once, then handed out one by one as `stream` does.
    null_text: what "without text" means, see guided_velocity. Noise levels and guidance are the model's own."""
    c, count = model.config, latent_frames(frames, model.config)
    given = conditions(model, first, motion, text, copy=copy)
    tracks = [piece["tracks"] for piece in itertools.islice(given, count // c.chunk)]
    image, clean = image_inputs(c, first, count)
    noise = torch.randn((*first.shape[:2], count, *first.shape[3:]), generator=torch.Generator().manual_seed(seed))
    given = {"text": text, "tracks": torch.cat(tracks, 2) if c.track_dim else None, "image": image, "clip": clip}
    for x0, _ in euler(model, noise.to(first), given, clean, null_text=null_text):
        pass                                            # the last of the trajectory is clean
    yield from x0.split(c.chunk, 2)


def latent_frames(frames, config):
    """How many latent frames the whole chunks have that cover `frames`."""
    return math.ceil((frames + 3) / (4 * config.chunk)) * config.chunk


def to_frames(video):
    """Video (1, 3, T, H, W) in [-1, 1] to uint8 (T, H, W, 3)."""
    return ((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


@torch.inference_mode()
def decode_frames(vae, latents):
    """Latents of one video, an iterable of (1, C, f, h, w), to its frames, uint8 (H, W, 3), one by one."""
    state = None
    for chunk in latents:
        video, state = vae.decode(chunk, state)
        yield from to_frames(video)


def embed_words(text, config):
    """A prompt for the tiny model, (1, L, text_dim): each word is random numbers seeded by its own letters, the same in
    every process. At most text_len words; their order is not seen. None: the null text."""
    if text is None:
        return None
    words = re.findall(r"\w+", text.lower())[:config.text_len]
    seeds = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in words]
    rows = [torch.randn(config.text_dim, generator=seed) for seed in seeds]
    return torch.stack(rows)[None] if rows else torch.zeros(1, 0, config.text_dim)


# ----------------------------------------------------------------------------------------------------------------------
# Reading the image.

def load_image(path):
    """A picture, a path or an open file, to RGB of 8 bits: turned as its EXIF says, transparent parts over white."""
    try:
        image = Image.open(path)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floats without a known white")
        if image.mode.startswith("I"):                  # 16 bits, which convert() would clip instead of scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as e:                              # Pillow's decoders raise a dozen kinds for damaged files
        reason = getattr(e, "strerror", None) or "damaged, or not a picture; save it again as .png"
        raise UserError(f"{path}: {reason}") from None


def crop(width, height, size):
    """Which part of a picture of width x height is scaled to `size` (height, width): (scale, left, top), left and top
    in pixels of the picture. The part covers `size` and is centred."""
    scale = max(size[0] / height, size[1] / width)
    return scale, max((width - size[1] / scale) / 2, 0), max((height - size[0] / scale) / 2, 0)


def fit_image(image, size):
    """An RGB image to (1, 3, H, W) in [-1, 1], (H, W) = size."""
    _, left, top = crop(*image.size, size)
    box = (left, top, image.width - left, image.height - top)
    pixels = np.array(image.resize(size[::-1], Image.Resampling.LANCZOS, box))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Tracks: those that the flags name, and in the video.

def drag_path(text):
    """A flag's type: points of the image, "x,y -> x,y -> …", as (P, 2)."""
    point = r"\s*-?\d{1,6}(\.\d*)?\s*,\s*-?\d{1,6}(\.\d*)?\s*"
    if not re.fullmatch(f"{point}(->{point})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y -> x,y in pixels of the image")
    return np.array(re.findall(r"-?[\d.]+", text.replace("->", " ")), float).reshape(-1, 2)


def point_grid(text):
    """A flag's type: "3x20", 3x3 points 20 pixels apart, as offsets (9, 2) from the middle one."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3x20, 3x3 points 20 pixels apart")
    side, apart = map(int, text.split("x"))
    axis = (np.arange(side) - (side - 1) / 2) * apart
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def starting_inside(paths, size):
    """The paths, each points (P, 2), if every one starts inside the image of `size` (width, height)."""
    for points in paths:
        if not ((points[0] >= 0) & (points[0] < size)).all():
            flag, start = "--pin" if len(points) == 1 else "--drag", ",".join(f"{value:g}" for value in points[0])
            raise UserError(f"{flag} {start}: outside the image, which has {size[0]}x{size[1]} pixels")
    return paths


def follow(paths, frames):
    """Tracks that follow paths, each points (P, 2), in `frames` frames: each stretch takes as long; one point alone is
    pinned."""
    tracks = np.zeros((frames, len(paths), 2), np.float32)
    for n, points in enumerate(paths):
        times = np.linspace(0, len(points) - 1, frames)
        tracks[:, n] = np.stack([np.interp(times, range(len(points)), axis) for axis in points.T], 1)
    return tracks, np.ones(tracks.shape[:2], bool), None, None


def read_tracks(args, size, grid):
    """The tracks that the flags name, on the image of `size` (width, height): what load_tracks returns. grid: points a
    side that a camera sees."""
    if isinstance(args.tracks, Path):
        return load_tracks(args.tracks, size, args.tracks_layout, args.tracks_units, args.tracks_size, args.visibility,
                           args.frames)
    frames = args.frames or 81
    if args.depth:
        return camera_tracks(args.depth, size, frames, grid, args.camera, args.focal)
    paths = starting_inside(args.tracks if isinstance(args.tracks, list) else [], size)
    if args.grid is not None:
        paths = [path + offset for path in paths for offset in args.grid]
    return follow(paths, frames)


def save_tracks(path, arrays, ids, size, config, fps):
    """Write the tracks as they were used, on the image of `size` (width, height): --tracks reads them as they are."""
    tracks, visible, *_ = arrays
    data = {"tracks": tracks, "visibility": visible, "width": size[0], "height": size[1], "fps": fps,
            "format": "motionstream"}
    write_arrays(path, data if config.track_id_mode != "random" else data | {"ids": ids.numpy()})


def fit_tracks(arrays, image_size, frames, config, seed, note=print):
    """Tracks on the image (width, height) to Motion in the model's video, for `frames` frames or more: moved and
    scaled as the image is, hidden where cropped away, not specified after their end. note: takes what is lost so."""
    tracks, visible, ids = arrays
    beyond = max(frames - len(tracks), 0)
    if beyond:
        note(f"note: the tracks end after {len(tracks)} frames, the last {beyond} are not specified")
    scale, left, top = crop(*image_size, config.size)
    tracks = torch.from_numpy((tracks - np.float32((left, top))) * np.float32(scale))[None]
    visible = torch.from_numpy(visible)[None]
    inside = ((tracks >= 0) & (tracks < torch.tensor(config.size[::-1]))).all(-1)
    lost = (visible & ~inside).sum()
    if lost:
        note(f"note: {lost} of {visible.sum()} visible track points lie outside the video and are hidden")
    visible = visible & inside
    if ids is not None and config.track_id_mode != "random":
        note("note: with these weights a track's ID is the pixel where it starts; the file's ids are not used")
    if ids is None or config.track_id_mode != "random":
        ids = track_ids(tracks, visible, config, torch.Generator().manual_seed(seed))
    else:
        ids = torch.from_numpy(ids.astype(np.int64))[None]
    return Motion(F.pad(tracks, (0, 0, 0, 0, 0, beyond)), F.pad(visible, (0, 0, 0, beyond)), ids)


# ----------------------------------------------------------------------------------------------------------------------
# Writing the video, and pictures of it.

def enlargement(size):
    """How many pixels wide each pixel of a video of `size` (height, width) is written."""
    return math.ceil(SHORTEST_SIDE / min(size))


def enlarge(frame, factor):
    """A frame (H, W, 3), each pixel as a square of `factor` by `factor`."""
    return frame.repeat(factor, 0).repeat(factor, 1)


def count_frames(path):
    """How many frames a video file holds, which are not decoded; 0 if it cannot be read."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-map", "0:v:0", "-c", "copy", "-f", "null", "-"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr
    return int((re.findall(rb"frame= *(\d+)", told) or [0])[-1])


@contextlib.contextmanager
def video_file(path, fps):
    """`with video_file(path, fps) as append`: append(frame), uint8 (H, W, 3), goes to a temporary file beside `path`,
    which takes its place when the block ends and all frames can be read back. If the block ends in an exception,
    nothing is left behind."""
    part, count = path.absolute().with_name(f".{path.stem}.{os.getpid()}{path.suffix}"), 0

    def append(frame):
        nonlocal count
        writer.append_data(frame)
        count += 1

    try:
        writer = imageio.get_writer(part, fps=fps, codec="libx264", quality=7, macro_block_size=2,
                                    ffmpeg_log_level="quiet",
                                    output_params=["-preset", "veryfast", "-movflags", "+faststart"])
        with writer:
            yield append
        if count_frames(part) != count:                 # a failed encoding is silent
            raise OSError(0, "not all frames can be read back")
        os.replace(part, path)
    except BrokenPipeError:                             # of what is printed meanwhile: imageio has a kind of its own
        raise
    except OSError as e:                                # if ffmpeg has gone, its reason has gone with it
        raise UserError(f"{path}: cannot be written after {count} frames ({e.strerror or 'ffmpeg has ended'}); is the "
                        "disk full, or the folder not writable?") from None
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def picture_file(path):
    """As video_file, for the last frame alone: an edited picture."""
    last = collections.deque(maxlen=1)
    yield last.append
    write(path, lambda part: Image.fromarray(last[0]).save(part, "png"))


@contextlib.contextmanager
def hold_signals(noted=None):
    """The first Ctrl-C or SIGTERM is only noted, in the list that this yields; the second one ends the program."""
    noted = [] if noted is None else noted

    def handle(signum, _):
        if noted:
            raise KeyboardInterrupt
        noted.append(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def write_arrays(path, arrays):
    """An .npz file, whole or not there."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    write(path, lambda part: part.write_bytes(data.getbuffer()))


def check_output(path, args, kinds):
    """Refuse a path for output, if there is one, that cannot be right, or is that of a file that is read."""
    if path is None:
        return
    inputs = [there for flag, there in vars(args).items()
              if isinstance(there, Path) and flag not in ("out", "save_tracks")]
    for wrong, what in ((path.suffix not in kinds, f"choose a name that ends in {' or '.join(kinds)}"),
                        (not os.access(path.parent, os.W_OK), f"the folder {path.parent} is missing or not writable"),
                        (os.path.isdir(path), "is a folder"),
                        (path.exists() and any(there.exists() and path.samefile(there) for there in inputs),
                         "is a file that is read; choose another name")):
        if wrong:
            raise UserError(f"{path}: {what}")


def draw_tracks(frame, motion, stop, factor):
    """The frame (H, W, 3), number stop - 1 of a video and enlarged by `factor`, with the tracks that are visible in it:
    trails that widen towards it, and a dot; edged in black, to be seen on any colour."""
    tracks, visible = (tensor[0, max(stop - TRAIL, 0):stop].numpy() for tensor in motion[:2])
    visible, picture = visible & visible[-1], Image.fromarray(frame)
    pen, unit, (steps, count) = ImageDraw.Draw(picture), min(picture.size) / 128, visible.shape
    colours = [f"hsv({360 * n / count},90%,100%)" for n in range(count)]
    points = tracks * factor
    segments = np.argwhere(visible[:-1] & visible[1:])
    for edge in (2, 0):
        for t, n in segments:
            width = round(unit * (0.5 + (t + 1) / steps)) + edge
            pen.line([*points[t, n], *points[t + 1, n]], "black" if edge else colours[n], width)
    for n in np.flatnonzero(visible[-1]):
        pen.ellipse([*(points[-1, n] - 2 * unit), *(points[-1, n] + 2 * unit)], colours[n], "black")
    return np.array(picture)


@torch.inference_mode()
def draw_control(vae, motion, config, frames):
    """Latents (1, C, F, h, w) of the tracks as a video, for a slot that expects one: drawn on black as --overlay draws
    them, a choice that was not tried on Fun-Control's weights. F: whole chunks that cover `frames`."""
    video = np.zeros((4 * latent_frames(frames, config) - 3, *config.size, 3), np.uint8)
    for i in range(min(len(video), motion.tracks.shape[1])):
        video[i] = draw_tracks(video[i], motion, i + 1, 1)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].to(next(vae.parameters()).device)
    return vae.encode(pixels / 127.5 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The program.

class Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others."""

    def error(self, message):
        raise UserError(message)


def number(kind, least, most):
    """A flag's type: an int or float from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def track_flags(parser):
    """The flags about tracks."""
    file, either = {"type": Path, "metavar": "FILE"}, parser.add_mutually_exclusive_group().add_argument
    either("--tracks", help=".npz and others, see the top of sample.py; default: none", **file)
    either("--drag", "--pin", dest="tracks", type=drag_path, action="append", metavar="'X,Y -> X,Y'",
           help="instead of --tracks, as often as wanted: where a point of the image goes, or that it stays")
    parser.add_argument("--grid", type=point_grid, metavar="NxP",
                        help="of each --drag and --pin: N by N points, P pixels apart, instead of one")
    either("--depth", help="instead of --tracks, with --camera: .npy (H, W), or a grey picture, bright is near", **file)
    parser.add_argument("--save-tracks", help="write the tracks as used, .npz, for --tracks", **file)
    add = parser.add_argument_group("what a --tracks FILE does not say itself").add_argument
    add("--tracks-layout", choices=("auto", "tn", "nt"), default="auto", help="frames first, or tracks; auto: by names")
    add("--tracks-units", choices=("auto", "px", "01"), default="auto", help="pixels, or shares of the picture")
    add("--tracks-size", type=picture_size, metavar="WxH", help="of the video they belong to; default: the image's")
    add("--visibility", help="an .npy, laid out as the tracks; default: the one beside an .npy of tracks", **file)
    add = parser.add_argument_group("only --depth").add_argument
    add("--camera", type=camera_move, metavar="MOVE",
        help=f"{', '.join(MOVES)}; with an amount if wanted, as right:0.3, in median depths, degrees, or times")
    add("--focal", type=number(float, 1, 10 ** 6), metavar="F", help="in pixels of the image; default: its longer side")


def check_track_flags(args):
    """Refuse flags about tracks that do not go together."""
    live, file = args.interactive, isinstance(args.tracks, Path)
    told = args.tracks_layout != "auto" or args.tracks_units != "auto" or args.tracks_size or args.visibility
    for wrong, cure in [
        (live and (args.overlay or args.reference or args.found or args.lpips or args.tracks or args.depth
                   or args.frames),
         "--interactive knows no tracks beforehand: drop --overlay, --reference and the like, --tracks, --depth and "
         "--frames"),
        (told and not file, "--tracks-layout, --tracks-units, --tracks-size and --visibility belong to --tracks FILE"),
        (args.grid is not None and not isinstance(args.tracks, list), "--grid belongs to --drag and --pin"),
        (bool(args.depth) != bool(args.camera), "--depth and --camera need each other"),
        (args.focal and not args.depth, "--focal belongs to --depth"),
        (not live and (args.host, args.port) != ("127.0.0.1", 8765),
         "--host and --port belong to --interactive"),
        (args.save_tracks and (live or not (args.tracks or args.depth)),
         "--save-tracks needs --tracks FILE, --drag, --pin or --depth"),
    ]:
        if wrong:
            raise UserError(cure)


def parse_flags(argv):
    """The command line. Flags with argparse.SUPPRESS are only there if given; the model's own value holds otherwise."""
    parser = Parser(description="One image and some tracks in, a video out.", allow_abbrev=False)
    file = {"type": Path, "metavar": "FILE"}
    add = parser.add_argument
    add("--image", required=True, help="first frame, any picture file", **file)
    track_flags(parser)
    add("--prompt", metavar="TEXT", help="what the image and the tracks do not say; default: the model's own")
    add("--out", help=".mp4, or .png for the last frame; default: out.mp4, with --interactive: none", **file)
    add("--frames", type=number(int, 1, MOST_FRAMES), metavar="N", help="default: those of the tracks, or 81")
    add("--fps", type=number(float, 0.1, 1000), metavar="F", help="frames per second of the file; default: the model's")
    add("--overlay", action="store_true", help="draw the tracks on the video")
    add("--interactive", action="store_true", help="paint tracks on a page while it streams")
    add("--host", default="127.0.0.1", help="of the page: an address of this machine (default: %(default)s)")
    add("--port", type=number(int, 0, 65535), default=8765, metavar="N", help="of the page (default: %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--weights", help="a Wan DiT, file or folder; default: the tiny model in assets/", **file)
    add("--vae", help="default: the tiny model's, or the one in the folder of --weights", **file)
    add("--device", default="auto", help="cpu, cuda, …; default: cuda if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: float32 on the CPU")
    add("--text-encoder", help="a -Diffusers repository with Wan's; default: --weights, if it is one", **file)
    add("--image-encoder", help="the same of CLIP; default: that of --text-encoder", **file)
    add("--negative-prompt", default=argparse.SUPPRESS, metavar="TEXT", help="guidance avoids it; default: Wan's")
    add("--prompt-embeds", help="instead of encoders: what they return, see the README", **file)
    add = parser.add_argument_group("the papers' measures, printed in the end").add_argument
    add("--reference", help="a video that starts with the image: PSNR and SSIM beside it", **file)
    add("--found", help="tracks that a tracker found in an earlier --out of the same call: end-point error", **file)
    add("--lpips", choices=("alex", "vgg"), help="LPIPS too, by the package lpips")
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=("stream", "teacher"), help="default: what the weights are")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N", help="of all noise (default: %(default)s)")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="noise levels per chunk; default: the model's")
    sampler_flags(parser)
    return parser.parse_args(argv)


def sampler_flags(parser):
    """Those that only one sampler has."""
    given = {"default": argparse.SUPPRESS, "metavar": "N"}
    add = parser.add_argument_group("only --sampler stream; defaults are the model's").add_argument
    add("--chunk", type=number(int, 1, 1000), help="latent frames generated together", **given)
    add("--sink", type=number(int, 0, 10 ** 6), help="chunks from the start that are remembered for ever", **given)
    add("--window", type=number(int, 0, 10 ** 6), help="latest chunks that are remembered besides", **given)
    add = parser.add_argument_group("only --sampler teacher; guidance as in eq. 2, both 0: none").add_argument
    add("--w-text", type=number(float, 0, 100), help="weight of the text; default: the model's", **given)
    add("--w-motion", type=number(float, 0, 100), help="weight of the tracks; default: the model's", **given)


@contextlib.contextmanager
def user_errors():
    """What is wrong with a file, as what the user can put right."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e).splitlines()[0]) from None


@user_errors()
def inspect(path):
    """What a file or folder tells: path, config, own (it says how it is sampled), head (of tracks, not all zeros)."""
    tensors, metadata, file = read_weights(path)
    config, head = find_config(tensors, metadata, file), tensors.get("track_head.conv.weight")
    own = metadata.get("format") == "motionstream"
    return SimpleNamespace(path=path, config=config, own=own, head=head is not None and bool(head.any()))


# How public weights are sampled, whose files do not say it. Teachers: shift and text guidance, by width and by whether
# the image enters as channels, as their publishers advise for 480 lines; (5, 5) for all others.
TEACHERS = {(1536, False): (8.0, 6.0), (1536, True): (3.0, 6.0), (5120, True): (3.0, 5.0)}


def settle(args, weights, frames):
    """The config to sample with: the weights' own or their family's, changed by the flags. Fills in --sampler, and
    args.control, whether tracks go to the trained head or are drawn; refuses flags that these weights have no use for,
    and conditions that they lack."""
    c, own = weights.config, weights.own
    args.sampler = args.sampler or ("stream" if c.causal else "teacher")
    args.control = "sinusoid" if weights.head or c.track_dim != c.out_dim else "rgb"
    args.text_encoder = args.text_encoder or (weights.path if (weights.path / "text_encoder").is_dir() else None)
    streams, said = args.sampler == "stream", args.prompt is not None or args.prompt_embeds
    if not own:
        shift, w_text = TEACHERS.get((c.dim, c.image_dim > 0), (5.0, 5.0))
        c = replace(c, **SELF_FORCING if streams else {"causal": False, "shift": shift, "guidance": (w_text, 0.0)})
    if args.steps:
        c = replace(c, steps=args.steps, sigmas=schedule(args.steps, c.shift))
    w_text = getattr(args, "w_text", c.guidance[0] if said or c.text_dim != UMT5_DIM else 0.0)
    c = replace(c, guidance=(w_text, getattr(args, "w_motion", c.guidance[1])))
    c = replace(c, **{flag: getattr(args, flag) for flag in ("chunk", "sink", "window") if flag in args})
    refuse(args, weights, c, frames)
    args.image_encoder = args.image_encoder or args.text_encoder
    how = "as Self-Forcing" if streams else f"shift {c.shift:g}, text guidance {c.guidance[0]:g}"
    for condition, note in [
        (not own, f"does not say how it is sampled: {args.sampler}, {how}"),
        (not (own or c.image_dim or c.out_dim == 48),
         "never learned to take an image; it enters as a clean first latent, at sigma 0"),
        (args.tracks and args.control == "rgb",
         "takes tracks drawn as a control video, in a style that is ours and that no weights have proven"),
        (c.text_dim == UMT5_DIM and not said, "gets no text at all, which Wan did not see in training; give --prompt"),
    ]:
        if condition:
            print(f"note: {weights.path}: {note}")
    return c


def refuse(args, weights, c, frames):
    """Raise UserError, what to do, for the first of these conditions that is true. c: the config to sample with."""
    streams, drawn, umt5 = args.sampler == "stream", args.control == "rgb", c.text_dim == UMT5_DIM
    prompt, embeds, encoder = args.prompt is not None, args.prompt_embeds, args.text_encoder
    for condition, cure in [
        (weights.own and streams != c.causal,
         f"holds a {'student, use --sampler stream' if c.causal else 'teacher, use --sampler teacher'}"),
        (args.interactive and not (streams and c.track_dim and not drawn), "--interactive needs a trained student"),
        *((flag in args, f"--{flag.replace('_', '-')} belongs to --sampler {'teacher' if streams else 'stream'}")
          for flag in (("w_text", "w_motion", "negative_prompt") if streams else ("chunk", "sink", "window"))),
        (streams and c.window is None and frames > HISTORY and "window" not in args,
         f"trained to remember {HISTORY} frames, all of them; add --sink 1 --window 5 for more"),
        (streams and has_mask(c), "takes the image as a clip with a mask, which cannot stream; use --sampler teacher"),
        (not c.track_dim and (args.tracks or "w_motion" in args),
         "has no input for tracks; take Fun-Control, or drop --tracks, --w-motion"),
        (args.tracks and not drawn and not weights.head,
         f"has no trained track head, and its input for tracks has {c.track_dim} channels, none for a drawn video"),
        (not umt5 and (embeds or encoder), "reads words, give it --prompt and nothing encoded"),
        (umt5 and prompt and not encoder, "reads no words, which --text-encoder encodes; or give --prompt-embeds"),
        (args.image_encoder and not c.clip_dim, "has no image branch, drop --image-encoder"),
        (prompt and embeds, "takes one text; drop --prompt or --prompt-embeds"),
        (umt5 and not (prompt or embeds) and "w_text" in args, "there is no text; give --prompt"),
    ]:
        if condition:
            raise UserError(f"{weights.path}: {cure}")


def read_encoded(args, c, image, device):
    """(text, null_text, clip), each (1, L, channels) float32, zeros after its end, or None. null_text is what guidance
    leads away from; clip is of the image (1, 3, H, W)."""
    if c.text_dim != UMT5_DIM:
        return embed_words(c.prompt if args.prompt is None else args.prompt, c), None, None
    tensors, source, rows = {}, args.prompt_embeds or args.text_encoder, []
    sources = {"prompt": source, "negative": source, "clip": source}
    if args.prompt is not None:
        texts = {"prompt": args.prompt, "negative": getattr(args, "negative_prompt", NEGATIVE_PROMPT)}
        tensors = kept_rows(text_encoder, args.text_encoder, device, texts)
    elif args.prompt_embeds:
        tensors = read_tensors(source)[0]
        tensors = tensors if len(tensors) > 1 else {"prompt": tensor for tensor in tensors.values()}
        if "prompt" not in tensors:
            raise ValueError(f"{source}: holds {', '.join(tensors)[:80] or 'nothing'}, and no prompt")
    if c.clip_dim and "clip" not in tensors:
        if not args.image_encoder:
            raise UserError(f"{args.weights}: reads the image by CLIP too; give --image-encoder")
        tensors = tensors | kept_rows(image_encoder, args.image_encoder, device, {"clip": image})
        sources["clip"] = args.image_encoder
    for name, least, most, channels in (("prompt", 1, c.text_len, UMT5_DIM), ("negative", 1, c.text_len, UMT5_DIM),
                                        ("clip", CLIP_ROWS, CLIP_ROWS, c.clip_dim)):
        t = tensors.get(name) if channels else None
        if t is not None and (t.shape[1:] != (channels,) or not least <= len(t) <= most or not t.is_floating_point()
                              or not t.isfinite().all()):
            raise ValueError(f"{sources[name]}: {name} is {t.dtype} {(*t.shape,)}, expected finite floats "
                             f"(L, {channels}), {least} <= L <= {most}")
        rows.append(None if t is None else F.pad(t.float(), (0, 0, 0, most - len(t)))[None])
    if rows[1] is None and not c.causal and c.guidance[0]:
        print("note: guidance leads away from rows of zeros; --prompt-embeds holds no tensor named negative")
    return rows


def open_vae(args, weights):
    """The VAE that the flags name, else the tiny model's or, for Wan's weights, the one in their folder."""
    c, folder = weights.config, weights.path if weights.path.is_dir() else weights.path.parent
    own, wan = [ASSETS / "tiny_vae.safetensors"], [folder / name for name in VAE_FILES[:3]]     # tiny fits Wan's shapes
    path = args.vae or next(filter(Path.is_file, wan if c.text_dim == UMT5_DIM else own), None)
    if path is None:
        raise UserError(f"{weights.path}: give --vae PATH; there is no {' or '.join(VAE_FILES[:3])} in its folder")
    vae = load_vae(path)
    if (vae.config.latent_channels, vae.stride) != (c.out_dim, c.stride):
        raise UserError(f"{path}: latents have {vae.config.latent_channels} channels and stride {vae.stride}, "
                        f"those of {weights.path} have {c.out_dim} and {c.stride}; is this its VAE?")
    return vae


@user_errors()
def load_models(args, weights, config, image):
    """The DiT, the VAE and what the DiT reads besides, see read_encoded."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here") from None
    dtype = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    vae, encoded = open_vae(args, weights).to(device), read_encoded(args, config, image, device)
    model = MotionStream.from_pretrained(weights.path, dtype=getattr(torch, dtype), device=device, **vars(config))
    c = model.config
    memory = f"c{c.chunk}s{c.sink}w{'full' if c.window is None else c.window}" if c.causal else "whole clip"
    print(f"{weights.path.name}: {c.size[1]}x{c.size[0]} pixels, {args.sampler}, {memory}, "
          f"{len(c.sigmas) if c.causal else c.steps} steps, seed {args.seed}, {device}, {dtype}")
    return model, vae, [t.to(device) if t is not None else None for t in encoded]


def generate(args, frames, image, motion, model, vae, encoded):
    """`frames` frames of the video, None: all, uint8 (H, W, 3), one by one, as the flags say. motion: Motion, or an
    iterator of (Motion, prompt) for each chunk; an encoded text is that of all."""
    c, device, (text, null_text, clip) = model.config, next(model.parameters()).device, encoded
    if not isinstance(motion, Motion):
        motion = ((part, text if c.text_dim == UMT5_DIM else embed_words(prompt, c).to(device))
                  for part, prompt in motion)
    elif args.control == "rgb" and args.tracks:
        motion = motion._replace(control=draw_control(vae, motion, c, frames))
    grey = 4 * latent_frames(frames, c) - 4 if has_mask(c) else 0
    first = vae.encode(F.pad(image[:, :, None], (0, 0, 0, 0, 0, grey)).to(device))
    copy = functools.partial(copy_along_tracks, vae, image.to(device)) if c.copy_dim else None
    if args.sampler == "stream":
        latents = stream(model, first, motion, text, args.seed, clip, copy)
    else:
        latents = sample_teacher(model, first, motion, frames, text, args.seed, null_text, clip, copy)
    yield from itertools.islice(decode_frames(vae, latents), frames)


def write_video(append, frames, total, motion, factor, noted):
    """Append `total` frames, enlarged by `factor`, to a video while they come; with the tracks of `motion`, unless it
    is None, drawn on them. Returns how many there are; a signal that ended it early is in the list `noted`."""
    started = time.perf_counter()
    frames = itertools.chain([next(frames)], frames)    # the first one now: from there on Ctrl-C keeps what there is
    first_after = time.perf_counter() - started
    with hold_signals(noted):
        for count, frame in enumerate(tqdm(frames, total=total, unit=" frames", disable=None), 1):
            frame = enlarge(frame, factor)
            append(frame if motion is None else draw_tracks(frame, motion, count, factor))
            if noted:
                break
    seconds = time.perf_counter() - started
    print(f"{count} of {total or count} frames in {seconds:.2f} s, {count / seconds:.1f} frames/s, the first after "
          f"{first_after:.2f} s")
    return count


def run(argv):
    """The program. Returns the exit code."""
    args = parse_flags(argv)
    image = load_image(args.image)
    check_track_flags(args)
    args.out = args.out or (None if args.interactive else Path("out.mp4"))
    check_output(args.out, args, (".mp4",) if args.interactive else (".mp4", ".png"))
    check_output(args.save_tracks, args, (".npz",))
    tiny = ASSETS / ("tiny_teacher.safetensors" if args.sampler == "teacher" else "tiny.safetensors")
    weights = inspect(args.weights or tiny)
    grid = 50 if weights.config.text_dim == UMT5_DIM else 8             # as in the papers' training, and in ours
    *arrays, tracks_fps = read_tracks(args, image.size, grid)
    args.tracks = args.tracks or args.depth             # from here on: whether there are tracks
    frames = args.frames or (None if args.interactive else len(arrays[0]))
    config = settle(args, weights, frames or MOST_FRAMES)
    pixels = fit_image(image, config.size)
    if args.interactive:
        from extras.page import serve
        return serve(args, image, *load_models(args, weights, config, pixels))
    if tracks_fps and tracks_fps != (args.fps or config.fps):
        print(f"note: the tracks are at {tracks_fps:g} frames/s, the model at {config.fps}; they are not resampled")
    motion = fit_tracks(arrays, image.size, frames, config, args.seed)
    if not motion.visible.any():
        print("note: no track is seen in the video, nothing is specified")
    models, noted = load_models(args, weights, config, pixels), []
    pictures = generate(args, frames, pixels, motion, *models)
    factor = enlargement(config.size)
    if args.reference or args.found or args.lpips:
        from extras.evaluate import compared            # where all is measured
        found = args.found and load_tracks(args.found, [factor * side for side in config.size[::-1]])[:2]
        with user_errors():
            pictures = compared(pictures, args.reference, config, motion, found, factor, args.lpips)
    opened = video_file(args.out, args.fps or config.fps) if args.out.suffix == ".mp4" else picture_file(args.out)
    with opened as append:
        write_video(append, pictures, frames, motion if args.overlay else None, factor, noted)
    if args.save_tracks:
        save_tracks(args.save_tracks, arrays, motion.ids[0], image.size, config, tracks_fps or args.fps or config.fps)
    print(args.out)
    return 128 + noted[0] if noted else 0


def main(argv=None):
    """`run`, with its errors as one line and an exit code: 2 what the user can put right, 130 interrupted."""
    warnings.filterwarnings("ignore", module="PIL")     # about damaged pictures; what is left unreadable gets our line
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:                             # who read what is printed has gone: | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as e:                   # a full disk, say, while a page is recorded
        print(f"error: {e}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
