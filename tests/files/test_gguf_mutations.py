"""GGUF files damaged at random, and large on purpose: a checked result or one line, in little time and memory."""

from __future__ import annotations

import math
import os
import random
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mixtral.errors import CheckpointError
from mixtral.files import gguf as module
from mixtral.files.gguf import Gguf, read_gguf
from mixtral.files.gguf_write import GgufRecord, write_gguf
from mixtral.quant.formats import FORMATS

NUMBERS = (0, 1, 2, 3, 4, 9, 31, 32, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A small file with every kind of value, alignment 64, and three tensors, two of them padded."""
    path = tmp_path / "whole.gguf"
    metadata = {
        "general.architecture": "llama",
        "general.quantized": True,
        "llama.rope.freq_base": 1e6,
        "llama.expert_count": 8,
        "split.count": np.uint16(1),
        "tokens": ["<s>", "é", "", "\udcff"],
        "types": [1, 2, 3],
        "flags": [True, False],
        "nested": [[1, 2], ["a"], [[0.5]]],
    }
    records = [
        GgufRecord("a", "F32", (5,), lambda: [np.zeros(20, np.uint8)]),
        GgufRecord("b", "Q4_K", (2, 256), lambda: [np.zeros(288, np.uint8)]),
        GgufRecord("c", "Q8_0", (2, 1, 32), lambda: [np.zeros(68, np.uint8)]),
    ]
    write_gguf(path, metadata, records, alignment=64)
    return path.read_bytes()


def header_size(path: Path) -> int:
    return min(entry.start for entry in read_gguf(path).tensors.values())


def check(found: Gguf, size: int) -> None:
    """What a parsed file must fulfil, whatever it says."""
    stop = 24
    for entry in sorted(found.tensors.values(), key=lambda entry: entry.start):
        form = FORMATS[entry.dtype]
        assert stop <= entry.start < entry.stop <= size
        assert entry.stop - entry.start == math.prod(entry.shape) * form.bytes // form.values
        assert 1 <= len(entry.shape) <= 4
        assert entry.shape[-1] % form.values == 0
        assert entry.start % found.metadata.get("general.alignment", 32) == 0
        stop = entry.stop
    assert all(name == entry.name for name, entry in found.tensors.items())
    assert all(isinstance(key, str) for key in found.metadata)


def outcome(data: bytes, path: Path) -> str:
    """'read' or 'refused'; anything else fails the test."""
    path.write_bytes(data)
    try:
        found = read_gguf(path)
    except CheckpointError as error:
        message = str(error)
    else:
        check(found, len(data))
        return "read"
    assert message.startswith(f"{path.name}: ")
    assert "\n" not in message
    assert len(message) < 600
    return "refused"


def mutate(data: bytes, header: int, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at, kind = dice.randrange(header), dice.randrange(7)
        if kind == 0:
            changed[at % len(changed)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = dice.randbytes(1)
        elif kind == 2:
            changed[at:at] = dice.randbytes(dice.randint(1, 16))
        elif kind == 3:
            del changed[at : at + dice.randint(1, 16)]
        elif kind == 4:
            del changed[dice.randrange(1, len(changed)) :]
        elif kind == 5:
            changed[at : at + 8] = struct.pack("<Q", dice.choice(NUMBERS))
        else:
            changed[at : at + 4] = struct.pack("<I", dice.choice(NUMBERS) % 2**32)
    return bytes(changed)


def test_random_mutations(whole: bytes, tmp_path: Path) -> None:
    path, dice = tmp_path / "mutant.gguf", random.Random(20)
    header = header_size(tmp_path / "whole.gguf")
    outcomes: Counter[str] = Counter()
    for _ in range(3_000):
        outcomes[now := outcome(mutate(whole, header, dice), path)] += 1
        if now == "read" and outcomes["read"] <= 100:
            peers = {tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in GGUFReader(path).tensors}
            ours = read_gguf(path).tensors.values()
            assert {entry.name: (entry.start, entry.stop - entry.start) for entry in ours} == peers
    assert outcomes["read"] > 100
    assert outcomes["refused"] > 1_000


def test_every_field_of_the_header_set_to_extremes(whole: bytes, tmp_path: Path) -> None:
    """At every byte of the header a number of 8 bytes, whether or not a field starts there."""
    path, header = tmp_path / "mutant.gguf", header_size(tmp_path / "whole.gguf")
    edits = [(at, number) for at in range(4, header - 8) for number in (0, 1, 2**31, 2**63, 2**64 - 1)]
    outcomes = Counter(outcome(whole[:at] + struct.pack("<Q", n) + whole[at + 8 :], path) for at, n in edits)
    assert outcomes["refused"] > outcomes["read"] > 100


def test_mutants_take_little_memory(whole: bytes, tmp_path: Path) -> None:
    path, dice = tmp_path / "mutant.gguf", random.Random(21)
    header = header_size(tmp_path / "whole.gguf")
    tracemalloc.start()
    try:
        for _ in range(300):
            outcome(mutate(whole, header, dice), path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# Version 3, two tensors and one key: so that what follows is looked at.
COUNTED = struct.pack("<IQQ", 3, 2, 1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from((b"", b"\3\0\0\0", COUNTED)), rest=st.binary(max_size=300))
@example(start=COUNTED + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 3), rest=bytes(200))
@example(start=COUNTED + struct.pack("<Q1sIB", 1, b"k", 7, 1), rest=bytes(200))
def test_any_bytes_after_the_magic(start: bytes, rest: bytes, tmp_path: Path) -> None:
    outcome(b"GGUF" + start + rest, tmp_path / "any.gguf")


# --- time and memory --------------------------------------------------------------------------------------------------

U8, I32, F32, STRING, ARRAY = 0, 5, 6, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(keys: list[bytes], infos: Iterable[bytes] = ()) -> bytes:
    infos = list(infos)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join([*keys, *infos])
    return head + bytes(-len(head) % 32)


def refused(path: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read_gguf(path)


def peak_of(path: Path, act: Callable[[Path], object]) -> int:
    tracemalloc.start()
    try:
        act(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_header_is_read_fast_and_the_data_never(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = b"".join(text(f"token{index}") for index in range(32_768))
    arrays = [
        pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 32_768) + tokens),
        pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", F32, 32_768) + bytes(4 * 32_768)),
        pair("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ", I32, 32_768) + bytes(4 * 32_768)),
    ]
    size = 1 << 26
    infos = [info(f"blk.{index}.ffn_gate.weight", (1 << 12, 1 << 12), 0, index * size) for index in range(995)]
    header = raw(arrays, infos)
    path.write_bytes(header)
    os.truncate(path, len(header) + 995 * size)  # 62 GB of holes
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = read_gguf(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3
    assert (len(found.tensors), found.metadata["tokenizer.ggml.tokens"][-1]) == (995, "token32767")
    assert peak_of(path, read_gguf) < 3 * len(header) + (64 << 20)
    assert peak_of(path, read_gguf) < 12 << 20


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (pair("v", ARRAY, struct.pack("<IQ", U8, 100 << 20)), "the limit for a header"),
        (pair("v", ARRAY, struct.pack("<IQ", STRING, 10 << 20)), "the limit for a header"),
        (pair("v", ARRAY, struct.pack("<IQ", ARRAY, 10 << 20)), "the limit for a header"),
        (pair("v", STRING, struct.pack("<Q", 9 << 20)), "at most 8,388,608 are read"),
    ],
)
def test_limits_hold_in_a_file_of_any_size(value: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([value]))
    os.truncate(path, 1 << 33)
    assert peak_of(path, lambda path: refused(path, told)) < 4 << 20


@pytest.mark.parametrize("kind", ["strings", "arrays", "numbers", "keys", "wide keys"])
def test_small_values_cannot_fill_the_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string of one character takes ten bytes of the file and ninety of memory; the limit is made small here."""
    monkeypatch.setattr(module, "_HELD_BYTES", 1 << 20)
    strings = [struct.pack("<IQ", STRING, 40_000), text("ж") * 40_000]
    arrays = [struct.pack("<IQ", ARRAY, 60_000), struct.pack("<IQ", STRING, 0) * 60_000]
    keys = {
        "strings": [pair("v", ARRAY, b"".join(strings))],
        "arrays": [pair("v", ARRAY, b"".join(arrays))],
        "numbers": [pair("v", ARRAY, struct.pack("<IQ", ARRAY, 10_000) + struct.pack("<IQ", U8, 0) * 10_000)],
        "keys": [pair(f"{index}", U8, b"1") for index in range(20_000)],
        "wide keys": [pair(f"{index}" + "a" * 60_000 + "🜚", U8, b"1") for index in range(40)],
    }[kind]
    data = raw(keys)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    peak = peak_of(path, lambda path: refused(path, "would fill the memory"))
    assert peak < 3 * len(data) + (4 << 20)
