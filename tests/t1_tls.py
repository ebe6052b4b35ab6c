"""TLS between two buffers: every byte again, nobody else let in, no memory wanted for a record."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster import certificates
from cluster.peersocket import rules
from cluster.tls import time_records
from tests.core_helpers import run_counting_malloc
from tests.donor_helpers import make_cluster

LENGTHS = [1, 100, 16383, 16384, 16385, 32768, 33024, 70000, 1 << 20]


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return make_cluster(tmp_path / "ca")


def test_every_byte_comes_out(ca: Path, rng: random.Random) -> None:
    ends = rules(ca / "lender", server=True), rules(ca / "owner", server=False)
    for n in [*LENGTHS, rng.randrange(1, 1 << 18)]:
        time_records(*ends, rng.randbytes(n), 3)


def test_others_do_not_come_to_terms(ca: Path) -> None:
    other = make_cluster(ca.parent / "other")
    certificates.add(ca, "old", days=-1)
    good = {
        server: rules(ca / name, server) for server, name in ((True, "lender"), (False, "owner"))
    }
    for bad in (other / "owner", ca / "old"):
        for server in (True, False):
            ends = {not server: good[not server], server: rules(bad, server)}
            with pytest.raises(ValueError, match="certificate"):
                time_records(ends[True], ends[False], b"a secret", 1)


COUNTED = """
import ctypes, sys
from pathlib import Path
from cluster.peersocket import rules
from cluster.tls import time_records
calls = ctypes.CDLL(None).malloc_large_calls
calls.restype = ctypes.c_ulong
ca = Path(sys.argv[1])
ends = rules(ca / "lender", True), rules(ca / "owner", False)
for n in (100, 130000):
    time_records(*ends, bytes(n), 10)
    spent = []
    for rounds in (10, 2000):
        before = calls()
        time_records(*ends, bytes(n), rounds)
        spent.append(calls() - before)
    assert spent[0] > 0, "the counter counts nothing"
    assert abs(spent[1] - spent[0]) < 10, spent
"""


def test_no_memory_is_wanted_for_a_record(ca: Path) -> None:
    """As many calls of malloc for 2000 exchanges as for 10, but for its smallest blocks.

    (libssl asks for four of 48 bytes, and gives them back at once: a thread has them at hand.)
    """
    run_counting_malloc(ca, COUNTED, str(ca))
