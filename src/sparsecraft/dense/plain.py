"""Whether a Linear is one: its weight and bias say all that it computes.

What stands beside a Linear is merged into its weight, and copies of a network are made of weights.
A subclass with a forward of its own, a forward set on the module, a hook that changes what it gives
and a weight that is computed from others are looked at one by one: the module's own code runs on a
twin (`sparsecraft.dense.twins`), and must give what its weight and bias give.
"""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.difference import TOLERANCE, difference, random_tokens
from sparsecraft.dense.forms import features
from sparsecraft.dense.once import once
from sparsecraft.dense.twins import Sizes, is_hooked, twin

# Where the code stands that is known: torch's and transformers' own, and that of packed weights.
KNOWN = {"torch.nn.modules.linear", "transformers.pytorch_utils", "bitsandbytes.nn.modules"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a Linear or Conv1D gives x W^T + b and nothing else."""
    if "weight" not in module._parameters:  # it is computed from others
        return False
    hooked = any(getattr(module, name) for name in HOOKS)
    if _is_known(module) and not hooked:
        return True
    return once(("plain", id(module)), lambda: _is_proven(module))


def _is_known(module: nn.Module) -> bool:
    own = "forward" in vars(module) and not is_hooked(module)
    return type(module).forward.__module__ in KNOWN and not own


def _is_proven(module: nn.Module) -> bool:
    width, height = features(module)
    # A size that the code has somewhere else lets it fail on a small twin only.
    for sizes in ({width: 8, height: 12}, {}):
        with suppress(Exception):  # of whatever code the module has
            return _error(module, sizes) <= TOLERANCE
    return False


def _error(module: nn.Module, sizes: Sizes) -> float:
    found = twin(module, sizes)
    if type(found) is not type(module) and not _is_known(module):  # of packed weights
        return float("inf")
    vars(found).update({name: getattr(module, name) for name in HOOKS})
    weight = found.weight.t() if isinstance(module, Conv1D) else found.weight

    def dense(training: bool, x: Tensor) -> Tensor:
        return found.train(training)(x)

    def said(training: bool, x: Tensor) -> Tensor:
        return F.linear(x, weight, found.bias)

    tokens = random_tokens(features(found)[0])
    return max(difference(dense, said, tokens, training) for training in (False, True))
