"""File sizes that follow from the mixes are those of the published files (T2, section G of the sizes)."""

from __future__ import annotations

import pytest

from mixtral.config import PRESETS
from mixtral.errors import ConfigError
from mixtral.quant.formats import FORMATS
from mixtral.quant.mixes import MIXES, mix_of
from mixtral.weights.names import tensors

# Gigabytes of 8x7B and 8x22B, as llama.cpp's quantiser makes them.
SIZES = {
    "q8_0": (49.63, 149.42),
    "q6_k": (38.38, 115.53),
    "q5_k_m": (33.23, 99.97),
    "q4_k_m": (28.45, 85.59),
    "q4_k_s": (26.74, 80.48),
    "q4_0": (26.44, 79.51),
    "q3_k_m": (22.55, 67.79),
    "q3_k_s": (20.43, 61.50),
    "q2_k": (17.31, 52.11),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("preset", ["8x7b", "8x22b"])
def test_file_sizes(name: str, preset: str) -> None:
    config, mix = PRESETS[preset].replace(vocab_size=32000), mix_of(name)
    total = 0
    for pieces in tensors(config, "gguf"):
        words = pieces[0].parameter.split(".")
        layer = int(words[2]) if words[1] == "layers" else 0
        form = mix.of(pieces[0].parameter, layer, config.num_hidden_layers)
        total += FORMATS[form].size_bytes(pieces[0].tensor_shape)
    assert total / 1e9 == pytest.approx(SIZES[name][preset == "8x22b"], rel=1e-3)


def test_norms_and_routers_are_never_packed() -> None:
    """A3."""
    for mix in MIXES.values():
        for name in ("model.norm.weight", "model.layers.3.input_layernorm.weight", "model.layers.3.mlp.gate.weight"):
            assert mix.of(name, 3, 32) == "F32"
        assert mix.of("model.layers.3.mlp.experts.gate_up_proj", 3, 32) == mix.base


def test_an_unknown_mix() -> None:
    with pytest.raises(ConfigError, match="format is 'q9'; expected one of f32, f16"):
        mix_of("q9")
