"""`train`: a drafter by a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from speculens.cli.models import hush
from speculens.cli.options import Json
from speculens.cli.output import print_json, versions


def train(
    recipe: Annotated[Path, typer.Option("--config", "-c", help="Recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value", help="Over the recipe.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole recipe as it would run, and leave.")
    ] = False,
    encode_only: Annotated[
        bool, typer.Option("--encode-only", help="Make the encoded rows of data.cache, for runs to share, and leave.")
    ] = False,
    resume_from: Annotated[str | None, typer.Option(metavar="DIR|latest", help="Go on from a checkpoint.")] = None,
    json: Json = False,
) -> None:
    """Train a drafter as a recipe says."""
    from speculens import training
    from speculens.show import Screen

    hush()
    plan = training.load_recipe(recipe, overrides or [])
    if dry_run:
        if json:
            print_json(plan.to_dict())
        else:
            typer.echo(plan.to_yaml(), nl=False)
        return
    screen = Screen(quiet=json)
    if encode_only:
        rows = training.encode(plan)
        screen.say(f"{rows} encoded rows are in {plan.data.cache}.")
        if json:
            print_json({"event": "encoded", "path": plan.data.cache, "rows": rows})
        return
    made = training.train(plan, resume_from=resume_from, on_event=print_json if json else screen.event)
    training.disband()
    if os.environ.get("RANK", "0") != "0":  # of the processes of one run, the first speaks
        return
    screen.say(f"The drafter is in {made}.")
    if json:
        print_json({"event": "drafter", "path": str(made), "versions": versions()})
