"""What PEFT calls the tensors of our layers, and where they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sparsecraft.dense.sites import Site
from sparsecraft.errors import CheckpointError

PREFIX = "sparsecraft_"
HELD = "sparsecraft_moe"  # the attribute in which a layer has its adapters
Standing = tuple[tuple[str, ...], int]  # the dense modules, and the level above them
WRAPPED = "base_model.model."  # what PeftModel puts before the names of the dense model


def standings(sites: list[Site]) -> list[Standing]:
    """Which layer holds the part of an adapter at each of its sites, inner ones first."""
    levels: Counter = Counter()
    found = []
    for site in sites:
        found.append((site.members, levels[site.members]))
        levels[site.members] += 1
    return found


def standing_paths(sites: list[Site]) -> list[str]:
    """Where a layer stands for each of `sites`, inner ones first, when all of them do."""
    paths = []
    for index, site in enumerate(sites):
        path = site.path
        for outer in sites[index + 1 :]:
            if outer.contains(site) or outer.members == site.members:
                path = _below(outer, path)
        paths.append(path)
    return paths


def _below(outer: Site, path: str) -> str:
    """The new path of what is at `path` once a layer stands at `outer`."""
    parts = {member: f".{name}" for name, member in outer.chain} or {outer.path: ""}
    for member, name in parts.items():
        if path == member or path.startswith(f"{member}."):
            return f"{outer.path}.base_layer{name}{path.removeprefix(member)}"
    return path


def check_complete(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Raise CheckpointError unless the names in a file are those that the recipe has."""
    found, wanted = {name for name in found if f".{HELD}." in name}, set(wanted)
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds besides")):
        if names:
            raise CheckpointError(
                f"{where} does not fit its recipe and this model: it {verb} {len(names)} tensors, "
                f"{min(names)!r} among them. Load it into the model that it was made for."
            )
