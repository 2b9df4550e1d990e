"""What the prefix cache saves of the time to the first token: a prompt is sent twice, the first time it is new.

    python benchmarks/serving/prefix.py --model embedded --prompt 1040

The second time, all full pages (64 tokens) of the prompt are found in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys

from servers import Server, ServerError, ours
from streams import StreamError, prompts, request, wave


def main() -> int:
    """Print a line with medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a GGUF file, a folder, or embedded")
    parser.add_argument("--prompt", type=int, default=1040, help="tokens of each prompt")
    parser.add_argument("--vocab-size", type=int, default=32000, help="ids of prompts are below it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    new: list[float] = []
    known: list[float] = []
    try:
        with Server(ours(given.model, given.threads, [])) as server:
            # The first one warms up. Some tokens have no text; the same seed makes both answers equal.
            for ids in prompts(given.turns + 1, given.prompt, vocab_size=given.vocab_size, seed=1):
                data = request(server.host, {**server.body(ids, 16, 1.0), "seed": 1})
                for times in (new, known):
                    times.append(asyncio.run(wave(server.address, [[data]])).answers[0].first)
    except (ServerError, StreamError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first, again = statistics.median(new[1:]), statistics.median(known[1:])
    print(
        f"{given.prompt} tokens, median of {given.turns}: new {1e3 * first:.1f} ms, known {1e3 * again:.1f} ms, "
        f"{first / again:.1f} times as fast"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
