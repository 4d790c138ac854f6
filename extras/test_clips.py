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
from extras import clips, encoders, guard, watch
from extras.test_video import ffmpeg
from extras.testing import (SMALL, STUB, STUB_VAE, assert_error, assert_near, folder, new_model,
                            new_vae, own_clips, quiet, rand, recipe, saved, small_encoders,
                            with_transformers)
from motionstream import MotionStream, UserError
from sample import embed_words

patch = unittest.mock.patch
NINE = [f"good{i}" for i in range(9)]


def small_flags(here, data):
    """Flags for clips of small models from the videos in `data`."""
    start = saved(here / "start.safetensors", new_model(causal=False))
    vae = saved(here / "encoder.safetensors", new_vae())
    return [data, "--out", here / "clips", "--weights", start, "--vae", vae]


def made(flags):
    """The files of clips that the flags make, and what was said."""
    with quiet() as (said, _):
        files = clips.make_clips(clips.parse_job([str(word) for word in flags]))
    return files, said.getvalue()


def texts_of(files):
    return [load_file(file)["text"] for file in files]


def embedded(words):
    return embed_words(words, SMALL)[0]


def pictures_in(path):
    return imageio.mimread(path, memtest=False)


# --------------------------------------------------------------------------------------------------
# What is made.

def test_processes_share_the_clips_that_are_made():
    own = []

    def note(job, source, caption):
        own.append(source.stem.name)
        raise UserError("noted")

    stubs = patch.multiple(clips, PROCESSES=3, RANK=1, read_clip=note)
    with folder() as here, stubs:
        flags = small_flags(here, own_clips(here / "data", "abcd"))
        assert_error(UserError, "0 of 1 clips", made, flags)
    assert own == ["b"]


def assert_cropped_alike(clip, pictures, given):
    """A clip of 48x32 is that of a video of 64x48 and its tracks: at scale 3/4 it has 36 rows, of
    which 2 go above, 2 below."""
    frames = [sample.fit_image(Image.fromarray(frame), (32, 48)) for frame in pictures]
    video = ((torch.stack(frames, 2) + 1) * 127.5).round().byte()
    with torch.no_grad():
        latents = new_vae().encode(video / 127.5 - 1)[0].half()
    assert clip["latents"].equal(latents)
    assert "first" not in clip                  # only copying models need it
    moved = given["tracks"] * 0.75 - (0, 2)
    inside = (moved >= 0) & (moved < (48, 32))
    seen = given["visibility"] & inside.all(-1)
    assert not seen[:, 0].any()
    assert clip["visible"].numpy().tolist() == seen.tolist()
    apart = abs(clip["tracks"].numpy() - moved)[seen]
    assert apart.max() < 1e-4


def test_own_clips_are_cropped_and_encoded_with_their_tracks():
    with folder() as here:
        data = own_clips(here / "data")
        files, said = made(small_flags(here, data))
        assert not said
        names = "a", "c", "sub/b"
        assert files == [here / "clips" / f"{name}.safetensors" for name in names]
        for name, file in zip(names, files):
            clip = load_file(file)
            pictures = pictures_in(data / f"{name}.mp4")
            assert_cropped_alike(clip, pictures, np.load(data / f"{name}.npz"))
            assert (clip["group"] == -1).all()
            assert clip["tracks"].dtype == torch.float32
            assert clip["latents"].dtype == torch.float16
            assert clip["text"].equal(embedded("fading light"))


def test_of_many_tracks_2500_are_kept_at_random():
    many = rand(45, 3000, 2).numpy() + 20
    with folder() as here:
        data = own_clips(here / "data", ("a",))
        np.savez(data / "a.npz", tracks=many)
        (file,), _ = made(small_flags(here, data))
        kept = load_file(file)["tracks"][0, :, 0].numpy() / 0.75
    first = many[0, :, 0]
    assert len(kept) == 2500
    assert all(abs(first - x).min() < 1e-4 for x in kept)
    of_the_last_500 = [x for x in kept if abs(first[2500:] - x).min() < 1e-4]
    assert 350 < len(of_the_last_500) < 500


def test_a_training_reads_the_folder_that_is_made():
    with folder() as here, patch.object(watch, "show", lambda run, stage: None):
        flags = small_flags(here, own_clips(here / "data", frames=69))
        made(flags + ["--frames", 45])
        files = td.open_clips(here / "clips", 12)
        lengths = [td.read_header(file)[0]["tracks"][0] for file in files]
        assert lengths == [69, 69, 69], "tracks outlast the 45 frames"
        models = [str(flag) for flag in flags[3:]]
        training = ["--smoke", "--data", str(here / "clips"), "--out", str(here / "out")]
        with quiet() as (_, err):
            code = td.main(training + models + ["--stage", "teacher", "--steps", "1"])
        assert code is None, err.getvalue()


def test_without_a_vae_clips_hold_video():
    small = replace(SMALL, causal=False)
    with folder() as here, patch.dict(clips.PRESETS, tiny=small):
        files, _ = made([own_clips(here / "data"), "--out", here / "clips"])
        clip = load_file(files[0])
        assert clip["video"].shape == (3, 45, 32, 48)
        assert clip["video"].dtype == torch.uint8
        assert "latents" not in clip
        assert "first" not in clip
        assert len(td.open_clips(here / "clips", 12)) == 3


def test_own_clips_are_made_once():
    with folder() as here, patch.object(clips, "read_clip", wraps=clips.read_clip) as read:
        data = own_clips(here / "data")
        flags = small_flags(here, data)
        files, _ = made(flags)
        again, _ = made(flags)
        assert files == again
        assert read.call_count == 3
        (data / "a.txt").write_text("steady light")
        (data / "notes.md").write_text("no part of a clip")
        before = [file.read_bytes() for file in files]
        made(flags)
        assert read.call_count == 4
        assert files[0].read_bytes() != before[0]
        assert files[1].read_bytes() == before[1]
        assert files[2].read_bytes() == before[2]
        files[1].write_bytes(b"damaged")
        made(flags)
        assert read.call_count == 5


def test_pictures_are_enough_to_distil():
    with folder() as here:
        data = own_clips(here / "data")
        flags = small_flags(here, data)
        for file in data.rglob("*.mp4"):
            Image.new("RGB", (64, 48)).save(file.with_suffix(".png"))
            file.unlink()
        # Not for models that read words.
        save_file({"prompt": rand(3, 4096)}, data / "a.safetensors")
        files, _ = made(flags)
        for file in files:
            assert load_file(file)["latents"].shape == (4, 1, 4, 6)
        assert texts_of(files)[0].equal(embedded("fading light"))
        assert td.open_clips(here / "clips", 1) == files
        assert_error(UserError, "3 clips, none of 45 frames",
                     td.open_clips, here / "clips", 12)


# --------------------------------------------------------------------------------------------------
# Texts.

def test_a_table_of_captions_counts_where_there_is_no_text():
    with folder() as here:
        data = own_clips(here / "data", ("a", "c"))
        (data / "a.txt").unlink()
        rows = ["video,caption,score", "a.mp4,\"warming light\",1", "c.mp4,none of this,2"]
        (data / "clips.csv").write_text("\n".join(rows))
        files, _ = made(small_flags(here, data))
        first, second = texts_of(files)
        assert first.equal(embedded("warming light"))
        assert second.equal(embedded("fading light"))


def test_rows_of_a_table_that_say_nothing_are_counted():
    with folder() as here:
        table = here / "clips.csv"
        table.write_text("video,caption\na.mp4\n\na.mp4,\n,x\na.mp4,fading light\n")
        captions, said = clips.read_captions(here, {"a": clips.Source(here / "a", {})})
        assert captions == {"a": "fading light"}
        assert said == [f"{table}: 1 of 4 rows are of clips here; 3 have no video or no caption"]


def test_tables_that_cannot_be_read_are_refused_in_one_line():
    with folder() as here:
        data = own_clips(here / "data", ("a",))
        flags = small_flags(here, data)
        for table, cause in (
            ("name,caption\na.mp4,x\n", "has no columns video and caption, only: name, caption"),
            ("video,caption\nb\u00e9,x", "is no text in UTF-8"),
            ("", "has no columns"),
            ('video,caption\n"a.mp4,x\nc.mp4,y\n', "unexpected end of data"),
            ("video,caption\na.mp4," + "x" * 200_000, "field larger than field limit"),
        ):
            (data / "clips.csv").write_bytes(table.encode("latin-1"))
            assert_error(UserError, f"clips.csv: {cause}", made, flags)


def test_names_belong_together_that_some_systems_take_for_one():
    with folder() as here:
        data = own_clips(here / "data", ("a", "caf\u00e9", "c"))
        (data / "a.npz").rename(data / "A.NPZ")
        (data / "caf\u00e9.txt").rename(data / "cafe\u0301.txt")
        (data / "c.mp4").rename(data / "c.MP4")
        files, said = made(small_flags(here, data))
        assert [file.stem for file in files] == ["a", "c", "caf\u00e9"]
        assert not said


def test_rows_of_a_table_are_of_names_that_some_systems_take_for_one():
    rows = ["Video, Caption ,x", "A.MP4,warming light,1", ".\\c.mp4,still", "c,light", "gone.mp4,x",
            "short", "cafe\u0301.mp4,cold"]
    with folder() as here:
        data = own_clips(here / "data", ("a", "caf\u00e9", "c"))
        (data / "a.txt").unlink()
        (data / "c.txt").unlink()
        (data / "more.CSV").write_text("\n".join(rows) + "\n", encoding="utf-16")
        files, said = made(small_flags(here, data))
        assert said == (
            f"{data}/more.CSV: 4 of 6 rows are of clips here, not 'gone.mp4'; 1 have no video or "
            "no caption; 1 name a clip again, of which the last counts; 1 of the clips have a "
            ".txt, which counts instead\n"), said
        prompts = ("warming light", "light", "fading light")
        for found, words in zip(texts_of(files), prompts, strict=True):
            assert found.equal(embedded(words)), words


def test_a_second_clip_whose_name_differs_in_case_is_another_one():
    with folder() as here:
        data = own_clips(here / "data", ("a", "A", "c"))
        (data / "a.txt").unlink()
        (data / "c.txt").unlink()
        (data / "more.CSV").write_text(f"video,caption\n{data}/a.mp4,light\nc,light\n")
        files, said = made(small_flags(here, data))
        assert [file.stem for file in files] == ["A", "a", "c"]
        assert "2 of 2 rows" in said
        assert texts_of(files)[1].equal(embedded("light"))


def test_texts_are_utf_8_or_utf_16_with_a_mark():
    text = "w\u00e4rmend light"
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", NINE + ["text"]))
        job = clips.parse_job([str(word) for word in flags])
        own = here / "data/text.txt"
        source = clips.Source(own.with_suffix(""), {".txt": own})
        for content in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"),
                        b"\xfe\xff" + text.encode("utf-16-be")):
            own.write_bytes(content)
            assert clips.read_conditions(job, source, None) == {"prompt": text}
        for content in [
            text.encode("utf-16-le"),
            "light".encode("utf-16-be"),
            text.encode("utf-32"),
            b"\xff\xfea",
            bytes(range(256)),
            text.encode("latin-1"),
        ]:
            own.write_bytes(content)
            assert_error(UserError, f"{own}: is no text in UTF-8",
                         clips.read_conditions, job, source, None)
        files, said = made(flags)
        assert len(files) == 9
        assert f"{own}: is no text in UTF-8" in said
        assert said.count("\n") == 1


def loads(flags):
    """(The files that the flags make, how often a pretrained encoder or tokenizer is loaded)."""
    with patch.object(encoders, "pretrained", wraps=encoders.pretrained) as load:
        files, said = made(flags)
    assert not said
    return files, load.call_count


def wan_flags(here, data):
    """Flags for clips of Wan's kind, whose weights have an image branch."""
    config = replace(STUB, in_dim=48, track_dim=16, clip_dim=32, size=(32, 48), fps=16)
    weights = saved(here / "start.safetensors", MotionStream(config))
    vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
    return [data, "--out", here / "clips", "--weights", weights, "--vae", vae]


@with_transformers
def test_clips_prompts_are_encoded_for_wans_weights():
    with folder() as here:
        small_encoders(here / "encoders", width=4096)
        data = own_clips(here / "data", ("a", "b"), frames=81)
        (data / "a.txt").write_text("a red cat")
        flags = wan_flags(here, data)
        files, count = loads(flags + ["--text-encoder", here / "encoders"])
        assert count == 3, "each encoder once, and the tokenizer"
        a, b = map(load_file, files)
        text = encoders.text_encoder(here / "encoders", "cpu")("a red cat")
        assert a["text"].equal(text)
        assert a["text"].shape != b["text"].shape
        image = sample.fit_image(Image.fromarray(pictures_in(data / "a.mp4")[0]), (32, 48))
        expected = encoders.image_encoder(here / "encoders", "cpu")(image)
        assert a["clip"].shape == (257, 32)
        assert_near(a["clip"], expected, 1e-5)
        assert_error(UserError, "0 of 2 clips", made, flags)


@with_transformers
def test_what_clips_hold_encoded_already_is_not_encoded_again():
    with folder() as here:
        small_encoders(here / "encoders", width=4096)
        data = own_clips(here / "data", ("a", "b"), frames=81)
        prompt = rand(3, 4096)
        for name in "a", "b":
            save_file({"prompt": prompt}, data / f"{name}.safetensors")
        flags = wan_flags(here, data)
        assert_error(UserError, "give --image-encoder", made, flags)
        flags += ["--image-encoder", here / "encoders"]
        files, count = loads(flags)
        assert count == 1, "CLIP, for both"
        clip = load_file(files[0])
        assert_near(clip["text"], prompt, 0.01)
        image = sample.fit_image(Image.fromarray(pictures_in(data / "a.mp4")[0]), (32, 48))
        expected = encoders.image_encoder(here / "encoders", "cpu")(image)
        assert_near(clip["clip"], expected, 1e-5)
        rows = rand(257, 32)
        save_file({"prompt": prompt, "clip": rows}, data / "a.safetensors")
        files, _ = made(flags)
        assert load_file(files[0])["clip"].equal(rows), "those of the file"


# --------------------------------------------------------------------------------------------------
# What is wrong with clips, and what is left out.

def write_frames(frames, fps):
    """A function that writes so many frames at that rate."""
    def write(path):
        imageio.mimwrite(path, pictures_in(path)[:frames], fps=fps, macro_block_size=2)
    return write


def no_numbers(path):
    path.write_text("no numbers")


def short_tracks(path):
    np.savez(path, tracks=np.full((44, 2, 2), 20.0))


def test_broken_clips_are_named():
    with folder() as here:
        data = own_clips(here / "data", NINE + ["bad"])
        flags = small_flags(here, data)
        for name, damage, cause in (
            ("bad.txt", Path.unlink, "bad.txt"),
            ("bad.mp4", Path.unlink, "bad.png: No such file"),
            ("bad.npz", no_numbers, "bad.npz: damaged"),
            ("bad.npz", Path.unlink, "bad.npz: No such file"),
            ("bad.mp4", write_frames(44, 16), "44 frames at 16 a second, 45 at 16 are wanted"),
            ("bad.mp4", write_frames(45, 24), "at 24 a second"),
            ("bad.npz", short_tracks, "tracks of 44"),
        ):
            whole = (data / name).read_bytes()
            damage(data / name)
            files, said = made(flags)
            assert f"left out: {data}/bad: " in said, said
            assert cause in said, (cause, said)
            assert said.count("left out") == 1
            assert len(files) == 9
            (data / name).write_bytes(whole)


def test_a_clip_without_a_caption_is_left_out_before_its_video_is_decoded():
    with folder() as here:
        data = own_clips(here / "data", NINE + ["bad"])
        (data / "bad.txt").unlink()
        with unittest.mock.patch.object(clips, "read_images", wraps=clips.read_images) as decode:
            files, said = made(small_flags(here, data))
        assert f"left out: {data}/bad: " in said
        assert len(files) == decode.call_count == 9


def test_too_many_broken_clips_end_it():
    with folder() as here:
        data = own_clips(here / "data", NINE + ["bad"])
        flags = small_flags(here, data)
        for name in "bad", "good0":
            (data / f"{name}.txt").unlink()
        assert_error(UserError, "8 of 10 clips can be used here", made, flags)
        (data / "empty").mkdir()
        flags[0] = data / "empty"
        assert_error(UserError, "0 of 0 clips can be used here", made, flags)


def test_tracks_are_of_the_frames_that_are_stored_even_if_those_are_late_or_not_square():
    with folder() as here:
        data = own_clips(here / "data", ("even", "late", "wide"))
        late = "settb=1/32,setpts='2*N+between(N,10,20)'"
        timed = ("-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1/32", "-qp", 0)
        ffmpeg("-i", data / "even.mp4", *timed, data / "late.mp4")
        ffmpeg("-i", data / "even.mp4", "-vf", "scale=32:48,setsar=2", "-qp", 0, data / "wide.mp4")
        tracks = np.tile(np.float32([[40, 24], [50, 10]]), (45, 1, 1))
        np.savez(data / "even.npz", tracks=tracks)
        np.savez(data / "late.npz", tracks=tracks)
        np.savez(data / "wide.npz", tracks=tracks * np.float32([0.5, 1]))
        flags = small_flags(here, data)
        files, said = made(flags)
        even, late, wide = map(load_file, files)
        assert not said
        assert even["latents"].shape == (4, 12, 4, 6)
        assert_near(even["latents"].float(), late["latents"].float(), 0.2)
        for clip in late, wide:
            assert clip["tracks"].equal(even["tracks"])
            assert (clip["latents"].float() - even["latents"].float()).abs().mean() < 0.1
        np.savez(data / "wide.npz", tracks=tracks, width=64, height=48)     # as the picture is seen
        files, _ = made(flags)
        assert load_file(files[2])["tracks"].equal(even["tracks"])


HDR = "format=yuv420p,setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc"
PAUSE = "settb=1/160,setpts='10*N+gt(N,9)*(17.5-(N-9)/2)'"      # 16 a second on the whole
AGAIN = "make its tracks again after ffmpeg -i"


def test_videos_that_cannot_be_read_as_they_are_are_left_out_with_their_command():
    with folder() as here:
        flags = small_flags(here, own_clips(here / "data", NINE + ["bad"]))
        bad = here / "data/bad.mp4"
        whole = bad.read_bytes()
        for cause, options in (
            ("is HDR (bt2020nc, bt2020, arib-std-b67); ffmpeg -i", ("-vf", HDR)),
            (f"at 24 a second, 16 are wanted; {AGAIN}", ("-r", 24)),
            (f" s away from 16 a second; {AGAIN}",
             ("-vf", PAUSE, "-fps_mode", "passthrough", "-enc_time_base", "1/160")),
        ):
            bad.write_bytes(whole)
            ffmpeg("-i", bad, *options, here / "new.mp4")
            (here / "new.mp4").replace(bad)
            files, said = made(flags)
            assert said.startswith(f"left out: {here}/data/bad: "), said
            assert cause in said, said
            assert said.count("\n") == 1
            assert len(files) == 9


LEFT_OUT = (
    "link/deep: is a link to", "sub/loop: is a link to", "link/back: is a link to",
    "self: is no file", "gone.mp4: is no file, or a link to none", "1 hidden",
    "1 files that end in .mov, which", "1 files that end in nothing",
    "alone: alone.txt without a video", "too")


def test_all_of_a_folder_is_seen_or_it_is_said_what_is_not():
    with folder() as here:
        data = own_clips(here / "data", ("a", "sub/b"))
        elsewhere = own_clips(here / "elsewhere", ("c", "deep/d"))
        (data / "link").symlink_to(elsewhere)
        (data / "sub/loop").symlink_to(data)
        (elsewhere / "back").symlink_to(data / "sub")
        (data / "again").symlink_to(elsewhere / "deep")
        (data / "self").symlink_to(data / "self")
        (data / "gone.mp4").symlink_to(here / "gone.mp4")
        (data / "._a.mp4").write_bytes(b"of macOS")
        for name in "x.mov", "README", "a.MP4":
            (data / name).write_bytes(b"")
        (data / "alone.txt").write_text("light")
        files, said = made(small_flags(here, data))
        names = sorted(str(file.relative_to(here / "clips")) for file in files)
        assert names == [
            "a.safetensors", "again/d.safetensors", "link/c.safetensors", "sub/b.safetensors"]
        for line in LEFT_OUT:
            assert said.count(line) == 1, (line, said)
        for line in said.splitlines():
            assert line.startswith(f"left out: {data}"), line


def test_what_a_training_reads_may_lie_behind_links():
    with folder() as here:
        made(small_flags(here, own_clips(here / "data", ("a", "b"))))
        everything = here / "all"
        everything.mkdir()
        (everything / "link").symlink_to(here / "clips")
        (everything / "link/loop").symlink_to(everything)
        assert len(td.open_clips(everything, 12)) == 2
        digests = guard.read_digests(everything, here / "kept")
        assert sorted(digests) == ["link/a.safetensors", "link/b.safetensors"]
        (here / "clips/b.safetensors").unlink()
        digests = guard.read_digests(everything, here / "kept")
        assert sorted(digests) == ["link/a.safetensors"]


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over():
    closed = PermissionError(13, "Permission denied", "clips/private")
    with folder() as here, unittest.mock.patch("os.scandir", side_effect=closed):
        text = "clips/private: Permission denied; make it readable"
        assert_error(UserError, text, td.clip_files, here)


def test_what_cannot_be_made_into_clips_is_refused_in_one_line():
    with folder() as here:
        data = own_clips(here / "data", ("a",))
        vae = saved(here / "vae.safetensors", new_vae(STUB_VAE))
        wan = saved(here / "wan.safetensors", MotionStream(STUB))
        elsewhere = ["--out", here / "clips"]
        for said, flags in (
            ("none: no such folder", [here / "none"] + elsewhere),
            ("is in", [data, "--out", data / "clips"]),
            ("x.safetensors: no such file", [data, "--vae", here / "x.safetensors"] + elsewhere),
            ("wan.safetensors: give --vae FILE", [data, "--weights", wan] + elsewhere),
            ("the tiny model reads words; drop --text-encoder",
             [data, "--text-encoder", here] + elsewhere),
            ("vae.safetensors: is a file; name a folder", [data, "--out", vae]),
            ("--device nowhere: not available here", [data, "--device", "nowhere"] + elsewhere),
            ("--device meta: not available here", [data, "--device", "meta"] + elsewhere),
            ("--frames 44: a clip has 1 + 4 k", [data, "--frames", 44] + elsewhere),
            ("vae.safetensors: latents have 16 channels", [data, "--vae", vae] + elsewhere),
        ):
            with quiet() as (_, err):
                assert clips.main([str(word) for word in flags]) == 2, said
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("error: ") and said in last, last


def write_plain_video(path, width, height, frames):
    black = np.zeros((frames, height, width, 3), np.uint8)
    imageio.mimwrite(path, black, fps=30, macro_block_size=2)


def test_the_filter_in_docs_takes_wide_clips_of_81_frames_at_16_a_second():
    with folder() as here, patch.object(sys, "argv", ["x", str(here), str(here / "out")]):
        out = here / "out"
        rows = ["video,caption,aesthetic score,motion score,temporal consistency score,"
                "camera motion,frame,fps,seconds"]
        for name, width, height, frames in (
            ("a", 64, 36, 160), ("short", 64, 36, 140), ("square", 48, 48, 160),
        ):
            write_plain_video(here / f"{name}.mp4", width, height, frames)
            rows.append(f"{name}.mp4,\"a {name}, one\",5,1,1,static,{frames},30,{frames / 30:.2f}")
        rows.append("gone.mp4,b,5,1,1,static,200,30,7")
        (here / "OpenVid-1M.csv").write_text("\n".join(rows))
        for _ in range(2):                                              # again: what is there stays
            with quiet() as (said, _):
                exec(recipe("training.md", "OpenVid-1M.csv"), {})
        assert f"4 rows, 3 of them in {here}; 1 clips" in said.getvalue()
        assert {file.name for file in out.iterdir()} == {"a.mp4", "a.txt"}
        pictures = pictures_in(out / "a.mp4")
        assert len(pictures) == 81
        assert pictures[0].shape[:2] == (480, 854)
        assert imageio.get_reader(out / "a.mp4").get_meta_data()["fps"] == 16
        assert (out / "a.txt").read_text() == "a a, one"
