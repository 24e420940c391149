"""Inputs of random numbers for any transformers model, built from its configuration alone.

Text models get token ids, vision models images, speech models sound, and models of several kinds of
inputs all of them, so that every tower runs. Where a family wants its images in a form of its own
that is not known here, it gets text alone; a certificate says which layers that leaves out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import positions_of
from sparsecraft.dense.twins import HERE

PROBE_SHAPE = (2, 64)
# Frames and samples that survive the strides of every speech encoder's convolutions.
FRAMES, STEPS = 64, 12

Inputs = dict[str, Tensor]

# What families raise on inputs that they cannot read.
UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def random_probe(model: nn.Module, seed: int = 0, shape: tuple[int, int] = PROBE_SHAPE) -> Inputs:
    """A batch of random inputs that the model runs on: the richest of `candidates` that does."""
    found = candidates(model, seed, shape)
    return found[0] if len(found) == 1 else next(_running(model, found), found[-1])


def _running(model: nn.Module, found: list[Inputs]) -> Iterator[Inputs]:
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for inputs in found:
            # Families refuse what they cannot read by many kinds of errors.
            with suppress(Exception), torch.no_grad(), torch.random.fork_rng():
                model(**{name: _to(value, device, model.dtype) for name, value in inputs.items()})
                yield inputs
    finally:
        for module, training in modes.items():
            module.training = training


def _to(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def candidates(
    model: nn.Module, seed: int = 0, shape: tuple[int, int] = PROBE_SHAPE
) -> list[Inputs]:
    """Batches of random inputs, the richest first; that the model takes each is not certain.

    Args:
        shape: (sequences, tokens) of text; images and sounds come one for each sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    text = _ids(model, generator, shape) if "input_ids" in takes or main == "input_ids" else {}
    if model.config.is_encoder_decoder and not text and "decoder_input_ids" in takes:
        text = {"decoder_input_ids": _ids(model, generator, shape)["input_ids"]}
    elif model.config.is_encoder_decoder and text:
        text["decoder_input_ids"] = text["input_ids"].flip(-1)
    if type(model).__name__.endswith("ForMultipleChoice"):  # one choice for each sequence
        text = {name: ids[:, None] for name, ids in text.items()}
    found = []
    if "pixel_values" in takes:
        found += [_with_images(model, text, images) for images in _images(model, generator, shape)]
    if main in ("input_features", "input_values"):
        found += [{**sound, **text} for sound in _sounds(model, main, generator, shape[0])]
    found = [inputs for inputs in found if inputs]
    return [*found, text] if main == "input_ids" or not found else found


def _ids(model: nn.Module, generator: torch.Generator, shape: tuple[int, int]) -> Inputs:
    """Token ids that stand for no image, video or sound."""
    config = model.config.get_text_config()
    if not getattr(config, "vocab_size", None):
        return {}
    rows, length = shape
    bounds = positions_of(model), getattr(model.config, "max_target_positions", None)
    length = min([length, *filter(None, bounds)])
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator, device="cpu")
    return {"input_ids": ids.where(~torch.isin(ids, _placeholders(model.config)), 3)}


def _placeholders(config: Any) -> Tensor:
    """The ids that stand for images, videos and sounds."""
    names = [
        f"{kind}_token_{leaf}" for kind in ("image", "video", "audio") for leaf in ("id", "index")
    ]
    values = [getattr(config, name, None) for name in names]
    found = [value for value in values if isinstance(value, int)]
    return torch.tensor(found, dtype=torch.long, device="cpu")


# --------------------------------------------------------------------------------------- images


def _images(
    model: nn.Module, generator: torch.Generator, shape: tuple[int, int]
) -> Iterator[Inputs]:
    """One image for each sequence, in the forms that families take them."""
    config = getattr(model.config, "vision_config", None) or model.config
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    patch = getattr(config, "patch_size", None)
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        # Qwen-VL and its kin: rows of patches, in blocks that are merged into one token.
        side = 2 * (getattr(config, "spatial_merge_size", None) or 1)
        width = channels * getattr(config, "temporal_patch_size", 1) * patch**2
        grid = torch.tensor([[1, side, side]] * shape[0], device="cpu")
        pixels = torch.randn(shape[0] * side**2, width, generator=generator, **HERE)
        yield {"pixel_values": pixels, "image_grid_thw": grid}
        return
    size = getattr(config, "image_size", None) or (8 * patch if isinstance(patch, int) else 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    size = (shape[0], channels, height, width)
    yield {"pixel_values": torch.randn(size, generator=generator, **HERE)}


def _with_images(model: nn.Module, text: Inputs, images: Inputs) -> Inputs:
    """Text and images of one batch, with a token for each of the image's features; none if it is
    unknown how many there are."""
    if not text or not len(_placeholders(model.config)):
        return {**images, **text}
    count = _features(model, images)
    if not count:
        return {}
    ids = text["input_ids"]
    tokens = ids.new_full((len(ids), count // len(ids)), int(_placeholders(model.config)[0]))
    longest = max(4, (positions_of(model) or ids.shape[1] + tokens.shape[1]) - tokens.shape[1])
    ids = torch.cat([ids[:, :2], tokens, ids[:, 2:longest]], dim=1)
    kinds = torch.isin(ids, _placeholders(model.config)).long()
    takes = inspect.signature(model.forward).parameters
    names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes]
    return {**text, "input_ids": ids, **images, **dict.fromkeys(names, kinds)}


def _features(model: nn.Module, images: Inputs) -> int | None:
    """How many tokens the images become."""
    get = getattr(model, "get_image_features", None)
    if get is None:
        return None
    reference = next(model.parameters())
    inputs = {
        name: _to(value, reference.device, model.dtype) if value.is_floating_point() else value
        for name, value in images.items()
    }
    with suppress(Exception), torch.no_grad(), torch.random.fork_rng():
        found = get(**inputs)
        found = getattr(found, "pooler_output", found)
        parts = [found] if isinstance(found, Tensor) else list(found)
        return sum(part.shape[:-1].numel() for part in parts)
    return None


# --------------------------------------------------------------------------------------- sounds


def _sounds(model: nn.Module, name: str, generator: torch.Generator, rows: int) -> Iterator[Inputs]:
    """Sounds as samples or as frames of features, in the orders that families take them."""
    config = model.config
    inner = [getattr(config, part, None) for part in ("encoder_config", "audio_config")]
    found = [
        getattr(part, field, None)
        for part in (config, *filter(None, inner))
        for field in ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel")
    ]
    width = next((value for value in found if isinstance(value, int)), None)
    frames = getattr(config, "max_length", None)
    if name == "input_values" and not (width and frames):
        stride = getattr(config, "inputs_to_logits_ratio", None) or 320
        kernel = sum(getattr(config, "conv_kernel", None) or (0,))
        shapes = [(rows, STEPS * stride + kernel * stride)]
    elif name == "input_values":  # AST: a spectrogram
        shapes = [(rows, frames, width)]
    else:
        positions = getattr(config, "max_source_positions", None)
        shapes = [(rows, width, 2 * positions)] if positions and width else []  # Whisper
        shapes += [(rows, FRAMES, width)] if width else []
    for shape in shapes:
        yield {name: torch.randn(shape, generator=generator, **HERE)}
