"""Files of packed weights: what is written is what is taken, and no damaged or cut file is used."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixtral.errors import CheckpointError
from mixtral.files import panel_file
from mixtral.files.panel_file import PanelFile, places, write_panels
from mixtral.quant.encode import encode_rows
from mixtral.quant.packed import Blocks
from mixtral.quant.panels import Panels, to_panels
from mixtral.quant.rtn import IntForm, encode_groups

X = torch.randn((3, 512), generator=torch.Generator().manual_seed(1))


def panels_of(name: str, rows: int = 40) -> Panels:
    values = torch.randn((rows, 512), generator=torch.Generator().manual_seed(rows)) * 0.05
    int4 = name == "int4"
    found = to_panels(encode_groups(values, IntForm(4, 128)) if int4 else Blocks(name, encode_rows(values, name)))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def matrices() -> dict[str, Panels]:
    return {"a": panels_of("Q4_K"), "b.0.gate": panels_of("Q6_K", 17), "c": panels_of("Q8_0"), "d": panels_of("int4")}


@pytest.fixture
def path(matrices: dict[str, Panels], tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "panels.safetensors"
    assert write_panels(path, matrices, source="key", sha256="sum")
    return path


def test_what_is_taken_is_what_was_written(path: Path, matrices: dict[str, Panels]) -> None:
    file = PanelFile(path)
    assert (file.source, file.sha256, file.names) == ("key", "sum", set(matrices))
    for name, expected in matrices.items():
        found = file.take(name)
        assert (found.label, found.kind, found.shape, found.group, found.bits) == (
            expected.label,
            expected.kind,
            expected.shape,
            expected.group,
            expected.bits,
        )
        assert torch.equal(found.data, expected.data)
        assert found.data.data_ptr() % 64 == 0
        assert torch.equal(found.multiply(X), expected.multiply(X))
        assert torch.equal(found.decode(torch.float32), expected.decode(torch.float32))
    assert os.listdir(path.parent) == [path.name]


def test_it_is_a_safetensors_file(path: Path, matrices: dict[str, Panels]) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(matrices)
        assert torch.equal(file.get_tensor("a").view(torch.uint8), matrices["a"].data)
        assert json.loads(file.metadata()["matrices"])["a"] == ["Q4_K", 2, 40, 512, 0, 0]


def test_another_file_may_take_its_name(path: Path, matrices: dict[str, Panels]) -> None:
    found = PanelFile(path).take("a")
    write_panels(path, {"a": panels_of("Q5_K")}, source="other", sha256="")
    assert torch.equal(found.data, matrices["a"].data)
    assert PanelFile(path).take("a").label == "Q5_K"


def test_every_byte_of_the_header_counts(path: Path) -> None:
    data = bytearray(path.read_bytes())
    count = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + count]
    assert count % 64 == 56
    meaningful = len(text.rstrip())
    for place in range(8 + meaningful):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            PanelFile(path)
    path.write_bytes(data)
    PanelFile(path)


@pytest.mark.parametrize("left", [0, 4, 100, 5000, -4096, -1])
def test_a_file_that_was_cut_is_refused(left: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="truncated"):
        PanelFile(path)


def test_a_hole_in_the_data_is_seen(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the data are damaged"):
        PanelFile(path)


def test_samples_are_spread() -> None:
    assert places(10) == [0, 0]
    assert places(8192) == [0, 4096]
    many = places(100 << 20)
    assert (many[0], many[-1]) == (0, (100 << 20) - 4096)
    assert max(b - a for a, b in itertools.pairwise(many)) <= 8 << 20


def test_another_version_is_refused(path: Path, matrices: dict[str, Panels], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_file, "VERSION", "1.0")
    write_panels(path, matrices, source="", sha256="")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=rf"version '1.0'; this is version '{panel_file.VERSION}'"):
        PanelFile(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a file of packed weights"):
        PanelFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        PanelFile(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("change", [{"shape": (40, 768)}, {"shape": (40,)}, {"kind": 9}, {"group": "x"}, {"kind": 6}])
def test_numbers_that_do_not_belong_together(change: dict[str, Any], tmp_path: Path) -> None:
    matrix = panels_of("Q4_K")
    for name, value in change.items():
        setattr(matrix, name, value)
    write_panels(tmp_path / "x", {"a": matrix}, source="", sha256="")
    with pytest.raises(CheckpointError, match="'a' is no matrix in panels"):
        PanelFile(tmp_path / "x").take("a")


def test_a_full_disk_leaves_nothing(path: Path, matrices: dict[str, Panels]) -> None:
    """The limit of a file's size stands for it; the file that was there stays."""
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_panels(path, matrices, source="new", sha256="")
        with pytest.raises(OSError, match="File too large"):
            write_panels(path.parent / "other", matrices, source="new", sha256="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


def test_two_writers(path: Path, matrices: dict[str, Panels]) -> None:
    partial = path.parent / f".{path.name}.partial"
    with partial.open("wb") as other:
        other.write(b"half of it")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not write_panels(path, matrices, source="new", sha256="")
        assert partial.read_bytes() == b"half of it"
    assert write_panels(path, matrices, source="new", sha256="")  # that one was killed
    assert not partial.exists()
    assert PanelFile(path).source == "new"


DIES = """
import os, sys
from pathlib import Path
import torch
from mixtral.files import panel_file
from mixtral.quant.packed import Blocks
from mixtral.quant.panels import to_panels
panel_file.flush = lambda path: os._exit(7)
matrix = to_panels(Blocks("Q8_0", torch.zeros((16, 34), dtype=torch.uint8)))
panel_file.write_panels(Path(sys.argv[1]), {"a": matrix}, source="", sha256="")
"""


def test_a_writer_that_is_killed_changes_nothing(path: Path, matrices: dict[str, Panels]) -> None:
    run = subprocess.run([sys.executable, "-c", DIES, str(path)], timeout=60, check=False)
    assert run.returncode == 7
    assert sorted(os.listdir(path.parent)) == [f".{path.name}.partial", path.name]
    assert torch.equal(PanelFile(path).take("a").data, matrices["a"].data)
    assert write_panels(path, matrices, source="", sha256="")
    assert os.listdir(path.parent) == [path.name]
