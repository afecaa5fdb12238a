"""The built book, page by page: `make book` runs this after building.

Skipped where no book is built, or an older one lies there. RLHF_GUIDE_BOOK names the folder of a
build that must pass, whatever its age.
"""

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NAMED = os.environ.get("RLHF_GUIDE_BOOK")
HTML = Path(NAMED or ROOT / "book" / "_build" / "html")
SOURCES = ("notebooks/*.ipynb", "book/*.md", "book/*.yml")


def why_skipped() -> str:
    """Why there is nothing to test, or nothing."""
    built = HTML / "searchindex.js"  # written last
    if NAMED:
        return ""
    if not built.exists():
        return "no built book: make book"
    newest = max(path.stat().st_mtime for kind in SOURCES for path in ROOT.glob(kind))
    old = newest > built.stat().st_mtime
    return "the book was built before the last change: make book" if old else ""


pytestmark = pytest.mark.skipif(bool(why_skipped()), reason=why_skipped())

# Attributes with which a page makes the browser load something.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


def chapters():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(row["file"] for part in toc["parts"] for row in part["chapters"])]


@pytest.fixture(scope="module")
def soups():
    """Every chapter, parsed: path below the built book to its tree."""
    from bs4 import BeautifulSoup

    return {
        name: BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "lxml")
        for name in chapters()
        if (HTML / f"{name}.html").exists()
    }


@pytest.fixture(scope="module")
def articles(soups):
    """The text proper of every chapter, without menus."""
    return {name: soup.find("article") for name, soup in soups.items()}


def stored(name):
    """A chapter's notebook as JSON."""
    return json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))


def notebooks():
    return [name for name in chapters() if name.startswith("notebooks/")]


def test_every_chapter_is_built(articles):
    assert set(articles) == set(chapters())
    titles = {name: len(article.find_all("h1")) for name, article in articles.items()}
    assert titles == dict.fromkeys(articles, 1)


def test_every_stored_figure_is_on_its_page_with_its_alternative_text(articles):
    for name in notebooks():
        outputs = [o for cell in stored(name)["cells"] for o in cell.get("outputs", [])]
        metadata = [o["metadata"] for o in outputs if "image/png" in o.get("data", {})]
        alts = [m.get("image/png", {}).get("alt") for m in metadata]
        images = articles[name].select(".cell_output img")
        assert len(images) == len(alts), name
        assert [image.get("alt") for image in images] == alts, name


def test_every_image_says_what_it_shows(articles):
    for name, article in articles.items():
        for image in article.find_all("img"):
            assert len(image.get("alt", "")) > 20, f"{name}: {image.get('src')}"


def test_every_equation_of_the_source_is_typeset(articles):
    for name in notebooks():
        cells = [cell for cell in stored(name)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        assert len(articles[name].select("div.math")) == text.count("$$") // 2, name


def test_no_page_shows_a_traceback_or_unread_markup(articles):
    for name, article in articles.items():
        for code in article.find_all(["pre", "code"]):
            code.extract()
        text = article.get_text()
        assert "Traceback (most recent call last)" not in text, name
        assert not re.search(r"\{(cite|eq|ref)\}|:::", text), name


def test_pages_load_nothing_from_another_host(soups):
    for name, soup in soups.items():
        for tag, attribute in LOADED.items():
            for element in soup.find_all(tag):
                if tag == "link" and "canonical" in element.get("rel", []):
                    continue
                target = urlsplit(element.get(attribute) or "")
                assert target.netloc == "", f"{name}: {element}"


def test_style_sheets_load_nothing_from_another_host():
    for path in (HTML / "_static").rglob("*.css"):
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", text), path.name


def test_links_and_anchors_resolve(soups):
    ids = {
        (HTML / f"{name}.html").resolve(): {e["id"] for e in soup.find_all(id=True)}
        for name, soup in soups.items()
    }
    for name, soup in soups.items():
        page = (HTML / f"{name}.html").resolve()
        for link in soup.find("article").find_all("a", href=True):
            target = urlsplit(link["href"])
            if target.scheme or target.netloc:
                continue
            found = (page.parent / unquote(target.path)).resolve() if target.path else page
            assert found.exists(), f"{name}: {link['href']}"
            if target.fragment and found in ids:
                assert unquote(target.fragment) in ids[found], f"{name}: {link['href']}"


def test_every_chapter_offers_its_notebook_for_download(soups):
    for name in notebooks():
        button = soups[name].select_one("a.btn-download-source-button")
        offered = (HTML / f"{name}.html").parent / button["href"]
        assert json.loads(offered.read_text(encoding="utf-8"))["cells"], name


def test_the_search_index_knows_every_chapter():
    index = (HTML / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{name}"' in index for name in chapters())


def test_the_plain_index_is_beside_the_pages():
    text = (HTML / "llms.txt").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (HTML / target).exists(), target
