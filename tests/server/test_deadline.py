"""A limit that is used for many waits: what comes in time, too late, or is cancelled by somebody else."""

from __future__ import annotations

import asyncio
import time

import pytest

from mixtral.server.deadline import Deadline


def test_waits_that_end_in_time_and_one_that_does_not() -> None:
    async def use() -> float:
        deadline = Deadline()
        for _ in range(50):
            with deadline.within(5.0):
                await asyncio.sleep(0.0)
        began = time.monotonic()
        with pytest.raises(TimeoutError), deadline.within(0.05):
            await asyncio.sleep(60.0)
        with deadline.within(5.0):  # and it can be used again
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    assert 0.05 <= asyncio.run(use()) < 5.0


def test_each_wait_has_its_own_limit_whatever_timer_runs() -> None:
    async def use() -> None:
        deadline = Deadline()
        with deadline.within(0.05):
            pass
        with deadline.within(60.0):  # the timer of the wait before fires meanwhile
            await asyncio.sleep(0.2)
        with pytest.raises(TimeoutError), deadline.within(0.05):
            await asyncio.sleep(60.0)

    asyncio.run(use())


def test_longer_than_a_tick_of_its_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.server.deadline._TICK_S", 0.02)

    async def use() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError), Deadline().within(0.15):
            await asyncio.sleep(60.0)
        return time.monotonic() - began

    assert asyncio.run(use()) >= 0.15


def test_no_time_left_is_still_enough_for_what_is_there() -> None:
    async def use() -> None:
        ready = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        with Deadline().within(0.0):
            await ready
        with pytest.raises(TimeoutError), Deadline().within(0.0):
            await asyncio.sleep(60.0)

    asyncio.run(use())


def test_a_cancellation_by_somebody_else_stays_one() -> None:
    async def use() -> None:
        deadline = Deadline()

        async def wait() -> None:
            with deadline.within(60.0):
                await asyncio.sleep(60.0)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Both at once: the one from outside counts.
        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        deadline._due = 0.0
        deadline._look(asyncio.get_running_loop())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(use())


def test_two_tasks_cannot_share_one() -> None:
    async def use() -> None:
        deadline = Deadline()

        async def wait() -> None:
            with deadline.within(60.0):
                await asyncio.sleep(60.0)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="one task"):
            await wait()
        task.cancel()

    asyncio.run(use())


def test_it_leaves_no_timer_behind_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral.server.deadline._TICK_S", 0.02)

    async def use() -> None:
        deadline = Deadline()
        with deadline.within(3600.0):
            await asyncio.sleep(0.0)
        await asyncio.sleep(0.1)
        assert deadline._timer is None

    asyncio.run(use())
