"""`sparsecraft merge`."""

from __future__ import annotations

import torch

import sparsecraft as sc
from sparsecraft.cli.main import main
from tests import tiny


def test_a_split_checkpoint_merges_at_a_budget_of_one(tmp_path, capsys):
    base = tiny.save_dense(tmp_path / "dense")
    model = sc.hub.load_dense(base)
    sc.convert(model, sc.recipes.moefication(4, relu=False))
    sc.set_budget(model, 0.5)
    sc.save(model, tmp_path / "split")
    folder, out = str(tmp_path / "split"), str(tmp_path / "merged")
    assert main(["merge", folder, "--out", out]) == 1
    assert "--budget 1.0" in capsys.readouterr().err
    assert main(["merge", folder, "--out", out, "--budget", "1.0"]) == 0
    merged = sc.hub.load_dense(out)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(merged(ids).logits, sc.hub.load_dense(base)(ids).logits)
