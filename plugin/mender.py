"""The attach helper: stays resident and mends the device's connection when it dies.

    link alive ── hang-up on our copy of the socket, or LINK_DEAD ──► link dead
        ▲                                                                 │ every 0.05 s
        └── RECONFIGURE, socket taken ◄── handshake, newest generation ◄──┘

It runs on the machine that swaps onto the device, and is needed exactly when nothing can be
swapped in.  So it is a process of its own that imports next to nothing, and before the device is
used: all its memory is locked (code, data, what comes later), every step has been done once,
its heap keeps what it has had, PR_SET_IO_FLUSHER was set before it was started, it cannot be
chosen by the OOM killer, and it runs before ordinary processes.  Afterwards it opens no file,
starts nothing, and writes nowhere but to one locked page of memory, the state page (`statepage`).

When it is killed its spare goes on in its place (`spare`).  When both are, the device goes on
while the connection lives, and `zcache attach` starts a new one.  That has no copy of the socket:
it finds out whether the link is dead by offering the kernel one end of a socket pair now and
then, and taken means dead.

While the link lives the kernel does not look whether it hangs: this does (`swift` says why).  So
it forks and spawns, which may wait for memory, only while the link answers.

With TLS it dials through a relay (`relays`), and keeps another one ready; the link lives on when
it dies itself, as without.

What it does not do: connect the device (`attach` does, and starts this), or end that connection.

Started by `attach.start_mender`, not by people.  Linux: netlink(7), linux/nbd-netlink.h.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

# Started as a file, in isolated mode: no folder of the project is on the path.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from plugin.dialer import Generations, Target, dial, explain
from plugin.relays import MESSAGE_BYTES_MAX, Relays
from plugin.spare import Spare
from plugin.statepage import StatePage
from plugin.swift import Asker, Stall, Swift, netlink
from zcache_core import process
from zcache_core.errors import AttachError

DIAL_EVERY_S = 0.05  # a refused connection costs 20 us; 0.1 s would be a fifth of a short restart
OFFER_S = 2.0  # the kernel notices in milliseconds; longer in vain means that the link lives
OFFER_EVERY_S = 0.01  # the kernel notices the old connection's end about as fast as we do
PROBE_EVERY_S = 2.0
ANSWER_EVERY_S = 0.02
SETTLE_S = 1.0  # what began with a short timer is answered by then, unless the server is slow
HEAP_BYTES = 1 << 20  # kept ready; one mended connection needs 60 KiB of it
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1
LINK_DEAD, ATTR_INDEX = 4, 1
NETLINK_BYTES = 8192
NOT_CONNECTED = (errno.EINVAL, errno.ENODEV, errno.ENOENT)
GONE = 8  # exit code: the kernel has no such connected device any more


class DeviceGoneError(Exception):
    """The kernel takes no socket for this device: it was disconnected."""


class Kernel:
    """Offering sockets to the kernel, and hearing of dead links.

    group: of the family's events.  template: a finished NBD_CMD_RECONFIGURE whose last 4 bytes
    are the socket's number.  careful, swift: those that set the request timeout only, to what it
    is by --timeout, or to 0 ("" where the kernel cannot be swift).
    """

    def __init__(
        self, group: int, index: int, template: bytes, careful: bytes, swift: bytes
    ) -> None:
        self._index, self._template = index, template
        self._careful, self._swift = careful, swift
        self._asker = Asker()
        self.events = netlink()
        self.events.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
        self.events.setblocking(False)

    def offer(self, sock: socket.socket) -> bool:
        """Offer a socket; whether it was taken in place of a dead one.

        Success alone says nothing: a socket that was taken has got the request timeout.
        Raises DeviceGoneError, and OSError for what may be better next time (no memory).
        """
        self._ask(self._template[:-4] + struct.pack("=I", sock.fileno()))
        return any(struct.unpack("@ll", sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)))

    def careful(self) -> None:
        """The request timeout holds from now on.  Raises as `offer` does."""
        self._ask(self._careful)

    def swift(self) -> None:
        """It does not hold any more, and the timer of what comes is 30 s.  Raises as `offer`."""
        self._ask(self._swift)

    def _ask(self, message: bytes) -> None:
        try:
            self._asker.ask(message)
        except OSError as error:
            if error.errno in NOT_CONNECTED:
                raise DeviceGoneError(os.strerror(error.errno)) from None
            raise

    def heard_of_death(self) -> bool:
        """Whether LINK_DEAD of our device has arrived; empties the queue."""
        found = False
        while True:
            try:
                message = self.events.recv(NETLINK_BYTES)
            except BlockingIOError:
                return found
            except OSError:  # the queue ran over: something was lost
                return True
            if len(message) >= 28 and message[16] == LINK_DEAD:
                _, kind, index = struct.unpack_from("=HHI", message, 20)
                found |= kind == ATTR_INDEX and index == self._index


class Mender:
    """The loop.  sock: our copy of the kernel's socket, None for a device that was adopted."""

    def __init__(
        self,
        kernel: Kernel,
        target: Target,
        generations: Generations,
        sock: socket.socket | None,
        page: StatePage,
        size_bytes: int,
        spare: Spare,
        relays: Relays | None = None,
        stall: Stall | None = None,
    ) -> None:
        self._kernel, self._target, self._generations = kernel, target, generations
        self._sock, self._page, self._size_bytes = sock, page, size_bytes
        self._spare, self._relays, self._stall = spare, relays, stall
        self._swift = False  # the kernel may have been asked for timeout 0: only we find a hang

    def run(self) -> None:
        """Until the device is gone: DeviceGoneError."""
        dead = self._sock is None and self.probe()
        self._page.update(state="connected")
        while True:
            if dead:
                self._mend()
                self._await_answer()
            self._make_missing()
            dead = self._is_dead()

    def _make_missing(self) -> None:
        """A spare, relays: what was killed, or has never been.

        Both may wait for memory, which a link that hangs does not give: and who waits here does
        not look.  (What is left: a server that begins to hang just then.)
        """
        if self._spare.line is None and self._may_wait() and self.have_spare():
            return  # the heir: first it has to look whether the link lives
        if self._relays is not None and self._relays.missing and self._may_wait():
            self._have_relays(self._relays)

    def _may_wait(self) -> bool:
        """Whether the link answers, or the kernel itself finds a hang."""
        return self._stall is None or not self._swift or self._stall.is_calm()

    def _await_answer(self) -> None:
        """Without a spare, new requests have a timer of 30 s: so make one at the first answer."""
        if self._stall is None or self._sock is None or self._spare.line is not None:
            return
        watch = select.poll()
        watch.register(self._sock, select.POLLRDHUP)
        end_s = time.monotonic() + self._stall.tick_s
        while not self._may_wait() and time.monotonic() < end_s:
            if watch.poll(ANSWER_EVERY_S * 1000):
                return

    def have_spare(self) -> bool:
        """Make one.  This returns in the spare too, True: when it is the mender."""
        inherited = self._spare.fork()
        if inherited is None:
            self._page.update(spare_pid=self._spare.pid)
            self._be_swift()
            return False
        if self._stall is not None:
            self._swift = True
            self._stall.begin()
        if inherited.sock is not None:
            self._replace(inherited.sock)
        if self._relays is not None and inherited.relays is not None:
            self._relays.take_over(inherited.relays)
        self._generations.last = max(self._generations.last, inherited.generation)
        self._page.take_over(os.getpid(), start_ticks())
        return True

    def _be_swift(self) -> None:
        """If there is a link that we can look after, and a kernel that can.

        Without a spare too: what was begun with a short timer would end the link by its ring.
        """
        if self._stall is None or self._sock is None or self._stall.blind:
            return
        self._spare.be_swift()
        if self._spare.line is None:
            with suppress(OSError, DeviceGoneError):
                self._kernel.swift()
                self._swift = True
        else:
            self._swift = True

    def _be_careful(self, stall: Stall, mended: bool) -> None:
        """The link lives, and from now on the kernel looks after it.

        mended: somebody will mend it if that ends it, because a request with a short timer is
        still unanswered.  Else the kernel is rather left as it is.
        """
        with suppress(OSError, DeviceGoneError):
            self._kernel.swift()
            if stall.settles(SETTLE_S) or mended:
                self._kernel.careful()
                self._swift = False

    def _have_relays(self, relays: Relays) -> None:
        """One was killed, or none was there yet.  This may take its time: the link lives."""
        relays.fill()
        self._page.update(relays=[pid for pid, _ in self._told_relays()])
        if self._sock is not None:
            self._spare.tell(self._sock, self._generations.last, self._told_relays())

    def close(self) -> None:
        """End in good order, and the spare with us; the kernel looks after the link itself."""
        self._spare.dismiss()
        if self._stall is not None and self._swift:
            self._be_careful(self._stall, mended=False)
        if self._relays is not None:
            self._relays.close()
        if self._sock is not None:
            self._sock.close()

    def _is_dead(self) -> bool:
        """Wait for the link's death, or for the next look.

        Our copy of the socket tells the truth at once: the kernel shuts down what it gives up.
        LINK_DEAD, sent by a worker, may come when the next link lives already; only without a
        copy do we have to believe it.
        """
        watch = select.poll()
        if self._spare.line is not None:
            watch.register(self._spare.line, select.POLLIN)
        if self._sock is not None:
            watch.register(self._sock, select.POLLRDHUP)
        else:
            watch.register(self._kernel.events, select.POLLIN)
        for relay in self._relays or ():
            watch.register(relay.line, 0)  # its end is heard of all the same
        missing = self._relays is not None and self._relays.missing
        patient = self._sock is not None and self._spare.line is not None and not missing
        wait_s = None if patient else PROBE_EVERY_S
        if self._stall is not None and self._sock is not None:
            wait_s = self._stall.tick_s
        ready = {fd for fd, _ in watch.poll(None if wait_s is None else wait_s * 1000)}
        if self._spare.line is not None and self._spare.line.fileno() in ready:
            blind = self._spare.hear()
            if blind is not None and self._stall is not None:
                self._stall.blind = blind
        if self._relays is not None:
            self._relays.bury()
        if self._sock is not None:
            return self._sock.fileno() in ready or (not ready and self._ended_stuck(self._sock))
        if self._kernel.events.fileno() in ready:
            # Of a death that is long mended, perhaps; and a dial fences the link that lives.
            return self._kernel.heard_of_death() and self.probe()
        return not ready and self.probe()

    def _ended_stuck(self, sock: socket.socket) -> bool:
        """Whether nothing is answered any more.  Then the kernel hears that the link is dead."""
        if self._stall is None:
            return False
        self._spare.ask()
        if not self._stall.look():
            self._heed_statistics(self._stall)
            return False
        self._page.update(stuck=self._page.values.get("stuck", 0) + 1)
        with suppress(OSError):  # it has died meanwhile
            sock.shutdown(socket.SHUT_RDWR)
        return True

    def _heed_statistics(self, stall: Stall) -> None:
        """Somebody may have switched them off: then the kernel has to look itself; or on again."""
        if stall.blind and self._swift:
            self._be_careful(stall, mended=True)
        elif not self._swift:
            self._be_swift()

    def probe(self) -> bool:
        """Whether the kernel has no living connection.

        It takes our socket pair then, and a request sent there waits for its timeout: so this
        is only for who has no copy of the real one.  The offer carries the request timeout: if
        the link lives, the kernel itself finds a hang from now on, as we could not.
        """
        try:
            ours, offered = socket.socketpair()
            with ours, offered:
                return self._kernel.offer(offered)
        except OSError:  # no memory just now: the next look is in PROBE_EVERY_S
            return False

    def _mend(self) -> None:
        """From a dead link to a living one, however long it takes."""
        began_s = time.monotonic()
        self._page.update(state="dialing")
        if self._stall is not None:
            with suppress(OSError):
                self._kernel.careful()
                self._swift = False
        while not self._try():
            time.sleep(DIAL_EVERY_S)
        self._page.mended(time.monotonic() - began_s, self._generations.last)
        gc.collect()

    def _try(self) -> bool:
        """One connection, dialled and handed over; whether the kernel has one now."""
        try:
            link = dial(self._target, self._generations, self._relays)
        except (AttachError, OSError) as error:
            self._page.update(error=str(explain(error, self._target)))
            return False
        try:
            if link.size_bytes < self._size_bytes:
                raise AttachError("the server's device is smaller now than the one attached here")
            taken = self._offer_until_taken(link.sock)
        except (AttachError, OSError) as error:
            self._page.update(error=str(error))
            link.sock.close()
            return False
        except DeviceGoneError:
            link.sock.close()
            raise
        if taken:
            self._keep(link.sock)
        else:
            link.sock.close()
        # Whoever adopted a device may have been told of a death that was long mended.
        return taken or self._sock is None

    def _offer_until_taken(self, sock: socket.socket) -> bool:
        """Whether the kernel took it before it died itself, or time was up."""
        watch = select.poll()
        watch.register(sock, select.POLLRDHUP)
        end_s = time.monotonic() + OFFER_S
        while not self._kernel.offer(sock):
            if watch.poll(OFFER_EVERY_S * 1000) or time.monotonic() > end_s:
                return False
        return True

    def _keep(self, sock: socket.socket) -> None:
        """This is the living one now."""
        self._replace(sock)
        if self._relays is not None:
            self._relays.keep()
            self._page.update(relays=[pid for pid, _ in self._told_relays()])
        self._spare.tell(sock, self._generations.last, self._told_relays())
        self._be_swift()

    def _told_relays(self) -> list[tuple[int, socket.socket]]:
        return self._relays.told() if self._relays is not None else []

    def _replace(self, sock: socket.socket) -> None:
        if self._stall is not None:
            self._stall.begin()
        if self._sock is not None:
            self._sock.close()
        self._sock = sock


def warm_up(target: Target, page: StatePage, relays: Relays | None) -> None:
    """Do once all that mending does, where it disturbs nobody: through the idle relay."""
    nowhere = Target(unix="/nonexistent/nbd.sock")
    for _ in range(3):
        for goal in (nowhere, target):
            try:
                dial(goal, None, relays).sock.close()
            except (AttachError, OSError) as error:
                page.update(error=str(explain(error, goal)))
    gc.collect()
    page.update(error="")


def main(words: list[str]) -> int:
    """words: see `attach.mender_words`."""
    options = dict(word.split("=", 1) for word in words)
    told_fd = int(options["ready"])
    target = Target(
        options["unix"], options["host"], int(options["port"]), options["device"],
        bool(options["plain"]), options["tls"],
    )  # fmt: skip
    page = StatePage.open(int(options["page"]))
    generations = Generations(int(options["generation"]))
    careful = bytes.fromhex(options["careful"])
    template = bytes.fromhex(options["template"])
    quick = bytes.fromhex(options["swift"])
    kernel = Kernel(int(options["group"]), int(options["index"]), template, careful, quick)
    swift, stall = None, None
    if quick:
        block = f"/sys/block/nbd{options['index']}"
        swift = Swift(f"{block}/queue", Asker(), quick, careful)
        stat = os.open(f"{block}/stat", os.O_RDONLY | os.O_CLOEXEC)
        stall = Stall(stat, int(options["timeout"]))
    sock = socket.socket(fileno=int(options["sock"])) if options["sock"] else None
    relays = found_relays(options["certificates"], options["relays"])
    size_bytes = int(options["size"])
    mender = Mender(
        kernel, target, generations, sock, page, size_bytes, Spare(swift), relays, stall
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    refused = settle(secret=relays is not None)
    if relays is not None:
        relays.fill()
        page.update(relays=[pid for pid, _ in relays.told()])
    if stall is not None:
        stall.look()
    warm_up(target, page, relays)
    page.update(pid=os.getpid(), start_ticks=start_ticks(), refused="; ".join(refused))
    gc.freeze()
    try:
        if sock is not None:
            mender.have_spare()
        tell(told_fd)
        mender.run()
    except DeviceGoneError as error:
        page.update(state="gone", error=str(error))
        return GONE
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mender.close()
    return 0


def found_relays(certificates: str, running: str) -> Relays | None:
    """certificates: a descriptor, "" without TLS.  running: PID:LINE,... of those there are."""
    if not certificates:
        return None
    found = []
    for row in filter(None, running.split(",")):
        pid, _, line = row.partition(":")
        found.append((int(pid), socket.socket(fileno=int(line))))
    return Relays(os.pread(int(certificates), MESSAGE_BYTES_MAX, 0), found)


def tell(fd: int) -> None:
    """Say that we are ready.  (A spare that gets here has nobody left to tell.)"""
    with suppress(BrokenPipeError):
        os.write(fd, b"\n")
    os.close(fd)


def start_ticks() -> int:
    """Our own start time, as in /proc/self/stat: with it our number is unique."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def settle(secret: bool) -> list[str]:
    """Lock everything, keep the heap, be spared.  A sentence for each thing that was refused."""
    refused = process.prepare(on_fault=False, secret=secret)
    process.keep_heap(HEAP_BYTES)
    os.chdir("/")
    return refused


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
