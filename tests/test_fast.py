"""What of the speed table can be tested without a GPU: a dry run, figures from kernels, and that time runs out."""

import json
import sys

import pytest
import torch
from benchmarks import fast, memory

from speculens import load_drafter, load_target
from speculens.errors import UserError


def test_a_dry_run_ends_in_one_line_of_json(monkeypatch, capsys, tmp_path):
    words = ["--target", "testbed/weights/llava", "--drafters", "testbed/weights/llava-eaglevlm"]
    words += ["--tiny", "--parts", "memory", "--long-pictures", "1", "--tree", "1", "2", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fast", *words])
    fast.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["setting"]["fused"]
    kept = results["memory"]["kv_bytes"]
    assert 0 < kept["none"]["promised"] < kept["llava-eaglevlm"]["promised"]
    saved = json.loads((tmp_path / "memory.json").read_text())
    assert saved == results["setting"] | results["memory"]


def test_a_queue_is_served_to_its_end(monkeypatch, capsys):
    words = ["--target", "testbed/weights/llava", "--drafters", "testbed/weights/llava-eaglevlm"]
    words += ["--tiny", "--parts", "queue", "--long-pictures", "1"]
    monkeypatch.setattr(sys, "argv", ["fast", *words])
    monkeypatch.setitem(fast.PARTS, "queue", lambda setup: fast.measure_queue(setup, slots=2, each=2))
    fast.main()
    queue = json.loads(capsys.readouterr().out.splitlines()[-1])["queue"]
    assert (queue["slots"], queue["requests"]) == (2, 4)
    speeds = queue["tokens_per_second"]
    assert queue["on_over_off"] == pytest.approx(speeds["drafted"] / speeds["none"])
    assert all(0 < cuts["median"] <= cuts["of_20_the_longest"] for cuts in queue["step_ms"].values())


def test_a_peak_leaves_out_weights_that_only_lie_there(monkeypatch):
    idle = torch.nn.Linear(10, 5, dtype=torch.float16)
    used = []
    for name, answer in {"empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 1000}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert memory.peak(torch.device("cuda"), [idle], lambda: used.append(1)) == 1000 - 2 * (10 * 5 + 5)
    assert memory.peak(torch.device("cpu"), [idle], lambda: used.append(2)) is None
    assert used == [1, 2]


def test_the_hosts_share_of_an_undisturbed_step_is_what_the_device_leaves():
    profile = {"kernels_ms": 5.5, "short_rests_ms": 0.25, "host_ms": 1.0, "host_share": 0.15}
    assert fast.undisturbed(profile, 6.25) == {"host_share_undisturbed": pytest.approx(0.08)}
    assert fast.undisturbed(profile, 5.7) == {"host_share_undisturbed": 0.0}
    assert fast.undisturbed({}, 6.25) == {}


def test_rests_between_kernels_are_the_hosts_if_they_are_long():
    """Two steps: kernels that overlap, one that follows at once, and a wait of 40 microseconds."""
    found = fast.kernels_and_rests([("b", 8.0, 20.0), ("a", 0.0, 10.0), ("a", 22.0, 30.0), ("b", 70.0, 100.0)], 2, 1)
    assert found.pop("by_name") == {"b": {"ms": 0.021, "count": 1}}
    assert found == pytest.approx(
        {
            "kernels": 2,
            "profiled_ms": 0.05,
            "kernels_ms": 0.029,
            "short_rests_ms": 0.001,
            "host_ms": 0.02,
            "host_share": 0.4,
        }
    )


def test_a_round_that_time_runs_out_in_does_not_count():
    calls = []

    def measure(name):
        calls.append(name)
        if len(calls) > 5:
            fast.Clock(-1).check()
        return len(calls)

    assert fast._rounds({name: lambda name=name: measure(name) for name in "ab"}, 9) == {"a": [4], "b": [3]}
    assert calls == [*"ab", *"ba", *"ab"]
    with pytest.raises(fast.OutOfTimeError):
        fast._rounds({"a": lambda: measure("a")}, 2)


def test_slots_and_a_reduced_vocabulary():
    """More slots get smaller trees; a trimmed drafter holds all that is ever said, or is refused."""
    largest = [fast._words(fast._shapes(slots)[-1]) for slots in (1, 4, 16, 32)]
    assert largest == ["5/10/60", "5/10/60", "4/4/16", "3/2/8"]
    small, drafter = load_target("testbed/weights/llava"), load_drafter("testbed/weights/llava-eaglevlm")
    whole = fast._trimmed(drafter, small, small.vocab_size)
    assert whole.config.draft_vocab_size == len(whole.d2t) == small.vocab_size
    assert not whole.training
    for size in (small.vocab_size - 1, small.vocab_size + 1):
        with pytest.raises(UserError, match="impossible"):
            fast._trimmed(drafter, small, size)
