"""One image and some tracks in, a video out, written while it is generated.

    python sample.py --image x.png --tracks t.npz

t.npz holds `tracks` (T, N, 2): positions of N points in T frames, x to the right and y down, in pixels
of the image as displayed (after its EXIF rotation); and optionally

    visibility (T, N)   hidden and "not specified" are the same; without it, NaN is hidden
    width, height       of the picture that the tracks refer to, if it is not the image itself
    ids (N,)            ID of each track, see track_ids; track_id_mode: the kind of IDs
    start (N, 2)        position of each point in frame 0, if it is not visible there
    fps                 only compared with the model's
    format              "motionstream": written by this project, so its layout is trusted

A recording of the page also stores its settings (extras/recording.py) and reproduces the same frames.
extras/tracks.py reads files of other programs. --drag and --pin replace --tracks.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:                # the user's setting wins
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # threads spin only briefly: others need the cores

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from motionstream import (FRAMES, Config, MotionStream, UserError, check_memory, checkpoints, chunk_sizes,
                          euler, image_inputs, motion_inputs, naming, open_pretrained, reason_of, rollout, schedule,
                          start_points, track_ids, write_file)
from vae import VAE_FILES, load_vae, open_weights

ASSETS = Path(__file__).resolve().parent / "assets"
MOST_FRAMES = 1_000_000
LARGEST = 2 ** 30           # bytes of a tracks file, unpacked
SHORTEST_SIDE = 256         # pixels of a written video; smaller ones are enlarged
CLIP = 81                   # frames of Wan's clips: the default length, and the context that
                            # weights without a window saw in training


# --------------------------------------------------------------------------------------------------
# Sampling. Copy this part to stream video in your own program.

@dataclass(frozen=True)
class Motion:
    """The tracks of a clip or of one chunk, in pixels of the generated video."""
    tracks: torch.Tensor                    # (B, T, N, 2) float32, x and y
    visible: torch.Tensor                   # (B, T, N) bool
    ids: torch.Tensor                       # (B, N) int64, see track_ids
    start: torch.Tensor | None = None       # (B, N, 2): positions in frame 0, for copies
    control: torch.Tensor | None = None     # (B, track_dim, F, h, w): replaces the track head's
    text: torch.Tensor | None = None        # (B, L, text_dim) of this chunk; None: Encoded's


@dataclass(frozen=True)
class Encoded:
    """The model's other inputs, the same for the whole video."""
    text: torch.Tensor | None = None        # (B, L, text_dim), None: the null text
    null_text: torch.Tensor | None = None   # replaces text in guidance, None: zeros
    clip: torch.Tensor | None = None        # (B, 257, clip_dim): CLIP's features of the image


def motion_by_chunk(motion, config):
    """Split a whole Motion by chunk: for n latents 4 n - 3 frames in the first chunk, 4 n in the others.
    Frames of the last chunk beyond the motion's end are "not specified"."""
    frames = motion.tracks.shape[1]
    stop = 1 - FRAMES
    for size in chunk_sizes(config, latent_frames(frames, config)):
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


def live_motion(points, starts, config):
    """One chunk of a live stream: points (T, N, 2) in pixels of the video, NaN where hidden; starts
    (N, 2): their positions in frame 0. T is 4 chunk - 3 for the first chunk, then 4 chunk."""
    points = torch.as_tensor(points, dtype=torch.float32)[None]             # (1, T, N, 2)
    starts = torch.as_tensor(starts, dtype=torch.float32)[None]             # (1, N, 2)
    if config.track_id_mode == "random":           # but the same IDs in every chunk
        numbers = [zlib.crc32(start.numpy().tobytes()) for start in starts[0]]
        ids = torch.tensor([numbers], dtype=torch.int64)
    else:
        ids = track_ids(starts[:, None], config)
    return Motion(points, ~points.isnan().any(-1), ids, starts)


def motion_conditions(model, vae, image, motion):
    """The model's keyword arguments for the Motion of a clip or a chunk, see motion_inputs."""
    if motion.control is not None:
        return {"tracks": motion.control}
    if not model.config.track_dim:
        return {}
    device = image.device
    start = motion.start
    if start is not None:
        start = start.to(device)
    return motion_inputs(model, motion.tracks.to(device), motion.visible.to(device),
                         motion.ids.to(device), start=start, image=image, vae=vae)


def conditions(model, vae, image, motion, encoded, channels=None):
    """The model's keyword arguments by chunk, made lazily. motion: an iterator of a Motion per chunk.
    channels: the image channels of the first chunk, see image_inputs."""
    for part in motion:
        text = encoded.text if part.text is None else part.text.to(image.device)
        inputs = motion_conditions(model, vae, image, part)
        yield {"text": text, "image": channels, "clip": encoded.clip} | inputs
        if not model.config.copies:
            channels = None                 # they are in the cache now


def draw_noise(first_latent, frames, rng):
    """Noise (B, C, frames, h, w) for the image's latent; drawn on the CPU, the same on every device."""
    B, C, _, h, w = first_latent.shape
    return torch.randn((B, C, frames, h, w), generator=rng).to(first_latent)


def decode(vae, latents):
    """Decode latents chunk by chunk: an iterable of (B, C, f, h, w) to (B, 3, T, H, W) in [-1, 1]."""
    state = None
    for chunk in latents:
        video, state = vae.decode(chunk, state)
        yield video


@torch.inference_mode()
def stream(model, vae, image, motion, encoded=Encoded(), seed=0, **memory):
    """Sample the student: a video as long as `motion`, at constant memory. Yields each chunk as soon as
    it is decoded, (B, 3, T, H, W) in [-1, 1]: 4 chunk - 3 frames, then 4 chunk (with config.first_chunk,
    4 first_chunk - 3 at first).

    image (B, 3, H, W) in [-1, 1], of the model's size, is frame 0, see fit_image. motion: a Motion, or an
    iterator of one per chunk (see live_motion), advanced just before that chunk is denoised, so that
    tracks and text can change while it streams. memory: chunk, sink and window, to override the
    config's."""
    yield from decode(vae, stream_latents(model, vae, image, motion, encoded, seed, **memory))


def stream_latents(model, vae, image, motion, encoded=Encoded(), seed=0, **memory):
    """`stream` without the decoder: an iterator of latents (B, C, chunk, h, w)."""
    config = replace(model.config, **memory)
    image = image.to(next(model.parameters()).device)
    encoded_image = vae.encode(image[:, :, None])                           # (B, C, 1, h, w)
    channels, first_latent = image_inputs(config, encoded_image, next(chunk_sizes(config)))
    rng = torch.Generator().manual_seed(seed)
    noise = (draw_noise(encoded_image, size, rng) for size in chunk_sizes(config))
    if isinstance(motion, Motion):
        motion = motion_by_chunk(motion, config)
    given = conditions(model, vae, image, motion, encoded, channels)
    caches = model.new_caches(**memory)
    return rollout(model, noise, given, first_latent, rng=rng, caches=caches)


@torch.inference_mode()
def sample_teacher(model, vae, image, motion, encoded=Encoded(), seed=0):
    """Sample the teacher: all chunks that cover a Motion at once, then yielded as `stream` does. Steps
    and guidance are the config's."""
    config = model.config
    count = latent_frames(motion.tracks.shape[1], config)
    image = image.to(next(model.parameters()).device)
    grey = 0                                # frames after the image
    if config.has_mask:
        grey = FRAMES * (count - 1)
    encoded_image = vae.encode(F.pad(image[:, :, None], (0, 0, 0, 0, 0, grey)))
    channels, first_latent = image_inputs(config, encoded_image, count)
    given = {"text": encoded.text, "image": channels, "clip": encoded.clip}
    motions = motion_by_chunk(motion, config)
    parts = [motion_conditions(model, vae, image, part) for part in motions]
    for name in parts[0]:
        given[name] = torch.cat([part[name] for part in parts], 2)
    noise = draw_noise(encoded_image, count, torch.Generator().manual_seed(seed))
    for x0, _ in euler(model, noise, given, first_latent, null_text=encoded.null_text):
        pass                                # the trajectory ends in the clean latents
    yield from decode(vae, x0.split(list(chunk_sizes(config, count)), 2))


def latent_frames(frames, config):
    """Latent frames in the fewest whole chunks that cover `frames` video frames."""
    latents = math.ceil((frames + FRAMES - 1) / FRAMES)
    first = config.first_chunk or config.chunk
    after = math.ceil((latents - first) / config.chunk)     # chunks after the first
    return first + max(after, 0) * config.chunk


def to_bytes(video):
    """Video (1, 3, T, H, W) in [-1, 1] to a uint8 tensor (T, H, W, 3)."""
    pixels = (video[0].float() + 1) * 127.5                 # (3, T, H, W)
    return pixels.round().byte().permute(1, 2, 3, 0).contiguous()


def to_frames(video):
    """Video (1, 3, T, H, W) in [-1, 1] to a uint8 array (T, H, W, 3)."""
    return to_bytes(video).cpu().numpy()


def decode_beside(vae, latents):
    """On a GPU: decode latents, an iterable of (1, C, f, h, w), on a second CUDA stream. Yields per chunk
    the frames, a uint8 tensor (T, H, W, 3) in CPU memory, and the event that marks them as complete."""
    beside = None
    state = None
    for chunk in latents:
        if beside is None:
            beside = torch.cuda.Stream(chunk.device)
        beside.wait_stream(torch.cuda.current_stream(chunk.device))
        chunk.record_stream(beside)             # its memory is not reused before it is decoded
        with torch.cuda.stream(beside):
            video, state = vae.decode(chunk, state)
            frames = to_bytes(video).to("cpu", non_blocking=True)
            copied = beside.record_event()
        yield frames, copied


def frames_ahead(vae, latents):
    """On a GPU: latents to frames as in to_frames. Each chunk is decoded and yielded while the next one
    is denoised, so the next tracks are requested before anyone has seen this chunk."""
    chunks = itertools.chain(decode_beside(vae, latents), [None])
    for (frames, copied), _ in itertools.pairwise(chunks):      # start the next one before waiting
        copied.synchronize()
        yield frames.numpy()


def decoded_frames(vae, latents, ahead):
    """Latents of a stream to frames as in to_frames, chunk by chunk. ahead: use frames_ahead on a GPU,
    for streams whose tracks do not depend on what the user sees."""
    if ahead and next(vae.parameters()).device.type == "cuda":
        return frames_ahead(vae, latents)
    return map(to_frames, decode(vae, latents))


# The vocabulary of the shipped tiny model: "fading light, spinning shapes" (extras/world.py).
WORDS = ("steady", "fading", "warming", "light", "spinning", "pulsing", "shapes")


def words_in(text):
    """The words of a prompt, none for None."""
    return re.findall(r"\w+", (text or "").lower())


def unknown_words(text):
    """The words of a prompt that the tiny model was not trained on: to it they are noise."""
    return [word for word in words_in(text) if word not in WORDS]


def embed_words(text, config):
    """Embed a prompt for the tiny model, (1, L, text_dim): each word is a random vector seeded by its
    letters, the same in every process. At most text_len words; the model does not see their order. None:
    the null text."""
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
    """Load a picture, a path or an open file, as 8-bit RGB: rotated by its EXIF tag, transparency over
    white."""
    try:
        image = Image.open(path)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floats, of which no value is known to be white")
        if image.mode.startswith("I"):      # 16 bits: convert() would clip, not scale
            levels = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(levels.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except Exception as e:                  # Pillow's decoders raise many kinds for damaged files
        name = path if isinstance(path, str | Path) else "the picture"
        raise UserError(f"{name}: {picture_fault(e)}") from None


def picture_fault(error):
    """Explain why a picture could not be read, and the cure."""
    reason = reason_of(error)
    if isinstance(error, OSError) and error.strerror:
        return reason                                                       # no such file, …
    if isinstance(error, Image.DecompressionBombError):
        return f"too large a picture: {reason.split(', could')[0]}; save it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a kind that Pillow reads; save it again as .png"
    return f"cannot be read as a picture ({reason}); save it again as .png"


def crop(width, height, size):
    """The centred part of a width x height picture to be scaled to `size` (height, width):
    (scale, left, top), left and top in pixels of the picture."""
    scale = max(size[0] / height, size[1] / width)
    left = max((width - size[1] / scale) / 2, 0)
    top = max((height - size[0] / scale) / 2, 0)
    return scale, left, top


def crop_note(image_size, size):
    """Notes for the user, a list, if a video of `size` crops an image (width, height)."""
    width, height = image_size
    _, left, top = crop(width, height, size)
    if max(left, top) < 0.5:
        return []
    return [f"the image of {width}x{height} pixels is cropped, the video shows {seen_part(image_size, size)}"]


def seen_part(image_size, size):
    """The part of an image (width, height) that a video of `size` shows, in words."""
    width, height = image_size
    _, left, top = crop(width, height, size)
    return f"x from {left:.0f} to {width - left:.0f} and y from {top:.0f} to {height - top:.0f}"


def fit_image(image, size):
    """An RGB image to (1, 3, H, W) in [-1, 1], (H, W) = size."""
    _, left, top = crop(image.width, image.height, size)
    box = (left, top, image.width - left, image.height - top)
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
    """Read the Tracks in a file, for an image of `size` (width, height). frames: the number wanted, which
    can reveal swapped axes in another program's file. Raises UserError, naming the file."""
    with naming(path, "damaged, or not what this project wrote; extras/tracks.py reads other files"):
        arrays = own_arrays(path)
        if arrays is not None:
            return own_tracks(arrays, size)
    extras = tracks_module(f"{path} is not a file that this project wrote")
    return Tracks(**extras.load_tracks(path, size, frames=frames))


def tracks_module(why):
    """extras/tracks.py, for less common tracks. UserError if this copy lacks it."""
    try:
        from extras import tracks
    except ImportError:
        raise UserError(f"{why}; extras/tracks.py, which such tracks need, is missing") from None
    return tracks


def given_tracks(flags, size):
    """The Tracks given by the flags, on the image of `size` (width, height)."""
    frames = flags.frames or CLIP
    if flags.grid and not flags.paths:
        raise UserError("--grid belongs to --drag and --pin")
    if flags.tracks:
        return read_tracks(flags.tracks, size, flags.frames)
    if flags.paths:
        extras = tracks_module("--drag and --pin")
        return Tracks(*extras.drag_tracks(flags.paths, flags.grid, size, frames))
    return Tracks(np.zeros((frames, 0, 2), np.float32), np.zeros((frames, 0), bool))


def refuse_cropped(paths, image_size, size):
    """UserError for the first --drag or --pin that starts outside a video of `size`, in the part of the
    image (width, height) that is cropped away."""
    extras = tracks_module("--drag and --pin")
    for text in paths:
        x, y = to_video(extras.read_path(text)[0], image_size, size).tolist()
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            flag = "--drag" if "->" in text else "--pin"
            raise UserError(f"{flag} {text}: starts in what is cropped of the image; the video shows "
                            f"{seen_part(image_size, size)}")


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
    """Arrays of a file written by this project to Tracks. Any fault raises some exception."""
    numbers = arrays["tracks"].dtype.kind in "iuf"
    tracks = arrays["tracks"].astype(np.float32)
    visible = arrays.get("visibility", ~np.isnan(tracks).any(-1)) > 0
    ids = arrays.get("ids", np.zeros(tracks.shape[1], int))
    there = np.array([arrays.get("width", size[0]), arrays.get("height", size[1])], float)
    T, N, _ = tracks.shape
    shapes = tracks.shape == (T, N, 2) and visible.shape == (T, N) and ids.shape == (N,)
    values = np.isfinite(tracks[visible]).all() and (ids >> 32 == 0).all() and (there > 0).all()
    if not (T and numbers and shapes and values):
        raise ValueError("no tracks")
    scale = (np.array(size) / there).astype(np.float32)
    tracks = np.nan_to_num(tracks).clip(-1e6, 1e6) * scale
    start = arrays.get("start")
    if start is not None:
        start = start.astype(np.float32).reshape(N, 2).clip(-1e6, 1e6) * scale
    recorded = None
    if "prompts" in arrays:
        from extras.recording import settings_in
        recorded = settings_in(arrays)
    fps = float(arrays["fps"]) if "fps" in arrays else None
    mode = str(arrays.get("track_id_mode", "random"))
    return Tracks(tracks, visible, ids if "ids" in arrays else None, mode, fps, recorded, start)


def to_video(points, image_size, size):
    """Points (…, 2) float32 on the image (width, height) to positions in the video of `size`
    (height, width): a tensor, not clipped at the borders."""
    scale, left, top = crop(*image_size, size)
    return torch.from_numpy((points - np.float32((left, top))) * np.float32(scale))


def fit_tracks(tracks, image_size, frames, config, seed):
    """Tracks on the image (width, height) to (Motion for the whole chunks that cover `frames`, in pixels
    of the model's video; notes on losses). Tracks are scaled and cropped with the image, hidden where
    cropped away, and "not specified" after their end."""
    notes = []
    given = len(tracks.tracks)
    if frames > given:
        notes.append(f"the tracks end after {given} frames, the last {frames - given} are not specified")
    points = to_video(tracks.tracks, image_size, config.size)[None]              # (1, T, N, 2)
    visible = torch.from_numpy(tracks.visible)[None]                        # (1, T, N)
    inside = ((points >= 0) & (points < torch.tensor(config.size[::-1]))).all(-1)
    lost = (visible & ~inside).sum()
    if lost:
        notes.append(f"{lost} of {visible.sum()} visible track points lie outside the video and are hidden")
    visible = visible & inside
    if tracks.start is None:
        start = start_points(points, visible)
    else:
        start = to_video(tracks.start, image_size, config.size)[None]            # (1, N, 2)
    if tracks.ids is not None and tracks.id_mode == config.track_id_mode:
        ids = torch.from_numpy(tracks.ids.astype(np.int64))[None]
    else:
        ids = track_ids(points, config, torch.Generator().manual_seed(seed))
        if tracks.ids is not None:
            notes.append(f"the IDs of these weights are of the kind {config.track_id_mode!r}, not "
                         f"{tracks.id_mode!r}; the file's ids are not used")
    latents = latent_frames(frames, config)
    whole = FRAMES * latents - (FRAMES - 1)
    missing = max(whole - given, 0)
    points = F.pad(points[:, :whole], (0, 0, 0, 0, 0, missing))
    visible = F.pad(visible[:, :whole], (0, 0, 0, missing))
    if not visible.any():
        notes.append("no track is seen in the video, nothing is specified")
    return Motion(points, visible, ids, start), notes


# --------------------------------------------------------------------------------------------------
# Writing the video.

def enlarge(frame):
    """Enlarge a frame (H, W, 3), nearest neighbour, until no side is below SHORTEST_SIDE."""
    factor = math.ceil(SHORTEST_SIDE / min(frame.shape[:2]))
    return frame.repeat(factor, 0).repeat(factor, 1)


def find_ffmpeg():
    """Path of an ffmpeg that works here. UserError with its own message if there is none."""
    exe = os.environ.get("IMAGEIO_FFMPEG_EXE")
    cure = "name another in IMAGEIO_FFMPEG_EXE, or unset it"
    if not exe:
        cure = "pip install -U imageio[ffmpeg]"
        try:
            import imageio_ffmpeg
            exe = imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as e:
            raise UserError(f"{e}; {cure}") from None
    try:
        try_ffmpeg(exe)
    except OSError as e:
        raise UserError(f"{exe}: cannot be used ({e.strerror or e}); {cure}") from None
    return exe


@functools.cache
def try_ffmpeg(exe):
    """Encode one frame to the null muxer; raise OSError with ffmpeg's message if that fails."""
    encoder = FfmpegWriter(exe, 25, ["-fps_mode", "passthrough", "-f", "null", "-"])
    try:
        encoder.append(np.zeros((16, 16, 3), np.uint8))
        encoder.finish()
    finally:
        encoder.stop()


def ffmpeg_words(log, code):
    """The error of an ffmpeg that exited with `code`, in one line: the first one in its log (with level+
    in -loglevel)."""
    lines = log.splitlines()
    errors = [line for line in lines if "[error] " in line or "[fatal] " in line]
    said = (errors or lines[-1:] or [f"it has ended with code {code}"])[0]
    return re.sub(r"^(\[[^]]*\] )+", "", said)[:300]


def count_frames(path):
    """Number of frames in a video file, without decoding them; 0 if it cannot be read."""
    command = [find_ffmpeg(), "-i", f"file:{path}", "-map", "0:v:0", "-c", "copy", "-f", "null", "-"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr
    counts = re.findall(rb"frame= *(\d+)", told) or [0]
    return int(counts[-1])


class FfmpegWriter:
    """An ffmpeg process that encodes frames, uint8 (H, W, 3) of one size. output: its last arguments.
    (imageio's writer ignores ffmpeg's exit code and messages, so a full disk would go unnoticed.)"""

    def __init__(self, exe, fps, output):
        self.count = 0
        self.log = tempfile.TemporaryFile()
        # Convert to BT.709 and tag it: for untagged video, players guess the matrix from its size.
        converted = ("scale=2*ceil(iw/2):2*ceil(ih/2):out_color_matrix=bt709:out_range=tv,setsar=1,format=yuv420p,"
                     "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709")
        command = [exe, "-hide_banner", "-nostats", "-loglevel", "level+error", "-y"]
        command += ["-f", "image2pipe", "-c:v", "ppm", "-framerate", f"{fps:g}", "-i", "-"]
        command += ["-vf", converted, "-color_range", "tv", "-colorspace", "bt709"]
        command += ["-color_primaries", "bt709", "-color_trc", "bt709"]
        command += ["-c:v", "libx264", "-preset", "veryfast", "-crf", "15"] + output
        group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)          # Windows: no Ctrl-C for ffmpeg
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self.log, process_group=0,
                                        creationflags=group)

    def append(self, frame):
        height, width, _ = frame.shape
        try:
            self.process.stdin.write(b"P6 %d %d 255\n" % (width, height))
            self.process.stdin.write(np.ascontiguousarray(frame, np.uint8))
        except OSError:
            self.fail()
        self.count += 1

    def finish(self):
        """Wait until the file is complete. OSError with ffmpeg's message if that fails."""
        with contextlib.suppress(OSError):      # it may have exited
            self.process.stdin.close()
        if self.process.wait():
            self.fail()

    def fail(self):
        code = self.process.wait()
        self.log.seek(0)
        raise EncodingError(ffmpeg_words(self.log.read().decode(errors="replace"), code))

    def stop(self):
        """Leave no process running, whatever has happened."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.log.close()


class EncodingError(OSError):
    """ffmpeg's message about a video that it cannot write."""


@contextlib.contextmanager
def video_file(path, fps):
    """`with video_file(path, fps) as append`: append(frame), uint8 (H, W, 3), writes to a temporary file
    beside `path`, which replaces `path` when the block ends and all frames can be read back. If the block
    raises, nothing is left behind."""
    path = Path(path)
    part = path.absolute().with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    encoder = FfmpegWriter(find_ffmpeg(), fps, ["-movflags", "+faststart", f"file:{part}"])
    try:
        yield encoder.append
        if not encoder.count:
            raise EncodingError("there are no frames")
        encoder.finish()
        if count_frames(part) != encoder.count:
            raise EncodingError("not all frames can be read back")
        os.replace(part, path)
    except BrokenPipeError:                 # from printing meanwhile
        raise
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f"{path}: cannot be written after {encoder.count} frames ({reason})") from None
    finally:
        encoder.stop()
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


def check_output(path, endings, inputs):
    """UserError if an output path cannot be written or is one of the inputs."""
    there = [file for file in inputs if file and file.exists()]
    faults = [
        (path.suffix.lower() not in endings, f"choose a name that ends in {' or '.join(endings)}"),
        (not os.access(path.parent, os.W_OK), f"the folder {path.parent} is missing or not writable"),
        (path.is_dir(), "is a folder"),
        (path.exists() and any(map(path.samefile, there)), "is a file that is read; choose another name"),
    ]
    for wrong, cure in faults:
        if wrong:
            raise UserError(f"{path}: {cure}")
    if path.suffix.lower() == ".mp4":
        find_ffmpeg()


def write_frames(append, frames, total):
    """Append frames, `total` of them, to a video as they arrive. Returns the exit code: 0, or 128 + the
    signal that ended it early. From the first frame on, Ctrl-C keeps what is done."""
    started = time.perf_counter()
    frames = itertools.chain([next(frames)], frames)
    first_after = time.perf_counter() - started
    with hold_signals() as noted:
        for count, frame in enumerate(tqdm(frames, total=total, unit=" frames", disable=None), 1):
            append(frame)
            if noted:
                break
    seconds = time.perf_counter() - started
    print(f"{count} of {total} frames in {seconds:.2f} s, {count / seconds:.1f} frames/s, the first "
          f"after {first_after:.2f} s")
    return sum(128 + signum for signum in noted)


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


def memory(text):
    """A flag's type: "c3s1w1" to the fields of Config for the student's KV cache: 3 latent frames per
    chunk, a sink of 1 chunk, a window of 1; wfull: all chunks."""
    found = re.fullmatch(r"c([1-9]\d{0,2})s(\d{1,6})w(\d{1,6}|full)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like c3s1w1 or c3s1wfull, chunk 1 to 999")
    chunk, sink, window = found.groups()
    fields = {"chunk": int(chunk), "sink": int(sink), "window": None}
    if window != "full":
        fields["window"] = int(window)
    return fields


def guidance(text):
    """A flag's type: "3,1.5" to (w_text, w_motion), see joint_guidance."""
    weights = tuple(map(float, text.split(",")))
    if len(weights) != 2 or not all(0 <= weight <= 100 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3,1.5: weights of text and of tracks, 0 to 100")
    return weights


class Points(argparse.Action):
    """Collect --drag and --pin in one list. A drag has an arrow, a pin has none."""

    def __call__(self, parser, namespace, text, flag=None):
        if flag == "--drag" and "->" not in text:
            parser.error(f"--drag {text}: there is no arrow; write \"X,Y -> X,Y\", or --pin X,Y for a "
                         "point that stays")
        if flag == "--pin" and "->" in text:
            parser.error(f"--pin {text}: a pinned point stays; write --drag for one that moves")
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, before + [text])


SETTINGS = {"shift": number(float, 0.01, 100), "sink_decay": number(float, 0, 1)}


def setting(text):
    """A flag's type: "shift=3" to ("shift", 3.0), a field of Config."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SETTINGS)}")
    return name, SETTINGS[name](value)


@dataclass(frozen=True)
class Flags:
    """The command line as typed, None for flags not given."""
    image: Path
    tracks: Path | None
    paths: list | None          # texts of --drag and --pin
    grid: str | None
    prompt: str | None
    out: Path
    frames: int | None
    fps: float | None
    overlay: bool
    weights: Path | None
    vae: Path | None
    device: str
    dtype: str
    compile: bool
    text_encoder: Path | None
    image_encoder: Path | None
    negative_prompt: str | None
    prompt_embeds: Path | None
    sampler: str | None
    seed: int | None
    steps: int | None
    memory: dict | None         # fields of Config, as in settings
    guidance: tuple | None
    settings: list | None       # of --set, each (field, value)


def add_flags(parser):
    """Add the flags, shared with extras/page.py."""
    file = {"type": Path, "metavar": "FILE"}
    add = parser.add_argument
    add("--image", required=True, help="first frame, any picture file", **file)
    either = parser.add_mutually_exclusive_group().add_argument
    either("--tracks", help=".npz and others, see docs/tracks.md; default: none", **file)
    either("--drag", "--pin", dest="paths", action=Points, metavar="POINT",
           help='instead of --tracks: move a point of the image, "X,Y -> X,Y", or pin what should stay, X,Y; '
           "repeatable")
    add("--grid", metavar="NxP", help="make each of those points N by N, P pixels apart")
    add("--prompt", metavar="TEXT", help="for what image and tracks do not show; default: the model's. The "
        "tiny model knows steady, fading or warming light, and steady, spinning or pulsing shapes")
    add("--out", default="out.mp4", help=".mp4, or .png for the last frame; default: out.mp4", **file)
    frames = number(int, 1, MOST_FRAMES)
    add("--frames", type=frames, metavar="N", help=f"default: those of the tracks, or {CLIP}")
    add("--fps", type=number(float, 0.1, 1000), metavar="F", help="of the output; default: the model's")
    add("--overlay", action="store_true", help="draw the tracks on the video")
    add = parser.add_argument_group("model").add_argument
    add("--weights", help="a Wan DiT, file or folder; default: the tiny model in assets/", **file)
    add("--vae", help="default: the tiny model's, or the one in the folder of --weights", **file)
    add("--device", default="auto", help="cpu, cuda, …; default: cuda if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on the CPU, else bfloat16")
    add("--compile", action="store_true", help="torch.compile the DiT's blocks: a minute slower, then faster")
    add("--text-encoder", help="a -Diffusers folder with UMT5; default: --weights, if it is one", **file)
    add("--image-encoder", help="a -Diffusers folder with CLIP; default: --text-encoder's", **file)
    add("--negative-prompt", metavar="TEXT", help="guidance avoids it; default: Wan's")
    add("--prompt-embeds", help="encoder outputs from a file; see docs/weights.md", **file)
    add = parser.add_argument_group("sampling; defaults are the model's").add_argument
    add("--sampler", choices=("stream", "teacher"), help="default: that of the weights")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), metavar="N", help="of all noise; default: 0")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="denoising steps")
    add("--memory", type=memory, metavar="cNsNwN", help="the student's KV cache: latent frames per chunk, "
        "chunks in the sink and in the window; wfull: all")
    add("--guidance", type=guidance, metavar="T,M", help="the teacher's weights of text and tracks (eq. 2)")
    add("--set", dest="settings", type=setting, action="append", metavar="FIELD=VALUE",
        help=f"other fields of Config: {', '.join(SETTINGS)}")


def parse_flags(argv, parser=None):
    """Parse the command line into Flags. parser: one with further flags, which are ignored here."""
    if parser is None:
        parser = Parser(description="One image and some tracks in, a video out. To draw tracks while it "
                        "streams: python -m extras.page", allow_abbrev=False)
        add_flags(parser)
    given = vars(parser.parse_args(argv))
    return Flags(**{flag.name: given[flag.name] for flag in fields(Flags)})


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
    """The Weights at a path, with everything checked but the values of the tensors. Raises UserError."""
    model, metadata = open_pretrained(MotionStream, path, {})
    head = model.state_dict().get("track_head.conv.weight")
    own = metadata.get("format") == "motionstream"
    count = sum(parameter.numel() for parameter in model.parameters())
    return Weights(path, model.config, own, head is not None and bool(head.any()), count)


@dataclass(frozen=True)
class Job:
    """A fully resolved sampling job."""
    config: Config      # for sampling; causal: the student, else the teacher
    frames: int | None  # None: without end, as on the page
    fps: float          # of the output file
    seed: int
    device: torch.device
    dtype: str
    prompt: str | None
    moved: bool         # tracks were given
    drawn: bool         # they enter as a control video, not through the track head
    notes: list         # for the user


def resolve(flags, weights, tracks):
    """Resolve flags into a Job. The weights decide what the flags leave open."""
    config, notes = resolve_config(flags, weights)
    prompt = config.prompt if flags.prompt is None else flags.prompt
    device = find_device(flags.device)
    dtype = flags.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    moved = bool(flags.tracks or flags.paths)
    drawn = moved and not weights.has_head and config.track_dim == config.out_dim
    if drawn:
        notes.append(f"{weights.path}: takes tracks drawn as a control video, in a style that is "
                     "untested with these weights")
    frames = flags.frames or len(tracks.tracks)
    return Job(config, frames, flags.fps or config.fps, flags.seed or 0, device, dtype, prompt, moved, drawn, notes)


def find_device(name):
    """The torch device called `name`; auto: cuda if available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except Exception as e:                  # each backend has its own kinds
        raise UserError(f"--device {name}: not available here ({reason_of(e)})") from None
    if device.type == "meta":
        raise UserError("--device meta: computes nothing")
    return device


def resolve_config(flags, weights):
    """(Sampling Config, notes): the weights' own, or advice for their family, overridden by flags."""
    config = weights.config
    notes = []
    if not weights.own:
        usual = "stream" if config.causal else "teacher"
        advice = checkpoints(weights.path, "does not say how it is sampled").advice
        config, words = advice(config, flags.sampler or usual)
        notes = [f"{weights.path}: {note}" for note in words]
    changes = dict(flags.settings or ()) | (flags.memory or {})
    if flags.guidance:
        changes["guidance"] = flags.guidance
    elif config.text_encoder == "umt5" and flags.prompt is None and not flags.prompt_embeds:
        changes["guidance"] = (0.0, config.guidance[1])     # no text to guide by
    config = replace(config, **changes)
    if flags.steps or "shift" in changes:
        sigmas = schedule(flags.steps or len(config.sigmas), config.shift)
        config = replace(config, steps=flags.steps or config.steps, sigmas=sigmas)
    return config, notes


def refuse(job, flags, weights):
    """Raise UserError with the cure for the first invalid combination."""
    config, streams = job.config, job.config.causal
    kind, sampler = ("student", "stream") if streams else ("teacher", "teacher")
    encoded = flags.prompt_embeds or flags.text_encoder or flags.image_encoder
    weight = flags.guidance and flags.guidance[1]
    for wrong, cure in [
        (weights.own and flags.sampler not in (None, sampler), f"holds a {kind}, use --sampler {sampler}"),
        (streams and flags.guidance, "--guidance belongs to --sampler teacher"),
        (streams and flags.negative_prompt is not None, "--negative-prompt belongs to --sampler teacher"),
        (not streams and flags.memory, "--memory belongs to --sampler stream"),
        (streams and config.window is None and job.frames > CLIP and not flags.memory,
         f"trained to remember {CLIP} frames, all of them; add --memory c{config.chunk}s1w5 for more"),
        (streams and config.window is None and flags.compile, GROWS),
        (streams and config.has_mask,
         "takes the image as a clip with a mask, which cannot stream; use --sampler teacher"),
        (not config.track_dim and (job.moved or weight),
         "has no input for tracks; take Fun-Control, or drop --tracks, and give --guidance T,0"),
        (job.moved and not job.drawn and not weights.has_head, "has no trained track head, and its input "
         f"for tracks has {config.track_dim} channels, none for a drawn video"),
        (config.text_encoder == "words" and encoded, "reads words, give it --prompt and nothing encoded"),
    ]:
        if wrong:
            raise UserError(f"{weights.path}: {cure}")


@dataclass(frozen=True)
class Models:
    """The networks, on one device, and the encoded inputs."""
    dit: MotionStream
    vae: torch.nn.Module
    encoded: Encoded


def find_vae(weights, path=None):
    """Path of the VAE: `path`, else the tiny model's or, for Wan's weights, the one in their folder.
    Everything is checked but the values of its tensors. Raises UserError."""
    c = weights.config
    places = [ASSETS / "tiny_vae.safetensors"]          # its shapes would fit Wan's too
    if c.text_encoder == "umt5":
        folder = weights.path if weights.path.is_dir() else weights.path.parent
        places = [folder / name for name in VAE_FILES[:3]]
    path = path or next(filter(Path.is_file, places), None)
    if path is None:
        names = " or ".join(VAE_FILES[:3])
        raise UserError(f"{weights.path}: give --vae PATH; there is no {names} in its folder")
    vae, _ = open_weights(path)
    channels = vae.config.latent_channels
    if (channels, vae.stride) != (c.out_dim, c.stride):
        raise UserError(f"{path}: latents have {channels} channels and stride {vae.stride}, those of "
                        f"{weights.path} have {c.out_dim} and {c.stride}; give --vae its own")
    return path


def open_vae(weights, path=None):
    """Load the VAE that find_vae finds."""
    return load_vae(find_vae(weights, path))


def sources_of(job, flags, weights):
    """Inputs of the encoders, see extras/encoders.py."""
    from extras.encoders import Sources
    return Sources(job.prompt, flags.negative_prompt, flags.prompt_embeds, flags.text_encoder,
                   flags.image_encoder, weights.path)


def check_files(job, flags, weights, image):
    """Check all files before load_models loads one, so that an error comes within a minute and not after
    the encoders have run. Raises UserError."""
    find_vae(weights, flags.vae)
    if job.config.text_encoder == "umt5":
        from extras import encoders
        encoders.check(sources_of(job, flags, weights), job.config, image)
    check_memory(weights.count * getattr(torch, job.dtype).itemsize, weights.path, job.device)


GROWS = "--compile needs a cache that stops growing, this one keeps all chunks; add --memory c3s1w5"


def compile_blocks(model):
    """torch.compile each block of a model: the blocks share one compilation, the layers of a whole model
    would not. It recompiles for each cache length, with `write` and without, until the cache is full.
    UserError if the cache never fills, or if torch finds no compiler."""
    config = model.config
    if config.causal and config.window is None:
        raise UserError(GROWS)
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


def encode_inputs(job, flags, weights, image):
    """Encode a Job's text and image inputs. image (1, 3, H, W) in [-1, 1]."""
    if job.config.text_encoder == "words":
        text = embed_words(job.prompt, job.config)
        return Encoded(text if text is None else text.to(job.device))
    from extras import encoders
    sources = sources_of(job, flags, weights)
    return Encoded(*encoders.encode(sources, job.config, image, job.device))


def load_models(job, flags, weights, image):
    """Load the Models of a Job. image (1, 3, H, W) in [-1, 1]. Frees the encoders before the DiT."""
    check_files(job, flags, weights, image)
    vae = open_vae(weights, flags.vae).to(job.device)
    encoded = encode_inputs(job, flags, weights, image)
    dit = MotionStream.from_pretrained(weights.path, dtype=getattr(torch, job.dtype), device=job.device,
                                       **vars(job.config))
    if flags.compile:
        compile_blocks(dit)
    c = dit.config
    how = f"teacher, whole clip, {c.steps} steps"
    if c.causal:
        how = f"stream, c{c.chunk}s{c.sink}w{c.window}, {len(c.sigmas)} steps".replace("None", "full")
    print(f"{weights.path.name}: {c.size[1]}x{c.size[0]} pixels, {how}, seed {job.seed}, {job.device}, "
          f"{job.dtype}")
    return Models(dit, vae, encoded)


def word_notes(job):
    """Notes for the user, a list, on prompt words that the tiny model was not trained on."""
    config = job.config
    if config.text_encoder != "words":
        return []
    notes = []
    if len(words_in(job.prompt)) > config.text_len:
        notes.append(f"only the first {config.text_len} words of {job.prompt!r} are read")
    unknown = dict.fromkeys(unknown_words(job.prompt))          # an ordered set
    if unknown:
        notes.append(f"the tiny model never learned {', '.join(unknown)}, which is noise to it; it knows "
                     f"{', '.join(WORDS)}")
    return notes


def with_prompts(motion, prompts, config):
    """Split a whole Motion by chunk, each with the text of its own prompt."""
    parts = motion_by_chunk(motion, config)
    for part, prompt in zip(parts, prompts):
        yield replace(part, text=embed_words(prompt, config))


@torch.inference_mode()
def generate(job, models, image, motion):
    """Yield the video's frames, uint8 (H, W, 3): job.frames of them; None: as long as `motion` lasts.
    image and motion: see `stream`."""
    config = job.config
    if job.drawn:
        latents = latent_frames(job.frames, config)
        frames = FRAMES * latents - (FRAMES - 1)
        extras = tracks_module("drawing tracks")
        control = extras.render_control(models.vae, motion, config.size, frames)
        motion = replace(motion, control=control)
    if config.causal:
        latents = stream_latents(models.dit, models.vae, image, motion, models.encoded, job.seed,
                                 chunk=config.chunk, sink=config.sink, window=config.window)
        live = job.frames is None
        chunks = decoded_frames(models.vae, latents, ahead=not live)
    else:
        videos = sample_teacher(models.dit, models.vae, image, motion, models.encoded, job.seed)
        chunks = map(to_frames, videos)
    frames = itertools.chain.from_iterable(chunks)
    yield from itertools.islice(frames, job.frames)


def run(argv):
    """Run the program; returns the exit code. argv: None for the command line's."""
    flags = parse_flags(argv)
    read = [value for name, value in vars(flags).items() if name != "out" and isinstance(value, Path)]
    for path in read:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    check_output(flags.out, (".mp4", ".png"), read)
    image = load_image(flags.image)
    shipped = {"teacher": "tiny_teacher.safetensors"}.get(flags.sampler, "tiny.safetensors")
    weights = inspect(flags.weights or ASSETS / shipped)
    tracks = given_tracks(flags, image.size)
    typed = flags.prompt
    if tracks.recorded:
        from extras import recording
        flags = recording.replayed(flags, tracks.recorded, weights.config)
    job = resolve(flags, weights, tracks)
    refuse(job, flags, weights)
    if flags.overlay or job.drawn:
        tracks_module("drawing tracks")     # found missing here, before any model loads
    if flags.paths:
        refuse_cropped(flags.paths, image.size, job.config.size)
    motion, lost = fit_tracks(tracks, image.size, job.frames, job.config, job.seed)
    notes = job.notes + word_notes(job) + crop_note(image.size, job.config.size) + lost
    if tracks.fps not in (None, job.fps):
        notes.append(f"the tracks are at {tracks.fps:g} frames/s, the video at {job.fps:g}; they are not "
                     "resampled")
    pixels = fit_image(image, job.config.size)
    models = load_models(job, flags, weights, pixels)
    steered = motion
    if tracks.recorded:
        notes += recording.doubts(tracks.recorded, models)
        if typed is None and job.config.causal and job.config.text_encoder == "words":
            prompts = recording.prompts_by_chunk(tracks.recorded, job.config.chunk)
            steered = with_prompts(motion, prompts, job.config)
    for note in notes:
        print(f"note: {note}")
    frames = map(enlarge, generate(job, models, pixels, steered))
    if flags.overlay:
        frames = tracks_module("drawing tracks").overlaid(frames, motion, job.config.size)
    is_picture = flags.out.suffix.lower() == ".png"
    with picture_file(flags.out) if is_picture else video_file(flags.out, job.fps) as append:
        code = write_frames(append, frames, job.frames)
    print(flags.out)
    return code


def reported(work, *args):
    """Exit code of work(*args), a program: 2 and a one-line message for an error that the user can fix,
    130 if interrupted, 141 if the reader of its output closed the pipe, as | head -1 does."""
    print_anything()
    try:
        code = work(*args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141                          # 128 + SIGPIPE, which Windows does not have
    except (UserError, OSError) as e:       # OSError: a full disk, for one
        print(f"error: {UserError(str(e))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        of_memory = MemoryError, torch.OutOfMemoryError
        if not isinstance(e, of_memory) and "DefaultCPUAllocator" not in str(e):
            raise
        print(f"error: out of memory: {UserError(reason_of(e))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def print_anything():
    """Consoles that lack a character of a path, as on Windows, print its code instead of raising."""
    for console in sys.stdout, sys.stderr:
        if hasattr(console, "reconfigure"):
            console.reconfigure(errors="backslashreplace")


def main(argv=None):
    """`run`, with errors as one line and an exit code."""
    warnings.filterwarnings("ignore", module="PIL")     # damaged pictures; errors are reported
    return reported(run, argv)


if __name__ == "__main__":
    sys.exit(main())
