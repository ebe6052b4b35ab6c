"""A guest that systemd has booted, with zcache installed and its units enabled.

    harness                                    guest
      ask("systemctl ...") ── share/N.run ───►  lab.service (answer.sh), an ordinary service
                           ◄── share/N.out ──
      said()               ◄── console ───────  kernel log and systemd's own words
      wake()               ── SIGUSR1 ───────►  the kernel, when it sleeps

Its root is a tmpfs with the host's /usr, and an /etc that holds little but what `Booted` was given.
One boot takes about ten seconds; leaving the `with` ends it by force if it still runs.  Unlike
`Guest` it has no agent that is locked in memory: what is asked while memory is short may take its
time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from . import build
from .clock import Deadline, until
from .errors import CommandFailedError, GuestDiedError
from .fitness import tool

SCRIPTS = Path(__file__).parent / "guest"
INSTALL = Path(__file__).parents[2] / "deploy/install.sh"
MASKED = (
    "systemd-udevd.service", "systemd-logind.service", "systemd-firstboot.service",
    "systemd-repart.service", "systemd-networkd.service", "systemd-resolved.service",
    "systemd-timesyncd.service", "getty.target", "cryptsetup.target", "dbus.service", "dbus.socket",
    "proc-sys-fs-binfmt_misc.automount",
)  # fmt: skip
"""Units of the host's /usr that have nothing to do in a guest without devices."""
LAB_SERVICE = """\
[Unit]
After=swap.target
[Service]
ExecStart=/share/answer.sh
"""


class Booted:
    """`with Booted(folder, files, wanted) as guest: guest.ask("cat /proc/swaps")`.

    folder: an empty one.  files: what its /etc holds beside the least, by name relative to /etc.
    wanted: units that are enabled, as ("swap.target", "zcache@swap0.service").
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, str | Path],
        wanted: tuple[tuple[str, str], ...],
        deadline: Deadline,
        mem_mib: int = 384,
    ) -> None:
        self.share = folder / "share"
        self.deadline = deadline
        self._folder = folder
        self._mem_mib = mem_mib
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.share.mkdir(parents=True)
        shutil.copy(SCRIPTS / "answer.sh", self.share)
        shutil.copy(build.program("hog"), self.share)
        self._install()
        self._write_etc(files, wanted)

    def _install(self) -> None:
        env = {"PATH": os.environ["PATH"], "PREFIX": "/usr/local"}
        env["DESTDIR"] = os.fspath(self._folder / "root")
        subprocess.run([INSTALL, "install"], env=env, check=True, capture_output=True, timeout=120)

    def _write_etc(
        self, files: Mapping[str, str | Path], wanted: tuple[tuple[str, str], ...]
    ) -> None:
        etc = self._folder / "root/etc"
        units = etc / "systemd/system"
        units.mkdir(parents=True)
        for name in ("passwd", "group", "ld.so.cache"):
            shutil.copy(Path("/etc") / name, etc)
        least = {"nsswitch.conf": "passwd: files\ngroup: files\n", "fstab": "", "machine-id": ""}
        least["systemd/system/lab.service"] = LAB_SERVICE
        for name, content in {**least, **files}.items():
            (etc / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, etc / name)
            else:
                (etc / name).write_text(content)
        for unit in MASKED:
            (units / unit).symlink_to("/dev/null")
        (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
        for target, unit in (*wanted, ("multi-user.target", "lab.service")):
            (units / f"{target}.wants").mkdir(exist_ok=True)
            template = unit if "@" not in unit else f"{unit.partition('@')[0]}@.service"
            place = "/etc" if unit == "lab.service" else "/usr/local/lib"
            link = units / f"{target}.wants" / unit
            link.symlink_to(f"{place}/systemd/system/{template}")

    # ---- booting and ending ----

    def __enter__(self) -> Booted:
        with (self._folder / "console").open("wb") as console:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,  # the kernel cannot poll a file
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ["PATH"], "HOME": os.fspath(self._folder)},
                cwd=self._folder,
                start_new_session=True,
            )
            assert self._process.stdout
            self._copier = subprocess.Popen(["cat"], stdin=self._process.stdout, stdout=console)
        return self

    def _command(self) -> list[str]:
        return [
            *(tool("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("/bin/sh", "-c", '"$@"; exit $?', "sh", tool("setarch"), "-R"),
            *(tool("linux"), f"mem={self._mem_mib}M", f"uml_dir={self._folder}/", "umid=uml"),
            *("rootfstype=hostfs", "root=/dev/root", "rootflags=/", "ro"),
            *(f"init={SCRIPTS}/first.sh", f"zguest={self._folder}", "printk.time=1"),
            *("panic=-1", "noreboot", "con=null", "con0=fd:0,fd:1"),
            "systemd.journald.forward_to_console=1",
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process
        if self._process.poll() is None:
            self._process.kill()  # --kill-child takes the rest
        self._process.wait()
        assert self._process.stdin
        self._process.stdin.close()
        self._copier.wait()
        assert self._process.stdout
        self._process.stdout.close()
        if error is not None:
            print(self.said()[-8000:])

    def wait_off(self, limit_s: float) -> int:
        """Until the kernel has halted; its exit code."""
        assert self._process
        code = self._process.wait(self.deadline.nearer(limit_s).left_s())
        self._copier.wait()
        return code

    def wake(self) -> None:
        """From sleep: for this kernel SIGUSR1 is the key that is pressed."""
        assert self._process
        pid = self._process.pid  # unshare, whose child's child it is
        while Path(f"/proc/{pid}/comm").read_text().strip() != "linux":
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, signal.SIGUSR1)

    # ---- asking ----

    def said(self) -> str:
        """The console since boot: the kernel, and systemd."""
        return (self._folder / "console").read_text(errors="replace")

    def begin(self, script: str) -> int:
        """A script for /bin/sh, run after those before it; the number to `finish` it by."""
        number, self._asked = self._asked, self._asked + 1
        new = self.share / f"{number}.new"
        new.write_text(script + "\n")
        new.rename(self.share / f"{number}.run")
        return number

    def finish(self, number: int, limit_s: float = 60, code: int = 0) -> str:
        """What it said.  Raises CommandFailedError if it ended with another code."""
        done = self.share / f"{number}.done"

        def look() -> bool:
            assert self._process
            if self._process.poll() is not None and not done.exists():
                raise GuestDiedError(f"the guest ended: {self.said()[-2000:]}")
            return done.exists()

        script = (self.share / f"{number}.run").read_text().strip()
        until(look, self.deadline.nearer(limit_s), f"the guest's answer to: {script}")
        said = (self.share / f"{number}.out").read_text(errors="replace")
        if int(done.read_text()) != code:
            raise CommandFailedError(f"{script}: exit {done.read_text().strip()}: {said[-3000:]}")
        return said

    def ask(self, script: str, limit_s: float = 60, code: int = 0) -> str:
        """`begin`, then `finish`."""
        return self.finish(self.begin(script), limit_s, code)
