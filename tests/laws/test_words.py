"""Plain words: what has a name in the field goes by that name, in code, pages and messages."""

from __future__ import annotations

import re

import pytest

from tests.laws.test_house import ROOT

PLAIN = {  # a private word -> what to write in its place
    "newcomer": "the added expert",
    "newcomers": "added experts",
    "giver": "source",
    "givers": "sources",
    "told": "given, directed, known",
    "dealt out": "assigned (rows), partitioned (neurons)",
    "deals out": "assigns",
    "so many": "the number of",
    "whoever": "what",
    "nobody": "nothing",
    "somebody": "something",
}
PAGES = ("README.md", "docs/index.md", "docs/architecture.md", "docs/format.md")
FOLDERS = (("src", "*.py"), ("docs/methods", "*.md"), ("docs/guides", "*.md"))


def pattern(word: str) -> re.Pattern[str]:
    """The word by itself, or as one of the words of a name such as `newcomer_row`."""
    spaced = r"[\s_]+".join(word.split())
    return re.compile(rf"(?<![a-z0-9]){spaced}(?![a-z0-9])", re.IGNORECASE)


def private_words(text: str) -> list[str]:
    return [word for word in PLAIN if pattern(word).search(text)]


def test_pages_and_source_say_it_in_the_words_of_the_field():
    files = [ROOT / name for name in PAGES]
    files += [path for folder, kind in FOLDERS for path in (ROOT / folder).rglob(kind)]
    found = {str(f.relative_to(ROOT)): private_words(f.read_text()) for f in files}
    found = {name: {word: PLAIN[word] for word in words} for name, words in found.items() if words}
    assert not found, found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def newcomer_row(x): ...", ["newcomer"]),
        ("Rows are Dealt\nout to experts.", ["dealt out"]),
        ("A giver, nobody's.", ["giver", "nobody"]),
        ("Caregivers retold it; rows are dealt.", []),
    ],
)
def test_a_planted_word_is_seen(text, words):
    assert private_words(text) == words
