"""Streams of one server, or of two in turns, by how many run at once: throughput, first token, gaps between tokens.

    python benchmarks/serving/run.py --model FILE.gguf --llama-server PROGRAM --json out.json --plot out.png

Every stream has a prompt of its own of exactly --prompt random ids, and is answered with exactly --tokens tokens at
temperature 1. One warm-up comes first; then the servers take turns, and the one whose turn it is not is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from results import figures, merge, table, write_plot
from servers import Kind, Server, ServerError, llama_server, ours
from streams import StreamError, prompts, request, wave

from mixtral.bench.machine import machine
from mixtral.bench.others import Watch


def main() -> int:
    """Measure, print a table, write what was asked for."""
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers are ended too
    found: dict[str, Any] = {"settings": _settings(given), "machine": machine(), "turns": {}}
    try:
        if given.merge:
            found = merge(given.merge)
        else:
            _measure(given, found["turns"])
    except (ServerError, StreamError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if given.json and found["turns"]:  # what was measured before something went wrong is kept
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["turns"]))
    if given.plot:
        write_plot(given.plot, found["turns"], given.title or _title(found["settings"]))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a GGUF file, a folder (ours alone), or embedded")
    parser.add_argument("--llama-server", type=Path, help="the program llama-server, to be measured as well")
    parser.add_argument("--only-peer", action="store_true", help="not ours")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="how many at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--shared", type=int, default=0, help="first tokens that all prompts share")
    parser.add_argument("--requests", type=int, default=1, help="of each stream, one after the other")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--vocab-size", type=int, default=32000, help="ids of prompts are below it")
    parser.add_argument("--threads", type=int, default=2, help="of each server")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--server-option", action="append", default=[], help="one more argument of our server")
    parser.add_argument("--peer-option", action="append", default=[], help="one more argument of llama-server")
    parser.add_argument("--json", type=Path, help="all turns, as JSON")
    parser.add_argument("--plot", type=Path, help="a picture (.png or .svg)")
    parser.add_argument("--title", help="of the picture")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing; take the turns of these JSON files")
    return parser.parse_args()


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for turns to be put together."""
    names = ("prompt", "tokens", "shared", "requests", "temperature", "threads", "server_option", "peer_option")
    return {"model": Path(given.model).name, **{name: getattr(given, name) for name in names}}


def _title(settings: dict[str, Any]) -> str:
    lengths = f"{settings['prompt']} tokens in, {settings['tokens']} out"
    return f"{settings['model']}, {lengths}, {settings['threads']} threads"


def _kinds(given: argparse.Namespace) -> list[Kind]:
    made = [] if given.only_peer else [ours(given.model, given.threads, given.server_option)]
    if given.llama_server:
        # As long as prompt and answer, and a little: it keeps room for what it may not need.
        context = -(-(given.prompt + given.tokens + 32) // 256) * 256
        slots = max(given.streams)
        made.append(
            llama_server(
                given.llama_server, given.model, given.threads, slots=slots, context=context, options=given.peer_option
            )
        )
    return made


def _measure(given: argparse.Namespace, turns: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    with contextlib.ExitStack() as stack:
        servers = []
        for kind in _kinds(given):
            servers.append(stack.enter_context(Server(kind)))
            _turn(servers[-1], given, min(4, max(given.streams)), seed=-given.seed)
            servers[-1].pause()
        for turn in range(given.turns):
            for streams in given.streams:
                for server in servers:
                    server.resume()
                    found = _turn(server, given, streams, seed=(given.seed * 1000 + turn) * 1000 + streams)
                    server.pause()
                    rows = turns.setdefault(server.kind.name, {}).setdefault(str(streams), [])
                    rows.append(found)
                    shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
                    print(
                        f"turn {turn + 1}, {streams} streams, {server.kind.name}: {shown}", file=sys.stderr, flush=True
                    )


def _turn(server: Server, given: argparse.Namespace, streams: int, seed: int) -> dict[str, float]:
    count = streams * given.requests
    made = prompts(count, given.prompt, vocab_size=given.vocab_size, seed=seed, shared=given.shared)
    data = [request(server.host, server.body(one, given.tokens, given.temperature)) for one in made]
    before, watch = server.cpu(), Watch(server.group)
    found = asyncio.run(wave(server.address, [data[place::streams] for place in range(streams)]))
    cpu = {part: seconds - before[part] for part, seconds in server.cpu().items()}
    rest = watch.share()
    others = math.nan if rest is None else rest - found.client_cpu / found.seconds / (os.cpu_count() or 1)
    return {**figures(found, tokens=given.tokens, prompt=given.prompt, cpu=cpu), "others_share": max(0.0, others)}


if __name__ == "__main__":
    sys.exit(main())
