"""The figures of a run, drawn: each plot is defined once, for PNG and for SVG that follows the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculens.bench.figures import POOLED
from speculens.bench.record import NONE, Record
from speculens.bench.tables import Summary, labels
from speculens.errors import lacking

# Colours of drafters and parts, told apart by people who see no red or no green: name in the page, on white, on black.
COLOURS = (
    ("--c0", "#2f6db3", "#7fb0ea"),
    ("--c1", "#c8641b", "#f0a35e"),
    ("--c2", "#3d8b5c", "#6fc491"),
    ("--c3", "#8455ae", "#bb98e0"),
    ("--c4", "#b8405e", "#ee8aa2"),
    ("--c5", "#80713f", "#c4b57a"),
)
PAPER, INK, QUIET, LINE = "#ffffff", "#22262b", "#5c636b", "#dedad3"
SHARED = (("--ink", INK), ("--quiet", QUIET), ("--line", LINE), ("--card", PAPER))
PARTS = ("vision", "prefill", "draft", "verify", "host")
FEW = 5  # numbers of visual tokens that have room for a mark each
SIZE = (5.0, 3.4)  # inches: small, so that text can be read where the page is narrow

STYLE = "".join(
    (
        ":root { ",
        *(f"{name}: {light}; " for name, light, _ in COLOURS),
        "}\n@media (prefers-color-scheme: dark) { :root { ",
        *(f"{name}: {dark}; " for name, _, dark in COLOURS),
        "} }\n",
    )
)


@dataclass(frozen=True)
class Plot:
    """One figure. `title` says what is seen; `about` how to read it."""

    name: str
    title: str
    about: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class _Drawing:
    name: str
    title: str
    about: str
    draw: Callable[[Any, Summary, Sequence[Record]], None]
    needs: Callable[[Summary], Any] = bool  # where this has nothing, the figure is left out


def plots(summary: Summary, records: Sequence[Record]) -> list[Plot]:
    """Every figure of a run. Raises UserError without matplotlib."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise lacking("Plots need", "matplotlib", "plot") from None
    made = []
    with mpl.rc_context(_RC):
        for drawing in (one for one in DRAWINGS if one.needs(summary)):
            figure = Figure(figsize=SIZE, layout="constrained")
            drawing.draw(figure.add_subplot(), summary, records)
            png, svg = io.BytesIO(), io.StringIO()
            figure.savefig(png, format="png", dpi=200)
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            made.append(
                Plot(drawing.name, drawing.title, drawing.about, png.getvalue(), _themed(svg.getvalue(), drawing))
            )
    return made


def write(plots_: Sequence[Plot], folder: Path) -> list[Path]:
    """The plots as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{plot.name}.png" for plot in plots_]
    for plot, file in zip(plots_, files, strict=True):
        file.write_bytes(plot.png)
    return files


def _themed(svg: str, drawing: _Drawing) -> str:
    """The drawing alone, with the page's variables for its colours, and a name for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{drawing.title}">', svg
    )
    for name, light in (*SHARED, *((name, light) for name, light, _ in COLOURS)):
        svg = svg.replace(light, f"var({name})")
    return svg


_RC: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "speculens",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def _drafters(summary: Summary) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """Name, label, colour and figures of everybody who answered; `none` is grey and first."""
    names = labels(list(summary["drafters"]))
    colours = iter([light for _, light, _ in COLOURS] * len(names))
    return [
        (name, names[name], QUIET if name == NONE else next(colours), about)
        for name, about in summary["drafters"].items()
        if about[POOLED]
    ]


def _timed(summary: Summary) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """Those at whom the closer look was."""
    return [drafter for drafter in _drafters(summary) if "costs" in drafter[3][POOLED]]


def _guessers(summary: Summary) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    return [drafter for drafter in _drafters(summary) if drafter[0] != NONE]


def _speedup_by_topic(axes: Any, summary: Summary, _records: Sequence[Record]) -> None:
    drafters, topics = _guessers(summary), list(summary["topics"])
    height = 0.8 / max(len(drafters), 1)
    for number, (_, label, colour, about) in enumerate(drafters):
        lines = [(place, about["topics"][topic]) for place, topic in enumerate(topics) if topic in about["topics"]]
        values = [line["walltime_speedup"] for _, line in lines]
        low, high = zip(*(line["walltime_speedup_quartiles"] for _, line in lines), strict=True)
        axes.barh(
            [place + (number - (len(drafters) - 1) / 2) * height for place, _ in lines],
            values,
            height * 0.9,
            color=colour,
            label=label,
            xerr=[
                [max(value - edge, 0) for value, edge in zip(values, low, strict=True)],
                [max(edge - value, 0) for value, edge in zip(values, high, strict=True)],
            ],
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(topics)), topics)
    margin = 0.5 if len(topics) > 1 else 1.0  # a topic alone would fill the drawing
    axes.set_ylim(len(topics) - 1 + margin, -margin)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("times as fast as none, end to end")
    _legend(axes, drafters)


def _acceptance_by_position(axes: Any, summary: Summary, _records: Sequence[Record]) -> None:
    drafters = [one for one in _guessers(summary) if one[3][POOLED]["acceptance_rate_per_position"]]
    deepest = 1
    for _, label, colour, about in drafters:
        rates = about[POOLED]["acceptance_rate_per_position"]
        deepest = max(deepest, len(rates))
        axes.plot(range(1, len(rates) + 1), rates, marker="o", markersize=4, color=colour, label=label)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("level of the draft tree")
    axes.set_ylabel("share of passes that accepted it")
    _legend(axes, drafters)


def _efficiency_plane(axes: Any, summary: Summary, _records: Sequence[Record]) -> None:
    drafters = [one for one in _drafters(summary) if one[3][POOLED]["seconds_per_pass"]]
    plain = summary["drafters"][NONE][POOLED]["seconds_per_pass"] or 1.0
    costs = [about[POOLED]["seconds_per_pass"] / plain for *_, about in drafters] or [1.0]
    lengths = [about[POOLED]["mean_acceptance_length"] for *_, about in drafters] or [1.0]
    right, top = max(2.0, *costs) * 1.12, max(2.0, *lengths) * 1.12
    for speedup in (0.5, *range(1, 1 + math.ceil(top))):  # lines of equal speedup, named where they leave the plane
        edge = min(right, top / speedup)
        axes.plot([0, edge], [0, speedup * edge], color=LINE, linewidth=1, zorder=1)
        above = edge < right
        axes.annotate(
            f"{speedup:g}×",
            (edge, speedup * edge),
            (0, 2) if above else (2, 0),
            textcoords="offset points",
            color=QUIET,
            fontsize=9,
            ha="center" if above else "left",
            va="bottom" if above else "center",
            annotation_clip=False,
        )
    axes.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=1)
    axes.annotate("free drafting", (1, 0), (3, 3), textcoords="offset points", color=QUIET, fontsize=9)
    for (_, label, colour, _), cost, length in zip(drafters, costs, lengths, strict=True):
        axes.scatter([cost], [length], color=colour, s=42, zorder=3, label=label)
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.grid(visible=False)
    axes.set_xlabel("time of a pass, in plain passes")
    axes.set_ylabel("tokens per pass")
    _legend(axes, drafters, lift=1.06)


def _cost_split(axes: Any, summary: Summary, _records: Sequence[Record]) -> None:
    drafters = _timed(summary)
    begun = [0.0] * len(drafters)
    for number, part in enumerate(PARTS):
        costs = [about[POOLED]["costs"] for *_, about in drafters]
        spent = [max(1e3 * cost[part] / max(cost["answers"], 1), 0.0) for cost in costs]
        colour = QUIET if part == "host" else COLOURS[number][1]
        axes.barh(range(len(drafters)), spent, 0.6, left=begun, color=colour, label=part)
        begun = [before + more for before, more in zip(begun, spent, strict=True)]
    axes.set_yticks(range(len(drafters)), [label for _, label, *_ in drafters])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds an answer")
    _legend(axes, PARTS)


def _speedup_by_picture(axes: Any, summary: Summary, records: Sequence[Record]) -> None:
    drafters = _guessers(summary)
    counts = sorted({record.image_tokens for record in records}) or [0]
    apart = max(counts[-1] - counts[0], 10) / 40  # beside each other, where they would hide each other
    for number, (name, label, colour, _) in enumerate(drafters):
        shift = (number - (len(drafters) - 1) / 2) * apart
        pairs = [
            (record.image_tokens + shift, record.answers[NONE].seconds / record.answers[name].seconds)
            for record in records
            if name in record.answers
        ]
        axes.scatter(*zip(*pairs, strict=True), color=colour, s=14, alpha=0.6, label=label)
    if len(counts) <= FEW:
        axes.set_xticks(counts)
    axes.set_xlim(counts[0] - 4 * apart, counts[-1] + 4 * apart)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("visual tokens of the prompt")
    axes.set_ylabel("times as fast as none")
    _legend(axes, drafters)


def _legend(axes: Any, entries: Sequence[Any], lift: float = 1.0) -> None:
    """Above the drawing, where it covers nothing."""
    if entries:
        axes.legend(loc="lower left", bbox_to_anchor=(0, lift), ncols=3, borderaxespad=0.2, handlelength=1.2)


DRAWINGS = (
    _Drawing(
        "speedup-by-topic",
        "Speedup by topic",
        "End to end, all questions of a topic together; thin lines span the middle half of the pairs.",
        _speedup_by_topic,
    ),
    _Drawing(
        "acceptance-by-position",
        "Acceptance by position",
        "How many passes accepted a drafted token at each level of the tree.",
        _acceptance_by_position,
    ),
    _Drawing(
        "efficiency-plane",
        "Tokens against time of a pass",
        "Decoding alone. Lines through the origin are speedups. On the dashed line a drafted pass would cost no more "
        "than a plain one; how far a point lies to its right is the price of drafting.",
        _efficiency_plane,
    ),
    _Drawing(
        "cost-split",
        "Where the time goes",
        "From a closer look at a few answers: eager steps, waiting for the device around each part, where measured "
        "ones may have been graphs. Verify is scoring and choosing, "
        "draft includes what the drafter learns from each pass, host is the rest.",
        _cost_split,
        _timed,
    ),
    _Drawing(
        "speedup-by-visual-tokens",
        "Speedup against visual tokens",
        "Each point is one answer, end to end; drafters stand side by side.",
        _speedup_by_picture,
    ),
)
