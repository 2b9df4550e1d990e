from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtral.errors import CheckpointError
from mixtral.quant.int8 import GROUP, decode, encode


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    plain = torch.randn(40, 256, generator=generator)
    return [
        plain,
        plain * torch.logspace(-30, 5, 40).unsqueeze(1),
        plain.to(torch.bfloat16),
        plain.view(5, 8, 256),
        torch.zeros(2, 32),
        torch.arange(-64, 64).view(2, 64) / 2.0,
        torch.full((1, 32), 1e-45),
    ]


@pytest.mark.parametrize("number", range(7))
def test_codes_are_those_of_the_scalar_definition(number: int) -> None:
    """Q8_0: d = absmax / 127 in fp32, code = round half away from zero of x times 1/d, scale = fp16 of d."""
    values = samples()[number]
    codes, scales = encode(values)
    groups = values.float().numpy().reshape(-1, GROUP)
    for group, code, scale in zip(groups, codes.numpy().reshape(-1, GROUP), scales.numpy().reshape(-1), strict=True):
        d = np.float32(np.abs(group).max()) / np.float32(127)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / d
            assert scale == np.float16(d)
        if not np.isfinite(inverse):
            assert not code.any()
            continue
        exact = (group * inverse).astype(np.float64)
        assert code.tolist() == (np.sign(exact) * np.floor(np.abs(exact) + 0.5)).astype(int).tolist()


@pytest.mark.parametrize("number", [0, 2, 3, 5])
def test_error_is_half_a_step(number: int) -> None:
    """Against float64: half a step, plus what rounding the scale to fp16 moves a code of 127."""
    values = samples()[number]
    exact = values.double().numpy().reshape(-1, GROUP)
    found = decode(*encode(values)).double().numpy().reshape(-1, GROUP)
    step = np.abs(exact).max(1, keepdims=True) / 127
    assert (np.abs(found - exact) <= step * (0.5 + 127 * 2.0**-11 + 1e-6)).all()


def test_shapes_types_and_exact_products() -> None:
    codes, scales = encode(samples()[3])
    assert (codes.dtype, codes.shape) == (torch.int8, (5, 8, 256))
    assert (scales.dtype, scales.shape) == (torch.float16, (5, 8, 8))
    expected = codes.double().unflatten(-1, (8, 32)) * scales.double().unsqueeze(-1)
    assert torch.equal(decode(codes, scales).double(), expected.flatten(-2))
    assert decode(codes, scales, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_halves_are_rounded_away_from_zero() -> None:
    row = torch.zeros(32)
    row[:6] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 0.49999997])
    codes, _ = encode(row)
    assert codes[:6].tolist() == [127, 1, 2, -1, -3, 0]


def test_encoding_what_was_decoded_changes_nothing_for_an_exact_scale() -> None:
    codes, scales = encode(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    again, scales_again = encode(decode(codes, scales))
    assert torch.equal(codes, again)
    assert torch.equal(scales, scales_again)


@pytest.mark.parametrize("bad", [torch.zeros(3, 33), torch.tensor(1.0), torch.full((32,), float("nan"))])
def test_refused(bad: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="int8 groups"):
        encode(bad)


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        encode(torch.full((32,), 1e7))
    with pytest.raises(CheckpointError, match="do not fit"):
        decode(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.float16))
