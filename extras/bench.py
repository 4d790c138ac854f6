"""How fast a model streams, with random weights: any preset, on a CPU or a GPU, in one table that
says what it counts.

    python -m extras.bench                                      the tiny model on this CPU
    python -m extras.bench --preset motionstream-1.3b --device cuda --dtype bfloat16 --decoder tiny
    python -m extras.bench --preset motionstream-1.3b --predict     no GPU: counts, and what they
                                                                    predict
    python -m extras.bench --long 10000                         does it stay as fast?
    python -m extras.bench --training                           one DMD step as well

Times are medians over chunks, once the cache is full. Nothing else should run meanwhile. FLOPs,
bytes and launches are counted on tensors without contents, so that the same numbers come of every
machine.
"""

import contextlib
import itertools
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import sample
import train_distill
from extras.compiling import compile_blocks, frames_beside
from motionstream import (CLIP_ROWS, FLOAT32, FRAMES, PRESETS, Config, chunk_sizes, new_model,
                          rollout, schedule, start_points, track_ids)
from sample import Parser, number
from vae import LinearVAE, LinearVAEConfig, TinyVAE, TinyVAEConfig, WanVAE, WanVAEConfig

GRID = 8                # tracks per side of the picture
PAST = 6                # chunks in an unlimited cache: as many precede the last chunk of 81 frames
CPU = torch.device("cpu")
CLIP_LATENTS = 21       # of 81 frames, the clip of a DMD step


@dataclass(frozen=True)
class Job:
    """What is measured, and on which device."""
    config: Config
    device: torch.device
    dtype: torch.dtype          # of DiT and VAE
    decoder: str                # "own", the family's VAE, or "tiny", one with the layout of TAEHV


@dataclass(frozen=True)
class Part:
    """A step that is timed or counted. frames: made by it and the parts before it; 0: none."""
    name: str
    work: Callable
    counts: str
    frames: int = 0


@dataclass(frozen=True)
class Row:
    """A row of the table. seconds: per chunk, frame or training step."""
    name: str
    seconds: float
    counts: str
    frames: int = 0             # produced; 0: no rate is shown
    flops: float = 0.0          # 0: not shown


# Published numbers as stated: name, frames/s, latency in seconds, what is counted.
PAPERS = (
    ("MotionStream 1.3B, Wan's VAE", "16.7", "0.69",
     "H100, bfloat16, FlashAttention 3, 832x480, c3s1w1, 3 passes + cache update + decoding; "
     "latency: one chunk (table A2)"),
    ("MotionStream 1.3B, tiny VAE", "29.5", "0.39",
     "the same with a decoder of 9.84 M parameters"),
    ("MotionStream 5B, Wan's VAE", "10.4", "1.14",
     "the same at 1280x704"),
    ("MotionStream 5B, tiny VAE", "23.9", "0.49",
     "the same with a decoder of 56.7 M parameters"),
    ("Self-Forcing 1.3B", "17", "",
     "H100, 4 passes + cache update, up to 21 latents; whether the VAE is in it is an open "
     "question (its issue 67); 13.1 by others for 81 frames in 6.2 s"),
    ("Reward Forcing 1.3B", "23.1", "",
     "H100, 4 passes; 13.7 by others for 81 frames in 5.9 s (its issue 13)"),
    ("FlashDreams, Self-Forcing 1.3B", "34.9", "",
     "H100, 12 frames in 344 ms: 4 passes alone, 21 latents of context, cuDNN attention, "
     "compiled, CUDA graphs"),
)


# --------------------------------------------------------------------------------------------------
# Models with random weights.

def randomise(module, device, dtype_of):
    """Initialise a module from the meta device on its target device, so that the matrices of 14
    billion parameters are allocated only once. dtype_of: function of a parameter's name."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        made = torch.empty(tensor.shape, dtype=dtype_of(name), device=device)
        tensors[name] = made.normal_(std=0.02)
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def random_model(config, device, dtype):
    """A DiT with random matrices in dtype."""
    def dtype_of(name):
        return torch.float32 if re.search(FLOAT32, name) else dtype

    with torch.device("meta"):
        model = new_model(config)
    return randomise(model, device, dtype_of)


def new_vae(config, decoder, device, dtype):
    """A random VAE for the config's latents. decoder: see Job."""
    channels = config.out_dim
    with torch.device("meta"):
        if config.copies:
            vae = LinearVAE(LinearVAEConfig(channels, config.stride))
        elif decoder == "tiny" or config.text_encoder == "words":
            vae = TinyVAE(TinyVAEConfig(channels, config.stride // 8))
        elif config.stride == 16:
            vae = WanVAE(WanVAEConfig(48, 160, 256, residual=True))
        else:
            vae = WanVAE()
    return randomise(vae, device, lambda name: dtype)


def random_conditions(config, frames, device):
    """Random conditions for a clip of `frames` latents: the model's keyword arguments."""
    height, width = config.latent_size
    given = {"text": torch.randn(1, config.text_len, config.text_dim, device=device)}
    if config.track_dim:
        tracks = (1, config.track_dim, frames, height, width)
        given["tracks"] = torch.randn(tracks, device=device)
    if config.copies:
        copies = (1, config.copy_dim, frames, height, width)
        given["copies"] = torch.randn(copies, device=device)
        image = (1, config.out_dim, 1, height, width)
        given["image"] = torch.randn(image, device=device)
    if config.clip_dim:
        given["clip"] = torch.randn(1, CLIP_ROWS, config.clip_dim, device=device)
    return given


def random_latents(config, frames, device):
    """Random latents (1, C, frames, h, w)."""
    height, width = config.latent_size
    return torch.randn(1, config.out_dim, frames, height, width, device=device)


def new_motion(config, frames):
    """A grid of tracks that drift to the right, for so many frames, as sample.Motion."""
    height, width = config.size
    x = (torch.arange(GRID) + 0.5) * width / GRID
    y = (torch.arange(GRID) + 0.5) * height / GRID
    start = torch.cartesian_prod(x, y)                                  # (N, 2)
    drift = torch.arange(frames)[:, None, None] * torch.tensor([0.25, 0.0])
    tracks = (start + drift)[None]                                      # (1, T, N, 2)
    visible = torch.ones(tracks.shape[:3], dtype=torch.bool)
    ids = track_ids(tracks, config)
    return sample.Motion(tracks, visible, ids, start_points(tracks, visible))


# --------------------------------------------------------------------------------------------------
# What is timed and counted.

def chunks_held(config):
    """Number of chunks in a full cache."""
    return PAST if config.window is None else config.sink + config.window


def chunk_parts(model, vae):
    """The parts of one chunk in order of execution, and the full caches."""
    config = model.config
    device = next(model.parameters()).device
    noise = random_latents(config, config.chunk, device)
    conditions = random_conditions(config, config.chunk, device)
    clean = torch.zeros(1, device=device)
    caches = model.new_caches()
    for _ in range(chunks_held(config)):
        model(noise, clean, caches=caches, write=True, **conditions)
    _, state = vae.decode(noise)

    def denoise():
        for sigma in config.sigmas:
            model(noise, torch.full((1,), sigma, device=device), caches=caches, **conditions)

    def remember():
        model(noise, clean, caches=caches, write=True, **conditions)

    def decode():
        vae.decode(noise, state)

    frames = FRAMES * config.chunk
    passes = f"{len(config.sigmas)} passes of the DiT through a full cache"
    return [Part("DiT", denoise, passes, frames),
            Part("with cache update", remember, "and the clean pass that writes the cache", frames),
            Part("with decoding", decode, "and the VAE's decoder", frames)], caches


def training_parts(job):
    """A DMD step on one clip of 81 frames, all weights in job.dtype, with recomputation in the
    backward. Excludes the optimizer's update, and the VAE, which is not used. Every rollout ends at
    the last step, the longest; no image is given (first_latent)."""
    config = replace(job.config, causal=False)
    generator = random_model(job.config, job.device, job.dtype)
    critic = random_model(config, job.device, job.dtype)
    teacher = random_model(config, job.device, job.dtype)
    for model in generator, critic:
        model.requires_grad_(True)
        model.recompute_blocks()
    noise = random_latents(config, CLIP_LATENTS, job.device)
    conditions = random_conditions(config, CLIP_LATENTS, job.device)
    last = len(config.sigmas) - 1

    def roll_out():
        chunks = rollout(generator, noise, conditions, exit_step=last)
        count = len(list(chunk_sizes(config, CLIP_LATENTS)))
        return torch.cat(list(itertools.islice(chunks, count)), 2)     # the last is not cached

    def generator_step():
        x0 = roll_out()
        loss = train_distill.dmd_loss(x0, teacher, critic, conditions, None, config.shift)
        loss.backward()
        generator.zero_grad()

    def critic_step():
        with torch.no_grad():
            x0 = roll_out()
        loss = train_distill.critic_loss(x0, critic, conditions, None, config.shift)
        loss.backward()
        critic.zero_grad()

    guided = "guided" if any(config.guidance) else "plain"
    of_generator = (f"rollout of {CLIP_LATENTS} latents, {last + 1} passes; {guided} teacher, "
                    "critic; backward")
    of_critic = ("the rollout without a graph, critic, backward; the papers make 5 of them for "
                 "each of the generator")
    return [Part("generator's step", generator_step, of_generator),
            Part("critic's step", critic_step, of_critic)]


# --------------------------------------------------------------------------------------------------
# Counts.

# Operations without a kernel of their own: they make room, or look at what is there.
FREE = ("prim", "aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view",
        "aten.lift_fresh", "aten.alias")


def cpu_attention(q, k, v, *args, out_val=None, **kwargs):
    """FLOPs of the CPU's attention kernel, which torch does not count."""
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def cpu_attention_backward(grad, q, k, v, *args, out_val=None, **kwargs):
    """FLOPs of its backward."""
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


aten = torch.ops.aten
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_FLOPS = {
    CPU_ATTENTION: cpu_attention,
    CPU_ATTENTION_BACKWARD: cpu_attention_backward,
}


def kind_of(name):
    """Category of an operation's FLOPs: "attention", "convolution", "matmul" or "other"."""
    for word in "attention", "convolution":
        if word in name:
            return word
    if re.search(r"mm", name):
        return "matmul"
    return "other"


class Counts(TorchDispatchMode):
    """Cost of the tensor operations inside `with` if each is a kernel of its own, as in eager mode:
    launches, bytes read and written, and FLOPs, each a Counter by kind_of. Views cost nothing. A
    multiplication and an addition are two FLOPs; elementwise operations' are not counted."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()
        self.bytes = Counter()
        self.flops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func)
        if func.is_view or name.startswith(FREE):
            return result
        kind = kind_of(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
        self.launches[kind] += 1
        self.bytes[kind] += size_of(tensors)
        formula = CPU_FLOPS.get(func.overloadpacket, flop_registry.get(func.overloadpacket))
        if formula:
            self.flops[kind] += formula(*args, **kwargs, out_val=result)
        return result


@contextlib.contextmanager
def norms_of_a_gpu():
    """Inside `with`, count RMSNorm as on a GPU: one kernel that moves as many bytes as LayerNorm's.
    A CPU uses six kernels and, in bfloat16, seven times the bytes."""
    real = F.rms_norm
    F.rms_norm = F.layer_norm
    try:
        yield
    finally:
        F.rms_norm = real


def count_part(part):
    """Counts of a Part."""
    with norms_of_a_gpu(), Counts() as counts:
        part.work()
    return counts


def counted_chunk(job):
    """[(Part, Counts)] of one chunk. Nothing is computed, so any size will do."""
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
        model = random_model(job.config, CPU, job.dtype)
        vae = new_vae(job.config, job.decoder, CPU, job.dtype)
        parts, _ = chunk_parts(model, vae)
        return [(part, count_part(part)) for part in parts]


def counted_training(job):
    """[(Part, Counts)] of a DMD step."""
    with FakeTensorMode():
        return [(part, count_part(part)) for part in training_parts(replace(job, device=CPU))]


# --------------------------------------------------------------------------------------------------
# What a full-size GPU would need, by the counts. The rates are estimates of an H100 or H200, not
# measured here: what cuBLAS and cuDNN reach at such shapes, and the bandwidth that kernels reach
# which only move bytes.

RATES = {"matmul": 650e12, "attention": 565e12, "convolution": 320e12}      # FLOPs/s
BANDWIDTH = 3.5e12                                                          # bytes/s


def predicted_seconds(counts):
    """Predicted time of Counts. A matrix product, attention or convolution takes the longer of its
    FLOPs' and its bytes' time; other operations their bytes' time. Launches overlap with them."""
    seconds = counts.bytes["other"] / BANDWIDTH
    for kind, rate in RATES.items():
        seconds += max(counts.flops[kind] / rate, counts.bytes[kind] / BANDWIDTH)
    return seconds


def print_counts(counted):
    """Print the counts as a Markdown table."""
    columns = ["counted", "launches", "GB"] + [f"TFLOP, {kind}" for kind in RATES]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for part, counts in counted:
        flops = " | ".join(f"{counts.flops[kind] / 1e12:.4g}" for kind in RATES)
        moved = counts.bytes.total() / 1e9
        print(f"| {part.name} | {counts.launches.total():,} | {moved:.4g} | {flops} |")


# --------------------------------------------------------------------------------------------------
# Times.

def wait_for(device):
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work, device, repeats):
    """Median time of `work()` over the given number of calls, after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return torch.tensor(times[2:]).median().item()


def matmul_rate(device, dtype):
    """FLOPs/s of a square matrix product, best of three: the peak for the table's percentages."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = min(median_seconds(lambda: a @ a, device, 1) for _ in range(3))
    return 2 * size ** 3 / seconds


def summed_rows(parts, seconds, flops):
    """A Row for each part of a chunk, cumulative over the parts before it."""
    rows = []
    for i, part in enumerate(parts):
        seconds_so_far = sum(seconds[:i + 1])
        flops_so_far = sum(flops[:i + 1])
        rows.append(Row(part.name, seconds_so_far, part.counts, part.frames, flops_so_far))
    return rows


@dataclass(frozen=True)
class Times:
    """Times of one chunk of a stream, by time.perf_counter()."""
    asked: float        # its tracks were read
    shown: float        # its first frame was in the CPU's memory, as bytes
    done: float         # its last frame was


def watched(model, vae, motion, text, ahead):
    """The whole program, from an image and tracks to frames in the CPU's memory. Yields each
    chunk's Times. ahead: on a GPU as sample.py --compile does, see compiling.frames_beside;
    `asked` may be the next one's."""
    config = model.config
    image = torch.rand(1, 3, *config.size, device=text.device) * 2 - 1
    clip = None
    if config.clip_dim:
        clip = torch.randn(1, CLIP_ROWS, config.clip_dim, device=text.device)
    asked = []

    def live():
        for part in sample.motion_by_chunk(motion, config):
            asked.append(time.perf_counter())
            yield part

    latents = sample.stream_latents(model, vae, image, live(), sample.Encoded(text, clip=clip))
    chunks = map(sample.to_frames, sample.decode(vae, latents))
    if ahead and text.device.type == "cuda":
        chunks = frames_beside(vae, latents, text.device, sample.to_frames)
    for chunk in chunks:
        frames = iter(chunk)
        next(frames)
        shown = time.perf_counter()
        for _ in frames:
            pass
        yield Times(asked[-1], shown, time.perf_counter())


def seconds_between(times):
    """Seconds from the end of each chunk to the end of the next."""
    return [after.done - before.done for before, after in itertools.pairwise(times)]


def program_rows(model, vae, text, repeats, flops, ahead):
    """Rows of the whole program. flops: per chunk; ahead: see watched."""
    config = model.config
    held = chunks_held(config)
    chunks = held + repeats + 2
    frames = FRAMES * config.chunk
    motion = new_motion(config, frames * chunks - FRAMES + 1)
    times = list(watched(model, vae, motion, text, ahead))              # also a warm-up
    chunk = torch.tensor(seconds_between(times)[held:]).median().item()
    started = time.perf_counter()
    times = list(watched(model, vae, motion, text, ahead=False))
    pixel = torch.tensor([t.shown - t.asked for t in times[held:]]).median().item()
    first = times[0].shown - started
    return [
        Row("end to end", chunk,
            "and noise, track head and copies, frames as bytes on the CPU; with --compile a GPU "
            "decodes and copies a chunk while it makes the next", frames, flops),
        Row("first pixel", pixel,
            "from the reading of a chunk's tracks to its first frame, as bytes on the CPU; live, "
            "where no chunk is begun before the last is shown"),
        Row("first frame", first,
            "from pixels and tracks: encoding, the first chunk, its decoding"),
    ]


def memory_now(device):
    """Bytes in use: torch's on a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def print_long(model, vae, text, frames, ahead):
    """Compare chunk times and memory at the beginning with those after a long stream. ahead: see
    watched."""
    config = model.config
    device = text.device
    settled = chunks_held(config) + 2
    per_chunk = FRAMES * config.chunk
    chunks = max(math.ceil(frames / per_chunk), settled + 4)
    motion = new_motion(config, per_chunk * chunks - FRAMES + 1)
    times = []
    memory = []
    for each in watched(model, vae, motion, text, ahead):
        times.append(each)
        memory.append(memory_now(device))
    seconds = torch.tensor(seconds_between(times)[settled:], dtype=torch.float64)
    some = min(100, len(seconds) // 2)
    first = seconds[:some].median().item()
    last = seconds[-some:].median().item()
    change = 100 * (last / first - 1)
    before = memory[settled] / 2 ** 20
    after = memory[-1] / 2 ** 20
    print(f"\n{per_chunk * chunks:,} frames: {1000 * first:.1f} ms a chunk, median of the first "
          f"{some} with a full cache; {1000 * last:.1f} of the last, {change:+.1f} %. Memory "
          f"{before:,.1f} MiB after {settled + 1} chunks, {after:,.1f} at the end")


# --------------------------------------------------------------------------------------------------
# Memory.

def size_of(tensors):
    """Size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_rows(model, vae, caches, device):
    """(name, bytes, what is counted) of each component."""
    held = [tensor for cache in caches for pair in cache.chunks for tensor in pair]
    weights = size_of(model.parameters()) + size_of(vae.parameters())
    rows = [
        ("weights", weights, "of DiT and VAE"),
        ("KV cache", size_of(held), "of all layers, full"),
    ]
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        rows.append(("most at once", most, "that torch held on the GPU"))
    elif most_memory():
        rows.append(("most at once", most_memory(), "of the whole process, Python and torch too"))
    return rows


def most_memory():
    """Peak memory of this process in bytes; None on Windows, which does not report it."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return most
    return 1024 * most                      # Linux counts in kB


# --------------------------------------------------------------------------------------------------
# The program.

def machine(device):
    """Description of the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*: (.+)", info.read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_rows(rows, peak):
    """Print the rows as a Markdown table. peak: FLOPs/s."""
    print("| | milliseconds | frames/s | TFLOP | of the peak | counts |\n|---|---|---|---|---|---|")
    for row in rows:
        milliseconds = f"{1000 * row.seconds:.1f}"
        rate = f"{row.frames / row.seconds:.1f}" if row.frames else ""
        flops = f"{row.flops / 1e12:.3g}" if row.flops else ""
        share = f"{row.flops / row.seconds / peak:.0%}" if row.flops else ""
        print(f"| {row.name} | {milliseconds} | {rate} | {flops} | {share} | {row.counts} |")


def print_papers():
    """Print published numbers for comparison."""
    print("\n| as published | frames/s | latency, s | counts |\n|---|---|---|---|")
    for row in PAPERS:
        print("| " + " | ".join(row) + " |")


def print_predicted(job, training):
    """Print counts and the times predicted from them."""
    counted = counted_chunk(job)
    steps = counted_training(job) if training else []
    print_counts(counted + steps)
    rates = ", ".join(f"{kind} {rate / 1e12:.0f}" for kind, rate in RATES.items())
    print("\nPREDICTED from these counts, not measured, for one H100 or H200 without "
          f"torch.compile: {rates} TFLOP/s, {BANDWIDTH / 1e12} TB/s. The peak is 989 TFLOP/s.\n")
    parts = [part for part, _ in counted]
    seconds = [predicted_seconds(counts) for _, counts in counted]
    flops = [counts.flops.total() for _, counts in counted]
    rows = summed_rows(parts, seconds, flops)
    shown = seconds[0] + seconds[2]
    about = "the passes and the decoding of a whole chunk, no copy to the CPU"
    rows.append(Row("first pixel", shown, about))
    for part, counts in steps:
        rows.append(Row(part.name, predicted_seconds(counts), part.counts, 0, counts.flops.total()))
    print_rows(rows, 989e12)
    print_papers()


def print_measured(job, repeats, long, compiled):
    """Print streaming's table, its memory and, with `long`, the results of a long stream."""
    model = random_model(job.config, job.device, job.dtype)
    vae = new_vae(job.config, job.decoder, job.device, job.dtype)
    text = random_conditions(job.config, 1, job.device)["text"]
    if compiled:
        compile_blocks(model)
    flops = [counts.flops.total() for _, counts in counted_chunk(job)]
    peak = matmul_rate(job.device, job.dtype)
    print(f"peak: {peak / 1e12:.4g} TFLOP/s, of a square matrix product in this run\n")
    parts, caches = chunk_parts(model, vae)
    seconds = [median_seconds(part.work, job.device, repeats) for part in parts]
    rows = summed_rows(parts, seconds, flops)
    rows += program_rows(model, vae, text, repeats, sum(flops), compiled)
    print_rows(rows, peak)
    print_papers()
    print("\n| memory | MiB | counts |\n|---|---|---|")
    for name, size, counts in memory_rows(model, vae, caches, job.device):
        print(f"| {name} | {size / 2 ** 20:,.0f} | {counts} |")
    if long:
        print_long(model, vae, text, long, compiled)
    return peak


def print_training(job, repeats, peak):
    """Print the table of a DMD step."""
    flops = [counts.flops.total() for _, counts in counted_training(job)]
    rows = []
    for part, work in zip(training_parts(job), flops):
        seconds = median_seconds(part.work, job.device, repeats)
        rows.append(Row(part.name, seconds, part.counts, 0, work))
    print()
    print_rows(rows, peak)


def parse_flags(argv):
    """The command line."""
    first_paragraph = __doc__.split("\n\n")[0]
    parser = Parser(prog="python -m extras.bench", description=first_paragraph)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="(tiny)")
    add("--device", default="cpu", help="cpu, cuda, … (cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of DiT and VAE (float32; --predict: bfloat16)")
    add("--decoder", choices=("own", "tiny"), default="own",
        help="the family's VAE, or one as small as TAEHV (own)")
    add("--steps", type=number(int, 1, 100), help="passes of the DiT for a chunk (the preset's)")
    add("--memory", type=sample.memory_flag, metavar="cNsNwN",
        help="chunk, sink, window, as for sample.py (the preset's)")
    add("--repeats", type=number(int, 1, 10_000), default=15, help="chunks that are timed (15)")
    add("--compile", action="store_true", help="compile the DiT's blocks")
    add("--long", type=number(int, 1, 10_000_000), default=0, metavar="FRAMES",
        help="stream so many, too: 10000")
    add("--training", action="store_true", help="time a DMD step, too")
    add("--predict", action="store_true", help="time nothing: count, and predict for a large GPU")
    return parser.parse_args(argv)


def student(preset, memory, steps):
    """The preset as a student. memory: fields of Config; steps: None, the preset's."""
    config = replace(PRESETS[preset], causal=True, **memory or {})
    if steps:
        config = replace(config, sigmas=schedule(steps, config.shift))
    if config.copies:
        config = replace(config, latent_std=(1.0,) * config.out_dim)
    return config


def run(argv):
    """Measure, and print the tables. Returns the exit code."""
    flags = parse_flags(argv)
    device = sample.find_device(flags.device)
    config = student(flags.preset, flags.memory, flags.steps)
    dtype = flags.dtype or ("bfloat16" if flags.predict else "float32")
    job = Job(config, device, getattr(torch, dtype), flags.decoder)
    torch.manual_seed(0)
    height, width = config.size
    print(f"{flags.preset}, {width}x{height} pixels, chunk {config.chunk}, sink {config.sink}, "
          f"window {config.window}, {dtype}, random weights")
    if flags.predict:
        print_predicted(job, flags.training)
        return 0
    print(machine(device))
    with torch.inference_mode():
        peak = print_measured(job, flags.repeats, flags.long, flags.compile)
    if flags.training:
        print_training(job, min(flags.repeats, 3), peak)
    return 0


def main(argv=None):
    """`run`, with its errors as one line and an exit code."""
    return sample.reported(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
