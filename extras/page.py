"""The page: draw tracks in a browser on a video while it streams, and record it.

    python -m extras.page --image x.png

It prints an address; whoever opens it can drag, pin, draw paths and move the camera, and all see
the same video. The flags are those of sample.py, except tracks and frames; --host and --port set
the address of the page, --allow the public name of a tunnel to it.

A recording that begins with the image is three files: NAME.mp4, NAME.png (the image) and NAME.npz
(the inputs of each chunk). `python sample.py --image NAME.png --tracks NAME.npz` reproduces the
same frames, see save_recording.

Requests only read and replace values of `Live`; only the main thread runs the model. Handler
defines which HTTP requests are allowed.
"""

import argparse
import collections
import contextlib
import http.server
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import sample
from extras import recording, video, world
from extras.refusals import check, check_output, unknown_words
from motionstream import Config, UserError, naming, reason_of, video_frames, write_file
from sample import (crop, embed_words, enlarge, fit_image, hold_signals, live_motion, number,
                    to_frames, to_video, video_file)

RECORDING = Path("recording.mp4")   # the default of --out
PORT = 8765


# --------------------------------------------------------------------------------------------------
# State shared by the threads.

class Shown(NamedTuple):
    """A frame of the video."""
    number: int             # increasing over all takes
    seq: int                # of the control that it follows
    pixels: np.ndarray      # uint8 (H, W, 3)


class Given(NamedTuple):
    """Points given to a chunk, in pixels of the image."""
    starts: list            # (x, y) of each point in frame 0
    ids: np.ndarray         # (N,) int64, as given to the model
    tracks: np.ndarray      # (T, N, 2) float32
    prompt: str


@dataclass
class Take:
    """A stream that starts from one image."""
    number: int
    image: Image.Image
    config: Config
    made: collections.deque = field(default_factory=collections.deque)  # of Shown, to be shown
    seen: collections.deque = field(default_factory=collections.deque)  # of frames, to be recorded
    obeyed: dict | None = None      # the control of the latest chunk
    begun: float | None = None      # its start time, until its first frame is done


@dataclass
class Live:
    """State shared with the pages, and the frame shown by the clock."""
    image: Image.Image      # the start of the next take
    config: Config          # for sampling, with the flags' chunk
    control: dict           # shared by all pages, see merge
    status: dict            # other state sent to a page
    frame: Shown            # currently shown
    stop: list              # of signals: not empty once the program ends
    out: Path | None = None         # for the first recording that begins with the image; None: used
    hosts: list = field(default_factory=list)       # names of this server
    allowed: list = field(default_factory=list)     # further allowed host names, with a port
    pictures: list = field(default_factory=list)    # files to start a take from
    files: list = field(default_factory=list)       # of recordings
    take: Take | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    count: itertools.count = field(default_factory=lambda: itertools.count(1))      # of frames
    viewers: dict = field(default_factory=dict)     # {a page: when it last asked for a frame}
    runs: bool = False      # somebody watches, and it is not paused
    tick: float = 0.0       # time to show the next frame
    lead: float = 0.0       # seconds by which a chunk must start early


# --------------------------------------------------------------------------------------------------
# Requests of a browser.

TOKEN = secrets.token_urlsafe(16)
NONCE = secrets.token_urlsafe(16)
POLICY = (f"default-src 'none'; script-src 'nonce-{NONCE}'; style-src 'nonce-{NONCE}'; "
          "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": POLICY,
}
MOST = {"application/json": 2 ** 18, "image/png": 2 ** 23, "image/jpeg": 2 ** 23}   # bytes posted
MOST_POINTS = 256
MOST_LEFT = 64              # removed groups
MOST_PIXELS = 2 ** 25       # of an image
FARTHEST = 1e6              # pixels
SOURCE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
PAGE = SOURCE.replace("NONCE", NONCE).encode()
SETTINGS = {"take": int, "chunk": int, "pause": bool, "record": bool, "prompt": str}
KINDS = ("drag", "pin", "path", "camera", "left")
HELD = ("drag", "pin", "path")


class Refused(Exception):
    """A rejected request: (HTTP code, reason)."""


def merge(control, data, chunks, apart):
    """The control after a page's post: JSON of the changed values of SETTINGS ("take": a new number
    starts over; "chunk": one of `chunks`) and groups of points by name, see read_group. Other
    groups stay during a take. "seq" counts posts, and "points" are the model's, see gather. Raises
    Refused for too many points, some other exception for any other fault."""
    changes = json.loads(data, parse_constant=float)
    given = changes.pop("groups", {})
    kinds = {name: type(value) for name, value in changes.items()}
    new = control | changes
    right = (
        kinds.items() <= SETTINGS.items()
        and new["chunk"] in chunks
        and 0 <= new["take"] < 2 ** 53
        and len(new["prompt"]) <= 1000)
    if not right:
        raise ValueError("not what the page sends")
    groups = dict(control["groups"]) if new["take"] == control["take"] else {}
    for name, group in given.items():
        groups[name] = read_group(name, group)
    left = [name for name, group in groups.items() if group["kind"] == "left" and name != "camera"]
    for name in left[:-MOST_LEFT]:
        del groups[name]
    return new | {"seq": control["seq"] + 1, "groups": groups, "points": gather(groups, apart)}


def read_group(name, group):
    """Check a group of points sent by the page: {"kind": one of KINDS, "points": [[x, y, x and y
    in frame 0, and when grabbed], …], "path": [[x, y], …]}, in pixels of the image. Kind
    "left": removed points. Any fault raises some exception."""
    points = np.array(group["points"], np.float64)
    path = np.array(group["path"], np.float64).reshape(-1, 2)
    right = (
        group.keys() == {"kind", "points", "path"}
        and group["kind"] in KINDS
        and (name == "camera") >= (group["kind"] == "camera")
        and len(name) < 30
        and points.shape == (len(points), 6)
        and len(points) <= MOST_POINTS and len(path) <= 1000
        and (abs(points) < FARTHEST).all()              # False for NaN
        and (abs(path) < FARTHEST).all())
    if not right:
        raise ValueError("not what the page sends")
    return {"kind": group["kind"], "points": points.tolist(), "path": path.tolist()}


def gather(groups, apart):
    """Points for the model: all held points and, if the camera moves the ground, those ground
    points that start at least `apart` pixels from all of them."""
    points = []
    ground = []
    for group in groups.values():
        if group["kind"] in HELD:
            points += group["points"]
        if group["kind"] == "camera":
            ground += group["points"]
    if len(points) > MOST_POINTS:
        raise Refused(409, f"There can be {MOST_POINTS} points at most: remove some.")
    starts = np.array(points).reshape(-1, 6)[:, 2:4]
    free = [point for point in ground if (np.hypot(*(starts - point[2:4]).T) > apart).all()]
    return (points + free)[:MOST_POINTS]


def named(names, port):
    """Valid Host headers of a server: its names with the port, which browsers omit if it is 80."""
    hosts = [f"{name}:{port}" for name in names]
    return hosts + list(names) if port == 80 else hosts


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves requests that carry the token and come from this page; everything else is rejected."""
    protocol_version = "HTTP/1.1"
    timeout = 5                     # seconds that a socket may stall
    disable_nagle_algorithm = True

    def handle(self):
        """One connection, in a thread of its own."""
        with contextlib.suppress(OSError):              # the client is gone, or stalls
            if threading.active_count() < 64:
                super().handle()

    def log_message(self, *_):
        """Print nothing of what strangers send."""

    def check_sender(self):
        """Refuse a request unless it names one of our hosts, knows the token, and is our page's."""
        live = self.server.live
        host = self.headers.get("Host", "")
        here = self.connection.getsockname()[0]
        origins = [None, f"http://{host}"]
        if host in live.allowed:
            origins.append(f"https://{host}")           # tunnels
        elif host not in named(live.hosts + [here], self.server.server_port):
            raise Refused(421, f"This program does not go by the name {host[:100]!r}. If a tunnel "
                          "or another port is in front of it, start it again with --allow and "
                          "that name, as --allow x.example:9000.")
        token = self.path[1:].partition("/")[0]
        if not secrets.compare_digest(token.encode(), TOKEN.encode()):
            raise Refused(403, "Open the whole address that the program has printed; it is another "
                          "one each time.")
        if self.headers.get("Origin") not in origins:
            raise Refused(403, "This was asked for by another page.")

    def answer(self, work):
        """What work() replies, or the refusal that it raises, as text."""
        try:
            self.check_sender()
            work(self.path[1:].partition("/")[2])
        except Refused as e:
            code, why = e.args
            self.reply("text/plain; charset=utf-8", why.encode(), {"Connection": "close"}, code)

    def do_GET(self):
        """The page, its state, the newest frame, a picture to start from, or a recording's file."""
        self.answer(self.get)

    def do_POST(self):
        """What a page changes, or an image for the next take."""
        self.answer(self.post)

    def get(self, path):
        """What is at a path, which comes after the token."""
        live = self.server.live
        name, _, rest = path.partition("/")
        if path == "":
            self.reply("text/html; charset=utf-8", PAGE)
        elif path == "status":
            self.reply("application/json", json.dumps(told(live)).encode())
        elif name == "frame":
            seen, _, viewer = rest.partition("/")
            self.reply_frame(seen, viewer)
        elif name == "picture":
            self.reply_picture(numbered(live.pictures, rest))
        elif name == "file":
            self.reply_file(numbered(live.files, rest))
        else:
            raise Refused(404, "There is no such thing.")

    def post(self, path):
        """Obey what is posted to "control"; the reply says how many posts there were."""
        if path != "control":
            raise Refused(404, "There is no such thing.")
        self.check_body()
        data = self.rfile.read(int(self.headers["Content-Length"][:9]))
        try:
            if self.headers.get_content_type() == "application/json":
                self.obey(data)
            else:
                self.open_image(data)
        except Refused:
            raise
        except Exception:                               # bad data raise many kinds
            raise Refused(400, "This is not what the page sends, or no picture.") from None
        said = json.dumps({"seq": self.server.live.control["seq"]})
        self.reply("application/json", said.encode())

    def check_body(self):
        """Refuse what is posted before it is read."""
        kind = self.headers.get_content_type()
        length = self.headers.get("Content-Length", "")
        if kind not in MOST:
            raise Refused(415, "Post JSON, PNG or JPEG.")
        if not length.isdecimal():
            raise Refused(411, "Say how long it is.")
        if int(length[:9]) > MOST[kind]:
            raise Refused(413, f"This is larger than {MOST[kind]} bytes.")

    def obey(self, data):
        """Take what a page changes."""
        live = self.server.live
        scale, _, _ = crop(*live.image.size, live.config.size)
        apart = 0.12 * live.config.size[1] / scale
        with live.lock:
            live.control = merge(live.control, data, live.status["chunks"], apart)

    def open_image(self, data):
        """Take an image."""
        size = Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]).size
        if math.prod(size) > MOST_PIXELS:
            raise Refused(413, f"This picture has more than {MOST_PIXELS} pixels.")
        self.server.live.image = sample.load_image(io.BytesIO(data))

    def reply_frame(self, seen, viewer):
        """The newest frame, as soon as it is not the one that the page `viewer` has seen: a slow
        page skips some."""
        live = self.server.live
        count_viewers(live, viewer)
        until = time.monotonic() + 1
        while str(live.frame.number) == seen and time.monotonic() < until and not live.stop:
            time.sleep(0.004)
        shown = live.frame
        jpeg = io.BytesIO()
        Image.fromarray(shown.pixels).save(jpeg, "jpeg", quality=92, subsampling=0)
        self.reply("image/jpeg", jpeg.getvalue(), {"Frame": shown.number, "Seq": shown.seq})

    def reply_picture(self, path):
        """A picture to start from, as a PNG of reasonable size."""
        image = sample.load_image(path)
        image.thumbnail((1280, 1280))
        png = io.BytesIO()
        image.save(png, "png")
        self.reply("image/png", png.getvalue())

    def reply_file(self, path):
        """A file of a recording."""
        with open(path, "rb") as file:
            self.reply_head("application/octet-stream", os.fstat(file.fileno()).st_size)
            shutil.copyfileobj(file, self.wfile)

    def reply(self, kind, body, more=None, code=200):
        """An answer with a body of that kind."""
        self.reply_head(kind, len(body), more, code)
        self.wfile.write(body)

    def reply_head(self, kind, length, more=None, code=200):
        """What comes before `length` bytes of that kind."""
        headers = HEADERS | (more or {}) | {"Content-Type": kind, "Content-Length": length}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def numbered(paths, number):
    """The path with that number, counted from 0, in digits; Refused if there is no such file."""
    numbers = [str(n) for n in range(len(paths))]
    if number not in numbers or not paths[int(number)].is_file():
        raise Refused(404, "There is no such file.")
    return paths[int(number)]


def count_viewers(live, viewer=None):
    """Number of pages that asked for a frame within two seconds. viewer: one that asks now."""
    now = time.monotonic()
    with live.lock:
        if viewer is not None:
            live.viewers[viewer] = now
        live.viewers = {name: when for name, when in live.viewers.items() if now - when < 2}
        return len(live.viewers)


def told(live):
    """State for a page: the control, the status and the lists that change."""
    state = live.control | live.status
    del state["points"]                                 # they are in its groups
    take = live.take
    state["begun"] = bool(take and take.number == state["take"] and take.obeyed)
    state["frame"] = live.frame.number
    state["viewers"] = count_viewers(live)
    state["files"] = [path.name for path in live.files]
    state["pictures"] = [path.stem for path in live.pictures]
    state["unknown"] = []
    if state["words"]:
        state["unknown"] = unknown_words(sample.words_in(state["prompt"]))
    return state


def clock(live):
    """Show frame after frame at the clip's rate, while somebody watches and it is not paused."""
    while not live.stop:
        take = live.take
        live.runs = count_viewers(live) > 0 and not live.control["pause"]
        if take and take.made and live.runs:
            live.frame = take.made.popleft()
            live.tick = max(live.tick, time.monotonic()) + 1 / live.status["fps"]
            take.seen.append(live.frame.pixels)
        time.sleep(max(live.tick - time.monotonic(), 0.002))


# --------------------------------------------------------------------------------------------------
# From points to the model's inputs.

def glide(points, last, frames, begins):
    """Positions of points in the next `frames` frames, on lines from their old to their new ones.

    points: rows, see read_group. last: {start: requested position at the end of the previous
    chunk}; a new point begins where it was grabbed or, in the first chunk of a take (begins), at
    its start. Returns (starts, a sorted list of (x, y), which identify the points; tracks
    (frames, N, 2) float32)."""
    begin = {}
    end = {}
    for x, y, start_x, start_y, grabbed_x, grabbed_y in points:
        start = (start_x, start_y)
        end[start] = (x, y)
        begin[start] = start if begins else last.get(start, (grabbed_x, grabbed_y))
    starts = sorted(end)
    one = np.array([begin[start] for start in starts]).reshape(-1, 2)
    other = np.array([end[start] for start in starts]).reshape(-1, 2)
    share = np.linspace(0, 1, frames) if begins else np.arange(1, frames + 1) / frames
    share = share[:, None, None]
    tracks = (1 - share) * one + share * other                          # (frames, N, 2)
    return starts, tracks.astype(np.float32)


def fit_chunk(starts, tracks, prompt, size, config):
    """Points of a chunk, see glide, on an image of `size` (width, height), to a sample.Motion in
    the model's video: hidden outside it, with the text of a prompt if the model reads words. Each
    point moves the content of its start in frame 0, wherever that is now."""
    points = to_video(tracks, size, config.size).numpy()
    outside = ((points < 0) | (points >= config.size[::-1])).any(-1)
    points[outside] = np.nan
    begun = np.array(starts, np.float32).reshape(-1, 2)
    begun = to_video(begun, size, config.size)
    motion = live_motion(points, begun, config, point_ids(starts, config))
    if reads_words(config):
        motion = replace(motion, text=embed_words(prompt, config))
    return motion


def point_ids(starts, config):
    """The IDs of points, which come and go: by their starts, see glide. None: the model's own."""
    if config.track_id_mode != "random":
        return None
    return [zlib.crc32(repr(start).encode()) for start in starts]


def reads_words(config):
    """True if the prompt can change during the stream."""
    return config.text_encoder == "words"


# --------------------------------------------------------------------------------------------------
# Recordings.

class Recorder:
    """Records the shown frames of a take on request: a new video each time, complete when it ends.

    A video that begins with the image is reproducible: the inputs of its chunks are kept while that
    holds, and saved beside it. out: base of the videos' names; settings: see save_recording."""

    def __init__(self, live, take, out, settings):
        self.live = live
        self.take = take
        self.out = out
        self.settings = settings
        self.chunks = []            # of Given; None: too late to begin with the image
        self.count = 0              # frames in the open video
        self.path = None            # of it
        self.files = contextlib.ExitStack()
        self.append = None

    def keep(self, given):
        """Note what the next chunk is given."""
        if self.chunks is not None:
            self.chunks.append(given)

    def record(self, on):
        """To be called often: what has been seen since then goes into a video, or into none."""
        seen = self.take.seen
        if on and not os.access(self.out.absolute().parent, os.W_OK):
            self.live.status["recorded"] = "the folder is not writable, nothing is recorded"
            on = False
        while seen and (on or self.count):              # also those shown before it was turned off
            if not self.count:
                self.begin()
            self.put(seen.popleft())
        if on:
            return
        if seen or self.count:
            self.finish()
            self.chunks = None
        seen.clear()

    def begin(self):
        """Open a video."""
        self.path = unused(self.out)
        if self.live.out and self.chunks is not None:
            self.path = self.live.out
            self.live.out = None
        self.append = self.files.enter_context(video_file(self.path, self.live.status["fps"]))

    def put(self, frame):
        """Append a frame to it."""
        self.count += 1
        self.append(enlarge(frame))
        told = f"{self.path.name}, {self.count / self.live.status['fps']:.1f} s"
        if self.chunks is None:
            told += ", the video alone"
        self.live.status["recorded"] = told

    def finish(self):
        """Close the video, if one is open, and save what it was made from."""
        if not self.count:
            return
        self.files.close()
        endings = (".mp4",) if self.chunks is None else (".mp4", ".png", ".npz")
        if self.chunks is None:
            print(f"{self.path}: {self.count} frames; it begins after the image, there is the "
                  "video alone")
        else:
            settings = self.settings | {"frames": self.count}
            save_recording(self.path, self.take.image, self.chunks, settings)
            image = self.path.with_suffix(".png")
            tracks = self.path.with_suffix(".npz")
            print(f"{self.path}: {self.count} frames; sample.py --image {image} --tracks {tracks} "
                  "makes them again")
        self.live.files += [self.path.with_suffix(ending) for ending in endings]
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """The take is over: an open video is finished or, if something went wrong, is removed."""
        if kind is None:
            self.record(False)
        self.files.__exit__(kind, error, trace)


def unused(path):
    """The path of a video, or the first of path-2, path-3, … without any file of a recording."""
    for i in itertools.count(1):
        new = path.with_stem(f"{path.stem}-{i}") if i > 1 else path
        if not any(new.with_suffix(ending).exists() for ending in (".mp4", ".png", ".npz")):
            return new


def save_recording(path, image, chunks, settings):
    """Write NAME.png and NAME.npz beside the video NAME.mp4.

    The .npz is a file of tracks: tracks (T, N, 2) float32 in pixels of the image, T frames of whole
    chunks, NaN where a point did not exist; visibility (T, N); ids (N,) int64 as given to the
    model; start (N, 2) float32: positions in frame 0. It also records the stream: prompts, one per
    chunk, and `settings`: track_id_mode, seed, chunk, sink, window (-1: all), steps, fps, dtype,
    frames, weights (a checksum). chunks: of Given."""
    tracks, ids, start = join_chunks(chunks)
    arrays = settings | {
        "tracks": tracks,
        "visibility": ~np.isnan(tracks[..., 0]),
        "ids": ids,
        "start": start,
        "prompts": [chunk.prompt for chunk in chunks],
        "width": image.width,
        "height": image.height,
        "format": "motionstream",
    }
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_file(path.with_suffix(".npz"), lambda part: part.write_bytes(data.getbuffer()))
    write_file(path.with_suffix(".png"), lambda part: image.save(part, "png"))


def join_chunks(chunks):
    """Join the points given to chunks, one column per point, in the model's order: tracks
    (T, N, 2), NaN where a point did not exist, ids (N,) and starts (N, 2). Without any point there
    is one empty column."""
    id_of = {}
    for chunk in chunks:
        id_of.update(zip(chunk.starts, chunk.ids.tolist()))
    starts = sorted(id_of)
    column = {start: n for n, start in enumerate(starts)}
    frames = sum(len(chunk.tracks) for chunk in chunks)
    tracks = np.full((frames, max(len(starts), 1), 2), np.nan, np.float32)
    begin = 0
    for chunk in chunks:
        end = begin + len(chunk.tracks)
        tracks[begin:end, [column[start] for start in chunk.starts]] = chunk.tracks
        begin = end
    ids = [id_of[start] for start in starts] or [0]
    starts = starts or [(0, 0)]
    return tracks, np.array(ids, np.int64), np.array(starts, np.float32)


# --------------------------------------------------------------------------------------------------
# The program.

def chunks_to_make(live, take, recorder):
    """Yield a Motion for each chunk, as soon as it has to be started, until the take is over."""
    last = {}
    while wait_for_chunk(live, take, recorder):
        begins = take.obeyed is None
        take.obeyed = live.control
        take.begun = begun = time.monotonic()
        points = take.obeyed["points"]
        frames = 4 * take.config.chunk
        if begins:
            frames = video_frames(take.config.first_chunk_size)
        starts, tracks = glide(points, last, frames, begins)
        last = {(start_x, start_y): (x, y) for x, y, start_x, start_y, *_ in points}
        prompt = take.obeyed["prompt"]
        motion = fit_chunk(starts, tracks, prompt, take.image.size, take.config)
        recorder.keep(Given(starts, motion.ids[0].numpy(), tracks, prompt))
        yield motion
        live.status["slowness"] = (time.monotonic() - begun) * live.status["fps"] / frames


def wait_for_chunk(live, take, recorder):
    """True as soon as the next chunk has to be started for its first frame to be in time; False if
    another take is requested, or the program ends."""
    while not live.stop and live.control["take"] == take.number:
        recorder.record(live.control["record"])
        left = live.tick + len(take.made) / live.status["fps"] - time.monotonic()
        if live.runs and left <= live.lead:
            return True
        time.sleep(0.004)
    return False


def with_chunk(config, chunk):
    """The config with another chunk size, and a sink and window of as many frames as before."""
    more = config.chunk // chunk
    window = None if config.window is None else more * config.window
    return replace(config, chunk=chunk, sink=more * config.sink, window=window)


@torch.inference_mode()
def perform(live, job, models, out):
    """One take: stream from live.image until another take is requested or the program ends. out:
    base of the recordings' names, None: RECORDING."""
    control = live.control
    config = with_chunk(live.config, control["chunk"])
    take = Take(control["take"], live.image, config)
    pixels = fit_image(take.image, config.size)
    live.status["image"] = take.image.size
    live.take = take
    live.frame = Shown(next(live.count), 0, to_frames(pixels[:, :, None])[0])
    job = replace(job, config=config)
    with Recorder(live, take, out or RECORDING, settings_of(job, models)) as recorder:
        for frame in sample.generate(job, models, pixels, chunks_to_make(live, take, recorder)):
            if take.begun:                              # the first of its chunk
                live.status["latency"] = time.monotonic() - take.begun
                live.lead = max(1.2 * live.status["latency"], 0.8 * live.lead)
                take.begun = None
            take.made.append(Shown(next(live.count), take.obeyed["seq"], frame))


def settings_of(job, models):
    """A recording's settings, besides the inputs of its chunks."""
    config = job.config
    window = -1 if config.window is None else config.window
    return {
        "track_id_mode": config.track_id_mode,
        "seed": job.seed,
        "chunk": config.chunk,
        "sink": config.sink,
        "window": window,
        "steps": len(config.sigmas),
        "fps": job.fps,
        "dtype": str(job.dtype).removeprefix("torch."),
        "weights": recording.checksum(models),
    }


def open_server(address):
    """A server at (host, port), which does not answer yet. UserError if it cannot have that."""
    host, port = address
    with naming(f"--host {host} --port {port}", "not an address of this machine"):
        try:
            return http.server.ThreadingHTTPServer(address, Handler)
        except OSError as e:
            raise UserError(f"{reason_of(e)}; choose others") from None


def serve(live, server, host, allowed):
    """Answer browsers in separate threads. server: of open_server, at `host`; allowed: see Live.
    Prints the address."""
    server.live = live
    live.allowed = allowed
    live.hosts = [host.lower(), "localhost"]
    if host == "0.0.0.0":                   # all addresses of this machine; and its name
        live.hosts.append(socket.gethostname().lower())
    if host != "127.0.0.1" or allowed:
        names = " or ".join([host] + allowed)
        print(f"warning: whoever reaches {names} and sees the address can steer this program")
    print(f"http://{host}:{server.server_port}/{TOKEN}/", flush=True)
    for name in allowed:
        print(f"and, as --allow says, {name}/{TOKEN}/", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=clock, args=(live,), daemon=True).start()


def host_header(address):
    """The Host header that a browser sends: x.example:9000 for http://x.example:9000/."""
    host = address.lower().rpartition("://")[2].partition("/")[0]
    if not re.fullmatch(r"[\w.-]+(:\d+)?", host):
        raise argparse.ArgumentTypeError(f"{address!r} is no name of a host, as x.example or "
                                         "localhost:9000")
    return host


def parse_flags(argv):
    """Parse the command line: a namespace, (host, port), and its other names. UserError for flags
    that fix tracks or frames beforehand, or that the page replaces."""
    parser = sample.Parser(prog="python -m extras.page", allow_abbrev=False,
                           description="Draw tracks on a video while it streams.")
    sample.add_flags(parser)
    add = parser.add_argument_group("page").add_argument
    add("--host", default="127.0.0.1", help="an address of this machine (127.0.0.1)")
    add("--port", type=number(int, 0, 65535), default=PORT, metavar="N", help=f"({PORT})")
    add("--allow", type=host_header, action="append", default=[], metavar="HOST",
        help="what a browser calls it behind a tunnel or another port: x.example, localhost:9000")
    parser.set_defaults(out=None)
    flags = parser.parse_args(argv)
    others = [
        (flags.tracks or flags.drag or flags.pin, "--tracks, --drag and --pin"),
        (flags.grid is not None, "--grid"),
        (flags.frames, "--frames"),
        (flags.overlay, "--overlay"),
        (flags.sampler == "teacher", "--sampler teacher"),
    ]
    for typed, name in others:
        if typed:
            raise UserError("the page streams for as long as it is open, and tracks are drawn "
                            f"there: drop {name}")
    return flags, (flags.host, flags.port), flags.allow


def pictures(image):
    """Files to start from: the image, and the examples that have tracks."""
    found = sorted(sample.ASSETS.glob("*.png"))
    examples = [path for path in found if path.with_suffix(".npz").exists()]
    return [image] + [path for path in examples if path.resolve() != image.resolve()]


def check_out(flags):
    """UserError unless a recording can be written to --out without replacing an input file."""
    others = vars(flags) | {"out": None}
    inputs = [value for value in others.values() if isinstance(value, Path)]
    check_output(flags.out, (".mp4",), inputs)
    for ending in (".png", ".npz"):
        check_output(flags.out.with_suffix(ending), (ending,), inputs)


def new_control(job, out):
    """What all pages share at first, see merge. out: of a recording from the start, or None."""
    return {
        "seq": 0,
        "take": 0,
        "chunk": job.config.chunk,
        "pause": True,
        "record": out is not None,
        "prompt": job.prompt or "",
        "groups": {},
        "points": [],
    }


def new_status(job, image):
    """What else a page is told at first."""
    config = job.config
    return {
        "size": config.size,
        "image": image.size,
        "latency": 0.0,
        "slowness": 0.0,
        "fps": job.fps,
        "words": reads_words(config),
        "menu": world.caption_phrases(),
        "chunks": sorted({1, config.chunk}),
        "recorded": "",
    }


def run(argv):
    """Run the program; returns the exit code."""
    flags, address, allowed = parse_flags(argv)
    image = sample.load_image(flags.image)
    video.find_ffmpeg()                        # whoever watches may record
    if flags.out:
        check_out(flags)
    weights = sample.inspect(flags.weights or sample.ASSETS / "tiny.safetensors")
    tracks = sample.no_tracks(sample.MOST_FRAMES)
    job = sample.resolve(flags, weights, tracks)
    config = job.config
    pixels = fit_image(image, config.size)
    check(flags, job, pixels, tracks, sample.WAN_FRAMES)
    if not (config.causal and config.track_dim and weights.has_head):
        raise UserError(f"{weights.path}: the page needs a trained student, which streams and "
                        "follows tracks")
    server = open_server(address)               # a port in use is found before any model loads
    models = sample.load_models(job, pixels)
    for note in job.notes:
        print(f"note: {note}")
    job = replace(job, frames=None)
    control = new_control(job, flags.out)
    status = new_status(job, image)
    with hold_signals() as noted:
        first = Shown(0, 0, to_frames(pixels[:, :, None])[0])
        live = Live(image, config, control, status, first, noted, flags.out)
        live.pictures = pictures(flags.image)
        serve(live, server, address[0], allowed)
        while not noted:
            perform(live, job, models, flags.out)
    return 0


def main(argv=None):
    """`run`, with errors as one line and an exit code."""
    return sample.reported(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
