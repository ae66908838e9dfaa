"""A headless Chromium, and the page as its reader handles it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 60  # seconds; a busy machine is slow


class Page:
    """The page in its browser."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        self.media()
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(url)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """The whole text, also what is not painted."""
        return self.find(css).get_property("textContent").strip()

    def texts(self, css: str) -> list[str]:
        return [element.get_property("textContent") for element in self.all(css)]

    def shows(self, css: str) -> bool:
        return self.find(css).is_displayed()

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(lambda _: condition())

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def meet(self) -> None:
        """Wait for the model's name."""
        self.wait(lambda: "testbed" in self.text("#model"))

    def ask(self, question: str = "What does the chart show?") -> None:
        """Type a question, press Ask."""
        self.find("#question").send_keys(question)
        self.find("#send").click()

    def answered(self) -> None:
        """Wait until nothing runs."""
        self.wait(lambda: self.shows("#send") and not self.all(".running"))

    def media(self, **features: str) -> None:
        """Emulate media features: `prefers_color_scheme="dark"`."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def size(self, width: int, height: int, *, touch: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def hand_over(self, event: str, *files: tuple[str, bytes]) -> None:
        """Drop or paste files of (name, bytes), as the browser would tell of it."""
        listed = [(name, base64.b64encode(data).decode()) for name, data in files]
        self.js(HAND_OVER, event, listed)

    def complaints(self) -> list[str]:
        """What the console holds."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]


HAND_OVER = """
const [event, files] = arguments;
const transfer = new DataTransfer();
for (const [name, data] of files) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], name, {type: "image/png"}));
}
const options = {bubbles: true, cancelable: true};
if (event === "paste") {
  document.activeElement.dispatchEvent(new ClipboardEvent("paste", {...options, clipboardData: transfer}));
} else {
  for (const kind of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, {...options, dataTransfer: transfer}));
}
"""


def png(width: int = 60, height: int = 40, colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "png")
    return buffer.getvalue()


def start() -> webdriver.Chrome:
    """Debian's Chromium without a window, with its console and its requests kept."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium or chromedriver is missing: on Debian, apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(option)
    if not os.geteuid():
        options.add_argument("--no-sandbox")  # root's Chromium does not start with one
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))
