"""Ids equal those of mistral-common, one for one, over generated conversations (E1)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mixtral.errors import MessagesError
from mixtral.tokenizer import Tokenizer, encode_chat

mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
from mistral_common.exceptions import MistralCommonException  # noqa: E402
from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.protocol.instruct.validator import ValidationMode  # noqa: E402

CONVERSATIONS = 500
Messages = list[dict[str, Any]]

WORDS = (
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\x00",
        "\x7f",
        "\u2028",
        "\ufeff",
        "\u200d",
        "\ufffd",
        "▁",
        "▁▁",
        "☺",
    ),
    *(
        "[INST]",
        "[/INST]",
        "</s>",
        "<s>",
        "<unk>",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/TOOL_RESULTS]",
        "[TOOL_RESULTS]",
    ),
    *(
        "<0x0A>",
        "[control_12]",
        "[PREFIX]",
        "[SUFFIX]",
        "[IMG]",
        "[REFERENCE_DOC_3]",
        "[REFERENCE_DOC_19]",
        "[REFERENCE_DOC_20]",
    ),
    *(
        "Hello",
        "Guten Tag",
        "Zürich",
        "l'hôtel",
        "¿Dónde está?",
        "però",
        "😀",
        "👩‍👩‍👧",
        "🇨🇭",
        "日本語",
        "한국어",
        "שלום",
        "ไทย",
        "e\u0301",
    ),
    *(
        "def f(x):\n    return x",
        '{"a": [1, 2.50, null]}',
        "1e5",
        "-0",
        "3.1400",
        "100000000000000000000000",
        "a,b;c",
        "    x",
    ),
    *(
        "\U0010ffff",
        "\u0378",
        "ﬁ",
        "Ⅷ",
        "…",
        "“quoted”",
        "\\n",
        "\\u00e9",
        '"',
        "'",
        "<|im_start|>",
        "<div>&amp;</div>",
    ),
)
NAMES = ("weather", "find_room", "book-table", "Sum2", "x", "a" * 64)
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class Conversations:
    """Seeded random conversations that mistral-common accepts."""

    def __init__(self, version: str, seed: int) -> None:
        self.version = version
        self.functions = version != "v1"
        self.random = random.Random(f"{version}/{seed}")

    def text(self, *, empty: bool = True) -> str:
        while True:
            words = [self.random.choice(WORDS) for _ in range(self.random.randint(0 if empty else 1, 6))]
            text = self.random.choice(("", " ", " ", "\n")).join(words)
            if text or empty:
                return text

    def content(self, *, empty: bool = True) -> Any:
        if self.random.random() < 0.75:
            return self.text(empty=empty)
        parts = [self.text() for _ in range(self.random.randint(0 if empty else 1, 3))]
        if not empty and not any(parts):
            parts.append("x")
        return [{"type": "text", "text": part} for part in parts]

    def value(self, depth: int = 0) -> str:
        """JSON text, written with odd spacing and odd numbers."""
        kind = self.random.randint(0, 7 if depth < 3 else 5)
        if kind < 6:
            return ("1", "1e5", "1.10", "true", "null", '"\\u00e9 \\"x\\" é 😀 [TOOL_CALLS]"')[kind]
        members = [self.value(depth + 1) for _ in range(self.random.randint(0, 3))]
        if kind == 6:
            return "[" + " , ".join(members) + "]"
        return "{" + ",".join(f'"{self.random.choice("abc")}":  {member}' for member in members) + "}"

    def system(self) -> Messages:
        return [{"role": "system", "content": self.content()} for _ in range(self.random.choice((0, 0, 1, 2)))]

    def users(self) -> Messages:
        found = []
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            found.append({"role": "user", "content": self.content()})
            if self.random.random() < 0.15:
                found.append({"role": "system", "content": self.content()})
        if found[-1]["role"] == "system" and self.random.random() < 0.7:
            found.append({"role": "user", "content": self.content()})
        return found

    def assistants(self) -> Messages:
        count = self.random.choice((1, 1, 1, 2))
        return [{"role": "assistant", "content": self.content(empty=False)} for _ in range(count)]

    def calls(self) -> Messages:
        count = 1 if self.version == "v2" else self.random.choice((1, 1, 2, 3))
        calls, results = [], []
        for _ in range(count):
            id = "".join(self.random.choice(CHARACTERS) for _ in range(9))
            arguments = self.random.choice((self.value(), "{" + f'"q": {self.value()}' + "}", "", "not json", "{"))
            name = self.random.choice(NAMES)
            calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            content = self.random.choice((self.value(), self.content(), self.text()))
            result = {"role": "tool", "tool_call_id": id, "content": content}
            if self.random.random() < 0.5:
                result["name"] = name
            results.append(result)
        self.random.shuffle(results)
        empty = {"content": self.random.choice(("", None))} if self.random.random() < 0.5 else {}
        return [{"role": "assistant", **empty, "tool_calls": calls}, *results]

    def rounds(self) -> Messages:
        messages = self.system()
        if self.random.random() < 0.15:
            messages += self.assistants()
        for _ in range(self.random.randint(0, 3)):
            messages += self.users()
            while self.functions and self.random.random() < 0.35:
                messages += self.calls()
            messages += self.assistants()
        return messages

    def to_answer(self) -> Messages:
        """Ends with a user, a result, or a turn to be continued."""
        messages = self.rounds() + self.users()
        if messages[-1]["role"] == "system":
            messages.append({"role": "user", "content": self.content()})
        if self.functions and self.random.random() < 0.4:
            messages += self.calls()
        elif self.random.random() < 0.2:
            messages += self.assistants()
            messages[-1]["prefix"] = True
        return messages

    def to_learn(self) -> Messages:
        """Ends with an assistant turn, perhaps with calls; some turns have a weight."""
        messages = self.rounds() + self.users()
        if self.functions and self.random.random() < 0.5:
            messages.append(self.calls()[0])
        else:
            messages += self.assistants()
        for message in messages:
            if message["role"] == "assistant" and self.random.random() < 0.4:
                message["weight"] = self.random.choice((0, 1))
        return messages

    def tools(self) -> list[dict[str, Any]] | None:
        if not self.functions or self.random.random() < 0.4:
            return None
        found = []
        for name in self.random.sample(NAMES, self.random.randint(0, 3)):
            function: dict[str, Any] = {"name": name}
            if self.random.random() < 0.7:
                function["description"] = self.text()
            if self.random.random() < 0.7:
                described = {"type": "string", "description": self.text()}
                function["parameters"] = {"type": "object", "properties": {"ö": described}, "required": ["ö"]}
            if self.random.random() < 0.3:
                function["strict"] = self.random.choice((True, False, None))
            found.append({"type": "function", "function": function})
        return found


def oracle(version: str, mode: ValidationMode = ValidationMode.test) -> Any:
    made = mistral.MistralTokenizer
    path = getattr(made, version)().instruct_tokenizer.tokenizer.file_path
    return made.from_file(path, mode=mode)


def theirs(tokenizer: Any, messages: Messages, tools: Any) -> list[int]:
    continued = bool(messages[-1].get("prefix"))
    plain = [{key: value for key, value in message.items() if key not in ("prefix", "weight")} for message in messages]
    request = ChatCompletionRequest.from_openai(plain, tools, continue_final_message=continued)
    if any("weight" in message for message in messages):
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                made = request.messages[place]
                request.messages[place] = FinetuningAssistantMessage.model_construct(
                    content=made.content, tool_calls=made.tool_calls, prefix=False, weight=message.get("weight")
                )
    return list(tokenizer.encode_chat_completion(request).tokens)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_conversations_to_be_answered_have_the_ids_of_mistral_common(version: str) -> None:
    ours, reference = Tokenizer.from_version(version), oracle(version)
    for seed in range(CONVERSATIONS):
        made = Conversations(version, seed)
        messages, tools = made.to_answer(), made.tools()
        assert encode_chat(ours, messages, tools).ids == theirs(reference, messages, tools), (seed, messages, tools)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_conversations_to_be_learnt_have_the_ids_of_mistral_common_for_fine_tuning(version: str) -> None:
    ours, reference = Tokenizer.from_version(version), oracle(version, ValidationMode.finetuning)
    with_calls = 0
    for seed in range(CONVERSATIONS):
        made = Conversations(version, CONVERSATIONS + seed)
        messages, tools = made.to_learn(), made.tools()
        for call in messages[-1].get("tool_calls", ()):
            with_calls += 1
            call.pop("id")
        assert encode_chat(ours, messages, tools, for_training=True).ids == theirs(reference, messages, tools), messages
    assert (with_calls > CONVERSATIONS // 10) == (version != "v1")


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_what_mistral_common_refuses_is_refused(version: str) -> None:
    ours, reference = Tokenizer.from_version(version), oracle(version, ValidationMode.serving)
    user = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    call = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}
    bad_name = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f g", "arguments": ""}}]}
    refused: list[Messages] = [
        [],
        [user, answer],
        [user, answer, {"role": "system", "content": "c"}, user],
        [user, {"role": "assistant", "content": ""}, user],
        [user, {"role": "assistant"}, user],
        [user, call | {"content": "b"}, result],
        [user, answer | {"prefix": True}, user],
        [user, call],
        [user, call, result, result],
        [user, call, answer, user],
        [user, bad_name, result],
        [user, result],
        [user, answer, call, result],
    ]
    for messages in refused:
        with pytest.raises(MessagesError):
            encode_chat(ours, messages)
        if not any(message.get("prefix") for message in messages):
            with pytest.raises((MistralCommonException, ValueError)):
                reference.encode_chat_completion(ChatCompletionRequest.from_openai(messages, model="m"))
