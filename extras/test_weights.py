"""Weights files: ours, Wan's, other public layouts, and what does not fit."""

import json
import os
import re
import sys
import unittest.mock
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extras import checkpoints
from extras.checkpoints import checked_config
from extras.testing import (COPYING, FAMILIES, HERE, SMALL, TAEW22, WAN, WAN21, assert_error,
                            assert_near, clip_of, folder, in_diffusers_layout, linear_vae,
                            new_model, new_tracks, new_vae, public, rand, randomised, same,
                            same_tensors, saved, shards, slow, write_layout)
from motionstream import (PRESETS, MotionStream, UserError, extra, image_and_mask, public_config,
                          save_pretrained, write_file)
from sample import embed_words
from vae import TinyVAE, WanVAE, WanVAEConfig, load_vae

load = MotionStream.from_pretrained

# Parameters that are float32 whatever the rest is.
ISLANDS = r"time_|head\.|modulation|norm3"


def dtypes(model):
    """Of the parameters that are none of ISLANDS."""
    found = set()
    for name, p in model.named_parameters():
        if re.search(ISLANDS, name):
            assert p.dtype == torch.float32, name
        else:
            found.add(p.dtype)
    return found


def without_extras():
    """extras.checkpoints cannot be imported in here, as in a copy of the top files alone."""
    return unittest.mock.patch.dict(sys.modules, {"extras": None, "extras.checkpoints": None})


# --------------------------------------------------------------------------------------------------
# Files of this project.

def test_from_pretrained_returns_what_was_saved():
    model = new_model()
    x, given, _ = clip_of(3)
    ones = torch.ones(2)
    expected = model(x, ones, **given)
    single = torch.float32
    half = torch.float16
    for on_disk, asked_for, kept, tolerance in (
            (single, None, single, 0),
            (half, None, half, 0.05),
            (half, single, single, 0.05),
            (half, torch.bfloat16, torch.bfloat16, 0.05)):
        with folder() as here:
            path = saved(here / "a.safetensors", model, dtype=on_disk)
            loaded = load(path, dtype=asked_for)
        assert loaded.config == model.config
        assert not loaded.training
        assert dtypes(loaded) == {kept}
        velocity = loaded(x, ones, **given)
        assert velocity.dtype == single
        assert_near(velocity, expected, tolerance)


def test_fields_of_the_config_may_be_others_than_the_files():
    with folder() as here:
        path = saved(here / "a.safetensors", new_model())
        loaded = load(path, sink=0, window=None)
    assert loaded.config == replace(SMALL, sink=0, window=None)
    for cache in loaded.new_caches():
        assert cache.sink == 0
        assert cache.window is None


def test_damaged_files_are_refused_in_one_line_that_names_the_file():
    with folder() as here:
        whole = saved(here / "whole.safetensors", new_model()).read_bytes()
        path = here / "damaged.safetensors"
        for data in whole[:-100], whole[:50], b"", b"\xff" * 999:
            path.write_bytes(data)
            assert_error(ValueError, path.name, load, path)
            assert_error(ValueError, path.name, TinyVAE.from_pretrained, path)
        nowhere = here / "nowhere.safetensors"
        assert_error(ValueError, nowhere.name, load, nowhere)
        assert_error(ValueError, nowhere.name, TinyVAE.from_pretrained, nowhere)


def test_weights_that_do_not_fit_are_refused_in_one_line_that_names_the_file():
    newer = json.dumps({"unheard": 1})
    for net, name in (new_model(), "blocks.1.ffn.0.weight"), (new_vae(), "decoder.1.weight"):
        cls = type(net)
        other = {name: torch.zeros(3)}
        extra = {"extra": torch.zeros(3)}
        with folder() as here:
            for path in (
                    saved(here / "missing.safetensors", net, lambda t: t.pop(name)),
                    saved(here / "extra.safetensors", net, lambda t: t.update(extra)),
                    saved(here / "shape.safetensors", net, lambda t: t.update(other)),
                    saved(here / "json.safetensors", net, config="{"),
                    saved(here / "list.safetensors", net, config="[1]"),
                    saved(here / "newer.safetensors", net, config=newer)):
                assert_error(ValueError, path.name, cls.from_pretrained, path)


def test_a_model_is_no_vae_and_a_vae_no_model():
    with folder() as here:
        model = saved(here / "model.safetensors", new_model())
        vae = saved(here / "vae.safetensors", new_vae())
        assert_error(ValueError, "vae.safetensors", load, vae)
        assert_error(ValueError, "model.safetensors", TinyVAE.from_pretrained, model)
        odd = here / "odd.pth"
        for content in (
                [1],
                {"encoder.0.weight": 1},
                {"encoder.conv1.weight": torch.ones(3)},
                {"code": Path("x")}):
            torch.save(content, odd)
            assert_error(ValueError, "odd.pth", TinyVAE.from_pretrained, odd)


def test_words_are_the_same_in_every_process():
    ours = embed_words("Fading light, spinning shapes", SMALL)
    assert ours.shape == (1, 4, 12)
    known = torch.tensor([0.42179, 0.36915, 0.47959, -1.30741])     # by the shipped weights
    assert_near(ours[0, :, 0], known, 1e-4)
    assert ours.equal(embed_words("fading LIGHT spinning shapes", SMALL))
    assert embed_words(None, SMALL) is None
    assert embed_words("", SMALL).shape == (1, 0, 12)
    assert embed_words("a b c d e f g h i j", SMALL).shape == (1, 5, 12)


def test_a_tiny_model_of_48_channels_is_no_wan_22():
    config = replace(SMALL, in_dim=48 + 8 + 48, out_dim=48, clean_first=False)
    with folder() as here:
        path = saved(here / "a.safetensors", randomised(MotionStream(config)))
        assert load(path).config == config
    assert config.image_dim == 48
    assert not config.has_mask


def test_a_config_tells_sizes_that_follow_from_its_fields():
    assert SMALL.latent_size == (4, 6)
    assert SMALL.head_dim == 20
    assert (SMALL.copy_dim, SMALL.shares) == (0, 0)
    assert SMALL.first_chunk_size == 3
    assert replace(SMALL, first_chunk=1).first_chunk_size == 1
    assert not SMALL.is_wan
    assert PRESETS["wan2.2-5b"].is_wan
    assert (COPYING.copy_dim, COPYING.shares) == (4 + 6, 2)
    masked = replace(SMALL, in_dim=4 + 8 + 8)
    assert masked.image_dim == 8
    assert masked.has_mask


def test_what_extras_hold_is_found_or_nothing_or_an_error_that_says_what_for():
    assert extra("checkpoints") is checkpoints
    with without_extras():
        assert extra("checkpoints") is None
        said = "--flag: needs extras/checkpoints.py, which is missing from this copy"
        assert_error(UserError, said, extra, "checkpoints", "--flag")


def test_wans_own_layout_and_ours_are_read_without_extras():
    with folder() as here, without_extras():
        (here / "sharded").mkdir()
        index = shards(here / "sharded", public())
        one = write_layout(here, "Wan 2.1 T2V", "Wan")
        file = one / "diffusion_pytorch_model.safetensors"
        for path in one, file, index, here / "sharded":
            assert same_tensors(load(path), public()), path
        save_file(randomised(WanVAE(WAN21)).state_dict(), here / "vae.safetensors")
        assert isinstance(load_vae(here / "vae.safetensors"), WanVAE)
        save_file(in_diffusers_layout(public()), here / "other.safetensors")
        other = here / "other.safetensors"
        assert_error(UserError, "other.safetensors: it has no tensor blocks.0", load, other)
        needs = "needs extras/checkpoints.py, which is missing from this copy"
        assert_error(UserError, f"may mean another layout: {needs}", load, other)


def test_a_copy_without_extras_trusts_a_config_of_which_a_model_can_be_built():
    model = new_model()
    with folder() as here:
        path = here / "a.safetensors"
        for name, value, said in (
                ("dim", -40, "no model can be built from its config ("),
                ("ffn_dim", "wide", "no model can be built from its config ("),
                ("num_layers", 3, 'Missing key(s) in state_dict: "blocks.2.'),
                ("in_dim", 1, "size mismatch for patch_embedding.weight"),
                ("unheard", 1, "the config in it has an unknown field, unheard")):
            saved(path, model, config=json.dumps(asdict(SMALL) | {name: value}))
            with without_extras():
                assert_error(UserError, f"{path}: ", load, path)
                assert_error(UserError, said, load, path)
        saved(path, model, config=json.dumps(asdict(SMALL) | {"fps": 10 ** 9}))
        assert_error(UserError, "fps is 1000000000", load, path)
        with without_extras():
            assert load(path).config.fps == 10 ** 9
        about = linear_vae().metadata()
        tensors = {name: t.contiguous() for name, t in linear_vae().state_dict().items()}
        for config, said in (
                ('{"latent_channels": -1}', "no model can be built from its config ("),
                ('{"latent_channels": 5}', "not a complete LinearVAE; size mismatch for")):
            save_file(tensors, path, about | {"config": config})
            with without_extras():
                assert_error(UserError, said, load_vae, path)


def test_shipped_weights_are_read_without_extras():
    with without_extras():
        for name in "tiny", "tiny_teacher":
            model = load(HERE / f"assets/{name}.safetensors")
            assert model.config.text_encoder == "words"
        load_vae(HERE / "assets/tiny_vae.safetensors")


def test_shipped_weights_are_read_as_they_are():
    for name in "tiny", "tiny_teacher":
        path = HERE / f"assets/{name}.safetensors"
        model = load(path)
        tensors = load_file(path)
        assert model.state_dict().keys() == tensors.keys()
        for key, t in model.state_dict().items():
            assert t.equal(tensors[key].to(t.dtype)), key
        assert model.config.causal == (name == "tiny")


def test_shipped_weights_are_of_the_preset():
    for name in "tiny", "tiny_teacher":
        config = load(HERE / f"assets/{name}.safetensors").config
        assert len(config.latent_std) == config.out_dim
        assert replace(config, causal=False, latent_std=()) == PRESETS["tiny"], name


def test_written_weights_come_back_with_their_config():
    model = new_model(chunk=2, window=None, track_id_mode="random")
    with folder() as here:
        path = here / "a.safetensors"
        for dtype in torch.float32, torch.float16:
            save_pretrained(model, path, dtype=dtype, step="600")
            back = load(path)
            assert back.config == model.config
            for name, t in back.state_dict().items():
                written = model.state_dict()[name].to(dtype)
                assert t.equal(written.to(t.dtype))
            with safe_open(path, "pt") as file:
                assert file.metadata()["step"] == "600"
                assert set(file.keys()) == set(model.state_dict())
        save_pretrained(load(path), path)               # over the file that is mapped
        assert load(path).config == model.config
        assert os.listdir(here) == ["a.safetensors"]


def test_written_weights_have_the_models_dtype_unless_another_is_asked_for():
    model = new_model().half()
    with folder() as here:
        path = here / "a.safetensors"
        save_pretrained(model, path)
        tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {torch.float16}


def write_half(path):
    Path(path).write_text("half")
    raise OSError("disk full")


def test_writing_leaves_the_old_file_when_it_fails():
    with folder() as here:
        path = here / "a.txt"
        write_file(path, lambda part: Path(part).write_text("old"))
        assert_error(OSError, "disk full", write_file, path, write_half)
        assert path.read_text() == "old"
        assert os.listdir(here) == ["a.txt"]

    def fail(tensors, path, about):
        write_half(path)

    model = new_model()
    with folder() as here, unittest.mock.patch("safetensors.torch.save_file", fail):
        path = saved(here / "a.safetensors", model)
        before = path.read_bytes()
        assert_error(OSError, "disk full", save_pretrained, model, path)
        assert path.read_bytes() == before
        assert os.listdir(here) == ["a.safetensors"]


# --------------------------------------------------------------------------------------------------
# Public weights.

def test_families_are_told_from_their_tensors():
    for family, (config, image) in FAMILIES.items():
        channels = {"nothing": 0, "latent": config.out_dim, "mask": 4 + config.out_dim}
        with folder() as here:
            save_file(public(family), here / "a.safetensors")
            model = load(here / "a.safetensors", chunk=2)
        assert model.config == replace(config, chunk=2), family
        assert model.config.image_dim == channels[image], family
        assert same_tensors(model, public(family)), family
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_families_are_told_from_repositories_in_either_layout():
    for family, (config, _) in FAMILIES.items():
        for layout in "Wan", "Diffusers":
            with folder() as here:
                model = load(write_layout(here, family, layout))
            assert model.config == config, (family, layout)
            assert same_tensors(model, public(family)), (family, layout)


def test_families_are_told_at_their_real_sizes():
    i2v = replace(PRESETS["wan2.1-14b"], in_dim=36, clip_dim=1280, clean_first=False)
    control = replace(i2v, in_dim=48, track_dim=16)
    t2v = [PRESETS[name] for name in ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b")]
    for config in t2v + [i2v, control]:
        with torch.device("meta"):
            tensors = MotionStream(config).state_dict()
        tensors.pop("track_head.conv.weight", None)
        nowhere = Path("nowhere/a.safetensors")
        found = public_config(tensors, nowhere)
        assert checked_config(found, {}, tensors, {}, nowhere) == config


def test_a_track_head_tells_how_wide_its_slot_is():
    """In a file of this project that has lost its metadata."""
    config = replace(WAN, in_dim=40, track_dim=8, clean_first=False)
    model = randomised(MotionStream(config))
    with folder() as here:
        save_file(model.state_dict(), here / "a.safetensors")
        back = load(here / "a.safetensors")
    assert back.config == config
    assert same(back.state_dict(), model.state_dict())


def check_shards(here, repository, tensors):
    """Shards in `here` are found by their folder, their index, any of them, and the repository."""
    index = shards(here, tensors)
    for name in "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors":
        (here / name).write_bytes(b"of another model")
    second = here / "diffusion_pytorch_model-00002-of-00003.safetensors"
    paths = [here, str(here), index, second]
    for path in paths + [repository]:
        assert same_tensors(load(path), public()), path
    index.rename(here / "kept")
    assert same_tensors(load(here), public())           # shards without an index
    (here / "kept").rename(index)
    lost = "diffusion_pytorch_model-00003-of-00003.safetensors"
    (here / lost).unlink()
    for path in paths:
        assert_error(ValueError, f"1 of 3 shards are missing: {lost}", load, path)


def test_shards_are_found_and_what_is_missing_is_named():
    with folder() as here:
        check_shards(here, here, public())
    with folder() as here:
        transformer = here / "repository/transformer"
        transformer.mkdir(parents=True)
        check_shards(transformer, here / "repository", in_diffusers_layout(public()))


def test_shards_may_have_names_that_only_the_index_knows():
    places = {}
    for i, name in enumerate(public()):
        places[name] = f"part{i % 2}.safetensors"
    with folder() as here:
        for part in set(places.values()):
            mine = {name: t for name, t in public().items() if places[name] == part}
            save_file(mine, here / part)
        index = here / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        assert same_tensors(load(here), public())
        for content in (
                "{", "[]", "{}",
                '{"weight_map": 1}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
            index.write_text(content)
            assert_error(ValueError, index.name, load, index)


def test_which_of_several_files_is_meant_is_asked():
    with folder() as here:
        assert_error(ValueError, "no weights file", load, here)
        for name in "a.safetensors", "b.safetensors":
            save_file(public(), here / name)
        assert_error(ValueError, "a.safetensors, b.safetensors", load, here)


def test_of_two_experts_either_is_read_and_which_is_asked():
    for high, low in ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"):
        with folder() as here:
            for name in high, low:
                (here / name).mkdir()
                save_file(public(), here / name / "diffusion_pytorch_model.safetensors")
            assert_error(ValueError, f"{here / low} (low noise)", load, here)
            assert same_tensors(load(here / low), public())


def rounded(dtype):
    return {name: t.to(dtype) for name, t in public().items()}


def repackaged():
    """Matrices in bfloat16, all else in float32, as repackaged files have them."""
    tensors = dict(public())
    for name, t in tensors.items():
        if t.ndim == 2:
            tensors[name] = t.bfloat16()
    return tensors


def test_dtypes_of_public_files_are_kept_and_islands_never_rounded():
    single = torch.float32
    half = torch.float16
    x = rand(1, 16, 3, 2, 4)
    for tensors, kept in (
            (public(), single),
            (rounded(half), half),
            (rounded(torch.bfloat16), torch.bfloat16),
            (repackaged(), torch.bfloat16)):
        with folder() as here:
            path = here / "a.safetensors"
            save_file(tensors, path)
            model = load(path)
            assert dtypes(model) == {kept}
            assert model(x, torch.ones(1), rand(1, 2, 24)).isfinite().all()
            for dtype in torch.bfloat16, half, single:
                model = load(path, dtype=dtype)
                assert dtypes(model) == {dtype}
                for name, t in model.state_dict().items():
                    if re.search(ISLANDS, name):
                        assert t.equal(tensors[name].float()), name


def test_weights_of_8_bits_are_refused():
    with folder() as here:
        path = here / "small.safetensors"
        for dtype in torch.float8_e4m3fn, torch.float8_e5m2, torch.int8:
            small = torch.zeros(320, 256).to(dtype)
            save_file(public() | {"blocks.0.ffn.0.weight": small}, path)
            text = f"small.safetensors: blocks.0.ffn.0.weight is {dtype}"
            assert_error(ValueError, text, load, path)


def assert_refused(text, tensors=None, settings=None, **overrides):
    """Public weights, changed, with a config.json of these settings; the folder is named too."""
    with folder() as here:
        if settings is not None:
            (here / "config.json").write_text(settings)
        path = here / "a.safetensors"
        save_file(tensors or public(), path)
        assert_error(ValueError, text, load, path, **overrides)
        assert_error(ValueError, str(here), load, path, **overrides)


def without(prefix):
    return {name: t for name, t in public().items() if not name.startswith(prefix)}


def with_zeros(*names, shape=(4,)):
    return public() | {name: torch.zeros(shape) for name in names}


def test_public_weights_of_other_names_or_shapes_are_refused_in_one_line():
    missing = "not a complete MotionStream; Missing key(s) in state_dict: "
    unknown = "not a complete MotionStream; Unexpected key(s) in state_dict: "
    assert_refused(missing + '"blocks.1.ffn.2.bias"', without("blocks.1.ffn.2.bias"))
    assert_refused(missing + '"blocks.0.cross_attn.q.weight", ', without("blocks.0.cross_attn"))
    assert_refused(
        unknown + '"ref_conv.bias", "ref_conv.weight".\n',
        with_zeros("ref_conv.bias", "ref_conv.weight"))
    assert_refused(
        unknown + '"model.blocks.0.norm3.bias".\n',
        with_zeros("model.blocks.0.norm3.bias", shape=(256,)))
    assert_refused(
        "not a complete MotionStream; size mismatch for head.head.bias: ",
        with_zeros("head.head.bias", shape=(3,)))
    vace = with_zeros(*[f"vace_blocks.{i}" for i in range(99)])
    assert_refused(unknown + '"vace_blocks.0", ', vace)
    both = {name.replace("ffn.0.bias", "ffn.x.bias"): t for name, t in vace.items()}
    assert_refused('"blocks.1.ffn.0.bias". Unexpected key(s) in state_dict: "', both)


def test_what_is_no_dit_of_a_known_family_is_refused_in_one_line():
    for name in "patch_embedding", "head.head", "blocks", "text_embedding", "time_embedding":
        assert_refused("expected a complete Wan DiT checkpoint", without(name))
    name = "patch_embedding.weight"
    assert_refused(f"{name} is (256, 64)", with_zeros(name, shape=(256, 64)))
    odd = with_zeros(name, shape=(256, 32, 1, 2, 2))
    assert_refused("32 input channels for 16", odd)


def test_a_config_json_that_contradicts_the_tensors_is_refused_in_one_line():
    control = with_zeros("patch_embedding.weight", shape=(256, 48, 1, 2, 2))
    assert_refused("48 by its tensors, but 36", control, '{"in_dim": 36}')
    for settings in (
            '{"num_layers": 30}', '{"dim": 1536}', '{"in_channels": 36}',
            '{"ffn_dim": 8960}', '{"image_dim": 1280}'):
        assert_refused("by its tensors, but", settings=settings)
    for settings in "{", "[1]", '"text"':
        assert_refused("config.json: cannot be read", settings=settings)
    assert_refused("give num_heads", settings='{"num_heads": 3}')
    assert_refused("expected int from 1", settings='{"num_heads": 0}')
    assert_refused("expected int from 1", settings='{"num_heads": "2"}')
    assert_refused("expected int from 1", num_heads=0)
    assert_refused("a.safetensors", num_layers=3)


def test_a_file_of_ours_that_contradicts_itself_is_refused_in_one_line():
    said = json.dumps(asdict(SMALL) | {"num_layers": 3})
    with folder() as here:
        path = saved(here / "a.safetensors", new_model(), config=said)
        text = "num_layers is 2 by its tensors, but 3 in its metadata"
        assert_error(ValueError, text, load, path)
        for config in SMALL, FAMILIES["Wan 2.1 Fun-Control"][0]:
            save_pretrained(randomised(MotionStream(config)), path)
            text = f"its track slot has {config.track_dim} channels"
            assert_error(ValueError, text, load, path, track_dim=config.track_dim + 1)
        head = "track_head.conv.weight"
        saved(path, new_model(), lambda tensors: tensors.pop(head))
        assert_error(ValueError, head, load, path)


def test_a_file_changed_after_loading_does_not_change_the_model():
    vae = randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict()
    with folder() as here:
        for tensors, read in (public(), load), (vae, load_vae):
            save_file(tensors, here / "a.safetensors")
            torch.save(tensors, here / "a.pt")
            for path in here / "a.safetensors", here / "a.pt":
                model = read(path)
                with open(path, "r+b") as file:                 # in place, as rsync --inplace does
                    file.write(bytes(path.stat().st_size))
                assert same_tensors(model, tensors), path
                os.truncate(path, 0)
                assert same_tensors(model, tensors), path


@slow
@torch.no_grad()
def test_bfloat16_beside_float32_at_the_size_of_wan_1_3b():
    x = rand(1, 16, 3, 8, 8)
    sigma = torch.tensor([0.833])
    given = {
        "text": 0.1 * rand(1, 20, 4096, seed=1),
        "tracks": rand(1, 16, 3, 8, 8, seed=2),
        "clip": rand(1, 257, 1280, seed=3)}
    with folder() as here:
        model = randomised(MotionStream(PRESETS["motionstream-1.3b"]))
        path = saved(here / "a.safetensors", model, dtype=torch.bfloat16)
        exact = load(path, dtype=torch.float32)(x, sigma, **given)
        found = load(path)(x, sigma, **given)
    error = ((found - exact).norm() / exact.norm()).item()
    print(f"the velocity in bfloat16 is {100 * error:.2f} % (relative L2) from that in float32, "
          "of the same weights")
    assert error < 0.02, error


def test_config_json_tells_what_tensors_do_not():
    settings = {
        "num_heads": 4, "eps": 1e-5, "text_len": 7,
        "in_channels": 99, "in_dim": 16,                        # Wan's word wins over Diffusers'
        "out_channels": None}
    with folder() as here:
        save_file(public(), here / "a.safetensors")
        (here / "config.json").write_text(json.dumps(settings))
        assert load(here).config == replace(WAN, num_heads=4, eps=1e-5, text_len=7)
        assert load(here, num_heads=1).config.num_heads == 1
        save_pretrained(new_model(), here / "a.safetensors")    # the metadata of our own files win
        assert load(here).config == SMALL


# --------------------------------------------------------------------------------------------------
# What is added to public weights.

def with_track_slot(family):
    """The model of a family that has or gets a slot for tracks."""
    config, _ = FAMILIES[family]
    with folder() as here:
        save_file(public(family), here / "a.safetensors")
        return load(here / "a.safetensors", track_dim=config.track_dim or 16)


def inputs_of(config):
    """Random x, text, image and clip, what of these a model of the config takes."""
    given = {"text": rand(1, 2, 24)}
    if config.image_dim:
        given["image"] = rand(1, config.image_dim, 3, 2, 4)
    if config.clip_dim:
        given["clip"] = rand(1, 257, config.clip_dim)
    return rand(1, config.out_dim, 3, 2, 4, seed=1), given


def features_of(model):
    """Of four tracks, in a picture of 2 x 4 latent pixels."""
    height = 2 * model.config.stride
    width = 4 * model.config.stride
    tracks, visible, ids = new_tracks(9, 4, batch=1)            # of a picture of SMALL.size
    scale = torch.tensor([width / SMALL.size[1], height / SMALL.size[0]])
    return model.track_head(tracks * scale, visible, ids, height, width)


def test_a_new_track_slot_changes_nothing_and_can_learn():
    """Either the columns of the patch embedding or the head are zeros, not both: neither could
    learn."""
    sigma = torch.tensor([0.5])
    for family, (config, _) in FAMILIES.items():
        model = with_track_slot(family).requires_grad_(True)
        base = MotionStream(config).eval()
        base.load_state_dict(public(family), strict=False)
        x, given = inputs_of(config)
        velocity = model(x, sigma, **given, tracks=features_of(model))
        assert_near(velocity, base(x, sigma, **given), 1e-6)

        velocity.square().sum().backward()
        slot = slice(config.out_dim, config.out_dim + model.config.track_dim)
        head = model.track_head.conv.weight
        embedding = model.patch_embedding.weight
        if config.track_dim:                                    # trained for another control
            assert not head.any(), family
            assert embedding[:, slot].all(), family
            assert head.grad.abs().max() > 1e-6, family
        else:
            assert head.all(), family
            assert not embedding[:, slot].any(), family
            assert embedding.grad[:, slot].abs().max() > 1e-6, family


def test_a_new_track_slot_has_channels_of_its_own():
    for family, (config, _) in FAMILIES.items():
        new = with_track_slot(family).config
        assert new.image_dim == config.image_dim
        assert new.track_dim == (config.track_dim or 16)
        assert new.in_dim == config.out_dim + new.track_dim + config.image_dim


def test_weights_with_a_mask_get_it_before_the_image():
    latents = rand(2, 16, 4, 2, 3)
    image = image_and_mask(latents)
    mask = image[:, :4]
    assert (mask[:, :, 0] == 1).all()
    assert not mask[:, :, 1:].any()
    assert image[:, 4:].equal(latents)
    config, _ = FAMILIES["Wan 2.1 I2V, Fun-InP"]
    assert image.shape == (2, config.image_dim, 4, 2, 3)


# --------------------------------------------------------------------------------------------------
# VAEs.

def test_files_of_wans_vae_are_read_in_every_dtype():
    narrow = randomised(WanVAE(WanVAEConfig(16, 4, 6)))
    for dtype in torch.float16, torch.bfloat16, torch.float32:
        tensors = {name: t.to(dtype) for name, t in narrow.state_dict().items()}
        with folder() as here:
            save_file(tensors, here / "narrow.safetensors")
            torch.save(tensors, here / "narrow.pth")
            vaes = [load_vae(here / name) for name in ("narrow.safetensors", "narrow.pth")]
        for vae in vaes:
            assert type(vae) is WanVAE
            assert vae.config == narrow.config
            assert not vae.training
            assert not any(p.requires_grad for p in vae.parameters())
            for name, p in vae.state_dict().items():
                assert p.equal(tensors[name].float())


def test_every_file_opens_as_the_vae_it_holds():
    tiny = new_vae()
    with folder() as here:
        own = saved(here / "tiny.safetensors", tiny)
        assert load_vae(own).metadata() == tiny.metadata()
        public_tiny = here / "taew2_2.safetensors"
        save_file(new_vae(TAEW22).state_dict(), public_tiny)
        assert load_vae(public_tiny).config == TAEW22
        wans = here / "narrow.pth"
        torch.save(randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict(), wans)
        text = "narrow.pth: a WanVAE, not a TinyVAE; load_vae"
        assert_error(ValueError, text, TinyVAE.from_pretrained, wans)
        text = "tiny.safetensors: a TinyVAE, not a WanVAE; load_vae"
        assert_error(ValueError, text, WanVAE.from_pretrained, own)


def test_what_is_no_whole_vae_is_refused_in_one_line():
    whole = randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict()

    def less(name):
        return {other: t for other, t in whole.items() if other != name}

    def refused(name, tensors):
        torch.save(tensors, here / name)
        assert_error(ValueError, name, load_vae, here / name)

    with folder() as here:
        refused("missing.pth", less("decoder.middle.1.proj.bias"))
        refused("first.pth", less("encoder.conv1.weight"))
        refused("empty.pth", {})
        refused("extra.pth", whole | {"extra": torch.zeros(3)})
        refused("shape.pth", whole | {"encoder.conv1.bias": torch.zeros(3)})
        refused("scalar.pth", whole | {"conv2.weight": torch.zeros(())})
        refused("channels.pth", whole | {"conv2.weight": torch.zeros(7, 7, 1, 1, 1)})
        nowhere = here / "nowhere.pth"
        assert_error(ValueError, "nowhere.pth", load_vae, nowhere)
        assert_error(ValueError, here.name, load_vae, here)
        dit = saved(here / "dit.safetensors", new_model())
        assert_error(ValueError, "dit.safetensors", load_vae, dit)
