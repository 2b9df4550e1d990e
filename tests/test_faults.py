"""Failpoints: nothing fails unless a list says so, and nothing a user can write reaches that list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral import faults
from mixtral.errors import ConfigError

PACKAGE = Path(faults.__file__).parent


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    faults.install([])


def test_nothing_fails_without_a_list() -> None:
    assert faults.installed() == []
    for step in range(100):
        faults.act(step, [[step]])
        assert [faults.fails("alloc"), faults.fails("page"), faults.poisons([step])] == [False] * 3
    assert not faults.matchers_fail()
    assert faults.channel_fault() is None


@pytest.mark.parametrize(
    "point",
    [
        "",
        "step",
        "step:x:raise",
        "step:1:sleep",
        "step:-1:raise",
        "alloc:fail:",
        "ipc:long",
        "matcher:ok",
        "step:1:raise:2",
    ],
)
def test_an_unknown_point_is_refused_and_changes_nothing(point: str) -> None:
    faults.install(["matcher:error"])
    with pytest.raises(ConfigError, match="no failpoint"):
        faults.install(["step:1:raise", point])
    assert faults.installed() == ["matcher:error"]


def test_points_fire_where_they_say() -> None:
    faults.install(["step:3:raise", "prompt:77:raise", "logits:nan:5", "alloc:fail:2", "page:fail:1", "ipc:short"])
    for step in (1, 2, 4):
        faults.act(step, [[1, 2]])
    with pytest.raises(faults.FaultError, match="step:3"):
        faults.act(3)
    with pytest.raises(faults.FaultError, match="prompt:77"):
        faults.act(9, [[1], [5, 77]])
    assert [faults.fails("alloc") for _ in range(4)] == [False, True, False, False]
    assert [faults.fails("page") for _ in range(2)] == [True, False]
    assert (faults.poisons([1, 5]), faults.poisons([1])) == (True, False)
    assert faults.channel_fault() == "short"


def test_only_the_worker_installs_points_and_no_command_fills_its_list() -> None:
    """``install`` is called in worker.py alone, and ``Start(faults=...)`` nowhere in the package."""
    installs, fills = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.install":
                installs.add(path.name)
            if isinstance(node, ast.keyword) and node.arg == "faults":
                fills.add(path.name)
    assert installs == {"worker.py"}
    assert fills == set()
