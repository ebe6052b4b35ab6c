"""Who mends a device: its state page, the kernel's word on it (played here), and processes.

With a real device: t8_updown.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import lifeline
from cluster.lifeline import unmended
from cluster.node import Node
from plugin import statepage
from plugin.statepage import StatePage
from zcache_core.memfile import MemoryFile
from zcache_core.owner import start_ticks


class Page:
    """Of nbd3, attached as NAME "a.b"; its helper and spare are two processes that wait."""

    def __init__(self, folder: Path) -> None:
        self.path, self.device = folder / "a.b.attach", folder / "block/nbd3"
        self.device.mkdir(parents=True)
        (self.device / "pid").write_text("7\n")
        (self.device / "backend").write_text(f"zcache:{folder}/a.b\n")
        words = [sys.executable, "-c", "input()"]
        self.helper, self.spare = (subprocess.Popen(words, stdin=subprocess.PIPE) for _ in range(2))
        pid = self.helper.pid
        self.says = {"pid": pid, "start_ticks": start_ticks(pid), "spare_pid": self.spare.pid}
        self.write({"device": "/dev/nbd3", **self.says})

    def write(self, values: dict[str, Any]) -> None:
        fd = statepage.lock(self.path)
        StatePage.create(fd, values).close()
        os.close(fd)

    def end(self) -> None:
        for one in (self.helper, self.spare):
            with one:
                one.kill()


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(lifeline, "SYSFS", tmp_path / "block")
    made = Page(tmp_path)
    yield made
    made.end()


def test_helper_or_spare(page: Page) -> None:
    assert unmended(page.path) is None
    page.helper.kill()
    page.helper.wait()
    assert unmended(page.path) is None, "the spare goes on"
    page.spare.kill()
    page.spare.wait()
    assert unmended(page.path) == "/dev/nbd3"
    page.write({"device": "/dev/nbd3", "pid": os.getpid(), "start_ticks": start_ticks(os.getpid())})
    assert unmended(page.path) is None
    page.write({"device": "/dev/nbd3", "pid": os.getpid(), "start_ticks": 1})
    assert unmended(page.path) == "/dev/nbd3", "another process has its number now"


def test_what_is_not_attached_needs_nobody(page: Page) -> None:
    page.end()
    assert unmended(page.path) == "/dev/nbd3"
    (page.device / "backend").write_text("zcache:/run/zcache/other\n")
    assert unmended(page.path) is None
    (page.device / "backend").write_text(f"zcache:{page.path.with_suffix('')}\n")
    assert unmended(page.path) == "/dev/nbd3"
    for text in (b"", b"{", b"[]", b"{}", b"\0" * 4096, b'{"device": 5}', b'{"device": ""}'):
        page.path.write_bytes(text)
        assert unmended(page.path) is None
    page.write({"device": "/dev/nbd3"})
    assert unmended(page.path) == "/dev/nbd3"
    (page.device / "pid").unlink()
    assert unmended(page.path) is None
    page.path.unlink()
    assert unmended(page.path) is None


@pytest.mark.parametrize("peers", [False, True])
def test_health_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peers: bool) -> None:
    asked: list[Path] = []

    def found_dead(path: Path) -> str:
        asked.append(path)
        return "/dev/nbd3"

    monkeypatch.setattr(lifeline, "unmended", found_dead)
    memory = MemoryFile.create(None, 16 << 20, 4 << 20)
    try:
        node = Node(memory, {"control": str(tmp_path / "a.b.ctl")}, os.getpid())
        if peers:
            node.peer_side = SimpleNamespace(twins=list, etcd_silent_s=0)
        found = asyncio.run(node.health())
    finally:
        memory.close()
    assert asked == [tmp_path / "a.b.attach"]
    assert any("/dev/nbd3" in reason["what"] for reason in found["reasons"])
