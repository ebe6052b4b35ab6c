"""The commands around a device of the kernel's: attach, detach, up, down.

Only what a person types and reads; the work is in `attach` and `swapping`.  Those are imported
when they are needed: pyroute2 takes a third of a second, and `zcache status` has no use for it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from plugin.instance import DEFAULT_NAME, Instance
from zcache_core.errors import ConfigError

REQUEST_TIMEOUT_S = 3
DEAD_TIMEOUT_S = 60
SWAP_PRIORITY, SWAP_PRIORITY_MAX = 100, 32767
SHORT_KEYS = {
    "size": "of the device: 8G",
    "pool": "most RAM for it: 2G, 25%%",
    "disk": "a file or disk for cold pages",
}
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


def add_commands(commands: Any) -> None:
    """`commands`: what add_subparsers gave."""
    one = commands.add_parser("attach", help="connect a /dev/nbdX to a server, and keep it so")
    one.add_argument(
        "uri", metavar="URI", help="nbd://HOST:PORT/, nbds://... with TLS, nbd+unix:///?socket=PATH"
    )
    add_name(one)
    add_attaching(one)
    one.add_argument(
        "--plain", action="store_true", help="the server is no zcache: it has no generations"
    )
    one.add_argument(
        "--tls",
        metavar="FOLDER",
        help="with node.pem, or a PEM file, for nbds:// (/etc/zcache/tls)",
    )
    one.add_argument(
        "--tls-name", metavar="NAME", help="in the server's certificate (the URI's host)"
    )
    one.add_argument(
        "--foreground", action="store_true", help="stay; SIGTERM, Ctrl-C: detach, unless in use"
    )
    one.set_defaults(run=_attach)

    other = commands.add_parser("detach", help="disconnect it again, when nobody uses it")
    add_name(other)
    other.set_defaults(run=_detach)

    rise = commands.add_parser("up", help="serve, attach, mkswap, swapon: swap onto this machine")
    rise.add_argument("words", nargs="*", metavar="key=value", help="further keys of the server")
    rise.add_argument("--config", metavar="FILE", help="a TOML file with all of it")
    for key, text in SHORT_KEYS.items():
        rise.add_argument(f"--{key}", metavar=key.upper(), help=text)
    rise.add_argument(
        "--priority", type=int, help=f"of the swap area, 0 to 32767 ({SWAP_PRIORITY})"
    )
    add_name(rise)
    add_attaching(rise)
    rise.set_defaults(run=_up)

    fall = commands.add_parser("down", help="swapoff, detach, stop: all of it back, in safe order")
    fall.add_argument("--force", action="store_true", help="even if memory may not suffice")
    add_name(fall)
    fall.set_defaults(run=_down)


def add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help=f"of the server or device ({DEFAULT_NAME})"
    )


def add_attaching(parser: argparse.ArgumentParser) -> None:
    """The options that `attach` and `up` share."""
    parser.add_argument("--device", metavar="/dev/nbdX", help="which one (the first free one)")
    parser.add_argument(
        "--timeout",
        type=int,
        metavar="S",
        help=f"a server that answers nothing for so long is dialled again ({REQUEST_TIMEOUT_S})",
    )
    parser.add_argument(
        "--dead-timeout",
        type=int,
        metavar="S",
        help=f"without any connection for so long, requests fail ({DEAD_TIMEOUT_S})",
    )


def timeouts(timeout_s: int | None, dead_s: int | None) -> tuple[int, int]:
    """Checked, in seconds: of a request, without any connection.  Raises ConfigError."""
    timeout_s = REQUEST_TIMEOUT_S if timeout_s is None else timeout_s
    dead_s = max(DEAD_TIMEOUT_S, timeout_s + 1) if dead_s is None else dead_s
    if not 2 <= timeout_s <= 300:
        raise ConfigError(
            f"--timeout {timeout_s} is not possible; write 2 to 300 seconds: a server may take "
            f"1.5 s for a write"
        )
    if not timeout_s < dead_s <= 86_400:
        raise ConfigError(
            f"--dead-timeout {dead_s} is not possible; write more than --timeout, at "
            f"most 86400 seconds"
        )
    return timeout_s, dead_s


def say(sentence: str) -> None:
    print(f"zcache: {sentence}", flush=True)


def _attach(args: argparse.Namespace) -> int:
    from plugin import attach
    from plugin.nbdnetlink import Timeouts

    limits = Timeouts(*timeouts(args.timeout, args.dead_timeout))
    index, tls = attach.parse_device(args.device), args.tls and os.path.abspath(args.tls)
    wish = attach.Wish(args.uri, index, limits, args.plain, tls, args.tls_name)
    if args.foreground:
        from plugin import foreground

        foreground.attach_and_stay(Instance(args.name), wish, say)
    else:
        attach.attach(Instance(args.name), wish, say)
    return 0


def _detach(args: argparse.Namespace) -> int:
    from plugin import attach

    attach.detach(Instance(args.name), say)
    return 0


def _up(args: argparse.Namespace) -> int:
    from plugin import attach, serve, swapping, upfile
    from plugin.nbdnetlink import Timeouts

    document = serve.read_toml(args.config) if args.config else {}
    own = upfile.settings(document, {name: getattr(args, name) for name in upfile.KINDS})
    named = [f"{key}={value}" for key in SHORT_KEYS if (value := getattr(args, key)) is not None]
    priority = SWAP_PRIORITY if own["priority"] is None else own["priority"]
    if not 0 <= priority <= SWAP_PRIORITY_MAX:
        raise ConfigError(f"priority {priority} is not possible; write 0 to {SWAP_PRIORITY_MAX}")
    plan = swapping.Plan(
        Instance(args.name),
        tuple(serve.words_of(document, [*named, *args.words])),
        priority,
        attach.parse_device(own["device"]),
        Timeouts(*timeouts(own["timeout"], own["dead_timeout"])),
    )
    swapping.up(plan, say)
    return 0


def _down(args: argparse.Namespace) -> int:
    from plugin import swapping

    try:
        swapping.down(Instance(args.name), args.force, say)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
