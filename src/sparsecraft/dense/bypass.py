"""Modules whose weights are read without calling them: what stands beside such a one does nothing.

A fused kernel, or `nn.MultiheadAttention`, takes `self.out_proj.weight` and never calls `out_proj`.
That a module is called on this machine proves nothing: Mamba does so on the CPU, and not where its
CUDA kernels are. So the source of each module's class is read, and every weight or bias of another
module that it takes counts, unless only dtype, device or shape are asked for.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from sparsecraft.dense.forms import has, join

ASKED_ONLY = {"dtype", "device", "shape", "is_meta"}
LIBRARY = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}
# Methods that no forward pass runs.
AT_THE_START = {"__init__", "_init_weights", "reset_parameters", "tie_weights"}
# Class and module -> why its weight is taken in code that does not run.
UNREACHED = {
    ("DisentangledSelfAttention", "in_proj"): lambda module: True,  # of z_steps > 1, which no
    # config can ask for
    ("BloomAttention", "dense"): lambda module: not _in_slices(module),
    ("BloomMLP", "dense_4h_to_h"): lambda module: not _in_slices(module),
}


def bypassed(model: nn.Module) -> set[str]:
    """Paths of the modules whose weights others read past their forward pass."""
    return {
        join(path, part)
        for path, module in model.named_modules()
        for part in _read_by(type(module))
        if has(module, part) and not _unreached(module, part)
    }


def _unreached(module: nn.Module, part: str) -> bool:
    rule = UNREACHED.get((type(module).__name__, part))
    return rule is not None and rule(module)


def _in_slices(module: nn.Module) -> bool:
    return module.pretraining_tp > 1 and module.slow_but_exact


@functools.cache
def _read_by(cls: type) -> frozenset[str]:
    """Paths below a module of this class whose weight or bias its code takes."""
    found = set()
    for base in cls.__mro__:
        if base in LIBRARY:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time: there is no source
            continue
        for method in tree.body[0].body:
            if isinstance(method, ast.FunctionDef) and method.name not in AT_THE_START:
                found |= _taken(method)
    return frozenset(found)


def _taken(method: ast.FunctionDef) -> set[str]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(method):
        if not (isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")):
            continue
        path, around = ast.unparse(node.value), parents[node]
        asked = isinstance(around, ast.Attribute) and around.attr in ASKED_ONLY
        checked = isinstance(around, ast.Compare) or (
            isinstance(around, ast.Call) and ast.unparse(around.func) in ("isinstance", "hasattr")
        )
        if path.startswith("self.") and not (asked or checked):
            found.add(path.removeprefix("self."))
    return found
