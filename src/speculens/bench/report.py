"""Runs as one page: exactness, tables, plots, and one prompt walked step by step with its draft trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from speculens import html
from speculens.bench import plots, tables
from speculens.bench.figures import check_measured
from speculens.bench.record import NONE, Record, read_closer, read_json, read_records

COLUMN, ROW, MARGIN = 104, 22, 6  # pixels between levels and between leaves of a drawn tree
LONGEST = 12  # characters of a node that are drawn
LEAD = (
    "Every question was answered by the target alone and by each drafter, one right after the other, in one process. "
    "Whatever is drafted, each token is the target's own choice; a drafter can only make it come sooner."
)


@dataclass(frozen=True)
class Run:
    """What a folder of `speculens bench` holds."""

    name: str
    summary: tables.Summary
    records: Sequence[Record]
    walk: Mapping[str, Any]


def read_run(folder: Path) -> Run:
    """Raises UserError if the run is not finished, or nothing could be measured in it."""
    summary = read_json(folder / "summary.json")
    check_measured(summary, folder)
    return Run(folder.resolve().name, summary, read_records(folder), read_closer(folder)["walk"])


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write the page, and its plots as PNG beside it; returns all files. Raises UserError without matplotlib."""
    drawn = [plots.plots(run.summary, run.records) for run in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(runs, drawn), encoding="utf-8")
    folders = [out.parent / "plots" / (run.name if len(runs) > 1 else "") for run in runs]
    return [out, *(file for made, folder in zip(drawn, folders, strict=True) for file in plots.write(made, folder))]


def render(runs: Sequence[Run], drawn: Sequence[Sequence[plots.Plot]]) -> str:
    """The page."""
    main = (line for run, made in zip(runs, drawn, strict=True) for line in _run(run, made, alone=len(runs) == 1))
    return html.document("Speculens: what was measured", LEAD, main, style=plots.STYLE + STYLE)


def _run(run: Run, made: Sequence[plots.Plot], *, alone: bool) -> Iterator[str]:
    summary = run.summary
    yield "<section>"
    if not alone:
        yield f"<h2>{escape(run.name)}</h2>"
    yield f'<p class="about">{escape(tables.about(summary))}</p>'
    yield "<h3>The same answers?</h3>"
    yield '<ul class="exact">'
    yield from (f"<li>{escape(line)}</li>" for line in (*tables.exactness(summary), *tables.failures(summary)))
    yield "</ul><h3>How fast</h3>"
    yield from html.table("Speed", tables.SPEED_HEADINGS, tables.speed_rows(summary))
    yield (
        '<p class="about">Speedup is the time of "none" over the drafter\'s own, all questions together; the interval '
        "is its bootstrap over conversations, median and quartiles are those of the pairs.</p>"
    )
    if tables.has_peers(summary):
        yield f'<p class="about">{escape(tables.OTHER_LOOP)}</p>'
    yield "<h3>What a pass brings and costs</h3>"
    yield from html.table("Passes", tables.PASS_HEADINGS, tables.pass_rows(summary))
    yield (
        '<p class="about">Length is tokens per pass of the target, its own at the end included, and without. '
        "Efficiency is speedup over length: 1 would be free drafting. Draft share is that of decoding time; prefill "
        "share is the rows of the drafter's prefill over those of the target's.</p>"
    )
    yield '<div class="plots">'
    for plot in made:
        yield f"<figure>{plot.svg}<figcaption><b>{escape(plot.title)}.</b> {escape(plot.about)}</figcaption></figure>"
    yield "</div>"
    if len(summary["topics"]) > 1:
        yield "<h3>By topic</h3>"
        yield from html.table("By topic", tables.TOPIC_HEADINGS, tables.topic_rows(summary), words=2)
    yield from _walk(run)
    yield "</section>"


# ---- one prompt, step by step ---------------------------------------------------------------------------------------


def _walk(run: Run) -> Iterator[str]:
    names = tables.labels(list(run.summary["drafters"]))
    walked = {name: steps for name, steps in run.walk["steps"].items() if name != NONE and steps}
    if not walked:
        return
    yield "<h3>One prompt, step by step</h3>"
    if run.walk.get("picture"):
        yield f'<img src="{escape(run.walk["picture"])}" alt="The picture of the prompt">'
    yield f'<p class="question">{escape(run.walk["question"])}</p>'
    yield (
        '<p class="about">Each step is one pass of the target over a whole tree of guesses. '
        '<span class="kept">Drafted and kept</span> tokens are those that the target wanted too; after them comes one '
        "token of its own.</p>"
    )
    for name, steps in walked.items():
        yield f"<h4>{escape(names[name])}</h4>"
        yield f'<p class="answer">{"".join(map(_said, steps)).lstrip()}</p>'
        for number, step in enumerate(steps):
            if step["nodes"]:
                yield from _step(number, step, opened=number == 1)


def _said(step: Mapping[str, Any]) -> str:
    """A step's tokens; those that were drafted are marked."""
    kept, own = step["tokens"][: step["accepted"]], step["tokens"][step["accepted"] :]
    drafted = f'<span class="kept">{escape("".join(kept))}</span>' if kept else ""
    return drafted + escape("".join(own))


def _step(number: int, step: Mapping[str, Any], *, opened: bool) -> Iterator[str]:
    kept, drafted = len(step["path"]) - 1, len(step["nodes"]) - 1
    yield f"<details{' open' if opened else ''}><summary>Step {number}: {kept} kept of {drafted} drafted. "
    yield f'<span class="said">{_said(step)}</span></summary>'
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="Draft tree of step {number}">'
    yield draw_tree(step["nodes"], step["parents"], step["path"])
    yield "</div></details>"


def draw_tree(nodes: Sequence[str], parents: Sequence[int], path: Sequence[int]) -> str:
    """A tree as SVG, the root at the left; each leaf has a line of its own, and what was kept is marked."""
    places = _places(parents)
    kept = set(path)
    width = (max(level for level, _ in places) + 1) * COLUMN + 2 * MARGIN
    height = (max(line for _, line in places) + 1) * ROW + 2 * MARGIN
    edges, words = [], []
    for node, (level, line) in enumerate(places):
        x, y = MARGIN + level * COLUMN, MARGIN + (line + 0.5) * ROW
        mark = ' class="on"' if node in kept else ""
        text = _visible(nodes[node])
        box = 7.2 * len(text) + 8
        if node:
            above_level, above_line = places[parents[node]]
            start = MARGIN + above_level * COLUMN + 7.2 * len(_visible(nodes[parents[node]])) + 8
            above = MARGIN + (above_line + 0.5) * ROW
            bend = (start + x) / 2
            edges.append(
                f'<path{mark} d="M{start:.0f} {above:.0f}C{bend:.0f} {above:.0f} {bend:.0f} {y:.0f} {x} {y:.0f}"/>'
            )
        words.append(
            f'<g{mark}><rect x="{x}" y="{y - 9:.0f}" width="{box:.0f}" height="18" rx="3"/>'
            f'<text x="{x + 4}" y="{y + 4:.0f}">{escape(text)}</text></g>'
        )
    label = f"{len(nodes) - 1} guesses, {len(path) - 1} kept: {''.join(nodes[node] for node in path[1:])}"
    return (
        f'<svg class="tree" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(edges)}{"".join(words)}</svg>'
    )


def _places(parents: Sequence[int]) -> list[tuple[int, float]]:
    """Level and line of each node: leaves take lines in reading order, a parent stands level with its first child."""
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    places: list[tuple[int, float]] = [(0, 0.0)] * len(parents)
    used = 0

    def place(node: int, level: int) -> None:
        nonlocal used
        places[node] = level, used
        for number, child in enumerate(children[node]):
            used += number > 0
            place(child, level + 1)

    place(0, 0)
    return places


def _visible(token: str) -> str:
    """A token as it can be read: white signs shown, long ones cut."""
    text = token.replace("\n", "↵").replace("\t", "⇥")
    text = f"␣{text[1:]}" if text[:1] == " " else text
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…") or "·"


STYLE = """
.exact { padding-left: 1.1rem; margin: .25rem 0; }
section > h3 { margin: 2.25rem 0 .5rem; }
h4 { margin: 1.5rem 0 .5rem; font-size: .9375rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.25rem;
  margin-top: 2rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figure svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; stroke-linejoin: round; }
figcaption { margin-top: .5rem; color: var(--quiet); font-size: .8125rem; line-height: 1.5; }
figcaption b { color: var(--ink); }
section > img { max-width: min(20rem, 100%); }
.question { font-weight: 600; }
.answer { max-width: 46rem; line-height: 1.75; white-space: pre-wrap; }
details { border-top: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; font-size: .875rem; color: var(--quiet); }
summary:focus-visible { outline: 2px solid var(--edge); outline-offset: 2px; }
.said { color: var(--ink); white-space: pre-wrap; }
.tree { display: block; font: 12px ui-monospace, monospace; }
.tree path { fill: none; stroke: var(--quiet); stroke-opacity: .45; stroke-width: 1.5; }
.tree path.on { stroke: var(--edge); stroke-opacity: 1; stroke-width: 2; }
.tree rect { fill: var(--card); stroke: var(--line); }
.tree .on rect { fill: var(--kept); stroke: var(--edge); }
.tree text { fill: var(--quiet); white-space: pre; }
.tree .on text { fill: var(--ink); }
"""
