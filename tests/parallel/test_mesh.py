"""Joining: what a launcher must say, and a private meeting point."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pool import Ranks

from mixtral.errors import ConfigError, TrainingError
from mixtral.parallel import mesh
from mixtral.parallel.plan import Axes


@pytest.fixture
def started_as(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The variables of rank 0 of 2 on this machine, with a private folder."""
    tmp_path.chmod(0o700)
    for name, value in mesh.rank_variables(0, 2, tmp_path / "store").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_alone_needs_nobody() -> None:
    one = mesh.alone()
    values = torch.tensor([1.5])
    assert one.is_first
    assert one.is_alone
    assert one.sum(values) is values
    assert one.gather(values) == [values]
    assert one.any(True)
    assert not one.any(False)
    with pytest.raises(TrainingError, match="there is no axis dp"):
        one.group("dp")


def test_a_launch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not mesh.in_a_launch()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert mesh.in_a_launch()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", [None, "", "two"])
def test_a_missing_variable_is_named(started_as: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    if value is None:
        started_as.delenv(name)
    else:
        started_as.setenv(name, value)
    with pytest.raises(ConfigError, match=f"the launcher variable {name} is '{value or ''}'"), mesh.join(Axes(dp=2)):
        pytest.fail("joined")


def test_another_number_of_processes_is_refused(started_as: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match="dp=2 times tp=2 needs 4 processes; 2 were started"),
        mesh.join(Axes(dp=2, tp=2)),
    ):
        pytest.fail("joined")


def test_a_folder_that_others_can_open_is_refused(started_as: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"closed to others .mode 0700"), mesh.join(Axes(dp=2), device="cpu"):
        pytest.fail("joined")


def test_ranks_of_one_machine_stay_on_the_loopback_interface() -> None:
    environment = {"NCCL_SOCKET_IFNAME": "ib0"}
    mesh._stay_inside(environment)
    assert environment == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.slow
def test_a_rank_that_never_comes_is_an_error_in_time(started_as: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(TrainingError, match="rank 0 of 2 cannot meet the others"),
        mesh.join(Axes(dp=2), device="cpu", timeout_s=1.0),
    ):
        pytest.fail("joined")


def test_sums_and_words_of_all_ranks(two: Ranks) -> None:
    assert two("jobs:talk", "dp=2") == [(3.0, [1.0, 2.0], True, False)] * 2
    assert two("jobs:talk", "tp=2") == [(3.0, [1.0, 2.0], True, False)] * 2


def test_listening_sockets_are_on_the_loopback_interface_alone(two: Ranks) -> None:
    if not Path("/proc/net/tcp").exists() or not hasattr(os, "getuid"):
        pytest.skip("needs /proc")
    for found in two("jobs:listening", "dp=2"):
        assert found
        assert set(found) == {"127.0.0.1"}
