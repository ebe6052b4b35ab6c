"""What a measurement found, and how it is shown.

    Section   one table of figures, goals with their verdicts, raw data for the JSON file
    Goal      one measured number against one bound; `text` says what both are

A goal is a ratio wherever it can be: absolute figures are those of one machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """`measured` should be at most, or at least, `bound`."""

    name: str
    measured: float
    bound: float
    at_most: bool
    text: str
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def show(self, value: float) -> str:
        return f"{value:.1f}" if self.unit else f"{value:.2f}"

    def row(self) -> list[str]:
        sign = "<=" if self.at_most else ">="
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "missed"
        bound, measured = self.show(self.bound), self.show(self.measured)
        if measured == bound and not self.met:
            measured = f"{self.measured:.3f}"  # how it was missed
        return [self.name, self.text, f"{measured}{unit}", f"{sign} {bound}{unit}", verdict]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "met": self.met, "row": self.row()}


@dataclass
class Section:
    """The result of one part of the bench."""

    name: str
    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: Any = None
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "head": list(self.head),
            "rows": [list(row) for row in self.rows],
            "goals": [goal.as_json() for goal in self.goals],
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
            "raw": self.raw,
        }


def figure(value: float) -> str:
    """Three digits that matter: 1.23, 12.3, 123, 1234."""
    if not math.isfinite(value):
        return "-"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 2)}f}"


def print_section(section: Section, console: Console) -> None:
    table = Table(title=section.title, title_justify="left", title_style="bold")
    for number, name in enumerate(section.head):
        table.add_column(name, justify="right" if number else "left")
    for row in section.rows:
        table.add_row(*row)
    console.print(table)
    for note in section.notes:
        console.print(f"  {note}", highlight=False)
    console.print()


def print_goals(sections: Sequence[Section], console: Console) -> None:
    if not any(section.goals for section in sections):
        return
    table = Table(title="Goals", title_justify="left", title_style="bold")
    for name, right in (("what", 0), ("measured as", 0), ("measured", 1), ("goal", 1), ("", 0)):
        table.add_column(name, justify="right" if right else "left")
    for section in sections:
        for goal in section.goals:
            style = "green" if goal.met else "red"
            *cells, verdict = goal.row()
            table.add_row(*cells, f"[{style}]{verdict}[/]")
    console.print(table)
