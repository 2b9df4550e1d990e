"""The API's routes. Each reads a request, checks it, and answers; everything that goes wrong is raised."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mixtral.server.admission import Admission
from mixtral.server.body import read_json
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.errors import ApiError, show
from mixtral.server.formats import Grammar, Source
from mixtral.server.keys import holder_of
from mixtral.server.openapi import document
from mixtral.server.protocol import (
    Options,
    TokenizeRequest,
    read_chat,
    read_completion,
    read_detokenize,
    read_tokenize,
)
from mixtral.server.sse import EventStream, unless_gone
from mixtral.server.work import Work, collect, prepare_chat, prepare_completion, stream
from mixtral.tokenizer import encode_chat

__all__ = ["UNSUPPORTED", "Routes"]

T = TypeVar("T")

_log = logging.getLogger("mixtral.server")
_CHAT = "/v1/chat/completions"
# OpenAI routes that are not here, and why.
UNSUPPORTED: Mapping[str, str] = {
    "/v1/embeddings": "the model has no embedding head",
    "/v1/responses": f"conversations are not stored; use {_CHAT}",
    "/v1/assistants": f"conversations are not stored; use {_CHAT}",
    "/v1/threads": f"conversations are not stored; use {_CHAT}",
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
        # Preparing a request may take long; the event loop never waits for it.
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="mixtral-text")
        self._trials = ThreadPoolExecutor(max_workers=16, thread_name_prefix="mixtral-trial")
        self._document: dict[str, Any] | None = None  # made when it is asked for: the model must be known

    def table(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """All API routes."""
        return [
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", _CHAT, self.chat),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/tokenizer_info", self.tokenizer_info),
        ]

    def close(self) -> None:
        """End the threads."""
        for pool in (self._threads, self._trials):
            pool.shutdown(wait=False, cancel_futures=True)
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
        return JSONResponse(self._find_model(name))

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        return await self._answer(request, self._chat)

    async def completions(self, request: Request) -> Response:
        """Continuations of raw prompts."""
        return await self._answer(request, self._completion)

    async def tokenize(self, request: Request) -> Response:
        """Ids of a text or a conversation."""
        wanted = read_tokenize(await read_json(request, self._config))
        if wanted.model is not None:
            self._find_model(wanted.model)
        return JSONResponse(await self._in_thread(lambda: self._tokenized(wanted)))

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        body = await read_json(request, self._config)
        name, ids = read_detokenize(body, vocab_size=self._engine.vocab_size)
        if name is not None:
            self._find_model(name)
        return JSONResponse({"prompt": await self._in_thread(lambda: self._engine.tokenizer.decode(ids))})

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

    async def _answer(
        self, request: Request, prepare: Callable[[dict[str, Any], str], tuple[Work, Options]]
    ) -> Response:
        body = await read_json(request, self._config)
        holder = holder_of(request.scope)
        work, options = await self._in_thread(lambda: prepare(body, "" if holder is None else holder.name))
        for source in work.sources:
            if self._grammar is not None:
                # Not among the threads for texts: others shall not wait for grammars that are slow to try.
                await asyncio.get_running_loop().run_in_executor(self._trials, self._try, self._grammar, source)
        for user in options.users:
            digest = hashlib.sha256(user.encode()).hexdigest()[:16]
            _log.info("request %s: user %s", request.scope.get("mixtral.request_id"), digest)
        headers = {"x-mixtral-seed": str(work.submit.params.seed)}
        if holder is not None:
            work.charge = holder.charge
        if options.stream:
            return EventStream(stream(self._door, work), self._config, headers)
        return JSONResponse(await unless_gone(request.receive, collect(self._door, work)), headers=headers)

    def _chat(self, body: dict[str, Any], holder: str) -> tuple[Work, Options]:
        engine = self._engine
        wanted = read_chat(body, vocab_size=engine.vocab_size, layers=engine.layers)
        self._find_model(wanted.options.model)
        return prepare_chat(engine, wanted, self._grammar, _scope(holder, wanted.options)), wanted.options

    def _completion(self, body: dict[str, Any], holder: str) -> tuple[Work, Options]:
        engine = self._engine
        wanted = read_completion(body, vocab_size=engine.vocab_size, layers=engine.layers)
        self._find_model(wanted.options.model)
        return prepare_completion(engine, wanted, self._grammar, _scope(holder, wanted.options)), wanted.options

    def _tokenized(self, wanted: TokenizeRequest) -> dict[str, Any]:
        tokenizer = self._engine.tokenizer
        if wanted.messages is None:
            ids = tokenizer.encode(wanted.prompt, bos=wanted.bos)
        else:
            ids = encode_chat(tokenizer, wanted.messages, wanted.tools or None).ids
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": self._engine.context}
        return answer | ({"pieces": [tokenizer.piece(id) for id in ids]} if wanted.pieces else {})

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _find_model(self, name: str) -> dict[str, Any]:
        models = self._models()
        if name not in models:
            message = f"there is no model {show(name)}; this server has {', '.join(map(repr, models))}"
            raise ApiError(404, "model_not_found", message, param="model")
        return models[name]

    def _models(self) -> dict[str, dict[str, Any]]:
        """Name -> description of the base model; an adapter's ``parent`` would be its name."""
        description = {
            "id": self._engine.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mixtral",
            "parent": None,
            "max_model_len": self._engine.context,
        }
        return {self._engine.name: description}


def _scope(holder: str, options: Options) -> str:
    """Whose cached prefixes a request may use: those of the same key, model and ``prompt_cache_key``."""
    parts = "\x1f".join((holder, options.model, options.cache_key))
    return hashlib.sha256(parts.encode()).hexdigest()
