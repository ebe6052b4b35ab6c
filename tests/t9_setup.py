"""The setup scripts: they do what is missing, nothing twice, and survive being cut off.

The compiler and apt are stood in for, so that each case takes milliseconds; `make test`
itself is the test with the real ones.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Compiles what is newer than its result, as distutils does; the text "warn" is a warning.
COMPILER = """
import os, pathlib, sys
for source in pathlib.Path("zcache_core").glob("*.pyx"):
    target = source.with_suffix(".cpython.so")
    if target.exists() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns:
        continue
    text = source.read_text()
    if "error" in text:
        sys.exit(f"{source}: error: no such thing")
    if "warn" in text:
        print(f"{source}: warning: odd", file=sys.stderr)
        if os.environ.get("ZCACHE_WERROR"):
            sys.exit("warnings are errors")
    target.write_text(text.upper())
    with open("compiled", "a") as log:
        print(source.stem, file=log)
pathlib.Path("plugin/zcache-relay").write_text("")
"""


def script(path: Path, text: str) -> None:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Tree:
    """A scratch tree with two modules, the real core.sh and a compiler stand-in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("Makefile", "deploy/core.sh"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        script(root / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.write("requirements.lock", "")
        self.write("setup.py", COMPILER)
        self.write("zcache_core/counters.py", "")
        self.write("zcache_core/native.h", "")
        self.write("plugin/relay.c", "")
        self.write("zcache_core/one.pyx", "one")
        self.write("zcache_core/two.pyx", "two")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def build(self, *mode: str, succeeds: bool = True) -> tuple[list[str], str]:
        """Modules compiled by one run of core.sh, sorted, and what it printed."""
        log = self.root / "compiled"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["deploy/core.sh", *mode], cwd=self.root, capture_output=True, text=True
        )
        assert (done.returncode == 0) is succeeds, done
        for module in ("one", "two") if succeeds else ():
            source = self.root / f"zcache_core/{module}.pyx"
            assert source.with_suffix(".cpython.so").read_text() == source.read_text().upper()
        return sorted(log.read_text().split()) if log.exists() else [], done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_core_that_is_built_is_left_alone(tree: Tree) -> None:
    assert tree.build()[0] == ["one", "two"]
    assert tree.build() == ([], "")


def test_only_what_changed_is_compiled(tree: Tree) -> None:
    tree.build()
    tree.write("zcache_core/two.pyx", "two, changed")
    assert tree.build()[0] == ["two"]
    (tree.root / "zcache_core/one.cpython.so").unlink()
    assert tree.build()[0] == ["one"]


@pytest.mark.parametrize(
    "name", ["setup.py", "zcache_core/native.h", "zcache_core/new.pxd", "requirements.lock"]
)
def test_what_all_share_compiles_all(tree: Tree, name: str) -> None:
    tree.build()
    path = tree.root / name
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    assert tree.build()[0] == ["one", "two"]


def test_strict_serves_plain_but_not_the_other_way(tree: Tree) -> None:
    tree.build()
    assert tree.build("strict")[0] == ["one", "two"]
    assert tree.build("strict") == ([], "")
    assert tree.build() == ([], "")


def test_warnings_are_shown_or_are_errors(tree: Tree) -> None:
    tree.write("zcache_core/two.pyx", "warn")
    assert "two.pyx: warning: odd" in tree.build()[1]
    assert "warnings are errors" in tree.build("strict", succeeds=False)[1]
    assert "warnings are errors" in tree.build("strict", succeeds=False)[1]
    tree.write("zcache_core/two.pyx", "two")
    assert "two" in tree.build("strict")[0]


def test_after_an_error_the_rest_is_not_compiled_again(tree: Tree) -> None:
    tree.build("strict")
    tree.write("zcache_core/two.pyx", "error")
    assert "no such thing" in tree.build("strict", succeeds=False)[1]
    tree.write("zcache_core/two.pyx", "two, mended")
    assert tree.build("strict")[0] == ["two"]


def test_a_build_that_was_cut_off_starts_from_nothing(tree: Tree) -> None:
    tree.build()
    setup = (tree.root / "setup.py").read_text()
    # Half a module, newer than its source, and gone without a word.
    cut = "\nopen('zcache_core/one.cpython.so', 'w').write('ha')\nos.kill(os.getppid(), 9)\n"
    tree.write("zcache_core/two.pyx", "two, changed")
    tree.write("setup.py", setup + cut)
    tree.build(succeeds=False)
    tree.write("setup.py", setup)
    assert tree.build()[0] == ["one", "two"]


# -- Debian packages --------------------------------------------------------------------


def packages(folder: Path, *names: str, user: int = 0, sudo: bool = True) -> tuple[int, str, str]:
    """Exit code, output and apt's calls of packages.sh where only `gcc` is installed."""
    tools, calls = folder / "bin", folder / "calls"
    calls.write_text("")
    record = f'#!/bin/sh\necho "$(basename "$0")" "$@" >>{calls}\n'
    script(
        tools / "dpkg-query", "#!/bin/sh\necho 'installed gcc'\necho 'not-installed make'\nexit 1\n"
    )
    script(tools / "dpkg", record)
    script(tools / "apt-get", record + 'case "$*" in *update*) exit 100 ;; esac\n')
    script(tools / "id", f"#!/bin/sh\necho {user}\n")
    if sudo:
        script(tools / "sudo", record + 'exec "$@"\n')
    for name in ("sh", "sed", "grep", "env", "basename"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [ROOT / "deploy/packages.sh", *names],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text()


def test_installed_packages_are_left_alone(tmp_path: Path) -> None:
    assert packages(tmp_path, "gcc") == (0, "", "")


def test_only_missing_packages_are_installed(tmp_path: Path) -> None:
    """A list that cannot be refreshed does not stop the others."""
    code, output, calls = packages(tmp_path, "gcc", "make", "fio")
    assert code == 0
    assert "could not be refreshed" in output
    assert calls.splitlines()[-1].endswith("install --no-install-recommends make fio")
    assert "sudo" not in calls


def test_a_user_installs_with_sudo(tmp_path: Path) -> None:
    _, _, calls = packages(tmp_path, "make", user=1000)
    assert [ln for ln in calls.splitlines() if ln.startswith("sudo env") and "install" in ln]


def test_without_sudo_it_says_what_to_type(tmp_path: Path) -> None:
    code, output, calls = packages(tmp_path, "make", "gcc", user=1000, sudo=False)
    assert code == 1
    assert "As root: apt-get install make" in output
    assert calls == ""


# -- the real ones ----------------------------------------------------------------------


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the project's own .venv")
def test_the_command_works_from_anywhere(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [ROOT / ".venv/bin/zcache", "version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("zcache ")
