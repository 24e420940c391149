"""What every kind of experts answers for itself, and what is refused with a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import nn

import sparsecraft as sc
from sparsecraft.dense.donors import view
from sparsecraft.dense.sites import find_sites
from sparsecraft.errors import MergeError, RecipeError, SparsecraftError
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.build import BANKS, build_experts, register
from sparsecraft.moe.experts.folded import Network, Scale, Update
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import (
    AdapterSpec,
    AttentionSpec,
    ExpertsSpec,
    FFNLoRASpec,
    FFNSpec,
    LoRASpec,
    MPOSpec,
    SplitSpec,
    VectorSpec,
    stands,
)
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.heterogeneous import HeterogeneousSpec
from tests.cases import dense

E, T, D = 4, 6, 32

# (spec, site, place) of one bank of each kind, and of the further forms that some have.
CASES = {
    "ffn": (FFNSpec(num_experts=E), "ffn", "replace"),
    "ffn shards": (FFNSpec(num_experts=E, granularity=2), "ffn", "replace"),
    "mpo": (MPOSpec(num_experts=E), "ffn", "replace"),
    "heterogeneous": (
        HeterogeneousSpec(num_experts=E, constant=1, copy=1, zero=0),
        "ffn",
        "replace",
    ),
    "attention": (AttentionSpec(num_experts=E), "attention", "replace"),
    "attention shared": (AttentionSpec(num_experts=E, kv="shared"), "attention", "replace"),
    "adapter": (AdapterSpec(num_experts=E, dim=8, scale=0.5), "ffn", "after"),
    "lora": (LoRASpec(num_experts=E, rank=3), "output", "beside"),
    "lora shared": (LoRASpec(num_experts=E, rank=3, shared_a=True), "output", "beside"),
    "vector": (VectorSpec(num_experts=E), "key", "after"),
    "ffn_lora": (FFNLoRASpec(num_experts=E, rank=3), "ffn", "inside"),
    "split": (SplitSpec(num_experts=E, partition="contiguous", compensate=True), "ffn", "replace"),
    "imitation": (SplitSpec(num_experts=E), "attention_linear", "imitate"),
}
cases = pytest.mark.parametrize("case", CASES)
TOKENWISE = [name for name in CASES if not name.startswith("attention")]
NETWORKS = ("ffn", "mpo", "attention", "attention shared")


def made(case: str, family: str = "llama") -> tuple[Experts, nn.Module, object, Edit]:
    """A bank of random numbers; the dense module and the view of it where it stands."""
    spec, word, place = CASES[case]
    model = dense(family)
    site = find_sites(model, word)[0]
    donor = view(model, site)
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    bank = build_experts(spec, donor, site, place, **where).eval()
    generator = torch.Generator().manual_seed(3)
    for tensor in (*bank.parameters(), *(b for b in bank.buffers() if b.is_floating_point())):
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    router = sc.recipes.upcycling(E, 2).edits[0].router
    gate = sc.recipes.moefication(E, 2).edits[0].router
    edit = Edit(site=word, place=place, experts=spec, router=gate if spec.parts else router)
    return bank, model.get_submodule(site.path), donor, edit


def needs_base(case: str, base: nn.Module) -> dict:
    return {"base": base} if case == "ffn_lora" else {}


def width(case: str) -> int:
    return {"vector": 16}.get(case, D)


def test_every_registered_kind_has_a_case():
    ours = {spec for spec in BANKS if spec.__module__.startswith("sparsecraft.")}
    assert {type(spec) for spec, _, _ in CASES.values()} == ours


@pytest.mark.parametrize("case", TOKENWISE)
def test_each_gives_every_expert_on_every_token(case):
    bank, base, _, _ = made(case)
    x_TD = torch.randn(T, width(case))
    y_TEO = bank.each(x_TD, **needs_base(case, base))
    assert y_TEO.shape == (T, E, bank.out_features)
    for e in range(E):
        assert torch.equal(y_TEO[:, e], bank.expert(e, x_TD, **needs_base(case, base)))


@pytest.mark.parametrize("case", TOKENWISE)
def test_only_is_one_expert_with_memory_of_its_own(case):
    bank, base, _, _ = made(case)
    x_TD = torch.randn(T, width(case))
    before = {name: p.clone() for name, p in bank.named_parameters()}
    for e in range(E):
        alone = bank.only(e)
        assert alone.num_experts == 1 and type(alone) is type(bank)
        one = alone.expert(0, x_TD, **needs_base(case, base))
        assert torch.equal(one, bank.expert(e, x_TD, **needs_base(case, base)))
        with torch.no_grad():
            for parameter in alone.parameters():
                parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in bank.named_parameters())
    assert bank.num_experts == E


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_only_of_attentions_is_the_layer_with_that_expert_chosen(kv):
    bank, *_ = made("attention" if kv == "expert" else "attention shared")
    model = dense("llama")
    x_BSD = torch.randn(2, 5, D)
    where = model.model.rotary_emb(x_BSD, torch.arange(5)[None])
    for e in (0, E - 1):
        chosen, single = torch.zeros(10, E), torch.ones(10, 1)
        chosen[:, e] = 1
        wanted = bank(x_BSD, _weights(chosen), position_embeddings=where, attention_mask=None)[0]
        alone = bank.only(e)
        found = alone(x_BSD, _weights(single), position_embeddings=where, attention_mask=None)[0]
        assert (found - wanted).abs().max() <= 1e-5
        numbers = sum(p.numel() for p in alone.parameters())
        assert numbers < sum(p.numel() for p in bank.parameters())


def _weights(weights_TE: torch.Tensor) -> Routing:
    indices_TE = torch.arange(weights_TE.shape[1]).expand(weights_TE.shape)
    return Routing(weights_TE, indices_TE, torch.zeros_like(weights_TE), in_order=True)


def held_once(bank: Experts) -> list[str]:
    """Names of the parameters that are no expert's own."""
    held = dict(bank.named_parameters())
    return [name for name in bank.one_for_all if name in held]


@cases
def test_active_parameters_follow_the_slots(case):
    bank, *_ = made(case)
    total = sum(p.numel() for p in bank.parameters())
    assert bank.active(E) == total
    if bank.merges:
        assert bank.active(1) == total, "all are mixed before they meet a token"
    elif case in ("split", "imitation"):
        assert bank.active(1) == total - bank.products * (E - 1) // E
    elif case == "heterogeneous":  # .75 of a slot in 2 * .75 + 2 is a network's, one of two
        network = 3 * 32 * 48 + 2 * 48 + 32
        assert bank.active(1) == 3 * 32 + network * 2 - int(network * 2 * (2 - 1.5 / 3.5) / 2)
    else:
        shared = sum(getattr(bank, name).numel() for name in held_once(bank))
        assert bank.active(1) == shared + (total - shared) // E
    if case == "mpo":  # three whole matrices, 32 by 48, in each of three slots; biases for all
        assert bank.active(3) + bank.repeated(3) == 3 * (3 * 32 * 48) + (2 * 48 + 32)
    else:
        assert bank.repeated(3) == (2 * total if case == "ffn_lora" else 0)


@cases
def test_folds_give_what_the_bank_says_or_a_reason(case):
    bank, _, _, edit = made(case)
    site = find_sites(dense("llama"), edit.site)[0]
    one = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    reason = bank.why_no_fold(edit, site, single=True)
    found = bank.fold(one)
    if reason is None:
        assert type(found) is bank.folds
    else:
        assert len(reason.split()) > 5


def test_folds_are_the_experts_mathematics():
    weights_E = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    bank, *_ = made("lora")
    x_TD = torch.randn(T, D)
    update = bank.fold(weights_E)
    assert isinstance(update, Update)
    wanted = torch.einsum("e,teo->to", weights_E.float(), bank.each(x_TD))
    assert torch.allclose(x_TD @ update.deltas[""].float().t(), wanted, atol=1e-5)
    bank, *_ = made("vector")
    scale = bank.fold(weights_E)
    assert isinstance(scale, Scale)
    x_TD = torch.randn(T, 16)
    wanted = torch.einsum("e,teo->to", weights_E.float(), bank.each(x_TD))
    assert torch.allclose(x_TD * scale.factors_O.float(), wanted, atol=1e-6)
    bank, *_ = made("ffn")
    network = bank.fold(torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    assert isinstance(network, Network)
    assert torch.equal(network.first, bank.gate_up[2]) and torch.equal(network.down, bank.down[2])


def test_averages_and_joins_are_one_expert():
    bank, *_ = made("adapter")
    average = bank.averaged()
    assert average.num_experts == 1 and average.down.dtype == torch.float64
    assert torch.allclose(average.up[0].float(), bank.up.mean(0), atol=1e-6)
    weights_E = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    joined = bank.joined(weights_E)
    assert joined["down"].shape == (1, E * 8, D)
    x_TD = torch.randn(T, D)
    hidden = bank.activation(x_TD @ joined["down"][0].t())
    one = x_TD + bank.scale * hidden @ joined["up"][0].float().t()
    assert torch.allclose(
        one, torch.einsum("e,teo->to", weights_E.float(), bank.each(x_TD)), atol=1e-5
    )
    assert AdapterSpec(num_experts=E, dim=8).joined(E) == AdapterSpec(num_experts=1, dim=8 * E)


@pytest.mark.parametrize("case", [name for name in CASES if name.partition(" ")[0] not in NETWORKS])
def test_what_is_no_network_cannot_come_or_go(case):
    bank, _, donor, edit = made(case)
    for act in (lambda: bank.append(donor), lambda: bank.remove(0), lambda: bank.take([donor], 1)):
        with pytest.raises(SparsecraftError, match=type(bank).__name__):
            act()
    assert bank.copied(donor) is None and not bank.shared_parts()
    if edit.experts.joins is None:
        with pytest.raises(SparsecraftError, match="no single expert"):
            bank.joined(torch.ones(E))
        with pytest.raises(RecipeError, match="no one expert"):
            edit.experts.joined(E)


# ----------------------------------------------------------------------------------- a further kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftSpec(ExpertsSpec):
    """Vectors that are added."""

    kind: Literal["shift"] = "shift"
    num_experts: int = 3
    places = stands(after=("ffn", "linear"))


class ShiftExperts(Experts):
    def __init__(self, spec: ShiftSpec, width: int, **where):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, width
        self.shifts = nn.Parameter(torch.zeros(spec.num_experts, width, **where))

    @classmethod
    def build(cls, spec, donor, site, place, *, device, dtype):
        return cls(spec, donor.out_features, device=device, dtype=dtype)

    def expert(self, e, x):
        return x + self.shifts[e].to(x.dtype)


register(ShiftSpec, ShiftExperts)


def shifted(**changes) -> sc.Recipe:
    router = sc.recipes.upcycling(3, 2).edits[0].router
    edit = Edit(site="ffn", place="after", experts=ShiftSpec(**changes), router=router)
    return sc.Recipe(
        name="shift",
        title="Shifts",
        paper="None",
        exact_at_start=True,
        edits=(edit,),
        stages=(sc.Stage(losses={}),),
    )


def test_a_kind_from_outside_costs_one_line():
    model = dense("llama")
    assert from_json(to_json(shifted())) == shifted()
    report = sc.convert(model, shifted())
    assert report.certificate.exact
    assert report.cost.new == 2 * (3 * D + 3 * D)  # shifts and router rows of two layers
    with pytest.raises(MergeError, match="nothing is known of what its experts"):
        sc.merge(model, "average")
    layer = model.sparsecraft.layers[0]
    assert layer.experts.only(1).num_experts == 1
    sc.revert(model)


def test_a_second_kind_of_the_same_word_is_refused():
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Other(ExpertsSpec):
        kind: Literal["shift"] = "shift"
        num_experts: int = 3

    with pytest.raises(RecipeError, match="ShiftSpec"):
        register(Other, ShiftExperts)


def test_a_kind_without_a_bank_is_refused():
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Bare(ShiftSpec):
        kind: Literal["bare"] = "bare"

    model = dense("llama")
    site = find_sites(model, "ffn")[0]
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(RecipeError, match="has no bank"):
        build_experts(Bare(), view(model, site), site, "after", **where)


def test_a_place_or_donor_that_a_kind_does_not_name_is_refused():
    with pytest.raises(RecipeError, match="they stand after it"):
        Edit(site="ffn", place="beside", experts=ShiftSpec(num_experts=1))
    edit = Edit(site="activation", place="after", experts=ShiftSpec(num_experts=1))
    recipe = sc.Recipe(
        name="x", title="x", paper="x", exact_at_start=True, edits=(edit,), stages=(sc.Stage(),)
    )
    with pytest.raises(RecipeError, match="use site='linear'"):
        sc.convert(dense("llama"), recipe)
