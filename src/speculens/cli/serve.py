"""`serve`: the server, and vLLM's way to name a drafter."""

from __future__ import annotations

import json as jsons
import sys
from typing import Annotated

import typer

from speculens.cli.options import (
    DRAFTER_HELP,
    Capture,
    Device,
    DeviceMap,
    Dtype,
    Json,
    NumberFormat,
    NumDraftTokens,
    NumSteps,
    Recorded,
    Revision,
    SlotLen,
    TopK,
    Tree,
    Trees,
    tree_numbers,
)
from speculens.cli.output import print_json, versions
from speculens.errors import UserError, lacking


def serve(  # noqa: PLR0913, PLR0917 - a flag each
    target: Annotated[str, typer.Argument(help="Folder or hub id of a vision-language model.")],
    drafter: Annotated[str | None, typer.Option(help=DRAFTER_HELP, show_default="none")] = None,
    speculative_config: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="The same as vLLM writes it: `method`, `model`, `num_speculative_tokens`."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call it.", show_default="the target")
    ] = None,
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
    tree: Tree = Trees.own,
    num_steps: NumSteps = None,
    topk: TopK = None,
    num_draft_tokens: NumDraftTokens = None,
    dtype: NumberFormat = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    capture: Recorded = Capture.auto,
    max_model_len: SlotLen = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Answer any OpenAI client over HTTP."""
    from speculens.server.settings import Limits, Model, Settings

    try:
        from speculens.server.run import serve as run
    except ImportError as error:
        raise lacking("The server needs", error.name or "more", "serve") from None
    method, tokens = speculation(speculative_config, drafter)
    if num_draft_tokens is None:
        num_draft_tokens = tokens
    changes = tree_numbers(tree, num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens)
    model = Model(
        target=target,
        drafter=method,
        tree=changes,
        sized=tree is Trees.auto,
        dtype=dtype.value,
        device=device,
        device_map=device_map,
        capture=capture.value,
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
            print_json({"url": address, "model": name, "drafter": method, "versions": versions()})
        else:
            typer.echo(f"{name} with drafter {method} answers at {address} (Ctrl-C ends it).")
        sys.stdout.flush()

    run(settings, ready)


def speculation(config: str | None, drafter: str | None) -> tuple[str, int | None]:
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
    if tokens is not None and (type(tokens) is not int or tokens < 1):  # JSON's true is an int to Python
        raise UserError(f"num_speculative_tokens must be a whole number from 1 on, not {tokens!r}.")
    name = {"ngram": "lookup", "lookup": "lookup", "none": "none"}.get(str(method), model)
    if not isinstance(name, str):
        raise UserError("--speculative-config names no drafter: give a `model`, or the method `ngram`.")
    return name, None if tokens is None else tokens + 1  # vLLM does not count the root
