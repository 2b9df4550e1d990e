"""The API's routes. Each reads a request, checks it, and answers; everything that goes wrong is raised."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mixtral.grammar import Source
from mixtral.server.admission import Admission
from mixtral.server.body import INLINE_BYTES, Room, read_body
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.formats import Grammar
from mixtral.server.keys import holder_of
from mixtral.server.openapi import document
from mixtral.server.reading import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, check_model, read
from mixtral.server.sse import EventStream, Whole, unless_gone
from mixtral.server.texts import Texts
from mixtral.server.work import Prepared, begin, collect, stream

__all__ = ["UNSUPPORTED", "Routes"]

_log = logging.getLogger("mixtral.server")
_BODIES = 16  # of the largest size, that may be in memory at once
# OpenAI routes that are not here, and why.
UNSUPPORTED: Mapping[str, str] = {
    "/v1/embeddings": "the model has no embedding head",
    "/v1/responses": f"conversations are not stored; use {CHAT}",
    "/v1/assistants": f"conversations are not stored; use {CHAT}",
    "/v1/threads": f"conversations are not stored; use {CHAT}",
    "/v1/files": "nothing is uploaded; use the command mixtral batch with local files",
    "/v1/batches": "nothing is uploaded; use the command mixtral batch with local files",
    "/v1/fine_tuning": "models are trained by command, not over HTTP",
    "/v1/audio": "Mixtral reads and writes text only",
    "/v1/images": "Mixtral reads and writes text only",
    "/v1/moderations": "there is no moderation model",
}


class Routes:
    """The handlers of one server; ``table`` lists method, path and handler."""

    def __init__(self, engine: Engine, config: ServerConfig, grammar: Grammar | None) -> None:
        self._engine = engine
        self._door = Admission(engine, config)
        self._config = config
        self._grammar = grammar
        self._created = int(time.time())
        # Reading a request may take long; the event loop never waits for it.
        self._room = Room(_BODIES * config.body_limit_bytes)
        self._texts = Texts(config, grammar=grammar is not None)
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="mixtral-text")
        self._trials = ThreadPoolExecutor(max_workers=16, thread_name_prefix="mixtral-trial")
        self._document: dict[str, Any] | None = None  # made when it is asked for: the model must be known

    def table(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """All API routes."""
        return [
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", CHAT, self.chat),
            ("POST", COMPLETIONS, self.completions),
            ("POST", TOKENIZE, self.tokenize),
            ("POST", DETOKENIZE, self.detokenize),
            ("GET", "/tokenizer_info", self.tokenizer_info),
        ]

    def close(self) -> None:
        """End the threads."""
        for pool in (self._threads, self._trials):
            pool.shutdown(wait=False, cancel_futures=True)
        self._texts.close()
        if self._grammar is not None:
            self._grammar.close()

    async def openapi(self) -> Response:
        """This interface as an OpenAPI document."""
        if self._document is None:
            self._document = document(self._engine, keys=self._config.keys is not None)
        return JSONResponse(self._document)

    async def models(self) -> Response:
        """All models."""
        return JSONResponse({"object": "list", "data": list(self._models().values())})

    async def model(self, name: str) -> Response:
        """One model by its name; 404 for any other."""
        check_model(name, self._engine)
        return JSONResponse(self._models()[name])

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        return await self._answer(request, CHAT)

    async def completions(self, request: Request) -> Response:
        """Continuations of raw prompts."""
        return await self._answer(request, COMPLETIONS)

    async def tokenize(self, request: Request) -> Response:
        """Ids of a text or a conversation."""
        return await self._answer(request, TOKENIZE)

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        return await self._answer(request, DETOKENIZE)

    async def tokenizer_info(self) -> Response:
        """What a program must know to use ``/tokenize`` as its tokenizer.

        Control tokens have ids but no text: the tokens of a text that spells one are ordinary ones.
        """
        tokenizer = self._engine.tokenizer
        facts = {"version": tokenizer.version, "vocab_size": tokenizer.vocab_size}
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return JSONResponse(facts | ids | {"bos_token": None, "eos_token": None, "chat_template": None})

    def _try(self, grammar: Grammar, source: Source) -> None:
        began = time.monotonic()
        try:
            grammar.check(source)
        finally:
            self._engine.metrics.grammar(time.monotonic() - began, grammar.cache_bytes)

    async def _answer(self, request: Request, route: str) -> Response:
        holder = holder_of(request.scope)
        with self._room.share() as take:
            body = await read_body(request, self._config, take)
            found = await self._read(route, body, "" if holder is None else holder.name)
            del body
        if isinstance(found, bytes):
            return Whole(found, self._config)
        for source in found.sources:
            if self._grammar is not None:
                # Not among the threads for texts: others shall not wait for grammars that are slow to try.
                await asyncio.get_running_loop().run_in_executor(self._trials, self._try, self._grammar, source)
        for user in found.users:
            digest = hashlib.sha256(user.encode()).hexdigest()[:16]
            _log.info("request %s: user %s", request.scope.get("mixtral.request_id"), digest)
        work = begin(self._engine, found)
        headers = {"x-mixtral-seed": str(work.submit.params.seed)}
        if holder is not None:
            work.charge = holder.charge
        if found.stream:
            return EventStream(stream(self._door, work), self._config, headers)
        answer = await unless_gone(request.receive, collect(self._door, work))
        return Whole(bytes(JSONResponse(answer).body), self._config, headers)

    async def _read(self, route: str, body: bytes, holder: str) -> Prepared | bytes:
        if len(body) > INLINE_BYTES:
            return await self._texts.read(route, self._engine, body, holder)
        call = asyncio.get_running_loop().run_in_executor
        return await call(self._threads, read, route, self._engine, body, holder, self._grammar)

    def _models(self) -> dict[str, dict[str, Any]]:
        """Name -> description of the base, and of each adapter, whose ``parent`` is the base."""
        base = self._engine.name
        roots = {base: base} | {name: adapter.root for name, adapter in self._engine.adapters.items()}
        return {
            name: {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "mixtral",
                "root": root,
                "parent": None if name == base else base,
                "max_model_len": self._engine.context,
            }
            for name, root in roots.items()
        }
