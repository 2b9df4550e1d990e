"""The older form of importance files: what its counts may say. What is read: ``tests/weights/test_importance.py``."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mixtral.errors import CheckpointError
from mixtral.files.imatrix import read_imatrix

ENTRY = struct.pack("<i", 19) + b"blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "the number of entries would take 4 of the 0 bytes"),
        (struct.pack("<i", 0), "the number of entries is 0; expected 1 to"),
        (struct.pack("<i", -1), "the number of entries is -1"),
        (struct.pack("<i", 2**31 - 1) + ENTRY, "the number of entries is 2,147,483,647; expected 1 to 65,536"),
        (struct.pack("<i", 65_536) + ENTRY, "65,536 entries would take 1,114,112 of the 23 bytes"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(20), "the length of the name of entry 0 is 2,147,483,647"),
        (struct.pack("<ii", 1, -5) + bytes(20), "the length of the name of entry 0 is -5"),
        (struct.pack("<ii", 1, 200) + bytes(20), "the name of entry 0 would take 200 of the 20 bytes"),
        (struct.pack("<ii2s", 1, 2, b"\xff\xfe") + bytes(20), "the name of entry 0 is .*not UTF-8"),
        (struct.pack("<i", 1) + ENTRY + struct.pack("<ii", -1, 4) + bytes(16), "calls of 'blk.0.attn_q.weight' is -1"),
        (struct.pack("<i", 1) + ENTRY + struct.pack("<ii", 1, 0), "values of 'blk.0.attn_q.weight' is 0"),
        (
            struct.pack("<i", 1) + ENTRY + struct.pack("<ii", 1, 2**31 - 1) + bytes(16),
            "the values of 'blk.0.attn_q.weight' would take 8,589,934,588 of the 16 bytes",
        ),
        (struct.pack("<i", 2) + 2 * (ENTRY + struct.pack("<ii", 1, 4) + bytes(16)), "'blk.0.attn_q.weight' appears"),
    ],
)
def test_counts_that_lie(data: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"i\.dat: .*{told}"):
        read_imatrix(tmp_path / "i.dat")


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """A file that claims 8 GB of values, and has room for them, costs no memory."""
    path, size = tmp_path / "i.dat", 2**31 - 1
    with path.open("wb") as file:
        file.write(struct.pack("<i", 1) + ENTRY + struct.pack("<ii", 1, size))
        start = file.tell()
        file.truncate(start + 4 * size)
    found = read_imatrix(path).entries["blk.0.attn_q.weight"]
    assert (found.size, found.count_size, found.sums.start) == (size, 1, start)
