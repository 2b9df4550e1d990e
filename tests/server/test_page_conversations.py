"""Conversations on the chat page: kept, renamed, deleted, exported, imported; colours, keys, small screens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pagefake import SHOWN, PageServer, Reply
from pageuser import PageUser
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.page, pytest.mark.slow]


def listed(user: PageUser) -> list[str]:
    return user.texts("#conversations button")


@pytest.fixture
def download(user: PageUser, tmp_path: Path) -> Callable[[Callable[[], None]], tuple[str, str]]:
    """Name and text of the file that an action saves."""
    options = {"behavior": "allow", "downloadPath": str(tmp_path)}
    user.browser.execute_cdp_cmd("Browser.setDownloadBehavior", options)

    def run(action: Callable[[], None]) -> tuple[str, str]:
        before = set(tmp_path.iterdir())
        action()

        def files() -> list[Path]:
            return [path for path in set(tmp_path.iterdir()) - before if path.suffix in {".md", ".json"}]

        user.wait(lambda: files() and files()[0].stat().st_size > 0, "no file was saved")
        return files()[0].name, files()[0].read_text(encoding="utf-8")

    return run


def menu(user: PageUser, label: str) -> None:
    user.one("details.menu summary").click()
    user.click(label, ".menu-items")


def test_conversations_are_kept_and_found_again(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("One."), Reply("Two."), Reply("Three.")]
    user.type("First question", Keys.SHIFT, Keys.ENTER, Keys.NULL)
    user.ask("with a second line")
    user.id("new-chat").click()
    assert (user.questions, listed(user)) == ([], ["First question"])
    user.ask("Second question")
    assert listed(user) == ["Second question", "First question"]
    user.load()
    assert listed(user) == ["Second question", "First question"]
    user.all("#conversations button")[1].click()
    assert user.answers == ["One."]
    assert user.one("#conversations [aria-current]").text == "First question"
    assert user.one(".numbers").text.endswith("finish stop")
    user.ask("More")
    assert [message["content"] for message in page_server.bodies[2]["messages"]][1:] == ["One.", "More"]
    assert listed(user) == ["First question", "Second question"]


def test_rename_delete_and_undo(user: PageUser) -> None:
    user.ask("A question")
    menu(user, "Rename")
    assert user.focused == user.id("rename")
    user.press("Breakfast", Keys.ENTER)
    assert (user.id("title").text, listed(user)) == ("Breakfast", ["Breakfast"])
    assert user.browser.title == "Breakfast · Mixtral"
    menu(user, "Rename")
    user.press("Other", Keys.ESCAPE)
    assert user.id("title").text == "Breakfast"
    user.ask("Another question")
    assert user.id("title").text == "Breakfast"
    menu(user, "Delete")
    assert (listed(user), user.questions) == ([], [])
    user.id("undo").click()
    assert (listed(user), len(user.questions)) == (["Breakfast"], 2)
    menu(user, "Delete")
    user.load()
    assert listed(user) == []


def test_export_and_import(
    user: PageUser, page_server: PageServer, download: Callable[[Callable[[], None]], tuple[str, str]], tmp_path: Path
) -> None:
    page_server.replies = [Reply("Use `x`:\n\n```py\nx\n```"), Reply(calls=[("get_hours", "{}")])]
    user.open_settings()
    user.set("system", "Be brief.")
    user.ask("How?")
    user.ask("Call")
    name, text = download(lambda: menu(user, "Export as Markdown"))
    assert name == "How.md"
    assert text.startswith("# How?\n\n## Instructions\n\nBe brief.\n\n## You\n\nHow?\n\n## Mixtral\n\nUse `x`:")
    assert "Call of `get_hours`:\n\n```json\n{}\n```" in text
    name, text = download(lambda: menu(user, "Export as JSON"))
    assert name == "How.json"
    [conversation] = json.loads(text)["conversations"]
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"] * 2
    assert len(conversation["messages"][1]["experts"]["tokens"]) > 3
    _, everything = download(lambda: user.id("export-all").click())
    assert json.loads(everything)["conversations"][0]["title"] == "How?"

    file = tmp_path / "in.json"
    file.write_text(text, encoding="utf-8")
    user.run("localStorage.clear()")
    user.load()
    assert listed(user) == []
    user.id("import-file").send_keys(str(file))
    user.wait_status("1 conversation imported")
    assert listed(user) == ["How?"]
    assert user.answers[0].startswith("Use x:")
    assert len(user.all(".experts")) == 2
    assert user.id("system").get_attribute("value") == "Be brief."
    user.id("import-file").send_keys(str(file))
    user.wait(lambda: listed(user) == ["How?", "How?"])  # a second copy beside the first


def test_answers_without_experts_are_exported_and_imported(
    user: PageUser, page_server: PageServer, download: Callable[[Callable[[], None]], tuple[str, str]], tmp_path: Path
) -> None:
    """One that failed before it had any, and one of a server that refuses them."""
    page_server.replies = [Reply(status=500), Reply("One.")]
    user.ask("Fails")
    page_server.refuses = {"mixtral"}
    user.ask("Refused")
    _, text = download(lambda: menu(user, "Export as JSON"))
    [conversation] = json.loads(text)["conversations"]
    assert [message.get("experts", "") for message in conversation["messages"]] == ["", None, "", None]
    file = tmp_path / "in.json"
    file.write_text(text, encoding="utf-8")
    user.run("localStorage.clear()")
    user.load()
    user.id("import-file").send_keys(str(file))
    user.wait_status("1 conversation imported")
    assert user.answers[-1] == "One."


HEAD = '{"format": "mixtral-chat", "version": 1, "conversations": ['
WRONG = {
    "no": "Not imported: The file is not JSON",
    "{}": "Not imported: The file is not an export of this page",
    HEAD + '{"id": "a", "title": 3}]}': ("Not imported: conversations[0].title should be text"),
    HEAD + '{"id": "a", "title": "t", "messages": [{"role": "x"}]}]}': (
        "Not imported: conversations[0].messages[0].role should be one of user, assistant"
    ),
}


def test_files_that_are_no_export_are_refused(user: PageUser, tmp_path: Path) -> None:
    for place, (text, message) in enumerate(WRONG.items()):
        file = tmp_path / f"{place}.json"
        file.write_text(text, encoding="utf-8")
        user.id("import-file").send_keys(str(file))
        user.wait_status(message)
    assert listed(user) == []


def test_a_broken_entry_and_a_full_storage_are_reported(user: PageUser) -> None:
    user.run("localStorage.setItem('mixtral.chat.c.x', '{')")
    user.browser.get(user.address)
    assert user.run("return localStorage.getItem('mixtral.chat.c.x')") == "{"  # nothing is thrown away unseen
    user.wait_status("A stored conversation cannot be read")
    user.run(
        "Storage.prototype.setItem = () => { throw new DOMException('over', 'QuotaExceededError'); };"
        "const { Store } = await import('/static/store.js'); window.said = [];"
        "new Store(() => localStorage, (problem) => window.said.push(problem)).save({ id: 'a', messages: [] });"
    )
    assert "storage is full" in user.run("return window.said[0]")
    user.ask("Still works")
    assert len(user.answers) == 1


def test_a_browser_that_forbids_storage_is_reported(user: PageUser) -> None:
    source = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    script = user.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        user.load("Settings cannot be read: no")
        user.ask("Still works")
        assert len(user.answers) == 1
    finally:
        user.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@contextlib.contextmanager
def another_window(user: PageUser) -> Iterator[None]:
    """Somebody at a second window of the page; at the end it is closed."""
    first = user.browser.current_window_handle
    user.browser.switch_to.new_window("tab")
    try:
        user.load()
        yield
        user.browser.close()
    finally:
        user.browser.switch_to.window(first)


def test_another_window_is_noticed(user: PageUser) -> None:
    user.ask("Here")
    with another_window(user):
        user.ask("There")
    user.wait(lambda: listed(user) == ["There", "Here"])
    with another_window(user):
        user.all("#conversations button")[1].click()
        user.ask("More")
    user.wait(lambda: user.questions == ["Here", "More"])
    with another_window(user):
        user.all("#conversations button")[1].click()
        menu(user, "Delete")
    user.wait(lambda: listed(user) == ["Here"])


def test_what_another_window_does_not_change_stays_as_it_is(user: PageUser) -> None:
    """Experts, which are not kept, and a question that is being edited."""
    user.ask("Here")
    user.all(".message.user .actions button")[1].click()
    user.press(" and now")
    with another_window(user):
        user.ask("There")
    user.wait(lambda: listed(user) == ["There", "Here"])
    assert user.one(".editor textarea").get_attribute("value") == "Here and now"
    assert len(user.all(".experts")) == 1
    user.all("#conversations button")[0].click()
    user.all("#conversations button")[1].click()
    assert user.questions == ["Here"]
    assert len(user.all(".experts")) == 1


def test_colours_follow_the_system_or_the_switch(user: PageUser) -> None:
    def background() -> int:
        script = "return getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)"
        return sum(user.run(script))

    user.prefer("light")
    light = background()
    user.prefer("dark")
    assert background() < light / 3
    user.choose("theme", "Light")
    assert background() == light
    user.load()
    assert background() == light
    user.prefer("light")
    user.choose("theme", "Dark")
    assert background() < light / 3
    user.choose("theme", "As the system")
    assert background() == light


def test_everything_works_with_keys_alone(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply("One."), Reply("Two."), Reply("Three.")]
    assert user.focused == user.id("prompt")
    user.press("Hello", Keys.ENTER)
    user.wait(lambda: user.answers == ["One."])
    user.wait_idle()
    user.press("r", alt=True)
    user.wait(lambda: user.answers == ["Two."])
    user.wait_idle()
    user.press("n", alt=True)
    assert user.answers == []
    user.press("k", alt=True)
    assert user.id("shortcuts").is_displayed()
    user.press(Keys.ESCAPE)
    assert not user.id("shortcuts").is_displayed()
    user.press("o", alt=True)
    assert user.id("settings").is_displayed()
    assert user.focused == user.id("settings-close")
    user.press(Keys.ESCAPE)
    assert not user.id("settings").is_displayed()
    assert user.focused == user.id("settings-button")
    user.press("c", alt=True)
    assert not user.id("sidebar").is_displayed()
    user.press("c", alt=True)
    assert user.id("sidebar").is_displayed()


def test_the_focus_reaches_every_control_and_can_be_seen(user: PageUser) -> None:
    user.ask("Hello")
    user.run("document.activeElement.blur()")
    reached, unseen = [], []
    for _ in range(60):
        user.press(Keys.TAB)
        found = user.run(
            "const it = document.activeElement; const style = getComputedStyle(it);"
            "const seen = style.outlineStyle !== 'none' || it.id === 'prompt' || it === document.body;"
            "const name = it.getAttribute('aria-label') ?? it.labels?.[0]?.textContent.trim() ?? it.textContent.trim();"
            "return [it.id || it.className || it.localName, seen, name];"
        )
        if found[0] in reached[:1]:
            break
        reached.append(found[0])
        if not found[1] or (not found[2] and found[0] != "body"):
            unseen.append(found)
    assert unseen == []
    wanted = {"new-chat", "sidebar-button", "settings-button", "prompt", "model", "theme", "experts-1", "quiet copy"}
    assert wanted <= set(reached)
    assert (
        reached.index("new-chat")
        < reached.index("sidebar-button")
        < reached.index("experts-1")
        < reached.index("prompt")
    )


def test_every_control_has_a_name(user: PageUser) -> None:
    user.ask("Hello")
    user.open_settings("Functions", "Answer format", "Connection")
    user.click("Add an example")
    nameless = user.run(
        "return [...document.querySelectorAll('button, input, select, textarea, summary, [tabindex]')]"
        ".filter((it) => !(it.getAttribute('aria-label') || it.labels?.length || it.textContent.trim()))"
        ".map((it) => it.outerHTML)"
    )
    assert nameless == []
    twice = user.run(
        "const ids = [...document.querySelectorAll('[id]')].map(({ id }) => id);"
        "return ids.filter((id, place) => ids.indexOf(id) !== place)"
    )
    assert twice == []


def test_colours_have_contrast(user: PageUser, page_server: PageServer) -> None:
    """At least 4.5 to 1 (WCAG AA) for every text, in both schemes."""
    page_server.replies = [Reply(SHOWN), Reply(status=500)]
    user.ask("Hello")
    user.ask("Fail")
    user.click("Heat map")
    script = """
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgb = (colour, below) => {
      canvas.fillStyle = `rgb(${below.join(" ")})`; canvas.fillRect(0, 0, 1, 1);
      canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (parts) => parts.map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
      .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    const below = (node) =>
      node ? rgb(getComputedStyle(node).backgroundColor, below(node.parentElement)) : [255, 255, 255];
    const poor = new Map();
    for (const node of document.querySelectorAll("body *")) {
      const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
      if (!own || !node.checkVisibility() || node.closest(":disabled, .hidden, option, noscript")) continue;
      const behind = below(node);
      const [dark, bright] = [light(rgb(getComputedStyle(node).color, behind)), light(behind)].sort((a, b) => a - b);
      const ratio = (bright + 0.05) / (dark + 0.05);
      if (ratio < 4.5) poor.set(`${node.localName}.${node.className}`, ratio.toFixed(2));
    }
    return Object.fromEntries(poor);
    """
    for scheme in ("light", "dark"):
        user.prefer(scheme)
        assert user.run(script) == {}, scheme


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_hangs_over_the_edge(user: PageUser, page_server: PageServer, width: int) -> None:
    wide = (
        f"{'x' * 200}\n\n```\n{'y' * 300}\n```\n\n|{'z' * 90}|b|\n|-|-|\n\n[a](http://{'u' * 200})\n\n" + "word " * 300
    )
    page_server.replies = [Reply(wide), Reply(calls=[("f", json.dumps({"a": "v" * 200}))]), Reply(status=500)]
    user.resize(width)
    user.ask("q" * 200)
    user.ask("Call")
    user.click("Heat map")
    user.open_settings("Functions", "Answer format", "Connection")
    user.click("Add an example")

    def over() -> list[str]:
        found: list[str] = user.run(
            "const edge = document.documentElement.clientWidth;"
            "const inside = (it) => it.closest('pre, .scroll, .heat, .hidden');"
            "return [...document.querySelectorAll('body *')].filter((it) => !inside(it) && it.checkVisibility()"
            " && it.getBoundingClientRect().right > edge + 0.5).map((it) => it.outerHTML.slice(0, 80))"
        )
        return found

    assert over() == []
    user.type("")
    assert over() == []
    assert user.run("return document.documentElement.scrollWidth") <= width
    assert user.run("return document.documentElement.scrollHeight") <= 740


def test_a_phone_has_drawers(user: PageUser) -> None:
    user.resize(360)
    assert not user.id("sidebar").is_displayed()
    user.ask("Hello")
    user.id("sidebar-button").click()
    assert user.id("sidebar").is_displayed()
    assert user.run("return document.getElementById('center').inert")
    user.one("#conversations button").click()
    assert not user.id("sidebar").is_displayed()
    user.id("settings-button").click()
    assert user.id("settings").is_displayed()
    user.id("settings-close").click()
    assert not user.id("settings").is_displayed()
    assert not user.run("return document.getElementById('center').inert")


def test_nothing_moves_while_an_answer_is_written(user: PageUser, page_server: PageServer) -> None:
    page_server.replies = [Reply(SHOWN, delay_s=0.004)]
    user.resize(1280, 2600)
    user.run(
        "for (let n = 0; n < 3; n += 1) await new Promise((done) => requestAnimationFrame(done));"
        "window.shifts = []; new PerformanceObserver((list) => window.shifts.push(...list.getEntries()"
        ".map((entry) => entry.value))).observe({ type: 'layout-shift', buffered: false })"
    )
    places = (
        "return ['prompt', 'send', 'stop', 'title', 'model']"
        ".map((id) => document.getElementById(id).getBoundingClientRect().top)"
    )
    before = user.run(places)
    user.type("Hello", Keys.ENTER)
    user.wait_idle()
    top_after = user.run(places)
    assert [top for top in top_after if top] == [top for top in before if top]
    assert sum(user.run("return window.shifts")) < 0.1
