"""Copies the Python packages that zcache imports at run time into a folder.

    .venv/bin/python deploy/packages.py FOLDER

From .venv, whose packages were checked against requirements.lock; those that pyproject.toml names
and what they need in turn, without caches, scripts and anything that only developing needs.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def closure(requirements: list[str]) -> list[str]:
    """Names of these packages and of all that they need, extras left out."""
    found: dict[str, None] = {}
    waiting = list(requirements)
    while waiting:
        requirement, _, marker = waiting.pop().partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
        assert match is not None, requirement
        name = match[0].lower().replace("_", "-")
        if name in found or "extra" in marker:
            continue
        try:
            more = importlib.metadata.requires(name)
        except importlib.metadata.PackageNotFoundError:
            if not marker:
                raise
            continue  # for another Python or system
        found[name] = None
        waiting += more or []
    return list(found)


def copy(name: str, folder: Path) -> None:
    """One installed package's files."""
    package = importlib.metadata.distribution(name)
    for file in package.files or []:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), target)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in closure(project["dependencies"]):
        copy(name, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
