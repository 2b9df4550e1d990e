"""Each read of a loader fails in turn, or gives less than was asked for: a clean refusal, or the whole model."""

from __future__ import annotations

import errno
import io
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral.errors import MixtralError
from mixtral.model.mixtral import Mixtral
from mixtral.weights.compact import load_compact, save_compact
from mixtral.weights.load import load_model
from mixtral.weights.save import save_model

Make = Callable[..., Mixtral]


class Point:
    """Counts what touches a file; the one with the number ``failing`` fails."""

    def __init__(self, failing: int, kind: str) -> None:
        self.failing, self.kind, self.count = failing, kind, 0

    def __call__(self, *, short: bool) -> bool:
        """One more; whether to give back less. Raises OSError for one that is to fail."""
        self.count += 1
        if self.count != self.failing:
            return False
        if short and self.kind == "short":
            return True
        raise OSError(errno.EIO, "Input/output error")


class Reader:
    """A file whose reads are points."""

    def __init__(self, file: Any, point: Point) -> None:
        self._file, self._point = file, point

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        return data[: len(data) // 2] if self._point(short=True) else data

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def watch(patch: pytest.MonkeyPatch, folder: Path, point: Point) -> None:
    """Opening, reading and mapping what is below a folder are points."""
    opened, mapped = io.open, mmap.mmap

    def open_(path: Any, mode: str = "r", *args: Any, **fields: Any) -> Any:
        if not isinstance(path, Path) or folder not in path.parents or mode != "rb":
            return opened(path, mode, *args, **fields)
        point(short=False)
        return Reader(opened(path, mode, *args, **fields), point)

    class Mapped(mapped):  # type: ignore[misc,valid-type]
        def __new__(cls, *args: Any, **fields: Any) -> Any:
            point(short=False)
            return mapped(*args, **fields)

    patch.setattr(io, "open", open_)
    patch.setattr(mmap, "mmap", Mapped)


def shards(model: Mixtral, folder: Path) -> None:
    save_model(model, folder, shard_size_bytes=100_000)


def compact(model: Mixtral, folder: Path) -> None:
    save_compact(model, folder, row_of_id=torch.arange(80, dtype=torch.int32), respell={}, metadata={})


KINDS: dict[str, tuple[Callable[[Mixtral, Path], None], Callable[[Path], Mixtral]]] = {
    "shards": (shards, lambda path: load_model(path, device="cpu")),
    "compact": (compact, lambda path: load_compact(path, device="cpu").model),
}


@pytest.mark.parametrize("failure", ["eio", "short"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_read_can_fail(
    kind: str, failure: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, load = KINDS[kind]
    path = tmp_path / "model"
    save(make(), path)
    whole = {name: value.clone() for name, value in load(path).named_parameters()}
    refused = 0
    for failing in range(1, 500):
        point = Point(failing, failure)
        with monkeypatch.context() as patch:
            watch(patch, tmp_path, point)
            try:
                model = load(path)
            except (MixtralError, OSError) as error:
                refused += bool(str(error))
            else:
                for name, value in model.named_parameters():
                    assert torch.equal(value, whole[name]), name
        if point.count < failing:
            break
    else:
        pytest.fail("it never came to an end")
    print(f"{failing - 1} points of a read, {refused} refusals: {kind}, {failure}")
    assert failing > 4
    assert refused == failing - 1 if failure == "eio" else refused > failing // 2
