"""A feed-forward network whose neurons are split into experts: all of it, all of it under a mask,
or only the experts in use. `masked` is what `gather` and `grouped` equal.

    y_t = bias + sum_e w_te down_e^T (a_e(x_t) - mean_e)
    a_e = act(gate_e x) * (up_e x) when gated, else act(first_e x)

Shapes: T tokens, D features, E experts, H neurons of one expert, M rows of its first matrix: H, or
2H when gated, the gate's first; F = E*H;
P pairs of a token and an expert that it uses.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.device import needs_grad, usable
from sparsecraft.kernels.grouped import why_no_product
from sparsecraft.kernels.selection import LISTED_TOKENS, Active, active
from sparsecraft.kernels.split_triton import DTYPES, MAX_TOKENS, activation_code
from sparsecraft.kernels.split_triton import gather as gather_triton
from sparsecraft.kernels.split_weigh import weigh

# On CUDA up to here only what is in use is read; beyond, the union of the tokens' experts is
# nearly everything and the library's own products are faster (benchmarks/split/decode.md).
CUDA_GATHER_TOKENS = LISTED_TOKENS

# On CUDA up to here, the most that a grid takes, one kernel does all that lies between the two
# products of all experts.
WEIGH_TOKENS = 65535
# Up to here a router is worth a stream of its own beside the first product.
BESIDE_TOKENS = 64
# On a CPU `gather` wins up to these shares of pairs in use (two cores, 576 -> 1536 to 2048 -> 5632
# gated, in 32 and 128 experts): a call for each expert costs as much as its reading where it has
# fewer numbers than this in its first matrix.
CPU_GATHER_PAIRS, CPU_GATHER_PAIRS_OF_SMALL, CPU_SMALL = 0.6, 0.3, 2**17
# From here `grouped` computes the pairs in use alone: where experts are large enough for products
# of their own, for which tokens are copied once for each expert, and where enough is left out
# (benchmarks/split/prefill.md).
GROUPED_TOKENS, GROUPED_NEURONS, GROUPED_SHARE = 4096, 1024, 0.25
BAGS = 8  # of a token on a CPU: in one, its sum takes twice as long


@dataclass(frozen=True, slots=True)
class SplitNet:
    """The tensors of a split network, neuron by neuron.

    Attributes:
        first_EMD: an expert's H rows, or when gated its H gate rows and then its H up rows.
        down_EHD: an expert's columns of the dense down matrix, as rows.
        activation: elementwise.
        first_bias_EM: added before the activation.
        mean_EH: subtracted from the activation, so that an expert not in use counts as its mean.
        bias_D: added once per token, whatever is in use; with `mean_EH`, it holds the means'
            own output too. `every` takes the dense layer's bias instead.
    """

    first_EMD: Tensor
    down_EHD: Tensor
    activation: nn.Module
    first_bias_EM: Tensor | None = None
    mean_EH: Tensor | None = None
    bias_D: Tensor | None = None

    def __post_init__(self):
        E, H, D = self.down_EHD.shape
        rows = self.first_EMD.shape[1]
        wanted = {
            "first_EMD": (self.first_EMD, {(E, H, D), (E, 2 * H, D)}),
            "first_bias_EM": (self.first_bias_EM, {(E, rows)}),
            "mean_EH": (self.mean_EH, {(E, H)}),
            "bias_D": (self.bias_D, {(D,)}),
        }
        for name, (tensor, shapes) in wanted.items():
            if tensor is not None and tuple(tensor.shape) not in shapes:
                raise SparsecraftError(
                    f"{name} is {tuple(tensor.shape)}; beside a down_EHD of {(E, H, D)} it must "
                    f"be {' or '.join(map(str, sorted(shapes)))}."
                )
        for name in ("first_EMD", "down_EHD"):
            if not getattr(self, name).is_contiguous():
                raise SparsecraftError(f"{name} must be contiguous: call .contiguous() on it.")

    @property
    def E(self) -> int:
        return self.down_EHD.shape[0]

    @property
    def m(self) -> int:
        return self.down_EHD.shape[1]

    @property
    def D(self) -> int:
        return self.down_EHD.shape[2]

    @property
    def gated(self) -> bool:
        return self.first_EMD.shape[1] != self.down_EHD.shape[1]

    def tensors(self) -> list[Tensor]:
        own = (self.first_EMD, self.down_EHD, self.first_bias_EM, self.mean_EH, self.bias_D)
        return [t for t in (*own, *self.activation.parameters()) if t is not None]


def hidden(net: SplitNet, x_TD: Tensor) -> Tensor:
    """The activations of all neurons, (T, E, H)."""
    bias = None if net.first_bias_EM is None else net.first_bias_EM.flatten()
    first_TEM = F.linear(x_TD, net.first_EMD.flatten(0, 1), bias).unflatten(-1, (net.E, -1))
    return activate(net, first_TEM)


def activate(net: SplitNet, first_TEM: Tensor) -> Tensor:
    if not net.gated:
        return net.activation(first_TEM)
    gate_TEH, up_TEH = first_TEM.split(net.m, -1)
    return net.activation(gate_TEH) * up_TEH


def every(net: SplitNet, x_TD: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """The dense function: every expert, no weights and no means, and the dense layer's bias."""
    return F.linear(between(net, x_TD, None), net.down_EHD.flatten(0, 1).t(), bias_D)


def masked(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """Every expert computed, then weighed: nothing is saved. Differentiable."""
    return F.linear(between(net, x_TD, weights_TE), net.down_EHD.flatten(0, 1).t(), net.bias_D)


def masked_beside(net: SplitNet, x_TD: Tensor, route: Callable[[], Tensor]) -> Tensor:
    """`masked` by the weights that `route` computes on x_TD, which runs beside the first product,
    on a stream of its own: the router's small kernels leave most of the GPU idle.

    For a CUDA graph under capture, where `overlaps` and `weighs_at_once` allow it.
    """
    here = torch.cuda.current_stream(x_TD.device)
    beside = _second_stream(x_TD.device.index, threading.get_ident())
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        weights_TE = route()
    first_TN = F.linear(x_TD, net.first_EMD.flatten(0, 1))
    here.wait_stream(beside)
    hidden_TF = weigh(net, first_TN, weights_TE)
    return F.linear(hidden_TF, net.down_EHD.flatten(0, 1).t(), net.bias_D)


def overlaps(x_TD: Tensor) -> bool:
    """Whether `masked_beside` pays: launched one by one, kernels do not wait in line."""
    return (
        x_TD.is_cuda
        and CUDA_GATHER_TOKENS < len(x_TD) <= BESIDE_TOKENS
        and torch.cuda.is_current_stream_capturing()
        and not torch.is_grad_enabled()
    )


@functools.cache
def _second_stream(device: int, thread: int) -> torch.cuda.Stream:
    """Of each thread, as two graphs may be captured at once."""
    return torch.cuda.Stream(device)


def between(net: SplitNet, x_TD: Tensor, weights_TE: Tensor | None) -> Tensor:
    """What the second matrix reads, (T, F): activations less their means, times the weights;
    without weights, the activations."""
    if weighs_at_once(net, x_TD, weights_TE):
        first_TN = F.linear(x_TD, net.first_EMD.flatten(0, 1))
        return weigh(net, first_TN, weights_TE)
    hidden_TEH = hidden(net, x_TD)
    if weights_TE is not None:
        if net.mean_EH is not None:
            hidden_TEH = hidden_TEH - net.mean_EH
        hidden_TEH = hidden_TEH * weights_TE.to(hidden_TEH.dtype)[..., None]
    return hidden_TEH.flatten(1)


def weighs_at_once(net: SplitNet, x_TD: Tensor, weights_TE: Tensor | None = None) -> bool:
    """Whether one kernel computes what `between` does to the first product."""
    tensors = net.tensors() if weights_TE is None else [weights_TE, *net.tensors()]
    return (
        0 < len(x_TD) <= WEIGH_TOKENS
        and usable(x_TD)
        and activation_code(net.activation) is not None
        and all(t.dtype == x_TD.dtype for t in (net.first_EMD, net.down_EHD))
        and not torch.is_autocast_enabled(x_TD.device.type)
        and not needs_grad(x_TD, *tensors)
    )


def choose(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> str:
    """'gather' where it was measured to be faster than 'masked' and can run, else 'masked'.

    On CUDA the weights' values are looked at for many tokens alone, and not under capture.
    """
    if torch.compiler.is_compiling() or not len(x_TD):
        return "masked"
    if len(x_TD) >= GROUPED_TOKENS and net.m >= GROUPED_NEURONS:
        if why_not_grouped(net, x_TD, weights_TE):
            return "masked"
        few = torch.count_nonzero(weights_TE).item() <= GROUPED_SHARE * weights_TE.numel()
        return "grouped" if few else "masked"
    if len(x_TD) > MAX_TOKENS:
        return "masked"
    if why_not_gather(net, x_TD, weights_TE):
        return "masked"
    if x_TD.is_cuda:
        return "gather" if len(x_TD) <= CUDA_GATHER_TOKENS else "masked"
    small = net.first_EMD[0].numel() < CPU_SMALL
    most = CPU_GATHER_PAIRS_OF_SMALL if small else CPU_GATHER_PAIRS
    return "gather" if torch.count_nonzero(weights_TE).item() <= most * net.E else "masked"


def why_not_gather(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> str | None:
    """The reason why `gather` cannot run, or None."""
    if reason := _why_not_pairs(net, x_TD, weights_TE):
        return reason
    if not (x_TD.is_cuda or usable(x_TD)):
        return None
    if not usable(x_TD) or x_TD.dtype not in DTYPES:
        return f"there are no kernels for {x_TD.dtype} on {x_TD.device} here"
    if activation_code(net.activation) is None:
        return f"the kernels have no {type(net.activation).__name__}"
    if len(x_TD) > MAX_TOKENS:
        return f"{len(x_TD)} tokens are more than {MAX_TOKENS}"
    return None


def gather(net: SplitNet, x_TD: Tensor, weights_TE: Tensor, used: Active | None = None) -> Tensor:
    """Only the experts that some token uses are read; equals `masked`, without gradients.

    On CUDA nothing waits for the device, and a graph may be captured.

    Args:
        used: from `selection.select`; made here where it is None.

    Raises:
        SparsecraftError: a gradient is asked for, or the kernels cannot run.
    """
    if reason := why_not_gather(net, x_TD, weights_TE):
        raise SparsecraftError(f"gather cannot run: {reason}. Use masked.")
    if not len(x_TD):
        return torch.zeros_like(x_TD)
    if usable(x_TD):
        used = active(weights_TE) if used is None else used
        return gather_triton(net, x_TD, weights_TE.float(), used)
    return gather_torch(net, x_TD, weights_TE)


def why_not_grouped(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> str | None:
    """The reason why `grouped` cannot run, or None."""
    if reason := _why_not_pairs(net, x_TD, weights_TE):
        return reason
    if x_TD.is_cuda and torch.cuda.is_current_stream_capturing():
        return "the number of pairs is read from the device, which a CUDA graph cannot do"
    return why_no_product(x_TD, (*net.first_EMD.shape[1:], *net.down_EHD.shape[1:]))


def grouped(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """Only the pairs of a token and an expert in use, sorted by expert, in two grouped GEMMs;
    equals `masked`, without gradients. The number of pairs is read from the device.

    Raises:
        SparsecraftError: it cannot run.
    """
    if reason := why_not_grouped(net, x_TD, weights_TE):
        raise SparsecraftError(f"grouped cannot run: {reason}. Use masked.")
    used_TE = weights_TE != 0
    token_P, expert_P = used_TE.nonzero(as_tuple=True)
    order_P = expert_P.argsort(stable=True)
    expert_P, ends_E = expert_P[order_P], used_TE.sum(0).cumsum(0, dtype=torch.int32)
    token_P = token_P[order_P]
    first_PM = F.grouped_mm(x_TD[token_P], net.first_EMD.transpose(1, 2), offs=ends_E)
    hidden_PH = _hidden_of_pairs(net, first_PM, weights_TE, token_P, expert_P)
    part_PD = F.grouped_mm(hidden_PH, net.down_EHD, offs=ends_E)
    # Back in the order of tokens, so that each sums its own in one order, the same every time.
    part_PD = torch.empty_like(part_PD).index_copy_(0, order_P, part_PD)
    y_TD = torch.segment_reduce(part_PD.float(), "sum", lengths=used_TE.sum(1), unsafe=True)
    y_TD = y_TD.to(x_TD.dtype)
    return y_TD if net.bias_D is None else y_TD + net.bias_D


def _why_not_pairs(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> str | None:
    """The reason why no path that computes only the pairs in use can run, or None."""
    if needs_grad(x_TD, weights_TE, *net.tensors()):
        return "it has no gradient"
    if torch.is_autocast_enabled(x_TD.device.type):
        return "autocast is on"
    if any(t.dtype != x_TD.dtype for t in (net.first_EMD, net.down_EHD)):
        return f"the tokens are {x_TD.dtype} and the weights {net.first_EMD.dtype}"
    return None


def _hidden_of_pairs(
    net: SplitNet, first_PM: Tensor, weights_TE: Tensor, token_P: Tensor, expert_P: Tensor
) -> Tensor:
    """What the second product reads, from the first product, which is written to."""
    if net.first_bias_EM is not None:
        first_PM += net.first_bias_EM[expert_P]
    hidden_PH = activate(net, first_PM)
    if net.mean_EH is not None:
        hidden_PH = hidden_PH - net.mean_EH[expert_P]
    return hidden_PH * weights_TE[token_P, expert_P, None].to(hidden_PH.dtype)


# ------------------------------------------------------------------ gather on a CPU
def gather_torch(net: SplitNet, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """`gather` without a copy of any weight.

    Shapes: P pairs of a token and an expert, ordered by token; B sums of some of a token's pairs.
    """
    token_P, expert_P = weights_TE.nonzero(as_tuple=True)
    y_TD = torch.zeros_like(x_TD)
    if len(token_P):
        tokens, experts = token_P.tolist(), expert_P.tolist()
        first = [
            torch.mv(net.first_EMD[e : e + n].flatten(0, 1), x_TD[t])
            for t, e, n in _runs(tokens, experts)
        ]
        first_PM = torch.cat(first).view(len(tokens), -1)
        hidden_PH = _hidden_of_pairs(net, first_PM, weights_TE, token_P, expert_P)
        row_PH = expert_P[:, None] * net.m + torch.arange(net.m)
        # Weighted sums of rows: products with a matrix of which most rows are left out.
        starts, owners = _bags(tokens)
        y_BD = F.embedding_bag(
            row_PH.flatten(), net.down_EHD.flatten(0, 1), torch.tensor(starts) * net.m,
            mode="sum", per_sample_weights=hidden_PH.flatten(),
        )  # fmt: skip
        y_TD.index_add_(0, torch.tensor(owners), y_BD)
    return y_TD if net.bias_D is None else y_TD + net.bias_D


def _bags(tokens: list[int]) -> tuple[list[int], list[int]]:
    """Where sums of pairs in order begin, and the token of each: some for each token, because
    cores share them."""
    starts, owners, first = [], [], 0
    bags = max(BAGS, torch.get_num_threads())
    for token, pairs in itertools.groupby(tokens):
        number = sum(1 for _ in pairs)
        starts += range(first, first + number, -(-number // bags))
        owners += [token] * (len(starts) - len(owners))
        first += number
    return starts, owners


def _runs(tokens: list[int], experts: list[int]) -> list[tuple[int, int, int]]:
    """(token, first expert, how many neighbors) of pairs in order."""
    runs: list[tuple[int, int, int]] = []
    for t, e in zip(tokens, experts, strict=True):
        if runs and runs[-1][0] == t and e == runs[-1][1] + runs[-1][2]:
            runs[-1] = (t, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((t, e, 1))
    return runs
