"""Split networks among everything else: Auto classes, copies, compilation, inspection, reports."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.conversion.matching import match_params
from sparsecraft.dense import hub
from sparsecraft.errors import RecipeError
from sparsecraft.evaluation.held_out import evaluate
from sparsecraft.evaluation.report import describe
from sparsecraft.evaluation.routing import first_choices_E, mutual_information
from sparsecraft.moe.routing import Routing
from sparsecraft.surgery.budget import set_budget, split_layers
from tests import tiny
from tests.cases import dense, logits, randomize_new

IDS = {"input_ids": torch.arange(3, 43).view(2, 20)}
E = 8

# One recipe for each rule: top-k, top-k with shared experts, relative, share, threshold.
RULES = {
    "moefication": lambda: sc.recipes.moefication(E, 2, partition="random"),
    "cmoe": lambda: sc.recipes.cmoe(E, 3, shared=2),
    "d2dmoe": lambda: sc.recipes.d2dmoe(E, 0.8, router_dim=8),
    "dsti": lambda: sc.recipes.dsti(E, 0.5, router_dim=8),
    "lte": lambda: sc.recipes.lte(E),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny.save_dense(tmp_path_factory.mktemp("split") / "dense")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[str]:
    """Two files of different rows."""
    root, made = tmp_path_factory.mktemp("rows"), tiny.chat_rows(10)
    return [tiny.write_rows(root / f"{i}.jsonl", made[i * 5 :][:5]) for i in range(2)]


def split(base: str, recipe: sc.Recipe, budget: float | None = None) -> torch.nn.Module:
    """A split model on a base on disk, with routers that tell tokens apart."""
    model = hub.load_dense(base)
    sc.convert(model, recipe, certify=False)
    randomize_new(model, std=0.2)
    for layer in split_layers(model).values():
        if getattr(layer.router.scorer, "bias", None) is not None:
            layer.router.scorer.bias.data.zero_()
    model.train().eval()
    set_budget(model, budget)
    return model


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    """A MoEfied model after both of its stages, and its folder."""
    model, out = hub.load_dense(base), tmp_path_factory.mktemp("trained") / "out"
    sc.convert(model, sc.recipes.moefication(E, 2))
    options = {"steps": 2, "batch_size": 4, "max_length": 64, "fit_tokens": 200, "progress": False}
    sc.train(model, rows, out, learning_rate=1e-2, **options)
    return model, out


# ------------------------------------------------------------------------------- loading and copies


@pytest.mark.parametrize("name", RULES)
def test_every_door_gives_the_logits_of_the_saved_budget(tmp_path, base, name):
    model = split(base, RULES[name]())
    wanted = logits(model, IDS)
    set_budget(model, 1.0)
    every = logits(model, IDS)
    assert (wanted - every).abs().max() > 1e-4
    for budget, expected in ((1.0, every), (None, wanted)):
        set_budget(model, budget)
        model.save_pretrained(tmp_path / "saved")
        for door in (sc.load, transformers.AutoModelForCausalLM.from_pretrained):
            again = door(tmp_path / "saved")
            assert again.sparsecraft.running.budget == budget
            assert torch.equal(logits(again, IDS), expected)


@pytest.mark.parametrize("router", ["mlp", "oracle"])
def test_a_copy_runs_alone(base, router):
    model = split(base, sc.recipes.moefication(E, 2, partition="random", router=router))
    wanted = logits(model, IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, IDS), wanted)
    set_budget(twin, 1.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(logits(twin, IDS), wanted)
    assert torch.equal(logits(model, IDS), wanted)
    assert model.sparsecraft.running.budget is None


def test_a_trained_split_reverts_to_the_base_on_disk(base, trained):
    model, out = trained
    wanted = logits(hub.load_dense(base), IDS)
    assert model.sparsecraft.layers[0].experts.activation.__class__ is torch.nn.ReLU
    for each in (copy.deepcopy(model), sc.load(out)):
        assert not torch.allclose(logits(each, IDS), wanted, atol=1e-4)
        sc.revert(each)
        assert torch.equal(logits(each, IDS), wanted)
        assert each.config.hidden_act == "silu"


def test_a_compiled_split_gives_the_same_logits(base):
    model = split(base, RULES["moefication"]())
    wanted = logits(model, IDS)
    try:
        found = logits(torch.compile(model, backend="aot_eager"), IDS)
    finally:
        torch.compiler.reset()
    assert (found - wanted).abs().max() <= 1e-5


def test_packed_weights_cannot_be_dealt_out(base):
    """As four bits are, without the library that packs them."""
    model = hub.load_dense(base)
    for layer in model.model.layers:
        packed = layer.mlp.up_proj.weight.detach().to(torch.uint8)
        layer.mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(sc.SparsecraftError, match=r"is quantized .* without quantization"):
        sc.convert(model, RULES["moefication"](), certify=False)
    assert not hasattr(model, "sparsecraft")


def test_four_bits_cannot_be_dealt_out(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs sparsecraft[quant]")
    folder = tiny.save_dense(tmp_path / "dense", width=128)
    model = hub.load_dense(folder, quantize="nf4")
    with pytest.raises(RecipeError, match="loaded with 'nf4'"):
        sc.convert(model, RULES["moefication"]())
    recipe = sc.override(RULES["moefication"](), {"base_quantization": "nf4"})
    with pytest.raises(sc.SparsecraftError, match=r"is quantized .* without quantization"):
        sc.convert(model, recipe)
    assert not hasattr(model, "sparsecraft")


# --------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("name", RULES)
def test_the_routing_of_parts_is_summarized(base, rows, name):
    model, options = split(base, RULES[name]()), {"tokenizer": tiny.tokenizer()}
    found = evaluate(model, rows, **options)["routing"]
    assert 0 < found["load_entropy_min"] <= found["load_entropy"] < 1
    assert 0 < found["mutual_information_bits"] <= 1
    set_budget(model, 1.0)
    whole = evaluate(model, rows, **options)["routing"]
    assert whole["load_entropy"] == whole["load_entropy_min"] == pytest.approx(1)
    assert whole["mutual_information_bits"] == 0


def test_the_first_choice_among_equals_is_the_highest_score():
    """Three tokens, four experts, of which the first is shared."""
    weights_TE = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]])
    logits_TE = torch.tensor([[0.0, 2, 9, 3], [0, 9, -1, -2], [0, -4, -3, 9]])
    indices_TE = torch.where(weights_TE > 0, torch.arange(4), 4)
    routing = Routing(weights_TE, indices_TE, logits_TE, in_order=True)
    assert first_choices_E(routing).tolist() == [0, 0, 2, 1]
    assert mutual_information(torch.zeros(2, 4)) == 0


# --------------------------------------------------------------------------------- in words


def lines_of(model: torch.nn.Module, folder) -> str:
    sc.save(model, folder, overwrite=True)
    return "\n".join(describe(folder))


def test_a_trained_split_is_described(trained, capsys):
    _, out = trained
    assert main(["inspect", str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "8 x 8 neurons by kmeans (ReLU), weighted by one; those that do not run give nothing",
        "Stages: sparsify done, router done.",
        "Budget: the recipe's own rule, 2 of 8 experts.",
        "Calibration: not needed, top-k follows from the budget.",
        "Fitted (router):",
        "mass captured by 20% of the experts: router",
        "Trained (sparsify): 2 steps",
        "active",
    ):
        assert words in text, words
    # 2 (A: 8 x 32, B: 8 x 8; 2 of 8 experts of 3 x 32 x 64), of two networks.
    wanted = 2 * 2 * (8 * 32 + 8 * 8 + 3 * 32 * 64 // 4)
    assert f"FFN FLOPs per token: {wanted:,} of {2 * 2 * 3 * 32 * 64:,} (" in text


def test_budgets_and_calibrations_are_described(base, tmp_path):
    model = split(base, RULES["d2dmoe"](), budget=1.0)
    text = lines_of(model, tmp_path / "out")
    assert "Stages: sparsify to do, router to do." in text
    assert "Budget: 1.0, every expert runs, which is the dense function." in text
    assert "(100.0%), routers included" in text
    set_budget(model, None)
    text = lines_of(model, tmp_path / "out")
    assert "Budget: the recipe's own rule, relative at threshold 0.8." in text
    assert "FFN FLOPs per token: not known; `sparsecraft calibrate`" in text
    model.sparsecraft.running.calibration = [(0.2, 0.9), (0.6, 0.1)]
    set_budget(model, 0.4)
    text = lines_of(model, tmp_path / "out")
    assert "Budget: 0.4, relative at threshold 0.5." in text
    assert "Calibration: 2 points, shares 0.200 to 0.600 at thresholds 0.9 to 0.1." in text
    text = lines_of(split(base, RULES["cmoe"](), budget=0.5), tmp_path / "out")
    assert "Budget: 0.5, 2 of 8 experts beside 2 shared." in text
    assert "by activation (SiLUActivation)" in text and "give nothing" in text
    imitating = split(base, sc.recipes.d2dmoe(E, attention_experts=2), budget=1.0)
    text = lines_of(imitating, tmp_path / "out")
    assert "8 networks that imitate Linears, 0 of them fitted and running" in text


def test_models_without_split_networks_are_described_as_before(base, tmp_path):
    model = hub.load_dense(base)
    sc.convert(model, sc.recipes.lora(4))
    text = lines_of(model, tmp_path / "out")
    assert "Budget" not in text and "FLOPs per token:" not in text


# --------------------------------------------------------------------------------- baselines


def test_a_split_has_no_parameters_to_be_matched():
    with pytest.raises(RecipeError, match="as many steps on the same data"):
        match_params(sc.recipes.lora, RULES["lte"](), dense("llama"))
    with pytest.raises(RecipeError, match="has no size to be matched"):
        match_params(sc.recipes.moefication, sc.recipes.lora(4), dense("llama"))


# ------------------------------------------------------------------------------ merging by command


def test_the_command_merges_what_runs_whole(base, trained, tmp_path, capsys):
    model, out = trained
    assert main(["merge", str(out), "--out", str(tmp_path / "dense")]) == 1
    error = capsys.readouterr().err
    assert "set_budget(model, 1.0)" in error and not (tmp_path / "dense").exists()
    model = sc.load(out)
    set_budget(model, 1.0)
    sc.save(model, tmp_path / "whole")
    assert main(["merge", str(tmp_path / "whole"), "--out", str(tmp_path / "dense")]) == 0
    assert "config.hidden_act is 'relu' now" in " ".join(capsys.readouterr().out.split())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(plain) is transformers.LlamaForCausalLM and not hasattr(plain, "sparsecraft")
    assert (logits(plain, IDS) - logits(model, IDS)).abs().max() <= 1e-5
    assert json.loads((tmp_path / "dense/config.json").read_text())["hidden_act"] == "relu"
    record = json.loads((tmp_path / "dense/sparsecraft_export.json").read_text())
    assert record["activation"] == "config.hidden_act"
