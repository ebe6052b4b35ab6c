"""Recordings: the file against a plain list, its bound, torn ends; plot and doctor of them."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugin import doctor, plot, record, slowness
from plugin.recording import FULL_EVERY, LIMIT_BYTES_MIN, Recorder, Sample, flat, histogram, samples
from tests.plugin_helpers import ROOT, Server, environment, wait_for
from zcache_core.counters import COUNTERS, HISTOGRAMS
from zcache_core.errors import ConfigError, ControlError, InUseError

PAGE = 4096
START_S = 1_700_000_040.0  # the first second of a minute
WELL: dict[str, Any] = {"status": "ok", "reasons": []}
FULL: dict[str, Any] = {
    "status": "degraded",
    "reasons": [{"what": "The pool is 93 % full.", "do": "Make room."}],
}
ABOUT: dict[str, Any] = {"ping": {"version": "1", "server_pid": 7}, "config": {"pool": 1}}
STATS = {counter.name: 0 for counter in COUNTERS}


def write(path: Path, made: list[Sample], limit_bytes: int = 1 << 30) -> None:
    recorder = Recorder(path, limit_bytes)
    for sample in made:
        recorder.add(sample)
    recorder.close()


def peer(address: str, **more: Any) -> dict[str, Any]:
    return {
        "address": address, "name": "", "state": "up", "why_down": "", "latency_us": 250,
        "copies": 7, "wrong_copies": 0, **more,
    }  # fmt: skip


def some(rng: random.Random, number: int) -> list[Sample]:
    """Looks as they could come: counters that grow, silences, restarts, changes of health."""
    made: list[Sample] = []
    stats, health, about, at_s = dict(STATS), WELL, ABOUT, START_S
    peers: tuple[dict[str, Any], ...] = ()
    for _ in range(number):
        at_s += rng.choice([1.0, 1.5, 60.0])
        kind = rng.random()
        if kind < 0.05:
            made.append(Sample(at_s, {}, {}, made[-1].about if made else {}, "nobody"))
            continue
        if kind < 0.1:
            ping = {"version": "1", "server_pid": rng.randrange(1000)}
            about, stats = {**ABOUT, "ping": ping}, dict(STATS)
        if kind < 0.2:
            health = rng.choice([WELL, FULL])
        for name in rng.sample(list(STATS), 5):
            stats[name] = stats.get(name, 0) + rng.randrange(1 << rng.randrange(60))
        cell = f"put[{rng.randrange(31)}]"
        stats[cell] = stats.get(cell, 0) + 1
        if kind < 0.3:
            peers = tuple(
                peer(f"a:{n}", state=rng.choice(["up", "down"])) for n in range(rng.randrange(3))
            )
        made.append(Sample(at_s, dict(stats), health, about, peers=peers))
    return made


def test_what_is_written_is_read(tmp_path: Path, rng: random.Random) -> None:
    made = some(rng, 3 * FULL_EVERY)
    cut = rng.randrange(1, len(made))
    write(tmp_path / "r", made[:cut])
    write(tmp_path / "r", made[cut:])  # appended
    assert list(samples(tmp_path / "r")) == made


def test_histograms_are_kept_cell_by_cell() -> None:
    timed: dict[str, Any] = {"unit": "nanoseconds", "count": 5, "sum": 900, "buckets": [0, 2, 0, 3]}
    kept = flat(STATS | {"histograms": {"put": timed}})
    assert {name: n for name, n in kept.items() if name not in STATS} == {
        "put[1]": 2, "put[3]": 3, "put[sum]": 900
    }  # fmt: skip
    again = histogram(kept, HISTOGRAMS[0])
    assert again == timed | {"buckets": [*timed["buckets"], *[0] * 27]}
    assert histogram(STATS, HISTOGRAMS[0])["count"] == 0  # of an older recording


def test_only_changes_are_written(tmp_path: Path) -> None:
    made = [Sample(START_S + at, STATS | {"loads": at}, WELL, ABOUT) for at in range(50)]
    write(tmp_path / "r", made)
    lines = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert "full" in lines[0]
    assert lines[1:] == [{"t": START_S + at, "new": {"loads": at}} for at in range(1, 50)]


def test_the_newest_stay_within_the_bound(tmp_path: Path, rng: random.Random) -> None:
    made = some(rng, 20 * FULL_EVERY)
    recorder = Recorder(tmp_path / "r", LIMIT_BYTES_MIN)
    longest = 0
    for sample in made:
        recorder.add(sample)
        longest = max(longest, (tmp_path / "r").stat().st_size)
    recorder.close()
    assert longest <= LIMIT_BYTES_MIN
    found = list(samples(tmp_path / "r"))
    assert found == made[-len(found) :]
    assert 10 < len(found) < len(made)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_torn_end_is_passed_over_and_cut(tmp_path: Path, rng: random.Random) -> None:
    made = some(rng, 30)
    write(tmp_path / "r", made)
    whole = (tmp_path / "r").read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for missing in (1, last // 2, last - 1):
        (tmp_path / "r").write_bytes(whole[:-missing])
        found = list(samples(tmp_path / "r"))
        assert found in (made[:-1], made)
        write(tmp_path / "r", made[-1:])
        assert list(samples(tmp_path / "r")) in (made, [*made[:-1], made[-1]])


def test_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(ConfigError, match=r"line 1 of .* is none of"):
        list(samples(tmp_path / "x"))
    with pytest.raises(ConfigError, match="no recording of ours"):
        Recorder(tmp_path / "x", 1 << 20)
    assert (tmp_path / "x").read_text() == "hello\n"
    with pytest.raises(ConfigError, match="cannot be read"):
        list(samples(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be written"):
        Recorder(tmp_path / "no/folder", 1 << 20)
    with pytest.raises(ConfigError, match="needs room"):
        Recorder(tmp_path / "y", 100)


def test_two_recorders_of_one_file(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "r", 1 << 20)
    with pytest.raises(InUseError, match="another 'zcache record'"):
        Recorder(tmp_path / "r", 1 << 20)
    first.close()
    Recorder(tmp_path / "r", 1 << 20).close()


def test_a_full_file_system_is_said(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", 1 << 20)
    recorder.add(Sample(START_S, STATS, WELL, ABOUT))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "r").stat().st_size + 9, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written any more"):
            recorder.add(Sample(START_S + 1, STATS, WELL, ABOUT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.close()
    assert [sample.time_s for sample in samples(tmp_path / "r")] == [START_S]


def test_a_silent_server_is_noted() -> None:
    def call(method: str, *params: Any) -> Any:
        raise ControlError("nobody there")

    assert record.look(call).silent == "nobody there"


# ---- the picture ---------------------------------------------------------------------


def hour(rng: random.Random) -> list[Sample]:
    """A bad hour: well, then the disk cannot follow, a silence, a restart, well again."""
    made: list[Sample] = []
    stats = STATS | {"pool_limit_frames": 1000, "device_pages": 4000, "ram_bytes": 1 << 22}
    pid = 7
    for second in range(0, 3600, 5):
        minute = second // 60
        bad = 20 <= minute < 25
        stats["succ_stores"] += 5000 if bad else 500
        stats["loads"] += 300 + rng.randrange(50)
        stats["disk_written_bytes"] += 5 << 20 if bad else 1 << 20
        stats["pool_wait_us"] += 2_000_000 if minute == 22 else 500_000 if bad else 0
        stats["pool_waits"] += 3 if bad else 0
        slow = minute == 24
        stats["get_disk[sum]"] = stats["put[sum]"] = 1
        stats["get_disk[8]"] = stats.get("get_disk[8]", 0) + (0 if slow else 50)  # 128 to 256 us
        stats["get_disk[18]"] = stats.get("get_disk[18]", 0) + (50 if slow else 0)  # 131 to 262 ms
        stats["put[12]"] = stats.get("put[12]", 0) + 100
        away = 10 <= minute < 12
        peers = (
            peer("a:1", name="rack-7", latency_us=9000 if minute == 15 else 300),
            peer("b:1", state="down" if away else "up", why_down="gone" if away else ""),
        )
        stats["pers_zpages"] = 1500 + (400 if bad else 0)
        stats["logical_bytes"] = stats["pers_zpages"] * PAGE
        if minute == 23:
            stats["failed_stores"] += 1
        if minute == 40:
            pid = 8
        silent = minute == 30
        about = {"ping": {"version": "1.2", "server_pid": pid}, "config": {}}
        made.append(
            Sample(START_S + second, {}, {}, made[-1].about, "no answer") if silent
            else Sample(START_S + second, dict(stats), FULL if bad else WELL, about, peers=peers)
        )  # fmt: skip
    return made


@pytest.fixture
def bad_hour(tmp_path: Path, rng: random.Random) -> Path:
    write(tmp_path / "hour.zrec", hour(rng))
    return tmp_path / "hour.zrec"


def test_pictures(bad_hour: Path, tmp_path: Path) -> None:
    svg = plot.run(str(bad_hour), None, None)
    assert svg == tmp_path / "hour.svg"
    assert ET.parse(svg).getroot().tag.endswith("svg")
    png = plot.run(str(bad_hour), str(tmp_path / "x.png"), 600.0)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(bad_hour: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = plot.thinned(str(bad_hour), None)
    assert len(every) == 720
    assert len(plot.thinned(str(bad_hour), 595.0)) == 120
    rates = plot.rate(every, "succ_stores", 1.0)
    assert rates[0] != rates[0]
    assert rates[1] == 100
    assert rates[21 * 12] == 1000
    assert rates[30 * 12 + 1] != rates[30 * 12 + 1]  # a silence is a gap
    (disk,) = [which for which in HISTOGRAMS if which.name == "get_disk"]
    half, most = zip(*plot.latencies(every, disk), strict=True)
    assert half[1] == 128 + 64
    assert 250_000 < most[24 * 12 + 1] < 262_144
    assert half[30 * 12 + 1] != half[30 * 12 + 1]
    monkeypatch.setattr(plot, "POINTS_MAX", 100)
    assert len([s for s in plot.thinned(str(bad_hour), None) if not s.silent]) <= 100


def test_pictures_that_cannot_be(bad_hour: Path, tmp_path: Path) -> None:
    for output, said in (("x.jpg", "in .png or .svg"), ("no/folder/x.svg", "cannot be written")):
        with pytest.raises(ConfigError, match=said):
            plot.run(str(bad_hour), str(tmp_path / output), None)
    write(tmp_path / "one", [Sample(START_S, STATS, WELL, ABOUT)])
    with pytest.raises(ConfigError, match="fewer than two"):
        plot.run(str(tmp_path / "one"), None, None)


# ---- the doctor ----------------------------------------------------------------------


def test_the_bad_hour_is_explained(bad_hour: Path) -> None:
    lines = doctor.run(str(bad_hour))
    told = "\n".join(f"{line.label} {line.text}" for line in lines)
    at = {minute: doctor.clock(START_S + 60 * minute) for minute in range(60)}
    for words in (
        "(59 min 55 s), 720 looks, zcache 1.2",
        f"silence 1 times nobody answered, 60 s in all; first at {at[30]}",
        f"restarts 1 of the server: {at[40]}",
        "ok 9", "degraded 8 %",
        f"The pool is 93 % full. (from {at[20]}, 5 min)", "-> Make room.",
        f"12 pages were refused; the kernel kept them; most in the minute of {at[23]} (12)",
        f"for room in the pool; worst in the minute of {at[22]}: 24.0 s of waiting in 60 s",
        "pages came with 3.9 MiB/s, the disk took 1.0 MiB/s then and 1.0 MiB/s at best",
        "use a faster disk",
        f"at most 1,000 in the minute of {at[20]}",
        "took put: half below 3.07 us, 99 % below 4.08 us",
        "get, disk: half below 193 us, 99 % below 184 ms (35,950 timed); SLOW in the minute of "
        + f"{at[24]}: 99 % below 261 ms, 255 us in an ordinary minute",
        f"peer rack-7 at a:1 answered in 9 ms at the slowest, at {at[15]}",
        f"peer b:1 was away 1 times, 120 s in all, first at {at[10]}: gone; answered in 250 us",
    ):  # fmt: skip
        assert words in told, f"{words}\n{told}"


@pytest.mark.parametrize(
    ("worst_s", "ordinary_s", "slow"),
    [
        (0.050, None, True),  # of any disk
        (0.049, None, False),
        (0.049, 0.010, False),
        (0.016, 0.002, True),  # of this one
        (0.004, 0.0005, False),  # but nobody feels that
        (0.080, 0.080, True),  # always so, and felt
    ],
)
def test_slow_is_what_is_felt_or_sudden(
    worst_s: float, ordinary_s: float | None, slow: bool
) -> None:
    assert slowness.is_slow(worst_s, ordinary_s, slowness.USUAL_S["get_disk"]) == slow


def test_a_good_hour_has_nothing_to_mend(tmp_path: Path) -> None:
    made = [Sample(START_S + at, STATS | {"loads": at}, WELL, ABOUT) for at in range(200)]
    told = "\n".join(line.text for line in doctor.report(doctor.read(made)))
    assert "no page was refused, damaged or lost" in told
    assert "nobody: writes hardly waited" in told
    assert "ok 100 %" in told
    assert "->" not in told


@pytest.mark.parametrize(
    ("grown", "said"),
    [
        ({"pool_wait_us": 5_000_000}, "nothing below the pool"),
        (
            {"pool_wait_us": 5_000_000, "disk_written_bytes": 100, "disk_cleaned_bytes": 80},
            "larger disk_size=",
        ),
        (
            {"pool_wait_us": 5_000_000, "disk_written_bytes": 100, "disk_write_errors": 1},
            "smartctl",
        ),
        ({"commit_wait_us": 5_000_000}, "commit=all"),
        ({"slot_waits": 9}, "9 requests waited for a request slot"),
        ({"corrupt_loads": 2}, "2 reads found a damaged copy"),
    ],
)
def test_who_was_slow(grown: dict[str, int], said: str) -> None:
    made = [Sample(START_S, STATS, WELL, ABOUT), Sample(START_S + 10, STATS | grown, WELL, ABOUT)]
    assert said in "\n".join(line.text for line in doctor.report(doctor.read(made)))


def test_another_memory_file_takes_nothing_away() -> None:
    made = [
        Sample(START_S + at, STATS | {"loads": loads}, WELL, ABOUT)
        for at, loads in enumerate((1000, 1600, 0, 400))
    ]
    told = "\n".join(f"{line.label} {line.text}" for line in doctor.report(doctor.read(made)))
    assert "out 1,000 pages" in told


def test_nothing_but_silence() -> None:
    with pytest.raises(ConfigError, match="nobody answered in all"):
        doctor.report(doctor.read([Sample(START_S, {}, {}, {}, "no")]))


# ---- the commands --------------------------------------------------------------------


def zcache(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "plugin.cli", *words],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, "size=16M", "pool=4M") as running:
        yield running


def test_record_plot_and_doctor_of_a_real_server(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "r.zrec"
    words = ["record", str(file), "--interval", "0.1", "--control", str(server.control)]
    with subprocess.Popen(
        [sys.executable, "-m", "plugin.cli", *words], cwd=ROOT, env=environment(tmp_path)
    ) as going:
        handle = server.connect()
        wait_for("looks", lambda: file.exists() and len(list(samples(file))) > 3)
        for page in range(50):
            handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)
        wait_for("pages", lambda: [*samples(file)][-1].stats["succ_stores"] == 50)
        os.kill(server.node_pid, signal.SIGKILL)
        wait_for("the next node", server.ping)
        now_s = time.time()
        wait_for("looks again", lambda: samples_after(file, now_s))
        going.send_signal(signal.SIGTERM)
        assert going.wait(30) == 0
    assert zcache(tmp_path, *words, "--count", "2")[0] == 0
    code, out, err = zcache(tmp_path, "doctor", str(file))
    assert (code, err) == (0, "")
    assert "50 pages" in out
    code, out, err = zcache(tmp_path, "plot", str(file), "--output", str(tmp_path / "r.png"))
    assert (code, out, err) == (0, f"{tmp_path / 'r.png'}\n", "")
    code, _, err = zcache(tmp_path, "record", str(file), "--limit", "x", *words[4:])
    assert code == 3
    assert "is no size" in err


def samples_after(file: Path, time_s: float) -> bool:
    return any(sample.time_s > time_s and sample.stats for sample in samples(file))
