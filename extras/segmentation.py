"""Training of vae.Segmenter, which says what tracks take along in the tiny model: part of the stage
vae of train_distill.py.

It sees single pictures of the drawn world and learns which squares show one thing. A piece of
another picture, objects and all, is pasted onto many of them and counts as one thing too: so the
outline says what a thing is, not its colours, and photographs are cut out that it has never seen.

    B pictures   S size in pixels   E numbers per square   rows columns of squares, 2 pixels wide
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train_distill as td
from extras.cases import Clips
from extras.world import new_scenes, scene_tracks
from motionstream import COPY_CELL, SAME

DRAWN_AT_ONCE = 16
ANCHORS = 24            # squares of a picture that are compared with all its squares
OF_GROUND = 0.15        # how much rarer anchors are on the ground
RIM = 9                 # squares: in a window of so many, a thing's squares have its rim
OF_RIM = 4              # weight of squares just outside a thing
PASTED = 0.4            # share of pictures with a piece of another


def draw_scenes(count, size, rng):
    """Pictures (count, 3, S, S) uint8 of the drawn world, and what they show (count, S, S) uint8: 0
    the ground, 1, 2, 3 … its objects."""
    pictures = []
    things = []
    for begin in tqdm(range(0, count, DRAWN_AT_ONCE), "scenes", disable=td.RANK > 0):
        batch = min(DRAWN_AT_ONCE, count - begin)
        scene = new_scenes(batch, 1, rng, camera=False, attributes=(0, 0))
        tracks, visible = scene_tracks(scene, size, rng)
        clips = Clips(scene, tracks, visible, size)
        picture = clips.frames()[:, :, 0]
        pictures.append(((picture + 1) * 127.5).round().byte())
        outlines = clips.outlines(0, 1)[:, :, 0]                        # (B, K, S, S)
        thing = torch.zeros(batch, size, size, dtype=torch.uint8)
        for k in range(outlines.shape[1]):
            thing[outlines[:, k]] = k + 1
        things.append(thing)
    return torch.cat(pictures), torch.cat(things)


def some_pieces(things, size):
    """Outlines of B pieces, (B, S, S) bool: discs, and the first objects of other scenes."""
    B = len(things)
    axis = torch.arange(size) + 0.5
    centre = size * (0.1 + 0.8 * torch.rand(B, 2, 1, 1))
    radius = size * (0.08 + 0.18 * torch.rand(B, 1, 1))
    disc = (axis - centre[:, 0]) ** 2 + (axis[:, None] - centre[:, 1]) ** 2 < radius ** 2
    is_disc = torch.rand(B, 1, 1) < 0.5
    return torch.where(is_disc, disc, things == 1)


def draw_pictures(pictures, things, count):
    """`count` varied pictures in [-1, 1] (B, 3, S, S), from the uint8 pictures and things of
    draw_scenes, and what they show (B, S, S)."""
    size = pictures.shape[2]

    def draw():
        index = torch.randint(len(pictures), (count,))
        colours = torch.randperm(3)
        return pictures[index][:, colours] / 127.5 - 1, things[index]

    picture, thing = draw()
    other, _ = draw()
    piece = some_pieces(draw()[1], size) & (torch.rand(count, 1, 1) < PASTED)
    picture = torch.where(piece[:, None], other.flip(3), picture)
    thing = thing.masked_fill(piece, 255)

    for axis in 2, 3:
        if torch.rand(()) < 0.5:
            picture = picture.flip(axis)
            thing = thing.flip(axis - 1)
    if torch.rand(()) < 0.5:
        picture = picture.transpose(2, 3)
        thing = thing.transpose(1, 2)
    if torch.rand(()) < 0.3:                                            # a little out of focus
        picture = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = 0.08 * torch.rand(count, 1, 1, 1)
    noisy = torch.rand(count, 1, 1, 1) < 0.3
    contrast = 0.6 + 0.5 * torch.rand(count, 3, 1, 1)
    light = 0.3 * (torch.rand(count, 3, 1, 1) - 0.5)
    picture = picture * contrast + light
    picture = picture + noisy * noise * torch.randn_like(picture)
    return picture.clamp(-1, 1), thing


def segmentation_error(embedding, thing):
    """Cross-entropy of "one thing or not" for some squares of a picture against all of them, with
    SAME minus the squared distance of their vectors as the log odds. Squares of one object, pairs
    of different things and squares of the ground count as three means; the last counts half.

    embedding (B, E, rows, columns); thing (B, S, S): what each pixel shows."""
    middle = COPY_CELL // 2
    shown = thing[:, middle::COPY_CELL, middle::COPY_CELL].long()       # (B, rows, columns)
    rows, columns = shown.shape[1:]
    shown = shown.flatten(1)
    is_object = shown > 0
    chance = torch.where(is_object, 1.0, OF_GROUND)
    anchor = torch.multinomial(chance, min(ANCHORS, rows * columns))    # (B, anchors)

    vectors = embedding.flatten(2).transpose(1, 2)                      # (B, squares, E)
    begins = vectors.gather(1, anchor[..., None].expand(-1, -1, vectors.shape[2]))
    product = begins @ vectors.transpose(1, 2)
    lengths = vectors.square().sum(2)
    difference = lengths.gather(1, anchor)[..., None] + lengths[:, None] - 2 * product
    odds = SAME - difference.clamp(min=0)                               # (B, anchors, squares)

    same = shown.gather(1, anchor)[..., None] == shown[:, None]
    of_object = is_object.gather(1, anchor)[..., None].expand_as(same)
    near = same.float().unflatten(2, (rows, columns))
    near = F.max_pool2d(near, RIM, 1, RIM // 2).flatten(2) > 0
    weight_of_other = torch.where(near, float(OF_RIM), 1.0) * ~same
    error = F.softplus(torch.where(same, -odds, odds))

    def mean(weight):
        return (weight * error).sum() / weight.sum().clamp(min=1)

    return mean(same & of_object) + mean(weight_of_other) + 0.5 * mean(same & ~of_object)


def train_segmenter(run, vae):
    """Train vae.segmenter on pictures that are drawn for it, whatever --data holds."""
    s = run.settings
    rng = torch.Generator().manual_seed(td.seed_of(run.seed, "segmenter"))
    learner = td.Learner("segmenter", vae.segmenter, s.segmenter, s.segmenter_updates,
                         s.vae_accumulate)
    loop = td.Loop(run, "segmenter", s.segmenter_updates, learner)
    pictures = None
    for update in loop:
        if pictures is None:            # not drawn at all if all updates are done
            pictures, things = draw_scenes(s.segmenter_scenes, run.config.size[0], rng)
        for _ in loop.micro_steps():
            picture, thing = draw_pictures(pictures, things, s.segmenter_batch)
            embedding = vae.segmenter(picture.to(run.device))
            loss = segmentation_error(embedding, thing.to(run.device))
            learner.backward(loss)
            loop.log(loss=loss)
        loop.log(grad=learner.update(update))
