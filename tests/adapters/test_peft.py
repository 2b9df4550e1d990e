"""Adapter files: what is written here works in the real PEFT, and what others write gives the same function here."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import factors_of, ours, peer_of, theirs
from safetensors.torch import load_file, save_file

from mixtral.adapters import Factors
from mixtral.adapters import peft as files
from mixtral.adapters.factors import TARGETS, target_of
from mixtral.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from mixtral.config import MixtralConfig
from mixtral.errors import CheckpointError
from mixtral.model import Mixtral
from mixtral.weights import load_model, save_model
from mixtral.weights.names import pieces

# PEFT looks for what the patterns match among modules alone; parameters get their rank all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def same(found: Mapping[str, Factors], expected: Mapping[str, Factors]) -> None:
    """The same additions; files are float32."""
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert torch.equal(found[name].a, pair.a), name
        assert torch.equal(found[name].b, pair.b), name
        assert found[name].scale == pytest.approx(pair.scale, rel=1e-12)


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "alpha": 6, "expert_rank": 2, "targets": tuple(TARGETS)},
    "default targets": {"rank": 3, "alpha": 5.5},
    "attention": {"rank": 4, "targets": ("q", "v")},
    "gate_up": {"rank": 2, "targets": ("gate_up",)},
    "down": {"rank": 2, "targets": ("down",)},
    "stabilised": {"rank": 5, "expert_rank": 3, "alpha": 4, "rslora": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_gives_the_same_logits(name: str, tiny_model: Mixtral, tmp_path: Path) -> None:
    """And reading the folder back gives the same factors."""
    factors = factors_of(tiny_model.config, **OPTIONS[name])
    write_adapter(tmp_path / "adapter", tiny_model.config, factors, base="some/base")
    same(read_adapter(tmp_path / "adapter", tiny_model.config).factors, factors)
    peer = peer_of(tiny_model, tmp_path / "base")
    before = theirs(peer)
    adapted = theirs(peft.PeftModel.from_pretrained(peer, tmp_path / "adapter"))
    torch.testing.assert_close(adapted, ours(tiny_model, factors), atol=3e-5, rtol=1e-4)
    assert (adapted - before).abs().max() > 0.05


def test_only_some_layers(tiny_model: Mixtral, tmp_path: Path) -> None:
    """And ranks and scales that differ between layers."""
    factors = factors_of(tiny_model.config, rank=4, alpha=6)
    del factors["model.layers.0.self_attn.q_proj.weight"], factors["model.layers.1.mlp.experts.down_proj"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    factors[name] = Factors(factors[name].a[:, :2], factors[name].b[:, :, :2], 0.25)
    write_adapter(tmp_path / "adapter", tiny_model.config, factors)
    same(read_adapter(tmp_path / "adapter", tiny_model.config).factors, factors)
    peer = peer_of(tiny_model, tmp_path / "base")
    adapted = theirs(peft.PeftModel.from_pretrained(peer, tmp_path / "adapter"))
    torch.testing.assert_close(adapted, ours(tiny_model, factors), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["A", "B"])
def test_another_order_of_experts_and_ranks_is_another_function(part: str, tiny_model: Mixtral, tmp_path: Path) -> None:
    """The check above would see it: the same numbers with rank and expert exchanged do not give our logits."""
    factors = factors_of(tiny_model.config, rank=4, targets=("gate_up", "down"))
    write_adapter(tmp_path / "adapter", tiny_model.config, factors)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    for name, value in tensors.items():
        if f"lora_{part}" in name:
            turned = value if part == "A" else value.T  # [E * R, I], or [R * E, O]
            turned = turned.reshape(4, 4, -1).transpose(0, 1).reshape(turned.shape)
            tensors[name] = (turned if part == "A" else turned.T).contiguous()
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_NAME, {"format": "pt", "layout": files.LAYOUT})
    peer = peer_of(tiny_model, tmp_path / "base")
    adapted = theirs(peft.PeftModel.from_pretrained(peer, tmp_path / "adapter"))
    assert (adapted - ours(tiny_model, factors)).abs().max() > 0.05
    read = read_adapter(tmp_path / "adapter", tiny_model.config).factors
    torch.testing.assert_close(adapted, ours(tiny_model, read), atol=3e-5, rtol=1e-4)


def test_what_peft_saves_is_read(tiny_model: Mixtral, tmp_path: Path) -> None:
    """An adapter made by PEFT itself, with its names, defaults and patterns."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={".*\\.q_proj": 3},
        use_rslora=False,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(peer_of(tiny_model, tmp_path / "base"), config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", tiny_model.config)
    assert found.kind == "PEFT"
    assert {pair.rank for name, pair in found.factors.items() if "down_proj" in name} == {2}
    torch.testing.assert_close(theirs(adapted), ours(tiny_model, found.factors), atol=3e-5, rtol=1e-4)


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_targets_that_no_mixtral_has_are_told_and_the_rest_is_used(tiny_model: Mixtral, tmp_path: Path) -> None:
    """The usual list for Llama, of which PEFT adapts attention alone and saves all."""
    config = peft.LoraConfig(r=2, target_modules=LLAMA, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(peer_of(tiny_model, tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert sorted(json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())["target_modules"]) == sorted(LLAMA)
    with pytest.warns(UserWarning, match="targets .*_proj, .* matched nothing in a Mixtral; they were not") as told:
        found = read_adapter(tmp_path / "adapter", tiny_model.config)
    (message,) = [str(one.message) for one in told]
    assert [name for name in LLAMA if f"{name}," in message or f"{name} in" in message] == LLAMA[4:]
    assert {target_of(name) for name in found.factors} == {"q", "k", "v", "o"}
    torch.testing.assert_close(theirs(adapted), ours(tiny_model, found.factors), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["k_proj", "self_attn.v_proj"], {"q", "o"}),
        (r".*\.self_attn\.k_proj", {"q", "v", "o"}),
        (".*k_proj", {"q", "v", "o"}),
        (r"model\.layers\.[0-9]+\.self_attn\.(k_proj|v_proj)", {"q", "o"}),
    ],
)
def test_targets_that_were_excluded_are_no_damage(
    tiny_model: Mixtral, tmp_path: Path, excluded: list[str] | str, left: set[str]
) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=LLAMA[:4], exclude_modules=excluded, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(peer_of(tiny_model, tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_adapter(tmp_path / "adapter", tiny_model.config)
    assert {target_of(name) for name in found.factors} == left
    torch.testing.assert_close(theirs(adapted), ours(tiny_model, found.factors), atol=3e-5, rtol=1e-4)


def legacy(config: MixtralConfig, folder: Path, *, skip: tuple[str, ...] = ()) -> None:
    """A folder as PEFT wrote it when experts were modules: w1, w2 and w3 of each."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for piece in pieces(config, "per-expert"):
        module = piece.name.removesuffix(".weight")
        if any(word in module for word in ("experts", "q_proj")) and not any(word in module for word in skip):
            out, width = piece.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn((3, width), generator=generator) * 0.1
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn((out, 3), generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    values["target_modules"] += [name for name in ("w1", "w2", "w3") if name not in skip]
    (folder / CONFIG_NAME).write_text(json.dumps(values))


def test_experts_as_single_modules(tiny_model: Mixtral, tmp_path: Path) -> None:
    """PEFT turns such a folder into one for stacked experts too, and gets the same."""
    legacy(tiny_model.config, tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter", tiny_model.config).factors
    assert found["model.layers.0.mlp.experts.gate_up_proj"].rank == 6
    peer = peer_of(tiny_model, tmp_path / "base")
    adapted = theirs(peft.PeftModel.from_pretrained(peer, tmp_path / "adapter"))
    torch.testing.assert_close(adapted, ours(tiny_model, found), atol=3e-5, rtol=1e-4)
    write_adapter(tmp_path / "again", tiny_model.config, found)
    same(read_adapter(tmp_path / "again", tiny_model.config).factors, found)


def test_single_modules_of_some_experts(tiny_model: Mixtral, tmp_path: Path) -> None:
    """w3 alone, and not of expert 2: the sum of weight and product, matrix by matrix."""
    legacy(tiny_model.config, tmp_path / "adapter", skip=("w1", "w2", "experts.2.", "q_proj"))
    path = tmp_path / "adapter" / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["w3"]}))
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    found = read_adapter(tmp_path / "adapter", tiny_model.config).factors
    assert found.keys() == {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(2)}
    for layer, pair in enumerate(found.values()):
        for expert in range(4):
            added = pair.product(expert)
            assert not added[:96].any()
            if expert == 2:
                assert not added.any()
                continue
            stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w3"
            expected = 2 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(added[96:], expected)


@pytest.mark.parametrize("square", [False, True])
def test_stacks_of_older_versions(square: bool, tiny_config: MixtralConfig, tmp_path: Path) -> None:
    """Up to PEFT 0.18 lora_A has the widths of lora_B. Its sum over ranks, as that version's source has it:
    ``delta[e, h, w] = scale * sum_r B[w, r, e] A[e, r, h]`` for a parameter [E, h, w]."""
    config = tiny_config.replace(intermediate_size=32, hidden_size=64) if square else tiny_config
    experts, hidden, width = 4, config.intermediate_size, config.hidden_size
    generator = torch.Generator().manual_seed(2)
    a = torch.randn((experts * 3, 2 * hidden), generator=generator)
    b = torch.randn((width, 3 * experts), generator=generator)
    stem = "base_model.model.model.layers.{}.mlp.experts.lora_{}.weight"
    tensors = {stem.format(layer, part): value.clone() for layer in range(2) for part, value in (("A", a), ("B", b))}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    values = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 3,
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj"],
    }
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    expected = torch.einsum("wre,erh->ehw", b.reshape(width, 3, experts), a.reshape(experts, 3, 2 * hidden))
    if square:  # the widths do not tell
        with pytest.raises(CheckpointError, match="peft_version"):
            read_adapter(folder, config)
        (folder / CONFIG_NAME).write_text(json.dumps({**values, "peft_version": "0.18.1"}))
    pair = read_adapter(folder, config).factors["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(experts):
        torch.testing.assert_close(pair.product(expert), expected[expert], atol=1e-4, rtol=1e-4)
    if square:
        (folder / CONFIG_NAME).write_text(json.dumps({**values, "peft_version": "0.19.0"}))
        pair = read_adapter(folder, config).factors["model.layers.0.mlp.experts.gate_up_proj"]
        assert (pair.product(0) - expected[0]).abs().max() > 1


def test_the_file_of_mistral_finetune(tiny_model: Mixtral, tmp_path: Path) -> None:
    """Its names, and pairs of query and key rows in turns: adding its products to Mistral's own weights, which we load,
    is the oracle."""
    config = tiny_model.config
    save_model(tiny_model, tmp_path / "base", layout="consolidated")
    weights = load_file(tmp_path / "base" / "consolidated.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and name.startswith("layers.") and ".gate." not in name:
            stem = name.removesuffix(".weight")
            a = torch.randn((3, weight.shape[1]), generator=generator) * 0.1
            b = torch.randn((weight.shape[0], 3), generator=generator) * 0.1
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            weights[name] = weight + 2 * b @ a
    save_file(weights, tmp_path / "base" / "consolidated.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    with pytest.raises(CheckpointError, match="default is 2"):
        read_adapter(folder, config)
    (folder / "params.json").write_text(json.dumps({"dim": 64, "lora": {"enable": True, "rank": 3, "scaling": 2.0}}))
    found = read_adapter(folder, config)
    assert found.kind == "mistral-finetune"
    merged = load_model(tmp_path / "base", device="cpu")
    torch.testing.assert_close(ours(tiny_model, found.factors), ours(merged), atol=3e-5, rtol=1e-4)
    same(read_adapter(folder / "lora.safetensors", config, scaling=2.0).factors, found.factors)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"some_new_feature": {"x": 1}}, "not known here"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights '{start}', which may change the base")
            for start in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica", "a later one")
        ),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config {'loftq_bits': 4}"),
        ({"corda_config": {"corda_method": "ipm"}}, "corda_config"),
        ({"lora_ga_config": {"direction": "ArB2r"}}, "lora_ga_config"),
        ({"r": 5}, "has rank 4, but"),
        ({"r": True}, "r True"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"rank_pattern": {"(a*)*b": 3}}, "expected names"),
        ({"rank_pattern": {"q_proj": "x"}}, "expected numbers"),
        ({"target_modules": ["q_proj", "k_proj"]}, "promises 'k_proj'"),
        ({"target_modules": ["q_proj", "up_proj", "w2"]}, "promises 'w2'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "promises 'lm_head'"),
        ({"target_modules": ["q_proj", 3]}, "promises 3"),
        *(
            ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": excluded}, "promises 'k_proj'")
            for excluded in (["v_proj"], ["layers.0.self_attn.k_proj"], r".*layers\.0\..*k_proj", 3)
        ),
        *(
            ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": pattern}, "has the exclude_modules")
            for pattern in ("(.*a)*k_proj", "(k_proj", ".*.*.*k_proj", "k" * 201)
        ),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "promises 'mlp.experts.gate_up_proj'"),
    ],
)
def test_configs_that_are_refused(
    change: dict[str, Any], told: str, tiny_config: MixtralConfig, tmp_path: Path
) -> None:
    write_adapter(tmp_path, tiny_config, factors_of(tiny_config, rank=4, targets=("q",)))
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=told.replace("(", r"\(").replace("*", r"\*")):
        read_adapter(tmp_path, tiny_config)


@pytest.mark.parametrize(
    "change",
    [
        *({"init_lora_weights": start} for start in (True, False, None, "gaussian", "eva", "orthogonal")),
        {"loftq_config": {}, "corda_config": None, "lora_ga_config": None, "eva_config": {"rho": 2.0}},
    ],
)
def test_first_values_that_leave_the_base_as_it_is_are_taken(
    change: dict[str, Any], tiny_config: MixtralConfig, tmp_path: Path
) -> None:
    factors = factors_of(tiny_config, rank=4, targets=("q",))
    write_adapter(tmp_path, tiny_config, factors)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    same(read_adapter(tmp_path, tiny_config).factors, factors)


JUNK = [None, True, -1, float("nan"), "x" * 300, [[]], {"": 1}, {"x": {}}]


def test_junk_never_ends_in_another_error(tiny_config: MixtralConfig, tmp_path: Path) -> None:
    """Whatever a value of the config is, the adapter is read or refused in the same words as always."""
    write_adapter(tmp_path, tiny_config, factors_of(tiny_config, rank=4, targets=("q", "down")))
    path = tmp_path / CONFIG_NAME
    good = json.loads(path.read_text())
    read = 0
    for key in [*good, *files._OFF, *files._READ, "new"]:
        for value in JUNK:
            path.write_text(json.dumps({**good, key: value}))
            with contextlib.suppress(CheckpointError):
                read += len(read_adapter(tmp_path, tiny_config).factors) == 4
    assert read > 50


def test_weights_that_are_refused(tiny_config: MixtralConfig, tmp_path: Path) -> None:
    write_adapter(tmp_path, tiny_config, factors_of(tiny_config, rank=4, targets=("q", "down")))
    good = load_file(tmp_path / WEIGHTS_NAME)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    down = "base_model.model.model.layers.0.mlp.experts"
    cases = [
        ({f"{q}.lora_B.weight": None}, "but not the other"),
        ({f"{q}.lora_A.weight": good[f"{q}.lora_A.weight"][:, :-1]}, "another base"),
        ({f"{down}.lora_B.weight": good[f"{down}.lora_B.weight"][:-1]}, "another base"),
        ({f"{down}.lora_A.weight": good[f"{down}.lora_A.weight"][:-1]}, "another base"),
        ({f"{q}.lora_B.weight": good[f"{q}.lora_B.weight"] * torch.inf}, "not finite"),
        ({f"{q}.lora_magnitude_vector": torch.zeros(3)}, "no part of a LoRA adapter"),
        ({f"{q}.lora_A.weight": good[f"{q}.lora_A.weight"].to(torch.int8)}, "expected F32"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 4)}, "but not the other"),
        ({f"base_model.model.lm_head.lora_{p}.weight": torch.zeros(4, 4) for p in "AB"}, "adapts 'lm_head'"),
    ]
    for change, told in cases:
        changed = {name: value for name, value in {**good, **change}.items() if value is not None}
        save_file({name: value.contiguous() for name, value in changed.items()}, tmp_path / WEIGHTS_NAME)
        with pytest.raises(CheckpointError, match=told):
            read_adapter(tmp_path, tiny_config)
    save_file(good, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="another base"):
        read_adapter(tmp_path, tiny_config.replace(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="another base"):
        read_adapter(tmp_path, tiny_config.replace(hidden_size=32))
    data = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(tmp_path, tiny_config)


def test_pickles_are_never_opened(tiny_config: MixtralConfig, tmp_path: Path) -> None:
    write_adapter(tmp_path, tiny_config, factors_of(tiny_config, rank=2, targets=("q",)))
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="could carry code"):
        read_adapter(tmp_path, tiny_config)
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(CheckpointError, match="no adapter"):
        read_adapter(tmp_path, tiny_config)
    (tmp_path / "lora.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="not safetensors"):
        read_adapter(tmp_path / "lora.pt", tiny_config)


def test_writing_replaces_nothing_unasked(tiny_config: MixtralConfig, tmp_path: Path) -> None:
    factors = factors_of(tiny_config, rank=2, targets=("q",))
    write_adapter(tmp_path, tiny_config, factors)
    with pytest.raises(CheckpointError, match="holds an adapter"):
        write_adapter(tmp_path, tiny_config, factors)
    other = factors_of(tiny_config, seed=9, rank=3, targets=("v",))
    write_adapter(tmp_path, tiny_config, other, overwrite=True, dropout=0.1)
    found = read_adapter(tmp_path, tiny_config)
    same(found.factors, other)
    assert found.dropout == 0.1
