"""`bench`: drafters measured beside `none`; `report`: what was measured as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from speculens.cli.models import load
from speculens.cli.options import (
    DRAFTER_HELP,
    IMAGE_ROOT_DEFAULT,
    IMAGE_ROOT_HELP,
    SAMPLING,
    Capture,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MaxModelLen,
    MaxNewTokens,
    NumberFormat,
    NumDraftTokens,
    NumSteps,
    Recorded,
    Revision,
    SampleTopK,
    SampleTopP,
    Temperature,
    TopK,
    Tree,
    Trees,
    given,
    tree_numbers,
)
from speculens.cli.output import print_json, versions

if TYPE_CHECKING:
    from speculens.tree import TreeShape


def bench(  # noqa: PLR0913, PLR0917 - a flag each
    target: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    suite: Annotated[str, typer.Option(help="Name of a suite, see docs/benchmarks.md.")],
    out: Annotated[Path, typer.Option(help="The folder of the run.")],
    drafter: Annotated[
        list[str] | None,
        typer.Option(help=f"{DRAFTER_HELP[:-1]}, `hf`, `hf:lookup`, `hf:assistant=TARGET`; one or several."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[DRAFTER]...", help="Further drafters.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Where the suite's data is; may be repeated.")] = None,
    image_root: Annotated[Path | None, typer.Option(help=IMAGE_ROOT_HELP, show_default=IMAGE_ROOT_DEFAULT)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first cases of the suite.")] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Questions to ask of each conversation.", show_default="all")
    ] = None,
    closer: Annotated[
        int | None,
        typer.Option(min=0, help="Cases decoded once more, to see where the time goes; 0: none.", show_default="8"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json: Json = False,
    tree: Tree = Trees.own,
    num_steps: NumSteps = None,
    topk: TopK = None,
    num_draft_tokens: NumDraftTokens = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: SampleTopK = 0,
    top_p: SampleTopP = 1.0,
    seed: Annotated[int, typer.Option(help="Each question's own is made from it.", rich_help_panel=SAMPLING)] = 0,
    dtype: NumberFormat = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    capture: Recorded = Capture.auto,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
) -> None:
    """Measure drafters beside `none` on a suite of questions, and whether their answers are the target's own."""
    from speculens.bench import peers
    from speculens.bench.figures import check_measured, conclude
    from speculens.bench.measure import Bench
    from speculens.bench.record import NONE, RunFolder, holds_run
    from speculens.bench.suites import load_suite
    from speculens.checkpoints import load_drafter
    from speculens.data.respond import Asking
    from speculens.drafters.base import reshaped
    from speculens.show import Screen

    numbers = tree_numbers(tree, num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens)
    holds_run(out, resume=resume)  # before anything is loaded
    asking = Asking(
        turns=turns, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    cases = load_suite(suite, data or [], image_root)[:limit]
    model, _ = load(target, dtype=dtype, device=device, device_map=device_map, revision=revision)
    ours, others = peers.split([*(drafter or []), *(more or [])])
    drafters = {
        name: load_drafter(name, dtype=model.dtype, device=model.device, target=model) for name in ours if name != NONE
    }
    shapes: dict[str, TreeShape | Literal["auto"]] = (
        dict.fromkeys(drafters, "auto")
        if tree is Trees.auto
        else {name: shape for name, guesser in drafters.items() if (shape := reshaped(guesser, numbers))}
    )
    measured = Bench(
        model,
        drafters,
        cases,
        asking,
        shapes=shapes,
        others=[peers.load_peer(name, model, temperature) for name in others],
        capacity=max_model_len,
        capture=capture.value,
        **given(closer=closer),
    )
    folder = RunFolder(out, measured.setting(target=target, revision=revision, suite=suite), resume=resume)
    screen = Screen(quiet=json)
    with screen.progress("cases") as tell:
        measured.run(folder, lambda at: tell(at.done, at.total, _lengths(at.lengths)))
    summary = conclude(folder, measured.errors)
    check_measured(summary, out)
    screen.measured(summary)
    screen.aside(f"Records and figures: {out}. A page of them: speculens report {out}")
    if json:
        print_json({"run": str(out), **summary, "versions": versions()})


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `bench` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write.", show_default="report.html in the first run")
    ] = None,
    json: Json = False,
) -> None:
    """Draw what `bench` measured: one page that needs nothing else, and its plots as PNG."""
    from speculens.bench.report import read_run, write_report
    from speculens.show import Screen

    page, *pictures = write_report([read_run(run) for run in runs], out or runs[0] / "report.html")
    Screen(quiet=json).say(
        f"The page: {page}; the plots: {pictures[0].parent if len(runs) == 1 else page.parent / 'plots'}"
    )
    if json:
        print_json({"page": str(page), "plots": [str(file) for file in pictures]})


def _lengths(lengths: Mapping[str, float]) -> str:
    from speculens.bench.tables import labels

    names = labels(list(lengths))
    return "  ".join(f"{names[name]} {length:.2f}" for name, length in lengths.items())
