"""`make docs`: write what README.md and docs/format.md print from the code between their markers.

    methods    README.md: a row for every recipe
    packages   README.md: a row for every package, what it says of itself
    floors     docs/architecture.md: what each package may import
    tensors    docs/format.md: names, shapes and types, read off tiny converted models
    failures   docs/guides/peft.md: which of PEFT's own tests fail, as `make peft-suite` holds it

A marker is a pair of comments, `<!-- methods -->` and `<!-- /methods -->`.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "sparsecraft"
PAGES = {
    "README.md": ("methods", "packages"),
    "docs/architecture.md": ("floors",),
    "docs/format.md": ("tensors",),
    "docs/guides/peft.md": ("failures",),
}

# Sizes by which a dimension of a tensor is recognized: no two are equal.
SIZES = {"E": 4, "d": 48, "F": 80, "q": 32, "kv": 16, "head": 8, "h": 7, "r": 5, "M": 11, "m": 13}
SYMBOLS = {size: symbol for symbol, size in SIZES.items()} | {
    2 * SIZES["F"]: "2F",
    2 * SIZES["d"]: "2d",
    SIZES["F"] // SIZES["E"]: "F/E",
    2 * SIZES["F"] // SIZES["E"]: "2F/E",
    SIZES["E"] - 1: "E-s",
}
OPTIONS: dict[str, Any] = {
    "num_experts": SIZES["E"],
    "top_k": 2,
    "shared": 1,
    "granularity": 1,
    "adapter_dim": SIZES["h"],
    "lora_rank": SIZES["r"],
    "rank": SIZES["r"],
    "embedding_dim": SIZES["M"],
    "router_dim": SIZES["m"],
}
# Recipes that are also read off a model with biases and without gates.
PLAIN = ("upcycling", "mpoe", "gmoefication", "cmoe")


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell or ' ' for cell in line)} |" for line in lines)


# ------------------------------------------------------------------------------------- the methods


def methods() -> str:
    """A row for every recipe as it is without options, by what its experts are."""
    from sparsecraft import recipes
    from sparsecraft.recipe.words import in_table

    return in_table({name: recipes.by_name(name) for name in recipes.__all__}, "docs/methods/")


# ------------------------------------------------------------------------------------ the packages


def packages() -> str:
    """A row for every package in the order of the floors, with the first line of its docstring."""
    from tests.laws.test_house import MAY_IMPORT

    rows = []
    for name in MAY_IMPORT:
        if name.startswith("__"):
            continue
        package = (SOURCE / name / "__init__.py").is_file()
        path = f"{name}/__init__.py" if package else f"{name}.py"
        said = ast.get_docstring(ast.parse((SOURCE / path).read_text())).split("\n\n")[0]
        end, link = ("/", name) if package else (".py", f"{name}.py")
        rows.append((f"[`{name}{end}`](src/sparsecraft/{link})", " ".join(said.split())))
    return table(("package", "what it holds"), iter(rows))


def floors() -> str:
    """A row for every floor of the house, from the ground, as the law of tests/laws has it."""
    from tests.laws.test_house import MAY_IMPORT

    level: dict[str, int] = {}
    for name, line in MAY_IMPORT.items():
        level[name] = 1 + max((level[other] for other in line.split()), default=0)
    rows = [
        (str(level[name]), f"`{name}`", ", ".join(line.split()) or "nothing of ours")
        for name, line in sorted(MAY_IMPORT.items(), key=lambda item: level[item[0]])
    ]
    return table(("floor", "package", "may import"), iter(rows))


# ------------------------------------------------------------------------------------ the failures


def failures() -> str:
    """How many of PEFT's tests pass, and a row for every reason why others do not."""
    from tests.clients.peft_suite.failures import FAILURES, PASSED, SKIPPED, VERSION

    number = sum(failure.count for failure in FAILURES)
    rows = [
        (
            "<br>".join(f"`{glob}`" for glob in failure.ids()),
            ", ".join(failure.configurations) or "all",
            str(failure.count),
            failure.reason,
        )
        for failure in FAILURES
    ]
    head = ("ids", "configurations", "tests", "why")
    return (
        f"PEFT {VERSION}: {PASSED} pass, {number} fail, {SKIPPED} are skipped by PEFT as not of "
        f"the method.\n\n{table(head, iter(rows))}"
    )


# ------------------------------------------------------------------------------------- the tensors


def tensors() -> str:
    """A row for every new tensor that some recipe makes."""
    found: dict[tuple[str, str], tuple[dict, dict, dict]] = {}
    for recipe, owner, name, shape, dtype in _new_tensors():
        shapes, dtypes, recipes = found.setdefault((owner, name), ({}, {}, {}))
        shapes[shape], dtypes[dtype], recipes[recipe] = None, None, None
    rows = [
        (f"`{owner}`", f"`{name}`", " or ".join(shapes), " or ".join(dtypes), ", ".join(recipes))
        for (owner, name), (shapes, dtypes, recipes) in sorted(found.items(), key=lambda i: i[0])
    ]
    return table(("part", "tensor", "shape", "type", "recipes"), iter(rows))


def _new_tensors() -> Iterator[tuple[str, str, str, str, str]]:
    """Recipe, class of the part, name in the layer, shape and type of each."""
    import sparsecraft as sc
    from sparsecraft.moe.layer import MoELayer
    from sparsecraft.moe.names import unique_tensors

    for name, recipe, dense in _converted():
        model = dense()
        sc.convert(model, recipe, certify=False)
        for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
            symbols = SYMBOLS | _of_linear(layer)
            for key, tensor in unique_tensors(layer).items():
                if key.startswith("base."):
                    continue
                owner = layer.get_submodule(_part(key))
                shape = _of_core(key) or [symbols.get(size, str(size)) for size in tensor.shape]
                if layer.experts.num_experts == 1 and key.startswith("experts."):
                    shape[0] = "E"
                dtype = str(tensor.dtype).removeprefix("torch.")
                said = "the model's" if dtype == "bfloat16" else dtype
                size = f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"
                yield name, type(owner).__name__, key, size, said


def _part(key: str) -> str:
    """The part of a layer that a tensor belongs to: experts, router, or the router's scorer."""
    return "router.scorer" if key.startswith("router.scorer.") else key.partition(".")[0]


def _of_core(key: str) -> list[str]:
    """The shape of a core of a matrix product operator, whose sizes are factors; else nothing."""
    named = re.fullmatch(r"experts\.(?:gate|up|down)_([1245]|central)", key)
    if named is None:
        return []
    k = 3 if named[1] == "central" else int(named[1])
    bonds = ["1", "b1", "b2", "b3", "b4", "1"]
    return ["E"] * (k != 3) + [bonds[k - 1], f"i{k}", f"j{k}", bonds[k]]


def _of_linear(layer: Any) -> dict[int, str]:
    """The names of both widths, where the layer stands at a Linear."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from sparsecraft.dense.forms import features

    base = layer.base
    while isinstance(base, type(layer)):
        base = base.base
    if not isinstance(base, nn.Linear | Conv1D):
        return {}
    inputs, outputs = features(base)
    return {inputs: "in", outputs: "out"}


def _converted() -> Iterator[tuple[str, Any, Callable]]:
    """Every recipe and variant, small, and the dense model to read it off."""
    import sparsecraft as sc
    from sparsecraft import recipes

    for name in recipes.__all__:
        function = recipes.by_name(name)
        given = {k: v for k, v in OPTIONS.items() if k in inspect.signature(function).parameters}
        for variant in variants(function) or (None,):
            recipe = function(**given, **({"variant": variant} if variant else {}))
            yield name, recipe, gated
            if name in PLAIN:
                yield name, recipe, plain
    linear = recipes.nexus(SIZES["E"], "linear")
    yield "imported", sc.override(linear, {"router.gates_base": True}), gated


def variants(function: Callable) -> tuple[str, ...]:
    """The named variants of a recipe."""
    return typing.get_args(typing.get_type_hints(function).get("variant"))


def gated() -> Any:
    """A tiny Qwen3: gated networks without biases, norms of queries and keys."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=SIZES["d"],
        intermediate_size=SIZES["F"],
        num_hidden_layers=1,
        num_attention_heads=SIZES["q"] // SIZES["head"],
        num_key_value_heads=SIZES["kv"] // SIZES["head"],
        head_dim=SIZES["head"],
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return transformers.Qwen3ForCausalLM(config).bfloat16().eval()


def plain() -> Any:
    """A tiny GPT-2: networks without gates, with biases."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=32,
        n_embd=SIZES["d"],
        n_inner=SIZES["F"],
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).bfloat16().eval()


# ---------------------------------------------------------------------------------------- the pages


def filled(text: str, name: str, block: str) -> str:
    """The page with this block between its markers.

    Raises:
        ValueError: the page has not these markers once.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page needs the markers {start.strip()} and {end} once each.")
    before, _, rest = text.partition(start)
    return f"{before}{start}{block}\n{end}{rest.partition(end)[2]}"


def page(path: str) -> str:
    """The page as the code says it."""
    text = (ROOT / path).read_text()
    for name in PAGES[path]:
        text = filled(text, name, globals()[name]())
    return text


def main() -> None:
    for path in PAGES:
        new = page(path)
        if (ROOT / path).read_text() != new:
            (ROOT / path).write_text(new)
            print(f"{path}: written anew")


if __name__ == "__main__":
    logging.getLogger("sparsecraft").setLevel(logging.ERROR)
    sys.path.insert(0, str(ROOT))
    main()
