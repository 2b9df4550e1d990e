"""What is measured: a prompt read, or tokens decoded after one, by one sequence or several."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mixtral.errors import ConfigError

__all__ = ["KINDS", "Kind", "Work", "works"]

Kind = Literal["decode", "prefill", "batch", "context"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHORT = 8  # tokens of the prompts that decode and batch begin with
_FIRST_ID = 300  # after the control ids and the bytes of every vocabulary


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of work. ``prompt`` tokens of each of ``sequences`` sequences are read; then ``steps`` tokens of each
    are decoded, 0 in a prefill. What is timed is the prefill, or else the steps alone. ``context`` reads its prompt
    once and goes on from there in every turn; all others begin each turn with new prompts."""

    kind: Kind
    prompt: int
    sequences: int
    steps: int

    @property
    def name(self) -> str:
        """As in "prefill 512", "decode 1", "batch 8", "context 8192"."""
        return f"{self.kind} {self.prompt if self.kind in ('prefill', 'context') else self.sequences}"

    @property
    def tokens(self) -> int:
        """Tokens that one turn times: those of the prompt, or those decoded."""
        return self.sequences * (self.steps or self.prompt)

    def cells(self, turns: int) -> int:
        """Tokens that a sequence holds in the end, after a warm-up and that many turns."""
        return self.prompt + self.steps * (turns + 1 if self.kind == "context" else 1) + 1

    def prompts(self, turn: int, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same on every side: one list for each sequence."""
        ids = random.Random(f"{self.name}, turn {turn}")
        first = min(_FIRST_ID, vocab_size // 2)
        return [[ids.randrange(first, vocab_size) for _ in range(self.prompt)] for _ in range(self.sequences)]

    def to_json(self) -> dict[str, Any]:
        """The numbers, for a side and for the report."""
        return asdict(self)


def works(
    kinds: Sequence[str],
    *,
    tokens: Sequence[int] = (512, 2048),
    sequences: Sequence[int] = (8, 32),
    depth: int = 8192,
    steps: int = 32,
) -> list[Work]:
    """The work of each kind, without repetitions: prefills of ``tokens``, batches of ``sequences``.

    Raises:
        ConfigError: an unknown kind, or none.
    """
    found: dict[Work, None] = {}
    for kind in kinds:
        if kind == "prefill":
            found |= {Work("prefill", count, 1, 0): None for count in tokens}
        elif kind == "decode":
            found[Work("decode", SHORT, 1, steps)] = None
        elif kind == "batch":
            found |= {Work("batch", SHORT, count, steps): None for count in sequences}
        elif kind == "context":
            found[Work("context", depth, 1, steps)] = None
        else:
            raise ConfigError(f"work is {kind!r}; expected one or more of {', '.join(KINDS)}", param="work")
    if not found:
        raise ConfigError(f"no work is given; expected one or more of {', '.join(KINDS)}", param="work")
    return list(found)
