"""Copies along tracks and the linear part of the velocity, which are not the paper's."""

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from extras.testing import (COPYING, SMALL, assert_error, assert_near, clip_of,
                            linear_vae, new_model, new_tracks, rand, rand_like, randomised,
                            seeded)
from motionstream import (CopyingMotionStream, MotionStream, add_noise, copy_along_tracks,
                          linear_part, motion_inputs, nearest_track, rollout, start_points, to_x0,
                          track_features, warp_along_tracks, with_linear_part)

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
    """The copies are the latents of the moved picture, from column `left` to column `right` of 8:
    those whose window, 4 pixels wider than the cell, shows nothing that has come into the picture."""
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
    assert copied.shape == (1, C + 2, frames, h, w)
    copies = copied[:, :C]
    part = latents[..., left:right]
    assert_near(copies[..., left:right], part, 1e-5)
    moved = part[:, :, 1:] - part[:, :, :1]
    assert moved.abs().mean() > 0.05, "nothing has moved"
    first = latents[:, :, 0]                                    # the image itself, whatever is copied
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
    latents, near = copied.split([4, 2], 1)
    assert_near(latents, image.expand_as(latents), 1e-6)
    assert (near[:, :, 0] == 1).all()                           # near in frame 0, then nowhere
    assert not near[:, :, 1:].any()


def test_hidden_tracks_copy_nothing():
    vae = linear_vae()
    video, tracks, visible = pan(9)
    image = video[:, :, 0]
    start = start_points(tracks, visible)
    even = torch.arange(tracks.shape[2]) % 2 == 0
    half = visible & even
    tracks_left = tracks[:, :, even]
    visible_left = visible[:, :, even]
    expected = copy_along_tracks(vae, image, tracks_left, visible_left, start[:, even])
    elsewhere = tracks.where(half[..., None], torch.tensor(7.0))
    found = copy_along_tracks(vae, image, elsewhere, half, start)
    assert found.equal(expected)                                # wherever the hidden ones are


def test_motion_inputs_are_features_and_of_a_copying_model_copies():
    vae = linear_vae()
    image = rand(2, 3, 32, 48).clamp(-1, 1)
    tracks, visible, ids = new_tracks(9, 5)
    start = start_points(tracks, visible)
    points = {"tracks": tracks, "visible": visible, "ids": ids}
    plain = new_model(**vars(SMALL))
    features = track_features(plain, tracks, visible, ids)
    inputs = motion_inputs(plain, **points, start=start, image=image, vae=vae)
    assert inputs.keys() == {"tracks"}
    assert inputs["tracks"].equal(features)

    copying = new_model(**vars(COPYING))
    features = track_features(copying, tracks, visible, ids)
    copies = copy_along_tracks(vae, image, tracks, visible, start)
    inputs = motion_inputs(copying, **points, start=start, image=image, vae=vae)
    assert inputs.keys() == {"tracks", "copies"}
    assert inputs["tracks"].equal(features)
    assert inputs["copies"].equal(copies)
    assert_error(AssertionError, "see start_points", motion_inputs, copying, **points)


def test_a_square_follows_the_visible_track_nearest_to_its_centre():
    tracks = torch.tensor([[3.0, 2.0], [42.0, 30.0]]).expand(1, 2, -1, -1)
    visible = torch.tensor([[[True, True], [False, True]]])
    number, distance = nearest_track(tracks, visible, 32, 48)
    assert number.shape == (1, 2, 8, 12)
    assert distance.shape == (1, 2, 8, 12)
    first, second = number[0]                                   # of each frame
    assert first[0, 0] == 0
    assert first[7, 10] == 1
    assert (second == 1).all()                                  # the other one is hidden there
    far = distance[0, 0]
    assert far[0, 0] == 1                                       # from (2, 2), its centre
    assert far[7, 10] == 0


def test_a_square_shows_what_its_track_has_brought_along():
    """Track 0 stands still in the upper left, track 1 goes by (5, -9) in the lower right."""
    start = torch.tensor([[3.0, 2.0], [42.0, 30.0]])
    end = torch.tensor([[3.0, 2.0], [47.0, 21.0]])
    tracks = torch.stack([start, end])[None]                    # (B, T, N, 2)
    visible = torch.ones(1, 2, 2).bool()
    image = torch.arange(32 * 48.0).expand(3, -1).view(1, 3, 32, 48)
    video, distance = warp_along_tracks(image, tracks, visible, start[None])
    before = image[0, 0]
    after = video[0, 0, 1]
    assert after[17, 47] == before[26, 42]
    kept = before == after
    assert kept[:8, :8].all()
    assert kept[28:, 40:].all()                                 # would come from below the picture
    far = distance[0, 1]
    assert far[7, 10:].isinf().all()
    assert far[4, 10:].isfinite().all()


# --------------------------------------------------------------------------------------------------
# The model.

def test_a_fresh_model_believes_its_copies_and_where_there_are_none_the_image():
    torch.manual_seed(0)
    model = CopyingMotionStream(COPYING).eval().requires_grad_(False)
    x = rand(2, 4, 3, 4, 6)
    tracks = rand(2, 8, 3, 4, 6, seed=3)
    copies = rand(2, 6, 3, 4, 6, seed=1)
    image = rand_like(x, seed=2)
    ones = torch.ones(2)

    def x0(**given):
        return to_x0(x, model(x, ones, **given), ones)

    moved = copies[:, :4]
    both = x0(tracks=tracks, copies=copies, image=image)
    assert_near(both, 0.8 * moved + 0.2 * image, 1e-5)
    alone = x0(copies=copies)
    assert_near(alone, 0.8 * moved, 1e-5)
    without = x0(tracks=tracks, image=image)
    assert without.abs().max() < 1e-6                           # the mean, 0
    text = "condition copies (2, 8, 3, 4, 6), expected (2, 6,"
    assert_error(AssertionError, text, model, x, ones, copies=tracks)
    model.config = replace(COPYING, latent_std=())
    assert_error(AssertionError, "latent_std", model, x, ones)


def variance_of_x_t(sigma, std):
    """Of latents with that standard deviation, noised."""
    return ((1 - sigma) * std) ** 2 + sigma ** 2


def test_a_copying_model_is_a_motionstream_inside_the_linear_part():
    """Its image slot holds copies, then the image; its head the spread and the shares too."""
    model = new_model(**vars(COPYING))
    plain = randomised(MotionStream(COPYING))
    plain.head = model.head
    plain.load_state_dict(model.state_dict())
    noise, given, _ = clip_of(3, COPYING)
    copies = rand(2, 6, 3, 4, 6, seed=8)
    image = rand(2, 4, 3, 4, 6, seed=9)
    sigma = torch.tensor([0.9, 0.4])
    s = sigma.view(2, 1, 1, 1, 1)
    std = torch.tensor(COPYING.latent_std).view(1, -1, 1, 1, 1)
    size = variance_of_x_t(s, std).sqrt()
    channels = torch.cat([copies, image], 1)
    output = plain(noise / size, sigma, **given, image=channels)
    correction, log_spread, moved, still = output.split([4, 4, 1, 1], 1)
    latents = copies[:, :4]                                     # and two of nearness
    mean = moved * latents + still * image
    spread = std * log_spread.clamp(-6, 2).exp()                # of a Gaussian round that mean
    gain = (1 - s) * spread ** 2 / variance_of_x_t(s, spread)
    x0 = mean + gain * (noise - (1 - s) * mean)
    expected = (noise - x0) / s + std / size * correction
    found = model(noise, sigma, **given, copies=copies, image=image)
    assert_near(found, expected, 1e-5)


def three_channels():
    """(std (1, 3, 1, 1, 1), x_t and a mean (2, 3, 4, 2, 2))."""
    std = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1, 1)
    x_t = rand(2, 3, 4, 2, 2, seed=1)
    return std, x_t, rand_like(x_t)


def test_the_spread_says_how_much_of_the_noise_is_believed():
    """Near the copies there is little of x_t in x0; by default the spread is the latents' own."""
    std, x_t, mean = three_channels()
    zero = torch.zeros_like(x_t)
    sigma = torch.tensor([0.8, 0.2])

    def velocity(spread):
        return with_linear_part(zero, x_t, sigma, std, mean, spread)

    certain = to_x0(x_t, velocity(1e-6 * std + zero), sigma)
    assert_near(certain, mean, 1e-5)
    blank = to_x0(x_t, velocity(1e6 * std + zero), sigma)
    assert_near(add_noise(blank, zero, sigma), x_t, 1e-4)       # whatever the mean
    assert velocity(std + zero).equal(velocity(None))


def posterior(sigma, std):
    """Of x0 ~ N(0, std²) and noise ~ N(0, 1): the slope of E[velocity | x_t] in x_t, the variance
    of the velocity that is left, and that of x_t."""
    mix = torch.tensor([[1 - sigma, sigma], [-1, 1]]).double()      # (x0, noise) to (x_t, velocity)
    variances = torch.tensor([std ** 2, 1]).double()
    covariance = mix @ torch.diag(variances) @ mix.T
    of_x_t, both, _, of_velocity = covariance.flatten()
    slope = both / of_x_t
    left = of_velocity - slope * both
    return slope, left, of_x_t


def test_the_linear_part_is_the_posterior_mean_of_gaussian_latents():
    std, x_t, mean = three_channels()
    zero = torch.zeros_like(x_t)
    sigma = torch.tensor([[0.0, 0.1, 0.5, 0.9], [1.0, 0.99, 0.3, 0.7]])
    given = with_linear_part(zero, x_t, sigma, std, mean)
    of_output = with_linear_part(zero + 1, x_t, sigma, std, mean) - given
    _, found_variance = linear_part(sigma, std)
    places = itertools.product(range(2), range(3), range(4))
    for place in places:
        b, c, f = place
        s = sigma[b, f].item()
        d = std[0, c].item()
        slope, left, variance = posterior(s, d)
        from_mean = x_t[place] - (1 - s) * mean[place]
        expected = slope * from_mean - mean[place]
        assert_near(given[place], expected.float(), 1e-5)
        target = of_output[place].square().mean()
        assert abs(target - left) < 1e-5, "the network's target has variance 1"
        assert abs(found_variance[place] - variance) < 1e-5
    without_mean = with_linear_part(zero, x_t, sigma, std)
    mean_zero = with_linear_part(zero, x_t, sigma, std, zero)
    assert without_mean.equal(mean_zero)


def test_copying_models_stream_and_later_copies_do_not_change_past_frames():
    model = new_model(**vars(COPYING))
    noise, given, first = clip_of(8, COPYING)
    given["image"] = first.expand(-1, -1, 8, -1, -1)
    given["copies"] = rand(2, 6, 8, 4, 6, seed=6)
    one = list(rollout(model, noise, given, first, rng=seeded()))
    for x0, length in zip(one, (3, 3, 2), strict=True):
        assert x0.shape[2] == length
        assert x0.isfinite().all()
    copies = given["copies"].clone()
    copies[:, :, 6:] = 0                                        # of the last chunk
    given["copies"] = copies
    two = rollout(model, noise, given, first, rng=seeded())
    same = [a.equal(b) for a, b in zip(one, two)]
    assert same == [True, True, False]
