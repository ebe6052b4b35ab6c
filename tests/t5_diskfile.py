"""Which disks are refused, in one sentence that says what to do, and that nothing of them changes.

Block devices are tried with a loop device where the machine lets us make one.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zcache_core import diskfile
from zcache_core.diskfile import DiskFile, open_disk, promised_bytes
from zcache_core.errors import ConfigError

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty file of SIZE bytes."""
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A file on a tmpfs."""
    path = Path(f"/dev/shm/zcache-test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB of our own."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder))
    if done:
        pytest.skip(f"no tmpfs can be mounted here: {done}")
    yield folder
    run("umount", str(folder))


@pytest.fixture
def loop(path: Path) -> Iterator[str]:
    """A block device of SIZE bytes, free of everything."""
    done = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device can be made here: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    run("losetup", "-d", device)


def run(*command: str) -> str:
    """ "" when it did; else what it said."""
    if not shutil.which(command[0]):
        return f"there is no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or "failed"


def refusal(path: Path | str, disk_bytes: int | None = SIZE, force: bool = False) -> str:
    """The sentence with which a disk is refused; its start has not changed."""
    before = Path(path).read_bytes()[: 2 * MIB] if Path(path).is_file() else None
    with pytest.raises(ConfigError) as error:
        open_disk(str(path), disk_bytes, force)
    after = Path(path).read_bytes()[: 2 * MIB] if Path(path).is_file() else None
    assert before == after
    sentence = str(error.value)
    assert str(path) in sentence or "bytes" in sentence
    assert "\n" not in sentence
    return sentence


def opened(path: Path | str, disk_bytes: int | None = SIZE, force: bool = False) -> DiskFile:
    disk = open_disk(str(path), disk_bytes, force)
    assert disk.disk_bytes % MIB == 0
    return disk


# ---- files -------------------------------------------------------------------------------


def test_fresh_file(tmp_path: Path) -> None:
    disk = opened(tmp_path / "new", 20 * MIB + 77)
    assert disk.disk_bytes == 20 * MIB
    disk.take(7, 100 * MIB)
    assert not disk.preallocated
    assert not disk.ours
    status = os.stat(tmp_path / "new")
    assert status.st_size == 20 * MIB
    assert status.st_blocks * 512 < MIB, "room is taken as it is used"
    assert status.st_mode & 0o777 == 0o600, "swap holds secrets"
    disk.close()
    disk.close()


def test_our_own_again(path: Path) -> None:
    for epoch, ours in ((7, False), (7, True), (8, False), (8, True)):
        disk = opened(path)
        disk.take(epoch, 100 * MIB)
        assert disk.ours == ours
        disk.close()


def test_promise_takes_its_room(tmp_path: Path) -> None:
    device = 10 * MIB + 4096
    for missing in (0, 1):
        file = tmp_path / str(missing)
        disk = opened(file, promised_bytes(device) - missing)
        disk.take(7, device)
        assert disk.preallocated == (missing == 0)
        taken = os.stat(file).st_blocks * 512
        assert taken >= disk.disk_bytes if disk.preallocated else taken < MIB
        disk.close()


@pytest.mark.parametrize(
    ("offset", "magic", "said"),
    [
        (4086, b"SWAPSPACE2", "swap"),
        (4086, b"SWAP-SPACE", "swap"),
        (0x438, b"\x53\xef", "ext4"),
        (0, b"XFSB", "XFS"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (0x218, b"LVM2 001", "data that are not zcache's"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        (0x200, b"EFI PART", "partition table"),
        (510, b"\x55\xaa", "data that are not zcache's"),
        (9000, b"\x01", "data that are not zcache's"),
    ],
)
def test_foreign_content(path: Path, offset: int, magic: bytes, said: str) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(magic)
    assert said in refusal(path)
    disk = opened(path, force=True)  # told to by name
    disk.take(7, 100 * MIB)
    disk.close()
    opened(path).close()  # and ours from then on


@pytest.mark.parametrize("maker", [("mkfs.ext4", "-q", "-F"), ("mkswap", "-q"), ("mkfs.xfs", "-q")])
def test_made_by_the_real_tools(path: Path, maker: tuple[str, ...]) -> None:
    if why := run(*maker, str(path)):
        pytest.skip(f"{maker[0]}: {why}")
    assert "carries" in refusal(path)


def test_used_by_another_server(path: Path) -> None:
    script = (
        "import sys; from zcache_core.diskfile import open_disk\n"
        "d = open_disk(sys.argv[1], 32 << 20); print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        assert "another server" in refusal(path)
        other.kill()
    opened(path).close()


def test_refused_newcomer_leaves_a_running_disk_alone(tmp_path: Path) -> None:
    disk = opened(tmp_path / "disk")
    assert "another server" in refusal(tmp_path / "disk")
    assert os.path.samestat(os.stat(tmp_path / "disk"), os.fstat(disk.fd))
    disk.close()


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for what in (tmp_path, tmp_path / "fifo", "/dev/null", tmp_path / "none" / "disk"):
        refusal(what)


def test_sizes(tmp_path: Path, path: Path) -> None:
    assert "disk_size=" in refusal(tmp_path / "new", None)
    assert not (tmp_path / "new").exists(), "nothing is left of a refusal"
    assert "too small" in refusal(path, 15 * MIB)
    disk = opened(path, None)
    assert disk.disk_bytes == SIZE, "all that is there"
    disk.close()
    disk = opened(path, 20 * MIB)
    disk.close()
    assert os.stat(path).st_size == SIZE, "a file is never cut"


def test_tmpfs(tmpfs: Path) -> None:
    """With or without O_DIRECT, as the kernel has it."""
    disk = opened(tmpfs)
    disk.take(7, 8 * MIB)
    assert disk.preallocated
    disk.close()


def test_no_direct_io(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses O_DIRECT is used through the page cache."""
    real = os.open

    def picky(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", picky)
    disk = opened(path)
    assert not disk.direct
    disk.take(7, 8 * MIB)
    disk.close()


def test_no_room_for_the_promise(mounted: Path) -> None:
    disk = opened(mounted / "disk", 64 * MIB)
    with pytest.raises(ConfigError, match="cannot be allocated") as error:
        disk.take(7, 8 * MIB)
    assert "disk_size=" in str(error.value)
    disk.close()


# ---- block devices --------------------------------------------------------------------------


def test_block_device(loop: str) -> None:
    assert "up to that" in refusal(loop, 2 * SIZE)
    disk = opened(loop, None)
    assert disk.disk_bytes == SIZE
    disk.take(7, 8 * MIB)
    assert disk.preallocated
    refusal(loop)  # held by us
    disk.close()
    again = opened(loop)
    again.take(7, 8 * MIB)
    assert again.ours
    again.close()


def test_mounted_block_device(loop: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    if why := run("mkfs.ext4", "-q", "-F", loop):
        pytest.skip(f"mkfs.ext4: {why}")
    assert "ext4" in refusal(loop)
    if why := run("mount", loop, str(folder)):
        pytest.skip(f"mount: {why}")
    try:
        assert "in use" in refusal(loop, force=True), "no force helps against that"
    finally:
        run("umount", str(folder))


def test_block_device_in_use_as_swap(loop: str) -> None:
    """Not by us, but by whoever holds it exclusively, as swapon does."""
    held = os.open(loop, os.O_RDWR | os.O_EXCL)
    assert "in use" in refusal(loop, force=True)
    os.close(held)


# ---- files that the kernel itself uses ------------------------------------------------------


def test_file_below_a_loop_device(loop: str, path: Path) -> None:
    """An image that may be mounted: what is written behind the loop device's back destroys it."""
    assert f"in use ({loop})" in refusal(path, force=True), "no force helps against that"
    linked = path.with_name("linked")
    linked.hardlink_to(path)
    assert f"in use ({loop})" in refusal(linked, force=True)
    run("losetup", "-d", loop)
    opened(path).close()


def test_file_in_use_as_swap(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swaps = path.with_name("swaps")
    swaps.write_text(f"Filename\tType\tSize\tUsed\tPriority\n{path}  file  32764  0  -2\n")
    monkeypatch.setattr(diskfile, "SWAPS", swaps)
    assert "in use (swap)" in refusal(path, force=True)
    opened(path.with_name("another")).close()
