"""The picture: written without a window system, and refused before anything runs where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mixtral.bench import plot
from mixtral.bench.limits import Limits
from mixtral.bench.plot import check_plot, write_plot
from mixtral.bench.report import Row, row_of
from mixtral.bench.traffic import Weights
from mixtral.bench.turns import Measured
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError


def rows(config: MixtralConfig, *sides: str) -> list[Row]:
    weights = Weights(config, 1000, 1000, 1000, (4000, 4000), ("Q4_K",))
    limits = Limits(2, "a", 30e9, 1e12, 1e12, None)
    return [
        row_of(Measured(work, {side: [[1.0], [2.0]] for side in sides}, [2.0, 2.0], limits, {}), weights, turns=2)
        for work in (Work("decode", 8, 1, 1), Work("prefill", 512, 1, 0))
    ]


@pytest.mark.parametrize(("name", "start"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.PDF", b"%PDF")])
def test_a_picture_is_written(name: str, start: bytes, tmp_path: Path, tiny_config: MixtralConfig) -> None:
    check_plot(tmp_path / name)
    write_plot(tmp_path / name, rows(tiny_config, "mixtral", "llama.cpp"), "a model, 2 threads")
    assert (tmp_path / name).read_bytes().startswith(start)
    write_plot(tmp_path / name, rows(tiny_config, "mixtral")[:1], "alone")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_name_that_is_no_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--plot is 'p\.txt'; expected a name that ends in \.png, \.svg, \.pdf"):
        check_plot(Path("p.txt"))


def test_a_missing_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--plot needs matplotlib; install it with `pip install 'mixtral\[bench\]'`"):
        check_plot(Path("p.png"))
