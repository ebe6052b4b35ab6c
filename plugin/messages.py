"""How a failure of ours reads in nbdkit's log: one sentence, no traceback.

When a Python callback raises, nbdkit's python plugin calls
`traceback.format_exception` and prints what it returns.  For a mistake that a
user can mend, and for an error that a request is meant to have (ENOSPC), the
stack says nothing: so this process's copy of that function gives the message
alone for ZcacheError and OSError, and the whole story for anything else.

What it is not: a way to print nothing.  nbdkit 1.32 prints one line for every
request that fails; there is no other way out of a Python callback.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from zcache_core.errors import ZcacheError

_whole_story = traceback.format_exception


def install() -> None:
    """Put our `format_exception` in place, for this process."""
    traceback.format_exception = _format


def say(sentence: str) -> None:
    """One line on the server's log."""
    print(sentence, file=sys.stderr, flush=True)


def warn(sentence: str) -> None:
    """One line on the server's log that asks for attention."""
    say(f"zcache: warning: {sentence}")


def _format(kind: Any, value: Any = None, tb: Any = None, *rest: Any, **options: Any) -> list[str]:
    if isinstance(value, ZcacheError):
        return [str(value)]
    if isinstance(value, OSError):
        # Without the number, and without "None" for a file that there is not.
        return [str(value) if value.filename else value.strerror or str(value)]
    return _whole_story(kind, value, tb, *rest, **options)
