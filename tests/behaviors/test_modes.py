"""Other ways to run a layer: compiled, exported, under torch.func, differentiated twice, fp16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecraft as sc
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery.budget import run
from tests.cases import RECIPES, D, batch, dense, logits, randomize_new

COMPILED = (
    "camelidae",
    "molora",
    "mov_top2",
    "upcycling_raw",
    "attentive",
    "moepp",
    "mpoe",
    "nexus",
    "mixlora",
    "gmoefication",
)
LORAS = ("molora", "lora", "hydralora", "camelidae", "mixlora", "smola")


def layer_of(recipe: str, dtype: torch.dtype = torch.float32) -> MoELayer:
    """A routed layer that reads tokens as wide as the model's, with experts that differ."""
    model = dense("llama")
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    randomize_new(model)
    run(model, "sparse")
    layers = [m for m in model.to(dtype).modules() if isinstance(m, MoELayer)]
    return next(m for m in layers if m.base is None or _width(m.base) == D).eval()


def _width(module: nn.Module) -> int:
    linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
    return linear.in_features


def tokens(dtype: torch.dtype = torch.float32, count: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, count, D, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", COMPILED)
def test_a_layer_is_one_graph_in_every_dtype(recipe, dtype):
    """The compiler's grouped_mm takes bfloat16 alone."""
    layer, x = layer_of(recipe, dtype), tokens(dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = layer(x)
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("recipe", ["upcycling_raw", "molora"])
def test_a_layer_is_exported(recipe):
    layer, x = layer_of(recipe), tokens()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=False)
        assert torch.allclose(exported.module()(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("recipe", LORAS)
def test_gradients_by_torch_func_are_those_of_autograd(recipe):
    layer, x = layer_of(recipe).train().requires_grad_(True), tokens(count=12)
    _without_dropout(layer)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def objective(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    by_func = torch.func.grad(objective)(values)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(by_func[name], wanted, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("recipe", LORAS)
def test_a_second_derivative_is_that_of_the_loop(recipe):
    found = []
    for path in ("auto", "loop"):
        layer, x = layer_of(recipe).train().requires_grad_(True), tokens(count=12)
        _without_dropout(layer)
        set_dispatch(layer, path)
        experts = list(layer.experts.parameters())
        first = torch.autograd.grad(layer(x).square().sum(), experts, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        found.append([p.grad for p in layer.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def _without_dropout(layer: nn.Module) -> None:
    for module in layer.modules():
        for name in ("dropout", "hidden_dropout", "output_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("recipe", ["camelidae", "molora", "mov", "upcycling", "mixlora", "smola"])
@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_t5_in_float16_keeps_its_second_matrix_in_float32(family, recipe, tmp_path):
    dense(family).save_pretrained(tmp_path)
    model = type(dense(family)).from_pretrained(tmp_path, dtype=torch.float16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept  # `wo`, which transformers keeps so
    wanted = logits(model, batch(family))
    sc.convert(model, RECIPES[recipe].make())
    assert torch.allclose(logits(model, batch(family)), wanted, atol=5e-3 * wanted.abs().max())
    model.train()
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
