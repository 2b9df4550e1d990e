"""Memory in large pages is ordinary memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtral.ops.memory import LARGE, empty, map_file


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0, 1, LARGE, 3 * LARGE + 12345])
def test_empty(size: int, dtype: torch.dtype) -> None:
    found = empty((size // 5 + 1, 5), dtype)
    assert (found.shape, found.dtype, found.device.type) == ((size // 5 + 1, 5), dtype, "cpu")
    assert found.is_contiguous()
    found.fill_(3)
    assert int(found.double().sum()) == 3 * found.numel()
    assert found.data_ptr() % 64 == 0
    parameter = torch.nn.Parameter(found.float())
    parameter.sum().backward()


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"some text")
    memory = map_file(path)
    assert memory[:] == b"some text"
    memory[0] = ord("S")
    assert path.read_bytes() == b"some text"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        map_file(path)
