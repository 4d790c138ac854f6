"""Arrays from files that may come from anywhere: .npy, .npz, bytes that torch saved, JSON, pictures of depth; they are
told apart by content.

Their sizes are checked before there is an array, and no pickle is loaded. Whatever is wrong raises; call this within
`naming`, which makes one line of it.
"""

import contextlib
import io
import json
import math
import warnings
import zipfile

import numpy as np
import torch
from PIL import Image

from motionstream import UserError

LIMIT = 2 ** 30             # bytes of a file, unpacked, and of each of its arrays as float32
LONGEST = 1_000_000         # of an array's sides: frames
LIMIT_TEXT = 2 ** 25        # bytes; as Python's lists it takes twenty times as many


def read_file(path, known):
    """What a file holds: "npy", "npz" or "json", and arrays by name, None for those that are not `known`. An .npy file
    has one, named tracks. ATI's .pth are bytes, which torch takes out, and which are an .npz file."""
    with open(path, "rb") as file:
        head = file.read(6)
        if head == np.lib.format.MAGIC_PREFIX:
            return "npy", {"tracks": read_npy(file)}
    if head[:2] != b"PK" and head[:1] != b"\x80":        # neither a zip file nor a pickle
        return "json", read_json(path, known)
    check_unpacked(path)
    if head[:2] == b"PK" and not any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()):
        return "npz", read_arrays(path, known)
    packed = None
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):      # torch's advise unpickling
        packed = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(packed, bytes):
        raise UserError("is a pickle, which may run code and is not opened; the README says how to make an .npz of it")
    return "npz", read_arrays(io.BytesIO(packed), known)


def check_unpacked(file):
    """Refuse what is too large, or would be when unpacked. file: a path, or a whole file in memory."""
    size = len(file.getbuffer()) if isinstance(file, io.BytesIO) else file.stat().st_size
    with contextlib.suppress(Exception):                # if it is no zip file, or a damaged one, the reader says it
        size = max(size, sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()))
    if size > LIMIT:
        raise UserError(f"unpacks to {size / 2 ** 30:.1f} GiB, at most {LIMIT / 2 ** 30:.0f}")


def check_size(shape, itemsize):
    """Refuse an array that is too large, before there is one."""
    if max(shape, default=0) > LONGEST or math.prod(shape) * max(itemsize, 4) > LIMIT:
        raise UserError(f"has an array of {shape}, at most {LONGEST} a side and {LIMIT / 2 ** 30:g} GiB are read")


def read_npy(file):
    """The array in an open .npy file."""
    numpy = np.lib.format                               # its functions
    with warnings.catch_warnings(action="ignore"):      # of headers by Python 2
        file.seek(0)
        read_header = numpy.read_array_header_1_0 if numpy.read_magic(file) == (1, 0) else numpy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        check_size(shape, dtype.itemsize)
        file.seek(0)
        return numpy.read_array(file, allow_pickle=False)


def read_arrays(file, known):
    """The arrays of an .npz file by name, None for those that are not `known`. file: a path, or one in memory."""
    check_unpacked(file)
    arrays = {}
    with zipfile.ZipFile(file) as entries:
        for entry in entries.infolist():
            name = entry.filename.removesuffix(".npy")
            if name not in known:
                arrays[name] = None
                continue
            with entries.open(entry) as array:
                arrays[name] = read_npy(array)
    return arrays


def read_json(path, known):
    """{"tracks": ..., "width": ...} as arrays by name, or the tracks alone: see read_paths."""
    with open(path, "rb") as file:
        data = file.read(LIMIT_TEXT + 1)
    if len(data) > LIMIT_TEXT:
        raise UserError(f"is no .npy or .npz file, and of others at most {LIMIT_TEXT / 2 ** 20:.0f} MiB are read")
    given = parse(data.decode())
    given = given if isinstance(given, dict) else {"tracks": given}
    return {name: read_paths(value) if name == "tracks" else np.asarray(value) if name in known else None
            for name, value in given.items()}


def read_paths(paths):
    """Tracks as lists of points, {"x": x, "y": y} or [x, y] or null, or one such list, to (N, T, 2), NaN where null and
    after the end of the shorter ones. Each may be text in its turn."""
    paths = parse(paths)
    first = next((point for point in paths if point is not None), None)
    if isinstance(first, dict) or isinstance(first, list) and first and isinstance(first[0], (int, float)):
        paths = [paths]
    paths = [parse(path) for path in paths]
    longest = max(map(len, paths))
    check_size((len(paths), longest, 2), 8)
    tracks = np.full((len(paths), longest, 2), np.nan)
    for n, path in enumerate(paths):
        points = [(p["x"], p["y"]) if isinstance(p, dict) else (math.nan, math.nan) if p is None else p for p in path]
        points = np.array(points or tracks[n, :0])
        if points.shape != (len(path), 2) or points.dtype.kind not in "if":
            raise UserError(f'track {n} is no list of points, each {{"x": x, "y": y}}, [x, y] or null')
        tracks[n, :len(path)] = points
    return tracks


def parse(text):
    """JSON, single quotes tolerated; what is no text is left as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.replace("'", '"'))


def read_depth(path):
    """The depth (H, W) in an .npy file, as it is, or of a grey picture, as such pictures are mostly made: one over the
    brightness, so that bright is near."""
    with open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            depth = read_npy(file)
            return depth[0] if depth.ndim == 3 and len(depth) == 1 else depth
    with Image.open(path) as picture:
        grey = np.asarray(picture if picture.mode[0] in "IFL" and picture.mode != "LA" else picture.convert("RGB"))
    if grey.ndim == 3 and (grey != grey[..., :1]).any():
        raise UserError("is in colour; save depth as .npy, or as a grey picture")
    grey = grey[..., 0] if grey.ndim == 3 else grey
    if not grey.max() > 0:
        raise UserError("is black")
    print(f"note: {path}: bright is read as near, depth as one over brightness, black 20 times as far as the brightest")
    return grey.max() / np.maximum(grey, grey.max() / 20)
