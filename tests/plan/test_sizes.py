"""Frozen constants of both published sizes, and the formulas against the real parameter tree."""

from __future__ import annotations

import pytest

from mixtral.config import MixtralConfig, preset
from mixtral.errors import ConfigError
from mixtral.plan import sizes

SMALL, LARGE = preset("8x7b"), preset("8x22b")
V32000, V32768 = {"vocab_size": 32000}, {"vocab_size": 32768}


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (SMALL.replace(**V32000), 46_702_792_704, 12_879_925_248),
        (SMALL.replace(**V32768), 46_709_084_160, 12_886_216_704),
        (LARGE.replace(**V32000), 140_620_634_112, 39_152_031_744),
        (LARGE.replace(**V32768), 140_630_071_296, 39_161_468_928),
    ],
)
def test_total_and_active_parameters(config: MixtralConfig, total: int, active: int) -> None:
    counts = sizes.count_parameters(config)
    assert counts.total == total
    assert counts.active == active


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            SMALL.replace(**V32000),
            {
                "read_per_token": 12_748_853_248,
                "experts": 45_097_156_608,
                "expert_in_one_layer": 176_160_768,
                "expert_in_all_layers": 5_637_144_576,
                "shared": 1_605_636_096,
                "attention": 1_342_177_280,
                "routers": 1_048_576,
                "norms": 266_240,
                "embedding": 131_072_000,
                "head": 131_072_000,
                "one_expert_model": 7_242_780_672,
            },
        ),
        (
            LARGE.replace(**V32000),
            {
                "read_per_token": 38_955_423_744,
                "experts": 135_291_469_824,
                "expert_in_one_layer": 301_989_888,
                "expert_in_all_layers": 16_911_433_728,
                "shared": 5_329_164_288,
                "attention": 4_932_501_504,
                "routers": 2_752_512,
                "norms": 694_272,
                "embedding": 196_608_000,
                "head": 196_608_000,
            },
        ),
    ],
)
def test_parts(config: MixtralConfig, expected: dict[str, int]) -> None:
    counts = sizes.count_parameters(config)
    assert {name: getattr(counts, name) for name in expected} == expected


def test_shares_and_names() -> None:
    small, large = (sizes.count_parameters(config.replace(**V32000)) for config in (SMALL, LARGE))
    assert round(100 * small.experts / small.total, 2) == 96.56
    assert round(100 * large.experts / large.total, 2) == 96.21
    assert small.one_expert_model - small.routers == 7_241_732_096  # Mistral 7B
    assert round(large.one_expert_model / 1e9, 2) == 22.24


@pytest.mark.parametrize(
    ("config", "gigabytes", "gibibytes"), [(SMALL, 93.41, 86.99), (LARGE.replace(**V32000), 281.24, 261.93)]
)
def test_bf16_weights(config: MixtralConfig, gigabytes: float, gibibytes: float) -> None:
    assert round(sizes.weight_bytes(config, "bf16") / 1e9, 2) == gigabytes
    assert round(sizes.weight_bytes(config, "bf16") / 2**30, 2) == gibibytes


def test_memory_counts_routers_in_fp32() -> None:
    routers = sizes.count_parameters(SMALL).routers
    assert sizes.memory_bytes(SMALL, "bf16") - sizes.weight_bytes(SMALL, "bf16") == 2 * routers
    assert sizes.memory_bytes(SMALL, "fp32") == sizes.weight_bytes(SMALL, "fp32") == 4 * 46_702_792_704
    assert sizes.memory_bytes(SMALL, "int8-g32") == sizes.weight_bytes(SMALL, "int8-g32")


def test_integer_precisions_by_hand() -> None:
    # 1,342,177,280 + 45,097,156,608 matrix values; 262,144,000 table and 266,240 norm values in bf16; routers fp32
    matrices, rest, routers = 46_439_333_888, 262_410_240, 1_048_576
    assert sizes.weight_bytes(SMALL, "int8-g32") == matrices * 34 // 32 + rest * 2 + routers * 4
    assert sizes.weight_bytes(SMALL, "int4-g32") == matrices * 18 // 32 + rest * 2 + routers * 4
    assert sizes.weight_bytes(SMALL, "int4-g128") == matrices * 66 // 128 + rest * 2 + routers * 4


def test_unknown_precision_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'int3'; known: fp32, bf16"):
        sizes.weight_bytes(SMALL, "int3")


def test_kv_cache() -> None:
    assert sizes.kv_bytes_per_token(SMALL) == 131_072
    assert sizes.kv_bytes_per_token(LARGE) == 229_376
    assert sizes.kv_bytes_per_token(SMALL, bytes_per_value=4) == 262_144
    assert [sizes.kv_bytes(SMALL, n * 1024) / 2**30 for n in (4, 16, 32)] == [0.5, 2, 4]
    assert [sizes.kv_bytes(LARGE, n * 1024) / 2**30 for n in (4, 16, 32, 64)] == [0.875, 3.5, 7, 14]


@pytest.mark.parametrize(("config", "expected"), [(SMALL, (995, 291, 323)), (LARGE, (1739, 507, 563))])
def test_tensor_counts(config: MixtralConfig, expected: tuple[int, int, int]) -> None:
    counts = sizes.count_tensors(config)
    assert (counts.per_expert, counts.fused, counts.gguf) == expected


def test_expected_experts_and_step_cost() -> None:
    batches = (1, 2, 4, 8, 16, 32)
    assert [round(sizes.expected_experts(SMALL, n), 2) for n in batches] == [2, 3.5, 5.47, 7.2, 7.92, 8.0]
    assert [round(sizes.step_cost(SMALL, n), 2) for n in batches] == [1, 1.66, 2.53, 3.3, 3.62, 3.65]
    large = LARGE.replace(**V32000)
    assert [round(sizes.step_cost(large, n), 2) for n in batches] == [1, 1.65, 2.51, 3.26, 3.57, 3.6]


def test_overlap_chance() -> None:
    assert round(100 * sizes.overlap_chance(SMALL), 2) == 46.43
    assert sizes.overlap_chance(SMALL.replace(num_experts_per_tok=1)) == 0.125


@pytest.mark.parametrize("name", ["8x7b", "8x22b", "tiny"])
def test_model_on_meta_device_has_these_counts(name: str) -> None:
    from mixtral.model.mixtral import Mixtral

    config = preset(name)
    shapes = {n: p.shape.numel() for n, p in Mixtral(config, device="meta").named_parameters()}
    counts = sizes.count_parameters(config)
    experts = sum(size for n, size in shapes.items() if ".mlp.experts." in n)
    active = sum(shapes.values()) - experts + experts * config.num_experts_per_tok // config.num_local_experts
    assert (sum(shapes.values()), active, experts) == (counts.total, counts.active, counts.experts)
    assert len(shapes) == sizes.count_tensors(config).fused
