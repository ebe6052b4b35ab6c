"""What the README promises is there: keys, targets, the commands to swap with, links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from plugin.config import KEYS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_key_is_in_the_table_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [key.name for key in KEYS]
    for (name, default), key in zip(rows, KEYS, strict=True):
        assert key.default in default.replace("`", ""), name


def test_every_target_exists_and_help_lists_it() -> None:
    helped = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    targets = set(re.findall(r"^  make (\w+)", helped.stdout, re.MULTILINE))
    assert targets >= {"setup", "run", "test", "demo", "bench", "soak", "lint", "clean", "help"}
    assert set(re.findall(r"(?:`|    )(?:sudo )?make ([a-z]+)", README)) <= targets


def test_the_server_says_what_the_readme_says() -> None:
    """Only the socket's place differs."""
    told = (ROOT / "deploy/run.sh").read_text().replace("$socket", "/run/zcache/zcache.sock")
    commands = [line.strip() for line in re.findall(r"^ {6}(\w.*)$", told, re.MULTILINE)]
    assert len(commands) >= 6
    for command in commands:
        assert f"    {command}\n" in README, command


def test_links_lead_somewhere() -> None:
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for file in files:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
            assert "://" in target or (file.parent / target).exists(), f"{file.name}: {target}"
