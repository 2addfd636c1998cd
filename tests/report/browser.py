"""Headless Chromium for tests: opens a page, and tells what went on in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

PHONE, DESKTOP = 360, 1280
"""Widths of a window in CSS pixels."""


def find_or_install() -> tuple[str, str] | None:
    """Chromium and its driver; Debian's are installed if they are missing and this user may. None without."""
    if not _found() and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["update"], ["install", "-y", "chromium", "chromium-driver"]):
            subprocess.run(["apt-get", "-qq", *words], check=False, capture_output=True, timeout=300)
    return _found()


def _found() -> tuple[str, str] | None:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (program, driver) if program and driver else None


class Browser:
    """One browser, one page at a time."""

    def __init__(self, program: str, driver: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._driver = webdriver.Chrome(options=options, service=Service(driver))

    def quit(self) -> None:
        """End the browser."""
        self._driver.quit()

    def open(self, path: Path, *, width: int = DESKTOP, dark: bool = False, media: str = "screen") -> None:
        """Open a page in a window of a width, and wait until all its charts are drawn."""
        self._logs()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        look = {"media": media, "features": [scheme]}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
        self._driver.get(path.as_uri())
        drawn = "return [...document.querySelectorAll('figure')].every(figure => figure.view)"
        WebDriverWait(self._driver, 30, poll_frequency=0.05).until(lambda _: self.run(drawn))

    def run(self, script: str, *arguments: Any) -> Any:
        """The answer of some JavaScript in the page."""
        return self._driver.execute_script(script, *arguments)

    def went_on(self) -> tuple[list[str], set[str]]:
        """What the console said since the page was opened, and the addresses that were asked for."""
        console, network = self._logs()
        events = [json.loads(entry["message"])["message"] for entry in network]
        asked = {
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        }
        return [entry["message"] for entry in console], asked

    def _logs(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self._driver.get_log("browser"), self._driver.get_log("performance")
