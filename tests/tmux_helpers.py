"""A real terminal for tests: tmux with a server of the test's own.

    with Tmux(tmp_path, ["zcache", "top"], 80, 24) as terminal:
        terminal.wait_for("health")       until it is on the screen
        terminal.keys("q")

The command's exit code is shown when it ends, as "ended: N".
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.plugin_helpers import wait_for

WAIT_S = 30


class Tmux:
    """One window of `width` x `height` cells; `env` is what the command gets."""

    def __init__(
        self, folder: Path, command: Sequence[str], width: int, height: int, env: Mapping[str, str]
    ) -> None:
        self._socket = folder / f"tmux-{width}x{height}"
        self._folder = folder
        shell = f"{shlex.join(command)}; echo ended: $?; exec sleep 1000"
        self._start = ["new-session", "-d", "-x", str(width), "-y", str(height), shell]
        self._env = {**env, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}

    def __enter__(self) -> Self:
        (self._folder / "tmux.conf").write_text("set -g default-terminal screen-256color\n")
        self._tmux(*self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-u", "-S", str(self._socket), "-f", str(self._folder / "tmux.conf")]
        env = {k: v for k, v in self._env.items() if k not in ("TMUX", "TMUX_PANE")}
        return subprocess.run(
            [*command, *words], env=env, check=True, capture_output=True, text=True, timeout=WAIT_S
        ).stdout

    def screen(self) -> str:
        """What is seen now."""
        return self._tmux("capture-pane", "-p")

    def colours(self) -> str:
        """The same with its escape sequences."""
        return self._tmux("capture-pane", "-p", "-e")

    def keys(self, *keys: str) -> None:
        """Press keys, by tmux' names (Enter, Escape, C-c) or as they are."""
        self._tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def pid(self) -> int:
        """The shell's."""
        return int(self._tmux("display-message", "-p", "#{pane_pid}"))

    def wait_for(self, *words: str) -> str:
        """The screen once it shows all of them."""
        seen = ""

        def there() -> bool:
            nonlocal seen
            seen = self.screen()
            return all(word in seen for word in words)

        try:
            wait_for(f"{words} on the screen", there)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{seen}") from None
        return seen
