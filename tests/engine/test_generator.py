"""Generation against transformers, and its promises: neighbours do not matter, pages come back, limits are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mixtral.config import MixtralConfig
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.generator import Generator
from mixtral.engine.pages import PAGE_SIZE
from mixtral.errors import CapacityError, NumericalError, RequestError, TokenizerError
from mixtral.model import cache
from mixtral.model.mixtral import Mixtral
from mixtral.wire import SamplingParams, TokenEvent

V, CONTEXT = 101, 800
CHUNK = EngineConfig().max_num_batched_tokens
CONFIG = MixtralConfig(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=CONTEXT,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, stop_ids=())
PROMPTS = [[1], [5, 6, 7, 8, 9], [3 * i % V for i in range(130)], [7 * i % V for i in range(64)]]


@pytest.fixture(scope="module")
def peer() -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    values = {k: v for k, v in CONFIG.to_dict().items() if k != "architectures"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**values, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def model(peer: transformers.MixtralForCausalLM) -> Mixtral:
    ours = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    ours.load_state_dict(peer.state_dict())
    return ours


@pytest.fixture
def generator(model: Mixtral) -> Generator:
    return Generator(Engine(model))


def run(generator: Generator, prompts: list[list[int]], params: Any) -> list[list[int]]:
    """The ids of every answer."""
    answers: list[list[int]] = [[] for _ in prompts]
    for event in generator.stream(prompts, params):
        answers[event.sequence].append(event.id)
    return answers


def test_page_size_is_that_of_the_cache() -> None:
    assert cache.PAGE_SIZE == PAGE_SIZE


def test_greedy_batch_equals_transformers_and_each_alone(
    generator: Generator, peer: transformers.MixtralForCausalLM
) -> None:
    answers = run(generator, PROMPTS, GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ids[0, len(prompt) :].tolist() == answer
        assert run(generator, [prompt], GREEDY) == [answer]
    assert generator.pages_in_use == 0


@pytest.mark.parametrize("length", [1, 64, CHUNK, CHUNK + 1, 700])
def test_logits_equal_transformers_in_chunks(
    generator: Generator, peer: transformers.MixtralForCausalLM, length: int
) -> None:
    ids = [(11 * i + i // 7) % V for i in range(length)]
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits[0]
    found = generator.logits(ids)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (length, V))
    assert (found - expected).abs().max() < 1e-4


def test_a_long_prompt_among_short_ones(generator: Generator) -> None:
    """Prompts that share a chunk with the end of another, and one that spans two chunks."""
    prompts = [[4] * 300, [i % V for i in range(400)], [9, 8], [2] * 30]
    params = SamplingParams(temperature=0.0, max_tokens=6, stop_ids=())
    assert run(generator, prompts, params) == [run(generator, [prompt], params)[0] for prompt in prompts]


def test_draws_do_not_depend_on_neighbours(generator: Generator) -> None:
    """Correctness H3: (seed, sequence, position) alone."""
    params = SamplingParams(temperature=1.3, seed=42, max_tokens=30, stop_ids=())
    alone = run(generator, [PROMPTS[1]], params)[0]
    among = run(generator, [PROMPTS[1], PROMPTS[2], [9]], [params, params, GREEDY])
    assert among[0] == alone
    assert run(generator, [PROMPTS[1]] * 2, params)[1] != alone
    other = run(generator, [PROMPTS[1]], SamplingParams(temperature=1.3, seed=43, max_tokens=30, stop_ids=()))[0]
    assert other != alone


def test_without_a_seed_answers_differ(generator: Generator) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=30, stop_ids=())
    assert run(generator, [[1]], params) != run(generator, [[1]], params)


def test_logprobs_are_those_of_the_logits(generator: Generator) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, logprobs=3, stop_ids=())
    events = list(generator.stream([PROMPTS[1]], params))
    ids = PROMPTS[1] + [event.id for event in events]
    expected = torch.log_softmax(generator.logits(ids), dim=-1)
    for place, event in enumerate(events, len(PROMPTS[1]) - 1):
        assert event.logprob == pytest.approx(expected[place, event.id].item(), abs=1e-4)
        assert [c.logprob for c in event.top] == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)


def test_finish_reasons(generator: Generator) -> None:
    free = run(generator, PROMPTS[:2], GREEDY)
    end = free[0][10]
    first = free[0].index(end)
    params = SamplingParams(temperature=0.0, max_tokens=20, stop_ids=(end, 100_000))
    events = list(generator.stream(PROMPTS[:2], [params, SamplingParams(temperature=0.0, max_tokens=5, stop_ids=())]))
    of = {s: [event for event in events if event.sequence == s] for s in (0, 1)}
    assert [event.id for event in of[0]] == free[0][: first + 1]
    assert [event.id for event in of[1]] == free[1][:5]
    assert [e.finish_reason for e in of[0]] == [None] * first + ["stop"]
    assert [e.finish_reason for e in of[1]] == [None] * 4 + ["length"]


def test_context_end(generator: Generator) -> None:
    """Correctness B8: the context may be filled to the last token, and not by one more."""
    prompt = [5] * (CONTEXT - 3)
    events = list(generator.stream([prompt], SamplingParams(temperature=0.0, max_tokens=3, stop_ids=())))
    assert [event.finish_reason for event in events] == [None, None, "length"]
    with pytest.raises(
        CapacityError, match=rf"needs {CONTEXT + 1} tokens \(prompt {CONTEXT - 3} \+ max_tokens 4\).*{CONTEXT}"
    ):
        generator.stream([prompt], SamplingParams(max_tokens=4))
    with pytest.raises(CapacityError):
        generator.stream([[5] * CONTEXT], SamplingParams(max_tokens=1))
    assert generator.logits([5] * CONTEXT).shape == (CONTEXT, V)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], RequestError, "0 prompts"),
        ([[1], []], RequestError, "empty"),
        ([[1, V]], TokenizerError, f"token id is {V}; expected 0 to {V - 1}"),
        ([[-1]], TokenizerError, "token id is -1"),
        ([[1.5]], TokenizerError, "token id is 1.5; expected an integer"),
        ([[True]], TokenizerError, "token id is True"),
    ],
)
def test_bad_prompts_are_refused_at_once(
    generator: Generator, prompts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generator.stream(prompts, GREEDY)


def test_as_many_parameters_as_prompts(generator: Generator) -> None:
    with pytest.raises(RequestError, match="2 prompts and 1 parameters"):
        generator.stream([[1], [2]], [GREEDY])


def test_closing_frees_the_pages(generator: Generator) -> None:
    """Correctness H4."""
    events = generator.stream([[1] * 100, [2]], GREEDY)
    assert next(events).sequence == 0
    assert generator.pages_in_use == 3
    events.close()
    assert generator.pages_in_use == 0


def test_a_finished_sequence_frees_its_pages_while_others_go_on(generator: Generator) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=1, stop_ids=())
    used = [generator.pages_in_use for _ in generator.stream([[1] * 100, [2]], [short, GREEDY])]
    assert used[-2] == 1
    assert generator.pages_in_use == 0


def test_dropped_sequences_get_no_more_tokens(generator: Generator) -> None:
    dropped: set[int] = set()
    events: list[TokenEvent] = []
    for event in generator.stream([[1], [2], [3]], GREEDY, dropped):
        events.append(event)
        if event.sequence == 1 and len(events) > 10:
            dropped.add(1)
    counts = [sum(event.sequence == s for event in events) for s in range(3)]
    assert counts == [64, 4, 64]
    assert [e.id for e in events if e.sequence == 2] == run(generator, [[3]], GREEDY)[0]


def test_dropping_the_last_sequence_ends_the_iterator(generator: Generator) -> None:
    dropped: set[int] = set()
    seen = 0
    for _ in generator.stream([[1]], GREEDY, dropped):
        seen += 1
        dropped.add(0)
    assert (seen, generator.pages_in_use) == (1, 0)


def test_nan_is_an_error_and_frees_the_pages(model: Mixtral, generator: Generator) -> None:
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[17] = torch.nan
        with pytest.raises(NumericalError, match="token 17 at position 2"):
            next(generator.stream([[1, 2]], GREEDY))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert generator.pages_in_use == 0


def test_streams_that_are_open_side_by_side(generator: Generator) -> None:
    """Each gets what it gets alone, in whatever order they are asked."""
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=30, stop_ids=())
    alone = [run(generator, [prompt], params)[0] for prompt in PROMPTS[:3]]
    streams = [generator.stream([prompt], params) for prompt in PROMPTS[:3]]
    found: list[list[int]] = [[], [], []]
    for turn in range(400):
        number = (turn * turn + turn // 7) % 3
        event = next(streams[number], None)
        if event is not None:
            found[number].append(event.id)
    assert found == alone
    assert generator.pages_in_use == 0


def test_a_stream_whose_engine_was_stopped_says_so(generator: Generator) -> None:
    events = generator.stream([[1, 2]], GREEDY)
    next(events)
    generator.engine.abort_all()
    with pytest.raises(RuntimeError, match="cannot go on"):
        next(events)
    assert len(run(generator, [[1, 2]], GREEDY)[0]) == 64


def test_a_stream_that_was_never_asked_holds_nothing(generator: Generator) -> None:
    generator.stream([[1] * 100], GREEDY)
    assert not generator.engine.has_work


def test_a_cache_that_is_too_small_for_all_is_enough_for_each(model: Mixtral) -> None:
    small = Generator(Engine(model, EngineConfig(pages=4)))
    assert run(small, PROMPTS, GREEDY) == run(Generator(Engine(model)), PROMPTS, GREEDY)
    with pytest.raises(CapacityError, match="has room for 256"):
        small.stream([[1] * 250], GREEDY)
