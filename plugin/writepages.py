"""Writes the reference and man pages that `reference` makes: `make reference`."""

from __future__ import annotations

import sys
from pathlib import Path

from plugin.cli import build_parser
from plugin.reference import pages

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Those that are not current; exit code 0."""
    for name, text in pages(build_parser()).items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"zcache: wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
