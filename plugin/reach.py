"""How the command reaches a server: its control socket, or its web address from elsewhere.

    /run/zcache/zcache.ctl      everything
    http://HOST:9469            looking only: what metrics= of a server on HOST says

Both are called the same way, `call(method, *params)`, and are connected anew when the
connection broke; `answers` asks for all that there is to show.  To change a server on another
machine, bring its socket here: `ssh -N -L /tmp/host.ctl:/run/zcache/zcache.ctl HOST`, and name
that one.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from cluster.link import BlockingClient, RpcError
from plugin import show
from zcache_core.errors import ControlError

ANSWER_S = 2.0  # who draws a picture waits that long when the node process does not answer
STATE_BYTES_MAX = 1 << 20
ALWAYS = ("ping", "stats", "config", "health")

Call = Callable[..., Any]  # (method, *params) -> the answer


class Asker:
    """Calls over one connection to a control socket, made anew when it broke."""

    def __init__(self, control: str) -> None:
        self._control = control
        self._client: BlockingClient | None = None

    def __call__(self, method: str, *params: Any) -> Any:
        """The answer.  Raises ControlError; the next call tries a new connection."""
        try:
            if self._client is None:
                self._client = BlockingClient(self._control, ANSWER_S)
            return self._client.call(method, *params)
        except RpcError:
            raise
        except ControlError:
            self.close()
            raise

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class WebAsker:
    """The same from a server's web address.  One question brings all answers, asked by `ping`."""

    def __init__(self, address: str) -> None:
        self._url = address.rstrip("/") + "/api/state"
        self._state: dict[str, Any] = {}

    def __call__(self, method: str, *params: Any) -> Any:
        """The answer.  Raises ControlError."""
        if method == "ping" or not self._state:
            self._state = self._ask()
        if params or method not in self._state:
            raise ControlError(
                f"{method} is not possible over http; use the server's control socket (over ssh, "
                f"if it is elsewhere)"
            )
        return self._state[method]

    def _ask(self) -> dict[str, Any]:
        try:
            # No proxy: these are machines of one's own.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self._url, timeout=ANSWER_S) as answer:
                state = json.loads(answer.read(STATE_BYTES_MAX))
            if not isinstance(state, dict) or "stats" not in state:
                raise ValueError("it is no zcache server")
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            raise ControlError(
                f"no answer from {self._url} ({why}); is that what metrics= of a server says?"
            ) from None
        found: dict[str, Any] = state
        return found

    def close(self) -> None:
        pass


def reach(control: str) -> Asker | WebAsker:
    """What calls the server at a socket's path or an http:// address."""
    return WebAsker(control) if control.startswith("http://") else Asker(control)


def answers(call: Call) -> dict[str, Any]:
    """All that there is to show of a server or of a node that lends, by method.

    Raises ControlError.
    """
    found = {method: call(method) for method in ALWAYS}
    return found | {method: call(method) for method in further(found["config"])}


def further(config: Mapping[str, Any]) -> list[str]:
    """What else can be asked of whoever has this configuration: those it lends to, its peers."""
    if show.only_lends(config):
        return ["owners"]
    asked = {"peers": ("peers", "etcd"), "owners": ("listen",)}
    return [method for method, keys in asked.items() if any(config.get(key) for key in keys)]
