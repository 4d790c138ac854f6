"""Copies along tracks and the linear part of the velocity, which are not the paper's."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.testing import (COPYING, SMALL, all_equal, assert_error, assert_near, clip_of,
                            linear_vae, new_model, new_tracks, rand, rand_like, randomised,
                            seeded)
from motionstream import (IN_FRAME_0, REACH, SIGNALS, SURE, CopyingMotionStream, MotionStream,
                          belonging, copy_along_tracks, fill_in, image_inputs, left_behind,
                          linear_part, mean_move, motion_inputs, moved_picture, moves_since,
                          nearest_points, rollout, sharpened, split_conditions, square_centres,
                          start_points, to_x0, track_features, votes_of, warp, way_back,
                          with_linear_part)

# --------------------------------------------------------------------------------------------------
# Copies.

SIDE = 64


class ByColour(nn.Module):
    """In place of a trained Segmenter: one colour is one thing."""

    def forward(self, image):
        return 3 * F.avg_pool2d(image, 2)


class OneThing(nn.Module):
    """In place of a trained Segmenter: every picture is one thing."""

    def forward(self, image):
        return torch.zeros_like(F.avg_pool2d(image, 2))


def vae_of(segmenter):
    vae = linear_vae()
    vae.segmenter = segmenter
    return vae


def pan(frames, speed=1):
    """A picture that moves to the right by `speed` pixels a frame, (1, 3, T, SIDE, SIDE), and true
    tracks of it: points 4 pixels apart, tracks (1, T, N, 2) and where they are visible."""
    picture = F.interpolate(rand(1, 3, 16, 16), size=2 * SIDE, mode="bicubic").clamp(-1, 1)
    shown = []
    for t in range(frames):
        left = SIDE // 2 - speed * t
        shown.append(picture[..., :SIDE, left:left + SIDE])
    axis = torch.arange(2.0, SIDE, 4)
    point = torch.cartesian_prod(axis, axis).flip(1)            # (N, 2), x first
    moved = speed * torch.arange(frames)
    tracks = point.repeat(frames, 1, 1)
    tracks[..., 0] += moved[:, None]
    inside = (tracks >= 0) & (tracks < SIDE)
    visible = inside.all(-1)
    return torch.stack(shown, 2), tracks[None], visible[None]


def check_copies(speed, frames, left, right):
    """The copies are the latents of the moved picture from column `left` to `right` of 8: those
    whose window, 4 pixels wider than the cell, shows nothing that has come into the picture."""
    vae = vae_of(OneThing())
    video, tracks, visible = pan(frames, speed)
    image = video[:, :, 0]
    order = torch.randperm(tracks.shape[2], generator=seeded())     # which must not matter
    tracks = tracks[:, :, order]
    visible = visible[:, :, order]
    start = start_points(tracks, visible)
    copied = copy_along_tracks(vae, image, tracks, visible, start)
    latents = vae.encode(video)
    _, C, frames, h, w = latents.shape
    assert copied.shape == (1, C + SIGNALS, frames, h, w)
    copies = copied[:, :C]
    part = latents[..., left:right]
    assert_near(copies[..., left:right], part, 0.02)            # a track is never quite sure
    moved = part[:, :, 1:] - part[:, :, :1]
    assert moved.abs().mean() > 0.05, "nothing has moved"
    first = latents[:, :, 0]                                    # the image itself, in any case
    assert_near(copies[:, :, 0], first, 1e-6)
    wrong = copy_along_tracks(vae, image, tracks + 9, visible, start)
    assert_near(wrong[:, :C, 0], first, 1e-6)


def test_copying_along_true_tracks_gives_the_latents_of_the_moved_picture():
    check_copies(speed=1, frames=9, left=2, right=8)
    check_copies(speed=4, frames=5, left=3, right=8)
    check_copies(speed=-2, frames=9, left=0, right=5)


def test_copies_made_chunk_by_chunk_are_those_of_the_whole():
    vae = vae_of(OneThing())
    video, tracks, visible = pan(21)
    image = video[:, :, 0]
    visible &= rand_like(tracks[..., 0]) > -0.5
    start = start_points(tracks, visible)
    whole = copy_along_tracks(vae, image, tracks, visible, start)
    assert whole.shape[2] == 6
    parts = []
    for now in slice(0, 9), slice(9, 13), slice(13, 21):
        part = copy_along_tracks(vae, image, tracks[:, now], visible[:, now], start)
        parts.append(part)
    assert_near(torch.cat(parts, 2), whole, 1e-6)
    ten = slice(0, 10)
    said = "tracks of 10 frames, expected 4 n + 1"
    args = (vae, image, tracks[:, ten], visible[:, ten], start)
    assert_error(AssertionError, said, copy_along_tracks, *args)
    said = f"start ({len(start)}, 2, 2), expected"
    args = (vae, image, tracks, visible, start[:, :2])
    assert_error(AssertionError, said, copy_along_tracks, *args)


def test_no_visible_track_at_all_is_the_image_standing_still():
    vae = vae_of(OneThing())
    video, tracks, visible = pan(9)
    hidden = visible & False
    nowhere = torch.full_like(tracks, math.nan)
    none = tracks[:, :, :0]
    assert_still(vae, video, tracks, hidden)
    assert_still(vae, video, nowhere, hidden)
    assert_still(vae, video, none, visible[:, :, :0])


def assert_still(vae, video, tracks, visible):
    start = start_points(tracks, visible)
    copied = copy_along_tracks(vae, video[:, :, 0], tracks, visible, start)
    image = vae.encode(video[:, :, :1])
    latents, signals = copied.split([4, SIGNALS], 1)
    still = image.expand_as(latents)
    assert_near(latents, still, 1e-2)
    assert (signals[0, :, 0] == torch.tensor(IN_FRAME_0).view(-1, 1, 1)).all()
    assert signals[:, :, 1:].max() < 0.01, "nothing is near, moved, gone or filled in"


def even_tracks(tracks, visible):
    """Which tracks have even numbers, (N,), and these tracks alone."""
    even = torch.arange(tracks.shape[2]) % 2 == 0
    return even, tracks[:, :, even], visible[:, :, even]


def assert_same_copies(found, expected):
    """Of two tracks that are as near, either may be followed: their signals differ a little."""
    latents, signals = found.split([4, SIGNALS], 1)
    expected_latents, expected_signals = expected.split([4, SIGNALS], 1)
    assert_near(latents, expected_latents, 1e-3)
    assert_near(signals, expected_signals, 0.05)


def test_hidden_tracks_copy_nothing():
    vae = vae_of(OneThing())
    video, tracks, visible = pan(9)
    image = video[:, :, 0]
    even, tracks_left, visible_left = even_tracks(tracks, visible)
    start_left = start_points(tracks_left, visible_left)
    expected = copy_along_tracks(vae, image, tracks_left, visible_left, start_left)
    shown = visible & even
    elsewhere = tracks.masked_fill(~shown[..., None], math.inf)     # wherever the hidden ones are
    found = copy_along_tracks(vae, image, elsewhere, shown, start_points(elsewhere, shown))
    assert_same_copies(found, expected)


def test_a_track_that_was_not_seen_in_frame_0_copies_nothing():
    vae = vae_of(OneThing())
    video, tracks, visible = pan(9)
    image = video[:, :, 0]
    even, tracks_left, visible_left = even_tracks(tracks, visible)
    start = start_points(tracks, visible)
    expected = copy_along_tracks(vae, image, tracks_left, visible_left, start[:, even])
    nowhere = start.masked_fill(~even[:, None], math.nan)
    assert_same_copies(copy_along_tracks(vae, image, tracks, visible, nowhere), expected)


def test_motion_inputs_are_features_and_of_a_copying_model_copies():
    vae = vae_of(OneThing())
    image = rand(2, 3, 32, 48).clamp(-1, 1)
    tracks, visible, ids = new_tracks(9, 5)
    start = start_points(tracks, visible)
    points = {"tracks": tracks, "visible": visible, "ids": ids}
    plain = new_model(**vars(SMALL))
    features = track_features(plain, tracks, visible, ids)
    inputs = motion_inputs(plain, **points, start=start, frame_0=image, vae=vae)
    assert inputs.keys() == {"tracks"}
    assert inputs["tracks"].equal(features)

    copying = new_model(**vars(COPYING))
    features = track_features(copying, tracks, visible, ids)
    copies = copy_along_tracks(vae, image, tracks, visible, start)
    inputs = motion_inputs(copying, **points, start=start, frame_0=image, vae=vae)
    assert inputs.keys() == {"tracks", "copies"}
    assert inputs["tracks"].equal(features)
    assert inputs["copies"].equal(copies)
    assert_error(AssertionError, "see start_points", motion_inputs, copying, **points)
    points |= {"start": tracks[:, 0]}
    assert_error(AssertionError, "needs frame_0 and vae", motion_inputs, copying, **points)
    two = "frame_0 (1, 3, 32, 48), expected (2, 3, 32, 48)"
    assert_error(AssertionError, two, motion_inputs, copying, **points, frame_0=image[:1], vae=vae)


def test_a_square_follows_the_visible_track_nearest_to_its_centre():
    centres = square_centres(32, 48, "cpu")
    assert centres.shape == (16, 24, 2)
    assert centres[15, 21].tolist() == [43, 31]
    tracks = torch.tensor([[1.0, 2.0], [43.0, 31.0]]).expand(1, 2, -1, -1)
    visible = torch.ones(1, 2, 2).bool()
    visible[0, 1, 0] = False                                    # track 0 in the second frame
    places = centres.expand(1, 2, -1, -1, -1)
    index, distance = nearest_points(places, tracks, visible, 2)
    assert index.shape == (1, 2, 16, 24, 2)
    assert distance.shape == (1, 2, 16, 24, 2)
    first, second = index[0]                                    # of each frame
    assert first[0, 0].tolist() == [0, 1]
    assert first[15, 21].tolist() == [1, 0]
    assert (second[..., 0] == 1).all()
    first, second = distance[0]
    assert first[0, 0, 0] == 1                                  # from (1, 1), its centre
    assert first[15, 21, 0] == 0
    assert second[..., 1].isinf().all()


def numbered_pixels():
    """A picture (1, 3, 32, 48) in which each pixel is another."""
    numbers = torch.arange(32 * 48.0).view(32, 48)
    return numbers.expand(1, 3, 32, 48)


# A white thing of 16 x 16 pixels on black ground, in a picture of 64 x 64 pixels. It moves to the
# right by 24 pixels, over the second of four tracks of the ground.
WITH_THING = torch.full((1, 3, 64, 64), -1.0)
WITH_THING[:, :, 24:40, 8:24] = 1
ON_THING = torch.tensor([[16.0, 32]])
ON_BLACK = torch.tensor([[30.0, 32], [44, 32], [16, 10], [16, 54]])
RIGHT = torch.tensor([24.0, 0])


def squares_of_thing(left):
    """True where the thing is if its first column of squares is `left`: (32, 32)."""
    squares = torch.zeros(32, 32).bool()
    squares[12:20, left:left + 8] = True
    return squares


def votes_in(image, start):
    """votes_of of points (N, 2), where one colour is one thing."""
    return votes_of(ByColour()(image), start[None], *image.shape[2:])


def followed(image, start, now):
    """The Ways of one frame, if all tracks are seen, without the first two dimensions: start
    (N, 2) and now (N, 2)."""
    votes = votes_in(image, start)
    visible = torch.ones(1, 1, len(now)).bool()
    ways = way_back(now[None, None], visible, start[None], votes, *image.shape[2:])
    return SimpleNamespace(**{name: part[0, 0] for name, part in vars(ways).items()})


def assert_moves(back, move):
    """Each square has moved so, to 0.2 pixels: tracks that move otherwise weigh a little."""
    assert (back + move).abs().max() < 0.2, back


def moves_and_visible(start, now):
    """Moves (1, 1, N, 2) and visible (1, 1, N) of points (N, 2), all of them visible."""
    return moves_since(now[None, None], start[None]), torch.ones(1, 1, len(start)).bool()


def test_a_track_votes_for_what_is_like_its_start_within_reach():
    votes = votes_in(WITH_THING, torch.cat([ON_THING, ON_BLACK]))
    assert votes.yes.shape == votes.counts.shape == (1, 5, 1024)
    thing = squares_of_thing(left=4).flatten()
    of_thing, right = votes.yes[0, [0, 2]]
    assert (of_thing[thing] == 1).all()
    assert of_thing[~thing].max() < 1e-3
    centre = square_centres(64, 64, "cpu").flatten(0, 1)
    near = (centre - ON_BLACK[1]).norm(dim=1) <= REACH
    assert right.round().bool().equal(near & ~thing)
    assert votes.counts[0, 2].bool().equal(near & ~thing)
    nowhere = votes_in(WITH_THING, torch.full((1, 2), math.nan))
    assert not nowhere.yes.any() and not nowhere.counts.any()


def test_the_odds_of_a_lone_track_are_those_of_its_segmentation():
    """As trained, but twice as sure: two minus the squared distance, times two. So are those of
    many tracks in one place, and a slow one takes nothing else along."""
    image = 0.3 * rand(1, 3, 16, 16)
    start = torch.tensor([[6.0, 6]])
    moves, visible = moves_and_visible(start, start + 20)
    odds = belonging(moves, visible, start[None], votes_in(image, start))[0, 0, 0]
    vector = ByColour()(image)[0].flatten(1)
    difference = (vector - vector[:, 27:28]).square().sum(0)    # the fourth square of the fourth row
    expected = (2 * (2 - difference)).clamp(-SURE, SURE)
    assert_near(odds, expected, 1e-2)
    for count, move in (1, 1.0), (9, 20.0):
        many = start.expand(count, 2)
        moves, visible = moves_and_visible(many, many + move)
        odds = belonging(moves, visible, many[None], votes_in(image, many))[0, 0, 0]
        assert_near(odds, expected, 1e-2)


def test_a_track_on_the_rim_of_another_thing_is_outvoted():
    """A track of the ground starts within the thing by mistake, beside three of the thing."""
    others = ON_THING + torch.tensor([[-4.0, 0], [0, 0], [0, 4]])
    start = torch.cat([ON_THING + 4, others, ON_BLACK])
    now = start.clone()
    now[1:4] += RIGHT
    moves, visible = moves_and_visible(start, now)
    votes = votes_in(WITH_THING, start)
    thing = squares_of_thing(left=4).flatten()
    odds = belonging(moves, visible, start[None], votes)[0, 0]
    assert odds[0, thing].max() < 0, "it owns nothing of the thing"
    assert odds[1, thing].min() > 0
    assert left_behind(moves, visible, votes)[0, 0, thing].min() > 0
    hidden = visible.clone()
    hidden[..., 1:4] = False
    odds = belonging(moves, hidden, start[None], votes)[0, 0]
    assert odds[0, thing].min() > 0, "only what is seen votes"


def test_the_mean_move_is_that_of_the_area():
    start = torch.cat([ON_THING, ON_BLACK])
    now = torch.cat([ON_THING + RIGHT, ON_BLACK])
    moves, visible = moves_and_visible(start, now)
    mean = mean_move(moves, visible, votes_in(WITH_THING, start))
    assert_near(mean[0, 0], RIGHT * 64 / 1024, 0.1)            # the thing has 64 of 1024 squares
    moves, visible = moves_and_visible(ON_THING, ON_THING + RIGHT)
    mean = mean_move(moves, visible, votes_in(WITH_THING, ON_THING))
    assert_near(mean[0, 0], RIGHT * 64 / 1024, 0.1)            # what no track owns rests


def test_a_square_follows_a_track_only_with_what_belongs_to_it():
    """Beside the thing, its own track is nearest; what it would bring there is ground."""
    start = torch.cat([ON_THING, ON_BLACK])
    now = torch.cat([ON_THING + RIGHT, ON_BLACK])
    ways = followed(WITH_THING, start, now)
    thing = squares_of_thing(left=16)
    assert_moves(ways.back[thing], RIGHT)
    assert_moves(ways.back[~thing], 0 * RIGHT)
    assert ways.distance[12, 16] == 98 ** 0.5                   # from (33, 25) to (40, 32)
    old = squares_of_thing(left=4)
    follows = ways.distance.isfinite() & ~old
    assert ways.belongs[follows].min() > 0, "every other square shows what belongs to its track"
    assert ways.belongs[old].max() < 0
    assert (ways.unlike[thing] > 20).all()
    assert (ways.unlike[~thing] < 2).all()
    assert (ways.gone > 0).equal(old)


def test_what_moves_unlike_the_rest_of_the_picture_is_in_front():
    """The thing is over a track of the ground that is still seen, nearer to some squares."""
    start = torch.cat([ON_THING, ON_BLACK])
    now = torch.cat([ON_THING + RIGHT, ON_BLACK])
    back = followed(WITH_THING, start, now).back
    assert_moves(back[squares_of_thing(left=16)], RIGHT)
    left = torch.tensor([-14.0, 0])                             # all but the thing, by a camera
    now = torch.cat([ON_THING, ON_BLACK + left])
    back = followed(WITH_THING, start, now).back
    assert_moves(back[squares_of_thing(left=4)], 0 * RIGHT)


def test_how_many_tracks_a_thing_has_does_not_put_it_behind():
    """Most of the picture is ground: what the one track of it does is what the picture does."""
    corners = torch.tensor([[-4.0, -4], [4, -4], [-4, 4], [4, 4], [0, 0]])
    on_thing = ON_THING + corners
    start = torch.cat([on_thing, ON_BLACK[1:2]])
    now = torch.cat([on_thing + RIGHT, ON_BLACK[1:2]])          # the thing hides the ground's track
    back = followed(WITH_THING, start, now).back
    assert_moves(back[squares_of_thing(left=16)], RIGHT)


def test_a_track_beyond_reach_takes_nothing_from_one_within():
    ground = torch.tensor([[1.0, 62], [1, 4], [1, 124], [95, 40], [95, 84], [117, 62]])
    thing = torch.tensor([[95.0, 62]])
    right = torch.tensor([3.0, 0])
    left = torch.tensor([-20.0, 0])
    now = torch.cat([ground + right, thing + left])
    grey = torch.zeros(1, 3, 128, 128)
    back = followed(grey, torch.cat([ground, thing]), now).back
    square = back[31, 16]                                       # 29 pixels from one, 42 from it
    assert_moves(square, right)


def in_one_thing(tracks, visible, start, height, width):
    """way_back in a picture that is one thing: tracks (1, T, N, 2)."""
    grey = torch.zeros(1, 3, height, width)
    votes = votes_of(OneThing()(grey), start, height, width)
    return way_back(tracks, visible, start, votes, height, width)


def test_what_a_square_shows_of_frame_0_lies_where_its_track_leads_back():
    """Track 0 stands still in the upper left, track 1 goes by (5, -9) in the lower right."""
    start = torch.tensor([[3.0, 2.0], [42.0, 30.0]])
    end = torch.tensor([[3.0, 2.0], [47.0, 21.0]])
    tracks = torch.stack([start, end])[None]                    # (B, T, N, 2)
    visible = torch.ones(1, 2, 2).bool()
    ways = in_one_thing(tracks, visible, start[None], 32, 48)
    image = numbered_pixels()
    before = image[0, 0]
    video = warp(image, ways.back)
    after = video[0, 0, 1]
    assert_near(after[17, 47], before[26, 42], 1e-5)
    assert_near(after[:8, :8], before[:8, :8], 1e-5)            # what stays
    assert_near(after[28:, 40:], before[28:, 40:], 1e-5)        # would come from below the picture
    assert ways.distance[0, 1, 14, 20:].isinf().all()
    assert ways.distance[0, 1, 8, 20:].isfinite().all()


def test_a_square_far_from_all_tracks_rests():
    start = torch.tensor([[[10.0, 63.0]]])
    tracks = (start + torch.tensor([8.0, 0]))[None]             # (1, 1, 1, 2)
    visible = torch.ones(1, 1, 1).bool()
    ways = in_one_thing(tracks, visible, start, 128, 128)
    row = ways.back[0, 0, 31]                                   # squares centred at y = 63
    near = row[:, 0] == -8
    centres = torch.arange(1, 128, 2)
    expected = (centres - 18).abs() <= REACH
    expected &= centres >= 9                                    # the rest would come from outside
    assert near.equal(expected)
    assert (row[~near] == 0).all()
    assert ways.distance[0, 0, 31][~near].isinf().all()
    assert (ways.belongs[0, 0, 31][~near] == -SURE).all()
    assert (ways.unlike[0, 0, 31][~near] == 0).all()
    left = ways.gone[0, 0, 31] > 0
    assert left.equal((centres - 10).abs() <= REACH), "what it takes along leaves a hole"
    moves, visible = moves_and_visible(start[0], start[0] + 1)
    votes = votes_of(OneThing()(torch.zeros(1, 3, 128, 128)), start, 128, 128)
    assert left_behind(moves, visible, votes).max() < 0, "which a pixel does not"


def test_what_lies_between_pixels_is_interpolated():
    image = numbered_pixels()
    half = torch.full((1, 1, 16, 24, 2), 0.5)
    frame = warp(image, half)[:, :, 0]
    four = image[0, 0, 5:7, 5:7]
    assert_near(frame[0, 0, 5, 5], four.mean(), 1e-5)


def grid_of_25():
    """Points 8 pixels apart in a picture of 48 x 48 pixels, (1, 25, 2), all of them visible."""
    axis = torch.arange(8.0, 41, 8)
    return torch.cartesian_prod(axis, axis)[None], torch.ones(1, 1, 25).bool()


def test_squares_of_what_turns_move_smoothly():
    start, visible = grid_of_25()
    turn = torch.tensor([[0.98, 0.2], [-0.2, 0.98]])            # 11.5 degrees
    turned = (start - 24) @ turn + 24
    back = in_one_thing(turned[:, None], visible, start, 48, 48).back
    place = square_centres(48, 48, "cpu")
    before = (place - 24) @ turn.inverse() + 24
    error = place + back[0, 0] - before
    error = error[4:20, 4:20].norm(dim=-1)                      # between the points
    assert error.max() < 1.0, error.max()
    assert error.mean() < 0.4, error.mean()


def test_a_thing_that_turns_or_grows_belongs_to_all_its_tracks():
    axis = torch.arange(4.0, 128, 16)
    start = torch.cartesian_prod(axis, axis)
    votes = votes_of(OneThing()(torch.zeros(1, 3, 128, 128)), start[None], 128, 128)
    turn = torch.tensor([[0.985, 0.174], [-0.174, 0.985]])      # 10 degrees
    for changed in (start - 64) @ turn + 64, (start - 64) * 1.15 + 64:
        moves, visible = moves_and_visible(start, changed)
        odds = belonging(moves, visible, start[None], votes)[0, 0]
        near = votes.yes[0] > 0.5
        assert odds[near].min() > 0, odds[near].min()
        assert odds[near].median() > 0.5, odds[near].median()


def test_squares_never_move_with_a_mean_of_what_moves_differently():
    start, visible = grid_of_25()
    moves = torch.zeros(25, 2)
    moves[:10] = torch.tensor([20.0, 0])                        # two columns leave
    tracks = start + moves
    back = in_one_thing(tracks[:, None], visible, start, 48, 48).back
    for row in back[0, 0]:
        ways = [tuple(way) for way in row.round(decimals=2).tolist()]
        assert len(set(ways)) <= 2, ways


def test_unknown_pixels_are_filled_in_from_known_ones_around_them():
    """A ramp with a hole stays about a ramp, whatever was in the hole, in every frame for itself."""
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 2, 20, 32).clone()
    ramp[:, :, 1] *= -1
    known = torch.ones(1, 1, 2, 20, 32)
    known[..., 5:15, 10:22] = 1e-4
    spoilt = torch.where(known == 1, ramp, 9.0)
    filled = fill_in(spoilt, known)
    assert filled.shape == ramp.shape
    assert filled[known.expand_as(filled) == 1].equal(ramp[known.expand_as(filled) == 1])
    error = (filled - ramp).abs()
    assert error.max() < 0.3, error.max()
    nothing = fill_in(spoilt, torch.full_like(known, 1e-4))     # of no frame is anything known
    assert nothing.isfinite().all()


def picture_of_thing(start, now, image=WITH_THING):
    """moved_picture of one frame, if all tracks are seen: (3, 64, 64), (SIGNALS, 32, 32)."""
    visible = torch.ones(1, 1, len(now)).bool()
    video, signals = moved_picture(ByColour()(image), image, now[None, None], visible, start[None])
    return video[0, :, 0], signals[0, :, 0]


def test_a_dragged_thing_is_moved_and_the_ground_closes_behind_it():
    """By its own track alone, and with tracks of the ground."""
    truth = torch.full((3, 64, 64), -1.0)
    truth[:, 24:40, 32:48] = 1
    for ground in ON_BLACK[:0], ON_BLACK:
        start = torch.cat([ON_THING, ground])
        now = torch.cat([ON_THING + RIGHT, ground])
        video, signals = picture_of_thing(start, now)
        wrong = (video[0] - truth[0]).abs() > 0.5
        assert wrong.sum() < 70, wrong.sum()                    # its rim is 64 pixels long
        assert (video[:, 26:38, 34:46] > 0.95).all()
        assert (video[:, 26:38, 10:22] < -0.9).all(), "where it was, there is ground"
        near, near_32, belongs, gone, moved, filled = signals
        new, old = squares_of_thing(left=16), squares_of_thing(left=4)
        assert belongs[new].min() > 0.5
        assert moved[new].min() > 0.7
        assert gone[old].min() > 0.5 > gone[~old].max()
        assert filled[old].min() > (0.5 if len(ground) == 0 else -1)
        assert filled[~old].max() < 0.5
        assert near[15:17, 19:21].min() > 0.6                   # round the track
        assert (near_32 >= near).all()
        assert signals.min() >= 0 and signals.max() <= 1


def test_what_comes_into_the_picture_is_filled_in():
    """A camera moves by 16 pixels: the left quarter was not in frame 0."""
    axis = torch.arange(4.0, 64, 8)
    start = torch.cartesian_prod(axis, axis)
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    visible = (start[:, 0] + 16 < 64)[None, None]
    now = start + torch.tensor([16.0, 0])
    embedding = OneThing()(image)
    video, signals = moved_picture(embedding, image, now[None, None], visible, start[None])
    assert_near(video[0, :, 0, :, 20:], image[0, :, :, 4:48], 0.05)
    assert (video[0, :, 0, :, :12] < -0.6).all(), "as its edge, not as what was at this place"
    filled = signals[0, 5, 0]
    assert filled[:, :6].min() > 0.9
    assert filled[:, 12:].max() < 0.1


# --------------------------------------------------------------------------------------------------
# The model.

def test_a_fresh_teacher_believes_its_copies_and_where_there_are_none_the_image():
    torch.manual_seed(0)
    config = replace(COPYING, causal=False)
    model = CopyingMotionStream(config).eval().requires_grad_(False)
    x = rand(2, 4, 3, 4, 6)
    tracks = rand(2, 8, 3, 4, 6, seed=3)
    copies = rand(2, 4 + SIGNALS, 3, 4, 6, seed=1)
    image = rand(2, 4, 1, 4, 6, seed=2)
    ones = torch.ones(2)

    def x0(**given):
        return to_x0(x, model(x, ones, **given), ones)

    moved = copies[:, :4]
    filled = copies[:, -1:]
    shown = (1 - filled) * image + filled * moved               # no image where it was filled in
    both = x0(tracks=tracks, copies=copies, image=image)
    assert_near(both, 0.8 * moved + 0.2 * shown, 1e-5)
    alone = x0(copies=copies)
    assert_near(alone, (0.8 + 0.2 * filled) * moved, 1e-5)
    without = x0(tracks=tracks, image=image)
    still = image.expand_as(x)
    assert_near(without, 0.2 * still, 1e-5)
    no_copies = x0(tracks=tracks, image=image, copies=torch.zeros_like(copies))
    assert no_copies.equal(without), "None is zeros"
    text = "condition copies (2, 8, 3, 4, 6), expected (2, 10,"
    assert_error(AssertionError, text, model, x, ones, copies=tracks)
    text = "condition image (2, 4, 3, 4, 6), expected (2, 4, 1,"
    assert_error(AssertionError, text, model, x, ones, image=still)
    model.config = replace(COPYING, latent_std=())
    assert_error(AssertionError, "latent_std", model, x, ones)


def variance_of_x_t(sigma, std):
    """Of latents with that standard deviation, noised."""
    return ((1 - sigma) * std) ** 2 + sigma ** 2


def test_a_copying_model_is_a_motionstream_inside_the_linear_part():
    """Its image slot holds copies, then the image; its head two more channels, the weights."""
    for causal in (False, True):
        model = new_model(**vars(replace(COPYING, causal=causal)))
        plain = randomised(MotionStream(replace(COPYING, copies=False)))
        plain.head = model.head
        plain.load_state_dict(model.state_dict())
        noise, given, _ = clip_of(3, COPYING)
        copies = rand(2, 4 + SIGNALS, 3, 4, 6, seed=8)
        image = rand(2, 4, 1, 4, 6, seed=9)
        still = image.expand(-1, -1, 3, -1, -1)
        sigma = torch.tensor([0.9, 0.4])
        s = sigma.view(2, 1, 1, 1, 1)
        std = torch.tensor(COPYING.latent_std).view(1, -1, 1, 1, 1)
        size = variance_of_x_t(s, std).sqrt()
        channels = torch.cat([copies, still], 1)
        output = plain(noise / size, sigma, **given, image=channels)
        drawn, of_moved, of_still = output.split([4, 1, 1], 1)
        assert of_still.min() < -0.1 and of_still.max() > 1.1   # both ends of the gate are reached
        at_rest = of_still.maximum(torch.zeros(())).minimum(torch.ones(()))
        correction = (1 - at_rest) * drawn                      # what rests is not drawn again
        if causal:
            weights, kept = sharpened(torch.cat([of_moved, of_still], 1))
            of_moved, of_still = weights[:, :1], weights[:, 1:]
            correction = kept * correction
        latents = copies[:, :4]                                 # and six signals
        filled = copies[:, 9:]
        mean = of_moved * latents + of_still * ((1 - filled) * still + filled * latents)
        spread = 0.1 * std                                      # of a Gaussian round that mean
        gain = (1 - s) * spread ** 2 / variance_of_x_t(s, spread)
        x0 = mean + gain * (noise - (1 - s) * mean)
        expected = (noise - x0) / s + std / size * correction
        found = model(noise, sigma, **given, copies=copies, image=image)
        assert_near(found, expected, 1e-5)


def test_the_largest_of_a_students_weights_counts_for_more():
    """Each row: weights of the moved and the still copy, then the same sharpened; what the first
    two leave of 1 takes part."""
    rows = torch.tensor([
        [0.7, 0.3, 49 / 58, 9 / 58],
        [0.5, 0.5, 0.5, 0.5],
        [0.5, 0.0, 0.5, 0.0],
        [0.2, 0.2, 0.04 / 0.44, 0.04 / 0.44],
        [0.6, 0.2, 36 / 44, 4 / 44],
        [0.9, 0.4, 81 / 97, 16 / 97],
        [1.7, -0.4, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0]])
    kept = torch.tensor([0, 0, 1, 1, 0.2 / 0.44, 0, 0, 1])       # of what is drawn, never more
    weights, factor = sharpened(rows[:, :2, None, None, None])
    assert_near(weights.flatten(1), rows[:, 2:], 1e-6)
    assert_near(factor.flatten(), kept, 1e-6)


def test_sharpened_weights_have_gradients():
    """Finite at the corners too."""
    rows = torch.tensor([[0.6, 0.2], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.7, -0.4]])
    weights = rows[:, :, None, None, None].requires_grad_()
    shown, kept = sharpened(weights)
    of_moved, = torch.autograd.grad(shown[:, 0].sum(), weights, retain_graph=True)
    of_drawn, = torch.autograd.grad(kept.sum(), weights)
    assert of_moved.isfinite().all() and of_drawn.isfinite().all()
    assert of_moved[0, 0] > 0 > of_moved[0, 1]
    assert (of_drawn[0] < 0).all()


def posterior_velocity(x_t, sigma, mean, std):
    """E[velocity | x_t] where x0 ~ N(mean, std²) and noise ~ N(0, 1)."""
    mix = torch.tensor([[1 - sigma, sigma], [-1, 1]]).double()      # (x0, noise) to (x_t, velocity)
    variances = torch.tensor([std ** 2, 1]).double()
    covariance = mix @ torch.diag(variances) @ mix.T
    slope = covariance[1, 0] / covariance[0, 0]
    from_mean = x_t - (1 - sigma) * mean
    return slope.item() * from_mean - mean


def test_the_linear_part_is_the_posterior_mean_of_gaussian_latents():
    """Of latents about what is expected. The less x_t varies, the more the output counts."""
    std = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1, 1)
    sigma = torch.tensor([[0.0, 0.1, 0.5, 0.9], [1.0, 0.99, 0.3, 0.7]])
    x_t = rand(2, 3, 4, 2, 2, seed=1)
    mean = rand_like(x_t)
    zero = torch.zeros_like(x_t)
    given = with_linear_part(zero, x_t, sigma, std, mean)
    of_output = with_linear_part(zero + 1, x_t, sigma, std, mean) - given
    _, found_variance = linear_part(sigma, std)
    places = itertools.product(range(2), range(3), range(4))
    for place in places:
        b, c, f = place
        s = sigma[b, f].item()
        d = std[0, c].item()
        expected = posterior_velocity(x_t[place], s, mean[place], 0.1 * d)
        assert_near(given[place], expected, 1e-5)
        variance = variance_of_x_t(s, d)                        # over all clips
        assert abs(found_variance[place].item() - variance) < 1e-5
        factor = torch.full((2, 2), d / variance ** 0.5)
        assert_near(of_output[place], factor, 1e-4)


def test_what_a_copying_model_is_given_in_another_shape_is_refused():
    model = new_model(**vars(COPYING))
    x, _, first = clip_of(3, COPYING)
    sigma = torch.ones(2)
    points, _, _ = new_tracks(9, 8)
    for name, value, said in (
            ("tracks", points, "see track_features: (2, 9, 8, 2), expected (2, 8, 3, 4, 6)"),
            ("copies", rand(2, 4, 3, 4, 6), "copies (2, 4, 3, 4, 6), expected (2, 10, 3, 4, 6)"),
            ("image", x, "condition image (2, 4, 3, 4, 6), expected (2, 4, 1, 4, 6)")):
        assert_error(AssertionError, said, model, x, sigma, **{name: value})
    other = new_model(**vars(COPYING) | {"in_dim": 30})         # the image has 4 channels, not 8
    said = "26 input channels, in_dim is 30"
    assert_error(AssertionError, said, other, x, sigma, image=first)


def test_copying_models_stream_and_later_copies_do_not_change_past_frames():
    model = new_model(**vars(COPYING))
    noise, given, first = clip_of(8, COPYING)
    given["image"] = first
    given["copies"] = rand(2, 10, 8, 4, 6, seed=6)
    one = list(rollout(model, noise, given, first, rng=seeded()))
    for x0, length in zip(one, (3, 3, 2), strict=True):
        assert x0.shape[2] == length
        assert x0.isfinite().all()
    copies = given["copies"].clone()
    copies[:, :, 6:] = 0                                        # of the last chunk
    other = given | {"copies": copies}
    two = rollout(model, noise, other, first, rng=seeded())
    same = [a.equal(b) for a, b in zip(one, two)]
    assert same == [True, True, False]


def test_copying_models_stream_with_a_first_chunk_of_another_size():
    """Shorter or longer than the others: the image is the same in every chunk."""
    noise, given, first = clip_of(8, COPYING)
    given["image"] = first
    given["copies"] = rand(2, 10, 8, 4, 6, seed=6)
    for size, sizes in (1, [1, 3, 3, 1]), (5, [5, 3]):
        model = new_model(**vars(COPYING) | {"first_chunk": size})
        found = list(rollout(model, noise, given, first, rng=seeded()))
        assert [x0.shape[2] for x0 in found] == sizes
        parts = []
        for tracks, copies in zip(given["tracks"].split(sizes, 2), given["copies"].split(sizes, 2)):
            parts.append(given | {"tracks": tracks, "copies": copies})
        expected = rollout(model, noise.split(sizes, 2), parts, first, rng=seeded())
        assert all_equal(found, list(expected))


def test_the_image_of_a_copying_model_is_one_frame_however_long_the_chunk():
    image = rand(2, 4, 1, 4, 6)
    for frames in 1, 3, 7:
        channels, _ = image_inputs(COPYING, image, frames)
        assert channels.equal(image)
    given = {"image": image, "copies": rand(2, 16, 4, 4, 6)}
    parts = list(split_conditions(given, [1, 3]))
    assert [part["copies"].shape[2] for part in parts] == [1, 3]
    assert all(part["image"].equal(image) for part in parts)
