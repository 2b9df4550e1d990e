"""What all tests of the server ask of an answer."""

from __future__ import annotations

import json
from typing import Any

import httpx


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
    assert len(response.content) <= 16 * 1024


def events(response: httpx.Response) -> list[Any]:
    """The data of all events of a stream, ``[DONE]`` as that string."""
    blocks = response.text.split("\n\n")
    if blocks.pop() != "":
        raise ValueError("the stream does not end with an empty line")
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]
