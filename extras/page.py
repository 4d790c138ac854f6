"""The page that paints tracks while a video streams, and what it records.

Requests only read and replace values of `live`; the main thread alone runs the model. What may be asked over HTTP, and
what is refused, is in Handler.
"""

import collections
import contextlib
import http.server
import io
import itertools
import json
import math
import os
import secrets
import socket
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from motionstream import naming
from sample import (UMT5_DIM, Motion, enlarge, enlargement, fit_image, fit_tracks, follow, generate, hold_signals,
                    load_image, to_frames, video_file)

RECORDING = Path("recording.mp4")   # what is recorded, without --out
TOKEN, NONCE = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{NONCE}'; style-src 'nonce-{NONCE}'; "
           "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
MOST = {"application/json": 2 ** 16, "image/png": 2 ** 23, "image/jpeg": 2 ** 23}      # bytes that may be posted
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("NONCE", NONCE).encode()
KINDS = {"seq": int, "take": int, "chunk": int, "pause": bool, "record": bool, "prompt": str, "points": list}


def read_control(data, chunks, reach):
    """The page's JSON, checked: {"seq": rises with every post, "take": another one starts anew, "chunk", "pause",
    "record", "prompt", "points": [[x, y, x and y in frame 0, and when grabbed], …] in pixels of the image, below
    `reach`}."""
    control = json.loads(data, parse_constant=float)
    points = np.array(control["points"], np.float64)
    if ({name: type(value) for name, value in control.items()} != KINDS or control["chunk"] not in chunks
            or points.shape not in ((0,), (len(points), 6)) or len(points) > 256 or not (abs(points) < reach).all()
            or len(control["prompt"]) > 1000 or not 0 < control["seq"] < 2 ** 53):
        raise ValueError("not what the page sends")
    return control | {"points": points.tolist()}


def named(names, port):
    """The Host headers that name a server: a name of it and its port, which browsers leave out if it is 80."""
    return [f"{name}:{port}" for name in names] + [*names] * (port == 80)


class Handler(http.server.BaseHTTPRequestHandler):
    """What is asked for and posted, if it comes with the token and from this page; everything else is refused."""
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 5, True        # seconds that a socket may stall

    def handle(self):
        with contextlib.suppress(OSError):                          # the other side has gone, or stalls
            if threading.active_count() < 64:                       # one for each connection
                super().handle()

    def log_message(self, *_):
        """Print nothing of what strangers send."""

    def answer(self):
        """Who may ask: whoever names one of our hosts, no other page as origin, and the token. And for what."""
        live, host, (token, _, path) = self.server.live, self.headers.get("Host", ""), self.path[1:].partition("/")
        hosts = named((*live.hosts, self.connection.getsockname()[0]), self.server.server_port)
        ours = self.headers.get("Origin") in (None, f"http://{host}")
        ours = ours and secrets.compare_digest(token.encode(), TOKEN.encode())
        name, _, seen = f"{self.command} {path}".partition("/")
        state = live.control | live.status | {"frame": live.frame[0]}
        asked = {"GET ": lambda *_: ("text/html; charset=utf-8", PAGE), "POST control": self.post,
                 "GET status": lambda *_: ("application/json", json.dumps(state).encode()),
                 "GET frame": self.newest}.get(name, lambda *_: 404)
        answer = 421 if host not in hosts else asked(live, seen) if ours else 403
        if isinstance(answer, int):
            return self.send_error(answer)
        kind, body, *more = answer
        self.send_response(200)
        for header in (*HEADERS.items(), *more, ("Content-Type", kind), ("Content-Length", len(body))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def newest(self, live, seen):
        """The newest frame, as soon as it is not the one that the page has seen: a slow page skips some."""
        live.watched, jpeg = time.monotonic(), io.BytesIO()
        while str(live.frame[0]) == seen and time.monotonic() < live.watched + 1 and not live.stop:
            time.sleep(0.004)
        number, seq, frame = live.frame
        Image.fromarray(frame).save(jpeg, "jpeg", quality=92, subsampling=0)
        return "image/jpeg", jpeg.getvalue(), ("Frame", number), ("Seq", seq)

    def post(self, live, _):
        """A control, which counts if it is the newest, or an image for the next take."""
        kind, length = self.headers.get_content_type(), self.headers.get("Content-Length", "")
        if kind not in MOST or not length.isdecimal() or int(length[:9]) > MOST[kind]:
            return 415 if kind not in MOST else 413 if length.isdecimal() else 411
        data = self.rfile.read(int(length[:9]))
        try:
            if kind == "application/json":
                control = read_control(data, live.status["chunks"], 3 * max(live.image.size))
                with live.lock:
                    live.control = max(live.control, control, key=lambda control: control["seq"])
            elif math.prod(Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]).size) > 2 ** 25:
                return 413
            else:
                live.image = live.load_image(io.BytesIO(data))
        except Exception:                                           # wrong data raise a dozen kinds
            return 400
        return "application/json", b"{}"


def clock(live):
    """Lets one frame after the other be seen, at the clip's rate, while somebody watches and it is not paused."""
    while not live.stop:
        (queue, seen), live.runs = live.queues, time.monotonic() - live.watched < 2 and not live.control["pause"]
        if queue and live.runs:
            live.frame, live.tick = queue.popleft(), max(live.tick, time.monotonic()) + 1 / live.status["fps"]
            seen.append(live.frame[2])
        time.sleep(max(live.tick - time.monotonic(), 0.002))


def unused(path):
    """The path of a video, or the first of path-2, path-3, … if there is such a video."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(new for new in itertools.chain([path], numbered) if not new.exists())


@contextlib.contextmanager
def recorder(live, out):
    """`with recorder(…) as record`: record(on), to be called often, puts what has been seen of a take in a video while
    it is on: a new one each time, whole when it ends. out: the path of the first one that begins with a take, or what
    names are made of."""
    append, path, count, whole = None, None, 0, True

    def record(on):
        nonlocal append, path, count, whole
        (_, seen), fps = live.queues, live.status["fps"]
        if on and not os.access(out.absolute().parent, os.W_OK):
            on, live.status["recorded"] = False, "the folder is not writable, nothing is recorded"
        while seen and (on or count):                   # those before it was turned off are recorded, too
            if not count:
                path, live.out = live.out if live.out and whole else unused(out), None
                append = files.enter_context(video_file(path, fps))
            frame, count = seen.popleft(), count + 1
            append(enlarge(frame, enlargement(frame.shape[:2])))
            live.status["recorded"] = f"{path.name}, {count / fps:.1f} s"
        if on:
            return
        if count:
            files.close()
            print(f"{path}: {count} frames")
        whole = whole and not (count or seen)           # whether nothing of the take has been seen yet
        count = 0
        seen.clear()

    with contextlib.ExitStack() as files:
        yield record
        record(False)


def fitted(given, size, config):
    """What each chunk is given, by the page, as `stream` wants it: (tracks, prompt) to (Motion, prompt). tracks
    (1 + T, N, 2) float32 in pixels of the image of `size` (width, height), NaN where hidden; the first row, where each
    track starts, only tells its ID."""
    for tracks, prompt in given:
        ids = np.array([zlib.crc32(start) for start in np.ascontiguousarray(tracks[0])])       # as good as random
        motion = fit_tracks((tracks, ~np.isnan(tracks[..., 0]), ids), size, 0, config, 0, note=lambda _: None)
        yield Motion(motion.tracks[:, 1:], motion.visible[:, 1:], motion.ids), prompt


def painted(live, take, config):
    """What each chunk is given, for `fitted`, of points painted while it streams: lines from where they were to where
    they are when the chunk has to be begun, until another take is asked for."""
    last, later = {}, 0
    while True:
        time.sleep(0.004)
        if live.stop or live.control["take"] != take:
            return
        live.record(live.control["record"])
        if not live.runs or live.tick + len(live.queues[0]) / live.status["fps"] - time.monotonic() > live.lead:
            continue
        live.obeyed, live.begun, lines = live.control, time.monotonic(), {}
        for x, y, *start, from_x, from_y in live.obeyed["points"]:
            begin = last.get(tuple(start), (from_x, from_y)) if later else start
            lines[tuple(start)] = np.array([begin, (x, y)])
        tracks, *_ = follow(lines.values(), 4 * config.chunk + (1 if later else -3))
        last, starts = dict(zip(lines, tracks[-1])), np.float32([*lines]).reshape(1, -1, 2)
        yield np.concatenate([starts, tracks[later:]]), live.obeyed["prompt"]
        later = 1


@torch.inference_mode()
def perform(live, args, model, vae, encoded):
    """One take: the stream from live.image on, until another take is asked for or it is over."""
    c, image, control = live.config, live.image, live.control
    more = c.chunk // control["chunk"]                              # chunks remembered, so that as many frames are
    c = model.config = replace(c, chunk=control["chunk"], sink=more * c.sink, window=c.window and more * c.window)
    pixels, live.status["image"] = fit_image(image, c.size), image.size
    live.queues, live.frame = ((collections.deque(), collections.deque()),
                               (next(live.count), 0, to_frames(pixels[:, :, None])[0]))
    given = fitted(painted(live, control["take"], c), image.size, c)
    with recorder(live, args.out or RECORDING) as live.record:
        for frame in generate(args, None, pixels, given, model, vae, encoded):
            if live.begun:                                          # it is the first of its chunk
                live.status["latency"], live.begun = time.monotonic() - live.begun, None
                live.lead = max(1.2 * live.status["latency"], 0.8 * live.lead)
            live.queues[0].append((next(live.count), live.obeyed["seq"], frame))


def serve(args, image, model, vae, encoded):
    """--interactive: prints the page's address, then streams to it until Ctrl-C."""
    c, prompt = model.config, model.config.prompt if args.prompt is None else args.prompt
    with hold_signals() as noted:
        live = SimpleNamespace(
            control={"seq": 0, "take": 0, "chunk": c.chunk, "pause": True, "record": bool(args.out),
                     "prompt": prompt or "", "points": []},
            status={"size": c.size, "image": image.size, "latency": 0.0, "fps": args.fps or c.fps,
                    "words": c.text_dim != UMT5_DIM, "chunks": sorted({1, c.chunk}), "recorded": ""},
            frame=(0, 0, to_frames(fit_image(image, c.size)[:, :, None])[0]), count=itertools.count(1), queues=((), ()),
            config=c, image=image, out=args.out, stop=noted, lock=threading.Lock(), runs=False, watched=-math.inf,
            tick=0.0, lead=0.0, begun=None, load_image=load_image)
        with naming(f"--host {args.host} --port {args.port}", "not an address of this machine"):
            server = http.server.ThreadingHTTPServer((args.host, args.port), Handler)
        server.live, live.hosts = live, [args.host.lower(), "localhost"]
        if args.host == "0.0.0.0":                                  # all addresses of this machine; and its name
            live.hosts.append(socket.gethostname().lower())
        if args.host != "127.0.0.1":
            print(f"warning: whoever reaches {args.host} and sees the address can steer this program")
        print(f"http://{args.host}:{server.server_port}/{TOKEN}/", flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=clock, args=(live,), daemon=True).start()
        while not noted:
            perform(live, args, model, vae, encoded)
        return 0
