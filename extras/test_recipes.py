"""The recipes of training: noise levels and tracks, where a student starts, what is logged."""

import contextlib
import itertools
import json
import unittest.mock
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import train_distill as td
from extras import evaluate, experiments, guard, watch
from extras.evaluate import Trained
from extras.reward_forcing import clip_weight
from extras.testing import (COPYING, SMALL, assert_near, clip_of, folder, linear_vae, new_model,
                            new_tracks, new_vae, own_flags, part_of, quiet, rand, rand_like, same,
                            saved, seeded)
from motionstream import PRESETS, MotionStream, add_noise, rollout, schedule, shift_sigma

STAGES = ("teacher", "causal", "distill")


def write_clips(here, count=4, frames=45, tracks=40):
    """A folder of clips, random latents, whose tracks are all visible and on no known object."""
    h, w = SMALL.latent_size
    for i in range(count):
        td.write_clip(here / f"{i}.safetensors", {
            "latents": rand(SMALL.out_dim, (frames + 3) // 4, h, w, seed=i).half(),
            "tracks": 18 + 6 * rand(frames, tracks, 2, seed=i),
            "visible": torch.ones(frames, tracks, dtype=torch.bool),
            "group": torch.full((tracks,), -1),
            "text": rand(2, SMALL.text_dim, seed=i),
        })
    return here


def small_run(here, more=()):
    """The Run of a training of small models on clips that lie in `here`."""
    flags = own_flags(here, write_clips(here / "data"))
    return td.resolve(td.parse(flags + list(more)))


def before(here):
    """Random weights of teacher and causal student, for the stages after them."""
    (here / "runs/out").mkdir(parents=True)
    for name in "teacher", "causal":
        saved(here / f"runs/out/{name}.safetensors", new_model(causal=name == "causal"))


def train(here, stages, more=()):
    """A step of each stage of such a training; the rows that were logged."""
    flags = own_flags(here, write_clips(here / "data")) + list(more)
    with quiet() as (_, err), unittest.mock.patch.object(watch, "show", lambda *_: None):
        for stage in stages:
            code = td.main(flags + ["--stage", stage, "--steps", "1"])
            assert code is None, err.getvalue()
    return [json.loads(line) for line in open(here / "runs/out/stats.jsonl")]


@contextlib.contextmanager
def watched(name):
    """The calls of a function of train_distill, as they come."""
    with unittest.mock.patch.object(td, name, wraps=getattr(td, name)) as function:
        yield function.call_args_list


# --------------------------------------------------------------------------------------------------
# The teacher's noise levels.

def test_the_full_size_teacher_learns_at_the_noise_levels_where_its_sampler_and_dmd_ask():
    steps = torch.tensor(schedule(48, 6.0))
    assert (steps >= 0.98).sum() == 6
    torch.manual_seed(0)
    usual = td.draw_sigma(100_000, 6.0, 0.0, 0.0)
    assert 0.016 < (usual >= 0.98).float().mean() < 0.02, "the 1.8 % that the setting is there for"
    s = td.PAPER
    sigma = td.draw_sigma(100_000, 6.0, s.p_pure_noise, s.p_uniform_sigma)
    evenly = shift_sigma((torch.arange(100_000) + 0.5) / 100_000, 6.0)
    assert (sigma.sort().values - evenly).abs().max() < 0.02
    assert 0.1 < (sigma >= 0.98).float().mean() < 0.12
    assert td.PAPER_STAGE_2.p_uniform_sigma == s.p_uniform_sigma


def test_the_tiny_teachers_noise_levels_are_logit_normal_and_1_as_before():
    torch.manual_seed(0)
    sigma = td.draw_sigma(1000, 5.0, td.TINY.p_pure_noise, td.TINY.p_uniform_sigma)
    after = torch.rand(1)
    torch.manual_seed(0)
    expected = shift_sigma(torch.randn(1000).sigmoid(), 5.0)
    pure = torch.rand(1000) < 0.5
    assert sigma.equal(expected.masked_fill(pure, 1.0))
    assert torch.rand(1).equal(after)


def test_the_share_of_uniform_noise_levels_reaches_the_teacher():
    with folder() as here, watched("draw_sigma") as calls:
        train(here, ["teacher"], ["--set", "p_uniform_sigma=0.75", "--set", "p_pure_noise=0.125"])
    _, shift, pure, uniform = calls[0].args
    assert (shift, pure, uniform) == (SMALL.shift, 0.125, 0.75)


# --------------------------------------------------------------------------------------------------
# Settings reach what they are of.

def test_shares_and_weights_reach_the_teachers_loss():
    more = ["--set", "p_no_text=0.25", "--set", "p_no_tracks=0.75", "--set", "track_weight=2.5"]
    with folder() as here, watched("drop") as drops, watched("flow_loss") as losses:
        train(here, ["teacher"], more + ["--set", "dense_share=1"])
    assert [call.args[1] for call in drops] == [0.75, 0.25]
    cell_weight = losses[0].args[5]
    assert set(cell_weight.unique().tolist()) == {1.0, 3.5}


def test_beta_reaches_the_weight_of_a_rewarded_clip():
    x0 = rand(2, SMALL.out_dim, 3, *SMALL.latent_size)
    with folder() as here:
        run = small_run(here, ["--set", "beta=2"])
    run = replace(run, reward=lambda video, told: torch.tensor([1.0, 3.0]))
    with torch.no_grad():
        weight, reward = clip_weight(run, new_vae(), x0, {}, {})
    assert_near(weight.flatten(), torch.tensor([0.5, 1.5]).exp(), 1e-6)
    assert reward == 2


def test_every_network_learns_by_its_own_settings():
    more = []
    for i, name in enumerate(["teacher", "causal", "generator", "critic"]):
        more += ["--set", f"{name}.adam={i + 1}e-5", "--set", f"{name}.warm_up={i + 2}"]
    with folder() as here, watched("Learner") as calls, watched("drop") as drops:
        run = small_run(here, more)
        train(here, STAGES, more)
    assert len(drops) == 2, "tracks and text, for the teacher alone"
    for call in calls:
        assert call.args[2] == getattr(run.settings, call.args[0])
    assert [call.args[0] for call in calls] == ["teacher", "causal", "generator", "critic"]


# --------------------------------------------------------------------------------------------------
# Sparse and empty motion.

def given_counts(run, clips=200, dense=False):
    """How many of 2,500 tracks, on no known object, are given at all, clip by clip."""
    torch.manual_seed(0)
    visible = torch.ones(clips, 5, 2500, dtype=torch.bool)
    group = torch.full((clips, 2500), -1)
    tracks = torch.zeros(clips, 5, 2500, 2)
    tracks[:, 1:] = 9                                           # all of it moves
    given = td.given_tracks(run, tracks, visible, group, dense)
    return given.any(1).sum(1)


def test_half_of_the_clips_of_full_size_have_what_a_user_might_draw_or_nothing():
    with folder() as here:
        run = small_run(here)
        for settings in td.PAPER, td.PAPER_STAGE_2:
            count = given_counts(replace(run, settings=settings))
            assert 0.4 < (count <= 64).float().mean() < 0.6
            assert (count == 0).sum() > 10
            assert (count == 1).sum() > 5
            assert (count[count > 64] >= 1000).all()
        papers = replace(td.PAPER_STAGE_2, p_sparse=0.0)
        assert given_counts(replace(run, settings=papers)).min() >= 1000
        tracked = replace(td.PAPER, track_what_moves=True)
        count = given_counts(replace(run, settings=tracked))
        assert (count == 0).sum() < 5, "none, but where a pause hides the only one"
        dense = given_counts(replace(run, settings=td.PAPER), dense=True)
        assert dense.min() >= 1000, "stage 1 sees all tracks"


def test_sparse_tracks_reach_the_teacher_the_trajectories_the_causal_student_and_distillation():
    def nothing(visible, group, tracks):
        return torch.zeros_like(visible)

    for stage, start in itertools.product(STAGES, guard.CAUSAL_FROM):
        if start != "trajectories" and stage != "causal":
            continue
        more = ["--set", "p_sparse=1", "--set", "dense_share=0", "--set", f"causal_from={start}",
                "--set", "batch=1"]
        with folder() as here, unittest.mock.patch.object(td, "user_tracks", nothing), \
                watched("motion_inputs") as calls:
            before(here)
            train(here, [stage], more + ["--set", "trajectories=2"])
        assert calls, stage
        assert not any(call.kwargs["visible"].any() for call in calls), (stage, start)


def test_other_sparse_tracks_are_other_trajectories():
    with folder() as here, quiet():
        before(here)
        run = small_run(here, ["--set", "trajectories=1", "--set", "batch=1"])
        files = td.training_clips(run, run.clip_latents)
        usual = td.make_trajectories(run, files)
        papers = replace(run, settings=replace(run.settings, p_sparse=0.0))
        assert td.make_trajectories(papers, files)[0].parent != usual[0].parent


# --------------------------------------------------------------------------------------------------
# Dead work.

@contextlib.contextmanager
def counted_passes():
    """A Counter of all models' passes in here: True, those that write to a cache, and False."""
    count = Counter()
    forward = MotionStream.forward

    def counting(model, *args, **given):
        count[given.get("write", False)] += 1
        return forward(model, *args, **given)

    with unittest.mock.patch.object(MotionStream, "forward", counting):
        yield count


def test_a_rollout_in_training_does_not_cache_its_last_chunk_and_has_the_same_bits():
    with folder() as here, quiet():
        run = small_run(here)
        files = td.training_clips(run, 1)
        generator = new_model().requires_grad_(True)
        kept = []

        def keeping(*args, **given):
            for chunk in rollout(*args, **given):
                kept.append(chunk)
                yield chunk

        for grad in True, False:
            plan = td.draw_plan(run, 0, "generator")
            torch.manual_seed(0)
            with counted_passes() as count:
                x0, _, _ = td.generated_clip(run, generator, None, files, plan, grad)
            passes = run.clip_chunks * (plan.exit_step + 1)
            assert count == {True: run.clip_chunks - 1, False: passes}
            assert x0.requires_grad == grad
            torch.manual_seed(0)
            kept.clear()
            with unittest.mock.patch.multiple(td, rollout=keeping), \
                    unittest.mock.patch.object(td.itertools, "islice", lambda chunks, _: chunks), \
                    counted_passes() as count:
                td.generated_clip(run, generator, None, files, plan, grad)
            assert count[True] == run.clip_chunks, "as it was"
            assert x0[:, :, 1:].equal(torch.cat(kept, 2)[:, :, 1:])


def test_the_regression_does_not_cache_the_last_chunk():
    model = new_model()
    x0, given, _ = clip_of(12)
    with counted_passes() as count:
        td.causal_loss(model, [x0] * 3, x0, given, dict(sink=1, window=1))
    assert count == {True: 3, False: 4}


# --------------------------------------------------------------------------------------------------
# Where the causal student starts.

def test_clips_stand_for_trajectories_with_noise_on_the_truth():
    with folder() as here, quiet():
        run = small_run(here)
        files = td.training_clips(run, 12)
        torch.manual_seed(0)
        states, x0, points, conditions = experiments.draw_noised_clips(run, files, 3)
        torch.manual_seed(0)
        batch = td.draw_batch(run, files, 3, 12)
        noise = torch.randn_like(batch.latents)
        assert x0.equal(batch.latents)
        assert len(states) == len(run.config.sigmas)
        for state, sigma in zip(states, run.config.sigmas):
            assert state.equal(add_noise(x0, noise, torch.full((3,), sigma)))
        assert points["visible"].equal(batch.points["visible"])
        assert conditions["text"].equal(batch.conditions["text"])


def test_a_causal_student_starts_from_clips_without_a_trajectory():
    with folder() as here:
        before(here)
        more = ["--set", "causal_from=clips", "--set", "steps=7"]   # no multiple of the student's 3
        more += ["--set", "corrupt_context=True"]
        damage = unittest.mock.patch.object(
            experiments, "corrupt_context", lambda x0, first: x0 * first)
        with unittest.mock.patch.object(td, "make_trajectories", None), damage, \
                watched("causal_loss") as calls:
            train(here, ["causal"], more)
        _, states, x0, _, _, _, past = calls[0].args
        assert past.equal(3 * x0)
        assert len(states) == 3
        assert x0.shape == states[0].shape
        assert not states[0].equal(x0)
        student = MotionStream.from_pretrained(here / "runs/out/causal.safetensors")
        assert student.config.causal
        assert not same(student.state_dict(), new_model().half().state_dict())


def test_a_causal_student_learns_from_its_own_rollouts_what_the_truth_is():
    made = []
    truth = []
    exits = []
    draw_batch = td.draw_batch

    def keep(*args):
        truth.append(draw_batch(*args))
        return truth[-1]

    def record(model, noise, conditions, first_latent, exit_step):
        assert noise.shape[2] == 12 and first_latent.shape[2] == 1
        exits.append(exit_step)
        for chunk in rollout(model, noise, conditions, first_latent, exit_step):
            made.append(chunk)
            yield chunk

    with folder() as here, quiet():
        before(here)
        run = small_run(here, ["--set", "causal_from=rollouts", "--set", "track_weight=0"])
        files = td.training_clips(run, run.clip_latents)
        student = new_model().requires_grad_(True)
        with unittest.mock.patch.multiple(td, rollout=record, draw_batch=keep):
            loss = td.loss_on_rollouts(run, student, None, files, 0)
            steps = []
            for update in 0, 0, 1, 2, 3, 4:         # whatever else is random in a process
                td.loss_on_rollouts(run, student, None, files, update)
                steps.append(exits[-1])
    assert exits[0] == steps[0] == steps[1], "all processes end at the same step"
    assert len(set(steps)) > 1
    x0 = torch.cat(made[:4], 2)
    assert_near(loss, (x0 - truth[0].latents).abs().mean(), 1e-2)
    loss.backward()
    assert student.blocks[0].ffn[0].weight.grad.abs().max() > 0


def test_own_rollouts_of_a_copying_model_are_compared_in_pixels_most_of_all_at_tracks():
    vae = linear_vae()
    student = new_model(**vars(COPYING))
    height, width = COPYING.size
    x0, given, image = clip_of(6, COPYING)
    tracks, visible, ids = new_tracks(21, 4)
    visible = visible & (tracks[..., :1] < width / 2).any(-1)
    points = {"tracks": tracks, "visible": visible, "ids": ids, "start": tracks[:, 0],
              "frame_0": rand(2, 3, height, width)}
    batch = td.Batch(x0, {"text": given["text"], "image": image}, points, visible)
    run = SimpleNamespace(config=COPYING, seed=0, clip_latents=6,
                          settings=SimpleNamespace(batch=2, track_weight=3.0))
    made = 5 * rand_like(x0, seed=9)                    # some pixels are beyond black or white
    made.requires_grad_(True)

    def roll(*args):
        return iter(made.split(3, 2))

    with unittest.mock.patch.multiple(td, rollout=roll, draw_batch=lambda *args: batch):
        loss = td.loss_on_rollouts(run, student, vae, None, 0)
    cells = td.touched_cells(tracks, visible, COPYING)
    assert 0.1 < cells.mean() < 0.9
    error = vae.decode_unclamped(made)[0] - vae.decode_unclamped(x0)[0]
    error = (error.square() + 1e-4).sqrt().mean(1)
    total = 0.0
    for t in range(21):
        latent = (t + 3) // 4                                   # of frame t
        weight = 1 + 3 * cells[:, latent]
        weight = weight.repeat_interleave(8, 1).repeat_interleave(8, 2)
        total += (weight * error[:, t]).mean()
    assert_near(loss, total / 21, 1e-5)
    loss.backward()
    assert made.grad.abs().amax((0, 1, 3, 4)).min() > 0, "every latent frame learns"


def test_a_single_outlier_does_not_pull_what_a_rollout_learns_to_predict():
    truth = torch.tensor([0.0, 0, 0, 1, 0]).view(5, 1, 1, 1, 1)
    guess = torch.full((1, 1, 1, 1, 1), 0.2, requires_grad=True)      # the mean

    def roll(*args):
        yield guess.expand_as(truth)

    student = SimpleNamespace(config=replace(SMALL, chunk=1))
    with unittest.mock.patch.object(td, "rollout", roll):
        td.rollout_loss(student, truth, {}, None, 0).backward()
    assert guess.grad.item() > 0.5, "towards the median, 0"


def test_a_causal_student_learns_from_clips():
    torch.manual_seed(0)
    model = new_model(num_layers=1).requires_grad_(True)
    model.track_head.requires_grad_(False)
    x0 = 0.3 * rand(2, 4, 12, 4, 6, seed=1)
    given = clip_of(12)[1]
    learner = td.Learner("causal", model, td.Learning(2e-2, 2e-2))
    losses = []
    for i in range(25):
        noise = torch.randn_like(x0)
        states = [add_noise(x0, noise, torch.full((2,), sigma)) for sigma in SMALL.sigmas]
        loss = td.causal_loss(model, states, x0, given, dict(sink=1, window=1))
        learner.backward(loss)
        learner.update(i)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


ONE = {"sink": 1, "window": 1}          # chunk each


def student_and_copies():
    """A student, its teacher-forced copy under guidance, its average."""
    return [new_model(seed, num_layers=1, steps=4, guidance=(2.0, 1.0)) for seed in range(3)]


def past_of(model, past, given):
    """Caches of sink 1 and window 1 after the chunks in `past`, of 3 latents each."""
    caches = model.new_caches(sink=1, window=1)
    for start in range(0, past.shape[2], 3):
        now = slice(start, start + 3)
        sigma = torch.zeros(len(past))
        model(past[:, :, now], sigma, **part_of(given, now), caches=caches, write=True)
    return caches


def velocity_after(model, x_t, sigma, past, given):
    """A model's velocity of the chunk after `past`, float64; 0 for the clip's clean frame."""
    begin = past.shape[2]
    caches = past_of(model, past, given)
    part = part_of(given, slice(begin, begin + 3))
    sigmas = torch.full((len(x_t), 3), sigma)
    if begin == 0:
        sigmas[:, 0] = 0
    velocity = model(x_t.float(), sigmas, **part, caches=caches).double()
    return velocity * (sigmas > 0)[:, None, :, None, None]


def guided_after(model, x_t, sigma, past, given):
    """Eq. 2 by three separate passes, each variant after a past of its own."""
    no_text = given | {"text": torch.zeros_like(given["text"])}
    no_motion = given | {"tracks": torch.zeros_like(given["tracks"])}
    full = velocity_after(model, x_t, sigma, past, given)
    text = velocity_after(model, x_t, sigma, past, no_text)
    motion = velocity_after(model, x_t, sigma, past, no_motion)
    base = 2 / 3 * text + 1 / 3 * motion
    return base + 2.0 * (full - text) + 1.0 * (full - motion)


def consistency_again(models, x0, noise, past, given, hop, weight):
    """consistency_loss in float64, of one state after the other. Draws the same levels."""
    student, forced, average = models
    k = SMALL.shift
    even = [1 - i / 4 for i in range(5)]
    sigmas = [k * s / (1 + (k - 1) * s) for s in even]
    loss = 0.0
    for start in range(0, x0.shape[2], 3):
        begin = hop * int(torch.randint(0, 4 // hop, ()))
        now = slice(start, start + 3)
        before = past[:, :, :start]
        clean = x0[:, :, now].double()
        x_t = (1 - sigmas[begin]) * clean + sigmas[begin] * noise[:, :, now].double()
        if start == 0:
            x_t[:, :, 0] = clean[:, :, 0]
        x = x_t
        for i in range(begin, begin + hop):
            x = x + (sigmas[i + 1] - sigmas[i]) * guided_after(forced, x, sigmas[i], before, given)
        end = sigmas[begin + hop]
        wanted = x
        if end:
            wanted = x - end * velocity_after(average, x, end, before, given)
        made = x_t - sigmas[begin] * velocity_after(student, x_t, sigmas[begin], before, given)
        loss = loss + weight * (made - wanted).square().sum()
    return loss / x0.numel()


def test_consistency_is_that_of_its_formula_with_a_past_of_its_own_for_each_network():
    models = student_and_copies()
    x0, given, _ = clip_of(9)
    noise, _, _ = clip_of(9, seed=7)
    for past, hop in (x0, 2), (0.5 * x0, 1), (x0, 4):
        sigmas = schedule(4, SMALL.shift)[::hop]
        states = [add_noise(x0, noise, torch.full((2,), sigma)) for sigma in sigmas]
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.no_grad():
                again = consistency_again(models, x0, noise, past, given, hop, 3.0)
            torch.manual_seed(seed)
            loss = experiments.consistency_loss(
                models[0], states, x0, given, ONE, 3.0, past,
                forced=models[1], average=models[2], hop=hop)
            assert_near(loss, again, 1e-4)


def test_where_the_steps_end_at_0_their_x0_is_what_the_student_is_to_predict():
    student, forced, average = student_and_copies()
    x0, given, _ = clip_of(3)
    noise, _, _ = clip_of(3, seed=7)
    forced.config = replace(forced.config, guidance=(0.0, 0.0))
    with torch.no_grad():
        loss = experiments.consistency_loss(
            student, [noise], x0, given, ONE, forced=student, average=average, hop=4)
        x = noise
        sigmas = schedule(4, SMALL.shift) + (0.0,)
        for sigma, following in zip(sigmas, sigmas[1:]):
            x = x + (following - sigma) * forced(x, torch.full((2,), sigma), **given)
        ends = experiments.predicted_x0(average, x, 0.0, given, average.new_caches(), None)
    assert ends.equal(x), "whatever the average says"
    assert loss > 0


def test_consistency_teaches_the_first_step_where_the_many_steps_end():
    """A student's x0 from noise in one step comes nearer to where its forced copy's ODE ends."""
    student, forced = [new_model(num_layers=1, steps=4, guidance=(0.0, 0.0)) for _ in range(2)]
    student.requires_grad_(True).track_head.requires_grad_(False)
    x0, given, _ = clip_of(3)
    noise, _, _ = clip_of(3, seed=7)
    first = x0[:, :, :1]
    sigmas = schedule(4, SMALL.shift)
    states = [add_noise(x0, noise, torch.full((2,), sigma)) for sigma in sigmas]
    learner = td.Learner("causal", student, td.Learning(None, 3e-3, ema=0.9))
    with torch.no_grad():
        ends = experiments.solve(forced, noise, sigmas + (0.0,), given, forced.new_caches(), first)

    def off():
        with torch.no_grad():
            made = experiments.predicted_x0(student, noise, 1.0, given, student.new_caches(), first)
        return (made - ends)[:, :, 1:].square().mean().item()

    torch.manual_seed(0)
    before = off()
    for i in range(40):
        loss = experiments.consistency_loss(
            student, states, x0, given, ONE, forced=forced, average=learner.average, hop=1)
        learner.backward(loss)
        learner.update(i)
    assert off() < 0.5 * before, (before, off())


def test_a_student_starts_by_consistency_from_its_teacher_forced_self():
    more = ["--set", "causal_from=consistency", "--set", "causal_updates=4", "--set", "steps=6",
            "--set", "consistency_hop=2"]
    losses = []

    def note(*args, **kwargs):
        losses.append((args, kwargs))
        return consistency_loss(*args, **kwargs)

    consistency_loss = experiments.consistency_loss
    with folder() as here, unittest.mock.patch.object(td, "make_trajectories", None), \
            unittest.mock.patch.object(experiments, "consistency_loss", note), \
            watched("causal_loss") as regressed:
        before(here)
        flags = own_flags(here, write_clips(here / "data")) + more + ["--stage", "causal"]
        with quiet() as (_, err), unittest.mock.patch.object(watch, "show", lambda *_: None):
            assert td.main(flags) is None, err.getvalue()
        forced = load_file(here / "runs/out/forced.safetensors")
        student = load_file(here / "runs/out/causal.safetensors")
    assert len(regressed) == len(losses) == 2
    (_, states, *_), networks = losses[0]
    assert len(states) == 3, "every second of six levels"
    assert networks["hop"] == 2
    assert same(networks["forced"].half().state_dict(), forced)
    assert not same(forced, student)
    assert same(networks["average"].half().state_dict(), student)


def test_two_starts_of_two_seeds_are_compared_by_the_experiments():
    config = replace(PRESETS["tiny"], num_layers=1)
    common, rows = experiments.tables(config, 1, 45)["causal start, drag"]
    starts = {row["start"] for row in rows}
    assert {(start.causal_from, start.seed) for start in starts} == set(
        itertools.product(("trajectories", "clips", "rollouts", "consistency"), (0, 1)))
    assert common["measure"] == experiments.started_row
    fits = {"size": (32, 32), "text_dim": 64}
    how = experiments.Start("clips", steps=1, clips=2, seed=1)
    with folder() as here, quiet():
        saved(here / "vae.safetensors", new_vae())
        saved(here / "teacher.safetensors", new_model(causal=False, **fits))
        trained = Trained(here)
        started = experiments.start_briefly(trained, how)
        run = experiments.start_run(trained, how)
        row = experiments.started_row(
            trained, how, "causal", seed="x", clips=1, frames=9, objects=1, width=32)
    assert started.path("causal") == run.path("causal")
    assert started.seed == run.seed == 1
    assert run.settings.causal_from == "clips"
    assert run.settings.causal_updates == 1
    assert row["psnr"] > 0


def test_a_start_that_there_is_not_is_refused_in_one_line():
    with quiet() as (_, err):
        assert td.main(["--set", "causal_from=nowhere"]) == 2
    known = "trajectories, rollouts, clips, consistency"
    assert f"causal_from=nowhere: is one of {known}" in err.getvalue()
    assert len(err.getvalue().strip().splitlines()) == 1


def test_noise_levels_that_consistency_cannot_have_are_refused_in_one_line():
    for more, line in [
        (["--set", "consistency_hop=4"], "consistency_hop=4: does not divide 15 steps"),
        (["--set", "consistency_hop=3"], "5 steps of the teacher: the student's noise levels "),
    ]:
        with quiet() as (_, err):
            assert td.main(["--set", "causal_from=consistency", *more]) == 2
        assert line in err.getvalue()
        assert len(err.getvalue().strip().splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# Settings that reach what they are for.

def test_how_models_are_sampled_is_that_of_the_run_and_not_of_the_weights_it_starts_from():
    sigmas = (1.0, 0.75)                # of 4 steps under shift 3: 1, 0.9, 0.75, 0.5
    assert set(sigmas) < set(schedule(4, 3.0))
    more = ["--set", f"sigmas={sigmas}", "--set", "steps=4", "--set", "shift=3.0"]
    more += ["--guidance", "2,0"]
    with folder() as here:
        before(here)
        more += ["--set", "trajectories=2", "--set", "causal_from=trajectories"]
        with watched("euler") as solved, watched("causal_loss") as regressed:
            train(here, ["causal"], more)
        (here / "runs/out/causal.safetensors").unlink()
        saved(here / "runs/out/causal.safetensors", new_model(causal=True))
        with watched("rollout") as rolled, watched("dmd_loss") as scored, \
                watched("critic_loss") as criticised:
            train(here, ["distill"], more)
        models = [calls[0].args[0] for calls in (solved, regressed, rolled)]
        models.append(scored[0].args[1])
        student = MotionStream.from_pretrained(here / "runs/out/student.safetensors")
        for model in models + [student]:
            c = model.config
            assert (c.sigmas, c.steps, c.shift, c.guidance) == (sigmas, 4, 3.0, (2.0, 0.0))
        assert scored[0].args[5] == 3.0
        assert criticised[0].args[4] == 3.0
        assert rolled[0].args[4] in (0, 1)


# --------------------------------------------------------------------------------------------------
# What is told during training.

def test_the_shift_of_latents_is_found_in_whole_cells_whatever_comes_in():
    before = rand(5, 4, 6, 20)
    after = torch.empty_like(before)
    shifts = torch.tensor([-7, -1, 0, 3, 8])
    for row, shift in enumerate(shifts.tolist()):
        after[row] = before[row].roll(shift, 2)
        if shift > 0:
            after[row, ..., :shift] = 5 * rand(4, 6, shift, seed=9)
        elif shift < 0:
            after[row, ..., shift:] = 5 * rand(4, 6, -shift, seed=9)
    assert watch.found_shift(before, after, 9).equal(shifts)
    assert watch.found_shift(before, after + rand(*after.shape, seed=2), 9).equal(shifts)


def test_a_pan_moves_the_whole_picture_in_whole_cells_by_the_last_latent():
    config = replace(SMALL, size=(32, 96))
    tracks, visible, ids = new_tracks(45, 9)
    points, cells = watch.pan_points(config, {"tracks": tracks, "visible": visible, "ids": ids}, 12)
    assert cells.tolist() == [3, -3]
    assert points["tracks"].shape[:2] == (2, 45)
    way = points["tracks"] - points["tracks"][:, :1]
    assert not way[..., 1].any()
    for row, asked in enumerate((24.0, -24.0)):
        assert_near(way[row, 41:45, :, 0].mean(0), torch.full_like(way[row, 0, :, 0], asked), 1e-5)
    x = points["tracks"][..., 0]
    assert points["visible"].equal((x >= 0) & (x < 96))
    assert points["visible"][:, 0].all()


class Stub(torch.nn.Module):
    """A teacher whose x0 is frame 0, moved by whole cells as a track is, unless it ignores them."""

    def __init__(self, config, ignores=False):
        super().__init__()
        self.config = config
        self.ignores = ignores

    def forward(self, x_t, sigma, text, tracks):
        x0 = x_t[:, :, :1].expand_as(x_t).clone()
        for b in range(len(x0)):
            cells = round(tracks[b, 0].item() / self.config.stride)
            if not self.ignores:
                x0[b] = x0[b].roll(cells, 3)
        return (x_t - x0) / sigma[:, None, :, None, None].clamp(min=1e-9)


def teacher_errors(here, model):
    """watch.teacher_errors of a Stub on four clips, each panning by another number of cells."""
    config = model.config
    h, w = config.latent_size
    run = small_run(here)
    run = replace(run, config=config)
    files = []
    for i in range(4):
        first = rand(4, 1, h, w, seed=i).expand(-1, 12, -1, -1)
        latents = first.roll(i, 3)
        latents = torch.cat([first[:, :1], latents[:, 1:]], 1)
        tracks = torch.full((45, 3, 2), 16.0)
        tracks[:, :, 0] += torch.linspace(0, 8 * i, 45)[:, None]
        files.append(here / f"pan/{i}.safetensors")
        td.write_clip(files[-1], {
            "latents": latents, "tracks": tracks, "group": torch.full((3,), -1),
            "visible": torch.ones(45, 3, dtype=torch.bool), "text": rand(2, 12)})

    def far(model, tracks, visible, ids, vae):
        """How far the first track goes, to the middle of the last latent, in place of features."""
        way = tracks[:, -4:, 0, 0].mean(1) - tracks[:, 0, 0, 0]
        return {"tracks": way[:, None]}

    with unittest.mock.patch.object(td, "motion_inputs", far):
        return watch.teacher_errors(run, model, None, files)


def test_a_teacher_that_ignores_its_tracks_is_told_from_one_that_follows():
    config = replace(SMALL, causal=False, size=(32, 128))
    with folder() as here, quiet():
        follows = teacher_errors(here, Stub(config))
        ignores = teacher_errors(here, Stub(config, ignores=True))
    assert follows["pan_error"] == 0
    assert ignores["pan_error"] == 32, "a quarter of the width"
    assert follows["x0_tracks"] < 1e-6
    assert follows["x0_swapped"] > follows["x0_tracks"] + 0.1
    assert follows["x0_none"] > follows["x0_tracks"] + 0.1
    assert ignores["x0_swapped"] - ignores["x0_none"] < 1e-6
    bins = [name for name in follows if name.startswith("loss_")]
    assert bins == ["loss_0_0.5", "loss_0.5_0.9", "loss_0.9_0.98", "loss_0.98_1"]


def test_a_teachers_errors_are_means_over_24_clips_however_small_a_batch_is():
    each = [{"x0_tracks": value} for value in (torch.tensor(1.0), 2, 3, 6)]
    with folder() as here, quiet():
        run = small_run(here)
        run = replace(run, settings=replace(run.settings, batch=1))
        with unittest.mock.patch.object(td, "draw_batch") as drawn, \
                unittest.mock.patch.object(watch, "errors_on_batch", side_effect=each):
            assert watch.teacher_errors(run, None, None, []) == {"x0_tracks": 3.0}
    assert [call.args[2] for call in drawn.call_args_list] == [6, 6, 6, 6]


def test_flow_losses_are_told_by_bins_of_sigma():
    with folder() as here, quiet(), watched("flow_loss") as calls:
        teacher_errors(here, Stub(replace(SMALL, causal=False)))
    spans = []
    for call in calls[3:]:
        sigma = call.args[2]
        spans.append((sigma.min().item(), sigma.max().item()))
    expected = torch.tensor([(0, 0.5), (0.5, 0.9), (0.9, 0.98), (0.98, 1)])
    assert_near(torch.tensor(spans), expected, 1e-6)


def test_the_numbers_of_teacher_and_student_are_logged_and_printed():
    with folder() as here:
        flags = own_flags(here, write_clips(here / "data"))
        every = {"teacher": 1, "distill": 2}
        before(here)
        during = []

        def show(run, stage):
            during.extend(path.name for path in run.out.glob("*.png"))
            evaluate.plot_stage(run.out, stage)

        plotted = unittest.mock.patch.multiple(watch, REPORT_EVERY=every, show=show)
        with quiet() as (out, err), plotted:
            for stage, updates in ("teacher", "1"), ("distill", "3"):
                own = ["--stage", stage, "--steps", updates, "--accumulate", "1"]
                code = td.main(flags + own)
                assert code is None, err.getvalue()
        rows = [json.loads(line) for line in open(here / "runs/out/stats.jsonl")]
        pictures = sorted(path.name for path in (here / "runs/out").glob("*.png"))
    assert during.count("distill.png") == 1, "before the stage has ended"
    assert pictures == ["distill.png", "teacher.png", "teacher_pixels.png"]
    teacher, first, second, third = rows
    told = {"x0_tracks", "x0_none", "x0_swapped", "pan_error", "loss_0.98_1"}
    assert told < teacher.keys()
    told = {"apart_0.3", "apart_0.6", "apart_0.9", "std_least", "std_most", "moves", "saturated"}
    assert told < second.keys()
    assert not told & first.keys()
    assert not told & third.keys()
    lines = out.getvalue().splitlines()
    assert sum(line.startswith("teacher: {\"x0_tracks\"") for line in lines) == 1, lines
    assert sum(line.startswith("distill: {") for line in lines) == 1, lines


def test_the_numbers_of_a_student_are_those_of_what_it_makes():
    class Still:
        """Decodes latents to half white."""
        def decode(self, latents):
            video = torch.zeros(1, 3, 45, 8, 8)
            video[..., :4] = 1
            return video, None

    with folder() as here, quiet():
        run = small_run(here)
        files = td.training_clips(run, 1)
        config = replace(SMALL, causal=False, latent_std=(1.0, 1.0, 1.0, 4.0))
        teacher = new_model(1, causal=False)
        teacher.config = config
        x0 = torch.ones(2, 4, 12, 4, 6)
        x0[:, 0] = 3
        x0[:, :, 1::2] *= -1
        conditions = clip_of(12)[1]
        plans = []

        def made(run, generator, vae, files, plan, grad):
            plans.append(plan)
            return x0, conditions, None

        with unittest.mock.patch.object(td, "generated_clip", made):
            numbers = watch.student_numbers(run, None, teacher, teacher, Still(), files)
            critic = new_model(2, causal=False)
            other = watch.student_numbers(run, None, teacher, critic, Still(), files)
    assert plans[0] == td.Plan(4, 2, run.streaming), "a whole clip, to the last step"
    assert numbers["std_least"] == 0.25
    assert numbers["std_most"] == 3
    assert numbers["moves"] == 2 * (3 + 1 + 1 + 1) / 4
    assert numbers["saturated"] == 0.5
    for sigma in 0.3, 0.6, 0.9:
        assert other[f"apart_{sigma}"] > numbers[f"apart_{sigma}"] + 0.01


def test_a_batch_and_a_reward_hold_the_images_pixels_beside_its_latent():
    seen = []

    def reward(video, known):
        seen.append(known)
        return torch.zeros(2)

    pixels = torch.randint(0, 256, (3, 32, 48), generator=seeded()).to(torch.uint8)
    with folder() as here, quiet():
        run = small_run(here)
        files = td.training_clips(run, 12)
        for file in files:
            td.write_clip(file, load_file(file) | {"first": pixels})
        run = replace(run, config=COPYING, reward=reward)
        batch = td.draw_batch(run, files, 2, 12)
    latent = batch.latents[:, :, :1]
    clip_weight(run, new_vae(), latent, batch.conditions, batch.points)
    known, = seen
    assert known["image"].equal(latent)
    assert_near(known["frame_0"][0], pixels / 127.5 - 1, 1e-6)
