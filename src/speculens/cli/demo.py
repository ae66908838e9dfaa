"""`demo`: the shipped models, side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from speculens.cli.models import hush
from speculens.cli.options import Json
from speculens.cli.output import print_json, versions, write


class Family(StrEnum):
    """Targets that the repository ships."""

    all = "all"
    llava = "llava"
    qwen2_5_vl = "qwen2_5_vl"


def demo(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo-output/index.html"),
    family: Annotated[Family, typer.Option(help="Which of the shipped targets.")] = Family.all,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most, for each picture.")] = 256,
    testbed: Annotated[Path | None, typer.Option(help="Folder of the shipped models and pictures.")] = None,
    json: Json = False,
) -> None:
    """Describe shipped pictures with and without drafters, side by side."""
    from speculens import demo as shipped
    from speculens import page
    from speculens.show import Screen

    hush()
    screen = Screen(quiet=json)
    families = shipped.FAMILIES if family is Family.all else (family.value,)
    folder = shipped.find_testbed(testbed, families)
    screen.legend()
    outcomes = [shipped.run(folder, name, max_new_tokens, screen) for name in families]
    write(out, page.render("Speculens demo", shipped.LEAD, [outcome.section() for outcome in outcomes]))
    screen.say(f"\nThe page with pictures and coloured text: {out}")
    if json:
        print_json({"families": [outcome.to_dict() for outcome in outcomes], "page": str(out), "versions": versions()})
