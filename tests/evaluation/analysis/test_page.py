"""The page opens without a network and says what the numbers say."""

from __future__ import annotations

import json
import re

import pytest

from sparsecraft.evaluation.analysis.analyze import analyze
from sparsecraft.evaluation.analysis.figures import FIGURES, drawings
from sparsecraft.evaluation.analysis.page import page, write_page
from tests import tiny
from tests.evaluation.analysis.test_analyze import mixture, of_rows


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = tiny.chat_rows(40)
    files = [
        tiny.write_rows(folder / f"{name}.jsonl", part)
        for name, part in (("a <b>", rows[:20]), ("c & d", rows[5:40]))
    ]
    return analyze(mixture(), files, tokenizer=tiny.tokenizer(), text="say <i> & red")


def test_files_and_what_they_hold(metrics, tmp_path):
    (tmp_path / "mine.txt").write_text("stays")
    written = write_page(metrics, drawings(metrics), tmp_path, "A title")
    assert {"report.html", "metrics.json", "load.png", "knowledge.png"} <= set(written)
    assert (tmp_path / "mine.txt").read_text() == "stays"
    assert json.loads((tmp_path / "metrics.json").read_text())["tokens"] == metrics["tokens"]
    text = (tmp_path / "report.html").read_text()
    pngs = [name for name in written if name.endswith(".png")]
    assert text.count("<img ") == len(pngs) == len(drawings(metrics))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pngs)


def test_it_needs_nothing_from_elsewhere_and_escapes_what_is_given(metrics):
    text = page(metrics, drawings(metrics), "<script>alert(1)</script>")
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert "<script>alert" not in text and "a &lt;b&gt;" in text
    assert "say <i>" not in text


def test_figures_say_the_numbers(metrics):
    drawn = {drawing.name: drawing for drawing in drawings(metrics)}
    loads = [
        share * layer["experts"] for layer in metrics["layers"].values() for share in layer["load"]
    ]
    assert f"{min(loads):.2f} to {max(loads):.2f}" in drawn["load"].says
    assert len(FIGURES) >= len(drawn) >= 7
    assert all(drawing.title and drawing.says.endswith(".") for drawing in drawn.values())


@pytest.mark.parametrize("change", ["one domain", "interrupted", "nothing but loads"])
def test_less_to_say(change, metrics, tmp_path):
    """A page for what little there is."""
    rows = tiny.write_rows(tmp_path / "a.jsonl", tiny.chat_rows(3))
    found = analyze(of_rows(), rows, tokenizer=tiny.tokenizer(), twin=False, drop=False)
    if change == "nothing but loads":
        kept = {"experts", "load", "load_by_domain", "load_entropy", "dead", "overloaded"}
        found["layers"] = {
            name: {key: value for key, value in layer.items() if key in kept}
            for name, layer in found["layers"].items()
        }
        found |= {"following": [], "paths": None}
    written = write_page(found, drawings(found), tmp_path / "out", "little")
    assert "load.png" in written and "knowledge.png" not in written
