"""The command line: parses, calls, prints. Errors are one sentence on standard error and exit status 2."""

from __future__ import annotations

import contextlib
import errno
import io
import json as jsons
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speculens.errors import UserError

if TYPE_CHECKING:
    from speculens.answer import Answer, Entry
    from speculens.conversation import Conversation
    from speculens.data.respond import Asking
    from speculens.drafters import Drafter
    from speculens.targets import Target

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Lossless speculative decoding for vision-language models.",
)


class Dtype(StrEnum):
    """Number formats of a target."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


class Layout(StrEnum):
    """Forms in which drafters are stored: our own, and those of the public code of three papers."""

    ours = "ours"
    eagle = "eagle"
    vispec = "vispec"
    hivis = "hivis"


class Trees(StrEnum):
    """Which tree a server's steps draft."""

    own = "own"
    auto = "auto"


class Family(StrEnum):
    """Targets that the repository ships."""

    all = "all"
    llava = "llava"
    qwen2_5_vl = "qwen2_5_vl"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a target on the hub.")]
IMAGE_ROOT_HELP = "Where relative picture paths start; default: the folder of the file that names them."
DRAFTER_HELP = "Folder or hub id of a drafter, `lookup` or `none`."
TREE, SAMPLING, MODEL = "The draft tree", "Sampling", "The model"
Numbers = Annotated[Dtype, typer.Option(help="`auto`: the checkpoint's own; float32 on a CPU.", rich_help_panel=MODEL)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=MODEL)]
DeviceMap = Annotated[str | None, typer.Option(help="`auto` spreads a large target.", rich_help_panel=MODEL)]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command (default: that of the process) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows few characters must not stop an answer
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with _interrupts() as interrupts:
        return _invoke(words, interrupts)


def _invoke(words: list[str], interrupts: Sequence[int]) -> int:
    command = typer.main.get_command(app)
    try:
        with warnings.catch_warnings(), command.make_context("speculens", words) as context:
            warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|accelerate)\b")
            command.invoke(context)
            sys.stdout.flush()
    except typer.Exit as leaving:
        return leaving.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader has seen enough; Python must not complain about it while shutting down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if interrupts:
            return 130
        sentence = _sentence(error)
        if sentence is None:
            raise
        if sentence:  # none where the help has been shown instead
            typer.echo(f"speculens: {sentence}", err=True)
        return 2
    return 0


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Every Ctrl-C that came: amid an import it may be swallowed, and the import fails in another way."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _sentence(error: Exception) -> str | None:
    """What went wrong in one line, for errors that a user can mend; None for our own mistakes."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if hasattr(error, "format_message"):  # how the command was typed
        return " ".join(error.format_message().split())
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return (
            "Out of memory: lower --max-model-len, --max-new-tokens, --num-draft-tokens or the recipe's batch size, "
            "use smaller pictures, or load the target with --dtype bfloat16 or spread by --device-map auto."
        )
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return "The disk is full: make room, then run the same command again."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}."
    return None


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from speculens import __version__

        typer.echo(f"speculens {__version__}")
        raise typer.Exit


@app.command()
def generate(  # noqa: PLR0913, PLR0917 - a flag each
    question: Annotated[str, typer.Argument(help="What to ask; `-` reads it from standard input.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    drafter: Annotated[str, typer.Option(help=DRAFTER_HELP)] = "none",
    image: Annotated[list[str] | None, typer.Option(help="Path, URL or `-` (standard input); may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run the target alone beside it and show both.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the answer as an HTML page.")] = None,
    json: Json = False,
    num_steps: NumSteps = None,
    topk: TopK = None,
    num_draft_tokens: NumDraftTokens = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: SampleTopK = 0,
    top_p: SampleTopP = 1.0,
    min_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.", rich_help_panel=SAMPLING)] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=SAMPLING)] = 0,
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same text with any drafter.", rich_help_panel=SAMPLING)
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End after this text; may be repeated.", rich_help_panel=SAMPLING)
    ] = None,
    dtype: Numbers = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
) -> None:
    """Answer a question about pictures, as the target itself would, sooner."""
    if compare and drafter == "none":
        raise UserError("--compare sets a drafter beside none: name one with --drafter.")
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
    conversation = _conversation(question, image or [], system)
    model, guesser = _load(target, drafter, dtype, device, device_map, revision)
    shape = reshaped(guesser, _given(num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens))
    prompt = model.encode(conversation)
    capacity = max_model_len or min(model.context, len(prompt) + max_new_tokens)
    engine = Engine(model, guesser, capacity=capacity, shape=shape or "auto")
    alone = Engine(model, capacity=capacity) if compare else None
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
        _print_json(
            {"target": target, "drafter": drafter, **answer.to_dict(), **_compared(entries), "versions": _versions()}
        )


def _conversation(question: str, images: Sequence[str], system: str | None) -> Conversation:
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
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise UserError("Standard input holds no text; a picture is named with --image -.") from None


def _load(
    target: str, drafter: str, dtype: Dtype, device: str | None, device_map: str | None, revision: str | None
) -> tuple[Target, Drafter]:
    from speculens.checkpoints import load_drafter
    from speculens.targets import load_target

    _hush()
    model = load_target(target, dtype=dtype.value, device=_usable(device), device_map=device_map, revision=revision)
    return model, load_drafter(drafter, dtype=model.dtype, device=model.device, target=model)


def _usable(device: str | None) -> str | None:
    import torch

    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _given(**options: Any) -> dict[str, Any]:
    """Those that were set."""
    return {name: value for name, value in options.items() if value is not None}


def _write_page(
    file: Path, about: str, images: Sequence[str], conversation: Conversation, answer: Answer, entries: Sequence[Entry]
) -> None:
    from speculens import page

    question = str(conversation.messages[-1].content[-1])
    # A data URI may be megabytes long, and folders are nobody's business.
    names = ["a picture" if name.startswith("data:") else Path(name).name for name in images]
    card = page.Card(", ".join(names) or "No picture", conversation.images, question, answer)
    _write(file, page.render("An answer", about, [page.Section("", "", [card], entries)]))


def _compared(entries: Sequence[Entry]) -> dict[str, Any]:
    if not entries:
        return {}
    own, mine = entries
    return {
        "exact": mine.exact == 1,
        "first_difference": mine.differences[0],
        "walltime_speedup": mine.walltime_speedup,
        "decode_speedup": mine.decode_speedup,
        "baseline": own.answers[0].to_dict(),
    }


@app.command()
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
    from speculens.checkpoints import load_drafter
    from speculens.show import Screen, drafter_lines, target_lines, view_lines
    from speculens.targets import outline_target

    _hush()
    screen = Screen(quiet=json)
    report: dict[str, Any] = {"target": None, "drafter": None, "fits": None, "reason": None}
    outline = guesser = None
    if target is not None:
        outline = outline_target(target, revision=revision)
        report["target"] = {"name": target, **_target_facts(outline)}
        screen.facts(f"target {target}", target_lines(report["target"]))
    if drafter is not None:
        guesser = load_drafter(drafter, target=outline)
        report["drafter"] = {"name": drafter, **guesser.describe(), "bytes": _stored_bytes(drafter)}
        screen.say()
        screen.facts(f"drafter {drafter}", drafter_lines(report["drafter"]))
    if outline is not None and guesser is not None:
        report["reason"] = _misfit(guesser, outline)
        report["fits"] = report["reason"] is None
        screen.say()
        screen.say(report["reason"] or "They fit.", "bold")
    if image:
        if not (target and drafter):
            raise UserError("--image shows what a drafter keeps of a picture: name a --target and a --drafter, too.")
        report["view"] = _view(target, drafter, image, question, revision)
        screen.say()
        screen.facts("of this question", view_lines(report["view"]))
    if json:
        _print_json({**report, "versions": _versions()})


def _view(target: str, drafter: str, images: Sequence[str], question: str, revision: str | None) -> dict[str, Any]:
    """What a drafter keeps of a question with pictures, found by letting it begin."""
    from speculens.engine import Engine
    from speculens.sampling import Sampling

    model, guesser = _load(target, drafter, Dtype.auto, None, None, revision)
    prompt = model.encode(_conversation(question, images, None))
    step = Engine(model, guesser, capacity=len(prompt) + 1).admit(prompt, Sampling(max_new_tokens=1))
    told = step.slot.stats.to_dict()
    names = ("num_prompt_tokens", "num_visual_tokens", "num_drafter_rows", "drafter_prefill_ratio", "drafter_notes")
    return {name: told[name] for name in names}


def _target_facts(target: Target) -> dict[str, Any]:
    from speculens.targets.processing import image_token_id

    config = target.model.config
    token = image_token_id(config)
    rope = getattr(target.text_config, "rope_parameters", None) or {}
    return {
        "model_type": target.family,
        "architecture": type(target.model).__name__,
        "num_hidden_layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "parameters": sum(weight.numel() for weight in target.model.parameters()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "context": target.context,
        "kv_bytes_per_token": target.session(slots=1, capacity=1).cache.nbytes,
        "positions": "M-RoPE" if "mrope_section" in rope else "1-D",
        "image_token": target.tokenizer.convert_ids_to_tokens(token),
        "image_token_id": token,
        "eos_tokens": target.tokenizer.convert_ids_to_tokens(sorted(target.eos_token_ids)),
        "eos_token_ids": sorted(target.eos_token_ids),
    }


def _stored_bytes(drafter: str) -> int | None:
    """Size of a drafter's weights on disk; None if it has none."""
    from speculens.checkpoints import stored_bytes

    return None if drafter in ("none", "lookup") else stored_bytes(drafter)


def _misfit(drafter: Drafter, target: Target) -> str | None:
    """Why a drafter refuses a target; None if it does not."""
    try:
        drafter.session(target, slots=1, capacity=1)
    except UserError as error:
        return str(error)
    return None


@app.command()
def prepare_data(  # noqa: PLR0913, PLR0917 - a flag each
    files: Annotated[list[Path], typer.Argument(help="JSON lines, or JSON arrays, of rows in any known form.")],
    out: Annotated[Path, typer.Option(help="The file of rows to write.")],
    image_root: Annotated[Path | None, typer.Option(help=IMAGE_ROOT_HELP)] = None,
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

    _hush()
    screen = Screen(quiet=json)
    selection = Selection(limit, shuffle_seed, copy_images, max_length, overwrite)
    counter = outline_target(target, revision=revision) if target is not None else None
    with screen.progress("rows") as tell:
        report = prepare(JsonLines(files, image_root), out, selection, counter, tell).to_dict()
    screen.facts(str(out), prepared_lines(report))
    if report["refused"]:
        screen.aside(f"Which rows are refused, and why: {error_file(out)}")
    if json:
        _print_json({"output": str(out), "target": target, **report, "versions": _versions()})


@app.command()
def respond(  # noqa: PLR0913, PLR0917 - a flag each
    file: Annotated[Path, typer.Argument(help="Rows whose questions are asked; their own answers are not read.")],
    out: Annotated[Path, typer.Option(help="The file of rows to write, or to go on with.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    drafter: Annotated[str, typer.Option(help=DRAFTER_HELP)] = "none",
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Recipe of prompts and sampling, a YAML file; options replace its values."),
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help=IMAGE_ROOT_HELP)] = None,
    instruction_suffix: Annotated[str | None, typer.Option(help="Said after every question.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message of every row.")] = None,
    turns: Annotated[int | None, typer.Option(help="Questions to answer of each row; default all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the file.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Rows that are answered side by side.")] = 8,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try rows again that an earlier run could not answer.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default 1024.", rich_help_panel=SAMPLING)] = None,
    temperature: Annotated[float | None, typer.Option(help="Default 1.", rich_help_panel=SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(help="Default 0, off.", rich_help_panel=SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(help="Default 1, off.", rich_help_panel=SAMPLING)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Default 0; each row's own is made from it.", rich_help_panel=SAMPLING)
    ] = None,
    dtype: Numbers = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Let the target write its own answers to the questions of a data set; a killed run goes on where it was."""
    from speculens.data import JsonLines
    from speculens.data.respond import Responder
    from speculens.data.rows import error_file
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
    model, guesser = _load(target, drafter, dtype, device, device_map, revision)
    engine = Engine(model, guesser, slots=slots, capacity=max_model_len)
    responder = Responder(engine, source, asking, out, target, limit)
    screen = Screen(quiet=json)
    with screen.progress("rows") as tell:
        outcome = responder.run(retry_errors=retry_errors, on_row=tell)
    report = outcome.to_dict()
    if outcome.error and not outcome.success and not outcome.skipped:
        raise UserError(f"None of the {outcome.error} rows could be answered. The first: {outcome.first_error}")
    screen.facts(str(out), answered_lines(report))
    if outcome.error:
        screen.aside(f"Which rows failed, and why: {error_file(out)}; --retry-errors tries them again.")
    if json:
        _print_json({"output": str(out), "target": target, "drafter": drafter, **report, "versions": _versions()})


def _asking(config: Path | None, suffix: str | None, options: dict[str, Any]) -> Asking:
    """A recipe with the options that were given laid over it."""
    from dataclasses import replace

    from speculens.data.respond import PLACE, Asking
    from speculens.training.config import load

    given = _given(**options)
    if suffix is not None:
        given["templates"] = (f"{PLACE} {suffix}",)
    return replace(load(Asking, config) if config else Asking(), **given)


@app.command()
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

    _hush()
    plan = training.load_recipe(recipe, overrides or [])
    if dry_run:
        if json:
            _print_json(plan.to_dict())
        else:
            typer.echo(plan.to_yaml(), nl=False)
        return
    screen = Screen(quiet=json)
    if encode_only:
        rows = training.encode(plan)
        screen.say(f"{rows} encoded rows are in {plan.data.cache}.")
        if json:
            _print_json({"event": "encoded", "path": plan.data.cache, "rows": rows})
        return
    made = training.train(plan, resume_from=resume_from, on_event=_print_json if json else screen.event)
    training.disband()
    if os.environ.get("RANK", "0") != "0":  # of the processes of one run, the first speaks
        return
    screen.say(f"The drafter is in {made}.")
    if json:
        _print_json({"event": "drafter", "path": str(made), "versions": _versions()})


@app.command()
def bench(  # noqa: PLR0913, PLR0917 - a flag each
    target: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    suite: Annotated[str, typer.Option(help="Name of a suite, see docs/benchmarks.md.")],
    out: Annotated[Path, typer.Option(help="The folder of the run.")],
    drafter: Annotated[
        list[str] | None,
        typer.Option(help=f"{DRAFTER_HELP[:-1]}, `hf`, `hf:lookup`, `hf:assistant=TARGET`; one or several."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[DRAFTER]...", help="Further drafters.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Where the suite's data is; may be repeated.")] = None,
    image_root: Annotated[Path | None, typer.Option(help=IMAGE_ROOT_HELP)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first cases of the suite.")] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Questions to ask of each conversation; default all.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json: Json = False,
    num_steps: NumSteps = None,
    topk: TopK = None,
    num_draft_tokens: NumDraftTokens = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: SampleTopK = 0,
    top_p: SampleTopP = 1.0,
    seed: Annotated[int, typer.Option(help="Each question's own is made from it.", rich_help_panel=SAMPLING)] = 0,
    dtype: Numbers = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
) -> None:
    """Measure drafters beside `none` on a suite of questions, and whether their answers are the target's own."""
    from speculens.bench import peers
    from speculens.bench.figures import conclude
    from speculens.bench.measure import Bench
    from speculens.bench.record import NONE, RunFolder
    from speculens.bench.suites import load_suite
    from speculens.checkpoints import load_drafter
    from speculens.data.respond import Asking
    from speculens.drafters.base import reshaped
    from speculens.show import Screen

    asking = Asking(
        turns=turns, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    cases = load_suite(suite, data or [], image_root)[:limit]
    model, _ = _load(target, "none", dtype, device, device_map, revision)
    ours, others = peers.split([*(drafter or []), *(more or [])])
    drafters = {
        name: load_drafter(name, dtype=model.dtype, device=model.device, target=model) for name in ours if name != NONE
    }
    wanted = _given(num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens)
    shapes = {name: shape for name, guesser in drafters.items() if (shape := reshaped(guesser, wanted))}
    measured = Bench(
        model,
        drafters,
        cases,
        asking,
        shapes=shapes,
        others=[peers.load_peer(name, model, temperature) for name in others],
        capacity=max_model_len,
    )
    folder = RunFolder(out, measured.setting(target=target, revision=revision, suite=suite), resume=resume)
    screen = Screen(quiet=json)
    with screen.progress("cases") as tell:
        measured.run(folder, lambda at: tell(at.done, at.total, _lengths(at.lengths)))
    summary = conclude(folder, measured.errors)
    if not summary["questions"]:
        raise UserError(f"Nothing could be measured: {next(iter(measured.errors.values()), 'the suite is empty.')}")
    screen.measured(summary)
    screen.aside(f"Records and figures: {out}. A page of them: speculens report {out}")
    if json:
        _print_json({"run": str(out), **summary, "versions": _versions()})


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `bench` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; default: report.html in the first run.")] = None,
    json: Json = False,
) -> None:
    """Draw what `bench` measured: one page that needs nothing else, and its plots as PNG."""
    from speculens.bench.report import read_run, write_report
    from speculens.show import Screen

    page, *pictures = write_report([read_run(run) for run in runs], out or runs[0] / "report.html")
    Screen(quiet=json).say(
        f"The page: {page}; the plots: {pictures[0].parent if len(runs) == 1 else page.parent / 'plots'}"
    )
    if json:
        _print_json({"page": str(page), "plots": [str(file) for file in pictures]})


def _lengths(lengths: Mapping[str, float]) -> str:
    from speculens.bench.tables import labels

    names = labels(list(lengths))
    return "  ".join(f"{names[name]} {length:.2f}" for name, length in lengths.items())


@app.command()
def export(
    to: Annotated[Layout, typer.Option(help="The layout to write: our own, or that of a paper's public code.")],
    drafter: Annotated[str, typer.Option(help="Folder or hub id of a drafter in any of these layouts.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of the target that it drafts for.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write a drafter in another layout: from a published one to ours, and back."""
    from speculens.checkpoints import save_drafter, save_published, whole
    from speculens.drafters import TrainedDrafter
    from speculens.show import Screen, size
    from speculens.targets import outline_target

    _empty(out)
    dtype = str(outline_target(target, revision=revision).dtype).removeprefix("torch.")
    model, guesser = _load(target, drafter, Dtype(dtype), "cpu", None, revision)
    if not isinstance(guesser, TrainedDrafter):
        raise UserError(f"The drafter {drafter} has no weights to write.")
    with whole(out) as partial:
        if to is Layout.ours:
            save_drafter(guesser, partial, {"target": target, "exported from": drafter})
        else:
            save_published(guesser, to.value, partial, model)
    stored = _stored_bytes(str(out))
    screen = Screen(quiet=json)
    screen.say(f"The drafter is in {out} ({to.value}, {size(stored or 0)}).")
    if json:
        _print_json(
            {"path": str(out), "layout": to.value, "method": guesser.name, "bytes": stored, "versions": _versions()}
        )


@app.command()
def trim(
    drafter: Annotated[str, typer.Argument(help="Folder or hub id of a trained drafter.")],
    data: Annotated[list[Path], typer.Option(help="Rows whose answers are counted, best the target's own (respond).")],
    size: Annotated[int, typer.Option(min=1, help="Tokens that it shall draft.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of the target that it drafts for.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
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

    _empty(out)
    _hush()
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
        _print_json({**report, "counted": found.counted, "versions": _versions()})


def _empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder.")


@app.command()
def serve(  # noqa: PLR0913, PLR0917 - a flag each
    target: Annotated[str, typer.Argument(help="Folder or hub id of a vision-language model.")],
    drafter: Annotated[str | None, typer.Option(help=DRAFTER_HELP + " Default `none`.")] = None,
    speculative_config: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="The same as vLLM writes it: `method`, `model`, `num_speculative_tokens`."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call it; default: the target.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SPECULENS_API_KEY", show_envvar=True, help="Ask every client for this key.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that are decoded side by side.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are told 429.")] = 32,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds; then an answer is cut.")] = 600.0,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds for what runs, after SIGTERM.")] = 30.0,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch pictures from public http(s) addresses.")
    ] = False,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures in one request.")] = 8,
    max_image_mb: Annotated[float, typer.Option(min=0.01, help="Size of one picture, in MiB.")] = 20.0,
    max_image_mp: Annotated[float, typer.Option(min=0.01, help="Pixels of one picture, in millions.")] = 40.0,
    max_body_mb: Annotated[float, typer.Option(min=0.01, help="Size of one request, in MiB.")] = 32.0,
    no_baseline: Annotated[
        bool, typer.Option("--no-baseline", help="No second engine without the drafter, which the page compares to.")
    ] = False,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Rows of a prompt that are taken in between two steps of those that run.")
    ] = 512,
    worker_timeout: Annotated[
        float, typer.Option(min=2, help="Seconds without a sign of life; then the engine's process is started again.")
    ] = 300.0,
    no_warm_up: Annotated[
        bool, typer.Option("--no-warm-up", help="On a GPU: record graphs when they are first needed, not at the start.")
    ] = False,
    tree: Annotated[
        Trees, typer.Option(help="`own`: the drafter's; `auto`: sized at each step by cost.", rich_help_panel=TREE)
    ] = Trees.own,
    num_steps: NumSteps = None,
    topk: TopK = None,
    num_draft_tokens: NumDraftTokens = None,
    dtype: Numbers = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Answer any OpenAI client over HTTP."""
    from speculens.server.settings import Limits, Model, Settings

    try:
        from speculens.server.run import serve as run
    except ImportError as error:
        raise UserError(f"The server needs {error.name}: pip install 'speculens[serve]'.") from None
    method, tokens = _speculation(speculative_config, drafter)
    changes = _given(num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens or tokens)
    if changes and tree is Trees.auto:
        raise UserError(f"--tree auto sizes the tree itself: leave out --{next(iter(changes)).replace('_', '-')}.")
    model = Model(
        target=target,
        drafter=method,
        tree=changes,
        sized=tree is Trees.auto,
        dtype=dtype.value,
        device=device,
        device_map=device_map,
        revision=revision,
        length=max_model_len,
        slots=max_num_seqs,
        baseline=not no_baseline,
        warm_up=not no_warm_up,
        prefill_chunk=prefill_chunk,
    )
    limits = Limits(
        queue=max_queue,
        request_seconds=request_timeout,
        drain_seconds=drain_timeout,
        silent_seconds=worker_timeout,
        remote_images=allow_remote_images,
        images=max_images,
        image_bytes=int(max_image_mb * 2**20),
        image_pixels=int(max_image_mp * 1e6),
        body_bytes=int(max_body_mb * 2**20),
    )
    name = served_model_name or target
    settings = Settings(model, limits, name, host, port, api_key or None)

    def ready(address: str) -> None:
        if json:
            _print_json({"url": address, "model": name, "drafter": method, "versions": _versions()})
        else:
            typer.echo(f"{name} with drafter {method} answers at {address} (Ctrl-C ends it).")
        sys.stdout.flush()

    run(settings, ready)


def _speculation(config: str | None, drafter: str | None) -> tuple[str, int | None]:
    """The drafter and the nodes of its tree, from vLLM's JSON or from the name alone."""
    if config is None:
        return drafter or "none", None
    if drafter is not None:
        raise UserError("--drafter and --speculative-config say the same: give one of them.")
    try:
        asked = jsons.loads(config)
    except ValueError as error:
        raise UserError(f"--speculative-config is not JSON: {error}.") from None
    known = ("method", "model", "num_speculative_tokens")
    if not isinstance(asked, dict) or set(asked) - set(known):
        raise UserError(f"--speculative-config is a JSON object of {', '.join(known)}.")
    method, model, tokens = (asked.get(key) for key in known)
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise UserError(f"num_speculative_tokens must be a whole number from 1 on, not {tokens!r}.")
    name = {"ngram": "lookup", "lookup": "lookup", "none": "none"}.get(str(method), model)
    if not isinstance(name, str):
        raise UserError("--speculative-config names no drafter: give a `model`, or the method `ngram`.")
    return name, None if tokens is None else tokens + 1  # vLLM does not count the root


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo-output/index.html"),
    family: Annotated[Family, typer.Option(help="Which of the shipped targets.")] = Family.all,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most, for each picture.")] = 256,
    testbed: Annotated[Path | None, typer.Option(help="Folder of the shipped models and pictures.")] = None,
    json: Json = False,
) -> None:
    """Describe a shipped picture with and without a drafter, side by side."""
    from speculens import demo as shipped
    from speculens import page
    from speculens.show import Screen

    _hush()
    screen = Screen(quiet=json)
    families = shipped.FAMILIES if family is Family.all else (family.value,)
    folder = shipped.find_testbed(testbed, families)
    screen.legend()
    outcomes = [shipped.run(folder, name, max_new_tokens, screen) for name in families]
    _write(out, page.render("Speculens demo", shipped.LEAD, [outcome.section() for outcome in outcomes]))
    screen.say(f"\nThe page with pictures and coloured text: {out}")
    if json:
        _print_json(
            {"families": [outcome.to_dict() for outcome in outcomes], "page": str(out), "versions": _versions()}
        )


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(jsons.dumps(values))


def _versions() -> dict[str, str]:
    from importlib import metadata  # it reads slowly, for a module that --help must wait for

    found = {}
    for name in ("speculens", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # this package may run from its sources
            found[name] = metadata.version(name)
    return found


def _hush() -> None:
    """Neither loading bars nor advice from the libraries below; downloads keep their bar on a terminal."""
    import huggingface_hub.utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # a hub out of reach is told once, not at every try
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
