"""Clients of a soak test: one request of a random kind after the other, each with what is expected of its answer."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from mixtral.desk.source import Document
from mixtral.desk.write import SKILLS

__all__ = ["FAULT_CODES", "SENTINELS", "Load", "Outcome", "Reply", "ask", "sentinel"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FAULT_CODES = frozenset({"engine_dead", "engine_restarting", "request_quarantined"})
"""What a request may be told because an engine was killed, and for nothing else."""
TIMEOUT_S = 90.0
SENTINELS: tuple[str, ...] = (
    "When does breakfast start?",
    "Ich suche ein Zimmer mit Balkon.",
    "À quelle heure ferme le musée ?",
    "Quanto costa il biglietto?",
    "¿Dónde está la estación?",
)
"""Questions whose greedy answers must be the same bytes from the first minute to the last."""
PATTERNS = (r"\d{3}-\d{2}", r"(yes|no|maybe)", r"[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})?", r"\+?[0-9]{2}( [0-9]{2,3}){2,4}")
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 5},
    {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 100}]},
    {"type": "object", "properties": {"at": {"type": "string", "format": "date-time"}}, "required": ["at"]},
)  # fmt: skip
WRONG: tuple[tuple[str, Any, int], ...] = (
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "temperature": 9}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "nonsense": 1}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10**6}, 400),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "regex", "regex": "(((("}}, 400),
    (COMPLETIONS, {"prompt": [[70000]]}, 400),
    (COMPLETIONS, {"prompt": "x", "model": "another"}, 404),
    ("/v1/embeddings", {"input": "x"}, 404),
    (CHAT, "{", 400),
    (CHAT, "[" * 100, 400),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: when it ran, what it was told (status 0: it left before), and what was wrong with that, or "".

    ``tokens`` were generated for it, as its usage says.
    """

    kind: str
    began: float
    ended: float
    status: int
    code: str = ""
    problem: str = ""
    tokens: int = 0

    @property
    def by_fault(self) -> bool:
        """Whether an injected fault may explain it."""
        return self.code in FAULT_CODES or self.code == "connection"


@dataclass(slots=True)
class Reply:
    """An answer, whole or put together from a stream. ``code`` is that of an error, also of an error event."""

    status: int = 0
    code: str = ""
    message: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    calls: dict[int, list[dict[str, str]]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    done: bool = False
    body: Any = None

    def fail(self, error: dict[str, Any]) -> None:
        self.code, self.message = str(error.get("code")), str(error.get("message"))


def ask(address: str, path: str, body: Any, *, slowly: float = 0.0, timeout_s: float = TIMEOUT_S) -> Reply:
    """Send a request and read its answer to the end; ``slowly``: with pauses of so many seconds between small reads.

    Raises OSError or HTTPException where the connection breaks, TimeoutError where nothing comes.
    """
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=timeout_s)
    try:
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", path, text.encode(), {"content-type": "application/json"})
        answer = connection.getresponse()
        reply = Reply(status=answer.status)
        if answer.headers.get_content_type() == "text/event-stream":
            for data in _events(answer, slowly):
                _take(reply, data)
            return reply
        reply.body = json.loads(answer.read())
        reply.done = True
        if "error" in reply.body:
            reply.fail(reply.body["error"])
        elif "choices" in reply.body:
            for choice in reply.body["choices"]:
                _whole(reply, choice)
            reply.tokens = reply.body["usage"]["completion_tokens"]
        return reply
    finally:
        connection.close()


def _events(answer: http.client.HTTPResponse, slowly: float) -> Iterator[str]:
    waiting = b""
    while part := answer.read1(64 if slowly else 65536):
        waiting += part
        *whole, waiting = waiting.split(b"\n\n")
        yield from (each.decode().removeprefix("data: ") for each in whole if not each.startswith(b":"))
        time.sleep(slowly)
    if waiting:
        raise http.client.IncompleteRead(waiting)


def _take(reply: Reply, data: str) -> None:
    if data == "[DONE]":
        reply.done = True
        return
    event = json.loads(data)
    if "error" in event:
        reply.fail(event["error"])
        return
    if event.get("usage"):
        reply.tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        index, delta = choice["index"], choice.get("delta", choice)
        text = delta.get("content", delta.get("text")) or ""
        reply.texts[index] = reply.texts.get(index, "") + text
        for call in delta.get("tool_calls", []):
            calls = reply.calls.setdefault(index, [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
        if choice["finish_reason"]:
            reply.finish[index] = choice["finish_reason"]


def _whole(reply: Reply, choice: dict[str, Any]) -> None:
    index, message = choice["index"], choice.get("message", choice)
    reply.texts[index] = message.get("content", message.get("text")) or ""
    reply.calls[index] = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls", [])]
    reply.finish[index] = choice["finish_reason"]


def sentinel(address: str, text: str, *, stream: bool) -> Reply:
    """A sentinel's answer."""
    messages = [{"role": "user", "content": text}]
    body = {"model": "embedded", "messages": messages, "temperature": 0, "max_tokens": 48, "stream": stream}
    return ask(address, CHAT, body)


class Load:
    """Threads of clients against one server until ``stop``; ``rate`` requests start per second in all."""

    def __init__(self, address: str, seed: int, *, clients: int = 8, rate: float = 4.0) -> None:
        self.outcomes: list[Outcome] = []
        self.expected: dict[str, str] = {}
        self._address = address
        self._stopped = threading.Event()
        self._pause_s = clients / rate
        self._threads = [threading.Thread(target=self._run, args=(seed * 1000 + n,)) for n in range(clients)]
        self._kinds: dict[str, tuple[int, Callable[[random.Random], Outcome]]] = {
            "chat": (30, self._chat),
            "sentinel": (8, self._sentinel),
            "tools": (12, self._tools),
            "constrained": (14, self._constrained),
            "long": (5, self._long),
            "completion": (6, self._completion),
            "leaver": (12, self._leaver),
            "slow": (3, self._slow),
            "wrong": (8, self._wrong),
            "small": (6, self._small),
        }

    def start(self) -> None:
        """Start all clients."""
        for thread in self._threads:
            thread.start()

    def stop(self, within_s: float) -> int:
        """Let the clients finish what they are at; how many did not within the time."""
        self._stopped.set()
        end = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def warm_up(self) -> None:
        """A request of every kind; then many at once, until all threads and processes that the server may have run."""
        draw = random.Random(0)
        for kind in self._kinds:
            self._do(kind, draw)
        for _ in range(2):
            together = [
                threading.Thread(target=self._do, args=(kind, random.Random(place)))
                for place, kind in enumerate(["constrained", "tools", "long", "completion"] * 5)
            ]
            for thread in together:
                thread.start()
            for thread in together:
                thread.join()

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while not self._stopped.wait(draw.expovariate(1 / self._pause_s)):
            self._do(draw.choices(names, weights)[0], draw)

    def _do(self, kind: str, draw: random.Random) -> None:
        began = time.time()
        try:
            outcome = self._kinds[kind][1](draw)
        except TimeoutError as error:
            outcome = Outcome(kind, began, time.time(), 0, "hung", f"nothing came for {TIMEOUT_S:g} s: {error!r}")
        except (OSError, http.client.HTTPException) as error:
            outcome = Outcome(kind, began, time.time(), 0, "connection", f"the connection broke: {error!r}")
        except Exception as error:
            outcome = Outcome(kind, began, time.time(), 0, "reading", f"the answer cannot be read: {error!r:.300}")
        self.outcomes.append(outcome)

    def _answer(
        self, kind: str, path: str, body: dict[str, Any], check: Callable[[Reply], str], *, slowly: float = 0.0
    ) -> Outcome:
        began = time.time()
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        reply = ask(self._address, path, {"model": "embedded", **body}, slowly=slowly)
        problem = ""
        if reply.status != 200 or reply.code:
            problem = f"{reply.status} {reply.code}: {reply.message:.200}"
        elif not reply.done:
            problem = "the stream ends without [DONE]"
        elif len(reply.finish) != (wanted := body.get("n", 1) * len(body.get("prompt", " "))):
            problem = f"{len(reply.finish)} answers end with a reason; expected {wanted}"
        else:
            problem = check(reply)
        return Outcome(kind, began, time.time(), reply.status, reply.code, problem, reply.tokens)

    def _document(self, draw: random.Random, *skills: str, most: int = 10**6) -> Document:
        return SKILLS[draw.choice(skills)](0, "train", draw.randrange(most))

    def _chat(self, draw: random.Random) -> Outcome:
        document = self._document(draw, "chat", "sums", "notes")
        body: dict[str, Any] = {"messages": _question(document), "max_tokens": draw.choice([1, 20, 60])}
        body |= {"stream": draw.random() < 0.5, "temperature": draw.choice([0, 0.7, 1])}
        body |= {"n": draw.choice([1, 1, 1, 2, 3])}
        if draw.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 2}
        if draw.random() < 0.1:
            body["mixtral"] = {"routing": "experts"}
        return self._answer("chat", CHAT, body, lambda reply: "")

    def _sentinel(self, draw: random.Random) -> Outcome:
        began, text = time.time(), draw.choice(SENTINELS)
        reply = sentinel(self._address, text, stream=draw.random() < 0.5)
        problem = ""
        if reply.status != 200 or reply.code or not reply.done:
            problem = f"{reply.status} {reply.code}: {reply.message:.200}"
        elif reply.texts[0] != self.expected.setdefault(text, reply.texts[0]):
            problem = f"{text!r} is answered {reply.texts[0]!r}; before it was {self.expected[text]!r}"
        return Outcome("sentinel", began, time.time(), reply.status, reply.code, problem, reply.tokens)

    def _tools(self, draw: random.Random) -> Outcome:
        # Few, so that the cache of grammars is as large as it gets when memory is judged.
        document = self._document(draw, "calls", most=12)
        tools = list(document.tools)
        named = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        choice: Any = draw.choice(["auto", "required", {"type": "function", "function": {"name": next(iter(named))}}])
        body: dict[str, Any] = {"messages": _question(document), "tools": tools, "tool_choice": choice}
        body |= {"stream": draw.random() < 0.5, "temperature": draw.choice([0, 1]), "max_tokens": 120}
        body |= {"parallel_tool_calls": draw.random() < 0.5}

        def check(reply: Reply) -> str:
            for call in reply.calls.get(0, []) if reply.finish[0] == "tool_calls" else []:
                if wrong := _invalid(named[call["name"]], call["arguments"]):
                    return wrong
            none = choice != "auto" and not reply.calls.get(0) and reply.finish[0] != "length"
            return "no call where one is required" if none else ""

        return self._answer("tools", CHAT, body, check)

    def _constrained(self, draw: random.Random) -> Outcome:
        document = self._document(draw, "records")
        body: dict[str, Any] = {"messages": _question(document), "max_tokens": 120}
        body |= {"stream": draw.random() < 0.5, "temperature": draw.choice([0, 1])}
        kind = draw.choice(["json_schema", "json_schema", "json_object", "regex", "choice"])
        schema = draw.choice(SCHEMAS)
        body["response_format"] = {"type": kind}
        if kind == "json_schema":
            body["response_format"][kind] = {"name": "x", "schema": schema}
        elif kind == "regex":
            body["response_format"][kind] = draw.choice(PATTERNS)
        elif kind == "choice":
            body["response_format"][kind] = ["yes", "no", "I do not know"]

        def check(reply: Reply) -> str:
            if reply.finish[0] != "stop" or kind == "regex":
                return ""
            if kind == "choice":
                known = body["response_format"]["choice"]
                return "" if reply.texts[0] in known else f"{reply.texts[0]!r} is no choice"
            return _invalid(schema if kind == "json_schema" else {"type": "object"}, reply.texts[0])

        return self._answer("constrained", CHAT, body, check)

    def _long(self, draw: random.Random) -> Outcome:
        notes = "\n".join(str(self._document(draw, "notes").messages[0]["content"]) for _ in range(7))
        body = {"messages": [{"role": "user", "content": notes}], "max_tokens": 16, "stream": draw.random() < 0.5}
        return self._answer("long", CHAT, body, lambda reply: "")

    def _completion(self, draw: random.Random) -> Outcome:
        prompts = [self._document(draw, "story").text for _ in range(draw.randint(1, 3))]
        body: dict[str, Any] = {"prompt": prompts, "max_tokens": 16, "n": draw.choice([1, 2]), "logprobs": 1}
        body["echo" if draw.random() < 0.5 else "stream"] = True
        return self._answer("completion", COMPLETIONS, body, lambda reply: "")

    def _slow(self, draw: random.Random) -> Outcome:
        document = self._document(draw, "chat")
        body = {"messages": _question(document), "max_tokens": 80, "stream": True, "ignore_eos": True}
        return self._answer("slow", CHAT, body, lambda reply: "", slowly=draw.uniform(0.005, 0.02))

    def _leaver(self, draw: random.Random) -> Outcome:
        """Leaves in the middle, politely or not; sometimes in the middle of its own request."""
        began, place = time.time(), urlsplit(self._address)
        document = self._document(draw, "chat")
        fields = {"messages": _question(document), "max_tokens": 400, "ignore_eos": True, "n": draw.choice([1, 2])}
        body = json.dumps({"model": "embedded", **fields, "stream": draw.random() < 0.5}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        with socket.create_connection((place.hostname or "", place.port or 80), timeout=TIMEOUT_S) as connection:
            whole = head.encode() + body
            connection.sendall(whole if draw.random() < 0.9 else whole[: len(whole) // 2])
            time.sleep(draw.uniform(0, 0.3))
            if draw.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return Outcome("leaver", began, time.time(), 0)

    def _wrong(self, draw: random.Random) -> Outcome:
        began = time.time()
        path, body, status = draw.choice(WRONG)
        reply = ask(self._address, path, {"model": "embedded", **body} if isinstance(body, dict) else body)
        problem = "" if reply.status == status else f"{path} {body!r:.100}: {reply.status} {reply.code}, not {status}"
        return Outcome("wrong", began, time.time(), reply.status, reply.code, problem)

    def _small(self, draw: random.Random) -> Outcome:
        began = time.time()
        body = {"model": "embedded", "prompt": draw.choice(SENTINELS), "return_pieces": True}
        reply = ask(self._address, "/tokenize", body)
        wrong = reply.status != 200 or reply.body["count"] != len(reply.body["pieces"])
        problem = f"/tokenize: {reply.status} {reply.code}" if wrong else ""
        return Outcome("small", began, time.time(), reply.status, reply.code, problem)


def _question(document: Document) -> list[dict[str, Any]]:
    """The conversation up to the turn that is to be written, without marks for training."""
    return [{key: value for key, value in each.items() if key != "weight"} for each in document.messages[:-1]]


def _invalid(schema: Any, text: str) -> str:
    try:
        Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        return f"{text!r:.200} is not valid: {error!s:.200}"
    return ""
