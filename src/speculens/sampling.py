"""From logits to the chosen token: the only definition of the output distribution.

Greedy takes the argmax of the processed logits. Sampling takes the argmax of processed logits plus Gumbel noise, which
is one exact draw from their softmax (Gumbel-max). The noise of output position t depends only on (seed, t, token), so
the same seed gives the same tokens with any drafter and with none.

Logits are cast to float32 before processing, as Hugging Face's `generate` does. The warpers are Hugging Face's number
for number (tests compare them), but take their settings from the device, so that rows of any settings share one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from speculens.errors import UserError
from speculens.tree import DraftTree

# Processors that carry state from call to call, or run a model of their own, would see the nodes of a tree as one
# history. They cannot be honoured per node, so they are refused by name.
STATEFUL_PROCESSORS = frozenset({
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
})  # fmt: skip


COLDEST = 1e-5  # divided by less, logits would overflow; vLLM draws the same line
TOP_K_ROOMS = (64, 1024, 1 << 31)  # few, for each makes a step of its own kind, which is recorded apart


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. The defaults are greedy decoding.

    temperature           0 is greedy (argmax), and so is what lies below COLDEST
    top_k, top_p, min_p   as in Hugging Face; 0, 1 and 0 switch them off. Ignored when greedy, as there
    repetition_penalty    1 is off; counts prompt and output, and each tree node's own ancestors
    no_repeat_ngram_size  0 is off
    max_new_tokens        exact upper bound of emitted tokens
    seed                  the same seed gives the same text, whatever the drafter
    stop                  stop strings: the text ends with the token that completes one
    ignore_eos            go on after end-of-sequence tokens (for measuring)
    logprobs              report each emitted token's log-probability and those of so many likeliest; None reports none
    processors            further stateless Hugging Face logits processors, run node by node before the warpers
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    processors: tuple[LogitsProcessor, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        wrong = [
            message
            for bad, message in (
                (not 0 <= self.temperature < float("inf"), f"temperature must be 0 or more, not {self.temperature}"),
                (not 0 <= self.top_k < 1 << 31, f"top_k must be 0 (off) or more, below 2^31, not {self.top_k}"),
                (not 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
                (not 0 <= self.min_p <= 1, f"min_p must be in [0, 1], not {self.min_p}"),
                (not self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}"),
                (
                    self.no_repeat_ngram_size < 0,
                    f"no_repeat_ngram_size must be 0 or more, not {self.no_repeat_ngram_size}",
                ),
                (self.max_new_tokens < 1, f"max_new_tokens must be 1 or more, not {self.max_new_tokens}"),
                (not -(1 << 63) <= self.seed < 1 << 63, f"seed must fit in 64 bits, signed, not {self.seed}"),
                (isinstance(self.stop, str), "stop must be several strings, not one: write (text,)"),
                (any(not text for text in self.stop), "a stop string must not be empty"),
                (self.logprobs is not None and self.logprobs < 0, f"logprobs must be 0 or more, not {self.logprobs}"),
            )
            if bad
        ]
        wrong += [
            f"{type(processor).__name__} keeps state between calls and cannot be applied to a tree"
            for processor in self.processors
            if STATEFUL_PROCESSORS.intersection(kind.__name__ for kind in type(processor).__mro__)
        ]
        if wrong:
            raise UserError(f"{'; '.join(wrong)}.")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def needs_history(self) -> bool:
        """Whether the choice at a node depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0 or bool(self.processors)

    @property
    def corrections(self) -> Sampling:
        """The same with nothing but what depends on the past: slots of one kind are corrected together."""
        return Sampling(
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            processors=self.processors,
        )


@dataclass(frozen=True)
class Logprob:
    """How likely an emitted token was, and the likeliest ones in its place: pairs of token and log-probability."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Needs:
    """Which work a batch of settings asks for, known to the host: the rest is left out of the pass.

    draws  some row samples
    top_k  room for the largest top_k of any row that samples, one of TOP_K_ROOMS; 0 where none filters by it
    top_p, min_p  some row that samples filters by it
    logprobs  some row wants to be told how likely its tokens were
    """

    draws: bool = False
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    logprobs: bool = False

    @staticmethod
    def of(samplings: Sequence[Sampling]) -> Needs:
        """What these settings need together."""
        drawn = [sampling for sampling in samplings if sampling.temperature > 0]
        largest = max((sampling.top_k for sampling in drawn), default=0)
        return Needs(
            draws=bool(drawn),
            top_k=next(room for room in (0, *TOP_K_ROOMS) if largest <= room),
            top_p=any(sampling.top_p < 1 for sampling in drawn),
            min_p=any(sampling.min_p > 0 for sampling in drawn),
            logprobs=any(sampling.logprobs is not None for sampling in samplings),
        )


@dataclass(frozen=True)
class Laws:
    """The settings of B rows as numbers on the device, so that one graph serves them all.

    seed         (B,) long
    draws        (B,) bool, False where greedy
    temperature  (B,) float32, 1 where greedy
    top_k        (B,) long, the vocabulary's size or more where it is off
    top_p        (B,) float32, the mass that is cut off, below 0 where it is off
    min_p        (B,) float32
    """

    seed: Tensor
    draws: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def of(samplings: Sequence[Sampling], device: torch.device) -> Laws:
        """One row for each."""
        kinds = (torch.long, torch.bool, torch.float32, torch.long, torch.float32, torch.float32)
        columns = zip(*map(_numbers, samplings), strict=True)
        return Laws(
            *(torch.tensor(column, dtype=kind, device=device) for column, kind in zip(columns, kinds, strict=True))
        )

    def put(self, row: int, sampling: Sampling) -> None:
        """Write one row, in place. Nothing waits for the device, as it would if a number were assigned."""
        for part, number in zip(self.parts, _numbers(sampling), strict=True):
            part[row].fill_(number)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.seed, self.draws, self.temperature, self.top_k, self.top_p, self.min_p

    def rows(self, which: slice) -> Laws:
        """Views of some of the rows."""
        return Laws(*(part[which] for part in self.parts))


_EVERYTHING = 1 << 62  # as top_k: no vocabulary has more


def _numbers(sampling: Sampling) -> tuple[int | bool | float, ...]:
    """One row of `Laws`."""
    if sampling.temperature == 0:
        return sampling.seed, False, 1.0, _EVERYTHING, -1.0, 0.0
    cut = 1 - sampling.top_p if sampling.top_p < 1 else -1.0
    return sampling.seed, True, sampling.temperature, sampling.top_k or _EVERYTHING, cut, sampling.min_p


def choose(logits: Tensor, tree: DraftTree, laws: Laws, needs: Needs, position: Tensor) -> Tensor:
    """The target's own next token at every node: (B, N) long. No host read.

    logits    (B, N, V) of any float dtype, already corrected where a row's settings look at the past (`correct`)
    tree      the B trees; the token wanted at a node of depth d is output number `position + d`
    position  (B,) long, output number (from 0) of the token wanted at the root
    """
    logits = logits if logits.dtype in _EXACT_IN_FLOAT and not needs.draws else logits.float()
    if not needs.draws:
        return logits.argmax(-1)
    scores = warp(logits, laws, needs)
    # Nodes of one depth guess the same output position, so they share its noise.
    positions = position[:, None] + torch.arange(tree.levels + 1, device=logits.device)
    noise = gumbel(laws.seed[:, None], positions, logits.shape[-1]) * laws.draws[:, None, None]
    # Row by row: a batch of float64 scores over a large vocabulary would be gigabytes.
    rows = zip(scores, noise, tree.depth, strict=True)
    return torch.stack([(own + drawn[depth]).argmax(-1) for own, drawn, depth in rows])


_EXACT_IN_FLOAT = (torch.float32, torch.bfloat16, torch.float16)  # the cast changes no order


def warp(scores: Tensor, laws: Laws, needs: Needs) -> Tensor:
    """Temperature, top-k, top-p and min-p of each row, (B, N, V) float32: Hugging Face's warpers, number for number."""
    scores = scores / laws.temperature[:, None, None]
    if needs.top_k:
        largest = scores.topk(min(needs.top_k, scores.shape[-1])).values
        place = (laws.top_k - 1)[:, None, None].expand(-1, scores.shape[1], 1)
        least = largest.gather(2, place.clamp(max=largest.shape[-1] - 1))
        filters = (laws.top_k < scores.shape[-1])[:, None, None]
        scores = scores.masked_fill((scores < least) & filters, -torch.inf)
    if needs.top_p:
        rising = scores.sort(-1)
        cut = rising.values.softmax(-1).cumsum(-1) <= laws.top_p[:, None, None]
        cut[..., -1:].fill_(False)
        scores = scores.masked_fill(cut.scatter(-1, rising.indices, cut), -torch.inf)
    if needs.min_p:
        likely = scores.softmax(-1)
        scores = scores.masked_fill(likely < laws.min_p[:, None, None] * likely.amax(-1, keepdim=True), -torch.inf)
    return scores


def likelihoods(logits: Tensor, sampling: Sampling, tokens: Sequence[int]) -> tuple[Logprob, ...]:
    """Log-probabilities of one slot's emitted tokens under the distribution they were chosen from; none if not asked.

    Greedy choices are measured by the softmax of the corrected logits.

    logits  (n, V), n at least the number of tokens, corrected as for `choose`; row i is where token i was chosen
    """
    if sampling.logprobs is None:
        return ()
    laws, needs = Laws.of([sampling], logits.device), Needs.of([sampling])
    scores = warp(logits[None, : len(tokens)].float(), laws, needs)[0].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(sampling.logprobs, scores.shape[-1]))
    rows = zip(tokens, chosen, ids.tolist(), values.tolist(), strict=True)
    return tuple(Logprob(token, value, tuple(zip(top, tops, strict=True))) for token, value, top, tops in rows)


def correct(logits: Tensor, tree: DraftTree, samplings: Sequence[Sampling], history: Sequence[Sequence[int]]) -> Tensor:
    """Apply penalty, n-grams and further processors to (B, N, V) logits, in Hugging Face's order.

    history  per slot the committed token ids before the root, prompt included; read only if its settings need it
    """
    kinds: dict[Sampling, list[int]] = {}
    for slot, sampling in enumerate(samplings):
        if sampling.needs_history:
            kinds.setdefault(sampling.corrections, []).append(slot)
    logits = logits.float()
    if kinds:
        logits = logits.clone()
    for kind, slots in kinds.items():
        rows = torch.tensor(slots, device=logits.device)
        logits[rows] = _corrected(logits[rows], kind, tree.rows(rows), [history[slot] for slot in slots])
    return logits


def _corrected(logits: Tensor, sampling: Sampling, tree: DraftTree, history: Sequence[Sequence[int]]) -> Tensor:
    tokens, lengths = node_histories(tree, history)
    if sampling.repetition_penalty != 1.0:
        logits = _repetition_penalty(logits, tokens, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        logits = _forbid_repeats(logits, tokens, lengths, sampling.no_repeat_ngram_size)
    if sampling.processors:
        logits = _node_by_node(logits, tokens, lengths, sampling.processors)
    return logits


def gumbel(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise (..., vocab) in float64, a pure function of seed (...), position (...) and token id.

    A counter-based generator (two rounds of the splitmix64 finaliser, Steele et al. 2014) needs no state, so the
    noise of a position is the same in whatever order, batch or tree it is asked for.
    """
    stream = _mix(_mix(seed.long() + _GOLDEN) ^ (position * _GOLDEN))
    token = torch.arange(1, vocab + 1, device=stream.device)
    uniform = _uniform(_mix(_mix(stream[..., None] + token * _GOLDEN)))
    return -torch.log(-torch.log(uniform))


def _uniform(bits: Tensor) -> Tensor:
    """64 random bits -> a float64 strictly between 0 and 1: an infinite noise would make impossible tokens possible.

    52 bits, not 53: the half that keeps 0 away would round the largest of 53 up to 1.
    """
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit integers, which wrap around


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def node_histories(tree: DraftTree, history: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Each node's full history: committed tokens, then its own line from the root to itself.

    Returns tokens (B, N, T), padded on the right with -1, and lengths (B, N).
    """
    device = tree.tokens.device
    committed = torch.tensor([len(past) for past in history], device=device)
    width = int(max(len(past) for past in history))
    lines = tree.lines()
    rows = torch.full((len(history), width + lines.shape[2]), -1, device=device)
    for slot, past in enumerate(history):
        rows[slot, : len(past)] = torch.as_tensor(past, device=device)
    tokens = rows[:, None].repeat(1, tree.size, 1)
    line_tokens = (
        tree.tokens[:, None].expand(-1, tree.size, -1).gather(2, lines.clamp(min=0)).masked_fill(lines < 0, -1)
    )
    column = committed[:, None, None] + torch.arange(lines.shape[2], device=device)
    tokens.scatter_(2, column.expand_as(lines), line_tokens)
    return tokens, committed[:, None] + tree.depth + 1


def _repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Hugging Face's own penalty. It counts each token once, so padding with a token of the history is harmless."""
    ids = torch.where(tokens < 0, tokens[..., :1], tokens)
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids.flatten(0, 1), logits.flatten(0, 1))
    return scores.view_as(logits)


def _forbid_repeats(logits: Tensor, tokens: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Forbid, at each node, every token that would repeat an n-gram of its own history."""
    if tokens.shape[2] < size:
        return logits
    grams = tokens.unfold(2, size, 1)  # (B, N, T - size + 1, size)
    tail = lengths[..., None] - size + 1 + torch.arange(size - 1, device=tokens.device)
    suffix = tokens.gather(2, tail.clamp(min=0))
    repeats = (grams[..., :-1] == suffix[:, :, None]).all(-1) & (grams[..., -1] >= 0)
    repeats &= (lengths >= size)[..., None]
    banned = torch.zeros_like(logits, dtype=torch.int8)
    banned.scatter_reduce_(2, grams[..., -1].clamp(min=0), repeats.to(torch.int8), reduce="amax")
    return logits.masked_fill(banned.bool(), -float("inf"))


def _node_by_node(logits: Tensor, tokens: Tensor, lengths: Tensor, processors: Sequence[LogitsProcessor]) -> Tensor:
    scores = logits.clone()
    for slot, row in enumerate(lengths.tolist()):
        for node, length in enumerate(row):
            ids = tokens[slot, node, :length][None]
            for processor in processors:
                scores[slot, node] = processor(ids, scores[slot, node][None])[0]
    return scores
