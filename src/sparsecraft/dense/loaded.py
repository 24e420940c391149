"""What transformers says after loading a model: weights without a place, and places without one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsecraft.dense.sound import check_files
from sparsecraft.dense.weights import Weights
from sparsecraft.errors import HubError

logger = logging.getLogger("sparsecraft")

SHOWN = 3  # names in a message
LAYER = re.compile(r"\.(\d+)\.")


def check_loaded(model: Any, folder: Path, variant: str | None, info: Mapping[str, Any]) -> None:
    """Refuse a model of which something is random, and name what of its folder it does not hold.

    Args:
        variant: of the names of the folder's files.
        info: what `from_pretrained` gives as `output_loading_info`.

    Raises:
        HubError: weights are missing, have another shape, could not be converted, or are integers.
    """
    kind = type(model).__name__
    others = {name: shapes for name, *shapes in info["mismatched_keys"]}
    missing, errors = {*info["missing_keys"], *others}, info["error_msgs"]
    if missing or errors:
        shown = named(missing) if missing else errors[0]
        shapes = [
            f" (its {name} is {list(found)} and the config says {list(wanted)})"
            for name, (found, wanted) in sorted(others.items())
        ]
        raise HubError(
            f"{str(folder)!r} lacks {len(missing)} weights of {kind}, which would be random: "
            f"{shown}, in this shape: fetch it again{shapes[0] if shapes else ''}."
        )
    if unread := info["unexpected_keys"]:
        beyond = _beyond(model, unread)
        logger.warning(
            "%r holds %d weights that %s has no place for and that are not read: %s%s.",
            str(folder), len(unread), kind, named(unread), beyond,
        )  # fmt: skip
    _untie(model, folder, variant)
    check_files(model, Weights(folder, variant), HubError)


def named(names: Iterable[str]) -> str:
    """The first of some names."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _beyond(model: Any, unread: Iterable[str]) -> str:
    """What to say of layers that the configuration does not count."""
    known = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    numbers = {int(found[1]) for name in unread if (found := LAYER.search(name))}
    layers = sorted(n for n in numbers if known is not None and n >= known)
    if not layers:
        return ""
    return f" (layers {layers[0]} to {layers[-1]}, beyond num_hidden_layers={known})"


def _untie(model: Any, folder: Path, variant: str | None) -> None:
    """Let the configuration say of a head with weights of its own that it has them.

    transformers ties no weights that are both in the files and differ, whatever the configuration
    says, which later readers would believe.

    Raises:
        HubError: only some of them differ, or it is an encoder-decoder, whose function depends on
            the field as well.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = [pair for pair in tied.items() if not _are_one(model, *pair)]
    if apart and next(model.parameters()).is_meta:  # not compared, as nothing was read
        weights = Weights(folder, variant)
        apart = [pair for pair in apart if not _are_equal(model, weights, *pair)]
        for target, source in set(tied.items()) - set(apart):
            path, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(source))
    if not apart:
        return
    config = model.config
    if config.is_encoder_decoder or len(apart) < len(tied):
        raise HubError(
            f"{str(folder)!r} holds a {apart[0][0]!r} of its own, and its config.json says "
            "tie_word_embeddings=true: set it to false there, or take it out of the weights."
        )
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    logger.warning(
        "%r holds a %r of its own beside tie_word_embeddings=true in its config.json; the model "
        "has it, as transformers reads it, and says tie_word_embeddings=false.",
        str(folder), apart[0][0],
    )  # fmt: skip


def _are_one(model: Any, target: str, source: str) -> bool:
    return model.get_parameter_or_buffer(target) is model.get_parameter_or_buffer(source)


def _are_equal(model: Any, weights: Weights, target: str, source: str) -> bool:
    """Whether the files hold two tensors alike, or one of them alone."""
    names = [weights.find(model, name) for name in (target, source)]
    return None in names or torch.equal(*map(weights.tensor, names))
