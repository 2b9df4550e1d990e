"""Replacing a checkpoint: whatever fails and whenever the process dies, a whole model is left and no mixture loads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.config import MixtralConfig, read_config
from mixtral.errors import CheckpointError, ConfigError, MixtralError
from mixtral.model.mixtral import Mixtral
from mixtral.weights import checkpoint, is_compact, load_compact, load_model, save_compact, save_model
from mixtral.weights.vocab import row_map

Save = Callable[[Mixtral, Path], None]
Step = Callable[[int], None]


def sharded(size_bytes: int) -> Save:
    return lambda model, folder: save_model(model, folder, shard_size_bytes=size_bytes, overwrite=True)


def compact(model: Mixtral, folder: Path) -> None:
    rows = row_map(range(model.config.vocab_size), model.config.vocab_size)
    save_compact(model, folder, row_of_id=rows, respell={}, metadata={})


ONE, TWO, THREE = sharded(10**9), sharded(200_000), sharded(130_000)
CHANGES: dict[str, tuple[Save, Save]] = {
    "the same shards": (TWO, TWO),
    "one file by shards": (ONE, TWO),
    "shards by one file": (TWO, ONE),
    "shards by fewer": (THREE, TWO),
    "compact by compact": (compact, compact),
    "shards by compact": (TWO, compact),
    "compact by shards": (compact, TWO),
}


class KilledError(BaseException):
    """Not an Exception, like an interrupt."""


@pytest.fixture
def models(small: MixtralConfig) -> list[Mixtral]:
    """Three models of equal shapes; value and config tell which one it is, so a mixture would not go unnoticed."""
    found = []
    for number in (1, 2, 3):
        model = Mixtral(
            small.replace(num_hidden_layers=1, max_position_embeddings=number), device="cpu", dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(127.0 * number)  # exact in groups of int8
        found.append(model)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path) -> int | None:
    """The number of the model that a reader gets; None for a clear refusal."""
    try:
        model = load_compact(folder, device="cpu").model if is_compact(folder) else load_model(folder, device="cpu")
    except (CheckpointError, ConfigError) as error:
        if "config.json" in str(error):
            return None
        raise
    number = model.config.max_position_embeddings
    assert all(bool((value == 127.0 * number).all()) for value in model.parameters()), "a mixture"
    return number


@contextmanager
def each_step(before: Step) -> Iterator[None]:
    """Call ``before`` with 1, 2, 3 ... ahead of every rename and every deletion."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink"):

            def step(*arguments: Any, original: Callable[..., None] = getattr(os, name)) -> None:
                nonlocal count
                count += 1
                before(count)
                original(*arguments)

            patch.setattr(os, name, step)
        yield


def survives(folder: Path, *whole: dict[str, bytes]) -> bool:
    """Whether every byte of one of these checkpoints is on the disk, under whatever names."""
    found = set(contents(folder).values())
    return any(set(files.values()) <= found for files in whole)


def written(tmp_path: Path, models: list[Mixtral], saves: list[Save]) -> list[dict[str, bytes]]:
    """What each save writes into an empty folder."""
    for number, (model, save) in enumerate(zip(models, saves, strict=True)):
        save(model, tmp_path / f"alone-{number}")
    return [contents(tmp_path / f"alone-{number}") for number in range(len(saves))]


@pytest.mark.parametrize("change", CHANGES)
def test_at_every_moment_one_of_the_two_is_whole(change: str, models: list[Mixtral], tmp_path: Path) -> None:
    saves = CHANGES[change]
    old, new = written(tmp_path, models[:2], list(saves))
    folder, seen = tmp_path / "model", []
    saves[0](models[0], folder)

    def check(number: int) -> None:
        assert survives(folder, old, new)
        seen.append(loaded(folder))

    with each_step(check):
        saves[1](models[1], folder)
    assert contents(folder) == new | {name: old[name] for name in old if name == "manifest.json" and name not in new}
    assert loaded(folder) == 2
    assert seen[0] == 1
    assert seen == [1] * seen.count(1) + [None] * seen.count(None) + [2] * seen.count(2)


@pytest.mark.parametrize("times", ["once", "from then on"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_step_can_fail(change: str, times: str, models: list[Mixtral], tmp_path: Path) -> None:
    """After one error the old model is there as it was, or the new one; if the disk refuses all, nothing is lost."""
    saves = CHANGES[change]
    old, new = written(tmp_path, models[:2], list(saves))
    outcomes = set()
    for failing in range(1, 40):
        folder, last = tmp_path / f"model-{failing}", 0
        saves[0](models[0], folder)

        def fail(number: int, failing: int = failing) -> None:
            nonlocal last
            last = number
            if number == failing or (number > failing and times == "from then on"):
                raise OSError(5, "Input/output error")

        told = ""
        with each_step(fail), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                saves[1](models[1], folder)
            except CheckpointError as error:
                told = str(error)
        assert survives(folder, old, new), told
        outcome = loaded(folder)
        outcomes.add(outcome)
        assert (outcome == 2) == (not told)
        if times == "once" and told:
            assert contents(folder) == old
        if outcome is None:
            assert "Nothing is lost" in told
            assert ".partial" in told
        if last < failing:
            break
    else:
        pytest.fail("it never came to an end")
    assert outcomes == ({1, 2} if times == "once" else {None, 1, 2})


@pytest.mark.parametrize("change", ["the same shards", "shards by fewer", "compact by compact"])
def test_killed_and_saved_again(change: str, models: list[Mixtral], tmp_path: Path) -> None:
    """What a killed save left is not destroyed before the next one is whole, and goes when that is in place."""
    saves = [*CHANGES[change], CHANGES[change][0]]
    whole = written(tmp_path, models, saves)
    for killed in range(1, 40):
        folder, last = tmp_path / f"model-{killed}", 0
        saves[0](models[0], folder)

        def kill(number: int, killed: int = killed) -> None:
            nonlocal last
            last = number
            if number >= killed:  # also what would clean up
                raise KilledError

        with each_step(kill), suppress(KilledError):
            saves[1](models[1], folder)
        if last < killed:
            break
        if loaded(folder) is None:
            with pytest.raises(ConfigError, match=r"was interrupted, so config\.json is missing. Nothing is lost: "):
                load_model(folder, device="cpu")

        def check(number: int, folder: Path = folder) -> None:
            assert survives(folder, *whole)
            loaded(folder)

        with each_step(check):
            saves[2](models[2], folder)
        assert loaded(folder) == 3
        assert contents(folder).keys() == whole[2].keys()
    else:
        pytest.fail("it never came to an end")


@pytest.mark.parametrize("kind", ["sharded", "compact"])
def test_replaced_while_it_was_read(
    kind: str, models: list[Mixtral], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that began with the old config must not come out with the new weights."""
    save, load = (TWO, load_model) if kind == "sharded" else (compact, load_compact)
    save(models[0], tmp_path)

    def slowly(path: Path) -> MixtralConfig:
        config = read_config(path)
        save(models[1], tmp_path)
        return config

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_config", slowly)
        with pytest.raises(MixtralError, match="was replaced while it was read; load it again"):
            load(tmp_path, device="cpu")
    assert loaded(tmp_path) == 2
