"""The commands that watch a server: their words on the command line, and what they call.

    zcache top [--interval S] [--once]      a live view
    zcache health [--json]                  one answer, and an exit code for scripts
    zcache stats-fs MOUNTPOINT              the counters as files
    zcache record FILE                      append what is seen, in a bounded file
    zcache plot FILE, zcache doctor FILE    a recording as a picture, and in sentences

Each takes --control, a socket or an http:// address, or finds the server if there is only
one.  `add` puts them beside the other commands; what they do stands in modules of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from plugin.amounts import size_bytes
from zcache_core.errors import ConfigError, ControlError

LENDS = (
    "this is a node that lends RAM, without a swap device to record; 'zcache top' and 'zcache "
    "status' show whose pages are there"
)
CONTROL = "its control socket (found if only one), or http://HOST:PORT as its metrics= says"
Find = Callable[[], str]  # the control socket of the only server; raises ControlError


def add(commands: Any, find: Find) -> None:
    """Add the commands to argparse's `commands`."""
    watch = commands.add_parser("top", help="a live view of a running server")
    watch.add_argument("--interval", default="2", metavar="S", help="seconds between looks (2)")
    watch.add_argument("--once", action="store_true", help="one picture as text, then end")
    _control(watch)
    watch.set_defaults(run=lambda args: _top(args, find))

    well = commands.add_parser(
        "health", help="is all well: exit code 0 ok, 1 degraded, 2 critical, 6 no answer"
    )
    well.add_argument("--json", action="store_true", help="status and reasons, for scripts")
    _control(well)
    well.set_defaults(run=lambda args: _health(args, find))

    files = commands.add_parser("stats-fs", help="mount the counters as files, read-only")
    files.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty folder")
    _control(files)
    files.set_defaults(run=lambda args: _stats_fs(args, find))
    _add_recordings(commands, find)


def _add_recordings(commands: Any, find: Find) -> None:
    keep = commands.add_parser("record", help="append statistics to a file at an interval")
    keep.add_argument("file", metavar="FILE", help="the recording; made if missing")
    keep.add_argument("--interval", default="1", metavar="S", help="seconds between looks (1)")
    keep.add_argument("--limit", default="16M", metavar="SIZE",
                      help="keep the newest looks in at most so much (16M)")  # fmt: skip
    keep.add_argument("--count", type=int, metavar="N", help="end after so many looks")
    _control(keep)
    keep.set_defaults(run=lambda args: _record(args, find))

    draw = commands.add_parser("plot", help="draw a recording as PNG or SVG")
    draw.add_argument("file", metavar="FILE", help="of 'zcache record'")
    draw.add_argument("--output", metavar="PICTURE", help="a name in .png or .svg (FILE.svg)")
    draw.add_argument("--last", metavar="S", help="only the last so many seconds")
    draw.set_defaults(run=_plot)

    explain = commands.add_parser("doctor", help="explain a recording of a bad hour")
    explain.add_argument("file", metavar="FILE", help="of 'zcache record'")
    explain.set_defaults(run=_doctor)


def _control(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--control", metavar="SOCK", help=CONTROL)


def _top(args: argparse.Namespace, find: Find) -> int:
    from plugin import terminal, top
    from plugin.reach import reach

    interval_s = top.interval(args.interval)
    control = args.control or find()
    call = reach(control)
    try:
        if args.once or not terminal.is_terminal():
            return top.run_plain(call, control, interval_s, args.once, sys.stdout)
        return top.run_screen(call, control, interval_s)
    finally:
        call.close()


def _health(args: argparse.Namespace, find: Find) -> int:
    from cluster import reasons
    from plugin import show
    from plugin.reach import reach

    with contextlib.closing(reach(args.control or find())) as call:
        found = call("health")
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        rows = [show.Line("health", found["status"], found["status"])]
        for reason in found["reasons"]:
            rows += [show.Line("", reason["what"]), show.Line("", f"-> {reason['do']}")]
        show.print_lines(rows)
    return {reasons.OK: 0, reasons.DEGRADED: 1, reasons.CRITICAL: 2}[found["status"]]


def _stats_fs(args: argparse.Namespace, find: Find) -> int:
    from plugin import statsfs
    from plugin.reach import reach

    with contextlib.closing(reach(args.control or find())) as call:
        call("ping")

        def ask() -> Any:
            call("ping")  # over http that is what brings new answers
            return call("stats")

        return statsfs.run(args.mountpoint, ask, lambda sentence: print(sentence, flush=True))


def _record(args: argparse.Namespace, find: Find) -> int:
    from plugin import record, show, top
    from plugin.reach import reach
    from plugin.recording import Recorder

    interval_s = top.interval(args.interval)
    if args.count is not None and args.count < 1:
        raise ConfigError(f"--count {args.count} is not possible; write 1 or more")
    limit_bytes = size_bytes("--limit", args.limit, "--limit 16M")
    control = args.control or find()
    with contextlib.closing(reach(control)) as call:
        if show.only_lends(call("config")):
            raise ControlError(LENDS)
        return record.run(call, Recorder(args.file, limit_bytes), interval_s, args.count)


def _plot(args: argparse.Namespace) -> int:
    from plugin import plot, top

    last_s = None if args.last is None else top.interval(args.last, "--last", 10**9)
    print(plot.run(args.file, args.output, last_s))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from plugin import doctor, show

    show.print_lines(doctor.run(args.file))
    return 0
