"""Videos as they are stored: every frame once, upright, in square pixels, transparency over white.

    video = open_video(path)
    for frame in video.frames:              # uint8 (H, W, 3)
        ...
    video.times()                           # when each frame is shown, in seconds

Videos are written in BT.709 and read back (checked_writer). What cannot be read without a choice
(HDR, wide gamut, interlaced, several videos in a file) is refused, with the command that makes it
right.
"""

import contextlib
import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np

from motionstream import UserError, reason_of

# Tags of colours that are read as they are. Others are wrong unless they are mapped to the gamut of
# BT.709, and in HDR brightness too.
SMALL = ("bt709", "bt470m", "bt470bg", "smpte170m", "smpte240m")    # standards of about one gamut
UNTAGGED = ("unknown", "reserved")
USUAL = {
    "color_space": UNTAGGED + SMALL + ("gbr", "fcc", "ycgco"),
    "color_primaries": UNTAGGED + SMALL,
    "color_trc": UNTAGGED + SMALL + ("iec61966-2-1", "iec61966-2-4", "bt1361e", "bt2020-10",
                                     "bt2020-12"),
}
BRIGHT = ("smpte2084", "arib-std-b67")      # the transfer functions of HDR, PQ and HLG


# --------------------------------------------------------------------------------------------------
# Reading.

class Log:
    """What a running ffmpeg says."""

    def __init__(self):
        self.lines = []
        self.begun = threading.Event()      # the first frame has been described, or none will be

    def follow(self, pipe):
        """Read all of it, in a thread of its own: a full pipe would stop ffmpeg."""
        for line in pipe:
            self.lines.append(line.decode(errors="replace"))
            if " color_trc:" in self.lines[-1]:             # the last line of a frame
                self.begun.set()
        self.begun.set()

    def text(self):
        return "".join(self.lines)


@dataclass
class Video:
    """A video that is being read. Its frames, with square pixels, may be larger than `size`."""
    path: Path
    fps: float | None               # mean, as the file says
    size: tuple                     # (width, height) as stored, upright
    frames: Iterator                # uint8 (H, W, 3), one by one
    log: Log

    def times(self):
        """When the frames that have been read are shown, in seconds, where the file says it."""
        found = re.findall(r"\[Parsed_showinfo.* pts_time: *([-+.\de]+)", self.log.text())
        return [float(time) for time in found]


def open_video(path, most=None):
    """A Video of at most so many frames. UserError, one line, if there is none, or none that can be
    read as it is; also while it is read, if it is damaged."""
    path = Path(path)
    log = Log()
    frames = decode(path, most, log)
    first = next(frames, None)
    told = log.text()
    refuse(path, told)
    if first is None:
        raise UserError(f"{path}: holds no frames")
    fps = re.search(r"^\[info\]   Stream #.*: Video: .*, ([\d.]+)(k?) fps", told, re.M)
    if fps:
        fps = float(fps[1]) * {"": 1, "k": 1000}[fps[2]]
    size = re.search(r"\[Parsed_showinfo.* s:(\d+)x(\d+) ", told)
    return Video(path, fps, (int(size[1]), int(size[2])), itertools.chain([first], frames), log)


def decode(path, most, log):
    """The frames of a video, uint8 (H, W, 3), one by one."""
    # V: no cover; passthrough: no frame twice or dropped, as it would be for an even rate
    command = [find_ffmpeg(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info"]
    command += ["-xerror", "-i", f"file:{path}", "-map", "0:V:0", "-fps_mode", "passthrough"]
    square = "scale='round(iw*max(1,sar))':'round(ih/min(1,sar))'"
    command += ["-vf", f"showinfo=checksum=0,{square},format=rgba"]
    if most:
        command += ["-frames:v", str(most)]
    command += ["-c:v", "pam", "-f", "image2pipe", "-"]
    pipe = subprocess.PIPE
    count = 0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        thread = threading.Thread(target=log.follow, args=(process.stderr,), daemon=True)
        thread.start()
        try:
            for frame in read_frames(process.stdout):
                log.begun.wait()
                count += 1
                yield frame
        except BaseException:               # no more are wanted, for one
            process.kill()
            raise
        finally:
            thread.join()
    told = log.text()
    refuse(path, told)                      # which may know better why, and what begins later
    code = process.returncode
    failed = code or "[error] " in told     # code is 0 if the file has been cut off
    if failed and count != most:
        reason = ffmpeg_words(told, code)
        raise UserError(f"{path}: cannot be read as a video after {count} frames ({reason})")


def ffmpeg_words(log, code):
    """The error of an ffmpeg that exited with `code`, in one line: the first one in its log (with
    level+ in -loglevel)."""
    lines = log.splitlines()
    errors = [line for line in lines if "[error] " in line or "[fatal] " in line]
    said = (errors or lines[-1:] or [f"it has ended with code {code}"])[0]
    return re.sub(r"^(\[[^]]*\] )+", "", said)[:300]


def read_frames(pipe):
    """The pictures of a stream of .pam files, RGBA, over white: uint8 (H, W, 3), one by one."""
    while True:
        header = {}
        while "ENDHDR" not in header:
            line = pipe.readline()
            if not line:
                return
            name, _, value = line.decode().strip().partition(" ")
            header[name] = value
        height = int(header["HEIGHT"])
        width = int(header["WIDTH"])
        data = pipe.read(height * width * 4)
        if len(data) < height * width * 4:
            return
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, 4)
        colours = pixels[..., :3]
        alpha = pixels[..., 3:]
        if alpha.min() < 255:
            white = 255 * (255 - alpha.astype(np.uint16))
            colours = (colours.astype(np.uint16) * alpha + white + 127) // 255
        yield colours.astype(np.uint8)


def refuse(path, told):
    """Raise UserError if a video is not to be read as it is. told: ffmpeg's log."""
    given = told.partition("[info] Output #0")[0]           # what comes before is of the input
    kinds = re.findall(r"^\[info\]   Stream #0:\S+ (\w+): (.*)", given, re.M)
    videos = [about for kind, about in kinds if kind == "Video" and "(attached pic)" not in about]
    form = re.search(r"^\[info\] Input #0, (\S+), from", given, re.M)
    if form and form[1].endswith(("_pipe", "image2")):
        raise UserError(f"{path}: is a picture, not a video")
    if form and not videos:
        others = ", ".join(kind.replace("Video", "a cover") for kind, _ in kinds)
        raise UserError(f"{path}: holds no video, only {others or 'nothing'}")
    if len(videos) > 1:
        cure = remade(path, "-map 0:V:0 -c copy")
        raise UserError(f"{path}: holds {len(videos)} videos; for the first: {cure}")
    if re.search(r"alpha_mode +: 1", given):
        refuse_alpha(path, re.match(r"\w+", videos[0])[0])
    if re.search("DOVI configuration record: .*compatibility id: 0", given):
        mapped = "libplacebo=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        cure = remade(path, f"-vf {mapped},format=yuv420p")
        raise UserError(f"{path}: is HDR (Dolby Vision alone); with Vulkan: {cure}")
    if re.search(r"\[Parsed_showinfo.* i:[TB] ", told):
        raise UserError(f"{path}: is interlaced; {remade(path, '-vf bwdif=mode=send_frame')}")
    described = re.findall(r"\[Parsed_showinfo.* (color_space:.* color_trc:\S+)", told)
    for line in dict.fromkeys(described):               # as a rule all are the same
        colour = dict(word.split(":") for word in line.split())
        odd = [value for name, value in colour.items() if value not in USUAL[name]]
        if not odd:
            continue
        what = "has a wide gamut"
        if colour["color_trc"] in BRIGHT:
            what = "is HDR"
        elif odd == [colour["color_trc"]]:
            what = "has another transfer function"
        cure = remade(path, f"-vf {to_bt709(colour)}")
        raise UserError(f"{path}: {what} ({', '.join(odd)}); {cure}")


def refuse_alpha(path, codec):
    """UserError for a transparent VP8 or VP9: ffmpeg's own decoders leave the transparency out."""
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(codec)
    if decoder is None:
        return
    white = "[a]format=rgb24,drawbox=c=white:t=fill[w]"
    over = f"format=rgba,split[a][b];{white};[w][b]overlay=format=rgb,format=yuv420p"
    cure = remade(path, f'-vf "{over}" -metadata:s:v alpha_mode=', read=f"-c:v {decoder} ")
    raise UserError(f"{path}: is transparent, which ffmpeg does not read by itself; over white: "
                    f"{cure}")


def to_bt709(colour):
    """The ffmpeg filter that maps colours to BT.709. colour: what is tagged, {name: value} as in
    USUAL. White is 203 nits, as ITU-R BT.2408 has it; what is brighter is rolled off."""
    primaries = colour["color_primaries"]
    matrix = colour["color_space"]
    transfer = colour["color_trc"]
    if primaries in UNTAGGED:
        wide = transfer in BRIGHT or matrix not in USUAL["color_space"]
        primaries = "bt2020" if wide else "bt709"
    if matrix in UNTAGGED:
        matrix = "bt2020nc" if primaries == "bt2020" else "bt709"
    if transfer in UNTAGGED:
        transfer = "bt709"
    tagged = f"setparams=color_primaries={primaries}:color_trc={transfer}:colorspace={matrix}"
    if transfer not in BRIGHT:
        return f"{tagged},zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"
    return (f"{tagged},zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,"
            "tonemap=mobius:param=0.8:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv420p")


def remade(path, options, keep="-fps_mode passthrough ", read=""):
    """The command line that makes another video of one, with the same frames unless `keep` is left
    out, in its place; the first stays beside it. read: how ffmpeg reads the first."""
    path = Path(os.path.abspath(path))      # -i.mp4 or 12:30.mp4 would mislead ffmpeg
    places = [str(path), f"{path}.old", str(path.with_stem(f"{path.stem}.new"))]
    if os.name == "nt":
        move = "move"
        given, old, new = [subprocess.list2cmdline([place]) for place in places]
    else:
        move = "mv"
        given, old, new = [shlex.quote(place) for place in places]
    made = f"ffmpeg {read}-i {given} {options} {keep}{new}"
    return f"{made} && {move} {given} {old} && {move} {new} {given}"


# --------------------------------------------------------------------------------------------------
# ffmpeg, and writing.

# How ffmpeg encodes: converted to BT.709 and tagged; of untagged video, players guess the matrix.
ENCODED = [
    "-vf", "scale=2*ceil(iw/2):2*ceil(ih/2):out_color_matrix=bt709:out_range=tv,setsar=1,"
    "format=yuv420p,setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
    "-color_range", "tv", "-colorspace", "bt709",
    "-color_primaries", "bt709", "-color_trc", "bt709",
    "-preset", "veryfast", "-crf", "15", "-movflags", "+faststart"]


def find_ffmpeg():
    """Path of an ffmpeg that encodes here. UserError, with ffmpeg's own message, if none does."""
    exe = "ffmpeg"
    try:
        import imageio_ffmpeg
        exe = imageio_ffmpeg.get_ffmpeg_exe()
        try_ffmpeg(exe)
    except (ImportError, RuntimeError, OSError) as e:
        raise UserError(f"{exe}: cannot be used ({reason_of(e)}); pip install -U imageio[ffmpeg], "
                        "or name another in IMAGEIO_FFMPEG_EXE") from None
    return exe


@functools.cache
def try_ffmpeg(exe):
    """Encode one frame to the null muxer. RuntimeError with ffmpeg's message if that fails."""
    command = [exe, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "16x16", "-i", "-"]
    command += ["-c:v", "libx264"] + ENCODED + ["-f", "null", "-"]
    done = subprocess.run(command, input=bytes(16 * 16 * 3), capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        raise RuntimeError(said.strip() or f"it has ended with code {done.returncode}")


def count_frames(path):
    """Number of frames in a video file, without decoding them; 0 if it cannot be read."""
    command = [find_ffmpeg(), "-i", f"file:{path}", "-map", "0:v:0", "-c", "copy"]
    command += ["-f", "null", "-"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr
    counts = re.findall(rb"frame= *(\d+)", told) or [0]
    return int(counts[-1])


@contextlib.contextmanager
def checked_writer(part, path, fps):
    """`with checked_writer(…) as append`: append(frame), uint8 (H, W, 3), writes to a temporary
    file `part`, which replaces `path` if all frames can be read back when the block ends.
    UserError, naming `path`, if it cannot be written."""
    count = 0

    def append(frame):
        nonlocal count
        try:
            writer.append_data(frame)
        except OSError:
            raise OSError("ffmpeg has stopped") from None
        count += 1

    try:
        # imageio's own `with` would leave ffmpeg running after an error
        with contextlib.closing(imageio.get_writer(part, "FFMPEG", fps=fps, codec="libx264",
                pixelformat="yuv420p", macro_block_size=1, output_params=list(ENCODED))) as writer:
            yield append
        if count_frames(part) != count:
            raise OSError("not all frames can be read back")
        os.replace(part, path)
    except BrokenPipeError:                 # from printing meanwhile
        raise
    except OSError as e:
        reason = reason_of(e)
        if part.parent.is_dir():            # ffmpeg's own words are lost
            free = shutil.disk_usage(part.parent).free
            reason += f"; {free / 1e6:.0f} MB are free there"
        raise UserError(f"{path}: cannot be written after {count} frames ({reason})") from None
