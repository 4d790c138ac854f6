"""Your own videos as a folder of clips, for train_distill.py --data.

    python -m extras.clips VIDEOS --out clips
    python -m extras.clips VIDEOS --out clips --weights DIR --vae FILE --text-encoder DIR     for Wan's

In VIDEOS, or folders in it, a clip is a.mp4, at the model's frame rate, a.npz, its tracks, in any format
that extras/tracks.py reads, and a.txt, its prompt; or a row of a *.csv with columns video and caption. A
picture, a.png, in place of the video is enough for the stage distill. Prompts and pictures may be encoded
already: a.safetensors, with `prompt` and, for an image branch, `clip`.

A file that is there, made from the same, is not made again. With torchrun, each process makes its part.
Without --vae the clips hold video, on which the stage vae can be trained; the tiny model reads words.
"""

import argparse
import collections
import contextlib
import csv
import functools
import itertools
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from extras.encoders import image_encoder, listing, read_rows, text_encoder
from motionstream import PRESETS, Config, UserError, naming, write
from sample import (Parser, Tracks, Weights, embed_words, fit_image, fit_tracks, inspect, load_image,
                    number, open_vae, read_tracks, reported)

MOST_TRACKS = 2500                          # of a clip: the paper's grid of 50x50
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Job:
    """What clips are made of, and what they are for."""
    folder: Path
    out: Path
    config: Config                          # of the model that is to be trained on them
    frames: int
    device: str
    vae: Path | None = None                 # None: the clips hold video
    text_encoder: Path | None = None
    image_encoder: Path | None = None


def find_sources(folder):
    """{stem, a path in the folder without its ending: [(ending, size, age)]} of what may be clips."""
    sources = collections.defaultdict(list)
    for name, size, age in listing(folder):
        path = Path(name)
        sources[str(path.with_suffix(""))].append((path.suffix, size, age))
    kinds = {".mp4", ".png", ".npz"}
    return {stem: files for stem, files in sources.items()
            if kinds.intersection(ending for ending, _, _ in files)}


def read_captions(folder):
    """{stem: prompt} of the csv files in a folder. UserError if one cannot be read."""
    captions = {}
    for table in folder.glob("*.csv"):
        with naming(table, "no csv in UTF-8 with columns video and caption"):
            with open(table, encoding="utf-8-sig") as file:
                for row in csv.DictReader(file):
                    captions[str(Path(row["video"]).with_suffix(""))] = row["caption"]
    return captions


def read_images(job, stem):
    """The frames of a clip as PIL images, job.frames of a video, or one picture. ValueError, one line,
    if the video is at another frame rate or too short."""
    video = Path(f"{stem}.mp4")
    if not video.exists():
        return [load_image(f"{stem}.png")]
    with imageio.get_reader(video) as reader:
        fps = reader.get_meta_data()["fps"]
        images = [Image.fromarray(frame) for frame in itertools.islice(reader, job.frames)]
    if fps != job.config.fps or len(images) < job.frames:
        raise ValueError(f"{len(images)} frames at {fps:g} a second, {job.frames} at "
                         f"{job.config.fps} are wanted")
    return images


def read_motion(job, stem, size):
    """A clip's tracks (T', N, 2) and visibility (T', N) on its frames of `size` (width, height), as
    the model sees them; at most MOST_TRACKS, and as long as they are. ValueError if they are shorter
    than the clip."""
    with contextlib.redirect_stdout(None):              # doubts are no news
        found = read_tracks(Path(f"{stem}.npz"), size)
    length = len(found.tracks)
    if length < job.frames:
        raise ValueError(f"tracks of {length} frames, {job.frames} are wanted")
    some = np.random.default_rng(0).permutation(found.tracks.shape[1])[:MOST_TRACKS]
    some.sort()
    some_tracks = Tracks(found.tracks[:, some], found.visible[:, some])
    motion, _ = fit_tracks(some_tracks, size, length, job.config, 0)
    return motion.tracks[0, :length], motion.visible[0, :length]


def read_conditions(job, stem, caption):
    """What a clip says beside its frames: {"prompt": a text}, or encoded, as its .safetensors has it,
    {"text": (L, text_dim)} and, for an image branch, {"clip": (257, clip_dim)}. Raises what is wrong
    with it."""
    wan = job.config.text_encoder == "umt5"
    given = Path(f"{stem}.safetensors")
    if wan and given.exists():
        rows = read_rows(given, job.config)
        found = {"text": rows["prompt"]}
        if job.config.clip_dim and "clip" in rows:      # else the encoder sees the frame
            found["clip"] = rows["clip"]
        return found
    if wan and not job.text_encoder:
        raise ValueError("its prompt has to be encoded, give --text-encoder DIR")
    own = Path(f"{stem}.txt")
    if caption and not own.exists():
        return {"prompt": caption}
    return {"prompt": own.read_text(encoding="utf-8")}


def read_clip(job, stem, caption):
    """A clip as it is found: video (3, T, H, W) uint8, tracks, visible, group, and what
    read_conditions returns. Raises whatever is wrong with it."""
    images = read_images(job, stem)
    tracks, visible = read_motion(job, stem, images[0].size)
    video = torch.stack([fit_image(image, job.config.size)[0] for image in images], 1)
    clip = {
        "video": ((video + 1) * 127.5).round().byte(),
        "tracks": tracks,
        "visible": visible,
        "group": torch.full((tracks.shape[1],), -1),            # what they are on is not known
    }
    return clip | read_conditions(job, stem, caption)


class Encoders:
    """The networks that a job needs, each loaded when it is first asked for."""

    def __init__(self, job):
        self.job = job

    @functools.cached_property
    def vae(self):
        model = Weights(self.job.out, self.job.config, own=True, has_head=True)
        return open_vae(model, self.job.vae).to(self.job.device)

    @functools.cached_property
    def text(self):
        return text_encoder(self.job.text_encoder, self.job.device)

    @functools.cached_property
    def image(self):
        return image_encoder(self.job.image_encoder, self.job.device)


@torch.no_grad()
def encode_clip(job, encoders, clip):
    """A clip as read_clip returns it to what is kept of it, see the top of train_distill.py."""
    config = job.config
    video = clip["video"]
    seen = video[None].to(job.device) / 127.5 - 1
    if "prompt" in clip:
        prompt = clip.pop("prompt")
        if config.text_encoder == "umt5":
            clip["text"] = encoders.text(prompt)
        else:
            clip["text"] = embed_words(prompt, config)[0]
    if config.clip_dim and "clip" not in clip:
        clip["clip"] = encoders.image(seen[:, :, 0])
    if job.vae:
        clip.pop("video")
        clip["latents"] = encoders.vae.encode(seen)[0].half()
        clip["first"] = video[:, 0]
    return {name: value.contiguous().cpu() for name, value in clip.items()}


def made_from(path):
    """What a file says that it was made from; None if there is none, or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata().get("source")
    except Exception:                                   # not there, or of a dozen kinds
        return None


def make_clips(job):
    """The files of a job, made now or before. What is broken is named and left out, up to a tenth of
    all: UserError if it is more."""
    captions = read_captions(job.folder)
    sources = find_sources(job.folder)
    encoders = Encoders(job)
    checksum = zlib.crc32(job.vae.read_bytes()) if job.vae else ""
    config = job.config
    settings = [checksum, job.frames, config.size, config.text_dim, config.clip_dim,
                listing(job.text_encoder), listing(job.image_encoder)]
    stems = [*sources][RANK::PROCESSES]
    files = []
    for stem in tqdm(stems, "make clips", disable=RANK > 0):
        path = job.out / f"{stem}.safetensors"
        key = repr([settings, sources[stem], captions.get(stem)])
        source = f"{zlib.crc32(key.encode()):08x}"
        if made_from(path) != source:
            try:
                clip = read_clip(job, job.folder / stem, captions.get(stem))
            except Exception as e:                      # of a dozen kinds
                reason = (str(e).strip() or repr(e)).splitlines()[0]
                print(f"left out: {job.folder / stem}: {reason}")
                continue
            clip = encode_clip(job, encoders, clip)
            path.parent.mkdir(parents=True, exist_ok=True)
            about = {"format": "motionstream clip", "source": source, "vae": str(checksum)}
            write(path, lambda part: save_file(clip, part, about))
        files.append(path)
    if not stems or len(files) < 0.9 * len(stems):
        raise UserError(f"{job.folder}: {len(files)} of {len(stems)} clips can be used here; a clip is "
                        "a.mp4 or a.png, a.npz and a.txt")
    return files


def parse_job(argv):
    """The command line to a Job. UserError, one line, for what cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="VIDEOS")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the clips")
    add("--weights", type=Path, help="what is to be trained (none: the tiny model)")
    add("--vae", type=Path, help="to encode by; its latents are the model's")
    add("--frames", type=number(int, 1, 10 ** 6), help="of a clip, 1 + 4 k (45; Wan's: 81)")
    add("--text-encoder", type=Path, help="a -Diffusers repository with Wan's, for the prompts")
    add("--image-encoder", type=Path, help="the same of CLIP; default: that of --text-encoder")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args(argv)
    config = inspect(flags.weights).config if flags.weights else PRESETS["tiny"]
    wan = config.text_encoder == "umt5"
    frames = flags.frames or (81 if wan else 45)
    for wrong, cure in [
        (not flags.folder.is_dir(), f"{flags.folder}: no such folder"),
        (flags.out.resolve().is_relative_to(flags.folder.resolve()),
         f"--out {flags.out}: is in {flags.folder}, which is read; choose another"),
        (flags.vae and not flags.vae.is_file(), f"--vae {flags.vae}: no such file"),
        (wan and not flags.vae, f"{flags.weights}: give --vae FILE, whose latents it reads"),
        (not wan and flags.text_encoder, "the tiny model reads words; drop --text-encoder"),
        (frames % 4 != 1, f"--frames {frames}: a clip has 1 + 4 k"),
    ]:
        if wrong:
            raise UserError(cure)
    image_encoder_folder = flags.image_encoder or flags.text_encoder
    return Job(flags.folder, flags.out, config, frames, flags.device, flags.vae, flags.text_encoder,
               image_encoder_folder)


def run(argv):
    """The program."""
    job = parse_job(argv)
    files = make_clips(job)
    print(f"{job.out}: {len(files)} clips")


def main(argv=None):
    """`run`, with its errors as one line. Returns the exit code."""
    return reported(run, argv)


if __name__ == "__main__":
    sys.exit(main())
