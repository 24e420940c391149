"""Every tensor that a user can reach has memory of its own: nothing is an expanded view, and no
write, optimizer or wrapper reaches more than it was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsecraft as sc
from sparsecraft.conversion.needs import needs
from sparsecraft.conversion.stream import _check_recipe, convert_files
from sparsecraft.errors import RecipeError
from sparsecraft.interop.peft.configs import why_no_adapter
from sparsecraft.moe.experts.base import Experts
from sparsecraft.surgery.record import is_converted
from sparsecraft.surgery.revert import replaced_tensors
from tests import tiny
from tests.cases import EMBEDDING, RECIPES, D, E, F, K, batch, dense, layers, logits, moved

recipes = pytest.mark.parametrize("recipe", RECIPES)


def streams(name: str) -> bool:
    try:
        _check_recipe(RECIPES[name].make())
    except RecipeError:
        return False
    return True


def converted(recipe: str, family: str = "llama", train: bool = False) -> nn.Module:
    model = dense(family).train(train)
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    return model


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every parameter and buffer, and of the dense modules that were replaced;
    what is tied once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    if is_converted(model):
        yield from replaced_tensors(model.sparsecraft).items()


def assert_own_memory(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, tensor in tensors(model):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        assert not any(size > 1 and step == 0 for size, step in steps), f"{name} is expanded"
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.nbytes, f"{name} is a part of a larger tensor"
        other = owners.setdefault(storage.data_ptr(), name)
        assert other == name or tensor.numel() == 0, f"{name} shares memory with {other}"


# ----------------------------------------------------------------------------- every way to a model


@pytest.mark.parametrize("mode", ["eval", "train", "loaded"])
@recipes
def test_every_tensor_has_memory_of_its_own(recipe, mode, tmp_path):
    model = converted(recipe, train=mode == "train")
    if mode == "loaded":
        model = sc.load(sc.save(model, tmp_path / "out"))
    assert model.training == (mode == "train")
    assert_own_memory(model)
    assert_own_memory(model.train(not model.training))
    assert_own_memory(copy.deepcopy(model))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if streams(name)])
def test_so_it_has_after_a_conversion_from_file_to_file(recipe, tmp_path):
    folder = str(tmp_path / "base")
    dense("llama").save_pretrained(folder)
    convert_files(folder, RECIPES[recipe].make(), tmp_path / "out", certify=False)
    assert_own_memory(sc.load(tmp_path / "out"))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt", "bert", "t5", "qwen2", "vit"])
@pytest.mark.parametrize("recipe", ["upcycling", "camelidae", "moefication", "mixlora", "mov"])
def test_so_it_has_in_every_kind_of_family(family, recipe):
    assert_own_memory(converted(recipe, family))


def with_sources(tmp_path: Path) -> nn.Module:
    model = dense("qwen3")
    sources = [moved("qwen3", seed) for seed in (1, 2)]
    sc.convert(model, sc.recipes.bam(4), sources=sources, certify=False)
    return model


def expanded(tmp_path: Path) -> nn.Module:
    model = dense("llama")
    sources = [moved("llama", seed) for seed in (1, 2)]
    sc.convert(model, sc.recipes.upit(4, 2), sources=sources, certify=False)
    return model


def with_domains(tmp_path: Path) -> nn.Module:
    model, recipe = dense("llama"), sc.recipes.nexus(2, embedding_dim=EMBEDDING)
    sc.convert(model, recipe, domains=torch.eye(EMBEDDING)[:2], certify=False)
    return model


def extended(tmp_path: Path) -> nn.Module:
    model = with_domains(tmp_path)
    sc.extend(model, moved("llama", 3), embedding=torch.eye(EMBEDDING)[2])
    return model


def removed(tmp_path: Path) -> nn.Module:
    model = extended(tmp_path)
    sc.remove(model, 0)
    return model


def averaged(tmp_path: Path) -> nn.Module:
    model = converted("upcycling")
    sc.merge(model, "average")
    return model


def joined(tmp_path: Path) -> nn.Module:
    model = converted("camelidae_no_lora")
    sc.merge(model, "fixed", weights=[1 / E] * E)
    return model


def imported(tmp_path: Path) -> nn.Module:
    model = dense("qwen2")
    recipe = sc.override(sc.recipes.upcycling(E, K), {"place": "beside"})
    sc.convert(model, recipe, certify=False)
    sc.export(model, "granite", tmp_path / "out")
    return sc.import_moe(tmp_path / "out")


@pytest.mark.parametrize(
    "door",
    [with_sources, expanded, with_domains, extended, removed, averaged, joined, imported],
)
def test_so_it_has_behind_every_other_door(door, tmp_path):
    assert_own_memory(door(tmp_path))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if why_no_adapter(RECIPES[name].make()) is None]
)
def test_so_it_has_as_an_adapter_of_peft(recipe, low_cpu_mem_usage, tmp_path):
    model = peft.get_peft_model(dense("llama"), sc.SparsecraftConfig(recipe=RECIPES[recipe].make()))
    assert_own_memory(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        dense("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert_own_memory(again)


def test_what_is_needed_is_what_is_held(tmp_path):
    """`needs` counts the dense networks that stay for `revert` and the copies beside them."""
    for family in ("llama", "gpt2"):
        folder = tmp_path / family
        dense(family).save_pretrained(folder)
        for name in ("upcycling", "camelidae", "molora", "nexus_linear"):
            recipe = RECIPES[name].make()
            model = sc.hub.load_dense(str(folder))
            wanted = needs(folder, recipe)
            sc.convert(model, recipe, certify=False)
            parameters = {**dict(model.named_parameters()), **replaced_tensors(model.sparsecraft)}
            held = sum(p.untyped_storage().nbytes() for p in parameters.values())
            assert held == wanted.base + wanted.new, (family, name)


# -------------------------------------------------------------------- what a user does with a model


@pytest.mark.parametrize("train", [False, True])
@recipes
def test_writing_to_one_expert_changes_it_alone(recipe, train):
    model = converted(recipe, train=train)
    before = {name: t.clone() for name, t in tensors(model)}
    bank = layers(model)[0].experts
    banks = [part for part in bank.modules() if isinstance(part, Experts)]
    by_id = {id(p): p for b in banks for p in b.parameters() if len(p) == b.num_experts > 1}
    written = by_id.values()
    with torch.no_grad():
        for parameter in written:
            parameter[0] += 1
    now = {name: t.detach().clone() for name, t in tensors(model)}
    names = {name for name, p in model.named_parameters() if any(p is w for w in written)}
    assert names or bank.num_experts == 1
    for name, tensor in now.items():
        if name in names:
            assert torch.equal(tensor[0], before[name][0] + 1), name
            assert torch.equal(tensor[1:], before[name][1:]), name
        else:
            assert torch.equal(tensor, before[name]), name
    sc.revert(model)
    wanted = dense("llama").state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("train", [False, True])
@recipes
def test_a_fused_optimizer_steps(recipe, train):
    model = converted(recipe, train=train).requires_grad_(True)
    trained = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, fused=True)
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(2):
        model(**batch("llama", labels=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())
    assert all(p.isfinite().all() for p in trained.values())
    assert_own_memory(model)


@pytest.mark.parametrize("assign", [False, True])
@recipes
def test_a_model_loads_its_own_clone(recipe, assign):
    model, inputs = converted(recipe), batch("llama")
    wanted = logits(model, inputs)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state, assign=assign)
    assert torch.equal(logits(model, inputs), wanted)
    assert_own_memory(model)


@pytest.fixture
def process():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", ["upcycling", "bam", "camelidae", "drop_upcycling"])
def test_data_parallel_wraps_what_was_just_converted(recipe, process):
    model = converted(recipe)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    before = [p.detach().clone() for p in trained]
    wrapped(**batch("llama", labels=True)).loss.backward()
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))


def test_experts_drift_apart_in_evaluation_mode_too():
    model = converted("upcycling")
    down = layers(model)[0].experts.down
    assert down.shape == (E, D, F) and all(torch.equal(expert, down[0]) for expert in down)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch("llama", labels=True)).loss.backward()
    optimizer.step()
    assert not any(torch.equal(expert, down[0]) for expert in down[1:])


def test_a_merged_model_keeps_none_of_its_banks_memory():
    """Each Linear of the dense model is a tensor, and no part of a bank of E networks."""
    for how, weights in (("average", None), ("fixed", [0.0, 1.0, 0.0, 0.0])):
        model = converted("upcycling")
        sc.merge(model, how, weights=weights)
        assert not is_converted(model)
        assert_own_memory(model)


def test_the_tiny_tied_model_stays_tied():
    model = tiny.llama()
    sc.convert(model, sc.recipes.upcycling(3, 2), certify=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_own_memory(model)
