"""A user's own clips: cropped, encoded once, and what is wrong with them named."""

import sys
import unittest
import unittest.mock
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_distill as td
from extras import clips, encoders
from extras.test_video import ffmpeg
from extras.testing import (SMALL, STUB, STUB_VAE, assert_error, assert_near, folder, new_model, new_vae,
                            own_clips, quiet, rand, recipe, saved, small_encoders, with_transformers)
from motionstream import MotionStream, UserError
from sample import embed_words


def small_flags(here, data, *more):
    """Flags for clips of small models from the videos in `data`."""
    start = saved(here / "start.safetensors", new_model(causal=False))
    vae = saved(here / "encoder.safetensors", new_vae())
    return [data, "--out", here / "clips", "--weights", start, "--vae", vae, *more]


def made(flags):
    """The files of clips that the flags make, and what was said."""
    with quiet() as (said, _):
        files = clips.make_clips(clips.parse_job([str(word) for word in flags]))
    return files, said.getvalue()


def test_processes_share_the_clips_that_are_made():
    with folder() as here, quiet(), unittest.mock.patch.multiple(clips, PROCESSES=3, RANK=1):
        flags, own = small_flags(here, own_clips(here / "data", "abcd")), []
        with unittest.mock.patch.object(clips, "read_clip", lambda _, source, caption: own.append(source.stem.name) or 1 / 0):
            assert_error(UserError, "0 of 1 clips", made, flags)
        assert own == ["b"]


def test_own_clips_are_cropped_and_encoded_with_their_tracks():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data"))
        files, said = made(flags)
        names = "a", "c", "sub/b"
        assert not said and files == [here / "clips" / f"{name}.safetensors" for name in names]
        for name, clip in zip(names, map(load_file, files)):
            pictures = imageio.mimread(here / "data" / f"{name}.mp4", memtest=False)
            # 64x48 covers 48x32 at scale 3/4, which leaves 36 rows: 2 go above, 2 below
            video = torch.stack([sample.fit_image(Image.fromarray(frame), (32, 48)) for frame in pictures], 2)
            video = ((video + 1) * 127.5).round().byte()
            with torch.no_grad():
                assert clip["latents"].equal(new_vae().encode(video / 127.5 - 1)[0].half())
            assert "first" not in clip and (clip["group"] == -1).all()
            given = np.load(here / "data" / f"{name}.npz")
            moved = given["tracks"] * 0.75 - (0, 2)
            seen = given["visibility"] & ((moved >= 0) & (moved < (48, 32))).all(-1)
            assert clip["visible"].numpy().tolist() == seen.tolist()
            there = seen[..., None] * np.ones(2, bool)
            assert abs(clip["tracks"].numpy() - moved)[there].max() < 1e-4 and not seen[:, 0].any()
            assert clip["tracks"].dtype == torch.float32 and clip["latents"].dtype == torch.float16
            assert clip["text"].equal(embed_words("fading light", SMALL)[0])
        many = rand(45, 3000, 2).numpy() + 20
        np.savez(here / "data/a.npz", tracks=many)
        kept = load_file(made(flags)[0][0])["tracks"][0, :, 0].numpy() / 0.75
        assert len(kept) == 2500 and all(abs(many[0, :, 0] - x).min() < 1e-4 for x in kept)
        assert 350 < sum(abs(many[0, 2500:, 0] - x).min() < 1e-4 for x in kept) < 500, "of all, at random"


def test_a_training_reads_the_folder_that_is_made():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", frames=69), "--frames", "45")
        made(flags)
        training = ["--smoke", "--data", str(here / "clips"), "--out", str(here / "out")]
        for name in "weights", "vae":
            training += [f"--{name}", str(flags[flags.index(f"--{name}") + 1])]
        files = td.open_clips(here / "clips", SMALL, 12, 69)            # tracks outlast the 45 frames
        assert len(files) == 3
        with quiet() as (_, err), unittest.mock.patch.object(td, "show", lambda *_: None):
            for stage in "teacher", "causal", "distill":
                assert td.main([*training, "--stage", stage, "--steps", "1"]) is None, err.getvalue()


def test_without_a_vae_clips_hold_video():
    small = replace(SMALL, causal=False)
    with folder() as here, unittest.mock.patch.dict(clips.PRESETS, tiny=small):
        files, _ = made([own_clips(here / "data"), "--out", here / "clips"])
        clip = load_file(files[0])
        assert clip["video"].shape == (3, 45, 32, 48) and clip["video"].dtype == torch.uint8
        assert not {"latents", "first"} & {*clip} and len(td.open_clips(here / "clips", small, 12, 45)) == 3


def test_own_clips_are_made_once_and_pictures_are_enough_to_distil():
    with folder() as here:
        flags, data = small_flags(here, own_clips(here / "data")), here / "data"
        with unittest.mock.patch.object(clips, "read_clip", wraps=clips.read_clip) as read:
            files, _ = made(flags)
            again, _ = made(flags)
            assert read.call_count == 3 and files == again
            (data / "a.txt").write_text("steady light")
            (data / "notes.md").write_text("no part of a clip")
            before = [file.read_bytes() for file in files]
            made(flags)
            changed = [file.read_bytes() != old for file, old in zip(files, before)]
            assert read.call_count == 4 and changed == [True, False, False]
            files[1].write_bytes(b"damaged")
            made(flags)
            assert read.call_count == 5
        (data / "a.txt").unlink()
        with open(data / "clips.csv", "w") as file:
            file.write("video,caption,score\na.mp4,\"warming light\",1\nc.mp4,none of this,2\n")
        text = [load_file(file)["text"] for file in made(flags)[0]]
        assert text[0].equal(embed_words("warming light", SMALL)[0]) and not text[0].equal(text[1])
        for table, cause in (("name,caption\na.mp4,x\n", "clips.csv: has no columns video and caption, only: name, caption"),
                             ("video,caption\nb\u00e9,x", "clips.csv: is no text in UTF-8"),
                             ("", "clips.csv: has no columns"),
                             ("video,caption\na.mp4," + "x" * 200_000, "clips.csv: field larger than field limit")):
            (data / "clips.csv").write_bytes(table.encode("latin-1"))
            assert_error(UserError, cause, made, flags)
        (data / "clips.csv").unlink()
        (data / "a.txt").write_text("steady light")
        for file in data.rglob("*.mp4"):
            Image.new("RGB", (64, 48)).save(file.with_suffix(".png"))
            file.unlink()
        save_file({"prompt": rand(3, 4096)}, data / "a.safetensors")            # not for models that read words
        files, _ = made(flags)
        assert [load_file(file)["latents"].shape for file in files] == [(4, 1, 4, 6)] * 3
        assert load_file(files[0])["text"].equal(embed_words("steady light", SMALL)[0])
        assert td.open_clips(here / "clips", SMALL, 1, 45) == files
        assert_error(UserError, "3 clips, none of 45 frames", td.open_clips, here / "clips", SMALL, 12, 45)
        (data / "empty").mkdir()
        assert_error(UserError, "0 of 0 clips can be used here", made, [data / "empty", *flags[1:]])


@with_transformers
def test_clips_prompts_are_encoded_for_wans_weights():
    with folder() as here:
        small_encoders(here / "encoders", width=4096)
        data, c = own_clips(here / "data", ("a", "b"), frames=81), replace(STUB, in_dim=48, track_dim=16, clip_dim=32)
        weights = saved(here / "start.safetensors", MotionStream(replace(c, size=(32, 48), fps=16)))
        flags = [data, "--out", here / "clips", "--weights", weights, "--vae",
                 saved(here / "vae.safetensors", new_vae(STUB_VAE))]
        (data / "a.txt").write_text("a red cat")
        with unittest.mock.patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
            files, said = made([*flags, "--text-encoder", here / "encoders"])
            assert load.call_count == 3 and not said, "each encoder once, and the tokenizer"
        a, b = map(load_file, files)
        text = encoders.text_encoder(here / "encoders", "cpu")("a red cat")
        assert a["text"].equal(text) and not a["text"].shape == b["text"].shape and a["clip"].shape == (257, 32)
        image = sample.fit_image(Image.fromarray(imageio.mimread(data / "a.mp4", memtest=False)[0]), (32, 48))
        assert_near(a["clip"], encoders.image_encoder(here / "encoders", "cpu")(image), 1e-5)
        assert_error(UserError, "0 of 2 clips", made, flags)
        for name in "a", "b":
            save_file({"prompt": rand(3, 4096)}, data / f"{name}.safetensors")
        assert_error(UserError, "give --image-encoder", made, flags)
        with unittest.mock.patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
            files, _ = made([*flags, "--image-encoder", here / "encoders"])
            assert load.call_count == 1, "CLIP, for both"
        assert load_file(files[0])["clip"].equal(a["clip"]) and not load_file(files[0])["text"].equal(a["text"])
        save_file({"prompt": rand(3, 4096), "clip": (rows := rand(257, 32))}, data / "a.safetensors")
        files, _ = made([*flags, "--image-encoder", here / "encoders"])
        assert load_file(files[0])["clip"].equal(rows), "those of the file"


def test_broken_clips_are_named_and_too_many_end_it():
    with folder() as here:
        data = own_clips(here / "data", [f"good{i}" for i in range(9)] + ["bad"])
        flags = small_flags(here, data)
        frames = imageio.mimread(data / "bad.mp4", memtest=False)
        good = {file: file.read_bytes() for file in data.iterdir()}
        for cause, name, damage in [
            ("bad.txt", "bad.txt", Path.unlink), ("bad.png: No such file", "bad.mp4", Path.unlink),
            ("bad.npz: damaged", "bad.npz", lambda path: path.write_text("no numbers")),
            ("bad.npz: No such file", "bad.npz", Path.unlink),
            ("44 frames at 16 a second, 45 at 16 are wanted", "bad.mp4",
             lambda path: imageio.mimwrite(path, frames[:44], fps=16, macro_block_size=2)),
            ("at 24 a second", "bad.mp4",
             lambda path: imageio.mimwrite(path, frames, fps=24, macro_block_size=2)),
            ("tracks of 44", "bad.npz", lambda path: np.savez(path, tracks=np.full((44, 2, 2), 20.0)))]:
            damage(data / name)
            files, said = made(flags)
            assert f"left out: {data}/bad: " in said and cause in said, (cause, said)
            assert said.count("left out") == 1 and len(files) == 9
            (data / name).write_bytes(good[data / name])
        for name in "bad", "good0":
            (data / f"{name}.txt").unlink()
        assert_error(UserError, "8 of 10 clips can be used here", made, flags)


def test_tracks_are_of_the_frames_that_are_stored_even_if_those_are_late_or_not_square():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", ("even", "late", "wide")))
        video = here / "data/even.mp4"
        late = "settb=1/32,setpts='2*N+between(N,10,20)'"
        ffmpeg("-i", video, "-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1/32", "-qp", 0,
               here / "data/late.mp4")
        ffmpeg("-i", video, "-vf", "scale=32:48,setsar=2", "-qp", 0, here / "data/wide.mp4")
        tracks = np.tile(np.float32([[40, 24], [50, 10]]), (45, 1, 1))
        for name, scale in ("even", 1), ("late", 1), ("wide", (0.5, 1)):
            np.savez(here / "data" / f"{name}.npz", tracks=tracks * np.float32(scale))
        files, said = made(flags)
        even, late, wide = map(load_file, files)
        assert not said and even["latents"].shape == (4, 12, 4, 6)
        assert_near(even["latents"].float(), late["latents"].float(), 0.2)
        for clip in late, wide:
            assert clip["tracks"].equal(even["tracks"])
            assert (clip["latents"].float() - even["latents"].float()).abs().mean() < 0.1
        np.savez(here / "data/wide.npz", tracks=tracks, width=64, height=48)        # of the picture as it is seen
        assert load_file(made(flags)[0][2])["tracks"].equal(even["tracks"])


def test_videos_that_cannot_be_read_as_they_are_are_left_out_with_their_command():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", [f"good{i}" for i in range(9)] + ["bad"]))
        bad = here / "data/bad.mp4"
        whole = bad.read_bytes()
        hdr = ("-vf", "format=yuv420p,setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc")
        pause = "settb=1/160,setpts='10*N+gt(N,9)*(17.5-(N-9)/2)'"          # 16 a second on the whole
        for cause, options in (("is HDR (bt2020nc, bt2020, arib-std-b67); ffmpeg -i", hdr),
                               ("at 24 a second, 16 are wanted; make its tracks again after ffmpeg -i", ("-r", 24)),
                               (" s away from 16 a second; make its tracks again after ffmpeg -i",
                                ("-vf", pause, "-fps_mode", "passthrough", "-enc_time_base", "1/160"))):
            bad.write_bytes(whole)
            ffmpeg("-i", bad, *options, here / "new.mp4")
            (here / "new.mp4").replace(bad)
            files, said = made(flags)
            assert f"left out: {here}/data/bad: " in said and cause in said and len(files) == 9, said
            assert said.count("\n") == 1


def test_names_belong_together_that_some_systems_take_for_one():
    with folder() as here:
        data = own_clips(here / "data", ("a", "caf\u00e9", "c"))
        flags = small_flags(here, data)
        (data / "a.npz").rename(data / "A.NPZ")
        (data / "caf\u00e9.txt").rename(data / "cafe\u0301.txt")
        (data / "c.mp4").rename(data / "c.MP4")
        files, said = made(flags)
        assert [file.stem for file in files] == ["a", "c", "caf\u00e9"] and not said
        (data / "a.txt").unlink()
        (data / "c.txt").unlink()
        (data / "more.CSV").write_text("Video, Caption ,x\nA.MP4,warming light,1\n.\\c.mp4,still\nc,light\ngone.mp4,x\n"
                                       "short\ncafe\u0301.mp4,cold\n", encoding="utf-16")
        files, said = made(flags)
        assert said == (f"{data}/more.CSV: 4 of 5 rows are of clips here, not 'gone.mp4'; 1 name a clip again, of which "
                        "the last counts; 1 of the clips have a .txt, which counts instead\n"), said
        text = [load_file(file)["text"] for file in files]
        for found, words in zip(text, ("warming light", "light", "fading light")):
            assert found.equal(embed_words(words, SMALL)[0])
        for name in "mp4", "npz", "txt":                            # a second clip, whole, is another one
            (data / f"A.{name}").write_bytes((data / f"caf\u00e9.{name if name != 'txt' else 'mp4'}").read_bytes())
        (data / "A.txt").write_text("warming light")
        (data / "A.NPZ").rename(data / "a.npz")
        (data / "more.CSV").write_text(f"video,caption\n{data}/a.mp4,light\nc,light\n")
        files, said = made(flags)
        assert [file.stem for file in files][:2] == ["A", "a"] and "2 of 2 rows" in said
        assert load_file(files[1])["text"].equal(embed_words("light", SMALL)[0])


def test_all_of_a_folder_is_seen_or_it_is_said_what_is_not():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", ("a", "sub/b")))
        data = here / "data"
        own_clips(here / "elsewhere", ("c", "deep/d"))
        (data / "link").symlink_to(here / "elsewhere")
        (data / "sub/loop").symlink_to(data)
        (here / "elsewhere/back").symlink_to(data / "sub")
        (data / "again").symlink_to(here / "elsewhere/deep")
        (data / "self").symlink_to(data / "self")
        (data / "gone.mp4").symlink_to(here / "gone.mp4")
        (data / "._a.mp4").write_bytes(b"of macOS")
        (data / "x.mov").write_bytes(b"")
        (data / "README").write_bytes(b"")
        (data / "alone.txt").write_text("light")
        (data / "a.MP4").write_bytes(b"")
        files, said = made(flags)
        assert sorted(str(file.relative_to(here / "clips")) for file in files) == [
            "a.safetensors", "again/d.safetensors", "link/c.safetensors", "sub/b.safetensors"], files
        for line in ("link/deep: is a link to", "sub/loop: is a link to", "link/back: is a link to", "self: is no file",
                     "gone.mp4: is no file, or a link to none", "1 hidden", "1 files that end in .mov, which",
                     "1 files that end in nothing", "alone: alone.txt without a video", "too"):
            assert said.count(line) == 1, (line, said)
        assert all(line.startswith(f"left out: {data}") for line in said.splitlines())


def test_what_a_training_reads_may_lie_behind_links():
    with folder() as here:
        made(small_flags(here, own_clips(here / "data", ("a", "b"))))
        (here / "all").mkdir()
        (here / "all/link").symlink_to(here / "clips")
        (here / "all/link/loop").symlink_to(here / "all")
        assert len(td.open_clips(here / "all", SMALL, 12, 45)) == 2
        assert sorted(td.read_digests(here / "all", here / "kept")) == ["link/a.safetensors", "link/b.safetensors"]
        (here / "clips/b.safetensors").unlink()
        assert sorted(td.read_digests(here / "all", here / "kept")) == ["link/a.safetensors"]


def test_texts_are_utf_8_or_utf_16_with_a_mark():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", [f"good{i}" for i in range(9)] + ["text"]))
        own, text = here / "data/text.txt", "w\u00e4rmend light"
        job = clips.parse_job([str(word) for word in flags])
        for data in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"),
                     b"\xfe\xff" + text.encode("utf-16-be")):
            own.write_bytes(data)
            assert clips.read_conditions(job, clips.Source(own.with_suffix(""), {".txt": own}), None) == {"prompt": text}
        for data in (text.encode("utf-16-le"), "light".encode("utf-16-be"), text.encode("utf-32"), b"\xff\xfea",
                     bytes(range(256)), text.encode("latin-1")):
            own.write_bytes(data)
            source = clips.Source(own.with_suffix(""), {".txt": own})
            assert_error(UserError, f"{own}: is no text in UTF-8", clips.read_conditions, job, source, None)
        files, said = made(flags)
        assert len(files) == 9 and f"{own}: is no text in UTF-8" in said and said.count("\n") == 1, said


def test_what_cannot_be_made_into_clips_is_refused_in_one_line():
    with folder() as here, quiet() as (_, err):
        data = own_clips(here / "data", ("a",))
        vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
        wan = saved(here / "wan.safetensors", MotionStream(STUB))
        for said, *flags in [("none: no such folder", here / "none"),
                             ("is in", data, "--out", data / "clips"),
                             ("x.safetensors: no such file", data, "--vae", here / "x.safetensors"),
                             ("wan.safetensors: give --vae FILE", data, "--weights", wan),
                             ("the tiny model reads words; drop --text-encoder", data, "--text-encoder", here),
                             ("--frames 44: a clip has 1 + 4 k", data, "--frames", "44"),
                             ("vae.safetensors: latents have 16 channels", data, "--vae", vae)]:
            if "--out" not in flags:
                flags += ["--out", here / "clips"]
            assert clips.main([str(word) for word in flags]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last, (said, last)


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
