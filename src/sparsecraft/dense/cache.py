"""The hub's cache: which commits of which models are on this disk.

CACHE/models--OWNER--NAME/snapshots/COMMIT/...     files of one commit
CACHE/models--OWNER--NAME/refs/BRANCH              the commit that a branch was at
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

KIND, SNAPSHOTS = "models", "snapshots"


class Snapshot(NamedTuple):
    """A folder of the cache: a hub id, the commit, and the folder below it, "" for the whole."""

    id: str
    commit: str
    subfolder: str = ""


def snapshot_in(folder: Path) -> Snapshot | None:
    """What a path says that lies in some hub cache, whether it is there or not; else None."""
    parts = folder.parts
    for i, (repository, word, commit) in enumerate(zip(parts, parts[1:], parts[2:], strict=False)):
        kind, *name = repository.split("--")
        if kind == KIND and name and word == SNAPSHOTS:
            return Snapshot("/".join(name), commit, "/".join(parts[i + 3 :]))
    return None


def snapshot_of(
    name: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path | None:
    """The folder of a hub id at a branch, tag or commit; by default of the main branch, or of the
    only commit that there is."""
    if not _is_id(name):
        return None
    repository = _repository(name, cache_dir)
    ref = repository / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    found = snapshots(name, cache_dir)
    if commit is None:
        return found[0] if len(found) == 1 else None
    return next((folder for folder in found if folder.name == commit), None)


def snapshots(name: str, cache_dir: str | Path | None = None) -> list[Path]:
    """The folders of all commits of a hub id that the cache holds, the last one seen first; none
    for what is no hub id, such as a folder that is gone."""
    if not _is_id(name):
        return []
    found = (_repository(name, cache_dir) / SNAPSHOTS).glob("*/")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _is_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _repository(name: str, cache_dir: str | Path | None) -> Path:
    """Where the cache keeps a hub id."""
    # Not at the top: `sparsecraft --help` waits for it.
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="model")
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / folder
