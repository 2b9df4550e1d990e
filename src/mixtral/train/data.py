"""The batch of a step, as a pure function of the seed and the step: nothing to save, nothing to skip on resume.

Step s trains the documents s * n .. (s + 1) * n - 1 of the training split, each with its own positions and its own
attention; documents are laid end to end without padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.desk.source import Document, Source, Split
from mixtral.desk.write import MIXTURE, SKILLS, document
from mixtral.errors import TrainingError
from mixtral.tokenizer import Tokenizer, encode_chat
from mixtral.train.config import DataConfig
from mixtral.weights.vocab import build_respell, row_map

__all__ = ["DeskData", "TokenBatch", "check_controls", "choose_trained_ids", "encode_document"]

# So many of every skill are looked at, where a run starts with rows that others chose or comes to the skill later.
_SKILL_DOCUMENTS = 50


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """T tokens of whole documents: input rows, rows to predict, their loss weights, and the document lengths.

    ``own_T`` tells which rows to predict are the assistant's (or of plain text), whatever they weigh.
    """

    inputs_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    own_T: Tensor
    lengths: tuple[int, ...]


def encode_document(tokenizer: Tokenizer, item: Document) -> tuple[list[int], list[bool]]:
    """Ids of a document and which of them are the assistant's (or, in plain text, everything after the first)."""
    if item.text:
        ids = tokenizer.encode(item.text, bos=True, eos=True)
        return ids, [place > 0 for place in range(len(ids))]
    encoded = encode_chat(tokenizer, item.messages, item.tools or None, for_training=True)
    return encoded.ids, encoded.trained


def choose_trained_ids(tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    """The ids that get rows of their own: controls of the chat format, bytes, characters seen, then the most frequent.

    Decided by the training split alone. ``tokenizer`` must not respell.
    """
    counts: Counter[int] = Counter()
    for number in range(config.sample_documents):
        counts.update(encode_document(tokenizer, document(config.seed, "train", number, config.mixture or None))[0])
    kept = {0, tokenizer.bos_id, tokenizer.eos_id}
    kept |= {i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i) or (tokenizer.is_control(i) and counts[i])}
    kept |= _control_ids(tokenizer, config.seed, config.later.values())
    kept |= {i for i in counts if len(tokenizer.piece(i).lstrip("▁")) <= 1}
    kept |= set(tokenizer.encode("0 1 2 3 4 5 6 7 8 9"))
    ranked = sorted((i for i in counts if i not in kept), key=lambda i: (-counts[i], i))
    fill = (i for i in range(tokenizer.vocab_size) if i not in kept and i not in counts and not tokenizer.is_control(i))
    for source in (iter(ranked), fill):
        for i in source:
            if len(kept) >= config.trained_rows:
                break
            kept.add(i)
    if len(kept) > config.trained_rows:
        raise TrainingError(
            f"trained_rows is {config.trained_rows}; the indispensable ids alone are {len(kept)}. Raise trained_rows"
        )
    return sorted(kept)


def _control_ids(tokenizer: Tokenizer, seed: int, mixtures: Iterable[Mapping[str, int]]) -> set[int]:
    """The control ids that documents of the skills of all these mixtures have.

    Raises:
        ConfigError: a skill is unknown.
    """
    given = [dict(mixture) or MIXTURE for mixture in mixtures]
    for mixture in given:
        document(seed, "train", 0, mixture)
    skills = {skill for mixture in given for skill, weight in mixture.items() if weight}
    texts = (SKILLS[skill](seed, "train", n) for skill in sorted(skills) for n in range(_SKILL_DOCUMENTS))
    return {i for item in texts for i in encode_document(tokenizer, item)[0] if tokenizer.is_control(i)}


def check_controls(
    tokenizer: Tokenizer, seed: int, mixtures: Iterable[Mapping[str, int]], trained: Iterable[int], name: str
) -> None:
    """An error at the start, and not when its step has come, if documents of the mixtures, the value ``name``, have
    control tokens without rows of their own.

    Raises:
        TrainingError: they have.
        ConfigError: a skill is unknown.
    """
    missing = _control_ids(tokenizer, seed, mixtures) - set(trained)
    if missing:
        raise TrainingError(
            f"data.{name} has documents with {', '.join(map(tokenizer.piece, sorted(missing)))}, for which there are "
            "no rows: the run, or the model it began with, was started without that skill. Leave the skill out, or "
            "start a new run from nothing",
            param=name,
        )


class DeskData:
    """Batches of the town desk for a set of trained ids. ``row_of_id`` [V] maps ids to rows; the last row is shared."""

    def __init__(self, config: DataConfig, trained: list[int], version: str = "v3") -> None:
        self.config = config
        plain = Tokenizer.from_version(version)
        check_controls(plain, config.seed, config.later.values(), trained, "later")
        surfaces = [plain.token_bytes(i) for i in range(plain.vocab_size)]
        self.respell = build_respell(surfaces, set(trained))
        self.tokenizer = Tokenizer.from_version(version, respell=self.respell)
        self.row_of_id = row_map(trained, plain.vocab_size)
        self.rows = len(trained) + 1
        self.copies_of_last = plain.vocab_size - len(trained)

    def micro_batches(
        self, step: int, *, split: Split = "train", turn: tuple[int, int] = (0, 1)
    ) -> Iterator[TokenBatch]:
        """The parts of a step's batch; ``turn`` as in ``numbers``."""
        mixture = self.config.mixture_at(step) if split == "train" else self.config.mixture
        for numbers in self.numbers(step, turn):
            yield self._batch(numbers, split, mixture)

    def numbers(self, step: int, turn: tuple[int, int] = (0, 1)) -> list[range]:
        """The documents of each part of a step. Of several ranks, ``turn`` (its index, their number), each takes its
        turn in those of every part: the step is the same on any number of them."""
        together, size = self.config.documents_per_step, self.config.documents_per_step // self.config.micro_batches
        starts = range(step * together, step * together + size * self.config.micro_batches, size)
        return [range(first, first + size)[turn[0] :: turn[1]] for first in starts]

    def _batch(self, numbers: range, split: Split, mixture: dict[str, int]) -> TokenBatch:
        inputs: list[int] = []
        labels: list[int] = []
        own: list[bool] = []
        unknown: list[int] = []
        lengths = []
        for number in numbers:
            item = document(self.config.seed, split, number, mixture or None)
            ids, trained = encode_document(self.tokenizer, item)
            if split == "train":
                unknown += [len(inputs) + place for place in self._unknown_places(number, len(ids) - 1)]
            inputs += ids[:-1]
            labels += ids[1:]
            own += trained[1:]
            lengths.append(len(ids) - 1)
        rows_T = self.row_of_id[torch.tensor(inputs)].long()
        labels_T = self.row_of_id[torch.tensor(labels)].long()
        if int(labels_T.max()) == self.rows - 1:
            odd = labels[int(labels_T.argmax())]
            raise TrainingError(f"token {odd} has no row of its own, so it cannot be learnt; raise trained_rows")
        rows_T = rows_T.index_fill(0, torch.tensor(unknown, dtype=torch.int64), self.rows - 1)
        own_T = torch.tensor(own)
        weights_T = torch.where(own_T, 1.0, self.config.prompt_weight)
        return TokenBatch(rows_T, labels_T, weights_T, own_T, tuple(lengths))

    def _unknown_places(self, number: int, length: int) -> list[int]:
        """The inputs of a document that become the shared row, so that it means "a word I do not know".

        The key is the document's number, never its part of the batch: a step trains the same tokens in any number of
        parts. ``number`` counts through all steps, so it stands for the step and the place in it.
        """
        source = Source("unknown", self.config.seed, number)
        count, rest = divmod(length * self.config.unknown_per_mille, 1000)
        # Most documents are too short for a whole replacement; drawing for the rest keeps the share right on average.
        count += source.below(1000) < rest
        return [source.below(length) for _ in range(count)]
