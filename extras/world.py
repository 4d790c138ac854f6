"""The drawn world that the tiny model is trained on and measured in. Not part of the method.

Discs, polygons, stars, blobs and faces, plain or textured, move over plain or textured grounds,
under a moving camera and changing light, with ground-truth tracks. Nothing is downloaded.

    python -m extras.world --out clips/drawn --clips 5000     writes a folder of clips

    scene = new_scenes(batch, frames, rng)            random objects and motion
    video = render(scene, size)                       (B, 3, T, size, size) in [-1, 1]
    tracks, visible = scene_tracks(scene, size, rng)  (B, T, N, 2) in pixels, (B, T, N)
    group = track_groups(scene)                       (N,): each track's object, -1 the ground

Positions and radii are in units of the picture's width, times in frames; the camera looks at
[0, 1] x [0, 1] of a ground that covers [-0.5, 1.5] x [-0.5, 1.5]. A texture of an object covers
EXTENT radii to each side of its centre.

B clips, K object slots, T frames, P tracks on each object, N = K * P + GRID * GRID tracks.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import sample
from extras.textures import EXTENT, chance, choose, draw_face, draw_texture, smooth_ground, soften
from extras.textures import uniform, vary
from motionstream import PRESETS, UserError

OBJECTS = 3                  # object slots, at least
GRID = 8                     # tracks on the ground per side
TRIES = 4                    # candidate draws of the objects' paths
TOGETHER = 4                 # clips that a worker process takes at once
DISC, POLYGON, STAR, BLOB = range(4)
WAVES = 6                    # harmonics of a blob's outline
LIGHT = {                    # RGB gains that the light converges to
    "steady": (1, 1, 1),
    "fading": (0.35, 0.35, 0.4),
    "warming": (1.1, 0.8, 0.5),
}
MOTION = ("steady", "spinning", "pulsing")


@dataclasses.dataclass(frozen=True)
class Style:
    """Differences between the textured world and the older, simple one."""
    points: int              # tracks on each object; the first is its centre
    object_pixels: int       # side of an object's texture
    ground_pixels: int       # side of the ground's
    steady_motion: float     # share of clips without spinning or pulsing
    turn_frames: int         # frames per full turn when spinning


STYLES = {
    "textured": Style(points=16, object_pixels=96, ground_pixels=512,
                      steady_motion=0.5, turn_frames=120),
    "simple": Style(points=8, object_pixels=40, ground_pixels=256,
                    steady_motion=0.6, turn_frames=60),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `new_scenes`. None: random."""
    style: str = "textured"         # "simple": the older world, smooth grounds, smaller objects
    texture: tuple = (0.0, 1.0)     # range of a clip's amount of texture; (0, 0): plain
    objects: int | None = None      # number of objects; may exceed OBJECTS
    camera: bool | None = None      # whether it moves
    attributes: tuple = (None, None)   # indices into LIGHT and MOTION
    moving: bool = False            # no object rests
    flat: bool = False              # plain discs and squares on smooth grey, unlike most clips

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"style {self.style!r}: give one of {', '.join(STYLES)}")
        low, high = self.texture
        if not 0 <= low <= high <= 1:
            raise ValueError(f"texture from {low} to {high}: give a range within 0 to 1")


# ------------------------------------------------------------------------------------------------
# Scenes

def new_scenes(batch, frames, rng, **options):
    """Draw `batch` random scenes of `frames` frames: a dict with the inputs of `render` and
    `scene_tracks`. rng: a torch.Generator. options: the fields of `Options`."""
    options = Options(**options)
    style = STYLES[options.style]
    light = draw_attribute(batch, options.attributes[0], len(LIGHT), 0.6, rng)
    motion = draw_attribute(batch, options.attributes[1], len(MOTION), style.steady_motion, rng)
    slots = max(options.objects or 0, OBJECTS)
    present = torch.randint(1, OBJECTS + 1, (batch, 1), generator=rng)
    if options.objects is not None:
        present = torch.full_like(present, options.objects)
    present = torch.arange(slots) < present                           # (B, K)
    if options.style == "simple":
        looks = simple_objects(batch, slots, options.flat, rng)
        apart = torch.zeros(batch, slots)
    else:
        grounds, amount = draw_grounds(batch, options, rng)
        looks = draw_objects(present, motion == 1, grounds, amount, options, rng)
        apart = looks["radius"]
    position = draw_positions(frames, apart, options.moving, rng)     # (B, K, T, 2)
    pan, zoom = draw_camera(batch, frames, options.camera, rng)
    if options.style == "simple":
        grounds = simple_grounds(batch, options.flat, rng)
    return looks | {
        "position": position,
        "present": present,
        "pan": pan,
        "zoom": zoom,
        "gains": light_gains(light, frames),
        "spin": (motion == 1)[:, None] * turning(frames, style.turn_frames),
        "pulse": 1 + (motion == 2)[:, None] * beat(frames),
        "backdrop": grounds,
        "caption": [caption(a, b) for a, b in zip(light, motion)],
        "points": draw_points(looks["shape"], style.points, rng),
    }


def light_gains(light, frames):
    """(B, frames, 3): gain of each colour channel."""
    ramp = 1 - torch.exp(-torch.arange(frames) / 16)       # visible state: predictable
    goal = torch.tensor([*LIGHT.values()])[light]                     # (B, 3)
    return 1 + ramp[:, None] * (goal[:, None] - 1)


def turning(frames, turn_frames):
    """(frames,): rotation angle of spinning objects, one full turn per `turn_frames` frames."""
    step = 2 * math.pi / turn_frames
    return torch.arange(frames) * step


def beat(frames):
    """(frames,): relative change in size of pulsing objects."""
    step = 2 * math.pi / 24
    phase = torch.arange(frames) * step
    return 0.22 * torch.sin(phase)


def caption_phrases():
    """The parts of a caption, one from each list: the vocabulary of the tiny model."""
    return [[f"{light} light" for light in LIGHT], [f"{motion} shapes" for motion in MOTION]]


def caption(light, motion):
    """A caption: light and motion, which neither the first frame nor a few tracks reveal."""
    lights, motions = caption_phrases()
    return f"{lights[light]}, {motions[motion]}"


def embed_words(text, text_dim=64):
    """A caption for the tiny model, (1, L, text_dim), see sample.embed_words."""
    config = dataclasses.replace(PRESETS["tiny"], text_dim=text_dim)
    return sample.embed_words(text, config)


def draw_attribute(batch, value, count, steady, rng):
    """(B,) indices below `count`: `value`, or random, 0 in a share `steady` of the clips."""
    if value is not None:
        return torch.full((batch,), value)
    changes = torch.rand(batch, generator=rng) > steady
    return changes * torch.randint(1, count, (batch,), generator=rng)


def smooth_path(batch, frames, step, knot, rng):
    """(batch, frames, 2): a Catmull-Rom curve through a random walk from a random start, reflected
    into [0, 1]: a knot every `knot` frames, steps of std `step` (batch, 1, 1)."""
    count = (frames - 1) // knot + 4
    walk = torch.randn(batch, count, 2, generator=rng) * step
    start = torch.rand(batch, 1, 2, generator=rng)
    walk = (start + walk.cumsum(1)) % 2
    knots = 1 - (1 - walk).abs()
    t = torch.arange(frames) / knot
    i = t.long()
    u = (t % 1)[:, None]
    a = knots[:, i]
    b = knots[:, i + 1]
    c = knots[:, i + 2]
    d = knots[:, i + 3]
    cubic = 3 * (b - c) + d - a
    square = 2 * a - 5 * b + 4 * c - d
    return b + 0.5 * u * (c - a + u * (square + u * cubic))


def draw_positions(frames, apart, moving, rng):
    """The objects' paths (B, K, frames, 2). apart (B, K): room that each needs at the start."""
    batch, slots = apart.shape
    speed = torch.rand(TRIES * batch * slots, 1, 1, generator=rng)
    if moving:
        speed = 0.2 + 0.8 * speed
    else:
        speed = 1.12 * speed - 0.12                                   # some rest
    step = 0.5 * speed.clamp(min=0) ** 1.5
    paths = smooth_path(len(speed), frames, step, 14, rng)
    paths = 0.12 + 0.76 * paths.view(TRIES, batch, slots, frames, 2)
    start = paths[:, :, :, 0]
    gap = torch.cdist(start, start) - apart[:, :, None] - apart[:, None]
    gap = gap + 9 * torch.eye(slots)
    # keep the draw whose objects start farthest apart: an object hidden in the first frame cannot
    # be known later
    best = gap.amin((2, 3)).argmax(0)
    return paths[best, torch.arange(batch)]


def draw_camera(batch, frames, camera, rng):
    """The camera's pan (B, frames, 2) and zoom (B, frames, 1). camera: see `Options`."""
    if camera is None:
        moves = torch.rand(batch, 1, 1, generator=rng) < 0.3
    else:
        moves = torch.tensor(camera)
    moves = moves.float()
    path = smooth_path(batch * 2, frames, torch.tensor(0.35), 30, rng)
    path = path.view(batch, 2, frames, 2)
    pan = moves * 0.5 * (path[:, 0] - 0.5)
    zoom = torch.exp(moves * 0.5 * (path[:, 1, :, :1] - 0.5))
    return pan, zoom


# ------------------------------------------------------------------------------------------------
# Outlines. A shape is (kind, sides, waves): kind and sides (..., 1, 1) integers, waves
# (..., WAVES, 2) the cosine and sine coefficients of a blob's outline, from the constant on.

def outline(shape, angle):
    """The radius of an outline at `angle` (..., h, w), at most 1."""
    kind, sides, waves = shape
    sector = 2 * math.pi / sides
    polygon = torch.cos(sector / 2) / torch.cos(angle % sector - sector / 2)
    tip = (2 * (angle % sector) / sector - 1).abs()                   # 1 at a tip, 0 between two
    star = 1 - 0.55 * (1 - tip)
    radius = torch.where(kind == POLYGON, polygon, star)
    radius = torch.where(kind == DISC, torch.ones_like(angle), radius)
    if (kind == BLOB).any():
        radius = torch.where(kind == BLOB, blob_outline(waves, angle), radius)
    return radius


def blob_outline(waves, angle):
    """The radius (..., h, w) of a wavy outline."""
    radius = torch.zeros_like(angle)
    for m in range(WAVES):
        cosine = waves[..., m, 0, None, None]
        sine = waves[..., m, 1, None, None]
        radius = radius + cosine * torch.cos(m * angle)
        radius = radius + sine * torch.sin(m * angle)
    return radius


def draw_waves(rng):
    """(WAVES, 2): an outline between an ellipse and an amoeba, scaled to a maximum radius of 1."""
    ellipse = uniform(0.05, 0.2, rng)
    sizes = torch.tensor([0, 0, ellipse, 0.12, 0.08, 0.06])
    sizes[3:] *= uniform(0, 1, rng) ** 2
    phase = 2 * math.pi * torch.rand(WAVES, generator=rng)
    cosine = sizes * phase.cos()
    sine = sizes * phase.sin()
    waves = torch.stack([cosine, sine], -1)
    waves[0, 0] = 1
    return waves / largest_radius(waves)


def head_waves(tilt):
    """(WAVES, 2): the egg-shaped outline of a head, rotated by `tilt`."""
    waves = torch.zeros(WAVES, 2)
    waves[0, 0] = 1
    waves[2, 0] = -0.1 * math.cos(2 * tilt)
    waves[2, 1] = -0.1 * math.sin(2 * tilt)
    return waves / largest_radius(waves)


def largest_radius(waves):
    angle = torch.linspace(0, 2 * math.pi, 180)[None]
    return blob_outline(waves, angle).max()


def draw_points(shape, count, rng):
    """Positions of tracks on objects of a shape, in radii: (B, K, count, 2). The first is the
    centre, the others are spread over the object."""
    batch, slots = shape[0].shape[:2]
    draw = torch.rand(2, batch, slots, count, generator=rng)
    angle = 2 * math.pi * draw[0]
    edge = outline(shape, angle[:, :, None])[:, :, 0]
    radius = 0.9 * edge * draw[1].sqrt()
    x = radius * torch.cos(angle)
    y = radius * torch.sin(angle)
    points = torch.stack([x, y], -1)
    points[:, :, 0] = 0
    return points


def distinct_colours(batch, slots, rng):
    """(B, K, 3): saturated colours, of different hues within a clip."""
    first = torch.rand(batch, 1, generator=rng)
    jitter = 0.5 * torch.rand(batch, slots, generator=rng)
    place = torch.arange(slots) + jitter - 0.25
    hue = (first + place / slots) % 1
    saturation = 0.7 + 0.3 * torch.rand(batch, slots, 1, generator=rng)
    value = 0.7 + 0.3 * torch.rand(batch, slots, 1, generator=rng)
    ramp = torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[..., None]         # HSV to RGB
    ramp = ramp % 6
    ramp = torch.minimum(ramp, 4 - ramp).clamp(0, 1)
    return value * (1 - saturation * ramp)


# ------------------------------------------------------------------------------------------------
# Looks

def draw_grounds(batch, options, rng):
    """Grounds (B, 3, width, width) in [0, 1], and the amount of texture of each clip (B,)."""
    low, high = options.texture
    amount = low + (high - low) * torch.rand(batch, generator=rng)
    if options.flat:
        amount = torch.zeros(batch)
    width = STYLES["textured"].ground_pixels
    grounds = torch.empty(batch, 3, width, width)
    for b in range(batch):
        grounds[b] = smooth_ground(width, options.flat, rng)
        if amount[b] > 0:
            texture = soften(draw_texture(width, rng))
            grounds[b].lerp_(texture, amount[b])
    return grounds, amount


def draw_objects(present, spins, grounds, amount, options, rng):
    """Looks of objects: texture (B, K, 4, width, width) RGBA, colour (B, K, 3), radius (B, K),
    shape, see `outline`, and face (B, K) bool: True for faces. present (B, K) and spins (B,) bool:
    existing objects, and clips in which they spin. grounds and amount: see `draw_grounds`."""
    batch, slots = present.shape
    width = STYLES["textured"].object_pixels
    colour = distinct_colours(batch, slots, rng).flatten(0, 1)        # (B * K, 3)
    count = len(colour)
    radius = 0.10 + 0.15 * torch.rand(count, generator=rng)
    kind = torch.zeros(count, 1, 1).long()
    sides = 3 + torch.randint(4, (count, 1, 1), generator=rng)
    if options.flat:
        sides = torch.full_like(sides, 4)
    waves = torch.zeros(count, WAVES, 2)
    face = torch.zeros(count).bool()
    texture = torch.zeros(count, 4, width, width)
    plain = options.flat or options.texture[1] == 0
    for i in present.flatten().nonzero().flatten().tolist():
        b = i // slots
        face[i] = not plain and chance(0.22, rng)
        if face[i]:
            tilt = uniform(-0.3, 0.3, rng)
            kind[i] = BLOB
            waves[i] = head_waves(tilt)
            radius[i].clamp_(min=0.15)
            rgb = draw_face(width, tilt, rng)
        else:
            kind[i] = draw_kind(options.flat, spins[b], rng)
            waves[i] = draw_waves(rng)
            if not options.flat:
                colour[i] = weaken(colour[i], rng)
            rgb = draw_skin(colour[i], grounds[b], amount[b], width, rng)
        if kind[i] == STAR:
            sides[i].clamp_(min=4)
        rim = 0.09 * chance(0.35, rng) * (not options.flat)
        texture[i] = cut_out(rgb, (kind[i], sides[i], waves[i]), radius[i], rim)
    shape = (kind, sides, waves)
    return {
        "texture": texture.unflatten(0, (batch, slots)),
        "colour": colour.unflatten(0, (batch, slots)),
        "radius": radius.unflatten(0, (batch, slots)),
        "shape": tuple(part.unflatten(0, (batch, slots)) for part in shape),
        "face": face.unflatten(0, (batch, slots)),
    }


def draw_kind(flat, spins, rng):
    """The kind of an object's outline. Spinning objects are never discs: nobody could see it."""
    if flat:
        return choose((DISC, POLYGON), rng)
    kinds = (POLYGON, POLYGON, STAR, STAR, BLOB, BLOB, BLOB)
    if not spins:
        kinds = kinds + (DISC, DISC)
    return choose(kinds, rng)


def weaken(colour, rng):
    """The colour (3,), sometimes mixed with grey."""
    grey = torch.full((3,), uniform(0, 1, rng))
    share = uniform(0, 0.7, rng) * chance(0.5, rng)
    return torch.lerp(colour, grey, share)


def draw_skin(colour, ground, amount, width, rng):
    """(3, width, width) in [0, 1]: the surface of an object without a face: its colour, a texture,
    or a varied crop of the ground (camouflage). amount: of texture in the clip."""
    rgb = colour[:, None, None].expand(-1, width, width)
    if not chance(0.8 * min(1, 2 * amount.item()), rng):
        return rgb
    if chance(0.25, rng):
        top = choose(range(ground.shape[1] - width), rng)
        left = choose(range(ground.shape[2] - width), rng)
        return vary(ground[:, top:top + width, left:left + width], rng)
    texture = draw_texture(width, rng)
    if chance(0.4, rng):
        # its brightness on the object's colour
        grey = texture.mean(0)
        texture = rgb * (1 + 1.5 * (grey - grey.mean()))
    return texture.clamp(0, 1)


def cut_out(rgb, shape, radius, rim):
    """RGBA (4, width, width): rgb inside the outline, antialiased over a pixel of a frame 128 wide.
    rim: width of a dark edge in radii, 0 for none. radius: of the object, in picture widths."""
    width = rgb.shape[-1]
    step = 2 * EXTENT / width                                         # a texture's pixel, in radii
    axis = step * (torch.arange(width) + 0.5) - EXTENT
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = torch.atan2(y, x)
    inside = outline(shape, angle) - torch.hypot(x, y)
    gradient = torch.stack(torch.gradient(inside, spacing=step))      # (2, width, width)
    slope = gradient.norm(dim=0)
    inside = inside / slope.clamp(1, 4)                               # along the outline's normal
    pixel = max(1 / (128 * radius), step)
    alpha = (0.5 + inside / pixel).clamp(0, 1)
    if rim > 0:
        dark = (0.5 + (rim - inside) / pixel).clamp(0, 1)
        rgb = rgb * (1 - 0.7 * dark)
    return torch.cat([rgb, alpha[None]])


# ------------------------------------------------------------------------------------------------
# The simple style: training data of the first tiny models, kept as a held-out world. The order of
# random draws is unchanged, so that an rng still gives the same scenes.

def simple_objects(batch, slots, flat, rng):
    """As `draw_objects`."""
    def draw(*shape):
        return torch.rand(batch, slots, *shape, generator=rng)

    kind = (draw(1, 1) * 3).long()
    sides = 3 + (draw(1, 1) * 4).long()
    if flat:
        kind = (draw(1, 1) * 2).long()
        sides = torch.full((batch, slots, 1, 1), 4)
    sides = torch.where(kind == STAR, sides.clamp(min=4), sides)
    shape = (kind, sides, torch.zeros(batch, slots, WAVES, 2))
    colour = distinct_colours(batch, slots, rng)
    axis = torch.linspace(-EXTENT, EXTENT, STYLES["simple"].object_pixels)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (y ** 2 + x ** 2).sqrt()
    angle = torch.atan2(y, x).expand(batch, slots, -1, -1)
    edge = outline(shape, angle) - radius
    turned = 2 * math.pi * draw(1, 1)
    period = 4 + 5 * draw(1, 1)
    cosine = torch.cos(turned)
    sine = torch.sin(turned)
    wave = torch.sin(period * (x * cosine + y * sine))
    cross = wave * torch.sin(period * (y * cosine - x * sine))
    pattern = draw(1, 1)
    strength = 0.45 * draw(1, 1)
    shade = torch.where(pattern < 0.6, cross, 1 - 2 * radius)
    shade = torch.where(pattern < 0.35, wave, shade)
    shade = torch.where(pattern > 0.8, torch.zeros_like(shade), shade) * strength * (not flat)
    rim = 0.6 * torch.sigmoid((0.12 - edge) * 30)
    rim = rim * (draw(1, 1) < 0.4)
    shade = shade - rim * (not flat)
    rgb = colour[..., None, None] * (1 + shade[:, :, None])           # (B, K, 3, width, width)
    rgb = rgb.clamp(0, 1)
    alpha = torch.sigmoid(edge * 30)
    texture = torch.cat([rgb, alpha[:, :, None]], 2)
    size = torch.rand(batch, slots, generator=rng)
    radius = 0.07 + 0.105 * size
    if flat:
        radius = 0.08 + 0.05 * size
    face = torch.zeros(batch, slots).bool()
    return {"texture": texture, "colour": colour, "radius": radius, "shape": shape, "face": face}


def simple_grounds(batch, flat, rng):
    """(B, 3, width, width) in [0, 1]: smooth, mostly grey, half of them with a faint texture."""
    width = STYLES["simple"].ground_pixels
    grey = 0.25 + 0.5 * torch.rand(batch, 1, 1, 1, generator=rng)
    grey = grey + 0.12 * torch.randn(batch, 1, 8, 8, generator=rng)
    tint = 0.06 * torch.randn(batch, 3, 8, 8, generator=rng) * (not flat)
    colours = grey + tint
    smooth = F.interpolate(colours, size=(width, width), mode="bicubic", align_corners=True)
    axis = torch.linspace(-0.5, 1.5, width)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turned = 6.3 * torch.rand(batch, 1, 1, 1, generator=rng)
    period = 20 + 30 * torch.rand(batch, 1, 1, 1, generator=rng)
    across = x * torch.cos(turned) + y * torch.sin(turned)
    wave = torch.sin(period * across)
    striped = torch.rand(batch, 1, 1, 1, generator=rng) < 0.5
    crossing = torch.sin(period * (y - x))
    wave = wave * torch.where(striped, 1.0, crossing)
    amount = 0.07 * torch.rand(batch, 1, 1, 1, generator=rng)
    textured = torch.rand(batch, 1, 1, 1, generator=rng) < 0.5
    amount = amount * textured
    ground = smooth + amount * wave * (not flat)
    return ground.clamp(0, 1)


# ------------------------------------------------------------------------------------------------
# Pictures and tracks

def turn(points, angle):
    """Rotate (..., 2) by `angle` (...)."""
    cosine = torch.cos(angle)
    sine = torch.sin(angle)
    x, y = points.unbind(-1)
    turned_x = cosine * x - sine * y
    turned_y = sine * x + cosine * y
    return torch.stack([turned_x, turned_y], -1)


def render(scene, size, start=0, stop=None):
    """Render frames start to stop of the scenes: video (B, 3, T, size, size) in [-1, 1]."""
    span = slice(start, stop)
    clips, T, _ = scene["pan"][:, span].shape
    video = torch.empty(clips, 3, T, size, size)
    for b in range(clips):                      # one clip at a time fits the CPU's cache
        render_clip(scene, b, span, video[b].transpose(0, 1))
    return video


def render_clip(scene, b, span, frames):
    """Render frames `span` of scene `b` into `frames` (T, 3, size, size), in [-1, 1]."""
    size = frames.shape[-1]
    pan = scene["pan"][b, span]                                       # (T, 2)
    zoom = scene["zoom"][b, span]                                     # (T, 1)
    frames.copy_(render_ground(scene["backdrop"][b], pan, zoom, size))
    for k in range(int(scene["present"][b].sum())):
        texture = scene["texture"][b, k]
        position = scene["position"][b, k, span]                      # (T, 2)
        centre = size * ((position - pan - 0.5) * zoom + 0.5)
        reach = size * EXTENT * scene["radius"][b, k]
        while texture.shape[-1] > max(48, 5 * reach):
            texture = F.avg_pool2d(texture, 2)          # too fine for the frame: flicker
        reach = reach * scene["pulse"][b, span, None] * zoom          # (T, 1)
        paste(frames, texture, centre, reach, scene["spin"][b, span])
    gains = scene["gains"][b, span]                                   # (T, 3)
    frames.mul_(gains[:, :, None, None]).clamp_(0, 1)
    frames.mul_(2).sub_(1)


def render_ground(ground, pan, zoom, size):
    """The ground (3, width, width) seen by the camera: (T, 3, size, size), or (1, ...) if the
    camera is at rest."""
    rests = (pan == pan[0]).all() and (zoom == zoom[0]).all()
    if rests:
        pan = pan[:1]
        zoom = zoom[:1]
    T = len(pan)
    axis = (torch.arange(size) + 0.5) / size - 0.5
    place = axis / zoom[..., None] + pan[..., None]                   # (T, 2, size)
    x = place[:, 0, None, :].expand(T, size, size)
    y = place[:, 1, :, None].expand(T, size, size)
    grid = torch.stack([x, y], -1)                      # in widths: the ground's own [-1, 1]
    ground = ground.expand(T, -1, -1, -1)
    return F.grid_sample(ground, grid, padding_mode="border", align_corners=False)


def paste(frames, texture, centre, reach, angle):
    """Draw an object into frames (T, 3, size, size), in place, changing only a square around it.
    texture (4, width, width) RGBA. centre (T, 2) and reach (T, 1), half its width, in pixels of the
    frames. angle (T,)."""
    T, _, size, _ = frames.shape
    corners = math.sqrt(2) if angle.any() else 1.0
    largest = 2 * corners * reach.max().item()
    side = min(size, math.ceil(largest) + 2)
    corner = (centre - side / 2).floor().clamp(0, size - side)        # (T, 2)
    pixels = corner[..., None] + torch.arange(side) + 0.5             # (T, 2, side)
    offset = (pixels - centre[..., None]) / reach[..., None]
    x = offset[:, 0, None, :]                                         # (T, 1, side)
    y = offset[:, 1, :, None]                                         # (T, side, 1)
    cosine = torch.cos(angle)[:, None, None]
    sine = torch.sin(angle)[:, None, None]
    grid_x = cosine * x + sine * y
    grid_y = cosine * y - sine * x
    grid = torch.stack([grid_x, grid_y], -1)                          # (T, side, side, 2)
    texture = texture.expand(T, -1, -1, -1)
    rgba = F.grid_sample(texture, grid, align_corners=False)
    corner = corner.long().tolist()
    for t in range(T):
        left, top = corner[t]
        square = frames[t, :, top:top + side, left:left + side]
        square.lerp_(rgba[t, :3], rgba[t, 3:])


def scene_tracks(scene, size, rng):
    """Ground-truth tracks of the scenes and their visibility: (B, T, N, 2) pixels, (B, T, N) bool.
    P per object, then GRID * GRID on the ground, regular in one frame."""
    position = scene["position"]
    pan = scene["pan"]
    zoom = scene["zoom"]
    B, K, T, _ = position.shape
    P = scene["points"].shape[2]
    scale = scene["radius"][:, :, None] * scene["pulse"][:, None]     # (B, K, T)
    angle = scene["spin"][:, None, :, None].expand(-1, K, -1, P)
    offset = turn(scene["points"][:, :, None], angle)                 # (B, K, T, P, 2)
    on_objects = position[:, :, :, None] + scale[..., None, None] * offset
    on_objects = on_objects.transpose(1, 2).flatten(2, 3)             # (B, T, K * P, 2)
    axis = (torch.arange(GRID) + 0.5) / GRID - 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    grid = grid.view(1, -1, 2)                                        # (1, GRID ** 2, 2)
    late = torch.randint(0, T, (B,), generator=rng)
    when = late * (torch.rand(B, generator=rng) < 0.3)
    rows = torch.arange(B)
    then_zoom = zoom[rows, when][:, None]                             # (B, 1, 1)
    then_pan = pan[rows, when][:, None]                               # (B, 1, 2)
    on_ground = grid / then_zoom + then_pan + 0.5
    on_ground = on_ground[:, None].expand(-1, T, -1, -1)
    world = torch.cat([on_objects, on_ground], 2)                     # (B, T, N, 2)
    there = scene["present"].repeat_interleave(P, 1)                  # (B, K * P)
    always = torch.ones(B, GRID * GRID).bool()
    there = torch.cat([there, always], 1)
    visible = there[:, None] & ~covered(scene, world)                 # (B, T, N)
    seen = (world - pan[:, :, None] - 0.5) * zoom[:, :, None]
    tracks = (seen + 0.5) * size
    inside = ((tracks >= 0) & (tracks < size)).all(-1)
    return tracks, visible & inside


def covered(scene, world):
    """True for places `world` (B, T, N, 2), one per track, that are hidden by an object in front:
    (B, T, N) bool."""
    group = track_groups(scene)
    hidden = torch.zeros(world.shape[:3]).bool()
    for k in range(scene["present"].shape[1]):                        # later ones are in front
        scale = scene["radius"][:, k, None] * scene["pulse"]          # (B, T)
        local = world - scene["position"][:, k, :, None]
        local = local / scale[..., None, None]
        x, y = turn(local, -scene["spin"][..., None]).unbind(-1)
        shape = [part[:, k] for part in scene["shape"]]
        edge = outline(shape, torch.atan2(y, x))
        inside = torch.hypot(x, y) < edge
        inside &= scene["present"][:, k, None, None]
        hidden |= inside & (group < k)
    return hidden


def track_groups(scene):
    """(N,) int64: the object of each track, -1: the ground."""
    _, K, P, _ = scene["points"].shape
    on_objects = torch.arange(K).repeat_interleave(P)
    on_ground = torch.full((GRID * GRID,), -1)
    return torch.cat([on_objects, on_ground])


# ------------------------------------------------------------------------------------------------
# A folder of clips

@dataclasses.dataclass(frozen=True)
class Clips:
    """Settings of a folder of drawn clips, besides the fields of `Options`."""
    frames: int = 45                # of each clip; 1: images
    track_frames: int | None = None     # of the tracks, may exceed frames; None: the same
    size: int = 128                 # pixels per side
    seed: int = 0
    text_dim: int = 64              # size of a word's embedding

    def __post_init__(self):
        for name in ("frames", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give at least 1")
        if self.track_frames is not None and self.track_frames < self.frames:
            raise UserError(f"{self.track_frames} frames of tracks for {self.frames} frames: give "
                            "as many")


def write_clips(folder, count, encode=None, workers=1, **settings):
    """Write clips 0000000.safetensors and on, `count` of them, into `folder`; existing ones stay.

    A file holds video (3, frames, size, size) uint8, tracks (track_frames, N, 2) float32 in pixels,
    visible (track_frames, N) bool, group (N,) int64 and text (L, text_dim) float32, and the caption
    as metadata. encode: a function from uint8 video to latents (C, F, h, w), picklable if there are
    several worker processes; files then hold latents and first, frame 0 (3, size, size), instead of
    video. settings: the fields of `Clips` and of `Options`. A clip depends only on all these and
    its number. UserError for invalid settings, or if the folder holds clips of other settings, see
    its world.json."""
    if workers < 1:
        raise UserError(f"workers {workers}: give at least 1")
    names = [field.name for field in dataclasses.fields(Clips)]
    clips = Clips(**{name: settings.pop(name) for name in names if name in settings})
    options = Options(**settings)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = dataclasses.asdict(clips) | {"options": dataclasses.asdict(options)}
    keep_settings(folder / "world.json", told | {"encoded": encode is not None})
    missing = [i for i in range(count) if not clip_path(folder, i).exists()]
    write = functools.partial(write_clip, folder, clips, options)
    if workers == 1 or len(missing) <= TOGETHER:        # one worker would draw them all
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for i in tqdm(missing, "draw clips", disable=not missing):
            write(encode, i)
        torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), start_worker, [encode]) as pool:
        done = pool.map(functools.partial(write_in_worker, write), missing,
                        chunksize=TOGETHER)
        for _ in tqdm(done, "draw clips", len(missing)):
            pass


def rendered_clips(run, name, count, encode=None):
    """Files of the clips that a training (train_distill.Run) draws for itself, rendered now or
    earlier into a folder called `name` and a digest of its settings. encode: see write_clips."""
    from extras.guard import weights_digest                         # which workers do without
    from train_distill import LATE, RANK, seed_of, wait_for_all
    made_by = weights_digest(run.path("vae")) if encode else None
    settings = {
        "frames": run.settings.clip_frames,
        "track_frames": run.track_frames,
        "size": run.config.size[0],
        "seed": seed_of(run.seed, name),
        "text_dim": run.config.text_dim,
    }
    folder = run.out / f"{name}.{seed_of(made_by, settings):08x}"
    if RANK == 0:                       # one worker process per thread of torch
        write_clips(folder, count, encode=encode, workers=torch.get_num_threads(), **settings)
    wait_for_all(LATE)
    return sorted(folder.glob("*.safetensors"))[:count]


def start_worker(encode):
    """Hand a worker `encode` once, not with every clip."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C: finish the current clip
    start_worker.encode = encode


def write_in_worker(write, index):
    write(start_worker.encode, index)


def clip_path(folder, index):
    return folder / f"{index:07d}.safetensors"


def keep_settings(path, settings):
    """Write `settings` into the file `path`. UserError if it holds other settings."""
    text = json.dumps(settings)
    if not path.exists():
        path.write_text(text)
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: damaged; choose another folder") from None
    if found != json.loads(text):
        raise UserError(f"{path.parent} holds clips of other settings, {found}; choose another")


def write_clip(folder, clips, options, encode, index):
    """Render clip `index` and write it, atomically."""
    rng = torch.Generator().manual_seed(clips.seed * 10_000_019 + index)
    scene = new_scenes(1, clips.track_frames or clips.frames, rng, **dataclasses.asdict(options))
    tracks, visible = scene_tracks(scene, clips.size, rng)
    video = render(scene, clips.size, 0, clips.frames)[0]
    video = ((video + 1) * 127.5).round().byte()
    clip = {
        "tracks": tracks[0],
        "visible": visible[0],
        "group": track_groups(scene),
        "text": embed_words(scene["caption"][0], clips.text_dim)[0],
    }
    if encode is None:
        clip["video"] = video
    else:
        clip["latents"] = encode(video)
        clip["first"] = video[:, 0]
    clip = {name: value.contiguous() for name, value in clip.items()}
    path = clip_path(folder, index)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(clip, temporary, {"caption": scene["caption"][0]})
    os.replace(temporary, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw a folder of clips with their true tracks.")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--frames", type=int, default=45, help="of each clip; 1: images")
    parser.add_argument("--track-frames", type=int, metavar="N",
                        help="of the tracks, which may outlast the clip's (default: as many)")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--style", choices=STYLES, default="textured")
    parser.add_argument("--texture", type=float, nargs=2, default=(0, 1),
                        metavar=("LOW", "HIGH"),
                        help="range of a clip's amount of texture, 0 plain to 1 (default: 0 1)")
    parser.add_argument("--objects", type=int, help="in each clip (default: 1 to 3)")
    args = parser.parse_args(argv)
    try:
        write_clips(args.out, args.clips, workers=args.workers, frames=args.frames,
                    track_frames=args.track_frames, size=args.size, seed=args.seed,
                    style=args.style, texture=tuple(args.texture), objects=args.objects)
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
