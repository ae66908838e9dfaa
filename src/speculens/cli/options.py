"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """Number formats of a target."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


class Capture(StrEnum):
    """Whether steps are recorded."""

    auto = "auto"
    off = "off"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a target on the hub.")]
IMAGE_ROOT_HELP = "Where relative picture paths start; default: the folder of the file that names them."
DRAFTER_HELP = "Folder or hub id of a drafter, `lookup` or `none`."
TREE, SAMPLING, MODEL = "The draft tree", "Sampling", "The model"
NumberFormat = Annotated[
    Dtype, typer.Option(help="`auto`: the checkpoint's own; float32 on a CPU.", rich_help_panel=MODEL)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=MODEL)]
DeviceMap = Annotated[str | None, typer.Option(help="`auto` spreads a large target.", rich_help_panel=MODEL)]
Recorded = Annotated[
    Capture,
    typer.Option(
        "--capture",
        help="`auto`: a GPU's steps are recorded as graphs; `off`: they run eagerly.",
        rich_help_panel=MODEL,
    ),
]
NumSteps = Annotated[
    int | None, typer.Option("--num-steps", "--depth", help="Expansions after the first level.", rich_help_panel=TREE)
]
TopK = Annotated[int | None, typer.Option("--topk", help="Children per node, and the beam.", rich_help_panel=TREE)]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(
        "--num-draft-tokens",
        "--total-token",
        help="Nodes scored in a pass; counts the root, as EAGLE and SGLang do and vLLM does not.",
        rich_help_panel=TREE,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
SampleTopK = Annotated[int, typer.Option("--top-k", help="0 is off.", rich_help_panel=SAMPLING)]
SampleTopP = Annotated[float, typer.Option("--top-p", rich_help_panel=SAMPLING)]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Tokens of prompt and answer to make room for.", rich_help_panel=MODEL)
]


def given(**options: Any) -> dict[str, Any]:
    """Those that were set."""
    return {name: value for name, value in options.items() if value is not None}
