"""Tables of several files of `mixtral evaluate --json` side by side, for docs/embedded-model.md.

Run: python scripts/score_tables.py bf16=a.json int8=b.json int4=c.json [--languages int8]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mixtral.evaluate.desk import SuiteScore

__all__ = ["beside", "by_language", "main"]

Columns = Mapping[str, Mapping[str, SuiteScore]]


def read(path: Path) -> dict[str, SuiteScore]:
    """The scores of a file by suite."""
    made = json.loads(path.read_text(encoding="utf-8"))
    return {row["suite"]: SuiteScore(**row) for row in made["scores"]}


def beside(columns: Columns) -> str:
    """A row per suite, a column per file: per cent with the interval; the number of documents, if it differs, too."""
    suites = list(dict.fromkeys(suite for scores in columns.values() for suite in scores))
    lines = [f"| suite | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for suite in suites:
        cells = [_cell(scores.get(suite)) for scores in columns.values()]
        lines.append(f"| {suite} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(score: SuiteScore | None) -> str:
    if score is None:
        return ""
    return f"{100 * score.correct / score.n:.1f} ({100 * score.low:.1f}-{100 * score.high:.1f}; n {score.n})"


def by_language(scores: Mapping[str, SuiteScore]) -> str:
    """A row per skill, a column per language: right answers in per cent of so many; and answers in that language."""
    found: dict[str, dict[str, list[int]]] = {}
    for suite, score in scores.items():
        rows = found.setdefault(suite.partition("/")[0], {})
        for language, counts in score.languages.items():
            rows[language] = [a + b for a, b in zip(rows.get(language, [0, 0, 0]), counts, strict=True)]
    languages = sorted({language for rows in found.values() for language in rows})
    lines = [f"| skill | {' | '.join(languages)} |", "|---|" + "---:|" * len(languages)]
    for skill, rows in found.items():
        cells = [_share(rows.get(language), 0) for language in languages]
        lines.append(f"| {skill} | {' | '.join(cells)} |")
    if "chat" in found:
        cells = [_share(found["chat"].get(language), 1) for language in languages]
        lines.append(f"| chat, answers in that language | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(counts: Sequence[int] | None, which: int) -> str:
    return f"{100 * counts[which] / counts[2]:.1f} ({counts[2]})" if counts else ""


def main() -> None:
    """Print the tables."""
    names = [argument.partition("=") for argument in sys.argv[1:] if "=" in argument]
    if not names:
        sys.exit(__doc__)
    columns = {name: read(Path(path)) for name, _, path in names}
    sys.stdout.write(beside(columns))
    if "--languages" in sys.argv:
        sys.stdout.write("\n" + by_language(columns[sys.argv[sys.argv.index("--languages") + 1]]))


if __name__ == "__main__":
    main()
