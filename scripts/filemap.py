"""Writes the file map of README.md from the tree: one line per file, described by the file's own first sentence.

A Python file is described by its docstring, any other file by its first comment or heading, or by NOTES below. Tests
are listed by folder. Run: python scripts/filemap.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["BEGIN", "END", "describe", "main", "project_files", "render", "replace"]

BEGIN, END = "<!-- file map: written by `make map` -->", "<!-- end of file map -->"
ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", ".hypothesis", ".coverage", "__pycache__", "build", "dist", "runs", "data"}
# Files that cannot describe themselves.
NOTES = {
    ".gitignore": "what git leaves alone",
    "CHANGELOG.md": "what changed in each version",
    "CONTRIBUTING.md": "how to work on the code",
    "LICENSE": "Apache License 2.0",
    "Makefile": "serve, chat, test, lint and the rest; builds .venv",
    "README.md": "this page",
    "SECURITY.md": "what the program guards against, and how to report a hole",
    "docs/clients.md": "programs that use the server: tested examples with what they print",
    "docs/embedded-model.md": "the embedded model: what it is, how it was trained, held-out scores",
    "docs/images/page-experts.png": "the chat page: experts of an answer",
    "docs/images/serving.png": "speed of the server by number of streams, beside llama.cpp's",
    "docs/images/page-phone.png": "the chat page on a phone",
    "docs/images/page-tools.png": "the chat page: a function call",
    "docs/images/page-wide.png": "the chat page: a conversation",
    "docs/images/training-curves.png": "loss by step of six ways of fine-tuning",
    "docs/images/training-loads.png": "load of the experts by layer and step while all weights are fine-tuned",
    "docs/images/training-skill.png": "a new skill and the old ones, before and after six ways of fine-tuning",
    "benchmarks/training/skill.json": "results of skill.py as data",
    "docs/images/soak.png": "memory, open files and threads of a server over 20 minutes",
    "docs/log.md": "what was tried and did not help",
    "docs/kernels.md": "compiled kernels for packed weights: numbers, layout, threads",
    "docs/naming.md": "words, shape letters, parameter names",
    "docs/performance.md": "measured time and memory",
    "docs/serving.md": "the HTTP interface",
    "docs/training.md": "how the embedded model is trained",
    "pyproject.toml": "metadata, dependencies, settings of ruff, mypy and pytest",
    "src/mixtral/embedded/CARD.md": "model card: data, training, held-out scores, limits",
    "docs/grafana.json": "dashboard of a server's metrics",
    "src/mixtral/embedded/config.json": "configuration of the embedded model",
    "src/mixtral/embedded/manifest.json": "size and sha256 of the weights",
    "src/mixtral/embedded/model.safetensors": "weights of the embedded model",
    "src/mixtral/embedded/scores.json": "held-out scores of the embedded model as data",
    "src/mixtral/server/page/icon.svg": "the chat page: icon",
    "src/mixtral/py.typed": "tells type checkers that the package is typed",
    "tests/oracles/": "slow and plain definitions that tests compare with",
    "tests/pinned/": "what must not change unseen: the public names",
}


def project_files(root: Path) -> list[str]:
    """Paths of all files of the project, relative to `root`, sorted: what git tracks or would track, else the tree."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        names = {name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()}
    else:
        names = {
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.is_file() and not _skipped(path.relative_to(root))
        }
    return sorted(names)


def _skipped(path: Path) -> bool:
    return any(part in SKIPPED or part.endswith(("_cache", ".egg-info")) for part in path.parts)


def describe(root: Path, name: str) -> str:
    """One line that says what a file is. Raises ValueError if neither the file nor NOTES says it."""
    if name in NOTES:
        return NOTES[name]
    text = (root / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    else:
        pattern = r"^\s*(?:#!.*\n)?(?:<!doctype[^>]*>\s*)?(?:#+|//|/\*+|<!--)\s*(.+?)\s*(?:\*/|-->)?\s*$"
        found = re.search(pattern, text.split("\n\n")[0], re.MULTILINE | re.IGNORECASE)
        first = found[1] if found else ""
    first = first.replace("``", "`").split(". ")[0].strip().rstrip(".:,")
    if not first:
        raise ValueError(f"{name}: nothing describes it; give it a first line, or a note in scripts/filemap.py")
    return first


def render(root: Path) -> str:
    """The map: files one by one, tests as one line per folder."""
    rows: dict[str, str] = {}
    for name in project_files(root):
        folder = name.rsplit("/", 1)[0]
        if name.startswith("tests/") and folder != "tests":
            folder = "/".join(name.split("/")[:2])
            rows[f"{folder}/"] = NOTES.get(f"{folder}/", f"tests of {folder.removeprefix('tests/')}")
        else:
            rows[name] = describe(root, name)
    width = max(len(name) for name in rows)
    lines = [f"{name:{width}}  {text}" for name, text in sorted(rows.items(), key=_order)]
    return "\n".join([BEGIN, "```text", *lines, "```", END])


def _order(row: tuple[str, str]) -> tuple[bool, str, bool, str]:
    folder, _, name = row[0].rpartition("/")
    return ("/" in row[0], folder if name else row[0], name != "__init__.py", name)


def replace(readme: str, block: str) -> str:
    """`readme` with its map replaced by `block`. Raises ValueError if the two marks are not there once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN!r} and {END!r} once each")
    return readme[: readme.index(BEGIN)] + block + readme[readme.index(END) + len(END) :]


def main() -> int:
    """Write README.md if its map is out of date."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = replace(old, render(ROOT))
    if new != old:
        path.write_text(new, encoding="utf-8")
        sys.stdout.write("README.md: file map written anew\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
