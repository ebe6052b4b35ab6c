"""The counter table: every counter declared once, with its name, unit, kind and help.

The compiled code gets its cell numbers from here (setup.py writes
`counter_ids.pxd`), and so do statistics, files, metrics and the reference page
(docs/reference/counters.md).  Cells live in the memory file, in shards that are each
written by one thread at a time with plain adds, so any process may read them at any time
without asking the server:

    counter   sum of the shards, only grows (for the life of the memory file)
    gauge     sum of the shards as a signed number; rebuilt when a server takes over
    max       largest of the shards
    derived   computed here from the others when it is read

Histograms lie behind the counters, in the same shards: 32 cells each, 31 of them one for
each power of two, the last their sum, so that an observation is two more plain adds.

    cell 0    1    2    3    ...  30        31     bucket k counts values below 2^k that no
         0    1   2-3  4-7        2^29 on   sum    smaller bucket has

What takes a microsecond is timed once in about SAMPLED_ONE_OF calls (two looks at the clock
are 50 ns), what takes longer each time.

Names that the kernel's zcache, zbud and frontswap had mean the same thing here.
"""

from __future__ import annotations

import array
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from zcache_core.memfile import MemoryFile

CELLS = 512  # as COUNTER_CELLS in layout.pxd
FIRST_HISTOGRAM_CELL = 160  # counters below, histograms from here on
HISTOGRAM_CELLS = 32  # of each: its buckets, and the sum
BUCKETS = HISTOGRAM_CELLS - 1  # as HISTOGRAM_BUCKETS in slots.pxd
SIZE_CLASS_SHARD = 32  # as SLOTS in slots.pxd: zsmalloc counts size classes in its upper half
SAMPLED_ONE_OF = 32  # the mean of SAMPLE_LEAST to SAMPLE_LEAST + SAMPLE_SPREAD in slots.pxd
PAGE_BYTES = 4096
DISK_SEGMENT_BYTES = 1 << 18  # as SEGMENT_BYTES in segments.pxd


class Counter(NamedTuple):
    """One row: `unit` is pages, bytes, frames, percent, ...; flag is 0 or 1, errno as errno(3)."""

    name: str
    unit: str
    kind: str
    help: str


COUNTERS: tuple[Counter, ...] = (
    # what clients asked for
    Counter("read_requests", "requests", "counter", "read requests served"),
    Counter("write_requests", "requests", "counter", "write requests served"),
    Counter("trim_requests", "requests", "counter", "trim (discard) requests served"),
    Counter("zero_requests", "requests", "counter", "write-zeroes requests served"),
    Counter("flush_requests", "requests", "counter", "flush requests served"),
    Counter("failed_requests", "requests", "counter", "requests answered with an error"),
    Counter("fenced_requests", "requests", "counter", "of those: of an older attach, not applied"),
    Counter("partial_writes", "pages", "counter", "pages changed in part (read-modify-write)"),
    # pages in and out
    Counter("succ_stores", "pages", "counter", "pages stored"),
    Counter("failed_stores", "pages", "counter", "pages refused because no tier had room"),
    Counter("loads", "pages", "counter", "pages read"),
    Counter("loads_empty", "pages", "counter", "pages read that held nothing (zeros)"),
    Counter("loads_same_filled", "pages", "counter", "pages read that were same-filled"),
    Counter("invalidates", "pages", "counter", "stored pages dropped by trim or zero"),
    Counter("compress_poor", "pages", "counter", "pages that did not compress; kept raw"),
    Counter("crew_pages", "pages", "counter", "pages of long writes that the crew compressed"),
    # trouble and contention
    Counter("corrupt_loads", "pages", "counter", "reads that found a damaged copy (answered EIO)"),
    Counter("mended_loads", "pages", "counter", "damaged in RAM, answered from the disk's copy"),
    Counter("lost_pages", "pages", "gauge", "pages whose last copy is gone (answer EIO)"),
    Counter("read_retries", "events", "counter", "reads repeated because the page changed"),
    Counter("flip_retries", "events", "counter", "index flips repeated because of a race"),
    Counter("restamped_stores", "pages", "counter", "writes that another write overtook"),
    Counter("slot_waits", "events", "counter", "requests that waited for a request slot"),
    Counter("commit_waits", "events", "counter", "writes that waited for committed memory"),
    Counter("commit_wait_us", "microseconds", "counter", "time writes waited for committed memory"),
    Counter("commit_failures", "events", "counter", "times the kernel gave no memory to the pool"),
    Counter(
        "commit_pauses", "events", "counter", "looks that found too little memory to let it grow"
    ),
    # what is stored
    Counter("same_filled_pages", "pages", "gauge", "pages stored as one repeated word"),
    Counter("same_filled_pages_max", "pages", "max", "most same-filled pages so far"),
    Counter("pers_zpages", "pages", "gauge", "compressed pages whose only copy is in RAM"),
    Counter("pers_zpages_max", "pages", "max", "most of them so far"),
    Counter("pers_zbytes", "bytes", "gauge", "their compressed bytes, without headers"),
    Counter("pers_zbytes_max", "bytes", "max", "most of those so far"),
    Counter("pers_pageframes", "frames", "gauge", "frames that hold at least one of them"),
    Counter("pers_pageframes_max", "frames", "max", "most of those so far"),
    Counter("eph_zpages", "pages", "gauge", "compressed pages in RAM that are also safe below"),
    Counter("eph_zpages_max", "pages", "max", "most of them so far"),
    Counter("eph_zbytes", "bytes", "gauge", "their compressed bytes, without headers"),
    Counter("eph_pageframes", "frames", "gauge", "frames that hold nothing else"),
    Counter("eph_pageframes_max", "frames", "max", "most of those so far"),
    Counter("evicted_eph_pageframes", "frames", "counter", "of those: dropped to make room"),
    Counter("raw_pages", "pages", "gauge", "of pers_zpages: kept raw, one frame each"),
    Counter("buddied_count", "frames", "gauge", "frames of zbud and z3fold with two buds or more"),
    Counter("unbuddied_count", "frames", "gauge", "frames of zbud and z3fold with one bud"),
    Counter("moved_pages", "pages", "counter", "pages moved within RAM to empty frames"),
    Counter("compacted_frames", "events", "counter", "frames or zspages emptied that way"),
    Counter("compaction_us", "microseconds", "counter", "time that took"),
    Counter("allocator", "number", "gauge", "where new pages go: 0 zbud, 1 z3fold, 2 zsmalloc"),
    Counter("migrating", "flag", "gauge", "1 while pages of other allocators move there"),
    Counter("recompressed_pages", "pages", "counter", "cold pages given less room, by zstd"),
    Counter("recompress_saved_bytes", "bytes", "counter", "room in frames that this saved"),
    Counter("recompress_poor", "pages", "counter", "cold pages tried in vain; not tried again"),
    Counter("recompress_us", "microseconds", "counter", "time spent with it, waits included"),
    Counter("dictionaries", "number", "gauge", "dictionaries that pages are compressed with"),
    Counter("dictionary_frames", "frames", "gauge", "frames that they take"),
    Counter("dictionary_trainings", "events", "counter", "times one was made, used or not"),
    Counter(
        "recompress_level", "number", "gauge", "zstd's level for it; 0: nothing is recompressed"
    ),
    Counter("recompress_age_s", "seconds", "gauge", "pages unasked for in so long are cold"),
    # below: writeback, fetching, the disk
    Counter("disk_pages", "pages", "gauge", "pages that have a copy on the disk"),
    Counter("disk_live_bytes", "bytes", "gauge", "bytes of the disk that hold live copies"),
    Counter("disk_segments_used", "segments", "gauge", "segments of the disk that hold anything"),
    Counter("disk_segments", "segments", "gauge", "segments that the disk has"),
    Counter(
        "disk_written_bytes", "bytes", "counter", "bytes written to the disk, cleaning included"
    ),
    Counter("disk_cleaned_bytes", "bytes", "counter", "of those: moved by cleaning"),
    Counter("disk_writes", "writes", "counter", "writes that those bytes took"),
    Counter(
        "writeback_limit_bytes", "bytes", "gauge", "most bytes written to the disk a day; 0: any"
    ),
    Counter("writeback_day_bytes", "bytes", "gauge", "bytes written to the disk today (UTC)"),
    Counter("writeback_limit_reached", "flag", "gauge", "1 when nothing more is written today"),
    Counter(
        "disk_writing_since_us",
        "microseconds",
        "gauge",
        "when the writes under way began, on the monotonic clock; 0: none are",
    ),
    Counter("disk_degraded", "flag", "gauge", "1 while the disk fails"),
    Counter("disk_errno", "errno", "gauge", "why it fails; 0 while it does not"),
    Counter("disk_write_errors", "events", "counter", "writes to the disk that failed"),
    Counter("disk_read_errors", "pages", "counter", "reads from the disk that failed"),
    Counter("disk_corrupt_pages", "pages", "counter", "copies on the disk found wrong or damaged"),
    Counter(
        "damaged_lower_addresses",
        "pages",
        "counter",
        "addresses of copies below that were found damaged in RAM, and not used",
    ),
    # below: peers
    Counter("pers_pages_remoted", "pages", "gauge", "pages that have copies on peers"),
    Counter("remote_bytes", "bytes", "gauge", "bytes of those, each copy counted"),
    Counter("remote_room_bytes", "bytes", "gauge", "bytes of pages that peers have room for now"),
    Counter("live_peers", "peers", "gauge", "peers that answer"),
    Counter(
        "remote_short_pages",
        "pages",
        "gauge",
        "copies of pages at peers that are away or gone, to be renewed",
    ),
    Counter("remote_moved_pages", "pages", "counter", "pages whose copies were moved or renewed"),
    Counter("remote_pers_pages_succ_put", "pages", "counter", "pages that peers took"),
    Counter("remote_failed_puts", "pages", "counter", "pages that they did not take; they stayed"),
    Counter("remote_pers_pages_succ_get", "pages", "counter", "pages read back from peers"),
    Counter(
        "remote_pers_pages_unsucc_get", "pages", "counter", "reads from peers that found no copy"
    ),
    Counter("remote_corrupt_pages", "pages", "counter", "copies of peers found wrong or damaged"),
    Counter("hedged_remote_gets", "pages", "counter", "reads for which a second peer was asked"),
    Counter("remote_page_flushes", "pages", "counter", "pages dropped at peers"),
    Counter("missed_remote_flushes", "pages", "gauge", "of those: found only by comparing, later"),
    Counter("backed_pages", "pages", "gauge", "pages with a copy at a peer and one on the disk"),
    Counter(
        "backup_missing_pages",
        "pages",
        "gauge",
        "pages on the disk whose copy at a peer is missing, to be made",
    ),
    Counter("backup_renewed_pages", "pages", "counter", "copies at peers made from the disk"),
    Counter(
        "backup_loads", "pages", "counter", "reads that the disk answered, its peer not in time"
    ),
    Counter("written_back_pages", "pages", "counter", "pages copied down"),
    Counter("outstanding_writeback_pages", "pages", "gauge", "pages being copied down now"),
    Counter("failed_writeback_pages", "pages", "counter", "pages that stayed: the tier failed"),
    Counter("overtaken_writeback_pages", "pages", "counter", "pages that changed while copied"),
    Counter("cold_loads", "pages", "counter", "pages read from below"),
    Counter("ahead_pages", "pages", "counter", "pages fetched before they were asked for"),
    Counter("ahead_useful_pages", "pages", "counter", "of those: asked for"),
    Counter("ahead_wasted_pages", "pages", "counter", "of those: displaced before they were"),
    Counter("ahead_failed_pages", "pages", "counter", "pages that could not be fetched so"),
    Counter("promoted_pages", "pages", "counter", "of those: given a RAM copy again"),
    Counter(
        "rescued_pages",
        "pages",
        "counter",
        "pages whose copies below may be gone: kept in RAM alone",
    ),
    Counter(
        "kept_pages", "pages", "counter", "pages whose copy below was given up: room is short there"
    ),
    Counter("pool_waits", "events", "counter", "writes that waited because the pool was full"),
    Counter("pool_wait_us", "microseconds", "counter", "time they waited"),
    Counter("high_percent", "percent", "gauge", "of the pool: writeback starts above"),
    Counter("low_percent", "percent", "gauge", "of the pool: writeback stops below"),
    Counter("draining", "flag", "gauge", "1 while everything is moved below"),
    Counter("refused_commands", "commands", "counter", "commands that could not be obeyed"),
    # the machine's memory
    Counter("memory_pressure", "flag", "gauge", "1 while memory is short on this machine"),
    Counter(
        "pressure_steps", "events", "counter", "times the pool was made smaller because of that"
    ),
    Counter(
        "pressure_watch",
        "number",
        "gauge",
        "what tells it: 0 nothing, 1 PSI trigger, 2 PSI read each second, 3 MemAvailable",
    ),
    # the arena
    Counter("pool_limit_frames", "frames", "gauge", "most frames the pool may hold"),
    Counter("pool_set_frames", "frames", "gauge", "what that was set to; it shrinks to there"),
    Counter("pool_target_frames", "frames", "gauge", "to be used now: less under memory pressure"),
    Counter("committed_frames", "frames", "gauge", "frames backed by memory, reserve included"),
    Counter("committed_frames_max", "frames", "max", "most of those so far"),
    Counter("free_frames", "frames", "gauge", "committed frames waiting for use: the reserve"),
    Counter("unsorted_frames", "frames", "gauge", "of a predecessor's: not mapped yet"),
    Counter("punched_frames", "frames", "counter", "frames given back to the system"),
    Counter("punch_failures", "events", "counter", "times the system did not take them back"),
    Counter("private_table_bytes", "bytes", "gauge", "server's own tables and buffers"),
    # the device
    Counter("device_pages", "pages", "gauge", "size of the swap device"),
    Counter("rebuilt_pages", "pages", "counter", "pages found again by a restarted server"),
    Counter("rebuild_us", "microseconds", "counter", "time restarts took to find them"),
    # pages held for other machines
    Counter("foreign_pers_pages", "pages", "gauge", "pages held for other machines"),
    Counter("foreign_pers_pages_max", "pages", "max", "most of them so far"),
    Counter("foreign_pers_bytes", "bytes", "gauge", "room that they take in frames"),
    Counter("foreign_owners", "owners", "gauge", "machines' memory files that they belong to"),
    Counter("foreign_puts", "pages", "counter", "pages taken from other machines"),
    Counter("foreign_refused_puts", "pages", "counter", "pages refused: no room, or the quota"),
    Counter("foreign_gets", "pages", "counter", "pages given back to be read"),
    Counter("foreign_unsucc_gets", "pages", "counter", "asked for, and not there or damaged"),
    Counter("foreign_drops", "pages", "counter", "pages dropped by their owners"),
    Counter(
        "foreign_recalled_pages", "pages", "counter", "pages that owners were asked to take back"
    ),
    Counter(
        "foreign_ended_pages",
        "pages",
        "counter",
        "pages dropped because their owner's epoch is over",
    ),
    Counter(
        "foreign_abandoned_pages",
        "pages",
        "counter",
        "of those: nobody had heard of the owner for long",
    ),
    Counter("foreign_damaged_pages", "pages", "counter", "pages found damaged in RAM, and dropped"),
    # made from the others
    Counter("logical_bytes", "bytes", "derived", "pages stored, times 4096"),
    Counter("disk_stalled_us", "microseconds", "derived", "how long the writes under way take now"),
    Counter("disk_bytes", "bytes", "derived", "bytes of the disk in use: live copies"),
    Counter("disk_limit_bytes", "bytes", "derived", "bytes of the disk that may be used"),
    Counter("ram_bytes", "bytes", "derived", "all RAM the store costs: frames, index, tables"),
    Counter("index_bytes", "bytes", "derived", "of ram_bytes: index, counters, superblock"),
    Counter("server_resident_bytes", "bytes", "derived", "resident size of the server, pool apart"),
    Counter(
        "server_locked_bytes",
        "bytes",
        "derived",
        "address space of the server that stays in memory once touched (VmLck)",
    ),
)


class Histogram(NamedTuple):
    """One distribution: how often which power of two of `unit` (a key of UNITS_S) was seen."""

    name: str
    unit: str
    help: str


UNITS_S = {"nanoseconds": 1e-9, "microseconds": 1e-6}
HISTOGRAMS: tuple[Histogram, ...] = (
    Histogram("put", "nanoseconds", "storing a page; one of about 32 is timed"),
    Histogram("get_ram", "nanoseconds", "reading a page from RAM; one of about 32 is timed"),
    Histogram(
        "get_same", "nanoseconds", "reading a same-filled or empty page; one of about 32 is timed"
    ),
    Histogram("get_disk", "microseconds", "reading a page whose only copy is on the disk"),
    Histogram("get_peer", "microseconds", "reading a page whose copies are at peers"),
    Histogram("writeback", "microseconds", "writing a batch of pages to the disk"),
    Histogram("remote_put", "microseconds", "peers taking a batch of pages, all copies"),
    Histogram("remote_get", "microseconds", "a peer's answer to a page that was asked for"),
    Histogram("pool_wait", "microseconds", "how long a write waited for room in a full pool"),
    Histogram("commit_wait", "microseconds", "how long a write waited for committed memory"),
    Histogram("slot_wait", "microseconds", "how long a request waited for a request slot"),
)

STORED = tuple(c for c in COUNTERS if c.kind != "derived")
CELL = {c.name: i for i, c in enumerate(STORED)}
HISTOGRAM_CELL = {
    h.name: FIRST_HISTOGRAM_CELL + HISTOGRAM_CELLS * i for i, h in enumerate(HISTOGRAMS)
}
assert len(STORED) <= FIRST_HISTOGRAM_CELL
assert FIRST_HISTOGRAM_CELL + HISTOGRAM_CELLS * len(HISTOGRAMS) <= CELLS


def _status_bytes(pid: int) -> dict[str, int]:
    """VmLck, RssAnon, RssFile in bytes of a process; empty when it is gone."""
    wanted = ("VmLck", "RssAnon", "RssFile")
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return {}
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0][:-1] in wanted}


def read(memory: MemoryFile) -> dict[str, int]:
    """Every counter by name.  Values are consistent each, not with one another."""
    cells = array.array("Q")
    cells.frombytes(memory.counter_cells())
    used = len(STORED)
    shards = [cells[at : at + used] for at in range(0, len(cells), CELLS)]
    values: dict[str, int] = {}
    for counter, column in zip(STORED, zip(*shards, strict=True), strict=True):
        if counter.kind == "max":
            values[counter.name] = max(column)
        else:
            total = sum(column) & (1 << 64) - 1
            signed = counter.kind == "gauge" and total >> 63
            values[counter.name] = total - (1 << 64) if signed else total
    in_ram = values["pers_zpages"] + values["eph_zpages"]
    both = values["eph_zpages"] + values["backed_pages"]
    only_below = values["disk_pages"] + values["pers_pages_remoted"] - both
    stored = in_ram + only_below + values["same_filled_pages"]
    committed = values["committed_frames"] * PAGE_BYTES
    frame_headers = values["committed_frames"] * 24
    values["logical_bytes"] = stored * PAGE_BYTES
    since_us, now_us = values["disk_writing_since_us"], time.monotonic_ns() // 1000
    values["disk_stalled_us"] = max(0, now_us - since_us) if since_us else 0
    values["disk_bytes"] = values["disk_live_bytes"]
    values["disk_limit_bytes"] = values["disk_segments"] * DISK_SEGMENT_BYTES
    values["index_bytes"] = memory.overhead_bytes
    values["ram_bytes"] = (
        committed + frame_headers + memory.overhead_bytes + values["private_table_bytes"]
    )
    status = _status_bytes(memory.owner_pid)
    values["server_resident_bytes"] = status.get("RssAnon", 0) + status.get("RssFile", 0)
    values["server_locked_bytes"] = status.get("VmLck", 0)
    return values


def histograms(memory: MemoryFile) -> dict[str, dict[str, Any]]:
    """{name: {"unit", "count", "sum", "buckets"}}.

    Bucket k counts values v with v.bit_length() == k; the last one also has all that are
    larger.  `buckets` ends with the last that is not 0.
    """
    cells = array.array("Q")
    cells.frombytes(memory.counter_cells())
    starts = [at for at in range(0, len(cells), CELLS) if at != SIZE_CLASS_SHARD * CELLS]
    found: dict[str, dict[str, Any]] = {}
    for histogram in HISTOGRAMS:
        first = HISTOGRAM_CELL[histogram.name]
        shards = [cells[at + first : at + first + HISTOGRAM_CELLS] for at in starts]
        *buckets, total = [sum(column) & (1 << 64) - 1 for column in zip(*shards, strict=True)]
        count = sum(buckets)
        while buckets and not buckets[-1]:
            buckets.pop()
        found[histogram.name] = {
            "unit": histogram.unit, "count": count, "sum": total, "buckets": buckets,
        }  # fmt: skip
    return found


def quantile_s(histogram: Mapping[str, Any], share: float) -> float:
    """The time in seconds that this share of the values is below; 0 without values.

    Within a bucket values are taken as spread evenly, as Prometheus' histogram_quantile does
    it; of the last bucket, which is open, it is the lower bound.
    """
    wanted, seen = share * histogram["count"], 0
    unit_s = UNITS_S[histogram["unit"]]
    for bucket, n in enumerate(histogram["buckets"]):
        if n and seen + n >= wanted:
            lower = 1 << bucket >> 1
            if bucket == BUCKETS - 1:
                return lower * unit_s
            within: float = (wanted - seen) / n
            return (lower + ((1 << bucket) - lower) * within) * unit_s
        seen += n
    return 0.0
