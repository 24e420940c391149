"""The models of the zoo: tiny, random, always the same, with inputs that reach all of a model.

Sizes: B sequences of S tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.cases.zoo import IMAGE, IMAGE_TOKEN, PATCH, ZOO

B, S = 2, 24
WORDS = (3, IMAGE_TOKEN)  # token ids that mean nothing special


@functools.cache
def _state(name: str) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a family."""
    member = ZOO[name]
    cls = getattr(transformers, member.model)
    torch.manual_seed(0)
    model = cls(cls.config_class(**member.config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # initial norms and biases are ones and zeros, which hide mistakes
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "embed" not in key:
                parameter.copy_(noise * 1.2 * parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_((0.3 if key.endswith("bias") else 0.1) * noise)
    return model.config, {key: value.clone() for key, value in model.state_dict().items()}


def member_model(name: str) -> nn.Module:
    """A new copy of the family's model in evaluation mode, always with the same values."""
    config, state = _state(name)
    torch.manual_seed(0)
    model = getattr(transformers, ZOO[name].model)(config).eval()
    model.load_state_dict(state)
    return model


def member_inputs(name: str) -> dict[str, Tensor]:
    """Inputs for one forward pass that reach every part of the model."""
    generator = torch.Generator().manual_seed(2)
    return INPUTS[ZOO[name].inputs](_state(name)[0], generator)


def _ids(generator: torch.Generator, length: int = S) -> Tensor:
    return torch.randint(*WORDS, (B, length), generator=generator)


def _image(config: Any, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or IMAGE
    return torch.randn(B, 3, size, size, generator=generator)


def _around_images(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    """Text with `count` image tokens after its fourth word."""
    ids = _ids(generator)
    ids[:, 4 : 4 + count] = IMAGE_TOKEN
    return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}


def _image_in_text(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    count = getattr(config, "mm_tokens_per_image", None) or (IMAGE // PATCH) ** 2
    return _around_images(generator, count) | {"pixel_values": _image(None, generator)}


def _patches_in_text(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    vision, side = config.vision_config, 4  # patches in each direction, merged two by two
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return _around_images(generator, (side // vision.spatial_merge_size) ** 2) | {
        "pixel_values": torch.randn(B * side**2, size, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * B),
    }


def _pair(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(-1)}


def _noise(key: str, *shape: int) -> Callable[[Any, torch.Generator], dict[str, Tensor]]:
    return lambda config, generator: {key: torch.randn(B, *shape, generator=generator)}


INPUTS: dict[str, Callable[[Any, torch.Generator], dict[str, Tensor]]] = {
    "text": lambda config, generator: {"input_ids": _ids(generator)},
    "seq2seq": _pair,
    "seq2seq, globally": lambda config, generator: (
        _pair(config, generator)
        | {"global_attention_mask": (torch.arange(S) == 0).int().repeat(B, 1)}
    ),
    "image": lambda config, generator: {"pixel_values": _image(config, generator)},
    "wave": _noise("input_values", 400),
    "features": _noise("input_features", 20, 16),
    "frames": _noise("input_features", 64, 8),
    "spectrogram and text": lambda config, generator: {
        "input_features": torch.randn(B, 8, 64, generator=generator),
        "decoder_input_ids": _ids(generator, 6),
    },
    "image beside text": lambda config, generator: {
        "input_ids": _ids(generator, 12),
        "pixel_values": _image(None, generator),
    },
    "image in text": _image_in_text,
    "patches in text": _patches_in_text,
}


SAID = ("logits", "last_hidden_state", "pooler_output", "text_embeds", "image_embeds")


def member_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """All that a model says, in a row: logits, or hidden states and what was pooled of them."""
    with torch.no_grad():
        output = model(**inputs)
    found = [getattr(output, name, None) for name in SAID]
    return torch.cat([tensor.flatten() for tensor in found if isinstance(tensor, Tensor)])
