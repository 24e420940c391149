"""Mixtures of classifiers that are no transformers: the paper's equations, conditional computation,
what trains, and what is refused. B samples, E experts, H hidden, D gate's width, C classes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.moe.classifiers import ATTENTIVE, ORIGINAL, MixtureOfClassifiers
from sparsecraft.recipe import (
    Attentive,
    Bias,
    Linear,
    ReLU,
    RouterSpec,
    Sequence,
    Slots,
    Soft,
    TopK,
)
from tests.reference import specialization as plain

B, E, H, D, C = 12, 3, 6, 5, 4


class Expert(nn.Module):
    def __init__(self, hidden: int = H, classes: int = C):
        super().__init__()
        self.body, self.head = nn.Linear(8, hidden), nn.Linear(hidden, classes)
        self.dropout, self.calls = nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += len(x)
        hidden = self.dropout(self.body(x.flatten(1)).tanh())
        return hidden, self.head(hidden)


class Flat(Expert):
    def forward(self, x):
        hidden, logits = super().forward(x)
        return hidden, logits[..., None]


def mixture(gate: RouterSpec = ORIGINAL, **options) -> MixtureOfClassifiers:
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(8, D), nn.Tanh())
    experts = options.pop("experts", None) or [Expert() for _ in range(E)]
    return MixtureOfClassifiers(experts, trunk, torch.randn(2, 2, 4), gate, **options).eval()


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, 2, 4), torch.randint(0, C, (B,))


@pytest.mark.parametrize("kind", ["paper", "released"])
@pytest.mark.parametrize("gate", [ORIGINAL, ATTENTIVE], ids=["original", "attentive"])
def test_a_mixture_equals_the_papers_loop(gate, kind):
    model, (x, y) = mixture(gate, mixture=kind), drawn()
    with torch.no_grad():
        found = model(x, y)
    scorer, total = model.router.scorer, 0.0
    for b in range(B):
        given = [expert(x[b : b + 1]) for expert in model.experts]
        token = model.trunk(x[b : b + 1])[0].tolist()
        if gate is ATTENTIVE:
            hidden = [h[0].tolist() for h, _ in given]
            scores = plain.attention(token, hidden, scorer.query.tolist(), scorer.key.tolist())
        else:
            rows = scorer.weight.tolist()
            scores = [sum(a * c for a, c in zip(row, token, strict=True)) for row in rows]
        p = plain.probabilities(scores)
        each = [plain.probabilities(logits[0].tolist()) for _, logits in given]
        mixed = [sum(p[e] * each[e][c] for e in range(E)) for c in range(C)]
        mixed = plain.probabilities(mixed) if kind == "released" else mixed
        wanted = [math.log(value) for value in mixed]
        assert found.log_probs_BC[b].tolist() == pytest.approx(wanted, rel=1e-4)
        total -= wanted[y[b]] / B
    assert found.loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("gate", [ORIGINAL, ATTENTIVE], ids=["original", "attentive"])
def test_losses_count_in_training_alone_and_compare_samples_as_they_came(gate):
    losses = {"importance": 0.5, "sample_similarity": 2.0, "sample_dissimilarity": 0.25}
    model, (x, y) = mixture(gate, losses=losses), drawn()
    for expert in model.experts:
        expert.dropout.p = 0.0
    quiet = model(x, y).loss
    found = model.train()(x, y)
    logits = found.routing.logits_TE.tolist()
    same, different = plain.similarity_sums(logits, x.flatten(1).tolist())
    wanted = 0.5 * plain.importance(logits) + (2.0 * same - 0.25 * different) / (B**2 - B)
    assert found.loss.item() - quiet.item() == pytest.approx(wanted, rel=1e-4)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_distilled_it_runs_no_expert_that_a_sample_does_not_choose():
    model, (x, _) = mixture(ATTENTIVE), drawn()
    student = model.distilled()
    whole = student(x)
    for k in (1, 2, E):
        student.choose(k)
        for expert in student.experts:
            expert.calls = 0
        with torch.no_grad():
            found = student(x)
        chosen = found.routing.indices_TK
        assert chosen.shape == (B, k)
        counts = torch.bincount(chosen.flatten(), minlength=E)
        assert [expert.calls for expert in student.experts] == counts.tolist()
        for b in range(B):
            given = [student.experts[e](x[b : b + 1])[1].softmax(-1) for e in chosen[b]]
            weights = found.routing.logits_TE[b, chosen[b]].softmax(-1)
            mixed = sum(w * p for w, p in zip(weights, given, strict=True))
            assert torch.allclose(found.log_probs_BC[b], mixed.log()[0], atol=1e-5)
    assert torch.allclose(found.log_probs_BC, whole.log_probs_BC, atol=1e-5)  # k = E


def test_an_expert_that_nobody_chooses_is_not_called():
    model = mixture(RouterSpec(select=TopK(1)))
    model.router.scorer.weight.data.zero_()
    model.trunk[1].weight.data.zero_()
    model.trunk[1].bias.data.fill_(1.0)
    model.router.scorer.weight.data[2] = 1.0
    for e in (0, 1):
        model.experts[e].forward = None  # a call would fail
    assert model(drawn()[0]).log_probs_BC.shape == (B, C)


@pytest.mark.parametrize("trunk", [False, True])
def test_distilled_the_new_gate_alone_trains(trunk):
    model, (x, y) = mixture(ATTENTIVE, losses={"importance": 1.0}).train(), drawn()
    before = copy.deepcopy(model.state_dict())
    student = model.distilled(trunk=trunk)
    assert student.losses == {} and student.training and not student.experts.training
    trains = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert trains == ({"router", "trunk"} if trunk else {"router"})
    own = {name: p.clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.05)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = student(x, y).loss
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0]
    moved = {n.split(".")[0] for n, p in student.named_parameters() if not torch.equal(p, own[n])}
    assert moved == trains
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert student.eval().train().experts.training is False


def test_it_is_saved_and_read_as_any_module(tmp_path):
    model, (x, _) = mixture(ATTENTIVE), drawn()
    torch.save(model.state_dict(), tmp_path / "mixture.pt")
    again = mixture(ATTENTIVE)
    again.load_state_dict(torch.load(tmp_path / "mixture.pt"))
    assert torch.equal(again(x).log_probs_BC, model(x).log_probs_BC)


WRONG = torch.zeros(B, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mixture().train()(drawn()[0]), "in training and was given no labels"),
        (lambda: mixture()(drawn()[0], WRONG[:3]), r"labels is torch.int64 of shape \(3,\) for 12"),
        (lambda: mixture()(drawn()[0], WRONG.float()), "labels is torch.float32"),
        (lambda: mixture()(drawn()[0], WRONG + C), "there are classes 0 to 3"),
        (lambda: mixture()(torch.zeros(0, 8)), "There are no samples"),
        (
            lambda: mixture(ATTENTIVE, experts=[Expert(), Expert(hidden=7)]),
            "hidden layers differ in width",
        ),
        (
            lambda: mixture(experts=[Expert(), Expert(classes=3)]),
            "Expert 1 knows 3 classes and expert 0 4",
        ),
        (
            lambda: mixture(experts=[nn.Flatten()]),
            "it should give its last hidden layer and its logits",
        ),
        (lambda: mixture(experts=[Flat()]), r"logits \(2, 4, 1\) for 2 samples"),
        (
            lambda: MixtureOfClassifiers([Expert()], nn.Identity(), torch.randn(2, 2, 4)),
            r"trunk gives \(2, 2, 4\) for 2 samples",
        ),
        (lambda: MixtureOfClassifiers([], nn.Flatten(), torch.randn(2, 8)), "There are no experts"),
        (lambda: MixtureOfClassifiers([Expert()], nn.Flatten(), torch.zeros(0, 8)), "no samples"),
        (lambda: mixture(mixture="sum"), "must be 'paper' or 'released'"),
        (lambda: mixture(losses={"import": 1.0}), "Did you mean 'importance'"),
        (lambda: mixture(RouterSpec(select=TopK(4))), "top_k is 4 with num_experts=3"),
        (lambda: mixture(RouterSpec(select=Slots())), "mixes no samples"),
        (lambda: mixture(RouterSpec(select=ReLU())), "leave these options out"),
        (lambda: mixture(RouterSpec(select=TopK(2, balance=Bias()))), "leave these options out"),
        (lambda: mixture(RouterSpec(decides=Sequence(), select=Soft())), "by 'sequence'"),
        (lambda: mixture(ATTENTIVE).choose(1), "use distilled"),
        (lambda: mixture().choose(4), "top_k is 4 with num_experts=3"),
        (
            lambda: mixture(ATTENTIVE).distilled(RouterSpec(scorer=Attentive(), reads="experts")),
            "give a linear scorer",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call, words):
    with pytest.raises(SparsecraftError, match=words) as refused:
        call()
    assert issubclass(RecipeError, SparsecraftError) and str(refused.value).count("\n") == 0


def test_hidden_layers_of_any_width_do_where_nobody_reads_them():
    experts = [Expert(), Expert(hidden=9)]
    model = mixture(RouterSpec(scorer=Linear(), select=Soft()), experts=experts)
    assert (model.width, model.hidden, model.classes) == (D, None, C)
    total_B = model(drawn()[0]).log_probs_BC.exp().sum(-1)
    assert torch.allclose(total_B, torch.ones(B), atol=1e-5)


def test_a_refused_mixture_leaves_its_networks_as_they_were():
    x, _ = drawn()
    experts, trunk = [Expert().train(), nn.Flatten()], nn.Flatten()
    with pytest.raises(SparsecraftError, match="last hidden layer"):
        MixtureOfClassifiers(experts, trunk, x)
    assert all(part.training for part in (*experts[0].modules(), experts[1], trunk))


@pytest.mark.parametrize("value", [-5, math.nan, math.inf, "one"])
def test_coefficients_are_numbers_from_zero(value):
    with pytest.raises(RecipeError, match="importance"):
        mixture(losses={"importance": value})


def test_chosen_experts_run_in_float64_too():
    x, _ = drawn()
    model = mixture().double().eval()
    whole = model(x.double()).log_probs_BC
    model.choose(len(model.experts))
    assert torch.allclose(model(x.double()).log_probs_BC.double(), whole.double(), atol=1e-6)
