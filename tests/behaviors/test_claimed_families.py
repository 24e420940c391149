"""Families that docs/families.md claims, beside the suite's own: in use and in training.

One recipe with adapters, LoRAs and routers, whose experts have been moved: cache, padding, batch
neighbours, packed documents.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import sparsecraft as sc
from sparsecraft.training.packing import leak
from tests import tiny
from tests.cases import randomize_new
from tests.cases.members import member_inputs, member_model, member_outputs

# Networks of new forms, parallel blocks, mixtures of their own, hybrids.
DECODERS = (
    "gpt_neox",
    "gptj",
    "falcon",
    "bloom",
    "starcoder2",
    "nemotron",
    "stablelm_parallel",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "granitemoe",
    "deepseek_v3",
    "jamba",
    "qwen3_next",
)
ENCODERS = ("distilbert", "deberta_v2", "modernbert", "camembert")
PAIRS = ("bart", "mt5")
# Whose state, or whose positions counted by the mask, run on from one packed document to the next.
RUN_ON = ("bloom", "jamba", "qwen3_next")
# What another order of summation makes, relative to the largest output.
ROUNDING = 1e-4


@functools.cache
def _converted(family: str) -> nn.Module:
    model = member_model(family)
    adapters = sc.recipes.camelidae(4, 2, adapter_dim=8, lora_rank=4)
    try:
        sc.convert(model, adapters, certify=False)
    except sc.SparsecraftError:  # no network of a known form: at its Linears alone
        sc.convert(model, sc.recipes.molora(3, 2), certify=False)
    randomize_new(model)
    return model.eval()


def _rows(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row of a batch of two as a batch of its own."""
    return [{key: value[i : i + 1] for key, value in inputs.items()} for i in (0, 1)]


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= ROUNDING * one.abs().max())


@pytest.mark.parametrize("member", [*DECODERS, *PAIRS])
def test_generation_with_cache_equals_without(member):
    model, ids = _converted(member), member_inputs(member)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **settings)
    assert with_cache.shape[1] >= 6
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("member", [*DECODERS, *ENCODERS, *PAIRS])
def test_padding_and_batch_neighbours_change_nothing(member):
    model, inputs = _converted(member), member_inputs(member)
    whole = model(**inputs).logits.detach()
    mask = torch.ones_like(inputs["input_ids"])
    padded = {
        key: torch.nn.functional.pad(ids, (0, 5)) if key == "input_ids" else ids
        for key, ids in inputs.items()
    }
    padded["attention_mask"] = torch.nn.functional.pad(mask, (0, 5))
    with torch.no_grad():
        found = model(**padded).logits[:, : whole.shape[1]]
        alone = torch.cat(
            [
                model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits
                for i in (0, 1)
            ]
        )
    assert _close(whole, found) and _close(whole, alone)


@pytest.mark.parametrize("member", [*DECODERS, *ENCODERS, *PAIRS])
def test_micro_batches_sum_to_the_gradient_of_the_batch(member):
    model, inputs = _converted(member), member_inputs(member)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(rows: list[dict[str, Tensor]]) -> list[Tensor]:
        model.zero_grad()
        for row in rows:
            model(**row).logits.logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in trained if p.grad is not None]

    together, summed = gradients([inputs]), gradients(_rows(inputs))
    assert len(together) == len(summed) > 0
    assert all(_close(one, other) for one, other in zip(together, summed, strict=True))


@pytest.mark.parametrize("member", DECODERS)
def test_packed_documents_do_not_see_each_other_or_it_is_said(member):
    """What packing asks before it packs is true: where nothing leaks, the second document's logits
    do not follow the first."""
    model = _converted(member)
    said = leak(model, tiny.tokenizer(), 32, 2)
    if said is not None:
        assert member in (*RUN_ON, "falcon"), said  # before transformers 5.24
        return
    assert member not in RUN_ON
    ids = member_inputs(member)["input_ids"]
    settings = {"position_ids": torch.arange(12).repeat(2)[None], "use_cache": False}
    outputs = [
        member_outputs(model, {"input_ids": row[None], **settings}).view(24, -1)
        for row in (ids[0], torch.cat([ids[1, :12], ids[0, 12:]]))
    ]
    assert _close(outputs[0][12:], outputs[1][12:])
