"""`trim`: a drafter over fewer tokens; `export`: a drafter in another layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from speculens.cli.models import hush, load
from speculens.cli.options import Dtype, Json, Revision
from speculens.cli.output import check_empty, print_json, versions
from speculens.errors import UserError


class Layout(StrEnum):
    """Forms in which drafters are stored: our own, and those of the public code of three papers."""

    ours = "ours"
    eagle = "eagle"
    vispec = "vispec"
    hivis = "hivis"


def export(
    to: Annotated[Layout, typer.Option(help="The layout to write: our own, or that of a paper's public code.")],
    drafter: Annotated[str, typer.Option(help="Folder or hub id of a drafter in any of these layouts.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of the target that it drafts for.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Store matrices in 8 bits: half the size, faster on a GPU, as good.")
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write a drafter in another layout: from a published one to ours, and back."""
    from speculens.checkpoints import save_drafter, save_published, stored_bytes, whole
    from speculens.drafters import TrainedDrafter
    from speculens.show import Screen, size
    from speculens.targets import outline_target

    check_empty(out)
    if int8 and to is not Layout.ours:
        raise UserError(f"The layout {to.value} knows no 8 bits: leave out --int8.")
    dtype = str(outline_target(target, revision=revision).dtype).removeprefix("torch.")
    model, guesser = load(target, drafter, dtype=Dtype(dtype), device="cpu", revision=revision)
    if not isinstance(guesser, TrainedDrafter):
        raise UserError(f"The drafter {drafter} has no weights to write.")
    with whole(out) as partial:
        if to is Layout.ours:
            card = {"target": target, "exported from": drafter} | ({"matrices": "int8"} if int8 else {})
            save_drafter(guesser, partial, card, int8=int8)
        else:
            save_published(guesser, to.value, partial, model)
    stored = stored_bytes(str(out))
    screen = Screen(quiet=json)
    screen.say(f"The drafter is in {out} ({to.value}, {size(stored or 0)}).")
    if json:
        print_json(
            {"path": str(out), "layout": to.value, "method": guesser.name, "bytes": stored, "versions": versions()}
        )


def trim(
    data: Annotated[list[Path], typer.Option(help="Rows whose answers are counted, best the target's own (respond).")],
    size: Annotated[int, typer.Option(min=1, help="Tokens that it shall draft.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of the target that it drafts for.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    place: Annotated[
        str | None, typer.Argument(metavar="DRAFTER", help="Folder or hub id of a trained drafter.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Let a drafter draft only the commonest tokens: its share of the head becomes small. The output stays the same."""
    from speculens.checkpoints import load_drafter, save_drafter, whole
    from speculens.data import JsonLines
    from speculens.data.vocabulary import commonest
    from speculens.drafters import TrainedDrafter
    from speculens.show import Screen
    from speculens.targets import outline_target

    if place and drafter:
        raise UserError("The drafter to trim is named twice: leave out --drafter.")
    drafter = drafter or place
    if not drafter:
        raise UserError("Name the drafter to trim with --drafter.")
    check_empty(out)
    hush()
    outline = outline_target(target, revision=revision)
    guesser = load_drafter(drafter, dtype=outline.dtype, target=outline)
    if not isinstance(guesser, TrainedDrafter):
        raise UserError(f"The drafter {drafter} has no head to trim.")
    guesser.check(outline)
    screen = Screen(quiet=json)
    with screen.progress("rows") as tell:
        found = commonest(JsonLines(data), outline, size, tell)
    covered = f"{found.coverage:.2%} of {found.counted:,} tokens in answers"
    with whole(out) as partial:
        card = {"target": target, "trimmed from": drafter, "covers": covered}
        save_drafter(guesser.trimmed(found.tokens), partial, card)
    screen.say(f"The drafter is in {out}: {size:,} of {outline.vocab_size:,} tokens, {covered}.")
    if json:
        report = {"path": str(out), "method": guesser.name, "draft_vocab_size": size, "coverage": found.coverage}
        print_json({**report, "counted": found.counted, "versions": versions()})
