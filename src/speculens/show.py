"""What the terminal shows: text as it comes, accepted runs coloured, then figures as a line and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from speculens.answer import Answer, Entry, Run
from speculens.bench import tables

WIDE = 120  # columns of a file or a pipe, which has no width of its own
DRAFTED = "green"  # the style of drafted tokens that the target kept
# A model may say anything; escape sequences among it must not reach the terminal.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


class Screen:
    """Standard output as people read it. Plain where it is no terminal; silent if `quiet` (then JSON has the word)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = Console(highlight=False, quiet=quiet)
        if not self._out.is_terminal:
            self._out.width = WIDE
        self._aside = Console(highlight=False, quiet=quiet, stderr=True)
        self.quiet = quiet

    def say(self, text: str = "", style: str = "") -> None:
        """A line."""
        self._out.print(text, style=style or None, markup=False, soft_wrap=True)

    def aside(self, text: str) -> None:
        """A line on standard error: standard output may go to a file that is to hold the answer alone."""
        self._aside.print(text, style="dim", markup=False, soft_wrap=True)

    def run(self, run: Run) -> None:
        """Text as it comes: exactly as it is, or coloured on a terminal."""
        if self.quiet:
            return
        if self._out.is_terminal:
            self._out.out(run.text.translate(_CONTROLS), style=DRAFTED if run.drafted else None, end="")
        else:
            self._out.file.write(run.text)
        self._out.file.flush()

    def legend(self) -> None:
        """What the colours mean, where there are colours."""
        if self._out.is_terminal and self._out.color_system:
            self._out.print(f"[{DRAFTED}]drafted and kept[/]  the target's own", style="dim")

    def table(self, entries: Sequence[Entry]) -> None:
        """Drafters side by side."""
        self._rows(HEADINGS, [cells(entry) for entry in entries])

    def measured(self, summary: Mapping[str, Any]) -> None:
        """What a run of `bench` came to: exactness before all else, then speed."""
        self.say(tables.about(summary), "bold")
        for line in (*tables.exactness(summary), *tables.failures(summary)):
            self.say(line)
        self._rows(tables.SPEED_HEADINGS, tables.speed_rows(summary))
        self._rows(tables.PASS_HEADINGS, tables.pass_rows(summary))
        if tables.has_peers(summary):
            self.say(tables.OTHER_LOOP, "dim")
        if len(summary["topics"]) > 1:
            self._rows(tables.TOPIC_HEADINGS, tables.topic_rows(summary), left=2)

    def _rows(self, headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
        """A table; so many of its first columns are words."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for number, heading in enumerate(headings):
            table.add_column(heading.replace(" ", "\n", 1), justify="left" if number < left else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._out.print()
        self._out.print(table)

    def event(self, event: Mapping[str, Any]) -> None:
        """What a training run tells, as far as it is worth a line; the bar of progress is the trainer's own."""
        if event["event"] == "start":
            self.say(f"{event['conversations']:,} conversations, {event['batches_per_epoch']:,} batches an epoch")
        elif event["event"] == "eval":
            self.say(
                f"step {event['step']:,}: acceptance length {event['mean_acceptance_length']:.2f} "
                f"({event['mean_accepted_tokens']:.2f} without the bonus token), exact {event['exact']:.0%}"
            )

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[..., None]]:
        """A bar on standard error, where that is a terminal; it is told how many are done, of how many, and a note."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[note]}"),
        )
        silent = self.quiet or not self._aside.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=self._aside, disable=silent) as bar:
            task = bar.add_task(what, total=None, rate="", note="")

            def tell(done: int, total: int, note: str = "") -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "", note=note)

            yield tell

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """A heading and what there is to know, a line each."""
        self._out.print(title, style="bold", markup=False, soft_wrap=True)
        width = max(map(len, facts), default=0) + 2
        for name, fact in facts.items():
            self.say(f"  {name:<{width}}{fact}")


HEADINGS = (
    "drafter",
    "tokens",
    "passes",
    "acceptance length",
    "without bonus",
    "time",
    "speedup",
    "decoding alone",
    "exact",
)


def cells(entry: Entry) -> tuple[str, ...]:
    """One line of the table of drafters, under `HEADINGS`."""
    stats = entry.stats
    return (
        entry.drafter,
        f"{entry.tokens:,}",
        f"{stats.num_drafts:,}",
        f"{stats.mean_acceptance_length:.2f}",
        f"{stats.mean_accepted_tokens:.2f}",
        f"{entry.seconds:.2f} s",
        f"{entry.walltime_speedup:.2f}×",
        f"{entry.decode_speedup:.2f}×",
        _exact(entry),
    )


def closing(answer: Answer) -> str:
    """One line of figures about an answer."""
    done = answer.generation
    stats = done.stats
    return (
        f"{len(done.tokens)} tokens in {stats.num_drafts} passes; acceptance length {stats.mean_acceptance_length:.2f} "
        f"({stats.mean_accepted_tokens:.2f} without the bonus token); {answer.seconds:.2f} s, "
        f"{answer.tokens_per_second:.1f} tokens/s"
        f"{'; cut at max_new_tokens' if done.finish_reason == 'length' else ''}"
    )


def target_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """What `inspect` says of a target."""
    ends = ", ".join(
        f"{token} ({number})" for token, number in zip(facts["eos_tokens"], facts["eos_token_ids"], strict=True)
    )
    return {
        "family": f"{facts['model_type']} ({facts['architecture']})",
        "layers": f"{facts['num_hidden_layers']}",
        "hidden size": f"{facts['hidden_size']:,}",
        "vocabulary": f"{facts['vocab_size']:,}",
        "parameters": count(facts["parameters"]),
        "numbers": facts["dtype"],
        "context": f"{facts['context']:,} tokens",
        "KV cache": f"{size(facts['kv_bytes_per_token'])} a token",
        "positions": facts["positions"],
        "image token": f"{facts['image_token']} ({facts['image_token_id']})",
        "ends with": ends,
    }


def view_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """What `inspect` says of a question with pictures."""
    lines = {
        "target's rows": f"{facts['num_prompt_tokens']:,}, {facts['num_visual_tokens']:,} of them of pictures",
        "drafter's rows": f"{facts['num_drafter_rows']:,}, {facts['drafter_prefill_ratio']:.1%} of the target's",
    }
    return lines | {name: ", ".join(notes) for name, notes in facts["drafter_notes"].items()}


def drafter_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """What `inspect` says of a drafter."""
    tree = facts["tree"]
    lines = {"method": facts["drafter"], "sees of a picture": CONTRACTS[facts["image_contract"]]}
    if "view" in facts:
        lines["view"] = facts["view"]
    if "num_steps" in tree:
        lines["tree"] = (
            f"{tree['num_steps'] + 1} levels, {tree['topk']} children a node, "
            f"{tree['num_draft_tokens']} nodes scored in a pass (root included)"
        )
    if facts.get("draft_vocab_size"):
        copied = facts["draft_vocab_size"] * facts["target_hidden_size"]
        lines["draft vocabulary"] = (
            f"{facts['draft_vocab_size']:,} of {facts['target_vocab_size']:,} tokens; "
            f"their rows of the target's head, {count(copied)} numbers, are copied in use"
        )
    if "parameters" in facts:
        lines["parameters"] = count(facts["parameters"]) + (f", {size(facts['bytes'])}" if facts["bytes"] else "")
        lines["made for"] = (
            f"{facts['target_family']}, hidden size {facts['target_hidden_size']:,}, "
            f"vocabulary {facts['target_vocab_size']:,}"
        )
    return lines


def prepared_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """What `prepare-data` says of the rows that it wrote."""
    lines = {
        "written": f"{facts['rows']:,} of {facts['read']:,} rows read",
        "turns": f"{facts['questions']:,} of the user, {facts['answers']:,} answers",
        "pictures": f"{facts['pictures']:,} in {facts['with_pictures']:,} rows",
    }
    if facts["without_answer"]:
        lines["without answer"] = f"{facts['without_answer']:,} rows: to measure with or to answer, not to train on"
    for name in ("tokens", "image_tokens"):
        if spread := facts[name]:
            quantiles = ", ".join(f"{key} {value:,}" for key, value in spread.items() if key != "mean")
            lines[name.replace("_", " ")] = f"{spread['mean']:,} a row on average; {quantiles}"
    return lines | _refusals("refused", facts["refused"], facts["reasons"])


def answered_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """What `respond` says at its end."""
    ends = ", ".join(f"{number:,} {reason}" for reason, number in sorted(facts["finish_reasons"].items()))
    lines = {"answered": f"{facts['success']:,}", "skipped": f"{facts['skipped']:,}, done by an earlier run"}
    if facts["tokens"]:
        lines["answers end by"] = ends
        lines["tokens"] = f"{facts['tokens']:,} in {facts['seconds']:.1f} s, {facts['tokens_per_second']:,.1f} tokens/s"
        lines["acceptance"] = (
            f"{facts['stats']['mean_acceptance_length']:.2f} tokens a pass "
            f"({facts['stats']['mean_accepted_tokens']:.2f} without the bonus token)"
        )
    return lines | _refusals("errors", facts["error"], facts["reasons"])


def _refusals(name: str, total: int, reasons: Mapping[str, int], most: int = 8) -> dict[str, str]:
    """How many, and the commonest reasons, a line each."""
    shown = [f"\n    {number:,}  {reason}" for reason, number in list(reasons.items())[:most]]
    hidden = f"\n    and {len(reasons) - most:,} further reasons" if len(reasons) > most else ""
    return {name: f"{total:,}{''.join(shown)}{hidden}"}


CONTRACTS = {
    "full": "every row (full)",
    "compress": "a few rows (compress)",
    "adaptor": "one row and a vector (adaptor)",
    "hidden": "nothing (hidden)",
}


def count(number: int) -> str:
    """1,234 or 9.1 M or 7.06 G."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes in binary units: 512 B, 56.0 KiB, 1.2 MiB."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _exact(entry: Entry) -> str:
    if len(entry.answers) > 1:
        return f"{entry.num_exact} of {len(entry.answers)}"
    (difference,) = entry.differences
    return "yes" if difference is None else f"no: token {difference}"
