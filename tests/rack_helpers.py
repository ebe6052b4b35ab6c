"""Machines of a rack on this one: an owner's network namespace, one for each donor, bad cables.

owner's   d0 10.78.0.1/30 ── cable 0 ── eth0 10.78.0.2/30   donor 0's: zcache node --tls
          d1 10.78.1.1/30 ── cable 1 ── eth0 10.78.1.2/30   donor 1's
cables (tests/cable.py) delay, lose and cut as told; all of it goes with the `with`
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from cluster import certificates
from tests.cable import open_tap
from tests.lender_helpers import LENT, Lender
from tests.plugin_helpers import ROOT, WAIT_S
from tests.swaplab.fitness import tool
from tests.swaplab.network import Network

PORT = 7900


class Rack:
    """`modules`: what each donor runs.  Every second donor keeps its pages over a restart."""

    def __init__(self, folder: Path, modules: Sequence[str], seed: int) -> None:
        self.folder, self._seed, self._modules = folder, seed, modules
        self._stack = ExitStack()
        self.lenders: list[Lender] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.owner = Network()
            stack.callback(self.owner.close)
            self._make_certificates()
            networks, taps = [], []
            for n in range(len(self._modules)):
                network = Network()
                stack.callback(network.close)
                networks.append(network)
                ends = ((self.owner, f"d{n}", 1), (network, "eth0", 2))
                for where, name, host in ends:
                    taps.append(where.call(lambda name=name: open_tap(name)))  # type: ignore[misc]
                    where.run([tool("ip"), "addr", "add", f"10.78.{n}.{host}/30", "dev", name])
                    where.run([tool("ip"), "link", "set", name, "up"])
            self._cables = subprocess.Popen(
                [sys.executable, "-m", "tests.cable", str(self._seed), *map(str, taps)],
                stdin=subprocess.PIPE,
                pass_fds=taps,
                cwd=ROOT,
                text=True,
            )
            stack.callback(self._end_cables)
            for fd in taps:
                os.close(fd)
            for n, network in enumerate(networks):
                self.lenders.append(self._start(n, network))
                stack.callback(self.lenders[-1].end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _make_certificates(self) -> None:
        certificates.init(self.folder / "ca")
        for name in ("owner", *(f"lender{n}" for n in range(len(self._modules)))):
            certificates.add(self.folder / "ca", name)

    def _start(self, n: int, network: Network) -> Lender:
        name = f"lender{n}"
        memory = f"rack{os.getpid()}x{self._seed}n{n}" if n % 2 else None
        return Lender(
            self.folder, name, self._modules[n], LENT, f"10.78.{n}.2:{PORT}",
            self.folder / "ca" / name, memory, network,
        )  # fmt: skip

    def _end_cables(self) -> None:
        self._cables.kill()
        self._cables.communicate(timeout=WAIT_S)

    def cable(self, n: int, delay_ms: int = 0, loss_percent: int = 0, cut: bool = False) -> None:
        """From now on donor n's cable delays each frame, loses some, or all; both ways."""
        assert self._cables.stdin is not None
        self._cables.stdin.write(f"{n} {delay_ms} {loss_percent} {int(cut)}\n")
        self._cables.stdin.flush()

    def words(self, *more: str) -> list[str]:
        """The owner's keys."""
        peers = ",".join(lender.address for lender in self.lenders)
        return ["size=16M", "pool=2M", f"peers={peers}", f"tls={self.folder}/ca/owner", *more]
