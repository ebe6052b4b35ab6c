"""Cold tiers under the store, with faults on command: nothing lost, nothing wrong, nothing hangs.

Four threads write, read, trim and change parts of pages through the device, each its
own pages, against a dict each, while the cooling thread moves everything about and
the tier below stalls, fails, spoils and loses.  What is demanded at every answer:

    read    the content last acknowledged, or EIO while a fault may cause it
    write   done, or ENOSPC with the old content in place
    wait    never longer than a request's limit (and what the host steals)
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest

from bench.cache_rules import Lru
from tests.core_helpers import PAGE, make_page
from tests.tiers_helpers import Cold, cold_store, errno_of, noise
from tests.tiers_worker import FAULTS, THREADS, Worker
from zcache_core.device import Device

MIB = 1 << 20
# No request may take longer: 1.5 s of waiting, and the longest stall a test asks for.
LONGEST_S = 1.5 + 2.0 + 5.0


def storm(folder: Path, rng: random.Random, rounds: int, round_s: float) -> None:
    """Workers and faults at random; then all faults end, and everything must be well."""
    pages = rng.choice([3000, 6000])
    pool = rng.choice([1, 2, 6]) * MIB
    disk = rng.choice([16, 24, 48]) * MIB  # the smaller ones run full
    with cold_store(folder, pages * PAGE, pool, disk, seed=rng.getrandbits(32)) as cold:
        device = Device(cold.store)
        workers = [Worker(cold, device, i, pages, rng.getrandbits(32)) for i in range(THREADS)]
        for worker in workers:
            worker.start()
        try:
            for _ in range(rounds):
                fault = rng.choice(FAULTS)
                if {"spoil", "get_fail"} & set(fault):
                    for worker in workers:
                        worker.expect_failures(True)
                cold.faulty.set(**fault)
                if rng.random() < 0.3:
                    cold.cooling.drain(rng.random() < 0.5)
                time.sleep(rng.random() * 2 * round_s)
                if rng.random() < 0.5:
                    recover(cold, workers)
        finally:
            cold.cooling.drain(False)
            recover(cold, workers)
            for worker in workers:
                worker.stopping.set()
            for worker in workers:
                worker.join(60)
        assert [w.problem for w in workers if w.problem] == []
        assert not any(w.is_alive() for w in workers), "a request hangs"
        check_after(cold, workers)


def recover(cold: Cold, workers: list[Worker]) -> None:
    """No fault any more; an answer under way may still carry one."""
    cold.faulty.set()
    for worker in workers:
        worker.expect_failures(False)


def check_after(cold: Cold, workers: list[Worker]) -> None:
    assert max(w.longest_s for w in workers) < LONGEST_S
    before = cold.counters()
    # every error that a fault caused was seen by somebody, and no other was
    did = cold.faulty.counts()
    injected = did["spoiled_gets"] + did["lost_gets"] + did["failed_gets"]
    detected = before["disk_corrupt_pages"] + before["disk_read_errors"]
    assert sum(w.unreadable for w in workers) == detected <= injected
    # a page that changed while it was read is read anew: not an error of the page
    # and what was only fetched ahead failed for nobody
    assert injected - detected <= before["read_retries"] + before["ahead_failed_pages"]
    lost = set(cold.faulty.lost().values())
    for worker in workers:
        for page in worker.pages:
            if page not in lost:
                assert cold.store.get(page) == worker.model.get(page, bytes(PAGE)), page
    cold.assert_sound()
    # writeback goes on: there is work for it, and it is done
    store_some(cold, workers)
    assert cold.counters()["written_back_pages"] > before["written_back_pages"]
    cold.assert_sound()


def store_some(cold: Cold, workers: list[Worker]) -> None:
    """Trim everything and fill the pool twice over: no refusal."""
    pages = cold.memory.device_bytes // PAGE
    cold.store.invalidate(0, pages)
    rng = random.Random(1)
    kept = {}
    for page in range(min(pages, 2 * cold.memory.pool_bytes // PAGE)):
        kept[page] = noise(rng)
        cold.store.put(page, kept[page])
    for page, data in kept.items():
        assert cold.store.get(page) == data


@pytest.mark.timeout(120)
@pytest.mark.parametrize("turn", range(4))
def test_storm(tmp_path: Path, rng: random.Random, turn: int) -> None:
    storm(tmp_path, rng, 14, 0.2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_storms_without_end(tmp_path: Path, rng: random.Random) -> None:
    """Thousands of seeds; one that failed is named."""
    for turn in range(int(os.environ.get("ZCACHE_SOAK_ROUNDS", "3000"))):
        seed = rng.getrandbits(32)
        print(f"storm {turn} seed {seed}", flush=True)
        storm(tmp_path, random.Random(seed), 6, 0.15)


# ---- one fault at a time --------------------------------------------------------------


def fill(cold: Cold, rng: random.Random, pages: int) -> dict[int, bytes]:
    model = {}
    for page in range(pages):
        model[page] = make_page(rng) if rng.random() < 0.5 else noise(rng)
        cold.store.put(page, model[page])
    return model


def test_injected_are_detected_one_by_one(tmp_path: Path, rng: random.Random) -> None:
    """With nobody else at work the counts are equal, whoever did the damage."""
    with cold_store(tmp_path, 1000 * PAGE, 2 * MIB, 16 * MIB) as cold:
        model = fill(cold, rng, 1000)
        cold.drain()
        # backwards, so that nothing is read ahead: that would meet faults on nobody's behalf
        below = sorted((page for page in model if cold.state(page) == "disk"), reverse=True)
        hit = set(rng.sample(below, 60))
        with open(tmp_path / "disk", "r+b") as file:
            for page in hit:
                at = cold.where(page) + rng.randrange(24)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << rng.randrange(8)]))
            file.flush()
            os.fsync(file.fileno())
        bad = {page for page in sorted(model, reverse=True) if errno_of(cold.store.get, page)}
        assert bad == hit
        assert cold.counters()["disk_corrupt_pages"] == 60
        cold.faulty.set(spoil=300)
        for page in below:
            error = errno_of(cold.store.get, page)
            assert error == errno.EIO if page in hit else error in (0, errno.EIO)
        cold.faulty.set(get_fail=1000, get_errno=errno.EIO)
        errors = [errno_of(cold.store.get, page) for page in below[:50]]
        down = [page for page in below[:50] if cold.state(page) == "disk"]
        assert errors.count(errno.EIO) == len(down) == cold.counters()["disk_read_errors"]
        cold.faulty.set()
        spoiled = cold.faulty.counts()["spoiled_gets"]
        assert cold.counters()["disk_corrupt_pages"] == 120 + spoiled
        for page in model.keys() - hit:
            assert cold.store.get(page) == model[page], "a spoiled answer harms no copy"
        for page in hit:
            cold.store.put(page, model[page])
            assert cold.store.get(page) == model[page], "a damaged page can be written again"
        cold.assert_sound()


def test_lost_copies_answer_eio_and_nothing_else(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 1000 * PAGE, 2 * MIB, 16 * MIB) as cold:
        model = fill(cold, rng, 500)
        cold.faulty.set(lose=100)
        cold.drain()
        cold.faulty.set()
        lost = set(cold.faulty.lost().values())
        assert 5 < len(lost) < 200
        for page, data in model.items():
            if page in lost:
                assert errno_of(cold.store.get, page) == errno.EIO
            else:
                assert cold.store.get(page) == data
        cold.assert_sound()


def test_stalled_disk_lets_ephemeral_room_be_used(tmp_path: Path, rng: random.Random) -> None:
    """While a put hangs for seconds, what is droppable is dropped: no write is refused."""
    with cold_store(tmp_path, 4000 * PAGE, 4 * MIB, 48 * MIB, high=60, low=50) as cold:
        for page in range(1200):
            cold.store.put(page, noise(rng))
        cold.settle()
        free = 1024 - cold.counters()["pers_pageframes"]
        assert free > 350, "the rest of the pool is ephemeral or free"
        cold.faulty.set(put_delay_us=2_000_000)
        cold.store.put(2000, noise(rng))
        refused = 0
        for page in range(1200, 1200 + free - 60):
            refused += errno_of(cold.store.put, page, noise(rng)) != 0
        assert refused == 0
        cold.faulty.set()


def test_failing_disk_keeps_pages_and_refuses_the_rest(tmp_path: Path, rng: random.Random) -> None:
    with cold_store(tmp_path, 2000 * PAGE, 2 * MIB, 16 * MIB) as cold:
        model: dict[int, bytes] = {}
        cold.faulty.set(put_fail=1000, put_errno=errno.EIO)
        for page in range(800):
            data = noise(rng)
            if errno_of(cold.store.put, page, data) == 0:
                model[page] = data
        assert len(model) == 512, "all of the pool, and not a page more"
        assert cold.cooling.reason == errno.EIO
        for page, data in model.items():
            assert cold.store.get(page) == data
        cold.faulty.set()
        for page in range(800, 1600):
            model[page] = noise(rng)
            cold.store.put(page, model[page])
        for page, data in model.items():
            assert cold.store.get(page) == data
        assert cold.cooling.reason == 0
        cold.assert_sound()


def test_small_pool_writes_nothing_back_early(tmp_path: Path, rng: random.Random) -> None:
    """Below the watermark nothing goes to the disk, whatever the arena is doing."""
    with cold_store(tmp_path, 4000 * PAGE, 8 * MIB, 16 * MIB) as cold:
        for page in range(1700):  # of 2048 frames
            cold.store.put(page, noise(rng))
        time.sleep(0.3)
        assert cold.counters()["disk_written_bytes"] == 0


@pytest.mark.parametrize("pages", [3, 90])
def test_no_page_goes_down_twice(tmp_path: Path, rng: random.Random, pages: int) -> None:
    """Fewer frames than a batch asks for, and none of them read lately: the hand goes round."""
    with cold_store(tmp_path, 2 * MIB, 1 * MIB, 16 * MIB) as cold:
        for page in range(pages):
            cold.store.put(page, noise(rng))
        assert cold.store.victims(256), "all of them have been looked at"
        victims = cold.store.victims(256)
        assert sorted(victims) == sorted(set(victims))
        assert len(victims) == pages
        cold.drain()
        counters = cold.counters()
        assert counters["written_back_pages"] == pages
        assert counters["overtaken_writeback_pages"] == 0


def test_request_waits_once_however_long_it_is(tmp_path: Path, rng: random.Random) -> None:
    """A write of many pages onto a stuck tier answers after one wait, not one for each page."""
    with cold_store(tmp_path, 2000 * PAGE, 1 * MIB, 16 * MIB) as cold:
        device = Device(cold.store)
        cold.faulty.set(put_delay_us=4_000_000)
        for page in range(200):
            cold.store.put(page, noise(rng))
        waits = cold.counters()["pool_wait_us"]
        error = errno_of(device.pwrite, None, rng.randbytes(128 * PAGE), 1000 * PAGE, 0)
        assert error == errno.ENOSPC
        # one wait is 1.5 s, one for each page would be 192 s
        assert cold.counters()["pool_wait_us"] - waits < 30_000_000
        cold.faulty.set()


# ---- the hot set ------------------------------------------------------------------------


Request = tuple[int, bool]


def scan(rng: random.Random, hot: list[int], pages: int) -> list[Request]:
    """Every cold page once, in order, and a hot one (True) after every second of them."""
    requests: list[Request] = []
    for n, page in enumerate(sorted(set(range(pages)) - set(hot))):
        requests.append((page, False))
        if n % 2 == 0:
            requests.append((rng.choice(hot), True))
    return requests


def hits_of(cold: Cold, requests: list[Request], times: int) -> float:
    """Hit rate of the hot set in RAM while every cold page is read `times` times in a row."""
    hits = reads = 0
    for page, is_hot in requests:
        if not is_hot:
            for _ in range(times):
                cold.store.get(page)
            continue
        before = cold.counters()["cold_loads"]
        cold.store.get(page)
        hits += cold.counters()["cold_loads"] == before
        reads += 1
    return hits / reads


def hits_of_lru(frames: int, hot: list[int], requests: list[Request]) -> float:
    """The same of plain LRU in as much RAM: what is read comes in, the least lately read goes."""
    lru = Lru(frames)
    for page in hot:
        lru.use(page)
    found = [(lru.use(page), is_hot) for page, is_hot in requests]
    hits = [hit for hit, is_hot in found if is_hot]
    return sum(hits) / len(hits)


def test_scan_does_not_push_the_hot_set_out(tmp_path: Path, rng: random.Random) -> None:
    """Read once: no RAM copy (WasActive).  Against plain LRU, and against promoting at once.

    Read twice in a row is what promoting at once would do.
    """
    pages, pool, rates = 6000, 4 * MIB, {}
    hot = rng.sample(range(pages), 500)
    requests = scan(rng, hot, pages)
    for times in (1, 2):
        folder = tmp_path / str(times)
        folder.mkdir()
        with cold_store(folder, pages * PAGE, pool, 48 * MIB) as cold:
            for page in range(pages):
                cold.store.put(page, noise(rng))
            cold.drain()
            for _ in range(4):
                for page in hot:
                    cold.store.get(page)
            promoted = cold.counters()["promoted_pages"]
            assert promoted >= 500
            rates[times] = hits_of(cold, requests, times)
            if times == 1:
                assert cold.counters()["promoted_pages"] - promoted < 100
            cold.assert_sound()
    plain = hits_of_lru(pool // PAGE, hot, requests)  # noise: a page takes a frame
    print(
        f"hit rate of the hot set under a scan: {rates[1]:.3f}; "
        f"promoting at once: {rates[2]:.3f}; plain LRU: {plain:.3f}"
    )
    assert rates[1] > 0.97
    assert rates[1] > rates[2]
    assert rates[1] > plain + 0.2


def test_pages_that_share_ghosts_are_promoted_all_the_same(
    tmp_path: Path, rng: random.Random
) -> None:
    """More pages of one line of ghosts than it has cells, read in turn: each gets its RAM copy.

    The line of a page is as in fetching.pyx: 4096 cells in lines of 16.
    """
    pages, lines = 16000, defaultdict(list)
    for page in range(pages):
        lines[((page + 1) * 0x9E3779B97F4A7C15 % 2**64 >> 20) % 4096 // 16].append(page)
    shared = max(lines.values(), key=len)
    assert 40 <= len(shared) <= 80  # read within the window of 512 reads, and fit the pool
    rng.shuffle(shared)
    with cold_store(tmp_path, pages * PAGE, 1 * MIB, 16 * MIB) as cold:
        for page in shared:
            cold.store.put(page, noise(rng))
        cold.drain()
        for _ in range(100):
            for page in shared:
                cold.store.get(page)
        assert [cold.state(page) for page in shared] == ["ephemeral"] * len(shared)
        assert cold.counters()["promoted_pages"] == len(shared)
