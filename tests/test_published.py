"""Drafters in published layouts: files built from the documented names and shapes, read, run, written, read again.

Nothing published is downloaded here. The forward is compared with plain references of the papers' formulas.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from oracle import CAPACITY, Ask, compare, prompt, random_eagle, reference, target
from speculens import cli
from speculens.checkpoints import load_drafter, save_drafter, save_published, stored_bytes
from speculens.drafters.vispec import ViSpecDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from test_vispec import PROMPTS, H, features_of, layer, layer_inputs, linear, random_vispec

MLP, HEADS = 96, 4
ATTENTION = "layers.0.self_attn"
FAMILY = {False: "llava", True: "qwen2_5_vl"}  # published files of Qwen targets have attention biases
LAYOUTS = ("eagle", "vispec", "hivis")


def published(layout: str, *, bias: bool, kv_heads: int = HEADS, num_q: int = 2, steps: int = 3) -> dict:
    """Random tensors by the names and shapes that notes and model cards document, in the files' own order of sizes."""
    made_for = target(FAMILY[bias])
    kv = kv_heads * H // HEADS
    shapes = {
        "embed_tokens.weight": (made_for.vocab_size, H),
        "fc.weight": (H, (3 if layout == "hivis" else 2) * H),
        "fc.bias": (H,),
        f"{ATTENTION}.q_proj.weight": (H, H),
        f"{ATTENTION}.k_proj.weight": (kv, H),
        f"{ATTENTION}.v_proj.weight": (kv, H),
        f"{ATTENTION}.o_proj.weight": (H, H),
        "layers.0.mlp.gate_proj.weight": (MLP, H),
        "layers.0.mlp.up_proj.weight": (MLP, H),
        "layers.0.mlp.down_proj.weight": (H, MLP),
        "layers.0.post_attention_layernorm.weight": (H,),
    }
    if bias:
        shapes |= {f"{ATTENTION}.{name}_proj.bias": (H if name == "q" else kv,) for name in "qkv"}
    if layout == "vispec":
        shapes |= {
            "imadpt.q": (num_q, HEADS, H // HEADS),
            "imadpt.k_proj.weight": (H, H),
            "imadpt.v_proj.weight": (H, H),
            "imadpt.o_proj.weight": (H, H),
            "img_fc.weight": (H, 2 * H),
            "img_fc.bias": (H,),
        } | ({"imadpt.k_proj.bias": (H,), "imadpt.v_proj.bias": (H,)} if bias else {})
    if layout == "hivis":
        shapes["residual"] = (steps, H)
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    state["embed_tokens.weight"] = made_for.embed(torch.arange(made_for.vocab_size)).half()
    return state


def values() -> dict:
    """A published config.json, by the keys that the public code reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": H,
        "intermediate_size": MLP,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "vocab_size": 32064,
    }


def write(folder: Path, state: dict, config: dict | None = None, *, pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or values()))
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def load(folder: Path, *, bias: bool = False):
    return load_drafter(folder, dtype=torch.float64, target=target(FAMILY[bias]))


def changed(drafter, changes: dict):
    """A fresh drafter of another config."""
    return type(drafter)(replace(drafter.config, **changes))


# --- reading


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_sizes_and_biases_are_read_from_the_tensors(tmp_path, layout, pickled, bias):
    state = published(layout, bias=bias, num_q=3, steps=5)
    drafter = load(write(tmp_path, state, pickled=pickled), bias=bias)
    made_for, config = target(FAMILY[bias]), drafter.config
    assert drafter.name == {"eagle": "eaglevlm"}.get(layout, layout)
    assert (config.qkv_bias, config.input_norm, config.intermediate_size) == (bias, False, MLP)
    assert (config.target_family, config.target_vocab_size) == (made_for.family, made_for.vocab_size)
    for name, tensor in drafter.state_dict().items():
        torch.testing.assert_close(tensor, state.pop(name).double())
    assert set(state) == {"embed_tokens.weight"}


def test_vispec_files_have_17_or_22_tensors_and_its_tree():
    assert [len(published("vispec", bias=bias)) for bias in (False, True)] == [17, 22]


@pytest.mark.parametrize(("layout", "tree"), [("eagle", (5, 10, 60)), ("vispec", (3, 8, 30)), ("hivis", (5, 10, 60))])
def test_each_has_the_tree_of_its_public_code(tmp_path, layout, tree):
    shape = load(write(tmp_path, published(layout, bias=False))).config.tree
    assert (shape.num_steps, shape.topk, shape.num_draft_tokens) == tree


def test_grouped_heads_an_absent_bias_and_the_rope_base_are_read(tmp_path):
    state = published("eagle", bias=False, kv_heads=2)
    bias = state.pop("fc.bias")
    drafter = load(write(tmp_path, state, values() | {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "bias": False}))
    assert (drafter.config.num_key_value_heads, drafter.config.head_dim) == (2, 16)
    assert (drafter.config.rope_theta, drafter.config.rms_norm_eps) == (1e6, 1e-5)
    assert torch.equal(drafter.fc.bias, torch.zeros_like(bias, dtype=torch.float64))


def test_the_older_name_of_the_step_embeddings_is_known(tmp_path):
    state = published("hivis", bias=False)
    state["adaptive_embedding"] = state.pop("residual")
    torch.testing.assert_close(load(write(tmp_path, state)).residual, state["adaptive_embedding"].double())


@pytest.mark.parametrize("bias", [False, True])
def test_hivis_hides_and_counts_as_its_public_code_does(tmp_path, bias):
    """LLaVA: image tokens alone, the gap closed. Qwen: the frame and one token more, the gap kept."""
    made_for = target(FAMILY[bias])
    options = load(write(tmp_path, published("hivis", bias=bias)), bias=bias).options
    if bias:
        config = made_for.model.config
        frame = (config.vision_start_token_id, config.vision_end_token_id)
        assert (options.border, options.frame, options.positions) == ("after", frame, "original")
    else:
        assert (options.frame, options.positions) == ((), "contiguous")


# --- the forward


def eagle_rows(state, text, embeds, hidden):
    return [(i, linear(state, "fc", torch.cat([embeds[i], hidden[i]]))) for i in range(len(text))]


def vispec_rows(state, text, embeds, hidden):
    return [(position, x) for position, x, _ in layer_inputs(state, text, embeds, hidden)[0]]


def hivis_rows(state, text, embeds, hidden):
    """LLaVA's rule: text tokens only, counted without a gap; e is of the next text token, f of this one."""
    kept = [i for i, kind in enumerate(text) if kind == "t"]
    behind = [*kept[1:], len(text)]  # embeds[i] belongs to token i + 1
    r = state["residual"][0]
    pairs = zip(kept, behind, strict=True)
    return [
        (place, linear(state, "fc", torch.cat([embeds[after - 1], hidden[token], r])))
        for place, (token, after) in enumerate(pairs)
    ]


REFERENCE = {"eagle": eagle_rows, "vispec": vispec_rows, "hivis": hivis_rows}


@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_forward_equals_the_plain_reference(tmp_path, layout, text):
    state = published(layout, bias=False)
    drafter = load(write(tmp_path, state))
    exact = {name: tensor.double() for name, tensor in state.items()}
    features, embeds = features_of([text])
    rows = drafter.view(features, embeds)
    wanted = REFERENCE[layout](exact, text, embeds[0], features.hidden[0])
    torch.testing.assert_close(drafter.enter(rows)[0], torch.stack([x for _, x in wanted]))
    assert rows.positions[0].tolist() == [position for position, _ in wanted]
    torch.testing.assert_close(drafter(rows)[0], layer(exact, wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", ["ttSiiiiEtttt", "tSiiEttSiiiEtt", "tttt", "SiiiEtt"])
def test_hivis_of_qwen_equals_the_plain_reference(tmp_path, text):
    """The frame and the token behind it are hidden with the picture, and text keeps its own positions."""
    state = published("hivis", bias=True)
    drafter = load(write(tmp_path, state), bias=True)
    exact = {name: tensor.double() for name, tensor in state.items()}
    features, embeds = features_of([text.replace("S", "t").replace("E", "t")])
    ids = dict(zip("SE", drafter.options.frame, strict=True))
    features = replace(features, tokens=torch.tensor([[ids.get(kind, 0) for kind in text]]))
    kept = [i for i, kind in enumerate(text) if kind == "t" and text[i - 1 : i] != "E"]
    pairs = zip(kept, [*kept[1:], len(text)], strict=True)
    hidden, r = features.hidden[0], state["residual"][0].double()
    wanted = [(i, linear(exact, "fc", torch.cat([embeds[0, after - 1], hidden[i], r]))) for i, after in pairs]
    rows = drafter.view(features, embeds)
    assert rows.positions[0].tolist() == kept
    torch.testing.assert_close(drafter.enter(rows)[0], torch.stack([x for _, x in wanted]))
    torch.testing.assert_close(drafter(rows)[0], layer(exact, wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_with_it_is_exact(tmp_path, layout, bias):
    family = FAMILY[bias]
    drafter = load(write(tmp_path, published(layout, bias=bias)), bias=bias)
    asks = [Ask(), Ask(images=2, seed=1), Ask(images=0, seed=3)]
    engine = Engine(target(family), drafter, slots=2, capacity=CAPACITY)
    sampling = Sampling(max_new_tokens=10)
    for ask, got in zip(asks, engine.generate_all([prompt(family, ask) for ask in asks], sampling), strict=True):
        compare(got.tokens, reference(family, ask, sampling), f"{layout}, {ask}")


# --- what is refused


def without(name):
    return lambda state: state.pop(name)


def other_embedding(state):
    state["embed_tokens.weight"] = state["embed_tokens.weight"].roll(1, 0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_embedding, "another target"),
        (lambda state: state.update({"fc.weight": torch.zeros(32, 64)}), "hidden size 32"),
        (lambda state: state["fc.bias"].fill_(float("inf")), "not finite"),
        (lambda state: state.update({"midlayer.x": torch.ones(1)}), "midlayer.x"),
        (without("fc.weight"), "no published layout"),
        (without(f"{ATTENTION}.q_proj.weight"), "q_proj.weight"),
        (without(f"{ATTENTION}.o_proj.weight"), "o_proj.weight"),
    ],
)
def test_tensors_of_another_kind_are_refused(tmp_path, spoil, said):
    state = published("eagle", bias=False)
    spoil(state)
    with pytest.raises(UserError, match=said) as error:
        load(write(tmp_path, state))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is linear"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    ],
)
def test_what_our_layer_does_not_compute_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load(write(tmp_path, published("eagle", bias=False), values() | changes))


def test_a_config_without_heads_is_refused(tmp_path):
    config = values()
    config.pop("num_attention_heads")
    with pytest.raises(UserError, match="lacks num_attention_heads"):
        load(write(tmp_path, published("eagle", bias=False), config))


def test_without_a_target_it_is_said_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"speculator_type.*name its target too.*speculens export --to ours"):
        load_drafter(write(tmp_path, published("eagle", bias=False)))


def test_a_pickle_that_runs_code_or_is_broken_is_refused(tmp_path):
    write(tmp_path, published("eagle", bias=False), pickled=True)
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[:5000])
    with pytest.raises(UserError, match="broken"):
        load(tmp_path)
    torch.save({"fc.weight": Path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"broken|no table of tensors"):
        load(tmp_path)


# --- writing


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_is_written_again_tensor_by_tensor(tmp_path, layout, bias):
    state = published(layout, bias=bias)
    drafter = load_drafter(write(tmp_path / "in", state), target=target(FAMILY[bias]))
    folder = save_published(drafter, layout, tmp_path / "out", target(FAMILY[bias]))
    written = load_file(folder / "model.safetensors")
    assert {name: x.shape for name, x in written.items()} == {name: x.shape for name, x in state.items()}
    assert all(torch.equal(written[name], state[name]) for name in state if name != "embed_tokens.weight")
    torch.testing.assert_close(written["embed_tokens.weight"], state["embed_tokens.weight"].float(), atol=1e-2, rtol=0)
    again, config = json.loads((folder / "config.json").read_text()), values()
    known = {"architectures", "vocab_size", "max_position_embeddings"}
    assert {key: again[key] for key in config if key not in known} == {
        k: v for k, v in config.items() if k not in known
    }
    assert again["qkv_bias"] == bias
    assert load_drafter(folder, target=target(FAMILY[bias])).config == drafter.config


def test_a_vector_that_is_added_is_written_as_one_that_is_concatenated(tmp_path):
    """The public code then computes the same: f + W g is [I | W] on [f ; g]."""
    made_for = target("llava")
    drafter = changed(random_vispec("llava"), {"options": {"fusion": "add"}})
    torch.nn.init.normal_(drafter.img_fc.weight, std=0.1)
    folder = save_published(drafter, "vispec", tmp_path, made_for)
    read = load_drafter(folder, target=made_for)
    assert read.options.fusion == "concat"
    features, embeds = features_of([PROMPTS["several"]])
    rows = drafter.view(replace(features, hidden=features.hidden.float()), embeds.float())
    torch.testing.assert_close(read(rows), drafter(rows))


@pytest.mark.parametrize(
    ("make", "layout", "said"),
    [
        (lambda: random_vispec("llava"), "eagle", "use vispec"),
        (lambda: random_eagle("llava"), "vispec", "use eagle"),
        (lambda: random_eagle("llava"), "eagle", "input norm"),
        (lambda: changed(random_vispec("llava"), {"options": {"adaptor_heads": 2}}), "vispec", "other heads"),
        (lambda: changed(random_vispec("llava"), {"options": {"fusion": "none"}}), "vispec", "without a global vector"),
        (lambda: changed(random_vispec("llava"), {"head_dim": 32}), "vispec", "32 wide"),
    ],
)
def test_what_the_public_code_would_compute_otherwise_is_refused(tmp_path, make, layout, said):
    with pytest.raises(UserError, match=said):
        save_published(make(), layout, tmp_path, target("llava"))


def hivis(family: str, options: dict):
    made = DrafterRecipe(method="hivis", intermediate_size=MLP, input_norm=False, options=options)
    return make_drafter(made, target(family))


def test_hivis_is_written_only_with_the_borders_of_its_public_code(tmp_path):
    for family, options, said in (
        ("qwen2_5_vl", {"border": "paper"}, "border paper"),
        ("llava", {"positions": "original"}, "positions original"),
        ("llava", {"step_embedding": False}, "step embeddings"),
    ):
        with pytest.raises(UserError, match=said):
            save_published(hivis(family, options), "hivis", tmp_path, target(family))
    save_published(
        hivis("llava", {"border": "paper"}), "hivis", tmp_path, target("llava")
    )  # there is no frame to differ in


# --- starting from an earlier stage


def recipe(method: str = "vispec", init_from: object = None, *, input_norm: bool = False) -> DrafterRecipe:
    source = None if init_from is None else str(init_from)
    return DrafterRecipe(method, intermediate_size=MLP, input_norm=input_norm, init_from=source)


def test_a_second_stage_starts_from_the_first(tmp_path):
    made_for = target("llava")
    first = make_drafter(recipe("eaglevlm"), made_for)
    folder = save_drafter(first, tmp_path / "first")
    second = make_drafter(recipe(init_from=folder), made_for).state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.state_dict().items())
    assert torch.equal(second["img_fc.weight"], torch.cat([torch.eye(H), torch.zeros(H, H)], 1))


def test_it_starts_from_a_published_drafter_too(tmp_path):
    """Published heads are full MHA, so the tiny target's two KV heads do not fit them; a grouped one's do."""
    state = published("eagle", bias=False, kv_heads=2)
    second = make_drafter(recipe(init_from=write(tmp_path, state)), target("llava")).state_dict()
    assert all(torch.equal(second[name], x) for name, x in state.items() if name != "embed_tokens.weight")


@pytest.mark.parametrize(("source", "said"), [("lookup", "trained drafter"), ("nowhere/at-all", "no drafter at")])
def test_a_start_that_cannot_be_is_refused(source, said):
    with pytest.raises(UserError, match=said):
        make_drafter(recipe(init_from=source), target("llava"))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    first = make_drafter(recipe("eaglevlm", input_norm=True), target("llava"))
    with pytest.raises(UserError, match="input_layernorm"):
        make_drafter(recipe(init_from=save_drafter(first, tmp_path)), target("llava"))


# --- the command line


def test_export_to_ours_and_back(tmp_path, capsys):
    model = tiny.save("llava", tmp_path / "llava", torch.float32)
    there = write(tmp_path / "published", published("vispec", bias=False))
    for layout, source, out in (("ours", "published", "ours"), ("vispec", "ours", "again")):
        words = ["export", "--to", layout, "--drafter", str(tmp_path / source), "--target", str(model)]
        assert cli.main([*words, "--out", str(tmp_path / out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["layout"] == layout
    assert isinstance(load_drafter(tmp_path / "ours"), ViSpecDrafter)
    first, last = (load_file(folder / "model.safetensors") for folder in (there, tmp_path / "again"))
    assert all(torch.equal(last[name], x) for name, x in first.items() if name != "embed_tokens.weight")
    assert cli.main([*words, "--out", str(tmp_path / "ours")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path / "small"), "--int8"]) == 2
    assert "leave out --int8" in capsys.readouterr().err
    words[words.index("vispec")] = "ours"
    assert cli.main([*words, "--out", str(tmp_path / "small"), "--int8"]) == 0
    assert isinstance(load_drafter(tmp_path / "small"), ViSpecDrafter)
    assert stored_bytes(str(tmp_path / "small")) < 0.4 * stored_bytes(str(tmp_path / "ours"))  # of float32
    words[words.index("--drafter") + 1] = "lookup"
    assert cli.main([*words, "--out", str(tmp_path / "none")]) == 2
    assert "no weights" in capsys.readouterr().err


def test_generate_and_inspect_take_a_published_drafter(tmp_path, capsys):
    model = str(tiny.save("llava", tmp_path / "llava", torch.float32))
    there = str(write(tmp_path / "published", published("eagle", bias=False), pickled=True))
    assert cli.main(["inspect", "--target", model, "--drafter", there, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True and report["drafter"]["bytes"] > 0
    assert cli.main(["inspect", "--drafter", there]) == 2
    assert "name its target too" in capsys.readouterr().err
    assert cli.main(["generate", "What?", "--target", model, "--drafter", there, "--max-new-tokens", "4"]) == 0
