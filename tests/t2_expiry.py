"""When certificates end: read by hand, compared with the library that made them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cryptography import x509

from cluster import certificates, expiry
from cluster.peeraddress import certificates_in


def test_the_end_of_any_certificate(tmp_path: Path, rng: random.Random) -> None:
    """Also after 2049, which is written in another form, and of a CA."""
    folder = tmp_path / "ca"
    certificates.init(folder)
    for number, days in enumerate((1, 29, 825, 20_000, *rng.sample(range(10_000), 6))):
        certificates.add(folder, f"n{number}", days=days)
        ends = []
        for pem in certificates_in(folder / f"n{number}"):
            until = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
            ends.append(int(until.timestamp()))
            assert expiry.ends_s(pem) == ends[-1]
        assert expiry.first_end_s(folder / f"n{number}") == min(ends)


def test_what_is_none_is_told(tmp_path: Path, rng: random.Random) -> None:
    folder = tmp_path / "ca"
    certificates.init(folder)
    pem = certificates_in(certificates.add(folder, "n").parent)[0]
    head, body, foot = pem[:27], pem[27:-25], pem[-25:]
    for length in (0, 4, 40, 80):
        with pytest.raises(ValueError, match="no certificate"):
            expiry.ends_s(head + body[:length] + foot)
    assert expiry.first_end_s(tmp_path) is None
    (tmp_path / "node.pem").write_text("nothing")
    assert expiry.first_end_s(tmp_path) is None


def test_days_are_whole_ones() -> None:
    assert expiry.days_left(30 * expiry.DAY_S, 0) == 30
    assert expiry.days_left(30 * expiry.DAY_S, 1) == 29
    assert expiry.days_left(0, 1) == -1
