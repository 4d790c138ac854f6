"""What a training would take, before there is one: train_distill.py --dry-run PRESET.

The losses of train_distill.py are run on tensors without contents, under bfloat16 as on a GPU, so
that what is counted is what would be computed and kept, attention's backward and recomputation
among it. All counts are linear in the number of layers: one and two of them tell the rest.
"""

import functools
import itertools
import math
import weakref
from dataclasses import asdict, dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import train_distill as td
from extras.bench import CPU, Counts, new_vae, random_conditions
from motionstream import (CLIP_ROWS, chunk_sizes, guided_velocity, new_model, rollout,
                          split_conditions)

GPUS = (1, 4, 8)
CARDS = {               # GiB that a program finds on one
    "24 GB": 23.5,      # RTX 3090, 4090
    "48 GB": 44.5,      # L40S
    "80 GB": 79.1,      # A100, H100
    "141 GB": 139.8,    # H200
    "180 GB": 178.0,    # B200
}
SPARE = 0.9             # the share of it that is filled: the allocator and CUDA need the rest
GIB = 2 ** 30

# Of public encoders, which clips need once (UMT5-XXL in bfloat16, CLIP ViT-H in float32).
ENCODERS = 13.9e9       # bytes
TEXT_ROWS = 200         # of a long caption, at most 512
MOST_TRACKS = 2500      # of a clip: the paper's grid of 50x50

# Of the teacher's two stages (section 4.1).
PAPER_CLIPS = {"first set": 600_000, "second set": 70_000}
PAPER_5B_CLIPS = {"first set": 600_000, "second set": 30_000}


# --------------------------------------------------------------------------------------------------
# What is counted.

class Costs(Counts):
    """Counts, and the most bytes that were held at once of what was made inside `with`.

    A tensor's contents, if they are asked for, are 0: which noise level a loss draws changes no
    cost."""

    def __init__(self, before=()):
        """before: tensors that are there already, and that do not count."""
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in before}     # {storage: bytes}
        self.held = 0
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:       # asked so often that it takes most of the time
            return CPU
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                self.hold(leaf.untyped_storage())
        return result

    def hold(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self.release, key)

    def release(self, key):
        self.held -= self.alive.pop(key)


@dataclass(frozen=True)
class Cost:
    """Of one micro-step of one process."""
    flops: float
    held: float             # bytes held at once, beside weights, AdamW's state and gradients
    gathers: float = 0      # how often the weights of one network are gathered, if they are shared


def counted(build, run):
    """The Cost of build(run), which is (networks, a function that does the micro-step)."""
    gathers = []

    def gathered(network, inputs):
        gathers.append("forward")
        if torch.is_grad_enabled():
            gathers.append("backward")

    with FakeTensorMode():
        networks, step = build(run)
        before = []
        for network in networks:
            network.register_forward_pre_hook(gathered)
            before += list(network.parameters())
            before += [p.grad for p in network.parameters() if p.grad is not None]
        with Costs(before) as costs:
            step()
    return Cost(costs.flops.total(), costs.most, len(gathers))


def cost_of(build, run):
    """The same for all layers, from what one and two of them take. (At 1.3B, against what more layers
    are counted to hold: with recomputation exact for teacher and causal at 30, for the generator at
    16; without it exact for the teacher at 30, within 0.5 % for the others at 4.)"""
    def with_layers(count):
        return replace(run, config=replace(run.config, num_layers=count))

    one = counted(build, with_layers(1))
    two = counted(build, with_layers(2))
    more = run.config.num_layers - 1
    flops = one.flops + more * (two.flops - one.flops)
    held = one.held + more * (two.held - one.held)
    return Cost(flops, held, one.gathers)


# --------------------------------------------------------------------------------------------------
# The micro-steps of each stage, with the losses of train_distill.py.

def network(run, learns, causal=False):
    """A model without contents; one that learns has its gradients already, of those before."""
    config = replace(run.config, causal=causal)
    if config.copies:
        config = replace(config, latent_std=(1.0,) * config.out_dim)
    model = new_model(config).requires_grad_(learns)
    if learns:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.recompute = run.checkpointing
    return model


def batch_of(run, count, frames):
    """(Latents (count, C, frames, h, w), what a model is told of them)."""
    config = run.config
    latents = torch.randn(count, config.out_dim, frames, *config.latent_size)
    conditions = {}
    for name, value in random_conditions(config, frames, CPU).items():
        conditions[name] = torch.cat([value] * count)
    return latents, conditions


def encoding(run):
    """A clip's latents from its pixels."""
    vae = new_vae(run.config, "own", CPU, torch.float32)
    video = torch.zeros(1, 3, run.settings.clip_frames, *run.config.size)

    def step():
        with torch.no_grad(), run.autocast():
            vae.encode(video)

    return [vae], step


def teaching(run):
    """The teacher, on whole clips."""
    model = network(run, learns=True)
    x0, conditions = batch_of(run, run.settings.batch, run.clip_latents)
    sigma = torch.ones(len(x0))

    def step():
        with run.autocast():
            first_latent = td.first_latent_of(run.config, x0)
            loss = td.flow_loss(model, x0, sigma, conditions, first_latent)
        loss.backward()

    return [model], step


def one_euler_step(run):
    """Of the teacher's trajectories, which two batches of clips take together."""
    model = network(run, learns=False)
    x_t, conditions = batch_of(run, 2 * run.settings.batch, run.clip_latents)
    sigma = torch.ones(x_t.shape[0], x_t.shape[2])

    def step():
        with torch.no_grad(), run.autocast():
            guided_velocity(model, x_t, sigma, conditions, run.config.guidance)

    return [model], step


def regression(run):
    """The student, on a trajectory, with its own memory."""
    model = network(run, learns=True, causal=True)
    x0, conditions = batch_of(run, run.settings.batch, run.clip_latents)
    states = [x0] * len(run.config.sigmas)
    context = (run.config.sink, run.config.window)

    def step():
        with run.autocast():
            loss = td.causal_loss(model, states, x0, x0, conditions, context)
        loss.backward()

    return [model], step


def roll_out(run, generator, exit_step):
    """train_distill.roll_out on no files: (a clip (B, C, F, h, w), its conditions)."""
    config = run.config
    frames = run.latents_of(mean_chunks(run))
    noise, conditions = batch_of(run, run.settings.batch, frames)
    points = {"tracks": torch.zeros(len(noise), td.video_frames(frames), 1, 2)}
    points["visible"] = points["tracks"][..., 0] > 0
    sizes = list(chunk_sizes(config, frames))
    first_latent = td.first_latent_of(config, noise)
    noises = noise.split(sizes, 2)
    made = rollout(generator, noises, conditions, first_latent, exit_step)
    made = itertools.islice(made, len(noises))              # the last is not cached
    x0, _ = td.judged_clip(made, run.clip_latents, first_latent, points)
    return x0, next(split_conditions(conditions, [run.clip_latents]))


def mean_chunks(run):
    """Of the rollouts that train_distill.draw_rollout draws, whole."""
    clip = run.clip_chunks
    longest = run.longest_rollout
    drawn = [max(clip, chunks) for chunks in range(2 * clip - longest, longest + 1)]
    return round(sum(drawn) / len(drawn))


def generating(run, exit_step):
    """The generator, on its own rollout."""
    generator = network(run, learns=True, causal=True)
    critic = network(run, learns=True)
    teacher = network(run, learns=False)

    def step():
        with run.autocast():
            x0, conditions = roll_out(run, generator, exit_step)
            first_latent = td.first_latent_of(run.config, x0.detach())
            loss = td.dmd_loss(x0, teacher, critic, conditions, first_latent, run.config.shift)
        loss.backward()

    return [generator, critic, teacher], step


def rolling(run, exit_step):
    """The rollout that the critic learns from."""
    generator = network(run, learns=False, causal=True)

    def step():
        with torch.no_grad(), run.autocast():
            roll_out(run, generator, exit_step)

    return [generator], step


# --------------------------------------------------------------------------------------------------
# What the stages take.

@dataclass(frozen=True)
class Stage:
    """A line of the tables."""
    name: str
    clips: int                  # all in all
    cost: Cost                  # of a micro-step
    other: Cost                 # of one with recomputation if that has none, and the reverse
    batch: int = 1              # clips of a micro-step
    sharded: float = 0          # bytes a parameter that the GPUs share: weights, AdamW's, averages
    whole: float = 0            # and that each has: gradients
    beside: float = 0           # bytes that each has besides
    micro_steps: int = 0        # of an update, of all processes; 0: there are no updates
    reduced: float = 0          # networks whose gradients an update needs

    @property
    def clip_flops(self):
        return self.cost.flops / self.batch

    def days(self, tflops, gpus):
        """On so many GPUs that reach so many TFLOP/s each."""
        return self.clips * self.clip_flops / (tflops * 1e12 * gpus * 86400)

    def memory(self, parameters, gpus):
        """Bytes that one of so many GPUs needs."""
        kept = (self.sharded / gpus + self.whole) * parameters
        return kept + self.beside + self.cost.held

    def sent(self, parameters, gpus):
        """Bytes that each of so many GPUs sends for an update, in float32: (weights that are gathered,
        gradients, and what these would be if they were reduced every micro-step)."""
        network = 4 * parameters * (gpus - 1) / gpus
        micro_steps = max(self.micro_steps / gpus, 1)
        reduced = self.reduced * network
        return micro_steps * self.cost.gathers * network, reduced, micro_steps * reduced


def distill_cost(run, critic):
    """Of a micro-step of the critic, which learns from a rollout as a teacher does from clips, with its share
    of one of the generator. Each of the denoising steps at which a rollout may end adds as much as the
    one before: the mean is that of the first and the last."""
    last = len(run.config.sigmas) - 1
    short = cost_of(functools.partial(rolling, exit_step=0), run)
    long = cost_of(functools.partial(rolling, exit_step=last), run)
    generator = cost_of(functools.partial(generating, exit_step=last), run)
    share = 1 / run.settings.critic_steps

    def mean(name):
        saved = (getattr(long, name) - getattr(short, name)) / 2        # against the longest rollout
        of_critic = getattr(critic, name) + getattr(long, name) - saved
        return of_critic + share * (getattr(generator, name) - saved)

    return Cost(mean("flops"), max(critic.held, generator.held), mean("gathers"))


def stored_clips(run):
    """{name of a set: its clips}, of what the training reads."""
    if run.data:
        return {"--data": len(td.clip_files(run.data))}
    if not td.is_wan(run.config):
        return {"drawn": run.settings.clips}
    clips = PAPER_CLIPS
    if td.paper_settings(run.config, False) == td.PAPER_5B:
        clips = PAPER_5B_CLIPS
    if run.start and run.start.has_head:
        return {"second set": clips["second set"]}
    return clips


def teacher_updates(run):
    """{name of a stage of the teacher: its updates}: the one that the training has or, from Wan's weights
    without a track head, both of the paper's."""
    s = run.settings
    if not td.is_wan(run.config):
        return {"teacher": s.teacher_updates}
    if run.start and run.start.has_head:
        return {"teacher, second stage": s.teacher_updates}
    second = td.paper_settings(run.config, True).teacher_updates
    return {"teacher, first stage": s.teacher_updates, "teacher, second stage": second}


def learning_costs(run):
    """{what learns: Cost of a micro-step}."""
    teacher = cost_of(teaching, run)
    return {"teacher": teacher,
            "causal": cost_of(regression, run),
            "distill": distill_cost(run, teacher)}


def kept_bytes(run, trained, averaged, frozen=0):
    """{"sharded", "whole": bytes a parameter}, fields of Stage, for so many networks in float32: 4 of
    weights, 8 of AdamW's and 4 of gradients if they are trained, 4 of an average."""
    shared = 12 * trained + 4 * averaged + 4 * frozen
    gradients = 4 * trained
    if run.settings.shard_gradients:
        return {"sharded": shared + gradients}
    return {"sharded": shared, "whole": gradients}


def stages_of(run):
    """The Stages of a training."""
    s = run.settings
    costs = learning_costs(run)
    others = learning_costs(replace(run, checkpointing=not run.checkpointing))
    stages = []
    encode = counted(encoding, run)
    encoders = ENCODERS if td.is_wan(run.config) else 0
    for name, clips in stored_clips(run).items():
        stages.append(Stage(f"encode, {name}", clips, encode, encode, beside=encoders))
    for name, updates in teacher_updates(run).items():
        clips = s.batch * s.teacher_accumulate * updates
        stages.append(Stage(name, clips, costs["teacher"], others["teacher"], s.batch,
                            micro_steps=s.teacher_accumulate, reduced=1, **kept_bytes(run, 1, 1)))
    if s.causal_from == "trajectories":
        euler_step = cost_of(one_euler_step, run)
        trajectory = replace(euler_step, flops=euler_step.flops * run.config.steps)
        stages.append(Stage("trajectories", s.trajectories, trajectory, trajectory, 2 * s.batch,
                            whole=4))
    clips = s.batch * s.causal_accumulate * s.causal_updates
    stages.append(Stage("causal", clips, costs["causal"], others["causal"], s.batch,
                        micro_steps=s.causal_accumulate, reduced=1, **kept_bytes(run, 1, 1)))
    # generator and critic, which has no average, and the teacher
    clips = s.batch * s.distill_accumulate * s.distill_updates
    stages.append(Stage("distill", clips, costs["distill"], others["distill"], s.batch,
                        micro_steps=s.distill_accumulate, reduced=1 + 1 / s.critic_steps,
                        **kept_bytes(run, 2, 1, frozen=1)))
    return stages


def clip_bytes(run):
    """{what a clip holds on disk, as extras/clips.py writes it: bytes}."""
    config = run.config
    parts = {
        "latents": 2 * config.out_dim * run.clip_latents * math.prod(config.latent_size),
        "tracks": run.track_frames * MOST_TRACKS * (2 * 4 + 1),
        "text": 2 * min(TEXT_ROWS, config.text_len) * config.text_dim,
        "CLIP's features": 4 * CLIP_ROWS * config.clip_dim,
        "picture": 3 * math.prod(config.size) * config.copies,
    }
    return {name: count for name, count in parts.items() if count}


def trajectory_bytes(run):
    """Of the file of a trajectory."""
    parts = clip_bytes(run)
    states = len(run.config.sigmas) + 1
    image = 0
    if run.config.image_dim:
        image = 2 * parts["latents"]                            # float32, most of it zeros
    conditions = 2 * parts["text"] + parts.get("CLIP's features", 0)
    return states * parts["latents"] + image + conditions + parts["tracks"]


# --------------------------------------------------------------------------------------------------
# The tables.

def smallest_card(needed):
    """The name of the smallest of CARDS that has so many bytes; "no card"."""
    for name, gib in CARDS.items():
        if needed <= SPARE * gib * GIB:
            return name
    return "no card"


def print_table(title, columns, rows):
    """In Markdown."""
    print(f"\n{title}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def gpu_columns():
    return [f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]


def print_days(run, stages):
    tflops = run.settings.tflops
    rows = []
    for stage in stages:
        days = [f"{stage.days(tflops, gpus):,.2g}" for gpus in GPUS]
        rows.append([stage.name, f"{stage.clips:,}", f"{stage.clip_flops / 1e12:,.4g}", *days])
    sums = [f"{sum(stage.days(tflops, gpus) for stage in stages):,.2g}" for gpus in GPUS]
    rows.append(["all", "", "", *sums])
    print_table(f"Days at {tflops:g} TFLOP/s a GPU (--set tflops=…), blocks "
                f"{'computed again in the backward' if run.checkpointing else 'kept for the backward'}",
                ["stage", "clips", "TFLOP a clip", *gpu_columns()], rows)


def print_memory(run, parameters, stages):
    rows = []
    for stage in stages:
        held = [stage.cost.held, stage.other.held]
        if not run.checkpointing:
            held.reverse()
        cells = [f"{count / GIB:.3g}" for count in held]
        for gpus in GPUS:
            needed = stage.memory(parameters, gpus)
            cells.append(f"{needed / GIB:.3g} ({smallest_card(needed)})")
        rows.append([stage.name, *cells])
    how = "recomputed" if run.checkpointing else "kept"
    gradients = "gradients too" if run.settings.shard_gradients else "gradients are whole"
    print_table(f"GiB a GPU, with activations {how}: weights, AdamW and averages are shared, {gradients} "
                "(--set shard_gradients); in brackets the smallest card of which a tenth is left",
                ["stage", "activations, recomputed", "kept", *gpu_columns()], rows)


def print_recomputation(stages):
    """What it costs."""
    more = []
    for stage in stages:
        if stage.micro_steps:
            few, many = sorted([stage.cost.flops, stage.other.flops])
            more.append(f"{stage.name} {100 * (many / few - 1):.0f} %")
    print(f"\nrecomputation (--checkpointing, --no-checkpointing) costs more FLOPs: {', '.join(more)}")


def print_sent(parameters, stages, gpus=8):
    rows = []
    for stage in stages:
        if stage.micro_steps:
            sent = stage.sent(parameters, gpus)
            rows.append([stage.name, *[f"{count / 1e9:,.4g}" for count in sent]])
    print_table(f"GB that each of {gpus} GPUs sends for an update",
                ["stage", "weights, gathered", "gradients", "gradients, reduced every micro-step"], rows)
    print("\nThose of a student's blocks are sent twice where a process has several micro-steps an update: "
          "first what\nthose before have added up, then the last one's (every micro-step: once).")


def print_disk(run, parameters):
    parts = clip_bytes(run)
    about = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in parts.items())
    rows = []
    for name, clips in stored_clips(run).items():
        rows.append([f"{clips:,} clips, {name}", f"{clips * sum(parts.values()) / 1e9:,.4g}"])
    if run.settings.causal_from == "trajectories":
        count = run.settings.trajectories
        rows.append([f"{count:,} trajectories", f"{count * trajectory_bytes(run) / 1e9:,.4g}"])
    rows.append(["two checkpoints of the teacher", f"{2 * 16 * parameters / 1e9:,.4g}"])
    rows.append(["two checkpoints of distill", f"{2 * 28 * parameters / 1e9:,.4g}"])
    rows.append(["weights that are exported, each time", f"{2 * parameters / 1e9:,.4g}"])
    rows_of_text = min(TEXT_ROWS, run.config.text_len)
    print_table(f"Disk; MB of a clip with {MOST_TRACKS:,} tracks and {rows_of_text} rows of text: {about}",
                ["what", "GB"], rows)


def print_settings(run):
    usual = asdict(run.config) | asdict(run.settings)
    print_table("Settings (--set field=value)", ["setting", "value"],
                [[name, str(value)] for name, value in usual.items()])


def stream_cache(run):
    """Bytes of a stream's KV cache in bfloat16 once it is full."""
    config = run.config
    sizes = list(chunk_sizes(config, run.clip_latents))
    held = sizes
    if config.window is not None:
        held = sizes[:config.sink] + [config.chunk] * config.window
    tokens = math.prod(config.size) // (2 * config.stride) ** 2         # of a latent frame
    return config.num_layers * 2 * 2 * config.dim * sum(held) * tokens


def print_dry_run(run):
    """Print what the training of `run` would be and take. Nothing is written."""
    config = run.config
    run = replace(run, device="cpu", dtype=torch.bfloat16)      # as on a GPU
    with torch.device("meta"):
        parameters = sum(p.numel() for p in new_model(config).parameters())
    print_settings(run)
    tokens = math.prod(config.size) // (2 * config.stride) ** 2
    window = "full" if config.window is None else config.window
    print(f"\n{parameters:,} parameters, {tokens:,} tokens a latent frame, {run.clip_latents} of them "
          f"a clip\nthe KV cache of a stream, c{config.chunk}s{config.sink}w{window}: "
          f"{stream_cache(run) / 2 ** 20:,.0f} MiB in bfloat16\ncounted on tensors without contents, "
          "in bfloat16; nothing is measured")
    stages = stages_of(run)
    print_days(run, stages)
    print_recomputation(stages)
    print_memory(run, parameters, stages)
    print_sent(parameters, stages)
    print_disk(run, parameters)
