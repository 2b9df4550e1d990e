"""Files that we write are read alike by the gguf package's reader and by ours, byte for byte as the format says."""

from __future__ import annotations

import gc
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from numpy.typing import NDArray

from mixtral.errors import CheckpointError
from mixtral.files.gguf import read_gguf
from mixtral.files.gguf_write import GgufRecord, write_gguf
from mixtral.quant.formats import FORMATS


def random_bytes(form: str, shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    item = FORMATS[form]
    rows = (*shape[:-1], shape[-1] // item.values * item.bytes)
    return np.random.default_rng(seed).integers(0, 256, rows, dtype=np.uint8)


def record(name: str, form: str, shape: tuple[int, ...], seed: int = 0) -> GgufRecord:
    return GgufRecord(name, form, shape, lambda: [random_bytes(form, shape, seed)])


def test_a_small_file_is_written_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = np.arange(24, dtype=np.uint8)
    write_gguf(
        path,
        {"a": True, "bc": 258, "d": "é", "e": [1, -2]},
        [GgufRecord("w", "F32", (2, 3), lambda: [data]), GgufRecord("q", "Q4_0", (32,), lambda: [data[:18]])],
    )
    expected = (
        b"GGUF" b"\x03\0\0\0" b"\x02\0\0\0\0\0\0\0" b"\x04\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0" b"a" b"\x07\0\0\0" b"\x01"
        b"\x02\0\0\0\0\0\0\0" b"bc" b"\x04\0\0\0" b"\x02\x01\0\0"
        b"\x01\0\0\0\0\0\0\0" b"d" b"\x08\0\0\0" b"\x02\0\0\0\0\0\0\0" b"\xc3\xa9"
        b"\x01\0\0\0\0\0\0\0" b"e" b"\x09\0\0\0" b"\x05\0\0\0" b"\x02\0\0\0\0\0\0\0" b"\x01\0\0\0" b"\xfe\xff\xff\xff"
        b"\x01\0\0\0\0\0\0\0" b"w" b"\x02\0\0\0" b"\x03\0\0\0\0\0\0\0" b"\x02\0\0\0\0\0\0\0"
        b"\0\0\0\0" b"\0\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0" b"q" b"\x01\0\0\0" b"\x20\0\0\0\0\0\0\0"
        b"\x02\0\0\0" b"\x20\0\0\0\0\0\0\0"
    )  # fmt: skip
    expected += bytes(-len(expected) % 32) + bytes(range(24)) + bytes(8) + bytes(range(18)) + bytes(14)
    assert path.read_bytes() == expected


VALUES: dict[str, tuple[Any, str]] = {
    "bool": (True, "BOOL"),
    "zero": (0, "UINT32"),
    "u32": (2**32 - 1, "UINT32"),
    "u64": (2**32, "UINT64"),
    "u64 max": (2**64 - 1, "UINT64"),
    "i32": (-1, "INT32"),
    "i32 min": (-(2**31), "INT32"),
    "i64": (-(2**31) - 1, "INT64"),
    "float": (0.1, "FLOAT32"),
    "infinity": (float("-inf"), "FLOAT32"),
    "text": ("Grüezi 🜚", "STRING"),
    "empty text": ("", "STRING"),
    "np.uint8": (np.uint8(255), "UINT8"),
    "np.int8": (np.int8(-128), "INT8"),
    "np.uint16": (np.uint16(65_535), "UINT16"),
    "np.int16": (np.int16(-2), "INT16"),
    "np.int64": (np.int64(5), "INT64"),
    "np.uint64": (np.uint64(5), "UINT64"),
    "np.float32": (np.float32(0.1), "FLOAT32"),
    "np.float64": (np.float64(0.1), "FLOAT64"),
    "np.bool": (np.bool_(False), "BOOL"),
}
LISTS: dict[str, tuple[Any, str]] = {
    "ints": ([1, 2, -3], "INT32"),
    "unsigned": ([1, 2**32 - 1], "UINT32"),
    "long": ([-1, 2**32], "INT64"),
    "long unsigned": ([1, 2**64 - 1], "UINT64"),
    "floats": ([0.5, 2.0], "FLOAT32"),
    "floats and ints": ((0.5, 2), "FLOAT32"),
    "texts": (["a", "", "é"], "STRING"),
    "bools": ([True, False], "BOOL"),
    "np.uint8s": (np.arange(3, dtype=np.uint8), "UINT8"),
    "np.float64s": (np.array([0.1, 1e300]), "FLOAT64"),
    "np.bools": (np.array([True, False, True]), "BOOL"),
    "big-endian": (np.array([1, 258], dtype=">i2"), "INT16"),
    "strided": (np.arange(10, dtype=np.int64)[::3], "INT64"),
}


def test_the_gguf_package_reads_our_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {key: value for key, (value, _) in (VALUES | LISTS).items()}, [])
    fields, ours = GGUFReader(path).fields, read_gguf(path).metadata
    assert list(fields)[3:] == list(ours) == [*VALUES, *LISTS]
    for key, (value, kind) in VALUES.items():
        assert [found.name for found in fields[key].types] == [kind], key
        expected = np.float32(value).item() if kind == "FLOAT32" else value
        assert fields[key].contents() == expected == ours[key], key
    for key, (value, kind) in LISTS.items():
        assert [found.name for found in fields[key].types] == ["ARRAY", kind], key
        assert fields[key].contents() == list(value) == list(ours[key]), key


@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_the_gguf_package_reads_our_tensors(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shapes = [(2,), (3, 1), (3, 5, 1), (2, 1, 3, 1)]
    records = [
        record(f"t.{form}", form, (*(shape := shapes[seed % 4])[:-1], shape[-1] * item.values), seed)
        for seed, (form, item) in enumerate(FORMATS.items())
    ]
    write_gguf(path, {"general.architecture": "llama"}, records, alignment=alignment)
    peers, ours = GGUFReader(path).tensors, read_gguf(path)
    assert [tensor.name for tensor in peers] == list(ours.tensors) == [item.name for item in records]
    file = path.read_bytes()
    for item, peer, entry in zip(records, peers, ours.tensors.values(), strict=True):
        (expected,) = item.parts()
        assert isinstance(expected, np.ndarray)
        assert peer.data.tobytes() == expected.tobytes() == file[entry.start : entry.stop]
        assert (peer.tensor_type.name, tuple(reversed(peer.shape.tolist()))) == (item.format, item.shape)
        assert (entry.dtype, entry.shape) == (item.format, item.shape)
        assert entry.start % alignment == 0
    assert len(file) % alignment == 0
    assert ours.metadata.get("general.alignment", 32) == alignment


def test_what_was_read_is_written_again_the_same(tmp_path: Path) -> None:
    """Values of every kind, tokens that are not UTF-8 and nested arrays survive; so does the file."""
    broken = b"\xe4\xb8".decode("utf-8", "surrogateescape")
    metadata = {key: value for key, (value, kind) in VALUES.items() if kind in ("BOOL", "STRING", "UINT32", "FLOAT32")}
    metadata |= {key: value for key, (value, _) in LISTS.items()}
    metadata |= {"tokens": ["a", broken], "none": [], "nested": [[1, 2], [[["deep"]]], [0.5], np.zeros(0, np.uint16)]}
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    write_gguf(first, metadata, [record("t", "Q4_K", (2, 256)), record("u", "F32", (3,))], alignment=64)
    found = read_gguf(first)
    assert found.metadata["tokens"] == ["a", broken]
    assert found.metadata["nested"][1] == [[["deep"]]]
    data = first.read_bytes()
    records = [
        GgufRecord(
            entry.name, entry.dtype, entry.shape, lambda e=entry: [np.frombuffer(data[e.start : e.stop], np.uint8)]
        )
        for entry in found.tensors.values()
    ]
    write_gguf(second, found.metadata, records, alignment=found.metadata["general.alignment"])
    assert second.read_bytes() == data


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    for part in range(2):
        split = {"split.no": np.uint16(part), "split.count": np.uint16(2), "split.tensors.count": np.int32(3)}
        records = [record(f"t{index}", "Q8_0", (1, 32), index) for index in ((0, 1), (2,))[part]]
        write_gguf(tmp_path / f"m-0000{part + 1}-of-00002.gguf", split, records)
    found = read_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert list(found.tensors) == ["t0", "t1", "t2"]
    kinds = GGUFReader(tmp_path / "m-00002-of-00002.gguf").fields["split.no"].types
    assert kinds == [GGUFValueType.UINT16]


def test_bytes_may_come_as_tensors_and_in_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    plain = torch.arange(36, dtype=torch.uint8)
    sources = [
        plain,
        plain.view(2, 18),
        torch.arange(36, dtype=torch.uint8).view(18, 2).t().contiguous().t().reshape(36),
    ]
    sources.append(plain.repeat_interleave(2)[::2])
    records = [GgufRecord(f"{i}", "Q4_0", (2, 32), lambda s=source: [s]) for i, source in enumerate(sources)]
    write_gguf(path, {}, records)
    data = path.read_bytes()
    assert [data[entry.start : entry.stop] for entry in read_gguf(path).tensors.values()] == [bytes(range(36))] * 4


@pytest.mark.slow
def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Each record is asked once, in order, when the one before it is gone."""
    alive: list[weakref.ref[Any]] = []
    progress: list[tuple[int, int]] = []

    def make(number: int) -> NDArray[np.uint8]:
        gc.collect()
        assert [reference() for reference in alive] == [None] * number
        assert len(progress) == 2 * number
        data = np.full(132, number, np.uint8)
        alive.append(weakref.ref(data))
        return data

    def records() -> Iterator[GgufRecord]:
        for number in range(4):
            yield GgufRecord(f"t{number}", "F32", (33,), lambda number=number: [make(number)])

    write_gguf(tmp_path / "m.gguf", {}, records(), progress=lambda done, total: progress.append((done, total)))
    assert progress == [(start + done, 640) for start in (0, 160, 320, 480) for done in (132, 160)]
    assert len(alive) == 4


F32 = FORMATS["F32"].name
DATA = np.zeros(32, np.uint8)
BAD_VALUES: dict[str, tuple[Any, str]] = {
    "None": (None, "a value of type NoneType"),
    "a dict": ({"a": 1}, "a value of type dict"),
    "bytes": (b"a", "a value of type bytes"),
    "complex": (np.complex64(1), "values of type complex64"),
    "float16": (np.zeros(3, np.float16), "values of type float16"),
    "numpy texts": (np.array(["a"]), "values of type <U1"),
    "numpy objects": (np.array([{}], dtype=object), "values of type object"),
    "two dimensions": (np.zeros((2, 2), np.uint8), "an array of 2 dimensions"),
    "2^64": (2**64, "fit into no type of 64 bits"),
    "-2^63 - 1": (-(2**63) - 1, "fit into no type of 64 bits"),
    "-1 and 2^64 - 1": ([-1, 2**64 - 1], "from -1 to 18446744073709551615 fit into no type"),
    "1e39": (1e39, "beyond the range of FLOAT32"),
    "1e39 in a list": ([1.0, 1e39], "beyond the range of FLOAT32"),
    "texts and ints": (["a", 1], "a list of int, str"),
    "bools and ints": ([True, 1], "a list of bool, int"),
    "Nones": ([None], "a list of NoneType"),
    "five deep": ([[[[[1]]]]], "nested more than 4 deep"),
    "a lone surrogate": ("\ud800", "lone surrogate"),
    "a text too long": ("a" * (8 << 20) + "a", "takes 8,388,609 bytes"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_refused(case: str, tmp_path: Path) -> None:
    value, told = BAD_VALUES[case]
    with pytest.raises(CheckpointError, match=told) as caught:
        write_gguf(tmp_path / "m.gguf", {"good": 1, "this": value}, [])
    assert str(caught.value).startswith("m.gguf: the key 'this': ")
    assert not (tmp_path / "m.gguf").exists()


BAD_RECORDS: dict[str, tuple[list[GgufRecord], str]] = {
    "unknown format": ([GgufRecord("t", "Q4_X", (8,), lambda: [DATA])], "unknown format 'Q4_X'; known are F32"),
    "no dimensions": ([GgufRecord("t", F32, (), lambda: [DATA])], r"'t' has the shape \[\]"),
    "five dimensions": ([GgufRecord("t", F32, (8, 1, 1, 1, 1), lambda: [DATA])], "expected 1 to 4 sizes"),
    "a size of 0": ([GgufRecord("t", F32, (8, 0), lambda: [DATA])], "sizes of at least 1"),
    "a size of -8": ([GgufRecord("t", F32, (-8, -1), lambda: [DATA])], "sizes of at least 1"),
    "2^63 values": ([GgufRecord("t", F32, (2**32, 2**31), lambda: [DATA])], "product below 2"),
    "a broken block": ([GgufRecord("t", "Q8_0", (1, 48), lambda: [DATA])], "'t': Q8_0 packs 32 values"),
    "twice": ([record("t", F32, (8,)), record("t", F32, (8,))], "the tensor 't' appears twice"),
    "no name": ([record("", F32, (8,))], "takes 0 bytes; expected 1 to 63"),
    "a name of 64 bytes": ([record("é" * 32, F32, (8,))], "takes 64 bytes; expected 1 to 63"),
    "a name with a surrogate": ([record("\udc80", F32, (8,))], "lone surrogate"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_records_refused(case: str, tmp_path: Path) -> None:
    records, told = BAD_RECORDS[case]
    with pytest.raises(CheckpointError, match=told):
        write_gguf(tmp_path / "m.gguf", {}, records)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (np.zeros(31, np.uint8), r"'t' gave 31 bytes, but F32 \[8\] needs 32"),
        (np.zeros(33, np.uint8), "'t' gave 33 bytes"),
        (np.zeros(8, np.float32), "is float32; expected its bytes as uint8"),
        (torch.zeros(8), "is torch.float32; expected its bytes as uint8"),
        (torch.zeros(32, dtype=torch.int8), "is torch.int8"),
        (torch.zeros(16, 0, dtype=torch.uint8), "'t' gave 0 bytes"),
    ],
)
def test_a_record_that_gives_other_bytes(data: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        write_gguf(tmp_path / "m.gguf", {}, [GgufRecord("t", F32, (8,), lambda: [data])])


def test_keys_refused(tmp_path: Path) -> None:
    for key, told in (("", "expected 1 to 65,535"), ("k" * 65_536, "takes 65,536 bytes"), ("\udc80", "lone surrogate")):
        with pytest.raises(CheckpointError, match=told) as caught:
            write_gguf(tmp_path / "m.gguf", {key: 1}, [])
        assert len(str(caught.value)) < 200


def test_alignment_refused(tmp_path: Path) -> None:
    for alignment in (0, 3, 4, -32, 1 << 31):
        with pytest.raises(CheckpointError, match=f"alignment is {alignment}; expected a power of two"):
            write_gguf(tmp_path / "m.gguf", {}, [], alignment=alignment)
    with pytest.raises(CheckpointError, match="alignment is 64, but the file is to be aligned to 32"):
        write_gguf(tmp_path / "m.gguf", {"general.alignment": 64}, [])
    with pytest.raises(CheckpointError, match="alignment is 16, but the file is to be aligned to 64"):
        write_gguf(tmp_path / "m.gguf", {"general.alignment": 16}, [], alignment=64)
    with pytest.raises(CheckpointError, match="alignment is array"):
        write_gguf(tmp_path / "m.gguf", {"general.alignment": np.array([32, 32])}, [])
    write_gguf(tmp_path / "m.gguf", {"general.alignment": 64, "a": 1}, [], alignment=64)
    assert list(read_gguf(tmp_path / "m.gguf").metadata) == ["general.alignment", "a"]
    write_gguf(tmp_path / "m.gguf", {"a": 1}, [], alignment=64)
    assert read_gguf(tmp_path / "m.gguf").metadata == {"a": 1, "general.alignment": 64}


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="65,537 keys"):
        write_gguf(tmp_path / "m.gguf", {f"{index}": 1 for index in range(65_537)}, [])
    with pytest.raises(CheckpointError, match="can be read back"):
        write_gguf(tmp_path / "m.gguf", {"a": np.zeros(65 << 20, np.uint8)}, [])


def test_header_layout_of_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, [])
    assert path.read_bytes() == struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + bytes(8)
    assert read_gguf(path).tensors == {}
