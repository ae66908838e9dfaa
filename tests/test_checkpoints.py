"""Drafters and targets on disk: what is written comes back, and what is broken is refused in one sentence."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny
from oracle import CAPACITY, Ask, compare, oracle, prompt, random_eagle, reference, target
from speculens.checkpoints import load_drafter, read_config, save_drafter
from speculens.drafters import DrafterConfig, EagleDrafter, LookupDrafter, NoDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.int8 import pressed, restored
from speculens.sampling import Sampling
from speculens.targets import Target, load_target
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter

# Drafters


@pytest.fixture
def folder(tmp_path):
    return save_drafter(random_eagle("llava"), tmp_path / "drafter", {"target": "tiny llava", "acceptance": 3.2})


def test_a_saved_drafter_comes_back(folder):
    saved, loaded = random_eagle("llava"), load_drafter(folder, dtype=torch.float64)
    assert isinstance(loaded, EagleDrafter)
    assert loaded.config == saved.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@given(
    st.integers(0, 2**32),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)
def test_eight_bits_are_off_by_half_a_step_of_the_row_at_most(seed, rows, columns, dtype):
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-9, 5, (rows, 1), generator=generator)
    weight = (torch.randn(rows, columns, generator=generator) * size).clamp(-6e4, 6e4).to(dtype)
    weight[0] = 0
    state = {"w": weight, "norm": torch.ones(3, dtype=dtype), "d2t": torch.arange(4)}
    stored = pressed(state)
    assert stored["w"].dtype == torch.int8
    back = restored(stored)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in ("norm", "d2t"))
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert ((back["w"].double() - weight.double()).abs() <= 0.501 * step).all()


def test_a_drafter_in_eight_bits_comes_back_in_half_the_size(tmp_path):
    drafter = copy.deepcopy(random_eagle("llava")).to(torch.bfloat16)
    whole = save_drafter(drafter, tmp_path / "whole")
    small = save_drafter(drafter, tmp_path / "small", int8=True)
    sizes = [(one / "model.safetensors").stat().st_size for one in (whole, small)]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_drafter(small, dtype=torch.float64)
    for name, weight in drafter.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], weight.double(), atol=float(weight.abs().max()) / 200)
    engine = Engine(target("llava"), loaded, capacity=CAPACITY)
    compare(
        engine.generate(prompt("llava", Ask()), Sampling(max_new_tokens=16)).tokens,
        reference("llava", Ask(), Sampling(max_new_tokens=16)),
    )


def test_nothing_of_the_target_is_stored(folder):
    """Embedding and head are borrowed."""
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(random_eagle("llava").state_dict())
    assert not any("embed" in name or "head" in name for name in names)


def test_the_card_says_what_it_is_for(folder):
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("eaglevlm", "llava", "64", "401", "tiny llava", "3.2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_drafter_is_loaded_in_the_dtype_of_its_target(folder, dtype):
    assert {p.dtype for p in load_drafter(folder, dtype=dtype).parameters()} == {dtype}


def test_pictures_of_another_size_than_it_learnt_from_are_told(tmp_path, caplog):
    learnt = Target(tiny.model("qwen2_5_vl"), copy.deepcopy(tiny.processor("qwen2_5_vl")))
    drafter = make_drafter(DrafterRecipe("eaglevlm"), learnt)
    assert (drafter.config.min_pixels, drafter.config.max_pixels) == (784, 12544)
    folder = save_drafter(drafter, tmp_path / "drafter")
    load_drafter(folder, target=learnt)
    assert not caplog.messages
    images = learnt.processor.image_processor
    images.size = type(images.size)(shortest_edge=784, longest_edge=50176)
    load_drafter(folder, target=learnt)
    (line,) = caplog.messages
    assert "784 to 12,544" in line
    assert "784 to 50,176" in line


def test_where_pictures_are_not_scaled_to_an_area_nothing_is_told(folder, caplog):
    assert (read_config(folder).min_pixels, read_config(folder).max_pixels) == (None, None)
    load_drafter(folder, target=target("llava"))
    assert not caplog.messages


def in_hub_cache(folder, cache, hub_id, commit="0" * 40):
    """A folder as the hub's client keeps a repository that it has fetched."""
    kept = cache / f"models--{hub_id.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    shutil.copytree(folder, kept / "snapshots" / commit)


def test_a_drafter_is_loaded_by_its_hub_id(folder, tmp_path, monkeypatch):
    """From the client's own cache, without a network; an id that it has not fetched is refused by name."""
    in_hub_cache(folder, tmp_path / "hub", "somebody/drafter")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded, saved = load_drafter("somebody/drafter", dtype=torch.float64), load_drafter(folder, dtype=torch.float64)
    assert loaded.config == saved.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    with pytest.raises(UserError, match="no drafter at somebody/else: it is neither a folder here nor a hub id"):
        load_drafter("somebody/else")


@pytest.mark.parametrize(("name", "kind"), [("none", NoDrafter), ("lookup", LookupDrafter)])
def test_drafters_without_weights_go_by_name(name, kind):
    assert isinstance(load_drafter(name), kind)


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config cut off": (lambda f: cut(f / "config.json"), "config.json"),
    "config of another thing": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "speculator_type"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1, 2]"), "config.json"),
    "config is a number": (lambda f: (f / "config.json").write_text("7"), "config.json"),
    "unknown key": (lambda f: edit(f, lambda c: c.update(colour=1)), "colour"),
    "unknown tree key": (lambda f: edit(f, lambda c: c["tree"].update(leaves=1)), "leaves"),
    "tree is a number": (lambda f: edit(f, lambda c: c.update(tree=7)), "tree"),
    "impossible tree": (lambda f: edit(f, lambda c: c["tree"].update(topk=0)), "topk"),
    "a size is a text": (lambda f: edit(f, lambda c: c.update(target_hidden_size="big")), "must be a whole number"),
    "a size below 0": (lambda f: edit(f, lambda c: c.update(head_dim=-8)), "head_dim must be above 0"),
    "two layers": (lambda f: edit(f, lambda c: c.update(num_hidden_layers=2)), "num_hidden_layers must be 1"),
    "unknown view": (lambda f: edit(f, lambda c: c.update(image_contract="half")), "did you mean"),
    "options are a list": (lambda f: edit(f, lambda c: c.update(options=[1])), "options must be a section"),
    "missing key": (lambda f: edit(f, lambda c: c.pop("head_dim")), "head_dim"),
    "unknown method": (lambda f: edit(f, lambda c: c.update(speculator_type="psychic")), "psychic"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut off": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors"),
    "a weight missing": (lambda f: edit_weights(f, lambda s: s.pop("fc.bias")), "fc.bias"),
    "a weight too many": (lambda f: edit_weights(f, lambda s: s.update(extra=torch.ones(2))), "extra"),
    "a weight of another shape": (lambda f: edit_weights(f, lambda s: s.update({"fc.bias": torch.ones(3)})), "fc.bias"),
    "not a number": (lambda f: edit_weights(f, lambda s: s["fc.bias"].fill_(float("nan"))), "fc.bias"),
    "infinite": (lambda f: edit_weights(f, lambda s: s["fc.bias"].fill_(float("inf"))), "fc.bias"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_drafter_is_refused_in_one_sentence_that_names_the_fault(folder, way):
    spoil, word = BROKEN[way]
    spoil(folder)
    with pytest.raises(UserError, match=word) as error:
        load_drafter(folder)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere"])
def test_a_drafter_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        load_drafter(name)


def test_a_config_survives_its_own_dictionary():
    config = random_eagle("llava").config
    assert DrafterConfig.from_dict(config.to_dict()) == config
    assert DrafterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_former_key_is_read_and_not_written():
    config = random_eagle("llava").config
    former = {"num_query_tokens": 0}
    assert DrafterConfig.from_dict(config.to_dict() | former) == config
    assert not former.keys() & config.to_dict().keys()


def test_a_config_is_read_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert read_config(folder).target_family == "llava"


# Targets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save("llava", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"])
def test_a_target_from_disk_decodes_as_hugging_face_does(family, tmp_path):
    """`load_target` also swaps the attention over the tree: keys and values are not copied for each query head."""
    loaded = load_target(str(tiny.save(family, tmp_path)), dtype=torch.float64)
    sampling = Sampling(max_new_tokens=24)
    asks = [Ask(), Ask(images=2, seed=1), Ask(seed=2)]
    engine = Engine(loaded, oracle(family, asks, [sampling] * 3), slots=2, capacity=CAPACITY)
    for ask, got in zip(asks, engine.generate_all([prompt(family, ask) for ask in asks], sampling), strict=True):
        compare(got.tokens, reference(family, ask, sampling), f"{family}, {ask}")
        assert got.stats.mean_acceptance_length > 1.5


def test_a_target_whose_weights_are_not_finite_is_refused(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    next(iter(state.values())).view(-1)[0] = float("nan")
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        load_target(str(tmp_path))


def test_a_target_that_spills_over_is_refused(saved, tmp_path):
    """As `--device-map auto` does where GPUs are too small; without one, only what is put on a disk is offloaded."""
    with pytest.raises(UserError, match=r"does not fit on the GPUs here.*: use more or larger GPUs"):
        load_target(str(saved), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: (f / "config.json").unlink(), "config"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: cut(f / "model.safetensors"), "weights of .* are broken"),
        (lambda f: cut(f / "config.json"), "config"),
    ],
)
def test_a_broken_target_is_refused_in_one_sentence(saved, tmp_path, spoil, word):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError, match=word) as error:
        load_target(str(tmp_path))
    assert "\n" not in str(error.value).strip()


def test_a_target_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_target(str(tmp_path / "nowhere"))
