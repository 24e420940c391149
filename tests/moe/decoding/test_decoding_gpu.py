"""On a GPU: captured and compiled steps give the tokens of transformers' own loop, and never wait.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe.decoding import loop
from sparsecraft.moe.decoding.loop import STEPS
from tests.cases import RECIPES, RUNNING, dense, randomize_new
from tests.moe.decoding.test_decoding import GREEDY, MANY, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COMPILED = ("camelidae", "molora", "mov", "upcycling", "gmoefication_sparse", "moepp")


def converted(recipe: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = dense("llama")
    sc.convert(model, (RECIPES | RUNNING)[recipe].make(), certify=False)
    randomize_new(model)
    if recipe in RUNNING:
        RUNNING[recipe].ready(model)
    return model.to("cuda", dtype).eval()


def alike(model, batch: int, padded: bool, new: int) -> bool:
    call = {name: t.cuda() for name, t in prompts(batch, 7, padded).items()}
    call |= GREEDY | {"max_new_tokens": new, "eos_token_id": None}
    return torch.equal(type(model).generate(model, **call), model.generate(**call))


@pytest.mark.parametrize("recipe", MANY)
def test_captured_steps_generate_the_same(recipe):
    model = converted(recipe)
    for batch, padded in ((1, False), (3, False), (3, True)):
        assert alike(model, batch, padded, loop.COMPILED - 1)
    made = STEPS[model].found.values() if model in STEPS else ()
    assert all(step._replay is not None for step in made)


@pytest.mark.parametrize("recipe", COMPILED)
def test_compiled_steps_generate_the_same(recipe):
    model = converted(recipe)
    assert alike(model, 1, False, 48) and alike(model, 1, False, 48)
    assert all(step.compiled is not None for step in STEPS[model].found.values())


@pytest.mark.parametrize("recipe", COMPILED)
def test_in_bfloat16_logits_are_near(recipe):
    """Tokens may differ where two are as likely: the first step's logits do not."""
    model = converted(recipe, torch.bfloat16)
    ids = prompts(1, 7, False)["input_ids"].cuda()
    model.generate(ids, **GREEDY, max_new_tokens=48)
    if not (made := list(STEPS[model].found.values())):
        pytest.skip("not captured")
    step = made[-1]
    with torch.no_grad():
        wanted = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1].float()
        step.start(None)
        model(ids, past_key_values=step.cache, use_cache=True)
        step.position_B1.fill_(ids.shape[1])
        step.token_B1.copy_(ids[:, :1])
        step(model)
    assert (step.logits_BV - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_other_weights_in_the_same_memory_are_read():
    model = converted("camelidae")
    assert alike(model, 1, False, 12)
    first = list(STEPS[model].found.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert alike(model, 1, False, 12) and list(STEPS[model].found.values()) == first
    sc.fast(model)
    assert alike(model, 1, False, 12)


class Waits(torch.nn.Linear):
    """Asks the device for a number, which no capture allows."""

    def forward(self, x):
        return super().forward(x) * (1 + 0 * x.sum().item())


def test_a_capture_that_fails_leaves_nothing_behind():
    model = converted("camelidae")
    model.lm_head.__class__ = Waits
    ids = prompts(1, 7, False)["input_ids"].cuda()
    stream = torch.cuda.current_stream()
    call = {"input_ids": ids, "max_new_tokens": 6, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    found = model.generate(**call)
    assert not STEPS[model].found and torch.cuda.current_stream() == stream
    torch.manual_seed(0)
    assert torch.equal(type(model).generate(model, **call), found)
    assert torch.randn(3, device="cuda").isfinite().all()


def test_a_step_does_not_wait_for_the_device():
    model = converted("camelidae", torch.bfloat16)
    ids = prompts(1, 7, False)["input_ids"].cuda()
    model.generate(ids, **GREEDY, max_new_tokens=12)
    (step,) = STEPS[model].found.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
