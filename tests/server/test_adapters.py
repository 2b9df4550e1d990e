"""Adapters that requests choose by the name of the model: the interface alone, and a real server with two of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from adapting import factors_of
from checks import check_error, events
from command import served
from fake import FakeEngine
from serving import children, until

import mixtral
from mixtral.adapters.peft import write_adapter
from mixtral.cli import main
from mixtral.evaluate.divergence import compare
from mixtral.server.client import Quarantine
from mixtral.wire import AdapterInfo, SamplingParams, Submit

Call = Callable[..., httpx.Response]


@pytest.fixture
def adapted(engine: FakeEngine) -> FakeEngine:
    engine.adapters = {
        "town": AdapterInfo(root="town-lora", size_bytes=10),
        "poems.2": AdapterInfo(root="poems", size_bytes=20),
    }
    return engine


def test_models_are_the_base_and_its_adapters(adapted: FakeEngine, send: Call) -> None:
    listed = send("GET", "/v1/models").json()["data"]
    assert [(one["id"], one["root"], one["parent"]) for one in listed] == [
        ("fake", "fake", None),
        ("town", "town-lora", "fake"),
        ("poems.2", "poems", "fake"),
    ]
    for one in listed:
        # Each call has a server of its own, which may have begun a second later.
        assert send("GET", f"/v1/models/{one['id']}").json() | {"created": one["created"]} == one
    document = send("GET", "/openapi.json").json()
    schema = document["paths"]["/v1/models/{name}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    for one in listed:
        jsonschema.validate(one, schema)
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["model"] == {"enum": ["fake", "town", "poems.2"]}


@pytest.mark.parametrize(
    "padding", [0, pytest.param(70_000, marks=pytest.mark.slow)], ids=["short", "read in another process"]
)
def test_the_name_of_the_model_chooses(adapted: FakeEngine, send: Call, padding: int) -> None:
    models = ("town",) if padding else ("fake", "town", "poems.2")  # a process takes long to start
    for model in models:
        body = json.dumps({"model": model, "prompt": "Once", "max_tokens": 4}) + " " * padding
        answer = send("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.json()["model"] == model
        assert adapted.submits[-1].adapter == (None if model == "fake" else model)
    assert len({submit.scope for submit in adapted.submits}) == len(models)
    body = json.dumps({"model": "poems", "prompt": "Once"}) + " " * padding
    answer = send("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    check_error(answer, 404, "model_not_found", "model")
    assert "'poems'; this server has 'fake', 'town', 'poems.2'" in answer.json()["error"]["message"]


def test_streams_and_texts_know_the_names_too(adapted: FakeEngine, send: Call, chat: Call) -> None:
    streamed = events(chat(model="town", stream=True))
    assert {event["model"] for event in streamed[:-1]} == {"town"}
    assert adapted.submits[-1].adapter == "town"
    assert send("POST", "/tokenize", json={"model": "town", "prompt": "a"}).status_code == 200
    assert send("POST", "/detokenize", json={"model": "poems.2", "tokens": [5]}).status_code == 200
    check_error(send("POST", "/tokenize", json={"model": "x", "prompt": "a"}), 404, "model_not_found", "model")


def test_of_many_names_an_error_lists_some(engine: FakeEngine, chat: Call) -> None:
    engine.adapters = {f"a{number}": AdapterInfo(root="a", size_bytes=1) for number in range(50)}
    message = chat(model="x").json()["error"]["message"]
    assert message.endswith("'a5', 'a6' and 43 more, see /v1/models")


def test_the_same_prompt_for_another_adapter_is_another_request() -> None:
    one = Submit(request="a", prompts=[[1]], params=SamplingParams())
    other = Submit(request="b", prompts=[[1]], params=SamplingParams(), adapter="town")
    assert Quarantine.key(one) != Quarantine.key(other)


# --- the real thing ---------------------------------------------------------------------------------------------------

TEXTS = ["When does breakfast start?", "Where is the castle?", "Ich suche ein Zimmer mit Balkon.", "Quanto costa?"]
MODELS = ("embedded", "town", "poems")
SETTINGS = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the embedded model: one of everything but the router, one of attention."""
    folder = tmp_path_factory.mktemp("adapters")
    config = mixtral.load("embedded").config
    write_adapter(folder / "town-lora", config, factors_of(config, seed=1, size=0.1, rank=4))
    write_adapter(folder / "poems", config, factors_of(config, seed=2, size=0.3, rank=8, targets=("q", "v", "o")))
    return folder


@pytest.fixture(scope="module")
def options(home: Path) -> list[str]:
    return ["--adapter", f"town={home / 'town-lora'}", "--adapter", f"poems={home / 'poems'}"]


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[tuple[str, str], str]:
    """What each model answers alone, the base without any adapters."""
    base = mixtral.load("embedded")
    llm = mixtral.load("embedded", adapters={"town": home / "town-lora", "poems": home / "poems"})
    found = {}
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        found["embedded", text] = base.chat(messages, **SETTINGS).content
        for name in ("town", "poems"):
            found[name, text] = llm.chat(messages, adapter=name, **SETTINGS).content
    return found


def ask(address: str, model: str, text: str, **fields: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **SETTINGS, **fields}
    answer = httpx.post(address + "/v1/chat/completions", json=body, timeout=100).json()
    assert answer.get("model") == model, answer
    return str(answer["choices"][0]["message"]["content"])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=64) as found:
        yield found


@pytest.mark.slow
def test_two_adapters_and_the_base_are_served_together(
    options: list[str], expected: dict[tuple[str, str], str], pool: ThreadPoolExecutor
) -> None:
    assert len(set(expected.values())) > 2 * len(TEXTS)
    with served(*options) as server:
        listed = httpx.get(server.address + "/v1/models").json()["data"]
        assert [(one["id"], one["root"], one["parent"]) for one in listed] == [
            ("embedded", "embedded", None),
            ("town", "town-lora", "embedded"),
            ("poems", "poems", "embedded"),
        ]
        check_error(httpx.get(server.address + "/v1/models/town-lora"), 404, "model_not_found", "model")
        assert "adapter town (town-lora): " in server.log
        for _ in range(2):  # the second time with cached prefixes
            asked = {(model, text): pool.submit(ask, server.address, model, text) for text in TEXTS for model in MODELS}
            assert {key: each.result() for key, each in asked.items()} == expected
        forms = [{"type": "choice", "choice": ["ferry", "castle"]}, {"type": "regex", "regex": "[0-9]{4}"}]
        for form in forms:  # grammars are tried one by one, each in good time
            ask(server.address, "embedded", TEXTS[0], response_format=form)
        several = [
            pool.submit(ask, server.address, model, TEXTS[0], response_format=form)
            for model in MODELS
            for form in forms
        ]
        for at, each in enumerate(several):
            assert each.result() in ("ferry", "castle") if at % 2 == 0 else each.result().isdecimal()
        (engine,) = [pid for pid in children(server.process.pid) if "mixtral.worker" in _command(pid)]
        os.kill(engine, signal.SIGKILL)
        until(lambda: httpx.get(server.address + "/ready").status_code != 200)
        until(lambda: httpx.get(server.address + "/ready").status_code == 200, timeout_s=60)
        for model in MODELS:
            assert ask(server.address, model, TEXTS[0]) == expected[model, TEXTS[0]]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.slow
def test_a_named_adapter_of_the_embedded_model_is_what_it_is_alone(
    home: Path, expected: dict[tuple[str, str], str]
) -> None:
    base = mixtral.load("embedded")
    llm = mixtral.load("embedded", adapters={"town": home / "town-lora", "poems": home / "poems"})
    for name, folder in (("town", "town-lora"), ("poems", "poems")):
        text = " ".join(TEXTS) + expected[name, TEXTS[0]]
        ids = base.tokenizer.encode(text, bos=True)
        alone = mixtral.load("embedded", adapter=home / folder).logits(ids).numpy()
        found = llm.logits(ids, adapter=name).numpy()
        assert compare(alone, found, ids).kl_mean < 0.1 * compare(alone, base.logits(ids).numpy(), ids).kl_mean


@pytest.mark.slow
def test_a_file_of_requests_chooses_too(
    options: list[str], expected: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    lines = [
        {
            "custom_id": f"{model} {number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": text}], **SETTINGS},
        }
        for number, text in enumerate(TEXTS)
        for model in (*MODELS, "rock")
    ]
    asked, out, errors = tmp_path / "asked", tmp_path / "out", tmp_path / "errors"
    asked.write_text("\n".join(map(json.dumps, lines)))
    assert main(["batch", str(asked), str(out), "--errors", str(errors), *options]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    found = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in answers}
    assert found == {f"{m} {number}": expected[m, text] for number, text in enumerate(TEXTS) for m in MODELS}
    refused = [json.loads(line)["response"]["body"]["error"]["code"] for line in errors.read_text().splitlines()]
    assert refused == ["model_not_found"] * len(TEXTS)


@pytest.mark.slow
def test_an_adapter_that_cannot_be_used_stops_the_start(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    town = f"town={home / 'town-lora'}"
    for more, says in (
        (["--adapter", f"x={home}"], f"adapter 'x': {home}: no adapter; expected a folder"),
        (["--adapter", f"embedded={home / 'poems'}"], "the adapter 'embedded' has the name of the model"),
        (["--served-model-name", "town"], "the adapter 'town' has the name of the model"),
    ):
        assert main(["serve", "--port", "0", "--adapter", town, *more]) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
        assert line.startswith("mixtral: error: ")
        assert says in line
