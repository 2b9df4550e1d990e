"""API keys: a file of SHA-256 digests with names, scopes and limits, and who has used how much."""

from __future__ import annotations

import hashlib
import hmac
import math
import stat
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import Scope

from mixtral.errors import ConfigError
from mixtral.server.errors import ApiError, show

__all__ = ["Holder", "Key", "KeyRing", "Quota", "holder_of"]

_SCOPES = frozenset({"api", "metrics"})
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent")
_FILE_BYTES = 2**20
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of the file. Scope "api" opens every route, "metrics" only ``/metrics``. None is no limit."""

    name: str
    sha256: str
    scopes: frozenset[str] = frozenset({"api"})
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


@dataclass(slots=True)
class Quota:
    """A store that fills up within a minute; what is taken may be more than is left, and then has to be waited for."""

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    _left: float = field(init=False)
    _when: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._when = float(self.per_minute), self.clock()

    def wait_s(self) -> float:
        """Seconds until something may be taken; 0 if it may now."""
        now = self.clock()
        self._left = min(float(self.per_minute), self._left + (now - self._when) * self.per_minute / 60)
        self._when = now
        return 0.0 if self._left >= 1 else (1 - self._left) * 60 / self.per_minute

    def take(self, amount: int) -> None:
        """Take so much."""
        self.wait_s()
        self._left -= amount


class Holder:
    """Who holds a key, and what they have used of its limits. Outlives a new reading of the file."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self._running = 0
        self._requests = None if key.requests_per_minute is None else Quota(key.requests_per_minute)
        self._tokens = None if key.tokens_per_minute is None else Quota(key.tokens_per_minute)

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.key.name

    def enter(self) -> None:
        """One more request; ``leave`` must follow. Raises ApiError 429 when a limit is reached."""
        if self.key.concurrent is not None and self._running >= self.key.concurrent:
            raise _limited(f"{self._running} requests of this key are running, the most it may have", 1.0)
        for quota, unit in ((self._requests, "requests"), (self._tokens, "tokens")):
            if quota is not None and (wait := quota.wait_s()) > 0:
                raise _limited(f"this key may use {quota.per_minute} {unit} per minute", wait)
        if self._requests is not None:
            self._requests.take(1)
        self._running += 1

    def leave(self) -> None:
        """A request has ended."""
        self._running -= 1

    def charge(self, tokens: int) -> None:
        """Tokens that were read or made for this holder."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def renewed(self, key: Key) -> Holder:
        """The holder of the same name after the file was read again: the same one unless the limits changed."""
        if all(getattr(key, name) == getattr(self.key, name) for name in _LIMITS):
            self.key = key
            return self
        return Holder(key)


class KeyRing:
    """All keys of a server.

    Raises:
        ConfigError: there is no key, or two of one name.
    """

    def __init__(self, keys: Sequence[Key], path: Path | None = None) -> None:
        self._path = path
        self._fixed = tuple(keys) if path is None else ()
        self._holders: dict[str, Holder] = {}
        self._set(keys)

    @classmethod
    def load(cls, path: Path, *, more: Sequence[str] = ()) -> KeyRing:
        """The keys of a TOML file that nobody else can read, and keys given in the clear besides.

        Raises:
            ConfigError: the file cannot be used; the message says why.
        """
        ring = cls([*_read(path), *_plain(more)], path)
        ring._fixed = tuple(_plain(more))
        return ring

    @classmethod
    def of(cls, keys: Sequence[str]) -> KeyRing:
        """Keys given in the clear: hashed at once, with every right and no limit."""
        return cls(_plain(keys))

    def reload(self) -> None:
        """Read the file again. Raises ConfigError, and keeps the old keys, if it cannot be used."""
        if self._path is not None:
            self._set([*_read(self._path), *self._fixed])

    def find(self, secret: str) -> Holder | None:
        """Whose key this is. Compared with every digest, in constant time."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for holder in self._holders.values():
            if hmac.compare_digest(holder.key.sha256, digest):
                found = holder
        return found

    def _set(self, keys: Sequence[Key]) -> None:
        if not keys:
            raise ConfigError("there is no API key; expected at least one", param="keys")
        holders: dict[str, Holder] = {}
        for key in keys:
            if key.name in holders:
                raise ConfigError(f"two API keys are called {key.name!r}; give each its own name", param="keys")
            old = self._holders.get(key.name)
            holders[key.name] = Holder(key) if old is None else old.renewed(key)
        self._holders = holders


def holder_of(scope: Scope) -> Holder | None:
    """Who sent a request; None on a server without keys."""
    holder = scope.get("mixtral.holder")
    return holder if isinstance(holder, Holder) else None


def _limited(message: str, wait_s: float) -> ApiError:
    headers = {"retry-after": str(max(1, math.ceil(wait_s)))}
    return ApiError(429, "rate_limit_exceeded", f"{message}; try again later", headers=headers)


def _plain(keys: Sequence[str]) -> list[Key]:
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or len(key) < 8:
            raise ConfigError(
                "an API key is too short or has odd characters; expected 8 or more visible ASCII characters"
            )
    return [
        Key(name=f"key-{place}", sha256=hashlib.sha256(key.encode()).hexdigest()) for place, key in enumerate(keys, 1)
    ]


def _read(path: Path) -> list[Key]:
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            content = file.read(_FILE_BYTES + 1)
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise _broken(path, f"can be read by others (mode {stat.S_IMODE(mode):o}); run: chmod 600 {path}")
    if len(content) > _FILE_BYTES:
        raise _broken(path, f"has more than {_FILE_BYTES} bytes")
    try:
        entries = tomllib.loads(content.decode())
    except ValueError as error:
        raise _broken(path, f"is not TOML: {error}") from error
    if set(entries) != {"key"} or not isinstance(entries["key"], list):
        raise _broken(path, "expected tables [[key]] and nothing else")
    return [_key(path, place, entry) for place, entry in enumerate(entries["key"])]


def _key(path: Path, place: int, entry: Mapping[str, Any]) -> Key:
    where = f"key {place + 1}"
    unknown = set(entry) - {"name", "sha256", "scopes", *_LIMITS}
    if unknown:
        raise _broken(path, f"{where} has the unknown entry {sorted(unknown)[0]!r}")
    name, digest = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not 1 <= len(name) <= 64 or not name.isprintable():
        raise _broken(path, f"{where}: name is {show(name)}; expected 1 to 64 printable characters")
    if not isinstance(digest, str) or len(digest) != 64 or not _HEX.issuperset(digest.lower()):
        raise _broken(path, f"{where}: sha256 is no digest; expected 64 hexadecimal digits of the key's SHA-256")
    scopes = entry.get("scopes", ["api"])
    if not isinstance(scopes, list) or not scopes or not all(scope in _SCOPES for scope in scopes):
        raise _broken(path, f"{where}: scopes is {show(scopes)}; expected a list of {', '.join(sorted(_SCOPES))}")
    limits = {limit: entry[limit] for limit in _LIMITS if limit in entry}
    for limit, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**12:
            raise _broken(path, f"{where}: {limit} is {show(value)}; expected a positive integer")
    return Key(name=name, sha256=digest.lower(), scopes=frozenset(scopes), **limits)


def _broken(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"the key file {path} {reason}", param="api_key_file")
