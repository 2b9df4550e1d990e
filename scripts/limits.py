"""Writes the tables of fields in docs/serving.md from the table of limits. Run: python scripts/limits.py"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mixtral.limits import BODY, CHAT, COMPLETIONS, DETOKENIZE, PARTS, REFUSED, TOKENIZE, Limit, markdown

__all__ = ["PAGE", "main", "render"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"


def render(page: str) -> str:
    """The page with every table between its marks written anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->\n)",
        lambda match: f"{match[1]}{_tables()[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def _tables() -> dict[str, str]:
    both = {name: limit for name, limit in CHAT.items() if COMPLETIONS.get(name) == limit}
    return {
        "both": markdown(both),
        "chat": markdown(_without(CHAT, both)),
        "completions": markdown(_without(COMPLETIONS, both)),
        "tokenize": markdown(TOKENIZE),
        "detokenize": markdown(DETOKENIZE),
        "parts": markdown(PARTS),
        "refused": _refused(),
        "body": ", ".join(f"{count:,} {what}" for what, count in BODY.items()),
    }


def _without(fields: dict[str, Limit], others: dict[str, Limit]) -> dict[str, Limit]:
    return {name: limit for name, limit in fields.items() if name not in others}


def _refused() -> str:
    rows = ["| field | may only be | |", "|---|---|---|"]
    for name, refused in REFUSED.items():
        allowed = ", ".join(["null", *(str(value).lower() for value in refused.no_ops)])
        rows.append(f"| `{name}` | {allowed} | {refused.hint} |")
    return "\n".join(rows)


def main() -> None:
    """Write the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(render(page), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}: tables written anew\n")


if __name__ == "__main__":
    main()
