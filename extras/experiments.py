"""The papers' experiments, in small, on drawn scenes: streams and their memory, guidance, short trainings.

    python -m extras.experiments --clips 12     hours; a row that is done is not measured again
"""

import itertools
import math
import shutil
import sys
import time
import unittest.mock
from dataclasses import replace

import numpy as np
import torch

import motionstream
import sample
import train_distill as td
from extras import world
from extras.evaluate import eval_row, grid, measure_tables, new_case, new_run, play
from motionstream import KVCache, TrackHead, UserError, schedule, track_features, track_ids
from sample import embed_words
from vae import TinyVAE, TinyVAEConfig, WanVAE

# Of a short distillation: the generator's updates, clips of each, images to draw from, chunks of the longest rollout.
SHORT = {"updates": 50, "batch": 2, "images": 512, "rollout": 8}
# Of the student for the tables of memory, which knows many: longer, but shorter than that of the shipped one.
DRAWN_MEMORY = {"updates": 180, "batch": 4, "images": 5120, "rollout": 12, "memory": "drawn"}


def brief_run(run, name, what, weights, flags):
    """The Run, to be changed, of a short training with these flags in a folder of its own below run.out, named by
    `what` is special about it. weights: those that it needs, copied from `run`."""
    folder = run.out / f"{name}.{td.seed_of(what, *map(run.checksum, weights)):08x}"
    flags = {"out": folder, "tracks": run.config.track_id_mode, "device": run.device} | flags
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]
    short = td.Run(td.parse_flags(words))
    if td.PROCESSES > 1:
        raise UserError("experiments train in one process, leave out torchrun")
    folder.mkdir(parents=True, exist_ok=True)
    for weight in weights:
        shutil.copyfile(run.path(weight), folder / f"{weight}.safetensors")
    return short


def train_briefly(short, train, weights):
    """Train what brief_run has set up, unless its weights are there."""
    if not short.path(weights).exists():
        started = time.time()
        with torch.enable_grad():
            train(short)
        print(f"{short.out}: trained in {(time.time() - started) / 60:.1f} minutes")
    return short


def distil_briefly(run, critic_steps=5, guidance=None, seed=0, **flags):
    """The Run of a short distillation of the causal student. critic_steps: the critic's for one of the generator;
    guidance: (w_text, w_motion) of the real score, None: the teacher's own; seed: beside that of `run`; flags: what
    is not as in SHORT, and of the command, sink_decay, reward, beta or memory."""
    how = {name: flags.pop(name, value) for name, value in SHORT.items()}
    updates = 1 if run.args.smoke else how["updates"]
    flags |= {"stage": "distill", "steps": updates * critic_steps, "seed": run.seed + seed, "rollout": how["rollout"]}
    what = how | flags | {"critic_steps": critic_steps, "guidance": guidance}
    short = brief_run(run, "distilled", what, ("vae", "teacher", "causal"), flags)
    short.recipe.batch, short.recipe.critic_steps = how["batch"], critic_steps
    short.clips = min(run.clips, how["images"])
    short.config = replace(short.config, guidance=guidance or run.config.guidance)
    return train_briefly(short, td.train_student, "student")


class Refreshed(KVCache):
    """A cache whose sink is, every 25 chunks, the one just written."""
    written = 0

    def write(self, k, v):
        super().write(k, v)
        self.written += 1
        if self.written % 25 == 0:
            self.chunks[0] = self.chunks[-1]


def distilled_row(run, distil, cache=KVCache, **settings):
    """eval_row of the student of a short distillation `distil`, arguments of distil_briefly. cache: what remembers."""
    short = distil_briefly(run, **distil)
    with unittest.mock.patch.object(motionstream, "KVCache", cache):
        return eval_row(short, **settings)


def drawn_tracks(vae):
    """A track head that draws the tracks instead, as dots of 5x5 pixels, and encodes them as a video, which is what
    MotionStream's table 3 compares with: a dot has the colour of its ID, where the track starts."""
    class DrawnTracks(TrackHead):
        def forward(self, tracks, visible, ids, height, width):
            (B, T, N, _), size = tracks.shape, torch.tensor([width, height])
            colour = torch.stack([(ids & 0xFFFF) / width, (ids >> 16) / height, torch.ones(B, N)], -1)      # (B, N, 3)
            inside = visible & ((tracks >= 0) & (tracks < size)).all(-1)
            b, t, n = inside.nonzero(as_tuple=True)
            x, y = (tracks[b, t, n].long() + 2).T
            video = torch.zeros(B, T, height + 4, width + 4, 3)
            for i, j in itertools.product(range(-2, 3), repeat=2):
                video[b, t, y + i, x + j] = colour[b, n]
            self.video = video if T % 4 == 1 else torch.cat([self.video, video], 1)     # a chunk goes on from the last
            with torch.no_grad():
                latents = vae.encode(self.video[:, :, 2:-2, 2:-2].permute(0, 4, 1, 2, 3) * 2 - 1)
            return latents[:, :, -((T + 3) // 4):] + 0 * self.conv.weight.sum()     # a gradient for what is not used

    return DrawnTracks


def damaged(pick):
    """td.pick with tracks as a bad tracker gives them, in three of four clips: jittered by 2 % of the width, or late,
    nothing is said of frames 1 to 12, or broken, half of the pieces of 4 frames are missing."""
    def picked(*args):
        clips = pick(*args)
        B, T, N = clips["visible"].shape
        kind, t = torch.randint(0, 4, (B, 1, 1)), torch.arange(T)[:, None]
        clips["tracks"] = clips["tracks"] + (kind == 1)[..., None] * 0.02 * td.SIZE * torch.randn(B, T, N, 2)
        gaps = (torch.rand(B, T // 4 + 1, N) < 0.5).repeat_interleave(4, 1)[:, :T]
        clips["visible"] &= ~((kind == 2) & (t > 0) & (t < 13) | (kind == 3) & (t > 3) & gaps)
        return clips
    return picked


def teach_briefly(run, steps, start=False, harm=False):
    """The Run of a short training of a teacher of the drawn world: from nothing, on dense tracks, by the track head
    that motionstream has; or from the teacher of `run` (start) at the rates of the causal stage, on tracks as
    they are or damaged (harm)."""
    c, head, steps = run.config, motionstream.TrackHead, 1 if run.args.smoke else steps
    flags = {"stage": "teacher", "steps": steps, "seed": run.seed, "vae": run.path("vae")}
    flags |= {"weights": run.path("teacher")} if start else {}
    what = [steps, start, harm, head.__name__, run.checksum("vae"), run.checksum("teacher")]
    short = brief_run(run, "taught", what, (), flags)
    short.clips, short.recipe.emphasis = min(run.clips, 512), 0.0       # no cell of a drawn video is empty
    if start:
        short.recipe.teacher = td.RECIPES["tiny"]["causal"]
    else:
        short.dense, short.config = 1, replace(c, track_dim=c.out_dim, in_dim=c.in_dim - c.track_dim + c.out_dim)
    with unittest.mock.patch.object(td, "pick", damaged(td.pick) if harm else td.pick):
        return train_briefly(short, td.train_teacher, "teacher")


def taught_row(run, teach, drawn=False, **settings):
    """eval_row of the teacher of a short training `teach`, arguments of teach_briefly; drawn: see drawn_tracks."""
    with unittest.mock.patch.object(motionstream, "TrackHead", drawn_tracks(run.vae()) if drawn else TrackHead):
        return eval_row(teach_briefly(run, **teach), model="teacher", **settings)


def speed_row(run, frames, **settings):
    """Time for a chunk and for a frame, decoded, as shares of those of the student as it is: of two streams in turn,
    medians of 15 chunks, the first of them the sixth."""
    overrides = {key: settings.pop(key) for key in [*settings] if hasattr(run.config, key)}
    scene, motion = new_case(frames=frames, **settings)
    streams = [play(run, "student", scene, motion, embed_words(td.NEUTRAL, run.config), **more)
               for more in (overrides, {"chunk": run.config.chunk})]
    seconds = []
    for _ in range(20):
        for stream in streams:
            started = time.perf_counter()
            count = next(stream).shape[2]
            seconds.append((time.perf_counter() - started) * np.array([1, 1 / count]))
    chunk, frame = np.median(np.array(seconds[10:]).reshape(15, 2, 2), 0).T
    return {"chunk": chunk[0] / chunk[1], "frame": frame[0] / frame[1]}


def decoders_row(run, **_):
    """How many times longer the decoder of Wan 2.1 takes than that of taew2_1 for a chunk of 12 frames of 64x64 pixels,
    in turn, medians of 5: random weights."""
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seconds, both = [], [(vae, vae.decode(latents)[1]) for vae in (WanVAE().eval(), TinyVAE(TinyVAEConfig()).eval())]
    for _ in range(5):
        for vae, state in both:
            started = time.perf_counter()
            vae.decode(latents, state)
            seconds.append(time.perf_counter() - started)
    wan, small = np.median(np.array(seconds).reshape(5, 2), 0)
    return {"times": wan / small}


def attention_row(run, layer, model="student", distil=None, **settings):
    """Where a layer's self-attention goes once the cache is full: in percent, to the sink, to the window and to the
    chunk itself. Means over a stream's passes (the clean ones too), clips, heads and tokens. distil: of a student of a
    short distillation."""
    run = distil_briefly(run, **distil) if distil else run
    (scene, motion), c, passes, attend = new_case(**settings), run.config, [], motionstream.attend

    def watched(q, k, v):
        parts = [n * q.shape[1] for n in (c.sink, c.window, 1)]                 # tokens
        if k.shape[1] == sum(parts):                                            # neither text nor a cache not yet full
            scores = torch.einsum("blnk,bsnk->bnls", q.float(), k.float()) / math.sqrt(q.shape[3])
            passes.append([part.sum(3).mean().item() for part in scores.softmax(3).split(parts, 3)])
        return attend(q, k, v)

    with unittest.mock.patch.object(motionstream, "attend", watched):
        for _ in play(run, model, scene, motion, embed_words(td.NEUTRAL, run.config)):
            pass
    shares = 100 * torch.tensor(passes).view(-1, c.num_layers, 3)[:, layer].mean(0)
    return dict(zip(("sink", "window", "itself"), shares.tolist()))


def words_row(run, model="teacher", text=None, guidance=None, **settings):
    """How often a motion that the caption names appears, in percent of the clips: those nearer, in mean square, to the
    film as captioned than to the same film with rigid objects, which neither spin nor pulse. share: where they lie
    between the two, 0 rigid, 1 as captioned. Clips whose two films are alike (40 dB), a spinning disc, do not count."""
    scene, motion = new_case(**settings)
    truth = world.render(scene, td.SIZE)
    rigid = world.render(scene | {"spin": 0 * scene["spin"], "pulse": 0 * scene["pulse"] + 1}, td.SIZE)
    text = text or world.caption(*settings["attributes"])
    guided = {"guidance": guidance} if guidance else {}
    video = torch.cat([*play(run, model, scene, motion, embed_words(text, run.config), **guided)], 2)
    differs = (truth - rigid).square().sum((1, 2, 3, 4))
    share = ((video - rigid) * (truth - rigid)).sum((1, 2, 3, 4)) / differs
    share = share[differs / truth[0].numel() > 4e-4]                            # the mean square of 40 dB
    return {"appears": 100 * (share > 0.5).float().mean().item(), "share": share.mean().item(), "clips": len(share)}


def encoding_row(run, by, **settings):
    """Milliseconds to encode the tracks of a clip: by "head" as the track head does, by "vae" as a drawn video."""
    _, motion = new_case(**settings)
    model, vae, seconds = run.model("student"), run.vae(), []
    tracks, visible = (motion[key].to(run.device) for key in ("tracks", "visible"))
    motion = sample.Motion(tracks, visible, track_ids(tracks, visible, model.config))
    for _ in range(9):
        started = time.perf_counter()
        if by == "vae":
            sample.draw_control(vae, motion, model.config, settings["frames"]).sum().item()     # waits for a GPU
        else:
            track_features(model, motion.tracks, motion.visible, motion.ids).sum().item()
        seconds.append(time.perf_counter() - started)
    return {"ms": 1000 * np.median(seconds)}


def tables(run):
    """The tables of the experiments, as in evaluate.py: MotionStream's table 4, figures 4, 6a and A2, and limits;
    Reward Forcing's sinks; a scene that is carried away or changes its light; objects, attention, rigidity."""
    clip = {"seed": "eval 1 False", "clips": run.eval_clips, "frames": td.CLIP, "objects": 1}
    frames = min(run.eval_frames, 20 * td.CLIP)                    # 20 times the training's length, in 30 pieces
    stream = clip | {"seed": "stream False", "clips": math.ceil(run.eval_clips / 4), "frames": frames,
                     "piece": math.ceil(frames / 30)}
    teacher, sinks = clip | {"model": "teacher"}, grid(sink_decay=(1.0, 0.999, 0.99, 0.9, 0.5)) + grid(sink=(0,))
    words = [{"seed": f"words {motion}", "attributes": (0, motion)} | case for motion in (1, 2) for case in
             [*grid(model=("vae", "student")), *grid(guidance=[(0, 1.5), (1, 1.5)]),
              *grid(model=("student", "teacher"), text=(td.NEUTRAL,))]]
    half = stream | {"frames": math.ceil(frames / 2), "piece": math.ceil(frames / 60)}
    drawn = {"measure": distilled_row, "distil": DRAWN_MEMORY}
    moving = stream | drawn | {"seed": "stream True", "camera": True, "points": "dense"}
    kept = grid(sink_decay=(1.0, 0.99, 0.9)) + [{"cache": Refreshed}]
    dusk = {"attributes": (1, 0), "change": "dusk", "later": world.caption(1, 0)}
    steps = [schedule(steps, run.config.shift) for steps in (1, 2, 4)]
    return {"streams": (stream | drawn, sinks),
            "moving camera": (moving, sinks),
            "memory": (stream | drawn, grid(sink=(0, 1, 2, 3), window=(1, 2, 4))),
            "memory of the shipped student": (stream, grid(sink=(0, 1, 2, 3), window=(1, 2, 4))),
            "chunk": (stream | drawn, grid(chunk=(1, 5))),
            "steps": (stream | drawn, grid(sigmas=steps)),
            "carried away": (moving | {"change": "carried away", "camera": False}, kept),
            "dusk": (half | drawn | dusk, kept),
            "self-rollout": (stream, grid(model=("causal",))),
            "guidance": (teacher, grid(guidance=[*itertools.product((0, 1, 2, 3), (0, 1, 1.5, 3))])),
            "limits": (clip | {"points": "dense"}, grid(speed=(1, 2, 3, 4, 6, 8)) + grid(
                change=("teleport", "two ways", "jittered", "late", "broken"))),
            "crossing": (clip | {"objects": 2, "seed": "crossing"}, grid(points=("dense", "drag"), change=(
                None, "crossing"))),
            "objects": (clip | {"points": "dense"}, grid(objects=(1, 2, 3, 6))),
            "attention": (clip | {"measure": attention_row, "frames": 2 * td.CLIP},
                          grid(model=("causal", "student"), layer=range(run.config.num_layers))
                          + grid(distil=(DRAWN_MEMORY,), layer=range(run.config.num_layers))),
            "speed": (clip | {"measure": speed_row, "clips": 1, "frames": 600}, grid(chunk=(1, 3, 5, 7)) + grid(
                sink=(0, 2, 3)) + grid(window=(2, 4, None)) + grid(sigmas=steps)),
            "words": (clip | {"measure": words_row, "clips": 2 * run.eval_clips}, words),
            **trainings(run, clip, half)}


def trainings(run, clip, half):
    """The tables of the experiments that have trainings of their own: short distillations, by both papers' settings;
    teachers with damaged tracks, and with tracks as a drawn video. half: a stream."""
    distillations = [*grid(seed=(0, 1), guidance=(None, (0, 0))), *grid(critic_steps=(1, 2)), {"sink_decay": 0.9},
                     *grid(reward=("motion",), beta=(0.5, 2.0))]
    students = [{"distil": how} for how in distillations]
    students += [{"distil": {}, "sink_decay": 0.9}]                         # EMA-Sink in streaming alone
    students += [{"measure": eval_row, "model": model} for model in ("causal", "student")]
    harmed = [{"teach": {"steps": 200, "start": True, "harm": harm}, "change": change}
              for harm in (False, True) for change in (None, "jittered", "late", "broken")]
    taught = clip | {"measure": taught_row, "points": "dense"}
    return {"distillation, dense": (clip | {"measure": distilled_row, "points": "dense"}, students),
            "distillation, drag": (clip | {"measure": distilled_row}, students),
            "distillation, stream": (half | {"measure": distilled_row}, students),
            "damaged tracks": (taught, harmed),
            "drawn tracks": (taught | {"teach": {"steps": 400}}, grid(drawn=(False, True))),
            "encoding": (clip | {"measure": encoding_row, "clips": 1, "points": "dense"}, grid(by=("vae", "head"))),
            "decoders": (clip | {"measure": decoders_row}, [{}])}


def main(argv=None):
    """Measure the tables of the experiments."""
    def work():
        run = new_run(argv, "experiments", __doc__)
        measure_tables(run, "experiments", tables(run))
    return td.reported(work)


if __name__ == "__main__":
    sys.exit(main())
