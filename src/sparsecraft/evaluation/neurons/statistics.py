"""Activations of every neuron over data, summed in one pass.

A neuron's activation is what enters the down projection, behind the product with the gate. Shapes:
T tokens, F neurons of a layer, N neurons of all layers, D domains, R documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecraft.dense.donors import FFN, view
from sparsecraft.dense.sites import find_sites
from sparsecraft.errors import SparsecraftError

MOMENTS = ("absolute", "active", "root", "mean", "square")


@dataclass(frozen=True)
class Neurons:
    """The networks of a model, in order.

    Attributes:
        networks: path -> network.
    """

    networks: dict[str, FFN]

    @property
    def widths(self) -> list[int]:
        return [network.hidden_width for network in self.networks.values()]

    @property
    def layer_N(self) -> Tensor:
        """The number of each neuron's layer."""
        widths = torch.tensor(self.widths)
        return torch.repeat_interleave(torch.arange(len(widths)), widths)


def neurons_of(model: nn.Module) -> Neurons:
    """The feed-forward networks of a model whose neurons can be looked at.

    Raises:
        SparsecraftError: there is none.
    """
    sites = [site for site in find_sites(model, "ffn") if site.refused is None]
    found = {site.path: view(model, site) for site in sites}
    if not found:
        raise SparsecraftError(
            f"{type(model).__name__} has no dense feed-forward network whose neurons could be "
            "looked at; pass the model as it was before it was converted."
        )
    return Neurons(found)


@dataclass
class Statistics:
    """Means over the tokens of each domain.

    Attributes:
        tokens_D: how many there are, as the first network reads them; a network that reads others
            (patches that were merged) has means over its own.
        means: of |a|, of a > 0, of the root of |a|, of a and of its square -> (D, N) float64.
        documents_RN: each document's mean |a|, float32.
        domain_R: the domain of each document.
        reference: the number of the domain that all others are compared with; None: each is
            compared with all others.
    """

    tokens_D: Tensor
    means: dict[str, Tensor]
    documents_RN: Tensor
    domain_R: Tensor
    reference: int | None = None

    @property
    def compared(self) -> range:
        """The domains that have neurons; a reference is the last and has none."""
        return range(len(self.tokens_D) - (self.reference is not None))

    @property
    def std_DN(self) -> Tensor:
        """Standard deviation of the activation. (The paper's code keeps its square under this
        name.)"""
        return (self.means["square"] - self.means["mean"] ** 2).clamp_min(0).sqrt()


def statistics_of(
    model: nn.Module,
    neurons: Neurons,
    sources: Mapping[str, Sequence[dict[str, Tensor]]],
    run: Callable[[nn.Module, dict[str, Tensor]], object],
) -> Statistics:
    """One pass over the batches of each domain.

    Args:
        run: passes a batch through the model. Tokens that `token_mask` leaves out do not count.
    """
    D, N = len(sources), sum(neurons.widths)
    sums = {moment: torch.zeros(D, N, dtype=torch.float64) for moment in MOMENTS}
    tokens_DN, rows, domains = torch.zeros(D, N, dtype=torch.float64), [], []
    for domain, batches in enumerate(sources.values()):
        for batch in batches:
            given = dict(batch)
            mask, number = given.pop("token_mask", None), len(next(iter(batch.values())))
            with _activations(model, neurons) as found, torch.no_grad():
                run(model, given)
            start = 0
            documents_BN = torch.zeros(number, N)
            for path, width in zip(neurons.networks, neurons.widths, strict=True):
                a_BSF = found[path].reshape(number, -1, width).float()
                real_BS = torch.ones(a_BSF.shape[:2]) if mask is None else mask
                real_BS1 = real_BS.to(a_BSF.device, torch.bool)[..., None]
                at = slice(start, start + width)
                documents_BN[:, at] = _add(sums, domain, at, a_BSF, real_BS1)
                tokens_DN[domain, at] += real_BS.sum()
                start += width
            rows.append(documents_BN)
            domains += [domain] * number
    means = {moment: total / tokens_DN.clamp_min(1) for moment, total in sums.items()}
    return Statistics(tokens_DN[:, 0], means, torch.cat(rows), torch.tensor(domains))


def _add(
    sums: dict[str, Tensor], domain: int, at: slice, a_BSF: Tensor, real_BS1: Tensor
) -> Tensor:
    """Add a layer's activations; the mean |a| of each document, (B, F)."""
    a_BSF = a_BSF * real_BS1
    size_BSF = a_BSF.abs()
    found = {
        "absolute": size_BSF, "active": (a_BSF > 0).float(), "root": size_BSF.sqrt(),
        "mean": a_BSF, "square": a_BSF**2,
    }  # fmt: skip
    for moment, values_BSF in found.items():
        sums[moment][domain, at] += values_BSF.sum((0, 1)).double().cpu()
    return (size_BSF.sum(1) / real_BS1.sum(1).clamp_min(1)).cpu()


@contextmanager
def _activations(model: nn.Module, neurons: Neurons) -> Iterator[dict[str, Tensor]]:
    """Path of a network -> what enters its down projection in the latest pass."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable:
        return lambda module, args: found.__setitem__(path, args[0].detach())

    handles = [
        network.down.module.register_forward_pre_hook(keep(path))
        for path, network in neurons.networks.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
