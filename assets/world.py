"""The little world that the tiny model is trained on and measured in: discs, polygons and stars that move on smooth
grounds under a moving camera, with their true tracks. Not part of the method.

    scene = new_scenes(batch, frames, rng)             what happens, drawn at random
    video = film(scene, size)                          (B, 3, T, size, size) in [-1, 1]
    tracks, visible = scene_tracks(scene, size, rng)   (B, T, N, 2) in pixels, (B, T, N)

Positions are in units of the picture's width, times in frames; the camera looks at [0, 1] x [0, 1].
"""

import math
import re
import zlib

import torch
import torch.nn.functional as F

OBJECTS, POINTS, GRID = 3, 8, 8          # object slots K, at least; tracks on each, background tracks per side
TEXTURE = 40                             # pixels per side of an object's texture
TRIES = 4                                # draws of the objects' paths, of which one is taken
LIGHT = {"steady": (1, 1, 1), "fading": (0.35, 0.35, 0.4), "warming": (1.1, 0.8, 0.5)}  # RGB gains they tend to
MOTION = ("steady", "spinning", "pulsing")


def smooth_path(batch, frames, step, knot, rng):
    """(batch, frames, 2): a Catmull-Rom curve through a random walk of `step` (batch, 1, 1) a knot, one every `knot`
    frames, reflected into [0, 1]; starts anywhere."""
    count = (frames - 1) // knot + 4
    walk = torch.randn(batch, count, 2, generator=rng) * step
    walk = (torch.rand(batch, 1, 2, generator=rng) + walk.cumsum(1)) % 2
    knots = 1 - (1 - walk).abs()
    t = torch.arange(frames) / knot
    i, u = t.long(), (t % 1)[:, None]
    a, b, c, d = (knots[:, i + k] for k in range(4))
    return b + 0.5 * u * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a)))


def outline(kind, sides, angle):
    """Radius of an object's outline at `angle`: 0 a disc, 1 a regular polygon, 2 a star."""
    sector = 2 * math.pi / sides
    polygon = torch.cos(sector / 2) / torch.cos(angle % sector - sector / 2)
    star = 1 - 0.55 * (1 - (2 * (angle % sector) / sector - 1).abs())
    return torch.where(kind == 0, torch.ones_like(angle), torch.where(kind == 1, polygon, star))


def textures(batch, slots, flat, rng):
    """Objects' looks: RGBA (batch, slots, 4, TEXTURE, TEXTURE), RGB (batch, slots, 3), outline (kind, sides)."""
    def draw(*shape):
        return torch.rand(batch, slots, *shape, generator=rng)

    kind, sides = (draw(1, 1) * 3).long(), 3 + (draw(1, 1) * 4).long()
    if flat:                                                           # discs and squares, the "foreign" scenes
        kind, sides = (draw(1, 1) * 2).long(), torch.full((batch, slots, 1, 1), 4)
    sides = torch.where(kind == 2, sides.clamp(min=4), sides)
    hue = (torch.rand(batch, 1, generator=rng) + (torch.arange(slots) + 0.5 * draw() - 0.25) / slots) % 1
    saturation, value = (0.7 + 0.3 * draw(1) for _ in range(2))
    ramp = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6    # distinct hues within a scene, HSV to RGB
    colour = value * (1 - saturation * torch.minimum(ramp, 4 - ramp).clamp(0, 1))
    v, u = torch.meshgrid(*[torch.linspace(-1.2, 1.2, TEXTURE)] * 2, indexing="ij")
    radius, angle = (u ** 2 + v ** 2).sqrt(), torch.atan2(v, u)
    edge = outline(kind, sides, angle.expand(batch, slots, -1, -1)) - radius
    turn, period = 2 * math.pi * draw(1, 1), 4 + 5 * draw(1, 1)
    wave = torch.sin(period * (u * torch.cos(turn) + v * torch.sin(turn)))
    cross = wave * torch.sin(period * (v * torch.cos(turn) - u * torch.sin(turn)))
    pattern, strength = draw(1, 1), 0.45 * draw(1, 1)
    shade = torch.where(pattern < 0.35, wave, torch.where(pattern < 0.6, cross, 1 - 2 * radius))
    shade = torch.where(pattern > 0.8, torch.zeros_like(shade), shade) * strength * (not flat)
    shade = shade - 0.6 * torch.sigmoid((0.12 - edge) * 30) * (draw(1, 1) < 0.4) * (not flat)   # a dark rim on some
    rgb = (colour[..., None, None] * (1 + shade[:, :, None])).clamp(0, 1)
    return torch.cat([rgb, torch.sigmoid(edge[:, :, None] * 30)], 2), colour, (kind, sides)


def caption(light, motion):
    """What neither the first frame nor a few tracks tell, in words."""
    return f"{[*LIGHT][light]} light, {MOTION[motion]} shapes"


def embed_words(text, config):
    """A prompt for the tiny model, (1, L, text_dim): each word is random numbers seeded by its own letters, the same in
    every process. At most text_len words; their order is not seen. None: the null text."""
    if text is None:
        return None
    words = re.findall(r"\w+", text.lower())[:config.text_len]
    seeds = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in words]
    rows = [torch.randn(config.text_dim, generator=seed) for seed in seeds]
    return torch.stack(rows)[None] if rows else torch.zeros(1, 0, config.text_dim)


def new_scenes(batch, frames, rng, objects=None, camera=None, attributes=(None, None), moving=False, flat=False):
    """Draw `batch` scenes: everything that `film` and `scene_tracks` need, for `frames` frames. None = at random.
    objects: how many are there, of OBJECTS or more. camera: bool, does it move. attributes: indices into LIGHT and
    MOTION. moving: no object rests. flat: plain discs and squares on smooth grey, unlike most of what training sees."""
    def pick(value, count, steady):
        if value is not None:
            return torch.full((batch,), value)
        return (torch.rand(batch, generator=rng) > steady) * torch.randint(1, count, (batch,), generator=rng)

    light, motion = pick(attributes[0], len(LIGHT), 0.6), pick(attributes[1], len(MOTION), 0.6)
    slots, present = max(objects or 0, OBJECTS), torch.randint(1, OBJECTS + 1, (batch, 1), generator=rng)
    if objects is not None:
        present = torch.full_like(present, objects)
    texture, colour, shape = textures(batch, slots, flat, rng)
    size = torch.rand(batch, slots, generator=rng)
    speed = torch.rand(TRIES * batch * slots, 1, 1, generator=rng)
    speed = 0.2 + 0.8 * speed if moving else 1.12 * speed - 0.12                         # some rest
    paths = smooth_path(len(speed), frames, 0.5 * speed.clamp(min=0) ** 1.5, 14, rng)
    paths = 0.12 + 0.76 * paths.view(TRIES, batch, slots, frames, 2)
    gap = torch.cdist(paths[:, :, :, 0], paths[:, :, :, 0]) + 9 * torch.eye(slots)
    # of several draws that whose objects start farthest apart: what another covers in the image cannot be known later
    position = paths[gap.amin((2, 3)).argmax(0), torch.arange(batch)]
    moves = (torch.rand(batch, 1, 1, generator=rng) < 0.3 if camera is None else torch.tensor(camera)).float()
    path = smooth_path(batch * 2, frames, torch.tensor(0.35), 30, rng).view(batch, 2, frames, 2)
    pan = moves * 0.5 * (path[:, 0] - 0.5)
    zoom = torch.exp(moves * 0.5 * (path[:, 1, :, :1] - 0.5))
    t = torch.arange(frames)
    ramp = 1 - torch.exp(-t / 16)                                      # a state that tells what comes next
    gains = 1 + ramp[:, None] * (torch.tensor([*LIGHT.values()])[light][:, None] - 1)
    spin = (motion == 1)[:, None] * t * (2 * math.pi / 60)
    pulse = 1 + 0.22 * (motion == 2)[:, None] * torch.sin(t * (2 * math.pi / 24))
    return {
        "texture": texture, "colour": colour, "shape": shape, "position": position, "pan": pan, "zoom": zoom,
        "present": torch.arange(slots) < present, "radius": 0.08 + 0.05 * size if flat else 0.07 + 0.105 * size,
        "gains": gains, "spin": spin, "pulse": pulse, "backdrop": backdrops(batch, flat, rng),
        "caption": [caption(a, b) for a, b in zip(light, motion)], "points": local_points(shape, rng),
    }


def backdrops(batch, flat, rng):
    """(batch, 3, 256, 256) in [0, 1]: smooth, rather grey, half of them textured; they cover [-0.5, 1.5] squared."""
    colours = 0.25 + 0.5 * torch.rand(batch, 1, 1, 1, generator=rng) + 0.12 * torch.randn(batch, 1, 8, 8, generator=rng)
    tint = 0.06 * torch.randn(batch, 3, 8, 8, generator=rng) * (not flat)
    smooth = F.interpolate(colours + tint, size=(256, 256), mode="bicubic", align_corners=True)
    v, u = torch.meshgrid(*[torch.linspace(-0.5, 1.5, 256)] * 2, indexing="ij")
    turn, period = 6.3 * torch.rand(batch, 1, 1, 1, generator=rng), 20 + 30 * torch.rand(batch, 1, 1, 1, generator=rng)
    wave = torch.sin(period * (u * torch.cos(turn) + v * torch.sin(turn)))
    wave = wave * torch.where(torch.rand(batch, 1, 1, 1, generator=rng) < 0.5, 1.0, torch.sin(period * (v - u)))
    amount = 0.07 * torch.rand(batch, 1, 1, 1, generator=rng) * (torch.rand(batch, 1, 1, 1, generator=rng) < 0.5)
    return (smooth + amount * wave * (not flat)).clamp(0, 1)


def local_points(shape, rng):
    """Where tracks sit on objects of a shape (kind, sides): (B, K, POINTS, 2) in radii. The centre, then all over."""
    kind, sides = (part[..., 0] for part in shape)
    draw = torch.rand(2, *kind.shape[:2], POINTS, generator=rng)
    angle = 2 * math.pi * draw[0]
    radius = 0.9 * outline(kind, sides, angle) * draw[1].sqrt()
    points = radius[..., None] * torch.stack([torch.cos(angle), torch.sin(angle)], -1)
    points[:, :, 0] = 0
    return points


def turn(points, angle):
    """Rotate (…, 2) by `angle` (…)."""
    c, s = torch.cos(angle), torch.sin(angle)
    x, y = points.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y], -1)


def film(scene, size, start=0, stop=None):
    """Frames start to stop of the scenes: video (B, 3, T, size, size) in [-1, 1]."""
    return torch.stack([film_one(scene, b, size, slice(start, stop)) for b in range(len(scene["pan"]))])


def film_one(scene, b, size, span):
    """Frames `span` of scene `b`: video (3, T, size, size). One clip at a time stays in the processor's cache."""
    pan, zoom, gains = (scene[key][b, span] for key in ("pan", "zoom", "gains"))
    T = len(pan)

    def sample(texture, angle, scale, shift, **padding):
        """The texture (C, h, w) as the camera sees it: turned by `angle`, enlarged by `scale`, moved by `shift`."""
        inverse = turn(torch.eye(2).expand(T, 2, 2), -angle[:, None]).transpose(1, 2) / scale[:, None, None]
        affine = torch.cat([inverse / (2 * zoom[..., None]), inverse @ (pan - shift)[..., None]], 2)
        grid = F.affine_grid(affine, [T, 1, size, size], align_corners=False)
        return F.grid_sample(texture.expand(T, -1, -1, -1), grid, align_corners=False, **padding)

    frames = sample(scene["backdrop"][b], torch.zeros(T), torch.ones(T), torch.zeros(2), padding_mode="border")
    for k in range(int(scene["present"][b].sum())):
        scale = 1.2 * scene["radius"][b, k] * scene["pulse"][b, span]                 # a texture is 1.2 radii wide
        rgba = sample(scene["texture"][b, k], scene["spin"][b, span], scale, scene["position"][b, k, span] - 0.5)
        frames = frames + rgba[:, 3:] * (rgba[:, :3] - frames)
    return (frames * gains[..., None, None]).clamp(0, 1).transpose(0, 1) * 2 - 1


def scene_tracks(scene, size, rng):
    """The true tracks of the scenes and when they can be seen: (B, T, N, 2) pixels, (B, T, N) bool.
    N = K * POINTS on objects, in their order, then GRID * GRID on the ground, a grid at some frame."""
    position, pan, zoom = scene["position"], scene["pan"], scene["zoom"]
    B, K, T, _ = position.shape
    scale = scene["radius"][:, :, None] * scene["pulse"][:, None]                            # (B, K, T)
    offset = turn(scene["points"][:, :, None], scene["spin"][:, None, :, None].expand(-1, K, -1, POINTS))
    on_objects = (position[:, :, :, None] + scale[..., None, None] * offset).transpose(1, 2).flatten(2, 3)
    axis = (torch.arange(GRID) + 0.5) / GRID - 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    when = torch.randint(0, T, (B,), generator=rng) * (torch.rand(B, generator=rng) < 0.3)
    rows = torch.arange(B)
    on_ground = grid / zoom[rows, when][:, None] + pan[rows, when][:, None] + 0.5            # (B, GRID², 2)
    world = torch.cat([on_objects, on_ground[:, None].expand(-1, T, -1, -1)], 2)
    owner = torch.cat([torch.arange(K).repeat_interleave(POINTS), torch.full((GRID * GRID,), -1)])
    visible = torch.cat([scene["present"].repeat_interleave(POINTS, 1), torch.ones(B, GRID * GRID).bool()], 1)
    visible = visible[:, None].repeat(1, T, 1)
    kind, sides = scene["shape"]
    for k in range(K):                                                                       # later ones are in front
        local = turn((world - position[:, k, :, None]) / scale[:, k, :, None, None], -scene["spin"][..., None])
        edge = outline(kind[:, k], sides[:, k], torch.atan2(local[..., 1], local[..., 0]))
        covers = (local.norm(dim=-1) < edge) & scene["present"][:, k, None, None]
        visible &= ~(covers & (owner < k))
    tracks = ((world - pan[:, :, None] - 0.5) * zoom[:, :, None] + 0.5) * size
    return tracks, visible & ((tracks >= 0) & (tracks < size)).all(-1)
