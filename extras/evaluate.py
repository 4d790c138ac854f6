"""Measure: the README's numbers, curves and previews of a training, rewards, one video by another.

    python -m extras.evaluate --clips 12
        the tables, of the models in runs/tiny or else of the shipped ones
    python -m extras.evaluate --photographs DIR
        and how photographs survive: a piece of one moves over another
    python -m extras.evaluate curves runs/tiny
        the curves of each stage once more
    python -m extras.evaluate compare out.mp4 real.mp4
    python -m extras.evaluate papers FOLDER --protocol davis --out DIR --weights FILE --vae FILE
            --text-encoder DIR --tracker FILE.py:FUNCTION
        the papers' numbers, on DAVIS, Sora's clips or LLFF: see extras/protocols.py

Scenes are drawn from seeds that training never uses. These are the claims of the README, not of the
code.
"""

import argparse
import functools
import itertools
import json
import math
import runpy
import sys
import time
import zlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import sample
from extras import measures, world
from extras.cases import NEUTRAL, Case, new_clips
from extras.guard import read_log
from extras.measures import lpips_network, psnr, ssim
from extras.video import open_video
from motionstream import (FRAMES, PRESETS, Config, MotionStream, UserError, moved_picture,
                          naming, start_points, track_ids, write_file)
from sample import ASSETS, Parser, embed_words, number
from vae import load_vae

CLIP = 45                       # frames of a clip, as in training
REACH = 30                      # percent of the width: no object is looked for farther away

MODELS = ("vae", "teacher", "causal", "student")       # in the order of the stages
NO_NETWORK = ["still", "warp"]  # videos made of frame 0 alone
SHIPPED = {"vae": "tiny_vae", "teacher": "tiny_teacher", "student": "tiny"}


# --------------------------------------------------------------------------------------------------
# The models, and the videos they make.

@dataclass(frozen=True)
class Trained:
    """The finished models of a training: NAME.safetensors in a folder, loaded on request."""
    folder: Path
    device: str = "cpu"
    seed: int = 0               # of all noise
    files: dict = field(default_factory=dict)       # {name: path} of models that lie elsewhere
    network: type = MotionStream        # or a subclass: what DiTs are

    def path(self, name):
        """The file of one of MODELS, or of "decoder"."""
        return Path(self.files.get(name, self.folder / f"{name}.safetensors"))

    def checksum(self, name):
        """Checksum of the file of a model."""
        return zlib.crc32(self.path(name).read_bytes())

    def vae(self, name="vae"):
        """The VAE; "decoder": one with a decoder of its own."""
        return load_vae(self.path(name)).to(self.device)

    def model(self, name, **overrides):
        """A DiT in float32, frozen. overrides: fields of Config."""
        path = self.path(name)
        load = self.network.from_pretrained
        return load(path, dtype=torch.float32, device=self.device, **overrides)

    @functools.cached_property
    def config(self):
        """Config of the model of the latest finished stage."""
        for name in reversed(MODELS):
            if name != "vae" and self.path(name).exists():
                return self.model(name).config
        return PRESETS["tiny"]

    def names(self):
        """Those of MODELS that exist. UserError if one cannot be opened."""
        found = [name for name in MODELS if self.path(name).exists()]
        for name in found:
            if name == "vae":
                self.vae()
            else:
                self.model(name)
        return found


def play(trained, name, clips, text=None, later=None, **overrides):
    """Generate the video (B, 3, T, H, W), in pieces, from the first frames of `clips`, their tracks
    and a text (1 or B, L, text_dim). name: "teacher", "causal", "student"; "vae" and "decoder": the
    truth through the VAE; "still": frame 0; "warp": frame 0 moved along the tracks. later: the text
    of the second half of a stream. overrides: fields of Config."""
    if name == "still":
        image = clips.frames(0, 1)
        return iter([image.expand(-1, -1, clips.length, -1, -1)])
    if name == "warp":
        image = clips.frames(0, 1)[:, :, 0]
        return warped(trained.vae(), image, clips.tracks, clips.visible)
    if name in ("vae", "decoder"):
        vae = trained.vae(name)
        latents = vae.encode(clips.frames().to(trained.device))
        return iter([vae.decode(latents)[0].cpu()])
    model = trained.model(name, **overrides)
    return videos_of(model, trained.vae(), clips, text, later, trained.seed)


@torch.inference_mode()
def warped(vae, image, tracks, visible):
    """Generate frames (B, 3, 1, H, W): those that copy_along_tracks shows to a copying model,
    before the VAE. image (B, 3, H, W): frame 0; tracks (B, T, N, 2), visible (B, T, N)."""
    yield image[:, :, None]
    image = image.to(vae.latent_std.device)
    tracks = tracks.to(image.device)
    visible = visible.to(image.device)
    start = start_points(tracks, visible)                       # (B, N, 2)
    embedding = vae.segmenter(image)
    for t in range(1, tracks.shape[1]):
        now = slice(t, t + 1)
        video, _ = moved_picture(embedding, image, tracks[:, now], visible[:, now], start)
        yield video.cpu()


def videos_of(model, vae, clips, text=None, later=None, seed=0):
    """As `play`, with a model that is loaded."""
    image = clips.frames(0, 1)[:, :, 0]                         # (B, 3, H, W)
    ids = track_ids(clips.tracks, model.config)
    start = start_points(clips.tracks, clips.visible)
    motion = sample.Motion(clips.tracks, clips.visible, ids, start)
    device = next(model.parameters()).device
    if text is not None:
        text = text.expand(len(image), -1, -1).to(device)
    if later is not None:
        later = later.expand(len(image), -1, -1)
        motion = with_texts(motion, text, later, model.config)
    sampler = sample.stream if model.config.causal else sample.sample_teacher
    for video in sampler(model, vae, image, motion, sample.Encoded(text), seed):
        yield video.cpu()


def with_texts(motion, text, later, config):
    """A Motion chunk by chunk, each with its text: `later` from the first in the second half on."""
    half = motion.tracks.shape[1] / 2
    start = FRAMES - 1                                          # as the VAE packs frame 0
    for part in sample.motion_by_chunk(motion, config):
        yield replace(part, text=later if start >= half else text)
        start += part.tracks.shape[1]


# --------------------------------------------------------------------------------------------------
# The measures.

@dataclass(frozen=True)
class Places:
    """Object positions in a piece of video, (B, T, K, 2) in pixels, and other values per object,
    (B, T, K)."""
    found: torch.Tensor
    true: torch.Tensor          # where they should be
    lost: torch.Tensor          # hardly any of it is found
    seen: torch.Tensor          # at least half of its largest size is visible in the truth
    colour: float = math.nan    # amount of the first object's colour, relative to the truth


def half_seen(size, least, present):
    """True where an object is present, its size (B, T, K) over `least` and half of its maximum."""
    largest = size.amax(1, keepdim=True)
    return present[:, None] & (size > 0.5 * largest) & (size > least)


def places_by_colour(video, truth, clips):
    """Places by objects' hues. An object is lost if less than a quarter of its colour is found."""
    mass, found = measures.colour_mass(video, clips.scene["colour"])
    true_mass, true = measures.colour_mass(truth, clips.scene["colour"])
    lost = mass < 0.25 * true_mass
    seen = half_seen(true_mass, 1, clips.present)
    colour = mass[..., 0].sum() / true_mass[..., 0].sum()
    return Places(found, true, lost, seen, colour.item())


def places_by_shift(video, truth, ground, outlines, clips):
    """Places by texture: each object is at the whole-pixel shift at which the truth inside its
    outline is most like the video. It is lost if even there three quarters of its contrast to the
    ground are missing."""
    used = int(clips.present.sum(1).max())                      # slots without an object come last
    outlines = outlines[:, :used]                               # (B, K, T, H, W)
    B, K, T, H, W = outlines.shape
    reach = REACH * clips.size // 100

    def each(v):                                        # (B, 3, T, H, W) to (B K T, 3, H, W)
        frames = v.transpose(1, 2)[:, None]
        return frames.expand(-1, K, -1, -1, -1, -1).flatten(0, 2)

    def by_frame(x):                                    # (B K T, …) to (B, T, K, …)
        return x.unflatten(0, (B, K, T)).transpose(1, 2)

    mask = outlines.flatten(0, 2)
    area = mask.sum((1, 2))
    shift, error = measures.best_shift(each(video), each(truth), mask, reach)
    apart = (each(ground) - each(truth)).square().mean(1) * mask
    apart = apart.sum((1, 2)) / area.clamp(min=1)
    lost = by_frame(error > 0.75 * apart)
    seen = half_seen(by_frame(area), 20, clips.present[:, :used])
    true = by_frame(measures.centroid(mask.float()))
    return Places(true + by_frame(shift), true, lost, seen)


def overlaps(video, truth, ground, outlines, clips):
    """{"disc", "shape"}: mean overlap of discs and of other objects with their outlines, wherever
    they were found, while they are visible; NaN without any."""
    of_discs = []
    of_others = []
    area = outlines.sum((3, 4)).transpose(1, 2)                 # (B, T, K)
    seen = half_seen(area, 20, clips.present)
    for k in range(int(clips.present.sum(1).max())):
        mask = outlines[:, k]                                   # (B, T, H, W)
        pixels = measures.object_pixels(video, truth, ground, mask)
        overlap = measures.best_overlap(pixels.flatten(0, 1), mask.flatten(0, 1))
        overlap = overlap.view(seen.shape[:2])
        disc = clips.discs[:, k, None]
        of_discs.append(overlap[seen[:, :, k] & disc])
        of_others.append(overlap[seen[:, :, k] & ~disc])
    return {"disc": torch.cat(of_discs).mean(), "shape": torch.cat(of_others).mean()}


def following(places, size):
    """{"median", "mean", "lost", "motion"}, see measure."""
    seen = places.seen
    error = (places.found - places.true).norm(dim=-1) * 100 / size
    error = error.masked_fill(places.lost, REACH).clamp(max=REACH)[seen]
    there = seen & ~places.lost
    there = there[:, 1:] & ~places.lost[:, :-1]
    moved = places.found.diff(dim=1).norm(dim=-1)[there].sum()
    true_moved = places.true.diff(dim=1).norm(dim=-1)[there].sum()
    lost = 100 * places.lost[seen].float().mean()
    motion = moved / true_moved
    return {"median": error.median(), "mean": error.mean(), "lost": lost, "motion": motion}


def measure(video, first, clips, start):
    """A piece of video, from frame `start` on, beside the true one, as numbers. first: frame 0.

    median, mean, lost: end-point errors in percent of the width, one per object and frame in which
    at least half of it can be seen; no error is over 30, that of an object that is lost (percent of
    those) is 30. psnr, objects, ground: in dB, of all and of pixels inside and outside of objects.
    ssim: of every 4th frame. As shares of the truth's: sharp, the strength of edges; colour, that
    of the first object's hue; chroma, how colourful objects are; motion, how far they go. edges:
    the correlation of edges, 1 at best. disc, shape: overlap with the true outline, of objects of
    one colour. copying: the share of what only frame 0 has."""
    stop = start + video.shape[2]
    truth = clips.frames(start, stop)
    ground = clips.ground(start, stop)
    outlines = clips.outlines(start, stop)
    inside = outlines.any(1)
    if clips.by_colour:
        places = places_by_colour(video, truth, clips)
    else:
        places = places_by_shift(video, truth, ground, outlines, clips)
    gone = first - truth
    numbers = following(places, clips.size) | {
        "psnr": psnr(video, truth),
        "objects": psnr(video, truth, inside),
        "ground": psnr(video, truth, ~inside),
        "ssim": measures.video_ssim(video, truth),
        "sharp": measures.sharpness(video, truth),
        "edges": measures.edge_correlation(video, truth),
        "colour": places.colour,
        "chroma": measures.colourfulness(video, truth, inside),
        "copying": ((video - truth) * gone).sum() / gone.square().sum(),
    }
    if clips.plain:
        numbers |= overlaps(video, truth, ground, outlines, clips)
    # Tensors that are kept would scatter the heap.
    return {name: float(number) for name, number in numbers.items()}


def settings_of(what, settings):
    """Remove from the settings those that are fields of a dataclass, and return them."""
    found = {}
    for one in fields(what):
        if one.name in settings:
            found[one.name] = settings.pop(one.name)
    return found


def case_of(settings):
    """The Case for settings (fields of Case and of world.Options), which are removed from them."""
    options = settings_of(world.Options, settings)
    return Case(options=options, **settings_of(Case, settings))


def eval_row(trained, model="student", text=NEUTRAL, later=None, piece=None, after=0, **settings):
    """Play a case and measure it, `piece` frames at a time (None: all at once), from frame `after`
    on. settings: fields of Case, of world.Options, of Config. Of each number the mean, and that of
    each tenth; drift: the standard deviation of PSNR over the pieces. later: the text of the second
    half, if it is another. text "caption": the scenes' own."""
    clips = new_clips(case_of(settings))
    overrides = settings_of(Config, settings)
    if settings:
        raise TypeError(f"no such settings: {settings}")
    text = text_of(text, clips, trained.config)
    later = embed_words(later, trained.config)
    piece = piece or clips.length - after
    first = clips.frames(0, 1)
    held = first[:, :, :0]
    start = 0
    rows = []
    clock = time.perf_counter()
    for video in play(trained, model, clips, text, later, **overrides):
        seconds = time.perf_counter() - clock                   # of the latest chunk
        held = torch.cat([held, video], 2)
        if start < after:
            skipped = min(after - start, held.shape[2])
            held = held[:, :, skipped:]
            start += skipped
        while start >= after and held.shape[2] >= piece and start + piece <= clips.length:
            numbers = measure(held[:, :, :piece], first, clips, start)
            rows.append({"from": float(start), **numbers, "seconds": seconds})
            held = held[:, :, piece:]
            start += piece
        clock = time.perf_counter()
    return summary(rows)


def text_of(text, clips, config):
    """A text for the model; "caption": each scene's own."""
    if text != "caption":
        return embed_words(text, config)
    captions = clips.scene["caption"]
    return torch.cat([embed_words(caption, config) for caption in captions])


def summary(rows):
    """Average rows of numbers, each with "from" first: each number's mean, "drift" and "tenths"."""
    names = list(rows[0])
    numbers = torch.tensor([list(row.values()) for row in rows])
    mean = dict(zip(names, numbers.nanmean(0).tolist()))
    psnrs = numbers[:, names.index("psnr")]
    mean["drift"] = psnrs.std(correction=0).item()
    mean["tenths"] = []
    for part in numbers.split(math.ceil(len(rows) / 10)):
        tenth = dict(zip(names, part.nanmean(0).tolist()))
        mean["tenths"].append(tenth | {"from": part[0, 0].item()})
    return mean


def caption_row(trained, model, attributes, points="drag", **settings):
    """PSNR gain, in dB, of the right caption over the opposite one: of all pixels, and of objects.
    attributes: indices into world.LIGHT and MOTION, of which one is not 0."""
    light, motion = attributes
    right = world.caption(light, motion)
    wrong = world.caption(-light % 3, -motion % 3)              # 1 for 2
    case = settings | {"model": model, "attributes": attributes, "points": points}
    rows = [eval_row(trained, text=text, **case) for text in (right, wrong)]
    numbers = {}
    for name in ("psnr", "objects"):
        numbers[name] = rows[0][name]
        numbers[f"{name} gained"] = rows[0][name] - rows[1][name]
    return numbers


# --------------------------------------------------------------------------------------------------
# The tables.

# What training never showed, by the options of extras.world: the world of the first tiny models,
# the one of today without and with texture, and discs and squares of one colour on smooth grey.
SETS = {
    "old world": {"seed": "held old", "style": "simple", "objects": 2},
    "plain": {"seed": "held plain", "style": "textured", "texture": (0, 0), "objects": 2},
    "textured": {"seed": "held textured", "style": "textured", "texture": (0, 1), "objects": 2},
    "flat": {"seed": "held flat", "style": "textured", "flat": True, "objects": 1},
}
AT = {                          # the last 12 frames, at 16 a second
    "2 s": {"frames": CLIP, "after": CLIP - 12},
    "10 s": {"frames": 165, "after": 153},
}


def grid(**values):
    """All combinations of the values, as dicts."""
    rows = itertools.product(*values.values())
    return [dict(zip(values, row)) for row in rows]


def tables(count, frames, photographs=None):
    """The tables to be measured: {title: (settings common to all rows, [settings of each row])},
    arguments of eval_row or of another function, "measure". count: clips of each kind; frames: of
    the streams."""
    clip = {"seed": "eval 1 False", "clips": count, "frames": CLIP, "objects": 1}
    picture = {"clips": count, "drawn": AT["10 s"]["frames"]}
    text = clip | {"objects": 2, "piece": CLIP // 3}
    caption = clip | {"measure": caption_row}
    stream = clip | {"clips": 2, "frames": frames, "piece": 12}
    still = {"seed": "stream False", "camera": False, "points": "drag"}
    moving = {"seed": "stream True", "camera": True, "points": "dense"}
    streams = [camera | {"sink": sink} for camera in (still, moving) for sink in (1, 0)]
    return {
        "following": (clip, following_rows()),
        "pictures": (picture, picture_rows(photographs)),
        "text": (text, text_rows()),
        "captions": (caption, caption_rows()),
        "streams": (stream, streams),
    }


def following_rows():
    """Rows for kinds of scenes by models by conditions."""
    kinds = [
        {"objects": 1},
        {"objects": 3, "seed": "eval 3 False"},
        {"objects": 1, "change": "other way"},
        {"flat": True, "frames": 81, "seed": "eval 1 True"},
        {"camera": True, "seed": "eval camera"},
    ]
    models = grid(model=("vae", "still"), points=("none",))
    models += grid(model=("warp",), points=("dense", "drag"))
    models += grid(model=("teacher", "causal", "student"), points=("dense", "drag", "none"))
    rows = []
    for kind in kinds:
        for model in models:
            if model["model"] != "teacher" or "flat" not in kind:
                rows.append(kind | model)
    return rows


def picture_rows(photographs):
    """SETS, and photographs if there are any, by models, 2 and 10 seconds after the image. A
    teacher makes no more than its clip."""
    sets = dict(SETS)
    if photographs:
        sets["photographs"] = {"seed": "held photographs", "photographs": photographs}
    rows = []
    for name, what in sets.items():
        for model in ("vae", "still", "warp", "teacher", "student"):
            given = ("none",) if model in ("vae", "still") else ("dense", "drag")
            for points, at in itertools.product(given, AT):
                if (model, at) != ("teacher", "10 s"):
                    row = {"set": name, "model": model, "points": points, "at": at}
                    rows.append(row | what | AT[at])
    return rows


# Light and motion: indices into world.LIGHT and MOTION.
CHANGING = ((1, 0), (2, 0), (0, 1), (0, 2))


def text_rows():
    """Scenes whose light or shapes change, by the right, the wrong, the neutral text and none."""
    rows = []
    for light, motion in CHANGING:
        right = world.caption(light, motion)
        wrong = world.caption(-light % 3, -motion % 3)
        for text in (right, wrong, NEUTRAL, None):
            scenes = {"seed": f"text {light} {motion}", "attributes": (light, motion)}
            rows.append(scenes | {"text": text})
    return rows


def caption_rows():
    """The same scenes in both styles, by a centre track alone."""
    rows = []
    styles = ("simple", "textured")
    models = ("teacher", "student")
    for row in grid(style=styles, attributes=CHANGING, model=models):
        rows.append({"seed": f"caption {row['attributes']}"} | row)
    return rows


# Of a row, where "set" says it.
HIDDEN = ("seed", "measure", "clips", "drawn", "after", "frames", "photographs")


def label_of(row):
    """Label of a row."""
    words = []
    for key, value in row.items():
        if "set" in row and (key in HIDDEN or key in SETS.get(row["set"], ())):
            continue
        if key not in ("seed", "measure"):
            words.append(f"{key} {getattr(value, '__name__', value)}")
    return ", ".join(words)


@torch.no_grad()
def measure_tables(trained, stage, what, tables):
    """Measure tables and print them, draw the streams. `stage`.json keeps every row when it is
    done, {what: {title: {row: numbers}}}, and what it has is not measured again. what: says which
    weights and how much of them."""
    names = trained.names() + NO_NETWORK
    path = trained.folder / f"{stage}.json"
    everything = {}
    if path.exists():
        with naming(path, "damaged; remove it, and all is measured again"):
            everything = dict(json.loads(path.read_text()))
    done = everything.setdefault(what, {})
    for title, (common, rows) in tables.items():
        results = done.setdefault(title, {})
        for row in tqdm(rows, title):
            label = label_of(row)
            case = {"measure": eval_row} | common | row
            if label in results or case.get("model", "student") not in names:
                continue
            for key in ("set", "at"):
                case.pop(key, None)
            results[label] = case.pop("measure")(trained, **case)
            text = json.dumps(everything, indent=1)
            write_file(path, lambda temporary: temporary.write_text(text))
        print_table(title, results)
    curves = {}
    for label, row in done["streams"].items():
        curves[label] = [(tenth["from"], tenth["mean"]) for tenth in row["tenths"]]
    if curves:
        title = "end-point error, % of the width, over frames"
        plot(trained.folder / f"{stage}.png", curves, title)


def print_table(title, results):
    """Print {row: {name: number}} as a Markdown table."""
    if not results:
        return
    names = []
    for row in results.values():
        names += [name for name in row if name not in ("from", "tenths", *names)]
    print(f"\n| {title} | {' | '.join(names)} |\n{'|---' * len(names)}|---|")
    for label, row in results.items():
        cells = [f"{row[name]:.2f}" if name in row else "" for name in names]
        print(f"| {label} | {' | '.join(cells)} |")


# --------------------------------------------------------------------------------------------------
# Curves and previews of a training.

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def plot(path, curves, title, width=640, height=320):
    """Plot lines {name: [(x, y)]} to a PNG, labelled with their ranges."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    points = np.array([point for curve in curves.values() for point in curve])
    x0, y0 = points.min(0)
    x1, y1 = points.max(0)
    draw.rectangle((50, 30, width - 10, height - 30), outline="grey")
    draw.text((50, 8), title, "black")
    draw.text((4, 30), f"{y1:.3g}", "black")
    draw.text((4, height - 42), f"{y0:.3g}", "black")
    draw.text((50, height - 24), f"{x0:.0f}", "black")
    draw.text((width - 50, height - 24), f"{x1:.0f}", "black")
    right = (width - 60) / (x1 - x0 or 1)
    up = (height - 60) / (y1 - y0 or 1)
    for i, (name, curve) in enumerate(curves.items()):
        line = [(50 + right * (x - x0), height - 30 - up * (y - y0)) for x, y in curve]
        draw.line(line, COLOURS[i % len(COLOURS)], width=2)
        draw.text((width - 150, 34 + 14 * i), name, COLOURS[i % len(COLOURS)])
    write_file(path, lambda temporary: page.save(temporary, "png"))


# What is drawn of a stage, by the ending of the picture's name.
PLOTTED = {
    "": ("loss", "loss_c", "loss_g", "loss_d", "reward", "std", "std_least", "std_most", "moves",
         "x0_none", "x0_tracks", "x0_swapped"),
    "_pixels": ("pan_error",),
}


def curve_of(rows, name):
    """A number of a stage's rows as [[step, value]], means over 2 % of the stage; [] for none."""
    values = [(row["step"], row[name]) for row in rows if name in row]
    if not values:
        return []
    points = torch.tensor(values, dtype=torch.float32)
    means = F.adaptive_avg_pool1d(points.T, min(50, len(values)))
    return means.T.tolist()


def plot_stage(folder, stage):
    """Plot a stage's curves from the stats.jsonl in a training's folder."""
    rows = {}
    for row in read_log(folder / "stats.jsonl"):
        if row["stage"] == stage:
            rows[row["step"]] = row                             # after a crash, logged again
    for ending, names in PLOTTED.items():
        curves = {}
        for name in names:
            curve = curve_of(rows.values(), name)
            if curve:
                curves[name] = curve
        if curves:
            plot(folder / f"{stage}{ending}.png", curves, f"{stage}: {len(rows)} updates")


@torch.no_grad()
def preview(trained, stage, drawn=True):
    """Plot the curves of a finished stage and, if it was trained on the drawn world, six frames of
    a dragged scene in rows: truth, truth through the VAE, each existing model; then another
    scene."""
    plot_stage(trained.folder, stage)
    if not drawn:
        return
    options = {"objects": 2, "attributes": (None, None)}
    clips = new_clips(Case("preview", 2, CLIP, options=options))
    text = text_of("caption", clips, trained.config)
    videos = [clips.frames()]
    for name in (*MODELS, "decoder"):
        if trained.path(name).exists():
            pieces = list(play(trained, name, clips, text))
            videos.append(torch.cat(pieces, 2))
    shown = torch.linspace(0, CLIP - 1, 6).long()
    frames = torch.stack(videos, 1)[:, :, :, shown]             # (2, rows, 3, 6, H, W)
    page = frames.permute(2, 0, 1, 4, 3, 5).flatten(4).flatten(1, 3)        # (3, 2 rows H, 6 W)
    page = Image.fromarray(sample.to_frames(page[None, :, None])[0])
    write_file(trained.folder / f"{stage}_preview.png", lambda path: page.save(path, "png"))


# --------------------------------------------------------------------------------------------------
# Rewards of distillation.

def motion_reward(video, batch):
    """How well the video (B, 3, T, H, W) follows the tracks in `batch`: (B,) in [-1, 1]. Along a
    track the colour should stay that of its start. 1: it does everywhere; 0: no better than a still
    video."""
    B, _, T, H, W = video.shape
    seen = batch["visible"] & batch["visible"][:, :1]           # (B, T, N)
    size = torch.tensor([W, H]).to(video)
    places = (2 * batch["tracks"] / size - 1).flatten(0, 1)[:, :, None]     # (B T, N, 1, 2)

    def error(frames):
        pictures = frames.transpose(1, 2).flatten(0, 1)
        colours = F.grid_sample(pictures, places, align_corners=False)
        colours = colours.view(B, T, 3, -1)
        apart = (colours - colours[:, :1]).abs().mean(2)        # (B, T, N)
        count = seen.sum((1, 2)).clamp(min=1)
        return (apart * seen).sum((1, 2)) / count

    still = error(video[:, :, :1].expand_as(video))
    gain = still - error(video)
    return (gain / (still + 0.1)).clamp(-1, 1)


def find_reward(name):
    """Resolve --reward: "motion", or your own function, FILE.py:FUNCTION, called like
    motion_reward. UserError if it is neither."""
    file, _, function = name.rpartition(":")
    try:
        if not file:
            return {"motion": motion_reward}[name]
        return runpy.run_path(file)[function]
    except Exception as e:                              # whatever the file does
        raise UserError(f"--reward {name}: neither motion nor FILE.py:FUNCTION "
                        f"({type(e).__name__}: {e})") from None


# --------------------------------------------------------------------------------------------------
# Two videos.

def compare(made, real, net=None):
    """The mean PSNR, SSIM and, with `net` ("alex" or "vgg"), LPIPS of the frames of two videos,
    paths, as long as there are both: ({name: number}, how many frames). The second is scaled and
    cropped as the first one's image was."""
    video = open_video(made)
    other_video = open_video(real)
    if video.fps and other_video.fps and abs(video.fps - other_video.fps) > 0.1:
        print(f"note: {made} is at {video.fps:g} frames/s, {real} at {other_video.fps:g}; they "
              "are not resampled")
    distance = lpips_network(net) if net else None
    rows = []
    for frame, other in zip(video.frames, other_video.frames):
        height, width = frame.shape[:2]
        if min(height, width) < 11:
            raise UserError(f"{made}: is {width}x{height}; SSIM needs 11 pixels a side")
        truth = sample.fit_image(Image.fromarray(other), (height, width))
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None] / 127.5 - 1
        row = {"PSNR": psnr(pixels, truth), "SSIM": ssim(pixels, truth).item()}
        if distance:
            row["LPIPS"] = distance(pixels, truth).item()
        rows.append(row)
    means = {}
    for name in rows[0]:
        means[name] = np.mean([row[name] for row in rows])
    return means, len(rows)


def end_point_error(given, found, size, image_size):
    """(mean distance, number of points) between points that a tracker found in a video of `size`
    (width, height) and the points requested, in pixels of the video. Both are files; the latter is
    in pixels of the image of image_size (width, height). Only points visible in both count."""
    seen = sample.read_tracks(found, size)
    told = sample.read_tracks(given, image_size)
    if seen.tracks.shape[1] != told.tracks.shape[1]:
        raise UserError(f"{found}: holds {seen.tracks.shape[1]} tracks, {told.tracks.shape[1]} "
                        "were given")
    scale, left, top = sample.crop(*image_size, size[::-1])
    places = (told.tracks - np.float32((left, top))) * np.float32(scale)
    inside = ((places >= 0) & (places < size)).all(-1)
    count = min(len(places), len(seen.tracks))
    both = (told.visible & inside)[:count] & seen.visible[:count]
    apart = np.linalg.norm(places[:count] - seen.tracks[:count], axis=-1)[both]
    if not len(apart):
        return math.nan, 0
    return apart.mean(), len(apart)


# --------------------------------------------------------------------------------------------------
# The command.

def run_tables(argv):
    """Measure the tables."""
    parser = new_parser(__doc__)
    parser.add_argument("--photographs", type=Path, metavar="DIR",
                        help="a folder of pictures, for one more set (none)")
    args = parser.parse_args(argv)
    if args.photographs and not args.photographs.is_dir():
        raise UserError(f"--photographs {args.photographs}: no such folder")
    trained = open_trained(args.out, args.device, args.seed)
    what = f"{weights_of(trained)}, {args.clips} clips, {args.frames} frames"
    measure_tables(trained, "eval", what, tables(args.clips, args.frames, args.photographs))


def new_parser(description):
    """The flags shared by programs that measure trained models."""
    count = number(int, 1, 10 ** 9)
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tiny"),
        help="folder of a training, and of the results")
    add("--clips", type=count, default=16, help="of each kind that is measured (16)")
    add("--frames", type=count, default=10_000,
        help="length of the streams that are measured (10000)")
    add("--seed", type=int, default=0, help="of all noise (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def open_trained(folder, device="cpu", seed=0):
    """The models of a training in a folder, or the shipped ones if it has no student. UserError if
    there is no such device."""
    device = str(sample.find_device(device))
    files = {}
    if not (folder / "student.safetensors").exists():
        files = {name: ASSETS / f"{shipped}.safetensors" for name, shipped in SHIPPED.items()}
    trained = Trained(folder, device, seed, files)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'the shipped weights' if files else folder}: {trained.config}")
    return trained


def weights_of(trained):
    """A line that identifies the trained models and the seed."""
    sums = [f"{name} {trained.checksum(name):08x}" for name in trained.names()]
    return f"seed {trained.seed}, {', '.join(sums)}"


def run_curves(argv):
    """Plot the curves of every stage in a training's log."""
    parser = Parser(description=run_curves.__doc__, prog="python -m extras.evaluate curves")
    parser.add_argument("folder", type=Path, help="of the training")
    folder = parser.parse_args(argv).folder
    log = folder / "stats.jsonl"
    if not log.is_file():
        raise UserError(f"{log}: no such file; give the folder of a training")
    for stage in sorted({row["stage"] for row in read_log(log)}):
        plot_stage(folder, stage)
        print(folder / f"{stage}.png")


def run_compare(argv):
    """Compare two videos frame by frame, and requested tracks with a tracker's."""
    parser = Parser(description=run_compare.__doc__, prog="python -m extras.evaluate compare")
    add = parser.add_argument
    add("made", type=Path, help="a video that was made")
    add("real", type=Path, nargs="?", help="what it should look like")
    add("--lpips", choices=("alex", "vgg"), help="LPIPS too, by the package lpips")
    add("--tracks", type=Path, metavar="FILE", help="that it was told to follow, with --found")
    add("--found", type=Path, metavar="FILE", help="what a tracker found in it, in its pixels")
    add("--image", type=Path, metavar="FILE",
        help="that it started from, whose pixels --tracks are in")
    args = parser.parse_args(argv)
    if bool(args.tracks) != bool(args.found):
        raise UserError("--tracks and --found need each other")
    if not (args.real or args.tracks):
        raise UserError(f"{args.made}: give a second video, or --tracks and --found, to compare "
                        "it with")
    if args.lpips and not args.real:
        raise UserError("--lpips needs a second video")
    told = []
    if args.real:
        numbers, count = compare(args.made, args.real, args.lpips)
        told.append(f"{count} frames of {args.real}")
        told += [f"{name} {number:.4g}" for name, number in numbers.items()]
    if args.tracks:
        width, height = open_video(args.made, most=1).size
        image_size = (width, height)
        if args.image:
            image_size = sample.load_image(args.image).size
        error, count = end_point_error(args.tracks, args.found, (width, height), image_size)
        told.append(f"EPE {error:.4g} of {count} points")
    print(", ".join(told))


def run_papers(argv):
    """Run one of the papers' protocols over a folder of clips, see extras/protocols.py."""
    from extras import protocols
    protocols.run_papers(argv)


COMMANDS = {"curves": run_curves, "compare": run_compare, "papers": run_papers}


def run(argv):
    """Run the program. Returns the exit code."""
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        run_tables(argv)
    return 0


def main(argv=None):
    """`run`, with its errors as one line and an exit code."""
    return sample.reported(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
