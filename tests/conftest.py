"""What every test gets: a seed that is printed, quiet logs, and a limit in time.

**Seed.**  One number a run, from ZCACHE_SEED or fresh, in the header and beside every
failure.  Hypothesis follows it, and so does whoever takes the fixture `seed` (or `rng`,
a `random.Random` of its own for each test), so `ZCACHE_SEED=N make test` is the same
run again.

**Logs.**  A warning or an error in the log that no test announced is a failure, also
from another thread or while fixtures are taken down.  Who expects one says so,

    @pytest.mark.expect_log("pool is smaller")

(a regular expression, searched in "LEVEL logger: message"), and then it has to come.

**Time.**  pytest-timeout bounds each test (pyproject.toml has the default, a mark
`timeout(seconds)` sets another); no test asserts on a duration.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import re
import sys
from collections.abc import Generator, Iterator

import hypothesis
import pytest

SEED = pytest.StashKey[int]()
DEBIAN_PACKAGES = "/usr/lib/python3/dist-packages"


def pytest_configure(config: pytest.Config) -> None:
    """Fixes the seed and Hypothesis' profile; makes Debian's libnbd importable."""
    seed = int(os.environ.get("ZCACHE_SEED") or random.SystemRandom().getrandbits(32))
    config.stash[SEED] = seed
    hypothesis.settings.register_profile("zcache", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("zcache")
    if config.getoption("hypothesis_seed") is None:
        config.option.hypothesis_seed = str(seed)
    # libnbd's binding is a Debian package only.  At the end of the path, so that
    # everything else still comes from the lock file.
    if importlib.util.find_spec("nbd") is None:
        sys.path.append(DEBIAN_PACKAGES)


def pytest_report_header(config: pytest.Config) -> str:
    """The line that lets a run be repeated."""
    return f"zcache: seed {config.stash[SEED]} (repeat with ZCACHE_SEED={config.stash[SEED]})"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Puts the seed beside every failure."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"ZCACHE_SEED={item.config.stash[SEED]}"))
    return report


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The run's seed, 32 bits unless ZCACHE_SEED says otherwise."""
    return pytestconfig.stash[SEED]


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of the test's own: the same for the same seed, whatever else runs."""
    return random.Random(f"{seed} {request.node.nodeid}")


class _Warnings(logging.Handler):
    """Collects what is logged from WARNING up, one line a record."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _quiet_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up first and taken down last, so that it hears the other fixtures too."""
    expected = [mark.args[0] for mark in request.node.iter_markers("expect_log")]
    heard = _Warnings()
    logging.getLogger().addHandler(heard)
    yield
    logging.getLogger().removeHandler(heard)
    for pattern in expected:
        if not any(re.search(pattern, line) for line in heard.lines):
            pytest.fail(f"expected in the log, but it did not come: {pattern}")
    surprises = [ln for ln in heard.lines if not any(re.search(p, ln) for p in expected)]
    if surprises:
        pytest.fail("warnings in the log that nobody expected:\n" + "\n".join(surprises))
