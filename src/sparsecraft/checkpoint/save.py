"""save(): a converted model -> a checkpoint folder, read back before it takes its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import get_rank

from sparsecraft.checkpoint import shards
from sparsecraft.checkpoint.base import entry, usable_base
from sparsecraft.checkpoint.card import readme
from sparsecraft.checkpoint.companions import copy_companions, write_companions
from sparsecraft.checkpoint.folder import MANIFEST
from sparsecraft.checkpoint.gathering import whole_tensors
from sparsecraft.checkpoint.integrity import OF_CHECKPOINT, entries, signed
from sparsecraft.checkpoint.jsonfile import json_digest, write_json
from sparsecraft.checkpoint.manifest import base_dtype, config_of, word
from sparsecraft.checkpoint.rebuild import check_rebuilt
from sparsecraft.checkpoint.replacing import replacing
from sparsecraft.checkpoint.resumable import may_change, write_index
from sparsecraft.checkpoint.space import require
from sparsecraft.checkpoint.tensors import WEIGHTS, new_or_changed
from sparsecraft.dense.digests import combine
from sparsecraft.dense.loading import class_of, model_class
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.sharing import is_sharded
from sparsecraft.dense.sound import check_weights
from sparsecraft.errors import CheckpointError, HubError
from sparsecraft.moe.names import dense_name, dense_tensors
from sparsecraft.recipe.formats import FORMAT_VERSION, VERSION, to_json
from sparsecraft.surgery.agreement import check_agrees
from sparsecraft.surgery.budget import state_of, warn_untrained
from sparsecraft.surgery.elsewhere import note
from sparsecraft.surgery.identity import stands_in
from sparsecraft.surgery.record import check_not_fast, conversion_of


def save(
    model: nn.Module,
    out: str | Path,
    *,
    standalone: bool = False,
    overwrite: bool = False,
    tokenizer: Any = None,
    keep: tuple[str, ...] | None = None,
    shard_size: int = shards.SHARD_SIZE,
    state_dict: Mapping[str, Tensor] | None = None,
    resumable: bool = False,
) -> Path:
    """Write a converted model as a checkpoint folder.

    Args:
        standalone: hold the base's tensors too, so that the folder needs nothing else. Always so
            for a model that cannot be built from a base on disk (another head, another size).
        overwrite: replace an existing folder once the new one is complete.
        tokenizer: written beside the model; by default the base's own files are copied.
        keep: write into a folder of the user's too; these globs of its files win over ours.
        shard_size: bytes beyond which the tensors are split over several files.
        state_dict: the model's, where it has been gathered already. Without it, every process of
            a sharded model (FSDP2) has to call, and the first one writes.
        resumable: let transformers' Trainer go on from the folder; see `checkpoint.resumable`.

    Raises:
        SurgeryError: the model is dense.
        CheckpointError: the folder exists, a weight is not finite, split networks were set one by
            one, the disk gives back other bytes than were written, or what is built from the folder
            is another model.
        ResourceError: the disk is too small.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    conversion_of(model).own_loss.step.move_alone()
    check_loadable(model)
    check_agrees(model)
    warn_untrained(model)
    out = Path(out)
    origin = usable_base(model, out, standalone)
    whole = whole_tensors(model, state_dict)
    if state_dict is None and is_sharded(model) and get_rank() > 0:
        stands_in(model, out)
        return out
    check_weights(model, CheckpointError, whole)
    note(model, whole)
    always = may_change(model) if resumable else frozenset()
    tensors = new_or_changed(model, origin, whole, always)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    require(out, disk=size, memory=0, task="Saving")
    with replacing(out, overwrite, keep or (), foreign=keep is not None) as folder:
        written: dict[str, shards.Digests] = {}
        shards.write(folder / WEIGHTS, tensors, shard_size, on_finish=written.__setitem__)
        if resumable:
            write_index(model, folder, WEIGHTS, tensors, shard_size)
        write_settings(model, folder, origin, tokenizer)
        copy_companions(out, folder, keep or ())
        write_manifest(model, folder, origin, written, resumable)
        check_rebuilt(model, whole, folder, origin)
    stands_in(model, out)
    return out


def write_settings(model: nn.Module, folder: Path, origin: Origin | None, tokenizer: Any) -> None:
    """All of a checkpoint but its tensors and its manifest."""
    write_json(folder / "report.json", conversion_of(model).report)
    write_json(folder / "config.json", config_of(model))
    write_companions(model, folder, tokenizer)
    (folder / "README.md").write_text(readme(model, origin))


def write_manifest(
    model: nn.Module,
    folder: Path,
    origin: Origin | None,
    written: Mapping[str, shards.Digests],
    resumable: bool = False,
) -> None:
    """recipe.json, at the end: it has digests of all that is in the folder. Of the model's tensors
    only names and dtypes are asked.

    Args:
        written: file -> digests of its tensors.
        resumable: it is of `save_pretrained`, by whose custom others write the tokenizer later.
    """
    record = conversion_of(model)
    manifest = {
        "format_version": FORMAT_VERSION,
        "sparsecraft": VERSION,
        "recipe": to_json(record.recipe),
        "base": origin and entry(origin, model, base_dtype(model)),
        "base_card": record.base_card,
        # What `revert` compares with, where there is no base to read the originals from.
        "dense": None if origin else {n: [word(d), h] for n, (d, h) in record.digests.items()},
        "resized": _resized(model),
        "running": state_of(model),
        "tensors": combine({n: d for digests in written.values() for n, d in digests.items()}),
        **({"shards": _of_shards(written)} if len(written) > 1 else {}),
        "config": json_digest(config_of(model)),
        "files": entries(folder, OF_CHECKPOINT),
        "written_by": "save_pretrained" if resumable else "save",
    }
    write_json(folder / MANIFEST, signed(manifest))


def _of_shards(written: Mapping[str, shards.Digests]) -> dict[str, str]:
    return {file: combine(dict(digests)) for file, digests in sorted(written.items())}


def _resized(model: nn.Module) -> dict[str, Any] | None:
    """What `revert` knows of tensors that have had another number of rows since the conversion."""
    record, now = conversion_of(model), dense_tensors(model)
    shapes = {
        name: list(shape)
        for name, shape in record.shapes.items()
        if name in now and now[name].shape != shape
    }
    return {"vocabulary": record.vocabulary, "shapes": shapes} if shapes else None


def check_loadable(model: nn.Module) -> None:
    """Refuse what `load` could not build again: a class or a tie that the config does not say, or
    a form for inference."""
    check_not_fast(model)
    try:
        found = model_class(model)
    except HubError:
        found = None
    if found is not class_of(model):
        raise CheckpointError(
            f"{type(model).__name__} is no class of transformers, so that a checkpoint of it could "
            "not be loaded again; save a model of a transformers class."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        target, source = parameters.get(name), parameters.get(other)
        if target is None or source is None or source.is_meta:
            continue
        # Experts where a network was shared are each their own.
        if dense_name(model, name) is None:
            continue
        if target is not source:
            raise CheckpointError(
                f"The configuration says tie_word_embeddings=True and {name!r} is a weight of its "
                f"own, not {other!r}; set tie_word_embeddings = False in the model's config, or "
                "tie them (model.tie_weights())."
            )
