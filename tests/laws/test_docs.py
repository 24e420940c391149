"""The pages of docs/: printed from the code where they can be, and without a link to nothing."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

import sparsecraft as sc
from docs import generate
from tests.laws.test_house import SOURCE

ROOT = generate.ROOT
MARKDOWN = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
)
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")


@pytest.mark.parametrize("path", generate.PAGES)
def test_what_the_code_prints_is_what_the_page_says(path):
    assert (ROOT / path).read_text() == generate.page(path), "run `make docs`"


def test_a_page_without_its_markers_is_refused():
    once = "<!-- methods -->\nold\n<!-- /methods -->\n"
    assert generate.filled(once, "methods", "new") == once.replace("old", "new")
    for text in ("", once + once, "<!-- methods -->\n"):
        with pytest.raises(ValueError, match="once each"):
            generate.filled(text, "methods", "new")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}, which no heading is"


def test_every_path_and_module_that_a_page_names_is_there():
    said = "".join(page.read_text() for page in MARKDOWN if page.name != "CHANGELOG.md")
    paths = set(re.findall(r"`((?:src|tests|docs|examples)/[\w/]+\.\w+)`", said))
    tour = (ROOT / "docs" / "architecture.md").read_text()
    paths |= set(re.findall(r"`(\w[\w/]+/\w*\.py)`", tour))
    missing = [
        path
        for path in sorted(paths)  # NAME and KIND are the reader's
        if path == path.lower() and not any((at / path).exists() for at in (ROOT, SOURCE))
    ]
    assert not missing
    for name in sorted(set(re.findall(r"\bsparsecraft((?:\.[a-z]\w+)+)", said))):
        pkgutil.resolve_name(f"sparsecraft{name}")


def test_every_page_can_be_found_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    linked = set(LINK.findall(index))
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index.md"} <= linked


def test_every_recipe_has_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == set(sc.recipes.__all__)
