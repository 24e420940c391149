"""What the certificate sees, what it lets pass, and what it says that it has not seen."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import CertificateError
from sparsecraft.evaluation.certificate import compare
from sparsecraft.evaluation.distance import distance, power
from sparsecraft.evaluation.history import history_lines
from sparsecraft.evaluation.layerwise import Comparison, certify
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.lending import Lender
from sparsecraft.moe.outputs import outputs
from sparsecraft.surgery.record import conversion_of
from tests.cases.families import dense, logits
from tests.cases.recipes import RECIPES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
VISION = {**SIZES, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}


def converted(dtype=torch.float32, recipe=None, family="llama"):
    """A converted model, without a certificate, and the logits that it had for one batch."""
    model = dense(family).to(dtype)
    batch = {"input_ids": torch.arange(40).view(2, 20)}
    before = outputs(model, [batch])
    recipe = recipe or sc.recipes.upcycling(num_experts=4, top_k=2)
    sc.convert(model, recipe, certify=False)
    return model, batch, before


def certificate(model, batch, before, **kwargs):
    return certify(model, [batch], before, **kwargs)


# ------------------------------------------------------------------------------------ what it sees


@torch.no_grad()
def scaled(bank, factor):
    bank.down.mul_(factor)


@torch.no_grad()
def off_by_a_bias(bank):
    """One feature of one expert is off by the least that its type holds, or a thousandth."""
    bias = bank.down_bias[0]
    bias[3] *= 1 + max(1e-3, torch.finfo(bias.dtype).eps)


@torch.no_grad()
def swapped_rows(bank):
    bank.down[1, [4, 5]] = bank.down[1, [5, 4]]


@torch.no_grad()
def half_gate(bank):
    """What a wrong order of fused rows does."""
    bank.gate_up[2] = bank.gate_up[2].roll(1, 0)


FAULTS = {
    "0.9": lambda bank: scaled(bank, 0.9),
    "0.99": lambda bank: scaled(bank, 0.99),
    "bias": off_by_a_bias,
    "rows": swapped_rows,
    "gate": half_gate,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_layer_is_seen_in_any_type(fault, dtype):
    model, batch, before = converted(dtype)
    assert certificate(model, batch, before).exact
    layer = model.model.layers[1].mlp
    FAULTS[fault](layer.experts)
    found = certificate(model, batch, before)
    assert not found.exact and found.worst == "model.layers.1.mlp"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.9, 0.999, 1 + 1e-4])
def test_a_scaled_output_is_seen_as_small_as_the_certificate_says(factor, dtype, monkeypatch):
    model, batch, before = converted(dtype)
    fine = certificate(model, batch, before)
    assert fine.exact and fine.power < 3e-5 < abs(1 - factor)
    layer, forward = model.model.layers[0].mlp, MoELayer.forward

    def wrong(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output * factor if self is layer else output

    monkeypatch.setattr(MoELayer, "forward", wrong)
    found = certificate(model, batch, before)
    assert not found.exact and found.worst == "model.layers.0.mlp"
    assert found.max_difference / found.scale == pytest.approx(abs(1 - factor), rel=0.6)


def test_an_error_below_the_power_is_not_claimed_to_be_seen():
    model, batch, before = converted()
    fine = certificate(model, batch, before)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        output = layer(x)
    assert distance(output * (1 + fine.power), output).equal is False
    assert distance(output * (1 + fine.power / 4), output).equal


def test_a_fault_of_the_models_own_type_alone_is_seen(monkeypatch):
    """As of a kernel that only bfloat16 takes: in float32 all is right."""
    model, batch, before = converted(torch.bfloat16)
    forward = FFNExperts.forward

    def wrong(self, x, *args):
        return forward(self, x, *args) * (0.8 if x.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(FFNExperts, "forward", wrong)
    found = certificate(model, batch, before)
    assert found.max_difference <= found.tolerance and not found.exact
    assert "in bfloat16, the model's own type" in str(found)


def test_the_dense_side_is_no_view_of_the_copies():
    """A donor that reads its network in a wrong way makes wrong copies, which its own view would
    find equal."""
    model, batch, before = converted()
    record = conversion_of(model)
    bank, item = record.layers[0].experts, record.plan[0]
    with torch.no_grad():
        bank.down.mul_(0.5)
        item.donor.down.module.weight.data = item.donor.down.module.weight * 1.0
    assert not certificate(model, batch, before).exact


def test_what_is_wrong_outside_of_the_layers_shows_in_the_outputs():
    model, batch, before = converted()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    found = certificate(model, batch, before)
    assert found.max_difference <= found.tolerance and not found.exact
    assert "the model's outputs differ" in str(found)
    assert found.logit_difference > 0.1 and found.logit_scale == before[0].abs().max().item()


def test_a_nan_is_no_equality():
    zeros, nan = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    assert not distance(nan, zeros).equal and not distance(zeros, nan).equal
    assert not compare([zeros], [nan]).exact
    mixed = torch.ones(4, 3)
    mixed[2, 1] = float("nan")
    assert not distance(mixed, torch.ones(4, 3)).equal


def test_outliers_hide_no_error_of_other_tokens_or_features():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(64, 32, generator=generator)
    wanted[0] *= 1e5  # as a first token has it
    wanted[:, 7] *= 1e3  # as a feature has it
    found = wanted.clone()
    found[5, 7] *= 1 + 1e-4
    assert not distance(found, wanted).equal
    assert distance(wanted * (1 + 1e-6), wanted).equal


def test_power_is_what_scaling_the_output_shows():
    wanted = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    least = power(wanted, wanted)
    assert 1e-5 <= least < 2e-5
    assert not distance(wanted.double() * (1 + least), wanted).equal
    assert power(wanted.bfloat16(), wanted.bfloat16()) > 0.05
    assert power(torch.zeros(3, 2), torch.zeros(3, 2)) is None


# ------------------------------------------------------------------------------- what it lets pass


def test_a_deep_correct_model_in_bfloat16_is_exact():
    """Its logits move by more than a fixed share of their size, because every layer rounds."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 24})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2.5 / parameter.shape[-1] ** 0.5)
    model.to(torch.bfloat16)
    found = sc.convert(model, sc.recipes.upcycling(num_experts=4, top_k=2)).certificate
    assert found.exact and found.ran == found.layers == found.lifted == 24
    assert found.logit_difference > 0.05 * found.logit_scale
    assert found.dtype == "float32" and found.power < 3e-5


def test_rounding_of_float32_is_told_from_a_fault_by_float64(monkeypatch):
    """A product that is as coarse as a GPU's TF32 in float32."""
    model, batch, before = converted()
    linear = torch.nn.functional.linear

    def coarse(x, weight, bias=None):
        rounding = 0 if x.dtype == torch.float64 else 1e-4
        return linear(x * (1 + rounding * torch.sin(1e3 * x)), weight, bias)

    layer = model.model.layers[0].mlp
    monkeypatch.setattr(layer.experts, "dispatch", "loop")
    monkeypatch.setattr("sparsecraft.moe.experts.ffn.F.linear", coarse, raising=False)
    found = certificate(model, batch, before)
    assert found.exact and found.max_difference < 1e-6
    with torch.no_grad():
        layer.experts.down[0, 3] *= 1 + 1e-3
    assert not certificate(model, batch, before).exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["camelidae", "upcycling", "molora", "mov", "gmoefication"])
def test_every_kind_of_layer_is_lifted(recipe, dtype):
    model = dense("llama").to(dtype)
    case = RECIPES.get(recipe) or RECIPES["molora"]
    found = sc.convert(model, case.make()).certificate
    assert found.exact is case.exact and found.ran == found.layers == found.lifted
    assert found.power < 3e-5 and found.dtype == "float32"
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_probe_leaves_no_trace():
    model = dense("llama")
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    before = [torch.get_rng_state(), [m.training for m in model.modules()]]
    sc.convert(model, sc.recipes.molora(num_experts=2))
    layers = conversion_of(model).layers
    sc.revert(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert not [m for m in layers if "forward" in vars(m) or "route" in vars(m)]


def test_frequencies_that_grow_with_the_length_come_back():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**TEXT, rope_parameters=rope)
    model = transformers.LlamaForCausalLM(config).eval()
    kept = model.model.rotary_emb.inv_freq
    outputs(model, [{"input_ids": torch.zeros(1, 100, dtype=torch.long)}])
    assert model.model.rotary_emb.inv_freq is kept


def test_dropout_of_a_dense_module_that_was_training_is_no_difference():
    model = dense("gpt2").train()
    found = sc.convert(model, sc.recipes.upcycling(num_experts=2)).certificate
    assert found.exact and model.transformer.h[0].mlp.training


# -------------------------------------------------------------------------- what did not run


def test_experts_that_no_token_chose_are_run_all_the_same():
    """The router sends all tokens to two of four; another expert is wrong."""
    model, batch, before = converted()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        for each in conversion_of(model).layers:
            each.router.scorer.weight.zero_()
    comparison = Comparison(model, Lender(), claims=False)
    comparison.run([batch])
    idle = min(set(range(4)) - comparison.found[layer].chosen)
    with torch.no_grad():
        layer.experts.down[idle] *= 0.9
    comparison = Comparison(model, Lender(), claims=False)
    comparison.run([batch])
    assert comparison.certificate(1).exact  # not reached
    found = certificate(model, batch, before)
    assert (found.experts, found.chosen, found.forced) == (8, 4, 4)
    assert not found.exact and found.worst == "model.layers.0.mlp"
    assert "tokens chose 4 of 8 experts; 4 of the others were run" in str(found)


def test_shards_that_no_token_chose_are_not_run_alone():
    """A shard of a network is not the dense function, and the model starts exactly all the same."""
    recipe = sc.recipes.virtual_groups(num_experts=5, granularity=2, top_k=2)
    found = sc.convert(dense("gpt2"), recipe).certificate
    assert found.exact and found.forced == 0
    assert found.chosen < found.experts


def test_layers_that_no_probe_reached_are_counted_and_named():
    """A decoder-only probe does not run what reads images."""
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT), image_token_id=90
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    sc.convert(model, sc.recipes.upcycling(num_experts=2), certify=False)
    text = {"input_ids": torch.arange(20).view(1, 20)}
    comparison = Comparison(model, Lender(), claims=True)
    comparison.run([text])
    comparison.run_alone()
    found = comparison.certificate(1)
    assert (found.layers, found.ran, found.alone) == (4, 2, 2) and found.exact
    assert len(found.unreached) == 2 and all("vision" in path for path in found.unreached)
    assert "exact in 2 of 4 layers" in str(found) and "2 did not run on the probe" in str(found)
    with torch.no_grad():
        conversion_of(model).layers[0].experts.down.mul_(0.9)
    comparison = Comparison(model, Lender(), claims=True)
    comparison.run([text])
    comparison.run_alone()
    assert not comparison.certificate(1).exact


def test_nothing_that_ran_is_nothing_proven():
    model, _, _ = converted()
    found = Comparison(model, Lender(), claims=True).certificate(0)
    assert found.ran == found.alone == 0 and not found.exact


def test_a_model_with_images_is_probed_with_images():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=90,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    found = sc.convert(model, sc.recipes.upcycling(num_experts=2)).certificate
    assert found.exact and found.ran == found.layers == 4 and not found.unreached


def test_a_dense_model_that_runs_on_no_probe_is_compared_alone(monkeypatch, caplog):
    model = dense("llama")

    def only_with_a_cup_of_tea(*args, tea=None, **kwargs):
        raise ValueError("no tea")

    monkeypatch.setattr(model, "forward", only_with_a_cup_of_tea)
    found = sc.convert(model, sc.recipes.upcycling(num_experts=2)).certificate
    assert found.exact and (found.ran, found.alone, found.layers) == (0, 2, 2)
    assert "does not run on random inputs (no tea)" in caplog.text


def skipping(monkeypatch):
    """A model that leaves its second block out."""
    model = dense("llama")
    monkeypatch.setattr(model.model.layers[1], "forward", lambda hidden, *args, **kwargs: hidden)
    return model


def test_an_error_of_a_converted_layer_is_no_layer_that_was_not_reached(monkeypatch):
    forward, called = FFNExperts.forward, []

    def wrong(self, *args):
        called.append(self)
        if self is not called[0]:
            raise ValueError("a fault of ours")
        return forward(self, *args)

    monkeypatch.setattr(FFNExperts, "forward", wrong)
    model = skipping(monkeypatch)
    with pytest.raises(ValueError, match="a fault of ours"):
        sc.convert(model, sc.recipes.upcycling(num_experts=2))
    assert not isinstance(model.model.layers[1].mlp, MoELayer)


def test_a_layer_that_refuses_hidden_states_alone_is_counted_as_not_reached(monkeypatch):
    def refuse(self, *args):
        raise sc.errors.SparsecraftError("give sentence_embeddings")

    model = skipping(monkeypatch)
    sc.convert(model, sc.recipes.upcycling(num_experts=2), certify=False)
    monkeypatch.setattr(model.model.layers[1].mlp.experts, "forward", refuse)
    comparison = Comparison(model, Lender(), claims=True)
    comparison.run([{"input_ids": torch.arange(40).view(2, 20)}])
    comparison.run_alone()
    found = comparison.certificate(1)
    assert (found.ran, found.alone, found.unreached) == (1, 0, ("model.layers.1.mlp",))


# ------------------------------------------------------------------------------------ what it says


def test_a_recipe_that_does_not_claim_reports_its_distance():
    found = sc.convert(dense("llama"), sc.recipes.drop_upcycling(2)).certificate
    assert not found.exact and found.max_difference > 1e-3 and found.logit_difference > 0
    assert "different in 2 layers" in str(found) and "no equality was claimed" in str(found)


@pytest.mark.parametrize("sources", [0, 2])
def test_the_report_says_whether_equality_was_claimed(sources, tmp_path):
    """A claim is about copies of one model, and not about sources."""
    model, others = dense("llama"), [dense("llama") for _ in range(sources)]
    for other in others:
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    recipe = sc.recipes.upcycling(num_experts=2)
    found = sc.convert(model, recipe, sources=others).certificate
    assert recipe.exact_at_start and found.claimed is found.exact is (not sources)
    sc.save(model, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["conversion"]["certificate"]["claimed"] is (not sources)
    said = "At the start: claimed not exact" if sources else "At the start: claimed exact"
    assert said in "\n".join(history_lines(recipe, report))


def test_an_attention_is_compared_with_its_masks_and_positions():
    recipe = RECIPES["bam"].make()
    model = dense("llama")
    found = sc.convert(model, recipe).certificate
    assert found.ran == found.layers == 4
    claimed = dataclasses.replace(recipe, exact_at_start=True)
    with pytest.raises(CertificateError, match="different in 4 layers"):
        sc.convert(dense("llama"), claimed)


def test_inner_and_outer_layers_are_each_compared():
    """LoRAs inside a network that adapters stand behind: each has a dense module of its own."""
    found = sc.convert(dense("bert"), RECIPES["camelidae"].make()).certificate
    assert found.exact and found.ran == found.layers == 14


def test_the_report_keeps_the_old_fields_and_the_new(tmp_path):
    model = dense("llama")
    sc.convert(model, sc.recipes.upcycling(num_experts=2))
    sc.save(model, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())["conversion"]["certificate"]
    old = {"max_difference", "scale", "tolerance", "dtype", "probes", "layers"}
    assert old | {"ran", "power", "unreached", "experts", "chosen"} <= data.keys()
    assert (data["layers"], data["ran"]) == (2, 2) and 1e-5 <= data["power"] < 3e-5


def test_a_quantized_layer_is_compared_in_the_models_type():
    """Where the weights are integers, nothing is lifted, and the power says so."""
    model, batch, before = converted(torch.bfloat16, sc.recipes.molora(num_experts=2))
    layer = conversion_of(model).layers[0]
    packed = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    layer.base.register_parameter("packed", packed)
    found = certificate(model, batch, before)
    assert found.exact and found.lifted == found.layers - 1 and found.power > 0.05


def test_the_model_is_as_before_the_certificate():
    model, batch, before = converted(torch.bfloat16)
    state = copy.deepcopy(model.state_dict())
    wanted = logits(model, batch)
    certificate(model, batch, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, batch), wanted)
