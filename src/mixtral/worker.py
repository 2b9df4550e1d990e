"""The main program of an engine process: ``python -m mixtral.worker FD``, where FD is a connected, inherited socket."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence

from mixtral import faults, log
from mixtral.engine.loop import Engine, run
from mixtral.errors import MixtralError
from mixtral.wire import Channel, ChannelClosedError, Failed, Hello, Start, ToEngine
from mixtral.wire.child import confine

__all__ = ["main"]


def main(arguments: Sequence[str], build: Callable[[Start], tuple[Engine, Hello]] | None = None) -> int:
    """Run an engine for the process at the other end of the socket until it closes it; returns an exit code.

    The first message is a ``Start``. ``build`` makes the engine from it; default: ``mixtral.build.build_engine``.
    """
    if len(arguments) != 1 or not arguments[0].isdecimal():
        sys.stderr.write("mixtral.worker is started by `mixtral serve`, with the number of an open socket\n")
        return 2
    confine()
    channel: Channel[ToEngine] = Channel(socket.socket(fileno=int(arguments[0])), ToEngine)
    try:
        return _serve(channel, build or _build)
    finally:
        channel.close()


def _serve(channel: Channel[ToEngine], build: Callable[[Start], tuple[Engine, Hello]]) -> int:
    try:
        first = channel.receive(wait=True)
        if len(first) != 1 or not isinstance(first[0], Start):
            raise RuntimeError(f"the first message is {first[:1]!r:.64}; expected Start alone")
        start = first[0]
        if start.parent not in (None, os.getppid()):
            return 0  # that process ended before this one could ask to end with it
        try:
            faults.install(start.faults)
        except MixtralError as error:
            channel.send([Failed(request="", code=error.code, message=str(error), param="faults")])
            return 2
    except ChannelClosedError:
        return 0
    with log.started(start.log, level=logging.WARNING):
        logging.captureWarnings(True)
        return run(channel, lambda: build(start), beat_s=start.beat_s)


def _build(start: Start) -> tuple[Engine, Hello]:
    from mixtral.build import build_engine  # torch is not needed to refuse wrong arguments

    return build_engine(start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
