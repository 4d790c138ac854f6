"""The house: imports run one way, README and docs say what is there, pieces run on their own."""

import ast
import contextlib
import itertools
import math
import re
import shlex
import shutil
import subprocess
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_distill as td
from extras.testing import (HERE, SMALL_VAE, WAN22, all_equal, clip_of, folder, linear_vae,
                            new_model, new_tracks, new_vae, rand, randomised, seeded, wan_video)
from extras.video import count_frames
from motionstream import KVCache, SelfAttention, TrackHead, rollout, rope_table
from vae import WanVAE

# --------------------------------------------------------------------------------------------------
# Imports.

def imports(path, anywhere):
    """The modules of this project that a file imports at its top, or anywhere in it."""
    tree = ast.parse(path.read_text())
    nodes = tree.body
    if anywhere:
        nodes = ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if file_of(name).is_file()}


def file_of(module):
    return HERE / f"{module.replace('.', '/')}.py"


def is_test(module):
    return module.split(".")[-1].startswith("test")


def programs():
    """The names of all modules but the tests."""
    files = list(HERE.glob("*.py")) + list(HERE.glob("extras/*.py"))
    paths = [file.relative_to(HERE).with_suffix("") for file in files]
    modules = [path.as_posix().replace("/", ".") for path in paths]
    return [module for module in modules if not is_test(module)]


def test_nothing_imports_a_test():
    for module in programs():
        tests = [other for other in imports(file_of(module), anywhere=True) if is_test(other)]
        assert not tests, f"{module} imports {tests}"


def test_imports_make_no_circle():
    left = {module: imports(file_of(module), anywhere=False) for module in programs()}
    assert len(left) > 10
    assert "motionstream" in left["sample"]
    while left:                                 # take away those that import nothing that is left
        free = [module for module, others in left.items() if not others & left.keys()]
        assert free, f"a circle of imports among {left.keys()}"
        for module in free:
            del left[module]


def test_assets_hold_data():
    assert not list((HERE / "assets").glob("*.py"))


# --------------------------------------------------------------------------------------------------
# README and docs.

def readme():
    return (HERE / "README.md").read_text()


def docs():
    return sorted((HERE / "docs").glob("*.md"))


def headings(page):
    """The anchors of a page's headings, as GitHub names them."""
    anchors = set()
    for title in re.findall(r"^#+ (.*)$", page.read_text(), re.M):
        words = re.sub(r"[^\w\- ]", "", title.lower())
        anchors.add(words.replace(" ", "-"))
    return anchors


def check_link(page, link):
    name, _, anchor = link.partition("#")
    there = page
    if name:
        there = page.parent / name
    assert there.exists(), f"{page.name}: no {link}"
    if anchor:
        assert there.suffix == ".md", f"{page.name}: {link}, a line number goes stale"
        assert anchor in headings(there), f"{page.name}: no heading for {link}"


def test_the_readme_is_short_and_links_lead_somewhere():
    data = (HERE / "README.md").read_bytes()
    assert len(data) <= 14336
    assert len(data.splitlines()) <= 300
    count = 0
    for page in [HERE / "README.md"] + docs():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match("https?:", link):
                check_link(page, link)
                count += 1
    assert count > 50, count


def test_the_readme_names_what_the_code_has():
    rows = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)\)", readme())
    assert len(rows) > 15, rows
    for name, file in rows:
        definition = re.compile(rf"^\s*(def|class) {name}\b", re.M)
        assert definition.search((HERE / file).read_text()), f"no {name} in {file}"


def test_commands_in_the_readme_and_docs_have_flags_that_the_programs_know():
    pages = [readme()] + [page.read_text() for page in docs()]
    commands = re.findall(r"python (-m extras\.\w+|\w+\.py)([^`\n]*)", "".join(pages))
    assert len(commands) > 40, commands
    training = (HERE / "train_distill.py").read_text()          # some of extras take its flags too
    for program, words in commands:
        if re.search(f"[Ss]ave it as `{program}`", "".join(pages)):     # a recipe, given there
            continue
        module = program.removeprefix("-m ").removesuffix(".py")
        known = file_of(module).read_text()
        assert "__main__" in known, f"{program} is no program"
        if module.startswith("extras"):
            known += training
        for flag in re.findall(r"--[\w-]+", words):
            assert re.search(rf"{flag}(?![\w-])", known), f"{program} knows no {flag}"


def test_what_the_readme_breaks_is_there():
    commands = re.findall(r"`(perl -pi -e '[^']+' (\w+\.py))`", readme())
    assert len(commands) == 4, commands
    for line, file in commands:
        source = (HERE / file).read_text()
        with folder() as here:
            shutil.copy(HERE / file, here)
            subprocess.run(shlex.split(line), cwd=here, check=True)
            changed = (here / file).read_text()
        assert changed != source, f"{line} changes nothing"
        compile(changed, file, "exec")


def test_the_readmes_lines_stream_from_python():
    code, = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert code.count("120, 12") == 1
    with folder() as here, contextlib.chdir(here):
        (here / "assets").symlink_to(HERE / "assets")
        exec(code.replace("120, 12", "20, 12"), {})                 # two chunks
        assert count_frames("stream.mp4") == 9 + 12


# --------------------------------------------------------------------------------------------------
# Pieces that people copy run on their own, with torch alone.

def lifted(file, names, **given):
    """The named definitions of a file, executed where nothing but torch and three standard modules
    is known, and what is given."""
    space = {
        "__name__": "lifted",
        "torch": torch,
        "nn": nn,
        "F": F,
        "math": math,
        "itertools": itertools,
        "dataclass": dataclass,
        "SDPBackend": SDPBackend,
        "sdpa_kernel": sdpa_kernel,
    }
    space |= given
    for node in ast.parse((HERE / file).read_text()).body:
        if name_of(node) in names:
            code = compile(ast.Module([node], []), file, "exec")
            exec(code, space)
    return SimpleNamespace(**space)


def name_of(node):
    """What a definition defines: a function, a class, a constant."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    return getattr(node, "name", None)


FLOW = ["per_frame", "add_noise", "to_x0", "shift_sigma", "same_sigma", "check_shape", "with_first"]
ATTENTION = ["KVCache", "RMSNorm", "apply_rope", "ATTENTION", "attend", "SelfAttention"]
HEAD = [
    "FRAMES", "sinusoid", "check_shape", "inside_picture", "cell_of", "lowest_rank", "TrackHead"]
GUIDANCE = ["joint_guidance", "without", "guided_velocity"]
VAE = ["FRAMES", "check_video", "check_latents"]
LAYERS = VAE + ["each_frame", "channels_to_frames"]
TINY_VAE = LAYERS + [
    "TinyVAEConfig", "conv", "MemBlock", "Repack", "frames_to_channels", "grow_frames",
    "build_encoder", "build_decoder", "run_layers", "TinyVAE"]
LINEAR_VAE = VAE + ["Segmenter", "LinearVAEConfig", "LinearVAE"]
WAN_VAE = LAYERS + [
    "WanVAEConfig", "STATISTICS", "CausalConv", "TimeConv", "Causal", "PerFrame", "ChannelNorm",
    "ResBlock", "Attention", "DownStage", "UpStage", "downsample", "upsample", "res_blocks",
    "middle", "head", "build_wan_encoder", "build_wan_decoder", "columns_first", "WanVAE"]


def test_attention_with_its_cache_runs_from_its_own_source():
    own = lifted("motionstream.py", ATTENTION)
    theirs = randomised(SelfAttention(40, 2, 1e-6))
    ours = randomised(own.SelfAttention(40, 2, 1e-6))
    their_cache = KVCache(1, 1)
    our_cache = own.KVCache(1, 1)
    rope = rope_table(3, 2, 3, 20, "cpu")
    for i in range(5):
        x = rand(2, 6, 40, seed=i)
        seen = rope[:6 * min(i + 1, 3)]
        expected = theirs(x, seen, their_cache, write=True)
        assert ours(x, seen, our_cache, write=True).equal(expected)


def test_the_track_head_runs_from_its_own_source():
    own = lifted("motionstream.py", HEAD)
    tracks, visible, ids = new_tracks(9, 7)
    theirs = randomised(TrackHead(8, 5, 8))
    ours = randomised(own.TrackHead(8, 5, 8))
    expected = theirs(tracks, visible, ids, 32, 48)
    assert ours(tracks, visible, ids, 32, 48).equal(expected)


def test_rollout_runs_from_its_own_source():
    names = FLOW + ["chunk_sizes", "split_conditions", "remember", "rollout"]
    own = lifted("motionstream.py", names)
    model = new_model()
    noise, given, first = clip_of(8)
    expected = list(rollout(model, noise, given, first, rng=seeded()))
    found = list(own.rollout(model, noise, given, first, rng=seeded()))
    assert all_equal(found, expected)


def test_dmd_loss_runs_from_its_own_source():
    needs = lifted("motionstream.py", FLOW + GUIDANCE)
    own = lifted("train_distill.py", ["score_sigma", "real_and_fake", "dmd_loss"], **vars(needs))
    teacher = new_model()
    critic = new_model(1)
    x0, given, first = clip_of(3)
    torch.manual_seed(0)
    expected = td.dmd_loss(x0, teacher, critic, given, first, 5.0)
    torch.manual_seed(0)
    found = own.dmd_loss(x0, teacher, critic, given, first, 5.0)
    assert found.equal(expected)
    assert found > 0


def check_lifted_vae(own, theirs, video):
    """Both encode and decode to the same bits."""
    z = own.encode(video)
    assert z.equal(theirs.encode(video))
    found, _ = own.decode(z)
    expected, _ = theirs.decode(z)
    assert found.shape == video.shape
    assert found.equal(expected)


def test_the_vaes_run_from_their_own_source():
    video = rand(1, 3, 9, 16, 16)
    own = lifted("vae.py", TINY_VAE)
    config = own.TinyVAEConfig(**vars(SMALL_VAE))
    check_lifted_vae(randomised(own.TinyVAE(config)), new_vae(), video)
    assert own.TinyVAE().stride == 8

    own = lifted("vae.py", LINEAR_VAE)
    vae = own.LinearVAE(own.LinearVAEConfig(4))
    check_lifted_vae(randomised(vae), linear_vae(), video)

    own = lifted("vae.py", WAN_VAE, OrderedDict=OrderedDict)
    vae = randomised(own.WanVAE(own.WanVAEConfig(48, 8, 12, True)))
    check_lifted_vae(vae, randomised(WanVAE(WAN22)), wan_video(vae, 5))
