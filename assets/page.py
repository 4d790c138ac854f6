"""What the page that paints tracks asks of sample.py, over HTTP, and what is refused. It knows no model: requests only
read and replace values of `live`, which sample.serve sets up.
"""

import contextlib
import http.server
import io
import json
import math
import secrets
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

TOKEN, NONCE = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{NONCE}'; style-src 'nonce-{NONCE}'; "
           "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
MOST = {"application/json": 2 ** 16, "image/png": 2 ** 23, "image/jpeg": 2 ** 23}      # bytes that may be posted
PAGE = Path(__file__).with_name("interactive.html").read_text(encoding="utf-8").replace("NONCE", NONCE).encode()
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
