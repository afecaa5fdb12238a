"""The browser of these tests: Debian's Chromium under Playwright; skipped where one is missing."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


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
