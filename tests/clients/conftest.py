"""One server with the embedded model for all tests of clients, and no way out of this machine for them."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from command import served


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where ``mixtral serve`` listens."""
    with served() as found:
        yield found.address


@pytest.fixture
def base(address: str) -> str:
    """What clients call the base URL."""
    return f"{address}/v1"


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are not looked up, and only this machine is connected to."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def own_connect(self: socket.socket, to: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(to[0]).is_loopback:
            raise RuntimeError(f"a client reached out to {to}")
        connect(self, to)

    def own_lookup(host: Any, *more: Any, **named: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError(f"a client looked up {host!r}")
        return lookup(host, *more, **named)

    monkeypatch.setattr(socket.socket, "connect", own_connect)
    monkeypatch.setattr(socket, "getaddrinfo", own_lookup)
