"""Wall time of `import mixtral` and of `mixtral --help`, median of 7 fresh interpreters, beside an empty one.

Run: python benchmarks/startup.py
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time

__all__ = ["main", "median_s"]

ROUNDS = 7
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import mixtral": [sys.executable, "-c", "import mixtral"],
    "mixtral --help": [sys.executable, "-m", "mixtral", "--help"],
}


def median_s(command: list[str], rounds: int = ROUNDS) -> float:
    """Median wall time of a command in seconds, after one run that warms the file cache."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Print one line per command."""
    print(f"Python {platform.python_version()}, {platform.machine()}, median of {ROUNDS} runs")
    for name, command in COMMANDS.items():
        print(f"{name:16} {median_s(command) * 1000:7.0f} ms")


if __name__ == "__main__":
    main()
