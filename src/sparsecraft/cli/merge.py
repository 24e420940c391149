"""The command `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sparsecraft.cli.budget import Budget, set_for
from sparsecraft.cli.console import quiet, say
from sparsecraft.cli.options import Paths


def merge(
    folder: Positional[str],
    out: Path,
    how: Literal["exact", "fixed", "average"] = "exact",
    weights: str | None = None,
    data: Paths = (),
    partial: bool = False,
    budget: Budget | None = None,
    overwrite: bool = False,
) -> None:
    """Merge the experts of a checkpoint into dense weights, or into one adapter.

    Args:
        folder: checkpoint of a converted model.
        out: folder to write; of a plain transformers model where no layer is left.
        how: exact; fixed, with the routing frozen to `--weights`; average, an approximation.
        weights: for fixed: 0.5,0.3,0.2 for the experts of every layer, or `measured` on the data.
        data: held-out files; their loss before and after is printed.
        partial: merge what can be merged and keep the other layers, instead of refusing.
        budget: of a split model before the merge: 1.0, its dense function, is what can be merged.
        overwrite: replace an existing folder once the new one is complete.
    """
    from sparsecraft.checkpoint.folder import check_free
    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.conversion.merging.merge import merge as merge_model
    from sparsecraft.conversion.merging.merge import read_weights, write_merged

    quiet()
    given = read_weights(weights)
    check_free(out, overwrite)
    model, tokenizer = load_any(folder)
    set_for(model, budget)
    report = merge_model(
        model, how, weights=given, data=data or None, tokenizer=tokenizer, partial=partial
    )
    write_merged(model, out, report, source=folder, overwrite=overwrite)
    say(f"{report}\nSaved and read back: {out}")
