"""What is generated in the book and the README: status, results, an index, settings, two figures.

    python -m rlhf_guide.book_pages

`make book` runs it first; a test compares the stored pages with what it would write. Nothing is
measured here: the notebooks' metadata, the stored timings, the README's results and the profile
`paper` are read, and the results of benchmarks and slow tests.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import GuideError
from .files import read_json, write_text
from .headlines import SVG, describe, draw_results, table
from .notebook import in_words, read_timings
from .profiles import PROFILES, Profile
from .report import BEGIN, END
from .sources import list_notebooks, notebooks_dir, read_notebook

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("python", "torch", "transformers", "trl")

STATUS = """# Status of the chapters

Each chapter's outputs come from one run at the `cpu` profile; a test compares the hash of its code
with the one stored beside the outputs. Time, memory and disk are those of that run.

{chapters}

## Benchmarks and slow tests

They take too long for every change: `tests/benchmarks/record.py` and `make slow` run them by hand.
The last result of those that have one; the files beside that script have more.

{measurements}
"""

RESULTS = """# Results

All numbers of the published `cpu` run and, in the rows `seeds_…`, of the study over seeds, with 95%
intervals; `n` counts prompts, for the theory worlds. An interval of a gain that contains 0, or of a
win rate that contains ½, shows no difference. Chapter [08](../notebooks/08_evaluation.ipynb) says
how they were measured, and what they cannot show.

![{alt}](_static/results.svg)

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


def status_page(notebooks: Path, timings: dict, results: Path) -> str:
    """What each chapter's run cost and ran on, and what was last measured outside of it."""
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
    return STATUS.format(chapters=_lines(rows), measurements=measurements(results))


def measurements(results: Path) -> str:
    """The stored results of benchmarks and slow tests as a table."""
    head = ["what", "result", "date", *LIBRARIES]
    rows = [head, ["---"] * len(head)]
    for path in sorted(results.glob("*.json")):
        found = read_json(path)
        versions = [found["versions"].get(name, "–") for name in LIBRARIES]
        rows.append([_words(path.stem), _outcome(found), found["date"], *versions])
    return _lines(rows)


def _outcome(found: dict[str, Any]) -> str:
    """A result file in a line: tests passed, or the numbers that were measured."""
    if "tests" in found:
        passed = sum(test["outcome"] == "passed" for test in found["tests"])
        return f"{passed} of {len(found['tests'])} tests passed"
    return ", ".join(
        f"{_words(name)} {value:.3g}" if isinstance(value, float) else f"{_words(name)} {value:,}"
        for name, value in found["result"].items()
        if isinstance(value, int | float)
    )


def _words(name: str) -> str:
    """A name in words, which a narrow column can break."""
    return name.replace("_", " ")


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def results_page(readme: str) -> str:
    """The figure of results, and the table that `rlhf-guide report --readme` wrote."""
    tables = readme.partition(BEGIN)[2].partition(END)[0].strip()
    return RESULTS.format(alt=describe(readme), tables=tables.partition("\n\n")[0])


def hyper_parameters(paper: Profile) -> str:
    """The training settings of the profile `paper` as a table, for the paper map."""
    policy, judge = (
        name.rpartition("/")[2] for name in (paper.base_model, paper.reward_base_model)
    )
    dpo, online = paper.dpo, paper.online
    rounds = f"online DPO, each of {online.iterations} rounds"
    stages = [
        ("SFT", "sft", policy, paper.sft.epochs),
        ("reward model", "reward_model", judge, paper.reward_model.epochs),
        ("preference model", "preference_model", judge, paper.preference_model.epochs),
        (rounds, "dpo", "SFT policy, then the last round's", dpo.epochs),
        ("offline DPO", "dpo", "SFT policy", dpo.offline_epochs),
    ]
    head = ["stage", "section", "starts from", "epochs", "learning rate", "schedule", "warm-up"]
    head += ["batch", "tokens"]
    rows = [head, ["---"] * len(head)]
    for stage, section, start, epochs in stages:
        settings = _settings(getattr(paper, section))
        rows.append([stage, f"`{section}`", start, str(epochs), *settings])
    return (
        f"{_lines(rows)}\n\n"
        f"A round of online DPO: {online.prompts_per_iteration:,} prompts, "
        f"{online.samples_per_prompt} answers to each, half at temperature "
        f"{online.temperature_high} and half at {online.temperature_low}, of at most "
        f"{paper.generation.max_new_tokens:,} tokens; $\\eta = {dpo.beta:g}$. Table 7 adds AdamW, "
        f"{dpo.per_device_batch_size} pairs a device and, on eight devices, "
        f"{dpo.batch_size // (8 * dpo.per_device_batch_size)} accumulated batches."
    )


def _settings(part: Any) -> list[str]:
    """Learning rate, schedule, warm-up, batch and tokens of one stage, as the table prints them."""
    packed = getattr(part, "packing", False)
    return [
        f"{part.learning_rate:g}".replace("e-0", "e-"),
        part.scheduler,
        f"{part.warmup_ratio:.0%}",
        f"{part.batch_size} {'blocks' if packed else 'pairs'}",
        f"{part.max_length}{', packed' if packed else ''}",
    ]


def with_block(page: str, name: str, body: str) -> str:
    """The page with a new body between its comments `name:begin` and `name:end`.

    Raises `GuideError` when the page lacks them.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise GuideError(f"the page has no lines {begin} and {end}; add them where it belongs.")
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def plain_index(notebooks: Path, book: Path) -> str:
    """llms.txt: every chapter and page with its title, as links into the built book."""

    def links(paths: list[Path]) -> str:
        return "\n".join(f"- [{title}]({name}.html)" for name, title in titles(paths).items())

    pages = sorted(path for path in book.glob("*.md") if path.stem != "index")
    return INDEX.format(chapters=links(list_notebooks(notebooks)), pages=links(pages))


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every text page with generated parts and what belongs into it."""
    notebooks, book = notebooks_dir(root / "notebooks"), root / "book"
    readme, front, paper_map = (
        (root / name).read_text("utf-8")
        for name in ("README.md", "book/index.md", "book/paper_map.md")
    )
    image = f"![{describe(readme)}]"
    front_results = f"{image}(_static/results.svg)\n\n{table(readme)}"
    settings = hyper_parameters(PROFILES["paper"])
    return {
        root / "README.md": with_block(readme, "figure", f"{image}(book/_static/results.svg)"),
        book / "index.md": with_block(front, "results", front_results),
        book / "paper_map.md": with_block(paper_map, "hyper-parameters", settings),
        book / "status.md": status_page(
            notebooks, read_timings(), root / "tests" / "benchmarks" / "results"
        ),
        book / "results.md": results_page(readme),
        book / "llms.txt": plain_index(notebooks, book),
    }


def draw_front_figure(path: Path) -> None:
    """The pipeline as an SVG with real text, the same bytes each time."""
    import matplotlib

    from .pipeline import draw_pipeline

    with matplotlib.rc_context(SVG):
        draw_pipeline().savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Write all generated pages; the index comes last, since it lists the others."""
    for _ in range(2):
        for path, text in pages().items():
            write_text(path, text)
    static = ROOT / "book" / "_static"
    draw_front_figure(static / "pipeline.svg")
    draw_results(static / "results.svg", (ROOT / "README.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
