"""Experts, k and rank by layer: what recipes with lists do in families with one and two stacks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparsecraft as sc
from sparsecraft.conversion.stream import convert_files
from sparsecraft.errors import ExportError, MergeError, RecipeError
from sparsecraft.evaluation.report import edit_lines
from sparsecraft.evaluation.split_report import split_lines
from sparsecraft.interop.materialize import materialize
from sparsecraft.moe import cost
from sparsecraft.moe.names import dense_name
from sparsecraft.recipe.by_layer import ByLayer
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.words import facts
from sparsecraft.surgery.budget import set_budget
from sparsecraft.surgery.record import conversion_of
from tests.cases import FAMILIES, LAYERS, VOCAB, D, F, batch, dense, logits, moved, randomize_new
from tests.cases.formulas import ffn_linears, ffn_parameters

FOUR = ("llama", "gpt2", "t5", "bert")
EXPERTS, BEST, RANKS, WIDTHS = (2, 4, 3, 5), (1, 2, 3, 1), (2, 3, 4, 1), (4, 8, 2, 6)
HALVES, SHARDS = (2, 4, 8, 16), (2, 4, 4, 2)  # divide F


def of(family: str, numbers: tuple[int, ...]) -> list[int]:
    """As many as the family has blocks: T5 has two of an encoder and two of a decoder."""
    return list(numbers[: FAMILIES[family].ffns])


def linears(family: str) -> list[list[tuple[int, int]]]:
    """(in, out) of the Linears of each block; a decoder block of T5 has two attentions."""
    found = FAMILIES[family].linears
    if family != "t5":
        return [list(found)] * LAYERS
    return [list(found[:6])] * LAYERS + [list(found[6:])] * LAYERS


def summed(family: str, of_layer) -> int:
    """`of_layer` of each layer's experts, k, rank, width and Linears."""
    return sum(
        of_layer(*numbers)
        for numbers in zip(EXPERTS, BEST, RANKS, WIDTHS, linears(family), strict=False)
    )


def make(name: str, family: str) -> sc.Recipe:
    E, K, R, H = (of(family, numbers) for numbers in (EXPERTS, BEST, RANKS, WIDTHS))
    r = sc.recipes
    return {
        "upcycling": lambda: r.upcycling(E, K),
        "drop_upcycling": lambda: r.drop_upcycling(num_experts=E, top_k=K),
        "virtual_groups": lambda: r.virtual_groups(E, of(family, SHARDS), top_k=4),
        "camelidae": lambda: r.camelidae(num_experts=E, top_k=K, adapter_dim=H, lora_rank=0),
        "molora": lambda: r.molora(num_experts=E, rank=R),
        "mixlora": lambda: r.mixlora(num_experts=E, top_k=K, rank=R),
        "mov": lambda: r.mov(num_experts=E),
        "mpoe": lambda: r.mpoe(num_experts=E, top_k=K),
        "lora": lambda: r.lora(rank=R),
        "moefication": lambda: r.moefication(num_experts=of(family, HALVES), top_k=K),
    }[name]()


def by_hand(name: str, family: str) -> int:
    case = FAMILIES[family]
    ffn, matrices = ffn_parameters(case), 3 if case.gated else 2
    biases = (matrices - 1) * F + D if case.biased else 0
    outside = [io for io in linears(family)[0] if io not in ffn_linears(case)]
    attentions = [outside if n < LAYERS else 2 * outside for n in range(case.ffns)]
    return {
        "upcycling": lambda: summed(family, lambda E, *_: E * (ffn + D)),
        "drop_upcycling": lambda: summed(family, lambda E, *_: E * (ffn + D)),
        "virtual_groups": lambda: sum(
            E * (ffn + (G - 1) * (D if case.biased else 0) + G * D)
            for _, E, G in zip(range(case.ffns), EXPERTS, SHARDS, strict=False)
        ),
        "camelidae": lambda: summed(family, lambda E, k, r, H, _: E * (2 * D * H + D)),
        "molora": lambda: summed(
            family, lambda E, k, R, H, at: E * sum(R * (i + o) + i for i, o in at)
        ),
        "mixlora": lambda: sum(
            E * R * sum(i + o for i, o in ffn_linears(case)[:matrices]) + E * D
            + R * sum(i + o for i, o in at)
            for E, R, at in zip(EXPERTS, RANKS, attentions, strict=False)
        ),
        "mov": lambda: sum(
            E * (2 * case.kv + 2 * D) * (2 if n >= LAYERS else 1) + E * (F + D)
            for n, E in zip(range(case.ffns), EXPERTS, strict=False)
        ),
        "mpoe": lambda: summed(
            family,
            lambda E, *_: (
                matrices * (16 * 6 * 16 + E * (16 + 256 + 256 + 16)) + biases + E * D
            ),
        ),
        "lora": lambda: summed(family, lambda E, k, R, H, at: R * sum(i + o for i, o in at)),
        "moefication": lambda: sum(D * E + E * E for E in of(family, HALVES)),
    }[name]()  # fmt: skip


MOVES = [
    "upcycling", "drop_upcycling", "virtual_groups", "camelidae", "molora", "mixlora", "mov",
    "mpoe", "lora", "moefication",
]  # fmt: skip
PAIRS = [(f, n) for f in FOUR for n in MOVES]
every = pytest.mark.parametrize(("family", "name"), PAIRS, ids=["-".join(p) for p in PAIRS])


@every
def test_parameters_start_checkpoint_and_revert(family, name, tmp_path):
    model, inputs = dense(family), batch(family)
    before, start = {n: t.clone() for n, t in model.state_dict().items()}, logits(model, inputs)
    recipe = make(name, family)
    report = sc.convert(model, recipe)
    if recipe.exact_at_start:
        assert report.certificate.exact
        assert torch.allclose(logits(model, inputs), start, atol=2e-5)
    new = sum(p.numel() for n, p in model.named_parameters() if dense_name(model, n) is None)
    dense_parts = sum(FAMILIES[family].ffns * [ffn_parameters(FAMILIES[family])])
    own = dense_parts if name == "moefication" else 0  # its experts are the dense neurons
    assert new - own == by_hand(name, family)
    assert from_json(to_json(recipe)) == recipe
    randomize_new(model, std=0.05)
    found = logits(model, inputs)
    sc.save(model, tmp_path / "saved")
    loaded = sc.load(tmp_path / "saved")
    assert torch.equal(logits(loaded, inputs), found)
    assert conversion_of(loaded).recipe == recipe
    if name != "moefication":  # what it moved was the dense weights
        sc.revert(model)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("family", FOUR)
def test_a_layer_is_what_a_recipe_without_lists_makes_of_it(family):
    model = dense(family)
    sc.convert(model, make("camelidae", family))
    for layer, E, K, H in zip(conversion_of(model).layers, EXPERTS, BEST, WIDTHS, strict=False):
        recipe = sc.recipes.camelidae(num_experts=E, top_k=K, adapter_dim=H, lora_rank=0)
        alone = dense(family)
        sc.convert(alone, recipe)
        same = conversion_of(alone).layers[0]
        assert layer.router.spec == same.router.spec
        assert {n: p.shape for n, p in layer.named_parameters() if "base" not in n} == {
            n: p.shape for n, p in same.named_parameters() if "base" not in n
        }


@pytest.mark.parametrize("name", ["upcycling", "camelidae", "mixlora", "molora", "mpoe"])
def test_a_step_trains_every_layer_with_its_balance_loss(name):
    model = dense("t5")
    sc.convert(model, sc.override(make(name, "t5"), {"top_k": [2, 4, 3, 2]} if name in
        ("upcycling", "camelidae") else {}))  # fmt: skip
    randomize_new(model, std=0.05)
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1e-3)
    loss = model(**batch("t5", labels=True)).loss
    loss.backward()
    optimizer.step()
    layers = conversion_of(model).layers
    assert torch.isfinite(loss)
    for layer in layers:
        grads = [p.grad for p in layer.experts.parameters() if p.requires_grad]
        assert grads and all(g is not None and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["upcycling", "camelidae", "molora", "mixlora", "mov"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_tensor_by_tensor_it_is_the_same_folder(family, name, tmp_path):
    dense(family).save_pretrained(tmp_path / "base")
    recipe = make(name, family)
    model = sc.hub.load_dense(str(tmp_path / "base"))
    sc.convert(model, recipe, certify=False, seed=3)
    sc.save(model, tmp_path / "memory")
    convert_files(str(tmp_path / "base"), recipe, tmp_path / "files", certify=False, seed=3)
    for file in ("moe.safetensors", "recipe.json"):
        assert (tmp_path / "files" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()


def test_routers_go_on_from_the_logits_of_a_layer_with_another_number_of_experts(tmp_path):
    model, inputs = dense("t5"), batch("t5")
    sc.convert(model, sc.recipes.moepp([2, 4, 1, 3], top_k=1))
    previous = [layer.router.scorer.previous for layer in conversion_of(model).layers]
    # W_g (experts, those of the layer before), of either stack: three of them compute nothing.
    assert [None if w is None else tuple(w.shape) for w in previous] == [
        None, (4 + 3, 2 + 3), None, (3 + 3, 1 + 3),
    ]  # fmt: skip
    randomize_new(model)
    sc.save(model, tmp_path / "saved")
    assert torch.equal(logits(sc.load(tmp_path / "saved"), inputs), logits(model, inputs))


def test_active_parameters_count_each_layers_own_k():
    model = dense("llama")
    total = sum(p.numel() for p in model.parameters())
    sc.convert(model, sc.recipes.upcycling([2, 4], [1, 3]))
    ffn, counted = ffn_parameters(FAMILIES["llama"]), cost.count(model)
    assert counted.active == total - 2 * ffn + (1 + 3) * ffn + (2 + 4) * D


def test_an_expert_comes_to_every_layer_and_goes_again(tmp_path):
    sources = [moved("llama", seed) for seed in (1, 2)]
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, sc.recipes.btx([2, 4]), sources=sources)
    recipe = conversion_of(model).recipe
    ids = [torch.randint(3, VOCAB, (2, 12)) for _ in range(2)]
    data = [[{"input_ids": x}] for x in ids]
    found = sc.extend(model, moved("llama", 3), *data, mix=0.0)
    assert found.number == (2, 4)
    assert "the last (2, 4)" in str(found)
    assert [layer.experts.num_experts for layer in conversion_of(model).layers] == [3, 5]
    numbers = {b.field: b.numbers for b in conversion_of(model).recipe.edits[0].by_layer}
    assert numbers == {"experts.num_experts": (3, 5)}
    assert conversion_of(model).recipe.edits[0].router.scorer.extended == 1
    sc.save(model, tmp_path / "more")
    assert torch.equal(logits(sc.load(tmp_path / "more"), inputs), logits(model, inputs))
    with pytest.raises(RecipeError, match="every layer of this model has 0 to 2"):
        sc.remove(model, 3)
    sc.remove(model, 0)
    assert [layer.experts.num_experts for layer in conversion_of(model).layers] == [2, 4]
    with pytest.raises(RecipeError, match="Expert 0 of 2 cannot be removed: each token takes 2"):
        sc.remove(model, 0)
    assert recipe != conversion_of(model).recipe  # one row was added alone


def test_sources_must_fit_every_layer():
    sources = [moved("llama", seed) for seed in (1, 2)]
    with pytest.raises(RecipeError, match="3 experts cannot come from 2 sources"):
        sc.convert(dense("llama"), sc.recipes.btx([2, 3]), sources=sources)
    with pytest.raises(RecipeError, match="domains are given for 3 experts"):
        sc.convert(
            dense("llama"), sc.recipes.nexus([2, 3], embedding_dim=8), domains=torch.eye(8)[:2]
        )
    with pytest.raises(RecipeError, match=r"layers of recipe 'upit' have \[2, 4\] experts"):
        sc.convert(dense("llama"), sc.recipes.upit([2, 4]), sources=sources)


def test_adapters_of_several_widths_are_merged_into_one_each():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, sc.recipes.camelidae(num_experts=[2, 4], adapter_dim=[4, 8], lora_rank=0))
    randomize_new(model)
    sc.merge(model, "average")
    recipe = conversion_of(model).recipe
    assert [edit.experts.dim for edit in recipe.layers] == [4, 8]
    assert [edit.experts.num_experts for edit in recipe.layers] == [1, 1]
    assert logits(model, inputs).isfinite().all()


def test_frozen_weights_are_joined_layer_by_layer():
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, sc.recipes.camelidae(num_experts=[2, 4], adapter_dim=4, lora_rank=0, top_k=2))
    randomize_new(model)
    with pytest.raises(MergeError, match="weights"):
        sc.merge(model, "fixed", weights=[0.5, 0.5])
    weights = {"model.layers.0.mlp": [0.5, 0.5], "model.layers.1.mlp": [0.1, 0.2, 0.3, 0.4]}
    sc.merge(model, "fixed", weights=weights)
    assert [edit.experts.dim for edit in conversion_of(model).recipe.layers] == [8, 16]
    assert logits(model, inputs).isfinite().all()


def test_loras_are_folded_into_dense_weights():
    model, inputs = dense("gpt2"), batch("gpt2")
    sc.convert(model, sc.recipes.lora(rank=[2, 3]))
    randomize_new(model)
    before = logits(model, inputs)
    sc.merge(model, "exact")
    assert torch.allclose(logits(model, inputs), before, atol=1e-5)


def test_shared_cores_become_full_networks_and_different_layers_are_no_standard_model(tmp_path):
    model, inputs = dense("mistral"), batch("mistral")
    sc.convert(model, sc.recipes.mpoe([2, 4], top_k=2))
    before = logits(model, inputs)
    materialize(model)
    assert torch.allclose(logits(model, inputs), before, atol=1e-5)
    edit = conversion_of(model).recipe.edits[0]
    assert [(b.field, b.numbers) for b in edit.by_layer] == [("experts.num_experts", (2, 4))]
    with pytest.raises(ExportError, match=r"layers differ from each other \(experts.num_experts"):
        sc.export(model, "mixtral", tmp_path / "mixtral")


def test_lists_that_say_the_same_of_every_layer_are_checked_and_export(tmp_path):
    recipe = sc.recipes.upcycling([4, 4])
    with pytest.raises(RecipeError, match="has 2 numbers, and T5ForConditionalGeneration has 4"):
        sc.convert(dense("t5"), recipe)
    model = dense("mistral")
    sc.convert(model, recipe)
    sc.export(model, "mixtral", tmp_path / "mixtral")


def test_an_adapter_folder_says_its_lists_and_replaced_networks_are_refused(tmp_path):
    recipe = sc.recipes.molora(num_experts=[2, 4], rank=[2, 3])
    model, inputs = dense("llama"), batch("llama")
    model.save_pretrained(tmp_path / "base")
    model = sc.hub.load_dense(str(tmp_path / "base"))
    sc.convert(model, recipe)
    randomize_new(model)
    sc.export(model, "peft", tmp_path / "peft")
    assert torch.equal(logits(sc.load(tmp_path / "peft"), inputs), logits(model, inputs))
    config = sc.MoloraConfig.from_pretrained(str(tmp_path / "peft"))
    assert config.num_experts == [2, 4] and config.r == [2, 3]
    same = sc.MoloraConfig(num_experts=(2, 4), r=[2, 3])
    assert same.checked_recipe() == recipe
    assert (
        sc.MoloraConfig(num_experts=[2, 4], r=[3, 3]).checked_recipe().layers[1].experts.rank == 3
    )
    with pytest.raises(RecipeError, match=r"num_experts is 2 and its recipe has \[2, 4\]"):
        sc.MoloraConfig(recipe=recipe, num_experts=2)
    model = dense("llama")
    sc.convert(model, sc.recipes.upcycling([2, 4]))
    with pytest.raises(ExportError, match="dense weights of their own"):
        sc.export(model, "peft", tmp_path / "no")


def test_a_budget_is_a_share_of_each_layers_own_experts():
    model, inputs = dense("llama"), batch("llama")
    whole = logits(model, inputs)
    sc.convert(model, sc.recipes.moefication(num_experts=[4, 8], top_k=[1, 2]))
    assert torch.allclose(logits(model, inputs), whole, atol=1e-5)
    set_budget(model, 0.5)
    assert "Budget: 0.5, 2 of 4 experts or 4 of 8 experts." in split_lines(model)
    assert [layer.router.k for layer in conversion_of(model).layers] == [2, 4]


def test_tables_and_reports_say_what_layers_have():
    recipe = sc.recipes.upcycling([2, 4], [1, 2])
    assert facts(recipe)["experts"] == "2 to 4 ffn"
    assert facts(recipe)["router"] == "linear, top-1 renormalized, linear, top-2 renormalized"
    (line,) = edit_lines(recipe)
    assert "experts.num_experts by layer: 2, 4; router.select.k by layer: 1, 2" in line


def test_blocks_are_numbered_in_their_lists_and_not_by_edit():
    """Seven Linears of a block are one layer; a path that leaves a block out leaves its number."""
    model = dense("llama")
    sc.convert(model, sc.recipes.molora(num_experts=[2, 4], paths="model.layers.1.*"))
    layers = conversion_of(model).layers
    assert len(layers) == 7
    assert {layer.experts.num_experts for layer in layers} == {4}
    model = dense("t5")
    sc.convert(model, sc.recipes.upcycling([2, 4], paths="decoder.*"))
    assert [layer.experts.num_experts for layer in conversion_of(model).layers] == [2, 4]


def test_the_soft_first_layer_is_the_first_block():
    model = dense("llama")
    sc.convert(model, sc.recipes.btx(2, routing="sample"))
    assert [layer.router.spec.select.kind for layer in conversion_of(model).layers] == [
        "soft", "sample",
    ]  # fmt: skip
    model = dense("llama")
    sc.convert(model, sc.recipes.btx(2, routing="sample", paths="model.layers.1.mlp"))
    assert [layer.router.spec.select.kind for layer in conversion_of(model).layers] == ["sample"]


def test_what_lists_cannot_say_is_refused():
    def refused(match, make):
        with pytest.raises(RecipeError, match=match):
            sc.convert(dense("llama"), make())

    r = sc.recipes
    refused(
        "num_experts has 3 numbers, and LlamaForCausalLM has 2 layers",
        lambda: r.upcycling([2, 4, 8]),
    )
    refused("has 1 numbers, and", lambda: r.molora(num_experts=2, rank=[4]))
    refused("In layer 1, top_k is 3 with num_experts=2", lambda: r.upcycling([4, 2], 3))
    refused("2 of num_experts and 3 of top_k", lambda: r.upcycling([4, 2], [1, 1, 1]))
    refused("0 of num_experts; give one number", lambda: r.upcycling([]))
    refused("In layer 0, FFNSpec.num_experts is 'x'", lambda: r.upcycling(["x", 2]))
    refused("In layer 1, num_experts is 0", lambda: r.upcycling([1, 0], 1))
    refused("another method in some layers", lambda: r.camelidae(lora_rank=[0, 4]))
    recipe = r.upcycling([2, 4])
    edit = recipe.edits[0]
    refused("the field itself says what the first", lambda: dataclasses.replace(
        recipe, edits=(dataclasses.replace(edit, experts=dataclasses.replace(
            edit.experts, num_experts=3)),)))  # fmt: skip
    with pytest.raises(RecipeError, match="'place', and it has no number of that name"):
        dataclasses.replace(edit, by_layer=(ByLayer("place", (1, 2)),))
    twice = (ByLayer("router.select.k", (2, 1)), ByLayer("router.select.k", (2, 2)))
    with pytest.raises(RecipeError, match="it has them already"):
        dataclasses.replace(edit, by_layer=twice)
    other = (ByLayer("router.select.k", (2, 1)), ByLayer("experts.num_experts", (2, 4, 4)))
    with pytest.raises(RecipeError, match=r"3 of experts.num_experts and 2 of router.select.k"):
        dataclasses.replace(edit, by_layer=other)


def test_overrides_take_and_drop_lists():
    recipe = sc.override(sc.recipes.upcycling(4), {"top_k": [1, 2], "num_experts": "2,4"})
    assert recipe == sc.recipes.upcycling([2, 4], [1, 2])
    assert sc.override(recipe, {"top_k": 2, "num_experts": 4}) == sc.recipes.upcycling(4, 2)
    soft = sc.override(recipe, {"router.select": "soft"})
    assert [b.field for b in soft.edits[0].by_layer] == ["experts.num_experts"]
    rates = sc.override(sc.recipes.molora(4), {"dropout": [0.0, 0.1], "experts.rank": "[2, 3]"})
    assert [e.experts.dropout for e in rates.layers] == [0.0, 0.1]
    assert [e.experts.rank for e in rates.layers] == [2, 3]
    with pytest.raises(RecipeError, match="learning_rate"):
        sc.override(recipe, {"learning_rate": [0.1, 0.2]})
    with pytest.raises(RecipeError, match=r"numbers\.1 is 'x'"):
        sc.override(recipe, {"top_k": "1,x"})


def test_another_selection_keeps_the_numbers_that_it_has():
    recipe = sc.recipes.upcycling([2, 4], [1, 2])
    changes = {"router.select": "relu", "exact_at_start": False, "losses": {"remoe": 1.0}}
    changed = sc.override(recipe, changes)
    assert [edit.router.select.k for edit in changed.edits[0].layers] == [1, 2]
    assert len(sc.override(recipe, {"router.select": "soft"}).edits[0].by_layer) == 1
