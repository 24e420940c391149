"""MPOE: five cores instead of a matrix, the middle one shared by all experts.

Shapes: E experts, T tokens, D width, F hidden width; core k (d_{k-1}, i_k, j_k, d_k).
"""

from __future__ import annotations

import gc
import logging
import math
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsecraft as sc
from sparsecraft.dense.donors import view
from sparsecraft.dense.sites import find_sites
from sparsecraft.errors import RecipeError
from sparsecraft.kernels import mpo
from sparsecraft.kernels.mpo import compose, decompose, shapes
from sparsecraft.moe.experts.dispatch import by_expert, loop
from sparsecraft.moe.experts.mpo import OWN, MPOExperts
from sparsecraft.moe.init.factors import even_factors, factors
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.experts import MPOSpec
from tests import tiny
from tests.cases import D, dense, randomize_new

E, T = 4, 24
KINDS = ("llama", "mistral", "phi3", "gpt2", "opt", "bert", "t5", "t5_gated", "vit")


def donor_of(family: str):
    model = dense(family)
    return view(model, find_sites(model, "ffn")[0])


def bank_of(family: str, moved: bool = True, **options) -> MPOExperts:
    bank = MPOExperts(MPOSpec(num_experts=E, **options), donor_of(family))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in bank.parameters() if moved else ():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bank.eval()


def routing_of(k: int = 2) -> Routing:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(5))
    weights_TK, indices_TK = logits_TE.softmax(-1).topk(k)
    return Routing(weights_TK, indices_TK, logits_TE)


def chain(cores: list[torch.Tensor]) -> torch.Tensor:
    """The definition: W[i1..i5, j1..j5] = T1[1,i1,j1,a] T2[a,i2,j2,b] ... T5[d,i5,j5,1]."""
    tensor = torch.einsum("zaAp,pbBq,qcCr,rdDs,seEy->abcdeABCDE", *cores)
    rows = math.prod(tensor.shape[:5])
    return tensor.reshape(rows, -1)


# --------------------------------------------------------------------------------- the five cores


@pytest.mark.parametrize(("larger", "smaller"), [(1536, 576), (768, 768), (3072, 768), (96, 80)])
@pytest.mark.parametrize("turned", [False, True])
def test_full_bonds_hold_the_matrix_and_are_as_large_as_the_paper_says(larger, smaller, turned):
    pair = factors(larger, smaller)[:: -1 if turned else 1]
    weight = torch.randn(*((larger, smaller)[:: -1 if turned else 1]))
    cores = [core.float() for core in decompose(weight, *pair)]
    assert (compose(cores) - weight).abs().max() < 1e-4
    n = [i * j for i, j in zip(*pair, strict=True)]
    bonds = [min(math.prod(n[:k]), math.prod(n[k:])) for k in range(6)]
    assert [tuple(core.shape) for core in cores] == [
        (bonds[k], pair[0][k], pair[1][k], bonds[k + 1]) for k in range(5)
    ]
    assert cores[2].numel() == larger * smaller, "the central core alone is as large as the matrix"


def test_the_product_is_the_definition():
    pair = factors(48, 32)
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(size, generator=generator) for size in shapes(*pair, 7)]
    assert torch.allclose(compose(cores), chain(cores), atol=1e-4)


def test_cores_are_the_same_in_every_run_and_the_outer_ones_orthogonal():
    weight = torch.randn(96, 80)
    cores, again = (decompose(weight, *factors(96, 80)) for _ in range(2))
    assert all(map(torch.equal, cores, again))
    for core in cores[:2]:
        U = core.flatten(0, 2)
        assert torch.allclose(U.t() @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-12)
    for core in cores[3:]:
        V = core.flatten(1)
        assert torch.allclose(V @ V.t(), torch.eye(len(V), dtype=V.dtype), atol=1e-12)


def test_a_cut_bond_loses_at_least_what_the_singular_values_say():
    """At one bond alone they say what the best approximation loses (Eckart and Young)."""
    pair, weight = factors(96, 80), torch.randn(96, 80, dtype=torch.float64)
    n = [i * j for i, j in zip(*pair, strict=True)]
    order = [axis for k in range(5) for axis in (k, 5 + k)]
    unfolded = weight.reshape(*pair[0], *pair[1]).permute(order).reshape(n[0] * n[1], -1)
    assert len(unfolded) == 16
    values, errors = torch.linalg.svdvals(unfolded), []
    for bond in (4, 8, 12, 10**6):
        errors.append((compose(decompose(weight, *pair, bond)) - weight).norm())
        assert errors[-1] >= values[bond:].square().sum().sqrt()
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 * weight.norm()


# ---------------------------------------------------------------------------------------- factors


def test_the_released_factors_stand_for_the_released_sizes():
    assert factors(3072, 768) == ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    assert factors(4096, 1024) == ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4))
    assert factors(1536, 576) == ((4, 4, 6, 4, 4), (3, 4, 4, 4, 3))


@pytest.mark.parametrize(
    "dimension", [32, 48, 576, 768, 1536, 2048, 4864, 5632, 8960, 11008, 14336]
)
def test_factors_multiply_to_the_dimension(dimension):
    five = even_factors(dimension)
    assert math.prod(five) == dimension and min(five) >= 2 and len(five) == 5


@pytest.mark.parametrize(
    ("dimension", "nearest"), [(2007, "2000 and 2016"), (17, "32"), (49, "48 and 64")]
)
def test_a_dimension_without_five_factors_is_refused_with_the_nearest_that_have_some(
    dimension, nearest
):
    with pytest.raises(RecipeError) as refused:
        even_factors(dimension)
    assert str(refused.value).endswith(f"{nearest}.") and str(dimension) in str(refused.value)


def test_a_model_whose_sizes_do_not_factor_is_refused_and_stays_dense():
    model = tiny.llama(width=40)
    with pytest.raises(RecipeError, match=r"40 is no product .* 32 and 48"):
        sc.convert(model, sc.recipes.mpoe(2))
    assert not hasattr(model, "sparsecraft")


def test_given_factors_are_taken_or_refused():
    given = {"hidden_factors": (3, 2, 2, 2, 2), "width_factors": (1, 2, 4, 2, 2)}
    bank = bank_of("mistral", moved=False, **given)
    wanted = donor_of("mistral").down_weight()
    assert (bank.matrix("down", 1) - wanted).abs().max() < 1e-6
    assert bank.up_1.shape == (E, 1, 3, 1, 3)
    with pytest.raises(RecipeError, match="hidden width of 48 and a width of 32"):
        bank_of("mistral", **given | {"width_factors": (2, 2, 4, 2, 2)})
    for wrong in ({"hidden_factors": (3, 16)}, given | {"width_factors": (2, 16)}):
        with pytest.raises(RecipeError, match="five of both"):
            MPOSpec(**wrong)


def test_factors_are_read_from_a_command_line():
    asked = {"hidden_factors": "3,2,2,2,2", "width_factors": "2,2,2,2,2"}
    spec = sc.override(sc.recipes.mpoe(E), asked).edits[0].experts
    assert (spec.hidden_factors, spec.width_factors) == ((3, 2, 2, 2, 2), (2,) * 5)


@pytest.mark.parametrize(("option", "value"), [("mask", 1.0), ("mask", -0.1), ("bond", 0)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(RecipeError, match=option):
        MPOSpec(**{option: value})


# -------------------------------------------------------------------------------------- the bank


@pytest.mark.parametrize("family", KINDS)
def test_experts_start_as_the_dense_network(family):
    bank, donor, x = bank_of(family, moved=False), donor_of(family), torch.randn(5, D)
    for e in range(E):
        assert torch.allclose(bank.expert(e, x), donor.compute(x), atol=1e-5)


@pytest.mark.parametrize("family", KINDS)
def test_an_expert_is_the_network_of_its_own_chains(family):
    bank, donor, x = bank_of(family), donor_of(family), torch.randn(5, D)
    e = 2

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        held = dict(bank.named_parameters())
        cores = [
            held[f"{name}_{k}"][e] if k in OWN else held[f"{name}_central"] for k in range(1, 6)
        ]
        return nn.functional.linear(x, chain(cores), held.get(f"{name}_bias"))

    hidden = donor.activation(product("gate" if donor.gated else "up", x))
    hidden = hidden * product("up", x) if donor.gated else hidden
    assert torch.allclose(bank.expert(e, x), product("down", hidden), atol=1e-4)


def test_the_central_core_is_one_tensor_for_all_experts():
    model = dense("mistral")
    sc.convert(model, sc.recipes.mpoe(E, 2))
    randomize_new(model)
    bank = model.model.layers[0].mlp.experts
    centers = {n: p for n, p in bank.named_parameters() if n.endswith("central")}
    assert len(centers) == 3 and all(p.shape == (16, *p.shape[1:3], 16) for p in centers.values())
    before = [bank.matrix("up", e) for e in range(E)]
    with torch.no_grad():
        centers["up_central"].mul_(2)
    assert all(torch.allclose(bank.matrix("up", e), 2 * before[e]) for e in range(E))
    with torch.no_grad():
        bank.up_2[1].mul_(2)
    moved = [not torch.allclose(bank.matrix("up", e), 2 * before[e]) for e in range(E)]
    assert moved == [False, True, False, False]


@pytest.mark.parametrize("n", [1, 8, 16, 32])
def test_experts_of_3072_by_768_cost_as_the_paper_says(n):
    """1 + 0.0783 n of the dense matrix, built without memory."""
    config = transformers.T5Config(vocab_size=8, d_model=768, d_ff=3072, num_layers=1, num_heads=2)
    with torch.device("meta"):
        model = transformers.T5EncoderModel(config)
    donor = view(model, find_sites(model, "ffn")[0])
    bank = MPOExperts(MPOSpec(num_experts=n), donor, device="meta")
    held = sum(p.numel() for p in bank.parameters())
    own = 144 + 36_864 + 147_456 + 256
    assert held == 2 * (2_359_296 + n * own)
    assert held / (2 * 3072 * 768) == pytest.approx(1 + 0.0783 * n, abs=2e-5 * n)


def test_eight_experts_of_smollm2_are_at_most_1_7_dense_networks():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=576, intermediate_size=1536, num_hidden_layers=1,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    donor = view(model, find_sites(model, "ffn")[0])
    bank = MPOExperts(MPOSpec(num_experts=8), donor, device="meta")
    router, network = 8 * 576, 3 * 576 * 1536
    held = sum(p.numel() for p in bank.parameters()) + router
    assert held == 3 * (576 * 1536 + 8 * 2 * (144 + 36_864)) + router
    assert held / network < 1.7


def test_a_token_multiplies_by_whole_matrices_in_every_slot():
    """As many operations as in full experts of the same routing, in fewer parameters."""
    model, full = dense("llama"), dense("llama")
    sc.convert(model, sc.recipes.mpoe(E, 2))
    sc.convert(full, sc.recipes.upcycling(E, 2))
    ours, theirs = sc.count(model), sc.count(full)
    assert ours.flops_per_token == theirs.flops_per_token
    assert ours.total < theirs.total and ours.active < theirs.active


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_products_are_in_float32_in_bfloat16_models_and_under_autocast(family):
    donor = donor_of(family)
    wanted = donor.down_weight().bfloat16()
    donor.down.module.weight.data = donor.down.module.weight.data.bfloat16()
    bank = MPOExperts(MPOSpec(num_experts=2), donor)
    assert all(p.dtype == torch.float32 for n, p in bank.named_parameters() if "bias" not in n)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bank.matrix("down", 1).bfloat16(), wanted)


# -------------------------------------------------------------------- one matrix of one expert


class Living(TorchDispatchMode):
    """Counts the living memories of at least `size` numbers that operations have made.

    Attributes:
        most: how many lived at once.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.most, self.made = size, 0, {}

    def count(self) -> int:
        return sum(ref() is not None for ref in self.made.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            storage = result.untyped_storage()
            if storage._cdata not in given:
                self.made[len(self.made)] = weakref.ref(storage)
        self.most = max(self.most, self.count())
        return result


@pytest.mark.parametrize("path", [loop, by_expert])
def test_one_expert_s_matrices_exist_at_a_time_forward_and_backward(path):
    """However many experts there are, and nothing of their size waits for the backward pass."""
    donor, most = donor_of("mistral"), {}
    for count in (2, 5):  # of six, one outer core of all is as large as a matrix
        bank = MPOExperts(MPOSpec(num_experts=count), donor)
        logits = torch.randn(6, count, generator=torch.Generator().manual_seed(0))
        routing = Routing(logits.softmax(-1), torch.arange(count).repeat(6, 1), logits)
        with Living(48 * 32) as forward:
            y = path(bank, torch.randn(6, D), routing)
        kept = forward.count()
        with Living(48 * 32) as backward:
            y.sum().backward()
        most[count] = kept, forward.most, backward.most
    assert most[2] == most[5] and most[5][:2] == (0, 2), "a product and its permutation"
    centers = 3  # whose gradients stay
    assert most[5][2] - centers <= 4


def kept(make, use, sources):
    """`kernels.remaking.made_again`, whose tensors wait for the backward pass."""
    return use(*make())


def test_the_count_of_living_matrices_sees_those_that_are_kept(monkeypatch):
    monkeypatch.setattr("sparsecraft.moe.experts.mpo.made_again", kept)
    bank = bank_of("mistral")
    with Living(48 * 32) as forward:
        y = loop(bank, torch.randn(T, D, requires_grad=True), routing_of(E))
    assert forward.count() >= 3 * E and y.requires_grad


def together(bank: MPOExperts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    return bank(x, routing)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("empty", [False, True])
def test_matrices_of_all_experts_at_a_time_give_what_one_at_a_time_gives(family, empty):
    bank, routing = bank_of(family), routing_of()
    if empty:
        routing.indices_TK[::3, 1] = E  # no expert
    bank.train()
    bank.hidden_dropout = bank.output_dropout = 0.0
    found = {}
    for path in (loop, by_expert, together):
        bank.zero_grad()
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = path(bank, x, routing)
        y.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in bank.named_parameters()}
        found[path] = {"y": y.detach(), "x": x.grad, **grads}
    for path in (by_expert, together):
        for name, wanted in found[loop].items():
            scale = wanted.abs().max()
            assert (found[path][name] - wanted).abs().max() <= 1e-5 * scale + 1e-6, (path, name)


def test_large_matrices_are_made_one_at_a_time(monkeypatch):
    bank, x = bank_of("mistral"), torch.randn(4, D)  # whose activations are smaller than a matrix
    weights_TK, indices_TK = torch.full((4, 2), 0.5), torch.tensor([[0, 1], [2, 3]] * 2)
    routing, most = Routing(weights_TK, indices_TK, torch.zeros(4, E)), {}
    numbers = 48 * 32
    for at_a_time, limit in {E: E * numbers, 1: E * numbers - 1}.items():
        monkeypatch.setattr("sparsecraft.moe.experts.mpo.TOGETHER", limit)
        with Living(at_a_time * numbers) as living:
            y = bank(x, routing)
        most[at_a_time] = living.most
        assert living.count() == 0 and y.requires_grad, "nothing waits for the backward pass"
    assert most[1] == 2, "a product and its permutation"
    assert 0 < most[E] <= 5


@pytest.mark.parametrize("path", [loop, by_expert, together])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_matrices_that_are_kept(family, path, monkeypatch):
    bank, routing, x = bank_of(family), routing_of(), torch.randn(T, D)
    found = {}
    for way in ("made again", "kept"):
        bank.zero_grad()
        inputs = x.clone().requires_grad_()
        if way == "kept":
            monkeypatch.setattr("sparsecraft.moe.experts.mpo.made_again", kept)
        path(bank, inputs, routing).square().sum().backward()
        found[way] = {name: p.grad.clone() for name, p in bank.named_parameters()}
        found[way]["x"] = inputs.grad
    for name, wanted in found["kept"].items():
        assert torch.allclose(found["made again"][name], wanted, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("path", [by_expert, together])
@pytest.mark.parametrize("frozen", ["central", "_1", "_5", "bias", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, path):
    bank, routing, x = bank_of("gpt2"), routing_of(), torch.randn(T, D)
    path(bank, x.requires_grad_(frozen != "x"), routing).square().sum().backward()
    wanted = {name: p.grad for name, p in bank.named_parameters()}
    bank.zero_grad()
    for name, parameter in bank.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    path(bank, x, routing).square().sum().backward()
    for name, parameter in bank.named_parameters():
        assert (parameter.grad is None) is name.endswith(frozen), name
        assert parameter.grad is None or torch.allclose(parameter.grad, wanted[name], atol=1e-5)


def test_gradients_of_gradients_are_right():
    hidden, width = factors(48, 32)
    kinds = mpo.Kind(hidden, width, 2), mpo.Kind(width, hidden)
    generator = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    sizes = shapes(hidden, width, 3)
    parts = [
        torch.stack([torch.stack([rand(*size) for _ in "ab"]) for _ in "gud"]) for size in sizes
    ]
    parts = [part.flatten(3, 4) for part in parts]
    ends = mpo.left_end(*parts[:2]), mpo.right_end(*parts[3:])
    given = [t.requires_grad_() for t in (*ends, *parts[2][:, 0].flatten(2).unbind())]
    call = lambda a, b, *rest: mpo.Matrices.apply(a, b, kinds, torch.float64, *rest)  # noqa: E731
    assert [tuple(made.shape) for made in call(*given)] == [(2, 96, 32), (2, 32, 48)]
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


def test_what_is_made_again_has_gradients_of_gradients(monkeypatch):
    bank, found = bank_of("mistral").double(), {}
    for way in (None, kept):
        if way:
            monkeypatch.setattr("sparsecraft.moe.experts.mpo.made_again", way)
        x = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        y = bank.expert(1, x).square().sum()
        slope = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
        found[way] = torch.autograd.grad(slope, [x, *bank.parameters()], allow_unused=True)
    for ours, wanted in zip(*found.values(), strict=True):
        assert (ours is None) is (wanted is None)
        assert ours is None or torch.allclose(ours, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", [by_expert, together])
def test_a_checkpoint_around_it_keeps_nothing(path, reentrant):
    bank, routing = bank_of("gpt2").train(), routing_of()
    bank.hidden_dropout = bank.output_dropout = 0.0
    found = {}
    for checkpointed in (False, True):
        bank.zero_grad()
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with Living(T * D) as living:
            if checkpointed:
                y = checkpoint(path, bank, x, routing, use_reentrant=reentrant)
            else:
                y = path(bank, x, routing)
        kept = living.count()
        y.square().sum().backward()
        found[checkpointed] = kept, x.grad, bank.up_central.grad
    ends = 4 if path is by_expert and not reentrant else 0  # of all experts, for one after another
    assert found[True][0] <= 1 + ends < found[False][0]
    assert torch.allclose(found[True][1], found[False][1], atol=1e-5)
    assert torch.allclose(found[True][2], found[False][2], atol=1e-5)


@pytest.mark.parametrize("path", [by_expert, together])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_pass_that_no_backward_follows_leaves_nothing(family, path):
    bank, routing = bank_of(family), routing_of()
    with Living(1) as living:
        y = path(bank, torch.randn(T, D), routing)
        assert y.requires_grad
        del y
        gc.collect()
        assert living.count() == 0


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error():
    bank = bank_of("mistral").requires_grad_(False)
    y = bank(torch.randn(T, D, requires_grad=True), routing_of())
    bank.down_central.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_transforms_and_export_take_it():
    bank, routing, x = bank_of("mistral"), routing_of(), torch.randn(T, D)
    y, dy = torch.func.jvp(lambda x: bank(x, routing), (x,), (x,))
    assert torch.allclose(y, bank(x, routing), atol=1e-5) and dy.isfinite().all()
    with torch.no_grad():
        exported = torch.export.export(_Alone(bank, routing), (x,), strict=False).module()
        assert torch.allclose(exported(2 * x), bank(2 * x, routing), atol=1e-5)


class _Alone(nn.Module):
    def __init__(self, bank: MPOExperts, routing: Routing):
        super().__init__()
        self.bank, self.routing = bank, routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bank(x, self.routing)


# ------------------------------------------------------------------------------ the gradient mask


def test_a_masked_step_leaves_the_central_cores_alone_whatever_the_optimizer_holds():
    bank, routing = bank_of("llama", mask=0.5), routing_of()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2, weight_decay=0.1)
    drawn = []
    for step in range(12):
        before = {name: p.detach().clone() for name, p in bank.named_parameters()}
        for _ in range(2):  # micro-batches
            bank.at_step(step, seed=7)
            loop(bank, torch.randn(T, D), routing).square().sum().backward()
        masked = bank.masked
        centers = [p for n, p in bank.named_parameters() if n.endswith("central")]
        assert all(bool(p.grad.abs().max() == 0) is masked for p in centers)
        bank.before_update()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in bank.named_parameters():
            stays = masked and name.endswith("central")
            assert torch.equal(parameter, before[name]) is stays, name
        drawn.append(masked)
        assert not bank.masked, "a pass outside of the training is not masked"
    assert 2 <= sum(drawn) <= 10


def test_the_mask_depends_on_seed_and_step_alone_and_is_as_frequent_as_it_says():
    one, other = bank_of("llama", mask=0.75), bank_of("gpt2", mask=0.75)

    def draws(bank: MPOExperts, seed: int) -> list[bool]:
        torch.manual_seed(len(draws.__name__) * seed)
        found = []
        for step in range(2000):
            bank.at_step(step, seed)
            found.append(bank.masked)
        return found

    assert draws(one, 3) == draws(other, 3) != draws(one, 4)
    assert sum(draws(one, 3)) / 2000 == pytest.approx(0.75, abs=0.03)
    never = bank_of("llama")
    assert not any(draws(never, 3))


def test_the_recipe_masks_by_default_as_often_as_an_expert_is_not_chosen():
    assert sc.recipes.mpoe(8, 2).edits[0].experts.mask == 0.75
    assert sc.recipes.mpoe(8, 2, "released").edits[0].experts.mask == 0
    assert sc.recipes.mpoe(8, 2, mask=0.1).edits[0].experts.mask == 0.1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_masks_the_steps_that_seed_and_number_say(tmp_path, accumulation):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    base, steps, seed = tiny.save_dense(tmp_path / "dense"), 4, 1
    model = sc.hub.load_dense(base)
    recipe = sc.override(sc.recipes.mpoe(E, 2), {"stages.0.warmup_steps": 0})
    sc.convert(model, sc.override(recipe, {"stages.0.warmup_ratio": 0.0}))
    bank = model.model.layers[0].mlp.experts
    held, found = {}, []

    def look(optimizer, args, kwargs):
        now = {n: p.detach().clone() for n, p in bank.named_parameters()}
        if held:
            found.append({n for n in now if torch.equal(now[n], held[n])})
        held.update(now)

    original = torch.optim.AdamW.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        look(self, (), {})
        self.register_step_post_hook(look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", watched)
        sc.train(
            model, rows, tmp_path / "run", steps=steps, batch_size=4,
            micro_batch=4 // accumulation, max_length=64, learning_rate=1e-2, seed=seed,
            progress=False,
        )  # fmt: skip
    wanted = []
    for step in range(steps):
        bank.at_step(step, seed)
        wanted.append(bank.masked)
    centers = {f"{name}_central" for name in ("gate", "up", "down")}
    assert [still >= centers for still in found] == wanted
    assert True in wanted and False in wanted
    assert all(still <= centers for still in found)


# ------------------------------------------------------------------------------------- truncation


def test_a_cut_bond_says_what_it_loses_and_claims_nothing(caplog):
    model = dense("mistral")
    with caplog.at_level(logging.WARNING, logger="sparsecraft"):
        report = sc.convert(model, sc.recipes.mpoe(E, 2, bond=12))
    said = [r.message for r in caplog.records if "bonds of at most 12" in r.message]
    bank, donor = model.model.layers[1].mlp.experts, dense("mistral").model.layers[1].mlp
    lost = (bank.matrix("down", 0) - donor.down_proj.weight).norm() / donor.down_proj.weight.norm()
    assert len(said) == 2 and f"down by {lost:.2e}" in said[1]
    assert not report.exact_at_start and not report.certificate.exact
    assert report.certificate.max_difference > 0


# ------------------------------------------------------------------------------------ fewer experts


def test_one_expert_alone_has_its_own_cores_and_the_shared_one():
    bank, x = bank_of("llama"), torch.randn(5, D)
    alone = bank.only(2)
    assert torch.equal(alone.expert(0, x), bank.expert(2, x))
    assert alone.up_central.data_ptr() != bank.up_central.data_ptr()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "t5"])
def test_one_expert_by_fixed_weights_becomes_the_dense_network(family):
    model = dense(family)
    sc.convert(model, sc.recipes.mpoe(E, 2))
    randomize_new(model, std=0.05)
    report = sc.merge(model, "fixed", weights=[0.0, 0.0, 1.0, 0.0])
    assert report.result == "dense" and report.certificate.exact
