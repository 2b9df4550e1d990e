"""Somebody who uses the chat page in a browser: types, clicks, reads, and waits where a person would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait


class PageUser:
    """The page at ``address``, ready for a question."""

    def __init__(self, browser: webdriver.Chrome, address: str, *, status: str = "Ready") -> None:
        self.browser = browser
        self.address = address
        browser.get_log("browser")  # what earlier tests left
        self.load(status)

    def load(self, status: str = "Ready") -> None:
        """Load the page anew and wait until it says ``status``."""
        self.browser.get(self.address)
        self.wait_status(status)

    def leave(self) -> None:
        """Undo what outlives a page."""
        for command in ("Emulation.clearDeviceMetricsOverride", "Emulation.setEmulatedMedia"):
            self.browser.execute_cdp_cmd(command, {})
        self.browser.get("about:blank")

    def id(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.all(selector)]

    def run(self, script: str, *values: Any) -> Any:
        """JavaScript in the page; it may await, and its `return` comes back."""
        wrapped = (
            "const done = arguments[arguments.length - 1]; const values = [...arguments].slice(0, -1);"
            f"(async () => {{ {script} }})().then(done, (error) => done('failed: ' + error.stack));"
        )
        found = self.browser.execute_async_script(wrapped, *values)
        if isinstance(found, str) and found.startswith("failed: "):
            raise RuntimeError(found)
        return found

    def wait(self, condition: Callable[[], object], message: str = "", seconds: float = 60) -> None:
        WebDriverWait(self.browser, seconds, poll_frequency=0.02).until(lambda _: condition(), message)

    @property
    def status(self) -> str:
        return self.id("status").text

    def wait_status(self, text: str) -> None:
        self.wait(lambda: self.status.startswith(text), f"the status never was {text!r}")

    def wait_idle(self) -> None:
        """Until no answer is being written."""
        self.wait(lambda: self.id("send").is_displayed() and not self.all(".streaming"), "the answer did not end")

    def type(self, *keys: str) -> None:
        """Keys to the field for questions; a drawer that covers it is closed first."""
        if self.run("return document.body.dataset.drawer ?? null"):
            self.press(Keys.ESCAPE)
        self.id("prompt").send_keys(*keys)

    def ask(self, question: str) -> None:
        """Send a question and wait for the end of its answer."""
        self.type(question, Keys.ENTER)
        self.wait_idle()

    def press(self, *keys: str, alt: bool = False) -> None:
        """Keys to whatever has the focus."""
        chain = webdriver.ActionChains(self.browser)
        if alt:
            chain = chain.key_down(Keys.ALT)
        chain = chain.send_keys(*keys)
        if alt:
            chain = chain.key_up(Keys.ALT)
        chain.perform()

    def click(self, label: str, within: str = "body") -> None:
        """Click the last visible button with this label."""
        found = [button for button in self.all(f"{within} button") if button.text == label and button.is_displayed()]
        if not found:
            shown = sorted({button.text for button in self.all(f"{within} button") if button.is_displayed()})
            raise AssertionError(f"no button {label!r} in {within}; there are {shown}")
        self.run("values[0].scrollIntoView({ block: 'center' })", found[-1])
        found[-1].click()

    def choose(self, id: str, label: str) -> None:
        """An option of a drop-down list."""
        Select(self.id(id)).select_by_visible_text(label)

    def set(self, id: str, text: str) -> None:
        """Type into a field in place of what it has."""
        field = self.id(id)
        self.run("values[0].scrollIntoView({ block: 'center' })", field)
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
        field.send_keys(text)

    def open_settings(self, *sections: str) -> None:
        """Show the settings, with these sections open."""
        if not self.id("settings").is_displayed():
            self.id("settings-button").click()
        for summary in self.all("#settings summary"):
            if summary.text in sections and not self.run("return values[0].parentElement.open", summary):
                summary.click()

    @property
    def questions(self) -> list[str]:
        return self.texts(".message.user .text")

    @property
    def answers(self) -> list[str]:
        return self.texts(".message.assistant > .text")

    @property
    def focused(self) -> WebElement:
        return self.browser.switch_to.active_element

    def resize(self, width: int, height: int = 740) -> None:
        """The size of the window; phones are narrower than 500."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """Light or dark, as the system says."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page. A refused request is the server's doing."""
        entries = [entry for entry in self.browser.get_log("browser") if entry["level"] in {"WARNING", "SEVERE"}]
        return [entry["message"] for entry in entries if entry["source"] != "network"]
