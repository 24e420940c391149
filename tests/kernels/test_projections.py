"""Products of a layer's tokens with a few rows equal their float64 forms, alone and in the layer.

Under TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU.
Shapes: T tokens, E experts, I and O features, R rank; S = T*heads rows of weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsecraft.kernels import projections
from sparsecraft.kernels.product import stack, three_parts
from sparsecraft.kernels.projections import Projections, ScaledLinear, float32_product
from sparsecraft.kernels.vectors import INTERPRETED, mix_vectors_torch
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.tracing import trace
from sparsecraft.recipe.experts import LoRASpec, VectorSpec
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.selections import Soft, TopK
from tests.moe.experts.test_mixtures import I, O, R, assert_near, grads, leaf, weights


# ------------------------------------------------------------------ the router's product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [3, 40])
def test_scores_are_float32_whatever_the_tokens(T, dtype):
    x, weight = leaf(T, I, dtype=dtype), leaf(10, I)
    leaves = [x, weight]
    found = grads(float32_product(x, weight), leaves)
    assert [g.dtype for g in found] == [torch.float32, dtype, torch.float32]
    assert_near(found, grads(F.linear(x.float(), weight), leaves), 1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_near([float32_product(x, weight)], found[:1], 1e-6)


def test_float64_scores_pass_gradcheck():
    x, weight = leaf(4, I, dtype=torch.float64), leaf(3, I, dtype=torch.float64)
    assert torch.autograd.gradcheck(float32_product, (x, weight))


@pytest.mark.parametrize("E", [1, 3, 8, 10])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_three_bf16_parts_hold_a_float32_weight(E, weight_dtype):
    """What CUDA does with bf16 tokens, here with the products written out."""
    x, weight = leaf(300, 64, dtype=torch.bfloat16), leaf(E, 64, dtype=weight_dtype)
    parts = stack(None, weight.detach(), (0, 1, 2), 0)
    assert parts.shape[0] % 8 == 0 and not parts[3 * E :].any()
    whole = parts[: 3 * E].view(3, E, 64).double().sum(0)
    assert torch.equal(whole, weight.detach().double())
    found = grads(Projections.apply(x, None, weight, False)[2], [x, weight])
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16, weight_dtype]
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    dy = torch.randn(300, E, generator=torch.Generator().manual_seed(9))  # as float32, in both
    y64 = F.linear(x64, weight64)
    wanted = [y64, *torch.autograd.grad(y64, [x64, weight64], dy.double())]
    assert_near(found[:1], wanted[:1], 1e-6)
    assert_near(found[2:], wanted[2:], 1e-6 if weight_dtype == torch.float32 else 4e-3)
    assert ((found[1].double() - wanted[1]).abs() <= wanted[1].abs() * 2**-8 + 1e-4).all()


def test_only_cuda_splits():
    x, weight = leaf(300, 64, dtype=torch.bfloat16), leaf(3, 64)
    assert "Projections" not in float32_product(x, weight).grad_fn.name()


# ------------------------------------------------------------------ products of the same tokens
def frozen_and_rows(x, base, rows, scores, own=True):
    """What a layer takes from `Projections`: the Linear's output and both products, as one row."""
    same_x, z, logits = Projections.apply(x, rows, scores, own)
    return torch.cat([F.linear(same_x, base).float().flatten(0, -2), z, logits], 1)


def frozen_and_rows_loop(x, base, rows, scores):
    return torch.cat([F.linear(x, w).flatten(0, -2) for w in (base, rows, scores)], 1)


def projection_case():
    x = (torch.randn(3, 20, I) * 0.5).bfloat16().requires_grad_()
    base = leaf(O, I, dtype=torch.bfloat16).detach()
    return x, base, leaf(12, I, dtype=torch.bfloat16), leaf(5, I)


@pytest.mark.parametrize("own", [False, True])
def test_products_of_the_same_tokens_share_one_gradient(own):
    x, base, rows, scores = projection_case()
    leaves = [x, rows, scores]
    found = grads(frozen_and_rows(x, base, rows, scores, own), leaves)
    assert [g.dtype for g in found[1:]] == [t.dtype for t in leaves]
    x64, base64, rows64, scores64 = (
        t.detach().double().requires_grad_() for t in (x, base, *leaves[1:])
    )
    y = frozen_and_rows_loop(x64, base64, rows64, scores64)
    wanted = grads(y, [x64, rows64, scores64])
    assert_near(found, wanted, 6e-3)
    assert_near([found[0][:, O:]], [wanted[0][:, O:]], 1e-6)
    assert_near(found[3:], wanted[3:], 1e-6)
    once = grads(frozen_and_rows(x, base, rows, scores, not own), leaves)
    assert_near(once, found, 1e-2 if INTERPRETED else 4e-3)


def test_a_shared_gradient_serves_twice_and_leaves_no_trace():
    x, base, rows, scores = projection_case()
    y = frozen_and_rows(x, base, rows, scores) + x.sum()  # x is read elsewhere too
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, [x, rows, scores], dy, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(y, [x, rows, scores], dy)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    run = lambda *t: frozen_and_rows(t[0], base, *t[1:])  # noqa: E731
    again = torch.utils.checkpoint.checkpoint(run, x, rows, scores, use_reentrant=False)
    assert_near(
        grads(again, [x, rows, scores]), grads(run(x, rows, scores), [x, rows, scores]), 1e-9
    )


def test_products_without_a_gradient_of_the_tokens_or_of_one_side():
    x, _, rows, scores = projection_case()
    _, z, logits = Projections.apply(x.detach(), rows, scores, True)
    d_rows, d_scores = torch.autograd.grad(z.sum() + logits.sum(), [rows, scores])
    _, z, _ = Projections.apply(x, rows, scores, True)
    only_z = torch.autograd.grad(z.sum(), [x, rows, scores])
    assert torch.equal(only_z[1], d_rows) and not only_z[2].any()
    assert_near([only_z[0][0]], [rows.double().sum(0).expand(20, I)], 4e-3)
    assert d_scores.any()


def test_scores_in_parts_compile_whole():
    x, _, _, scores = projection_case()
    score = lambda x, scores: Projections.apply(x, None, scores, False)[2]  # noqa: E731
    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    wanted = grads(score(x, scores), [x, scores])
    assert_near(grads(compiled(x, scores), [x, scores]), wanted, 1e-2)


@pytest.mark.parametrize("plain,split", [(0, 3), (12, 0), (12, 5), (1, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_stack_holds_its_parts_in_order(dim, plain, split):
    make = lambda n: torch.randn((n, 40) if dim == 0 else (40, n)) if n else None  # noqa: E731
    a, b, order = make(plain), make(split), (0, 2, 1, 0)
    found = stack(a, b, order, dim)
    parts = three_parts(b) if split else ()
    blocks = ([a.bfloat16()] if plain else []) + [parts[i] for i in order if split]
    wanted = torch.cat(blocks, dim)
    n = wanted.shape[dim]
    assert found.shape[dim] % 8 == 0 and not found.narrow(dim, n, found.shape[dim] - n).any()
    assert_near([found.narrow(dim, 0, n)], [wanted], 8e-3 if INTERPRETED else 1e-9)


@pytest.mark.skipif(not INTERPRETED, reason="needs the kernels")
@pytest.mark.parametrize("heads", [1, 3])
def test_a_scaled_linear_equals_the_mixture_of_its_output(heads, monkeypatch):
    monkeypatch.setattr("sparsecraft.kernels.projections.CHUNK_TOKENS", 16)
    x, l, bias = leaf(2, 20, I), leaf(10, O, at=1.0), leaf(O)
    base, w = leaf(O, I).detach(), weights(40 * heads, 10)
    found = grads(ScaledLinear.apply(x, base, bias.detach(), w, l, False), [x, w, l])
    y = F.linear(x, base, bias).flatten(0, 1)
    wanted = grads(mix_vectors_torch(y, w, l, False).view(2, 20, O), [x, w, l])
    assert_near(found, wanted, 1e-5)


# ------------------------------------------------------------------ the layer
def layer_case(kind: str, **router):
    """A layer on a frozen bf16 Linear, its new parameters in float32."""
    base = nn.Linear(I, O, bias=kind == "vectors", dtype=torch.bfloat16).requires_grad_(False)
    spec = RouterSpec(**{"select": Soft(), **router})
    if kind == "vectors":
        bank = VectorExperts(VectorSpec(num_experts=4, init_std=0.3), O)
        return MoELayer("after", bank, build_router(spec, I, 4), base)
    num = 1 if kind == "one lora" else 4
    lora = LoRASpec(num_experts=num, rank=R, alpha=8.0, dropout=0.0, shared_a=kind == "shared a")
    bank = LoRAExperts(lora, I, O)
    nn.init.normal_(bank.lora_B, std=0.3)
    return MoELayer("beside", bank, build_router(spec, I, 4) if num > 1 else None, base)


def layer_grads(layer, x):
    """Output, gradient of x if it takes one, and gradients of the layer's parameters."""
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    with trace(nn.ModuleList([layer])) as routing:
        y = layer(x)
    logits = [r.logits_TE.detach() for r in routing.values()]
    return [t for t in grads(y, leaves) if t.any()] + logits


@pytest.fixture
def joint(monkeypatch):
    """Let the CPU take the joint products; the list has one entry for each of them."""
    calls, apply = [], Projections.apply
    monkeypatch.setattr(projections, "_splits", lambda x, w: x.dtype == torch.bfloat16)
    monkeypatch.setattr(Projections, "apply", lambda *t: calls.append(t) or apply(*t))
    return calls


KINDS = ["lora", "shared a", "one lora", "vectors"]


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_joint_products_is_as_near_to_float64(kind, x_grad, joint):
    layer = layer_case(kind, temperature=2.0)
    x = (torch.randn(2, 30, I) * 0.5).bfloat16().requires_grad_(x_grad)
    found = layer_grads(layer, x)
    assert len(joint) == 1
    x64 = x.detach().double().requires_grad_(x_grad)
    wanted = layer_grads(copy.deepcopy(layer).double(), x64)
    assert len(joint) == 1  # not in float64
    assert len(found) == len(wanted) >= 3 + x_grad
    assert_near(found, wanted, 3e-2 if INTERPRETED else 8e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_joint_products_recompute_and_serve_twice(kind, joint):
    layer = layer_case(kind, select=TopK(2))
    x = (torch.randn(30, I) * 0.5).bfloat16().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    again = torch.autograd.grad(y, leaves, torch.ones_like(y))
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    recomputed = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert len(joint) == 3
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_hooks_and_other_bases_keep_their_gradients(joint):
    layer = layer_case("lora")
    x = (torch.randn(30, I) * 0.5).bfloat16().requires_grad_()
    seen = []
    wanted = layer_grads(layer, x)
    layer.base.register_full_backward_hook(lambda m, gx, gy: seen.append((gx[0], gx[0].clone())))
    assert_near(layer_grads(layer, x), wanted, 4e-3)
    assert torch.equal(*seen[0])  # nothing wrote to it
    layer.router.scorer.register_forward_hook(lambda m, a, y: y * 0)
    assert not layer.router(x).logits_TE.any() and not layer_grads(layer, x)[-1].any()
    layer.base = nn.Sequential(layer.base)
    joint.clear()
    layer(x)
    assert joint[0][1] is None  # the router's own


def test_autocast_from_float32_keeps_its_own_products(joint):
    layer = layer_case("lora")
    x = torch.randn(30, I) * 0.5
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert not joint
        same = layer(x.bfloat16())
    assert len(joint) == 1
    assert_near([same], [y], 1e-2)


def test_dropout_in_training_leaves_the_router_its_product(joint):
    layer = layer_case("lora")
    layer.experts.dropout = 0.5
    layer(torch.randn(30, I).bfloat16().requires_grad_()).sum().backward()
    assert joint[0][1] is None and layer.experts.lora_A.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile_whole(kind):
    layer = layer_case(kind)
    x = (torch.randn(2, 30, I) * 0.5).bfloat16().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_near(grads(compiled(x), leaves), grads(layer(x), leaves), 1e-2)
