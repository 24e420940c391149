"""What layers learn of a batch: routers by sequence, slots, modalities, and `sc.context`.

Shapes: B sequences, S positions, E experts, I input features, O output features.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

import cases
import sparsecraft as sc
from sparsecraft.batch import Batch
from sparsecraft.errors import SparsecraftError, SurgeryError

ENCODERS = pytest.mark.parametrize("family", ["bert", "t5"])
CAUSAL = pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
IDS = torch.arange(3, 27).reshape(2, 12)
SHORT, PREFIX = 7, 5
PADDING = (torch.arange(12) < torch.tensor([[12], [SHORT]])).long()
VISUAL = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0]] * 2)


def converted(family: str, recipe: sc.Recipe):
    """In float64, with random new parameters: what differs by more than rounding is wrong."""
    model = cases.dense(family).double()
    sc.convert(model, recipe)
    cases.randomize_new(model, std=0.3)
    return model


def encoder_recipe(family: str, make, **options) -> sc.Recipe:
    return make(num_experts=3, paths="encoder.*" if family == "t5" else "*", **options)


def slots(**options) -> sc.Recipe:
    return sc.recipes.smola(num_experts=3, rank=2, mixing="slots", **options)


def logits(model, ids: torch.Tensor, **more) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@contextmanager
def watched(model):
    """Layer -> its latest input and output."""
    seen, handles = {}, []
    for layer in model.sparsecraft.layers:

        def keep(module, args, output):
            seen[module] = args[0].detach(), output.detach()

        handles.append(layer.register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def prefix_of(ids: torch.Tensor, length: int = PREFIX) -> torch.Tensor:
    return (torch.arange(ids.shape[1]) < length).long().expand(ids.shape)


# ---------------------------------------------------------------------------- routers by sequence
@ENCODERS
@pytest.mark.parametrize("recipe", ["mov", "smola"])
def test_padding_changes_nothing(family, recipe):
    if recipe == "mov":
        options = {"make": sc.recipes.mov, "router": "sequence"}
    else:
        options = {"make": sc.recipes.smola, "mixing": "slots"}
    model = converted(family, encoder_recipe(family, **options))
    padded = logits(model, IDS.masked_fill(PADDING == 0, 0), attention_mask=PADDING)
    other = logits(model, IDS.masked_fill(PADDING == 0, 9), attention_mask=PADDING)
    alone = logits(model, IDS[1:, :SHORT])[0]
    for found in (padded[1], other[1]):
        assert torch.allclose(found[: len(alone)], alone, atol=1e-6)  # T5's norm is float32
    unmasked = logits(model, IDS.masked_fill(PADDING == 0, 9))[1]
    assert (unmasked[: len(alone)] - alone).abs().max() > 1e-3


def test_a_sequence_is_routed_by_the_mean_of_its_real_tokens():
    model = converted("bert", sc.recipes.mov(num_experts=3, router="sequence"))
    with watched(model) as seen, sc.trace(model) as routing:
        logits(model, IDS, attention_mask=PADDING)
    for name, found in routing.items():
        layer = model.get_submodule(name)
        x_BSI, weight_EI = seen[layer][0], layer.router.scorer.weight
        for b, length in enumerate((12, SHORT)):
            expected_E = weight_EI @ x_BSI[b, :length].mean(0)
            for logits_E in found.logits_TE.reshape(2, 12, 3)[b]:
                assert torch.allclose(logits_E, expected_E, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_decoders_refuse_a_router_by_sequence(family):
    model = cases.dense(family)
    with pytest.raises(SurgeryError, match=r"would show a token what comes after it; use decides"):
        sc.convert(model, sc.recipes.mov(router="sequence"))
    assert not hasattr(model, "sparsecraft")


# -------------------------------------------------------------------------------------- the slots
def soft_moe(layer, x_BSI: torch.Tensor, mixed_BS: torch.Tensor, alone_BS: torch.Tensor):
    """The layer's output by Soft MoE's formula on the mixed tokens (Puigcerver et al. 2024, Eq. 1
    to 3), Y = C f(D^T X), and by the mixture for each token on those that stay alone."""
    phi_IE, bank = layer.router.scorer.weight.T, layer.experts
    y_BSO = layer.base(x_BSI)
    for b in range(len(x_BSI)):
        mixed, alone = mixed_BS[b].bool(), alone_BS[b].bool()
        scores_SE = x_BSI[b, mixed] @ phi_IE
        dispatch_SE, combine_SE = scores_SE.softmax(0), scores_SE.softmax(1)
        slots_EI = dispatch_SE.T @ x_BSI[b, mixed]
        expert = [bank.scale * bank.lora_B[e] @ bank.lora_A[e] for e in range(len(slots_EI))]
        out_EO = torch.stack([m @ x for m, x in zip(expert, slots_EI, strict=True)])
        y_BSO[b, mixed] += combine_SE @ out_EO
        for s in alone.nonzero().flatten():
            weights_E = (x_BSI[b, s] @ phi_IE).softmax(0)
            y_BSO[b, s] += sum(w * m @ x_BSI[b, s] for w, m in zip(weights_E, expert, strict=True))
    return y_BSO


@ENCODERS
def test_slots_in_an_encoder_are_soft_moe(family):
    model = converted(family, encoder_recipe(family, sc.recipes.smola, mixing="slots"))
    with watched(model) as seen, torch.no_grad():
        logits(model, IDS, attention_mask=PADDING)
        assert len(seen) >= 10
        for layer, (x_BSI, y_BSO) in seen.items():
            expected = soft_moe(layer, x_BSI, PADDING, torch.zeros_like(PADDING))
            kept = PADDING.bool()
            assert torch.allclose(y_BSO[kept], expected[kept], atol=1e-9)


def test_slots_mix_a_causal_models_prefix_and_leave_the_rest_alone():
    model, prefix = converted("llama", slots()), prefix_of(IDS)
    with watched(model) as seen, torch.no_grad():
        logits(model, IDS, prefix_mask=prefix)
        for layer, (x_BSI, y_BSO) in seen.items():
            expected = soft_moe(layer, x_BSI, prefix, 1 - prefix)
            assert torch.allclose(y_BSO, expected, atol=1e-9)


@CAUSAL
def test_slots_without_a_prefix_are_the_mixture_by_token(family):
    by_token = sc.recipes.smola(num_experts=3, rank=2, mixing="token")
    found = logits(converted(family, slots()), IDS)
    assert torch.allclose(found, logits(converted(family, by_token), IDS), atol=1e-9)


@CAUSAL
def test_slots_keep_a_causal_model_causal(family):
    model = converted(family, slots())
    for given in ({}, {"prefix_mask": prefix_of(IDS)}):
        before = logits(model, IDS, **given)
        for changed in range(PREFIX if given else 0, 12):
            ids = IDS.clone()
            ids[:, changed] = 50
            after = logits(model, ids, **given)
            assert torch.allclose(after[:, :changed], before[:, :changed], atol=1e-9)
            assert (after[:, changed] - before[:, changed]).abs().max() > 1e-4
    ids = IDS.clone()
    ids[:, PREFIX - 1] = 50  # the last token of the prefix is seen by its first
    after = logits(model, ids, prefix_mask=prefix_of(IDS))
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-4


@CAUSAL
@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_cached_steps_equal_one_pass(family, prefix):
    model, start = converted(family, slots()), 8
    given = {"prefix_mask": prefix_of(IDS, prefix)} if prefix else {}
    whole = logits(model, IDS, **given)
    first = {name: mask[:, :start] for name, mask in given.items()}
    with torch.no_grad():
        out = model(IDS[:, :start], use_cache=True, **first)
        steps = [out.logits]
        for at in range(start, 12):
            out = model(IDS[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_held_prefix_serves_beams_and_generation_without_a_cache(beams):
    model, found = converted("llama", slots()), {}
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "output_logits": True}
    for length in (0, PREFIX):
        with sc.context(model, prefix_mask=prefix_of(IDS, length)):
            for cache in (True, False):
                found[length, cache] = model.generate(
                    IDS, attention_mask=torch.ones_like(IDS), use_cache=cache,
                    return_dict_in_generate=True, **options,
                )  # fmt: skip
        cached, plain = found[length, True], found[length, False]
        assert torch.equal(cached.sequences, plain.sequences)
        for ours, theirs in zip(cached.logits, plain.logits, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
    assert (found[0, True].logits[0] - found[PREFIX, True].logits[0]).abs().max() > 1e-4
    expected = logits(model, IDS, prefix_mask=prefix_of(IDS))[:, -1]
    assert torch.allclose(found[PREFIX, True].logits[0][::beams], expected.float(), atol=1e-6)


# ------------------------------------------------------------------------------------- modalities
def by_modality(model, modality: str | None) -> list:
    return [layer for layer in model.sparsecraft.layers if layer.modality == modality]


@pytest.mark.parametrize("mixing", ["token", "slots"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_set_acts_on_its_own_tokens_only(family, mixing):
    recipe = sc.recipes.smola(num_experts=3, rank=2, mixing=mixing, modalities=True)
    model = converted(family, recipe)
    own = {None: VISUAL >= 0, "text": VISUAL == 0, "visual": VISUAL == 1}
    with watched(model) as seen, torch.no_grad():
        logits(model, IDS, mm_token_type_ids=VISUAL)
        for modality, mask in own.items():
            for layer in by_modality(model, modality):
                x_BSI, y_BSO = seen[layer]
                none, mask_BS = torch.zeros_like(mask), mask.expand(2, 12)
                mixes = mixing == "slots" and family == "bert"
                expected = soft_moe(layer, x_BSI, *((mask_BS, none) if mixes else (none, mask_BS)))
                assert torch.allclose(y_BSO, expected, atol=1e-9)
                assert torch.equal(y_BSO[~mask_BS], layer.base(x_BSI)[~mask_BS])


@pytest.mark.parametrize("mixing", ["token", "slots"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_set_learns_from_its_own_tokens_only(family, mixing):
    recipe = sc.recipes.smola(num_experts=3, rank=2, mixing=mixing, modalities=True)
    model = converted(family, recipe)
    for kinds, still in ((None, "visual"), (torch.ones_like(IDS), "text")):
        model.zero_grad()
        model(
            IDS, **({} if kinds is None else {"mm_token_type_ids": kinds})
        ).logits.sin().sum().backward()
        for modality in (None, "text", "visual"):
            moved = [
                layer.experts.lora_B.grad.abs().max() > 0 for layer in by_modality(model, modality)
            ]
            assert not any(moved) if modality == still else all(moved), modality


# ---------------------------------------------------------------------------------------- context
def test_a_context_holds_its_values_and_gives_them_back():
    model = converted("llama", slots())
    batch = model.sparsecraft.layers[0].batch
    plain, mixed = logits(model, IDS), logits(model, IDS, prefix_mask=prefix_of(IDS))
    with sc.context(model, prefix_mask=prefix_of(IDS)):
        for _ in range(2):
            assert torch.equal(logits(model, IDS), mixed)
        with sc.context(model, prefix_mask=prefix_of(IDS, 3)):
            inner = logits(model, IDS)
        assert torch.equal(logits(model, IDS), mixed) and not torch.equal(inner, mixed)
        # What a call brings along comes first.
        assert torch.equal(logits(model, IDS, prefix_mask=prefix_of(IDS, 3)), inner)
    assert torch.equal(logits(model, IDS), plain)
    with pytest.raises(ZeroDivisionError), sc.context(model, prefix_mask=prefix_of(IDS)):
        _ = 1 / 0
    assert batch.held == {} and batch.prefix_mask is None


def test_a_context_refuses_what_no_layer_asks_for():
    slotted = sc.context(converted("llama", slots()), prefix_masks=prefix_of(IDS))
    with pytest.raises(SparsecraftError, match=r"no field 'prefix_masks'.*Did you mean"), slotted:
        pass
    for model in (cases.dense("llama"), converted("llama", sc.recipes.mov(num_experts=3))):
        useless, said = sc.context(model, prefix_mask=prefix_of(IDS)), "No layer of this Llama"
        with pytest.raises(SparsecraftError, match=said), useless:
            pass


def test_a_copy_of_a_model_has_a_batch_of_its_own():
    model = converted("llama", slots())
    clone = copy.deepcopy(model)
    batches = [{id(layer.batch) for layer in m.sparsecraft.layers} for m in (model, clone)]
    assert len(batches[0]) == len(batches[1]) == 1 and batches[0] != batches[1]
    mixed = logits(clone, IDS, prefix_mask=prefix_of(IDS))
    assert model.sparsecraft.layers[0].batch.prefix_mask is None
    with sc.context(model, prefix_mask=prefix_of(IDS)):
        assert torch.equal(logits(model, IDS), mixed)
        assert torch.equal(logits(clone, IDS), logits(converted("llama", slots()), IDS))
    sc.revert(clone)
    assert not clone._forward_pre_hooks and model._forward_pre_hooks
    assert torch.equal(logits(clone, IDS), logits(cases.dense("llama").double(), IDS))
    assert torch.equal(logits(model, IDS, prefix_mask=prefix_of(IDS)), mixed)


def test_tokens_without_a_sequence_are_refused():
    with pytest.raises(SparsecraftError, match=r"needs tokens of shape .* got \(6, 4\)"):
        Batch().sequences(torch.zeros(6, 4))
    flat = Batch(shape=torch.Size((2, 3)))
    assert flat.sequences(torch.zeros(6, 4)).shape == (2, 3, 4)
