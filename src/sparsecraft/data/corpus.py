"""The demo corpus: three domains of short instructions, made from any CPython, with no download.

`math` is generated word problems with worked answers; `code` asks about the functions of the
standard library installed here, read from their source files (parsed, never imported); `general`
is the language reference that `pydoc` carries, and facts that small stdlib tables hold.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparsecraft.errors import DataError

LONGEST = 600  # characters of an answer: most rows stay under 200 tokens


class Item(NamedTuple):
    """One question. Items of one `group` (a function, a topic, a problem) share a split."""

    kind: str
    group: str
    question: str
    answer: str


def demo(out: str | Path, seed: int = 0, rows: int = 1000) -> dict[str, dict[str, Path]]:
    """Writes {math,code,general}.{train,heldout}.jsonl to `out`; gives domain -> split -> path.

    `rows` train rows and `rows // 10` held-out rows a domain, fewer where the standard library
    here holds less (`code`, `general`). Every row is {messages: [user, assistant]}. No held-out
    question or answer occurs in train, and a held-out function or topic does not either. The same
    seed on the same Python writes the same bytes. Takes a few seconds.

    Raises DataError for fewer than 10 rows, or where this Python has no library sources.
    """
    if rows < 10:
        raise DataError(f"rows is {rows}; the demo corpus needs at least 10 a domain.")
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, Path]] = defaultdict(dict)
    for domain, source in {"math": _math, "code": _code, "general": _general}.items():
        # A generator of its own per domain: one domain's rows never move another's.
        rng = random.Random(f"{domain} {seed}")
        splits = _split(list(source(rng, 2 * rows)), rows, rng)
        for split, items in splits.items():
            if not items:
                raise DataError(f"No {domain} rows: this Python lacks the library's source files.")
            path = paths[domain][split] = out / f"{domain}.{split}.jsonl"
            path.write_text("".join(map(_line, items)), encoding="utf-8")
    return dict(paths)


def _line(item: Item) -> str:
    turns = [("user", item.question), ("assistant", item.answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def _split(items: list[Item], rows: int, rng: random.Random) -> dict[str, list[Item]]:
    """`rows` for train, a tenth of it held out: whole groups, kinds evenly, no text in both."""
    queues: dict[str, list[Item]] = defaultdict(list)
    seen: set[str] = set()
    for item in rng.sample(items, len(items)):
        if not {item.question, item.answer} & seen:
            seen |= {item.question, item.answer}
            queues[item.kind].append(item)
    wanted, chosen = rows + rows // 10, []
    while len(chosen) < wanted and any(queues.values()):  # round the kinds, so that all have a say
        chosen += [queue.pop() for queue in queues.values() if queue]
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in chosen:
        groups[item.group].append(item)
    train, heldout, size = [], [], min(wanted, len(chosen)) // 11
    for items in rng.sample(list(groups.values()), len(groups)):
        (heldout if len(heldout) < size else train).extend(items)
    return {
        "train": rng.sample(train, min(rows, len(train))),
        "heldout": rng.sample(heldout, size),
    }


def _cap(text: str, longest: int = LONGEST) -> str:
    """`text`, cut at the last sentence or line that ends within `longest` characters."""
    if len(text) <= longest:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\n", text[: longest + 1])]
    return text[: ends[-1]].rstrip() if ends else ""


# ------------------------------------------------------------------ math
NAMES = (
    "Ada Ben Carla Dev Elif Femi Grace Hugo Ines Jonas Kira Liam Mina Noor Omar Paula Quinn Rosa "
    "Sami Tara Uma Victor Wanda Yusuf"
)
THINGS = (
    "apples books marbles stickers pencils coins cards shells buttons stamps cookies beads "
    "ribbons tickets flowers photos stones candles muffins pears"
)
BOXES = "boxes bags baskets crates jars trays"
# A question, the range of each number in it, and the steps of the answer, where [c = a + b] is
# worked out, shown as "2 + 3 = 5" and kept as c. Numbers that give a fraction or less than 1 are
# drawn again. The last step's value is the answer.
PROBLEMS = """\
{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?
a 5 90, b 5 60
{name} now has [c = a + b] {things}.

{name} fills {a} {boxes} with {b} {things} each and keeps {d} {things} loose. How many {things} \
does {name} have in all?
a 3 12, b 4 20, d 2 30
The {boxes} hold [c = a * b] {things}.
With the loose ones, {name} has [e = c + d] {things}.

{name} shares {a} {things} equally among {b} friends. How many {things} does each get?
a 12 144, b 3 12
Each friend gets [c = a / b] {things}.

A ticket costs ${a} and a drink costs ${b}. How many dollars does {name} pay for {d} tickets and \
{e} drinks?
a 6 25, b 2 6, d 2 8, e 2 8
The tickets cost [c = d * a] dollars.
The drinks cost [f = e * b] dollars.
Together {name} pays [g = c + f] dollars.

{name} has {a} {things}. {friend} has {b} times as many. How many {things} do they have together?
a 4 40, b 2 7
{friend} has [c = b * a] {things}.
Together they have [d = a + c] {things}.

{name} reads {a} pages a day for {b} days of a book of {d} pages. How many pages are left to \
read?
a 8 40, b 3 9, d 120 400
{name} has read [c = a * b] pages.
There are [e = d - c] pages left.

{name} buys {a} {boxes} of {things}. Each holds {b} {things}, and {d} {things} are broken. {name}\
 shares the rest equally with {friend}. How many {things} does {name} keep?
a 2 9, b 5 20, d 2 15
The {boxes} hold [c = a * b] {things}.
Without the broken ones there are [e = c - d] {things}.
{name} keeps [f = e / 2] {things}.

{name} saves ${a} a week. How many weeks does it take to save ${b}?
a 4 25, b 40 400
It takes [c = b / a] weeks.

{name} is {a} years old and {friend} is {b} years older. How old will {friend} be in {d} years?
a 6 50, b 2 30, d 2 20
{friend} is [c = a + b] years old.
In {d} years {friend} will be [e = c + d] years old.

A garden is {a} meters long and {b} meters wide. How many meters of fence go around it?
a 6 60, b 4 40
Length and width are [c = a + b] meters.
Around the garden go [d = 2 * c] meters of fence.

A shirt costs ${a}. In a sale it is ${d} cheaper. How many dollars do {b} shirts cost in the \
sale?
a 15 60, d 2 14, b 2 9
In the sale a shirt costs [c = a - d] dollars.
So {b} shirts cost [e = b * c] dollars.

{name} makes {a} {things} an hour and {friend} makes {b} an hour. How many {things} do they make \
together in {d} hours?
a 6 40, b 6 40, d 2 9
Together they make [c = a + b] {things} an hour.
In {d} hours they make [e = c * d] {things}.

{name} pays for {a} {things} at ${b} each with a ${d} bill. How many dollars of change does \
{name} get?
a 2 12, b 2 9, d 20 100
The {things} cost [c = a * b] dollars.
{name} gets [e = d - c] dollars of change.
"""


def _math(rng: random.Random, wanted: int) -> Iterator[Item]:
    problems = [problem.splitlines() for problem in PROBLEMS.strip().split("\n\n")]
    made = 0
    while made < wanted:
        kind = made % len(problems)
        question, ranges, *steps = problems[kind]
        if solved := _problem(rng, question, ranges, steps):
            made += 1
            yield Item(str(kind), solved[0], *solved)


def _problem(
    rng: random.Random, question: str, ranges: str, steps: list[str]
) -> tuple[str, str] | None:
    """Question and worked answer, or None where the numbers drawn do not come out whole."""
    name, friend = rng.sample(NAMES.split(), 2)
    words = {"things": rng.choice(THINGS.split()), "boxes": rng.choice(BOXES.split())}
    words |= {"name": name, "friend": friend}
    limits = (part.split() for part in ranges.split(", "))
    numbers = {key: rng.randint(int(low), int(high)) for key, low, high in limits}
    lines, last = [], 0
    for step in steps:
        before, target, left, sign, right, after = re.fullmatch(
            r"(.*)\[(\w) = (\w) (.) (\w)\](.*)", step
        ).groups()
        x, y = (numbers[term] if term in numbers else int(term) for term in (left, right))
        last = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign]
        if last < 1 or (sign == "/" and last * y != x):
            return None
        numbers[target] = last
        lines.append(f"{before}{x} {sign} {y} = {last}{after}")
    text = "\n".join([*lines, f"The answer is {last}."])
    return question.format(**words, **numbers), text.format(**words, **numbers)


# ------------------------------------------------------------------ code
# Tests, tools, tables and hundreds of tkinter's wrappers teach nothing that a user would ask for.
SKIPPED = re.compile(
    r"(test|tests|idle_test|idlelib|lib2to3|site-packages|dist-packages|encodings|ensurepip|"
    r"turtle|turtledemo|tkinter|distutils|pydoc_data|lib-dynload|config-.*|_.*)$"
)


def _code(rng: random.Random, wanted: int) -> Iterator[Item]:
    for name, arguments, summary, source in _functions():
        module, _, short = name.rpartition(".")
        method = arguments.startswith(("(self", "(cls"))
        text = f"```python\n{source}\n```"
        noun, where = ("method", f" of `{module}`") if method else ("function", "")
        pairs = {
            "what": (f"What does `{name}` do in Python?", f"`{name}`: {summary}"),
            "declared": (
                f"How is `{name}` declared in Python?",
                f"```python\ndef {short}{arguments}: ...\n```",
            ),
            "which": (
                f"Which {noun} of Python's `{module}` fits this description? {summary}",
                f"`{name}{arguments}` fits it.",
            ),
        }
        if source and len(source) <= LONGEST and source.count("\n") <= 14:
            question = f"Write the Python {noun} `{short}{arguments}`{where}. {summary}"
            pairs[f"write {noun}"] = (question, text)
        if source and len(source) <= LONGEST // 2:
            pairs["explain"] = (f"What does this code do?\n{text}", f"`{short}`: {summary}")
        yield from (Item(kind, name, *pair) for kind, pair in pairs.items())


def _functions() -> Iterator[tuple[str, ...]]:
    """(name, arguments, summary, source) of the library's documented public functions, by path."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(SKIPPED.match(part) for part in parts if part != "__init__"):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a few files of the library are broken or unreadable on purpose
        lines = source.splitlines()
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            prefix = module if owner is tree else f"{module}.{owner.name}"
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and (found := _function(node, prefix, lines)):
                    yield found


def _function(node: ast.FunctionDef, prefix: str, lines: list[str]) -> tuple[str, ...] | None:
    """One of them, its source empty where there is none to show; None if it is not one."""
    summary = (ast.get_docstring(node) or "").split("\n\n")[0]
    summary = _cap(" ".join(summary.replace("``", "`").split()) + " ", 160).strip()
    hidden = any(part.startswith("_") for part in (node.name, *prefix.split(".")))
    if hidden or not re.fullmatch(r"[A-Z].{20,}[.]", summary) or "eprecated" in summary:
        return None
    # The docstring is the first statement; the code is all before and after it.
    doc = node.body[0]
    code = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
    source = textwrap.dedent("\n".join(line for line in code if line.strip()))
    stub = len(node.body) == 1 or doc.lineno == node.lineno or "NotImplemented" in source
    source = "" if stub else source
    return f"{prefix}.{node.name}", f"({ast.unparse(node.args)})", summary, source


# ------------------------------------------------------------------ general
def _general(rng: random.Random, wanted: int) -> Iterator[Item]:
    yield from _topics()
    yield from _dates(rng, wanted // 4)
    yield from _tables()
    yield from _characters()


def _topics() -> Iterator[Item]:
    """Paragraphs of the language reference under their headings; none where it is not installed."""
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if not path.is_file():
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in ast.literal_eval(table).items():
        heading, described = topic, False
        blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()]
        for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
            lines = block.strip("\n").splitlines()
            if len(lines) == 2 and re.fullmatch(r"([*=~-])\1+", lines[1]):
                heading, described = lines[0].strip(), False
                continue
            term = re.fullmatch(r"(?:class |classmethod )?([\w.]+\([\w, *=.\[\]]*\))", lines[-1])
            if term and following.startswith("   ") and not lines[0].startswith(" "):
                if answer := _prose(following):
                    question = f"What is `{term[1]}` for in the Python language?"
                    yield Item("term", term[1], question, f"`{term[1]}`: {answer}")
            elif not described and not block.startswith(" ") and (answer := _prose(block)):
                described = True
                name = re.sub(r"[\"“”]", "`", heading)
                question = f"What does the Python reference say about: {name}?"
                yield Item("topic", name, question, answer)


def _prose(block: str) -> str:
    """A paragraph as one line of plain sentences, or nothing where it is a list or code."""
    text = " ".join(block.split())
    text = re.sub(r"\s*\[\d+\]|\s*\(see [^)]*\)", "", text).replace("“", '"').replace("”", '"')
    text = re.sub(r'"([^"]*)"', r"`\1`", text)
    text = _cap(re.sub(r"\*(\w[^*]*)\*", r"\1", text))
    good = re.fullmatch(r"[A-Z`].{60,}[.]", text) and not re.search(r"::=|>>>|\*\*\*|  ", text)
    return text if good else ""


def _dates(rng: random.Random, wanted: int) -> Iterator[Item]:
    """Questions about the calendar; the answers are computed."""
    import calendar
    from datetime import date, timedelta

    for number in range(wanted):
        day = date(1900, 1, 1) + timedelta(rng.randrange(73_000))  # to the end of the 21st century
        ahead, month = rng.randint(5, 60), f"{day:%B} {day.year}"
        text, later = (f"{d.day} {d:%B} {d.year}" for d in (day, day + timedelta(ahead)))
        last = calendar.monthrange(day.year, day.month)[1]
        leap = "a leap year" if calendar.isleap(day.year) else "not a leap year"
        question, answer = (
            (f"On which day of the week does {text} fall?", f"{text} falls on a {day:%A}."),
            (f"Which date is {ahead} days after {text}?", f"{ahead} days after {text} is {later}."),
            (f"How many days does {month} have?", f"{month} has {last} days; the year is {leap}."),
            (f"How is {text} written in ISO 8601?", f"{text} is written {day.isoformat()}."),
        )[number % 4]
        yield Item(f"date {number % 4}", question, question, answer)


def _tables() -> Iterator[Item]:
    """Facts that the standard library tabulates: HTTP, errno, MIME types, HTML entities."""
    import errno
    import html.entities
    import mimetypes
    import os
    from http import HTTPStatus

    for status in filter(lambda status: status.description, HTTPStatus):
        question = f"What does the HTTP status code {status.value} mean?"
        answer = f"{status.value} {status.phrase}: {status.description}."
        yield Item("http", status.name, question, answer)
    for number, name in sorted(errno.errorcode.items()):
        question = f"What does the system error {name} mean?"
        yield Item("errno", name, question, f"{name} is error {number}: {os.strerror(number)}.")
    # The private table is the module's own; the public one grows with the machine's files.
    for ending, kind in sorted(getattr(mimetypes, "_types_map_default", {}).items()):
        question = f"What is the MIME type of a file that ends in {ending}?"
        yield Item("mime", ending, question, f"A {ending} file has the MIME type {kind}.")
    for entity, point in sorted(html.entities.name2codepoint.items()):
        question = f"What does the HTML entity &{entity}; stand for?"
        answer = f"&{entity}; stands for {chr(point)}, the {_name(point)}."
        yield Item("entity", entity, question, answer)


def _characters() -> Iterator[Item]:
    """Names of letters and signs: Latin, Greek, Cyrillic, punctuation, arrows, mathematics."""
    for low, high in ((0xA1, 0x180), (0x391, 0x3CA), (0x410, 0x450), (0x2190, 0x2300)):
        for point in range(low, high):
            if name := _name(point):
                question = f"What is the Unicode character {chr(point)}?"
                answer = f"{chr(point)} is U+{point:04X}, the {name}."
                yield Item("character", name, question, answer)


def _name(point: int) -> str:
    import unicodedata

    name = unicodedata.name(chr(point), "").lower()
    return re.sub(r"^(latin|greek|cyrillic)", lambda match: match[0].title(), name)
