"""Videos as users have them, made by ffmpeg: what is stored is read, else the cure is named."""

import contextlib
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np

import sample
from extras.testing import assert_error, command, folder, sampled
from extras.video import open_video, refuse
from motionstream import UserError
from sample import find_ffmpeg

RED = "color=0xE43B26:s=64x64:r=16:d=1"         # (228, 59, 38)
COUNTER = "testsrc=s=64x48:r=16:d=3"


def ffmpeg(*words):
    program = [find_ffmpeg(), "-v", "error", "-y", "-nostdin"]
    subprocess.run(program + [str(word) for word in words], check=True)


def make(path, source, options=""):
    """A video by ffmpeg: a source, such as COUNTER, and options of the output."""
    ffmpeg("-f", "lavfi", "-i", source, *options.split(), path)
    return path


def read(path, most=None):
    """(All frames (T, H, W, 3), when they are shown, the Video)."""
    video = open_video(path, most)
    frames = np.stack(list(video.frames))
    return frames, video.times(), video


def frames_of(path):
    frames, _, _ = read(path)
    return frames


def follow_cure(path):
    """Run the command that is in the message by which a video is refused, as a user would. Returns
    the message."""
    try:
        read(path)
    except UserError as e:
        said = str(e)
    assert "\n" not in said
    here = path.absolute().parent
    with contextlib.suppress(FileExistsError):
        (here / "ffmpeg").symlink_to(find_ffmpeg())
    line = re.search("ffmpeg -(i|c:v) .*", said)[0]
    environ = os.environ | {"PATH": f"{here}:{os.environ['PATH']}"}
    subprocess.run(line, shell=True, check=True, capture_output=True, env=environ)
    return said


def assert_colour(frames, colour, most=6):
    mean = frames.mean((0, 1, 2))
    assert abs(mean - colour).max() < most, mean


# --------------------------------------------------------------------------------------------------
# Frames and their times.

def test_frames_read_are_the_frames_stored():
    with folder() as here:
        even = make(here / "even.mp4", COUNTER)
        late = "settb=1/32,setpts='2*N+between(N,10,20)'"
        options = f"-vf {late} -fps_mode passthrough -enc_time_base 1/32"
        path = make(here / "late.mp4", COUNTER, options)
        frames, times, video = read(path)
        assert len(frames) == 48
        assert video.fps == 16
        error = frames.astype(int) - frames_of(even)
        assert abs(error).mean() < 1, "not in order, or one twice"
        expected = np.arange(48) / 16
        expected[10:21] += 1 / 32
        assert abs(times - expected).max() < 1e-3
        first, _, _ = read(path, 7)
        assert len(first) == 7


def test_sound_before_the_picture_and_what_is_cut_away_give_no_frames():
    with folder() as here:
        even = make(here / "even.mp4", COUNTER)
        sound = make(here / "sound.mp4", "sine=d=3")
        after = here / "after.mp4"
        ffmpeg("-itsoffset", 0.7, "-i", even, "-i", sound, "-c", "copy", after)
        assert len(frames_of(after)) == 48
        edit = here / "edit.mp4"                                # with an edit list
        ffmpeg("-ss", 0.5, "-i", even, "-c", "copy", edit)
        frames, times, _ = read(edit)
        assert len(frames) == 40
        assert times[0] == 0


def test_a_gif_is_read_too():
    with folder() as here:
        frames, times, _ = read(make(here / "x.gif", COUNTER))
    assert len(frames) == 48
    assert abs(np.diff(times) - 1 / 16).max() < 0.01            # times are whole hundredths


# --------------------------------------------------------------------------------------------------
# Colours and shapes.

HEVC = "-c:v libx265 -x265-params log-level=error"
UNTOLD = "-bsf:v hevc_metadata=colour_primaries=2:matrix_coefficients=2"


def make_bt2020(path, transfer, tags):
    """RED in BT.2020's wide gamut, of 10 bits."""
    filters = ",".join([
        "scale=out_color_matrix=bt709",
        "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709",
        f"zscale=p=bt2020:m=bt2020nc:t={transfer}:npl=203",
        "format=yuv420p10le"])
    return make(path, RED, f"-vf {filters} {HEVC} {tags} -movflags -write_colr")


def test_hdr_and_wide_gamut_are_refused_with_the_command_that_makes_them_right():
    with folder() as here:
        for name, transfer, tags, what in (
                ("pq", "smpte2084", "", "is HDR"),
                ("hlg", "arib-std-b67", "", "is HDR"),
                ("wide", "bt2020-10", "", "wide gamut"),
                ("untold", "smpte2084", UNTOLD, "is HDR")):
            path = make_bt2020(here / f"a '{name}'.mp4", transfer, tags)
            said = follow_cure(path)
            assert what in said, said
            assert str(path) in said, said
            frames = frames_of(path)
            assert_colour(frames, (228, 59, 38))
            assert len(frames) == 16
            assert path.with_name(f"{path.name}.old").exists()


def test_a_transfer_function_alone_is_no_wide_gamut():
    with folder() as here:
        tagged = "setparams=color_trc=linear,format=yuv420p"
        path = make(here / "a.mp4", RED, f"-vf {tagged}")
        said = follow_cure(path)
        assert "has another transfer function (linear)" in said, said
        assert "color_primaries=bt709" in said, said


# What ffmpeg says of a video in Dolby Vision, of a profile and a compatibility.
DOLBY = """\
[info] Input #0, mov,mp4,m4a,3gp,3g2,mj2, from 'file:x.mp4':
[info]   Stream #0:0[0x1](und): Video: hevc (Main 10), yuv420p10le(pc), 64x64, 16 fps, 16 tbr
[info]       DOVI configuration record: version: 1.0, profile: {}, level: 6, rpu flag: 1, \
el flag: 0, bl flag: 1, compatibility id: {}
"""


def test_dolby_vision_that_nothing_else_can_show_is_refused():
    assert_error(UserError, "Dolby Vision alone", refuse, "x.mp4", DOLBY.format(5, 0))
    refuse("x.mp4", DOLBY.format(8, 2))                         # BT.709 beneath


def test_pixels_that_are_not_square_and_turned_pictures_are_read_as_they_are_seen():
    white = "color=white:s=32x128:r=16:d=1"
    red = "color=red:s=32x128:r=16:d=1"
    with folder() as here:
        path = make(here / "sar.mp4", f"{white}[a];{red}[b];[a][b]hstack,setsar=2")
        frames, _, video = read(path)
        assert frames.shape == (16, 128, 128, 3)
        assert video.size == (64, 128)
        assert_colour(frames[:, :, 4:60], (255, 255, 255))
        assert_colour(frames[:, :, 68:124], (254, 0, 0))
        turned = here / "turned.mp4"                            # to the left: the left is below
        ffmpeg("-display_rotation", 90, "-i", path, "-c", "copy", turned)
        frames, _, video = read(turned)
        assert frames.shape == (16, 128, 128, 3)
        assert video.size == (128, 64)
        assert_colour(frames[:, 68:124], (255, 255, 255))


def test_sizes_may_be_odd():
    with folder() as here:
        path = make(here / "odd.mp4", "testsrc=s=63x47:r=16:d=0.25", "-pix_fmt yuv444p")
        assert frames_of(path).shape == (4, 47, 63, 3)


def test_range_depth_and_transparency_are_read_right():
    full = "scale=out_range=pc,format=yuvj420p"
    hd = "scale=out_color_matrix=bt709,format=yuv420p"
    with folder() as here:
        for path in (
                make(here / "plain.mp4", RED),
                make(here / "ten.mp4", RED, f"-pix_fmt yuv420p10le {HEVC}"),
                make(here / "lossless.mp4", RED, "-c:v libx264rgb -qp 0"),
                make(here / "full.mp4", RED, f"-vf {full} -color_range pc"),
                make(here / "hd.mp4", RED, f"-vf {hd} -colorspace bt709")):
            assert_colour(frames_of(path), (228, 59, 38), 4)
        half = "color=red@0.5:s=64x48:r=16:d=1,format=rgba"
        path = make(here / "half.mov", half, "-c:v qtrle")
        assert_colour(frames_of(path), (255, 127, 127), 2)      # on white


def test_transparency_that_ffmpeg_leaves_out_is_refused_with_the_command_that_keeps_it():
    half = "color=red@0.5:s=64x48:r=16:d=1,format=yuva420p"
    with folder() as here:
        for codec in "libvpx -auto-alt-ref 0", "libvpx-vp9":
            path = make(here / "it's half.webm", half, f"-c:v {codec} -pix_fmt yuva420p")
            assert "is transparent" in follow_cure(path)
            frames = frames_of(path)
            assert len(frames) == 16
            assert_colour(frames, (255, 127, 127))              # on white


# --------------------------------------------------------------------------------------------------
# What is not one whole video.

def test_interlaced_videos_are_refused_with_their_command():
    lines = "tinterlace=interleave_top,format=yuv420p"
    options = f"-vf {lines} -flags +ildct+ilme -x264-params tff=1"
    with folder() as here:
        path = make(here / "lines.mp4", COUNTER, options)
        path = path.rename(here / "-i 12:30 it's.mp4")
        with contextlib.chdir(here):
            assert "is interlaced" in follow_cure(Path(path.name))
        assert len(frames_of(path)) == 24


def join(path, one, two):
    """A file of what is in two, in which the first picture is a cover."""
    cover = ("-disposition:v:0", "attached_pic")
    ffmpeg("-i", one, "-i", two, "-map", 0, "-map", 1, "-c", "copy", *cover, path)
    return path


def test_files_of_several_videos_are_refused_with_their_command():
    with folder() as here:
        even = make(here / "even.mp4", COUNTER)
        two = here / "two.mp4"
        ffmpeg("-i", even, "-f", "lavfi", "-i", RED, "-map", 0, "-map", 1, two)
        assert "holds 2 videos" in follow_cure(two)
        assert len(frames_of(two)) == 48
        picture = make(here / "cover.png", RED, "-frames:v 1")
        path = join(here / "cover.mp4", picture, even)
        assert frames_of(path).shape == (48, 48, 64, 3), "a cover is no video"


def test_what_is_no_whole_video_is_refused_in_ffmpegs_words():
    with folder() as here:
        whole = make(here / "even.mp4", COUNTER, "-movflags +faststart").read_bytes()
        picture = make(here / "a.png", RED, "-frames:v 1").read_bytes()
        broken = bytearray(whole)
        middle = len(whole) // 2
        broken[middle:middle + 200] = bytes(200)
        for name, data, cause in (
                ("cut.mp4", whole[:-600], "cannot be read as a video after"),
                ("headless.mp4", whole[:40], "holds no video, only nothing"),
                ("empty.mp4", b"", "cannot be read as a video"),
                ("text.mp4", b"no video", "cannot be read as a video"),
                ("broken.mp4", broken, "cannot be read as a video after"),
                ("picture.mp4", picture, "is a picture, not a video")):
            path = here / name
            path.write_bytes(data)
            assert_error(UserError, f"{path}: ", read, path)
            assert_error(UserError, cause, read, path)
        none = here / "none.mp4"
        assert_error(UserError, "none.mp4: cannot be read as a video", read, none)
        assert_error(UserError, "Is a directory", read, here)


def test_sound_alone_is_refused_with_a_cover_too():
    with folder() as here:
        sound = make(here / "sound.mp4", "sine=d=1")
        assert_error(UserError, "sound.mp4: holds no video, only Audio", read, sound)
        picture = make(here / "a.png", RED, "-frames:v 1")
        song = join(here / "song.mp4", sound, picture)
        assert_error(UserError, "song.mp4: holds no video, only Audio, a cover", read, song)


def test_frames_of_another_size_are_read_at_the_size_of_the_first():
    with folder() as here:
        small = make(here / "small.h264", "testsrc=s=64x48:r=16:d=1")
        large = make(here / "large.h264", "testsrc=s=96x64:r=16:d=1")
        path = here / "both.h264"
        path.write_bytes(small.read_bytes() + large.read_bytes())
        assert frames_of(path).shape == (32, 48, 64, 3)


def test_names_that_ffmpeg_takes_for_something_else_are_names():
    with folder() as here, contextlib.chdir(here):
        whole = make(here / "even.mp4", COUNTER).read_bytes()
        for name in "12:30.mp4", "%03d.mp4", "-i.mp4", "it's.mp4":
            (here / name).write_bytes(whole)
            assert len(frames_of(name)) == 48, name


# --------------------------------------------------------------------------------------------------
# Writing.

def raw_pixels(path):
    """What a player shows that knows BT.709: (all pixels, 3), integers."""
    raw = path.with_name("raw")
    bt709 = "scale=in_color_matrix=bt709:in_range=tv"
    ffmpeg("-i", path, "-vf", bt709, "-pix_fmt", "rgb24", "-f", "rawvideo", raw)
    return np.frombuffer(raw.read_bytes(), np.uint8).reshape(-1, 3).astype(int)


def test_a_video_is_written_in_bt709_and_says_so():
    colour = (200, 40, 40)
    with folder() as here:
        path = here / "red.mp4"
        for height, width in (256, 256), (720, 1280), (47, 63):
            frame = np.full((height, width, 3), colour, np.uint8)
            with sample.video_file(path, 23.976) as append:
                for _ in range(3):
                    append(frame)
            told = subprocess.run([find_ffmpeg(), "-i", path], capture_output=True, text=True)
            for what in "yuv420p(tv, bt709, progressive)", "SAR 1:1", "23.98 fps":
                assert what in told.stderr, told.stderr
            assert abs(raw_pixels(path) - colour).max() <= 2
            assert_colour(frames_of(path), colour, 2)


def program(path, text):
    """A program of the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# An ffmpeg that was built without the encoder.
WITHOUT_H264 = """
for word in "$@"; do
    shift
    [ "$word" = libx264 ] && word=gone
    set -- "$@" "$word"
done
exec {} "$@"
"""


def test_an_ffmpeg_that_cannot_be_used_is_found_before_anything_is_loaded():
    def refused(cause):
        with unittest.mock.patch.object(sample, "inspect", None):
            code, _, err = sampled(*command("--out", here / "x.mp4"))
        assert code == 2
        assert cause in err, err
        assert err.count("\n") == 1, err

    with folder() as here:
        without = program(here / "without", WITHOUT_H264.format(find_ffmpeg()))
        ill = program(here / "ill", "echo no luck >&2; exit 3")
        silent = program(here / "silent", "exit 1")
        for exe, cause in (
                (here / "none", "No such file"),
                (here, "Permission denied"),
                (without, "Unknown encoder"),
                (ill, "no luck"),
                (silent, "it has ended with code 1")):
            with unittest.mock.patch.dict(os.environ, IMAGEIO_FFMPEG_EXE=str(exe)):
                refused(f"{exe}: cannot be used (")
                refused(cause)
                refused("IMAGEIO_FFMPEG_EXE")
        with unittest.mock.patch.dict(sys.modules, imageio_ffmpeg=None):
            refused("pip install -U imageio[ffmpeg]")
        none = RuntimeError("No ffmpeg exe")
        with unittest.mock.patch("imageio_ffmpeg.get_ffmpeg_exe", side_effect=none):
            refused("(No ffmpeg exe); pip install")
            code, _, err = sampled(*command("--frames", 1, "--steps", 1, "--out", here / "x.png"))
            assert code == 0, "a picture needs none: " + err


@contextlib.contextmanager
def files_of_at_most(size):
    """No file grows beyond so many bytes in here."""
    import resource                         # of POSIX
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_video_that_cannot_be_written_says_what_ffmpeg_says():
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)

    def attempt(path, frames):
        with sample.video_file(path, 16) as append:
            for _ in range(frames):
                append(frame)

    with folder() as here:
        path = here / "x.mp4"
        assert_error(UserError, "does not exist", attempt, here / "none/x.mp4", 3)
        assert_error(UserError, "after 0 frames (No such file", attempt, path, 0)
        path.mkdir()
        assert_error(UserError, "Is a directory", attempt, path, 3)
        with files_of_at_most(2000):
            text = "y.mp4: cannot be written after 9 frames (not all frames can be read back; "
            assert_error(UserError, text, attempt, here / "y.mp4", 9)
            text = "MB are free there)"
            assert_error(UserError, text, attempt, here / "y.mp4", 9999)
        assert list(here.iterdir()) == [path]
