"""User Mode Linux's management console: one question, one answer, over a Unix datagram socket.

The lab asks it for SysRq dumps (`sysrq w`: blocked tasks, `sysrq m`: memory) when PID 1 no longer
answers; they appear on the guest's console.  No process of the guest takes part, only a worker of
its kernel.

Format (arch/um/drivers/mconsole_user.c): request = magic, version 2, length as u32, then 512 bytes;
reply = error, more, length as u32, then 512 bytes.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile

MAGIC = 0xCAFEBABE
VERSION = 2
TEXT_BYTES = 512


def ask(path: str, question: str, limit_s: float = 3) -> str:
    """The answer's text.  Raises OSError if the guest does not answer in time or refuses."""
    text = question.encode()
    assert len(text) < TEXT_BYTES
    with (
        tempfile.TemporaryDirectory(prefix="swaplab-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line,
    ):
        line.bind(os.path.join(folder, "mconsole"))
        line.settimeout(limit_s)
        line.sendto(struct.pack(f"<III{TEXT_BYTES}s", MAGIC, VERSION, len(text), text), path)
        answer = b""
        more = 1
        while more:
            reply = line.recv(12 + TEXT_BYTES)
            error, more, length = struct.unpack_from("<III", reply)
            answer += reply[12 : 12 + length].rstrip(b"\0")
    if error:
        raise OSError(answer.decode(errors="replace"))
    return answer.decode(errors="replace")
