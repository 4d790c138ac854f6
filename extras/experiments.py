"""The papers' experiments, in small, on drawn scenes: streams, memory, guidance, short trainings.

    python -m extras.experiments --clips 12     hours; a row that is done is not measured again

MotionStream's table 4, figures 4, 6a and A2, and limits; Reward Forcing's sinks; scenes that are
carried away or change their light; objects, attention, rigidity; short distillations and teachers.
"""

import functools
import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from safetensors.torch import load_file

import sample
import train_distill as td
from extras import world
from extras.cases import CHANGES, NEUTRAL, new_clips, seed_of
from extras.clips import encode_video
from extras.evaluate import (CLIP, MODELS, Trained, case_of, eval_row, find_reward, grid,
                             measure_tables, new_parser, open_trained, play, settings_of,
                             videos_of, weights_of)
from extras.guard import CAUSAL_FROM, own_folder
from extras.tracks import render_control
from extras.watch import report
from motionstream import (Config, KVCache, MotionStream, TrackHead, UserError, add_noise,
                          apply_rope, chunk_sizes, guided_velocity, remember, same_sigma, schedule,
                          split_conditions, to_x0, track_ids, with_first)
from sample import embed_words
from vae import TinyVAE, TinyVAEConfig, WanVAE


# --------------------------------------------------------------------------------------------------
# Short trainings. Each has a folder of its own, named by a digest of its settings, and is done only
# once.

class Brief:
    """Settings of a short training. As text: the non-default ones."""

    def __str__(self):
        usual = type(self)()
        words = []
        for one in fields(self):
            value = getattr(self, one.name)
            if value != getattr(usual, one.name):
                words.append(f"{one.name} {value}")
        return " ".join(words) or "as usual"


@dataclass(frozen=True)
class Distillation(Brief):
    """A short distillation of the causal student."""
    updates: int = 50               # of the generator
    batch: int = 2
    clips: int = 512                # clips to sample from
    rollout: int = 8                # longest rollout, in chunks
    critic_steps: int = 5           # critic updates per generator update
    guidance: tuple | None = None   # of the real score; None: the teacher's own
    drawn_memory: bool = False      # draw chunk, sink and window per rollout, see draw_memory
    sink_decay: float = 1.0
    reward: str | None = None
    beta: float = 0.5
    seed: int = 0                   # beside that of all noise


# The student for the tables of memory, trained with many contexts: longer, but shorter than the
# shipped one.
MANY_MEMORIES = Distillation(updates=180, batch=4, clips=5120, rollout=12, drawn_memory=True)
# Each is (chunk, sink, window).
DRAWN_MEMORIES = tuple(itertools.product((1, 3, 5), (0, 1, 2, 3), (1, 2, 4)))


@dataclass(frozen=True)
class Lesson(Brief):
    """A short training of a teacher: new, on dense tracks; or the trained one, as causal learns."""
    steps: int = 400
    start: bool = False             # from the trained teacher
    harm: bool = False              # on damaged tracks
    drawn: bool = False             # tracks are drawn as a video, see DrawnTracks
    clips: int = 512


@dataclass(frozen=True)
class Start(Brief):
    """A short causal initialisation of the student from the teacher."""
    causal_from: str = "trajectories"
    steps: int = 200
    trajectories: int = 96
    clips: int = 512
    seed: int = 0                   # beside that of all noise


def brief_run(trained, made, how, config, settings, **more):
    """The Run of a short training of `made`, "teacher" or "student". how: its special settings.
    more: further fields of Run; "start" is the contents of the trained teacher's file."""
    if td.PROCESSES > 1:
        raise UserError("experiments train in one process, leave out torchrun")
    sums = [trained.checksum(name) for name in MODELS[:MODELS.index(made)]]
    folder = trained.folder / f"{made}.{seed_of(asdict(how), trained.seed, *sums):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: trained.path(name) for name in MODELS}
    files["start"] = trained.path("teacher") if more.get("start") else None
    files[made] = folder / f"{made}.safetensors"
    dtype = td.compute_dtype(trained.device)
    return td.Run(folder, trained.seed, trained.device, dtype, config, settings, files, **more)


def train_briefly(run, made, train):
    """Run a training of brief_run, unless its weights exist. Returns it, and what it came from, as
    Trained."""
    if not run.path(made).exists():
        started = time.time()
        torch.manual_seed(seed_of(run.seed, made))              # for the initial weights
        with torch.enable_grad(), own_folder(run.out):
            train(run, report=report)
        print(f"{run.out}: trained in {(time.time() - started) / 60:.1f} minutes")
    return Trained(run.out, run.device, run.seed, {name: run.path(name) for name in MODELS})


def clips_folder(trained, count):
    """A folder of clips of the drawn world, encoded by the VAE of `trained`, with tracks as long as
    the longest rollout: rendered once, for all short trainings."""
    settings = replace(td.TINY, clips=count, rollout=MANY_MEMORIES.rollout)
    files = {name: trained.path(name) for name in MODELS}
    device = trained.device
    dtype = td.compute_dtype(device)
    run = td.Run(trained.folder, trained.seed, device, dtype, trained.config, settings, files)
    encode = functools.partial(encode_video, trained.vae().cpu())
    return world.rendered_clips(run, f"clips{count}", count, encode)[0].parent


def damaged_folder(folder, size):
    """A copy of a folder of clips whose tracks, in three of four, are as bad as a poor tracker's:
    jittered by 2 % of the width, late (frames 1 to 12 are missing), or broken (half of the pieces
    of 4 frames are missing)."""
    copy = folder.with_name(f"{folder.name}.damaged")
    for file in sorted(folder.glob("*.safetensors")):
        if (copy / file.name).exists():
            continue
        clip = load_file(file)
        rng = torch.Generator().manual_seed(seed_of("damage", file.name))
        number = int(torch.randint(0, 4, (), generator=rng))
        _, change = CHANGES[(None, "jittered", "late", "broken")[number]]
        tracks = clip["tracks"][None]                                   # (1, T, N, 2)
        visible = clip["visible"][None]
        tracks, visible = change(None, tracks, visible, size, rng)
        clip |= {"tracks": tracks[0], "visible": visible[0]}
        td.write_clip(copy / file.name, clip)
    return copy


def distillation_run(trained, how):
    """The Run of a Distillation, without its clips."""
    guidance = how.guidance
    if guidance is None:
        guidance = trained.model("teacher").config.guidance
    config = replace(trained.model("causal").config, guidance=guidance, sink_decay=how.sink_decay)
    settings = replace(
        td.TINY,
        batch=how.batch,
        distill_updates=how.updates * how.critic_steps,
        critic_steps=how.critic_steps,
        rollout=how.rollout,
        beta=how.beta)
    reward = find_reward(how.reward) if how.reward else None
    trained = replace(trained, seed=trained.seed + how.seed)
    return brief_run(trained, "student", how, config, settings, reward=reward)


def draw_memory(run, update, learner):
    """train_distill.draw_plan, with one of DRAWN_MEMORIES."""
    plan = td.draw_plan(run, update, learner)
    rng = torch.Generator().manual_seed(seed_of("memory", run.seed, update, learner))
    number = int(torch.randint(len(DRAWN_MEMORIES), (), generator=rng))
    chunk, sink, window = DRAWN_MEMORIES[number]
    memory = {"chunk": chunk, "sink": sink, "window": window}
    return replace(plan, streaming=plan.streaming | memory)


def distil_briefly(trained, how):
    """The student of a Distillation, as Trained."""
    run = distillation_run(trained, how)
    if not run.path("student").exists():
        run = replace(run, data=clips_folder(replace(trained, seed=run.seed), how.clips))
    train = td.distill
    if how.drawn_memory:
        train = functools.partial(td.distill, draw_plan=draw_memory)
    return train_briefly(run, "student", train)


def start_run(trained, how):
    """The Run of a Start, without its clips."""
    settings = replace(
        td.TINY,
        causal_from=how.causal_from,
        causal_updates=how.steps,
        trajectories=how.trajectories,
        rollout=0)
    trained = replace(trained, seed=trained.seed + how.seed)
    return brief_run(trained, "causal", how, trained.model("teacher").config, settings)


def start_briefly(trained, how):
    """The causal student of a Start, as Trained."""
    run = start_run(trained, how)
    if not run.path("causal").exists():
        run = replace(run, data=clips_folder(replace(trained, seed=run.seed), how.clips))
    return train_briefly(run, "causal", td.train_causal)


def lesson_run(trained, how):
    """The Run of a Lesson, without its clips."""
    config = trained.model("teacher").config
    settings = replace(td.TINY, teacher_updates=how.steps, rollout=0)
    settings = replace(settings, track_weight=0.0)              # no cell of a drawn video is empty
    more = {}
    if how.start:
        more["start"] = sample.inspect(trained.path("teacher"))
        settings = replace(settings, teacher=td.TINY.causal, dense_share=0.0)
    else:
        inputs = config.in_dim - config.track_dim - config.copy_dim + config.out_dim
        config = replace(
            config,
            track_id_mode="random",
            track_dim=config.out_dim,
            in_dim=inputs,
            copies=False,
            latent_std=())
        settings = replace(settings, dense_share=1.0)
    return brief_run(trained, "teacher", how, config, settings, **more)


def teach_briefly(trained, how):
    """The teacher of a Lesson, as Trained."""
    run = lesson_run(trained, how)
    if not run.path("teacher").exists():
        folder = clips_folder(trained, how.clips)
        if how.harm:
            folder = damaged_folder(folder, run.config.size[0])
        run = replace(run, data=folder)
    train = td.train_teacher
    if how.drawn:
        train = functools.partial(td.train_teacher, network=drawing(trained.vae()))
    return train_briefly(run, "teacher", train)


# --------------------------------------------------------------------------------------------------
# The stage causal without trajectories (causal_from=clips), and corrupted-context augmentation.
# train_distill.py imports this module when its settings name one of them.

def draw_noised_clips(run, files, count, sigmas=None):
    """As train_distill.draw_trajectories, but from clips: x0 is the ground truth, the states are
    noised x0. This trains the causal flow of the data, unguided: teacher forcing on clean latents,
    which needs no trajectories. sigmas: of the states; None: the student's."""
    batch = td.draw_batch(run, files, count, run.clip_latents)
    x0 = batch.latents
    noise = torch.randn_like(x0)
    sigmas = sigmas or run.config.sigmas
    states = [add_noise(x0, noise, same_sigma(sigma, x0)) for sigma in sigmas]
    return states, x0, batch.points, batch.conditions


def corrupt_context(x0, first):
    """Corrupted-context augmentation: imitates a faulty memory of clean latents x0 (B, C, F, h, w).
    In half of the clips, a rectangle of all chunks but the first shows frame 0 again, so what left
    it is back and what entered is gone. Meant to teach the student not to pass such faults on.
    first: latent frames of the first chunk."""
    B, _, frames, h, w = x0.shape
    low, high = torch.rand(2, 2, B, 1, 1).sort(0).values                # each of rows and columns
    y = torch.arange(h)[:, None] / h
    x = torch.arange(w) / w
    inside = (low[0] <= y) & (y < high[0]) & (low[1] <= x) & (x < high[1])              # (B, h, w)
    inside = inside & (torch.rand(B, 1, 1) < 0.5)
    late = torch.arange(frames)[:, None, None] >= first
    corrupt = (inside[:, None, None] & late).to(x0.device)              # (B, 1, F, h, w)
    return torch.where(corrupt, x0[:, :, :1], x0)


# --------------------------------------------------------------------------------------------------
# causal_from=consistency: teacher forcing on clips, then few-step consistency, both through the KV
# cache. Stands in for regression on ODE trajectories, as in Causal Forcing++ (arXiv 2605.15141): a
# teacher-forced copy of the student, not the bidirectional teacher, solves the ODE, one step at a
# time, and starts from true clips.

def consistency_sigmas(settings, config):
    """The noise levels of consistency: every consistency_hop-th of the teacher's schedule."""
    return schedule(config.steps, config.shift)[::settings.consistency_hop]


def predicted_x0(model, x_t, sigma, condition, caches, first_latent):
    """A causal model's x0 (B, C, chunk, h, w) from x_t at one sigma, a number, after the past in
    its caches. At sigma 0 it is x_t. first_latent: see with_first."""
    x_t, sigma_frames = with_first(x_t, same_sigma(sigma, x_t), first_latent)
    velocity = model(x_t, sigma_frames, caches=caches, **condition)
    return to_x0(x_t, velocity, sigma_frames)


def solve(forced, x, sigmas, condition, caches, first_latent):
    """Euler steps of a causal model, under its config's guidance, from x (B, C, chunk, h, w) at
    sigmas[0] to sigmas[-1]. caches: see remember_guided."""
    model = functools.partial(forced, caches=caches)
    for sigma, following in zip(sigmas, sigmas[1:]):
        x, sigma_frames = with_first(x, same_sigma(sigma, x), first_latent)
        velocity = guided_velocity(model, x, sigma_frames, condition, forced.config.guidance)
        x = x + (following - sigma) * velocity
    return x


def remember_guided(forced, x0, caches, condition):
    """motionstream.remember for a model under guidance, without a graph: each of the variants that
    guided_velocity evaluates in one batch has a past of its own."""
    model = functools.partial(forced, caches=caches, write=True)
    clean = torch.zeros(x0.shape[0], x0.shape[2], dtype=torch.float64, device=x0.device)
    with torch.no_grad():
        guided_velocity(model, x0, clean, condition, forced.config.guidance)


def consistency_loss(student, states, x0, conditions, context, channel_weight=1.0, past=None,
                     *, forced, average, hop):
    """Consistency distillation (Song et al. 2023, algorithm 2) through the KV cache (Causal
    Forcing++): from a chunk's state at a random noise level, the student predicts the x0 that
    `average` predicts from the next level. `forced`, the teacher-forced copy, goes there by `hop`
    Euler steps (skipping steps, LCM, arXiv 2310.04378); if the next level is 0, where it ends is
    the target. All three read the same past from caches of their own.

    states: one (B, C, F, h, w) for each of consistency_sigmas. average: the student's moving
    average. The others: see train_distill.causal_loss."""
    if past is None:
        past = x0
    config = student.config
    sigmas = schedule(config.steps, config.shift) + (0.0,)
    networks = (student, forced, average)
    own, solver, target = [each.new_caches(**context) for each in networks]
    loss = 0.0
    stop = 0
    sizes = list(chunk_sizes(config, x0.shape[2]))
    for size, part in zip(sizes, split_conditions(conditions, sizes)):
        start = stop
        stop = start + size
        now = slice(start, stop)
        first_latent = td.first_latent_of(config, x0) if start == 0 else None
        level = int(torch.randint(0, len(states), ()))
        x_t = states[level][:, :, now]
        begin = level * hop
        end = begin + hop
        with torch.no_grad():
            later = solve(forced, x_t, sigmas[begin:end + 1], part, solver, first_latent)
            wanted = predicted_x0(average, later, sigmas[end], part, target, first_latent)
        predicted = predicted_x0(student, x_t, sigmas[begin], part, own, first_latent)
        loss = loss + ((predicted - wanted).square() * channel_weight).sum()
        if stop == x0.shape[2]:         # no chunk would read it
            break
        remember(student, past[:, :, now], own, part)
        remember(average, past[:, :, now], target, part)
        remember_guided(forced, past[:, :, now], solver, part)
    return loss / x0.numel()


def forced_copy(run, learner, first):
    """The frozen teacher-forced student that solves the ODE: the learner's average, written to
    forced.safetensors at the `first` update of consistency, and read from there after a break.
    Collective."""
    path = run.out / "forced.safetensors"
    if first:
        td.save_weights(path, learner.average)
    run = replace(run, files=run.files | {"forced": path})
    return td.shard(run.load("forced", **run.streaming))


def loss_by_copies(forced, average, hop, *inputs):
    """consistency_loss of its `inputs`. Both copies are gathered once, not once a pass."""
    with td.gathered(forced), td.gathered(average):
        return consistency_loss(*inputs, forced=forced, average=average, hop=hop)


def train_consistency(run, report):
    """Stage 3 by causal_from=consistency: as train_distill.train_causal from clips, then, in the
    last consistency_share of the updates, by consistency_loss. report: see
    train_distill.no_report."""
    s = run.settings
    files = td.training_clips(run, run.clip_latents)
    vae = run.load_vae()
    student = td.to_be_trained(run, run.load("teacher", causal=True, **run.streaming))
    weight = td.x0_weight(vae, student.config, run.device)
    learner = td.Learner("causal", student, s.causal, s.causal_updates, s.causal_accumulate,
                         s.shard_gradients)
    begin = s.causal_updates - int(s.consistency_share * s.causal_updates)
    sigmas = run.config.sigmas
    loss_of = td.causal_loss
    loop = td.Loop(run, "causal", s.causal_updates, learner)
    for update in loop:
        if update >= begin and loss_of is td.causal_loss:
            forced = forced_copy(run, learner, update == begin)
            sigmas = consistency_sigmas(s, run.config)
            loss_of = functools.partial(loss_by_copies, forced, learner.average, s.consistency_hop)
        for _ in loop.micro_steps():
            with run.autocast(), td.gathered(student):
                drawn = draw_noised_clips(run, files, s.batch, sigmas)
                loss = td.loss_in_context(run, student, vae, drawn, weight, loss_of)
            learner.backward(loss)
            loop.log(loss=loss)
        loop.log(grad=learner.update(update))
        td.export_weights(run, "causal", learner.average, update + 1)
        report(loop, learner.average, vae, files)
    td.save_weights(run.path("causal"), learner.average)


# --------------------------------------------------------------------------------------------------
# Network variants.

class Refreshed(KVCache):
    """A cache whose sink is replaced, every 25 chunks, by the latest chunk."""
    written = 0

    def write(self, k, v):
        super().write(k, v)
        self.written += 1
        if self.written % 25 == 0:
            self.chunks[0] = self.chunks[-1]


def refreshing(kind):
    """A class of students with Refreshed caches, from MotionStream or CopyingMotionStream."""
    class RefreshedStudent(kind):
        def new_caches(self, **overrides):
            config = replace(self.config, **overrides)
            return [Refreshed(config.sink, config.window) for _ in self.blocks]

    return RefreshedStudent


class DrawnTracks(TrackHead):
    """A track head that draws the tracks as dots of 5x5 pixels, coloured by ID, and encodes them as
    a video: the baseline of MotionStream's table 3."""

    def __init__(self, vae, out_channels, stride):
        super().__init__(out_channels=out_channels, stride=stride)
        self.others = [vae]                 # a list: its parameters are not this module's
        self.video = None                   # of the chunks before

    def forward(self, tracks, visible, ids, height, width):
        frames = tracks.shape[1]
        video = self.draw(tracks, visible, ids, height, width)
        if frames % 4 == 0:                                     # a chunk goes on from the last
            video = torch.cat([self.video, video], 2)
        self.video = video
        with torch.no_grad():
            latents = self.others[0].encode(video)
        latents = latents[:, :, -((frames + 3) // 4):]
        return latents + 0 * self.conv.weight.sum()     # a gradient for what is not used

    def draw(self, tracks, visible, ids, height, width):
        """The video (B, 3, T, H, W) in [-1, 1], black where there is no track."""
        B, T, N, _ = tracks.shape
        lower = (ids & 0xFFFF) / 2 ** 16
        upper = (ids >> 16) / 2 ** 16
        colour = torch.stack([lower, upper, torch.ones_like(lower)], -1)        # (B, N, 3)
        size = torch.tensor([width, height], device=tracks.device)
        inside = visible & ((tracks >= 0) & (tracks < size)).all(-1)
        b, t, n = inside.nonzero(as_tuple=True)
        column, row = (tracks[b, t, n].long() + 2).unbind(1)
        video = torch.zeros(B, T, height + 4, width + 4, 3, device=tracks.device)
        for i in range(-2, 3):
            for j in range(-2, 3):
                video[b, t, row + i, column + j] = colour[b, n]
        video = video[:, :, 2:-2, 2:-2].permute(0, 4, 1, 2, 3)
        return video * 2 - 1


def drawing(vae):
    """A class of MotionStreams whose track heads are DrawnTracks."""
    class DrawingTeacher(MotionStream):
        def __init__(self, config):
            super().__init__(config)
            self.track_head = DrawnTracks(vae, config.track_dim, config.stride)

    return DrawingTeacher


# --------------------------------------------------------------------------------------------------
# Measurements of a row.

def distilled_row(trained, distil, refreshed=False, **settings):
    """eval_row of the student of a short Distillation; refreshed: with Refreshed caches."""
    student = distil_briefly(trained, distil)
    if refreshed:
        student = replace(student, network=refreshing(type(student.model("student"))))
    return eval_row(student, **settings)


def started_row(trained, start, model, **settings):
    """eval_row of the causal student of a Start, or of a short Distillation's student of it."""
    started = start_briefly(trained, start)
    if model == "student":
        started = distil_briefly(started, Distillation())
    return eval_row(started, model=model, **settings)


def taught_row(trained, teach, **settings):
    """eval_row of the teacher of a short Lesson."""
    taught = teach_briefly(trained, teach)
    if teach.drawn:
        taught = replace(taught, network=drawing(trained.vae()))
    return eval_row(taught, model="teacher", **settings)


def speed_row(trained, **settings):
    """Time per chunk and per decoded frame, relative to the unchanged student: two streams in turn,
    medians of 15 chunks from the sixth on."""
    overrides = settings_of(Config, settings)
    clips = new_clips(case_of(settings))
    text = embed_words(NEUTRAL, trained.config)
    changed = play(trained, "student", clips, text, **overrides)
    usual = play(trained, "student", clips, text, chunk=trained.config.chunk)
    chunks = np.zeros((20, 2))
    frames = np.zeros((20, 2))
    for i in range(20):
        for j, stream in enumerate((changed, usual)):
            started = time.perf_counter()
            count = next(stream).shape[2]
            chunks[i, j] = time.perf_counter() - started
            frames[i, j] = chunks[i, j] / count
    chunk = np.median(chunks[5:], 0)
    frame = np.median(frames[5:], 0)
    return {"chunk": chunk[0] / chunk[1], "frame": frame[0] / frame[1]}


def decoders_row(trained, **_):
    """Ratio of the decoding times of Wan 2.1's decoder and taew2_1 for a chunk of 12 frames of
    64x64 pixels, in turn, medians of 5: random weights."""
    latents = torch.zeros(1, 16, 3, 8, 8)
    vaes = [WanVAE().eval(), TinyVAE(TinyVAEConfig()).eval()]
    states = [vae.decode(latents)[1] for vae in vaes]
    seconds = np.zeros((5, 2))
    for i in range(5):
        for j, vae in enumerate(vaes):
            started = time.perf_counter()
            vae.decode(latents, states[j])
            seconds[i, j] = time.perf_counter() - started
    wan, small = np.median(seconds, 0)
    return {"times": wan / small}


def attention_row(trained, layer, model="student", distil=None, **settings):
    """Percentages of a layer's self-attention on the sink, the window and the chunk itself once the
    cache is full. Means over a stream's passes (including the clean ones), clips, heads and tokens.
    distil: measures the student of a short Distillation."""
    if distil:
        trained = distil_briefly(trained, distil)
    clips = new_clips(case_of(settings))
    network = trained.model(model)
    passes = []

    def watch(attention, inputs):
        x, rope, cache, _ = inputs
        if len(cache.chunks) == network.config.sink + network.config.window:
            passes.append(attention_shares(attention, x, rope, cache))

    network.blocks[layer].self_attn.register_forward_pre_hook(watch)
    text = embed_words(NEUTRAL, network.config)
    for _ in videos_of(network, trained.vae(), clips, text, seed=trained.seed):
        pass                                                            # watch is called meanwhile
    shares = 100 * torch.stack(passes).mean(0)
    return dict(zip(("sink", "window", "itself"), shares.tolist()))


def attention_shares(attention, x, rope, cache):
    """Shares of SelfAttention's softmax on sink, window and the chunk x (B, L, D) itself: (3,)."""
    heads = (attention.num_heads, -1)
    q = attention.norm_q(attention.q(x)).unflatten(2, heads)            # (B, L, N, K)
    k = attention.norm_k(attention.k(x)).unflatten(2, heads)
    keys, _ = cache.read(k, k)
    q = apply_rope(q, rope[-q.shape[1]:])
    keys = apply_rope(keys, rope)
    scores = torch.einsum("blnk,bsnk->bnls", q.float(), keys.float())
    scores = scores / math.sqrt(q.shape[3])
    length = x.shape[1]
    counts = (cache.sink * length, cache.window * length, length)
    parts = scores.softmax(3).split(counts, 3)                          # (B, N, L, count) each
    return torch.stack([part.sum(3).mean() for part in parts])


def words_row(trained, model="teacher", text=None, guidance=None, **settings):
    """How often a motion named in the caption appears, in percent of the clips: those nearer, in
    mean square, to the captioned video than to the same one with rigid objects, which neither spin
    nor pulse. share: position between the two, 0 rigid, 1 captioned. Clips whose two videos are
    alike (40 dB), a spinning disc, do not count."""
    attributes = settings["attributes"]
    clips = new_clips(case_of(settings))
    scene = clips.scene
    truth = clips.frames()
    no_spin = torch.zeros_like(scene["spin"])
    no_pulse = torch.ones_like(scene["pulse"])
    rigid = scene | {"spin": no_spin, "pulse": no_pulse}
    rigid = world.render(rigid, clips.size, 0, clips.length)
    words = embed_words(text or world.caption(*attributes), trained.config)
    guided = {"guidance": guidance} if guidance else {}
    video = torch.cat(list(play(trained, model, clips, words, **guided)), 2)
    way = truth - rigid
    differs = way.square().sum((1, 2, 3, 4))
    share = ((video - rigid) * way).sum((1, 2, 3, 4)) / differs
    share = share[differs / truth[0].numel() > 4e-4]                    # the mean square of 40 dB
    appears = 100 * (share > 0.5).float().mean()
    return {"appears": appears.item(), "share": share.mean().item(), "clips": len(share)}


def encoding_row(trained, by, **settings):
    """Milliseconds to encode a clip's tracks: by "head" as the track head does, by "vae" as a drawn
    video."""
    clips = new_clips(case_of(settings))
    model = trained.model("student")
    vae = trained.vae()
    tracks = clips.tracks.to(trained.device)
    visible = clips.visible.to(trained.device)
    ids = track_ids(tracks, model.config)
    motion = sample.Motion(tracks, visible, ids)

    def encode():
        if by == "vae":
            return render_control(vae, motion, model.config.size, clips.length)
        return model.track_head(tracks, visible, ids, *model.config.size)

    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        encode().sum().item()                                           # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return {"ms": 1000 * np.median(seconds)}


# --------------------------------------------------------------------------------------------------
# The tables.

def tables(config, count, frames):
    """As in evaluate.py. count: clips of each kind; frames: of the streams."""
    clip = {"seed": "eval 1 False", "clips": count, "frames": CLIP, "objects": 1}
    frames = min(frames, 20 * CLIP)                         # 20 times the training's length
    stream = clip | {"seed": "stream False", "clips": math.ceil(count / 4)}
    whole = stream | {"frames": frames, "piece": math.ceil(frames / 30)}
    half = stream | {"frames": math.ceil(frames / 2), "piece": math.ceil(frames / 60)}
    found = memory_tables(config, whole, half)
    found |= clip_tables(config, clip)
    return found | training_tables(clip, half)


def memory_tables(config, stream, half):
    """Tables of streams: cache context, chunk size, number of steps."""
    drawn = {"measure": distilled_row, "distil": MANY_MEMORIES}
    moving = stream | drawn | {"seed": "stream True", "camera": True, "points": "dense"}
    sinks = grid(sink_decay=(1.0, 0.999, 0.99, 0.9, 0.5))
    sinks += grid(sink=(0,))
    kept = grid(sink_decay=(1.0, 0.99, 0.9))
    kept += [{"refreshed": True}]
    held = grid(sink=(0, 1, 2, 3), window=(1, 2, 4))
    dusk = {"attributes": (1, 0), "change": "dusk", "later": world.caption(1, 0)}
    return {"streams": (stream | drawn, sinks),
            "moving camera": (moving, sinks),
            "memory": (stream | drawn, held),
            "memory of the shipped student": (stream, held),
            "chunk": (stream | drawn, grid(chunk=(1, 5))),
            "steps": (stream | drawn, grid(sigmas=step_counts(config))),
            "carried away": (moving | {"change": "carried away", "camera": False}, kept),
            "dusk": (half | drawn | dusk, kept),
            "self-rollout": (stream, grid(model=("causal",)))}


def step_counts(config):
    """Schedules of 1, 2 and 4 steps."""
    return [schedule(steps, config.shift) for steps in (1, 2, 4)]


def clip_tables(config, clip):
    """Tables of clips: guidance, limits, objects, attention, speed, words."""
    dense = clip | {"points": "dense"}
    changes = ("teleport", "two ways", "jittered", "late", "broken")
    crossing = clip | {"objects": 2, "seed": "crossing"}
    layers = range(config.num_layers)
    watched = grid(model=("causal", "student"), layer=layers)
    watched += grid(distil=(MANY_MEMORIES,), layer=layers)
    timed = grid(chunk=(1, 3, 5, 7))
    timed += grid(sink=(0, 2, 3))
    timed += grid(window=(2, 4, None))
    timed += grid(sigmas=step_counts(config))
    limits = grid(speed=(1, 2, 3, 4, 6, 8))
    limits += grid(change=changes)
    weights = tuple(itertools.product((0, 1, 2, 3), (0, 1, 1.5, 3)))
    said = []
    for motion in (1, 2):
        scenes = {"seed": f"words {motion}", "attributes": (0, motion)}
        rows = grid(model=("vae", "student"))
        rows += grid(guidance=((0, 1.5), (1, 1.5)))
        rows += grid(model=("student", "teacher"), text=(NEUTRAL,))
        said += [scenes | row for row in rows]
    return {"guidance": (clip | {"model": "teacher"}, grid(guidance=weights)),
            "limits": (dense, limits),
            "crossing": (crossing, grid(points=("dense", "drag"), change=(None, "crossing"))),
            "objects": (dense, grid(objects=(1, 2, 3, 6))),
            "attention": (clip | {"measure": attention_row, "frames": 2 * CLIP}, watched),
            "speed": (clip | {"measure": speed_row, "clips": 1, "frames": 600}, timed),
            "words": (clip | {"measure": words_row, "clips": 2 * clip["clips"]}, said)}


def training_tables(clip, half):
    """Tables of short trainings: distillations, by both papers' settings; causal students from
    trajectories and from clips; teachers with damaged tracks, and with tracks as a drawn video.
    half: settings of a stream."""
    ways = [
        Distillation(),
        Distillation(guidance=(0, 0)),
        Distillation(seed=1),
        Distillation(seed=1, guidance=(0, 0)),
        Distillation(critic_steps=1),
        Distillation(critic_steps=2),
        Distillation(sink_decay=0.9),
        Distillation(reward="motion"),
        Distillation(reward="motion", beta=2.0),
    ]
    students = [{"distil": how} for how in ways]
    students += [{"distil": Distillation(), "sink_decay": 0.9}]     # EMA-Sink in streaming alone
    students += [{"measure": eval_row, "model": model} for model in ("causal", "student")]
    starts = [Start(causal_from=way, seed=seed) for seed in (0, 1) for way in CAUSAL_FROM]
    started = grid(model=("causal", "student"), start=starts)
    lessons = (Lesson(200, start=True), Lesson(200, start=True, harm=True))
    harmed = grid(teach=lessons, change=(None, "jittered", "late", "broken"))
    drawn = grid(teach=(Lesson(), Lesson(drawn=True)))
    dense = clip | {"points": "dense"}
    taught = dense | {"measure": taught_row}
    return {"distillation, dense": (dense | {"measure": distilled_row}, students),
            "distillation, drag": (clip | {"measure": distilled_row}, students),
            "distillation, stream": (half | {"measure": distilled_row}, students),
            "causal start, dense": (dense | {"measure": started_row}, started),
            "causal start, drag": (clip | {"measure": started_row}, started),
            "damaged tracks": (taught, harmed),
            "drawn tracks": (taught, drawn),
            "encoding": (dense | {"measure": encoding_row, "clips": 1}, grid(by=("vae", "head"))),
            "decoders": (clip | {"measure": decoders_row}, [{}])}


def run(argv):
    """Measure the tables of the experiments. Returns the exit code."""
    args = new_parser(__doc__).parse_args(argv)
    trained = open_trained(args.out, args.device, args.seed)
    if trained.files:       # the shipped student is that of the stage causal
        trained = replace(trained, files=trained.files | {"causal": trained.path("student")})
    what = f"{weights_of(trained)}, {args.clips} clips, {args.frames} frames"
    measure_tables(trained, "experiments", what, tables(trained.config, args.clips, args.frames))
    return 0


def main(argv=None):
    """`run`, with its errors as one line and an exit code."""
    return sample.reported(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
