"""`zcache up`, a workload, `zcache down`, in a guest that swaps onto its own server.

the whole way   up twice, kill -9 of server, supervisor and helper under load, down refused
                while memory is short, down twice
cut off         up and down killed after each of their steps, and run again
half way        down interrupted, then killed, while pages come back
"""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest

from bench.corpus import pages_file
from plugin import swaparea
from tests.survival_helpers import (
    NBD_NOISE,
    Kills,
    assert_survived,
    kill_supervisor_in,
    serve_state,
)
from tests.swaplab import (
    SELF_SERVING_SYSCTL,
    Guest,
    GuestConfig,
    Job,
    Lab,
    fitness,
    hog,
    read_hog,
    trouble,
)
from tests.swaplab.clock import Deadline, until
from tests.swaplab.guest import SHARE
from tests.swaplab.zattach import kill_in, kill_mender, start_zcache, state, zcache_in

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
# Pool, server, supervisor, helper and its spare, and `zcache up` itself, before there is swap.
SELF_SERVING = GuestConfig(mem_mib=384, sample_ms=50, sysctl=SELF_SERVING_SYSCTL)
# Smaller than twice the pool, which is there from the start: see t8_swaplab.
SETTINGS = ("--size", "288M", "--pool", "150M", "commit=all", "--priority", "7")
TOML = 'size = "288M"\npool = "150M"\ncommit = "all"\n[swap]\npriority = 7\n'
# With the commands that run meanwhile, less than memory and device hold: else it is OOM by right.
HOG_MIB = 250
# Room for all of the sleeper, and a crowd that pushes it out first.
ROOMY = replace(SELF_SERVING, mem_mib=640)
SLEEPER_MIB, ROOMY_HOG_MIB = 160, 330
BACK_BYTES = 4 << 20  # so much has come back when `down` is interrupted
OUT_BYTES = 110 << 20
GUESTS = 2  # as many as a small machine has CPUs
UP_STEPS = ("up:serve", "up:attach", "up:mkswap", "up:swapon")
DOWN_STEPS = ("down:swapoff", "down:detach", "down:stop")


def swaps(guest: Guest) -> list[str]:
    """Lines of /proc/swaps."""
    return guest.read("/proc/swaps").splitlines()[1:]


def all_gone(guest: Guest) -> bool:
    """No swap, no connected device, no process and no memory file of ours."""
    names = guest.call(["/bin/sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"])
    segments = guest.read("/proc/sysvipc/shm").splitlines()[1:]
    return (
        not swaps(guest)
        and "nbdkit" not in names
        and "zcache" not in names.replace("/zcache/", "")
        and not segments
        and guest.read("/sys/block/nbd0/size").strip() == "0"
    )


@pytest.mark.timeout(300)
def test_up_a_workload_and_down(rng: random.Random) -> None:
    corpus = pages_file(64)
    with Lab(limit_s=280) as lab:
        guest = lab.boot(SELF_SERVING)
        said = zcache_in(guest, "up", *SETTINGS)
        assert "/dev/nbd0 is swap, priority 7" in said
        assert swaps(guest)[0].split()[4] == "7"
        again = zcache_in(guest, "up", *SETTINGS)
        assert "running already" in again
        assert "is swap already" in again
        assert len(swaps(guest)) == 1
        other = zcache_in(guest, "up", "--pool", "140M", expect=5)
        assert "runs with pool=" in other

        kills: list[Kills] = []
        refusals: list[str] = []

        def supervisor_and_helper() -> None:
            kill_supervisor_in(guest)
            kill_mender(guest)

        def while_running(job: Job) -> None:
            kills.append(Kills(guest, job, rng))
            kills[0].run(1, supervisor_and_helper)
            kills[0].run(1, lambda: kill_mender(guest))
            # Earlier there is room, `down` begins, and the hog takes the room away: OOM by right.
            guest.link.wait_for(
                lambda: used_bytes(guest) > OUT_BYTES, 60, "more to be out than memory takes back"
            )
            refusals.append(zcache_in(guest, "down", expect=7))
            assert "is running:" in zcache_in(guest, "up", *SETTINGS)  # a new supervisor

        result = lab.watch(
            lambda: hog(guest, HOG_MIB, corpus, 30, 30, audit_s=30, seed=rng.getrandbits(30)),
            while_running=while_running,
        )
        print(kills[0].report("supervisor and helper, helper"))
        assert result.exit.code == 0, result.stdout + result.stderr
        assert read_hog(result.stdout).bad == 0
        assert_survived(guest, result)
        assert "Swap is still on" in refusals[0]
        assert state(guest)["takeovers"] == 2
        assert len(swaps(guest)) == 1

        kill_mender(guest, spare_too=True)
        until(
            lambda: "Nobody mends" in zcache_in(guest, "health", expect=1), Deadline(30), "health"
        )
        assert "has a new helper" in zcache_in(guest, "up", *SETTINGS)
        assert "Nobody mends" not in zcache_in(guest, "health", expect=1)  # (the pool can fill)

        assert "no swap any more" in zcache_in(guest, "down")
        assert all_gone(guest)
        assert "nothing is attached" in zcache_in(guest, "down")


@pytest.mark.timeout(200)
def test_down_is_interrupted_while_pages_come_back(rng: random.Random) -> None:
    """SIGINT leaves swap on; SIGKILL of `down` leaves it to swapoff; a later `down` ends it all."""
    corpus = pages_file(64)
    with Lab(limit_s=190) as lab:
        guest = lab.boot(ROOMY)
        zcache_in(guest, "up", *SETTINGS)
        sleeper = asleep(guest, corpus, rng)
        crowd = hog(guest, ROOMY_HOG_MIB, corpus, 1, 1, seed=rng.getrandbits(30))
        assert crowd.wait().code == 0, crowd.stderr()
        assert used_bytes(guest) > 8 * BACK_BYTES

        assert "is still swap" in interrupted_down(guest, signal.SIGINT)
        assert len(swaps(guest)) == 1
        interrupted_down(guest, signal.SIGKILL)
        zcache_in(guest, "down")
        assert all_gone(guest)
        sleeper.kill(signal.SIGCONT)
        assert sleeper.wait().code == 0, sleeper.stdout()
        assert read_hog(sleeper.stdout()).bad == 0
        assert trouble(guest.log, expected=NBD_NOISE) == []


def asleep(guest: Guest, corpus: Path, rng: random.Random) -> Job:
    """A hog that has filled its memory and is stopped: its pages leave when others need room."""
    before = guest.meminfo_kb()["AnonPages"]
    seed = rng.getrandbits(30)
    job = hog(guest, SLEEPER_MIB, corpus, 1, 1, audit_s=60, seed=seed, name="sleeper")
    guest.link.wait_for(
        lambda: guest.meminfo_kb()["AnonPages"] - before > SLEEPER_MIB << 10, 60, "the sleeper"
    )
    job.kill(signal.SIGSTOP)
    return job


def used_bytes(guest: Guest) -> int:
    """Of all swap."""
    return sum(area.used_bytes for area in swaparea.areas(guest.read("/proc/swaps")))


def interrupted_down(guest: Guest, number: int) -> str:
    """`down` gets this signal when pages have begun to come back; what it said.

    SIGINT goes to its child, too, as a terminal's does; SIGKILL to `down` alone.
    """
    before = used_bytes(guest)
    job = start_zcache(guest, "down")
    guest.link.wait_for(
        lambda: job.done() or used_bytes(guest) < before - BACK_BYTES, 60, "pages to come back"
    )
    assert not job.done(), job.stdout() + job.stderr()
    if number == signal.SIGKILL:
        whose = guest.call(["/bin/sh", "-c", "grep -slzx 'dow[n]' /proc/[0-9]*/cmdline; :"])
        kill_in(guest, int(whose.split("/")[2]), number)
    else:
        job.kill(number)
    code = job.wait(60).code
    assert code == (-number if number == signal.SIGKILL else 130), job.stdout() + job.stderr()
    return job.stdout()


@pytest.mark.timeout(300)
def test_up_and_down_are_cut_off_after_every_step() -> None:
    """Either command goes on from wherever either was killed; the settings are a file's.

    Two guests share the steps, because a guest has one CPU: 77 s on two that are busy.
    """
    steps = list(zip_longest(UP_STEPS, DOWN_STEPS))
    with Lab(limit_s=280) as lab, ThreadPoolExecutor(GUESTS) as pool:
        guests = [lab.boot(SELF_SERVING) for _ in range(GUESTS)]
        turns = [pool.submit(cut_off, guest, steps[n::GUESTS]) for n, guest in enumerate(guests)]
        for turn in turns:
            turn.result()


def cut_off(guest: Guest, steps: list[tuple[str, str | None]]) -> None:
    """`up` is killed after each of these, `down` after the second of each pair, if there is one."""
    (guest.share / "swap.toml").write_text(TOML)
    settings = ("--config", f"{SHARE}/swap.toml")
    for up_step, down_step in steps:
        crash(guest, up_step, "up", *settings)
        zcache_in(guest, "down")
        assert all_gone(guest), up_step
        crash(guest, up_step, "up", *settings)
        zcache_in(guest, "up", *settings)
        assert swaps(guest)[0].split()[4] == "7"
        assert len(swaps(guest)) == 1
        assert serve_state(guest)["phase"] == "serving"
        if down_step is not None:
            crash(guest, down_step, "down")
        zcache_in(guest, "down")
        assert all_gone(guest), down_step
    assert trouble(guest.log, expected=["nbd"]) == []


def crash(guest: Guest, step: str, *words: str) -> None:
    """Run it, and have it killed after this step."""
    job = start_zcache(guest, *words, env={"ZCACHE_FAULT_AFTER": step})
    code = job.wait(60).code
    assert code == -signal.SIGKILL, f"{step}: {code} {job.stdout()}{job.stderr()}"
