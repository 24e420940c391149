"""The page on what experts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsecraft.evaluation.pages.drawing import Drawing
from sparsecraft.evaluation.pages.writing import render, short, write_report

WORDS = 8  # of an expert's vocabulary on the page


def write_page(
    metrics: dict[str, Any], drawn: list[Drawing], out: str | Path, title: str
) -> list[str]:
    """Write a report of what `analyze` found, with its `drawings`; see `write_report`."""
    return write_report(metrics, drawn, page(metrics, drawn, title), out)


def page(metrics: dict[str, Any], drawn: list[Drawing], title: str) -> str:
    paired = {name: layer for name, layer in metrics["layers"].items() if layer.get("together")}
    values = {"metrics": metrics, "rows": layer_rows(metrics), "words": WORDS, "paired": paired}
    return render("experts.html.j2", drawn, title, **values)


def layer_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of layers, a column each; None where a layer has no such measure."""
    found = []
    for name, layer in metrics["layers"].items():
        known = layer.get("domain_information") or {}
        entropy = layer.get("entropy") or {}
        found.append(
            {
                "layer": short(name),
                "experts": layer["experts"],
                "load entropy": layer["load_entropy"],
                "dead": len(layer["dead"]),
                "overloaded": len(layer["overloaded"]),
                "H_s": entropy.get("H_s"),
                "H_u": entropy.get("H_u"),
                "I(expert; domain)": known.get("bits"),
                "chance": known.get("chance"),
                "p": known.get("p"),
                "random twin": layer.get("domain_information_of_twin"),
            }
        )
    return found
