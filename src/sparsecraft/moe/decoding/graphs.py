"""What is changed in the graph of a decoding step before it is compiled.

Shapes: B sequences, H heads of queries, N of keys, L positions, T tokens, D width, O outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sparsecraft.kernels import attend, products
from sparsecraft.kernels.device import is_handful
from sparsecraft.kernels.product import UPDATE
from sparsecraft.moe.decoding.purity import is_pure

# Reductions of fewer numbers are part of what reads them: a softmax over eight experts, say.
UNROLLED = 9
# Outputs up to which a Linear is a product of our own: cuBLAS is as fast with more. Of several
# tokens it is so too with rows that are few and long, of which it sums parts.
WIDEST, ENOUGH, LONG = 16384, 4096, 4096
VIEWS = ("reshape", "view", "flatten", "contiguous")
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """torch's own compiler, behind `share_keys` and `share_launches`."""
    share_keys(graph)
    share_launches(graph)
    inductor = torch._dynamo.lookup_backend("inductor")
    return inductor(graph, inputs, config_patches={"unroll_reductions_threshold": UNROLLED})


# ------------------------------------------------------------------ attention
def share_keys(graph: fx.GraphModule) -> None:
    """Let heads that share keys read them once, and only where the mask shows them:
    `kernels.attend` in the place of copies for each head, and of attention to a whole cache."""
    for node in list(graph.graph.nodes):
        if node.target is F.scaled_dot_product_attention:
            _attend(graph.graph, node)
    graph.recompile()


def _attend(graph: fx.Graph, node: fx.Node) -> None:
    given = dict(zip(ATTENTION, node.args, strict=False)) | node.kwargs
    q, k, v, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    known = given.keys() <= {*ATTENTION, "scale", "enable_gqa"}
    if not known or given.get("dropout_p") or given.get("is_causal"):
        return
    k, v = _unrepeated(k, node), _unrepeated(v, node)
    if attend.fits(_value(q), _value(k), _value(v), None if mask is None else _value(mask)):
        with graph.inserting_before(node):
            y = graph.call_function(attend.OPERATOR, (q, k, v, mask, given.get("scale")))
        y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)


def _unrepeated(node: fx.Node, reader: fx.Node) -> fx.Node:
    """Keys (B, N, L, D), where they were repeated for each head: k[:, :, None].expand(...), and
    nothing writes to them before they are read."""
    if node.target != "reshape" or node.args[0].target != "expand":
        return node
    copied, every = node.args[0].args[0], slice(None)
    index = every, every, None, every, every
    if copied.target is not operator.getitem or copied.args[1] != index:
        return node
    (B, N, L, D), shape = _value(copied.args[0]).shape, _value(node).shape
    same = shape == (B, shape[1], L, D) and shape[1] % N == 0
    return copied.args[0] if same and is_pure(copied, reader) else node


# ------------------------------------------------------------------ products
@dataclass(frozen=True, slots=True)
class _Product:
    """A product with a matrix in the graph.

    Attributes:
        node: what computes it.
        wide: whether it is float32, (T, O), and the only one in a list.
        updated: whether the node adds a low-rank update to a Linear.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    wide: bool
    updated: bool = False


def share_launches(graph: fx.GraphModule) -> None:
    """Let the products of one input be one launch, `kernels.products`: rows of LoRAs, routers'
    scores, and Linears with their low-rank updates."""
    early: dict[fx.Node, list[_Product]] = {}
    late: dict[fx.Node, list[_Product]] = {}
    for product in _products(graph.graph):
        by_source = early if product.wide else late
        by_source.setdefault(_source(_input(product)), []).append(product)
    for source, found in list(late.items()):
        if _tokens(source) == 1 and not any(product.updated for product in found):
            early.setdefault(source, []).extend(late.pop(source))
    for source, found in [*early.items(), *late.items()]:
        outputs = sum(len(_value(product.weight)) for product in found if not product.wide)
        if outputs and _tokens(source) > 1 and _is_long(source) and outputs < ENOUGH:
            continue
        order = {node: i for i, node in enumerate(graph.graph.nodes)}
        found.sort(key=lambda product: order[product.node])
        moved = _between(found, order)
        groups = [found] if moved is not None else [[product] for product in found]
        for group in groups:
            if len(group) > 1 or not group[0].wide:
                last = _share(graph.graph, group)
                here = set(graph.graph.nodes)  # those that gave a part of a product are not
                for node in reversed([node for node in moved or () if node in here]):
                    last.append(node)
    graph.graph.lint()
    graph.recompile()


def _is_long(source: fx.Node) -> bool:
    return _value(source).shape[-1] > LONG


def _products(graph: fx.Graph) -> Iterable[_Product]:
    """All products that may share a launch, in their order."""
    updated: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is UPDATE and (linear := _sole_linear(node.args[0])) is not None:
            updated[linear] = node
    found = []
    for node in graph.nodes:
        if (product := _product(node)) is None:
            continue
        if (update := updated.get(node)) is not None:
            product = _Product(update, product.weight, product.bias, False, updated=True)
        found.append(product)
    return found


def _sole_linear(node: fx.Node) -> fx.Node | None:
    """The Linear whose output this is, where nothing else reads it."""
    width = _value(node).shape[-1]
    while len(node.users) == 1 and node.op == "call_method" and node.target in VIEWS:
        node = node.args[0]
        if _value(node).shape[-1] != width:
            return None
    return node if node.target is F.linear and len(node.users) == 1 else None


def _product(node: fx.Node) -> _Product | None:
    """The product that a node computes, if it may share a launch."""
    if node.target is products.OPERATOR:
        (weight,) = node.args[1]
        return _Product(node, weight, None, True) if _is_view(weight) else None
    if node.target is not F.linear or node.kwargs:
        return None
    x, weight, *bias = node.args
    x_value, weight_value = _value(x), _value(weight)
    x_TD = x_value.reshape(-1, x_value.shape[-1])
    # Under autocast a Linear's output is of another type than what it reads.
    types = {x_value.dtype, weight_value.dtype, _value(node).dtype}
    same = type(weight_value) is type(x_value) and len(types) == 1 and weight_value.ndim == 2
    if not (same and is_handful(x_TD) and _is_view(weight)):
        return None
    alone, tiles = len(x_TD) == 1, products.fits_tiles(x_TD, [weight_value])
    if len(weight_value) > WIDEST or not (alone or tiles):
        return None
    return _Product(node, weight, bias[0] if bias else None, False)


def _input(product: _Product) -> fx.Node:
    node = _sole_linear(product.node.args[0]) if product.updated else product.node
    return node.args[0]


def _tokens(source: fx.Node) -> int:
    value = _value(source)
    return value.numel() // value.shape[-1]


def _between(found: list[_Product], order: dict[fx.Node, int]) -> list[fx.Node] | None:
    """The nodes before the last product that read the others, which can move behind it, in their
    order; None where they cannot, or where something is written between what all read and the last
    of them."""
    source, last = _source(_input(found[0])), found[-1].node
    if not is_pure(source, last):
        return None
    moved: set[fx.Node] = set()
    left = [user for product in found for user in product.node.users]
    while left:
        node = left.pop()
        if node not in moved and order[node] < order[last]:
            moved.add(node)
            left += node.users
    needed = {node for product in found for node in (product.node, *product.node.all_input_nodes)}
    return None if needed & moved else sorted(moved, key=order.__getitem__)


def _share(graph: fx.Graph, found: list[_Product]) -> fx.Node:
    """Compute these products of one input behind the last of them; the last node of it."""
    behind = found[-1].node
    # Alone, it reads what it read.
    source = _source(_input(found[0])) if len(found) > 1 else _input(found[0])
    width, following = _value(source).shape[-1], behind.next
    with graph.inserting_before(following):
        x_TD = graph.call_method("reshape", (source, (-1, width)))
        weights = [_copied(graph, product.weight) for product in found]
        wide, lows, scales = [product.wide for product in found], [], []
        if any(product.updated for product in found):
            for product in found:
                given = product.node.args[1:] if product.updated else (None, None, None, 0.0)
                *tensors, scale = given
                lows, scales = [*lows, *tensors], [*scales, scale]
        together = graph.call_function(products.OPERATOR, (x_TD, weights, wide, lows, scales))
        parts = [graph.call_function(operator.getitem, (together, i)) for i in range(len(found))]
        for i, product in enumerate(found):
            if not product.wide:
                shape = tuple(_value(product.node).shape)
                parts[i] = graph.call_method("reshape", (parts[i], shape))
                if product.bias is not None:
                    parts[i] = graph.call_function(operator.add, (parts[i], product.bias))
    last = following.prev  # which may read the last product, and go with it
    for product, part in zip(found, parts, strict=True):
        for node in list(product.node.users) if product.wide else [product.node]:
            part.meta.setdefault("example_value", _value(node))
            node.replace_all_uses_with(part)
        _erase(graph, product.node)
    return last


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a product, and what of it nothing else reads."""
    for user in list(node.users):
        graph.erase_node(user)
    while not node.users and node.op.startswith("call"):
        before = node.args[0]
        graph.erase_node(node)
        if node.target is F.linear or node.target is products.OPERATOR:
            break
        node = before


def _source(node: fx.Node) -> fx.Node:
    """The node that this one has its rows from."""
    while node.op == "call_method" and node.target in (*VIEWS, "to"):
        if "example_value" not in node.args[0].meta:  # a part of what was put together here
            break
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
