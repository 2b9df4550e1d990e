"""Every buffer of the kernels between pages that nobody may touch: python guards.py LEVEL ENCODER_LEVEL.

A byte too far is a signal that ends the process. Run by test_guards.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtral import _native

PAGE = mmap.PAGESIZE
K_BYTES = (84, 110, 144, 176, 210)  # of a block of 256 values: Q2_K to Q6_K
COUNTS = (1, 2, 3, 5, 7, 8, 17)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guard:
    """Arrays that end where a forbidden page begins, or begin where one ends."""

    def __init__(self, *, at_end: bool) -> None:
        self.at_end = at_end
        self.rng = np.random.default_rng(0)
        self._maps: list[mmap.mmap] = []

    def put(self, values: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array between two such pages."""
        values = np.ascontiguousarray(values)
        room = max(PAGE, -(-values.nbytes // PAGE) * PAGE)
        memory = mmap.mmap(-1, room + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append(memory)
        whole = np.frombuffer(memory, np.uint8)
        for start in (whole.ctypes.data, whole.ctypes.data + PAGE + room):
            if _libc.mprotect(start, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = PAGE + (room - values.nbytes if self.at_end else 0)
        found = whole[first : first + values.nbytes].view(values.dtype).reshape(values.shape)
        found[...] = values
        return found

    def floats(self, *shape: int) -> NDArray[np.float32]:
        return self.put(self.rng.standard_normal(shape).astype(np.float32))

    def empty(self, *shape: int, dtype: type = np.float32) -> NDArray[Any]:
        return self.put(np.zeros(shape, dtype))

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        return self.put(self.rng.integers(0, 120, shape, dtype=np.uint8))

    def release(self) -> None:
        """Forget the pages, so that the next case has the address space."""
        self._maps.clear()


def plain(guard: Guard, kind: int, rows: int, columns: int) -> Any:
    """A matrix of bfloat16, float16 or float32."""
    values = guard.rng.standard_normal((rows, columns)).astype(np.float32)
    if kind == 0:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    elif kind == 1:
        values = values.astype(np.float16)
    return _native.DenseMatrix(kind, rows, columns, guard.put(values.view(np.uint8).reshape(-1)))


def packed(guard: Guard, kind: int, rows: int, columns: int, group: int = 0) -> Any:
    """A matrix in panels; what it is made from, and what it is turned back into, have guards too."""
    matrix = _native.PackedMatrix(
        kind, rows, columns, group, guard.empty(_native.panel_bytes(kind, rows, columns, group), dtype=np.uint8)
    )
    if kind < 5:
        shape = (rows, columns // 256 * K_BYTES[kind])
        blocks, back = guard.bytes(*shape), guard.empty(*shape, dtype=np.uint8)
        matrix.pack_blocks(blocks, 2)
        matrix.unpack_blocks(back, 2)
        if not np.array_equal(blocks, back):
            raise RuntimeError("packing has lost bits")
        return matrix
    bits = 4 if kind == 5 else 8
    codes, zeros = guard.bytes(rows, columns * bits // 8), guard.bytes(rows, columns // group)
    scales = guard.put(guard.rng.standard_normal((rows, columns // group)).astype(np.float16).view(np.uint16))
    matrix.pack_groups(codes, bits, scales, zeros, 2)
    numbers = codes if bits == 8 else np.stack((codes & 15, codes >> 4), -1).reshape(rows, columns)
    back = [guard.empty(*part.shape, dtype=part.dtype.type) for part in (numbers, scales, zeros)]
    matrix.unpack_groups(*back, 2)
    if not all(np.array_equal(a, b) for a, b in zip(back, (numbers, scales, zeros), strict=True)):
        raise RuntimeError("packing has lost bits")
    return matrix


def matrices(guard: Guard) -> Iterator[tuple[Any, int, int]]:
    """Matrices of every kind, with their rows and columns."""
    for rows in (1, 15, 16, 17, 70):
        for kind in range(5):
            for columns in (256, 768):
                yield packed(guard, kind, rows, columns), rows, columns
        for kind in (5, 6):
            for group, columns in ((32, 32), (32, 96), (64, 192), (128, 128), (256, 512)):
                yield packed(guard, kind, rows, columns, group), rows, columns
        for kind in range(3):
            for columns in (1, 2, 15, 17, 31, 32, 33, 61, 130, 1057):
                yield plain(guard, kind, rows, columns), rows, columns


def products(guard: Guard, level: str) -> None:
    """Products with every kind of matrix, with and without norm and residual."""
    for matrix, rows, columns in matrices(guard):
        for count in COUNTS:
            x, out = guard.floats(count, columns), guard.empty(count, rows)
            _native.project(x, [matrix], out, 2, level=level)
            norm, beside = guard.floats(columns), guard.floats(count, rows)
            _native.project(x, [matrix], out, 1, norm, 1e-5, beside, level)
        guard.release()
    parts = [plain(guard, kind, rows, 61) for kind, rows in ((0, 7), (1, 64), (2, 3))]
    _native.project(guard.floats(9, 61), parts, guard.empty(9, 74), 2, level=level)
    x = guard.floats(5, 61)
    _native.norm(x, guard.floats(61), 1e-5, guard.empty(5, 61), level)


def mixtures(guard: Guard, level: str) -> None:
    """Router and experts of every kind."""
    makers: list[tuple[Any, int, int]] = [(lambda k, r, c: plain(guard, k, r, c), kind, 45) for kind in range(3)]
    makers += [(lambda k, r, c: packed(guard, k, r, c), kind, 256) for kind in range(5)]
    makers += [(lambda k, r, c: packed(guard, k, r, c, 32), kind, 96) for kind in (5, 6)]
    for make, kind, width in makers:
        hidden = width + (0 if width == 256 else 32 if width == 96 else 16)
        shapes = ((hidden, width), (hidden, width), (width, hidden))
        experts = _native.ExpertSet(*([make(kind, *shape) for _ in range(3)] for shape in shapes))
        for count in (1, 5, 70):
            x, router, out = guard.floats(count, width), guard.floats(3, width), guard.empty(count, width)
            logits, shares = guard.empty(count, 3), guard.empty(count, 2)
            picks = guard.empty(count, 2, dtype=np.int64)
            norm, beside = guard.floats(width), guard.floats(count, width)
            _native.mixture(x, router, experts, out, logits, picks, shares, 2, norm, 1e-5, beside, level)
            _native.experts(x, picks, shares, experts, out, 2, level)
        guard.release()


def attention(guard: Guard, level: str) -> None:
    """Prompts and single tokens over pages of every kind, the last of which ends where the store does."""
    for queries, keys, size in ((4, 2, 32), (5, 5, 6), (14, 2, 20), (6, 1, 48), (2, 1, 128)):
        for kind in range(3):
            store = guard.empty(3, keys, _native.block_bytes(size, kind), dtype=np.uint8)
            store[...] = 0xFF
            for spans in ([([0, 2], 0, 70)], [([0, 2], 70, 1), ([1], 0, 3)], [([0, 2], 71, 57)]):
                tokens = sum(count for _, _, count in spans)
                qkv, out = guard.floats(tokens, (queries + 2 * keys) * size), guard.empty(tokens, queries * size)
                angles = guard.floats(tokens, size // 2), guard.floats(tokens, size // 2)
                _native.attend(qkv, *angles, _native.Spans(spans), store, out, size, kind, 2, level)
        guard.release()


def encoders(guard: Guard, level: str) -> None:
    """Weight encoders, with and without importance."""
    formats = {"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
    for name, (values, size) in (formats | {"Q4_0": (32, 18), "Q8_0": (32, 34)}).items():
        for rows, blocks in ((1, 1), (3, 3), (17, 2)):
            x, out = guard.floats(rows, values * blocks), guard.empty(rows, size * blocks, dtype=np.uint8)
            importance = np.abs(guard.floats(values * blocks))
            for weights in (None, None if name == "Q8_0" else guard.put(importance)):
                _native.encode(name, x, weights, out, 2, level)
        guard.release()
    for bits in (3, 4):
        for group in (32, 64, 128):
            for rows, groups in ((1, 1), (3, 3), (17, 2)):
                columns = group * groups
                codes, scales = (
                    guard.empty(rows, columns // 8 * bits, dtype=np.uint8),
                    guard.empty(rows, groups, dtype=np.uint16),
                )
                for weights in (None, guard.put(np.abs(guard.floats(columns)))):
                    _native.encode_groups(guard.floats(rows, columns), bits, group, weights, codes, scales, 2, level)
            guard.release()


def main(level: str, encoder_level: str) -> None:
    """All of it, with guards behind and in front."""
    faulthandler.enable()
    for at_end in (True, False):
        guard = Guard(at_end=at_end)
        products(guard, level)
        mixtures(guard, level)
        attention(guard, level)
        encoders(guard, encoder_level)
        _native.read_speed(guard.bytes(1280), 2, 0.0, level)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
