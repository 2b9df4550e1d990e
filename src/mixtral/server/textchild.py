"""A process that reads long requests: ``python -m mixtral.server.textchild FD``, where FD is an inherited socket."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtral import log
from mixtral.grammar import Source, calls_constraint, text_constraint
from mixtral.server.errors import ApiError, as_api_error
from mixtral.server.reading import read
from mixtral.server.texts import Answer, Ask, FromText, Model, Part, Ready, Refused, ToText, in_parts
from mixtral.server.work import Prepared
from mixtral.tokenizer import Tokenizer
from mixtral.wire import AdapterInfo, Channel, ChannelClosedError, frames_of
from mixtral.wire.child import confine

__all__ = ["main"]

_log = logging.getLogger("mixtral.server")


@dataclass(frozen=True, slots=True)
class _Facts:
    """See ``Facts``."""

    name: str
    adapters: Mapping[str, AdapterInfo]
    context: int
    cache_tokens: int
    vocab_size: int
    layers: int
    tokenizer: Tokenizer


class _Formats:
    """A Grammar that writes grammars and tries none; that is done where its answers go."""

    cache_bytes = 0

    def text_constraint(self, response_format: Mapping[str, Any]) -> Source | None:
        return text_constraint(response_format)

    def calls_constraint(self, tools: Sequence[Mapping[str, Any]], *, name: str | None, parallel: bool) -> Source:
        return calls_constraint(tools, name=name, parallel=parallel)

    def check(self, source: Any) -> None:
        raise RuntimeError("grammars are not tried in this process")

    def close(self) -> None:
        pass


def main(arguments: Sequence[str]) -> int:
    """Read requests until the other side closes the socket; returns an exit code."""
    if len(arguments) != 1 or not arguments[0].isdecimal():
        sys.stderr.write("mixtral.server.textchild is started by `mixtral serve`, with the number of an open socket\n")
        return 2
    confine()
    channel: Channel[ToText] = Channel(socket.socket(fileno=int(arguments[0])), ToText)
    with log.started("text", level=logging.WARNING):
        try:
            _serve(channel)
        except ChannelClosedError:
            return 0
        finally:
            channel.close()
    return 0


def _serve(channel: Channel[ToText]) -> None:
    facts: _Facts | None = None
    grammar: _Formats | None = None
    body = bytearray()
    while True:
        for message in channel.receive(wait=True):
            if isinstance(message, Part):
                body += message.data
            elif isinstance(message, Model):
                if message.parent != os.getppid():
                    return  # that process ended before this one could ask to end with it
                facts = _known(message)
                grammar = _Formats() if message.grammar else None
                channel.send([Ready()])
            elif facts is None:
                raise RuntimeError("a request came before the model that it is for")
            else:
                whole = bytes(body)
                body.clear()
                _answer(channel, message, facts, whole, grammar)


def _answer(channel: Channel[ToText], ask: Ask, facts: _Facts, body: bytes, grammar: _Formats | None) -> None:
    end: FromText = Answer()
    try:
        found = read(ask.route, facts, body, ask.holder, grammar)
    except Exception as error:
        known = as_api_error(error)
        if known.status >= 500 and not isinstance(error, ApiError):
            _log.exception("a long request cannot be read")
        found = b""
        end = Refused(
            status=known.status, code=known.code, message=known.message, param=known.param, headers=known.headers
        )
    if isinstance(found, Prepared):
        end = found
    else:
        for frame in in_parts(found):
            channel.send_bytes(frame)
    channel.send_bytes(frames_of([end]))


def _known(model: Model) -> _Facts:
    tokenizer = Tokenizer.from_version(model.tokenizer, respell=model.respell)
    sizes = (model.context, model.cache_tokens, model.vocab_size, model.layers)
    return _Facts(model.name, model.adapters, *sizes, tokenizer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
