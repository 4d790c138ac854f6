"""Prompts by UMT5-XXL, and the image by CLIP, as Wan's weights read them. Both run in the package transformers, from
the folders of a -Diffusers repository; what they return can be kept on disk.
"""

import hashlib
import html
import importlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from motionstream import UserError, write
from extras.checkpoints import read_tensors

KINDS = (".mp4", ".png", ".npz", ".txt", ".csv", ".safetensors", ".json")   # of files that count in a folder
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motionstream"


def pretrained(name, folder, **options):
    """What transformers calls `name`, from its folder in a -Diffusers repository. The network is not asked."""
    try:
        importlib.import_module("ftfy")                 # which text_encoder needs, before anything is loaded
        import transformers
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)
    except ImportError as e:
        raise UserError(f"{folder}: {e}; pip install transformers ftfy") from None
    except Exception as e:                              # of a dozen kinds
        raise UserError(f"{folder}: no whole {name} ({str(e).strip().splitlines()[0][:99]}); give the -Diffusers "
                        "repository that has it") from None


def text_encoder(folder, device):
    """A function from a text to its rows (L, 4096), one for each token, the end of the sentence included, L <= 512.
    Cleaned as in Wan: mended by ftfy, HTML entities resolved, white space collapsed. (It pads and masks, which is the
    same.)"""
    tokenizer = pretrained("AutoTokenizer", folder / "tokenizer")
    from ftfy import fix_text
    encoder = pretrained("UMT5EncoderModel", folder / "text_encoder", dtype=torch.bfloat16).to(device)
    if not (encoder.shared.weight.any() and encoder.encoder.embed_tokens.weight.equal(encoder.shared.weight)):
        raise UserError(f"{folder}: its table of tokens is empty once loaded, pip install -U transformers")

    @torch.inference_mode()
    def encode(text):
        text = " ".join(html.unescape(html.unescape(fix_text(text))).split())
        tokens = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").input_ids.to(device)
        return encoder(tokens).last_hidden_state[0].cpu()

    return encode


def image_encoder(folder, device):
    """A function from an image (1, 3, H, W) in [-1, 1] to rows (257, C): the last layer but one of CLIP, which sees it
    squeezed to 224x224, as in Wan."""
    if folder is None:
        raise UserError("the weights read the image by CLIP too; give --image-encoder DIR")
    encoder = pretrained("CLIPVisionModel", folder / "image_encoder", dtype=torch.float32).to(device)
    statistics = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    mean, std = statistics.view(2, 3, 1, 1).to(device)

    @torch.inference_mode()
    def encode(image):
        x = (F.interpolate(image.to(device), (224, 224), mode="bicubic") / 2 + 0.5 - mean) / std
        return encoder(x, output_hidden_states=True).hidden_states[-2][0].cpu()

    return encode


def kept_rows(open_encoder, folder, device, what):
    """{name: rows} of {name: text or image} by open_encoder(folder, device), now or in an earlier run: kept in a file
    that is named by `what`, and by what the files of the encoder are called, how large and how old they are."""
    key = [(name, x.numpy().tobytes() if torch.is_tensor(x) else x) for name, x in what.items()]
    path = CACHE / f"{hashlib.sha256(repr(key + listing(folder)).encode()).hexdigest()[:32]}.safetensors"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        encode = open_encoder(folder, device)
        write(path, save_file, {name: encode(x) for name, x in what.items()})
    return read_tensors(path)[0]


def listing(folder):
    """The files of KINDS in a folder, [(path in it, size, age)]: tells if one is another by now. None: no files."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in KINDS and file.is_file()] if folder else []
    return [(f"{file.relative_to(folder)}", file.stat().st_size, file.stat().st_mtime_ns) for file in files]
