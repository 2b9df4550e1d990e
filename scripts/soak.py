"""A soak test: a real server under mixed load for minutes, with engines killed under it; errors, growth, bytes.

Run: python scripts/soak.py [--minutes 20] [--kills 2] [--rate 4] [--json FILE] [--plot FILE] [--log FILE]

The load stays below what the server can do: chats in five languages, streamed or not, several answers at once, long
prompts, constrained answers, function calls, wrong requests, slow readers, clients that leave. In the first part the
engine is killed (SIGKILL) now and then; what its requests are told then is counted apart. It passes if

- no answer is a 5xx, breaks off, or is other than it should be, except where a kill explains it;
- nobody waits for an answer that does not come, and at the end the server holds no request and no page;
- after warm-up the resident memory of a process grows by at most 1 MiB a minute (Theil-Sen), files and threads by none;
- the first prompts are answered with the same bytes all the time.

The exit code is 0 if it passes, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from soak_load import SENTINELS, Load, Outcome, sentinel

__all__ = ["Life", "Sample", "Window", "judge", "main", "slope"]

MOST_GROWTH = 1.0
"""MiB a minute that the memory of a process may grow after warm-up."""
JUDGED_S = 60.0
"""A process must live so long after its warm-up to be judged."""
DEATHS, DEATHS_WITHIN_S = 3, 600.0
"""So many deaths of the engine within this time end a server, by design."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time; memory in bytes."""

    at: float
    rss: int
    anonymous: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Window:
    """From a kill until the next engine was ready."""

    begin: float
    end: float

    def explains(self, outcome: Outcome) -> bool:
        """Whether a request may have been told of it; a quarantine lasts ten minutes."""
        lasts = DEATHS_WITHIN_S if outcome.code == "request_quarantined" else 0.0
        return outcome.by_fault and outcome.began <= self.end + lasts and outcome.ended >= self.begin


@dataclass(slots=True)
class Life:
    """One process from its first to its last sample. ``what`` is "http", "engine" or "trial"."""

    what: str
    pid: int
    samples: list[Sample]

    def report(self, warm_s: float) -> dict[str, Any]:
        """Growth after warm-up; None where it was too short to be judged."""
        first = self.samples[0].at
        settled = [each for each in self.samples if each.at >= first + warm_s]
        judged = len(settled) > 10 and settled[-1].at - settled[0].at >= JUDGED_S
        minutes = [(each.at - first) / 60 for each in settled]
        return {
            "what": self.what,
            "pid": self.pid,
            "minutes": round((self.samples[-1].at - first) / 60, 2),
            "rss_mib": [round(each.rss / MIB, 1) for each in (self.samples[0], *settled[:1], self.samples[-1])],
            "rss_mib_per_minute": round(slope(minutes, [s.rss / MIB for s in settled]), 4) if judged else None,
            "anonymous_mib_per_minute": round(slope(minutes, [s.anonymous / MIB for s in settled]), 4)
            if judged
            else None,
            "files_growth": growth([each.files for each in settled]) if judged else None,
            "threads_growth": growth([each.threads for each in settled]) if judged else None,
        }


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen): single bursts do not move it."""
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(len(x), k=1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def growth(counts: Sequence[int]) -> float:
    """Median of the last fifth less that of the first."""
    part = max(1, len(counts) // 5)
    return statistics.median(counts[-part:]) - statistics.median(counts[:part])


def judge(
    outcomes: Sequence[Outcome], windows: Sequence[Window], lives: Sequence[dict[str, Any]], *, short: bool
) -> tuple[list[str], Counter[str]]:
    """What is wrong, and what kills explain. ``short``: the run was too short to judge memory."""
    problems: list[str] = []
    explained: Counter[str] = Counter()
    for each in outcomes:
        if each.problem and any(window.explains(each) for window in windows):
            explained[each.code] += 1
        elif each.problem:
            problems.append(f"{each.kind} at {time.strftime('%H:%M:%S', time.gmtime(each.began))}: {each.problem}")
    for what in () if short else ("http", "engine"):
        if not any(life["what"] == what and life["rss_mib_per_minute"] is not None for life in lives):
            problems.append(f"no {what} process lived long enough to be judged")
    for life in lives:
        if life["rss_mib_per_minute"] is None:
            continue
        name = f"{life['what']} process {life['pid']}"
        if life["rss_mib_per_minute"] > MOST_GROWTH:
            problems.append(f"{name}: memory grows by {life['rss_mib_per_minute']} MiB a minute")
        for kind, most in (("files", 2), ("threads", 1)):
            if life[f"{kind}_growth"] > most:
                problems.append(f"{name}: {kind} grow by {life[f'{kind}_growth']}")
    return problems, explained


class Family:
    """A server process and its children, looked at every ``every_s`` seconds in a thread."""

    def __init__(self, pid: int, every_s: float) -> None:
        self.pid = pid
        self.lives: dict[int, Life] = {}
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def engine(self) -> int | None:
        """The engine process that runs now."""
        return next((pid for pid, what in self._members() if what == "engine"), None)

    def files(self) -> int:
        """Open files of the HTTP process without those to trial processes (two pipes) and text processes (a socket)."""
        links = sum({"trial": 2, "text": 1}.get(what, 0) for _, what in self._members())
        return len(os.listdir(f"/proc/{self.pid}/fd")) - links

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            for pid, what in [(self.pid, "http"), *self._members()]:
                try:
                    found = _sample(pid)
                except (OSError, KeyError):
                    continue  # it has just ended
                self.lives.setdefault(pid, Life(what, pid, [])).samples.append(found)

    def _members(self) -> list[tuple[int, str]]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.pid and fields[0] != "Z":
                    command = (folder / "cmdline").read_bytes()
                    found.append((int(folder.name), _kind(command)))
            except OSError:
                continue
        return found


def _kind(command: bytes) -> str:
    """What a process of the server does, by its command line."""
    if b"mixtral.worker" in command:
        return "engine"
    return "text" if b"mixtral.server.textchild" in command else "trial"


def _sample(pid: int) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    rss, anonymous = (int(fields[name][0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return Sample(time.time(), rss, anonymous, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"][0]))


class Soak:
    """One run: the server, its family, the clients, the kills."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seconds = options.minutes * 60
        self.warm_s = min(240.0, 0.3 * self.seconds)
        self.windows: list[Window] = []
        self.notes: list[str] = []
        self.server: subprocess.Popen[str] | None = None

    def run(self) -> dict[str, Any]:
        """Everything, to the report."""
        # The cache is small, so that it is full before memory is judged.
        command = [sys.executable, "-m", "mixtral", "serve", "--port", "0", "--kv-cache-memory", "64MiB"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as self.server:
            try:
                return self._with(self.server)
            finally:
                self.server.kill()

    def _with(self, server: subprocess.Popen[str]) -> dict[str, Any]:
        address = self._address(server)
        family = Family(server.pid, min(2.0, self.seconds / 60))
        load = Load(address, self.options.seed, rate=self.options.rate)
        first = [sentinel(address, text, stream=False).texts[0] for text in SENTINELS]
        load.expected.update(zip(SENTINELS, first, strict=True))
        load.warm_up()
        quiet = self._quiet(address, family)
        began = time.time()
        family.start()
        load.start()
        self._kills(address, family, began)
        time.sleep(max(0.0, began + self.seconds - time.time()))
        if left := load.stop(within_s=100.0):
            self.notes.append(f"{left} clients hang")
        after = self._quiet(address, family)
        if after > quiet:
            self.notes.append(f"{after} open files at rest after the load; before it there were {quiet}")
        last = [sentinel(address, text, stream=True).texts[0] for text in SENTINELS]
        if first != last:
            self.notes.append(f"the first prompts were answered {first!r}, at the end {last!r}")
        metrics = self._metrics(address)
        family.stop()
        server.send_signal(signal.SIGTERM)
        if (code := server.wait(60)) != 0:
            self.notes.append(f"the server ended with code {code}")
        return self._report(load.outcomes, list(family.lives.values()), metrics, began)

    def _address(self, server: subprocess.Popen[str]) -> str:
        """Where it listens; from then on its log goes to a file, or nowhere."""
        if server.stderr is None:
            raise RuntimeError("no pipe")
        lines = server.stderr
        for line in lines:
            if found := re.search(r"http://[\d.]+:\d+", line):
                threading.Thread(target=self._keep, args=(lines,), daemon=True).start()
                return found[0]
        raise RuntimeError("the server did not start")

    def _keep(self, lines: Any) -> None:
        with (self.options.log or Path(os.devnull)).open("w") as file:
            for line in lines:
                file.write(line)
                file.flush()

    def _kills(self, address: str, family: Family, began: float) -> None:
        """Kill the engine at equal distances in the first part of the run, and see it come back."""
        for number in range(self.options.kills):
            at = began + 0.15 * self.seconds * (number + 1)
            time.sleep(max(0.0, at - time.time()))
            pid = family.engine()
            if pid is None:
                self.notes.append("there is no engine to kill")
                continue
            begin = time.time()
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
            while not self._ready(address):
                if time.time() - begin > 60:
                    self.notes.append("no engine came back within 60 s")
                    break
                time.sleep(0.1)
            self.windows.append(Window(begin, time.time()))

    def _ready(self, address: str) -> bool:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _quiet(self, address: str, family: Family) -> int:
        """Wait until nothing is open; the open files of the HTTP process then."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = self._metrics(address)
            busy = found["mixtral_running"] + found["mixtral_queue_requests"] + found['mixtral_kv_pages{state="used"}']
            if not busy:
                break
            time.sleep(0.5)
        else:
            self.notes.append(f"the server is not at rest after 30 s: {busy:g} requests or pages are held")
        time.sleep(6)  # until connections without a request are closed
        return family.files()

    def _metrics(self, address: str) -> dict[str, float]:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def _report(
        self, outcomes: list[Outcome], lives: list[Life], metrics: dict[str, float], began: float
    ) -> dict[str, Any]:
        rows = [life.report(self.warm_s) for life in lives]
        problems, explained = judge(outcomes, self.windows, rows, short=self.seconds - self.warm_s < 2 * JUDGED_S)
        known = ('code="engine_dead"', 'code="engine_restarting"', 'route="/ready"')
        for name, count in metrics.items():
            failed = re.match(r'mixtral_requests_total\{.*status="5', name)
            if failed and not any(each in name for each in known):
                problems.append(f"the server counted {count:g} of {name}")
        took = sorted(each.ended - each.began for each in outcomes)
        return {
            "passed": not (problems or self.notes),
            "problems": [*self.notes, *problems],
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "minutes": self.options.minutes,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "warm_up_seconds": self.warm_s,
            "requests": dict(sorted(Counter(each.kind for each in outcomes).items())),
            "total": len(outcomes),
            "tokens": sum(each.tokens for each in outcomes),
            "seconds": {f"p{share}": round(took[len(took) * share // 100], 3) for share in (50, 90, 99)},
            "kills": [round(window.begin - began, 1) for window in self.windows],
            "explained_by_kills": dict(explained),
            "processes": rows,
            "metrics": {name: value for name, value in metrics.items() if name.startswith("mixtral_requests_total")},
            "samples": {
                f"{life.what} {life.pid}": [{**asdict(each), "at": round(each.at - began, 1)} for each in life.samples]
                for life in lives
            },
        }


def draw(report: dict[str, Any], path: Path) -> None:
    """Memory, files and threads of each process over time."""
    from matplotlib.figure import Figure  # without pyplot: no window system is touched

    figure = Figure(figsize=(9, 8), layout="constrained")
    verdict = "passed" if report["passed"] else "failed"
    figure.suptitle(f"{report['minutes']} minutes, {report['total']} requests, {verdict}", fontsize="medium")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (key, scale, label) in zip(
        panels, (("rss", MIB, "resident MiB"), ("files", 1, "open files"), ("threads", 1, "threads")), strict=True
    ):
        for name, samples in report["samples"].items():
            axes.plot([s["at"] / 60 for s in samples], [s[key] / scale for s in samples], label=name, linewidth=1)
        for at in report["kills"]:
            axes.axvline(at / 60, linestyle="--", linewidth=1, color="black")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize="small")
    panels[-1].set_xlabel("minutes; dashed: the engine was killed")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Parse the options, run, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    options = parser.parse_args()
    if options.kills >= DEATHS and 0.15 * options.minutes * 60 * (DEATHS - 1) <= DEATHS_WITHIN_S:
        parser.error(f"{DEATHS} deaths within {DEATHS_WITHIN_S:g} s end a server; take fewer kills or more minutes")
    report = Soak(options).run()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        draw(report, options.plot)
    shown = {key: value for key, value in report.items() if key not in ("samples", "metrics")}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
