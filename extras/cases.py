"""What models are measured on: scenes of the drawn world, and photographs as such scenes.

    clips = new_clips(Case("any seed", clips=4, frames=45, points="drag"))
    clips.frames(0, 9)          the truth, (4, 3, 9, 128, 128)
    clips.tracks, clips.visible what a model is told

B clips, K objects, T frames, N tracks.
"""

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from extras import world
from motionstream import PRESETS, UserError

SIZE = 128                      # pixels per side of what is drawn
NEUTRAL = PRESETS["tiny"].prompt


def seed_of(*what):
    """A seed for torch from anything printable, the same in every process."""
    return zlib.crc32(" ".join(map(str, what)).encode())


class Clips:
    """Scenes of the drawn world, or photographs as such scenes, and all that is known of them.

    tracks (B, T, N, 2) in pixels, visible (B, T, N): what models are told, of `length` frames."""

    def __init__(self, scene, tracks, visible, size=SIZE, by_colour=False, plain=False):
        self.scene = scene
        self.tracks = tracks
        self.visible = visible
        self.size = size
        self.by_colour = by_colour      # objects are found by their hues; else by what they show
        self.plain = plain              # every object has one colour, its outline can be seen
        self.length = tracks.shape[1]
        self.present = scene["present"]                         # (B, K)
        self.discs = scene["shape"][0][..., 0, 0] == world.DISC     # (B, K)

    def frames(self, start=0, stop=None):
        """The true video (B, 3, stop - start, H, W)."""
        if stop is None:
            stop = self.length
        return world.render(self.scene, self.size, start, stop)

    def ground(self, start, stop):
        """The same without any object."""
        nothing = torch.zeros_like(self.present)
        empty = self.scene | {"present": nothing}
        return world.render(empty, self.size, start, stop)

    def outlines(self, start, stop):
        """Where each object is seen: (B, K, T, H, W) bool."""
        count = self.present.shape[1]
        parts = []
        for begin in range(0, count, 3):
            parts.append(self.three_outlines(begin, start, stop))
        masks = torch.cat(parts, 1)[:, :count]
        return masks & self.present[:, :, None, None, None]

    def three_outlines(self, begin, start, stop):
        """Those of objects `begin` and the next two: red, green and blue, and all else black."""
        texture = self.scene["texture"].clone()                 # (B, K, 4, width, width)
        texture[:, :, :3] = 0
        for channel in range(min(3, texture.shape[1] - begin)):
            texture[:, begin + channel, channel] = 1
        black = torch.zeros_like(self.scene["backdrop"])
        steady = torch.ones_like(self.scene["gains"])
        scene = self.scene | {"texture": texture, "backdrop": black, "gains": steady}
        return world.render(scene, self.size, start, stop) > 0


@dataclass(frozen=True)
class Case:
    """Which clips are played, and what is said of their motion."""
    seed: str
    clips: int
    frames: int
    drawn: int | None = None    # frames of the scenes, the first `frames` are played; None: as many
    points: str = "drag"        # "dense": all tracks; "drag": the centre of each object; "none"
    change: str | None = None   # of CHANGES
    speed: int = 1              # as fast as in training, times this
    width: int = SIZE           # pixels per side
    photographs: Path | None = None     # a folder of pictures: cut-outs of them instead of scenes
    options: dict = field(default_factory=dict)     # of extras.world, where they are not USUAL


USUAL = {"camera": False, "attributes": (0, 0), "moving": True, "style": "simple"}


def new_clips(case):
    """The Clips of a Case."""
    rng = torch.Generator().manual_seed(seed_of(case.seed))
    options = USUAL | case.options
    count = case.drawn or case.frames
    if case.photographs:
        scene = photograph_scenes(case.photographs, case.clips, count, rng)
    else:
        scene = world.new_scenes(case.clips, count * case.speed, rng, **options)
    for key in ("pan", "zoom", "gains", "spin", "pulse"):
        scene[key] = scene[key][:, ::case.speed]
    scene["position"] = scene["position"][:, :, ::case.speed]
    change, of_tracks = CHANGES[case.change]
    scene = change(scene)
    tracks, visible = world.scene_tracks(scene, case.width, rng)
    tracks, visible = of_tracks(scene, tracks, visible, case.width, rng)
    visible = visible & asked(scene, case.points)
    tracks = tracks[:, :case.frames]
    visible = visible[:, :case.frames]
    clips = Clips(scene, tracks, visible, case.width)
    if not case.photographs:
        clips.by_colour = options["style"] == "simple"
        clips.plain = clips.by_colour or options.get("flat", False)
        clips.plain = clips.plain or options.get("texture") == (0, 0)
    return clips


def asked(scene, points):
    """Which tracks (N,) the models are told, as Case.points says."""
    group = world.track_groups(scene)
    if points == "dense":
        return torch.ones_like(group, dtype=torch.bool)
    if points == "none":
        return torch.zeros_like(group, dtype=torch.bool)
    per_object = scene["points"].shape[2]
    first = torch.arange(len(group)) % per_object == 0
    return first & (group >= 0)


# Changes of a scene: {name: (of what happens in it, of its tracks)}.

def same_scene(scene):
    return scene


def same_tracks(scene, tracks, visible, size, rng):
    return tracks, visible


def other_way(scene):
    """The same first frame, but objects go the opposite way."""
    path = scene["position"]                                    # (B, K, T, 2)
    back = 2 * path[:, :, :1] - path
    return scene | {"position": back.clamp(0.05, 0.95)}


def teleport(scene):
    """Half-way, objects jump to the opposite place."""
    path = scene["position"]
    count = path.shape[2]
    early = torch.arange(count)[:, None] < count // 2
    return scene | {"position": torch.where(early, path, 1 - path)}


def crossing(scene):
    """The first two objects change places."""
    path = scene["position"]
    count = path.shape[2]
    start = path[:, :, :1]
    goal = start.clone()
    goal[:, 0] = start[:, 1]
    goal[:, 1] = start[:, 0]
    t = torch.arange(count)[:, None]
    way = (1 - torch.cos(math.pi * t / (count - 1))) / 2
    return scene | {"position": start.lerp(goal, way)}


def carried_away(scene):
    """The camera pans by its own width, and objects go with it."""
    clips, _, count, _ = scene["position"].shape
    t = torch.arange(count)
    across = (1.5 * t / count).clamp(max=1) - 0.5
    pan = torch.stack([across, torch.zeros(count)], 1)
    pan = pan.expand(clips, -1, -1)                             # (B, T, 2)
    position = scene["position"] + pan[:, None]
    return scene | {"pan": pan, "position": position}


def dusk(scene):
    """The light changes in the second half alone."""
    gains = scene["gains"]                                      # (B, T, 3)
    clips, count, _ = gains.shape
    steady = torch.ones(clips, count // 2, 3)
    changing = gains[:, :count - count // 2]
    return scene | {"gains": torch.cat([steady, changing], 1)}


def two_ways(scene, tracks, visible, size, rng):
    """Every second track goes the opposite way."""
    opposite, _ = world.scene_tracks(other_way(scene), size, rng)
    odd = torch.arange(tracks.shape[2]) % 2 == 1
    return torch.where(odd[:, None], opposite, tracks), visible


def jittered(scene, tracks, visible, size, rng):
    """By 2 % of the width."""
    return tracks + 0.02 * size * torch.randn(tracks.shape, generator=rng), visible


def late(scene, tracks, visible, size, rng):
    """Nothing is said of frames 1 to 12."""
    t = torch.arange(tracks.shape[1])[:, None]
    silent = (t > 0) & (t < 13)
    return tracks, visible & ~silent


def broken(scene, tracks, visible, size, rng):
    """Half of the pieces of 4 frames are missing, but for the first."""
    clips, frames, count = visible.shape
    gaps = torch.rand(clips, frames // 4 + 1, count, generator=rng) < 0.5
    gaps = gaps.repeat_interleave(4, 1)[:, :frames]
    gaps[:, :4] = False
    return tracks, visible & ~gaps


CHANGES = {
    None: (same_scene, same_tracks),
    "other way": (other_way, same_tracks),
    "teleport": (teleport, same_tracks),
    "crossing": (crossing, same_tracks),
    "carried away": (carried_away, same_tracks),
    "dusk": (dusk, same_tracks),
    "two ways": (same_scene, two_ways),
    "jittered": (same_scene, jittered),
    "late": (same_scene, late),
    "broken": (same_scene, broken),
}


# --------------------------------------------------------------------------------------------------
# Photographs, as scenes: a disc out of the middle of one moves over the next.

CUT = 0.7                       # diameter of the disc, of the photograph's shorter side
DIAMETER = 0.4                  # the same in the picture, of its width
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def photograph_scenes(folder, clips, frames, rng):
    """Scenes as of world.new_scenes, of the photographs in a folder, sorted by name."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in ENDINGS)
    if len(paths) < 2:
        raise UserError(f"{folder}: holds {len(paths)} photographs ({', '.join(ENDINGS)}), "
                        "two at least are needed")
    images = [sample.load_image(path) for path in paths]
    kind = torch.full((1, 1), world.DISC)
    sides = torch.ones_like(kind)
    waves = torch.zeros(world.WAVES, 2)
    radius = DIAMETER / 2
    cuts = []
    grounds = []
    for i in range(clips):
        round_number, number = divmod(i, len(images))
        other = (number + 1 + round_number) % len(images)
        piece = cut_of(images[number])
        cuts.append(world.cut_out(piece, (kind, sides, waves), radius, rim=0))
        grounds.append(ground_of(images[other]))
    shape = tuple(part.expand(clips, 1, *part.shape) for part in (kind, sides, waves))
    apart = torch.full((clips, 1), radius)
    position = world.draw_positions(frames, apart, True, rng)
    return {
        "texture": torch.stack(cuts)[:, None],                  # (B, 1, 4, width, width)
        "colour": torch.full((clips, 1, 3), 0.5),
        "radius": torch.full((clips, 1), radius),
        "shape": shape,
        "position": position,
        "present": torch.ones(clips, 1, dtype=torch.bool),
        "pan": torch.zeros(clips, frames, 2),
        "zoom": torch.ones(clips, frames, 1),
        "gains": torch.ones(clips, frames, 3),
        "spin": torch.zeros(clips, frames),
        "pulse": torch.ones(clips, frames),
        "backdrop": torch.stack(grounds),
        "points": world.draw_points(shape, world.STYLES["textured"].points, rng),
        "caption": [NEUTRAL] * clips,
    }


def square_of(image, side, size):
    """The middle of an image, a square of `side` pixels, as (3, size, size) in [0, 1]."""
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    box = (left, top, left + side, top + side)
    pixels = image.resize((size, size), Image.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255


def cut_of(image):
    """What an object shows, (3, 128, 128): the disc's square, with a texture's margin around it."""
    side = min(image.size) * min(CUT * world.EXTENT, 1)
    return square_of(image, side, 128)


def ground_of(image):
    """A scene's ground, (3, 512, 512), of which the camera sees the middle: the photograph,
    mirrored beyond its sides."""
    picture = square_of(image, min(image.size), 256)
    return F.pad(picture[None], (128, 128, 128, 128), "reflect")[0]
