"""The files of the chat page, read as text: all are served, none reaches outside, none turns text into markup."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from mixtral.server.app import _FILES, _PAGE

FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(_PAGE.iterdir())}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
BANNED = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
    r"|\beval\b|new Function|import\(|setAttribute\(\"style|\.href = |\.src = |window\.open|location\s*="
)
INLINE = re.compile(r"<[^>]*\s(style|on\w+)=|<style|<script(?![^>]*src=)|javascript:")
LINES = 500


def faults(name: str, text: str) -> Iterator[str]:
    """What a file of the page must not have."""
    for number, line in enumerate(text.splitlines(), 1):
        if name.endswith(".js") and (found := BANNED.search(line)):
            yield f"{name}:{number}: {found[0]}"
        if (found := re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", line)) and "www.w3.org" not in line:
            yield f"{name}:{number}: an address outside: {found[0]}"
        if name.endswith(".html") and re.search(
            r"<[^>]*\s(style|on\w+)=|<style|<script(?![^>]*src=)|javascript:", line
        ):
            yield f"{name}:{number}: inline script or style"
    if len(text.splitlines()) > LINES:
        yield f"{name}: more than {LINES} lines"


def test_every_file_is_served_and_nothing_else() -> None:
    assert sorted(name for name, _ in _FILES.values()) == sorted(FILES)
    page = FILES["index.html"]
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) <= set(_FILES)


def test_scripts_import_what_is_there() -> None:
    for text in SCRIPTS.values():
        for names, source in re.findall(r"import \{([^}]*)\} from \"\./([^\"]+)\"", text):
            for name in filter(None, map(str.strip, names.split(","))):
                assert re.search(rf"export (?:async )?(?:function\*?|class|const) {name}\b", FILES[source]), (
                    name,
                    source,
                )


def test_no_script_has_an_import_that_it_does_not_use() -> None:
    for name, text in SCRIPTS.items():
        body = re.sub(r"import \{[^}]*\} from .*", "", text)
        for names in re.findall(r"import \{([^}]*)\} from", text):
            unused = [each for each in map(str.strip, names.split(",")) if each and not re.search(rf"\b{each}\b", body)]
            assert unused == [], name


@pytest.mark.parametrize("name", FILES)
def test_no_file_has_a_fault(name: str) -> None:
    assert list(faults(name, FILES[name])) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.js", "node.innerHTML = text;"),
        ("a.js", "const work = new Function(text);"),
        ("a.js", 'fetch("https://cdn.example.com/x.js")'),
        ("a.css", "@import url(//fonts.example.com/a.css);"),
        ("a.html", '<p style="color: red">'),
        ("a.html", '<img src="x" onerror="alert(1)">'),
        ("a.html", "<script>alert(1)</script>"),
        ("a.js", "\n" * 501),
    ],
)
def test_faults_are_found(name: str, text: str) -> None:
    assert list(faults(name, text))
