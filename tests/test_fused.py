"""The fused decoder computes what Hugging Face's does, over its weights, and is chosen by how a decoder is built."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from speculens.attention import TreeMask, causal_attention
from speculens.cache import SlotCache
from speculens.drafters import METHODS
from speculens.drafters.config import DrafterConfig
from speculens.drafters.layer import DecoderLayer, rotary
from speculens.drafters.session import HeadSession
from speculens.ops import Joined, add_norm
from speculens.targets import Target
from speculens.targets.fused import FusedDecoder, fuse
from speculens.tree import DraftTree
from test_methods import PUBLISHED, drafter

FUSED = [name for name in tiny.FAMILIES if "gemma" not in name]  # Gemma's norms and activation are others
CHAIN_AND_FORK = torch.tensor([[0, 0, 1, 1, 3, 0, 5]])
DEPTH = torch.tensor([[0, 1, 2, 2, 3, 1, 2]])


@pytest.fixture
def norms_in_float32(monkeypatch):
    """Fused layers norm in float32, as Hugging Face's do; torch's module in what it is given. Elsewhere they agree."""
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: add_norm(x, None, norm.weight, norm.eps)[1])


def fresh(family: str, dtype: torch.dtype = torch.float64):
    return copy.deepcopy(tiny.model(family, dtype))


def forked(batch: int) -> DraftTree:
    tokens = torch.arange(batch * 7).view(batch, 7) * 11 % 300 + 20
    live = torch.ones(batch, 7, dtype=torch.bool)
    return DraftTree.build(tokens, CHAIN_AND_FORK.expand(batch, -1), DEPTH.expand(batch, -1), live, 3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_decoder_is_fused_by_its_build(family):
    assert (fuse(fresh(family).get_decoder()) is not None) == (family in FUSED)


@pytest.mark.parametrize("nodes", ["root", "tree"])
@pytest.mark.parametrize("family", FUSED)
def test_scores_equal_those_of_the_models_own_decoder(family, nodes):
    """Slots of three lengths, pictures and M-RoPE offsets among them."""
    target = Target(fresh(family), tiny.processor(family))
    session = target.session(3, 200)
    for images in (1, 0, 2):
        session.prefill(target.encode(tiny.conversation(family, images=images, seed=images)))
    tree = forked(3)
    tree = tree if nodes == "tree" else DraftTree.root(tree.tokens[:, 0])
    assert session._fused is not None
    logits, hidden = session.score(tree)
    columns = [part.clone() for part in session.cache.views(2)]
    session._fused = None
    own_logits, own_hidden = session.score(tree)
    torch.testing.assert_close(logits, own_logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(hidden, own_hidden, rtol=0, atol=1e-10)
    for ours, theirs in zip(columns, session.cache.views(2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_joining_weights_changes_nothing_for_the_model_and_stores_nothing_twice(tmp_path):
    model = fresh("qwen2_5_vl")
    before = copy.deepcopy(model)
    inputs, _ = tiny.prompt_inputs("qwen2_5_vl")
    fused = fuse(model.get_decoder())
    assert fused is not None and fused.intact
    for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, old), name
    attention = model.get_decoder().layers[0].self_attn
    stores = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(stores) == 1
    given = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, **given), before.generate(**inputs, **given))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), before.parameters(), strict=True))


def test_a_model_that_was_cast_is_fused_anew():
    target = Target(fresh("llava"), tiny.processor("llava"))
    first = target.fused()
    assert first is target.fused()
    target.model.float()
    assert not first.intact
    second = target.fused()
    assert second is not first and second.intact


@pytest.mark.parametrize("change", ["activation", "gain", "scaling"])
def test_a_decoder_of_the_same_parts_that_computes_otherwise_is_left_alone(change):
    decoder = fresh("llava").get_decoder()
    layer = decoder.layers[1]
    if change == "activation":
        layer.mlp.act_fn = torch.nn.GELU()
    elif change == "gain":
        layer.input_layernorm.__class__ = type("Doubled", (type(layer.input_layernorm),), {"forward": _doubled})
    else:
        layer.__class__ = type("Scaled", (type(layer),), {"forward": _scaled})
    with pytest.raises(ValueError, match="differ"):
        FusedDecoder(decoder)


def _doubled(self, hidden):
    return 2 * super(type(self), self).forward(hidden)


def _scaled(self, hidden, *args: object, **kwargs: object):
    return 1.2 * super(type(self), self).forward(hidden, *args, **kwargs)


def test_a_decoder_that_somebody_hooked_is_left_alone():
    decoder = fresh("llava").get_decoder()
    decoder.layers[2].mlp.register_forward_hook(lambda *_: None)
    assert fuse(decoder) is None


class Doubled(torch.nn.Module):
    """What an adapter does: it stands in a layer's place and adds to what that gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def adapt(layer):
    layer.self_attn.v_proj = Doubled(layer.self_attn.v_proj)


def hook(layer):
    layer.mlp.register_forward_hook(lambda _module, _args, out: 2 * out)


def swap_gain(layer):
    layer.post_attention_layernorm.weight = torch.nn.Parameter(2 * layer.post_attention_layernorm.weight.detach())


@pytest.mark.parametrize("change", [adapt, hook, swap_gain])
def test_what_changes_in_a_model_later_changes_what_it_says(change):
    """A target that is at work already must not go on with the weights that it fused."""
    model = fresh("llava")
    held = Target(model, tiny.processor("llava"))
    question = held.encode(tiny.conversation("llava"))
    before = held.session(1, 400).prefill(question)[0]
    change(held.decoder.layers[0])
    after = held.session(1, 400).prefill(question)[0]
    want = model(**question.inputs).logits[:, -1:]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, want, rtol=0, atol=1e-10)


def test_the_mask_is_made_once_for_all_layers():
    tree = forked(2)
    mask = TreeMask(torch.tensor([3, 5]), tree.ancestors, tree.depth)
    assert mask.additive(20, torch.float32) is mask.additive(20, torch.float32)
    assert mask.additive(20, torch.float32, window=2) is not mask.additive(20, torch.float32)


def test_a_target_of_fused_layers_never_calls_its_own_for_a_plain_prompt(monkeypatch):
    target = Target(fresh("qwen2_5_vl"), tiny.processor("qwen2_5_vl"))
    assert target.fused()
    monkeypatch.setattr(type(target.decoder.layers[0]), "forward", _refuse)
    session = target.session(1, 200)
    session.prefill(target.encode(tiny.conversation("qwen2_5_vl", images=2)))
    session.score(forked(1))


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("family", FUSED)
def test_a_prompt_taken_in_is_that_of_the_models_own_decoder(family, size):
    """Two pictures, so that M-RoPE's axes differ; Qwen3-VL's deepstack leaves only its plain text to fused layers."""
    target = Target(fresh(family), tiny.processor(family))
    images = 0 if family == "qwen3_vl" else 2
    prompt = target.encode(tiny.conversation(family, images=images))
    ours, theirs = target.session(2, 200), target.session(2, 200)
    theirs._fused = None
    found = []
    for session in (ours, theirs):
        session.prefill(target.encode(tiny.conversation(family, images=1, seed=5)))
        logits, features = _exhaust(session.pieces(prompt, size))
        found.append((logits, features.hidden, session._offsets, *_held(session.cache, len(prompt))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_columns_beyond_a_sliding_window_are_left_to_the_models_own_decoder():
    target = Target(fresh("llava"), tiny.processor("llava"))
    session = target.session(1, 200)
    fused = session._fused
    fused._layers[1] = replace(fused._layers[1], window=20)
    assert fused.reach == 20
    prompt = target.encode(tiny.conversation("llava"))
    want = _exhaust(target.session(1, 200).pieces(prompt))[0]
    calls = []
    for layer in target.decoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    got = _exhaust(session.pieces(prompt, 15))[0]
    assert len(calls) == len(target.decoder.layers) * (-(-len(prompt) // 15) - 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def _refuse(*_args: object, **_kwargs: object):
    raise AssertionError("not the fused layers")


def _exhaust(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _held(cache, length):
    cache.aim(range(1, 2), 0)
    return [part[:, :, :length].clone() for part in cache.views(1)]


@pytest.mark.usefixtures("norms_in_float32")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("input_norm", [False, True], ids=["as EAGLE", "input norm"])
def test_a_drafters_fused_layer_computes_what_its_module_does_and_trains_it(input_norm, bias):
    config = DrafterConfig("eaglevlm", 32, 100, "llava", 48, 4, 2, 8, input_norm=input_norm, qkv_bias=bias)
    torch.manual_seed(0)
    plain = DecoderLayer(config).double()
    joined = copy.deepcopy(plain)
    rows, positions = torch.randn(2, 5, 32, dtype=torch.float64), torch.arange(5).expand(2, -1)

    @torch.no_grad()
    def assert_same(ours: DecoderLayer, theirs: DecoderLayer) -> None:
        cache = SlotCache(slots=2, capacity=8, heads=2, head_dim=8, dtype=rows.dtype, devices=[rows.device])
        cache.aim(range(2), 5)
        turn = rotary(positions, 8, config.rope_theta, rows.dtype)
        stream, update = ours.fused()(rows, None, turn, cache, 0, causal_attention)
        want = theirs(rows, positions, causal_attention)
        torch.testing.assert_close(stream + update, want, rtol=0, atol=1e-12)

    assert_same(joined, plain)
    assert list(joined.state_dict()) == list(plain.state_dict())
    for layer in (plain, joined):
        layer(rows, positions, causal_attention).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    for (name, weight), other in zip(joined.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)
    assert_same(joined, plain)  # the update went into the joined weights, too
    with torch.no_grad():
        copied, expected = copy.deepcopy(joined), copy.deepcopy(plain)
        for layer in (copied, expected):  # a copy does not read the original's
            layer.self_attn.q_proj.weight.zero_()
    assert_same(copied, expected)


def test_projections_that_cannot_be_joined_run_one_after_another():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = [torch.nn.Linear(4, 6), Doubled(4, 2)]
    joined, x = Joined(layers), torch.randn(3, 4)
    assert joined.intact
    assert torch.equal(joined(x), torch.cat([layers[0](x), layers[1](x)], -1))


@pytest.mark.usefixtures("norms_in_float32")
@pytest.mark.parametrize(
    ("method", "published"), [*((name, False) for name in METHODS), *((name, True) for name in PUBLISHED)]
)
def test_a_session_drafts_what_a_methods_module_would(method, published, monkeypatch):
    """Trees, hidden states and keys over some rounds, of slots with pictures and without. By Qwen: qkv has a bias."""
    guesser = copy.deepcopy(drafter(method, "qwen2_5_vl", published=published))
    found = [_rounds(guesser)]
    with monkeypatch.context() as patched:
        patched.setattr(type(guesser), "forward", _refuse)
        patched.setattr(DecoderLayer, "forward", _refuse)
        found.append(_rounds(guesser))
    monkeypatch.setattr(HeadSession, "_run", _by_module)
    found.append(_rounds(guesser))
    for other in found[1:]:
        for got, want in zip(found[0], other, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def _by_module(self, rows, _turn, attend, step):
    def into(queries, keys, values):
        return attend(queries, *self.cache.write(0, keys, values))

    return self.drafter(rows, into, step)


def _rounds(guesser) -> list[torch.Tensor]:
    made = Target(tiny.model("qwen2_5_vl"), tiny.processor("qwen2_5_vl"))
    teacher, session = made.session(3, 200), guesser.session(made, 3, 200)
    roots = []
    for images in (1, 0, 2):
        logits, features = teacher.prefill(made.encode(tiny.conversation("qwen2_5_vl", images=images)))
        roots.append(logits[0, -1].argmax())
        session.begin(features, roots[-1][None])
    found, roots = [], torch.stack(roots)
    for counts in ([1, 2, 0], [3, 1, 1]):
        tree = session.draft(roots)
        assert any(tree.depth.flatten() > 1)
        hidden = teacher.score(tree)[1][:, :3]
        observed = torch.tensor(counts)
        session.observe(hidden, tree.tokens[:, 1:4], observed)
        session.settle([[0] * count for count in counts])
        session.cache.aim(range(3), 0)
        real = torch.arange(session.cache.columns) < session.cache.lengths[:, None]
        keys = session.cache.views(0)[0].transpose(1, 2)[real]
        found += [tree.tokens, tree.parents, session._hidden.clone(), session._position.clone(), keys.clone()]
    return found
