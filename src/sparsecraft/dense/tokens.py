"""Whose tokens arrive at a module, in which positions, and whether they may see later ones."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from sparsecraft.dense.crossing import crossing

CACHES = ("cache", "past_key_values")  # the name since transformers 5.24, and before
POSITIONS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)


def positions_of(model: nn.Module) -> int | None:
    """The longest sequence the model was made for; None where nothing bounds it."""
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in POSITIONS]
    positions = min((size for size in named if size and size > 0), default=None)
    if positions is None:
        return None
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding's own onwards.
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and offset is not None:
            positions = min(positions, module.num_embeddings - offset - 1)
    # ProphetNet predicts several tokens at a time, and looks one position ahead.
    return positions - 1 if getattr(config, "ngram", None) else positions


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
    if any(module in set(tower.modules()) for tower in towers) or _is_fed(model, path):
        return "tower"
    if not is_encoder_decoder(model):
        return "tower" if towers and module in crossing(model) else "input"
    theirs = not _in_decoder(model, path) or module in crossing(model.get_decoder())
    return "input" if theirs else "decoder"


def _is_fed(model: nn.Module, path: str) -> bool:
    """Whether what stands inside of a model of text reads images or sound, by the input that it
    names; not all towers have a name that `get_encoder` knows (GIT, FLAVA, CLAP)."""
    inputs = [getattr(owner, "main_input_name", "input_ids") for owner in _owners(model, path)]
    return inputs[0] == "input_ids" and any(
        name.startswith(("pixel_", "input_features", "input_values")) for name in inputs
    )


def _owners(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around `path`, from the model inwards."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]


# Model type -> what runs on tokens (S, B, D) there: a square batch does not tell.
SEQUENCE_FIRST = {
    "fsmt": "*layers.*",
    "led": "*longformer_self_attn.*",
    "longformer": "*attention.self.*",
    "xlnet": "*layer.*",
}


def is_sequence_first(model: nn.Module, path: str) -> bool:
    """Whether tokens arrive at `path` as (positions, batch, width)."""
    types = {getattr(getattr(m, "config", None), "model_type", None) for m in _owners(model, path)}
    return any(t in types and fnmatchcase(path, paths) for t, paths in SEQUENCE_FIRST.items())


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
