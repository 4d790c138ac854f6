"""What the tests share: small models with random parameters, a user's folder, catching output."""

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import signal
import sys
import tempfile
import unittest
import unittest.mock
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

# Threads that wait awake slow each other down on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import save_file

import motionstream
import sample
from extras import refusals
from motionstream import PRESETS, MotionStream
from vae import LinearVAE, LinearVAEConfig, TinyVAE, TinyVAEConfig, WanVAEConfig

HERE = Path(__file__).resolve().parents[1]

# Head dimension 20: RoPE splits it 8 / 6 / 6, unequal as in Wan's 44 / 42 / 42.
SMALL = replace(
    PRESETS["tiny"], dim=40, ffn_dim=80, num_heads=2, num_layers=2, in_dim=12, out_dim=4,
    track_dim=8, text_dim=12, text_len=5, size=(32, 48), causal=True, track_id_mode="same",
    copies=False, guidance=(1.0, 1.5))
# As SMALL, but one that copies along tracks: latents, copies, tracks, image.
COPYING = replace(
    SMALL, track_id_mode="random", copies=True, in_dim=4 + 8 + 10 + 4,
    latent_std=(0.5, 1.0, 1.5, 0.7))
SMALL_VAE = TinyVAEConfig(
    latent_channels=4,
    patch=4,
    pad="front",
    stem=8,
    encoder=((12, 1, 4, 2),),
    decoder=((12, 2, 4, 2), (8, 1, 1, 1)),
    tail=8)
TAEW21 = TinyVAEConfig()
TAEW22 = TinyVAEConfig(latent_channels=48, patch=2)


def slow(test):
    """Only run with --slow. SkipTest is what pytest understands too."""
    @functools.wraps(test)
    def maybe():
        if "--slow" not in sys.argv:
            raise unittest.SkipTest("slow, run with --slow")
        test()
    return maybe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def rand_like(x, seed=0):
    return torch.randn(x.shape, dtype=x.dtype, generator=seeded(seed))


def randomised(module, seed=0):
    """Every parameter at random, in eval mode."""
    rng = seeded(seed)
    for name, p in module.named_parameters():
        scale = 0.3
        if p.ndim > 1 and "modulation" not in name:             # a matrix
            scale = p[0].numel() ** -0.5
        p.data = scale * torch.randn(p.shape, generator=rng)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return module.eval().requires_grad_(False)


def new_model(seed=0, **overrides):
    config = replace(SMALL, **overrides)
    return randomised(motionstream.new_model(config), seed)


def new_vae(config=SMALL_VAE):
    return randomised(TinyVAE(config))


def linear_vae(channels=4):
    return randomised(LinearVAE(LinearVAEConfig(channels)))


# What is trained on drawn scenes in the tests: of 32 pixels per side.
DRAWN = replace(
    SMALL, causal=False, size=(32, 32), text_dim=64, in_dim=32, out_dim=16, track_dim=16)


def small_scenes():
    """The tiny model is DRAWN in here."""
    return unittest.mock.patch.dict(PRESETS, tiny=DRAWN)


def clip_of(frames, c=SMALL, seed=1):
    """Noise, conditions and first latent of two clips."""
    height, width = c.size
    h = height // c.stride
    w = width // c.stride
    text = rand(2, 3, c.text_dim, seed=seed)
    tracks = rand(2, c.track_dim, frames, h, w, seed=seed + 1)
    noise = rand(2, c.out_dim, frames, h, w, seed=seed + 2)
    first = rand(2, c.out_dim, 1, h, w, seed=seed + 3)
    return noise, {"text": text, "tracks": tracks}, first


def part_of(given, now):
    """The conditions of some latent frames: text as it is, tracks of the slice `now`."""
    return {"text": given["text"], "tracks": given["tracks"][:, :, now]}


def all_equal(a, b):
    """Whether two lists of tensors are the same to the bit."""
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def assert_near(a, b, tolerance):
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    error = (a - b).abs().max() / b.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}, at most {tolerance:.0e}"


def assert_error(kind, text, call, *args, **kwargs):
    """call(…) raises `kind` and one line that holds `text`."""
    try:
        call(*args, **kwargs)
    except kind as e:
        said = f"{e}\n"
        assert text in said and "\n" not in said.strip(), f"no line with {text!r}: {e}"
    else:
        raise AssertionError(f"nothing was raised; expected {kind.__name__} with {text!r}")


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@contextlib.contextmanager
def quiet():
    """Catch what is printed, and put the signal handlers back."""
    interrupt = signal.getsignal(signal.SIGINT)
    terminate = signal.getsignal(signal.SIGTERM)
    out = io.StringIO()
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def new_tracks(frames, count, batch=2):
    """Tracks on 48 x 32 pixels, some of which leave the picture, with pauses, and IDs."""
    size = torch.tensor([48, 32])
    tracks = size * (0.5 + 0.4 * rand(batch, frames, count, 2))
    visible = rand(batch, frames, count, seed=1) > -0.8
    ids = torch.randint(0, 2 ** 32, (batch, count), generator=seeded())
    return tracks, visible, ids


def saved(path, model, change=None, dtype=None, **meta):
    """Write the model's weights; `change` edits the dict of tensors, `meta` the metadata."""
    tensors = {}
    for name, t in model.state_dict().items():
        tensors[name] = t.to(dtype or t.dtype).contiguous()
    if change:
        change(tensors)
    if isinstance(model, TinyVAE):
        own = model.metadata()
    else:
        own = {"format": "motionstream", "config": json.dumps(asdict(model.config))}
    save_file(tensors, path, own | meta)
    return path


# Public weights. Small models with Wan's heads of 128 channels, whose RoPE splits 44 / 42 / 42.
WAN = replace(PRESETS["wan2.1-1.3b"], dim=256, ffn_dim=320, num_heads=2, num_layers=2, text_dim=24)
WAN_5B = replace(
    WAN, in_dim=48, out_dim=48, first_chunk=1, stride=16, size=(704, 1280), fps=24)
FAMILIES = {                # and what they want of the image: nothing, its latent, a mask before it
    "Wan 2.1 T2V":
        (WAN, "nothing"),
    "Wan 2.1 I2V, Fun-InP":
        (replace(WAN, in_dim=36, clip_dim=40, clean_first=False), "mask"),
    "Wan 2.1 Fun-Control":
        (replace(WAN, in_dim=48, track_dim=16, clip_dim=40, clean_first=False), "latent"),
    "Wan 2.2 I2V A14B, one expert":
        (replace(WAN, in_dim=36, clean_first=False), "mask"),
    "Wan 2.2 Fun-Control A14B, one expert":
        (replace(WAN, in_dim=52, track_dim=16, clean_first=False), "mask"),
    "Wan 2.2 TI2V 5B":
        (WAN_5B, "nothing"),
    "Wan 2.2 Fun-Control 5B":
        (replace(WAN_5B, in_dim=148, track_dim=48), "mask"),
}


@functools.cache
def public(family="Wan 2.1 T2V"):
    """{name: random tensor} in Wan's layout, of sizes at which float32 agrees to the last digit."""
    config, _ = FAMILIES[family]
    rng = seeded()
    tensors = without_head(MotionStream(config))
    for name, t in tensors.items():
        scale = 0.02
        if "modulation" in name:
            scale = t.shape[-1] ** -0.5
        elif t.ndim > 1:
            scale = t[0].numel() ** -0.5
        tensors[name] = scale * torch.randn(t.shape, generator=rng)
        if t.ndim == 1 and name.endswith("weight"):             # of a norm
            tensors[name] = 1 + 5 * tensors[name]
    return tensors


def without_head(model):
    """The model's tensors by name but for the track head's, as public weights have them."""
    tensors = {}
    for name, t in model.state_dict().items():
        if not name.startswith("track_head"):
            tensors[name] = t
    return tensors


def in_diffusers_layout(tensors):
    """The same tensors under the names of Diffusers' WanTransformer3DModel."""
    return {diffusers_name(name): t for name, t in tensors.items()}


OF_MODEL = {                # beginnings of Wan's names, of modules, and what Diffusers calls them
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
OF_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
OF_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}


def diffusers_name(name):
    """What Diffusers calls a tensor of Wan's."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    end = name[len(module):]
    in_block = re.fullmatch(r"(blocks\.\d+\.)(.+)", module)
    if not in_block:
        return OF_MODEL[module] + end
    block, part = in_block.groups()
    if part in OF_BLOCK:
        return block + OF_BLOCK[part] + end
    attention, part = part.split(".")
    return f"{block}{ATTENTIONS[attention]}.{OF_ATTENTION[part]}{end}"


def diffusers_config(c):
    config = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.dim // c.num_heads,
        "in_channels": c.in_dim,
        "out_channels": c.out_dim,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.num_layers,
        "cross_attn_norm": True,
        "eps": c.eps,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": None,
        "added_kv_proj_dim": None,
    }
    if c.clip_dim:
        config |= {"image_dim": c.clip_dim, "added_kv_proj_dim": c.dim}
    return config


def wan_config(c):
    return {
        "_class_name": "WanModel",
        "dim": c.dim,
        "eps": c.eps,
        "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim,
        "in_dim": c.in_dim,
        "num_heads": c.num_heads,
        "num_layers": c.num_layers,
        "out_dim": c.out_dim,
        "text_len": c.text_len,
    }


def write_layout(here, family, layout):
    """Weights as the public repositories have them; returns the folder to load."""
    c, _ = FAMILIES[family]
    tensors = public(family)
    path = here
    config = wan_config(c)
    if layout != "Wan":
        path = here / "transformer"
        path.mkdir()
        config = diffusers_config(c)
        tensors = in_diffusers_layout(tensors)
        if c.clip_dim:                                          # they hold it, nothing reads it
            for i in range(c.num_layers):
                tensors[f"blocks.{i}.attn2.norm_added_q.weight"] = torch.zeros(c.dim)
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return here


def same_tensors(model, tensors):
    """Are the model's parameters, but for the track head's, these?"""
    ours = without_head(model)
    if ours.keys() != tensors.keys():
        return False
    return all(t.equal(tensors[name].to(t.dtype)) for name, t in ours.items())


# The VAE of Wan, small.
WAN21 = WanVAEConfig(16, 8, 8)
WAN22 = WanVAEConfig(48, 8, 12, residual=True)


def wan_video(vae, frames, seed=0):
    video = rand(1, 3, frames, 2 * vae.stride, 3 * vae.stride, seed=seed)
    return video.clamp(-1, 1)


def before_distillation(here):
    """Weights of the stages before it, of a small model for small_scenes."""
    saved(here / "vae.safetensors", new_vae(replace(SMALL_VAE, latent_channels=16)))
    saved(here / "teacher.safetensors", randomised(MotionStream(DRAWN)))
    causal = replace(DRAWN, causal=True)
    saved(here / "causal.safetensors", randomised(MotionStream(causal)))


def same(a, b):
    return all(p.equal(b[name]) for name, p in a.items())


class Perceptual(nn.Module):
    """Stands for lpips.LPIPS: the mean square of the difference, plus one, as (B, 1, 1, 1)."""

    def __init__(self, net, verbose):
        assert net in ("alex", "vgg") and not verbose
        super().__init__()

    def forward(self, a, b):
        return 1 + (a - b).square().mean((1, 2, 3), keepdim=True)


@contextlib.contextmanager
def having_lpips(module):
    """`import lpips` gives this in here; None: there is no such package. (patch.dict would forget
    all modules that are imported inside.)"""
    before = sys.modules.get("lpips")
    sys.modules["lpips"] = module
    try:
        yield
    finally:
        sys.modules["lpips"] = before
        if before is None:
            del sys.modules["lpips"]


def with_transformers(test):
    """The test, which skips where that package or ftfy is missing."""
    @functools.wraps(test)
    def run():
        for name in "ftfy", "tokenizers", "transformers":
            if not importlib.util.find_spec(name):
                raise unittest.SkipTest(f"{name.upper()} IS NOT INSTALLED, nothing was encoded")
        import transformers
        transformers.utils.logging.disable_progress_bar()
        test()
    return run


def small_encoders(here, width=64):
    """Small, random encoders as the files of a -Diffusers repository; returns (UMT5, CLIP)."""
    import transformers
    small_tokenizer().save_pretrained(here / "tokenizer")
    config = transformers.UMT5Config(
        vocab_size=100, d_model=width, d_kv=16, d_ff=160, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0)
    umt5 = randomised(transformers.UMT5EncoderModel(config)).bfloat16()
    umt5.save_pretrained(here / "text_encoder")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=224, patch_size=14)
    clip = randomised(transformers.CLIPVisionModel(config))
    clip.save_pretrained(here / "image_encoder")
    return umt5, clip


def small_tokenizer():
    """Knows ten words, split at white space."""
    import tokenizers
    import transformers
    words = "<pad> </s> <unk> a small red cat & dog runs".split()
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def ramp_video(blue, frames):
    """The bytes of a video of 64x48 pixels."""
    ramp = np.mgrid[:frames, :48, :64].sum(0)[..., None]
    video = ramp * [2, 3, 1 + blue] % 256                       # (T, 48, 64, 3)
    with folder() as here:
        path = here / "x.mp4"
        imageio.mimwrite(path, video.astype(np.uint8), fps=16, macro_block_size=2)
        return path.read_bytes()


def own_clips(here, names=("a", "sub/b", "c"), frames=45):
    """A folder of clips as users have it: videos of 64x48 pixels, tracks, some hidden, texts."""
    for i, name in enumerate(names):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.mp4").write_bytes(ramp_video(i % 3, frames))
        tracks = rand(frames, 4 + i, 2, seed=i).numpy() * 6 + (32, 20)
        tracks[:, 0] = (10, 1)                                      # is cropped away
        visible = rand(frames, 4 + i, seed=i).numpy() > 0
        np.savez(f"{path}.npz", tracks=tracks.astype(np.float32), visibility=visible)
        Path(f"{path}.txt").write_text("fading light")
    return here


def own_flags(here, data, *more):
    """Flags of a training of small models on the clips in `data`."""
    start = saved(here / "start.safetensors", new_model(causal=False))
    vae = saved(here / "encoder.safetensors", new_vae())
    out = here / "runs/out"
    flags = ["--smoke", "--data", data, "--weights", start, "--vae", vae, "--out", out]
    flags.extend(more)
    return [str(flag) for flag in flags]


def sampled(*argv):
    """Exit code, stdout and stderr of sample.py, run in this process."""
    with quiet() as (out, err):
        code = sample.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


@functools.cache
def workplace():
    """A folder with small random models, an image and tracks, kept until the process ends."""
    here = tempfile.TemporaryDirectory()
    path = Path(here.name)
    saved(path / "student.safetensors", new_model(), dtype=torch.float16)
    saved(path / "teacher.safetensors", new_model(causal=False, steps=2), dtype=torch.float16)
    saved(path / "vae.safetensors", new_vae(), dtype=torch.float16)
    pixels = rand(40, 48, 3).numpy() * 60 + 128
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(path / "image.png")
    t = np.linspace(0, 1, 14)[:, None]
    x = 8 + 30 * t + [0, 3, 6]
    y = 20 + 10 * t + [0, 2, 4]
    tracks = np.stack([x, y], -1)                               # (14, 3, 2)
    np.save(path / "tracks.npy", tracks.astype(np.float32))
    return here, path


def command(*more):
    """The flags of a good call, then more."""
    _, here = workplace()
    good = {
        "--image": here / "image.png",
        "--tracks": here / "tracks.npy",
        "--weights": here / "student.safetensors",
        "--vae": here / "vae.safetensors",
        "--out": here / "out.mp4",
    }
    return flat(good) + list(more)


def flat(flags):
    """{flag: value} as the words of a command line."""
    words = []
    for flag, value in flags.items():
        words += [flag, value]
    return words


# Of Wan's kind: reads text of 4096 channels.
STUB = replace(PRESETS["wan2.1-1.3b"], dim=128, ffn_dim=64, num_heads=1, num_layers=1)
STUB_VAE = TinyVAEConfig(
    latent_channels=16,
    patch=2,
    pad="front",
    stem=4,
    encoder=((4, 1, 2, 2), (4, 1, 2, 2)),
    decoder=((4, 1, 2, 2), (4, 1, 2, 2)),
    tail=4)


@functools.cache
def wan_workplace():
    """A folder as users of Wan have it: weights that do not say how they are sampled, their VAE,
    and what encoders made."""
    here = tempfile.TemporaryDirectory()
    path = Path(here.name)

    def weights(name, **fields):
        model = randomised(MotionStream(replace(STUB, **fields)))
        tensors = without_head(model)
        save_file(tensors, path / f"{name}.safetensors")
        return {f"model.{name}": t for name, t in tensors.items()}

    def no_head(tensors):
        tensors["track_head.conv.weight"].zero_()

    torch.save({"generator_ema": weights("t2v")}, path / "self_forcing.pt")
    weights("i2v", in_dim=36)
    weights("fun", in_dim=48, track_dim=16)
    weights("clip", in_dim=48, track_dim=16, clip_dim=32)
    headed = replace(STUB, in_dim=48, track_dim=16, size=(32, 48), clean_first=False)
    saved(path / "headed.safetensors", randomised(MotionStream(headed)))
    saved(path / "headless.safetensors", new_model(causal=False), no_head)
    saved(path / "vae.safetensors", new_vae(STUB_VAE))
    negative = rand(9, 4096, seed=1).bfloat16()
    rows = {"prompt": rand(7, 4096), "negative": negative, "clip": rand(257, 32)}
    save_file({"any": rows["prompt"]}, path / "prompt.safetensors")
    save_file(rows, path / "encoded.safetensors")
    return here, path


def settled(weights, *more, frames=81):
    """The Job that sample.py makes of the flags and the weights, and checks."""
    words = ["--image", "x.png", "--frames", frames] + list(more)
    given = sample.parse_flags([str(word) for word in words])
    weights = sample.inspect(wan_workplace()[1] / weights)
    tracks = sample.no_tracks(81)
    if given.tracks:                        # a file that nobody reads
        points = np.zeros((81, 1, 2), np.float32)
        tracks = sample.Tracks(points, points[..., 0] == 0)
    job = sample.resolve(given, weights, tracks)
    refusals.check_job(given, job, tracks, sample.WAN_FRAMES)
    return job


def shards(here, tensors, count=3):
    """Write tensors in shards with an index, as Hugging Face does."""
    names, place = sorted(tensors), {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::count]}, here / file)
        place |= {name: file for name in names[i::count]}
    index = here / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return index


@contextlib.contextmanager
def small_pictures():
    """Public weights make pictures of 48x32 pixels in here."""
    inspect = sample.inspect

    def smaller(path):
        weights = inspect(path)
        if weights.own:
            return weights
        config = replace(weights.config, size=(32, 48))
        return replace(weights, config=config)

    with unittest.mock.patch.object(sample, "inspect", smaller):
        yield


def wan_sampled(weights, *more):
    """Exit code, stdout and stderr of sample.py with public weights, and each call of the DiT."""
    _, here = wan_workplace()
    calls = []
    forward = MotionStream.forward

    def record(model, x, sigma, text=None, **given):
        calls.append(SimpleNamespace(x=x, sigma=sigma, text=text, **given))
        return forward(model, x, sigma, text, **given)

    flags = {
        "--image": workplace()[1] / "image.png",
        "--weights": here / weights,
        "--vae": here / "vae.safetensors",
        "--out": here / "out.mp4",
    }
    (here / "out.mp4").unlink(missing_ok=True)
    words = flat(flags) + list(more)
    with small_pictures(), unittest.mock.patch.object(MotionStream, "forward", record):
        code, out, err = sampled(*words)
    return code, out, err, calls


def recipe(page, word):
    """The block of Python in a page of docs that has the word in it."""
    text = (HERE / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    block, = [code for code in blocks if word in code]
    return block
