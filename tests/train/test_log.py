"""``log.jsonl``: lines that were not written whole, or are of steps that will be trained again, go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixtral.errors import TrainingError
from mixtral.train import log


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b'{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1.0}\n', slice(None)),
        (b'{"step": 2}\n{"step": 3}\n{"step": 4}\n', slice(0, 12)),
        (b'{"step": 2}\n{"st', slice(0, 12)),
        (b'{"step": 2}\n{"step": 2', slice(0, 12)),
        (b'{"step": 2}\n\0\0\0\0', slice(0, 12)),
        (b'{"step": 2}\n\xff\n[2]\n2\n{"loss": 1}\n', slice(0, 12)),
        (b'{"step": 3}\n', slice(0, 0)),
    ],
)
def test_a_log_is_trimmed_to_whole_records_up_to_a_step(tmp_path: Path, content: bytes, kept: slice) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    log._trim_log(path, 2)
    assert path.read_bytes() == content[kept]
    assert list(tmp_path.iterdir()) == [path]


def test_trimming_that_fails_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TrainingError, match=r"log.jsonl: cannot be .*No space left on device.*nothing was trained"):
        log._trim_log(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
