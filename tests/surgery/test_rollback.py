"""Verbs that change a model in place: all of it, or nothing, wherever they fail."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.checkpoint.load import load
from sparsecraft.errors import SparsecraftError, StateError, SurgeryError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery import rollback
from sparsecraft.surgery.exchange import exchange_routers
from sparsecraft.surgery.record import is_converted
from sparsecraft.training.descend import prepare_parameters
from tests import tiny
from tests.cases import RECIPES, batch, dense, logits, moved, randomize_new
from tests.moe.test_state import running

PACKAGE = str(Path(sc.__file__).parent)


def state_of(model: nn.Module) -> dict:
    """Everything of a model and of the process that a verb may not leave changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    record = getattr(model, "sparsecraft", None)
    for place, dense_module in (record.dense if record else {}).items():  # outside of the tree
        modules |= dict(dense_module.named_modules(prefix=f"dense {place}"))
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "tensors": {
            name: (id(t), t.dtype, t.requires_grad, t.detach().clone())
            for path, module in modules.items()
            for short, t in (*module._parameters.items(), *module._buffers.items())
            for name in [f"{path}.{short}"]
            if t is not None
        },
        "extra": {n: t for n, t in model.state_dict().items() if n.endswith("_extra_state")},
        "hooks": {
            n: (*m._forward_pre_hooks, *m._forward_hooks, *m._load_state_dict_pre_hooks)
            for n, m in modules.items()
        },
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "report": repr(record and (record.report, record.recipe, record.running)),
        "record": record and [id(layer) for layer in record.layers],
        "random": (torch.get_rng_state(), random.getstate(), repr(np.random.get_state())),  # noqa: NPY002
    }


def assert_same(now, before, where: str = "") -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(now, before), where
    elif isinstance(before, dict):
        assert now.keys() == before.keys(), where
        for key in before:
            assert_same(now[key], before[key], f"{where} {key}")
    elif isinstance(before, tuple):
        assert len(now) == len(before), where
        for first, second in zip(now, before, strict=True):
            assert_same(first, second, where)
    else:
        assert now == before, where


@dataclass(frozen=True)
class Verb:
    """A verb, and a model that it changes."""

    model: Callable[[], nn.Module]
    run: Callable[[nn.Module], object]


def converted(recipe: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = dense("llama")
        sc.convert(model, RECIPES[recipe].make())
        randomize_new(model)
        return model

    return make


def trained() -> nn.Module:
    model = running("dsti")
    model.sparsecraft.running.stages = [s.name for s in model.sparsecraft.recipe.stages]
    return model


IDS = batch("llama")["input_ids"]
BATCHES = [{"input_ids": IDS, "labels": IDS}]
EVEN = [0.25] * 4

VERBS = {
    "convert": Verb(
        lambda: dense("llama"), lambda m: sc.convert(m, sc.recipes.camelidae(2, adapter_dim=4))
    ),
    "convert from sources": Verb(
        lambda: dense("llama"),
        lambda m: sc.convert(m, sc.recipes.btx(2), sources=[moved("llama", 1), moved("llama", 2)]),
    ),
    "revert adapters": Verb(converted("camelidae"), sc.revert),
    "revert networks": Verb(converted("upcycling"), sc.revert),
    "extend": Verb(converted("upcycling"), lambda m: sc.extend(m, moved("llama", 1), [IDS], [IDS])),
    "remove": Verb(converted("upcycling"), lambda m: sc.remove(m, 1)),
    "exchange_routers": Verb(
        converted("attentive"), lambda m: exchange_routers(m, m.sparsecraft.recipe.stages[1])
    ),
    "merge exact": Verb(converted("lora"), sc.merge),
    "merge fixed": Verb(converted("molora"), lambda m: sc.merge(m, "fixed", weights=EVEN)),
    "merge average": Verb(converted("camelidae"), lambda m: sc.merge(m, "average", partial=True)),
    "set_budget": Verb(lambda: running("dsti"), lambda m: sc.set_budget(m, 0.75)),
    "calibrate": Verb(trained, lambda m: sc.calibrate(m, BATCHES, max_tokens=36)),
}


class Injected(Exception):
    """Raised in the middle of a verb."""


def fail_at(number: int | None, run: Callable[[], object]) -> int:
    """Let the call of that number inside the package raise; how many calls there were.

    Calls of the rollback itself do not count: it begins before a verb and ends after it.
    """
    calls = 0

    def tracer(frame, event, argument):
        nonlocal calls
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE) and path != rollback.__file__:
            calls += 1
            if calls == number:
                sys.settrace(None)
                raise Injected
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(before)
    return calls


@pytest.mark.parametrize("name", VERBS)
def test_an_exception_anywhere_in_a_verb_leaves_no_trace(name):
    verb = VERBS[name]
    for _ in range(2):  # the second time finds what the first has cached
        model = verb.model()
        total = fail_at(None, lambda model=model: verb.run(model))
    model = verb.model()
    start, before = logits(model, batch("llama")), state_of(model)
    failures = 0
    for number in sorted({max(2, total * part // 14) for part in range(15)}):
        try:
            fail_at(number, lambda model=model: verb.run(model))
        except Injected:
            failures += 1
            assert_same(state_of(model), before, f"call {number} of {total}:")
        else:  # what is cached makes it need a few calls less
            model = verb.model()
            before = state_of(model)
    assert failures > 10 or total < 20
    assert torch.equal(logits(model, batch("llama")), start)
    verb.run(model)  # and then it works


# ---------------------------------------------------------------------- what makes a verb fail late


def replaced_layer(model: nn.Module) -> None:
    model.model.layers[-1].mlp = nn.Identity()


def wrong_source(model: nn.Module) -> nn.Module:
    narrow = dense("llama")
    last = narrow.model.layers[-1].mlp
    last.down_proj.weight = nn.Parameter(last.down_proj.weight[:, :-1].detach().clone())
    return narrow


def with_nan(model: nn.Module) -> nn.Module:
    other = moved("llama", 3)
    with torch.no_grad():
        other.model.layers[-1].mlp.down_proj.weight[0, 0] = torch.nan
    return other


@pytest.mark.parametrize(
    ("recipe", "spoil", "run", "words"),
    [
        ("camelidae", replaced_layer, sc.revert, "no longer in the model"),
        ("upcycling", replaced_layer, lambda m: sc.remove(m, 0), "no longer in the model"),
        ("molora", replaced_layer, lambda m: sc.merge(m, "average"), None),
        ("upcycling", None, lambda m: sc.extend(m, wrong_source(m), [IDS], [IDS]), "down_proj"),
        ("upcycling", None, lambda m: sc.extend(m, with_nan(m), [IDS], [IDS]), "not finite"),
        (
            "upcycling",
            lambda m: m.resize_token_embeddings(120, mean_resizing=False),
            lambda m: sc.extend(m, moved("llama", 1), [IDS], [IDS]),
            "vocab_size",
        ),
        ("camelidae", None, lambda m: m.load_state_dict({}), "lacks"),
        (
            "camelidae",
            None,
            lambda m: m.load_state_dict(m.state_dict() | {"lm_head.weight": torch.zeros(3, 3)}),
            "lm_head.weight",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_changed(recipe, spoil, run, words):
    model = converted(recipe)()
    if spoil is not None:
        spoil(model)
    before = state_of(model)
    try:
        run(model)
    except SparsecraftError as error:
        assert words is None or words in str(error)
    else:
        assert words is None
        return
    assert_same(state_of(model), before)


def test_a_state_that_the_last_gate_refuses_is_not_taken_by_the_first():
    model, state = running("dsti"), running("dsti", share=0.25, relu=False).state_dict()
    name = [name for name in state if name.endswith("router._extra_state")][-1]
    state[name] = torch.zeros(8, dtype=torch.uint8)
    before = state_of(model)
    with pytest.raises(SparsecraftError, match="cannot be read"):
        model.load_state_dict(state)
    assert_same(state_of(model), before)


def test_a_state_dict_of_another_model_is_an_error_of_torchs_kind_too():
    with pytest.raises(RuntimeError) as error:
        converted("camelidae")().load_state_dict({})
    assert isinstance(error.value, StateError)


# ------------------------------------------------------------------------------------------- revert


@pytest.fixture
def folder(tmp_path):
    return tiny.save_dense(tmp_path / "base")


def base(folder: str, **options) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling", "molora"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("change", [7, -7])
def test_a_resized_model_gives_its_network_back_and_keeps_the_size(
    folder, recipe, trained, change, caplog
):
    model, start = base(folder), base(folder)
    sc.convert(model, RECIPES[recipe].make())
    size = len(start.model.embed_tokens.weight) + change
    model.resize_token_embeddings(size, mean_resizing=False)
    weight = model.model.embed_tokens.weight
    if trained:
        weight.data = weight.data + 1
    added = weight[-change:].detach().clone()
    sc.revert(model)
    assert not is_converted(model)
    assert not any(isinstance(module, MoELayer) for module in model.modules())
    assert "embed_tokens.weight: resized" in caplog.text
    rows = model.model.embed_tokens.weight
    assert len(rows) == size and rows is model.lm_head.weight
    kept = min(size, size - change)
    assert torch.equal(rows[:kept], start.model.embed_tokens.weight[:kept])
    assert change < 0 or torch.equal(rows[kept:], added)
    others = {n: t for n, t in start.state_dict().items() if t.shape[:1] != (size - change,)}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("recipe", ["camelidae", "molora"])
def test_a_resized_model_reverts_from_its_folder_as_well(folder, recipe, tmp_path, caplog):
    """And from the folder of one that was resized again after it was loaded."""
    model, start = base(folder), base(folder)
    sc.convert(model, RECIPES[recipe].make())
    size = len(start.model.embed_tokens.weight)
    for name, more in (("once", 7), ("twice", 9)):
        model.resize_token_embeddings(size + more, mean_resizing=False)
        sc.save(model, tmp_path / name)
        model = sc.load(tmp_path / name)
    added = model.model.embed_tokens.weight[size:].detach().clone()
    sc.revert(model)
    assert "embed_tokens.weight: resized" in caplog.text
    rows = model.model.embed_tokens.weight
    assert torch.equal(rows[size:], added) and len(added) == 9
    start.resize_token_embeddings(size + 9, mean_resizing=False)
    start.model.embed_tokens.weight.data[size:] = added
    wanted, found = start.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m.resize_token_embeddings(300, mean_resizing=False), "no base folder"),
        (
            lambda m: setattr(
                m.model.norm, "weight", nn.Parameter(torch.ones(5), requires_grad=False)
            ),
            r"'model.norm.weight' is \[5\] and was \[32\]",
        ),
        (lambda m: m.half(), "no base folder"),
    ],
)
def test_what_cannot_be_given_back_stays_as_it_is(folder, spoil, words):
    model = base(folder)
    sc.convert(model, RECIPES["upcycling"].make())
    spoil(model)
    shutil.rmtree(folder)
    before = state_of(model)
    with pytest.raises(SurgeryError, match=words):
        sc.revert(model)
    assert_same(state_of(model), before)


# --------------------------------------------------------------------------------- types of tensors


@pytest.mark.parametrize("recipe", ["camelidae", "upcycling"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_trained_bfloat16_base_comes_back_as_it_was(folder, recipe, saved, tmp_path):
    """What trains is held in float32, and saved so."""
    model, start = base(folder, dtype=torch.bfloat16), base(folder, dtype=torch.bfloat16)
    start.save_pretrained(folder)
    sc.convert(model, RECIPES[recipe].make())
    prepare_parameters(model, model.sparsecraft.recipe.stages[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 if parameter.requires_grad else 0)
    if saved:
        sc.save(model, tmp_path / "out")
        model = load(tmp_path / "out")
    sc.revert(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(model.state_dict()[n], t) for n, t in start.state_dict().items())


def test_a_model_that_is_loaded_in_another_type_says_so_and_reverts_in_it(folder, tmp_path):
    model = base(folder)
    sc.convert(model, RECIPES["upcycling"].make())
    sc.save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", dtype="bfloat16")
    assert loaded.config.dtype == loaded.dtype == torch.bfloat16
    sc.revert(loaded)
    assert loaded.config.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    wanted = base(folder).to(torch.bfloat16).state_dict()
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in wanted.items())
