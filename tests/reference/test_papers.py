"""The transcriptions in `reference/papers.py` agree with themselves and with known values.

Nothing here touches `sparsecraft`: these are the yardsticks, checked before they measure anything.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.reference.papers import (
    camelidae_parameters,
    gelu,
    load_entropy,
    lora_linear,
    lora_parameters,
    mutual_information,
    pesc_layer,
    pesc_layer_softmax_first,
    pesc_released_balance,
    pesc_released_balance_as_called,
    switch_balance,
    upcycled_layer,
    z_loss,
)

N, d, h, E = 6, 5, 3, 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def balanced_logits(num_experts, k, margin=20.0):
    """Token t prefers experts t, t+1, ..., t+k-1 (mod E): every expert gets k of the E tokens."""
    logits = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for t in range(num_experts):
        for j in range(k):
            logits[t, (t + j) % num_experts] = margin
    return logits


def collapsed_logits(tokens, num_experts, k, margin=60.0):
    """Every token prefers the same first k experts, with all the probability."""
    logits = torch.zeros(tokens, num_experts, dtype=torch.float64)
    logits[:, :k] = margin
    return logits


@pytest.fixture
def pesc_parts():
    weight = randn(d, d, seed=1)
    return {
        "x": randn(N, d, seed=2),
        "base": lambda x: F.silu(x) @ weight.T,
        "router_weight": randn(E, d, seed=3),
        "down": randn(E, h, d, seed=4),
        "up": randn(E, d, h, seed=5),
    }


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gelu_is_the_exact_one():
    v = randn(50)
    close(gelu(v), F.gelu(v, approximate="none"))
    assert (gelu(v) - F.gelu(v, approximate="tanh")).abs().max() > 1e-5


@pytest.mark.parametrize("k", range(1, E + 1))
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_two_pesc_forms_agree_forward_and_backward(pesc_parts, k, scale):
    names = ("x", "router_weight", "down", "up")
    grads = []
    for layer in (pesc_layer, pesc_layer_softmax_first):
        parts = {n: p.clone().requires_grad_() if n in names else p for n, p in pesc_parts.items()}
        y = layer(**parts, k=k, scale=scale)
        (y * randn(N, d, seed=6)).sum().backward()
        grads.append([y.detach()] + [parts[name].grad for name in names])
    for topk_first, softmax_first in zip(*grads, strict=True):
        close(topk_first, softmax_first)


def test_pesc_by_hand_for_one_active_expert(pesc_parts):
    """k = 1: the weight is 1, so y = u + A_i(u) for the expert with the largest logit."""
    x, base = pesc_parts["x"], pesc_parts["base"]
    y = pesc_layer(**pesc_parts, k=1, scale=0.5)
    for t in range(N):
        i = int((pesc_parts["router_weight"] @ x[t]).argmax())
        u = base(x[t])
        close(y[t], u + 0.5 * pesc_parts["up"][i] @ F.gelu(pesc_parts["down"][i] @ u))


def test_pesc_mix_is_the_ffn_plus_the_weighted_adapters(pesc_parts):
    """y = u + sum_i w_i A_i(u), dense over all experts, for k = E."""
    x, u = pesc_parts["x"], pesc_parts["base"](pesc_parts["x"])
    w_TE = (x @ pesc_parts["router_weight"].T).softmax(-1)
    a_TEH = F.gelu(torch.einsum("ehd,td->teh", pesc_parts["down"], u))
    expected = u + torch.einsum("te,edh,teh->td", w_TE, pesc_parts["up"], a_TEH)
    close(pesc_layer(**pesc_parts, k=E), expected)


def test_pesc_with_zero_up_is_the_dense_model_and_only_up_gets_a_gradient(pesc_parts):
    parts = pesc_parts | {"up": torch.zeros(E, d, h, dtype=torch.float64)}
    for name in ("router_weight", "down", "up"):
        parts[name] = parts[name].clone().requires_grad_()
    y = pesc_layer(**parts, k=2)
    close(y, parts["base"](parts["x"]))
    (y * randn(N, d, seed=6)).sum().backward()
    assert parts["router_weight"].grad.abs().max() < 1e-12
    assert parts["down"].grad.abs().max() == 0
    assert parts["up"].grad.abs().max() > 1e-3


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 2), (8, 3), (16, 4)])
def test_balance_is_one_when_balanced_and_e_over_k_when_collapsed(num_experts, k):
    balanced = balanced_logits(num_experts, k)
    collapsed = collapsed_logits(10, num_experts, k)
    assert float(switch_balance(balanced, k)) == pytest.approx(1)
    assert float(switch_balance(collapsed, k)) == pytest.approx(num_experts / k)
    assert float(switch_balance(balanced, k, normalize_by_topk=False)) == pytest.approx(k)
    assert float(switch_balance(collapsed, k, normalize_by_topk=False)) == pytest.approx(
        num_experts
    )


def test_balance_has_a_gradient_that_lowers_the_busy_expert():
    logits = randn(12, 8)
    logits[:, 0] += 2
    logits.requires_grad_()
    switch_balance(logits, 2).backward()
    assert logits.grad.dtype == torch.float64
    assert logits.grad[:, 0].sum() > 1e-3


def test_masked_tokens_do_not_count():
    logits, mask = randn(9, 8), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    spoiled = logits.clone()
    spoiled[mask == 0] = 1e4
    for loss in (lambda z, m: switch_balance(z, 2, m), z_loss):
        close(loss(spoiled, mask), loss(logits[mask == 1], None))
        with pytest.raises(ValueError, match="no token"):
            loss(logits, torch.zeros(9))


@pytest.mark.parametrize(("num_experts", "k"), [(8, 1), (8, 2), (8, 4), (16, 4)])
@pytest.mark.parametrize(
    ("released", "expected"),
    [
        (pesc_released_balance, lambda num_experts, k: num_experts),
        (pesc_released_balance_as_called, lambda num_experts, k: num_experts / k),
    ],
)
def test_the_released_loss_is_a_constant_without_gradient(released, expected, num_experts, k):
    for logits in (
        randn(10, num_experts),
        7 * randn(10, num_experts, seed=1),
        collapsed_logits(10, num_experts, k),
        balanced_logits(num_experts, k),
    ):
        layers = [logits.clone().requires_grad_(), (logits + 1).requires_grad_()]
        loss = released(layers, k)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected(num_experts, k), abs=1e-9)
        assert max(layer.grad.abs().max() for layer in layers) < 1e-12


def released_tensor_steps(logits, num_experts, k):
    """The tensor steps of the released function, for logits of any rank (see papers.py)."""
    kept, chosen = logits.topk(k, dim=-1)
    if chosen.ndim == 2:
        chosen = chosen.unsqueeze(2)
    dispatched = F.one_hot(chosen, num_experts).amax(-2).double().mean(-2)
    probability = kept.softmax(-1).mean(-1).unsqueeze(-1)
    return (dispatched * probability).mean() * num_experts**2


def test_the_released_loss_depends_on_the_rank_of_its_input():
    logits = randn(10, 8)
    close(pesc_released_balance([logits], 2), released_tensor_steps(logits[None], 8, 2))
    close(pesc_released_balance_as_called([logits], 2), released_tensor_steps(logits, 8, 2))


def test_z_loss():
    assert float(z_loss(torch.zeros(3, 8))) == pytest.approx(math.log(8) ** 2)
    logits = 30 * randn(7, 8)
    close(z_loss(logits), logits.logsumexp(-1).square().mean())
    assert torch.isfinite(z_loss(torch.full((2, 8), 1e4)))


@pytest.mark.parametrize("k", range(1, E + 1))
def test_upcycled_copies_are_the_dense_ffn_only_when_renormalized(k):
    x, router_weight = randn(N, d), randn(E, d, seed=1)
    ffn = torch.nn.Sequential(torch.nn.Linear(d, h), torch.nn.SiLU(), torch.nn.Linear(h, d))
    ffn.double()
    dense = ffn(x)
    mass = (x @ router_weight.T).softmax(-1).topk(k, dim=-1).values.sum(-1, keepdim=True)
    close(upcycled_layer(x, ffn, router_weight, E, k, renormalize=True), dense)
    close(upcycled_layer(x, ffn, router_weight, E, k, renormalize=False), mass * dense)


def test_upcycled_router_learns_only_without_renormalization():
    x = randn(N, d)
    for renormalize, learns in ((True, False), (False, True)):
        router_weight = randn(E, d, seed=1).requires_grad_()
        upcycled_layer(x, torch.tanh, router_weight, E, 2, renormalize).sum().backward()
        assert (router_weight.grad.abs().max() > 1e-3) == learns


def test_lora_linear():
    x, weight, bias = randn(N, d), randn(h, d, seed=1), randn(h, seed=2)
    a, b = randn(2, d, seed=3), randn(h, 2, seed=4)
    close(lora_linear(x, weight, bias, a, torch.zeros_like(b), 16), F.linear(x, weight, bias))
    close(lora_linear(x, weight, bias, a, b, 16), F.linear(x, weight + 8 * b @ a, bias))
    close(lora_linear(x, weight, None, a, b, 2), F.linear(x, weight + b @ a))


LLAMA2_7B = {"layers": 32, "d": 4096, "d_q": 4096, "d_kv": 4096, "d_ff": 11008}
LLAMA2_13B = {"layers": 40, "d": 5120, "d_q": 5120, "d_kv": 5120, "d_ff": 13824}
YI_34B = {"layers": 60, "d": 7168, "d_q": 7168, "d_kv": 1024, "d_ff": 20480}
QWEN15_14B = {"layers": 40, "d": 5120, "d_q": 5120, "d_kv": 5120, "d_ff": 13696}
MISTRAL_7B = {"layers": 32, "d": 4096, "d_q": 4096, "d_kv": 1024, "d_ff": 14336}


@pytest.mark.parametrize(
    ("base", "num_experts", "width", "adapters_billion", "lora_million"),
    [
        pytest.param(LLAMA2_7B, 4, 512, 0.537, 159.9, id="Camelidae-4x7B"),
        pytest.param(LLAMA2_7B, 8, 512, 1.075, 159.9, id="Camelidae-8x7B"),
        pytest.param(LLAMA2_7B, 16, 512, 2.150, 159.9, id="Camelidae-16x7B"),
        pytest.param(LLAMA2_7B, 8, 64, 0.135, 159.9, id="8x7B-script-h64"),
        pytest.param(LLAMA2_13B, 8, 512, 1.679, 250.3, id="Camelidae-8x13B"),
        pytest.param(YI_34B, 8, 512, 3.527, 491.5, id="Camelidae-8x34B"),
        pytest.param(QWEN15_14B, 16, 512, 3.359, 249.4, id="Qwen2idae-16x14B"),
        pytest.param(MISTRAL_7B, 16, 512, 2.150, 167.8, id="sparsetral-16x7B"),
    ],
)
def test_parameter_formulas_give_the_table_of_the_notes(
    base, num_experts, width, adapters_billion, lora_million
):
    """pesc_mov.md, 1.6, to every printed digit."""
    adapters = camelidae_parameters(base["layers"], base["d"], width, num_experts)
    assert round(adapters / 1e9, 3) == adapters_billion
    assert round(lora_parameters(**base, r=64) / 1e6, 1) == lora_million


def test_parameter_formulas_count_real_tensors(pesc_parts):
    tensors = (pesc_parts[name] for name in ("router_weight", "down", "up"))
    assert camelidae_parameters(1, d, h, E) == sum(tensor.numel() for tensor in tensors)
    shapes = [(8, 8), (8, 8), (8, 4), (8, 4), (8, 20), (8, 20), (20, 8)]  # q o k v gate up down
    real = sum(torch.empty(2, i).numel() + torch.empty(o, 2).numel() for i, o in shapes)
    assert lora_parameters(3, 8, 8, 4, 20, 2) == 3 * real


def test_load_entropy():
    assert load_entropy([5, 5, 5, 5]) == pytest.approx(1)
    assert load_entropy(torch.tensor([0, 9, 0])) == 0
    assert load_entropy([1, 1, 0, 0]) == pytest.approx(0.5)
    assert load_entropy([7]) == 1
    with pytest.raises(ValueError, match="no token"):
        load_entropy([0, 0])


def test_mutual_information():
    assert mutual_information([[3, 1], [30, 10]]) == pytest.approx(0)
    assert mutual_information(torch.eye(4)) == pytest.approx(2)
    # The prior over domains is uniform: a domain's size changes nothing.
    assert mutual_information([[1, 0], [0, 999]]) == pytest.approx(1)
    # p(0|m) = 1 and 1/2, p(0) = 3/4: I = H(3/4) - (0 + 1) / 2 bits.
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert mutual_information([[4, 0], [1, 1]]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="domain without tokens"):
        mutual_information([[1, 2], [0, 0]])
