"""Configuration: every sentence a user can meet, and sizes that survive a round trip."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.amounts import PAGE_BYTES, human, total_ram_bytes
from plugin.config import DEVICE_BYTES_MAX, KEYS, Config, parse
from plugin.lower import guaranteed_bytes, needed_disk, refusal_warning
from plugin.places import Listening, control_path, listening
from plugin.wiring import wants_realtime
from zcache_core.diskfile import promised_bytes
from zcache_core.errors import ConfigError

RAM = 16 << 30
K, M, G, T = (1 << shift for shift in (10, 20, 30, 40))


def config_of(words: str, ram_bytes: int = RAM) -> Config:
    pairs = (word.partition("=") for word in words.split())
    return parse([(key, value) for key, _, value in pairs], ram_bytes)


def test_defaults() -> None:
    config = config_of("size=8G")
    assert config == Config(size_bytes=8 * G, pool_bytes=RAM // 5 // PAGE_BYTES * PAGE_BYTES)
    assert (config.commit, config.allocator, config.codec) == ("ahead", "zbud", "lz4")
    assert (config.control, config.memory, config.realtime) == (None, None, "auto")
    assert (config.disk, config.disk_size_bytes, config.disk_force) == (None, None, None)
    assert (config.high_percent, config.low_percent) == (90, 80)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size_bytes = 1  # type: ignore[misc]


GOOD = [
    ("devices=a:4G,b-2:2M", "devices", (("a", 4 * G), ("b-2", 2 * M))),
    ("devices=a:4G,b-2:2M", "size_bytes", 4 * G + 2 * M),
    ("size=4096", "size_bytes", 4096),
    ("size=4K", "size_bytes", 4 * K),
    ("size=512m", "size_bytes", 512 * M),
    ("size=1.5G", "size_bytes", 3 * G // 2),
    ("size=1GiB", "size_bytes", G),
    ("size=8gb", "size_bytes", 8 * G),
    ("size=16T", "size_bytes", DEVICE_BYTES_MAX),
    ("size=1G pool=25%", "pool_bytes", 4 * G),
    ("size=1G pool=12.5%", "pool_bytes", 2 * G),
    ("size=1G pool=2G", "pool_bytes", 2 * G),
    ("size=1G pool=1M", "pool_bytes", M),
    ("size=1G commit=all", "commit", "all"),
    ("size=1G allocator=zbud", "allocator", "zbud"),
    ("size=1G allocator=z3fold", "allocator", "z3fold"),
    ("size=1G allocator=zsmalloc", "allocator", "zsmalloc"),
    ("size=1G codec=zstd", "codec", "zstd"),
    ("size=1G codec=zstd:1", "codec", "zstd:1"),
    ("size=1G codec=zstd:019", "codec", "zstd:19"),
    ("size=1G codec=none", "codec", "none"),
    ("size=1G recompress=zstd", "recompress", "zstd:15"),
    ("size=1G recompress=zstd:3", "recompress", "zstd:3"),
    ("size=1G recompress=none", "recompress", "none"),
    ("size=1G recompress_age=90", "recompress_age_s", 90),
    ("size=1G recompress_age=5m", "recompress_age_s", 300),
    ("size=1G recompress_age=2h", "recompress_age_s", 7200),
    ("size=1G control=/run/a.ctl", "control", "/run/a.ctl"),
    ("size=1G control=a.ctl", "control", f"{os.getcwd()}/a.ctl"),
    ("size=1G memory=swap0", "memory", "swap0"),
    ("size=1G realtime=no", "realtime", "no"),
    ("size=1G realtime=yes", "realtime", "yes"),
    ("size=1G realtime=auto", "realtime", "auto"),
    ("size=1G disk=/var/d", "disk", "/var/d"),
    ("size=1G disk=d", "disk", f"{os.getcwd()}/d"),
    ("size=1G disk=/d disk_size=2G", "disk_size_bytes", 2 * G),
    ("size=1G disk=/d disk_size=16M", "disk_size_bytes", 16 * M),
    ("size=1G disk=/d disk_force=/d", "disk_force", "/d"),
    ("size=1G disk=/d encrypt=yes", "encrypt", "yes"),
    ("size=1G disk=/d writeback_limit=20G", "writeback_limit_bytes", 20 << 30),
    ("size=1G disk=/d writeback_limit=none", "writeback_limit_bytes", None),
    ("size=1G disk=/d high=70", "high_percent", 70),
    ("size=1G disk=/d high=70%", "high_percent", 70),
    ("size=1G disk=/d high=70", "low_percent", 60),
    ("size=1G disk=/d high=5", "low_percent", 1),
    ("size=1G disk=/d low=90", "low_percent", 90),
    ("size=1G disk=/d high=100 low=1", "low_percent", 1),
]


@pytest.mark.parametrize(("words", "field", "value"), GOOD)
def test_good_values(words: str, field: str, value: object) -> None:
    assert getattr(config_of(words), field) == value


# What is wrong, and what the sentence tells the user to write instead.
BAD = [
    ("devices=a:1G size=1G", "leave one of them out"),
    ("devices=a", "like devices=a:4G,b:2G"),
    ("devices=", "like devices=a:4G,b:2G"),
    ("devices=a b:1G", "like devices=a:4G,b:2G"),
    ("devices=a:1G,a:2G", "two devices a; give each its own name"),
    ("devices=a:1G,b:1000", "is no multiple of 4096"),
    ("devices=a:16T,b:4K", "at most 16T in all"),
    ("devices=" + ",".join(f"d{n}:1G" for n in range(9)), "takes at most 8 devices"),
    ("", "write size=8G"),
    ("pool=1G", "write size=8G"),
    ("size=", "write a number and K, M, G or T: size=8G"),
    ("size=eight", "write a number and K, M, G or T: size=8G"),
    ("size=8X", "write a number and K, M, G or T: size=8G"),
    ("size=-1G", "write a number and K, M, G or T: size=8G"),
    ("size=1e9", "write a number and K, M, G or T: size=8G"),
    ("size=25%", "only pool= takes a percentage"),
    ("size=0", "write size=8G"),
    ("size=1", "write size=4K"),
    ("size=5000", "write size=4K"),
    ("size=1000000", "write size=976K"),
    ("size=1048577", "write size=1M"),
    ("size=0.3333G", "write size="),
    ("size=17T", "write at most size=16T"),
    ("size=1G size=2G", "size is given twice; write size= once"),
    ("size=1G pool=0", "write at least pool=1M"),
    ("size=1G pool=64K", "write at least pool=1M"),
    ("size=1G pool=2000001", "write pool=1952K"),
    ("size=1G pool=20G", "write pool=20% or at most pool=14745M"),
    ("size=1G pool=0%", "write 1% to 90%"),
    ("size=1G pool=100%", "write 1% to 90%"),
    ("size=1G pool=x%", "write it like pool=20%"),
    ("size=1G commit=later", "write commit=ahead or commit=all"),
    ("size=1G allocator=slab", "there is no allocator slab; write allocator=zbud"),
    ("size=1G recompress=lz4", "write recompress=zstd"),
    ("size=1G recompress=zstd:20", "level from 1 to 19"),
    ("size=1G recompress_age=0", "like recompress_age=300"),
    ("size=1G recompress_age=1d", "like recompress_age=300"),
    ("size=1G recompress_age=169h", "like recompress_age=300"),
    ("size=1G codec=gzip", "write codec=lz4, codec=zstd"),
    ("size=1G codec=zstd:0", "level from 1 to 19"),
    ("size=1G codec=zstd:20", "level from 1 to 19"),
    ("size=1G codec=zstd:", "level from 1 to 19"),
    ("size=1G codec=lz4:3", "has no levels; write codec=lz4"),
    ("size=1G control=", "write control=/run/zcache.ctl"),
    ("size=1G memory=a/b", "write up to 60 letters"),
    ("size=1G memory=", "write up to 60 letters"),
    ("size=1G pressure=yes", "write pressure=psi or pressure=none, or the path"),
    ("size=1G pressure=/nowhere/memory.pressure", "write pressure=psi for that of the whole"),
    ("size=1G pressure=psi commit=all", "leave one of them out"),
    ("size=1G realtime=maybe", "write realtime=auto or realtime=yes or realtime=no"),
    ("size=1G disk=", "disk= is no path; write disk=/var/lib/zcache/disk"),
    ("size=1G disk=/d disk_size=1M", "write at least disk_size=16M"),
    ("size=1G disk=/d disk_size=big", "write a number and K, M, G or T: disk_size=16G"),
    ("size=1G disk_size=1G", "disk_size= means something only with disk=PATH"),
    ("size=1G encrypt=yes", "encrypt= means something only with disk=PATH"),
    ("size=1G disk=/d encrypt=1", "write encrypt=yes or encrypt=no"),
    ("size=1G writeback_limit=9G", "writeback_limit= means something only with disk=PATH"),
    ("size=1G disk=/d writeback_limit=0", "write at least writeback_limit=1M"),
    ("size=1G disk=/d writeback_limit=much", "write a number and K, M, G or T"),
    ("size=1G high=50", "high= means something only with disk=PATH"),
    ("size=1G disk=/d high=0", "write 1 to 100, like high=90"),
    ("size=1G disk=/d high=101", "write 1 to 100, like high=90"),
    ("size=1G disk=/d low=-1", "write 1 to 100, like low=80"),
    ("size=1G disk=/d low=95", "low=95 is above high=90; write low=90 or less"),
    ("size=1G disk=/d disk_force=yes", "is another path than disk=/d; repeat that path"),
    ("size=1G disk_force=/d", "disk_force= means something only with disk=PATH"),
    ("size=1G siez=2G", "did you mean size=?"),
    ("size=1G polo=2G", "did you mean pool=?"),
    ("size=1G codecs=lz4", "did you mean codec=?"),
    ("size=1G zzz=1", "use one of size, devices, pool"),
]


def test_pressure_and_the_whole_pool(tmp_path: Path) -> None:
    assert config_of("size=1G").pressure == "psi"
    assert config_of("size=1G commit=all").pressure == "none"
    assert config_of("size=1G pressure=none").pressure == "none"
    file = tmp_path / "memory.pressure"
    file.write_text("some total=1")
    assert config_of(f"size=1G pressure={file}").pressure == str(file)


@pytest.mark.parametrize(("words", "advice"), BAD)
def test_bad_values_say_what_to_write(words: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(words)
    sentence = str(caught.value)
    assert advice in sentence
    assert "\n" not in sentence


def test_every_advised_size_is_accepted() -> None:
    for _, advice in BAD:
        if advice.startswith("write size=") and advice[-1] != "=":
            config_of(advice.removeprefix("write "))
        elif advice.startswith("write pool="):
            config_of(f"size=1G {advice.split()[1]}")


def test_as_dict_uses_the_keys_names() -> None:
    told = config_of("size=1G pool=64M memory=a").as_dict()
    assert told.keys() == {key.name for key in KEYS}
    assert (told["size"], told["pool"], told["memory"]) == (G, 64 * M, "a")


def test_default_pool_is_of_this_machines_ram() -> None:
    assert parse([("size", "1G")]).pool_bytes <= total_ram_bytes() // 5


@given(st.integers(1, DEVICE_BYTES_MAX // PAGE_BYTES))
def test_sizes_survive_a_round_trip(pages: int) -> None:
    assert config_of(f"size={human(pages * PAGE_BYTES)}").size_bytes == pages * PAGE_BYTES
    assert config_of(f"size={pages * PAGE_BYTES}").size_bytes == pages * PAGE_BYTES


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_word_is_taken_or_refused_with_a_sentence(key: str, value: str) -> None:
    sentence = "taken"
    try:
        parse([("size", "1G"), (key, value)], RAM)
    except ConfigError as error:
        sentence = str(error)
    assert sentence


@given(st.sampled_from([key.name for key in KEYS]), st.text(max_size=12))
def test_any_value_is_taken_or_refused_with_a_sentence(key: str, value: str) -> None:
    try:
        config = parse([(key, value)] + [("size", "1G")] * (key != "size"), RAM)
    except ConfigError as error:
        sentence = str(error)
    else:
        assert config.size_bytes % PAGE_BYTES == config.pool_bytes % PAGE_BYTES == 0
        return
    assert key in sentence


def test_warning_only_when_the_pool_can_fill() -> None:
    assert refusal_warning(config_of("size=1G pool=1G")) is None
    sentence = refusal_warning(config_of("size=8G pool=2G"))
    assert sentence is not None
    for words in ("size=8G", "pool=2G", "ENOSPC", "once 4G of it are in use"):
        assert words in sentence
    assert "worse than 1.6 to 1;" in str(refusal_warning(config_of("size=8G pool=5G")))


def test_what_a_disk_guarantees() -> None:
    """From the promised size on everything; below it, what its room holds of raw pages."""
    config = config_of("size=8G pool=2G disk=/d")
    enough = promised_bytes(8 * G)
    assert guaranteed_bytes(config, enough) == 8 * G
    assert refusal_warning(config, enough) is None
    assert refusal_warning(config, config_of(f"size=8G disk=/d disk_size={needed_disk(config)}")
                           .disk_size_bytes or 0) is None  # fmt: skip
    some = guaranteed_bytes(config, 4 * G)
    assert 3 * G < some < 4 * G
    assert some % PAGE_BYTES == 0
    sentence = refusal_warning(config, 4 * G)
    assert sentence is not None
    for words in ("size=8G", f"{some // M} MiB are safe", "ENOSPC", "disk_size=8618M"):
        assert words in sentence
    assert guaranteed_bytes(config, 16 * M) == 2 * G  # the pool alone
    assert guaranteed_bytes(config_of("size=1G pool=2G"), 0) == G


@given(st.integers(1, DEVICE_BYTES_MAX // PAGE_BYTES), st.integers(4096, DEVICE_BYTES_MAX // M))
def test_guarantees_grow_with_the_disk(pages: int, disk_mib: int) -> None:
    config = Config(size_bytes=pages * PAGE_BYTES, pool_bytes=M)
    disk = disk_mib * M
    assert guaranteed_bytes(config, disk) <= guaranteed_bytes(config, disk + M)
    assert (guaranteed_bytes(config, disk) == config.size_bytes) == (
        refusal_warning(config, disk) is None
    )
    if disk >= promised_bytes(config.size_bytes):
        assert refusal_warning(config, disk) is None


def test_realtime_only_where_the_swapping_machine_may_be_this_one() -> None:
    unix, tcp, other = Listening("/z", None), Listening(None, "10809"), Listening(None, None)
    assert [wants_realtime(config_of("size=1G"), where) for where in (unix, tcp, other)] == [
        True, False, True,
    ]  # fmt: skip
    assert wants_realtime(config_of("size=1G realtime=yes"), tcp)
    assert not wants_realtime(config_of("size=1G realtime=no"), unix)


# ---- where nbdkit listens, from its own words ------------------------------------------------

COMMAND_LINES = [
    ("-f -U /run/z.sock python x.py size=1G", Listening("/run/z.sock", None)),
    ("-fU /run/z.sock python x.py", Listening("/run/z.sock", None)),
    ("-U/run/z.sock python x.py -U /other", Listening("/run/z.sock", None)),
    ("--unix=/run/z.sock -t 4 python x.py", Listening("/run/z.sock", None)),
    ("--unix /run/z.sock python x.py", Listening("/run/z.sock", None)),
    ("-U - python x.py", Listening(None, None)),
    ("python x.py", Listening(None, "10809")),
    ("-p 9000 -i 127.0.0.1 python x.py", Listening(None, "9000")),
    ("--port=9000 python x.py", Listening(None, "9000")),
    ("-s python x.py", Listening(None, None)),
    ("--vsock python x.py", Listening(None, None)),
    ("--an-option-of-tomorrow python x.py", Listening(None, None)),
]


@pytest.mark.parametrize(("words", "where"), COMMAND_LINES)
def test_where_nbdkit_listens(words: str, where: Listening) -> None:
    assert listening(words.split(), {}) == where


def test_relative_socket_and_activation() -> None:
    assert listening(["-U", "z.sock"], {}) == Listening(f"{os.getcwd()}/z.sock", None)
    assert listening(["python"], {"LISTEN_FDS": "1"}) == Listening(None, None)


def test_control_socket_is_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    assert control_path(Listening("/run/z.sock", None), 5) == "/run/z.ctl"
    assert control_path(Listening("/run/nbd", None), 5) == "/run/nbd.ctl"
    assert control_path(Listening(None, "9000"), 5) == f"{tmp_path}/tcp-9000.ctl"
    assert control_path(Listening(None, None), 5) == f"{tmp_path}/nbd-5.ctl"
