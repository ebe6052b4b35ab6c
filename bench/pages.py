"""Puts the figures of a run into docs/performance.md, between the marks that wait for them.

    <!-- bench goals -->
    | what | measured as | ... |
    <!-- end -->

The prose around them is written by people; where it draws a conclusion, it speaks of ratios.  A
mark whose part was not run keeps what it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKED = re.compile(r"(<!-- bench (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update(path: Path, found: Mapping[str, str]) -> None:
    """Rewrite the marked places of the file that there is a text for."""

    def fill(match: re.Match[str]) -> str:
        text = found.get(match["name"])
        return match[0] if text is None else f"{match[1]}{text}\n{match[3]}"

    path.write_text(MARKED.sub(fill, path.read_text()))


def tables(document: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by mark: each section by its name, "goals", and "machine"."""
    sections: Mapping[str, Mapping[str, Any]] = document["sections"]
    found = {name: _section(section) for name, section in sections.items()}
    goals = [goal for section in sections.values() for goal in section["goals"]]
    head = ("what", "measured as", "measured", "goal", "")
    found["goals"] = _table(head, [goal["row"] for goal in goals])
    found["machine"] = _machine(document)
    return found


def _section(section: Mapping[str, Any]) -> str:
    notes = "".join(f"\n- {note}" for note in section["notes"])
    return _table(section["head"], section["rows"]) + (f"\n{notes}" if notes else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    sides = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, sides, *rows))


def _machine(document: Mapping[str, Any]) -> str:
    about, options = document["machine"], document["options"]
    sources = ", ".join(document["corpus"].get("sources", {}))
    return (
        f"{about['cores']} cores ({about['cpu']}), Linux {about['kernel']}, {about['nbdkit']}; "
        f"load before the start {about['load_before']}; {options['rounds']} rounds of "
        f"{options['seconds']} s, {options['lab_rounds']} guests each; pages of {sources}."
    )
