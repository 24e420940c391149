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
from tests.cases.zoo import ZOO

# Networks of new forms, parallel blocks, mixtures of their own, hybrids.
DECODERS = (
    "gpt_neox",
    "gptj",
    "codegen",
    "falcon",
    "bloom",
    "mpt",
    "starcoder2",
    "nemotron",
    "arcee",
    "apertus",
    "stablelm_parallel",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "phimoe",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "jamba",
    "qwen3_next",
)
ENCODERS = ("distilbert", "deberta_v2", "modernbert", "camembert")
PAIRS = ("bart", "mt5", "t5gemma")
# Whose state, positions counted by the mask, or attention (gpt-oss's, with its sinks) runs on from
# one packed document to the next.
RUN_ON = ("bloom", "mpt", "gpt_oss", "jamba", "qwen3_next")
RUN_ON += ("openai_gpt", "opt", "opt_350m", "xglm", "biogpt", "xlnet", "deepseek_v4", "mamba")
RUN_ON += ("mamba2", "bamba", "falcon_h1", "recurrent_gemma", "qwen3_5", "lfm2", "granitemoehybrid")
# Whose own router looks at all tokens of a batch at once.
OF_THE_BATCH = ("doge_moe",)


def _others(known: tuple[str, ...], *groups: str) -> list:
    """The zoo's other families of these groups, slow."""
    names = [n for n, member in ZOO.items() if member.group in groups and n not in known]
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


ALL_DECODERS = (
    *DECODERS,
    *_others(
        (*DECODERS, *OF_THE_BATCH),
        "Text decoders",
        "Mixtures of experts",
        "Hybrids and state spaces",
    ),
)
ALL_ENCODERS = (*ENCODERS, *_others(ENCODERS, "Text encoders"))
ALL_PAIRS = (*PAIRS, *_others(PAIRS, "Encoder-decoders"))
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


def _skip_where_broken(member: str) -> None:
    """Doge's mixtures of transformers 5.17 fail before we touch them: a layer takes the router
    logits that its mixture returns for hidden states."""
    try:
        member_model(member)(**member_inputs(member))
    except TypeError as error:
        if "must be Tensor, not tuple" not in str(error):
            raise
        pytest.skip(f"this version of transformers cannot run its own {member}: {error}")


def _rows(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row of a batch of two as a batch of its own."""
    return [{key: value[i : i + 1] for key, value in inputs.items()} for i in (0, 1)]


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= ROUNDING * one.abs().max())


@pytest.mark.parametrize("member", [*ALL_DECODERS, *ALL_PAIRS, *OF_THE_BATCH])
def test_generation_with_cache_equals_without(member):
    _skip_where_broken(member)
    model, ids = _converted(member), member_inputs(member)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **settings)
    assert with_cache.shape[1] >= 6
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("member", [*ALL_DECODERS, *ALL_ENCODERS, *ALL_PAIRS])
def test_padding_and_batch_neighbours_change_nothing(member):
    model, inputs = _converted(member), member_inputs(member)
    whole = model(**inputs).logits.detach()
    mask = torch.ones_like(inputs["input_ids"])
    padded = {
        key: ids if key == "decoder_input_ids" else torch.nn.functional.pad(ids, (0, 5))
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


def _labeled(member: str) -> tuple[dict[str, Tensor], int]:
    """Inputs with labels, of which the second row has a third, and how many these are."""
    inputs = dict(member_inputs(member))
    labels = inputs.pop("decoder_input_ids", inputs.get("input_ids")).clone()
    labels[:, 0] = -100  # nothing predicts it where labels are shifted
    labels[1, labels.shape[1] // 3 :] = -100
    return inputs | {"labels": labels}, int((labels != -100).sum())


@pytest.mark.parametrize("member", [*ALL_DECODERS, *ALL_ENCODERS, *ALL_PAIRS, "whisper"])
def test_micro_batches_sum_to_the_loss_and_the_gradient_of_the_batch(member):
    model, (inputs, items) = _converted(member), _labeled(member)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.sparsecraft.own_loss.losses = {}  # a balance is of the tokens that it sees at once

    def losses(batches: list[dict[str, Tensor]], **said: int) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        model.training = True  # by itself: no part of it drops anything
        found = [model(**batch, **said).loss for batch in batches]
        sum(found).backward()
        model.training = False
        gradients = [p.grad.flatten() for p in trained if p.grad is not None]
        return sum(found).detach(), torch.cat(gradients)

    wanted, gradients = losses([inputs])
    for batches in ([inputs], _rows(inputs)):
        loss, found = losses(batches, num_items_in_batch=items)
        assert _close(loss, wanted) and _close(found, gradients)


@pytest.mark.parametrize("member", ALL_DECODERS)
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
