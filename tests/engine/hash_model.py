"""A model whose numbers depend on every token before, through the pages, and cost nothing. And what it writes, plainly.

The state of a token is a hash of the token and of the sum of all states before it, which are read from the pages. So a
page that is shared wrongly, overwritten, or not filled again after it was lost changes every number that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import choosing
import numpy as np
import torch

from mixtral.config import MixtralConfig
from mixtral.engine.pages import PAGE_SIZE
from mixtral.model.batch import Batch
from mixtral.ops import Route
from mixtral.wire import Submit, TokenEvent

V, LAYERS, EXPERTS, EOS = 11, 2, 4, 2
CONFIG = MixtralConfig(
    vocab_size=V,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=LAYERS,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
    eos_token_id=EOS,
)
_WORD = (1 << 64) - 1
NAN_TOKEN = 0  # the state after it is damaged, if the model is told so


def mix(value: int) -> int:
    """A hash of 64 bits (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def next_state(before: int, token: int, position: int) -> int:
    """The state of a token, given the sum of the states before it."""
    return mix(before ^ mix(token << 20 ^ position))


def row_of(state: int, token: int) -> np.ndarray:
    """Logits after a token. Seven times of eight the next one is likely to be the token's successor."""
    row = np.array([mix(state ^ place) >> 40 for place in range(V)], dtype=np.float32) / np.float32(1 << 22)
    if state & 7:
        row[3 + (token - 2) % 7] += np.float32(6.0)
    return row


class HashCache:
    """One state per place, garbage at first."""

    def __init__(self, pages: int) -> None:
        self.states = [0xDEADBEEF] * (pages * PAGE_SIZE)
        self.nbytes = 8 * len(self.states)

    def clear(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.states[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = [0] * PAGE_SIZE

    def view(self, spans: Any) -> Any:
        return self, [(list(pages), stored, count) for pages, stored, count in spans]


class HashModel:
    """What the engine asks of a model. With ``poison``, tokens ``NAN_TOKEN`` damage what follows them."""

    config = CONFIG
    device = torch.device("cpu")

    def __init__(self, *, poison: bool = False) -> None:
        self.poison = poison
        self.steps = 0
        self.raising: Exception | None = None

    def new_cache(self, pages: int) -> HashCache:
        return HashCache(pages)

    def __call__(self, batch: Batch) -> Any:
        self.steps += 1
        if self.raising is not None:
            raise self.raising
        cache, spans = batch.context  # type: ignore[misc]
        tokens, positions = batch.tokens_T.tolist(), batch.positions_T.tolist()
        found: list[tuple[int, int, bool]] = []
        read = []  # before anything of this step is stored
        for pages, stored, count in spans:
            places = [page * PAGE_SIZE + place for page in pages for place in range(PAGE_SIZE)]
            assert len(places) >= stored + count
            read.append((places, sum(cache.states[place] for place in places[:stored]) & _WORD))
        for (_, stored, count), (places, before) in zip(spans, read, strict=True):
            for position in range(stored, stored + count):
                token = tokens[len(found)]
                assert positions[len(found)] == position
                state = next_state(before, token, position)
                cache.states[places[position]] = state
                before = (before + state) & _WORD
                found.append((state, token, self.poison and token == NAN_TOKEN))
        assert len(found) == len(tokens)
        picks = torch.tensor([picks_of(state) for state, _, _ in found])
        routes = tuple(Route(picks, (picks + layer) % EXPERTS, picks.float() / 8) for layer in range(LAYERS))
        return HashOutput(found, routes)

    def logits(self, hidden: HashRows) -> torch.Tensor:
        rows = [row_of(state, token) * (np.nan if bad else 1) for state, token, bad in hidden.rows]
        return torch.from_numpy(np.stack(rows).astype(np.float32))


class HashRows:
    """Stands for the hidden states [T, D]."""

    def __init__(self, rows: list[tuple[int, int, bool]]) -> None:
        self.rows = rows

    def __getitem__(self, chosen: Any) -> HashRows:
        return HashRows(self.rows[chosen] if isinstance(chosen, slice) else [self.rows[one] for one in chosen])


class HashOutput:
    """As ``model.Output``."""

    def __init__(self, rows: list[tuple[int, int, bool]], routes: tuple[Route, ...]) -> None:
        self.hidden_TD, self.routes = HashRows(rows), routes


def picks_of(state: int) -> tuple[int, int]:
    """The experts of a token in the first layer; those of the next ones are shifted."""
    first = state % EXPERTS
    return first, (first + 1 + state // EXPERTS % (EXPERTS - 1)) % EXPERTS


def states_of(tokens: Sequence[int]) -> list[int]:
    """Of every token."""
    before, found = 0, []
    for position, token in enumerate(tokens):
        found.append(next_state(before, token, position))
        before = (before + found[-1]) & _WORD
    return found


def written(submit: Submit, index: int) -> list[TokenEvent]:
    """The answer ``index`` of a request by the plainest loop: no pages, no batch, no drafts. ``seed`` must be given."""
    params, prompt = submit.params, submit.prompts[index // submit.n]
    assert params.seed is not None
    stop_ids = (EOS,) if params.stop_ids is None else params.stop_ids
    output: list[int] = []
    events: list[TokenEvent] = []
    states = states_of(prompt)
    total = sum(states) & _WORD
    last, token = states[-1], prompt[-1]
    while len(output) < params.max_tokens:
        row = row_of(last, token)
        allowed = np.ones(V, dtype=bool)
        if params.ignore_eos or len(output) < params.min_tokens:
            allowed[[id for id in stop_ids if id < V]] = False
        position = len(prompt) + len(output)
        draw = {"seed": params.seed, "sequence": index, "position": position, "allowed": allowed}
        token = choosing.choose(row, params, list(prompt), output, **draw)
        output.append(token)
        reason = "stop" if token in stop_ids else "length" if len(output) == params.max_tokens else None
        logprob = None if params.logprobs is None else float(choosing.log_softmax(row)[token])
        events.append(TokenEvent(sequence=index, id=token, logprob=logprob, finish_reason=reason))
        if reason:
            break
        last = next_state(total, token, position)
        total = (total + last) & _WORD
    return events
