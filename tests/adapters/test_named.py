"""Several adapters in one batch: each row is that of its adapter alone, and the base is that of a model without any."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import WIDE, factors_of, ours, packed_folder
from test_invariance import PROMPT, SETTINGS, WAYS, Answer, Way, answers

import mixtral
from mixtral.adapters import Factors
from mixtral.adapters.factors import TARGETS
from mixtral.adapters.named import NamedAdapters, add_adapters
from mixtral.adapters.peft import WEIGHTS_NAME, write_adapter
from mixtral.compiled import compile_model
from mixtral.config import MixtralConfig
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.request import Request
from mixtral.errors import CheckpointError, ConfigError, RequestError
from mixtral.model import Mixtral, initialise
from mixtral.weights import load_model, save_model
from mixtral.wire import Failed, SamplingParams, Started, Submit, Tokens

# What each adapter changes: all there is; attention alone; experts alone, in the second half of what it is.
KINDS: dict[str, dict[str, Any]] = {
    "town": {"seed": 5, "rank": 4, "targets": tuple(TARGETS)},
    "poems": {"seed": 6, "rank": 3, "targets": ("q", "o")},
    "port": {"seed": 7, "rank": 8, "expert_rank": 1, "targets": ("v", "down"), "rslora": True},
}
BASES = ("float32", "bfloat16", "int4_g32", "q4_k_m")
PACKED = dataclasses.replace(WIDE, vocab_size=320, num_hidden_layers=2)
IDS = list(range(3, 40))


def folders(config: MixtralConfig, home: Path, size: float = 0.1) -> dict[str, Path]:
    for name, kind in KINDS.items():
        write_adapter(home / name, config, factors_of(config, size=size, **kind), overwrite=True)
    return {name: home / name for name in KINDS}


def load(base: str, config: MixtralConfig, home: Path) -> Mixtral:
    """A model before it is put on kernels; packed or not."""
    if base in ("float32", "bfloat16"):
        model = Mixtral(config, dtype=getattr(torch, base))
        initialise(model, seed=1, std=0.25)
        return model
    path = home / "base" / ("packed.gguf" if base == "q4_k_m" else "packed")
    if not path.exists():
        packed_folder(base, home / "base", PACKED)
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(
    scope="module",
    params=[pytest.param(base, marks=[pytest.mark.slow] * (base != "q4_k_m")) for base in BASES],
)
def both(
    request: pytest.FixtureRequest, tiny_config: MixtralConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Mixtral, Mixtral, NamedAdapters]:
    """A model, and the same one with adapters beside it."""
    home = tmp_path_factory.mktemp("named")
    plain, adapted = (compile_model(load(request.param, tiny_config, home)) for _ in range(2))
    return plain, adapted, add_adapters(adapted, folders(plain.config, home))


@pytest.fixture(scope="module")
def alone(both: tuple[Mixtral, Mixtral, NamedAdapters]) -> dict[tuple[str | None, str], list[Answer]]:
    """What each is compared with: nothing else runs, no prefixes are found, nothing is drafted."""
    plain, adapted, named = both
    way = Way({"prefix_cache": False, "speculation": False}, n=4)
    found: dict[tuple[str | None, str], list[Answer]] = {}
    for setting, params in SETTINGS.items():
        found[None, setting] = answers(plain, params, way)
        for name in KINDS:
            found[name, setting] = answers(adapted, params, way, adapters=named, adapter=name)
    assert len({str(one) for one in found.values()}) == len(found)
    return found


@pytest.mark.parametrize("adapter", [None, *KINDS])
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_the_same_beside_other_adapters(
    both: tuple[Mixtral, Mixtral, NamedAdapters],
    alone: dict[tuple[str | None, str], list[Answer]],
    way: str,
    adapter: str | None,
) -> None:
    """The same bits, and of the base those of a model that never had an adapter."""
    _, adapted, named = both
    theirs = [name for name in ("town", None, "poems", "port") if name != adapter]
    setting = list(SETTINGS)[list(WAYS).index(way) % 2]
    found = answers(adapted, SETTINGS[setting], WAYS[way], adapters=named, adapter=adapter, theirs=theirs)
    assert found == alone[adapter, setting][: WAYS[way].n]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_named_adapter_is_what_it_is_as_the_only_one(
    base: str, reference: bool, tiny_config: MixtralConfig, tmp_path: Path
) -> None:
    """The oracle is the way of one adapter for all: in dense weights, and beside packed ones by torch."""
    if base in ("float32", "bfloat16"):
        save_model(load(base, tiny_config, tmp_path), tmp_path / "plain")
        path, tolerance = tmp_path / "plain", {"float32": 1e-5, "bfloat16": 0.1}[base]
    else:
        # Kernels round activations to int8, which makes a last bit that differs a step of that.
        path, tolerance = packed_folder(base, tmp_path / "base", PACKED), 1e-5 if reference else 0.02
    config = mixtral.load(path).config
    paths = folders(config, tmp_path)
    options: dict[str, Any] = {"reference": reference, "dtype": "bfloat16" if base == "bfloat16" else "float32"}
    llm = mixtral.load(path, adapters=paths, **options)
    plain = mixtral.load(path, **options).logits(IDS)
    assert torch.equal(llm.logits(IDS), plain)
    for name in KINDS:
        one = mixtral.load(path, adapter=paths[name], **options).logits(IDS)
        effect = (one - plain).norm()
        assert effect > 0.02 * plain.norm()
        assert (llm.logits(IDS, adapter=name) - one).norm() < tolerance * effect + 1e-5 * plain.norm()


def test_without_kernels_the_rows_of_a_batch_are_those_of_their_adapters(
    tiny_config: MixtralConfig, tmp_path: Path
) -> None:
    model = load("float32", tiny_config, tmp_path)
    paths = folders(tiny_config, tmp_path)
    expected = {
        None: ours(model),
        **{name: ours(model, factors_of(tiny_config, **kind)) for name, kind in KINDS.items()},
    }
    named = add_adapters(model, paths)
    params = SamplingParams(max_tokens=1, prompt_logprobs=3, temperature=0.0)
    ids = list(range(3, 60))
    engine = Engine(model, EngineConfig(pages=20, speculation=False), adapters=named)
    for name in expected:
        engine.submit(Submit(request=f"{name}", prompts=[ids], params=params, adapter=name))
    engine.step()
    assert engine.stats().steps == 1
    logits = {name: engine.logits(ids, name) for name in expected}
    for name, found in logits.items():
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-4)


def run(engine: Engine, *submits: Submit) -> dict[str, tuple[int, list[int]]]:
    """Tokens that were found in the cache, and ids, of each."""
    found: dict[str, tuple[int, list[int]]] = {}
    for submit in submits:
        engine.submit(submit)
    while engine.has_work:
        for update in engine.step():
            if isinstance(update, Started):
                found[update.request] = (update.cached[0], [])
            elif isinstance(update, Tokens):
                found[update.request][1].extend(event.id for event in update.events)
    return found


@pytest.fixture(scope="module")
def served(tiny_config: MixtralConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mixtral, NamedAdapters]:
    home = tmp_path_factory.mktemp("served")
    model = compile_model(load("float32", tiny_config, home))
    return model, add_adapters(model, folders(tiny_config, home))


def submits(names: Sequence[str | None], mark: str = "", **fields: Any) -> list[Submit]:
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_ids=())
    return [Submit(request=f"{name}{mark}", prompts=[PROMPT], params=params, adapter=name, **fields) for name in names]


def test_cached_pages_belong_to_one_adapter(served: tuple[Mixtral, NamedAdapters]) -> None:
    model, named = served
    names = [None, *KINDS]
    engine = Engine(model, EngineConfig(pages=40), adapters=named)
    first = {name: run(engine, *submits([name]))[f"{name}"] for name in names}
    assert [cached for cached, _ in first.values()] == [0, 0, 0, 0]
    again = run(engine, *submits(names, " again"))
    assert {name: again[f"{name} again"] for name in names} == {name: (128, ids) for name, (_, ids) in first.items()}
    # A scope of the base that looks like that of an adapter is another one.
    assert run(engine, *submits([None], scope="town\0"), *submits(["town"], scope="x"))["town"][0] == 0


def test_routing_is_that_of_the_adapter(served: tuple[Mixtral, NamedAdapters]) -> None:
    model, named = served

    def routing(names: Sequence[str | None]) -> dict[str, list[Any]]:
        engine = Engine(model, EngineConfig(pages=40), adapters=named)
        found: dict[str, list[Any]] = {f"{name}": [] for name in names}
        for submit in submits(names, routing=True, routing_prompt=True):
            engine.submit(submit)
        while engine.has_work:
            for update in engine.step():
                if isinstance(update, Tokens):
                    found[update.request] += [(event.id, event.routing) for event in update.events]
        return found

    together = routing([None, *KINDS])
    alone: dict[str, list[Any]] = {}
    for name in (None, *KINDS):
        alone |= routing([name])
    assert together == alone
    assert len({str(one) for one in alone.values()}) == 4


def test_pages_that_were_shared_among_adapters_would_be_seen(
    served: tuple[Mixtral, NamedAdapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, named = served
    right = run(Engine(model, EngineConfig(pages=40), adapters=named), *submits(["town"]))
    monkeypatch.setattr(Request, "scope", property(lambda request: request.submit.scope))
    engine = Engine(model, EngineConfig(pages=40), adapters=named)
    run(engine, *submits([None]))
    assert run(engine, *submits(["town"]))["town"] not in (right["town"], (128, right["town"][1]))


def test_a_step_that_fails_leaves_no_rows_behind(
    served: tuple[Mixtral, NamedAdapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, named = served
    engine = Engine(model, EngineConfig(pages=40), adapters=named)
    before = run(engine, *submits([None]))

    def fail(*_: object) -> None:
        raise RuntimeError("a step fails")

    with monkeypatch.context() as broken:
        broken.setattr(model.model.norm, "forward", fail)
        engine.submit(submits(["town"])[0])
        with pytest.raises(RuntimeError, match="a step fails"):
            engine.step()
    assert named.rows.groups == ()
    assert run(engine, *submits([None]))["None"][1] == before["None"][1]


def test_an_adapter_that_is_not_there_is_refused(served: tuple[Mixtral, NamedAdapters]) -> None:
    model, named = served
    params = SamplingParams(max_tokens=1)
    for adapters, says in ((named, "expected one of town, poems, port"), (None, "expected none")):
        engine = Engine(model, EngineConfig(pages=4), adapters=adapters)
        engine.submit(Submit(request="a", prompts=[[1]], params=params, adapter="tawn"))
        (update,) = engine.step()
        assert isinstance(update, Failed)
        assert (update.code, update.param) == (RequestError.code, "adapter")
        assert says in update.message
        with pytest.raises(RequestError, match="there is no adapter 'tawn'"):
            engine.logits([1], "tawn")


@pytest.fixture(scope="module")
def home(tiny_config: MixtralConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_model(load("float32", tiny_config, folder), folder / "base")
    folders(tiny_config, folder)
    return folder


def test_calls_choose_an_adapter(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mixtral"):
        llm = mixtral.load(home / "base", adapters={name: home / name for name in KINDS})
    sizes = {name: sum(a.numel() + b.numel() for a, b, _ in _factors(llm, name)) * 4 for name in KINDS}
    for name in KINDS:
        assert (llm.adapters[name].root, llm.adapters[name].size_bytes) == (name, sizes[name])
        assert f"adapter {name} ({home / name}, PEFT" in caplog.text
        assert f"{sizes[name]} bytes" in caplog.text
    assert llm.generator.engine.config.speculation
    found = {name: llm.generate(IDS, max_tokens=8, temperature=0, adapter=name).ids for name in (None, *KINDS)}
    assert len({tuple(ids) for ids in found.values()}) == 4
    for name in KINDS:
        whole = llm.logits([*IDS, *found[name][:-1]], adapter=name)[len(IDS) - 1 :]
        assert whole.argmax(-1).tolist() == found[name]
    streams = [llm.generate(IDS, max_tokens=8, temperature=0, adapter=name, stream=True) for name in (None, *KINDS)]
    side_by_side = [[delta.ids for delta in deltas] for deltas in zip(*streams, strict=True)]
    assert [list(itertools.chain(*ids)) for ids in zip(*side_by_side, strict=True)] == list(found.values())
    with pytest.raises(RequestError, match="there is no adapter 'rock'; expected one of town, poems, port"):
        llm.generate(IDS, adapter="rock")


def _factors(llm: mixtral.LLM, name: str) -> list[Factors]:
    return list(factors_of(llm.config, **KINDS[name]).values())


def test_saving_writes_the_base(home: Path, tmp_path: Path) -> None:
    for reference in (False, True):
        llm = mixtral.load(home / "base", adapters={"town": home / "town"}, reference=reference)
        llm.save(tmp_path / f"{reference}")
        saved = mixtral.load(tmp_path / f"{reference}")
        assert torch.equal(saved.logits(IDS), mixtral.load(home / "base").logits(IDS))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base", "'base' has the name of the model"),
        ("", "name '' is not usable"),
        ("a b", "name 'a b' is not usable"),
        ("-a", "expected 1 to 128 letters, digits"),
        ("a/b", "not usable"),
        ("a\n", "not usable"),
        ("ä", "not usable"),
        ("a" * 129, "not usable"),
    ],
)
def test_names_are_checked(home: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        mixtral.load(home / "base", adapters={"town": home / "town", name: home / "poems"})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_named(home: Path, tiny_config: MixtralConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, hidden_size=128)
    write_adapter(tmp_path / "other", config, factors_of(config, rank=2))
    write_adapter(tmp_path / "cut", tiny_config, factors_of(tiny_config, rank=2))
    file = tmp_path / "cut" / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-8])
    for path, says in (
        (tmp_path / "other", "another base"),
        (tmp_path / "cut", WEIGHTS_NAME),
        (tmp_path, "no adapter"),
    ):
        for reference in (False, True):
            with pytest.raises(CheckpointError, match=f"adapter 'poems': .*{says}"):
                mixtral.load(home / "base", adapters={"town": home / "town", "poems": path}, reference=reference)
    with pytest.raises(ConfigError, match="adapter and adapters are both given"):
        mixtral.load(home / "base", adapter=home / "town", adapters={"town": home / "town"})
