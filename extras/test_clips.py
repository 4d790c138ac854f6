"""A user's own clips: cropped, encoded once, and what is wrong with them named."""

import contextlib
import sys
import unittest
import unittest.mock
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_distill as td
from extras import clips, encoders, evaluate
from extras.testing import (SMALL, STUB, STUB_VAE, assert_error, assert_near, folder, new_model,
                            new_vae, own_clips, own_flags, quiet, rand, recipe, saved,
                            small_encoders, with_transformers)
from motionstream import MotionStream
from sample import embed_words


def test_processes_share_the_clips_that_are_encoded():
    with folder() as here, quiet(), unittest.mock.patch.multiple(td, PROCESSES=3, RANK=1, mean_processes=lambda _: 0):
        flags, own = own_flags(here, own_clips(here / "data", "abcd")), []
        with unittest.mock.patch.object(clips, "read_clip", lambda _, stem, caption: own.append(stem.name) or 1 / 0):
            assert_error(td.UserError, "0 of 4 clips", encoded, flags)
        assert own == ["b"]


def encoded(flags, pictures=False):
    """Files of the clips that a training with these flags sees, and what was said."""
    with quiet() as (said, _):
        files = td.own_clips(td.Run(td.parse_flags([str(word) for word in flags])), pictures)
    return files, said.getvalue()


def test_own_clips_are_cropped_and_encoded_with_their_tracks():
    with folder() as here:
        flags = own_flags(here, own_clips(here / "data"))
        run, (files, _) = td.Run(td.parse_flags(flags)), encoded(flags)
        names = "a", "c", "sub/b"
        assert [file.relative_to(here / "runs/clips").as_posix().split(".")[0] for file in files] == [*names]
        for name, clip in zip(names, map(load_file, files)):
            pictures = imageio.mimread(here / "data" / f"{name}.mp4", memtest=False)
            # 64x48 covers 48x32 at scale 3/4, which leaves 36 rows: 2 go above, 2 below
            video = torch.stack([sample.fit_image(Image.fromarray(frame), (32, 48)) for frame in pictures], 2)
            with torch.no_grad():
                assert clip["latents"].equal(run.vae().encode(video).half())
            given = np.load(here / "data" / f"{name}.npz")
            N, moved = given["tracks"].shape[1], given["tracks"] * 0.75 - (0, 2)
            seen = given["visibility"] & ((moved >= 0) & (moved < (48, 32))).all(-1)
            assert clip["visible"][0, :, :N].numpy().tolist() == seen.tolist() and not clip["visible"][0, :, N:].any()
            there = seen[..., None] * np.ones(2, bool)
            assert abs(clip["tracks"][0, :, :N].numpy() - moved)[there].max() < 1e-4 and not seen[:, 0].any()
            assert clip["tracks"].shape == (1, 45, 2500, 2) and clip["visible"].shape == (1, 45, 2500)
            assert clip["text"].equal(F.pad(embed_words("fading light", SMALL), (0, 0, 0, 3)))
        batch = td.pick(files, 50)
        assert batch["latents"].shape == (50, 4, 12, 4, 6) and {*batch} == {"latents", "tracks", "visible", "text"}
        assert len({clip.sum().item() for clip in batch["latents"].float()}) == 3
        many = rand(45, 3000, 2).numpy() + 20
        np.savez(here / "data/a.npz", tracks=many)
        kept = load_file(encoded(flags)[0][0])["tracks"][0, 0, :, 0].numpy() / 0.75
        assert len(kept) == 2500 and all(abs(many[0, :, 0] - x).min() < 1e-4 for x in kept)
        assert 350 < sum(abs(many[0, 2500:, 0] - x).min() < 1e-4 for x in kept) < 500, "of all, at random"


def test_own_clips_are_encoded_once_and_pictures_are_enough_to_distil():
    with folder() as here:
        flags, data = own_flags(here, own_clips(here / "data")), here / "data"
        with unittest.mock.patch.object(clips, "read_clip", wraps=clips.read_clip) as read:
            files, _ = encoded(flags)
            again, _ = encoded(flags)
            assert read.call_count == 3 and files == again
            settings = td.Run(td.parse_flags(flags)).settings("teacher")
            (data / "a.txt").write_text("steady light")
            other, _ = encoded(flags)
            assert read.call_count == 4 and other[0] != files[0] and other[1:] == files[1:]
            assert td.Run(td.parse_flags(flags)).settings("teacher") != settings    # other clips, another training
            encoded([*flags, "--rollout", "4"])                         # as long as the clips
            assert read.call_count == 4
            assert_error(td.UserError, "0 of 3 clips", encoded, [*flags, "--rollout", "5"])
            read.reset_mock()
            _, said = encoded(own_flags(here, own_clips(here / "long", frames=93), "--rollout", "8"))
            assert read.call_count == 3 and not said
        (data / "a.txt").unlink()
        with open(data / "clips.csv", "w") as file:
            file.write("video,caption,score\na.mp4,\"warming light\",1\nc.mp4,none of this,2\n")
        settings = td.Run(td.parse_flags(flags)).settings("teacher")
        (data / "notes.md").write_text("no part of a clip")
        assert td.Run(td.parse_flags(flags)).settings("teacher") == settings
        text = [load_file(file)["text"] for file in encoded(flags)[0]]
        assert text[0].equal(F.pad(embed_words("warming light", SMALL), (0, 0, 0, 3))) and not text[0].equal(text[1])
        for table in "name,caption\na.mp4,x\n", "video,caption\nb\u00e9,x":
            (data / "clips.csv").write_bytes(table.encode("latin-1"))
            assert_error(td.UserError, "clips.csv: no csv in UTF-8 with columns", encoded, flags)
        (data / "clips.csv").unlink()
        (data / "a.txt").write_text("steady light")
        (data / "a.mp4").unlink()
        Image.new("RGB", (64, 48)).save(data / "a.png")
        mixed, _ = encoded(flags, pictures=True)
        assert td.pick(mixed, 20, 1)["latents"].shape == (20, 4, 1, 4, 6), "one of them is a picture"
        for file in data.rglob("*.mp4"):
            Image.new("RGB", (64, 48)).save(file.with_suffix(".png"))
            file.unlink()
        save_file({"prompt": rand(3, 4096)}, data / "a.safetensors")            # not for models that read words
        files, _ = encoded(flags, pictures=True)
        assert [load_file(file)["latents"].shape for file in files] == [(1, 4, 1, 4, 6)] * 3
        assert load_file(files[0])["text"].equal(F.pad(embed_words("steady light", SMALL), (0, 0, 0, 3)))
        assert_error(td.UserError, "0 of 3 clips can be used here; a clip is a.mp4, a.npz", encoded, flags)
        run = td.Run(td.parse_flags([str(word) for word in flags]))
        with quiet() as (said, _), contextlib.suppress(td.UserError):
            td.own_clips(run, pictures=False)
        assert said.getvalue().count(": has no video") == 3
        (data / "empty").mkdir()
        flags[2] = str(data / "empty")
        assert_error(td.UserError, "0 of 0 clips can be used here", encoded, flags)
        (here / "runs/out").mkdir()
        saved(here / "runs/out" / "student.safetensors", new_model())   # of this run, whose VAE is elsewhere
        with quiet():
            measured = evaluate.new_run(["--out", str(here / "runs/out")], "eval")
        assert measured.path("student") == here / "runs/out" / "student.safetensors"


@with_transformers
def test_clips_prompts_are_encoded_for_wans_weights():
    with folder() as here:
        small_encoders(here / "encoders", width=4096)
        data, c = own_clips(here / "data", ("a", "b"), frames=81), replace(STUB, in_dim=48, track_dim=16, clip_dim=32)
        weights = saved(here / "start.safetensors", MotionStream(replace(c, size=(32, 48), fps=16)))
        flags = ["--data", data, "--weights", weights, "--vae", saved(here / "vae.safetensors", new_vae(STUB_VAE)),
                 "--out", here / "runs/out"]
        (data / "a.txt").write_text("a red cat")
        with unittest.mock.patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
            files, said = encoded([*flags, "--text-encoder", here / "encoders"])
            assert load.call_count == 3 and not said, "each encoder once, and the tokenizer"
        a, b = map(load_file, files)
        assert a["text"].shape == (1, 512, 4096) and a["clip"].shape == (1, 257, 32)
        text = encoders.text_encoder(here / "encoders", "cpu")("a red cat")
        assert a["text"][0, :4].equal(text) and not a["text"][0, 4:].any() and not a["text"].equal(b["text"])
        image = sample.fit_image(Image.fromarray(imageio.mimread(data / "a.mp4", memtest=False)[0]), (32, 48))
        assert_near(a["clip"][0], encoders.image_encoder(here / "encoders", "cpu")(image), 1e-5)
        assert_error(td.UserError, "0 of 2 clips", encoded, flags)
        for name in "a", "b":
            save_file({"prompt": rand(3, 4096)}, data / f"{name}.safetensors")
        assert_error(td.UserError, "give --image-encoder", encoded, flags)
        with unittest.mock.patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
            files, _ = encoded([*flags, "--image-encoder", here / "encoders"])
            assert load.call_count == 1, "CLIP, for both"
        assert load_file(files[0])["clip"].equal(a["clip"]) and not load_file(files[0])["text"].equal(a["text"])
        save_file({"prompt": rand(3, 4096), "clip": (rows := rand(257, 32))}, data / "a.safetensors")
        files, _ = encoded([*flags, "--image-encoder", here / "encoders"])
        assert load_file(files[0])["clip"][0].equal(rows), "those of the file"


def test_broken_clips_are_named_and_too_many_end_it():
    with folder() as here:
        data = own_clips(here / "data", [f"good{i}" for i in range(9)] + ["bad"])
        flags = own_flags(here, data)
        frames = imageio.mimread(data / "bad.mp4", memtest=False)
        good = {file: file.read_bytes() for file in data.iterdir()}
        for cause, name, damage in [
            ("bad.txt", "bad.txt", Path.unlink), ("bad: has no video", "bad.mp4", Path.unlink),
            ("bad.npz: damaged", "bad.npz", lambda path: path.write_text("no numbers")),
            ("bad.npz: No such file", "bad.npz", Path.unlink),
            ("44 frames at 16 a second, 45 at 16 are wanted", "bad.mp4",
             lambda path: imageio.mimwrite(path, frames[:44], fps=16, macro_block_size=2)),
            ("at 24 a second", "bad.mp4",
             lambda path: imageio.mimwrite(path, frames, fps=24, macro_block_size=2)),
            ("tracks of 44", "bad.npz", lambda path: np.savez(path, tracks=np.full((44, 2, 2), 20.0)))]:
            damage(data / name)
            clips, said = encoded(flags)
            assert f"left out: {data}/bad: " in said and cause in said, (cause, said)
            assert said.count("left out") == 1 and len(clips) == 9
            (data / name).write_bytes(good[data / name])
        for name in "bad", "good0":
            (data / f"{name}.txt").unlink()
        assert_error(td.UserError, "8 of 10 clips can be used here", encoded, flags)


def test_the_filter_in_docs_takes_wide_clips_of_81_frames_at_16_a_second():
    with folder() as here, unittest.mock.patch.object(sys, "argv", ["x", str(here), str(here / "out")]):
        (here / "out").mkdir()
        rows = ["video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds"]
        for name, size, frames in ("a", (64, 36), 160), ("short", (64, 36), 140), ("square", (48, 48), 160):
            imageio.mimwrite(here / f"{name}.mp4", np.zeros((frames, size[1], size[0], 3), np.uint8), fps=30,
                             macro_block_size=2)
            rows.append(f"{name}.mp4,\"a {name}, one\",5,1,1,static,{frames},30,{frames / 30:.2f}")
        (here / "OpenVid-1M.csv").write_text("\n".join([*rows, "gone.mp4,b,5,1,1,static,200,30,7"]))
        for _ in range(2):                                          # again: what is there stays
            exec(recipe("training.md", "OpenVid-1M.csv"), {})
        assert {file.name for file in (here / "out").iterdir()} == {"a.mp4", "a.txt"}
        frames = imageio.mimread(here / "out/a.mp4", memtest=False)
        assert len(frames) == 81 and imageio.get_reader(here / "out/a.mp4").get_meta_data()["fps"] == 16
        assert (here / "out/a.txt").read_text() == "a a, one"
