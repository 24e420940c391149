"""What lets transformers' Trainer go on from a checkpoint of ours, or take the best one back.

Its `resume_from_checkpoint` and `load_best_model_at_end` read the shards that an index names, into
the model that is there. Ours names our own files, so that nothing is written twice:

model.safetensors.index.json    {"metadata": {"total_size"}, "weight_map": {tensor: our file}}
extra_state.safetensors         what else decides the function of split networks, where there is any
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.jsonfile import write_json
from sparsecraft.checkpoint.shards import split
from sparsecraft.checkpoint.tensorfile import size_of

INDEX, EXTRA = "model.safetensors.index.json", "extra_state.safetensors"


def may_change(model: nn.Module) -> set[str]:
    """Names of what training can change from one checkpoint to the next: all of that has to be in
    each, also what is still the base's, or the model would keep what it learned since."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name, _ in model.named_buffers()}


def write_index(
    model: nn.Module, folder: Path, weights: str, tensors: Mapping[str, Tensor], limit: int
) -> None:
    """Write the index beside the files that `shards.write` has made of these tensors.

    Args:
        weights: the name of their file.
        limit: bytes of one file.
    """
    files = split(tensors, Path(weights).stem, limit)
    where = {name: file for file, names in files.items() for name in names}
    size = sum(size_of(tensor) for tensor in tensors.values())
    if extra := _extra_states(model):
        tensorfile.write(folder / EXTRA, extra)
        where |= dict.fromkeys(extra, EXTRA)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _extra_states(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}._extra_state": module.get_extra_state()
        for path, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
