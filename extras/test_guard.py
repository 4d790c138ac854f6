"""What guards a training: its folder's lock, and files told by their content."""

import contextlib
import json
import os
import shutil
import signal
import time
import unittest.mock

import torch
from safetensors.torch import load_file, save_file

import train_distill as td
from extras import guard
from extras.testing import assert_error, folder, new_model, public, saved, shards
from motionstream import UserError


def test_weights_are_told_by_what_they_hold_in_however_many_files():
    with folder() as here:
        start = saved(here / "start.safetensors", new_model())
        copied = here / "copied.safetensors"
        shutil.copy(start, copied)
        assert guard.weights_digest(start) == guard.weights_digest(copied)
        saved(copied, new_model(seed=1))
        assert guard.weights_digest(start) != guard.weights_digest(copied)
        index = shards(here, public())
        first_shard = next(here.glob("*-00001-of-*"))
        whole = guard.weights_digest(index)
        assert whole == guard.weights_digest(first_shard)
        last_shard = next(here.glob("*-00003-of-*"))
        tensors = load_file(last_shard)
        save_file({name: t + 1 for name, t in tensors.items()}, last_shard)
        assert whole != guard.weights_digest(index)


def test_a_large_tensor_is_told_by_pieces_from_its_first_byte_to_its_last():
    with folder() as here:
        zeros = torch.zeros(2 ** 20)
        path = here / "a.safetensors"
        save_file({"a": zeros}, path)
        digests = {guard.content_digest(path)}
        for at in 0, 1023, 2 ** 20 - 1:
            changed = zeros.clone()
            changed[at] = 1
            save_file({"a": changed}, path)
            digests.add(guard.content_digest(path))
        save_file({"a": zeros.reshape(2 ** 10, 2 ** 10)}, path)
        digests.add(guard.content_digest(path))
        torch.save(zeros, here / "a.pt")
        digests.add(guard.content_digest(here / "a.pt"))
        assert len(digests) == 6
        path.write_bytes(path.read_bytes()[:40])
        assert_error(UserError, f"{path}: damaged", guard.content_digest, path)


def test_a_folder_is_that_of_one_training_until_it_ends_even_by_a_crash():
    with folder() as here:
        left = here / ".toy.0000003.checkpoint.pt.12.part"
        among_clips = here / "latents.1/a/.b.safetensors.12.part"
        users = here / ".x.mp4.12.part"
        among_clips.parent.mkdir(parents=True)
        for path in left, among_clips, users:
            path.touch()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            with guard.own_folder(here):
                os.write(told, b"!")
                time.sleep(60)
        try:
            os.read(ready, 1)
            assert not left.exists() and not among_clips.exists()
            assert users.exists()
            left.touch()
            owned = guard.own_folder(here)
            assert_error(UserError, f"{here}: process {child} on ", owned.__enter__)
            assert left.exists(), "the other may be writing it"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with guard.own_folder(here):
            assert not left.exists()
            lock = (here / ".lock").read_text()
            assert lock.startswith(f"process {os.getpid()} on ")


def test_damaged_notes_of_a_training_are_passed_over():
    row = {"stage": "vae", "step": 0, "seconds": 1.0}
    with folder() as here:
        log = here / "stats.jsonl"
        log.write_bytes(b"\xff\n5\n{}\n[1]\n" + json.dumps(row).encode() + b'\n{"stage": "v')
        assert guard.read_log(log) == [row]
        clips = here / "clips"
        clips.mkdir()
        saved(clips / "a.safetensors", new_model())
        kept = here / "clips.json"
        expected = guard.read_digests(clips, kept)
        age = json.loads(kept.read_text())["a.safetensors"][:2]
        for text in "5", "[1]", "{", '{"a.safetensors": 5}', json.dumps({"a.safetensors": age}):
            kept.write_text(text)
            assert guard.read_digests(clips, kept) == expected, text


def test_an_interrupted_look_at_the_clips_goes_on_where_it_was_kept():
    with folder() as here:
        clips = here / "clips"
        clips.mkdir()
        for name in "abcdef":
            saved(clips / f"{name}.safetensors", new_model(seed=ord(name)))
        kept = here / "clips.json"
        expected = guard.read_digests(clips, here / "another.json")
        digest = unittest.mock.Mock(side_effect=["1", "2", "3", KeyboardInterrupt])
        with unittest.mock.patch.object(guard, "KEEP_EVERY", 2), \
                unittest.mock.patch.object(guard, "content_digest", digest), \
                contextlib.suppress(KeyboardInterrupt):
            guard.read_digests(clips, kept)
        assert digest.call_count == 4
        found = guard.read_digests(clips, kept)
        assert list(found.values())[:2] == ["1", "2"], "kept, so not looked at again"
        assert list(found.items())[2:] == list(expected.items())[2:]


def test_a_file_in_place_of_the_output_folder_is_named():
    with folder() as here:
        (here / "notes.txt").write_text("mine")
        flags = td.parse(["--out", str(here / "notes.txt")])
        assert_error(UserError, "notes.txt: is a file", td.resolve, flags)
