"""What the exactness tests rest on: Hugging Face's own `generate` as the reference, and a drafter that knows it.

Drafters of random weights almost never have a token accepted, so a loop that is wrong about accepted paths would pass
with them. `OracleDrafter` knows the right text and hides it in wide random trees among wrong siblings.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import tiny
from speculens.drafters import DrafterConfig, EagleDrafter, LookupDrafter, NoDrafter
from speculens.drafters.base import Drafter, Lender
from speculens.engine import Engine
from speculens.features import Features
from speculens.sampling import Sampling
from speculens.slot import Generation, Step
from speculens.targets import Prompt, Target
from speculens.tree import DraftTree, TreeShape

CAPACITY = 320  # rows: the longest prompt here and its output
FORESIGHT = 40  # tokens that the oracle knows: more than is ever asked for, so that cuts fall inside accepted paths
DRAFTERS = ("none", "lookup", "eagle", "oracle")


class NotExactError(AssertionError):
    """The engine's tokens are not the target's own."""


@dataclass(frozen=True)
class Ask:
    """One request: how many pictures and turns, and which (`tiny.conversation`)."""

    images: int = 1
    turns: int = 1
    seed: int = 0


@functools.cache
def target(family: str) -> Target:
    return Target(tiny.model(family), tiny.processor(family))


@functools.cache
def prompt(family: str, ask: Ask) -> Prompt:
    inputs, image = tiny.prompt_inputs(family, ask.images, ask.turns, ask.seed)
    return Prompt(inputs["input_ids"][0], fitted(family, inputs), image)


def fitted(family: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in the model's dtype, as `generate` needs them."""
    dtype = tiny.model(family).dtype
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def reference(family: str, ask: Ask, sampling: Sampling, eos: tuple[int, ...] = ()) -> list[int]:
    """What Hugging Face's greedy `generate` emits under these settings; `eos` replaces the model's own end tokens."""
    length = max(sampling.max_new_tokens, FORESIGHT)
    return list(_generated(family, ask, replace(sampling, max_new_tokens=length), eos))[: sampling.max_new_tokens]


@functools.cache
def _generated(family: str, ask: Ask, sampling: Sampling, eos: tuple[int, ...]) -> tuple[int, ...]:
    words = tiny.tokenizer(family)
    settings = dict(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        eos_token_id=list(eos) or words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    if sampling.stop:
        settings |= dict(stop_strings=list(sampling.stop), tokenizer=words)
    asked = prompt(family, ask)
    ids = tiny.model(family).generate(**asked.inputs, **settings)
    return tuple(ids[0, len(asked) :].tolist())


def oracle(family: str, asks: Sequence[Ask], samplings: Sequence[Sampling], **habits: float) -> "OracleDrafter":
    """An oracle for these greedy requests; `habits` are its other arguments."""
    script = [
        (prompt(family, ask).ids.tolist(), reference(family, ask, replace(sampling, max_new_tokens=FORESIGHT, stop=())))
        for ask, sampling in zip(asks, samplings, strict=True)
    ]
    return OracleDrafter(script, **habits)


@functools.cache
def random_eagle(family: str, seed: int = 0) -> EagleDrafter:
    """An EAGLE head of random weights, with a small tree."""
    made_for = target(family)
    config = DrafterConfig(
        speculator_type="eaglevlm",
        target_hidden_size=made_for.hidden_size,
        target_vocab_size=made_for.vocab_size,
        target_family=made_for.family,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tree=TreeShape(num_steps=2, topk=3, num_draft_tokens=9),
    )
    drafter = EagleDrafter(config).to(made_for.dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in drafter.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    return drafter


def drafter(name: str, family: str, asks: Sequence[Ask], samplings: Sequence[Sampling]) -> Drafter:
    """One of DRAFTERS, ready for these greedy requests."""
    makers: dict[str, Callable[[], Drafter]] = {
        "none": NoDrafter,
        "lookup": LookupDrafter,
        "eagle": lambda: random_eagle(family),
        "oracle": lambda: oracle(family, asks, samplings),
    }
    return makers[name]()


def assert_exact(
    family: str,
    guesser: Drafter,
    asks: Sequence[Ask],
    samplings: Sequence[Sampling],
    *,
    slots: int = 2,
    eos: tuple[int, ...] = (),
) -> list[Generation]:
    """Decode all requests over the slots and compare each token with Hugging Face's; raises NotExactError."""
    engine = Engine(target(family), guesser, slots=slots, capacity=CAPACITY)
    got = engine.generate_all([prompt(family, ask) for ask in asks], samplings)
    for ask, sampling, generation in zip(asks, samplings, got, strict=True):
        compare(generation.tokens, reference(family, ask, sampling, eos), f"{family}, {guesser.name}, {ask}")
    return got


def compare(tokens: Sequence[int], wanted: Sequence[int], where: str = "") -> None:
    """Raise NotExactError with the first divergence."""
    if list(tokens) == list(wanted):
        return
    pairs = zip(tokens, wanted, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(wanted)))
    raise NotExactError(
        f"{where}: {len(tokens)} tokens for {len(wanted)}; from token {first} on "
        f"{list(tokens[first : first + 5])} instead of {list(wanted[first : first + 5])}"
    )


def pooled_acceptance(generations: Sequence[Generation]) -> float:
    """Tokens per target pass over several generations."""
    return sum(g.stats.num_tokens for g in generations) / sum(g.stats.num_drafts for g in generations)


class OracleDrafter:
    """Drafts random trees that hold the right continuation, level by level, with probability `right`.

    script  pairs of prompt ids and the text that follows them; of several with one prompt, the oracle believes the one
            that agrees longest with what was emitted
    size    largest tree; levels is its largest depth, drawn anew for each tree
    """

    name = "oracle"

    def __init__(
        self,
        script: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        right: float = 0.9,
        size: int = 28,
        levels: int = 6,
        seed: int = 0,
    ) -> None:
        self.script = [(list(ids), list(text)) for ids, text in script]
        self.right, self.size, self.levels, self.seed = right, size, levels, seed

    def session(self, lender: Lender, slots: int, capacity: int, shape: TreeShape | None = None) -> "_OracleSession":
        return _OracleSession(self, lender.vocab_size)

    def describe(self) -> dict[str, str]:
        return {"drafter": self.name}


@dataclass
class _Known:
    """What one slot has emitted, and the texts that may be its own."""

    texts: list[list[int]]
    tokens: list[int]

    def future(self) -> list[int]:
        if not self.texts:
            return []
        best = max(self.texts, key=lambda text: _common(text, self.tokens))
        return best[len(self.tokens) :]


@dataclass
class _Trie:
    """One slot's draft, node 0 the root. `right` marks the nodes that the oracle believes in."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depth: list[int] = field(default_factory=lambda: [0])
    right: list[bool] = field(default_factory=lambda: [True])

    def add(self, token: int, parent: int, right: bool) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.right.append(right)

    def shuffled(self, rng: random.Random) -> "_Trie":
        """The same tree with its nodes in another order, parents still before their children."""
        rank = [0.0]
        for parent in self.parents[1:]:
            rank.append(rank[parent] + rng.random())
        order = sorted(range(len(rank)), key=rank.__getitem__)
        place = {node: i for i, node in enumerate(order)}
        return _Trie(
            [self.tokens[n] for n in order],
            [place[self.parents[n]] for n in order],
            [self.depth[n] for n in order],
            [self.right[n] for n in order],
        )


class _OracleSession:
    def __init__(self, habits: OracleDrafter, vocab: int) -> None:
        self.habits, self.vocab, self.nodes = habits, vocab, habits.size + 4
        self.state, self.nbytes = None, 0
        self._slots: list[_Known] = []

    def begin(self, features: Features, first: Tensor) -> None:
        ids = features.tokens[0].tolist()
        self._slots.append(_Known([text for known, text in self.habits.script if known == ids], [int(first)]))

    def draft(self, roots: Tensor, shape: TreeShape | None = None, horizon: int = 0) -> DraftTree:
        rng = random.Random(f"{self.habits.seed} {[slot.tokens for slot in self._slots]}")
        tries = [self._grow(slot, rng) for slot in self._slots]
        size = max(len(trie.tokens) for trie in tries) + rng.randrange(3)
        columns: list[list[list[int]]] = [[], [], [], []]
        for trie, slot in zip(tries, self._slots, strict=True):
            spare = size - len(trie.tokens)
            lure = (slot.future() or [0])[0]  # padding that looks right must not be accepted
            for column, values, padding in zip(
                columns,
                (trie.tokens, trie.parents, trie.depth, [1] * len(trie.tokens)),
                (lure, 0, 1, 0),
                strict=True,
            ):
                column.append(values + [padding] * spare)
        tokens, parents, depth, live = torch.tensor(columns)
        deepest = int(depth.max()) + rng.randrange(2)  # `levels` is a bound
        return DraftTree.build(tokens, parents, depth, live.bool(), deepest)

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor, horizon: int = 0) -> None: ...

    def settle(self, accepted: Sequence[Sequence[int]]) -> None:
        for slot, tokens in zip(self._slots, accepted, strict=True):
            slot.tokens += tokens

    def free(self, row: int) -> None:
        last = self._slots.pop()
        if row < len(self._slots):
            self._slots[row] = last

    def _grow(self, slot: _Known, rng: random.Random) -> _Trie:
        future, trie, habits = slot.future(), _Trie([slot.tokens[-1]]), self.habits
        levels = rng.randint(1, habits.levels)
        node = 0
        while node < len(trie.tokens) and len(trie.tokens) < habits.size - 3:
            depth = trie.depth[node]
            if depth < levels:
                hope = future[depth : depth + 1] if trie.right[node] else []
                children = {self._wrong(slot, rng) for _ in range(rng.randrange(3))}.difference(hope)
                children.update(token for token in hope if rng.random() < habits.right)
                for token in rng.sample(sorted(children), len(children)):
                    trie.add(token, node, token in hope)
            node += 1
        return trie.shuffled(rng)

    def _wrong(self, slot: _Known, rng: random.Random) -> int:
        """Some token: often one of the text's own, which a loop that forgets about ancestors would take."""
        own = [token for text in slot.texts for token in text]
        return rng.choice(own) if own and rng.random() < 0.5 else rng.randrange(self.vocab)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def steps(family: str, guesser: Drafter, ask: Ask, sampling: Sampling) -> list[Step]:
    """One request, step by step."""
    return list(Engine(target(family), guesser, capacity=CAPACITY).stream(prompt(family, ask), sampling))
