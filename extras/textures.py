"""Textures of the drawn world's grounds and objects: dead leaves, clouds, stripes, checks,
shading, mixtures of them, and faces. Nothing is downloaded.

A texture is (3, width, width) in [0, 1]. rng: a torch.Generator, the only source of randomness.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw

EXTENT = 1.2                 # half the width of an object's texture, in radii


def uniform(low, high, rng):
    share = torch.rand((), generator=rng).item()
    return low + (high - low) * share


def chance(share, rng):
    return torch.rand((), generator=rng).item() < share


def choose(options, rng):
    number = torch.randint(len(options), (), generator=rng)
    return options[number.item()]


def draw_palette(rng):
    """(6, 3): a random palette, from nearly uniform to wild, mostly greyish, as in photographs."""
    base = torch.rand(3, generator=rng)
    greyness = uniform(0, 1, rng)
    base = torch.lerp(base, base.mean(), greyness)
    spread = uniform(0.06, 0.3, rng)
    brightness = spread * torch.randn(6, 1, generator=rng)
    spread = uniform(0.02, 0.25, rng)
    tint = spread * torch.randn(6, 3, generator=rng)
    return (base + brightness + tint).clamp(0, 1)


def two_colours(mask, palette):
    """Blend the palette's first two colours by mask (width, width) in [0, 1]."""
    first, second = palette[:2, :, None, None]
    return torch.lerp(first, second, mask)


def plane(width, rng):
    """Two orthogonal coordinates (width, width) in [-1.5, 1.5], rotated at random."""
    axis = torch.linspace(-1, 1, width)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = uniform(0, 2 * math.pi, rng)
    cosine = math.cos(angle)
    sine = math.sin(angle)
    u = x * cosine + y * sine
    v = y * cosine - x * sine
    return u, v


@functools.lru_cache
def frequencies(width):
    """(width, width // 2 + 1): distance from the zero frequency, in cycles per picture."""
    down = torch.fft.fftfreq(width)[:, None] * width
    across = torch.fft.rfftfreq(width)[None] * width
    return torch.hypot(down, across).clamp(min=1)


def power_noise(width, channels, power, rng):
    """(channels, width, width): noise with spectrum 1 / frequency ** power, mean 0 and an average
    standard deviation of 1."""
    decay = frequencies(width) ** -power
    decay[0, 0] = 0
    decay = decay * (width ** 2 / (2 * decay.norm()))
    spectrum = torch.randn(channels, *decay.shape, 2, generator=rng)
    spectrum = torch.view_as_complex(spectrum) * decay
    return torch.fft.irfft2(spectrum, s=(width, width))


# ------------------------------------------------------------------------------------------------
# The kinds: each a function of width, palette (6, 3) and rng

def leaves(width, palette, rng):
    """Dead leaves: overlapping discs with power-law radii, as in photographs (Lee, Mumford and
    Huang 2001)."""
    smallest = width * uniform(0.005, 0.03, rng)
    largest = width * uniform(0.06, 0.25, rng)
    mean_area = 2 * math.pi * smallest ** 2 * math.log(largest / smallest)
    count = min(int(2 * width ** 2 / mean_area), 2000)
    u = torch.rand(count, 1, generator=rng)
    u = u * (1 - (smallest / largest) ** 2)
    radius = smallest / (1 - u).sqrt()                                # (count, 1)
    centre = width * torch.rand(count, 2, generator=rng)
    top_left = centre - radius
    bottom_right = centre + radius
    boxes = torch.cat([top_left, bottom_right], 1)                    # (count, 4)
    which = torch.randint(len(palette), (count,), generator=rng)
    change = torch.randn(count, 3, generator=rng)
    colours = palette[which] + 0.06 * change
    ground = to_bytes(palette[0])
    picture = Image.new("RGB", (width, width), tuple(ground))
    pen = ImageDraw.Draw(picture)
    for box, colour in zip(boxes.tolist(), to_bytes(colours)):
        pen.ellipse(box, fill=tuple(colour))
    return from_picture(picture)


def to_bytes(colours):
    """Colours for Pillow, lists of 0 to 255."""
    levels = colours.clamp(0, 1) * 255
    return levels.int().tolist()


def from_picture(picture):
    pixels = torch.from_numpy(np.array(picture))                      # (width, width, 3)
    return pixels.permute(2, 0, 1).float() / 255


def clouds(width, palette, rng):
    """1 / f noise along two directions of the palette."""
    power = uniform(0.9, 1.8, rng)
    one, other = power_noise(width, 2, power, rng)
    first, second, third = palette[:3, :, None, None]
    along = (second - first) * one + (third - first) * other
    return first + 0.6 * along


def stripes(width, palette, rng):
    """Stripes, soft or sharp, straight or winding."""
    u, _ = plane(width, rng)
    if chance(0.5, rng):
        reach = uniform(0, 0.12, rng)
        winding = power_noise(width, 1, 2.5, rng)
        u = u + reach * winding[0]
    count = math.pi * uniform(2, 10, rng)
    start = uniform(0, 6, rng)
    wave = torch.sin(count * u + start)
    contrast = uniform(1, 12, rng)
    return two_colours(torch.sigmoid(contrast * wave), palette)


def checks(width, palette, rng):
    """A checkerboard, soft or sharp."""
    u, v = plane(width, rng)
    count = math.pi * uniform(2, 8, rng)
    wave = torch.sin(count * u) * torch.sin(count * v)
    contrast = uniform(3, 30, rng)
    return two_colours(torch.sigmoid(contrast * wave), palette)


def shading(width, palette, rng):
    """A gradient from side to side or around a spot."""
    u, v = plane(width, rng)
    if chance(0.5, rng):
        shaded = two_colours(0.5 + 0.5 * u, palette)
        return shaded.clamp(0, 1)
    u = u - uniform(-0.7, 0.7, rng)
    size = uniform(0.2, 1, rng)
    spot = torch.exp(-(u ** 2 + v ** 2) / size)
    return two_colours(spot, palette)


KINDS = (leaves, leaves, leaves, clouds, clouds, stripes, checks, shading)


def draw_kind(width, rng):
    """A texture of a random kind."""
    kind = choose(KINDS, rng)
    palette = draw_palette(rng)
    return kind(width, palette, rng)


def draw_texture(width, rng):
    """One texture, or two in regions, with optional shading and grain."""
    texture = draw_kind(width, rng)
    if chance(0.35, rng):
        other = draw_kind(width, rng)
        power = uniform(1.8, 3, rng)
        border = power_noise(width, 1, power, rng)
        contrast = uniform(2, 40, rng)
        region = torch.sigmoid(contrast * border)
        texture = torch.lerp(texture, other, region)
    if chance(0.5, rng):
        u, _ = plane(width, rng)
        strength = uniform(0, 0.4, rng)
        texture = texture * (1 + strength * u)
    if chance(0.3, rng):
        grain = power_noise(width, 1, 0.8, rng)
        strength = uniform(0.02, 0.08, rng)
        texture = texture + strength * grain
    return texture.clamp(0, 1)


def vary(texture, rng):
    """Flip the texture, rotate it by quarter turns and permute its channels, at random."""
    if chance(0.5, rng):
        texture = texture.flip(2)
    quarters = choose(range(4), rng)
    texture = texture.rot90(quarters, (1, 2))
    return texture[torch.randperm(3, generator=rng)]


def soften(texture):
    """Average each pixel over 2x2: at two texture pixels per frame pixel it does not flicker when
    moving."""
    texture = (texture + texture.roll(1, 1)) / 2
    return (texture + texture.roll(1, 2)) / 2


@functools.lru_cache
def cubic_weights(cells, width):
    """(width, cells): weights of bicubic interpolation from `cells` values to `width` places."""
    values = torch.eye(cells)[None, None]
    size = (width, cells)
    weights = F.interpolate(values, size=size, mode="bicubic", align_corners=True)
    return weights[0, 0]


def smooth_ground(width, grey, rng):
    """A plain ground: one colour with small, slow changes. grey: without hue."""
    base = uniform(0.2, 0.8, rng)
    cells = choose((2, 3, 8), rng)
    change = torch.randn(1, cells, cells, generator=rng)
    if not grey:
        strength = uniform(0, 0.2, rng)
        base = base + strength * torch.randn(3, 1, 1, generator=rng)
        tint = torch.randn(3, cells, cells, generator=rng)
        change = change + 0.5 * tint
    colours = base + uniform(0, 0.12, rng) * change
    weights = cubic_weights(cells, width)
    ground = weights @ colours @ weights.T
    ground = ground.clamp(0, 1)
    return ground.expand(3, -1, -1)


# ------------------------------------------------------------------------------------------------
# Faces: a viewer sees at once whether one survives

SKINS = ("#ffe0c4", "#f1c296", "#e0ac7d", "#b0784e", "#784e32", "#ffd65a", "#96cd78", "#8cb4eb")
HAIRS = ("#1e1814", "#503018", "#8c5828", "#e1b95f", "#be461e", "#a0a0a5", "#c83c8c", "#3c5abe")
EYES = ("#466eb4", "#5a3c1e", "#3c8246", "#141414")
RED = "#a5282d"
MAROON = "#6e141e"


class Face:
    """A pen on a head's texture; units are radii from its centre, x to the right and y down. A box
    is (left, top, right, bottom)."""

    def __init__(self, width, skin):
        self.scale = width / 2 / EXTENT
        self.picture = Image.new("RGB", (width, width), skin)
        self.pen = ImageDraw.Draw(self.picture)

    def pixels(self, numbers):
        return [(number + EXTENT) * self.scale for number in numbers]

    def disc(self, x, y, rx, ry, fill):
        box = (x - rx, y - ry, x + rx, y + ry)
        corners = self.pixels(box)
        self.pen.ellipse(corners, fill=fill)

    def polygon(self, points, fill):
        self.pen.polygon(self.pixels(points), fill=fill)

    def chord(self, box, start, end, fill):
        corners = self.pixels(box)
        self.pen.chord(corners, start, end, fill=fill)

    def line(self, points, thickness, fill):
        thickness = round(thickness * self.scale)
        corners = self.pixels(points)
        self.pen.line(corners, fill, thickness, joint="curve")

    def arc(self, box, start, end, thickness, fill):
        thickness = round(thickness * self.scale)
        corners = self.pixels(box)
        self.pen.arc(corners, start, end, fill, thickness)


def draw_face(width, tilt, rng):
    """The texture of a face rotated by `tilt` radians; the head's outline is cut out elsewhere."""
    skin = choose(SKINS, rng)
    hair = choose(HAIRS, rng)
    face = Face(4 * width, skin)
    if chance(0.15, rng):
        face.chord((-0.9, -0.2, 0.9, 1.3), 0, 180, hair)              # a beard
    draw_hair(face, hair, rng)
    apart = uniform(0.29, 0.36, rng)
    draw_brows(face, darker(hair, 0.5), apart, rng)
    draw_eyes(face, apart, rng)
    draw_nose(face, darker(skin, 0.65), rng)
    draw_mouth(face, rng)
    degrees = -math.degrees(tilt)
    picture = face.picture.rotate(degrees, Image.BILINEAR, fillcolor=hair)
    return from_picture(picture.resize((width, width), Image.BOX))


def darker(colour, share):
    red, green, blue = ImageColor.getrgb(colour)
    return int(share * red), int(share * green), int(share * blue)


def draw_hair(face, hair, rng):
    style = choose(("cap", "cap", "long", "long", "parting", "bald"), rng)
    if style == "parting":
        side = choose((-1, 1), rng)
        face.polygon((
            side * 1.2, -1.2,
            side * 1.2, 0.1,
            side * 0.7, -0.35,
            -side * 0.4, -0.7,
            -side * 0.75, -0.2,
            -side * 1.2, -0.1,
            -side * 1.2, -1.2,
        ), hair)
    if style in ("cap", "long"):
        y = uniform(-1.22, -1.1, rng)
        face.disc(0, y, 1.1, 0.6, hair)
        face.disc(-0.85, -0.5, 0.25, 0.4, hair)
        face.disc(0.85, -0.5, 0.25, 0.4, hair)
    if style == "long":
        face.disc(-0.98, 0.1, 0.38, 1.1, hair)
        face.disc(0.98, 0.1, 0.38, 1.1, hair)


def draw_brows(face, colour, apart, rng):
    slant = uniform(-0.12, 0.12, rng)
    for side in (-1, 1):
        inner = (side * (apart - 0.18), -0.42 - slant)
        outer = (side * (apart + 0.2), -0.42 + slant)
        face.line(inner + outer, 0.1, colour)
        if chance(0.2, rng):
            face.disc(side * 0.5, 0.25, 0.15, 0.11, "#eb786e")        # a cheek


def draw_eyes(face, apart, rng):
    height = uniform(0.15, 0.22, rng)
    iris = choose(EYES, rng)
    look = uniform(-0.07, 0.07, rng)
    glasses = chance(0.15, rng)
    for side in (-1, 1):
        x = side * apart
        y = -0.12
        face.disc(x, y, 0.23, height + 0.03, "#281e1e")
        face.disc(x, y, 0.2, height, "white")
        face.disc(x + look, y, 0.13, 0.13, iris)
        face.disc(x + look, y, 0.08, 0.08, "#0a0a0a")
        face.disc(x + look - 0.04, y - 0.05, 0.035, 0.035, "white")
        if glasses:
            box = (x - 0.32, y - 0.32, x + 0.32, y + 0.32)
            face.arc(box, 0, 360, 0.07, "#141419")


def draw_nose(face, colour, rng):
    nose = choose(("line", "ball", "wedge"), rng)
    if nose == "line":
        side = choose((-1, 1), rng)
        tip = (side * 0.12, 0.24)
        wing = (-side * 0.04, 0.26)
        face.line((0, -0.02) + tip + wing, 0.07, colour)
    if nose == "ball":
        face.disc(0, 0.18, 0.13, 0.1, colour)
    if nose == "wedge":
        face.polygon((0, -0.05, 0.13, 0.25, -0.13, 0.25), colour)


def draw_mouth(face, rng):
    mouth = choose(("smile", "laugh", "line", "round", "frown"), rng)
    wide = uniform(0.25, 0.38, rng)
    if mouth == "smile":
        face.arc((-wide, 0.2, wide, 0.66), 15, 165, 0.09, RED)
    if mouth == "laugh":
        face.chord((-wide, 0.2, wide, 0.8), 0, 180, MAROON)
        face.chord((-wide, 0.38, wide, 0.62), 180, 360, "white")
    if mouth == "line":
        right = uniform(0.45, 0.58, rng)
        face.line((-wide, 0.52, wide, right), 0.09, RED)
    if mouth == "round":
        face.disc(0, 0.54, 0.16, 0.16, MAROON)
    if mouth == "frown":
        face.arc((-wide, 0.46, wide, 0.9), 195, 345, 0.09, RED)
