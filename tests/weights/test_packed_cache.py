"""The cache of packed weights: the same logits bit for bit, and never those of another model."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integers import FORMS, configure, g, write

import mixtral
from mixtral.bench.random_model import create_model
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.weights import packed_cache
from mixtral.weights.load import load_model
from mixtral.weights.reader import MatrixReader

CONFIG = MixtralConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
IDS = list(range(3, 60))
MINUTE = 60 * 10**9
COMPARED = "these files are new to it; they are compared with those that it was made from"


def create(target: Path, form: str = "q4_k_m", seed: int = 0) -> Path:
    return create_model(CONFIG, target, form=form, name="x", vocabulary=lambda size: {}, seed=seed, overwrite=True).path


def older(path: Path) -> Path:
    """The files of a model, as if it had been there for long."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - MINUTE))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return older(create(tmp_path / "model.gguf"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "caches" / "packed"


def files(cache: Path) -> list[Path]:
    """Of packed weights."""
    return sorted(cache.glob("*.safetensors"))


def logits(path: Path, cache: Path | None = None) -> torch.Tensor:
    return mixtral.load(path, packed_cache=cache).logits(IDS)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.getMessage().startswith("packed cache: ")]
    caplog.clear()
    return [text.removeprefix("packed cache: ") for text in found]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mixtral")


@pytest.mark.parametrize("form", ["q4_k_m", "q2_k", "q8_0", "q4_0", "int4_g64", "int8"])
def test_the_same_logits_with_and_without(
    form: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = older(create(tmp_path / "model", form))
    expected = logits(path)
    assert told(caplog) == []
    assert torch.equal(logits(path, cache), expected)
    (file,) = files(cache)
    (written,) = told(caplog)
    assert written.startswith(f"{file} written, ")
    for _ in range(2):
        assert torch.equal(logits(path, cache), expected)
        assert told(caplog) == [f"{file} is used"]
    assert sorted(cache.iterdir()) == [file.with_suffix(".known"), file]


def test_what_is_in_the_cache_is_not_read_again(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(model, device="cpu", packed_cache=cache)
    read: list[str] = []
    borrowed = MatrixReader.borrowed
    monkeypatch.setattr(MatrixReader, "borrowed", lambda *given: read.append(given[1].name) or borrowed(*given))
    load_model(model, device="cpu", packed_cache=cache)
    assert read == []
    load_model(model, device="cpu")
    assert len(read) == 2 * (4 + 3 * 3) + 1


def test_a_copy_elsewhere_uses_the_same_file(
    model: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(model, cache)
    (file,) = files(cache)
    copy = tmp_path / "elsewhere" / "other name.gguf"
    copy.parent.mkdir()
    shutil.copyfile(model, copy)
    for _ in range(2):
        told(caplog)
        assert torch.equal(logits(copy, cache), expected)
        assert told(caplog) == [COMPARED, f"{file} is used"]
        assert torch.equal(logits(copy, cache), expected)
        assert torch.equal(logits(model, cache), expected)
        assert told(caplog) == [f"{file} is used"] * 2  # both are known
        shutil.copyfile(model, copy)  # the same bytes once more, but who knows


def test_other_weights_have_another_file(model: Path, cache: Path, tmp_path: Path) -> None:
    other = older(create(tmp_path / "other.gguf", seed=1))
    expected = logits(other)
    logits(model, cache)
    assert torch.equal(logits(other, cache), expected)
    assert len(files(cache)) == 2


def _change(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _unsampled(path: Path) -> int:
    """A place in a model where a block begins, and of which the key takes no sample."""
    entry = next(e for e in packed_cache._stored(_entries(path)) if "ffn_gate_exps" in e.name)
    return entry.start + 40 * 144


def test_a_changed_byte_anywhere_is_seen(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where no sample is taken, and where the file keeps its time."""
    logits(model, cache)
    (file,) = files(cache)
    state = model.stat()
    _change(model, _unsampled(model))
    os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns))
    expected = logits(model)
    told(caplog)
    assert torch.equal(logits(model, cache), expected)
    messages = told(caplog)
    assert messages[:2] == [COMPARED, f"{file.name}: made from other weights; the weights are packed anew"]
    assert messages[2].startswith(f"{file} written")
    assert sorted(cache.iterdir()) == [file.with_suffix(".known"), file]


def test_another_model_older_than_the_cache(model: Path, cache: Path, tmp_path: Path) -> None:
    """Two models that differ only where no sample is taken, both older than the cache of the first, in turns."""
    other, place = tmp_path / "other.gguf", _unsampled(model)
    data = bytearray(model.read_bytes())
    data[place : place + 28_800] = data[place + 28_800 : place + 57_600]
    other.write_bytes(data)
    for path in (model, other):
        os.utime(path, ns=(0, time.time_ns() - 60 * MINUTE))
    expected = {path: logits(path) for path in (model, other)}
    assert not torch.equal(expected[model], expected[other])
    for path in (model, other, other, model):
        assert torch.equal(logits(path, cache), expected[path])
    assert len(files(cache)) == 1


def _of_others(known: Path) -> None:
    told = json.loads(known.read_text())
    known.write_text(json.dumps(told | {"sha256": "0" * 64}))


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda known: known.write_text("{"),
        lambda known: known.write_text("[]"),
        lambda known: known.write_text('{"sha256": 1}'),
        _of_others,
    ],
)
def test_a_list_of_known_files_that_says_nothing(
    spoil: Callable[[Path], object], model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(model, cache)
    (file,) = files(cache)
    spoil(file.with_suffix(".known"))
    for lines in ([COMPARED, f"{file} is used"], [f"{file} is used"]):
        told(caplog)
        assert torch.equal(logits(model, cache), expected)
        assert told(caplog) == lines


def _entries(path: Path) -> Any:
    from mixtral.weights.checkpoint import open_checkpoint

    return open_checkpoint(path).entries.values()


def test_the_way_to_read_the_files_counts(cache: Path, tmp_path: Path) -> None:
    """Of GPTQ the config says what the stored zeros mean."""
    folder = tmp_path / "model"
    write(folder, FORMS["gptq 8"])
    older(folder)
    first = logits(folder, cache)
    configure(folder, quantization_config=g(8, sym=False, form="gptq_v2", desc_act=False))
    expected = logits(folder)
    assert not torch.equal(expected, first)
    assert torch.equal(logits(folder, cache), expected)
    assert len(files(cache)) == 2


@pytest.mark.parametrize("form", ["gptq 4", "gptq 3, zeros", "awq", "ct 5", "ct int8, zeros"])
def test_integer_checkpoints(form: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "model", FORMS[form])
    older(tmp_path / "model")
    expected = logits(tmp_path / "model")
    for _ in range(2):
        assert torch.equal(logits(tmp_path / "model", cache), expected)
    assert told(caplog)[-1].endswith(" is used")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size - 1), "truncated"),
    "empty": (lambda file: os.truncate(file, 0), "truncated"),
    "header": (lambda file: _change(file, 40), "header is damaged|not JSON|expected|not a file of packed weights"),
    "data": (lambda file: _change(file, file.stat().st_size - 1), "data are damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_made_anew(case: str, model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(model, cache)
    (file,) = files(cache)
    good = file.read_bytes()
    damage, reason = DAMAGE[case]
    damage(file)
    told(caplog)
    assert torch.equal(logits(model, cache), expected)
    first, second = told(caplog)
    assert re.search(reason, first)
    assert first.endswith("; the weights are packed anew")
    assert second.startswith(f"{file} written")
    assert file.read_bytes() == good
    assert logits(model, cache) is not None
    assert told(caplog) == [f"{file} is used"]


def test_a_file_of_another_model_under_the_name(
    model: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = older(create(tmp_path / "other.gguf", seed=1))
    expected = logits(model, cache)
    (file,) = files(cache)
    logits(other, tmp_path / "second")
    shutil.copy(files(tmp_path / "second")[0], file)
    told(caplog)
    assert torch.equal(logits(model, cache), expected)
    assert told(caplog)[0] == f"{file.name}: made from other weights; the weights are packed anew"


def test_a_full_disk(model: Path, cache: Path) -> None:
    expected, limits = logits(model), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.warns(
            UserWarning, match=r"packed cache: .* cannot be written \(File too large\); it goes on without"
        ):
            found = logits(model, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(found, expected)
    assert list(cache.iterdir()) == []


def test_weights_that_change_while_they_are_read(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packed_cache._sha256
    monkeypatch.setattr(packed_cache, "_sha256", lambda files: (os.utime(model), real(files))[1])
    with pytest.warns(UserWarning, match="changed while they were read; none is written"):
        logits(model, cache)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["_sha256", "_stat"])
def test_weights_that_cannot_be_read_again(
    name: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded already: it is used without a cache."""
    expected = logits(model)
    owner = packed_cache if name == "_sha256" else packed_cache.PackedCache
    real, calls = getattr(owner, name), []

    def failing(given: Any) -> Any:
        calls.append(name)
        if len(calls) > (name == "_stat"):  # states are read once before the weights
            raise OSError(5, "Input/output error")
        return real(given)

    monkeypatch.setattr(owner, name, failing)
    with pytest.warns(UserWarning, match=r"cannot be written \(Input/output error\); it goes on without"):
        found = logits(model, cache)
    assert torch.equal(found, expected)
    assert not cache.exists()


def test_files_with_a_time_to_come(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a clock that is ahead of ours: they are as good as others."""
    os.utime(model, ns=(0, 10 * MINUTE + time.time_ns()))
    expected = logits(model, cache)
    told(caplog)
    assert torch.equal(logits(model, cache), expected)
    assert told(caplog) == [f"{files(cache)[0]} is used"]


def test_nothing_to_pack(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = ["nothing in this model is packed, so none is written"]
    mixtral.load(create(tmp_path / "model", "bf16"), packed_cache=cache)
    assert told(caplog) == nothing
    mixtral.load(packed_cache=cache)
    assert told(caplog) == nothing
    assert not cache.exists()


@pytest.mark.parametrize("options", [{"decode": True}, {"reference": True}])
def test_only_compiled_kernels_have_it(options: dict[str, bool], model: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="packed_cache is for compiled kernels"):
        mixtral.load(model, packed_cache=cache, **options)  # type: ignore[arg-type]


def test_a_file_is_no_folder(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.gguf', a file; expected a folder"):
        mixtral.load(model, packed_cache=model)


def test_a_missing_model_is_told_first(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        mixtral.load(tmp_path / "nothing", packed_cache=cache)
