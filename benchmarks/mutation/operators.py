"""Faults that are made from a file's syntax tree: one small change of its text each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "*",
}  # fmt: skip
# Methods that a tensor or a table gives, and what is called in their place; None: nothing.
METHODS = {
    "clamp_min": None, "clone": None, "detach": None, "double": None, "float": None,
    "mean": "sum", "sum": "mean", "amax": "amin", "max": "min", "any": "all", "all": "any",
    "sort": None, "square": None, "abs": None, "softmax": "log_softmax",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: below `src/sparsecraft`.
        line: where it is, from 1.
        start: offset of the replaced text, in characters.
        old: that text.
        new: what stands in its place.
        about: in words, for one that a person thought of.
    """

    file: str
    line: int
    start: int
    old: str
    new: str
    about: str = ""

    def __str__(self) -> str:
        return self.about or f"`{flat(self.old)}` -> `{flat(self.new)}`"

    def text(self, source: str) -> str:
        """The file with the change.

        Raises:
            ValueError: the file has another text there.
        """
        end = self.start + len(self.old)
        if source[self.start : end] != self.old:
            raise ValueError(f"{self.file}:{self.line} has changed since this mutant was made")
        return source[: self.start] + self.new + source[end:]


def flat(text: str) -> str:
    return " ".join(text.split())[:70]


def mutants(root: Path, file: str) -> list[Mutant]:
    """All changes of one file, in the order of its text."""
    source = (root / file).read_text()
    tree = ast.parse(source)
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def place(node: ast.AST) -> tuple[int, int]:
        first, last = source.splitlines()[node.lineno - 1], source.splitlines()[node.end_lineno - 1]
        begin = len(first.encode()[: node.col_offset].decode())
        end = len(last.encode()[: node.end_col_offset].decode())
        return starts[node.lineno - 1] + begin, starts[node.end_lineno - 1] + end

    found = []
    for node in _code(tree):
        for left, right, new in _changes(node, place, source):
            old = source[left:right]
            if old != new and _parses(source[:left] + new + source[right:]):
                line = source.count("\n", 0, left) + 1
                found.append(Mutant(file, line, left, old, new))
    return sorted(set(found), key=lambda m: (m.start, m.new))


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that a program runs: no words for the reader, no type checker's branch."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.arg) or (isinstance(node, ast.AnnAssign) and node.value is None):
            continue
        yield node
        if isinstance(node, ast.AnnAssign):
            yield from (node.value, *_code(node.value))
        elif not isinstance(node, ast.Raise):  # its words; the whole of it may go
            yield from _code(node)


def _changes(node: ast.AST, place, source: str) -> Iterator[tuple[int, int, str]]:
    left, right = place(node) if hasattr(node, "lineno") else (0, 0)
    match node:
        case ast.Compare(ops=[op], left=a, comparators=[b]) if type(op) in COMPARISONS:
            yield place(a)[1], place(b)[0], f" {COMPARISONS[type(op)]} "
        case ast.BinOp(left=a, op=op, right=b) if type(op) in ARITHMETIC:
            between = source[place(a)[1] : place(b)[0]]
            signs = between.strip("() \n")
            if signs and between.count(signs) == 1:
                at = place(a)[1] + between.index(signs)
                yield at, at + len(signs), ARITHMETIC[type(op)]
        case ast.BoolOp(op=op, values=[a, b, *_]):
            word, other = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
            between = source[place(a)[1] : place(b)[0]]
            if between.count(word) == 1:
                at = place(a)[1] + between.index(word)
                yield at, at + len(word), other
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=a):
            yield left, place(a)[0], ""
        case ast.Constant(value=bool(value)):
            yield left, right, str(not value)
        case ast.Constant(value=int(value)):
            yield left, right, str(value + 1)
        case ast.Constant(value=float(value)):
            yield left, right, repr(value * 2 + (value == 0))
        case ast.Call(func=ast.Attribute(value=of, attr=name)) if name in METHODS:
            other = METHODS[name]
            yield (
                place(of)[1],
                right,
                "" if other is None else source[place(of)[1] : right].replace(name, other, 1),
            )
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield left, right, "pass"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield *place(test), "False"


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
