"""Weights in other layouts than Wan's names in safetensors, and how public ones are sampled."""

import functools
import importlib.util
import inspect
import json
import math
import random
import re
import subprocess
import sys
import unittest
import unittest.mock
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sample
from extras import checkpoints
from extras.testing import (FAMILIES, HERE, WAN21, WAN22, assert_error, assert_near,
                            diffusers_config, folder, in_diffusers_layout, new_vae, public, rand,
                            randomised, same, same_tensors, settled, slow, wan_video,
                            wan_workplace, write_layout)
from motionstream import PRESETS, MotionStream, UserError, save_pretrained, schedule
from vae import STATISTICS, TinyVAEConfig, WanVAE, WanVAEConfig, load_vae


def with_diffusers(test):
    """A test that says loudly that it skips where there is nothing to compare with."""
    @functools.wraps(test)
    def maybe():
        if not importlib.util.find_spec("diffusers"):
            raise unittest.SkipTest("DIFFUSERS IS NOT INSTALLED, nothing was compared: "
                                    "pip install diffusers")
        test()
    return maybe


@functools.cache
def wan_vae():
    """{name: tensor} of a small VAE of Wan."""
    return randomised(WanVAE(WanVAEConfig(16, 4, 4))).state_dict()


@functools.cache
def tiny_vae():
    """{name: tensor} of a VAE with TAEHV's layout."""
    space_and_time = (4, 3, 2, 2)
    space = (4, 3, 1, 2)
    config = TinyVAEConfig(stem=4, encoder=(space_and_time, space_and_time, space),
                           decoder=(space, space_and_time, space_and_time), tail=4)
    return new_vae(config).state_dict()


def under(prefix, tensors):
    """The tensors with longer names."""
    return {prefix + name: t.contiguous() for name, t in tensors.items()}


def assert_refused(path, text, load=MotionStream.from_pretrained):
    assert_error(UserError, text, load, path)


# --------------------------------------------------------------------------------------------------
# Diffusers.

def inputs_of(config):
    """What such a model is given, by name."""
    given = {"text": rand(2, 5, config.text_dim, seed=1)}
    if config.track_dim:
        given["tracks"] = rand(2, config.track_dim, 3, 4, 6, seed=2)
    if config.image_dim:
        given["image"] = rand(2, config.image_dim, 3, 4, 6, seed=3)
    if config.clip_dim:
        given["clip"] = rand(2, 257, config.clip_dim, seed=4)
    return given


def velocity_of_diffusers(model, x, timestep, given):
    """What Diffusers' WanTransformer3DModel returns for the same. timestep: (B,) or (B, F)."""
    channels = [x] + [given[name] for name in ("tracks", "image") if name in given]
    text = F.pad(given["text"], (0, 0, 0, 512 - 5))
    if timestep.ndim == 2:
        timestep = timestep.repeat_interleave(6, 1)             # one a token
    velocity, = model(torch.cat(channels, 1), timestep, text, given.get("clip"), return_dict=False)
    return velocity


def converted(tensors):
    """Wan's names to those of Diffusers, by its own converter."""
    from diffusers.loaders import single_file_utils
    return single_file_utils.convert_wan_transformer_to_diffusers(dict(tensors))


def reference_of(family):
    """Diffusers' model with a family's public weights."""
    from diffusers import WanTransformer3DModel
    config, _ = FAMILIES[family]
    reference = WanTransformer3DModel(**diffusers_config(config))
    reference.load_state_dict(converted(public(family)))
    return reference.eval().requires_grad_(False)


@with_diffusers
def test_our_names_of_diffusers_tensors_are_those_of_its_converter():
    for family in FAMILIES:
        names = in_diffusers_layout(public(family))
        theirs = converted(public(family))
        assert theirs.keys() == names.keys()
        for name, t in names.items():
            assert t is theirs[name], name


@with_diffusers
def test_public_weights_give_what_diffusers_gives():
    small = torch.tensor([3.0, 17.5])
    large = torch.tensor([833.33, 999.0])                       # its angles are float32
    per_frame = torch.tensor([[0.0, 12.5, 3.0], [0.0, 0.0, 19.0]])          # as TI2V has them
    for family, (config, _) in FAMILIES.items():
        reference = reference_of(family)
        x = rand(2, config.out_dim, 3, 4, 6)
        given = inputs_of(config)
        models = []
        for layout in "Wan", "Diffusers":
            with folder() as here:
                models.append(MotionStream.from_pretrained(write_layout(here, family, layout)))
        for timestep, tolerance in (small, 1e-6), (large, 2e-5), (per_frame, 1e-6):
            expected = velocity_of_diffusers(reference, x, timestep, given)
            for model in models:
                velocity = model(x, timestep.double() / 1000, **given)
                assert_near(velocity, expected, tolerance)


@with_diffusers
def test_a_written_file_is_one_that_diffusers_reads():
    family = "Wan 2.1 I2V, Fun-InP"
    with folder() as here:
        model = MotionStream.from_pretrained(write_layout(here, family, "Wan"))
        save_pretrained(model, here / "a.safetensors")
        written = converted(load_file(here / "a.safetensors"))
    assert same(in_diffusers_layout(public(family)), written)
    reference_of(family).load_state_dict(written)


# The arguments that give Diffusers' class the sizes of WAN21 and WAN22.
IN_DIFFUSERS = {
    "2.1": {"base_dim": 8, "z_dim": 16},
    "2.2": {"base_dim": 8, "z_dim": 48, "decoder_base_dim": 12, "is_residual": True,
            "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
}
IN_STAGE = {                # layers of Wan 2.2's stages, and what Diffusers calls them
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def diffusers_name_in_stage(name):
    """What Diffusers calls a tensor of a stage of Wan 2.2's VAE."""
    match = re.fullmatch(r"(\w+)\.(down|up)samples\.(\d)\.\2samples\.(\d)\.(.+)", name)
    half, way, stage, block, layer = match.groups()
    for ours, theirs in IN_STAGE.items():
        layer = layer.replace(ours, theirs)
    last = {"down": "2", "up": "3"}[way]
    part = f"{way}sampler" if block == last else f"resnets.{block}"
    return f"{half}.{way}_blocks.{stage}.{part}.{layer}"


def renamed_for_diffusers(tensors, version):
    """Wan's names to Diffusers', by its own converter, which does not know the stages of 2.2."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    known = dict(tensors)
    staged = {}
    if version == "2.2":
        for name in tensors:
            if "samples." in name:
                staged[diffusers_name_in_stage(name)] = known.pop(name)
    return convert_wan_vae_to_diffusers(known) | staged


def write_vaes(here, version, ours, theirs):
    """Writes a VAE as public repositories have it. Returns the folders and files to load."""
    wan = here / f"{version}-Wan"
    diffusers = here / version
    (diffusers / "vae").mkdir(parents=True)
    wan.mkdir()
    torch.save(ours, wan / f"Wan{version}_VAE.pth")
    beside = {"patch_embedding.weight": rand(3)}                # not the VAE
    save_file(beside, wan / "diffusion_pytorch_model.safetensors")
    save_file(ours, here / "original.safetensors")
    save_file(theirs, diffusers / "vae/diffusion_pytorch_model.safetensors")
    return wan, here / "original.safetensors", diffusers, diffusers / "vae"


@with_diffusers
def test_the_wan_vae_gives_what_diffusers_gives_from_either_layout():
    from diffusers import AutoencoderKLWan
    for seed, (version, config) in enumerate([("2.1", WAN21), ("2.2", WAN22)]):
        ours = randomised(WanVAE(config), seed).state_dict()
        theirs = AutoencoderKLWan(**IN_DIFFUSERS[version]).eval()
        theirs.load_state_dict(renamed_for_diffusers(ours, version))
        with folder() as here:
            for path in write_vaes(here, version, ours, theirs.state_dict()):
                vae = WanVAE.from_pretrained(path)
                assert vae.config == config, path
                assert type(load_vae(path)) is WanVAE, path
                assert vae.state_dict().keys() == ours.keys()
                assert same(vae.state_dict(), ours), path
        mean, std = torch.tensor(STATISTICS[config.latent_channels]).view(2, 1, -1, 1, 1, 1)
        video = wan_video(vae, 9)
        with torch.no_grad():
            latents = vae.encode(video)
            decoded, _ = vae.decode(latents)
            their_latents = (theirs.encode(video).latent_dist.mode() - mean) / std
            their_decoded = theirs.decode(latents * std + mean).sample
        assert latents.shape == (1, config.latent_channels, 3, 2, 3)
        assert decoded.shape == video.shape
        assert decoded.std() > 0.1
        assert (decoded.abs() == 1).float().mean() < 0.5
        assert_near(latents, their_latents, 1e-5)               # the bits, on some processors
        assert_near(decoded, their_decoded, 1e-5)


@with_diffusers
def test_latents_are_normalised_as_diffusers_pipelines_do():
    from diffusers import AutoencoderKLWan
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    mean, std = STATISTICS[16]
    assert mean == tuple(defaults["latents_mean"].default)
    assert std == tuple(defaults["latents_std"].default)


# --------------------------------------------------------------------------------------------------
# Names.

PREFIXES = (
    "model.", "model.diffusion_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.",
    "pipe.dit.", "net.", "_checkpoint_wrapped_module.", "module.model._orig_mod.", "transformer.",
    "dit.", "any.thing.at.all.")


def wrappings(tensors):
    """What training programs save."""
    return [
        {"state_dict": tensors},
        {"module": tensors},
        {"model": tensors, "step": 3, "optimizer": {0: 1}},
        {"state_dict": under("module.", tensors)},
        {"net": {"params": tensors}},
        {"critic": {"x": torch.ones(2)}, "anything": tensors},
    ]


def test_what_training_and_packing_put_around_names_is_taken_off():
    dit = public()
    with folder() as here:
        for prefix in PREFIXES:
            save_file(under(prefix, dit), here / "a.safetensors")
            assert same_tensors(MotionStream.from_pretrained(here / "a.safetensors"), dit), prefix
        for wrapped in wrappings(dit):
            torch.save(wrapped, here / "a.pt")
            assert same_tensors(MotionStream.from_pretrained(here / "a.pt"), dit), wrapped.keys()


def test_it_is_taken_off_in_all_layouts():
    with folder() as here:
        for tensors, expected, load in (
            (in_diffusers_layout(public()), public(), MotionStream.from_pretrained),
            (wan_vae(), wan_vae(), load_vae),
            (tiny_vae(), tiny_vae(), load_vae),
        ):
            for prefix in PREFIXES[1::4]:
                save_file(under(prefix, tensors), here / "a.safetensors")
                assert same_tensors(load(here / "a.safetensors"), expected), prefix
            for wrapped in wrappings(tensors)[2::2]:
                torch.save(wrapped, here / "a.pt")
                assert same_tensors(load(here / "a.pt"), expected), wrapped.keys()


def test_what_is_put_inside_names_is_taken_off_and_none_is_there_twice():
    inside = {}
    for name, t in public().items():
        block = r"_fsdp_wrapped_module.\1_checkpoint_wrapped_module._orig_mod."
        inside[re.sub(r"(blocks\.\d\.)", block, name)] = t
    with folder() as here:
        path = here / "a.safetensors"
        save_file(inside, path)
        assert same_tensors(MotionStream.from_pretrained(path), public())
        twice = under("model.", public()) | {"blocks.0.norm3.bias": torch.zeros(256)}
        save_file(twice, path)
        assert_refused(path, "a.safetensors: holds blocks.0.norm3.bias twice")


def test_of_several_models_in_a_file_the_wanted_one_is_taken():
    dit = public()
    other = {name: t + 1 for name, t in dit.items()}
    with folder() as here:
        path = here / "a.safetensors"
        text_encoder = {"text_encoders.t5.x": torch.ones(2)}
        both = under("model.diffusion_model.", dit) | under("vae.", wan_vae())
        save_file(both | text_encoder, path)
        assert same_tensors(MotionStream.from_pretrained(path), dit)
        assert same_tensors(load_vae(path), wan_vae())
        torch.save({"ema": dit, "model": other}, here / "a.pt")    # the average, as of Self-Forcing
        assert same_tensors(MotionStream.from_pretrained(here / "a.pt"), dit)
        save_file(under("generator.model.", dit) | under("fake_score.model.", other), path)
        model = MotionStream.from_pretrained(path)
        assert same_tensors(model, dit)
        assert model.config.causal


def test_of_several_models_that_say_nothing_none_is_taken():
    dit = public()
    other = {name: t + 1 for name, t in dit.items()}
    with folder() as here:
        path = here / "a.safetensors"
        save_file(under("first.", dit) | under("second.", other), path)
        assert_refused(path, "holds 2 models, whose names begin with 'first.', 'second.'; save one")
        control = {"model.control.weight": torch.ones(2), "adapter.weight": torch.ones(2)}
        save_file(under("model.", dit) | control, path)
        assert_refused(path, 'Unexpected key(s) in state_dict: "adapter.weight", "control.weight"')


# --------------------------------------------------------------------------------------------------
# Causal students.

def causal_folder(here, settings, repository=None):
    """A -Diffusers repository with `settings` in transformer/config.json, and `repository` in
    model_index.json."""
    (here / "transformer").mkdir(parents=True)
    tensors = in_diffusers_layout(public())
    save_file(tensors, here / "transformer/diffusion_pytorch_model.safetensors")
    config, _ = FAMILIES["Wan 2.1 T2V"]
    settings = diffusers_config(config) | settings
    (here / "transformer/config.json").write_text(json.dumps(settings))
    if repository:
        (here / "model_index.json").write_text(json.dumps(repository))
    return here


ALL = (3, 0, None)          # chunk, sink, window of Self-Forcing: all is remembered
CAUSAL = "CausalWanTransformer3DModel"
PLAIN = "WanTransformer3DModel"
STUDENTS = [                # transformer/config.json, chunk, sink and window
    ({"_class_name": CAUSAL}, ALL),                             # FastVideo
    ({"_class_name": "KreaCausalWanTransformer3DModel"}, ALL),
    ({"_class_name": "CausalWanModel", "local_attn_size": -1, "sink_size": 0}, ALL),
    ({"_class_name": "WanModel", "local_attn_size": 12, "sink_size": 3}, (3, 1, 2)),    # LongLive
    ({"_class_name": "MinWMCausalTransformer3DModel", "num_frame_per_block": 4,
      "local_attn_size": 16, "sink_size": 4}, (4, 1, 2)),
    ({"_class_name": CAUSAL, "num_frames_per_block": 1, "sliding_window_num_frames": None,
      "sink_size": 0}, (1, 0, None)),                           # SGLang, frame-wise
    ({"_class_name": CAUSAL, "num_frames_per_block": 3, "sliding_window_num_frames": 24,
      "sink_size": 3}, (3, 1, 6)),                              # and Rolling Forcing
]
REPOSITORIES = [   # the class in transformer/config.json, model_index.json, whether it is a student
    ({"_class_name": PLAIN}, {"_class_name": "WanCausalDMDPipeline"}, True),
    ({}, {"_class_name": "WanPipeline", "transformer": ["diffusers", CAUSAL]}, True),
    ({}, {"_class_name": "CausalForcingPipeline"}, True),
    ({"_class_name": PLAIN},
     {"_class_name": "WanPipeline", "transformer": ["diffusers", PLAIN]}, False),
]


def job_of(path, *flags):
    """The Job that sample.py makes of weights and flags."""
    flags = sample.parse_flags(["--image", "x.png", "--prompt-embeds", "x"] + list(flags))
    return sample.resolve(flags, sample.inspect(path), sample.no_tracks(81))


def memory_of(config):
    return config.chunk, config.sink, config.window


def assert_streams(path, memory):
    """The weights are those of a student with that memory."""
    config = MotionStream.from_pretrained(path).config
    assert config.causal
    assert memory_of(config) == memory
    job = job_of(path)
    assert job.config.causal
    assert len(job.config.sigmas) == 4
    assert memory_of(job.config) == memory
    assert "a causal student: streams in 4 steps" in job.notes[0]


def test_weights_of_a_causal_class_stream():
    for settings, memory in STUDENTS:
        with folder() as here:
            assert_streams(causal_folder(here / "repository", settings), memory)


def test_a_repository_says_whether_its_weights_stream():
    for settings, repository, streams in REPOSITORIES:
        with folder() as here:
            path = causal_folder(here / "repository", settings, repository)
            if streams:
                assert_streams(path, ALL)
                continue
            assert not MotionStream.from_pretrained(path).config.causal
            job = job_of(path)
            assert not job.config.causal
            assert "a causal student" not in job.notes[0]


def test_what_a_causal_class_says_is_checked_and_a_flag_counts_more():
    with folder() as here:
        for name, value, said in (
            ("num_frames_per_block", 0, "chunk"),
            ("sink_size", "3", "sink_size"),
            ("local_attn_size", 1.5, "local_attn_size"),
        ):
            path = causal_folder(here / name, {"_class_name": "CausalWanModel", name: value})
            assert_refused(path, f"config.json: {said} is {value!r} in its config")
        path = causal_folder(here / "flag", {"_class_name": CAUSAL})
        job = job_of(path, "--sampler", "teacher")
        assert not job.config.causal
        assert "sampled as a teacher, as --sampler asks" in job.notes[0]


def test_checkpoints_of_self_forcing_and_causvid_are_students():
    other = {name: t + 1 for name, t in public().items()}
    named = under("model.", public())
    wrapped = under("model._fsdp_wrapped_module.", public())
    with folder() as here:
        path = here / "a.pt"
        for content in (
            {"generator": other, "critic": other, "generator_ema": wrapped},
            {"generator_ema": named},
            {"generator": named},
            {"generator": named, "step": 600},
        ):
            for zipped in True, False:      # False: the older kind of file, which cannot be mapped
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
                model = MotionStream.from_pretrained(path)
                assert same_tensors(model, public())
                config = model.config
                assert config.causal
                assert memory_of(config) == ALL
                assert config.size == (480, 832)
                assert np.allclose(config.sigmas, (1, 0.9375, 0.833333, 0.625), atol=1e-6)
        assert MotionStream.from_pretrained(path, sink=1, window=2).config.window == 2
        for content in public(), {"model": named, "step": 600}:   # which say nothing of a generator
            torch.save(content, here / "flat.pth")
            model = MotionStream.from_pretrained(here / "flat.pth")
            assert same_tensors(model, public())
            assert not model.config.causal


# --------------------------------------------------------------------------------------------------
# Damaged files, and such that are something else.

def mutated(data, rng):
    """The bytes with a few of them changed, some missing, or more of them."""
    data = bytearray(data)
    way = rng.random()
    at = rng.randrange(len(data))
    if way < 0.2:
        return bytes(data[:at])
    if way < 0.3:
        del data[at:at + rng.randrange(1, 99)]
        return bytes(data)
    for _ in range(rng.choice([1, 2, 9])):
        low, high = rng.choice([(0, 4000), (len(data) - 4000, len(data)), (0, len(data))])
        data[rng.randrange(low, high)] = rng.choice([0, 34, 128, 255, rng.randrange(256)])
    return bytes(data)


def test_damaged_weights_load_or_end_in_one_line():
    rng = random.Random(0)
    refused = 0
    with folder() as here:
        torch.save({"generator_ema": public()}, here / "dit.pt")
        torch.save(public(), here / "older.pt", _use_new_zipfile_serialization=False)
        save_file(public(), here / "dit.safetensors")
        save_file(wan_vae(), here / "vae.safetensors")
        torch.save(wan_vae(), here / "vae.pth")
        for path in sorted(here.iterdir()):
            load = load_vae if path.stem == "vae" else MotionStream.from_pretrained
            whole = path.read_bytes()
            for _ in range(8):
                path.write_bytes(mutated(whole, rng))
                try:
                    load(path)
                except UserError as e:
                    refused += 1
                    assert str(e).startswith(f"{path}: ")
                    assert "\n" not in str(e)
    assert 10 < refused < 40


def test_a_pt_that_holds_itself_is_read():
    ours = dict(public())
    ours["self"] = ours                                         # a dict within itself
    with folder() as here:
        torch.save(ours, here / "a.pt")
        assert same_tensors(MotionStream.from_pretrained(here / "a.pt"), public())


def test_a_pt_that_holds_what_memory_cannot_hold_is_refused():
    one = torch.zeros(1)
    huge = {name: one.expand(t.shape) for name, t in public().items()}
    huge["text_embedding.0.weight"] = one.expand(256, 2 ** 16)  # 67 MB, in a file of a few kB
    with folder() as here:
        path = here / "a.pt"
        torch.save(huge, path)
        with unittest.mock.patch.object(checkpoints, "free_memory", lambda device: 2 ** 24):
            assert_refused(path, "a.pt: needs 0.1 GB of memory, 0.0 GB are free on cpu")
        huge["blocks.987654.norm3.bias"] = torch.zeros(256)     # that many blocks are not built
        torch.save(huge, path)
        assert_refused(path, 'Missing key(s) in state_dict: "blocks.2.')


def test_a_pt_of_tensors_without_plain_numbers_or_a_broken_zip_is_refused():
    with folder() as here:
        path = here / "a.pt"
        for bias, said in (
            (torch.zeros(64, device="meta"), "head.head.bias is torch.strided on meta"),
            (torch.zeros(64).to_sparse(), "head.head.bias is torch.sparse"),
        ):
            torch.save(public() | {"head.head.bias": bias}, path)
            assert_refused(path, said)
        data = path.read_bytes()
        end = data.rindex(b"PK\x05\x06")
        broken = data[:end + 4] + b"\xff" * 12 + data[end + 16:]        # zipfile raises BadZipFile
        for content in broken, b"PK\x05\x06" + b"\xff" * 18:
            path.write_bytes(content)
            assert_refused(path, "a.pt: ")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, here):
        self.path = here / "it ran"

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused():
    said = "a pickle of something else than tensors, refused (Unsupported glo"
    with folder() as here:
        code = Code(here)
        for zipped in True, False:
            torch.save({"generator": code}, here / "code.pt", _use_new_zipfile_serialization=zipped)
            for load in MotionStream.from_pretrained, load_vae:
                assert_refused(here / "code.pt", said, load)
        assert not code.path.exists()


def test_a_pt_that_holds_no_tensors_is_refused():
    with folder() as here:
        for content, text in (
            ([1], "it holds a list"),
            ({"generator": [1]}, "1 entries without any: generator"),
            ({"model": {"a": 1}}, "1 entries without any: model"),
            ({1: torch.ones(2)}, "1, which no"),
        ):
            torch.save(content, here / "odd.pt")
            assert_refused(here / "odd.pt", text)


def other_files(here):
    """(Bytes that are no weights, or only a part of them, what is said of them)."""
    save_file(public(), here / "dit.safetensors")
    torch.save({"generator_ema": public()}, here / "dit.pt")
    whole = (here / "dit.safetensors").read_bytes()
    zipped = (here / "dit.pt").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070392\n"
    return [
        (pointer, "this is a git-lfs pointer, run git lfs pull"),
        (b"<!DOCTYPE html><html>", "this is a web page (21 bytes)"),
        (b"GGUF" + bytes(99), "this is a GGUF file"),
        (b"", "this is an empty file (0 bytes)"),
        (b"\xff" * 999, "cannot be read as .safetensors or .pt ("),
        (whole[:-99], f"truncated: {len(whole) - 99} bytes of {len(whole)};"),
        (whole[:99], "truncated: 99 bytes of at least"),
        (zipped[:-99], "truncated: begins as a .pt, but its end is missing"),
    ]


def test_files_that_are_something_else_are_told_by_what_they_are():
    with folder() as here:
        for content, text in other_files(here):
            for path in here / "a.safetensors", here / "a.pt":
                path.write_bytes(content)
                for load in MotionStream.from_pretrained, load_vae:
                    assert_refused(path, f"{path}: {text}", load)


OTHERS = {                  # a tensor of another kind of model, and what is said of it
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "this looks like a LoRA: it holds {}",
    "encoder.block.0.layer_norm.weight": "this looks like a text encoder: it holds {}",
    "visual.conv1.weight": "this looks like a CLIP encoder: it holds {}",
    "x": "its first tensor is {}, which no layout known here has",
}


def test_other_models_are_told_by_what_they_are():
    with folder() as here:
        path = here / "a.safetensors"
        for name, said in OTHERS.items():
            save_file({name: torch.ones(8)}, path)
            for load, wanted in [
                (MotionStream.from_pretrained, "Wan DiT"),
                (load_vae, "VAE (Wan or TAEHV)"),
            ]:
                text = (f"a.safetensors: expected a complete {wanted} checkpoint; "
                        f"{said.format(name)}")
                assert_refused(path, text, load)
        save_file({"encoder.first.weight": torch.ones(3)}, path)        # a VAE, of another family
        text = "VAE (Wan or TAEHV) checkpoint; its first tensor is encoder.first.weight"
        assert_refused(path, text, load_vae)
        save_file(wan_vae(), path)
        assert_refused(path, "this looks like a VAE: it holds ")
        torch.save({"generator_ema": public()}, here / "dit.pt")
        assert_refused(here / "dit.pt", "this looks like a DiT: it holds ", load_vae)


def test_weights_that_are_no_numbers_are_refused():
    with folder() as here:
        path = here / "a.safetensors"
        for tensors, load in (public(), MotionStream.from_pretrained), (wan_vae(), load_vae):
            last = sorted(tensors)[-1]
            broken = torch.full_like(tensors[last], math.nan)
            save_file(tensors | {last: broken}, path)
            assert_refused(path, f"a.safetensors: {last} holds NaN or infinity", load)


# --------------------------------------------------------------------------------------------------
# Memory.

LOADING = """
import sys, threading, time
import torch
from safetensors.torch import load_file
from motionstream import MotionStream

def anonymous():                            # kB of memory that is no file's
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1])

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

before = anonymous()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
if sys.argv[2] == "copy":                   # load_file only maps; read once, it has done all
    loaded = {name: t.clone() for name, t in load_file(sys.argv[1]).items()}
else:
    loaded = MotionStream.from_pretrained(sys.argv[1])
print(time.perf_counter() - started, (peak[0] - before) * 1024)
"""


def loading(path, way):
    """Seconds, and bytes at most, of five loads, each sorted."""
    seconds = []
    peaks = []
    for _ in range(5):
        command = [sys.executable, "-c", LOADING, path, way]
        done = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True)
        took, peak = done.stdout.split()
        seconds.append(float(took))
        peaks.append(float(peak))
    return sorted(seconds), sorted(peaks)


@slow
def test_loading_wan_1_3b_takes_about_the_memory_of_its_file():
    if not Path("/proc/self/status").exists():
        raise unittest.SkipTest("NO /proc HERE, memory was not measured")
    with torch.device("meta"):
        model = MotionStream(PRESETS["motionstream-1.3b"])
    zeros = {}
    for name, t in model.state_dict().items():
        zeros[name] = torch.zeros(t.shape, dtype=torch.bfloat16)
    with folder() as here:
        path = here / "a.safetensors"
        save_file(zeros, path)
        size = path.stat().st_size
        for way in "copy", "from_pretrained":
            seconds, peaks = loading(path, way)
            print(f"{size / 1e9:.2f} GB by {way}: {seconds[2]:.2f} s ({seconds[0]:.2f} to "
                  f"{seconds[-1]:.2f}), anonymous memory {peaks[2] / size:.2f} of the file")
        assert peaks[-1] < 1.3 * size, (peaks, size)


# --------------------------------------------------------------------------------------------------
# How public weights are sampled.

def test_weights_of_self_forcing_stream_in_its_four_steps():
    job = settled("self_forcing.pt")
    config = job.config
    assert "Self-Forcing" in job.notes[0]
    assert config.causal
    assert memory_of(config) == ALL
    assert len(config.sigmas) == 4
    assert_near(torch.tensor(config.sigmas), torch.tensor([1, 0.9375, 2.5 / 3, 0.625]), 1e-6)
    assert not settled("self_forcing.pt", "--sampler", "teacher").config.causal


def test_other_public_weights_are_sampled_as_teachers():
    for weights in "t2v", "fun":
        job = settled(f"{weights}.safetensors")
        config = job.config
        assert not config.causal
        assert config.steps == 50
        assert config.shift == 5
        assert config.guidance == (0, 0), "no text: there is nothing to guide with"
        assert "teacher, shift 5, text guidance 5" in job.notes[0]


def test_weights_as_wide_as_wans_1_3b_have_their_own_shift_and_guidance():
    for weights, shift, guidance in ("t2v", 8, (6, 0)), ("fun", 3, (6, 0)):
        given = sample.inspect(wan_workplace()[1] / f"{weights}.safetensors")
        wide = replace(given, config=replace(given.config, dim=1536))
        flags = sample.parse_flags(["--image", "x", "--prompt-embeds", "x"])
        config = sample.resolve(flags, wide, sample.no_tracks(81)).config
        assert config.shift == shift
        assert config.guidance == guidance


def test_flags_say_how_weights_are_sampled():
    job = settled("t2v.safetensors", "--sampler", "stream", "--steps", 2, "--memory", "c3s1w1")
    assert job.config.causal
    assert memory_of(job.config) == (3, 1, 1)
    assert job.config.sigmas == schedule(2, 5.0)
    job = settled("headed.safetensors", "--steps", 3, "--prompt-embeds", "x", "--guidance", "3,4")
    assert not job.notes
    assert not job.config.causal
    assert job.config.steps == 3
    assert job.config.guidance == (3, 4)
    assert_error(UserError, "use --sampler teacher",
                 settled, "headed.safetensors", "--sampler", "stream")


def test_a_stream_that_remembers_all_ends_where_its_training_did():
    settled("self_forcing.pt", frames=81)
    for memory in "c3s0w99", "c3s1w1", "c3s0wfull":
        settled("self_forcing.pt", "--memory", memory, frames=500)
    assert_error(UserError, "81 frames, all of them; add --memory c3s1w5",
                 settled, "self_forcing.pt", frames=82)
    assert_error(UserError, "--sampler teacher", settled, "i2v.safetensors", "--sampler", "stream")
