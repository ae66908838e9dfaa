"""`prepare-data`: rows in one form; `respond`: the target's own answers to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculens.cli.models import hush, load
from speculens.cli.options import (
    DRAFTER_HELP,
    IMAGE_ROOT_DEFAULT,
    IMAGE_ROOT_HELP,
    MAX_NEW_TOKENS_HELP,
    SAMPLING,
    TEMPERATURE_HELP,
    TOP_K_HELP,
    TOP_P_HELP,
    Device,
    DeviceMap,
    Dtype,
    Json,
    NumberFormat,
    Revision,
    SlotLen,
    given,
)
from speculens.cli.output import print_json, versions
from speculens.errors import UserError

if TYPE_CHECKING:
    from speculens.data.respond import Asking


def prepare_data(  # noqa: PLR0913, PLR0917 - a flag each
    files: Annotated[list[Path], typer.Argument(help="JSON lines, or JSON arrays, of rows in any known form.")],
    out: Annotated[Path, typer.Option(help="The file of rows to write.")],
    image_root: Annotated[Path | None, typer.Option(help=IMAGE_ROOT_HELP, show_default=IMAGE_ROOT_DEFAULT)] = None,
    copy_images: Annotated[
        bool, typer.Option("--copy-images", help="Copy the pictures into a folder beside the output.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to write at most.")] = None,
    shuffle_seed: Annotated[int | None, typer.Option(help="Shuffle the rows, before the limit.")] = None,
    target: Annotated[str | None, typer.Option(help="Count tokens as this target (folder or hub id) does.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Refuse rows of more tokens; needs a --target.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Bring rows of data into one form, and tell what they hold and which are refused."""
    from speculens.data import JsonLines
    from speculens.data.prepare import Selection, prepare
    from speculens.data.rows import error_file
    from speculens.show import Screen, prepared_lines
    from speculens.targets import outline_target

    hush()
    screen = Screen(quiet=json)
    selection = Selection(limit, shuffle_seed, copy_images, max_length, overwrite)
    source = JsonLines(files, image_root)
    counter = outline_target(target, revision=revision) if target is not None else None
    with screen.progress("rows") as tell:
        report = prepare(source, out, selection, counter, tell).to_dict()
    screen.facts(str(out), prepared_lines(report))
    if report["refused"]:
        screen.aside(f"Which rows are refused, and why: {error_file(out)}")
    if json:
        print_json({"output": str(out), "target": target, **report, "versions": versions()})


def respond(  # noqa: PLR0913, PLR0917 - a flag each
    file: Annotated[Path, typer.Argument(help="Rows whose questions are asked; their own answers are not read.")],
    out: Annotated[Path, typer.Option(help="The file of rows to write, or to go on with.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    drafter: Annotated[str, typer.Option(help=DRAFTER_HELP)] = "none",
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Recipe of prompts and sampling, a YAML file; options replace its values."),
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help=IMAGE_ROOT_HELP, show_default=IMAGE_ROOT_DEFAULT)] = None,
    instruction_suffix: Annotated[str | None, typer.Option(help="Said after every question.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message of every row.")] = None,
    turns: Annotated[int | None, typer.Option(help="Questions to answer of each row.", show_default="all")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the file.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Rows that are answered side by side.")] = 8,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try rows again that an earlier run could not answer.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=MAX_NEW_TOKENS_HELP, show_default="1024", rich_help_panel=SAMPLING)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help=TEMPERATURE_HELP, show_default="1", rich_help_panel=SAMPLING)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help=TOP_K_HELP, show_default="0", rich_help_panel=SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(help=TOP_P_HELP, show_default="1", rich_help_panel=SAMPLING)] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Each row's own is made from it.", show_default="0", rich_help_panel=SAMPLING),
    ] = None,
    dtype: NumberFormat = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    max_model_len: SlotLen = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Let the target write its own answers to the questions of a data set; a killed run goes on where it was."""
    from speculens.data import JsonLines
    from speculens.data.respond import Responder
    from speculens.data.rows import outputs
    from speculens.engine import Engine
    from speculens.show import Screen, answered_lines

    asking = _asking(
        config,
        instruction_suffix,
        {
            "system": system,
            "turns": turns,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
    )
    source = JsonLines([file], image_root)
    _, errors = outputs(source, out)  # what is wrong with them is said before the target is loaded
    model, guesser = load(target, drafter, dtype=dtype, device=device, device_map=device_map, revision=revision)
    engine = Engine(model, guesser, slots=slots, capacity=max_model_len)
    loaded = given(revision=revision, dtype=None if dtype == Dtype.auto else dtype.value)
    responder = Responder(engine, source, asking, out, target, limit, loaded)
    screen = Screen(quiet=json)
    with screen.progress("rows") as tell:
        outcome = responder.run(retry_errors=retry_errors, on_row=tell)
    report = outcome.to_dict()
    if outcome.error and not outcome.success and not outcome.skipped:
        raise UserError(f"None of the {outcome.error} rows could be answered. The first: {outcome.first_error}")
    screen.facts(str(out), answered_lines(report))
    if outcome.error:
        screen.aside(f"Which rows failed, and why: {errors}; --retry-errors tries them again.")
    if json:
        print_json({"output": str(out), "target": target, "drafter": drafter, **report, "versions": versions()})


def _asking(config: Path | None, suffix: str | None, options: dict[str, Any]) -> Asking:
    """A recipe with the options that were given laid over it."""
    from dataclasses import replace

    from speculens.data.respond import PLACE, Asking
    from speculens.training.config import load as read

    changes = given(**options)
    if suffix is not None:
        changes["templates"] = (f"{PLACE} {suffix}",)
    return replace(read(Asking, config) if config else Asking(), **changes)
