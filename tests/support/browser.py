"""Debian's Chromium for tests of pages. Without it or playwright, the tests are skipped with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser_page() -> Iterator[Any]:
    """Yield a page whose attribute `problems` lists its errors, console messages and network requests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith("http") and page.problems.append(asked.url))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        yield page
        browser.close()
