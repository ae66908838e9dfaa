"""The command line: parses, calls, prints. Errors are one sentence on standard error and exit status 2.

A file holds a command, or a few that belong together. torch takes seconds to import and --help must not wait for it, so
a command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from speculens.cli.bench import bench, report
from speculens.cli.data import prepare_data, respond
from speculens.cli.demo import demo
from speculens.cli.drafters import export, trim
from speculens.cli.generate import generate
from speculens.cli.inspect import inspect
from speculens.cli.serve import serve
from speculens.cli.train import train
from speculens.errors import UserError, lacks_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Lossless speculative decoding for vision-language models.",
)
for command in (generate, inspect, prepare_data, respond, train, trim, bench, report, export, serve, demo):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        from speculens import __version__

        typer.echo(f"speculens {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command (default: that of the process) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows few characters must not stop an answer
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with _interrupts() as interrupts:
        return _invoke(words, interrupts)


def _invoke(words: list[str], interrupts: Sequence[int]) -> int:
    program = typer.main.get_command(app)
    try:
        with warnings.catch_warnings(), program.make_context("speculens", words) as context:
            warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|accelerate)\b")
            program.invoke(context)
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
    if lacks_memory(error):
        return (
            "Out of memory: lower --max-model-len, --max-new-tokens, --num-draft-tokens or the recipe's batch size, "
            "use smaller pictures, or load the target with --dtype bfloat16 or spread by --device-map auto."
        )
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return "The disk is full: make room, then run the same command again."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}."
    return None
