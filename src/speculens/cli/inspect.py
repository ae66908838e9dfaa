"""`inspect`: what a target and a drafter are, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculens.cli.generate import conversation_of
from speculens.cli.models import hush, load
from speculens.cli.options import DRAFTER_HELP, Json, Revision
from speculens.cli.output import print_json, versions
from speculens.errors import UserError

if TYPE_CHECKING:
    from speculens.drafters import Drafter
    from speculens.targets import Target


def inspect(
    target: Annotated[str | None, typer.Option(help="Folder or hub id of a vision-language model.")] = None,
    drafter: Annotated[str | None, typer.Option(help=DRAFTER_HELP)] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Show also what the drafter keeps of this picture (loads both); may be repeated."),
    ] = None,
    question: Annotated[str, typer.Option(help="What is asked about the pictures.")] = "What does the picture show?",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Show what a target and a drafter are, whether they fit, and what the drafter keeps of a picture."""
    if target is None and drafter is None:
        raise UserError("Nothing to inspect: name a --target, a --drafter or both.")
    if image and not (target and drafter):
        raise UserError("--image shows what a drafter keeps of a picture: name a --target and a --drafter, too.")
    from speculens.checkpoints import load_drafter, stored_bytes
    from speculens.show import Screen, drafter_lines, target_lines, view_lines
    from speculens.targets import outline_target

    hush()
    screen = Screen(quiet=json)
    report: dict[str, Any] = {"target": None, "drafter": None, "fits": None, "reason": None}
    outline = guesser = None
    if target is not None:
        outline = outline_target(target, revision=revision)
        report["target"] = {"name": target, **outline.describe()}
        screen.facts(f"target {target}", target_lines(report["target"]))
    if drafter is not None:
        guesser = load_drafter(drafter, target=outline)
        report["drafter"] = {"name": drafter, **guesser.describe(), "bytes": stored_bytes(drafter)}
        screen.say()
        screen.facts(f"drafter {drafter}", drafter_lines(report["drafter"]))
    if outline is not None and guesser is not None:
        report["reason"] = _misfit(guesser, outline)
        report["fits"] = report["reason"] is None
        screen.say()
        screen.say(report["reason"] or "They fit.", "bold")
    if image and target and drafter:
        report["view"] = _view(target, drafter, image, question, revision)
        screen.say()
        screen.facts("of this question", view_lines(report["view"]))
    if json:
        print_json({**report, "versions": versions()})


def _view(target: str, drafter: str, images: Sequence[str], question: str, revision: str | None) -> dict[str, Any]:
    """What a drafter keeps of a question with pictures, found by letting it begin."""
    from speculens.engine import Engine
    from speculens.sampling import Sampling

    model, guesser = load(target, drafter, revision=revision)
    prompt = model.encode(conversation_of(question, images))
    step = Engine(model, guesser, capacity=len(prompt) + 1).admit(prompt, Sampling(max_new_tokens=1))
    told = step.slot.stats.to_dict()
    names = ("num_prompt_tokens", "num_visual_tokens", "num_drafter_rows", "drafter_prefill_ratio", "drafter_notes")
    return {name: told[name] for name in names}


def _misfit(drafter: Drafter, target: Target) -> str | None:
    """Why a drafter refuses a target; None if it does not."""
    try:
        drafter.session(target, slots=1, capacity=1)
    except UserError as error:
        return str(error)
    return None
