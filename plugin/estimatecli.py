"""`zcache estimate` on the command line; what it does stands in `estimate`."""

from __future__ import annotations

import argparse
from typing import Any

PAGES = 8192  # 32 MiB: shares of a percent are told apart


def add(commands: Any) -> None:
    """The command, beside the others."""
    parser = commands.add_parser(
        "estimate", help="how well the memory of live processes would compress"
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--pid", type=int, nargs="+", metavar="PID", help="of these processes")
    whose.add_argument("--all", action="store_true", help="of all that may be read")
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    parser.add_argument(
        "--pool", default="20%", metavar="SIZE", help="capacity for this pool (20%%)"
    )
    parser.add_argument("--pages", type=int, default=PAGES, metavar="N",
                        help=f"most pages looked at ({PAGES}, which is 32 MiB)")  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from plugin import estimate

    return estimate.run(args)
