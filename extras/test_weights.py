"""Weights files: ours, Wan's, other public layouts, and what does not fit."""

import json
import os
import re
import sys
import unittest
import unittest.mock
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_distill as td
from extras.testing import (COPYING, shards, FAMILIES, HERE, SMALL, TAEW22, WAN, WAN21, assert_error, assert_near,
                            clip_of, folder, in_diffusers_layout, new_model, new_tracks, new_vae,
                            public, rand, randomised, same_tensors, saved, slow, write_layout)
from motionstream import (PRESETS, MotionStream, UserError, find_config, image_and_mask,
                          save_pretrained)
from sample import embed_words
from vae import TinyVAE, WanVAE, WanVAEConfig, load_vae

# ----------------------------------------------------------------------------------------------------------------------
# Weights files.

def test_from_pretrained_returns_what_was_saved():
    model, (x, given, _), half = new_model(), clip_of(3), torch.float16
    with folder() as here:
        for on_disk, dtype, kept in ((torch.float32, None, torch.float32), (half, None, half),
                                     (half, torch.float32, torch.float32), (half, torch.bfloat16, torch.bfloat16)):
            saved(here / "a.safetensors", model, dtype=on_disk)
            loaded = MotionStream.from_pretrained(here / "a.safetensors", dtype=dtype)
            assert loaded.config == model.config and not loaded.training
            for name, p in loaded.named_parameters():
                island = re.search(r"time_|head\.|modulation|norm3", name)
                assert p.dtype == (torch.float32 if island else kept), (name, p.dtype)
            v = loaded(x, torch.ones(2), **given)
            assert v.dtype == torch.float32
            assert_near(v, model(x, torch.ones(2), **given), 0 if on_disk == torch.float32 else 0.05)
        cache = MotionStream.from_pretrained(here / "a.safetensors", sink=0, window=None).new_caches()[0]
        assert cache.sink == 0 and cache.window is None


def test_weights_that_do_not_fit_are_refused_in_one_line_that_names_the_file():
    model, vae, both = new_model(), new_vae(), (MotionStream, TinyVAE)
    with folder() as here:
        def refused(path, *classes):
            for cls in classes:
                assert_error(ValueError, path.name, cls.from_pretrained, path)

        whole, own = saved(here / "whole.safetensors", model), saved(here / "vae.safetensors", vae)
        for data in whole.read_bytes()[:-100], whole.read_bytes()[:50], b"", b"\xff" * 999:
            (here / "damaged.safetensors").write_bytes(data)
            refused(here / "damaged.safetensors", *both)
        for cls, net, name in (MotionStream, model, "blocks.1.ffn.0.weight"), (TinyVAE, vae, "decoder.1.weight"):
            refused(saved(here / "missing.safetensors", net, lambda t: t.pop(name)), cls)
            refused(saved(here / "extra.safetensors", net, lambda t: t.update(extra=torch.zeros(3))), cls)
            refused(saved(here / "shape.safetensors", net, lambda t: t.update({name: torch.zeros(3)})), cls)
            refused(saved(here / "json.safetensors", net, config="{"), cls)
            refused(saved(here / "list.safetensors", net, config="[1]"), cls)
            refused(saved(here / "newer.safetensors", net, config=json.dumps({"unheard": 1})), cls)
        refused(here / "nowhere.safetensors", *both), refused(own, MotionStream), refused(whole, TinyVAE)
        for content in [1], {"encoder.0.weight": 1}, {"encoder.conv1.weight": torch.ones(3)}, {"code": Path("x")}:
            torch.save(content, here / "odd.pth")
            refused(here / "odd.pth", TinyVAE)


def test_words_are_the_same_in_every_process():
    ours = embed_words("Fading light, spinning shapes", SMALL)
    assert ours.shape == (1, 4, 12) and ours.equal(embed_words("fading LIGHT spinning shapes", SMALL))
    assert_near(ours[0, :, 0], torch.tensor([0.42179, 0.36915, 0.47959, -1.30741]), 1e-4)         # the shipped weights know these
    assert embed_words(None, SMALL) is None and embed_words("", SMALL).shape == (1, 0, 12)
    assert embed_words("a b c d e f g h i j", SMALL).shape == (1, 5, 12)


def test_configs_of_older_files_are_read_in_todays_words():
    def older(config, tracks):
        fields = asdict(config) | {"tracks": tracks}
        for name in "track_id_mode", "text_encoder", "clean_first":
            fields.pop(name)
        return json.dumps(fields)

    wan22 = replace(SMALL, in_dim=48 + 8 + 52, out_dim=48)
    channels = replace(SMALL, in_dim=16, clean_first=False)
    for config, tracks in ((SMALL, "start"), (replace(SMALL, track_id_mode="random"), "random"),
                           (channels, "start"), (wan22, "start")):
        with folder() as here:
            saved(here / "a.safetensors", MotionStream(config), config=older(config, tracks))
            assert MotionStream.from_pretrained(here / "a.safetensors").config == config
    umt5 = replace(SMALL, text_dim=4096, text_encoder="umt5")
    with folder() as here:
        saved(here / "a.safetensors", MotionStream(umt5), config=older(umt5, "start"))
        assert MotionStream.from_pretrained(here / "a.safetensors").config == umt5


def test_a_tiny_model_of_48_channels_is_no_wan_22():
    config = replace(SMALL, in_dim=48 + 8 + 48, out_dim=48, clean_first=False)
    with folder() as here:
        saved(here / "a.safetensors", randomised(MotionStream(config)))
        assert MotionStream.from_pretrained(here / "a.safetensors").config == config
    assert (config.latent_size, config.head_dim, config.image_dim, config.has_mask) == ((4, 6), 20, 48, False)
    assert (COPYING.copy_dim, SMALL.copy_dim, replace(SMALL, in_dim=20).has_mask) == (10, 0, True)


def test_wans_own_layout_and_ours_are_read_without_extras():
    with folder() as here, unittest.mock.patch.dict(sys.modules, {"extras": None, "extras.checkpoints": None}):
        (here / "sharded").mkdir()
        index, one = shards(here / "sharded", public()), write_layout(here, "Wan 2.1 T2V", "Wan")
        for path in one, one / "diffusion_pytorch_model.safetensors", index, here / "sharded":
            assert same_tensors(MotionStream.from_pretrained(path), public()), path
        save_file(randomised(WanVAE(WAN21)).state_dict(), here / "vae.safetensors")
        assert isinstance(load_vae(here / "vae.safetensors"), WanVAE)
        for name in "tiny", "tiny_teacher", "tiny_causal":
            assert MotionStream.from_pretrained(HERE / f"assets/{name}.safetensors").config.text_encoder == "words"
        load_vae(HERE / "assets/tiny_vae.safetensors")
        save_file(in_diffusers_layout(public()), here / "other.safetensors")
        try:
            MotionStream.from_pretrained(here / "other.safetensors")
        except UserError as e:
            assert "other.safetensors: it has no tensor blocks.0" in str(e) and "is missing" in str(e), e
        else:
            raise AssertionError("another layout was read without extras")


# ----------------------------------------------------------------------------------------------------------------------
# Public weights.

def test_families_are_told_from_their_tensors():
    for family, (c, image) in FAMILIES.items():
        with folder() as here:
            save_file(public(family), here / "a.safetensors")
            model = MotionStream.from_pretrained(here / "a.safetensors", chunk=2)
            assert model.config == replace(c, chunk=2) and same_tensors(model, public(family)), family
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            assert model.config.image_dim == {"nothing": 0, "latent": c.out_dim, "mask": 4 + c.out_dim}[image], family
            for layout in "Wan", "Diffusers":
                (here / layout).mkdir()
                model = MotionStream.from_pretrained(write_layout(here / layout, family, layout))
                assert model.config == c and same_tensors(model, public(family)), (family, layout)
    big = replace(PRESETS["wan2.1-14b"], in_dim=36, clip_dim=1280, clean_first=False)
    for c in (PRESETS["wan2.1-1.3b"], PRESETS["wan2.1-14b"], PRESETS["wan2.2-5b"], big,
              replace(big, in_dim=48, track_dim=16)):
        with torch.device("meta"):
            tensors = MotionStream(c).state_dict()
        tensors.pop("track_head.conv.weight", None)
        assert find_config(tensors, {}, Path("nowhere/a.safetensors")) == c


def test_a_track_head_tells_how_wide_its_slot_is():
    c = replace(WAN, in_dim=40, track_dim=8, clean_first=False)     # of this project, but without its metadata
    model = randomised(MotionStream(c))
    with folder() as here:
        save_file(model.state_dict(), here / "a.safetensors")
        back = MotionStream.from_pretrained(here / "a.safetensors")
    assert back.config == c and all(t.equal(model.state_dict()[name]) for name, t in back.state_dict().items())


def test_files_folders_and_shards_are_found_and_what_is_missing_is_named():
    with folder() as here:
        (here / "repository/transformer").mkdir(parents=True)
        for tensors, at in (public(), here), (in_diffusers_layout(public()), here / "repository/transformer"):
            index = shards(at, tensors)
            for name in "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors":
                (at / name).write_bytes(b"of another model")
            paths = [at, str(at), index, at / "diffusion_pytorch_model-00002-of-00003.safetensors"]
            for path in paths + [here / "repository"] * (at != here):
                assert same_tensors(MotionStream.from_pretrained(path), public()), path
            index.rename(at / "kept")
            assert same_tensors(MotionStream.from_pretrained(at), public())             # shards without an index
            (at / "kept").rename(index)
            lost = "diffusion_pytorch_model-00003-of-00003.safetensors"
            (at / lost).unlink()
            for path in paths:
                assert_error(ValueError, f"1 of 3 shards are missing: {lost}", MotionStream.from_pretrained, path)
    with folder() as here:                                      # shards that only the index knows
        names = sorted(public())
        for i in range(2):
            save_file({name: public()[name] for name in names[i::2]}, here / f"part{i}.safetensors")
        index = here / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}}))
        assert same_tensors(MotionStream.from_pretrained(here), public())
        for content in "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}':
            index.write_text(content)
            assert_error(ValueError, index.name, MotionStream.from_pretrained, index)

    with folder() as here:
        assert_error(ValueError, "no weights file", MotionStream.from_pretrained, here)
        for name in "a.safetensors", "b.safetensors":
            save_file(public(), here / name)
        assert_error(ValueError, "a.safetensors, b.safetensors", MotionStream.from_pretrained, here)
        for pair in ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"):
            both = here / f"with {pair[0]}"
            for name in pair:
                (both / name).mkdir(parents=True)
                save_file(public(), both / name / "diffusion_pytorch_model.safetensors")
            assert_error(ValueError, f"{both / pair[1]} (low noise)", MotionStream.from_pretrained, both)
            assert same_tensors(MotionStream.from_pretrained(both / pair[1]), public())


def test_dtypes_of_public_files_are_kept_and_islands_never_rounded():
    def dtypes(model):
        islands = r"time_|head\.|modulation|norm3"
        return {p.dtype for name, p in model.named_parameters() if not re.search(islands, name)}

    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    mixed = {name: t.to(bf16) if t.ndim == 2 else t for name, t in public().items()}      # as repackaged files are
    with folder() as here:
        for tensors, kept in ((public(), single), ({n: t.half() for n, t in public().items()}, half),
                              ({n: t.to(bf16) for n, t in public().items()}, bf16), (mixed, bf16)):
            save_file(tensors, here / "a.safetensors")
            model = MotionStream.from_pretrained(here / "a.safetensors")
            assert dtypes(model) == {kept} and model.head.head.weight.dtype == single
            assert model(rand(1, 16, 3, 2, 4), torch.ones(1), rand(1, 2, 24)).isfinite().all()
            for dtype in bf16, half, single:
                model = MotionStream.from_pretrained(here / "a.safetensors", dtype=dtype)
                assert dtypes(model) == {dtype}
                for name in "time_embedding.0.weight", "head.head.weight", "blocks.1.modulation", "blocks.0.norm3.bias":
                    assert model.state_dict()[name].equal(tensors[name].float()), name
        for dtype in torch.float8_e4m3fn, torch.float8_e5m2, torch.int8:
            save_file(public() | {"blocks.0.ffn.0.weight": torch.zeros(320, 256).to(dtype)}, here / "small.safetensors")
            assert_error(ValueError, f"small.safetensors: blocks.0.ffn.0.weight is {dtype}",
                         MotionStream.from_pretrained, here / "small.safetensors")


def test_public_weights_that_do_not_fit_are_refused_in_one_line():
    def refused(text, change=None, settings=None, **overrides):
        tensors = dict(public())
        for name, t in (change or {}).items():
            tensors |= {name: t} if t is not None else {}
            tensors = tensors if t is not None else {n: t for n, t in tensors.items() if not n.startswith(name)}
        with folder() as here:
            if settings is not None:
                (here / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
            save_file(tensors, here / "a.safetensors")
            assert_error(ValueError, text, MotionStream.from_pretrained, here / "a.safetensors", **overrides)
            assert_error(ValueError, str(here), MotionStream.from_pretrained, here / "a.safetensors", **overrides)

    refused("not a complete MotionStream; 1 tensors are missing: blocks.1.ffn.2.bias",
            {"blocks.1.ffn.2.bias": None})
    refused("10 tensors are missing: blocks.0.cross_attn.k.bias, ", {"blocks.0.cross_attn": None})
    refused("2 tensors are unknown: ref_conv.bias, ref_conv.weight",
            {"ref_conv.weight": torch.zeros(4), "ref_conv.bias": torch.zeros(4)})
    refused("1 tensors are of another shape: head.head.bias", {"head.head.bias": torch.zeros(3)})
    for text in "7 tensors are unknown", "vace_blocks.3, vace_blocks.4\n":              # the count, and five names
        refused(text, {f"vace_blocks.{i}": torch.zeros(4) for i in range(7)})
    refused("1 tensors are unknown: model.blocks.0.norm3.bias\n", {"model.blocks.0.norm3.bias": torch.zeros(256)})
    for name in "patch_embedding", "head.head", "blocks", "text_embedding", "time_embedding":
        refused("expected a complete Wan DiT checkpoint", {name: None})
    refused("patch_embedding.weight is (256, 64)", {"patch_embedding.weight": torch.zeros(256, 64)})
    refused("32 input channels for 16", {"patch_embedding.weight": torch.zeros(256, 32, 1, 2, 2)})
    refused("48 by its tensors, but 36", {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2)}, {"in_dim": 36})
    for settings in {"num_layers": 30}, {"dim": 1536}, {"in_channels": 36}, {"ffn_dim": 8960}, {"image_dim": 1280}:
        refused("by its tensors, but", settings=settings)
    for settings in "{", "[1]", '"text"':
        refused("config.json: cannot be read", settings=settings)
    for heads, text in (3, "give num_heads"), (0, "expected int from 1"), ("2", "expected int from 1"):
        refused(text, settings={"num_heads": heads})
    refused("expected int from 1", num_heads=0)
    refused("a.safetensors", num_layers=3)
    with folder() as here:
        own = asdict(SMALL)
        saved(here / "a.safetensors", new_model(), config=json.dumps(own | {"num_layers": 3}))
        assert_error(ValueError, "num_layers is 2 by its tensors, but 3 in its metadata", MotionStream.from_pretrained,
                     here / "a.safetensors")
        for c in SMALL, FAMILIES["Wan 2.1 Fun-Control"][0]:
            save_pretrained(randomised(MotionStream(c)), here / "a.safetensors")
            assert_error(ValueError, f"its track slot has {c.track_dim} channels", MotionStream.from_pretrained,
                         here / "a.safetensors", track_dim=c.track_dim + 1)
        saved(here / "a.safetensors", new_model(), lambda tensors: tensors.pop("track_head.conv.weight"))
        assert_error(ValueError, "track_head.conv.weight", MotionStream.from_pretrained, here / "a.safetensors")


def test_a_file_changed_after_loading_does_not_change_the_model():
    vae = randomised(WanVAE(WanVAEConfig(16, 4, 6))).state_dict()
    with folder() as here:
        for tensors, load in (public(), MotionStream.from_pretrained), (vae, load_vae):
            for path in here / "a.safetensors", here / "a.pt":
                (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
                model = load(path)
                with open(path, "r+b") as file:                  # in place, as rsync --inplace and truncate do
                    file.write(bytes(path.stat().st_size))
                assert same_tensors(model, tensors), path
                os.truncate(path, 0)
                assert same_tensors(model, tensors), path


@slow
@torch.no_grad()
def test_bfloat16_beside_float32_at_the_size_of_wan_1_3b():
    c = PRESETS["motionstream-1.3b"]
    x, sigma, text = rand(1, 16, 3, 8, 8), torch.tensor([0.833]), 0.1 * rand(1, 20, 4096, seed=1)
    given = {"tracks": rand(1, 16, 3, 8, 8, seed=2), "clip": rand(1, 257, 1280, seed=3)}
    with folder() as here:
        saved(here / "a.safetensors", randomised(MotionStream(c)), dtype=torch.bfloat16)
        exact = MotionStream.from_pretrained(here / "a.safetensors", dtype=torch.float32)(x, sigma, text, **given)
        rounded = MotionStream.from_pretrained(here / "a.safetensors")(x, sigma, text, **given)
    error = ((rounded - exact).norm() / exact.norm()).item()
    print(f"the velocity in bfloat16 is {100 * error:.2f} % (relative L2) from that in float32, of the same weights")
    assert error < 0.02, error


def test_config_json_tells_what_tensors_do_not():
    with folder() as here:
        save_file(public(), here / "a.safetensors")
        odd = {"num_heads": 4, "eps": 1e-5, "text_len": 7, "in_channels": 99, "in_dim": 16, "out_channels": None}
        (here / "config.json").write_text(json.dumps(odd))
        assert MotionStream.from_pretrained(here).config == replace(WAN, num_heads=4, eps=1e-5, text_len=7)
        assert MotionStream.from_pretrained(here, num_heads=1).config.num_heads == 1
        save_pretrained(new_model(), here / "a.safetensors")            # the metadata of a file of this project win
        assert MotionStream.from_pretrained(here).config == SMALL


def test_a_new_track_slot_changes_nothing_and_can_learn():
    for family, (c, _) in FAMILIES.items():
        with folder() as here:
            save_file(public(family), here / "a.safetensors")
            model = MotionStream.from_pretrained(here / "a.safetensors", track_dim=c.track_dim or 16)
            base = MotionStream(c).eval()
            base.load_state_dict(public(family), strict=False)
        new = model.config
        assert (new.track_dim, new.image_dim) == (c.track_dim or 16, c.image_dim)
        assert new.in_dim == c.in_dim + (0 if c.track_dim else 16)
        picture = rand(1, c.image_dim, 3, 2, 4) if c.image_dim else None
        clip = rand(1, 257, c.clip_dim) if c.clip_dim else None
        x, sigma, text = rand(1, c.out_dim, 3, 2, 4, seed=1), torch.tensor([0.5]), rand(1, 2, 24)
        tracks, visible, ids = new_tracks(9, 4, batch=1)
        scale = torch.tensor([4 * c.stride / SMALL.size[1], 2 * c.stride / SMALL.size[0]])
        features = model.requires_grad_(True).track_head(tracks * scale, visible, ids, 2 * c.stride, 4 * c.stride)
        v = model(x, sigma, text, tracks=features, image=picture, clip=clip)
        expected = base(x, sigma, text, image=picture, clip=clip)
        assert_near(v, expected, 1e-6)
        v.square().sum().backward()
        head, columns = model.track_head.conv.weight, model.patch_embedding.weight
        slot = slice(c.out_dim, c.out_dim + new.track_dim)
        assert head.count_nonzero().item() == (0 if c.track_dim else head.numel()), family
        assert columns[:, slot].count_nonzero().item() == (columns[:, slot].numel() if c.track_dim else 0), family
        learns = head.grad if c.track_dim else columns.grad[:, slot]
        assert learns.abs().max() > 1e-6, family


def test_written_weights_come_back_with_their_config():
    model = new_model(chunk=2, window=None, track_id_mode="random")
    with folder() as here:
        path = here / "a.safetensors"
        for dtype in None, torch.float16:
            save_pretrained(model, path, dtype=dtype, step="600")
            back = MotionStream.from_pretrained(path)
            assert back.config == model.config
            for name, t in model.state_dict().items():
                assert back.state_dict()[name].equal(t if dtype is None else t.half().to(back.state_dict()[name].dtype))
            with safe_open(path, "pt") as file:
                assert file.metadata()["step"] == "600" and set(file.keys()) == set(model.state_dict())
        save_pretrained(MotionStream.from_pretrained(path), path)       # over the file that its tensors are mapped from
        assert MotionStream.from_pretrained(path).config == model.config and os.listdir(here) == ["a.safetensors"]
        before = path.read_bytes()

        def fail(tensors, path, about):
            Path(path).write_text("half")
            raise OSError("disk full")

        with unittest.mock.patch("safetensors.torch.save_file", fail):
            assert_error(OSError, "disk full", save_pretrained, model, path)
        assert path.read_bytes() == before and os.listdir(here) == ["a.safetensors"]


def test_shipped_weights_are_read_as_they_are():
    for name in "tiny", "tiny_teacher":
        path = HERE / f"assets/{name}.safetensors"
        model, tensors = MotionStream.from_pretrained(path), load_file(path)
        assert model.state_dict().keys() == tensors.keys()
        assert all(t.equal(tensors[name].to(t.dtype)) for name, t in model.state_dict().items())
        assert model.config.causal == (name == "tiny") and model.config.track_dim == 32


def test_weights_with_a_mask_get_it_before_the_image():
    latents = rand(2, 16, 4, 2, 3)
    image = image_and_mask(latents)
    assert image.shape == (2, 20, 4, 2, 3) and image[:, 4:].equal(latents)
    assert (image[:, :4, 0] == 1).all() and (image[:, :4, 1:] == 0).all()
    assert FAMILIES["Wan 2.1 I2V, Fun-InP"][0].image_dim == image.shape[1]


def test_every_file_opens_as_the_vae_it_holds_or_is_refused_in_one_line():
    with folder() as here, torch.no_grad():
        narrow, tiny = randomised(WanVAE(WanVAEConfig(16, 4, 6))), new_vae()
        for dtype in torch.float16, torch.bfloat16, torch.float32:
            tensors = {name: t.to(dtype) for name, t in narrow.state_dict().items()}
            save_file(tensors, here / "narrow.safetensors")
            torch.save(tensors, here / "narrow.pth")
            for path in here / "narrow.safetensors", here / "narrow.pth":
                vae = load_vae(path)
                assert type(vae) is WanVAE and vae.config == narrow.config and not vae.training
                assert all(p.equal(tensors[name].float()) for name, p in vae.state_dict().items())
                assert not any(p.requires_grad for p in vae.parameters())
        own = saved(here / "tiny.safetensors", tiny)
        save_file(new_vae(TAEW22).state_dict(), here / "taew2_2.safetensors")
        assert load_vae(own).metadata() == tiny.metadata()
        assert load_vae(here / "taew2_2.safetensors").config == TAEW22
        assert_error(ValueError, "narrow.pth: a WanVAE, not a TinyVAE; load_vae", TinyVAE.from_pretrained, path)
        assert_error(ValueError, "tiny.safetensors: a TinyVAE, not a WanVAE; load_vae", WanVAE.from_pretrained, own)

        def refused(name, change):
            tensors = narrow.state_dict()
            change(tensors)
            torch.save(dict(tensors), here / name)
            assert_error(ValueError, name, load_vae, here / name)

        refused("missing.pth", lambda t: t.pop("decoder.middle.1.proj.bias"))
        refused("extra.pth", lambda t: t.update(extra=torch.zeros(3)))
        refused("shape.pth", lambda t: t.update({"encoder.conv1.bias": torch.zeros(3)}))
        refused("first.pth", lambda t: t.pop("encoder.conv1.weight"))
        refused("scalar.pth", lambda t: t.update({"conv2.weight": torch.zeros(())}))
        refused("empty.pth", lambda t: t.clear())
        refused("channels.pth", lambda t: t.update({"conv2.weight": torch.zeros(7, 7, 1, 1, 1)}))
        assert_error(ValueError, here.name, load_vae, here)
        assert_error(ValueError, "nowhere.pth", load_vae, here / "nowhere.pth")
        assert_error(ValueError, "dit.safetensors", load_vae, saved(here / "dit.safetensors", new_model()))


def test_writing_leaves_the_old_file_when_it_fails():
    def fail(path):
        Path(path).write_text("half")
        raise OSError("disk full")

    with folder() as here:
        td.write(here / "a.txt", lambda path: Path(path).write_text("old"))
        assert_error(OSError, "disk full", td.write, here / "a.txt", fail)
        assert (here / "a.txt").read_text() == "old"
