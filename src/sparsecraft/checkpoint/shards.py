"""A checkpoint's tensors in one file or, when they are large, in several with an index.

moe.safetensors                                       up to the limit
moe-00001-of-00003.safetensors, ...,                  beyond it
moe.safetensors.index.json    {"metadata": {"total_size"}, "weight_map": {tensor: file}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.jsonfile import read_json, write_json
from sparsecraft.checkpoint.tensorfile import Writable, size_of
from sparsecraft.dense.digests import combine
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.errors import CheckpointError

# Bytes of one file, as on the hub. A single tensor may be larger.
SHARD_SIZE = 5_000_000_000

Digests = dict[str, str]


def split(tensors: Mapping[str, Writable], stem: str, limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in their order.

    Raises:
        CheckpointError: the limit is not positive.
    """
    if limit <= 0:
        raise CheckpointError(f"The shard size is {limit} bytes; it must be positive.")
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + size_of(tensor) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += size_of(tensor)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    count = len(groups)
    return {f"{stem}-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def write(
    path: Path,
    tensors: Mapping[str, Writable],
    limit: int = SHARD_SIZE,
    finished: Mapping[str, Digests] | None = None,
    on_finish: Callable[[str, Digests], None] = lambda file, digests: None,
) -> str:
    """Write `tensors` as `path`, or as shards beside it; return the digest of them all.

    Args:
        limit: bytes of one file.
        finished: file name -> digests of its tensors, of files that are there already.
        on_finish: called with every other file once it has been read back.

    Raises:
        CheckpointError: the disk gives back other bytes than were written.
    """
    digests, finished = {}, finished or {}
    files = split(tensors, path.stem, limit)
    for file, names in files.items():
        if file in finished:
            digests |= finished[file]
            continue
        found = tensorfile.write_each(path.parent / file, {name: tensors[name] for name in names})
        on_finish(file, found)
        digests |= found
    if len(files) > 1:
        total = sum(size_of(tensor) for tensor in tensors.values())
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(_index(path), {"metadata": {"total_size": total}, "weight_map": weight_map})
    return combine(digests)


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of what `write` wrote as `path`, one at a time, on the CPU.

    Raises:
        CheckpointError: a file is missing, truncated, or no safetensors file.
    """
    for file in files_of(path):
        yield from tensorfile.read(file)


def changed(path: Path, known: Mapping[str, str] | None) -> dict[str, str]:
    """The name of each file of what `write` wrote as `path` that holds other tensors, as far as
    that is known -> that it has changed.

    Args:
        known: the digest of each of several files.
    """
    files = [file for file in files_of(path) if file.name in (known or {})]
    others = [f.name for f in files if combine(tensorfile.read_digests(f)) != known[f.name]]
    return dict.fromkeys(others or [path.name], "has changed")


def digest(path: Path) -> str:
    """The digest of all tensors of what `write` wrote as `path`.

    Raises:
        CheckpointError: a file is missing, truncated, or no safetensors file.
    """
    return combine(
        {n: d for file in files_of(path) for n, d in tensorfile.read_digests(file).items()}
    )


def readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """Name of each tensor of what `write` wrote as `path` -> what reads it."""
    found = {}
    for file in files_of(path):
        opened = SafeFile.open(file, CheckpointError)
        found |= {name: partial(opened.read, name) for name in opened.entries}
    return found


def extent(path: Path) -> tuple[int, int]:
    """How many tensors the files hold, and their bytes."""
    files = files_of(path)
    count = sum(len(SafeFile.open(file, CheckpointError).entries) for file in files)
    return count, sum(file.stat().st_size for file in files)


def files_of(path: Path) -> list[Path]:
    """The files that hold what `write` wrote as `path`."""
    if not _index(path).is_file():
        return [path]
    weight_map = read_json(_index(path)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{_index(path)} has no weight_map; copy or save the folder again.")
    for file in weight_map.values():
        if not (isinstance(file, str) and file.startswith("moe") and Path(file).name == file):
            raise CheckpointError(
                f"{_index(path)} names {file!r:.80} as a file, which is none of the folder; copy "
                "or save the folder again."
            )
    return [path.parent / file for file in dict.fromkeys(weight_map.values())]


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")
