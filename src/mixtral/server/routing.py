"""Telemetry of the router: which experts each token used, as ``mixtral.routing`` asks for it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixtral.limits import PARTS
from mixtral.server.errors import ApiError
from mixtral.server.fields import members, part, wrong_type, wrong_value
from mixtral.wire import Routing

__all__ = ["Collected", "Telemetry", "read_telemetry"]

Mode = Literal["none", "counts", "experts", "weights"]
_PER_TOKEN = 2  # experts of a layer that a token uses
_TOKENS = int(PARTS["mixtral.routing (tokens of a request)"].high or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What to report: per token its ``experts``, with ``weights`` too, or ``counts`` per layer; of ``layers`` alone."""

    mode: Mode = "none"
    layers: tuple[int, ...] = ()
    prompt: bool = False

    def check(self, tokens: int) -> None:
        """Raises ApiError if so many tokens are too many to report one by one."""
        if self.mode in ("experts", "weights") and tokens > _TOKENS:
            message = f"mixtral.routing would report {tokens} tokens; the limit is {_TOKENS}. Lower max_tokens."
            raise ApiError(400, "invalid_value", message, param="mixtral.routing")


def read_telemetry(value: Any, layers: int) -> Telemetry:
    """The field ``mixtral`` of a request to a model with so many layers. Raises ApiError, which names the member."""
    given = members({} if value is None else value, "mixtral", {"routing", "layers", "prompt"})
    mode: Mode = part(given.get("routing", "none"), "mixtral.routing", "mixtral.routing")
    chosen = given.get("layers", list(range(layers)))
    if not isinstance(chosen, list):
        raise wrong_type("mixtral.layers", chosen, "a list of layer numbers")
    for place, layer in enumerate(chosen):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise wrong_type(f"mixtral.layers[{place}]", layer, "the number of a layer")
        if not 0 <= layer < layers or layer in chosen[:place]:
            raise wrong_value(f"mixtral.layers[{place}]", layer, f"0 to {layers - 1}, each layer once")
    if not isinstance(prompt := given.get("prompt", False), bool):
        raise wrong_type("mixtral.prompt", prompt, "true or false")
    return Telemetry(mode=mode, layers=tuple(chosen), prompt=prompt)


class Collected:
    """Routing of the answers of one request, on its way into events or the body."""

    def __init__(self, telemetry: Telemetry, *, layers: int, experts: int) -> None:
        self._telemetry = telemetry
        self._layers, self._experts = layers, experts
        self._parts: dict[int, list[Routing]] = {}

    def add(self, choice: int, routing: Routing) -> None:
        """Tokens of an answer."""
        if self._telemetry.mode != "none":
            self._parts.setdefault(choice, []).append(routing)

    def take(self, choices: Sequence[int], *, last: bool) -> dict[str, Any]:
        """``{"mixtral": {"routing": [...]}}`` with what came for these choices, or nothing.

        Counts come once, when ``last`` says that the answer is complete.
        """
        telemetry = self._telemetry
        if telemetry.mode == "none" or (telemetry.mode == "counts" and not last):
            return {}
        entries = []
        for choice in choices:
            parts = self._parts.pop(choice, [])
            if telemetry.mode == "counts":
                entries.append(self._counts(choice, b"".join(each.experts for each in parts)))
            else:
                entries += [self._listed(choice, run) for run in _runs(parts, self._layers * _PER_TOKEN)]
        return {"mixtral": {"routing": entries}} if entries else {}

    def _listed(self, choice: int, routing: Routing) -> dict[str, Any]:
        layers = self._telemetry.layers
        tokens = len(routing.experts) // (self._layers * _PER_TOKEN)
        entry = {
            "choice": choice,
            "first": routing.first,
            "shape": [tokens, len(layers), _PER_TOKEN],
            "layers": list(layers),
            "experts": _base64(_of_layers(routing.experts, self._layers, layers, _PER_TOKEN)),
        }
        if self._telemetry.mode == "weights":
            entry["weights"] = _base64(_of_layers(routing.weights, self._layers, layers, 2 * _PER_TOKEN))
        return entry

    def _counts(self, choice: int, used: bytes) -> dict[str, Any]:
        step = self._layers * _PER_TOKEN
        counts = []
        for layer in self._telemetry.layers:
            columns = [used[layer * _PER_TOKEN + place :: step] for place in range(_PER_TOKEN)]
            counts.append([sum(column.count(expert) for column in columns) for expert in range(self._experts)])
        return {"choice": choice, "layers": list(self._telemetry.layers), "counts": counts}


def _runs(parts: Sequence[Routing], bytes_per_token: int) -> list[Routing]:
    """Parts that follow each other as one."""
    runs: list[list[Routing]] = []
    end = -1
    for each in parts:
        if each.first != end:
            runs.append([])
        runs[-1].append(each)
        end = each.first + len(each.experts) // bytes_per_token
    return [
        Routing(
            first=run[0].first,
            experts=b"".join(each.experts for each in run),
            weights=b"".join(each.weights for each in run),
        )
        for run in runs
    ]


def _of_layers(data: bytes, layers: int, chosen: Sequence[int], width: int) -> bytes:
    """The bytes [tokens, layers, width] of the chosen layers, copied column by column."""
    if tuple(chosen) == tuple(range(layers)):
        return data
    tokens = len(data) // (layers * width)
    out = bytearray(tokens * len(chosen) * width)
    for place, layer in enumerate(chosen):
        for column in range(width):
            out[place * width + column :: len(chosen) * width] = data[layer * width + column :: layers * width]
    return bytes(out)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
