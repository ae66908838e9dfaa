"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from speculens.errors import UserError


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


class Trees(StrEnum):
    """Which tree each step drafts."""

    own = "own"
    auto = "auto"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a target on the hub.")]
IMAGE_ROOT_HELP, IMAGE_ROOT_DEFAULT = "Where relative picture paths start.", "the folder of the file that names them"
DRAFTER_HELP = "Folder or hub id of a drafter, `lookup` or `none`."
TREE, SAMPLING, MODEL = "The draft tree", "Sampling", "The model"
TREE_HELP = "`own`: the drafter's; `auto`: sized at each step by cost."
MAX_NEW_TOKENS_HELP = "Tokens of an answer at most."
TEMPERATURE_HELP = "0 is greedy."
TOP_K_HELP = "Sample from so many of the likeliest tokens; 0 is off."
TOP_P_HELP = "Sample from the likeliest tokens that are so probable together; 1 is off."
ROOM_HELP = "Tokens of prompt and answer to make room for."
NumberFormat = Annotated[
    Dtype, typer.Option(help="`auto`: the checkpoint's own; float32 on a CPU.", rich_help_panel=MODEL)
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there is one, else cpu", rich_help_panel=MODEL),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="`auto` spreads a large target.", show_default="all on --device", rich_help_panel=MODEL),
]
Recorded = Annotated[
    Capture,
    typer.Option(
        "--capture",
        help="`auto`: a GPU's steps are recorded as graphs; `off`: they run eagerly.",
        rich_help_panel=MODEL,
    ),
]
Tree = Annotated[Trees, typer.Option(help=TREE_HELP, rich_help_panel=TREE)]
NumSteps = Annotated[
    int | None, typer.Option("--num-steps", "--depth", help="Expansions after the first level.", rich_help_panel=TREE)
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--topk",
        "--tree-topk",
        help="Children per node of the draft tree, and its beam; sampling's filter is --top-k.",
        rich_help_panel=TREE,
    ),
]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(
        "--num-draft-tokens",
        "--total-token",
        help="Nodes scored in a pass; counts the root, as EAGLE and SGLang do and vLLM does not.",
        rich_help_panel=TREE,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help=MAX_NEW_TOKENS_HELP, rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help=TEMPERATURE_HELP, rich_help_panel=SAMPLING)]
SampleTopK = Annotated[
    int,
    typer.Option("--top-k", help=f"{TOP_K_HELP} The draft tree's children are --topk.", rich_help_panel=SAMPLING),
]
SampleTopP = Annotated[float, typer.Option("--top-p", help=TOP_P_HELP, rich_help_panel=SAMPLING)]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help=ROOM_HELP, show_default="as many as it takes", rich_help_panel=MODEL)
]
SlotLen = Annotated[
    int | None,
    typer.Option(min=1, help=ROOM_HELP, show_default="the target's context, at most 4096", rich_help_panel=MODEL),
]


def given(**options: Any) -> dict[str, Any]:
    """Those that were set."""
    return {name: value for name, value in options.items() if value is not None}


def tree_numbers(tree: Trees | None, **numbers: int | None) -> dict[str, int]:
    """Those of the tree's numbers that were set. Raises UserError if `auto` was asked for, which sets them itself."""
    changes = given(**numbers)
    if changes and tree is Trees.auto:
        raise UserError(f"--tree auto sizes the tree itself: leave out --{next(iter(changes)).replace('_', '-')}.")
    return changes
