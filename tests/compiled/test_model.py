"""A whole model on compiled kernels: the numbers of the reference, and one result for a token whatever the company."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mixtral.compiled import KV_DTYPES, CompiledCache, compile_model
from mixtral.config import MixtralConfig
from mixtral.engine.engine import Engine
from mixtral.engine.generator import Generator
from mixtral.errors import ConfigError
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import native
from mixtral.quant.encode import encode_rows
from mixtral.quant.modules import PackedExperts, PackedLinear
from mixtral.quant.packed import Blocks, Packed
from mixtral.quant.panels import to_panels

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
ODD = {"hidden_size": 61, "intermediate_size": 45, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
# Formats of blocks need whole blocks.
CASES = [
    *((kind, False) for kind in ("float32", "bfloat16", "float16", "Q4_K", "Q6_K", "Q8_0")),
    *((kind, True) for kind in ("float32", "bfloat16", "float16")),
]


def model_of(kind: str, **sizes: int) -> Mixtral:
    """A random model of a dtype, or with all matrices but the embedding in a format of GGML."""
    dense = kind if kind.islower() else "float32"
    model = Mixtral(MixtralConfig(**SIZES | sizes), dtype=getattr(torch, dense))
    initialise(model, seed=1, std=0.1)
    if not kind.islower():
        pack(model, kind)
    return model


def pack(model: Mixtral, kind: str) -> None:
    def packed(weight: Tensor) -> Packed:
        blocks = Blocks(kind, encode_rows(weight.detach(), kind))
        return to_panels(blocks) or blocks

    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.set_submodule(name, PackedLinear(packed(layer.self_attn.get_submodule(name).weight)))
        experts = layer.mlp.experts
        gate, up = zip(*(weight.chunk(2) for weight in experts.gate_up_proj), strict=True)
        parts = ([packed(weight) for weight in half] for half in (gate, up, experts.down_proj))
        layer.mlp.experts = PackedExperts(*parts)
    model.lm_head = PackedLinear(packed(model.lm_head.weight))


def read(
    model: Mixtral, prompts: Sequence[Sequence[int]], cut: int, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Logits of every prompt and routing of every layer; prompts are read together, in chunks of random sizes up to
    ``cut``."""
    counts = [-(-len(prompt) // 64) for prompt in prompts]
    source = random.Random(seed)
    order = source.sample(range(sum(counts) + 2), sum(counts))
    pages = [[order.pop() for _ in range(count)] for count in counts]
    cache, done = model.new_cache(sum(counts) + 2), [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    routes: list[list[list[Tensor]]] = [[[] for _ in model.model.layers] for _ in prompts]
    while any(start < len(prompt) for start, prompt in zip(done, prompts, strict=True)):
        spans = [(i, done[i], min(source.randint(1, cut), len(p) - done[i])) for i, p in enumerate(prompts)]
        spans = [span for span in spans if span[2]]
        tokens = [id for i, start, count in spans for id in prompts[i][start : start + count]]
        positions = [p for _, start, count in spans for p in range(start, start + count)]
        view = cache.view([(pages[i], start, count) for i, start, count in spans])
        with torch.inference_mode():
            out = model(Batch(torch.tensor(tokens), torch.tensor(positions), view))
            found = model.logits(out.hidden_TD).split([count for _, _, count in spans])
        at = 0
        for (i, _, count), rows in zip(spans, found, strict=True):
            logits[i].append(rows)
            for layer, route in enumerate(out.routes):
                routes[i][layer].append(route.picks_TA[at : at + count])
            at += count
            done[i] += count
    return [torch.cat(rows) for rows in logits], [[torch.cat(rows) for rows in layers] for layers in routes]


PROMPTS = [[(7 * i * i + 3) % 320 for i in range(150)], [5, 9, 200], [(11 * i) % 320 for i in range(70)], [319]]


@pytest.mark.parametrize(("kind", "odd"), CASES)
def test_one_result_for_each_token(kind: str, odd: bool) -> None:
    """Bit for bit: alone, in a batch, in chunks, token by token, in other pages, on one and three threads."""
    model = compile_model(model_of(kind, **(ODD if odd else {})))
    alone = [read(model, [prompt], 1000) for prompt in PROMPTS]
    for case, cut in enumerate((1000, 40, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(1 if case == 1 else 3)
        try:
            logits, routes = read(model, PROMPTS, cut, seed=case)
        finally:
            torch.set_num_threads(before)
        for i, (rows, layers) in enumerate(alone):
            assert torch.equal(logits[i], rows[0]), (i, cut)
            assert all(torch.equal(a, b) for a, b in zip(routes[i], layers[0], strict=True))


@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES])
@pytest.mark.parametrize(("kind", "odd"), CASES)
def test_the_numbers_of_the_reference(kind: str, kv_dtype: str | None, odd: bool) -> None:
    """Beside the same weights in float32 on the reference path."""
    sizes = ODD if odd else {}
    model = model_of(kind, **sizes)
    if kind.islower():
        model = model.float()
    expected, _ = read(model, PROMPTS, 1000)
    compiled = compile_model(model_of(kind, **sizes), kv_dtype=kv_dtype)
    found, _ = read(compiled, PROMPTS, 1000)
    # Routing may change where two experts are close, and then a row is another one: the median row counts.
    errors = torch.cat([(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(found, expected, strict=True)])
    limit = {"float32": 1e-5, "float16": 1e-5, "bfloat16": 0.02}.get(kind, 0.05)
    # Rounded keys and values reach the second layer's choice of experts.
    limit = max(limit, {"bfloat16": 0.02, "int8": 0.06}.get(str(kv_dtype), 0.0))
    assert errors.median().item() < limit


def test_names_and_values_of_parameters_stay() -> None:
    plain, compiled = model_of("bfloat16"), compile_model(model_of("bfloat16"))
    expected, found = dict(plain.named_parameters()), dict(compiled.named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_has_no_kernel_is_decoded() -> None:
    """Formats without kernels, in some matrices of a layer and as experts, go through torch in the same layer."""
    model, plain = model_of("Q8_0"), model_of("Q8_0")
    for one in (model, plain):
        layer = one.model.layers[1]
        for name in ("k_proj", "o_proj"):
            source = layer.self_attn.get_submodule(name).packed.unpacked().decode(torch.float32)
            layer.self_attn.set_submodule(name, PackedLinear(Blocks("Q5_1", encode_rows(source, "Q5_1"))))
        names = ("gate", "up", "down")
        for name in names:
            matrices = getattr(one.model.layers[0].mlp.experts, name)
            for e, matrix in enumerate(matrices):
                matrices[e] = Blocks("Q5_1", encode_rows(matrix.decode(torch.float32), "Q5_1"))
        parts = (list(getattr(one.model.layers[0].mlp.experts, name)) for name in names)
        one.model.layers[0].mlp.experts = PackedExperts(*parts)
    expected, _ = read(plain, PROMPTS, 1000)
    found, _ = read(compile_model(model), PROMPTS, 1000)
    assert ((found[0] - expected[0]).norm() / expected[0].norm()).item() < 0.1


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_other_contexts(kind: str) -> None:
    """Documents of a batch instead of a cache."""
    model = model_of(kind)
    tokens, lengths = torch.tensor(PROMPTS[0]), [100, 50]
    documents = Documents(lengths)
    batch = Batch(tokens, documents.positions_T, documents)
    with torch.inference_mode():
        expected = model(batch).hidden_TD.float()
        found = compile_model(model)(batch).hidden_TD
    assert ((found - expected).norm() / expected.norm()).item() < (1e-5 if kind == "float32" else 0.03)


def test_generation_is_the_same_alone_and_together() -> None:
    """With sampling, through the engine."""
    from mixtral.wire import SamplingParams

    generator = Generator(Engine(compile_model(model_of("bfloat16"))))
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7, stop_ids=(), logprobs=2)
    together = [event for event in generator.stream(PROMPTS, params) if event.sequence == 0]
    alone = list(generator.stream(PROMPTS[:1], params))
    assert together == alone


def processor_use(seconds: float) -> float:
    """Processor time of this process in a stretch of time in which it is left alone."""
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds


def test_a_model_that_does_nothing_leaves_the_processor_alone() -> None:
    """Threads sleep between calls: of a second, less than a tenth is used. One that waits without sleeping is seen."""
    model, before = compile_model(model_of("Q8_0")), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        read(model, PROMPTS, 1000)
    finally:
        torch.set_num_threads(before)
    time.sleep(0.05)
    assert processor_use(1.0) < 0.1
    over = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(over.is_set, True)])
    busy.start()
    try:
        assert processor_use(0.3) > 0.1
    finally:
        over.set()
        busy.join()


def test_wrong_options(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kv_dtype is 'int4'; expected one of bfloat16, float32, int8"):
        compile_model(model_of("float32"), kv_dtype="int4")
    monkeypatch.setenv(native.VARIABLE, "mmx")
    for found in (native.level, native.forced_level):
        found.cache_clear()
    try:
        with pytest.raises(ConfigError, match="MIXTRAL_ISA is 'mmx'; this processor runs baseline"):
            compile_model(model_of("float32"))
    finally:
        for found in (native.level, native.forced_level):
            found.cache_clear()


def test_the_log_says_what_runs_where(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("Q4_K")
    layer = model.model.layers[0].self_attn
    source = layer.k_proj.packed.unpacked().decode(torch.float32)
    layer.k_proj = PackedLinear(Blocks("Q5_1", encode_rows(source, "Q5_1")))
    with caplog.at_level("INFO", logger="mixtral"):
        compile_model(model, kv_dtype="int8")
    (record,) = caplog.records
    told = record.getMessage()
    assert told.startswith(f"kernels {native.level()}: ")
    assert "32 matrices Q4_K" in told
    assert "1 matrices Q5_1 (no kernel: decoded where it is used)" in told
    assert told.endswith("keys and values int8")


@pytest.mark.parametrize("kind", KV_DTYPES)
def test_cleared_pages_hold_zeros(kind: str) -> None:
    cache = CompiledCache(MixtralConfig(**SIZES), pages=4, kv_dtype=kind)
    cache.blocks.fill_(255)
    cache.clear([3, 1])
    assert (cache.blocks[:, [1, 3]] == 0).all()
    assert (cache.blocks[:, [0, 2]] == 255).all()
    assert cache.nbytes == cache.blocks.numel()
    assert all((layer == cache.blocks[number].numpy()).all() for number, layer in enumerate(cache.layers))
