"""Each measure by its definition, on passes counted by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculens.stats import Stats

# Tokens emitted, drafted tokens kept, drafted nodes. The third pass was cut before its bonus token.
PASSES = [(3, 2, 9), (1, 0, 9), (2, 2, 5), (4, 3, 9)]


def counted(passes):
    stats = Stats()
    for one in passes:
        stats.add_pass(*one)
    return stats


def test_measures_of_passes_counted_by_hand():
    stats = counted(PASSES)
    assert (stats.num_drafts, stats.num_tokens) == (4, 10)
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (32, 7)
    assert stats.mean_acceptance_length == 10 / 4  # bonus included
    assert stats.mean_accepted_tokens == 7 / 4  # bonus excluded
    assert stats.acceptance_rate_per_position == [3 / 4, 3 / 4, 1 / 4]
    assert stats.acceptance_histogram == [1, 0, 2, 1]


def test_no_pass_gives_zeros_and_no_division():
    stats = Stats()
    assert (stats.mean_acceptance_length, stats.mean_accepted_tokens, stats.draft_time_fraction) == (0, 0, 0)
    assert stats.acceptance_rate_per_position == []
    assert stats.acceptance_histogram == [0]


one_pass = st.integers(0, 6).map(lambda kept: (kept + 1, kept, 8))
passes = st.lists(one_pass, max_size=9)


@given(passes)
def test_figures_agree_with_each_other(counts):
    stats = counted(counts)
    assert sum(stats.acceptance_histogram) == stats.num_drafts
    assert sum(i * n for i, n in enumerate(stats.acceptance_histogram)) == stats.num_accepted_tokens
    assert stats.mean_acceptance_length == pytest.approx(stats.mean_accepted_tokens + bool(counts))
    assert sum(stats.acceptance_rate_per_position) == pytest.approx(stats.mean_accepted_tokens)


@given(st.lists(passes, max_size=4))
def test_pooling_runs_is_counting_all_their_passes(runs):
    pooled = Stats.total(counted(run) for run in runs)
    assert pooled == counted([one for run in runs for one in run])


def test_pooling_adds_seconds_and_changes_no_part():
    one, other = counted(PASSES), counted(PASSES[:1])
    one.add_seconds("draft", 1.0)
    one.add_seconds("draft", 0.5)
    other.add_seconds("score", 2.0)
    assert Stats.total([one, other]).seconds == {"draft": 1.5, "score": 2.0}
    assert (one.num_drafts, other.num_drafts) == (4, 1)


def test_draft_time_is_a_share_of_decoding_without_prefill():
    stats = Stats()
    for part, seconds in {"prefill": 50.0, "draft": 1.0, "observe": 1.0, "score": 5.0, "choose": 1.0}.items():
        stats.add_seconds(part, seconds)
    assert stats.draft_time_fraction == 2 / 8
    stats.add_seconds("step", 1.0)  # one graph: nobody sees what the drafter takes of it
    assert stats.draft_time_fraction is None


def test_prefill_ratio_is_of_rows_pooled():
    one, other = Stats(), Stats()
    one.add_prompt(300, 256)
    one.add_view(44, {"operator": ["none"]})
    other.add_prompt(100, 0)
    other.add_view(100, {})
    pooled = Stats.total([one, other])
    assert (pooled.num_prompt_tokens, pooled.num_visual_tokens) == (400, 256)
    assert pooled.drafter_prefill_ratio == 144 / 400
    assert pooled.drafter_notes == {"operator": ["none"]}
    assert (one.drafter_prefill_ratio, Stats().drafter_prefill_ratio) == (44 / 300, 0)


def test_json_has_the_names_of_the_measures():
    written = json.loads(json.dumps(counted(PASSES).to_dict()))
    assert set(written) == {
        "mean_acceptance_length",
        "mean_accepted_tokens",
        "acceptance_rate_per_position",
        "acceptance_histogram",
        "num_prompt_tokens",
        "num_visual_tokens",
        "num_drafter_rows",
        "drafter_prefill_ratio",
        "num_drafts",
        "num_tokens",
        "num_draft_tokens",
        "num_accepted_tokens",
        "draft_time_fraction",
        "seconds",
        "drafter_notes",
    }
