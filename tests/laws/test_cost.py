"""The law of cost: a new kind of experts, router, start and recipe need no change in `src`.

`toy.py` beside this file defines them and registers each by one line.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import ExportError
from sparsecraft.recipe.formats import from_json, to_json
from tests import tiny
from tests.laws.test_house import ROOT, SOURCE
from tests.laws.toy import toy


@pytest.fixture
def base(tmp_path) -> str:
    return tiny.save_dense(tmp_path / "dense")


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model.eval()(ids).logits


def test_the_source_does_not_know_the_toy():
    assert not [p for p in SOURCE.rglob("*.py") if "toy" in p.read_text().lower().split()]


def test_a_toy_converts_trains_saves_loads_elsewhere_and_reverts(base, rows, tmp_path):
    model = sc.hub.load_dense(base)
    dense = logits(model)
    report = sc.convert(model, toy())
    assert report.certificate.exact and torch.allclose(logits(model), dense, atol=1e-5)
    assert from_json(to_json(toy())) == toy()

    layer = model.model.layers[0].mlp
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    sc.train(model, rows, tmp_path / "sft", steps=3, batch_size=4, max_length=64, progress=False)
    moved = [name for name, p in layer.named_parameters() if not torch.equal(p, before[name])]
    assert sorted(moved) == sorted(before), "experts and router train"
    with sc.trace(model) as routing:
        found = logits(model)
    assert next(iter(routing.values())).logits_TE.isfinite().all()

    torch.save(found, tmp_path / "logits.pt")
    code = (
        "import sys, torch, sparsecraft as sc, tests.laws.toy\n"
        "from tests.laws.test_cost import logits\n"
        "model = sc.load(sys.argv[1])\n"
        "assert torch.equal(logits(model), torch.load(sys.argv[2]))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(SOURCE.parent)])
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sft"), str(tmp_path / "logits.pt")],
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )

    fresh = sc.hub.load_dense(base)
    sc.convert(fresh, toy())
    sc.revert(fresh)
    assert torch.equal(logits(fresh), dense)


def test_a_toy_is_extended_counted_and_refused_by_export(base, tmp_path):
    model, other = sc.hub.load_dense(base), tiny.llama()
    sc.convert(model, toy())
    hidden, width = model.config.intermediate_size, model.config.hidden_size
    cost = sc.count(model)
    experts, router = 3 * 3 * hidden * width, 2 * 4 * width
    layers = len(model.model.layers)
    assert cost.new == layers * (experts + router)
    # A router that reads the experts' outputs runs all of them.
    assert cost.active == cost.total

    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    report = sc.extend(model, other, rows="reset", unrelated=True)
    assert report.number == 3 and model.model.layers[0].mlp.experts.num_experts == 4
    assert logits(model).isfinite().all()
    assert torch.equal(
        model.model.layers[1].mlp.experts.raising[3], other.model.layers[1].mlp.up_proj.weight
    )
    sc.remove(model, 3)
    assert model.sparsecraft.recipe.edits[0].experts.num_experts == 3

    with pytest.raises(ExportError, match="toy"):
        sc.export(model, "mixtral", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
