"""C10, C11: damaged and lying files are refused by name, before anything is allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixtral.errors import CheckpointError
from mixtral.files import read, safetensors
from mixtral.files.read import ShardReader
from mixtral.files.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    inside,
    read_checkpoint,
    read_header,
    record,
    write_shard,
)

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write_raw(path: Path, header: object, data: bytes = bytes(16), *, claimed: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data)


HEADERS: dict[str, tuple[object, str]] = {
    "not JSON": (b"{'a': 1}", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not JSON"),
    "deeply nested": (b"[" * 100_000, "not JSON"),
    "a number too long": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "a list": ([], "expected a JSON object"),
    "the same tensor twice": (b'{"a": ' + json.dumps(GOOD).encode() + b', "a": {}}', "'a' appears twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": GOOD}, "__metadata__"),
    "an entry that is no object": ({"a": 3}, "'a' has 3"),
    "an entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "expected dtype, shape"),
    "unknown dtype": ({"a": {**GOOD, "dtype": "F33"}}, "unknown dtype 'F33'"),
    "dtype a list": ({"a": {**GOOD, "dtype": []}}, "unknown dtype"),
    "negative size": ({"a": {**GOOD, "shape": [-2, -2]}}, "has the shape"),
    "fractional size": ({"a": {**GOOD, "shape": [2.0, 2]}}, "has the shape"),
    "boolean size": ({"a": {**GOOD, "shape": [True, 4]}}, "has the shape"),
    "ten dimensions": ({"a": {**GOOD, "shape": [1] * 8 + [2, 2]}}, "has the shape"),
    "huge size": ({"a": {**GOOD, "shape": [2**40, 2**40]}}, "occupies 16 bytes"),
    "size beyond 64 bits": ({"a": {**GOOD, "shape": [2**70]}}, "has the shape"),
    "wrong size": ({"a": {**GOOD, "shape": [2, 3]}}, "needs 24"),
    "negative offset": ({"a": {**GOOD, "data_offsets": [-16, 0]}}, "data_offsets"),
    "offsets reversed": ({"a": {**GOOD, "data_offsets": [16, 0]}}, "data_offsets"),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 8, 16]}}, "data_offsets"),
    "overlap": ({"a": GOOD, "b": GOOD}, "'b' overlaps"),
    "gap": ({"a": {**GOOD, "data_offsets": [4, 20]}}, "leaves a gap"),
    "data missing": ({"a": GOOD, "b": {**GOOD, "data_offsets": [16, 32]}}, "truncated"),
    "data left over": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "8 bytes after the last"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_refused(case: str, tmp_path: Path) -> None:
    header, told = HEADERS[case]
    path = tmp_path / SINGLE_NAME
    write_raw(path, header)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_header(path)
    assert str(caught.value).startswith(SINGLE_NAME)


@pytest.mark.parametrize("claimed", [1000, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(claimed: int, tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": GOOD}, claimed=claimed)
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_header_limit_on_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, {}, claimed=safetensors.MAX_JSON_BYTES + 1)
    os.truncate(path, safetensors.MAX_JSON_BYTES * 2)
    with pytest.raises(CheckpointError, match="at most 16,000,000"):
        read_header(path)


def test_truncation_at_every_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(2)}, path)
    data = path.read_bytes()
    assert set(read_header(path).entries) == {"a", "b"}
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_the_good_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, {"__metadata__": {"format": "pt"}, "a": GOOD})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.entries["a"].shape == (2, 2)
    assert header.entries["a"].stop == path.stat().st_size


# What is done to the folder of an index and two shards -> part of the message.
def _edit_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / INDEX_NAME).read_text())
        change(values)
        (folder / INDEX_NAME).write_text(json.dumps(values))

    return edit


def _set(name: str, shard: object) -> Callable[[Path], None]:
    return _edit_index(lambda values: values["weight_map"].__setitem__(name, shard))


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "index not JSON": (lambda folder: (folder / INDEX_NAME).write_bytes(b"\x80\x04"), "not JSON"),
    "index a list": (lambda folder: (folder / INDEX_NAME).write_text("[]"), "expected a JSON object"),
    "index without map": (_edit_index(lambda values: values.pop("weight_map")), "weight_map"),
    "index with empty map": (_edit_index(lambda values: values.update(weight_map={})), "weight_map"),
    "index names a tensor twice": (
        lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}'),
        "'a' appears twice",
    ),
    "traversal": (_set("a", "../1.safetensors"), "plain name"),
    "traversal with backslash": (_set("a", "..\\1.safetensors"), "plain name"),
    "absolute path": (_set("a", "/etc/1.safetensors"), "plain name"),
    "no safetensors": (_set("a", "1.pth"), "plain name"),
    "shard a number": (_set("a", 1), "plain name"),
    "shard missing": (lambda folder: (folder / "2.safetensors").unlink(), "1 of 2 shards.*2.safetensors"),
    "shard a folder": (
        lambda folder: ((folder / "2.safetensors").unlink(), (folder / "2.safetensors").mkdir())[1],
        "not a regular file",
    ),
    "shard a pipe": (
        lambda folder: ((folder / "2.safetensors").unlink(), os.mkfifo(folder / "2.safetensors"))[1],
        "not a regular file",
    ),
    "tensor not in its shard": (_set("d", "1.safetensors"), "promises d"),
    "tensor in the other shard": (_set("a", "2.safetensors"), "holds 'a', which .* puts in 2.safetensors"),
    "tensor not in the index": (_edit_index(lambda values: values["weight_map"].pop("a")), "'a', not in the index"),
    "tensor in both shards": (
        lambda folder: save_file({"a": torch.ones(1), "c": torch.ones(1)}, folder / "2.safetensors"),
        "'a' is also in 1.safetensors",
    ),
    "single file beside the index": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / SINGLE_NAME),
        "holds both",
    ),
    "no weights": (lambda folder: (folder / INDEX_NAME).unlink(), "no weights; expected .* found 1.safetensors"),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "1.safetensors")
    save_file({"c": torch.ones(4)}, folder / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_refused(case: str, shards: Path) -> None:
    assert set(read_checkpoint(shards)) == {"a", "b", "c"}
    change, told = FOLDERS[case]
    change(shards)
    with pytest.raises(CheckpointError, match=told):
        read_checkpoint(shards)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_checkpoint(tmp_path / "nothing")


def test_links(tmp_path: Path, shards: Path) -> None:
    """A link may not leave the folder, unless to the blobs of the Hub cache that the folder belongs to."""
    outside = tmp_path / "outside.safetensors"
    os.rename(shards / "1.safetensors", outside)
    (shards / "1.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        read_checkpoint(shards)

    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    os.rename(shards, cache / "snapshots" / "1f3c")
    snapshot = cache / "snapshots" / "1f3c"
    os.rename(outside, cache / "blobs" / "5d")
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to("../../blobs/5d")
    assert set(read_checkpoint(snapshot)) == {"a", "b", "c"}


def test_circular_link(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no such file"):
        inside(tmp_path, "a")


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_reader_copies_and_converts_in_chunks(
    dtype: torch.dtype, padding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", 4096)
    values = (torch.arange(9001) % 251).to(dtype).view(-1, 9001)
    path = tmp_path / "x.safetensors"
    save_file({"a": values, "b": values + 1}, path)
    data = path.read_bytes()
    count = int.from_bytes(data[:8], "little")
    path.write_bytes((count + padding).to_bytes(8, "little") + data[8 : 8 + count] + b" " * padding + data[8 + count :])
    entries = read_header(path).entries
    with ShardReader() as reader:
        for name, expected in (("a", values), ("b", values + 1)):
            target = torch.empty(values.shape, dtype=torch.float32)
            reader.read(entries[name], target)
            assert torch.equal(target, expected.float())


def test_reader_refuses_values_beyond_float16(tmp_path: Path) -> None:
    """C13: no silent float16."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([1.0, 1e5], dtype=torch.bfloat16)}, path)
    entry = read_header(path).entries["a"]
    with ShardReader() as reader, pytest.raises(CheckpointError, match="float16"):
        reader.read(entry, torch.empty(2, dtype=torch.float16))


def test_reader_notices_a_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5000)}, path)
    entry = read_header(path).entries["a"]
    os.truncate(path, 5000)
    with ShardReader() as reader, pytest.raises(CheckpointError, match="became shorter"):
        reader.read(entry, torch.empty(5000))


def test_written_shard_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 1).to(torch.bfloat16),
        "wide": torch.randn(2, 5),
        "byte": torch.arange(7, dtype=torch.int8),
        "part": torch.randn(4, 6, 8)[2, :3],
        "näme": torch.arange(3, dtype=torch.int32),
    }
    path = tmp_path / "x.safetensors"
    write_shard(path, [record(name, value) for name, value in tensors.items()], {"format": "pt", "note": "1"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "1"}
    header = read_header(path)
    assert all(entry.start % read.DTYPES[entry.dtype].itemsize == 0 for entry in header.entries.values())
    for align in (8, 64, 4096):
        write_shard(path, [record(name, value) for name, value in tensors.items()], {}, align=align)
        assert min(entry.start for entry in read_header(path).entries.values()) % align == 0
        assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())
