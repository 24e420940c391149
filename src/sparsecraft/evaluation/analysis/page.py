"""A report as one page that opens without a network, and its figures and numbers as files."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsecraft.checkpoint.replacing import adding
from sparsecraft.evaluation.analysis.drawing import Drawing
from sparsecraft.evaluation.analysis.figures import drawings, short
from sparsecraft.recipe.formats import VERSION

PAGE, NUMBERS = "report.html", "metrics.json"
WORDS = 8  # of an expert's vocabulary on the page


def write_report(metrics: dict[str, Any], out: str | Path, title: str) -> list[str]:
    """Write `report.html`, `metrics.json` and a PNG for each figure into a folder, and return the
    names of the files. Files of these names are replaced, others stay.

    Raises:
        CheckpointError: another process writes there, or the disk refuses.
    """
    drawn = drawings(metrics)
    with adding(out) as folder:
        (folder / PAGE).write_text(page(metrics, drawn, title), encoding="utf-8")
        (folder / NUMBERS).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
        for drawing in drawn:
            drawing.write(folder)
        return sorted(path.name for path in folder.iterdir())


def page(metrics: dict[str, Any], drawn: list[Drawing], title: str) -> str:
    from jinja2 import Environment, StrictUndefined

    source = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"short": short, "data": _data, "stem": lambda path: Path(path).stem}
    paired = {name: layer for name, layer in metrics["layers"].items() if layer.get("together")}
    return environment.from_string(source).render(
        metrics=metrics, drawn={drawing.name: drawing for drawing in drawn}, title=title,
        version=VERSION, rows=layer_rows(metrics), words=WORDS, paired=paired,
    )  # fmt: skip


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


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
