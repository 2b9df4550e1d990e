"""JSONL of the user -> documents and pairs to train. Every line that cannot be trained is listed with its number.

A line of SFT is ``{"text"}`` or ``{"messages", "tools"?}`` in OpenAI's format, with a ``weight`` for all of it if
wanted; an assistant message with ``"weight": 0`` is read but not learnt. A line of DPO is ``{"prompt", "chosen",
"rejected", "tools"?}``, where the prompt is messages or text, an answer one assistant message or text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mixtral.errors import MessagesError, MixtralError, TrainingError
from mixtral.tokenizer import Tokenizer, encode_chat
from mixtral.train.config import refuse_unknown
from mixtral.train.start import Start

__all__ = ["BadLinesError", "Doc", "Lines", "Pair", "conversation", "read_pairs", "read_texts", "text_answer"]

T = TypeVar("T")
_SFT_KEYS = ["text", "messages", "tools", "weight", "parallel_tool_calls"]
_DPO_KEYS = ["prompt", "chosen", "rejected", "tools", "parallel_tool_calls"]
_MOST_WEIGHT = 100.0
_SHOWN = 200


class BadLinesError(TrainingError):
    """Lines that cannot be trained: ``problems`` holds (number, what is wrong) of every one."""

    def __init__(self, path: Path, problems: Sequence[tuple[int, str]], lines: int) -> None:
        told = "\n".join(f"line {number}: {text}" for number, text in problems)
        super().__init__(f"{path}: {len(problems)} of {lines} lines cannot be trained:\n{told}", param="train")
        self.path, self.problems, self.lines = path, tuple(problems), lines

    def summary(self) -> str:
        """One line without the list."""
        return f"{self.path}: {len(self.problems)} of {self.lines} lines cannot be trained; nothing was trained"


@dataclass(frozen=True, slots=True)
class Doc:
    """Ids from BOS on, which of them are learnt, and how much they weigh."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two documents with the same prompt; only the answers are ``trained``."""

    chosen: Doc
    rejected: Doc


@dataclass(slots=True)
class Lines(Generic[T]):
    """What a file holds: ``kept`` to train, ``held_out`` for validation, and counts over both.

    ``cut`` documents were longer than the limit, ``dropped`` ones had nothing to learn below it. ``repeated`` lines are
    equal to an earlier one; they are trained as often as they come.
    """

    kept: list[T] = field(default_factory=list)
    held_out: list[T] = field(default_factory=list)
    lines: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    repeated: int = 0
    sha256: str = ""

    def told(self, what: str) -> str:
        """The counts in a line."""
        held = f", {len(self.held_out):,} of them held out" if self.held_out else ""
        return (
            f"{self.lines:,} lines, {len(self.kept) + len(self.held_out):,} {what}{held}; {self.tokens:,} tokens, "
            f"{self.trained:,} of them learnt; {self.cut:,} cut, {self.dropped:,} dropped as too long, "
            f"{self.repeated:,} lines repeated"
        )


def read_texts(path: Path, start: Start, *, max_tokens: int, held_out_percent: int = 0) -> Lines[Doc]:
    """Read a file of SFT.

    Raises:
        BadLinesError: lines cannot be trained; all of them are listed.
        TrainingError: the file cannot be read, or holds nothing to train.
    """

    def documents(value: Mapping[str, Any]) -> list[Doc]:
        weight = _weight(value)
        return [_doc(start, ids, trained, weight) for ids, trained in _texts(start.tokenizer, value)]

    def fit(doc: Doc) -> Doc | None:
        return _fit(doc, max_tokens)

    return _read(path, documents, fit, lambda doc: [doc], held_out_percent)


def read_pairs(path: Path, start: Start, *, max_tokens: int, held_out_percent: int = 0) -> Lines[Pair]:
    """Read a file of DPO. Raises as ``read_texts``."""

    def pairs(value: Mapping[str, Any]) -> list[Pair]:
        refuse_unknown(value, _DPO_KEYS, "the line")
        missing = [name for name in ("prompt", "chosen", "rejected") if value.get(name) is None]
        if missing:
            raise TrainingError(f"{missing[0]} is missing; expected prompt, chosen and rejected")
        sides = [_doc(start, *_answered(start.tokenizer, value, name), 1.0) for name in ("chosen", "rejected")]
        if np.array_equal(sides[0].ids, sides[1].ids):
            raise TrainingError("chosen and rejected are equal")
        return [Pair(*sides)]

    def fit(pair: Pair) -> Pair | None:
        chosen, rejected = _fit(pair.chosen, max_tokens), _fit(pair.rejected, max_tokens)
        if chosen is None or rejected is None or np.array_equal(chosen.ids, rejected.ids):
            return None
        return pair if chosen is pair.chosen and rejected is pair.rejected else Pair(chosen, rejected)

    return _read(path, pairs, fit, lambda pair: [pair.chosen, pair.rejected], held_out_percent)


def _read(
    path: Path,
    make: Callable[[Mapping[str, Any]], list[T]],
    fit: Callable[[T], T | None],
    sides: Callable[[T], list[Doc]],
    held_out_percent: int,
) -> Lines[T]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})", param="train") from None
    found: Lines[T] = Lines(sha256=hashlib.sha256(content).hexdigest())
    problems: list[tuple[int, str]] = []
    seen: set[bytes] = set()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        found.lines += 1
        digest = hashlib.blake2b(line.strip(), digest_size=16).digest()
        found.repeated += digest in seen
        seen.add(digest)
        try:
            made = make(_object(line))
        except MixtralError as error:
            problems.append((number, str(error)))
            continue
        side = found.held_out if int.from_bytes(digest[:8], "big") % 100 < held_out_percent else found.kept
        for item in made:
            fitting = fit(item)
            if fitting is None:
                found.dropped += 1
                continue
            side.append(fitting)
            found.cut += fitting is not item
            found.tokens += sum(len(doc.ids) - 1 for doc in sides(fitting))
            found.trained += sum(int(doc.trained.sum()) for doc in sides(fitting))
    if problems:
        raise BadLinesError(path, problems, found.lines)
    if not found.kept:
        raise TrainingError(f"{path}: holds nothing to train ({found.told('examples')})", param="train")
    return found


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TrainingError(f"not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"not JSON ({str(error)[:_SHOWN]})") from None
    if not isinstance(value, dict):
        raise TrainingError(f"a {type(value).__name__}; expected an object")
    return value


def _weight(value: Mapping[str, Any]) -> float:
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= _MOST_WEIGHT:
        raise TrainingError(f"weight is {weight!r}; expected a number above 0, at most {_MOST_WEIGHT:g}")
    return float(weight)


def _texts(tokenizer: Tokenizer, value: Mapping[str, Any]) -> list[tuple[list[int], list[bool]]]:
    refuse_unknown(value, _SFT_KEYS, "the line")
    if ("text" in value) == ("messages" in value):
        raise TrainingError("expected exactly one of text and messages")
    if "messages" in value:
        found = conversation(tokenizer, value["messages"], value.get("tools"))
        if not found:
            raise TrainingError("nothing to learn: every assistant message has weight 0")
        return found
    text = value["text"]
    if not isinstance(text, str) or not text:
        raise TrainingError(f"text is {text!r:.80}; expected text that is not empty")
    if value.get("tools"):
        raise TrainingError("tools belong to messages, not to text")
    ids = tokenizer.encode(text, bos=True, eos=True)
    return [(ids, [place > 0 for place in range(len(ids))])]


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[tuple[list[int], list[bool]]]:
    """The documents of a conversation: ids, and which of them are learnt. One ends at every turn of function calls, one
    at the last turn; each learns the turns that those before it have not.

    A model writes its calls without ids, but reads them with ids when the results are there. So a call is learnt as the
    end of a document of its own, and stands with its id in the next one, where it is not learnt.

    Raises:
        MessagesError: the messages or tools break a rule.
    """
    if not isinstance(messages, list | tuple):
        raise MessagesError(f"messages is {messages!r:.80}; expected a list of messages", param="messages")
    cuts = [place + 1 for place, one in enumerate(messages) if isinstance(one, Mapping) and one.get("tool_calls")]
    found, done = [], 0
    for cut in sorted({*cuts, len(messages)}):
        encoded = encode_chat(tokenizer, messages[:cut], tools, for_training=True)
        # Nothing but the end of an assistant turn is EOS, so counting them finds the same turn in every document.
        ends = [place for place, id in enumerate(encoded.ids) if id == tokenizer.eos_id]
        first = ends[done - 1] + 1 if done else 0
        trained = [learnt and place >= first for place, learnt in enumerate(encoded.trained)]
        if any(trained):
            found.append((encoded.ids, trained))
        done = len(ends)
    return found


def _answered(tokenizer: Tokenizer, value: Mapping[str, Any], name: str) -> tuple[list[int], list[bool]]:
    prompt, answer = value["prompt"], value[name]
    if isinstance(prompt, str):
        if not isinstance(answer, str) or not answer:
            raise TrainingError(f"{name} is {answer!r:.80}; expected text, as the prompt is text")
        if value.get("tools"):
            raise TrainingError("tools belong to messages, not to text")
        return text_answer(tokenizer, prompt, answer)
    if not isinstance(prompt, list) or not prompt:
        raise TrainingError(f"prompt is {prompt!r:.80}; expected text or a list of messages")
    if isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
        raise TrainingError("prompt ends with an assistant message; expected a user's or a tool's, which is answered")
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    messages = message if isinstance(message, list) else [message]
    if len(messages) != 1 or not isinstance(messages[0], Mapping) or messages[0].get("role") != "assistant":
        raise TrainingError(f"{name} is {answer!r:.80}; expected text or one assistant message")
    encoded = encode_chat(tokenizer, [*prompt, messages[0]], value.get("tools"), for_training=True)
    ends = [place for place, id in enumerate(encoded.ids) if id == tokenizer.eos_id]
    first = ends[-2] + 1 if len(ends) > 1 else 0
    return encoded.ids, [learnt and place >= first for place, learnt in enumerate(encoded.trained)]


def text_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of prompt and answer as one text with BOS and EOS; the answer begins where the ids of the prompt alone end
    or differ."""
    alone = tokenizer.encode(prompt, bos=True)
    ids = tokenizer.encode(prompt + answer, bos=True, eos=True)
    same = (place for place, (one, other) in enumerate(zip(alone, ids, strict=False)) if one != other)
    first = next(same, len(alone))
    return ids, [place >= first for place in range(len(ids))]


def _doc(start: Start, ids: list[int], trained: list[bool], weight: float) -> Doc:
    odd = start.without_row([id for id, learnt in zip(ids, trained, strict=True) if learnt])
    if odd:
        piece = start.tokenizer.piece(odd[0])
        raise TrainingError(
            f"token {odd[0]} ({piece!r}) has no row of its own in this model, so it cannot be learnt; leave it out, or "
            "start from a model with the whole vocabulary"
        )
    if not math.isfinite(weight) or not any(trained[1:]):
        raise TrainingError("nothing to learn in it")
    return Doc(np.array(ids, dtype=np.int32), np.array(trained), weight)


def _fit(doc: Doc, max_tokens: int) -> Doc | None:
    """The document, at most that many ids of it; None if nothing is left to learn."""
    if len(doc.ids) <= max_tokens:
        return doc
    cut = Doc(doc.ids[:max_tokens], doc.trained[:max_tokens], doc.weight)
    return cut if cut.trained[1:].any() else None
