"""The house: imports run one way; README and docs say what is there."""

import ast
import contextlib
import re
import shlex
import shutil
import subprocess



from extras.testing import HERE, folder
from sample import count_frames

# ----------------------------------------------------------------------------------------------------------------------
# The README.

def imports(path, inside):
    """The modules of this project that a file imports at its top or, with inside=True, anywhere."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {name for name in found if (HERE / f"{name.replace('.', '/')}.py").is_file()}


def test_nothing_imports_a_test_and_imports_make_no_circle():
    files = {path.relative_to(HERE).as_posix()[:-3].replace("/", "."): path
             for path in (*HERE.glob("*.py"), *HERE.glob("extras/*.py"))}
    tops = {}
    for name, path in files.items():
        if not name.rpartition(".")[2].startswith("test"):
            tests = {other for other in imports(path, inside=True) if other.rpartition(".")[2].startswith("test")}
            assert not tests, f"{name} imports {tests}"
            tops[name] = imports(path, inside=False)
    assert len(tops) > 10 and "motionstream" in tops["sample"], tops
    while tops:                                                 # take away those that import nothing that is left
        free = {name for name, others in tops.items() if not others & tops.keys()}
        assert free, f"a circle of imports among {tops.keys()}"
        for name in free:
            del tops[name]
    assert not [*(HERE / "assets").glob("*.py")], "assets holds data"


def headings(text):
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short_and_links_lead_somewhere():
    data = (HERE / "README.md").read_bytes()
    assert len(data) <= 14336 and len(data.splitlines()) <= 300, f"{len(data)} bytes"
    count = 0
    for page in HERE / "README.md", *sorted((HERE / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match("https?:", link):
                continue
            name, _, anchor = link.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name}: no {link}"
            if anchor:
                assert there.suffix == ".md", f"{page.name}: {link}, a line number goes stale"
                assert anchor in headings(there.read_text()), f"{page.name}: no heading for {link}"
            count += 1
    assert count > 50, count


def test_the_readme_and_docs_name_what_the_code_has():
    text = (HERE / "README.md").read_text()
    rows = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)\)", text)
    assert len(rows) > 15, rows
    for name, file in rows:
        assert re.search(rf"^\s*(def|class) {name}\b", (HERE / file).read_text(), re.M), f"no {name} in {file}"
    pages = text + "".join(page.read_text() for page in (HERE / "docs").glob("*.md"))
    commands = re.findall(r"python (?:-m (extras\.\w+)|(\w+\.py))([^`\n]*)", pages)
    assert len(commands) > 40, commands
    for module, file, more in commands:
        path = HERE / (file or module.replace(".", "/") + ".py")
        assert "__main__" in path.read_text(), f"{path} is no program"
        known = path.read_text() + ((HERE / "train_distill.py").read_text() if module else "")
        for flag in re.findall(r"--[\w-]+", more):
            assert re.search(rf"{flag}(?![\w-])", known), f"{path.name} knows no {flag}"


def test_what_the_readme_breaks_is_there():
    commands = re.findall(r"`(sed -i '[^']+' (\w+\.py))`", (HERE / "README.md").read_text())
    assert len(commands) == 2, commands
    for line, file in commands:
        with folder() as here:
            shutil.copy(HERE / file, here)
            subprocess.run(shlex.split(line), cwd=here, check=True)
            changed = (here / file).read_text()
            assert changed != (HERE / file).read_text(), f"{line} changes nothing"
            compile(changed, file, "exec")


def test_the_readmes_lines_stream_from_python():
    code, = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert code.count("120, 12") == 1
    with folder() as here, contextlib.chdir(here):
        (here / "assets").symlink_to(HERE / "assets")
        exec(code.replace("120, 12", "20, 12"), {})                 # two chunks
        assert count_frames("stream.mp4") == 9 + 12
