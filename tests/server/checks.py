"""What all tests of the server ask of an answer."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any
from urllib.parse import unquote

import httpx

# Nothing of this is for clients: addresses, files, tracebacks, names of classes.
LEAK = re.compile(
    r"Traceback|\bline \d+, in |\.py\b|\.safetensors|0x[0-9a-f]{6}|<class|object at |site-packages"
    r"|(?<![\w/])/(?:root|home|usr|tmp|work|proc|etc|var)/|\b[A-Za-z_]*(?:Error|Exception)\b|mixtral\.[a-z]+\."
)


def sent(response: httpx.Response) -> str:
    """What the client itself wrote, as far as it is known: that may be told again."""
    if response._request is None:
        return ""
    request = response.request
    known = [str(request.url), *request.headers.values()]
    with contextlib.suppress(httpx.RequestNotRead):
        known.append(request.content.decode("utf-8", "replace"))
    return unquote(" ".join(known))


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert (response.status_code, body["error"]["code"], body["error"]["param"]) == (status, code, param), body
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    assert body["error"]["type"] == kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    assert status not in (429, 503) or 1 <= int(response.headers["retry-after"]) <= 60
    assert body["error"]["message"]
    leaks = [leak.group() for leak in LEAK.finditer(response.text) if leak.group() not in sent(response)]
    assert not leaks, (leaks, response.text)
    assert len(response.content) <= 16 * 1024


def events(response: httpx.Response) -> list[Any]:
    """The data of all events of a stream, ``[DONE]`` as that string."""
    blocks = response.text.split("\n\n")
    if blocks.pop() != "":
        raise ValueError("the stream does not end with an empty line")
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]
