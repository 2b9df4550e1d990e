"""Which format each matrix of a file gets: the mixes of llama.cpp for models with eight experts, by their usual names.

Measured in its quantiser: key and value projections are small and shared by all experts, so they are always Q8_0; the
head is Q6_K; of the down projections those in "more" layers, where errors cost most, get a finer format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mixtral.errors import ConfigError

__all__ = ["MIXES", "Mix", "mix_of"]

Down = Callable[[int, int], str]
"""Layer, number of layers -> format of the down projections."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Formats by role, and llama.cpp's number for files of this kind (``llama_ftype``)."""

    file_type: int
    base: str
    keys: str
    out: str
    head: str
    down: Down

    def of(self, parameter: str, layer: int, layers: int) -> str:
        """The format of one of our parameters; norms and routers are F32 in every mix."""
        part = parameter.removesuffix(".weight").rpartition(".")[2]
        if part.endswith("norm") or parameter.endswith("mlp.gate.weight"):
            return "F32"
        roles = {"k_proj": self.keys, "v_proj": self.keys, "o_proj": self.out, "lm_head": self.head}
        return self.down(layer, layers) if part == "down_proj" else roles.get(part, self.base)


def _more(layer: int, layers: int) -> bool:
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _plain(form: str) -> Down:
    return lambda layer, layers: form


def _more_q6(base: str) -> Down:
    return lambda layer, layers: "Q6_K" if _more(layer, layers) else base


def _mix(file_type: int, base: str, *, out: str | None = None, head: str = "Q6_K", down: Down | None = None) -> Mix:
    return Mix(file_type, base, "Q8_0", out or base, head, down or _plain(base))


def _one(file_type: int, base: str) -> Mix:
    return Mix(file_type, base, base, base, base, _plain(base))


MIXES: Mapping[str, Mix] = {
    "f32": _one(0, "F32"),
    "f16": _one(1, "F16"),
    "bf16": _one(32, "BF16"),
    "q8_0": _one(7, "Q8_0"),
    "q4_0": _mix(2, "Q4_0"),
    "q4_1": _mix(3, "Q4_1"),
    "q5_0": _mix(8, "Q5_0"),
    "q5_1": _mix(9, "Q5_1"),
    "q2_k": _mix(10, "Q2_K", out="Q5_K", down=_plain("Q3_K")),
    "q3_k_s": _mix(11, "Q3_K", out="Q5_K"),
    "q3_k_m": _mix(12, "Q3_K", out="Q5_K", down=lambda i, layers: "Q5_K" if i < layers // 16 else "Q4_K"),
    "q4_k_s": _mix(14, "Q4_K", out="Q5_K", down=lambda i, layers: "Q5_K" if i < layers // 8 else "Q4_K"),
    "q4_k_m": _mix(15, "Q4_K", out="Q5_K", down=_more_q6("Q4_K")),
    "q5_k_s": _mix(16, "Q5_K"),
    "q5_k_m": _mix(17, "Q5_K", down=_more_q6("Q5_K")),
    "q6_k": _mix(18, "Q6_K"),
}


def mix_of(name: str) -> Mix:
    """The mix of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MIXES:
        raise ConfigError(f"format is {name!r}; expected one of {', '.join(MIXES)}", param="format")
    return MIXES[name]
