"""No tokens: every layer gives none, forward and backward, in training and evaluation."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe.layer import MoELayer
from tests.cases import RECIPES, dense


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_takes_no_tokens(name, training):
    model = dense("llama")
    sc.convert(model, RECIPES[name].make(), certify=False)
    model.train(training)
    calls = {}

    def keep(layer, args, kwargs):
        calls[layer] = args, kwargs

    # Attention is transformers' own, which refuses no tokens.
    layers = [m for m in model.modules() if isinstance(m, MoELayer) and not m.experts.whole]
    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in layers]
    model(torch.arange(3, 15)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    assert calls
    for layer, ((x_BSD, *rest), kwargs) in calls.items():
        for empty in (x_BSD.detach()[:, :0], x_BSD.detach()[:0]):
            y = layer(empty, *rest, **kwargs)
            assert y.shape[:-1] == empty.shape[:-1]
            if y.requires_grad:
                y.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
