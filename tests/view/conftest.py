"""A real browser for the tests of the page: Debian's Chromium, driven by Playwright. Without it the tests are skipped, or
fail in CI."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing

_REMEDY = "install chromium (apt-get install chromium) and playwright (pip install playwright)"
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running browser. One for each module: while it runs, its loop is that of this thread."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        missing("a browser", _REMEDY)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the driver of the browser", _REMEDY)
    with sync_playwright() as playwright:
        # Tests may run as root, in containers with little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield started
        finally:
            started.close()


class Opened:
    """A page in a window, with everything that it complained about, or asked the network for."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.complaints: list[str] = []
        self.requests: list[str] = []
        tab.on("console", lambda one: self.complaints.append(f"{one.type}: {one.text}"))
        tab.on("pageerror", lambda one: self.complaints.append(f"error: {one}"))
        tab.on("dialog", lambda one: (self.complaints.append(f"dialog: {one.message}"), one.dismiss()))
        tab.on("request", lambda one: self.requests.append(one.url))

    def ask(self, script: str, value: Any = None) -> Any:
        return self.tab.evaluate(script, value)

    def until(self, script: str) -> None:
        """Wait until the script is true. (The driver's own wait uses eval, which the page forbids.)"""
        for _ in range(500):
            if self.ask(script):
                return
            self.tab.wait_for_timeout(20)
        pytest.fail(f"never true: {script}")

    def text(self, selector: str) -> str:
        found: str = self.tab.locator(selector).inner_text()
        return found


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Call it with the text of a page: it is opened from a file, and must be ready without any complaint."""
    with ExitStack() as stack:

        def opened(html: str, *, scheme: str = "light", width: int = 1300, fragment: str = "") -> Opened:
            path = tmp_path / "page.html"
            path.write_text(html, encoding="utf-8")
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            stack.callback(context.close)
            found = Opened(context.new_page())
            found.tab.goto(f"{path.as_uri()}{fragment}")
            found.tab.wait_for_selector("html[data-ready=true]", timeout=30_000)
            assert not found.complaints
            assert [url.split("#")[0] for url in found.requests] == [path.as_uri()]
            return found

        yield opened
