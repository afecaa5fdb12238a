"""The browser of these tests: Debian's Chromium under Playwright; skipped where one is missing."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# Milliseconds that a page may take; equations are typeset in the browser, on a busy machine slowly.
PATIENCE = 120_000


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium; every test opens contexts of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: make browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_tab(chromium):
    """Opens a tab in a context of its own, with Playwright's options for contexts."""
    contexts = []

    def open_tab(**options):
        contexts.append(chromium.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        return contexts[-1].new_page()

    yield open_tab
    for context in contexts:
        context.close()
