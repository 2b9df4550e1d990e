"""Requests made from the OpenAPI document: what fits it is never malformed, what does not fit it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fake import FakeEngine, FakeGrammar, listening
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from mixtral.server import ServerConfig
from mixtral.server.keys import KeyRing

SECRET = "sk-town-desk"
# What a request can do wrong although each of its fields is as it should be.
RULES = {"invalid_messages", "unsupported_combination", "context_length_exceeded", "request_exceeds_cache"}


@schemathesis.check
def accepts_what_fits(ctx: Any, response: Any, case: Any) -> None:
    """A body that fits the document is answered, or breaks a rule between its fields."""
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if not positive or response.status_code != 400:
        return
    error = json.loads(response.content)["error"]
    if error["code"] not in RULES and not (error["param"] or "").startswith("mixtral.routing"):
        raise AssertionError(f"{error['code']} at {error['param']}: {error['message']}")


@schemathesis.check
def says_no_more_than_it_should(ctx: Any, response: Any, case: Any) -> None:
    """Every error has the one shape, and nothing internal in it."""
    if response.status_code >= 400:
        error = json.loads(response.content)["error"]
        if sorted(error) != ["code", "message", "param", "type"]:
            raise AssertionError(f"the error has the members {sorted(error)}")
        for word in ("Traceback", "0x7f", ".py", "site-packages", SECRET):
            if word in error["message"]:
                raise AssertionError(f"{word!r} in the message {error['message']!r}")


def run(address: str, document: dict[str, Any], *, examples: int, only: str = "") -> tuple[int, list[str]]:
    """How many requests were sent, and what was found wrong with their answers."""
    config = SchemathesisConfig.from_dict(
        {
            "generation": {"mode": "all", "max-examples": examples, "deterministic": True, "database": "none"},
            "checks": {"positive_data_acceptance": {"enabled": False}},
            "phases": {"stateful": {"enabled": False}},
            "headers": {"authorization": f"Bearer {SECRET}"},
            "base-url": address,
            "continue-on-failure": True,
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    if only:
        schema = schema.include(path=only)
    cases, found = 0, []
    for event in from_schema(schema).execute():
        if isinstance(event, NonFatalError | FatalError):
            found.append(repr(event.value if isinstance(event, NonFatalError) else event.exception))
        if isinstance(event, ScenarioFinished):
            cases += len(event.recorder.interactions)
            for id, checks in event.recorder.checks.items():
                for check in checks:
                    if check.failure_info is not None:
                        body = event.recorder.cases[id].value.body
                        found.append(f"{event.label}: {check.name}: {check.failure_info.failure}: {body!r}"[:1500])
    return cases, found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    engine = FakeEngine("Yes.")
    engine.context = 4096
    with listening(engine, ServerConfig(port=0, keys=KeyRing.of([SECRET])), FakeGrammar()) as found:
        yield found


@pytest.fixture
def document(address: str) -> dict[str, Any]:
    answer = httpx.get(f"{address}/openapi.json", headers={"authorization": f"Bearer {SECRET}"})
    found: dict[str, Any] = answer.json()
    return found


def test_the_document_and_the_server_agree(address: str, document: dict[str, Any]) -> None:
    cases, found = run(address, document, examples=15)
    assert found == []
    assert cases > 1000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_document_and_the_server_agree_at_length(address: str, document: dict[str, Any]) -> None:
    cases, found = run(address, document, examples=600)
    assert found == []
    assert cases > 5000


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("temperature", {"type": "number", "minimum": 0, "maximum": 3}),  # promises more than is accepted
        ("top_p", {"type": "number", "minimum": 0, "maximum": 0.5}),  # less
        ("seed", {"type": ["integer", "string"]}),
        ("stream_options", {"type": "object"}),
    ],
)
def test_a_document_that_lies_is_found_out(
    address: str, document: dict[str, Any], field: str, lie: dict[str, Any]
) -> None:
    path = "/v1/completions"
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"] = {name: body["properties"][name] for name in ("model", "prompt")} | {field: lie}
    assert run(address, document, examples=60, only=path)[1]
