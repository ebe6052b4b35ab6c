"""When a certificate ends.

    -----BEGIN CERTIFICATE-----  base64 of
    SEQUENCE( SEQUENCE( [0] version?, serial, algorithm, issuer, SEQUENCE( from, until ), ...    DER

Read by hand, because the whole of `cryptography` takes 15 MiB in a node process, which should be
small.  RFC 5280, 4.1; lengths as in X.690, 8.1.3.

Bound: two dates of a certificate that OpenSSL has accepted.  What it is not: a check of anything.
"""

from __future__ import annotations

import base64
import binascii
import calendar
import time
from pathlib import Path

from cluster.peeraddress import NODE, PEM_CERTIFICATE

DAY_S = 86400
WARN_DAYS = 30  # before its end: time for whoever makes one by hand, and for a holiday
SEQUENCE, VERSION, UTC_TIME = 0x30, 0xA0, 0x17
BEFORE_VALIDITY = 3  # serial, algorithm, issuer


def ends_s(pem: str) -> int:
    """The last second of a certificate, since 1970.  Raises ValueError for what is none."""
    try:
        der = base64.b64decode("".join(pem.split("-----")[2].split()), validate=True)
        _, whole, _ = _part(der)
        _, fields, _ = _part(whole)
        tag, _, rest = _part(fields)
        if tag == VERSION:
            fields = rest
        for _ in range(BEFORE_VALIDITY):
            _, _, fields = _part(fields)
        _, validity, _ = _part(fields)
        _, _, until = _part(validity)
        tag, text, _ = _part(until)
    except (IndexError, binascii.Error) as error:
        raise ValueError("it is no certificate") from error
    form = "%y%m%d%H%M%SZ" if tag == UTC_TIME else "%Y%m%d%H%M%SZ"
    return calendar.timegm(time.strptime(text.decode("ascii"), form))


def _part(data: bytes) -> tuple[int, bytes, bytes]:
    """(tag, contents, what comes behind) of the first value of `data`."""
    length, start = data[1], 2
    if length & 0x80:
        start = 2 + (length & 0x7F)
        length = int.from_bytes(data[2:start], "big")
    if len(data) < start + length:
        raise IndexError
    return data[0], data[start : start + length], data[start + length :]


def first_end_s(folder: str | Path) -> int | None:
    """When the first certificate of the folder's node.pem ends; None without one to be read."""
    try:
        text = (Path(folder) / NODE).read_text(encoding="ascii")
        return min((ends_s(pem) for pem in PEM_CERTIFICATE.findall(text)), default=None)
    except (OSError, ValueError):
        return None


def days_left(end_s: int, now_s: float | None = None) -> int:
    """Whole days until then, negative afterwards."""
    return int((end_s - (time.time() if now_s is None else now_s)) // DAY_S)
