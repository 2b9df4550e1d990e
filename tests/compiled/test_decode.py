"""Integers in groups to numbers: every instruction set gives the bits of float32 arithmetic, rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtral.ops.native import kernel_levels, module
from mixtral.quant.bits import pack_bits

ROWS, COLUMNS = 5, 384


def drawn(bits: int, group: int, *, zeros: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of a byte each, and scales of every size and either sign."""
    rng = np.random.default_rng(bits * 1000 + group)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (ROWS, COLUMNS), dtype=np.uint8))
    scales = rng.choice([-1, 1], (ROWS, COLUMNS // group)) * 10.0 ** rng.uniform(-30, 38, (ROWS, COLUMNS // group))
    scales[0, 0] = 0.0
    some = torch.from_numpy(rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8)) if zeros else None
    return codes, torch.from_numpy(scales.astype(np.float32)), some


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [8, 32, 48, 96, 128])
def test_numbers_are_those_of_float32_arithmetic(level: str, bits: int, group: int) -> None:
    for zeros in (False, True):
        codes, scales, some = drawn(bits, group, zeros=zeros)
        middle = torch.full_like(scales, 1 << bits - 1) if some is None else some.float()
        grouped = codes.float().view(ROWS, -1, group) - middle[..., None]
        expected = (grouped * scales[..., None]).view(ROWS, COLUMNS)
        given = None if some is None else some.numpy()
        for dtype, raw in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
            out = torch.empty((ROWS, COLUMNS), dtype=dtype)
            view = out.numpy() if dtype == torch.float32 else out.view(torch.uint16).numpy()
            module().decode_groups(pack_bits(codes, bits).numpy(), bits, scales.numpy(), given, view, 2, level)
            assert torch.equal(out.view(raw), expected.to(dtype).view(raw))


def test_bad_arrays_are_refused() -> None:
    codes, scales, _ = drawn(4, 32, zeros=False)
    packed, numbers = pack_bits(codes, 4).numpy(), scales.numpy()
    out = np.empty((ROWS, COLUMNS), dtype=np.float32)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        module().decode_groups(packed, 9, numbers, None, out, 1)
    with pytest.raises(ValueError, match="codes must be"):
        module().decode_groups(packed, 8, numbers, None, out, 1)
    with pytest.raises(ValueError, match="scales must be"):
        module().decode_groups(packed, 4, numbers[1:], None, out, 1)
    with pytest.raises(ValueError, match="float32 or the bits of bfloat16"):
        module().decode_groups(packed, 4, numbers, None, out.astype(np.float64), 1)
    with pytest.raises(ValueError, match="does not run the kernels"):
        module().decode_groups(packed, 4, numbers, None, out, 1, "mmx")
