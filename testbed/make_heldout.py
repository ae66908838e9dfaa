"""Writes the held-out prompts that are shipped: `python -m testbed.make_heldout --packs DIR`.

charts.jsonl has drawn pictures of seed 1, which training never draws; openstax.jsonl the textbook figures of the real
pack's validation part. Both are in the project's data format, with a reference answer in the last message.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from testbed import draw, packs
from testbed.make_data import conversation

FOLDER = Path(__file__).parent / "heldout"
CHARTS = 42  # six of each kind
SEED = 1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True, help="folder of the real packs")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    (given.out / "pictures").mkdir(parents=True, exist_ok=True)
    _write(given.out / "charts.jsonl", [_chart(given.out, index) for index in range(CHARTS)])
    figures = [row for row in packs.rows(given.packs, "val") if row.source == "openstax" and row.task == "describe"]
    _write(given.out / "openstax.jsonl", [_figure(given.out, row) for row in figures])


def _chart(out: Path, index: int) -> dict[str, Any]:
    made = draw.sample(SEED, index, (256, 256), kind=draw.KINDS[index % len(draw.KINDS)])
    name = f"{made.kind}-{index:02d}"
    metadata = {"kind": made.kind, "task": made.task, "facts": made.facts}
    return _row(out, name, made.image, made.question, made.answer, metadata)


def _figure(out: Path, row: packs.Row) -> dict[str, Any]:
    metadata = {"kind": "figure", "task": row.task, "source": row.id, "license": "CC BY 4.0", "credit": "OpenStax"}
    name = Path(row.id).stem
    return _row(out, name, row.image(), row.question, row.answer, metadata)


def _row(
    out: Path, name: str, image: Image.Image, question: str, answer: str, metadata: dict[str, Any]
) -> dict[str, Any]:
    path = Path("pictures") / f"{name}.webp"
    image.save(out / path, lossless=metadata["kind"] != "figure", quality=90)
    return conversation(name, path, question, answer, metadata)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
