"""Experts that come to a trained mixture, and that leave it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.conversion.domains.domain import Domain
from sparsecraft.conversion.extension.router_row import (
    RIDGE,
    SURE,
    fit_row,
    inputs_of,
    ridge_row,
)
from sparsecraft.conversion.sources.gather import donor_tensors
from sparsecraft.errors import DataError, RecipeError, SourceError, SurgeryError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_tensors
from sparsecraft.moe.routers.build import build_router
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Linear, Normal
from sparsecraft.recipe.selections import TopK
from tests import tiny
from tests.cases import EMBEDDING, FAMILIES, VOCAB, batch, dense, layers, logits, moved

LANGUAGE = [name for name, family in FAMILIES.items() if family.decodes]


def ids(seed: int, low: int = 3, high: int = VOCAB) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (4, 16), generator=generator) for _ in range(4)]


NEW, OLD = ids(1, 3, 40), ids(2, 40, VOCAB)
RECIPES = {
    "btx": lambda: sc.recipes.btx(2),
    "switch": lambda: sc.recipes.btx(2, routing="switch"),
    "sample": lambda: sc.recipes.btx(2, routing="sample"),
    "upcycling": lambda: sc.recipes.upcycling(2),
    "nexus": lambda: sc.recipes.nexus(2, embedding_dim=EMBEDDING),
    "linear": lambda: sc.recipes.nexus(2, "linear"),
    "bam": lambda: sc.recipes.bam(2),
    "bam_shared": lambda: sc.recipes.bam(2, kv="shared"),
}


def mixture(name: str, family: str = "llama") -> torch.nn.Module:
    model = dense(family)
    sources = [moved(family, seed) for seed in (1, 2)] if name != "upcycling" else []
    domains = torch.eye(EMBEDDING)[:2] if name == "nexus" else ()
    sc.convert(model, RECIPES[name](), sources=sources, domains=domains)
    return model


def extend(model, name: str, expert, **options):
    if name == "nexus":
        options = {"embedding": torch.eye(EMBEDDING)[2]} | options
    return sc.extend(model, expert, NEW, OLD, **options)


def tokens(layer: MoELayer, count: int = 50) -> torch.Tensor:
    width = layer.router.scorer.width
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------- what comes of it


@pytest.mark.parametrize("name", RECIPES)
def test_old_logits_keep_their_bits_and_experts_are_the_dense_networks(name):
    model, expert = mixture(name), moved("llama", 3)
    old = copy.deepcopy(layers(model))
    single = copy.deepcopy(expert)
    sc.convert(single, RECIPES[name](), certify=False)
    report = extend(model, name, expert)
    assert (report.number, report.mixed) == (2, pytest.approx(1 / 3))
    for before, after, alone in zip(old, layers(model), layers(single), strict=True):
        x_TD = tokens(after)
        logits_TE = after.router(x_TD).logits_TE
        assert logits_TE.shape[1] == 3
        assert torch.equal(logits_TE[:, :2], before.router.eval()(x_TD).logits_TE)
        grown = dict(after.experts.named_parameters())
        for key, parameter in before.experts.named_parameters():
            if len(grown[key]) != 3:
                continue  # shared by all experts
            assert torch.equal(grown[key][:2], parameter), key
            assert torch.equal(grown[key][2], alone.experts.get_parameter(key)[0]), key
    assert all(e.experts.num_experts == 3 for e in model.sparsecraft.recipe.edits)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_tensors_move_by_lambda_on_every_family(family):
    model, expert = mixture("linear", family), moved(family, 3)
    before = {name: t.clone() for name, t in dense_tensors(model).items()}
    theirs = expert.state_dict()
    sc.extend(model, expert, rows="reset", mix=0.25)
    own = donor_tensors(model.sparsecraft.plan)
    for name, tensor in dense_tensors(model).items():
        wanted = before[name]
        if name not in own and tensor.is_floating_point():
            wanted = 0.75 * before[name] + 0.25 * theirs[name]
        torch.testing.assert_close(tensor, wanted, msg=name)
    assert logits(model, batch(family)).isfinite().all()


@pytest.mark.parametrize("kv", ["bam", "bam_shared"])
def test_what_attention_experts_share_moves_too(kv):
    model, expert = mixture(kv, "qwen3"), moved("qwen3", 3)
    shared = model.model.layers[1].self_attn.experts
    before = {name: p.clone() for name, p in shared.shared_parts().items()}
    assert {"q_norm.weight", "k_norm.weight"} <= set(before)
    assert ("k_proj.weight" in before) == (kv == "bam_shared")
    sc.extend(model, expert, NEW, OLD)
    for name, parameter in shared.shared_parts().items():
        theirs = expert.get_parameter(f"model.layers.1.self_attn.{name}")
        wanted = before[name] * 2 / 3 + theirs.view_as(parameter) / 3
        torch.testing.assert_close(parameter, wanted)


@pytest.mark.parametrize("name", ["btx", "nexus", "bam", "bam_shared"])
def test_an_extended_model_is_saved_loaded_reverted_and_generates(name, tmp_path):
    base = dense("llama")
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base").eval()
    sources = [moved("llama", seed) for seed in (1, 2)]
    domains = torch.eye(EMBEDDING)[:2] if name == "nexus" else ()
    sc.convert(model, RECIPES[name](), sources=sources, domains=domains)
    moved("llama", 3).save_pretrained(tmp_path / "expert")
    extend(model, name, tmp_path / "expert")
    inputs = batch("llama")
    wanted = logits(model, inputs)
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, inputs), wanted)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key
    assert loaded.sparsecraft.report["extensions"][0]["number"] == 2
    cached = loaded.generate(inputs["input_ids"][:1], max_new_tokens=6, do_sample=False)
    without = loaded.generate(
        inputs["input_ids"][:1], max_new_tokens=6, do_sample=False, use_cache=False
    )
    assert torch.equal(cached, without)
    # Once more, on the loaded one, whose first extension stays as it is.
    first = [layer.router(tokens(layer)).logits_TE for layer in layers(loaded)]
    another = {"embedding": torch.eye(EMBEDDING)[3]} if name == "nexus" else {}
    extend(loaded, name, moved("llama", 4), **another)
    for layer, before in zip(layers(loaded), first, strict=True):
        assert torch.equal(layer.router(tokens(layer)).logits_TE[:, :3], before)
    sc.revert(loaded)
    for key, tensor in base.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_added_can_be_removed_and_nothing_has_changed(name):
    model = mixture(name)
    wanted, before = logits(model, batch("llama")), copy.deepcopy(model.sparsecraft.recipe)
    extend(model, name, moved("llama", 3), mix=0)
    sc.remove(model, 2)
    assert torch.equal(logits(model, batch("llama")), wanted)
    now = model.sparsecraft.recipe
    assert now.edits == before.edits
    assert model.sparsecraft.report["extensions"][1] == {"removed": 2, "trainings": 0}


def test_an_expert_from_the_start_leaves_and_the_others_are_what_they_were():
    model = dense("llama")
    sc.convert(model, sc.recipes.btx(3), sources=[moved("llama", s) for s in (1, 2, 3)])
    before = copy.deepcopy(layers(model))
    sc.remove(model, 1)
    for old, new in zip(before, layers(model), strict=True):
        x_TD = tokens(new)
        wanted = old.router(x_TD).logits_TE[:, [0, 2]]
        torch.testing.assert_close(new.router(x_TD).logits_TE, wanted)
        for key, parameter in new.experts.named_parameters():
            assert torch.equal(parameter, old.experts.get_parameter(key)[[0, 2]])
    logits(model, batch("llama"))


# ----------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 31])
@pytest.mark.parametrize("tokens", [1, 36, 500])
@pytest.mark.parametrize("width", [32, 33, 576])
def test_rows_come_and_go_and_the_other_logits_keep_their_bits(experts, tokens, width):
    torch.manual_seed(0)
    scorer = build_router(
        RouterSpec(scorer=Linear(start=Normal()), select=TopK(1)), width, experts
    ).scorer
    x_TD = torch.randn(tokens, width)
    before_TE = scorer(x_TD)
    for _ in range(2):
        scorer.append(torch.randn(width))
        after_TE = scorer(x_TD)
        assert torch.equal(after_TE[:, : before_TE.shape[1]], before_TE)
        before_TE = after_TE
    torch.testing.assert_close(after_TE, x_TD @ scorer.weight.T, rtol=1e-4, atol=1e-4)
    scorer.remove(experts)
    keep = [e for e in range(experts + 2) if e != experts]
    assert torch.equal(scorer(x_TD), after_TE[:, keep])
    scorer.remove(0)
    torch.testing.assert_close(scorer(x_TD), after_TE[:, keep[1:]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [1.0, 0.6])
def test_the_row_is_the_minimum_of_a_logistic_regression(wanted):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    own_TD, other_TD = draw(300, 8) + 0.5, 3 * draw(100, 8)
    own_TE, other_TE = draw(300, 3), draw(100, 3)
    row_D = fit_row(own_TD, own_TE, other_TD, other_TE, wanted).double().requires_grad_()
    size = torch.cat([own_TD, other_TD]).square().mean().double()

    def probability(x_TD, z_TE):  # of the last of four experts
        z_TE = torch.cat([z_TE.double(), (x_TD.double() @ row_D)[:, None]], dim=-1)
        return z_TE.softmax(-1)[:, -1]

    p = probability(own_TD, own_TE)
    loss = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean() / 2
    loss = loss - (1 - probability(other_TD, other_TE)).log().mean() / 2
    loss = loss + RIDGE / 2 * row_D.square().sum() * size
    (gradient,) = torch.autograd.grad(loss, row_D)
    assert gradient.abs().max() < 1e-4
    assert probability(own_TD, own_TE).mean() > probability(other_TD, other_TE).mean()


@pytest.mark.parametrize("wanted", [1.0, 0.6])
def test_the_row_by_ridge_is_the_least_squares_of_numpy(wanted):
    """Each token asks for its margin over the others' logits; both kinds weigh the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    own_TD, other_TD = draw(300, 8) + 0.5, 3 * draw(100, 8)
    own_TE, other_TE = draw(300, 3), draw(100, 3)
    found = ridge_row(own_TD, own_TE, other_TD, other_TE, wanted)
    size = numpy.sqrt(torch.cat([own_TD, other_TD]).double().square().mean().item())
    rows, targets = [], []
    for x_TD, z_TE, p in ((own_TD, own_TE, min(wanted, SURE)), (other_TD, other_TE, 1 - SURE)):
        for x, z in zip(x_TD.double().tolist(), z_TE.double().tolist(), strict=True):
            root = (1 / (2 * len(x_TD))) ** 0.5
            rows.append([root * value / size for value in x])
            offset = numpy.log(sum(numpy.exp(value) for value in z))
            targets.append(root * (offset + numpy.log(p / (1 - p))))
    rows += (RIDGE**0.5 * numpy.eye(8)).tolist()
    targets += [0.0] * 8
    wanted_D = numpy.linalg.lstsq(numpy.array(rows), numpy.array(targets), rcond=None)[0] / size
    numpy.testing.assert_allclose(found.numpy(), wanted_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["btx", "switch", "upcycling", "linear"])
def test_a_new_expert_by_ridge_gets_its_own_tokens_and_leaves_the_others_their_bits(name):
    model = mixture(name)
    x_TD = tokens(layers(model)[0])
    before_TE = layers(model)[0].router(x_TD).logits_TE
    report = sc.extend(model, moved("llama", 3), NEW, OLD, rows="ridge")
    assert report.rows == "ridge"
    assert report.share_new > 0.6 and report.share_old < 0.25
    assert torch.equal(layers(model)[0].router(x_TD).logits_TE[:, :2], before_TE)


def test_a_calibrated_new_expert_gets_its_own_tokens():
    for temperature in (1.0, 3.0):
        recipe = sc.override(RECIPES["btx"](), {"router.temperature": temperature})
        model = dense("llama")
        sc.convert(model, recipe, sources=[moved("llama", seed) for seed in (1, 2)])
        report = sc.extend(model, moved("llama", 3), NEW, OLD)
        assert report.share_new > 0.8 and report.share_old < 0.2
        assert f"{report.share_new:.1%} of the new tokens" in str(report)


def test_a_new_expert_is_as_sure_of_its_tokens_as_the_others_of_theirs():
    """Where weights are raw probabilities, they are how large the experts' outputs are."""
    model = mixture("linear")
    report = sc.extend(model, moved("llama", 3), NEW, OLD)
    assert report.share_new > 0.6 and report.share_old < 0.2
    for layer, item in zip(layers(model), model.sparsecraft.plan, strict=True):
        own_TD, other_TD = (inputs_of(model, [item], Domain.of(d), None)[0] for d in (NEW, OLD))
        own_TK, other_TK = (layer.router(x_TD).weights_TK for x_TD in (own_TD, other_TD))
        assert own_TK.mean().item() == pytest.approx(other_TK.mean().item(), abs=0.1)


def test_reset_draws_all_rows_by_the_seed():
    rows = []
    for seed in (0, 0, 1):
        model = mixture("linear")
        old = layers(model)[0].router.scorer.weight.clone()
        assert sc.extend(model, moved("llama", 3), rows="reset", seed=seed).rows == "reset"
        rows.append(layers(model)[0].router.scorer.weight)
    assert not torch.equal(rows[-1][:2], old)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_domain_gives_the_embedding_that_conversion_would_give(tmp_path):
    def texts(word):
        return [f"{word} {other}" for other in tiny.WORDS]

    options = {"tokenizer": tiny.tokenizer()}
    domains = [texts("red"), texts("cat"), texts("sun")]
    three = tiny.llama()
    sc.convert(three, sc.recipes.nexus(3, encoder="self"), domains=domains, **options)
    model = tiny.llama()
    sc.convert(model, sc.recipes.nexus(2, encoder="self"), domains=domains[:2], **options)
    with pytest.raises(DataError, match=r"no folder that the model knows; give it as base"):
        sc.extend(model, tiny.llama(), domains[2], **options)
    sc.extend(model, tiny.llama(), domains[2], base=tiny.llama(), **options)
    for ours, wanted in zip(layers(model), layers(three), strict=True):
        assert torch.equal(ours.router.scorer.domains, wanted.router.scorer.domains)


# ---------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_extended_is_refused_and_nothing_has_changed():
    def refused(match, error, name="btx", expert=None, data=(NEW, OLD), **options):
        model = mixture(name) if isinstance(name, str) else name
        state = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(error, match=match):
            sc.extend(model, expert or moved("llama", 3), *data, **options)
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())

    refused("dense; call sc.convert", SurgeryError, dense("llama"))
    camelidae = dense("llama")
    sc.convert(camelidae, sc.recipes.camelidae(2, adapter_dim=4, lora_rank=2))
    refused("whole networks .* can come and go", RecipeError, camelidae)
    shards = dense("llama")
    sc.convert(shards, sc.recipes.virtual_groups(2, granularity=2, top_k=2))
    refused("are shards of networks", RecipeError, shards)
    refused("give both", DataError, data=(NEW,))
    refused("give both", DataError, data=())
    refused("routers of 'btx' are linear", RecipeError, embedding=torch.ones(3))
    refused("rows is 'new'", RecipeError, rows="new")
    refused("mix is 2", RecipeError, mix=2)
    refused("expert is a converted model", SurgeryError, expert=mixture("btx"))
    refused("model_type='mistral'", SourceError, expert=dense("mistral"))
    torch.manual_seed(3)
    stranger = type(dense("llama"))(dense("llama").config)
    refused("no common ancestor", SourceError, expert=stranger)
    padding = {"input_ids": NEW[0], "attention_mask": torch.zeros_like(NEW[0])}
    refused("gave no token", DataError, data=([padding], OLD))
    refused("start from domains or data", RecipeError, "nexus", rows="reset")
    refused("give data", DataError, "nexus", data=())
    refused(r"\(5,\) and the routers read", RecipeError, "nexus", embedding=torch.ones(5))
    same = torch.eye(EMBEDDING)[1]
    refused(r"1 \(of expert 1\) and 2 \(of the new", DataError, "nexus", embedding=same)
    random = dense("llama")
    sc.convert(random, sc.recipes.nexus(2, embedding_dim=EMBEDDING))
    refused("converted without domains", DataError, random)


def test_what_cannot_be_removed_is_refused():
    model = mixture("btx")
    with pytest.raises(RecipeError, match="There is no expert 2; this model has 0 to 1"):
        sc.remove(model, 2)
    with pytest.raises(RecipeError, match="each token takes 2"):
        sc.remove(model, 0)
    model = mixture("switch")
    sc.remove(model, 0)
    with pytest.raises(RecipeError, match="Expert 0 of 1 cannot be removed"):
        sc.remove(model, 0)
    with pytest.raises(RecipeError, match="extended is 2 with num_experts=2"):
        sc.override(sc.recipes.btx(2), {"router.extended": 2})
    with pytest.raises(RecipeError, match=r"no field 'router\.extended'"):
        sc.override(sc.recipes.nexus(2), {"router.extended": 1})


def test_a_failure_in_a_later_layer_gives_the_model_back(monkeypatch):
    from sparsecraft.moe.experts.ffn import FFNExperts

    model, calls, append = mixture("btx"), [], FFNExperts.append

    def failing(bank, donor):
        calls.append(bank)
        if len(calls) == 2:
            raise MemoryError
        append(bank, donor)

    state = {key: t.clone() for key, t in model.state_dict().items()}
    monkeypatch.setattr(FFNExperts, "append", failing)
    with pytest.raises(MemoryError):
        sc.extend(model, moved("llama", 3), NEW, OLD)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert [layer.experts.num_experts for layer in layers(model)] == [2, 2]
    repeated = dense("llama")
    sc.convert(repeated, sc.override(sc.recipes.upcycling(2), {"router.init_repeat": 2}))
    with pytest.raises(RecipeError, match="share rows of their routers"):
        sc.extend(repeated, moved("llama", 3), NEW, OLD)


def test_an_expert_that_holds_no_numbers_is_refused():
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        expert = moved("llama", 3)
        expert.get_parameter(name).data[0] = float("nan")
        model = mixture("btx")
        state = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(SourceError, match=rf"'{name}' of .* not finite"):
            sc.extend(model, expert, NEW, OLD)
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
        assert [layer.experts.num_experts for layer in layers(model)] == [2, 2]


def test_only_experts_that_came_later_can_be_left(tmp_path):
    model = mixture("switch")
    for seed in (3, 4):
        sc.extend(model, moved("llama", seed), NEW, OLD)
    x_TD = tokens(layers(model)[0])
    before_TE = layers(model)[0].router(x_TD).logits_TE
    sc.remove(model, 0)
    sc.remove(model, 0)
    assert torch.equal(layers(model)[0].router(x_TD).logits_TE, before_TE[:, 2:])
    wanted = logits(model, batch("llama"))
    sc.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(sc.load(tmp_path / "out"), batch("llama")), wanted)
    assert model.sparsecraft.recipe.edits[0].router.scorer.extended == 1


def test_batches_are_read_to_a_limit():
    model = mixture("btx")
    many = Domain.of((torch.full((4, 16), 5) for _ in range(1000)), 200)
    assert len(many.batches) == 200
    read = inputs_of(model, model.sparsecraft.plan, many, None)
    assert len(read[0]) == 64 * 64 // 2, "64 batches, and every second token"
    long = Domain.of([torch.full((16, 64), 5)] * 20)
    assert len(inputs_of(model, model.sparsecraft.plan, long, None)[0]) == 4096


def test_reset_keeps_routers_frozen_and_serves_those_that_read_no_token():
    model = mixture("linear")
    model.requires_grad_(False)
    sc.extend(model, moved("llama", 3), NEW, OLD, rows="reset")
    assert not any(p.requires_grad for p in model.parameters())
    recipe = sc.override(sc.recipes.upcycling(2), {"router.decides": "sequence"})
    model = dense("bert")
    sc.convert(model, recipe)
    logits(model, batch("bert"))
    with pytest.raises(RecipeError, match=r"decide otherwise\. Use rows='reset'"):
        sc.extend(model, moved("bert", 3), NEW, OLD)
    assert sc.extend(model, moved("bert", 3), NEW, OLD, rows="reset").share_new is None
    logits(model, batch("bert"))


def test_the_same_data_twice_is_said(caplog):
    sc.extend(mixture("btx"), moved("llama", 3), NEW, NEW)
    assert "cannot tell these data apart" in caplog.text


@pytest.mark.parametrize(
    ("name", "target"), [("btx", "mixtral"), ("upcycling", "granite"), ("linear", "qwen2_moe")]
)
def test_an_extended_model_exports_to_what_loads_without_us(name, target, tmp_path):
    import transformers

    model = tiny.llama() if target != "qwen2_moe" else dense("qwen2")
    family = model if target != "qwen2_moe" else None
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    sc.convert(model, RECIPES[name](), sources=[copy.deepcopy(expert)] * 2)
    assert family is None or family is model
    sc.extend(model, expert, NEW, OLD)
    wanted = model(NEW[0]).logits
    sc.export(model, target, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(NEW[0]).logits, wanted, rtol=1e-3, atol=1e-3)
    sc.remove(model, 0)
    sc.export(model, target, tmp_path / "two")


def test_a_run_that_was_interrupted_goes_on_with_the_same_expert_only():
    from datasets import Dataset

    from sparsecraft.training.options import TrainOptions
    from sparsecraft.training.resume import describe

    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    runs = []
    for seed, mix in ((3, 0.2), (3, 0.2), (4, 0.2), (3, 0.3)):
        model = mixture("btx")
        sc.extend(model, moved("llama", seed), NEW, OLD, mix=mix)
        runs.append(describe(model, TrainOptions(), rows)["extensions"])
    assert runs[0] == runs[1] and runs[0] != runs[2] and runs[0] != runs[3]


def test_the_tokenizer_of_a_self_contained_checkpoint_is_checked(tmp_path, monkeypatch):
    base = tiny.save_dense(tmp_path / "base")
    model = sc.hub.load_dense(base)
    sc.convert(model, sc.recipes.upcycling(2))
    sc.save(model, tmp_path / "alone", standalone=True)
    other = dense_folder(tmp_path / "other", 1)
    path = Path(other) / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(data))
    alone = sc.load(tmp_path / "alone")
    with pytest.raises(SourceError, match=r"is number 11 in the tokenizer of .*other"):
        sc.extend(alone, other, NEW, OLD)
    # A model from memory has none, whatever lies in the folder where Python runs.
    monkeypatch.chdir(other)
    model = tiny.llama()
    sc.convert(model, sc.recipes.upcycling(2))
    sc.extend(model, base, NEW, OLD)


# ---------------------------------------------------------------------------------------- as a user


def dense_folder(path, seed: int) -> str:
    moved(tiny.llama(), seed, 0.005).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("recipe", ["btx", "nexus"])
def test_the_commands_extend_train_and_remove(recipe, tmp_path, capsys):
    base = tiny.save_dense(tmp_path / "base")
    a, b, c = (dense_folder(tmp_path / n, seed) for seed, n in enumerate("abc"))
    rows = tiny.chat_rows(40)
    files = [
        tiny.write_rows(tmp_path / f"{name}.jsonl", part)
        for name, part in (("one", rows[:4]), ("two", rows[4:8]), ("three", rows[8:10]))
    ]
    out = [str(tmp_path / f"out{n}") for n in range(4)]
    more = ["--domains", *files[:2], "--encoder", "self"] if recipe == "nexus" else []
    made = ["convert", recipe, "--model", base, "--sources", a, b, *more, "--out", out[0]]
    assert main(made) == 0
    asked = ["extend", out[0], "--expert", c, "--data", files[2], "--out", out[1], "--steps", "2"]
    capsys.readouterr()
    assert main(asked) == 1
    assert "forgets the old; give --old-data, or --no-train" in capsys.readouterr().err
    sizes = ["--max-length", "64", "--batch-size", "4"]
    assert main([*asked, "--old-data", *files[:2], *sizes]) == 0
    said = capsys.readouterr().out
    assert "is expert 2 of every layer" in said and "of the new tokens" in said
    assert "2 steps, mean loss" in said
    trained = sc.load(out[1])
    settings = trained.sparsecraft.report["training"][0]["settings"]
    assert settings["weights"] == [1, 0.5, 0.5] and settings["steps"] == 2
    assert all(layer.experts.num_experts == 3 for layer in layers(trained))
    assert main([*asked[:7], out[2], "--no-train", "--steps", "2"]) == 1
    assert "--steps is for training, and --no-train" in capsys.readouterr().err
    untrained = [*asked[:7], out[2], "--no-train"]
    assert main([*untrained, "--old-data", *files[:2]]) == 0
    assert "training" not in sc.load(out[2]).sparsecraft.report
    assert main(["remove", out[2], "--expert", "2", "--out", out[3]]) == 0
    assert "Expert 2 was removed.\n  2 ffn" in capsys.readouterr().out
    assert main(["inspect", out[2]]) == 0
    assert "Extended by" in capsys.readouterr().out
    nowhere = [*untrained[:3], "nowhere", *untrained[4:7], out[3] + "x", "--no-train"]
    assert main([*nowhere, "--old-data", files[0]]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_lora_folder_can_be_the_expert(tmp_path):
    import peft

    base = tiny.save_dense(tmp_path / "base")
    model = sc.hub.load_dense(base)
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload()
    mixed = sc.hub.load_dense(base)
    sc.convert(mixed, sc.recipes.upcycling(2))
    with torch.no_grad():  # after some training, so that a LoRA on memory would be wrong
        mixed.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    before = mixed.model.layers[0].self_attn.q_proj.weight.clone()
    report = sc.extend(mixed, tmp_path / "lora", NEW, OLD)
    layer, theirs = mixed.model.layers[0], merged.model.layers[0]
    F_ = theirs.mlp.up_proj.weight
    torch.testing.assert_close(layer.mlp.experts.gate_up[2, -len(F_) :], F_)
    wanted = before.lerp(theirs.self_attn.q_proj.weight, 1 / 3)
    torch.testing.assert_close(layer.self_attn.q_proj.weight, wanted)
    assert report.expert.endswith("lora")


def test_several_files_are_one_domain(tmp_path):
    paths = [
        tiny.write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(n)])
        for n in (1, 3)
    ]
    joined = Domain.joined([Domain.of(path) for path in paths])
    assert joined.texts() == ["1 0", "3 0", "3 1", "3 2"]
    assert Domain.joined([Domain.of(paths[1]), Domain.of(paths[0])]).texts()[:2] == ["3 0", "1 0"]
    assert Domain.of(joined) is joined


def test_experts_that_came_later_train():
    model = mixture("switch")
    sc.extend(model, moved("llama", 3), NEW, OLD)
    model.train()
    out = model(NEW[0]).logits
    F.cross_entropy(out.flatten(0, 1), NEW[0].flatten()).backward()
    for layer in layers(model):
        assert layer.router.scorer.weight.grad.isfinite().all()
        assert layer.router.scorer.weight.grad[2].abs().sum() > 0
        assert layer.experts.down.grad[2].abs().sum() > 0
