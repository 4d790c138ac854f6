"""The page: who may ask what, controls, frames and recordings; in a browser too."""

import atexit
import base64
import contextlib
import functools
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
from typing import NamedTuple

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image

import extras.page
import sample
from extras import world
from extras.page import Given, Recorder, Refused, Take, gather, glide, join_chunks, merge, named
from extras.testing import (COPYING, HERE, assert_near, folder, new_model, new_vae, quiet, rand,
                            randomised, sampled, saved, seeded, slow, workplace)
from extras.video import count_frames
from motionstream import motion_inputs, save_pretrained
from vae import LinearVAE, LinearVAEConfig

patch = unittest.mock.patch
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    """What comes back over HTTP."""
    code: int
    headers: http.client.HTTPMessage
    body: bytes


class Client:
    """Speaks to the page's program as the page does; what differs is given."""

    def __init__(self, address):
        match = re.fullmatch(r"http://([^/]+)/([^/]+)/\n", address)
        self.host = match[1]
        self.token = match[2]
        self.port = self.host.rpartition(":")[2]
        self.seq = 0                # of the latest post
        self.seen = ""              # the number of the newest frame
        self.connect(self.host)

    def connect(self, host):
        self.open = http.client.HTTPConnection(host, timeout=10)

    def ask(self, name, body=None, headers=None, path=None):
        """The Answer on the open connection, or on a new one if it was closed meanwhile."""
        try:
            return self.ask_once(name, body, headers, path)
        except ConnectionError:
            self.open.close()
            return self.ask_once(name, body, headers, path)

    def ask_once(self, name, body, headers, path):
        method = "GET" if body is None else "POST"
        self.open.request(method, path or f"/{self.token}/{name}", body, headers or {})
        answer = self.open.getresponse()
        return Answer(answer.status, answer.headers, answer.read())

    def control(self, points=(), name="all", **changes):
        """Post a control, with a group of points by that name, if there are points: (x, y) now, and
        at the start and when grabbed if that is elsewhere."""
        groups = {}
        if points:
            rows = [list(point) * (6 // len(point)) for point in points]
            groups[name] = group(rows)
        state = {"take": 0, "chunk": 3, "pause": False, "prompt": "",
                 "record": self.status()["record"], "groups": groups}
        answer = self.ask("control", json.dumps(state | changes), JSON)
        if answer.code == 200:
            self.seq = json.loads(answer.body)["seq"]
        return answer.code

    def status(self):
        return json.loads(self.ask("status").body)

    def watch(self, frames=1):
        """See so many new frames: (their number, the post that they obey)."""
        found = []
        until = time.monotonic() + 30
        while len(found) < frames:
            assert time.monotonic() < until, "no frames come"
            answer = self.ask(f"frame/{self.seen}/test")
            assert answer.code == 200
            if answer.headers["Frame"] != self.seen:
                self.seen = answer.headers["Frame"]
                found.append((int(self.seen), int(answer.headers["Seq"])))
        return found

    def until_obeyed(self):
        """See frames until one obeys the latest post: a new take may be late."""
        while self.watch()[0][1] < self.seq:
            pass


def group(rows, kind="drag", path=()):
    """A group of points, as the page posts it."""
    return {"kind": kind, "points": rows, "path": list(path)}


def wait_until(true, seconds=30):
    """Until true() is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


@contextlib.contextmanager
def served(*flags):
    """The program, in a thread, and a client of it."""
    _, here = workplace()
    usual = ["--image", here / "image.png", "--weights", here / "student.safetensors",
             "--vae", here / "vae.safetensors", "--port", 0, "--fps", 100]
    words = [str(word) for word in usual + list(flags)]
    stop = []
    stoppable = patch.object(extras.page, "hold_signals", lambda: contextlib.nullcontext(stop))
    with quiet() as (out, err), stoppable:
        thread = threading.Thread(target=extras.page.main, args=(words,))
        thread.start()
        try:
            while "http" not in out.getvalue():
                assert thread.is_alive(), err.getvalue()
                time.sleep(0.01)
            yield Client(address_in(out.getvalue().splitlines(keepends=True)))
        finally:
            stop.append(signal.SIGINT)
            thread.join(20)
    assert not thread.is_alive()
    assert not err.getvalue(), err.getvalue()


def address_in(lines):
    return next(line for line in lines if line.startswith("http"))


def into(path):
    """Recordings are named after this path in here."""
    return patch.object(extras.page, "RECORDING", path)


# --------------------------------------------------------------------------------------------------
# Who may ask, and what.

ROW = [1.0] * 6             # a point, as the page posts it


def control_of(points=(ROW,), **changes):
    """The JSON of a control with a group of points."""
    state = {"take": 0, "chunk": 3, "pause": True, "record": False, "prompt": "",
             "groups": {"a": group(points)}}
    return json.dumps(state | changes)


def group_of(name="a", **changes):
    """The JSON of a control with a group that has other fields."""
    return control_of(groups={name: group([ROW]) | changes})


def bad_controls():
    """Yields what the page never posts."""
    for body in (b"", b"[]", b"\xff", b"null", b'{"points":' + b"[" * 30000 + b"]" * 30000 + b"}"):
        yield body
    for changes in (
        {"extra": 1}, {"seq": 1}, {"take": "1"}, {"take": True}, {"take": -1}, {"take": 2 ** 53},
        {"chunk": 2}, {"pause": 1}, {"record": 0}, {"record": "x.mp4"}, {"prompt": "x" * 1001},
        {"groups": []}, {"groups": {"a": None}},
    ):
        yield control_of(**changes)
    for points in (
        [ROW[:5]], [ROW, [1]], [], [["x"] * 6], [ROW] * 257, [[1e6] * 6], [ROW[:5] + [math.nan]],
        [ROW[:5] + [-math.inf]], [[None] * 6], {"x": 1},
    ):
        yield control_of(points)
    for number in "1e999", "1" * 5000:
        yield control_of().replace("1.0", number)
    for changes in (
        {"kind": "x"}, {"kind": []}, {"extra": 1}, {"kind": "camera"}, {"name": "a" * 30},
        {"path": [[1, 1e6]]}, {"path": [1.0]}, {"path": [[1, 1]] * 1001},
    ):
        yield group_of(**changes)


def assert_answers(page, code, name, body=None, headers=None, path=None):
    answer = page.ask(name, body, headers, path)
    assert answer.code == code, (answer.code, code, name, path, str(body)[:100], headers)
    if code == 200:
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def assert_knows_addresses(page):
    for name in "", "status", "frame/", "picture/0":
        assert_answers(page, 200, name)
    for name in (
        "picture/../page.py", "picture/99", "picture/" + "9" * 5000, "file/0", "file/-1",
        "favicon.ico", "../../../etc/passwd", "%2e%2e/sample.py", "control",
    ):
        assert_answers(page, 404, name)
    for path in "/", f"/{page.token[:-1]}/", f"/{page.token}x/status":
        assert_answers(page, 403, "", path=path)


def assert_knows_senders(page):
    for host in "evil.example", page.host + ".evil":
        assert_answers(page, 421, "status", headers={"Host": host})
    for origin in "http://evil.example", "null":
        assert_answers(page, 403, "status", headers={"Origin": origin})
    from_evil = JSON | {"Origin": "http://evil.example"}
    assert_answers(page, 403, "control", control_of(), from_evil)
    own = {"Origin": f"http://{page.host}"}
    assert_answers(page, 200, "status", headers=own)
    assert_answers(page, 200, "control", control_of(), JSON | own)


def assert_refuses_kinds_and_lengths(page):
    png = (workplace()[1] / "image.png").read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "png")
    picture = {"Content-Type": "image/png"}
    for code, body, headers in (
        (415, control_of(), {"Content-Type": "text/plain"}),
        (415, control_of(), {}),
        (413, b"{}", JSON | {"Content-Length": str(2 ** 18 + 1)}),
        (413, b"x", picture | {"Content-Length": "9" * 5000}),
        (400, b"", JSON | {"Content-Length": "0" * 9 + "9" * 9}),
        (400, b"", JSON | {"Content-Length": "0" * 5000}),
        (411, iter([b"{}"]), JSON | {"Transfer-Encoding": "chunked"}),
        (411, b"", JSON | {"Content-Length": "-1"}),
        (400, b"GIF89a", picture),
        (400, png[:50], picture),
        (413, bomb.getvalue(), picture),
        (200, png, picture),
    ):
        assert_answers(page, code, "control", body, headers)
    assert_answers(page, 404, "status", "{}", JSON)


def assert_refuses_other_controls(page):
    for body in bad_controls():
        assert_answers(page, 400, "control", body, JSON)
    many = {"a": group([ROW] * 99), "b": group([ROW] * 158)}
    assert_answers(page, 409, "control", control_of(groups=many), JSON)


def test_the_page_answers_only_those_who_know_its_address_and_nothing_else():
    with served() as page:
        assert_knows_addresses(page)
        assert_refuses_kinds_and_lengths(page)
        assert_refuses_other_controls(page)
        assert_answers(page, 200, "control", "{}", JSON)
        assert_knows_senders(page)
        html = page.ask("").body.decode().replace("http-equiv", "")
        assert "http" not in html
        assert not re.search(r"\son\w+=|style=", html)
        status = page.status()                              # as the last one said, unharmed
        assert status["seq"] == 2
        assert status["groups"] == {"a": group([ROW])}


def assert_named(page, port, codes):
    """codes: {host: the code of an answer to those who call it so}."""
    for host, code in codes.items():
        answer = page.ask("status", headers={"Host": f"{host}:{port}"})
        assert answer.code == code, host


def test_a_page_for_all_addresses_answers_to_this_machines_own_and_to_no_other():
    name = socket.gethostname().lower()
    with served("--host", "0.0.0.0") as page:
        page.connect(f"127.0.0.1:{page.port}")
        codes = {"127.0.0.1": 200, "localhost": 200, name: 200, "0.0.0.0": 200, "evil.example": 421,
                 f"{name}.evil.example": 421, "127.0.0.2": 421, "": 421}
        assert_named(page, page.port, codes)
        for host in codes:                                  # a port that browsers do not leave out
            assert page.ask("status", headers={"Host": host}).code == 421, host
        ours = f"127.0.0.1:{page.port}"
        other_origin = {"Host": ours, "Origin": f"http://{name}:{page.port}"}
        assert page.ask("status", headers=other_origin).code == 403
        page.connect(f"127.0.0.2:{page.port}")              # another of its addresses
        assert_named(page, page.port, {"127.0.0.2": 200})


def test_a_page_for_one_address_answers_to_it_and_to_localhost():
    name = socket.gethostname().lower()
    with served() as page:
        codes = {"127.0.0.1": 200, "localhost": 200, name: 421, "0.0.0.0": 421, "127.0.0.2": 421}
        assert_named(page, page.port, codes)
    assert named(["a", "b"], 80) == ["a:80", "b:80", "a", "b"]
    assert named(["a"], 8765) == ["a:8765"]


TUNNELS = "x.example", "localhost:9000"


def ask_through_tunnels(page):
    """Yields (name of a tunnel, the Answer behind it), for all origins of a page there."""
    for name in TUNNELS:
        for origin in {}, {"Origin": f"https://{name}"}, {"Origin": f"http://{name}"}:
            yield name, page.ask("status", headers={"Host": name} | origin)


def test_a_tunnel_is_refused_with_the_flag_that_lets_it_in():
    with served() as page:
        for name, answer in ask_through_tunnels(page):
            assert answer.code == 421, name
            said = answer.body.decode()
            assert "--allow" in said
            assert repr(name) in said
    with served("--allow", "https://X.example/", "--allow", "localhost:9000") as page:
        for name, answer in ask_through_tunnels(page):
            assert answer.code == 200, name
        for name in "y.example", "x.example:81":
            assert page.ask("status", headers={"Host": name}).code == 421
        secure = {"Origin": f"https://{page.host}"}         # nothing here speaks https
        assert page.ask("status", headers=secure).code == 403


FLAGS_WITHOUT_USE = {
    "--tracks tracks.npy": "drop --tracks, --drag and --pin",
    "--drag 1,2->3,4": "drop --tracks, --drag and --pin",
    "--frames 9": "drop --frames",
    "--overlay": "drop --overlay",
    "--sampler teacher": "drop --sampler teacher",
    "--out image.mp4": "image.png: is a file that is read",
    "--out x.png": "choose a name that ends in .mp4",
    "--weights teacher.safetensors --vae vae.safetensors": "the page needs a trained student",
    "--weights student.safetensors --vae vae.safetensors --guidance 1,1":
        "--guidance belongs to --sampler teacher",
    "--prompt-embeds rows.safetensors": "reads words, give it --prompt",
    "--host 300.0.0.1 --weights student.safetensors --vae vae.safetensors":
        "--host 300.0.0.1 --port 8765: ",
}


def test_flags_that_the_page_has_no_use_for_and_files_that_it_would_overwrite_are_refused():
    _, here = workplace()
    for flags, cure in FLAGS_WITHOUT_USE.items():
        words = ["--image", here / "image.png"]
        for word in flags.split():
            is_file = re.fullmatch(r"\w+\.(npy|mp4|png|safetensors)", word)
            words.append(here / word if is_file else word)
        with unittest.mock.patch("sample.load_models", side_effect=AssertionError), \
                quiet() as (_, err):
            assert extras.page.main([str(word) for word in words]) == 2
        assert cure in err.getvalue(), (flags, err.getvalue())
        assert err.getvalue().count("\n") == 1


def test_a_port_in_use_is_found_before_any_model_loads():
    _, here = workplace()
    words = ["--image", here / "image.png", "--weights", here / "student.safetensors"]
    words += ["--vae", here / "vae.safetensors"]
    nothing_loads = unittest.mock.patch("sample.load_models", side_effect=AssertionError)
    with socket.create_server(("127.0.0.1", 0)) as other, nothing_loads, quiet() as (_, err):
        port = other.getsockname()[1]
        assert extras.page.main([str(word) for word in words] + ["--port", str(port)]) == 2
    said = f"--host 127.0.0.1 --port {port}: Address already in use; choose others"
    assert err.getvalue() == f"error: {said}\n"


# --------------------------------------------------------------------------------------------------
# What pages share.

def test_two_pages_add_to_each_others_points_and_the_number_of_a_post_comes_with_the_frames():
    with served() as one:
        two = Client(f"http://{one.host}/{one.token}/\n")
        assert one.control([(9, 8)], "mine") == 200
        assert two.control([(20, 8)], "yours", pause=False) == 200
        groups = {"mine": group([[9, 8] * 3]), "yours": group([[20, 8] * 3])}
        assert one.status()["groups"] == groups
        assert one.status() | {"frame": 0} == two.status() | {"frame": 0}
        one.ask("frame//one")
        two.ask("frame//two")
        two.ask("frame//two")
        assert one.status()["viewers"] == 2
        assert one.control([(10, 8)], "mine", prompt="fading light") == 200
        assert one.seq == 3
        told = two.status()
        assert told["prompt"] == "fading light"
        assert set(told["groups"]) == {"mine", "yours"}
        numbers, obeyed = zip(*two.watch(60))
        assert obeyed[-1] == 3
        assert list(obeyed) == sorted(obeyed)
        assert list(numbers) == sorted(set(numbers))
        assert two.control([("20", "8")]) == 200
        assert two.status()["groups"]["all"]["points"] == [[20.0, 8.0] * 3]
        one.control([(1, 1)], "mine", take=1)               # all begin anew
        assert set(two.status()["groups"]) == {"mine"}
        two.watch(30)


def ground_and_held():
    """Three points of the ground, and one that is held, which started near the second."""
    ground = [[x, 5.0] * 3 for x in (0.0, 10.0, 20.0)]
    held = [[99.0, 99.0, 12.0, 6.0, 0.0, 0.0]]
    return ground, held


def test_of_the_ground_what_is_held_is_left_out():
    ground, held = ground_and_held()
    camera = group(ground, "camera")
    groups = {"a": group(held, "pin"), "camera": camera, "b": group(held, "left")}
    assert gather(groups, 4) == held + [ground[0], ground[2]]
    assert gather({"camera": camera}, 4) == ground
    assert gather({}, 4) == []


def test_what_was_removed_is_remembered_for_long_and_points_are_no_more_than_256():
    ground, held = ground_and_held()
    control = {"seq": 0, "take": 0, "chunk": 3, "pause": True, "record": False, "prompt": "",
               "groups": {}, "points": []}
    for number in range(100):
        groups = {str(number): group(held, "left"), "camera": group(ground, "left")}
        control = merge(control, json.dumps({"groups": groups}), [3], 4)
    kept = [str(number) for number in range(36, 100)]
    assert list(control["groups"]) == ["camera"] + kept
    assert control["points"] == []
    groups = {"camera": group(ground, "camera"), "b": group(held * 256)}
    assert len(merge(control, json.dumps({"groups": groups}), [3], 4)["points"]) == 256
    groups["c"] = group(held)
    try:
        merge(control, json.dumps({"groups": groups}), [3], 4)
        raise AssertionError("257 points were taken")
    except Refused as e:
        code, why = e.args
        assert code == 409
        assert "256" in why


def test_words_that_the_tiny_model_never_learned_are_named():
    with served() as page:
        status = page.status()
        assert status["unknown"] == []
        assert status["menu"][0][1] == "fading light"
        page.control(prompt="Fading light, a cat turns; spinning shapes")
        assert page.status()["unknown"] == ["a", "cat", "turns"]
        page.control(prompt=world.caption(2, 1))
        assert page.status()["unknown"] == []
    assert world.caption(1, 2) == "fading light, pulsing shapes"
    kinds = [[phrase.split()[1] for phrase in row] for row in world.caption_phrases()]
    assert kinds == [["light"] * 3, ["shapes"] * 3]


def test_pictures_to_start_from_can_be_fetched():
    with served() as page:
        assert page.status()["pictures"] == ["image", "camera", "drag", "photo", "several"]
        fetched = Image.open(io.BytesIO(page.ask("picture/2").body))
        with Image.open(HERE / "assets/drag.png") as image:
            assert np.array_equal(np.asarray(fetched), np.asarray(image.convert("RGB")))


def test_recordings_can_be_fetched_once_they_are_whole():
    with folder() as mine, into(mine / "recording.mp4"), served() as page:
        page.control([(9, 8)], take=1, record=True)
        page.watch(30)
        assert page.status()["files"] == []
        assert page.status()["slowness"] > 0
        page.control(take=1, record=False)
        wait_until(lambda: page.status()["files"])
        names = page.status()["files"]
        assert names == ["recording.mp4", "recording.png", "recording.npz"]
        for number, name in enumerate(names):
            assert page.ask(f"file/{number}").body == (mine / name).read_bytes()
        (mine / "recording.png").unlink()
        assert page.ask("file/1").code == 404


def test_a_slow_page_skips_frames_and_delays_nobody():
    with served() as page:
        page.control()
        page.watch(5)
        slow_one = http.client.HTTPConnection(page.host)
        slow_one.request("GET", f"/{page.token}/frame//slow")       # and never reads the answer
        begun = time.monotonic()
        seen = page.watch(60)
        first, _ = seen[0]
        last, _ = seen[-1]
        assert time.monotonic() - begun < 5
        assert last - first < 80
        answer = slow_one.getresponse()
        assert answer.read()
        old = int(answer.headers["Frame"])
        assert old <= last - 40
        slow_one.request("GET", f"/{page.token}/frame/{old}/slow")
        assert int(slow_one.getresponse().headers["Frame"]) >= last


def crowd_of(page, count):
    """So many open connections, of which half wait for a frame; it does not come: it is paused."""
    last = page.ask("frame/").headers["Frame"]
    request = f"GET /{page.token}/frame/{last}/x HTTP/1.1\r\nHost: {page.host}\r\n\r\n"
    host, port = page.host.split(":")
    crowd = []
    for number in range(count):
        connection = socket.create_connection((host, port))
        if number % 2:
            connection.sendall(request.encode())
        crowd.append(connection)
        time.sleep(0.01)            # else it queues for seconds, and the first time out
    time.sleep(0.2)
    return crowd


def test_a_crowd_of_viewers_or_connections_is_turned_away():
    with served() as page:
        page.ask("status")
        time.sleep(0.1)
        before = threading.active_count()
        crowd = crowd_of(page, 80)
        readable, _, _ = select.select(crowd, [], [], 0)
        closed = [connection for connection in readable if not connection.recv(1)]
        assert threading.active_count() <= 65
        assert 80 - 64 <= len(closed) < 60
        assert page.status()["take"] == 0                   # who is there stays
        for connection in crowd:
            connection.close()
        wait_until(lambda: threading.active_count() <= before, 4)   # a viewer waits for a second
        assert page.status()["take"] == 0


def assert_comes_to_rest(page):
    """The frame at which the stream stops. What was begun before is finished, on a busy machine
    late; then nothing is made any more."""
    def rests():
        before = page.status()["frame"]
        time.sleep(0.5)
        return page.status()["frame"] == before

    wait_until(rests)
    assert rests() and rests()
    return int(page.status()["frame"])


def test_nothing_is_made_while_paused_or_while_nobody_watches():
    with served() as page:
        assert page.status()["pause"]
        assert page.status()["frame"] < 2
        assert page.ask("frame//x").headers["Frame"] in ("0", "1")
        page.control()
        page.watch(30)
        page.control(pause=True)
        first = assert_comes_to_rest(page)
        page.control()
        last, _ = page.watch(20)[-1]
        assert last >= first + 20                           # not one was left out
        assert_comes_to_rest(page)                          # nobody watches any more


# --------------------------------------------------------------------------------------------------
# From points to tracks.

@contextlib.contextmanager
def recording_motion():
    """A list of what the model gets in here, chunk by chunk: (tracks (T, N, 2), whether all are
    visible, ids)."""
    calls = []

    def note(model, tracks, visible, ids, **rest):
        calls.append((tracks[0].numpy(), visible.all().item(), ids[0].tolist()))
        return motion_inputs(model, tracks, visible, ids, **rest)

    with patch.object(sample, "motion_inputs", note):
        yield calls


def test_points_reach_the_track_head_on_lines_that_end_where_they_are_now():
    start = (9.0, 12.0)             # in the image, 48x40; the video is its middle, 48x32
    far = (30.0, 20.0)
    with recording_motion() as calls, served("--fps", 40) as page:
        page.control([start])
        page.watch(12)
        grabbed = (24.0, 30.0, 2.5, 20.0, 20.0, 30.0)
        page.control([far + start + start, grabbed])
        page.watch(24)
    assert all(visible for _, visible, _ in calls)
    assert [len(tracks) for tracks, _, _ in calls[:3]] == [9, 12, 12]
    in_video = np.subtract(start, (0, 4))
    assert np.allclose(calls[0][0], in_video)
    moved = next(i for i, (tracks, _, _) in enumerate(calls) if tracks.shape[1] == 2)
    tracks, _, ids = calls[moved]                           # in the order of their starts
    share = (np.arange(12) + 1)[:, None] / 12
    way = np.subtract(far, start)
    assert np.allclose(tracks[:, 1], in_video + share * way, atol=1e-4)
    from_grab = (20, 26) + share * (4, 0)
    assert np.allclose(tracks[:, 0], from_grab, atol=1e-4)
    assert ids == [0, 0]                                    # those of the weights are all the same
    after, _, _ = calls[moved + 1]
    assert np.allclose(after, [(24, 26), np.subtract(far, (0, 4))])         # and there they stay


def test_a_restart_with_another_chunk_is_not_lost_while_a_take_begins():
    real = extras.page.to_frames

    def slow_frames(video):         # the first take begins; the page is quicker
        time.sleep(0.3)
        return real(video)

    with (patch.object(extras.page, "to_frames", slow_frames), recording_motion() as calls,
          served() as page):
        page.control(take=1, chunk=1)
        page.watch(8)
    assert [len(tracks) for tracks, _, _ in calls[:3]] == [1, 4, 4]


def test_a_line_ends_where_the_point_is_now_and_begins_where_it_was():
    rows = [[30, 8, 5, 6, 7, 8], [1, 2, 3, 4, 3, 4]]
    starts, tracks = glide(rows, {}, 9, begins=True)
    assert starts == [(3, 4), (5, 6)]
    assert tracks.shape == (9, 2, 2)
    assert tracks.dtype == np.float32
    assert tracks[0].tolist() == [[3, 4], [5, 6]]           # in frame 0 at its start
    assert tracks[-1].tolist() == [[1, 2], [30, 8]]
    starts, tracks = glide(rows, {(3, 4): (1, 6)}, 12, begins=False)
    share = np.arange(1, 13) / 12
    from_where_it_was = np.stack([np.ones(12), 6 - 4 * share], 1)
    assert np.allclose(tracks[:, 0], from_where_it_was)
    assert np.allclose(tracks[2, 1], (7 + 23 / 4, 8))       # a new one: from where it was grabbed
    starts, tracks = glide([], {}, 4, begins=False)
    assert starts == []
    assert tracks.shape == (4, 0, 2)


def test_what_was_dragged_away_can_be_dragged_on_by_copying_models():
    config = new_model(track_id_mode="random").config
    start = (9.3, 8.2)              # in the image, 48x40; the video is its middle
    tracks = np.float32([[(30.0, 20.0)]] * 12)              # where it is by now changes nothing
    motion = extras.page.fit_chunk([start], tracks, "", (48, 40), config)
    assert np.allclose(motion.start[0], [(9.3, 4.2)])


def test_a_point_keeps_its_id_while_others_come_and_go():
    near = (9.3, 8.2)
    nearer = (9.3, np.nextafter(8.2, 9).item())             # the same place in float32
    ids = {}
    config = new_model(track_id_mode="random").config
    for starts in [near], [near, nearer], [(1.0, 2.0), nearer]:
        tracks = np.full((12, len(starts), 2), 20, np.float32)
        motion = extras.page.fit_chunk(starts, tracks, "", (48, 40), config)
        for start, number in zip(starts, motion.ids[0].tolist()):
            assert ids.setdefault(start, number) == number
    assert len(set(ids.values())) == 3
    motion = extras.page.fit_chunk([near], tracks[:, :1], "", (48, 40), new_model().config)
    assert motion.ids.tolist() == [[0]], "those of the weights are all the same"


# --------------------------------------------------------------------------------------------------
# The program as a process of its own.

@contextlib.contextmanager
def started(*flags):
    """(The process, a client of it)."""
    command = [sys.executable, "-m", "extras.page", "--port", 0]
    command += ["--image", HERE / "assets/drag.png"]
    command.extend(flags)
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=HERE) as program:
        try:
            yield program, Client(address_in(program.stdout))
        finally:
            program.kill()


def resident_megabytes(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1e3


def answers_to_drags(program, page, chunk):
    """Of 50 drags at random times: seconds until a frame obeys one, seconds until a chunk's first
    picture is there, and the program's megabytes meanwhile."""
    rng = seeded()
    answers = []
    starts = []
    sizes = []
    for _ in range(50):
        x, y = (60 + 260 * torch.rand(2, generator=rng)).tolist()
        page.control([(x, y, 115, 256, 115, 256)], take=1, chunk=chunk)
        begun = time.monotonic()
        obeyed = -1
        while obeyed < page.seq:
            (_, obeyed), = page.watch()
        answers.append(time.monotonic() - begun)
        starts.append(page.status()["latency"])
        page.watch(int(torch.randint(2, 36, (), generator=rng)))
        sizes.append(resident_megabytes(program.pid))
    return answers, starts, sizes


@slow
def test_how_soon_a_drag_is_answered_and_that_memory_stays():
    """Shipped weights at 24 frames per second, two viewers that stall, either chunk."""
    for chunk, most in (3, 2.0), (1, 1.0):
        with started("--fps", 24) as (program, page):
            stalled = [http.client.HTTPConnection(page.host) for _ in range(2)]
            for viewer in stalled:
                viewer.request("GET", f"/{page.token}/frame//x")
            page.control([(115, 256)], take=1, chunk=chunk)
            page.watch(48)
            answers, starts, sizes = answers_to_drags(program, page, chunk)
        timed = [("drag to its first frame", answers), ("chunk to its first picture", starts)]
        for what, times in timed:
            median = np.median(times)
            print(f"chunk {chunk}, {what}: median {median:.3f} s, worst {max(times):.3f} s")
        print(f"memory {sizes[0]:.0f} to {sizes[-1]:.0f} MB")
        assert max(answers) < most
        assert sizes[-1] < sizes[5] + 40


def slowness():
    """How many times longer work takes here, beside other jobs, than it would alone."""
    begun = time.perf_counter()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    return (time.perf_counter() - begun) / 0.3


def seconds_to_end():
    """From Ctrl-C to the end of the program, which records."""
    with folder() as here:
        with started("--out", here / "out.mp4") as (program, page):
            page.control([(115, 256)])
            page.watch(20)
            begun = time.monotonic()
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 0
            took = time.monotonic() - begun
        assert int(page.seen) - 1 <= len(frames_of(here / "out.mp4"))       # 1 is the image
    return took


def test_ctrl_c_ends_within_two_seconds_and_the_recording_is_whole():
    seconds = []
    for _ in range(3):
        seconds.append(seconds_to_end() / slowness())
        if seconds[-1] < 2:
            return
    raise AssertionError(seconds)


# --------------------------------------------------------------------------------------------------
# Recordings.

def frames_of(path):
    """All frames of a video, (T, H, W, 3)."""
    return np.stack(imageio.mimread(path, memtest=False))


def recorded(page, on, frames, **changes):
    """Record or not from now on, while so many frames are seen: the status in the end."""
    page.control([(9, 8)], record=on, **changes)
    page.watch(frames)
    return page.status()


def until_recorded(page, name, **changes):
    """Record until the page says that a fifth of a second is in the file called `name`."""
    for _ in range(50):
        said = recorded(page, True, 4, **changes)["recorded"]
        match = re.match(rf"{name}\.mp4, ([\d.]+) s", said)
        if match and float(match[1]) >= 0.2:
            return
    raise AssertionError(said)


def test_the_page_records_what_is_seen_when_it_asks_into_files_that_are_not_there():
    with folder() as mine, into(mine / "recording.mp4"):
        (mine / "recording.mp4").write_text("mine")
        (mine / "recording-3.npz").write_text("mine, too")
        with served("--seed", 3) as page:
            before = recorded(page, False, 30)
            assert not before["record"]
            assert before["recorded"] == ""
            assert len(list(mine.iterdir())) == 2
            begun = int(page.seen)
            status = recorded(page, True, 40)
            assert status["record"]
            expected = r"recording-2\.mp4, 0\.[2-9] s, the video alone"
            assert re.fullmatch(expected, status["recorded"])
            assert not (mine / "recording-2.mp4").exists()
            page.control([(9, 8)], record=False, pause=True)        # it ends in a pause as well
            wait_until((mine / "recording-2.mp4").exists)
            frames = count_frames(mine / "recording-2.mp4")
            assert 40 <= frames <= int(page.status()["frame"]) - begun + 14
            until_recorded(page, "recording-4", take=1)         # another take, from its image on
            until_recorded(page, "recording-5", take=2)             # and another one
            status = recorded(page, False, 30, take=2)
            assert re.fullmatch(r"recording-5\.mp4, [\d.]+ s", status["recorded"])
            assert not status["record"]
            until_recorded(page, "recording-6", take=2)             # when the program ends
        names = {file.name for file in mine.iterdir()}
        assert names == {
            "recording.mp4", "recording-2.mp4", "recording-3.npz",
            "recording-4.mp4", "recording-4.png", "recording-4.npz",
            "recording-5.mp4", "recording-5.png", "recording-5.npz", "recording-6.mp4"}
        assert (mine / "recording.mp4").read_text() == "mine"
        assert (mine / "recording-3.npz").read_text() == "mine, too"
        for i in 4, 5, 6:
            assert count_frames(mine / f"recording-{i}.mp4") >= 9


def test_a_recording_begun_later_is_a_whole_video_beside_the_first():
    with folder() as mine:
        with served("--out", mine / "x.mp4") as page:
            assert recorded(page, True, 30)["record"]
            assert not recorded(page, False, 20)["record"]
            recorded(page, True, 20)
        assert {file.name for file in mine.iterdir()} == {"x.mp4", "x.png", "x.npz", "x-2.mp4"}
        assert 28 <= count_frames(mine / "x.mp4") < 90
        assert 19 <= count_frames(mine / "x-2.mp4") < 90


def new_recorder(mine):
    """A Recorder of a take that nothing was seen of yet."""
    status = {"fps": 10, "recorded": ""}
    live = SimpleNamespace(status=status, out=mine / "x.mp4", files=[])
    take = Take(0, Image.new("RGB", (40, 30), "teal"), None)
    return Recorder(live, take, mine / "x.mp4", {"seed": 1})


def plain_frame(value):
    return np.full((64, 64, 3), value, np.uint8)


def test_a_recording_has_each_frame_seen_while_it_is_on_and_keeps_nothing_else():
    with folder() as mine, quiet() as (out, _):
        (mine / "x.mp4").write_text("of an earlier take")       # not replaced in mid-take
        with new_recorder(mine) as recorder:
            seen = recorder.take.seen
            for i in range(50):
                recorder.keep("what a chunk was given")
                seen.append(plain_frame(5 * i))
                recorder.record(20 <= i < 30 or i > 44)
                assert not seen
                assert recorder.chunks is None
        assert "again" not in out.getvalue()
        assert out.getvalue().count("there is the video alone") == 2
        assert (mine / "x.mp4").read_text() == "of an earlier take"
        assert not list(mine.glob("*.npz"))
        for name, begin, end in ("x-2", 20, 31), ("x-3", 45, 50):   # 30: before it was turned off
            frames = frames_of(mine / f"{name}.mp4")
            assert frames.shape[1:] == (256, 256, 3)
            brightness = torch.from_numpy(frames).float().mean((1, 2, 3))
            assert_near(brightness, 5.0 * torch.arange(begin, end), 0.02)


def test_a_folder_that_is_not_writable_is_said_and_nothing_is_kept():
    with folder() as mine, new_recorder(mine) as recorder:
        recorder.record(False)
        recorder.take.seen.append(plain_frame(0))
        with patch.object(os, "access", lambda path, mode: False):
            recorder.record(True)
        assert not recorder.take.seen
        assert "not writable" in recorder.live.status["recorded"]
        assert not list(mine.iterdir())


def test_a_recording_that_cannot_be_written_leaves_nothing_behind():
    with folder() as mine, quiet():
        with contextlib.suppress(RuntimeError), new_recorder(mine) as recorder:
            recorder.take.seen.append(plain_frame(0))
            recorder.record(True)
            raise RuntimeError("the model failed")
        assert not list(mine.iterdir())


def given_chunk(starts, length):
    """A chunk whose points move by one pixel each frame; IDs are where they start."""
    ids = np.array([int(x) for x, _ in starts], np.int64)
    tracks = np.float32(starts)[None] + np.arange(length)[:, None, None]
    return Given(starts, ids, tracks.astype(np.float32), "")


def test_chunks_are_joined_with_one_column_a_point_in_the_order_of_their_starts():
    late = (2.0, 9.0)
    early = (5.0, 0.0)
    chunks = [given_chunk([early], 1), given_chunk([late, early], 4), given_chunk([late], 4)]
    tracks, ids, start = join_chunks(chunks)
    assert start.tolist() == [[2, 9], [5, 0]]
    assert ids.tolist() == [2, 5]
    assert ids.dtype == np.int64
    assert tracks.shape == (9, 2, 2)
    assert tracks.dtype == np.float32
    there = ~np.isnan(tracks[..., 0])
    assert there[:, 0].tolist() == [False] + [True] * 8
    assert there[:, 1].tolist() == [True] * 5 + [False] * 4
    assert tracks[4].tolist() == [[5, 12], [8, 3]]


def test_chunks_without_any_point_have_one_column_of_nothing():
    nothing = Given([], np.zeros(0, np.int64), np.zeros((4, 0, 2), np.float32), "")
    tracks, ids, start = join_chunks([nothing])
    assert tracks.shape == (4, 1, 2)
    assert np.isnan(tracks).all()
    assert ids.tolist() == [0]
    assert start.shape == (1, 2)


def new_weights(here, mode):
    """Flags of weights whose tracks have IDs of that kind, or of a model that copies."""
    if mode == "copies":
        vae = randomised(LinearVAE(LinearVAEConfig(4, 8, 4)))
        save_pretrained(vae, here / "vae.safetensors", **vae.metadata())
        model = new_model(**vars(COPYING))
    else:
        saved(here / "vae.safetensors", new_vae())
        model = new_model(track_id_mode=mode)
    saved(here / "model.safetensors", model)
    return ["--weights", here / "model.safetensors", "--vae", here / "vae.safetensors"]


@contextlib.contextmanager
def keeping_frames():
    """{name of a recording: its raw frames} of what the page records in here."""
    frames = {}
    put = Recorder.put

    def put_and_keep(recorder, frame):
        put(recorder, frame)
        frames.setdefault(recorder.path.stem, []).append(frame)

    with patch.object(Recorder, "put", put_and_keep):
        yield frames


def played(recording, flags):
    """The raw frames that sample.py makes of a recording, NAME.npz: (T, H, W, 3)."""
    kept = []

    def keep(path, fps):
        return contextlib.nullcontext(kept.append)

    words = ["--image", recording.with_suffix(".png"), "--tracks", recording] + flags
    as_it_is = patch.object(sample, "enlarge", lambda frame, *_: frame)
    with patch.object(sample, "video_file", keep), as_it_is:
        code, out, err = sampled(*words)
    assert code == 0, err
    assert "other weights" not in out
    assert "resampled" not in out
    return np.stack(kept)


@contextlib.contextmanager
def recording_takes(here, weights):
    """A page that records takes, from the first one's image on."""
    flags = ["--out", here / "take.mp4", "--prompt", "", "--fps", 60, "--seed", 3]
    with served(*weights, *flags) as page:
        yield page


def record_moving_points(page):
    """Points come and go, and the prompt changes."""
    late = (25.1, 11.9, 29.0, 20.0)
    page.control([(9.3, 8.2)])
    page.watch(15)
    moved = (20.1, 15.7, 9.3, 8.2, 9.3, 8.2)
    page.control([moved, (30.3, 20.2) + late], prompt="fading light")
    page.watch(14)
    twice = [(31.2, 22.4) + late, (30.0, 22.0) + late]          # of one start: the last counts
    page.control(twice, prompt="fading light")
    page.watch(14)


def record_another_image(page):
    """At chunk 1, with a point outside of the video, and one that leaves it."""
    noise = rand(70, 60, 3, seed=5).numpy() * 60 + 128
    png = io.BytesIO()
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(png, "png")
    answer = page.ask("control", png.getvalue(), {"Content-Type": "image/png"})
    assert answer.code == 200
    page.control([(31.2, 22.4)], take=1, chunk=1)
    page.until_obeyed()
    page.watch(8)
    points = [(35.2, 22.4, 31.2, 22.4, 31.2, 22.4), (3, 3), (150, 20, 20, 20, 20, 20)]
    page.control(points, take=1, chunk=1, prompt="spinning shapes")
    page.watch(12)


def record_from_the_middle(page):
    """Without any point first; then the rest of another take, from its middle on."""
    page.control(take=2)
    page.until_obeyed()
    page.watch(15)
    page.control([(9.3, 8.2)], take=3, record=False)
    page.until_obeyed()
    page.watch(20)
    page.control([(9.3, 8.2)], take=3, record=True)
    page.watch(10)


def assert_plays_again(recording, weights, shown, levels=0):
    """The frames are the same, to so many of 255 levels."""
    frames = played(recording, weights)
    assert len(frames) == len(shown)
    difference = np.abs(frames.astype(int) - np.stack(shown))
    assert difference.max() <= levels, difference.max()
    assert (difference > 0).mean() < 1e-4
    assert count_frames(recording.with_suffix(".mp4")) == len(shown)


def test_a_recording_is_played_again_to_the_same_raw_frames():
    with folder() as here, keeping_frames() as shown:
        weights = new_weights(here, "same")
        with recording_takes(here, weights) as page:
            record_moving_points(page)
            record_another_image(page)
            record_from_the_middle(page)
        for name in "take", "take-2", "take-3":
            assert_plays_again(here / f"{name}.npz", weights, shown[name])
        assert [file.name for file in here.glob("take-4*")] == ["take-4.mp4"]
        first = np.load(here / "take.npz")
        assert set(first["prompts"]) == {"", "fading light"}
        second = np.load(here / "take-2.npz")
        told = [int(second[name]) for name in ("chunk", "sink", "window", "fps", "seed")]
        assert told == [1, 3, 3, 60, 3]
        with Image.open(here / "take.png") as image:
            ours = sample.load_image(workplace()[1] / "image.png")
            assert np.array_equal(np.asarray(image), np.asarray(ours))


def test_recordings_of_models_with_other_ids_and_that_copy_are_played_again():
    # A recording has a column for every point of the whole take, hidden where it is not there:
    # copies add up over columns, and sums of more numbers are rounded otherwise.
    for mode, levels in ("random", 0), ("copies", 1):
        with folder() as here, keeping_frames() as shown:
            weights = new_weights(here, mode)
            with recording_takes(here, weights) as page:
                record_moving_points(page)
            assert_plays_again(here / "take.npz", weights, shown["take"], levels)


# --------------------------------------------------------------------------------------------------
# In a browser.

class Chromium:
    """A headless Chromium, spoken to through a pipe (its DevTools protocol)."""

    def __init__(self, program, here):
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--disable-renderer-backgrounding", f"--user-data-dir={here}", "about:blank"]
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'    # it reads from 3 and writes to 4
        self.process = subprocess.Popen(
            ["bash", "-c", line, program] + flags, pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(theirs_in)
        os.close(theirs_out)
        self.count = 0
        self.rest = b""

    def call(self, method, params, **session):
        """What it answers."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.out, json.dumps(message | session).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.into, 2 ** 20)
            answer, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.count:
                assert "result" in answer, answer
                return answer["result"]

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)             # all of its processes
        self.process.wait()


@functools.cache
def chromium():
    """One for all tests, until this process ends."""
    names = "chromium-headless-shell", "chromium", "google-chrome"
    programs = [path for path in map(shutil.which, names) if path]
    if not programs:
        raise unittest.SkipTest("NO BROWSER: the page was not tried; "
                                "apt-get install chromium-headless-shell")
    here = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    browser = Chromium(programs[0], here.name)
    atexit.register(here.cleanup)
    atexit.register(browser.kill)                               # before
    return browser


class Tab:
    """A window of the browser, which shows the page."""

    def __init__(self, width):
        where = {"url": "about:blank", "newWindow": True}
        self.target = chromium().call("Target.createTarget", where)["targetId"]
        target = {"targetId": self.target, "flatten": True}
        attached = chromium().call("Target.attachToTarget", target)
        self.session = attached["sessionId"]
        self("Emulation.setDeviceMetricsOverride", width=width, height=860, deviceScaleFactor=1,
             mobile=width < 600)

    def __call__(self, method, **params):
        return chromium().call(method, params, sessionId=self.session)

    def run(self, script):
        answer = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, seconds=30):
        """Wait until a script is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def box(self, element):
        """(left, top, width, height)."""
        return self.run(f"(b => [b.x, b.y, b.width, b.height])({element}.getBoundingClientRect())")

    def is_laid_out(self):
        """Whether the picture stays where it is, so that a place in it can be hit."""
        before = self.box("marks")
        time.sleep(0.2)
        return before == self.box("marks")

    def drag(self, begin, end, steps=12):
        """With the mouse, between two places that are fractions of the picture."""
        left, top, width, height = self.box("marks")
        way = np.linspace(begin, end, steps) * (width, height) + (left, top)
        self.mouse("Pressed", way[0])
        for at in way:
            self.mouse("Moved", at)
        self.mouse("Released", way[-1])

    def click(self, at):
        self.drag(at, at, 2)

    def hover(self, at):
        """Move the mouse, with no button down, to a fraction of the picture; beyond 1: off it."""
        left, top, width, height = self.box("marks")
        self.mouse("Moved", (left + at[0] * width, top + at[1] * height))

    def drawn(self):
        """What is drawn over the video, (H, W, 4) uint8."""
        self.until("!stale")
        url = self.run("marks.toDataURL()")
        png = base64.b64decode(url.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(png)))

    def mouse(self, kind, at):
        x, y = at
        self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1,
             clickCount=1)
        time.sleep(0.05)

    def key(self, letter, **more):
        for kind in "keyDown", "keyUp":
            self("Input.dispatchKeyEvent", type=kind, key=letter, **more)

    def kinds(self):
        """Of the groups of points that the page shows."""
        kinds = self.run("Object.values(groups).map(group => group.kind)")
        return sorted(kind for kind in kinds if kind != "left")

    def until_frames(self, count):
        """Wait until so many more frames have been seen."""
        begun = self.run("+seen")
        self.until(f"+seen >= {begun + count}")

    def until_told(self, page, **state):
        """Wait until the program has been told all, and of this state. Returns its status."""
        self.until("!edited.size && !Object.keys(settings).length && !sent")
        wait_until(lambda: state.items() <= page.status().items())
        return page.status()

    def until_at(self, script, goal, near=0.1):
        """Wait until the colour that `script` looks for is near `goal`. Returns its amount."""
        x, y = goal
        self.until(f"(([n, x, y]) => Math.hypot(x - {x}, y - {y}) < {near})({script})")
        return self.run(script)[0]


@contextlib.contextmanager
def browsing(page, width=1280):
    tab = Tab(width)
    try:
        tab("Page.navigate", url=f"http://{page.host}/{page.token}/")
        tab.until("typeof view === 'object' && view !== null && seen !== ''")
        wait_until(tab.is_laid_out)
        yield tab
    finally:
        chromium().call("Target.closeTarget", {"targetId": tab.target})


# How much of a colour there is in the picture, and where: [n, x, y].
HUE = """(target => {
  const c = document.getElementById('video');
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  const chroma = v => v.map(a => a - (v[0] + v[1] + v[2]) / 3);
  const norm = v => Math.hypot(...v);
  const hue = chroma(target);
  let [n, x, y] = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) {
    const v = chroma([d[i] / 255, d[i + 1] / 255, d[i + 2] / 255]);
    const near = hue[0] * v[0] + hue[1] * v[1] + hue[2] * v[2];
    const w = near > 0.8 * norm(v) * norm(hue) ? Math.max(norm(v) - 0.15, 0) : 0;
    n += w;
    x += w * (i / 4 % c.width) / c.width;
    y += w * Math.floor(i / 4 / c.width) / c.height;
  }
  return [n, x / n, y / n];
})"""


def shipped(image):
    """Flags of the shipped model at 24 frames a second."""
    return ["--image", image, "--weights", HERE / "assets/tiny.safetensors",
            "--vae", HERE / "assets/tiny_vae.safetensors", "--fps", 24]


def write_two_objects(path):
    """A picture of two objects, at (0.3, 0.35) and (0.7, 0.7). Returns scripts that find them."""
    scene = world.new_scenes(1, 1, seeded(3), objects=2, camera=False, attributes=(0, 0), flat=True,
                             style="simple")
    scene["position"][0, :2, 0] = torch.tensor([[0.3, 0.35], [0.7, 0.7]])
    scene["radius"][:] = 0.13
    picture = sample.to_frames(world.render(scene, 384))[0]
    Image.fromarray(picture).save(path)
    return [f"{HUE}({colour.tolist()})" for colour in scene["colour"][0, :2]]


@slow
def test_in_a_browser_one_object_goes_its_way_while_another_is_pinned():
    with folder() as here:
        red, blue = write_two_objects(here / "two.png")
        with served(*shipped(here / "two.png")) as page, browsing(page) as browser:
            most_red = browser.until_at(red, (0.3, 0.35), 0.04)
            most_blue = browser.until_at(blue, (0.7, 0.7), 0.04)
            browser.run("actions.pin()")
            browser.click((0.7, 0.7))
            browser.run("actions.drag()")
            browser.drag((0.3, 0.35), (0.6, 0.35))              # 30 % to the right
            assert browser.until_at(red, (0.6, 0.35)) > most_red / 3
            assert browser.until_at(blue, (0.7, 0.7), 0.06) > most_blue / 3
            assert browser.kinds() == ["drag", "pin"]
            browser.run("actions.clear(), actions.pin()")
            browser.click((0.7, 0.7))
            browser.run("actions.path()")
            browser.drag((0.6, 0.35), (0.25, 0.35))     # drawn now, gone along when it is played
            browser.until_frames(24)
            browser.until_at(red, (0.6, 0.35))                  # it waits where it was dragged to
            browser.run("actions.play()")
            assert browser.until_at(red, (0.25, 0.35)) > most_red / 3
            browser.until_at(blue, (0.7, 0.7), 0.06)


def test_in_a_browser_a_dragged_object_moves_again_and_again():
    with folder() as here:
        red, _ = write_two_objects(here / "two.png")
        with served(*shipped(here / "two.png")) as page, browsing(page) as browser:
            begin = [0.3, 0.35]
            most = browser.until_at(red, begin, 0.04)
            for goal in (0.6, 0.4), (0.3, 0.6):     # the second one takes hold of what has moved
                browser.drag(begin, goal)
                assert browser.until_at(red, goal, 0.12) > most / 3
                begin = browser.run("pointsOf(['drag'])[0].p")
            browser.run("actions.pause()")
            groups = browser.until_told(page, pause=True)["groups"]
            assert [len(group["points"]) for group in groups.values()] == [1]


def test_in_a_browser_words_are_chosen_and_the_camera_is_moved_and_all_stays_on_reload():
    with served("--fps", 24) as page, browsing(page) as browser:
        browser.drag((0.3, 0.6), (0.6, 0.5))
        browser.run("$('menu').querySelectorAll('button')[1].click()")
        browser.until_frames(12)
        prompt = browser.until_told(page)["prompt"]
        assert prompt == "steady shapes, fading light"
        browser.run("actions.camera(), moveCamera(0.1, 0)")
        assert len(browser.until_told(page)["groups"]["camera"]["points"]) == 64
        z, at = browser.run("[camera().z, camera().at]")
        assert_near(torch.tensor([z] + at), torch.tensor([1, 0.1, 0]), 1e-3)
        browser("Page.reload")
        browser.until("typeof view === 'object' && view !== null && "
                      "pointsOf(['drag']).length === 1")
        with browsing(page, 390) as other:                      # a second one, on a phone
            other.until("pointsOf(['drag']).length === 1 && state.viewers >= 2")
            other.run("actions.restart()")
            other.until_told(page, take=1)
            browser.until("!pointsOf(['drag']).length")


def test_in_a_browser_what_is_grabbed_again_is_what_was_brought_there():
    with served("--fps", 24) as page, browsing(page) as browser:
        for begin, end in (0.2, 0.4), (0.8, 0.47):          # two things, side by side in the end
            browser.drag((begin, 0.5), (end, 0.5))
            browser.until_told(page)
            browser.run("actions.clear()")
        for place, start in (0.39, 0.19), (0.48, 0.81), (0.7, 0.7):         # the third is nobody's
            found = browser.run(f"origin([{place}, 0.5])")
            assert math.dist(found, (start, 0.5)) < 0.02, (place, found)


def test_in_a_browser_a_button_and_a_key_record_and_the_page_says_into_what():
    pressed = "$('record').getAttribute('aria-pressed')"
    said = "$('recorded').textContent"
    with (folder() as mine, into(mine / "recording.mp4"), served("--fps", 24) as page,
          browsing(page, 390) as browser):
        assert browser.run(pressed) == "false"
        assert browser.run(said) == ""
        browser.run("actions.pause()")
        browser.run("$('record').click()")
        browser.until(f"/^● recording[.]mp4, [0-9.]+ s/.test({said})")
        assert browser.run(pressed) == "true"
        assert page.status()["record"]
        browser.until(f"parseFloat({said}.split(', ')[1]) > 0.4")       # seconds
        browser.key("v")
        browser.until(f"/^recording[.]mp4, [0-9.]+ s/.test({said})")
        assert browser.run(pressed) == "false"
        wait_until((mine / "recording.mp4").exists)
        assert count_frames(mine / "recording.mp4") > 5
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.run("$('prompt').focus()")
        browser.key("v", text="v")
        browser.until("$('prompt').value.includes('v')")
        assert browser.run(pressed) == "false"                  # a letter of the prompt
        page.control([(9, 8)], record=True)
        browser.until(f"{pressed} === 'true'")                  # another page did it


@slow
def test_in_two_browsers_each_sees_the_points_of_both_and_either_removes_them():
    with served("--fps", 24) as page, browsing(page) as one, browsing(page, 390) as two:
        one.drag((0.2, 0.2), (0.5, 0.2))
        two.run("actions.path()")
        two.drag((0.2, 0.7), (0.6, 0.7))
        for browser in one, two:
            browser.until("pointsOf(['drag']).length === 1 && pointsOf(['path']).length === 1")
            browser.until("state.viewers === 2")
            assert abs(browser.run("pointsOf(['drag'])[0].p[0]") - 0.5) < 0.02
            assert "2 watching" in browser.run("$('facts').textContent")
        two.run("actions.play()")
        one.until("pointsOf(['drag']).some(({p: [x, y]}) => Math.hypot(x - 0.6, y - 0.7) < 0.02)")
        one.click((0.6, 0.7))                                   # removes it, with whatever tool
        for browser in one, two:
            browser.until("pointsOf(['drag', 'path']).length === 1")
        found = two.run("origin([0.6, 0.7])")                   # and it stays known what is there
        assert math.dist(found, (0.2, 0.7)) < 0.02, found
        one.run("actions.clear()")
        two.until("!pointsOf(['drag']).length")


CLIPPED = """[...document.querySelectorAll('button, #note, #crop')].filter(element =>
    element.scrollWidth > element.clientWidth
    || element.scrollHeight > element.clientHeight + 1).length"""


def test_in_a_browser_the_picture_is_as_large_as_fits_and_no_label_is_clipped():
    with served("--fps", 24) as page:
        for width, least in (1280, 880), (390, 390):            # 48x32 pixels; 860 high
            with browsing(page, width) as browser:
                browser.until("$('chunks').children.length === 2 && !$('invite').hidden")
                left, top, wide, high = browser.box("$('stage')")
                assert wide >= least
                assert abs(wide / high - 1.5) < 0.01
                assert browser.run("document.documentElement.scrollWidth") == width
                assert browser.run(CLIPPED) == 0
                assert browser.run("$('badge').hidden")         # it does not begin with "paused"
                crop = browser.run("$('crop').textContent")
                assert crop == "Cropped: the middle 48 × 32 of 48 × 40 pixels."
                words = browser.run("Object.values(tips).join() + $('note').textContent")
                on_phone = width == 390
                assert ("Tap" in words and "fingers" in words) == on_phone
                assert ("wheel" in words and "Click" in words) != on_phone
                assert on_phone == (left == top == 0)


def test_in_a_browser_it_is_said_how_slow_a_stream_is():
    with served("--fps", 24) as page, browsing(page) as browser:
        for slowness, shown, said in [
            (2.14, 0, "slower than real time (2.1×)"),
            (1, 0, ""),
            (1, 800, "computing…"),
        ]:
            state = f"control.pause = false, state.slowness = {slowness}"
            assert browser.run(f"({state}, badge({shown}, times = []))") == said


def test_in_a_browser_nine_points_are_placed_and_one_click_removes_them():
    with served("--fps", 24) as page, browsing(page) as browser:
        browser.run("actions.pin(), $('sides').children[1].click()")
        browser.click((0.5, 0.5))
        browser.until_told(page, pause=True)
        browser.until("pointsOf(['pin']).length === 9")
        assert browser.kinds() == ["pin"]
        assert browser.run("$('invite').hidden")
        browser.click((0.55, 0.55))
        browser.until("!pointsOf(['pin']).length")
        first, *_ = page.status()["groups"].values()
        assert first["kind"] in ("pin", "left")


def test_in_a_browser_an_example_is_chosen_and_a_recording_is_offered():
    with (folder() as mine, into(mine / "recording.mp4"), served("--fps", 24) as page,
          browsing(page) as browser):
        browser.until("$('pictures').querySelectorAll('img').length === 5")
        browser.run("[...document.images].find(image => image.alt === 'drag')"
                    ".parentElement.click()")
        wait_until(lambda: page.status()["image"] == [384, 384])
        browser.run("actions.record(), actions.pause()")
        browser.until("/[.]mp4, /.test($('recorded').textContent)")
        browser.run("actions.record()")
        browser.until("document.querySelectorAll('#files a').length === 3")
        link = "document.querySelector('#files a')"
        assert browser.run(f"{link}.download") == "recording.mp4"
        fetched = f"fetch({link}.href).then(answer => answer.blob()).then(blob => blob.size)"
        assert browser.run(fetched) == (mine / "recording.mp4").stat().st_size
        browser.run("set('prompt', 'a cat')")
        browser.until("$('unknown').textContent.endsWith('a, cat')")


BEYOND = (0.5, 1.02)                # just below the picture
COLOURS = {"drag": (34, 197, 94), "pin": (239, 68, 68), "path": (59, 130, 246)}


def is_colour(picture, colour):
    """Where a picture (H, W, 4) is of that colour and opaque: (H, W) bool."""
    apart = np.abs(picture[..., :3].astype(int) - colour).max(-1)
    return (apart < 40) & (picture[..., 3] > 200)


def width_along(browser, begin, end):
    """Draw a path from place to place, level or upright. Returns how many pixels of its colour
    there are across it at each pixel of its way, (L,), but for the first, where a point lies on
    it."""
    browser.run("actions.clear(), actions.path()")
    browser.drag(begin, end)
    browser.hover(BEYOND)
    blue = is_colour(browser.drawn(), COLOURS["path"])
    axis = int(begin[0] == end[0])                              # 0: level
    across = blue.sum(axis)
    first = int(begin[axis] * len(across))
    last = int(end[axis] * len(across))
    if first > last:
        across = across[::-1]
        first = len(across) - first
        last = len(across) - last
    return across[first + 20:last + 20]


@slow
def test_in_a_browser_a_path_has_arrows_that_point_where_it_goes():
    right = (0.2, 0.5), (0.8, 0.5)
    down = (0.5, 0.1), (0.5, 0.9)
    with served("--fps", 24) as page, browsing(page) as browser:
        for begin, end in right, right[::-1], down, down[::-1]:
            across = width_along(browser, begin, end)
            wide = np.flatnonzero(across >= 5)
            assert 2 <= np.median(across[:wide[-1]]) <= 4
            heads = np.split(wide, np.flatnonzero(np.diff(wide) > 1) + 1)
            assert len(heads) >= 4
            for head in heads:
                widths = across[head]
                assert (np.diff(widths) <= 0).all(), widths     # its tip is in front
                assert widths[0] > widths[-1] + 1, widths
            *on_its_way, last = heads
            assert across[last[0]] > 1.3 * across[np.concatenate(on_its_way)].max()
            assert abs(last[-1] - (len(across) - 20)) < 8
            assert not across[last[-1] + 8:].any(), "nothing goes on behind the last"


def ring(picture, place):
    """Is it drawn upon at the pixels of a circle of radius 6 around a place: (64,) bool."""
    height, width = picture.shape[:2]
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = place[0] * width + 6 * np.cos(turn)
    y = place[1] * height + 6 * np.sin(turn)
    return picture[y.round().astype(int), x.round().astype(int), 3] > 100


@slow
def test_in_a_browser_a_ghost_stays_where_a_point_was_taken():
    begin = (0.3, 0.5)
    end = (0.6, 0.5)
    with served("--fps", 24) as page, browsing(page) as browser:
        browser.drag(begin, end)
        browser.hover(BEYOND)
        picture = browser.drawn()
        height, width = picture.shape[:2]
        assert is_colour(picture, COLOURS["drag"])[height // 2, int(0.6 * width)]
        assert ring(picture, end).all()
        assert 0.3 < ring(picture, begin).mean() < 0.8          # of dashes
        between = picture[height // 2, int(0.32 * width):int(0.58 * width), 3] > 80
        assert 0.3 < between.mean() < 0.8
        browser.click(end)                                      # removed: nothing is left
        browser.hover(BEYOND)
        assert not browser.drawn().any()
        browser.drag(begin, np.add(begin, (0.02, 0)))
        browser.hover(BEYOND)
        assert not ring(browser.drawn(), np.subtract(begin, (0.02, 0))).any()   # hardly moved: none
        browser.run("actions.clear(), actions.path()")
        browser.drag(begin, end)
        browser.run("actions.play()")
        browser.until("pointsOf(['path', 'drag']).some(({p}) => p[0] > 0.55)")
        browser.hover(BEYOND)
        assert 0.3 < ring(browser.drawn(), begin).mean() < 0.8


def places_around(side):
    """Of `side` by `side` places around the middle, 5 % apart."""
    steps = 0.05 * (np.arange(side) - (side - 1) / 2)
    places = []
    for x in steps:
        for y in steps:
            places.append((0.5 + x, 0.5 + y))
    return places


def assert_previews(browser, tool, number, side):
    """What would be placed is shown under the pointer, and nowhere once that is elsewhere."""
    browser.run(f"actions.{tool}(), $('sides').children[{number}].click()")
    browser.hover((0.5, 0.5))
    picture = browser.drawn()
    height, width = picture.shape[:2]
    for x, y in places_around(side):
        *colour, opacity = picture[int(y * height), int(x * width)].tolist()
        assert 100 < opacity < 200
        assert np.abs(np.subtract(colour, COLOURS[tool])).max() < 10
    each = 190 if side == 1 else 105                            # pixels of a disc with its edge
    assert 0.8 < np.count_nonzero(picture[..., 3]) / (each * side ** 2) < 1.2
    browser.hover(BEYOND)
    assert not browser.drawn().any()


def pale_pixels(picture):
    """How many are as opaque as what is not placed yet."""
    return np.count_nonzero(picture[..., 3] == 0x99)


def test_in_a_browser_what_a_click_would_place_is_shown_under_the_pointer():
    with served("--fps", 24) as page, browsing(page) as browser:
        for number, side in enumerate((1, 3, 5)):
            for tool in COLOURS:
                assert_previews(browser, tool, number, side)
        assert browser.kinds() == []
        browser.run("actions.camera()")                         # places nothing
        browser.hover((0.5, 0.5))
        assert not browser.drawn().any()
        browser.run("actions.pin()")
        browser.hover((0.5, 0.51))
        assert pale_pixels(browser.drawn()) > 30 * 25
        browser.click((0.5, 0.5))
        browser.hover((0.5, 0.51))                              # a click would remove these
        picture = browser.drawn()
        assert is_colour(picture, COLOURS["pin"]).sum() > 30 * 25
        assert pale_pixels(picture) < 50


def test_in_a_browser_nothing_is_shown_under_a_mouse_that_the_page_has_come_to_lie_under():
    with served("--fps", 24) as page, browsing(page, 390) as browser:
        assert not browser.drawn().any()                        # the mouse may rest at the corner
        for moved in 0, 1:
            event = ("new PointerEvent('pointermove', "
                     f"{{clientX: 8, clientY: 8, movementX: {moved}}})")
            browser.run(f"marks.dispatchEvent({event})")    # the first is one that browsers make up
            assert browser.drawn()[:20, :20].any() == moved


class Fingers:
    """On the picture, at places that are fractions of it."""

    def __init__(self, browser):
        self.browser = browser
        self.box = browser.box("marks")

    def __call__(self, kind, *places):
        left, top, width, height = self.box
        points = []
        for i, (x, y) in enumerate(places):
            points.append({"x": left + x * width, "y": top + y * height, "id": i})
        self.browser("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)


def test_in_a_browser_two_fingers_move_the_camera_and_leave_no_point():
    with served("--fps", 24) as page, browsing(page, 390) as browser:
        fingers = Fingers(browser)
        fingers("Start", (0.4, 0.5))
        fingers("Start", (0.4, 0.5), (0.6, 0.5))
        fingers("Move", (0.3, 0.5), (0.7, 0.5))
        fingers("End")
        browser.until("groups.camera")
        assert 1.5 < browser.run("camera().z") < 2.5
        assert browser.kinds() == ["camera"]
        fingers("Start", (0.2, 0.3))
        fingers("Move", (0.4, 0.3))
        fingers("End")
        browser.until("pointsOf(['drag']).length === 1")
        fingers("Start", (0.4, 0.3))                            # a tap
        fingers("End")
        browser.until("!pointsOf(['drag']).length")
        camera = browser.until_told(page, pause=False)["groups"]["camera"]
        assert camera["kind"] == "camera"
