"""A method that sparsecraft does not know: a kind of experts, a scorer, a start and a recipe.

All of it stands here, and takes part by the three lines at the end; `test_cost.py` uses it.

Shapes: T tokens, E experts, D width, O outputs, F hidden neurons, R width of the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from sparsecraft.moe.experts import build as experts
from sparsecraft.moe.experts.base import CopiedExperts
from sparsecraft.moe.experts.stacked import with_one_more, without
from sparsecraft.moe.routers import build as routers
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe import Edit, Recipe, RouterSpec, Stage
from sparsecraft.recipe.experts import ExpertsSpec, stands
from sparsecraft.recipe.scorers import ScorerSpec, Start
from sparsecraft.recipe.selections import TopK


@dataclass(frozen=True, kw_only=True, slots=True)
class ToySpec(ExpertsSpec):
    """Copies of a gated network whose last matrix is stored transposed."""

    places = stands(replace=("ffn",))
    comes_from = "network"
    dense_weights = True
    needs_memory = None

    kind: Literal["toy"] = "toy"
    num_experts: int = 3


class ToyExperts(CopiedExperts):
    """silu(x G_e^T) * (x U_e^T) D_e."""

    def __init__(self, spec: ToySpec, donor, device):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, donor.out_features
        self.activation = donor.activation
        for name, tensor in self._of(donor).items():
            stacked = tensor.detach().to(device).expand(spec.num_experts, *tensor.shape).clone()
            setattr(self, name, nn.Parameter(stacked))

    @staticmethod
    def _of(donor) -> dict[str, torch.Tensor]:
        last = donor.down.weight().t().contiguous()
        return {"opening": donor.gate.weight(), "raising": donor.up.weight(), "closing": last}

    @classmethod
    def build(cls, spec, donor, site, place, *, device, dtype):
        return cls(spec, donor, device)

    def expert(self, e, x):
        hidden = self.activation(F.linear(x, self.opening[e])) * F.linear(x, self.raising[e])
        return hidden @ self.closing[e]

    @torch.no_grad()
    def put(self, e, donor) -> None:
        for name, tensor in self._of(donor).items():
            getattr(self, name)[e].copy_(tensor)

    def append(self, donor) -> None:
        for name, tensor in self._of(donor).items():
            setattr(self, name, with_one_more(getattr(self, name), tensor))
        self.num_experts += 1

    def remove(self, e) -> None:
        for name in ("opening", "raising", "closing"):
            setattr(self, name, without(getattr(self, name), e))
        self.num_experts -= 1


@dataclass(frozen=True, slots=True)
class Staircase(Start):
    """Row r is r / rows everywhere."""

    kind: Literal["staircase"] = "staircase"


def staircase(start: Staircase, weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_((torch.arange(len(weight)) / len(weight))[:, None].expand_as(weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(ScorerSpec):
    """Experts are scored by how near their outputs are to the token, both projected."""

    kind: Literal["compared"] = "compared"
    start: Start = Staircase()
    width: int = 4
    reads_experts = True


class ComparedScorer(Scorer):
    """logits_TE = (A x) . (B y_e)."""

    def __init__(self, spec: Compared, width: int, num_experts: int, *, outputs, device, dtype):
        super().__init__()
        self.width = width
        where = {"device": device, "dtype": dtype}
        of_token, of_output = (torch.empty(spec.width, n, **where) for n in (width, outputs))
        for weight in (of_token, of_output):
            if not weight.is_meta:
                draw(spec.start, weight)
        self.of_token, self.of_output = nn.Parameter(of_token), nn.Parameter(of_output)

    def remove(self, e) -> None:
        """Nothing of it is of one expert."""

    def forward(self, x_TD, y_TEO):
        token_TR = F.linear(x_TD.float(), self.of_token.float())
        output_TER = F.linear(y_TEO.float(), self.of_output.float())
        return torch.einsum("tr,ter->te", token_TR, output_TER)


def toy(num_experts: int = 3, top_k: int = 2) -> Recipe:
    """The recipe."""
    return Recipe(
        name="toy",
        title="Experts that are compared with their tokens",
        paper="none",
        exact_at_start=True,
        edits=(
            Edit(
                site="ffn",
                experts=ToySpec(num_experts=num_experts),
                router=RouterSpec(scorer=Compared(), select=TopK(top_k), reads="experts"),
            ),
        ),
        stages=(Stage(losses={"switch": 0.01}, learning_rate=1e-3),),
    )


experts.register(ToySpec, ToyExperts)
routers.register(Staircase, staircase)
routers.register(Compared, ComparedScorer)
