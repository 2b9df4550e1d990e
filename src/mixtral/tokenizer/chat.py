"""Messages and function definitions -> ids. Equal to mistral-common's encoding, id for id, for v1, v2 and v3.

Each segment is encoded on its own and control ids are put between segments, so no text can become a control token.
Rules: system texts are joined by a blank line and put before the first (v1) or last (v2, v3) user turn; neighbours of
one role are one turn; a conversation that does not begin with a user turn gets an empty one; v2 drops calls and results
before the last user turn. JSON is written again by ``json.dumps``, so ``1e5`` in a history becomes ``100000.0``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mixtral.errors import CapacityError, MessagesError
from mixtral.tokenizer.calls import map_call_ids
from mixtral.tokenizer.tokenizer import Tokenizer
from mixtral.tokenizer.turns import Turn, read_tools, read_turns

__all__ = ["EncodedChat", "encode_chat"]


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """``ids`` of a conversation; ``trained`` (as long) marks the tokens of assistant turns, their EOS included.

    ``call_ids`` maps each call id that was not 9 letters and digits to the id that the model sees instead.
    """

    ids: list[int]
    trained: list[bool]
    call_ids: dict[str, str] = field(default_factory=dict)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    max_tokens: int | None = None,
    for_training: bool = False,
) -> EncodedChat:
    """Encode a conversation in the OpenAI format; the model's answer comes next.

    The last message is from the user or a tool, or an assistant message with ``prefix: true`` that is to be continued.
    ``for_training``: the last message is the assistant's, and its function calls are written without ids (the model
    learns to leave them to the server). An assistant message with ``weight: 0`` is not marked in ``trained``.

    Raises:
        MessagesError: the messages or tools break a rule; ``param`` names the place, such as ``messages[3].content``.
        CapacityError: more than ``max_tokens`` ids; found without encoding the rest.
    """
    turns = read_turns(messages, for_training=for_training)
    definitions = read_tools(tools or ())
    if tokenizer.version == "v1":
        _refuse_functions(turns, has_tools=bool(definitions))
    call_ids = map_call_ids(call.id for turn in turns for call in turn.calls if call.id)
    system = "\n\n".join(turn.text for turn in turns if turn.role == "system" and turn.filled)
    merged = _merge(turns)
    writer = _Writer(tokenizer, max_tokens)
    if tokenizer.version == "v1":
        _write_v1(writer, merged, system)
    else:
        _write_v3(writer, merged, system, definitions, call_ids, without_last_ids=for_training)
    return EncodedChat(writer.ids, writer.trained, call_ids)


def _merge(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of one role joined, system turns left out, an empty user turn in front if the first is none."""
    merged: list[Turn] = []
    previous: Turn | None = None
    for turn in turns:
        alike = previous is not None and (previous.role, previous.weight) == (turn.role, turn.weight)
        previous = turn
        if turn.role == "system":
            continue
        if not alike or turn.role == "tool":
            merged.append(turn)
            continue
        before = merged[-1]
        if turn.calls or before.calls:
            raise MessagesError(
                f"{turn.where} continues the assistant turn before it; content and function calls cannot share a turn. "
                "Leave one of them out.",
                param=turn.where,
            )
        text = "\n\n".join(text for text in (before.text, turn.text) if text)
        merged[-1] = replace(before, text=text, prefix=turn.prefix)
    if not merged or merged[0].role != "user":
        merged.insert(0, Turn("user", "messages"))
    return merged


def _write_v1(writer: _Writer, turns: Sequence[Turn], system: str) -> None:
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            writer.assistant(turn, turn.text)
        else:
            # The first turn is always a user turn, so this is where the system text goes.
            before = f"{system}\n\n" if system and place == 0 else ""
            writer.text(f"[INST] {before}{turn.text} [/INST]")


def _write_v3(
    writer: _Writer,
    turns: Sequence[Turn],
    system: str,
    tools: list[dict[str, Any]],
    call_ids: Mapping[str, str],
    *,
    without_last_ids: bool,
) -> None:
    """v3; and v2, where calls have no id, results a name, and both are dropped before the last user turn."""
    v2 = writer.tokenizer.version == "v2"
    last_user = max(place for place, turn in enumerate(turns) if turn.role == "user")
    for place, turn in enumerate(turns):
        if v2 and place > last_user and turn.role == turns[place - 1].role == "tool":
            raise MessagesError(f"{turn.where} is the second result of one turn; v2 has room for one", param=turn.where)
        if turn.role == "user":
            if tools and place == last_user:
                writer.enclosed("[AVAILABLE_TOOLS]", _json(tools, "tools"))
            before = f"{system}\n\n" if system and place == last_user else ""
            writer.enclosed("[INST]", before + turn.text)
        elif turn.calls or turn.role == "tool":
            if not (v2 and place < last_user):
                with_ids = not v2 and not (without_last_ids and place == len(turns) - 1)
                _write_function_turn(writer, turn, call_ids, with_ids=with_ids, named=v2)
        else:
            writer.assistant(turn, turn.text.rstrip(" "))


def _write_function_turn(
    writer: _Writer, turn: Turn, call_ids: Mapping[str, str], *, with_ids: bool, named: bool
) -> None:
    """The calls of an assistant turn, or one result: with the name of the function (v2) or the id of its call (v3)."""
    if turn.role == "tool":
        content = _again(turn.text or "{}", f"{turn.where}.content")
        result: Any = {"content": content, "call_id": call_ids.get(turn.call_id, turn.call_id)}
        if named:
            result = [{"name": turn.name, "content": content}]
        writer.enclosed("[TOOL_RESULTS]", _json(result, turn.where))
        return
    calls = [
        {"name": call.name, "arguments": _again(call.arguments or "{}", f"{turn.where}.tool_calls[{number}]")}
        | ({"id": call_ids.get(call.id, call.id)} if with_ids else {})
        for number, call in enumerate(turn.calls)
    ]
    writer.assistant(turn, _json(calls, turn.where), control="[TOOL_CALLS]")


def _refuse_functions(turns: Sequence[Turn], *, has_tools: bool) -> None:
    where = "tools" if has_tools else next((turn.where for turn in turns if turn.calls or turn.role == "tool"), None)
    if where is not None:
        raise MessagesError(
            f"{where}: this model's v1 chat format (8x7B) has no function calls. "
            "Leave the tools out, or use a model with the v3 vocabulary (8x22B Instruct).",
            param=where,
            code="tools_not_supported",
        )


def _again(text: str, where: str) -> Any:
    """The value of a JSON text, or the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise MessagesError(f"{where} is JSON that cannot be read ({error}); make it smaller", param=where) from error


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessagesError(f"{where} cannot be written as JSON: {error}", param=where) from error


class _Writer:
    """Ids so far; refuses the segment with which they pass the limit, if possible before encoding it."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int | None) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.trained: list[bool] = []
        self._max_tokens = max_tokens
        self._add([tokenizer.bos_id], trained=False)

    def text(self, text: str, *, trained: bool = False) -> None:
        self._check(len(self.ids) + self.tokenizer.fewest_tokens(text))
        self._add(self.tokenizer.encode(text), trained=trained)

    def enclosed(self, control: str, text: str) -> None:
        """``[X]`` text ``[/X]``"""
        self._add([self.tokenizer.control_id(control)], trained=False)
        self.text(text)
        self._add([self.tokenizer.control_id(f"[/{control[1:]}")], trained=False)

    def assistant(self, turn: Turn, text: str, *, control: str = "") -> None:
        """An optional control token, text, and EOS unless the turn is to be continued."""
        trained = turn.weight != 0
        if control:
            self._add([self.tokenizer.control_id(control)], trained=trained)
        self.text(text, trained=trained)
        if not turn.prefix:
            self._add([self.tokenizer.eos_id], trained=trained)

    def _add(self, ids: list[int], *, trained: bool) -> None:
        self._check(len(self.ids) + len(ids))
        self.ids += ids
        self.trained += [trained] * len(ids)

    def _check(self, count: int) -> None:
        if self._max_tokens is not None and count > self._max_tokens:
            raise CapacityError(
                f"the conversation needs at least {count} tokens; the limit is {self._max_tokens}. Shorten it.",
                param="messages",
            )
