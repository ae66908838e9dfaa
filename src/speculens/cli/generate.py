"""`generate`: one question, one answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculens.cli.models import load
from speculens.cli.options import (
    DRAFTER_HELP,
    SAMPLING,
    TREE,
    TREE_HELP,
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
    Trees,
    tree_numbers,
)
from speculens.cli.output import print_json, versions, write
from speculens.errors import UserError

if TYPE_CHECKING:
    from speculens.answer import Answer, Entry
    from speculens.conversation import Conversation


def generate(  # noqa: PLR0913, PLR0917 - a flag each
    question: Annotated[str, typer.Argument(help="What to ask; `-` reads it from standard input.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    drafter: Annotated[str, typer.Option(help=DRAFTER_HELP)] = "none",
    image: Annotated[list[str] | None, typer.Option(help="Path, URL or `-` (standard input); may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run the target alone beside it and show both.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the answer as an HTML page.")] = None,
    json: Json = False,
    tree: Annotated[
        Trees | None,
        typer.Option(help=TREE_HELP, show_default="auto, unless a number below is given", rich_help_panel=TREE),
    ] = None,
    num_steps: NumSteps = None,
    topk: TopK = None,
    num_draft_tokens: NumDraftTokens = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: SampleTopK = 0,
    top_p: SampleTopP = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Leave out tokens less probable than so much of the likeliest one; 0 is off.", rich_help_panel=SAMPLING
        ),
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.", rich_help_panel=SAMPLING)] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=SAMPLING)] = 0,
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same text with any drafter.", rich_help_panel=SAMPLING)
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End after this text; may be repeated.", rich_help_panel=SAMPLING)
    ] = None,
    dtype: NumberFormat = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    capture: Recorded = Capture.auto,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
) -> None:
    """Answer a question about pictures, as the target itself would, sooner."""
    if compare and drafter == "none":
        raise UserError("--compare sets a drafter beside none: name one with --drafter.")
    numbers = tree_numbers(tree, num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens)
    from speculens.answer import Entry, ask, warm_up
    from speculens.drafters.base import reshaped
    from speculens.engine import Engine
    from speculens.sampling import Sampling
    from speculens.show import Screen, closing

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop=tuple(stop or ()),
    )
    conversation = conversation_of(question, image or [], system)
    model, guesser = load(target, drafter, dtype=dtype, device=device, device_map=device_map, revision=revision)
    shape = reshaped(guesser, numbers)
    prompt = model.encode(conversation)
    capacity = max_model_len or min(model.context, len(prompt) + max_new_tokens)
    engine = Engine(
        model, guesser, capacity=capacity, shape=shape or (None if tree is Trees.own else "auto"), capture=capture.value
    )
    alone = Engine(model, capacity=capacity, capture=capture.value) if compare else None
    if alone:
        warm_up((engine, alone), prompt, sampling)
    screen = Screen(quiet=json)
    answer = ask(engine, prompt, sampling, screen.run)
    screen.say()
    screen.aside(closing(answer))
    if any(run.drafted for run in answer.runs):
        screen.legend()
    entries = []
    if alone:
        own = ask(alone, prompt, sampling)
        entries = [Entry("none", [own], [own]), Entry(guesser.name, [answer], [own])]
        screen.table(entries)
    if html:
        _write_page(html, f"{target}, drafter {drafter}", image or [], conversation, answer, entries)
    if json:
        print_json(
            {"target": target, "drafter": drafter, **answer.to_dict(), **_compared(entries), "versions": versions()}
        )


def conversation_of(question: str, images: Sequence[str], system: str | None = None) -> Conversation:
    """What is asked; `-` as the question or as a picture stands for standard input."""
    from speculens.conversation import Conversation, Message

    if question == "-":
        if "-" in images:
            raise UserError("Standard input can bring the picture or the question, not both: give one of them by name.")
        question = _said()
    if not question:
        raise UserError("The question is empty.")
    asked = Conversation.user(question, images)
    return Conversation((Message("system", (system,)), *asked.messages)) if system else asked


def _said() -> str:
    """A question from standard input."""
    try:
        return sys.stdin.buffer.read().decode().strip()  # strictly UTF-8, in any locale
    except UnicodeDecodeError:
        raise UserError("Standard input holds no text; a picture is named with --image -.") from None


def _write_page(
    file: Path, about: str, images: Sequence[str], conversation: Conversation, answer: Answer, entries: Sequence[Entry]
) -> None:
    from speculens import page

    question = str(conversation.messages[-1].content[-1])
    # A data URI may be megabytes long, and folders are nobody's business.
    names = ["a picture" if name.startswith("data:") else Path(name).name for name in images]
    card = page.Card(", ".join(names) or "No picture", conversation.images, question, answer)
    write(file, page.render("An answer", about, [page.Section("", "", [card], entries)]))


def _compared(entries: Sequence[Entry]) -> dict[str, Any]:
    if not entries:
        return {}
    own, mine = entries
    return {
        "exact": mine.num_exact == 1,
        "first_difference": mine.differences[0],
        "walltime_speedup": mine.walltime_speedup,
        "decode_speedup": mine.decode_speedup,
        "baseline": own.answers[0].to_dict(),
    }
