"""Who mends a device: its state page, the kernel's word on the device (played here), and the lock.

With a real device: t8_updown.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import lifeline
from cluster.lifeline import unmended
from plugin import statepage
from plugin.statepage import StatePage


class Page:
    """Of nbd3, attached as NAME "a.b", with a helper."""

    def __init__(self, folder: Path) -> None:
        self.path, self.device = folder / "a.b.attach", folder / "block/nbd3"
        self.device.mkdir(parents=True)
        (self.device / "pid").write_text("7\n")
        (self.device / "backend").write_text(f"zcache:{folder}/a.b\n")
        self.fd = statepage.lock(self.path)
        StatePage.create(self.fd, {"device": "/dev/nbd3"}).close()

    def helper_ends(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(lifeline, "SYSFS", tmp_path / "block")
    made = Page(tmp_path)
    yield made
    made.helper_ends()


def test_who_holds_the_lock(page: Page) -> None:
    assert unmended(page.path) is None
    words = [sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[page.fd]) as spare:
        page.helper_ends()
        assert unmended(page.path) is None, "the spare has it"
        spare.kill()
    assert unmended(page.path) == "/dev/nbd3"
    os.close(statepage.lock(page.path))  # nothing is in the way of who attaches it now


def test_what_is_not_attached_needs_nobody(page: Page) -> None:
    page.helper_ends()
    assert unmended(page.path) == "/dev/nbd3"
    (page.device / "backend").write_text("zcache:/run/zcache/other\n")
    assert unmended(page.path) is None
    (page.device / "backend").write_text(f"zcache:{page.path.with_suffix('')}\n")
    assert unmended(page.path) == "/dev/nbd3"
    for text in (b"", b"{", b"[]", b"{}", b"\0" * 4096, b'{"device": 5}', b'{"device": ""}'):
        page.path.write_bytes(text)
        assert unmended(page.path) is None
    page.path.write_bytes(b'{"device": "/dev/nbd3"}')
    assert unmended(page.path) == "/dev/nbd3"
    (page.device / "pid").unlink()
    assert unmended(page.path) is None
    page.path.unlink()
    assert unmended(page.path) is None
