"""Which Linears of a block read the tokens of an encoder, or of a tower, beside the block's own.

A block that attends to others is called with their hidden states, by names that all families share.
So it runs on shapes alone (`sparsecraft.dense.twins.skeleton`) with `OWN` tokens of its own and
`OTHERS` of theirs: what arrives at a module in that number is theirs.

Shapes: D width of a block, E of the others' hidden states.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from sparsecraft.dense.attentions import eager, ways
from sparsecraft.dense.forms import features, is_linear
from sparsecraft.dense.linears import blocks
from sparsecraft.dense.once import once
from sparsecraft.dense.twins import skeleton

# What blocks call the hidden states of others: encoder-decoders and BERT; Mllama; Idefics.
STATES = ("encoder_hidden_states", "cross_attention_states", "image_hidden_states")
OWN, OTHERS = 3, 5
WAYS = 7  # of calling a block: every kind of positions that `ways` knows, without a mask


def crossing(stack: nn.Module) -> set[nn.Module]:
    """The modules in a decoder, or in a model beside towers, at which others' tokens arrive."""
    return once(("crossing", id(stack)), lambda: set(_crossing(stack)))


def _crossing(stack: nn.Module) -> Iterator[nn.Module]:
    modules, known = dict(stack.named_modules()), {}
    for path in blocks(modules):
        block = modules[path]
        name = next((n for n in STATES if n in inspect.signature(block.forward).parameters), None)
        if name is None:
            continue
        key = type(block), tuple(part for part, _ in block.named_modules())
        if key not in known:
            known[key] = _theirs(block, name)
        yield from (block.get_submodule(part) for part in known[key])


def _theirs(block: nn.Module, states: str) -> set[str]:
    """Paths below a block. One with a mixture of experts has no shapes alone, and runs in part."""
    copied = eager(skeleton(block))
    arrived: list[tuple[str, int]] = []

    def note(path: str, args: tuple, kwargs: dict) -> None:
        read = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if path and read is not None:
            arrived.append((path, read.shape[:-1].numel()))

    for path, part in copied.named_modules():
        part.register_forward_pre_hook(
            lambda part, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
        )
    widths = [*dict.fromkeys(features(m)[0] for m in block.modules() if is_linear(m))]
    theirs: set[str] = set()
    like = {"dtype": torch.float32, "device": "meta"}
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, OWN, widths[0], **like)
        for width, arguments in itertools.product(widths, itertools.islice(ways(copied, x), WAYS)):
            arrived.clear()
            ran = False
            with suppress(Exception):  # of whatever code the block has
                copied(x, **{**arguments, states: torch.empty(1, OTHERS, width, **like)})
                ran = True
            theirs |= {path for path, rows in arrived if rows == OTHERS}
            if ran or (theirs and arrived[-1][1] == OWN):  # it went on from there
                break
    return theirs
