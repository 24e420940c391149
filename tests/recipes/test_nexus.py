"""Nexus: rows of a router projected from embeddings of domains, and kept while nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routers.domain import DomainScorer
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Domain, Linear, Normal
from sparsecraft.recipe.selections import TopK
from tests.cases import EMBEDDING, FAMILIES, batch, dense, layers, logits

T, D, M = 40, 32, EMBEDDING
ONE = TopK(1, renormalize=False)


def scorer_of(num_experts: int = 3, dtype=torch.float32, **changes) -> DomainScorer:
    torch.manual_seed(0)
    spec = RouterSpec(scorer=Domain(**({"dim": M} | changes)), select=ONE)
    return build_router(spec, D, num_experts, dtype=dtype).eval().scorer


def nexus(family: str = "llama", experts: int = 3, **changes) -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, sc.recipes.nexus(experts, embedding_dim=M, **changes))
    return model


def plain_rows(scorer: DomainScorer) -> torch.Tensor:
    """W2 (silu(a) * b) with (a, b) = W1 d, number by number where that can be read."""
    W1, W2 = scorer.first.double(), scorer.second.double()
    rows = []
    for d in scorer.domains.double():
        a, b = (W1 @ d)[:D], (W1 @ d)[D:]
        rows.append(W2 @ (a / (1 + (-a).exp()) * b))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------- the scorer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_experts", [1, 3, 16, 17, 40])
def test_logits_are_tokens_times_projected_domains(num_experts, dtype):
    scorer, x_TD = scorer_of(num_experts, dtype), torch.randn(T, D).to(dtype)
    logits_TE = scorer(x_TD)
    wanted_TE = (x_TD.double() @ plain_rows(scorer).T).to(logits_TE.dtype)
    assert logits_TE.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(logits_TE, wanted_TE, rtol=1e-4, atol=1e-5)


def test_the_first_matrix_reads_the_encoders_width_and_keeps_the_scale_of_embeddings():
    assert scorer_of(dim=7).first.shape == (2 * D, 7)
    assert scorer_of(dim=7, encoder="self").first.shape == (2 * D, D)
    first = scorer_of(dim=400).first
    assert first.std().item() == pytest.approx(400**-0.5, rel=0.05)


def test_the_rows_start_as_large_as_those_of_a_linear_router():
    torch.manual_seed(0)
    linear = build_router(RouterSpec(scorer=Linear(start=Normal(0.05))), D, 40).scorer
    scorer = scorer_of(40, std=0.05)
    rows_ED = scorer.rows()[:40]
    assert rows_ED.square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-5)
    x_TD = torch.randn(4000, D)
    assert scorer(x_TD).std().item() == pytest.approx(linear(x_TD).std().item(), rel=0.1)
    assert scorer.domains.dtype == torch.float32
    torch.testing.assert_close(scorer_of(5).domains @ scorer_of(5).domains.T, torch.eye(5))


@pytest.mark.parametrize("num_experts", [1, 2, 7, 15, 16, 31, 33])
@pytest.mark.parametrize("tokens", [1, 36, 500])
@pytest.mark.parametrize("training", [False, True])
def test_an_expert_comes_and_goes_and_the_other_logits_keep_their_bits(
    num_experts, tokens, training
):
    scorer, x_TD = scorer_of(num_experts).train(training), torch.randn(tokens, D)
    before_TE = scorer(x_TD)
    embedding_M = torch.randn(M)
    scorer.append(embedding_M)
    after_TE = scorer(x_TD)
    assert after_TE.shape == (tokens, num_experts + 1)
    assert torch.equal(after_TE[:, :-1], before_TE)
    assert torch.equal(scorer.domains[-1], embedding_M)
    scorer.remove(0)
    assert torch.equal(scorer(x_TD), after_TE[:, 1:])


def test_what_cannot_be_appended_or_removed_is_refused():
    scorer = scorer_of(2)
    with pytest.raises(SparsecraftError, match=r"embedding is \(5,\) and the router reads \(24,\)"):
        scorer.append(torch.randn(5))
    with pytest.raises(SparsecraftError, match="Expert 2 of 2 cannot be removed"):
        scorer.remove(2)
    scorer.remove(1)
    with pytest.raises(SparsecraftError, match="leave one"):
        scorer.remove(0)
    with pytest.raises(SparsecraftError, match=r"embeddings are \(2, 24\) .* takes \(1, 24\)"):
        scorer.begin(torch.randn(2, M))


# --------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def test_rows_are_computed_once_until_a_tensor_changes():
    scorer, x_TD = scorer_of(), torch.randn(T, D)

    def agrees() -> bool:
        return torch.equal(scorer(x_TD), scorer_of_same()(x_TD))

    def scorer_of_same() -> DomainScorer:  # one that has kept nothing
        return copy.deepcopy(scorer)

    scorer(x_TD)
    kept = scorer.rows()
    assert scorer.rows() is kept
    changes = [
        lambda: scorer.first.mul_(1.5),
        lambda: scorer.second.add_(1),
        lambda: setattr(scorer.first, "data", scorer.first.data * 2),
        lambda: scorer.domains.mul_(-1),
        lambda: scorer.append(torch.randn(M)),
        lambda: scorer.remove(1),
        lambda: scorer.load_state_dict(scorer_of().state_dict()),
        lambda: scorer.to(torch.float64).to(torch.float32),
        lambda: (scorer.second.data.mul_(3), scorer.train(), scorer.eval()),
    ]
    for number, change in enumerate(changes):
        before = scorer.rows().clone()
        change()
        assert agrees(), number
        changed = scorer.rows().shape == before.shape and not torch.equal(scorer.rows(), before)
        assert changed or number == 7, number


def test_a_swap_back_to_memory_that_was_freed_is_seen():
    """A -> B -> A' where A' lies where A lay: kept tensors are held, so that it cannot."""
    scorer, x_TD = scorer_of(), torch.randn(T, D)
    with torch.no_grad():
        for _ in range(20):
            scorer(x_TD)
            scorer.first.data = torch.randn_like(scorer.first)
            scorer.first.data = torch.randn_like(scorer.first)
            wanted_TE = x_TD @ plain_rows(scorer).float().T
            torch.testing.assert_close(scorer(x_TD), wanted_TE, rtol=1e-3, atol=1e-4)


def test_rows_kept_in_inference_mode_serve_a_backward_pass_later():
    scorer = scorer_of().requires_grad_(False)
    with torch.inference_mode():
        scorer(torch.randn(T, D))
    x_TD = torch.randn(T, D, requires_grad=True)
    scorer(x_TD).sum().backward()
    torch.testing.assert_close(x_TD.grad, scorer.rows()[:3].sum(0).expand(T, D))
    with torch.inference_mode():
        made_there = scorer_of()
        before = made_there(x_TD)
        made_there.second.mul_(2)  # counts no version
        assert torch.equal(made_there(x_TD), 2 * before)


def test_a_copy_keeps_nothing_of_the_original():
    scorer, x_TD = scorer_of(), torch.randn(T, D)
    with torch.no_grad():
        scorer(x_TD)
        other = copy.deepcopy(scorer)
        other.second.mul_(2)
        assert torch.equal(other(x_TD), 2 * scorer(x_TD))


# --------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
def test_equal_experts_give_the_dense_network_and_a_share_of_it(family):
    """Not the dense model: y = F(x) + s_k F(x)."""
    model, seed = nexus(family), dense(family)
    site = next(name for name, m in model.named_modules() if isinstance(m, MoELayer))
    layer = model.get_submodule(site)
    x = torch.randn(2, 5, D)
    with sc.trace(model) as routing, torch.no_grad():
        y, dense_y = layer(x), layer.base(x)
        weights = routing[site].weights_TK.view(2, 5, 1)
    assert not model.sparsecraft.recipe.exact_at_start
    assert weights.min() >= 1 / 3 and weights.max() < 0.6
    torch.testing.assert_close(y, dense_y * (1 + weights), rtol=1e-4, atol=1e-5)
    assert (logits(model, batch(family)) - logits(seed, batch(family))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_alone_moves_the_projection_at_top_one(family):
    model = nexus(family).train()
    model(**batch(family, labels=True)).loss.backward()
    for layer in layers(model):
        for parameter in (layer.router.scorer.first, layer.router.scorer.second):
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


def test_kept_rows_follow_training_and_loading(tmp_path):
    model, inputs = nexus(), batch("llama", labels=True)
    model.save_pretrained(tmp_path / "start")
    before = logits(model, inputs)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval()
    after = logits(model, inputs)
    assert torch.equal(after, logits(copy.deepcopy(model), inputs))
    assert not torch.equal(after, before)
    sc.save(model, tmp_path / "end")
    loaded = sc.load(tmp_path / "end")
    torch.testing.assert_close(logits(loaded, inputs), after)
    for ours, theirs in zip(layers(model), layers(loaded), strict=True):
        for name, tensor in ours.router.state_dict().items():
            assert torch.equal(tensor, theirs.router.state_dict()[name]), name
    loaded.load_state_dict(sc.load(tmp_path / "start").state_dict())
    torch.testing.assert_close(logits(loaded, inputs), before)


def test_each_variant_and_its_cost():
    paper = nexus()
    linear = dense("llama")
    report = sc.convert(linear, sc.recipes.nexus(3, "linear"))
    ours = paper.sparsecraft.report["conversion"]["cost"]
    assert ours["flops_per_token"] == report.cost.flops_per_token, "rows are computed once"
    assert ours["total"] - report.cost.total == 2 * (2 * D * M + D * D - 3 * D)
    with pytest.raises(RecipeError, match="Unknown variant 'linaer'"):
        sc.recipes.nexus(variant="linaer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "zeros"}, "has no field 'router.init'"),
        ({"decides": '{"kind": "sentence", "encoder": "self"}'}, "only domains are embedded"),
        ({"scorer.encoder": "self", "decides": "sentence"}, "is 'self' with decides='sentence'"),
        ({"sentence_dim": 0}, "dim is 0"),
        ({"weighting": "one"}, "has no field 'router.weighting'"),
        ({"scorer": "linear", "init": "hidden", "reads": "output"}, "read the layer's input"),
        ({"dim": "wide"}, "dim is 'wide'"),
    ],
)
def test_what_a_router_of_domains_cannot_be_is_refused(changes, message):
    recipe = sc.recipes.nexus(3)
    with pytest.raises(RecipeError, match=message):
        sc.override(recipe, {f"router.{name}": value for name, value in changes.items()})
