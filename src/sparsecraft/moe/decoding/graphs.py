"""What is changed in the graph of a decoding step before it is compiled.

Shapes: T tokens, D width, O outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparsecraft.kernels.device import is_handful
from sparsecraft.kernels.products import OPERATOR

# Reductions of fewer numbers are part of what reads them: a softmax over eight experts, say.
UNROLLED = 9
# Outputs up to which a Linear shares a launch with other products of its input.
NARROW = 1024
VIEWS = ("reshape", "view", "flatten", "contiguous")


def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """torch's own compiler, behind `share_launches`."""
    share_launches(graph)
    inductor = torch._dynamo.lookup_backend("inductor")
    return inductor(graph, inputs, config_patches={"unroll_reductions_threshold": UNROLLED})


@dataclass(frozen=True, slots=True)
class _Product:
    """A product with a matrix in the graph.

    Attributes:
        node: what computes it.
        wide: whether it is float32, (T, O), and the only one in a list.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    wide: bool


def share_launches(graph: fx.GraphModule) -> None:
    """Let the products of one input with narrow matrices be one launch, `kernels.products`: rows
    of LoRAs, routers' scores, and Linears where a token is alone, which takes as long for a narrow
    one as the launch does."""
    groups: dict[fx.Node, list[_Product]] = {}
    for node in graph.graph.nodes:
        if (found := _product(node)) is not None:
            groups.setdefault(_source(node.args[0]), []).append(found)
    for source, found in groups.items():
        if len(found) > 1 or not found[0].wide:
            _share(graph.graph, source, found)
    graph.graph.lint()
    graph.recompile()


def _product(node: fx.Node) -> _Product | None:
    """The product that a node computes, if it may share a launch."""
    if node.target is OPERATOR:
        (weight,) = node.args[1]
        return _Product(node, weight, None, True) if _is_view(weight) else None
    if node.target is not F.linear or node.kwargs:
        return None
    x, weight, *bias = node.args
    x_value, weight_value = _value(x), _value(weight)
    alone = x_value.numel() == x_value.shape[-1] and len(weight_value) <= NARROW
    same = type(weight_value) is type(x_value) and weight_value.dtype == x_value.dtype
    if not (alone and same and is_handful(x_value.view(1, -1)) and _is_view(weight)):
        return None
    return _Product(node, weight, bias[0] if bias else None, False)


def _share(graph: fx.Graph, source: fx.Node, found: list[_Product]) -> None:
    """Compute these products of one input behind it."""
    width = _value(source).shape[-1]
    with graph.inserting_before(source.next):
        x_TD = graph.call_method("reshape", (source, (-1, width)))
        weights = [_copied(graph, product.weight) for product in found]
        wide = [product.wide for product in found]
        together = graph.call_function(OPERATOR, (x_TD, weights, wide))
        parts = [graph.call_function(operator.getitem, (together, i)) for i in range(len(found))]
    for product, part in zip(found, parts, strict=True):
        node = product.node
        if product.wide:
            for item in list(node.users):
                item.replace_all_uses_with(part)
                graph.erase_node(item)
        else:
            with graph.inserting_before(node):
                y = graph.call_method("reshape", (part, tuple(_value(node).shape)))
                if product.bias is not None:
                    y = graph.call_function(operator.add, (y, product.bias))
            node.replace_all_uses_with(y)
        graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node:
    """The node that this one has its rows from."""
    while node.op == "call_method" and node.target in (*VIEWS, "to"):
        value, before = _value(node), _value(node.args[0])
        if value.shape[-1] != before.shape[-1] or value.dtype != before.dtype:
            break
        node = node.args[0]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether a matrix is there from the start: a parameter, or a view of one."""
    while node.op == "call_method" and node.target in VIEWS:
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The same matrix here."""
    if node.op != "call_method":
        return node
    return graph.call_method(node.target, (_copied(graph, node.args[0]), *node.args[1:]))


def _value(node: fx.Node) -> Tensor:
    return node.meta["example_value"]
