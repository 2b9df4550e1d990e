"""The table of formats equals that of the `gguf` package."""

from __future__ import annotations

import gguf
import pytest

from mixtral.errors import CheckpointError
from mixtral.quant.formats import BY_ID, FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_and_sizes(name: str) -> None:
    found = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert found.id == kind.value
    assert (found.values, found.bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert BY_ID[kind.value] is found


def test_size_of_a_tensor() -> None:
    assert FORMATS["Q4_K"].size_bytes((8, 14336, 4096)) == 8 * 14336 * 16 * 144
    assert FORMATS["F32"].size_bytes((3,)) == 12
    assert FORMATS["Q4_K"].bits == 4.5
    with pytest.raises(CheckpointError, match=r"Q4_K packs 256 values .* \[4, 320\] has 320"):
        FORMATS["Q4_K"].size_bytes((4, 320))
