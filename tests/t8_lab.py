"""The lab itself: what it tells, what it does when things go wrong, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.swaplab import (
    CommandFailedError,
    GuestConfig,
    GuestDiedError,
    Job,
    Lab,
    LabTimeoutError,
    Recipe,
    Sample,
    attach,
    fitness,
    hog,
    nbdkit_memory,
    progress,
    read_hog,
    swap_on,
    trouble,
)
from tests.swaplab.agent_line import Answer, Event, decode, encode, escape, unescape
from tests.swaplab.clock import Deadline, until
from tests.swaplab.kernel_log import parse
from tests.swaplab.servers import Place, ServerCommand
from tests.swaplab.workloads import HOG_BAD, HOG_LOST

boots = pytest.mark.skipif(
    os.geteuid() != 0, reason="; ".join(fitness.missing()) or "needs root for its network"
)
SMALL = GuestConfig(mem_mib=64)

# ---- what needs no guest ----


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_word_crosses_the_line(word: str) -> None:
    sent = escape(word)
    assert " " not in sent
    assert "\n" not in sent
    assert unescape(sent) == word


def test_lines_of_the_agent() -> None:
    assert encode(7, "put", "/a b", "50%\n") == b"7 put /a%20b 50%25%0A\n"
    assert decode("7 ok a%20b") == Answer(7, True, "a b")
    assert decode("8 error ENOENT") == Answer(8, False, "ENOENT")
    assert decode("! exit hog 12") == Event("exit", ("hog", "12"))
    with pytest.raises(ValueError, match="not a line"):
        decode("nonsense")


def test_the_kernel_log_is_judged_by_kind() -> None:
    lines = [
        parse("[    1.500000] Adding 524284k swap on /dev/nbd0.  Priority:10"),
        parse("[    2.000000] block nbd0: shutting down sockets"),
        parse("[   18.580000] Write-error on swap-device (43:0:160864)"),
        parse("[   19.000000] Out of memory: Killed process 721 (hog)"),
        parse("no time here"),
    ]
    assert lines[0].time_s == 1.5
    assert lines[4].time_s is None
    assert [found.split(":")[0] for found in trouble(lines)] == ["write-error", "oom"]
    assert trouble(lines, expected=["write-error", "oom"]) == []


def sample(at_s: float, moved: int) -> Sample:
    return Sample(at_s, at_s, moved, moved, 0, 0, 1000, 8)


def test_progress_sees_a_swap_that_stopped() -> None:
    moving = [sample(t / 10, 5 * t) for t in range(100)]
    stopped = [sample(t / 10, 5 * min(t, 30)) for t in range(100)]
    assert progress(moving).kept_moving()
    assert not progress(stopped).kept_moving()
    assert progress(stopped).longest_pause_s == pytest.approx(6.9)
    assert progress(moving).pages_in == 5 * 99
    assert not progress(moving[:1]).kept_moving()


# ---- what the lab does when things go wrong ----


@boots
@pytest.mark.timeout(130)
def test_labs_run_beside_each_other() -> None:
    said: list[str] = []

    def one() -> None:
        with Lab(limit_s=100) as lab:
            server = lab.serve(nbdkit_memory("64M"))
            guest = lab.boot(SMALL)
            attach(guest, server)
            swap_on(guest)
            said.append(guest.read("/proc/swaps"))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 2
    assert all("/dev/nbd0" in text for text in said)


@boots
@pytest.mark.timeout(130)
def test_the_limit_ends_everything_and_says_what_was_going_on() -> None:
    with Lab(limit_s=100) as lab:
        guest = lab.boot(SMALL)
        job = guest.start(["/bin/busybox", "sleep", "1000"])
        lab.end_within(2)
        with pytest.raises(LabTimeoutError, match="busybox-"):
            job.wait()
    assert any("Show Blocked State" in line.text for line in guest.log)
    assert not guest.alive()
    assert not lab.folder.exists()


@boots
@pytest.mark.timeout(130)
def test_a_panic_ends_every_wait() -> None:
    with Lab(limit_s=100) as lab:
        guest = lab.boot(SMALL)
        job = guest.start(["/bin/busybox", "sleep", "1000"])
        guest.link.send("sysrq", "c")
        with pytest.raises(GuestDiedError):
            job.wait()
        assert any(found.startswith("panic") for found in trouble(guest.log))


@boots
@pytest.mark.timeout(130)
def test_a_command_that_fails_says_why() -> None:
    with Lab(limit_s=100) as lab:
        guest = lab.boot(SMALL)
        with pytest.raises(CommandFailedError, match="No such file"):
            guest.call(["/bin/busybox", "cat", "/nowhere"])
        with pytest.raises(CommandFailedError, match="ENOENT"):
            guest.read("/nowhere")
        with pytest.raises(CommandFailedError, match="did not start"):
            lab.serve(nbdkit_memory("nonsense"))


@boots
@pytest.mark.timeout(130)
def test_a_link_can_be_cut_and_mended() -> None:
    with Lab(limit_s=100) as lab:
        guest = lab.boot(SMALL)
        ping = ["/bin/busybox", "ping", guest.tap.host, "-c"]
        guest.call([*ping, "5", "-A", "-W", "2"])
        lab.network.cut(guest.tap)
        with pytest.raises(CommandFailedError):
            guest.call([*ping, "1", "-W", "1"])
        lab.network.mend(guest.tap)
        guest.call([*ping, "5", "-A", "-W", "2"])


KILLED = """
import sys
from tests.swaplab import GuestConfig, Lab, nbdkit_memory
with Lab(limit_s=100) as lab:
    lab.serve(nbdkit_memory("64M"))
    lab.boot(GuestConfig(mem_mib=64))
    print(lab.folder, *lab.network.pids(), flush=True)
    sys.stdin.read()
"""


@boots
@pytest.mark.timeout(130)
def test_a_killed_harness_leaves_no_process_behind() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as harness:
        assert harness.stdout
        folder, *words = harness.stdout.readline().split()
        pidfds = []
        for word in words:
            with contextlib.suppress(ProcessLookupError):  # of a program that was ending
                pidfds.append(os.pidfd_open(int(word)))
        assert len(pidfds) > 5  # the server, unshare, the kernel and the guest's processes
        harness.kill()
    try:
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 20)[0], "a process outlived its harness"
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
        shutil.rmtree(folder)


# ---- what the hog notices ----


def noisy_hog(lab: Lab, recipe: Recipe) -> Job:
    """A short hog of random bytes on a small guest that swaps onto such a server."""
    server = lab.serve(recipe)
    guest = lab.boot(SMALL)
    attach(guest, server)
    swap_on(guest)
    return hog(guest, 50, None, 1, 1, audit_s=4, noise_percent=100)


@boots
@pytest.mark.timeout(170)
def test_the_hog_notices_a_server_that_lies() -> None:
    script = Path(__file__).parent / "swaplab" / "bad_server.py"

    def recipe(place: Place) -> ServerCommand:
        nbdkit = (fitness.tool("nbdkit"), "-f", "-P", place.pidfile, *place.listen)
        words = (f"size={256 << 20}", "every=40")
        return ServerCommand("bad server", (*nbdkit, "python", str(script), *words))

    with Lab(limit_s=140) as lab:
        job = noisy_hog(lab, recipe)
        assert job.wait().code == HOG_BAD
        report = read_hog(job.stdout())
        assert 0 < report.bad < report.pages
        assert not any(page["zeros"] for page in report.bad_pages)


@boots
@pytest.mark.timeout(170)
def test_the_hog_notices_pages_that_do_not_come_back(tmp_path: Path) -> None:
    """Every read fails from some moment on; writes go on working."""
    trigger = tmp_path / "reads fail while this exists"

    def recipe(place: Place) -> ServerCommand:
        good = nbdkit_memory("256M")(place)
        words = ("--filter=error", *good.argv[1:], "error-pread-rate=100%")
        return replace(good, argv=(good.argv[0], *words, f"error-pread-file={trigger}"))

    with Lab(limit_s=140) as lab:
        job = noisy_hog(lab, recipe)
        until(lambda: "random" in job.stderr(), Deadline(40), "the hog's phase random")
        trigger.touch()
        assert job.wait().code == HOG_LOST
        assert read_hog(job.stdout()).lost_page >= 0
        found = trouble(lab.guests[0].log)
        assert any(line.startswith("read-error") for line in found)


@boots
@pytest.mark.timeout(130)
def test_a_server_can_be_killed_and_started_again() -> None:
    with Lab(limit_s=100) as lab:
        server = lab.serve(nbdkit_memory("64M"))
        first = server.pid
        server.kill()
        assert not server.running()
        server.start(lab.deadline)
        assert server.pid != first
        assert server.starts == 2
        assert server.stats() == {"stored_bytes": 0}
