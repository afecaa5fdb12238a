"""The book's generated pages: status of each chapter, results, a plain index, the pipeline figure.

    python -m rlhf_guide.book_pages

`make book` runs it first; a test compares the stored pages with what it would write. Nothing is
measured here: the notebooks' metadata, the stored timings and the README's results are read.
"""

from pathlib import Path

from .files import write_text
from .notebook import in_words, read_timings
from .report import BEGIN, END
from .sources import list_notebooks, notebooks_dir, read_notebook

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("python", "torch", "transformers", "trl")

STATUS = """# Status of the chapters

Each chapter's outputs come from one run at the `cpu` profile; a test compares the hash of its code
with the one stored beside the outputs. Time, memory and disk are those of that run.

{chapters}
"""

RESULTS = """# Results

All numbers of the published `cpu` run, with 95% intervals; `n` counts prompts, for the theory
worlds. An interval of a gain that contains 0, or of a win rate that contains ½, shows no
difference. Chapter [08](../notebooks/08_evaluation.ipynb) says how they were measured, and what
they cannot show.

{tables}
"""

INDEX = """# RLHF Guide

> Notebooks from raw preference pairs to three iterations of online DPO, after "RLHF Workflow: From
> Reward Modeling to Online RLHF" (Dong, Xiong et al., TMLR 2024).

## Chapters

{chapters}

## To look things up

{pages}
"""


def titles(paths: list[Path]) -> dict[str, str]:
    """Path below the repository to title, of notebooks and Markdown pages."""
    found = {}
    for path in paths:
        notebook = path.suffix == ".ipynb"
        text = read_notebook(path).cells[0].source if notebook else path.read_text("utf-8")
        heading = next((line for line in text.splitlines() if line.startswith("# ")), path.stem)
        found[f"{path.parent.name}/{path.stem}"] = heading.removeprefix("# ")
    return found


def status_page(notebooks: Path, timings: dict) -> str:
    """The table of chapters: time, memory, disk and versions of the run behind the outputs."""
    head = ["chapter", "time", "memory", "disk", *LIBRARIES]
    rows = [head, ["---"] * len(head)]
    for path in list_notebooks(notebooks):
        stamp = read_notebook(path).metadata.get("rlhf_guide")
        cost = timings.get("cpu", {}).get(path.stem)
        link = f"[{path.stem}](../notebooks/{path.name})"
        if stamp is None or cost is None:
            rows.append([link, "no stored outputs yet", *[""] * (len(head) - 2)])
            continue
        disk = f"{cost['disk_gib']:.1f} GiB"
        costs = [in_words(stamp["seconds"]), f"{cost['peak_gib']:.1f} GiB", disk]
        rows.append([link, *costs, *(stamp["versions"].get(name, "–") for name in LIBRARIES)])
    return STATUS.format(chapters="\n".join(f"| {' | '.join(row)} |" for row in rows))


def results_page(readme: str) -> str:
    """The tables that `rlhf-guide report --readme` wrote, as a page of the book."""
    tables = readme.partition(BEGIN)[2].partition(END)[0].strip()
    return RESULTS.format(tables=tables.partition("\n\n")[0])


def plain_index(notebooks: Path, book: Path) -> str:
    """llms.txt: every chapter and page with its title, as links into the built book."""

    def links(paths: list[Path]) -> str:
        return "\n".join(f"- [{title}]({name}.html)" for name, title in titles(paths).items())

    pages = sorted(path for path in book.glob("*.md") if path.stem != "index")
    return INDEX.format(chapters=links(list_notebooks(notebooks)), pages=links(pages))


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every generated text page of the book and what belongs into it."""
    notebooks, book = notebooks_dir(root / "notebooks"), root / "book"
    return {
        book / "status.md": status_page(notebooks, read_timings()),
        book / "results.md": results_page((root / "README.md").read_text("utf-8")),
        book / "llms.txt": plain_index(notebooks, book),
    }


def draw_front_figure(path: Path) -> None:
    """The pipeline as an SVG with real text, the same bytes each time."""
    import matplotlib

    from .pipeline import draw_pipeline

    settings = {"svg.fonttype": "none", "svg.hashsalt": "rlhf-guide"}
    with matplotlib.rc_context(settings):
        draw_pipeline().savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Write all generated pages; the index comes last, since it lists the others."""
    for _ in range(2):
        for path, text in pages().items():
            write_text(path, text)
    draw_front_figure(ROOT / "book" / "_static" / "pipeline.svg")


if __name__ == "__main__":
    main()
