"""What the text side asks of an engine and what it gets back: sampling parameters in, one event per token out."""

from __future__ import annotations

from typing import Literal

import msgspec

from mixtral.errors import RequestError

__all__ = ["Candidate", "FinishReason", "SamplingParams", "TokenEvent"]

FinishReason = Literal["stop", "length"]

# field -> (lowest, highest) value that a request may give
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.5, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, 2**31 - 1),
    "logprobs": (0, 20),
}
_WHOLE = frozenset({"top_k", "seed", "max_tokens", "logprobs"})


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens. Steps apply in this order: penalties, temperature, top_k, top_p, min_p, draw.

    ``temperature`` below 1e-3 is greedy (ties: lowest id). ``top_k`` 0 is off. ``logprobs`` None is off, otherwise the
    number of alternatives listed per token. ``seed`` None draws one. ``stop_ids`` end the text and are part of the
    output; None is the ``eos_token_id`` of the model's config.

    Raises:
        RequestError: a value is out of range, NaN, or of the wrong type; ``param`` names it.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in {"seed", "logprobs"}:
                continue
            kind = "an integer" if name in _WHOLE else "a number"
            if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else (int, float)):
                raise RequestError(f"{name} is {value!r}; expected {kind} from {low:g} to {high:g}", param=name)
            if not low <= value <= high:  # NaN is not, either
                raise RequestError(f"{name} is {value!r}; expected {kind} from {low:g} to {high:g}", param=name)
        if self.stop_ids is not None and not _are_ids(self.stop_ids):
            raise RequestError(f"stop_ids is {self.stop_ids!r}; expected token ids", param="stop_ids")


def _are_ids(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(id, int) and not isinstance(id, bool) for id in value)


class Candidate(msgspec.Struct, frozen=True):
    """One token id with its log-probability under the raw logits (before penalties and temperature)."""

    id: int
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled token of one sequence. ``finish_reason`` is set on the last event of the sequence."""

    sequence: int
    id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()
    finish_reason: FinishReason | None = None
