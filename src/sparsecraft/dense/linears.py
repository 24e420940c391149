"""Every Linear of a model: what it belongs to, and where experts can stand beside it.

`linear` means every Linear and Conv1D of the transformer blocks, whatever is in them (attentions,
feed-forward networks, Mamba and linear-attention mixers, shared experts), and of attentions and
known feed-forward networks outside of them. Not meant are embeddings, projectors between towers and
heads; left out, and listed, are routers and experts of the model's own mixtures, Linears whose
weights are read without calling them, and those that compute something else than these say. PEFT's
"all-linear" is wider by the projectors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.bypass import bypassed
from sparsecraft.dense.forms import has
from sparsecraft.dense.mixtures import inside, mixtures, routers
from sparsecraft.dense.plain import is_plain_linear

Nature = Literal["attention", "ffn", "other", "outside"]

# What leaves a Linear out of every site; see `Placed.why_not`.
ROUTER = "routers of the model's own mixtures of experts"
EXPERTS = "experts of the model's own mixtures of experts"
BYPASSED = "modules whose weights are read without calling them"
NOT_PLAIN = "Linears that compute something else than their weight and bias say"

# Names of queries, keys and values by which an attention is known whose class does not say it.
QUERIES = ("q_proj", "query", "query_proj", "q_lin", "linear_q", "q", "qkv", "query_key_value")
# Classes of feed-forward networks, and names of their Linears where a block holds them itself.
NETWORK = re.compile(
    r"mlp|feed_?forward|ffn|layerff|glu|act_?dense|intermediate$|output$|expert", re.IGNORECASE
)
NETWORK_PARTS = re.compile(
    r"(fc|lin|linear|w)_?\d|(ffn|intermediate|output)\w*|dense_h_to_4h|dense_4h_to_h"
    r"|(gate|up|down|gate_up)_proj|c_fc"
)


@dataclass(frozen=True, slots=True)
class Placed:
    """One Linear.

    Attributes:
        nature: what it is a part of: an attention, a feed-forward network, something else in a
            block (a mixer, for one), or nothing of a block.
        part: path of that attention, network or other module.
        why_not: why no experts may stand at it; None where they may.
    """

    path: str
    nature: Nature
    part: str
    why_not: str | None = None

    def at(self, kind: str) -> bool:
        """Whether it is a site of this kind, `linear`, `attention_linear` or `ffn_linear`."""
        wanted = {"attention_linear": ("attention",), "ffn_linear": ("ffn",)}
        natures = wanted.get(kind, ("attention", "ffn", "other"))
        return self.why_not is None and self.nature in natures


def linears(model: nn.Module, networks: Collection[str]) -> list[Placed]:
    """Every Linear and Conv1D of a model, in its order.

    Args:
        networks: paths of the members of its feed-forward networks of a known form.
    """
    modules = dict(model.named_modules())
    within, own = blocks(modules), mixtures(model)
    choosing, experts, skipped = routers(model, own), [m.path for m in own], bypassed(model)
    found = []
    for path, module in modules.items():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        nature, part = _nature(path, modules, within, networks)
        why_not = None
        if inside(path, experts):
            nature, why_not = "ffn", EXPERTS
        elif inside(path, tuple(choosing)):
            why_not = ROUTER
        elif path in skipped:
            why_not = BYPASSED
        elif nature != "outside" and not is_plain_linear(module):
            why_not = NOT_PLAIN
        found.append(Placed(path, nature, part, why_not))
    return found


def blocks(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the innermost transformer blocks: what transformers checkpoints as one, and
    elsewhere items of a list that hold an attention."""
    found = [p for p, m in modules.items() if isinstance(m, GradientCheckpointingLayer)]
    for path, module in modules.items():
        listed = isinstance(modules.get(path.rpartition(".")[0]), nn.ModuleList)
        attends = any("Attention" in type(child).__name__ for child in module.children())
        if listed and attends and not inside(path, found):
            found.append(path)
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def _nature(
    path: str, modules: dict[str, nn.Module], blocks: list[str], networks: Collection[str]
) -> tuple[Nature, str]:
    block = next((b for b in blocks if path.startswith(f"{b}.")), None)
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    if block is not None:
        above = [owner for owner in above if owner.startswith(f"{block}.")]
    else:  # what holds whole blocks is none of their parts
        above = [o for o in above if not any(b.startswith(f"{o}.") for b in blocks)]
    member = next((m for m in networks if inside(path, (m,))), None)
    if member is not None:
        return "ffn", member
    for owner in above:
        if _is_attention(modules[owner]):
            below = [o for o in above if o.startswith(f"{owner}.")]
            inner = [o for o in below if "MLP" in type(modules[o]).__name__]
            return ("ffn", inner[0]) if inner else ("attention", owner)
    if block is None:
        return "outside", above[0] if above else path
    for owner in above:
        if NETWORK.search(type(modules[owner]).__name__):
            return "ffn", owner
    if not above and NETWORK_PARTS.fullmatch(parts[-1]):
        return "ffn", path
    return "other", above[0] if above else path


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ or any(has(module, name) for name in QUERIES)
