"""The tiny video autoencoder: pixels to latents and back, streamed, with the state in the caller's hands.

Layout and parameter names are those of TAEHV (github.com/madebyollin/taehv, MIT), so its public files for Wan
(`taew2_1`, `taew2_2`) load into the same class as the tiny model's own weights; widths, patch and padding are free.
All convolutions are 2-D over single frames. Time enters in three places: `MemBlock` sees the previous frame,
`TPool` packs frames into channels and `TGrow` unpacks them.

    B batch   T video frames   F latent frames, T = 1 + 4 (F - 1)   C channels   h w latent size   H W pixels

Latents are normalised as the DiT sees them: no mean, no scale, about unit variance.
"""

import json
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

FRAMES = 4  # video frames per latent frame, in every VAE of the Wan family


@dataclass
class TinyVAEConfig:
    """A stage is (width, blocks, time, space): its channels, its MemBlocks, and its strides. The defaults are taew2_1.

    pad: where frames are repeated so that T = 4F - 3 frames fill F latents. "end" repeats the last frame, as the
         public files do: a latent then sees up to three frames of its future. "front" repeats frame 0, for ever: no
         latent sees the future, and of a scene that stands still all latents are equal.
    """
    latent_channels: int = 16
    patch: int = 1        # pixels per side that are folded into channels before the first convolution
    pad: str = "end"
    stem: int = 64        # width of the encoder's first convolution
    encoder: tuple = ((64, 3, 2, 2), (64, 3, 2, 2), (64, 3, 1, 2))
    decoder: tuple = ((256, 3, 1, 2), (128, 3, 2, 2), (64, 3, 2, 2))
    tail: int = 64        # width of the decoder's last hidden layer


TINY = TinyVAEConfig(patch=4, pad="front", stem=64, encoder=((128, 2, 4, 2),),
                     decoder=((128, 3, 4, 2), (56, 1, 1, 1)), tail=56)


def conv(inputs, outputs, stride=1, bias=True):
    """A 3x3 convolution that keeps the size (stride 1) or halves it (stride 2)."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class Clamp(nn.Module):
    """Soft limit at 3 standard deviations: (…) to (…)."""

    def forward(self, x):
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """Residual block over each frame and the one before it. `past` (B, C, h, w) is the frame before the first."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        nn.init.zeros_(self.conv[4].weight)     # a new block is the identity
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x, past):
        before = torch.cat([past[:, None], x[:, :-1]], 1)           # x (B, T, C, h, w), shifted by one frame
        y = self.conv(torch.cat([x, before], 2).flatten(0, 1))      # (B T, C, h, w)
        return F.relu(y.view_as(x) + x)


class TPool(nn.Module):
    """Pack `time` consecutive frames into one: (B, T, C, h, w) to (B, T / time, C, h, w)."""

    def __init__(self, width, time):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(width * time, width, 1, bias=False)

    def forward(self, x):
        B, T, C, h, w = x.shape
        return self.conv(x.reshape(B * T // self.time, self.time * C, h, w)).unflatten(0, (B, -1))


class TGrow(nn.Module):
    """Unpack each frame into `time` consecutive ones: (B, T, C, h, w) to (B, T time, C, h, w)."""

    def __init__(self, width, time):
        super().__init__()
        self.conv = nn.Conv2d(width, width * time, 1, bias=False)

    def forward(self, x):
        B, T, C, h, w = x.shape
        return self.conv(x.flatten(0, 1)).reshape(B, -1, C, h, w)


def build_encoder(c):
    """Config to nn.Sequential, indices as in TAEHV's files."""
    layers = [conv(3 * c.patch ** 2, c.stem), nn.ReLU()]
    width = c.stem
    for out, blocks, time, space in c.encoder:
        layers += [TPool(width, time), conv(width, out, space, bias=False), *(MemBlock(out) for _ in range(blocks))]
        width = out
    return nn.Sequential(*layers, conv(width, c.latent_channels))


def build_decoder(c):
    """Config to nn.Sequential, indices as in TAEHV's files."""
    layers = [Clamp(), conv(c.latent_channels, c.decoder[0][0]), nn.ReLU()]
    widths = [stage[0] for stage in c.decoder] + [c.tail]
    for (width, blocks, time, space), out in zip(c.decoder, widths[1:]):
        layers += [*(MemBlock(width) for _ in range(blocks)), nn.Upsample(scale_factor=space),
                   TGrow(width, time), conv(width, out, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), conv(c.tail, 3 * c.patch ** 2))


def run(layers, x, state, still):
    """Frames (B, T, C, H, W) through the layers. `state` holds the last input frame of every MemBlock; None starts a
    clip, before which the first frame stood still (still=True), or all was zero (False). Returns the output and the new
    state, and leaves the old one as it was."""
    memory = []
    for layer in layers:
        if isinstance(layer, MemBlock):
            past = state[len(memory)] if state is not None else x[:, 0] if still else torch.zeros_like(x[:, 0])
            memory.append(x[:, -1])
            x = layer(x, past)
        elif isinstance(layer, (TPool, TGrow)):
            x = layer(x)
        else:
            x = layer(x.flatten(0, 1)).unflatten(0, (len(x), -1))
    return x, memory


class TinyVAE(nn.Module):
    """Encoder and decoder; 8x8 pixels by 4 frames to one latent with `TINY` and taew2_1, 16x16 by 4 with taew2_2."""

    def __init__(self, config=TINY):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        nn.init.constant_(self.decoder[-1].bias, 0.5)     # training starts from grey, not from black
        self.stride = config.patch
        for stage in config.encoder:
            self.stride *= stage[3]

    def encode(self, video, piece=4):
        """Video (B, 3, T, H, W) in [-1, 1], T = 1 + 4 (F - 1), to latents (B, C, F, h, w). An image is T = 1.
        `piece` latent frames are computed at a time, which bounds memory and changes nothing."""
        T, H, W = video.shape[2:]
        assert T % FRAMES == 1, f"a clip has 1 + {FRAMES} k frames, this one has {T}"
        assert H % self.stride == W % self.stride == 0, f"{W}x{H} pixels do not divide by {self.stride}"
        x = video.transpose(1, 2) / 2 + 0.5                                     # (B, T, 3, H, W) in [0, 1]
        front = self.config.pad == "front"
        repeat = (x[:, :1] if front else x[:, -1:]).expand(-1, FRAMES - 1, -1, -1, -1)
        x = torch.cat([repeat, x] if front else [x, repeat], 1)
        latents, state = [], None
        for frames in x.split(FRAMES * piece, 1):
            z, state = run(self.encoder, F.pixel_unshuffle(frames, self.config.patch), state, front)
            latents.append(z)
        return torch.cat(latents, 1).transpose(1, 2)

    def decode_frames(self, latents, state=None):
        """As `decode`, without the limit to [-1, 1]: what a reconstruction loss is computed on."""
        x, memory = run(self.decoder, latents.transpose(1, 2), state, self.config.pad == "front")
        video = F.pixel_shuffle(x, self.config.patch).transpose(1, 2) * 2 - 1
        return video[:, :, FRAMES - 1 if state is None else 0:], memory         # a clip starts with a single frame

    def decode(self, latents, state=None):
        """Latents (B, C, F, h, w) to video (B, 3, T, H, W) in [-1, 1], and the state that continues it.
        state=None starts a clip: T = 4F - 3. Otherwise T = 4F. The state passed in is not modified."""
        video, state = self.decode_frames(latents, state)
        return video.clamp(-1, 1), state

    @classmethod
    def from_pretrained(cls, path):
        """A .safetensors or .pth file in TAEHV's layout. The config is the file's own, else read off its tensors."""
        tensors, metadata = read_tensors(path)
        if metadata.get("format") == "tiny-vae":
            config = read_config(TinyVAEConfig, metadata, path)
        else:
            config = config_from_tensors(tensors, path)
        vae = cls(config)
        check_fit(vae, tensors, path)
        vae.load_state_dict({name: t.float() for name, t in tensors.items()})
        return vae.eval().requires_grad_(False)

    def metadata(self):
        """What a safetensors file says of itself: {"format": …, "config": JSON}."""
        return {"format": "tiny-vae", "config": json.dumps(asdict(self.config))}


def read_tensors(path):
    """A weights file to ({name: tensor}, {key: text}); never runs a pickle's code. ValueError names the file.
    Tensors are mapped, not read. Of a Self-Forcing checkpoint: the generator, best its average, and {"layout": key}."""
    from safetensors import safe_open
    path = Path(path)
    try:
        if path.suffix in (".pt", ".pth"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            layouts = [key for key in ("generator_ema", "generator", "model") if key in tensors]
            tensors = tensors[layouts[0]] if layouts else tensors
            if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
                raise EOFError("no tensors by name")
            return tensors, {"layout": key for key in layouts[:1]}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise ValueError(f"{path}: not a weights file that can be loaded safely ({str(e).splitlines()[0]})") from None
    except Exception as e:  # safetensors' own error class has no stable import path
        raise ValueError(f"{path}: damaged or not safetensors ({e})") from None


def check_fit(model, tensors, path):
    """Raise ValueError, naming the file and five tensors, unless names and shapes are exactly the model's."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors are missing, extra or of another shape for a "
                         f"{type(model).__name__}: {', '.join(wrong[:5])}; is the file whole, and the right one?")


def read_config(cls, metadata, path):
    """The dataclass that a file's metadata holds as JSON. Raises ValueError naming the file."""
    try:
        saved = json.loads(metadata["config"])
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: the config in it cannot be read ({e}); written by another version?") from None


def config_from_tensors(tensors, path):
    """Config of a public TAEHV file, whose spatial strides are always 2. Raises ValueError if it is another model."""
    def stages(part):
        """[(index, kind, tensor)] of one half, one entry a layer."""
        found = {}
        for name, t in tensors.items():
            if re.match(part + r"\.\d+\..*weight$", name):
                index, rest = name.split(".")[1], name.split(".")[2:]
                kind = {1: "conv", 2: "time"}.get(len(rest), "block")
                found.setdefault(int(index), (kind, t.shape))
        return [found[index] for index in sorted(found)]

    encoder, decoder = stages("encoder"), stages("decoder")
    if len(encoder) < 3 or len(decoder) < 3 or {len(s) for _, s in encoder + decoder} != {4}:
        raise ValueError(f"{path}: not a tiny VAE in TAEHV's layout")
    down, up = [], []
    for (kind, shape), (_, after) in zip(encoder, encoder[1:]):
        if kind == "time":
            down.append([after[0], 0, shape[1] // shape[0], 2])
        elif kind == "block":
            down[-1][1] += 1
    blocks = 0
    for kind, shape in decoder:
        if kind == "time":
            up.append([shape[1], blocks, shape[0] // shape[1], 2])
        blocks = blocks + 1 if kind == "block" else 0
    return TinyVAEConfig(encoder[-1][1][0], round((encoder[0][1][1] / 3) ** 0.5), "end", encoder[0][1][0],
                         tuple(map(tuple, down)), tuple(map(tuple, up)), decoder[-1][1][1])
