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
import gc
import hashlib
import html
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
from safetensors.torch import save_file
from tqdm import tqdm

from motionstream import (SELF_FORCING, Config, MotionStream, embed_words, euler, find_config, image_and_mask,
                          image_channels, read_weights, rollout, schedule, track_features, track_ids, write)
from vae import VAE_FILES, load_vae, read_tensors

ASSETS = Path(__file__).resolve().parent / "assets"
LIMIT = 2 ** 30             # bytes of a tracks file, unpacked
KNOWN = ("tracks", "visibility", "width", "height", "fps", "ids")       # arrays in it
MOST_FRAMES, MOST_TRACKS = 1_000_000, 20_000
DEFAULT_FRAMES = 81         # length of a video without tracks
SHORTEST_SIDE = 256         # pixels of the written video; smaller ones are enlarged
TRAIL = 12                  # frames that a track's trail lasts in --overlay
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
    try:
        arrays = read_arrays(path)
        tracks, visibility = arrays["tracks"], arrays.get("visibility")
        check_layout(tracks, visibility)
        tracks = tracks.astype(np.float32)
        visible = read_visibility(tracks, visibility)
        tracks = np.where(visible[..., None], tracks, 0)
        own_size = np.array([scalar(arrays, "width") or size[0], scalar(arrays, "height") or size[1]])
        check_units(tracks, visible, own_size)
        tracks, ids = tracks * (np.array(size) / own_size).astype(np.float32), arrays.get("ids")
        if ids is not None and (ids.dtype.kind not in "iu" or ids.shape != tracks.shape[1:2] or ids.min() < 0
                                or ids.max() >= 2 ** 32):
            raise UserError(f"ids are {ids.dtype} {ids.shape}, expected a whole number below 2**32 for each track")
        return tracks, visible, ids, scalar(arrays, "fps")
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def read_arrays(path):
    """The arrays of an .npz or .npy file by name, told apart by content; nothing is ever unpickled."""
    try:
        entries = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
        size = sum(entry.file_size for entry in entries) or path.stat().st_size
        if size > LIMIT:
            raise UserError(f"unpacks to {size / 2 ** 30:.1f} GiB, at most {LIMIT / 2 ** 30:.0f}")
        loaded = np.load(path, allow_pickle=False)
        arrays = {"tracks": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded if k in KNOWN}
        assert all(array.dtype.kind in "biuf" for array in arrays.values())
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError("no such file") from None
    except Exception:           # damaged headers and zip files raise eight kinds, and numpy's texts advise unpickling
        raise UserError("damaged, or not numbers; write it with numpy.savez(path, tracks=tracks), float32") from None
    if "tracks" not in arrays:
        raise UserError(f"has no array named tracks, only: {', '.join(loaded)}"[:200])
    return arrays


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
    if tracks.dtype.kind not in "iuf" or tracks.ndim != 3 or shape[2] != 2 or 0 in shape:
        raise UserError(f"tracks are {tracks.dtype} {shape}, expected numbers (T, N, 2): frames, tracks, x and y")
    if shape[1] > MOST_TRACKS or shape[0] > MOST_FRAMES:
        raise UserError(f"tracks have shape {shape}: thin them out to {MOST_FRAMES} frames and {MOST_TRACKS} tracks")
    if visibility is not None and visibility.shape != shape[:2]:
        raise UserError(f"visibility has shape {visibility.shape}, expected {shape[:2]}, as tracks are {shape}")
    swapped = shape[0] < 5 <= shape[1]
    if not swapped and min(shape[:2]) >= 3:
        # one point moves smoothly in time, neighbours in a list may be far apart; the other way round if swapped
        known = np.nan_to_num(tracks.astype(np.float32), posinf=0, neginf=0)
        in_time, in_list = (np.median(abs(np.diff(known, axis=axis))) for axis in (0, 1))
        swapped = in_time > max(1, 10 * in_list)
    if visibility is None and swapped:
        raise UserError(f"tracks have shape {shape} and look like (N, T, 2): save tracks.transpose(1, 0, 2), or, if "
                        "they are right, add visibility (T, N) to an .npz file")


def read_visibility(tracks, visibility):
    """visible (T, N) bool of tracks (T, N, 2): as the file says, else wherever the position is not NaN."""
    if visibility is None:
        visibility = ~np.isnan(tracks).any(-1)
    if not ((visibility >= 0) & (visibility <= 1)).all():
        raise UserError("visibility must lie in 0..1; are these logits? Save visibility > 0")
    if not np.isin(visibility, (0, 1)).all():
        print("note: visibility is read as probabilities, visible is > 0.5")
    visible = visibility > 0.5
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
        ids = torch.from_numpy(ids.astype(np.int64))[None]
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
        try:
            self.writer = imageio.get_writer(self.part, fps=fps, codec="libx264", quality=7, macro_block_size=2,
                                             ffmpeg_log_level="quiet",
                                             output_params=["-preset", "veryfast", "-movflags", "+faststart"])
        except (ImportError, ValueError):
            raise UserError(f"{path}: imageio cannot write .mp4 files here: pip install 'imageio[ffmpeg]'") from None

    def append(self, frame):
        """One frame, uint8 (H, W, 3)."""
        try:
            self.writer.append_data(frame)
        except OSError:                                 # ffmpeg has gone, and its reason with it
            raise UserError(f"{self.path}: writing stopped after {self.count} frames; is the disk full?") from None
        self.count += 1

    def readable(self):
        """Frames that can be read back: a failed encoding is silent."""
        import imageio_ffmpeg
        return imageio_ffmpeg.count_frames_and_secs(self.part)[0]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.writer.close()
            if kind is None and self.readable() == self.count:
                os.replace(self.part, self.path)
            elif kind is None:
                raise OSError(0, "not all frames can be read back")
        except (OSError, RuntimeError) as e:
            if kind is None:
                raise UserError(f"{self.path}: cannot be written ({getattr(e, 'strerror', None) or 'damaged'}); is the "
                                "disk full, or the folder not writable?") from None
        finally:
            self.part.unlink(missing_ok=True)


def check_output(path, image):
    """Refuse a path for output that cannot be right."""
    for wrong, what in ((path.suffix != ".mp4", "the name must end in .mp4"),
                        (not os.path.isdir(path.parent), f"there is no folder {path.parent}"),
                        (not os.access(path.parent, os.W_OK), f"the folder {path.parent} is not writable"),
                        (os.path.isdir(path), "is a folder"),
                        (os.path.realpath(path) == os.path.realpath(image), "would replace the input image")):
        if wrong:
            raise UserError(f"{path}: {what}; choose another name")


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


# ----------------------------------------------------------------------------------------------------------------------
# What Wan's DiT reads beside latents: a prompt, encoded by UMT5-XXL, and the image, encoded by CLIP. Both run in the
# package `transformers`, which is needed only when something must be encoded, from the folders of a -Diffusers
# repository (text_encoder/ and tokenizer/, image_encoder/). What they return is kept on disk.

UMT5_DIM, CLIP_ROWS = 4096, 257     # of an encoded text, and of an encoded image
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motionstream"
# What Wan's guidance leads away from.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


def kept(keys, folder, encode):
    """Files that each hold what encode(keys) returned for a key, rows (L, C), now or in an earlier run. A file is named
    by the key and by what the encoder's files are called, how large and how old they are."""
    about = [(str(file), file.stat().st_size, file.stat().st_mtime_ns)
             for file in sorted(folder.resolve().rglob("*")) if file.is_file()]
    files = {key: CACHE / f"{hashlib.sha256(repr((about, key)).encode()).hexdigest()[:32]}.safetensors" for key in keys}
    absent = [key for key in keys if not files[key].is_file()]
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        for key, rows in zip(absent, encode(absent) if absent else []):
            write(files[key], lambda part: save_file({"rows": rows.contiguous()}, part))
    except OSError as e:
        raise UserError(f"{CACHE}: cannot be written ({e.strerror}); name another folder in XDG_CACHE_HOME") from None
    gc.collect()                                        # the encoder is gone before the DiT is loaded
    return [*files.values()]


def from_folder(name, folder, part, **options):
    """What transformers calls `name`, from folder/part or else from the folder itself. The network is not asked."""
    source = folder / part if (folder / part).is_dir() else folder
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        return getattr(transformers, name).from_pretrained(source, local_files_only=True, **options)
    except ImportError:
        raise UserError(f"{folder}: needs one more package, pip install transformers") from None
    except Exception as e:                              # of a dozen kinds
        raise UserError(f"{source}: no {name} can be loaded ({str(e).strip().splitlines()[0][:120]}); give the folder "
                        f"of a -Diffusers repository, which holds {part}/") from None


def load_encoder(name, folder, part, device):
    """An encoder in the dtype of its files, all of whose tensors are there."""
    encoder, about = from_folder(name, folder, part, torch_dtype="auto", output_loading_info=True)
    if about["missing_keys"]:
        raise UserError(f"{folder}: {len(about['missing_keys'])} tensors of {name} are missing, download it again")
    return encoder.to(device).eval()


@torch.inference_mode()
def encode_texts(prompts, folder, length, device):
    """Prompts to rows (L, 4096), one a token, the end of the sentence included. Cleaned as Wan does: mended by ftfy if
    that is installed, HTML entities resolved, white space collapsed. Padding, being masked, would change nothing."""
    with contextlib.suppress(ImportError):
        import ftfy
        prompts = [ftfy.fix_text(prompt) for prompt in prompts]
    prompts = [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts]
    encoder = load_encoder("UMT5EncoderModel", folder, "text_encoder", device)
    table = encoder.encoder.embed_tokens.weight         # some versions of transformers leave it empty
    if not table.any() or not table.equal(encoder.shared.weight):
        raise UserError(f"{folder}: its table of tokens is empty once loaded, pip install -U transformers")
    tokenizer = from_folder("AutoTokenizer", folder, "tokenizer")
    tokens = [tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt") for prompt in prompts]
    return [encoder(t.input_ids.to(device), t.attention_mask.to(device)).last_hidden_state[0].cpu() for t in tokens]


@torch.inference_mode()
def encode_image(image, folder, device):
    """An image (1, 3, H, W) in [-1, 1] to CLIP's features (257, C): its last layer but one, of the image squeezed to
    224x224 as in Wan."""
    encoder = load_encoder("CLIPVisionModel", folder, "image_encoder", device)
    statistics = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    mean, std = statistics.view(2, 3, 1, 1)
    x = (F.interpolate(image / 2 + 0.5, (224, 224), mode="bicubic") - mean) / std
    return encoder(x.to(device, encoder.dtype), output_hidden_states=True).hidden_states[-2][0].cpu()


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


def read_encoded(args, c, image, device):
    """(text, null_text, clip), each (1, L, channels) or None. null_text is what guidance leads away from."""
    if c.text_dim != UMT5_DIM:
        return embed_words(c.prompt if args.prompt is None else args.prompt, c), None, None
    text, null, clip = args.prompt_embeds, args.negative_embeds, args.clip_embeds
    if args.prompt is not None:
        prompts = [args.prompt] if c.causal or null else [args.prompt, NEGATIVE_PROMPT]
        files = kept(prompts, args.text_encoder,
                     lambda absent: encode_texts(absent, args.text_encoder, c.text_len, device))
        text, null = files[0], null if len(files) == 1 else files[1]
    if c.clip_dim and not clip:
        key = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        clip, = kept([key], args.image_encoder, lambda _: [encode_image(image, args.image_encoder, device)])
    if text is None:
        print("note: no text at all, which Wan did not see in training; give --prompt or --prompt-embeds")
    elif null is None and not c.causal and c.guidance[0]:
        print("note: guidance leads away from rows of zeros; give --negative-embeds, Wan's negative prompt")
    text, null = (load_rows(path, 1, c.text_len, UMT5_DIM) if path else None for path in (text, null))
    return text, null, load_rows(clip, CLIP_ROWS, CLIP_ROWS, c.clip_dim) if clip else None


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


def parse_flags(argv):
    """The command line. Flags with argparse.SUPPRESS are only there if given; the model's own value holds otherwise."""
    parser = Parser(description="One image and some tracks in, a video out.", allow_abbrev=False)
    file, given = {"type": Path, "metavar": "FILE"}, {"default": argparse.SUPPRESS, "metavar": "N"}
    add = parser.add_argument_group("in and out").add_argument
    add("--image", required=True, help="first frame, any picture file", **file)
    add("--tracks", help=".npz or .npy, see the top of sample.py; default: none", **file)
    add("--prompt", metavar="TEXT", help="what the image and the tracks do not say; default: the model's own")
    add("--out", default=Path("out.mp4"), help="ends in .mp4 (default: %(default)s)", **file)
    add("--frames", type=number(int, 1, MOST_FRAMES), metavar="N", help="default: those of the tracks, or 81")
    add("--fps", type=number(float, 0.1, 1000), metavar="F", help="frames per second of the file; default: the model's")
    add("--overlay", action="store_true", help="draw the tracks on the video")
    add = parser.add_argument_group("model").add_argument
    add("--weights", help="a Wan DiT, file or folder; default: the tiny model in assets/", **file)
    add("--vae", help="default: the tiny model's, or the one in the folder of --weights", **file)
    add("--text-encoder", help="folder with Wan's text_encoder/ and tokenizer/; needs transformers", **file)
    add("--image-encoder", help="folder with Wan's image_encoder/, for weights that read CLIP", **file)
    add("--device", default="auto", help="cpu, cuda, …; default: cuda if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model; default: float32 on the CPU, else bfloat16")
    add = parser.add_argument_group("encoded before, each the one tensor of a .safetensors file").add_argument
    add("--prompt-embeds", help="the prompt's rows (L, 4096)", **file)
    add("--negative-embeds", help="rows of what guidance leads away from", **file)
    add("--clip-embeds", help="the image's rows (257, 1280)", **file)
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=("stream", "teacher"), help="default: what the weights are")
    add("--control", choices=("sinusoid", "rgb"), help="tracks by the trained head, or drawn if there is none")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N", help="of all noise (default: %(default)s)")
    add("--steps", type=number(int, 1, 1000), metavar="N", help="noise levels per chunk; default: the model's")
    add = parser.add_argument_group("only --sampler stream; defaults are the model's").add_argument
    add("--chunk", type=number(int, 1, 1000), help="latent frames generated together", **given)
    add("--sink", type=number(int, 0, 10 ** 6), help="chunks from the start that are remembered for ever", **given)
    add("--window", type=number(int, 0, 10 ** 6), help="latest chunks that are remembered besides", **given)
    add = parser.add_argument_group("only --sampler teacher; guidance as in eq. 2, both 0: none").add_argument
    add("--w-text", type=number(float, 0, 100), help="weight of the text; default: the model's", **given)
    add("--w-motion", type=number(float, 0, 100), help="weight of the tracks; default: the model's", **given)
    return parser.parse_args(argv)


class Weights(NamedTuple):
    """What a weights file tells before it is loaded."""
    path: Path
    config: Config
    own: bool       # written by this project: its config says how it is sampled
    head: bool      # holds a track head that is not all zeros


@contextlib.contextmanager
def user_errors():
    """What is wrong with a file of weights, as what the user can put right."""
    try:
        yield
    except ValueError as e:
        raise UserError(str(e).splitlines()[0]) from None


@user_errors()
def inspect(path):
    """Weights, from the names and shapes in a file or folder."""
    tensors, metadata, file = read_weights(path)
    config, head = find_config(tensors, metadata, file), tensors.get("track_head.conv.weight")
    return Weights(path, config, metadata.get("format") == "motionstream", head is not None and bool(head.any()))


# How public weights are sampled, whose files do not say it. Teachers: shift and text guidance, by width and by whether
# the image enters as channels, as their publishers advise for 480 lines; (5, 5) for all others.
TEACHERS = {(1536, False): (8.0, 6.0), (1536, True): (3.0, 6.0), (5120, True): (3.0, 5.0)}


def settle(args, weights, frames):
    """The config to sample with: the weights' own or their family's, changed by the flags. Fills in --sampler and
    --control; refuses flags that these weights have no use for, and conditions that they lack."""
    c, own = weights.config, weights.own
    sampler = "stream" if c.causal else "teacher"
    args.sampler = args.sampler or sampler
    args.control = args.control or ("sinusoid" if weights.head or c.track_dim != c.out_dim else "rgb")
    streams, text = args.sampler == "stream", args.prompt_embeds or args.prompt is not None or c.text_dim != UMT5_DIM
    if not own:
        shift, w_text = TEACHERS.get((c.dim, c.image_dim > 0), (5.0, 5.0))
        c = replace(c, **SELF_FORCING if streams else {"causal": False, "shift": shift, "guidance": (w_text, 0.0)})
    if args.steps:
        c = replace(c, steps=args.steps, sigmas=schedule(args.steps, c.shift))
    w_text = getattr(args, "w_text", c.guidance[0] if text else 0.0)
    c = replace(c, guidance=(w_text, getattr(args, "w_motion", c.guidance[1])))
    c = replace(c, **{flag: getattr(args, flag) for flag in ("chunk", "sink", "window") if flag in args})
    refuse(args, weights, c, frames, [
        (own and args.sampler != sampler, f"holds a {'student' if c.causal else 'teacher'}, use --sampler {sampler}"),
        *((flag in args, f"--{flag.replace('_', '-')} belongs to --sampler {'teacher' if streams else 'stream'}")
          for flag in (("w_text", "w_motion") if streams else ("chunk", "sink", "window"))),
    ])
    if not own:
        how = "as Self-Forcing" if streams else f"shift {c.shift:g}, text guidance {c.guidance[0]:g}"
        print(f"note: {weights.path} does not say how it is sampled: {args.sampler}, {how}")
    if not (own or c.image_dim or c.out_dim == 48):
        print(f"note: {weights.path} never learned to take an image; it enters as a clean first latent, at sigma 0")
    if args.tracks and args.control == "rgb":
        print("note: the tracks are drawn as a control video, in a style that is ours and that no weights have proven")
    return c


def refuse(args, weights, c, frames, wrong):
    """Raise UserError for the first of `wrong` and of what follows, (condition, what to do), that is true."""
    streams, drawn, umt5 = args.sampler == "stream", args.control == "rgb", c.text_dim == UMT5_DIM
    negative, no_text = args.negative_embeds, not args.prompt_embeds and args.prompt is None
    for condition, cure in [
        *wrong,
        (streams and c.window is None and frames > HISTORY and "window" not in args,
         f"trained to remember {HISTORY} frames, all of them; add --sink 1 --window 5 for more"),
        (streams and has_mask(c), "takes the image as a clip with a mask, which cannot stream; use --sampler teacher"),
        (streams and negative, "--negative-embeds belongs to --sampler teacher"),
        (not c.track_dim and (args.tracks or "w_motion" in args),
         "has no input for tracks; take Fun-Control, or drop --tracks, --w-motion"),
        (args.tracks and drawn and c.track_dim != c.out_dim,
         f"takes no drawn tracks, its input for them has {c.track_dim} channels; drop --control"),
        (args.tracks and not drawn and not weights.head, "has no trained track head; --control rgb draws the tracks"),
        (not umt5 and (args.prompt_embeds or negative or args.text_encoder), "reads words, give it --prompt alone"),
        (umt5 and not no_text and args.prompt_embeds and args.prompt is not None, "give --prompt or --prompt-embeds"),
        (umt5 and args.prompt is not None and not args.text_encoder,
         "--prompt needs --text-encoder DIR, or encode it elsewhere and give --prompt-embeds FILE"),
        (umt5 and no_text and (negative or "w_text" in args), "there is no text; give --prompt or --prompt-embeds"),
        (c.clip_dim and not (args.clip_embeds or args.image_encoder),
         "reads the image by CLIP too; give --image-encoder DIR or --clip-embeds FILE"),
        (not c.clip_dim and (args.clip_embeds or args.image_encoder),
         "has no image branch, drop --clip-embeds and --image-encoder"),
        *((folder and not folder.is_dir(), f"there is no folder {folder}")
          for folder in (args.text_encoder, args.image_encoder)),
    ]:
        if condition:
            raise UserError(f"{weights.path}: {cure}")


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
    """The DiT, the VAE and what the DiT reads beside latents and tracks: (text, null_text, clip)."""
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


def write_video(video, frames, total, motion, factor):
    """Write `total` frames, enlarged by `factor`, to a Video while they come; with the tracks of `motion`, unless it is
    None, drawn on them. Returns the signals that ended it early."""
    started = time.perf_counter()
    frames = itertools.chain([next(frames)], frames)    # the first one now: from there on Ctrl-C keeps what there is
    first_after = time.perf_counter() - started
    with hold_signals() as noted:
        for i, frame in enumerate(tqdm(frames, total=total, unit=" frames", disable=None)):
            frame = enlarge(frame, factor)
            if motion is not None:
                recent = slice(max(i + 1 - TRAIL, 0), i + 1)
                frame = draw_tracks(frame, motion.tracks[0, recent].numpy(), motion.visible[0, recent].numpy(), factor)
            video.append(frame)
            if noted:
                break
    seconds = time.perf_counter() - started
    print(f"{video.count} of {total} frames in {seconds:.2f} s, {video.count / seconds:.1f} frames/s, the first after "
          f"{first_after:.2f} s")
    return noted


def run(argv):
    """The program. Returns the exit code."""
    args = parse_flags(argv)
    image, frames = load_image(args.image), args.frames or DEFAULT_FRAMES
    *arrays, tracks_fps = np.zeros((frames, 0, 2), np.float32), np.zeros((frames, 0), bool), None, None
    if args.tracks:
        *arrays, tracks_fps = load_tracks(args.tracks, image.size)
    else:
        print("note: no --tracks, nothing is specified")
    frames = args.frames or len(arrays[0])
    check_output(args.out, args.image)
    tiny = ASSETS / ("tiny_teacher.safetensors" if args.sampler == "teacher" else "tiny.safetensors")
    weights = inspect(args.weights or tiny)
    config = settle(args, weights, frames)
    factor, pixels = math.ceil(SHORTEST_SIDE / min(config.size)), fit_image(image, config.size)
    motion = fit_tracks(arrays, image.size, frames, config, args.seed)
    if tracks_fps and tracks_fps != config.fps:
        print(f"note: the tracks are at {tracks_fps:g} frames/s, the model at {config.fps}; they are not resampled")
    with Video(args.out, args.fps or config.fps) as video:
        pictures = generate(args, frames, pixels, motion, *load_models(args, weights, config, pixels))
        noted = write_video(video, pictures, frames, motion if args.overlay else None, factor)
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
