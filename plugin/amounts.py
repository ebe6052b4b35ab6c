"""Sizes in bytes, as people write them for keys and options, and as they read them."""

from __future__ import annotations

import os
import re

from zcache_core.errors import ConfigError

PAGE_BYTES = 4096
UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def total_ram_bytes() -> int:
    """RAM of this machine, as the kernel counts it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def human(size_bytes: int) -> str:
    """A size as one would write it for a key: exact, in the largest unit that divides it."""
    for letter in "TGMK":
        unit = UNITS[letter.lower()]
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{letter}"
    return str(size_bytes)


def size_bytes(name: str, text: str, example: str) -> int:
    """'8G', '512M', '1.5g', '4096' as bytes; letters are powers of 1024."""
    match = re.fullmatch(r"(\d{1,19})(\.\d{1,9})?\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ConfigError(f"{name}={text} is no size; write a number and K, M, G or T: {example}")
    whole, fraction, letter = match.groups()
    unit = UNITS[letter]
    total = int(whole) * unit
    if fraction:
        numerator, denominator = int(fraction[1:]), 10 ** (len(fraction) - 1)
        if numerator * unit % denominator:
            near = total + numerator * unit // denominator
            raise ConfigError(
                f"{name}={text} is no whole number of bytes; write {name}={whole_pages(near)}"
            )
        total += numerator * unit // denominator
    return total


def whole_pages(size_bytes: int) -> str:
    """The nearest usable size, as one would write it."""
    pages = max(1, round(size_bytes / PAGE_BYTES))
    return human(pages * PAGE_BYTES)
