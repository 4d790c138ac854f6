"""The papers' protocols: how near to a real video is what a model makes of its tracks and frame 0.

    python -m extras.evaluate papers FOLDER --protocol davis --out runs/davis
        --weights student.safetensors --vae Wan2.1_VAE.pth --text-encoder DIR
        --tracker tracker.py:track

In FOLDER a clip is a.mp4, a.npz, the tracks of its pixels, and a.txt, its prompt, as for
extras/clips.py; a prompt may be encoded already, in a.safetensors. Other flags are those of
sample.py. MotionStream, table 1 and 2, appendix E: DAVIS (longer clips keep their first and last
frame and evenly chosen ones between), a subset of Sora's clips (cut to 81 frames at 16 a second)
and LLFF. What is made is in --out, and the numbers are in papers.json.

A tracker is a function of frames, uint8 (T, H, W, 3), and points (N, 2) in pixels of frame 0, x
first. It returns where they are, (T, N, 2), as numbers. Without one, end-point errors are left out.
"""

import importlib.util
import json
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from extras import refusals
from extras.clips import find_sources, read_captions
from extras.measures import lpips_network, psnr, ssim
from extras.tracks import decode_text, render_control
from extras.video import open_video
from motionstream import UserError, write_file
from sample import Parser


@dataclass(frozen=True)
class Protocol:
    """How clips are cut, and at what size they are compared."""
    whole: bool                     # longer clips are thinned out, else cut off
    fps: float | None               # at which frames are taken; None: as they are
    size: tuple                     # (height, width) that both videos are scaled to
    prompt: str = ""                # before each clip's own
    frames: int = 81                # at most


STILL_SCENE = "A static scene, in which nothing moves but the camera. "
PROTOCOLS = {
    "davis": Protocol(True, None, (480, 832)),
    "sora": Protocol(False, 16, (480, 832)),
    "llff": Protocol(True, None, (288, 512), STILL_SCENE),
}

# What the paper has (tables 1, 2), for the 1.3B models: PSNR, SSIM, LPIPS, EPE.
PAPER = {
    "davis": {"teacher": (16.61, 0.477, 0.427, 5.35), "student": (16.20, 0.447, 0.443, 7.80)},
    "sora": {"teacher": (17.82, 0.586, 0.333, 2.71), "student": (16.67, 0.531, 0.360, 4.21)},
    "llff": {"teacher": (16.0, 0.42, 0.21), "student": (15.7, 0.38, 0.23)},
}
NAMES = ("PSNR", "SSIM", "LPIPS", "EPE")


@dataclass(frozen=True)
class Clip:
    """What a model is asked for, and what it should look like."""
    name: str
    frames: np.ndarray              # uint8 (T, H, W, 3)
    tracks: sample.Tracks           # of T frames, in pixels of these
    prompt: str | None
    embeds: Path | None             # the prompt, encoded


# --------------------------------------------------------------------------------------------------
# Clips.

def chosen_frames(protocol, count, fps):
    """Which of `count` frames, at fps a second, a clip consists of."""
    places = np.arange(count)
    if protocol.fps and fps and fps > 1.01 * protocol.fps:
        times = np.arange(int(count * protocol.fps / fps)) / protocol.fps
        places = np.round(times * fps).astype(int)
    if protocol.whole and len(places) > protocol.frames:
        kept = np.linspace(0, len(places) - 1, protocol.frames)
        return places[np.round(kept).astype(int)]
    return places[:protocol.frames]


def read_clip(source, name, caption, protocol):
    """A Clip. UserError, one line, if a piece of it is missing or does not fit."""
    video = open_video(source.path(".mp4"))
    frames = np.stack(list(video.frames))
    height, width = frames.shape[1:3]
    tracks = sample.read_tracks(source.path(".npz"), (width, height))
    if len(tracks.tracks) != len(frames):
        raise UserError(f"{source.path('.npz')}: tracks of {len(tracks.tracks)} frames, its video "
                        f"has {len(frames)}")
    places = chosen_frames(protocol, len(frames), video.fps)
    cut = sample.Tracks(tracks.tracks[places], tracks.visible[places])
    if ".txt" in source.files:
        caption = decode_text(source.path(".txt").read_bytes()).strip()
    prompt = None
    if caption is not None:
        prompt = protocol.prompt + caption
    return Clip(name, frames[places], cut, prompt, source.files.get(".safetensors"))


# --------------------------------------------------------------------------------------------------
# Making and measuring.

@dataclass(frozen=True)
class Made:
    """What a model made of a Clip: video and truth (1, 3, T, H, W) in [-1, 1], of the model's size,
    and the tracks that it was told, (T, N, 2) in these pixels, visible (T, N)."""
    video: torch.Tensor
    truth: torch.Tensor
    tracks: torch.Tensor
    visible: torch.Tensor


class Player:
    """A model that plays clips, loaded with the first one."""

    def __init__(self, words, out):
        """words: flags of sample.py, without image, tracks and prompt."""
        self.words = words
        self.out = out
        self.models = None

    def flags_for(self, clip):
        picture = self.out / f"{clip.name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clip.frames[0]).save(picture)
        words = ["--image", str(picture), "--frames", str(len(clip.frames))] + self.words
        if clip.embeds:
            words += ["--prompt-embeds", str(clip.embeds)]
        elif clip.prompt is not None:
            words += ["--prompt", clip.prompt]
        return sample.parse_flags(words)

    def play(self, clip):
        """The clip's video, made anew, as Made; it is in a file as well."""
        flags = self.flags_for(clip)
        weights = sample.inspect(flags.weights or sample.ASSETS / "tiny.safetensors")
        size = clip.frames.shape[2], clip.frames.shape[1]
        job = sample.resolve(flags, weights, clip.tracks)
        refusals.check_job(flags, job, clip.tracks, sample.WAN_FRAMES)
        config = job.config
        motion = sample.fit_tracks(clip.tracks, size, job.frames, config, job.seed)
        pixels = sample.fit_image(Image.fromarray(clip.frames[0]), config.size)
        if self.models is None:
            refusals.check_files(job, pixels)
            self.models = sample.load_models(job, pixels)
        else:
            encoded = sample.encode_inputs(job, pixels)
            self.models = sample.Models(self.models.dit, self.models.vae, encoded)
        if job.drawn:
            whole = motion.tracks.shape[1]
            control = render_control(self.models.vae, motion, config.size, whole)
            motion = replace(motion, control=control)
        frames = []
        with sample.video_file(self.out / f"{clip.name}.mp4", job.fps) as append:
            for frame in sample.generate(job, self.models, pixels, motion):
                frames.append(frame)
                append(sample.enlarge(frame))
        truth = [sample.fit_image(Image.fromarray(frame), config.size) for frame in clip.frames]
        count = len(frames)
        return Made(as_video(np.stack(frames)), torch.stack(truth, 2), motion.tracks[0, :count],
                    motion.visible[0, :count])


def as_video(frames):
    """uint8 (T, H, W, 3) to (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


def scaled(video, size):
    """The pictures (T, 3, H, W) of a video (1, 3, T, H, W), at another size (height, width)."""
    pictures = video[0].transpose(0, 1)
    return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(-1, 1)


def measure(made, size, distance, tracker):
    """{"PSNR", "SSIM", "LPIPS", "EPE"} of what was made, at a size (height, width): means of
    frames, and of the points that are visible in the tracks, if there are in frame 0. distance: see
    lpips_network, or None; tracker: see find_tracker, or None."""
    video = scaled(made.video, size)
    truth = scaled(made.truth, size)
    rows = []
    for frame, true in zip(video.split(1), truth.split(1)):
        row = {"PSNR": psnr(frame, true), "SSIM": ssim(frame, true).item()}
        if distance:
            row["LPIPS"] = distance(frame, true).item()
        rows.append(row)
    numbers = {}
    for name in rows[0]:
        numbers[name] = float(np.mean([row[name] for row in rows]))
    if tracker and made.visible[0].any():
        scale = torch.tensor(size).flip(0) / torch.tensor(made.video.shape[:2:-1])
        frames = ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        numbers["EPE"] = end_point_error(frames, made.tracks * scale, made.visible, tracker)
    return numbers


def end_point_error(frames, tracks, visible, tracker):
    """The mean distance in pixels of tracks (T, N, 2) from where a tracker finds the points of
    frame 0 in uint8 frames (T, H, W, 3), of what is visible (T, N) in the tracks, at least one of
    them in frame 0."""
    begun = visible[0]
    told = tracks[:, begun]                                     # (T, n, 2)
    found = torch.as_tensor(tracker(frames, told[0].numpy()))
    if found.shape != told.shape:
        raise UserError(f"--tracker: returned {tuple(found.shape)}, expected {tuple(told.shape)}")
    apart = (found - told).norm(dim=-1)                         # (T, n)
    return apart[visible[:, begun]].mean().item()


def find_tracker(name):
    """--tracker FILE.py:FUNCTION, the function. UserError if there is none."""
    if name is None:
        return None
    file, _, function = name.rpartition(":")
    try:
        return runpy.run_path(file)[function]
    except Exception as e:                              # whatever the file does
        raise UserError(f"--tracker {name}: not FILE.py:FUNCTION "
                        f"({type(e).__name__}: {e})") from None


# --------------------------------------------------------------------------------------------------
# The command.

def print_table(protocol, rows, kind):
    """The mean of the clips, and what the paper has."""
    names = [name for name in NAMES if any(name in row for row in rows.values())]
    print(f"\n| {protocol} | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for label, row in rows.items():
        cells = [f"{row[name]:.4g}" if name in row else "-" for name in names]
        print(f"| {label} | {' | '.join(cells)} |")
    paper = dict(zip(NAMES, PAPER[protocol][kind]))
    cells = [f"{paper[name]:g}" if name in paper else "-" for name in names]
    print(f"| the paper's {kind}, 1.3B, on its own clips | {' | '.join(cells)} |")


def mean_row(rows):
    """Of {clip: {number}}, the mean of each number."""
    mean = {}
    for name in NAMES:
        values = [row[name] for row in rows.values() if name in row]
        if values:
            mean[name] = float(np.mean(values))
    return mean


def run_papers(argv):
    """Run one of the papers' protocols over a folder of clips."""
    parser = Parser(description=__doc__, prog="python -m extras.evaluate papers",
                    allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="of clips, see above")
    add("--protocol", choices=PROTOCOLS, default="davis")
    add("--out", type=Path, required=True, help="folder for what is made and measured")
    add("--tracker", metavar="FILE.py:FUNCTION", help="for end-point errors, see above (none)")
    add("--lpips", choices=("alex", "vgg", "none"),
        help="its network (alex, if lpips is installed)")
    args, words = parser.parse_known_args(argv)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    protocol = PROTOCOLS[args.protocol]
    tracker = find_tracker(args.tracker)
    distance = open_distance(args.lpips)
    sources, left = find_sources(args.folder)
    captions, _ = read_captions(args.folder, sources)
    for line in left:
        print(f"left out: {line}")
    player = Player(words, args.out)
    rows = {}
    for name, source in sources.items():
        if ".mp4" in source.files:
            clip = read_clip(source, name, captions.get(name), protocol)
            row = measure(player.play(clip), protocol.size, distance, tracker)
            rows[name] = row
            told = ", ".join(f"{what} {number:.4g}" for what, number in row.items())
            print(f"{name}: {told}", flush=True)
    if not rows:
        raise UserError(f"{args.folder}: no clips; a clip is a.mp4, a.npz and a.txt")
    kind = "student" if player.models.dit.config.causal else "teacher"
    mean = mean_row(rows)
    print_table(args.protocol, rows | {f"mean of {len(rows)}": mean}, kind)
    whole = {"protocol": args.protocol, "flags": words, "clips": rows, "mean": mean}
    text = json.dumps(whole, indent=1)
    write_file(args.out / "papers.json", lambda part: part.write_text(text))


def open_distance(name):
    """The LPIPS of two pictures by a network's name; None if it is not wanted, or not installed,
    which is said."""
    if name is None and not importlib.util.find_spec("lpips"):
        print("LPIPS is left out: pip install lpips")
        return None
    if name == "none":
        return None
    return lpips_network(name or "alex")
