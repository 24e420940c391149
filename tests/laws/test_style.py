"""What a file, a function and a module of ours look like, as far as a program can say."""

from __future__ import annotations

import ast
import inspect

import pytest

import sparsecraft as sc
from tests.laws.test_house import ROOT, SOURCE, modules

MODULES = modules(SOURCE)
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
MAX_LINES, MAX_FUNCTION, LONG_FUNCTION, MOST_LONG, MAX_PARAMETERS = 400, 60, 55, 5, 7


def functions():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield module, node


def is_triton(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_files_stay_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def test_functions_stay_short():
    lengths = {
        f"{module}.{node.name}": node.end_lineno - node.lineno + 1
        for module, node in functions()
        if not is_triton(node)
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION}
    at_the_cap = {name: n for name, n in lengths.items() if n >= LONG_FUNCTION}
    assert len(at_the_cap) <= MOST_LONG, at_the_cap


def test_functions_take_few_arguments():
    """Recipes are lists of options, and the keywords of a public verb are its options."""
    offenders = {}
    public = {getattr(sc, name) for name in sc.__all__ if inspect.isfunction(getattr(sc, name))}
    verbs = {f"{f.__module__.removeprefix('sparsecraft.')}.{f.__name__}" for f in public}
    verbs |= {"conversion.stream.convert_files", "data.prepare.prepare"}  # documented doors too
    for module, node in functions():
        if module.startswith("recipes.") or is_triton(node):
            continue
        a = node.args
        count = len(a.posonlyargs + a.args + a.kwonlyargs)
        count -= bool(a.args) and a.args[0].arg in ("self", "cls")
        if f"{module}.{node.name}" in verbs:
            count -= len(a.kwonlyargs)
        if count > MAX_PARAMETERS:
            offenders[f"{module}.{node.name}"] = count
    assert not offenders, offenders


def test_no_room_for_leftovers():
    words = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not [m for m in MODULES if words & set(m.replace("_", ".").split("."))]


def test_every_module_and_public_class_says_what_it_is():
    missing = []
    for module, tree in TREES.items():
        if not ast.get_docstring(tree):
            missing.append(module)
        for node in tree.body:
            public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{module}.{node.name}")
    assert not missing, missing


def test_every_package_says_what_it_is_and_what_it_does_not_know():
    for path in sorted(SOURCE.rglob("*/__init__.py")):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and 2 <= len(doc.splitlines()) <= 9, path.relative_to(ROOT)


def test_library_modules_print_nothing():
    """Standard output belongs to the command line."""
    offenders = []
    for module, tree in TREES.items():
        if module.partition(".")[0] in ("cli", "__main__"):
            continue
        for node in ast.walk(tree):
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
        assert not (SOURCE / name).exists(), "a package shares the name of a public function"


def test_at_most_thirty_public_names():
    assert 10 < len(sc.__all__) <= 33 and len(set(sc.__all__)) == len(sc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = sc.convrt


@pytest.mark.parametrize("name", sc.recipes.__all__)
def test_every_recipe_has_a_function_a_page_and_a_case(name):
    from tests.cases import RECIPES

    function = getattr(sc.recipes, name)
    recipe = function()
    assert recipe.name == name and recipe.paper and recipe.title and recipe.stages
    assert any(case.make().name == name for case in RECIPES.values()), "no row in tests/cases"
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in function.__doc__, f"{name}({parameter}) is not documented"
    assert "Command: sparsecraft" in inspect.getmodule(function).__doc__
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
