"""Prompts by UMT5-XXL, and the image by CLIP, as Wan's weights read them. Both run in the package
transformers, from the folders of a -Diffusers repository; what they return is kept on disk.
"""

import contextlib
import hashlib
import html
import importlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from motionstream import CLIP_ROWS, UserError, reason_of, write_file
from extras.checkpoints import read_tensors

PARTS = ("image_encoder", "text_encoder", "tokenizer")      # folders of a repository, read here
CACHE = None                # a folder for what encoders returned; None: see cache_folder
PACKAGES = ("transformers", "ftfy")
NEGATIVE_PROMPT = (         # of Wan, what guidance leads away from
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，"
    "画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走")


# --------------------------------------------------------------------------------------------------
# The encoders.

def pretrained(name, folder, **options):
    """What transformers calls `name`, from its folder in a -Diffusers repository. The network is
    not asked. Raises UserError."""
    try:
        importlib.import_module("ftfy")     # which text_encoder needs, before anything is loaded
        import transformers
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)
    except ImportError as e:
        raise UserError(f"{folder}: {e}; pip install transformers ftfy") from None
    except Exception as e:                  # of a dozen kinds
        raise UserError(f"{folder}: no complete {name} ({reason_of(e)}); give the -Diffusers "
                        "repository that has it") from None


def text_encoder(folder, device):
    """A function from a text to its rows (L, 4096), one for each token, the end of the sentence
    included, L <= 512. Cleaned as in Wan: mended by ftfy, HTML entities resolved, white space
    collapsed. (Wan pads and masks, which is the same.)"""
    tokenizer = pretrained("AutoTokenizer", folder / "tokenizer")
    from ftfy import fix_text
    encoder = pretrained("UMT5EncoderModel", folder / "text_encoder", dtype=torch.bfloat16)
    encoder = encoder.to(device)
    table = encoder.shared.weight
    if not (table.any() and encoder.encoder.embed_tokens.weight.equal(table)):
        raise UserError(f"{folder}: its table of tokens is empty once loaded, pip install -U "
                        "transformers")

    @torch.inference_mode()
    def encode(text):
        text = html.unescape(html.unescape(fix_text(text)))
        text = " ".join(text.split())
        tokens = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        return encoder(tokens.input_ids.to(device)).last_hidden_state[0].cpu()

    return encode


def image_encoder(folder, device):
    """A function from an image (1, 3, H, W) in [-1, 1] to rows (257, C): the last layer but one of
    CLIP, which sees it squeezed to 224x224, as in Wan."""
    if folder is None:
        raise UserError("the weights read the image by CLIP too; give --image-encoder DIR")
    encoder = pretrained("CLIPVisionModel", folder / "image_encoder", dtype=torch.float32)
    encoder = encoder.to(device)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device)         # CLIP's own
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device)
    mean = mean.view(1, 3, 1, 1)
    std = std.view(1, 3, 1, 1)

    @torch.inference_mode()
    def encode(image):
        small = F.interpolate(image.to(device), (224, 224), mode="bicubic")
        seen = (small / 2 + 0.5 - mean) / std
        return encoder(seen, output_hidden_states=True).hidden_states[-2][0].cpu()

    return encode


def kept_rows(open_encoder, folder, device, what):
    """{name: rows} of {name: text or image} by open_encoder(folder, device), now or in an earlier
    run: kept in kept_file. If nothing can be kept there, this is said."""
    path = kept_file(folder, what)
    with contextlib.suppress(UserError):    # not there, or not readable any more: encoded again
        return read_tensors(path)[0]
    encode = open_encoder(folder, device)
    rows = {name: encode(value) for name, value in what.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda part: save_file(rows, part))
    except OSError as e:
        print(f"note: what was encoded is not kept for the next run ({reason_of(e)})")
    return rows


def kept_file(folder, what):
    """Where the rows of {name: text or image} are kept: named by `what`, and by what the encoder's
    files are called, how large and how old they are."""
    key = listing(folder)
    for name, value in what.items():
        key.append((name, value.numpy().tobytes() if torch.is_tensor(value) else value))
    number = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    return cache_folder() / f"{number}.safetensors"


def cache_folder():
    """CACHE, else the user's folder for such things, or, without a home, for temporary files."""
    if CACHE:
        return CACHE
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        base = base or Path.home() / ".cache"
    except RuntimeError:
        base = tempfile.gettempdir()
    return Path(base) / "motionstream"


def listing(folder):
    """The files of the encoders in a -Diffusers repository, [(path in it, size, age)]: tells if one
    is another by now. Nothing else in that folder counts, nor is it looked at: it may be a whole
    disk. None: no files."""
    files = []
    if folder is None:
        return files
    for part in PARTS:
        for file in sorted((folder / part).glob("[!.]*")):      # macOS adds ._x
            if file.is_file():
                about = file.stat()
                files.append((f"{part}/{file.name}", about.st_size, about.st_mtime_ns))
    return files


# --------------------------------------------------------------------------------------------------
# What the weights read.

@dataclass(frozen=True)
class Sources:
    """What is to be encoded, by what: the flags of sample.py."""
    prompt: str | None = None
    negative_prompt: str | None = None      # None: NEGATIVE_PROMPT
    prompt_embeds: Path | None = None       # a file of what encoders returned, instead
    text_encoder: Path | None = None        # None: weights, if that is a whole repository
    image_encoder: Path | None = None       # None: that of the text
    weights: Path = Path("weights")         # that read it all, named in errors

    def encode(self, config, image, device):
        """The function `encode` below, of these Sources."""
        return encode(self, config, image, device)


def complete(sources):
    """Sources with the folders of encoders that are not named."""
    if sources.text_encoder is None and (sources.weights / "text_encoder").is_dir():
        sources = replace(sources, text_encoder=sources.weights)
    return replace(sources, image_encoder=sources.image_encoder or sources.text_encoder)


def refuse(sources, config):
    """Raise UserError, what to do, if weights of this config cannot use these Sources."""
    text = sources.prompt is not None
    told = text or sources.prompt_embeds
    faults = [
        (text and not complete(sources).text_encoder,
         "reads no words, which --text-encoder encodes; or give --prompt-embeds"),
        (text and sources.prompt_embeds, "takes one text; drop --prompt or --prompt-embeds"),
        (sources.image_encoder and not config.clip_dim,
         "has no image branch, drop --image-encoder"),
        (config.guidance[0] and not told, "there is no text; give --prompt"),
    ]
    for wrong, cure in faults:
        if wrong:
            raise UserError(f"{sources.weights}: {cure}")


def check(sources, config, image):
    """Raise UserError, what to do, if `encode` will fail for what can be known before it begins:
    missing files, folders and packages. image: as for it."""
    refuse(sources, config)
    sources = complete(sources)
    rows = {}
    if sources.prompt_embeds:
        rows = read_rows(sources.prompt_embeds, config)
    elif sources.prompt is not None:
        check_folder(sources.text_encoder, ("tokenizer", "text_encoder"), texts_of(sources))
    if config.clip_dim and "clip" not in rows:
        if not sources.image_encoder:
            raise UserError(f"{sources.weights}: reads the image by CLIP too; give --image-encoder")
        check_folder(sources.image_encoder, ("image_encoder",), {"clip": image})


def check_folder(folder, parts, what):
    """Raise UserError if a repository lacks folders, or this machine packages to encode `what`."""
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: has no folder {' and no '.join(missing)}; give a -Diffusers "
                        "repository that has it")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing and not kept_file(folder, what).is_file():
        raise UserError(f"{folder}: needs packages that are not installed; pip install "
                        f"{' '.join(missing)}")


def texts_of(sources):
    """What the text encoder is to encode, {name: text}."""
    negative = sources.negative_prompt
    if negative is None:
        negative = NEGATIVE_PROMPT
    return {"prompt": sources.prompt, "negative": negative}


def encode(sources, config, image, device):
    """(text, null_text, clip) for weights with Wan's encoders, each (1, L, channels) float32, zeros
    after its end, or None. null_text is what guidance leads away from; clip is of the image
    (1, 3, H, W)."""
    refuse(sources, config)
    weights = sources.weights
    sources = complete(sources)
    rows = {}
    if sources.prompt_embeds:
        rows = read_rows(sources.prompt_embeds, config)
    elif sources.prompt is not None:
        rows = kept_rows(text_encoder, sources.text_encoder, device, texts_of(sources))
        check_rows(rows, config, sources.text_encoder)
    else:
        print(f"note: {weights}: gets no text at all, which Wan did not see in training, and no "
              "guidance by it; give --prompt")
    if config.clip_dim and "clip" not in rows:
        if not sources.image_encoder:
            raise UserError(f"{weights}: reads the image by CLIP too; give --image-encoder")
        seen = kept_rows(image_encoder, sources.image_encoder, device, {"clip": image})
        check_rows(seen, config, sources.image_encoder)
        rows = rows | seen
    if "prompt" in rows and "negative" not in rows and not config.causal and config.guidance[0]:
        print("note: guidance leads away from rows of zeros; --prompt-embeds holds no tensor named "
              "negative")
    return padded(rows, config, device)


def padded(rows, config, device):
    """(text, null_text, clip) of rows by name, as `encode` returns them."""
    lengths = {"prompt": config.text_len, "negative": config.text_len}
    if config.clip_dim:
        lengths["clip"] = CLIP_ROWS
    tensors = []
    for name in "prompt", "negative", "clip":
        tensor = None
        if name in rows and name in lengths:
            tensor = rows[name].float()                                     # (L, channels)
            tensor = F.pad(tensor, (0, 0, 0, lengths[name] - len(tensor)))[None].to(device)
        tensors.append(tensor)
    return tensors


def read_rows(path, config):
    """The rows by name in a file of --prompt-embeds: `prompt`, if wanted `negative` and `clip`; one
    tensor alone is the prompt. Raises UserError, naming the file."""
    rows = read_tensors(path)[0]
    if len(rows) == 1:
        rows = {"prompt": tensor for tensor in rows.values()}
    if "prompt" not in rows:
        raise UserError(f"{path}: holds {', '.join(rows)[:80] or 'nothing'}, and no prompt")
    check_rows(rows, config, path)
    return rows


def check_rows(rows, config, path):
    """Raise UserError, naming the file or folder they are from, if rows do not fit the weights."""
    shapes = {"prompt": (1, config.text_len, config.text_dim),              # least, most, channels
              "negative": (1, config.text_len, config.text_dim)}
    if config.clip_dim:
        shapes["clip"] = (CLIP_ROWS, CLIP_ROWS, config.clip_dim)
    for name in shapes.keys() & rows.keys():
        tensor = rows[name]
        least, most, channels = shapes[name]
        fits = tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[1] == channels
        if not (fits and least <= len(tensor) <= most and tensor.isfinite().all()):
            raise UserError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                            f"finite floats (L, {channels}), {least} <= L <= {most}")
