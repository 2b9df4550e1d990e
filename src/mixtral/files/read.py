"""Copying values out of checkpoint files: mapped, in chunks whose pages are given back, decoded where they are blocks.

So a file is never in memory beside the parameters that were read from it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mixtral.errors import CheckpointError
from mixtral.files.ahead import POPULATE_READ, ReadAhead
from mixtral.ops.memory import empty
from mixtral.quant.decode import all_finite, decode_into
from mixtral.quant.formats import FORMATS

__all__ = ["DTYPES", "Entry", "ShardReader", "damaged"]

CHUNK_BYTES = 32 << 20
_CHECKED = 1 << 19  # values, which stay in the cache between being copied and being checked

DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor on disk: bytes ``start`` to ``stop`` of the file ``shard``."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def damaged(name: str) -> CheckpointError:
    """What is said of a tensor with NaN or infinities."""
    return CheckpointError(f"{name!r} holds NaN or infinities; the weights are damaged: `mixtral verify` says where")


class ShardReader:
    """Copies values out of files whose headers have been checked. A context manager; not for several threads.

    With ``ahead`` what follows in a file is read while the present values are used: for readers that go through it.
    With ``finite`` NaN and infinities are refused.
    """

    def __init__(self, *, ahead: bool = False, finite: bool = False) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self.finite = finite
        self._ahead = ReadAhead() if ahead else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead.close()
        # Closed by reference count: an explicit close would fail while an exception still holds a view.
        self._maps.clear()

    def read(self, entry: Entry, target: Tensor, *, first: int = 0) -> None:
        """Copy values of a tensor, from number ``first`` on, into ``target``: contiguous, on any device, any dtype.

        Blocks of quantised formats are decoded; ``first`` and the size of ``target`` are then whole blocks.

        Raises:
            CheckpointError: the file changed since its header was read, a value does not fit into float16, or is
                refused.
        """
        flat, dtype = target.view(-1), DTYPES.get(entry.dtype)
        values, size = (1, dtype.itemsize) if dtype else (FORMATS[entry.dtype].values, FORMATS[entry.dtype].bytes)
        step = CHUNK_BYTES // size
        for low in range(0, flat.numel() // values, step):
            count = min(step, flat.numel() // values - low)
            start = entry.start + (first // values + low) * size
            with self._bytes(entry, start, count * size) as part:
                into = flat[low * values : (low + count) * values]
                if dtype is None:
                    if self.finite and not all_finite(part.view(count, size), entry.dtype):
                        raise damaged(entry.name)
                    decode_into(part.view(count, size), entry.dtype, into.view(count, values))
                else:
                    # A header may have any length, so the values need not be aligned.
                    self._copy(entry, (part if start % size == 0 else part.clone()).view(dtype), into)
        if dtype != torch.float16:
            self.check_finite(entry, target)

    def _copy(self, entry: Entry, values: Tensor, target: Tensor) -> None:
        if not self.finite or not values.is_floating_point():
            target.copy_(values)
            return
        wide = torch.float32 if values.dtype == torch.float16 else None  # 65504 and 65504 would be infinite
        for some, into in zip(torch.split(values, _CHECKED), torch.split(target, _CHECKED), strict=True):
            into.copy_(some)
            # A sum of numbers is a number, but for overflow: then they are looked at one by one.
            if not bool(some.sum(dtype=wide).isfinite()) and not bool(some.isfinite().all()):
                raise damaged(entry.name)

    def check_finite(self, entry: Entry, target: Tensor) -> None:
        """Refuse values of a tensor that were cast to float16 and did not fit.

        Raises:
            CheckpointError: there are such.
        """
        if target.dtype == torch.float16 and not bool(target.isfinite().all()):
            raise CheckpointError(
                f"{entry.name!r} holds values beyond the range of float16 (65504); load it as bfloat16 or float32"
            )

    def raw(self, entry: Entry, *, first: int, count: int) -> Tensor:
        """The bytes of ``count`` values from number ``first`` on, as they are in the file: uint8."""
        with self.raw_view(entry, first=first, count=count) as part:
            # Not clone: blocks of some 30 MB come from the heap, and what is allocated between them keeps it from
            # shrinking (4 GB of weights took 6).
            return empty(tuple(part.shape), part.dtype).copy_(part)

    @contextmanager
    def raw_view(self, entry: Entry, *, first: int, count: int) -> Iterator[Tensor]:
        """As ``raw``, but memory of the file, to be read inside this context only."""
        size = entry.stop - entry.start
        values = math.prod(entry.shape)
        with self._bytes(entry, entry.start + size * first // values, size * count // values) as part:
            yield part

    @contextmanager
    def _bytes(self, entry: Entry, start: int, count: int) -> Iterator[Tensor]:
        """A view of the file, whose pages are given back afterwards."""
        data = self._map(entry)
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        size = start + count - page
        if self._ahead is None or not self._ahead.need(data, page, start + count):
            with contextlib.suppress(OSError):  # before Linux 5.14 every page is mapped when it is read
                data.madvise(POPULATE_READ, page, size)
        yield torch.frombuffer(data, dtype=torch.uint8, count=count, offset=start)
        if self._ahead is None or not self._ahead.release(data, page, size):
            data.madvise(mmap.MADV_DONTNEED, page, size)

    def _map(self, entry: Entry) -> mmap.mmap:
        data = self._maps.get(entry.shard)
        if data is None:
            try:
                with entry.shard.open("rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{entry.shard.name}: cannot be read ({error})") from None
            self._maps[entry.shard] = data
        if entry.stop > len(data):
            raise CheckpointError(f"{entry.shard.name}: became shorter while it was read")
        return data
