"""A page in a headless Chromium, for tests of what people look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def open_page(url: str, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """Opens ``url`` in a window of that size and yields Playwright's page.

    Everything that the page asks for is in ``page.requests`` (addresses), and what it complains about in
    ``page.complaints`` (messages of its console and uncaught errors). Skips the test without a browser.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.requests, page.complaints = [], []
            page.on("request", lambda request: page.requests.append(request.url))
            page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: page.complaints.append(str(error)))
            page.goto(url)
            yield page
        finally:
            browser.close()
