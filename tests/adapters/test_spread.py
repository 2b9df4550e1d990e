"""Adapters for programs without stacked experts: the same function, whoever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import factors_of, ours, peer_of, theirs
from safetensors.torch import load_file, save_file

from mixtral.adapters.factors import TARGETS, target_of
from mixtral.adapters.peft import CONFIG_NAME, MISTRAL_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from mixtral.adapters.spread import write_mistral, write_per_expert
from mixtral.errors import CheckpointError
from mixtral.model import Mixtral
from mixtral.weights import load_model, save_model

# PEFT looks for what the patterns match among modules alone; parameters get their rank all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"rank": 3, "alpha": 5, "expert_rank": 2, "targets": tuple(TARGETS)},
    "experts": {"rank": 2, "alpha": 3, "targets": ("gate_up", "down")},
    "attention": {"rank": 3, "targets": ("q", "k")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_module_per_expert(name: str, tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config, **OPTIONS[name])
    write_per_expert(tmp_path, tiny_model.config, factors, base="some/base")
    names = load_file(tmp_path / WEIGHTS_NAME).keys()
    assert not any(".mlp." in one for one in names)
    if name != "attention":
        assert "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_B.weight" in names
    found = read_adapter(tmp_path, tiny_model.config)
    assert found.base == "some/base"
    torch.testing.assert_close(ours(tiny_model, found.factors), ours(tiny_model, factors), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["experts", "attention"])
def test_peft_reads_a_module_per_expert(name: str, tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config, **OPTIONS[name])
    write_per_expert(tmp_path / "adapter", tiny_model.config, factors)
    peer = peer_of(tiny_model, tmp_path / "base")
    adapted = theirs(peft.PeftModel.from_pretrained(peer, tmp_path / "adapter"))
    torch.testing.assert_close(adapted, ours(tiny_model, factors), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_mistral(name: str, tiny_model: Mixtral, tmp_path: Path) -> None:
    """Added to Mistral's own weights as mistral-inference does it, ``B @ A * 2`` for every matrix but the head; which
    fails where one is missing."""
    config = tiny_model.config
    factors = factors_of(config, **OPTIONS[name])
    write_mistral(tmp_path / "adapter", config, factors, dtype=torch.float32)
    save_model(tiny_model, tmp_path / "base", layout="consolidated")
    path = tmp_path / "base" / "consolidated.safetensors"
    weights, lora = load_file(path), load_file(tmp_path / "adapter" / MISTRAL_NAME)
    for key, weight in weights.items():
        if weight.dim() == 2 and not key.startswith(("output.", "tok_embeddings.")):
            stem = key.removesuffix(".weight")
            weights[key] = weight + lora.pop(f"{stem}.lora_B.weight") @ lora.pop(f"{stem}.lora_A.weight") * 2.0
    assert not lora
    save_file(weights, path)
    merged = load_model(tmp_path / "base", device="cpu")
    torch.testing.assert_close(ours(merged), ours(tiny_model, factors), atol=3e-5, rtol=1e-4)
    found = read_adapter(tmp_path / "adapter", config)
    assert found.factors.keys() == factors.keys()
    torch.testing.assert_close(ours(tiny_model, found.factors), ours(tiny_model, factors), atol=3e-5, rtol=1e-4)


def test_only_some_layers(tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config, rank=2, targets=("q", "down"))
    del factors["model.layers.0.mlp.experts.down_proj"]
    write_per_expert(tmp_path, tiny_model.config, factors)
    targets = json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"]
    assert "model.layers.1.block_sparse_moe.experts.0.w2" in targets
    found = read_adapter(tmp_path, tiny_model.config).factors
    assert found.keys() == factors.keys()
    torch.testing.assert_close(ours(tiny_model, found), ours(tiny_model, factors), atol=2e-5, rtol=1e-4)


def test_no_adapter_is_replaced_unasked(tiny_model: Mixtral, tmp_path: Path) -> None:
    factors = factors_of(tiny_model.config, rank=2, targets=("q",))
    write_mistral(tmp_path, tiny_model.config, factors)
    for write in (write_mistral, write_per_expert, write_adapter):
        with pytest.raises(CheckpointError, match="holds an adapter"):
            write(tmp_path, tiny_model.config, factors)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a folder"):
        write_adapter(tmp_path / "file", tiny_model.config, factors, overwrite=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [(write_mistral, write_adapter), (write_mistral, write_per_expert), (write_adapter, write_mistral)],
)
def test_overwriting_leaves_nothing_of_the_other_form(
    first: Callable[..., None], second: Callable[..., None], tiny_model: Mixtral, tmp_path: Path
) -> None:
    config = tiny_model.config
    first(tmp_path, config, factors_of(config, rank=2, targets=("q",)))
    (tmp_path / "README.md").touch()
    second(tmp_path, config, factors_of(config, rank=2, targets=("v",)), overwrite=True)
    assert {target_of(name) for name in read_adapter(tmp_path, config).factors} == {"v"}
    wanted = {MISTRAL_NAME} if second is write_mistral else {CONFIG_NAME, WEIGHTS_NAME}
    left = {path.name for path in tmp_path.iterdir()} - {"params.json"}
    assert left == {"README.md", *wanted}


def test_a_folder_with_both_forms_is_refused(tiny_model: Mixtral, tmp_path: Path) -> None:
    config = tiny_model.config
    write_adapter(tmp_path / "both", config, factors_of(config, rank=2, targets=("q",)))
    write_mistral(tmp_path / "one", config, factors_of(config, rank=2, targets=("v",)))
    shutil.copy(tmp_path / "one" / MISTRAL_NAME, tmp_path / "both")
    with pytest.raises(CheckpointError, match=r"holds two adapters, adapter_config\.json and lora\.safetensors"):
        read_adapter(tmp_path / "both", config)
    assert read_adapter(tmp_path / "both" / MISTRAL_NAME, config, scaling=2.0).kind == "mistral-finetune"


def test_the_params_of_a_model_are_never_replaced(tiny_model: Mixtral, tmp_path: Path) -> None:
    config = tiny_model.config
    factors = factors_of(config, rank=2, targets=("q",))
    save_model(tiny_model, tmp_path, layout="consolidated")
    before = (tmp_path / "params.json").read_text()
    with pytest.raises(CheckpointError, match=r"holds a params\.json; .* overwrite it explicitly"):
        write_mistral(tmp_path, config, factors)
    with pytest.raises(CheckpointError, match="has 'dim', as that of a model"):
        write_mistral(tmp_path, config, factors, overwrite=True)
    assert (tmp_path / "params.json").read_text() == before
    assert not (tmp_path / MISTRAL_NAME).exists()
    (tmp_path / "params.json").write_text('{"lora": {"scaling": 1.0}}')
    write_mistral(tmp_path, config, factors, overwrite=True)
    assert json.loads((tmp_path / "params.json").read_text())["lora"]["scaling"] == 2.0
