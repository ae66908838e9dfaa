"""The recipe of a training run: every number that decides its outcome, from one YAML file and `section.key=value`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from speculens.drafters import METHODS
from speculens.errors import UserError
from speculens.tree import TreeShape
from speculens.values import one_of, read

RECIPE = "The recipe"  # what messages call it
SCHEDULES = ("constant", "linear", "cosine")
ATTENTION = ("exact", "causal")
SELECT = ("none", "chain", "public")
LENGTHS = ("steps", "epochs", "minutes")  # of a run: one of them
DTYPES = ("mixed", "bfloat16", "float32", "float64")

T = TypeVar("T")


@dataclass(frozen=True)
class DrafterRecipe:
    """The drafter to make. What is not said here (heads, head width, biases, RoPE base) is the target's own.

    method             a name from `speculens.drafters.METHODS`
    intermediate_size  width of its MLP; None takes the target's
    input_norm         RMSNorm before its attention
    tree               the tree that it will draft, also in the measurements during training
    draft_vocab_size   V', how many tokens it will draft: the commonest of the training answers. None drafts all. The
                       losses are over the whole vocabulary all the same, so the weights fit any list (docs/training.md)
    init_from          folder or hub id of a drafter whose weights it starts from: that of an earlier stage
    options            what only this method knows
    """

    method: str
    intermediate_size: int | None = None
    input_norm: bool = True
    tree: TreeShape = field(default_factory=TreeShape)
    draft_vocab_size: int | None = None
    init_from: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("drafter.method", self.method, sorted(METHODS))


@dataclass(frozen=True)
class DataRecipe:
    """Conversations to learn from: JSON lines in the forms of `Conversation.from_row`.

    train       files
    val         a file of conversations whose answers are decoded to measure acceptance; None measures nothing
    image_root  where relative picture paths start; None is the folder of the file that names them
    max_length  rows (text and picture) of one conversation; a longer one is cut, or refused if a picture would be cut
    cache       folder where all rows are kept encoded, for this run and later ones on the same data; large (pixels
                included), and made by `workers` processes if it is not there. None encodes a row each time it is met
    """

    train: tuple[str, ...] = ()
    val: str | None = None
    image_root: str | None = None
    max_length: int = 2048
    cache: str | None = None


@dataclass(frozen=True)
class Objective:
    """Weights of the named loss terms (`losses.py` has the formulas); 0 leaves a term out.

    top  how many of the target's likeliest tokens `topk_ce` and `list_mle` look at
    """

    smooth_l1: float = 1.0
    soft_ce: float = 0.1
    topk_ce: float = 0.0
    list_mle: float = 0.0
    prob_l1: float = 0.0
    top: int = 10

    @property
    def weights(self) -> dict[str, float]:
        """The terms in use."""
        named = {key: value for key, value in dataclasses.asdict(self).items() if key != "top"}
        return {name: weight for name, weight in named.items() if weight}


@dataclass(frozen=True)
class Unroll:
    """How the drafter practises on its own output (`unroll.py` has the picture).

    steps      K: passes over each batch, the first on the target's features, each later one on the drafter's own
    detach     no gradient flows from a step into the outputs that it is fed
    attention  exact: each self-fed step sees what drafting sees | causal: all of the outputs that it is fed
    select     which positions a later step trains: none leaves none out | chain: where the drafter would have survived
               until then | public: the same one position later, as the public code of arXiv 2509.23928
    hit        the drafter survives a position if the target's likeliest token is among so many of its own
    weights    of the steps' losses in their sum; empty: 1 each
    """

    steps: int = 1
    detach: bool = True
    attention: str = "exact"
    select: str = "none"
    hit: int = 5
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        one_of("unroll.attention", self.attention, ATTENTION)
        one_of("unroll.select", self.select, SELECT)
        for name in ("steps", "hit"):
            if getattr(self, name) <= 0:
                raise UserError(f"unroll.{name} must be above 0, not {getattr(self, name)}.")
        if self.weights and len(self.weights) != self.steps:
            raise UserError(f"unroll.weights are {len(self.weights)} numbers for {self.steps} steps.")


@dataclass(frozen=True)
class Optimiser:
    """AdamW.

    clip      largest norm of the gradient; None never clips
    warmup    updates over which the rate rises to `lr`
    schedule  constant | linear | cosine: how it falls to 0 over the run
    """

    lr: float = 8e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = 0.5
    warmup: int = 0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        one_of("optimiser.schedule", self.schedule, SCHEDULES)
        if self.lr <= 0:
            raise UserError(f"optimiser.lr must be above 0, not {self.lr}.")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    target        folder or hub id of the frozen model
    output        folder for log, checkpoints and the drafter
    batch_size    conversations in one pass, per process
    accumulation  passes per update, per process
    steps, epochs, minutes  exactly one: updates, passes over the data, or wall-clock time (measurements included)
    dtype         of the drafter: mixed (float32 weights, arithmetic in the target's dtype, as in decoding) | bfloat16 |
                  float32 | float64 (both)
    target_dtype  as `load_target` takes it
    shard_target  spread the target's layers over the processes of the run, for one too large for a device
    ema           decay of the running average of the weights, which is then what is measured and kept; None keeps none
    feature_noise what is added to the features that the drafter reads in training: uniform, of a width of so much times
                  512 / the sequence's rows; 0 adds nothing
    chunk         answer positions whose logits over the vocabulary are held at a time
    compile       torch.compile the drafter; each new length of batch costs time at first
    workers       processes that prepare batches; 0 prepares them in this one
    log_every     updates between lines of the log
    save_every    updates between checkpoints; None saves one at the end
    keep          checkpoints kept
    eval_every    updates between measurements of acceptance; None measures at the end alone
    eval_prompts  conversations of `data.val` that are decoded, all at once
    eval_tokens   tokens decoded of each
    """

    target: str
    drafter: DrafterRecipe
    output: str
    data: DataRecipe = field(default_factory=DataRecipe)
    objective: Objective = field(default_factory=Objective)
    unroll: Unroll = field(default_factory=Unroll)
    optimiser: Optimiser = field(default_factory=Optimiser)
    batch_size: int = 16
    accumulation: int = 1
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    dtype: str = "mixed"
    target_dtype: str = "auto"
    shard_target: bool = False
    ema: float | None = None
    seed: int = 0
    feature_noise: float = 0.0
    chunk: int = 1024
    compile: bool = False
    workers: int = 4
    log_every: int = 10
    save_every: int | None = 1000
    keep: int = 2
    eval_every: int | None = 1000
    eval_prompts: int = 16
    eval_tokens: int = 128

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise UserError(f"Say exactly one of steps, epochs and minutes; the recipe says {said}.")
        if self.feature_noise < 0:
            raise UserError(f"feature_noise must not be below 0, but is {self.feature_noise}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema must be between 0 and 1, or null for none, not {self.ema}.")
        if not self.objective.weights:
            raise UserError("Every weight of the objective is 0: there is nothing to learn.")
        for name in (*given, "batch_size", "accumulation", "chunk", "log_every", "save_every", "keep", "eval_every"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """Every value, defaults included, in plain JSON types: what `--dry-run` prints."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """`to_dict` as a recipe file that gives this recipe again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and lay `section.key=value` over it, values in YAML. Raises UserError on any mistake.

    Steps, epochs or minutes take the place of whichever of them the file says.
    """
    said: dict[str, Any] = {}
    for override in overrides:
        said = _override(said, override)
    if any(said.get(name) is not None for name in LENGTHS):
        overrides = [*(f"{name}=null" for name in LENGTHS), *overrides]
    return load(Recipe, path, overrides)


def load(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """`load_recipe` for any dataclass of plain values."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The recipe {path} is no text in UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    for override in overrides:
        values = _override(values, override)
    return read(kind, values, RECIPE)


def read_recipe(values: Any) -> Recipe:
    """A recipe from plain values; raises UserError on unknown keys, wrong types and missing values."""
    return read(Recipe, values, RECIPE)


def _override(values: Any, override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"An override is written section.key=value; {override!r} is not.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"The value in {override!r} is not valid YAML.") from None
    return _laid(values, key.split("."), value)


def _laid(values: Any, path: list[str], value: Any) -> dict[str, Any]:
    values = dict(values) if isinstance(values, Mapping) else {}
    first, *rest = path
    values[first] = _laid(values.get(first), rest, value) if rest else value
    return values
