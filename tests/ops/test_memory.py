"""Memory in large pages is ordinary memory; what is left is what Linux says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtral.ops.memory import LARGE, available_bytes, empty, map_file


def control_group(most: str, used: str) -> dict[str, str]:
    return {"sys/fs/cgroup/memory.max": f"{most}\n", "sys/fs/cgroup/memory.current": f"{used}\n"}


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


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2 << 30),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    5000 kB\n"}, 5000 * 1024),
        ({"proc/meminfo": "MemAvailable: 5000 kB\n", **control_group("4096000", "1000")}, 4095000),
        ({"proc/meminfo": "MemAvailable: 5000 kB\n", **control_group("max", "1000")}, 5000 * 1024),
        (control_group("1000", "4000"), 0),
    ],
)
def test_available_bytes(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(torch.device("cpu"), tmp_path) == expected


def test_this_machine_has_memory_left() -> None:
    assert available_bytes(torch.device("cpu")) > 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can")
def test_freed_memory_is_kept() -> None:
    """A large piece that was freed is taken again without new pages of the kernel."""
    code = (
        "import resource, torch\n"
        "from mixtral.ops.memory import keep_freed\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(32 << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "anew = faults()\n"
        "assert keep_freed()\n"
        "faults()\n"
        "print(anew, min(faults() for _ in range(5)))\n"  # now and then something small is put where the piece was
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    anew, kept = map(int, done.stdout.split())
    assert kept < anew / 10
