"""What is counted is what routers did: of our layers, of mixtures of transformers, with padding."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.analysis.analyze import analyze
from sparsecraft.evaluation.analysis.choices import collect
from sparsecraft.evaluation.analysis.dropping import losses_without, without_expert
from sparsecraft.evaluation.analysis.twin import random_routers
from sparsecraft.evaluation.analysis.watching import decisions, routed_layers
from sparsecraft.evaluation.progress import Progress
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.routing import Routing
from tests import tiny
from tests.cases import RECIPES, RUNNING, dense, randomize_new

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXTURES = {
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Qwen3MoeConfig": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
    },
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "PhimoeConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def of_rows():
    """A converted model that the tiny tokenizer belongs to."""
    model = tiny.llama()
    sc.convert(model, sc.recipes.camelidae(num_experts=4, adapter_dim=8), certify=False)
    randomize_new(model)
    return model.eval()


def converted(recipe: str = "camelidae"):
    model = dense("llama")
    sc.convert(model, (RECIPES | RUNNING)[recipe].make(), certify=False)
    randomize_new(model)
    if recipe in RUNNING:
        RUNNING[recipe].ready(model)
    return model.eval()


def mixture(kind: str = "MixtralConfig"):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SIZES | MIXTURES[kind]))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batches(vocabulary: int = 90) -> list[dict[str, torch.Tensor]]:
    """Two, the second with padding."""
    torch.manual_seed(0)
    found = []
    for lengths in ((6, 6), (9, 4, 7)):
        ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        labels = ids.masked_fill(~mask, -100)
        given = {"input_ids": ids, "attention_mask": mask.long(), "token_mask": mask}
        found.append(given | {"labels": labels})
    return found


def by_hand(model, given):
    """Expert -> tokens that have it, of the first layer, token by token."""
    counts: dict[tuple[str, int], int] = {}
    for batch in given:
        for ids, mask in zip(batch["input_ids"], batch["token_mask"], strict=True):
            with torch.no_grad(), decisions(model) as decided:
                model(ids[mask][None])
            for name, routing in decided.items():
                for weights, indices in zip(routing.weights_TK, routing.indices_TK, strict=True):
                    for w, e in zip(weights.tolist(), indices.tolist(), strict=True):
                        if e < routing.num_experts and w:
                            counts[name, e] = counts.get((name, e), 0) + 1
    return counts


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_transformers(kind):
    model, given = mixture(kind), batches()
    choices, counts = collect(model, {"a": given[:1], "b": given[1:]}), by_hand(model, given)
    assert len(choices.layers) == 2 and choices.documents == 5
    for name, layer in choices.layers.items():
        wanted = [counts.get((name, e), 0) for e in range(4)]
        assert layer.load_DE.sum(0).tolist() == wanted == np.diag(layer.pairs_EE).tolist()
        assert layer.sizes_N.tolist() == [2] * len(choices.tokens_N)
        assert ((layer.first_N != layer.second_N) & (layer.second_N < 4)).all()
    real = torch.cat([batch["input_ids"][batch["token_mask"]] for batch in given])
    assert choices.tokens_N.tolist() == real.tolist()
    assert np.bincount(choices.documents_N).tolist() == [6, 6, 9, 4, 7]
    assert np.bincount(choices.domains_N).tolist() == [12, 20]


def computing_of(model, name: str) -> int:
    """How many of a layer's experts compute something."""
    layer = model.get_submodule(name)
    return layer.experts.num_experts - getattr(layer.router, "free", 0)


@pytest.mark.parametrize("recipe", [*RECIPES, *(n for n in RUNNING if n.endswith("_sparse"))])
def test_every_recipe(recipe):
    model, given = converted(recipe), batches()
    if not routed_layers(model):
        pytest.skip(f"{recipe} has no router")
    choices = collect(model, {"a": given})
    counts = by_hand(model, given)
    for name, layer in choices.layers.items():
        if layer.apart is not None:
            continue
        N, E = len(choices.tokens_N), layer.experts
        assert len(layer.first_N) == len(layer.second_N) == len(layer.sizes_N) == N
        had = np.diag(layer.pairs_EE)
        assert had[: computing_of(model, name)].sum() == layer.sizes_N.sum()
        # Of routers that read whole sequences, or what came before, padding changes nothing.
        assert had.tolist() == [counts.get((name, e), 0) for e in range(E)]


def test_loss_and_memory_of_the_table_are_those_of_evaluate(tmp_path):
    model = of_rows()
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows())
    options = {"tokenizer": tiny.tokenizer()}
    found = analyze(model, rows, **options, twin=False, drop=False)
    wanted = sc.evaluate(model, rows, **options)
    assert found["loss"][rows] == pytest.approx(wanted["loss"][rows]["loss"], rel=1e-6)
    entropies = [layer["load_entropy"] for layer in found["layers"].values()]
    assert np.mean(entropies) == pytest.approx(wanted["routing"]["load_entropy"], rel=1e-6)


def test_two_domains_and_all_measures(tmp_path, caplog):
    model, tokenizer = mixture(), tiny.tokenizer()
    files = [tiny.write_rows(tmp_path / f"{n}.jsonl", tiny.chat_rows(n + 4)) for n in range(2)]
    with caplog.at_level(logging.INFO, "sparsecraft"):
        found = analyze(model, files, tokenizer=tokenizer)
    json.dumps(found, allow_nan=False)
    assert found["domains"] == files and found["documents"] == 9 and len(found["layers"]) == 2
    assert any("few" in note for note in found["notes"])
    for layer in found["layers"].values():
        assert layer["domain_information"]["bits"] >= 0
        assert layer["domain_information_of_twin"] >= 0
        like = torch.tensor(layer["similarity"])
        assert like.shape == (4, 4) and torch.allclose(like.diagonal(), torch.ones(4))
    assert len(found["following"]) == 1 and found["paths"]["tokens"] == found["tokens"]
    assert len(found["dropped"]) == 4 and len(found["dropped"][0]) == 2


def test_an_expert_that_gives_nothing():
    """What is left is what the other experts give, by hand, and the model is as it was after."""
    for model in (mixture(), converted("upcycling")):
        given = batches()
        sources = {"a": given[:1], "b": given[1:]}
        before = model(given[0]["input_ids"]).logits
        found = losses_without(model, sources, 4)
        assert torch.equal(before, model(given[0]["input_ids"]).logits)
        assert any(abs(row["change"]) > 1e-6 for rows in found for row in rows)
        assert all(row["error"] >= 0 for rows in found for row in rows)
        name, layer = next(iter(routed_layers(model).items()))
        block, seen = model.get_submodule(name), {}
        handle = block.register_forward_hook(lambda m, args, y, s=seen: s.update(x=args[0], y=y))
        with torch.no_grad(), decisions(model) as decided, without_expert(model, 1):
            model(given[0]["input_ids"])
        handle.remove()
        x_TD = seen["x"].flatten(0, 1)
        y_TD = (seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]).flatten(0, 1)
        routing, exact_TD = decided[name], torch.zeros_like(y_TD)
        for t, x in enumerate(x_TD):
            for w, e in zip(routing.weights_TK[t], routing.indices_TK[t].tolist(), strict=True):
                if e != 1 and e < 4:
                    one = torch.ones(1, 1), torch.tensor([[e]])
                    exact_TD[t] += w * _expert(layer.experts, x[None], *one)[0]
        torch.testing.assert_close(y_TD, exact_TD, atol=1e-5, rtol=1e-4)


def _expert(experts, x_1D, weight_11, index_11):
    if isinstance(experts, Experts):
        return experts(x_1D, Routing(weight_11, index_11, torch.zeros(1, 4)))
    return experts(x_1D, index_11, weight_11)


def test_the_twin_is_another_and_the_model_stays():
    model, given = mixture(), batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = collect(model, {"a": given})
    with random_routers(model) as drawn:
        other = collect(model, {"a": given})
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert drawn == 2 and len(changed) == 2 and all("gate" in name for name in changed)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert any(
        (own.layers[name].first_N != other.layers[name].first_N).any() for name in own.layers
    )


@pytest.mark.parametrize("at", ["tokens", "tokens of the twin", "batches"])
def test_what_is_interrupted_is_told_of_what_there_is(at, tmp_path, monkeypatch):
    """Ctrl-C in any of the passes: what was counted by then is said, and what was not."""
    model, real = of_rows(), Progress.__call__
    files = [tiny.write_rows(tmp_path / f"{n}.jsonl", tiny.chat_rows()) for n in range(2)]
    seen = []

    def stop(self, done, of):
        real(self, done, of)
        if self.what == at:
            seen.append(done)
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", stop)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = analyze(model, files, tokenizer=tiny.tokenizer())
    notes = " ".join(found["notes"])
    assert len(seen) == 1 and found["dropped"] is None and "without each expert" in notes
    assert found["interrupted"] == (at == "tokens")
    assert ("Interrupted" in notes) == (at != "batches")
    if at != "batches":
        assert f"{seen[0]:,} tokens" in notes
    json.dumps(found, allow_nan=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules() if type(m).__name__ == "Router")


def test_bad_input(tmp_path):
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(3))
    with pytest.raises(SparsecraftError, match="no router"):
        analyze(tiny.llama(), rows, tokenizer=tiny.tokenizer())
    with pytest.raises(DataError):
        analyze(of_rows(), rows, tokenizer=tiny.tokenizer(), max_length=2)
    found = analyze(of_rows(), rows, tokenizer=tiny.tokenizer())
    notes = " ".join(found["notes"])
    assert "one domain" in notes and "few" in notes and "not been trained" in notes
