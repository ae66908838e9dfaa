"""SlotCache against a model of it in plain lists: every row must hold what was committed to it, and nothing else."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from speculens.cache import SlotCache

SLOTS, CAPACITY, LAYERS, HEADS, DIM = 3, 24, 2, 2, 3
CPU = torch.device("cpu")


def new_cache(devices=(CPU,) * LAYERS):
    return SlotCache(slots=SLOTS, capacity=CAPACITY, heads=HEADS, head_dim=DIM, dtype=torch.float64, devices=devices)


def states(marks, layer, which):
    """(B, HEADS, n, DIM) whose numbers name column, layer, kind, head and dimension."""
    base = torch.tensor(marks, dtype=torch.float64)[:, None, :, None] * 1000 + layer * 100 + which * 50
    inner = torch.arange(HEADS * DIM).view(1, HEADS, 1, DIM)
    return base + inner


class CacheModel(RuleBasedStateMachine):
    """Each row is a list of marks, one for a committed column."""

    def __init__(self):
        super().__init__()
        self.cache = new_cache()
        self.rows = []
        self.next_mark = 1

    def _room(self, columns):
        """Whether every running row can take so many more, as far as the host knows."""
        return self.rows and max(self.cache.extents[: len(self.rows)]) + columns <= CAPACITY

    def _write(self, rows, width, start=0):
        """Write fresh marks to these rows in every layer; return them and the last read."""
        marks = [[self.next_mark + i * width + j for j in range(width)] for i in range(len(rows))]
        self.next_mark += len(rows) * width
        self.cache.aim(rows, width, start)
        reads = [self.cache.write(layer, states(marks, layer, 0), states(marks, layer, 1)) for layer in range(LAYERS)]
        return marks, reads

    @precondition(lambda self: len(self.rows) < SLOTS)
    @rule(length=st.integers(1, 6))
    def admit(self, length):
        row = self.cache.admit()
        assert row == len(self.rows)
        marks, reads = self._write(range(row, row + 1), length)
        assert torch.equal(reads[0][0], states(marks, 0, 0))  # a prefill reads itself and no neighbour
        self.cache.commit(length)
        self.cache.settle([length], row)
        self.rows.append(marks[0])

    @precondition(lambda self: len(self.rows) < SLOTS)
    @rule()
    def fail_in_prefill(self):
        row = self.cache.admit()
        self._write(range(row, row + 1), 3)
        self.cache.free(row)

    @precondition(lambda self: self._room(5))
    @rule(data=st.data(), nodes=st.integers(1, 5))
    def score_and_keep(self, data, nodes):
        marks, reads = self._write(range(len(self.rows)), nodes)
        for layer, read in enumerate(reads):
            for which, values in enumerate(read):
                for row, (kept, new) in enumerate(zip(self.rows, marks, strict=True)):
                    expected = states([kept + new], layer, which)[0]
                    assert torch.equal(values[row, :, : len(kept) + nodes], expected)
        width = data.draw(st.integers(1, nodes))
        paths, counts = [], []
        for _ in self.rows:
            # A path is ascending where it counts (parents come first); what follows is arbitrary.
            count = data.draw(st.integers(1, width))
            path = sorted(data.draw(st.permutations(range(nodes)))[:count])
            rest = [node for node in range(nodes) if node not in path]
            paths.append(path + rest[: width - count])
            counts.append(count)
        self.cache.keep(torch.tensor(paths), torch.tensor(counts))
        for row, (path, count) in enumerate(zip(paths, counts, strict=True)):
            self.rows[row] += [marks[row][node] for node in path[:count]]
        self.cache.settle(counts)

    @precondition(lambda self: self._room(8))
    @rule(start=st.integers(0, 4), width=st.integers(1, 4))
    def draft_in_scratch(self, start, width):
        """Writes above the committed columns that are never committed."""
        self._write(range(len(self.rows)), width, start)

    @precondition(lambda self: self._room(5))
    @rule(data=st.data(), width=st.integers(1, 5))
    def commit_beginnings(self, data, width):
        marks, _ = self._write(range(len(self.rows)), width)
        counts = [data.draw(st.integers(1, width)) for _ in self.rows]
        self.cache.commit(torch.tensor(counts))
        self.cache.settle(counts)
        for row, count in enumerate(counts):
            self.rows[row] += marks[row][:count]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.free(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last

    @invariant()
    def rows_hold_what_was_committed(self):
        assert self.cache.running == len(self.rows)
        assert self.cache.lengths[: len(self.rows)].tolist() == [len(row) for row in self.rows]
        assert self.cache.extents == [*map(len, self.rows), *[0] * (SLOTS - len(self.rows))]
        for row, kept in enumerate(self.rows):
            self.cache.aim(range(row, row + 1), 0)
            for layer in range(LAYERS):
                nothing = torch.zeros(1, HEADS, 0, DIM, dtype=torch.float64)
                keys, values = self.cache.write(layer, nothing, nothing)
                assert torch.equal(keys[:, :, : len(kept)], states([kept], layer, 0))
                assert torch.equal(values[:, :, : len(kept)], states([kept], layer, 1))


TestCacheModel = CacheModel.TestCase
TestCacheModel.settings = settings(max_examples=100, stateful_step_count=20)


def test_all_memory_is_held_from_the_start():
    cache = new_cache()
    assert cache.nbytes == LAYERS * 2 * SLOTS * CAPACITY * HEADS * DIM * 8


def test_one_row_too_many_is_an_error():
    cache = new_cache()
    for _ in range(SLOTS):
        cache.admit()
    with pytest.raises(RuntimeError, match="3 slots"):
        cache.admit()


def test_overflow_is_an_error_with_both_numbers():
    cache = new_cache()
    cache.admit()
    cache.aim(range(1), CAPACITY)
    with pytest.raises(RuntimeError, match=f"{CAPACITY + 1} columns asked, {CAPACITY} held"):
        cache.aim(range(1), CAPACITY + 1)


def test_states_of_another_geometry_are_an_error():
    cache = new_cache()
    cache.admit()
    cache.aim(range(1), 1)
    wrong = torch.zeros(1, HEADS + 1, 1, DIM)
    with pytest.raises(RuntimeError, match=f"{HEADS + 1} KV heads"):
        cache.write(0, wrong, wrong)


def test_transformers_sees_one_layer_for_each_of_ours():
    cache = new_cache()
    cache.admit()
    cache.aim(range(1), 4)
    theirs = cache.as_transformers()
    keys, values = theirs.update(states([[1, 2, 3, 4]], 1, 0), states([[1, 2, 3, 4]], 1, 1), 1)
    assert torch.equal(keys, states([[1, 2, 3, 4]], 1, 0))
    assert torch.equal(values, states([[1, 2, 3, 4]], 1, 1))
    assert (theirs.get_seq_length(), theirs.get_mask_sizes(4, 0)) == (0, (4, 0))
    cache.commit(4)
    cache.settle([4])
    cache.aim(range(1), 2)
    assert len(theirs.layers) == LAYERS
    assert (theirs.get_seq_length(), theirs.get_mask_sizes(2, 0)) == (4, (6, 0))
    assert theirs.get_max_length() == CAPACITY
