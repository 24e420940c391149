"""The knobs of a conversion and of a training run. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """None means: the recipe's value, or on a CPU a smaller one, which the run then says."""

    weights: tuple[float, ...] = ()
    """Relative sampling rates of the sources, in rows."""
    steps: int | None = None
    """Optimizer steps per stage; None trains for `epochs`."""
    stages: tuple[str, ...] = ()
    """Names of the recipe's stages to run; all of them by default."""
    fit_tokens: int | None = None
    """Inputs of each split network that its router is fitted to."""
    epochs: float | None = None
    """Passes over the data when `steps` is not given."""
    batch_size: int | None = None
    """Sequences per optimizer step over all devices."""
    micro_batch: int | None = None
    """Sequences per forward pass and device; None takes as many as fit into the free memory, of
    16384 tokens at most."""
    max_length: int | None = None
    """Tokens per sequence."""
    learning_rate: float | None = None
    """Of experts and whatever else trains."""
    router_learning_rate: float | None = None
    """None: the same as `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """After the warm-up; linear goes down to zero, cosine to what the recipe says, or zero."""
    packing: bool = True
    """Put several documents into one sequence (causal models). They do not see each other: where
    the model would let them, which is tried before the run, rows are not packed, with a warning."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    seed: int = 0
    """Of data order and dropout."""
    save_every: int | None = None
    """Steps between two states for `resume`; None: ten in a run of 100 steps or more."""
    log_every: int = 10
    """Steps between two log entries."""
    trackers: tuple[str, ...] = ()
    """What transformers reports to: tensorboard, wandb, ..."""
    progress: bool = True
    """Show a progress bar on standard error."""

    def of_training(self) -> dict[str, Any]:
        """These fields and their values, without those that a command has beside them."""
        return {field.name: getattr(self, field.name) for field in fields(TrainOptions)}
