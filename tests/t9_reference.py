"""Reference pages, man pages and completion are what the code says, and work."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from plugin import reference
from plugin.cli import build_parser
from plugin.config import KEYS
from zcache_core.counters import COUNTERS, HISTOGRAMS

ROOT = Path(__file__).resolve().parents[1]
PARSER = build_parser()
PAGES = reference.pages(PARSER)


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_current(name: str) -> None:
    assert (ROOT / name).read_text() == PAGES[name], "run 'make reference'"


def test_nothing_is_missing_on_them() -> None:
    for counter in COUNTERS:
        (row,) = re.findall(rf"^\| `{counter.name}` .*$", PAGES["docs/reference/counters.md"], re.M)
        assert counter.help in row
        assert f"/{counter.name}`" in row
        assert "`zcache_" in row
    for histogram in HISTOGRAMS:
        assert f"| `{histogram.name}` |" in PAGES["docs/reference/counters.md"]
    for key in KEYS:
        assert f"| `{key.name}` |" in PAGES["docs/reference/keys.md"]
        assert f".B {key.name}=\n" in PAGES["docs/man/zcache-plugin.1"]
    for name, command in reference.commands(PARSER).items():
        assert f"## zcache {name}\n" in PAGES["docs/reference/command.md"]
        for action in reference.options(command):
            assert action.help, f"zcache {name} {action.dest} has no help"
    for method, function in reference.methods().items():
        assert function.__doc__, method
        assert f"| `{method}` |" in PAGES["docs/reference/rpc.md"]


def test_other_files_in_those_folders_are_left_over_from_before() -> None:
    there = {
        str(f.relative_to(ROOT))
        for d in ("reference", "man")
        for f in (ROOT / "docs" / d).iterdir()
    }
    assert there == PAGES.keys()


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".1")])
def test_man_pages_are_well_formed(name: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-ww", ROOT / name], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.sub(".\x08", "", done.stdout)  # without overstrikes
    assert "NAME" in shown
    assert "--control" in shown or "size=" in shown


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a line."""
    script = folder / "complete"
    script.write_text(reference.completion(PARSER))
    words = line.split(" ")
    asked = f"""
        source {script}
        COMP_WORDS=({" ".join(repr(word) for word in words)})
        COMP_CWORD={len(words) - 1}
        _zcache
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", asked], cwd=folder, check=True, capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zcache to", ["top"]),
        ("zcache st", ["status", "stats-fs", "stop"]),
        ("zcache top --i", ["--interval"]),
        ("zcache status --", ["--json", "--control", "--help"]),
        ("zcache top --control complet", ["complete"]),
        ("zcache top --interval x", []),
        ("zcache doctor comp", ["complete"]),
        ("zcache completion z", ["zsh"]),
        ("zcache nothing x", []),
        ("zcache serve siz", ["size="]),
        ("zcache up recompress_", ["recompress_age="]),
        ("zcache set re", ["recompress=", "recompress_age="]),
        ("zcache serve --config complet", ["complete"]),
    ],
)
def test_completion_in_bash(line: str, offered: list[str], tmp_path: Path) -> None:
    assert sorted(completed(line, tmp_path)) == sorted(offered)


def test_completion_offers_every_command(tmp_path: Path) -> None:
    offered = completed("zcache ", tmp_path)
    assert {*reference.commands(PARSER), "--help"} == set(offered)


def test_the_command_prints_it() -> None:
    done = subprocess.run(
        [ROOT / ".venv/bin/zcache", "completion", "zsh"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "autoload -U bashcompinit && bashcompinit\n" + reference.completion(
        PARSER
    )
