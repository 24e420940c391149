"""No call of another library may run the code that a folder brings, or ask a terminal for leave."""

from __future__ import annotations

import ast

import pytest

from tests.laws.test_house import ROOT, SOURCE

# What takes trust_remote_code: readers of other libraries, by the last words of a call.
READERS = ("from_pretrained", "from_config", "pipeline")
NAMED = "trust_remote_code"
# Calls that take no such argument, and read a file that they name and nothing beside it.
WITHOUT = {"GenerationConfig.from_pretrained", "PeftModel.from_pretrained"}


def open_calls(source: str) -> list[str]:
    """Calls of readers in a file that do not say trust_remote_code=False."""
    tree = ast.parse(source)
    ours = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called = ast.unparse(node.func)
        if node.func.attr not in READERS or called in WITHOUT:
            continue
        said = {(word.arg, ast.unparse(word.value)) for word in node.keywords}
        passed = said & {(NAMED, "False"), (None, "NO_CODE")}
        if not passed and node.func.attr not in ours:
            found.append(f"line {node.lineno}: {called}")
    return found


def test_every_reader_is_called_without_leave_to_run_code():
    wrong = {
        str(path.relative_to(ROOT)): calls
        for path in sorted(SOURCE.rglob("*.py"))
        if (calls := open_calls(path.read_text()))
    }
    assert not wrong, wrong


@pytest.mark.parametrize(
    "call",
    [
        "AutoConfig.from_pretrained(folder)",
        "cls.from_pretrained(folder, dtype=d, trust_remote_code=True)",
        "transformers.AutoModel.from_config(config, **ways)",
    ],
)
def test_a_planted_call_is_seen(call):
    assert open_calls(f"def f():\n    return {call}\n")
    assert not open_calls("def f():\n    return Auto.from_pretrained(folder, **NO_CODE)\n")
