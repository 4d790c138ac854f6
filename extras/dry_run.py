"""Estimate the cost of a training without running it: train_distill.py --dry-run PRESET.

The losses of train_distill.py run on tensors without contents, under bfloat16 as on a GPU. So the
counts are of what would be computed and stored, including attention's backward and recomputation.
All counts are linear in the number of layers, so they are extrapolated from one and two.
"""

import functools
import itertools
import math
import re
import weakref
from dataclasses import asdict, dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import train_distill as td
from extras.bench import CPU, Counts, new_vae, random_conditions
from motionstream import CLIP_ROWS, FLOAT32, chunk_sizes, guided_velocity, new_model, rollout

GPUS = (1, 4, 8)
CARDS = {               # GiB usable by a program
    "24 GB": 23.5,      # RTX 3090, 4090
    "48 GB": 44.5,      # L40S
    "80 GB": 79.1,      # A100, H100
    "141 GB": 139.8,    # H200
    "180 GB": 178.0,    # B200
}
SPARE = 0.9             # share that is filled: the allocator and CUDA need the rest
GIB = 2 ** 30

# Public encoders, needed once to prepare clips (UMT5-XXL in bfloat16, CLIP ViT-H in float32).
ENCODERS = 13.9e9       # bytes
TEXT_ROWS = 200         # of a long caption, at most 512
MOST_TRACKS = 2500      # of a clip: the paper's grid of 50x50

# Of the teacher's two stages (section 4.1).
PAPER_CLIPS = {"first set": 600_000, "second set": 70_000}
PAPER_5B_CLIPS = {"first set": 600_000, "second set": 30_000}


# --------------------------------------------------------------------------------------------------
# Counting.

class Costs(Counts):
    """Counts, plus the peak number of bytes allocated inside `with`.

    The contents of a tensor read as 0: a loss costs the same at each noise level it may draw."""

    def __init__(self, before=()):
        """before: existing tensors, which are not counted."""
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in before}  # {storage: bytes}
        self.held = 0
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:       # a shortcut: it is called very often
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
    """Cost of one micro-step in one process."""
    flops: float
    held: float             # peak bytes besides weights, AdamW's state and gradients
    gathers: float = 0      # times that one network's weights are gathered, if sharded


def counted(build, run):
    """Cost of build(run), which returns (networks, function that runs the micro-step)."""
    gathers = []
    kept = set()

    def gathered(network, inputs):
        if network.patch_embedding.weight.dtype == torch.bfloat16:
            return                                  # replicate_teacher
        if network not in kept:
            gathers.append("forward")
        if getattr(network.config, "causal", False):
            kept.add(network)                       # see train_distill.gathered
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
    """As `counted` for all layers, extrapolated from one and two. (Bytes at 1.3B, against counts
    with more layers: with recomputation exact for teacher and causal at 30 and for the generator
    at 16; without it exact for the teacher at 30, within 0.5 % for the others at 4.)"""
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
    """A model without contents; if it learns, with gradients of earlier micro-steps."""
    config = replace(run.config, causal=causal)
    if config.copies:
        config = replace(config, latent_std=(1.0,) * config.out_dim)
    model = new_model(config).requires_grad_(learns)
    if learns:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.recompute_blocks(run.checkpointing)
    return model


def real_score(run):
    """train_distill.real_score without contents."""
    model = network(run, learns=False)
    if run.settings.replicate_teacher:
        for name, p in model.named_parameters():
            if not re.search(FLOAT32, name):
                p.data = p.data.to(torch.bfloat16)
    return model


def batch_of(run, count, frames):
    """(latents (count, C, frames, h, w), the model's conditions)."""
    config = run.config
    latents = torch.randn(count, config.out_dim, frames, *config.latent_size)
    conditions = {}
    for name, value in random_conditions(config, frames, CPU).items():
        conditions[name] = torch.cat([value] * count)
    return latents, conditions


def encoding(run):
    """Encode the video of one clip."""
    vae = new_vae(run.config, "own", CPU, torch.float32)
    video = torch.zeros(1, 3, run.settings.clip_frames, *run.config.size)

    def step():
        with torch.no_grad(), run.autocast():
            vae.encode(video)

    return [vae], step


def teaching(run):
    """Train the teacher on whole clips."""
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
    """One step of the teacher's trajectories, which are made for two batches at a time."""
    model = network(run, learns=False)
    x_t, conditions = batch_of(run, 2 * run.settings.batch, run.clip_latents)
    sigma = torch.ones(x_t.shape[0], x_t.shape[2])

    def step():
        with torch.no_grad(), run.autocast():
            guided_velocity(model, x_t, sigma, conditions, run.config.guidance)

    return [model], step


def regression(run):
    """Train the student on a trajectory, with its own cache context."""
    model = network(run, learns=True, causal=True)
    x0, conditions = batch_of(run, run.settings.batch, run.clip_latents)
    states = [x0] * len(run.config.sigmas)
    context = dict(sink=run.config.sink, window=run.config.window)

    def step():
        with run.autocast():
            loss = td.causal_loss(model, states, x0, conditions, context)
        loss.backward()

    return [model], step


def consistency(run):
    """Train the student by consistency, beside its two frozen copies."""
    from extras.experiments import consistency_sigmas, loss_by_copies
    s = run.settings
    student = network(run, learns=True, causal=True)
    forced, average = [network(run, learns=False, causal=True) for _ in range(2)]
    x0, conditions = batch_of(run, s.batch, run.clip_latents)
    states = [x0] * len(consistency_sigmas(s, run.config))
    context = dict(sink=run.config.sink, window=run.config.window)

    def step():
        with run.autocast():
            inputs = (student, states, x0, conditions, context)
            loss = loss_by_copies(forced, average, s.consistency_hop, *inputs)
        loss.backward()

    return [student, forced, average], step


def generated_clip(run, generator, exit_step):
    """train_distill.generated_clip without files: (a clip (B, C, F, h, w), its conditions)."""
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
    x0, _ = td.judged_clip(made, run.clip_latents, noise[:, :, :1], points)
    return x0, td.conditions_of_first(conditions, run.clip_latents)


def mean_chunks(run):
    """Mean length of train_distill.draw_plan's rollouts, rounded to whole chunks."""
    longer = run.longest_rollout - run.clip_chunks
    if longer == 0:
        return run.clip_chunks
    mean_longer = (1 + longer) / 2
    return round(run.clip_chunks + mean_longer / 2)         # half of the rollouts are longer


def generating(run, exit_step):
    """Train the generator on its own rollout."""
    generator = network(run, learns=True, causal=True)
    critic = network(run, learns=True)
    teacher = real_score(run)

    def step():
        with run.autocast():
            x0, conditions = generated_clip(run, generator, exit_step)
            first_latent = td.first_latent_of(run.config, x0.detach())
            loss = td.dmd_loss(x0, teacher, critic, conditions, first_latent, run.config.shift)
        loss.backward()

    return [generator, critic, teacher], step


def rolling(run, exit_step):
    """Make the rollout that the critic learns from."""
    generator = network(run, learns=False, causal=True)

    def step():
        with torch.no_grad(), run.autocast():
            generated_clip(run, generator, exit_step)

    return [generator], step


# --------------------------------------------------------------------------------------------------
# The cost of each stage.

@dataclass(frozen=True)
class Stage:
    """One stage, a row of the tables."""
    name: str
    clips: int                  # in total
    cost: Cost                  # of a micro-step
    other: Cost                 # the same with recomputation switched
    batch: int = 1              # clips per micro-step
    sharded: float = 0          # bytes per parameter sharded over GPUs: weights, AdamW, average
    whole: float = 0            # bytes per parameter on every GPU: gradients
    beside: float = 0           # further bytes on every GPU
    gathered: float = 0         # bytes per parameter that several GPUs gather for all chunks
    micro_steps: int = 0        # per update, over all processes; 0: no updates
    reduced: float = 0          # networks whose gradients are reduced per update

    @property
    def clip_flops(self):
        return self.cost.flops / self.batch

    def days(self, tflops, gpus):
        """Days on `gpus` GPUs of `tflops` TFLOP/s each."""
        return self.clips * self.clip_flops / (tflops * 1e12 * gpus * 86400)

    def memory(self, parameters, gpus):
        """Bytes needed on each of `gpus` GPUs."""
        gathered = self.gathered * (1 - 1 / gpus)
        kept = (self.sharded / gpus + self.whole + gathered) * parameters
        return kept + self.beside + self.cost.held

    def sent(self, parameters, gpus):
        """Bytes that each of `gpus` GPUs sends per update, in float32: (gathered weights,
        gradients, gradients if reduced every micro-step)."""
        network = 4 * parameters * (gpus - 1) / gpus
        micro_steps = max(self.micro_steps / gpus, 1)
        reduced = self.reduced * network
        return micro_steps * self.cost.gathers * network, reduced, micro_steps * reduced


def rollout_costs(run):
    """Costs of the critic's rollout with the first and with the last exit step. It keeps nothing
    for a backward, so they are the same with recomputation and without."""
    last = len(run.config.sigmas) - 1
    short = cost_of(functools.partial(rolling, exit_step=0), run)
    long = cost_of(functools.partial(rolling, exit_step=last), run)
    return short, long


def distill_cost(run, critic, rollouts):
    """Cost of a critic micro-step (a rollout, then training as the teacher's on clips) plus its
    share of a generator micro-step. Cost is linear in the exit step, so its mean is that of the
    first and last exit steps. rollouts: see rollout_costs."""
    last = len(run.config.sigmas) - 1
    short, long = rollouts
    generator = cost_of(functools.partial(generating, exit_step=last), run)
    share = 1 / run.settings.critic_steps

    def mean(name):
        saved = (getattr(long, name) - getattr(short, name)) / 2        # from the last exit step's
        of_critic = getattr(critic, name) + getattr(long, name) - saved
        return of_critic + share * (getattr(generator, name) - saved)

    return Cost(mean("flops"), max(critic.held, generator.held), mean("gathers"))


def causal_cost(run):
    """Mean cost of a causal micro-step; of those from rollouts, as if from trajectories."""
    s = run.settings
    forced = cost_of(regression, run)
    if s.causal_from != "consistency":
        return forced
    after = cost_of(consistency, run)

    def mean(name):
        before = getattr(forced, name)
        return before + s.consistency_share * (getattr(after, name) - before)

    return Cost(mean("flops"), max(forced.held, after.held), mean("gathers"))


def in_second_stage(run):
    """Whether the teacher to be trained is past the paper's first stage."""
    return run.start and run.start.has_head and run.settings.freeze_track_head


def stored_clips(run):
    """{name of a data set: number of clips} that the training reads."""
    if run.data:
        return {"--data": len(td.clip_files(run.data))}
    if not run.config.is_wan:
        return {"drawn": run.settings.clips}
    clips = PAPER_CLIPS
    if td.paper_settings(run.config, False) == td.PAPER_5B:
        clips = PAPER_5B_CLIPS
    if in_second_stage(run):
        return {"second set": clips["second set"]}
    return clips


def teacher_updates(run):
    """{name of a teacher stage: updates}: the stage of this training or, from Wan's weights
    without a track head, both stages of the paper."""
    s = run.settings
    if not run.config.is_wan:
        return {"teacher": s.teacher_updates}
    if in_second_stage(run):
        return {"teacher, second stage": s.teacher_updates}
    second = td.paper_settings(run.config, True).teacher_updates
    return {"teacher, first stage": s.teacher_updates, "teacher, second stage": second}


def learning_costs(run, rollouts):
    """{stage: Cost of a micro-step}. rollouts: see rollout_costs."""
    teacher = cost_of(teaching, run)
    return {"teacher": teacher,
            "causal": causal_cost(run),
            "distill": distill_cost(run, teacher, rollouts)}


def kept_bytes(run, trained, averaged, frozen=0):
    """{"sharded", "whole": bytes per parameter}, fields of Stage, for these numbers of networks in
    float32: 4 for weights; if trained, 8 for AdamW and 4 for gradients; 4 for an average."""
    shared = 12 * trained + 4 * averaged + 4 * frozen
    gradients = 4 * trained
    if run.settings.shard_gradients:
        return {"sharded": shared + gradients}
    return {"sharded": shared, "whole": gradients}


def replicated_bytes(run):
    """Bytes of the teacher that every GPU holds by replicate_teacher; 0 without it."""
    if not run.settings.replicate_teacher:
        return 0
    with torch.device("meta"):
        return sum(p.nbytes for p in real_score(run).parameters())


def stages_of(run):
    """The Stages of a training."""
    s = run.settings
    rollouts = rollout_costs(run)
    costs = learning_costs(run, rollouts)
    others = learning_costs(replace(run, checkpointing=not run.checkpointing), rollouts)
    stages = []
    encode = counted(encoding, run)
    encoders = ENCODERS if run.config.is_wan else 0
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
    copies = s.causal_from == "consistency"             # frozen; and the average gathered, too
    stages.append(Stage("causal", clips, costs["causal"], others["causal"], s.batch,
                        micro_steps=s.causal_accumulate, reduced=1, gathered=4 + 8 * copies,
                        **kept_bytes(run, 1, 1, frozen=copies)))
    # generator, critic (without an average) and teacher
    clips = s.batch * s.distill_accumulate * s.distill_updates
    whole = replicated_bytes(run)
    stages.append(Stage("distill", clips, costs["distill"], others["distill"], s.batch,
                        micro_steps=s.distill_accumulate, reduced=1 + 1 / s.critic_steps,
                        gathered=4, beside=whole, **kept_bytes(run, 2, 1, frozen=whole == 0)))
    return stages


def clip_bytes(run):
    """{part of a clip on disk, as written by extras/clips.py: bytes}."""
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
    """Bytes of a trajectory's file."""
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
    """Name of the smallest of CARDS with `needed` bytes; "no card" if there is none."""
    for name, gib in CARDS.items():
        if needed <= SPARE * gib * GIB:
            return name
    return "no card"


def print_table(title, columns, rows):
    """Print a Markdown table."""
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
        rows.append([stage.name, f"{stage.clips:,}", f"{stage.clip_flops / 1e12:,.4g}"] + days)
    sums = [f"{sum(stage.days(tflops, gpus) for stage in stages):,.2g}" for gpus in GPUS]
    rows.append(["all", "", ""] + sums)
    how = "computed again in the backward" if run.checkpointing else "kept for the backward"
    print_table(f"Days at {tflops:g} TFLOP/s a GPU (--set tflops=…), blocks {how}",
                ["stage", "clips", "TFLOP a clip"] + gpu_columns(), rows)


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
        rows.append([stage.name] + cells)
    how = "recomputed" if run.checkpointing else "kept"
    gradients = "gradients too" if run.settings.shard_gradients else "gradients are whole"
    print_table(f"GiB a GPU, with activations {how}: weights, AdamW and averages are shared, "
                f"{gradients} (--set shard_gradients); in brackets the smallest card of which a "
                "tenth is left",
                ["stage", "activations, recomputed", "kept"] + gpu_columns(), rows)


def print_recomputation(stages):
    """Print the cost of recomputation."""
    more = []
    for stage in stages:
        if stage.micro_steps:
            few, many = sorted([stage.cost.flops, stage.other.flops])
            more.append(f"{stage.name} {100 * (many / few - 1):.0f} %")
    print("\nrecomputation (--checkpointing, --no-checkpointing) costs more FLOPs: "
          f"{', '.join(more)}")


def print_sent(parameters, stages, gpus=8):
    rows = []
    for stage in stages:
        if stage.micro_steps:
            sent = [f"{count / 1e9:,.4g}" for count in stage.sent(parameters, gpus)]
            rows.append([stage.name] + sent)
    columns = ["stage", "weights, gathered", "gradients", "gradients, reduced every micro-step"]
    print_table(f"GB that each of {gpus} GPUs sends for an update", columns, rows)
    print("\nThose of a student's blocks are sent twice where a process has several micro-steps an "
          "update: first what\nthose before have added up, then the last one's (every micro-step: "
          "once).")


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
    print_table(f"Disk; MB of a clip with {MOST_TRACKS:,} tracks and {rows_of_text} rows of text: "
                f"{about}", ["what", "GB"], rows)


def print_settings(run):
    usual = asdict(run.config) | asdict(run.settings)
    rows = [[name, str(value)] for name, value in usual.items()]
    print_table("Settings (--set field=value)", ["setting", "value"], rows)


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
    """Print the plan and cost of the training `run`. Nothing is written."""
    config = run.config
    run = replace(run, device="cpu", dtype=torch.bfloat16)      # as on a GPU
    with torch.device("meta"):
        parameters = sum(p.numel() for p in new_model(config).parameters())
    print_settings(run)
    tokens = math.prod(config.size) // (2 * config.stride) ** 2
    window = "full" if config.window is None else config.window
    print(f"\n{parameters:,} parameters, {tokens:,} tokens a latent frame, {run.clip_latents} of "
          f"them a clip\nthe KV cache of a stream, c{config.chunk}s{config.sink}w{window}: "
          f"{stream_cache(run) / 2 ** 20:,.0f} MiB in bfloat16\ncounted on tensors without "
          "contents, in bfloat16; nothing is measured")
    if run.settings.causal_from == "rollouts":
        print("causal is counted as from trajectories; its rollouts take more forwards, "
              "and the tiny model's are decoded")
    stages = stages_of(run)
    print_days(run, stages)
    print_recomputation(stages)
    print_memory(run, parameters, stages)
    print_sent(parameters, stages)
    print_disk(run, parameters)
