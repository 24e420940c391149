"""Whatever hangs hooks on the parts of a converted model, it computes what it computed.

accelerate's hooks give a module its tensors while it is called and take them away afterwards, so a
tensor that is read at another time has no values.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import sparsecraft as sc
from sparsecraft.moe.experts.base import Experts
from tests.cases import RECIPES, RUNNING, batch, dense, logits, randomize_new

ALL = RECIPES | RUNNING
SOME = [
    "camelidae",
    "mov_released",
    "mixlora",
    "smola_slots",
    "upcycling",
    "attentive",
    "moepp",
    "mpoe",
    "d2dmoe_sparse",
    "bam",
]


def converted(family: str, recipe: str) -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, ALL[recipe].make(), certify=False)
    randomize_new(model)
    ALL[recipe].ready(model)
    return model.eval()


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


CASES = [("llama", name) for name in ALL] + [
    (family, name)
    for family in ("gpt2", "t5", "phi3")
    for name in ("camelidae", "mixlora", "hydralora", "mov", "upcycling_raw")
]


@pytest.mark.parametrize(("family", "recipe"), CASES, ids=["-".join(c) for c in CASES])
def test_offloaded_to_the_processor(family, recipe):
    model, inputs = converted(family, recipe), batch(family)
    want = logits(model, inputs)
    cpu_offload(model, execution_device="cpu", state_dict=held(model), offload_buffers=True)
    assert any(tensor.is_meta for tensor in model.parameters())
    for _ in range(2):
        torch.testing.assert_close(logits(model, inputs), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", SOME)
def test_offloaded_to_the_disk(recipe, tmp_path):
    model, inputs = converted("llama", recipe), batch("llama")
    want = logits(model, inputs)
    disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    torch.testing.assert_close(logits(model, inputs), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", SOME)
def test_a_device_map_that_names_banks(recipe, tmp_path):
    """The banks lie on the disk and all else stays; one token at a time, as in generation."""
    model = converted("llama", recipe)
    inputs = {"input_ids": torch.tensor([[5]])}
    want = logits(model, inputs)
    banks = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    others = {
        name.rpartition(".")[0]
        for name in model.state_dict()
        if not any(name.startswith(f"{path}.") for path in banks)
    }
    places = dict.fromkeys(others, "cpu") | dict.fromkeys(banks, "disk")
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    torch.testing.assert_close(logits(model, inputs), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", SOME)
def test_gradients_pass_through_offloaded_layers(recipe):
    model = converted("llama", recipe)
    start = model.get_input_embeddings()(batch("llama")["input_ids"]).detach()

    def gradient() -> torch.Tensor:
        embedded = start.clone().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        return embedded.grad

    want = gradient()
    cpu_offload(model, execution_device="cpu", state_dict=held(model), offload_buffers=True)
    torch.testing.assert_close(gradient(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", [name for name in ALL if ALL[name].routed])
def test_every_bank_that_runs_is_called(recipe):
    """A hook of the user's own on a bank fires whenever the bank computes."""
    model, inputs = converted("llama", recipe), batch("llama")
    want, seen = logits(model, inputs), set()
    watched = copy.deepcopy(model)
    banks = {path: m for path, m in watched.named_modules() if isinstance(m, Experts)}
    for path, bank in banks.items():
        bank.register_forward_hook(lambda *_, path=path: seen.add(path))
    torch.testing.assert_close(logits(watched, inputs), want, rtol=0, atol=1e-6)
    assert seen == set(banks)
