"""`zcache record FILE`: looks at a server at an interval and appends what it saw.

A server that does not answer is noted as such and asked again at the next look: the file
is for the hour when things went wrong.  Ctrl-C and SIGTERM end it; what is written stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from plugin.reach import further
from plugin.recording import ABOUT, Recorder, Sample, flat
from plugin.terminal import ending_signals_as_ctrl_c
from zcache_core.errors import ControlError

Call = Callable[..., Any]
PEER = ("address", "name", "state", "why_down", "copies", "wrong_copies")


def look(call: Call) -> Sample:
    """All answers, or why there are none."""
    try:
        about = {method: call(method) for method in ABOUT}
        # Uptime changes at every look; what it says stands in server_started_seconds.
        about["ping"] = {k: v for k, v in about["ping"].items() if k != "uptime_seconds"}
        named = "peers" in further(about["config"])
        peers = tuple(peer_row(peer) for peer in call("peers")) if named else ()
        return Sample(time.time(), flat(call("stats")), call("health"), about, peers=peers)
    except ControlError as error:
        return Sample(time.time(), {}, {}, {}, str(error))


def peer_row(peer: Mapping[str, Any]) -> dict[str, Any]:
    """What a recording keeps of a peer; its latency in two digits, so that few lines have it."""
    found = {name: peer[name] for name in PEER}
    return found | {"latency_us": int(float(f"{peer['latency_us']:.2g}"))}


def run(call: Call, recorder: Recorder, interval_s: float, count: int | None) -> int:
    """Until `count` looks are written, or for ever; exit code 0.  Raises ConfigError."""
    next_s = time.monotonic()
    try:
        with ending_signals_as_ctrl_c():
            while count is None or count > 0:
                recorder.add(look(call))
                count = None if count is None else count - 1
                next_s = max(next_s + interval_s, time.monotonic())
                if count != 0:
                    time.sleep(next_s - time.monotonic() if next_s > time.monotonic() else 0)
    except KeyboardInterrupt:
        pass
    finally:
        recorder.close()
    return 0
