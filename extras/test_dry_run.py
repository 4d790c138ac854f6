"""The dry run: its counts are those of real micro-steps."""

import contextlib
import functools
import importlib
import unittest
import unittest.mock
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import train_distill as td
from extras import dry_run
from extras.testing import folder, new_model, quiet, rand, saved, seeded
from motionstream import PRESETS, Config

SMALL = Config(in_dim=32, track_dim=16, clip_dim=40, dim=96, ffn_dim=350, num_heads=3, num_layers=4,
               text_dim=64, text_len=8, size=(64, 64), clean_first=False)


def resolved(config=SMALL, flags=()):
    """A training of that config, on the CPU in float32."""
    with quiet(), unittest.mock.patch.dict(PRESETS, {"wan2.1-1.3b": config}):
        run = td.resolve(td.parse(["--dry-run", "wan2.1-1.3b"] + list(flags)))
    return replace(run, device="cpu", dtype=torch.float32)


def test_a_dry_run_tells_parameters_and_costs_and_makes_nothing():
    resource = importlib.import_module("resource")                  # not on Windows
    with folder() as here:
        flags = ["--dry-run", "wan2.1-1.3b", "--out", str(here / "out"), "--no-checkpointing"]
        flags += ["--set", "clip_frames=45", "--memory", "c3s2w6"]
        costs = {name: dry_run.Cost(1e14, 2 ** 34, 3) for name in ("teacher", "causal", "distill")}
        nothing_is_counted = unittest.mock.patch.multiple(
            dry_run,
            learning_costs=lambda run, rollouts: costs,
            cost_of=lambda build, run: costs["teacher"],
            counted=lambda build, run: costs["teacher"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with quiet() as (out, err), nothing_is_counted:
            assert td.main(flags) is None, err.getvalue()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000        # KiB
        assert not (here / "out").exists()
    said = out.getvalue()
    assert "\n1,418,996,800 parameters" in said, said
    assert "| clip_frames | 45 |" in said, said
    # 8 chunks of 3 latents of 1560 tokens, 1536 wide, key and value, 30 layers, 2 bytes
    assert f"{24 * 1560 * 1536 * 2 * 30 * 2 / 2 ** 20:,.0f} MiB" in said, said
    # 1e14 a clip, 614,400 of them, 396e12 a second
    assert "| teacher, first stage | 614,400 | 100 | 1.8 | 0.45 | 0.22 |" in said, said
    assert "| teacher, second stage | 102,400 | 100 | 0.3 |" in said
    assert "| causal | 256,000 |" in said
    # 26.4 GiB as in docs/training.md, and 16 of activations, on one card of 80 GB
    memory = "| 42.4 (80 GB) | 26.6 (48 GB) | 23.9 (48 GB) |"
    assert f"| teacher, first stage | 16 | 16 {memory}" in said, said
    # of two and more GPUs each gathers the whole student, too: 4 bytes a parameter
    assert "| distill | 16 | 16 | 68.9 (80 GB) | 41.1 (80 GB) | 36.5 (48 GB) |" in said, said
    assert "600,000 clips, first set" in said, said
    assert "text 1.64" in said, said


def test_the_flops_are_those_of_the_flop_counter_and_of_attentions_backward():
    """torch counts no attention of the CPU's, so it is done by matrix products here: 2 forward and
    4 backward; fused attention computes one of the two again, which makes 5."""
    c = SMALL
    run = resolved()
    assert not run.start
    assert run.checkpointing
    kept = replace(run, checkpointing=False)

    def by_products(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    _, step = dry_run.teaching(kept)
    with FlopCounterMode(display=False) as counter, \
            unittest.mock.patch.object(F, "scaled_dot_product_attention", by_products):
        step()
    tokens = 21 * (64 // 16) ** 2
    product = 2 * tokens * (tokens + 8 + 257) * c.dim * c.num_layers    # of all attentions
    plain = dry_run.cost_of(dry_run.teaching, kept)
    assert abs(plain.flops / (counter.get_total_flops() + product) - 1) < 1e-3
    recomputed = dry_run.cost_of(dry_run.teaching, run)
    forward = recomputed.flops - plain.flops
    assert 0.26 < forward / plain.flops < 0.32, "one more forward, of 3.2 to 3.5"
    assert (plain.gathers, recomputed.gathers) == (2, 2)


def saved_bytes(step_forward, known):
    """What autograd keeps of a forward: whole storages, each once, without those known before."""
    kept = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step_forward()
    return sum(kept.values()), loss


def test_the_activations_are_what_autograd_saves():
    kept = replace(resolved(), checkpointing=False)
    networks, step = dry_run.teaching(kept)
    model = networks[0]
    x0, conditions = dry_run.batch_of(kept, 1, 21)
    known = list(model.parameters()) + [x0] + list(conditions.values())

    def forward():
        return td.flow_loss(model, x0, torch.ones(1), conditions, None)

    saved, loss = saved_bytes(forward, known)
    del loss
    with dry_run.Costs(known) as costs:
        loss = forward()                # its graph holds what is counted
        held = costs.held
    del loss
    assert abs(held / saved - 1) < 0.05, (held, saved)
    fake = dry_run.counted(dry_run.teaching, kept).held
    with dry_run.Costs(known + [p.grad for p in model.parameters()]) as costs:
        step()
    assert abs(fake / costs.most - 1) < 0.01, "on fake tensors as on real ones"
    assert fake > saved, "on fake tensors as on real ones"


@contextlib.contextmanager
def on_real_tensors():
    """Steps are counted while they are done, in here: for a small model that is faster."""
    with unittest.mock.patch.object(dry_run, "FakeTensorMode", contextlib.nullcontext):
        yield


# Clips of two chunks.
BRIEF = "--set", "clip_frames=45", "--memory", "c6s1w1"


def test_what_is_counted_on_fake_tensors_is_what_is_counted_on_real_ones():
    run = resolved(replace(SMALL, num_layers=1), BRIEF)
    generating = functools.partial(dry_run.generating, exit_step=0)
    with on_real_tensors():
        real = dry_run.counted(generating, run)
    assert dry_run.counted(generating, run) == real


def test_recomputation_keeps_a_blocks_input_and_costs_are_linear_in_layers():
    run = resolved(SMALL, BRIEF)
    tokens = 12 * (64 // 16) ** 2
    generating = functools.partial(dry_run.generating, exit_step=0)
    kept = replace(run, checkpointing=False)
    with on_real_tensors():
        for each, build in (run, dry_run.teaching), (kept, dry_run.teaching), (run, generating):
            told = dry_run.cost_of(build, each)
            counted = dry_run.counted(build, each)
            assert abs(told.flops / counted.flops - 1) < 1e-6
            assert told.gathers == counted.gathers
            # of a toy, the moment at which most is held may be another one with more layers
            assert abs(told.held / counted.held - 1) < 0.1, (told.held, counted.held)
        one_layer = replace(run, config=replace(SMALL, num_layers=1))
        one = dry_run.counted(dry_run.teaching, one_layer)
        four_layers = replace(run, config=replace(SMALL, num_layers=4))
        four = dry_run.counted(dry_run.teaching, four_layers)
    more = (four.held - one.held) / 3
    block_input = 4 * tokens * SMALL.dim                                # float32
    assert block_input <= more < 1.4 * block_input, more / block_input


def test_recomputation_does_not_change_a_rollout_without_a_backward():
    run = resolved(replace(SMALL, num_layers=1), BRIEF)
    rolling = functools.partial(dry_run.rolling, exit_step=0)
    with on_real_tensors():
        kept = dry_run.counted(rolling, replace(run, checkpointing=False))
        assert dry_run.counted(rolling, run) == kept


def test_a_rollout_is_of_the_length_and_memory_of_training():
    run = resolved(replace(SMALL, num_layers=1))
    rolling = functools.partial(dry_run.rolling, exit_step=1)
    longer = replace(run, settings=replace(run.settings, rollout=21))
    assert dry_run.mean_chunks(run) == 7
    assert dry_run.mean_chunks(longer) == 11
    with on_real_tensors():
        told = dry_run.counted(rolling, run)
        told_longer = dry_run.counted(rolling, longer)
    assert told.gathers == told_longer.gathers == 1, "a rollout keeps its generator gathered"
    assert 1.5 < told_longer.flops / told.flops < 1.7, "11 chunks, not 7"


@contextlib.contextmanager
def two_fake_processes():
    """As if there were another process, which nothing is sent to; what would be is noted: {"gather"
    or "reduce": bytes that each sends}."""
    sent = {"gather": 0, "reduce": 0}

    def counting(kind, call):
        def collective(*args, **more):
            values = list(args) + list(more.values())
            tensors = [value for value in values if torch.is_tensor(value)]
            sent[kind] += max(tensor.nbytes for tensor in tensors) / 2
            return call(*args, **more)
        return collective

    patches = {}
    for name in "all_gather_into_tensor", "all_gather_single":
        if hasattr(td.dist, name):
            patches[name] = counting("gather", getattr(td.dist, name))
    for name in "reduce_scatter_tensor", "reduce_scatter_single":
        if hasattr(td.dist, name):
            patches[name] = counting("reduce", getattr(td.dist, name))
    td.dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with unittest.mock.patch.object(td, "PROCESSES", 2), \
                unittest.mock.patch.multiple(td.dist, **patches):
            yield sent
    finally:
        td.dist.destroy_process_group()


def flow_step(model):
    x0 = rand(2, 4, 2, 4, 6)
    return td.flow_loss(model, x0, torch.rand(2, generator=seeded()), {}, x0[:, :, :1])


def causal_step(model):
    """Of a clip of three chunks."""
    x0 = rand(2, 4, 3 * model.config.chunk, 4, 6)
    states = [x0] * len(model.config.sigmas)
    with td.gathered(model):
        return td.causal_loss(model, states, x0, {}, dict(sink=1, window=1))


def bytes_of_an_update(accumulate, step=flow_step, **more):
    """What each of two processes sends for an update of a small model. more: of a Learner."""
    with two_fake_processes() as sent:
        model = new_model(causal=step is causal_step).requires_grad_(True)
        count = sum(p.numel() for p in model.parameters())
        how = td.Learning(None, 1e-3)
        learner = td.Learner("toy", model, how, accumulate=accumulate, **more)
        for _ in range(accumulate // 2):
            learner.backward(step(model))
        learner.update(0)
    return sent, count


def test_gradients_are_sent_once_an_update_and_the_dry_run_counts_what_is_sent():
    sent, count = bytes_of_an_update(accumulate=8)
    before, _ = bytes_of_an_update(accumulate=8, shard_gradients=True)
    stage = dry_run.Stage("toy", 1, dry_run.Cost(0, 0, gathers=2), None, micro_steps=8, reduced=1)
    gathered, reduced, reduced_each = stage.sent(count, 2)
    for told, counted in (gathered, sent["gather"]), (reduced, sent["reduce"]), \
            (reduced_each, before["reduce"]):
        assert abs(told / counted - 1) < 0.1, (told, counted)   # FSDP pads rows to the processes
    assert before["reduce"] == 4 * sent["reduce"]
    assert before["gather"] == sent["gather"]


def test_a_student_is_gathered_once_for_all_chunks_and_for_each_in_the_backward():
    run = resolved(replace(SMALL, num_layers=1), BRIEF)                # clips of two chunks
    with on_real_tensors():
        told = dry_run.counted(dry_run.regression, run)
    assert told.gathers == 1 + 2
    sent, count = bytes_of_an_update(accumulate=2, step=causal_step)    # clips of three
    blocks = sum(p.numel() for p in new_model(causal=True).blocks.parameters())
    gathered = 2 * (count + 3 * blocks + (count - blocks))      # the rest stays in the backward
    assert abs(gathered / sent["gather"] - 1) < 0.1, (gathered, sent)


def test_what_is_gathered_for_all_chunks_is_memory_of_several_gpus():
    cost = dry_run.Cost(0, held=7)
    stage = dry_run.Stage("toy", 1, cost, cost, sharded=16, whole=4, gathered=4)
    assert stage.memory(100, 1) == 2000 + 7
    assert stage.memory(100, 4) == 400 + 400 + 300 + 7


def test_the_gradients_of_a_students_blocks_are_sent_once_or_twice_whatever_its_chunks():
    alone, count = bytes_of_an_update(accumulate=2, step=causal_step)
    one_chunk, _ = bytes_of_an_update(accumulate=2)
    several, _ = bytes_of_an_update(accumulate=8, step=causal_step)
    each, _ = bytes_of_an_update(accumulate=8, step=causal_step, shard_gradients=True)
    blocks = sum(p.numel() for p in new_model(causal=True).blocks.parameters())
    assert alone["reduce"] == one_chunk["reduce"]
    assert each["reduce"] == 4 * alone["reduce"]
    more = several["reduce"] / alone["reduce"] - 1
    assert abs(more / (blocks / count) - 1) < 0.05, more


def test_the_second_set_is_as_large_as_the_papers():
    assert dry_run.stored_clips(resolved())["second set"] == 70_000
    with quiet():
        larger = td.resolve(td.parse(["--dry-run", "wan2.2-5b"]))
    assert dry_run.stored_clips(larger)["second set"] == 30_000


def test_the_smallest_card_that_is_not_full():
    gib = dry_run.GIB
    assert dry_run.smallest_card(21 * gib) == "24 GB"
    assert dry_run.smallest_card(22 * gib) == "48 GB"
    assert dry_run.smallest_card(72 * gib) == "141 GB"
    assert dry_run.smallest_card(200 * gib) == "no card"


def test_gradients_are_whole_or_shared_as_the_settings_say():
    run = resolved()
    shared = replace(run, settings=replace(run.settings, shard_gradients=True))
    assert dry_run.kept_bytes(run, 1, 1) == {"sharded": 16, "whole": 4}
    assert dry_run.kept_bytes(shared, 1, 1) == {"sharded": 20}
    assert dry_run.kept_bytes(run, 2, 1, frozen=1) == {"sharded": 32, "whole": 8}
    assert td.PAPER_5B.shard_gradients
    assert not td.PAPER.shard_gradients


def test_consistency_is_counted_with_the_passes_of_its_two_copies():
    config = replace(SMALL, num_layers=1, steps=6)
    flags = list(BRIEF)
    flags += ["--set", "causal_from=consistency", "--set", "consistency_share=0.25"]
    run = resolved(config, flags)
    further = resolved(config, flags + ["--set", "consistency_hop=2"])
    with on_real_tensors():
        forced = dry_run.counted(dry_run.regression, run)
        after = dry_run.counted(dry_run.consistency, run)
        far = dry_run.counted(dry_run.consistency, further)
    known = {dry_run.regression: forced, dry_run.consistency: after}
    with unittest.mock.patch.object(dry_run, "cost_of", lambda build, run: known[build]):
        mean = dry_run.causal_cost(run)
    # Two chunks, each with an Euler step of guided passes and the average's prediction; between
    # them a clean pass of both.
    assert after.gathers == forced.gathers + 2
    variants = 3
    passes = 2 * (variants + 1) + (variants + 1)
    regressed = 2 * (1 + 1 + 2) + 1                     # forward, again, backward; one clean pass
    assert abs((after.flops / forced.flops - 1) / (passes / regressed) - 1) < 0.2
    more = far.flops - after.flops
    assert abs(more / (after.flops - forced.flops) / (2 * variants / passes) - 1) < 0.1
    assert mean.held == max(forced.held, after.held)
    assert mean.gathers == forced.gathers + 0.5


def test_a_replicated_teacher_is_whole_on_every_gpu_and_never_gathered():
    config = replace(SMALL, num_layers=1)
    run = resolved(config, BRIEF)
    whole = resolved(config, list(BRIEF) + ["--set", "replicate_teacher=True"])
    generating = functools.partial(dry_run.generating, exit_step=0)
    with on_real_tensors():
        gathers = [dry_run.counted(generating, each).gathers for each in (run, whole)]
    assert gathers[0] == gathers[1] + 1, "the teacher's variants run in one batch"
    with folder() as here:
        model = new_model(**vars(config))
        count = sum(p.numel() for p in model.parameters())
        path = saved(here / "teacher.safetensors", model)
        files = {"teacher": path}
        teacher = td.real_score(replace(whole, files=files))
        own = sum(p.nbytes for p in teacher.parameters())
    assert 2 * count < own < 4 * count
    costs = {name: dry_run.Cost(1, 7) for name in ("teacher", "causal", "distill")}
    held = []
    stubs = {"learning_costs": lambda run, rollouts: costs,
             "cost_of": lambda build, run: costs["teacher"],
             "counted": lambda build, run: costs["teacher"]}
    with unittest.mock.patch.multiple(dry_run, **stubs):
        for each in run, whole:
            distill = dry_run.stages_of(each)[-1]
            held.append(distill.memory(count, 4))
    assert held[1] - held[0] == own - 4 * count / 4


def test_at_full_size_blocks_are_recomputed_unless_that_is_switched_off():
    assert resolved().checkpointing
    assert not resolved(SMALL, ["--no-checkpointing"]).checkpointing
    with quiet():
        tiny = td.resolve(td.parse(["--dry-run"]))
        switched = td.resolve(td.parse(["--dry-run", "--checkpointing"]))
    assert not tiny.checkpointing
    assert switched.checkpointing


def test_a_dry_run_of_another_config_tells_its_own_sizes():
    run = resolved(replace(SMALL, clip_dim=0))
    parts = dry_run.clip_bytes(run)
    assert parts == {"latents": 2 * 16 * 21 * 8 * 8, "tracks": 81 * 2500 * 9, "text": 2 * 8 * 64}
    assert dry_run.stream_cache(run) == 4 * 4 * 96 * 6 * 16
    first = replace(run, config=replace(run.config, first_chunk=1))
    assert dry_run.stream_cache(first) == 4 * 4 * 96 * 4 * 16
