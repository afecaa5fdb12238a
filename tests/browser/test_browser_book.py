"""The built book in a browser, from files: width, colours, search, next links, keyboard."""

import os
from importlib import resources
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HTML = Path(os.environ.get("RLHF_GUIDE_BOOK", ROOT / "book" / "_build" / "html"))

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# The front page, a page of tables and equations, a chapter of code and figures.
PAGES = ["book/index", "book/paper_map", "notebooks/06_offline_dpo"]
# Jupyter Book 1 and its theme both declare this name; nothing uses it while Thebe is off.
DECLARED_TWICE = "Identifier 'THEBE_JS_URL' has already been declared"
RULES = ["color-contrast", "image-alt", "link-name", "button-name", "label", "html-has-lang"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (HTML / "book" / "index.html").exists(), reason="no book: make book"),
]


def address(name):
    return (HTML / f"{name}.html").as_uri()


def chapters():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(row["file"] for part in toc["parts"] for row in part["chapters"])]


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def size(request):
    return request.param


@pytest.fixture(params=["light", "dark"])
def page(chromium, size, request):
    """A tab at one width and in one colour scheme that remembers what it asked other hosts for."""
    context = chromium.new_context(viewport=size, color_scheme=request.param)
    tab = context.new_page()
    tab.elsewhere, tab.failures = [], []
    tab.on("request", lambda r: tab.elsewhere.append(r.url) if r.url[:4] == "http" else None)
    tab.on("pageerror", lambda error: tab.failures.append(str(error)))
    yield tab
    context.close()


def axe(tab):
    """Violations of the chosen rules, as short lines."""
    package = pytest.importorskip("axe_playwright_python", reason="no axe-core: make browser")
    tab.add_script_tag(path=str(resources.files(package) / "axe.min.js"))
    found = tab.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
    return [
        f"{violation['id']}: {node['target']} {node['any'][0]['message'] if node['any'] else ''}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_reads_well_and_loads_from_itself_only(page, size, name):
    page.goto(address(name))
    page.wait_for_load_state("networkidle")
    assert page.elsewhere == []
    assert set(page.failures) <= {DECLARED_TWICE}
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"] + 1
    assert axe(page) == []


def test_equations_are_typeset(chromium):
    tab = chromium.new_page()
    tab.goto(address("book/paper_map"))
    tab.wait_for_selector("mjx-container", timeout=20_000)
    assert tab.locator("mjx-merror").count() == 0
    tab.close()


def test_the_search_finds_a_chapter(chromium):
    tab = chromium.new_page()
    tab.goto(f"{(HTML / 'search.html').as_uri()}?q=packing")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    links = tab.locator("#search-results li a").all()
    assert any("02_sft_with_packing" in (link.get_attribute("href") or "") for link in links)
    tab.close()


def test_next_leads_through_every_chapter_to_the_end(chromium):
    tab = chromium.new_page()
    tab.goto(address("book/index"))
    seen = []
    while len(seen) <= len(chapters()):
        seen.append(tab.url.split("/html/")[-1].split(".html")[0])
        following = tab.locator("a.right-next")
        if following.count() == 0:
            break
        tab.goto(tab.evaluate("document.querySelector('a.right-next').href"))
    assert seen == chapters()
    tab.close()


def test_the_keyboard_reaches_the_text(chromium):
    """The first Tab offers to skip to the content; more of them move on, visibly."""
    tab = chromium.new_page()
    tab.goto(address("notebooks/00_tour"))
    reached = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.outerHTML.slice(0, 120)"))
    assert "#main-content" in reached[0]
    assert len(set(reached)) > 8
    tab.close()
