"""What a server may be told: address, bounds and time limits. The defaults are the safe ones."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from mixtral.errors import ConfigError
from mixtral.server.keys import KeyRing

__all__ = ["ServerConfig"]

# field -> (lowest, highest) value
_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "queue_size": (1, 4096),
    "queue_tokens": (1, 2**31 - 1),
    "queue_timeout_s": (0.01, 3600),
    "request_timeout_s": (0.01, 86400),
    "header_timeout_s": (0.01, 120),
    "body_timeout_s": (0.01, 120),
    "keep_alive_s": (0.01, 120),
    "stall_timeout_s": (0.01, 3600),
    "wait_note_s": (0.01, 120),
    "drain_s": (0, 3600),
    "body_limit_bytes": (1024, 64 * 2**20),
    "connections": (1, 2**20),
    "text_processes": (1, 64),
    "text_timeout_s": (0.05, 600),
    "buffer_bytes": (1024, 16 * 2**20),
    "engine_stall_s": (0.05, 3600),
    "engine_deaths": (1, 1000),
    "engine_deaths_within_s": (0.01, 86400),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server.

    Without ``keys`` everybody who reaches ``host`` may use the server, so it must be a loopback address. ``port`` 0
    takes a free one. ``allowed_hosts`` are other names of this server (of a proxy in front), ``allowed_origins`` sites
    whose pages may use it. With ``tls_cert`` and ``tls_key`` it speaks HTTPS. ``queue_size`` requests with
    ``queue_tokens`` prompt tokens together may wait ``queue_timeout_s`` for the engine. ``drain_s`` is what running
    requests get after a stop signal. A client that reads nothing for ``stall_timeout_s`` is dropped. A stream without
    tokens for ``wait_note_s`` gets a comment line. ``buffer_bytes`` of tokens may wait for a slow reader. Of
    ``connections`` fewer are taken where the limit of open files is lower. Long bodies are read in ``text_processes``,
    4 MiB for at most ``text_timeout_s``. An engine that is not heard of, or works on
    one step, for ``engine_stall_s`` is ended and started again; after ``engine_deaths`` ends within
    ``engine_deaths_within_s`` the server gives up.

    Raises:
        ConfigError: a value is out of range, or others can reach the host and there are no keys.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    keys: KeyRing | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    queue_size: int = 128
    queue_tokens: int = 262_144
    queue_timeout_s: float = 60.0
    request_timeout_s: float = 3600.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 5.0
    stall_timeout_s: float = 60.0
    wait_note_s: float = 15.0
    drain_s: float = 30.0
    body_limit_bytes: int = 4 * 2**20
    connections: int = 1024
    text_processes: int = 2
    text_timeout_s: float = 30.0
    buffer_bytes: int = 256 * 2**10
    engine_stall_s: float = 60.0
    engine_deaths: int = 3
    engine_deaths_within_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.loopback and self.keys is None:
            raise ConfigError(
                f"host is {self.host!r}, which other machines may reach, and there are no API keys; expected a "
                "loopback address such as 127.0.0.1, or --api-key-file with a file of keys",
                param="host",
            )
        for origin in self.allowed_origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                message = f"allowed origin is {origin!r}; expected a site such as https://chat.example"
                raise ConfigError(message, param="allowed_origins")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("expected both a TLS certificate and its key, or neither", param="tls_cert")
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

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        return _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
