"""Whether nodes of a graph write to anything, so that others must not move past them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

# Functions of `operator` that write to what they are given.
IN_PLACE = frozenset(
    "setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub "
    "itruediv ixor".split()
)
AUTOCAST = ("_enter_autocast", "_exit_autocast")


def is_pure(first: fx.Node, last: fx.Node) -> bool:
    """Whether no node between these two writes to anything, or changes what others compute."""
    node = first.next
    while node is not last:
        if node.op == "root" or not _is_pure(node):
            return False
        node = node.next
    return True


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return not node.target.endswith("_")
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr")
    target = node.target
    if isinstance(target, OpOverload):
        return not target._schema.is_mutable
    name = getattr(target, "__name__", "_")
    if isinstance(target, HigherOrderOperator) or name.endswith("_"):
        return False
    if name in AUTOCAST:
        return not _is_on(node)
    if getattr(target, "__module__", "") == operator.__name__ or target in vars(operator).values():
        return name not in IN_PLACE
    return node.kwargs.get("out") is None and not _given(target, node, "inplace")


def _is_on(node: fx.Node) -> bool:
    """Whether an autocast region that begins or ends here casts: (device, type, enabled, ...)."""
    begin = node if node.target.__name__ == AUTOCAST[0] else node.args[0]
    return bool(begin.args[2])


def _given(function: Callable, node: fx.Node, name: str) -> bool:
    """Whether a call's argument of this name is true."""
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # of a builtin
        return bool(node.kwargs.get(name))
    return bool(bound.arguments.get(name))
