"""Copies along tracks and the linear part of the velocity, which are not the paper's."""

import heapq
import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from extras.testing import (COPYING, SMALL, all_equal, assert_error, assert_near, clip_of,
                            linear_vae, new_model, new_tracks, rand, rand_like, randomised,
                            seeded)
from motionstream import (FAR, REACH, CopyingMotionStream, MotionStream, copy_along_tracks,
                          gone_elsewhere, image_inputs, linear_part, motion_inputs,
                          nearest_points, path_lengths, rollout, sharpened, split_conditions,
                          square_centres, start_points, to_x0, track_features, warp, way_back,
                          with_linear_part)

# --------------------------------------------------------------------------------------------------
# Copies.

SIDE = 64


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
    vae = linear_vae()
    video, tracks, visible = pan(frames, speed)
    image = video[:, :, 0]
    order = torch.randperm(tracks.shape[2], generator=seeded())     # which must not matter
    tracks = tracks[:, :, order]
    visible = visible[:, :, order]
    start = start_points(tracks, visible)
    copied = copy_along_tracks(vae, image, tracks, visible, start)
    latents = vae.encode(video)
    _, C, frames, h, w = latents.shape
    assert copied.shape == (1, C + 12, frames, h, w)
    copies = copied[:, :C]
    part = latents[..., left:right]
    assert_near(copies[..., left:right], part, 1e-5)
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
    vae = linear_vae()
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
    vae = linear_vae()
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
    latents, near, gone = copied.split([4, 4, 8], 1)
    still = image.expand_as(latents)
    assert_near(latents, still, 1e-6)
    assert (near[:, :, 0] == 1).all()                           # near in frame 0, then nowhere
    assert not near[:, :, 1:].any()
    assert not gone.any()


def even_tracks(tracks, visible):
    """Which tracks have even numbers, (N,), and these tracks alone."""
    even = torch.arange(tracks.shape[2]) % 2 == 0
    return even, tracks[:, :, even], visible[:, :, even]


def assert_same_copies(found, expected):
    """Of two tracks that are as near, either may be followed: their signals differ a little."""
    latents, signals = found.split([4, 12], 1)
    expected_latents, expected_signals = expected.split([4, 12], 1)
    assert_near(latents, expected_latents, 1e-3)
    assert_near(signals, expected_signals, 0.05)


def test_hidden_tracks_copy_nothing():
    vae = linear_vae()
    video, tracks, visible = pan(9)
    image = video[:, :, 0]
    even, tracks_left, visible_left = even_tracks(tracks, visible)
    start_left = start_points(tracks_left, visible_left)
    expected = copy_along_tracks(vae, image, tracks_left, visible_left, start_left)
    shown = visible & even
    elsewhere = tracks.masked_fill(~shown[..., None], 7.0)      # wherever the hidden ones are
    found = copy_along_tracks(vae, image, elsewhere, shown, start_points(elsewhere, shown))
    assert_same_copies(found, expected)


def test_a_track_that_was_not_seen_in_frame_0_copies_nothing():
    vae = linear_vae()
    video, tracks, visible = pan(9)
    image = video[:, :, 0]
    even, tracks_left, visible_left = even_tracks(tracks, visible)
    start = start_points(tracks, visible)
    expected = copy_along_tracks(vae, image, tracks_left, visible_left, start[:, even])
    nowhere = start.masked_fill(~even[:, None], math.nan)
    assert_same_copies(copy_along_tracks(vae, image, tracks, visible, nowhere), expected)


def test_motion_inputs_are_features_and_of_a_copying_model_copies():
    vae = linear_vae()
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
    assert centres.shape == (8, 12, 2)
    assert centres[7, 10].tolist() == [42, 30]
    tracks = torch.tensor([[3.0, 2.0], [42.0, 30.0]]).expand(1, 2, -1, -1)
    visible = torch.ones(1, 2, 2).bool()
    visible[0, 1, 0] = False                                    # track 0 in the second frame
    places = centres.expand(1, 2, -1, -1, -1)
    index, distance = nearest_points(places, tracks, visible, 2)
    assert index.shape == (1, 2, 8, 12, 2)
    assert distance.shape == (1, 2, 8, 12, 2)
    first, second = index[0]                                    # of each frame
    assert first[0, 0].tolist() == [0, 1]
    assert first[7, 10].tolist() == [1, 0]
    assert (second[..., 0] == 1).all()
    first, second = distance[0]
    assert first[0, 0, 0] == 1                                  # from (2, 2), its centre
    assert first[7, 10, 0] == 0
    assert second[..., 1].isinf().all()


def numbered_pixels():
    """A picture (1, 3, 32, 48) in which each pixel is another."""
    numbers = torch.arange(32 * 48.0).view(32, 48)
    return numbers.expand(1, 3, 32, 48)


def change_of_colour(colour, here, there):
    """Mean absolute difference between two squares (y, x) of colour (3, rows, columns)."""
    difference = colour[:, here[0], here[1]] - colour[:, there[0], there[1]]
    return difference.abs().mean().item()


def shortest_paths(colour, begin):
    """By Dijkstra's algorithm, in float64: lengths (rows, columns) of the paths from a square
    (y, x). colour (3, rows, columns)."""
    _, rows, columns = colour.shape
    found = torch.full((rows, columns), -1.0).double()
    border = [(0.0, begin)]
    while border:
        length, here = heapq.heappop(border)
        if found[here] >= 0:
            continue
        found[here] = length
        y, x = here
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            there = (y + down, x + right)
            if there[0] in range(rows) and there[1] in range(columns):
                step = 4 * math.hypot(down, right)
                longer = 20 * change_of_colour(colour, here, there)
                heapq.heappush(border, (length + step + longer, there))
    return found


def test_paths_are_the_shortest_and_longer_where_colours_change():
    coarse = 0.3 * rand(2, 3, 8, 12).double()
    image = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    nowhere = [math.nan, math.nan]
    start = torch.tensor([[[3.0, 2.0], [42.5, 31.9]], [[0.0, 17.0], nowhere]])
    found = path_lengths(image.float(), start)
    assert found.shape == (2, 2, 8, 12)
    for clip, track, begin in (0, 0, (0, 0)), (0, 1, (7, 10)), (1, 0, (4, 0)):
        expected = shortest_paths(coarse[clip], begin)
        assert_near(found[clip, track].double(), expected, 1e-5)
    assert (found[1, 1] == FAR).all(), "no path from where nothing began"


def test_a_path_has_sixteen_squares_at_most():
    grey = torch.zeros(1, 3, 4, 80)
    start = torch.tensor([[[2.0, 2]]])
    lengths = path_lengths(grey, start)[0, 0, 0]
    assert_near(lengths[:17], 4.0 * torch.arange(17), 1e-6)
    assert (lengths[17:] == FAR).all()


# A white thing of 16 x 16 pixels on black ground, in a picture of 64 x 64 pixels. It moves to the
# right by 24 pixels, over the second of four tracks of the ground.
WITH_THING = torch.full((1, 3, 64, 64), -1.0)
WITH_THING[:, :, 24:40, 8:24] = 1
ON_THING = torch.tensor([[16.0, 32]])
ON_BLACK = torch.tensor([[30.0, 32], [44, 32], [16, 10], [16, 54]])
RIGHT = torch.tensor([24.0, 0])


def squares_of_thing(left):
    """True where the thing is if its first column of squares is `left`: (16, 16)."""
    squares = torch.zeros(16, 16).bool()
    squares[6:10, left:left + 4] = True
    return squares


def followed(image, start, now):
    """What way_back gives for one frame, if all tracks are seen: start (N, 2) and now (N, 2); back
    and how far the track is, (rows, columns, 2) each."""
    start = start[None]
    visible = torch.ones(1, 1, len(now)).bool()
    paths = path_lengths(image, start)
    back, far = way_back(now[None, None], visible, start, paths, *image.shape[2:])
    return back[0, 0], far[0, 0]


def assert_moves(back, move):
    """Each square has moved so, to 0.2 pixels: tracks that move otherwise weigh a little."""
    assert (back + move).abs().max() < 0.2, back


def test_a_square_follows_a_track_only_with_what_is_of_one_piece_with_it():
    """Beside the thing, its own track is nearest; what it would bring there is ground."""
    start = torch.cat([ON_THING, ON_BLACK])
    now = torch.cat([ON_THING + RIGHT, ON_BLACK])
    back, far = followed(WITH_THING, start, now)
    thing = squares_of_thing(left=8)
    assert_moves(back[thing], RIGHT)
    assert_moves(back[~thing], 0 * RIGHT)
    straight, along = far[6, 8]
    assert straight == 72 ** 0.5                                # from (34, 26) to (40, 32)
    assert_near(along, torch.tensor(8 * 2 ** 0.5), 1e-5)        # two squares, both slanting

    back, _ = followed(torch.zeros_like(WITH_THING), start, now)
    taken = back[..., 0] < -23
    assert taken.sum() > thing.sum(), "of one colour, it takes ground along"


def test_what_moves_unlike_the_rest_of_the_picture_is_in_front():
    """The thing is over a track of the ground that is still seen, nearer to some squares."""
    start = torch.cat([ON_THING, ON_BLACK])
    now = torch.cat([ON_THING + RIGHT, ON_BLACK])
    back, _ = followed(WITH_THING, start, now)
    assert_moves(back[squares_of_thing(left=8)], RIGHT)
    left = torch.tensor([-14.0, 0])                             # all but the thing, by a camera
    now = torch.cat([ON_THING, ON_BLACK + left])
    back, _ = followed(WITH_THING, start, now)
    assert_moves(back[squares_of_thing(left=2)], 0 * RIGHT)


def test_how_many_tracks_a_thing_has_does_not_put_it_behind():
    """Most of the picture is ground: what the one track of it does is what the picture does."""
    corners = torch.tensor([[-4.0, -4], [4, -4], [-4, 4], [4, 4], [0, 0]])
    on_thing = ON_THING + corners
    start = torch.cat([on_thing, ON_BLACK[1:2]])
    now = torch.cat([on_thing + RIGHT, ON_BLACK[1:2]])          # the thing hides the ground's track
    back, _ = followed(WITH_THING, start, now)
    assert_moves(back[squares_of_thing(left=8)], RIGHT)


def test_a_track_beyond_reach_takes_nothing_from_one_within():
    ground = torch.tensor([[1.0, 62], [1, 4], [1, 124], [95, 40], [95, 84], [117, 62]])
    thing = torch.tensor([[95.0, 62]])
    right = torch.tensor([3.0, 0])
    left = torch.tensor([-20.0, 0])
    now = torch.cat([ground + right, thing + left])
    grey = torch.zeros(1, 3, 128, 128)
    back, _ = followed(grey, torch.cat([ground, thing]), now)
    square = back[15, 8]                                        # 30 pixels from one, 41 from it
    assert_moves(square, right)


def test_what_is_far_away_takes_nothing_along_however_fast_it_is():
    start = torch.tensor([[8.0, 8], [56, 8], [8, 56], [56, 56]])
    now = start.clone()
    now[3] = torch.tensor([30.0, 16])                           # all others rest
    grey = torch.zeros(1, 3, 64, 64)
    back, _ = followed(grey, start, now)
    assert_moves(back[1:3, 1:3], 0 * RIGHT)                     # round (8, 8)
    assert_moves(back[3:5, 7], now[3] - start[3])


def gone_of_image(start, now):
    """gone_elsewhere of the image with the thing itself, (4, 16, 16): as in `followed`."""
    start = start[None]
    visible = torch.ones(1, 1, len(now)).bool()
    paths = path_lengths(WITH_THING, start)
    still = torch.zeros(1, 1, 16, 16, 2)
    return gone_elsewhere(still, now[None, None], visible, start, paths, 64, 64)[0, :, 0]


def test_what_has_gone_ends_where_its_colour_ends():
    straight, along, _, _ = gone_of_image(ON_THING, ON_THING + RIGHT)
    thing = squares_of_thing(left=2)                            # in frame 0
    assert straight[~thing].max() > 0.2
    assert along[thing].min() > 0.2
    assert along[~thing].max() < 0.02


def test_what_has_gone_is_told_along_a_path_where_another_track_is_nearer():
    """A track of the ground that rests beside the thing says nothing of the thing's edge."""
    start = torch.tensor([[10.0, 26], [28, 32]])
    now = torch.tensor([[34.0, 26], [28, 32]])
    gone = gone_of_image(start, now)
    straight, along, _, _ = gone[:, 8, 5]                       # (22, 34), the thing's right edge
    assert straight == 0
    assert along > 0.1


def on_grey(function, *given):
    """way_back or gone_elsewhere in a picture of one colour, where paths are as long as they look.
    given: their arguments but for the paths."""
    *points, start, height, width = given
    grey = torch.zeros(1, 3, height, width)
    return function(*points, start, path_lengths(grey, start), height, width)


def test_what_a_square_shows_of_frame_0_lies_where_its_track_leads_back():
    """Track 0 stands still in the upper left, track 1 goes by (5, -9) in the lower right."""
    start = torch.tensor([[3.0, 2.0], [42.0, 30.0]])
    end = torch.tensor([[3.0, 2.0], [47.0, 21.0]])
    tracks = torch.stack([start, end])[None]                    # (B, T, N, 2)
    visible = torch.ones(1, 2, 2).bool()
    back, far = on_grey(way_back, tracks, visible, start[None], 32, 48)
    image = numbered_pixels()
    before = image[0, 0]
    video = warp(image, back)
    after = video[0, 0, 1]
    assert_near(after[17, 47], before[26, 42], 1e-5)
    assert_near(after[:8, :8], before[:8, :8], 1e-5)            # what stays
    assert_near(after[28:, 40:], before[28:, 40:], 1e-5)        # would come from below the picture
    assert far[0, 1, 7, 10:].isinf().all()
    assert far[0, 1, 4, 10:].isfinite().all()


def test_a_square_far_from_all_tracks_rests():
    start = torch.tensor([[[10.0, 62.0]]])
    tracks = (start + torch.tensor([8.0, 0]))[None]             # (1, 1, 1, 2)
    visible = torch.ones(1, 1, 1).bool()
    back, far = on_grey(way_back, tracks, visible, start, 128, 128)
    row = back[0, 0, 15]                                        # squares centred at y = 62
    near = row[:, 0] == -8
    centres = torch.arange(2, 128, 4)
    expected = (centres - 18).abs() <= REACH
    expected &= centres >= 10                                   # the rest would come from outside
    assert near.equal(expected)
    assert (row[~near] == 0).all()
    assert far[0, 0, 15][~near].isinf().all()


def test_what_lies_between_pixels_is_interpolated():
    image = numbered_pixels()
    half = torch.full((1, 1, 8, 12, 2), 0.5)
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
    back, _ = on_grey(way_back, turned[:, None], visible, start, 48, 48)
    place = square_centres(48, 48, "cpu")
    before = (place - 24) @ turn.inverse() + 24
    error = place + back[0, 0] - before
    error = error[2:10, 2:10].norm(dim=-1)                      # between the points
    assert error.max() < 1.0, error.max()
    assert error.mean() < 0.4, error.mean()


def test_squares_never_move_with_a_mean_of_what_moves_differently():
    start, visible = grid_of_25()
    moves = torch.zeros(25, 2)
    moves[:10] = torch.tensor([20.0, 0])                        # two columns leave
    tracks = start + moves
    back, _ = on_grey(way_back, tracks[:, None], visible, start, 48, 48)
    for row in back[0, 0]:
        ways = [tuple(way) for way in row.round(decimals=2).tolist()]
        assert len(set(ways)) <= 2, ways


def moved_object():
    """An object that is 8 pixels wide moves 24 pixels to the right over a ground that stands still,
    in a picture of 48 x 32. Returns tracks (1, 1, N, 2) and visible of one frame, and start
    (1, N, 2): NaN where the object hid the ground."""
    ground = square_centres(32, 48, "cpu").flatten(0, 1)        # points 4 pixels apart
    hidden = under_object(ground, left=8)
    covered = under_object(ground, left=32)
    thing = ground[hidden]
    moved = thing + torch.tensor([24.0, 0])
    seen_ground = ground.masked_fill(hidden[:, None], math.nan)
    start = torch.cat([thing, seen_ground])
    tracks = torch.cat([moved, ground])
    shown = torch.ones(len(thing)).bool()
    visible = torch.cat([shown, ~covered])
    return tracks[None, None], visible[None, None], start[None]


def under_object(points, left):
    """Which of the points (N, 2) lie where the object is, 8 pixels high and wide."""
    x, y = points.unbind(-1)
    return (x > left) & (x < left + 8) & (y > 12) & (y < 20)


def test_an_object_leaves_its_first_place_and_the_ground_behind_it_is_not_taken_for_it():
    tracks, visible, start = moved_object()
    visible &= start.isfinite().all(2)
    back, _ = on_grey(way_back, tracks, visible, start, 32, 48)
    squares = square_centres(32, 48, "cpu")                     # (8, 12, 2)
    first_place = under_object(squares, left=8)
    new_place = under_object(squares, left=32)
    sure = on_grey(gone_elsewhere, back, tracks, visible, start, 32, 48)[0, 0, 0]   # (8, 12)
    assert sure[first_place].min() > 0.9
    assert sure[~first_place].max() < 0.5
    assert sure[new_place].max() < 1e-6                         # where it is, it is at home
    still = torch.zeros_like(back)                              # what the image itself shows
    sure = on_grey(gone_elsewhere, still, tracks, visible, start, 32, 48)[0, 0, 0]
    assert sure[first_place].min() > 0.9
    assert sure[:, 6:].max() < 0.3                              # it shows no object there


def test_copies_say_what_has_gone_elsewhere():
    tracks, visible, start = moved_object()
    tracks = tracks.expand(-1, 4, -1, -1)
    visible = visible.expand(-1, 4, -1)
    copies = copy_along_tracks(linear_vae(), rand(1, 3, 32, 48), tracks, visible, start)
    assert copies.shape == (1, 4 + 12, 1, 4, 6)
    _, moved, still = copies[0, :, 0].split([8, 4, 4])          # (4, 4, 6), of cells of 8 pixels
    near = moved[0]
    assert near.max() == near[1:3, 1].max()                     # where the object was
    there = still[:, 1:3, 1]
    assert there.min() > 0.3
    right = still[:, :, 3:]
    assert right.max() < 0.3


# --------------------------------------------------------------------------------------------------
# The model.

def test_a_fresh_teacher_believes_its_copies_and_where_there_are_none_the_image():
    torch.manual_seed(0)
    config = replace(COPYING, causal=False)
    model = CopyingMotionStream(config).eval().requires_grad_(False)
    x = rand(2, 4, 3, 4, 6)
    tracks = rand(2, 8, 3, 4, 6, seed=3)
    copies = rand(2, 16, 3, 4, 6, seed=1)
    image = rand(2, 4, 1, 4, 6, seed=2)
    ones = torch.ones(2)

    def x0(**given):
        return to_x0(x, model(x, ones, **given), ones)

    moved = copies[:, :4]
    both = x0(tracks=tracks, copies=copies, image=image)
    assert_near(both, 0.8 * moved + 0.2 * image, 1e-5)
    alone = x0(copies=copies)
    assert_near(alone, 0.8 * moved, 1e-5)
    without = x0(tracks=tracks, image=image)
    still = image.expand_as(x)
    assert_near(without, 0.2 * still, 1e-5)
    no_copies = x0(tracks=tracks, image=image, copies=torch.zeros_like(copies))
    assert no_copies.equal(without), "None is zeros"
    text = "condition copies (2, 8, 3, 4, 6), expected (2, 16,"
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
        copies = rand(2, 16, 3, 4, 6, seed=8)
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
        latents = copies[:, :4]                                 # and twelve of confidence
        mean = of_moved * latents + of_still * still
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
            ("copies", rand(2, 4, 3, 4, 6), "copies (2, 4, 3, 4, 6), expected (2, 16, 3, 4, 6)"),
            ("image", x, "condition image (2, 4, 3, 4, 6), expected (2, 4, 1, 4, 6)")):
        assert_error(AssertionError, said, model, x, sigma, **{name: value})
    other = new_model(**vars(COPYING) | {"in_dim": 36})         # the image has 4 channels, not 8
    said = "32 input channels, in_dim is 36"
    assert_error(AssertionError, said, other, x, sigma, image=first)


def test_copying_models_stream_and_later_copies_do_not_change_past_frames():
    model = new_model(**vars(COPYING))
    noise, given, first = clip_of(8, COPYING)
    given["image"] = first
    given["copies"] = rand(2, 16, 8, 4, 6, seed=6)
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
    given["copies"] = rand(2, 16, 8, 4, 6, seed=6)
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
