"""The certificate: how far the converted model's outputs are from the dense ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.data.batches import as_batches
from sparsecraft.errors import DataError
from sparsecraft.moe.context import sentence_width

# Largest |difference| that counts as the same function, relative to the largest |output| (at
# least 1): a reordered sum of a few thousand products, through a few dozen layers.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

PROBE_SHAPE = (2, 64)
# What of the user's data enters the certificate: all logits are kept until the comparison.
MAX_DATA_PROBES, DATA_LENGTH = 4, 128


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured on the probe batches.

    Attributes:
        max_difference: largest |converted - dense| over all outputs.
        scale: largest |dense output|.
        tolerance: the difference up to which the two count as equal, for this dtype and scale.
        dtype: of the outputs.
        probes: how many batches were compared, the random one included.
        layers: 0 if the model's outputs were compared; else how many layers were, each alone on
            the input that it has in the dense model. The numbers are then those of the layer with
            the largest difference relative to its output.
    """

    max_difference: float
    scale: float
    tolerance: float
    dtype: str
    probes: int
    layers: int = 0

    @property
    def exact(self) -> bool:
        return self.max_difference <= self.tolerance

    def within(self, relative: float) -> bool:
        """Whether the difference is at most this share of the scale, beyond what is equal."""
        return self.max_difference <= relative * self.scale + self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.exact else "different"
        compared = (
            f"of {self.layers} layers one by one, max |output" if self.layers else "max |logit"
        )
        scale = "that layer's output" if self.layers else "logit"
        return (
            f"{compared} difference| {self.max_difference:.1e} on {self.probes} probe "
            f"batch(es), {scale} scale {self.scale:.1f}, tolerance {self.tolerance:.1e} "
            f"in {self.dtype}: {verdict}"
        )


def probes(model: nn.Module, data: Any, tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """A random batch, and the first of the user's."""
    found = [random_probe(model, seed)]
    if data is not None:
        shape = {"batch_size": PROBE_SHAPE[0], "max_length": DATA_LENGTH}
        batches = as_batches(data, tokenizer, model=model, **shape)
        found += islice(batches, MAX_DATA_PROBES)
    return found


def random_probe(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A batch of 2 x 64 random token ids, or 2 random images, for any transformers model."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (PROBE_SHAPE[0], config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    length = min(PROBE_SHAPE[1], getattr(config, "max_position_embeddings", None) or PROBE_SHAPE[1])
    ids = torch.randint(0, config.vocab_size, (PROBE_SHAPE[0], length), generator=generator)
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(-1)}
    return {"input_ids": ids}


def outputs(model: nn.Module, batches: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The model's logits (or last hidden states) on each batch, in evaluation mode, on the CPU."""
    device = next(model.parameters()).device
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    results = []
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            inputs = {
                key: _to(value, device, floating) for key, value in batch.items() if key != "labels"
            }
            if getattr(model.config, "is_encoder_decoder", False):
                inputs.setdefault("decoder_input_ids", inputs["input_ids"])
            if width := sentence_width(model):
                rows = len(next(iter(inputs.values())))
                inputs.setdefault("sentence_embeddings", _random_sentences(rows, width))
            output = model(**inputs)
            logits = getattr(output, "logits", None)
            results.append((output.last_hidden_state if logits is None else logits).cpu())
    return results


def _random_sentences(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def compare(dense: list[Tensor], converted: list[Tensor]) -> Certificate:
    """The largest difference between two lists of outputs."""
    dtype = dense[0].dtype
    pairs = zip(dense, converted, strict=True)
    # The maximum of a tensor, not of Python: it lets a NaN through.
    differences = torch.stack([(c - d).abs().max() for d, c in pairs])
    difference = differences.max().item()
    scale = max(d.abs().max().item() for d in dense)
    return Certificate(
        max_difference=difference,
        scale=scale,
        tolerance=TOLERANCE[dtype] * max(1.0, scale),
        dtype=str(dtype).removeprefix("torch."),
        probes=len(dense),
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each back in its own mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        # Not train(): that would reach into modules which were in another mode than their parent.
        for module in model.modules():
            module.training = modes.get(module, module.training)


def _to(value: Any, device: torch.device, floating: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        raise DataError(f"A probe batch holds a {type(value).__name__}; it must hold tensors.")
    value = value.to(device)
    return value.to(floating) if value.is_floating_point() and floating else value
