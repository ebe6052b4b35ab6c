"""How much is lent: down while tasks stall for memory, up again after calm, told by files."""

from __future__ import annotations

from pathlib import Path

from cluster.generosity import CALM_S, DOWN_PERMILLE, Generosity


class Machine:
    """Files as the kernel's: stalled time, and available memory."""

    def __init__(self, folder: Path) -> None:
        self.psi, self.meminfo = folder / "psi", folder / "meminfo"
        self.stalled_us = 5_000_000
        self.stall(0)
        self.available(50)

    def stall(self, us: int) -> None:
        self.stalled_us += us
        self.psi.write_text(
            f"some avg10=0.00 avg60=0.00 avg300=0.00 total={self.stalled_us}\nfull total=7\n"
        )

    def available(self, percent: int) -> None:
        self.meminfo.write_text(f"MemTotal:  100000 kB\nMemAvailable:  {percent * 1000} kB\n")


def test_down_at_once_and_up_after_calm(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    generosity = Generosity(machine.psi, machine.meminfo)
    generosity.look()
    assert (generosity.permille, generosity.is_short) == (1000, False)
    machine.stall(99_000)  # below a tenth of a second
    generosity.look()
    assert not generosity.is_short
    for step in range(1, 4):
        machine.stall(101_000)
        generosity.look()
        assert (generosity.permille, generosity.is_short) == (1000 - step * DOWN_PERMILLE, True)
    for _ in range(CALM_S - 1):
        generosity.look()
        assert generosity.is_short
    generosity.look()
    assert not generosity.is_short
    before = generosity.permille
    for _ in range(100):
        generosity.look()
    assert before < generosity.permille == 1000


def test_never_below_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    generosity = Generosity(machine.psi, machine.meminfo)
    for _ in range(50):
        machine.stall(900_000)
        generosity.look()
    assert generosity.permille == 0


def test_a_late_look_is_judged_by_its_time(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    generosity = Generosity(machine.psi, machine.meminfo)
    machine.stall(300_000)
    generosity.look(seconds=5.0)
    assert not generosity.is_short


def test_without_psi_available_memory_tells(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.psi.unlink()
    generosity = Generosity(machine.psi, machine.meminfo)
    seen = []
    for percent in (50, 5, 50):
        machine.available(percent)
        generosity.look()
        seen.append((generosity.permille, generosity.is_short))
    low = 1000 - DOWN_PERMILLE
    assert seen == [(1000, False), (low, True), (low, True)]
    machine.meminfo.write_text("nonsense")
    for _ in range(CALM_S):
        generosity.look()
    assert not generosity.is_short
