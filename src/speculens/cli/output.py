"""What a command leaves behind: files, and JSON for machines."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import typer

from speculens.errors import UserError


def print_json(values: dict[str, Any]) -> None:
    """The one line on standard output."""
    typer.echo(json.dumps(values))


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    from importlib import metadata  # it reads slowly, for a module that --help must wait for

    found = {}
    for name in ("speculens", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # this package may run from its sources
            found[name] = metadata.version(name)
    return found


def write(file: Path, text: str) -> None:
    """A file, and the folders that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def check_empty(folder: Path) -> None:
    """Raise UserError rather than mix with what is there."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder.")
