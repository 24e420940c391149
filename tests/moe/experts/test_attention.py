"""Attention experts: N attentions in one pass equal N passes, with a cache and without."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.errors import DonorError, MergeError, RecipeError
from sparsecraft.moe.experts.attention import Projections
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import AttentionSpec
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Linear, Normal
from sparsecraft.recipe.selections import Soft
from sparsecraft.recipe.stages import Stage
from tests import cases

N = 3
FAMILIES = {
    "llama": cases.FAMILIES["llama"].config,
    "mistral": cases.FAMILIES["mistral"].config,
    "qwen2": cases.FAMILIES["qwen2"].config,
    "qwen3": cases.FAMILIES["qwen3"].config,
    # Attention and feed-forward network side by side, as in the paper's seeds.
    "cohere": lambda: transformers.CohereConfig(**cases.LLAMA_LIKE, logit_scale=1.0),
}


def build(family: str, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise
    return model


def apart(family: str, count: int) -> list[torch.nn.Module]:
    """Models that differ from the first by some training."""
    found = [build(family) for _ in range(count)]
    for seed, model in enumerate(found):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return found


def attend(kv: str = "expert", count: int = N) -> Recipe:
    """Attention experts alone."""
    router = RouterSpec(scorer=Linear(start=Normal(1.0)), select=Soft())
    edit = Edit(site="attention", experts=AttentionSpec(num_experts=count, kv=kv), router=router)
    return Recipe(
        name="attend", title="", paper="", exact_at_start=True, edits=(edit,), stages=(Stage(),)
    )


IDS = torch.randint(3, cases.VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_give_the_dense_attention_for_any_gate(family, kv):
    model = build(family)
    assert sc.convert(model, attend(kv)).certificate.exact
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    dense = build(family)
    ours, theirs = (m(IDS, attention_mask=mask).logits for m in (model, dense))
    torch.testing.assert_close(ours[:, 4:], theirs[:, 4:], rtol=1e-4, atol=1e-4)


def plain_loop(model, sources, kv):
    """Layer 0's attention as N passes of the sources' own modules on the same input."""
    layer = model.model.layers[0].self_attn
    modules = [copy.deepcopy(source.model.layers[0].self_attn) for source in sources]
    norms = [n for n, _ in modules[0].named_children() if n.endswith("norm")]
    parts = [f"{n}.weight" for n in norms]
    if kv == "shared":
        parts += [n for n, _ in modules[0].named_parameters() if n[0] in "kv" and "proj" in n]
    for name in parts:
        mean = torch.stack([m.get_parameter(name) for m in modules]).mean(0)
        for module in modules:
            module.get_parameter(name).data = mean

    def run(x, **kwargs):
        gates = (x @ layer.router.scorer.weight.t()).softmax(-1)
        return sum(gates[..., j, None] * m(x, **kwargs)[0] for j, m in enumerate(modules))

    return run


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_of_all_experts_equal_a_loop_over_attentions(family, kv):
    model, sources = build(family), apart(family, N)
    recipe = sc.override(attend(kv), {"others": "mean", "exact_at_start": False})
    sc.convert(model, recipe, sources=sources)
    run, seen = plain_loop(model, sources, kv), []
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    model(IDS, use_cache=False)
    ((kwargs, found),) = seen
    wanted = run(kwargs.pop("hidden_states"), **kwargs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_without_and_the_cache_has_the_size_it_should(family, kv):
    model, dense = build(family), build(family)
    sc.convert(model, sc.recipes.bam(N, kv), sources=apart(family, N))
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(IDS, use_cache=True, **asked)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **asked))

    def numbers(m):
        cache = m(IDS, use_cache=True).past_key_values
        return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)

    assert numbers(model) == numbers(dense) * (N if kv == "expert" else 1)


def test_experts_come_from_their_sources_and_shared_keys_are_the_mean(tmp_path):
    sources = apart("qwen3", N)
    for kv in ("expert", "shared"):
        model = build("qwen3")
        sc.convert(model, sc.recipes.bam(N, kv), sources=sources)
        theirs = [s.model.layers[1].self_attn for s in sources]
        ours = model.model.layers[1].self_attn.experts.attention
        for j, attention in enumerate(theirs):
            assert torch.equal(ours.q_proj.weight[j], attention.q_proj.weight)
            assert torch.equal(ours.o_proj.weight[j], attention.o_proj.weight)
        keys = torch.stack([attention.k_proj.weight for attention in theirs])
        wanted = keys if kv == "expert" else keys.mean(0, keepdim=True)
        torch.testing.assert_close(ours.k_proj.weight, wanted)
        norms = torch.stack([attention.q_norm.weight for attention in theirs])
        torch.testing.assert_close(ours.q_norm.weight, norms.mean(0))
        sc.save(model, tmp_path / kv)
        loaded = sc.load(tmp_path / kv)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_revert_gives_the_dense_model_back():
    model, wanted = build("llama"), build("llama")(IDS).logits
    sc.convert(model, sc.recipes.bam(N))
    sc.revert(model)
    assert torch.equal(model(IDS).logits, wanted)


def test_the_losses_leave_the_attention_routers_out():
    model = build("llama")
    sc.convert(model, sc.recipes.bam(N))
    routers = {n: m.router for n, m in model.named_modules() if isinstance(m, sc.MoELayer)}
    assert {n.rpartition(".")[2]: router.spec.balanced for n, router in routers.items()} == {
        "self_attn": False, "mlp": True,
    }  # fmt: skip
    model.train()
    with sc.trace(model) as routings:
        model(IDS, labels=IDS)
    networks = {name: r for name, r in routings.items() if name.endswith("mlp")}
    wanted = sc.losses.auxiliary_loss(networks, {"switch": 0.01, "z": 0.001})[0]
    assert torch.allclose(sc.losses.latest(model), wanted)


def test_what_cannot_be_is_refused():
    with pytest.raises(DonorError, match="separate Linear projections"):
        sc.convert(cases.dense("phi3"), attend())
    with pytest.raises(RecipeError, match="attention experts replace an attention"):
        Edit(site="ffn", experts=AttentionSpec(), router=RouterSpec())
    with pytest.raises(RecipeError, match="need a router"):
        Edit(site="attention", experts=AttentionSpec(num_experts=1))
    model = build("llama")
    sc.convert(model, attend())
    with pytest.raises(MergeError, match="cannot merge"):
        sc.merge(model)


def test_heads_of_all_experts_that_read_one_key_lie_together():
    G, R = 2, 6
    rows, x = Projections(nn.Linear(8, G * R), N, common=G), torch.randn(3, 5, 8)
    with torch.no_grad():
        rows.weight.normal_()
        rows.bias.normal_()
    y = rows(x)
    assert y.shape == (3, 5, G * N * R)
    for j, found in enumerate(y.unflatten(-1, (G, N, R)).unbind(-2)):
        wanted = nn.functional.linear(x, rows.weight[j], rows.bias[j]).unflatten(-1, (G, R))
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_continuous_batching_is_generation_or_is_refused(family):
    """Its cache has room for the dense model's key-value heads."""
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    room = {"num_blocks": 16, "max_batch_tokens": 32, "block_size": 16, "eos_token_id": -1}
    config = transformers.GenerationConfig(**settings, **room)
    for kv in ("shared", "expert"):
        model = build(family)
        sc.convert(model, sc.recipes.bam(2, kv), certify=False)
        model.generation_config.eos_token_id = None
        answers = model.generate_batch(ids.tolist(), generation_config=config).values()
        if kv == "expert":
            assert all("kv='shared'" in answer.error for answer in answers)
        else:
            wanted = model.generate(ids, eos_token_id=None, **settings)[:, ids.shape[1] :]
            assert [answer.generated_tokens for answer in answers] == wanted.tolist()
