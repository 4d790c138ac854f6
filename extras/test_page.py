"""The page: who may ask what, controls, frames and recordings; in a browser too."""

import contextlib
import http.client
import io
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image

import extras.page
import sample
from extras import world
from extras.page import Given, Recorder, Refused, Take, gather, glide, join_chunks, merge, named
from extras.testing import (HERE, assert_near, folder, new_model, new_vae, quiet, rand, randomised, sampled, saved, seeded,
                            slow, workplace)
from motionstream import motion_inputs, save_pretrained
from vae import LinearVAE, LinearVAEConfig


class Client:
    """Speaks to the page's program as the page does; what differs is given."""

    def __init__(self, address):
        self.host, self.token = re.fullmatch(r"http://([^/]+)/([^/]+)/\n", address).groups()
        self.open, self.seq, self.seen = http.client.HTTPConnection(self.host, timeout=10), 0, ""

    def ask(self, name, body=None, path=None, **headers):
        """Status, headers and body of an answer, on the open connection, or a new one if it was closed meanwhile."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for last in False, True:
            try:
                self.open.request("GET" if body is None else "POST", path or f"/{self.token}/{name}", body, headers)
                answer = self.open.getresponse()
                break
            except ConnectionError:
                self.open.close()
                assert not last, "it does not answer"
        return answer.status, answer.headers, answer.read()

    def control(self, points=(), name="all", **changes):
        """Post a control, with a group of points by that name, if there are points: (x, y) now, and at the start and
        when grabbed if that is elsewhere."""
        rows = [list(point) * (6 // len(point)) for point in points]
        groups = {name: group(rows)} if rows else {}
        state = {"take": 0, "chunk": 3, "pause": False, "prompt": "", "record": self.status()["record"],
                 "groups": groups} | changes
        code, _, body = self.ask("control", json.dumps(state), Content_Type="application/json")
        if code == 200:
            self.seq = json.loads(body)["seq"]
        return code

    def status(self):
        return json.loads(self.ask("status")[2])

    def watch(self, frames=1):
        """See so many new frames: their numbers and what they obey."""
        numbers, until = [], time.monotonic() + 10
        while len(numbers) < frames:
            assert time.monotonic() < until, "no frames come"
            code, headers, _ = self.ask(f"frame/{self.seen}/test")
            assert code == 200, code
            if headers["Frame"] != self.seen:
                self.seen = headers["Frame"]
                numbers.append((int(self.seen), int(headers["Seq"])))
        return numbers


def group(rows, kind="drag", path=()):
    """A group of points, as the page posts it."""
    return {"kind": kind, "points": rows, "path": list(path)}


@contextlib.contextmanager
def served(*flags):
    """The program, in a thread, and a client of it."""
    _, here = workplace()
    stop = []
    usual = ("--image", here / "image.png", "--weights", here / "student.safetensors", "--vae",
             here / "vae.safetensors", "--port", "0", "--fps", "100")
    words = [str(word) for word in (*usual, *flags)]
    stoppable = unittest.mock.patch.object(extras.page, "hold_signals", lambda: contextlib.nullcontext(stop))
    with quiet() as (out, err), stoppable:
        thread = threading.Thread(target=extras.page.main, args=(words,))
        thread.start()
        try:
            while "http" not in out.getvalue():
                assert thread.is_alive(), err.getvalue()
                time.sleep(0.01)
            yield Client(next(line for line in out.getvalue().splitlines(True) if line.startswith("http")))
        finally:
            stop.append(signal.SIGINT)
            thread.join(20)
    assert not thread.is_alive() and not err.getvalue(), err.getvalue()


def test_the_page_answers_only_those_who_know_its_address_and_nothing_else():
    deep = b'{"points":' + b"[" * 30000 + b"]" * 30000 + b"}"
    row, png = [1.0] * 6, (workplace()[1] / "image.png").read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "png")

    def control(points=(row,), **changes):
        state = {"take": 0, "chunk": 3, "pause": True, "record": False, "prompt": "", "groups": {"a": group(points)}}
        return json.dumps(state | changes)

    def grouped(name="a", **changes):
        return control(groups={name: group([row]) | changes})

    typed = {"Content_Type": "application/json"}
    bad = [deep, b"", b"[]", b"\xff", b"null", control(extra=1), control(seq=1), control(take="1"), control(take=True),
           control(take=-1), control(take=2 ** 53), control(chunk=2), control(pause=1), control(record=0),
           control(record="x.mp4"), control(prompt="x" * 1001), control([row[:5]]), control([row, [1]]), control([]),
           control([["x"] * 6]), control([row] * 257), control([[1e6] * 6]), control([row[:5] + [math.nan]]),
           control([row[:5] + [-math.inf]]), control().replace("1.0", "1e999"), control().replace("1.0", "1" * 5000),
           control([[None] * 6]), control({"x": 1}), control(groups=[]), control(groups={"a": None}), grouped(kind="x"),
           grouped(kind=[]), grouped(extra=1), grouped(kind="camera"), grouped(name="a" * 30), grouped(path=[[1, 1e6]]),
           grouped(path=[1.0]), grouped(path=[row[:2]] * 1001)]
    with served() as page:
        ours, token = page.host, page.token
        cases = [
            (200, {"name": ""}), (200, {"name": "status"}), (200, {"name": "frame/"}), (200, {"name": "picture/0"}),
            (404, {"name": "picture/../page.py"}), (404, {"name": "picture/99"}), (404, {"name": "picture/" + "9" * 5000}),
            (404, {"name": "file/0"}), (404, {"name": "file/-1"}), (404, {"name": "favicon.ico"}),
            (403, {"name": "", "path": "/"}), (403, {"name": "", "path": f"/{token[:-1]}/"}),
            (403, {"name": "", "path": f"/{token}x/status"}),
            (404, {"name": "../../../etc/passwd"}), (404, {"name": "%2e%2e/sample.py"}), (404, {"name": "control"}),
            (421, {"name": "status", "Host": "evil.example"}), (421, {"name": "status", "Host": ours + ".evil"}),
            (403, {"name": "status", "Origin": "http://evil.example"}), (403, {"name": "status", "Origin": "null"}),
            (200, {"name": "status", "Origin": f"http://{ours}"}), (404, {"name": "status", "body": "{}"} | typed),
            (415, {"name": "control", "body": control(), "Content_Type": "text/plain"}),
            (415, {"name": "control", "body": control()}),
            (413, {"name": "control", "body": b"{}", "Content_Length": str(2 ** 18 + 1)} | typed),
            (413, {"name": "control", "body": b"x", "Content_Length": "9" * 5000, "Content_Type": "image/png"}),
            (400, {"name": "control", "body": b"", "Content_Length": "0" * 9 + "9" * 9} | typed),
            (400, {"name": "control", "body": b"", "Content_Length": "0" * 5000} | typed),
            (411, {"name": "control", "body": iter([b"{}"]), "Transfer_Encoding": "chunked"} | typed),
            (411, {"name": "control", "body": b"", "Content_Length": "-1"} | typed),
            (400, {"name": "control", "body": b"GIF89a", "Content_Type": "image/png"}),
            (400, {"name": "control", "body": png[:50], "Content_Type": "image/png"}),
            (413, {"name": "control", "body": bomb.getvalue(), "Content_Type": "image/png"}),
            (200, {"name": "control", "body": png, "Content_Type": "image/png"}),
            *((400, {"name": "control", "body": body} | typed) for body in bad),
            (200, {"name": "control", "body": "{}"} | typed),
            (409, {"name": "control", "body": control(groups={"a": group([row] * 99), "b": group([row] * 158)})} | typed),
            (403, {"name": "control", "body": control(), "Origin": "http://evil.example"} | typed),
            (200, {"name": "control", "body": control(), "Origin": f"http://{ours}"} | typed)]
        for code, request in cases:
            found, headers, body = page.ask(**request)
            assert found == code, f"{found} instead of {code}: {str(request)[:200]}"
            if code == 200:
                assert "default-src 'none'" in headers["Content-Security-Policy"]
                assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
        html = page.ask("")[2].decode()
        assert "http" not in html.replace("http-equiv", "") and not re.search(r"\son\w+=|style=", html)
        status = page.status()                                  # as the last one said, unharmed
        assert (status["seq"], status["groups"]) == (2, {"a": group([row])}), status


def test_a_page_for_all_addresses_answers_to_this_machines_own_and_to_no_other():
    name = socket.gethostname().lower()
    with served("--host", "0.0.0.0") as page:
        port = page.host.rpartition(":")[2]
        page.open = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=10)
        for host, code in (("127.0.0.1", 200), ("localhost", 200), (name, 200), ("0.0.0.0", 200), ("evil.example", 421),
                           (f"{name}.evil.example", 421), ("127.0.0.2", 421), ("", 421)):
            assert page.ask("status", Host=f"{host}:{port}")[0] == code, host
            assert page.ask("status", Host=host)[0] == 421, host            # a port that browsers do not leave out
        assert page.ask("status", Host=f"127.0.0.1:{port}", Origin=f"http://{name}:{port}")[0] == 403
        page.open = http.client.HTTPConnection(f"127.0.0.2:{port}", timeout=10)         # another of its addresses
        assert page.ask("status", Host=f"127.0.0.2:{port}")[0] == 200
    with served() as page:
        port = page.host.rpartition(":")[2]
        for host, code in ("127.0.0.1", 200), ("localhost", 200), (name, 421), ("0.0.0.0", 421), ("127.0.0.2", 421):
            assert page.ask("status", Host=f"{host}:{port}")[0] == code, host
    assert named(["a", "b"], 80) == ["a:80", "b:80", "a", "b"] and named(["a"], 8765) == ["a:8765"]


def test_a_tunnel_is_refused_with_the_flag_that_lets_it_in():
    for flags, code in ((), 421), (("--allow", "https://X.example/", "--allow", "localhost:9000"), 200):
        with served(*flags) as page:
            for name in "x.example", "localhost:9000":
                for origin in {}, {"Origin": f"https://{name}"}, {"Origin": f"http://{name}"}:
                    found, _, body = page.ask("status", Host=name, **origin)
                    assert found == code, (name, origin, found)
                    assert code == 200 or "--allow" in body.decode() and repr(name) in body.decode(), body
            for name in "y.example", "x.example:81":
                assert page.ask("status", Host=name)[0] == 421
            assert page.ask("status", Origin=f"https://{page.host}")[0] == 403      # nothing here speaks https


def test_two_pages_add_to_each_others_points_and_the_number_of_a_post_comes_with_the_frames():
    with served() as one:
        two = Client(f"http://{one.host}/{one.token}/\n")
        assert one.control([(9, 8)], "mine") == 200 and two.control([(20, 8)], "yours", pause=False) == 200
        assert one.status()["groups"] == {"mine": group([[9, 8] * 3]), "yours": group([[20, 8] * 3])}
        assert one.status() | {"frame": 0} == two.status() | {"frame": 0}
        one.ask("frame//one"), two.ask("frame//two"), two.ask("frame//two")
        assert one.status()["viewers"] == 2
        assert one.control([(10, 8)], "mine", prompt="fading light") == 200 and one.seq == 3
        told = two.status()
        assert told["prompt"] == "fading light" and set(told["groups"]) == {"mine", "yours"}
        seen = two.watch(60)
        assert seen[-1][1] == 3 and [seq for _, seq in seen] == sorted(seq for _, seq in seen)
        assert [number for number, _ in seen] == sorted({number for number, _ in seen})
        assert two.control([("20", "8")]) == 200 and two.status()["groups"]["all"]["points"] == [[20.0, 8.0] * 3]
        one.control([(1, 1)], "mine", take=1)                   # all begin anew
        assert set(two.status()["groups"]) == {"mine"}
        two.watch(30)


def test_of_the_ground_what_is_held_is_left_out_and_what_was_removed_is_remembered_for_long():
    ground = [[x, 5.0, x, 5.0, x, 5.0] for x in (0.0, 10.0, 20.0)]
    held = [[99.0, 99.0, 12.0, 6.0, 0.0, 0.0]]                  # it started near the second
    groups = {"a": group(held, "pin"), "camera": group(ground, "camera"), "b": group(held, "left")}
    assert gather(groups, 4) == held + [ground[0], ground[2]]
    assert gather({"camera": group(ground, "camera")}, 4) == ground and gather({}, 4) == []
    control = {"seq": 0, "take": 0, "chunk": 3, "pause": True, "record": False, "prompt": "", "groups": {}, "points": []}
    for number in range(100):
        changes = {"groups": {str(number): group(held, "left"), "camera": group(ground, "left")}}
        control = merge(control, json.dumps(changes), [3], 4)
    assert list(control["groups"]) == ["camera", *map(str, range(36, 100))] and control["points"] == []
    changes = {"groups": {"camera": group(ground, "camera"), "b": group(held * 256)}}
    assert len(merge(control, json.dumps(changes), [3], 4)["points"]) == 256
    changes["groups"]["c"] = group(held)
    try:
        merge(control, json.dumps(changes), [3], 4)
        raise AssertionError("257 points were taken")
    except Refused as e:
        assert e.args[0] == 409 and "256" in e.args[1]


def test_words_that_the_tiny_model_never_learned_are_named():
    assert sample.unknown_words("Fading light, a cat turns; spinning shapes") == ["a", "cat", "turns"]
    assert world.caption(1, 2) == "fading light, pulsing shapes" and sample.unknown_words(world.caption(2, 1)) == []
    assert [[phrase.split()[1] for phrase in row] for row in world.caption_phrases()] == [["light"] * 3, ["shapes"] * 3]
    with served() as page:
        assert page.status()["unknown"] == [] and page.status()["menu"][0][1] == "fading light"
        page.control(prompt="a steady cat")
        assert page.status()["unknown"] == ["a", "cat"]


def test_pictures_to_start_from_and_recordings_can_be_fetched():
    with folder() as mine, unittest.mock.patch.object(extras.page, "RECORDING", mine / "recording.mp4"):
        with served() as page:
            assert page.status()["pictures"] == ["image", "camera", "drag", "several"]
            with Image.open(io.BytesIO(page.ask("picture/2")[2])) as shown, Image.open(HERE / "assets/drag.png") as image:
                assert np.array_equal(np.asarray(shown), np.asarray(image.convert("RGB")))
            page.control([(9, 8)], take=1, record=True)
            page.watch(30)
            assert page.status()["files"] == [] and page.status()["slowness"] > 0
            page.control(take=1, record=False)
            appearing(mine / "recording.mp4")
            until = time.monotonic() + 5
            while not page.status()["files"]:
                assert time.monotonic() < until
            names = page.status()["files"]
            assert names == ["recording.mp4", "recording.png", "recording.npz"]
            for number, name in enumerate(names):
                assert page.ask(f"file/{number}")[2] == (mine / name).read_bytes()
            (mine / "recording.png").unlink()
            assert page.ask("file/1")[0] == 404


def test_a_slow_page_skips_frames_and_delays_nobody():
    with served() as page:
        page.control()
        page.watch(5)
        slow = http.client.HTTPConnection(page.host)
        slow.request("GET", f"/{page.token}/frame//slow")            # and never reads the answer
        begun = time.monotonic()
        seen = page.watch(60)
        assert time.monotonic() - begun < 5 and seen[-1][0] - seen[0][0] < 80
        answer = slow.getresponse()
        assert answer.read() and int(answer.headers["Frame"]) <= seen[-1][0] - 40
        slow.request("GET", f"/{page.token}/frame/{answer.headers['Frame']}/slow")
        assert int(slow.getresponse().headers["Frame"]) >= seen[-1][0]


def test_a_crowd_of_viewers_or_connections_is_turned_away():
    with served() as page:
        last, watch = page.ask("frame/")[1]["Frame"], "GET /{}/frame/{}/x HTTP/1.1\r\nHost: {}\r\n\r\n"
        time.sleep(0.1)
        before, crowd = threading.active_count(), []
        for number in range(80):                    # half of them wait for a frame, which does not come: it is paused
            crowd.append(socket.create_connection(page.host.split(":")))
            if number % 2:
                crowd[-1].sendall(watch.format(page.token, last, page.host).encode())
            time.sleep(0.01)                        # else it queues for seconds, and the first time out
        time.sleep(0.2)
        gone = [one for one in select.select(crowd, [], [], 0)[0] if not one.recv(1)]       # they have been closed
        assert threading.active_count() <= 65 and 80 - 64 <= len(gone) < 60, (threading.active_count(), len(gone))
        assert page.status()["take"] == 0                           # who is there stays
        for connection in crowd:
            connection.close()
        until = time.monotonic() + 4                                # a viewer waits for a second
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.05)
        assert threading.active_count() <= before and page.status()["take"] == 0


def test_nothing_is_made_while_paused_or_while_nobody_watches():
    with served() as page:
        assert page.status()["pause"] and page.status()["frame"] < 2 and page.ask("frame//x")[1]["Frame"] in "01"
        page.control()
        page.watch(30)
        page.control(pause=True)
        time.sleep(0.2)
        first = page.status()["frame"]
        time.sleep(0.3)
        assert page.status()["frame"] == first
        page.control()
        assert page.watch(20)[-1][0] >= first + 20              # not one was left out
        time.sleep(2.4)                                         # nobody watches any more
        first = page.status()["frame"]
        time.sleep(0.3)
        assert page.status()["frame"] == first


def test_points_reach_the_track_head_on_lines_that_end_where_they_are_now():
    calls = []

    def seen(model, tracks, visible, ids, **rest):
        calls.append((tracks[0].numpy(), visible.all().item(), ids[0].tolist()))
        return motion_inputs(model, tracks, visible, ids, **rest)

    start, far = (9.0, 12.0), (30.0, 20.0)                      # in the image, 48x40; the video is its middle, 48x32
    with unittest.mock.patch.object(sample, "motion_inputs", seen), served("--fps", "40") as page:
        page.control([start])
        page.watch(12)
        page.control([(*far, *start, *start), (24.0, 30.0, 2.5, 20.0, 20.0, 30.0)])
        page.watch(24)
    assert all(visible for _, visible, _ in calls) and [len(tracks) for tracks, _, _ in calls[:3]] == [9, 12, 12]
    assert np.allclose(calls[0][0], np.subtract(start, (0, 4)))
    moved = next(i for i, call in enumerate(calls) if call[0].shape[1] == 2)
    tracks, _, ids = calls[moved]                              # in the order of their starts
    weight = (np.arange(12) + 1)[:, None] / 12
    assert np.allclose(tracks[:, 1], start + weight * np.subtract(far, start) - (0, 4), atol=1e-4)
    assert np.allclose(tracks[:, 0], (20, 26) + weight * (4, 0), atol=1e-4)             # from where it was grabbed
    assert ids == [(16 << 16) + 2, (8 << 16) + 9]               # the pixels of frame 0
    assert np.allclose(calls[moved + 1][0], [(24, 26), np.subtract(far, (0, 4))])       # and there they stay


def test_a_restart_with_another_chunk_is_not_lost_while_a_take_begins():
    real, lengths = extras.page.to_frames, []

    def slow(video):                                            # the first take begins; the page is quicker
        time.sleep(0.3)
        return real(video)

    def seen(model, tracks, visible, ids, **rest):
        lengths.append(tracks.shape[1])
        return motion_inputs(model, tracks, visible, ids, **rest)

    head = unittest.mock.patch.object(sample, "motion_inputs", seen)
    with unittest.mock.patch.object(extras.page, "to_frames", slow), head, served() as page:
        page.control(take=1, chunk=1)
        page.watch(8)
    assert lengths[:3] == [1, 4, 4], lengths


def started(*flags):
    """The program, as a process of its own."""
    command = [sys.executable, "-m", "extras.page", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)


def frames_of(path):
    """All frames of a video, (T, H, W, 3)."""
    return np.stack(imageio.mimread(path, memtest=False))


@slow
def test_how_soon_a_drag_is_answered_and_that_memory_stays():
    """Shipped weights at 24 frames per second, two viewers that stall, 50 drags at random times for either chunk."""
    for chunk, most in (3, 2.0), (1, 1.0):
        program = started("--image", HERE / "assets/drag.png", "--port", "0", "--fps", "24")
        try:
            page, rng = Client(next(line for line in program.stdout if line.startswith("http"))), seeded()
            answers, starts, sizes = [], [], []
            stalled = [http.client.HTTPConnection(page.host) for _ in range(2)]
            for viewer in stalled:
                viewer.request("GET", f"/{page.token}/frame//x")
            page.control([(115, 256)], take=1, chunk=chunk)
            page.watch(48)
            for _ in range(50):
                point = (*(60 + 260 * torch.rand(2, generator=rng)).tolist(), 115, 256, 115, 256)
                page.control([point], take=1, chunk=chunk)
                begun = time.monotonic()
                while page.watch()[0][1] < page.seq:
                    pass
                answers.append(time.monotonic() - begun)
                starts.append(page.status()["latency"])
                page.watch(int(torch.randint(2, 36, (), generator=rng)))
                resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{program.pid}/status").read_text())
                sizes.append(int(resident[1]) / 1e3)
        finally:
            program.kill()
            program.stdout.close()
        for what, times in ("drag to its first frame", answers), ("chunk's start to its first picture", starts):
            print(f"chunk {chunk}, {what}: median {np.median(times):.3f} s, worst {max(times):.3f} s")
        print(f"memory {sizes[0]:.0f} to {sizes[-1]:.0f} MB")
        assert max(answers) < most and sizes[-1] < sizes[5] + 40


def test_ctrl_c_ends_within_two_seconds_and_the_recording_is_whole():
    seconds = []
    while not seconds or seconds[-1] >= 2 and len(seconds) < 3:
        seconds.append(interrupted() / slowness())
    assert seconds[-1] < 2, seconds


def slowness():
    """How many times longer work takes here, beside other jobs, than it would alone."""
    wall, own = time.perf_counter(), time.process_time()
    while time.process_time() < own + 0.3:
        pass
    return (time.perf_counter() - wall) / 0.3


def interrupted():
    """Seconds from Ctrl-C to the end of the program."""
    with folder() as here:
        program = started("--image", HERE / "assets/drag.png", "--port", "0", "--out", here / "out.mp4")
        try:
            page = Client(next(line for line in program.stdout if line.startswith("http")))
            page.control([(115, 256)])
            page.watch(20)
            begun = time.monotonic()
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 0
            took = time.monotonic() - begun
        finally:
            program.kill()
            program.stdout.close()
        assert int(page.seen) - 1 <= len(frames_of(here / "out.mp4"))      # 1 is the image
        return took


def appearing(path, seconds=10):
    """The frames of a video that is soon whole."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name} after {seconds} s"
        time.sleep(0.02)
    return frames_of(path)


def recorded(page, on, frames, **changes):
    """Record or not from now on, while so many frames are seen: the status in the end."""
    page.control([(9, 8)], record=on, **changes)
    page.watch(frames)
    return page.status()


def until_recorded(page, name, **changes):
    """Record until the page says that half a second is in the file called `name`."""
    for _ in range(50):
        said = recorded(page, True, 4, **changes)["recorded"]
        if said.startswith(f"{name}.mp4, ") and float(said.split()[1]) >= 0.5:
            return
    raise AssertionError(said)


def test_the_page_records_what_is_seen_when_it_asks_into_files_that_are_not_there():
    with folder() as mine, unittest.mock.patch.object(extras.page, "RECORDING", mine / "recording.mp4"):
        (mine / "recording.mp4").write_text("mine")
        (mine / "recording-3.npz").write_text("mine, too")
        with served("--seed", "3") as page:
            before = recorded(page, False, 30)
            assert not before["record"] and before["recorded"] == "" and len(list(mine.iterdir())) == 2
            begun = int(page.seen)
            status = recorded(page, True, 40)
            assert status["record"] and re.fullmatch(r"recording-2\.mp4, 0\.[2-9] s, the video alone", status["recorded"])
            assert not (mine / "recording-2.mp4").exists()
            page.control([(9, 8)], record=False, pause=True)    # it ends in a pause as well
            assert 40 <= len(appearing(mine / "recording-2.mp4")) <= int(page.status()["frame"]) - begun + 14
            until_recorded(page, "recording-4", take=1)         # another take, recorded from its image on
            until_recorded(page, "recording-5", take=2)         # and another one
            status = recorded(page, False, 30, take=2)
            assert re.fullmatch(r"recording-5\.mp4, [\d.]+ s", status["recorded"]) and not status["record"], status
            until_recorded(page, "recording-6", take=2)         # recorded when the program ends
        names = {file.name for file in mine.iterdir()}
        videos = {f"recording{i}.mp4" for i in ("", "-2", "-4", "-5", "-6")}
        beside = {f"recording{i}{ending}" for i in ("-4", "-5") for ending in (".png", ".npz")}
        assert names == videos | beside | {"recording-3.npz"}, names
        assert [(mine / name).read_text() for name in ("recording.mp4", "recording-3.npz")] == ["mine", "mine, too"]
        for i in 4, 5, 6:
            assert len(frames_of(mine / f"recording-{i}.mp4")) >= 9


def test_a_recording_begun_later_is_a_whole_video_beside_the_first():
    with folder() as mine:
        with served("--out", mine / "x.mp4") as page:
            assert recorded(page, True, 30)["record"] and not recorded(page, False, 20)["record"]
            recorded(page, True, 20)
        assert {file.name for file in mine.iterdir()} == {"x.mp4", "x.png", "x.npz", "x-2.mp4"}
        one, two = (frames_of(mine / f"{name}.mp4") for name in ("x", "x-2"))
        assert 28 <= len(one) < 90 and 19 <= len(two) < 90, (len(one), len(two))


def new_recorder(mine, **status):
    """A Recorder of a take that nothing was seen of yet."""
    live = SimpleNamespace(status={"fps": 10, "recorded": ""} | status, out=mine / "x.mp4", files=[])
    image = Image.new("RGB", (40, 30), "teal")
    return Recorder(live, Take(0, image, None), mine / "x.mp4", {"seed": 1})


def test_a_recording_has_each_frame_seen_while_it_is_on_and_keeps_nothing_else():
    with folder() as mine, quiet() as (out, _):
        (mine / "x.mp4").write_text("of an earlier take, which a recording begun in mid-take is not to replace")
        with new_recorder(mine) as recorder:
            seen = recorder.take.seen
            for i in range(50):
                recorder.keep("what a chunk was given")
                seen.append(np.full((64, 64, 3), 5 * i, np.uint8))
                recorder.record(i in range(20, 30) or i > 44)
                assert not seen and recorder.chunks is None
            with unittest.mock.patch.object(os, "access", lambda *_: False):
                recorder.record(False)
                seen.append(np.zeros((64, 64, 3), np.uint8))
                recorder.record(True)
                assert not seen and "not writable" in recorder.live.status["recorded"]
        assert "again" not in out.getvalue() and out.getvalue().count("there is the video alone") == 2
        assert (mine / "x.mp4").read_text().startswith("of an earlier") and not [*mine.glob("*.npz")]
        for name, numbers in ("x-2", range(20, 31)), ("x-3", range(45, 50)):       # 30: before it was turned off
            frames = frames_of(mine / f"{name}.mp4")
            assert frames.shape[1:] == (256, 256, 3)
            assert_near(torch.from_numpy(frames).float().mean((1, 2, 3)), 5.0 * torch.tensor([*numbers]), 0.02)


def test_a_recording_that_cannot_be_written_leaves_nothing_behind():
    with folder() as mine, quiet():
        try:
            with new_recorder(mine) as recorder:
                recorder.take.seen.append(np.zeros((64, 64, 3), np.uint8))
                recorder.record(True)
                raise RuntimeError("the model failed")
        except RuntimeError:
            pass
        assert not [*mine.iterdir()]


def test_a_line_ends_where_the_point_is_now_and_begins_where_it_was():
    rows = [[30, 8, 5, 6, 7, 8], [1, 2, 3, 4, 3, 4]]
    starts, tracks = glide(rows, {}, 9, begins=True)
    assert starts == [(3, 4), (5, 6)] and tracks.shape == (9, 2, 2) and tracks.dtype == np.float32
    assert np.array_equal(tracks[[0, -1]], np.float32([[[3, 4], [5, 6]], [[1, 2], [30, 8]]]))       # in frame 0 at its start
    starts, tracks = glide(rows, {(3, 4): (1, 6)}, 12, begins=False)
    assert np.allclose(tracks[:, 0], np.stack([np.ones(12), 6 - 4 * np.arange(1, 13) / 12], 1))     # from where it was
    assert np.allclose(tracks[2, 1], (7 + 23 / 4, 8))                   # a new one: from where it was grabbed
    starts, tracks = glide([], {}, 4, begins=False)
    assert starts == [] and tracks.shape == (4, 0, 2)


def test_chunks_are_joined_with_one_column_a_point_in_the_order_of_their_starts():
    def chunk(starts, length):
        ids = np.array([int(x) for x, _ in starts], np.int64)
        tracks = np.float32(starts)[None] + np.arange(length)[:, None, None]
        return Given(starts, ids, tracks.astype(np.float32), "")

    tracks, ids, start = join_chunks([chunk([(5.0, 0.0)], 1), chunk([(2.0, 9.0), (5.0, 0.0)], 4), chunk([(2.0, 9.0)], 4)])
    assert start.tolist() == [[2, 9], [5, 0]] and ids.tolist() == [2, 5] and ids.dtype == np.int64 and tracks.shape == (9, 2, 2) and tracks.dtype == np.float32
    there = ~np.isnan(tracks[..., 0])
    assert there[:, 0].tolist() == [False] + [True] * 8 and there[:, 1].tolist() == [True] * 5 + [False] * 4
    assert tracks[4].tolist() == [[5, 12], [8, 3]]
    tracks, ids, start = join_chunks([Given([], np.zeros(0, np.int64), np.zeros((4, 0, 2), np.float32), "")])
    assert tracks.shape == (4, 1, 2) and np.isnan(tracks).all() and ids.tolist() == [0] and start.shape == (1, 2)


def new_weights(here, mode):
    """Weights whose tracks have IDs of that kind, or of a model that copies, as flags."""
    if mode == "copies":
        vae = randomised(LinearVAE(LinearVAEConfig(4, 8, 4)))
        save_pretrained(vae, here / "vae.safetensors", **vae.metadata())
        model = new_model(track_id_mode="random", copies=True, in_dim=4 + 8 + 10 + 4, latent_std=(1.0, 0.9, 0.8, 0.7))
    else:
        saved(here / "vae.safetensors", new_vae())
        model = new_model(track_id_mode=mode)
    saved(here / "model.safetensors", model)
    return "--weights", here / "model.safetensors", "--vae", here / "vae.safetensors"


def played(recording, *flags):
    """The raw frames that sample.py makes of a recording, (T, H, W, 3), and what it prints. recording: NAME.npz."""
    kept = []

    def keep(path, fps):
        return contextlib.nullcontext(kept.append)

    words = ["--image", recording.with_suffix(".png"), "--tracks", recording, *flags]
    with unittest.mock.patch.object(sample, "video_file", keep), \
            unittest.mock.patch.object(sample, "enlarge", lambda frame, *_: frame):
        code, out, err = sampled(*words)
    assert code == 0, err
    return np.stack(kept), out


class KeptFrames:
    """Raw frames of recordings, by the names of their files, while the page records in here."""

    def __enter__(self):
        frames = self.frames = {}
        put = Recorder.put

        def put_and_keep(recorder, frame):
            put(recorder, frame)
            frames.setdefault(recorder.path.stem, []).append(frame)

        self.patch = unittest.mock.patch.object(Recorder, "put", put_and_keep)
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()


def record_three(page):
    """Record three takes: with points that come and go and a prompt that changes; of another image at chunk 1; without
    any point. Then the rest of one, from its middle on."""
    late = 25.1, 11.9, 29.0, 20.0
    page.control([(9.3, 8.2)])
    page.watch(15)
    page.control([(20.1, 15.7, 9.3, 8.2, 9.3, 8.2), (30.3, 20.2, *late)], prompt="fading light")
    page.watch(20)
    page.control([(31.2, 22.4, *late), (30.0, 22.0, *late)], prompt="fading light")     # two of one start: the last counts
    page.watch(20)
    picture = io.BytesIO()
    pixels = (rand(70, 60, 3, seed=5).numpy() * 60 + 128).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(picture, "png")
    assert page.ask("control", picture.getvalue(), Content_Type="image/png")[0] == 200
    page.control([(31.2, 22.4)], take=1, chunk=1)
    page.watch(20)
    page.control([(35.2, 22.4, 31.2, 22.4, 31.2, 22.4), (3, 3), (150, 20, 20, 20, 20, 20)], take=1, chunk=1,
                 prompt="spinning shapes")                      # one outside of the video, one that leaves it
    page.watch(20)
    page.control(take=2)
    page.watch(20)
    page.control([(9.3, 8.2)], take=3, record=False)
    page.watch(45)                                              # some are of the take before
    page.control([(9.3, 8.2)], take=3, record=True)
    page.watch(15)


def test_a_recording_is_played_again_to_the_same_raw_frames():
    for mode in "start", "random", "copies":
        with folder() as here, KeptFrames() as kept:
            weights = new_weights(here, mode)
            with served(*weights, "--out", here / "take.mp4", "--prompt", "", "--fps", "60", "--seed", "3") as page:
                record_three(page)
            later = [file.name for file in sorted(here.glob("take-4*"))]
            assert later == ["take-4.mp4"], sorted(here.iterdir())
            for name in "take", "take-2", "take-3":
                shown = np.stack(kept.frames[name])
                frames, out = played(here / f"{name}.npz", *weights)
                assert np.array_equal(frames, shown), (mode, name, frames.shape, shown.shape)
                assert "other weights" not in out and "resampled" not in out, out
                assert len(frames_of(here / f"{name}.mp4")) == len(shown)
            told = np.load(here / "take-2.npz")
            assert (told["chunk"], told["sink"], told["window"], told["fps"], told["seed"]) == (1, 3, 3, 60, 3)
            assert set(np.load(here / "take.npz")["prompts"]) == {"", "fading light"}
            with Image.open(here / "take.png") as image:
                assert np.array_equal(np.asarray(image), np.asarray(sample.load_image(workplace()[1] / "image.png")))
            first = np.stack(kept.frames["take"])
            for flags in ("--prompt", "spinning"), ("--seed", 4), ("--memory", "c3s0w1"):
                other, _ = played(here / "take.npz", *weights, *flags)
                assert other.shape == first.shape and not np.array_equal(other, first), flags
            saved(here / "model.safetensors", new_model(seed=1, **vars(inspected(here))))
            assert "other weights" in played(here / "take.npz", *weights)[1]


def inspected(here):
    return sample.inspect(here / "model.safetensors").config


def test_what_was_dragged_away_can_be_dragged_on_by_copying_models():
    config = new_model(track_id_mode="random").config
    start, now = (9.3, 8.2), (30.0, 20.0)                       # in the image, 48x40; the video is its middle
    for chunk in range(2):                                      # where it is by now changes nothing
        motion = extras.page.fit_chunk([start], np.float32([[now]] * 12), "", (48, 40), config)
        assert np.allclose(motion.start[0], [(9.3, 4.2)]), motion.start


def test_flags_that_the_page_has_no_use_for_and_files_that_it_would_overwrite_are_refused():
    _, here = workplace()
    image = here / "image.png"
    for flags, cure in (
        (("--image", image, "--tracks", here / "tracks.npy"), "drop --tracks, --drag and --pin"),
        (("--image", image, "--drag", "1,2 -> 3,4"), "drop --tracks, --drag and --pin"),
        (("--image", image, "--frames", "9"), "drop --frames"), (("--image", image, "--overlay"), "drop --overlay"),
        (("--image", image, "--sampler", "teacher"), "drop --sampler teacher"),
        (("--image", image, "--out", here / "image.mp4"), "image.png: is a file that is read"),
        (("--image", image, "--out", here / "x.png"), "choose a name that ends in .mp4"),
        (("--image", image, "--weights", here / "teacher.safetensors", "--vae", here / "vae.safetensors"),
         "the page needs a trained student"),
        (("--image", image, "--host", "300.0.0.1", "--weights", here / "student.safetensors", "--vae",
          here / "vae.safetensors"), "--host 300.0.0.1 --port 8765: "),
    ):
        with quiet() as (_, err):
            assert extras.page.main([str(word) for word in flags]) == 2
        assert cure in err.getvalue() and err.getvalue().count("\n") == 1, (flags, err.getvalue())


class Browser:
    """A headless Chromium, spoken to through a pipe (its DevTools protocol)."""

    def __init__(self, here, program, width):
        (ours, theirs), (answers, write) = os.pipe(), os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={here}")
        line = f'exec "$0" "$@" 3<&{ours} 4>&{write}'           # it reads from 3 and writes to 4
        self.process = subprocess.Popen(["bash", "-c", line, program, *flags, "about:blank"], pass_fds=(ours, write),
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(ours), os.close(write)
        self.out, self.into, self.count, self.rest, self.session = theirs, answers, 0, b"", {}
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self("Emulation.setDeviceMetricsOverride", width=width, height=860, deviceScaleFactor=1, mobile=width < 600)

    def __call__(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.into, 2 ** 20)
            message, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(message)
            if message.get("id") == self.count:
                return message["result"]

    def run(self, script):
        answer = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, seconds=10):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def drag(self, begin, end, steps=12):
        """With the mouse, between two places that are fractions of the picture."""
        left, top, width, height = self.run("(b => [b.x, b.y, b.width, b.height])(marks.getBoundingClientRect())")
        way = np.linspace(begin, end, steps) * (width, height) + (left, top)
        for kind, (x, y) in [("Pressed", way[0]), *(("Moved", at) for at in way), ("Released", way[-1])]:
            self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)
            time.sleep(0.05)


LIME = """(() => { const [c, p] = [document.getElementById('video'), document.getElementById('video').getContext('2d')];
  const d = p.getImageData(0, 0, c.width, c.height).data; let [n, x, y] = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) if (d[i + 1] > 140 && d[i + 2] < 90) {
    n++; x += i / 4 % c.width / c.width; y += Math.floor(i / 4 / c.width) / c.height; }
  return [n, x / n, y / n]; })()"""     # how much lime there is in the picture, and where


HUE = """(target => { const c = document.getElementById('video'), p = c.getContext('2d');
  const d = p.getImageData(0, 0, c.width, c.height).data, chroma = v => v.map(a => a - (v[0] + v[1] + v[2]) / 3);
  const hue = chroma(target), norm = v => Math.hypot(...v); let [n, x, y] = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) {
    const v = chroma([d[i], d[i + 1], d[i + 2]].map(a => a / 255)), near = hue.reduce((sum, a, k) => sum + a * v[k], 0);
    const w = near > 0.8 * norm(v) * norm(hue) ? Math.max(norm(v) - 0.15, 0) : 0;
    n += w; x += w * (i / 4 % c.width) / c.width; y += w * Math.floor(i / 4 / c.width) / c.height; }
  return [n, x / n, y / n]; })"""       # how much of a colour's hue there is in the picture, and where


@contextlib.contextmanager
def browsing(page, width=1280):
    program = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if program is None:
        raise unittest.SkipTest("NO BROWSER: the page was not tried; apt-get install chromium-headless-shell")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as here:
        browser = Browser(here, program, width)
        try:
            browser("Page.navigate", url=f"http://{page.host}/{page.token}/")
            browser.until("typeof view === 'object' && view !== null && seen !== ''")
            yield browser
        finally:
            os.killpg(browser.process.pid, signal.SIGKILL)      # all of its processes, which would go on drawing
            browser.process.wait()


def until_at(browser, script, goal, near=0.1):
    """Wait until the colour that `script` looks for is near `goal`; returns how much of it there is, and where."""
    x, y = goal
    browser.until(f"(([n, x, y]) => Math.hypot(x - {x}, y - {y}) < {near})({script})", 30)
    return browser.run(script)


def kinds(browser):
    """Of the groups of points that the page shows."""
    return sorted(kind for kind in browser.run("Object.values(groups).map(group => group.kind)") if kind != "left")


def until_frames(browser, count):
    """Wait until so many more frames have been seen."""
    begun = browser.run("+seen")
    browser.until(f"+seen >= {begun + count}", 30)


def until_told(browser, page, **state):
    """Wait until the program has been told of this state: {name: value}."""
    browser.until("!edited.size && !Object.keys(settings).length && !sent")
    until = time.monotonic() + 10
    while not state.items() <= page.status().items():
        assert time.monotonic() < until, f"not {state}: {page.status()}"
        time.sleep(0.02)
    return page.status()


def test_in_a_browser_one_object_goes_its_way_while_another_is_pinned():
    scene = world.new_scenes(1, 1, seeded(3), objects=2, camera=False, attributes=(0, 0), flat=True, style="simple")
    scene["position"][0, :2, 0], scene["radius"][:] = torch.tensor([[0.3, 0.35], [0.7, 0.7]]), 0.13
    red, blue = (f"{HUE}({colour.tolist()})" for colour in scene["colour"][0, :2])
    with folder() as here:
        Image.fromarray(sample.to_frames(world.render(scene, 384))[0]).save(here / "two.png")
        flags = ("--image", here / "two.png", "--weights", HERE / "assets/tiny.safetensors",
                 "--vae", HERE / "assets/tiny_vae.safetensors", "--fps", "24")
        with served(*flags) as page, browsing(page) as browser:
            begin = [until_at(browser, red, (0.3, 0.35), 0.04), until_at(browser, blue, (0.7, 0.7), 0.04)]
            browser.run("actions.pin()")
            browser.drag((0.7, 0.7), (0.7, 0.7), 2)
            browser.run("actions.drag()")
            browser.drag((0.3, 0.35), (0.6, 0.35))                  # 30 % to the right
            moved = until_at(browser, red, (0.6, 0.35))
            stayed = until_at(browser, blue, (0.7, 0.7), 0.06)
            assert moved[0] > begin[0][0] / 3 and stayed[0] > begin[1][0] / 3, (begin, moved, stayed)
            assert kinds(browser) == ["drag", "pin"]
            browser.run("actions.clear(), actions.pin()")
            browser.drag((0.7, 0.7), (0.7, 0.7), 2)
            browser.run("actions.path()")
            browser.drag((0.6, 0.35), (0.25, 0.35))                 # drawn now, gone along when it is played
            until_frames(browser, 24)
            until_at(browser, red, (0.6, 0.35))                     # it waits where it was dragged to
            browser.run("actions.play()")
            moved = until_at(browser, red, (0.25, 0.35))
            assert moved[0] > begin[0][0] / 3, moved
            until_at(browser, blue, (0.7, 0.7), 0.06)


def test_in_a_browser_a_dragged_object_moves_again_and_again():
    flags = ("--image", HERE / "assets/drag.png", "--weights", HERE / "assets/tiny.safetensors",
             "--vae", HERE / "assets/tiny_vae.safetensors", "--fps", "24")
    with served(*flags) as page, browsing(page) as browser:
        mass, *_ = until_at(browser, LIME, (0.3, 0.667), 0.06)
        for goal in (0.6, 0.55), (0.35, 0.35):                  # the second one takes hold of what has moved
            begin = browser.run("pointsOf(['drag']).length ? pointsOf(['drag'])[0].p : [0.3, 0.667]")
            browser.drag(begin, goal)
            now, *_ = until_at(browser, LIME, goal, 0.12)
            assert now > mass / 3, (goal, now, mass)
        browser.run("actions.pause()")
        first = until_told(browser, page, pause=True)
        assert [len(group["points"]) for group in first["groups"].values()] == [1]
        browser.run("$('menu').querySelectorAll('button')[1].click(), actions.pause()")
        browser.until(f"+seen > {first['frame'] + 12}")
        assert page.status()["prompt"] == "steady shapes, fading light"
        browser.run("actions.camera(), moveCamera(0.1, 0)")
        assert len(until_told(browser, page, pause=False)["groups"]["camera"]["points"]) == 64
        z, at = browser.run("[camera().z, camera().at]")
        assert_near(torch.tensor([z, *at]), torch.tensor([1, 0.1, 0]), 1e-3)
        browser("Page.reload")
        browser.until("typeof view === 'object' && view !== null && pointsOf(['drag']).length === 1")
        with browsing(page, 390) as other:                      # a second one, on a phone
            other.until("pointsOf(['drag']).length === 1 && state.viewers >= 2")
            other.run("actions.restart()")
            until_told(other, page, take=1)
            browser.until("fresh && !pointsOf(['drag']).length")


def test_in_a_browser_what_is_grabbed_again_is_what_was_brought_there():
    with served() as page, browsing(page) as browser:
        for begin, end in ((0.2, 0.5), (0.4, 0.5)), ((0.8, 0.5), (0.47, 0.5)):     # two things, side by side in the end
            browser.run("actions.clear()")
            browser.drag(begin, end)
        browser.run("actions.clear()")
        for place, start in (0.39, 0.19), (0.48, 0.81), (0.7, 0.7):                 # the third is nobody's
            found = browser.run(f"origin([{place}, 0.5])")
            assert math.dist(found, (start, 0.5)) < 0.02, (place, found)


def test_in_a_browser_a_button_and_a_key_record_and_the_page_says_into_what():
    with folder() as mine, unittest.mock.patch.object(extras.page, "RECORDING", mine / "recording.mp4"), \
            served() as page, browsing(page, 390) as browser:
        pressed = "$('record').getAttribute('aria-pressed')"
        assert browser.run(pressed) == "false" and browser.run("$('recorded').textContent") == ""
        browser.run("actions.pause()")
        browser.run("$('record').click()")
        browser.until("/^● recording[.]mp4, [0-9.]+ s/.test($('recorded').textContent)")
        assert browser.run(pressed) == "true" and page.status()["record"]
        for kind in "keyDown", "keyUp":
            browser("Input.dispatchKeyEvent", type=kind, key="v")
        browser.until("/^recording[.]mp4, [0-9.]+ s/.test($('recorded').textContent)")
        assert browser.run(pressed) == "false" and len(appearing(mine / "recording.mp4")) > 5
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.run("$('prompt').focus()")
        for kind in "keyDown", "keyUp":
            browser("Input.dispatchKeyEvent", type=kind, key="v", text="v")
        browser.until("$('prompt').value.includes('v')")
        assert browser.run(pressed) == "false"                  # a letter of the prompt
        page.control([(9, 8)], record=True)
        browser.until(f"{pressed} === 'true'")                  # another page did it


def test_in_two_browsers_each_sees_the_points_of_both_and_either_removes_them():
    with served() as page, browsing(page) as one, browsing(page, 390) as two:
        one.drag((0.2, 0.2), (0.5, 0.2))
        two.run("actions.path()")
        two.drag((0.2, 0.7), (0.6, 0.7))
        for browser in one, two:
            browser.until("pointsOf(['drag']).length === 1 && pointsOf(['path']).length === 1 && state.viewers === 2")
            assert abs(browser.run("pointsOf(['drag'])[0].p[0]") - 0.5) < 0.02
            assert "2 watching" in browser.run("$('facts').textContent")
        two.run("actions.play()")
        one.until("pointsOf(['drag']).some(point => Math.hypot(point.p[0] - 0.6, point.p[1] - 0.7) < 0.02)")
        one.drag((0.6, 0.7), (0.6, 0.7), 2)                     # a click removes it, with whatever tool
        for browser in one, two:
            browser.until("pointsOf(['drag', 'path']).length === 1")
        found = two.run("origin([0.6, 0.7])")                   # and it stays known what is there
        assert math.dist(found, (0.2, 0.7)) < 0.02, found
        one.run("actions.clear()")
        two.until("!pointsOf(['drag']).length")


def test_in_a_browser_the_picture_is_as_large_as_fits_and_no_label_is_clipped():
    clipped = """[...document.querySelectorAll('button, #note, #crop')].filter(element =>
        element.scrollWidth > element.clientWidth || element.scrollHeight > element.clientHeight + 1).length"""
    for width, least in (1280, 880), (390, 390):                # 48x32 pixels; 860 high
        with served() as page, browsing(page, width) as browser:
            browser.until("$('chunks').children.length === 2 && !$('invite').hidden")
            left, top, wide, high = browser.run("(b => [b.x, b.y, b.width, b.height])($('stage').getBoundingClientRect())")
            assert wide >= least and abs(wide / high - 1.5) < 0.01 and (width > 390 or left == top == 0), (wide, high)
            assert browser.run(f"[document.documentElement.scrollWidth, {clipped}]") == [width, 0]
            assert browser.run("$('badge').hidden")             # it does not begin with "paused"
            assert browser.run("$('crop').textContent") == "Cropped: the middle 48 × 32 of 48 × 40 pixels."
            words = browser.run("Object.values(tips).join() + $('note').textContent")
            assert ("wheel" in words and "Click" in words) == (width > 390) != ("Tap" in words and "fingers" in words)
            for slowness, shown, said in (2.14, 0, "slower than real time (2.1×)"), (1, 0, ""), (1, 800, "computing…"):
                script = f"(control.pause = false, state.slowness = {slowness}, badge({shown}, times = []))"
                assert browser.run(script) == said, said


def test_in_a_browser_nine_points_are_placed_and_one_click_removes_them():
    with served() as page, browsing(page) as browser:
        browser.run("actions.pin(), $('sides').children[1].click()")
        browser.drag((0.5, 0.5), (0.5, 0.5), 2)
        until_told(browser, page, pause=True)
        browser.until("pointsOf(['pin']).length === 9")
        assert kinds(browser) == ["pin"] and browser.run("$('invite').hidden")
        browser.drag((0.55, 0.55), (0.55, 0.55), 2)
        browser.until("!pointsOf(['pin']).length")
        assert page.status()["groups"][next(iter(page.status()["groups"]))]["kind"] in ("pin", "left")


def test_in_a_browser_an_example_is_chosen_and_a_recording_is_offered():
    with folder() as mine, unittest.mock.patch.object(extras.page, "RECORDING", mine / "recording.mp4"), \
            served() as page, browsing(page) as browser:
        browser.until("$('pictures').querySelectorAll('img').length === 4")
        browser.run("[...document.images].find(image => image.alt === 'drag').parentElement.click()")
        until = time.monotonic() + 10
        while page.status()["image"] != [384, 384]:
            assert time.monotonic() < until
            time.sleep(0.05)
        browser.run("actions.record(), actions.pause()")
        browser.until("/[.]mp4, /.test($('recorded').textContent)")
        browser.run("actions.record()")
        browser.until("document.querySelectorAll('#files a').length === 3")
        link = "document.querySelector('#files a')"
        size = browser.run(f"fetch({link}.href).then(answer => answer.blob()).then(blob => blob.size)")
        assert browser.run(f"{link}.download") == "recording.mp4" and size == (mine / "recording.mp4").stat().st_size
        browser.run("set('prompt', 'a cat')")
        browser.until("$('unknown').textContent.endsWith('a, cat')")


def test_in_a_browser_two_fingers_move_the_camera_and_leave_no_point():
    with served() as page, browsing(page, 390) as browser:
        left, top, width, height = browser.run("(b => [b.x, b.y, b.width, b.height])(marks.getBoundingClientRect())")

        def fingers(kind, *places):
            points = [{"x": left + x * width, "y": top + y * height, "id": i} for i, (x, y) in enumerate(places)]
            browser("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)

        fingers("Start", (0.4, 0.5))
        fingers("Start", (0.4, 0.5), (0.6, 0.5))
        fingers("Move", (0.3, 0.5), (0.7, 0.5))
        fingers("End")
        browser.until("groups.camera")
        z = browser.run("camera().z")
        assert 1.5 < z < 2.5 and kinds(browser) == ["camera"], (z, kinds(browser))
        fingers("Start", (0.2, 0.3))
        fingers("Move", (0.4, 0.3))
        fingers("End")
        browser.until("pointsOf(['drag']).length === 1")
        fingers("Start", (0.4, 0.3))                            # a tap
        fingers("End")
        browser.until("!pointsOf(['drag']).length")
        assert until_told(browser, page, pause=False)["groups"]["camera"]["kind"] == "camera"
