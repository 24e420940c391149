"""Measures of planted choices are what a hand computes: uniform, collapsed, specialized, and
experts that always come together; and chance is found for what it is.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsecraft.evaluation.analysis.chance import information, lifts, over_represented
from sparsecraft.evaluation.analysis.choices import Choices, LayerChoices
from sparsecraft.evaluation.analysis.measures import following, layer_measures, paths

E, D, DOCUMENTS, LENGTH = 4, 2, 40, 48
N = DOCUMENTS * LENGTH


def planted(first_N, second_N=None, scores=None, tokens_N=None) -> Choices:
    """One layer whose tokens chose these; documents 0, 2, ... are of domain 0."""
    documents_N = np.repeat(np.arange(DOCUMENTS), LENGTH)
    domains_N = (documents_N % D).astype(np.uint8)
    second_N = np.full(N, E) if second_N is None else second_N
    pairs_EE, load_DE = np.zeros((E, E)), np.zeros((D, E))
    for first, second, domain in zip(first_N, second_N, domains_N, strict=True):
        had = [e for e in (first, second) if e < E]
        for i in had:
            load_DE[domain, i] += 1
            for j in had:
                pairs_EE[i, j] += 1
    scores_NE = np.eye(E + 1)[first_N][:, :E] if scores is None else scores
    bits_N = np.nan_to_num(-scores_NE * np.log2(np.where(scores_NE > 0, scores_NE, 1))).sum(1)
    layer = LayerChoices(
        E, load_DE, pairs_EE,
        np.stack([scores_NE[domains_N == d].sum(0) for d in range(D)]),
        np.array([bits_N[domains_N == d].sum() for d in range(D)]),
        firsts=[first_N.astype(np.uint16)], seconds=[second_N.astype(np.uint16)],
        sizes=[(first_N < E).astype(np.uint16) + (second_N < E)],
    )  # fmt: skip
    tokens_N = np.zeros(N, np.int32) if tokens_N is None else tokens_N
    names = [f"domain {d}" for d in range(D)]
    return Choices(
        names, {"layer": layer}, np.ones(D), np.full(D, N // D), [tokens_N], [domains_N],
        [documents_N.astype(np.int32)], DOCUMENTS,
    )  # fmt: skip


def domains_of_tokens() -> np.ndarray:
    return np.repeat(np.arange(DOCUMENTS), LENGTH) % D


def test_uniform():
    first_N = np.arange(N) % E
    found = layer_measures(planted(first_N, scores=np.full((N, E), 1 / E)), "layer", None)
    assert found["load"] == [1 / E] * E and found["load_entropy"] == pytest.approx(1)
    assert [found["entropy"][h] for h in ("H_s", "H_u")] == pytest.approx([2, 2])
    assert found["entropy"]["most"] == 2 and not found["dead"] and not found["overloaded"]
    known = found["domain_information"]
    assert known["bits"] < 1e-3 and known["p"] > 0.05
    assert found["experts_per_token"] == [0, N, 0, 0, 0]


def test_collapsed():
    found = layer_measures(planted(np.full(N, 2)), "layer", None)
    assert found["load"] == [0, 0, 1, 0] and found["load_entropy"] == 0
    assert found["entropy"]["H_s"] == 0 and found["entropy"]["H_u"] == 0
    assert found["dead"] == [0, 1, 3] and found["overloaded"] == [2]
    assert found["domain_information"]["bits"] == 0 and found["domain_information"]["p"] == 1


def test_specialized():
    """Domain 0 has experts 0 and 1, domain 1 has 2 and 3: one bit."""
    first_N = 2 * domains_of_tokens() + np.arange(N) % 2
    found = layer_measures(planted(first_N), "layer", None)
    known = found["domain_information"]
    assert known["bits"] == pytest.approx(1) and known["p"] == pytest.approx(1 / 201)
    assert known["chance"] < 0.05 and known["chance_95"] < 0.2
    assert found["first_by_domain"] == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert found["entropy"]["H_u"] == pytest.approx(2)
    assert [e["H_u"] for e in found["entropy_by_domain"]] == pytest.approx([1, 1])


def test_always_together():
    """0 with 1 on half of the tokens, 2 with 3 on the others."""
    first_N = np.where(np.arange(N) % 2, 0, 2)
    found = layer_measures(planted(first_N, first_N + 1), "layer", None)
    assert [pair["experts"] for pair in found["together"]] == [[0, 1], [2, 3]]
    # Of six pairs of equal chance these two hold all.
    assert [pair["times"] for pair in found["together"]] == pytest.approx([3, 3])
    assert found["experts_per_token"] == [0, 0, N, 0, 0]
    one, *_, many = found["union"]
    assert one == {"tokens": 1, "experts": 2, "independent": 2} and many["experts"] == E


def test_even_pairs_are_as_often_as_chance():
    pairs_EE = np.full((E, E), 10.0)
    np.fill_diagonal(pairs_EE, 30)
    assert np.nanmax(np.abs(lifts(pairs_EE) - 1)) < 1e-12


def test_documents_and_not_tokens_are_exchanged():
    """Each document has an expert of its own: that looks like knowledge of domains token by token,
    and is none."""
    draw, low = np.random.default_rng(0), 0
    documents_N = np.repeat(np.arange(DOCUMENTS), LENGTH)
    for seed in range(40):
        first_N = draw.integers(0, E, DOCUMENTS)[documents_N]
        found = information(first_N, documents_N % D, documents_N, E, seed)
        low += found.p <= 0.05
    assert low <= 6  # 2 are expected


def test_what_is_not_said():
    tokens, documents = np.zeros(10, np.int64), np.arange(10)
    assert information(tokens, tokens, documents, E) is None  # one domain
    assert information(tokens + E, documents % 2, documents, E) is None  # no expert
    assert over_represented(tokens + E, tokens, E) == [[], [], [], []]
    assert over_represented(tokens[:3], tokens[:3], E) == [[], [], [], []]  # too few to test


def test_vocabulary_finds_what_is_planted_and_nothing_else():
    draw, false = np.random.default_rng(0), 0
    for _ in range(100):
        tokens_N, first_N = draw.integers(0, 50, N), draw.integers(0, E, N)
        false += sum(map(len, over_represented(first_N, tokens_N, E))) > 0
    assert false <= 12  # at most 5 % of the models are expected to show anything
    first_N[tokens_N == 7] = 3
    (found,) = [row for row in over_represented(first_N, tokens_N, E)[3] if row["token"] == 7]
    share = (first_N == 3).mean()
    assert found["times"] == pytest.approx(1 / share) and found["count"] == (tokens_N == 7).sum()


def test_layers_that_follow_each_other():
    draw = np.random.default_rng(0)
    first_N = draw.integers(0, E, N)
    choices = planted(first_N)
    choices.layers["same"] = planted((first_N + 1) % E).layers["layer"]
    choices.layers["other"] = planted(draw.integers(0, E, N)).layers["layer"]
    same, other = following(choices)
    assert same["bits"] == pytest.approx(2, abs=0.01) and same["chance"] < 0.01
    assert other["bits"] == pytest.approx(other["chance"], abs=0.01)
    found = paths(choices)
    assert found["different"] == E * E and len(found["common"]) == 10
    best = found["common"][0]
    assert best["experts"][1] == (best["experts"][0] + 1) % E
    assert best["share"] > 3 * best["by_chance"]


def test_entropy_by_hand():
    scores = np.tile([0.5, 0.25, 0.25, 0.0], (N, 1))
    found = layer_measures(planted(np.zeros(N, np.int64), scores=scores), "layer", None)
    assert found["entropy"]["H_s"] == pytest.approx(1.5) == found["entropy"]["H_u"]
    halves = np.where((np.arange(N) % 2)[:, None], [1.0, 0, 0, 0], [0, 1.0, 0, 0])
    found = layer_measures(planted(np.arange(N) % 2, scores=halves), "layer", None)
    assert found["entropy"]["H_s"] == 0 and found["entropy"]["H_u"] == pytest.approx(1)
    assert math.log2(E) == found["entropy"]["most"]
    assert torch.tensor(found["load"]).sum() == 1
