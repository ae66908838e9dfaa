"""Questions and answers about charts, and how exactly an answer reads the values.

The wording of an answer follows from the question (which picks the style 0, 1 or 2) and from the data alone, so that
a model which reads the picture can foresee it. The first mention of a label is always followed by its value: that is
what `reading` checks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from testbed import words
from testbed.charts import Chart, between
from testbed.words import listed

Facts = tuple[tuple[str, str], ...]  # (label, value); a label of several words to be met in turn is "Jan|Plan"

TASKS = ("describe", "table", "compare")
QUESTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "describe": (
        ("Describe this {it} in detail.", "What does this {it} show?"),
        ("Describe this {it}, starting with the highest{first}.", "Go through this {it} from high to low{by}."),
        ("Describe this {it} for someone who cannot see it.", "Read out this {it}."),
    ),
    "table": (
        ("Write the data as a markdown table.", "Turn this {it} into a markdown table."),
        ("Write the data as a markdown table with ranks{by}.", "Make a markdown table, and rank the rows{by}."),
        ("Write the data as a markdown table and add {extra}.", "Make a markdown table which also tells {extra}."),
    ),
    "compare": (
        ("Compare {them} step by step.", "Compare each of {them} with the one before."),
        ("Rank {them}, then compare.", "Compare {them} in order of size."),
        ("Which of {them} is highest, and which lowest? Think step by step.", "Find the extremes among {them}."),
    ),
}

_PAIRED = (
    ("Compare {a} and {b} step by step.", "Set {a} against {b}, one by one."),
    ("Compare {a} and {b}, sorted by {a}.", "From the highest {a} on, compare {a} with {b}."),
    ("Which wins each time, {a} or {b}?", "Say who beats whom, {a} or {b}."),
)
_NAMES = {
    "bars": "vertical bar chart",
    "hbars": "horizontal bar chart",
    "line": "line chart",
    "grouped": "grouped bar chart",
    "pie": "pie chart",
    "table": "table",
}
_MARKS = {"bars": "bars", "hbars": "bars", "line": "points", "pie": "slices"}
_WAYS = {"hbars": "From top to bottom", "table": "From top to bottom", "pie": "Clockwise from the top"}


def question(chart: Chart, task: str, style: int, paraphrase: int, column: int) -> str:
    """The question that asks for `answer(chart, task, style, column)`; there are two paraphrases, 0 and 1."""
    if task == "compare" and chart.kind == "grouped":
        return _PAIRED[style][paraphrase].format(a=chart.series[0], b=chart.series[1])
    them = f"the {chart.noun} values" if chart.kind != "table" else f"the {chart.series[column]} values"
    by, first = (f" by {chart.series[0]}", f" {chart.series[0]}") if chart.series else ("", "")
    pattern = QUESTIONS[task][style][paraphrase]
    return pattern.format(it=_NAMES[chart.kind], them=them, by=by, first=first, extra=_extra(chart))


def answer(chart: Chart, task: str, style: int, column: int) -> tuple[str, Facts]:
    """The exact answer and the facts it states. `column` is the one that a table is compared by."""
    if task == "compare" and chart.kind == "table":
        values = chart.column(column)
        return _compare(chart, values, style), tuple(zip(chart.labels, map(str, values), strict=True))
    if task == "table":
        return _markdown(chart, style), _facts(chart)
    if chart.series:
        return (_compare_pairs if task == "compare" else _describe_series)(chart, style), _facts(chart)
    return (_compare(chart, chart.column(), style) if task == "compare" else _describe(chart, style)), _facts(chart)


def _facts(chart: Chart) -> Facts:
    if not chart.series:
        return tuple((label, str(row[0])) for label, row in zip(chart.labels, chart.values, strict=True))
    return tuple(
        (f"{label}|{name}", str(value))
        for label, row in zip(chart.labels, chart.values, strict=True)
        for name, value in zip(chart.series, row, strict=True)
    )


# Sentences about one series


def _describe(chart: Chart, style: int) -> str:
    values = chart.column()
    body = (_walk, _descent, _list)[style](chart, values)
    return f"{_head(chart)} {body}"


def _head(chart: Chart) -> str:
    head = f'A {_NAMES[chart.kind]} titled "{chart.title}" on a {chart.background} background.'
    if chart.kind == "table":
        return f"{head} The header is {chart.colours[0]}."
    if chart.kind == "grouped":
        return f"{head} {chart.series[0]} is {chart.colours[0]}, {chart.series[1]} is {chart.colours[1]}."
    count = words.NUMBERS[len(chart.labels)]
    marks = f"It has {count} {_MARKS[chart.kind]}"
    return f"{head} {marks}." if chart.varied else f"{head} {marks}, all {chart.colours[0]}."


def _name(chart: Chart, i: int) -> str:
    """The label, with its colour when the colours differ."""
    return f"{chart.labels[i]} ({chart.colours[i]})" if chart.varied else chart.labels[i]


def _show(chart: Chart, value: int) -> str:
    return f"{value}%" if chart.kind == "pie" else str(value)


def _walk(chart: Chart, values: list[int]) -> str:
    """Along the picture, each value related to the one before."""
    parts = [f"{_name(chart, 0)} {_first(chart)} {_show(chart, values[0])}{_extreme(values, 0)}."]
    for i in range(1, len(values)):
        verb = _share(values[i]) if chart.kind == "pie" else _move(chart, values[i - 1], values[i], max(values))
        parts.append(f"{_name(chart, i)} {verb} {_show(chart, values[i])}{_extreme(values, i)}.")
    return " ".join([*parts, _trend(values), _above(chart, values), _sorted(chart, values)])


def _sorted(chart: Chart, values: list[int]) -> str:
    """The labels and values in order of size."""
    return f"In order of size: {listed([f'{chart.labels[i]} {_show(chart, values[i])}' for i in _order(values)])}."


def _first(chart: Chart) -> str:
    if chart.kind == "pie":
        return _share(chart.values[0][0])
    return "starts at" if _in_time(chart) else "is at"


def _in_time(chart: Chart) -> bool:
    return chart.ordered or chart.kind == "line"


def _share(percent: int) -> str:
    """A verb for a slice of the pie."""
    bounds = ((8, "is a thin"), (20, "takes"), (30, "takes about a quarter,"), (40, "takes about a third,"))
    return next((verb for bound, verb in bounds if percent < bound), "fills a big")


def _move(chart: Chart, before: int, now: int, top: int) -> str:
    """A verb for the step from one value to the next, by its direction and its size against the highest value."""
    size = sum(abs(now - before) > share * top for share in (0.12, 0.4))
    if _in_time(chart):
        up, down = ("edges up to", "climbs to", "jumps to"), ("slips to", "drops to", "plunges to")
    else:
        up = ("is slightly higher at", "is higher at", "is far higher at")
        down = ("is slightly lower at", "is lower at", "is far lower at")
    return (up if now > before else down)[size]


def _extreme(values: list[int], i: int) -> str:
    if values[i] == max(values):
        return ", the highest"
    return ", the lowest" if values[i] == min(values) else ""


def _trend(values: list[int]) -> str:
    rises = sum(b > a for a, b in pairwise(values))
    falls = len(values) - 1 - rises
    if not falls:
        return "The values only rise."
    return f"The values rise {_times(rises)} and fall {_times(falls)}." if rises else "The values only fall."


def _times(number: int) -> str:
    return ("never", "once", "twice")[number] if number < 3 else f"{words.NUMBERS[number]} times"


def _bar(chart: Chart, values: Sequence[int]) -> int:
    """The round number that splits the values into high and low ones."""
    return 20 if chart.kind == "pie" else between(values)


def _above(chart: Chart, values: list[int]) -> str:
    bar = _bar(chart, values)
    high = [f"{label} {_show(chart, value)}" for label, value in zip(chart.labels, values, strict=True) if value > bar]
    limit = _show(chart, bar)
    if not high:
        return f"Nothing is above {limit}."
    return f"All are above {limit}." if len(high) == len(values) else f"Above {limit}: {listed(high)}."


def _order(values: Sequence[int]) -> list[int]:
    """Indices from the highest value to the lowest."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def _behind(before: int, now: int, top: int) -> str:
    """How far `now` lies below `before`; the exact gap only where it is wide."""
    gap = before - now
    return f", {gap} less" if gap > 0.12 * top else ", close behind"


def _descent(chart: Chart, values: list[int]) -> str:
    """From the highest value to the lowest."""
    order = _order(values)
    parts = [f"The highest is {_name(chart, order[0])} at {_show(chart, values[order[0]])}."]
    for k, (a, b) in enumerate(pairwise(order)):
        opening = "Last is" if k == len(order) - 2 else ("Next is", "Then")[k % 2]
        gap = _behind(values[a], values[b], values[order[0]])
        parts.append(f"{opening} {_name(chart, b)} at {_show(chart, values[b])}{gap}.")
    way = _WAYS.get(chart.kind, "From left to right")
    return f"{' '.join(parts)} {way}: {listed(chart.labels)}. {_above(chart, values)}"


def _list(chart: Chart, values: list[int]) -> str:
    """Every value in one breath, then the extremes and the widest step."""
    items = [
        f"{chart.colours[i]} {label} {_show(chart, values[i])}"
        if chart.varied
        else f"{label} {_show(chart, values[i])}"
        for i, label in enumerate(chart.labels)
    ]
    step = max(range(1, len(values)), key=lambda i: abs(values[i] - values[i - 1]))
    a, b = (f"{chart.labels[i]} {_show(chart, values[i])}" for i in (step - 1, step))
    way = _WAYS.get(chart.kind, "From left to right")
    text = f"{way}: {', '.join(items)}. {_ends(chart, values)} The widest step is {a} to {b}."
    return f"{text} {_trend(values)} {_above(chart, values)}"


def _ends(chart: Chart, values: list[int]) -> str:
    """The highest, the lowest and the gap."""
    order = _order(values)
    high, low = values[order[0]], values[order[-1]]
    return (
        f"{chart.labels[order[0]]} is highest at {_show(chart, high)}, {chart.labels[order[-1]]} lowest at "
        f"{_show(chart, low)}, a gap of {high - low}."
    )


# Comparing one series step by step


def _compare(chart: Chart, values: list[int], style: int) -> str:
    return (_steps, _ranking, _champions)[style](chart, values)


def _steps(chart: Chart, values: list[int]) -> str:
    top = max(values)
    start = f"Start with {chart.labels[0]}: {_show(chart, values[0])}."
    parts = [
        f"{chart.labels[i]} has {_show(chart, values[i])}, {_change(values[i - 1], values[i], top)}."
        for i in range(1, len(values))
    ]
    step = max(range(1, len(values)), key=lambda i: abs(values[i] - values[i - 1]))
    kind = "rise" if values[step] > values[step - 1] else "fall"
    widest = f"The biggest step is the {kind} from {values[step - 1]} to {values[step]}, at {chart.labels[step]}."
    return " ".join([start, *parts, _trend(values), widest, f"So {_ends(chart, values)}", _above(chart, values)])


def _change(before: int, now: int, top: int) -> str:
    """The step in words; its exact size only where it is wide."""
    gap = abs(now - before)
    if gap > 0.25 * top:
        return f"{'up' if now > before else 'down'} {gap}"
    extent = "a bit " if gap < 0.08 * top else ""
    return f"{extent}{'more' if now > before else 'less'} than {before}"


def _ranking(chart: Chart, values: list[int]) -> str:
    order = _order(values)
    lines = [f"1. {chart.labels[order[0]]}: {_show(chart, values[order[0]])}, the highest"]
    for rank, (a, b) in enumerate(pairwise(order), 2):
        gap = _behind(values[a], values[b], values[order[0]])
        lines.append(f"{rank}. {chart.labels[b]}: {_show(chart, values[b])}{gap}")
    trend = f"{_WAYS.get(chart.kind, 'From left to right')}, {_trend(values).replace('The', 'the', 1)}"
    return "\n".join([*lines, f"So {_ends(chart, values)} {trend} {_above(chart, values)}"])


def _champions(chart: Chart, values: list[int]) -> str:
    """Runs through the values twice: keeping the highest so far, then the lowest so far."""
    high = low = 0
    up, down = [], []
    for i in range(1, len(values)):
        shown, label = _show(chart, values[i]), chart.labels[i]
        beats = values[i] > values[high]
        up.append(f"{label} with {shown} beats it." if beats else f"{label} with {shown} stays below {values[high]}.")
        high = i if beats else high
        if values[i] < values[low]:
            low = i
            down.append(f"{label} is lower, {shown}.")
    start = f"{chart.labels[0]} with {_show(chart, values[0])}"
    first = f"Take {start} first. {' '.join(up)} So {chart.labels[high]} is highest."
    second = " ".join(["Now the lowest.", f"{start} again.", *down]) if down else f"{start} is also the lowest."
    gap = f"The gap is {values[high]} - {values[low]} = {values[high] - values[low]}."
    return f"{first} {second} {gap} {_sorted(chart, values)}"


# Several series


def _describe_series(chart: Chart, style: int) -> str:
    indices = _order(chart.column()) if style == 1 else list(range(len(chart.labels)))
    rows = [_row(chart, i, style) for i in indices]
    lead = f"Sorted by {chart.series[0]}: " if style == 1 else ""
    if style == 2:
        lead = f"{_WAYS.get(chart.kind, 'From left to right')}: "
    peaks = " ".join(_peak(chart, j, style) for j in range(len(chart.series)))
    score = f" {_score(chart)} {_gaps(chart)}" if chart.kind == "grouped" else ""
    return f"{_head(chart)} {lead}{' '.join(rows)} {peaks}{score}"


def _row(chart: Chart, i: int, style: int) -> str:
    cells = [f"{name} {value}" for name, value in zip(chart.series, chart.values[i], strict=True)]
    if style == 2 or chart.kind == "table":
        return f"{chart.labels[i]} has {listed(cells)}." if style == 0 else f"{chart.labels[i]}: {', '.join(cells)}."
    return f"{chart.labels[i]} has {listed(cells)}, so {_lead(chart, i)}."


def _lead(chart: Chart, i: int) -> str:
    """Which of two series is ahead, by how much in words."""
    first, second = chart.values[i]
    ahead = chart.series[first < second]
    high, low = max(first, second), min(first, second)
    if high >= 2 * low:
        return f"{ahead} is at least double"
    return f"{ahead} is just ahead" if high - low < 8 else f"{ahead} leads"


def _peak(chart: Chart, j: int, style: int) -> str:
    values = chart.column(j)
    order = _order(values)
    top, bottom = (f"{chart.labels[i]}, {values[i]}" for i in (order[0], order[-1]))
    if style == 1:
        return f"The lowest {chart.series[j]} is {bottom}."
    return f"{chart.series[j]} peaks at {top}, and is lowest at {bottom}."


def _compare_pairs(chart: Chart, style: int) -> str:
    """Two series, label by label; style 1 goes by size of the first series, style 2 names the winner first."""
    indices = _order(chart.column()) if style == 1 else list(range(len(chart.labels)))
    lines = [_duel(chart, i, style) for i in indices]
    peaks = " ".join(_peak(chart, j, 0) for j in range(2))
    separator = "\n" if style == 1 else " "
    return separator.join([*lines, f"{_score(chart)} {_gaps(chart)} {peaks}"])


def _gaps(chart: Chart) -> str:
    """Where two series lie furthest apart, and where closest."""
    gaps = [abs(a - b) for a, b in chart.values]
    widest, closest = gaps.index(max(gaps)), gaps.index(min(gaps))
    return f"The widest gap is {_versus(chart, widest)}; the closest is {_versus(chart, closest)}."


def _duel(chart: Chart, i: int, style: int) -> str:
    (first, second), (a, b) = chart.values[i], chart.series
    label, gap = chart.labels[i], abs(first - second)
    if style == 2:
        win, lose = ((a, first), (b, second)) if first > second else ((b, second), (a, first))
        return f"At {label}, {win[0]} {win[1]} beats {lose[0]} {lose[1]}{' narrowly' if gap < 8 else ''}."
    ahead = a if first > second else b
    result = f"{ahead} leads by {gap}" if gap >= 20 else _lead(chart, i)
    return f"{'- ' if style == 1 else ''}{label}: {a} {first}, {b} {second}, so {result}."


def _versus(chart: Chart, i: int) -> str:
    return f"{chart.labels[i]}, {chart.values[i][0]} against {chart.values[i][1]}"


def _score(chart: Chart) -> str:
    wins = sum(a > b for a, b in chart.values)
    if wins in (0, len(chart.values)):
        return f"{chart.series[not wins]} is ahead every time."
    losses = len(chart.values) - wins
    return f"{chart.series[0]} is ahead {_times(wins)} and {chart.series[1]} {_times(losses)}."


# Markdown


def _extra(chart: Chart) -> str:
    """The further column that style 2 of the table asks for."""
    what = chart.series[0] if chart.series else "the value"
    return "the colours" if chart.varied else f"whether {what} is above {_bar(chart, chart.column())}"


def _markdown(chart: Chart, style: int) -> str:
    header = [chart.noun.capitalize(), *(chart.series or ("Value",))]
    rows = [
        [label, *(_show(chart, value) for value in row)] for label, row in zip(chart.labels, chart.values, strict=True)
    ]
    if style:
        header.append(_heading(chart, style))
        for row, cell in zip(rows, _cells(chart, style), strict=True):
            row.append(cell)
    lines = [header, ["---"] * len(header), *rows]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{grid}\n\n{_summary(chart)}"


def _heading(chart: Chart, style: int) -> str:
    if style == 1:
        return "Place"
    return "Colour" if chart.varied else f"Above {_bar(chart, chart.column())}"


def _cells(chart: Chart, style: int) -> list[str]:
    values = chart.column()
    if style == 1:
        return [str(sorted(values, reverse=True).index(value) + 1) for value in values]
    if chart.varied:
        return list(chart.colours)
    return ["yes" if value > _bar(chart, values) else "no" for value in values]


def _summary(chart: Chart) -> str:
    if chart.series:
        peaks = " ".join(_peak(chart, j, 0) for j in range(len(chart.series)))
        return f"{peaks} {_score(chart)} {_gaps(chart)}" if chart.kind == "grouped" else peaks
    values = chart.column()
    return f"{_ends(chart, values)} {_sorted(chart, values)} {_above(chart, values)}"


# Reading an answer


def reading(facts: Facts, answer: str) -> tuple[int, int]:
    """(facts read exactly, all facts): a fact counts if the first statement of its label carries its value.

    A numeric value must be the first whole number after the label, with no other label between. Any other value is
    compared word by word with what stands between the label and the next full stop, semicolon or line end, as far as
    the words of `words.SCENE` go. Quoted text (the title) is left out. Rows of a markdown table are read by column.
    """
    return len(_named(facts, answer)), len(facts)


def _named(facts: Facts, answer: str) -> Facts:
    """The facts that `reading` counts."""
    text = _without_title(answer)
    cells = _grid(text)
    labels = {label.partition("|")[0] for label, _ in facts}
    return tuple(
        (label, value)
        for label, value in facts
        if value == (cells.get(label) if cells else _stated(text, label, value.isdigit(), labels))
    )


def _without_title(answer: str) -> str:
    return re.sub(r'"[^"\n]*"', '""', answer)


def values_read(facts: Facts, answer: str) -> tuple[int, int]:
    """As `reading`, but a number in its column's place counts even where the name of the column is misread.

    In the place: the k-th number stated between its row's label and the next label.
    """
    by_name = set(_named(facts, answer))
    labels = {label.partition("|")[0] for label, _ in facts}
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    pieces = re.split(rf"\b({names})\b", _without_title(answer))
    stated: dict[str, list[str]] = {}
    for label, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        numbers = re.findall(r"\b\d+\b(?!\.\d)", piece)
        if numbers:
            stated.setdefault(label, numbers)
    place: dict[str, int] = {}
    right = 0
    for label, value in facts:
        row = label.partition("|")[0]
        at = place[row] = place.get(row, -1) + 1
        right += (label, value) in by_name or stated.get(row, [])[at : at + 1] == [value]
    return right, len(facts)


def _grid(text: str) -> dict[str, str]:
    """The cells of the first markdown table, as "row|column", and the second cell of each row as "row"."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.split("\n") if line[:1] == "|"
    ]
    cells: dict[str, str] = {}
    for row in rows[2:]:
        cells.setdefault(row[0], row[1].rstrip("%") if len(row) > 1 else "")
        for name, cell in zip(rows[0][1:], row[1:], strict=False):
            cells.setdefault(f"{row[0]}|{name}", cell.rstrip("%"))
    return cells


def _stated(text: str, label: str, numeric: bool, labels: set[str]) -> str | None:
    """What `text` first states about `label`; None if nothing."""
    start = 0
    for part in label.split("|"):
        found = re.compile(rf"\b{re.escape(part)}\b").search(text, start)
        if not found:
            return None
        start = found.end()
    if not numeric:
        said = re.split(r"[.;\n]", text[start:], maxsplit=1)[0]
        return " ".join(word for word in re.findall(r"\w+", said) if word in words.SCENE)
    number = re.compile(r"\b\d+\b(?!\.\d)").search(text, start)
    if not number:
        return None
    between_them = set(re.findall(r"\w+", text[start : number.start()]))
    return None if between_them & (labels - {label.partition("|")[0]}) else number.group()
