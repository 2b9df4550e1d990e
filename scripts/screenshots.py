"""Takes the pictures of the chat page for docs/images, with headless Chromium, from a server that is running.

Run: python scripts/screenshots.py http://127.0.0.1:8000 docs/images. The fonts are those of the machine; the published
pictures were taken with the Debian packages fonts-noto-core and fonts-noto-mono.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

__all__ = ["main", "take"]

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage")
ANSWER_S = 300
QUESTION = "When does breakfast start?"
FOLLOWING = "How much is a double room at the hotel?"
CALLING = "Is the Maritime Museum open on Monday?"


class Camera:
    """A browser with the page at ``address``, and pictures of it in ``folder``."""

    def __init__(self, browser: webdriver.Chrome, address: str, folder: Path) -> None:
        self.browser = browser
        self.address = address
        self.folder = folder

    def load(self, width: int, height: int, scheme: str = "light") -> None:
        """The page with an empty storage, in this size and these colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.get(self.address)
        self.browser.execute_script("localStorage.clear()")
        self.browser.get(self.address)
        self._wait(lambda: self._id("status").text == "Ready")

    def ask(self, question: str) -> None:
        """Send a question and wait for the whole answer."""
        self._id("prompt").send_keys(question, Keys.ENTER)
        self._wait(lambda: self._id("send").is_displayed())

    def click(self, selector: str) -> None:
        """Click the last element that fits."""
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)[-1]
        self.browser.execute_script("arguments[0].scrollIntoView({ block: 'nearest' }); arguments[0].click()", found)

    def choose(self, id: str, label: str) -> None:
        """An option of a drop-down list."""
        Select(self._id(id)).select_by_visible_text(label)

    def bottom(self) -> None:
        """Scroll the conversation to its end."""
        self.browser.execute_script("const main = document.getElementById('main'); main.scrollTop = main.scrollHeight")

    def picture(self, name: str) -> None:
        """Save what is shown, with as many colours as are needed."""
        painted = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        self.browser.execute_async_script(painted)
        image = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        image.quantize(192, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            self.folder / f"page-{name}.png", optimize=True
        )

    def _id(self, name: str) -> webdriver.remote.webelement.WebElement:
        return self.browser.find_element(By.ID, name)

    def _wait(self, condition: Callable[[], bool]) -> None:
        WebDriverWait(self.browser, ANSWER_S, poll_frequency=0.05).until(lambda _: condition())


def take(camera: Camera) -> None:
    """All pictures."""
    camera.load(1280, 800)
    camera.ask(QUESTION)
    camera.ask(FOLLOWING)
    camera.picture("wide")

    camera.load(1280, 800, "dark")
    camera.ask(FOLLOWING)
    camera.click(".map-button")
    camera.click(".words-button")
    camera.click(".strip .cell:nth-child(4)")
    camera.bottom()
    camera.picture("experts")

    camera.load(1440, 900)
    camera.click("#settings-button")
    camera.click("#settings details:nth-of-type(4):not([open]) > summary")
    camera.click("#add-example-tool")
    camera.choose("tool-choice", "It must")
    camera.ask(CALLING)
    camera.picture("tools")

    camera.load(360, 740)
    camera.ask(QUESTION)
    camera.picture("phone")


def main() -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("address", help="address of a running server")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    given = parser.parse_args()
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        parser.error("there is no Chromium: apt-get install -y chromium chromium-driver")
    given.folder.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver)) as browser:
            take(Camera(browser, given.address, given.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
