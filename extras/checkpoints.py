"""Weights in every other public layout, as tensors with Wan's names; and what a file is that is none.

    read(path) -> (tensors, metadata)    a .pt of Wan, Self-Forcing or CausVid, Diffusers' names of DiT and VAE, names
                                         that training code has wrapped, folders of repositories
    what_it_is(tensors), damage(path)    for the one line that a user gets
    advice(config, sampler)              how public weights, whose files do not say it, are sampled

motionstream.py reads safetensors with Wan's names by itself, and asks this module about all else."""

import json
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from motionstream import PRESETS, UserError, read_safetensors, schedule, shards_of

# What training code wraps around names, anywhere in them; and what checkpoints and Diffusers put in front.
WRAPPERS = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
PREFIXES = rf"^(model\.|diffusion_model\.|module\.|condition_embedder\.|{WRAPPERS})+|{WRAPPERS}"

# The parts of a DiT's names that Diffusers spells in its own way, and Wan's spelling. norm2 is no slip: Diffusers
# numbers the norms of a block in the order of use, Wan does not.
DIT_NAMES = {
    "text_embedder.linear_1": "text_embedding.0",
    "text_embedder.linear_2": "text_embedding.2",
    "time_embedder.linear_1": "time_embedding.0",
    "time_embedder.linear_2": "time_embedding.2",
    "time_proj": "time_projection.1",
    "scale_shift_table": "modulation",
    "proj_out": "head.head",
    "image_embedder.norm1": "img_emb.proj.0",
    "image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "image_embedder.ff.net.2": "img_emb.proj.3",
    "image_embedder.norm2": "img_emb.proj.4",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
DIT_PARTS = "(" + "|".join(map(re.escape, DIT_NAMES)) + r")(?![^.])"
UNUSED = "norm_added_q.weight"      # in Diffusers' image-to-video files: zeros, never used

# The same of a VAE's names, replaced in this order.
VAE_NAMES = {
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
    "post_quant_conv.": "conv2.",
    "quant_conv.": "conv1.",
    ".conv_in.": ".conv1.",
    ".norm_out.": ".head.0.",
    ".conv_out.": ".head.2.",
    "mid_block.resnets.0.": "middle.0.",
    "mid_block.attentions.0.": "middle.1.",
    "mid_block.resnets.1.": "middle.2.",
    "_blocks.": "samples.",
    ".upsamplers.0.": ".resnets.3.",
    ".upsampler.": ".resnets.3.",
    ".downsampler.": ".resnets.2.",
}

# How the students of Self-Forcing are sampled: they remember all of 21 latents, so there is no sink.
SELF_FORCING = {"causal": True, "shift": 5.0, "sigmas": schedule(4, 5.0), "chunk": 3, "sink": 0, "window": None}

# Teachers: shift and text guidance, by width and by whether the image enters as channels, as their publishers advise
# for 480 lines; those of all others.
TEACHERS = {(1536, False): (8.0, 6.0), (1536, True): (3.0, 6.0), (5120, True): (3.0, 5.0)}
OTHERS = (5.0, 5.0)

# What is taken for the right file: by how it begins, or by the names in it; the first that fits.
KINDS = {
    "^version https://git-lfs": "a git-lfs pointer, run git lfs pull",
    "^<": "a web page",
    "^$": "an empty file",
    "^PK": "a truncated .pt",
    "^GGUF": "a GGUF file",
    "^\x80": "a pickle of something else than tensors, refused",
    "lora": "a LoRA",
    "visual|vision": "a CLIP encoder",
    "patch_embedding": "a DiT",
    "token_embedding|shared|encoder.block": "a text encoder",
    "coder.": "a VAE",
}


# ----------------------------------------------------------------------------------------------------------------------
# Reading.

def read(path):
    """A file, one of several shards, their index or a repository's folder to ({Wan's name: tensor}, metadata).

    Tensors are mapped where the file allows it, and no pickle's code is ever run. Of a student of Self-Forcing,
    metadata["motionstream.config"] tells as JSON how it is sampled. UserError, one line that names the file and says
    what it is."""
    path = Path(path)
    if path.is_dir():
        path = file_in(path)
    tensors = {}
    metadata = {}
    for file in shards_of(path):
        found, about = read_tensors(file)
        metadata |= about
        for name, tensor in with_wan_names(found):
            if name in tensors:
                raise UserError(f"{file}: holds {name} twice, under two names")
            tensors[name] = tensor
    return tensors, metadata


def file_in(folder):
    """The weights file in a repository's folder, or its index of shards or first shard. UserError if there is none, or
    if there are several."""
    for high, low in ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"):
        if (folder / high).is_dir() and (folder / low).is_dir():
            raise UserError(f"{folder}: holds the two experts of Wan 2.2 A14B, name one: "
                            f"{folder / high} (high noise) or {folder / low} (low noise)")
    if (folder / "transformer").is_dir():
        return file_in(folder / "transformer")
    for pattern in "*.index*.json", "diffusion_pytorch_model*.safetensors", "*.safetensors", "*.pt", "*.pth":
        names = {re.sub(r"-\d{5}-of-", "-00001-of-", file.name) for file in folder.glob(pattern)}
        if len(names) == 1:
            return folder / names.pop()
        if names:
            raise UserError(f"{folder}: holds several weights files, name one: {', '.join(sorted(names)[:5])}")
    raise UserError(f"{folder}: holds no weights file (.safetensors, .pt)")


def read_tensors(path):
    """One .safetensors or .pt file to ({name: tensor}, metadata), the names as they are in it; see read."""
    try:
        with open(path, "rb") as file:
            start = file.read(2 ** 20)
        if start[8:9] == b"{":
            return read_safetensors(path)
        return read_pickle(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception:                   # torch, zipfile, pickle and safetensors raise a dozen kinds
        raise UserError(f"{path}: {damage(path, start)}") from None


def read_pickle(path):
    """A .pt or .pth file; of a checkpoint of Self-Forcing the generator, best its running average."""
    with warnings.catch_warnings(action="ignore"):          # of files that are refused anyway
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    metadata = {}
    for key in "generator_ema", "generator", "model":
        if key in tensors:
            tensors = tensors[key]
            if key != "model":
                metadata["motionstream.config"] = json.dumps(SELF_FORCING)
            break
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError("no tensors by name")
    return tensors, metadata


# ----------------------------------------------------------------------------------------------------------------------
# Names.

def with_wan_names(tensors):
    """Pairs of Wan's name and tensor, whatever the file calls them."""
    name_of = wan_dit_name
    if "quant_conv.weight" in tensors:                      # Diffusers' VAE; Wan's own has no other names
        name_of = wan21_vae_name
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
            name_of = wan22_vae_name
    return [(name_of(name), tensor) for name, tensor in tensors.items() if not name.endswith(UNUSED)]


def wan_dit_name(name):
    """Wan's name of a tensor of a DiT, without what was wrapped around it. Names of other models stay as they are."""
    name = re.sub(PREFIXES, "", name)
    name = re.sub(DIT_PARTS, lambda part: DIT_NAMES[part[0]], name)
    if name == "modulation":
        return "head.modulation"
    return name


def vae_parts(name):
    """VAE_NAMES replaced in a name."""
    for theirs, wans in VAE_NAMES.items():
        name = name.replace(theirs, wans)
    return name


def wan21_vae_name(name):
    """Wan's name of a tensor of Diffusers' VAE of Wan 2.1: one list of layers, where Diffusers has stages of four."""
    return re.sub(r"(\d)\.resnets\.(\d)", lambda m: str(4 * int(m[1]) + int(m[2])), vae_parts(name))


def wan22_vae_name(name):
    """The same of Wan 2.2: lists within a list."""
    return re.sub(r"(up|down)(samples\.\d)\.resnets", r"\1\2.\1samples", vae_parts(name))


# ----------------------------------------------------------------------------------------------------------------------
# What a file is, and how weights are sampled.

def what_it_is(names):
    """What has tensors of these names, or begins like this, in words."""
    text = " ".join(names)
    for pattern, kind in KINDS.items():
        if re.search(pattern, text):
            return kind
    return "something unknown"


def damage(path, start):
    """Why a file that begins like this cannot be read, in words."""
    size = Path(path).stat().st_size
    if start[8:9] == b"{":
        header = 8 + int.from_bytes(start[:8], "little")
        ends = re.findall(rb'"data_offsets"\W+\d+\W+(\d+)', start)
        whole = header + max(map(int, ends), default=0)
        if size < whole and len(start) < header:            # the offsets of later tensors are not in `start`
            return f"truncated: {size} bytes of at least {whole}; download it again"
        if size < whole:
            return f"truncated: {size} bytes of {whole}; download it again"
    if zipfile.is_zipfile(path):
        start = b"\x80"                                     # a whole .pt, so it is what is in it
    kind = what_it_is([start[:99].decode("latin-1").lstrip()])
    return f"this is {kind} ({size} bytes); .safetensors or .pt is wanted here"


def advice(config, sampler):
    """How public weights are sampled by "teacher" or "stream": (config, [what is to be noted about it, in words])."""
    if sampler == "stream":
        config = replace(config, **SELF_FORCING)
        notes = ["does not say how it is sampled: stream, as Self-Forcing"]
    else:
        shift, w_text = TEACHERS.get((config.dim, config.image_dim > 0), OTHERS)
        config = replace(config, causal=False, shift=shift, guidance=(w_text, 0.0))
        notes = [f"does not say how it is sampled: teacher, shift {shift:g}, text guidance {w_text:g}"]
    if config.image_dim == 0 and config.out_dim != PRESETS["wan2.2-5b"].out_dim:
        notes.append("never learned to take an image; it enters as a clean first latent, at sigma 0")
    return config, notes
