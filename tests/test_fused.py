"""The fused decoder computes what Hugging Face's does, over its weights, and is chosen by how a decoder is built."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from speculens.attention import TreeMask, causal_attention
from speculens.drafters.config import DrafterConfig
from speculens.drafters.layer import DecoderLayer
from speculens.targets import Target
from speculens.targets.fused import FusedDecoder, fuse
from speculens.tree import DraftTree

FUSED = [name for name in tiny.FAMILIES if "gemma" not in name]  # Gemma's norms and activation are others
CHAIN_AND_FORK = torch.tensor([[0, 0, 1, 1, 3, 0, 5]])
DEPTH = torch.tensor([[0, 1, 2, 2, 3, 1, 2]])


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


def test_the_mask_is_made_once_for_all_layers():
    tree = forked(2)
    mask = TreeMask(torch.tensor([3, 5]), tree.ancestors, tree.depth)
    assert mask.additive(20, torch.float32) is mask.additive(20, torch.float32)
    assert mask.additive(20, torch.float32, window=2) is not mask.additive(20, torch.float32)


def test_a_drafters_layer_joined_for_decoding_computes_and_trains_as_before():
    config = DrafterConfig("eaglevlm", 32, 100, "llava", 48, 4, 2, 8)
    torch.manual_seed(0)
    plain = DecoderLayer(replace(config, qkv_bias=True)).double()
    joined = copy.deepcopy(plain)
    joined.join()
    rows, positions = torch.randn(2, 5, 32, dtype=torch.float64), torch.arange(5).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(joined(rows, positions, causal_attention), plain(rows, positions, causal_attention))
    assert list(joined.state_dict()) == list(plain.state_dict())
    for layer in (plain, joined):
        layer(rows, positions, causal_attention).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    for (name, weight), other in zip(joined.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)
    with torch.no_grad():  # the update went into the joined weights too, and a copy does not read the original's
        torch.testing.assert_close(joined(rows, positions, causal_attention), plain(rows, positions, causal_attention))
        copied = copy.deepcopy(joined)
        copied.self_attn.q_proj.weight.zero_()
        expected = copy.deepcopy(plain)
        expected.self_attn.q_proj.weight.zero_()
        torch.testing.assert_close(
            copied(rows, positions, causal_attention), expected(rows, positions, causal_attention)
        )
