"""Where the page listens, and which names it answers to there."""

from __future__ import annotations

import errno
import ipaddress
import platform
import socket
from dataclasses import dataclass

from hasten.errors import UsageError

USUAL_PORT = 7860
TRIED = 20
"""Ports that are tried from the usual one on, where none was named."""

OWN_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True, slots=True)
class Address:
    """host: a name or number of this machine. port: None for the first free one from 7860 on, 0 for any. auth: `user:password`,
    without which only this machine may be listened on."""

    host: str = "127.0.0.1"
    port: int | None = None
    auth: str | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` for an address that others reach without a password, or a password that is none."""
        if self.auth is not None and not all(self.auth.partition(":")[::2]):
            raise UsageError("--auth: it must be user:password, neither of them empty. For example --auth me:a-long-password")
        if self.auth is None and not self.loopback:
            raise UsageError(
                f"--host {self.host}: other machines could reach the page, and whoever does can use this one. Add --auth user:password,"
                " or stay on 127.0.0.1 and come through a tunnel (ssh -L 7860:127.0.0.1:7860 this-machine)."
            )

    @property
    def loopback(self) -> bool:
        """Can this machine alone reach it?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def shown(self) -> str:
        """The host as an address for a browser here has it."""
        bare = self.host.strip("[]")
        if bare in ("0.0.0.0", "::", ""):
            return "127.0.0.1"
        return f"[{bare}]" if ":" in bare else bare

    def answers_to(self, name: str) -> bool:
        """Is `name` (of a Host header, without its port) one of this address? A number cannot be rebound by a foreign name
        server, so any is accepted where others may come at all."""
        if name in OWN_NAMES or name == self.shown.lower():
            return True
        if self.loopback:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in (platform.node().lower(), self.host.lower())
        return True

    def bind(self) -> socket.socket:
        """A socket that listens there. Raises `UsageError` in words where that cannot be."""
        if self.port is not None:
            return self._bound(self.port)
        for port in range(USUAL_PORT, USUAL_PORT + TRIED):
            try:
                return self._bound(port)
            except _InUse:
                continue
        raise UsageError(f"Ports {USUAL_PORT} to {USUAL_PORT + TRIED - 1} on {self.host} are all in use. Name another: --port 0 takes any.")

    def _bound(self, port: int) -> socket.socket:
        bare = self.host.strip("[]")
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
            found = socket.socket(family, kind, protocol)
        except OSError as error:
            raise UsageError(f"--host {self.host}: no such address here ({error.strerror or error}). Usual is 127.0.0.1.") from None
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(where)
            found.listen(128)
        except OSError as error:
            found.close()
            raise self._unbound(port, error) from None
        return found

    def _unbound(self, port: int, error: OSError) -> UsageError:
        if error.errno == errno.EADDRINUSE:
            return _InUse(f"Port {port} on {self.host} is in use, perhaps by another `hasten ui`. Name another: --port {port + 1}, or --port 0 for any.")
        if error.errno == errno.EACCES:
            return UsageError(f"Port {port} needs rights that this user has not. Name one above 1023: --port {USUAL_PORT}.")
        return UsageError(f"--host {self.host}, --port {port}: {error.strerror or error}. Usual is --host 127.0.0.1 --port {USUAL_PORT}.")


class _InUse(UsageError):
    """Somebody else listens there."""
