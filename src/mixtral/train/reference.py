"""DPO's reference without a second model: the base under a switched-off adapter, or what it said, kept in a file.

N answers with A tokens each, L layers, K choices per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixtral.errors import TrainingError

__all__ = ["Cache", "Said"]

_LOGPROBS, _PICKS, _KEY = "logprobs.f32", "picks.i16", "reference.json"


class Said(NamedTuple):
    """Of the answer tokens of some documents: log-probabilities, float32 [A], and experts, int16 [A, L, K]."""

    logprobs_A: Tensor
    picks_ALK: Tensor


class Cache:
    """What the reference says of every answer, in memory-mapped files of a folder; ``lengths`` are the answers' tokens.

    The files belong to one ``key``; those of another are written anew.
    """

    def __init__(self, folder: Path, key: str, lengths: Sequence[int], layers: int, choices: int) -> None:
        self._folder, self._key = folder, key
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._shape = (int(self._ends[-1]), layers, choices)
        self._logprobs_A: np.memmap[tuple[int, ...], np.dtype[np.float32]] | None = None
        self._picks_ALK: np.memmap[tuple[int, ...], np.dtype[np.int16]] | None = None

    def open(self) -> bool:
        """Map the files if they are whole and of this key; whether they are."""
        try:
            found = json.loads((self._folder / _KEY).read_text(encoding="utf-8"))
            sizes = [(self._folder / name).stat().st_size for name in (_LOGPROBS, _PICKS)]
        except (OSError, ValueError):
            return False
        tokens, layers, choices = self._shape
        if found != {"key": self._key} or sizes != [4 * tokens, 2 * tokens * layers * choices]:
            return False
        self._logprobs_A = np.memmap(self._folder / _LOGPROBS, dtype="<f4", mode="r")
        self._picks_ALK = np.memmap(self._folder / _PICKS, dtype="<i2", mode="r", shape=self._shape)
        return True

    def fill(self, batches: Sequence[Sequence[int]], say: Callable[[Sequence[int]], Said]) -> None:
        """Write the files: ``say`` answers for every batch of answers, which come in order.

        Raises:
            TrainingError: the disk refused.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / _KEY).unlink(missing_ok=True)
            with (self._folder / _LOGPROBS).open("wb") as logprobs, (self._folder / _PICKS).open("wb") as picks:
                for batch in batches:
                    said = say(batch)
                    logprobs.write(said.logprobs_A.numpy().astype("<f4").tobytes())
                    picks.write(said.picks_ALK.numpy().astype("<i2").tobytes())
            (self._folder / _KEY).write_text(json.dumps({"key": self._key}) + "\n", encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{self._folder}: cannot be written ({error.strerror}); nothing was trained") from None
        if not self.open():
            raise TrainingError(f"{self._folder}: is not what was just written; look at the disk")

    def of(self, answers: Sequence[int]) -> Said:
        """What was said of these answers, one after the other."""
        logprobs_A, picks_ALK = self._logprobs_A, self._picks_ALK
        if logprobs_A is None or picks_ALK is None:
            raise TrainingError(f"{self._folder}: the reference is not open")
        spans = [slice(int(self._ends[n - 1]) if n else 0, int(self._ends[n])) for n in answers]
        return Said(
            torch.from_numpy(np.concatenate([logprobs_A[span] for span in spans])),
            torch.from_numpy(np.concatenate([picks_ALK[span] for span in spans])),
        )
