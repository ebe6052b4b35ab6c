"""What goes back and forth between the harness and a booted guest.

    serial line   commands to PID 1 (guest/agent.c), its answers   `ask`
                  what it tells by itself                          `exits`, `samples`
    console       the guest's kernel log                           `log`

One thread reads both and keeps what came; everybody else waits on one condition variable, so that
nothing here polls.  The lock protects `_answers`, `exits`, `ready` and `gone`; `log` and `samples`
only ever grow.

Bound: every wait has the lab's deadline at the latest.  A guest that panics, or whose process ends,
closes both, and that ends every wait with GuestDiedError.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from . import agent_line
from .clock import Deadline
from .errors import CommandFailedError, GuestDiedError, LabTimeoutError
from .kernel_log import LogLine, parse
from .vmstat import Sample, parse_sample

COMMAND_LIMIT_S = 60
LAST_WORDS = 40
MOST_ALIKE = 100
"""Lines of one text that are kept: a refused write is one console line each, and there can be
hundreds of thousands of them."""


@dataclass(frozen=True)
class Exit:
    """How a program in the guest ended.

    code: exit code, or minus the signal that killed it.
    at_s: our monotonic clock when we heard of it.
    """

    code: int
    at_s: float
    user_ms: int
    system_ms: int
    major_faults: int
    peak_kb: int


class GuestLink:
    """line: our end of the serial line.  console: a pipe's reading end, which is ours from now."""

    def __init__(self, line: socket.socket, console: int, deadline: Deadline) -> None:
        self.deadline = deadline
        self.samples: list[Sample] = []
        self.log: list[LogLine] = []
        self.exits: dict[str, Exit] = {}
        self.ready = False
        self.gone = False
        self.expired = False
        self._changed = threading.Condition()
        self._answers: dict[int, agent_line.Answer] = {}
        self._alike: Counter[str] = Counter()
        self._numbers = 0
        self._line = line
        self._console = console
        self._reader = threading.Thread(target=self._read, name="swaplab-guest", daemon=True)
        self._reader.start()

    def ask(self, *words: str, limit_s: float | None = COMMAND_LIMIT_S) -> str:
        """One command to PID 1; its answer's text.

        Raises CommandFailedError, GuestDiedError, LabTimeoutError.
        """
        number = self.send(*words)
        self.wait_for(lambda: number in self._answers, limit_s, f"an answer to {' '.join(words)}")
        answer = self._answers.pop(number)
        if not answer.good:
            raise CommandFailedError(f"{' '.join(words)}: {answer.text}")
        return answer.text

    def send(self, *words: str) -> int:
        """A command whose answer nobody waits for; its number."""
        with self._changed:
            self._numbers += 1
            number = self._numbers
            try:
                self._line.sendall(agent_line.encode(number, *words))
            except OSError as error:
                raise GuestDiedError(self.last_words()) from error
        return number

    def wait_for(
        self,
        ready: Callable[[], bool],
        limit_s: float | None,
        what: str,
        give_up_s: float = math.inf,
    ) -> None:
        """Until `ready()`, which is looked at whenever the guest has said something.

        limit_s: after so long, LabTimeoutError.  give_up_s: at this moment of the monotonic
        clock, simply return.
        """
        deadline = self.deadline.nearer(limit_s)
        with self._changed:
            while not ready():
                if self.expired or deadline.passed():
                    raise LabTimeoutError(f"no time left to wait for {what}\n{self.last_words()}")
                if self.gone:
                    raise GuestDiedError(f"while waiting for {what}\n{self.last_words()}")
                left_s = min(deadline.left_s(), give_up_s - time.monotonic())
                if left_s <= 0 and not deadline.passed():
                    return
                self._changed.wait(left_s)

    def last_words(self) -> str:
        """The end of the console, for messages."""
        return "\n".join(line.text for line in self.log[-LAST_WORDS:])

    def expire(self) -> None:
        """End every wait, now and later, with LabTimeoutError."""
        with self._changed:
            self.expired = True
            self._changed.notify_all()

    def close(self) -> None:
        """After the guest's processes have ended: read what is left, and close."""
        self._reader.join()
        self._line.close()
        os.close(self._console)

    def _read(self) -> None:
        pieces = {self._console: b"", self._line.fileno(): b""}
        with selectors.DefaultSelector() as selector:
            for fd in pieces:
                selector.register(fd, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        data = os.read(key.fd, 65536)
                    except OSError:
                        data = b""
                    if not data:
                        selector.unregister(key.fd)
                    *whole, pieces[key.fd] = (pieces[key.fd] + data).split(b"\n")
                    with self._changed:
                        for text in whole:
                            self._take(key.fd, text.decode(errors="replace").rstrip("\r"))
                        self._changed.notify_all()
        with self._changed:
            self.gone = True
            self._changed.notify_all()

    def _take(self, fd: int, text: str) -> None:
        if fd == self._console:
            line = parse(text)
            self._alike[line.text] += 1
            if self._alike[line.text] <= MOST_ALIKE:
                self.log.append(line)
            return
        try:
            message = agent_line.decode(text)
        except ValueError:
            self.log.append(LogLine(None, f"agent: {text}"))
            return
        if isinstance(message, agent_line.Answer):
            self._answers[message.number] = message
        elif message.kind == "ready":
            self.ready = True
        elif message.kind == "vm":
            self.samples.append(parse_sample(message.words, time.monotonic()))
        elif message.kind == "exit":
            name, _, status, *numbers = message.words
            used = {key: int(value) for key, _, value in (word.partition("=") for word in numbers)}
            code = os.waitstatus_to_exitcode(int(status))
            self.exits[name] = Exit(code, time.monotonic(), **used)
