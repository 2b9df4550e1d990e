"""What the server asks of an engine: a description, and a stream of updates for every request that is submitted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from mixtral.errors import MixtralError
from mixtral.server.metrics import Metrics
from mixtral.tokenizer import Tokenizer
from mixtral.wire import AdapterInfo, Submit, Update

__all__ = ["Engine", "Facts", "Run", "State"]

State = Literal["starting", "ready", "stalled", "restarting", "dead", "draining"]


class Run(Protocol):
    """Updates of one request, ``Started`` first and ``Done`` last; None is a pause of ``wait_note_s`` without any.

    A reader may cancel its wait for the next update and wait again; no update is lost. ``Failed`` becomes an ApiError.
    """

    def __aiter__(self) -> Run: ...

    async def __anext__(self) -> Update | None: ...

    def abort(self, sequence: int) -> None:
        """End one sequence; what still comes for it means nothing."""
        ...


class Facts(Protocol):
    """What a request is read for: a base, and adapters by name. ``context`` counts tokens of prompt and answer;
    ``cache_tokens`` is what one sequence may need of the key-value cache.
    """

    @property
    def name(self) -> str: ...

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]: ...

    @property
    def context(self) -> int: ...

    @property
    def cache_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


class Engine(Facts, Protocol):
    """A model behind a queue. Two engines of equal ``fingerprint`` give equal answers to equal requests."""

    @property
    def experts(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def state(self) -> State:
        """Whether requests are taken ("ready") and, if not, why."""
        ...

    @property
    def metrics(self) -> Metrics:
        """What is counted: of the engine by itself, of answers by the server around it."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request is open."""
        ...

    async def start(self) -> None:
        """Begin, in the event loop that calls this; returns before requests are taken."""
        ...

    async def until_ready(self) -> None:
        """Wait until requests are taken. Raises MixtralError when that will never be."""
        ...

    async def until_ended(self) -> MixtralError:
        """Wait for the fault that ends the engine for good, if one ever does."""
        ...

    def run(self, submit: Submit) -> AbstractAsyncContextManager[Run]:
        """Submit a request. Leaving the block, for whatever reason, ends it in the engine within a step.

        Raises:
            ApiError: 503 when the engine takes no requests now.
        """
        ...

    def drain(self) -> None:
        """Refuse new requests; those that were submitted are finished."""
        ...

    def abort(self) -> None:
        """Refuse new requests and end all others with ``server_shutting_down``."""
        ...

    async def close(self) -> None:
        """Abort what is left, and give everything back."""
        ...
