"""One direction: which package may import which, no circle of files, no torch where there is none.

Every import of ours counts, also inside functions; only those under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "sparsecraft"

# Package -> the packages of ours that it may import. The order of the lines is the order of the
# floors, from the ground: a package only ever imports what stands above its own line here.
MAY_IMPORT = {
    "errors": "",
    "recipe": "errors",
    "kernels": "errors",
    "recipes": "errors recipe",
    "dense": "errors recipe",
    "moe": "errors recipe kernels dense",
    "data": "errors dense moe",
    "surgery": "errors recipe dense moe",
    "checkpoint": "errors recipe dense moe surgery",
    "evaluation": "errors recipe dense moe data surgery checkpoint",
    "serving": "errors dense moe data checkpoint",
    "conversion": "errors recipe dense moe data surgery checkpoint evaluation",
    "training": "errors recipe kernels dense moe data surgery checkpoint evaluation",
    "interop": "errors recipe recipes dense moe surgery checkpoint evaluation",
    "cli": (
        "errors recipe recipes dense moe data surgery checkpoint evaluation serving conversion "
        "training interop"
    ),
    "__init__": "recipe interop",
    "__main__": "cli",
}
FLOORS = {package: set(line.split()) for package, line in MAY_IMPORT.items()}
MOST_PACKAGES, MOST_FLOORS = 15, 11
BY_NAME = ("import_module", "__import__")  # of a literal; tables of names are `__init__` and `cli`


def modules(source: Path) -> dict[str, Path]:
    """Dotted name below `source` -> its file; a package by its own name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which this check does not read"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_NAME):
            literal = node.args and isinstance(node.args[0], ast.Constant)
            names |= {str(node.args[0].value)} if literal else set()
    ours = {n.removeprefix("sparsecraft.") for n in names if n.startswith("sparsecraft.")}
    found = {"__init__"} & {n.replace("sparsecraft", "__init__") for n in names}
    for name in ours:
        while name and name not in known:  # a name in a module, not a module
            name = name.rpartition(".")[0]
        found.add(name or "__init__")
    return found - {next((m for m, p in known.items() if p == path), "")}


def package(module: str) -> str:
    return module.partition(".")[0]


def arrows(source: Path) -> dict[str, set[str]]:
    known = modules(source)
    return {name: imports(path, known) for name, path in known.items()}


def wrong_arrows(graph: dict[str, set[str]]) -> list[str]:
    """Imports that the table does not allow."""
    return sorted(
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if package(other) not in FLOORS.get(package(module), set()) | {package(module)}
    )


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files each of which imports all the others, over any number of steps."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo.extend(graph.get(module, ()))
        reach[start] = seen
    return [
        sorted({start} | {m for m in reach[start] if start in reach.get(m, ())})
        for start in graph
        if start in reach[start]
    ]


GRAPH = arrows(SOURCE)


def test_every_import_is_in_the_table():
    assert not (wrong := wrong_arrows(GRAPH)), "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    assert not (found := circles(GRAPH)), found


def test_the_table_has_one_direction_and_no_pair_that_nothing_uses():
    order = list(MAY_IMPORT)
    used = defaultdict(set)
    for module, others in GRAPH.items():
        used[package(module)] |= {package(other) for other in others} - {package(module)}
    for name, allowed in FLOORS.items():
        assert all(order.index(other) < order.index(name) for other in allowed), name
        assert allowed == used[name], f"{name}: {sorted(allowed - used[name])} is never imported"


def test_there_are_few_packages_and_floors_and_nothing_beside_them():
    entries = {p.name for p in SOURCE.iterdir()} - {"__pycache__"}
    files = {"__init__.py", "__main__.py", "py.typed", "errors.py"}
    packages = entries - files
    assert files <= entries and packages == {
        name for name in MAY_IMPORT if not name.startswith("__") and name != "errors"
    }
    assert len(packages) <= MOST_PACKAGES
    height: dict[str, int] = {}
    for name, allowed in FLOORS.items():  # those below come first
        height[name] = 1 + max((height[other] for other in allowed), default=0)
    assert max(height[name] for name in packages) <= MOST_FLOORS


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from sparsecraft.surgery.install import apply\n", "moe.bad -> surgery.install"),
        ("def f():\n    from sparsecraft.cli import main\n", "moe.bad -> cli.main"),
        ("def f():\n    import sparsecraft.checkpoint.save as s\n", "moe.bad -> checkpoint.save"),
        ("import sparsecraft.data\n", "moe.bad -> data"),
        ("from sparsecraft import convert\n", "moe.bad -> __init__"),
        ("def f():\n    import sparsecraft as sc\n    sc.train()\n", "moe.bad -> __init__"),
        (
            "import importlib\nimportlib.import_module('sparsecraft.data.rows')\n",
            "moe.bad -> data.rows",
        ),
        ("if not TYPE_CHECKING:\n    from sparsecraft.cli import main\n", "moe.bad -> cli.main"),
    ],
)
def test_a_wrong_import_is_seen_at_the_top_and_inside_a_function(tmp_path, text, wrong):
    planted = tmp_path / "bad.py"
    planted.write_text("from sparsecraft.recipe.edits import Edit\n" + text)
    graph = {**GRAPH, "moe.bad": imports(planted, modules(SOURCE))}
    assert wrong_arrows(graph) == [wrong]


def test_a_planted_circle_is_seen():
    graph = {**GRAPH, "recipe.numbers": {"recipe.recipe"}}
    assert any("recipe.numbers" in group for group in circles(graph))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] == ["a", "b", "c"]


def test_imports_that_only_type_checkers_see_do_not_count(tmp_path):
    file = tmp_path / "fine.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from sparsecraft.cli.main import main\n"
    )
    assert imports(file, modules(SOURCE)) == set()
