"""The form for inference computes what the model does, in fewer operations, and is never saved."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import CertificateError, SurgeryError
from sparsecraft.evaluation.certificate import compare
from sparsecraft.moe import joined
from sparsecraft.moe.names import unique_tensors
from tests import tiny
from tests.cases import FAMILIES, RECIPES, RUNNING, batch, dense, logits, randomize_new

KINDS = ("llama", "phi3", "gpt2", "opt", "bert", "t5", "vit")
MANY = [*RECIPES, *(n for n in RUNNING if n.endswith("_sparse"))]


def converted(family: str, recipe: str) -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, (RECIPES | RUNNING)[recipe].make(), certify=False)
    randomize_new(model)
    return model.eval()


@pytest.mark.parametrize("recipe", MANY)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_recipe_computes_the_same(family, recipe):
    model, inputs = converted(family, recipe), batch(family)
    if recipe in RUNNING:
        RUNNING[recipe].ready(model)
    wanted = logits(model, inputs)
    report = sc.fast(model)
    assert report.certificate.exact and not model.training
    found = logits(model, inputs)
    assert (found - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max().item())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("recipe", ["camelidae", "molora", "mov"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(family, recipe):
    model, inputs = converted(family, recipe), batch(family)
    wanted = logits(model, inputs)
    sc.fast(model)
    assert (logits(model, inputs) - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("family", KINDS)
def test_single_loras_become_dense_weights_and_adapters_stay(family):
    report = sc.fast(converted(family, "camelidae"))
    assert set(report.merged.folded.values()) == {"lora"}
    assert set(report.kept.values()) == {"adapter"} and not report.joined


@pytest.mark.parametrize(("recipe", "kind"), [("molora", "lora"), ("mov", "vector")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_mixtures_are_stacked(recipe, kind, dtype, monkeypatch):
    model, inputs = converted("llama", recipe).to(dtype), batch("llama")
    wanted = logits(model, inputs)
    called = []
    for form in (joined.JoinedLoRAs, joined.JoinedVectors):
        plain = form.forward
        monkeypatch.setattr(form, "forward", lambda *a, f=plain: called.append(1) or f(*a))
    report = sc.fast(model)
    assert set(report.joined.values()) == {kind} and not report.kept and report.merged is None
    called.clear()
    found = logits(model, inputs)
    assert len(called) == len(report.joined)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (found - wanted).abs().max() <= bound * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("recipe", ["molora", "mov", "camelidae"])
def test_a_cache_and_a_batch_of_padded_rows_change_nothing(recipe):
    model = converted("llama", recipe)
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    slow = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    sc.fast(model)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), slow
    )


def test_what_a_trace_records_is_what_it_was():
    model, inputs = converted("llama", "molora"), batch("llama")
    with sc.trace(model) as before:
        logits(model, inputs)
    sc.fast(model)
    with sc.trace(model) as after:
        logits(model, inputs)
    assert before.keys() == after.keys() and len(after)
    for name in before:
        assert torch.equal(before[name].weights_TK, after[name].weights_TK)


def test_no_tensor_is_added_to_what_a_state_dict_holds():
    model = converted("llama", "molora")
    names = set(model.state_dict())
    sc.fast(model)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("recipe", ["camelidae", "molora"])
def test_it_is_not_saved_trained_or_changed(recipe, tmp_path):
    model = converted("llama", recipe)
    sc.fast(model)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    verbs = {
        "save": lambda: sc.save(model, tmp_path / "out"),
        "save_pretrained": lambda: model.save_pretrained(tmp_path / "out"),
        "train": lambda: sc.train(model, rows, tmp_path / "out", steps=1),
        "revert": lambda: sc.revert(model),
        "merge": lambda: sc.merge(model, "average"),
        "export": lambda: sc.export(model, "mixtral", tmp_path / "out"),
        "fast": lambda: sc.fast(model),
        "convert": lambda: sc.convert(model, sc.recipes.camel()),
    }
    for name, verb in verbs.items():
        with pytest.raises(SurgeryError, match=r"form for inference \(sc.fast\).*load the check"):
            verb()
        assert not (tmp_path / "out").exists(), name


def test_a_model_that_is_dense_then_is_not_saved_either(tmp_path):
    model = converted("llama", "camel")
    report = sc.fast(model)
    assert report.merged is not None and not report.kept
    with pytest.raises(SurgeryError, match=r"sc\.merge"):
        model.save_pretrained(tmp_path / "out")


def test_a_dense_model_has_no_such_form():
    with pytest.raises(SurgeryError, match=r"dense; call sc\.convert"):
        sc.fast(dense("llama"))


def test_a_form_that_computes_something_else_is_refused_and_taken_back(monkeypatch):
    model, inputs = converted("llama", "molora"), batch("llama")
    model.train()
    wanted, held = logits(copy.deepcopy(model).eval(), inputs), set(unique_tensors(model))
    plain = joined.JoinedLoRAs.forward
    monkeypatch.setattr(joined.JoinedLoRAs, "forward", lambda *a: 1.01 * plain(*a))
    with pytest.raises(CertificateError, match="given back"):
        sc.fast(model)
    monkeypatch.undo()
    assert model.training and any(p.requires_grad for p in model.parameters())
    assert set(unique_tensors(model)) == held
    assert torch.equal(logits(model.eval(), inputs), wanted)
    assert sc.fast(model).certificate.exact


def test_gradients_are_asked_of_the_model_itself():
    """A form without gradients does not stand in where one is asked for."""
    model, inputs = converted("llama", "molora"), batch("llama")
    sc.fast(model)
    layer = next(m for m in model.modules() if isinstance(m, sc.MoELayer))
    layer.experts.lora_B.requires_grad_(True)
    model(**inputs).logits.sum().backward()
    assert layer.experts.lora_B.grad is not None


@pytest.mark.parametrize("recipe", ["molora", "mov"])
def test_weights_that_change_afterwards_count(recipe):
    model, other, inputs = converted("llama", recipe), converted("llama", recipe), batch("llama")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts" in name or "router" in name:
                parameter.add_(0.3)
    wanted = logits(other, inputs)
    assert (logits(model, inputs) - wanted).abs().max() > 0.01
    sc.fast(model)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(logits(model, inputs), wanted, atol=1e-5)
    with torch.no_grad():  # and memory that was put in their place
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.data = parameter.data - 0.3
    assert torch.allclose(
        logits(model, inputs), logits(converted("llama", recipe), inputs), atol=1e-4
    )


@pytest.mark.parametrize("recipe", ["molora", "mov"])
def test_a_copy_in_another_type_computes_what_the_model_does(recipe):
    model, inputs = converted("llama", recipe), batch("llama")
    wanted = logits(copy.deepcopy(model).to(torch.bfloat16), inputs)
    sc.fast(model)
    found = logits(copy.deepcopy(model).to(torch.bfloat16), inputs)
    assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    found, wanted = logits(model, inputs), logits(converted("llama", recipe), inputs)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_dropout_acts_in_training_without_gradients():
    recipe = sc.override(sc.recipes.molora(4), {"experts.dropout": 0.5})
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, recipe, certify=False)
    randomize_new(model)
    sc.fast(model)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("watched", ["router", "router.scorer", "experts"])
def test_hooks_are_called(watched):
    model, inputs, called = converted("llama", "molora"), batch("llama"), []
    layer = next(m for m in model.modules() if isinstance(m, sc.MoELayer))
    layer.get_submodule(watched).register_forward_hook(lambda *_: called.append(1))
    sc.fast(model)
    called.clear()
    logits(model, inputs)
    assert called


def test_weights_that_cannot_be_merged_in_their_type_stay(monkeypatch):
    model, inputs = converted("llama", "camelidae").to(torch.bfloat16), batch("llama")
    wanted = logits(model, inputs)
    asked = []

    def differs(before, after, least=0.0):
        found = compare(before, after, least)
        asked.append(found)
        return dataclasses.replace(found, tolerance=-1.0) if len(asked) == 1 else found

    monkeypatch.setattr("sparsecraft.conversion.fast.compare", differs)
    report = sc.fast(model)
    assert report.merged is None and "does not" in report.why_not_merged
    assert set(report.kept.values()) == {"lora", "adapter"}
    assert torch.equal(logits(model, inputs), wanted)


def test_a_merged_model_does_not_go_by_its_base_s_name(tmp_path):
    model = sc.hub.load_dense(tiny.save_dense(tmp_path / "dense"))
    sc.convert(model, sc.recipes.camel(), certify=False)
    randomize_new(model)
    sc.fast(model)
    assert "form for inference" in model.name_or_path
    with pytest.raises(SurgeryError, match=r"sc\.merge"):
        model.push_to_hub("someone/model")


@pytest.mark.parametrize("recipe", ["molora", "mov", "hydralora"])
def test_no_token_is_no_error(recipe):
    model = converted("llama", recipe)
    sc.fast(model)
    layer = next(m for m in model.modules() if isinstance(m, sc.MoELayer))
    with torch.no_grad():
        assert layer(torch.randn(1, 0, layer.base.in_features)).shape[:2] == (1, 0)
