"""A backbone in 4 bits (QLoRA), where `sparsecraft[quant]` is installed; it runs on a CPU too."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.dense import hub
from sparsecraft.errors import RecipeError
from tests import tiny

pytest.importorskip("bitsandbytes", reason="needs sparsecraft[quant]")

IDS = torch.arange(3, 43)[None]


def logits(model) -> torch.Tensor:
    """Without gradients: bitsandbytes takes another kernel with them."""
    with torch.no_grad():
        return model(IDS).logits


def recipe(quantize="nf4"):
    return sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4, quantize=quantize)


def test_nf4_converts_exactly_trains_and_comes_back(tmp_path):
    base = tiny.save_dense(tmp_path / "dense", width=128)
    model = hub.load_dense(base, quantize="nf4")
    dense = logits(model)
    report = sc.convert(model, recipe())
    assert report.certificate.exact and torch.equal(logits(model), dense)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    sc.train(
        model, rows, tmp_path / "out", steps=4, batch_size=4, max_length=64, learning_rate=1e-2,
        progress=False,
    )  # fmt: skip
    trained = logits(model)
    assert not torch.allclose(trained, dense, atol=1e-4)
    loaded = sc.load(tmp_path / "out")
    assert loaded.is_loaded_in_4bit
    assert torch.equal(logits(loaded), trained)
    sc.revert(model)
    assert torch.equal(logits(model), dense)


def test_the_recipe_and_the_model_must_agree(tmp_path):
    base = tiny.save_dense(tmp_path / "dense", width=128)
    with pytest.raises(RecipeError, match="quantize='nf4'"):
        sc.convert(hub.load_dense(base), recipe())
    with pytest.raises(RecipeError, match="loaded with 'nf4'"):
        sc.convert(hub.load_dense(base, quantize="nf4"), recipe(None))


def test_full_experts_cannot_be_copied_from_four_bits(tmp_path):
    model = hub.load_dense(tiny.save_dense(tmp_path / "dense", width=128), quantize="nf4")
    upcycling = sc.override(sc.recipes.upcycling(num_experts=4), {"base_quantization": "nf4"})
    with pytest.raises(sc.SparsecraftError, match="quantized"):
        sc.convert(model, upcycling)
    assert not hasattr(model, "sparsecraft")
