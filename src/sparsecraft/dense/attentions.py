"""Every attention of a model, and which rows of its Linears are queries, keys and values.

The names of an attention's parts say only where to look (`ATTENTION_FORMS`). What they are is shown
by running a twin (`sparsecraft.dense.twins`) and changing what its Linears give: a query has effect
at its own position alone, a key and a value at others too. Of a fused projection the rows must be
all of the queries, keys or values, and nothing else: without queries no key has any effect, without
keys no query, and twice the values are twice the output's input.

Shapes: B sequences, S positions, D width.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.forms import (
    ATTENTION_FORMS,
    HEAD_DIM_NAMES,
    AttentionForm,
    features,
    has,
    join,
)
from sparsecraft.dense.once import once
from sparsecraft.dense.twins import HERE, problem, twin

Rows = tuple[int, int]
Change = Callable[[Tensor], Tensor]
"""Of what a projection gives, (B, S, O)."""
Run = Callable[[dict[str, list[Change]]], Tensor]
"""What the output projection reads, (S, H), by changes of what the projection at a path gives."""

AT = 1  # the position at which something is changed
TOLERANCE = 1e-4


def find_attentions(model: nn.Module) -> list[tuple[str, nn.Module, AttentionForm]]:
    """(path, module, form) in the model's order; of nested modules the inner one."""
    found, seen = {}, set()
    for path, module in reversed([*model.named_modules()]):
        for form in ATTENTION_FORMS:
            query = join(path, form.query)
            if query not in seen and all(has(module, part) for part in form.parts()):
                seen.add(query)
                found[path] = (path, module, form)
                break
    return [*found.values()][::-1]


def fused_rows(module: nn.Module, form: AttentionForm, kind: str) -> Rows | None:
    """(start, length) of the rows of a fused projection; None where it is not fused."""
    if form.query != form.key:
        return None
    width = features(module.get_submodule(form.output))[0]
    fused = features(module.get_submodule(form.query))[1]
    shared = (fused - width) // 2  # of keys and of values
    starts = {"query": 0, "key": width, "value": width + shared}
    return starts[kind], width if kind == "query" else shared


def why_not(module: nn.Module, form: AttentionForm, kind: str) -> str | None:
    """Why the rows that `form` names are not the queries, keys or values of the attention."""
    return once(("attention", id(module), form, kind), lambda: _found_wrong(module, form, kind))


def _found_wrong(module: nn.Module, form: AttentionForm, kind: str) -> str | None:
    try:
        run = _running(module, form)
        return "it cannot be run on its own" if run is None else _why_not(module, form, kind, run)
    except Exception as error:  # of whatever code the module has
        return f"it cannot be run on its own ({problem(error)})"


def _why_not(module: nn.Module, form: AttentionForm, kind: str, run: Run) -> str | None:
    rows = {word: fused_rows(module, form, word) for word in ("query", "key", "value")}
    names = {"query": form.query, "key": form.key, "value": form.value}

    def changed(word: str, change: Change) -> dict[str, list[Change]]:
        return {names[word]: [_of_rows(rows[word], change)]}

    def both(first: dict, second: dict) -> dict[str, list[Change]]:
        return {n: [*first.get(n, ()), *second.get(n, ())] for n in {**first, **second}}

    usual = run({})
    at_one = _at_one(len(usual))
    moved = _positions(run(changed(kind, at_one)), usual)
    if kind == "query" and moved != {AT}:
        return f"its {kind} rows have an effect at other positions than their own, or none"
    if kind != "query" and not moved - {AT}:
        return f"its {kind} rows have no effect at other positions than their own"
    if rows[kind] is None:
        return None
    if kind == "value":
        double = run(changed("value", lambda y: 2 * y))
        exact = _near(double, 2 * usual)
    else:
        other = "key" if kind == "query" else "query"
        alone = changed(kind, torch.zeros_like)
        exact = not _positions(run(both(alone, changed(other, at_one))), run(alone))
        exact = exact and _positions(run(changed(other, at_one)), usual)
    return None if exact else f"the {kind} rows of its fused projection are not one block"


def _of_rows(rows: Rows | None, change: Change) -> Change:
    start, length = rows or (0, None)

    def apply(y: Tensor) -> Tensor:
        y = y.clone()
        part = slice(start, None if length is None else start + length)
        y[..., part] = change(y[..., part])
        return y

    return apply


def _at_one(length: int) -> Change:
    """Something else at position `AT` of `length`, whether tokens come in one row or in two."""

    def apply(y: Tensor) -> Tensor:
        y = y.clone()
        y.view(-1, length, y.shape[-1])[:, AT] += torch.linspace(-1, 1, y.shape[-1], **HERE).roll(1)
        return y

    return apply


def _positions(found: Tensor, usual: Tensor) -> set[int]:
    return {s for s in range(len(usual)) if not _near(found[s], usual[s])}


def _near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= TOLERANCE * wanted.norm())


def _running(module: nn.Module, form: AttentionForm) -> Run | None:
    """None if the module's code does not run by any way of calling it that we know."""
    copied = eager_twin(module)
    width = features(copied.get_submodule(form.query))[0]
    x = some_tokens(copied, width)

    def run(changes: dict[str, list[Change]], arguments: dict[str, Any]) -> Tensor:
        read = []
        hooks = [
            copied.get_submodule(form.output).register_forward_pre_hook(
                lambda part, args: read.append(args[0])
            )
        ]
        for name, todo in changes.items():
            for change in todo:
                hooks.append(
                    copied.get_submodule(name).register_forward_hook(
                        lambda part, args, y, change=change: change(y)
                    )
                )
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                copied.forward(x, **arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return read[0].reshape(x.shape[1], -1)

    for arguments in ways(copied, x):
        try:
            if run({}, arguments).isfinite().all():
                return lambda changes, arguments=arguments: run(changes, arguments)
        except Exception:
            continue
    return None


def eager_twin(module: nn.Module, seed: int = 0) -> nn.Module:
    """A twin whose attention is plain products, which take every mask."""
    copied = twin(module, {}, seed=seed).eval()
    for part in copied.modules():
        if config := getattr(part, "config", None):
            part.config = copy.deepcopy(config)
            part.config._attn_implementation = "eager"
    return copied


def some_tokens(module: nn.Module, width: int) -> Tensor:
    """(1, S, D); attention within windows takes a whole one."""
    length = max(getattr(part, "window_area", 4) for part in module.modules())
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, length, width, generator=generator, **HERE)


def ways(module: nn.Module, x: Tensor) -> Iterator[dict[str, Any]]:
    """Arguments beside the hidden states that attentions of transformers may be called with."""
    asked = [*inspect.signature(module.forward).parameters.values()][1:]
    required = {p.name for p in asked if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    named = {"position_embeddings", "attention_mask", "mask", "position_ids", *required}
    S, heads = x.shape[1], _number(module, ("num_heads", "n_heads"))
    # Ones do not matter to a mask that is added, and let all pass of one that is multiplied.
    masks = (None, torch.ones(1, 1, S, S, **HERE), torch.ones(1, 1, S, S, **HERE).bool())
    numbers = torch.arange(S, device="cpu")
    for mask, turn in itertools.product(masks, _turns(module, x)):
        values = {
            "position_embeddings": turn,
            "attention_mask": mask,
            "mask": mask,
            "position_ids": numbers[None],
            "cache_position": numbers,
            "residual": torch.zeros_like(x),
            "alibi": torch.zeros(heads, 1, S, **HERE),
            "position_bias": torch.zeros(heads, 1, S, **HERE),
            "shared_kv_states": {},
        }
        yield {p.name: values.get(p.name) for p in asked if p.name in named}


def _turns(module: nn.Module, x: Tensor) -> Iterator[Any]:
    """Positions: cosines and sines of a head's features, of half of them, or of those that turn at
    all; complex numbers; and relative ones."""
    S = x.shape[1]
    angles = torch.arange(S, **HERE)[None, :, None] / 3
    head, turned = _number(module, HEAD_DIM_NAMES), _number(module, ("rotary_dim", "rotary_ndims"))
    for features_of in dict.fromkeys((1, head, head // 2, turned, turned // 2)):
        turned_by = angles.expand(1, S, features_of)
        yield turned_by.cos(), turned_by.sin()
    yield torch.polar(torch.ones(1, S, head // 2, **HERE), angles.expand(1, S, head // 2))
    yield x.repeat(1, 2, 1)[:, : 2 * S - 1]


def _number(module: nn.Module, names: tuple[str, ...]) -> int:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), 1)
