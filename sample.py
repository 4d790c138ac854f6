"""One image and some tracks in, a video out, written while it is generated.

    python sample.py --image x.png --tracks t.npz

Tracks are an .npz file with `tracks` (T, N, 2), x to the right and y down, in pixels of the image as it is seen (after
its EXIF rotation), and if wanted
    visibility (T, N)   0 or 1, or probabilities; hidden and "not specified" are the same
    width, height       of the picture that the pixels belong to, if it is not the image itself
    ids (N,)            which vector each track has (see track_ids); fps: only compared with the model's
or an .npy file with the tracks alone. Without visibility, NaN is hidden.

What a user can put right ends in one line on stderr and exit code 2, before the model loads where it can be known.
Shapes are those of motionstream.py.
"""

import argparse
import colorsys
import contextlib
import itertools
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads wait awake, but briefly: the video encoder needs the cores

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from motionstream import (SELF_FORCING, Config, MotionStream, embed_words, euler, find_config, image_and_mask,
                          image_channels, read_weights, rollout, schedule, track_features, track_ids, write)
from vae import VAE_FILES, load_vae, read_tensors

ASSETS = Path(__file__).resolve().parent / "assets"
LIMIT = 2 ** 30             # bytes of a tracks file, unpacked
MOST_FRAMES, MOST_TRACKS = 1_000_000, 20_000
DEFAULT_FRAMES = 81         # length of a video without tracks
SHORTEST_SIDE = 256         # pixels of the written video; smaller ones are enlarged
TRAIL = 12                  # frames that a track's trail lasts in --overlay
SHEET_FRAMES = 5            # of the video, beside the input, in --sheet
UMT5_DIM, CLIP_ROWS = 4096, 257     # of an encoded text, and of an encoded image
HISTORY = 81                # frames that weights without a window, which forget nothing, saw in training


class UserError(Exception):
    """What the user can put right: one line that says what was found and what to do."""


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
    if has_mask(config):
        channels = image_and_mask(first[:, :, :frames])
    else:
        channels = image_channels(first, frames) if config.image_dim else None
    clean = first[:, :, :1] if channels is None or config.out_dim == 48 else None       # Wan 2.2 5B may take both
    return channels, clean


def conditions(model, first, motion, text, clip=None):
    """The model's keyword arguments chunk by chunk, each made when asked for: the first chunk has 4 chunk - 3 frames,
    the others 4 chunk. Nothing is specified where the last one reaches beyond the motion's end."""
    c, frames = model.config, motion.tracks.shape[1]
    for start in range(-3, frames, 4 * c.chunk):
        stop, features = start + 4 * c.chunk, None
        if motion.control is not None:
            features = motion.control[:, :, (start + 3) // 4:(stop + 3) // 4]
        elif c.track_dim:
            span, beyond = slice(max(start, 0), stop), max(stop - frames, 0)
            tracks = F.pad(motion.tracks[:, span], (0, 0, 0, 0, 0, beyond))
            visible = F.pad(motion.visible[:, span], (0, 0, 0, beyond))
            features = track_features(model, tracks, visible, motion.ids)
        image = image_inputs(c, first, c.chunk)[0] if start < 0 else None
        yield {"text": text, "tracks": features, "image": image, "clip": clip}


@torch.inference_mode()
def stream(model, first, motion, text=None, seed=0, clip=None):
    """The student: clean latents (B, C, chunk, h, w), one chunk after the other, at constant memory.
    first (B, C, 1, h, w): the image's latent. The noise levels are the model's own."""
    generator = torch.Generator().manual_seed(seed)     # on the CPU: the same noise whatever the device
    shape = (*first.shape[:2], model.config.chunk, *first.shape[3:])
    noise = (torch.randn(shape, generator=generator).to(first) for _ in itertools.count())
    given, (_, clean) = conditions(model, first, motion, text, clip), image_inputs(model.config, first, 1)
    yield from rollout(model, noise, given, clean, generator=generator)


@torch.inference_mode()
def sample_teacher(model, first, motion, frames, text=None, seed=0, null_text=None, clip=None):
    """The teacher: whole chunks that cover `frames`, made all at once, then handed out one by one as `stream` does.
    null_text: what "without text" means, see guided_velocity. Noise levels and guidance are the model's own."""
    c, count = model.config, latent_frames(frames, model.config)
    tracks = [piece["tracks"] for piece in itertools.islice(conditions(model, first, motion, text), count // c.chunk)]
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


# ----------------------------------------------------------------------------------------------------------------------
# Reading the image.

def load_image(path):
    """A picture file to an RGB image of 8 bits: turned as its EXIF says, transparent parts over white."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
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
# Reading tracks. Names decide; shapes and numbers only refuse; nothing is transposed, scaled or swapped on a guess.

@np.errstate(all="ignore")          # numbers too large for float32 get a message of their own
def load_tracks(path, size):
    """A tracks file for an image of `size` (width, height), to: tracks (T, N, 2) float32 in pixels of that image, 0
    where hidden, visible (T, N) bool, ids (N,) int64, fps; the last two None if the file does not say."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        arrays = read_arrays(path)
        tracks, visibility = arrays["tracks"], arrays.get("visibility")
        check_layout(tracks, visibility)
        tracks = tracks.astype(np.float32)
        visible = read_visibility(tracks, visibility)
        tracks = np.where(visible[..., None], tracks, 0)
        own_size = np.array([scalar(arrays, "width") or size[0], scalar(arrays, "height") or size[1]])
        check_units(tracks, visible, own_size)
        tracks = tracks * (np.array(size) / own_size).astype(np.float32)
        return tracks, visible, read_ids(arrays.get("ids"), tracks.shape[1]), scalar(arrays, "fps")
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def read_arrays(path):
    """The arrays of an .npz or .npy file by name, told apart by content. Everything that can be wrong with the bytes
    becomes a UserError."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic == b"\x93NUM":
                return {"tracks": read_npy(file, path.stat().st_size, "tracks")}
            if magic != b"PK\x03\x04":
                raise UserError("neither .npz nor .npy; write it with numpy.savez(path, tracks=tracks)")
            with zipfile.ZipFile(file) as archive:
                return read_npz(archive)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"cannot be read ({e.strerror or 'damaged'})") from None
    except Exception:           # damaged headers and zip files raise eight kinds, and numpy's texts advise unpickling
        raise UserError("damaged; write it again with numpy.savez(path, tracks=tracks)") from None


def read_npz(archive):
    """Those arrays of an open npz file that we know, by name."""
    known = ("tracks", "visibility", "width", "height", "fps", "ids")
    entries = {name: entry for entry in archive.infolist() for name in known if entry.filename == f"{name}.npy"}
    if "tracks" not in entries:
        names = ", ".join(entry.filename.removesuffix(".npy")[:40] for entry in archive.infolist()[:8])
        raise UserError(f"has no array named tracks, only: {names}")
    size = sum(entry.file_size for entry in entries.values())
    if size > LIMIT:
        raise UserError(f"unpacks to {size / 2 ** 30:.1f} GiB, at most {LIMIT / 2 ** 30:.0f}")
    arrays = {}
    for name, entry in entries.items():
        with archive.open(entry) as file:
            arrays[name] = read_npy(file, entry.file_size, name)
    return arrays


def read_npy(file, size, name):
    """One array from an npy stream of `size` bytes. What it declares is compared with what is there before anything is
    allocated, and only plain numbers are read, so nothing is ever unpickled."""
    version = np.lib.format.read_magic(file)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = headers[version](file)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise UserError(f"{name} holds {dtype.name} values, not plain numbers; save it as float32")
    declared, rest = math.prod(shape) * dtype.itemsize, size - file.tell()
    if declared > min(rest, LIMIT):
        raise UserError(f"{name} declares shape {shape}, {declared} bytes, but {rest} are there: truncated? "
                        "Write it again")
    return np.frombuffer(file.read(declared), dtype).reshape(shape, order="F" if fortran else "C")


def scalar(arrays, name):
    """A positive number from the file, None if it is not there."""
    if name not in arrays:
        return None
    if arrays[name].size != 1 or not 0 < arrays[name].item() < math.inf:
        raise UserError(f"{name} must be one positive number, it is {np.array2string(arrays[name], threshold=4)}")
    return float(arrays[name].item())


def check_layout(tracks, visibility):
    """Refuse what is not (T, N, 2). Without visibility, whose shape would settle it, look for a swap of T and N."""
    shape = tracks.shape
    if tracks.dtype.kind == "b":
        raise UserError("tracks are bool values; they must be pixel positions, float32")
    if tracks.ndim != 3 or shape[2] != 2:
        raise UserError(f"tracks have shape {shape}, expected (T, N, 2): frames, tracks, x and y")
    if 0 in shape:
        raise UserError(f"tracks have shape {shape}: no {'frames' if shape[0] == 0 else 'tracks'}; leave --tracks out "
                        "for a video without control")
    if visibility is not None and visibility.shape != shape[:2]:
        raise UserError(f"visibility has shape {visibility.shape}, expected {shape[:2]}, as tracks are {shape}")
    swapped = shape[0] < 5 <= shape[1]
    if visibility is None and not swapped and min(shape[:2]) >= 3:
        # one point moves smoothly in time, neighbours in a list may be far apart; the other way round if swapped
        known = np.nan_to_num(tracks.astype(np.float32), posinf=0, neginf=0)
        in_time, in_list = (np.median(abs(np.diff(known, axis=axis))) for axis in (0, 1))
        swapped = in_time > max(1, 10 * in_list)
    if visibility is None and swapped:
        raise UserError(f"tracks have shape {shape} and look like (N, T, 2): save tracks.transpose(1, 0, 2), or, if "
                        "they are right, add visibility (T, N) to an .npz file")
    if shape[1] > MOST_TRACKS or shape[0] > MOST_FRAMES:
        raise UserError(f"tracks have shape {shape}: thin them out to {MOST_FRAMES} frames and {MOST_TRACKS} tracks")


def read_visibility(tracks, visibility):
    """visible (T, N) bool of tracks (T, N, 2): as the file says, else wherever the position is not NaN."""
    if visibility is None:
        visible = ~np.isnan(tracks).any(-1)
    else:
        if not ((visibility >= 0) & (visibility <= 1)).all():
            raise UserError("visibility must lie in 0..1; are these logits? Save visibility > 0")
        visible = visibility > 0.5
        if not np.isin(visibility, (0, 1)).all():
            print("note: visibility is read as probabilities, visible is > 0.5")
    wrong = np.argwhere(visible & ~(abs(tracks) < 1e6).all(-1))
    if len(wrong):
        raise UserError(f"{len(wrong)} visible points are NaN, infinite or beyond a million pixels, the first is frame "
                        f"{wrong[0][0]} of track {wrong[0][1]}; set their visibility to 0")
    return visible


def check_units(tracks, visible, size):
    """Refuse positions that cannot be pixels of a picture of `size` (width, height)."""
    points, start = tracks[visible], tracks[0][visible[0]]      # (n, 2)
    if len(points) and abs(points).max() <= 1:
        raise UserError("all positions lie in [-1, 1] and must be pixels: multiply by the image's width and height")
    outside = ((start < 0) | (start > size)).any(1)
    if 2 * outside.sum() > len(start):
        inside_swapped = ((start >= 0) & (start <= size[::-1])).all(1)
        hint = ("is the order y, x? Save tracks[..., ::-1]" if inside_swapped.mean() > 0.5 else
                "are they for a picture of another size? Add its width and height to an .npz file")
        raise UserError(f"{outside.sum()} of {len(start)} points of frame 0 lie outside the image of {size[0]:.0f}x"
                        f"{size[1]:.0f} pixels: {hint}")


def read_ids(ids, count):
    """ids (N,) int64, None if the file has none."""
    if ids is None:
        return None
    if ids.dtype.kind not in "iu" or ids.shape != (count,) or ids.min() < 0 or ids.max() >= 2 ** 32:
        raise UserError(f"ids are {ids.dtype} {ids.shape}, expected a whole number in 0..{2 ** 32 - 1} for each of "
                        f"{count} tracks")
    return ids.astype(np.int64)


def fit_tracks(arrays, image_size, frames, config, seed):
    """Tracks on the image (width, height) to Motion in the model's video, for `frames` frames or more: moved and
    scaled as the image is, hidden where cropped away, not specified after their end."""
    tracks, visible, ids = arrays
    beyond = max(frames - len(tracks), 0)
    if beyond:
        print(f"note: the tracks end after {len(tracks)} frames, the last {beyond} are not specified")
    scale, left, top = crop(*image_size, config.size)
    tracks = torch.from_numpy((tracks - np.float32((left, top))) * np.float32(scale))[None]
    visible = torch.from_numpy(visible)[None]
    inside = ((tracks >= 0) & (tracks < torch.tensor(config.size[::-1]))).all(-1)
    lost = (visible & ~inside).sum()
    if lost:
        print(f"note: {lost} of {visible.sum()} visible track points lie outside the video and are hidden")
    visible = visible & inside
    if ids is not None and config.tracks == "start":
        print("note: with these weights a track's ID is the pixel where it starts; the file's ids are not used")
        ids = None
    if ids is None:
        ids = track_ids(tracks, visible, config, torch.Generator().manual_seed(seed))
    else:
        ids = torch.from_numpy(ids)[None]
    return Motion(F.pad(tracks, (0, 0, 0, 0, 0, beyond)), F.pad(visible, (0, 0, 0, beyond)), ids)


# ----------------------------------------------------------------------------------------------------------------------
# Writing the video, and pictures of it.

@contextlib.contextmanager
def hold_signals():
    """The first Ctrl-C or SIGTERM is only noted, in the list that this yields, so that a file can be finished as far as
    it is. The second one ends the program."""
    noted = []

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


class Video:
    """`with Video(path, fps) as video`: frames go to a temporary file beside `path`, which takes its place when the
    block ends and all frames can be read back. If the block ends in an exception, nothing is left behind."""

    def __init__(self, path, fps):
        self.path, self.count = path, 0
        self.part = path.absolute().with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        options = {"duration": 1000 / fps, "loop": 0} if path.suffix == ".gif" else {
            "fps": fps, "codec": "libx264", "quality": 7, "macro_block_size": 2, "ffmpeg_log_level": "quiet",
            "output_params": ["-preset", "veryfast", "-movflags", "+faststart"]}
        try:
            self.writer = imageio.get_writer(self.part, **options)
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror or 'no such folder?'})") from None
        except (ImportError, ValueError):
            raise UserError(f"{path}: imageio cannot write {path.suffix} files here: pip install 'imageio[ffmpeg]', or "
                            "use --out out.gif") from None

    def append(self, frame):
        """One frame, uint8 (H, W, 3)."""
        try:
            self.writer.append_data(frame)
        except OSError:                                 # ffmpeg has gone, and its reason with it
            raise UserError(f"{self.path}: writing stopped after {self.count} frames; is the disk full?") from None
        self.count += 1

    def finish(self):
        """Close the file and count its frames: a failed encoding is silent. A GIF merges equal frames, so there it has
        to be enough that it opens."""
        try:
            self.writer.close()
            if self.path.suffix == ".gif":
                with Image.open(self.part) as gif:
                    gif.load()
                readable = self.count
            else:
                import imageio_ffmpeg                   # comes with imageio[ffmpeg], which GIFs do without
                readable, _ = imageio_ffmpeg.count_frames_and_secs(self.part)
        except (OSError, RuntimeError):
            readable = 0
        if readable != self.count:
            raise UserError(f"{self.path}: {readable} of {self.count} frames could be read back; is the disk full or "
                            "the folder not writable?")

    def discard(self):
        """Close and remove the temporary file."""
        with contextlib.suppress(OSError):
            self.writer.close()
        with contextlib.suppress(OSError):
            self.part.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.finish()
                os.replace(self.part, self.path)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror})") from None
        finally:
            self.discard()


def check_output(path, suffixes, image):
    """Refuse a path for output that cannot be right."""
    if path.suffix not in suffixes:
        raise UserError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not os.path.isdir(path.parent):
        raise UserError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder")
    if os.path.realpath(path) == os.path.realpath(image):
        raise UserError(f"{path}: would replace the input image; choose another name")


def try_writing(path):
    """Write a video of one frame beside `path` and remove it, to know before the work whether it can be done."""
    video = Video(path, fps=16)
    with hold_signals() as noted:                       # a stop while ffmpeg starts would leave its file behind
        try:
            video.append(np.zeros((SHORTEST_SIDE, SHORTEST_SIDE, 3), np.uint8))
            video.finish()
        finally:
            video.discard()
    if noted:
        raise KeyboardInterrupt


def enlarge(frame, factor):
    """(H, W, 3) to (factor H, factor W, 3), nearest neighbour."""
    return frame.repeat(factor, 0).repeat(factor, 1)


def draw_tracks(frame, tracks, visible, factor):
    """The frame (H, W, 3) with tracks (t, N, 2), given in pixels before it was enlarged by `factor`: trails that widen
    towards the last of the t frames, and a dot there; edged in black, to be seen on any colour."""
    picture = Image.fromarray(frame)
    pen, unit = ImageDraw.Draw(picture), min(picture.size) / 128
    steps, count = visible.shape
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(n / count, 0.9, 1)) for n in range(count)]
    points = tracks * factor
    segments = np.argwhere(visible[:-1] & visible[1:])
    for edge in (2, 0):
        for t, n in segments:
            width = round(unit * (0.5 + (t + 1) / steps)) + edge
            pen.line([*points[t, n], *points[t + 1, n]], "black" if edge else colours[n], width)
    r = 2 * unit
    for n in np.flatnonzero(visible[-1]):
        x, y = points[-1, n]
        pen.ellipse([x - r, y - r, x + r, y + r], colours[n], "black")
    return np.array(picture)


@torch.inference_mode()
def draw_control(vae, motion, config, frames):
    """Latents (1, C, F, h, w) of the tracks as a video, for a slot that expects one: drawn on black as --overlay draws
    them, a choice that was not tried on Fun-Control's weights. F: whole chunks that cover `frames`."""
    video = np.zeros((4 * latent_frames(frames, config) - 3, *config.size, 3), np.uint8)
    tracks, visible = (tensor[0].numpy() for tensor in motion[:2])
    for i in range(min(len(video), len(tracks))):
        recent = slice(max(i + 1 - TRAIL, 0), i + 1)
        video[i] = draw_tracks(video[i], tracks[recent], visible[recent] & visible[i], 1)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].to(next(vae.parameters()).device)
    return vae.encode(pixels / 127.5 - 1)


def save_sheet(path, tiles):
    """Frames of one size (H, W, 3) side by side in one PNG."""
    height, width, _ = tiles[0].shape
    gap = width // 32
    sheet = Image.new("RGB", (len(tiles) * (width + gap) - gap, height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (i * (width + gap), 0))
    try:
        write(path, lambda part: sheet.save(part, "png"))
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


# ----------------------------------------------------------------------------------------------------------------------
# The program.

class Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others."""

    def error(self, message):
        raise UserError(message)


def number(kind, least, most):
    """A flag's type: an int or float from `least` to `most`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {least} to {most}")
        return value
    return parse


def window(text):
    """--window: None for "full"."""
    return None if text == "full" else number(int, 0, 10 ** 6)(text)


def parse_flags(argv):
    """The command line. Flags with argparse.SUPPRESS are only there if given; the model's own value holds otherwise."""
    parser = Parser(description="One image and some tracks in, a video out.", allow_abbrev=False)
    add = parser.add_argument_group("in and out").add_argument
    add("--image", type=Path, required=True, metavar="FILE", help="first frame, any picture file")
    add("--tracks", type=Path, metavar="FILE", help=".npz or .npy, see the top of sample.py; default: none")
    add("--prompt", metavar="TEXT", help="what the image and the tracks do not say; default: the model's own")
    add("--out", type=Path, default=Path("out.mp4"), metavar="FILE", help=".mp4 or .gif (default: %(default)s)")
    add("--frames", type=number(int, 1, MOST_FRAMES), metavar="N",
        help=f"default: those of the tracks, or {DEFAULT_FRAMES}")
    add("--fps", type=number(float, 0.1, 1000), metavar="F", help="frames per second of the file; default: the model's")
    add("--overlay", action="store_true", help="draw the tracks on the video")
    add("--sheet", type=Path, metavar="FILE", help="also write a .png with the input, its tracks, and some frames")
    add = parser.add_argument_group("model").add_argument
    add("--weights", type=Path, metavar="PATH", help="a Wan DiT, file or folder; default: the tiny model in assets/")
    add("--vae", type=Path, metavar="PATH", help="default: the tiny model's, or the one in the folder of --weights")
    add("--prompt-embeds", type=Path, metavar="FILE", help="for Wan's, instead of --prompt: its rows, see the README")
    add("--clip-embeds", type=Path, metavar="FILE", help="for weights with an image branch: the image's rows")
    add("--device", default="auto", help="cpu, cuda, …; default: cuda if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model; default: float32 on the CPU, else bfloat16")
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=("stream", "teacher"), help="default: what the weights are")
    add("--control", choices=("sinusoid", "rgb"), help="tracks by the trained head, or drawn if there is none")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N", help="of all noise (default: %(default)s)")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="noise levels per chunk; default: the model's")
    add = parser.add_argument_group("only --sampler stream; defaults are the model's").add_argument
    given = {"default": argparse.SUPPRESS, "metavar": "N"}
    add("--chunk", type=number(int, 1, 1000), help="latent frames generated together", **given)
    add("--sink", type=number(int, 0, 10 ** 6), help="chunks from the start that are remembered for ever", **given)
    add("--window", type=window, help="latest chunks that are remembered, or full for all", **given)
    add = parser.add_argument_group("only --sampler teacher; v = guidance as in eq. 2, both 0: none").add_argument
    given = {"default": argparse.SUPPRESS, "metavar": "W", "type": number(float, 0, 100)}
    add("--w-text", help="weight of the text; default: the model's", **given)
    add("--w-motion", help="weight of the tracks; default: the model's", **given)
    add("--negative-embeds", help="rows of what it leads away from", **given | {"metavar": "FILE", "type": Path})
    return parser.parse_args(argv)


class Weights(NamedTuple):
    """What a weights file tells before it is loaded."""
    path: Path
    config: Config
    own: bool       # written by this project: its config says how it is sampled
    head: bool      # holds a track head that is not all zeros


def inspect(path):
    """Weights, from the names and shapes in a file or folder."""
    try:
        tensors, metadata, file = read_weights(path)
        config = find_config(tensors, metadata, file)
    except ValueError as e:
        raise UserError(str(e).splitlines()[0]) from None
    head = tensors.get("track_head.conv.weight")
    return Weights(path, config, metadata.get("format") == "motionstream", head is not None and bool(head.any()))


# How public weights are sampled, whose files do not say it. Teachers: shift and text guidance, by width and by whether
# the image enters as channels, as their publishers advise for 480 lines; (5, 5) for all others.
TEACHERS = {(1536, False): (8.0, 6.0), (1536, True): (3.0, 6.0), (5120, True): (3.0, 5.0)}


def settle(args, weights, frames):
    """The config to sample with: the weights' own or their family's, changed by the flags. Fills in --sampler and
    --control; refuses flags that these weights have no use for, and conditions that they lack."""
    c, name = weights.config, weights.path
    kind, sampler = ("student", "stream") if c.causal else ("teacher", "teacher")
    args.sampler = args.sampler or sampler
    if weights.own and args.sampler != sampler:
        raise UserError(f"{name}: holds a {kind}, use --sampler {sampler}")
    streams = args.sampler == "stream"
    if not weights.own:
        shift, w_text = TEACHERS.get((c.dim, c.image_dim > 0), (5.0, 5.0))
        c = replace(c, **SELF_FORCING if streams else {"causal": False, "shift": shift, "guidance": (w_text, 0.0)})
    for flag in ("w_text", "w_motion", "negative_embeds") if streams else ("chunk", "sink", "window"):
        if flag in args:
            raise UserError(f"--{flag.replace('_', '-')} belongs to --sampler {'teacher' if streams else 'stream'}")
    if args.steps:
        c = replace(c, steps=args.steps, sigmas=schedule(args.steps, c.shift))
    w_text = c.guidance[0] if args.prompt_embeds or c.text_dim != UMT5_DIM else 0.0     # no text, no weight
    c = replace(c, guidance=(getattr(args, "w_text", w_text), getattr(args, "w_motion", c.guidance[1])))
    c = replace(c, **{flag: getattr(args, flag) for flag in ("chunk", "sink", "window") if flag in args})
    if not weights.own:
        how = "as Self-Forcing" if streams else f"shift {c.shift:g}, text guidance {c.guidance[0]:g}"
        print(f"note: {name} does not say how it is sampled: {args.sampler}, {how}")
    if streams and c.window is None and frames > HISTORY and "window" not in args:
        raise UserError(f"{name}: trained to remember {HISTORY} frames, all of them; add --sink 1 --window 5 for more")
    if streams and has_mask(c):
        raise UserError(f"{name}: takes the image as a clip with a mask, which cannot stream; use --sampler teacher")
    check_control(args, weights)
    check_encoded(args, name, c)
    return c


def check_control(args, weights):
    """Settle how the tracks and the image enter."""
    name, c = weights.path, weights.config
    if not c.track_dim and (args.tracks or args.control or "w_motion" in args):
        raise UserError(f"{name}: has no input for tracks; take Fun-Control, or drop --tracks, --control, --w-motion")
    args.control = args.control or ("sinusoid" if weights.head or c.track_dim != c.out_dim else "rgb")
    if args.tracks and args.control == "rgb" and c.track_dim != c.out_dim:
        raise UserError(f"{name}: takes no drawn tracks, its input for them has {c.track_dim} channels; drop --control")
    if args.tracks and args.control == "sinusoid" and not weights.head:
        raise UserError(f"{name}: has no trained track head; --control rgb draws the tracks instead")
    if args.tracks and args.control == "rgb":
        print("note: the tracks are drawn as a control video, in a style that is ours and that no weights have proven")
    if not (weights.own or c.image_dim or c.out_dim == 48):
        print(f"note: {name} never learned to take an image; it enters as a clean first latent, at sigma 0")


def check_encoded(args, name, c):
    """Refuse encoded texts and images that are missing or of no use."""
    umt5, negative = c.text_dim == UMT5_DIM, "negative_embeds" in args
    if not umt5 and (args.prompt_embeds or negative):
        raise UserError(f"{name}: reads words, give it --prompt and no --{'negative' if negative else 'prompt'}-embeds")
    if umt5 and args.prompt is not None:
        raise UserError(f"{name}: reads no words; encode them as the README says and give it --prompt-embeds FILE")
    if umt5 and not args.prompt_embeds and (negative or "w_text" in args):
        raise UserError(f"--{'negative-embeds' if negative else 'w-text'}: there is no text, give --prompt-embeds FILE")
    if c.clip_dim and not args.clip_embeds:
        raise UserError(f"{name}: reads the image by CLIP too; encode it as the README says, give --clip-embeds FILE")
    if args.clip_embeds and not c.clip_dim:
        raise UserError(f"--clip-embeds: {name} has no image branch, leave it out")


def load_rows(path, least, most, channels):
    """The one tensor of a file, (L, channels), followed by zeros, which the DiT sees: (1, most, channels) float32."""
    tensors = [*read_tensors(path)[0].values()]
    if [t.shape[1:] for t in tensors] != [(channels,)] or not least <= len(tensors[0]) <= most:
        raise ValueError(f"{path}: holds {[tuple(t.shape) for t in tensors[:3]]}, expected one tensor (L, {channels}), "
                         f"{least} <= L <= {most}")
    rows = tensors[0].float()
    if not tensors[0].is_floating_point() or not rows.isfinite().all():
        raise ValueError(f"{path}: holds NaN, infinity or whole numbers; encode it again")
    return F.pad(rows, (0, 0, 0, most - len(rows)))[None]


def read_encoded(args, c):
    """(text, null_text, clip), each (1, L, channels) or None. null_text is what guidance leads away from."""
    paths = args.prompt_embeds, getattr(args, "negative_embeds", None)
    text, null_text = (load_rows(path, 1, c.text_len, UMT5_DIM) if path else None for path in paths)
    clip = load_rows(args.clip_embeds, CLIP_ROWS, CLIP_ROWS, c.clip_dim) if c.clip_dim else None
    if c.text_dim != UMT5_DIM:
        text = embed_words(c.prompt if args.prompt is None else args.prompt, c)
    elif text is None:
        print("note: no text at all, which Wan did not see in training; give --prompt-embeds")
    elif null_text is None and not c.causal and c.guidance[0]:
        print("note: guidance leads away from rows of zeros; give --negative-embeds, Wan's negative prompt")
    return text, null_text, clip


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


def load_models(args, weights, config):
    """The DiT, the VAE and what the DiT reads beside latents and tracks: (text, null_text, clip)."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: not available here") from None
    dtype = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    try:
        vae = open_vae(args, weights).to(device)
        encoded = read_encoded(args, config)
        model = MotionStream.from_pretrained(weights.path, dtype=getattr(torch, dtype), device=device, **vars(config))
    except ValueError as e:
        raise UserError(str(e).splitlines()[0]) from None
    c = model.config
    memory = f"c{c.chunk}s{c.sink}w{'full' if c.window is None else c.window}" if c.causal else "whole clip"
    print(f"{weights.path.name}: {c.size[1]}x{c.size[0]} pixels, {args.sampler}, {memory}, "
          f"{len(c.sigmas) if c.causal else c.steps} steps, seed {args.seed}, {device}, {dtype}")
    return model, vae, [t.to(device) if t is not None else None for t in encoded]


def generate(args, frames, image, motion, model, vae, encoded):
    """`frames` frames of the video, uint8 (H, W, 3), one by one, as the flags say."""
    c, device, (text, null_text, clip) = model.config, next(model.parameters()).device, encoded
    control = draw_control(vae, motion, c, frames) if args.control == "rgb" and args.tracks else None
    motion = Motion(*(tensor.to(device) for tensor in motion[:3]), control)
    grey = 4 * latent_frames(frames, c) - 4 if has_mask(c) else 0
    first = vae.encode(F.pad(image[:, :, None], (0, 0, 0, 0, 0, grey)).to(device))
    if args.sampler == "stream":
        latents = stream(model, first, motion, text, args.seed, clip=clip)
    else:
        latents = sample_teacher(model, first, motion, frames, text, args.seed, null_text=null_text, clip=clip)
    yield from itertools.islice(decode_frames(vae, latents), frames)


def write_video(args, frames, total, image, motion, fps):
    """Write `total` frames to --out while they come, and then --sheet. Returns the signals that ended it early."""
    tracks, visible = motion.tracks[0, :total].numpy(), motion.visible[0, :total].numpy()
    factor = math.ceil(SHORTEST_SIDE / min(image.shape[2:]))
    shown = {round(i * (total - 1) / SHEET_FRAMES) for i in range(1, SHEET_FRAMES + 1)}
    tiles, started = [], time.perf_counter()
    frames = itertools.chain([next(frames)], frames)    # the first one now: from there on Ctrl-C keeps what there is
    first_after = time.perf_counter() - started
    with hold_signals() as noted, Video(args.out, fps) as video:
        for i, frame in enumerate(tqdm(frames, total=total, unit=" frames", disable=None)):
            frame = enlarge(frame, factor)
            if args.overlay:
                recent = slice(max(i + 1 - TRAIL, 0), i + 1)
                frame = draw_tracks(frame, tracks[recent], visible[recent], factor)
            video.append(frame)
            if i in shown:
                tiles.append(frame)
            if noted:
                break
    seconds = time.perf_counter() - started
    if args.sheet:
        still = enlarge(to_frames(image[:, :, None])[0], factor)
        save_sheet(args.sheet, [draw_tracks(still, tracks, visible, factor), *tiles])
    print(f"{video.count} of {total} frames in {seconds:.2f} s, {video.count / seconds:.1f} frames/s, the first after "
          f"{first_after:.2f} s")
    return noted


def run(argv):
    """The program. Returns the exit code."""
    args = parse_flags(argv)
    image = load_image(args.image)
    if args.tracks:
        *arrays, tracks_fps = load_tracks(args.tracks, image.size)
    else:
        print("note: no --tracks, nothing is specified")
        frames, tracks_fps = args.frames or DEFAULT_FRAMES, None
        arrays = np.zeros((frames, 0, 2), np.float32), np.zeros((frames, 0), bool), None
    if args.sheet:
        check_output(args.sheet, (".png",), args.image)
    check_output(args.out, (".mp4", ".gif"), args.image)
    try_writing(args.out)
    tiny = ASSETS / ("tiny_teacher.safetensors" if args.sampler == "teacher" else "tiny.safetensors")
    weights, frames = inspect(args.weights or tiny), args.frames or len(arrays[0])
    config = settle(args, weights, frames)
    model, vae, encoded = load_models(args, weights, config)
    if tracks_fps and tracks_fps != config.fps:
        print(f"note: the tracks are at {tracks_fps:g} frames/s, the model at {config.fps}; they are not resampled")
    motion, pixels = fit_tracks(arrays, image.size, frames, config, args.seed), fit_image(image, config.size)
    pictures = generate(args, frames, pixels, motion, model, vae, encoded)
    noted = write_video(args, pictures, frames, pixels, motion, args.fps or config.fps)
    if args.sheet:
        print(args.sheet)
    print(args.out)
    return 128 + noted[0] if noted else 0


def main(argv=None):
    """`run`, with its errors as one line and an exit code: 2 what the user can put right, 130 interrupted."""
    warnings.filterwarnings("ignore", module="PIL")     # about damaged pictures; what is left unreadable gets our line
    try:
        return run(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
