"""Mixtures of several dense models on a GPU: the CPU's function, its cache, and an expert more."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsecraft as sc
from tests.cases import batch, dense, layers, logits, moved
from tests.conversion.extension.test_extend import NEW, OLD, RECIPES, extend, mixture, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", RECIPES)
def test_a_mixture_computes_and_grows_on_a_gpu_as_on_the_cpu(name):
    here = mixture(name)
    there = copy.deepcopy(here).cuda()
    inputs = batch("llama")

    def compare(error: float) -> None:
        ours = logits(there, {key: value.cuda() for key, value in inputs.items()}).cpu()
        torch.testing.assert_close(ours, logits(here, inputs), rtol=error, atol=error)

    compare(1e-3)
    old = [layer.router(tokens(layer).cuda()).logits_TE for layer in layers(there)]
    extend(here, name, moved("llama", 3))
    extend(there, name, moved("llama", 3))
    for layer, before in zip(layers(there), old, strict=True):
        assert torch.equal(layer.router(tokens(layer).cuda()).logits_TE[:, :2], before)
        assert {p.device.type for p in layer.parameters()} == {"cuda"}
    compare(1e-2)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_generates_with_its_cache_on_a_gpu(name, dtype):
    model = mixture(name).to("cuda", dtype)
    extend(model, name, moved("llama", 3))
    ids = batch("llama")["input_ids"][:2].cuda()
    out = [
        model.generate(
            ids, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )
        for use in (True, False)
    ]  # fmt: skip
    first = [torch.stack(found.logits)[0] for found in out]
    torch.testing.assert_close(*first, rtol=2e-2, atol=2e-2)
    if dtype == torch.float32:
        assert torch.equal(out[0].sequences, out[1].sequences)


def test_the_sources_reach_a_model_on_a_gpu():
    model = dense("llama").cuda()
    sources = [moved("llama", 1), moved("llama", 2).cuda()]
    sc.convert(model, sc.recipes.btx(2), sources=sources)
    for e, source in enumerate(sources):
        down = source.model.layers[0].mlp.down_proj.weight.cuda()
        assert torch.equal(model.model.layers[0].mlp.experts.down[e], down)
    assert sc.extend(model, moved("llama", 3), NEW, OLD).share_new > 0.5
