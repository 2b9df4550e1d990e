"""Experts on the chat page: the strip, one token in all layers, the heat map, servers that do not report experts."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from pagefake import EXPERTS, LAYERS, PROMPT_TOKENS, PageServer, Reply, experts_of, tokens_of
from pageuser import PageUser
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.page, pytest.mark.slow]
TEXT = "Breakfast is from 07:00 to 10:30."
TOKENS = tokens_of(TEXT)


def strip(user: PageUser) -> list[str]:
    return user.texts(".strip .cell b")


def expected(layer: int, count: int = len(TOKENS)) -> list[str]:
    """First expert of each token."""
    return [str(experts_of(PROMPT_TOKENS + place)[layer][0][0]) for place in range(count)]


def test_each_token_has_a_cell_with_its_first_expert(user: PageUser, page_server: PageServer) -> None:
    user.ask("Hello")
    assert page_server.bodies[0]["mixtral"] == {"routing": "weights"}
    assert page_server.bodies[0]["logprobs"] is True
    assert strip(user) == expected(0)
    classes = [cell.get_attribute("class").split()[1] for cell in user.all(".strip .cell")]
    assert classes == [f"e{expert}" for expert in expected(0)]
    colours = user.run(
        "const colours = [...document.querySelectorAll('.cell')].map((cell) => getComputedStyle(cell).backgroundColor);"
        "return [...new Set(colours)]"
    )
    assert len(colours) == len(set(classes))
    user.one(".experts select").send_keys("Layer 2")
    assert strip(user) == expected(2)
    user.click("Words")
    shown = [cell.text.splitlines()[-1] for cell in user.all(".strip .cell")]
    assert shown == [token.replace(" ", "␣") for token in TOKENS]


def test_a_token_shows_its_experts_in_all_layers(user: PageUser) -> None:
    user.ask("Hello")
    cell = user.all(".strip .cell")[2]
    ActionChains(user.browser).move_to_element(cell).perform()
    assert user.one(".detail .token").text == "t token 3 · probability 78 %"
    layers = experts_of(PROMPT_TOKENS + 2)
    for rank, row in enumerate(user.all(".detail tbody tr")):
        shown = [slot.text.splitlines() for slot in row.find_elements("css selector", "td")]
        assert shown == [[str(pairs[rank][0]), f"{round(100 * pairs[rank][1])} %"] for pairs in layers]
    ActionChains(user.browser).move_to_element(user.id("prompt")).perform()
    assert user.one(".detail .token").text.startswith(f"0. token {len(TOKENS)}")  # the last one


def test_a_former_answer_shows_its_strip_and_more_when_asked(user: PageUser) -> None:
    user.ask("Hello")
    user.ask("Again")
    assert [each.is_displayed() for each in user.all(".strip")] == [True, True]
    assert [each.is_displayed() for each in user.all(".detail")] == [False, True]
    user.all(".strip .cell")[1].click()
    assert [each.is_displayed() for each in user.all(".detail")] == [True, True]


def test_the_strip_is_walked_with_keys(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(TEXT, finish="length")]
    user.ask("Hello")
    assert strip(user)[-1] == "·"  # nothing was made from the last token of an answer that was cut
    bar = user.one(".strip")
    user.run("values[0].focus()", bar)
    user.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    current = user.id(bar.get_attribute("aria-activedescendant"))
    assert current.get_attribute("aria-selected") == "true"
    (first, share), (second, rest) = experts_of(PROMPT_TOKENS + 2)[1]
    spoken = f'"t": layer 1, expert {first} {round(100 * share)} %, expert {second} {round(100 * rest)} %'
    assert current.get_attribute("aria-label") == spoken
    assert user.one(".experts select").get_attribute("value") == "1"
    user.press(Keys.END)
    assert "nothing was made from it" in user.one(".detail .token").text
    user.press(Keys.HOME, Keys.ARROW_LEFT)
    assert user.one(".detail .token").text.startswith("Brea")
    user.press(Keys.ESCAPE)
    assert bar.get_attribute("aria-activedescendant") is None


def test_the_heat_map_counts_while_the_answer_is_written(user: PageUser, page_server: PageServer) -> None:
    text = "word " * 40
    page_server.replies = [Reply(text, waits_at=30)]
    user.type("Hello", Keys.ENTER)
    user.wait(lambda: len(user.all(".strip .cell")) == 30)
    user.click("Heat map")

    def counts() -> list[list[int]]:
        return [
            [int(slot.text) for slot in row.find_elements("css selector", "td")] for row in user.all(".heat tbody tr")
        ]

    def wanted(tokens: int) -> list[list[int]]:
        table = [[0] * LAYERS for _ in range(EXPERTS)]
        for place in range(tokens):
            for layer, pairs in enumerate(experts_of(PROMPT_TOKENS + place)):
                for expert, _ in pairs:
                    table[expert][layer] += 1
        return table

    assert counts() == wanted(29)
    page_server.go.set()
    user.wait_idle()
    total = len(tokens_of(text))
    assert counts() == wanted(total)
    assert f"{total} computed tokens" in user.one(".heat caption").text
    user.all(".strip .cell")[4].click()
    assert len(user.all(".heat td.chosen")) == 2 * LAYERS
    user.click("Heat map")
    assert not user.one(".heat").is_displayed()


def test_calls_are_lined_up_behind_their_control_token(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(calls=[("get_hours", '{"place": "Castle"}')])]
    user.ask("Hello")
    user.click("Words")
    words = [cell.text.splitlines()[-1] for cell in user.all(".strip .cell")]
    assert words[:2] == ["[TOOL_CALLS]", "get_hours"]
    assert strip_ids(user) == expected(0, len(words))


def strip_ids(user: PageUser) -> list[str]:
    script = "return [...document.querySelectorAll('.strip .cell b')].map((each) => each.textContent)"
    found: list[str] = user.run(script)
    return found


def test_a_continued_answer_keeps_its_first_experts(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(TEXT, finish="length"), Reply(" And more.")]
    user.ask("Hello")
    user.click("Continue")
    user.wait(lambda: len(page_server.bodies) == 2)
    user.wait_idle()
    assert strip(user) == [*expected(0)[:-1], "·", *expected(0, len(tokens_of(" And more.")))]


def test_a_server_without_experts_is_asked_once(user: PageUser, page_server: PageServer) -> None:
    page_server.refuses = {"mixtral"}
    user.ask("Hello")
    assert user.answers == [TEXT]
    assert user.all(".experts") == []
    user.ask("Again")
    assert [("mixtral" in body, "logprobs" in body) for body in page_server.bodies] == [(False, False)] * 2
    refused = [entry for entry in user.browser.get_log("browser") if "400" in entry["message"]]
    assert len(refused) == 1


def test_experts_can_be_switched_off(user: PageUser, page_server: PageServer) -> None:
    user.open_settings()
    user.id("experts").click()
    user.ask("Hello")
    assert "mixtral" not in page_server.bodies[0]
    assert user.all(".experts") == []


def row(**changes: object) -> dict[str, object]:
    data = base64.b64encode(bytes([1, 2, 3, 4])).decode()
    weights = base64.b64encode(struct.pack("<4e", 0.75, 0.25, 1.0, 2**-24)).decode()
    return {"first": 5, "shape": [1, 2, 2], "experts": data, "weights": weights, "layers": [3, 7], **changes}


def test_data_are_read_exactly_and_wrong_sizes_are_refused(user: PageUser) -> None:
    script = """
    const { Trace } = await import("/static/experts.js");
    const read = (item) => {
      const trace = new Trace();
      trace.begin();
      try { trace.addRouting([item]); } catch (error) { return error.message; }
      trace.addTokens([{ token: "?", bytes: [0xe2, 0x82], logprob: 0 }]);
      const again = Trace.fromData(JSON.parse(JSON.stringify(trace.data())));
      return [trace, again].map((each) => {
        const [cell] = each.cells();
        return [cell.text, each.layers, each.choices(cell.row, 0), each.choices(cell.row, 1)];
      });
    };
    return values[0].map(read);
    """
    good, *wrong = user.run(
        script, [row(), row(shape=[2, 2, 2]), row(weights="AAAA"), row(experts="!"), row(layers=[1])]
    )
    first = [{"expert": 1, "weight": 0.75}, {"expert": 2, "weight": 0.25}]
    second = [{"expert": 3, "weight": 1}, {"expert": 4, "weight": 2**-24}]
    assert good == [["<e2><82>", [3, 7], first, second]] * 2
    assert wrong[0] == "experts has 4 bytes; expected 8"
    assert wrong[1] == "weights has 3 bytes; expected 8"
    assert all(isinstance(message, str) for message in wrong)


def test_broken_experts_do_not_break_the_answer(user: PageUser, page_server: PageServer) -> None:
    broken = json.dumps({"choices": [], "mixtral": {"routing": [row(shape=[9, 9, 9])]}})
    user.run(
        """
        const original = window.fetch;
        window.fetch = async (...given) => {
          const response = await original(...given);
          const text = await response.text();
          const { status, headers } = response;
          return new Response(`data: ${values[0]}\\n\\n${text}`, { status, headers });
        };
        """,
        broken,
    )
    user.ask("Hello")
    assert user.answers == [TEXT]
    assert user.all(".experts") == []
