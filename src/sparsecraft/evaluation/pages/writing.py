"""A report as one page, and its figures and numbers as files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from sparsecraft.checkpoint.replacing import adding
from sparsecraft.evaluation.pages.drawing import Drawing
from sparsecraft.recipe.formats import VERSION

PAGE, NUMBERS = "report.html", "metrics.json"


def write_report(
    metrics: dict[str, Any], drawn: list[Drawing], html: str, out: str | Path
) -> list[str]:
    """Write `report.html`, `metrics.json` and a PNG for each figure into a folder, and return the
    names of the files. Files of these names are replaced, others stay.

    Raises:
        CheckpointError: another process writes there, or the disk refuses.
    """
    with adding(out) as folder:
        (folder / PAGE).write_text(html, encoding="utf-8")
        (folder / NUMBERS).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
        for drawing in drawn:
            drawing.write(folder)
        return sorted(path.name for path in folder.iterdir())


def render(template: str, drawn: list[Drawing], title: str, **values: Any) -> str:
    """A template of this package, filled.

    Args:
        values: what it asks for beside its figures and title.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsecraft.evaluation", "pages"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "data": _data, "stem": lambda path: Path(path).stem}
    figures = {drawing.name: drawing for drawing in drawn}
    given = {"drawn": figures, "title": title, "version": VERSION}
    return environment.get_template(template).render(**given, **values)


def short(name: str) -> str:
    """A layer's name without what all have."""
    parts = [part for part in name.split(".") if part not in ("model", "layers", "base")]
    return ".".join(parts)


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
