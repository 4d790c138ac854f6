"""Weights in other layouts than Wan's own names in safetensors, and how public weights are sampled."""

import functools
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

import motionstream
import sample
from extras.testing import (FAMILIES, HERE, WAN21, WAN22, assert_error, assert_near,
                            diffusers_config, folder, in_diffusers_layout, new_vae, public, rand,
                            randomised, same_tensors, settled, slow, wan_video, wan_workplace,
                            write_layout)
from motionstream import PRESETS, MotionStream, UserError, save_pretrained, schedule
from vae import STATISTICS, TinyVAEConfig, WanVAE, WanVAEConfig, load_vae


def with_diffusers(test):
    """A test that says loudly that it skips where there is nothing to compare with."""
    @functools.wraps(test)
    def maybe():
        try:
            import diffusers  # noqa: F401
        except ImportError:
            raise unittest.SkipTest("DIFFUSERS IS NOT INSTALLED, nothing was compared: pip install diffusers") from None
        test()
    return maybe


@with_diffusers
def test_public_weights_give_what_diffusers_gives():
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert
    small, large = torch.tensor([3.0, 17.5]), torch.tensor([833.33, 999.0])     # its angles are float32
    per_frame = torch.tensor([[0.0, 12.5, 3.0], [0.0, 0.0, 19.0]])              # as TI2V has them
    for family, (c, _) in FAMILIES.items():
        names, theirs = in_diffusers_layout(public(family)), convert(dict(public(family)))
        assert theirs.keys() == names.keys() and all(t is theirs[name] for name, t in names.items())
        reference = WanTransformer3DModel(**diffusers_config(c)).eval().requires_grad_(False)
        reference.load_state_dict(theirs)
        models = []
        for layout in "Wan", "Diffusers":
            with folder() as here:
                models.append(MotionStream.from_pretrained(write_layout(here, family, layout)))
        x, text = rand(2, c.out_dim, 3, 4, 6), rand(2, 5, c.text_dim, seed=1)
        tracks = rand(2, c.track_dim, 3, 4, 6, seed=2) if c.track_dim else None
        image = rand(2, c.image_dim, 3, 4, 6, seed=3) if c.image_dim else None
        clip = rand(2, 257, c.clip_dim, seed=4) if c.clip_dim else None
        inputs = torch.cat([y for y in (x, tracks, image) if y is not None], 1)
        for t, tolerance in (small, 1e-6), (large, 2e-5), (per_frame, 1e-6):
            each = t if t.ndim == 1 else t.repeat_interleave(6, 1)              # or one a token
            expected = reference(inputs, each, F.pad(text, (0, 0, 0, 512 - 5)), clip, return_dict=False)[0]
            for model in models:
                v = model(x, t.double() / 1000, text, tracks=tracks, image=image, clip=clip)
                assert_near(v, expected, tolerance)


@with_diffusers
def test_a_written_file_is_one_that_diffusers_reads():
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert
    with folder() as here:
        family = "Wan 2.1 I2V, Fun-InP"
        save_pretrained(MotionStream.from_pretrained(write_layout(here, family, "Wan")), here / "a.safetensors")
        reference = WanTransformer3DModel(**diffusers_config(FAMILIES[family][0]))
        reference.load_state_dict(convert(load_file(here / "a.safetensors")))
        assert all(t.equal(reference.state_dict()[name]) for name, t in in_diffusers_layout(public(family)).items())


PREFIXES = ("model.", "model.diffusion_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "pipe.dit.", "net.",
            "_checkpoint_wrapped_module.", "module.model._orig_mod.", "transformer.", "dit.", "any.thing.at.all.")


def test_what_training_and_packing_put_around_names_is_taken_off():
    vae = randomised(WanVAE(WanVAEConfig(16, 4, 4))).state_dict()
    tiny = new_vae(TinyVAEConfig(stem=4, encoder=((4, 3, 2, 2),) * 2 + ((4, 3, 1, 2),),
                                 decoder=((4, 3, 1, 2),) + ((4, 3, 2, 2),) * 2, tail=4)).state_dict()
    with folder() as here:
        for tensors, load in ((public(), MotionStream.from_pretrained), (vae, load_vae), (tiny, load_vae),
                              (in_diffusers_layout(public()), MotionStream.from_pretrained)):
            expected = public() if "blocks.0.attn1.to_q.weight" in tensors else tensors
            for prefix in PREFIXES:
                save_file({prefix + name: t.contiguous() for name, t in tensors.items()}, here / "a.safetensors")
                assert same_tensors(load(here / "a.safetensors"), expected), prefix
            for wrapped in ({"state_dict": tensors}, {"module": tensors}, {"model": tensors, "step": 3, "optimizer": {0: 1}},
                            {"state_dict": {"module." + name: t for name, t in tensors.items()}},
                            {"net": {"params": tensors}}, {"critic": {"x": torch.ones(2)}, "anything": tensors}):
                torch.save(wrapped, here / "a.pt")
                assert same_tensors(load(here / "a.pt"), expected), wrapped.keys()
        inside = {re.sub(r"(blocks\.\d\.)", r"_fsdp_wrapped_module.\1_checkpoint_wrapped_module._orig_mod.", name): t
                  for name, t in public().items()}
        save_file(inside, here / "a.safetensors")
        assert same_tensors(MotionStream.from_pretrained(here / "a.safetensors"), public())
        twice = {"model." + name: t for name, t in public().items()} | {"blocks.0.norm3.bias": torch.zeros(256)}
        save_file(twice, here / "a.safetensors")
        assert_error(ValueError, "a.safetensors: holds blocks.0.norm3.bias twice", MotionStream.from_pretrained,
                     here / "a.safetensors")


def test_of_several_models_in_a_file_the_wanted_one_is_taken():
    dit, vae = public(), randomised(WanVAE(WanVAEConfig(16, 4, 4))).state_dict()
    other = {name: t + 1 for name, t in dit.items()}

    def under(prefix, tensors):
        return {prefix + name: t for name, t in tensors.items()}

    with folder() as here:
        path = here / "a.safetensors"
        save_file(under("model.diffusion_model.", dit) | under("vae.", vae) | {"text_encoders.t5.x": torch.ones(2)}, path)
        assert same_tensors(MotionStream.from_pretrained(path), dit) and same_tensors(load_vae(path), vae)
        torch.save({"ema": dit, "model": other}, here / "a.pt")                 # the average, as of Self-Forcing
        assert same_tensors(MotionStream.from_pretrained(here / "a.pt"), dit)
        save_file(under("generator.model.", dit) | under("fake_score.model.", other), path)
        model = MotionStream.from_pretrained(path)
        assert same_tensors(model, dit) and model.config.causal
        save_file(under("first.", dit) | under("second.", other), path)
        assert_error(ValueError, "holds 2 models, whose names begin with 'first.', 'second.'; save one", MotionStream.from_pretrained, path)
        save_file(under("model.", dit) | {"model.control.weight": torch.ones(2), "adapter.weight": torch.ones(2)}, path)
        assert_error(ValueError, "2 tensors are unknown: adapter.weight, control.weight", MotionStream.from_pretrained, path)


def causal_folder(here, settings, repository=None):
    """A -Diffusers repository with `settings` in transformer/config.json, and `repository` in model_index.json."""
    (here / "transformer").mkdir(parents=True)
    save_file(in_diffusers_layout(public()), here / "transformer/diffusion_pytorch_model.safetensors")
    config = diffusers_config(FAMILIES["Wan 2.1 T2V"][0]) | settings
    (here / "transformer/config.json").write_text(json.dumps(config))
    if repository:
        (here / "model_index.json").write_text(json.dumps(repository))
    return here


def test_weights_of_a_causal_class_stream_whatever_file_they_are_in():
    everything = 3, 0, None                     # chunk, sink, window of Self-Forcing: all is remembered
    plain = {"_class_name": "WanTransformer3DModel"}
    for settings, repository, memory in (
            ({"_class_name": "CausalWanTransformer3DModel"}, None, everything),             # FastVideo
            ({"_class_name": "KreaCausalWanTransformer3DModel"}, None, everything),
            ({"_class_name": "CausalWanModel", "local_attn_size": -1, "sink_size": 0}, None, everything),
            ({"_class_name": "WanModel", "local_attn_size": 12, "sink_size": 3}, None, (3, 1, 2)),      # LongLive
            ({"_class_name": "MinWMCausalTransformer3DModel", "num_frame_per_block": 4, "local_attn_size": 16,
              "sink_size": 4}, None, (4, 1, 2)),
            ({"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 1, "sliding_window_num_frames": None,
              "sink_size": 0}, None, (1, 0, None)),                                         # SGLang, frame-wise
            ({"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 3, "sliding_window_num_frames": 24,
              "sink_size": 3}, None, (3, 1, 6)),                                            # and Rolling Forcing
            (plain, {"_class_name": "WanCausalDMDPipeline"}, everything),
            ({}, {"_class_name": "WanPipeline", "transformer": ["diffusers", "CausalWanTransformer3DModel"]}, everything),
            ({}, {"_class_name": "CausalForcingPipeline"}, everything),
            (plain, {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}, None)):
        with folder() as here:
            path = causal_folder(here / "repository", settings, repository)
            config = MotionStream.from_pretrained(path).config
            found = config.chunk, config.sink, config.window
            assert (found if config.causal else None) == memory, (settings, repository, found)
            flags = sample.parse_flags(["--image", "x.png", "--prompt-embeds", "x"])
            job = sample.resolve(flags, sample.inspect(path), sample.given_tracks(flags, (48, 32)))
            assert job.config.causal == config.causal and len(job.config.sigmas) == (4 if config.causal else 3)
            assert ("a causal student: streams in 4 steps" in job.notes[0]) == config.causal, job.notes
            assert not config.causal or (job.config.chunk, job.config.sink, job.config.window) == memory
    with folder() as here:
        for name, value in ("num_frames_per_block", 0), ("sink_size", "3"), ("local_attn_size", 1.5):
            path = causal_folder(here / name, {"_class_name": "CausalWanModel", name: value})
            said = "chunk" if "block" in name else name
            assert_error(ValueError, f"config.json: {said} is {value!r} in its config", MotionStream.from_pretrained, path)
        path = causal_folder(here / "flag", {"_class_name": "CausalWanTransformer3DModel"})
        flags = sample.parse_flags(["--image", "x.png", "--sampler", "teacher"])
        job = sample.resolve(flags, sample.inspect(path), sample.given_tracks(flags, (48, 32)))
        assert not job.config.causal and "sampled as a teacher, as --sampler asks" in job.notes[0]


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
    vae = randomised(WanVAE(WanVAEConfig(16, 4, 4))).state_dict()
    rng = random.Random(0)
    with folder() as here:
        torch.save({"generator_ema": public()}, here / "dit.pt")
        torch.save(public(), here / "older.pt", _use_new_zipfile_serialization=False)
        save_file(public(), here / "dit.safetensors")
        save_file(vae, here / "vae.safetensors")
        torch.save(vae, here / "vae.pth")
        refused = 0
        for path in sorted(here.iterdir()):
            whole = path.read_bytes()
            for _ in range(8):
                path.write_bytes(mutated(whole, rng))
                try:
                    load = load_vae if path.stem == "vae" else MotionStream.from_pretrained
                    load(path)
                except UserError as e:
                    refused += 1
                    assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        assert 10 < refused < 40


def test_a_pt_that_holds_itself_or_what_memory_cannot_hold_is_refused():
    ours = dict(public())
    ours["self"] = ours
    with folder() as here:
        path = here / "a.pt"
        torch.save(ours, path)                                      # a dict within itself
        assert same_tensors(MotionStream.from_pretrained(path), public())
        one = torch.zeros(1)
        huge = {name: one.expand(t.shape) for name, t in public().items()}
        huge["text_embedding.0.weight"] = one.expand(256, 2 ** 16)      # 67 MB, in a file of a few kB
        torch.save(huge, path)
        with unittest.mock.patch.object(motionstream, "free_memory", lambda device: 2 ** 24):
            assert_error(UserError, "a.pt: needs 0.1 GB of memory, 0.0 GB are free on cpu", MotionStream.from_pretrained, path)
        huge["blocks.987654.norm3.bias"] = torch.zeros(256)         # that many blocks are not built
        torch.save(huge, path)
        assert_error(UserError, "are missing: blocks.2.", MotionStream.from_pretrained, path)
        torch.save(public() | {"head.head.bias": torch.zeros(64, device="meta")}, path)
        assert_error(UserError, "head.head.bias is torch.strided on meta", MotionStream.from_pretrained, path)
        torch.save(public() | {"head.head.bias": torch.zeros(64).to_sparse()}, path)
        assert_error(UserError, "head.head.bias is torch.sparse", MotionStream.from_pretrained, path)
        data = path.read_bytes()
        end = data.rindex(b"PK\x05\x06")
        path.write_bytes(data[:end + 4] + b"\xff" * 12 + data[end + 16:])       # of which zipfile raises BadZipFile
        assert_error(UserError, "a.pt: ", MotionStream.from_pretrained, path)
        path.write_bytes(b"PK\x05\x06" + b"\xff" * 18)
        assert_error(UserError, "a.pt: ", MotionStream.from_pretrained, path)


def test_checkpoints_of_self_forcing_and_causvid_are_students():
    other = {name: t + 1 for name, t in public().items()}
    named = {"model." + name: t for name, t in public().items()}
    wrapped = {"model._fsdp_wrapped_module." + name: t for name, t in public().items()}
    with folder() as here:
        for content in ({"generator": other, "critic": other, "generator_ema": wrapped}, {"generator_ema": named},
                        {"generator": named}, {"generator": named, "step": 600}):
            for zipped in True, False:                          # False: the older kind of file, which cannot be mapped
                torch.save(content, here / "a.pt", _use_new_zipfile_serialization=zipped)
                model = MotionStream.from_pretrained(here / "a.pt")
                assert same_tensors(model, public())
                c = model.config
                assert c.causal and (c.chunk, c.window, c.sink, c.size) == (3, None, 0, (480, 832))
                assert np.allclose(c.sigmas, (1, 0.9375, 0.833333, 0.625), atol=1e-6)
        assert MotionStream.from_pretrained(here / "a.pt", sink=1, window=2).config.window == 2
        for content in public(), {"model": named, "step": 600}:     # which say nothing of a generator
            torch.save(content, here / "flat.pth")
            model = MotionStream.from_pretrained(here / "flat.pth")
            assert same_tensors(model, public()) and not model.config.causal

        class Code:
            def __reduce__(self):
                return Path.touch, (here / "it ran",)

        for content, text in (([1], "it holds a list"), ({"generator": [1]}, "1 entries without any: generator"),
                              ({"model": {"a": 1}}, "1 entries without any: model"), ({1: torch.ones(2)}, "1, which no"),
                              ({"generator": Code()}, "a pickle of something else than tensors, refused (Unsupported glo")):
            torch.save(content, here / "odd.pt")
            assert_error(ValueError, text, MotionStream.from_pretrained, here / "odd.pt")
        assert not (here / "it ran").exists()


def test_files_that_are_something_else_are_told_by_what_they_are():
    dit, vae = public(), randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict()

    class Code:
        def __reduce__(self):
            return Path.touch, (here / "it ran",)

    with folder() as here:
        save_file(dit, here / "dit.safetensors")
        torch.save({"generator_ema": dit}, here / "dit.pt")
        whole, zipped = (here / "dit.safetensors").read_bytes(), (here / "dit.pt").read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070392\n"
        for name, data, text in (("lfs", pointer, "this is a git-lfs pointer, run git lfs pull"),
                                 ("page", b"<!DOCTYPE html><html>", "this is a web page (21 bytes)"),
                                 ("gguf", b"GGUF" + bytes(99), "this is a GGUF file"),
                                 ("empty", b"", "this is an empty file (0 bytes)"),
                                 ("noise", b"\xff" * 999, "cannot be read as .safetensors or .pt ("),
                                 ("cut", whole[:-99], f"truncated: {len(whole) - 99} bytes of {len(whole)};"),
                                 ("header", whole[:99], "truncated: 99 bytes of at least"),
                                 ("half", zipped[:-99], "truncated: begins as a .pt, but its end is missing")):
            for path in here / f"{name}.safetensors", here / f"{name}.pt":
                path.write_bytes(data)
                for load in MotionStream.from_pretrained, load_vae:
                    assert_error(ValueError, f"{path}: {text}", load, path)
        lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256)}
        text_encoder = {"encoder.block.0.layer_norm.weight": torch.ones(8)}
        clip = {"visual.conv1.weight": torch.ones(8)}
        for tensors, kind in (
                (lora, "this looks like a LoRA: it holds diffusion_model.blocks.0.self_attn.q.lora_A.weight"),
                (text_encoder, "this looks like a text encoder: it holds encoder.block.0.layer_norm.weight"),
                (clip, "this looks like a CLIP encoder: it holds visual.conv1.weight"),
                ({"x": torch.ones(3)}, "its first tensor is x, which no layout known here has")):
            save_file(tensors, here / "a.safetensors")
            for load, wanted in (MotionStream.from_pretrained, "Wan DiT"), (load_vae, "VAE (Wan or TAEHV)"):
                text = f"a.safetensors: expected a complete {wanted} checkpoint; {kind}"
                assert_error(ValueError, text, load, here / "a.safetensors")
        assert_error(ValueError, "this looks like a DiT: it holds ", load_vae, here / "dit.pt")
        for tensors, load in (dit, MotionStream.from_pretrained), (vae, load_vae):
            last = sorted(tensors)[-1]
            save_file(tensors | {last: torch.full_like(tensors[last], math.nan)}, here / "a.safetensors")
            assert_error(ValueError, f"a.safetensors: {last} holds NaN or infinity", load, here / "a.safetensors")
        save_file(vae, here / "vae.safetensors")
        assert_error(ValueError, "this looks like a VAE: it holds ", MotionStream.from_pretrained,
                     here / "vae.safetensors")
        save_file({"encoder.first.weight": torch.ones(3)}, here / "a.safetensors")      # a VAE, of another family
        assert_error(ValueError, "VAE (Wan or TAEHV) checkpoint; its first tensor is encoder.first.weight", load_vae,
                     here / "a.safetensors")
        for zipped in True, False:
            torch.save({"generator": Code()}, here / "code.pt", _use_new_zipfile_serialization=zipped)
            for load in MotionStream.from_pretrained, load_vae:
                assert_error(ValueError, "a pickle of something else than tensors, refused", load, here / "code.pt")
        assert not (here / "it ran").exists()


LOADING = """
import sys, threading, time
import torch
from safetensors.torch import load_file
from motionstream import MotionStream

def anonymous():                            # kB of memory that is no file's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

before = anonymous()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
if sys.argv[2] == "copy":                   # a plain load_file only maps; read once, it has done what a load must
    loaded = {name: t.clone() for name, t in load_file(sys.argv[1]).items()}
else:
    loaded = MotionStream.from_pretrained(sys.argv[1])
print(time.perf_counter() - started, (peak[0] - before) * 1024)
"""


@slow
def test_loading_wan_1_3b_takes_about_the_memory_of_its_file():
    if not Path("/proc/self/status").exists():
        raise unittest.SkipTest("NO /proc HERE, memory was not measured")
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in MotionStream(PRESETS["motionstream-1.3b"]).state_dict().items()}
    with folder() as here:
        path = here / "a.safetensors"
        save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
        size = path.stat().st_size
        for way in "copy", "from_pretrained":
            runs = [subprocess.run([sys.executable, "-c", LOADING, path, way], cwd=HERE, check=True,
                                   capture_output=True, text=True).stdout.split() for _ in range(5)]
            seconds, peak = (sorted(map(float, column)) for column in zip(*runs))
            print(f"{size / 1e9:.2f} GB by {way}: {seconds[2]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), "
                  f"anonymous memory {peak[2] / size:.2f} of the file")
        assert peak[-1] < 1.3 * size, (peak, size)


# The arguments that give diffusers' class the sizes of WAN21 and WAN22.
IN_DIFFUSERS = {"2.1": {"base_dim": 8, "z_dim": 16},
                "2.2": {"base_dim": 8, "z_dim": 48, "decoder_base_dim": 12, "is_residual": True, "in_channels": 12,
                        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}}


def renamed_for_diffusers(tensors):
    """Wan's names to diffusers', by its own converter, which does not know the stages of 2.2."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    inner = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
             "shortcut": "conv_shortcut"}
    if "encoder.downsamples.2.downsamples.0.residual.0.gamma" not in tensors:
        return convert_wan_vae_to_diffusers(dict(tensors))
    pattern = r"(\w+)\.(\w+)samples\.(\d)\.\2samples\.(\d)\.(.+)"
    staged = {name: t for name, t in tensors.items() if "samples." in name}
    result = convert_wan_vae_to_diffusers({name: t for name, t in tensors.items() if name not in staged})
    for name, t in staged.items():
        half, way, stage, block, layer = re.fullmatch(pattern, name).groups()
        last = int(block) == {"down": 2, "up": 3}[way]
        for ours, theirs in inner.items():
            layer = layer.replace(ours, theirs)
        result[f"{half}.{way}_blocks.{stage}." + (f"{way}sampler." if last else f"resnets.{block}.") + layer] = t
    return result


@with_diffusers
def test_the_wan_vae_gives_what_diffusers_gives_from_either_layout():
    from diffusers import AutoencoderKLWan
    with folder() as here, torch.no_grad():
        for seed, (version, config) in enumerate((("2.1", WAN21), ("2.2", WAN22))):
            saved = randomised(WanVAE(config), seed).state_dict()
            theirs = AutoencoderKLWan(**IN_DIFFUSERS[version]).eval()
            theirs.load_state_dict(renamed_for_diffusers(saved))
            (here / version / "vae").mkdir(parents=True)
            (here / f"{version}-Wan").mkdir()
            torch.save(saved, here / f"{version}-Wan" / f"Wan{version}_VAE.pth")
            dit = here / f"{version}-Wan" / "diffusion_pytorch_model.safetensors"          # beside a .pth: not the VAE
            save_file({"patch_embedding.weight": rand(3)}, dit)
            save_file(saved, here / "original.safetensors")
            save_file(theirs.state_dict(), here / version / "vae" / "diffusion_pytorch_model.safetensors")
            for path in f"{version}-Wan", "original.safetensors", version, f"{version}/vae":
                vae = WanVAE.from_pretrained(here / path)
                assert vae.config == config and type(load_vae(here / path)) is WanVAE, path
                assert vae.state_dict().keys() == saved.keys()
                assert all(p.equal(saved[name]) for name, p in vae.state_dict().items()), path
            mean, std = torch.tensor(STATISTICS[config.latent_channels]).view(2, 1, -1, 1, 1, 1)
            video = wan_video(vae, 9)
            z, z_theirs = vae.encode(video), (theirs.encode(video).latent_dist.mode() - mean) / std
            x, x_theirs = vae.decode(z)[0], theirs.decode(z * std + mean).sample
            assert z.shape == (1, config.latent_channels, 3, 2, 3) and x.shape == video.shape
            assert 0.1 < x.std() and (x.abs() == 1).float().mean() < 0.5
            assert_near(z, z_theirs, 1e-5)              # the bits, on some processors
            assert_near(x, x_theirs, 1e-5)


@with_diffusers
def test_latents_are_normalised_as_diffusers_pipelines_do():
    from diffusers import AutoencoderKLWan
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert STATISTICS[16] == tuple(tuple(defaults[name].default) for name in ("latents_mean", "latents_std"))


def test_the_sampler_is_the_flag_else_what_the_file_says():
    job = settled("self_forcing.pt")
    c = job.config
    assert "Self-Forcing" in job.notes[0] and c.causal
    assert (c.chunk, c.sink, c.window) == (3, 0, None) and len(c.sigmas) == 4
    assert_near(torch.tensor(c.sigmas), torch.tensor([1, 0.9375, 2.5 / 3, 0.625]), 1e-6)
    for weights, shift, w_text in ("t2v", 8, 6), ("fun", 3, 6):                     # 1536 wide, the real ones
        job = settled(f"{weights}.safetensors")
        c = job.config
        assert not c.causal and c.steps == 50
        assert (c.shift, c.guidance) == (5, (0, 0)), "no text: there is nothing to guide with"
        assert "teacher, shift 5, text guidance 5" in job.notes[0]
        real = sample.inspect(wan_workplace()[1] / f"{weights}.safetensors")
        real = replace(real, config=replace(real.config, dim=1536))
        flags = sample.parse_flags(["--image", "x", "--prompt-embeds", "x"])
        c = sample.resolve(flags, real, sample.given_tracks(flags, (48, 32))).config
        assert (c.shift, c.guidance) == (shift, (w_text, 0))
    c = settled("t2v.safetensors", "--sampler", "stream", "--steps", 2, "--memory", "c3s1w1").config
    assert (c.causal, c.sink, c.window, c.sigmas) == (True, 1, 1, schedule(2, 5.0))
    assert not settled("self_forcing.pt", "--sampler", "teacher").config.causal
    job = settled("headed.safetensors", "--steps", 3, "--prompt-embeds", "x", "--guidance", "3,4")
    assert not job.notes and (job.config.causal, job.config.steps, job.config.guidance) == (False, 3, (3, 4))
    assert_error(sample.UserError, "use --sampler teacher", settled, "headed.safetensors", "--sampler", "stream")


def test_a_stream_that_remembers_all_ends_where_its_training_did():
    settled("self_forcing.pt", frames=81)
    for memory in "c3s0w99", "c3s1w1", "c3s0wfull":
        settled("self_forcing.pt", "--memory", memory, frames=500)
    assert_error(sample.UserError, "81 frames, all of them; add --memory c3s1w5", settled, "self_forcing.pt", frames=82)
    assert_error(sample.UserError, "--sampler teacher", settled, "i2v.safetensors", "--sampler", "stream")
