"""Flags of the programs: their types, those about tracks, and the tracks that they name."""

import argparse
import re
from pathlib import Path

import numpy as np

from assets import UserError
from assets.tracks import MOVES, camera_tracks, follow, load_tracks, starting_inside

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
