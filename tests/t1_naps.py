"""Naps: long work in a real-time class lets everybody else run; ordinary work does not wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.plugin_helpers import ROOT
from zcache_core import naps
from zcache_core.naps import NAP_S, RUN_S, Naps


class Clock:
    """CPU time that passes when told to, and sleeps that are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: int) -> None:
        self.cpu_s, self.slept = 0.0, 0
        monkeypatch.setattr(os, "sched_getscheduler", lambda pid: policy)
        monkeypatch.setattr(time, "thread_time", lambda: self.cpu_s)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds == NAP_S
        self.slept += 1


@pytest.mark.parametrize("policy", [os.SCHED_FIFO, os.SCHED_RR, os.SCHED_OTHER])
def test_a_nap_after_so_much_work(monkeypatch: pytest.MonkeyPatch, policy: int) -> None:
    """However small its pieces are; none where the scheduler shares the CPU anyway."""
    clock = Clock(monkeypatch, policy)
    work = Naps()
    for _ in range(1000):
        clock.cpu_s += RUN_S / 10
        work.breathe()
    expected = 0 if policy == os.SCHED_OTHER else 100
    assert abs(clock.slept - expected) <= expected // 10


def test_imports_are_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds no module, and is asked for each."""
    clock = Clock(monkeypatch, os.SCHED_RR)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    naps.between_imports()
    clock.cpu_s = 2 * RUN_S
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_module_at_all")
    assert clock.slept == 1


@pytest.mark.parametrize("resume", ["", "{}"])
def test_only_a_supervisor_that_an_upgrade_put_into_place_naps(resume: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "ZCACHE_RESUME"}
    if resume:
        env["ZCACHE_RESUME"] = resume
    script = (
        "import sys; import plugin.supervisor; "
        "print(*(type(finder).__name__ for finder in sys.meta_path))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert ("Naps" in done.stdout.split()) == bool(resume)
