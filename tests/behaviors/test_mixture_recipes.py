"""Mixtures of vectors and of LoRAs are the papers' equations, in whole models of many families.

PEFT and the parameter formulas are in `test_mixture_oracles.py`; starts, dropout and checkpoints
of the same recipes in `test_recipes.py`.
"""

from __future__ import annotations

import functools

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_name
from tests.cases import D, E, F, K, R, batch
from tests.leaves import ALL, FFN, Leaves, converted, exact, near, objective, small
from tests.reference import installed, mixtures

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5", "t5_gated", "bert"])
HEAD = 8
SIX = ("query", "key", "value", "output", "gate", "down")


def start(family: str, recipe: sc.Recipe) -> tuple:
    """The converted model, the dense one for the transcription, and its parameters."""
    model = converted(family, recipe)
    return model, exact(family), Leaves(model)


def agree(family: str, model, reference, leaves: Leaves, idle: str = "no", **extra) -> None:
    """Logits, and the gradient of every new parameter, which only names with `idle` lack."""
    inputs = small(family)
    found, wanted = model(**inputs, **extra).logits, reference(**inputs).logits
    assert not near(wanted, exact(family)(**inputs).logits, 1e-3), "the experts do nothing"
    assert near(found, wanted)
    objective(found).backward()
    objective(wanted).backward()
    new = {name: p for name, p in model.named_parameters() if dense_name(model, name) is None}
    assert new.keys() == leaves.of.keys()
    for name, parameter in new.items():
        met = leaves.of[name].grad
        wanted = torch.zeros_like(parameter) if met is None else met  # None: no token met it
        assert near(parameter.grad, wanted), name
        assert wanted.any() or idle in name, name


# ------------------------------------------------------------------------------- the papers' models

VECTORS = {
    "ia3": (sc.recipes.ia3(), {}),
    "mov": (sc.recipes.mov(E), {}),
    "mov_top2": (sc.recipes.mov(E, top_k=K), {"k": K}),
    "mov_raw": (sc.recipes.mov(E, top_k=K, renormalize=False), {"k": K, "renormalize": False}),
}


@FAMILIES
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_the_papers(name, family):
    recipe, kwargs = VECTORS[name]
    model, reference, leaves = start(family, recipe)
    installed.mov(reference, family, leaves.at, **kwargs)
    agree(family, model, reference, leaves)


@FAMILIES
@pytest.mark.parametrize("k", [None, K])
def test_released_mov_is_the_published_code(k, family):
    model, reference, leaves = start(family, sc.recipes.mov(E, "released", k))
    installed.mov_released(reference, family, leaves.at, HEAD, k)
    agree(family, model, reference, leaves)


def single(x, weight, bias, router, a, b, alpha):
    assert router is None
    return mixtures.lora(x, weight, bias, a[0], b[0], alpha)


def shared(x, weight, bias, router, a, b, alpha):
    assert len(a) == 1
    return mixtures.hydralora(x, weight, bias, router, a[0], b, alpha)


RAW = {"k": K, "renormalize": False}
LOW_RANK = {
    "lora": (sc.recipes.lora(R, alpha=12), ALL, single, {"alpha": 12}),
    "molora": (sc.recipes.molora(E, R), ALL, mixtures.molora, {"alpha": 16}),
    "molora_top2": (sc.recipes.molora(E, R, top_k=K), ALL, mixtures.molora, {"alpha": 16, "k": K}),
    "hydralora": (sc.recipes.hydralora(E, R), FFN, shared, {"alpha": 32}),
    "smola": (sc.recipes.smola(E, R), ALL, mixtures.smola, {}),
}


@FAMILIES
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_updates_are_the_papers(name, family):
    recipe, roles, equation, kwargs = LOW_RANK[name]
    model, reference, leaves = start(family, recipe)
    found = installed.whole(installed.places(reference, family, *roles))
    installed.low_rank(reference, found, functools.partial(equation, **kwargs), leaves.at)
    agree(family, model, reference, leaves)


@FAMILIES
@pytest.mark.parametrize("name", ["lora", "molora", "molora_raw"])
def test_released_low_rank_updates_leave_the_linear_branch(name, family):
    """q, k, v, o, the gate or the only input matrix, and down: each apart even if fused."""
    kwargs = {"top_k": K} if name == "molora_raw" else {}
    make = sc.recipes.lora if name == "lora" else functools.partial(sc.recipes.molora, E)
    model, reference, leaves = start(family, make(R, variant="released", **kwargs))
    roles = SIX if "gate" in installed.ROLES[family] else (*SIX, "up")
    equation = single if name == "lora" else mixtures.molora
    equation = functools.partial(equation, alpha=16, **(RAW if kwargs else {}))
    found = installed.places(reference, family, *roles)
    installed.low_rank(reference, found, equation, leaves.at)
    agree(family, model, reference, leaves)


@FAMILIES
@pytest.mark.parametrize("k", [1, K])
def test_mixlora_is_the_papers(k, family):
    model, reference, leaves = start(family, sc.recipes.mixlora(E, k, R))
    paths = [n for n, m in model.named_modules() if isinstance(m, MoELayer) and m.router]

    def read(index):
        path, loras = paths[index], {}
        for role, bank in model.get_submodule(f"{path}.experts").named_children():
            if not hasattr(bank, "lora_A"):  # a dropout
                continue
            parts = [leaves.leaf(f"{path}.experts.{role}.lora_{part}") for part in "AB"]
            loras[role] = parts
        if family == "phi3":  # one LoRA on the fused gate and up: they share A
            a, b = loras["up"]
            loras |= {"gate": (a, b[:, :F]), "up": (a, b[:, F:])}
        return leaves.leaf(f"{path}.router.scorer.weight"), loras

    installed.mixlora(reference, family, read, 32, k)
    attention = installed.places(reference, family, "query", "key", "value", "output")
    equation = functools.partial(single, alpha=32)
    installed.low_rank(reference, installed.whole(attention), equation, leaves.at)
    agree(family, model, reference, leaves, idle="scorer" if k == 1 else "no")  # its weight is one


@pytest.mark.parametrize("family", ["llama", "phi3", "t5_gated"])
def test_smola_by_modality_is_the_papers(family):
    """Three sets at every Linear, in the order all, text, visual of the recipe's edits."""
    model, reference, leaves = start(family, sc.recipes.smola(E, R, modalities=True))
    types = torch.tensor([[0, 1, 1], [1, 0, 0]])
    kinds = ["visual" if visual else "text" for visual in types.flatten()]

    def read(path, rows):
        sets = {}
        for inner in leaves.layers(path, rows):
            names = ("router.scorer.weight", "experts.lora_A", "experts.lora_B")
            sets[model.get_submodule(inner).modality or "all"] = [
                leaves.leaf(f"{inner}.{name}") for name in names
            ]
        # A decoder's tokens are text, but for what it reads of the encoder.
        crosses = path.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        beside = family == "t5_gated" and path.startswith("decoder") and not crosses
        return sets, ["text"] * len(kinds) if beside else kinds

    def equation(x, weight, bias, sets, kinds):
        return mixtures.omni_smola(x, kinds, weight, bias, sets)

    found = installed.whole(installed.places(reference, family, *ALL))
    installed.low_rank(reference, found, equation, read)
    agree(family, model, reference, leaves, idle="decoder", mm_token_type_ids=types)


def test_slots_are_soft_moe(family="bert"):
    """In an encoder, where every token of a sequence may be mixed."""
    model, reference, leaves = start(family, sc.recipes.smola(E, R, mixing="slots"))
    length = small(family)["input_ids"].shape[1]

    def by_sequence(x, *parts):
        return torch.cat([mixtures.smola_slots(s, *parts) for s in x.split(length)])

    found = installed.whole(installed.places(reference, family, *ALL))
    installed.low_rank(reference, found, by_sequence, leaves.at)
    agree(family, model, reference, leaves)


# ----------------------------------------------------------------------------- two ways to mix


def test_the_two_forms_of_the_equations_agree():
    x, weight = torch.randn(5, D).double(), torch.randn(F, D).double()
    router, vectors = torch.randn(E, D).double(), torch.randn(E, F).double()
    a, b = torch.randn(E, R, D).double(), torch.randn(E, F, R).double()
    u = x @ weight.T
    assert near(mixtures.mov(u, x, router, vectors), mixtures.mov_outputs(u, x, router, vectors))
    parts = (x, weight, None, router, a, b, 16)
    outputs = mixtures.molora(*parts)
    assert near(outputs, mixtures.molora_concatenated(*parts))
    averaged = mixtures.molora(x, weight, None, router[:1], a.mean(0)[None], b.mean(0)[None], 16)
    assert not near(outputs, averaged, 0.1), "averages of A and B are another function"
    tied = mixtures.molora(x, weight, None, router, a[:1].expand_as(a), b, 16)
    assert near(tied, mixtures.hydralora(x, weight, None, router, a[0], b, 16))


MIXED = {
    "mov": sc.recipes.mov(E),
    "mov_raw": sc.recipes.mov(E, top_k=K, renormalize=False),
    "mov_released": sc.recipes.mov(E, "released"),
    "molora": sc.recipes.molora(E, R),
    "molora_raw": sc.recipes.molora(E, R, "released", top_k=K),
    "hydralora": sc.recipes.hydralora(E, R, attention=True),
    "smola_modalities": sc.recipes.smola(E, R, modalities=True),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", MIXED)
def test_mixing_parameters_equals_mixing_outputs(name, family):
    """The merged path against the loop over experts, to float64's precision."""
    results = []
    for path in ("loop", "merged"):
        model = converted(family, MIXED[name], path)
        found = model(**small(family)).logits
        objective(found).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        results[-1]["logits"] = found.detach()
    assert results[0].keys() == results[1].keys()
    assert all(near(results[1][n], results[0][n]) for n in results[0])


# ------------------------------------------------------------------------------ starts and experts


@pytest.mark.parametrize("variant", ["paper", "released"])
@FAMILIES
def test_raw_top_k_starts_as_the_dense_model_shrunk(family, variant):
    """Each site's output is the dense one times the probability that the top k kept."""
    model = exact(family)
    sc.convert(model, sc.recipes.mov(10, variant, top_k=2, renormalize=False))
    found = model(**small(family)).logits
    assert not near(found, exact(family)(**small(family)).logits, 1e-2)
    masses = []
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        weight = layer.router.scorer.weight
        x = torch.randn(6, D if variant == "paper" or hasattr(layer, "weight") else F).double()
        base = layer.base(x)
        start, length = layer.rows or (0, base.shape[1])
        read = x if variant == "paper" else base[:, start : start + length]
        read = read.reshape(6, -1, weight.shape[1])
        mass = (read @ weight.T).softmax(-1).topk(2).values.sum(-1, keepdim=True)
        y = base.clone()
        part = base[:, start : start + length].reshape(*mass.shape[:2], -1)
        y[:, start : start + length] = (mass * part).reshape(6, length)
        assert near(layer(x), y)
        masses.append(mass.mean())
    assert 0.15 < torch.stack(masses).mean() < 0.9


@pytest.mark.parametrize("path", ["loop", "merged", "auto"])
@pytest.mark.parametrize(
    "recipe",
    [
        sc.recipes.mov(E, top_k=1, renormalize=False),
        sc.recipes.mov(E, "released", top_k=1),
        sc.recipes.molora(E, R, top_k=1, renormalize=False),
        sc.recipes.mixlora(E, 1, R, attention_rank=0),
    ],
    ids=["mov", "mov_released", "molora", "mixlora"],
)
def test_an_expert_without_tokens_gets_zero_not_none(recipe, path):
    model, idle = converted("llama", recipe, path), 0
    inputs = {name: value[:1, :2] for name, value in batch("llama").items()}
    with sc.trace(model) as routing:
        objective(model(**inputs).logits).backward()
    for name, layer in routing.items():
        served = set(layer.indices_TK.flatten().tolist())
        parameters = model.get_submodule(f"{name}.experts").named_parameters()
        for part, parameter in parameters:
            for e in range(E):
                gradient = parameter.grad[e]
                assert bool(gradient.any()) == (e in served), (name, part, e)
                idle += e not in served
    assert idle


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_do_not_sum_to_one_count_the_bias_as_often(family):
    """Of a network with a bias behind it, gathered for all experts of a token at once."""
    recipe = sc.override(
        sc.recipes.mixlora(E, K, R, attention_rank=0),
        {"router.select.renormalize": False, "exact_at_start": False},
    )
    found = []
    for path in ("loop", "auto"):
        model = converted(family, recipe, path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
            found.append(model(**batch(family)).logits)
    assert torch.allclose(*found, atol=1e-5 * found[0].abs().max())
