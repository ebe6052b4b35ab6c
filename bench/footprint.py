"""What memory it takes, beside the pages themselves.

resident      of the server process, pool and index apart (they are the memory file's)
index         bytes per page of the device: what the memory file grows by with the device
density       payload of all blobs / frames that hold them, on the corpus, beside the payload
              that lz4 alone makes of it
"""

from __future__ import annotations

from bench import servers
from bench.polling import node_pid
from bench.report import Goal, Section
from bench.setup import POOL, SIZE, Setup
from bench.store_alone import device
from cluster.link import BlockingClient
from zcache_core import counters
from zcache_core.codec import Codec
from zcache_core.memfile import MemoryFile

PAGE_BYTES = 4096
MIB = 1 << 20
RESIDENT_MOST_MIB = 40
INDEX_MOST_BYTES = 16
CORPUS_BYTES = 32 << 20


def resident(setup: Setup) -> dict[str, int]:
    """Of a server that has been written full: /proc's own figures and its counters."""
    with setup.serving([servers.zcache(SIZE, POOL)]) as (server,):
        node_pid(server)
        with BlockingClient(server.control) as client:
            stats: dict[str, int] = client.call("stats")
        return stats | server.memory_bytes()


def index_bytes_per_page() -> float:
    """From two devices of different size."""
    sizes = (1 << 30, 5 << 30)
    overheads = []
    for size_bytes in sizes:
        memory = MemoryFile.create(None, size_bytes, 16 * MIB)
        overheads.append(memory.overhead_bytes)
        memory.close()
    return (overheads[1] - overheads[0]) / ((sizes[1] - sizes[0]) // PAGE_BYTES)


def density(pages: memoryview) -> dict[str, int]:
    """The store's counters with just these pages in it, and what lz4 makes of them."""
    with device(len(pages), len(pages)) as (target, store):
        for start in range(0, len(pages), 1 << 17):
            target.pwrite(None, pages[start : start + (1 << 17)], start, 0)
        found = counters.read(store.memory)
    codec = Codec()
    payload = 0
    for start in range(0, len(pages), PAGE_BYTES):
        page = bytes(pages[start : start + PAGE_BYTES])
        if page != page[:8] * (PAGE_BYTES // 8):
            payload += len(codec.compress(page) or page)
    return found | {"lz4_bytes": payload, "corpus_bytes": len(pages)}


def measure(setup: Setup) -> Section:
    section = Section("memory", "Memory", ["", "measured"])
    server = resident(setup)
    beside = server["RssAnon"] + server["RssFile"]
    per_page = index_bytes_per_page()
    found = density(setup.pages[: min(CORPUS_BYTES, len(setup.pages))])
    frames_bytes = found["pers_pageframes"] * PAGE_BYTES
    filled = found["pers_zbytes"] / frames_bytes
    section.rows = [
        ["server resident beyond pool and index", f"{beside / MIB:.1f} MiB"],
        ["  of that anonymous", f"{server['RssAnon'] / MIB:.1f} MiB"],
        ["  of that files (libraries, shared with others)", f"{server['RssFile'] / MIB:.1f} MiB"],
        ["memory file per page of the device, pool apart", f"{per_page:.2f} bytes"],
        [f"corpus of {found['corpus_bytes'] / MIB:.0f} MiB: lz4 payload",
         f"{found['lz4_bytes'] / MIB:.2f} MiB"],
        ["  zbud: bytes stored", f"{found['pers_zbytes'] / MIB:.2f} MiB"],
        ["  zbud: frames", f"{frames_bytes / MIB:.2f} MiB"],
        ["  zbud: density, stored / frames", f"{filled:.3f}"],
        ["  zbud: pages per frame", f"{found['pers_zpages'] / found['pers_pageframes']:.3f}"],
        ["  lz4 payload / zbud frames", f"{found['lz4_bytes'] / frames_bytes:.3f}"],
        ["  corpus / zbud frames", f"{found['corpus_bytes'] / frames_bytes:.2f}"],
        ["  same-filled pages, no frame", str(found["same_filled_pages"])],
        ["  pages kept raw", str(found["compress_poor"])],
    ]  # fmt: skip
    section.goals = [
        Goal("server resident", beside / MIB, RESIDENT_MOST_MIB, True, "beyond pool, index", "MiB"),
        Goal("index per page", per_page, INDEX_MOST_BYTES, True, "of the device", "bytes"),
    ]
    section.raw = {"server": server, "corpus": found, "index_bytes_per_page": per_page}
    return section
