"""The web page in a real browser: a desk, a phone, trouble, and a node that is away."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import addresses
from tests.browser_helpers import PROGRAM, Browser, Page
from tests.lender_helpers import lent
from tests.plugin_helpers import ROOT, Server, swap_like, wait_for
from zcache_core.counters import COUNTERS

PAGE = 4096
PICTURES = os.environ.get("ZCACHE_PICTURES")  # where to put pictures for the documents

pytestmark = [
    pytest.mark.skipif(
        PROGRAM is None,
        reason="no browser: 'apt-get install chromium-headless-shell' (100 MB) puts it there",
    ),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """With a fixed address: a node that is started anew has to be found again."""
    with addresses.listen("metrics", "127.0.0.1:0") as sock:
        where = addresses.bound_address(sock)
    words = ("size=16M", "pool=4M", f"disk={tmp_path / 'disk'}", "disk_size=40M")
    with Server(tmp_path, *words, f"metrics={where}") as running:
        wait_for("the web server", lambda: running.rpc("config")["metrics"])
        yield running, f"http://{where}/"


def fill(handle: Any, first: int, pages: int) -> None:
    for page in range(first, first + pages):
        handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)


def test_what_is_seen_and_that_it_lives(server: tuple[Server, str], browser: Browser) -> None:
    running, url = server
    handle = running.connect()
    fill(handle, 0, 100)
    page = browser.open(url, 1280, 900)
    page.wait_for("100 pages, zbud, lz4")
    text = page.text()
    for words in (f"server {running.pid}", "Disk 0 %", "Device 2 %", "pages in", "reserve ready"):
        assert words in text, words
    assert page.value("document.title").startswith("zcache ")
    fill(handle, 100, 100)
    page.wait_for("200 pages, zbud, lz4")
    line = "document.querySelector('#flow-succ_stores polyline').getAttribute('points')"
    wait_for("a line", lambda: page.value(line))
    page.value("document.querySelector('details').open = true")
    put = page.text("#time-put")
    assert re.fullmatch(r"put\s+[\d.]+ [nu]s\s+[\d.]+ [a-z]s\s+\d+", put), put
    assert page.value("document.getElementById('cluster').hidden")
    rows = page.value("document.querySelectorAll('#counters tr').length")
    assert rows == len(COUNTERS)
    page.value(
        "document.getElementById('filter').value = 'unbuddied';"
        "document.getElementById('filter').dispatchEvent(new Event('input'))"
    )
    assert page.text("#counters").startswith("unbuddied_count")
    assert page.value("document.querySelectorAll('#counters tr').length") == 1
    page.value("document.getElementById('pause').click()")
    assert page.text("#pause") == "go on"
    assert page.complaints() == []
    asked = page.requests()
    assert len(asked) > 5
    assert all(address.startswith((url, "data:")) for address in asked), asked


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 568), (820, 1180)])
def test_on_a_phone(server: tuple[Server, str], browser: Browser, width: int, height: int) -> None:
    """Nothing sticks out to the side, and nothing is too small to read."""
    running, url = server
    fill(running.connect(), 0, 100)
    running.rpc("drain", True)
    page = browser.open(url, width, height)
    page.wait_for("zcache drain --off")
    assert page.value("document.documentElement.scrollWidth") <= width
    smallest = page.value(
        "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    running.rpc("drain", False)


def test_trouble_is_seen_at_once(server: tuple[Server, str], browser: Browser) -> None:
    running, url = server
    page = browser.open(url, 800, 600)
    page.wait_for("server")
    running.rpc("drain", True)
    page.wait_for("The pool is drained")
    assert page.text("#health") == "degraded"
    assert page.value("document.title") == "zcache degraded"
    running.rpc("drain", False)


def test_the_cluster(tmp_path: Path, browser: Browser) -> None:
    """Each peer with its state; the one that is killed is seen."""
    with lent(tmp_path, 2) as lenders:
        addresses = ",".join(lender.address for lender in lenders)
        words = ("size=16M", "pool=2M", f"peers={addresses}", "metrics=127.0.0.1:0")
        with Server(tmp_path, *words) as running:
            where = wait_for("metrics", lambda: running.rpc("config")["metrics"])
            page = browser.open(f"http://{where}/", 390, 844)
            page.wait_for("2 of 2 answer, 2 copies of each page; no copy is missing.")
            fill(running.connect(), 0, 1500)
            wait_for("pages there", lambda: running.rpc("stats")["pers_pages_remoted"])
            page.wait_for("Peers")
            rows = [row.split() for row in page.text("#peers").splitlines()]
            assert len(rows) == 2
            lenders[0].kill()
            page.wait_for("1 of 2 answer")
            page.wait_for("1 of 2 peers answer and 2 are needed")
            bad = "document.querySelectorAll('#peers td.bad').length"
            wait_for("its row to be marked", lambda: page.value(bad) == 1)
            assert page.value("document.documentElement.scrollWidth") <= 390
            assert page.complaints() == []


def test_a_node_that_lends(tmp_path: Path, browser: Browser) -> None:
    """Its own page: how full, whose pages; none of what a swap device has."""
    with lent(tmp_path, 2, "--metrics", "127.0.0.1:0") as lenders:
        where = wait_for("metrics", lambda: lenders[0].rpc("config")["metrics"])
        page = browser.open(f"http://{where}/", 390, 844)
        page.wait_for("lender0, node ")
        page.wait_for("0 pages of 0 owners")
        addresses = ",".join(lender.address for lender in lenders)
        with Server(tmp_path, "size=16M", "pool=2M", f"peers={addresses}") as running:
            fill(running.connect(), 0, 1500)
            wait_for("pages there", lambda: running.rpc("stats")["pers_pages_remoted"])
            page.wait_for("pages of 1 owners in")
            assert "ago" in page.text("#owners")
        text = page.text()
        assert "Lent " in text
        for words in ("Device", "At a glance", "written back", "undefined", "NaN"):
            assert words not in text, words
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.complaints() == []


def test_a_node_that_is_away(server: tuple[Server, str], browser: Browser) -> None:
    running, url = server
    page = browser.open(url, 800, 600)
    page.wait_for("server beside the pool")
    os.kill(running.node_pid, signal.SIGKILL)
    wait_for("the new node", running.ping)
    page.wait_for("server beside the pool")
    wait_for("the warning gone", lambda: page.value("document.getElementById('silent').hidden"))


def test_a_server_that_ended(tmp_path: Path, browser: Browser) -> None:
    with Server(tmp_path, "size=1M", "pool=1M", "metrics=127.0.0.1:0") as running:
        where = wait_for("metrics", lambda: running.rpc("config")["metrics"])
        page = browser.open(f"http://{where}/", 800, 600)
        page.wait_for("server beside the pool")
    page.wait_for("No answer")
    assert "server beside the pool" in page.text()


@pytest.mark.skipif(not PICTURES, reason="ZCACHE_PICTURES=docs/img makes the documents' pictures")
def test_pictures_for_the_documents(server: tuple[Server, str], browser: Browser) -> None:
    running, url = server
    handle = running.connect()
    pages = {name: browser.open(url, *size) for name, size in
             (("page", (1100, 900)), ("page-phone", (390, 844)))}  # fmt: skip
    swap_like(handle, lambda: next_look(pages["page"]))
    for name, page in pages.items():
        page.value("showReasons({status: 'ok', reasons: []})")  # whatever this machine refuses
        page.picture(ROOT / str(PICTURES) / f"{name}.png")


def next_look(page: Page) -> None:
    seen = page.value("looks.length")
    wait_for("the next look", lambda: page.value("looks.length") != seen)
