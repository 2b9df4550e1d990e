"""Requests made from the OpenAPI document: what fits it is never malformed, what does not fit it is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
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
WHOLE = re.compile(r" is -?[0-9.e+]+; expected (an integer|a token id|the number of a layer)")
RULES = {"invalid_messages", "unsupported_combination", "context_length_exceeded", "request_exceeds_cache"}


def is_positive(case: Any) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    """Most bodies that fit the document break a rule between two fields; of these only a part is sent as it is."""
    if is_positive(case) and isinstance(case.body, dict) and len(json.dumps(case.body)) % 4:
        case.body = repaired(case.body)


def repaired(body: dict[str, Any]) -> dict[str, Any]:
    """The same with fields that go together."""
    made = dict(body)
    talks = isinstance(made.get("messages"), list)
    if talks:
        said = [each for each in made["messages"] if each.get("role") in ("user", "system", "developer")]
        made["messages"] = [*said[:20], {"role": "user", "content": "Hello"}]
    if isinstance(made.get("tools"), list):
        made["tools"] = list({tool["function"]["name"]: tool for tool in made["tools"]}.values())
    if isinstance(made.get("prompt"), list) and isinstance(made["prompt"][0], int):
        made["prompt"] = made["prompt"][:3000]
    if made.get("top_logprobs") is not None:
        made["logprobs"] = True
    if made.get("stream_options") is not None:
        made["stream"] = True
    if made.get("echo"):
        made["stream"], made["stream_options"] = False, None
    formed = (made.get("response_format") or {}).get("type", "text") != "text"
    for name, dropped in {
        "max_completion_tokens": True,
        "best_of": True,
        "tool_choice": made.get("tool_choice") not in (None, "auto", "none"),
        "min_tokens": True,
        "ignore_eos": formed or bool(made.get("tools")),
        "stop": formed,
    }.items():
        if dropped:
            made.pop(name, None)
    for name, most in (("max_tokens", 50), ("n", 1 if isinstance(made.get("prompt"), list) else 3)):
        if isinstance(made.get(name), int):
            made[name] = max(min(made[name], most), 1)
    return made


@schemathesis.check
def accepts_what_fits(ctx: Any, response: Any, case: Any) -> None:
    """A body that fits the document is answered, or breaks a rule between its fields."""
    if not is_positive(case) or response.status_code != 400:
        return
    error = json.loads(response.content)["error"]
    # To JSON Schema 3.0 is an integer, to this server it is not.
    if error["code"] == "invalid_type" and WHOLE.search(error["message"]):
        return
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


def run(
    address: str, document: dict[str, Any], *, examples: int, coverage: bool = False, only: str = ""
) -> tuple[Counter[int], list[str]]:
    """Answers by status, and what was found wrong with them."""
    refusals = ["400", "401", "403", "404", "405", "413", "415"]
    config = SchemathesisConfig.from_dict(
        {
            "generation": {"mode": "all", "max-examples": examples, "deterministic": True, "database": "none"},
            "checks": {
                "positive_data_acceptance": {"enabled": False},
                "negative_data_rejection": {"expected-statuses": refusals},
            },
            "phases": {"stateful": {"enabled": False}, "coverage": {"enabled": coverage}},
            "auth": {"openapi": {"key": {"bearer": SECRET}}},
            "base-url": address,
            "continue-on-failure": True,
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    if only:
        schema = schema.include(path=only)
    answers, found = Counter[int](), list[str]()
    for event in from_schema(schema).execute():
        if isinstance(event, NonFatalError | FatalError):
            found.append(repr(event.value if isinstance(event, NonFatalError) else event.exception))
        if isinstance(event, ScenarioFinished):
            answers.update(each.response.status_code for each in event.recorder.interactions.values() if each.response)
            for id, checks in event.recorder.checks.items():
                for check in checks:
                    if check.failure_info is not None:
                        body = event.recorder.cases[id].value.body
                        found.append(f"{event.label}: {check.name}: {check.failure_info.failure}: {body!r}"[:1500])
    return answers, found


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


PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", [*PATHS, "/v1/models/{name}"])
def test_the_document_and_the_server_agree(address: str, document: dict[str, Any], path: str) -> None:
    answers, found = run(address, document, examples=5 if "chat" in path else 10, only=path)
    assert found == []
    if "chat" in path:  # so few examples may all be of one kind; the long test has many
        assert answers[200] + answers[400] >= 1
    else:
        assert answers[200] >= 1
        assert answers[400] >= 1 or path not in PATHS


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", [*PATHS, ""])
def test_the_document_and_the_server_agree_at_length(address: str, document: dict[str, Any], path: str) -> None:
    if not path:
        for each in PATHS:
            del document["paths"][each]
    answers, found = run(address, document, examples=500, coverage=True, only=path)
    assert found == []
    assert answers[200] >= 100
    assert answers[400] >= 100 or not path


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("temperature", {"type": "number", "minimum": 0, "maximum": 3}),  # promises more than is accepted
        ("top_p", {"type": "number", "minimum": 0, "maximum": 0.5}),  # promises less
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
    assert run(address, document, examples=10, coverage=True, only=path)[1]
