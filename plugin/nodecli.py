"""The commands of a cluster: lend RAM to other machines, empty a lender, make certificates.

    zcache node --listen ADDR --donate SIZE     becomes the process cluster.lending
    zcache node drain [--off]                   asks it to empty itself, and watches
    zcache cluster-init, zcache cluster-add     a CA, and one file for each node

Only what a person types and reads.  `node` replaces this process, so that systemd or a shell
sees the one that lends.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from plugin.amounts import size_bytes, total_ram_bytes
from zcache_core.errors import ConfigError
from zcache_core.owner import runtime_dir

CLUSTER_FOLDER = "/etc/zcache/cluster"
HOUR_S = 3600


def add_commands(commands: Any) -> None:
    """`commands`: what add_subparsers gave."""
    node = commands.add_parser("node", help="lend RAM to other machines; node drain: empty it")
    node.add_argument("action", nargs="?", choices=("drain",), help="empty a running one")
    node.add_argument("--listen", metavar="ADDR", help="HOST:PORT, or a Unix socket's path")
    node.add_argument("--donate", metavar="SIZE", help="how much RAM, all costs in it: 4G, 25%%")
    node.add_argument("--memory", metavar="NAME", help="keep the pages for the next start")
    node.add_argument("--control", metavar="SOCK", help="its control socket (RUNTIME/node.ctl)")
    node.add_argument(
        "--tls", metavar="FOLDER", help="with node.pem; needed but on loopback and Unix sockets"
    )
    node.add_argument(
        "--etcd", metavar="URL", help="register there: http://HOST:2379, or a file with that"
    )
    node.add_argument(
        "--metrics",
        metavar="ADDR",
        help="metrics and web page: 9469 for this machine only, or HOST:PORT",
    )
    node.add_argument(
        "--quota", metavar="SIZE", help="most of it for one owner (default: all of it)"
    )
    node.add_argument(
        "--abandon",
        metavar="HOURS",
        type=float,
        default=24.0,
        help="drop the pages of an owner not heard of for so long (24)",
    )
    node.add_argument("--off", action="store_true", help="drain: lend again")
    node.add_argument("--keep", action="store_true", help="drain: go on when interrupted (Ctrl-C)")
    node.set_defaults(run=_node)

    init = commands.add_parser("cluster-init", help="make a cluster's CA")
    init.add_argument("folder", nargs="?", default=CLUSTER_FOLDER, help=f"({CLUSTER_FOLDER})")
    init.set_defaults(run=_init)
    adding = commands.add_parser("cluster-add", help="make a node's certificate: one file")
    adding.add_argument("name", metavar="NAME", help="of the new node")
    adding.add_argument("--folder", default=CLUSTER_FOLDER, help=f"with the CA ({CLUSTER_FOLDER})")
    adding.add_argument(
        "--address",
        action="append",
        default=[],
        metavar="ADDR",
        help="an IP address or other name by which its swap device is attached; may be repeated",
    )
    adding.set_defaults(run=_add)


def default_control() -> str:
    """Where a node answers unless it is told otherwise."""
    return str(runtime_dir() / "node.ctl")


def _node(args: argparse.Namespace) -> int:
    control = args.control or default_control()
    if args.action != "drain":
        from plugin.wiring import node_env  # it knows every part

        words = lending_words(args, control)
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "cluster.lending", *words], node_env())
    from cluster.link import BlockingClient
    from plugin import drain

    with BlockingClient(control) as client:
        if args.off:
            return drain.off(client.call, what=drain.NODE)
        return drain.run(client.call, args.keep, what=drain.NODE)


def lending_words(args: argparse.Namespace, control: str) -> list[str]:
    """The words for `cluster.lending`; what is wrong is said here.  Raises ConfigError."""
    from cluster.addresses import read_address

    if not args.listen or not args.donate:
        raise ConfigError(
            "zcache node needs --listen and --donate, like --listen 127.0.0.1:7900 --donate 4G"
        )
    donate = donated_bytes(args.donate)
    words = ["--control", control, "--listen", args.listen, "--donate", str(donate)]
    for name in ("memory", "tls", "etcd"):
        if value := getattr(args, name):
            words += [f"--{name}", value]
    if args.metrics:
        words += ["--metrics", read_address("--metrics", args.metrics)]
    if args.quota:
        words += ["--quota", str(size_bytes("quota", args.quota, "--quota 1G"))]
    if not 0 < args.abandon <= 24 * 3650:
        raise ConfigError(f"--abandon {args.abandon} is no number of hours; write --abandon 24")
    return [*words, "--abandon", str(max(1, int(args.abandon * HOUR_S)))]


def donated_bytes(text: str) -> int:
    """'4G' or '25%' as bytes, 90 % of the RAM at most.  Raises ConfigError."""
    ram_bytes = total_ram_bytes()
    if text.endswith("%") and text[:-1].isdecimal():
        donate = ram_bytes * int(text[:-1]) // 100
    else:
        donate = size_bytes("donate", text, "--donate 4G or --donate 25%")
    if donate > ram_bytes * 9 // 10:
        raise ConfigError(
            f"--donate {text} leaves this machine no RAM of its own; write at most "
            f"{ram_bytes * 9 // 10 >> 20}M"
        )
    return donate


def _init(args: argparse.Namespace) -> int:
    from cluster import certificates

    made = certificates.init(Path(args.folder))
    print(f"zcache: {made} is the CA of a new cluster; next: zcache cluster-add NAME")
    return 0


def _add(args: argparse.Namespace) -> int:
    from cluster import certificates

    made = certificates.add(Path(args.folder), args.name, addresses=args.address)
    print(
        f"zcache: copy {made} to the machine {args.name}, into a folder of its own, mode 0600; "
        f"there: tls=THAT_FOLDER"
    )
    return 0
