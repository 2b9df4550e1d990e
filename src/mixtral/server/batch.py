"""Files of requests: each line is answered as the HTTP interface would, in order, and a run that was killed goes on.

The same input on the same model gives the same files, byte for byte, however often the run was interrupted: ids and
seeds that a request leaves open are drawn from the input, ``created`` is 0, and nothing is said of the prefix cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from mixtral.errors import ConfigError, EngineError, MixtralError
from mixtral.server.app import build
from mixtral.server.config import ServerConfig
from mixtral.server.engine import Engine
from mixtral.server.errors import ApiError
from mixtral.server.grammars import Grammars

__all__ = ["LINES", "SIZE_BYTES", "BatchFiles", "run_batch"]

LINES, SIZE_BYTES = 50_000, 200 * 10**6
_ROUTES = ("/v1/chat/completions", "/v1/completions")
_LATER = frozenset({"server_overloaded", "queue_timeout"})  # the same line is sent again
_OVER = frozenset({"engine_dead", "engine_restarting", "model_loading", "server_shutting_down"})  # the run ends
_PAUSE_S = 0.5
_log = logging.getLogger("mixtral.server")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """Where requests come from, and where answers and errors go. Beside ``answers`` a file keeps track of a run."""

    requests: Path
    answers: Path
    errors: Path

    @property
    def state(self) -> Path:
        """Exists from the start of a run to its end: of which input and model the answers are."""
        return self.answers.with_name(f".{self.answers.name}.unfinished")


def run_batch(
    engine: Engine,
    files: BatchFiles,
    *,
    at_once: int = 64,
    limit_bytes: int = 4 * 2**20,
    on_line: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Answer all lines that are not answered yet; returns how many of all have an answer and how many an error.

    ``at_once`` requests are open at a time; ``on_line`` gets how many lines are done, of how many.

    Raises:
        ConfigError: ``at_once`` is below 1, the input is too large or not text, or the output belongs to another run.
        EngineError: the engine failed; what is done is kept, and the next run goes on from there.
        OSError: a file cannot be read or written.
    """
    if at_once < 1:
        raise ConfigError(f"{at_once} requests at once; expected 1 or more", param="max_num_seqs")
    return asyncio.run(_run(engine, files, at_once, limit_bytes, on_line))


async def _run(
    engine: Engine, files: BatchFiles, at_once: int, limit_bytes: int, on_line: Callable[[int, int], None]
) -> tuple[int, int]:
    lines, digest = _read(files.requests, limit_bytes)
    config = ServerConfig(
        queue_size=at_once,
        queue_tokens=2**31 - 1,
        queue_timeout_s=3600,
        request_timeout_s=86400,
        body_limit_bytes=limit_bytes,
    )
    app = build(engine, config, grammar=Grammars(engine))
    async with app.router.lifespan_context(app):
        await engine.until_ready()
        done = _prepare(files, {"input": digest, "engine": engine.fingerprint, "model": engine.name})
        work = _Work(app, digest, set())
        pending: deque[asyncio.Task[tuple[str, bytes, bool]]] = deque()
        counts = [sum(not failed for failed in done.values()), sum(done.values())]
        with files.answers.open("ab") as answers, files.errors.open("ab") as errors:
            source = enumerate(lines, 1)
            try:
                while True:
                    while len(pending) < at_once and (item := next(source, None)) is not None:
                        prepared = work.prepare(*item)
                        if prepared.id not in done:
                            pending.append(asyncio.create_task(work.answer(prepared)))
                    if not pending:
                        break
                    _, text, failed = await pending.popleft()
                    out = errors if failed else answers
                    out.write(text)
                    out.flush()
                    counts[failed] += 1
                    on_line(sum(counts), len(lines))
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
            for out in (answers, errors):
                os.fsync(out.fileno())
    files.state.unlink()
    return counts[0], counts[1]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One line: its id, and either a request to send or what is wrong with it."""

    id: str
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    problem: ApiError | None = None


class _Work:
    """Lines -> answers, over an application that is called without a network."""

    def __init__(self, app: ASGIApp, digest: str, seen: set[str]) -> None:
        self._app = app
        self._digest = digest
        self._seen = seen  # custom ids of earlier lines

    def prepare(self, number: int, line: bytes) -> _Prepared:
        """Check what belongs to the line itself; the body is left to the application."""
        id = f"batch_req_{hashlib.sha256(f'{self._digest} {number}'.encode()).hexdigest()[:24]}"
        try:
            read = msgspec.json.decode(line, type=_Line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            message = f"line {number} is no request of a batch ({error}); expected custom_id, method, url and body"
            return _Prepared(id, _custom_id(line), problem=ApiError(400, "invalid_json", message))
        problem = self._check(number, read)
        if problem is not None:
            return _Prepared(id, read.custom_id, problem=problem)
        self._seen.add(read.custom_id)
        return _Prepared(id, read.custom_id, read.url, _seeded(bytes(read.body), id))

    async def answer(self, line: _Prepared) -> tuple[str, bytes, bool]:
        """The id of a line, the line that answers it, and whether that is an error."""
        status, body = 400, {} if line.problem is None else line.problem.body()
        while line.problem is None:
            status, body = await _call(self._app, line)
            code = body.get("error", {}).get("code") if status >= 500 else None
            if code in _OVER:
                raise EngineError(f"the engine ended while it had {line.custom_id!r}; run the command again to go on")
            if code not in _LATER:
                break
            await asyncio.sleep(_PAUSE_S)
        failed = status != 200
        if not failed:
            _settle(body, line)
        response = {"status_code": status, "request_id": line.id, "body": body}
        data = {"id": line.id, "custom_id": line.custom_id, "response": response, "error": None}
        return line.id, json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n", failed

    def _check(self, number: int, line: _Line) -> ApiError | None:
        if line.custom_id in self._seen:
            message = f"line {number}: the custom_id was used by an earlier line; each line needs its own"
            return ApiError(400, "invalid_value", message, param="custom_id")
        if not 1 <= len(line.custom_id) <= 512:
            return ApiError(400, "invalid_value", "custom_id has no, or more than 512, characters", param="custom_id")
        if line.method != "POST":
            return ApiError(400, "invalid_value", "method is not 'POST', the only one there is", param="method")
        if line.url not in _ROUTES:
            return ApiError(400, "invalid_value", f"url is none of {' and '.join(_ROUTES)}", param="url")
        body = _object(bytes(line.body))
        if body is not None and body.get("stream"):
            message = "stream is not for batches: their answers are whole; leave it out"
            return ApiError(400, "unsupported_parameter", message, param="stream")
        return None


def _custom_id(line: bytes) -> str | None:
    """The custom_id of a line that is no request, if it can be found."""
    found = (_object(line) or {}).get("custom_id")
    return found if isinstance(found, str) else None


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the application says what is wrong
    return value if isinstance(value, dict) else None


def _seeded(body: bytes, id: str) -> bytes:
    """A body with a seed, drawn from the line's id if it has none."""
    fields = _object(body)
    if fields is None or fields.get("seed") is not None:
        return body
    seed = int.from_bytes(hashlib.sha256(id.encode()).digest()[:6])
    if "seed" in fields:
        return json.dumps({**fields, "seed": seed}).encode()
    # Put in as text, so that the application sees the rest as it was written.
    return body.rstrip()[:-1] + (b"," if fields else b"") + f'"seed":{seed}}}'.encode()


def _settle(body: dict[str, Any], line: _Prepared) -> None:
    """Take out of an answer what depends on when it was made."""
    body["id"] = f"{str(body['id']).partition('-')[0]}-{line.id.removeprefix('batch_req_')}"
    body["created"] = 0
    usage = body.get("usage")
    if isinstance(usage, dict):
        usage.pop("prompt_tokens_details", None)


async def _call(app: ASGIApp, line: _Prepared) -> tuple[int, dict[str, Any]]:
    """Status and body that the application answers to a request."""
    headers = {
        "host": "127.0.0.1",
        "content-type": "application/json",
        "content-length": f"{len(line.body)}",
        "x-request-id": line.id,
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "server": None,
        "client": None,
    }
    sent = False
    status, body = 500, b""
    stays = asyncio.Event()  # the client of a batch does not leave

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await stays.wait()
        sent = True
        return {"type": "http.request", "body": line.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, body
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            body += message.get("body", b"")

    await app(scope, receive, send)
    answer: dict[str, Any] = json.loads(body)
    return status, answer


def _read(path: Path, limit_bytes: int) -> tuple[list[bytes], str]:
    """The lines of the input that are not blank, and a digest of all of it."""
    size = path.stat().st_size
    if size > SIZE_BYTES:
        raise ConfigError(f"{path.name} has {size} bytes; expected at most {SIZE_BYTES}. Split it", param="requests")
    data = path.read_bytes()
    lines = [line for line in data.split(b"\n") if line.strip()]
    if not lines or len(lines) > LINES:
        raise ConfigError(f"{path.name} has {len(lines)} lines; expected 1 to {LINES}", param="requests")
    for number, line in enumerate(lines, 1):
        if len(line) > limit_bytes:
            raise ConfigError(
                f"{path.name}: line {number} has {len(line)} bytes; expected at most {limit_bytes}", param="requests"
            )
    return lines, hashlib.sha256(data).hexdigest()


def _prepare(files: BatchFiles, state: dict[str, str]) -> dict[str, bool]:
    """Begin a run, or go on with one; returns ids of the lines that are done, and whether each is an error."""
    if not files.state.exists():
        for path in (files.answers, files.errors):
            if path.exists() and path.stat().st_size:
                raise ConfigError(
                    f"{path} exists and belongs to no unfinished run; choose another name", param="answers"
                )
        partial = files.state.with_name(f"{files.state.name}.partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(files.state)
        return {}
    before = json.loads(files.state.read_text(encoding="utf-8"))
    if before != state:
        other = ", ".join(name for name in state if before.get(name) != state[name])
        raise ConfigError(
            f"{files.answers} was begun with another {other}; use the same, or delete it together with "
            f"{files.errors.name} and {files.state.name}",
            param="answers",
        )
    return dict([*_finished(files.answers, failed=False), *_finished(files.errors, failed=True)])


def _finished(path: Path, *, failed: bool) -> Iterator[tuple[str, bool]]:
    """Ids in an output file, which loses a last line that was not written completely."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        _log.warning("%s: the last line is incomplete; it is written again", path)
        with path.open("r+b") as file:
            file.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield json.loads(line)["id"], failed
        except (ValueError, KeyError, TypeError) as error:
            raise MixtralError(f"{path}: line {number} was not written by this command; delete the file") from error
