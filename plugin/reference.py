"""Reference pages, man pages and shell completion, made from the code itself.

    KEYS, COUNTERS, the node's methods, the parser of `zcache`
        -> docs/reference/{keys,counters,rpc,command}.md
        -> docs/man/{zcache.1,zcache-plugin.1}
        -> `zcache completion bash`

`make reference` writes the pages (writepages.py); a test says when they are not current.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Mapping

import zcache_core
from cluster import metrics
from cluster.node import Node
from cluster.steering import SETTABLE, Steering
from plugin import counterfiles
from plugin.config import KEYS
from zcache_core.counters import COUNTERS, HISTOGRAMS

NOTE = "<!-- Made by `make reference` from the code; do not edit. -->"
PLUGIN_SYNOPSIS = "nbdkit -f -U /run/zcache.sock python plugin/zcache_plugin.py size=8G pool=2G"

Parsers = Mapping[str, argparse.ArgumentParser]


def commands(parser: argparse.ArgumentParser) -> Parsers:
    """The parser of each command of `zcache`, by name."""
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    choices: Parsers = found.choices
    return choices


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What may stand behind a command, --help left out."""
    return [action for action in parser._actions if action.dest != "help"]


def written(action: argparse.Action) -> str:
    """As one types it: '--control SOCK', 'FILE'."""
    value = str(action.metavar or action.dest.upper()) if action.nargs != 0 else ""
    return f"{', '.join(action.option_strings)} {value}".strip()


def summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    """One line about each command."""
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {choice.dest: choice.help or "" for choice in found._choices_actions}


# ---- Markdown --------------------------------------------------------------------------


def pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Path below the repository -> content, of every page."""
    return {
        "docs/reference/keys.md": "\n".join(keys_page()) + "\n",
        "docs/reference/counters.md": "\n".join(counters_page()) + "\n",
        "docs/reference/rpc.md": "\n".join(rpc_page()) + "\n",
        "docs/reference/command.md": "\n".join(command_page(parser)) + "\n",
        "docs/man/zcache.1": "\n".join(command_man(parser)) + "\n",
        "docs/man/zcache-plugin.1": "\n".join(plugin_man()) + "\n",
    }


def keys_page() -> Iterator[str]:
    yield from (NOTE, "# Keys of the server", "", "    " + PLUGIN_SYNOPSIS, "")
    yield from ("| key | meaning | default |", "|---|---|---|")
    for key in KEYS:
        yield f"| `{key.name}` | {cell(key.help)} | {cell(key.default)} |"


def counters_page() -> Iterator[str]:
    yield from (NOTE, "# Counters", "")
    yield "A `counter` only grows while the memory file lives; a `gauge` is what holds now; `max`"
    yield "is the most so far; `derived` is computed when it is read. The file is below the mount"
    yield "point of `zcache stats-fs`; another name that the kernel had stands behind it."
    yield from (
        "",
        "| counter | kind | unit | meaning | metric | file |",
        "|---|---|---|---|---|---|",
    )
    for counter in COUNTERS:
        names = [path for path, name in counterfiles.files().items() if name == counter.name]
        names.sort(key=lambda path: not path.endswith("/" + counter.name))
        yield (
            f"| `{counter.name}` | {counter.kind} | {counter.unit} | {cell(counter.help)} "
            f"| `{metrics.sample(counter)}` | {', '.join(f'`{name}`' for name in names)} |"
        )
    yield from ("", "## Histograms", "")
    yield "Of `histograms` in `stats`: bucket *k* counts the values from 2^(*k*-1) to below 2^*k*,"
    yield "the first one zeros, the last one all larger ones too. What takes about a microsecond is"
    yield "timed once in about 32 calls, all else each time. The files of `zcache stats-fs` lie in"
    yield "`latency/`: the name and `_count`, `_sum`, `_p50`, `_p99` (with the unit), `_buckets`."
    yield from ("", "| histogram | unit | meaning | metric |", "|---|---|---|---|")
    for histogram in HISTOGRAMS:
        yield (
            f"| `{histogram.name}` | {histogram.unit} | {cell(histogram.help)} "
            f"| `{metrics.spread(histogram.name)}` |"
        )


def rpc_page() -> Iterator[str]:
    yield from (NOTE, "# Methods of the control socket", "")
    yield "The protocol, its errors and its bounds are in [protocol.md](../protocol.md)."
    yield from ("", "| method | what it does |", "|---|---|")
    for name, method in methods().items():
        yield f"| `{name}` | {cell(' '.join((inspect.getdoc(method) or '').split()))} |"


def methods() -> dict[str, object]:
    """Name -> the function that answers."""
    own: dict[str, object] = {
        name: getattr(Node, name)
        for name in (
            "ping",
            "stats",
            "devices",
            "config",
            "health",
            "peers",
            "owners",
            "drain_lent",
        )
    }
    return own | {name: getattr(Steering, name) for name in ("set", "drain")}


def command_page(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (NOTE, "# The command `zcache`", "")
    lines = summaries(parser)
    for name, command in commands(parser).items():
        yield from (f"## zcache {name}", "", sentence(lines[name]), "")
        for action in options(command):
            yield f"- `{written(action)}`: {action.help}"
        if options(command):
            yield ""
    yield from ("## Exit codes", "")
    yield from (f"    {line.strip()}" for line in exit_codes(parser))


def exit_codes(parser: argparse.ArgumentParser) -> list[str]:
    return (parser.epilog or "").rpartition("exit codes:\n")[2].strip().splitlines()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# ---- man pages -------------------------------------------------------------------------


def roff(text: str) -> str:
    """Text that roff takes as it is."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\\&" + escaped if escaped.startswith((".", "\\(aq")) else escaped


def man_head(name: str, about: str) -> Iterator[str]:
    yield f'.TH {name.upper()} 1 "" "zcache {zcache_core.__version__}" "zcache"'
    yield from (".SH NAME", f"{roff(name)} \\- {roff(about)}")


def command_man(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from man_head(
        "zcache", "compressed swap in user space: watch it, steer it, understand it"
    )
    yield from (".SH SYNOPSIS", ".B zcache", ".I COMMAND", "[options]", ".SH COMMANDS")
    lines = summaries(parser)
    for name, command in commands(parser).items():
        yield from (".SS", f"zcache {roff(name)}", roff(sentence(lines[name])))
        for action in options(command):
            yield from (".TP", f".B {roff(written(action))}", roff(action.help or ""))
    yield ".SH EXIT STATUS"
    for line in exit_codes(parser):
        code, _, text = line.strip().partition(" ")
        yield from (".TP", f".B {code}", roff(text.strip()))
    yield from (".SH SEE ALSO", ".BR zcache\\-plugin (1),", ".BR nbdkit (1),", ".BR swapon (8)")


def plugin_man() -> Iterator[str]:
    yield from man_head("zcache-plugin", "nbdkit plugin: a swap device kept compressed in RAM")
    yield from (".SH SYNOPSIS", f".B {roff(PLUGIN_SYNOPSIS)}", ".SH KEYS")
    for key in KEYS:
        yield from (
            ".TP",
            f".B {key.name}=",
            roff(sentence(f"{key.help} (default: {key.default})")),
        )
    yield from (".SH SEE ALSO", ".BR zcache (1),", ".BR nbdkit (1),", ".BR nbd\\-client (8)")


# ---- completion ------------------------------------------------------------------------


def completion(parser: argparse.ArgumentParser) -> str:
    """A script for bash, and for zsh after `autoload -U bashcompinit && bashcompinit`."""
    names = commands(parser)
    cases = []
    for name, command in names.items():
        words = [word for action in options(command) for word in action.option_strings]
        positional = [a for a in options(command) if not a.option_strings]
        choices = [str(choice) for a in positional for choice in a.choices or ()]
        if any(str(a.metavar).lower() == "key=value" for a in positional):
            choices += [f"{key.name}=" for key in KEYS if name != "set" or key.name in SETTABLE]
        files = "-f" if any(not a.choices for a in positional) else ""
        line = (
            f'        {name}) words="{" ".join([*words, "--help", *choices])}"; files="{files}" ;;'
        )
        cases.append(line)
    paths = {
        word
        for command in names.values()
        for action in options(command)
        if action.metavar in PATHS
        for word in action.option_strings
    }
    made = SCRIPT.replace("COMMANDS", " ".join(names)).replace("CASES", "\n".join(cases))
    return made.replace("PATHS", "|".join(sorted(paths)))


PATHS = ("FILE", "FOLDER", "SOCK", "PICTURE")  # what options call a path


SCRIPT = """\
# Completion of the command zcache for bash; in zsh first: autoload -U bashcompinit && bashcompinit
#   source <(zcache completion bash)
_zcache() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words="" files=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "COMMANDS --help" -- "$word"))
        return
    fi
    case "$before" in
        PATHS) COMPREPLY=($(compgen -f -- "$word")); return ;;
        --interval|--limit|--count|--last) return ;;
    esac
    case "${COMP_WORDS[1]}" in
CASES
    esac
    COMPREPLY=($(compgen -W "$words" $files -- "$word"))
    if [[ ${#COMPREPLY[@]} -eq 1 && $COMPREPLY == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -o filenames -F _zcache zcache
"""
