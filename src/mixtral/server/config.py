"""What a server may be told: address, bounds and time limits. The defaults are the safe ones."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from mixtral.errors import ConfigError

__all__ = ["ServerConfig"]

# field -> (lowest, highest) value
_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "queue_size": (1, 4096),
    "queue_tokens": (1, 2**31 - 1),
    "queue_timeout_s": (0.01, 3600),
    "request_timeout_s": (0.01, 86400),
    "body_timeout_s": (0.01, 120),
    "stall_timeout_s": (0.01, 3600),
    "wait_note_s": (0.01, 120),
    "drain_s": (0, 3600),
    "body_limit_bytes": (1024, 64 * 2**20),
    "open_requests": (1, 4096),
    "buffer_tokens": (1, 65536),
    "buffer_bytes": (1024, 16 * 2**20),
    "engine_stall_s": (0.05, 3600),
    "engine_deaths": (1, 1000),
    "engine_deaths_within_s": (0.01, 86400),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server.

    ``host`` must be a loopback address, because there are no keys; put a proxy that authenticates in front and list its
    name in ``allowed_hosts``. ``port`` 0 takes a free one. ``queue_size`` requests with ``queue_tokens`` prompt tokens
    together may wait ``queue_timeout_s`` for the engine. ``drain_s`` is what running requests get after a stop signal.
    A client that reads nothing for ``stall_timeout_s`` is dropped. A stream without tokens for ``wait_note_s`` gets a
    comment line. ``buffer_bytes`` of tokens may wait for a slow reader. An engine that is not heard of, or works on one
    step, for ``engine_stall_s`` is ended and started again; after ``engine_deaths`` ends within
    ``engine_deaths_within_s`` the server gives up.

    Raises:
        ConfigError: a value is out of range, or the host is not loopback.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    queue_size: int = 128
    queue_tokens: int = 262_144
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 3600.0
    body_timeout_s: float = 30.0
    stall_timeout_s: float = 60.0
    wait_note_s: float = 15.0
    drain_s: float = 30.0
    body_limit_bytes: int = 4 * 2**20
    open_requests: int = 256
    buffer_tokens: int = 1024
    buffer_bytes: int = 256 * 2**10
    engine_stall_s: float = 60.0
    engine_deaths: int = 3
    engine_deaths_within_s: float = 600.0

    def __post_init__(self) -> None:
        if not _is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host!r}; expected a loopback address such as 127.0.0.1: this server has no keys. "
                "To serve other machines, put a proxy that authenticates in front and name it in allowed_hosts.",
                param="host",
            )
        for field in fields(self):
            if field.name not in _RANGES:
                continue
            low, high = _RANGES[field.name]
            value = getattr(self, field.name)
            whole = field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ConfigError(f"{field.name} is {value!r}; expected a number", param=field.name)
            if not low <= value <= high:  # NaN is not, either
                raise ConfigError(f"{field.name} is {value!r}; expected {low:g} to {high:g}", param=field.name)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
