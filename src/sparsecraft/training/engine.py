"""The engines by which several processes train one model, DDP and FSDP2: both compute what one
process would, and leave a state that any number of processes can go on from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from sparsecraft.dense.sharing import gathered, shared_like
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.outputs import undisturbed
from sparsecraft.recipe.stages import Stage
from sparsecraft.training.tally import Tally


def set_up(trainer: Any) -> None:
    """Let the engine that accelerate was asked for train as one process would.

    Raises:
        SparsecraftError: it is neither DDP nor FSDP2, or FSDP2 cannot run the stage's optimizer.
    """
    engine = trainer.accelerator.distributed_type
    if engine == DistributedType.FSDP:
        _set_up_fsdp(trainer.accelerator.state.fsdp_plugin, trainer.stage)
    elif engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise _not_ours(engine.value)
    elif engine != DistributedType.NO:
        handler = trainer.accelerator.ddp_handler
        handler.gradient_as_bucket_view = True  # they lie in DDP's buckets, not beside them
        # For each step DDP would walk through the whole graph: a tenth of a 1B model's step.
        handler.find_unused_parameters = varies(trainer.model) or bool(without_gradient(trainer))


def _set_up_fsdp(plugin: Any, stage: Stage) -> None:
    """Let FSDP2 gather parameters as they are: what trains, routers above all, is float32 in the
    forward pass and its gradients are summed in float32, and autocast does the rest, as it does in
    one process. By accelerate's own policy all would be rounded to the run's half precision."""
    if plugin.fsdp_version == 1:
        raise _not_ours("FSDP1")
    if stage.optimizer == "adafactor":
        raise SparsecraftError(
            f"Stage {stage.name!r} trains by Adafactor, whose sums over rows and columns do not "
            "run on tensors that FSDP2 shares among processes; train it by DDP, or by AdamW "
            "(variant='tuned' of the recipe)."
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _not_ours(engine: str) -> SparsecraftError:
    return SparsecraftError(
        f"accelerate was asked for {engine}, and models are trained by DDP or FSDP2 here; set "
        "fsdp_version: 2 in accelerate's configuration (FSDP_VERSION=2), or take DDP."
    )


def varies(model: nn.Module) -> bool:
    """Whether it depends on the batch, or on chance, which parameters a loss has a gradient to: a
    module of its own for each expert, and layers that are dropped. Experts of ours are stacked: a
    tensor of them always has a gradient, zero for those without a token."""
    drops = [value for name, value in _settings(model.config.to_dict()) if "layerdrop" in str(name)]
    lists = [
        part
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList | nn.ModuleDict) and path.endswith("experts")
    ]
    return any(drops) or any(p.requires_grad for part in lists for p in part.parameters())


def _settings(config: dict) -> Iterator[tuple]:
    for name, value in config.items():
        yield from _settings(value) if isinstance(value, dict) else [(name, value)]


def without_gradient(trainer: Any) -> list[str]:
    """The names of trained parameters that the loss of the first row has no gradient to."""
    model = trainer.model
    row = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    with tried(trainer):
        trainer.compute_loss(model, row).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return [name for name, parameter in trained.items() if parameter.grad is None]


@contextmanager
def tried(trainer: Any) -> Iterator[None]:
    """Let passes in training be tried in the block; then nothing is left of them."""
    model, tally = trainer.model, trainer.tally
    give_back = kept_buffers(model)
    # Hooks of the user's may draw by these.
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002
    trainer.tally = Tally()
    try:
        with undisturbed(model), torch.enable_grad():
            model.train()
            yield
    finally:
        trainer.tally = tally
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        give_back()
        model.zero_grad()


def kept_buffers(model: nn.Module) -> Callable[[], None]:
    """Copy a model's buffers; what gives them their values back."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def give_back() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return give_back


def share_again(model: nn.Module) -> None:
    """Let go of what FSDP2 keeps whole after a forward pass, for a backward pass to come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state, whole for the first process; every process calls this."""
    return _mapped(optimizer, optimizer.state_dict(), lambda tensor, _: gathered(tensor))


def load_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give an optimizer a state of whole tensors, of which every process takes its part."""
    optimizer.load_state_dict(_mapped(optimizer, state, shared_like))


def _mapped(
    optimizer: Any, state: Mapping[str, Any], change: Callable[[Tensor, Tensor], Any]
) -> dict[str, Any]:
    """The state with every tensor changed, given it and its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    changed = {
        number: {
            name: change(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}
