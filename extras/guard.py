"""What guards a training run against mistakes and accidents: it refuses bad inputs in one line,
locks the folder, tells files by their content and puts damaged checkpoints aside. train_distill.py
trains without it too. Shapes are those of motionstream.py."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import socket
import zipfile
import zlib
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

import train_distill as td
from extras.checkpoints import check_config, check_limits, refuse
from motionstream import (CLIP_ROWS, FRAMES, UserError, latent_frames, naming, reason_of, schedule,
                          write_file)
from sample import inspect

# --------------------------------------------------------------------------------------------------
# Flags, settings and the weights they name.

# Limits of Settings, as those of Config: type, least, most; for tuples also those of the length.
COUNT = (int, 1, 10 ** 9)
FROM_0 = (int, 0, 10 ** 9)
SHARE = (float, 0, 1)
LIMITS = {
    "clip_frames": COUNT,
    "batch": (int, 1, 2 ** 16),
    "vae_batch": (int, 1, 2 ** 16),
    "segmenter_scenes": COUNT,
    "segmenter_batch": (int, 1, 2 ** 16),
    "clips": FROM_0,
    "trajectories": COUNT,
    "vae_clips": FROM_0,
    "vae_updates": FROM_0,
    "segmenter_updates": FROM_0,
    "teacher_updates": FROM_0,
    "causal_updates": FROM_0,
    "distill_updates": FROM_0,
    "vae_accumulate": COUNT,
    "teacher_accumulate": COUNT,
    "causal_accumulate": COUNT,
    "distill_accumulate": COUNT,
    "dense_share": SHARE,
    "whole_every": COUNT,
    "short_latents": COUNT,
    "p_pure_noise": SHARE,
    "p_uniform_sigma": SHARE,
    "track_weight": (float, 0, 10 ** 6),
    "p_no_text": SHARE,
    "p_no_tracks": SHARE,
    "p_sparse": SHARE,
    "consistency_share": SHARE,
    "consistency_hop": COUNT,
    "critic_steps": COUNT,
    "rollout": (int, 0, 10 ** 4),
    "beta": (float, 1e-6, 10 ** 6),
    "export_every": FROM_0,
    "checkpoint_minutes": (float, 0, 10 ** 6),
    "tflops": (float, 1e-6, 10 ** 9),
}
LEARNING = {                        # of Learning, except muon, which may be None
    "adam": (float, 1e-12, 1000),
    "betas": (float, 0, 1 - 1e-9, 2, 2),
    "ema": (float, 0, 1),
    "weight_decay": (float, 0, 1000),
    "clip_norm": (float, 1e-12, 10 ** 9),
    "warm_up": COUNT,
    "decay": (float, 1e-6, 1),
}
WIDTH = (int, 1, 2 ** 16)
WIDTHS = {                          # of Config, which in a file follow from its tensors
    "dim": WIDTH,
    "ffn_dim": WIDTH,
    "num_layers": WIDTH,
    "in_dim": WIDTH,
    "out_dim": WIDTH,
    "track_dim": FROM_0,
    "text_dim": WIDTH,
    "clip_dim": FROM_0,
    "freq_dim": WIDTH,
    "patch_size": (int, 1, 64, 3, 3),
}
SWITCHES = ("freeze_track_head", "track_what_moves", "corrupt_context", "neutral_long_rollouts",
            "shard_gradients", "replicate_teacher")
SOURCE = "the training (--set)"     # of a setting, in messages


CAUSAL_FROM = ("trajectories", "rollouts", "clips", "consistency")      # see td.loss_of_causal


# Latent frames of the shortest clip that a model is trained on: the tiny model's 12.
LEAST_LATENTS = latent_frames(td.TINY.clip_frames)


def check_flags(flags, config, settings):
    """UserError, one line, for flags (what train_distill.parse returns) that do not go together, or
    that change a field of Config or Settings to what it cannot be. config, settings: before the
    change."""
    stage = flags.stage
    memory = flags.memory
    data = flags.data
    vae = flags.vae
    distills = stage in ("all", "distill")
    streams = stage in ("all", "causal", "distill")
    for wrong, cure in [
        (flags.steps and stage == "all", "--steps needs --stage with one training stage"),
        (flags.reward and not distills, "--reward needs --stage distill"),
        (memory and not streams, "--memory needs --stage causal or distill"),
        (memory and memory["chunk"] > LEAST_LATENTS,
         f"--memory: a chunk is of 1 to {LEAST_LATENTS} latent frames"),
        (data and not data.is_dir(), f"--data {data}: no such folder"),
        (vae and stage == "vae", f"--vae {vae}: drop it, or --stage vae"),
        (vae and not vae.is_file(), f"--vae {vae}: no such file"),
    ]:
        if wrong:
            raise UserError(cure)
    for path, value in flags.set:
        check_field(path, value, config, settings)


def check_field(path, value, config, settings):
    """UserError, one line, if --set gives a value of the wrong type to a field of Config or
    Settings, "a" or "a.b", or if neither has that field."""
    owner = settings
    if path in vars(config):
        owner = config
    *outer, name = path.split(".")
    for each in outer:
        owner = vars(owner).get(each)
        if not dataclasses.is_dataclass(owner):
            raise UserError(f"--set {path}: {each} has no fields")
    if name not in vars(owner):
        raise UserError(f"--set {path}: no such field; there are {', '.join(vars(owner))}")
    now = getattr(owner, name)
    numbers = isinstance(now, (int, float)) and isinstance(value, (int, float))
    if not (numbers or now is None or value is None or isinstance(value, type(now))):
        raise UserError(f"--set {path}={value}: it is {now} now")


def check_run(run, flags):
    """UserError, one line, for a Run with which flags.stage, or "all", cannot be trained."""
    stage = flags.stage
    if run.out.exists() and not run.out.is_dir():
        raise UserError(f"--out {run.out}: is a file; give it a folder's name")
    check_settings(run)
    check_inputs(run, stage, flags.vae, flags.dry_run)
    config = run.config
    settings = run.settings
    check_length(settings.clip_frames, config.chunk, config.first_chunk_size)
    short = settings.short_latents
    if settings.whole_every > 1 and not 2 <= short <= run.clip_latents:
        raise UserError(f"--set short_latents={short}: is not 2 to {run.clip_latents}, a clip's")
    if settings.causal_from not in CAUSAL_FROM:
        known = ", ".join(CAUSAL_FROM)
        raise UserError(f"--set causal_from={settings.causal_from}: is one of {known}")
    check_levels(config, settings, stage)
    check_micro_steps(settings, stage)


def check_micro_steps(settings, stage):
    """UserError, one line, if the processes cannot take equally many of a stage's micro-steps.
    Fewer micro-steps than processes are no error: each takes one."""
    stages = td.STAGES if stage == "all" else [stage]
    for each in stages:
        name = "vae_accumulate" if each == "decoder" else f"{each}_accumulate"
        count = getattr(settings, name)
        if count > td.PROCESSES and count % td.PROCESSES:
            raise UserError(f"--set {name}={count}: {td.PROCESSES} processes cannot divide {count} "
                            "micro-steps evenly; give --accumulate N, for each process")


def check_levels(config, settings, stage):
    """UserError, one line, if the causal stage needs the student's noise levels among those of the
    teacher's steps, or of every consistency_hop-th of them, and they are not."""
    if stage not in ("all", "causal"):
        return
    hop = 1
    if settings.causal_from == "consistency":
        hop = settings.consistency_hop
        if config.steps % hop:
            raise UserError(f"--set consistency_hop={hop}: does not divide {config.steps} steps")
    elif settings.causal_from != "trajectories":
        return
    if not set(config.sigmas) <= set(schedule(config.steps, config.shift)[::hop]):
        raise UserError(f"{config.steps // hop} steps of the teacher: the student's noise levels "
                        f"{config.sigmas} are not among its own; choose another number")


def check_settings(run):
    """UserError, one line, for a field of Settings or Config outside its limits."""
    config = run.config
    if not config.latent_std and config.copies:         # the VAE's, which may not be trained yet
        config = replace(config, latent_std=(1.0,) * config.out_dim)
    check_limits(vars(config), WIDTHS, SOURCE)
    check_config(config, SOURCE)
    fields = vars(run.settings)
    limits = dict(LIMITS)
    if not run.data and not config.is_wan:              # clips are rendered
        limits |= {"clips": COUNT, "vae_clips": COUNT}
    check_limits(fields, limits, SOURCE)
    for name in SWITCHES:
        if type(fields[name]) is not bool:
            refuse(SOURCE, name, fields[name], "True or False")
    for name, value in fields.items():
        if not isinstance(value, td.Learning):
            continue
        limits = dict(LEARNING)
        if value.muon is not None:
            limits["muon"] = LEARNING["adam"]
        check_limits(vars(value), limits, f"{SOURCE}, {name}")


def check_inputs(run, stage, vae, dry_run):
    """UserError, one line, for weights, clips and a VAE that cannot be trained on together. vae: as
    given by a flag, or None."""
    start = run.start
    data = run.data
    clips = td.clip_files(data) if data else []
    has_video = bool(clips) and "video" in td.read_header(clips[0])[0]
    encoded = data and not has_video
    needs_vae = (start or encoded) and not vae
    needs_clips = start and start.config.is_wan and not data
    for wrong, cure in [
        (start and start.config.causal, "holds a student; training starts from a teacher"),
        (start and start.config.has_mask,
         "takes the image as a clip with a mask, which cannot stream; take Fun-Control or T2V"),
        (encoded and stage == "vae", "holds latents; the stage vae needs clips with video"),
        (needs_vae and not dry_run, "give --vae FILE, which made its latents"),
        (needs_clips and not dry_run, "give --data FOLDER; the clips drawn here are small"),
    ]:
        if wrong:
            raise UserError(f"{start.path if start else data}: {cure}")


def check_length(frames, chunk, first):
    """UserError if clips of so many frames are not whole chunks: `first` latents, then `chunk`
    each."""
    least = first + math.ceil((LEAST_LATENTS - first) / chunk) * chunk
    if frames < td.video_frames(least) or (frames - td.video_frames(first)) % (FRAMES * chunk):
        some = [td.video_frames(least + i * chunk) for i in range(3)]
        raise UserError(f"--set clip_frames={frames}: needs whole chunks of {FRAMES * chunk}, the "
                        f"first of {td.video_frames(first)}: {', '.join(map(str, some))}, …")


# The weights that a stage starts from.
PREREQUISITES = {"vae": (), "segmenter": (), "teacher": ("vae",), "causal": ("vae", "teacher"),
                 "distill": ("vae", "teacher", "causal"), "decoder": ("vae",)}


def check_stage(run, stage):
    """UserError, one line, before a stage starts, if its weights or clips do not fit."""
    check_prerequisites(run, stage)
    check_clips(run, stage)


def check_prerequisites(run, stage):
    """UserError, before a stage starts, if its prerequisite weights are missing or damaged, or
    trained with another chunk, sink or window."""
    for name in PREREQUISITES[stage]:
        load = run.load_vae if name == "vae" else functools.partial(run.load, name)
        try:
            load()
        except ValueError as e:
            made_here = run.path(name) == run.out / f"{name}.safetensors"
            cure = f"; --stage {name} makes it" if made_here else ""
            raise UserError(f"{e}{cure}") from None
    if stage == "distill":
        config = inspect(run.path("causal")).config
        was = {name: getattr(config, name) for name in ("chunk", "sink", "window")}
        if not was.items() <= run.streaming.items():
            raise UserError(f"{run.path('causal')}: was trained with {was}; say by --memory what "
                            "the student gets")


# --------------------------------------------------------------------------------------------------
# Clips.

def check_clips(run, stage):
    """UserError, one line, for a clip of --data that cannot train the stage."""
    if not run.data:
        return
    vae = None if stage == "vae" else weights_digest(run.path("vae"))
    for file in td.clip_files(run.data):
        shapes, metadata = td.read_header(file)
        check_clip(file, shapes, metadata, run.config, run.track_frames, vae)


def check_clip(file, shapes, metadata, config, track_frames, vae):
    """UserError, one line, if a clip, see train_distill.read_header, cannot train a model of
    `config`. track_frames: video frames that its tracks must cover. vae: checksum of the VAE that
    should have made its latents; None: any may have."""
    height, width = config.size
    h, w = config.latent_size
    expected = {"tracks": (None, None, 2), "visible": (None, None), "group": (None,),
                "text": (None, config.text_dim)}        # None: any
    if "latents" in shapes:
        expected["latents"] = (config.out_dim, None, h, w)
    else:
        expected["video"] = (3, None, height, width)
    if "latents" in shapes and config.copies:
        expected["first"] = (3, height, width)
    if config.clip_dim:
        expected["clip"] = (CLIP_ROWS, config.clip_dim)
    for name, shape in expected.items():
        found = shapes.get(name, ())
        fits = [side in (None, own) for own, side in zip(found, shape)]
        if len(found) != len(shape) or not all(fits):
            raise UserError(f"{file}: {name} is {found or 'missing'}, expected {shape}; see the "
                            "top of train_distill.py")
    if shapes["tracks"][0] < track_frames:
        raise UserError(f"{file}: has tracks for {shapes['tracks'][0]} frames but needs "
                        f"{track_frames}; extend them, or lower --rollout")
    if shapes["text"][0] > config.text_len:
        raise UserError(f"{file}: text of {shapes['text'][0]} rows, at most {config.text_len}")
    made_by = metadata.get("vae")           # extras/clips.py writes it
    if made_by and vae and made_by != str(vae):
        raise UserError(f"{file}: its latents are of another VAE than the one of this training")


# --------------------------------------------------------------------------------------------------
# Files are told by their content.

PIECES = 16             # read from a large tensor by content_digest
PIECE = 4096            # bytes


def tensor_places(file, size):
    """{"name dtype shape": (begin, end), its bytes in the file} of a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(min(length, size)))
    header.pop("__metadata__", None)
    places = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        places[f"{name} {about['dtype']} {about['shape']}"] = (8 + length + begin, 8 + length + end)
    return places


def content_digest(path):
    """Digest of a weights file's content, whatever its age, place or metadata: names, types,
    shapes, and all bytes of each tensor, or 16 evenly spaced pieces of a large one. That reads 14B
    parameters in seconds and misses only changes between the pieces. Files other than safetensors
    are treated as one tensor."""
    size = path.stat().st_size
    places = {f"{size} bytes": (0, size)}
    digest = 0
    with naming(path, "damaged"), open(path, "rb") as file:
        if path.suffix == ".safetensors":
            places = tensor_places(file, size)
        for about, (begin, end) in sorted(places.items()):
            digest = zlib.crc32(about.encode(), digest)
            begins = [begin]
            length = end - begin
            if length > PIECES * PIECE:
                length = PIECE
                last = end - PIECE
                begins = [begin + (last - begin) * i // (PIECES - 1) for i in range(PIECES)]
            for each in begins:
                file.seek(each)
                digest = zlib.crc32(file.read(length), digest)
    return digest


def weights_digest(path):
    """content_digest of weights: a file, all of its shards, or a folder of files."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in (".safetensors", ".pt", ".pth")]
    elif "-of-" in path.name or path.suffix == ".json":
        from extras.checkpoints import shards_of
        files = shards_of(path)
    digests = sorted(content_digest(file) for file in files)
    return digests[0] if len(digests) == 1 else td.seed_of(digests)


KEEP_EVERY = 10_000     # clips looked at between two writes of what was found


def read_digests(folder, kept):
    """{name: digest} of the clips in a folder. The file `kept` caches them with sizes and times, so
    that only new clips are read; after an interruption those since the last KEEP_EVERY."""
    before = {}
    if kept.exists():
        with contextlib.suppress(ValueError, TypeError):            # damaged: read all again
            before = dict(json.loads(kept.read_text()))

    def keep(found):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, lambda part: part.write_text(json.dumps(found)))

    now = {}
    read = 0
    for file in tqdm(td.clip_files(folder), "look at clips", delay=5):
        about = file.stat()
        age = [about.st_size, about.st_mtime_ns]
        name = file.relative_to(folder).as_posix()
        known = before.get(name)
        if isinstance(known, list) and known[:2] == age and len(known) == 3:
            now[name] = known
            continue
        now[name] = age + [content_digest(file)]
        read += 1
        if read % KEEP_EVERY == 0:
            keep(before | now)
    if now != before:
        keep(now)
    return {name: known[2] for name, known in now.items()}


def clip_digests(run):
    """{name: digest} of the clips of --data, read by process 0; {} without --data. Collective."""
    if not run.data:
        return {}
    digests = read_digests(run.data, run.out / "clips.json") if td.RANK == 0 else None
    td.wait_for_all(td.LATE)
    return td.from_first(digests)


# --------------------------------------------------------------------------------------------------
# The folder of a training run, its log and its checkpoints.

@contextlib.contextmanager
def own_folder(folder):
    """Delete unfinished files in a training run's folder and hold its lock. The processes of
    torchrun count as one run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        if td.RANK == 0:
            lock_folder(folder, file)
            for path in folder.rglob(".*.part"):        # left by a killed motionstream.write_file
                if ".mp4." not in path.name:            # videos are another program's
                    path.unlink()
        td.wait_for_all()
        yield


def lock_folder(folder, file):
    """Lock a training run's folder for this process until it ends, even by a crash. file: open
    file in the folder; holds the lock and names its owner. UserError if another process has it."""
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(2 ** 30)          # far past the text: others may read that
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder}: {file.read() or 'another'} is training into it; wait for its "
                        "end, or choose another --out") from None
    except OSError as e:                # some network disks cannot lock
        print(f"{folder}: cannot be locked ({e.strerror}); start no other training into it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def read_log(path):
    """Rows of a stats.jsonl, without lines that a crash cut off or that train_distill.Loop did not
    write."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"stage", "step", "seconds"} <= row.keys():
                rows.append(row)
    return rows


def drop_rows(path, stage, begin):
    """Delete a stage's rows from update `begin` on: the checkpoint lacks these updates, so they
    are run and logged again."""
    text = ""
    for row in read_log(path):
        if row["stage"] != stage or row["step"] < begin:
            text += json.dumps(row) + "\n"
    write_file(path, lambda part: part.write_text(text))


# Settings that may differ on resuming: they do not change what a stage learns. (train_distill.Loop
# adds the stage's own micro-steps per update.)
FREE = ("tflops", "checkpoint_minutes", "export_every", "shard_gradients", "replicate_teacher",
        "vae_accumulate", "teacher_accumulate", "causal_accumulate", "distill_accumulate")


def checkpoint_settings(run, stage):
    """Everything a stage's checkpoint depends on: resuming with other values would mix two
    trainings. Files are identified by their content, not by path or time. Collective."""
    settings = {"seed": run.seed} | asdict(run.config) | asdict(run.settings)
    for name in FREE:
        settings.pop(name)
    for name, digest in clip_digests(run).items():
        settings[f"checksum of {name}"] = digest
    if run.start:
        settings["checksum of --weights"] = weights_digest(run.path("start"))
    for name in PREREQUISITES[stage]:
        settings[f"checksum of {name}"] = weights_digest(run.path(name))
    return settings


def read_checkpoint(path):
    """Read a file of save_checkpoint. Raises one of a dozen exception types if it is damaged: its
    checksums are tested here, as torch.load ignores them."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} is not as it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_checkpoint(folder, stage, settings):
    """Contents of the newest undamaged checkpoint of a stage in a training run's folder, None if
    there is no checkpoint. The log loses the rows after it. Damaged ones are reported and renamed.
    UserError if all are damaged, or if it is of other settings."""
    log_path = folder / "stats.jsonl"
    paths = sorted(folder.glob(f"{stage}.*.checkpoint.pt"), reverse=True)
    if not paths:
        drop_rows(log_path, stage, 0)
        return None
    damaged = []
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            break
        except Exception as e:
            print(f"{path}: damaged ({reason_of(e)})")
            damaged.append(path)
    else:
        raise UserError(f"{damaged[0]}: damaged, and no other checkpoint of the stage {stage} is "
                        "whole; put one back, or remove them to begin the stage again")
    was = checkpoint["settings"]
    changed = []
    for name in was | settings:
        if was.get(name) != settings.get(name):
            changed.append(f"{name} {was.get(name)}, now {settings.get(name)}")
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(f"{path}: is of other settings ({'; '.join(changed[:5])}{more}); choose "
                        "another --out or remove it")
    for path in damaged:
        path.replace(path.with_suffix(".damaged"))
    drop_rows(log_path, stage, checkpoint["updates"])
    return checkpoint
