"""Imported before all else by a supervisor: the one that an upgrade has put into place takes naps.

It is of a real-time class from its first instruction on, and its imports are most of its start: 0.4
to 1.2 s in a guest of one CPU, in which no page moved.  See `naps`.

What it is not: for a first start, for which nobody waits.
"""

from __future__ import annotations

import os

from zcache_core import naps

RESUME = "ZCACHE_RESUME"  # what a supervisor tells itself through exec

if RESUME in os.environ:
    naps.between_imports()
