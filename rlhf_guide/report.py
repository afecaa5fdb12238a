"""Results of a run: a table for the terminal, one JSON object, one self-contained HTML page.

rlhf-guide report runs/cpu
rlhf-guide report runs/cpu --json
rlhf-guide report runs/cpu --readme
"""

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .course import read_record
from .errors import GuideError
from .files import plain_disk_errors, read_json, write_text
from .notebook import in_words
from .profiles import PROFILES
from .settings import section_dict
from .sources import list_notebooks, read_notebook
from .workspace import PENDING, STAGE_NOTEBOOK, Stage, Workspace

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
INTERVAL = {"value", "low", "high", "n"}


def open_finished(run: Path | str) -> Workspace:
    """A run folder as it is, for reading; raises `GuideError` when there is none."""
    path = Path(run)
    if not (path / "run.json").exists():
        raise GuideError(
            f"{path} is no run folder (it has no run.json); `rlhf-guide run` makes one, by default "
            "runs/<profile>."
        )
    name = read_json(path / "run.json")["profile"]
    if name not in PROFILES:
        raise GuideError(f"{path}/run.json names the unknown profile {name!r}.")
    return Workspace(path.resolve(), PROFILES[name])


def collect(workspace: Workspace) -> dict[str, Any]:
    """Everything measured: `profile`, `seconds`, `peak_gib`, `stages` and `metrics`.

    `stages` has every stage of the course with seconds, peak_gib and status (finished, unfinished
    or missing); `metrics` every number that a stage stored with its 95% interval.
    """
    finished = {s.name: s for s in workspace.finished() if s.name in STAGE_NOTEBOOK}
    stages = {name: _stage_row(workspace, name, finished.get(name)) for name in STAGE_NOTEBOOK}
    metrics: dict[str, Any] = {}
    for name in STAGE_NOTEBOOK:
        if name in finished:
            metrics.update(dict(_intervals(finished[name].metrics)))
    costs = list(notebook_records(workspace).values()) or list(stages.values())
    return {
        "profile": workspace.profile.name,
        "seconds": round(sum(row["seconds"] or 0 for row in costs), 1),
        "peak_gib": max((row["peak_gib"] or 0 for row in costs), default=0),
        "stages": stages,
        "metrics": metrics,
    }


def _stage_row(workspace: Workspace, name: str, stage: Stage | None) -> dict[str, Any]:
    if stage is None:
        begun = any((workspace.path / name).rglob(PENDING))
        return {"seconds": None, "peak_gib": None, "status": "unfinished" if begun else "missing"}
    manifest = stage.manifest
    return {key: manifest[key] for key in ("seconds", "peak_gib", "status")}


def _intervals(metrics: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metrics that carry an interval; single numbers are the notebooks' own."""
    for name, metric in metrics.items():
        if isinstance(metric, Mapping) and metric.keys() >= INTERVAL:
            yield name, {key: metric[key] for key in ("value", "low", "high", "n")}


def notebook_records(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The records of the notebooks that ran to their end, in course order."""
    stems = sorted(path.stem for path in (workspace.path / "notebooks").glob("[0-9]*.json"))
    found = {stem: read_record(workspace, stem) for stem in stems}
    return {stem: record for stem, record in found.items() if record["status"] == "ok"}


def tables(workspace: Workspace) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report's tables: title, header and rows of text."""
    results = collect(workspace)
    metrics = [[name, *_cells(metric)] for name, metric in results["metrics"].items()]
    notebooks = [
        [stem, in_words(row["seconds"]), f"{row['peak_gib']:.1f} GiB", f"{row['disk_gib']:.2f} GiB"]
        for stem, row in notebook_records(workspace).items()
    ]
    total = ["all", in_words(results["seconds"]), f"{results['peak_gib']:.1f} GiB", ""]
    stages = [[name, row["status"], _seconds(row)] for name, row in results["stages"].items()]
    return [
        ("Results", ["metric", "value", "95% interval", "n"], metrics),
        ("Notebooks", ["notebook", "time", "memory", "disk"], [*notebooks, total]),
        ("Stages", ["stage", "status", "time"], stages),
    ]


def _cells(metric: Mapping[str, Any]) -> list[str]:
    low, high = _number(metric["low"]), _number(metric["high"])
    return [_number(metric["value"]), f"{low} to {high}", str(metric["n"])]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _seconds(row: Mapping[str, Any]) -> str:
    return "–" if row["seconds"] is None else in_words(row["seconds"])


def as_text(workspace: Workspace) -> str:
    """The report for a terminal."""
    blocks = [f"Run {workspace.path.name}, profile {workspace.profile.name}"]
    for title, header, rows in tables(workspace):
        lines = [header, *rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
        padded = [
            "  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        body = [text.rstrip() for text in (padded[0], rule, *padded[1:])]
        blocks.append("\n".join([title, *body]))
    return "\n\n".join(blocks)


def as_markdown(workspace: Workspace) -> str:
    """The results and the notebooks' costs as Markdown tables (for the README).

    Beside a run that was not repeated over seeds stand the seeds of the study that comes with the
    course, if the run has its settings.
    """
    blocks = []
    for title, header, rows in tables(workspace)[:2]:
        if title == "Results":
            own = {row[0] for row in rows}
            rows = rows + [row for row in _rows_over_seeds(workspace) if row[0] not in own]
        lines = [header, ["---"] * len(header), *rows]
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(blocks)


def _rows_over_seeds(workspace: Workspace) -> list[list[str]]:
    from .studies import load_study  # only here: it takes seconds to import

    study, profile = load_study(workspace, "online_seeds"), workspace.profile
    settings = {"dpo": section_dict(profile.dpo), "online": section_dict(profile.online)}
    if settings != {name: study["config"][name] for name in settings}:
        return []
    return [
        [f"seeds_{name}", *_cells(metric)]
        for name, metric in _intervals(study["metrics"])
        if "_minus_" in name
    ]


def write_readme(workspace: Workspace, readme: Path) -> None:
    """Replace the block between the results markers of a README.

    Raises `GuideError` when the file or its markers are missing.
    """
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise GuideError(f"{readme} has no lines {BEGIN} and {END}; add them where results belong.")
    write_text(readme, f"{before}{BEGIN}\n{as_markdown(workspace)}\n{END}{after}")


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #8888; padding: .25rem .8rem .25rem 0; text-align: left; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #777; font-size: .9rem; }
"""


def write_html(workspace: Workspace) -> Path:
    """Write RUN/report.html: the tables and the executed notebooks' figures, nothing external."""
    title = f"RLHF Guide: results of profile {html.escape(workspace.profile.name)}"
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(_made_with(workspace))}</p>"]
    parts += [_html_table(*table) for table in tables(workspace)]
    for path in list_notebooks(workspace.path / "notebooks"):
        if found := [_html_figure(*figure) for figure in figures(path)]:
            parts += [f"<h2>{html.escape(path.stem)}</h2>", *found]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    target = workspace.path / "report.html"
    with plain_disk_errors(target):
        write_text(target, page + "\n".join(parts) + "\n</body></html>\n")
    return target


def _made_with(workspace: Workspace) -> str:
    """Versions, device and data type of the last stage that finished."""
    manifests = [stage.manifest for stage in workspace.finished()]
    if not manifests:
        return "No stage has finished yet."
    last = max(manifests, key=lambda manifest: manifest["finished_at"])
    libraries = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return f"{last['finished_at']}, {last['device']}, {last['dtype']}; {libraries}."


def _html_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<h2>{title}</h2>\n<table>\n{line(header, 'th')}\n{body}\n</table>"


def figures(path: Path) -> Iterator[tuple[str, str, str]]:
    """The images among a notebook's outputs: media type, base64 text and alternative text."""
    for cell in read_notebook(path).cells:
        for output in cell.get("outputs", []):
            if data := output.get("data", {}).get("image/png"):
                extra = output.get("metadata", {}).get("image/png", {})
                alt = extra.get("alt") or output["data"].get("text/plain", "")
                yield "image/png", data.replace("\n", ""), alt


def _html_figure(media: str, data: str, alt: str) -> str:
    text = html.escape(alt, quote=True)
    image = f'<img alt="{text}" src="data:{media};base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
