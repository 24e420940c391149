"""What the tables and the figure show of numbers that are given."""

from __future__ import annotations

import pytest
from rich.console import Console

from sparsecraft.evaluation.comparison.compare import ALL
from sparsecraft.evaluation.comparison.page import drawing, labels, page, rows, sentences, tables


def metrics(*names: str) -> dict:
    """Models that lose a little more, each, than the one before."""
    models = []
    for number, name in enumerate(names):
        one = {"difference": 0.1 * number, "low": 0.1 * number - 0.02, "high": 0.1 * number + 0.02}
        found = {"a": one | {"verdict": "higher"}, ALL: one | {"verdict": "higher"}}
        models.append(
            {
                "name": name, "total": 134_500_000, "active": 90_000_000, "bytes": 538_000_000,
                "flops_per_token": 10**9 * (number + 1), "tokens_per_second": 123.4,
                "loss": {"a": 2.0, ALL: 2.0}, "difference": found if number else None,
                "experts": [4, 8] if number else [], "experts_per_token": [2] if number else [],
                "machine": "a machine.",
            }
        )  # fmt: skip
    counts = {"rows": 30, "labels": 900, "dropped": 0}
    return {"models": models, "files": {"a": counts, ALL: counts}, "notes": []}


def test_names_are_short_where_they_stay_apart():
    assert labels(metrics("runs/a", "runs/b/")) == ["a", "b"]
    assert labels(metrics("one/moe", "two/moe")) == ["one/moe", "two/moe"]


def test_rows_and_sentences():
    first, second = rows(metrics("a", "b"))
    assert first["loss is"] == "baseline" and first["difference"] is first["experts"] is None
    assert second["experts"] == "4-8" and second["of a token"] == "2"
    assert second["MFLOPs a token"] == 2000 and second["weights, MB"] == 538
    said = "+0.1000 nats per label against a; the 95 % interval, +0.0800 to +0.1200, excludes zero"
    assert sentences(metrics("a", "b")) == [f"b: {said}: its loss is higher."]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_is_broken(width):
    (table,) = tables(metrics("a", "b", "c"), width)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    assert all(number in captured.get() for number in ("134.5", "+0.2200", "2,000.0"))


def test_the_figure_labels_every_point_also_where_they_lie_together(monkeypatch):
    from matplotlib.axes import Axes

    said, real = [], Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda *a, **k: said.append(a[1]) or real(*a, **k))
    given = metrics("a", *"bcdefgh")
    for model in given["models"]:
        model["flops_per_token"] = 10**9
        for found in (model["difference"] or {}).values():
            found |= {"difference": 0.01, "low": 0.0, "high": 0.03}
    drawn = drawing(given)
    assert set(said) == {"a (baseline)", *"bcdefgh"}
    assert drawn.light != drawn.dark and drawn.says.startswith("b: ")


def test_the_page_escapes_names():
    given = metrics("<script>alert(1)</script>a", "b")
    assert "<script>alert" not in page(given, drawing(given))
