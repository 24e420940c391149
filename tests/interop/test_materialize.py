"""Experts that share tensors become full networks, which standard architectures hold."""

from __future__ import annotations

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.errors import CertificateError, ExportError, SurgeryError
from sparsecraft.interop.materialize import materialize
from sparsecraft.moe.experts.mpo import MPOExperts
from tests import tiny
from tests.cases import FAMILIES, batch, dense, logits, randomize_new

E, K = 4, 2


def converted(family: str = "mistral", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = dense(family).to(dtype)
    sc.convert(model, sc.recipes.mpoe(E, K))
    randomize_new(model, std=0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_networks_give_the_same_and_are_what_upcycling_has(family, tmp_path):
    model, inputs, copies = converted(family), batch(family), dense(family)
    before = logits(model, inputs)
    assert materialize(model).exact
    assert (logits(model, inputs) - before).abs().max() < 1e-5
    sc.convert(copies, sc.recipes.upcycling(E, K))
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (model, copies)]
    assert shapes[0] == shapes[1]
    assert sc.count(model) == sc.count(copies)
    sc.save(model, tmp_path / "saved")
    again = sc.load(tmp_path / "saved")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_a_mixture_of_shared_cores_exports_as_mixtral_once_it_is_materialized(tmp_path):
    model, ids = converted(), batch("mistral")
    before = logits(model, ids)
    with pytest.raises(ExportError, match=r"share tensors.*--materialize"):
        sc.export(model, "mixtral", tmp_path / "exported")
    materialize(model)
    record = sc.export(model, "mixtral", tmp_path / "exported")
    assert record["difference"] < 1e-5 and record["rounding"] is None
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert type(plain).__name__ == "MixtralForCausalLM"
    assert (logits(plain, ids) - before).abs().max() < 1e-5


def test_in_half_precision_the_weights_are_rounded_and_that_is_said():
    model = converted(dtype=torch.bfloat16)
    certificate = materialize(model)
    assert certificate.exact and certificate.rounding > certificate.max_difference
    bank = model.model.layers[0].mlp.experts
    assert {p.dtype for p in bank.parameters()} == {torch.bfloat16}


def test_what_shares_nothing_is_refused():
    model = dense("llama")
    with pytest.raises(SurgeryError, match="is dense"):
        materialize(model)
    sc.convert(model, sc.recipes.upcycling(E, K))
    with pytest.raises(SurgeryError, match="has ffn experts"):
        materialize(model)


def test_wrong_networks_give_the_model_back(monkeypatch):
    model, inputs = converted(), batch("mistral")
    before, right = logits(model, inputs), MPOExperts.materialized

    def wrong(bank, donor):
        full = right(bank, donor)
        full.down.data *= 1.01
        return full

    monkeypatch.setattr(MPOExperts, "materialized", wrong)
    with pytest.raises(CertificateError, match="given back"):
        materialize(model)
    assert torch.equal(logits(model, inputs), before)
    assert model.sparsecraft.recipe.edits[0].experts.kind == "mpo"


def test_the_command_line_exports_full_networks(tmp_path, capsys):
    base = tiny.save_dense(tmp_path / "dense")
    model = sc.hub.load_dense(base)
    sc.convert(model, sc.recipes.mpoe(E, K))
    sc.save(model, tmp_path / "moe")
    asked = ["export", str(tmp_path / "moe"), "--to", "mixtral", "--out", str(tmp_path / "out")]
    assert main(asked) == 1
    assert "--materialize" in capsys.readouterr().err
    assert main([*asked, "--materialize"]) == 0
    assert "Full networks: max |logit difference|" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
