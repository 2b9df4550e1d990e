"""One table of limits: validation, OpenAPI document, sampling parameters and documents agree with it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from mixtral.limits import CHAT, COMPLETIONS, PARTS, REFUSED, ROUTES, Limit
from mixtral.server.openapi import document
from mixtral.wire.sampling import _RANGES

ROOT = Path(__file__).resolve().parent.parent
script = runpy.run_path(str(ROOT / "scripts" / "limits.py"))


class Described:
    """What the document needs to know of an engine."""

    name, context, cache_tokens, vocab_size, layers, experts, fingerprint = "m", 4096, 4096, 32768, 4, 8, "fp"
    adapters = ("town",)


def fields(path: str) -> dict[str, Any]:
    found = document(Described(), keys=False)["paths"][path]["post"]["requestBody"]["content"]["application/json"]  # type: ignore[arg-type]
    properties: dict[str, Any] = found["schema"].get("properties") or found["schema"]["anyOf"][0]["properties"]
    return properties


def test_the_documents_show_the_table() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page == script["render"](page), "run: python scripts/limits.py"
    for name in {*CHAT, *COMPLETIONS, *PARTS, *REFUSED}:
        assert f"`{name}`" in page


@pytest.mark.parametrize("path", ROUTES)
def test_the_document_has_the_fields_of_the_table(path: str) -> None:
    assert fields(path).keys() == ROUTES[path].keys() | REFUSED.keys()


@pytest.mark.parametrize(
    ("path", "name", "limit"),
    [
        (path, name, limit)
        for path, limits in ROUTES.items()
        for name, limit in limits.items()
        if limit.kind in ("integer", "number")
        or (limit.kind == "string" and not limit.values and name not in ("model", "prompt"))
    ],
)
def test_the_document_has_the_bounds_of_the_table(path: str, name: str, limit: Limit) -> None:
    schema, null = fields(path)[name]["anyOf"] if not limit.required else (fields(path)[name], {"type": "null"})
    assert null == {"type": "null"}
    low, high = ("minLength", "maxLength") if limit.kind == "string" else ("minimum", "maximum")
    assert (schema["type"], schema.get(low), schema.get(high)) == (limit.kind, limit.low, limit.high)


def test_sampling_parameters_have_the_bounds_of_the_table() -> None:
    for limits in (CHAT, COMPLETIONS):
        for name in limits.keys() & _RANGES.keys():
            limit, (low, high) = limits[name], _RANGES[name]
            if limit.kind == "boolean":
                continue
            # -1 is 0 for top_k, and fewer alternatives are offered in completions.
            assert max(limit.low or 0, 0 if name == "top_k" else -(2**63)) >= low, name
            assert (limit.high or 0) <= high, name
            if limit.kind == "number":
                assert (limit.low, limit.high) == (low, high)
