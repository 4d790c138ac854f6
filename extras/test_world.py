"""The drawn world: tracks are where things are drawn, draws are what the models were trained on."""

import dataclasses
import json
import sys
import unittest.mock

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from extras import world
from extras.testing import assert_error, folder, quiet, seeded

ON_GROUND = slice(-world.GRID ** 2, None)


def centroid(weight):
    """(T, H, W) to (T, 2), x and y in pixels; the middle of the first pixel is 0.5."""
    axis = torch.arange(weight.shape[-1]) + 0.5
    total = weight.sum((1, 2))
    x = (weight * axis).sum((1, 2)) / total
    y = (weight * axis[:, None]).sum((1, 2)) / total
    return torch.stack([x, y], -1)


# ------------------------------------------------------------------------------------------------
# Tracks and pixels

def spots(where, width):
    """(B, width, width): a bright spot round `where` (B, 2), in radii, on an object's texture."""
    axis = world.EXTENT * ((2 * torch.arange(width) + 1) / width - 1)
    x = axis - where[:, :1, None]
    y = axis[:, None] - where[:, 1:, None]
    return torch.exp(-(x ** 2 + y ** 2) / 0.02)


def check_spots(camera, motion, style):
    """On a grey object a red spot is painted at its centre and a green one at a track that turns
    and breathes with it. Returns how many frames show that the tracks lie on the spots."""
    options = {"objects": 1, "camera": camera, "attributes": (0, motion), "style": style}
    scene = world.new_scenes(2, 24, seeded(motion), **options)
    scene["backdrop"][:] = 0.5
    texture = scene["texture"][:, 0]                                  # (B, 4, width, width)
    texture[:, :3] = 0.5
    texture[:, 3] = 1
    points = (0, 3)
    for channel, point in enumerate(points):
        where = scene["points"][:, 0, point]
        texture[:, channel] += 0.5 * spots(where, texture.shape[-1])
    video = world.render(scene, 128)
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    checked = 0
    for b in range(2):
        for channel, point in enumerate(points):
            xy = tracks[b, :, point]                                  # (T, 2)
            whole = ((xy > 15) & (xy < 113)).all(-1)                  # all of the spot is seen
            whole &= visible[b, :, point]
            error = centroid(video[b, channel].clamp(min=0)) - xy
            error = error[whole].norm(dim=-1)
            assert (error < 0.5).all(), (camera, motion, style, point, error)
            checked += len(error)
    return checked


def test_tracks_on_objects_lie_on_the_pixels():
    assert check_spots(camera=False, motion=0, style="textured") > 20
    assert check_spots(camera=True, motion=1, style="textured") > 20
    assert check_spots(camera=True, motion=2, style="textured") > 20
    assert check_spots(camera=True, motion=1, style="simple") > 20


def test_tracks_on_the_ground_lie_on_the_pixels():
    scene = world.new_scenes(2, 45, seeded(), objects=0, camera=True, attributes=(0, None))
    axis = (torch.arange(512) + 0.5) / 512                      # a place's colour says where it is
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    scene["backdrop"] = torch.stack([x, y, x * 0]).expand(2, -1, -1, -1)
    video = world.render(scene, 128)
    tracks, visible = world.scene_tracks(scene, 128, seeded(1))
    tracks = tracks[:, :, ON_GROUND]                                  # (B, T, N, 2)
    visible = visible[:, :, ON_GROUND]
    assert visible.float().mean() > 0.5
    assert not visible.all()
    assert tracks.std(1).max() > 5                                    # the camera moves them
    inside = visible & ((tracks > 1) & (tracks < 127)).all(-1)
    for b in range(2):
        grid = tracks[b, :, None] / 64 - 1                            # (T, 1, N, 2)
        seen = F.grid_sample(video[b].transpose(0, 1), grid, align_corners=False)
        place = (seen[:, :2, 0] + 1) / 2 * 256                        # (T, 2, N), pixels of a frame
        for n in range(world.GRID ** 2):
            mine = place[inside[b, :, n], :, n]
            if len(mine) > 1:
                apart = mine - mine.mean(0)
                assert apart.norm(dim=-1).max() < 0.5


def test_a_track_is_visible_exactly_where_what_its_group_names_is_seen():
    scene = world.new_scenes(4, 24, seeded(3), objects=3, camera=False, attributes=(0, 2))
    colours = torch.eye(3)                                            # of the three objects
    scene["texture"][:, :, :3] = colours[..., None, None]
    scene["backdrop"][:] = 0
    video = world.render(scene, 128) / 2 + 0.5
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    inside = ((tracks >= 0) & (tracks < 128)).all(-1)                 # (B, T, N)
    assert not visible[~inside].any()
    x, y = tracks.long().clamp(0, 127).unbind(-1)
    b = torch.arange(4)[:, None, None]
    t = torch.arange(24)[:, None]
    shown = video[b, :, t, y, x]                                      # (B, T, N, 3)
    black = torch.zeros(1, 3)                                         # of group -1, the ground
    own = torch.cat([colours, black])[world.track_groups(scene)]
    seen = (shown - own).abs().amax(-1) < 0.5
    assert (inside & ~visible).sum() > 300
    right = (seen == visible)[inside]
    assert right.float().mean() > 0.97, right.float().mean()


def test_absent_objects_have_no_visible_tracks_and_groups_are_in_order():
    scene = world.new_scenes(2, 9, seeded(), objects=1, texture=(0, 0))
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    group = world.track_groups(scene)
    assert tracks.shape == (2, 9, len(group), 2)
    assert group.tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [-1] * 64
    assert not visible[:, :, group > 0].any()
    five = world.new_scenes(1, 9, seeded(), objects=5, texture=(0, 0))
    assert five["present"].all()
    assert world.track_groups(five).max() == 4


def test_tracks_lie_on_their_object_and_all_over_it():
    with coarse_textures():
        scene = world.new_scenes(24, 1, seeded(4))
    points = scene["points"]                                          # (B, K, P, 2)
    angle = torch.atan2(points[..., 1], points[..., 0])
    edge = world.outline(scene["shape"], angle[:, :, None])[:, :, 0]
    radius = points.norm(dim=-1) / edge                               # (B, K, P)
    assert (radius[:, :, 0] == 0).all()                               # the first is the centre
    others = radius[scene["present"]][:, 1:]
    assert (others < 0.91).all()
    assert others.max() > 0.85
    assert 0.55 < others.mean() < 0.65                                # 0.6: even over a disc


# ------------------------------------------------------------------------------------------------
# What is drawn

def coarse_textures():
    """Textures have few pixels in here, which take an eighth of the time."""
    coarse = dataclasses.replace(world.STYLES["textured"], object_pixels=24, ground_pixels=64)
    return unittest.mock.patch.dict(world.STYLES, textured=coarse)


def test_objects_start_apart():
    gaps = []
    for tries in (1, world.TRIES):
        with unittest.mock.patch.object(world, "TRIES", tries):
            position = world.draw_positions(5, torch.zeros(60, 3), False, seeded())
        assert position.shape == (60, 3, 5, 2)
        start = position[:, :, 0]
        between = torch.cdist(start, start) + 9 * torch.eye(3)
        gaps.append(between.amin((1, 2)).mean())
    assert gaps[1] > 1.5 * gaps[0], gaps


def test_paths_are_smooth_and_stay_near_the_picture():
    path = world.smooth_path(200, 90, torch.tensor(0.5), 14, seeded())
    assert path.shape == (200, 90, 2)
    assert path.std() > 0.2
    assert path.min() >= -0.126                             # the curve overshoots by an eighth
    assert path.max() <= 1.126
    speed = path.diff(dim=1)
    assert speed.abs().max() < 0.2
    assert speed.diff(dim=1).abs().max() < 0.05


def test_sizes_kinds_and_shares_are_those_of_the_world():
    with coarse_textures():
        scene = world.new_scenes(60, 2, seeded(5))
    there = scene["present"]
    radius = scene["radius"][there]
    assert 0.10 <= radius.min() < 0.12
    assert 0.23 < radius.max() <= 0.25
    kind = scene["shape"][0][..., 0, 0]
    assert set(kind[there].tolist()) == {world.DISC, world.POLYGON, world.STAR, world.BLOB}
    assert 0.12 < scene["face"][there].float().mean() < 0.32
    captions = " ".join(scene["caption"])
    for motion in ("spinning", "pulsing"):
        assert 0.13 < captions.count(motion) / 60 < 0.37
    for light in ("fading", "warming"):
        assert 0.08 < captions.count(light) / 60 < 0.32


def test_what_spins_is_no_disc_and_turns_by_three_degrees():
    with coarse_textures():
        scene = world.new_scenes(30, 2, seeded(6), attributes=(0, 1), texture=(0, 0))
    kind = scene["shape"][0][..., 0, 0]
    assert (kind[scene["present"]] != world.DISC).all()
    degrees = torch.rad2deg(scene["spin"][:, 1])
    assert (degrees - 3).abs().max() < 1e-4
    assert scene["caption"][0] == "steady light, spinning shapes"


def steps(images):
    """The largest difference of neighbouring pixels of each of (B, 3, h, w)."""
    across = images.diff(dim=3).abs().flatten(1).amax(1)
    down = images.diff(dim=2).abs().flatten(1).amax(1)
    return torch.maximum(across, down)


def test_without_texture_all_is_plain():
    scene = world.new_scenes(6, 2, seeded(7), texture=(0, 0))
    assert (steps(scene["backdrop"]) < 0.03).all()
    assert not scene["face"].any()
    for b, k in scene["present"].nonzero().tolist():
        rgb = scene["texture"][b, k, :3].flatten(1)                   # (3, width ** 2)
        colour = scene["colour"][b, k, :, None]
        same = ((rgb - colour).abs() < 1e-6).all(0)
        rim = (rgb < colour).any(0)
        assert (same | rim).all()
        assert same.float().mean() > 0.1


def test_with_texture_grounds_and_objects_are_not_plain():
    scene = world.new_scenes(6, 2, seeded(7), texture=(1, 1))
    assert steps(scene["backdrop"]).median() > 0.1
    textures = scene["texture"][scene["present"]]
    middle = textures[:, :3, 40:56, 40:56].flatten(2)
    contrast = middle.std(2).mean(1)
    assert (contrast > 0.005).float().mean() > 0.6


def test_flat_scenes_are_plain_discs_and_squares_on_grey():
    for style in ("textured", "simple"):
        scene = world.new_scenes(3, 2, seeded(8), flat=True, style=style)
        kind, sides, _ = scene["shape"]
        assert set(kind.flatten().tolist()) <= {world.DISC, world.POLYGON}
        assert (sides == 4).all()
        assert (scene["backdrop"].std(1) < 1e-6).all()
        for b, k in scene["present"].nonzero().tolist():
            rgb = scene["texture"][b, k, :3].flatten(1)
            colour = scene["colour"][b, k, :, None]
            assert (rgb - colour).abs().max() < 1e-6


FIRST_MODELS = (
    {
        "options": {},
        "visible": 6865,
        "places": (53.15, 94.3, 120.0, 120.0),
        "colours": (-0.4575, -0.4575, 0.0859, -0.4405),
        "averages": (-0.0329, 0.35274, 63.77),
    },
    {
        "options": {"flat": True, "objects": 3, "camera": False, "attributes": (0, 0)},
        "visible": 7291,
        "places": (38.83, 46.58, 120.0, 120.0),
        "colours": (0.221, 0.221, 0.221, 0.221),
        "averages": (0.08607, 0.27128, 61.879),
    },
    {
        "options": {"objects": 5, "camera": True, "moving": True, "attributes": (1, 2)},
        "visible": 7221,
        "places": (61.88, 20.92, 123.79, 128.05),
        "colours": (0.3648, -0.5008, -0.7149, 0.5859),
        "averages": (-0.56874, 0.2536, 65.907),
    },
)


def test_the_simple_style_is_the_world_of_the_first_models():
    """Numbers that the program gave which made the first tiny models' training clips."""
    for case in FIRST_MODELS:
        scene = world.new_scenes(2, 45, seeded(7), style="simple", **case["options"])
        tracks, visible = world.scene_tracks(scene, 128, seeded(8))
        video = world.render(scene, 128)
        assert abs(visible.sum() - case["visible"]) <= 2
        places = torch.cat([tracks[1, 44, 5], tracks[0, 20, -1]])
        assert (places - torch.tensor(case["places"])).abs().max() < 0.01
        colours = video[:, :, ::22, 40, 60].flatten()[:4]
        assert (colours - torch.tensor(case["colours"])).abs().max() < 5e-4
        averages = torch.stack([video.mean(), video.std(), tracks.mean()])
        assert (averages - torch.tensor(case["averages"])).abs().max() < 2e-3


def test_pieces_are_the_whole():
    scene = world.new_scenes(2, 12, seeded(9), camera=True)
    whole = world.render(scene, 64)
    assert whole.shape == (2, 3, 12, 64, 64)
    assert -1 <= whole.min()
    assert whole.max() <= 1
    first = world.render(scene, 64, 0, 1)
    rest = world.render(scene, 64, 1)
    pieces = torch.cat([first, rest], 2)
    assert (pieces - whole).abs().max() < 1e-3           # an object's square may lie elsewhere


def test_objects_of_any_size_may_leave_the_picture():
    scene = world.new_scenes(1, 8, seeded(2), objects=3, attributes=(0, 1), texture=(0, 0))
    scene["position"][:, 0] = 3
    scene["position"][:, 1] = 0
    scene["radius"][:, 2] = 2                            # larger than the picture
    video = world.render(scene, 48)
    assert video.isfinite().all()
    assert video.std() > 0


# ------------------------------------------------------------------------------------------------
# A folder of clips

def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_folder_is_the_same_by_one_process_or_two_and_is_resumed():
    options = {"frames": 3, "size": 32, "track_frames": 7}
    with folder() as one, folder() as two:
        world.write_clips(one, 7, seed=4, workers=1, **options)
        world.write_clips(two, 2, seed=4, workers=1, **options)
        first = two / "0000000.safetensors"
        written = first.stat().st_mtime_ns
        with unittest.mock.patch.dict(sys.modules, {"__main__": world}):      # they load no tests
            world.write_clips(two, 7, seed=4, workers=2, **options)         # 5 of them
        assert first.stat().st_mtime_ns == written, "it was drawn again"
        files = files_of(one)
        assert files == files_of(two)
        assert len(files) == 7 + 1                       # and world.json
        assert files["0000000.safetensors"] != files["0000001.safetensors"]
        world.write_clips(one / "other", 1, seed=5, workers=1, **options)
        other = files_of(one / "other")
        assert other["0000000.safetensors"] != files["0000000.safetensors"]


def test_a_clip_holds_what_a_training_reads():
    with folder() as here:
        world.write_clips(here, 1, frames=2, size=32, track_frames=6, objects=2)
        path = here / "0000000.safetensors"
        clip = load_file(path)
        with safe_open(path, "pt") as file:
            caption = file.metadata()["caption"]
        settings = json.loads((here / "world.json").read_text())
    assert settings["options"]["objects"] == 2
    expected = {
        "video": ((3, 2, 32, 32), torch.uint8),
        "tracks": ((6, 112, 2), torch.float32),
        "visible": ((6, 112), torch.bool),
        "group": ((112,), torch.int64),
        "text": ((4, 64), torch.float32),
    }
    assert {name: (t.shape, t.dtype) for name, t in clip.items()} == expected
    assert clip["text"].equal(world.embed_words(caption)[0])
    rng = seeded(0)
    scene = world.new_scenes(1, 6, rng, objects=2)
    tracks, _ = world.scene_tracks(scene, 32, rng)
    video = world.render(scene, 32, 0, 2)
    assert scene["caption"] == [caption]
    assert tracks[0].equal(clip["tracks"])
    assert (clip["video"] / 127.5 - 1 - video[0]).abs().max() < 0.01


def test_what_is_wrong_is_said_in_one_line():
    with folder() as here:
        flags = ["--out", str(here)] + "--clips 1 --frames 1 --size 16 --workers 1".split()
        cases = [
            (["--seed", "1"], "other settings"),
            (["--texture", "0", "2"], "0 to 1"),
            (["--frames", "0"], "frames 0"),
            (["--frames", "9", "--track-frames", "3"], "3 frames of tracks"),
            (["--out", f"{here}/0000000.safetensors"], "0000000.safetensors"),
        ]
        with quiet():
            world.main(flags)
        for wrong, says in cases:
            error = said_by(flags + wrong)
            assert error.startswith("error: ")
            assert error.count("\n") == 1, error
            assert says in error, error
        (here / "world.json").write_text("damaged")
        assert "world.json: damaged" in said_by(flags)


def said_by(flags):
    """What the program says on the error stream before it ends with code 2."""
    with quiet() as (_, err):
        assert_error(SystemExit, "2", world.main, flags)
    return err.getvalue()
