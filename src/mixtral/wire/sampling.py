"""How tokens are chosen: the parameters of a request, checked."""

from __future__ import annotations

import math

import msgspec

from mixtral.errors import RequestError

__all__ = ["SamplingParams"]

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
    "max_tokens": (0, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
_WHOLE = frozenset({"top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"})
_OPTIONAL = frozenset({"seed", "logprobs", "prompt_logprobs"})
_BIAS = 100.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens. Steps apply in this order: penalties, bias, mask, temperature, top_k, top_p, min_p, draw.

    ``temperature`` below 1e-3 is greedy (ties: lowest id). ``top_k`` 0 is off. ``logprobs`` None is off, otherwise the
    number of alternatives listed per token. ``seed`` None draws one. ``stop_ids`` end the text and are part of the
    output; None is the ``eos_token_id`` of the model's config. Before ``min_tokens`` tokens, and with ``ignore_eos``,
    none of them is chosen. ``logit_bias`` is added to the logits of its ids. ``prompt_logprobs`` also scores the tokens
    of the prompt; ``max_tokens`` may be 0 then.

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
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            kind = "an integer" if name in _WHOLE else "a number"
            if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else (int, float)):
                raise RequestError(f"{name} is {value!r}; expected {kind} from {low:g} to {high:g}", param=name)
            if not low <= value <= high:  # NaN is not, either
                raise RequestError(f"{name} is {value!r}; expected {kind} from {low:g} to {high:g}", param=name)
        if self.stop_ids is not None and not _are_ids(self.stop_ids):
            raise RequestError(f"stop_ids is {self.stop_ids!r}; expected token ids", param="stop_ids")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError("max_tokens is 0; expected at least 1 (0 only scores a prompt)", param="max_tokens")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; expected at most max_tokens, {self.max_tokens}", param="min_tokens"
            )
        for id, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and -_BIAS <= bias <= _BIAS):
                raise RequestError(
                    f"logit_bias[{id}] is {bias!r}; expected a number from -100 to 100", param="logit_bias"
                )


def _are_ids(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(id, int) and not isinstance(id, bool) for id in value)
