"""Models of random weights: every form loads and generates, one seed gives the same bytes, nothing is overwritten."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import mixtral
from mixtral.bench.random_model import FORMS, Created, create_model
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError, ConfigError
from mixtral.files.gguf import read_gguf
from mixtral.weights.checkpoint import open_checkpoint

CONFIG = MixtralConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
FOLDERS = tuple(form for form in FORMS if form.startswith("int") or form in ("f32", "f16", "bf16"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def create(target: Path, form: str, config: MixtralConfig = CONFIG, **more: Any) -> Created:
    return create_model(config, target, form=form, name="random", vocabulary=lambda size: {}, **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_and_generates(form: str, tmp_path: Path) -> None:
    made = create(tmp_path / "model", form)
    assert made.path == (tmp_path / "model" if form in FOLDERS else tmp_path / "model" / f"random.{form}.gguf")
    llm = mixtral.load(made.path)
    ids = list(range(3, 40))
    logits = llm.logits(ids)
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0.05
    assert len(llm.generate(ids, max_tokens=5, temperature=0, stop_ids=()).ids) == 5


@pytest.mark.parametrize("form", ["f16", "bf16", "f32"])
def test_floats_are_a_gguf_file_where_the_name_says_so(form: str, tmp_path: Path) -> None:
    made = create(tmp_path / "model.gguf", form)
    assert made.path == tmp_path / "model.gguf"
    formats = {entry.dtype for entry in read_gguf(made.path).tensors.values()}
    assert formats == {form.upper(), "F32"}
    assert mixtral.load(made.path).generate([5, 6], max_tokens=2, temperature=0, stop_ids=())


@pytest.mark.parametrize("form", ["q4_k_m", "bf16", "int4_g64"])
def test_the_same_seed_gives_the_same_bytes(form: str, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        create(tmp_path / name, form, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_layer_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    create(tmp_path / "two", "f32")
    create(tmp_path / "one", "f32", CONFIG.replace(num_hidden_layers=1))
    two, one = (mixtral.load(tmp_path / name).generator.model.state_dict() for name in ("two", "one"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    first, second = (two[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_parts_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than a part has all its bytes, and none twice."""
    monkeypatch.setattr("mixtral.bench.random_model._PART_BYTES", 5000)
    for form in ("q4_k_m", "bf16", "int3_g32"):
        made = create(tmp_path / form, form)
        values = mixtral.load(made.path, decode=True).generator.model.state_dict()
        experts = values["model.layers.1.mlp.experts.gate_up_proj"].float()
        assert float(experts.std()) == pytest.approx(0.02, rel=0.02)
        assert len(experts.reshape(-1, 256).unique(dim=0)) == experts.numel() // 256


def test_norms_are_one_and_routers_random_float32(tmp_path: Path) -> None:
    for form in ("q4_k_m", "bf16", "int8"):
        checkpoint = open_checkpoint(create(tmp_path / form, form).path)
        routers = {checkpoint.entries[p.name].dtype for p in checkpoint.plan if "mlp.gate." in p.parameter}
        assert routers == {"F32"}
        values = mixtral.load(checkpoint.path).generator.model.state_dict()
        assert all(bool((value == 1).all()) for name, value in values.items() if name.endswith("norm.weight"))
        assert float(values["model.layers.1.mlp.gate.weight"].std()) == pytest.approx(0.02, rel=0.05)


def test_tokens_spread_over_the_experts(tmp_path: Path) -> None:
    llm = mixtral.load(create(tmp_path / "model", "q4_k_m").path)
    seen: list[torch.Tensor] = []
    model = llm.generator.model
    model.register_forward_hook(lambda module, given, found: seen.extend(r.picks_TA for r in found.routes))
    llm.logits([(31 * i) % 290 + 5 for i in range(120)])
    for picks in seen:
        shares = torch.bincount(picks.flatten(), minlength=4) / picks.numel()
        assert 0.08 < float(shares.min()) <= float(shares.max()) < 0.5


def test_a_folder_says_what_its_integers_are(tmp_path: Path) -> None:
    create(tmp_path / "model", "int4_g32")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, True)
    assert config["torch_dtype"] == "bfloat16"


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    for form in ("q8_0", "f16", "int8_g64"):
        told: list[tuple[int, int]] = []
        create(tmp_path / form, form, progress=lambda done, total, told=told: told.append((done, total)))
        assert told[-1][0] == told[-1][1]
        assert [done for done, _ in told] == sorted(done for done, _ in told)


class Refused(NamedTuple):
    target: str
    form: str
    more: dict[str, Any]
    told: str


REFUSED = [
    Refused("new", "q9_k", {}, "format is 'q9_k'; a GGUF file can be f32, f16"),
    Refused("new.gguf", "int4_g32", {}, "no GGUF file holds int4_g32; give a folder"),
    Refused("new", "q8_0", {"seed": -1}, "seed is -1; expected 0 or more"),
    Refused("full", "bf16", {}, "not empty; choose another folder"),
    Refused("full", "q8_0", {}, "not empty; choose another folder"),
    Refused("file", "bf16", {}, "not a folder"),
    Refused("file.gguf", "q8_0", {}, "exists; choose another name"),
    Refused("folder.gguf", "q8_0", {}, "is a folder; give the name of the file"),
    Refused("full", "q8_0", {"overwrite": True}, r"holds another model \(model.safetensors\)"),
    Refused("files", "q8_0", {"overwrite": True}, r"holds another model \(other.gguf\)"),
    Refused("file/below", "q8_0", {}, "Not a directory"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.target}-{case.form}")
def test_what_is_refused_leaves_everything_as_it_was(case: Refused, tmp_path: Path) -> None:
    for folder, file in (("full", "model.safetensors"), ("files", "other.gguf"), ("folder.gguf", "x")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(b"1")
    for name in ("file", "file.gguf"):
        (tmp_path / name).write_bytes(b"1")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises((ConfigError, CheckpointError), match=case.told):
        create(tmp_path / case.target, case.form, **case.more)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_rows_must_divide_into_blocks(tmp_path: Path) -> None:
    narrow = CONFIG.replace(intermediate_size=160)
    with pytest.raises(CheckpointError, match=r"ffn_down_exps.weight'.*such as q8_0"):
        create(tmp_path / "model", "q4_k_m", narrow)
    with pytest.raises(CheckpointError, match=r"w2.weight': a row of 160 values does not divide into groups of 128"):
        create(tmp_path / "model", "int4_g128", narrow)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("form", ["q8_0", "bf16", "int8"])
def test_a_full_disk_is_told_before_anything_is_written(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, but its disk has 0\.00 GB left; choose fewer"):
        create(tmp_path / "deep" / "model", form)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_a_model_of_the_same_kind(tmp_path: Path) -> None:
    for form in ("q8_0", "bf16"):
        create(tmp_path / form, form)
        first = contents(tmp_path / form)
        create(tmp_path / form, form, seed=1, overwrite=True)
        after = contents(tmp_path / form)
        assert after.keys() == first.keys()
        assert after != first


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    for form, folder in (("q8_0", "a"), ("bf16", "b")):
        with pytest.raises(CheckpointError, match="No space left on device"):
            create(tmp_path / folder, form, progress=stop)
        assert list((tmp_path / folder).iterdir()) == []
