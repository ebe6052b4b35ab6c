"""A booted guest: User Mode Linux on the host's own root file system, driven from here.

    harness (this process)                        guest (one process tree on the host)
      GuestLink ── serial line (socketpair) ────── agent, PID 1: run, get, put, mount, kill, sample
                ── console (pipe) ◄─────────────── kernel log
      mconsole  ── Unix socket ─────────────────── SysRq dumps when nothing else answers
      SHARE     ── a folder of the host ────────── /mnt: programs' output, the hog, the agent
    root file system: the host's own, read-only;  /tmp /run /dev/shm: tmpfs of the guest

The guest is started in a process-id namespace of its own: User Mode Linux leaves the processes of
its guest behind, running wild, when it is killed alone; the namespace takes them all along, also
when it is the harness that gets killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import build, mconsole
from .clock import Deadline
from .errors import CommandFailedError, GuestDiedError, LabError
from .fitness import module, tool
from .guest_link import COMMAND_LIMIT_S, Exit, GuestLink
from .kernel_log import LogLine
from .network import Network, Tap
from .vmstat import Sample, parse_vmstat

SHARE = "/mnt"
DIAGNOSIS_LIMIT_S = 2
TMPFS = ("/tmp", "/run", "/dev/shm")


@dataclass(frozen=True)
class GuestConfig:
    """How a guest boots.

    mem_mib: its memory; the kernel keeps about 20 MiB of it.
    modules: loaded at boot, each with its parameters, e.g. ("nbd nbds_max=2",).
    sysctl: written at boot, e.g. {"vm.min_free_kbytes": "8192"}.
    disks: files of the host that become /dev/ubda, /dev/ubdb, ... of the guest.
    sample_ms: how often /proc/vmstat is sent.
    """

    mem_mib: int = 128
    modules: tuple[str, ...] = ("nbd nbds_max=2",)
    sysctl: Mapping[str, str] = field(default_factory=dict)
    disks: tuple[Path, ...] = ()
    sample_ms: int = 200


class Job:
    """A program that runs, or ran, in the guest.  Made by `Guest.start`."""

    def __init__(self, guest: Guest, name: str, argv: Sequence[str]) -> None:
        self.guest = guest
        self.name = name
        self.argv = tuple(argv)
        self.started_s = time.monotonic()

    @property
    def exit(self) -> Exit | None:
        return self.guest.link.exits.get(self.name)

    def done(self) -> bool:
        return self.exit is not None

    def wait(self, limit_s: float | None = None) -> Exit:
        """Until it has ended.  Raises LabTimeoutError or GuestDiedError."""
        self.guest.link.wait_for(self.done, limit_s, f"{self.name} to end")
        assert self.exit is not None
        return self.exit

    def done_within(self, seconds: float) -> bool:
        """Wait for its end, but no longer than that.  Raises GuestDiedError."""
        end_s = time.monotonic() + seconds
        self.guest.link.wait_for(self.done, None, f"{self.name} to end", end_s)
        return self.done()

    def seconds(self) -> float:
        """How long it has run, or ran."""
        return (self.exit.at_s if self.exit else time.monotonic()) - self.started_s

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to it and the processes it has started."""
        self.guest.link.ask("kill", self.name, str(int(number)))

    def stdout(self) -> str:
        """What it has said so far."""
        return self._said("out")

    def stderr(self) -> str:
        return self._said("err")

    def _said(self, suffix: str) -> str:
        path = self.guest.share / f"{self.name}.{suffix}"
        return path.read_text(errors="replace") if path.exists() else ""


class Guest:
    """`boot`, then use it, then `close` (safe at any time and from any state)."""

    link: GuestLink

    def __init__(
        self, network: Network, tap: Tap, folder: Path, config: GuestConfig, deadline: Deadline
    ) -> None:
        self.tap = tap
        self.config = config
        self.deadline = deadline
        self.folder = folder
        self.share = folder / "share"
        self._network = network
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._brought: set[Path] = set()

    @property
    def samples(self) -> list[Sample]:
        """What /proc/vmstat counted, since boot, every config.sample_ms."""
        return self.link.samples

    @property
    def log(self) -> list[LogLine]:
        """The console since boot."""
        return self.link.log if hasattr(self, "link") else []

    # ---- booting and ending ----

    def boot(self) -> None:
        """Start the kernel; returns once PID 1 answers and mounts, modules and network are up."""
        self.share.mkdir(parents=True)
        for name in ("agent", "hog"):
            shutil.copy(build.program(name), self.share / name)
        line, guest_line = socket.socketpair()
        console, guest_console = os.pipe()
        self.link = GuestLink(line, console, self.deadline)
        try:
            self._process = subprocess.Popen(
                self._network.inside(self._kernel_command(guest_line.fileno())),
                pass_fds=(self._network.fd, guest_line.fileno()),
                stdin=subprocess.PIPE,
                stdout=guest_console,
                stderr=guest_console,
                env={"PATH": os.environ.get("PATH", ""), "HOME": os.fspath(self.folder)},
                cwd=self.folder,
                start_new_session=True,
            )
        finally:
            guest_line.close()
            os.close(guest_console)
        self.link.wait_for(lambda: self.link.ready, None, "the guest to boot")
        self._set_up()

    def _kernel_command(self, line_fd: int) -> list[str]:
        disks = [f"ubd{number}={path}" for number, path in enumerate(self.config.disks)]
        return [
            *(tool("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"),
            # A namespace's first process cannot abort, which is how this kernel ends after a panic.
            *("/bin/sh", "-c", '"$@"; exit $?', "sh"),
            # Without address randomisation the guest gets the same memory at every boot.
            *(tool("setarch"), "-R"),
            *(tool("linux"), f"mem={self.config.mem_mib}M", f"uml_dir={self.folder}/", "umid=uml"),
            *("rootfstype=hostfs", "root=/dev/root", "rootflags=/", "ro"),
            *(f"init={self.share}/agent", "printk.time=1", "sysrq_always_enabled"),
            *("panic=-1", "noreboot"),
            *("con=null", "con0=fd:0,fd:1", f"ssl0=fd:{line_fd}", *disks),
            f"eth0=tuntap,{self.tap.name}",
        ]

    def _set_up(self) -> None:
        self.link.ask("mount", "hostfs", "share", SHARE, os.fspath(self.share))
        for path in TMPFS:
            self.link.ask("mount", "tmpfs", "tmpfs", path, "mode=1777")
        for key, value in self.config.sysctl.items():
            self.set_sysctl(key, value)
        busybox = tool("busybox")
        for line in self.config.modules:
            name, *parameters = line.split()
            self.call([busybox, "insmod", os.fspath(module(name)), *parameters])
        self.call([busybox, "ip", "link", "set", "lo", "up"])
        self.call([busybox, "ip", "addr", "add", f"{self.tap.guest}/30", "dev", "eth0"])
        self.call([busybox, "ip", "link", "set", "eth0", "up"])
        self.call([busybox, "ip", "route", "add", "default", "via", self.tap.host])
        self.link.ask("sample", str(self.config.sample_ms))

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def power_off(self, limit_s: float = 10) -> bool:
        """Ask the guest to end by itself.  False if it did not."""
        assert self._process is not None
        try:
            self.link.send("off")
            self._process.wait(self.deadline.nearer(limit_s).left_s())
        except (GuestDiedError, subprocess.TimeoutExpired):
            return False
        return True

    def close(self) -> None:
        """End it by force, and wait until its processes are gone."""
        if self._process is None:
            return
        if self.alive():
            # unshare's --kill-child takes the namespace's first process, and so all of them.
            self._process.kill()
        self._process.wait()
        assert self._process.stdin
        self._process.stdin.close()
        self._process = None
        self.link.close()

    def expire(self) -> None:
        """The lab's time is up: have the guest say what it is doing, then end it.  Any thread."""
        process = self._process
        if process is None:
            return
        self.diagnose()
        self.link.expire()
        process.kill()

    def diagnose(self) -> None:
        """Memory and blocked tasks with their stacks, into the kernel log.  Never raises.

        PID 1 is asked first: it is locked and has everything open.  The management console needs
        a worker of the kernel, which a guest without memory may not have.  Not `t`, all tasks:
        User Mode Linux never gets to the end of an idle kernel thread's stack.
        """
        for key in "mw":
            try:
                self.link.ask("sysrq", key, limit_s=DIAGNOSIS_LIMIT_S)
            except LabError:
                with suppress(OSError):
                    mconsole.ask(os.fspath(self.folder / "uml" / "mconsole"), f"sysrq {key}")

    # ---- programs and files ----

    def start(self, argv: Sequence[str], name: str | None = None, options: str = "-") -> Job:
        """Start a program; options as in guest/agent.c, e.g. "fifo=5,oom=-1000"."""
        self._starts += 1
        job = Job(self, name or f"{Path(argv[0]).name[:20]}-{self._starts}", argv)
        self.link.exits.pop(job.name, None)
        self.link.ask("run", job.name, options, *argv)
        return job

    def call(self, argv: Sequence[str], limit_s: float = COMMAND_LIMIT_S) -> str:
        """Run a program that has to work; its output.  CommandFailedError has what it said."""
        job = self.start(argv)
        code = job.wait(limit_s).code
        if code:
            said = (job.stdout() + job.stderr()).strip()
            raise CommandFailedError(f"{' '.join(argv)}: exit {code}: {said[-2000:]}")
        return job.stdout()

    def read(self, path: str) -> str:
        """A small file of the guest (at most 10,000 bytes of it)."""
        return self.link.ask("get", path)

    def write(self, path: str, text: str) -> None:
        self.link.ask("put", path, text)

    def set_sysctl(self, key: str, value: str) -> None:
        self.write("/proc/sys/" + key.replace(".", "/"), value)

    def vmstat(self) -> dict[str, int]:
        return parse_vmstat(self.read("/proc/vmstat"))

    def meminfo_kb(self) -> dict[str, int]:
        """/proc/meminfo: MemTotal, MemFree, MemAvailable, SwapTotal, ... in KiB."""
        lines = (line.split() for line in self.read("/proc/meminfo").splitlines())
        return {words[0].rstrip(":"): int(words[1]) for words in lines}

    def bring(self, path: Path) -> str:
        """Make a file or folder of the host visible in the guest at its own path; returns it.

        Only what lies below one of the guest's own mounts needs doing anything.
        """
        path = path.resolve()
        folder = path if path.is_dir() else path.parent
        hidden = any(folder.is_relative_to(mount) for mount in (*TMPFS, SHARE))
        if hidden and folder not in self._brought:
            self._brought.add(folder)
            self.link.ask("mount", "hostfs", "bring", os.fspath(folder), f"ro,{folder}")
        return os.fspath(path)
