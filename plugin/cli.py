"""The command `zcache`: what a person or a script asks about servers and the machine.

    zcache serve [--name NAME] [--detach] [--config FILE] key=value ...
                                                a server that is kept running
    zcache stop [--name NAME] [--force]         end it
    zcache upgrade [--name NAME]                replace it by the version installed now
    zcache status [--json] [--control SOCK]     a running server, over its control socket
    zcache top [--interval S] [--once]          a live view of it
    zcache health [--json]                      one answer, and an exit code for scripts
    zcache stats-fs MOUNTPOINT                  its counters as files, read-only
    zcache record FILE                          what is seen every second, in a bounded file
    zcache plot FILE, zcache doctor FILE        a recording as a picture, and in sentences
    zcache drain [--off] [--control SOCK]       move every page from RAM to the disk
    zcache set KEY=VALUE ... [--control SOCK]   change a running server
    zcache up, zcache down                      swap onto a server of this machine; all of it back
    zcache node --listen ADDR --donate SIZE     lend RAM to other machines
    zcache node drain [--off]                   empty such a node, while its owners go on
    zcache cluster-init, zcache cluster-add NAME  certificates, one file for each node
    zcache attach URI, zcache detach            a /dev/nbdX of the kernel's, connected and mended
    zcache completion bash|zsh                  completion for the shell
    zcache estimate --all | --pid PID ...       how well live processes' memory would compress
    zcache check [--remove-leftovers [NAME ...]]  is this machine fit, and what to do if not
    zcache version

Exit codes:
    0  done; for check: fit; for health: ok
    1  check: something has to be done first; health: degraded
    2  usage; health: critical
    3  an option's value is not possible
    4  a memory file is missing, of another format, or not to be had
    5  something is in use
    6  no server answered, or it said no
    7  a device of the kernel's: its server, its connection, its swap area
    130  interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zcache_core
from plugin import attachcli, estimatecli, nodecli, watching
from plugin.instance import DEFAULT_NAME, Instance
from zcache_core.errors import ControlError, ZcacheError

UNFIT = 1
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except ZcacheError as error:
        print(f"zcache: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # what has something to undo has done so before it came here
        print("zcache: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"zcache: {where}{error.strerror or error}", file=sys.stderr)
        return ZcacheError.exit_code
    return code


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; reference pages and completion are made from it."""
    about, _, codes = (__doc__ or "").partition("\n\n")[2].rpartition("\n\nExit codes:\n")
    parser = argparse.ArgumentParser(
        prog="zcache",
        description="Swap onto compressed RAM, the RAM of others, and a disk: serve, watch, steer.",
        epilog=f"{about}\n\nexit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serving(commands)

    status = commands.add_parser("status", help="what a running server holds, and how it is")
    status.add_argument("--json", action="store_true", help="everything, for scripts")
    status.add_argument("--control", metavar="SOCK", help="its control socket (found if only one)")
    status.set_defaults(run=_status)

    draining = commands.add_parser(
        "drain", help="move every page from RAM to the disk, and watch it"
    )
    what = draining.add_mutually_exclusive_group()
    what.add_argument("--off", action="store_true", help="use RAM again")
    what.add_argument(
        "--keep", action="store_true", help="go on when this command is interrupted (Ctrl-C)"
    )
    draining.add_argument("--control", metavar="SOCK", help="the server (found if only one)")
    draining.set_defaults(run=_drain)

    setting = commands.add_parser(
        "set",
        help="change a running server: allocator, recompress, recompress_age, pool, high, low, "
        "writeback_limit",
    )
    setting.add_argument("words", nargs="+", metavar="KEY=VALUE", help="like allocator=zsmalloc")
    setting.add_argument("--control", metavar="SOCK", help="the server (found if only one)")
    setting.set_defaults(run=_set)

    attachcli.add_commands(commands)
    nodecli.add_commands(commands)

    check = commands.add_parser("check", help="is this machine fit to swap onto zcache")
    check.add_argument(
        "--remove-leftovers",
        nargs="*",
        metavar="NAME",
        help="remove the memory files of killed servers, those of these names or segment numbers, "
        "or all; their pages are lost",
    )
    check.set_defaults(run=_check)

    watching.add(commands, lambda: the_only_control(or_node=True))
    estimatecli.add(commands)
    complete = commands.add_parser("completion", help="print a script that completes this command")
    complete.add_argument("shell", choices=("bash", "zsh"), help="source <(zcache completion bash)")
    complete.set_defaults(run=_completion)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_serving(commands: Any) -> None:
    """serve, stop, upgrade: what acts on one instance."""
    serving = commands.add_parser("serve", help="serve a swap device, and keep serving it")
    serving.add_argument("words", nargs="*", metavar="key=value", help="as for the plugin")
    serving.add_argument("--config", metavar="FILE", help="a TOML file with the same keys")
    serving.add_argument("--detach", action="store_true", help="return when it serves")
    serving.add_argument(
        "--swap", action="store_true",
        help="for this machine's own swap: commit=all, unless commit= or pressure= is given",
    )  # fmt: skip
    serving.set_defaults(run=_serve)
    stopping = commands.add_parser("stop", help="end a server, and free its memory")
    stopping.add_argument(
        "--force", action="store_true", help="even while a kernel device is attached"
    )
    stopping.add_argument("--keep", action="store_true", help="keep the pages for its next start")
    stopping.set_defaults(run=_stop)
    upgrading = commands.add_parser("upgrade", help="replace a server, its pages stay")
    upgrading.set_defaults(run=_upgrade)
    for parser in (serving, stopping, upgrading):
        parser.add_argument(
            "--name", default=DEFAULT_NAME, help=f"which server (default: {DEFAULT_NAME})"
        )


def _serve(args: argparse.Namespace) -> int:
    from plugin import serve

    instance = Instance(args.name)
    words = serve.words_of(serve.read_toml(args.config), args.words) if args.config else args.words
    if args.swap:
        words = serve.own_machine_words(words)
    serve.start(instance, words, args.detach)
    print(f"zcache: {args.name} is served on {serve.address(instance)}")
    return 0


def _stop(args: argparse.Namespace) -> int:
    from plugin import serve

    found = serve.stop(Instance(args.name), args.force, args.keep)
    print(f"zcache: {args.name} is stopped" if found else f"zcache: {args.name} was not running")
    return 0


def _upgrade(args: argparse.Namespace) -> int:
    from plugin import serve

    state = serve.upgrade(Instance(args.name))
    print(f"zcache: {args.name} is served by version {state.version} (process {state.server_pid})")
    return 0


def _status(args: argparse.Namespace) -> int:
    from plugin import lent, reach, show

    control = args.control or the_only_control(or_node=True)
    with contextlib.closing(reach.reach(control)) as call:
        answers = reach.answers(call)
        if len(answers["config"].get("devices", ())) > 1:
            with contextlib.suppress(ControlError):  # not told over http
                answers["devices"] = call("devices")
    if args.json:
        print(json.dumps({"control": str(control), **answers}, indent=2))
    elif show.only_lends(answers["config"]):
        show.print_lines(lent.status_lines(str(control), **answers))
    else:
        owners = answers.pop("owners", None)
        lines = show.lines(str(control), **answers)
        if owners is not None:
            lines += lent.server_lines(answers["stats"], answers["config"], owners)
        show.print_lines(lines)
    return 0


def _drain(args: argparse.Namespace) -> int:
    from cluster.link import BlockingClient
    from plugin import drain

    with BlockingClient(args.control or the_only_control()) as client:
        return drain.off(client.call) if args.off else drain.run(client.call, args.keep)


def _set(args: argparse.Namespace) -> int:
    from cluster.link import BlockingClient
    from plugin import top

    wanted = top.changes(" ".join(args.words))
    with BlockingClient(args.control or the_only_control()) as client:
        holds = client.call("set", wanted)
    words = (f"{key}={'none' if value is None else value}" for key, value in holds.items())
    print(f"zcache: {' '.join(words)}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from plugin import fitness, fitswap, servestate, show

    found = [look() for look in (*fitness.LOOKS, *fitswap.LOOKS)]
    if all(f.level == fitness.OK for f in found if f.subject == "compiled core"):
        wanted = args.remove_leftovers
        found += (
            fitness.leftover_memory()
            if wanted is None
            else fitness.remove_leftovers(wanted, servestate.needed_by)
        )
    rows = []
    for finding in found:
        rows.append(show.Line(finding.subject, f"{finding.level}: {finding.what}", finding.level))
        if finding.do:
            rows.append(show.Line("", f"-> {finding.do}"))
    show.print_lines(rows)
    return UNFIT if any(finding.level == fitness.TODO for finding in found) else 0


def _completion(args: argparse.Namespace) -> int:
    from plugin import reference  # it knows every part, and no other command needs it

    if args.shell == "zsh":
        print("autoload -U bashcompinit && bashcompinit")
    print(reference.completion(build_parser()), end="")
    return 0


def _version(args: argparse.Namespace) -> int:
    print(f"zcache {zcache_core.__version__}")
    return 0


def the_only_control(or_node: bool = False) -> str:
    """The control socket of the one running server.  Raises ControlError.

    `or_node`: without a server, of the one node that lends.
    """
    found = running_controls() or (running_controls("cluster.lending") if or_node else [])
    if len(found) == 1:
        return found[0]
    if not found:
        raise ControlError(
            "no zcache server is running here; start one with 'make run', or name its control "
            "socket with --control"
        )
    raise ControlError(
        f"{len(found)} servers are running; name one of their control sockets: "
        + " or ".join(f"--control {path}" for path in found)
    )


def running_controls(program: str = "cluster.node") -> list[str]:
    """Control sockets of the node processes that we can see, from their command lines."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours to see
            words = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")]
            if program in words and "--control" in words:
                found.add(words[words.index("--control") + 1])
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
