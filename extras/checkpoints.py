"""Weights in every other public layout, as tensors with Wan's names; else, what the file is.

    read(path, wanted, marks) -> (tensors, metadata, file)
        a .pt of Wan, Self-Forcing or CausVid; Diffusers' names of DiT and VAE; names that other
        programs have put a prefix before; folders of repositories
    what_it_is(names, wanted), explain(path, start, error)
        for the one line that a user gets
    advice(config, sampler)
        how public weights, whose files do not say it, are sampled

    checked_config(…), check_vae_config(config, path), check_memory(needed, path)
        what config.json beside public weights says, how they take tracks; and whether what a file
        says of itself can be, and fits into memory: nothing is built or allocated before
    taehv_config(tensors, path)
        the config of TAEHV's public files

motionstream.py and vae.py read safetensors with Wan's names by themselves, and ask this module
about all else. Without it they trust what a file says of itself.
"""

import contextlib
import json
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from motionstream import (FRAMES, MASK, PRESETS, WAN_DIT, TrackHead, UserError, as_tuples,
                          public_config, read_safetensors, reason_of, schedule)
from vae import LinearVAEConfig, TinyVAEConfig, WanVAEConfig

# What training code puts into names, anywhere in them.
WRAPPERS = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."

# Of several models in one file, which is taken: the first of these words that one has before its
# names. An average comes before what it is an average of.
PREFERRED = ("generator_ema", "ema_model", "model_ema", "ema", "ema_state_dict", "generator",
             "model", "state_dict", "module", "student")
STUDENTS = {"generator_ema", "generator"}       # what Self-Forcing and CausVid call theirs

# In Diffusers' layouts, what WAN_DIT and the first tensor of a VAE of Wan are called.
DIFFUSERS_MARKS = ("blocks.0.attn1.to_q.weight", "encoder.conv_in.weight")

# What stands beside a model in files that hold several, and is left out.
OTHER_MODELS = (r"(model\.)?diffusion_model\.|vae\.|first_stage_model\.|text_encoders?\.|"
                r"cond_stage_model\.|conditioner\.|image_encoder\.|clip_vision\.|"
                r"critic\.|fake_score\.|real_score\.|discriminator\.")

# The parts of a DiT's names that Diffusers spells in its own way, and Wan's spelling. norm2 is no
# slip: Diffusers numbers the norms of a block in the order of use, Wan does not.
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
DIT_START = "condition_embedder."            # Diffusers puts it before some
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

# The words of Diffusers' config.json, and Wan's; and all that are read.
CONFIG_JSON = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "image_dim": "clip_dim",
}
WAN_WORDS = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim",
             "text_len", "clip_dim", "freq_dim", "patch_size", "eps")

# The fields of Config that follow from the shapes of tensors.
SHAPED = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "track_dim", "text_dim", "clip_dim",
          "freq_dim", "patch_size")

# Limits of the others: type, least, most; for tuples those of each number, then of the length.
LIMITS = {
    "num_heads": (int, 1, 1024),
    "text_len": (int, 1, 2 ** 14),
    "eps": (float, 0, 1),
    "latent_std": (float, 1e-6, 1e6, 0, 2 ** 12),
    "shift": (float, 0.01, 100),
    "sigmas": (float, 1e-6, 1 + 1e-6, 1, 1000),
    "steps": (int, 1, 1000),
    "guidance": (float, 0, 100, 2, 2),
    "chunk": (int, 1, 999),
    "first_chunk": (int, 1, 999),
    "sink": (int, 0, 10 ** 6),
    "window": (int, 0, 10 ** 6),
    "sink_decay": (float, 0, 1),
    "stride": (int, 1, 256),
    "size": (int, 8, 4096, 2, 2),
    "fps": (float, 0.1, 1000),
}
MAY_BE_NONE = ("first_chunk", "window")
CHOICES = {
    "text_encoder": ("umt5", "words"),
    "track_id_mode": ("random", "same"),
    "clean_first": (True, False),
    "causal": (True, False),
    "copies": (True, False),
}

# The same of the configs of VAEs, and of a stage of TinyVAE's.
WIDTH = (int, 1, 2 ** 14)
VAE_LIMITS = {
    LinearVAEConfig: {"latent_channels": WIDTH, "stride": (int, 1, 64), "overlap": (int, 0, 64)},
    TinyVAEConfig: {"latent_channels": WIDTH, "patch": (int, 1, 16), "stem": WIDTH, "tail": WIDTH},
    WanVAEConfig: {"latent_channels": WIDTH, "encoder": WIDTH, "decoder": WIDTH},
}
STAGE = {"width": WIDTH, "blocks": (int, 0, 32), "time": (int, 1, 4), "space": (int, 1, 4)}

# How the students of Self-Forcing are sampled: they remember all of 21 latents, so there is no
# sink.
SELF_FORCING = {"causal": True, "shift": 5.0, "sigmas": schedule(4, 5.0),
                "chunk": 3, "first_chunk": None, "sink": 0, "window": None}

# What only causal classes write into config.json: Self-Forcing and its descendants, FastVideo,
# SGLang.
CAUSAL_WORDS = ("local_attn_size", "num_frame_per_block", "num_frames_per_block")

# Teachers: shift and text guidance, by width and by whether the image enters as channels, as their
# publishers advise for 480 lines; those of all others.
DIM_1B = PRESETS["wan2.1-1.3b"].dim
DIM_14B = PRESETS["wan2.1-14b"].dim
TEACHERS = {(DIM_1B, False): (8.0, 6.0), (DIM_1B, True): (3.0, 6.0), (DIM_14B, True): (3.0, 5.0)}
OTHERS = (5.0, 5.0)

# What is taken for the right file, by the names of its tensors; the first that fits.
KINDS = {
    "lora": "a LoRA",
    "visual|vision": "a CLIP encoder",
    "patch_embedding": "a DiT",
    "token_embedding|shared|encoder.block": "a text encoder",
    "coder.": "a VAE",
}

# And by how it begins.
STARTS = {
    b"version https://git-lfs": "a git-lfs pointer, run git lfs pull",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML page",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
}


# --------------------------------------------------------------------------------------------------
# Reading.

def read(path, wanted="Wan DiT", marks=WAN_DIT):
    """A file, one of several shards, their index or a repository's folder to ({Wan's name: tensor},
    metadata, path of the file or index).

    wanted: what is expected, in words; it has one of the tensors `marks`. Tensors are mapped where
    the file allows it, and no pickle's code is ever run. Of a student of Self-Forcing, metadata
    have "motionstream.student". UserError, one line that names the file and says what it is."""
    path = Path(path)
    if path.is_dir():
        path = file_in(path)
    everything = {}
    metadata = {}
    for file in shards_of(path):
        found, about = read_tensors(file)
        metadata |= about
        everything |= found
    if not everything:
        raise UserError(f"{path}: expected a complete {wanted} checkpoint; it holds no tensors")
    try:
        tensors, prefix = without_prefix(everything, marks)
        tensors = with_wan_names(tensors)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    if tensors.keys().isdisjoint(marks):
        found = what_it_is(everything, wanted)
        raise UserError(f"{path}: expected a complete {wanted} checkpoint; {found}")
    if STUDENTS & words_of(prefix):
        metadata["motionstream.student"] = prefix
    return tensors, metadata, path


def file_in(folder):
    """The weights file in a repository's folder, or its index of shards or first shard. UserError
    if there is none, or if there are several."""
    for high, low in ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"):
        if (folder / high).is_dir() and (folder / low).is_dir():
            raise UserError(f"{folder}: holds the two experts of Wan 2.2 A14B, name one: "
                            f"{folder / high} (high noise) or {folder / low} (low noise)")
    if (folder / "transformer").is_dir():
        return file_in(folder / "transformer")
    for pattern in ("*.index*.json", "diffusion_pytorch_model*.safetensors", "*.safetensors",
                    "*.pt", "*.pth", "*.bin", "*.ckpt"):
        files = [file for file in folder.glob(pattern) if not file.name.startswith(".")]
        names = {re.sub(r"-\d{5}-of-", "-00001-of-", file.name) for file in files}
        if len(names) == 1:
            return folder / names.pop()
        if names:
            some = ", ".join(sorted(names)[:5])
            raise UserError(f"{folder}: holds several weights files, name one: {some}")
    raise UserError(f"{folder}: holds no weights file (.safetensors, .pt)")


def shards_of(file):
    """The files that belong to a file: itself, or all that an index or the number in a shard's name
    tells of. UserError if one of them is missing."""
    shard = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", file.name)
    if file.suffix == ".json":
        names = shards_in_index(file)
    elif shard:                                     # any shard stands for all of them
        start, count, end = shard.groups()
        names = [f"{start}-{i:05}-of-{count}{end}" for i in range(1, int(count) + 1)]
    else:
        return [file]
    files = [file.parent / name for name in names]
    missing = [each.name for each in files if not each.is_file()]
    if missing:
        some = ", ".join(missing[:5])
        raise UserError(f"{file}: {len(missing)} of {len(files)} shards are missing: {some}")
    return files


def shards_in_index(file):
    """The names of the shards that an index tells of, sorted."""
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{file}: expected an index of shards, which has a weight_map")
    for name in places.values():
        is_name = isinstance(name, str) and 0 < len(name) < 256 and name == Path(name).name
        if not is_name:
            raise UserError(f"{file}: {repr(name)[:80]} is not the name of a file beside it")
    return sorted(set(places.values()))


def read_json(path):
    """The object in a JSON file, lists as tuples. UserError naming the file if there is none."""
    try:
        fields = as_tuples(json.loads(path.read_bytes()))       # bytes: UTF-8 or 16
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({reason_of(e)})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: cannot be read as a JSON object; it holds something else")
    return fields


def read_tensors(path):
    """One .safetensors or .pt file to ({name: tensor}, metadata), with its own names; see read."""
    path = Path(path)
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(2 ** 20)
        if start[8:9] == b"{":
            return read_safetensors([path])
        return read_pickle(path)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({reason_of(e)})") from None
    except Exception as e:              # torch, zipfile, pickle and safetensors raise a dozen kinds
        raise UserError(f"{path}: {explain(path, start, e)}") from None


def is_zip(path):
    """Whether a file is a zip archive, as torch.save writes them. (zipfile.is_zipfile raises for
    some damaged ones.)"""
    try:
        return zipfile.is_zipfile(path)
    except Exception:
        return False


def read_pickle(path):
    """A .pt or .pth file to ({name: tensor}, {}). A slash joins the names of dicts within dicts."""
    mapped = is_zip(path)
    if not mapped:                              # an older kind, which cannot be mapped
        check_memory(path.stat().st_size, path)
    with warnings.catch_warnings(action="ignore"):          # of files that are refused anyway
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if torch.is_tensor(content):
        content = {"tensor": content}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected tensors by name; it holds a {type(content).__name__}")
    tensors = flattened(content)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{path}: {name} is {tensor.layout} on {tensor.device}; "
                            "expected plain numbers")
    if not tensors:
        names = ", ".join(str(name)[:40] for name in list(content)[:5])
        raise UserError(f"{path}: expected tensors by name; it holds {len(content)} entries "
                        f"without any: {names}")
    return tensors, {}


def flattened(content):
    """The tensors in a dict and in the dicts within it, {"outer/inner": tensor}, and no more."""
    tensors = {}
    pending = [("", content)]
    seen = set()
    while pending:
        prefix, entries = pending.pop()
        if id(entries) in seen:                             # a damaged file can hold itself
            continue
        seen.add(id(entries))
        for name, value in entries.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, dict):
                pending.append((f"{prefix}{name}/", value))
    return tensors


# --------------------------------------------------------------------------------------------------
# Names.

def without_prefix(tensors, marks):
    """(The tensors of one model, the prefix that their names had): the one that one of `marks` has.
    What wrappers put into names goes too, and so do other models beside it. UserError if two
    tensors would have one name, or if there are several models and nothing tells which one is
    meant."""
    tensors = renamed(tensors, lambda name: re.sub(WRAPPERS, "", name))
    prefixes = set()
    for mark in (*marks, *DIFFUSERS_MARKS):
        if not prefixes:
            ends_so = re.compile(f"(^|[./]){re.escape(mark)}$")
            prefixes = {name.removesuffix(mark) for name in tensors if ends_so.search(name)}
    if not prefixes:
        return tensors, ""
    prefix = best_of(prefixes)
    within = prefix[:prefix.rfind("/") + 1]         # the dict that holds the model, in a .pt
    ours = {}
    for name, tensor in tensors.items():
        beside = len(prefixes) > 1 or re.match(OTHER_MODELS, name.removeprefix(within))
        if name.startswith(prefix) or name.startswith(within) and not beside:
            ours[name] = tensor
    return renamed(ours, lambda name: name.removeprefix(prefix).removeprefix(within)), prefix


def words_of(prefix):
    """The parts of a prefix, a set."""
    return set(re.split("[./]", prefix))


def best_of(prefixes):
    """Of the prefixes of several models the one with the first word of PREFERRED. UserError if none
    has, or two have."""
    if len(prefixes) == 1:
        return next(iter(prefixes))
    for word in PREFERRED:
        having = [prefix for prefix in prefixes if word in words_of(prefix)]
        if len(having) == 1:
            return having[0]
        if having:
            break
    found = ", ".join(map(repr, sorted(prefixes)[:5]))
    raise UserError(f"holds {len(prefixes)} models, whose names begin with {found}; save one of "
                    "them alone")


def renamed(tensors, name_of):
    """{name_of(name): tensor}. UserError if two of them would have one name."""
    new = {}
    for name, tensor in tensors.items():
        name = name_of(name)
        if name in new:
            raise UserError(f"holds {name} twice, under two names")
        new[name] = tensor
    return new


def with_wan_names(tensors):
    """The tensors by Wan's names, whatever the file calls them."""
    name_of = wan_dit_name
    if "quant_conv.weight" in tensors:              # Diffusers' VAE; Wan's has no other names
        name_of = wan21_vae_name
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
            name_of = wan22_vae_name
    used = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
    return renamed(used, name_of)


def wan_dit_name(name):
    """Wan's name of a tensor of a DiT. Names of other models stay as they are."""
    name = name.removeprefix(DIT_START)
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
    """Wan's name of a tensor of Diffusers' VAE of Wan 2.1: one list of layers, where Diffusers has
    stages of four."""
    return re.sub(r"(\d)\.resnets\.(\d)", lambda m: str(4 * int(m[1]) + int(m[2])), vae_parts(name))


def wan22_vae_name(name):
    """The same of Wan 2.2: lists within a list."""
    return re.sub(r"(up|down)(samples\.\d)\.resnets", r"\1\2.\1samples", vae_parts(name))


# --------------------------------------------------------------------------------------------------
# The config of a DiT.

def checked_config(config, overrides, tensors, metadata, file):
    """The Config to build a model of: `config`, of the file's own metadata or, if it has none, of
    its shapes (public_config); then what config.json beside public weights tells; then `overrides`.
    A new slot for tracks is added to `tensors`. UserError, naming the file, if two of these
    contradict each other or no such model can be built."""
    shaped = vars(public_config(tensors, file))
    if metadata.get("format") == "motionstream":
        source = "its metadata"
        said = vars(config)
    else:
        source = file.with_name("config.json")
        said = config_beside(source, metadata)
        config = control_as_tracks(tensors, config, file)
    for name in SHAPED:
        more_outputs = name == "out_dim" and config.copies  # of the head, see CopyingMotionStream
        no_head = name == "track_dim" and not shaped[name]  # is found when tensors are compared
        if name not in said or more_outputs or no_head:
            continue
        if repr(said[name]) != repr(shaped[name]):
            raise UserError(f"{file}: {name} is {shaped[name]} by its tensors, but "
                            f"{repr(said[name])[:80]} in {source}")
    config = replace(config, **said)
    check_config(config, file)
    slot = overrides.get("track_dim", config.track_dim)
    if slot != config.track_dim:
        config = add_track_slot(tensors, config, slot, file)
    config = replace(config, **overrides)
    check_config(config, file)
    return config


def refuse(file, name, value, expected):
    """UserError for a field of a config."""
    raise UserError(f"{file}: {name} is {repr(value)[:80]} in its config; expected {expected}")


def in_limits(value, kind, least, most):
    """Whether value is a number of that kind, int or float, in [least, most]: no bool, no NaN."""
    kinds = (int,) if kind is int else (int, float)
    return type(value) in kinds and least <= value <= most


def check_limits(fields, limits, file):
    """UserError, naming the file, for the first field outside its limits."""
    for name, (kind, least, most, *count) in limits.items():
        value = fields[name]
        expected = f"{kind.__name__} from {least} to {most}"
        numbers = [value]
        right = True
        if count:
            fewest, longest = count
            expected = f"{fewest} to {longest} of {expected}"
            right = type(value) is tuple and fewest <= len(value) <= longest
            numbers = value if right else []
        if not right or not all(in_limits(number, kind, least, most) for number in numbers):
            refuse(file, name, value, expected)


def check_config(c, file):
    """UserError, naming the file, if no model can be built from this Config."""
    optional = [name for name in MAY_BE_NONE if getattr(c, name) is None]
    limits = {name: limit for name, limit in LIMITS.items() if name not in optional}
    check_limits(vars(c), limits, file)
    for name, choices in CHOICES.items():
        if repr(getattr(c, name)) not in map(repr, choices):            # 1 is not True
            refuse(file, name, getattr(c, name), f"one of {', '.join(map(str, choices))}")
    height, width = c.size
    frames, p, q = c.patch_size
    cell = (c.stride * p, c.stride * q)         # pixels per token
    falling = all(a > b for a, b in zip(c.sigmas, c.sigmas[1:]))
    stds = len(c.latent_std)
    even = c.sink != 1 or c.first_chunk_size == c.chunk    # EMA-Sink averages into the sink's last
    rules = {           # field: (valid, expected)
        "prompt": (isinstance(c.prompt, str | None), "a text"),
        "num_heads": (c.dim % (2 * c.num_heads) == 0,
                      f"a divisor of {c.dim // 2}, give num_heads=…"),
        "patch_size": (frames == 1, "one latent frame in a patch"),
        "freq_dim": (c.freq_dim % 2 == 0, "an even number"),
        "in_dim": (c.image_dim >= 0, f"at least {c.in_dim - c.image_dim}"),
        "copies": (not c.copies or c.image_dim == c.out_dim, "room for the image in in_dim"),
        "latent_std": (stds == c.out_dim or stds == 0 and not c.copies, f"{c.out_dim} numbers"),
        "sigmas": (falling, "falling ones"),
        "sink_decay": (c.sink_decay == 1 or even, "1: the first chunk has another size"),
        "size": (height % cell[0] == width % cell[1] == 0, f"multiples of {cell}"),
    }
    for name, (right, expected) in rules.items():
        if not right:
            refuse(file, name, getattr(c, name), expected)


def config_beside(path, metadata):
    """What config.json beside public weights says, if it is there, as fields of Config; of a causal
    student also how it streams. metadata: of `read`."""
    said = {}
    if path.is_file():
        said = {name: value for name, value in read_json(path).items() if value is not None}
    for theirs, ours in CONFIG_JSON.items():
        if theirs in said:
            said.setdefault(ours, said[theirs])             # Wan's words win over Diffusers'
    fields = {name: said[name] for name in WAN_WORDS if name in said}
    if "motionstream.student" in metadata or says_causal(said, path):
        fields |= student_of(said, path)
    return fields


def says_causal(said, path):
    """Whether weights are of a causal class: by config.json (CausalWanTransformer3DModel,
    CausalWanModel, …) or by model_index.json of the -Diffusers repository that they are in
    (WanCausalDMDPipeline, CausalForcingPipeline)."""
    classes = [said.get("_class_name")]
    index = path.parent.parent / "model_index.json"
    if path.parent.name.startswith("transformer") and index.is_file():
        repository = read_json(index)
        classes += [repository.get("_class_name"), repository.get(path.parent.name)]
    if re.search("causal|forcing", str(classes), re.IGNORECASE):
        return True
    return any(word in said for word in CAUSAL_WORDS)


def student_of(said, path):
    """The fields of Config of a causal student: as Self-Forcing's, with the memory that config.json
    tells, which counts latent frames and in its window the sink and the new chunk too. UserError if
    it is not whole numbers."""
    fields = dict(SELF_FORCING)
    chunk = said.get("num_frames_per_block", said.get("num_frame_per_block", fields["chunk"]))
    sink = said.get("sink_size", 0)
    window = said.get("local_attn_size", -1)
    if window == -1:
        window = said.get("sliding_window_num_frames", -1)
    limits = {"chunk": LIMITS["chunk"], "sink_size": LIMITS["sink"],
              "local_attn_size": (int, -1, 10 ** 6)}
    check_limits({"chunk": chunk, "sink_size": sink, "local_attn_size": window}, limits, path)
    fields["chunk"] = chunk
    fields["sink"] = math.ceil(sink / chunk)
    if window > 0:
        fields["window"] = max((window - sink) // chunk - 1, 0)
    return fields


# --------------------------------------------------------------------------------------------------
# Slots for tracks.

def control_as_tracks(tensors, config, file):
    """The config of public weights; if they have a control slot (Fun-Control), it becomes that of
    the tracks. Its columns are trained, so it gets a head of zeros in `tensors`, which changes
    nothing yet.

    Beside the noisy latents there are control and image, or control, mask and image. The latter,
    148 channels for the 5B model, is inferred from how its pipeline joins them, not seen in a file.
    UserError for other widths."""
    out = config.out_dim
    if config.track_dim or config.image_dim in (0, MASK + out):
        return config
    if config.in_dim - out not in (out + out, out + MASK + out):
        raise UserError(f"{file}: no Wan DiT known here has {config.in_dim} input channels for "
                        f"{out} output channels")
    weight = TrackHead(out_channels=out).conv.weight
    tensors["track_head.conv.weight"] = torch.zeros_like(weight)
    return replace(config, track_dim=out)


def add_track_slot(tensors, config, track_dim, file):
    """The config with a slot for tracks, and in `tensors` what belongs to it, which changes nothing
    yet: zero columns and a random head. (Zeros in both would let neither learn.)"""
    if config.track_dim:
        raise UserError(f"{file}: its track slot has {config.track_dim} channels, "
                        f"track_dim={track_dim} does not fit")
    tensors["track_head.conv.weight"] = TrackHead(out_channels=track_dim).conv.weight.detach()
    weight = tensors["patch_embedding.weight"]                      # (D, in_dim, 1, 2, 2)
    noisy, image = weight.split([config.out_dim, config.image_dim], 1)
    new = torch.zeros_like(weight[:, :1]).repeat(1, track_dim, 1, 1, 1)
    tensors["patch_embedding.weight"] = torch.cat([noisy, new, image], 1)
    return replace(config, in_dim=config.in_dim + track_dim, track_dim=track_dim)


# --------------------------------------------------------------------------------------------------
# The config of a VAE.

def check_vae_config(config, path):
    """UserError, naming the file, if no VAE can be built from the config."""
    check_limits(vars(config), VAE_LIMITS[type(config)], path)
    if isinstance(config, LinearVAEConfig) and config.overlap > config.stride:
        refuse(path, "overlap", config.overlap, f"at most the stride, {config.stride}")
    if not isinstance(config, TinyVAEConfig):
        return
    if config.pad not in ("end", "front"):
        refuse(path, "pad", config.pad, "end or front")
    strides = []
    for side in "encoder", "decoder":
        stages = getattr(config, side)
        check_stages(side, stages, path)
        time = math.prod(stage[2] for stage in stages)
        space = math.prod(stage[3] for stage in stages)
        strides.append((time, space))
    if strides[0] != strides[1] or strides[0][0] != FRAMES:
        raise UserError(f"{path}: the stages in its config do not lead to {FRAMES} frames in a "
                        "latent and back to the same size")


def check_stages(side, stages, path):
    """UserError, naming the file, unless these are valid stages for one side of a TinyVAE."""
    if not isinstance(stages, tuple) or not 1 <= len(stages) <= 8:
        refuse(path, side, stages, "1 to 8 stages")
    for stage in stages:
        if not isinstance(stage, tuple) or len(stage) != len(STAGE):
            refuse(path, f"a stage of {side}", stage, ", ".join(STAGE))
        check_limits(dict(zip(STAGE, stage)), STAGE, path)


def taehv_config(tensors, path):
    """The config of a public TAEHV file for Wan, from the shapes of its tensors. UserError, naming
    the file, if it is not complete."""
    def width(layer, axis=0):
        """Outputs (axis 0) or inputs (axis 1) of a layer."""
        name = f"{layer}.weight"
        if name not in tensors or tensors[name].ndim != 4:
            raise UserError(f"{path}: expected a complete TAEHV; it has no convolution {name}")
        return tensors[name].shape[axis]

    encoder = []
    for layer, time in (3, 2), (8, 2), (13, 1):     # index of the strided convolution; time stride
        encoder.append((width(f"encoder.{layer}"), 3, time, 2))
    decoder = []
    for layer, time in (7, 1), (13, 2), (19, 2):    # index of the Repack; time stride
        decoder.append((width(f"decoder.{layer}.conv", 1), 3, time, 2))
    return TinyVAEConfig(
        latent_channels=width("encoder.17"), patch=math.isqrt(width("encoder.0", 1) // 3),
        pad="end", stem=width("encoder.0"), encoder=tuple(encoder), decoder=tuple(decoder),
        tail=width("decoder.22", 1))


# --------------------------------------------------------------------------------------------------
# Memory.

def check_memory(needed, path, device="cpu"):
    """UserError, naming the file, if `needed` bytes exceed the free memory of a device."""
    free = free_memory(torch.device(device))
    if free is not None and needed > free:
        raise UserError(f"{path}: needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
                        f"free on {device}; take a smaller model, or a dtype of 16 bits")


def free_memory(device):
    """Free bytes of a device, None if unknown. On Linux a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")                                # Linux only
    if device.type != "cpu" or not told.exists():
        return None
    free = 1024 * int(re.search(r"MemAvailable: *(\d+)", told.read_text())[1])
    with contextlib.suppress(OSError, ValueError, TypeError):   # no such file; "max": no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int(re.search(r"^anon (\d+)", (group / "memory.stat").read_text())[1])
        free = min(free, limit - used)
    return free


# --------------------------------------------------------------------------------------------------
# What a file is, and how weights are sampled.

def what_it_is(names, wanted):
    """What has tensors of these names, in words, with one that tells; it is not the `wanted`."""
    for pattern, kind in KINDS.items():
        telling = [name for name in names if re.search(pattern, name)]
        if telling and kind.split()[-1] not in wanted:
            return f"this looks like {kind}: it holds {telling[0][:80]}"
    first = next(iter(names))
    return f"its first tensor is {first[:80]}, which no layout known here has"


def explain(path, start, error):
    """Why a file that begins like this could not be read: by its first bytes, else by the error."""
    size = Path(path).stat().st_size
    if size == 0:
        return "this is an empty file (0 bytes)"
    for beginning, kind in STARTS.items():
        if start.lstrip().startswith(beginning):
            return f"this is {kind} ({size} bytes); expected .safetensors or .pt"
    if start[8:9] == b"{":
        header = 8 + int.from_bytes(start[:8], "little")
        ends = re.findall(rb'"data_offsets"\W+\d+\W+(\d{1,18})', start)
        whole = header + max(map(int, ends), default=0)
        if size < whole and len(start) < header:    # later tensors' offsets are not in `start`
            return f"truncated: {size} bytes of at least {whole}; download it again"
        if size < whole:
            return f"truncated: {size} bytes of {whole}; download it again"
        return f"cannot be read as .safetensors ({reason_of(error)})"
    if start.startswith(b"PK") and not is_zip(path):
        return (f"truncated: begins as a .pt, but its end is missing ({size} bytes); "
                "download it again")
    code = re.search(r"Unsupported (global|class)[^\n]{0,80}", str(error))
    if code:
        return f"a pickle of something else than tensors, refused ({code[0]})"
    if isinstance(error, pickle.UnpicklingError):       # torch's words advise to run its code
        return "cannot be read as .safetensors or .pt (its pickle is damaged, or of another kind)"
    return f"cannot be read as .safetensors or .pt ({reason_of(error)})"


def advice(config, sampler):
    """How public weights are sampled by "teacher" or "stream": (config, [what is to be noted about
    it, in words])."""
    if sampler == "stream" and config.causal:
        notes = [f"a causal student: streams in {len(config.sigmas)} steps at the noise levels of "
                 "Self-Forcing"]
    elif sampler == "stream":
        config = replace(config, **SELF_FORCING)
        notes = ["does not say that it is a student; streams as Self-Forcing, as --sampler asks"]
    else:
        shift, w_text = TEACHERS.get((config.dim, config.image_dim > 0), OTHERS)
        how = "does not say how it is sampled: teacher"
        if config.causal:
            how = "a causal student, sampled as a teacher, as --sampler asks"
        notes = [f"{how}, shift {shift:g}, text guidance {w_text:g}"]
        config = replace(config, causal=False, shift=shift, guidance=(w_text, 0.0))
    if config.image_dim == 0 and config.out_dim != PRESETS["wan2.2-5b"].out_dim:
        notes.append("never learned to take an image; it enters as a clean first latent, at "
                     "sigma 0")
    return config, notes
