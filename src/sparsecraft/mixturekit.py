"""The layout of MixtureKit's `traditional` mixtures: a router and whole networks in every layer.

Its configuration is that of the dense models with fields of its own; its tensors are those of the
dense models, with `mlp.experts.E.{gate,up,down}_proj.weight` and `mlp.gate.weight` (E, D).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sparsecraft.errors import CheckpointError
from sparsecraft.origin import Origin
from sparsecraft.targets.form import Form

# Fields of its own, which no dense configuration has.
OWN = set(
    "architectures auto_map base_model_class moe_method num_experts expert_names expert_model_ids "
    "expert_is_local num_experts_per_tok alpha router_layers router_layers_index stitch_freq "
    "stitch_layers_index mixturekit_trained model_type transformers_version _name_or_path".split()
)

EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def read_mixturekit(
    folder: Path, data: dict[str, Any]
) -> tuple[Any, Form, dict[str, Tensor], torch.dtype, str]:
    """Dense configuration, mixture, tensors under our names, dtype and title.

    Args:
        data: its config.json.

    Raises:
        CheckpointError: another method than `traditional`, no routers, or other experts than gated
            ones without biases.
    """
    method, dense = data["moe_method"], getattr(transformers, str(data.get("base_model_class")), 0)
    if method != "traditional" or not dense:
        raise CheckpointError(
            f"{folder} is a {method!r} mixture of {data.get('base_model_class')!r} by MixtureKit; "
            "`traditional` ones of a class of transformers are imported."
        )
    config = dense.config_class(**{k: v for k, v in data.items() if k not in OWN})
    tensors, banks = {}, {}
    for name, tensor in Origin(str(folder), folder).tensors():
        if match := EXPERT.fullmatch(name):
            banks.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        elif ".mlp.experts." in name:
            raise CheckpointError(f"{folder} holds {name!r}; experts have no biases here.")
        else:
            tensors[name.replace(".mlp.gate.weight", ".mlp.router.scorer.weight")] = tensor
    unrouted = [path for path in banks if f"{path}.router.scorer.weight" not in tensors]
    if unrouted or not banks:
        raise CheckpointError(
            f"{folder} holds no router at {unrouted[0] if unrouted else 'any layer'}: MixtureKit "
            "draws routers anew at each load until they are trained; train and save it there, or "
            "join the dense models by the recipe `btx`."
        )
    for path, bank in banks.items():
        experts = range(data["num_experts"])
        gate, up, down = (
            torch.stack([bank[e, p] for e in experts]) for p in ("gate", "up", "down")
        )
        tensors[f"{path}.experts.gate_up"] = torch.cat([gate, up], dim=1)
        tensors[f"{path}.experts.down"] = down
    form = Form(
        num_experts=data["num_experts"],
        top_k=data["num_experts_per_tok"],
        width=config.intermediate_size,
        normalized=True,
    )
    return config, form, tensors, down.dtype, "MixtureKit"
