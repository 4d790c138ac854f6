"""Your own videos as a folder of clips, for train_distill.py --data.

    python -m extras.clips VIDEOS --out clips                               for the tiny model
    python -m extras.clips VIDEOS --out clips --weights DIR --vae FILE --text-encoder DIR

In VIDEOS, its subfolders and linked folders, a clip consists of a.mp4 (at the model's frame rate),
a.npz (its tracks, in any format that extras/tracks.py reads) and a.txt (its prompt, or a row of a
*.csv with columns video and caption). For the stage distill a picture, a.png, can replace the
video. Prompt and picture may be encoded already: a.safetensors, with `prompt` and, for an image
branch, `clip`.

Names match if Windows or macOS treats them as one, e.g. a.mp4 and A.NPZ. Files left out are listed.

Existing files with unchanged sources are kept: an interrupted run resumes. With torchrun each
process makes its part, on its own GPU; --shard 2/8 makes the second of eight parts, for independent
machines. Without --vae the clips hold video, for training the stage vae; the tiny model reads
words.
"""

import argparse
import collections
import contextlib
import csv
import functools
import io
import os
import re
import sys
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from extras.encoders import image_encoder, listing, read_rows, text_encoder
from extras.guard import clip_digests, content_digest, weights_digest
from extras.tracks import decode_text
from extras.video import find_ffmpeg, open_video, remade
from motionstream import PRESETS, Config, UserError, latent_frames, video_frames, write_file
from sample import (Parser, Tracks, embed_words, find_device, fit_image, fit_tracks, inspect,
                    load_image, number, open_vae, read_tracks, reported)
from train_distill import (LATE, PROCESSES, RANK, TINY, default_device, paper_settings,
                           wait_for_all, write_clip)

MOST_TRACKS = 2500                          # of a clip: the paper's grid of 50x50
SEEN = (".mp4", ".png")                     # endings of a clip's frames
ENDINGS = SEEN + (".npz", ".txt", ".safetensors")
OTHER_VIDEOS = (".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif")


@dataclass(frozen=True)
class Job:
    """Inputs and settings of the clips to make."""
    folder: Path
    out: Path
    config: Config                          # of the model to train
    frames: int
    device: str
    dtype: str = "float32"                  # of the VAE's convolutions
    shard: tuple = (1, 1)                   # (number from 1, count)
    vae: Path | None = None                 # None: the clips hold video
    text_encoder: Path | None = None
    image_encoder: Path | None = None


@dataclass(frozen=True)
class Source:
    """The files that may form a clip."""
    stem: Path                              # their path without the ending
    files: dict                             # {ending: file}

    def path(self, ending):
        """The file with that ending; its expected path if there is none."""
        return self.files.get(ending, Path(f"{self.stem}{ending}"))

    def versions(self):
        """Names, sizes and times of the files, to detect changes."""
        told = []
        for ending, file in sorted(self.files.items()):
            about = file.stat()
            told.append((file.name, about.st_size, about.st_mtime_ns))
        return told


def alike(name):
    """A key that is equal for names that some systems treat as one: without case, composed."""
    composed = unicodedata.normalize("NFC", name)
    return unicodedata.normalize("NFC", composed.casefold())


def walk(folder):
    """(The files in a folder and below it, sorted; messages on what was left out, and why.) Links
    are followed; a folder with several links to it, or in a cycle of links, counts once."""
    files = []
    left = []
    hidden = 0
    seen = {}                               # {real path: path by which it was reached}
    places = [folder]
    links = []
    while places or links:
        place = places.pop() if places else links.pop(0)    # real folders before links to them
        real = os.path.realpath(place)
        if real in seen:
            left.append(f"{place}: is a link to {seen[real]}, which counts already")
            continue
        seen[real] = place
        try:
            entries = sorted(place.iterdir())
        except OSError as e:
            left.append(f"{place}: {e.strerror}")
            continue
        for entry in entries:
            if entry.name.startswith("."):  # macOS puts ._a.mp4 beside a.mp4
                hidden += 1
            elif entry.is_dir() and entry.is_symlink():
                links.append(entry)
            elif entry.is_dir():
                places.append(entry)
            elif entry.is_file():
                files.append(entry)
            else:
                left.append(f"{entry}: is no file, or a link to none")
    if hidden:
        left.append(f"{folder}: {hidden} hidden files or folders, whose names begin with a dot")
    return sorted(files), left


def find_sources(folder):
    """({name, a path in the folder without its ending: Source}; messages on files that are left
    out, and why)."""
    files, left = walk(folder)
    files.sort(key=lambda file: file.suffix != file.suffix.lower())         # a.mp4 before a.MP4
    stems = collections.defaultdict(dict)
    others = collections.Counter()
    for file in files:
        ending = file.suffix.lower()
        if ending not in ENDINGS:
            others[ending] += 1
            continue
        stem = str(file.relative_to(folder).with_suffix(""))
        if ending in stems[stem]:
            left.append(f"{file}: there is {stems[stem][ending].name}, too")
        stems[stem].setdefault(ending, file)
    tables = sum(table.parent == folder for table in files if table.suffix.lower() == ".csv")
    others[".csv"] -= tables                # read_captions reads them
    for ending, count in sorted((+others).items()):
        cure = "; make .mp4 of them" if ending in OTHER_VIDEOS else ""
        left.append(f"{folder}: {count} files that end in {ending or 'nothing'}, which are no part "
                    f"of clips{cure}")
    return join_alike(stems, folder, left), left


def join_alike(stems, folder, left):
    """Turn stems, {name: {ending: file}}, into sources. Stems with equivalent names are joined if
    their endings do not overlap. Stems without video, picture or tracks are added to `left`."""
    def is_seen(name):
        return any(ending in stems[name] for ending in SEEN)

    groups = collections.defaultdict(list)
    for name in stems:
        groups[alike(name)].append(name)
    sources = {}
    for group in groups.values():
        group.sort(key=is_seen, reverse=True)           # the video's first
        joined = {}
        for name in group:
            joined |= stems[name]
        if len(joined) == sum(len(stems[name]) for name in group):
            stems[group[0]] = joined
            group = group[:1]
        for name in group:
            if {*SEEN, ".npz"} & stems[name].keys():
                sources[name] = Source(folder / name, stems[name])
            else:
                files = ", ".join(file.name for file in stems[name].values())
                left.append(f"{folder / name}: {files} without a video or a picture")
    return dict(sorted(sources.items()))


def read_captions(folder, sources):
    """({name of a source: prompt} from the csv files in a folder; one message per file). UserError
    if one cannot be read."""
    name_of = {}
    for name in sources:
        name_of.setdefault(alike(name), name)
    captions = {}
    said = []
    for table in sorted(folder.iterdir()):
        if table.suffix.lower() != ".csv" or table.name.startswith("."):
            continue
        found = []
        strangers = []
        incomplete = 0
        for video, caption in read_table(table):
            if not (video and caption):
                incomplete += 1
                continue
            name = clip_name(video, folder)
            if name not in sources:
                name = name_of.get(alike(name))
            if name is None:
                strangers.append(video)
            else:
                found.append(name)
                captions[name] = caption
        rows = len(found) + len(strangers) + incomplete
        said.append(f"{table}: {len(found)} of {rows} rows are of clips here")
        if strangers:
            said[-1] += f", not {strangers[0]!r}"
        if incomplete:
            said[-1] += f"; {incomplete} have no video or no caption"
        again = len(found) - len(set(found))
        if again:
            said[-1] += f"; {again} name a clip again, of which the last counts"
        own = sum(".txt" in sources[name].files for name in set(found))
        if own:
            said[-1] += f"; {own} of the clips have a .txt, which counts instead"
    return captions, said


def read_table(table):
    """The rows of a csv file, each (video, caption), "" for what a row lacks. UserError if it has
    no such columns."""
    try:
        rows = csv.DictReader(io.StringIO(decode_text(table.read_bytes()), newline=""), strict=True)
        names = {str(name).strip().lower(): name for name in rows.fieldnames or ()}
        if not {"video", "caption"} <= names.keys():
            raise UserError(f"has no columns video and caption, only: {', '.join(names)}"[:200])
        read = []
        for row in rows:
            video = row[names["video"]] or ""
            read.append((video.strip(), row[names["caption"]] or ""))
        return read
    except (UserError, OSError, csv.Error) as e:
        raise UserError(f"{table}: {getattr(e, 'strerror', None) or e}") from None


def clip_name(video, folder):
    """The stem meant by a csv file's video: a path in the folder, with slashes or backslashes."""
    path = Path(video.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    if path.suffix.lower() in SEEN:
        path = path.with_suffix("")
    return str(path)


def read_images(job, source):
    """(The frames of a clip as PIL images: job.frames of a video, or one picture; the size,
    (width, height), that its tracks refer to). ValueError, one line, if the video has another frame
    rate or is too short."""
    if ".mp4" not in source.files:
        image = load_image(source.path(".png"))
        return [image], image.size
    path = source.path(".mp4")
    rate = job.config.fps
    video = open_video(path, job.frames)
    fps = video.fps or rate
    cure = f"make its tracks again after {remade(path, f'-vf fps={rate}', keep='')}"
    if abs(fps - rate) > rate / 100:
        raise ValueError(f"frames at {fps:g} a second, {rate} are wanted; {cure}")
    images = [Image.fromarray(frame) for frame in video.frames]
    if len(images) < job.frames:
        raise ValueError(f"{len(images)} frames at {fps:g} a second, {job.frames} at {rate} are "
                         "wanted")
    late = [time - n / rate for n, time in enumerate(video.times()[:job.frames])]
    uneven = max(late, default=0) - min(late, default=0)
    if uneven > 1.01 / rate:                            # tracks and models assume even spacing
        raise ValueError(f"frames are up to {uneven:.2g} s away from {rate} a second; {cure}")
    return images, video.size


def read_motion(job, path, stored, size):
    """Read tracks (T', N, 2) and visibility (T', N) from a file and map them from frames as
    `stored`, with pixels that need not be square, to frames of `size` (width, height) and then to
    the model's video. At most MOST_TRACKS tracks, in full length. ValueError if they are shorter
    than the clip."""
    with contextlib.redirect_stdout(None):              # without notes on doubtful files
        found = read_tracks(path, stored)
    length = len(found.tracks)
    if length < job.frames:
        raise ValueError(f"tracks of {length} frames, {job.frames} are wanted")
    some = np.random.default_rng(0).permutation(found.tracks.shape[1])[:MOST_TRACKS]
    some.sort()
    square = np.float32(size) / np.float32(stored)
    some_tracks = Tracks(found.tracks[:, some] * square, found.visible[:, some])
    motion = fit_tracks(some_tracks, size, length, job.config, 0)
    return motion.tracks[0, :length], motion.visible[0, :length]


def read_conditions(job, source, caption):
    """A clip's conditions besides its frames: {"prompt": a text} or, encoded in its .safetensors,
    {"text": (L, text_dim)} and, for an image branch, {"clip": (257, clip_dim)}. Raises an exception
    for any fault."""
    wan = job.config.is_wan
    if wan and ".safetensors" in source.files:
        rows = read_rows(source.path(".safetensors"), job.config)
        found = {"text": rows["prompt"]}
        if job.config.clip_dim and "clip" in rows:      # else the frame is encoded
            found["clip"] = rows["clip"]
        return found
    if wan and not job.text_encoder:
        raise ValueError("its prompt has to be encoded, give --text-encoder DIR")
    own = source.path(".txt")
    if caption and ".txt" not in source.files:
        return {"prompt": caption}
    try:
        return {"prompt": decode_text(own.read_bytes())}
    except UserError as e:
        raise UserError(f"{own}: {e}") from None


def read_clip(job, source, caption):
    """Read a clip: video (3, T, H, W) uint8, tracks, visible, group, and the result of
    read_conditions. Raises an exception for any fault."""
    conditions = read_conditions(job, source, caption)  # first: a missing caption costs no decoding
    images, stored = read_images(job, source)
    tracks, visible = read_motion(job, source.path(".npz"), stored, images[0].size)
    video = torch.stack([fit_image(image, job.config.size)[0] for image in images], 1)
    clip = {
        "video": ((video + 1) * 127.5).round().byte(),
        "tracks": tracks,
        "visible": visible,
        "group": torch.full((tracks.shape[1],), -1),            # objects are unknown
    }
    return clip | conditions


class Encoders:
    """The networks of a job, each loaded on first use."""

    def __init__(self, job):
        self.job = job

    @functools.cached_property
    def vae(self):
        return open_vae(self.job.config, self.job.out, self.job.vae).to(self.job.device)

    @functools.cached_property
    def text(self):
        return text_encoder(self.job.text_encoder, self.job.device)

    @functools.cached_property
    def image(self):
        return image_encoder(self.job.image_encoder, self.job.device)


def without_padding(text):
    """Rows (L, text_dim) without trailing zeros: models pad again, and a text padded to 512 rows is
    4 MB of a clip's 9."""
    used = text.any(1).nonzero()
    length = 0
    if len(used):
        length = int(used[-1]) + 1
    return text[:length]


@torch.no_grad()
def encode_clip(job, encoders, clip):
    """Encode a clip from read_clip into the tensors of its file, as train_distill.py has them."""
    config = job.config
    video = clip["video"]
    seen = video[None].to(job.device) / 127.5 - 1
    if "prompt" in clip:
        prompt = clip.pop("prompt")
        if config.is_wan:
            clip["text"] = encoders.text(prompt)
        else:
            clip["text"] = embed_words(prompt, config)[0]
    clip["text"] = without_padding(clip["text"])
    if config.clip_dim and "clip" not in clip:
        clip["clip"] = encoders.image(seen[:, :, 0])
    if job.vae:
        clip.pop("video")
        kind = torch.device(job.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=job.dtype == "bfloat16"):
            clip["latents"] = encoders.vae.encode(seen)[0].half()
        if config.copies:
            clip["first"] = video[:, 0]
    return {name: value.contiguous().cpu() for name, value in clip.items()}


def made_from(path):
    """The `source` key in a file's metadata; None if the file is missing or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata().get("source")
    except Exception:                                   # missing, or damaged in many ways
        return None


def part_of(names, shard):
    """This process's part of the names, given the shard (number, from 1, and count)."""
    number, count = shard
    return names[(number - 1) * PROCESSES + RANK::count * PROCESSES]


def make_clips(job):
    """Make the files of a job, or keep those made before; returns them. Faulty clips are named and
    left out; UserError if they are more than a tenth."""
    sources, left = find_sources(job.folder)
    captions, said = read_captions(job.folder, sources)
    for line in [f"left out: {line}" for line in left] + said:
        if RANK == 0:
            print(line)
    if any(".mp4" in source.files for source in sources.values()):
        find_ffmpeg()                       # else every single video would be left out
    encoders = Encoders(job)
    checksum = content_digest(job.vae) if job.vae else ""
    config = job.config
    settings = [checksum, job.dtype, job.frames, config.size, config.text_dim, config.clip_dim,
                listing(job.text_encoder), listing(job.image_encoder)]
    names = part_of(list(sources), job.shard)
    files = []
    for name in tqdm(names, "make clips", disable=RANK > 0):
        path = job.out / f"{name}.safetensors"
        source = sources[name]
        key = repr([settings, source.versions(), captions.get(name)])
        made_of = f"{zlib.crc32(key.encode()):08x}"
        if made_from(path) != made_of:
            try:
                clip = read_clip(job, source, captions.get(name))
            except Exception as e:                      # of many kinds
                reason = (str(e).strip() or repr(e)).splitlines()[0]
                print(f"left out: {source.stem}: {reason}")
                continue
            clip = encode_clip(job, encoders, clip)
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {"format": "motionstream clip", "source": made_of, "vae": str(checksum)}
            write_file(path, lambda part: save_file(clip, part, about))
        files.append(path)
    if not names or len(files) < 0.9 * len(names):
        raise UserError(f"{job.folder}: {len(files)} of {len(names)} clips can be used here; a "
                        "clip is a.mp4 or a.png, a.npz and a.txt; what is made stays, run it again")
    return files


# --------------------------------------------------------------------------------------------------
# Clips that hold video are encoded when a training needs their latents.

@torch.no_grad()
def encode_video(vae, video):
    """uint8 (3, T, H, W) to float16 latents (C, F, h, w)."""
    device = next(vae.parameters()).device
    video = video[None].to(device) / 127.5 - 1
    return vae.encode(video)[0].half().cpu()


def encode_videos(run, files):
    """{file: its encoded copy} of clips of a training's --data that hold video, made now or in an
    earlier run, divided among the processes. The copies' names hold digests of their sources.
    run: train_distill.Run."""
    folder = run.out / f"latents.{weights_digest(run.path('vae')):08x}"
    digests = clip_digests(run)
    encoded = {}
    for file in files:
        name = file.relative_to(run.data)
        digest = digests[name.as_posix()]
        encoded[file] = folder / name.with_suffix(f".{digest:08x}.safetensors")
    missing = [file for file in files if not encoded[file].exists()]
    vae = run.load_vae()
    for file in tqdm(missing[RANK::PROCESSES], "encode clips", disable=not missing):
        clip = load_file(file)
        video = clip.pop("video")
        length = video_frames(latent_frames(video.shape[1]))
        clip["first"] = video[:, 0]
        clip["latents"] = encode_video(vae, video[:, :length])
        write_clip(encoded[file], clip)
    wait_for_all(LATE)
    return encoded


# --------------------------------------------------------------------------------------------------
# The command.

def shard(text):
    """A flag's type: "2/8" to (2, 8)."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2/8, from 1/8 to 8/8")
    return int(found[1]), int(found[2])


def parse_job(argv):
    """Parse the command line into a Job. UserError, one line, if invalid."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="VIDEOS")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the clips")
    add("--weights", type=Path, help="what is to be trained (none: the tiny model)")
    add("--vae", type=Path, help="to encode by; its latents are the model's")
    add("--frames", type=number(int, 1, 10 ** 6),
        help="of a clip, 1 + 4 k (45; Wan's: 81; 5B: 121)")
    add("--text-encoder", type=Path, help="a -Diffusers repository with Wan's, for the prompts")
    add("--image-encoder", type=Path, help="the same of CLIP; default: that of --text-encoder")
    add("--device", help="cpu, cuda:0, … (a GPU for each process, if there are)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the VAE's convolutions (bfloat16 on a GPU)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N",
        help="make only the I-th of N parts of the clips")
    flags = parser.parse_args(argv)
    config = inspect(flags.weights).config if flags.weights else PRESETS["tiny"]
    wan = config.is_wan
    frames = flags.frames or clip_frames(config)
    device = find_device(flags.device or default_device())
    dtype = flags.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    for wrong, cure in [
        (not flags.folder.is_dir(), f"{flags.folder}: no such folder"),
        (flags.out.resolve().is_relative_to(flags.folder.resolve()),
         f"--out {flags.out}: is in {flags.folder}, which is read; choose another"),
        (flags.out.exists() and not flags.out.is_dir(),
         f"--out {flags.out}: is a file; name a folder"),
        (flags.vae and not flags.vae.is_file(), f"--vae {flags.vae}: no such file"),
        (wan and not flags.vae, f"{flags.weights}: give --vae FILE, whose latents it reads"),
        (not wan and flags.text_encoder, "the tiny model reads words; drop --text-encoder"),
        (frames % 4 != 1, f"--frames {frames}: a clip has 1 + 4 k"),
    ]:
        if wrong:
            raise UserError(cure)
    image_encoder_folder = flags.image_encoder or flags.text_encoder
    return Job(flags.folder, flags.out, config, frames, str(device), dtype, flags.shard, flags.vae,
               flags.text_encoder, image_encoder_folder)


def clip_frames(config):
    """Frames of a training clip, see Settings."""
    if config.text_encoder == "words":
        return TINY.clip_frames
    return paper_settings(config, has_head=False).clip_frames


def run(argv):
    """Run the program."""
    job = parse_job(argv)
    files = make_clips(job)
    print(f"{job.out}: {len(files)} clips")


def main(argv=None):
    """`run`, with errors as one line. Returns the exit code."""
    return reported(run, argv)


if __name__ == "__main__":
    sys.exit(main())
