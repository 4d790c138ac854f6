"""What the drawn world promises: tracks lie on what is drawn, visibility is what is seen."""

import json
import pathlib
import tempfile
import unittest.mock

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from extras import world

ON_GROUND = slice(-world.GRID ** 2, None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def centroid(weight):
    """(T, H, W) to (T, 2), x and y in pixels; the middle of the first pixel is 0.5."""
    axis = torch.arange(weight.shape[-1]) + 0.5
    total = weight.sum((1, 2))
    x = (weight * axis).sum((1, 2)) / total
    y = (weight * axis[:, None]).sum((1, 2)) / total
    return torch.stack([x, y], -1)


def spot_at(where, width):
    """Textures (B, 4, width, width): nothing but a red spot round `where` (B, 2), in radii."""
    axis = world.EXTENT * ((2 * torch.arange(width) + 1) / width - 1)
    x = axis - where[:, :1, None]
    y = axis[:, None] - where[:, 1:, None]
    spot = torch.exp(-(x ** 2 + y ** 2) / 0.02)
    return torch.stack([torch.ones_like(spot), spot * 0, spot * 0, spot], 1)


def check_spots(camera, motion, style):
    """How many frames show that an object's tracks lie on what is painted there."""
    options = {"objects": 1, "camera": camera, "attributes": (0, motion), "style": style}
    scene = world.new_scenes(3, 45, seeded(motion), **options)
    scene["backdrop"][:] = 0.5
    checked = 0
    for point in (0, 3):                        # the centre, and one that turns and breathes with it
        width = scene["texture"].shape[-1]
        scene["texture"][:, 0] = spot_at(scene["points"][:, 0, point], width)
        video = world.render(scene, 128)
        tracks, visible = world.scene_tracks(scene, 128, seeded())
        for b in range(3):
            xy = tracks[b, :, point]
            whole = ((xy > 15) & (xy < 113)).all(-1)                  # all of the spot is seen
            error = centroid(video[b, 0].clamp(min=0)) - xy
            error = error[whole & visible[b, :, point]].norm(dim=-1)
            assert (error < 0.5).all(), (camera, motion, style, point, error.max())
            checked += len(error)
    return checked


def test_tracks_on_objects_lie_on_the_pixels():
    for camera in (False, True):
        for motion in (0, 1, 2):
            assert check_spots(camera, motion, "textured") > 30
    assert check_spots(True, 1, "simple") > 30


def test_tracks_on_the_ground_lie_on_the_pixels():
    scene = world.new_scenes(3, 45, seeded(), objects=0, camera=True, attributes=(0, None))
    axis = (torch.arange(512) + 0.5) / 512                      # the colour of a place says where it is
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    scene["backdrop"] = torch.stack([x, y, x * 0]).expand(3, -1, -1, -1)
    video = world.render(scene, 128)
    tracks, visible = world.scene_tracks(scene, 128, seeded(1))
    tracks = tracks[:, :, ON_GROUND]
    visible = visible[:, :, ON_GROUND]
    assert visible.float().mean() > 0.5 and not visible.all()
    assert tracks.std(1).max() > 5                                    # the camera moves them
    inside = visible & ((tracks > 1) & (tracks < 127)).all(-1)
    for b in range(3):
        grid = tracks[b, :, None] / 64 - 1
        seen = F.grid_sample(video[b].transpose(0, 1), grid, align_corners=False)
        place = (seen[:, :2, 0] + 1) / 2 * 256                        # (T, 2, N), pixels of a frame
        for n in range(world.GRID ** 2):
            mine = place[inside[b, :, n], :, n]
            if len(mine) > 1:
                assert (mine - mine.mean(0)).norm(dim=-1).max() < 0.5


def test_a_track_is_visible_exactly_where_what_its_group_names_is_seen():
    options = {"objects": 3, "camera": False, "attributes": (0, 2)}
    scene = world.new_scenes(8, 45, seeded(3), **options)
    colours = torch.eye(3)                                            # of the three objects
    scene["texture"][:, :, :3] = colours[..., None, None]
    scene["backdrop"][:] = 0
    video = world.render(scene, 128) / 2 + 0.5
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    group = world.track_groups(scene)
    inside = ((tracks >= 0) & (tracks < 128)).all(-1)                 # (B, T, N)
    assert not visible[~inside].any()
    x, y = tracks.long().clamp(0, 127).unbind(-1)
    rows = torch.arange(8)[:, None, None]
    frames = torch.arange(45)[:, None]
    shown = video[rows, :, frames, y, x]                              # (B, T, N, 3)
    own = torch.cat([colours, torch.zeros(1, 3)])[group]              # -1: the ground, black
    seen = (shown - own).abs().amax(-1) < 0.5
    right = (seen == visible)[inside]
    assert (inside & ~visible).sum() > 1000
    assert right.float().mean() > 0.97, right.float().mean()


def test_absent_objects_have_no_visible_tracks_and_groups_are_in_order():
    scene = world.new_scenes(2, 9, seeded(), objects=1)
    tracks, visible = world.scene_tracks(scene, 128, seeded())
    group = world.track_groups(scene)
    assert tracks.shape == (2, 9, len(group), 2)
    assert group.tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [-1] * 64
    assert not visible[:, :, group > 0].any()
    five = world.new_scenes(1, 9, seeded(), objects=5)
    assert five["present"].all() and world.track_groups(five).max() == 4


def test_tracks_lie_on_their_object_and_all_over_it():
    scene = world.new_scenes(24, 1, seeded(4))
    points = scene["points"]
    angle = torch.atan2(points[..., 1], points[..., 0])
    edge = world.outline(scene["shape"], angle[:, :, None])[:, :, 0]
    radius = points.norm(dim=-1) / edge                               # (B, K, P)
    there = radius[scene["present"]][:, 1:]
    assert (radius[:, :, 0] == 0).all() and (there < 0.91).all()
    assert 0.55 < there.mean() < 0.65 and there.max() > 0.85          # 0.6: even over a disc


def test_objects_start_apart():
    gaps = []
    for tries in (1, world.TRIES):
        with unittest.mock.patch.object(world, "TRIES", tries):
            start = world.new_scenes(60, 5, seeded(), style="simple")["position"][:, :, 0]
        between = torch.cdist(start, start) + 9 * torch.eye(3)
        gaps.append(between.amin((1, 2)).mean())
    assert start.shape == (60, 3, 2) and gaps[1] > 1.5 * gaps[0], gaps


def test_paths_are_smooth_and_stay_near_the_picture():
    path = world.smooth_path(200, 90, torch.tensor(0.5), 14, seeded())
    assert path.shape == (200, 90, 2) and path.std() > 0.2
    assert path.min() >= -0.126 and path.max() <= 1.126     # the curve overshoots by an eighth
    speed = path.diff(dim=1)
    assert speed.abs().max() < 0.2 and speed.diff(dim=1).abs().max() < 0.05


def test_sizes_kinds_and_shares_are_those_of_the_world():
    scene = world.new_scenes(90, 2, seeded(5))
    there = scene["present"]
    radius = scene["radius"][there]
    assert 0.10 <= radius.min() < 0.12 and 0.23 < radius.max() <= 0.25
    kind = scene["shape"][0][..., 0, 0]
    assert set(kind[there].tolist()) == {world.DISC, world.POLYGON, world.STAR, world.BLOB}
    assert 0.12 < scene["face"][there].float().mean() < 0.32
    captions = " ".join(scene["caption"])
    for motion in ("spinning", "pulsing"):
        assert 0.13 < captions.count(motion) / 90 < 0.37
    for light in ("fading", "warming"):
        assert 0.08 < captions.count(light) / 90 < 0.32


def test_what_spins_is_no_disc_and_turns_by_three_degrees():
    scene = world.new_scenes(60, 2, seeded(6), attributes=(0, 1), texture=(0, 0))
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


def test_without_texture_all_is_plain_and_with_it_it_is_not():
    scene = world.new_scenes(12, 2, seeded(7), texture=(0, 0))
    assert (steps(scene["backdrop"]) < 0.03).all()
    assert not scene["face"].any()
    for b, k in scene["present"].nonzero().tolist():
        rgb = scene["texture"][b, k, :3].flatten(1)
        colour = scene["colour"][b, k, :, None]
        same = ((rgb - colour).abs() < 1e-6).all(0)
        rim = (rgb < colour).any(0)
        assert (same | rim).all() and same.float().mean() > 0.1
    scene = world.new_scenes(12, 2, seeded(7), texture=(1, 1))
    assert steps(scene["backdrop"]).median() > 0.1
    there = scene["texture"][scene["present"]]
    inner = there[:, :3, 40:56, 40:56].flatten(2).std(2).mean(1)
    assert (inner > 0.005).float().mean() > 0.6


def test_flat_scenes_are_plain_discs_and_squares_on_grey():
    for style in ("textured", "simple"):
        scene = world.new_scenes(6, 2, seeded(8), flat=True, style=style)
        kind, sides, _ = scene["shape"]
        assert set(kind.flatten().tolist()) <= {world.DISC, world.POLYGON}
        assert (sides == 4).all()
        assert (scene["backdrop"].std(1) < 1e-6).all()
        for b, k in scene["present"].nonzero().tolist():
            rgb = scene["texture"][b, k, :3].flatten(1)
            assert (rgb - scene["colour"][b, k, :, None]).abs().max() < 1e-6


def test_the_simple_style_is_the_world_of_the_first_models():
    """Numbers that the program gave which made the first tiny models' training clips."""
    cases = (
        ({}, 6865, (53.15, 94.3, 120.0, 120.0),
         (-0.4575, -0.4575, 0.0859, -0.4405), (-0.0329, 0.35274, 63.77)),
        ({"flat": True, "objects": 3, "camera": False, "attributes": (0, 0)},
         7291, (38.83, 46.58, 120.0, 120.0),
         (0.221, 0.221, 0.221, 0.221), (0.08607, 0.27128, 61.879)),
        ({"objects": 5, "camera": True, "moving": True, "attributes": (1, 2)},
         7221, (61.88, 20.92, 123.79, 128.05),
         (0.3648, -0.5008, -0.7149, 0.5859), (-0.56874, 0.2536, 65.907)),
    )
    for options, seen, places, colours, averages in cases:
        scene = world.new_scenes(2, 45, seeded(7), style="simple", **options)
        tracks, visible = world.scene_tracks(scene, 128, seeded(8))
        video = world.render(scene, 128)
        assert abs(visible.sum().item() - seen) <= 2
        found = torch.cat([tracks[1, 44, 5], tracks[0, 20, -1]])
        assert (found - torch.tensor(places)).abs().max() < 0.01
        found = video[:, :, ::22, 40, 60].flatten()[:4]
        assert (found - torch.tensor(colours)).abs().max() < 5e-4
        found = torch.stack([video.mean(), video.std(), tracks.mean()])
        assert (found - torch.tensor(averages)).abs().max() < 2e-3


def test_pieces_are_the_whole():
    scene = world.new_scenes(2, 12, seeded(9), camera=True)
    whole = world.render(scene, 64)
    assert whole.shape == (2, 3, 12, 64, 64)
    assert -1 <= whole.min() and whole.max() <= 1
    pieces = torch.cat([world.render(scene, 64, 0, 1), world.render(scene, 64, 1)], 2)
    assert (pieces - whole).abs().max() < 1e-3           # an object's square may lie elsewhere


def test_objects_of_any_size_may_leave_the_picture():
    scene = world.new_scenes(1, 8, seeded(2), objects=3, attributes=(0, 1))
    scene["position"][:, 0] = 3
    scene["position"][:, 1] = 0
    scene["radius"][:, 2] = 2                            # larger than the picture
    video = world.render(scene, 48)
    assert video.isfinite().all() and video.std() > 0


def files_of(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_a_folder_is_the_same_by_one_process_or_two_and_is_resumed():
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        options = {"frames": 3, "size": 32, "seed": 4, "track_frames": 7}
        world.write_clips(one, 5, workers=1, **options)
        world.write_clips(two, 2, workers=1, **options)
        kept = (pathlib.Path(two) / "0000000.safetensors").stat().st_mtime_ns
        world.write_clips(two, 5, workers=2, **options)
        assert files_of(one) == files_of(two) and len(files_of(one)) == 6
        assert kept == (pathlib.Path(two) / "0000000.safetensors").stat().st_mtime_ns
        first = files_of(one)["0000000.safetensors"]
        assert first != files_of(one)["0000001.safetensors"]
        world.write_clips(pathlib.Path(one) / "other", 1, **options | {"seed": 5})
        assert first != files_of(pathlib.Path(one) / "other")["0000000.safetensors"]


def test_a_clip_holds_what_a_training_reads():
    with tempfile.TemporaryDirectory() as folder:
        world.write_clips(folder, 1, frames=2, size=32, track_frames=6, objects=2)
        path = pathlib.Path(folder) / "0000000.safetensors"
        clip = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        settings = json.loads((pathlib.Path(folder) / "world.json").read_text())
    assert settings["options"]["objects"] == 2
    assert clip["video"].shape == (3, 2, 32, 32) and clip["video"].dtype == torch.uint8
    assert clip["tracks"].shape == (6, 112, 2) and clip["tracks"].dtype == torch.float32
    assert clip["visible"].shape == (6, 112) and clip["visible"].dtype == torch.bool
    assert clip["group"].shape == (112,) and clip["group"].dtype == torch.int64
    assert clip["text"].equal(world.embed_words(metadata["caption"])[0])
    assert clip["text"].shape == (4, 64)
    rng = seeded(0)
    scene = world.new_scenes(1, 6, rng, objects=2)
    tracks, _ = world.scene_tracks(scene, 32, rng)
    assert tracks[0].equal(clip["tracks"]) and scene["caption"][0] == metadata["caption"]
    video = world.render(scene, 32, 0, 2)[0]
    assert (clip["video"] / 127.5 - 1 - video).abs().max() < 0.01


def error_of(*flags):
    """What the program says on the error stream before it ends with code 2."""
    with unittest.mock.patch("sys.stderr") as stderr:
        try:
            world.main(flags)
        except SystemExit as e:
            assert e.code == 2
            return "".join(call.args[0] for call in stderr.write.call_args_list)
    raise AssertionError(f"no error: {flags}")


def test_what_is_wrong_is_said_in_one_line():
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--out", folder, "--clips", "1", "--frames", "1", "--size", "16", "--workers", "1")
        world.main(flags)
        for wrong, says in (
            (("--seed", "1"), "other settings"),
            (("--texture", "0", "2"), "0 to 1"),
            (("--frames", "0"), "frames 0"),
            (("--frames", "9", "--track-frames", "3"), "3 frames of tracks"),
            (("--out", folder + "/0000000.safetensors"), "0000000.safetensors"),
        ):
            line = error_of(*flags, *wrong)
            assert line.startswith("error: ") and line.count("\n") == 1, line
            assert says in line, line
        (pathlib.Path(folder) / "world.json").write_text("damaged")
        assert "world.json: damaged" in error_of(*flags)
