"""Sweeps over budgets: what is scored on what, what the files hold, how passes are timed."""

from __future__ import annotations

import csv
import itertools
import logging

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.budget import latency
from sparsecraft.evaluation.budget.loads import ffn_flops, observe
from sparsecraft.evaluation.budget.plots import sweep_png
from sparsecraft.surgery.budget import set_budget, split_layers, state_of
from tests import cases, tiny
from tests.surgery.test_budget import BY_THRESHOLD, RECIPES, made, split, tokens

QUICK = {"batch_sizes": (1, 2), "rounds": 2, "context": 8}


def batches() -> list[dict]:
    return [{"input_ids": ids} for ids in tokens()]


@pytest.mark.parametrize("name", ["moefication", "d2dmoe"])
def test_a_sweep_measures_every_budget_and_writes_what_it_measured(name, tmp_path):
    model = split(RECIPES[name]())
    set_budget(model, None)
    before = state_of(model), [la.router.threshold for la in split_layers(model).values()]
    found = sc.sweep(
        model, tokens(), out=tmp_path, shares=(0.25, 0.5, 0.75), calibration_data=tokens(), **QUICK
    )
    assert before[0] == state_of(model)
    assert before[1] == [la.router.threshold for la in split_layers(model).values()]

    assert [row["budget"] for row in found.rows] == [1.0, 0.75, 0.5, 0.25]
    dense = found.rows[0]
    assert dense["share"] == dense["ffn_flops"] == dense["model_flops"] == dense["relative_1"] == 1
    assert found.score == "loss" and dense["loss_change"] == 0
    for above, row in itertools.pairwise(found.rows):
        assert row["share"] < above["share"] and row["model_flops"] < above["model_flops"]
        assert row["share"] == pytest.approx(row["budget"], abs=0.02)
        assert row["ffn_flops"] > row["share"]  # the router is counted
        assert row["share_min"] <= row["share"] <= row["share_max"]
        assert row["share"] == pytest.approx(row["union_1"], abs=1e-6)
        assert row["union_1"] < row["union_2"]
        assert row["latency_low_2"] <= row["latency_ms_2"] <= row["latency_high_2"]
        assert (row["k"] is None) == (name == "d2dmoe") == (row["threshold"] is not None)

    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in found.rows]
    text = (tmp_path / "sweep.md").read_text()
    assert all(f"{row['loss']:.4f}" in text for row in found.rows) and "CPU" in text
    image = (tmp_path / "sweep.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 20_000


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_a_row_can_be_had_again_by_setting_its_budget(name, tmp_path):
    model = split(RECIPES[name]())
    found = sc.sweep(
        model, batches(), out=tmp_path, shares=(0.5,), batch_sizes=(), calibration_data=tokens()
    )
    row = found.rows[1]
    assert row["share"] <= 0.5
    model.sparsecraft.running.calibration = [(row["share"], row["threshold"])]
    set_budget(model, row["share"])
    seen = observe(model, batches())
    assert seen.loss == pytest.approx(row["loss"], abs=1e-6)
    assert ffn_flops(model, seen.shares) == pytest.approx(row["ffn_flops"])
    assert max(seen.shares.values()) == pytest.approx(row["share_max"])


def test_thresholds_come_from_rows_that_are_not_scored(tmp_path):
    model = split(RECIPES["lte"]())
    different = [ids % 7 + 3 for ids in tokens()]
    options = {"out": tmp_path, "shares": (0.5,), "batch_sizes": ()}
    own = sc.sweep(model, [*different[:1], *tokens()[:2], tokens()[2]], **options)
    given = sc.sweep(model, tokens(), calibration_data=different[:1], **options)
    assert own.rows[1] == given.rows[1]
    assert "first 1 of 4 rows" in own.notes[0] and "calibration data" in given.notes[0]
    with pytest.raises(DataError, match="1 rows or batches, too few"):
        sc.sweep(model, tokens()[:1], **options)


def test_budgets_that_cannot_be_or_say_nothing_new_are_left_out_aloud(tmp_path, caplog):
    model = split(RECIPES["cmoe"]())  # two of eight are shared
    with caplog.at_level(logging.WARNING, "sparsecraft"):
        found = sc.sweep(model, tokens(), out=tmp_path, shares=(0.1, 0.45, 0.5), batch_sizes=())
    assert [row["budget"] for row in found.rows] == [1.0, 0.5]
    assert len(caplog.messages) == 2 == len(found.notes[2:])
    assert "the least is 0.375" in caplog.text and "0.45 was left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shares": (0.5, 1.2)}, "shares has 1.2"),
        ({"batch_sizes": (0,)}, "batch_sizes has 0"),
    ],
)
def test_impossible_requests_are_refused(change, said, tmp_path):
    model = split(RECIPES["moefication"]())
    with pytest.raises(SparsecraftError, match=said):
        sc.sweep(model, tokens(), out=tmp_path / "no", **change)
    assert not (tmp_path / "no").exists()


def test_untrained_routers_are_not_swept(tmp_path):
    model = cases.dense("llama")
    sc.convert(model, RECIPES["d2dmoe"](), certify=False)
    with pytest.raises(SparsecraftError, match="sparsecraft train DIR"):
        sc.sweep(model, tokens(), out=tmp_path)


def test_a_classifier_is_scored_by_accuracy_and_an_encoder_by_what_is_given(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **cases.BERT_LIKE, vocab_size=320, max_position_embeddings=64, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    sc.convert(model, RECIPES["moefication"](), certify=False)
    made(model)
    rows = [{"text": f"say {word}", "label": i % 3} for i, word in enumerate(tiny.WORDS * 3)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    found = sc.sweep(
        model, path, out=tmp_path / "s", tokenizer=tiny.tokenizer(), shares=(0.5,), **QUICK
    )
    assert found.score == "accuracy" and 0 <= found.rows[0]["accuracy"] <= 1
    assert found.rows[1]["latency_ms_2"] > 0

    encoder = split(RECIPES["moefication"](), "bert")
    data = [cases.batch("bert")] * 2
    with pytest.raises(DataError, match="pass score="):
        sc.sweep(encoder, data, out=tmp_path / "no", shares=(0.5,), batch_sizes=())
    found = sc.sweep(
        encoder, data, out=tmp_path / "e", shares=(0.5,), batch_sizes=(),
        score=lambda model: float(cases.logits(model, data[0]).mean()),
    )  # fmt: skip
    assert found.score == "score" and found.rows[0]["score"] != found.rows[1]["score"]


def test_passes_are_timed_in_turn_on_one_token_with_a_cache(monkeypatch):
    model = split(RECIPES["moefication"]())
    used, calls = [], []
    monkeypatch.setattr(latency, "_timed", lambda model, step: calls.append(step()()) or 1.0)
    settings = [lambda n=n: used.append(n) for n in range(3)]
    found = latency.latencies(model, settings, batches(), batch_size=2, context=8, rounds=3)
    # Each once to fill its cache, then every round from another start.
    assert used == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert all(out.logits.shape[:2] == (2, 1) for out in calls)
    assert all(out.past_key_values.get_seq_length() == 9 for out in calls)
    assert [f.relative for f in found] == [1, 1, 1] and not model.training


def test_a_pass_is_the_next_token_of_the_whole_sequence():
    """The cache is the model's own: the timed pass gives what a pass without cache gives."""
    model = split(RECIPES["moefication"]())
    with torch.no_grad():
        step = latency._next_token(model, batches(), 2, 8)
        ids = torch.cat([b["input_ids"].flatten() for b in batches()])[: 2 * 9].view(2, 9)
        wanted = model(input_ids=ids).logits[:, -1]
        for _ in range(2):
            torch.testing.assert_close(step()().logits[:, -1], wanted, rtol=1e-4, atol=1e-4)


def test_the_picture_needs_no_latency(tmp_path):
    rows = [
        {"ffn_flops": 1.0, "loss": 3.0},
        {"ffn_flops": 1.05, "loss": 3.0},
        {"ffn_flops": 0.5, "loss": 3.4},
    ]
    sweep_png(
        tmp_path / "a.png", rows, score="loss", axis="loss", title="t", note="n", batch_sizes=()
    )
    assert (tmp_path / "a.png").stat().st_size > 10_000
