"""What `zcache up` reads beside the server's keys: the table [swap] of the same TOML file.

    size = "8G"            the server's keys, on top, as `zcache serve --config` reads them
    pool = "25%"

    [swap]                 up's own: priority, device, timeout, dead_timeout
    priority = 100

Options on the command line win.  An unknown key fails, with the one that was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from zcache_core.errors import ConfigError

TABLE = "swap"
KINDS = {"priority": int, "device": str, "timeout": int, "dead_timeout": int}
KIND_WORDS = {int: "a whole number", str: 'a text, like "/dev/nbd0"'}


def settings(document: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name; None where nobody gave one.  Raises ConfigError."""
    table = document.get(TABLE, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{TABLE} in the file is no table; write [{TABLE}] on a line of its own")
    for name, value in table.items():
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?  " if near else ""
            raise ConfigError(
                f"there is no {name} in [{TABLE}]; {hint}The keys are {', '.join(KINDS)}"
            )
        if type(value) is not KINDS[name]:
            raise ConfigError(f"{name} in [{TABLE}] is not {KIND_WORDS[KINDS[name]]}; write it so")
    given = {name: value for name, value in options.items() if value is not None}
    return dict.fromkeys(KINDS) | dict(table) | given
