"""The laws of the house that a machine can check (docs: CONTRIBUTING)."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import sparsecraft as sc

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "sparsecraft"
README = (ROOT / "README.md").read_text()
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {str(p.relative_to(SOURCE).with_suffix("")).replace("/", "."): p for p in FILES}

# Lower may not import higher. Modules of one rank may import each other.
RANKS = (
    ("errors", "__init__"),
    ("recipe", "specs", "gating", "typed", "routing", "batch"),
    ("donor", "sites", "hub", "packaged", "encoding", "rows", "corpus", "sentences"),
    ("experts", "routers", "kernels", "init", "data", "losses"),
    ("layer",),
    ("cost", "budget", "certificate", "origin", "tensorfile", "sources", "merged_lora"),
    ("planning",),
    ("kept_lora", "gathering", "domains", "expansion", "reading"),
    ("surgery",),
    ("folder", "shards"),
    ("checkpoint", "preflight"),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}

# Local imports that break a circle; each says so where it stands.
BREAKERS = {
    ("routing", "layer"),
    ("surgery", "checkpoint"),
    ("doors", "checkpoint"),
    ("checkpoint", "peft"),
}

MAX_LINES, MAX_FUNCTION = 400, 60


def package(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> set[tuple[str, bool]]:
    """(sparsecraft module, at the top level) for everything that a file imports from us."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "sparsecraft":
                names = [alias.name for alias in node.names]
            elif node.module.startswith("sparsecraft."):
                names = [node.module.removeprefix("sparsecraft.")]
        elif isinstance(node, ast.Import):
            ours = [a.name for a in node.names if a.name.startswith("sparsecraft.")]
            names = [name.removeprefix("sparsecraft.") for name in ours]
        found |= {(package(name), id(node) in top) for name in names}
    return {(n, t) for n, t in found if (SOURCE / f"{n}.py").exists() or (SOURCE / n).is_dir()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    """recipe <- donor <- experts, routers <- layer <- cost <- surgery <- checkpoint <- the rest."""
    name = package(module)
    rank = RANK.get(name, len(RANKS))
    if name in ("doors", "recipes"):
        return
    for other, _ in imports(MODULES[module]):
        if (name, other) not in BREAKERS and other != name:
            assert RANK.get(other, len(RANKS)) <= rank or other == "doors", f"{module} -> {other}"


def test_only_the_command_line_and_the_package_import_the_recipes():
    for module, path in MODULES.items():
        if package(module) not in (
            "recipes",
            "cli",
            "__init__",
            "demo",
            "peft",
            "converting",
            "importing",
        ):
            assert "recipes" not in {name for name, _ in imports(path)}, module


def test_the_import_check_sees_a_violation(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "from sparsecraft.checkpoint.save import load\ndef f():\n    import sparsecraft.dense.hub\n"
    )
    assert imports(file) == {("checkpoint", True), ("hub", False)}


def test_recipes_import_only_recipe_errors_and_each_other():
    for module, path in MODULES.items():
        if package(module) == "recipes":
            assert {name for name, _ in imports(path)} <= {"recipe", "recipes", "errors"}, module


def test_files_and_functions_stay_short():
    offenders = []
    for module, path in MODULES.items():
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > MAX_LINES:
            offenders.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    offenders.append(f"{module}.{node.name}: {length} lines")
    assert not offenders, "\n".join(offenders)


def test_no_room_for_leftovers():
    words = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not [m for m in MODULES if words & set(m.replace("_", ".").split("."))]
    assert len(MODULES) > 20


def test_every_module_and_public_class_says_what_it_is():
    missing = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(module)
        for node in tree.body:
            public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{module}.{node.name}")
    assert not missing, missing


def test_library_modules_print_nothing():
    """Standard output belongs to the command line."""
    offenders = []
    for module, path in MODULES.items():
        if package(module) in ("cli", "demo", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            if is_print and not any(k.arg == "file" for k in node.keywords):
                offenders.append(f"{module}:{node.lineno}")
    assert not offenders, offenders


@pytest.mark.parametrize("name", sc.__all__)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(sc, name)
    assert inspect.getdoc(value), f"sparsecraft.{name} has no docstring"
    assert name in dir(sc)
    if not inspect.ismodule(value):
        assert not (SOURCE / f"{name}.py").exists(), "a module shares the name of a public function"


def test_at_most_thirty_public_names():
    assert 10 < len(sc.__all__) <= 30 and len(set(sc.__all__)) == len(sc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = sc.convrt


@pytest.mark.parametrize("name", sc.recipes.__all__)
def test_every_recipe_has_a_function_a_page_and_a_case(name):
    from tests.cases import RECIPES

    function = getattr(sc.recipes, name)
    recipe = function()
    assert recipe.name == name and recipe.paper and recipe.title and recipe.stages
    assert any(case.make().name == name for case in RECIPES.values()), "no row in tests/cases.py"
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in function.__doc__, f"{name}({parameter}) is not documented"
    assert "Command: sparsecraft" in inspect.getmodule(function).__doc__
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_the_readme_shows_the_tree():
    readme = (ROOT / "README.md").read_text()
    top = {package(m) for m in MODULES} - {"__init__", "__main__"}
    missing = sorted(n for n in top if f"{n}.py" not in readme and f"{n}/" not in readme)
    assert not missing, f"README.md does not mention {', '.join(missing)}"


def test_the_methods_table_of_the_readme_agrees_with_the_recipes():
    from sparsecraft.recipe.words import facts

    rows = {
        cells[0].split("`")[1]: cells
        for line in README.splitlines()
        if line.startswith("| [`")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert set(rows) == set(sc.recipes.__all__)
    for name, (_, _, placement, experts, router, exact) in rows.items():
        recipe = sc.recipes.__dict__[name]()
        for edit in recipe.edits:
            assert {"replace": "replaces"}.get(edit.place, edit.place) in placement
        assert str(recipe.edits[0].experts.num_experts) in experts
        routed = recipe.edits[0].router
        if routed:
            assert (f"top-{routed.top_k}" if routed.top_k else routed.select) in router
        else:
            assert router == "none"
        claim = facts(recipe)["exact_at_start"]
        assert exact.startswith(claim if name != "upcycling" else "if renormalized")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    from tests import tiny

    block = README.split("```python\n")[1].split("```")[0]
    base = tiny.save_dense(tmp_path / "dense")
    for name in ("math", "code"):
        tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.chat_rows())
    monkeypatch.chdir(tmp_path)
    block = block.replace('"smollm2"', repr(base)).replace("steps=100", "steps=1, max_length=64")
    names: dict = {}
    exec(block, names)
    assert names["model"].sparsecraft.recipe.recipe.name == "camelidae"
