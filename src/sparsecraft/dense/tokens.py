"""Whose tokens arrive at a module, in which positions, and whether they may see later ones."""

from __future__ import annotations

from typing import Literal

from torch import nn

from sparsecraft.dense.crossing import crossing


def positions_of(model: nn.Module) -> int | None:
    """The longest sequence the model was made for; None where nothing bounds it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding's own onwards.
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and offset is not None:
            positions = min(positions, module.num_embeddings - offset - 1)
    return positions


# Whose tokens a layer reads: the model's only ones, or its encoder's, which a batch's masks
# cover; those of a decoder beside an encoder; or those of an image's or sound's own tower.
Reads = Literal["input", "decoder", "tower"]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a decoder stands beside an encoder; a module that is no model of transformers has no
    configuration, and one row of blocks."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def can_generate(model: nn.Module) -> bool:
    """Whether `generate` works on a model; a module that is no model of transformers has none."""
    return hasattr(model, "can_generate") and model.can_generate()


def reads(model: nn.Module, path: str) -> Reads:
    """Whose tokens arrive at `path`."""
    module, towers = model.get_submodule(path), _towers(model)
    if any(module in set(tower.modules()) for tower in towers):
        return "tower"
    if not is_encoder_decoder(model):
        return "tower" if towers and module in crossing(model) else "input"
    theirs = not _in_decoder(model, path) or module in crossing(model.get_decoder())
    return "input" if theirs else "decoder"


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether tokens at `path` must not see later ones."""
    if is_encoder_decoder(model):
        # What a decoder's attention reads of the encoder is not causal, but its length varies.
        return _in_decoder(model, path)
    if getattr(getattr(model, "config", None), "is_decoder", False):
        return True
    return model.can_generate() if hasattr(model, "can_generate") else True


def _towers(model: nn.Module) -> list[nn.Module]:
    """Those of images and sounds beside a text model; a model without one returns itself, and some
    encoder-decoders their encoder."""
    if not hasattr(model, "get_encoder"):
        return []
    found = [model.get_encoder(modality=modality) for modality in ("image", "audio")]
    return [t for t in found if t is not model and t is not model.get_encoder()]


def _in_decoder(model: nn.Module, path: str) -> bool:
    return model.get_submodule(path) in set(model.get_decoder().modules())
