"""Measure: the README's numbers, previews and curves of a training, rewards, a video beside another.

    python -m extras.evaluate --clips 12        the README's tables, of runs/tiny or else of the shipped weights

Scenes are drawn, from seeds that training never uses. The claims of the README, not of the code.
"""

import itertools
import json
import math
import runpy
import sys
import time
import zlib
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import sample
from extras import world
from motionstream import PRESETS, UserError, track_ids, write
from sample import embed_words
from vae import load_vae

SIZE, CLIP = 128, 45                    # pixels per side and frames of a clip, as in training
STYLE = "simple"                        # of the drawn world
POINTS = world.STYLES[STYLE].points     # tracks on each object, the centre first
NEUTRAL = PRESETS["tiny"].prompt
MODELS = ("vae", "teacher", "causal", "student", "decoder")     # in the order of the stages


def seed_of(*what):
    """A seed for torch from anything printable, the same in every process."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def psnr(a, b):
    """Decibels between videos in [-1, 1]."""
    return -10 * math.log10((a - b).square().mean().item() / 4 + 1e-10)


def play(run, name, scene, points, text, later=None, **overrides):
    """The video (B, 3, T, SIZE, SIZE), in pieces, that "teacher", "causal" or "student" makes of the scene's first
    frame, {"tracks", "visible"} and text (1 or B, L, text_dim), in the second half of a stream `later` if that is
    given; "vae" is the truth through the VAE, "still" frame 0. overrides: fields of Config."""
    vae, T = load_vae(run.path(name)) if name == "decoder" else run.vae(), scene["pan"].shape[1]
    if name == "still":
        yield world.render(scene, SIZE, 0, 1).expand(-1, -1, T, -1, -1)
        return
    if name in ("vae", "decoder"):
        yield vae.decode(vae.encode(world.render(scene, SIZE).to(run.device)))[0].cpu()
        return
    model = run.model(name, **overrides)
    image = world.render(scene, SIZE, 0, 1).to(run.device)
    tracks, visible = (points[key].to(run.device) for key in ("tracks", "visible"))
    motion = sample.Motion(tracks, visible, track_ids(tracks, visible, model.config))
    text = None if text is None else text.expand(len(image), -1, -1).to(run.device)
    if later is not None:
        chunk, both = model.config.chunk, (text, later.expand(len(image), -1, -1).to(run.device))
        motion = (replace(part, text=both[4 * chunk * i >= T / 2])
                  for i, part in enumerate(sample.motion_by_chunk(motion, chunk)))
    sampler = sample.sample_teacher if name == "teacher" else sample.stream
    for video in sampler(model, vae, image[:, :, 0], motion, sample.Encoded(text), run.seed):
        yield video.cpu()


def masses(video, colours):
    """How much of each colour (B, K, 3) is in a video, and where: mass (B, T, K) and centroid (B, T, K, 2) in pixels.
    A pixel counts for the colour nearest to it in hue, by how colourful it is; greyish ones do not count."""
    rgb = video.transpose(1, 2) / 2 + 0.5                                                   # (B, T, 3, H, W)
    chroma = rgb - rgb.mean(2, keepdim=True)
    strength = chroma.square().sum(2, keepdim=True).sqrt()               # norm(dim=2) takes 100 times as long
    hues = F.normalize(colours - colours.mean(2, keepdim=True), dim=2)
    match = torch.einsum("btchw,bkc->btkhw", chroma / strength.clamp(min=1e-12), hues)
    nearest = (match == match.amax(2, keepdim=True)) & (match > 0.8)
    weight = nearest * (strength - 0.15).clamp(min=0)                                       # (B, T, K, H, W)
    mass, axis = weight.sum((3, 4)), torch.arange(video.shape[-1]) + 0.5
    where = torch.stack([(weight.sum(3) * axis).sum(-1), (weight.sum(4) * axis).sum(-1)], -1)
    return mass, where / mass.clamp(min=1e-6)[..., None]


def ssim(a, b):
    """Structural similarity (B,) of pictures (B, 3, H, W) in [-1, 1], by Gaussian windows of 11x11 pixels, sigma 1.5
    (Wang et al. 2004)."""
    bell = torch.exp(-torch.arange(-5, 6).double() ** 2 / 4.5)
    row = (bell / bell.sum()).expand(3, 1, 1, 11)

    def blur(x):
        return F.conv2d(F.conv2d(x, row, groups=3), row.mT, groups=3)

    a, b = a.double() / 2 + 0.5, b.double() / 2 + 0.5
    mean_a, mean_b, aa, bb, ab = map(blur, (a, b, a * a, b * b, a * b))
    near = (2 * mean_a * mean_b + 0.01 ** 2) / (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2)
    alike = (2 * (ab - mean_a * mean_b) + 0.03 ** 2) / (aa - mean_a ** 2 + bb - mean_b ** 2 + 0.03 ** 2)
    return (near * alike).mean((1, 2, 3))


def measure(video, truth, first, scene):
    """A piece of video beside the true one, as numbers. End-point errors are in percent of the width, one per object
    and frame in which at least half of it can be seen; it is lost (percent of those) if less than a quarter of its mass
    is there. No error is over 30, a lost object's is 30. PSNR in dB, SSIM of every 4th frame. As shares of the truth's:
    the first object's colour, sharpness, and how far objects go. copying: the share of what only `first`, the first
    frame, has."""
    mass, where = masses(video, scene["colour"])
    true_mass, true_where = masses(truth, scene["colour"])
    seen = scene["present"][:, None] & (true_mass > 0.5 * true_mass.amax(1, keepdim=True)) & (true_mass > 1)
    lost = mass < 0.25 * true_mass
    error = torch.where(lost, 30.0, ((where - true_where).norm(dim=-1) * 100 / SIZE).clamp(max=30))[seen]
    there = (seen & ~lost)[:, 1:] & ~lost[:, :-1]
    move, edge = [], []
    for v, place in (video, where), (truth, true_where):
        move.append(place.diff(dim=1).norm(dim=-1)[there].sum())
        edge.append(sum(v.diff(dim=d).abs().mean() for d in (3, 4)))
    every_4th = [v[:, :, ::4].transpose(1, 2).flatten(0, 1) for v in (video, truth)]
    numbers = {"median": error.median(), "mean": error.mean(), "lost": 100 * lost[seen].float().mean(),
               "psnr": psnr(video, truth), "ssim": ssim(*every_4th).mean(),
               "colour": mass[..., 0].sum() / true_mass[..., 0].sum(),
               "sharp": edge[0] / edge[1], "motion": move[0] / move[1],
               "copying": ((video - truth) * (first - truth)).sum() / (first - truth).square().sum()}
    return {name: float(number) for name, number in numbers.items()}    # tensors kept would scatter the heap


def new_case(seed, clips, frames, points="drag", change=None, speed=1, **options):
    """Scenes of moving objects (options: see new_scenes), `speed` times as fast as in training, and {"tracks",
    "visible"}. points: "dense" all, "drag" the centre of each object, "none". change: of the scene, "other way" (the
    same first frame, objects go the opposite way), "teleport" (half-way, they jump to the opposite place), "crossing"
    (the first two change places), "carried away" (the camera pans by its own width, and objects go with it), "dusk"
    (the light changes in the second half alone); of tracks, "two ways" (every second one goes the opposite way),
    "jittered" (by 2 % of the width), "late" (nothing is said of frames 1 to 12), "broken" (half of the pieces of 4
    frames are missing)."""
    rng = torch.Generator().manual_seed(seed_of(seed))
    options = {"camera": False, "attributes": (0, 0), "moving": True, "style": STYLE} | options
    scene = world.new_scenes(clips, frames * speed, rng, **options)
    path, t = scene["position"][:, :, ::speed], torch.arange(frames)[:, None]
    back, jump = (2 * path[:, :, :1] - path).clamp(0.05, 0.95), torch.where(t < frames // 2, path, 1 - path)
    start, turn = path[:, :, :1], (1 - torch.cos(math.pi * t / (frames - 1))) / 2
    cross = start.lerp(start[:, [1, 0, *range(2, path.shape[1])]], turn)
    scene |= {key: scene[key][:, ::speed] for key in ("pan", "zoom", "gains", "spin", "pulse")}
    if change == "carried away":
        scene["pan"] = torch.cat([(1.5 * t / frames).clamp(max=1) - 0.5, 0 * t], 1).expand(clips, -1, -1)
        path = path + scene["pan"][:, None]
    if change == "dusk":
        scene["gains"] = torch.cat([torch.ones(clips, frames // 2, 3), scene["gains"][:, :frames - frames // 2]], 1)
    scene["position"] = {"other way": back, "teleport": jump, "crossing": cross}.get(change, path)
    tracks, visible = world.scene_tracks(scene, SIZE, rng)
    n = torch.arange(tracks.shape[2])
    if change == "two ways":
        opposite, _ = world.scene_tracks(scene | {"position": back}, SIZE, rng)
        tracks = torch.where(n[:, None] % 2 == 1, opposite, tracks)
    if change == "jittered":
        tracks = tracks + 0.02 * SIZE * torch.randn(tracks.shape, generator=rng)
    gaps = torch.rand(clips, frames // 4 + 1, len(n), generator=rng).repeat_interleave(4, 1)[:, :frames] < 0.5
    silent = {"late": (t > 0) & (t < 13), "broken": (t > 3) & gaps}.get(change, t < 0)
    centres = (n < path.shape[1] * POINTS) & (n % POINTS == 0)
    told = {"dense": n >= 0, "drag": centres, "none": n < 0}[points]
    return scene, {"tracks": tracks, "visible": visible & told & ~silent}


def eval_row(run, model="student", text=NEUTRAL, later=None, piece=None, **settings):
    """Play a case (settings: of new_case, and fields of Config) and measure it, `piece` frames at a time (None: all at
    once). Of each number the mean, and that of each tenth; drift: the standard deviation of PSNR over the pieces.
    later: the text of the second half, if it is another."""
    overrides = {key: settings.pop(key) for key in [*settings] if hasattr(run.config, key)}
    (scene, motion), piece = new_case(**settings), piece or settings["frames"]
    first, start, rows, clock = world.render(scene, SIZE, 0, 1), 0, [], time.perf_counter()
    held, texts = first[:, :, :0], (embed_words(text, run.config), embed_words(later, run.config))
    for video in play(run, model, scene, motion, *texts, **overrides):
        seconds, held = time.perf_counter() - clock, torch.cat([held, video], 2)            # of the latest chunk
        while held.shape[2] >= piece and start + piece <= settings["frames"]:
            truth = world.render(scene, SIZE, start, start + piece)
            rows.append({"from": float(start), **measure(held[:, :, :piece], truth, first, scene), "seconds": seconds})
            start, held = start + piece, held[:, :, piece:]
        clock = time.perf_counter()
    numbers = torch.tensor([[*row.values()] for row in rows])
    tenths = [dict(zip(rows[0], [part[0, 0].item(), *part[:, 1:].nanmean(0).tolist()]))
              for part in numbers.split(math.ceil(len(rows) / 10))]
    mean = dict(zip(rows[0], numbers.nanmean(0).tolist()))
    return mean | {"drift": numbers[:, [*mean].index("psnr")].std(correction=0).item(), "tenths": tenths}


def grid(**values):
    """Every combination of the values, as dicts."""
    return [dict(zip(values, row)) for row in itertools.product(*values.values())]


def tables(run):
    """What is measured: {title: (what all rows have in common, [what each has besides])}: arguments of eval_row, or of
    another function, "measure"."""
    clip = {"seed": "eval 1 False", "clips": run.eval_clips, "frames": CLIP, "objects": 1}
    kinds = [{"objects": 1}, {"objects": 3, "seed": "eval 3 False"}, {"objects": 1, "change": "other way"},
             {"flat": True, "frames": 81, "seed": "eval 1 True"}, {"camera": True, "seed": "eval camera"}]
    models = grid(model=("vae", "still"), points=("none",)) + grid(model=("teacher", "causal", "student"),
                                                                   points=("dense", "drag", "none"))
    following = [kind | model for kind in kinds for model in models
                 if model["model"] != "teacher" or "flat" not in kind]
    text = [{"seed": f"text {light} {motion}", "attributes": (light, motion), "text": prompt}
            for light, motion in ((1, 0), (2, 0), (0, 1), (0, 2))           # the right one, the wrong one (1 for 2)
            for prompt in (world.caption(light, motion), world.caption(-light % 3, -motion % 3), NEUTRAL, None)]
    streams = [{"seed": f"stream {camera}", "camera": camera, "points": points, "sink": sink}
               for camera, points in ((False, "drag"), (True, "dense")) for sink in (1, 0)]
    return {"following": (clip, following), "text": (clip | {"objects": 2, "piece": CLIP // 3}, text),
            "streams": (clip | {"clips": 2, "frames": run.eval_frames, "piece": 12}, streams)}


@torch.no_grad()
def measure_tables(run, stage, tables):
    """Measure tables and print them, draw the streams. `stage`.json, {settings: {title: {row: numbers}}}, keeps every
    row when it is done, and what it has is not measured again."""
    run.check(stage)
    path = run.out / f"{stage}.json"
    settings = f"{run.settings(stage)}, {run.eval_clips} clips, {run.eval_frames} frames"
    everything = json.loads(path.read_text() if path.exists() else "{}")
    done = everything.setdefault(settings, {})
    for title, (common, rows) in tables.items():
        results = done.setdefault(title, {})
        for row in tqdm(rows, title):
            label = ", ".join(f"{key} {getattr(value, '__name__', value)}" for key, value in row.items()
                              if key not in ("seed", "measure"))
            if label not in results:
                case = {"measure": eval_row} | common | row
                results[label] = case.pop("measure")(run, **case)
                write(path, lambda temporary: temporary.write_text(json.dumps(everything, indent=1)))
        names = [name for name in results[label] if name not in ("from", "tenths")]
        print(f"\n| {title} | {' | '.join(names)} |\n{'|---' * len(names)}|---|")
        for label, result in results.items():
            print(f"| {label} |", " | ".join(f"{result[name]:.2f}" for name in names), "|")
    curves = {label: [(t["from"], t["mean"]) for t in row["tenths"]] for label, row in done["streams"].items()}
    plot(run.out / f"{stage}.png", curves, "end-point error, % of the width, over frames")


def plot(path, curves, title, width=640, height=320):
    """Lines {name: [(x, y)]} as a PNG, with the ranges written on it."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*sum(curves.values(), [])))
    draw.rectangle((50, 30, width - 10, height - 30), outline="grey")
    for x, y, text in (50, 8, title), (4, 30, f"{y1:.3g}"), (4, height - 42, f"{y0:.3g}"), \
                      (50, height - 24, f"{x0:.0f}"), (width - 50, height - 24, f"{x1:.0f}"):
        draw.text((x, y), text, fill="black")
    right, up = (width - 60) / (x1 - x0 or 1), (height - 60) / (y1 - y0 or 1)
    for i, (name, curve) in enumerate(curves.items()):
        colour = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")[i % 6]
        draw.line([(50 + right * (x - x0), height - 30 - up * (y - y0)) for x, y in curve], fill=colour, width=2)
        draw.text((width - 150, 34 + 14 * i), name, fill=colour)
    write(path, lambda temporary: page.save(temporary, "png"))


def plot_stage(run, stage):
    """Curves of a stage from stats.jsonl, each number averaged over 2 % of the stage."""
    logged, curves = map(json.loads, open(run.out / "stats.jsonl")), {}
    rows = [*{row["step"]: row for row in logged if row["stage"] == stage}.values()]    # after a crash, logged again
    for name in "loss", "loss_c", "loss_g", "loss_d", "reward", "std", "x0_none", "x0_tracks":
        values = [(row["step"], row[name]) for row in rows if name in row]
        if values:
            curves[name] = F.adaptive_avg_pool1d(torch.tensor(values).T, min(50, len(values))).T.tolist()
    plot(run.out / f"{stage}.png", curves, f"{stage}: {len(rows)} steps")


@torch.no_grad()
def preview(run, stage):
    """The stage's curves; unless it is of clips of one's own, six frames of a dragged scene in rows: truth, that
    through the VAE, each model there is; then another scene."""
    plot_stage(run, stage)
    if run.args.data:
        return
    rng = torch.Generator().manual_seed(seed_of("preview"))
    scene = world.new_scenes(2, CLIP, rng, objects=2, style=STYLE)
    tracks, visible = world.scene_tracks(scene, SIZE, rng)
    n = torch.arange(tracks.shape[2])
    centres = (n % POINTS == 0) & (n < world.OBJECTS * POINTS)
    motion = {"tracks": tracks, "visible": visible & centres}
    videos, text = [world.render(scene, SIZE)], torch.cat([embed_words(c, run.config) for c in scene["caption"]])
    models = [name for name in MODELS if run.path(name).exists()]
    videos += [torch.cat(list(play(run, name, scene, motion, text)), 2) for name in models]
    frames = torch.stack(videos, 1)[:, :, :, torch.linspace(0, CLIP - 1, 6).long()]         # (2, rows, 3, 6, H, W)
    page = frames.permute(2, 0, 1, 4, 3, 5).flatten(4).flatten(1, 3)
    page = Image.fromarray(sample.to_frames(page[None, :, None])[0])
    write(run.out / f"{stage}_preview.png", lambda path: page.save(path, "png"))


def motion_reward(video, batch):
    """How well the video (B, 3, T, H, W) follows the tracks in `batch`: (B,) in [-1, 1]. Where a track goes, the colour
    should be that of its start. 1: it is everywhere; 0: a video that stands still does as well."""
    B, _, T, H, W = video.shape
    seen = batch["visible"] & batch["visible"][:, :1]
    grid = (2 * batch["tracks"] / torch.tensor([W, H]).to(video) - 1).flatten(0, 1)[:, :, None]     # (B T, N, 1, 2)

    def error(frames):
        colours = F.grid_sample(frames.transpose(1, 2).flatten(0, 1), grid, align_corners=False).view(B, T, 3, -1)
        return ((colours - colours[:, :1]).abs().mean(2) * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)

    still, error = error(video[:, :, :1].expand_as(video)), error(video)
    return ((still - error) / (still + 0.1)).clamp(-1, 1)


def find_reward(name):
    """--reward: "motion", or a function of your own, FILE.py:FUNCTION, called as motion_reward is."""
    file, _, function = name.rpartition(":")
    try:
        return runpy.run_path(file)[function] if file else {"motion": motion_reward}[name]
    except Exception as e:                              # whatever the file does
        raise UserError(f"--reward {name}: neither motion nor FILE.py:FUNCTION ({type(e).__name__}: {e})") from None


def lpips_network(net):
    """How different images (B, 3, H, W) in [-1, 1] look (Zhang et al. 2018, arXiv 1801.03924), by the package lpips:
    a function of two of them. net: "alex" or "vgg"."""
    try:
        from lpips import LPIPS
    except (ImportError, RuntimeError) as e:            # of torchvision, if it is not made for this torch
        raise UserError(f"LPIPS: {str(e).splitlines()[0]}; pip install lpips") from None
    return LPIPS(net=net, verbose=False).eval().requires_grad_(False)


def open_lpips(net, device):
    """The mean LPIPS of two videos (B, 3, T, H, W), of every fourth frame, from another one each step; None: 0."""
    network = net and lpips_network(net).to(device)

    def distance(a, b, step):
        a, b = (video[:, :, step % 4::4].transpose(1, 2).flatten(0, 1) for video in (a, b))
        return network(a, b).mean() if network else 0.0
    return distance


def open_reference(path, config):
    """The frames of a video, uint8 (H, W, 3), one by one; its frame rate is only compared. ValueError if there are
    none."""
    try:
        reader = imageio.get_reader(path)
        frames, fps = iter(reader), reader.get_meta_data().get("fps", config.fps)
        frames = itertools.chain([next(frames)], frames)
    except Exception as e:                                              # of a dozen kinds
        raise ValueError(f"{path}: cannot be read as a video ({str(e).strip().splitlines()[0][:99]})") from None
    if abs(fps - config.fps) > 0.1:
        print(f"note: {path} is at {fps:g} frames/s, the model at {config.fps}; it is not resampled")
    return frames


def compared(frames, path, config, motion, found=None, factor=1, lpips=None):
    """sample.py --reference, --found, --lpips: hands on the frames, uint8 (H, W, 3), and in the end prints how near
    they are to those of the video `path`, cropped as the image is, as long as there are both: the mean PSNR, SSIM and,
    with `lpips`, "alex" or "vgg", LPIPS of a frame; and the mean distance in pixels of tracks `found`, (T, N, 2) and whether a
    tracker saw them (T, N), on a video enlarged by `factor`, from the visible ones of `motion`. Raises ValueError if a
    file cannot be read or does not fit."""
    if lpips and not path:
        raise ValueError("--lpips belongs to --reference")
    others = open_reference(path, config) if path else iter(())
    if found and found[0].shape[1] != motion.tracks.shape[2]:
        raise ValueError(f"--found: holds {found[0].shape[1]} tracks, {motion.tracks.shape[2]} were given")
    distance = lpips and lpips_network(lpips)

    def measured():
        rows, told = [], []
        for frame in frames:
            for other in itertools.islice(others, 1):
                truth = sample.fit_image(Image.fromarray(other).convert("RGB"), config.size)
                made = torch.from_numpy(frame).permute(2, 0, 1)[None] / 127.5 - 1
                rows.append({"PSNR": psnr(made, truth), "SSIM": ssim(made, truth).item()}
                            | ({"LPIPS": distance(made, truth).item()} if distance else {}))
            yield frame
        for name in rows[0] if rows else ():
            told.append(f"{name} {np.mean([row[name] for row in rows]):.4g}")
        if found:
            n = min(len(found[0]), motion.tracks.shape[1])
            both = motion.visible[0, :n].numpy() & found[1][:n]
            apart = np.linalg.norm(motion.tracks[0, :n].numpy() - found[0][:n] / factor, axis=-1)[both]
            told.append(f"EPE {apart.mean():.4g} of {both.sum()} points" if len(apart) else "EPE of no point")
        print(f"{len(rows)} frames of {path}: " * bool(path) + ", ".join(told))

    return measured()


def new_run(argv, stage, description=__doc__):
    """The Run whose weights are measured; those that are shipped, where --out has none."""
    from train_distill import PROCESSES, Run, check_flags, new_parser
    if PROCESSES > 1:
        raise UserError("it is measured in one process, leave out torchrun")
    parser = new_parser(description)
    count = sample.number(int, 1, 10 ** 9)
    parser.add_argument("--clips", type=count, help="of each kind that is measured (16)")
    parser.add_argument("--frames", type=count, help="length of the streams that are measured (10000)")
    parser.set_defaults(stage=stage)
    args = check_flags(parser, parser.parse_args(argv))
    run = Run(args)
    run.eval_clips = args.clips or (1 if args.smoke else 16)
    run.eval_frames = args.frames or (33 if args.smoke else 10_000)
    run.out.mkdir(parents=True, exist_ok=True)
    print(f"{'the shipped weights' if run.shipped else run.out}: {run.config}")
    return run


def main(argv=None):
    """Measure the README's tables."""
    from train_distill import reported

    def work():
        run = new_run(argv, "eval")
        measure_tables(run, "eval", tables(run))
    return reported(work)


if __name__ == "__main__":
    sys.exit(main())
