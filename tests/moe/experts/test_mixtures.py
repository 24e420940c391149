"""Merged mixtures equal the sum over their experts, forward and backward.

Under TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU.
Shapes: T tokens, E experts, I and O features, R rank; S = T*heads rows of weights.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from sparsecraft.kernels import lora
from sparsecraft.kernels.device import compiled_step
from sparsecraft.kernels.lora import LoRAs, mix_lora
from sparsecraft.kernels.projections import float32_product
from sparsecraft.kernels.vectors import INTERPRETED, mix_vectors, mix_vectors_torch
from sparsecraft.moe.routers.selectors import soft

I, O, R = 24, 36, 4


def leaf(*shape: int, dtype=torch.float32, at: float = 0.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 0.5 + at).to(dtype).requires_grad_()


def weights(S: int, E: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(S, E, dtype=dtype).softmax(-1).requires_grad_()


def grads(y: torch.Tensor, leaves: list) -> list[torch.Tensor]:
    seed = torch.Generator().manual_seed(9)
    dy = torch.randn(y.shape, generator=seed).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def assert_near(found: list, wanted: list, tolerance: float) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and got.isfinite().all()
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < tolerance


# ------------------------------------------------------------------ vectors
def vectors_loop(x_TO, weights_SE, vectors_EO):
    """Every expert's output, then their sum, in float64."""
    T, E = x_TO.shape[0], weights_SE.shape[1]
    x_THK = x_TO.double().view(T, weights_SE.shape[0] // T, -1)
    weights_THE = weights_SE.double().view(T, -1, E)
    y = 0
    for e in range(E):
        vector_HK = vectors_EO[e].double().view(x_THK.shape[1:])
        y = y + weights_THE[..., e, None] * (x_THK * vector_HK)
    return y.view_as(x_TO)


@pytest.mark.parametrize("sums_to_one", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("T,E", [(1, 10), (7, 1), (40, 10), (70, 33), (3, 64)])
def test_mixed_vectors_equal_the_sum_over_experts(T, E, heads, sums_to_one):
    x, l = leaf(T, O), leaf(E, O, at=1.0)
    w = weights(T * heads, E)
    found = grads(mix_vectors(x, w, l, sums_to_one), [x, w, l])
    wanted = grads(vectors_loop(x, w, l), [x, w, l])
    if sums_to_one:  # 1 + w (L - 1) has the loop's gradient only along weights that sum to one
        for gradients in (found, wanted):
            gradients[2] = gradients[2] - gradients[2].mean(-1, keepdim=True)
        if E == 1:
            del found[2], wanted[2]
    assert_near(found, wanted, 1e-5)


@pytest.mark.parametrize("sums_to_one", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_mixed_vectors_pass_gradcheck(heads, sums_to_one):
    x, l = leaf(5, 12, dtype=torch.float64), leaf(4, 12, dtype=torch.float64)
    w = weights(5 * heads, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: mix_vectors(*t, sums_to_one), (x, w, l))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ones_give_the_tokens_exactly(dtype):
    x, l = leaf(50, O, dtype=dtype), torch.ones(10, O)
    for heads in (1, 3):
        w = weights(50 * heads, 10).to(torch.promote_types(dtype, torch.float32))
        assert torch.equal(mix_vectors(x, w, l, True), x)


@pytest.mark.parametrize("T", [2, 40])
def test_bf16_tokens_are_rounded_once(T):
    x, w, l = leaf(T, O, dtype=torch.bfloat16), weights(T, 10), leaf(10, O, at=1.0)
    y = mix_vectors(x, w, l, True)
    exact = vectors_loop(x, w, l)
    assert y.dtype == torch.bfloat16
    ulp = 2**-7 if INTERPRETED else 2**-8  # the interpreter truncates to bf16
    assert ((y.double() - exact).abs() <= exact.abs() * ulp).all()
    found = grads(y, [x, w, l])
    assert [g.dtype for g in found[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    slow = grads(mix_vectors_torch(x, w, l, True), [x, w, l])
    assert_near(found, slow, 1e-2)


def test_mixed_vectors_take_rows_that_are_not_contiguous_and_no_tokens():
    x, w, l = leaf(O, 20).t(), weights(10, 20).t(), leaf(10, O)
    assert_near([mix_vectors(x, w, l, False)], [vectors_loop(x, w.contiguous(), l)], 1e-5)
    empty = mix_vectors(x[:0], w[:0].contiguous(), l, True)
    assert empty.shape == (0, O)


def test_mixed_vectors_compile_whole_and_recompute():
    x, w, l = leaf(40, O), weights(40, 10), leaf(10, O)
    wanted = grads(mix_vectors(x, w, l, True), [x, w, l])
    compiled = torch.compile(mix_vectors, backend="aot_eager", fullgraph=True)
    assert_near(grads(compiled(x, w, l, True), [x, w, l]), wanted, 1e-6)
    again = torch.utils.checkpoint.checkpoint(mix_vectors, x, w, l, True, use_reentrant=False)
    assert_near(grads(again, [x, w, l]), wanted, 1e-6)


# ------------------------------------------------------------------ LoRA
def lora_loop(x_TI, weights_TE, a_ERI, b_EOR, scale, onto=0.0):
    """Every expert's output, then their sum."""
    y = onto
    for e in range(b_EOR.shape[0]):
        a_RI = a_ERI[min(e, a_ERI.shape[0] - 1)].to(x_TI.dtype)
        update = F.linear(F.linear(x_TI, a_RI), b_EOR[e].to(x_TI.dtype)) * scale
        y = y + (update if weights_TE is None else update * weights_TE[:, e, None])
    return y


def lora_case(T: int, E: int, shared: bool, dtype=torch.float32):
    x, a, b = leaf(T, I, dtype=dtype), leaf(1 if shared else E, R, I, dtype=dtype), leaf(E, O, R)
    return x, weights(T, E, dtype), a, b.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("place", ["alone", "onto", "in place"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("T,E", [(1, 10), (40, 3), (5, 1)])
def test_mixed_lora_equals_the_sum_over_experts(T, E, shared, place):
    x, w, a, b = lora_case(T, E, shared)
    base = leaf(O, I)
    leaves = [x, w, a, b] if place == "alone" else [x, w, a, b, base]
    y = None if place == "alone" else F.linear(x, base)
    wanted = lora_loop(x, w, a, b, 0.5, 0.0 if y is None else y)
    found = mix_lora(x, w, LoRAs(a, b, 0.5), None if y is None else F.linear(x, base), True)
    assert_near(grads(found, leaves), grads(wanted, leaves), 1e-5)
    with torch.no_grad():  # for a few tokens, another kernel
        y = None if place == "alone" else F.linear(x, base)
        again = mix_lora(x, w, LoRAs(a, b, 0.5), y, in_place=place == "in place")
    assert_near([again], [wanted], 1e-5)


def test_a_single_lora_needs_no_weights(monkeypatch):
    x, _, a, b = lora_case(9, 1, False)
    leaves = [x, a, b]
    wanted = grads(lora_loop(x, None, a, b, 2.0), leaves)
    assert_near(grads(mix_lora(x, None, LoRAs(a, b, 2.0)), leaves), wanted, 1e-5)
    with torch.no_grad():
        assert_near([mix_lora(x, None, LoRAs(a, b, 2.0))], wanted[:1], 1e-5)
        monkeypatch.setattr(lora._AddInPlace, "apply", None)  # what backward needs is not kept
        for in_place, same in itertools.product((False, True), (b, torch.nn.Parameter(b))):
            onto = torch.randn(9, O)
            whole = [onto + wanted[0]]
            assert_near([mix_lora(x, None, LoRAs(a, same, 2.0), onto, in_place)], whole, 1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_mixed_lora_passes_gradcheck(shared):
    case = lora_case(4, 3, shared, torch.float64)
    onto = leaf(4, O, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: mix_lora(*t[:2], LoRAs(*t[2:4], 0.5), t[4]), (*case, onto)
    )
    in_place = lambda *t: mix_lora(*t[:2], LoRAs(*t[2:4], 0.5), t[4] * 2, True)  # noqa: E731
    assert torch.autograd.gradcheck(in_place, (*case, onto))


def test_in_place_takes_the_memory_even_of_a_flattened_batch():
    x, w, a, b = lora_case(40, 3, False)
    base = leaf(O, I)
    y = F.linear(x.view(4, 10, I), base)
    mixed = mix_lora(x, w, LoRAs(a, b, 0.5), y.reshape(-1, O), in_place=True)
    assert mixed.data_ptr() == y.data_ptr()
    assert "AddInPlace" in mixed.grad_fn.name()  # and not a copy of slices
    wanted = lora_loop(x, w, a, b, 0.5, F.linear(x, base))
    assert_near(grads(mixed, [x, w, a, b, base]), grads(wanted, [x, w, a, b, base]), 1e-5)


def test_in_place_on_a_tensor_that_its_own_gradient_needs_is_an_error():
    x, w, a, b = lora_case(40, 3, False)
    y = leaf(40, O).exp()
    mixed = mix_lora(x, w, LoRAs(a, b, 0.5), y, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixed.sum().backward()


def test_bf16_tokens_with_float32_parameters():
    x, w, a, b = lora_case(40, 10, False)
    x16 = x.detach().bfloat16().requires_grad_()
    onto = leaf(40, O, dtype=torch.bfloat16)
    leaves = [x16, w, a, b, onto]
    found = grads(mix_lora(x16, w, LoRAs(a, b, 0.5), onto), leaves)
    assert found[0].dtype == torch.bfloat16
    assert [g.dtype for g in found[1:]] == [t.dtype for t in leaves]
    wanted = grads(lora_loop(x16.float(), w, a, b, 0.5, onto.float()), leaves)
    assert_near(found, wanted, 2e-2)
    with torch.no_grad():
        few = mix_lora(x16[:3], w[:3], LoRAs(a, b, 0.5), onto[:3])
    assert few.dtype == torch.bfloat16
    assert_near([few], [wanted[0][:3]], 1e-2)


def test_the_experts_share_one_dropout_mask():
    x = torch.ones(1, I)
    a, b = torch.eye(I).expand(3, I, I), torch.eye(I).expand(3, I, I)
    y = mix_lora(x, torch.ones(1, 3), LoRAs(a, b, 1.0, 0.5))
    assert set(y.unique().tolist()) == {0.0, 6.0}


def test_mixed_lora_compiles_whole():
    x, w, a, b = lora_case(40, 3, False)
    onto = leaf(40, O)
    leaves = [x, w, a, b, onto]
    compiled = torch.compile(mix_lora, backend="aot_eager", fullgraph=True)
    found = grads(compiled(x, w, LoRAs(a, b, 0.5), onto * 1.0, in_place=True), leaves)
    assert_near(found, grads(lora_loop(x, w, a, b, 0.5, onto), leaves), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 16, 17])
@pytest.mark.parametrize("shared", [False, True])
def test_in_a_compiled_step_nothing_is_rounded_more(tokens, shared, dtype):
    x, w, a, b = (t.detach().to(dtype) for t in lora_case(tokens, 3, shared))
    vectors, logits = torch.randn(3, O, dtype=dtype), torch.randn(tokens, 3, dtype=dtype)

    def layer(x):
        weights = soft(logits)[0] + w
        y = mix_lora(x, weights, LoRAs(a, b, 0.5), torch.ones(len(x), O, dtype=dtype))
        return mix_vectors(y, weights, vectors, False), float32_product(x, a[0])

    torch._dynamo.reset()
    with torch.no_grad(), compiled_step():
        found = torch.compile(layer, backend="eager", fullgraph=True)(x)
        wanted = layer(x)
    for y, z in zip(found, wanted, strict=True):
        assert y.dtype == z.dtype == dtype
        bound = 1e-13 if dtype is torch.float64 else 1e-5
        torch.testing.assert_close(y, z, rtol=bound, atol=bound)


@pytest.mark.parametrize("routed", [False, True])
def test_b_alone_may_train(routed):
    """With A and the router frozen, as in LoRA-FA (Zhang et al. 2023), in the first layer."""
    generator = torch.Generator().manual_seed(0)
    x_TI, y_TO = torch.randn(5, 8, generator=generator), torch.randn(5, 6, generator=generator)
    count = 3 if routed else 1
    a_ERI = torch.randn(count, 2, 8, generator=generator)
    weights_TE = torch.rand(5, count, generator=generator) if routed else None
    found = {}
    for in_place in (False, True):
        b_EOR = torch.randn(
            count, 6, 2, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        onto = y_TO.clone()
        mixed = mix_lora(x_TI, weights_TE, LoRAs(a_ERI, b_EOR), onto, in_place=in_place)
        mixed.square().sum().backward()
        found[in_place] = b_EOR.grad
    assert torch.allclose(found[True], found[False], atol=1e-5)
