"""Sizes and switches of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral.engine.pages import PAGE_SIZE
from mixtral.errors import ConfigError

__all__ = ["EngineConfig"]

_SEQUENCES = 4  # of full length, that the default cache has room for
_SHARE = 0.5  # of the memory that is left, that the default cache takes at most
_MOST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much an engine holds and does at once.

    The cache has ``pages`` pages of 64 tokens, or as many as fit ``cache_bytes``; with neither, room for four
    sequences of the full context, but at most half of the memory that is free when the engine is made. At most
    ``max_num_seqs`` sequences run at once, and a step computes at most ``max_num_batched_tokens`` tokens. One that
    also writes answers computes at most ``max_tokens_beside_answers``, or half as many of prompts if that is more: the
    fewer, the less an answer waits for its next token; None changes nothing. With ``prefix_cache``, sequences of equal
    beginning and scope share what is computed; with ``speculation``, tokens that the text so far suggests are computed
    ahead and checked. Neither changes a token.

    Raises:
        ConfigError: a number is out of range, or both sizes of the cache are given.
    """

    pages: int | None = None
    cache_bytes: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_tokens_beside_answers: int | None = None
    prefix_cache: bool = True
    speculation: bool = True

    def __post_init__(self) -> None:
        if self.pages is not None and self.cache_bytes is not None:
            raise ConfigError("pages and cache_bytes are both given; expected one of them", param="pages")
        for name, value, least in (
            ("pages", self.pages, 1),
            ("cache_bytes", self.cache_bytes, 1),
            ("max_num_seqs", self.max_num_seqs, 1),
            ("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs),
            ("max_tokens_beside_answers", self.max_tokens_beside_answers, 2),
        ):
            most = None if name == "cache_bytes" else _MOST
            if value is not None and (value < least or (most is not None and value > most)):
                told = "" if most is None else f" and at most {most}"
                raise ConfigError(f"{name} is {value}; expected at least {least}{told}", param=name)

    def page_count(self, page_bytes: int, context: int, free_bytes: int) -> int:
        """The pages of the cache of a model whose pages have ``page_bytes``, with ``free_bytes`` of memory left.

        Raises:
            ConfigError: ``cache_bytes``, or what is left, holds no page.
        """
        if self.pages is not None:
            return self.pages
        if self.cache_bytes is not None:
            count = min(self.cache_bytes // page_bytes, _MOST)
        else:
            wanted = _SEQUENCES * -(-context // PAGE_SIZE)
            count = min(wanted, int(free_bytes * _SHARE) // page_bytes)
        if count < 1:
            raise ConfigError(
                f"the cache gets {self.cache_bytes or int(free_bytes * _SHARE)} bytes; a page of {PAGE_SIZE} tokens "
                f"takes {page_bytes}",
                param="cache_bytes",
            )
        return count
