"""Against implementations that are not ours: transformers, PEFT, and the papers as plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.dense.sites import find_sites
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery.build import build_layer
from sparsecraft.surgery.plan import plan
from tests.cases import LLAMA_LIKE, RECIPES, D, E, batch, dense, logits, randomize_new
from tests.reference import papers

PATHS = pytest.mark.parametrize("path", ["loop", "by_expert", "grouped", "dense"])


def converted(family: str, recipe: sc.Recipe, path: str = "loop") -> nn.Module:
    model = dense(family)
    sc.convert(model, recipe)
    randomize_new(model, std=0.3)
    set_dispatch(model, path)
    return model


def first_layer(model: nn.Module) -> MoELayer:
    return next(m for m in model.modules() if isinstance(m, MoELayer) and m.router is not None)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return (ours - theirs).abs().max().item() <= tolerance * max(1.0, theirs.abs().max().item())


# ------------------------------------------------------------------------------------- transformers


@PATHS
@pytest.mark.parametrize("k", [1, 2, E])
def test_an_upcycled_model_is_mixtral(path, k):
    """The same weights in transformers' Mixtral give the same logits, losses and gradients."""
    model = converted("mistral", sc.recipes.upcycling(num_experts=E, top_k=k), path)
    config = transformers.MixtralConfig(
        **LLAMA_LIKE,
        num_local_experts=E,
        num_experts_per_tok=k,
        sliding_window=8,
        rms_norm_eps=model.config.rms_norm_eps,  # the two families' defaults differ
        rope_parameters=model.config.rope_parameters,
        output_router_logits=True,
        router_aux_loss_coef=0.3,
    )
    mixtral = transformers.MixtralForCausalLM(config).eval()
    ours, state = model.state_dict(), {}
    for name, tensor in ours.items():
        name = name.replace("mlp.router.scorer.weight", "mlp.gate.weight")
        name = name.replace("experts.gate_up", "experts.gate_up_proj")
        state[name.replace("experts.down", "experts.down_proj")] = tensor.clone()
    assert state.keys() == mixtral.state_dict().keys()
    mixtral.load_state_dict(state)

    inputs = batch("mistral", labels=True)
    model.requires_grad_(True)
    with sc.trace(model) as routing:
        found = model(**inputs)
        balance, _ = sc.losses.auxiliary_loss(routing, {"switch_unnormalized": 0.3})
        # Where every token goes to every expert, transformers' balance is a constant.
        (found.loss + balance if k < E else found.loss).backward()
    wanted = mixtral(**inputs)
    assert close(found.logits, wanted.logits)
    for layer, theirs in zip(routing.values(), wanted.router_logits, strict=True):
        assert close(layer.logits_TE, theirs)
    # Mixtral takes the balance over the tokens of all layers at once, we per layer.
    wanted_balance = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    per_layer = [wanted_balance((x,), E, k) for x in wanted.router_logits]
    assert close(balance, 0.3 * torch.stack(per_layer).mean()) or k == E

    lm_loss = wanted.loss - 0.3 * wanted.aux_loss
    (lm_loss + 0.3 * torch.stack(per_layer).mean()).backward()
    for name, parameter in mixtral.named_parameters():
        name = name.replace("mlp.gate.weight", "mlp.router.scorer.weight")
        name = name.replace("gate_up_proj", "gate_up").replace("experts.down_proj", "experts.down")
        assert close(model.get_parameter(name).grad, parameter.grad, 1e-4), name


# ------------------------------------------------------------------------------------------- papers


@PATHS
@pytest.mark.parametrize("form", [papers.pesc_layer, papers.pesc_layer_softmax_first])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 0.25), (E, 1.0)])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_camelidae_is_the_papers_layer(family, k, scale, form, path):
    recipe = sc.recipes.camelidae(E, k, 16, adapter_scale=scale, lora_rank=0)
    layer = first_layer(converted(family, recipe, path))
    bank, router = layer.experts, layer.router.scorer.weight
    leaves = (bank.down, bank.up, router)
    results = []
    for run in ("ours", "theirs"):
        x = torch.randn(7, D, generator=torch.Generator().manual_seed(9)).requires_grad_()
        layer.zero_grad()
        if run == "ours":
            y = layer(x[None])[0]
        else:
            y = form(x, layer.base, router, bank.down, bank.up, k, scale)
        (y * torch.linspace(-1, 1, D)).square().sum().backward()
        results.append([y.detach(), x.grad, *(leaf.grad.clone() for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-4 or k == 1, "k = 1 gives the router no gradient"
        assert close(ours, theirs, 2e-5)


@PATHS
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("family", ["llama", "opt", "t5_gated"])
def test_upcycling_is_the_papers_layer(family, k, renormalize, path):
    """At its start, when all experts are copies; a trained one is Mixtral, above."""
    model = dense(family)
    site = find_sites(model, "ffn")[0]
    if site.spans_siblings:
        parts = [model.get_submodule(path) for path in site.members]
        network = nn.Sequential(parts[0], parts[1], parts[2])
        assert site.form.gate is None
    else:
        network = model.get_submodule(site.path)
    network = copy.deepcopy(network)
    recipe = sc.recipes.upcycling(E, k, renormalize=renormalize, router_std=1.0)
    sc.convert(model, recipe)
    set_dispatch(model, path)
    layer, results = first_layer(model), []
    router = layer.router.scorer.weight
    for run in ("ours", "theirs"):
        x = torch.randn(7, D, generator=torch.Generator().manual_seed(9)).requires_grad_()
        router.grad = None
        if run == "ours":
            y = layer(x[None])[0]
        else:
            y = papers.upcycled_layer(x, network, router, E, k, renormalize)
        y.square().mean().backward()
        results.append([y.detach(), x.grad, router.grad.clone()])
    for ours, theirs in zip(*results, strict=True):
        assert close(ours, theirs)
    router_gradient = results[1][2].abs().max()
    assert (router_gradient < 1e-6) == (renormalize or k == E), "copies teach a router nothing"


# --------------------------------------------------------------------------------------------- PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def copy_lora(ours: nn.Module, theirs: nn.Module) -> int:
    """Our LoRA tensors into PEFT's, by path; the number copied."""
    count = 0
    for name, parameter in ours.named_parameters():
        for part in ("lora_A", "lora_B"):
            if name.endswith(f".experts.{part}"):
                path = name.removesuffix(f".experts.{part}")
                while ".base." in path:
                    path = path.replace(".base.", ".")
                weight = theirs.get_parameter(f"base_model.model.{path}.{part}.default.weight")
                with torch.no_grad():
                    weight.copy_(parameter[0])
                weight.ours = parameter
                count += 1
    return count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_camel_is_pefts_lora_forward_and_backward(peft, family):
    recipe = sc.recipes.camel(lora_rank=4, lora_alpha=12.0)
    model = converted(family, recipe)
    targets = [site.path for site in find_sites(dense(family), "linear")]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12.0,
        target_modules=targets,
        lora_dropout=0.1,
        fan_in_fan_out=family == "gpt2",
    )
    theirs = peft.get_peft_model(dense(family), config).eval()
    assert copy_lora(model, theirs) == 2 * len(targets)

    inputs = batch(family, labels=True)
    found, wanted = model(**inputs), theirs(**inputs)
    assert (wanted.logits - logits(dense(family), batch(family))).abs().max() > 0.1
    assert close(found.logits, wanted.logits)
    found.loss.backward()
    wanted.loss.backward()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets) and all(p.grad.abs().max() > 0 for p in trained)
    assert all(close(p.ours.grad[0], p.grad, 1e-4) for p in trained)
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in trained)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_camel_is_the_papers_lora(family):
    model = converted(family, RECIPES["camel"].make())
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        base, bank = layer.base, layer.experts
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
        x = torch.randn(3, weight.shape[1])
        a, b = bank.lora_A[0], bank.lora_B[0]
        wanted = papers.lora_linear(x, weight, base.bias, a, b, alpha=16.0)
        assert close(layer(x), wanted)


# ----------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("sizes", "num_experts", "adapters", "lora"),
    [
        ((32, 4096, 4096, 11008), 8, 1.075e9, 159.9e6),  # Camelidae-8x7B on Llama-2-7B
        ((60, 7168, 1024, 20480), 8, 3.527e9, 491.5e6),  # 8x34B on Yi-34B, grouped queries
    ],
)
def test_published_parameter_counts(sizes, num_experts, adapters, lora):
    """pesc_mov.md 1.6, from shapes alone: one layer on the meta device, times the layers."""
    layers, width, d_kv, hidden = sizes
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        num_key_value_heads=d_kv // 128,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    counts = {}
    for item in plan(model, sc.recipes.camelidae(num_experts=num_experts)):
        kind = item.edit.experts.kind
        layer = build_layer(model, item, device="meta")
        counts[kind] = counts.get(kind, 0) + layers * sum(p.numel() for p in layer.parameters())
    assert counts["adapter"] == papers.camelidae_parameters(layers, width, 512, num_experts)
    assert counts["adapter"] == pytest.approx(adapters, rel=1e-3)
    assert counts["lora"] == papers.lora_parameters(layers, width, width, d_kv, hidden, 64)
    assert counts["lora"] == pytest.approx(lora, rel=1e-3)
