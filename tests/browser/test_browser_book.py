"""The built book in a browser, from files: width, colours, search, next links, keyboard, print."""

import os
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HTML = Path(os.environ.get("RLHF_GUIDE_BOOK", ROOT / "book" / "_build" / "html")).resolve()

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# The front page, a page of tables and equations, a chapter of code and figures.
PAGES = ["book/index", "book/paper_map", "notebooks/06_offline_dpo"]
# Jupyter Book 1 and its theme both declare this name; nothing uses it while Thebe is off.
DECLARED_TWICE = "Identifier 'THEBE_JS_URL' has already been declared"
RULES = ["wcag2a", "wcag2aa"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (HTML / "book" / "index.html").exists(), reason="no book: make book"),
]


def address(name):
    return (HTML / f"{name}.html").as_uri()


def name_of(url):
    """The page below the built book that an address shows."""
    return str(Path(unquote(urlsplit(url).path)).relative_to(HTML).with_suffix(""))


def chapters():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(row["file"] for part in toc["parts"] for row in part["chapters"])]


def axe(tab):
    """Violations of the accessibility rules, as short lines."""
    package = pytest.importorskip("axe_playwright_python", reason="no axe-core: make browser")
    tab.add_script_tag(path=str(resources.files(package) / "axe.min.js"))
    found = tab.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_reads_well_and_loads_from_itself_only(new_tab, name, scheme, size):
    tab, elsewhere, failures = new_tab(viewport=size, color_scheme=scheme), [], []
    tab.on("request", lambda r: elsewhere.append(r.url) if r.url.startswith("http") else None)
    tab.on("pageerror", lambda error: failures.append(str(error)))
    tab.goto(address(name))
    tab.wait_for_timeout(1_000)  # for what scripts ask for after loading
    assert elsewhere == []
    assert set(failures) <= {DECLARED_TWICE}
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"] + 1
    assert axe(tab) == []


@pytest.mark.parametrize("name", [name for name in chapters() if name.startswith("book/")])
def test_tables_fit_beside_the_menus(new_tab, name):
    tab = new_tab(viewport=DESKTOP)
    tab.goto(address(name))
    wide = """[...document.querySelectorAll('article table')]
        .filter(table => table.scrollWidth > table.closest('section').clientWidth + 1)
        .map(table => table.textContent.slice(0, 80))"""
    assert tab.evaluate(wide) == []


def test_the_rules_see_a_fault(new_tab):
    tab = new_tab()
    tab.goto(address("book/index"))
    tab.evaluate(
        """document.querySelector('article').insertAdjacentHTML('afterbegin',
            '<img src="x.png"><p style="color: #ccc; background: #fff">too pale</p>')"""
    )
    assert {line.split(":")[0] for line in axe(tab)} == {"image-alt", "color-contrast"}


def test_equations_are_typeset(new_tab):
    tab = new_tab()
    tab.goto(address("book/paper_map"))
    tab.wait_for_selector("mjx-container")
    assert tab.locator("mjx-merror").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_search_box_finds_a_chapter(new_tab, size):
    tab = new_tab(viewport=size)
    tab.goto(address("book/index"))
    tab.locator("button.search-button__button:visible").first.click()
    tab.keyboard.type("packing")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results li a")
    links = tab.locator("#search-results li a").all()
    assert any("02_sft_with_packing" in (link.get_attribute("href") or "") for link in links)


def test_next_leads_through_every_chapter_to_the_end(new_tab):
    tab = new_tab(viewport=DESKTOP)
    tab.goto(address("book/index"))
    seen = [name_of(tab.url)]
    while tab.locator("a.right-next").count() and len(seen) < len(chapters()):
        tab.locator("a.right-next").click()
        tab.wait_for_load_state("domcontentloaded")
        seen.append(name_of(tab.url))
    assert seen == chapters()
    assert tab.locator("a.right-next").count() == 0


def test_the_keyboard_reaches_the_text_and_shows_where_it_is(new_tab):
    """The first Tab offers to skip to the content; more of them move on, each with a mark."""
    tab = new_tab(viewport=DESKTOP)
    tab.goto(address("notebooks/00_tour"))
    reached, unmarked = [], []
    for _ in range(12):
        tab.keyboard.press("Tab")
        element = tab.evaluate("document.activeElement.outerHTML.slice(0, 120)")
        reached.append(element)
        style = "getComputedStyle(document.activeElement)"
        if tab.evaluate(f"{style}.outlineStyle === 'none' && {style}.boxShadow === 'none'"):
            unmarked.append(element)
    assert "#main-content" in reached[0]
    assert len(set(reached)) > 8
    assert unmarked == []


def test_print_shows_the_chapter_with_its_solutions_and_no_menu(new_tab):
    tab = new_tab(viewport=DESKTOP)
    tab.goto(address("notebooks/00_tour"))
    solution = tab.locator("details", has_text="Solutions").locator("pre").last
    assert not solution.is_visible()
    tab.emulate_media(media="print")
    assert solution.is_visible()
    assert not tab.locator(".bd-sidebar-primary").is_visible()
    assert not tab.locator(".article-header-buttons").is_visible()
