"""What the segmenter is trained on, what its error counts, and that it learns."""

import math
import unittest.mock

import torch
import torch.nn.functional as F

from extras import segmentation
from extras.segmentation import draw_pictures, draw_scenes, segmentation_error, some_pieces
from extras.testing import assert_near, rand, seeded
from vae import Segmenter


def test_scenes_are_pictures_and_what_they_show():
    pictures, things = draw_scenes(18, 64, seeded())            # more than are drawn at once
    assert pictures.shape == (18, 3, 64, 64)
    assert things.shape == (18, 64, 64)
    assert pictures.dtype == things.dtype == torch.uint8
    assert set(things.unique().tolist()) == {0, 1, 2, 3}
    some = (things > 0).float().mean((1, 2))
    assert some.min() > 0.01 and some.max() < 0.9
    again, _ = draw_scenes(18, 64, seeded())
    assert again.equal(pictures)


def grey_scenes(count, size=32):
    """Grey pictures, each of its own brightness, with a thing in their upper left quarter."""
    pictures = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)
    things = torch.zeros(count, size, size, dtype=torch.uint8)
    things[:, :size // 2, :size // 2] = 1
    return pictures, things


def test_pieces_are_discs_and_outlines_of_objects():
    torch.manual_seed(0)
    _, things = grey_scenes(400)
    pieces = some_pieces(things, 32)
    outlines = (pieces == (things == 1)).all((1, 2))
    assert 150 < outlines.sum() < 250
    area = pieces[~outlines].float().sum((1, 2))
    radius = (area / math.pi).sqrt()
    assert radius.max() < 0.26 * 32 + 0.5                       # those at the border are cut off
    assert area.min() > 0


def test_a_piece_of_another_picture_is_one_thing():
    torch.manual_seed(0)
    things = torch.randint(0, 3, (200, 32, 32)).byte()
    _, thing = draw_pictures(rand(200, 3, 32, 32).mul(99).byte(), things, 400)
    pasted = (thing == 255).flatten(1).any(1)
    assert abs(pasted.float().mean() - 0.4) < 0.1
    picture, thing = draw_pictures(*grey_scenes(200), 400)
    assert picture.shape == (400, 3, 32, 32)
    assert picture.min() >= -1 and picture.max() <= 1
    one = picture[thing[:, 0, 0] != 255]
    assert len(one.flatten(1).mean(1).unique()) > 50, "light and contrast differ"


def vectors_of(shown, scale):
    """Vectors (B, 2, rows, columns) that are as the things (B, rows, columns) are, scaled."""
    angle = 2 * math.pi * shown / 3
    return scale * torch.stack([angle.cos(), angle.sin()], 1)


def test_the_error_is_small_if_things_are_apart_and_that_of_no_idea_if_not():
    torch.manual_seed(0)
    shown = torch.randint(0, 3, (2, 8, 8))
    thing = shown.repeat_interleave(2, 1).repeat_interleave(2, 2).byte()
    torch.manual_seed(0)
    apart = segmentation_error(vectors_of(shown, 5), thing)
    certain = F.softplus(torch.tensor(-2.0))                    # that one thing is one thing
    assert_near(apart, 1.5 * certain, 1e-3)
    torch.manual_seed(0)
    together = segmentation_error(vectors_of(shown, 0), thing)
    wrong = F.softplus(torch.tensor(2.0))
    assert_near(together, 1.5 * certain + wrong, 1e-3)
    confused = segmentation_error(vectors_of(shown.flip(1), 5), thing)
    assert confused > 5


def test_squares_just_outside_a_thing_count_more():
    """Seen from squares of the thing alone."""
    shown = torch.zeros(4, 24, 24)
    shown[:, 8:18, 8:18] = 1
    thing = shown.repeat_interleave(2, 1).repeat_interleave(2, 2)
    near = shown.clone()
    near[:, 7, 8:18] = 1                                        # taken for the thing by mistake
    far = shown.clone()
    far[:, 8:18, 0] = 1
    errors = []
    with unittest.mock.patch.object(segmentation, "OF_GROUND", 0.0):
        for found in near, far:
            errors.append(segmentation_error(vectors_of(found, 5), thing).item())
    certain = F.softplus(torch.tensor(-2.0)).item()
    near, far = (error - certain for error in errors)
    assert near > 3.5 * far > 0, errors


def test_a_segmenter_learns():
    torch.manual_seed(0)
    pictures, things = draw_scenes(16, 32, seeded())
    model = Segmenter()
    assert model(torch.zeros(2, 3, 32, 48)).shape == (2, 16, 16, 24)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for _ in range(60):
        picture, thing = draw_pictures(pictures, things, 16)
        error = segmentation_error(model(picture), thing)
        adam.zero_grad()
        error.backward()
        adam.step()
        errors.append(error.item())
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10]), errors
