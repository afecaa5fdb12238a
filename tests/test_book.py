"""The book's pages and the code name the same things; no build needed."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from rlhf_guide import book_pages, errors
from rlhf_guide.parameters import FLAT_FIELDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "book").glob("*.md"))
ERRORS = [name for name, _ in inspect.getmembers(errors, inspect.isclass)]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def chapters():
    toc = yaml.safe_load(text("book/_toc.yml"))
    return [toc["root"], *(row["file"] for part in toc["parts"] for row in part["chapters"])]


def headings(page):
    return re.findall(r"^#+ (.+)$", page, re.MULTILINE)


def anchor(heading):
    """A heading's anchor as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_notebook_is_a_chapter_in_its_order():
    notebooks = sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert [name for name in chapters() if name.startswith("notebooks/")] == notebooks


def test_every_page_is_in_the_table_of_contents():
    pages = {f"book/{path.stem}" for path in PAGES}
    assert {name for name in chapters() if name.startswith("book/")} == pages


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_has_its_paragraph_and_names_it(name):
    assert name in headings(text("book/troubleshooting.md"))
    place = f"book/troubleshooting.md#{anchor(name)}"
    assert getattr(errors, name)("x").__notes__ == [f"more: {place}"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, place = target.partition("#")
        found = page if not name else page.parent / name
        assert found.exists(), f"{page.name}: {target}"
        if place:
            assert place in map(anchor, headings(found.read_text(encoding="utf-8"))), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_functions_and_parameters_that_a_page_names_exist(page):
    content = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:rlhf_guide|data_prep)\.[\w.]+)`", content):
        assert defined(name), name
    for name in re.findall(r"parameter `(\w+)`", content):
        assert name in FLAT_FIELDS


def test_code_that_the_paper_map_names_exists():
    """There the package's name is left out."""
    names = re.findall(r"`([a-z_]+\.[a-z_.]+)`", text("book/paper_map.md"))
    assert len(names) > 15
    for name in names:
        assert defined(name if name.startswith("data_prep.") else f"rlhf_guide.{name}"), name


# What version 3 of the paper has, by the label under which the map lists it.
SECTIONS = "1 1.1 1.2 1.3 1.4 2 2.1 2.2 3.1 3.2 3.3 4.1 4.2 5"
PAPER = {
    "§": SECTIONS.split(),
    "App.": ["A", "B.1", "B.2", "B.3", "C"],
    "Def.": ["1", "2"],
    "Theorem": ["1"],
    "Remark": ["1"],
    "Algorithm": ["1", "2"],
    "Eq.": [str(number) for number in range(1, 10)],
    "Table": [str(number) for number in range(1, 8)],
    "Figure": [str(number) for number in range(1, 13)],
}


@pytest.mark.parametrize("kind", PAPER)
def test_the_paper_map_leaves_nothing_out(kind):
    labels = re.findall(r"^\| ([^|]+) \|", text("book/paper_map.md"), re.MULTILINE)
    numbers = rf"{re.escape(kind)}s? ?([A-C\d.]+(?:, [\d.]+)*)"
    found = {
        n for label in labels for listed in re.findall(numbers, label) for n in listed.split(", ")
    }
    assert set(PAPER[kind]) <= found


def defined(name):
    """Whether a dotted name is a module here, or defined in one. Reads sources, imports nothing."""
    module, _, attribute = name.rpartition(".")
    if (ROOT / name.replace(".", "/")).with_suffix(".py").exists():
        return True
    source = text(f"{module.replace('.', '/')}.py")
    return bool(re.search(rf"^(def |class |){attribute}\b( = |\(|:)", source, re.MULTILINE))


def test_pages_cite_only_what_the_bibliography_has():
    known = set(re.findall(r"^@\w+\{(\w+),", text("book/references.bib"), re.MULTILINE))
    cited = {key for page in PAGES for key in re.findall(r"\{cite\}`(\w+)`", page.read_text())}
    assert cited <= known


def test_the_book_does_not_execute_notebooks_and_loads_mathjax_from_itself():
    config = yaml.safe_load(text("book/_config.yml"))
    assert config["execute"]["execute_notebooks"] == "off"
    assert "sphinx-mathjax-offline" in config["sphinx"]["extra_extensions"]


def test_generated_pages_are_current():
    for path, expected in book_pages.pages().items():
        assert path.read_text(encoding="utf-8") == expected, (
            f"{path.name}: python -m rlhf_guide.book_pages"
        )
