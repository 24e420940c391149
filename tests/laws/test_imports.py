"""What an import costs: no torch until it is needed, little time, and names that editors see."""

from __future__ import annotations

import ast
import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import sparsecraft as sc
from sparsecraft.cli.console import Command
from sparsecraft.cli.main import VERBS

SOURCE = Path(__file__).parents[2] / "src" / "sparsecraft"
HEAVY = ("torch", "transformers", "peft")

# Seconds of processor time: twice what issue and README promise, as the clocks of CI are slow.
SECONDS = {"import": 2 * 0.1, "help": 2 * 0.2}
PROGRAMS = {
    "import": "import sparsecraft",
    "help": "from sparsecraft.cli.main import main; assert main(['--help']) == 0",
    "version": "from sparsecraft.cli.main import main; assert main(['--version']) == 0",
}


def run(program: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def loaded(program: str, names: tuple[str, ...] = HEAVY) -> set[str]:
    """Those of `names` that a program imports, in a process of its own."""
    program += "\nimport sys; print('loaded', *(n for n in NAMES if n in sys.modules))"
    return set(run(f"NAMES = {names!r}\n{program}").stdout.splitlines()[-1].split()[1:])


def test_the_check_sees_an_import():
    assert loaded("import sparsecraft.moe.routing, tyro", (*HEAVY, "tyro")) >= {"torch", "tyro"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_import_and_the_help_load_nothing_heavy(program):
    assert not loaded(PROGRAMS[program], (*HEAVY, "tyro", "rich"))


def test_help_imports_no_verb():
    verbs = tuple(f"sparsecraft.cli.{where.partition(':')[0]}" for where, _ in VERBS.values())
    assert not loaded(PROGRAMS["help"], verbs)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_imports_its_file_alone_and_no_torch(verb):
    files = {v: f"sparsecraft.cli.{where.partition(':')[0]}" for v, (where, _) in VERBS.items()}
    program = (
        "from sparsecraft.cli.main import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit as ended: assert ended.code == 0"
    )
    assert loaded(program, (*HEAVY, *files.values())) == {files[verb]}


@pytest.mark.parametrize("package", ["recipe", "recipes", "cli"])
def test_packages_without_torch(package):
    files = sorted((SOURCE / package).glob("*.py"))
    modules = [f"sparsecraft.{package}.{f.stem}" for f in files if f.stem != "__init__"]
    assert len(modules) > 5
    assert not loaded(f"import {', '.join(modules)}")


def seconds(program: str) -> float:
    """Processor time of a program, user and system: the least of several runs, files cached."""
    run(program)
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(program)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.mark.parametrize("program", SECONDS)
def test_an_import_and_the_help_take_little_processor_time(program):
    assert seconds(PROGRAMS[program]) < SECONDS[program]


def test_the_list_of_verbs_agrees_with_their_classes():
    for verb, (where, about) in VERBS.items():
        file, _, name = where.partition(":")
        module = importlib.import_module(f"sparsecraft.cli.{file}")
        kind = getattr(module, name)
        assert issubclass(kind, Command) and name.endswith("Command")
        assert kind.__doc__.splitlines()[0] == about, verb
        assert module.run.__doc__ and kind.__dataclass_params__.frozen


def typed_names() -> dict[str, str]:
    """Public name -> where a type checker finds it, from the TYPE_CHECKING block."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and "not" not in ast.unparse(node.test)
    )
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {}
    for node in block.body:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = ""
            continue
        for alias in node.names:
            assert alias.asname == alias.name, f"write `{alias.name} as {alias.name}`: re-exported"
            found[alias.name] = node.module.removeprefix("sparsecraft").removeprefix(".")
    return found


def test_a_type_checker_sees_the_public_names_where_they_are():
    modules = {name: home.rpartition(".")[0] for name, home in sc._MODULES.items()}
    assert typed_names() == sc._HOME | modules | {"__version__": ""}
    assert set(sc.__all__) == {*sc._HOME, *sc._MODULES} and sc.__version__


def test_a_type_checker_sees_no_name_that_is_not_there():
    """It takes a module's `__getattr__` for a module that has every name."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    assert "__getattr__" not in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    guarded = [n for n in tree.body if isinstance(n, ast.If) and "not" in ast.unparse(n.test)]
    assert [ast.unparse(node.test) for node in guarded] == ["not TYPE_CHECKING"]


def test_the_package_says_that_it_is_typed():
    assert (SOURCE / "py.typed").is_file()
    assert os.path.getsize(SOURCE / "py.typed") == 0
