"""Drafts of what comes next, from what followed the same tokens before: tokens that a step checks beside the real one.

A draft never changes the text: the token at each place is chosen as without drafts, and the first one that differs ends
what is kept. It only pays when enough of it is kept, because more rows of a step read more experts. So the seconds of
steps of each size are measured, and a sequence drafts as much as its own record says will pay, or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Costs", "Drafter"]

_KEY = 3  # tokens that must be equal for a match
_LONGEST = 16  # matches are not followed further back
_LENGTHS = (4, 8, 16)
_MARGIN = 1.1  # a draft must promise this much more than it costs
# The record that a sequence begins with, by length of the match: so many tokens kept, so many not.
_BEGIN = ((1.0, 1.0), (3.0, 1.0), (8.0, 1.0))
_KEEP, _FORGET = 0.9, 0.997


class Costs:
    """Seconds of a step, by how many tokens it computes; of sizes that were not seen yet, estimated.

    The estimate is what a step reads of the experts: n tokens choose ``E (1 - (1 - A/E)^n)`` of E.
    """

    def __init__(self, experts: int, per_token: int) -> None:
        self._experts, self._missed = experts, 1.0 - per_token / experts
        self._per_token = per_token
        self._seconds: dict[int, float] = {}

    def observe(self, tokens: int, seconds: float) -> None:
        """Note that a step that computed so many tokens, none of a long prompt, took so long."""
        size = tokens.bit_length()
        known = self._seconds.get(size)
        # Something else may have stopped the process: one step says little.
        self._seconds[size] = seconds if known is None else known + 0.1 * (min(seconds, 2 * known) - known)

    def of(self, tokens: int) -> float:
        """Seconds of a step, or what stands for them as long as none was seen."""
        if not self._seconds:
            return self._estimate(tokens)
        size = tokens.bit_length()
        nearest = min(self._seconds, key=lambda seen: abs(seen - size))
        return self._seconds[nearest] * self._estimate(tokens) / self._estimate(3 << nearest >> 2)

    def _estimate(self, tokens: int) -> float:
        read = self._experts * (1.0 - self._missed**tokens) / self._per_token
        return 0.12 + 0.88 * read + 0.01 * tokens


class Drafter:
    """The text of one sequence by its last tokens, and how many of its drafts were kept."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # where the tokens that follow such ones begin
        self._indexed = _KEY
        self._record = [list(one) for one in _BEGIN]
        self._used = 0  # which record the last draft belongs to

    def propose(self, tokens: Sequence[int], most: int, rows: int, others: int, costs: Costs) -> list[int]:
        """What may follow ``tokens``, at most ``most``; empty if it would not pay.

        ``rows`` tokens are in the step already, for ``others`` sequences and this one.
        """
        for at in range(self._indexed, len(tokens)):
            self._last[tuple(tokens[at - _KEY : at])] = at
        self._indexed = max(self._indexed, len(tokens))
        start = self._last.get(tuple(tokens[-_KEY:])) if len(tokens) > _KEY else None
        if start is None or most < 1:
            return []
        self._used = _bucket(tokens, start)
        length = self._length(rows, others, costs)
        if not length:
            kept, lost = self._record[self._used]
            begin = _BEGIN[self._used]
            self._record[self._used] = [
                begin[0] + _FORGET * (kept - begin[0]),
                begin[1] + _FORGET * (lost - begin[1]),
            ]
            return []
        period = len(tokens) - start
        return [tokens[start + place % period] for place in range(min(length, most))]

    def observe(self, drafted: int, kept: int) -> None:
        """Note how many tokens of the last draft were kept."""
        record = self._record[self._used]
        record[0] = _KEEP * record[0] + kept
        record[1] = _KEEP * record[1] + (kept < drafted)

    def _length(self, rows: int, others: int, costs: Costs) -> int:
        kept, lost = self._record[self._used]
        rate = kept / (kept + lost)
        now = costs.of(rows)
        token = now / (others + 1)
        best, found = 0.0, 0
        for length in _LENGTHS:
            extra = costs.of(rows + length) - now
            expected = rate * (1.0 - rate**length) / (1.0 - rate) if rate < 1.0 else float(length)
            gain = expected * token - _MARGIN * extra
            if gain > best:
                best, found = gain, length
        return found


def _bucket(tokens: Sequence[int], start: int) -> int:
    """0, 1 or 2: how far back the match goes."""
    length, end = _KEY, len(tokens)
    while length < _LONGEST and start > length and tokens[start - 1 - length] == tokens[end - 1 - length]:
        length += 1
    return 0 if length < 6 else 1 if length < 12 else 2
