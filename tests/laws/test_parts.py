"""A part answers for itself: nothing outside of the parts' own packages asks for its kind.

No `hasattr`; no `isinstance` of a bank of experts, of a scorer or of the dataclass that describes
one, nor a `case` of their class; no comparison of a `kind` or a `place`, nor a `match` on one.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from sparsecraft.moe.experts.build import BANKS
from sparsecraft.recipe.experts import ExpertsSpec

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "sparsecraft"

# Where the parts stand, and what asks which of them stand together.
OWN = ("moe/experts/", "moe/routers/", "moe/places.py", "moe/fusions.py", "moe/layer.py")

# The kinds and their abstract classes; `object` and torch's stay out.
CLASSES = {
    cls.__name__
    for part in (*BANKS, *BANKS.values())
    for cls in inspect.getmro(part)
    if cls.__module__.startswith("sparsecraft.")
} | {ExpertsSpec.__name__}

WORDS = ("kind", "place")

# (file, what it asks) -> why it may.
EXCEPTIONS = {
    ("recipe/edits.py", "self.place"): "an edit answers for its own word",
    ("recipe/edits.py", "edit.place"): "an edit refuses words of its own that go badly together",
    ("dense/donors.py", "site.kind"): "the view of a dense module follows from its site's word",
    # What others' objects have:
    ("data/batches.py", "hasattr(batch, 'keys')"): "whatever a user's loader gives",
    ("dense/donors.py", "hasattr(module, 'num_key_value_groups')"): "families differ",
    ("dense/loading.py", "hasattr(config, 'named_modules')"): "a model is no configuration",
    ("dense/tokens.py", "hasattr(model, 'get_encoder')"): "classes of transformers differ",
    ("dense/tokens.py", "hasattr(model, 'can_generate')"): "classes of transformers differ",
    ("surgery/rectify.py", "hasattr(m, 'config')"): "classes of transformers differ",
    ("surgery/rectify.py", "hasattr(config, setting.name)"): "configurations differ",
}


def _names(node: ast.AST) -> set[str]:
    """The last names of all expressions in a tuple or an alternative of classes."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Name):
        return {node.id}
    return set().union(*map(_names, ast.iter_child_nodes(node)))


def _is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in WORDS


def _aliases(tree: ast.AST) -> set[str]:
    """Names that a file gives to what it has read of a part."""
    given = (node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.NamedExpr)))
    targets = (
        target
        for node in given
        if any(map(_is_word, ast.walk(node.value))) and not isinstance(node.value, ast.JoinedStr)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    )
    return {
        part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
    }


def _compared(node: ast.AST) -> list[ast.AST]:
    """What a comparison by value, or a match, asks."""
    if isinstance(node, ast.Match):
        subject = node.subject
        return subject.elts if isinstance(subject, ast.Tuple) else [subject]
    if not isinstance(node, ast.Compare):
        return []
    asked, sides = [], [node.left, *node.comparators]
    for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
        if isinstance(operator, (ast.Eq, ast.NotEq)):
            asked += [left, right]
        if isinstance(operator, (ast.In, ast.NotIn)):
            asked.append(left)
    return [part for side in asked for part in getattr(side, "elts", [side])]


def _types_asked(node: ast.AST) -> set[str]:
    """Names of classes that `isinstance`, `issubclass`, `type(x) is` or a `case` ask for."""
    if isinstance(node, ast.Call) and _names(node.func) & {"isinstance", "issubclass"}:
        return _names(node.args[1])
    if isinstance(node, ast.MatchClass):
        return _names(node.cls)
    if isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
        return set().union(*map(_names, node.comparators))
    return set()


def asked(text: str) -> list[str]:
    """What a file asks of parts, or of anything by `hasattr`, in its own words."""
    tree, found = ast.parse(text), []
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _names(node.func) == {"hasattr"}:
            found.append(ast.unparse(node))
        found += sorted(_types_asked(node) & CLASSES)
        sides = [s for s in _compared(node) if _is_word(s) or ast.unparse(s) in aliases]
        found += map(ast.unparse, sides)
    return found


def _questions() -> list[tuple[str, str]]:
    files = (path.relative_to(SOURCE).as_posix() for path in sorted(SOURCE.rglob("*.py")))
    outside = (file for file in files if not file.startswith(OWN))
    return [(file, question) for file in outside for question in asked((SOURCE / file).read_text())]


def test_nothing_outside_of_the_parts_asks_for_their_kind():
    wrong = [f"{file}: {q}" for file, q in _questions() if (file, q) not in EXCEPTIONS]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_needed():
    assert not (unused := sorted(set(EXCEPTIONS) - set(_questions()))), unused


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("isinstance(layer.experts, FFNExperts)", "FFNExperts"),
        ("isinstance(x, (int, split.SplitExperts))", "SplitExperts"),
        ("isinstance(x, Tensor | CopiedExperts)", "CopiedExperts"),
        ("issubclass(t, Experts)", "Experts"),
        ("type(bank) is VectorExperts", "VectorExperts"),
        ("isinstance(edit.experts, LoRASpec)", "LoRASpec"),
        ("edit.experts.kind == 'ffn'", "edit.experts.kind"),
        ("'ffn' != spec.kind", "spec.kind"),
        ("spec.kind in ('ffn', 'split')", "spec.kind"),
        ("layer.place not in PLACES", "layer.place"),
        ("(layer.place, layer.rows) == ('beside', None)", "layer.place"),
        ("hasattr(scorer, 'rows')", "hasattr(scorer, 'rows')"),
    ],
)
def test_a_planted_question_is_seen(line, found):
    assert asked(f"def f():\n    return {line}\n") == [found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("match spec.kind:\n    case 'ffn': pass\n", ["spec.kind"]),
        ("match layer.place, 1:\n    case 'beside', 1: pass\n", ["layer.place"]),
        ("match bank:\n    case LoRAExperts(): pass\n", ["LoRAExperts"]),
        ("spec, at = edit.experts, edit.place\nif at == 'after': pass\n", ["at"]),
        ("if (word := spec.kind) and word in KINDS: pass\n", ["word"]),
        ("match bank:\n    case Update(): pass\n", []),
        ("for place in range(3): print(spec.kind, f'{spec.kind!r} at {layer.place}')\n", []),
        ("known = KINDS[spec.kind]\n", []),
        ("wanted = place is None or len(place) == 3\n", []),
    ],
)
def test_matches_are_seen_and_words_that_are_printed_are_not(text, found):
    assert asked(text) == found
