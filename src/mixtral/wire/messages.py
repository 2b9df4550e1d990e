"""Messages between the text side and an engine, in one process or two: requests in, updates of them out."""

from __future__ import annotations

from typing import Literal

import msgspec

from mixtral.wire.sampling import SamplingParams

__all__ = [
    "Abort",
    "AdapterInfo",
    "Candidate",
    "Constraint",
    "Done",
    "Failed",
    "FinishReason",
    "FromEngine",
    "Heartbeat",
    "Hello",
    "Pause",
    "PromptScores",
    "PromptToken",
    "Routing",
    "Scheduled",
    "Start",
    "Started",
    "Stats",
    "Submit",
    "ToEngine",
    "TokenEvent",
    "Tokens",
    "Update",
]

FinishReason = Literal["stop", "length"]


class Constraint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What tokens must follow. Grammars are llguidance's, as text (its JSON form, or Lark).

    ``trigger`` is the control id that opens function calls. It can only be the first token of an answer: with
    ``forced`` it must be, with ``calls`` it may be, and without ``calls`` it never is. What follows it obeys ``calls``;
    an answer that begins otherwise obeys ``text``, or nothing if that is None.

    Grammars describe text without the space that a text loses at its start; with ``continues`` the answer goes on with
    other text and keeps that space.
    """

    text: str | None = None
    calls: str | None = None
    trigger: int | None = None
    forced: bool = False
    continues: bool = False


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start", forbid_unknown_fields=True):
    """The first message to an engine process: what to load, as in ``mixtral.load``, and how to run it.

    None takes the default. ``adapters`` are folders by name, for requests that choose one. ``max_model_len`` may only
    shorten the context. ``cache_bytes`` is the memory for keys and values. ``parent`` is the process that the engine
    must not outlive. ``faults`` are failpoints, for tests alone.
    """

    model: str = "embedded"
    name: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    decode: bool = False
    reference: bool = False
    kv_dtype: str | None = None
    packed_cache: str | None = None
    adapter: str | None = None
    adapters: dict[str, str] = {}
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_tokens_beside_answers: int | None = None
    cache_bytes: int | None = None
    prefix_cache: bool = True
    log: Literal["text", "json"] = "text"
    parent: int | None = None
    beat_s: float = 1.0
    faults: tuple[str, ...] = ()


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """A request for an engine: ``n`` answers to each prompt. Answer c to prompt p is the sequence ``p * n + c``.

    ``scope`` separates prefix caches: pages are shared between requests of equal scope only. Of two requests that wait,
    the one with the lower ``priority`` comes first. ``routing`` asks for the experts of every token that is computed,
    of the prompt too with ``routing_prompt`` (which then is computed even where a cached prefix would do). ``adapter``
    is the name of one in ``Hello``; None is the base.
    """

    request: str
    prompts: list[list[int]]
    params: SamplingParams
    n: int = 1
    constraint: Constraint | None = None
    scope: str = ""
    priority: int = 0
    routing: bool = False
    routing_prompt: bool = False
    adapter: str | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Forget a request, or only one ``sequence`` of it. Nothing more comes for it; one that is unknown or finished is
    left alone. When the other sequences of a request are finished it is done, as if this one had not been asked for."""

    request: str
    sequence: int | None = None


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag="pause"):
    """With ``on``, stop working on a request, whose reader is behind, and free what it holds; without, go on with it.

    Some updates may still be on their way. A request that is unknown or finished is left alone.
    """

    request: str
    on: bool


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """Experts of consecutive tokens of one sequence, the first of them at position ``first``.

    ``experts`` is uint8 [T, L, A], the larger weight first; ``weights`` little-endian float16 of the same shape.
    """

    first: int
    experts: bytes
    weights: bytes


class Candidate(msgspec.Struct, frozen=True):
    """One token id with its log-probability under the raw logits (before penalties and temperature)."""

    id: int
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sampled token of one sequence. ``finish_reason`` is set on the last event of the sequence.

    ``routing`` holds the tokens that were computed to get here, so the last token of an answer is in no event.
    """

    sequence: int
    id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()
    finish_reason: FinishReason | None = None
    routing: Routing | None = None


class PromptToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token of a prompt with its log-probability given those before it; the first token has none."""

    id: int
    logprob: float | None = None
    top: tuple[Candidate, ...] = ()


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """A request left the queue. ``cached`` tokens of each prompt were found in the prefix cache."""

    request: str
    cached: tuple[int, ...]


class PromptScores(msgspec.Struct, frozen=True, kw_only=True, tag="prompt"):
    """The tokens of the prompt with the given index, for requests with ``prompt_logprobs``."""

    request: str
    prompt: int
    tokens: list[PromptToken]


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Tokens of one request, in the order in which they were sampled."""

    request: str
    events: list[TokenEvent]


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """All sequences of a request are finished (with ``max_tokens`` 0: its prompts are scored)."""

    request: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A request ended by a fault: a stable ``code`` and a message that may be shown to its client."""

    request: str
    code: str
    message: str
    param: str | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Counters since the engine started, and what it holds now. ``expert_tokens`` is [L][E]."""

    steps: int = 0
    step_seconds: float = 0.0
    waiting: int = 0
    waiting_tokens: int = 0
    running: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    expert_tokens: list[list[int]] = []


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter that requests can choose: the last part of its path, and the memory that it takes."""

    root: str
    size_bytes: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message of an engine process: what it serves.

    ``tokenizer`` is v1, v2 or v3; ``respell`` maps ids that were not trained to the ids that spell them.
    ``cache_tokens`` is what the pages hold: a sequence that needs more is refused. ``adapters`` are by name.
    """

    name: str
    context: int
    vocab_size: int
    layers: int
    experts: int
    tokenizer: str
    respell: dict[int, tuple[int, ...]] = {}
    cache_tokens: int
    fingerprint: str
    adapters: dict[str, AdapterInfo] = {}


class Scheduled(msgspec.Struct, frozen=True, kw_only=True, tag="scheduled"):
    """The requests that the next step works on; sent before that step where they are others than told before."""

    requests: list[str]


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent about once a second by a thread of its own; ``step_age`` is how long the present step has lasted.

    ``seconds`` is what each step took that ended since the last one.
    """

    step: int
    step_age: float
    stats: Stats
    seconds: list[float] = []


Update = Started | PromptScores | Tokens | Done | Failed
ToEngine = Start | Submit | Abort | Pause
FromEngine = Hello | Heartbeat | Scheduled | Started | PromptScores | Tokens | Done | Failed
