"""Merging: the merged model computes what the unmerged one did, or the merge is refused.

Shapes: E experts.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.conversion.merging import write as writing
from sparsecraft.conversion.merging.merge import read_weights
from sparsecraft.errors import CertificateError, MergeError, SurgeryError
from sparsecraft.evaluation.certificate import TOLERANCE
from sparsecraft.evaluation.whole import EQUAL
from sparsecraft.moe.experts.base import Experts, set_dispatch
from sparsecraft.moe.layer import MoELayer
from sparsecraft.recipe.experts import AdapterSpec, FFNLoRASpec, LoRASpec, VectorSpec
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.selections import TopK
from sparsecraft.surgery.budget import rectify, set_budget
from tests import tiny
from tests.cases import FAMILIES, RECIPES, SPLITS, D, E, F, R, batch, dense, logits, randomize_new
from tests.cases.members import member_model

WEIGHTS = [0.1, 0.2, 0.3, 0.4]

# Recipes whose layers are single experts, one for each kind of layer that folds.
SINGLE = {
    "lora": lambda: sc.recipes.lora(R),
    "ia3": sc.recipes.ia3,
    "mov_released": lambda: sc.recipes.mov(1, variant="released"),
    "mixlora": lambda: sc.recipes.mixlora(1, 1, rank=R),
    "hydralora": lambda: sc.recipes.hydralora(1, R),
    "upcycling": lambda: sc.recipes.upcycling(num_experts=1, top_k=1),
}
# What fixed routing makes of the others; those that are missing are refused.
FIXED = {
    "camelidae": "adapter",
    "camelidae_no_lora": "adapter",
    "camelidae_released": "adapter",
    "mov": "dense",
    "mov_raw": "dense",
    "mov_released": "dense",
    "molora": "dense",
    "molora_raw": "dense",
    "molora_released": "dense",
    "hydralora": "dense",
    "smola": "dense",
}
SAME_LAYERS = ("mov_top2", "mov_noise", "upcycling_all")  # as those of another row
SHARDS = ("virtual_groups", "virtual_groups_raw")  # refused: see test_neurons.py
ELSEWHERE = {*SAME_LAYERS, *SPLITS, *SHARDS, "bam"}  # bam: see test_attention.py
ROUTED = [name for name, case in RECIPES.items() if case.routed and name not in ELSEWHERE]
KINDS = ("llama", "phi3", "gpt2", "opt", "bert", "t5", "vit")


def converted(family: str, recipe: sc.Recipe, std: float = 0.05) -> torch.nn.Module:
    """A converted model whose experts do something, without the certificate of its start."""
    model = dense(family)
    sc.convert(model, recipe, certify=False)
    model.train().eval()  # copied experts get memory of their own
    randomize_new(model, std)
    return model


def custom(*edits: sc.Edit) -> sc.Recipe:
    return sc.Recipe(
        name="custom", title="t", paper="p", exact_at_start=True, edits=edits, stages=(sc.Stage(),)
    )


def scaled(site: str, place: str) -> sc.Edit:
    return sc.Edit(site=site, place=place, experts=VectorSpec(num_experts=1))


def lora(site: str, place: str = "beside", **changes) -> sc.Edit:
    return sc.Edit(site=site, place=place, experts=LoRASpec(rank=R), **changes)


def inside(experts: int) -> sc.Edit:
    return sc.Edit(
        site="ffn", place="inside", experts=FFNLoRASpec(num_experts=experts, rank=R),
        router=RouterSpec(select=TopK(1)),
    )  # fmt: skip


def difference(model: torch.nn.Module, family: str, wanted: torch.Tensor) -> float:
    found = logits(model, batch(family))
    return ((found - wanted).abs().max() / max(1.0, wanted.abs().max())).item()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("recipe", SINGLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_single_experts_become_dense_weights(family, recipe):
    plain, model = dense(family), converted(family, SINGLE[recipe]())
    wanted = logits(model, batch(family))
    assert difference(plain, family, wanted) > 1e-3 or recipe == "upcycling"
    report = sc.merge(model)
    assert report.result == "dense" and not report.kept and report.certificate.exact
    assert report.change.max_difference == report.certificate.max_difference
    assert difference(model, family, wanted) <= 1e-5
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not hasattr(model, "sparsecraft") and "save_pretrained" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "edits",
    [
        # Two layers on one module: on Phi-3 their rows overlap.
        (lora("linear"), scaled("ffn", "after")),
        (lora("ffn_linear"), scaled("ffn", "before")),
        (scaled("output", "before"), scaled("key", "after"), lora("gate")),
        (scaled("down", "before"), scaled("gate", "after")),
        (scaled("intermediate", "before"), scaled("query", "after"), scaled("key", "after")),
        # The LoRA reads what the vector has scaled.
        (scaled("activation", "after"), lora("down")),
        (scaled("intermediate", "after"), lora("down")),
    ],
    ids=["after", "before", "linears", "down", "before_chain", "activation", "intermediate"],
)
@pytest.mark.parametrize("family", KINDS)
def test_every_place_folds(family, edits):
    if family == "phi3" and edits[0].site == "intermediate" and edits[0].place == "before":
        pytest.skip("gate and up are one projection, and nothing stands before a part of it")
    model = converted(family, custom(*edits))
    wanted = logits(model, batch(family))
    assert sc.merge(model).result == "dense"
    assert difference(model, family, wanted) <= 1e-5


def test_layers_stacked_on_rows_of_one_module():
    """Phi-3: LoRA beside the whole of gate_up_proj, and around it vectors on its second half."""
    model = converted("phi3", custom(lora("linear"), scaled("intermediate", "after")))
    layers = [layer.base for layer in model.modules() if isinstance(layer, MoELayer)]
    assert any(isinstance(base, MoELayer) for base in layers)
    wanted = logits(model, batch("phi3"))
    sc.merge(model)
    assert difference(model, "phi3", wanted) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "t5_gated"])
def test_loras_inside_a_network_with_a_scaled_part(family):
    model = converted(family, custom(scaled("intermediate", "after"), inside(1)))
    wanted = logits(model, batch(family))
    sc.merge(model)
    assert difference(model, family, wanted) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_bfloat16_merges_within_its_tolerance(family):
    model = converted(family, sc.recipes.lora(R), std=0.02).to(torch.bfloat16)
    report = sc.merge(model)
    found = report.certificate
    assert found.dtype == "float32" and found.exact and found.max_difference < 1e-5 < found.rounding
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.9, 0.99])
def test_a_wrong_update_is_seen_in_any_type(factor, dtype, monkeypatch):
    """It is a small part of the weights, and smaller than what rounding them does."""
    module = sys.modules["sparsecraft.conversion.merging.merge"]
    fold = module.fold

    def wrong(model, item, bank, weights_E, ledger):
        fold(model, item, bank, weights_E * factor, ledger)

    monkeypatch.setattr(module, "fold", wrong)
    model = converted("llama", sc.recipes.lora(R)).to(dtype)
    with pytest.raises(CertificateError, match=r"in float32: different.*given back"):
        sc.merge(model)


def test_what_bfloat16_cannot_hold_is_told_from_a_wrong_update(monkeypatch):
    model = converted("llama", sc.recipes.lora(R), std=0.02).to(torch.bfloat16)
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 0.0)
    with pytest.raises(CertificateError, match=r"rounded to bfloat16, .*load it in float32"):
        sc.merge(model)


def test_a_weight_that_several_layers_change_is_rounded_once():
    """Phi-3: LoRA beside the whole of gate_up_proj, and around it vectors on its second half."""
    recipe = custom(lora("linear"), scaled("intermediate", "after"))
    found = sc.merge(converted("phi3", recipe).to(torch.bfloat16)).certificate
    assert found.exact and found.max_difference < 1e-5 < found.rounding


def test_a_folder_of_half_precision_is_compared_in_float32(folders, tmp_path, monkeypatch):
    module = writing
    write_dense = module.write_dense
    model = sc.load(folders["lora"], dtype="bfloat16")
    report = sc.merge(model)

    def wrong(model, folder, source):
        other = copy.deepcopy(model)
        other.model.layers[1].mlp.down_proj.weight.data *= 0.99
        write_dense(other, folder, source)

    good = module.write_merged(model, tmp_path / "good", report, folders["lora"], False)
    assert good.exact and good.dtype == "float32" and good.max_difference < 1e-6
    record = json.loads((tmp_path / "good" / "sparsecraft_export.json").read_text())
    assert record["read_back"]["power"] == good.power < 1e-3
    monkeypatch.setattr(module, "write_dense", wrong)
    with pytest.raises(CertificateError, match="gives other logits"):
        module.write_merged(model, tmp_path / "bad", report, folders["lora"], False)


def test_merging_attention_lora_keeps_experts_intact():
    model = converted("llama", sc.recipes.camelidae(num_experts=E, adapter_dim=8, lora_rank=R))
    wanted, before = logits(model, batch("llama")), snapshot(model)
    with pytest.raises(MergeError, match=r"partial=True \(--partial\) merges the other 14"):
        sc.merge(model)
    report = sc.merge(model, partial=True)
    assert report.result == "camelidae" and len(report.folded) == 14
    assert report.kept == {f"model.layers.{i}.mlp": "adapter" for i in range(2)}
    assert difference(model, "llama", wanted) <= 1e-5
    kept = {n: t for n, t in before.items() if ".mlp.experts." in n or ".router." in n}
    after = model.state_dict()
    assert len(kept) == 6 and all(torch.equal(after[n], t) for n, t in kept.items())
    assert [edit.site for edit in model.sparsecraft.recipe.edits] == ["ffn"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(kept)


def test_what_is_left_saves_loads_trains_and_reverts_to_the_merged_weights(tmp_path):
    folder = tiny.save_dense(tmp_path / "dense")
    model = sc.hub.load_dense(folder)
    sc.convert(model, sc.recipes.camelidae(num_experts=E, adapter_dim=8, lora_rank=R))
    randomize_new(model, 0.05)
    ids = {"input_ids": torch.arange(3, 23).view(2, 10)}
    wanted = logits(model, ids)
    sc.merge(model, partial=True)
    sc.save(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    again = sc.load(tmp_path / "merged")
    assert (logits(again, ids) - wanted).abs().max() <= 1e-5
    assert json.loads((tmp_path / "merged/report.json").read_text())["merge"]["how"] == "exact"
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(8))
    sc.train(again, rows, tmp_path / "sft", steps=1, batch_size=2, max_length=64, progress=False)
    dense_again = sc.revert(sc.load(tmp_path / "merged"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(dense_again.state_dict()[name], sc.revert(model).state_dict()[name])
    assert not torch.equal(
        dense_again.state_dict()[name], sc.hub.load_dense(folder).state_dict()[name]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5_gated"])
def test_plain_transformers_loads_the_merged_model(family, tmp_path):
    model = converted(family, sc.recipes.ia3())
    wanted = logits(model, batch(family))
    sc.merge(model)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert difference(again, family, wanted) <= 1e-5


# ------------------------------------------------------------------------------------------- fixed


@pytest.mark.parametrize("recipe", ROUTED)
@pytest.mark.parametrize("family", KINDS)
def test_fixed_routing_equals_the_mixture_of_the_experts_one_by_one(family, recipe):
    model = converted(family, RECIPES[recipe].make())
    if recipe not in FIXED:
        state = snapshot(model)
        with pytest.raises(MergeError, match=r"average|alone|has 2 experts"):
            sc.merge(model, "fixed", weights=WEIGHTS)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        return
    wanted = logits(routed_by_loop(model), batch(family))
    report = sc.merge(model, "fixed", weights=WEIGHTS)
    assert report.result == FIXED[recipe] and report.certificate.exact
    assert difference(model, family, wanted) <= 2e-5
    if report.result == "adapter":
        spec = model.sparsecraft.recipe.edits[0].experts
        assert (spec.num_experts, len(model.sparsecraft.recipe.edits)) == (1, 1)
        assert spec.dim == E * RECIPES[recipe].make().edits[0].experts.dim
        assert model.sparsecraft.recipe.stages[0].losses == {}


def routed_by_loop(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with every router answering WEIGHTS, and banks run by the slow loop."""
    from copy import deepcopy

    from sparsecraft.moe.routing import Routing

    model = deepcopy(model)
    set_dispatch(model, "loop")
    for layer in model.modules():
        if isinstance(layer, MoELayer) and layer.router is not None:

            def route(x, _=None, router=layer.router):
                width = router.scorer.width if router.spec.decides == "head" else x.shape[-1]
                rows = x.numel() // width
                weights = torch.tensor(WEIGHTS).expand(rows, E)
                return Routing(weights, torch.arange(E).repeat(rows, 1), torch.zeros(rows, E))

            layer.router.forward = route
    return model


def test_one_adapter_of_all_stays_small_on_its_base(tmp_path):
    """Without LoRA the dense weights are the base's, so that the checkpoint stands on it."""
    folder = tiny.save_dense(tmp_path / "dense")
    model = sc.hub.load_dense(folder)
    sc.convert(model, sc.recipes.camelidae(num_experts=E, adapter_dim=8, lora_rank=0))
    randomize_new(model)
    sc.merge(model, "fixed", weights=WEIGHTS)
    ids = {"input_ids": torch.arange(3, 23).view(2, 10)}
    sc.save(model, tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged" / "recipe.json").read_text())
    assert manifest["base"]["name"] == folder
    assert torch.equal(logits(sc.load(tmp_path / "merged"), ids), logits(model, ids))
    plain = sc.hub.load_dense(folder)
    assert torch.equal(logits(sc.revert(model), ids), logits(plain, ids))


def test_weights_by_layer_and_measured_ones():
    model = converted("llama", sc.recipes.molora(E, R))
    data = [batch("llama", labels=True)]
    with sc.trace(model) as routing:
        logits(model, batch("llama"))
    mean = {name: found.weights_TE().double().mean(0) for name, found in routing.items()}
    copy = converted("llama", sc.recipes.molora(E, R))
    measured = sc.merge(model, "fixed", weights="measured", data=data)
    given = sc.merge(copy, "fixed", weights=mean)
    assert difference(model, "llama", logits(copy, batch("llama"))) <= 1e-5
    assert measured.change.loss.keys() == {"data"} and not given.change.loss
    before, after = measured.change.loss["data"]
    assert before != after and measured.change.mean_kl > 0


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_routers_of_sequences_and_sentences_are_frozen_too(family):
    for router in ("sequence", "sentence"):
        paths = "encoder.*" if family == "t5" else "*"
        model = converted(family, sc.recipes.mov(E, router=router, paths=paths))
        assert sc.merge(model, "fixed", weights=WEIGHTS).certificate.exact


def test_measured_weights_leave_padding_out_and_cover_heads_and_decoders():
    for family, recipe in (
        ("llama", sc.recipes.mov(E, variant="released")),
        ("t5", sc.recipes.mov(E)),
    ):
        model = converted(family, recipe)
        long = batch(family, length=12, labels=True)
        padded = {k: torch.cat([v, torch.full((3, 5), 7)], 1) for k, v in long.items()}
        padded["labels"][:, 12:] = -100
        long["attention_mask"] = torch.ones(3, 12, dtype=torch.long)
        padded["attention_mask"] = torch.cat([long["attention_mask"], torch.zeros(3, 5).long()], 1)
        from sparsecraft.conversion.merging.frozen import measured_weights

        for case in (long, padded):
            case.pop("decoder_input_ids", None)
        left, right = measured_weights(model, [long]), measured_weights(model, [padded])
        for name in left:
            assert left[name].sum().item() == pytest.approx(1)
            assert torch.allclose(left[name], right[name], atol=1e-6), name


def test_measured_weights_count_a_decoders_own_tokens():
    """Encoder and decoder of equal length, with other padding each."""
    from sparsecraft.conversion.merging.frozen import measured_weights

    model, ids = converted("t5", sc.recipes.mov(E)), batch("t5")["input_ids"]
    real, answer = torch.ones_like(ids), torch.ones_like(ids)
    real[1, 5:], answer[0, 3:], answer[2, 9:] = 0, 0, 0
    labels = ids.flip(-1).masked_fill(answer == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": real}
    decoder = model.prepare_decoder_input_ids_from_labels(labels=labels)
    with sc.trace(model) as routing:
        logits(model, {**inputs, "decoder_input_ids": decoder})
    by_labels = measured_weights(model, [{**inputs, "labels": labels}])
    given = {"decoder_input_ids": decoder, "decoder_attention_mask": answer}
    for name, found in routing.items():
        crosses = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        kept = answer if "decoder" in name and not crosses else real
        mean = found.weights_TE()[kept.bool().reshape(-1)].double().mean(0)
        assert torch.allclose(by_labels[name], mean, atol=1e-6), name
    assert sum("EncDecAttention" in name for name in routing) >= 4
    by_mask = measured_weights(model, [{**inputs, **given}])
    first = "decoder.block.0.layer.0.SelfAttention.k"
    assert torch.allclose(by_mask[first], by_labels[first], atol=1e-6)
    every = {**inputs, "decoder_input_ids": decoder}  # nothing says that these are padding
    mean = routing[first].weights_TE().double().mean(0)
    assert torch.allclose(measured_weights(model, [every])[first], mean, atol=1e-6)
    wrong = {**every, "labels": labels[:, :6]}
    with pytest.raises(MergeError, match=r"has shape \(3, 6\), and it routed 36 rows; give"):
        measured_weights(model, [wrong])


def test_weights_that_name_one_expert_pick_that_network():
    model = converted("llama", sc.recipes.upcycling(num_experts=3))
    up = model.model.layers[1].mlp.experts.down[2].clone()
    report = sc.merge(model, "fixed", weights=[0, 0, 1])
    assert report.result == "dense"
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, up)
    model = converted("llama", sc.recipes.mixlora(3, 2, rank=R))
    assert sc.merge(model, "fixed", weights=[0, 1, 0]).result == "dense"


# ----------------------------------------------------------------------------------------- average


NOT_AVERAGED = ("smola_modalities", "nexus", "nexus_linear", "moepp", "moepp_released")
AVERAGED = [r for r in ROUTED if r not in NOT_AVERAGED]


@pytest.mark.parametrize("recipe", ["nexus", "nexus_linear"])
def test_networks_beside_the_dense_one_are_refused(recipe):
    model = converted("llama", RECIPES[recipe].make())
    with pytest.raises(MergeError, match="beside the dense network cannot take its place"):
        sc.merge(model, "average")


def test_what_computes_nothing_is_no_part_of_an_average():
    model = converted("llama", RECIPES["moepp"].make())
    with pytest.raises(MergeError, match="no feed-forward network"):
        sc.merge(model, "average")


@pytest.mark.parametrize("recipe", AVERAGED)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_average_is_the_mean_expert_and_says_what_it_changes(family, recipe):
    case = RECIPES[recipe]
    model = converted(family, case.make())
    same = converted(family, case.make())
    with torch.no_grad():
        for bank in (module for module in same.modules() if isinstance(module, Experts)):
            for name, parameter in bank.named_parameters():
                if name not in bank.one_for_all:
                    parameter.copy_(parameter.mean(0, keepdim=True).expand_as(parameter))
    report = sc.merge(model, "average")
    assert report.certificate is None
    assert report.change.max_difference > 1e-3 and report.change.mean_kl > 0
    if not any(word in recipe for word in ("raw", "released", "relu", "slots", "switch")):
        # Experts that are all the mean, mixed by weights that sum to one.
        assert difference(model, family, logits(same, batch(family))) <= 2e-5


def test_the_change_is_small_where_experts_are_alike():
    model = converted("llama", sc.recipes.mov(E), std=1e-6)
    change = sc.merge(model, "average", data=[batch("llama", labels=True)]).change
    assert change.max_difference < 1e-4 and change.mean_kl < 1e-8
    before, after = change.loss["data"]
    assert before == pytest.approx(after, abs=1e-5)


# --------------------------------------------------------------------------------------- refusals


def refused(model, reason, error=MergeError, **arguments) -> None:
    state, inputs = snapshot(model), batch("llama")
    wanted = logits(model, inputs)
    record = getattr(model, "sparsecraft", None)
    with pytest.raises(error, match=reason):
        sc.merge(model, **arguments)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, inputs), wanted)
    assert getattr(model, "sparsecraft", None) is record


def test_what_cannot_be_merged_is_refused_with_the_reason():
    refused(dense("llama"), "is dense; call sc.convert", SurgeryError)
    refused(converted("llama", sc.recipes.mov(E)), "depend on the token; use how='fixed'")
    refused(converted("llama", sc.recipes.adapter(8, lora_rank=0)), "an activation inside")
    refused(
        converted("llama", sc.recipes.adapter(8, lora_rank=0)), "nothing to merge", how="average"
    )
    refused(converted("llama", sc.recipes.smola(E, R, mixing="slots")), "slots mix", partial=True)
    visual = lora("linear", modality="visual")
    refused(converted("llama", custom(visual)), "acts on visual tokens alone")
    refused(converted("llama", custom(lora("ffn"))), "no Linear to be added to")
    refused(converted("llama", custom(scaled("activation", "before"))), "does not commute")


def test_arguments_that_do_not_fit_are_refused():
    model = converted("llama", sc.recipes.mov(E))
    refused(model, "Did you mean 'fixed'", how="fix")
    refused(model, "'fixed' needs weights", how="fixed")
    refused(model, "the other ways take none", how="average", weights=WEIGHTS)
    refused(model, "needs held-out data", how="fixed", weights="measured")
    refused(model, "or the word 'measured'", how="fixed", weights="mean", data=[])
    refused(model, "at least one batch", how="fixed", weights="measured", data=[])
    refused(model, r"sum to 0.9", how="fixed", weights=[0.1, 0.2, 0.2, 0.4])
    refused(model, r"shape \[2\] and the layer has 4", how="fixed", weights=[0.5, 0.5])
    refused(model, "none may be negative", how="fixed", weights=[2, -1, 0, 0])
    refused(model, "must be numbers", how="fixed", weights=[None] * 4)
    refused(model, "No routed layer is called 'layer'", how="fixed", weights={"layer": WEIGHTS})
    one = {"model.layers.0.mlp.up_proj": WEIGHTS}
    refused(model, "5 of 6 routed layers", how="fixed", weights=one)
    refused(converted("llama", sc.recipes.lora(R)), "no routing to fix", how="fixed", weights=[1.0])
    by_sentence = converted("llama", sc.recipes.mov(E, router="sentence"))
    data = [batch("llama", labels=True)]
    with pytest.raises(MergeError, match="the data has no embeddings"):
        sc.merge(by_sentence, "fixed", weights="measured", data=data)
    assert read_weights("0.5,0.5") == [0.5, 0.5] and read_weights(None) is None


def test_layers_that_stay_must_not_read_what_changes():
    """A vector on the activation goes into the columns of down, where the kept LoRA reads too."""
    routed = sc.Edit(
        site="down", place="beside", experts=LoRASpec(num_experts=2, rank=R), router=RouterSpec()
    )
    model = converted("llama", custom(scaled("activation", "after"), routed))
    refused(model, "merge both, or neither", partial=True)


def test_some_layers_of_an_edit_cannot_merge_and_others_stay():
    raw = RouterSpec(select=TopK(2, renormalize=False))
    adapters = AdapterSpec(num_experts=2, dim=8)
    recipe = custom(
        sc.Edit(site="ffn", place="after", experts=adapters, router=raw), lora("attention_linear")
    )
    model = converted("llama", recipe)
    refused(model, "sum to 0.900000", how="fixed", weights=[0.4, 0.5])
    mixed = {"model.layers.0.mlp": [0.5, 0.5], "model.layers.1.mlp": [0.5, 0.4]}
    refused(model, "which one recipe does not hold", how="fixed", weights=mixed, partial=True)


def test_partial_keeps_the_modalities_beside_the_merged_weights():
    model = converted("llama", RECIPES["smola_modalities"].make())
    report = sc.merge(model, "fixed", weights=WEIGHTS, partial=True)
    assert len(report.folded) == 14 and len(report.kept) == 28 and report.certificate.exact
    assert [edit.modality for edit in model.sparsecraft.recipe.edits] == ["text", "visual"]


def test_a_merge_that_fails_gives_the_model_back(monkeypatch):
    """However far it came: here the certificate refuses every function, an equal one too."""
    camelid = sc.recipes.camelidae(num_experts=E, adapter_dim=8, lora_rank=R)
    for recipe, arguments in (
        (camelid, {"partial": True}),
        (camelid, {"how": "fixed", "weights": WEIGHTS}),
        (sc.recipes.lora(R), {}),
        (sc.recipes.upcycling(num_experts=1, top_k=1), {}),
    ):  # fmt: skip
        model = converted("llama", recipe)
        state, wanted = snapshot(model), logits(model, batch("llama"))
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        with monkeypatch.context() as patch:
            patch.setattr("sparsecraft.evaluation.whole.EQUAL", -1.0)
            patch.setattr("sparsecraft.evaluation.certificate.TOLERANCE", {torch.float32: -1.0})
            with pytest.raises(CertificateError, match="given back"):
                sc.merge(model, **arguments)
        assert model.sparsecraft.recipe == recipe
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert torch.equal(logits(model, batch("llama")), wanted)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
        sc.revert(model)
        assert difference(dense("llama"), "llama", logits(model, batch("llama"))) == 0
    assert EQUAL == 1e-4


def test_shared_weights_are_not_changed_under_another_module():
    model = dense("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    sc.convert(model, sc.recipes.lora(R, paths="*0.self_attn.q_proj"), certify=False)
    randomize_new(model)
    wanted = logits(model, batch("llama"))
    with pytest.raises(MergeError, match="are one tensor"):
        sc.merge(model)
    assert torch.equal(logits(model, batch("llama")), wanted)


# ---------------------------------------------------------------------------------- split networks


def split(family: str, recipe: sc.Recipe | None = None, relu: bool = False) -> torch.nn.Module:
    """A split model of which every weight has changed, all experts on."""
    model = converted(family, recipe or sc.recipes.moefication(E, partition="random"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    if relu:
        rectify(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_split_then_merged_is_the_dense_model_bit_for_bit(family):
    plain, model = dense(family), dense(family)
    sc.convert(model, sc.recipes.moefication(E, partition="random"))
    parts = model.sparsecraft.layers[0].experts
    assert not torch.equal(parts.neurons.flatten(), torch.arange(F))
    report = sc.merge(model)
    assert report.result == "dense" and set(report.folded.values()) == {"split"}
    assert report.activation is None
    wanted, found = plain.state_dict(), model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert torch.equal(logits(model, batch(family)), logits(plain, batch(family)))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_changed_parts_merge_to_what_they_compute_together(tmp_path, family, relu):
    model = split(family, relu=relu)
    wanted = logits(model, batch(family))
    if family == "bert" and relu:
        return refused_family(model, family, "cannot say so: config.hidden_act would put it into")
    report = sc.merge(model)
    assert report.result == "dense" and report.certificate.exact
    assert difference(model, family, wanted) <= 1e-5
    was_relu = family in ("opt", "t5")
    assert (report.activation is not None) == (relu and not was_relu)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert difference(again, family, wanted) <= 1e-5


def refused_family(model, family, reason, **arguments) -> None:
    state, wanted = snapshot(model), logits(model, batch(family))
    with pytest.raises(MergeError, match=reason):
        sc.merge(model, **arguments)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, batch(family)), wanted)


def test_relu_is_said_in_every_configuration_and_the_report():
    model = split("t5_gated", relu=True)
    report = sc.merge(model)
    assert report.activation == "config.dense_act_fn" and "'relu' now" in str(report)
    for config in (model.config, model.encoder.config, model.decoder.config):
        assert (config.dense_act_fn, config.feed_forward_proj) == ("relu", "gated-relu")
    torch.manual_seed(0)
    base = transformers.BertConfig(**cases_bert())
    model = transformers.BertForSequenceClassification(base).eval()
    sc.convert(model, sc.recipes.moefication(E, partition="random"))
    rectify(model)
    wanted = logits(model, batch("bert"))
    assert sc.merge(model).activation == "config.hidden_act"
    assert difference(model, "bert", wanted) <= 1e-5


def cases_bert() -> dict[str, int]:
    sizes = FAMILIES["bert"].config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: sizes[name] for name in (*names, "vocab_size", "max_position_embeddings")}


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("BertForTokenClassification", True),
        ("BertForSequenceClassification", True),
        ("BertForMaskedLM", True),
        ("BertForQuestionAnswering", False),
        ("BertForMultipleChoice", False),
        ("BertModel", False),
        ("LlamaModel", False),
        ("LlamaForTokenClassification", True),
        ("ViTForImageClassification", True),
        ("ViTModel", False),
        ("CLIPModel", False),
        ("Wav2Vec2ForCTC", False),
    ],
)
@pytest.mark.parametrize("recipe", ["lora", "ia3"])
def test_models_of_any_head_merge(kind, classes, recipe, tmp_path):
    """What a recipe at Linears is trained on does not matter; the KL is of classes alone."""
    family = {"Bert": "bert", "Llam": "llama", "ViTF": "vit", "ViTM": "vit"}.get(kind[:4])
    known = {"CLIPModel": "clip", "Wav2Vec2ForCTC": "wav2vec2"}
    config = (dense(family) if family else member_model(known[kind])).config
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    randomize_new(model)
    report = sc.merge(model)
    assert report.result == "dense" and report.certificate.exact
    assert (report.change.mean_kl is not None) == classes


def test_a_number_has_no_kl():
    """Of one output or of several labels a softmax says nothing."""
    for kind in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        config = FAMILIES["bert"].config()
        config.update({"num_labels": 3} | kind)
        model = transformers.BertForSequenceClassification(config).eval()
        sc.convert(model, RECIPES["lora"].make(), certify=False)
        randomize_new(model)
        data = [{**batch("bert"), "labels": torch.zeros(3)}]
        change = sc.merge(model, data=data).change
        assert change.mean_kl is None and change.loss == {}


def test_relu_in_some_networks_is_what_no_configuration_says():
    recipe = sc.recipes.moefication(E, partition="random", paths="*.0.mlp")
    reason = "would put it into 'model.layers.1.mlp.act_fn' too"
    refused(split("llama", recipe, relu=True), reason)
    report = sc.merge(split("llama", recipe))
    assert list(report.folded) == ["model.layers.0.mlp"] and report.certificate.exact


@pytest.mark.parametrize("recipe", SPLITS)
def test_a_router_that_leaves_experts_out_is_not_merged(recipe):
    model = split("llama", RECIPES[recipe].make())
    set_budget(model, None)
    refused(model, "only the dense function")
    refused(model, "the parts of one network", how="average")
    refused(model, "the parts of one network", how="fixed", weights=WEIGHTS)
    set_budget(model, 1.0)
    wanted = logits(model, batch("llama"))
    assert sc.merge(model).result == "dense"
    assert difference(model, "llama", wanted) <= 1e-5


def test_parts_stay_beside_a_lora_that_merges(tmp_path):
    model = split("llama", sc.recipes.cmoe(E, 1, shared=1, variant="finetuned"))
    set_budget(model, 0.75)
    running, wanted = model.sparsecraft.running, logits(model, batch("llama"))
    report = sc.merge(model, partial=True)
    assert set(report.kept.values()) == {"split"} and set(report.folded.values()) == {"lora"}
    assert model.sparsecraft.running is running and running.budget == 0.75
    assert difference(model, "llama", wanted) <= 1e-5
    sc.save(model, tmp_path / "out")
    again = sc.load(tmp_path / "out")
    assert again.sparsecraft.running.budget == 0.75
    assert difference(again, "llama", wanted) <= 1e-5
    set_budget(again, 1.0)
    set_budget(model, 1.0)
    assert sc.merge(again).result == sc.merge(model).result == "dense"
    assert difference(again, "llama", logits(model, batch("llama"))) <= 1e-5


def test_a_network_that_imitates_a_linear_stays():
    model = split("llama", sc.recipes.d2dmoe(E, attention_experts=2, sparsity="none"))
    wanted = logits(model, batch("llama"))
    for layer in model.sparsecraft.layers:
        layer.experts.imitates = layer.place == "imitate"
    refused(model, "imitates a Linear")
    imitated = logits(model, batch("llama"))
    report = sc.merge(model, partial=True)
    assert len(report.folded) == 2 and len(report.kept) == 8
    assert difference(model, "llama", imitated) <= 1e-5
    model = split("llama", sc.recipes.d2dmoe(E, attention_experts=2, sparsity="none"))
    assert sc.merge(model).result == "dense"  # no projection is imitated yet
    assert difference(model, "llama", wanted) <= 1e-5
    model = split("llama", sc.recipes.d2dmoe(E, attention_experts=2), relu=True)
    for layer in model.sparsecraft.layers:
        layer.experts.imitates = layer.place == "imitate"
    refused(model, "whole or not at all", partial=True)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "t5_gated"])
def test_a_merge_of_parts_that_fails_gives_them_back(monkeypatch, family):
    plain = dense(family)
    model = dense(family)
    sc.convert(model, sc.recipes.moefication(E, partition="random"))
    randomize_new(model, 0.05)
    rectify(model)
    state, wanted = snapshot(model), logits(model, batch(family))
    layers, running = list(model.sparsecraft.layers), model.sparsecraft.running
    with monkeypatch.context() as patch:
        patch.setattr("sparsecraft.evaluation.whole.EQUAL", -1.0)
        patch.setattr("sparsecraft.evaluation.certificate.TOLERANCE", {torch.float32: -1.0})
        with pytest.raises(CertificateError, match="given back"):
            sc.merge(model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model, batch(family)), wanted)
    assert model.sparsecraft.running is running
    again = zip(model.sparsecraft.layers, layers, strict=True)
    assert all(new.experts is old.experts for new, old in again)
    sc.revert(model)
    assert torch.equal(logits(model, batch(family)), logits(plain, batch(family)))
    assert model.config.to_dict() == plain.config.to_dict()


def test_bfloat16_parts_merge():
    model = dense("llama").to(torch.bfloat16)
    wanted = snapshot(model)
    sc.convert(model, sc.recipes.moefication(E, partition="random"))
    for layer in model.sparsecraft.layers:  # as training leaves them
        layer.experts.float()
    assert sc.merge(model).certificate.dtype == "float32"
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())


# ------------------------------------------------------------------------------------- by command


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merging")
    base = tiny.save_dense(root / "dense")
    made = {
        "dense": Path(base),
        "rows": Path(tiny.write_rows(root / "rows.jsonl", tiny.chat_rows(12))),
    }
    recipes = {
        "camelid": sc.recipes.camelidae(num_experts=E, adapter_dim=8, lora_rank=R),
        "mov": sc.recipes.mov(E),
        "lora": sc.recipes.lora(R),
    }
    for name, recipe in recipes.items():
        model = sc.hub.load_dense(base)
        sc.convert(model, recipe, certify=False)
        randomize_new(model)
        made[name] = sc.save(model, root / name)
    return made


def run(capsys, *arguments: object) -> tuple[int, str]:
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out if status == 0 else captured.err


def test_the_command_merges_and_plain_transformers_reads(capsys, folders, tmp_path):
    out = tmp_path / "merged"
    status, text = run(capsys, "merge", folders["lora"], "--out", out)
    assert status == 0, text
    assert "14 layers into dense weights" in text and "Certificate against the model before" in text
    ids = torch.arange(3, 43).view(2, 20)
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import torch, sys, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'sparsecraft' not in sys.modules\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])\n"
    )
    arguments = [str(out), str(tmp_path / "ids.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=os.environ)
    wanted = logits(sc.load(folders["lora"]), {"input_ids": ids})
    assert (torch.load(tmp_path / "ids.pt") - wanted).abs().max() <= 1e-5
    record = json.loads((out / "sparsecraft_export.json").read_text())
    assert record["target"] == "dense" and record["change"]["max_difference"] <= 1e-5
    assert "license: apache-2.0" in (out / "README.md").read_text()
    status, text = run(capsys, "merge", folders["lora"], "--out", out)
    assert status == 1 and "exists already" in text
    assert run(capsys, "merge", folders["lora"], "--out", out, "--overwrite")[0] == 0


def test_the_command_freezes_and_averages_with_measured_losses(capsys, folders, tmp_path):
    data = ("--data", folders["rows"])
    options = ("--how", "fixed", "--weights", "measured", *data)
    status, text = run(capsys, "merge", folders["camelid"], "--out", tmp_path / "a", *options)
    assert status == 0 and "2 into one adapter each" in text, text
    assert "on 3 probe batch(es)" in text and f"{folders['rows']}: loss" in text
    assert sc.load(tmp_path / "a").sparsecraft.recipe.name == "adapter"
    status, text = run(
        capsys, "merge", folders["mov"], "--out", tmp_path / "b", "--how", "average", *data
    )
    assert status == 0 and "average, an approximation" in text and "mean KL" in text
    assert (
        type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")).__name__
        == "LlamaForCausalLM"
    )
    options = ("--how", "fixed", "--weights", "0.25,0.25,0.25,0.25")
    assert run(capsys, "merge", folders["mov"], "--out", tmp_path / "c", *options)[0] == 0


@pytest.mark.parametrize("work", [1e10, 1e4])
def test_a_window_that_the_folder_loses_is_seen_beyond_it(work, capsys, tmp_path, monkeypatch):
    config = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=1024,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    sc.convert(model, sc.recipes.lora(R))
    randomize_new(model)
    sc.save(model, tmp_path / "lora")
    monkeypatch.setattr("sparsecraft.dense.windows.MOST_WORK", work)
    status, text = run(capsys, "merge", tmp_path / "lora", "--out", tmp_path / "good")
    words = "in 1152 tokens would be seen" if work > 1e5 else "NOT compared beyond windows of 1024"
    assert status == 0 and words in text.splitlines()[-1]
    module = writing
    write_dense = module.write_dense

    def without(model, folder, source):
        write_dense(model, folder, source)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"sliding_window": None}))

    monkeypatch.setattr(module, "write_dense", without)
    if work > 1e5:
        status, text = run(capsys, "merge", tmp_path / "lora", "--out", tmp_path / "bad")
        assert status == 1 and "gives other logits" in text and not (tmp_path / "bad").exists()


def test_bad_merges_are_one_sentence_and_write_nothing(capsys, folders, tmp_path):
    def fails(*arguments) -> str:
        status, text = run(capsys, "merge", *arguments, "--out", tmp_path / "out")
        sentence = [line for line in text.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(sentence) == 1 and "Traceback" not in text
        assert not (tmp_path / "out").exists()
        return sentence[0]

    assert "--partial" in fails(folders["camelid"])
    assert "is dense" in fails(folders["dense"])
    assert "numbers such as" in fails(folders["mov"], "--how", "fixed", "--weights", "much")
    assert "needs weights" in fails(folders["mov"], "--how", "fixed")
    assert D != F  # rows and columns cannot be mistaken for one another
