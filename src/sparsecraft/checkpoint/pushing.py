"""push_to_hub of a converted model: a checkpoint of ours, with its own card, on the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from torch import nn

from sparsecraft.checkpoint.folder import MANIFEST
from sparsecraft.surgery.identity import bears

# How the upload is called; other words are save_pretrained's.
OF_THE_COMMIT = ("commit_message", "commit_description", "create_pr")


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
    **kwargs: Any,
) -> CommitInfo | None:
    """What `model.push_to_hub` does once the model is converted: transformers' own would put an
    empty card over ours, and leave the model with the name of a folder that is gone.

    Args:
        tags: put into the card.
        kwargs: `commit_message`, `commit_description` and `create_pr` as in transformers, and those
            of `save_pretrained`, such as `max_shard_size` and `standalone`.

    Returns:
        What the hub says; None in a process that does not write (FSDP2).

    Raises:
        SparsecraftError: the model cannot be saved; nothing has been uploaded.
    """
    name, commit = model.name_or_path, {"commit_message": f"Upload {type(model).__name__}"}
    commit |= {word: kwargs.pop(word) for word in OF_THE_COMMIT if kwargs.get(word) is not None}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint")
        try:
            model.save_pretrained(folder, **kwargs)
        finally:
            bears(model, name)
        if not folder.is_dir():
            return None
        if tags and (folder / MANIFEST).is_file():
            card = ModelCard.load(folder / "README.md")
            card.data.tags = sorted({*(card.data.tags or ()), *tags})
            card.save(folder / "README.md")
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        where = {"repo_id": repo, "revision": revision}
        return api.upload_folder(folder_path=folder, **where, **commit)
