"""What Wan's DiT reads beside latents: a prompt, encoded by UMT5-XXL, and the image, encoded by CLIP.

Both run in the package `transformers`, which only this file needs and only when something must be encoded, from the
folders of a -Diffusers repository (text_encoder/ and tokenizer/, image_encoder/). What they return is kept on disk, in
~/.cache/motionstream or below $XDG_CACHE_HOME, so that the next run needs neither encoder. They are freed on return.
Whatever is wrong with a file or a folder is a ValueError of one line that names it.
"""

import contextlib
import gc
import hashlib
import html
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from motionstream import write
from vae import read_tensors

UMT5_DIM = 4096         # channels of a row of text
# Wan's own: what it is told to stay away from, where guidance needs a text.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clean_text(text):
    """A prompt as Wan cleans it: mended by ftfy if that is installed, HTML entities resolved, white space collapsed."""
    with contextlib.suppress(ImportError):
        import ftfy
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


def encode_texts(prompts, folder, length, device):
    """Prompts to (1, length, 4096) float32 each: one row a token, the end of the sentence included, then zeros."""
    rows = kept([clean_text(prompt) for prompt in prompts], folder, f"text {length}",
                lambda absent: run_umt5(absent, folder, length, device))
    return [pad(t, length) for t in rows]


def load_text(path, length):
    """A text that was encoded before, the one tensor (L, 4096) of a .safetensors file, L <= length, as encode_texts
    gives it."""
    return pad(load_rows(path, length, UMT5_DIM), length)


def encode_image(image, folder, channels, device):
    """An image (1, 3, H, W) in [-1, 1] to the features (1, 257, channels) float32 of weights with an image branch."""
    key = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    features, = kept([key], folder, f"image {tuple(image.shape)}", lambda _: [run_clip(image, folder, device)])
    if features.shape != (257, channels):
        raise ValueError(f"{folder}: its features are {tuple(features.shape)}, these weights want {(257, channels)}: "
                         "those of CLIP ViT-H/14")
    return features[None].float()


def pad(rows, length):
    """(L, C) to (1, length, C): beyond the text all is zero, which the DiT sees."""
    if len(rows) == length:
        print(f"note: a text fills all {length} rows; what lies beyond them is not read")
    return F.pad(rows.float(), (0, 0, 0, length - len(rows)))[None]


def load_rows(path, most, channels):
    """The one tensor of a .safetensors file, (L, channels), 1 <= L <= most."""
    tensors, _ = read_tensors(path)
    shapes = [tuple(t.shape) for t in tensors.values()]
    if len(shapes) != 1 or len(shapes[0]) != 2 or not 0 < shapes[0][0] <= most or shapes[0][1] != channels:
        raise ValueError(f"{path}: holds tensors of shape {shapes[:3]}, expected one, (L, {channels}) with L <= {most}")
    rows, = tensors.values()
    if not rows.is_floating_point() or not rows.isfinite().all():
        raise ValueError(f"{path}: holds NaN, infinity or whole numbers; encode the prompt again")
    return rows


def kept(keys, folder, kind, encode):
    """encode(keys), one tensor a key, or what it returned before. A file is named by the hash of a key and of what the
    encoder's files are called, how large and how old they are."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    about = [(str(file), file.stat().st_size, file.stat().st_mtime_ns)
             for file in sorted(folder.resolve().rglob("*")) if file.is_file()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motionstream"
    files = {key: cache / f"{hashlib.sha256(repr((kind, about, key)).encode()).hexdigest()[:32]}.safetensors"
             for key in keys}
    rows = {key: read_tensors(file)[0]["rows"] for key, file in files.items() if file.is_file()}
    absent = [key for key in keys if key not in rows]
    made = dict(zip(absent, encode(absent) if absent else []))
    gc.collect()                                        # the encoder is gone before anything else is loaded
    for key, tensor in made.items():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write(files[key], lambda part: save_file({"rows": tensor.contiguous()}, part))
            print(f"note: what the encoder returned is kept in {files[key]}")
        except OSError as e:
            print(f"note: {cache}: cannot be written ({e.strerror}), the next run encodes again")
    return [(rows | made)[key] for key in keys]


def from_folder(name, folder, part, **options):
    """What transformers calls `name`, from folder/part or else from the folder itself. The network is not asked."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{folder}: needs one more package, pip install transformers") from None
    transformers.logging.set_verbosity_error()
    source = folder / part if (folder / part).is_dir() else folder
    try:
        return getattr(transformers, name).from_pretrained(source, local_files_only=True, **options)
    except Exception as e:                              # of a dozen kinds
        raise ValueError(f"{source}: no {name} can be loaded ({str(e).strip().splitlines()[0][:120]}); give the folder "
                         f"of a -Diffusers repository, which holds {part}/") from None


def load_encoder(name, folder, part, device):
    """An encoder in the dtype of its files, all of whose tensors are there."""
    encoder, about = from_folder(name, folder, part, torch_dtype="auto", output_loading_info=True)
    if about["missing_keys"]:
        raise ValueError(f"{folder}: {len(about['missing_keys'])} tensors of {name} are not in its files, such as "
                         f"{min(about['missing_keys'])}; download it again")
    return encoder.to(device).eval()


@torch.inference_mode()
def run_umt5(prompts, folder, length, device):
    """Clean prompts to rows (L, 4096) each. Without padding: masked, it would change nothing."""
    encoder = load_encoder("UMT5EncoderModel", folder, "text_encoder", device)
    table = encoder.encoder.embed_tokens.weight         # some versions of transformers leave it empty
    if not table.any() or not table.equal(encoder.shared.weight):
        raise ValueError(f"{folder}: its table of tokens is empty once loaded, pip install -U transformers")
    tokenizer = from_folder("AutoTokenizer", folder, "tokenizer")
    tokens = [tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt") for prompt in prompts]
    return [encoder(t.input_ids.to(device), t.attention_mask.to(device)).last_hidden_state[0].cpu() for t in tokens]


@torch.inference_mode()
def run_clip(image, folder, device):
    """See encode_image: the output of CLIP's last layer but one, for the image squeezed to 224x224 as in Wan."""
    encoder = load_encoder("CLIPVisionModel", folder, "image_encoder", device)
    x = F.interpolate(image / 2 + 0.5, (224, 224), mode="bicubic")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    x = ((x - mean) / std).to(device, encoder.dtype)
    return encoder(x, output_hidden_states=True).hidden_states[-2][0].cpu()
