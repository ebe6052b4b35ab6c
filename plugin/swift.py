"""Swift: a request that was on its way when the link died is sent again after half a second.

The kernel has one number for two things: after NBD_ATTR_TIMEOUT, in whole seconds and up to 1.3
more, it sends again what a dead link has left, and it gives up a link that has not answered one
request.  Small enough for the first, it would cut off every server that is slow for a moment.
With 0 it gives no link up; its timer (queue/io_timeout, in ms) only looks whether the link is
another one by now, and if so sends the request again.  So the two are parted:

    the link lives     timeout 0, timer TIMER_MS; the helper looks for a hang (`Stall`) and ends
                       such a link itself, by a shutdown of its copy of the socket
    the link is dead   timeout as asked for (--timeout): the kernel takes back what was on its way
                       as soon as a timer rings, and sends it when there is a link
    nobody looks       timeout as asked for: no helper yet, none any more, queue/iostats switched
                       off (nothing is counted then), or an adopted device, of whose socket there
                       is no copy

A request keeps its first timer for life.  With a timeout, the ring of a short one ends the link
that it is on, however long the timeout is.  So a link that lives is "careful" only when what was
begun with a short timer is answered (`Stall.settles`), and is made swift at once, also without a
spare: by the message alone.

Setting the timeout to 0 makes the timer 30 s, so the timer is set right after it.  That is a file
below queue/, and whoever changes the device's scheduler holds these files' lock until every
request has been answered.  If the helper wrote there it could wait for what only it can mend; so
its spare does.  Without one the timer is 30 s until there is.  Should the helper die while the
link is "swift" the spare goes on; should both, a link that dies waits for the next helper (as
ever), and a hang is not noticed until then.

Bound: a hang is seen after --timeout and at most TICK_S_MAX more, as the kernel would see it.
While the link is swift the kernel logs every ring of a request that waits ("Possible stuck
request"): of a server that hangs, up to a line a second for each, until --timeout has passed.
What it is not: for kernels before 5.8, where a timeout of 0 never sends anything again, or those
that fail a half-sent request when its timer rings (6.13 on); see `nbdnetlink.can_be_swift`.

Part of the attach helper: two files opened beforehand, no import that is not needed.
Linux: drivers/block/nbd.c (nbd_xmit_timeout), block/blk-timeout.c, Documentation/block/stat.rst.
"""

from __future__ import annotations

import os
import socket
import struct
import time

TIMER_MS = b"500"  # smaller gains nothing (the kernel adds up to 1.3 s), and logs slow requests
TICK_S_MAX = 0.75
TICKS_MIN = 4  # whoever sleeps through ten seconds has seen one tick
RESEND_S = 1.5  # what the last link left is sent again on a new one within this
SETTLE_EVERY_S = 0.02
STAT_BYTES = 512
IN_FLIGHT, DONE = 8, (0, 4, 11, 15)  # reads, writes, discards, flushes that have ended

NETLINK_GENERIC, NETLINK_BYTES, NLMSG_ERROR = 16, 8192, 2


class Asker:
    """Finished messages to the kernel, one at a time, and its answers."""

    def __init__(self) -> None:
        self._sequence = 0
        self._sock = netlink()

    def ask(self, message: bytes) -> None:
        """Send one that wants an answer.  Raises OSError: what the kernel says, or no memory."""
        self._sequence += 1
        # The socket may be inherited, with an answer that its last owner was killed before.
        asked = (os.getpid() << 12 ^ self._sequence) & 0xFFFFFFFF
        self._sock.send(message[:8] + struct.pack("=I", asked) + message[12:])
        while True:
            answer = self._sock.recv(NETLINK_BYTES)
            _, kind, _, sequence = struct.unpack_from("=IHHI", answer)
            if kind == NLMSG_ERROR and sequence == asked:
                break
        (error,) = struct.unpack_from("=i", answer, 16)
        if error:
            raise OSError(-error, os.strerror(-error))


def netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
    sock.bind((0, 0))
    return sock


class Swift:
    """The spare's part: swift, careful: finished NBD_CMD_RECONFIGURE with timeout 0, and as ever.

    queue: /sys/block/nbdN/queue.  kernel: nobody else asks through it.  Raises OSError.
    """

    def __init__(self, queue: str, kernel: Asker, swift: bytes, careful: bytes) -> None:
        self._kernel, self._swift, self._careful = kernel, swift, careful
        self._timer = os.open(f"{queue}/io_timeout", os.O_RDWR | os.O_CLOEXEC)
        self._counting = os.open(f"{queue}/iostats", os.O_RDONLY | os.O_CLOEXEC)

    def is_counting(self) -> bool:
        return os.pread(self._counting, 8, 0).strip() != b"0"

    def begin(self) -> None:
        """From now on a dead link's requests are sent again soon.  If not, all is as it was."""
        try:
            if not self.is_counting():
                return  # nobody could see a hang
            self._kernel.ask(self._swift)
        except OSError:
            return
        try:
            os.pwrite(self._timer, TIMER_MS, 0)
        except OSError:
            self.end()  # failing too, it ends the spare: the next one tries

    def end(self) -> None:
        """The timeout holds from now on."""
        self._kernel.ask(self._careful)


class Stall:
    """The helper's part: whether requests wait and none is answered.

    stat: a descriptor of /sys/block/nbdN/stat.  limit_s: for how long that is bearable.
    blind: whether the kernel does not count, as the spare said last: every link seems to hang
    then, or none.  (To read queue/iostats takes the lock, too.)
    """

    def __init__(self, stat: int, limit_s: float) -> None:
        self.tick_s = min(TICK_S_MAX, limit_s / TICKS_MIN)
        self._stat, self._done, self.blind = stat, 0, False
        self._limit_ticks = -(-limit_s // self.tick_s)
        self._resend_ticks = -(-RESEND_S // self.tick_s)
        self.begin()

    def begin(self) -> None:
        """A new link: first the kernel has to send what the last one has left."""
        self._done, self._ticks = self._read()[0], -self._resend_ticks
        self._answered = False

    def look(self) -> bool:
        """To be asked once in `tick_s`: whether the link has to be ended."""
        if self.blind:
            self.begin()
            return False
        done, waiting = self._read()
        answered, self._done = done != self._done, done
        self._answered = answered or not waiting
        if answered:
            self._ticks = 0
        elif not waiting:
            self._ticks = min(self._ticks, 0)
        else:
            self._ticks += 1
        return self._ticks > self._limit_ticks  # the first one may be of a request just sent

    def is_calm(self) -> bool:
        """Whether the link answers: something has ended between the last looks, or since, or
        nothing waits."""
        done, waiting = self._read()
        return self._answered or done != self._done or not waiting

    def settles(self, within_s: float) -> bool:
        """Whether all that waits now is answered; at the end of the time, as far as can be told."""
        before, old = self._read()
        end_s = time.monotonic() + within_s
        while True:
            done, waiting = self._read()
            if not waiting:
                return True
            if time.monotonic() > end_s:
                return done - before >= old
            time.sleep(SETTLE_EVERY_S)

    def _read(self) -> tuple[int, int]:
        """How many requests have ended; how many wait."""
        try:
            words = os.pread(self._stat, STAT_BYTES, 0).split()
        except OSError:  # the device goes
            return self._done, 0
        return sum(int(words[at]) for at in DONE if at < len(words)), int(words[IN_FLIGHT])
