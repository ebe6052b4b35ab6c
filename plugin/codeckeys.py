"""Reading the keys about codecs: how pages are compressed at first, and when they are cold."""

from __future__ import annotations

import re

from zcache_core.errors import ConfigError

CODECS = ("lz4", "zstd", "none")
ZSTD_LEVELS = range(1, 20)
RECOMPRESS_LEVEL = 15  # of recompress=zstd alone: store.pyx says why
RECOMPRESS_AGE_S = 300
RECOMPRESS_AGE_S_MAX = 7 * 86400
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}


def _level(name: str, text: str) -> int:
    """LEVEL of zstd:LEVEL.  Raises ConfigError."""
    level = text.partition(":")[2]
    if re.fullmatch(r"\d{1,3}", level) and int(level) in ZSTD_LEVELS:
        return int(level)
    raise ConfigError(f"{name}={text} has no level from 1 to 19; write it like {name}=zstd:3")


def read_codec(text: str, ram_bytes: int) -> str:
    """What new pages are compressed with."""
    if text in CODECS:
        return text
    name, colon, _ = text.partition(":")
    if name == "zstd" and colon:
        return f"zstd:{_level('codec', text)}"
    if name in CODECS and colon:
        raise ConfigError(f"codec={name} has no levels; write codec={name}")
    raise ConfigError(
        f"there is no codec {text}; write codec=lz4, codec=zstd, codec=zstd:3 (level 1 to 19) "
        f"or codec=none"
    )


def read_recompress(text: str, ram_bytes: int) -> str:
    """What cold pages are compressed with: zstd:LEVEL, or none."""
    if text == "none":
        return text
    if text == "zstd":
        return f"zstd:{RECOMPRESS_LEVEL}"
    if text.startswith("zstd:"):
        return f"zstd:{_level('recompress', text)}"
    raise ConfigError(
        f"recompress={text} is not possible; write recompress=zstd, recompress=zstd:15 (level 1 to "
        f"19) or recompress=none"
    )


def recompress_level(codec: str) -> int:
    """zstd's level of what read_recompress gave; 0 for none."""
    return int(codec.removeprefix("zstd:")) if codec != "none" else 0


def read_age(text: str, ram_bytes: int) -> int:
    """Seconds, minutes or hours."""
    match = re.fullmatch(r"(\d{1,7})\s*([smh]?)", text.strip(), re.ASCII)
    seconds = int(match.group(1)) * _UNITS_S[match.group(2)] if match else 0
    if not 1 <= seconds <= RECOMPRESS_AGE_S_MAX:
        raise ConfigError(
            f"recompress_age={text} is no age; write seconds, minutes or hours up to 168h, like "
            f"recompress_age=300 or recompress_age=5m"
        )
    return seconds
