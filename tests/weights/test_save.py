"""C4, C13: what is written is complete, is what transformers expects, and comes back byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import MixtralConfig as PeerConfig
from transformers import MixtralForCausalLM
from transformers.utils import logging as peer_logging

from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.files.safetensors import INDEX_NAME, SINGLE_NAME
from mixtral.model.mixtral import Mixtral
from mixtral.weights.load import load_model
from mixtral.weights.names import Layout
from mixtral.weights.save import save_model

Make = Callable[..., Mixtral]
LAYOUTS: list[Layout] = ["per-expert", "fused"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    peer_logging.disable_progress_bar()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [10**9, 60_000, 1])
@pytest.mark.parametrize("coarse", [True, False])
def test_ours_to_disk_to_ours_to_disk(layout: Layout, size: int, coarse: bool, make: Make, tmp_path: Path) -> None:
    save_model(make(torch.bfloat16, coarse_router=coarse), tmp_path / "1", layout=layout, shard_size_bytes=size)
    save_model(load_model(tmp_path / "1", device="cpu"), tmp_path / "2", layout=layout, shard_size_bytes=size)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_router_is_written_narrow_only_if_that_loses_nothing(make: Make, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"
    for coarse, expected in ((True, "BF16"), (False, "F32")):
        folder = tmp_path / expected
        save_model(make(torch.bfloat16, coarse_router=coarse), folder)
        with safe_open(folder / SINGLE_NAME, "pt") as file:
            assert file.get_slice(name).get_dtype() == expected
            assert file.get_slice("lm_head.weight").get_dtype() == "BF16"
            assert file.metadata() == {"format": "pt"}


def test_shards_and_index(make: Make, tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path, shard_size_bytes=60_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 3
    assert all(path.stat().st_size < 62_000 for path in shards)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in model.parameters())}
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_opens_what_we_write(layout: Layout, dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    model = make(dtype, coarse_router=True)
    save_model(model, tmp_path, layout=layout, shard_size_bytes=60_000)
    peer = MixtralForCausalLM.from_pretrained(tmp_path)
    assert peer.dtype == dtype
    theirs = peer.state_dict()
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert torch.equal(theirs[name].float(), value.float()), name
    assert peer.config.rope_parameters["rope_theta"] == model.config.rope_theta


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("shard_size", ["60KB", "1GB"])
def test_we_open_what_transformers_writes(
    original: bool, shard_size: str, small: MixtralConfig, tmp_path: Path
) -> None:
    values = small.to_dict()
    peer = MixtralForCausalLM(PeerConfig(**values))
    peer.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard_size)
    model = load_model(tmp_path, device="cpu")
    assert model.config == small
    theirs = peer.state_dict()
    for name, value in model.named_parameters():
        assert torch.equal(value, theirs[name]), name


def test_a_folder_in_use_is_refused_and_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(make(), tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_overwrite_replaces_the_checkpoint_and_nothing_else(make: Make, tmp_path: Path) -> None:
    save_model(make(seed=1), tmp_path, shard_size_bytes=60_000)
    (tmp_path / "notes.txt").write_text("mine")
    save_model(make(seed=2), tmp_path, layout="fused", overwrite=True)
    assert sorted(contents(tmp_path)) == ["config.json", SINGLE_NAME, "notes.txt"]
    assert torch.equal(
        load_model(tmp_path, device="cpu").get_parameter("lm_head.weight"), make(seed=2).get_parameter("lm_head.weight")
    )
    save_model(make(seed=3), tmp_path, shard_size_bytes=60_000, overwrite=True)
    assert not (tmp_path / SINGLE_NAME).exists()
    assert torch.equal(
        load_model(tmp_path, device="cpu").get_parameter("lm_head.weight"), make(seed=3).get_parameter("lm_head.weight")
    )


def test_a_failed_save_leaves_the_old_checkpoint(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(make(seed=1), tmp_path, shard_size_bytes=60_000)
    before = contents(tmp_path)
    calls = 0

    def full_disk(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        original(*arguments)  # type: ignore[arg-type]

    from mixtral.weights import save

    original = save.write_shard
    monkeypatch.setattr(save, "write_shard", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written .No space left"):
        save_model(make(seed=2), tmp_path, shard_size_bytes=60_000, overwrite=True)
    assert contents(tmp_path) == before


def test_a_file_is_no_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        save_model(make(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_model(make(), tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="shard_size_bytes is 0"):
        save_model(make(), tmp_path / "new", shard_size_bytes=0)


def test_only_a_plain_model_is_saved(small: MixtralConfig, make: Make, tmp_path: Path) -> None:
    extra = make()
    extra.register_parameter("lora_A", torch.nn.Parameter(torch.ones(1)))
    mixed = make()
    mixed.get_submodule("lm_head").to(torch.bfloat16)
    cases = [
        (extra, "'lora_A' has no place"),
        (mixed, "several dtypes"),
        (Mixtral(small, device="meta", dtype=torch.float32), "on meta"),
    ]
    for model, told in cases:
        with pytest.raises(CheckpointError, match=told):
            save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
