"""What of a source arrived in the model, and what did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sparsecraft.conversion.sources.source import Source
from sparsecraft.errors import SourceError
from sparsecraft.moe.names import pattern_of


def arrivals(sources: Iterable[Source], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Source -> how many tensors it has (of a LoRA: changes), how many of them were used, and by
    the pattern of their names how many were not.

    Args:
        names: of the weights of a dense model.

    Raises:
        SourceError: nothing arrived of a LoRA.
    """
    names = list(names)
    return {source.name: arrival(source, names) for source in sources}


def arrival(source: Source, names: Iterable[str]) -> dict[str, Any]:
    """Of one source; see `arrivals`."""
    held = sorted(names if source.changes is None else source.changes)
    unused = [name for name in held if name not in source.used]
    if source.changes is not None and held and len(unused) == len(held):
        raise SourceError(
            f"Nothing of {source.name!r} arrives: it changes {', '.join(held[:2])} "
            f"({len(held)} tensors in all), and the recipe takes none of them from a source. "
            "Convert by a recipe that has LoRAs there (molora), with others='mean', or merge the "
            "LoRA into the base first."
        )
    return {
        "tensors": len(held),
        "used": len(held) - len(unused),
        "unused": dict(Counter(map(pattern_of, unused))),
    }
