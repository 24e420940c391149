"""Partitions of neurons: against slow references, other packages and planted answers.

Shapes: F neurons, D features, E experts, M neurons per expert, T tokens, N neurons of
the routed experts.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch.nn import functional

from sparsecraft.errors import DataError, RecipeError, ResourceError
from sparsecraft.moe.init.activation import (
    activation_clusters,
    activation_markers,
)
from sparsecraft.moe.init.auction import ROUNDS_BETWEEN_LOOKS, balanced_assignment
from sparsecraft.moe.init.balanced import balanced_kmeans, inertia
from sparsecraft.moe.init.graph import co_activation, co_activation_weights, cut_graph
from sparsecraft.moe.init.partition import contiguous, labels_of, neurons_of, random_partition

F, E, M = 96, 8, 12


def planted_labels(seed: int = 0) -> torch.Tensor:
    return labels_of(random_partition(F, E, seed))


def planted_rows(labels_F: torch.Tensor, noise: float, D: int = 20) -> torch.Tensor:
    return torch.randn(E, D)[labels_F] + noise * torch.randn(F, D)


def planted_hidden(labels_F: torch.Tensor, T: int) -> torch.Tensor:
    """Activations after a ReLU: the neurons of one expert fire on a token, and some noise."""
    fires_TF = torch.arange(T)[:, None] % E == labels_F
    return fires_TF * (1 + torch.rand(T, F)) + 0.01 * torch.rand(T, F)


def busy_hidden(labels_F: torch.Tensor) -> torch.Tensor:
    """The same, and the neurons of expert 3 fire on every token."""
    return planted_hidden(labels_F, 256) + 5 * (labels_F == 3)


def same_clusters(neurons_EM: torch.Tensor, labels_F: torch.Tensor) -> bool:
    """Equal up to the experts' names."""
    return all(len(labels_F[row].unique()) == 1 for row in neurons_EM)


def total(cost_FE: torch.Tensor, labels_F: torch.Tensor) -> float:
    return cost_FE.double().gather(1, labels_F[:, None]).sum().item()


# ------------------------------------------------------------------ what a partition is
def test_labels_and_neurons_convert_both_ways():
    neurons_EM = random_partition(F, E, seed=3)
    labels_F = labels_of(neurons_EM)
    assert all(labels_F[n] == e for e in range(E) for n in neurons_EM[e])
    assert torch.equal(neurons_of(labels_F, E), neurons_EM)
    assert neurons_of(labels_F.int(), E).dtype == torch.long
    assert torch.equal(random_partition(F, E, seed=3), neurons_EM)
    assert not torch.equal(random_partition(F, E, seed=4), neurons_EM)
    assert torch.equal(labels_of(contiguous(F, E)), torch.arange(F) // M)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: contiguous(96, 7), "96 neurons .* 7 experts.* 3, 4, 6, 8"),
        (lambda: random_partition(96, 0), "96 neurons .* 0 experts.* 1, 2, 3, 4"),
        (lambda: contiguous(96, 2.0), r"2\.0 experts.*whole number"),
        (lambda: labels_of(torch.tensor([[0, 1], [1, 2]])), "3 different ones"),
        (lambda: neurons_of(torch.tensor([0, 0, 0, 1]), 2), "2 experts of 1 to 3 neurons"),
        (lambda: neurons_of(torch.tensor([1, 2, 1, 2]), 2), "numbered 1 to 2"),
        (lambda: neurons_of(torch.ones(4), 2), "float32"),
        (lambda: balanced_kmeans(torch.randn(10, 3), 4), "2, 5"),
        (lambda: balanced_kmeans(torch.randn(10, 3), 5, iterations=0), "iterations is 0"),
        (lambda: balanced_kmeans(torch.randn(4, 3), 2, start=torch.zeros(3)), "shape .3,."),
        (lambda: balanced_kmeans(torch.full((4, 3), torch.inf), 2), "infinite"),
        (lambda: balanced_assignment(torch.zeros(6, 3), 3), "9 places. Use size=2"),
        (lambda: activation_clusters([torch.ones(5, 8)], 4, 4, active=2), "use 0 to 3"),
        (lambda: activation_clusters([torch.ones(5, 8)], 4, 1, active=9), "Use 1 to 8"),
    ],
)
def test_errors_say_what_to_do(make, says):
    with pytest.raises(RecipeError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: co_activation_weights([torch.full((4, 3), -0.5)]), "-0.5.*after the ReLU"),
        (lambda: co_activation_weights([torch.full((4, 3), torch.nan)]), "undefined"),
        (lambda: co_activation_weights([torch.zeros(4, 3)]), "No two of the 3 neurons"),
        (lambda: co_activation_weights([]), "at least one chunk"),
        (lambda: co_activation_weights([torch.ones(7, 3)], released=True), "8 tokens"),
        (lambda: activation_clusters([], 4, 1), "at least one chunk"),
    ],
)
def test_errors_of_the_data_say_what_to_do(make, says):
    with pytest.raises(DataError, match=says):
        make()


# ------------------------------------------------------------------ balanced assignment
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("neurons", "experts"), [(64, 8), (60, 3), (96, 48), (40, 40), (12, 1)])
def test_assignment_is_within_its_bound_of_the_optimum(neurons, experts, seed):
    optimize = pytest.importorskip("scipy.optimize")
    torch.manual_seed(seed)
    size = neurons // experts
    cost_FE = torch.randn(neurons, 2) @ torch.randn(2, experts) + torch.randn(experts)
    places_FF = cost_FE.double().repeat_interleave(size, 1).numpy()
    least = places_FF[optimize.linear_sum_assignment(places_FF)].sum()
    for epsilon in (0.1, 1e-3, None):
        labels_F = balanced_assignment(cost_FE, size, epsilon=epsilon)
        assert (torch.bincount(labels_F, minlength=experts) == size).all()
        bound = neurons * (epsilon or 1e-3 * float(cost_FE.std(1, correction=0).mean()))
        assert least - 1e-9 <= total(cost_FE, labels_F) <= least + bound + 1e-9
    whole_FE = (10 * cost_FE).round()
    places_FF = whole_FE.double().repeat_interleave(size, 1).numpy()
    least = places_FF[optimize.linear_sum_assignment(places_FF)].sum()
    exact_F = balanced_assignment(whole_FE, size, epsilon=0.99 / neurons)
    assert total(whole_FE, exact_F) == least


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_assignment_of_many_equal_neurons(offset):
    """Ties and constants that every expert costs must not decide, or stall, an auction."""
    cost_FE = torch.randn(F, E)
    cost_FE[: F // 2] = cost_FE[0]
    labels_F = balanced_assignment(cost_FE.double() + offset, M)
    assert (torch.bincount(labels_F) == M).all()
    assert total(cost_FE, labels_F) <= total(cost_FE, balanced_assignment(cost_FE, M)) + 0.2
    assert (torch.bincount(balanced_assignment(torch.ones(F, E), M)) == M).all()


def test_rounds_without_a_look_change_nothing(monkeypatch):
    """On a GPU neurons without a bid stay in line; they must not take part."""
    cost_FE = torch.randn(F, E)
    every = balanced_assignment(cost_FE, M)
    monkeypatch.setitem(ROUNDS_BETWEEN_LOOKS, "cpu", 32)
    assert torch.equal(balanced_assignment(cost_FE, M), every)


# ------------------------------------------------------------------ balanced k-means
@pytest.mark.parametrize("seed", range(4))
def test_inertia_against_k_means_constrained(seed):
    package = pytest.importorskip("k_means_constrained")
    torch.manual_seed(seed)
    rows_FD = planted_rows(planted_labels(seed), noise=1.5)
    unit_FD = functional.normalize(rows_FD, dim=1)
    theirs = package.KMeansConstrained(E, size_min=M, size_max=M, random_state=0, n_init=1)
    theirs.fit(unit_FD.numpy())
    ours = inertia(unit_FD, balanced_kmeans(rows_FD, E, restarts=3))
    plain = inertia(unit_FD, balanced_kmeans(rows_FD, E, restarts=3, plain=True))
    assert ours <= 1.01 * theirs.inertia_
    assert plain <= 1.05 * theirs.inertia_


def test_inertia_is_the_sum_of_squared_distances():
    rows_FD, neurons_EM = torch.randn(F, 5), random_partition(F, E)
    means_ED = torch.stack([rows_FD[neurons].mean(0) for neurons in neurons_EM])
    slow = sum(
        ((rows_FD[n] - means_ED[e]) ** 2).sum().item() for e in range(E) for n in neurons_EM[e]
    )
    assert inertia(rows_FD, neurons_EM) == pytest.approx(slow, rel=1e-5)


def test_kmeans_recovers_planted_clusters_whatever_the_row_lengths():
    labels_F = planted_labels()
    rows_FD = planted_rows(labels_F, noise=0.1) * (0.1 + torch.rand(F, 1))
    neurons_EM = balanced_kmeans(rows_FD, E, restarts=3)
    assert neurons_EM.shape == (E, M) and neurons_EM.dtype == torch.long
    assert same_clusters(neurons_EM, labels_F)
    assert torch.equal(balanced_kmeans(rows_FD.bfloat16().float(), E, restarts=3), neurons_EM)
    assert torch.equal(balanced_kmeans(rows_FD, E, restarts=3), neurons_EM)


@pytest.mark.parametrize("plain", [False, True])
def test_a_start_is_never_made_worse_and_names_the_experts(plain):
    rows_FD = functional.normalize(torch.randn(F, 30), dim=1)
    start_EM = random_partition(F, E)
    value = inertia(rows_FD, start_EM)
    for _ in range(3):
        again_EM = balanced_kmeans(rows_FD, E, start=start_EM, iterations=3, plain=plain)
        by_labels_EM = balanced_kmeans(
            rows_FD, E, start=labels_of(start_EM), iterations=3, plain=plain
        )
        assert torch.equal(again_EM, by_labels_EM)
        assert inertia(rows_FD, again_EM) <= value + 1e-6
        start_EM, value = again_EM, inertia(rows_FD, again_EM)
    labels_F = planted_labels()
    start_EM = neurons_of(labels_F, E)
    rows_FD = planted_rows(labels_F, noise=0.01)
    assert torch.equal(balanced_kmeans(rows_FD, E, start=start_EM), start_EM)


def test_kmeans_from_a_start_follows_a_permutation_of_the_neurons():
    # Rows far enough apart that no choice hangs on how a product rounds.
    start_F = planted_labels(1)
    rows_FD, order_F = planted_rows(planted_labels(2), noise=0.05), torch.randperm(F)
    labels_F = labels_of(balanced_kmeans(rows_FD, E, start=start_F))
    moved_EM = balanced_kmeans(rows_FD[order_F], E, start=start_F[order_F])
    assert torch.equal(labels_of(moved_EM), labels_F[order_F])


def test_taking_out_the_own_pull_lowers_the_inertia_of_small_clusters():
    """32 neurons per expert in many dimensions: plain iterations stop after the first."""
    rows_FD = functional.normalize(torch.randn(256, 256), dim=1)
    plain = inertia(rows_FD, balanced_kmeans(rows_FD, 8, plain=True))
    ours = inertia(rows_FD, balanced_kmeans(rows_FD, 8))
    assert 256 - ours > 1.15 * (256 - plain)


@pytest.mark.gpu
def test_cuda_finds_what_the_cpu_finds():
    labels_F = planted_labels()
    rows_FD = planted_rows(labels_F, noise=0.1).cuda()
    neurons_EM = balanced_kmeans(rows_FD, E, restarts=3)
    assert neurons_EM.is_cuda and same_clusters(neurons_EM.cpu(), labels_F)
    cost_FE = torch.randn(2048, 64)
    here, there = (balanced_assignment(c, 32) for c in (cost_FE, cost_FE.cuda()))
    assert torch.equal(here, there.cpu())
    rows_FD = functional.normalize(torch.randn(1024, 128), dim=1)
    values = [
        inertia(rows_FD, balanced_kmeans(rows_FD.to(device), 32).cpu())
        for device in ("cpu", "cuda", "cuda")
    ]
    assert values[1] == values[2] == pytest.approx(values[0], rel=5e-3)
    hidden_TF = busy_hidden(labels_F)
    here, there = (
        activation_clusters([hidden_TF.to(device)], E, 1, active=2 * M)
        for device in ("cpu", "cuda")
    )
    assert all(torch.equal(h, t.cpu()) for h, t in zip(here, there, strict=True))


# ------------------------------------------------------------------ co-activation
def test_the_papers_graph_is_the_loop_over_tokens_and_pairs():
    hidden_TF = torch.randn(11, 6).relu()
    loop_FF = torch.zeros(6, 6)
    for t, i, j in itertools.product(range(11), range(6), range(6)):
        if i != j and hidden_TF[t, i] > 0 and hidden_TF[t, j] > 0:
            loop_FF[i, j] += hidden_TF[t, i] * hidden_TF[t, j]
    found_FF = co_activation_weights(iter(hidden_TF.split(4)))
    assert torch.allclose(found_FF, loop_FF, atol=1e-5)


def test_the_released_graph_is_its_loop(monkeypatch):
    """Groups of 8, sums cut off at 1, a threshold from the percentiles, whole weights."""
    hidden_TF = torch.randn(45, 6).relu() * torch.rand(6)
    loop_FF = torch.zeros(6, 6)
    for first in range(0, 40, 8):
        pair_FF = torch.zeros(6, 6)
        for h_F in hidden_TF[first : first + 8]:
            pair_FF += torch.outer(h_F, h_F)
        loop_FF += pair_FF.clamp(max=1)
    threshold = torch.quantile(loop_FF.flatten(), 0.1).item()
    assert threshold > 0
    loop_FF = (loop_FF / (threshold * 0.99)).int().float().fill_diagonal_(0)
    found_FF = co_activation_weights(iter(hidden_TF.split(7)), released=True)
    assert torch.equal(found_FF, loop_FF)

    silent_TF = functional.pad(hidden_TF, (0, 4))  # the first percentiles are zero
    assert (co_activation_weights([silent_TF], released=True)[:6, :6] > 0).any()
    monkeypatch.setattr("sparsecraft.moe.init.graph.RELEASED_TOKENS", 16)
    short_FF = co_activation_weights([hidden_TF], released=True)
    assert torch.equal(short_FF, co_activation_weights([hidden_TF[:24]], released=True))


@pytest.mark.parametrize("released", [False, True])
def test_cutting_the_graph_recovers_planted_clusters(released):
    pytest.importorskip("pymetis")
    labels_F = planted_labels()
    hidden_TF = planted_hidden(labels_F, 800)
    neurons_EM = co_activation(hidden_TF.split(100), E, released=released)
    assert neurons_EM.shape == (E, M) and same_clusters(neurons_EM, labels_F)
    assert torch.equal(co_activation([hidden_TF], E, released=released), neurons_EM)


def test_cuts_of_noise_are_equal_and_better_than_chance():
    pytest.importorskip("pymetis")
    weights_FF = co_activation_weights([torch.randn(20, F).relu()])

    def inside(neurons_EM):
        return sum(weights_FF[n][:, n].sum().item() for n in neurons_EM)

    neurons_EM = cut_graph(weights_FF, E)
    labels_of(neurons_EM)
    assert inside(neurons_EM) > 1.2 * inside(random_partition(F, E))
    assert torch.equal(cut_graph(weights_FF, E), neurons_EM)
    assert torch.equal(cut_graph(weights_FF, 1), contiguous(F, 1))


def test_leveling_moves_the_neuron_that_loses_least():
    from sparsecraft.moe.init.graph import _level

    weights_FF = torch.rand(12, 12)
    weights_FF = (weights_FF + weights_FF.mT).fill_diagonal_(0)
    labels = [0] * 7 + [1] * 3 + [2] * 2
    slow = list(labels)
    for _ in range(3):
        load = [slow.count(e) for e in range(3)]
        moves = []
        for n, e in itertools.product(range(12), range(3)):
            if load[slow[n]] > 4 and load[e] < 4:
                kept = sum(weights_FF[n, j].item() for j in range(12) if slow[j] == slow[n])
                gained = sum(weights_FF[n, j].item() for j in range(12) if slow[j] == e)
                moves.append((kept - gained, n, e))
        _, n, e = min(moves)
        slow[n] = e
    assert _level(weights_FF, torch.tensor(labels), 3).tolist() == slow
    assert [slow.count(e) for e in range(3)] == [4, 4, 4]


def test_without_pymetis_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(ResourceError, match="pip install pymetis"):
        cut_graph(torch.ones(F, F), E)


# ------------------------------------------------------------------ CMoE
def cmoe_markers(hidden_TF, active):
    markers_TF = torch.zeros(hidden_TF.shape, dtype=torch.float64)
    for h_F, marker_F in zip(hidden_TF.abs().tolist(), markers_TF, strict=True):
        marker_F[sorted(range(len(h_F)), key=lambda n: -h_F[n])[:active]] = 1
    return markers_TF


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
def test_cmoe_is_its_loop(shared, released):
    """Shared by rate, an optimal assignment to the centers, representatives nearest to means."""
    optimize = pytest.importorskip("scipy.optimize")
    hidden_TF = planted_hidden(planted_labels(), 400)[:, :24] * torch.randn(400, 24)
    neurons_EM, representatives_R = activation_clusters(
        iter(hidden_TF.split(150)), 6, shared, active=5, released=released
    )
    labels_of(neurons_EM)
    markers_TF = cmoe_markers(hidden_TF, 5)
    assert torch.equal(activation_markers([hidden_TF], 5), markers_TF.bool())
    by_rate = sorted(range(24), key=lambda n: -markers_TF[:, n].sum().item())
    common, rest = by_rate[: 4 * shared], sorted(by_rate[4 * shared :])
    assert sorted(neurons_EM[:shared].flatten().tolist()) == sorted(common)

    def distance(n, center_T):
        return (markers_TF[:, n] - center_T).norm(p=1 if released else 2).item()

    groups = neurons_EM[shared:].tolist()
    means = [markers_TF[:, group].mean(1) for group in groups]
    nearest = [min(g, key=lambda n: distance(n, c)) for g, c in zip(groups, means, strict=True)]
    assert representatives_R.tolist() == nearest
    # The code stops after the first assignment; the paper where one changes nothing.
    centers = [markers_TF[:, n] for n in by_rate[4 * shared :][: 6 - shared]] if released else means
    places = torch.tensor([[distance(n, c) for c in centers] for n in rest]).repeat_interleave(4, 1)
    least = places[optimize.linear_sum_assignment(places.numpy())].sum().item()
    pairs = zip(groups, centers, strict=True)
    assert sum(distance(n, c) for g, c in pairs for n in g) == pytest.approx(least, rel=1e-3)


def test_distances_of_markers_are_the_norms():
    from sparsecraft.moe.init.activation import _distances

    markers_TN, means_TR = torch.rand(50, 9) > 0.5, torch.rand(50, 4)
    for power, l1 in ((1.0, True), (2.0, False)):
        slow_NR = torch.cdist(markers_TN.float().mT, means_TR.mT, p=power)
        assert torch.allclose(_distances(markers_TN, means_TR, l1), slow_NR, atol=1e-5)


def test_cmoe_recovers_planted_clusters_and_the_busiest_expert():
    labels_F = planted_labels()
    neurons_EM, representatives_R = activation_clusters([busy_hidden(labels_F)], E, 1, active=2 * M)
    assert same_clusters(neurons_EM, labels_F) and (labels_F[neurons_EM[0]] == 3).all()
    assert all(r in row for r, row in zip(representatives_R, neurons_EM[1:], strict=True))
