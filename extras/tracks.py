"""Tracks from other programs, cameras from depth, tracks drawn on pictures.

    python -m extras.tracks FILE --image x.png --out t.npz              another program's file
    python -m extras.tracks --image x.png --drag "9,9 -> 40,9" --out t.npz
    python -m extras.tracks --image x.png --depth d.npy --camera right:0.3 --out t.npz

writes an unambiguous file for --tracks of sample.py.

Array names decide how a file is read; shapes and values only reject it; nothing is transposed,
scaled or swapped on a guess. Sizes are checked before allocation, and no pickle is loaded. Shapes:
tracks (T, N, 2), x to the right and y down, in pixels of a picture; visible (T, N) bool.
"""

import argparse
import codecs
import contextlib
import io
import json
import math
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from extras.refusals import part_in_words
from motionstream import UserError, naming, write_file

LIMIT = 2 ** 30             # bytes of a file, unpacked, and of each of its arrays as float32
LONGEST = 1_000_000         # axis of an array: frames
MOST = 20_000               # tracks
LIMIT_TEXT = 2 ** 25        # bytes; parsed into Python lists, 20 times as much
TRAIL = 12                  # frames in a drawn track's trail
POSITIONS = {               # arrays by name: order of the axes; pixels or fractions of the picture
    "tracks": ("tn", "px"), "pred_tracks": ("tn", "px"), "track_path": ("tn", "px"),
    "track_points": ("tn", "01"), "points": ("nt", "01"), "array": ("nt", "px")}
VISIBLE = ("visibility", "pred_visibility", "track_visibility", "visibles")
HIDDEN = ("occluded", "occlusion")
OTHERS = ("width", "height", "fps", "ids", "track_ids", "start", "format")
KNOWN = tuple(POSITIONS) + VISIBLE + HIDDEN + OTHERS
CURE = "damaged, or not numbers; write it with numpy.savez(path, tracks=tracks), (T, N, 2) float32"
TOOL = "python -m extras.tracks"            # the program whose flags messages name


# --------------------------------------------------------------------------------------------------
# Arrays from untrusted files. Any fault raises some exception: call this within `naming`.

def read_file(path):
    """Read a file: ("npy", "npz" or "json", arrays by name, None for names that are not KNOWN). An
    .npy file, or a single tensor of torch.save, is named tracks. ATI's .pth holds the bytes of an
    .npz file, wrapped by torch."""
    with open(path, "rb") as file:
        head = file.read(6)
        if head == np.lib.format.MAGIC_PREFIX:
            return "npy", {"tracks": read_npy(file)}
    is_zip = head[:2] == b"PK"
    if not is_zip and head[:1] != b"\x80":              # nor a pickle
        return "json", read_json(path)
    check_unpacked(path)
    if is_zip and not any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()):
        return "npz", read_arrays(path)
    packed = None
    quiet = warnings.catch_warnings(action="ignore")    # they advise unpickling
    with contextlib.suppress(Exception), quiet:
        packed = torch.load(path, map_location="cpu", weights_only=True)
    if packed is None:
        raise UserError("is a pickle, which may run code and is not opened; docs/tracks.md says "
                        "how to make an .npz of it")
    if isinstance(packed, bytes):
        return "npz", read_arrays(io.BytesIO(packed))
    if torch.is_tensor(packed):
        return "npy", {"tracks": to_array("tracks", packed)}
    if not isinstance(packed, dict) or not packed:
        raise UserError(f"holds a {type(packed).__name__}; save what it holds by name: "
                        'torch.save({"tracks": tracks, "visibility": visibility}, path)')
    arrays = {}
    for name, value in packed.items():
        arrays[name] = to_array(name, value) if name in KNOWN else None
    return "npz", arrays


def to_array(name, value):
    """A tensor or a number from a torch.save file, as an array."""
    if isinstance(value, (int, float, str)):
        return np.asarray(value)
    if not torch.is_tensor(value) or value.layout != torch.strided or value.is_quantized:
        raise UserError(f"{name} is a {type(value).__name__}, and no plain tensor")
    check_size(tuple(value.shape), value.itemsize)      # its shape may claim more than is there
    if value.dtype == torch.bfloat16:
        value = value.float()
    return value.detach().numpy()


def decode_text(data):
    """Decode the bytes of a text file: UTF-8, with or without a byte order mark, or UTF-16 with
    one. UserError for anything else."""
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
        if "\0" in text:                    # UTF-16 without its mark, or UTF-32
            raise ValueError("it has zeros in it")
        return text
    except ValueError as e:
        raise UserError(f"is no text in UTF-8 or, with a byte order mark, in UTF-16 ({e}); save it "
                        "as UTF-8") from None


def check_unpacked(file):
    """UserError if a file, a path or a whole file in memory, is too large, packed or unpacked."""
    if isinstance(file, io.BytesIO):
        size = len(file.getbuffer())
    else:
        size = file.stat().st_size
    with contextlib.suppress(Exception):    # not a zip file, or damaged: the reader reports it
        entries = zipfile.ZipFile(file).infolist()
        size = max(size, sum(entry.file_size for entry in entries))
    if size > LIMIT:
        raise UserError(f"unpacks to {size / 2 ** 30:.1f} GiB, at most {LIMIT / 2 ** 30:.0f}")


def check_size(shape, itemsize):
    """UserError if an array is too large, before it is allocated."""
    if max(shape, default=0) > LONGEST or math.prod(shape) * max(itemsize, 4) > LIMIT:
        raise UserError(f"has an array of {shape}, at most {LONGEST} a side and "
                        f"{LIMIT / 2 ** 30:g} GiB are read")


def read_npy(file):
    """The array in an open .npy file."""
    numpy = np.lib.format                   # the functions
    with warnings.catch_warnings(action="ignore"):      # about headers by Python 2
        file.seek(0)
        read_header = numpy.read_array_header_2_0
        if numpy.read_magic(file) == (1, 0):
            read_header = numpy.read_array_header_1_0
        shape, _, dtype = read_header(file)
        check_size(shape, dtype.itemsize)
        file.seek(0)
        return numpy.read_array(file, allow_pickle=False)


def read_arrays(file):
    """The arrays of an .npz file, a path or in memory, by name: None if it is not in KNOWN."""
    check_unpacked(file)
    arrays = {}
    with zipfile.ZipFile(file) as entries:
        for entry in entries.infolist():
            name = entry.filename.removesuffix(".npy")
            if name in arrays:                  # numpy takes the last
                raise UserError(f"holds {name} twice; save it once")
            if name not in KNOWN:
                arrays[name] = None
                continue
            with entries.open(entry) as array:
                arrays[name] = read_npy(array)
    return arrays


def read_json(path):
    """Arrays by name from {"tracks": ..., "width": ...}, or tracks alone, see read_paths."""
    with open(path, "rb") as file:
        data = file.read(LIMIT_TEXT + 1)
    if len(data) > LIMIT_TEXT:
        raise UserError("is no .npy or .npz file, and of others at most "
                        f"{LIMIT_TEXT / 2 ** 20:.0f} MiB are read")
    given = parse(decode_text(data))
    if not isinstance(given, dict):
        given = {"tracks": given}
    arrays = {name: np.asarray(value) for name, value in given.items() if name in KNOWN[1:]}
    unknown = dict.fromkeys(given.keys() - arrays.keys())
    if "tracks" in given:
        arrays["tracks"] = read_paths(given["tracks"])
    return unknown | arrays


def read_paths(paths):
    """Tracks as lists of points, {"x": x, "y": y}, [x, y] or null, or one such list, to (N, T, 2):
    NaN for null and after the end of shorter tracks. Each list may itself be JSON text."""
    paths = parse(paths)
    first = next((point for point in paths if point is not None), None)
    is_pair = isinstance(first, list) and first and isinstance(first[0], (int, float))
    if isinstance(first, dict) or is_pair:  # one track alone
        paths = [paths]
    paths = [parse(path) for path in paths]
    longest = max(map(len, paths))
    check_size((len(paths), longest, 2), 8)
    tracks = np.full((len(paths), longest, 2), np.nan)
    for n, path in enumerate(paths):
        if path:
            tracks[n, :len(path)] = read_points(path, n)
    return tracks


def read_points(path, number):
    """One track of a JSON file, a list of T points, to (T, 2)."""
    points = []
    for point in path:
        if isinstance(point, dict):
            point = [point["x"], point["y"]]
        elif point is None:
            point = [math.nan, math.nan]
        points.append(point)
    points = np.array(points)
    if points.shape != (len(path), 2) or points.dtype.kind not in "if":
        raise UserError(f"track {number} is no list of points, each "
                        '{"x": x, "y": y}, [x, y] or null')
    return points


def parse(text):
    """Parse JSON, tolerating single quotes; values other than text are returned as they are."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.replace("'", '"'))


# --------------------------------------------------------------------------------------------------
# Files of tracks.

def load_tracks(path, size, layout="auto", units="auto", own_size=None, visibility=None,
                frames=None):
    """Load a tracks file for an image of `size` (width, height), as a dict: tracks (T, N, 2)
    float32 in pixels of that image, finite, visible (T, N) bool, ids (N,) and fps, None if the file
    lacks them.

    To resolve ambiguous files: layout "tn" or "nt"; units "px" or "01"; own_size (width, height) of
    the picture that the tracks refer to; visibility, another file; frames, the expected number,
    which may reveal swapped axes. Raises UserError, naming the file and the flag."""
    with naming(path, CURE):
        kind, arrays = read_file(path)
    beside = visibility
    if kind == "npy" and not visibility:
        beside = find_visibility(path)
    if beside:
        arrays["visibility"] = read_visibility(beside, path, arrays)
    with naming(path, CURE), np.errstate(all="ignore"):         # overflow has its own message
        if str(arrays.get("format")) == "motionstream":     # written here: unambiguous
            layout = layout.replace("auto", "tn")
            units = units.replace("auto", "px")
        tracks, seen, order, unit = by_name(arrays, kind)
        there = picture_of(arrays, size, own_size)
        tracks, seen = arrange(tracks, seen, order if layout == "auto" else layout)
        told = seen is not None and "visibles" not in arrays    # TAPIR's are (N, T) too
        tracks, visible = check_tracks(tracks, seen, there, unit if units == "auto" else units)
        if units == "auto":
            doubt_tracks(tracks, visible, there, unit)
        if layout == "auto" and order == "tn" and not told:
            doubt_order(tracks, visible, frames)
        ids = arrays.get("ids", arrays.get("track_ids"))
        if ids is not None:
            check_ids(ids, tracks.shape[1])
        scale = (np.array(size) / there).astype(np.float32)
        fps = positive("fps", arrays.get("fps"))
        return {"tracks": tracks * scale, "visible": visible, "ids": ids, "fps": fps}


def find_visibility(path):
    """The visibility file that other programs write beside an .npy file of tracks, if it exists."""
    for name in path.name.replace("tracks", "visibility"), f"{path.stem}_visibility.npy":
        beside = path.with_name(name)
        if name != path.name and beside.is_file():
            print(f"note: {path}: visibility is read from {beside}")
            return beside


def read_visibility(file, path, arrays):
    """The array in a visibility file, for the tracks at `path`, which hold `arrays`."""
    with naming(file, "damaged, or no .npy file of 0 and 1, (T, N)"), open(file, "rb") as opened:
        if {"array", *VISIBLE, *HIDDEN} & arrays.keys():
            raise UserError(f"{path} has a visibility of its own; drop --visibility")
        return read_npy(opened)


def positive(name, value):
    """A file's positive number, None if it has none."""
    if value is None:
        return None
    if value.size != 1 or not 0 < value.item() < math.inf:
        given = np.array2string(value, threshold=4)
        raise UserError(f"{name} must be one positive number, it is {given}")
    return value.item()


def picture_of(arrays, size, own_size=None):
    """(width, height) of the picture that a file's tracks refer to: from the file, else `own_size`
    of --size, else `size`."""
    usual = own_size or size
    width = positive("width", arrays.get("width")) or usual[0]
    height = positive("height", arrays.get("height")) or usual[1]
    if own_size and (width, height) != own_size:
        raise UserError(f"says that it is for a picture of {width:g}x{height:g}; drop --size")
    return width, height


def by_name(arrays, kind):
    """(positions, visibility or None, order of the axes, unit), by the names of a file's arrays."""
    hidden = [name for name in HIDDEN if name in arrays]
    seen = hidden + [name for name in VISIBLE if name in arrays]
    found = [name for name in POSITIONS if name in arrays and (hidden or name != "points")]
    if not found:
        raise UserError(f"has no array named tracks, only: {', '.join(arrays)}"[:200])
    if len(found) > 1 or len(seen) > 1 or found == ["array"] and seen:
        raise UserError(f"holds {', '.join(found + seen)}: which are meant? Save those alone")
    positions = arrays[found[0]]
    order, unit = POSITIONS[found[0]]
    if positions.dtype.kind not in "iuf" or positions.dtype.itemsize > 8:
        raise UserError(f"{found[0]} are {positions.dtype} {positions.shape}, expected numbers "
                        "(T, N, 2)")
    if found == ["array"]:
        arrays.setdefault("fps", np.array(24))          # ATI's frame rate
        positions, visibility = from_ati(positions)
        return positions, visibility, order, unit
    if hidden or kind == "json":
        order = "nt"
    visibility = None
    if hidden:
        visibility = 1 - arrays[seen[0]]
    elif seen:
        visibility = arrays[seen[0]]
    return positions, visibility, order, unit


def from_ati(array):
    """ATI's (N, T, 1, 3), x, y and visibility in eighths of a pixel, to (N, T, 2) and (N, T)."""
    if array.ndim != 4 or array.shape[2] != 1 or array.shape[3] not in (3, 4):
        raise UserError(f"array is {array.shape}, expected (N, T, 1, 3), as ATI writes it")
    scale = array[..., 2].max()
    if scale not in (1, 8):
        raise UserError(f"visibility, the third channel of array, reaches {scale}, expected 8, as "
                        "ATI writes it, or 1")
    array = array[:, :, 0].astype(np.float32) / np.float32(scale)
    return array[..., :2], array[..., 2]


def arrange(tracks, visibility, order):
    """Rearrange arrays in `order`, "tn" or "nt", to (T, N, 2) and (T, N) or None. A leading 1 is a
    batch of one; (T, 2) is one track; a third channel of only 0 and 1 is visibility."""
    if tracks.ndim == 4 and len(tracks) == 1:
        tracks = tracks[0]
    if visibility is not None:
        while visibility.ndim > 2 and len(visibility) == 1:
            visibility = visibility[0]
        if visibility.ndim == 3 and visibility.shape[2] == 1:
            visibility = visibility[..., 0]
    elif tracks.ndim == 3 and tracks.shape[2] == 3:
        third = tracks[..., 2]
        if third.any() and np.isin(third, (0, 1)).all():
            tracks = tracks[..., :2]
            visibility = third
    if tracks.ndim == 2:
        tracks = tracks[:, None]
        if visibility is not None and visibility.ndim == 1:
            visibility = visibility[:, None]
        return tracks, visibility
    if order == "nt" and tracks.ndim == 3:
        tracks = tracks.swapaxes(0, 1)
        if visibility is not None:
            visibility = visibility.T
    return tracks, visibility


def check_tracks(tracks, visibility, size, unit="px"):
    """Check tracks (T, N, 2): to float32, finite, in pixels, and visible (T, N) bool, from the
    file's visibility, else True where the position is not NaN. unit: "px" or "01", fractions of a
    picture of `size` (width, height). UserError for impossible values."""
    shape = tracks.shape
    if tracks.dtype.kind not in "iuf" or tracks.ndim != 3 or shape[2] != 2 or 0 in shape:
        raise UserError(f"tracks are {tracks.dtype} {shape}, expected numbers (T, N, 2): frames, "
                        "tracks, x and y")
    if shape[0] > LONGEST or shape[1] > MOST:
        raise UserError(f"tracks have shape {shape}, at most {LONGEST} frames and {MOST} tracks "
                        "are read")
    if visibility is not None and visibility.shape != shape[:2]:
        raise UserError(f"visibility has shape {visibility.shape}, expected {shape[:2]}, as tracks "
                        f"are {shape}")
    tracks = tracks.astype(np.float32)
    if visibility is None:
        visibility = ~np.isnan(tracks).any(-1)
    if not ((visibility >= 0) & (visibility <= 1)).all():
        raise UserError("visibility must lie in 0..1; are these logits? Save visibility > 0")
    if not np.isin(visibility, (0, 1)).all():
        print("note: visibility is read as probabilities, visible is > 0.5")
    visible = visibility > 0.5
    wrong = np.argwhere(visible & ~(abs(tracks) < 1e6).all(-1))
    if len(wrong):
        frame, track = wrong[0]
        raise UserError(f"{len(wrong)} visible points are NaN, infinite or beyond a million "
                        f"pixels, the first is frame {frame} of track {track}; set their "
                        "visibility to 0")
    if unit == "01":
        farthest = abs(tracks[visible]).max(initial=0)
        if farthest > 1.5:
            raise UserError(f"positions reach {farthest:g} and must be shares of the picture, "
                            f"0..1; if they are pixels: {TOOL} --units px")
        tracks = tracks * np.float32(size)
    return np.nan_to_num(tracks).clip(-1e6, 1e6), visible


def check_ids(ids, count):
    """UserError unless ids are one integer in [0, 2**32) for each of `count` tracks."""
    whole = ids.dtype.kind in "iu" and ids.shape == (count,)
    if not whole or ids.min() < 0 or ids.max() >= 2 ** 32:
        raise UserError(f"ids are {ids.dtype} {ids.shape}, expected a whole number below 2**32 for "
                        "each track")


def doubt_tracks(tracks, visible, size, unit):
    """UserError if tracks in pixels are unlikely to be of a picture of `size` (width, height)."""
    farthest = abs(tracks[visible]).max(initial=0)
    if unit == "px" and visible.any() and farthest <= 1:
        raise UserError("all positions lie in [-1, 1] and must be pixels; if they are shares of "
                        f"the picture, 0..1: {TOOL} --units 01")
    start = tracks[0][visible[0]]                       # (n, 2)
    outside = ((start < 0) | (start > size)).any(1).sum()
    if 2 * outside <= len(start):
        return
    turned = start[:, ::-1]
    turned_outside = ((turned < 0) | (turned > size)).any(1).sum()
    cure = f"if they are for another: {TOOL} --size WxH; if they are right: --units px"
    if 2 * turned_outside <= len(start):
        cure = "is the order y, x? Then save tracks[..., ::-1]"
    raise UserError(f"{outside} of {len(start)} points of frame 0 lie outside the picture of "
                    f"{size[0]:.0f}x{size[1]:.0f} pixels: {cure}")


def doubt_order(tracks, visible, frames):
    """UserError if tracks look like (N, T, 2): a heuristic for ambiguous files, not a proof.
    frames: the expected number, or None."""
    T, N = visible.shape
    part = np.where(visible[..., None], tracks, math.nan)[:999, :999]
    in_time = usual_step(part, 0)
    across = usual_step(part, 1)
    doubts = [
        (T < 5 <= N, f"they have {T} frames"),
        (5 <= N == frames != T, f"--frames is {N}"),
        (min(T, N) >= 3 and in_time > max(1, 10 * across), "they jump from frame to frame"),
    ]
    for doubtful, why in doubts:
        if doubtful:
            raise UserError(f"shape {tracks.shape} looks like (N, T, 2), as {why}: {TOOL} --layout "
                            "nt, or tn if it is right")


def usual_step(tracks, axis):
    """The median distance between visible neighbours along an axis of (T, N, 2), NaN for none."""
    steps = np.linalg.norm(np.diff(tracks, axis=axis), axis=-1)
    steps = steps[~np.isnan(steps)]
    return np.median(steps) if steps.size else math.nan


def write_tracks(path, arrays):
    """Write a dict of arrays as an .npz file for --tracks of sample.py, atomically: `tracks`
    (T, N, 2) float32 in pixels of a picture of `width` and `height`, `visibility` (T, N) bool, and
    optional ones. Its format marks it as written here, so it is read without heuristics."""
    data = io.BytesIO()
    np.savez(data, format="motionstream", **arrays)
    write_file(path, lambda part: part.write_bytes(data.getbuffer()))


# --------------------------------------------------------------------------------------------------
# Points that are dragged.

def read_path(text):
    """Parse points of the image, "x,y -> x,y -> …", to (P, 2)."""
    point = r"\s*-?\d{1,6}(\.\d*)?\s*,\s*-?\d{1,6}(\.\d*)?\s*"
    if not re.fullmatch(f"{point}(->{point})*", text):
        raise UserError(f"--drag, --pin: {text!r} is not x,y -> x,y in pixels of the image")
    numbers = re.findall(r"-?[\d.]+", text.replace("->", " "))
    return np.array(numbers, float).reshape(-1, 2)


def read_grid(text):
    """Parse "3x20", 3x3 points 20 pixels apart, to offsets (9, 2) from the centre."""
    found = re.fullmatch(r"([1-9]\d?)x([1-9]\d{0,3})", text)
    if not found:
        raise UserError(f"--grid: {text!r} is not like 3x20, 3x3 points 20 pixels apart")
    side = int(found[1])
    apart = int(found[2])
    axis = (np.arange(side) - (side - 1) / 2) * apart
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def follow(paths, frames):
    """Tracks (frames, N, 2) float32 along N paths of points (P, 2), with equal time per segment; a
    single point is pinned."""
    tracks = np.zeros((frames, len(paths), 2), np.float32)
    for n, points in enumerate(paths):
        times = np.linspace(0, len(points) - 1, frames)
        for axis in 0, 1:
            tracks[:, n, axis] = np.interp(times, range(len(points)), points[:, axis])
    return tracks


def dragged(drags, pins):
    """Yield (flag, text, points (P, 2)) of each text of --drag and then of --pin, lists or None.
    UserError for a drag without an arrow and a pin with one."""
    for text in drags or ():
        if "->" not in text:
            raise UserError(f'--drag {text}: there is no arrow; write "X,Y -> X,Y", or --pin X,Y '
                            "for a point that stays")
        yield "--drag", text, read_path(text)
    for text in pins or ():
        if "->" in text:
            raise UserError(f"--pin {text}: a pinned point stays; write --drag for one that moves")
        yield "--pin", text, read_path(text)


def in_box(x, y, box):
    """True in the box (left, top, right, bottom), whose right and bottom border are outside."""
    left, top, right, bottom = box
    return left <= x < right and top <= y < bottom


def drag_tracks(drags, pins, grid, frames, size, shown):
    """(tracks, visible) of --drag and --pin, see `dragged`, on an image of `size` (width, height),
    in which they start. They may lead out of it, but not into what is cropped of it: outside of the
    part that is shown, (left, top, right, bottom). grid: text for read_grid, points that move along
    with each; or None."""
    whole = (0, 0, size[0], size[1])
    paths = []
    for flag, text, points in dragged(drags, pins):
        x, y = points[0]
        if not in_box(x, y, whole):
            raise UserError(f"{flag} {x:g},{y:g}: outside the image, which has {size[0]}x{size[1]} "
                            "pixels")
        for x, y in points:
            if in_box(x, y, whole) and not in_box(x, y, shown):
                raise UserError(f"{flag} {text}: {x:g},{y:g} lies in what is cropped of the image; "
                                f"the video shows {part_in_words(shown)}")
        paths.append(points)
    if grid:
        paths = [points + offset for points in paths for offset in read_grid(grid)]
    tracks = follow(paths, frames)
    return tracks, np.ones(tracks.shape[:2], bool)


# --------------------------------------------------------------------------------------------------
# A moving camera in a static scene of known depth.

MOVES = {                   # argument of `camera`, its value per unit amount, default amount
    "left": ("move", (-1, 0, 0), 0.2),
    "right": ("move", (1, 0, 0), 0.2),
    "up": ("move", (0, -1, 0), 0.2),
    "down": ("move", (0, 1, 0), 0.2),
    "in": ("move", (0, 0, 1), 0.3),
    "out": ("move", (0, 0, -1), 0.3),
    "orbit-left": ("orbit", -1, 15),
    "orbit-right": ("orbit", 1, 15),
    "zoom-in": ("zoom", 1, 1.5),
    "zoom-out": ("zoom", -1, 1.5),
}


def camera_move(text):
    """A flag's type: a camera move (and amount), "right:0.3", to arguments of `camera`."""
    name, _, amount = text.partition(":")
    good = name in MOVES and re.fullmatch(r"(\d{1,3}(\.\d*)?|\.\d+)?", amount)
    if not good or amount and not float(amount):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MOVES)}, with an amount "
                                         "if wanted, right:0.3")
    kind, unit, usual = MOVES[name]
    amount = float(amount or usual)
    if kind != "zoom":
        return {kind: amount * np.array(unit)}
    if amount < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a zoom is so many times, 1 or more")
    return {kind: amount ** unit}


def scene_points(depth, rows, columns, focal):
    """Unproject the pixels at rows and columns of depth (H, W): (n, 3), x to the right, y down and
    z ahead, in the unit of depth."""
    H, W = depth.shape
    x, y = np.meshgrid(columns + 0.5, rows + 0.5)
    z = np.float64(depth[np.ix_(rows, columns)])
    return np.stack([(x - W / 2) * z / focal, (y - H / 2) * z / focal, z], -1).reshape(-1, 3)


def move_camera(scene, move, orbit):
    """Points (n, 3) in the coordinates of a camera translated by `move` and rotated around the
    point ahead at depth 1, `orbit` degrees to the right."""
    pivot = np.array([0, 0, 1])
    cosine = np.cos(np.radians(orbit))
    sine = np.sin(np.radians(orbit))
    turn = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
    return (scene - move - pivot) @ turn + pivot


def nearest_in_cell(xy, z, inside, size, cell):
    """Depth of the nearest point in the square of `cell` pixels around each point (n, 2): a coarse
    z-buffer. size: (height, width) of the picture."""
    H, W = size
    x, y = np.where(inside[:, None], xy // cell, 0).astype(int).T
    number = np.where(inside, y * W + x, H * W)         # points outside share a square of their own
    nearest = np.full(H * W + 1, np.inf)
    np.minimum.at(nearest, number, z)
    return nearest[number]


def camera(depth, frames, move=(0, 0, 0), orbit=0, zoom=1, grid=8, focal=None):
    """Tracks of a static scene of depth (H, W) > 0 under a moving camera: (frames, grid * grid, 2)
    in pixels of depth, and visible, False outside the picture and behind nearer points. By the last
    frame the camera has moved by (x, y, z), to the right, down and ahead, in the unit of depth, has
    orbited the point ahead at depth 1 by `orbit` degrees to the right, and magnifies `zoom` times.
    focal: in pixels; default: the longer side."""
    H, W = depth.shape
    focal = focal or max(H, W)
    count = grid * grid
    step = math.ceil(max(H, W) / 512)                   # resolution of the occluders
    places = (np.arange(grid) + 0.5) / grid
    rows = (places * H).astype(int)
    columns = (places * W).astype(int)
    tracked = scene_points(depth, rows, columns, focal)
    hiding = scene_points(depth, np.arange(0, H, step), np.arange(0, W, step), focal)
    scene = np.concatenate([tracked, hiding])           # (n, 3)
    tracks = []
    visible = []
    slope = None
    for t in np.linspace(0, 1, frames):
        magnified = zoom ** t
        points = move_camera(scene, t * np.array(move), t * orbit)
        z = np.maximum(points[:, 2], 1e-6)              # too near or behind the camera: not visible
        xy = points[:, :2] / z[:, None] * focal * magnified + np.array([W, H]) / 2
        inside = ((xy >= 0) & (xy < (W, H))).all(1) & (points[:, 2] >= z)
        larger = 1                                      # than in frame 0, to leave no holes
        if inside.any():
            larger = max(np.quantile(scene[inside, 2] / z[inside], 0.99) * magnified, 1)
        nearest = nearest_in_cell(xy, z, inside, (H, W), 4 * step * larger)
        if slope is None:
            slope = np.clip(z / nearest, 1, 1.25)       # depth ratio of a surface within a square
        tracks.append(xy[:count])
        seen = inside & (z < 1.05 * slope * nearest)
        visible.append(seen[:count])
    return np.stack(tracks), np.stack(visible)


def read_depth(path):
    """The depth (H, W) in an .npy file, unchanged, or from a grey picture by the common convention:
    1 / brightness, so that bright is near."""
    with open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            depth = read_npy(file)
            if depth.ndim == 3 and len(depth) == 1:
                depth = depth[0]
            return depth
    with Image.open(path) as picture:
        if picture.mode[0] not in "IFL" or picture.mode == "LA":
            picture = picture.convert("RGB")
        grey = np.asarray(picture)
    if grey.ndim == 3:
        if (grey != grey[..., :1]).any():
            raise UserError("is in colour; save depth as .npy, or as a grey picture")
        grey = grey[..., 0]
    if not grey.max() > 0:
        raise UserError("is black")
    print(f"note: {path}: bright is read as near, depth as one over brightness, black 20 times as "
          "far as the brightest")
    return grey.max() / np.maximum(grey, grey.max() / 20)


def load_depth(path, size):
    """Load the depth (H, W) > 0 of an image of `size` (width, height), as multiples of its finite
    median: from an .npy file in any unit, or from a grey picture; any resolution of the image's
    aspect ratio. Raises UserError, naming the file."""
    cure = "damaged, or neither an .npy file of depth (H, W) nor a grey picture"
    with naming(path, cure), np.errstate(all="ignore"):
        depth = read_depth(path)
        if depth.dtype.kind not in "iuf" or depth.ndim != 2 or min(depth.shape) < 2:
            raise UserError(f"depth is {depth.dtype} {depth.shape}, expected numbers (H, W)")
        H, W = depth.shape
        wrong = (~(depth > 0)).sum()
        far = np.isinf(depth)
        if wrong or far.all():
            raise UserError(f"{wrong or depth.size} of {depth.size} depths are not above 0, or all "
                            "are infinite; is it inverse depth? Save 1 / depth, and numpy.inf for "
                            "the sky")
        if abs(W * size[1] - H * size[0]) > W + H:
            raise UserError(f"is {W}x{H}, its image {size[0]}x{size[1]}: not the same shape; "
                            "resize it to the image")
        return np.minimum(depth / np.median(depth[~far]).astype(np.float64), 1000)


def camera_tracks(path, size, frames, grid, move, focal=None):
    """(tracks, visible) of `camera` for an image of `size` (width, height) and a file of its depth.
    move: arguments of `camera`; focal in pixels of the image."""
    depth = load_depth(path, size)
    scale = size[0] / depth.shape[1]
    focal = focal and focal / scale
    tracks, visible = camera(depth, frames, grid=grid, focal=focal, **move)
    return (tracks * scale).clip(-1e6, 1e6).astype(np.float32), visible


# --------------------------------------------------------------------------------------------------
# Tracks drawn on pictures.

def render_tracks(frame, motion, number, factor=1):
    """Draw the visible tracks of a Motion on frame `number` (H, W, 3) of a video, enlarged by
    `factor`: a dot, and a trail that widens towards it, edged in black to be seen on any colour."""
    span = slice(max(number + 1 - TRAIL, 0), number + 1)
    points = motion.tracks[0, span].numpy() * factor                        # (steps, N, 2)
    visible = motion.visible[0, span].numpy()
    visible = visible & visible[-1]
    steps, count = visible.shape
    picture = Image.fromarray(frame)
    pen = ImageDraw.Draw(picture)
    unit = min(picture.size) / 128
    colours = [f"hsv({360 * n / count},90%,100%)" for n in range(count)]
    segments = np.argwhere(visible[:-1] & visible[1:])
    for edge in 2, 0:
        for t, n in segments:
            width = round(unit * (0.5 + (t + 1) / steps)) + edge
            colour = "black" if edge else colours[n]
            pen.line(points[t:t + 2, n].flatten().tolist(), colour, width)
    for n in np.flatnonzero(visible[-1]):
        corners = np.stack([points[-1, n] - 2 * unit, points[-1, n] + 2 * unit])
        pen.ellipse(corners.flatten().tolist(), colours[n], "black")
    return np.array(picture)


def overlaid(frames, motion, size):
    """Frames of a video of `size` (height, width), perhaps enlarged, with a Motion's tracks on."""
    for number, frame in enumerate(frames):
        yield render_tracks(frame, motion, number, len(frame) // size[0])


@torch.inference_mode()
def render_control(vae, motion, size, frames):
    """Render the tracks of a Motion as a control video of `size` (height, width) and of
    T = `frames` = 1 + 4 (F - 1), and encode it: latents (1, C, F, h, w). Drawn on black as by
    --overlay, a choice untested with Fun-Control's weights."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for number in range(min(frames, motion.tracks.shape[1])):
        video[number] = render_tracks(video[number], motion, number)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None]              # (1, 3, T, H, W)
    return vae.encode(pixels.to(next(vae.parameters()).device) / 127.5 - 1)


# --------------------------------------------------------------------------------------------------
# The command.

def picture_size(text):
    """A flag's type: "WxH" as (W, H)."""
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as 832x480")
    width, height = text.split("x")
    return int(width), int(height)


def new_parser():
    """The flags."""
    from sample import MOST_FRAMES, WAN_FRAMES, Parser, number
    parser = Parser(prog="python -m extras.tracks", description="Tracks for --tracks of sample.py.")
    file = {"type": Path, "metavar": "FILE"}
    add = parser.add_argument
    add("tracks", nargs="?", type=Path, metavar="FILE", help="tracks as another program wrote them")
    add("--image", required=True, help="that the tracks are for", **file)
    add("--out", required=True, help=".npz", **file)
    add("--frames", type=number(int, 1, MOST_FRAMES), metavar="N",
        help=f"of what is made here; default: {WAN_FRAMES}")
    add("--drag", action="append", metavar="X,Y->X,Y",
        help="where a point of the image goes; repeatable")
    add("--pin", action="append", metavar="X,Y", help="a point that stays; repeatable")
    add("--grid", metavar="NxP", help="each of those N by N points, P pixels apart")
    add = parser.add_argument_group("what a FILE does not say itself").add_argument
    add("--layout", choices=("auto", "tn", "nt"), default="auto",
        help="frames first, or tracks; auto: by names")
    add("--units", choices=("auto", "px", "01"), default="auto",
        help="pixels, or shares of the picture")
    add("--size", type=picture_size, metavar="WxH",
        help="of the video they belong to; default: the image's")
    add("--visibility", **file,
        help="an .npy, laid out as the tracks; default: the one beside an .npy of tracks")
    add = parser.add_argument_group("a camera").add_argument
    add("--depth", help=".npy (H, W), or a grey picture, bright is near", **file)
    add("--camera", type=camera_move, metavar="MOVE",
        help=f"{', '.join(MOVES)}; with an amount if wanted, as right:0.3: median depths, degrees, "
        "or times")
    add("--focal", type=number(float, 1, 10 ** 6), metavar="F",
        help="in pixels; default: the longer side")
    add("--points", type=number(int, 1, 100), default=8, metavar="N",
        help="N by N points of the scene (8, as the tiny model knows; 50 for weights of Wan's "
        "kind)")
    return parser


def parse_flags(argv):
    """Parse the command line. UserError for flags that do not go together."""
    given = new_parser().parse_args(argv)
    moved = bool(given.drag or given.pin)
    kinds = bool(given.tracks) + moved + bool(given.depth)
    told = given.layout != "auto" or given.units != "auto" or given.size or given.visibility
    faults = [
        (bool(given.depth) != bool(given.camera), "--depth and --camera need each other"),
        (given.focal and not given.depth, "--focal belongs to --depth"),
        (given.grid and not moved, "--grid belongs to --drag and --pin"),
        (told and not given.tracks, "--layout, --units, --size and --visibility belong to a FILE"),
        (kinds != 1, "give one of FILE, --drag and --pin, or --depth with --camera"),
    ]
    for wrong, cure in faults:
        if wrong:
            raise UserError(cure)
    return given


def run(argv):
    """Write the tracks that the command line asks for. Returns the exit code."""
    from extras.refusals import check_output
    from sample import WAN_FRAMES, load_image
    given = parse_flags(argv)
    image = load_image(given.image)
    inputs = [given.image, given.tracks, given.depth, given.visibility]
    check_output(given.out, (".npz",), inputs)
    frames = given.frames or WAN_FRAMES
    arrays = {"width": image.width, "height": image.height}
    if given.tracks:
        found = load_tracks(given.tracks, image.size, given.layout, given.units, given.size,
                            given.visibility, given.frames)
        tracks = found["tracks"]
        visible = found["visible"]
        arrays |= {name: found[name] for name in ("ids", "fps") if found[name] is not None}
    elif given.depth:
        tracks, visible = camera_tracks(given.depth, image.size, frames, given.points, given.camera,
                                        given.focal)
    else:
        whole = (0, 0, image.width, image.height)
        tracks, visible = drag_tracks(given.drag, given.pin, given.grid, frames, image.size, whole)
    write_tracks(given.out, arrays | {"tracks": tracks, "visibility": visible})
    print(f"{given.out}: {tracks.shape[1]} tracks of {len(tracks)} frames")
    return 0


def main(argv=None):
    """`run`, with errors as one line and an exit code."""
    from sample import reported
    return reported(run, argv)


if __name__ == "__main__":
    sys.exit(main())
