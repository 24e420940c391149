"""UpIT: experts mixed from two, rows assigned to experts, and the two stages of training."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
import transformers
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.conversion.sources.expansion import dare, expand, seed_of
from sparsecraft.conversion.sources.source import open_source
from sparsecraft.conversion.stream import convert_files
from sparsecraft.data.batches import collate
from sparsecraft.data.prepare import pack, prepare
from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.moe.losses import own_expert
from sparsecraft.moe.names import dense_tensors
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.recipe import ExpansionSpec
from sparsecraft.recipe.stages import Deal, Stage
from sparsecraft.surgery.plan import plan
from sparsecraft.training import deal as dealing
from sparsecraft.training import defaults as settings
from sparsecraft.training import train as training
from sparsecraft.training.deal import deal, row_losses, sampled
from tests import tiny
from tests.cases import batch, dense, layers, logits, moved
from tests.conversion.test_stream import base, in_memory, same

FAST = {"batch_size": 4, "micro_batch": 2, "max_length": 64, "log_every": 1, "progress": False}
FFN = ("gate_proj", "up_proj", "down_proj")


def vector(model, start) -> torch.Tensor:
    """What a model changes in the networks of `start`, as one vector."""
    old = dict(start.named_parameters())
    return torch.cat(
        [(p - old[n]).flatten() for n, p in model.named_parameters() if ".mlp." in n]
    ).detach()


def expert_vector(model, start, e: int) -> torch.Tensor:
    """The same of expert `e` of a converted Llama."""
    parts = []
    for layer, block in zip(layers(model), start.model.layers, strict=True):
        bank, mlp = layer.experts, block.mlp
        names = ("weight", "bias") if mlp.up_proj.bias is not None else ("weight",)
        ends = {"weight": "", "bias": "_bias"}
        for part in ("gate_proj", "up_proj"):
            for name in names:
                half = getattr(bank, f"gate_up{ends[name]}")[e].chunk(2)[part == "up_proj"]
                parts.append((half - getattr(getattr(mlp, part), name)).flatten())
        for name in names:
            down = getattr(bank, f"down{ends[name]}")[e]
            parts.append((down - getattr(mlp.down_proj, name)).flatten())
    return torch.cat(parts).detach()


def uneven_edits(recipe) -> tuple:
    """Four experts in the first of a Llama's two layers, six in the second."""
    (edit,) = recipe.edits
    return tuple(
        dataclasses.replace(
            edit,
            paths=f"*.{layer}.mlp",
            experts=dataclasses.replace(edit.experts, num_experts=count),
        )
        for layer, count in enumerate((4, 6))
    )


def cosine(left, right) -> float:
    return F.cosine_similarity(left.double(), right.double(), dim=0).item()


# --------------------------------------------------------------------------------------- expansion


def test_the_parents_are_the_least_similar_pair_of_a_plain_loop():
    start = dense("llama")
    sources = [moved(start, seed) for seed in range(3)]
    model = dense("llama")
    report = sc.convert(model, sc.recipes.upit(6, drop=0.0), sources=sources)
    # The experts as they are, children too, by a loop over whole vectors.
    known = [expert_vector(model, start, e) for e in range(6)]
    for source, found in zip(sources, known, strict=False):
        assert cosine(vector(source, start), found) == pytest.approx(1, abs=1e-3)
    assert [child.expert for child in report.children] == [3, 4, 5]
    for child in report.children:
        pairs = itertools.combinations(range(child.expert), 2)
        wanted = min(pairs, key=lambda pair: cosine(known[pair[0]], known[pair[1]]))
        assert child.parents == wanted
        j, k = (known[parent] for parent in child.parents)
        assert child.cosine == pytest.approx(cosine(j, k), abs=1e-6)
        assert child.alpha + child.beta == 1 and min(child.alpha, child.beta) >= 0
        mixed = child.alpha * j + child.beta * k
        torch.testing.assert_close(known[child.expert], mixed, rtol=1e-4, atol=1e-6)
    assert len({child.alpha for child in report.children}) == 3


@pytest.mark.parametrize("parents", ["least_similar", "random"])
def test_a_child_can_be_a_parent(parents):
    """Of three changes at obtuse angles, what is mixed of two is opposite to the third."""
    start = dense("llama")
    noise = [vector(moved(start, seed), start) for seed in range(3)]
    sources = [copy.deepcopy(start) for _ in range(3)]
    for number, source in enumerate(sources):
        change = noise[number] - 0.25 * sum(n for i, n in enumerate(noise) if i != number)
        for name, parameter in source.named_parameters():
            if ".mlp." in name:
                parameter.data += change[: parameter.numel()].view_as(parameter)
                change = change[parameter.numel() :]
    model, recipe = dense("llama"), sc.recipes.upit(7, drop=0.0, parents=parents)
    children = sc.convert(model, recipe, sources=sources).children
    assert any(max(child.parents) > 2 for child in children)
    known = [expert_vector(model, start, e) for e in range(7)]
    for child in children:
        j, k = (known[parent] for parent in child.parents)
        mixed = child.alpha * j + child.beta * k
        torch.testing.assert_close(known[child.expert], mixed, rtol=1e-4, atol=1e-6)
        if parents == "least_similar":
            pairs = itertools.combinations(range(child.expert), 2)
            assert child.parents == min(pairs, key=lambda p: cosine(known[p[0]], known[p[1]]))


def test_dare_keeps_the_expectation_and_rescales_what_it_keeps():
    change = torch.randn(400, 500)
    thinned = dare(change, 0.75, seed=1)
    kept = thinned != 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(thinned[kept], change[kept] * 4)
    mean = torch.stack([dare(change[:20], 0.75, seed) for seed in range(2000)]).mean(0)
    # The standard error of each entry's mean is |x| sqrt(p / (1 - p) / 2000).
    assert ((mean - change[:20]).abs() <= 5.5 * math.sqrt(3 / 2000) * change[:20].abs()).all()
    assert torch.equal(dare(change, 0.0, 3), change)
    assert torch.equal(dare(change, 0.75, 1), thinned)
    assert not torch.equal(dare(change, 0.75, 2), thinned)


def test_a_child_is_the_base_and_its_parents_thinned_changes():
    start = dense("llama")
    sources = [moved(start, seed) for seed in range(2)]
    model, recipe = dense("llama"), sc.recipes.upit(3, drop=0.75)
    (child,) = sc.convert(model, recipe, sources=sources, seed=5).children
    for number, layer in enumerate(layers(model)):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        old = start.get_parameter(name).detach()
        wanted = old.clone()
        for slot, (weight, source) in enumerate(
            zip((child.alpha, child.beta), sources, strict=True)
        ):
            change = source.get_parameter(name).detach() - old
            wanted += weight * dare(change, 0.75, seed_of(5, 2, slot, name))
        torch.testing.assert_close(layer.experts.down[2], wanted, rtol=1e-5, atol=1e-7)
        assert (layer.experts.down[2] == old).float().mean() > 0.4  # 0.75 squared of it


def test_the_same_seed_gives_the_same_experts_and_another_seed_others():
    sources = [moved(dense("llama"), seed) for seed in range(3)]

    def made(seed: int, **options):
        model = dense("llama")
        report = sc.convert(model, sc.recipes.upit(5, **options), sources=sources, seed=seed)
        return [layer.experts.down.detach() for layer in layers(model)], report.children

    downs, children = made(0)
    again, same_children = made(0)
    assert children == same_children and all(map(torch.equal, downs, again))
    others, other_children = made(1)
    assert children[0].parents == other_children[0].parents  # sources do not depend on the seed
    assert children[0].alpha != other_children[0].alpha
    assert torch.equal(downs[0][:3], others[0][:3]) and not torch.equal(downs[0][3], others[0][3])
    pairs = {made(seed, parents="random")[1][0].parents for seed in range(12)}
    assert pairs == {(0, 1), (0, 2), (1, 2)}
    assert all(child.cosine is not None for child in made(0, parents="random")[1])


def test_no_expansion_with_one_expert_for_each_source_or_where_it_is_not_wanted():
    sources = [moved(dense("llama"), seed) for seed in range(2)]
    for recipe in (sc.recipes.upit(2), sc.recipes.upit(4, expand=False)):
        model = dense("llama")
        assert sc.convert(model, recipe, sources=sources).children == ()
        each = recipe.edits[0].experts.num_experts // 2
        for e in range(2 * each):
            wanted = sources[e // each].model.layers[0].mlp.down_proj.weight
            assert torch.equal(layers(model)[0].experts.down[e], wanted)
    assert sc.recipes.upit(4, expand=False).expansion is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_other_tensors_are_the_mean_of_the_given_sources_alone(on_disk, tmp_path):
    model = dense("gpt2")
    given = sources = [moved(model, seed) for seed in range(2)]
    if on_disk:
        given = [str(tmp_path / str(i)) for i in range(2)]
        for folder, source in zip(given, sources, strict=True):
            source.save_pretrained(folder)
    sc.convert(model, sc.recipes.upit(4), sources=given)
    states = [source.state_dict() for source in sources]
    for name, tensor in dense_tensors(model).items():
        if tensor.is_floating_point():
            mean = torch.stack([state[name] for state in states]).mean(0)
            torch.testing.assert_close(tensor, mean, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_sources_equal_to_the_base_start_exactly_although_their_cosine_is_undefined(family):
    model, wanted = dense(family), logits(dense(family), batch(family))
    report = sc.convert(model, sc.recipes.upit(4), sources=[dense(family)] * 2)
    assert report.certificate.exact
    torch.testing.assert_close(logits(model, batch(family)), wanted, rtol=1e-5, atol=1e-5)
    assert [child.cosine for child in report.children] == [None, None]
    assert "cosine undefined" in str(report.children[0])


def test_a_base_among_the_sources_has_no_children_while_others_differ():
    sources = [dense("llama"), moved(dense("llama"), 1), moved(dense("llama"), 2)]
    report = sc.convert(dense("llama"), sc.recipes.upit(6), sources=sources)
    assert all(0 not in child.parents for child in report.children)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("parents", ["least_similar", "random"])
def test_a_stream_gives_the_same_folder(family, parents, tmp_path):
    folder = base(tmp_path, family)
    sources = [base(tmp_path, family, seed, str(seed)) for seed in range(3)]
    recipe = sc.recipes.upit(6, parents=parents)
    in_memory(folder, recipe, tmp_path / "wanted", sources, seed=7)
    report = convert_files(folder, recipe, tmp_path / "out", sources=sources, seed=7, certify=False)
    same(tmp_path / "out", tmp_path / "wanted")
    assert len(report.children) == 3
    reported = json.loads((tmp_path / "out" / "report.json").read_text())["conversion"]["children"]
    assert reported[0]["expert"] == 3 and len(reported[0]["parents"]) == 2
    assert reported[0].keys() == {"expert", "parents", "alpha", "beta", "cosine"}


def test_a_stream_in_another_dtype_rounds_once(tmp_path):
    folder = base(tmp_path)
    sources = [base(tmp_path, seed=seed, name=str(seed)) for seed in range(2)]
    recipe, dtype = sc.recipes.upit(4), torch.bfloat16
    in_memory(folder, recipe, tmp_path / "wanted", sources, dtype=dtype)
    convert_files(folder, recipe, tmp_path / "out", sources=sources, dtype=dtype, certify=True)
    for name in ("moe.safetensors",):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


def test_a_child_is_made_when_it_is_read_and_never_kept():
    model = dense("llama")
    given = [open_source(model, moved(model, seed)) for seed in range(2)]
    counted = []

    def counting(source):
        def find(name: str):
            counted.append(name)
            return source.find(name)

        return dataclasses.replace(source, find=find)

    recipe = sc.recipes.upit(3)
    edits = plan(model, recipe)
    tensors = dict(model.named_parameters())
    sources, _ = expand(recipe, edits, [counting(s) for s in given], tensors.__getitem__)
    counted.clear()
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = sources[2].tensor(name), sources[2].tensor(name)
    assert counted == [name] * 4 and torch.equal(first, second) and first is not second
    sources[2].check_shape(name, first.shape)


def test_what_cannot_be_expanded_is_refused():
    def refused(match, recipe, count, error=RecipeError):
        model = dense("llama")
        with pytest.raises(error, match=match):
            sources = [moved(dense("llama"), seed) for seed in range(count)]
            sc.convert(model, recipe, sources=sources)
        assert not hasattr(model, "sparsecraft")

    refused("3 sources cannot give 2 experts; set num_experts=3 or more", sc.recipes.upit(2), 3)
    refused("1 source cannot be expanded to 4 experts.*give two", sc.recipes.upit(4), 1)
    refused("4 experts cannot come from 3 sources", sc.recipes.upit(4, expand=False), 3)
    lora = dataclasses.replace(sc.recipes.lora(2), expansion=ExpansionSpec())
    refused("lora experts, which come from one", lora, 2)
    two = sc.recipes.upit(4)
    uneven = dataclasses.replace(two, edits=uneven_edits(two))
    refused(r"have \[4, 6\] experts.*as many each", uneven, 2)
    for make, said in {
        lambda: sc.recipes.upit(drop=1.0): "drop is 1.0",
        lambda: sc.recipes.upit(sample=0.0): "sample is 0.0",
        lambda: sc.recipes.upit(alpha=0.0): "alpha is 0.0",
        lambda: sc.recipes.upit(parents="alike"): "parents is 'alike'",
        lambda: Deal(at_least=10, at_most=5): "at_least is 10 and at_most 5",
        lambda: Stage(fit=sc.recipes.cmoe().stages[0]): r"no fit: say it by .* Fit\(...\)",
        lambda: Stage(buckets=Deal()): r"no buckets: say it by deal=Deal\(...\)",
        lambda: Stage(epochs=0.0): "epochs is 0.0",
    }.items():
        with pytest.raises(RecipeError, match=said):
            make()


def test_the_recipe_is_the_papers():
    recipe = sc.recipes.upit()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    router, train = recipe.stages
    assert (router.name, router.epochs, router.deal.sample) == ("router", 4, 0.01)
    assert (
        router.losses == {"own_expert": 1.0} and sc.recipes.upit(alpha=1.0).stages[0].losses == {}
    )
    assert sc.recipes.upit(alpha=0.2).stages[0].losses == {"own_expert": pytest.approx(4)}
    assert (train.name, train.epochs, list(train.losses)) == ("train", 2, ["switch"])
    assert router.trains == train.trains == ("experts", "router")
    assert router.learning_rate == train.learning_rate == 2e-5
    assert sc.override(recipe, {"expansion.drop": "0.9"}).expansion.drop == 0.9


# ------------------------------------------------------------------------ buckets and forced tokens


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def dataset(rows: str, count: int = 40):
    found, _ = prepare(rows, tiny.tokenizer(), max_length=64)
    return found.select(range(count))


def mixture(sources, num_experts: int, **options):
    model = tiny.llama()
    sc.convert(model, sc.recipes.upit(num_experts, **options), sources=sources, unrelated=True)
    return model


def plain_losses(models, examples) -> torch.Tensor:
    """Row by row, the mean loss that transformers computes of its labels."""
    return torch.tensor(
        [
            [
                model(
                    input_ids=torch.tensor([row["input_ids"]]),
                    labels=torch.tensor([row["labels"]]),
                ).loss.item()
                for model in models
            ]
            for row in examples
        ]
    )


@torch.no_grad()
def test_the_bucket_is_the_source_with_the_least_perplexity(rows, tmp_path):
    sources = [moved(tiny.llama(), seed, 0.1, only=".mlp.") for seed in range(3)]
    model, examples = mixture(sources, 3), dataset(rows)
    wanted_NE, hooks = plain_losses(sources, examples), dict(model._forward_pre_hooks)
    for tokens in (1, 150, 4096):
        found_NE = row_losses(model, examples, pad_id=0, tokens=tokens)
        torch.testing.assert_close(found_NE, wanted_NE, rtol=1e-5, atol=1e-5)
    dealt, reported = deal(model, examples, tmp_path, pad_id=0, resume=False)
    numbers = wanted_NE.argmin(1).tolist()
    assert len(set(numbers)) > 1
    assert [row["expert"] for row in dealt] == [
        [n] * len(row["input_ids"]) for n, row in zip(numbers, examples, strict=True)
    ]
    assert reported["rows"] == [numbers.count(e) for e in range(3)]
    assert reported["mean_loss"] == pytest.approx(wanted_NE.mean(0).tolist(), abs=1e-5)
    assert all(layer.batches is None for layer in layers(model))
    assert model._forward_pre_hooks == hooks
    # A resumed run has the buckets of the run that it goes on with, whatever its experts are now.
    with torch.no_grad():
        for layer in layers(model):
            layer.experts.down.zero_()
    again, _ = deal(model, examples, tmp_path, pad_id=0, resume=True)
    assert again["expert"] == dealt["expert"]
    kept = json.loads((tmp_path / "buckets.json").read_text())
    kept["buckets"][0] = (kept["buckets"][0] + 1) % 3
    (tmp_path / "buckets.json").write_text(json.dumps(kept))
    with pytest.raises(SparsecraftError, match=r"buckets\.json is not what was written"):
        deal(model, examples, tmp_path, pad_id=0, resume=True)


def test_a_tie_goes_to_the_lower_number_and_empty_buckets_are_named(rows, tmp_path, caplog):
    model = tiny.llama()
    sc.convert(model, sc.recipes.upit(3))
    with caplog.at_level("WARNING", logger="sparsecraft"):
        _, reported = deal(model, dataset(rows), tmp_path, pad_id=0, resume=False)
    assert reported["rows"] == [40, 0, 0]
    assert "experts 1, 2 are empty" in caplog.text and "copies of one model" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_forced_tokens_run_the_experts_dense_model(family):
    sources = [
        moved(dense(family), seed, only="mlp" if family != "opt" else "fc") for seed in (1, 2)
    ]
    if family == "opt":  # its first layer norm has "final" in its name, its networks fc1 and fc2
        assert any(".fc1." in name for name, _ in sources[0].named_parameters())
    model, inputs = dense(family), batch(family)
    sc.convert(model, sc.recipes.upit(2), sources=sources)
    free = logits(model, inputs)
    with dealing.directed(model):
        for e, source in enumerate(sources):
            ids = torch.full_like(inputs["input_ids"], e)
            found = logits(model, inputs | {"expert_ids": ids})
            torch.testing.assert_close(found, logits(source, inputs), rtol=1e-4, atol=1e-5)
        mixed = torch.tensor([0, 1, 0])[:, None].expand_as(inputs["input_ids"])
        with sc.trace(model) as traced:
            found = logits(model, inputs | {"expert_ids": mixed})
        for row, e in enumerate((0, 1, 0)):
            wanted = logits(sources[e], inputs)[row]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)
        for routing in traced.values():
            assert torch.equal(routing.indices_TK[:, 0], mixed.flatten())
            assert (routing.weights_TK == 1).all() and routing.logits_TE.shape[1] == 2
        with pytest.raises(SparsecraftError, match=r"expert_ids has shape \(1, 12\) and 36 tokens"):
            model(**inputs, expert_ids=mixed[:1])
        assert torch.equal(logits(model, inputs), free)
    assert torch.equal(logits(model, inputs), free)


def test_the_loss_is_the_formula_with_padding_masked():
    torch.manual_seed(0)
    logits_TE = torch.randn(6, 3, requires_grad=True)
    indices_T1 = torch.tensor([0, 2, 1, 1, 0, 2])[:, None]
    mask_T = torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    routing = Routing(torch.ones(6, 1), indices_T1, logits_TE)
    kept = [logits_TE[t, indices_T1[t, 0]].sigmoid() for t in range(6) if mask_T[t]]
    wanted = torch.stack([F.binary_cross_entropy(p, torch.ones(())) for p in kept]).mean()
    torch.testing.assert_close(own_expert(routing, mask_T), wanted)
    own_expert(routing, mask_T).backward()
    assert (logits_TE.grad != 0).sum() == 4  # of each real token its own expert's logit


@pytest.mark.parametrize("packed", [False, True])
def test_the_batch_says_of_every_token_which_expert_it_goes_to(rows, packed):
    examples = dataset(rows, 6)
    by_ids: dict = {}
    for row in examples:
        by_ids.setdefault(tuple(row["input_ids"]), len(by_ids) % 3)
    column = [[by_ids[tuple(ids)]] * len(ids) for ids in examples["input_ids"]]
    dealt = examples.add_column("expert", column)
    assert len(by_ids) > 2
    if packed:
        dealt = pack(dealt, 64)
    found = collate(list(dealt), 0, packed=packed)
    ids_BS, mask_BS = found["expert_ids"], found["token_mask"]
    assert ids_BS.shape == mask_BS.shape
    seen = 0
    for row, ids_S, expert_S in zip(dealt, found["input_ids"], ids_BS, strict=True):
        lengths = row["seq_lengths"] if packed else [len(row["input_ids"])]
        documents = ids_S[: sum(lengths)].split(list(lengths))
        for ids, experts in zip(
            documents, expert_S[: sum(lengths)].split(list(lengths)), strict=True
        ):
            assert set(experts.tolist()) == {by_ids[tuple(ids.tolist())]}
            seen += 1
    assert seen == 6


def test_the_sample_has_a_floor_and_a_cap(rows):
    examples = dataset(rows)
    assert len(sampled(examples, Deal())) == 40
    spec = Deal(sample=0.1, at_least=1, at_most=30)
    assert sampled(examples, spec)["input_ids"] == examples["input_ids"][:4]
    assert len(sampled(examples, dataclasses.replace(spec, at_least=7))) == 7
    assert len(sampled(examples, dataclasses.replace(spec, sample=1.0))) == 30


# --------------------------------------------------------------------------------------- the stages


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packing", [False, True])
def test_the_router_stage_trains_experts_and_rows_on_their_own_data(tmp_path, rows, packing):
    """Rows of ten words are assigned; afterwards each expert's logits favor its own rows."""
    sources = [moved(tiny.llama(), seed, 0.1, only=".mlp.") for seed in range(2)]
    model, examples = mixture(sources, 3), dataset(rows)
    before = parameters(model)
    report = sc.train(
        model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), stages=("router",),
        learning_rate=1e-3, router_learning_rate=3e-2, packing=packing, **FAST,
    )  # fmt: skip
    (entry,) = model.sparsecraft.report["training"]
    counts = entry["buckets"]["rows"]
    assert sum(counts) == 40 and sum(count > 0 for count in counts) > 1
    assert entry["settings"]["epochs"] == 4 and len(entry["buckets"]["mean_loss"]) == 3
    assert report.steps == 40 if not packing else 0 < report.steps < 40
    assert entry["counts"]["dealt"] == 40 and entry["counts"]["trained_tokens"] == 152
    log = [step for step in entry["log"] if "own_expert_loss" in step]
    assert log[-1]["own_expert_loss"] < log[0]["own_expert_loss"] - 0.1
    for name, value in parameters(model).items():
        ours = ".experts." in name or ".router." in name
        for e, (new, old) in enumerate(zip(value, before[name], strict=True)):
            if not ours or not counts[e]:
                assert torch.equal(new, old), name
        assert ours != torch.equal(value, before[name]), name
    _favor(model, before, examples, counts)
    loaded = sc.load(tmp_path / "out")
    assert loaded.sparsecraft.report["training"][0]["buckets"]["rows"] == counts
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def _favor(model, before, examples, counts) -> None:
    """Each expert's mean logit on its own rows rose, and is above an untrained row's."""
    start = copy.deepcopy(model)
    start.load_state_dict(before, strict=False)
    losses_NE = row_losses(start, examples, pad_id=0)
    for e in (e for e, count in enumerate(counts) if count):
        own = [row for row, n in zip(examples, losses_NE.argmin(1).tolist(), strict=True) if n == e]
        means = []
        for net in (start, model):
            with dealing.directed(net), sc.trace(net) as traced:
                for row in own[:4]:
                    ids = torch.tensor([row["input_ids"]])
                    net(ids, expert_ids=torch.full_like(ids, e))
                    means.append([r.logits_TE[:, e].mean() for r in traced.values()])
        old, new = torch.tensor(means).chunk(2)
        assert (new.mean(0) > old.mean(0) + 0.1).all(), e


@pytest.mark.parametrize("packing", [False, True])
def test_the_objective_is_that_of_the_sources_own_models(tmp_path, rows, packing):
    """A step on all rows: L_lm of each row's source, and -log sigmoid(h r_i) of what its FFNs
    read, by the dense models alone."""
    sources = [moved(tiny.llama(), seed, 0.1, only=".mlp.") for seed in range(3)]
    examples, totals, aux, counts = dataset(rows), [0.0, 0], [], [0, 0, 0]
    model = tiny.llama()
    recipe = sc.override(sc.recipes.upit(3, alpha=0.2), {"stages.0.trains": "router"})
    sc.convert(model, recipe, sources=sources, unrelated=True)
    before = parameters(model)
    with torch.no_grad():
        for row, losses_E in zip(examples, plain_losses(sources, examples), strict=True):
            best = losses_E.argmin().item()
            counts[best] += 1
            targets = sum(label != -100 for label in row["labels"][1:])
            totals[0] += losses_E[best].item() * targets
            totals[1] += targets
            read = []
            hooks = [
                block.mlp.register_forward_pre_hook(
                    lambda _, args, read=read: read.append(args[0][0])
                )
                for block in sources[best].model.layers
            ]
            sources[best](torch.tensor([row["input_ids"]]))
            for hook in hooks:
                hook.remove()
            pairs = zip(read, layers(model), strict=True)
            aux.append(
                [-(h_SD @ own.router.scorer.weight[best]).sigmoid().log() for h_SD, own in pairs]
            )
    by_layer = [torch.cat(tokens).mean() for tokens in zip(*aux, strict=True)]
    wanted = torch.stack(by_layer).mean().item()
    options = FAST | {"batch_size": 40, "micro_batch": 40, "max_length": 64}
    sc.train(
        model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), stages=("router",), steps=2,
        packing=packing, learning_rate=1e-3, **options,
    )  # fmt: skip
    entry = model.sparsecraft.report["training"][0]
    assert entry["buckets"]["rows"] == counts and all(counts)
    assert entry["log"][0]["own_expert_loss"] == pytest.approx(wanted, abs=1e-5)
    # (0.2 L_lm + 0.8 L_aux) / 0.2
    assert entry["log"][0]["loss"] == pytest.approx(totals[0] / totals[1] + 4 * wanted, abs=1e-4)
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name]) != (".router." in name), name


def test_both_stages_run_as_the_recipe_says_and_the_users_numbers_win(tmp_path, rows, monkeypatch):
    sources = [moved(tiny.llama(), seed, 0.1) for seed in range(2)]
    model, seen = mixture(sources, 4), []
    descend = training.descend

    def watching(run, stage, settings, *args):
        result = descend(run, stage, settings, *args)
        seen.append((stage.name, settings.epochs, result[1].steps))
        return result

    monkeypatch.setattr(training, "descend", watching)
    options = FAST | {"packing": False}
    sc.train(copy.deepcopy(model), rows, tmp_path / "a", tokenizer=tiny.tokenizer(), **options)
    assert seen == [("router", 4.0, 40), ("train", 2.0, 20)]
    seen.clear()
    sc.train(
        copy.deepcopy(model), rows, tmp_path / "b", tokenizer=tiny.tokenizer(), epochs=1, **options
    )
    assert seen == [("router", 1, 10), ("train", 1, 10)]
    seen.clear()
    sc.train(model, rows, tmp_path / "c", tokenizer=tiny.tokenizer(), steps=3, **options)
    assert [steps for _, _, steps in seen] == [3, 3]
    log = model.sparsecraft.report["training"][1]["log"]
    assert any("switch_loss" in step for step in log)
    assert settings.fill(model, Stage(), settings.checked({})).epochs == 1.0


def test_activation_checkpointing_changes_nothing(tmp_path, rows):
    sources = [moved(tiny.llama(), seed, 0.1) for seed in range(2)]
    found = []
    for checkpointing in (False, True):
        model = mixture(sources, 2)
        sc.train(
            model, rows, tmp_path / f"{checkpointing}", tokenizer=tiny.tokenizer(), steps=3,
            stages=("router",), activation_checkpointing=checkpointing, **FAST,
        )  # fmt: skip
        found.append(parameters(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interrupted", ["router", "train"])
def test_a_run_that_was_interrupted_goes_on(tmp_path, rows, monkeypatch, interrupted):
    sources = [moved(tiny.llama(), seed, 0.1) for seed in range(2)]
    options = {"tokenizer": tiny.tokenizer(), "steps": 6, "save_every": 2, **FAST}
    options |= {"learning_rate": 1e-2}
    wanted, model = mixture(sources, 3), mixture(sources, 3)
    sc.train(wanted, rows, tmp_path / "wanted", **options)

    def stop(trainer, *args, **kwargs):
        if trainer.stage.name == interrupted and trainer.state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparsecraft.training.trainers.RoutedTrainerMixin._tell_step", stop)
        with pytest.raises(KeyboardInterrupt):
            sc.train(model, rows, tmp_path / "out", **options)
    assert all(layer.batches is None for layer in layers(model))
    # The model has moved, and the rows keep the buckets that they were dealt into.
    sc.train(model, rows, tmp_path / "out", resume=True, **options)
    for name, tensor in parameters(wanted).items():
        assert torch.equal(tensor, model.get_parameter(name)), name
    stages = [m.sparsecraft.report["training"] for m in (wanted, model)]
    assert stages[0][0]["buckets"] == stages[1][0]["buckets"]


def test_stages_that_cannot_deal_rows_out_are_refused_before_any_work(tmp_path, rows, monkeypatch):
    def refused(match, model, **options):
        with pytest.raises(SparsecraftError, match=match):
            sc.train(model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), **options, **FAST)
        assert not (tmp_path / "out.training").exists()

    t5 = dense("t5")
    sc.convert(t5, sc.recipes.upit(4))
    refused("perplexity of causal language models, and this T5.* is a seq2seq model", t5)
    model = mixture([], 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("'router' assigns rows in one process and was started in 2", model)
    monkeypatch.delenv("WORLD_SIZE")
    stage = sc.recipes.upit().stages[0]
    split = tiny.llama()
    sc.convert(split, dataclasses.replace(sc.recipes.gmoefication(4, 2), stages=(stage,)))
    refused("cannot be assigned to the SplitExperts.*this one is: mlp, top-", split)
    mixed = sc.recipes.camelidae(4, 2, adapter_dim=8, lora_rank=0)
    edits = uneven_edits(mixed)
    uneven = tiny.llama()
    sc.convert(uneven, dataclasses.replace(mixed, edits=edits, stages=(stage,)))
    refused("as many experts in every layer; those of this LlamaForCausalLM have 4, 6", uneven)


# ----------------------------------------------------------------- checkpoints of a run, end to end


def fine_tuned(folder, out, rows, lora: bool = False) -> list[str]:
    """The checkpoints of one run of transformers' Trainer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if lora:
        import peft

        config = peft.LoraConfig(r=4, target_modules=list(FFN), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=4, save_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=dataset(rows),
        data_collator=lambda features: {
            k: v for k, v in collate(features, 0).items() if k != "token_mask"
        },
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return sorted(map(str, out.glob("checkpoint-*")))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_from_the_checkpoints_of_a_run_to_a_trained_mixture(tmp_path, rows, lora, stream, capsys):
    folder = tiny.save_dense(tmp_path / "base")
    sources = fine_tuned(folder, tmp_path / "run", rows, lora)
    assert len(sources) == 2
    capsys.readouterr()
    out, trained = tmp_path / "upit", tmp_path / "trained"

    def run(*arguments) -> str:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    text = run("convert", "upit", "--model", folder, "--sources", *sources, "--num-experts", 4,
               "--out", out, *(["--stream"] if stream else []))  # fmt: skip
    assert "Expert 2: the base, " in text and "Expert 3: " in text and "cosine" in text
    model = sc.load(out)
    assert layers(model)[0].experts.num_experts == 4
    reported = json.loads((out / "report.json").read_text())["conversion"]
    assert reported["sources"] == sources and reported["children"][0]["parents"] == [0, 1]
    if stream:
        return
    fast = ["--steps", 2, "--batch-size", 4, "--max-length", 64, "--no-progress"]
    run("train", out, "--data", rows, "--out", trained, *fast)
    stages = json.loads((trained / "report.json").read_text())["training"]
    assert [stage["stage"] for stage in stages] == ["router", "train"]
    assert sum(stages[0]["buckets"]["rows"]) == 40 and "buckets" not in stages[1]
    run("train", out, "--data", rows, "--out", tmp_path / "alone", "--stages", "router", *fast)
    stages = json.loads((tmp_path / "alone" / "report.json").read_text())["training"]
    assert [stage["stage"] for stage in stages] == ["router"]


def test_the_number_of_experts_on_the_command_line():
    from sparsecraft.cli.convert import ConvertCommand

    def parsed(function, *argv: str):
        words = [function.__name__, "--model", "BASE", "--out", "OUT", "--sources", "A", "B", *argv]
        return ConvertCommand.read("convert", words).arguments["num_experts"]

    assert parsed(sc.recipes.upit) == 8 and parsed(sc.recipes.upit, "--num-experts", "8") == 8
    assert parsed(sc.recipes.upit, "--no-expand") == 2
    assert parsed(sc.recipes.btx) == 2 and parsed(sc.recipes.btx, "--num-experts=4") == 4
