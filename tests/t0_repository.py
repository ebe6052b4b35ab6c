"""The repository's shape: what lies at the top, how long files are, what no file may say.

It looks at what git tracks or would track, so that a stray file is seen before it is
committed.  A copy without git is looked at by the same ignore rules.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

AT_THE_TOP = {
    ".ci",
    "zcache_core",
    "cluster",
    "plugin",
    "deploy",
    "tests",
    "bench",
    "docs",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "requirements.lock",
    "setup.py",
}
LOCK = "requirements.lock"
CODE_LINES_MAX = 500
CODE = {".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".sh"}

# Paths of somebody's machine, and the hosts of package registries (packages are taken by
# name, from wherever the machine is told to look).  Split, so that this file passes.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(ro[o]t|wo[r]k|fa[r]m)/\w|/tm[p]/(bash|zc)\b"
    r"|\b(py[p]i\.org|pythonh[o]sted\.org|deb\.de[b]ian\.org|npm[j]s\.(org|com)|githu[b]usercontent)"
)


def git_files(root: Path, scratch: Path) -> list[Path]:
    """Files under `root` that are tracked or not ignored, relative to it."""
    git = ["git", "-c", "safe.directory=*"]
    if not (root / ".git").exists():
        subprocess.run([*git, "init", "-q", "--bare", str(scratch / "none.git")], check=True)
        git += ["--git-dir", str(scratch / "none.git"), "--work-tree", str(root)]
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    files = {Path(name) for name in listed.stdout.split("\0") if name}
    return sorted(file for file in files if (root / file).is_file())


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return git_files(ROOT, tmp_path)


def test_only_what_belongs_lies_at_the_top(files: list[Path]) -> None:
    assert {file.parts[0] for file in files} <= AT_THE_TOP


def test_ignored_files_are_not_looked_at(tmp_path: Path) -> None:
    """The list is that of the ignore rules, also where there is no .git."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".gitignore").write_text("/build/\n*.so\n")
    for name in ("build/log", "a.so", "a.py"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    assert git_files(tree, tmp_path) == [Path(".gitignore"), Path("a.py")]


def test_no_code_file_is_too_long(files: list[Path]) -> None:
    lines = {f: len((ROOT / f).read_bytes().splitlines()) for f in files if f.suffix in CODE}
    assert lines
    assert {f: n for f, n in lines.items() if n > CODE_LINES_MAX} == {}


def test_no_file_names_a_machine_or_a_registry(files: list[Path]) -> None:
    found = []
    for file in files:
        text = (ROOT / file).read_text(errors="replace")
        found += [f"{file}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not found, "\n".join(found)


def test_forbidden_words_are_seen() -> None:
    for folder in ("root", "work", "farm"):
        assert FORBIDDEN.search(f"cp x /{folder}/main"), folder
    for host in ("py~pi.org/simple", "files.python~hosted.org", "npm~js.com"):
        assert FORBIDDEN.search("https://" + host.replace("~", "")), host
    for fine in ("root=/dev/root rootflags=/", "/run/zcache", "network/x", "/root", "a/work/b"):
        assert not FORBIDDEN.search(fine), fine


# -- Python packages --------------------------------------------------------------------


def locked() -> dict[str, str]:
    """Name -> version of every line of the lock file."""
    pins = re.findall(r"^([\w.-]+)==(\S+) \\$", (ROOT / LOCK).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def declared() -> list[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        tables = tomllib.load(file)
    project = tables["project"]
    lines = [*tables["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [Requirement(line) for line in lines]


def test_the_lock_file_holds_pins_and_hashes_only() -> None:
    """No download address: the machine's own settings say where packages come from."""
    line = re.compile(r"#.*|[\w.-]+==[\w.]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?|    # .*|")
    text = (ROOT / LOCK).read_text()
    assert [ln for ln in text.split("\n") if not line.fullmatch(ln)] == []
    assert "://" not in text
    assert len(re.findall(r"==\S+ \\\n    --hash=", text)) == len(locked()) > 10


def test_the_lock_file_keeps_what_the_project_declares() -> None:
    pins = locked()
    wrong = [
        str(want)
        for want in declared()
        if not want.specifier.contains(pins.get(canonicalize_name(want.name), "0"))
    ]
    assert not wrong, f"write {LOCK} anew (its head says how): {wrong}"


def test_every_declared_package_has_both_bounds() -> None:
    for want in declared():
        operators = {part.operator for part in want.specifier}
        assert {">=", "<"} <= operators, str(want)
