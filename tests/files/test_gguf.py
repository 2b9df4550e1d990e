"""Files that the gguf package wrote are read as it reads them; files that lie are refused by name (C5, C7, C10)."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from mixtral.errors import CheckpointError
from mixtral.files.gguf import Gguf, read_gguf
from mixtral.quant.formats import FORMATS

U8, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def number(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def raw(
    keys: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    start: bytes = b"GGUF\3\0\0\0",
    alignment: int = 32,
) -> bytes:
    """A file by hand: `data` bytes after the header; `counts` are those of tensors and keys that it claims."""
    keys, infos = list(keys), list(infos)
    head = start + struct.pack("<QQ", *(counts or (len(infos), len(keys)))) + b"".join(keys + infos)
    return head + bytes(-len(head) % alignment) + bytes(data)


def bytes_of(found: Gguf, name: str) -> bytes:
    entry = found.tensors[name]
    return entry.shard.read_bytes()[entry.start : entry.stop]


def refused(path: Path, told: str) -> str:
    with pytest.raises(CheckpointError, match=told) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# --- what the gguf package writes -------------------------------------------------------------------------------------


def new_writer(path: Path, **options: Any) -> GGUFWriter:
    return GGUFWriter(path, "llama", **options)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_tensor(writer: GGUFWriter, name: str, form: str, shape: tuple[int, ...], seed: int) -> bytes:
    item = FORMATS[form]
    packed = (*shape[:-1], shape[-1] // item.values * item.bytes)
    data = np.random.default_rng(seed).integers(0, 256, packed, dtype=np.uint8)
    writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[form])
    return data.tobytes()


SCALARS: dict[str, tuple[str, Any]] = {
    "u8": ("UINT8", 255),
    "i8": ("INT8", -128),
    "u16": ("UINT16", 65_535),
    "i16": ("INT16", -32_768),
    "u32": ("UINT32", 2**32 - 1),
    "i32": ("INT32", -(2**31)),
    "f32": ("FLOAT32", 0.25),
    "u64": ("UINT64", 2**64 - 1),
    "i64": ("INT64", -(2**63)),
    "f64": ("FLOAT64", 1e-300),
    "yes": ("BOOL", True),
    "no": ("BOOL", False),
    "text": ("STRING", "Zürich — 漢字 🜚"),
}


def test_every_type_of_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = new_writer(path)
    for key, (kind, value) in SCALARS.items():
        writer.add_key_value(key, value, GGUFValueType[kind])
    arrays = {f"array.{key}": (kind, [value] * 3) for key, (kind, value) in SCALARS.items()}
    for key, (kind, values) in arrays.items():
        writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=GGUFValueType[kind])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_array("deep", [[["a"], ["b", ""]]])
    finish(writer)

    found = read_gguf(path)
    assert list(found.metadata) == list(GGUFReader(path).fields)[3:]
    for key, (_, value) in SCALARS.items():
        assert found.metadata[key] == value
        assert type(found.metadata[key]) is type(value)
    for key, (kind, values) in arrays.items():
        got = found.metadata[key]
        if kind == "STRING":
            assert got == values
        else:
            assert got.tolist() == values
            dtype = "bool" if kind == "BOOL" else kind.lower()
            assert got.dtype == np.dtype(dtype)
            assert not got.flags.writeable
    assert [inner.tolist() for inner in found.metadata["nested"]] == [[1, 2], [3]]
    assert found.metadata["deep"] == [[["a"], ["b", ""]]]
    assert (found.version, found.tensors, found.paths) == (3, {}, (path,))


def test_a_token_that_is_not_utf8_gives_its_bytes_back(tmp_path: Path) -> None:
    tokens = [b"\xe4\xb8", b"\xff", b"", "é".encode()]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([pair("tokens", ARRAY, struct.pack("<IQ", STRING, 4) + b"".join(map(text, tokens)))]))
    found = read_gguf(path).metadata["tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in found] == tokens


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_every_format_and_alignment(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = new_writer(path)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    expected = {}
    for seed, (form, item) in enumerate(FORMATS.items()):
        # Odd counts of rows, so that most tensors are padded; 1 to 4 dimensions.
        shape = [(item.values * 2,), (3, item.values), (3, 5, item.values), (2, 1, 3, item.values)][seed % 4]
        expected[f"t.{form}"] = (form, shape, random_tensor(writer, f"t.{form}", form, shape, seed))
    finish(writer)

    found, peer = read_gguf(path), {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert list(found.tensors) == list(expected) == list(peer)
    for name, (form, shape, data) in expected.items():
        entry = found.tensors[name]
        assert (entry.name, entry.shard, entry.dtype, entry.shape) == (name, path, form, shape)
        assert bytes_of(found, name) == data == peer[name].data.tobytes()
        assert (entry.start, entry.stop - entry.start) == (peer[name].data_offset, peer[name].n_bytes)
        assert entry.shape == tuple(reversed(peer[name].shape.tolist()))


def test_experts_come_first_in_the_shape(tmp_path: Path) -> None:
    """C5: [in, out, expert] in the file, and so said by the package's reader, is (expert, out, in)."""
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([], [info("blk.0.ffn_up_exps.weight", (64, 96, 3), 8, 0)], 64 * 96 * 3 // 32 * 34))
    assert read_gguf(path).tensors["blk.0.ffn_up_exps.weight"].shape == (3, 96, 64)


@pytest.mark.parametrize("left", [0, 1, 31])
def test_the_padding_of_the_last_tensor_may_be_missing(left: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([], [info("a", (8,), 0, 0), info("b", (33,), 0, 32)], 32 + 132 + min(left, 28)))
    assert [tuple(entry.shape) for entry in read_gguf(path).tensors.values()] == [(8,), (33,)]
    path.write_bytes(path.read_bytes() + bytes(29))
    refused(path, "after the last tensor")


def test_tensors_may_lie_in_another_order_than_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([], [info("b", (8,), 0, 32), info("a", (8,), 0, 0)], 64))
    found = read_gguf(path).tensors
    assert list(found) == ["b", "a"]
    assert found["b"].start == found["a"].stop


def test_version_2(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([number("a", 7)], [info("t", (8,), 0, 0)], 32, start=b"GGUF\2\0\0\0"))
    found = read_gguf(path)
    assert (found.version, found.metadata) == (2, {"a": 7})


# --- split files ------------------------------------------------------------------------------------------------------

Split = Callable[..., list[Path]]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    def write(
        stem: str = "m", *, folder: Path = tmp_path, tensors: int = 7, each: int = 3, seed: int = 0
    ) -> list[Path]:
        folder.mkdir(exist_ok=True)
        writer = new_writer(folder / f"{stem}.gguf", split_max_tensors=each)
        writer.add_uint32("llama.expert_count", 8)
        for index in range(tensors):
            random_tensor(writer, f"t{seed}.{index}", "Q4_0", (index + 1, 32), index)
        finish(writer)
        return sorted(folder.glob(f"{stem}-*.gguf"))

    return write


def set_number(path: Path, key: str, code: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, data.index(text(key)) + 8 + len(key) + 4, value)
    path.write_bytes(data)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_split_files_are_read_from_any_part(given: int, split: Split) -> None:
    paths = split()
    assert [path.name for path in paths] == [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    found = read_gguf(paths[given])
    peers = [tensor for path in paths for tensor in GGUFReader(path).tensors]
    assert list(found.tensors) == [tensor.name for tensor in peers] == [f"t0.{index}" for index in range(7)]
    assert [bytes_of(found, tensor.name) for tensor in peers] == [tensor.data.tobytes() for tensor in peers]
    assert [found.tensors[f"t0.{index}"].shard for index in (0, 3, 6)] == paths == list(found.paths)
    assert (found.metadata["llama.expert_count"], found.metadata["split.no"]) == (8, 0)


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "m.gguf", split_max_tensors=4, small_first_shard=True)
    data = [random_tensor(writer, f"t{index}", "Q8_0", (1, 32), index) for index in range(4)]
    finish(writer)
    found = read_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert [bytes_of(found, f"t{index}") for index in range(4)] == data


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_missing_part_is_named(absent: int, split: Split) -> None:
    paths = split()
    paths[absent].unlink()
    told = refused(paths[(absent + 1) % 3], "1 of 3 parts are missing")
    assert paths[absent].name in told
    refused(paths[absent], paths[absent].name)


def test_a_split_file_whose_numbers_lie(split: Split, tmp_path: Path) -> None:
    for key, code, value in (("split.no", "<H", 2), ("split.count", "<H", 4), ("split.tensors.count", "<i", 8)):
        for part in (0, 1):
            paths = split()
            set_number(paths[part], key, code, value)
            refused(paths[2], f"{key} is|promises 8 tensors")
    paths = split()
    for path in paths:
        set_number(path, "split.tensors.count", "<i", 9)
    refused(paths[0], "promises 9 tensors, but all parts hold 7")
    for path in paths:
        set_number(path, "split.tensors.count", "<i", -1)
    refused(paths[0], "promises -1 tensors")


def test_a_part_of_another_model(split: Split, tmp_path: Path) -> None:
    ours, other = split(), split(folder=tmp_path / "other", tensors=8, seed=1)
    other[1].replace(ours[1])
    refused(ours[0], "split.tensors.count is 8, expected 7")
    ours, other = split(), split(folder=tmp_path / "third", tensors=7, each=4)
    other[1].replace(ours[2])
    for key, code, value in (("split.no", "<H", 2), ("split.count", "<H", 3)):
        set_number(ours[2], key, code, value)
    refused(ours[0], "'t0.4' is also in m-00002-of-00003.gguf")


def test_names_and_numbers_of_parts_that_disagree(split: Split, tmp_path: Path) -> None:
    paths = split()
    renamed = paths[1].rename(tmp_path / "second.gguf")
    refused(renamed, "split.count is 3, so this is one part")
    refused(tmp_path / "m-00004-of-00003.gguf", "part 4 of 3")
    refused(tmp_path / "m-00000-of-00003.gguf", "part 0 of 3")
    refused(tmp_path / "m-00001-of-99999.gguf", "at most 4096")
    for part in (1, 2):
        (tmp_path / f"x-0000{part}-of-00002.gguf").write_bytes(raw([number("a", 1)]))
    refused(tmp_path / "x-00001-of-00002.gguf", "its split.tensors.count is None")
    strange = tmp_path / "y.gguf"
    strange.write_bytes(raw([pair("split.count", ARRAY, struct.pack("<IQ2I", 4, 2, 1, 1))]))
    refused(strange, "split.count is array")


def test_one_of_one_is_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00001.gguf"
    path.write_bytes(raw([number("split.count", 1)], [info("t", (8,), 0, 0)], 32))
    assert list(read_gguf(path).tensors) == ["t"]


def test_a_part_that_is_a_link_out_of_the_folder(split: Split, tmp_path: Path) -> None:
    paths = split(folder=tmp_path / "model")
    outside = paths[1].rename(tmp_path / "outside.gguf")
    paths[1].symlink_to(outside)
    refused(paths[0], "leads out of the folder")


@pytest.mark.parametrize("below", ["", "Q4_0"])
def test_parts_in_the_hub_cache_link_to_its_blobs(below: str, split: Split, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    folder = repository / "snapshots" / "0123" / below
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for index, path in enumerate(split(folder=tmp_path / "source")):
        path.rename(repository / "blobs" / f"{index}")
        (folder / path.name).symlink_to(os.path.relpath(repository / "blobs" / f"{index}", folder))
    found = read_gguf(folder / "m-00002-of-00003.gguf")
    assert [path.name for path in found.paths] == ["0", "1", "2"]
    assert len(found.tensors) == 7


# --- files that lie ---------------------------------------------------------------------------------------------------

T = info("t", (8,), 0, 0)  # 32 bytes of F32
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated or damaged: 0 bytes"),
    "another format": (b"PK\3\4" + bytes(100), r"starts with b'PK\\x03\\x04'"),
    "older GGML": (b"tjgg" + bytes(100), "an older GGML format"),
    "version 0": (raw(start=b"GGUF\0\0\0\0"), "version 0"),
    "version 1": (raw(start=b"GGUF\1\0\0\0"), "version 1; only 2 and 3"),
    "version 99": (raw(start=b"GGUF\x63\0\0\0"), "version 99"),
    "big-endian": (raw(start=b"GGUF\0\0\0\3"), "big-endian"),
    "2^63 tensors": (raw(counts=(2**63, 0)), "claims 9,223,372,036,854,775,808 tensors; at most 65,536"),
    "2^32 tensors": (raw(counts=(2**32, 0)), "claims 4,294,967,296 tensors"),
    "2^63 keys": (raw(counts=(0, 2**63)), "claims 9,223,372,036,854,775,808 metadata keys"),
    "2^32 keys": (raw(counts=(0, 2**32)), "metadata keys; at most 65,536"),
    "more tensors than bytes": (raw([], [T], 32, counts=(60_000, 0)), "96 bytes, but a header of 0 keys and 60,000"),
    "more keys than bytes": (raw([number("a", 1)], counts=(0, 60_000)), "truncated or damaged"),
    "one key too many": (raw([number("a", 1)], [T], 64, counts=(1, 2)), "the name of tensor 0 is empty"),
    "key of 2^63 bytes": (raw([struct.pack("<Q", 2**63) + bytes(9)]), "key 0 of the metadata would end at byte 9,2"),
    "key of 2^64 - 1 bytes": (raw([struct.pack("<Q", 2**64 - 1) + bytes(9)]), "would end at byte 18,446"),
    "key beyond the end": (raw([struct.pack("<Q", 200) + bytes(9)]), "64 bytes, but key 0 of the metadata would"),
    "key too long": (raw([number("k" * 65_536, 1)]), "has 65,536 bytes; at most 65,535"),
    "empty key": (raw([number("", 1)]), "key 0 of the metadata is empty"),
    "key not UTF-8": (raw([pair(b"\xff\xfe", U8, b"1")]), r"is b'\\xff\\xfe', which is not UTF-8"),
    "key twice": (raw([number("same", 1), number("same", 1)]), "the key 'same' appears twice"),
    "string of 2^63": (raw([pair("s", STRING, struct.pack("<Q", 2**63))]), "value of 's' would end at byte 9,223"),
    "string of 2^32": (raw([pair("s", STRING, struct.pack("<Q", 2**32))]), "value of 's' would end at byte 4,294"),
    "string one too long": (raw([pair("s", STRING, struct.pack("<Q", 23))]), "64 bytes, but the value of 's' would"),
    "value of type 13": (raw([pair("v", 13, bytes(8))]), "the value of 'v' has the unknown type 13"),
    "truth value 2": (raw([pair("v", BOOL, b"\2")]), "truth value other than 0 and 1"),
    "truth values 0, 5, 1": (raw([pair("v", ARRAY, struct.pack("<IQ3B", BOOL, 3, 0, 5, 1))]), "truth value"),
    "array of type 99": (raw([pair("v", ARRAY, struct.pack("<IQQ", 99, 1, 0))]), "unknown type 99"),
    "empty array of type 99": (raw([pair("v", ARRAY, struct.pack("<IQ", 99, 0))]), "unknown type 99"),
    "array of 2^63 bytes": (raw([pair("v", ARRAY, struct.pack("<IQ", U8, 2**63))]), "would end at byte 9,223"),
    "array of 2^61 numbers": (raw([pair("v", ARRAY, struct.pack("<IQ", U64, 2**61))]), "would end at byte 18,446"),
    "array of 2^32 strings": (raw([pair("v", ARRAY, struct.pack("<IQ", STRING, 2**32))]), "would end at byte 34,"),
    "array of 2^32 arrays": (raw([pair("v", ARRAY, struct.pack("<IQ", ARRAY, 2**32))]), "would end at byte 51,"),
    "arrays 5 deep": (raw([pair("v", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5)], data=64), "more than 4 deep"),
    "arrays 100,000 deep": (raw([pair("v", ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000)]), "more than 4 deep"),
    "alignment 0": (raw([number("general.alignment", 0)], [T], 32), "alignment is 0; expected a power of two"),
    "alignment 3": (raw([number("general.alignment", 3)], [T], 32), "alignment is 3"),
    "alignment 4": (raw([number("general.alignment", 4)], [T], 32), "alignment is 4"),
    "alignment 48": (raw([number("general.alignment", 48)], [T], 32), "alignment is 48"),
    "alignment 2^31": (raw([number("general.alignment", 2**31)], [T], 32), "alignment is 2147483648"),
    "alignment -32": (raw([pair("general.alignment", I32, struct.pack("<i", -32))], [T], 32), "alignment is -32"),
    "alignment 32.0": (raw([pair("general.alignment", F32, struct.pack("<f", 32))], [T], 32), "alignment is 32.0"),
    "alignment a text": (raw([pair("general.alignment", STRING, text("32"))], [T], 32), "alignment is '32'"),
    "alignment a list": (
        raw([pair("general.alignment", ARRAY, struct.pack("<IQI", 4, 1, 32))], [T], 32),
        "alignment is array",
    ),
    "name of 65 bytes": (raw([], [info("n" * 65, (8,), 0, 0)], 32), "has 65 bytes; at most 64"),
    "empty name": (raw([], [info("", (8, 1), 0, 0)], 32), "the name of tensor 0 is empty"),
    "name not UTF-8": (raw([], [info(b"a\xff", (8,), 0, 0)], 32), "not UTF-8"),
    "name twice": (raw([], [T, info("t", (8,), 0, 32)], 64), "the tensor 't' appears twice"),
    "no dimensions": (raw([], [info("t", (), 0, 0)], 32), "truncated|'t' has 0 dimensions"),
    "five dimensions": (raw([], [info("t", (8, 1, 1, 1, 1), 0, 0)], 32), "'t' has 5 dimensions; expected 1 to 4"),
    "2^32 - 1 dimensions": (raw([], [text("t") + struct.pack("<I", 2**32 - 1)], 32), "4,294,967,295 dimensions"),
    "a size of 0": (raw([], [info("t", (8, 0), 0, 0)], 32), r"'t' has the shape \[0, 8\]"),
    "a size of -1": (raw([], [info("t", (2**64 - 1,), 0, 0)], 32), "'t' has the shape"),
    "a size of -8, another -1": (raw([], [info("t", (2**64 - 8, 2**64 - 1), 0, 0)], 32), "'t' has the shape"),
    "product beyond 2^63": (raw([], [info("t", (2**32, 2**31), 0, 0)], 32), "product below 2"),
    "product 2^64 + 8": (raw([], [info("t", (2**61 + 1, 8), 0, 0)], 32), "product below 2"),
    "bytes beyond 2^64": (raw([], [info("t", (2**62,), 0, 0)], 32), "96 bytes, but its header promises 18,446"),
    "type 4": (raw([], [info("t", (8,), 4, 0)], 32), "'t' has the unknown type 4; known are F32"),
    "type 2^32 - 1": (raw([], [info("t", (8,), 2**32 - 1, 0)], 32), "unknown type 4294967295"),
    "a broken block": (raw([], [info("t", (48,), 8, 0)], 64), "'t': Q8_0 packs 32 values"),
    "offset unaligned": (
        raw([], [T, info("u", (8,), 0, 33)], 96),
        "'u' starts at byte 33 of the data, not aligned to 32",
    ),
    "offset 2^64 - 32": (raw([], [info("t", (8,), 0, 2**64 - 32)], 32), "'t' leaves a gap"),
    "offset beyond the end": (raw([], [T, info("u", (8,), 0, 64)], 64), "'u' leaves a gap before it .*64.* not 32"),
    "overlap": (raw([], [T, info("u", (8,), 0, 0)], 64), "'u' overlaps the tensor before it"),
    "overlap in part": (raw([], [info("t", (16,), 0, 0), info("u", (8,), 0, 32)], 64), "'u' overlaps"),
    "data missing": (raw([], [T, info("u", (8,), 0, 32)], 63), "truncated: 159 bytes, but its header promises 160"),
    "data left over": (raw([], [T], 33), "1 bytes after the last tensor"),
    "left over without tensors": (raw([number("a", 1)], data=32), "32 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    data, told = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        message = refused(path, told)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert message.startswith("bad.gguf: ")


def test_cut_at_every_byte(tmp_path: Path) -> None:
    values = [
        pair("list", ARRAY, struct.pack("<IQ", STRING, 2) + text("ab") + text("c")),
        number("general.alignment", 32),
    ]
    whole = raw([*values, pair("s", STRING, text("text"))], [T, info("u", (2, 5), 0, 32)], 72)
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    assert len(read_gguf(path).tensors) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refused(path, "truncated")
        assert f" {length:,} bytes" in message


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "none.gguf: no such file")
    refused(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "not a regular file")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    refused(tmp_path / "loop.gguf", "no such file")
    refused(tmp_path / "zero\0.gguf", "no such file")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([number("a", 1)], [T], 32)[:60])
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda handle: os.stat_result((*real(handle)[:6], 10_000, *real(handle)[7:10])))
    refused(path, "became shorter")
