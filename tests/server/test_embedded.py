"""The command of the README with the model that ships: the page, the API and the Python call give one answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest
from pageuser import PageUser
from selenium import webdriver

import mixtral

QUESTION = "When does breakfast start?"
FACT = "07:00"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where ``mixtral serve`` listens."""
    command = [sys.executable, "-m", "mixtral", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            found = re.search(r"http://[\d.]+:\d+", line)
            assert found, line + server.stderr.read()
            yield found[0]
        finally:
            server.terminate()
            server.stderr.read()


@pytest.fixture(scope="module")
def expected() -> str:
    llm = mixtral.load("embedded")
    text = llm.chat([{"role": "user", "content": QUESTION}], temperature=0.0, max_tokens=60).content
    assert FACT in text
    return text


def test_the_openai_client_gets_the_answer_whole_and_streamed(address: str, expected: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        ask = {"model": "embedded", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
        assert whole.choices[0].message.content == expected
        parts = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
            if chunk.choices
        ]
    assert "".join(parts) == expected
    assert len([part for part in parts if part]) > 3


@pytest.mark.page
def test_the_page_streams_the_answer(browser: webdriver.Chrome, address: str, expected: str) -> None:
    user = PageUser(browser, address)
    user.open_settings()
    user.set("temperature", "0")
    # Records every length that the answer's text had, so that "it streamed" is seen and not assumed.
    browser.execute_script(
        "window.lengths = new Set();"
        "new MutationObserver(() => {"
        "  const text = document.querySelector('.message.assistant .text');"
        "  if (text) window.lengths.add(text.textContent.length);"
        "}).observe(document.body, {childList: true, subtree: true, characterData: true});"
    )
    user.ask(QUESTION)
    assert user.answers == [expected]
    assert len(user.all(".strip .cell:not(.none)")) > 3
    # The page renews a growing text once per frame, so how many lengths there were is up to the machine.
    assert browser.execute_script("return window.lengths.size") > 1
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] in {"WARNING", "SEVERE"}]
    user.leave()
    assert complaints == []
