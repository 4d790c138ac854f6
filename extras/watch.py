"""What a training run shows: its plan; early signs that it goes wrong, printed, logged and drawn
every REPORT_EVERY updates of the stages teacher and distill; pictures after each stage.
docs/training.md explains how to read them. Shapes are those of motionstream.py."""

import itertools
import json
import math
import statistics

import torch
from tqdm import tqdm

import train_distill as td
from extras.guard import read_log
from motionstream import (FRAMES, channel_std, inside_picture, same_sigma, to_x0, track_ids,
                          with_first)
from sample import ASSETS

# --------------------------------------------------------------------------------------------------
# The plan.

def unusual(run):
    """{name: value} of the settings that are not the defaults."""
    config = td.starting_config(run.start, "tiny")
    settings = td.starting_settings(run.start, config)
    found = {}
    for used, usual in (run.settings, settings), (run.config, config):
        for name, value in vars(used).items():
            if value != getattr(usual, name):
                found[name] = value
    return found


def logged_rows(path):
    """{stage: its rows} of a stats.jsonl."""
    rows = {}
    for row in read_log(path):
        rows.setdefault(row["stage"], []).append(row)
    return rows


def hours_left(rows, updates):
    """Hours of so many updates at the mean speed of the latest 100 of the rows, as text."""
    seconds = statistics.mean(row["seconds"] for row in rows[-100:])
    return f"{updates * seconds / 3600:.1f}"


def print_plan(run, stages):
    """Print a table of the stages to be run, in process 0. Hours left are estimated from a stage's
    own logged updates or, for the tiny model by default settings, from those of the shipped
    weights."""
    if td.RANK > 0:
        return
    print(f"{run.out}: on {run.device}, matrix products in {str(run.dtype)[6:]}, seed {run.seed}")
    changed = unusual(run)
    if changed:
        texts = [f"{name}={value}" for name, value in changed.items()]
        print(f"non-default settings: {', '.join(texts)}")
    logged = logged_rows(run.out / "stats.jsonl")
    shipped = {}
    if not run.start and all(name.endswith("_updates") for name in changed):
        shipped = logged_rows(ASSETS / "stats.jsonl")
    print("\n| stage | updates | begun | hours left | weights |\n|---|---|---|---|---|")
    for stage in stages:
        parts = [stage]
        if stage == "vae" and run.settings.segmenter_updates > 0:
            parts.append("segmenter")                       # the second part of that stage
        for part in parts:
            updates = getattr(run.settings, f"{part}_updates")
            begun = hours = "-"
            if part in logged:
                begun = logged[part][-1]["step"] + 1
                hours = hours_left(logged[part], max(updates - begun, 0))
            elif part in shipped:
                hours = f"{hours_left(shipped[part], updates)}, as in assets/stats.jsonl"
            print(f"| {part} | {updates:,} | {begun} | {hours} | {run.path(td.WEIGHTS[stage])} |")
    pictures = " and STAGE_preview.png" if run.data is None else ""
    print(f"\nnumbers of every update: {run.out / 'stats.jsonl'}; drawn after each stage: "
          f"{run.out / 'STAGE.png'}{pictures}\n")


def show(run, stage):
    """Draw a finished stage's curves and a preview in process 0, see extras/evaluate.py."""
    if td.RANK > 0:
        return
    from extras.evaluate import Trained, preview
    trained = Trained(run.out, run.device, files={"vae": run.path("vae")})
    preview(trained, stage, drawn=run.data is None)


# --------------------------------------------------------------------------------------------------
# The teacher: does it follow counterfactual tracks?

PAN = 0.25              # share of the width, over a clip


def pan_points(config, points, frames):
    """Counterfactual tracks for the images of a Batch: the whole picture pans to the right, in
    every other clip to the left, by PAN of the width (in whole cells) until the last of `frames`
    latents. Returns the Batch's points with these tracks, and the distances in cells (B,)."""
    B, T = points["tracks"].shape[:2]
    height, width = config.size
    y = torch.arange(config.stride, height, 2 * config.stride)
    x = torch.arange(config.stride, width, 2 * config.stride)
    grid = torch.cartesian_prod(y, x).flip(1).to(points["tracks"])          # (N, 2), x first
    direction = 1 - 2 * (torch.arange(B) % 2)
    cells = direction * int(PAN * config.latent_size[1])
    middle = FRAMES * (frames - 1) - (FRAMES - 1) / 2           # mid-frame of the last latent
    share = torch.arange(T) / middle
    way = config.stride * cells[:, None] * share                # (B, T), in pixels
    tracks = grid.expand(B, T, -1, -1).clone()
    tracks[..., 0] += way[..., None].to(grid)
    visible = inside_picture(tracks, height, width)
    changed = {"tracks": tracks, "visible": visible, "ids": track_ids(tracks, config)}
    if "start" in points:
        changed["start"] = grid.expand(B, -1, -1)
    return points | changed, cells.to(grid.device)


def found_shift(before, after, reach):
    """The shift to the right, in cells from -reach to reach, with the smallest mean squared
    difference between latents `before` (B, C, h, w) and `after` where they overlap: (B,)."""
    width = before.shape[3]
    errors = []
    for shift in range(-reach, reach + 1):
        right = max(shift, 0)
        left = max(-shift, 0)
        source = before[..., left:width - right]
        target = after[..., right:width - left]
        error = (source - target).square()
        errors.append(error.mean((1, 2, 3)))
    return torch.stack(errors).argmin(0) - reach


def pan_error(run, model, vae, batch):
    """End-point error, in pixels, of a teacher's x0 from pure noise on counterfactual tracks
    (pan_points). The picture moves as one, so found_shift locates frame 0 without a tracker. 0:
    the teacher follows its tracks; the length of the pan: it ignores them."""
    points, cells = pan_points(model.config, batch.points, run.clip_latents)
    noise = torch.randn_like(batch.latents)
    sigma = torch.ones(len(noise), device=noise.device)
    x_t, sigma_frames = with_first(noise, sigma, td.first_latent_of(model.config, batch.latents))
    conditions = batch.conditions | td.motion_of(model, points, vae)
    velocity = model(x_t, sigma_frames, **conditions)
    x0 = to_x0(x_t, velocity, sigma_frames)
    reach = 2 * int(cells.abs().max())
    found = found_shift(batch.latents[:, :, 0], x0[:, :, -1], reach)
    return model.config.stride * (found - cells).abs().float().mean()


SIGMA_BINS = (0.0, 0.5, 0.9, 0.98, 1.0)
CLIPS = 24              # drawn at least; a batch of 6 at full size is few


def errors_on_batch(run, model, vae, batch):
    """The numbers of teacher_errors on one Batch."""
    x0 = batch.latents
    first_latent = td.first_latent_of(model.config, x0)
    others = {name: value.roll(1, 0) for name, value in batch.points.items() if name != "frame_0"}

    def error(sigma, motion):
        weight = td.latent_weight(vae, model.config, sigma)
        return td.flow_loss(model, x0, sigma, batch.conditions | motion, first_latent, 1.0, weight)

    with run.autocast():
        motion = td.motion_of(model, batch.points, vae)
        nothing = {name: torch.zeros_like(value) for name, value in motion.items()}
        swapped = td.motion_of(model, batch.points | others, vae)
        pure = torch.ones(len(x0), device=run.device)
        errors = {
            "x0_tracks": error(pure, motion),
            "x0_none": error(pure, nothing),
            "x0_swapped": error(pure, swapped),
            "pan_error": pan_error(run, model, vae, batch),
        }
        for low, high in itertools.pairwise(SIGMA_BINS):
            sigma = torch.linspace(low, high, len(x0), device=run.device)
            errors[f"loss_{low:g}_{high:g}"] = error(sigma, motion)
    return errors


@torch.no_grad()
def teacher_errors(run, model, vae, files):
    """A teacher's errors on CLIPS draws of held-out clips or more, the same in every process: of x0
    from pure noise with all tracks, with none, and with those of the clip drawn before (x0_swapped,
    which equals x0_tracks if tracks are ignored, or if only one clip is held back); pan_error; and
    the flow loss by bins of sigma."""
    torch.manual_seed(0)
    size = 6 * run.settings.batch
    errors = []
    for _ in range(math.ceil(CLIPS / size)):
        batch = td.draw_batch(run, files, size, run.clip_latents, dense=True)
        errors.append(errors_on_batch(run, model, vae, batch))
    means = {}
    for name in errors[0]:
        means[name] = statistics.fmean(float(of_batch[name]) for of_batch in errors)
    return means


# --------------------------------------------------------------------------------------------------
# The student.

@torch.no_grad()
def student_numbers(run, generator, teacher, critic, vae, files):
    """Early signs that distillation diverges, always on the same images and noise: |fake - real|
    by sigma; smallest and largest standard deviation of a latent channel, relative to the data's;
    mean change between successive latents; share of saturated pixels."""
    torch.manual_seed(0)
    plan = td.Plan(run.clip_chunks, len(run.config.sigmas) - 1, run.streaming)
    x0, conditions, _ = td.generated_clip(run, generator, vae, files, plan, grad=False)
    first_latent = td.first_latent_of(run.config, x0)
    variance = x0.square().mean((0, 2, 3, 4))                   # (C,)
    std = variance.sqrt()                                       # Wan's data: 1
    if teacher.config.latent_std:
        std = std / channel_std(teacher.config, std.device).flatten()
    change = x0.diff(dim=2).abs()
    numbers = {"std_least": std.min(), "std_most": std.max(), "moves": change.mean()}
    with run.autocast():
        for sigma in 0.3, 0.6, 0.9:
            sigmas = same_sigma(sigma, x0)
            real, fake = td.real_and_fake(x0, sigmas, teacher, critic, conditions, first_latent)
            numbers[f"apart_{sigma}"] = (fake - real).abs().mean()
        video, _ = vae.decode(x0[:1])
    numbers["saturated"] = (video.abs() > 0.99).float().mean()
    return numbers


# --------------------------------------------------------------------------------------------------
# When they are measured.

MEASURES = {"teacher": teacher_errors, "distill": student_numbers}
REPORT_EVERY = {"teacher": 200, "distill": 50}      # updates between measurements


def report(loop, *inputs):
    """What train_distill.py calls after every update of a stage: measure now and then, log the
    numbers, print them above the progress bar and, one update later, when they are in the log, draw
    the curves. loop: train_distill.Loop; inputs: those of MEASURES after the run."""
    if loop.stage not in MEASURES:
        return
    every = REPORT_EVERY[loop.stage]
    if td.RANK == 0 and loop.update and loop.update % every == 0:
        from extras.evaluate import plot_stage
        plot_stage(loop.run.out, loop.stage)
    if (loop.update + 1) % every:
        return
    numbers = MEASURES[loop.stage](loop.run, *inputs)
    loop.log(**numbers)
    if td.RANK == 0:
        rounded = {name: round(float(value), 5) for name, value in numbers.items()}
        tqdm.write(f"{loop.stage}: {json.dumps(rounded)}")
