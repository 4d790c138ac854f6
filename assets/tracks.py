"""Tracks: where points of a picture are in every frame. Read from files, or made: drags and pins.

Names decide; shapes and numbers only refuse; nothing is transposed, scaled or swapped on a guess. Shapes: tracks
(T, N, 2), x to the right and y down, in pixels of a picture; visible (T, N) bool.
"""

import math
import zipfile

import numpy as np

from assets import UserError, naming

LIMIT = 2 ** 30             # bytes of a tracks file, unpacked
KNOWN = ("tracks", "visibility", "width", "height", "fps", "ids")       # arrays in it


def load_tracks(path, size):
    """A tracks file for an image of `size` (width, height), to: tracks (T, N, 2) float32 in pixels of that image,
    finite, visible (T, N) bool, ids (N,) int64, fps; the last two None if the file does not say."""
    with naming(path, "damaged, or not numbers; write it with numpy.savez(path, tracks=tracks), float32"):
        arrays, numbers = read_arrays(path), {"width": size[0], "height": size[1], "fps": None}
        for name, value in arrays.items():
            if name in numbers and (value.size != 1 or not 0 < value.item() < math.inf):
                raise UserError(f"{name} must be one positive number, it is {np.array2string(value, threshold=4)}")
            numbers |= {name: value.item()} if name in numbers else {}
        own_size = np.array([numbers["width"], numbers["height"]])
        tracks, visible = check_tracks(arrays["tracks"], arrays.get("visibility"), own_size)
        ids = arrays.get("ids")
        if ids is not None and (ids.dtype.kind not in "iu" or ids.shape != tracks.shape[1:2] or ids.min() < 0
                                or ids.max() >= 2 ** 32):
            raise UserError(f"ids are {ids.dtype} {ids.shape}, expected a whole number below 2**32 for each track")
        return tracks * (np.array(size) / own_size).astype(np.float32), visible, ids, numbers["fps"]


def read_arrays(path, known=KNOWN):
    """The arrays of an .npz or .npy file by name, told apart by content; nothing is ever unpickled."""
    entries = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
    size = sum(entry.file_size for entry in entries) or path.stat().st_size
    if size > LIMIT:
        raise UserError(f"unpacks to {size / 2 ** 30:.1f} GiB, at most {LIMIT / 2 ** 30:.0f}")
    loaded = np.load(path, allow_pickle=False)
    arrays = {"tracks": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded if k in known}
    if "tracks" not in arrays:
        raise UserError(f"has no array named tracks, only: {', '.join(loaded)}"[:200])
    return arrays


def check_tracks(tracks, visibility, size):
    """Tracks (T, N, 2) as float32 and finite, and visible (T, N) bool: as the file says, else wherever the position is
    not NaN. Refused is what cannot be pixels of a picture of `size` (width, height), frame by frame."""
    shape = tracks.shape
    if tracks.dtype.kind not in "iuf" or tracks.ndim != 3 or shape[2] != 2 or 0 in shape:
        raise UserError(f"tracks are {tracks.dtype} {shape}, expected numbers (T, N, 2): frames, tracks, x and y")
    if visibility is not None and visibility.shape != shape[:2]:
        raise UserError(f"visibility has shape {visibility.shape}, expected {shape[:2]}, as tracks are {shape}")
    if visibility is None and shape[0] < 5 <= shape[1]:
        raise UserError(f"tracks have shape {shape} and look like (N, T, 2): save tracks.transpose(1, 0, 2), or, if "
                        "they are right, add visibility (T, N) to an .npz file")
    tracks = tracks.astype(np.float32)
    visibility = ~np.isnan(tracks).any(-1) if visibility is None else visibility
    if not ((visibility >= 0) & (visibility <= 1)).all():
        raise UserError("visibility must lie in 0..1; are these logits? Save visibility > 0")
    if not np.isin(visibility, (0, 1)).all():
        print("note: visibility is read as probabilities, visible is > 0.5")
    visible = visibility > 0.5
    wrong = np.argwhere(visible & ~(abs(tracks) < 1e6).all(-1))
    if len(wrong):
        raise UserError(f"{len(wrong)} visible points are NaN, infinite or beyond a million pixels, the first is frame "
                        f"{wrong[0][0]} of track {wrong[0][1]}; set their visibility to 0")
    points, start = tracks[visible], tracks[0][visible[0]]      # (n, 2)
    if len(points) and abs(points).max() <= 1:
        raise UserError("all positions lie in [-1, 1] and must be pixels: multiply by the image's width and height")
    outside = ((start < 0) | (start > size)).any(1).sum()
    if 2 * outside > len(start):
        raise UserError(f"{outside} of {len(start)} points of frame 0 lie outside the image of {size[0]:.0f}x"
                        f"{size[1]:.0f} pixels: is the order y, x? If they are for a picture of another size, add its "
                        "width and height to an .npz file")
    return np.nan_to_num(tracks).clip(-1e6, 1e6), visible


def starting_inside(paths, size):
    """The paths, each points (P, 2), if every one starts inside the image of `size` (width, height)."""
    for points in paths:
        if not ((points[0] >= 0) & (points[0] < size)).all():
            flag, start = "--pin" if len(points) == 1 else "--drag", ",".join(f"{value:g}" for value in points[0])
            raise UserError(f"{flag} {start}: outside the image, which has {size[0]}x{size[1]} pixels")
    return paths


def follow(paths, frames):
    """What load_tracks returns, of tracks that follow paths, each points (P, 2), in `frames` frames: each stretch takes
    as long; one point alone is pinned."""
    tracks = np.zeros((frames, len(paths), 2), np.float32)
    for n, points in enumerate(paths):
        times = np.linspace(0, len(points) - 1, frames)
        tracks[:, n] = np.stack([np.interp(times, range(len(points)), axis) for axis in points.T], 1)
    return tracks, np.ones(tracks.shape[:2], bool), None, None
