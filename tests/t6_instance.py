"""Names of instances and exports: what is taken, what is refused, where the files are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.instance import DEVICE_PATTERN, GENERATION_MAX, Export, Instance, parse_export
from zcache_core.errors import ConfigError


def test_files_of_an_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    instance = Instance()
    assert instance.socket == tmp_path / "zcache.sock"
    assert instance.control == tmp_path / "zcache.ctl"
    assert instance.memory_lock == tmp_path / "zcache.mem"
    assert instance.serve == tmp_path / "zcache.serve"
    assert instance.attach == tmp_path / "zcache.attach"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a b", "ü", "a" * 41, "a\n"])
def test_names_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="is no name of a server; write up to 40"):
        Instance(name)


def test_a_folder_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path / ("d" * 100)))
    with pytest.raises(ConfigError, match="longer than 107 bytes; write a shorter --name"):
        Instance()


@given(
    st.one_of(st.just(""), st.from_regex(DEVICE_PATTERN, fullmatch=True)),
    st.one_of(st.none(), st.integers(1, GENERATION_MAX)),
)
def test_exports_there_and_back(device: str, generation: int | None) -> None:
    export = Export(device, generation)
    assert parse_export(str(export)) == export


@pytest.mark.parametrize(
    "name", ["a@", "@", "@-1", "@x", "a@1@2", "a b", "a@1 ", "@" + "9" * 21, "a\n", "@\u0661"]
)
def test_exports_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no export"):
        parse_export(name)


@pytest.mark.parametrize("name", ["@0", "a@0", f"@{GENERATION_MAX + 1}"])
def test_generations_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="is no generation"):
        parse_export(name)
