"""The folder of a PEFT LoRA, read; and as a dense model: its base with the update added, tensor by
tensor.

Shapes: R rank, I input features, O output features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from sparsecraft.dense.jsonfile import read_object
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.dense.sound import check_weight
from sparsecraft.errors import SourceError
from sparsecraft.recipe.numbers import is_number

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

# Starts that change the base's weights too, so that W + scale B A is not the trained model.
MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Fields that make another function, or another model, of it.
VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA, which acts on some tokens only",
    "arrow_config": "a router over several LoRAs",
    "layer_replication": "a LoRA of a model with other layers",
}


def read_settings(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG, SourceError)


@dataclass(frozen=True)
class LoraFolder:
    """What PEFT wrote of a LoRA: A (R, I), B (O, R) and a scale for each changed weight.

    Attributes:
        folder: with adapter_config.json and adapter_model.safetensors.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_settings(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name below the dense model -> tensor."""
        return {
            name.removeprefix(PREFIX): check_weight(name, tensor, self.folder, SourceError)
            for name, tensor in SafeFile.open(self.folder / WEIGHTS, SourceError)
        }

    def check_kind(self) -> None:
        """Refuse what is more than W + scale B A on the base as it is.

        Raises:
            SourceError: another method than LoRA, a variant of it, or A without its B.
        """
        kind, start = self.config.get("peft_type"), self.config.get("init_lora_weights")
        if kind != "LORA":
            raise SourceError(f"{self.folder} is a PEFT folder of type {kind!r}; LoRAs are joined.")
        self._check_scales()
        for field, what in VARIANTS.items():
            if self.config.get(field):
                raise SourceError(f"{self.folder} has {field}={self.config[field]!r}: {what}.")
        if isinstance(start, str) and start.lower().startswith(MOVES_BASE):
            raise SourceError(
                f"{self.folder} has init_lora_weights={start!r}, which changes the base's weights "
                "as well; save it as a plain LoRA by PEFT's save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...)."
            )
        for name in self.tensors:
            part = next((part for part in (LORA_A, LORA_B) if name.endswith(part)), None)
            if part is not None:
                self._check_pair(name.removesuffix(part))

    def _check_scales(self) -> None:
        named = self.config.get("base_model_name_or_path")
        if not isinstance(named, (str, NoneType)):
            raise SourceError(
                f"{self.folder / CONFIG} names {named!r:.80} as its base; correct it."
            )
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(map(is_number, patterns.values())):
            raise SourceError(
                f"{self.folder / CONFIG} has alpha_pattern={patterns!r:.80}; it must be a number "
                "for each pattern of paths."
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SourceError(
                    f"{self.folder / CONFIG} has {pattern!r:.80} in alpha_pattern, which is no "
                    f"pattern ({error}); correct it."
                ) from None

    def _check_pair(self, path: str) -> None:
        down_RI, up_OR = (self.tensors.get(path + part) for part in (LORA_A, LORA_B))
        if down_RI is None or up_OR is None or len(down_RI) != up_OR.shape[-1]:
            shapes = [None if t is None else list(t.shape) for t in (down_RI, up_OR)]
            raise SourceError(
                f"{self.folder} holds A and B of {path!r} as {shapes[0]} and {shapes[1]}, which "
                "are no pair of one rank; save the adapter again."
            )

    def changes(self) -> frozenset[str]:
        """Names of the base's tensors that the adapter changes, or has instead of them."""
        return frozenset(map(dense_name, self.tensors))

    def pair(self, path: str) -> tuple[Tensor, Tensor] | None:
        """A (R, I) and B (O, R) of a module's weight, if the adapter changes it."""
        down_RI = self.tensors.get(path + LORA_A)
        return None if down_RI is None else (down_RI, self.tensors[path + LORA_B])

    def scale(self, path: str, rank: int) -> float:
        """What B A is multiplied by."""
        alpha = self.config.get("lora_alpha")
        if not is_number(alpha):
            raise SourceError(
                f"{self.folder / CONFIG} has lora_alpha={alpha!r}, which the update of "
                f"{path!r} is scaled by; save the adapter again."
            )
        if patterns := self.config.get("alpha_pattern"):
            from peft.utils.other import get_pattern_key  # PEFT costs seconds to import

            alpha = patterns.get(get_pattern_key(patterns, path), alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class MergedLora:
    """W + scale B A of every tensor that the adapter changes, and the base's of all others.

    Attributes:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: dense name -> tensor of the base, or None.
        base_shape: dense name -> its shape, or None.
    """

    folder: Path
    base: Callable[[str], Tensor | None]
    base_shape: Callable[[str], tuple[int, ...] | None]

    @cached_property
    def lora(self) -> LoraFolder:
        return LoraFolder(self.folder)

    def check(self) -> None:
        """Refuse what is more than W + scale B A.

        Raises:
            SourceError: another method than LoRA, DoRA, or tensors that belong to no dense one.
        """
        self.lora.check_kind()
        for name in self.lora.tensors:
            if self.base_shape(dense_name(name)) is None:
                raise SourceError(
                    f"{self.folder} holds {name!r}, which is no LoRA of a matrix of the base: "
                    "DoRA, LoRAs of embeddings and of whole banks are not read. Merge it with "
                    "PEFT, save the dense model and name that."
                )

    def check_tied(self, head: str | None, table: str | None) -> None:
        """Refuse an adapter that trained the head or the table of embeddings where they are one:
        PEFT gives it a copy of its own, and the other stays as it was.

        Raises:
            SourceError: it did, and did not tie the two (`ensure_weight_tying`).
        """
        changed = [name for name in self.lora.tensors if dense_name(name) in (head, table)]
        if changed and not self.lora.config.get("ensure_weight_tying"):
            raise SourceError(
                f"{self.folder} trained {changed[0]!r} on a base whose head is its table of "
                "embeddings (tie_word_embeddings), of which PEFT leaves the other as it was: no "
                "model of the base's architecture. Train the LoRA without it (modules_to_save), or "
                "with ensure_weight_tying=True, or merge it into a base that is not tied."
            )

    def tensor(self, name: str) -> Tensor | None:
        """The merged tensor of a dense name; None if the base has none."""
        if name in self.lora.tensors:  # trained in full (`modules_to_save`, biases)
            return self.lora.tensors[name]
        weight, pair = self.base(name), self._pair(name)
        if weight is None or pair is None:
            return weight
        down_RI, up_OR = pair
        scale = self.lora.scale(name.removesuffix(".weight"), len(down_RI))
        delta = scale * (up_OR.float() @ down_RI.float())
        delta = delta.t() if self.lora.config.get("fan_in_fan_out") else delta
        return (weight.detach().cpu().float() + delta).to(weight.dtype)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of what `tensor` gives, without a tensor of the base."""
        if name in self.lora.tensors:
            return tuple(self.lora.tensors[name].shape)
        shape, pair = self.base_shape(name), self._pair(name)
        if shape is None or pair is None:
            return shape
        down_RI, up_OR = pair
        delta = (len(up_OR), down_RI.shape[1])
        return delta[::-1] if self.lora.config.get("fan_in_fan_out") else delta

    def _pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        path = name.removesuffix(".weight")
        return None if path == name else self.lora.pair(path)


def dense_name(name: str) -> str:
    """The base's tensor that a tensor of an adapter is for."""
    for part in (LORA_A, LORA_B):
        if name.endswith(part):
            return name.removesuffix(part) + ".weight"
    return name
