"""A vision tower is recorded for sizes that come again, and what a replay gives is what a launch gives."""

import copy

import pytest
import torch

import tiny
from graphs import Again
from oracle import CAPACITY, Ask, compare, prompt, reference
from speculens.engine import Engine
from speculens.sampling import Sampling
from speculens.targets import Target, tower_graphs

LONG = Sampling(max_new_tokens=16)


@pytest.fixture
def recorded(monkeypatch):
    """A target whose towers are recorded as on a GPU, where every tensor of the host's counts as the device's."""
    monkeypatch.setattr(tower_graphs, "Recorder", Again)

    def make(family):
        made = Target(copy.deepcopy(tiny.model(family)), tiny.processor(family))
        made.record_towers()
        return made

    return make


@pytest.fixture
def tensors_on_device(monkeypatch):
    """Floating-point tensors stand for those on a device; the others stay the host's."""
    monkeypatch.setattr(
        tower_graphs, "_on_device", lambda leaf: isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )


@pytest.mark.usefixtures("tensors_on_device")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_texts_stay_the_same_when_pictures_of_one_size_come_again(recorded, family):
    made = recorded(family)
    engine = Engine(made, capacity=CAPACITY)
    asks = [Ask(seed=seed) for seed in range(4)]
    for ask in asks:
        compare(engine.generate(prompt(family, ask), LONG).tokens, reference(family, ask, LONG), family)
    assert made._towers
    recorder = made._towers[0].recorder
    assert recorder.captures >= 1
    assert recorder.replays == len(asks) - 1, "the second sight of a size records it and is a replay already"


@pytest.mark.usefixtures("tensors_on_device")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_other_sizes_and_several_pictures_have_graphs_of_their_own(recorded, family):
    made = recorded(family)
    engine = Engine(made, capacity=CAPACITY)
    asks = [Ask(seed=1), Ask(images=2, seed=2), Ask(images=3, turns=3, seed=3)] * 3
    for ask in asks:
        compare(engine.generate(prompt(family, ask), LONG).tokens, reference(family, ask, LONG), family)
    assert made._towers[0].recorder.captures == 3


@pytest.mark.usefixtures("tensors_on_device")
def test_what_a_pass_gave_is_not_written_over_by_the_next_one(recorded):
    made = recorded("llava")
    tower, graphs = made.model.base_model.vision_tower, made._towers[0]
    pictures = [torch.rand(1, 3, 28, 28, dtype=made.dtype) for _ in range(4)]
    with torch.no_grad():
        launched = [tower(one).last_hidden_state for one in pictures]
        with graphs.in_place():
            replayed = [tower(one).last_hidden_state for one in pictures]
    assert graphs.recorder.replays == 3
    assert all(map(torch.equal, launched, replayed))
    assert "forward" not in vars(tower)


@pytest.mark.usefixtures("tensors_on_device")
def test_graphs_are_few_and_those_least_in_use_go_first(recorded, monkeypatch):
    monkeypatch.setattr(tower_graphs, "MOST_SIZES", 2)
    made = recorded("llava")
    tower, graphs = made.model.base_model.vision_tower, made._towers[0]
    with torch.no_grad(), graphs.in_place():
        for count in (1, 1, 2, 2, 1, 3, 3):
            tower(torch.rand(count, 3, 28, 28, dtype=made.dtype))
    assert [key[1][0][0] for key in graphs._held] == [1, 3]
    assert len(graphs.recorder._graphs) == 2


@pytest.mark.usefixtures("tensors_on_device")
def test_large_passes_and_those_that_learn_are_launched(recorded, monkeypatch):
    made = recorded("llava")
    tower, graphs = made.model.base_model.vision_tower, made._towers[0]
    picture = torch.rand(1, 3, 28, 28, dtype=made.dtype)
    with graphs.in_place():
        for _ in range(3):
            tower(picture)  # gradients are on
        monkeypatch.setattr(tower_graphs, "MOST_BYTES", picture.nbytes - 1)
        with torch.no_grad():
            for _ in range(3):
                tower(picture)
    assert graphs.recorder.captures == graphs.recorder.replays == 0


@pytest.mark.usefixtures("tensors_on_device")
def test_a_tower_that_cannot_be_recorded_is_launched_and_told_in_a_short_line(recorded, monkeypatch, caplog):
    made = recorded("llava")
    monkeypatch.setattr(Again, "_record", lambda *_: (_ for _ in ()).throw(RuntimeError("not permitted")))
    engine = Engine(made, capacity=CAPACITY)
    for seed in range(3):
        ask = Ask(seed=seed)
        compare(engine.generate(prompt("llava", ask), LONG).tokens, reference("llava", ask, LONG))
    (line,) = caplog.messages
    assert "vision tower" in line
    assert len(line) < 160


def test_without_a_gpu_nothing_is_recorded():
    made = Target(copy.deepcopy(tiny.model("llava")), tiny.processor("llava"))
    made.record_towers()
    assert made._towers == []
