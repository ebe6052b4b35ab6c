"""The test run's own promises: a repeatable seed, unexpected warnings that fail, limits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, body: str, *options: str, **env: str) -> str:
    """Output of a pytest run of its own, under the project's settings and conftest."""
    shutil.copy(ROOT / "tests/conftest.py", folder / "conftest.py")
    (folder / "t1_sample.py").write_text(
        "import logging, time\nimport pytest\nfrom hypothesis import given, strategies as st\n"
        + body
    )
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *settings,
            *options,
            str(folder),
        ],
        cwd=folder,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    return done.stdout


DRAWS = """
def test_draws(rng, seed):
    print("drawn", seed, rng.random())
    assert False

@given(st.integers())
def test_hypothesis_draws(number):
    with open("numbers", "a") as file:
        print(number, file=file)
"""


def test_a_seed_repeats_the_run(tmp_path: Path) -> None:
    def draws(**env: str) -> tuple[str, str, str]:
        (tmp_path / "numbers").unlink(missing_ok=True)
        output = run(tmp_path, DRAWS, **env)
        seed = re.search(r"^zcache: seed (\d+) ", output, re.MULTILINE)
        drawn = re.search(r"^drawn .*", output, re.MULTILINE)
        assert seed, output
        assert drawn, output
        assert f"ZCACHE_SEED={seed[1]}" in output.partition("FAILURES")[2]
        return seed[1], drawn[0], (tmp_path / "numbers").read_text()

    first = draws(ZCACHE_SEED="")
    assert draws(ZCACHE_SEED=first[0]) == first
    assert draws(ZCACHE_SEED=str(int(first[0]) + 1)) != first


def test_an_unexpected_warning_fails_a_test(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
def test_info():
    logging.getLogger("zcache").info("all is well")

def test_warning():
    logging.getLogger("zcache").warning("pool is %s", "full")

@pytest.fixture
def noisy():
    yield
    logging.getLogger("zcache").error("late trouble")

def test_at_teardown(noisy):
    pass

@pytest.mark.expect_log("pool is f..l")
def test_expected():
    logging.getLogger("zcache").warning("pool is %s", "full")

@pytest.mark.expect_log("never said")
def test_silent():
    pass
""",
        "-v",
    )
    assert re.search(r"ERROR .*test_warning - Failed: warnings in the log", output), output
    assert "WARNING zcache: pool is full" in output
    assert re.search(r"ERROR .*test_at_teardown", output), output
    assert re.search(r"ERROR .*test_silent - Failed: expected in the log", output), output
    assert "5 passed, 3 errors" in output, output  # the errors come at teardown


def test_a_hanging_test_ends(tmp_path: Path) -> None:
    body = "@pytest.mark.timeout(1)\ndef test_hangs():\n    time.sleep(60)\n"
    assert "1 failed" in run(tmp_path, body)


def test_long_tests_run_only_when_asked_for(tmp_path: Path) -> None:
    body = "@pytest.mark.soak\ndef test_long():\n    pass\n\ndef test_short():\n    pass\n"
    assert "1 passed, 1 deselected" in run(tmp_path, body)
    assert "1 passed, 1 deselected" in run(tmp_path, body, "-m", "soak")
    assert "2 passed" in run(tmp_path, body, "-m", "soak or not soak")


def test_an_unknown_mark_is_refused(tmp_path: Path) -> None:
    assert "'saok' not found" in run(tmp_path, "@pytest.mark.saok\ndef test_it():\n    pass\n")
