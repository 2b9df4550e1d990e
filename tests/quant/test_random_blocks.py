"""Random blocks: valid in every format, with the same spread, and the same bytes for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from mixtral.errors import ConfigError
from mixtral.quant.decode import decode_into
from mixtral.quant.formats import FORMATS
from mixtral.quant.mixes import MIXES
from mixtral.quant.random_blocks import RANDOM_FORMATS, STD, random_blocks, random_bytes, random_scales


@pytest.mark.parametrize("name", RANDOM_FORMATS)
def test_values_are_finite_centred_and_spread_alike(name: str) -> None:
    kind = FORMATS[name]
    count = 1 << 19
    blocks = random_blocks(name, count // kind.values, np.random.SFC64(1))
    assert blocks.dtype == np.uint8
    assert blocks.shape == (count // kind.values, kind.bytes)
    values = torch.empty(len(blocks), kind.values)
    decode_into(torch.from_numpy(blocks), name, values)
    assert bool(values.isfinite().all())
    assert float(values.std()) == pytest.approx(STD, rel=0.02)
    assert abs(float(values.mean())) < 0.01 * STD
    assert float(values.abs().max()) < 4 * STD
    more = random_blocks(name, len(blocks), np.random.SFC64(1), std=1.0)
    decode_into(torch.from_numpy(more), name, values)
    assert float(values.std()) == pytest.approx(1, rel=0.02)
    values *= STD
    # No place of a block is special: a field in the wrong byte would show.
    assert float(values.std(0).min()) > 0.7 * STD
    assert float(values.std(0).max()) < 1.3 * STD


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_no_part_of_a_block_has_a_scale_near_zero(name: str) -> None:
    blocks = random_blocks(name, 500, np.random.SFC64(2))
    values = torch.empty(500, 256)
    decode_into(torch.from_numpy(blocks), name, values)
    assert float(values.view(-1, 16).std(1).min()) > 0.2 * STD


def test_every_format_of_every_mix_can_be_made() -> None:
    roles = ("q_proj", "k_proj", "o_proj", "down_proj", "gate_up_proj")
    formats = {
        mix.of(f"model.layers.{layer}.{role}.weight", layer, 32)
        for mix in MIXES.values()
        for layer in range(32)
        for role in roles
    } | {mix.of("lm_head.weight", 0, 32) for mix in MIXES.values()}
    assert formats <= set(RANDOM_FORMATS)


def test_the_bytes_are_pinned() -> None:
    """Whoever made a model with a seed gets it again with a later version."""
    made = b"".join(random_blocks(name, 64, np.random.SFC64([7, 9])).tobytes() for name in RANDOM_FORMATS)
    made += random_scales(4, 33, np.random.SFC64(3)).tobytes() + random_bytes(13, np.random.SFC64(3)).tobytes()
    assert hashlib.sha256(made).hexdigest() == "98f94c4c9994ce1ce1025d39b9de81fdf641eb5a4917f99020911573ecdd0ea2"


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_scales_of_integers_fit_their_range(bits: int) -> None:
    scales = random_scales(bits, 1 << 15, np.random.SFC64(1)).astype(np.float32)
    codes = np.random.default_rng(1).integers(0, 1 << bits, scales.size) - (1 << (bits - 1))
    assert np.std(codes * scales) == pytest.approx(STD, rel=0.02)
    assert abs(np.mean(codes * scales)) < 0.03 * STD
    assert 0.4 < np.mean(scales < 0) < 0.6


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="no random weights of format 'IQ4_NL'; expected one of F32, F16"):
        random_blocks("IQ4_NL", 1, np.random.SFC64(1))
