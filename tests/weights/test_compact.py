from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral.errors import CheckpointError, ConfigError, MixtralError
from mixtral.files.safetensors import SINGLE_NAME
from mixtral.model.mixtral import Mixtral
from mixtral.quant.int8 import decode, encode
from mixtral.weights.compact import MANIFEST_NAME, is_compact, load_compact, save_compact
from mixtral.weights.load import load_model
from mixtral.weights.save import checked_parameters, save_model
from mixtral.weights.vocab import expand_rows, row_map, share_rows

Make = Callable[..., Mixtral]
TRAINED = [0, 1, 2, 5, 9, 33, 79]
RESPELL = {40: (5, 9), 7: (33,), 41: (9, 9, 9)}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def rows() -> Tensor:
    return row_map(TRAINED, 80)


@pytest.fixture
def trained(make: Make, rows: Tensor) -> Mixtral:
    """A model whose untrained ids have equal rows."""
    model = make()
    with torch.no_grad():
        for name in TABLES:
            table = model.get_parameter(name)
            table.copy_(expand_rows(table[: len(TRAINED) + 1].clone(), rows))
    return model


@pytest.fixture
def compact(trained: Mixtral, rows: Tensor, tmp_path: Path) -> Path:
    folder = tmp_path / "compact"
    save_compact(trained, folder, row_of_id=rows, respell=RESPELL, metadata={"steps": "12"})
    return folder


def test_values_are_those_of_int8_groups(compact: Path, trained: Mixtral, rows: Tensor) -> None:
    loaded = load_compact(compact, device="cpu")
    assert loaded.respell == RESPELL
    assert loaded.metadata == {"steps": "12"}
    assert torch.equal(loaded.row_of_id, rows)
    assert loaded.model.config == trained.config
    for name, value in trained.named_parameters():
        kept = value.ndim == 1 or name.endswith("mlp.gate.weight")
        expected = value if kept else decode(*encode(value))
        assert torch.equal(loaded.model.get_parameter(name), expected), name


def test_embedded_rows_are_shared_on_disk(compact: Path, rows: Tensor) -> None:
    tensors = load_file(compact / SINGLE_NAME)
    assert tensors["lm_head.weight.q8"].shape == (len(TRAINED) + 1, 64)
    model = load_compact(compact, device="cpu").model
    for name in TABLES:
        assert share_rows(model.get_parameter(name), rows).shape == (len(TRAINED) + 1, 64)
    assert (compact / SINGLE_NAME).stat().st_size < 0.3 * sum(value.nbytes for value in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, compact: Path) -> None:
    exact, model = load_compact(compact, device="cpu").model, load_compact(compact, device="cpu", dtype=dtype).model
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if name.endswith("mlp.gate.weight") else dtype)
        assert torch.equal(value, exact.get_parameter(name).to(value.dtype))


def test_saving_again_writes_the_same_bytes(compact: Path, trained: Mixtral, rows: Tensor) -> None:
    before = {path.name: path.read_bytes() for path in compact.iterdir()}
    (compact / "CARD.md").write_text("card")
    save_compact(trained, compact, row_of_id=rows, respell=RESPELL, metadata={"steps": "12"})
    assert {path.name: path.read_bytes() for path in compact.iterdir()} == {**before, "CARD.md": b"card"}


def test_the_formats_are_told_apart(compact: Path, folder: Path, tmp_path: Path) -> None:
    assert is_compact(compact)
    assert not is_compact(folder)
    assert not is_compact(tmp_path)
    with pytest.raises(CheckpointError, match="load_compact"):
        load_model(compact, device="cpu")


def test_an_empty_respelling(trained: Mixtral, rows: Tensor, tmp_path: Path) -> None:
    save_compact(trained, tmp_path, row_of_id=rows, respell={}, metadata={})
    assert load_compact(tmp_path, device="cpu").respell == {}


def _rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_NAME)
        change(tensors)
        save_file(tensors, folder / SINGLE_NAME)
        data = (folder / SINGLE_NAME).read_bytes()
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))

    return apply


def _manifest(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST_NAME).write_text(text)


def _flip(folder: Path) -> None:
    data = bytearray((folder / SINGLE_NAME).read_bytes())
    data[-1] ^= 1
    (folder / SINGLE_NAME).write_bytes(data)


def _set(name: str, value: object) -> Callable[[Path], None]:
    return _rewrite(lambda tensors: tensors.__setitem__(name, torch.tensor(value, dtype=torch.int32)))


def _config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (_flip, "sha256 is not"),
    "one byte less": (
        lambda folder: (folder / SINGLE_NAME).write_bytes((folder / SINGLE_NAME).read_bytes()[:-1]),
        "manifest.json says",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "no such file"),
    "manifest not JSON": (_manifest("{"), "manifest.json: not JSON"),
    "manifest a list": (_manifest("[]"), "expected a JSON object, got list"),
    "manifest without size": (_manifest('{"sha256": ""}'), "expected an object"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no such file"),
    "no rows": (_rewrite(lambda tensors: tensors.pop("row_of_id")), "'row_of_id' is missing, expected"),
    "rows of another vocabulary": (
        _set("row_of_id", [0, 1]),
        r"'row_of_id' is \('I32', \(2,\)\), expected \('I32', \(80,\)\)",
    ),
    "rows out of order": (_set("row_of_id", list(range(79, -1, -1))), "in order"),
    "rows that are not there": (_set("row_of_id", [*range(79), 78]), "row_of_id does not name all 8 rows"),
    "pieces without end": (_set("respell.pieces", [5] * (64 * 81 + 1)), r"'respell.pieces' is \('I32', \(5185,"),
    "tensor missing": (
        _rewrite(lambda tensors: tensors.pop("lm_head.weight.scale")),
        "lm_head.weight.scale' is missing",
    ),
    "extra tensor": (_set("extra", [1]), "'extra' is .*expected no such tensor"),
    "plain weights": (
        _rewrite(lambda tensors: tensors.__setitem__("lm_head.weight.q8", torch.ones(8, 64))),
        "lm_head.weight.q8' is ..F32",
    ),
    "wrong shape": (
        _rewrite(lambda tensors: tensors.__setitem__("model.norm.weight", torch.ones(65))),
        "model.norm.weight",
    ),
    "respell offsets": (_set("respell.offsets", [0, 1, 3, 7]), "respell.offsets does not divide"),
    "respell offsets empty": (
        _rewrite(lambda tensors: tensors.__setitem__("respell.offsets", torch.ones(0, dtype=torch.int32))),
        "respell.offsets does not divide",
    ),
    "respell offsets back": (_set("respell.offsets", [0, 4, 3, 6]), "respell.offsets does not divide"),
    "respell ids": (_set("respell.ids", [7, 40, 80]), "outside the vocabulary"),
    "respell pieces": (_set("respell.pieces", [33, 5, 9, 9, 9, -1]), "outside the vocabulary"),
    "respell of two dimensions": (_set("respell.pieces", [[33, 5, 9], [9, 9, 9]]), "respell.pieces"),
    "manifest with a name twice": (_manifest('{"size": 1, "size": 2}'), "manifest.json: 'size' appears twice"),
    "a billion layers": (lambda folder: _config(folder, num_hidden_layers=10**9), "expected at most 1024"),
    "rows of no whole groups": (lambda folder: _config(folder, intermediate_size=90), "rows here are multiples of 32"),
    "another config": (lambda folder: _config(folder, num_hidden_layers=1), "expected no such tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, compact: Path) -> None:
    change, told = BAD[case]
    change(compact)
    with pytest.raises(MixtralError, match=told) as caught:
        load_compact(compact, device="cpu")
    assert isinstance(caught.value, (CheckpointError, ConfigError))


def test_rows_that_differ_are_not_shared(make: Make, rows: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not have the values of the row"):
        save_compact(make(), tmp_path / "new", row_of_id=rows, respell={}, metadata={})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("respell", [{40: ()}, {80: (1,)}, {40: (1, 80)}])
def test_bad_respelling_is_not_written(
    respell: dict[int, tuple[int, ...]], trained: Mixtral, rows: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="respell"):
        save_compact(trained, tmp_path / "new", row_of_id=rows, respell=respell, metadata={})


# --- integers that stay integers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_packed_model_holds_the_same_numbers(compact: Path, dtype: torch.dtype | None) -> None:
    plain = load_compact(compact, device="cpu", dtype=dtype)
    packed = load_compact(compact, device="cpu", dtype=dtype, packed=True)
    assert packed.model.dtype == plain.model.dtype
    assert (packed.respell, packed.metadata) == (plain.respell, plain.metadata)
    dense = [name for name, _ in packed.model.named_parameters()]
    assert all("norm" in name or "gate.weight" in name for name in dense)
    found = checked_parameters(packed.model)
    for name, value in plain.model.named_parameters():
        assert torch.equal(found[name], value), name


def test_a_packed_model_gives_the_logits_of_the_decoded_one(compact: Path) -> None:
    """Up to the rounding of inputs to int8; embedding rows exactly."""
    plain = load_compact(compact, device="cpu").model
    packed = load_compact(compact, device="cpu", packed=True).model
    ids = torch.arange(80)
    assert torch.equal(packed.model.embed_tokens(ids), plain.model.embed_tokens(ids))
    hidden_TD = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    expected, scores = plain.logits(hidden_TD), packed.logits(hidden_TD)
    assert scores.shape == (7, 80)
    assert (scores - expected).abs().max() < 0.02 * expected.abs().max()
    shared = [id for id in range(80) if id not in TRAINED]
    assert (scores[:, shared] == scores[:, shared[:1]]).all()


def test_scores_of_shared_rows_in_another_dtype(compact: Path) -> None:
    packed = load_compact(compact, device="cpu", packed=True).model
    hidden_TD = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = packed.lm_head(hidden_TD.float()).bfloat16()
    assert torch.equal(packed.lm_head(hidden_TD), expected)


def test_a_packed_model_is_saved_decoded(compact: Path, tmp_path: Path) -> None:
    packed = load_compact(compact, device="cpu", packed=True).model
    save_model(packed, tmp_path / "saved", layout="fused", overwrite=False)
    again = load_model(tmp_path / "saved", device="cpu")
    for name, value in load_compact(compact, device="cpu").model.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
