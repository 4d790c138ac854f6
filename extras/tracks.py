"""Tracks: where points of a picture are in every frame. Read from files, or made: drags and pins, a moving camera.

Names decide; shapes and numbers only refuse; nothing is transposed, scaled or swapped on a guess. Shapes: tracks
(T, N, 2), x to the right and y down, in pixels of a picture; visible (T, N) bool.
"""

import argparse
import math
import re

import numpy as np

from extras.arrays import LONGEST, read_depth, read_file, read_npy
from motionstream import UserError, naming

MOST = 20_000               # tracks; the most frames are LONGEST
POSITIONS = {               # arrays by name: the order of their axes, and pixels or shares of the picture
    "tracks": ("tn", "px"), "pred_tracks": ("tn", "px"), "track_path": ("tn", "px"), "track_points": ("tn", "01"),
    "points": ("nt", "01"), "array": ("nt", "px")}
VISIBLE, HIDDEN = ("visibility", "pred_visibility", "track_visibility", "visibles"), ("occluded", "occlusion")
KNOWN = (*POSITIONS, *VISIBLE, *HIDDEN, "width", "height", "fps", "ids", "track_ids", "format")
CURE = "damaged, or not numbers; write it with numpy.savez(path, tracks=tracks), (T, N, 2) float32"


# ----------------------------------------------------------------------------------------------------------------------
# Files of tracks.

def load_tracks(path, size, layout="auto", units="auto", own_size=None, visibility=None, frames=None):
    """A tracks file for an image of `size` (width, height), to: tracks (T, N, 2) float32 in pixels of that image,
    finite, visible (T, N) bool, ids (N,) int64, fps; the last two None if the file does not say. For what names do not
    tell: layout "tn" or "nt"; units "px" or "01"; own_size (width, height) of the picture that the tracks belong to;
    visibility, another file; frames, how many there shall be, which may show that the axes are swapped."""
    with naming(path, CURE):
        kind, arrays = read_file(path, KNOWN)
    beside = visibility or (find_visibility(path) if kind == "npy" else None)
    if beside:
        with naming(beside, "damaged, or no .npy file of 0 and 1, (T, N)"), open(beside, "rb") as file:
            if {"array", *VISIBLE, *HIDDEN} & arrays.keys():
                raise UserError(f"{path} has a visibility of its own; drop --visibility")
            arrays["visibility"] = read_npy(file)
    with naming(path, CURE), np.errstate(all="ignore"):       # what is too large for float32 has a message of its own
        tracks, seen, order, unit = by_name(arrays, kind)
        width, height, fps = (positive(name, arrays.get(name)) for name in ("width", "height", "fps"))
        there = (width or (own_size or size)[0], height or (own_size or size)[1])
        if own_size and there != own_size:
            raise UserError(f"says that it is for a picture of {there[0]:g}x{there[1]:g}; drop --tracks-size")
        if str(arrays.get("format")) == "motionstream":     # written here: nothing is left to doubt
            layout, units = (flag if flag != "auto" else own for flag, own in ((layout, "tn"), (units, "px")))
        tracks, seen = arrange(tracks, seen, order if layout == "auto" else layout)
        tracks, visible = check_tracks(tracks, seen, there, unit if units == "auto" else units, units != "auto")
        if (order, layout) == ("tn", "auto") and (seen is None or "visibles" in arrays):    # TAPIR's, too, are (N, T)
            check_order(tracks, visible, frames)
        ids = arrays.get("ids", arrays.get("track_ids"))
        if ids is not None and (ids.dtype.kind not in "iu" or ids.shape != tracks.shape[1:2] or ids.min() < 0
                                or ids.max() >= 2 ** 32):
            raise UserError(f"ids are {ids.dtype} {ids.shape}, expected a whole number below 2**32 for each track")
        return tracks * (np.array(size) / there).astype(np.float32), visible, ids, fps


def find_visibility(path):
    """The file that other programs write beside tracks in an .npy file, if it is there."""
    for name in path.name.replace("tracks", "visibility"), f"{path.stem}_visibility.npy":
        beside = path.with_name(name)
        if name != path.name and beside.is_file():
            print(f"note: {path}: visibility is read from {beside}")
            return beside


def positive(name, value):
    """A number that a file holds, if it does."""
    if value is None:
        return None
    if value.size != 1 or not 0 < value.item() < math.inf:
        raise UserError(f"{name} must be one positive number, it is {np.array2string(value, threshold=4)}")
    return value.item()


def by_name(arrays, kind):
    """(positions, visibility or None, order of the axes, unit), as the names of a file's arrays tell."""
    hidden = [name for name in HIDDEN if name in arrays]
    seen = hidden + [name for name in VISIBLE if name in arrays]
    found = [name for name in POSITIONS if name in arrays and (hidden or name != "points")]
    if not found:
        raise UserError(f"has no array named tracks, only: {', '.join(arrays)}"[:200])
    (order, unit), positions = POSITIONS[found[0]], arrays[found[0]]
    if len(found) > 1 or len(seen) > 1 or found == ["array"] and seen:
        raise UserError(f"holds {', '.join(found + seen)}: which are meant? Save those alone")
    if positions.dtype.kind not in "iuf" or positions.dtype.itemsize > 8:
        raise UserError(f"{found[0]} are {positions.dtype} {positions.shape}, expected numbers (T, N, 2)")
    if found != ["array"]:
        visibility = 1 - arrays[seen[0]] if hidden else arrays[seen[0]] if seen else None
        return positions, visibility, "nt" if hidden or kind == "json" else order, unit
    if positions.ndim != 4 or positions.shape[2] != 1 or positions.shape[3] not in (3, 4):
        raise UserError(f"array is {positions.shape}, expected (N, T, 1, 3), as ATI writes it")
    scale = positions[..., 2].max()                     # x, y and visibility are in eighths
    if scale not in (1, 8):
        raise UserError(f"visibility, the third channel of array, reaches {scale}, expected 8, as ATI writes it, or 1")
    arrays.setdefault("fps", np.array(24))              # which ATI's are
    positions = positions[:, :, 0].astype(np.float32) / np.float32(scale)
    return positions[..., :2], positions[..., 2], order, unit


def arrange(tracks, visibility, order):
    """What a file holds in `order`, "tn" or "nt", as (T, N, 2) and (T, N) or None. A leading 1 is a batch of one;
    (T, 2) is one track; a third channel is visibility if all of it is 0 or 1."""
    tracks = tracks[0] if tracks.ndim == 4 and len(tracks) == 1 else tracks
    if visibility is not None:
        while visibility.ndim > 2 and len(visibility) == 1:
            visibility = visibility[0]
        visibility = visibility[..., 0] if visibility.ndim == 3 and visibility.shape[2] == 1 else visibility
    elif tracks.ndim == 3 and tracks.shape[2] == 3 and tracks[..., 2].any() and np.isin(tracks[..., 2], (0, 1)).all():
        tracks, visibility = tracks[..., :2], tracks[..., 2]
    if tracks.ndim == 2:
        visibility = visibility[:, None] if visibility is not None and visibility.ndim == 1 else visibility
        return tracks[:, None], visibility
    if order == "nt" and tracks.ndim == 3:
        return tracks.swapaxes(0, 1), visibility if visibility is None else visibility.T
    return tracks, visibility


def check_tracks(tracks, visibility, size, unit="px", certain=False):
    """Tracks (T, N, 2) as float32, finite and in pixels, and visible (T, N) bool: as the file says, else wherever the
    position is not NaN. unit: "px" or "01". Refused is what cannot be on a picture of `size` (width, height), frame by
    frame; if the unit is not certain, also what is unlikely to be in it."""
    shape = tracks.shape
    if tracks.dtype.kind not in "iuf" or tracks.ndim != 3 or shape[2] != 2 or 0 in shape:
        raise UserError(f"tracks are {tracks.dtype} {shape}, expected numbers (T, N, 2): frames, tracks, x and y")
    if shape[0] > LONGEST or shape[1] > MOST:
        raise UserError(f"tracks have shape {shape}, at most {LONGEST} frames and {MOST} tracks are read")
    if visibility is not None and visibility.shape != shape[:2]:
        raise UserError(f"visibility has shape {visibility.shape}, expected {shape[:2]}, as tracks are {shape}")
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
    farthest = abs(tracks[visible]).max(initial=0)
    if unit == "01" and farthest > 1.5:
        raise UserError(f"positions reach {farthest:g} and must be shares of the picture, 0..1; pass --tracks-units px")
    if unit == "px" and not certain and visible.any() and farthest <= 1:
        raise UserError("all positions lie in [-1, 1] and must be pixels; for shares of the picture, 0..1, in a file, "
                        "pass --tracks-units 01")
    tracks = tracks * np.float32(size) if unit == "01" else tracks
    start = tracks[0][visible[0]]                       # (n, 2)
    outside, turned = (((points < 0) | (points > size)).any(1).sum() for points in (start, start[:, ::-1]))
    if not certain and 2 * outside > len(start):
        raise UserError(f"{outside} of {len(start)} points of frame 0 lie outside the picture of {size[0]:.0f}x"
                        f"{size[1]:.0f} pixels: "
                        + ("is the order y, x? Then save tracks[..., ::-1]" if 2 * turned <= len(start) else
                           "with a file, pass --tracks-size WxH if they are for another, --tracks-units px if they are "
                           "right"))
    return np.nan_to_num(tracks).clip(-1e6, 1e6), visible


def check_order(tracks, visible, frames):
    """Refuse tracks that look like (N, T, 2): a net for files that do not tell, not a proof. frames: how many are
    wanted, or None."""
    part = np.where(visible[..., None], tracks, math.nan)[:999, :999]
    steps = [np.linalg.norm(np.diff(part, axis=axis), axis=-1) for axis in (0, 1)]      # in time; from track to track
    steps = [np.median(step[~np.isnan(step)]) if not np.isnan(step).all() else math.nan for step in steps]
    T, N = visible.shape
    for wrong, why in ((T < 5 <= N, f"they have {T} frames"),
                       (5 <= N == frames != T, f"--frames is {N}"),
                       (min(T, N) >= 3 and steps[0] > max(1, 10 * steps[1]), "they jump from frame to frame")):
        if wrong:
            raise UserError(f"shape {tracks.shape} looks like (N, T, 2), as {why}: pass --tracks-layout nt, or tn if "
                            "it is right")


# ----------------------------------------------------------------------------------------------------------------------
# Made: as load_tracks returns them.

MOVES = {                   # of a camera: what `camera` calls it, its value for an amount of 1, the usual amount
    "left": ("move", (-1, 0, 0), 0.2), "right": ("move", (1, 0, 0), 0.2), "up": ("move", (0, -1, 0), 0.2),
    "down": ("move", (0, 1, 0), 0.2), "in": ("move", (0, 0, 1), 0.3), "out": ("move", (0, 0, -1), 0.3),
    "orbit-left": ("orbit", -1, 15), "orbit-right": ("orbit", 1, 15), "zoom-in": ("zoom", 1, 1.5),
    "zoom-out": ("zoom", -1, 1.5)}


def camera_move(text):
    """A flag's type: a camera's move and, if wanted, how far, "right:0.3", as arguments of `camera`."""
    name, _, amount = text.partition(":")
    if name not in MOVES or not re.fullmatch(r"(\d{1,3}(\.\d*)?|\.\d+)?", amount) or amount and not float(amount):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MOVES)}, with an amount if wanted, right:0.3")
    kind, unit, usual = MOVES[name]
    amount = float(amount or usual)
    if kind == "zoom" and amount < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a zoom is so many times, 1 or more")
    return {kind: amount ** unit if kind == "zoom" else amount * np.array(unit)}


def picture_size(text):
    """A flag's type: "WxH" as (W, H)."""
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as 832x480")
    return tuple(map(int, text.split("x")))


def camera(depth, frames, move=(0, 0, 0), orbit=0, zoom=1, grid=8, focal=None):
    """What a camera that moves sees of a still scene of depth (H, W) > 0: tracks (frames, grid * grid, 2) in pixels of
    depth, and visible, False outside the picture and behind what is nearer. In the end it has moved by (x, y, z), to
    the right, down and ahead, in the unit of depth, has gone round the point ahead at depth 1, `orbit` degrees to the
    right, and magnifies `zoom` times. focal: in pixels; default: the longer side."""
    H, W = depth.shape
    focal, centre, pivot = focal or max(H, W), np.array([W, H]) / 2, np.array([0, 0, 1])
    step = -(-max(H, W) // 512)                         # what may hide points is looked at so coarsely
    scene, tracks, visible, slope = [], [], [], None
    for rows, columns in ([((np.arange(grid) + 0.5) / grid * side).astype(int) for side in (H, W)],
                          [np.arange(0, side, step) for side in (H, W)]):
        x, y = np.meshgrid(columns + 0.5, rows + 0.5)
        z = np.float64(depth[np.ix_(rows, columns)])
        scene.append(np.stack([(x - W / 2) * z / focal, (y - H / 2) * z / focal, z], -1).reshape(-1, 3))
    scene = np.concatenate(scene)
    for t in np.linspace(0, 1, frames):
        c, s = np.cos(np.radians(t * orbit)), np.sin(np.radians(t * orbit))
        points = scene - t * np.array(move)
        points = (points - pivot) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) + pivot
        z = np.maximum(points[:, 2], 1e-6)              # that near or behind the camera: not seen
        xy = points[:, :2] / z[:, None] * focal * zoom ** t + centre
        inside = ((xy >= 0) & (xy < (W, H))).all(1) & (points[:, 2] >= z)
        larger = np.quantile(scene[inside, 2] / z[inside], 0.99) * zoom ** t if inside.any() else 1
        x, y = np.where(inside[:, None], xy // (4 * step * max(larger, 1)), 0).astype(int).T
        cell = np.where(inside, y * W + x, H * W)
        nearest = np.full(H * W + 1, np.inf)
        np.minimum.at(nearest, cell, z)                 # a coarse picture of what is in front, without holes
        slope = np.clip(z / nearest[cell], 1, 1.25) if slope is None else slope         # of a surface within a cell
        tracks.append(xy[:grid * grid])
        visible.append((inside & (z < 1.05 * slope * nearest[cell]))[:grid * grid])
    return np.stack(tracks), np.stack(visible)


def load_depth(path, size):
    """The depth (H, W) > 0, as shares of the median of what is finite, of an image of `size` (width, height), of as
    many pixels or of more or fewer in the same ratio: from an .npy file, in any unit, or from a grey picture."""
    cure = "damaged, or neither an .npy file of depth (H, W) nor a grey picture"
    with naming(path, cure), np.errstate(all="ignore"):
        depth = read_depth(path)
        if depth.dtype.kind not in "iuf" or depth.ndim != 2 or min(depth.shape) < 2:
            raise UserError(f"depth is {depth.dtype} {depth.shape}, expected numbers (H, W)")
        (H, W), wrong, far = depth.shape, (~(depth > 0)).sum(), np.isinf(depth)
        if wrong or far.all():
            raise UserError(f"{wrong or depth.size} of {depth.size} depths are not above 0, or all are infinite; is it "
                            "inverse depth? Save 1 / depth, and numpy.inf for the sky")
        if abs(W * size[1] - H * size[0]) > W + H:
            raise UserError(f"is {W}x{H}, its image {size[0]}x{size[1]}: not the same shape; resize it to the image")
        return np.minimum(depth / np.median(depth[~far]).astype(np.float64), 1000)


def camera_tracks(path, size, frames, grid, move, focal=None):
    """The tracks that `camera` sees of an image of `size` (width, height) by a file of its depth. move: arguments of
    `camera`; focal in pixels of the image."""
    depth = load_depth(path, size)
    scale = size[0] / depth.shape[1]
    tracks, visible = camera(depth, frames, grid=grid, focal=focal and focal / scale, **move)
    return (tracks * scale).clip(-1e6, 1e6).astype(np.float32), visible, None, None
