"""Your own clips, encoded for a training: videos, their tracks and their prompts, see --data of train_distill.py."""

import collections
import contextlib
import csv
import functools
import itertools
import zlib
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from extras.encoders import image_encoder, listing, padded, read_rows, text_encoder
from motionstream import UserError, naming, write
from sample import Tracks, embed_words, fit_image, fit_tracks, load_image, read_tracks

TRACKS = 2500                            # of a clip, at most: the paper's grid of 50x50


def seed_of(*what):
    """A number from anything printable, the same in every process."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def keep(path, tensors):
    """A dict of tensors as a file, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, save_file, {name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def encode_clips(run, pictures, rank=0, processes=1, wait=lambda: None):
    """The clips of --data as files, as of film_clips, encoded now or in an earlier run, a part by each of the processes,
    which wait for each other. What is missing or broken is named and left out, up to a tenth of all. pictures: clips of
    a single frame will do."""
    data, about, captions, files = run.args.data, collections.defaultdict(list), {}, {}
    for table in data.glob("*.csv"):
        with naming(table, "no csv in UTF-8 with columns video and caption"), open(table, encoding="utf-8-sig") as file:
            captions |= {str(Path(row["video"]).with_suffix("")): row["caption"] for row in csv.DictReader(file)}
    for name, *rest in listing(data):
        about[str(Path(name).with_suffix(""))].append((Path(name).suffix, *rest))
    stems = [stem for stem, found in about.items() if {kind for kind, *_ in found} & {".mp4", ".png", ".npz"}]
    settings = [run.checksum("vae"), run.recipe.clip, run.longest, listing(run.args.text_encoder),
                listing(run.args.image_encoder), run.config.size, run.config.text_dim, run.config.clip_dim]
    for stem in stems:
        if pictures or (data / f"{stem}.mp4").exists():
            key = seed_of(*settings, about[stem], captions.get(stem))
            files[stem] = run.out.parent / "clips" / f"{stem}.{key:08x}.safetensors"
        elif rank == 0:
            print(f"left out: {data / stem}: has no video")
    todo = [stem for stem in [*files][rank::processes] if not files[stem].exists()]
    encode = clip_encoder(run) if todo else None
    for stem in tqdm(todo, "encode clips", disable=not todo):
        try:
            clip = read_clip(run, data / stem, captions.get(stem))
        except Exception as e:                          # of a dozen kinds
            print(f"left out: {data / stem}: {(str(e).strip() or repr(e)).splitlines()[0]}")
            continue
        keep(files[stem], encode(clip))
    wait()                                            # those of the others are there
    there = [file for file in files.values() if file.exists()]
    if not stems or len(there) < 0.9 * len(stems):
        raise UserError(f"{data}: {len(there)} of {len(stems)} clips can be used here; a clip is a.mp4"
                        f"{' or a.png' if pictures else ''}, a.npz and a.txt")
    return there


def clip_encoder(run):
    """A function from what read_clip returns to what is kept of it: latents (1, C, F, h, w) float16, text (1, text_len,
    text_dim) and, for an image branch, clip (1, 257, clip_dim). Each encoder is loaded when first needed, and once."""
    c, args, vae = run.config, run.args, run.vae()
    text_rows, image_rows = functools.cache(text_encoder), functools.cache(image_encoder)

    @torch.no_grad()
    def encode(clip):
        video, prompt = clip.pop("video").to(run.device) / 127.5 - 1, clip.pop("prompt", None)
        if prompt is not None:
            words = c.text_encoder == "words"
            rows = embed_words(prompt, c)[0] if words else text_rows(args.text_encoder, run.device)(prompt)
            clip["text"] = F.pad(rows, (0, 0, 0, c.text_len - len(rows)))[None]
        if c.clip_dim and "clip" not in clip:
            clip["clip"] = image_rows(args.image_encoder, run.device)(video[:, :, 0])[None]
        return clip | {"latents": vae.encode(video).half()}
    return encode


def read_clip(run, stem, caption):
    """One clip of --data: its frames as the model sees them, "video" (1, 3, T, H, W) uint8, tracks as long as the
    longest rollout, hidden ones up to TRACKS, and the prompt, or "text" and "clip" if they are encoded already. Raises
    whatever is wrong with it."""
    c, least = run.config, run.longest
    video, picture, points, prompt, own = (Path(f"{stem}.{kind}") for kind in "mp4 png npz txt safetensors".split())
    if video.exists():
        with imageio.get_reader(video) as reader:
            fps = reader.get_meta_data()["fps"]
            images = [Image.fromarray(frame) for frame in itertools.islice(reader, run.recipe.clip)]
        if fps != c.fps or len(images) < run.recipe.clip:
            raise ValueError(f"{len(images)} frames at {fps:g} a second, {run.recipe.clip} at {c.fps} are wanted")
    else:
        images = [load_image(picture)]
    with contextlib.redirect_stdout(None):              # points outside are no news
        given = read_tracks(points, images[0].size)
        tracks, visible = given.tracks, given.visible
        if len(tracks) < least:
            raise ValueError(f"tracks of {len(tracks)} frames, {least} are wanted")
        some = np.sort(np.random.default_rng(0).permutation(tracks.shape[1])[:TRACKS])
        kept = Tracks(tracks[:least, some], visible[:least, some])
        motion, _ = fit_tracks(kept, images[0].size, least, c, 0)
    frames, hidden = torch.stack([fit_image(image, c.size) for image in images], 2), TRACKS - len(some)
    clip = {"video": ((frames + 1) * 127.5).round().byte(), "tracks": F.pad(motion.tracks, (0, 0, 0, hidden)),
            "visible": F.pad(motion.visible, (0, hidden))}
    if own.exists() and c.text_encoder == "umt5":
        text, _, seen = padded(read_rows(own, c), c, run.device)
        return clip | {"text": text} | ({"clip": seen} if seen is not None else {})     # else clip_encoder sees the image
    if c.text_encoder == "umt5" and not run.args.text_encoder:
        raise ValueError("its prompt has to be encoded, give --text-encoder DIR")
    return clip | {"prompt": caption if caption and not prompt.exists() else prompt.read_text(encoding="utf-8")}
