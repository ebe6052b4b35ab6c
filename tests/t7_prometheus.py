"""Alerts and dashboard against a real Prometheus, which scrapes a real server.

Debian's package, unpacked into build/ by deploy/unpack.sh (installed, it would start a
service of its own).
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import metrics
from tests.lender_helpers import lent
from tests.plugin_helpers import ROOT, Server, wait_for
from zcache_core.counters import COUNTERS, HISTOGRAMS

PAGE = 4096
BIN = ROOT / "build/unpacked/usr/bin"
RULES = ROOT / "deploy/prometheus/zcache.rules.yml"
DASHBOARD = json.loads((ROOT / "deploy/grafana/zcache.json").read_text())
OWN = {
    "zcache_health_status", "zcache_health_reasons", "zcache_info",
    "zcache_server_start_time_seconds", "zcache_node_start_time_seconds",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _there() -> None:
    if not (BIN / "promtool").exists():
        pytest.skip("no Prometheus in build/unpacked: 'deploy/unpack.sh prometheus' puts it there")


def promtool(*words: str, given: bytes = b"", folder: Path = ROOT) -> tuple[int, str]:
    done = subprocess.run(
        [BIN / "promtool", *words], cwd=folder, input=given, capture_output=True, timeout=60
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"zcache_\w+", expression))


def queries() -> list[str]:
    """Every query of the dashboard, its variables put in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [q.replace("$instance", ".+").replace("$__rate_interval", "4s") for q in found]


def test_rules_are_right_and_each_alert_fires() -> None:
    code, said = promtool("check", "rules", str(RULES))
    assert code == 0, said
    code, said = promtool("test", "rules", "zcache.test.yml", folder=RULES.parent)
    assert code == 0, said
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    tested = re.findall(r"- name: (\w+)", (RULES.parent / "zcache.test.yml").read_text())
    assert alerts == tested


def test_a_rule_test_can_fail(tmp_path: Path) -> None:
    (tmp_path / RULES.name).write_text(RULES.read_text().replace("zcache_lost_pages > 0", "1 > 2"))
    text = (RULES.parent / "zcache.test.yml").read_text()
    (tmp_path / "zcache.test.yml").write_text(text)
    assert promtool("test", "rules", "zcache.test.yml", folder=tmp_path)[0] != 0


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    there = {metrics.sample(counter) for counter in COUNTERS} | OWN
    there |= {f"{metrics.spread(histogram.name)}_bucket" for histogram in HISTOGRAMS}
    there |= {"zcache_peer_up", *(f"zcache_peer_{name}" for _, name, _, _ in metrics.PEERS)}
    expressions = re.findall(r"expr: (.*)", RULES.read_text()) + queries()
    assert len(expressions) > 30
    assert set().union(*map(names_in, expressions)) <= there


class Prometheus:
    """Scrapes `target` every second until the end of the block."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        config = folder / "prometheus.yml"
        config.write_text(
            f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{RULES}]\n"
            f"scrape_configs:\n  - job_name: zcache\n"
            f"    static_configs: [{{targets: ['{target}']}}]\n"
        )
        self._log = open(folder / "prometheus.log", "wb")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                BIN / "prometheus", f"--config.file={config}",
                f"--web.listen-address={self.address}",
                f"--storage.tsdb.path={folder / 'tsdb'}", "--storage.tsdb.retention.time=1h",
            ],
            stdout=self._log, stderr=self._log, cwd=folder,
        )  # fmt: skip

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def ask(self, path: str, **words: str) -> Any:
        """Data of an API answer; None while nobody answers."""
        assert self._process.poll() is None, Path(self._log.name).read_text()
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def value(self, query: str) -> float | None:
        """Of the first series that a query finds."""
        found = self.ask("query", query=query)
        return float(found["result"][0]["value"][1]) if found and found["result"] else None


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    folder = tmp_path_factory.mktemp("scraped")
    with lent(folder, 1) as (lender,), Server(
        folder, "size=16M", "pool=4M", f"disk={folder / 'disk'}", "disk_size=40M",
        f"peers={lender.address}", "metrics=127.0.0.1:0",
    ) as server:  # fmt: skip
        where = wait_for("the web server", lambda: server.rpc("config")["metrics"])
        yield server, where


def test_promtool_finds_nothing_to_say(scraped: tuple[Server, str]) -> None:
    with urllib.request.urlopen(f"http://{scraped[1]}/metrics", timeout=20) as answer:
        code, said = promtool("check", "metrics", given=answer.read())
    assert (code, said) == (0, "")


def test_every_query_of_the_dashboard_answers(scraped: tuple[Server, str], tmp_path: Path) -> None:
    server, where = scraped
    handle = server.connect()

    def write(first: int) -> None:
        for page in range(first, first + 20):
            handle.pwrite((b"page %4d " % page * 410)[:PAGE], page % 4096 * PAGE)
            handle.pread(PAGE, page % 4096 * PAGE)

    with Prometheus(tmp_path, where) as prometheus:
        pages = iter(range(0, 10**9, 20))

        def rates() -> bool:
            write(next(pages))
            return bool(prometheus.value("rate(zcache_succ_stores_total[4s])"))

        wait_for("two scrapes", rates)
        silent = queries()

        def all_answer() -> bool:
            write(next(pages))
            silent[:] = [query for query in silent if prometheus.value(query) is None]
            return not silent

        try:
            wait_for("an answer to every query", all_answer)
        except AssertionError as error:
            raise AssertionError(f"{error}: {silent}") from None
        stored = prometheus.value("zcache_logical_bytes")
        assert stored is not None
        assert 0 < stored <= server.rpc("stats")["logical_bytes"]
        groups = prometheus.ask("rules")["groups"]
        assert all(rule["health"] in ("ok", "unknown") for g in groups for rule in g["rules"])
        (target,) = prometheus.ask("targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
