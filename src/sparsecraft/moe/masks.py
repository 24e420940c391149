"""Whether a batch's mask is of the tokens that a layer reads, and in which order they come there.

Shapes: B sequences, S positions, F frames of sound, T tokens.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn

# How families call what counts the frames that their convolutions make of samples or features.
LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


def of_frames(model: nn.Module, mask_BS: Tensor) -> Tensor:
    """The mask of a sound's samples or features for the frames that the model makes of them,
    (B, F), by the model's own lengths; that of a model of text, or without these, as it is."""
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        return mask_BS
    owners = model, getattr(model, "get_encoder", lambda: model)()
    found = (getattr(owner, name, None) for owner in owners for name in LENGTHS)
    lengths = next(filter(None, found), None)
    if lengths is None:
        return mask_BS
    # The tokens of the layers, and not of an adapter behind them.
    adapted = "add_adapter" in inspect.signature(lengths).parameters
    options = {"add_adapter": False} if adapted else {}
    frames = int(lengths(torch.tensor([mask_BS.shape[1]]), **options)[0])
    real_B = lengths(mask_BS.long().sum(-1), **options)
    return torch.arange(frames, device=mask_BS.device) < real_B[:, None]


def of_rows(mask_BS: Tensor, shape: torch.Size, sequence_first: bool = False) -> Tensor | None:
    """A mask for the tokens of one layer in their order, (T,); None if it is not of them.

    Args:
        shape: of the tokens: (B, S), flattened, (S, B), or one for each sequence.
        sequence_first: where the shape does not tell, whether they are (S, B).
    """
    if mask_BS.ndim != 2:
        return None
    B, S = mask_BS.shape
    found, own, other = (tuple(n for n in s if n != 1) for s in (shape, (B, S), (S, B)))
    if math.prod(shape) == B:
        return mask_BS.any(-1)
    if found == (B * S,) or found == own == other:
        return (mask_BS.T if sequence_first else mask_BS).reshape(-1)
    if found in (own, other):
        return (mask_BS if found == own else mask_BS.T).reshape(-1)
    return None


def misfit(mask: Tensor, shape: torch.Size, layer: str, model: nn.Module) -> str:
    """What to say where a mask that knows of padding is not of a layer's tokens."""
    return (
        f"The batch has a mask of shape {tuple(mask.shape)}, and {layer!r} of this "
        f"{type(model).__name__} reads tokens of shape {tuple(shape)}: where that is so, routing "
        "statistics and balance losses count all tokens, padding too."
    )
