"""Videos and pictures as files: written while they are made, whole at their end, or not there."""

import collections
import contextlib
import itertools
import math
import os
import re
import subprocess

import imageio.v2 as imageio
import imageio_ffmpeg
from PIL import Image

from assets import UserError
from motionstream import write

SHORTEST_SIDE = 256         # pixels of a written video; smaller ones are enlarged


def enlargement(size):
    """How many pixels wide each pixel of a video of `size` (height, width) is written."""
    return math.ceil(SHORTEST_SIDE / min(size))


def enlarge(frame, factor):
    """A frame (H, W, 3), each pixel as a square of `factor` by `factor`."""
    return frame.repeat(factor, 0).repeat(factor, 1)


def count_frames(path):
    """How many frames a video file holds, which are not decoded; 0 if it cannot be read."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-map", "0:v:0", "-c", "copy", "-f", "null", "-"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr
    return int((re.findall(rb"frame= *(\d+)", told) or [0])[-1])


@contextlib.contextmanager
def video_file(path, fps):
    """`with video_file(path, fps) as append`: append(frame), uint8 (H, W, 3), goes to a temporary file beside `path`,
    which takes its place when the block ends and all frames can be read back. If the block ends in an exception,
    nothing is left behind."""
    part, count = path.absolute().with_name(f".{path.stem}.{os.getpid()}{path.suffix}"), 0

    def append(frame):
        nonlocal count
        writer.append_data(frame)
        count += 1

    try:
        writer = imageio.get_writer(part, fps=fps, codec="libx264", quality=7, macro_block_size=2,
                                    ffmpeg_log_level="quiet",
                                    output_params=["-preset", "veryfast", "-movflags", "+faststart"])
        with writer:
            yield append
        if count_frames(part) != count:                 # a failed encoding is silent
            raise OSError(0, "not all frames can be read back")
        os.replace(part, path)
    except BrokenPipeError:                             # of what is printed meanwhile: imageio has a kind of its own
        raise
    except OSError as e:                                # if ffmpeg has gone, its reason has gone with it
        raise UserError(f"{path}: cannot be written after {count} frames ({e.strerror or 'ffmpeg has ended'}); is the "
                        "disk full, or the folder not writable?") from None
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def picture_file(path):
    """As video_file, for the last frame alone: an edited picture."""
    last = collections.deque(maxlen=1)
    yield last.append
    write(path, lambda part: Image.fromarray(last[0]).save(part, "png"))


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
