"""Before a training: clips of your own, read and encoded once; and what the training will take.

A clip is what has one stem in a folder or its subfolders:

    a.mp4                   the video; its first frame as a.png or a.jpg is enough to distil
    a.npz                   tracks of its points, as sample.py reads them
    a.txt                   what it shows, in words
    a.safetensors           for Wan's weights instead: the encoded prompt, rows (L, 4096)
    a.clip.safetensors      and with an image branch: the first frame encoded by CLIP, rows (257, 1280)

Shapes are those of motionstream.py; `run` is train_distill.py's.
"""

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from motionstream import PRESETS, MotionStream, embed_words, schedule
from sample import (CLIP_ROWS, UMT5_DIM, UserError, fit_image, fit_tracks, has_mask, load_image, load_rows,
                    load_tracks)

PICTURES = (".mp4", ".png", ".jpg")


def find_clips(folder, run):
    """The clips of a folder, as paths without an ending, and everything that their tensors depend on but the VAE."""
    files = [path for path in sorted(folder.rglob("*")) if path.name[0] != "."
             and path.suffix in (*PICTURES, ".npz", ".txt", ".safetensors")]
    clips = sorted({path.with_suffix("") for path in files if path.suffix in (*PICTURES, ".npz")})
    if not clips:
        raise UserError(f"{folder}: holds no clips; one is a.mp4, a.npz and a.txt, see the README")
    c, state = run.config, [(path, path.stat()) for path in files]
    return clips, [c.size, c.text_dim, c.text_len, c.clip_dim, run.recipe.clip,
                   *((path.relative_to(folder), stat.st_size, stat.st_mtime_ns) for path, stat in state)]


def read_pictures(clip, count):
    """The first `count` frames of the clip's video, or its one picture: RGB images, and frames/s (of a picture None).
    Raises UserError if there are fewer."""
    path = next((path for end in PICTURES if (path := Path(f"{clip}{end}")).is_file()), Path(f"{clip}.mp4"))
    if path.suffix != ".mp4":
        images, fps = [load_image(path)], None
    else:
        try:
            with imageio.get_reader(path) as reader:
                fps = reader.get_meta_data()["fps"]
                images = [*map(Image.fromarray, itertools.islice(reader, count))]
        except Exception:                               # a damaged file raises several kinds
            raise UserError(f"{path}: {'damaged, or not a video' if path.is_file() else 'no such file'}") from None
    if len(images) < count:
        cure = "" if fps else "; a picture is enough for --stage distill only, add a video"
        raise UserError(f"{path}: has {len(images)} of the {count} frames of a clip{cure}")
    return images, fps


def fit_pictures(images, size):
    """RGB images to a video (1, 3, T, H, W) in [-1, 1], scaled to cover `size` and cropped as sample.py does."""
    return torch.stack([fit_image(image, size) for image in images], 2)


def read_clip(run, vae, clip, count, length):
    """One clip: {"latents" (1, C, F, h, w) of its first `count` frames, float16, "tracks" (1, length, N, 2), "visible",
    "text" (1, text_len, text_dim), with an image branch "clip"}, and the frame rates that its files name. Beyond the
    tracks' end nothing is specified. UserError, ValueError or OSError names the file that is missing or broken."""
    c, (images, fps) = run.config, read_pictures(clip, count)
    with contextlib.redirect_stdout(None):              # the same notes for each clip
        tracks, visible, _, rate = load_tracks(Path(f"{clip}.npz"), images[0].size)
        motion = fit_tracks((tracks[:length], visible[:length], None), images[0].size, length, c, 0)
    if len(tracks) < run.recipe.clip:
        raise UserError(f"{clip}.npz: has {len(tracks)} of the {run.recipe.clip} frames of a clip")
    if c.text_dim == UMT5_DIM:
        text = load_rows(Path(f"{clip}.safetensors"), 1, c.text_len, UMT5_DIM).bfloat16()
    else:
        text = embed_words(Path(f"{clip}.txt").read_text(encoding="utf-8", errors="replace"), c)
        text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
    tensors = {"tracks": motion.tracks, "visible": motion.visible, "text": text}
    if c.clip_dim:
        tensors["clip"] = load_rows(Path(f"{clip}.clip.safetensors"), CLIP_ROWS, CLIP_ROWS, c.clip_dim).bfloat16()
    with torch.no_grad(), run.autocast():
        tensors["latents"] = vae.encode(fit_pictures(images, c.size).to(run.device)).half()
    return tensors, {fps, rate}


def read_all(run, read):
    """What read(clip) returns of each clip of --data. A clip with a broken piece is named and left out; UserError if
    --skip-share of all are broken."""
    broken, said = [], {None, run.config.fps}
    for clip in tqdm(run.sources, "read clips"):
        try:
            piece, rates = read(clip)
        except (UserError, ValueError, OSError) as e:
            broken.append(f"{e.filename}: no such file" if isinstance(e, FileNotFoundError) else str(e))
            print(f"left out: {broken[-1]}")
            if len(broken) >= run.args.skip_share * len(run.sources):
                raise UserError(f"{run.args.data}: {len(broken)} of {len(run.sources)} clips are broken "
                                f"({'; '.join(broken[:3])}); mend or remove them, or raise --skip-share") from None
            continue
        for rate in rates - said:
            print(f"note: {clip} has {rate:g} frames/s, the model {run.config.fps}; nothing is resampled")
        said |= rates
        yield piece


def read_videos(run, count):
    """The first `count` clips as videos (1, 3, T, H, W) in [-1, 1]: what a VAE learns from."""
    def read(clip):
        images, fps = read_pictures(clip, run.recipe.clip)
        return fit_pictures(images, run.config.size), {fps}
    return itertools.islice(read_all(run, read), count)


def read_clips(run, name, _):
    """The clips of --data, one by one, as film_clips yields drawn ones: hidden tracks make their number the same. Of
    "images…" only the first frame is encoded, and the tracks are as long as distillation's longest rollout."""
    vae, still = run.vae(), name.startswith("images")
    count, length = (1, 4 * run.config.chunk * run.args.rollout - 3) if still else 2 * (run.recipe.clip,)
    clips = [*read_all(run, lambda clip: read_clip(run, vae, clip, count, length))]
    most = max(clip["tracks"].shape[2] for clip in clips)
    for clip in clips:
        hidden = 0, most - clip["tracks"].shape[2]
        yield clip | {"tracks": F.pad(clip["tracks"], (0, 0, *hidden)), "visible": F.pad(clip["visible"], hidden)}


def thinned(visible, pauses):
    """Of true tracks (B, T, N) 1,000 to 2,500, or all if there are fewer; with pauses, none in a fifth of the chunks of
    12 frames but the first (section 3.1, appendix D)."""
    B, T, N = visible.shape
    keep = torch.rand(B, 1, N).argsort(2).argsort(2) < torch.randint(1000, 2501, (B, 1, 1))
    chunk = (torch.arange(T) + 3) // 12
    shown = (torch.rand(B, T, 1) >= 0.2 * pauses)[:, chunk] | (chunk == 0)[:, None]
    return visible & keep & shown


# ----------------------------------------------------------------------------------------------------------------------
# What a training is, and what it takes.

def choose_config(args, start):
    """What is trained, and by which of RECIPES: the tiny model, a preset (of a dry run), or the weights `start`, as
    sample.py inspects them. Those without a slot for tracks get one, and Wan's are sampled as the paper says."""
    c = start.config if start else PRESETS[args.dry_run or "tiny"]
    full = c.text_dim == UMT5_DIM
    for wrong, cure in [
        (start and c.causal, "holds a student; a training starts from a teacher"),
        (start and has_mask(c), "takes the image as a clip with a mask, which cannot stream; take Fun-Control or T2V"),
        (start and not args.vae and not args.dry_run, "give --vae FILE, whose latents these weights know"),
        (start and full and not args.data and not args.dry_run, "give --data DIR; the clips drawn here are small"),
    ]:
        if wrong:
            raise UserError(f"{start.path}: {cure}")
    if start and not c.track_dim:
        c = replace(c, track_dim=c.out_dim, in_dim=c.in_dim + c.out_dim)
    if full:
        c = replace(c, shift=6.0, sigmas=schedule(3, 6.0), steps=48, guidance=(3.0, 1.5), chunk=3, sink=1, window=1)
    c = replace(c, tracks=args.tracks or c.tracks, sink_decay=args.sink_decay)
    return c, "tiny" if not full else "second" if start and start.head else "paper"


def forward_flops(c, tokens, seen):
    """Floating point operations of the blocks for `tokens` tokens that attend to `seen`, the rest of the model is below
    a hundredth: two for each weight, and attention's two products."""
    D, text = c.dim, c.text_len + 257 * (c.clip_dim > 0)
    a_token = 2 * (6 * D * D + 2 * D * c.ffn_dim) + 4 * D * (seen + text)
    return c.num_layers * (tokens * a_token + 4 * D * D * text)


def dry_run(run, critic_steps):
    """Print what the training of `run` would be and take; the model is on the meta device, and nothing is written."""
    c, r, frames = run.config, run.recipe, (run.recipe.clip + 3) // 4
    with torch.device("meta"):
        count = sum(p.numel() for p in MotionStream(c).parameters())
    frame = math.prod(c.size) // (2 * c.stride) ** 2                                # tokens
    held = [min(i, c.sink + (c.window if c.window is not None else i)) * c.chunk for i in range(run.known + 1)]
    whole = forward_flops(c, frames * frame, frames * frame)
    stream = sum(forward_flops(c, c.chunk * frame, (past + c.chunk) * frame) for past in held[:-1])
    steps, guided = (len(c.sigmas) + 1) / 2, 3 if c.guidance[1] else 2 if c.guidance[0] else 1
    costs = {                                                   # of a clip; a backward costs two forwards
        "teacher": 3 * whole, "trajectories": guided * c.steps * whole, "causal": (3 + 1) * stream,
        "distill": (steps + 1) * stream + 3 * whole + ((steps + 3) * stream + (guided + 1) * whole) / critic_steps}
    clips = {stage: r.batch * n for stage, n in run.steps.items()} | {"trajectories": run.trajectories}
    print(f"{c}\n{r}\n{count:,} parameters, {frame:,} tokens a latent frame, {frames} of them a clip")
    print(f"the KV cache of a stream, chunk {c.chunk}, sink {c.sink}, window {c.window}: "
          f"{c.num_layers * 2 * 2 * c.dim * held[-1] * frame / 2 ** 20:,.0f} MiB in bfloat16")
    for stage, flops in costs.items():
        print(f"{stage}: {clips[stage]:,} clips, {flops / 1e12:,.1f} TFLOP each")
    for gpus in 1, 4, 8:
        # float32: weights 4 bytes, gradients 4, AdamW 8, average 4; distillation's teacher has weights alone
        teacher, distill = (size * count / gpus / 2 ** 30 for size in (20, 4 + 20 + 16))
        days = ", ".join(f"{stage} {clips[stage] * flops / (1e12 * run.args.tflops * gpus * 86400):,.2g}"
                         for stage, flops in costs.items())
        print(f"{gpus} GPUs: {teacher:.1f} GiB each to train the teacher, {distill:.1f} to distil, if all is sharded, "
              f"without activations; days at {run.args.tflops} TFLOP/s each: {days}")
