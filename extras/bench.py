"""How fast a model streams, with random weights: any preset, on a CPU or a GPU, in one table that says what it counts.

    python -m extras.bench                                                  the tiny model on this CPU
    python -m extras.bench --preset motionstream-1.3b --device cuda --dtype bfloat16
    python -m extras.bench --preset motionstream-1.3b --device cuda --decoder tiny     with a decoder as small as TAEHV

Times are medians over chunks, once the cache is full. Nothing else should run meanwhile.
"""

import itertools
import platform
import re
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import sample
from extras.evaluate import check_device
from motionstream import CLIP_ROWS, FLOAT32, PRESETS, new_model, schedule, start_points, track_ids
from sample import Parser, number
from vae import LinearVAE, LinearVAEConfig, TinyVAE, TinyVAEConfig, WanVAE, WanVAEConfig

GRID = 8                # tracks per side of the picture
PAST = 6                # chunks held by a cache that holds all: the last of 81 frames has as many before it


@dataclass(frozen=True)
class Row:
    """A line of the table. seconds: for one chunk, or for the first frame."""
    name: str
    seconds: float
    counts: str
    frames: int = 0         # that come of it; 0: no rate is told


# ----------------------------------------------------------------------------------------------------------------------
# Models with random weights.

def random_model(config, device, dtype):
    """A DiT whose matrices are in dtype, made where it runs: those of 14 billion parameters are made only once."""
    with torch.device("meta"):
        model = new_model(config).to(dtype)
    for name, parameter in model.named_parameters():
        if re.search(FLOAT32, name):
            parameter.data = parameter.data.float()
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def new_vae(config, decoder, device):
    """The VAE of such latents, in float32. decoder: "own", that of the family, or "tiny", one with the layout of
    TAEHV."""
    channels = config.out_dim
    if config.copies:
        vae = LinearVAE(LinearVAEConfig(channels, config.stride))
    elif decoder == "tiny" or config.text_encoder == "words":
        vae = TinyVAE(TinyVAEConfig(channels, config.stride // 8))
    elif config.stride == 16:
        vae = WanVAE(WanVAEConfig(48, 160, 256, residual=True))
    else:
        vae = WanVAE()
    return vae.to(device).eval().requires_grad_(False)


def new_text(config, device):
    """A text as long as can be, (1, L, text_dim)."""
    return torch.randn(1, config.text_len, config.text_dim, device=device)


def new_motion(config, frames):
    """A grid of tracks that drift to the right, for so many frames, as sample.Motion."""
    height, width = config.size
    x = (torch.arange(GRID) + 0.5) * width / GRID
    y = (torch.arange(GRID) + 0.5) * height / GRID
    start = torch.cartesian_prod(x, y)                                  # (N, 2)
    drift = torch.arange(frames)[:, None, None] * torch.tensor([0.25, 0.0])
    tracks = (start + drift)[None]                                      # (1, T, N, 2)
    visible = torch.ones(tracks.shape[:3], dtype=torch.bool)
    ids = track_ids(tracks, visible, config)
    return sample.Motion(tracks, visible, ids, start_points(tracks, visible))


# ----------------------------------------------------------------------------------------------------------------------
# Times.

def wait_for(device):
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work, device, repeats):
    """Of so many calls of work(), after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return torch.tensor(times[2:]).median().item()


def full_caches(model, conditions, noise):
    """Caches that hold as many chunks as they ever will."""
    config = model.config
    chunks = PAST if config.window is None else config.sink + config.window
    caches = model.new_caches()
    for _ in range(chunks):
        model(noise, torch.zeros(1, device=noise.device), caches=caches, write=True, **conditions)
    return caches


def chunk_rows(model, vae, text, repeats):
    """The parts of a chunk, each with what comes before it."""
    config = model.config
    device = text.device
    height, width = config.size
    shape = (config.chunk, height // config.stride, width // config.stride)
    noise = torch.randn(1, config.out_dim, *shape, device=device)
    conditions = {"text": text, "image": None, "tracks": None, "clip": None}
    if config.track_dim:
        conditions["tracks"] = torch.randn(1, config.track_dim, *shape, device=device)
    if config.copies:
        conditions["copies"] = torch.randn(1, config.copy_dim, *shape, device=device)
        conditions["image"] = noise
    if config.clip_dim:
        conditions["clip"] = torch.randn(1, CLIP_ROWS, config.clip_dim, device=device)
    caches = full_caches(model, conditions, noise)
    _, state = vae.decode(noise)

    def denoise():
        for sigma in config.sigmas:
            model(noise, torch.full((1,), sigma, device=device), caches=caches, **conditions)

    def remember():
        model(noise, torch.zeros(1, device=device), caches=caches, write=True, **conditions)

    def decode():
        vae.decode(noise, state)

    frames = 4 * config.chunk
    total = 0
    rows = []
    passes = len(config.sigmas)
    for name, work, counts in (
            ("DiT", denoise, f"{passes} passes of the DiT through a full cache"),
            ("with cache update", remember, "and the clean pass that writes the cache"),
            ("with decoding", decode, "and the VAE's decoder")):
        total += median_seconds(work, device, repeats)
        rows.append(Row(name, total, counts, frames))
    return rows, caches


def program_rows(model, vae, text, repeats):
    """The whole program: from the image and tracks to frames in the CPU's memory."""
    config = model.config
    device = text.device
    held = PAST if config.window is None else config.sink + config.window
    chunks = held + repeats + 2
    motion = new_motion(config, 4 * config.chunk * chunks - 3)
    image = torch.rand(1, 3, *config.size, device=device) * 2 - 1
    times = []
    for _ in range(2):                                  # of the first stream only the beginning counts: it warms up
        wait_for(device)
        started = time.perf_counter()
        frames = stream_frames(model, vae, image, motion, text)
        next(frames)
        first = time.perf_counter() - started
    for _ in itertools.islice(frames, 4 * config.chunk - 4):
        pass                                            # the rest of the first chunk
    for _ in range(chunks - 1):
        started = time.perf_counter()
        for _ in itertools.islice(frames, 4 * config.chunk):
            pass
        times.append(time.perf_counter() - started)
    chunk = torch.tensor(times[held:]).median().item()
    return [
        Row("end to end", chunk, "and noise, track head and copies, frames as bytes on the CPU", 4 * config.chunk),
        Row("first frame", first, "from pixels and tracks: encoding, the first chunk, its decoding")]


def stream_frames(model, vae, image, motion, text):
    """Frames, uint8 (H, W, 3), one by one, as sample.py makes them."""
    clip = None
    if model.config.clip_dim:
        clip = torch.randn(1, CLIP_ROWS, model.config.clip_dim, device=image.device)
    for video in sample.stream(model, vae, image, motion, sample.Encoded(text, clip=clip)):
        yield from sample.to_frames(video)


# ----------------------------------------------------------------------------------------------------------------------
# Memory.

def size_of(tensors):
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_rows(model, vae, caches, device):
    """(name, bytes, what is counted)."""
    held = [tensor for cache in caches for pair in cache.chunks for tensor in pair]
    rows = [
        ("weights", size_of(model.parameters()) + size_of(vae.parameters()), "of DiT and VAE"),
        ("KV cache", size_of(held), "of all layers, full")]
    if device.type == "cuda":
        rows.append(("most at once", torch.cuda.max_memory_allocated(device), "that torch held on the GPU"))
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(("most at once", most, "of the whole process, Python and torch too"))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The program.

def machine(device):
    """What it runs on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*: (.+)", info.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(rows, memory):
    """In Markdown."""
    print("| | milliseconds | frames/s | counts |\n|---|---|---|---|")
    for row in rows:
        rate = f"{row.frames / row.seconds:.1f}" if row.frames else ""
        print(f"| {row.name} | {1000 * row.seconds:.1f} | {rate} | {row.counts} |")
    print("\n| memory | MiB | counts |\n|---|---|---|")
    for name, size, counts in memory:
        print(f"| {name} | {size / 2 ** 20:,.0f} | {counts} |")


def parse_flags(argv):
    """The command line."""
    parser = Parser(prog="python -m extras.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="(tiny)")
    add("--device", default="cpu", help="cpu, cuda, … (cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the DiT (float32)")
    add("--decoder", choices=("own", "tiny"), default="own", help="the family's VAE, or one as small as TAEHV (own)")
    add("--steps", type=number(int, 1, 100), help="passes of the DiT for a chunk (the preset's)")
    add("--memory", type=sample.memory, metavar="cNsNwN", help="chunk, sink, window, as for sample.py (the preset's)")
    add("--repeats", type=number(int, 1, 10_000), default=15, help="chunks that are timed (15)")
    add("--compile", action="store_true", help="compile the DiT's blocks")
    return parser.parse_args(argv)


def config_of(args):
    """The preset as a student, with what the flags say."""
    config = replace(PRESETS[args.preset], causal=True)
    config = replace(config, **args.memory or {})
    if args.steps:
        config = replace(config, sigmas=schedule(args.steps, config.shift))
    if config.copies:
        config = replace(config, latent_std=(1.0,) * config.out_dim)
    return config


@torch.inference_mode()
def run(argv):
    """Measure, and print the table. Returns the exit code."""
    args = parse_flags(argv)
    check_device(args.device)
    device = torch.device(args.device)
    config = config_of(args)
    torch.manual_seed(0)
    model = random_model(config, device, getattr(torch, args.dtype))
    vae = new_vae(config, args.decoder, device)
    text = new_text(config, device)
    if args.compile:
        for block in model.blocks:
            block.compile()
    height, width = config.size
    print(f"{args.preset}, {width}x{height} pixels, chunk {config.chunk}, sink {config.sink}, window {config.window}, "
          f"{args.dtype}, {type(vae).__name__}, random weights\n{machine(device)}\n")
    rows, caches = chunk_rows(model, vae, text, args.repeats)
    rows += program_rows(model, vae, text, args.repeats)
    print_table(rows, memory_rows(model, vae, caches, device))
    return 0


def main(argv=None):
    """`run`, with its errors as one line and an exit code."""
    return sample.reported(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
