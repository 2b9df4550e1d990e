"""A server for tests of the chat page: the page's own files, and an API that answers with what it was told to answer.

It speaks the documented stream: log-probabilities, function calls, usage, routing and errors. Run as a program it
serves a few answers to look at: python tests/server/pagefake.py [PORT]
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import re
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mixtral.server.app import _FILES, _PAGE, _PAGE_HEADERS

LAYERS, EXPERTS, CHOSEN = 4, 8, 2
PROMPT_TOKENS = 21


@dataclass(frozen=True)
class Reply:
    """One answer: ``text``, or function ``calls`` as (name, arguments).

    After ``fails_after`` tokens the stream ends with ``error``; with ``status`` it is the whole answer. ``finish`` is
    "stop" or "tool_calls" if it is not given. The stream waits at token ``waits_at`` until ``PageServer.go`` is set.
    """

    text: str = "Breakfast is from 07:00 to 10:30."
    calls: Sequence[tuple[str, str]] = ()
    finish: str | None = None
    delay_s: float = 0.0
    waits_at: int | None = None
    fails_after: int | None = None
    status: int | None = None
    error: dict[str, Any] = field(
        default_factory=lambda: {"message": "it broke", "type": "server_error", "param": None, "code": "internal_error"}
    )


def tokens_of(text: str) -> list[str]:
    """Pieces of at most five characters that begin at spaces, as a tokenizer would make them."""
    return re.findall(r"\s?[^\s]{1,4}|\s", text)


def experts_of(position: int) -> list[list[tuple[int, float]]]:
    """Expert and weight, the larger weight first, for each layer at one position."""
    draw = random.Random(position)
    made = []
    for layer in range(LAYERS):
        first, second = draw.sample(range(EXPERTS), 2)
        if draw.random() < 0.4:
            first, second = layer + 2, layer
        share = round(draw.uniform(0.5, 0.95), 2)
        made.append([(first, share), (second, 1 - share)])
    return made


def routing(first: int, count: int) -> dict[str, Any]:
    """The routing data of ``count`` tokens from position ``first`` on."""
    chosen = [pair for position in range(first, first + count) for row in experts_of(position) for pair in row]
    return {
        "choice": 0,
        "first": first,
        "shape": [count, LAYERS, CHOSEN],
        "experts": base64.b64encode(bytes(expert for expert, _ in chosen)).decode(),
        "weights": base64.b64encode(struct.pack(f"<{len(chosen)}e", *(weight for _, weight in chosen))).decode(),
        "layers": list(range(LAYERS)),
    }


class PageServer:
    """What it was asked (``bodies``, ``keys``), and what it answers: ``replies`` in turn, the last one again and again.

    ``refuses`` are fields that are a 400. With ``key`` every API route needs it.
    """

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies or [Reply()])
        self.models = [{"id": "fake", "parent": None, "max_model_len": 8192}]
        self.refuses: set[str] = set()
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.left = 0  # streams that their client left

    def app(self) -> Starlette:
        """The page and the two API routes that it uses."""
        files = [Route(path, self._file(name, kind)) for path, (name, kind) in _FILES.items()]
        api = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(routes=[*files, *api])

    def _file(self, name: str, kind: str) -> Any:
        async def handler(request: Request) -> Response:
            headers = {**_PAGE_HEADERS, "cache-control": "no-store", "x-content-type-options": "nosniff"}
            return Response((_PAGE / name).read_bytes(), media_type=kind, headers=headers)

        return handler

    def _refusal(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, {"message": "missing or wrong key", "code": "invalid_api_key", "param": None})
        return None

    async def _models(self, request: Request) -> Response:
        described = [{"object": "model", "created": 1, "owned_by": "mixtral", **model} for model in self.models]
        return self._refusal(request) or JSONResponse({"object": "list", "data": described})

    async def _chat(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        body = await request.json()
        for name in self.refuses & set(body):
            message = f"{name} is not supported by this server; remove it"
            return _error(400, {"message": message, "code": "unsupported_parameter", "param": name})
        self.bodies.append(body)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if reply.status is not None:
            return _error(reply.status, reply.error)
        headers = {"x-mixtral-seed": str(body.get("seed", 123456)), "x-request-id": "req-1"}
        return StreamingResponse(self._stream(body, reply), media_type="text/event-stream", headers=headers)

    async def _stream(self, body: dict[str, Any], reply: Reply) -> AsyncIterator[str]:
        done = False
        try:
            async for data in self._events(body, reply):
                yield f"data: {json.dumps(data)}\n\n"
            if reply.fails_after is None:
                yield "data: [DONE]\n\n"
            done = True
        finally:
            self.left += not done

    async def _events(self, body: dict[str, Any], reply: Reply) -> AsyncIterator[dict[str, Any]]:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        deltas = list(_deltas(reply))
        limit = body.get("max_tokens", len(deltas))

        def event(delta: dict[str, Any], *, finish: str | None = None, **more: Any) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": finish}
            return {**head, "choices": [choice], "usage": None, **more}

        yield event({"role": "assistant", "content": ""})
        for place, (delta, token) in enumerate(deltas[:limit]):
            await asyncio.sleep(reply.delay_s)
            while place == reply.waits_at and not self.go.is_set():
                await asyncio.sleep(0.005)
            if place == reply.fails_after:
                yield {"error": reply.error}
                return
            more: dict[str, Any] = {}
            if "mixtral" in body and place > 0:
                more["mixtral"] = {"routing": [routing(PROMPT_TOKENS + place - 1, 1)]}
            yield event(delta, logprobs=_logprobs(token) if body.get("logprobs") else None, **more)
        finish = reply.finish or ("tool_calls" if reply.calls else "stop")
        finish = "length" if len(deltas) > limit else finish
        # The end token was made from the last token of the answer; after a cut nothing was.
        computed = deltas and finish != "length" and "mixtral" in body
        last = {"mixtral": {"routing": [routing(PROMPT_TOKENS + len(deltas) - 1, 1)]}} if computed else {}
        yield event({}, finish=finish, **last)
        counts = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(deltas[:limit]) + 1}
        cached = {"prompt_tokens_details": {"cached_tokens": 16}}
        yield {**head, "choices": [], "usage": {**counts, "total_tokens": sum(counts.values()), **cached}}


def _deltas(reply: Reply) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each token of an answer: its delta, and its text, which the control token before calls lacks."""
    if not reply.calls:
        yield from (({"content": token}, token) for token in tokens_of(reply.text))
        return
    yield {}, None
    for place, (name, arguments) in enumerate(reply.calls):
        head = {
            "index": place,
            "id": f"call{place:05}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        yield {"tool_calls": [head]}, name
        for token in tokens_of(arguments):
            yield {"tool_calls": [{"index": place, "function": {"arguments": token}}]}, token


def _logprobs(token: str | None) -> dict[str, Any] | None:
    if token is None:
        return None
    return {"content": [{"token": token, "bytes": list(token.encode()), "logprob": -0.25, "top_logprobs": []}]}


def _error(status: int, error: dict[str, Any]) -> Response:
    headers = {"x-request-id": "req-1", **({"retry-after": "7"} if status == 503 else {})}
    return JSONResponse({"error": {"type": "invalid_request_error", **error}}, status_code=status, headers=headers)


@contextlib.contextmanager
def serving(server: PageServer, port: int = 0) -> Iterator[str]:
    """The server on a loopback port, in a thread; gives its address."""
    config = uvicorn.Config(server.app(), port=port, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    listener = uvicorn.Server(config)
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        while not listener.started:
            if not thread.is_alive():
                raise RuntimeError("the page server did not start")
            time.sleep(0.005)
        bound = listener.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{bound}/"
    finally:
        server.go.set()
        listener.should_exit = True
        thread.join(timeout=60)


SHOWN = """Breakfast is served **every day** in the garden room.

| Day | From | Until |
|:----|-----:|------:|
| Monday to Friday | 07:00 | 10:30 |
| Weekend | 07:30 | 11:00 |

1. Tell the desk the evening before.
2. Choose *one* of the menus:
   - continental
   - vegetarian

> Tea and coffee are free all day.

```python
def breakfast(day: str) -> str:
    return "07:30" if day in ("Saturday", "Sunday") else "07:00"
```
"""


def main() -> None:
    """Serve answers to look at until the process is ended."""
    call = Reply(calls=[("get_hours", '{"place": "Castle", "day": "Monday"}')], delay_s=0.02)
    server = PageServer(Reply(SHOWN, delay_s=0.02), call, Reply("The Castle is open from 9 to 17.", delay_s=0.02))
    server.replies = server.replies * 1000
    with serving(server, int(sys.argv[1]) if len(sys.argv) > 1 else 8001) as address:
        print(address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
