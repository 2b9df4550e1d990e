"""What the watch over a server's processes saw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from command import Served

SECRET = "sk-town-desk"
WATCH = Path(__file__).with_name("watch")


@dataclass(frozen=True)
class Watched:
    """A server, whether it runs under ``-OO``, a client with its key, and what its processes reached for."""

    server: Served
    optimised: bool
    client: httpx.Client
    notes: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        """All that the watch wrote."""
        return [json.loads(line) for line in self.notes.read_text(encoding="utf-8").splitlines()]
