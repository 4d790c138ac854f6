"""Videos as users have them, made by ffmpeg: what is stored is read, and what cannot be is refused with its cure."""

import contextlib
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np

import sample
from extras.testing import assert_error, folder
from extras.video import open_video, refuse
from motionstream import UserError
from sample import find_ffmpeg

RED = "color=0xE43B26:s=64x64:r=16:d=1"         # (228, 59, 38)
COUNTER = "testsrc=s=64x48:r=16:d=3"


def ffmpeg(*words):
    subprocess.run([find_ffmpeg(), "-v", "error", "-y", "-nostdin", *map(str, words)], check=True)


def make(path, source, *options):
    """A video by ffmpeg: a source, such as COUNTER, and options of the output."""
    ffmpeg("-f", "lavfi", "-i", source, *options, path)
    return path


def read(path, most=None):
    """All frames (T, H, W, 3), when they are shown, and the Video."""
    video = open_video(path, most)
    frames = np.stack([*video.frames])
    return frames, video.times(), video


def follow_cure(path):
    """Run the command that is in the message by which a video is refused, as a user would. Returns the message."""
    try:
        read(path)
    except UserError as e:
        said = str(e)
    assert "\n" not in said
    here = path.absolute().parent
    with contextlib.suppress(FileExistsError):
        (here / "ffmpeg").symlink_to(find_ffmpeg())
    line = re.search("ffmpeg -i .*", said)[0]
    subprocess.run(line, shell=True, check=True, capture_output=True,
                   env=os.environ | {"PATH": f"{here}:{os.environ['PATH']}"})
    return said


def assert_colour(frames, colour, most=6):
    assert abs(frames.mean((0, 1, 2)) - colour).max() < most, frames.mean((0, 1, 2))


def test_frames_read_are_the_frames_stored():
    with folder() as here:
        late = "settb=1/32,setpts='2*N+between(N,10,20)'"
        path = make(here / "late.mp4", COUNTER, "-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1/32")
        even = make(here / "even.mp4", COUNTER)
        frames, times, video = read(path)
        assert len(frames) == 48 and video.fps == 16
        assert np.abs(frames.astype(int) - read(even)[0]).mean() < 1, "in order, none twice"
        expected = np.arange(48) / 16
        expected[10:21] += 1 / 32
        assert abs(times - expected).max() < 1e-3
        assert len(read(path, 7)[0]) == 7
        make(here / "sound.mp4", "sine=d=3")
        ffmpeg("-itsoffset", 0.7, "-i", even, "-i", here / "sound.mp4", "-c", "copy", here / "after.mp4")
        assert len(read(here / "after.mp4")[0]) == 48, "sound begins 0.7 s before the picture"
        ffmpeg("-ss", 0.5, "-i", even, "-c", "copy", here / "edit.mp4")
        frames, times, _ = read(here / "edit.mp4")
        assert len(frames) == 40 and times[0] == 0, "what an edit list cuts away is not shown"
        gif, times, _ = read(make(here / "x.gif", COUNTER))
        assert len(gif) == 48 and abs(np.diff(times) - 1 / 16).max() < 0.01


def test_hdr_and_wide_gamut_are_refused_with_the_command_that_makes_them_right():
    sdr = "scale=out_color_matrix=bt709,setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709"
    with folder() as here:
        for name, transfer, tags, what in (
                ("pq", "smpte2084", (), "is HDR"), ("hlg", "arib-std-b67", (), "is HDR"),
                ("wide", "bt2020-10", (), "wide gamut"),
                ("untold", "smpte2084", ("-bsf:v", "hevc_metadata=colour_primaries=2:matrix_coefficients=2"), "is HDR")):
            path = make(here / f"a '{name}'.mp4", RED, "-vf",
                        f"{sdr},zscale=p=bt2020:m=bt2020nc:t={transfer}:npl=203,format=yuv420p10le",
                        "-c:v", "libx265", "-x265-params", "log-level=error", *tags, "-movflags", "-write_colr")
            said = follow_cure(path)
            assert what in said and str(path) in said, said
            frames, _, _ = read(path)
            assert_colour(frames, (228, 59, 38))
            assert len(frames) == 16 and path.with_name(f"{path.name}.old").exists()


def test_dolby_vision_that_nothing_else_can_show_is_refused():
    told = ("[info] Input #0, mov,mp4,m4a,3gp,3g2,mj2, from 'file:x.mp4':\n"
            "[info]   Stream #0:0[0x1](und): Video: hevc (Main 10), yuv420p10le(pc), 64x64, 16 fps, 16 tbr\n"
            "[info]       DOVI configuration record: version: 1.0, profile: {}, level: 6, rpu flag: 1, el flag: 0, "
            "bl flag: 1, compatibility id: {}\n")
    assert_error(UserError, "Dolby Vision alone", refuse, "x.mp4", told.format(5, 0))
    refuse("x.mp4", told.format(8, 2))                              # BT.709 beneath


def test_pixels_that_are_not_square_and_turned_pictures_are_read_as_they_are_seen():
    with folder() as here:
        half = "color=white:s=32x128:r=16:d=1[a];color=red:s=32x128:r=16:d=1[b];[a][b]hstack,setsar=2"
        path = make(here / "sar.mp4", half)
        frames, _, video = read(path)
        assert frames.shape == (16, 128, 128, 3) and video.size == (64, 128)
        assert_colour(frames[:, :, 4:60], (255, 255, 255))
        assert_colour(frames[:, :, 68:124], (254, 0, 0))
        ffmpeg("-display_rotation", 90, "-i", path, "-c", "copy", here / "turned.mp4")
        frames, _, video = read(here / "turned.mp4")
        assert frames.shape == (16, 128, 128, 3) and video.size == (128, 64)
        assert_colour(frames[:, 68:124], (255, 255, 255))          # turned to the left: the left is below
        odd, _, _ = read(make(here / "odd.mp4", "testsrc=s=63x47:r=16:d=0.25", "-pix_fmt", "yuv444p"))
        assert odd.shape == (4, 47, 63, 3)


def test_range_depth_and_transparency_are_read_right():
    with folder() as here:
        ten = ("-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", "log-level=error")
        for name, options in (("plain", ()), ("ten", ten), ("lossless", ("-c:v", "libx264rgb", "-qp", "0")),
                              ("full", ("-vf", "scale=out_range=pc,format=yuvj420p", "-color_range", "pc")),
                              ("hd", ("-vf", "scale=out_color_matrix=bt709,format=yuv420p", "-colorspace", "bt709"))):
            frames, _, _ = read(make(here / f"{name}.mp4", RED, *options))
            assert_colour(frames, (228, 59, 38), 4)
        frames, _, _ = read(make(here / "half.mov", "color=red@0.5:s=64x48:r=16:d=1,format=rgba", "-c:v", "qtrle"))
        assert_colour(frames, (255, 127, 127), 2)


def test_interlaced_videos_and_files_of_several_are_refused_with_their_command():
    with folder() as here:
        path = make(here / "lines.mp4", COUNTER, "-vf", "tinterlace=interleave_top,format=yuv420p",
                    "-flags", "+ildct+ilme", "-x264-params", "tff=1")
        path = path.rename(here / "-i 12:30 it's.mp4")
        with contextlib.chdir(here):
            assert "is interlaced" in follow_cure(Path(path.name))
        assert len(read(path)[0]) == 24
        even = make(here / "even.mp4", COUNTER)
        ffmpeg("-i", even, "-f", "lavfi", "-i", RED, "-map", 0, "-map", 1, here / "two.mp4")
        assert "holds 2 videos" in follow_cure(here / "two.mp4")
        assert len(read(here / "two.mp4")[0]) == 48
        make(here / "cover.png", RED, "-frames:v", 1)
        ffmpeg("-i", here / "cover.png", "-i", even, "-map", 0, "-map", 1, "-c", "copy", "-disposition:v:0",
               "attached_pic", here / "cover.mp4")
        assert read(here / "cover.mp4")[0].shape == (48, 48, 64, 3), "a cover is no video"


def test_what_is_no_whole_video_is_refused_in_ffmpegs_words():
    with folder() as here:
        even = make(here / "even.mp4", COUNTER, "-movflags", "+faststart")
        whole = even.read_bytes()
        broken = bytearray(whole)
        middle = len(whole) // 2
        broken[middle:middle + 200] = bytes(200)
        make(here / "a.png", RED, "-frames:v", 1)
        for name, data, cause in (
                ("cut.mp4", whole[:-600], "cannot be read as a video after"), ("headless.mp4", whole[:40], "holds no video, only nothing"),
                ("empty.mp4", b"", "cannot be read as a video"), ("text.mp4", b"no video", "cannot be read as a video"),
                ("broken.mp4", broken, "cannot be read as a video after"),
                ("picture.mp4", (here / "a.png").read_bytes(), "is a picture, not a video")):
            (here / name).write_bytes(data)
            assert_error(UserError, f"{here / name}: ", read, here / name)
            assert_error(UserError, cause, read, here / name)
        assert_error(UserError, "sound.mp4: holds no video, only Audio", read, make(here / "sound.mp4", "sine=d=1"))
        ffmpeg("-i", here / "sound.mp4", "-i", here / "a.png", "-map", 0, "-map", 1, "-c", "copy", "-disposition:v:0",
               "attached_pic", here / "song.mp4")
        assert_error(UserError, "song.mp4: holds no video, only Audio, a cover", read, here / "song.mp4")
        sizes = [make(here / f"{size}.h264", f"testsrc=s={size}:r=16:d=1").read_bytes() for size in ("64x48", "96x64")]
        (here / "sizes.h264").write_bytes(b"".join(sizes))
        assert read(here / "sizes.h264")[0].shape == (32, 48, 64, 3), "all of one size"
        assert_error(UserError, "none.mp4: cannot be read as a video", read, here / "none.mp4")
        assert_error(UserError, "Is a directory", read, here)
        with contextlib.chdir(here):
            for name in "12:30.mp4", "%03d.mp4", "-i.mp4", "it's.mp4":
                (here / name).write_bytes(whole)
                assert len(read(name)[0]) == 48, name


# ----------------------------------------------------------------------------------------------------------------------
# Writing.

def test_a_video_is_written_in_bt709_and_says_so():
    with folder() as here:
        for height, width in (256, 256), (720, 1280), (47, 63):
            with sample.video_file(here / "red.mp4", 23.976) as append:
                for _ in range(3):
                    append(np.full((height, width, 3), (200, 40, 40), np.uint8))
            told = subprocess.run([find_ffmpeg(), "-i", here / "red.mp4"], capture_output=True, text=True).stderr
            assert "yuv420p(tv, bt709, progressive)" in told and "SAR 1:1" in told and "23.98 fps" in told, told
            ffmpeg("-i", here / "red.mp4", "-vf", "scale=in_color_matrix=bt709:in_range=tv", "-pix_fmt", "rgb24",
                   "-f", "rawvideo", here / "raw")
            pixels = np.frombuffer((here / "raw").read_bytes(), np.uint8).reshape(-1, 3)
            assert abs(pixels - np.array((200, 40, 40))).max() <= 2
            assert_colour(read(here / "red.mp4")[0], (200, 40, 40), 2)


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_ffmpeg_that_cannot_be_used_is_found_before_anything_is_loaded():
    def refused(cause):
        assert_error(UserError, cause, sample.check_output, here / "x.mp4", (".mp4", ".png"), [])
        sample.check_output(here / "x.png", (".mp4", ".png"), [])

    with folder() as here:
        without = program(here / "without", 'for word in "$@"; do shift; [ "$word" = libx264 ] && word=gone; '
                          f'set -- "$@" "$word"; done; exec {find_ffmpeg()} "$@"')
        for exe, cause in ((here / "none", "No such file"), (here, "Permission denied"), (without, "Unknown encoder"),
                           (program(here / "ill", "echo no luck >&2; exit 3"), "no luck"),
                           (program(here / "silent", "exit 1"), "it has ended with code 1")):
            with unittest.mock.patch.dict(os.environ, IMAGEIO_FFMPEG_EXE=str(exe)):
                refused(cause)
                refused("IMAGEIO_FFMPEG_EXE")
        with unittest.mock.patch.dict(sys.modules, imageio_ffmpeg=None):
            refused("pip install -U imageio[ffmpeg]")
        with unittest.mock.patch("imageio_ffmpeg.get_ffmpeg_exe", side_effect=RuntimeError("No ffmpeg exe")):
            refused("No ffmpeg exe; pip install")


def test_a_video_that_cannot_be_written_says_what_ffmpeg_says():
    import resource                         # of POSIX
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)

    def attempt(path, frames):
        with sample.video_file(path, 16) as append:
            for _ in range(frames):
                append(frame)

    with folder() as here:
        assert_error(UserError, "No such file or directory", attempt, here / "none" / "x.mp4", 3)
        assert_error(UserError, "no frames", attempt, here / "x.mp4", 0)
        (here / "x.mp4").mkdir()
        assert_error(UserError, "Is a directory", attempt, here / "x.mp4", 3)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            assert_error(UserError, "y.mp4: cannot be written after 9 frames (it has ended with code -25", attempt,
                         here / "y.mp4", 9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [file.name for file in here.iterdir()] == ["x.mp4"]
