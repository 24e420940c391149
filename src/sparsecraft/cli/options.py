"""The options of a conversion, as flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Paths = tuple[str, ...]


@dataclass(kw_only=True)
class ConvertOptions:
    """What `sparsecraft convert` takes beside the recipe's own parameters."""

    model: str
    """Local folder, hub id, or the packaged `smollm2`."""
    out: Path
    """Checkpoint folder to write."""
    sources: tuple[str, ...] = ()
    """Dense models of one ancestor with `--model` that give the experts; or PEFT LoRAs."""
    unrelated: bool = False
    """Join sources even if they have no common ancestor, LoRAs even if trained on another base."""
    domains: tuple[str, ...] = ()
    """Files or data sets that the routers start from, one for each expert, in their order."""
    prompts: tuple[str, ...] = ()
    """Prompts instead of `--domains`, one argument for each expert: `one|another|a third`."""
    data: tuple[str, ...] = ()
    """Files whose rows enter the certificate beside random tokens."""
    set: tuple[str, ...] = ()
    """Deeper fields of the recipe, such as `router.temperature=0.5`."""
    match_params: str | None = None
    """Set the recipe's size (its rank, or an adapter's width) so that it trains as many parameters
    as another recipe: `mov`, `molora:num_experts=5,rank=4`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the dense model; auto keeps its own."""
    device: str = "cpu"
    """Where to convert."""
    standalone: bool = False
    """Hold the base's tensors too, so that the folder needs nothing else."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""
    seed: int = 0
    """Of the new parameters."""
    certify: bool = True
    """Measure how far the converted model is from the dense one."""
    shard_size: float = 5.0
    """Gigabytes (10^9 bytes) of one file; larger checkpoints are several files with an index."""
    stream: bool = False
    """Convert tensor by tensor, for models that do not fit into memory: experts that are copies,
    sources' networks, or small. The certificate then compares layer by layer."""
    resume: bool = False
    """Of `--stream`: go on with an interrupted conversion."""
    progress: bool = True
    """Of `--stream`: show a progress bar on standard error."""


MULTIPLE = (
    "--set",
    "--data",
    "--old-data",
    "--sources",
    "--domains",
    "--prompts",
    "--weights",
    "--choice",
    "--tasks",
    "--trackers",
    "--stages",
)


def gathered(argv: list[str]) -> list[str]:
    """`--set a=1 --set b=2` as `--set a=1 b=2`: of a repeated option only the last would count.

    Everything but the options that take several values stays as it is.
    """
    groups: list[list[str]] = [[]]
    several: dict[str, list[str]] = {}
    target = groups[0]
    for word in argv:
        name, equals, value = word.partition("=")
        if name in MULTIPLE:
            if name not in several:
                several[name] = [name]
                groups.append(several[name])
            target = several[name]
            target.extend([value] if equals else [])
        else:
            if word.startswith("--"):
                target = []
                groups.append(target)
            target.append(word)
    return [word for group in groups for word in group]
