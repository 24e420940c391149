"""The errors that sparsecraft raises: each says what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsecraftError(Exception):
    """Base class of every error that sparsecraft raises on purpose."""


class RecipeError(SparsecraftError):
    """A recipe is unknown, malformed or impossible for this model."""


class SurgeryError(SparsecraftError):
    """An edit matches no module, or two edits claim the same one."""


class DonorError(SurgeryError):
    """The model's family has no feed-forward or attention module that we know how to read."""


class CertificateError(SurgeryError):
    """A conversion that claims to be exact is not."""


class SourceError(SparsecraftError):
    """Dense models that cannot be joined: they differ in shape, tokenizer or ancestor."""


class CheckpointError(SparsecraftError):
    """A checkpoint folder is incomplete, edited, truncated or stands on another base."""


class StateError(SparsecraftError, RuntimeError):
    """A state dict does not fit the model: for torch's callers what its own would raise."""


class TrainingError(SparsecraftError):
    """A training run diverged, or changed what it was to leave alone."""


class ExportError(SparsecraftError):
    """The mathematics of the model has no exact form in the requested architecture."""


class MergeError(SparsecraftError):
    """A layer has no form with fewer experts, or the weights for it do not fit."""


class HubError(SparsecraftError):
    """A model name could not be resolved to a folder."""


class DataError(SparsecraftError):
    """A data file is missing, empty or malformed."""


class ResourceError(SparsecraftError):
    """Not enough disk or memory for what was asked."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that lists the `known` names, the nearest to `word` first when one is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(known)}."


def check_seed(seed: object) -> None:
    """Refuse what no generator of random numbers takes as its seed.

    Raises:
        SparsecraftError: so it is.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SparsecraftError(
            f"seed is {seed!r:.40}; it must be a whole number from 0 to 2^32 - 1."
        )


def first_line(error: object) -> str:
    """The first line of what another library's error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
