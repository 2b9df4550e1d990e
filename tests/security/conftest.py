"""A server as a program, once as it is and once without asserts and docstrings, with all its processes watched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest
from command import served
from watching import SECRET, WATCH, Watched


@pytest.fixture(scope="session", params=["plain", "optimised"])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    notes = tmp_path_factory.mktemp("watch") / "notes"
    path = os.pathsep.join(filter(None, [str(WATCH), os.environ.get("PYTHONPATH")]))
    environment = {"WATCH_FILE": str(notes), "PYTHONPATH": path}
    optimised = request.param == "optimised"
    if optimised:
        # As ``python -OO -m mixtral serve``, and for every process that it starts.
        environment["PYTHONOPTIMIZE"] = "2"
    with (
        served("--api-key", SECRET, python=("-OO",) if optimised else (), environment=environment) as server,
        httpx.Client(base_url=server.address, headers={"authorization": f"Bearer {SECRET}"}, timeout=60) as client,
    ):
        yield Watched(server, optimised, client, notes)
